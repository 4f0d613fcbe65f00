"""Dolly: 15,000 instructions written by Databricks' employees (CC BY-SA 3.0), from the hub."""

from pathlib import Path

from pydantic.dataclasses import dataclass

from nanogpt.data.instructions import Instructions
from nanogpt.data.source import fetch_file
from nanogpt.values import CHECKED, Share, Text

FILE = "databricks-dolly-15k.jsonl"


@dataclass(frozen=True, config=CHECKED)
class Dolly(Instructions):
    """databricks-dolly-15k, from huggingface_hub's cache, or a copy of its file (`path`)."""

    val_fraction: Share = 0.05
    name: Text = "dolly"
    repository: Text = "databricks/databricks-dolly-15k"
    revision: Text = "main"

    def file(self) -> Path:
        """Return the file, fetched unless it is in the cache; raises as `hub_errors` does."""
        if self.path is not None:
            return super().file()
        instead = (
            f"fetch it from huggingface.co/datasets/{self.repository} elsewhere and pass "
            "data.path=<that file>, or data=instructions data.path=<your own>"
        )
        return fetch_file(self.repository, FILE, self.revision, instead)
