"""The memory of an optimizer step, by running it on tensors that have shapes and no storage."""

import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from nanogpt.model import GPT, GPTConfig
from nanogpt.training.compiled import block_runner
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
    recompute: bool = False,
) -> StepMemory:
    """Return the bytes of a step whose last micro-batch has so many rows, uncompiled on a CPU.

    With `accumulates` there are micro-batches before it, and so all gradients. With `recompute`
    only the inputs of blocks are stored. A block of another package that cannot run without values
    counts as nanogpt.model.Block does.
    """
    rest = (rows, precision, make_optimizer, accumulates, recompute)
    try:
        with torch.random.fork_rng(devices=[]), FakeTensorMode():
            return _measure(config, *rest)
    except Exception:  # whatever code of another package raises
        if config.block is None:
            raise
        return step_memory(replace(config, block=None), *rest)


def _measure(
    config: GPTConfig, rows: int, precision: str, make: Any, accumulates: bool, recompute: bool
) -> StepMemory:
    reached: list[int] = []
    with _Allocated() as memory:
        model = GPT(config).train()
        weights = memory.now
        parameters = list(model.parameters())
        optimizer = make(model) if make else torch.optim.SGD(parameters)
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # which makes its state
        of_state = memory.now - 2 * weights
        if not accumulates:
            optimizer.zero_grad(set_to_none=True)
        before = memory.peak = memory.now

        def note(_module: Any, _inputs: Any, states: Tensor) -> None:
            reached.append(memory.now - before)
            states.register_hook(lambda _: reached.append(memory.peak - before))

        model.ln_f.register_forward_hook(note)
        run_pass(model, rows, precision, recompute)
        optimizer.step()
    activations, with_loss = reached
    return StepMemory(weights, weights, of_state, activations, with_loss - activations, memory.peak)


def run_pass(
    model: GPT, rows: int, precision: str, recompute: bool = False, *, learns: bool = True
) -> None:
    """Run a forward and backward of random rows; gradients add up, as over a step's passes."""
    device = model.wte.weight.device
    shape = (rows, model.config.block_size)
    input_ids = torch.randint(model.config.vocab_size, shape, device=device)
    reduced = torch.autocast(device.type, DTYPES[precision], precision != "32-true")
    with reduced, torch.set_grad_enabled(learns):
        loss = next_token_loss(model, input_ids, input_ids, run=block_runner(False, recompute))
    if learns:
        (loss / input_ids.numel()).backward()


class _Allocated(TorchDispatchMode):
    """Bytes of the storages that operations make, now and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is not None and storage not in self._known:
                self._known.add(storage)
                self._count(storage.nbytes())
                weakref.finalize(storage, self._count, -storage.nbytes())
        return result

    def _count(self, n_bytes: int) -> None:
        self.now += n_bytes
        self.peak = max(self.peak, self.now)
