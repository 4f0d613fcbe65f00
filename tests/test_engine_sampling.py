"""Choosing tokens: the numbers, the narrowing, the penalties."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from nanogpt.generation import probabilities
from serving.engine import sampling
from serving.engine.messages import Generate, SamplingParams, Tokens
from serving.engine.sampling import choose, uniform
from serving.engine.scheduler import SequenceState


def sequence(answer: tuple[int, ...] = (), **params: Any) -> SequenceState:
    request = Generate("", "", [], SamplingParams(**{"max_tokens": 1, **params}))
    state = SequenceState(request, None, [])
    state.ids += answer
    return state


def token(logits: Tensor, **params: Any) -> int:
    (chosen,) = choose(logits[None], [sequence(**params)])
    return chosen.ids[0]


def test_the_numbers_are_even() -> None:
    numbers = torch.tensor([uniform(seed, p) for seed in (0, 1, 2**64 - 1) for p in range(3000)])
    assert 0 <= numbers.min() < numbers.max() < 1
    shares = torch.histc(numbers.float(), 10, 0, 1) / len(numbers)
    assert (shares - 0.1).abs().max() < 0.012  # four deviations


@pytest.mark.parametrize(
    "narrowing",
    [{}, {"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.3}, {"top_k": 4, "top_p": 0.7, "min_p": 0.2}],
    ids=str,
)
def test_tokens_are_drawn_as_often_as_generate_would(narrowing: dict[str, Any]) -> None:
    logits = torch.tensor([1.0, 0.2, -0.5, 0.9, -2.0, 0.0, 0.95])
    expected = probabilities(logits, temperature=0.8, **narrowing)
    n = 6000
    sequences = [sequence(temperature=0.8, seed=i, **narrowing) for i in range(n)]
    chosen = choose(logits.expand(n, -1).contiguous(), sequences)
    tokens = torch.tensor([c.ids[0] for c in chosen])
    drawn = torch.bincount(tokens, minlength=7)
    assert ((drawn > 0) == (expected > 0)).all()
    assert (drawn / n - expected).abs().max() < 4 * math.sqrt(0.25 / n)


@pytest.mark.parametrize("top_p", [0.5, 0.999])
def test_a_flat_distribution_is_not_cut_short(top_p: float) -> None:
    logits = torch.zeros(9000)
    chosen = choose(logits.expand(400, -1), [sequence(seed=i, top_p=top_p) for i in range(400)])
    tokens = {c.ids[0] for c in chosen}
    assert len(tokens) > 300  # some of 4500 or more, not of the first few


def test_top_p_of_one_is_no_narrowing() -> None:
    logits = torch.randn(300, generator=torch.Generator().manual_seed(0))
    some = [token(logits, seed=seed, top_p=1.0, min_p=0.0) for seed in range(20)]
    assert some == [token(logits, seed=seed) for seed in range(20)]


@pytest.mark.parametrize("deviation", [0.7, 4.0])
def test_a_large_vocabulary_gives_the_tokens_of_a_full_sort(
    deviation: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    filters: list[dict[str, Any]] = [
        *({}, {"temperature": 0.0}, {"top_k": 50}, {"top_k": 10**6}, {"top_p": 0.9}),
        *({"min_p": 0.02}, {"top_k": 300, "top_p": 0.95, "logprobs": 5}),
    ]
    sequences = [sequence(seed=i, **params) for i, params in enumerate(filters)]
    generator = torch.Generator().manual_seed(0)
    logits = deviation * torch.randn(len(filters), 151936, generator=generator)
    chosen = choose(logits, sequences)
    monkeypatch.setattr(sampling, "MAX_LOGITS", logits.numel())
    monkeypatch.setattr(sampling, "CANDIDATES", ())
    assert choose(logits, sequences) == chosen


def test_temperature_zero_takes_the_likeliest() -> None:
    assert token(torch.tensor([0.0, 3.0, 2.0]), temperature=0.0, top_p=0.1) == 1


@pytest.mark.parametrize("temperature", [1e-46, 1e-40, 1e-6, 1e-5])
def test_a_temperature_near_zero_takes_the_likeliest(temperature: float) -> None:
    logits = torch.tensor([0.0, 3.0, 2.0])
    assert token(logits, temperature=temperature) == 1
    assert token(logits, temperature=temperature, top_k=2) == 1


@pytest.mark.parametrize(
    "narrowing", [{"top_p": 0.0}, {"top_p": 5e-324}, {"min_p": 1.0}, {"top_k": 1}], ids=str
)
def test_the_narrowest_leaves_the_likeliest(narrowing: dict[str, Any]) -> None:
    logits = torch.tensor([0.0, 0.3, 0.2])
    assert {token(logits, seed=seed, **narrowing) for seed in range(20)} == {1}


def test_a_top_k_beyond_the_vocabulary_is_all_of_it() -> None:
    logits = torch.randn(300, generator=torch.Generator().manual_seed(0))
    some = [token(logits, seed=seed, top_k=10**400) for seed in range(20)]
    assert some == [token(logits, seed=seed, top_k=300) for seed in range(20)]


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, 0),
        ({"presence_penalty": 0.5}, 1),  # 2.0 - 0.5 < 1.8
        ({"frequency_penalty": 0.05}, 0),  # 2.0 - 3 * 0.05 > 1.8
        ({"frequency_penalty": 0.1}, 1),  # 2.0 - 3 * 0.1 < 1.8
        ({"repetition_penalty": 1.2}, 1),  # 2.0 / 1.2 < 1.8
        ({"logit_bias": {2: 100.0}}, 2),
        ({"logit_bias": {0: -100.0, 1: -100.0}}, 3),
    ],
    ids=str,
)
def test_penalties_and_bias_change_logits_as_defined(params: dict[str, Any], expected: int) -> None:
    logits = torch.tensor([2.0, 1.8, -1.0, -0.5])
    assert token(logits, temperature=0.0, answer=(0, 0, 0), **params) == expected


def test_a_repeated_unlikely_token_becomes_less_likely() -> None:
    logits = torch.tensor([-1.0, -1.1])
    assert token(logits, temperature=0.0, answer=(0,), repetition_penalty=1.2) == 1


def test_logprobs_are_the_models_before_bias_and_temperature() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    (chosen,) = choose(logits, [sequence(temperature=0.0, logprobs=2, logit_bias={2: 9.0})])
    expected = logits.log_softmax(-1)[0].tolist()
    assert chosen == Tokens("", [2], [(expected[2], [0, 1], expected[:2])])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_that_is_not_finite_is_refused(value: float) -> None:
    logits = torch.tensor([[0.0, 1.0], [0.0, value], [1.0, 0.0]])
    with pytest.raises(ValueError, match="not finite"):
        choose(logits, [sequence(temperature=t) for t in (0.0, 1.0, 0.0)])


def test_a_penalty_that_leaves_no_finite_number_is_refused() -> None:
    logits = torch.tensor([[2.0, 1.0]])
    with pytest.raises(ValueError, match="not finite"):
        choose(logits, [sequence(answer=(0,), repetition_penalty=1e-45)])


def test_six_ways_to_sample_include_all_others_to_the_bit() -> None:
    torch.manual_seed(0)
    logits, found = torch.randn(6, 500) * 4, set()
    kinds: list[dict[str, Any]] = [
        *({"temperature": 0.0}, {}, {"top_k": 9}, {"top_p": 0.8}),
        *({"logprobs": 2, "temperature": 0.0}, {"logprobs": 0, "top_k": 40, "min_p": 0.1}),
    ]
    for chosen in itertools.chain.from_iterable(
        itertools.combinations(kinds, n) for n in (1, 2, 4)
    ):
        sequences = [sequence(seed=i, **params) for i, params in enumerate(chosen)]
        rows = logits[: len(chosen)]
        numbers, how = sampling.numbers_of(sequences, len(rows), rows.size(-1))
        expected, actual = (sampling.draw(rows, rows, numbers, h) for h in (how, how.general()))
        assert actual.equal(expected)
        found.add(how.general())
    assert len(found) == 6
