"""POST /v1/systemone: questions whose answers are probabilities of options."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from serving.engine.messages import Classified, Classify, Message, Score, Tokens
from tests.fake_engine import FakeEngine
from tests.front_end import serve

QUESTION = {"type": "choice", "criteria": {"a": None, "bcd": None}}


class UnevenEngine(FakeEngine):
    """One whose tokens have the log-probability -1, or -3 for an `a`; its last class is likely."""

    def _answer(self, message: Message) -> Message | None:
        if isinstance(message, Score):
            scored = [-3.0 if token == ord("a") else -1.0 for token in message.prompt_ids]
            rows: list[Any] = [(logprob, [], []) for logprob in scored[message.start :]]
            return Tokens(message.request_id, [], rows, finish_reason="length")
        if isinstance(message, Classify):
            return Classified(message.request_id, [0.125, 0.25, 0.625], 7)
        return super()._answer(message)


@pytest.fixture
def engine(tmp_path: Path) -> FakeEngine:
    return UnevenEngine(f"unix:{tmp_path}/e", block_size=16)


@pytest.fixture
def url(engine: FakeEngine) -> Iterator[str]:
    with serve(engine) as address:
        yield address


@pytest.fixture
def classifier_url(tmp_path: Path) -> Iterator[str]:
    engine = UnevenEngine(f"unix:{tmp_path}/e", labels=["ham", "spam", "other"])
    with serve(engine) as address:
        yield address


def decide(url: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/systemone", json={"state": "text", **body})


def answer(url: str, **body: Any) -> Any:
    return decide(url, questions={"q": {**QUESTION, **body}}).json()["answers"]["q"]


def scored(engine: FakeEngine) -> list[tuple[list[int], list[int]]]:
    """Return the ids of the prompt and of the option of each scored text."""
    scores = [message for message in engine.requests if isinstance(message, Score)]
    return [(s.prompt_ids[: s.start], s.prompt_ids[s.start :]) for s in scores]


def test_options_compete_by_the_sum_of_their_tokens_log_probabilities(url: str) -> None:
    found = answer(url, criteria={"a": None, "bcd": None, "bb": None})
    assert found["logprobs"] == {"a": -3, "bcd": -3, "bb": -2}
    assert found["logprobs_per_byte"] == {"a": -3, "bcd": -1, "bb": -1}
    # exp(-3) : exp(-3) : exp(-2) is 1 : 1 : e
    assert found["probabilities"] == pytest.approx(
        {"a": 0.21194, "bcd": 0.21194, "bb": 0.57612}, abs=1e-5
    )
    assert found["choice"] == "bb"


def test_a_classifier_s_answer_has_the_probabilities_of_its_labels(classifier_url: str) -> None:
    found = answer(classifier_url, criteria={"spam": "Advertising", "other": None, "ham": None})
    assert found["probabilities"] == {"ham": 0.125, "spam": 0.25, "other": 0.625}
    assert found["choice"] == "other"


def test_an_answer_is_that_of_the_same_probabilities_in_transformers(classifier_url: str) -> None:
    decision = pytest.importorskip("transformers.decision")
    criteria = {"ham": None, "spam": None, "other": None}
    question = {"type": "choice", "instructions": "Which kind?", "criteria": criteria}
    body = decide(classifier_url, questions={"kind": question}).json()
    (parsed,) = decision.parse_questions({"kind": question}, decision.DecisionConfig())
    assert body == {
        "model": "tiny",
        "answers": {"kind": parsed.answer([0.125, 0.25, 0.625])},
        "usage": {"input_tokens": 7, "output_tokens": 0},
    }


def test_each_question_has_its_own_answer(url: str) -> None:
    questions = {"one": QUESTION, "two": {"type": "choice", "criteria": {"aa": None, "e": None}}}
    body = decide(url, questions=questions).json()
    assert {name: a["choice"] for name, a in body["answers"].items()} == {"one": "a", "two": "e"}
    assert body["usage"]["input_tokens"] == 4 * 4 + 1 + 3 + 2 + 1


@pytest.mark.parametrize(
    ("body", "question", "prompt"),
    [
        ({"state": "On"}, {}, b"On"),
        ({"state": ""}, {}, b""),
        ({"state": "On"}, {"instructions": "Off?"}, b"On\nOff?\n"),
        ({"state": "On"}, {"criteria": {"a": "A", "bcd": None}}, b"On\na: A\n"),
        ({"state": {"é": 1}}, {}, '{"é": 1}'.encode()),
        ({"state": "On"}, {"instructions": ["x"]}, b'On\n["x"]\n'),
    ],
)
def test_options_follow_the_state_and_lines_with_the_question(
    url: str, engine: FakeEngine, body: Any, question: Any, prompt: bytes
) -> None:
    ids = httpx.post(f"{url}/tokenize", json={"prompt": prompt.decode()}).json()["tokens"]
    assert decide(url, **body, questions={"q": {**QUESTION, **question}}).status_code == 200
    assert scored(engine) == [(ids, list(b"a")), (ids, list(b"bcd"))]


def test_a_model_taught_to_chat_answers_with_an_option(tmp_path: Path) -> None:
    engine = FakeEngine(f"unix:{tmp_path}/e", template="alpaca")
    messages = [{"role": "user", "content": "text\nWhich?"}]
    with serve(engine) as url:
        assert answer(url, instructions="Which?")["choice"] == "a"
        ids = httpx.post(f"{url}/tokenize", json={"messages": messages}).json()["tokens"]
    assert scored(engine) == [(ids, list(b"a")), (ids, list(b"bcd"))]


@pytest.mark.parametrize(
    ("body", "param", "reason"),
    [
        ({"criteria": {}}, "questions", "at least 2 items"),
        ({"criteria": {"a": None}}, "questions", "at least 2 items"),
        ({"criteria": {"a": None, "": None}}, "questions", "have the same tokens, or one has none"),
        ({"criteria": {str(n): None for n in range(256)}}, "questions", "More than 255 options"),
        ({"criteria": {"a": None, "b" * 13: None}}, "questions", "17 tokens"),
        ({"criteria": {"a": None, "b" * 900: None}}, "questions", "more than 16 tokens"),
        ({"criteria": None}, "questions", "valid dictionary"),
        ({"type": "noul"}, "questions", "should be 'choice'"),
        ({"state": "x" * 900}, "state", "more than 16 tokens"),
        ({"state": 1}, "state", "valid string"),
        ({"assets": {"image-1": {"data_base64": ""}}}, "assets", "at most 0 items"),
        ({"questions": {}}, "questions", "at least 1 item"),
        (
            {"questions": {str(n): QUESTION for n in range(65)}},
            "questions",
            "More than 64 questions",
        ),
    ],
)
def test_a_question_that_cannot_be_answered_is_refused(
    url: str, engine: FakeEngine, body: Any, param: str, reason: str
) -> None:
    if body.keys() & {"criteria", "type"}:
        body = {"questions": {"q": {**QUESTION, **body}}}
    refused = decide(url, **{"questions": {"q": QUESTION}, **body})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == param
    assert reason in refused.json()["error"]["message"]
    assert scored(engine) == []


def test_the_options_of_all_questions_are_limited_before_any_is_read(url: str) -> None:
    question = {**QUESTION, "criteria": {str(n): None for n in range(205)}}
    refused = decide(url, state="x" * 900, questions={str(n): question for n in range(5)})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "questions"
    assert "There are 1025 options; request 1 to 1024." in refused.json()["error"]["message"]


def test_an_option_may_have_a_lone_surrogate(url: str) -> None:
    content = json.dumps(
        {"state": "x", "questions": {"q": {**QUESTION, "criteria": {"\ud800": None, "b": None}}}}
    )
    headers = {"Content-Type": "application/json"}
    body = httpx.post(f"{url}/v1/systemone", content=content, headers=headers).json()
    # As U+FFFD, it has three bytes, each a token of the log-probability -1.
    assert body["answers"]["q"]["logprobs_per_byte"] == {"\ud800": -1, "b": -1}


def test_an_option_may_fill_the_context(url: str) -> None:
    assert answer(url, criteria={"a": None, "b" * 12: None})["choice"] == "a"


def test_a_state_of_many_levels_is_refused(url: str) -> None:
    questions = json.dumps({"q": QUESTION})
    body = f'{{"questions": {questions}, "state": {"[" * 500 + "]" * 500}}}'
    refused = httpx.post(
        f"{url}/v1/systemone", content=body, headers={"Content-Type": "application/json"}
    )
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "state"
    assert "depth" in refused.json()["error"]["message"]  # and not the number of tokens


def test_a_classifier_has_no_other_options_than_its_labels(classifier_url: str) -> None:
    criteria = {"ham": None, "spam": None}
    refused = decide(classifier_url, questions={"q": {**QUESTION, "criteria": criteria}})
    assert refused.status_code == 400
    assert refused.json()["error"]["message"].endswith("use ham, spam, other.")
