"""Augmentation of labelled texts: other cases, tokens spelled in bytes, token dropout."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nanogpt.tokenizer import Tokenizer


@dataclass(frozen=True)
class Speller:
    """Spells tokens in single bytes, within rows of block_size ids."""

    spellings: list[np.ndarray]  # of each id; that of a special token is itself
    block_size: int

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer, block_size: int) -> "Speller":
        """Return the speller of a tokenizer's tokens."""
        tokens = tokenizer.token_bytes()
        id_of_byte = {token[0]: i for i, token in enumerate(tokens) if len(token) == 1}
        spelled = ([id_of_byte[byte] for byte in token] for token in tokens)
        return cls([np.array(ids or [i]) for i, ids in enumerate(spelled)], block_size)

    def spell(self, ids: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        """Return the ids (N,) with the chosen ones (N,) bool spelled; the last one is never cut."""
        parts = [self.spellings[i] if c else [i] for i, c in zip(ids, chosen, strict=True)]
        return np.append(np.concatenate(parts[:-1])[: self.block_size - 1], ids[-1])


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
        self, variants: Sequence[np.ndarray], key: tuple[int, ...], speller: Speller
    ) -> np.ndarray:
        """Return the ids (M,) of one of a text's variants, (N,) each, spelled and dropped in part.

        It is a pure function of the key.
        """
        if not (self.recase or self.token_split or self.token_dropout):
            return variants[0]
        random = np.random.default_rng(key)
        draw = random.random()
        ids = variants[0 if draw >= self.recase else 1 + int(draw < self.recase / 2)]
        if self.token_split:
            ids = speller.spell(ids, random.random(len(ids)) < self.token_split)
        survives = random.random(len(ids)) >= self.token_dropout
        survives[0] = survives[-1] = True
        return ids[survives]
