import logging
import math
from pathlib import Path

import pytest

from nanogpt.runs.metrics import (
    COLUMNS,
    MetricsFile,
    read_metrics,
)
from nanogpt.training.loggers import MetricsLogger


@pytest.fixture
def file(tmp_path: Path) -> MetricsFile:
    return MetricsFile(tmp_path / "metrics.csv")


def lines(file: MetricsFile) -> list[str]:
    return file.path.read_text().splitlines()


def test_nothing_is_written_before_the_first_figure(file: MetricsFile) -> None:
    file.flush()
    file.cut_after(10)
    assert not file.path.exists()


def test_floats_read_back_unrounded(file: MetricsFile) -> None:
    file.append(1, {"train/loss": 0.1 + 0.2, "learning_rate": 1e-17 / 3})
    metrics = read_metrics(file.path)
    assert metrics == {"train/loss": [(1, 0.1 + 0.2)], "learning_rate": [(1, 1e-17 / 3)]}


def test_counts_are_written_without_a_decimal_point(file: MetricsFile) -> None:
    file.append(3, {"tokens": 2**53 + 1})
    assert lines(file)[1].startswith("3,9007199254740993,")


def test_values_that_are_not_finite_read_back(file: MetricsFile) -> None:
    file.append(1, {"train/loss": math.inf, "train/grad_norm": math.nan})
    metrics = read_metrics(file.path)
    assert metrics["train/loss"] == [(1, math.inf)]
    assert math.isnan(metrics["train/grad_norm"][0][1])


def test_columns_are_fixed_and_in_order(file: MetricsFile) -> None:
    file.append(1, {"val/loss": 2.0})
    assert lines(file)[0].split(",") == list(COLUMNS)


def test_parts_of_a_step_share_a_row(file: MetricsFile) -> None:
    file.append(5, {"train/loss": 2.5})
    file.append(5, {"val/loss": 2.75})
    file.append(6, {"train/loss": 2.25})
    assert len(lines(file)) == 3
    metrics = read_metrics(file.path)
    assert metrics == {"train/loss": [(5, 2.5), (6, 2.25)], "val/loss": [(5, 2.75)]}


def test_a_shorter_value_replaces_a_longer_one(file: MetricsFile) -> None:
    file.append(5, {"train/loss": 2.123456789})
    file.append(5, {"train/loss": 2.5})
    assert read_metrics(file.path) == {"train/loss": [(5, 2.5)]}


def test_an_unknown_column_joins_the_header(file: MetricsFile) -> None:
    file.append(1, {"train/loss": 3.0})
    file.append(2, {"val/accuracy": 0.5})
    assert lines(file)[0].split(",") == [*COLUMNS, "val/accuracy"]
    assert read_metrics(file.path) == {"train/loss": [(1, 3.0)], "val/accuracy": [(2, 0.5)]}


def test_another_process_continues_the_last_row(file: MetricsFile) -> None:
    file.append(1, {"train/loss": 3.0, "extra": 1.0})
    continued = MetricsFile(file.path)
    continued.append(1, {"val/loss": 3.5})
    continued.append(2, {"train/loss": 2.0})
    metrics = read_metrics(file.path)
    assert metrics["val/loss"] == [(1, 3.5)]
    assert metrics["train/loss"] == [(1, 3.0), (2, 2.0)]
    assert metrics["extra"] == [(1, 1.0)]


def test_rows_after_the_restored_step_are_cut(file: MetricsFile) -> None:
    for step in range(1, 6):
        file.append(step, {"train/loss": float(step)})
    file.cut_after(3)
    file.append(4, {"train/loss": 40.0})
    assert [step for step, _ in read_metrics(file.path)["train/loss"]] == [1, 2, 3, 4]
    assert len(lines(file)) == 5


def test_a_file_cut_and_continued_equals_the_unbroken_one(
    file: MetricsFile, tmp_path: Path
) -> None:
    unbroken = MetricsFile(tmp_path / "unbroken.csv")
    for step in range(1, 7):
        unbroken.append(step, {"train/loss": 1 / step})
    for step in range(1, 5):
        file.append(step, {"train/loss": 1 / step})
    file.cut_after(2)
    for step in range(3, 7):
        file.append(step, {"train/loss": 1 / step})
    assert file.path.read_bytes() == unbroken.path.read_bytes()


@pytest.mark.parametrize("size", range(1, 12))
def test_a_last_line_torn_anywhere_is_dropped(file: MetricsFile, size: int) -> None:
    file.append(1, {"train/loss": 3.0})
    whole = file.path.read_bytes()
    file.append(2, {"train/loss": 2.125})
    file.path.write_bytes(file.path.read_bytes()[: len(whole) + size])
    assert read_metrics(file.path) == {"train/loss": [(1, 3.0)]}
    continued = MetricsFile(file.path)
    continued.cut_after(1)
    assert file.path.read_bytes() == whole


def test_a_torn_header_is_a_new_file(file: MetricsFile) -> None:
    file.path.write_text("step,tok")
    file.append(1, {"train/loss": 3.0})
    assert read_metrics(file.path) == {"train/loss": [(1, 3.0)]}


@pytest.mark.parametrize(
    "damaged", [b"x,1", b"2,two", b"2", b"\0" * 40, b"\xff\xfe,", b'"2', b"9" * 5000]
)
def test_a_damaged_line_is_skipped_with_a_warning(
    file: MetricsFile, damaged: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    file.append(1, {"train/loss": 3.0})
    file.append(3, {"train/loss": 2.0})
    first, second, third = file.path.read_bytes().splitlines(keepends=True)
    file.path.write_bytes(first + damaged + b"\n" + second + third)
    assert read_metrics(file.path) == {"train/loss": [(1, 3.0), (3, 2.0)]}
    assert "metrics.csv has 1 damaged line(s)" in caplog.text
    file.cut_after(1)
    assert file.path.read_bytes() == first + second


def test_a_file_without_its_header_is_named_when_a_run_continues(file: MetricsFile) -> None:
    file.path.write_bytes(b"\0" * 100 + b"\n")
    with pytest.raises(ValueError, match=r"metrics\.csv begins with .*; move it elsewhere"):
        file.cut_after(1)
    assert file.path.read_bytes() == b"\0" * 100 + b"\n"


def test_a_foreign_file_is_refused(file: MetricsFile) -> None:
    file.path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="begins with"):
        file.append(1, {"train/loss": 3.0})
    assert file.path.read_text() == "a,b\n1,2\n"


def test_figures_of_an_earlier_step_join_its_row(file: MetricsFile) -> None:
    for step in range(1, 31):
        file.append(step, {"train/loss": float(step)})
    for step in (29, 2, 30):
        file.append(step, {"val/loss": step / 2})
    file.append(31, {"train/loss": 31.0})
    metrics = read_metrics(file.path)
    assert metrics["train/loss"] == [(step, float(step)) for step in range(1, 32)]
    assert metrics["val/loss"] == [(2, 1.0), (29, 14.5), (30, 15.0)]


@pytest.mark.parametrize("step", [3, 9, 91, 99])
def test_a_row_of_an_earlier_step_is_inserted_in_order(file: MetricsFile, step: int) -> None:
    file.append(4, {"wall_s": 1.0})
    for later in range(10, 101, 10):
        file.append(later, {"train/loss": 1.0})
    file.append(step, {"train/loss": 2.0})
    file.append(100, {"val/loss": 3.0})
    file.append(101, {"train/loss": 4.0})
    steps = [int(line.partition(",")[0]) for line in lines(file)[1:]]
    assert steps == sorted([4, *range(10, 101, 10), step, 101])
    assert (step, 2.0) in read_metrics(file.path)["train/loss"]
    assert read_metrics(file.path)["val/loss"] == [(100, 3.0)]


def test_an_earlier_step_brings_a_column(file: MetricsFile) -> None:
    file.append(10, {"train/loss": 1.0})
    file.append(9, {"cpu_percent": 50.0})
    file.append(20, {"cpu_percent": 60.0})
    assert read_metrics(file.path) == {
        "train/loss": [(10, 1.0)],
        "cpu_percent": [(9, 50.0), (20, 60.0)],
    }


def test_rows_out_of_order_are_cut_like_others(file: MetricsFile) -> None:
    for step in (10, 9, 20, 19):
        file.append(step, {"train/loss": float(step)})
    file.cut_after(10)
    file.append(19, {"train/loss": 1.0})
    assert [step for step, _ in read_metrics(file.path)["train/loss"]] == [9, 10, 19]


def test_a_step_back_is_written_without_reading_the_file(
    file: MetricsFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.append(10, {"train/loss": 1.0})
    file.append(20, {"train/loss": 1.0})
    monkeypatch.setattr("nanogpt.runs.metrics._parse", None)
    file.append(19, {"train/loss": 2.0})
    file.append(30, {"train/loss": 1.0})
    monkeypatch.undo()
    assert [step for step, _ in read_metrics(file.path)["train/loss"]] == [10, 19, 20, 30]


@pytest.mark.parametrize("value", ["text", "1.5", None, [1.0, 2.0], {"a": 1}])
def test_what_is_no_number_is_left_out_with_one_warning(
    file: MetricsFile, value: object, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2):
        file.append(step, {"train/loss": 1.0, "note": value})
    assert read_metrics(file.path) == {"train/loss": [(1, 1.0), (2, 1.0)]}
    assert caplog.text.count("'note' is left out") == 1


def test_a_name_that_would_break_the_header_is_left_out(file: MetricsFile) -> None:
    file.append(1, {"two\nlines": 1.0, "with,comma": 2.0})
    assert read_metrics(file.path) == {"with,comma": [(1, 2.0)]}


def test_tensors_are_numbers(file: MetricsFile) -> None:
    import torch

    file.append(1, {"accuracy": torch.tensor(0.5), "matrix": torch.ones(2)})
    assert read_metrics(file.path) == {"accuracy": [(1, 0.5)]}


def test_a_missing_file_has_no_metrics(file: MetricsFile) -> None:
    assert read_metrics(file.path) == {}


def test_the_logger_keeps_lightnings_epoch_out(file: MetricsFile) -> None:
    logger = MetricsLogger(file.path.parent)
    logger.log_metrics({"train/loss": 2.0, "epoch": 0}, step=4)
    logger.save()
    logger.finalize("success")
    assert read_metrics(file.path) == {"train/loss": [(4, 2.0)]}


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # Lightning's own
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_a_trainer_logs_into_the_file(file: MetricsFile) -> None:
    import torch
    from lightning.pytorch import Trainer
    from lightning.pytorch.demos.boring_classes import BoringModel

    class Model(BoringModel):
        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            loss = self.layer(batch).square().sum()
            assert self.logger is not None
            self.logger.log_metrics({"train/loss": float(loss.detach())}, step=self.global_step + 1)
            return loss

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    trainer = Trainer(
        max_steps=3,
        log_every_n_steps=1,
        accelerator="cpu",
        logger=[MetricsLogger(file.path.parent)],
        limit_val_batches=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(Model())
    assert [step for step, _ in read_metrics(file.path)["train/loss"]] == [1, 2, 3]
