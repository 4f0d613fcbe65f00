"""The Lightning data module of classification: every rank's batches, and augmentation."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from nanogpt.classifier import encode_text, pad
from nanogpt.data.labelled import LabelledTexts
from nanogpt.data.module import DATA_MODULE, RowsDataModule, TokenizerChoice
from nanogpt.data.splits import class_weights
from nanogpt.data.windows import Rows
from nanogpt.tokenizer import Tokenizer
from nanogpt.values import BelowOne, Flag, Fraction

log = logging.getLogger("nanogpt")


@dataclass(frozen=True)
class Augmentation:
    """Random changes of training texts, other ones at every step.

    `recase` is the share of texts in all small or all capital letters, `token_split` the share of
    tokens spelled in bytes, and `token_dropout` the share of the resulting tokens that is left out.
    """

    recase: float = 0.0
    token_split: float = 0.0
    token_dropout: float = 0.0

    def variants(self, texts: Sequence[str]) -> list[list[str]]:
        """Return the texts as they are and, with `recase`, in small and in capital letters."""
        changes = (str, str.lower, str.upper) if self.recase else (str,)
        return [[change(text) for text in texts] for change in changes]

    def apply(
        self,
        variants: Sequence[np.ndarray],
        key: tuple[int, ...],
        spellings: Sequence[np.ndarray],
        block_size: int,
    ) -> np.ndarray:
        """Return the ids (M,) of one of a text's variants, (N,) each, spelled and dropped in part.

        It is a pure function of the key. `spellings` are those of `spell`; M is at most block_size,
        and the last id is never cut.
        """
        if not (self.recase or self.token_split or self.token_dropout):
            return variants[0]
        random = np.random.default_rng(key)
        draw = random.random()
        ids = variants[0 if draw >= self.recase else 1 + int(draw < self.recase / 2)]
        if self.token_split:
            chosen = random.random(len(ids)) < self.token_split
            parts = [spellings[i] if c else [i] for i, c in zip(ids, chosen, strict=True)]
            ids = np.append(np.concatenate(parts[:-1])[: block_size - 1], ids[-1])
        survives = random.random(len(ids)) >= self.token_dropout
        survives[0] = survives[-1] = True
        return ids[survives]


def spell(tokenizer: Tokenizer) -> list[np.ndarray]:
    """Return each token's bytes as ids (N,); a special token's own id."""
    tokens = tokenizer.token_bytes()
    id_of_byte = {token[0]: i for i, token in enumerate(tokens) if len(token) == 1}
    spelled = ([id_of_byte[byte] for byte in token] for token in tokens)
    return [np.array(ids or [i]) for i, ids in enumerate(spelled)]


@dataclass(frozen=True)
class EncodedTexts(Rows):
    """Texts as ids (N,), the number of each one's class, and its weight in the loss.

    `augment` returns a text's ids at a step, given those in `rows` and in `recased`, and a key.
    """

    scored_key = "labels"

    rows: list[np.ndarray]
    labels: np.ndarray
    weights: np.ndarray
    recased: Sequence[list[np.ndarray]] = ()
    augment: Callable[[list[np.ndarray], tuple[int, ...]], np.ndarray] = lambda ids, key: ids[0]

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, rows: np.ndarray) -> dict[str, Any]:
        """Return the ids of the texts (B, T) int64, padded, their lengths (B,) and labels (B,)."""
        input_ids, lengths = pad([self.rows[i].tolist() for i in rows])
        labels = torch.from_numpy(self.labels[rows])
        return {"input_ids": input_ids, "lengths": lengths, "labels": labels}

    def totals(self, rows: np.ndarray) -> dict[str, Any]:
        """Return the sum of the weights of the texts (N,), and their tokens after another."""
        step_tokens = sum(len(self.rows[i]) - 1 for i in rows)
        return {"step_targets": float(self.weights[rows].sum()), "step_tokens": step_tokens}

    def arrange(self, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Return positions (M,) of texts (N,) by length."""
        lengths = [len(self.rows[i]) for i in rows[positions]]
        return positions[np.argsort(lengths, kind="stable")]

    def at_step(self, rows: np.ndarray, seed: int, step: int) -> tuple["EncodedTexts", np.ndarray]:
        """Return the texts (N,) as they are at a step, and their numbers (N,) among those."""
        variants = (self.rows, *self.recased)
        augmented = [
            self.augment([texts[i] for texts in variants], (seed % 2**64, step, position))
            for position, i in enumerate(rows)
        ]
        texts = EncodedTexts(augmented, self.labels[rows], self.weights[rows])
        return texts, np.arange(len(rows))


@DATA_MODULE
class LabelledDataModule(RowsDataModule):
    """Batches of labelled texts for one rank of a trainer.

    A step holds tokens_per_step / block_size examples, each a row of its own however short: padding
    reaches to the longest of a micro-batch only, and a rank's examples are sorted by length first.
    `recase`, `token_split` and `token_dropout` are those of `Augmentation`, which is a pure
    function of the seed, the step and the text's position in it. With `class_weights`, the classes
    have equal weight.
    """

    val_batch_rows = 32
    source_kind = LabelledTexts
    source_error = (
        "has no labels for stage=classify; pass data=sms_spam, or data=labelled "
        "data.path=<a .tsv, .csv or .jsonl file>"
    )

    recase: Fraction = 0.0
    token_split: Fraction = 0.0
    token_dropout: BelowOne = 0.0
    class_weights: Flag = False

    def use_tokenizer(self, choice: TokenizerChoice) -> Tokenizer:
        """Split and encode the texts."""
        self.splits = splits = self.source.splits()
        self.labels = splits.labels
        self.weights = [1.0] * len(self.labels)  # of the classes
        if self.class_weights:
            self.weights = class_weights(splits.train, self.labels)
        self.text_sets = splits.text_sets
        texts, labels = splits.numbered(splits.train)
        tokenizer = choice.make(texts)
        augmentation = Augmentation(self.recase, self.token_split, self.token_dropout)
        variants = augmentation.variants(texts)
        (rows, n_train_cut), *recased = (self._encoded(tokenizer, some) for some in variants)
        self.train_texts = EncodedTexts(
            rows,
            np.array(labels),
            np.array(self.weights)[labels],
            [rows for rows, _ in recased],
            partial(augmentation.apply, spellings=spell(tokenizer), block_size=self.block_size),
        )
        texts, labels = splits.numbered(splits.val)
        rows, n_val_cut = self._encoded(tokenizer, texts)
        self.val_texts = EncodedTexts(rows, np.array(labels), np.ones(len(labels)))
        self.use_rows(self.train_texts, self.val_texts, splits.fingerprint)
        if n_cut := n_train_cut + n_val_cut:
            n = len(self.train_texts) + len(self.val_texts)
            log.info("%s of %s texts cut to block_size=%s tokens", n_cut, n, self.block_size)
        return tokenizer

    def facts(self) -> dict[str, Any]:
        return self.splits.facts()

    def _encoded(self, tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[list[np.ndarray], int]:
        """Return the ids of texts, (N,) each, and the number of texts that were cut."""
        encoded = [encode_text(tokenizer, text, self.block_size) for text in texts]
        return [np.array(ids) for ids, _ in encoded], sum(cut for _, cut in encoded)
