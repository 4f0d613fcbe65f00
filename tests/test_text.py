"""Numbers, durations and JSON Lines as text."""

import io
import sys

import pytest

from nanogpt.text import (
    first_line,
    format_duration,
    format_number,
    format_percent,
    print_line,
)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (7, "7"),
        (-1234, "-1.23k"),
        (999, "999"),
        (999_999, "1M"),
        (124_439_808, "124M"),
        (5e12, "5T"),
        (0.25, "0.25"),
        (0.0003, "3e-4"),
        (0.00123, "0.00123"),
        (1.5e-7, "1.5e-7"),
    ],
)
def test_numbers_have_three_digits_and_a_prefix(number: float, text: str) -> None:
    assert format_number(number) == text


def test_numbers_may_have_more_digits() -> None:
    assert format_number(12_345, digits=4) == "12.34k"


@pytest.mark.parametrize(
    ("fraction", "text"), [(0.38, "38 %"), (0.0912, "9.1 %"), (0.0996, "10 %"), (-0.5, "-50 %")]
)
def test_percentages_below_ten_have_a_decimal(fraction: float, text: str) -> None:
    assert format_percent(fraction) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (3599.6, "1 h 00 min"),
        (90061, "1 d 1 h"),
    ],
)
def test_durations_have_their_two_largest_units(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_an_error_without_a_message_is_its_class() -> None:
    assert first_line(ValueError(" one\ntwo")) == "one"
    assert first_line(KeyboardInterrupt()) == "KeyboardInterrupt"


def test_what_an_encoding_lacks_is_a_question_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    print_line("naïve \ud800", end="|", flush=True)
    assert raw.getvalue() == b"na?ve ?|"
