"""Text as it becomes sure: characters and stop strings over the borders of tokens."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanogpt.detokenizer import Detokenizer

BYTES = [bytes([i]) for i in range(256)]


def pieces(parts: list[bytes], stops: tuple[str, ...] = ()) -> list[str]:
    """Return the text that each token makes sure, and then what was held back."""
    detokenizer = Detokenizer(parts, stops)
    return [*(detokenizer.feed([i]) for i in range(len(parts))), detokenizer.finish()]


def test_a_character_is_emitted_with_its_last_byte() -> None:
    assert pieces([b"a\xe2", b"\x82", b"\xac!"]) == ["a", "", "€!", ""]


def test_an_unfinished_character_becomes_a_replacement_character_once() -> None:
    assert pieces([b"a\xf0\x9f", b"\x98"]) == ["a", "", "�"]


def test_bytes_that_are_no_text_become_what_decoding_them_at_once_gives() -> None:
    raw = b"\xff\xc3(\xe2\x82A\xf0\x9f"
    assert "".join(pieces([bytes([b]) for b in raw])) == raw.decode("utf-8", "replace")


def test_a_stop_string_over_three_tokens_is_never_emitted() -> None:
    assert pieces([b"ab<", b"st", b"op>", b"more"], ("<stop>",)) == ["ab", "", "", "", ""]


def test_the_beginning_of_a_stop_string_is_emitted_once_it_is_none() -> None:
    assert pieces([b"ab<", b"st", b"art>"], ("<stop>",)) == ["ab", "", "<start>", ""]


def test_the_beginning_of_a_stop_string_is_emitted_at_the_end() -> None:
    assert pieces([b"ab<s"], ("<stop>",)) == ["ab", "<s"]


def test_a_stop_string_is_found_within_split_characters() -> None:
    assert pieces([b"a\xc3", b"\xa4\xc3", b"\xb6b"], ("äö",)) == ["a", "", "", ""]


def test_of_two_stop_strings_the_one_that_begins_first_ends_the_text() -> None:
    assert pieces([b"one two three"], ("three", "two"))[0] == "one "


def test_tokens_after_a_stop_string_are_not_counted() -> None:
    detokenizer = Detokenizer([b"a", b"END", b"b"], ["END"])
    detokenizer.feed([0, 1, 2])
    assert detokenizer.n_tokens == 2


def test_only_tokens_with_text_before_the_stop_string_are_emitted() -> None:
    detokenizer = Detokenizer([b"a", b"bE", b"ND", b"c"], ["END"])
    detokenizer.feed([0, 1, 2, 3])
    assert detokenizer.n_emitted == 2  # "a" and "bE"; "ND" is within the stop string


def test_a_special_token_has_no_text() -> None:
    assert pieces([b"a", b"", b"b"]) == ["a", "", "b", ""]


@given(st.binary(max_size=60), st.randoms(use_true_random=False))
def test_random_bytes_in_random_tokens_give_the_text_of_all_of_them(
    raw: bytes, chance: random.Random
) -> None:
    detokenizer = Detokenizer(BYTES)
    text, rest = "", list(raw)
    while rest:
        n = chance.randint(1, 5)
        text += detokenizer.feed(rest[:n])
        rest = rest[n:]
    assert text + detokenizer.finish() == raw.decode("utf-8", "replace")


@pytest.mark.parametrize("stops", [("b",), ("ab", "ba"), ("aab",), ("abc", "c"), ("bb", "abba")])
def test_random_text_ends_before_the_first_stop_string(stops: tuple[str, ...]) -> None:
    chance = random.Random(1)
    for _ in range(300):
        raw = "".join(chance.choices("abc", k=chance.randint(0, 12)))
        text = "".join(pieces([c.encode() for c in raw], stops))
        # token by token: the end is where the first stop string is complete
        ends = [n for n in range(len(raw) + 1) if any(raw[:n].endswith(stop) for stop in stops)]
        complete = raw[: ends[0]] if ends else raw
        cut = [complete.find(stop) for stop in stops if stop in complete]
        assert text == complete[: min(cut, default=len(complete))]
