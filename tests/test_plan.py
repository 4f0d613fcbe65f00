"""What a run would take, against known numbers, measurements and train.py's own refusals."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nanogpt import GPT, GPTConfig
from nanogpt import plan as plan_module
from nanogpt.optim import adamw
from nanogpt.plan import count_parameters, main
from nanogpt.training import autotune
from nanogpt.training.autotune import Trials
from nanogpt.training.memory import step_memory

TINY = GPTConfig(block_size=16, vocab_size=64, n_layer=2, n_head=2, n_embd=16)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MEASURE_S", "PRODUCT_S", "STEPS_S"):
        monkeypatch.setattr(autotune, name, 0.02)


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main([*arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_parameters_by_part_are_those_of_gpt2() -> None:
    counts = count_parameters(GPTConfig.preset("gpt2"))
    assert sum(counts.values()) == 124_439_808
    assert counts["embeddings"] == (50257 + 1024) * 768
    assert counts["attention"] == 12 * (768 * 2304 + 2304 + 768 * 768 + 768)
    assert counts["mlp"] == 12 * (2 * 4 * 768 * 768 + 4 * 768 + 768)
    assert counts["norms"] == 25 * 2 * 768
    assert counts["head"] == counts["other"] == 0


def test_a_head_of_its_own_and_norms_of_heads_are_parts() -> None:
    shape = {"tie_embeddings": False, "qk_norm": True, "qk_norm_weight": True, "norm": "rmsnorm"}
    config = GPTConfig(16, 64, 2, 2, n_embd=16, bias=False, **shape)  # type: ignore[arg-type]
    counts = count_parameters(config)
    assert counts["head"] == 64 * 16
    assert counts["norms"] == 5 * 16 + 2 * 2 * 8
    assert sum(counts.values()) == GPT(config).num_parameters()


def test_gpt2_needs_the_known_arithmetic_without_a_download(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trials, "guess_s", lambda *_: 10.0)  # too slow to be tried
    run = ["stage=pretrain", "model=gpt2_small", "threads=1", "trainer.precision=32-true"]
    found = planned(capsys, *run, "micro_batch=1", "compile=false", f"data_dir={tmp_path}")
    assert found["parameters"]["total"] == 124_439_808
    assert found["FLOPs"]["total"] / 19_074 / 524_288 / 1e9 == pytest.approx(0.855, abs=5e-3)
    assert found["tokens"]["total"] == 19_074 * 524_288
    assert found["tokens"]["passes"] is None
    assert found["time"]["total"] == 19_074 * 512 * 10.0
    h100_s = found["FLOPs"]["total"] / 989.4e12 / 0.4
    assert found["time"]["NVIDIA H100 80GB HBM3"] == pytest.approx(h100_s)
    n_bytes = 4 * (124_439_808 + 47 * 768)  # 47 rows pad the vocabulary
    assert found["memory"]["weights"] == found["memory"]["gradients"] == n_bytes
    assert found["memory"]["optimizer"] == pytest.approx(2 * n_bytes, rel=1e-5)
    assert found["disk"]["total"] == pytest.approx(3 * 3 * n_bytes, rel=1e-5)


def test_activations_are_what_a_forward_stores_for_its_backward() -> None:
    memory, model = step_memory(TINY, 4), GPT(TINY)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    stored: dict[int, int] = {}
    held = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            stored[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)
        return tensor

    ids = torch.zeros(4, 16, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        states = model.hidden_states(ids)
    own.add(ids.untyped_storage().data_ptr())
    stored[states.untyped_storage().data_ptr()] = states.untyped_storage().nbytes()
    stored.pop(ids.untyped_storage().data_ptr(), None)
    assert memory.activations == pytest.approx(sum(stored.values()), rel=0.02)


@pytest.mark.parametrize(
    ("preset", "precision", "bytes_per_token"),
    [
        ("gpt2", "32-true", 596_752),
        ("gpt2", "bf16-mixed", 338_704),
        ("gpt2-medium", "bf16-mixed", 894_864),
        ("gpt2-large", "bf16-mixed", 1_672_592),
        ("gpt2-xl", "bf16-mixed", 2_783_184),
    ],
)
def test_activations_of_gpt2_by_hand(preset: str, precision: str, bytes_per_token: int) -> None:
    """A block of C channels stores 36 C bytes for a token in bf16, 64 C in fp32.

    The inputs of its two norms (4 C each, the residual stream is always fp32), and in the precision
    of products those of the four linear maps (C, C, C, 4 C), q, k, v (3 C) and the input of GELU
    (4 C); of H heads, the log-sum-exp of the scores (4 H), of both norms mean and deviation (16).
    The final norm has an input and an output (8 C), mean and deviation (8); an id takes 8. Whatever
    the number of rows, bf16 copies of the linear maps are kept until the loss.
    Inductor's code for sm_90 stores 28.1 kB per block and token of "gpt2": this has 27.7.
    """
    config = GPTConfig.preset(preset)
    L, H, C = config.n_layer, config.n_head, config.n_embd
    is_exact = precision == "32-true"
    assert bytes_per_token == L * ((64 if is_exact else 36) * C + 4 * H + 16) + 8 * C + 16
    copies = 0 if is_exact else 2 * L * (12 * C * C + 9 * C)
    expected = config.block_size * bytes_per_token + copies
    assert step_memory(config, 1, precision).activations == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(
    ("preset", "precision", "bytes_per_token"),
    [
        ("gpt2", "32-true", 43_024),
        ("gpt2", "bf16-mixed", 43_024),
        ("gpt2-xl", "bf16-mixed", 320_016),
    ],
)
def test_recomputed_blocks_store_their_inputs(
    preset: str, precision: str, bytes_per_token: int
) -> None:
    """Those are 4 C bytes of each block; the rest is as above."""
    config = GPTConfig.preset(preset)
    L, C, T = config.n_layer, config.n_embd, config.block_size
    assert bytes_per_token == L * 4 * C + 8 * C + 16
    copies = 0 if precision == "32-true" else 2 * L * (12 * C * C + 9 * C)
    stored = step_memory(config, 1, precision, recompute=True)
    assert stored.activations == pytest.approx(T * bytes_per_token + copies, rel=0.05)


def test_the_peak_with_recomputed_blocks_has_the_activations_of_one() -> None:
    """A step of many rows: of 8 blocks, the inputs, and one with the gradient in its MLP."""
    config = GPTConfig(128, 64, 8, 2, n_embd=32)
    ours, other = (step_memory(config, 64, recompute=recompute) for recompute in (True, False))
    inputs = 64 * 128 * 4 * 32 * 8
    block = (other.activations - ours.activations) / 8
    expected = ours.weights + inputs + block + 4 * inputs / 8
    assert ours.peak - ours.weights == pytest.approx(expected, rel=0.1)
    assert ours.peak < other.peak / 3


def test_memory_of_the_parts_by_hand() -> None:
    one, two = step_memory(TINY, 1), step_memory(TINY, 2)
    n_logits = 16 * 64 * 4  # bytes of (T, V): once, or with log-probabilities and a gradient
    assert n_logits <= two.logits - one.logits <= 3 * n_logits + 16 * 16 * 4
    n_weights = 4 * sum(p.numel() for p in GPT(TINY).parameters())
    assert one.weights == one.gradients == n_weights
    assert one.optimizer == 0
    with_adamw = step_memory(TINY, 1, "32-true", adamw)
    assert with_adamw.optimizer == pytest.approx(2 * n_weights, rel=0.01)
    accumulates = step_memory(TINY, 1, accumulates=True)
    assert accumulates.peak > one.peak


def test_bfloat16_stores_less(tmp_path: Path) -> None:
    config = GPTConfig(128, 64, 2, 2, n_embd=64)
    full, half = step_memory(config, 8), step_memory(config, 8, "bf16-mixed")
    assert 0.4 * full.activations < half.activations < full.activations


class Opaque(torch.nn.Module):
    """A block that reads values, which tensors without storage do not have."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.map = torch.nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: torch.Tensor, rotation: Any, attend: Any) -> torch.Tensor:
        return x + self.map(x) if x.sum().item() else x


def test_a_block_that_reads_values_counts_as_ours() -> None:
    config = GPTConfig(16, 64, 2, 2, n_embd=16, block=f"{__name__}.Opaque")
    assert step_memory(config, 2) == step_memory(TINY, 2)


def test_a_plan_is_that_of_the_run(
    tiny_run: list[str],
    capsys: pytest.CaptureFixture[str],
    main: Callable[..., int],
    tmp_path: Path,
) -> None:
    before = planned(capsys, *tiny_run)
    assert before["tokens"]["passes"] is None
    assert not (tmp_path / "runs").exists()
    assert main(*tiny_run) == 0
    capsys.readouterr()
    after = planned(capsys, *tiny_run)
    summary = json.loads((tmp_path / "runs" / "tiny" / "summary.json").read_text())
    assert after["parameters"]["total"] == summary["n_params"]
    assert after["steps"]["total"] == summary["steps"] == 12
    assert after["tokens"]["total"] == summary["tokens"]
    (directory,) = (path for path in (tmp_path / "data").iterdir() if path.is_dir())
    manifest = json.loads((directory / "manifest.json").read_text())
    train_tokens = manifest["splits"]["train"]["tokens"]
    assert after["tokens"]["passes"] == pytest.approx(12 * 128 / train_tokens)
    n_bytes = sum(path.stat().st_size for path in directory.glob("*.bin"))
    assert after["disk"]["corpus"] == pytest.approx(n_bytes, rel=0.1)
    last = tmp_path / "runs" / "tiny" / "checkpoints" / "last.ckpt"
    assert after["disk"]["total"] / 3 == pytest.approx(last.stat().st_size, rel=0.5)


def test_the_table_fits_a_terminal(tiny_run: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert plan_module.main(tiny_run) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 30
    assert max(map(len, lines[1:])) <= 100
    assert any(line.split() == ["steps", "12", "of", "128", "tokens"] for line in lines)


@pytest.mark.parametrize(
    "wrong",
    [
        "optim.learning_rat=1",
        "model=nanoo",
        "max_steps=0",
        "tokens_per_step=100",
        "data.path=/nowhere.txt",
        "trainer.devices=1000",
        "init_from=nothing",
        "optim.learning_rate=-1",
    ],
)
def test_bad_input_is_reported_as_by_training(
    wrong: str, tiny_run: list[str], capsys: pytest.CaptureFixture[str], main: Callable[..., int]
) -> None:
    code = main(*tiny_run, wrong)
    said = capsys.readouterr().err
    assert code != 0
    assert plan_module.main([*tiny_run, wrong]) == code
    assert capsys.readouterr().err == said.replace("train.py: ", "nanogpt.plan: ", 1)


def test_a_sweep_has_no_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-m", "seed=1,2"]) == 2
    assert "a plan is that of one run" in capsys.readouterr().err
