"""The slots of the KV cache, and the prefixes in them that can be reused.

Shapes: L layers, S slots, H heads, T time, D head size.
"""

import itertools
import math
import mmap
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from nanogpt.model import GPTConfig
from nanogpt.support import IN_MODEL, check_supported


@dataclass
class Slot:
    """The room for one sequence: the tokens whose keys and values it holds, and their scope."""

    index: int
    busy: bool = False
    scope: str = ""
    used: int = 0  # when it was last acquired or released; only the order matters
    ids: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))


class Slots:
    """The KV cache of a model (L, 2, S, H, T, D), allocated once, and the state of its slots."""

    def __init__(
        self, config: GPTConfig, n_slots: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (config.n_layer, 2, n_slots, config.kv_heads, config.block_size, config.head_dim)
        self.cache = _zeros(shape, dtype, device)
        self.slots = [Slot(i) for i in range(n_slots)]
        self._clock = itertools.count(1)

    @property
    def n_free(self) -> int:
        """The number of free slots."""
        return sum(not slot.busy for slot in self.slots)

    def acquire(self, prompt_ids: list[int], scope: str) -> tuple[Slot, int]:
        """Take a free slot for a prompt; return it and the number of prompt tokens that it holds.

        The longest common prefix with any slot of the same scope is reused: in place where the
        slot is free and holds nothing else, else as a copy in another one, so that a conversation
        does not lose its context to one that began alike.
        """
        prompt = np.asarray(prompt_ids[:-1], np.int64)  # the last token is computed for its logits
        lengths = {s.index: _common(s.ids, prompt) for s in self.slots if s.scope == scope}
        best = max(lengths, key=lambda i: (lengths[i], not self.slots[i].busy), default=0)
        n_cached = lengths.get(best, 0)
        source = self.slots[best]
        if n_cached and not source.busy and n_cached == len(source.ids):
            slot = source
        else:
            slot = self._least_valuable()
            if n_cached and source is not slot:
                prefix = self.cache[:, :, source.index, :, :n_cached]
                self.cache[:, :, slot.index, :, :n_cached] = prefix
        slot.busy, slot.used = True, next(self._clock)
        slot.scope, slot.ids = scope, prompt[:n_cached]
        return slot, n_cached

    def hold(self, slot: Slot, ids: list[int]) -> None:
        """Record the tokens whose keys and values are in a slot now."""
        slot.ids = np.asarray(ids, np.int64)

    def release(self, slot: Slot, *, clean: bool = True) -> None:
        """Free a slot; its content may be reused if it is `clean`."""
        slot.busy, slot.used = False, next(self._clock)
        if not clean:
            slot.ids = slot.ids[:0]
            self.cache[:, :, slot.index].zero_()  # not a number times nothing is not nothing

    def _least_valuable(self) -> Slot:
        """Return a free slot: an empty one, one with a superseded text, or the oldest.

        A text is superseded where a later one of its scope begins with 7/8 of it.
        """
        held = [slot.ids.tobytes() for slot in self.slots]

        def is_superseded(slot: Slot) -> bool:
            n_tokens = -(-7 * len(slot.ids) // 8)
            start = held[slot.index][: n_tokens * slot.ids.itemsize]
            return any(
                s.used > slot.used and s.scope == slot.scope and held[s.index].startswith(start)
                for s in self.slots
            )

        free = (slot for slot in self.slots if not slot.busy)
        return min(free, key=lambda slot: (len(slot.ids) > 0, not is_superseded(slot), slot.used))


def slot_bytes(config: GPTConfig, dtype: torch.dtype) -> int:
    """Return the memory of one slot's keys and values.

    Raises ValueError for a configuration whose keys and values have another shape.
    """
    check_supported(config, "the server's KV cache (serving/engine/slots.py)", IN_MODEL)
    n_values = config.n_layer * config.block_size * config.kv_heads * config.head_dim
    return 2 * n_values * dtype.itemsize


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros; on a CPU the system allocates their pages when they are written to.

    torch would write to all of them at once: gigabytes, of which a quiet server needs little. Pages
    are small: NumPy's large ones come to whole slots, and the first 32 tokens of one, of 124M
    parameters, took 20 to 220 ms with them and 20 with small ones; later steps are alike.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    n_bytes = math.prod(shape) * dtype.itemsize
    memory = mmap.mmap(-1, n_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):  # Linux
        with suppress(OSError):  # a kernel without large pages
            memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def _common(held: np.ndarray, prompt: np.ndarray) -> int:
    """Return the length of the longest common prefix of ids (T,) and others."""
    n = min(len(held), len(prompt))
    differs = held[:n] != prompt[:n]
    return int(differs.argmax()) if differs.any() else n
