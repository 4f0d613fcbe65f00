"""The memory of an optimizer step, by running it on tensors that have shapes and no storage."""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanogpt.model import GPT, GPTConfig
from nanogpt.training.language_model import next_token_loss

DTYPES = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


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
    rest = (rows, precision, make_optimizer, accumulates)
    try:
        with torch.random.fork_rng(devices=[]), FakeTensorMode():
            return _measure(config, *rest)
    except Exception:  # whatever code of another package raises
        if config.block is None:
            raise
        return step_memory(replace(config, block=None), *rest)


def _measure(
    config: GPTConfig, rows: int, precision: str, make_optimizer: Any, accumulates: bool
) -> StepMemory:
    model = GPT(config).train()
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters) if make_optimizer is None else make_optimizer(model)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # which makes its state
    state = [t for t in tree_leaves([*optimizer.state.values()]) if isinstance(t, Tensor)]
    if not accumulates:
        optimizer.zero_grad(set_to_none=True)
    held = [*parameters, *state, *(p.grad for p in parameters if p.grad is not None)]
    input_ids = torch.zeros(rows, config.block_size, dtype=torch.long)
    stored: list[int] = []
    with _Allocated([*held, input_ids]) as allocated:
        model.ln_f.register_forward_hook(lambda *_: stored.append(allocated.now))
        with torch.autocast("cpu", DTYPES[precision], enabled=precision != "32-true"):
            loss = next_token_loss(model, input_ids, input_ids)
        (loss / input_ids.numel()).backward()
        logits = allocated.peak - stored[0]
        optimizer.step()
    weights, of_state, n_held = (sum(t.nbytes for t in some) for some in (parameters, state, held))
    return StepMemory(weights, weights, of_state, stored[0], logits, n_held + allocated.peak)


class _Allocated(TorchDispatchMode):
    """Bytes of the storages that operations make, now and at most; those of `known` are free."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes = {StorageWeakRef(tensor.untyped_storage()): 0 for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is not None and (key := StorageWeakRef(storage)) not in self._sizes:
                self._sizes[key] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, key)
        return result

    def _free(self, storage: StorageWeakRef) -> None:
        self.now -= self._sizes.pop(storage)
