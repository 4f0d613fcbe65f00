"""Decode one step ahead of the host, on a simulated GPU: the answers are those of a CPU."""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from serving.engine import native, sampling
from serving.engine.messages import Failed, Generate, Message, SamplingParams, Tokens
from serving.engine.runner import Runner
from tests.engine_models import MODERN, write_model
from tests.simulated_gpu import Activity, simulated_gpu
from tests.test_simulated_gpu import PROMPT, gpu, load  # noqa: F401

PARAMS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_k": 50, "logprobs": 2},
    {"temperature": 0.8, "top_p": 0.9, "min_p": 0.01},
]
Answers = dict[str, tuple[list[int], list[float], str | None]]
Between = Callable[[Runner, int], None]  # what happens before a step, by its number


@pytest.fixture(autouse=True)
def torch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "load_library", lambda: None)


def requests(n: int, key: str = "", **options: Any) -> list[Generate]:
    """Return n requests of different lengths that a GPU can draw."""
    return [
        Generate(
            f"{key}{i}",
            "run",
            PROMPT[i : 40 + 2 * i],
            SamplingParams(4 + 5 * i % 17, seed=i, **PARAMS[i % 4], **options),
            key=key,
        )
        for i in range(n)
    ]


def answers(
    path: Path, device: str, own: list[Generate], between: Between | None = None
) -> tuple[Answers, dict[str, Message]]:
    """Return the tokens, logprobs and the reason of the end of each request, and its end."""
    runner, messages = load(path, device, max_slots=4)
    for request in own:
        runner.add(None, request)
    n = 0
    while runner.scheduler.sequences:
        if between:
            between(runner, n)
        runner.step()
        n += 1
    ids: defaultdict[str, list[int]] = defaultdict(list)
    numbers: defaultdict[str, list[float]] = defaultdict(list)
    ends: dict[str, Message] = {}
    for message in messages:
        assert isinstance(message, Tokens | Failed)
        ends[message.request_id] = message
        if isinstance(message, Tokens):
            ids[message.request_id] += message.ids
            for logprob, top, values in message.logprobs or []:
                numbers[message.request_id] += [logprob or 0.0, *top, *values]
    reasons = {name: getattr(end, "finish_reason", None) for name, end in ends.items()}
    return {name: (ids[name], numbers[name], reasons[name]) for name in ends}, ends


def check(found: Answers, expected: Answers) -> None:
    assert found.keys() == expected.keys()
    for name, (ids, numbers, reason) in expected.items():
        assert found[name] == (ids, pytest.approx(numbers, abs=1e-4), reason)


@pytest.mark.parametrize(
    "keys", [{}, MODERN, {"token_shift": True}], ids=["gpt2", "modern", "shift"]
)
def test_answers_are_those_of_a_cpu(keys: dict[str, Any], tmp_path: Path) -> None:
    write_model(tmp_path / "run" / "last.ckpt", **keys)
    own = requests(9, stop_ids=(*range(30),))  # more than there are slots
    expected, _ = answers(tmp_path, "cpu", own)
    with simulated_gpu() as activity:
        found, _ = answers(tmp_path, "cuda", own)
    check(found, expected)
    assert activity.kernels["graph"]
    assert {reason for _, _, reason in expected.values()} == {"stop", "length"}


def test_a_step_begins_before_the_host_waits_for_the_last(
    gpu: Activity,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_model(tmp_path / "run" / "last.ckpt")
    waits: list[int] = []  # the steps that had begun at each
    wait = gpu.wait

    def recorded(reason: str) -> None:
        waits.append(gpu.kernels["graph"])
        wait(reason)

    def between(runner: Runner, n: int) -> None:
        if n == 4:  # a prefill and two steps were before
            monkeypatch.setattr(gpu, "wait", recorded)
            gpu.kernels.clear()

    answers(tmp_path, "cuda", requests(2)[1:], between)
    assert waits[:3] == [1, 2, 3]


def test_a_cancelled_request_leaves_the_others_and_its_slot_as_they_were(tmp_path: Path) -> None:
    write_model(tmp_path / "run" / "last.ckpt")
    own = requests(6)

    def between(runner: Runner, n: int) -> None:
        if n == 5:  # a token of each is drawn and not read
            (gone,) = [s for s in runner.scheduler.running if s.request.request_id == "3"]
            runner.scheduler.remove(gone)

    expected, _ = answers(tmp_path, "cpu", own)
    with simulated_gpu():
        found, _ = answers(tmp_path, "cuda", own, between)
    assert 0 < len(found.pop("3")[0]) < len(expected.pop("3")[0])
    check(found, expected)


def test_a_request_that_loses_its_slot_is_computed_again(tmp_path: Path) -> None:
    write_model(tmp_path / "run" / "last.ckpt")
    first, late = requests(4, "a"), requests(2, "b")

    def between(runner: Runner, n: int) -> None:
        if n == 5:
            for request in late:
                runner.add(None, request)

    expected, _ = answers(tmp_path, "cpu", [*first, *late])
    with simulated_gpu():
        found, _ = answers(tmp_path, "cuda", first, between)
    check(found, expected)


def test_flat_distributions_are_drawn_again_from_more_candidates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path / "run" / "last.ckpt")
    expected, _ = answers(tmp_path, "cpu", requests(4))
    monkeypatch.setattr(sampling, "CANDIDATES", (2, 8))
    with simulated_gpu():
        found, _ = answers(tmp_path, "cuda", requests(4))
    check(found, expected)


def test_logits_that_are_not_finite_fail_their_request_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path / "run" / "last.ckpt")

    def between(runner: Runner, n: int) -> None:
        if n == 4:
            slot = runner.scheduler.running[2].slot
            assert slot
            with torch.no_grad():
                runner.scheduler.slots.cache[:, :, slot.index] = torch.nan

    expected, _ = answers(tmp_path, "cpu", requests(4))
    with simulated_gpu():
        found, ends = answers(tmp_path, "cuda", requests(4), between)
    assert isinstance(ends["2"], Failed)
    assert "not finite" in ends["2"].message
    del found["2"], expected["2"]
    check(found, expected)


def test_an_engine_whose_graph_fails_goes_on_in_step_with_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path / "run" / "last.ckpt")

    def between(runner: Runner, n: int) -> None:
        if n == 4:
            assert runner.decoder
            monkeypatch.delattr(runner.decoder, "_compute")

    expected, _ = answers(tmp_path, "cpu", requests(4))
    with simulated_gpu():
        found, _ = answers(tmp_path, "cuda", requests(4), between)
    check(found, expected)
