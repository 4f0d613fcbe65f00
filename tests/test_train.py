"""Training as a person sees it: the run's files, splits, kills, signals, ranks and sweeps."""

import csv
import errno
import io
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.loggers import Logger
from omegaconf import OmegaConf

import train
from nanogpt.checkpoint import load_checkpoint, read_checkpoint
from nanogpt.runs.directory import read_config
from nanogpt.training import language_model
from tests.killed import kill_run

ROOT = Path(__file__).parent.parent
POSIX = pytest.mark.skipif(os.name != "posix", reason="descriptors of POSIX")
Command = Callable[..., subprocess.CompletedProcess[str]]
Main = Callable[..., int]
DROPOUT = "model.dropout=0.1"  # whose masks must not depend on the split, either


def fit(*overrides: str) -> dict[str, Any]:
    """Train in this process; return the summary."""
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        cfg = compose("train", overrides=list(overrides))
    config: Any = OmegaConf.to_container(cfg, resolve=True)
    return train.train({**config, "command": "python train.py", "typed": {}})


def metrics(run_dir: Path, *columns: str) -> list[tuple[str, ...]]:
    with open(run_dir / "metrics.csv", newline="") as file:
        return [tuple(row[c] for c in columns) for row in csv.DictReader(file)]


def losses(run_dir: Path) -> list[tuple[str, ...]]:
    """Return all columns that no clock has a part in, as they are written."""
    return metrics(
        run_dir, "step", "tokens", "train/loss", "train/grad_norm", "learning_rate", "val/loss"
    )


def test_a_run_leaves_its_files(tiny_run: list[str], tmp_path: Path) -> None:
    summary = fit(*tiny_run)
    run_dir = tmp_path / "runs" / "tiny"
    names = {path.name for path in run_dir.iterdir()}
    written = "config.yaml metrics.csv train.log samples.txt checkpoints summary.json report.html"
    assert names >= set(written.split())
    assert {p.name for p in (run_dir / "checkpoints").iterdir()} == {
        "last.ckpt", "step_000008.ckpt", "step_000012.ckpt"
    }  # fmt: skip
    assert json.loads((run_dir / "summary.json").read_text()) == summary
    assert summary["steps"] == 12
    assert summary["tokens"] == 12 * 128
    assert [int(step) for (step,) in metrics(run_dir, "step")] == list(range(1, 13))


def test_the_final_checkpoint_generates(tiny_run: list[str], tmp_path: Path) -> None:
    fit(*tiny_run)
    checkpoint = load_checkpoint("tiny", runs_dir=tmp_path / "runs")
    assert checkpoint.step == 12
    assert checkpoint.tokenizer.name == "byte"


def test_the_recipe_of_gpt2_small_trains(tiny_run: list[str], tmp_path: Path) -> None:
    fit(*tiny_run, "experiment=gpt2_small_fast", "max_steps=2")
    saved = read_checkpoint(tmp_path / "runs" / "tiny" / "checkpoints" / "last.ckpt")
    assert {"model.shortcut", "model.lm_head.weight"} <= saved["state_dict"].keys()
    groups = saved["optimizer_states"][0]["param_groups"]
    # Both steps precede the decay. Matrices in two groups, numbers, embeddings, head:
    assert [group["lr"] for group in groups] == [4.5e-3, 4.5e-3, 1e-2, 6e-3, 3e-3]
    assert groups[0]["momentum"] == pytest.approx(0.85 + 0.1 / 300)


def test_a_finished_run_logs_that_and_changes_nothing(tiny_run: list[str], tmp_path: Path) -> None:
    summary = fit(*tiny_run)
    before = {
        p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("*") if p.name != "train.log"
    }
    assert fit(*tiny_run) == summary
    assert before == {p: p.stat().st_mtime_ns for p in before}
    assert "already finished" in (tmp_path / "runs" / "tiny" / "train.log").read_text()


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_every_micro_batch_gives_the_same_losses(
    optim: str, tiny_run: list[str], tmp_path: Path
) -> None:
    reached = []
    options = [*tiny_run, f"optim={optim}", DROPOUT]
    for micro_batch in (8, 4, 1):
        fit(*options, f"micro_batch={micro_batch}", f"name=m{micro_batch}")
        reached.append(
            [float(v) for (v,) in metrics(tmp_path / "runs" / f"m{micro_batch}", "train/loss")]
        )
    tolerance = 1e-5 if optim == "adamw" else 1e-4
    for other in reached[1:]:
        assert max(abs(a - b) for a, b in zip(reached[0], other, strict=True)) < tolerance


@pytest.mark.parametrize(
    ("where", "count", "options"),
    [
        ("nanogpt.training.module.set_learning_rates", 7, ["optim=adamw", "model.dropout=0.1"]),
        ("nanogpt.training.language_model.next_token_loss", 20, ["optim=muon", "micro_batch=2"]),
        ("nanogpt.training.module.set_learning_rates", 7, ["experiment=gpt2_small_fast"]),
        ("torch.save", 2, ["model.dropout=0.1", "data.workers=2"]),
        ("nanogpt.training.checkpointing.link_atomically", 2, ["optim=adamw", "data.workers=2"]),
        ("nanogpt.training.summary.write_report", 1, ["optim=adamw"]),
    ],
)
def test_a_killed_run_continues_to_the_same_bits(
    where: str, count: int, options: list[str], tiny_run: list[str], tmp_path: Path
) -> None:
    whole = fit(*tiny_run, *options, "name=whole")
    kill_run(where, count, [*tiny_run, *options], tmp_path)
    continued = fit(*tiny_run, *options)
    assert continued["weights_sha256"] == whole["weights_sha256"]
    assert losses(tmp_path / "runs" / "tiny") == losses(tmp_path / "runs" / "whole")


def test_a_grown_budget_continues_where_the_schedule_permits(
    tiny_run: list[str], tmp_path: Path
) -> None:
    constant = [
        *tiny_run,
        "optim=adamw",
        "schedule=constant",
        "schedule.warmup_steps=2",
    ]
    fit(*constant, "max_steps=6")
    grown = fit(*constant, "max_steps=10")
    whole = fit(*constant, "max_steps=10", "name=whole")
    assert grown["weights_sha256"] == whole["weights_sha256"]


def shrinking(step: int, max_steps: int) -> float:
    return 0.5**step


def test_a_stock_optimizer_and_a_schedule_of_ones_own_continue_to_the_same_bits(
    tiny_run: list[str],
) -> None:
    own = [
        *tiny_run,
        "~optim",
        "+optim={_target_: torch.optim.SGD, lr: 0.5, momentum: 0.9}",
        "~schedule",
        f"+schedule={{_target_: {__name__}.shrinking}}",
    ]
    fit(*own, "max_steps=3")
    grown = fit(*own, "max_steps=6")
    whole = fit(*own, "max_steps=6", "name=whole")
    assert grown["weights_sha256"] == whole["weights_sha256"]


def unfinished(step: int, max_steps: int) -> float | None:
    return 1.0 if step < 5 else None


def test_a_schedule_that_fails_within_the_run_is_refused_before_it_begins(
    tiny_run: list[str], tmp_path: Path
) -> None:
    failing = ["~schedule", f"+schedule={{_target_: {__name__}.unfinished}}"]
    with pytest.raises(
        ValueError,
        match=r"unfinished\(step=5, max_steps=6\) fails with ValueError: it returns None",
    ):
        fit(*tiny_run, *failing, "max_steps=6")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("remeasure", "micro_batch"), [("false", 2), ("true", 8)])
def test_a_continued_run_decides_again_where_it_remeasures(
    remeasure: str, micro_batch: int, tiny_run: list[str], tmp_path: Path
) -> None:
    constant = [*tiny_run, "optim=adamw", "schedule=constant"]
    fit(*constant, "max_steps=1", "micro_batch=2")
    fit(*constant, "max_steps=2", f"remeasure={remeasure}")
    config = OmegaConf.load(tmp_path / "runs" / "tiny" / "config.yaml")
    assert config.resolved.micro_batch == micro_batch


def test_a_cosine_does_not_let_the_budget_grow(tiny_run: list[str]) -> None:
    fit(*tiny_run, "optim=adamw", "max_steps=6")
    with pytest.raises(ValueError, match="max_steps: 6 is recorded, 10 is configured"):
        fit(*tiny_run, "optim=adamw", "max_steps=10")


def test_another_identity_under_one_name_is_refused(tiny_run: list[str]) -> None:
    fit(*tiny_run)
    with pytest.raises(
        ValueError, match=r"seed: 1337 is recorded, 2 is configured.*name=<new name>"
    ):
        fit(*tiny_run, "seed=2")


def test_a_changed_corpus_is_refused(tiny_run: list[str], tmp_path: Path) -> None:
    text = tmp_path / "own.txt"
    text.write_text("one two three four five six seven eight nine ten " * 40)
    fit(*tiny_run, f"data.path={text}")
    (tmp_path / "runs" / "tiny" / "summary.json").unlink()
    text.write_text("another text than before, of about the same length " * 40)
    with pytest.raises(ValueError, match="another corpus"):
        fit(*tiny_run, f"data.path={text}")


def test_fast_dev_run_leaves_the_run_as_it_is(tiny_run: list[str], tmp_path: Path) -> None:
    assert train.main([*tiny_run, "max_steps=4"]) == 0
    run_dir = tmp_path / "runs" / "tiny"
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    for n in (1, 2):  # anew each time, of another identity too
        assert train.main([*tiny_run, "trainer.fast_dev_run=true", f"seed={n}"]) == 0
        log = (tmp_path / "runs" / "tiny-fast_dev_run" / "train.log").read_text()
        assert log.count("fast_dev_run: training and validation work") == n
    assert before == {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    assert not (tmp_path / "runs" / "tiny-fast_dev_run" / "summary.json").exists()


def test_overwrite_starts_anew(tiny_run: list[str], tmp_path: Path) -> None:
    fit(*tiny_run)
    with pytest.raises(ValueError, match="overwrite=true"):
        fit(*tiny_run, "seed=2", "resume=false")
    fit(*tiny_run, "seed=2", "resume=false", "overwrite=true")
    assert len(metrics(tmp_path / "runs" / "tiny", "step")) == 12


def test_a_run_starts_from_another_runs_weights(tiny_run: list[str], tmp_path: Path) -> None:
    fit(*tiny_run)
    fit(*tiny_run, "name=second", "init_from=tiny", "max_steps=1", "optim.learning_rate=0")
    about = read_checkpoint(tmp_path / "runs" / "second" / "checkpoints" / "last.ckpt")["nanogpt"]
    assert about["init_from"]["path"].endswith("tiny/checkpoints/last.ckpt")
    first = metrics(tmp_path / "runs" / "second", "train/loss")[0][0]
    assert float(first) < float(metrics(tmp_path / "runs" / "tiny", "train/loss")[0][0]) - 0.1


def test_a_typed_model_key_that_differs_from_init_from_is_refused(
    tiny_run: list[str], main: Main, capfd: pytest.CaptureFixture[str]
) -> None:
    fit(*tiny_run, "max_steps=1")
    capfd.readouterr()
    assert main(*tiny_run, "name=other", "init_from=tiny", "model.n_layer=1") == 1
    [line] = capfd.readouterr().err.splitlines()
    assert "has n_layer=2 but the command has model.n_layer=1" in line


def test_a_continued_run_does_not_need_what_it_started_from(
    tiny_run: list[str], tmp_path: Path
) -> None:
    constant = [*tiny_run, "schedule=constant"]
    fit(*constant, "max_steps=1")
    second = [*constant, "name=second", "init_from=tiny"]
    fit(*second, "max_steps=4")
    shutil.rmtree(tmp_path / "runs" / "tiny")
    assert fit(*second, "max_steps=6")["steps"] == 6


def test_a_list_on_the_command_line_names_a_run(
    tiny_run: list[str], tmp_path: Path, main: Main
) -> None:
    unnamed = [word for word in tiny_run if not word.startswith("name=")]
    assert main(*unnamed, "max_steps=1", "optim=adamw", "optim.betas=[0.9,0.99]") == 0
    assert len(list((tmp_path / "runs").glob("quickstart-nano-text-*/summary.json"))) == 1


def test_the_same_first_gradient_for_every_micro_batch(tiny_run: list[str], tmp_path: Path) -> None:
    norms = []
    options = [*tiny_run, "max_steps=1", DROPOUT]
    for micro_batch in (8, 2):
        fit(*options, f"micro_batch={micro_batch}", f"name=m{micro_batch}")
        norms.append(float(metrics(tmp_path / "runs" / f"m{micro_batch}", "train/grad_norm")[0][0]))
    assert abs(norms[0] - norms[1]) < 1e-5


def out_of_memory_from(monkeypatch: pytest.MonkeyPatch, call: int, most_rows: int) -> None:
    """Have every forward of more rows run out of memory, from this call on."""
    loss, calls = language_model.next_token_loss, itertools.count(1)

    def limited(model: Any, input_ids: Any, *args: Any, **keys: Any) -> Any:
        if next(calls) >= call and len(input_ids) > most_rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return loss(model, input_ids, *args, **keys)

    monkeypatch.setattr(language_model, "next_token_loss", limited)


@pytest.mark.parametrize(("micro_batch", "most_rows"), [(4, 2), (8, 2), (8, 1)])
def test_a_step_without_memory_is_that_of_smaller_micro_batches(
    micro_batch: int,
    most_rows: int,
    tiny_run: list[str],
    tmp_path: Path,
    main: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    options = ["model.dropout=0.1", f"micro_batch={micro_batch}"]
    callback = f"callbacks.mine={{_target_: {__name__}.Raises, hook: on_train_batch_end, step: 5}}"
    assert main(*tiny_run, *options, "name=two", callback) == 1
    expected = fit(*tiny_run, *options[:1], "name=two", f"micro_batch={most_rows}")

    first = 5 * 8 // micro_batch + 8 // micro_batch  # the last micro-batch of step 6
    with monkeypatch.context() as patch:
        out_of_memory_from(patch, first, most_rows)
        summary = fit(*tiny_run, *options)
    assert summary["weights_sha256"] == expected["weights_sha256"]
    assert f"at step 6, which is repeated with micro_batch={most_rows} in place of" in caplog.text
    recorded = read_config(tmp_path / "runs" / "tiny" / "config.yaml")
    assert recorded["resolved"]["micro_batch"] == most_rows


def test_new_tensors_are_not_filled_before_they_are_written(
    tiny_run: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.utils.deterministic.fill_uninitialized_memory", True)
    fit(*tiny_run, "max_steps=1")
    deterministic: Any = torch.utils.deterministic
    assert not deterministic.fill_uninitialized_memory


def test_a_single_row_without_memory_ends_the_run(
    tiny_run: list[str],
    main: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    out_of_memory_from(monkeypatch, 3, 0)
    assert main(*tiny_run, "micro_batch=2") == 1
    assert "train.py: out of memory (CUDA out of memory." in capfd.readouterr().err


def test_a_full_disk_stops_the_run_and_keeps_the_last_checkpoint(
    tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(io.BytesIO):
        def write(self, data: Any) -> int:
            if self.tell() > 5000:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    save, files = torch.save, []

    def full_at_the_second(content: Any, file: Any) -> None:
        files.append(file)
        save(content, Full() if len(files) == 2 else file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full_at_the_second)
        with pytest.raises(OSError, match="No space left on device"):
            fit(*tiny_run)
    assert load_checkpoint("tiny", runs_dir=tmp_path / "runs").step == 4
    assert fit(*tiny_run)["steps"] == 12


@pytest.mark.parametrize("log_every", [1, 10])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(
    tiny_run: list[str], tmp_path: Path, log_every: int
) -> None:
    hot = ["optim=adamw", "optim.learning_rate=1e30", "grad_clip=null"]
    often = ["callbacks.checkpoint.every_n_steps=1", f"callbacks.log_every_n_steps={log_every}"]
    with pytest.raises(FloatingPointError, match=r"at step \d+ \(batch \d+"):
        fit(*tiny_run, *hot, *often)
    checkpoint = load_checkpoint("tiny", runs_dir=tmp_path / "runs")
    assert all(p.isfinite().all() for p in checkpoint.model.parameters())


@POSIX
def test_training_outlives_its_output(
    tiny_run: list[str], tmp_path: Path, failing_output: dict[str, Any]
) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *tiny_run, "callbacks.progress_every_s=0"],
        cwd=tmp_path, timeout=300, **failing_output,
    )  # fmt: skip
    run_dir = tmp_path / "runs" / "tiny"
    assert done.returncode == 0
    assert json.loads((run_dir / "summary.json").read_text())["steps"] == 12
    assert "finished: 12 steps" in (run_dir / "train.log").read_text()


@POSIX
@pytest.mark.parametrize("failing_output", ["left"], indirect=True)
def test_two_ranks_outlive_their_output(
    tiny_run: list[str], tmp_path: Path, failing_output: dict[str, Any]
) -> None:
    several = ["trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *tiny_run, *several],
        cwd=tmp_path, timeout=300, **failing_output,
    )  # fmt: skip
    assert done.returncode == 0
    assert (tmp_path / "runs" / "tiny" / "summary.json").exists()


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_leaves_a_checkpoint_and_its_code(
    signum: signal.Signals, code: int, tiny_run: list[str], tmp_path: Path
) -> None:
    slow = [*tiny_run, "max_steps=4000", "callbacks.checkpoint.every_n_steps=100000"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *slow],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for(lambda: len(metrics_lines(tmp_path / "runs" / "tiny")) > 20, process)
    process.send_signal(signum)
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, err
    assert err == ""
    step = read_checkpoint(tmp_path / "runs" / "tiny" / "checkpoints" / "last.ckpt")["global_step"]
    assert f"stopped by a signal at step {step}" in out


@pytest.mark.parametrize("in_another_thread", [False, True])  # which does not block signals
def test_a_signal_before_the_first_step_still_leaves_a_checkpoint(
    in_another_thread: bool, tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nanogpt.data.module import CorpusDataModule

    loader = CorpusDataModule.train_dataloader

    def kill() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

    def signalled(self: CorpusDataModule) -> Any:
        if in_another_thread:
            thread = threading.Thread(target=kill)
            thread.start()
            thread.join()
        else:
            os.kill(os.getpid(), signal.SIGTERM)
        return loader(self)

    monkeypatch.setattr(CorpusDataModule, "train_dataloader", signalled)
    with pytest.raises(SystemExit) as exit_:
        fit(*tiny_run)
    assert exit_.value.code == 143
    assert load_checkpoint("tiny", runs_dir=tmp_path / "runs").step == 1


class SignalAtTheEnd(Callback):
    """Signal in the last validation while fitting, or in the one after it."""

    def __init__(self, signum: int, fn: str) -> None:
        self.signum, self.fn = signum, fn

    def on_validation_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if trainer.state.fn == self.fn and trainer.global_step == trainer.max_steps:
            os.kill(os.getpid(), self.signum)


@pytest.mark.parametrize("fn", ["fit", "validate"])
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_after_the_last_step_leaves_before_the_final_validation_ends(
    signum: signal.Signals, code: int, fn: str, tiny_run: list[str], tmp_path: Path
) -> None:
    part = [*tiny_run, "callbacks.validation.tokens=64"]
    callback = f"{{_target_: {__name__}.SignalAtTheEnd, signum: {int(signum)}, fn: {fn}}}"
    with pytest.raises(SystemExit) as exit_:
        fit(*part, f"+callbacks.signal={callback}")
    assert exit_.value.code == code
    assert not (tmp_path / "runs" / "tiny" / "summary.json").exists()
    continued, whole = fit(*part), fit(*part, "name=whole")
    assert continued["weights_sha256"] == whole["weights_sha256"]
    assert losses(tmp_path / "runs" / "tiny") == losses(tmp_path / "runs" / "whole")


def test_two_ranks_see_the_same_tokens_as_one(
    tiny_run: list[str], tmp_path: Path, command: Command
) -> None:
    options = [*tiny_run, "optim=adamw", DROPOUT]
    ranks = ["trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu"]
    two = command(*options, *ranks, "name=two")
    assert two.returncode == 0, two.stderr
    fit(*options, "name=one")
    assert {p.name for p in (tmp_path / "runs").iterdir()} == {"one", "two"}
    for column in ("train/loss", "val/loss"):
        pairs = zip(
            metrics(tmp_path / "runs" / "one", column),
            metrics(tmp_path / "runs" / "two", column),
            strict=True,
        )
        for (a,), (b,) in pairs:
            assert (a == "") == (b == "")
            assert a == "" or abs(float(a) - float(b)) < 1e-5


def test_a_run_continues_on_another_number_of_ranks(
    tiny_run: list[str], tmp_path: Path, command: Command
) -> None:
    constant = [
        *tiny_run,
        DROPOUT,
        "optim=adamw",
        "schedule=constant",
    ]
    whole = fit(*constant, "name=whole")
    fit(*constant, "max_steps=6")
    torchrun = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
        f"--master_port={free_port()}",
         str(ROOT / "train.py"), *constant, "trainer.accelerator=cpu"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert torchrun.returncode == 0, torchrun.stderr
    summary = json.loads((tmp_path / "runs" / "tiny" / "summary.json").read_text())
    assert summary["n_ranks"] == 2
    assert abs(summary["val_loss"] - whole["val_loss"]) < 1e-5


def test_a_signal_reaches_all_ranks(tiny_run: list[str], tmp_path: Path) -> None:
    slow = [*tiny_run, "max_steps=4000", "callbacks.checkpoint.every_n_steps=100000"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *slow,
         "trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for(lambda: len(metrics_lines(tmp_path / "runs" / "tiny")) > 20, process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 143, err
    assert (tmp_path / "runs" / "tiny" / "checkpoints" / "last.ckpt").exists()


def test_a_sweep_has_one_directory_per_job_and_skips_the_finished(
    tiny_run: list[str], tmp_path: Path, main: Main, capfd: pytest.CaptureFixture[str]
) -> None:
    sweep = ["-m", *tiny_run[:-1], "max_steps=2", "seed=1,2"]
    assert main(*sweep) == 0
    jobs = sorted((tmp_path / "runs").glob("sweep-*/*/summary.json"))
    assert len(jobs) == 2
    before = [job.stat().st_mtime_ns for job in jobs]
    capfd.readouterr()
    assert main(*sweep) == 0
    assert capfd.readouterr().out.count("already finished") == 2
    assert [job.stat().st_mtime_ns for job in jobs] == before
    assert len([p for p in (tmp_path / "runs").glob("sweep-*/*") if p.is_dir()]) == 2


def test_a_sweep_over_an_operational_key_has_a_run_for_each_value(
    tiny_run: list[str], tmp_path: Path, main: Callable[..., int], capsys: pytest.CaptureFixture
) -> None:
    early = (
        "callbacks.early={_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: val/loss}"
    )
    options = [word for word in tiny_run if not word.startswith("name=")]
    assert main("-m", *options, "max_steps=1", early, "callbacks.early.patience=1,2") == 0
    recorded = [read_config(path) for path in (tmp_path / "runs").glob("*/*/config.yaml")]
    assert sorted(config["callbacks"]["early"]["patience"] for config in recorded) == [1, 2]


def test_a_run_that_a_callback_ended_prints_why_on_every_start(
    tiny_run: list[str], main: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    early = "lightning.pytorch.callbacks.EarlyStopping, monitor: val/loss, patience: 1, mode: max"
    for _ in range(2):
        assert main(*tiny_run, f"callbacks.early={{_target_: {early}}}") == 0
        assert "ended before its budget by EarlyStopping: Monitored" in capsys.readouterr().out


def test_a_typed_node_replaces_the_node_that_was_there(
    tiny_run: list[str], tmp_path: Path, main: Callable[..., int]
) -> None:
    nodes = [
        "optim={_target_: torch.optim.SGD, lr: 0.1, momentum: 0.8}",
        "schedule={_target_: nanogpt.optim.Constant}",
        "callbacks.samples={_target_: lightning.pytorch.Callback}",
    ]
    assert main(*tiny_run, "max_steps=1", *nodes, "optim.momentum=0.9") == 0
    config = read_config(tmp_path / "runs" / "tiny" / "config.yaml")
    assert config["optim"] == {"_target_": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9}
    assert config["schedule"] == {"_target_": "nanogpt.optim.Constant"}
    assert config["callbacks"]["samples"] == {"_target_": "lightning.pytorch.Callback"}


class Raises(Callback):
    """Raise in one hook, from the given step on."""

    def __init__(self, hook: str, step: int = 0) -> None:
        def fail(trainer: Trainer, *args: Any, **kwargs: Any) -> None:
            if trainer.global_step >= step:
                raise RuntimeError(f"in {hook}")

        setattr(self, hook, fail)


class Unpicklable(Callback):
    def state_dict(self) -> dict[str, Any]:
        return {"owner": self}


class WithoutRows(LightningDataModule):
    def train_dataloader(self) -> Any:
        raise KeyError("rows")

    def val_dataloader(self) -> Any:
        return []


class Unreachable(Logger):
    name = version = "none"

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        raise ConnectionError("no server")

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Ignore them."""


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_end", "on_save_checkpoint"])
def test_a_run_whose_callback_raises_names_it_and_continues_without_it(
    hook: str,
    tiny_run: list[str],
    tmp_path: Path,
    main: Callable[..., int],
    capfd: pytest.CaptureFixture[str],
) -> None:
    callback = f"callbacks.mine={{_target_: {__name__}.Raises, hook: {hook}, step: 8}}"
    assert main(*tiny_run, callback) == 1
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith(f"train.py: callbacks.mine failed at step 8: RuntimeError: in {hook}; ")
    assert load_checkpoint("tiny", runs_dir=tmp_path / "runs").step == 4
    assert main(*tiny_run) == 0
    assert load_checkpoint("tiny", runs_dir=tmp_path / "runs").step == 12


def test_a_step_after_which_a_callback_fails_is_saved(
    tiny_run: list[str], tmp_path: Path, main: Callable[..., int]
) -> None:
    callback = f"callbacks.mine={{_target_: {__name__}.Raises, hook: on_train_batch_end, step: 7}}"
    assert main(*tiny_run, callback) == 1
    assert load_checkpoint("tiny", runs_dir=tmp_path / "runs").step == 7


@pytest.mark.parametrize(
    ("node", "expected"),
    [
        ("callbacks.mine={_target_: NAME.Raises, hook: setup}", "callbacks.mine failed at step 0"),
        ("callbacks.mine={_target_: NAME.Unpicklable}", "state_dict() of the callback Unpicklable"),
        ("logger.mine={_target_: NAME.Unreachable}", "logger.mine failed at step 1: Connection"),
        (
            "callbacks.mine={_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: val/l}",
            "callbacks.mine failed at step 4: RuntimeError: Early stopping conditioned on metric",
        ),
        ("data={_target_: NAME.WithoutRows}", "data failed at step 0: KeyError: 'rows'"),
    ],
)
def test_what_fails_in_training_is_named(
    node: str,
    expected: str,
    tiny_run: list[str],
    tmp_path: Path,
    main: Callable[..., int],
    capfd: pytest.CaptureFixture[str],
) -> None:
    options = [w for w in tiny_run if not (w.startswith("data.") and node.startswith("data="))]
    assert main(*options, node.replace("NAME", __name__)) == 1
    assert capfd.readouterr().err.splitlines()[-1].startswith(f"train.py: {expected}")
    assert "step 0" not in expected or not (tmp_path / "runs").exists()


def test_a_profiler_of_lightning_prints_its_table_without_our_progress(
    tiny_run: list[str],
    main: Callable[..., int],
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    words = ["trainer.profiler=simple", "trainer.enable_progress_bar=false", "max_steps=2"]
    assert main(*tiny_run, *words) == 0
    assert "run_training_batch" in caplog.text
    assert "step 1/2" not in capfd.readouterr().out


def test_torchrun_refuses_a_sweep(
    tiny_run: list[str],
    tmp_path: Path,
    main: Main,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for name, value in (("TORCHELASTIC_RUN_ID", "x"), ("RANK", "0"), ("WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
    assert main("-m", *tiny_run, "seed=1,2") == 1
    assert "torchrun cannot run a sweep" in capfd.readouterr().err
    assert not any((tmp_path / "runs").iterdir())


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def metrics_lines(run_dir: Path) -> list[str]:
    path = run_dir / "metrics.csv"
    return path.read_text().splitlines() if path.exists() else []


def wait_for(condition: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
