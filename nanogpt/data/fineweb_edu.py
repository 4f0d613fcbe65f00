"""FineWeb-Edu: educational web pages from the Hugging Face hub, or from parquet files at hand."""

from pydantic.dataclasses import dataclass

from nanogpt.data.hub import HubDataset
from nanogpt.values import CHECKED, Share, Text


@dataclass(frozen=True, config=CHECKED)
class FineWebEdu(HubDataset):
    """The pages of one subset, streamed, or those of local parquet files (`path`)."""

    repository: Text = "HuggingFaceFW/fineweb-edu"
    subset: Text | None = "sample-10BT"
    val_fraction: Share = 0.001
    name: Text = "fineweb_edu"
