"""FineWeb-Edu: educational web pages from the Hugging Face hub, or from parquet files at hand."""

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanogpt.data.source import files_fingerprint

REPOSITORY = "HuggingFaceFW/fineweb-edu"


@dataclass(frozen=True)
class FineWebEdu:
    """The pages of one configuration, streamed, or those of local parquet files (`path`)."""

    subset: str = "sample-10BT"
    revision: str = "main"
    path: str | None = None
    val_fraction: float = 0.001
    name: str = "fineweb_edu"

    def documents(self) -> Iterator[str]:
        """Yield the text of every page.

        Raises ConnectionError in one sentence where the hub cannot be reached.
        """
        for page in self._open():
            yield page["text"]

    def fingerprint(self) -> str:
        if self.path is not None:
            return files_fingerprint(Path(self.path).parent, self._files())
        return hashlib.sha256(f"{REPOSITORY} {self.subset} {self.revision}".encode()).hexdigest()

    def _open(self) -> Any:
        from datasets import load_dataset

        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries are no news
        if self.path is not None:
            files = [str(path) for path in self._files()]
            return load_dataset("parquet", data_files=files, split="train", streaming=True)
        try:
            return load_dataset(
                REPOSITORY, self.subset, split="train", revision=self.revision, streaming=True
            )
        except (ConnectionError, OSError) as error:
            raise ConnectionError(
                f"data=fineweb_edu needs {REPOSITORY} ({self.subset}), which is neither on "
                "this machine nor to be reached; pass data.path=FILE.parquet, connect, or choose "
                "data=text"
            ) from error

    def _files(self) -> list[Path]:
        path = Path(str(self.path))
        files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
        if not files or not all(file.is_file() for file in files):
            raise FileNotFoundError(
                f"data.path={path} is no parquet file and no folder of them; pass one"
            )
        return files
