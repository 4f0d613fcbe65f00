"""AdamW, Muon and AdamW as one optimizer, and learning-rate schedules as functions of the step."""

import functools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw as adamw_step

# A parameter group as torch.optim takes it: "params" and that group's settings.
Group = dict[str, Any]

# Newton-Schulz: https://kellerjordan.github.io/posts/muon/, as in torch.optim.Muon.
NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NS_EPS = 1e-7
# Matrices are orthogonalised in stacks of at most this many elements (bounds the memory).
STACK_ELEMENTS = 2**25
HIDDEN_WEIGHT = re.compile(r"(^|\.)h\.\d+\.")
QKV_WEIGHT = re.compile(r"(^|\.)attn\.c_attn\.weight$")


def adamw(
    model: nn.Module,
    *,
    learning_rate: float = 6e-4,
    weight_decay: float = 0.1,
    betas: Sequence[float] = (0.9, 0.95),
    eps: float = 1e-8,
    for_width: int | None = None,
) -> torch.optim.AdamW:
    """Build AdamW over the model's decay groups, fused where the device has it.

    With `for_width` the learning rate is meant for models of so many channels (n_embd); narrower
    ones take proportionally more of it ("Tensor Programs V", arXiv:2203.03466, table 3).
    """
    _check_amounts(learning_rate=learning_rate, weight_decay=weight_decay, eps=eps)
    if for_width is not None:
        _check_counts(for_width=for_width)
        config: Any = model.config
        learning_rate *= for_width / config.n_embd
    return torch.optim.AdamW(
        _with_base_lr(parameter_groups(model, weight_decay), learning_rate),
        lr=learning_rate,
        betas=_checked_betas(betas),
        eps=eps,
        fused=_all_fused(model.parameters()) or None,
    )


def muon(
    model: nn.Module,
    *,
    learning_rate: float = 1e-2,
    adamw_learning_rate: float = 3e-3,
    weight_decay: float = 0.1,
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_steps: int = 5,
    betas: Sequence[float] = (0.9, 0.95),
    eps: float = 1e-8,
    split_qkv: bool = False,
) -> "MuonAdamW":
    """Build Muon for the blocks' matrices and AdamW for all other parameters, as one optimizer.

    `learning_rate` is on AdamW's scale (arXiv:2502.16982, section 2.2: updates of RMS 0.2).
    `split_qkv` orthogonalises the query, key and value thirds of `c_attn` apart, as Muon's author
    does; without it the updates are those of `torch.optim.Muon`.
    """
    _check_amounts(
        learning_rate=learning_rate,
        adamw_learning_rate=adamw_learning_rate,
        weight_decay=weight_decay,
        eps=eps,
    )
    _check_fractions(momentum=momentum)
    _check_counts(ns_steps=ns_steps)
    matrices: dict[int, list[nn.Parameter]] = defaultdict(list)  # by number of row blocks
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not (HIDDEN_WEIGHT.search(name) and parameter.ndim == 2):
            rest.append(parameter)
        elif parameter.requires_grad:
            matrices[3 if split_qkv and QKV_WEIGHT.search(name) else 1].append(parameter)
    muon_settings = {
        "algorithm": "muon",
        "weight_decay": float(weight_decay),
        "momentum": momentum,
        "nesterov": nesterov,
        "ns_steps": ns_steps,
    }
    adamw_settings = {
        "algorithm": "adamw",
        "betas": _checked_betas(betas),
        "eps": eps,
        "fused": _all_fused(rest),
    }
    return MuonAdamW(
        _with_base_lr(
            [{"params": matrices[n], "row_blocks": n, **muon_settings} for n in sorted(matrices)],
            learning_rate,
        )
        + _with_base_lr(
            [{**group, **adamw_settings} for group in _decay_groups(rest, weight_decay)],
            adamw_learning_rate,
        )
    )


def parameter_groups(model: nn.Module, weight_decay: float) -> list[Group]:
    """Split the trainable parameters: matrices decayed (embeddings too, as GPT-2), vectors not."""
    return _decay_groups(model.parameters(), weight_decay)


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's learning rate to its `base_lr` times the schedule's factor."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


class MuonAdamW(torch.optim.Optimizer):
    """Update each group by its "algorithm": "muon" or "adamw".

    Muon is `torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"`, but matrices of one shape are
    orthogonalised together.
    """

    def __init__(self, groups: list[Group]) -> None:
        super().__init__(groups, defaults={})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters that have a gradient; return the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters and group["algorithm"] == "muon":
                self._muon(group, parameters)
            elif parameters:
                self._adamw(group, parameters)
        return loss

    def _muon(self, group: Group, parameters: list[Tensor]) -> None:
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
        for stack in _stacks(parameters):
            grads = _grads(stack)
            directions = [self.state[p]["momentum_buffer"] for p in stack]
            torch._foreach_lerp_(directions, grads, 1 - group["momentum"])
            if group["nesterov"]:
                directions = list(torch._foreach_lerp(grads, directions, group["momentum"]))
            blocks = torch.stack(directions).unflatten(1, (group["row_blocks"], -1))
            updates = orthogonalise(blocks.flatten(0, 1), group["ns_steps"])
            # RMS 0.2 whatever the shape: arXiv:2502.16982, equation 4.
            scale = 0.2 * math.sqrt(max(updates.shape[-2:]))
            torch._foreach_mul_(stack, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(
                stack,
                updates.unflatten(0, (len(stack), -1)).flatten(1, 2).unbind(),
                alpha=-group["lr"] * scale,
            )

    def _adamw(self, group: Group, parameters: list[Tensor]) -> None:
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                # Fused kernels keep the count on the device, the others read it on the host.
                device = parameter.device if group["fused"] else "cpu"
                state["step"] = torch.zeros((), dtype=torch.float32, device=device)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        states = [self.state[p] for p in parameters]
        adamw_step(
            parameters,
            _grads(parameters),
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=group["fused"] or None,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def orthogonalise(matrices: Tensor, ns_steps: int) -> Tensor:
    """Return (N, A, B) matrices with all singular values moved near 1, in bfloat16.

    A quintic Newton-Schulz iteration, the same as `torch.optim.Muon`'s for every matrix alone.
    """
    a, b, c = NS_COEFFICIENTS
    x = matrices.bfloat16()
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.mT
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=NS_EPS)
    for _ in range(ns_steps):
        gram = x @ x.mT  # (N, M, M), M the smaller side
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def warmup_cosine(step: int, *, warmup_steps: int, max_steps: int, floor: float) -> float:
    """Return the learning-rate factor of an optimizer step, counted from 0.

    Linear up to 1 over `warmup_steps`, then a cosine down to `floor` at `max_steps` (GPT-3,
    appendix B).
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min((step - warmup_steps) / max(max_steps - warmup_steps, 1), 1.0)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def warmup_stable_decay(
    step: int, *, warmup_steps: int, decay_steps: int, max_steps: int, floor: float
) -> float:
    """Return the learning-rate factor of an optimizer step, counted from 0.

    Linear up to 1 over `warmup_steps`, 1, and over the last `decay_steps` linear down to `floor` at
    `max_steps` (arXiv:2405.18392).
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if step <= max_steps - decay_steps:
        return 1.0
    return floor + (1 - floor) * max(max_steps - step, 0) / decay_steps


@dataclass(frozen=True)
class Schedule:
    """The learning-rate factor as a function of the step: the node `optim.schedule`.

    `kind` is cosine, wsd (warm-up, stable, decay) or constant (after its warm-up). The warm-up
    takes at most half of the run and the decay at most what is left, so a run may be of any length.
    """

    kind: str
    warmup_steps: int = 0
    decay_fraction: float = 0.5
    floor: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in ("cosine", "wsd", "constant"):
            raise ValueError(f"optim.schedule.kind is {self.kind!r}; write cosine, wsd or constant")
        _check_counts(**{"schedule.warmup_steps": self.warmup_steps})
        _check_fractions(
            **{"schedule.decay_fraction": self.decay_fraction, "schedule.floor": self.floor}
        )

    def factor(self, step: int, max_steps: int) -> float:
        """Return the factor in [0, 1] of an optimizer step, counted from 0."""
        warmup_steps, decay_steps = self.fit(max_steps)
        if self.kind == "cosine":
            return warmup_cosine(
                step, warmup_steps=warmup_steps, max_steps=max_steps, floor=self.floor
            )
        return warmup_stable_decay(
            step,
            warmup_steps=warmup_steps,
            decay_steps=decay_steps,
            max_steps=max_steps,
            floor=self.floor,
        )

    def fit(self, max_steps: int) -> tuple[int, int]:
        """Return the warm-up and decay steps that a run of `max_steps` has."""
        warmup_steps = min(self.warmup_steps, max_steps // 2)
        left = max_steps - warmup_steps
        wanted = {"cosine": left, "wsd": round(self.decay_fraction * max_steps), "constant": 0}
        return warmup_steps, min(wanted[self.kind], left)

    def may_extend(self, step: int, old_max: int, new_max: int) -> bool:
        """Tell whether `step` steps of a run of `old_max` are also those of a run of `new_max`."""
        if new_max == old_max or step == 0:
            return True
        warmup_steps, decay_steps = self.fit(old_max)
        return (
            self.kind != "cosine"
            and new_max > old_max
            and warmup_steps == self.fit(new_max)[0]
            and step <= old_max - decay_steps
        )


def _stacks(matrices: Iterable[Tensor]) -> Iterable[list[Tensor]]:
    """Yield the matrices in lists of one shape, dtype and device, of bounded size."""
    alike: dict[Any, list[Tensor]] = defaultdict(list)
    for matrix in matrices:
        alike[matrix.shape, matrix.dtype, matrix.device].append(matrix)
    for stack in alike.values():
        size = max(1, STACK_ELEMENTS // stack[0].numel())
        for start in range(0, len(stack), size):
            yield stack[start : start + size]


def _grads(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


def _decay_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[Group]:
    trainable = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": float(weight_decay)},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _with_base_lr(groups: list[Group], learning_rate: float) -> list[Group]:
    return [{**group, "lr": learning_rate, "base_lr": learning_rate} for group in groups]


def _all_fused(parameters: Iterable[nn.Parameter]) -> bool:
    kinds = {(p.device.type, p.dtype) for p in parameters}
    return bool(kinds) and all(_has_fused_adamw(*kind) for kind in kinds)


@functools.cache
def _has_fused_adamw(device_type: str, dtype: torch.dtype) -> bool:
    """Tell by trying on one number whether AdamW's fused kernel runs here."""
    number = nn.Parameter(torch.zeros(1, dtype=dtype, device=device_type))
    number.grad = torch.zeros_like(number)
    try:
        torch.optim.AdamW([number], fused=True).step()
    except (RuntimeError, NotImplementedError):
        return False
    return True


def _checked_betas(betas: Sequence[float]) -> tuple[float, float]:
    if not isinstance(betas, Sequence) or len(betas) != 2:
        raise ValueError(f"optim.betas is {betas!r}; write two numbers from 0 to below 1")
    if not all(_is_number(beta) and 0 <= beta < 1 for beta in betas):
        raise ValueError(f"optim.betas is {betas!r}; write two numbers from 0 to below 1")
    return float(betas[0]), float(betas[1])


def _check_amounts(**values: float) -> None:
    for key, value in values.items():
        if not (_is_number(value) and 0 <= value < math.inf):
            raise ValueError(f"optim.{key} is {value!r}; write a number of at least 0, as 1.0e-3")


def _check_fractions(**values: float) -> None:
    for key, value in values.items():
        if not (_is_number(value) and 0 <= value <= 1):
            raise ValueError(f"optim.{key} is {value!r}; write a number from 0 to 1")


def _check_counts(**values: int) -> None:
    for key, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"optim.{key} is {value!r}; write a whole number of at least 0")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
