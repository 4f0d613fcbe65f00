"""The memory of an optimizer step, by running it on tensors that have shapes and no storage."""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanogpt.model import GPT, GPTConfig
from nanogpt.training.language_model import next_token_loss

DTYPES = {
    "32-true": torch.float32,
    "bf16-mixed": torch.bfloat16,
    "16-mixed": torch.float16,
}


class StepMemory(NamedTuple):
    """Bytes: `activations` are stored for the backward, `logits` what head and loss add to them.

    Gradients appear while activations go, so that the peak may be less than the sum.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    peak: int


@lru_cache(maxsize=16)
def step_memory(
    config: GPTConfig,
    rows: int,
    precision: str = "32-true",
    make_optimizer: Callable[[GPT], torch.optim.Optimizer] | None = None,
    accumulates: bool = False,
) -> StepMemory:
    """Return the bytes of a step whose last micro-batch has so many rows, uncompiled on a CPU.

    With `accumulates` there are micro-batches before it, and so all gradients. A block of another
    package that cannot run without values counts as nanogpt.model.Block does.
    """
    try:
        with torch.random.fork_rng(devices=[]), FakeTensorMode():
            return _measure(config, rows, DTYPES[precision], make_optimizer, accumulates)
    except Exception:  # whatever code of another package raises
        if config.block is None:
            raise
        own = replace(config, block=None)
        return step_memory(own, rows, precision, make_optimizer, accumulates)


def _measure(
    config: GPTConfig, rows: int, dtype: torch.dtype, make_optimizer: Any, accumulates: bool
) -> StepMemory:
    model = GPT(config).train()
    parameters = list(model.parameters())
    optimizer = (make_optimizer or _stateless)(model)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # which makes its state
    state = [t for t in tree_leaves([*optimizer.state.values()]) if isinstance(t, Tensor)]
    if not accumulates:
        optimizer.zero_grad(set_to_none=True)
    gradients = [p.grad for p in parameters if p.grad is not None]
    input_ids = torch.zeros(rows, config.block_size, dtype=torch.long)
    with _Allocated([*parameters, *gradients, *state, input_ids]) as allocated:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            stored: list[int] = []
            model.ln_f.register_forward_hook(lambda *_: stored.append(allocated.now))
            loss = next_token_loss(model, input_ids, input_ids)
        (loss / input_ids.numel()).backward()
        logits = allocated.peak - stored[0]
        optimizer.step()
    weights, held = _bytes(parameters), _bytes([*parameters, *gradients, *state])
    peak = held + allocated.peak
    return StepMemory(weights, weights, _bytes(state), stored[0], logits, peak)


def _stateless(model: GPT) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters())


class _Allocated(TorchDispatchMode):
    """Bytes of the storages that operations make, now and at most; those of `known` are free."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is not None and storage._cdata not in self._sizes:
                self._sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, storage._cdata)
        return result

    def _free(self, storage: int) -> None:
        self.now -= self._sizes.pop(storage)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
