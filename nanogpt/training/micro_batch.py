"""Micro-batches of fewer rows, where a forward and backward run out of memory."""

import logging
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor

from nanogpt.command import out_of_memory

log = logging.getLogger("nanogpt")


def in_rows(batch: dict[str, Any], n: int | None) -> list[dict[str, Any]]:
    """Return a micro-batch in parts of n rows, or as it is without n."""
    rows = len(batch["input_ids"])
    if n is None or n >= rows:
        return [batch]
    of_rows = {k: v for k, v in batch.items() if isinstance(v, Tensor) and v.shape[:1] == (rows,)}
    return [
        {**batch, **{key: value[start : start + n] for key, value in of_rows.items()}}
        for start in range(0, rows, n)
    ]


def fewer_rows(n: int, error: BaseException, trainer: Trainer) -> int:
    """Return the largest part of n rows, half of an even number, after an error of memory; log it.

    A divisor of n divides the rows of a step as n does. Raises the error where it is another, for a
    single row, and for several ranks, which have reduced some gradients by then.
    """
    shortage, step = out_of_memory(error), trainer.global_step + 1
    if not shortage or n == 1 or trainer.world_size > 1:
        raise error
    fewer = max(rows for rows in range(1, n // 2 + 1) if n % rows == 0)
    what = "%s at step %s, which is repeated with micro_batch=%s in place of %s"
    log.warning(what, shortage, step, fewer, n)
    return fewer
