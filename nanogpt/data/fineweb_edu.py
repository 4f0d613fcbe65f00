"""FineWeb-Edu: educational web pages from the Hugging Face hub, or from parquet files at hand."""

from dataclasses import dataclass

from nanogpt.data.hub import HubDataset


@dataclass(frozen=True)
class FineWebEdu(HubDataset):
    """The pages of one subset, streamed, or those of local parquet files (`path`)."""

    repository: str = "HuggingFaceFW/fineweb-edu"
    subset: str | None = "sample-10BT"
    val_fraction: float = 0.001
    name: str = "fineweb_edu"
