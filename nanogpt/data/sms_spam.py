"""The SMS Spam Collection: 5,574 text messages, 747 of them spam (Almeida and others, UCI)."""

from pydantic.dataclasses import dataclass

from nanogpt.data.labelled import LabelledTexts
from nanogpt.data.source import fetch_file
from nanogpt.data.splits import Example
from nanogpt.values import CHECKED, Flag, Text

REPOSITORY = "ucirvine/sms_spam"
PARQUET = "plain_text/train-00000-of-00001.parquet"
LABELS = ("ham", "spam")  # of the numbers in the repository


@dataclass(frozen=True, config=CHECKED)
class SmsSpam(LabelledTexts):
    """The collection from its file `SMSSpamCollection` (`path`), or from the Hugging Face hub."""

    balance: Flag = True
    name: Text = "sms_spam"

    def examples(self) -> list[Example]:
        """Return the messages; raises as `hub_errors` does where they cannot be fetched."""
        if self.path is not None:
            return super().examples()
        import pyarrow.parquet

        instead = "pass data.path=<the file SMSSpamCollection of archive.ics.uci.edu/dataset/228>"
        path = fetch_file(REPOSITORY, PARQUET, "main", instead)
        rows = pyarrow.parquet.read_table(path).to_pylist()
        return [Example(row["sms"].rstrip("\r\n"), LABELS[row["label"]]) for row in rows]

    def fingerprint(self) -> str:
        """Return a hash over the file's messages, or the name of the repository."""
        return REPOSITORY.replace("/", "-") if self.path is None else super().fingerprint()
