"""Labelled examples in splits: the classes in proportion, no text in two of them."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np

from nanogpt.data.order import permute

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?", re.ASCII)


@dataclass(frozen=True)
class Example:
    """A text and the name of its class."""

    text: str
    label: str


@dataclass(frozen=True)
class Splits:
    """The training, validation and test set; `rest` is left over by balancing."""

    train: list[Example]
    val: list[Example]
    test: list[Example]
    rest: list[Example]

    @property
    def labels(self) -> list[str]:
        """The names of the classes in their order: by value where all are numbers, else by text."""
        found = sorted({example.label for example in self.train})
        is_numeric = all(NUMBER.fullmatch(label) for label in found)
        return sorted(found, key=Decimal) if is_numeric else found

    def numbered(self, examples: Sequence[Example]) -> tuple[list[str], list[int]]:
        """Return texts, and the numbers of their classes."""
        number = {label: i for i, label in enumerate(self.labels)}
        return [e.text for e in examples], [number[e.label] for e in examples]

    def text_sets(self) -> dict[str, tuple[list[str], list[int]]]:
        """Return the numbered texts to train on and to test on, by name.

        "imbalanced" is the test set and what balancing left over, where it left any.
        """
        sets = {"train": self.train, "test": self.test}
        if self.rest:
            sets["imbalanced"] = self.test + self.rest
        return {name: self.numbered(examples) for name, examples in sets.items()}

    def hashes(self) -> dict[str, str]:
        """Return 16 hexadecimal digits per split: of the SHA-256 of its examples in any order."""
        splits = vars(self).items()
        return {name: examples_sha256(examples)[:16] for name, examples in splits if examples}

    def facts(self) -> dict[str, dict[str, Any]]:
        """Return the number of examples and the hash of every split, for the summary."""
        hashes = self.hashes()
        return {"splits": {name: len(vars(self)[name]) for name in hashes}, "split_hashes": hashes}

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change when any split or the numbers of the classes do."""
        labels = self.labels
        identity = repr(self.hashes()) + ("" if labels == sorted(labels) else repr(labels))
        return hashlib.sha256(identity.encode()).hexdigest()[:16]


def class_weights(examples: Iterable[Example], labels: Sequence[str]) -> list[float]:
    """Return weights that are equal in sum for all classes, and 1 on average over the examples."""
    counts = Counter(example.label for example in examples)
    return [counts.total() / (len(labels) * counts[label]) for label in labels]


def examples_sha256(examples: Iterable[Example]) -> str:
    """Return a hash over the examples, whatever their order."""
    lines = sorted(repr((example.label, example.text)) for example in examples)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def shuffled_texts(examples: Sequence[Example], seed: int) -> dict[str, list[list[Example]]]:
    """Return the texts of each class, shuffled by the seed, each as the list of its examples."""
    copies: dict[str, list[Example]] = {}
    for example in examples:
        copies.setdefault(" ".join(example.text.casefold().split()), []).append(example)
    texts = list(copies.values())
    by_label: dict[str, list[list[Example]]] = {}
    for i in permute(np.arange(len(texts)), len(texts), f"split/{seed}"):
        by_label.setdefault(texts[i][0].label, []).append(texts[i])
    return by_label


def fill(texts: list[list[Example]], quotas: list[int]) -> list[list[Example]]:
    """Return the examples in parts of at most these sizes: each text goes to the first with room.

    Texts for which no part has room go to the last.
    """
    parts: list[list[Example]] = [[] for _ in quotas]
    for text in texts:
        room = (i for i, n in enumerate(quotas) if len(parts[i]) + len(text) <= n)
        parts[next(room, -1)] += text
    return parts
