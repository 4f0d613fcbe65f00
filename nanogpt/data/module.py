"""The Lightning data modules: the batches of every rank, step by step, of rows in a fixed order.

An item of the training loader is one optimizer step of a rank, the list of its micro-batches:

    StepBatches[step] -> RowOrder.rows_of_step -> Rows.at_step, totals, batch -> [
        {
            "input_ids": (B, T) int64,
            "targets": (B, T) int64, -100 where not scored,
            "documents": (B, T) int64, where rows are packed: the number of each token's text,
            "step_targets": targets of the whole step, over all ranks and micro-batches,
            "row_seeds": (B,) int64, a function of (seed, step, row of the step) alone,
        },
        ...,
    ]

Labelled texts have "lengths" and "labels" (B,) int64 in place of targets, and "step_tokens".
"""

import logging
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pydantic.dataclasses
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from pydantic import ConfigDict
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from nanogpt.data.corpus import Corpus, find_corpus
from nanogpt.data.order import RowOrder, row_seeds
from nanogpt.data.parts import Parts, TextParts, row_parts
from nanogpt.data.preparing import Preparation, prepare
from nanogpt.data.pretokenized import TokenShards, fetch_pretokenized
from nanogpt.data.shards import SHARD_TOKENS
from nanogpt.data.source import Source
from nanogpt.data.windows import NOT_SCORED, Rows, Windows
from nanogpt.ranks import Ranks
from nanogpt.tokenizer import Tokenizer
from nanogpt.values import Count, Seed, Size, Text

HEAD_START_S = 2.0  # of rank zero, which logs its progress, where a corpus is to be prepared
DATA_MODULE = pydantic.dataclasses.dataclass(
    config=ConfigDict(arbitrary_types_allowed=True, extra="forbid"), kw_only=True, eq=False
)
VAL_BATCH_TOKENS = 8192

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenizerChoice:
    """The tokenizer of a run, which `make` returns, given the training documents.

    `key` names its table among prepared data, such as `bpe-2048`.
    """

    make: Callable[[Iterable[str]], Tokenizer]
    key: str

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer) -> "TokenizerChoice":
        """Return the choice of an existing tokenizer."""
        return cls(lambda documents: tokenizer, tokenizer.fingerprint)

    def make_without_text(self) -> Tokenizer | None:
        """Return the tokenizer, None where it is trained on documents."""
        documents = iter([""])
        tokenizer = self.make(documents)
        was_read = next(documents, None) is None
        return None if was_read else tokenizer


@DATA_MODULE
class RowsDataModule(LightningDataModule, ABC):
    """Batches of rows for one rank of a trainer; a kind of data subclasses it.

    An item of `train_dataloader` is one optimizer step: the list of its micro-batches. The rows of
    a step depend on the seed, the data and the step alone. Validation scores about `val_tokens`
    tokens while fitting, and `final_val_tokens` in `trainer.validate` and `trainer.test`; None
    scores all. The fields are keyword arguments of every subclass.
    """

    source: Any
    block_size: Count
    tokens_per_step: Count
    seed: Seed
    workers: Size = 0
    val_tokens: Count | None = None
    final_val_tokens: Count | None = None

    source_kind: ClassVar[type] = object  # of the sources that fit
    source_error: ClassVar[str] = ""  # of others

    def __post_init__(self) -> None:
        super().__init__()
        if not isinstance(self.source, self.source_kind):
            name = getattr(self.source, "name", type(self.source).__name__)
            raise ValueError(f"data={name} {self.source_error}")
        self.fingerprint = ""  # of all that decides the rows; known after use_tokenizer
        self.micro_batch = 1  # rows of one forward; to be set before fitting
        self.special_tokens: tuple[str, ...] = ()  # that the tokenizer must have
        self.max_steps: int | None = None  # after which the data ends, None for an endless supply

    @abstractmethod
    def use_tokenizer(self, choice: TokenizerChoice) -> Tokenizer:
        """Prepare the data and return its tokenizer; called once, on every rank."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Return plain values for the run's summary."""

    @property
    def val_batch_rows(self) -> int:
        """The rows of a validation batch, which do not depend on the micro-batch."""
        return max(VAL_BATCH_TOKENS // self.block_size, 1)

    def use_rows(self, train: Rows, val: Rows, fingerprint: str) -> None:
        """Train on `train`, in an order of the seed and the fingerprint, and validate on `val`."""
        self.train_rows = train
        self.val_rows = val
        self.val_parts = row_parts(len(val))
        self.fingerprint = fingerprint
        self.order = RowOrder(len(train), self.seed, fingerprint)

    def train_dataloader(self) -> DataLoader:
        """Return the steps from the trainer's next to its last; the length is always max_steps."""
        trainer = self._attached_trainer()
        n_rows = split_step(
            self.tokens_per_step, self.block_size, trainer.world_size, self.micro_batch
        )
        positions = np.arange(n_rows) + trainer.global_rank * n_rows
        n_all = n_rows * trainer.world_size
        steps = StepBatches(self.train_rows, self.order, n_all, positions, self.micro_batch)
        return self._loader(steps, _RemainingSteps(trainer), self.workers)

    def val_dataloader(self) -> DataLoader:
        """Return this rank's share of evenly spaced validation rows.

        Every rank has at least one batch; in that of a rank without rows, nothing is scored.
        """
        trainer = self._attached_trainer()
        fitting = trainer.state.fn not in (TrainerFn.VALIDATING, TrainerFn.TESTING)
        tokens = self.val_tokens if fitting else self.final_val_tokens
        n_rows = len(self.val_rows)
        n_scored = n_rows if tokens is None else min(max(tokens // self.block_size, 1), n_rows)
        rows = (np.arange(n_scored) * n_rows // n_scored)[trainer.global_rank :: trainer.world_size]
        rows = rows[self.val_rows.arrange(rows, np.arange(len(rows)))]
        scored = _ScoredRows(self.val_rows, self.val_parts)
        return self._loader(scored, in_parts(rows, self.val_batch_rows))

    test_dataloader = val_dataloader  # there is no further split

    def transfer_batch_to_device(self, batch: Any, *args: Any) -> Any:
        """Move a batch to a device, but for `parts`, which the host reads."""
        parts = batch.pop("parts", None) if isinstance(batch, dict) else None
        batch = super().transfer_batch_to_device(batch, *args)
        return batch if parts is None else batch | {"parts": parts}

    def _loader(self, batches: Dataset, sampler: Iterable[Any], workers: int = 0) -> DataLoader:
        """Return a loader whose items are those of `batches` at the sampler's indices."""
        return DataLoader(
            batches,
            batch_size=None,
            sampler=sampler,
            num_workers=workers,
            pin_memory=self._attached_trainer().strategy.root_device.type == "cuda",
            persistent_workers=workers > 0,
            worker_init_fn=_initialise_worker,
            generator=torch.Generator(),  # else every loader would advance the global one
        )

    def _attached_trainer(self) -> Trainer:
        assert self.trainer is not None, "the data module is not attached to a trainer"
        return self.trainer


@DATA_MODULE
class CorpusDataModule(RowsDataModule):
    """A corpus of documents or token shards, cut into windows that do not overlap.

    All tokens but a split's first are targets. `prepared` is the fingerprint of the prepared corpus
    that replaces a missing source; `pretokenized` names token shards to use in place of the source:
    a folder, or a repository of the Hugging Face hub. `tokens` ends the preparation, None takes
    all.
    """

    source: Source | TokenShards
    data_dir: Path
    tokens: Count | None = None
    shard_tokens: Count = SHARD_TOKENS
    pretokenized: Text | None = None
    prepared: str | None = None

    def use_tokenizer(self, choice: TokenizerChoice) -> Tokenizer:
        """Prepare the corpus unless it is, and return its tokenizer.

        Raises ValueError where the text is shorter than one row.
        """
        self.corpus = corpus = find_corpus(self.data_dir, self.prepared) or self._prepare(choice)
        counts = (f"{len(tokens):,}" for tokens in (corpus.train, corpus.val))
        log.info("data %s: %s training and %s validation tokens", corpus.directory, *counts)
        needs = (("training", corpus.train, self.block_size + 1), ("validation", corpus.val, 2))
        for name, tokens, needed in needs:
            if len(tokens) < needed:
                raise ValueError(
                    f"the {name} text has {len(tokens)} tokens and needs at least {needed} "
                    f"(block_size={self.block_size}); pass more text or a smaller model.block_size"
                )
        train_rows, val_rows = (Windows(s, self.block_size) for s in (corpus.train, corpus.val))
        self.use_rows(train_rows, val_rows, corpus.fingerprint)
        self.val_parts = TextParts(corpus.val, self.block_size, corpus.tokenizer.token_bytes())
        return corpus.tokenizer

    def facts(self) -> dict[str, Any]:
        return {"gzip_bits_per_byte": self.corpus.manifest.get("gzip_bits_per_byte")}

    def preparation(self, choice: TokenizerChoice) -> Preparation:
        """Return how a source of documents becomes a corpus, and its directory."""
        source: Any = self.source
        sizes: Any = {"tokens": self.tokens, "shard_tokens": self.shard_tokens}
        return Preparation(source, choice.make, choice.key, self.data_dir, **sizes)

    def _prepare(self, choice: TokenizerChoice) -> Corpus:
        source = self.source
        if self.pretokenized is not None:
            folder = fetch_pretokenized(self.pretokenized, self.data_dir)
            source = TokenShards(folder, source.val_fraction)
        if isinstance(source, TokenShards):
            return source.open(choice.make_without_text(), choice.key)
        preparation = self.preparation(choice)
        if Ranks.from_environment().rank > 0 and not preparation.directory.exists():
            time.sleep(HEAD_START_S)
        return prepare(preparation)


def split_step(tokens_per_step: int, block_size: int, world_size: int, micro_batch: int = 1) -> int:
    """Return the number of rows of each rank in a step.

    Raises ValueError where the step does not split evenly, naming the nearest values that do.
    """
    unit = block_size * world_size
    if tokens_per_step < unit or tokens_per_step % unit:
        below = tokens_per_step // unit * unit
        nearest = f"{below} or {below + unit}" if below else str(unit)
        raise ValueError(
            f"tokens_per_step={tokens_per_step} cannot be split into rows of "
            f"block_size={block_size} over {world_size} rank(s), as it is no multiple of {unit}; "
            f"pass tokens_per_step={nearest}"
        )
    rows = tokens_per_step // unit
    if micro_batch < 1 or rows % micro_batch:
        divisors = ", ".join(str(n) for n in range(1, rows + 1) if rows % n == 0)
        raise ValueError(
            f"micro_batch={micro_batch} does not divide the {rows} rows that each of {world_size} "
            f"rank(s) has in a step (tokens_per_step={tokens_per_step}, block_size={block_size}); "
            f"pass one of {divisors}"
        )
    return rows


def in_parts(rows: np.ndarray, size: int) -> list[np.ndarray]:
    """Return rows (N,) in parts of at most `size`: one that is empty where there are no rows."""
    return np.split(rows, range(size, len(rows), size))


@dataclass(frozen=True)
class StepBatches(Dataset[list[dict[str, Any]]]):
    """Item `step`: the micro-batches of one rank in that optimizer step."""

    source: Rows
    order: RowOrder
    rows_per_step: int  # over all ranks
    positions: np.ndarray  # (N,) int64: of the rank's rows in the step
    micro_batch: int

    def __getitem__(self, step: int) -> list[dict[str, Any]]:
        seeds = torch.from_numpy(row_seeds(self.order.seed, step, self.rows_per_step))
        rows = self.order.rows_of_step(step, self.rows_per_step)
        source, rows = self.source.at_step(rows, self.order.seed, step)
        totals = source.totals(rows)
        return [
            source.batch(rows[part]) | totals | {"row_seeds": seeds[part]}
            for part in in_parts(source.arrange(rows, self.positions), self.micro_batch)
        ]


@dataclass(frozen=True)
class _ScoredRows(Dataset[dict[str, Any]]):
    """Item `rows`: their batch, which counts as a step of its own."""

    source: Rows
    parts: Parts

    def __getitem__(self, rows: np.ndarray) -> dict[str, Any]:
        shown = rows if len(rows) else np.array([0])
        batch = self.source.batch(shown)
        if not len(rows):
            batch[self.source.scored_key].fill_(NOT_SCORED)
        parts = torch.from_numpy(self.parts(shown, batch))
        return batch | self.source.totals(rows) | {"parts": parts}


class _RemainingSteps(Sampler[int]):
    """The trainer's next step to its last, which may come nearer meanwhile."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def __iter__(self) -> Iterator[int]:
        for step in range(self._trainer.global_step, len(self)):
            if step < len(self):
                yield step

    def __len__(self) -> int:
        return self._trainer.max_steps


def _initialise_worker(worker: int) -> None:
    """Ignore signals to all processes, as the current step needs data; send tensors by value.

    Where /dev/shm is small, a tensor in shared memory is lost and the trainer waits for ever.
    """
    ForkingPickler.register(Tensor, lambda tensor: (torch.from_numpy, (tensor.numpy(),)))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
