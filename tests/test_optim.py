"""The optimizers against torch's own, their state, and the schedules."""

import copy
import functools
import importlib
import inspect
import io
import math
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.distributed as dist
import yaml
from pydantic import ValidationError
from torch import Tensor, nn

from nanogpt.build import ConfigurationError, build_optimizer, build_schedule
from nanogpt.checkpoint import weights_sha256
from nanogpt.model import GPT, GPTConfig
from nanogpt.muon import MuonAdamW, orthogonalise
from nanogpt.optim import (
    Constant,
    Cosine,
    Schedule,
    WarmupStableDecay,
    adamw,
    check_schedule,
    factor_at,
    learning_rates,
    may_extend,
    muon,
    parameter_groups,
    set_learning_rates,
)
from nanogpt.values import explain

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
    decayed, plain = parameter_groups(model.parameters(), 0.1)
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


@pytest.mark.parametrize("steps", [1, 4])
def test_muon_equals_torch_muon_with_torch_adamw(model: Parameters, steps: int) -> None:
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
    monkeypatch.setattr("nanogpt.muon.STACK_ELEMENTS", 1)
    train(alone, muon(alone), range(2))
    for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)


def test_orthogonalised_matrices_have_singular_values_near_one() -> None:
    matrices = torch.randn(3, 48, 24, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(matrices, 5).float())
    # Between 0.68 and 1.13 by the iteration's own design: https://kellerjordan.github.io/posts/muon/
    assert values.min() > 0.5
    assert values.max() < 1.3


@pytest.mark.parametrize("rank", [24, 3])
def test_wide_matrices_are_orthogonalised_as_by_the_iteration_itself(rank: int) -> None:
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(3, 24, rank, generator=generator)
    right = torch.randn(3, rank, 96, generator=generator)
    expected = (left @ right).double()
    expected /= torch.linalg.matrix_norm(expected, keepdim=True)
    for _ in range(5):
        gram = expected @ expected.mT
        polynomial = 3.4445 * torch.eye(24) - 4.7750 * gram + 2.0315 * gram @ gram
        expected = polynomial @ expected
    for ours, reference in ((left @ right, expected), ((left @ right).mT, expected.mT)):
        torch.testing.assert_close(
            orthogonalise(ours, 5), reference, atol=1e-4, rtol=0, check_dtype=False
        )


def test_many_iterations_on_a_matrix_of_low_rank_stay_bounded() -> None:
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(2, 32, 3, generator=generator)
    right = torch.randn(2, 3, 128, generator=generator)
    assert orthogonalise(left @ right, 12).abs().max() < 1.3


def test_a_cpu_orthogonalises_in_bfloat16_under_autocast_only() -> None:
    matrices = torch.randn(2, 8, 8)
    assert orthogonalise(matrices, 5).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert orthogonalise(matrices, 5).dtype == torch.bfloat16


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


def test_row_moments_even_out_the_rows_of_an_update(model: Parameters) -> None:
    weight = model.get_parameter("h.1.attn.c_attn.weight")
    expected = weight.detach().clone()
    optimizer = muon(model, split_qkv=True, row_beta=0.9, momentum=0.0, weight_decay=0.0)
    moments = torch.zeros(3, WIDTH, 1)
    for step in range(3):
        give_gradients(model, step)
        for part, rows in enumerate(range(0, 3 * WIDTH, WIDTH)):  # NorMuon, algorithm 1
            update = orthogonalise(gradient(weight)[None, rows : rows + WIDTH], 5)[0].float()
            moments[part] = 0.9 * moments[part] + 0.1 * update.square().mean(1, keepdim=True)
            update /= moments[part].sqrt()
            update *= 0.2 * math.sqrt(update.numel()) / update.norm()
            expected[rows : rows + WIDTH] -= 1e-2 * update
        optimizer.step()
    torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=2e-5)


def test_row_moments_of_rows_without_gradient_are_harmless(model: Parameters) -> None:
    weight = model.get_parameter("h.0.attn.c_attn.weight")
    optimizer = muon(model, row_beta=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert weight.isfinite().all()


@pytest.mark.parametrize("nesterov", [False, True])
def test_split_qkv_of_grouped_heads_updates_as_separate_matrices(nesterov: bool) -> None:
    shape: dict[str, Any] = {"n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 24}
    model = GPT(GPTConfig(block_size=8, vocab_size=61, **shape, head_size=8))
    weight = model.get_parameter("h.1.attn.c_attn.weight")
    sizes = [4 * 8, 2 * 8, 2 * 8]
    apart = [nn.Parameter(part.detach().clone()) for part in weight.split(sizes)]
    settings: Any = {"weight_decay": 0.1, "nesterov": nesterov}
    reference = torch.optim.Muon(apart, lr=1e-2, adjust_lr_fn="match_rms_adamw", **settings)
    optimizer = muon(model, split_qkv=True, **settings)
    for step in range(3):
        give_gradients(model, step)
        for part, grad in zip(apart, gradient(weight).split(sizes), strict=True):
            part.grad = grad.clone()
        optimizer.step()
        reference.step()
    # One bfloat16 rounding (2^-8) of an update of RMS 0.2 x learning rate, per step.
    torch.testing.assert_close(weight, torch.cat([*apart]), rtol=0, atol=2e-2 * 1e-2 * 3)


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
    optimizer: Any = muon(model)
    assert optimizer.step(closure) == before
    assert model.wte.weight.detach().square().sum() < before


def test_learning_rates_are_the_remembered_ones_times_the_factor(model: Parameters) -> None:
    optimizer = muon(model, learning_rate=0.02, adamw_learning_rate=0.004)
    rates = learning_rates(optimizer)
    set_learning_rates(optimizer, rates, 0.5, 0)
    set_learning_rates(optimizer, rates, 0.25, 1)
    reached = {(group["algorithm"], group["lr"]) for group in optimizer.param_groups}
    assert reached == {("muon", 0.005), ("adamw", 0.001)}


def test_groups_of_parameters_have_the_rates_that_they_are_given() -> None:
    shape: dict[str, Any] = {"n_layer": 1, "n_head": 2, "n_embd": 8, "tie_embeddings": False}
    model = GPT(GPTConfig(block_size=4, vocab_size=8, **shape, embd_shortcut=True))
    given: dict[str, Any] = {"embedding_learning_rate": 0.3, "head_learning_rate": 0.2}
    given |= {"adamw_weight_decay": 0.5}
    optimizer = muon(model, learning_rate=0.01, adamw_learning_rate=0.0, **given)
    found = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    rates = {name: found[id(parameter)] for name, parameter in model.named_parameters()}
    assert (rates.pop("wte.weight"), rates.pop("wpe.weight")) == (0.3, 0.3)
    assert rates.pop("lm_head.weight") == 0.2
    matrices = {name for name, parameter in model.named_parameters() if parameter.ndim > 1}
    assert {rates[name] for name in rates.keys() & matrices} == {0.01}
    assert {rates[name] for name in rates.keys() - matrices} == {0.0}
    decays = {(group["lr"], group["weight_decay"]) for group in optimizer.param_groups}
    assert decays == {(0.01, 0.1), (0.3, 0.5), (0.2, 0.5), (0.0, 0.0)}


def test_rates_that_are_those_of_adamw_make_no_further_groups(model: Parameters) -> None:
    alike = muon(model, adamw_learning_rate=0.004, embedding_learning_rate=0.004)
    groups = muon(model, adamw_learning_rate=0.004).param_groups
    assert [group["params"] for group in alike.param_groups] == [g["params"] for g in groups]


def test_the_momentum_rises_with_the_step_and_stays(model: Parameters) -> None:
    optimizer = muon(model, momentum=0.95, momentum_warmup_steps=100)
    rates = learning_rates(optimizer)

    def momentum(step: int) -> float:
        set_learning_rates(optimizer, rates, 1.0, step)
        return float(optimizer.param_groups[0]["momentum"])

    assert [momentum(step) for step in (0, 50, 100, 5000, 25)] == pytest.approx(
        [0.85, 0.90, 0.95, 0.95, 0.875]
    )
    assert "momentum" not in optimizer.param_groups[-1]  # which is AdamW's


def test_a_momentum_that_rises_resumes_bit_for_bit(model: Parameters) -> None:
    def stepped(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            set_learning_rates(optimizer, [1e-2, 3e-3, 3e-3], 1.0, step)
            train(model, optimizer, range(step, step + 1))

    optimizer, resumed = muon(model, momentum_warmup_steps=9), copy.deepcopy(model)
    stepped(model, optimizer, range(3))
    resumed.load_state_dict(model.state_dict())
    again = muon(resumed, momentum_warmup_steps=9)
    again.load_state_dict(through_file(optimizer.state_dict()))
    stepped(model, optimizer, range(3, 6))
    stepped(resumed, again, range(3, 6))
    assert_same_weights(model, resumed)


def test_a_stock_optimizer_resumes_in_mid_schedule_bit_for_bit(model: Parameters) -> None:
    def sgd(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def scheduled(
        model: nn.Module, optimizer: torch.optim.Optimizer, rates: list[float], steps: range
    ) -> None:
        for step in steps:
            set_learning_rates(optimizer, rates, Cosine(2)(step, 6), step)
            train(model, optimizer, range(step, step + 1))

    optimizer = sgd(model)
    rates = learning_rates(optimizer)
    scheduled(model, optimizer, rates, range(4))
    resumed = copy.deepcopy(model)
    again = sgd(resumed)
    rates_again = learning_rates(again)
    again.load_state_dict(through_file(optimizer.state_dict()))
    assert learning_rates(again) != rates_again
    scheduled(model, optimizer, rates, range(4, 6))
    scheduled(resumed, again, rates_again, range(4, 6))
    assert_same_weights(model, resumed)


def my_opt(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([model.get_parameter("wte.weight")], lr=lr)


def my_opt_over_params(params: list[nn.Parameter], *, lr: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=lr)


@pytest.mark.parametrize("partial", [{}, {"_partial_": True}])
@pytest.mark.parametrize(
    ("node", "kind", "n_parameters"),
    [
        ({"_target_": "torch.optim.SGD", "momentum": 0.9}, torch.optim.SGD, 22),
        ({"_target_": "torch.optim.RMSprop"}, torch.optim.RMSprop, 22),
        ({"_target_": f"{__name__}.my_opt"}, torch.optim.SGD, 1),
        ({"_target_": f"{__name__}.my_opt_over_params"}, torch.optim.Adam, 22),
    ],
)
def test_an_optimizer_of_ones_own_takes_the_model_or_its_trainable_parameters(
    node: dict[str, Any], kind: Any, n_parameters: int, partial: dict[str, Any], model: Parameters
) -> None:
    model.ln_f.bias.requires_grad_(False)
    optimizer = build_optimizer({**node, **partial, "lr": 0.1}, model)
    assert type(optimizer) is kind
    assert learning_rates(optimizer) == [0.1]
    assert len(optimizer.param_groups[0]["params"]) == n_parameters


@pytest.mark.parametrize(
    ("node", "sentence"),
    [
        (
            {"_target_": "torch.optim.SGD", "lrr": 1},
            "there is no key optim.lrr; did you mean optim.lr",
        ),
        (
            {"_target_": f"{__name__}.my_opt"},
            "optim: my_opt(...) failed: TypeError: my_opt() missing 1 required",
        ),
        ({"_target_": "torch.optim.SGD", "lr": -1.0}, "optim: Invalid learning rate: -1.0"),
        ({"_target_": "nanogpt.optim.adamw", "eps": "x"}, "optim.eps='x' should be a number"),
        (
            {"_target_": "builtins.dict", "a": 1},
            "optim._target_=builtins.dict returns dict; an opt",
        ),
    ],
)
def test_an_optimizer_that_cannot_be_built_is_one_sentence(
    node: dict[str, Any], sentence: str, model: Parameters
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        build_optimizer(node, model)
    assert str(caught.value).startswith(sentence)


def power(step: int, max_steps: int, base: float = 0.5) -> float:
    return base**step


def with_base(base: float) -> Schedule:
    return functools.partial(power, base=base)


@pytest.mark.parametrize(
    "node",
    [
        {"_target_": f"{__name__}.power", "base": 0.25},
        {"_target_": f"{__name__}.power", "base": 0.25, "_partial_": True},
        {"_target_": f"{__name__}.with_base", "base": 0.25},
    ],
)
def test_a_schedule_of_ones_own_is_a_function_or_made_by_one(node: dict[str, Any]) -> None:
    assert build_schedule(node)(2, 10) == 0.0625


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
        (adamw, {"learning_rate": "1e-3"}, "optim.learning_rate='1e-3' should be a number"),
        (adamw, {"learning_rate": True}, "optim.learning_rate=True should be a number"),
        (adamw, {"weight_decay": -0.1}, "optim.weight_decay=-0.1 should be at least 0"),
        (adamw, {"eps": math.nan}, "optim.eps=nan should be a finite number"),
        (adamw, {"betas": [0.9]}, "optim.betas=[0.9] should be"),
        (adamw, {"betas": [0.9, 1.0]}, "optim.betas=1.0 should be below 1"),
        (adamw, {"betas": 0.9}, "optim.betas=0.9 should be a list"),
        (adamw, {"for_width": 0}, "optim.for_width=0 should be at least 1"),
        (adamw, {"momentum": 0.9}, "there is no key optim.momentum"),
        (muon, {"adamw_learning_rate": None}, "optim.adamw_learning_rate=None should be a number"),
        (muon, {"momentum": 1.5}, "optim.momentum=1.5 should be at most 1"),
        (muon, {"ns_steps": 2.5}, "optim.ns_steps=2.5 should be a whole number"),
        (muon, {"nesterov": 1}, "optim.nesterov=1 should be true or false"),
        (Cosine, {"warmup_steps": 0.5}, "optim.warmup_steps=0.5 should be a whole number"),
        (Cosine, {"floor": "0"}, "optim.floor='0' should be a number"),
        (Cosine, {"decay_fraction": 0.5}, "there is no key optim.decay_fraction"),
        (WarmupStableDecay, {"decay_fraction": 2}, "optim.decay_fraction=2 should be at most 1"),
        (Constant, {"warmup_steps": -1}, "optim.warmup_steps=-1 should be at least 0"),
    ],
)
def test_wrong_values_name_their_key(
    model: Parameters, build: Callable[..., Any], settings: dict[str, Any], named: str
) -> None:
    live = () if isinstance(build, type) else (model,)
    with pytest.raises(ValidationError) as caught:
        build(*live, **settings)
    assert explain(caught.value, "optim").startswith(named)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_yaml_names_every_setting_of_its_optimizer(model: Parameters, name: str) -> None:
    text = Path(__file__).parents[1].joinpath("conf", "optim", f"{name}.yaml").read_text()
    node = yaml.safe_load(text)
    del node["defaults"]
    module, _, function = node.pop("_target_").rpartition(".")
    build = getattr(importlib.import_module(module), function)
    assert build(model, **node).param_groups[0]["lr"] == node["learning_rate"]
    assert set(node) == set(inspect.signature(build).parameters) - {"model"}


def test_cosine_warms_up_peaks_and_ends_at_its_floor() -> None:
    schedule = Cosine(warmup_steps=10, floor=0.1)
    assert schedule(0, 110) == 0.1
    assert schedule(9, 110) == schedule(10, 110) == 1.0
    assert schedule(60, 110) == pytest.approx(0.55)
    assert schedule(110, 110) == schedule(200, 110) == pytest.approx(0.1)


def test_stable_phase_is_one_and_decay_is_linear() -> None:
    schedule = WarmupStableDecay(warmup_steps=4, decay_fraction=0.5)
    assert [schedule(step, 100) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert schedule(50, 100) == 1.0
    assert schedule(75, 100) == 0.5
    assert schedule(99, 100) == pytest.approx(0.02)
    assert schedule(100, 100) == schedule(101, 100) == 0.0


def test_a_decay_takes_what_the_warm_up_leaves_of_the_run() -> None:
    schedule = WarmupStableDecay(warmup_steps=10, decay_fraction=1.0)
    assert [schedule(step, 20) for step in (9, 10, 15, 19)] == [1.0, 1.0, 0.5, 0.1]
    assert WarmupStableDecay(decay_fraction=0.0)(101, 100) == 1.0


def test_constant_is_one_after_its_warm_up() -> None:
    assert [Constant(warmup_steps=2)(step, 5) for step in range(6)] == [0.5, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    "schedule",
    [Cosine(700), Constant(700), *(WarmupStableDecay(700, part) for part in (0.0, 0.5, 1.0))],
)
@pytest.mark.parametrize("max_steps", [1, 2, 3, 12, 1000])
def test_every_step_of_a_run_of_any_length_learns(schedule: Schedule, max_steps: int) -> None:
    factors = [schedule(step, max_steps) for step in range(max_steps)]
    assert all(0 < factor <= 1 for factor in factors)
    assert max(factors) == 1.0


def test_a_run_may_grow_until_its_decay_has_begun() -> None:
    schedule = WarmupStableDecay(warmup_steps=10, decay_fraction=0.5)
    assert may_extend(schedule, 51, 100, 200)  # its last step, counted from 0, is the 50th: 1
    assert not may_extend(schedule, 52, 100, 200)
    assert not may_extend(schedule, 100, 100, 200)
    assert not may_extend(schedule, 20, 100, 50)
    assert may_extend(schedule, 80, 100, 100)
    assert may_extend(schedule, 0, 100, 50)


def test_only_unchanging_histories_may_grow() -> None:
    assert may_extend(Constant(warmup_steps=10), 100, 100, 200)
    assert not may_extend(Constant(warmup_steps=700), 100, 100, 200)
    assert may_extend(Cosine(warmup_steps=10), 11, 100, 200)  # of the warm-up and the top
    assert not may_extend(Cosine(warmup_steps=10), 12, 100, 200)


def test_a_schedule_of_ones_own_may_grow_where_it_ignores_the_length() -> None:
    assert may_extend(lambda step, max_steps: 0.99**step, 1000, 1000, 2000)
    assert not may_extend(lambda step, max_steps: 1 - step / max_steps, 2, 1000, 2000)


def halved(step: int, max_steps: int, *, from_step: int) -> Any:
    return 1 if step < from_step else "half"


@pytest.mark.parametrize(
    ("schedule", "sentence"),
    [
        (
            functools.partial(halved, from_step=50),
            r"halved\(step=50, max_steps=100\) fails .*: it returns 'half'",
        ),
        (
            functools.partial(halved, from_step=99),
            r"halved\(step=99, max_steps=100\) fails .*: it returns 'half'",
        ),
        (
            lambda step, max_steps: 1 / step,
            r"step=0, max_steps=100\) fails with ZeroDivisionError: div",
        ),
        (
            lambda step, max_steps: math.inf,
            r"step=0, max_steps=100\) fails .* returns inf, not a finite",
        ),
        (lambda step, max_steps: -0.1, r"returns -0.1, not a finite number from 0"),
        (lambda step, max_steps: None, "returns None, not a finite number from 0"),
        (lambda step: 1.0, r"step=0, max_steps=100\) fails with TypeError: .* takes 1 positional"),
        (
            0.5,
            r"schedule float\(step=0, max_steps=100\) fails with TypeError: 'float' object is not",
        ),
    ],
)
def test_a_schedule_that_fails_is_named_with_its_step(schedule: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        check_schedule(schedule, 100)


@pytest.mark.parametrize("max_steps", [1, 2, 1000])
def test_a_schedule_is_checked_within_the_run_only(max_steps: int) -> None:
    def rows(step: int, max_steps: int) -> float:
        assert step >= 0
        return [1.0 for _ in range(max_steps)][step]

    check_schedule(rows, max_steps)


def test_a_factor_of_numpy_is_a_number() -> None:
    assert factor_at(lambda step, max_steps: numpy.float32(0.5), 0, 1) == 0.5


def test_a_learning_rate_for_a_width_is_scaled_to_the_models() -> None:
    model = GPT(GPTConfig(block_size=4, vocab_size=8, n_layer=1, n_head=2, n_embd=16))
    optimizer = adamw(model, learning_rate=3e-4, for_width=64)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([12e-4] * 2)
    with pytest.raises(ValueError, match="for_width"):
        adamw(model, for_width=-1)


def _train_on_rank(rank: int, store: str, found: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    for row_beta in (0.0, 0.95):
        shas = []
        for shared in (True, False):
            torch.manual_seed(0)
            model = GPT(GPTConfig(block_size=8, vocab_size=16, n_layer=3, n_head=2, n_embd=32))
            optimizer: Any = muon(model, split_qkv=True, row_beta=row_beta)
            optimizer.shared = shared
            train(model, optimizer, range(3))
            shas.append(weights_sha256(model))
        found.put((row_beta, *shas))
    dist.destroy_process_group()


def test_two_ranks_share_muons_work_to_the_same_bits(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    found: multiprocessing.Queue[Any] = context.Queue()
    store = str(tmp_path / "store")
    ranks = [context.Process(target=_train_on_rank, args=(n, store, found)) for n in range(2)]
    for process in ranks:
        process.start()
    results = [found.get(timeout=120) for _ in range(4)]
    for process in ranks:
        process.join()
    assert all(shared == alone for _, shared, alone in results)
    assert len(set(results)) == 2  # both ranks have the same, for each row_beta
