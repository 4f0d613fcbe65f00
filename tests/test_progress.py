import io
import logging
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from nanogpt.runs.log import ConsoleHandler, print_text
from nanogpt.training import progress
from nanogpt.training.progress import Progress, progress_line

TOKENS = 5412  # per step
MODULE: Any = SimpleNamespace(progress={})  # one that has logged nothing yet


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        return 2


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def screen_of(monkeypatch: pytest.MonkeyPatch, columns: int = 100, rows: int = 30) -> Terminal:
    """Make standard output and error one terminal."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", str(columns))  # for tqdm
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(progress.os, "get_terminal_size", lambda _: (columns, rows))
    return terminal


def training(
    clock: Clock, shown: Progress, steps: range, step_s: float = 1.0, rank: int = 0, total: int = 0
) -> Any:
    """Drive the callback as the trainer does, each step taking `step_s`."""
    trainer: Any = SimpleNamespace(
        is_global_zero=rank == 0, global_step=steps.start, max_steps=total or steps.stop
    )
    module: Any = SimpleNamespace(progress={})
    shown.on_train_start(trainer, module)
    for step in steps:
        clock.now += step_s
        trainer.global_step = step + 1
        logged = {"step": step + 1, "tokens": TOKENS * (step + 1), "loss": 3.0}
        module.progress.update(logged, tokens_per_s=TOKENS / step_s, mfu=0.384)
        shown.on_train_batch_end(trainer, module, None, None, step)
    return trainer


def test_line_has_all_metrics() -> None:
    metrics = {"step": 120, "tokens": 37645, "loss": 3.21454, "tokens_per_s": 5412.4, "mfu": 0.384}
    line = progress_line(120, 1500, metrics)
    assert line == "step 120/1500  loss 3.2145  5,412 tokens/s  MFU 38 %  1 min 20 s left"


def test_an_older_loss_has_its_step() -> None:
    assert (
        progress_line(46, 100, {"step": 40, "loss": 4.3961}) == "step 46/100  loss 4.3961 (step 40)"
    )


def test_line_leaves_out_what_is_unknown() -> None:
    assert progress_line(1, 12, {"step": 1, "loss": 0.0}) == "step 1/12  loss 0.0000"


def test_first_step_gives_the_first_line(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    training(clock, Progress(), range(1), total=50)
    assert (
        capsys.readouterr().out == "step 1/50  loss 3.0000  5,412 tokens/s  MFU 38 %  49 s left\n"
    )


def test_lines_come_every_few_seconds(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    training(clock, Progress(every_s=5), range(12), total=50)
    steps = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
    assert steps == ["1/50", "6/50", "11/50"]


def test_end_is_always_printed(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    shown = Progress(every_s=5)
    trainer = training(clock, shown, range(8))
    shown.on_train_end(trainer, MODULE)
    assert capsys.readouterr().out.splitlines()[-1] == "step 8/8"


def test_time_left_follows_the_pace(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    training(clock, Progress(every_s=5), range(100), step_s=2.0, total=130)
    assert capsys.readouterr().out.splitlines()[-1].endswith("1 min 00 s left")


def test_other_ranks_are_silent(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    shown = Progress()
    shown.on_train_end(training(clock, shown, range(9), rank=1), MODULE)
    assert capsys.readouterr().out == ""


def test_terminal_shows_a_bar(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = screen_of(monkeypatch)
    shown = Progress()
    trainer = training(clock, shown, range(3), total=4)
    shown.teardown(trainer, MODULE, "fit")
    last = screen.getvalue().rstrip("\n").rsplit("\r", 1)[-1]
    assert last.startswith(" 75 %|")
    assert last.endswith("| step 3/4  loss 3.0000  5,412 tokens/s  MFU 38 %  1 s left")
    assert screen.getvalue().endswith("\n")


def test_resumed_bar_begins_where_it_was(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = screen_of(monkeypatch)
    shown = Progress()
    trainer = training(clock, shown, range(2, 2), total=4)
    shown.on_exception(trainer, MODULE, KeyboardInterrupt())
    assert " 50 %|" in screen.getvalue()


def test_terminal_without_a_size_gets_lines(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = screen_of(monkeypatch, columns=0, rows=0)
    training(clock, Progress(), range(1), total=4)
    assert screen.getvalue() == "step 1/4  loss 3.0000  5,412 tokens/s  MFU 38 %  3 s left\n"


def test_bar_gives_way_to_a_line(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = screen_of(monkeypatch)
    shown = Progress()
    trainer = training(clock, shown, range(2), total=4)
    screen.truncate(0)
    print_text("a sample")
    before, _, after = screen.getvalue().lstrip("\0").partition("a sample\n")
    assert before.strip() == ""
    assert "step 2/4" in after
    shown.teardown(trainer, MODULE, "fit")


def test_printed_control_characters_are_shown_not_sent(capsys: pytest.CaptureFixture[str]) -> None:
    print_text("a\x1b[2J\x07\tb\nc\x9b")
    assert capsys.readouterr().out == "a␛[2J␇\tb\nc�\n"


def test_printed_text_fits_any_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    print_text("é")
    assert written.getvalue() == b"?\n"


def test_log_records_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    handler = ConsoleHandler()
    handler.handle(logging.makeLogRecord({"msg": "compiled in %d s", "args": (4,)}))
    assert capsys.readouterr().out == "compiled in 4 s\n"


def test_step_between_lines_reads_nothing_but_the_clock(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = Progress()
    training(clock, shown, range(1), total=50)
    untouchable: Any = object()  # any attribute read from it would raise
    shown.on_train_batch_end(untouchable, untouchable, None, None, 1)
