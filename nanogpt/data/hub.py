"""Data sets of the Hugging Face hub, read as a stream: no file of theirs is written to disk.

The `datasets` library resolves a subset and a split to files. Parquet, JSON Lines and text are then
read in place, the text column only; other kinds of files go through that library's own streaming.
"""

import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from pydantic.dataclasses import dataclass

from nanogpt.data.files import JSON, RECORDS
from nanogpt.data.records import BadRecord, open_file, text_under
from nanogpt.data.text import TextFiles
from nanogpt.hub import hub_errors
from nanogpt.text import format_list
from nanogpt.values import CHECKED, Share, Text

READABLE = (*RECORDS, *JSON, ".txt")
TIMEOUT_S = 10.0  # for the revision; reading has timeouts and retries of huggingface_hub's own


@dataclass(frozen=True, config=CHECKED, kw_only=True)
class HubDataset(TextFiles):
    """One split of a data set on the hub, or files of it on this machine (`path`).

    `revision` is a branch, a tag or a commit.
    """

    repository: Text
    subset: Text | None = None
    split: Text = "train"
    revision: Text = "main"
    val_fraction: Share = 0.01
    name: Text = "hub"
    suffixes: tuple[str, ...] = RECORDS

    def documents(self, skip: int = 0) -> Iterator[str | None]:
        """Yield the documents after the first `skip`.

        Failed requests are repeated for half a minute. Raises ConnectionError within seconds where
        the hub cannot be reached at all.
        """
        if self.path is not None:
            yield from super().documents(skip)
            return
        with self._hub_errors():
            builder = self._builder()
            if files := self._files(builder):
                yield from self.read(files, skip)
                return
            rows = builder.as_streaming_dataset(split=self.split).skip(skip)
            for number, row in enumerate(rows, start=skip + 1):
                try:
                    yield text_under(row, self.text_column, "pass data.text_column=NAME")
                except BadRecord as error:
                    if not self.skip_bad:
                        raise error.at(f"{self.repository}, record {number}") from error
                    yield None

    def fingerprint(self) -> str:
        """Return a hash over the request, in which a branch counts by its name, or the files."""
        if self.path is not None:
            return super().fingerprint()
        request = [self.repository, self.subset, self.split, self.revision, self.text_column]
        request += [] if self.separator is None else [self.separator]
        return hashlib.sha256(repr(request).encode()).hexdigest()[:16]

    def pinned(self, revision: str | None = None) -> "HubDataset":
        """Return this data set at a commit: the one given, or the hub's for its revision now."""
        if self.path is not None:
            return self
        if revision is None:
            from huggingface_hub import HfApi

            with self._hub_errors():
                info = HfApi().dataset_info(
                    self.repository, revision=self.revision, timeout=TIMEOUT_S
                )
            revision = str(info.sha)
        return replace(self, revision=revision)

    def description(self) -> dict[str, Any]:
        """Return the request, or the path."""
        if self.path is not None:
            return super().description()
        keys = ("repository", "subset", "split", "revision", "text_column")
        return {key: getattr(self, key) for key in keys}

    def _builder(self) -> Any:
        """Return the `datasets` library's builder of the subset, which has its files by split."""
        import datasets
        from huggingface_hub.utils import disable_progress_bars

        datasets.logging.set_verbosity_error()
        datasets.disable_progress_bars()
        disable_progress_bars()
        try:
            return datasets.load_dataset_builder(
                self.repository, self.subset, revision=self.revision
            )
        except (ValueError, RuntimeError) as error:
            found = (
                "is made by a program of its own, which is not run; pass "
                "data.revision=refs/convert/parquet, the hub's parquet copy of it"
            )
            if "scripts are no longer supported" not in str(error):
                subsets = datasets.get_dataset_config_names(self.repository, revision=self.revision)
                if self.subset in subsets:
                    raise
                found = f"needs data.subset=NAME, one of {format_list(subsets)}"
            raise ValueError(f"the data set {self.repository} {found}") from error

    def _files(self, builder: Any) -> list[str]:
        """Return the URLs of the split's files, none where they are not of a kind read in place."""
        by_split = {str(split): files for split, files in (builder.config.data_files or {}).items()}
        if by_split and self.split not in by_split:
            raise ValueError(
                f"the data set {self.repository} has no split {self.split}; pass data.split=NAME, "
                f"one of {format_list(sorted(by_split))}"
            )
        files = [str(url) for url in by_split.get(self.split, [])]
        plain = all(url.lower().endswith(READABLE) for url in files)
        if files and files[0].lower().endswith(".json"):
            with open_file(files[0]) as file:  # of one record per line, or one array of records
                plain &= not file.read(64).lstrip().startswith(b"[")
        nested = getattr(builder.config, "field", None) is not None
        return files if plain and not nested else []

    def _hub_errors(self) -> AbstractContextManager[None]:
        at = "" if self.revision == "main" else f" at {self.revision}"
        prepared = self.repository if self.name == "hub" else self.name
        return hub_errors(
            f"the data set {self.repository}{at}",
            "pass data.path=<its parquet or JSON Lines files>, choose data=text, or run "
            f"`python -m nanogpt.prepare {prepared}` on a connected machine and copy the folder it "
            "names",
        )
