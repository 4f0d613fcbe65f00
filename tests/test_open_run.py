"""Runs that were interrupted, and what continues them."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from nanogpt.checkpoint import record, write_checkpoint
from nanogpt.model import GPT, GPTConfig
from nanogpt.runs.directory import RunDirectory
from nanogpt.runs.identity import binding, identity_differences
from nanogpt.runs.run import Run, open_run
from nanogpt.tokenizer import byte_tokenizer

CONFIG = """
stage: pretrain
name: tiny
seed: 1337
init_from: null
max_steps: 400
max_tokens: null
tokens_per_step: 64
grad_clip: 1.0
resume: true
overwrite: false
micro_batch: 4
threads: 1
compile: false
runs_dir: runs
data_dir: data
tokenizer: {_target_: nanogpt.tokenizer.byte_tokenizer}
model: {block_size: 16, n_layer: 1, n_head: 1, n_embd: 16, dropout: 0.0, bias: false,
  position: rotary, norm: layernorm, activation: relu2, qk_norm: true, zero_init: true, block: null}
data: {_target_: nanogpt.data.text.TextFiles, path: corpus.txt, text_column: text, separator: null,
  skip_bad: false, val_fraction: 0.1, tokens: null, shard_tokens: 100000000, workers: 0,
  prompts: ['']}
optim: {_target_: nanogpt.optim.adamw, learning_rate: 0.0006, for_width: null, weight_decay: 0.1,
  betas: [0.9, 0.95], eps: 1.0e-08}
schedule: {_target_: nanogpt.optim.Cosine, warmup_steps: 700, floor: 0.1}
module: {_target_: nanogpt.training.language_model.LanguageModel, x: 1}
trainer: {_target_: lightning.pytorch.Trainer, accelerator: cpu, devices: 1, num_nodes: 1,
  precision: 32-true, deterministic: false, detect_anomaly: false}
callbacks: {log_every_n_steps: 1, checkpoint: {every_n_steps: 1000, keep: 2}}
logger: {csv: null}
typed: {name: tiny}
command: python train.py name=tiny
"""
RESOLVED = """{corpus: 3fb3d8c7fd88b64b, source: text-d7b9ae04, wandb_id: 4dd1619c,
  local_world_size: 1, precision: 32-true, compile: false, micro_batch: 4, threads: 1}"""
SETTINGS = {"precision": "32-true", "compile": False, "micro_batch": 4, "threads": 1}


@pytest.fixture
def config() -> dict[str, Any]:
    """A run as it is composed; it may be changed."""
    config: dict[str, Any] = yaml.safe_load(CONFIG)
    return config


@pytest.fixture
def old(config: dict[str, Any]) -> dict[str, Any]:
    """Its config.yaml before the change."""
    return {**deepcopy(config), "resolved": yaml.safe_load(RESOLVED)}


@pytest.fixture
def run_dir(tmp_path: Path, old: dict[str, Any]) -> Path:
    """The run when it is interrupted, with its checkpoint at step 4."""
    directory = RunDirectory(tmp_path / "runs" / "tiny")
    directory.create()
    directory.write_config(old)
    tokenizer = byte_tokenizer()
    shape = GPTConfig(**old["model"], vocab_size=tokenizer.vocab_size)
    weights = {f"model.{name}": tensor for name, tensor in GPT(shape).state_dict().items()}
    about = {**record("pretrain", shape, tokenizer), "run": binding(old)}
    write_checkpoint(
        {"state_dict": weights, "global_step": 4, "nanogpt": about}, directory.last_checkpoint
    )
    return directory.path


def opened(config: dict[str, Any], run_dir: Path) -> Any:
    return open_run(
        {**config, "runs_dir": str(run_dir.parent)},
        torch.device("cpu"),
        source_fingerprint=lambda: "text-d7b9ae04",
        may_extend=lambda step, old_max, new_max: old_max == new_max,
    )


def begin(run: Run) -> None:
    run.begin({"corpus": "3fb3d8c7fd88b64b", **SETTINGS})


def test_operational_settings_may_change(old: dict[str, Any], config: dict[str, Any]) -> None:
    config["callbacks"] = {"checkpoint": {"_target_": "my_package.Own", "every_n_steps": 5}}
    config["trainer"] |= {"profiler": "simple", "devices": 2}
    assert identity_differences(old, config) == []


@pytest.mark.parametrize(
    ("node", "key", "value", "line"),
    [
        ("schedule", "warmup_steps", 5, "schedule.warmup_steps: 700 is recorded, 5 is configured"),
        ("model", "block", "my.Block", "model.block: None is recorded, 'my.Block' is configured"),
        ("module", "_target_", "my.M", "module._target_: 'nanogpt.training.language_model.Langu"),
        ("module", "x", 2, "module.x: 1 is recorded, 2 is configured"),
        ("module", "y", 2, "module.y: None is recorded, 2 is configured"),
        ("schedule", "_target_", "nanogpt.optim.Constant", "schedule._target_: 'nanogpt.optim.C"),
    ],
)
def test_another_setting_is_named(
    node: str, key: str, value: object, line: str, old: dict[str, Any], config: dict[str, Any]
) -> None:
    config[node][key] = value
    (found,) = identity_differences(old, config)
    assert found.startswith(line)


def test_an_interrupted_run_is_continued(run_dir: Path, config: dict[str, Any]) -> None:
    with opened(config, run_dir) as run:
        assert (run.step, run.checkpoint) == (4, run_dir / "checkpoints" / "last.ckpt")
        assert run.recorded["wandb_id"] == "4dd1619c"


def test_it_stays_its_own_when_it_stops_before_its_next_checkpoint(
    run_dir: Path, old: dict[str, Any], config: dict[str, Any]
) -> None:
    def reopen() -> None:
        with opened(config, run_dir) as run:
            assert run.step == 4
            begin(run)
            assert run.binding == binding(old)

    reopen()
    config["model"]["norm_eps"] = 1e-5  # of a later version: what the record implies
    reopen()
    reopen()


def test_another_runs_checkpoint_is_refused(
    run_dir: Path, old: dict[str, Any], config: dict[str, Any]
) -> None:
    for key in ("seed", "corpus"):
        changed = {**old, "seed": 2} if key == "seed" else deepcopy(old)
        if key == "corpus":
            changed["resolved"]["corpus"] = "another"
        content = torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)
        content["nanogpt"]["run"] = binding(changed)
        write_checkpoint(content, run_dir / "checkpoints" / "last.ckpt")
        with (
            pytest.raises(ValueError, match="is a checkpoint of another run"),
            opened(config, run_dir),
        ):
            pass


def test_a_run_with_a_key_of_its_own_is_refused_in_one_sentence(
    run_dir: Path, old: dict[str, Any], config: dict[str, Any]
) -> None:
    old["data"]["stride"] = 3
    RunDirectory(run_dir).write_config(old)
    content = torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)
    content["nanogpt"]["run"] = binding(old)
    write_checkpoint(content, run_dir / "checkpoints" / "last.ckpt")
    with (
        pytest.raises(ValueError, match=r"data\.stride: 3 is recorded, None is.*name=<new name>"),
        opened(config, run_dir),
    ):
        pass
    assert (run_dir / "checkpoints" / "last.ckpt").exists()


def test_a_replaced_run_has_an_identity_of_its_own(
    run_dir: Path, old: dict[str, Any], config: dict[str, Any]
) -> None:
    with opened({**config, "seed": 2, "resume": False, "overwrite": True}, run_dir) as run:
        assert (run.step, run.checkpoint, run.recorded) == (0, None, {})
        begin(run)
        assert run.binding["identity"] != binding(old)["identity"]
    assert not (run_dir / "checkpoints" / "last.ckpt").exists()
