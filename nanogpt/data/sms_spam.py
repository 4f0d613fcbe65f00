"""The SMS Spam Collection: 5,574 text messages, 747 of them spam (Almeida and others, UCI)."""

from pydantic.dataclasses import dataclass

from nanogpt.data.labelled import LabelledTexts
from nanogpt.data.splits import Example
from nanogpt.hub import check_reachable
from nanogpt.values import CHECKED, Flag, Text

REPOSITORY = "ucirvine/sms_spam"
PARQUET = "plain_text/train-00000-of-00001.parquet"
LABELS = ("ham", "spam")  # what the numbers in the repository mean


@dataclass(frozen=True, config=CHECKED)
class SmsSpam(LabelledTexts):
    """The collection from its file `SMSSpamCollection` (`path`), or from the Hugging Face hub.

    What was fetched once is found again in the hub's own cache, without a network.
    """

    balance: Flag = True
    name: Text = "sms_spam"

    def examples(self) -> list[Example]:
        if self.path is not None:
            return super().examples()
        import pyarrow.parquet

        table = pyarrow.parquet.read_table(_fetch(), columns=["sms", "label"])
        return [
            Example(text.rstrip("\r\n"), LABELS[label])
            for text, label in zip(*(column.to_pylist() for column in table.columns), strict=True)
        ]

    def fingerprint(self) -> str:
        """Return a hash over the file's messages, or the name of the repository."""
        return REPOSITORY.replace("/", "-") if self.path is None else super().fingerprint()


def _fetch() -> str:
    """Return the collection's parquet file in the hub's cache, downloaded where it is not there."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return hf_hub_download(REPOSITORY, PARQUET, repo_type="dataset", local_files_only=True)
    except LocalEntryNotFoundError:
        instead = "pass data.path=<the file SMSSpamCollection of archive.ics.uci.edu/dataset/228>"
        check_reachable("data=sms_spam", instead)
    try:
        return hf_hub_download(REPOSITORY, PARQUET, repo_type="dataset")
    except OSError as error:
        raise ConnectionError(
            f"data=sms_spam: fetching {REPOSITORY} broke off ({type(error).__name__}); {instead}"
        ) from error
