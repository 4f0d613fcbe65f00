"""Data sets of the Hugging Face hub, read as a stream: no file of theirs is written to disk.

Which files make up a subset and a split is settled by the `datasets` library, as everywhere else.
Parquet, JSON Lines and text are then read in place, the text column only; other kinds of files go
through that library's own streaming.
"""

import hashlib
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from pydantic.dataclasses import dataclass

from nanogpt.data.files import JSON, RECORDS, Reader
from nanogpt.data.records import brief, open_file
from nanogpt.data.source import Extent, Source
from nanogpt.data.text import TextFiles
from nanogpt.hub import check_reachable
from nanogpt.values import CHECKED, FilePath, Flag, Share, Text

READABLE = (*RECORDS, *JSON, ".txt")
LISTED_NAMES = 20  # of subsets, in an error
ANSWER_S = 10.0  # for the revision; reading has time limits and retries of huggingface_hub's own
TRANSPORTS = {"httpx", "httpx2", "httpcore", "requests", "urllib3", "h11", "aiohttp"}


@dataclass(frozen=True, config=CHECKED)
class HubDataset(Source):
    """One split of a data set on the hub, or files of it on this machine (`path`).

    `revision` is a branch, a tag or a commit. `separator` stands between the documents of plain
    text files. With `skip_bad`, records that cannot be read are None instead of an error.
    """

    repository: Text
    subset: Text | None = None
    split: Text = "train"
    revision: Text = "main"
    text_column: Text = "text"
    path: FilePath | None = None
    val_fraction: Share = 0.01
    skip_bad: Flag = False
    separator: Text | None = None
    name: Text = "hub"

    def documents(self, skip: int = 0) -> Iterator[str | None]:
        """Yield the documents after the first `skip`.

        Failed requests are repeated for half a minute. Raises ConnectionError in one sentence,
        within seconds, where the hub cannot be reached at all.
        """
        if self.path is not None:
            yield from self._local().documents(skip)
            return
        with self._explained():
            builder = self._builder()
            if files := self._files(builder):
                yield from self._reader().documents(files, skip)
            else:
                yield from self._streamed(builder, skip)

    def fingerprint(self) -> str:
        """Return a hash over what is asked for: a branch counts by its name."""
        if self.path is not None:
            return self._local().fingerprint()
        asked = [self.repository, self.subset, self.split, self.revision, self.text_column]
        asked += [] if self.separator is None else [self.separator]
        return hashlib.sha256(repr(asked).encode()).hexdigest()[:16]

    def extent(self) -> Extent | None:
        """Estimate what is read of the files from a few of them; other kinds of files: None."""
        if self.path is not None:
            return self._local().extent()
        with self._explained():
            files = self._files(self._builder())
            return self._reader().extent(files) if files else None

    def pinned(self, revision: str | None = None) -> "HubDataset":
        """Return this data set at a commit: the one given, or the hub's for its revision now."""
        if self.path is not None:
            return self
        if revision is not None:
            return replace(self, revision=revision)
        with self._explained():
            return replace(self, revision=self._commit())

    def description(self) -> dict[str, Any]:
        if self.path is not None:
            return self._local().description()
        return {
            "repository": self.repository,
            "subset": self.subset,
            "split": self.split,
            "revision": self.revision,
            "text_column": self.text_column,
        }

    def _prepared_as(self) -> str:
        return self.repository if self.name == "hub" else self.name

    def _local(self) -> TextFiles:
        return TextFiles(
            path=self.path,
            text_column=self.text_column,
            skip_bad=self.skip_bad,
            separator=self.separator,
            name=self.name,
            suffixes=RECORDS,
        )

    def _reader(self) -> Reader:
        return Reader(self.text_column, self.skip_bad, self.separator)

    def _commit(self) -> str:
        """Return the commit that the revision stands for; without asking where it is one."""
        if re.fullmatch("[0-9a-f]{40}", self.revision):
            return self.revision
        from huggingface_hub import HfApi

        info = HfApi().dataset_info(self.repository, revision=self.revision, timeout=ANSWER_S)
        return str(info.sha)

    def _builder(self) -> Any:
        """Return what `datasets` knows of the subset: its files by split."""
        from datasets import get_dataset_config_names, load_dataset_builder

        commit = self._commit()
        with _quiet():
            try:
                return load_dataset_builder(self.repository, self.subset, revision=commit)
            except ValueError as error:
                subsets = get_dataset_config_names(self.repository, revision=commit)
                if self.subset in subsets:
                    raise
                found = "needs a subset" if self.subset is None else f"has no subset {self.subset}"
                raise ValueError(
                    f"the data set {self.repository} {found}; pass data.subset=NAME, one of "
                    f"{_some(subsets)}"
                ) from error

    def _files(self, builder: Any) -> list[str]:
        """Return the URLs of the split's files, none where they are not of a kind read here."""
        by_split = {str(split): files for split, files in (builder.config.data_files or {}).items()}
        if by_split and self.split not in by_split:
            raise ValueError(
                f"the data set {self.repository} has no split {self.split}; pass data.split=NAME, "
                f"one of {_some(sorted(by_split))}"
            )
        files = [str(url) for url in by_split.get(self.split, [])]
        plain = all(url.lower().endswith(READABLE) for url in files)
        nested = getattr(builder.config, "field", None) is not None
        return files if plain and not nested and not (files and _is_json_array(files[0])) else []

    def _streamed(self, builder: Any, skip: int) -> Iterator[str | None]:
        """Yield the documents of any data set by the streaming of the `datasets` library."""
        with _quiet():
            rows = builder.as_streaming_dataset(split=self.split)
        for number, row in enumerate(rows.skip(skip), start=skip + 1):
            text = row.get(self.text_column)
            if not isinstance(text, str) and not self.skip_bad:
                raise ValueError(
                    f"{self.repository}, record {number} has no text under {self.text_column!r} "
                    f"(it has {', '.join(row)}); pass data.text_column=NAME or data.skip_bad=true"
                )
            yield text if isinstance(text, str) else None

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Fail fast without a network, and say in one sentence what the hub refused."""
        check_reachable(
            f"data={self.name}: the data set {self.repository}",
            "pass data.path=<its parquet or JSON Lines files>, choose data=text, connect, or run "
            f"`python -m nanogpt.prepare {self._prepared_as()}` on a connected machine and copy "
            "the folder it names",
        )
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries are no news
        try:
            yield
        except Exception as error:
            explained = explanation(error, self.repository, self.revision)
            if explained is None:
                raise
            raise explained from error


def explanation(error: Exception, repository: str, revision: str = "main") -> Exception | None:
    """Return an error of huggingface_hub, or of what it uses, in one sentence; None for others."""
    from huggingface_hub import utils as errors

    chain = list(_causes(error))
    data_set = f"the data set {repository}"
    token = "set HF_TOKEN to a token that may read it (huggingface.co/settings/tokens)"
    if any(isinstance(e, errors.GatedRepoError) for e in chain):
        return PermissionError(
            f"{data_set} is gated; accept its terms on https://huggingface.co/datasets/"
            f"{repository} and {token}"
        )
    if any(isinstance(e, errors.RevisionNotFoundError) for e in chain):
        return ValueError(
            f"{data_set} has no revision {revision}; pass data.revision=<a branch, tag or "
            f"commit of it>"
        )
    if any(isinstance(e, errors.RepositoryNotFoundError) for e in chain):
        return FileNotFoundError(
            f"{data_set} is not on the hub, or is private; correct its name, or {token}"
        )
    if any(_status(e) in (401, 403) for e in chain):
        return PermissionError(f"the hub does not let this machine read {data_set}; {token}")
    if any(_status(e) or _is_transport(e) for e in chain):
        return ConnectionError(
            f"reading {data_set} broke off ({type(error).__name__}: {brief(error)}); "
            "give the same command again, which continues from what is prepared"
        )
    if "scripts are no longer supported" in str(error):
        return ValueError(
            f"{data_set} is made by a program of its own, which is not run; pass "
            "data.revision=refs/convert/parquet, the hub's parquet copy of it"
        )
    if type(error).__module__.startswith("datasets."):
        return ValueError(f"{data_set} cannot be read: {brief(error)}")
    return None


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep progress bars, logs and warnings of the hub's libraries off the terminal."""
    import datasets
    import huggingface_hub.utils as hub_utils

    datasets.logging.set_verbosity_error()
    bars = (datasets.utils.are_progress_bars_disabled(), hub_utils.are_progress_bars_disabled())
    datasets.disable_progress_bars()
    hub_utils.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if not bars[0]:
            datasets.enable_progress_bars()
        if not bars[1]:
            hub_utils.enable_progress_bars()


def _is_json_array(url: str) -> bool:
    """Whether a .json file is one array of records instead of one record per line."""
    if not url.lower().endswith(".json"):
        return False
    with open_file(url) as file:
        return file.read(64).lstrip().startswith(b"[")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> int | None:
    from huggingface_hub import utils as errors

    if not isinstance(error, errors.HfHubHTTPError):
        return None
    return getattr(error.response, "status_code", None)


def _is_transport(error: BaseException) -> bool:
    known = isinstance(error, (ConnectionError, TimeoutError))
    return known or type(error).__module__.partition(".")[0] in TRANSPORTS


def _some(names: list[str]) -> str:
    more = f" and {len(names) - LISTED_NAMES} more" if len(names) > LISTED_NAMES else ""
    return ", ".join(names[:LISTED_NAMES]) + more
