"""Calls of functions in chats, with the client of the OpenAI API."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from nanogpt.tokenizer import byte_tokenizer
from tests.fake_engine import FakeEngine
from tests.front_end import fixed_reply, generated, serve
from tests.test_api_structured import follows

HELLO: Any = [{"role": "user", "content": "Hello"}]
CALL = '{"name": "get weather", "arguments": {"city": "Zürich"}'


def tool(name: str, **about: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **about}}


CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS: Any = [tool("get weather", description="Of a city.", parameters=CITY), tool("now")]
NAMED: Any = {"type": "function", "function": {"name": "get weather"}}


@pytest.fixture
def engine(tmp_path: Path) -> FakeEngine:
    return FakeEngine(f"unix:{tmp_path}/e", reply=fixed_reply(CALL))


@pytest.fixture
def url(engine: FakeEngine) -> Iterator[str]:
    with serve(engine) as address:
        yield address


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def post(url: str, **fields: Any) -> httpx.Response:
    body = {"messages": HELLO, "tools": TOOLS, "tool_choice": "required", **fields}
    headers = {"Content-Type": "application/json"}
    content = json.dumps(body)
    return httpx.post(f"{url}/v1/chat/completions", content=content, headers=headers, timeout=60)


def chunks(answer: httpx.Response) -> list[dict[str, Any]]:
    """Return the choices of a stream's chunks."""
    lines = answer.text.removesuffix("\n\ndata: [DONE]\n\n").split("\n\n")
    return [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines]


def call_in(choice: dict[str, Any]) -> tuple[str, str]:
    """Return the name and the arguments of a whole choice's only call."""
    (call,) = choice["message"]["tool_calls"]
    return call["function"]["name"], call["function"]["arguments"]


@pytest.mark.parametrize(("choice", "reason"), [("required", "tool_calls"), (NAMED, "stop")])
def test_a_forced_answer_is_a_call_with_the_reason_that_openai_gives(
    client: openai.OpenAI, choice: Any, reason: str
) -> None:
    answer: Any = client.chat.completions.create(
        model="tiny", messages=HELLO, tools=TOOLS, tool_choice=choice, parallel_tool_calls=True
    )
    (call,) = answer.choices[0].message.tool_calls
    assert (call.type, call.function.name) == ("function", "get weather")
    assert json.loads(call.function.arguments) == {"city": "Zürich"}
    assert answer.choices[0].message.content is None
    assert answer.choices[0].finish_reason == reason


def test_a_stream_has_the_name_first_then_the_arguments_then_the_reason(url: str) -> None:
    role, first, *others, last = chunks(post(url, stream=True))
    assert role["delta"] == {"role": "assistant", "content": None}
    (call,) = first["delta"]["tool_calls"]
    assert (call["index"], call["type"], call["function"]["name"]) == (0, "function", "get weather")
    later = [choice["delta"]["tool_calls"][0] for choice in others]
    assert later
    assert all(one.keys() == {"index", "function"} for one in later)
    assert all(one["function"].keys() == {"arguments"} for one in later)
    parts = [one["function"]["arguments"] for one in [call, *later]]
    assert json.loads("".join(parts)) == {"city": "Zürich"}
    assert (last["delta"], last["finish_reason"]) == ({}, "tool_calls")


def test_the_client_assembles_a_stream_to_the_whole_call(client: openai.OpenAI) -> None:
    options: Any = {"model": "tiny", "messages": HELLO, "tools": TOOLS, "tool_choice": "required"}
    options |= {"n": 2, "logprobs": True, "top_logprobs": 1}
    whole: Any = client.chat.completions.create(**options)
    with client.chat.completions.stream(**options) as stream:
        streamed: Any = stream.get_final_completion()
    for ours, theirs in zip(whole.choices, streamed.choices, strict=True):
        (call,), (other,) = ours.message.tool_calls, theirs.message.tool_calls
        assert other.function.arguments == call.function.arguments
        assert theirs.finish_reason == ours.finish_reason == "tool_calls"
        assert theirs.logprobs.content == ours.logprobs.content
    assert len({choice.message.tool_calls[0].id for choice in whole.choices}) == 2


@pytest.mark.parametrize("fields", [{}, {"tool_choice": NAMED}, {"max_tokens": 40}])
def test_calls_are_the_client_s_own_types(url: str, fields: dict[str, Any]) -> None:
    fields |= {"n": 2, "logprobs": True, "top_logprobs": 1}
    ChatCompletion.model_validate(post(url, **fields).json(), strict=True)
    for line in post(url, stream=True, **fields).text.split("\n\n")[:-2]:
        ChatCompletionChunk.model_validate_json(line.removeprefix("data: "), strict=True)


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_max_tokens_cuts_has_the_reason_length(url: str, stream: bool) -> None:
    answer = post(url, max_tokens=len(CALL) - 4, stream=stream)
    if stream:
        *parts, last = [choice["delta"] for choice in chunks(answer)[1:]]
        calls = [part["tool_calls"][0]["function"]["arguments"] for part in parts]
        assert ("".join(calls), last) == ('{"city": "Zür', {})
        assert chunks(answer)[-1]["finish_reason"] == "length"
    else:
        (choice,) = answer.json()["choices"]
        assert call_in(choice) == ("get weather", '{"city": "Zür')
        assert choice["finish_reason"] == "length"


def test_a_call_without_a_whole_name_is_left_out(url: str) -> None:
    (choice,) = post(url, max_tokens=12).json()["choices"]
    assert (choice["message"]["tool_calls"], choice["finish_reason"]) == ([], "length")
    deltas = [choice["delta"] for choice in chunks(post(url, max_tokens=12, stream=True))]
    assert deltas == [{"role": "assistant", "content": None}, {}]


SCHEMA = {
    "properties": {"child": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
    "required": ["child"],
    "additionalProperties": False,
    "$defs": {"node": {"type": "object", "properties": {"n": {"type": "integer"}}}},
}


@pytest.mark.parametrize(
    ("choice", "texts", "others"),
    [
        (
            "required",
            ['"arguments": {"child": null}', '"arguments": {"child":{"n": 3}}'],
            ['"arguments": {"child": 5}', '"arguments": {}', '"arguments": null'],
        ),
        ({"type": "function", "function": {"name": "now"}}, [], ['"arguments": {"child": null}']),
    ],
)
def test_arguments_follow_the_schema_of_their_function(
    engine: FakeEngine, url: str, choice: Any, texts: list[str], others: list[str]
) -> None:
    tools = [tool("tree", parameters=SCHEMA), tool("now"), tool('"', parameters={"title": "any"})]
    assert post(url, tools=tools, tool_choice=choice).status_code == 200
    grammar = generated(engine)[-1].params.grammar
    assert follows(grammar, '{"name": "now", "arguments": {}')
    assert not follows(grammar, '{"name": "now", "arguments": {"a": 1}')
    assert not follows(grammar, '{"name": "then", "arguments": {}')
    assert follows(grammar, '{"name": "\\"", "arguments": {"a": [1]}') == (choice == "required")
    assert all(follows(grammar, f'{{"name": "tree", {text}') for text in texts)
    assert not any(follows(grammar, f'{{"name": "tree", {text}') for text in others)


def allowed(mode: str, *names: str) -> dict[str, Any]:
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [*map(tool, names)]}}


def test_one_of_the_allowed_tools_is_called_where_they_are_required(
    engine: FakeEngine, url: str
) -> None:
    choice = allowed("required", "get weather", "then")
    (answer,) = post(url, tools=[*TOOLS, tool("then")], tool_choice=choice).json()["choices"]
    assert (call_in(answer)[0], answer["finish_reason"]) == ("get weather", "tool_calls")
    grammar = generated(engine)[-1].params.grammar
    assert follows(grammar, CALL)
    assert follows(grammar, '{"name": "then", "arguments": {}')
    assert not follows(grammar, '{"name": "now", "arguments": {}')


@pytest.mark.parametrize("choice", [None, "auto", "none", allowed("auto", "now")])
def test_an_answer_that_need_not_be_a_call_is_text(
    engine: FakeEngine, url: str, choice: Any
) -> None:
    (answer,) = post(url, tool_choice=choice).json()["choices"]
    assert answer["message"]["content"] == CALL
    assert generated(engine)[-1].params.grammar == ""


ENDLESS = {"properties": {"a": {"$ref": "#"}}, "required": ["a"]}
WIDE = {"properties": {f"k{i}": {"type": "null"} for i in range(1500)}}


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"tools": None}, "tool_choice", "needs a tool among tools, which has none"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "then"}}},
            "tool_choice",
            "needs 'then' among tools, which has get weather, now",
        ),
        ({"tool_choice": "always"}, "tool_choice", "'required'"),
        ({"tool_choice": {"type": "custom"}}, "tool_choice", "'allowed_tools'"),
        (
            {"tool_choice": {"type": "function", "name": "now"}},  # as in the Responses API
            "tool_choice",
            "for 'tool_choice': the field 'function' is missing.",
        ),
        ({"tool_choice": allowed("auto", "now", "then")}, "tool_choice", "needs 'then'"),
        ({"tool_choice": allowed("required", "then")}, "tool_choice", "needs 'then'"),
        ({"tool_choice": allowed("required")}, "tool_choice", "at least 1"),
        ({"tool_choice": allowed("none", "now")}, "tool_choice", "'required'"),
        ({"tool_choice": allowed("required", "now"), "stop": ["x"]}, "stop", "could cut"),
        ({"tools": [*TOOLS, tool("now")]}, "tools", "same name"),
        ({"tools": [*TOOLS, tool("now")], "tool_choice": "auto"}, "tools", "same name"),
        ({"tools": [{"type": "web_search"}]}, "tools", "'function'"),
        ({"tools": [tool("")]}, "tools", "at least 1"),
        ({"tools": [tool("x", parameters={"not": {}})]}, "tools", "not"),
        ({"tools": [*TOOLS, tool("x", parameters=ENDLESS)]}, "tools", "has an end"),
        ({"tools": [*TOOLS, tool("x", parameters=WIDE)]}, "tools", "items"),
        ({"tools": [tool("x", parameters={"enum": ["x" * 70_000]})]}, "tools", "characters"),
        ({"guided_regex": "a"}, "guided_regex", "tools"),
        ({"stop": ["city"]}, "stop", "could cut a forced call"),
    ],
)
def test_what_cannot_be_forced_is_refused_in_a_sentence(
    engine: FakeEngine, url: str, fields: dict[str, Any], param: str, message: str
) -> None:
    answer = post(url, **fields)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert message in answer.json()["error"]["message"]
    assert generated(engine) == []


def test_the_format_of_texts_has_no_effect_on_a_forced_call(engine: FakeEngine, url: str) -> None:
    for fields in ({}, {"response_format": {"type": "json_object"}}):
        assert post(url, **fields).status_code == 200
    plain, formatted = generated(engine)
    assert formatted.params.grammar == plain.params.grammar != ""


def test_calls_and_their_outputs_are_text_in_a_template_without_tools(
    client: openai.OpenAI, engine: FakeEngine
) -> None:
    answer: Any = client.chat.completions.create(
        model="tiny", messages=HELLO, tools=TOOLS, tool_choice="required"
    )
    message = answer.choices[0].message
    output: Any = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "Sunny."}
    client.chat.completions.create(model="tiny", messages=[*HELLO, message, output], tools=TOOLS)
    first, second = [byte_tokenizer().decode(one.prompt_ids) for one in generated(engine)]
    assert second == first + CALL + "}\n\nUser:\nSunny.\n\nAssistant:\n"


def test_a_call_cannot_be_continued(url: str) -> None:
    call = {"type": "function", "function": {"name": "now", "arguments": "{}"}}
    begun = [*HELLO, {"role": "assistant", "tool_calls": [call]}]
    answer = post(url, messages=begun, continue_final_message=True)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages")
