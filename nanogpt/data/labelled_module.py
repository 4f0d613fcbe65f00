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
from nanogpt.data.labelled import LabelledTexts
from nanogpt.data.module import CHECK_ARGUMENTS, Share, StepDataModule, TokenizerChoice
from nanogpt.data.order import RowOrder, row_seeds
from nanogpt.data.source import name_of
from nanogpt.data.splits import Example, class_weights
from nanogpt.data.windows import NOT_SCORED
from nanogpt.tokenizer import Tokenizer
from nanogpt.values import Flag, Fraction

VAL_BATCH_ROWS = 32  # whatever the training's micro-batch, so that it never changes a score

log = logging.getLogger("nanogpt")


class LabelledBatch(TypedDict, total=False):
    """One forward's worth of texts, padded to the longest of them."""

    input_ids: Tensor  # (B, T) int64
    lengths: Tensor  # (B,) int64
    labels: Tensor  # (B,) int64
    step_targets: float  # the examples' class weights in the whole optimizer step, over all ranks
    step_tokens: int  # tokens that follow another, in the whole optimizer step
    row_seeds: Tensor  # (B,) int64, in training: of (seed, step, row of the step) alone


@dataclass(frozen=True)
class Speller:
    """Spells tokens in single bytes, within rows of block_size ids."""

    spellings: list[np.ndarray]  # of each id; a special token is spelled by itself
    block_size: int

    @classmethod
    def of(cls, tokenizer: Tokenizer, block_size: int) -> "Speller":
        tokens = tokenizer.token_bytes()
        id_of_byte = {token[0]: i for i, token in enumerate(tokens) if len(token) == 1}
        spelled = ([id_of_byte[byte] for byte in token] for token in tokens)
        return cls([np.array(ids or [i]) for i, ids in enumerate(spelled)], block_size)

    def spell(self, ids: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        """Return the ids with the chosen ones spelled; the last stays where a row gets too long."""
        parts = [self.spellings[i] if c else [i] for i, c in zip(ids, chosen, strict=True)]
        return np.append(np.concatenate(parts[:-1])[: self.block_size - 1], ids[-1])


@dataclass(frozen=True)
class Noise:
    """How training texts are varied, in other ways at every step.

    `recase` is the share of texts written all in small or all in capital letters, `token_split` the
    share of tokens spelled in bytes, and `token_dropout` the share of what there then is left out.
    """

    recase: float = 0.0
    token_split: float = 0.0
    token_dropout: float = 0.0

    def writings(self, examples: Sequence[Example]) -> list[list[Example]]:
        """Return the examples as they are and, where some are recased, in both other ways."""
        if not self.recase:
            return [list(examples)]
        small, capital = (
            [Example(change(example.text), example.label) for example in examples]
            for change in (str.lower, str.upper)
        )
        return [list(examples), small, capital]

    def ids(
        self, writings: Sequence[np.ndarray], key: tuple[int, ...], speller: Speller
    ) -> np.ndarray:
        """Return the ids of one of a text's writings, some of them spelled and some left out.

        It is a pure function of the key.
        """
        if not (self.recase or self.token_split or self.token_dropout):
            return writings[0]
        random = np.random.default_rng(key)
        place = random.random()
        which = 0 if place >= self.recase else 1 + int(place < self.recase / 2)
        ids = writings[which]
        if self.token_split:
            ids = speller.spell(ids, random.random(len(ids)) < self.token_split)
        kept = random.random(len(ids)) >= self.token_dropout
        kept[0] = kept[-1] = True
        return ids[kept]


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
    `recase`, `token_split` and `token_dropout` are those of `Noise`. The noise on a training text
    is a pure function of the seed, the step and its place in it. With `class_weights`, all classes
    weigh the same.
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
        self.noise = Noise(recase, token_split, token_dropout)
        self.weighted = class_weights

    def use_tokenizer(self, choice: TokenizerChoice) -> Tokenizer:
        """Split and encode the texts."""
        self.splits = splits = self.source.splits()
        self.labels = labels = splits.labels
        self.class_weights = (
            class_weights(splits.train, labels) if self.weighted else [1.0] * len(labels)
        )
        tokenizer = choice.make(example.text for example in splits.train)
        self.train_texts, *self.recased = (
            EncodedTexts.of(examples, labels, tokenizer, self.block_size)
            for examples in self.noise.writings(splits.train)
        )
        self.val_texts = EncodedTexts.of(splits.val, labels, tokenizer, self.block_size)
        self.speller = Speller.of(tokenizer, self.block_size)
        self.fingerprint = splits.fingerprint
        self.order = RowOrder(len(splits.train), self.seed, splits.fingerprint)
        if n_cut := self.train_texts.n_cut + self.val_texts.n_cut:
            n = len(splits.train) + len(splits.val)
            log.info("%s of %s texts cut to block_size=%s tokens", n_cut, n, self.block_size)
        return tokenizer

    def facts(self) -> dict[str, Any]:
        return self.splits.facts()

    def text_sets(self) -> dict[str, tuple[list[str], list[int]]]:
        """Return the texts and class numbers to learn from and to test on, by name."""
        return self.splits.text_sets()

    def steps(self, share: Share) -> "Dataset[list[LabelledBatch]]":
        writings = [self.train_texts, *self.recased]
        return _LabelledSteps(
            list(zip(*(texts.rows for texts in writings), strict=True)),
            self.train_texts.labels,
            np.array(self.class_weights),
            self.order,
            share,
            self.noise,
            self.speller,
            self.seed,
        )

    def validation(self, max_tokens: int | None) -> DataLoader[LabelledBatch]:
        """Return this rank's share of the first max_tokens / block_size validation examples."""
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
        if not batches:
            batches = [_batch(texts.rows[:1], np.array([NOT_SCORED]), 0.0, 0)]
        return self._loader(batches)  # type: ignore[arg-type]  # a list is a data set


@dataclass(frozen=True)
class _LabelledSteps(Dataset[list[LabelledBatch]]):
    """Item `step`: the micro-batches of one rank in that optimizer step."""

    writings: list[tuple[np.ndarray, ...]]  # of each text
    labels: np.ndarray
    class_weights: np.ndarray
    order: RowOrder
    share: Share
    noise: Noise
    speller: Speller
    seed: int

    def __getitem__(self, step: int) -> list[LabelledBatch]:
        examples = self.order.rows_of_step(step, self.share.rows_per_step)
        seed = self.seed % 2**64
        rows = [
            self.noise.ids(self.writings[i], (seed, step, place), self.speller)
            for place, i in enumerate(examples)
        ]
        seeds = row_seeds(self.seed, step, len(rows))
        labels = self.labels[examples]
        step_targets = float(self.class_weights[labels].sum())
        step_tokens = sum(len(row) - 1 for row in rows)
        own = _by_length(self.share.own(np.arange(len(rows))), rows)
        return [
            {
                **_batch([rows[i] for i in part], labels[part], step_targets, step_tokens),
                "row_seeds": torch.from_numpy(seeds[part]),
            }
            for part in self.share.micro_batches(own)
        ]


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
