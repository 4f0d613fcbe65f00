"""The engine: the same answers in any company, and nothing left behind."""

import os
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace

from nanogpt.classifier import class_probabilities
from nanogpt.generation import generate as generate_alone
from nanogpt.tokenizer import byte_tokenizer
from serving.engine import engine as engine_module
from serving.engine import native
from serving.engine.messages import (
    Cancel,
    Classified,
    Classify,
    Describe,
    Embed,
    Embedded,
    Failed,
    Generate,
    ModelDetails,
    Models,
    SamplingParams,
    Score,
    Tokens,
)
from serving.engine.registry import Entry
from tests.engine_models import MODERN, Answer, InlineEngine, generate, write_model


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "runs" / "run" / "checkpoints" / "last.ckpt"
    write_model(path)
    return path


def random_requests(n: int, seed: int) -> list[Generate]:
    rng = random.Random(seed)
    openings = [[rng.randrange(256) for _ in range(rng.randint(1, 90))] for _ in range(4)]
    return [
        Generate(
            f"r{i}",
            "run",
            rng.choice(openings) + [rng.randrange(256) for _ in range(rng.randint(1, 20))],
            SamplingParams(
                max_tokens=rng.randint(1, 24),
                seed=rng.randrange(2**64),
                temperature=rng.choice([0.0, 1.0, 1.0, 0.7]),
                top_k=rng.choice([None, None, 5]),
                top_p=rng.choice([None, None, 0.9]),
                min_p=rng.choice([None, None, 0.05]),
                frequency_penalty=rng.choice([0.0, 0.0, 0.5]),
                repetition_penalty=rng.choice([1.0, 1.0, 1.2]),
                logit_bias=rng.choice([{}, {}, {65: 2.0}]),
                logprobs=rng.choice([0, 3]),
                stop_ids=(10,),
            ),
            key=rng.choice(["", "a"]),
        )
        for i in range(n)
    ]


@pytest.mark.parametrize("keys", [{}, MODERN], ids=["gpt2", "modern"])
@pytest.mark.parametrize("dtype", ["fp32", "fp24", "bf16", "int8"])
@pytest.mark.parametrize("kernels", ["native", "torch"])
def test_an_answer_does_not_depend_on_its_company(
    tmp_path: Path, kernels: str, dtype: str, keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernels == "torch":
        monkeypatch.setattr(native, "load_library", lambda: None)
    elif not (library := native.load_library()) or not library.supports(native.DTYPES[dtype]):
        pytest.skip("no compiler, or no such kernels for this processor")
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    write_model(path, **keys)
    requests = random_requests(24, seed=1)
    alone: dict[str, Answer] = {}
    engine = InlineEngine(path, dtype=dtype)
    for request in requests:  # each in a scope of its own: nothing to use again
        alone |= engine.all([replace(request, key=request.request_id)])
    together = InlineEngine(path, dtype=dtype, max_slots=5)
    together.one(generate("warm", [1]))
    rng = random.Random(2)
    for request in requests:
        together.engine.accept(together, request)
        for _ in range(rng.randint(0, 4)):
            together.step()
    together.settle()
    for request in requests:
        assert together.answers[request.request_id].outcome == alone[request.request_id].outcome
    ends = [together.answers[r.request_id].end for r in requests]
    assert any(end.cached_tokens for end in ends if isinstance(end, Tokens))


@pytest.mark.parametrize("keys", [{}, MODERN], ids=["gpt2", "modern"])
def test_greedy_tokens_are_those_of_generate(tmp_path: Path, keys: dict[str, Any]) -> None:
    path = tmp_path / "run" / "last.ckpt"
    model = write_model(path, **keys)
    prompt = list(b"It was a bright cold day in April, and the clocks were striking thirteen.")
    expected = list(generate_alone(model, prompt, max_new_tokens=20, temperature=0))
    assert InlineEngine(path).one(generate("a", prompt, max_tokens=20)).ids == expected


@pytest.mark.parametrize("keys", [{}, MODERN], ids=["gpt2", "modern"])
def test_logprobs_are_those_of_the_model(tmp_path: Path, keys: dict[str, Any]) -> None:
    path = tmp_path / "run" / "last.ckpt"
    model = write_model(path, **keys)
    prompt = list(b"The quick brown fox jumps over the lazy dog, as it does every day at noon.")
    scored = InlineEngine(path).one(Score("s", "run", prompt, top=2)).end
    with torch.no_grad():
        expected = model(torch.tensor([prompt]))[0].log_softmax(-1)
    assert isinstance(scored, Tokens)
    assert scored.logprobs
    (first, *_), *rest = scored.logprobs
    assert first is None
    own = expected[range(len(prompt) - 1), prompt[1:]]
    torch.testing.assert_close(
        torch.tensor([logprob for logprob, _, _ in rest]), own, atol=1e-4, rtol=1e-4
    )
    assert [top for _, top, _ in rest] == expected[:-1].topk(2).indices.tolist()


@pytest.mark.parametrize("start", [1, 60, 64, 65, 100])
@pytest.mark.parametrize("chunk_tokens", [8, 64])
def test_scores_from_a_later_token_are_the_last_of_all(
    checkpoint: Path, start: int, chunk_tokens: int
) -> None:
    prompt = list(b"The quick brown fox jumps over the lazy dog, " * 2 + b"as it does every day.")
    whole = InlineEngine(checkpoint).one(Score("s", "run", prompt, top=2)).end
    inline = InlineEngine(checkpoint, chunk_tokens=chunk_tokens)
    requests = [Score(f"s{i}", "run", prompt, top=2, start=start) for i in range(3)]
    ends = [answer.end for answer in inline.all(requests).values()]
    ends.append(inline.one(requests[0]).end)
    assert isinstance(whole, Tokens)
    assert whole.logprobs
    for end in ends:
        assert isinstance(end, Tokens)
        assert end.logprobs == whole.logprobs[start:]


def test_the_prompt_of_many_options_is_computed_once(checkpoint: Path) -> None:
    inline = InlineEngine(checkpoint)
    prompt = list(range(100))
    scores = [Score(f"s{i}", "run", [*prompt, 120 + i], start=100) for i in range(4)]
    inline.all(scores)
    assert inline.engine.stats.cached_tokens == 3 * 99


def test_a_next_turn_reads_only_what_is_new(checkpoint: Path) -> None:
    inline = InlineEngine(checkpoint)
    first = inline.one(generate("a", list(b"x" * 100), max_tokens=30))
    turn = [*b"x" * 100, *first.ids, *b"and then"]
    again = inline.one(generate("b", turn))
    assert isinstance(again.end, Tokens)
    assert again.end.cached_tokens == 129  # the last token written was never read
    assert again.outcome == InlineEngine(checkpoint).one(generate("b", turn)).outcome


def test_chats_that_share_a_system_message_keep_their_contexts(checkpoint: Path) -> None:
    inline = InlineEngine(checkpoint)
    system = list(b"You answer in one short sentence, and you say so when you do not know. " * 2)
    chats = {name: [*system, *text] for name, text in [("a", b"Who?"), ("b", b"Where, then?")]}
    for turn in range(3):
        for name, context in chats.items():
            answer = inline.one(generate(f"{name}{turn}", context, max_tokens=6))
            assert isinstance(answer.end, Tokens)
            if turn:
                assert answer.end.cached_tokens == len(context) - 4  # 3 are new, 1 was never read
            chats[name] = [*context, *answer.ids, *b"Go!"]


def test_equal_prompts_are_read_once(checkpoint: Path) -> None:
    inline = InlineEngine(checkpoint)
    inline.one(generate("warm", [1]))
    answers = inline.all([generate(f"{i}", list(b"y" * 100)) for i in range(3)])
    cached = [a.end.cached_tokens for a in answers.values() if isinstance(a.end, Tokens)]
    assert cached == [0, 99, 99]
    assert len({tuple(a.ids) for a in answers.values()}) == 1


def test_prefixes_are_not_shared_between_scopes(checkpoint: Path) -> None:
    inline = InlineEngine(checkpoint)
    inline.one(generate("a", list(b"x" * 100), key="alice"))
    end = inline.one(generate("b", list(b"x" * 100), key="bob")).end
    assert isinstance(end, Tokens)
    assert end.cached_tokens == 0


def test_a_full_context_ends_an_answer(checkpoint: Path) -> None:
    answer = InlineEngine(checkpoint).one(generate("a", list(b"x" * 250), max_tokens=100))
    assert len(answer.ids) == 6
    assert isinstance(answer.end, Tokens)
    assert answer.end.finish_reason == "length"


def test_a_stop_id_ends_an_answer_and_is_not_part_of_it(checkpoint: Path) -> None:
    ids = InlineEngine(checkpoint).one(generate("a", [1, 2, 3])).ids
    stop = ids[3]
    answer = InlineEngine(checkpoint).one(generate("a", [1, 2, 3], stop_ids=(stop,)))
    assert answer.ids == ids[: ids.index(stop)]
    assert isinstance(answer.end, Tokens)
    assert answer.end.finish_reason == "stop"
    assert (
        InlineEngine(checkpoint)
        .one(generate("a", [1, 2, 3], stop_ids=(stop,), ignore_eos=True))
        .ids
        == ids
    )


@pytest.mark.parametrize(
    ("prompt", "kind"),
    [([], "invalid"), ([9999], "invalid"), ([-1], "invalid"), ([1] * 256, "context_length")],
)
def test_a_bad_prompt_is_refused(checkpoint: Path, prompt: list[int], kind: str) -> None:
    end = InlineEngine(checkpoint).one(generate("a", prompt)).end
    assert isinstance(end, Failed)
    assert end.kind == kind


def test_a_full_queue_refuses(checkpoint: Path) -> None:
    inline = InlineEngine(checkpoint, max_queue=2)
    answers = inline.all([generate(f"{i}", [1]) for i in range(3)])
    kinds = [a.end.kind if isinstance(a.end, Failed) else "done" for a in answers.values()]
    assert kinds == ["done", "done", "overloaded"]


def test_who_finds_a_free_slot_does_not_count_as_queued(checkpoint: Path) -> None:
    inline = InlineEngine(checkpoint, max_slots=2, max_queue=1)
    inline.one(generate("warm", [1]))
    answers = inline.all([generate(f"{i}", [1]) for i in range(4)])
    kinds = [a.end.kind if isinstance(a.end, Failed) else "done" for a in answers.values()]
    assert kinds == ["done", "done", "done", "overloaded"]


def test_a_cancelled_request_frees_its_slot_at_once(checkpoint: Path) -> None:
    inline = InlineEngine(checkpoint, max_slots=1)
    inline.one(generate("warm", [1]))
    inline.engine.accept(inline, generate("a", [1], max_tokens=200))
    inline.step()
    inline.engine.accept(inline, Cancel("a"))
    (runner,) = inline.engine.runners.values()
    assert runner.scheduler.slots.n_free == 1


@pytest.mark.parametrize(("reason", "finished"), [("stop", 1), ("left", 0)])
def test_an_answer_that_a_stop_string_ended_counts_as_finished(
    checkpoint: Path, reason: Any, finished: int
) -> None:
    inline = InlineEngine(checkpoint)
    inline.one(generate("warm", [1]))
    inline.engine.accept(inline, generate("a", [1], max_tokens=200))
    inline.step()
    inline.engine.accept(inline, Cancel("a", reason))
    counted = inline.engine.stats
    assert (counted.finished - 1, counted.cancelled) == (finished, 1 - finished)


def test_all_tokens_report_the_wait_and_the_cached_tokens(checkpoint: Path) -> None:
    inline = InlineEngine(checkpoint, max_slots=1)
    inline.all([generate("a", [1, 2]), generate("b", [1, 2, 3])])
    messages = [m for m in inline.messages if isinstance(m, Tokens) and m.request_id == "b"]
    ((cached_tokens, queue_s),) = {(m.cached_tokens, m.queue_s) for m in messages}
    assert len(messages) > 1
    assert cached_tokens == 2
    assert queue_s > 0  # b waited for the slot of a


def test_a_front_end_that_leaves_takes_its_requests_along(checkpoint: Path) -> None:
    inline = InlineEngine(checkpoint, max_slots=1)
    inline.one(generate("warm", [1]))
    for name in ("a", "b"):
        inline.engine.accept("front end", generate(name, [1], max_tokens=200))
    inline.step()
    inline.engine.leave("front end")
    assert inline.engine.idle


def neighbours(
    checkpoint: Path,
) -> tuple[InlineEngine, list[Generate], dict[str, tuple[object, ...]]]:
    """Return an engine, four requests, the second of which begins with 255, and their answers."""
    requests = [
        generate(f"r{i}", [first, *range(40)], seed=i, temperature=1.0, logprobs=1, max_tokens=12)
        for i, first in enumerate([1, 255, 2, 3])
    ]
    undisturbed = {
        key: answer.outcome for key, answer in InlineEngine(checkpoint).all(requests).items()
    }
    inline = InlineEngine(checkpoint)
    inline.one(generate("warm", [1]))
    return inline, requests, undisturbed


def check_only_the_second_failed(
    answers: dict[str, Any], undisturbed: dict[str, tuple[object, ...]], kind: str = "internal"
) -> None:
    for key, answer in answers.items():
        if key == "r1":
            assert isinstance(answer.end, Failed)
            assert answer.end.kind == kind
        else:
            assert answer.outcome == undisturbed[key]


def exhaust_memory(
    inline: InlineEngine, monkeypatch: pytest.MonkeyPatch, *, beyond: int, error: Exception
) -> list[int]:
    """Fail on more than `beyond` tokens of a text with 255 in it; return how many were read."""
    (runner,) = inline.engine.runners.values()
    read, sizes = runner.forward.hidden_states, []

    def exhausted(spans: Any) -> Any:
        (poisoned,) = [s for s in spans if s.slot == slot_of_255(runner)] or [None]
        if poisoned is not None and len(poisoned.ids) > beyond:
            raise error
        sizes.append(0 if poisoned is None else len(poisoned.ids))
        return read(spans)

    monkeypatch.setattr(runner.forward, "hidden_states", exhausted)
    return sizes


def slot_of_255(runner: Any) -> int | None:
    """Return the slot of the text that begins with 255."""
    slots = [s.slot.index for s in runner.scheduler.running if s.ids[0] == 255]
    return slots[0] if slots else None


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory: injected"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: not enough memory: injected"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: injected"),
    ],
    ids=["gpu", "python", "cpu", "linux"],
)
def test_a_prompt_that_exhausts_memory_is_read_in_smaller_pieces(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    inline, requests, undisturbed = neighbours(checkpoint)
    sizes = exhaust_memory(inline, monkeypatch, beyond=10, error=error)
    assert {key: answer.outcome for key, answer in inline.all(requests).items()} == undisturbed
    assert max(sizes) == 8


def test_a_prompt_that_exhausts_memory_in_any_piece_fails_alone(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inline, requests, undisturbed = neighbours(checkpoint)
    exhaust_memory(
        inline, monkeypatch, beyond=0, error=torch.OutOfMemoryError("CUDA out of memory: injected")
    )
    check_only_the_second_failed(inline.all(requests), undisturbed, kind="overloaded")


def test_logits_that_are_not_numbers_fail_alone(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inline, requests, undisturbed = neighbours(checkpoint)
    (runner,) = inline.engine.runners.values()
    read = runner.forward.hidden_states

    def poisoned(spans: Any) -> Any:
        states, row = read(spans).clone(), 0
        for span in spans:
            if 255 in span.ids:
                runner.scheduler.slots.cache[:, :, span.slot] = torch.nan
                states[row : row + len(span.ids)] = torch.nan
            row += len(span.ids)
        return states

    monkeypatch.setattr(runner.forward, "hidden_states", poisoned)
    check_only_the_second_failed(inline.all(requests), undisturbed)
    monkeypatch.undo()
    inline.answers.clear()
    again = {key: answer.outcome for key, answer in inline.all(requests).items()}
    assert again == undisturbed  # the slot is clean again


def test_a_sampler_that_raises_fails_alone(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    inline, requests, undisturbed = neighbours(checkpoint)
    from serving.engine import sampling

    choose = sampling.choose

    def raising(logits: Any, sequences: Any) -> Any:
        if any(sequence.params.seed == 1 for sequence in sequences):
            raise RuntimeError("injected")
        return choose(logits, sequences)

    monkeypatch.setattr(sampling, "choose", raising)
    check_only_the_second_failed(inline.all(requests), undisturbed)
    (record,) = [r for r in caplog.records if r.message == "a request failed"]
    assert record.__dict__["fields"] == {"request_id": "r1"}


def test_classes_are_those_of_the_classifier(tmp_path: Path) -> None:
    path = tmp_path / "run" / "last.ckpt"
    model = write_model(path, labels=["ham", "spam"])
    texts = ["hello", "win a prize now " * 5]
    requests = [Classify(text, "run", list(text.encode())) for text in texts]
    ends = [answer.end for answer in InlineEngine(path).all(requests).values()]
    expected = class_probabilities(model, byte_tokenizer(), texts)  # type: ignore[arg-type]
    found = torch.tensor([end.probabilities for end in ends if isinstance(end, Classified)])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("labels", [None, ["ham", "spam"]], ids=["language", "classifier"])
@pytest.mark.parametrize("keys", [{}, MODERN], ids=["gpt2", "modern"])
def test_an_embedding_is_the_direction_of_the_mean_state(
    tmp_path: Path, keys: dict[str, Any], labels: list[str] | None
) -> None:
    path = tmp_path / "run" / "last.ckpt"
    model = write_model(path, labels=labels, **keys)
    ids = list(b"It was a bright cold day in April, and the clocks were striking thirteen.")
    end = InlineEngine(path).one(Embed("e", "run", ids)).end
    assert isinstance(end, Embedded)
    with torch.no_grad():
        mean = model.hidden_states(torch.tensor([ids]))[0].mean(0)
    found = torch.frombuffer(bytearray(end.vector), dtype=torch.float32)
    torch.testing.assert_close(found, mean / mean.norm(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kernels", ["native", "torch"])
def test_an_embedding_does_not_depend_on_its_company(
    checkpoint: Path, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernels == "torch":
        monkeypatch.setattr(native, "load_library", lambda: None)
    rng = random.Random(3)
    texts = [[rng.randrange(256) for _ in range(rng.randint(40, 250))] for _ in range(8)]
    requests = [Embed(f"e{i}", "run", text, key="a") for i, text in enumerate(texts)]
    alone = {request.request_id: InlineEngine(checkpoint).one(request).end for request in requests}
    together = InlineEngine(checkpoint, max_slots=3)
    together.one(generate("warm", [1]))
    for i, request in enumerate(requests):
        together.engine.accept(together, request)
        together.engine.accept(together, generate(f"g{i}", texts[i][:9], key="b"))
        together.step()
    together.settle()
    ends = {request.request_id: together.answers[request.request_id].end for request in requests}
    assert ends == alone
    assert len({end.vector for end in ends.values() if isinstance(end, Embedded)}) == 8


def test_an_embedding_that_gave_up_its_slot_begins_again(checkpoint: Path) -> None:
    requests = [Embed(name, "run", [3] * 200 + [4] * 20, key="a") for name in ("first", "second")]
    expected = InlineEngine(checkpoint).one(requests[0]).end
    inline = InlineEngine(checkpoint, max_slots=2)
    inline.one(generate("warm", [1]))
    for request in requests:
        inline.engine.accept(inline, request)
    inline.step()
    (runner,) = inline.engine.runners.values()
    first, second = runner.scheduler.running
    assert 0 < first.n_computed < 200
    second.arrived, first.arrived = first.arrived, second.arrived  # the youngest gives way
    inline.engine.accept(inline, generate("other", [5], key="b"))
    inline.step()
    assert first.slot is None
    inline.settle()
    assert isinstance(expected, Embedded)
    assert inline.answers["first"].end == expected


def test_states_that_are_not_finite_fail_alone(checkpoint: Path) -> None:
    inline = InlineEngine(checkpoint)
    inline.one(generate("warm", [1]))
    (runner,) = inline.engine.runners.values()
    hidden_states = runner.forward.hidden_states

    def damaged(spans: Any) -> torch.Tensor:
        states = hidden_states(spans)
        return states * torch.nan if any(1 in span.ids for span in spans) else states

    runner.forward.hidden_states = damaged  # type: ignore[method-assign]
    requests = [Embed("a", "run", [1, 2]), Embed("b", "run", [3, 4])]
    answers = [inline.one(request).end for request in requests]
    assert [type(answer) for answer in answers] == [Failed, Embedded]


@pytest.mark.parametrize("ids", [[9999], [-1]])
def test_a_text_of_unknown_tokens_is_not_classified(tmp_path: Path, ids: list[int]) -> None:
    path = tmp_path / "run" / "last.ckpt"
    write_model(path, labels=["ham", "spam"])
    end = InlineEngine(path).one(Classify("c", "run", [1, 2, *ids])).end
    assert isinstance(end, Failed)
    assert end.kind == "invalid"


@pytest.mark.parametrize("loaded", [True, False])
def test_a_request_that_cannot_be_taken_fails_alone(checkpoint: Path, loaded: bool) -> None:
    inline = InlineEngine(checkpoint)
    if loaded:
        inline.one(generate("warm", [1]))
    broken: Any = generate("broken", [None])  # type: ignore[list-item]
    answers = inline.all([broken, generate("whole", [1])])
    end = answers["broken"].end
    assert isinstance(end, Failed)
    assert end.kind == "internal"
    assert len(answers["whole"].ids) == 8


def test_newer_weights_are_picked_up_without_dropping_a_request(checkpoint: Path) -> None:
    inline = InlineEngine(checkpoint.parent.parent)
    old = inline.one(generate("old", [1, 2], max_tokens=30)).ids
    inline.engine.accept(inline, generate("open", [1, 2], max_tokens=30))
    inline.step()
    write_model(checkpoint, seed=1)
    assert inline.engine.registry.rescan()
    inline.engine.changed()
    inline.settle()
    new = inline.one(generate("new", [1, 2], max_tokens=30)).ids
    assert inline.answers["open"].ids == old
    assert new == InlineEngine(checkpoint).one(generate("new", [1, 2], max_tokens=30)).ids != old


def test_new_weights_are_listed_once_they_serve(checkpoint: Path) -> None:
    inline = InlineEngine(checkpoint.parent.parent)
    inline.one(Describe("old", "run"))
    before = inline.engine.models().models
    write_model(checkpoint, seed=1)
    os.utime(checkpoint, (1, 1))
    inline.engine.registry.rescan()
    inline.engine.changed()
    assert inline.engine.models().models == before
    inline.settle()
    listed = [m for m in inline.messages if isinstance(m, Models)]
    (info,) = listed[-1].models
    described = inline.one(Describe("new", "run")).end
    assert isinstance(described, ModelDetails)
    assert info.revision == described.revision != before[0].revision
    assert info.created == 1


def test_models_are_listed_with_their_tasks_before_they_are_loaded(tmp_path: Path) -> None:
    write_model(tmp_path / "text" / "last.ckpt")
    write_model(tmp_path / "mail" / "last.ckpt", labels=["ham", "spam"])
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "last.ckpt").touch()
    listed = InlineEngine(tmp_path).engine.models().models
    tasks = {info.id: (info.task, info.loaded) for info in listed}
    assert tasks == {
        "broken": (None, False),
        "mail": ("classify", False),
        "text": ("generate", False),
    }


def loads(monkeypatch: pytest.MonkeyPatch, *before: Callable[[], object]) -> list[Entry]:
    """Have something happen before each of the next loads; return what was loaded, as it grows."""
    load, loaded, next_ones = engine_module.load_runner, [], iter(before)

    def observed(entry: Entry, *others: Any) -> Any:
        loaded.append(entry)
        next(next_ones, lambda: None)()
        return load(entry, *others)

    monkeypatch.setattr(engine_module, "load_runner", observed)
    return loaded


def newer(inline: InlineEngine, path: Path, seed: int = 1) -> None:
    """Replace a checkpoint, and have the engine see that."""
    write_model(path, seed=seed)
    inline.engine.registry.rescan()
    inline.engine.post(inline.engine.changed)


def fail() -> None:
    raise RuntimeError("injected")


def is_newest(inline: InlineEngine) -> bool:
    (runner,), (entry,) = inline.engine.runners.values(), inline.engine.registry.entries
    return runner.entry == entry


def test_weights_that_come_while_others_are_loaded_are_loaded_next(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inline = InlineEngine(checkpoint)
    loaded = loads(
        monkeypatch,
        lambda: newer(inline, checkpoint, seed=1),  # nothing is there yet
        lambda: newer(inline, checkpoint, seed=2),  # it is waited for, as this is loaded
    )
    inline.one(generate("a", [1]))
    assert len(loaded) == 3
    assert is_newest(inline)


def test_newer_weights_that_did_not_load_are_tried_again_later(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inline = InlineEngine(checkpoint)
    inline.one(generate("old", [1]))
    loaded = loads(monkeypatch, fail)
    newer(inline, checkpoint)
    for name in ("b", "c", "d"):
        assert isinstance(inline.one(generate(name, [1])).end, Tokens)
    assert len(loaded) == 1
    monkeypatch.setattr(engine_module, "RETRY_S", 0.0)
    inline.one(generate("e", [1]))
    assert is_newest(inline)


def test_who_waits_for_a_broken_file_is_served_with_the_one_that_replaces_it(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inline = InlineEngine(checkpoint)

    def replaced() -> None:
        newer(inline, checkpoint)
        fail()

    loads(monkeypatch, replaced)
    assert isinstance(inline.one(generate("a", [1])).end, Tokens)
    assert is_newest(inline)


def test_the_least_used_model_makes_room(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_model(tmp_path / name / "checkpoints" / "last.ckpt")
    inline = InlineEngine(tmp_path, max_models=1)
    for name in ("a", "b"):
        inline.one(Generate(name, name, [1], SamplingParams(1)))
    assert list(inline.engine.runners) == ["b"]


def test_newer_weights_are_no_use_of_a_model(tmp_path: Path) -> None:
    for name in ("trained", "requested"):
        write_model(tmp_path / name / "checkpoints" / "last.ckpt")
    inline = InlineEngine(tmp_path, max_models=2)
    use_model(inline, "trained")
    use_model(inline, "requested")
    newer(inline, tmp_path / "trained" / "checkpoints" / "last.ckpt")
    inline.settle()
    write_model(tmp_path / "third" / "checkpoints" / "last.ckpt")
    inline.engine.registry.rescan()
    use_model(inline, "third")
    assert list(inline.engine.runners) == ["requested", "third"]


SLOT_BYTES = 2 * 2 * 256 * 64 * 4  # keys and values: 2 layers, 256 tokens, 64 channels in fp32


def n_slots(inline: InlineEngine) -> dict[str, int]:
    return {id_: len(r.scheduler.slots.slots) for id_, r in inline.engine.runners.items()}


def use_model(inline: InlineEngine, model: str) -> None:
    inline.one(Generate(f"{model}'s", model, [1], SamplingParams(1)))


@pytest.mark.parametrize(
    ("names", "max_models", "held", "expected"),
    [
        ("a", 4, 8.5, {"a": 8}),
        ("ab", 4, 8.5, {"a": 4, "b": 4}),
        ("abc", 2, 8.5, {"b": 4, "c": 4}),
        ("abc", 1, 8.5, {"c": 8}),
        ("ab", 4, 100, {"a": 10, "b": 10}),
        ("abc", 3, 2.5, {"b": 1, "c": 1}),  # at least one slot, for as many as have one
        ("ab", 2, 1, {"b": 1}),
    ],
)
def test_models_share_the_memory_for_keys_and_values(
    tmp_path: Path, names: str, max_models: int, held: float, expected: dict[str, int]
) -> None:
    for name in names:
        write_model(tmp_path / name / "checkpoints" / "last.ckpt")
    cache_gb = held * SLOT_BYTES / 1e9
    inline = InlineEngine(tmp_path, max_models=max_models, max_slots=10, cache_gb=cache_gb)
    for name in names:
        use_model(inline, name)
    assert n_slots(inline) == expected


def test_a_model_with_more_than_its_share_makes_room_when_it_is_idle(tmp_path: Path) -> None:
    write_model(tmp_path / "a" / "checkpoints" / "last.ckpt")
    inline = InlineEngine(tmp_path, max_slots=10, cache_gb=8.5 * SLOT_BYTES / 1e9)
    use_model(inline, "a")
    for name in ("b", "c"):
        write_model(tmp_path / name / "checkpoints" / "last.ckpt")
    inline.engine.registry.rescan()
    inline.engine.accept(inline, Generate("long", "a", [1], SamplingParams(200, ignore_eos=True)))
    inline.engine.accept(inline, Describe("b's", "b"))
    inline.engine.step()
    while "b" not in inline.engine.runners:
        inline.engine.take_inbox(wait=True)
    assert n_slots(inline) == {"a": 8, "b": 2}
    inline.settle()
    use_model(inline, "b")
    use_model(inline, "c")
    assert n_slots(inline) == {"b": 2, "c": 2}


def test_newer_weights_of_an_evicted_model_are_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = {name: tmp_path / name / "checkpoints" / "last.ckpt" for name in "ab"}
    for path in paths.values():
        write_model(path)
    monkeypatch.setattr(engine_module, "PATIENCE_S", 60.0)  # a slow load would let another begin
    inline = InlineEngine(tmp_path, max_models=2, cache_gb=SLOT_BYTES / 1e9)
    use_model(inline, "a")
    loaded = loads(monkeypatch, lambda: newer(inline, paths["a"]))
    use_model(inline, "b")
    inline.settle()
    assert [entry.id for entry in loaded] == ["b"]
    assert list(inline.engine.runners) == ["b"]


def test_a_file_that_is_no_checkpoint_fails_its_requests(tmp_path: Path) -> None:
    path = tmp_path / "run" / "last.ckpt"
    path.parent.mkdir()
    path.write_bytes(b"nothing")
    end = InlineEngine(tmp_path).one(generate("a", [1])).end
    assert isinstance(end, Failed)
    assert end.kind == "internal"
    assert "last.ckpt is truncated, altered, of another kind" in end.message


def test_a_model_of_which_no_slot_fits_the_cache_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "long" / "last.ckpt"
    write_model(path, position="rotary", block_size=10**9)
    end = InlineEngine(tmp_path).one(Generate("a", "long", [1], SamplingParams(1))).end
    assert isinstance(end, Failed)
    assert "long could not be loaded: the keys and values of block_size=1000000000 tokens take" in (
        end.message
    )


def test_a_failed_load_is_logged_once_and_named_without_paths(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "bad" / "last.ckpt"
    path.parent.mkdir()
    path.write_bytes(b"nothing")
    write_model(tmp_path / "good" / "last.ckpt")
    inline = InlineEngine(tmp_path)
    for n in range(3):
        end = inline.one(Generate(str(n), "bad", [1], SamplingParams(1))).end
        assert isinstance(end, Failed)
        assert end.message.startswith("bad could not be loaded: last.ckpt is truncated, altered")
        assert str(tmp_path) not in end.message
        broken = inline.engine.registry.failures
        broken.update({key: (0.0, why) for key, (_, why) in broken.items()})  # long ago
    records = [r for r in caplog.records if r.name == "serving.engine.engine"]
    assert [r.getMessage().partition(":")[0] for r in records] == ["could not load bad"]
    assert records[0].exc_info is None
    errors = {info.id: info.error for info in inline.engine.models().models}
    assert errors["bad"].startswith("bad could not be loaded: last.ckpt")
    assert errors["good"] == ""
    write_model(path)
    inline.engine.registry.rescan()
    assert {info.error for info in inline.engine.models().models} == {""}


def test_a_model_that_loads_after_a_failure_has_no_error_and_is_the_default_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("best", "other"):
        write_model(tmp_path / name / "last.ckpt")
    (tmp_path / "best" / "summary.json").write_text('{"steps": 1000}')
    inline = InlineEngine(tmp_path)
    load = engine_module.load_runner
    monkeypatch.setattr(engine_module, "load_runner", None)
    inline.one(Generate("a", "best", [1], SamplingParams(1)))
    whole = [m for m in inline.engine.models().models if m.error == ""]
    assert [(m.id, None in m.default_for) for m in whole] == [("other", True)]
    monkeypatch.setattr(engine_module, "load_runner", load)
    monkeypatch.setattr(engine_module, "RETRY_S", 0.0)
    inline.one(Generate("b", "best", [1], SamplingParams(1)))
    listed = {m.id: (None in m.default_for, m.error) for m in inline.engine.models().models}
    assert listed == {"best": (True, ""), "other": (False, "")}


def test_slow_loads_are_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(4):
        write_model(tmp_path / f"r{n}" / "last.ckpt")
    load, until = engine_module.load_runner, threading.Event()

    def slow(*arguments: Any) -> Any:
        until.wait(60)
        return load(*arguments)

    monkeypatch.setattr(engine_module, "load_runner", slow)
    monkeypatch.setattr(engine_module, "PATIENCE_S", 0.0)
    inline = InlineEngine(tmp_path, max_models=1)
    for n in range(4):
        inline.engine.accept(inline, Generate(f"{n}", f"r{n}", [1], SamplingParams(1)))
    for _ in range(3):
        inline.engine.step()
    assert len(inline.engine._loading) == 2
    until.set()
    inline.settle()
    assert all(isinstance(inline.answers[f"{n}"].end, Tokens) for n in range(4))


def test_an_unforeseen_error_is_named_by_its_type(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise KeyError("/secret/path")

    monkeypatch.setattr(engine_module, "load_runner", fail)
    end = InlineEngine(checkpoint).one(generate("a", [1])).end
    assert isinstance(end, Failed)
    assert end.message == "run could not be loaded: KeyError"


@pytest.mark.parametrize("max_models", [1, 4])
def test_a_load_that_hangs_keeps_no_other_model_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_models: int
) -> None:
    for name in ("hangs", "whole"):
        write_model(tmp_path / name / "last.ckpt")
    load, until = engine_module.load_runner, threading.Event()

    def hanging(entry: Entry, *others: Any) -> Any:
        if entry.id == "hangs":
            until.wait(60)
        return load(entry, *others)

    monkeypatch.setattr(engine_module, "load_runner", hanging)
    monkeypatch.setattr(engine_module, "PATIENCE_S", 0.1)
    inline = InlineEngine(tmp_path, max_models=max_models)
    for name in ("hangs", "whole"):
        inline.engine.accept(inline, Generate(name, name, [1], SamplingParams(1)))
    while "whole" not in inline.answers or not inline.answers["whole"].end:
        inline.step()
    assert isinstance(inline.answers["whole"].end, Tokens)
    ((key, load_),) = inline.engine._loading.items()
    inline.engine._loading[key] = load_._replace(deadline=load_.started)
    inline.settle()
    late = inline.answers["hangs"].end
    assert isinstance(late, Failed)
    assert late.message == "hangs could not be loaded within 0 s."
    until.set()
    while "hangs" not in inline.engine.runners:
        inline.step()  # it is there after all
    assert len(inline.engine.runners) <= max_models


def test_a_slow_load_does_not_replace_newer_weights(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, until = engine_module.load_runner, threading.Event()
    inline = InlineEngine(checkpoint)
    old = inline.engine.registry.entries[0].revision

    def slow(entry: Entry, *others: Any) -> Any:
        runner = load(entry, *others)
        if entry.revision == old:
            until.wait(60)
        return runner

    monkeypatch.setattr(engine_module, "load_runner", slow)
    monkeypatch.setattr(engine_module, "PATIENCE_S", 0.1)
    inline.engine.accept(inline, Describe("first", "run"))
    inline.engine.step()
    newer(inline, checkpoint)
    while "run" not in inline.engine.runners:
        inline.step()
    new = inline.engine.runners["run"].entry.revision
    until.set()
    while inline.engine._loading:
        inline.step()
    assert inline.engine.runners["run"].entry.revision == new != old


def test_an_engine_that_loads_sleeps_until_it_has(checkpoint: Path) -> None:
    inline = InlineEngine(checkpoint)
    inline.engine.accept(inline, generate("a", [1]))
    assert not inline.engine.computes
    assert not inline.engine.idle


def test_the_only_model_is_loaded_before_any_request(checkpoint: Path) -> None:
    engine = InlineEngine(checkpoint).engine
    engine.post(engine.drain)
    engine.run()
    assert list(engine.runners) == ["run"]


def begun(inline: InlineEngine, *requests: Any) -> None:
    """Submit requests and compute until each that fits has begun to answer."""
    for request in requests:
        inline.engine.accept(inline, request)
        inline.step()


def hog(name: str, key: str = "hog", origin: str = "one", **params: Any) -> Generate:
    """Return a request that goes on for long."""
    params = {"max_tokens": 200, "ignore_eos": True, **params}
    return generate(name, [ord(name[0]), *name.encode()], key=key, origin=origin, **params)


def steps_to_end(inline: InlineEngine, request: Any) -> int:
    """Submit a request and return the number of steps that its answer takes."""
    inline.engine.accept(inline, request)
    n = 0
    while request.request_id not in inline.answers or not inline.answers[request.request_id].end:
        inline.step()
        n += 1
    return n


@pytest.mark.parametrize("labels", [("another", "two"), ("hog", "two")], ids=["key", "request"])
def test_who_comes_later_waits_for_no_long_answer_of_another(
    checkpoint: Path, labels: tuple[str, str]
) -> None:
    inline = InlineEngine(checkpoint)
    inline.one(generate("warm", [1]))
    begun(inline, *[hog(f"{i} hog") for i in range(12)])
    key, origin = labels
    newcomer = generate("new", [7, 8, 9], key=key, origin=origin, max_tokens=2)
    assert steps_to_end(inline, newcomer) <= 3
    inline.settle()
    alone = InlineEngine(checkpoint).all([hog(f"{i} hog") for i in range(12)])
    assert {n: inline.answers[n].outcome for n in alone} == {n: a.outcome for n, a in alone.items()}
    waits = {(m.request_id, m.queue_s) for m in inline.messages if isinstance(m, Tokens)}
    assert len(waits) == len(inline.answers) - 1  # a pause is no wait in the queue


def test_a_long_prompt_of_another_key_is_read_in_turns_with_ones_own(checkpoint: Path) -> None:
    inline = InlineEngine(checkpoint)
    inline.one(generate("warm", [1]))
    long = [generate(f"{i}", [i] * 240, key="hog", origin="one") for i in range(3)]
    begun(inline, *long)
    newcomer = generate("new", [7] * 20, key="another", max_tokens=1)
    assert steps_to_end(inline, newcomer) <= 4  # 2 pieces of it, and as many of others


def test_a_request_is_read_before_the_many_prompts_of_another(checkpoint: Path) -> None:
    inline = InlineEngine(checkpoint)
    inline.one(generate("warm", [1]))
    begun(inline, *[generate(f"{i}", [i] * 240, origin="one") for i in range(3)])
    newcomer = generate("new", [7] * 20, origin="two", max_tokens=1)
    assert steps_to_end(inline, newcomer) <= 240 // 16 + 2  # after the prompt that is begun


def test_a_prompt_that_is_begun_is_read_to_its_end(checkpoint: Path) -> None:
    inline = InlineEngine(checkpoint)
    inline.one(generate("warm", [1]))
    for name in "ab":
        inline.engine.accept(inline, generate(name, [ord(name)] * 240, origin=name))
    for _ in range(4):  # of 64 tokens
        inline.step()
    assert len(inline.answers["a"].ids) == 1


def test_a_slot_that_is_free_goes_to_the_key_with_the_fewest(checkpoint: Path) -> None:
    inline = InlineEngine(checkpoint, max_slots=2)
    inline.one(generate("warm", [1]))
    begun(inline, hog("a", "a", max_tokens=8), hog("b", "b"))
    waiting = [hog("a later", "a"), hog("b later", "b"), hog("c", "c"), hog("d", "d")]
    for request in waiting:
        inline.engine.accept(inline, request)
    while not inline.answers["a"].end:
        inline.step()
    inline.step()
    (runner,) = inline.engine.runners.values()
    assert [s.request.request_id for s in runner.scheduler.running] == ["b", "c"]


def test_keys_take_turns_at_the_only_slot(checkpoint: Path) -> None:
    inline = InlineEngine(checkpoint, max_slots=1)
    inline.one(generate("warm", [1]))
    requests = [generate(f"a{i}", [1], key="a", origin=f"a{i}") for i in range(4)]
    requests += [generate(f"b{i}", [1], key="b", origin=f"b{i}") for i in range(2)]
    inline.all(requests)
    tokens = [m for m in inline.messages if isinstance(m, Tokens)]
    ended = [m.request_id for m in tokens if m.finish_reason]
    assert ended[1:] == ["a0", "b0", "a1", "b1", "a2", "a3"]


def test_a_scored_prompt_that_made_room_is_scored_from_its_start(checkpoint: Path) -> None:
    inline = InlineEngine(checkpoint, max_slots=2)
    score = Score("s", "run", list(range(90)), 2, key="hog", origin="one")
    alone = inline.one(score).end
    begun(inline, hog("a"))
    inline.answers["s"].end = None
    begun(inline, score)
    inline.step()
    steps_to_end(inline, generate("new", [7], key="another", max_tokens=1))
    (runner,) = inline.engine.runners.values()
    assert [s.request.request_id for s in runner.scheduler.waiting] == ["s"]
    inline.settle()
    assert inline.answers["s"].end == alone


def test_a_full_queue_takes_each_keys_share(checkpoint: Path) -> None:
    inline = InlineEngine(checkpoint, max_slots=1, max_queue=6)
    inline.one(generate("warm", [1]))
    begun(inline, hog("a", "hog"))
    hogs = [hog(f"{i}", "hog") for i in range(7)]
    others = [generate(f"other {i}", [1], key="other", max_tokens=1) for i in range(4)]
    thirds = [generate(f"third {i}", [1], key="third", max_tokens=1) for i in range(3)]
    for request in [*hogs, *others, *thirds]:
        inline.engine.accept(inline, request)
    inline.step()
    refused = [n for n, a in inline.answers.items() if isinstance(a.end, Failed)]
    assert refused == ["6", "other 3", "third 2"]


def test_those_who_wait_for_a_model_count_to_their_keys_share(checkpoint: Path) -> None:
    inline = InlineEngine(checkpoint, max_queue=4)
    requests = [hog(f"{i}", "hog", max_tokens=1) for i in range(5)]
    requests += [generate(f"other {i}", [1], key="other", max_tokens=1) for i in range(3)]
    inline.all(requests)
    refused = [n for n, a in inline.answers.items() if isinstance(a.end, Failed)]
    assert refused == ["4", "other 2"]
