"""The data module: which tokens a step sees depends on the step, never on how it is split."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.trainer.states import TrainerFn
from pydantic import ValidationError

from nanogpt.data.corpus import Corpus
from nanogpt.data.module import (
    VAL_BATCH_TOKENS,
    CorpusDataModule,
    TokenizerChoice,
    split_step,
)
from nanogpt.data.preparing import Preparation, prepare
from nanogpt.data.pretokenized import TokenShards
from nanogpt.data.python_stdlib import PythonStdlib
from nanogpt.data.text import TextFiles
from nanogpt.tokenizer import Tokenizer, bpe_tokenizer, byte_tokenizer

Batch = dict[str, Any]
BLOCK_SIZE = 8
SEED = 7


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """269 training tokens: 34 rows of 8, the last with 4 targets; 31 validation tokens."""
    directory = tmp_path_factory.mktemp("corpus")
    path = directory / "text.txt"
    path.write_text("".join(chr(32 + i * i % 90) for i in range(298)))
    return prepare(Preparation(TextFiles(path), byte_tokenizer, "byte", directory))


def _module(
    corpus: Corpus,
    *,
    micro_batch: int = 1,
    tokens_per_step: int = 12 * BLOCK_SIZE,
    workers: int = 0,
    seed: int = SEED,
    block_size: int = BLOCK_SIZE,
    val_tokens: int | None = None,
    final_val_tokens: int | None = None,
    fn: TrainerFn = TrainerFn.FITTING,
    **trainer: Any,
) -> CorpusDataModule:
    module = CorpusDataModule(
        source=TokenShards(corpus.directory),
        data_dir=corpus.directory.parent,
        block_size=block_size,
        tokens_per_step=tokens_per_step,
        seed=seed,
        workers=workers,
        val_tokens=val_tokens,
        final_val_tokens=final_val_tokens,
    )
    module.use_tokenizer(TokenizerChoice.from_tokenizer(corpus.tokenizer))
    module.micro_batch = micro_batch
    values = {"global_step": 0, "max_steps": 3, "global_rank": 0, "world_size": 1} | trainer
    module.trainer = SimpleNamespace(  # type: ignore[assignment]
        **values,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
        state=SimpleNamespace(fn=fn),
    )
    return module


def _rows(batches: list[Batch]) -> list[tuple[list[int], list[int]]]:
    return [
        (inputs.tolist(), targets.tolist())
        for batch in batches
        for inputs, targets in zip(batch["input_ids"], batch["targets"], strict=True)
    ]


def _seeds(batches: list[Batch]) -> list[int]:
    return [seed for batch in batches for seed in batch["row_seeds"].tolist()]


def _equal(one: list[Batch], other: list[Batch]) -> bool:
    return len(one) == len(other) and all(
        a["step_targets"] == b["step_targets"]
        and torch.equal(a["input_ids"], b["input_ids"])
        and torch.equal(a["targets"], b["targets"])
        for a, b in zip(one, other, strict=True)
    )


def test_a_step_is_a_list_of_micro_batches(corpus: Corpus) -> None:
    steps = list(_module(corpus, micro_batch=4).train_dataloader())
    assert len(steps) == 3
    assert all(len(step) == 3 for step in steps)
    for batch in steps[0]:
        assert batch["input_ids"].shape == batch["targets"].shape == (4, BLOCK_SIZE)
        assert batch["input_ids"].dtype == batch["targets"].dtype == torch.int64
        assert type(batch["step_targets"]) is int


def test_targets_are_the_next_tokens(corpus: Corpus) -> None:
    tokens = corpus.train.read(0, len(corpus.train)).tolist()
    starts = {tuple(tokens[i : i + 8]): tokens[i + 1 : i + 9] for i in range(0, 264, 8)}
    for inputs, targets in _rows(next(iter(_module(corpus).train_dataloader()))):
        if -100 not in targets:
            assert starts[tuple(inputs)] == targets


def test_one_pass_scores_every_token_once(corpus: Corpus) -> None:
    tokens_per_step = 17 * BLOCK_SIZE  # 2 steps are one pass of 34 rows
    steps = list(_module(corpus, tokens_per_step=tokens_per_step, max_steps=4).train_dataloader())
    expected = Counter(corpus.train.read(1, len(corpus.train)).tolist())
    passes = [[row for step in half for row in _rows(step)] for half in (steps[:2], steps[2:])]
    for rows in passes:
        assert Counter(t for _, targets in rows for t in targets if t != -100) == expected
    assert passes[0] != passes[1]


def test_step_targets_counts_what_is_scored(corpus: Corpus) -> None:
    counts = set()
    for step in _module(corpus, max_steps=6).train_dataloader():
        n_scored = sum(int((batch["targets"] != -100).sum()) for batch in step)
        assert {batch["step_targets"] for batch in step} == {n_scored}
        counts.add(n_scored)
    assert counts == {96, 92}  # with and without the partial row


@settings(deadline=None, max_examples=20)
@given(world_size=st.sampled_from([1, 2, 3, 4, 6, 12]), data=st.data())
def test_split_over_ranks_and_micro_batches_changes_no_row(
    corpus: Corpus, world_size: int, data: st.DataObject
) -> None:
    micro_batch = data.draw(
        st.sampled_from([n for n in (1, 2, 3, 4, 6, 12) if 12 // world_size % n == 0])
    )
    whole = list(_module(corpus, micro_batch=12).train_dataloader())
    ranks = [
        list(
            _module(
                corpus, micro_batch=micro_batch, global_rank=rank, world_size=world_size
            ).train_dataloader()
        )
        for rank in range(world_size)
    ]
    for step, expected in enumerate(whole):
        batches = [batch for rank in ranks for batch in rank[step]]
        assert _rows(batches) == _rows(expected)
        assert _seeds(batches) == _seeds(expected)
        assert {batch["step_targets"] for batch in batches} == {expected[0]["step_targets"]}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_loader_goes_on_at_the_trainers_step(corpus: Corpus, workers: int) -> None:
    whole = list(_module(corpus, max_steps=6, micro_batch=4).train_dataloader())
    loader = _module(
        corpus, max_steps=6, micro_batch=4, global_step=2, workers=workers
    ).train_dataloader()
    resumed = list(loader)
    assert len(loader) == 6
    assert len(resumed) == 4
    assert all(_equal(a, b) for a, b in zip(resumed, whole[2:], strict=True))
    assert [_seeds(step) for step in resumed] == [_seeds(step) for step in whole[2:]]


def test_workers_send_batches_without_shared_memory(corpus: Corpus) -> None:
    step = next(iter(_module(corpus, workers=1).train_dataloader()))
    assert not any(batch["input_ids"].is_shared() for batch in step)


def test_the_step_is_read_when_the_loader_begins(corpus: Corpus) -> None:
    module = _module(corpus, max_steps=6)
    loader = module.train_dataloader()
    module.trainer.global_step = 4  # type: ignore[union-attr,misc]
    assert len(list(loader)) == 2


def test_another_seed_is_another_order(corpus: Corpus) -> None:
    one = next(iter(_module(corpus).train_dataloader()))
    other = next(iter(_module(corpus, seed=SEED + 1).train_dataloader()))
    assert _rows(one) != _rows(other)


def test_loaders_leave_the_global_generator_alone(corpus: Corpus) -> None:
    before = torch.get_rng_state()
    module = _module(corpus)
    list(module.train_dataloader())
    list(module.val_dataloader())
    assert torch.equal(torch.get_rng_state(), before)


def test_validation_scores_every_token_but_the_first_in_order(corpus: Corpus) -> None:
    (batch,) = _module(corpus).val_dataloader()
    targets = [t for _, row in _rows([batch]) for t in row]
    assert targets[:30] == corpus.val.read(1, 31).tolist()
    assert set(targets[30:]) == {-100}
    assert batch["step_targets"] == 30


def test_validation_does_not_depend_on_the_training_split(corpus: Corpus) -> None:
    one = list(_module(corpus, micro_batch=1).val_dataloader())
    other = list(
        _module(corpus, micro_batch=5, tokens_per_step=5 * BLOCK_SIZE, seed=0).val_dataloader()
    )
    assert _equal(one, other)


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_ranks_share_the_validation_windows(corpus: Corpus, world_size: int) -> None:
    whole = _rows(list(_module(corpus).val_dataloader()))
    shares = [
        _rows(list(_module(corpus, global_rank=rank, world_size=world_size).val_dataloader()))
        for rank in range(world_size)
    ]
    assert sorted(
        row for share in shares for row in share if row[1] != [-100] * BLOCK_SIZE
    ) == sorted(whole)


def test_validation_batches_hold_so_many_tokens(corpus: Corpus) -> None:
    long = _module(corpus, block_size=1, tokens_per_step=1)
    long.use_rows(long.train_rows, long.train_rows, "f")
    assert len(corpus.train) < VAL_BATCH_TOKENS
    (batch,) = long.val_dataloader()
    assert batch["input_ids"].shape == (268, 1)


@pytest.mark.parametrize(
    ("max_tokens", "indices"), [(1, [0]), (16, [0, 2]), (24, [0, 1, 2]), (99, None)]
)
def test_a_part_of_validation_is_evenly_spaced(
    corpus: Corpus, max_tokens: int, indices: list[int] | None
) -> None:
    whole = _rows(list(_module(corpus).val_dataloader()))
    part = _rows(list(_module(corpus, val_tokens=max_tokens).val_dataloader()))
    assert part == (whole if indices is None else [whole[i] for i in indices])


@pytest.mark.parametrize(
    ("fn", "indices"),
    [
        (TrainerFn.FITTING, [0]),
        (TrainerFn.VALIDATING, [0, 2]),
        (TrainerFn.TESTING, [0, 2]),
    ],
)
def test_what_is_validated_depends_on_what_the_trainer_does(
    corpus: Corpus, fn: TrainerFn, indices: list[int]
) -> None:
    whole = _rows(list(_module(corpus).val_dataloader()))
    module = _module(corpus, val_tokens=8, final_val_tokens=16, fn=fn)
    assert _rows(list(module.val_dataloader())) == [whole[i] for i in indices]
    assert _rows(list(module.test_dataloader())) == [whole[i] for i in indices]


def test_a_rank_without_validation_rows_has_a_batch_that_scores_nothing(corpus: Corpus) -> None:
    loader = _module(corpus, val_tokens=8, global_rank=1, world_size=2).val_dataloader()
    assert len(loader) == 1
    (batch,) = loader
    assert batch["input_ids"].shape == (1, BLOCK_SIZE)
    assert set(batch["targets"].flatten().tolist()) == {-100}
    assert batch["step_targets"] == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "short text",
            r"training text has 10 tokens.*at least 65 .*block_size=64.*model.block_size",
        ),
        ("x" * 8, "training text has 8 tokens"),
    ],
)
def test_text_shorter_than_a_block_is_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "t.txt").write_text(text)
    corpus = prepare(Preparation(TextFiles(tmp_path / "t.txt"), byte_tokenizer, "byte", tmp_path))
    with pytest.raises(ValueError, match=words):
        _module(corpus, block_size=64, tokens_per_step=64)


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 8), st.integers(1, 8))
def test_steps_that_split_evenly_are_split(rows: int, world_size: int, micro_batch: int) -> None:
    tokens_per_step = BLOCK_SIZE * world_size * micro_batch * rows
    assert split_step(tokens_per_step, BLOCK_SIZE, world_size, micro_batch) == micro_batch * rows


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((1000, 64, 2, 1), "tokens_per_step=1000 .*block_size=64 over 2 .*=896 or 1024$"),
        ((100, 64, 2, 1), "no multiple of 128; pass tokens_per_step=128$"),
        ((0, 64, 1, 1), "pass tokens_per_step=64$"),
        ((640, 64, 1, 4), "micro_batch=4 does not divide the 10 rows .*pass one of 1, 2, 5, 10$"),
        ((640, 64, 1, 11), "pass one of 1, 2, 5, 10$"),
        ((640, 64, 1, 0), "pass one of 1, 2, 5, 10$"),
    ],
)
def test_steps_that_do_not_split_are_refused_with_the_nearest_that_do(
    arguments: tuple[int, int, int, int], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        split_step(*arguments)


def test_step_is_checked_when_the_trainer_is_known(corpus: Corpus) -> None:
    with pytest.raises(ValueError, match="cannot be split"):
        _module(corpus, world_size=5).train_dataloader()


def _make(documents: Iterable[str]) -> Tokenizer:
    return bpe_tokenizer(documents, 300)


def test_a_corpus_is_prepared_with_the_tokenizer_of_choice(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("win now " * 200)
    source = TextFiles(tmp_path / "text.txt")
    data = _options(source=source, data_dir=tmp_path / "data", shard_tokens=50)
    tokenizer = data.use_tokenizer(TokenizerChoice(_make, "bpe-300"))
    assert tokenizer.fingerprint == data.corpus.tokenizer.fingerprint
    again = prepare(Preparation(source, _make, "bpe-300", tmp_path / "data", shard_tokens=50))
    assert data.fingerprint == again.fingerprint
    assert data.facts() == {"gzip_bits_per_byte": again.manifest["gzip_bits_per_byte"]}


def test_a_prepared_corpus_stands_for_a_source_that_is_gone(tmp_path: Path, corpus: Corpus) -> None:
    data_dir = corpus.directory.parent
    gone = TextFiles(tmp_path / "gone.txt")
    data = _options(source=gone, data_dir=data_dir, prepared=corpus.fingerprint)
    data.use_tokenizer(TokenizerChoice(_make, "bpe-300"))
    assert data.fingerprint == corpus.fingerprint
    with pytest.raises(FileNotFoundError):
        _options(source=gone, data_dir=data_dir).use_tokenizer(TokenizerChoice(_make, "bpe-300"))


def test_token_shards_take_the_place_of_documents(tmp_path: Path, corpus: Corpus) -> None:
    data = _options(
        source=TextFiles(tmp_path / "gone.txt"),
        data_dir=tmp_path,
        pretokenized=str(corpus.directory),
    )
    data.use_tokenizer(TokenizerChoice.from_tokenizer(corpus.tokenizer))
    assert data.fingerprint == corpus.fingerprint


def test_a_learned_tokenizer_needs_documents(tmp_path: Path) -> None:
    np.save(tmp_path / "train.npy", np.arange(200, dtype=np.uint16))
    data = _options(source=TokenShards(tmp_path), data_dir=tmp_path)
    with pytest.raises(ValueError, match="no text to learn tokenizer bpe-300 from"):
        data.use_tokenizer(TokenizerChoice(_make, "bpe-300"))
    assert data.use_tokenizer(TokenizerChoice(byte_tokenizer, "byte")).name == "byte"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("workers", -1),
        ("workers", 1.5),
        ("workers", True),
        ("tokens", 0),
        ("shard_tokens", "5"),
        ("pretokenized", ""),
        ("val_tokens", 0),
        ("final_val_tokens", "all"),
        ("tokens_per_step", 0),
        ("seed", 2**63),
        ("source", "text"),
        ("prefetch", 2),
    ],
)
def test_wrong_arguments_are_refused_by_name(tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(ValidationError, match=key):
        _options(**{"source": PythonStdlib(), "data_dir": tmp_path, key: value})


def _options(**options: Any) -> CorpusDataModule:
    return CorpusDataModule(
        **{"block_size": BLOCK_SIZE, "tokens_per_step": BLOCK_SIZE, "seed": SEED, **options}
    )
