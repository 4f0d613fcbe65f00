"""Muon for matrices and AdamW for all other parameters, as one optimizer."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.optim.adamw import adamw as adamw_step

# Newton-Schulz: https://kellerjordan.github.io/posts/muon/, as in torch.optim.Muon.
NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
# Columns per row from which iterations on the Gram matrix take fewer operations, and how many of
# these its rounding errors, negative eigenvalues, allow.
MIN_ASPECT, MAX_GRAM_STEPS = 1.5, 6
NS_EPS = 1e-7
MIN_MOMENT = 1e-10  # of a row's squares, which are zero where its gradients are
# Matrices are orthogonalised in stacks of at most this many elements (bounds the memory).
STACK_ELEMENTS = 2**25


class MuonAdamW(torch.optim.Optimizer):
    """Update each group by its "algorithm": "muon" or "adamw".

    Muon is `torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"`, but matrices of one shape are
    orthogonalised together, and blocks of their rows apart: as many as `row_blocks`, or of these
    relative sizes. With a `row_beta` above 0 it is NorMuon. With `shared` each rank of the default
    process group, all of which have the same gradients, orthogonalises its part of the matrices.
    """

    shared = False

    def __init__(self, groups: list[dict[str, Any]]) -> None:
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

    def _muon(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
                if group.get("row_beta"):  # which groups of versions before it lack
                    state["row_moments"] = torch.zeros_like(parameter[:, :1])
        for stack in _stacks(parameters):
            grads = _grads(stack)
            directions = [self.state[p]["momentum_buffer"] for p in stack]
            torch._foreach_lerp_(directions, grads, 1 - group["momentum"])
            if group["nesterov"]:
                directions = list(torch._foreach_lerp(grads, directions, group["momentum"]))
            n = group["row_blocks"]
            sizes = n if isinstance(n, list) else [1] * n
            rows = [len(stack[0]) // sum(sizes) * size for size in sizes]
            torch._foreach_mul_(stack, 1 - group["lr"] * group["weight_decay"])
            for i, block in enumerate(torch.stack(directions).split(rows, 1)):
                own = [parameter.split(rows)[i] for parameter in stack]
                update = orthogonalise(block, group["ns_steps"], self.shared)
                # RMS 0.2 whatever the shape: arXiv:2502.16982, equation 4.
                scale = 0.2 * math.sqrt(max(update.shape[-2:]))
                if beta := group.get("row_beta"):
                    moments = [self.state[p]["row_moments"].split(rows)[i] for p in stack]
                    update, scale = normalise_rows(update, moments, beta), 0.2
                torch._foreach_add_(own, update.unbind(), alpha=-group["lr"] * scale)

    def _adamw(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
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


def orthogonalise(matrices: Tensor, ns_steps: int, shared: bool = False) -> Tensor:
    """Return (N, A, B) matrices with all singular values moved near 1.

    A quintic Newton-Schulz iteration, the same as `torch.optim.Muon`'s for every matrix alone, in
    bfloat16; on a CPU without autocast in float32, which is several times as fast there where the
    processor has no products in bfloat16. With `shared` all ranks call it with the same matrices,
    and each computes some of them.
    """
    a, b, c = NS_COEFFICIENTS
    is_exact = matrices.is_cpu and not torch.is_autocast_enabled("cpu")
    x = matrices if is_exact else matrices.bfloat16()
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.mT
    n_per_rank = -(-len(x) // dist.get_world_size()) if shared else len(x)
    if shared:
        x = x[n_per_rank * dist.get_rank() :][:n_per_rank]
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=NS_EPS)
    is_wide = x.size(-1) > MIN_ASPECT * x.size(-2)
    if is_wide and x.dtype == torch.float32 and ns_steps <= MAX_GRAM_STEPS:
        x = _gram_iterations(x, ns_steps)
    else:
        for _ in range(ns_steps):
            gram = x @ x.mT  # (N, M, M), M the smaller side
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    if shared:
        x = _gathered(x, len(matrices), n_per_rank)
    return x.mT if tall else x


def _gram_iterations(x: Tensor, ns_steps: int) -> Tensor:
    """Return x (N, M, B) after the iterations, which are done on x x^T (N, M, M).

    All iterates are q x with a polynomial q in x x^T; half of the operations where B = 4 M.
    """
    a, b, c = NS_COEFFICIENTS
    gram = x @ x.mT
    q = torch.eye(x.size(-2), dtype=x.dtype, device=x.device).expand_as(gram)
    for step in range(ns_steps):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # this and a times the identity
        q = torch.baddbmm(q, factor, q, beta=a)
        if step + 1 < ns_steps:
            half = torch.baddbmm(gram, factor, gram, beta=a)
            gram = torch.baddbmm(half, half, factor, beta=a)
    return q @ x


def _gathered(own: Tensor, n: int, n_per_rank: int) -> Tensor:
    """Return all n matrices, of which each rank has its own, the last ranks maybe fewer."""
    own = F.pad(own, (0, 0, 0, 0, 0, n_per_rank - len(own))).contiguous()
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, own)
    return torch.cat(parts)[:n]


def normalise_rows(updates: Tensor, moments: list[Tensor], beta: float) -> Tensor:
    """Return updates (N, A, B) with an RMS of 1 and rows of alike RMS over the steps.

    `moments` are N tensors (A, 1), running means of each row's squares, which are updated in place
    (NorMuon, arXiv:2510.05491).
    """
    updates = updates.float()
    torch._foreach_lerp_(moments, list(updates.square().mean(-1, keepdim=True)), 1 - beta)
    updates = updates * torch.stack(moments).clamp(min=MIN_MOMENT).rsqrt()
    return updates / updates.square().mean((-2, -1), keepdim=True).sqrt().clamp(min=NS_EPS)


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
