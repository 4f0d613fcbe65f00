"""Completions of texts and of token ids."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from nanogpt.tokenizer import byte_tokenizer
from tests.fake_engine import FakeEngine
from tests.front_end import fixed_reply, generated, serve

EOT = byte_tokenizer().eot_id


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> FakeEngine:
    path = tmp_path_factory.mktemp("engine") / "e"
    return FakeEngine(f"unix:{path}", reply=fixed_reply(b"a\xc3\xa4b"), block_size=64)


@pytest.fixture(scope="module")
def url(engine: FakeEngine) -> Iterator[str]:
    with serve(engine) as address:
        yield address


def complete(url: str, **body: object) -> Any:
    return httpx.post(f"{url}/v1/completions", json=body).json()


def choice(url: str, **body: object) -> Any:
    return complete(url, **body)["choices"][0]


def test_a_text_is_read_as_it_is(url: str, engine: FakeEngine) -> None:
    assert choice(url, prompt="hi")["text"] == "aäb"
    assert generated(engine)[-1].prompt_ids == [*b"hi"]


@pytest.mark.parametrize("prompt", ["", [""], [[]], None])
def test_an_empty_prompt_begins_a_document(url: str, engine: FakeEngine, prompt: object) -> None:
    usage = complete(url, prompt=prompt)["usage"]
    assert generated(engine)[-1].prompt_ids == [EOT]
    assert usage["prompt_tokens"] == 1


def test_an_empty_prompt_without_special_tokens_is_refused(url: str, engine: FakeEngine) -> None:
    assert complete(url, prompt=["a", ""], add_special_tokens=False)["error"]["param"] == "prompt"


def test_ids_are_taken_as_they_are(url: str, engine: FakeEngine) -> None:
    complete(url, prompt=[104, 105])
    assert generated(engine)[-1].prompt_ids == [104, 105]


@pytest.mark.parametrize("prompt", [["x", "y"], [[120], [121]]])
def test_several_prompts_have_an_answer_each_in_their_order(url: str, prompt: object) -> None:
    answers = complete(url, prompt=prompt, n=2, echo=True)["choices"]
    assert [a["text"] for a in answers] == ["xaäb", "xaäb", "yaäb", "yaäb"]
    assert [a["index"] for a in answers] == [0, 1, 2, 3]


def test_a_prompt_counts_once_however_many_answers_it_has(url: str) -> None:
    usage = complete(url, prompt=["x", "xyz"], n=2)["usage"]
    assert usage["prompt_tokens"] == 1 + 3
    assert usage["completion_tokens"] == 4 * 4


def test_sixteen_tokens_are_the_default(url: str, engine: FakeEngine) -> None:
    complete(url, prompt="hi")
    assert generated(engine)[-1].params.max_tokens == 16


def test_the_context_s_end_ends_the_answer(url: str, engine: FakeEngine) -> None:
    complete(url, prompt=[65] * 60, max_tokens=1000)
    assert generated(engine)[-1].params.max_tokens == 4


def test_a_prompt_without_room_for_a_token_is_refused(url: str) -> None:
    error = complete(url, prompt=[65] * 64)["error"]
    assert error["code"] == "context_length_exceeded"
    assert "64 tokens" in error["message"]


def test_echo_puts_the_prompt_before_the_answer(url: str) -> None:
    found = choice(url, prompt="hi", echo=True, logprobs=1)
    assert found["text"] == "hiaäb"
    logprobs = found["logprobs"]
    assert logprobs["tokens"] == ["h", "i", "a", "bytes:\\xc3", "bytes:\\xa4", "b"]
    assert logprobs["token_logprobs"] == [None, *[-1.0] * 5]
    assert logprobs["text_offset"] == [0, 1, 2, 3, 3, 4]
    assert logprobs["top_logprobs"][0] is None


def test_a_prompt_is_scored_without_an_answer(url: str, engine: FakeEngine) -> None:
    n_before = len(generated(engine))
    found = choice(url, prompt=[104, 105], echo=True, logprobs=0, max_tokens=0)
    assert found["text"] == "hi"
    assert found["logprobs"]["token_logprobs"] == [None, -1.0]
    assert found["finish_reason"] == "length"
    assert len(generated(engine)) == n_before


def test_the_token_itself_is_among_the_likeliest(url: str) -> None:
    top = choice(url, prompt="hi", logprobs=2, max_tokens=1)["logprobs"]["top_logprobs"]
    assert set(top[0]) == {"\x00", "\x01", "a"}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": [1, 273]}, "prompt"),
        ({"prompt": [[]] * 65}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"n": 9}, "n"),
        ({"n": 0}, "n"),
        ({"n": True}, "n"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"repetition_penalty": 1e-45}, "repetition_penalty"),
        ({"max_tokens": -2}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": "a" * 257}, "stop"),
        ({"seed": 2**64}, "seed"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"273": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"suffix": "end"}, "suffix"),
        ({"model": 5}, "model"),
        ({"model": "unknown"}, "model"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(
    url: str, body: dict[str, object], param: str
) -> None:
    error = complete(url, **body)["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert error["message"]


@pytest.mark.parametrize(
    ("prompt", "why"),
    [
        ([-1], "Input should be greater than or equal to 0"),
        ([[1], [-1]], "Input should be greater than or equal to 0"),
        (["a"] * 2049, "List should have at most 2048 items after validation, not 2049"),
    ],
)
def test_the_reason_is_of_the_prompts_own_type(url: str, prompt: object, why: str) -> None:
    assert complete(url, prompt=prompt)["error"]["message"] == f"Invalid value for 'prompt': {why}."


@pytest.mark.parametrize(
    "body",
    [{"top_p": 0}, {"temperature": 1e-46}, {"repetition_penalty": 0.01}, {"top_k": 10**400}],
    ids=lambda body: next(iter(body)),
)
def test_the_ends_of_a_range_are_in_it(url: str, body: dict[str, object]) -> None:
    assert choice(url, prompt="hi", **body)["finish_reason"] == "stop"


def test_a_whole_number_may_be_written_as_a_float(url: str) -> None:
    assert choice(url, prompt="hi", max_tokens=1.0)["text"] == "a"


def test_lone_surrogates_are_read_as_replacement_characters(url: str, engine: FakeEngine) -> None:
    raw = b'{"prompt": "\\ud800", "echo": true}'
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(f"{url}/v1/completions", content=raw, headers=headers)
    assert answer.status_code == 200
    assert generated(engine)[-1].prompt_ids == [*"\ufffd".encode()]


def test_max_tokens_of_minus_one_fills_the_context(url: str, engine: FakeEngine) -> None:
    complete(url, prompt="hi", max_tokens=-1)
    assert generated(engine)[-1].params.max_tokens == 62


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tool_choice", "required"),
        ("tool_choice", {"type": "function", "function": {"name": "f"}}),
        ("function_call", {"name": "f"}),
        ("guided_grammar", "root ::= 'a'"),
        ("grammar", "root ::= 'a'"),
        ("json_schema", {"type": "object"}),
        ("best_of", 2),
        ("use_beam_search", True),
        ("min_tokens", 5),
        ("bad_words", ["a"]),
        ("allowed_token_ids", [1]),
        ("prompt_logprobs", 0),
        ("truncate_prompt_tokens", 10),
        ("modalities", ["text", "audio"]),
    ],
)
def test_what_must_change_the_answer_and_cannot_is_refused_by_name(
    url: str, path: str, name: str, value: object
) -> None:
    body = {"prompt": "x", "messages": [{"role": "user", "content": "x"}], name: value}
    answer = httpx.post(url + path, json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == name
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_parameters_without_effect_are_accepted(url: str, path: str) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    neutral: list[dict[str, Any]] = [
        {"tools": [tool], "tool_choice": "auto", "parallel_tool_calls": True},
        {"tool_choice": "none", "function_call": "auto", "functions": []},
        {"response_format": {"type": "text"}, "best_of": 1, "min_tokens": 0, "bad_words": []},
        {"modalities": ["text"], "grammar": "", "use_beam_search": False, "length_penalty": 1.0},
        {"guided_json": None, "typical_p": 1, "user": "me", "metadata": {"a": "b"}, "store": True},
    ]
    for fields in neutral:
        body = {"prompt": "x", "messages": [{"role": "user", "content": "x"}], **fields}
        assert httpx.post(url + path, json=body).status_code == 200, fields
