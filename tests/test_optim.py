"""The optimizers against torch's own, their state, and the schedules."""

import copy
import importlib
import inspect
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from nanogpt.model import GPT, GPTConfig
from nanogpt.optim import (
    MuonAdamW,
    Schedule,
    adamw,
    muon,
    orthogonalise,
    parameter_groups,
    set_learning_rate,
    warmup_cosine,
    warmup_stable_decay,
)

WIDTH = 24


class Block(nn.Module):
    """The parameters of a block under their published names."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(WIDTH)
        self.attn = nn.ModuleDict(
            {"c_attn": nn.Linear(WIDTH, 3 * WIDTH), "c_proj": nn.Linear(WIDTH, WIDTH)}
        )
        self.mlp = nn.ModuleDict(
            {"c_fc": nn.Linear(WIDTH, 4 * WIDTH), "c_proj": nn.Linear(4 * WIDTH, WIDTH)}
        )


class Parameters(nn.Module):
    """A model's parameters without its computation."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(40, WIDTH)
        self.h = nn.ModuleList(Block() for _ in range(2))
        self.ln_f = nn.LayerNorm(WIDTH)


@pytest.fixture
def model() -> Parameters:
    torch.manual_seed(0)
    return Parameters()


def give_gradients(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        give_gradients(model, step)
        optimizer.step()


def gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def hidden(name: str, parameter: Tensor) -> bool:
    return name.startswith("h.") and parameter.ndim == 2


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, msg=name)


def through_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_matrices_decay_and_vectors_do_not(model: Parameters) -> None:
    decayed, plain = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert {p.ndim for p in decayed["params"]} == {2}
    assert {p.ndim for p in plain["params"]} == {1}
    assert any(p is model.wte.weight for p in decayed["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))


def test_frozen_parameters_are_in_no_group(model: Parameters) -> None:
    model.wte.weight.requires_grad_(False)
    for optimizer in (adamw(model), muon(model)):
        params = [p for group in optimizer.param_groups for p in group["params"]]
        assert len(params) == len(list(model.parameters())) - 1


def test_adamw_is_fused_on_this_cpu(model: Parameters) -> None:
    assert all(group["fused"] for group in adamw(model).param_groups)


@pytest.mark.parametrize("steps", [1, 10])
def test_muon_equals_torch_muon_beside_torch_adamw(model: Parameters, steps: int) -> None:
    reference = copy.deepcopy(model)
    named = list(reference.named_parameters())
    torch_muon = torch.optim.Muon(
        [p for name, p in named if hidden(name, p)],
        lr=1e-2,
        weight_decay=0.1,
        adjust_lr_fn="match_rms_adamw",
    )
    rest = [p for name, p in named if not hidden(name, p)]
    torch_adamw = torch.optim.AdamW(
        [
            {"params": [p for p in rest if p.ndim == 2], "weight_decay": 0.1},
            {"params": [p for p in rest if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=3e-3,
        betas=(0.9, 0.95),
        fused=True,
    )
    for step in range(steps):
        give_gradients(reference, step)
        torch_muon.step()
        torch_adamw.step()
    train(model, muon(model), range(steps))
    for (name, ours), (_, theirs) in zip(model.named_parameters(), named, strict=True):
        # One bfloat16 rounding (2^-8) of an update of RMS 0.2 x learning rate, per step.
        atol = 2e-2 * 1e-2 * steps if hidden(name, ours) else 0.0
        torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


def test_stacks_of_bounded_size_give_the_same_step(
    model: Parameters, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = copy.deepcopy(model)
    train(model, muon(model), range(2))
    monkeypatch.setattr("nanogpt.optim.STACK_ELEMENTS", 1)
    train(alone, muon(alone), range(2))
    for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)


def test_orthogonalised_matrices_have_singular_values_near_one() -> None:
    matrices = torch.randn(3, 48, 24, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(matrices, 5).float())
    # Between 0.68 and 1.13 by the iteration's own design: https://kellerjordan.github.io/posts/muon/
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_split_qkv_orthogonalises_each_third_alone(model: Parameters) -> None:
    weight = model.get_parameter("h.0.attn.c_attn.weight")
    before = weight.detach().clone()
    optimizer = muon(model, split_qkv=True, weight_decay=0.0, nesterov=False)
    give_gradients(model, 0)
    grad = gradient(weight).clone()
    optimizer.step()
    for third, (old, new, g) in enumerate(
        zip(before.chunk(3), weight.detach().chunk(3), grad.chunk(3), strict=True)
    ):
        expected = old - 1e-2 * 0.2 * math.sqrt(WIDTH) * orthogonalise(g[None], 5)[0]
        torch.testing.assert_close(new, expected, rtol=0, atol=2e-4, msg=f"third {third}")


@pytest.mark.parametrize("build", [adamw, muon])
def test_state_through_a_file_continues_bit_for_bit(
    model: Parameters, build: Callable[..., torch.optim.Optimizer]
) -> None:
    optimizer = build(model)
    train(model, optimizer, range(3))
    resumed = copy.deepcopy(model)
    again = build(resumed)
    again.load_state_dict(through_file(optimizer.state_dict()))
    train(model, optimizer, range(3, 6))
    train(resumed, again, range(3, 6))
    assert_same_weights(model, resumed)


@pytest.mark.parametrize("build", [adamw, muon])
def test_parameters_without_gradient_stay(
    model: Parameters, build: Callable[..., torch.optim.Optimizer]
) -> None:
    optimizer = build(model)
    give_gradients(model, 0)
    still = [model.wte.weight, model.get_parameter("h.0.attn.c_attn.weight"), model.ln_f.bias]
    for parameter in still:
        parameter.grad = None
    before = [p.detach().clone() for p in still]
    optimizer.step()
    optimizer.zero_grad()
    optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(still, before, strict=True))


@pytest.mark.parametrize("build", [adamw, muon])
def test_gradient_scaler_skips_a_step_that_overflowed(
    model: Parameters, build: Callable[..., torch.optim.Optimizer]
) -> None:
    optimizer = build(model)
    untouched = copy.deepcopy(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.zeros(()))
    give_gradients(model, 0)
    gradient(model.ln_f.bias)[0] = math.inf
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert_same_weights(model, untouched)
    assert scaler.get_scale() == 2.0


@pytest.mark.parametrize("build", [adamw, muon])
def test_gradient_scaler_takes_the_unscaled_step(
    model: Parameters, build: Callable[..., torch.optim.Optimizer]
) -> None:
    plain = copy.deepcopy(model)
    train(plain, build(plain), range(1))
    optimizer = build(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.zeros(()))
    give_gradients(model, 0)
    for parameter in model.parameters():
        gradient(parameter).mul_(4.0)
    scaler.step(optimizer)
    assert_same_weights(model, plain)


def test_closure_runs_with_gradients_and_its_loss_returns(model: Parameters) -> None:
    def closure() -> Tensor:
        loss = model.wte.weight.square().sum()
        loss.backward()
        return loss

    before = model.wte.weight.detach().square().sum()
    assert muon(model).step(closure) == before
    assert model.wte.weight.detach().square().sum() < before


def test_set_learning_rate_scales_every_group_from_its_base(model: Parameters) -> None:
    optimizer = muon(model, learning_rate=0.02, adamw_learning_rate=0.004)
    set_learning_rate(optimizer, 0.5)
    set_learning_rate(optimizer, 0.25)
    rates = {(group["algorithm"], group["lr"]) for group in optimizer.param_groups}
    assert rates == {("muon", 0.005), ("adamw", 0.001)}


def test_muon_takes_only_the_matrices_of_the_blocks(model: Parameters) -> None:
    optimizer = muon(model)
    assert isinstance(optimizer, MuonAdamW)
    taken = {
        id(p) for group in optimizer.param_groups if "momentum" in group for p in group["params"]
    }
    assert taken == {id(p) for name, p in model.named_parameters() if hidden(name, p)}


@pytest.mark.parametrize(
    ("build", "settings", "named"),
    [
        (adamw, {"learning_rate": "1e-3"}, "optim.learning_rate is '1e-3'"),
        (adamw, {"weight_decay": -0.1}, "optim.weight_decay is -0.1"),
        (adamw, {"eps": math.nan}, "optim.eps is nan"),
        (adamw, {"betas": [0.9]}, "optim.betas"),
        (adamw, {"betas": [0.9, 1.0]}, "optim.betas"),
        (adamw, {"betas": 0.9}, "optim.betas"),
        (muon, {"adamw_learning_rate": None}, "optim.adamw_learning_rate is None"),
        (muon, {"momentum": 1.5}, "optim.momentum is 1.5"),
        (muon, {"ns_steps": 2.5}, "optim.ns_steps is 2.5"),
    ],
)
def test_wrong_values_name_their_key(
    model: Parameters, build: Callable[..., Any], settings: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        build(model, **settings)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"kind": "linear"}, "optim.schedule.kind is 'linear'; write cosine, wsd or constant"),
        ({"kind": "wsd", "warmup_steps": 0.5}, "optim.schedule.warmup_steps is 0.5"),
        ({"kind": "wsd", "decay_fraction": 2}, "optim.schedule.decay_fraction is 2"),
        ({"kind": "cosine", "floor": "0"}, "optim.schedule.floor is '0'"),
    ],
)
def test_wrong_schedules_name_their_key(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Schedule(**settings)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_yaml_builds_its_optimizer_and_schedule(model: Parameters, name: str) -> None:
    text = Path(__file__).parents[1].joinpath("conf", "optim", f"{name}.yaml").read_text()
    node = yaml.safe_load(text)
    assert Schedule(**node.pop("schedule")).factor(0, 12) > 0
    assert node.pop("grad_clip") == 1.0
    module, _, function = node.pop("_target_").rpartition(".")
    build = getattr(importlib.import_module(module), function)
    assert build(model, **node).param_groups[0]["base_lr"] == node["learning_rate"]
    assert set(node) == set(inspect.signature(build).parameters) - {"model"}


def test_cosine_warms_up_peaks_and_ends_at_its_floor() -> None:
    def factor(step: int) -> float:
        return warmup_cosine(step, warmup_steps=10, max_steps=110, floor=0.1)

    assert factor(0) == 0.1
    assert factor(9) == factor(10) == 1.0
    assert factor(60) == pytest.approx(0.55)
    assert factor(110) == pytest.approx(0.1)


def test_stable_phase_is_one_and_decay_is_linear() -> None:
    def factor(step: int) -> float:
        return warmup_stable_decay(step, warmup_steps=4, decay_steps=50, max_steps=100, floor=0.0)

    assert [factor(step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factor(50) == 1.0
    assert factor(75) == 0.5
    assert factor(99) == pytest.approx(0.02)
    assert factor(100) == 0.0


@pytest.mark.parametrize("kind", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize("decay_fraction", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("max_steps", [1, 2, 3, 12, 1000])
def test_every_step_of_a_run_of_any_length_learns(
    kind: str, decay_fraction: float, max_steps: int
) -> None:
    schedule = Schedule(kind, warmup_steps=700, decay_fraction=decay_fraction, floor=0.0)
    factors = [schedule.factor(step, max_steps) for step in range(max_steps)]
    assert all(0 < factor <= 1 for factor in factors)
    assert max(factors) == 1.0


def test_stable_run_may_grow_until_its_decay_begins() -> None:
    schedule = Schedule("wsd", warmup_steps=10, decay_fraction=0.5)
    assert schedule.may_extend(50, 100, 200)
    assert not schedule.may_extend(51, 100, 200)
    assert not schedule.may_extend(100, 100, 200)
    assert not schedule.may_extend(20, 100, 50)
    assert schedule.may_extend(80, 100, 100)


def test_growing_run_keeps_the_factors_it_had() -> None:
    schedule = Schedule("wsd", warmup_steps=10, decay_fraction=0.5)
    for old, new in ((100, 200), (12, 100), (40, 41)):
        for step in range(old + 1):
            if schedule.may_extend(step, old, new):
                had = [schedule.factor(s, old) for s in range(step)]
                assert had == [schedule.factor(s, new) for s in range(step)]


def test_only_unchanging_histories_may_grow() -> None:
    assert Schedule("constant", warmup_steps=10).may_extend(100, 100, 200)
    assert not Schedule("cosine", warmup_steps=10).may_extend(20, 100, 200)
    assert not Schedule("constant", warmup_steps=700).may_extend(100, 100, 200)


def test_a_learning_rate_for_a_width_is_scaled_to_the_models() -> None:
    model = GPT(GPTConfig(block_size=4, vocab_size=8, n_layer=1, n_head=2, n_embd=16))
    optimizer = adamw(model, learning_rate=3e-4, for_width=64)
    assert [group["base_lr"] for group in optimizer.param_groups] == pytest.approx([12e-4] * 2)
    with pytest.raises(ValueError, match="for_width"):
        adamw(model, for_width=-1)
