"""Benchmark files: JSON Lines on this machine, or fetched once from the Hugging Face hub."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from nanogpt.command import expand_home
from nanogpt.data.records import BadRecord, json_records, text_under
from nanogpt.hub import check_reachable


@dataclass(frozen=True)
class Benchmark:
    """A split of a data set on the hub; under `name` it is kept as a file here."""

    name: str
    repository: str
    split: str
    subset: str | None = None


def find_benchmark(benchmark: Benchmark, data_dir: str | Path) -> Path:
    """Return the file of a benchmark under `data_dir`, fetched where it is not there yet.

    Raises ConnectionError in one sentence where the hub cannot be reached or read.
    """
    path = Path(data_dir) / "benchmarks" / f"{benchmark.name}.jsonl"
    if path.is_file():
        return path
    instead = f"pass a .jsonl file of it, or copy {path} from a connected machine"
    check_reachable(f"{benchmark.name}: the data set {benchmark.repository}", instead)
    from datasets import load_dataset

    wanted = (benchmark.repository, benchmark.subset)
    try:
        rows = load_dataset(*wanted, split=benchmark.split, streaming=True)
        text = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
    except Exception as error:  # of datasets, huggingface_hub or below: each has its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConnectionError(
            f"the data set {benchmark.repository} could not be read from the hub ({reason}); "
            f"{instead}"
        ) from error
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
    return path


def read_rows(path: str | Path, limit: int | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield where each of the first `limit` records of a JSON Lines file stands, and the record.

    Raises ValueError, naming file and line, for a line that is not one JSON object, and
    FileNotFoundError where there is no file.
    """
    path = Path(expand_home(str(path)))
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file; pass a .jsonl file")
    for place, row in islice(json_records(path), limit):
        where = f"{path}, {place}"
        if isinstance(row, BadRecord):
            raise ValueError(f"{where} {row}; {row.remedy}")
        if not isinstance(row, dict):
            raise ValueError(f"{where} is no JSON object; write one object per line")
        yield where, row


def text_of(row: dict[str, Any], key: str, where: str) -> str:
    """Return the text under a key; raises ValueError where there is none."""
    try:
        return text_under(row, key)
    except BadRecord as error:
        raise ValueError(f"{where} {error}; {error.remedy}") from error
