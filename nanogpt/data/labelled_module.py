"""The Lightning data module of classification: every rank's batches of labelled texts."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from nanogpt.classifier import encode_text, pad
from nanogpt.data.module import Share, StepDataModule
from nanogpt.data.order import RowOrder
from nanogpt.data.splits import Example, Splits
from nanogpt.tokenizer import Tokenizer

VAL_BATCH_ROWS = 32  # whatever the training's micro-batch, so that it never changes a score

log = logging.getLogger("nanogpt")


class LabelledBatch(TypedDict):
    """One forward's worth of texts, padded to the longest of them."""

    input_ids: Tensor  # (B, T) int64
    lengths: Tensor  # (B,) int64
    labels: Tensor  # (B,) int64
    step_targets: float  # the examples' class weights in the whole optimizer step, over all ranks
    step_tokens: int  # tokens that follow another, in the whole optimizer step


@dataclass(frozen=True)
class EncodedTexts:
    """The ids and class numbers of examples; `n_cut` of them were longer than a row."""

    rows: list[np.ndarray]
    labels: np.ndarray
    n_cut: int

    @classmethod
    def of(
        cls,
        examples: Sequence[Example],
        labels: Sequence[str],
        tokenizer: Tokenizer,
        block_size: int,
    ) -> "EncodedTexts":
        number = {label: i for i, label in enumerate(labels)}
        encoded = [encode_text(tokenizer, example.text, block_size) for example in examples]
        return cls(
            rows=[np.array(ids) for ids, _ in encoded],
            labels=np.array([number[example.label] for example in examples]),
            n_cut=sum(cut for _, cut in encoded),
        )


class LabelledDataModule(StepDataModule):
    """Batches of labelled texts for one rank of a trainer.

    A step holds tokens_per_step / block_size examples, each a row of its own however short: padding
    reaches to the longest of a micro-batch only, and a rank's examples are sorted by length first.
    `token_dropout` is the share of a training text's tokens left out, others at every step: a pure
    function of the seed, the step and the example's place in it.
    """

    def __init__(
        self,
        splits: Splits,
        tokenizer: Tokenizer,
        *,
        class_weights: Sequence[float],
        token_dropout: float,
        block_size: int,
        tokens_per_step: int,
        micro_batch: int,
        seed: int,
        workers: int = 0,
    ) -> None:
        super().__init__(
            block_size=block_size,
            tokens_per_step=tokens_per_step,
            micro_batch=micro_batch,
            workers=workers,
        )
        if not 0 <= token_dropout < 1:
            raise ValueError(f"classify.token_dropout={token_dropout} is not in [0, 1)")
        labels = splits.labels
        self.train_texts = EncodedTexts.of(splits.train, labels, tokenizer, block_size)
        self.val_texts = EncodedTexts.of(splits.val, labels, tokenizer, block_size)
        self.class_weights = np.array(class_weights)
        self.token_dropout = token_dropout
        self.seed = seed
        self.order = RowOrder(len(splits.train), seed, splits.fingerprint)
        n_cut = self.train_texts.n_cut + self.val_texts.n_cut
        if n_cut:
            n = len(splits.train) + len(splits.val)
            log.info("%s of %s texts cut to block_size=%s tokens", n_cut, n, block_size)

    def steps(self, share: Share) -> "Dataset[list[LabelledBatch]]":
        return _LabelledSteps(
            self.train_texts, self.class_weights, self.order, share, self.token_dropout, self.seed
        )

    def val_dataloader(self, max_tokens: int | None = None) -> DataLoader[LabelledBatch]:
        """Return this rank's share of the validation examples, in order.

        `max_tokens` keeps about that many tokens: the first max_tokens / block_size examples.
        """
        trainer = self._attached_trainer()
        texts = self.val_texts
        n_kept = len(texts.rows)
        if max_tokens is not None:
            n_kept = min(max(max_tokens // self.block_size, 1), n_kept)
        own = np.arange(n_kept)[trainer.global_rank :: trainer.world_size]
        own = _by_length(own, texts.rows)
        parts = [own[i : i + VAL_BATCH_ROWS] for i in range(0, len(own), VAL_BATCH_ROWS)]
        batches = [
            _batch([texts.rows[i] for i in part], texts.labels[part], float(len(part)), 1)
            for part in parts
        ]
        return self._loader(batches)  # type: ignore[arg-type]  # a list is a data set


@dataclass(frozen=True)
class _LabelledSteps(Dataset[list[LabelledBatch]]):
    """Item `step`: the micro-batches of one rank in that optimizer step."""

    texts: EncodedTexts
    class_weights: np.ndarray
    order: RowOrder
    share: Share
    token_dropout: float
    seed: int

    def __getitem__(self, step: int) -> list[LabelledBatch]:
        examples = self.order.rows_of_step(step, self.share.rows_per_step)
        rows = [self._thinned(i, step, place) for place, i in enumerate(examples)]
        labels = self.texts.labels[examples]
        step_targets = float(self.class_weights[labels].sum())
        step_tokens = sum(len(row) - 1 for row in rows)
        own = _by_length(self.share.own(np.arange(len(rows))), rows)
        return [
            _batch([rows[i] for i in part], labels[part], step_targets, step_tokens)
            for part in self.share.micro_batches(own)
        ]

    def _thinned(self, example: int, step: int, place: int) -> np.ndarray:
        """Return an example's ids without some: its first and last stay."""
        ids = self.texts.rows[example]
        if not self.token_dropout:
            return ids
        key = (self.seed % 2**64, step, place)
        kept = np.random.default_rng(key).random(len(ids)) >= self.token_dropout
        kept[0] = kept[-1] = True
        return ids[kept]


def _batch(
    rows: Sequence[np.ndarray], labels: np.ndarray, step_targets: float, step_tokens: int
) -> LabelledBatch:
    input_ids, lengths = pad([row.tolist() for row in rows])
    return {
        "input_ids": input_ids,
        "lengths": lengths,
        "labels": torch.from_numpy(labels),
        "step_targets": step_targets,
        "step_tokens": step_tokens,
    }


def _by_length(own: np.ndarray, rows: Sequence[np.ndarray]) -> np.ndarray:
    """Return row numbers by the length of their rows."""
    return own[np.argsort([len(rows[i]) for i in own], kind="stable")]
