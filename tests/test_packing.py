"""Packing: every text once, few empty positions, and rows with the document of each token."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from nanogpt.data.packing import PackedRows, fullest, pack
from nanogpt.model import GPT, GPTConfig

# Two texts of 4 and 3 ids fill a row of 5 places; one of 5 ids has a row with one place empty.
TEXTS = [
    ([1, 2, 3, 4], [False, False, True, True]),
    ([5, 6, 7, 8, 9], [False, False, False, False, True]),
    ([10, 11, 12], [False, True, True]),
]


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(40, 60))
def test_every_text_is_in_one_row_and_no_row_is_too_long(lengths: list[int], size: int) -> None:
    rows = pack(lengths, size)
    assert sorted(text for row in rows for text in row) == list(range(len(lengths)))
    assert all(sum(lengths[text] for text in row) <= size for row in rows)


@given(st.dictionaries(st.integers(1, 9), st.integers(1, 2), max_size=4), st.integers(0, 30))
def test_no_choice_of_lengths_fills_more(counts: dict[int, int], room: int) -> None:
    sums = {0}
    for length, count in counts.items():
        for _ in range(count):
            sums |= {s + length for s in sums}
    chosen = fullest(counts, room)
    assert sum(chosen) == max(s for s in sums if s <= room)
    assert all(chosen.count(length) <= counts[length] for length in chosen)


def test_texts_that_fill_rows_leave_no_place_empty() -> None:
    rng = np.random.default_rng(0)
    lengths = [
        int(n) for _ in range(50) for n in np.diff([0, *sorted(rng.choice(99, 3)), 100]) if n
    ]
    assert len(pack(lengths, 100)) == 50


def test_rows_hold_inputs_targets_and_documents() -> None:
    rows = PackedRows.from_texts(TEXTS, block_size=5)
    batch = rows.batch(np.array([1, 0]))
    assert batch["input_ids"].tolist() == [[1, 2, 3, 10, 11], [5, 6, 7, 8, 0]]
    assert batch["targets"].tolist() == [[-100, 3, 4, 11, 12], [-100, -100, -100, 9, -100]]
    assert batch["documents"].tolist() == [[0, 0, 0, 1, 1], [0, 0, 0, 0, 1]]
    assert batch["document_starts"].tolist() == [[0, 3], [0, 4]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_targets_are_counted_by_row() -> None:
    rows = PackedRows.from_texts(TEXTS, block_size=5)
    assert [rows.totals(np.array([row]))["step_targets"] for row in (0, 1)] == [1, 4]
    assert rows.totals(np.array([1, 1, 0])) == {"step_targets": 9}


def test_padding_is_the_share_of_empty_places() -> None:
    assert PackedRows.from_texts(TEXTS, block_size=5).padding == pytest.approx(1 / 10)


@pytest.mark.parametrize("position", ["learned", "rotary"])
def test_the_packed_loss_is_the_unpacked_loss(position: str) -> None:
    torch.manual_seed(0)
    config = GPTConfig(32, 61, n_layer=2, n_head=2, n_embd=16, position=position)  # type: ignore[arg-type]
    model = GPT(config)
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 33, size=40)
    texts = [(rng.integers(61, size=n).tolist(), (rng.random(n) < 0.5).tolist()) for n in lengths]
    alone = torch.zeros(())
    for ids, scored in texts:
        logits = model(torch.tensor([ids[:-1]]))[0]
        losses = F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
        alone = alone + losses[torch.tensor(scored[1:])].sum()
    rows = PackedRows.from_texts(texts, block_size=32)
    batch = rows.batch(np.arange(len(rows)))
    targets = batch["targets"]
    logits = model(batch["input_ids"], documents=batch["documents"])
    packed = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    n_targets = rows.totals(np.arange(len(rows)))["step_targets"]
    assert n_targets == int((targets != -100).sum())
    assert abs((packed - alone).item()) / n_targets < 1e-5
