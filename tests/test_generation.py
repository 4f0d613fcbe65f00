"""Sampling against hand-computed values; the iterator's promises."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from nanogpt.generation import KVCache, generate, probabilities
from nanogpt.model import GPT, GPTConfig

CONFIG = GPTConfig(block_size=8, vocab_size=31, n_layer=2, n_head=2, n_embd=16)
# Probabilities 0.5, 0.25, 0.15, 0.1 in an order that is not theirs.
LOGITS = torch.tensor([0.15, 0.5, 0.1, 0.25]).log()


@pytest.fixture
def model() -> GPT:
    torch.manual_seed(0)
    model = GPT(CONFIG).eval()
    model.wte.weight.data.mul_(20)  # far from uniform
    return model


def greedy_without_cache(model: GPT, context: list[int]) -> int:
    return int(model(torch.tensor([context]))[0, -1].argmax())


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ({}, [0.15, 0.5, 0.1, 0.25]),
        ({"top_k": 2}, [0, 2 / 3, 0, 1 / 3]),
        ({"top_k": 9}, [0.15, 0.5, 0.1, 0.25]),
        ({"top_p": 0.8}, [0.15 / 0.9, 0.5 / 0.9, 0, 0.25 / 0.9]),
        ({"top_p": 0.45}, [0, 1, 0, 0]),
        ({"top_p": 0.0}, [0, 1, 0, 0]),
        ({"top_p": 1.0}, [0.15, 0.5, 0.1, 0.25]),
        ({"min_p": 0.4}, [0, 2 / 3, 0, 1 / 3]),
        ({"min_p": 0.0}, [0.15, 0.5, 0.1, 0.25]),
        ({"min_p": 1.0}, [0, 1, 0, 0]),
        ({"temperature": 0}, [0, 1, 0, 0]),
        ({"temperature": 0.5}, [0.0225 / 0.345, 0.25 / 0.345, 0.01 / 0.345, 0.0625 / 0.345]),
        # 0.5/0.9, 0.25/0.9 and 0.15/0.9 remain; the first two reach 0.8.
        ({"top_k": 3, "top_p": 0.8}, [0, 2 / 3, 0, 1 / 3]),
        ({"top_k": 3, "top_p": 0.9, "min_p": 0.6}, [0, 1, 0, 0]),
    ],
    ids=str,
)
def test_rules_narrow_the_distribution(rules: dict[str, Any], expected: list[float]) -> None:
    torch.testing.assert_close(
        probabilities(LOGITS, **rules), torch.tensor(expected, dtype=torch.float32)
    )


def test_rules_apply_to_every_row() -> None:
    rows = torch.stack([LOGITS, LOGITS.flip(0)])
    every: list[dict[str, Any]] = [{"top_k": 2}, {"top_p": 0.8}, {"min_p": 0.4}, {"temperature": 0}]
    for rules in every:
        weights = probabilities(rows, **rules)
        torch.testing.assert_close(weights[1], weights[0].flip(0))


def test_a_tiny_temperature_is_nearly_greedy() -> None:
    assert probabilities(LOGITS, temperature=1e-30).tolist() == [0, 1, 0, 0]


def test_equal_logits_still_leave_top_k_tokens() -> None:
    assert probabilities(torch.zeros(5), top_k=2).count_nonzero() == 2


def test_temperature_zero_is_greedy(model: GPT) -> None:
    context = [3, 1, 4]
    for token in generate(model, context, max_new_tokens=5, temperature=0):
        assert token == greedy_without_cache(model, context)
        context = [*context, token]
    assert len(context) == 8


def test_the_same_seed_gives_the_same_tokens(model: GPT) -> None:
    first, again, other = (
        list(generate(model, [1, 2], max_new_tokens=30, seed=seed)) for seed in (5, 5, 6)
    )
    assert first == again != other


def test_without_a_seed_tokens_differ(model: GPT) -> None:
    runs = [tuple(generate(model, [1], max_new_tokens=40)) for _ in range(2)]
    assert runs[0] != runs[1]


@pytest.mark.parametrize("seed", [None, 3, -1, 2**70], ids=str)
def test_the_random_state_of_torch_is_left_alone(model: GPT, seed: int | None) -> None:
    before = torch.get_rng_state()
    list(generate(model, [1, 2], max_new_tokens=3, seed=seed))
    assert torch.equal(torch.get_rng_state(), before)


def test_generation_ends_before_a_stop_token(model: GPT) -> None:
    tokens = list(generate(model, [3], max_new_tokens=20, seed=1))
    stop = tokens[7]
    stopped = list(generate(model, [3], max_new_tokens=20, seed=1, stop_ids=[stop, 99]))
    assert stopped == tokens[: tokens.index(stop)]


def test_zero_new_tokens_are_none(model: GPT) -> None:
    assert list(generate(model, [3], max_new_tokens=0)) == []


def test_a_full_context_goes_on_from_its_last_half(model: GPT) -> None:
    context = [5, 6, 7]
    for token in generate(model, context[:], max_new_tokens=20, temperature=0):
        if len(context) > 8:
            context = context[-4:]
        assert token == greedy_without_cache(model, context)
        context = [*context, token]


def test_of_a_long_prompt_the_end_is_read(model: GPT) -> None:
    prompt = [i % 31 for i in range(50)]
    token = next(generate(model, prompt, max_new_tokens=1, temperature=0))
    assert token == greedy_without_cache(model, prompt[-8:])


def test_a_context_of_one_token_goes_on() -> None:
    model = GPT(replace(CONFIG, block_size=1))
    assert len(list(generate(model, [1, 2], max_new_tokens=5))) == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_ids": []}, "the prompt is empty or has token ids other than 0 to 30"),
        ({"input_ids": [3, 31]}, "token ids other than 0 to 30"),
        ({"input_ids": [-1]}, "token ids other than 0 to 30"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1 is not a number from 0"),
        ({"temperature": -0.5}, "temperature=-0.5 is not a number from 0"),
        ({"temperature": math.nan}, "temperature=nan is not"),
        ({"temperature": math.inf}, "temperature=inf is not"),
        ({"top_k": 0}, "top_k=0 is not a number from 1"),
        ({"top_p": 1.5}, "top_p=1.5 is not a number from 0 to 1"),
        ({"min_p": -0.1}, "min_p=-0.1 is not a number from 0 to 1"),
    ],
    ids=str,
)
def test_impossible_arguments_are_refused_at_once(
    model: GPT, changes: dict[str, Any], message: str
) -> None:
    arguments: dict[str, Any] = {"input_ids": [1], "max_new_tokens": 1, **changes}
    with pytest.raises(ValueError, match=message):
        generate(model, **arguments)


def test_a_training_model_is_read_without_dropout_and_goes_on_training(model: GPT) -> None:
    dropping = GPT(replace(CONFIG, dropout=0.5))
    dropping.load_state_dict(model.state_dict())
    expected = list(generate(model, [1, 2], max_new_tokens=12, temperature=0))
    tokens = []
    for token in generate(dropping, [1, 2], max_new_tokens=12, temperature=0):
        assert dropping.training
        assert dropping.h[0].training
        tokens.append(token)
    assert tokens == expected


def test_between_two_tokens_the_caller_may_train(model: GPT) -> None:
    tokens = generate(model, [1], max_new_tokens=3)
    next(tokens)
    assert not torch.is_inference_mode_enabled()
    model(torch.tensor([[1, 2]])).sum().backward()
    assert model.wte.weight.grad is not None
    assert len(list(tokens)) == 2


def test_the_cache_follows_the_models_precision(model: GPT) -> None:
    assert KVCache(model.bfloat16()).entries.dtype == torch.bfloat16
    assert len(list(generate(model, [1, 2], max_new_tokens=9))) == 9


def test_the_package_offers_its_names_and_no_others() -> None:
    import nanogpt

    assert all(hasattr(nanogpt, name) for name in nanogpt.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = nanogpt.nothing


def test_memory_is_taken_for_the_tokens_that_are_generated_only() -> None:
    config = GPTConfig(
        block_size=10**9, vocab_size=16, n_layer=1, n_head=2, n_embd=8, position="rotary"
    )
    assert len(list(generate(GPT(config), [1, 2], max_new_tokens=3, seed=0))) == 3
