"""Labels, tokens, and the ancestors' question."""

from pathlib import Path

import httpx
import pytest

from serving.engine.messages import Classify
from tests.fake_engine import FakeEngine
from tests.front_end import fixed_reply, generated, serve


@pytest.fixture
def classifier(tmp_path: Path) -> FakeEngine:
    return FakeEngine(f"unix:{tmp_path}/e", labels=["ham", "spam"], stage="classify")


def test_a_text_is_classified(classifier: FakeEngine) -> None:
    with serve(classifier) as url:
        answer = httpx.post(f"{url}/classify", json={"input": "win now"}).json()
    (found,) = answer["data"]
    assert found["label"] == "ham"
    assert found["probabilities"] == {"ham": 0.5, "spam": 0.5}
    assert answer["usage"]["total_tokens"] == 3


def test_a_text_is_encoded_before_it_reaches_the_engine(classifier: FakeEngine) -> None:
    with serve(classifier) as url:
        httpx.post(f"{url}/classify", json={"input": ["win now", "x" * 20_000]})
    prompts = [
        message.prompt_ids for message in classifier.requests if isinstance(message, Classify)
    ]
    assert prompts == [list(b"win now"), list(b"x" * 1024)]  # no more is read


def test_a_classifier_predicts_a_label(classifier: FakeEngine) -> None:
    with serve(classifier) as url:
        answer = httpx.post(f"{url}/predict", json={"input_data": "win now"})
    assert answer.json() == {"prediction": "ham"}


def test_a_classifier_does_not_chat(classifier: FakeEngine) -> None:
    body = {"messages": [{"role": "user", "content": "Hello"}]}
    with serve(classifier) as url:
        answer = httpx.post(f"{url}/v1/chat/completions", json=body)
    assert answer.status_code == 400
    assert "/classify" in answer.json()["error"]["message"]


def test_a_language_model_predicts_what_follows(tmp_path: Path) -> None:
    engine = FakeEngine(f"unix:{tmp_path}/e", reply=fixed_reply("more"))
    with serve(engine) as url:
        answer = httpx.post(f"{url}/predict", json={"input_data": "Once"})
    assert answer.json() == {"prediction": "more"}
    assert generated(engine)[0].prompt_ids == list(b"Once")


def test_a_model_taught_to_chat_predicts_its_answer(tmp_path: Path) -> None:
    engine = FakeEngine(
        f"unix:{tmp_path}/e", reply=fixed_reply("Hi.\n### Instruction:"), template="alpaca"
    )
    with serve(engine) as url:
        answer = httpx.post(f"{url}/predict", json={"input_data": "Hello"})
    assert answer.json() == {"prediction": "Hi."}


def test_a_language_model_has_no_labels(tmp_path: Path) -> None:
    with serve(FakeEngine(f"unix:{tmp_path}/e")) as url:
        answer = httpx.post(f"{url}/classify", json={"input": "x"})
    assert answer.status_code == 400


def test_tokens_and_text_are_each_other_s_inverse(tmp_path: Path) -> None:
    with serve(FakeEngine(f"unix:{tmp_path}/e")) as url:
        tokens = httpx.post(f"{url}/tokenize", json={"prompt": "Grüße <|endoftext|>"}).json()
        same = httpx.post(f"{url}/v1/tokenize", json={"content": "Grüße <|endoftext|>"}).json()
        text = httpx.post(f"{url}/detokenize", json={"tokens": tokens["tokens"]}).json()
    assert tokens == same
    assert tokens["count"] == len("Grüße <|endoftext|>".encode())
    assert text["prompt"] == "Grüße <|endoftext|>"


def test_a_conversation_is_tokenized_as_the_chat_would_be(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    engine = FakeEngine(f"unix:{tmp_path}/e")
    with serve(engine) as url:
        tokens = httpx.post(f"{url}/tokenize", json={"messages": messages}).json()["tokens"]
        httpx.post(f"{url}/chat/completions", json={"messages": messages, "max_tokens": 1})
    assert generated(engine)[0].prompt_ids == tokens
