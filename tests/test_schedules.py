"""The comparison of answers in company with those alone notices what differs."""

from pathlib import Path

import pytest

from benchmarks.schedules import Answer, alone
from serving.engine.messages import Settings
from tests.engine_models import generate, write_model

RIGHT = Answer([1, 2, 3], [-0.5, -1.0, -1.5], [([1], [-0.5])] * 3, "length")


@pytest.mark.parametrize(
    ("other", "why"),
    [
        (Answer([1, 2, 4], [-0.5, -1.0, -1.5], [([1], [-0.5])] * 3, "length"), "ids differ at 2"),
        (Answer([1, 2, 3], [-0.5, -1.0, -1.5000001], RIGHT.top, "length"), "logprobs differ at 2"),
        (Answer([1, 2], [-0.5, -1.0], RIGHT.top[:2], "length"), "ids differ at the end"),
        (Answer([1, 2, 3], RIGHT.logprobs, RIGHT.top, "stop"), "the end is 'stop'"),
    ],
    ids=["token", "bits", "length", "reason"],
)
def test_a_difference_is_named(other: Answer, why: str) -> None:
    assert (other.difference(RIGHT) or "").startswith(why)


def test_of_an_answer_that_was_left_its_beginning_counts() -> None:
    left = Answer([1, 2], [-0.5, -1.0], [([1], [-0.5])] * 2, left=True)
    assert left.difference(RIGHT) is None
    assert Answer([2], left=True).difference(RIGHT) is not None


def test_the_answer_alone_is_a_new_engines(tmp_path: Path) -> None:
    path = tmp_path / "run" / "last.ckpt"
    write_model(path)
    settings = Settings(models=str(path), dtype="fp32", cache_gb=0.1)
    request = generate("a", [1, 2, 3], logprobs=1)
    first, second = alone(request, settings), alone(request, settings)
    assert len(first.ids) == len(first.logprobs) == 8
    assert first.difference(second) is None
