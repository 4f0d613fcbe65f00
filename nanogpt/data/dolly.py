"""Dolly: 15,000 instructions written by Databricks' employees (CC BY-SA 3.0), from the hub."""

from functools import partial
from pathlib import Path

from pydantic.dataclasses import dataclass

from nanogpt.data.instructions import Instructions
from nanogpt.hub import check_reachable
from nanogpt.text import first_line
from nanogpt.values import CHECKED, Share, Text

FILE = "databricks-dolly-15k.jsonl"


@dataclass(frozen=True, config=CHECKED)
class Dolly(Instructions):
    """databricks-dolly-15k, kept in huggingface_hub's cache, or a copy of its file (`path`)."""

    val_fraction: Share = 0.05
    name: Text = "dolly"
    repository: Text = "databricks/databricks-dolly-15k"
    revision: Text = "main"

    def file(self) -> Path:
        """Return the file, fetched where it is not there yet.

        Raises ConnectionError, within seconds, where the hub cannot be reached.
        """
        if self.path is not None:
            return super().file()
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        fetch = partial(
            hf_hub_download, self.repository, FILE, repo_type="dataset", revision=self.revision
        )
        try:
            return Path(fetch(local_files_only=True))
        except LocalEntryNotFoundError:
            check_reachable(
                f"data={self.name}: {FILE}",
                f"fetch it from huggingface.co/datasets/{self.repository} elsewhere and pass "
                "data.path=<that file>, or data=instructions data.path=<your own>",
            )
        try:
            return Path(fetch())
        except HfHubHTTPError as error:
            raise ConnectionError(
                f"data={self.name}: {self.repository} at {self.revision} could not be fetched "
                f"({first_line(error)}); give the command again, or pass "
                "data.path=<a copy of the file>"
            ) from error
