"""Benchmark files: JSON Lines on this machine, or fetched once from the Hugging Face hub."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from nanogpt.data.records import BadRecord, json_records
from nanogpt.disk import replacing, wait_for_lock
from nanogpt.hub import hub_errors

Item = TypeVar("Item", bound=BaseModel)


@dataclass(frozen=True)
class Benchmark:
    """A split of a data set on the hub, stored on this machine under `name`."""

    name: str
    repository: str
    split: str
    subset: str | None = None


def find_benchmark(benchmark: Benchmark, data_dir: str | Path) -> Path:
    """Return the file of a benchmark under `data_dir`, fetched by one process if it is missing.

    Raises the errors of `hub_errors`.
    """
    path = Path(data_dir) / "benchmarks" / f"{benchmark.name}.jsonl"
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    instead = f"pass a .jsonl file of it, or copy {path} from a connected machine"
    with wait_for_lock(path.with_name(f".{path.name}.lock"), f"fetches {path}"):
        if not path.is_file():
            with hub_errors(f"the data set {benchmark.repository}", instead):
                from datasets import load_dataset

                source = (benchmark.repository, benchmark.subset)
                rows = list(load_dataset(*source, split=benchmark.split, streaming=True))
            with replacing(path, "w") as file:
                file.writelines(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
    return path


def read_rows(path: str | Path, limit: int | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the position, `PATH, line 3`, and the object of the first `limit` lines of a file.

    Raises ValueError, naming file and line, for a line that is not one JSON object, and
    FileNotFoundError for a missing file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is no file; pass a .jsonl file")
    for position, row in islice(json_records(Path(path)), limit):
        if isinstance(row, BadRecord):
            raise ValueError(f"{path}, {position} {row}; {row.remedy}")
        if not isinstance(row, dict):
            raise ValueError(f"{path}, {position} is no JSON object; write one object per line")
        yield f"{path}, {position}", row


def read_items(kind: type[Item], path: str | Path, limit: int | None = None) -> list[Item]:
    """Return the first `limit` rows of a benchmark's file as objects of a pydantic class.

    Raises as `read_rows` does, and ValueError, naming the line, for a row that is no such object.
    """
    items = []
    for where, row in read_rows(path, limit):
        try:
            items.append(kind.model_validate(row))
        except ValidationError as error:
            found = error.errors()[0]
            raise ValueError(
                f"{where} is no {kind.__name__} ({'.'.join(map(str, found['loc']))}: "
                f"{found['msg']}); correct or remove it"
            ) from error
    if not items:
        raise ValueError(f"{path} has no rows; pass the file of the benchmark")
    return items
