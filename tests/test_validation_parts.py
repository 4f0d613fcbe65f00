"""Validation by parts: `validation.csv`, whatever the ranks, micro-batches and tokenizer."""

import csv
import json
import math
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanogpt.data.parts import N_PARTS, TextParts, part_starts, row_parts
from nanogpt.data.windows import Windows
from tests.test_windows import Counting

Command = Callable[..., subprocess.CompletedProcess[str]]
Main = Callable[..., int]
Sums = dict[int, tuple[float, int, int]]


def sums_of(run_dir: Path) -> Sums:
    with open(run_dir / "validation.csv", newline="") as file:
        return {
            int(row["start"]): (float(row["nats"]), int(row["tokens"]), int(row["bytes"]))
            for row in csv.DictReader(file)
        }


def summary_of(run_dir: Path) -> dict[str, Any]:
    return dict(json.loads((run_dir / "summary.json").read_text()))


def test_parts_are_equal_pieces_and_begin_at_their_starts() -> None:
    starts = part_starts(np.arange(1000), 1000)
    assert len(np.unique(starts)) == N_PARTS
    assert set(np.unique(starts, return_counts=True)[1]) == {3, 4}
    assert all(starts[start] == start for start in np.unique(starts))
    assert part_starts(np.arange(5), 3).tolist() == [0, 1, 2, 2, 2]


def test_a_target_is_in_the_part_of_its_first_byte() -> None:
    # Tokens 0 to 8 of 1, 0, 300, 1, ... bytes: 1,005 bytes, in parts of 3 or 4.
    sizes = [1, 0, 300, 1, 200, 3, 0, 500, 0]
    stream = Counting(9)
    parts = TextParts(stream, 4, [b"x" * n for n in sizes])
    rows = np.array([1, 0])
    found = parts(rows, Windows(stream, 4).batch(rows))
    begins = np.cumsum([0, *sizes])
    expected = [[begins[i] for i in (5, 6, 7, 8)], [begins[i] for i in (1, 2, 3, 4)]]
    assert found.tolist() == part_starts(np.array(expected), 1005).tolist()


def test_rows_that_are_no_text_stream_are_parts_by_their_number() -> None:
    assert row_parts(512)(np.array([0, 1, 2, 511]), {}).tolist() == [[0], [0], [2], [510]]


def test_parts_do_not_depend_on_micro_batches_or_ranks(
    tiny_run: list[str], tmp_path: Path, main: Main, command: Command
) -> None:
    tiny = [*tiny_run[:-1], "trainer.accelerator=cpu", "max_steps=4"]
    assert main(*tiny, "name=one") == main(*tiny, "name=small", "micro_batch=2") == 0
    done = command(*tiny, "name=ranks", "trainer=ddp", "trainer.devices=2")
    assert done.returncode == 0, done.stderr
    one, small, ranks = (sums_of(tmp_path / "runs" / name) for name in ("one", "small", "ranks"))
    assert [row[1:] for row in one.values()] == [row[1:] for row in ranks.values()]
    for other in (small, ranks):
        assert one.keys() == other.keys()
        nats = [[sums[start][0] for start in one] for sums in (one, other)]
        assert nats[0] == pytest.approx(nats[1], rel=1e-5)  # of models that agree to rounding


def test_the_sum_of_the_parts_is_the_metric_of_the_summary(
    tiny_run: list[str], tmp_path: Path, main: Main
) -> None:
    run_dir = tmp_path / "runs" / "tiny"
    constant = [*tiny_run, "schedule=constant", "optim=adamw"]
    for max_steps in (4, 6):  # the longer budget continues the run and validates again
        assert main(*constant, f"max_steps={max_steps}") == 0
        nats, n_tokens, n_bytes = np.array([*sums_of(run_dir).values()]).sum(0)
        summary = summary_of(run_dir)
        assert nats / n_tokens == pytest.approx(summary["val_loss"], rel=1e-12)
        bits = nats / math.log(2) / n_bytes
        assert bits == pytest.approx(summary["val_bits_per_byte"], rel=1e-12)
        assert len(sums_of(run_dir)) == N_PARTS


def test_tokenizers_share_the_parts(tiny_run: list[str], tmp_path: Path, main: Main) -> None:
    short = [*tiny_run[:-1], "max_steps=1"]
    assert main(*short, "name=bytes") == 0
    assert main(*short, "name=words", "tokenizer=bpe", "tokenizer.vocab_size=300") == 0
    one, other = (sums_of(tmp_path / "runs" / name) for name in ("bytes", "words"))
    assert other.keys() <= one.keys()
    assert abs(sum(n for *_, n in one.values()) - sum(n for *_, n in other.values())) < 16
    longest_token = 16
    seen = np.cumsum([[one[k][2], other.get(k, (0, 0, 0))[2]] for k in one], axis=0)
    assert np.abs(seen[:, 0] - seen[:, 1]).max() <= longest_token
