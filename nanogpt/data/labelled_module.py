"""The Lightning data module of classification: every rank's batches of labelled texts."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypedDict

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from nanogpt.classifier import encode_text, pad
from nanogpt.data.augmentation import Augmentation, Speller
from nanogpt.data.labelled import LabelledTexts
from nanogpt.data.module import CHECK_ARGUMENTS, Share, StepDataModule, TokenizerChoice, in_parts
from nanogpt.data.order import RowOrder, row_seeds
from nanogpt.data.source import name_of
from nanogpt.data.splits import class_weights
from nanogpt.data.windows import NOT_SCORED
from nanogpt.tokenizer import Tokenizer
from nanogpt.values import Flag, Fraction

VAL_BATCH_ROWS = 32  # independent of the micro-batch, so that it never changes a score

log = logging.getLogger("nanogpt")


class LabelledBatch(TypedDict, total=False):
    """The texts of one forward, padded to the longest of them; a label of -100 is not scored."""

    input_ids: Tensor  # (B, T) int64
    lengths: Tensor  # (B,) int64
    labels: Tensor  # (B,) int64
    step_targets: float  # the sum of class weights in the whole optimizer step, over all ranks
    step_tokens: int  # tokens that follow another, in the whole optimizer step
    row_seeds: Tensor  # (B,) int64, in training: of (seed, step, row of the step) alone


@dataclass(frozen=True)
class EncodedTexts:
    """The ids (N,) and labels of texts; `n_cut` of them were longer than a row."""

    rows: list[np.ndarray]
    labels: np.ndarray
    n_cut: int

    @classmethod
    def from_texts(
        cls, texts: Sequence[str], labels: Sequence[int], tokenizer: Tokenizer, block_size: int
    ) -> "EncodedTexts":
        """Encode texts, each cut to block_size."""
        encoded = [encode_text(tokenizer, text, block_size) for text in texts]
        rows = [np.array(ids) for ids, _ in encoded]
        return cls(rows, np.array(labels), sum(cut for _, cut in encoded))

    def sorted_by_length(self, rows: np.ndarray) -> np.ndarray:
        """Return row numbers (N,) by the length of their rows."""
        return rows[np.argsort([len(self.rows[i]) for i in rows], kind="stable")]

    def batch(self, rows: np.ndarray, step_targets: float, step_tokens: int) -> LabelledBatch:
        """Return the batch of row numbers (B,)."""
        input_ids, lengths = pad([self.rows[i].tolist() for i in rows])
        return {
            "input_ids": input_ids,
            "lengths": lengths,
            "labels": torch.from_numpy(self.labels[rows]),
            "step_targets": step_targets,
            "step_tokens": step_tokens,
        }


class LabelledDataModule(StepDataModule):
    """Batches of labelled texts for one rank of a trainer.

    A step holds tokens_per_step / block_size examples, each a row of its own however short: padding
    reaches to the longest of a micro-batch only, and a rank's examples are sorted by length first.
    `recase`, `token_split` and `token_dropout` are those of `Augmentation`, which is a pure
    function of the seed, the step and the text's position in it. With `class_weights`, the classes
    have equal weight.
    """

    @CHECK_ARGUMENTS
    def __init__(
        self,
        *,
        source: Any,
        recase: Fraction = 0.0,
        token_split: Fraction = 0.0,
        token_dropout: Annotated[float, Field(strict=True, ge=0, lt=1)] = 0.0,
        class_weights: Flag = False,
        **shared: Any,
    ) -> None:
        super().__init__(**shared)
        if not isinstance(source, LabelledTexts):
            raise ValueError(
                f"stage=classify learns from labelled texts and data={name_of(source)} has no "
                "labels; pass data=sms_spam, or data=labelled data.path=<a .tsv, .csv or .jsonl "
                "file>"
            )
        self.source = source
        self.augmentation = Augmentation(recase, token_split, token_dropout)
        self.weighted = class_weights

    def use_tokenizer(self, choice: TokenizerChoice) -> Tokenizer:
        """Split and encode the texts."""
        self.splits = splits = self.source.splits()
        self.labels = splits.labels
        self.class_weights = (
            class_weights(splits.train, splits.labels)
            if self.weighted
            else [1.0] * len(self.labels)
        )
        self.text_sets = splits.text_sets
        texts, labels = splits.numbered(splits.train)
        tokenizer = choice.make(texts)
        self.train_texts, *self.recased = (
            EncodedTexts.from_texts(variant, labels, tokenizer, self.block_size)
            for variant in self.augmentation.variants(texts)
        )
        val = splits.numbered(splits.val)
        self.val_texts = EncodedTexts.from_texts(*val, tokenizer, self.block_size)
        self.speller = Speller.from_tokenizer(tokenizer, self.block_size)
        self.fingerprint = splits.fingerprint
        self.order = RowOrder(len(texts), self.seed, splits.fingerprint)
        if n_cut := self.train_texts.n_cut + self.val_texts.n_cut:
            n = len(splits.train) + len(splits.val)
            log.info("%s of %s texts cut to block_size=%s tokens", n_cut, n, self.block_size)
        return tokenizer

    def facts(self) -> dict[str, Any]:
        return self.splits.facts()

    def steps(self, share: Share) -> "Dataset[list[LabelledBatch]]":
        variants = [texts.rows for texts in (self.train_texts, *self.recased)]
        return _LabelledSteps(
            list(zip(*variants, strict=True)),
            self.train_texts.labels,
            np.array(self.class_weights),
            self.order,
            share,
            self.augmentation,
            self.speller,
        )

    def validation(self, max_rows: int | None) -> DataLoader[LabelledBatch]:
        """Return this rank's share of evenly spaced validation examples."""
        trainer = self._attached_trainer()
        n_rows = len(self.val_texts.rows)
        n_scored = n_rows if max_rows is None else min(max_rows, n_rows)
        rows = np.arange(n_scored) * n_rows // n_scored
        own = self.val_texts.sorted_by_length(rows[trainer.global_rank :: trainer.world_size])
        return self._loader(_ScoredTexts(self.val_texts), in_parts(own, VAL_BATCH_ROWS))


@dataclass(frozen=True)
class _LabelledSteps(Dataset[list[LabelledBatch]]):
    """Item `step`: the micro-batches of one rank in that optimizer step."""

    variants: list[tuple[np.ndarray, ...]]  # of each text
    labels: np.ndarray
    class_weights: np.ndarray
    order: RowOrder
    share: Share
    augmentation: Augmentation
    speller: Speller

    def __getitem__(self, step: int) -> list[LabelledBatch]:
        examples = self.order.rows_of_step(step, self.share.rows_per_step)
        seed = self.order.seed % 2**64
        rows = [
            self.augmentation.apply(self.variants[i], (seed, step, position), self.speller)
            for position, i in enumerate(examples)
        ]
        texts = EncodedTexts(rows, self.labels[examples], 0)
        seeds = row_seeds(self.order.seed, step, len(rows))
        step_targets = float(self.class_weights[texts.labels].sum())
        step_tokens = sum(len(row) - 1 for row in rows)
        own = texts.sorted_by_length(self.share.positions)
        return [
            {
                **texts.batch(part, step_targets, step_tokens),
                "row_seeds": torch.from_numpy(seeds[part]),
            }
            for part in in_parts(own, self.share.micro_batch)
        ]


@dataclass(frozen=True)
class _ScoredTexts(Dataset[LabelledBatch]):
    """Item `rows`: their batch, which counts as a step of its own."""

    texts: EncodedTexts

    def __getitem__(self, rows: np.ndarray) -> LabelledBatch:
        if len(rows):
            return self.texts.batch(rows, float(len(rows)), 1)
        batch = self.texts.batch(np.array([0]), 0.0, 0)
        return {**batch, "labels": torch.tensor([NOT_SCORED])}
