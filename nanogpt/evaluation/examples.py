"""Benchmark files: JSON Lines on this machine, or fetched once from the Hugging Face hub."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from nanogpt.command import expand_home
from nanogpt.disk import replacing
from nanogpt.hub import hub_errors
from nanogpt.text import read_jsonl


@dataclass(frozen=True)
class Benchmark:
    """A split of a data set on the hub, stored on this machine under `name`."""

    name: str
    repository: str
    split: str
    subset: str | None = None


def find_benchmark(benchmark: Benchmark, data_dir: str | Path) -> Path:
    """Return the file of a benchmark under `data_dir`, fetched where it is missing.

    Raises the errors of `hub_errors`.
    """
    path = Path(data_dir) / "benchmarks" / f"{benchmark.name}.jsonl"
    if not path.is_file():
        instead = f"pass a .jsonl file of it, or copy {path} from a connected machine"
        with hub_errors(f"the data set {benchmark.repository}", instead):
            from datasets import load_dataset

            source = (benchmark.repository, benchmark.subset)
            rows = list(load_dataset(*source, split=benchmark.split, streaming=True))
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, "w") as file:
            file.writelines(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
    return path


def read_rows(path: str | Path, limit: int | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the position, `PATH, line 3`, and the object of the first `limit` lines of a file.

    Raises ValueError, naming file and line, for a line that is not one JSON object, and
    FileNotFoundError for a missing file.
    """
    path = Path(expand_home(str(path)))
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file; pass a .jsonl file")
    for where, row in islice(read_jsonl(path), limit):
        if not isinstance(row, dict):
            raise ValueError(f"{where} is no JSON object; write one object per line")
        yield where, row


def text_of(row: dict[str, Any], key: str, where: str) -> str:
    """Return the text under a key; raises ValueError where it is missing."""
    if not isinstance(row.get(key), str):
        raise ValueError(f"{where} has no text under {key!r}; correct it or remove it")
    return str(row[key])
