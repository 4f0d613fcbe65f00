"""Benchmark files: fetched from the hub once, then read here; no hub is a clear error."""

import json
from pathlib import Path

import pytest

from nanogpt.evaluation.examples import Benchmark, find_benchmark, read_rows
from tests import hub_server
from tests.hub_server import Hub

ROWS = [{"text": "one two", "label": "1"}, {"text": "dréi\nvier", "label": ""}]
BENCHMARK = Benchmark("mine", "someone/benchmark", "validation")


def test_a_benchmark_is_fetched_once(tmp_path: Path) -> None:
    folder = tmp_path / "hub" / "someone" / "benchmark"
    folder.mkdir(parents=True)
    lines = "".join(f"{json.dumps(row)}\n" for row in ROWS)
    (folder / "validation.jsonl").write_text(lines)
    with (
        hub_server.serving(Hub(tmp_path / "hub")) as hub,
        hub_server.visitor(hub.url, tmp_path / "cache") as process,
    ):
        path = process.submit(find_benchmark, BENCHMARK, tmp_path / "data").result()
        wrong = Benchmark("other", "someone/nothing", "validation")
        with pytest.raises(PermissionError, match="someone/nothing is not on the hub"):
            process.submit(find_benchmark, wrong, tmp_path / "data").result()
    assert path == tmp_path / "data" / "benchmarks" / "mine.jsonl"
    assert [row for _, row in read_rows(path)] == ROWS
    assert find_benchmark(BENCHMARK, tmp_path / "data") == path  # the hub is gone


def test_the_error_without_the_hub_names_what_to_pass(tmp_path: Path) -> None:
    with (
        hub_server.visitor("http://127.0.0.1:9", tmp_path / "cache") as process,
        pytest.raises(ConnectionError, match=r"cannot be fetched: .*; pass a .jsonl file of it"),
    ):
        process.submit(find_benchmark, BENCHMARK, tmp_path).result()


def test_blank_lines_are_passed_over_and_numbers_are_the_files(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2}\n{"a": 3}\n')
    assert list(read_rows(path, 2)) == [
        (f"{path}, line 1", {"a": 1}),
        (f"{path}, line 3", {"a": 2}),
    ]


def test_bytes_that_are_no_text_are_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": "\xff"}\n')
    with pytest.raises(ValueError, match="line 1 is not UTF-8"):
        list(read_rows(path))
