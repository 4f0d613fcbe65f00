"""HellaSwag: equal to scoring one ending at a time, whatever the batches; its rows."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from nanogpt.checkpoint import Checkpoint
from nanogpt.evaluation import hellaswag, scoring
from nanogpt.evaluation.examples import read_items
from nanogpt.evaluation.hellaswag import Item, completion_request
from nanogpt.evaluation.scoring import Request, Result, loglikelihoods
from nanogpt.model import GPT, GPTConfig
from nanogpt.tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()
ROW = {
    "activity_label": "Baking cookies",
    "ctx": "A female chef stands in a kitchen. she",
    "ctx_a": "A female chef stands in a kitchen.",
    "ctx_b": "she",
    "endings": ["bakes.", "opens the oven door.", "sings a song", "leaves"],
    "label": 1,
}


def new_model(block_size: int = 256, n_layer: int = 2, **switches: Any) -> GPT:
    torch.manual_seed(0)
    config = GPTConfig(block_size, TOKENIZER.vocab_size, n_layer, 2, 32, **switches)
    model = GPT(config).eval()
    with torch.no_grad():  # far from uniform
        if model.config.token_shift:
            torch.nn.init.normal_(model.shift)
        if model.config.embd_shortcut:
            torch.nn.init.normal_(model.shortcut)
        for parameter in model.parameters():
            parameter.mul_(4)
    return model


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


@torch.no_grad()
def reference(model: GPT, request: Request) -> list[float]:
    """Score one ending at a time, in a plain forward over context and ending."""
    found = []
    for ending in request.continuations:
        ids = torch.tensor([[*request.context, *ending]])
        losses = F.cross_entropy(model(ids[:, :-1])[0], ids[0, 1:], reduction="none")
        found.append(-float(losses[len(request.context) - 1 :].double().sum()))
    return found


def requests() -> list[Request]:
    endings = [["is red", "is", "was very late for it", "x"], ["a", "bb", "ccc", "dddd"]]
    return [
        Request(
            TOKENIZER.encode("the sky " * n), [TOKENIZER.encode(f" {e}") for e in endings[n % 2]]
        )
        for n in range(1, 12)
    ]


@pytest.mark.parametrize(
    "switches",
    [
        {"token_shift": True, "embd_shortcut": True},
        {"position": "rotary", "norm": "rmsnorm", "activation": "relu2", "qk_norm": True},
    ],
)
def test_shared_contexts_score_as_endings_do_alone(switches: dict[str, Any]) -> None:
    model = new_model(**switches)
    for request, results in zip(requests(), loglikelihoods(model, requests()), strict=True):
        found = [one.loglikelihood for one in results]
        assert found == pytest.approx(reference(model, request), abs=1e-4)


@pytest.mark.parametrize("token_shift", [False, True])
def test_endings_that_begin_alike_score_as_they_do_alone(token_shift: bool) -> None:
    model = new_model(token_shift=token_shift)
    request = Request([1, 2, 3], [[5, 6, 7, 9], [5, 6, 8, 9], [5], [5, 6, 7, 9], [6, 6, 7, 9]])
    [results] = loglikelihoods(model, [request])
    found = [one.loglikelihood for one in results]
    assert found == pytest.approx(reference(model, request), abs=1e-5)


def test_many_continuations_of_one_context_are_several_rows(monkeypatch: Any) -> None:
    monkeypatch.setattr(scoring, "TREE_TOKENS", 32)
    model, batches = new_model(), scoring._batches
    lengths: list[int] = []

    def noted(rows: Any, *sizes: int) -> Any:
        lengths.extend(row.n_tokens for row in rows)
        return batches(rows, *sizes)

    monkeypatch.setattr(scoring, "_batches", noted)
    request = Request([1, 2, 3], [[n, n + 1, n + 2] * 2 for n in range(20)])
    [results] = loglikelihoods(model, [request])
    found = [one.loglikelihood for one in results]
    assert found == pytest.approx(reference(model, request), abs=1e-5)
    assert lengths == [28] * 4  # the context, and five continuations without their ends


def test_a_model_without_finite_likelihoods_is_refused() -> None:
    model = new_model()
    with torch.no_grad():
        model.wte.weight[7] = torch.nan
    with pytest.raises(ValueError, match="the model gives no finite likelihoods"):
        loglikelihoods(model, [Request([1, 2], [[3], [4]])])


def test_any_batch_size_and_order_give_the_same_bits() -> None:
    model, batch = new_model(), requests()
    alone = [loglikelihoods(model, [request])[0] for request in batch]
    for batch_size in (1, 2, 3, 5, 8, 64):
        assert loglikelihoods(model, batch, batch_size) == alone
    assert loglikelihoods(model, batch[::-1]) == alone[::-1]


def test_greedy_is_the_most_likely_continuation() -> None:
    model = new_model()
    context = TOKENIZER.encode("abc")
    best = int(model(torch.tensor([context]))[0, -1].argmax())
    [[yes, no]] = loglikelihoods(model, [Request(context, [[best], [best ^ 1]])])
    assert (yes.is_greedy, no.is_greedy) == (True, False)


def test_of_a_long_context_the_end_is_read() -> None:
    model = new_model(block_size=16)
    context, ending = list(range(30)), [1, 2, 3]
    [[found]] = loglikelihoods(model, [Request(context, [ending])])
    cut = Request(context[-14:], [ending])  # the last token of an ending is not read
    assert found.loglikelihood == pytest.approx(reference(model, cut)[0], abs=1e-5)


def test_an_ending_longer_than_the_context_is_scored_in_pieces() -> None:
    model = new_model(block_size=8)
    ending = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    [[found]] = loglikelihoods(model, [Request([0], [ending])])
    pieces = [
        Request([0], [[1, 2, 3, 4]]),
        Request([0, 1, 2, 3, 4], [[5, 6, 7, 8]]),
        Request([2, 3, 4, 5, 6, 7, 8], [[9, 10]]),
    ]
    expected = sum(reference(model, piece)[0] for piece in pieces)
    assert found.loglikelihood == pytest.approx(expected, abs=1e-5)


def test_the_requests_are_those_of_build_nanogpt(tmp_path: Path) -> None:
    [item] = read_items(Item, write(tmp_path / "a.jsonl", ROW))
    request = completion_request(TOKENIZER, item)
    assert TOKENIZER.decode(request.context) == "A female chef stands in a kitchen. she"
    assert TOKENIZER.decode(request.continuations[1]) == " opens the oven door."


def test_labels_are_numbers_or_the_hubs_digits(tmp_path: Path) -> None:
    items = read_items(Item, write(tmp_path / "a.jsonl", ROW, {**ROW, "label": "2"}))
    assert [item.label for item in items] == [1, 2]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"ctx": ', "line 2 is not JSON"),
        ("[1]", "line 2 is no JSON object"),
        (json.dumps({**ROW, "label": 4}), r"line 2 is no Item \(label: .* less than 4"),
        (json.dumps({**ROW, "label": ""}), r"line 2 is no Item \(label: .* integer"),
        (json.dumps({**ROW, "endings": ["a"]}), r"line 2 is no Item \(endings: .* 4 items"),
        (json.dumps({**ROW, "endings": [" "] * 4}), r"line 2 is no Item \(endings.0: "),
        (json.dumps({**ROW, "ctx": None}), r"line 2 is no Item \(ctx: .* string"),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path / "a.jsonl", ROW)
    path.write_text(f"{path.read_text()}{line}\n")
    with pytest.raises(ValueError, match=message):
        read_items(Item, path)


def test_the_scores_are_the_shares_of_right_endings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sums prefer the short ending, the means over tokens the long one."""
    path = write(tmp_path / "a.jsonl", {**ROW, "endings": ["xx", "xxxxxxxx", "xx", "xx"]})
    likelihoods = [-4.0, -9.0, -5.0, -6.0]  # per token, the space before it counted: 4/3, 1, ...
    found = [Result(value, is_greedy=False) for value in likelihoods]
    monkeypatch.setattr(hellaswag, "loglikelihoods", lambda *_: [found])
    model = new_model()
    checkpoint = Checkpoint(model, TOKENIZER, None, None, "pretrain", model.config, 0, path)
    results = hellaswag.evaluate(checkpoint, path, None, 8, tmp_path)
    assert (results["acc"], results["acc_norm"], results["acc_stderr"]) == (0.0, 1.0, 0.0)


@pytest.mark.skipif("NANOGPT_TEST_DATA" not in os.environ, reason="NANOGPT_TEST_DATA is not set")
def test_all_endings_of_300_genuine_items_score_as_they_do_alone() -> None:
    path = Path(os.environ["NANOGPT_TEST_DATA"]) / "hellaswag" / "hellaswag_val_300.jsonl"
    items = read_items(Item, path)
    model = new_model(block_size=1024, n_layer=1)
    batch = [completion_request(TOKENIZER, item) for item in items]
    differences = [
        abs(one.loglikelihood - alone)
        for request, results in zip(batch, loglikelihoods(model, batch), strict=True)
        for one, alone in zip(results, reference(model, request), strict=True)
    ]
    assert len(differences) == 1200
    assert max(differences) <= 1e-4
