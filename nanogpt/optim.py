"""AdamW, Muon with AdamW, and learning-rate schedules as functions of the step."""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from numbers import Real
from typing import Annotated, Any

import torch
from pydantic import ConfigDict, Field, validate_call
from pydantic.dataclasses import dataclass
from torch import nn

from nanogpt.muon import MuonAdamW
from nanogpt.values import CHECKED, Amount, BelowOne, Count, Flag, Fraction, Size

Group = dict[str, Any]  # a parameter group as torch.optim takes it: "params" and their settings
# (step, max_steps) -> factor of the learning rate: step is an optimizer step counted from 0.
Schedule = Callable[[int, int], float]

FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")  # that have the kernel in every release we take
HIDDEN_WEIGHT = re.compile(r"(^|\.)h\.\d+\.")
QKV_WEIGHT = re.compile(r"(^|\.)attn\.c_attn\.weight$")
FIRST_MOMENTUM = 0.85  # of Muon's warm-up (modded-nanogpt, record 9)
Betas = Annotated[tuple[BelowOne, ...], Field(min_length=2, max_length=2)]
checked = validate_call(config=ConfigDict(arbitrary_types_allowed=True))


@checked
def adamw(
    model: nn.Module,
    *,
    learning_rate: Amount = 6e-4,
    weight_decay: Amount = 0.1,
    betas: Betas = (0.9, 0.95),
    eps: Amount = 1e-8,
    for_width: Count | None = None,
) -> torch.optim.AdamW:
    """Build AdamW over the model's decay groups, fused where the device has it.

    With `for_width` the learning rate is meant for models of so many channels (n_embd); narrower
    ones take proportionally more of it ("Tensor Programs V", arXiv:2203.03466, table 3).
    """
    if for_width is not None:
        config: Any = model.config
        learning_rate *= for_width / config.n_embd
    return torch.optim.AdamW(
        parameter_groups(model.parameters(), weight_decay),
        lr=learning_rate,
        betas=(betas[0], betas[1]),
        eps=eps,
        fused=_all_fused(model.parameters()) or None,
    )


@checked
def muon(
    model: nn.Module,
    *,
    learning_rate: Amount = 1e-2,
    adamw_learning_rate: Amount = 3e-3,
    embedding_learning_rate: Amount | None = None,
    head_learning_rate: Amount | None = None,
    weight_decay: Amount = 0.1,
    adamw_weight_decay: Amount | None = None,
    momentum: Fraction = 0.95,
    momentum_warmup_steps: Size = 0,
    nesterov: Flag = True,
    ns_steps: Size = 5,
    betas: Betas = (0.9, 0.95),
    eps: Amount = 1e-8,
    split_qkv: Flag = False,
    row_beta: BelowOne = 0.0,
) -> torch.optim.Optimizer:
    """Build Muon for the blocks' matrices and AdamW for all other parameters, as one optimizer.

    `learning_rate` is on AdamW's scale (arXiv:2502.16982, section 2.2: updates of RMS 0.2). AdamW's
    is `adamw_learning_rate`, unless embeddings or an untied head have their own. The momentum rises
    from 0.85, linearly in `momentum_warmup_steps`.
    `split_qkv` orthogonalises the query, key and value rows of `c_attn` apart, as Muon's author
    does; without it the updates are those of `torch.optim.Muon`. `row_beta` is the decay per step
    of the rows' second moments, which even out the updates of rows (NorMuon, arXiv:2510.05491).
    """
    config: Any = getattr(model, "config", None)
    blocks: dict[int, Any] = {1: 1, 3: 3}
    if getattr(config, "n_kv_head", None) is not None:
        blocks[3] = [config.n_head, config.kv_heads, config.kv_heads]
    matrices: dict[int, list[nn.Parameter]] = defaultdict(list)  # by number of row blocks
    rates = {"wte": embedding_learning_rate, "wpe": embedding_learning_rate}
    rates |= {"lm_head": head_learning_rate}
    rest: dict[float, list[nn.Parameter]] = defaultdict(list)  # by learning rate
    for name, parameter in model.named_parameters():
        if not (HIDDEN_WEIGHT.search(name) and parameter.ndim == 2):
            rate = rates.get(name.partition(".")[0])
            rest[adamw_learning_rate if rate is None else rate].append(parameter)
        elif parameter.requires_grad:
            matrices[3 if split_qkv and QKV_WEIGHT.search(name) else 1].append(parameter)
    muon_settings = {
        "algorithm": "muon",
        "lr": learning_rate,
        "weight_decay": weight_decay,
        "momentum": momentum,
        "nesterov": nesterov,
        "ns_steps": ns_steps,
        "row_beta": row_beta,
    }
    if momentum_warmup_steps:
        muon_settings["momentum_warmup"] = (momentum, momentum_warmup_steps)
    groups = [
        {"params": matrices[n], "row_blocks": blocks[n], **muon_settings} for n in sorted(matrices)
    ]
    adamw_settings = {"algorithm": "adamw", "betas": betas, "eps": eps}
    decay = weight_decay if adamw_weight_decay is None else adamw_weight_decay
    for rate, own in rest.items():
        settings = {**adamw_settings, "lr": rate, "fused": _all_fused(own)}
        groups += [{**group, **settings} for group in parameter_groups(own, decay)]
    return MuonAdamW(groups)


def learning_rates(optimizer: torch.optim.Optimizer) -> list[float]:
    """Return the learning rate of every group."""
    return [float(group["lr"]) for group in optimizer.param_groups]


def set_learning_rates(
    optimizer: torch.optim.Optimizer, rates: Sequence[float], factor: float, step: int
) -> None:
    """Set the learning rates to those at the top times the schedule's factor, and the momentum.

    A momentum that has a warm-up becomes that of the optimizer step, counted from 0.
    """
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate * factor
        if "momentum_warmup" in group:
            last, n_steps = group["momentum_warmup"]
            group["momentum"] = last + (FIRST_MOMENTUM - last) * max(1 - step / n_steps, 0)


@dataclass(frozen=True, config=CHECKED)
class Constant:
    """Linear warm-up over at most half of the run, then 1.

    Like every schedule it maps an optimizer step, counted from 0, and the length of the run to a
    factor of the learning rate.
    """

    warmup_steps: Size = 0

    def __call__(self, step: int, max_steps: int) -> float:
        """Return the learning-rate factor in [0, 1]."""
        warmup_steps = min(self.warmup_steps, max_steps // 2)
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        return self._factor(step, max_steps, warmup_steps)

    def _factor(self, step: int, max_steps: int, warmup_steps: int) -> float:
        return 1.0


@dataclass(frozen=True, config=CHECKED)
class Cosine(Constant):
    """Linear warm-up, then a cosine from 1 down to `floor` at `max_steps` (GPT-3, appendix B)."""

    floor: Fraction = 0.0

    def _factor(self, step: int, max_steps: int, warmup_steps: int) -> float:
        progress = min((step - warmup_steps) / max(max_steps - warmup_steps, 1), 1.0)
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True, config=CHECKED)
class WarmupStableDecay(Constant):
    """Linear warm-up, 1, and a linear decay to `floor` at `max_steps` (arXiv:2405.18392).

    The decay takes `decay_fraction` of the run, or what the warm-up leaves of it.
    """

    decay_fraction: Fraction = 0.5
    floor: Fraction = 0.0

    def _factor(self, step: int, max_steps: int, warmup_steps: int) -> float:
        decay_steps = min(round(self.decay_fraction * max_steps), max_steps - warmup_steps)
        if step <= max_steps - decay_steps or not decay_steps:
            return 1.0
        return self.floor + (1 - self.floor) * max(max_steps - step, 0) / decay_steps


def factor_at(schedule: Schedule, step: int, max_steps: int) -> float:
    """Return the factor of a schedule, a finite number of at least 0.

    Raises ValueError, naming the schedule and the step, where it has none.
    """
    function = getattr(schedule, "func", schedule)  # of a functools.partial
    name = getattr(function, "__qualname__", type(function).__qualname__)
    try:
        factor = schedule(step, max_steps)
        if not isinstance(factor, Real) or not 0 <= factor < math.inf:
            raise ValueError(f"it returns {factor!r}, not a finite number from 0 up")
    except Exception as error:
        raise ValueError(
            f"schedule {name}(step={step}, max_steps={max_steps}) fails with "
            f"{type(error).__name__}: {error}"
        ) from error
    return float(factor)


def check_schedule(schedule: Schedule, max_steps: int) -> None:
    """Raise ValueError where a schedule fails at the first, middle or last steps of a run."""
    for step in sorted({0, min(1, max_steps - 1), max_steps // 2, max_steps - 1}):
        factor_at(schedule, step, max_steps)


def may_extend(schedule: Schedule, step: int, old_max: int, new_max: int) -> bool:
    """Return whether a run of `new_max` steps begins with the factors of one of `old_max` steps.

    The first `step` factors are compared: a run may grow until one of them depends on its length.
    """
    if step == 0 or new_max == old_max:
        return True
    return new_max > old_max and all(
        schedule(s, old_max) == schedule(s, new_max) for s in range(step)
    )


def parameter_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[Group]:
    """Split the trainable parameters: matrices decayed (embeddings too, as GPT-2), vectors not."""
    trainable = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": float(weight_decay)},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _all_fused(parameters: Iterable[nn.Parameter]) -> bool:
    """Return whether AdamW's fused kernel takes all parameters."""
    return all(p.device.type in FUSED_DEVICES and p.is_floating_point() for p in parameters)
