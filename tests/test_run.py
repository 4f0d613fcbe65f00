"""The identity of a run, its directory and its lock."""

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from nanogpt.runs.directory import RunDirectory, lock_run
from nanogpt.runs.identity import (
    binding,
    identity_differences,
    is_identity,
    run_name,
)

CHOICES = {"stage": "quickstart", "model": "nano", "data": "python_stdlib", "optim": "muon"}
CONFIG = {"seed": 1, "optim": {"learning_rate": 0.1}, "threads": "auto", "trainer": {"devices": 1}}


def test_untouched_defaults_give_the_plain_name() -> None:
    assert run_name(CHOICES, {}) == "quickstart-nano-python_stdlib"


def test_operational_keys_do_not_change_the_name() -> None:
    typed = {"trainer.devices": 2, "data.workers": 2, "threads": 1, "callbacks.checkpoint.keep": 1}
    assert run_name(CHOICES, typed) == run_name(CHOICES, {})


def test_a_key_that_a_sweep_varies_names_its_jobs() -> None:
    names = [run_name(CHOICES, {"threads": n}, swept={"threads"}) for n in (1, 2)]
    assert names[0].startswith("quickstart-nano-python_stdlib-threads-1-")
    assert names[0] != names[1]


def test_a_node_in_place_of_an_option_names_the_run_by_its_class() -> None:
    name = run_name(CHOICES, {"data": {"_target_": "my_package.MyData", "path": "a"}})
    assert name.startswith("quickstart-nano-MyData-")
    assert name != run_name(CHOICES, {"data": {"_target_": "my_package.MyData", "path": "b"}})


def test_an_identity_key_adds_a_readable_slug_and_a_hash() -> None:
    name = run_name(CHOICES, {"optim.learning_rate": 0.001})
    assert name.startswith("quickstart-nano-python_stdlib-learning_rate-0.001-")
    assert len(name.rpartition("-")[2]) == 8


def test_names_differ_by_value_and_agree_by_order() -> None:
    a = run_name(CHOICES, {"seed": 1, "max_steps": 5})
    assert a == run_name(CHOICES, {"max_steps": 5, "seed": 1})
    assert a != run_name(CHOICES, {"max_steps": 6, "seed": 1})


def test_a_name_is_safe_as_a_path_whatever_was_typed() -> None:
    name = run_name(CHOICES, {"data.path": "/a b/../c=d/ü,x.txt", "experiment": "x/y"})
    assert "/" not in name
    assert "=" not in name
    assert " " not in name


def test_a_long_name_has_short_keys_and_whole_values() -> None:
    typed = {"tokens_per_step": 256, "optim.learning_rate": 0.001, "optim.weight_decay": 0.125}
    name = run_name(CHOICES, {**typed, "max_steps": 1000})
    assert name.startswith("quickstart-nano-python_stdlib-ms-1000-lr-0.001-wd-0.125-tps-256-")


def test_a_pair_that_does_not_fit_is_left_out_whole() -> None:
    typed = {"data.path": "/data/" + "a" * 60 + ".txt", "seed": 7}
    assert run_name(CHOICES, typed).startswith("quickstart-nano-python_stdlib-seed-7-")


def test_values_are_named_as_they_are_typed() -> None:
    name = run_name(CHOICES, {"init_from": None, "data.balance": True})
    assert name.startswith("quickstart-nano-python_stdlib-balance-true-init_from-null-")
    assert run_name(CHOICES, {"data.path": None}).startswith("quickstart-nano-python_stdlib-null-")


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("seed", True),
        ("model.n_layer", True),
        ("trainer.precision", True),
        ("trainer.devices", False),
        ("data.workers", False),
        ("data.val_fraction", True),
        ("compile", False),
    ],
)
def test_identity_keys(key: str, expected: bool) -> None:
    assert is_identity(key) is expected


def test_differences_name_the_key_and_both_values() -> None:
    other = {**CONFIG, "optim": {"learning_rate": 0.2}, "threads": 3}
    assert identity_differences(CONFIG, other) == [
        "optim.learning_rate: 0.1 is recorded, 0.2 is configured"
    ]


def test_auto_agrees_with_what_it_became() -> None:
    recorded = {"trainer": {"precision": "bf16-mixed"}}
    assert identity_differences(recorded, {"trainer": {"precision": "auto"}}) == []
    assert identity_differences(recorded, {"trainer": {"precision": "32-true"}}) != []


def test_untyped_keys_of_the_model_mean_nothing_beside_init_from() -> None:
    recorded = {"init_from": "a.ckpt", "model": {"norm": "layernorm"}}
    config = {"init_from": "a.ckpt", "model": {"norm": "rmsnorm"}, "typed": {}}
    assert identity_differences(recorded, config) == []
    assert identity_differences(recorded, {**config, "typed": {"model.norm": "rmsnorm"}}) != []
    assert identity_differences({**recorded, "init_from": None}, config) != []


def test_a_run_that_shuffled_a_growing_corpus_is_another_run() -> None:
    """`data.wait`, a key of earlier versions, made the order of the rows another one."""
    assert identity_differences({"data": {"wait": 10, "n": 1}}, {"data": {"n": 1}}) != []
    assert identity_differences({"data": {"wait": None, "n": 1}}, {"data": {"n": 1}}) == []


def test_checkpoints_are_bound_to_the_identity_without_its_budget() -> None:
    recorded = {**CONFIG, "resolved": {"corpus": "abc"}}
    assert binding(recorded) == binding({**recorded, "max_steps": 9, "threads": 2, "new_key": None})
    assert binding(recorded) != binding({**recorded, "seed": 2})


def test_a_number_binds_however_it_is_written() -> None:
    recorded = {**CONFIG, "dropout": 0, "resolved": {"corpus": "abc"}}
    assert binding(recorded) == binding({**recorded, "dropout": 0.0})
    assert binding(recorded) != binding({**recorded, "dropout": 0.5})


@pytest.mark.parametrize("key", ["tokens_per_step", "micro_batch"])
def test_a_recorded_count_below_one_is_damage(key: str, tmp_path: Path) -> None:
    resolved: dict[str, Any] = {
        "corpus": "abc",
        "precision": "32-true",
        "compile": False,
        "wandb_id": "0",
        **dict.fromkeys(("micro_batch", "threads", "local_world_size"), 1),
    }
    recorded: dict[str, Any] = {"tokens_per_step": 8, "max_steps": 9, "max_tokens": None}
    run = RunDirectory(tmp_path)
    run.write_config({**recorded, "resolved": resolved})
    assert run.recorded_config() is not None
    (recorded if key in recorded else resolved)[key] = 0
    run.write_config({**recorded, "resolved": resolved})
    with pytest.raises(ValueError, match=rf"config\.yaml is damaged.*{key}=0 should be at least 1"):
        run.recorded_config()


def test_the_budget_may_grow_where_the_schedule_permits() -> None:
    recorded, config = {**CONFIG, "max_steps": 10}, {**CONFIG, "max_steps": 20}
    assert identity_differences(recorded, config, may_extend=True) == []
    assert identity_differences(recorded, config) == ["max_steps: 10 is recorded, 20 is configured"]


@pytest.mark.parametrize("name", [".", "..", "../x", "/tmp/x", ""])
def test_a_name_stays_under_runs_dir(name: str) -> None:
    with pytest.raises(ValueError, match="no directory under runs_dir"):
        RunDirectory.from_config({"runs_dir": "runs", "name": name})


def test_overwriting_removes_nothing_that_the_run_did_not_write(tmp_path: Path) -> None:
    (tmp_path / "another_run").mkdir()
    (tmp_path / "notes.txt").touch()
    RunDirectory(tmp_path).clear()
    assert (tmp_path / "another_run").exists()
    assert (tmp_path / "notes.txt").exists()


def test_a_second_process_is_refused_by_one_sentence(tmp_path: Path) -> None:
    with lock_run(tmp_path), pytest.raises(ValueError, match="in use by another process"):
        lock_run(tmp_path).__enter__()


def test_the_lock_is_free_again_after_the_block(tmp_path: Path) -> None:
    with lock_run(tmp_path):
        pass
    with lock_run(tmp_path):
        pass


def _hold_with_forked_child(directory: Path, child_pid: "multiprocessing.Queue[int]") -> None:
    with lock_run(directory):
        forked, in_child = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.write(in_child, b".")
            time.sleep(60)
        os.read(forked, 1)  # the child's fork handlers, which close its copy, have run
        child_pid.put(pid)
        time.sleep(60)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_an_orphaned_worker_does_not_keep_the_lock(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    pids: multiprocessing.Queue[int] = context.Queue()
    holder = context.Process(target=_hold_with_forked_child, args=(tmp_path, pids))
    holder.start()
    orphan = pids.get(timeout=30)
    try:
        holder.kill()
        holder.join()
        with lock_run(tmp_path):
            pass
    finally:
        os.kill(orphan, signal.SIGKILL)


def test_clearing_removes_the_old_run_and_keeps_the_lock(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.create()
    run.last_checkpoint.write_text("old")
    run.metrics_path.write_text("old")
    with lock_run(tmp_path):
        run.clear()
        with pytest.raises(ValueError, match="in use"):
            lock_run(tmp_path).__enter__()
    assert not run.has_begun
    assert not run.metrics_path.exists()
