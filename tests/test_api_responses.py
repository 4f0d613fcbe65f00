"""POST /v1/responses, with the client of the OpenAI API and without."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from tests.fake_engine import FakeEngine
from tests.front_end import fixed_reply, generated, hang_up, serve

TEXT = "Grüße, 世界! 😀"
EVENTS = TypeAdapter[ResponseStreamEvent](ResponseStreamEvent)
ORDER = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
]


@pytest.fixture
def engine(tmp_path: Path) -> FakeEngine:
    return FakeEngine(f"unix:{tmp_path}/e", reply=fixed_reply(TEXT), template="alpaca")


@pytest.fixture
def url(engine: FakeEngine) -> Iterator[str]:
    with serve(engine) as address:
        yield address


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def respond(url: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/responses", json=body)


def events(text: str) -> list[Any]:
    """Parse a stream, each of whose events has its type as its name, and is a published one."""
    parsed = []
    for event in text.removesuffix("\n\n").split("\n\n"):
        name, data = event.split("\n")
        parsed.append(EVENTS.validate_python(json.loads(data.removeprefix("data: "))))
        assert name == f"event: {parsed[-1].type}"
    return parsed


def test_a_response_has_text_status_and_usage(client: openai.OpenAI) -> None:
    answer = client.responses.create(model="tiny", input="Hello", metadata={"a": "b"})
    assert answer.output_text == TEXT
    assert (answer.status, answer.incomplete_details, answer.metadata) == (
        "completed",
        None,
        {"a": "b"},
    )
    assert answer.usage
    assert answer.usage.output_tokens == len(TEXT.encode())
    assert answer.usage.input_tokens_details.cached_tokens == 0
    Response.model_validate(answer.to_dict())


def test_an_answer_that_reaches_the_limit_is_incomplete(client: openai.OpenAI) -> None:
    answer = client.responses.create(model="tiny", input="Hello", max_output_tokens=3)
    assert (answer.status, answer.output_text) == ("incomplete", "Gr\ufffd")
    assert answer.incomplete_details
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.output[0].status == "incomplete"  # type: ignore[union-attr]
    *_, last = client.responses.create(
        model="tiny", input="Hello", max_output_tokens=3, stream=True
    )
    assert last.type == "response.incomplete"
    assert last.response.incomplete_details == answer.incomplete_details


def test_the_events_of_a_stream_are_the_published_ones_in_order(url: str) -> None:
    found = events(respond(url, input="Hello", stream=True).text)
    assert list(dict.fromkeys(event.type for event in found)) == [*ORDER, "response.completed"]
    assert [event.sequence_number for event in found] == list(range(len(found)))
    whole = respond(url, input="Hello").json()
    last = found[-1].response.to_dict()
    for each in (whole, last):
        each["output"][0].pop("id")
        each["usage"].pop("tokens_per_second")
    assert {k: last[k] for k in last if k not in ("id", "created_at")} == {
        k: whole[k] for k in whole if k not in ("id", "created_at")
    }
    deltas = [event.delta for event in found if event.type == "response.output_text.delta"]
    assert "".join(deltas) == whole["output"][0]["content"][0]["text"] == TEXT


def test_the_client_s_stream_helper_ends_with_the_response(client: openai.OpenAI) -> None:
    with client.responses.stream(model="tiny", input="Hello") as stream:
        snapshots = [e.snapshot for e in stream if e.type == "response.output_text.delta"]
        answer = stream.get_final_response()
    assert snapshots[-1] == answer.output_text == TEXT


def test_the_client_s_types_are_read_back_as_input(
    client: openai.OpenAI, engine: FakeEngine
) -> None:
    first = client.responses.create(model="tiny", input="Hello")
    asked: Any = {"role": "user", "content": [{"type": "input_text", "text": "And?"}]}
    history: list[Any] = [{"role": "user", "content": "Hello"}, *first.output, asked]
    client.responses.create(model="tiny", input=history, instructions="Be brief.")
    client.chat.completions.create(
        model="tiny",
        messages=[
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": TEXT},
            {"role": "user", "content": "And?"},
        ],
    )
    _, response, chat = generated(engine)
    assert response.prompt_ids == chat.prompt_ids


def test_a_response_samples_as_a_chat_does(client: openai.OpenAI, engine: FakeEngine) -> None:
    shared: dict[str, Any] = {"model": "tiny", "temperature": 0.7, "top_p": 0.9}
    more = {"seed": 5, "top_k": 40, "stop": "!"}
    client.responses.create(input="Hello", max_output_tokens=7, **shared, extra_body=more)
    messages: Any = [{"role": "user", "content": "Hello"}]
    client.chat.completions.create(messages=messages, max_tokens=7, **shared, extra_body=more)
    response, chat = generated(engine)
    assert response.params == chat.params
    assert response.params.top_k == 40


def test_logprobs_are_included_on_request(url: str) -> None:
    body = {"input": "Hello", "include": ["message.output_text.logprobs"], "top_logprobs": 2}
    (part,) = respond(url, **body).json()["output"][0]["content"]
    assert len(part["logprobs"]) == len(TEXT.encode())
    assert len(part["logprobs"][0]["top_logprobs"]) == 2
    found = events(respond(url, **body, stream=True).text)
    deltas = [event for event in found if event.type == "response.output_text.delta"]
    streamed = [one.token for event in deltas for one in event.logprobs]
    assert streamed == [one["token"] for one in part["logprobs"]]


CALL = '{"name": "add", "arguments": {"a": "Grüße"}'
PARAMETERS = {"type": "object", "properties": {"a": {"type": "string"}}}
TOOLS: list[Any] = [
    {"type": "function", "name": "add", "parameters": PARAMETERS, "strict": True},
    {"type": "function", "name": "now"},
]
NESTED = '{"a":' * 300 + "1" + "}" * 300
CALL_ORDER = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.function_call_arguments.delta",
    "response.function_call_arguments.done",
    "response.output_item.done",
]


ADD, F = ({"type": "function", "name": name} for name in ("add", "f"))


@pytest.mark.parametrize(
    "choice", ["required", ADD, {"type": "allowed_tools", "mode": "required", "tools": [ADD]}]
)
def test_a_forced_answer_is_a_call(client: openai.OpenAI, engine: FakeEngine, choice: Any) -> None:
    engine.reply = fixed_reply(CALL)
    answer = client.responses.create(model="tiny", input="2", tools=TOOLS, tool_choice=choice)
    Response.model_validate(answer.to_dict())
    (call,) = answer.output
    assert call.type == "function_call"
    assert (call.name, call.arguments, call.status) == ("add", '{"a": "Grüße"}', "completed")
    assert call.call_id
    assert answer.to_dict()["tool_choice"] == choice
    assert [(tool.type, tool.name) for tool in answer.tools] == [  # type: ignore[union-attr]
        ("function", "add"),
        ("function", "now"),
    ]


@pytest.mark.parametrize(
    ("choice", "of_chat"),
    [
        ("required", "required"),
        (ADD, {"type": "function", "function": {"name": "add"}}),
        (
            {"type": "allowed_tools", "mode": "required", "tools": [ADD]},
            {
                "type": "allowed_tools",
                "allowed_tools": {
                    "mode": "required",
                    "tools": [{"type": "function", "function": {"name": "add"}}],
                },
            },
        ),
    ],
)
def test_a_call_follows_its_grammar_as_in_a_chat(
    url: str, engine: FakeEngine, choice: Any, of_chat: Any
) -> None:
    engine.reply = fixed_reply(CALL)
    respond(url, input="2", tools=TOOLS, tool_choice=choice)
    functions = [{k: v for k, v in tool.items() if k != "type"} for tool in TOOLS]
    chat = {
        "messages": [{"role": "user", "content": "2"}],
        "tools": [{"type": "function", "function": function} for function in functions],
        "tool_choice": of_chat,
    }
    httpx.post(f"{url}/v1/chat/completions", json=chat)
    first, second = generated(engine)
    assert first.prompt_ids == second.prompt_ids
    assert first.params.grammar == second.params.grammar != ""


@pytest.mark.parametrize("limit", [None, 40, 5])
def test_the_events_of_a_call_are_the_published_ones_in_order(
    url: str, engine: FakeEngine, limit: int | None
) -> None:
    engine.reply = fixed_reply(CALL)
    body = {"input": "2", "tools": TOOLS, "tool_choice": "required", "max_output_tokens": limit}
    found = events(respond(url, **body, stream=True).text)
    order = [kind for kind in CALL_ORDER if limit != 5 or not kind.endswith("delta")]
    end = "incomplete" if limit else "completed"
    assert list(dict.fromkeys(event.type for event in found)) == [*order, f"response.{end}"]
    assert [event.sequence_number for event in found] == list(range(len(found)))
    (whole,) = respond(url, **body).json()["output"]
    added, done, (last,) = found[2].item, found[-2].item, found[-1].response.output
    assert (added.name, added.arguments, added.status) == (whole["name"], "", "in_progress")
    assert (done.name, done.arguments, done.status) == (whole["name"], whole["arguments"], end)
    assert last == done
    assert {e.item_id for e in found if "arguments" in e.type} == {added.id}
    deltas = [event.delta for event in found if event.type.endswith("delta")]
    assert "".join(deltas) == found[-3].arguments == whole["arguments"]


def test_the_client_s_stream_helper_assembles_a_call(
    client: openai.OpenAI, engine: FakeEngine
) -> None:
    engine.reply = fixed_reply(CALL)
    options: Any = {"model": "tiny", "input": "2", "tools": TOOLS, "tool_choice": "required"}
    with client.responses.stream(**options) as stream:
        (call,) = stream.get_final_response().output
    assert (call.name, call.arguments) == ("add", '{"a": "Grüße"}')  # type: ignore[union-attr]


def test_calls_and_their_outputs_are_read_back_as_those_of_chats(
    client: openai.OpenAI, engine: FakeEngine
) -> None:
    engine.reply = fixed_reply(CALL)
    question: Any = {"role": "user", "content": "2"}
    first = client.responses.create(
        model="tiny", input=[question], tools=TOOLS, tool_choice="required"
    )
    (call,) = first.output
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "3"}  # type: ignore[union-attr]
    history: Any = [question, call, output]
    client.responses.create(model="tiny", input=history, tools=TOOLS)
    function = {"name": "add", "arguments": '{"a": "Grüße"}'}
    messages: Any = [
        question,
        {
            "role": "assistant",
            "tool_calls": [{"id": "1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "3"},
    ]
    client.chat.completions.create(model="tiny", messages=messages)
    _, response, chat = generated(engine)
    assert response.prompt_ids == chat.prompt_ids
    counted = client.responses.input_tokens.count(model="tiny", input=history, tools=TOOLS)
    assert counted.input_tokens == len(chat.prompt_ids)


def test_calls_are_of_the_assistant_s_message_before_them(
    client: openai.OpenAI, engine: FakeEngine
) -> None:
    begun: list[Any] = [{"role": "user", "content": "2"}, {"role": "assistant", "content": "Sure."}]
    function = {"name": "add", "arguments": "{}"}
    calls = [{"type": "function_call", "call_id": i, **function} for i in "12"]
    outputs = [{"type": "function_call_output", "call_id": i, "output": "3"} for i in "12"]
    history: Any = [*begun, *calls, *outputs]
    counted = client.responses.input_tokens.count(model="tiny", input=history)
    begun[1]["tool_calls"] = [{"id": i, "type": "function", "function": function} for i in "12"]
    answers: Any = [{"role": "tool", "tool_call_id": i, "content": "3"} for i in "12"]
    client.responses.create(model="tiny", input=history)
    client.chat.completions.create(model="tiny", messages=[*begun, *answers])
    response, chat = generated(engine)
    assert response.prompt_ids == chat.prompt_ids
    assert counted.input_tokens == len(chat.prompt_ids)


class Sum(BaseModel):
    total: int


def test_a_schema_is_followed_as_in_a_chat(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.reply = fixed_reply('{"total": 5}')
    answer = client.responses.parse(model="tiny", input="2 + 3", text_format=Sum)
    assert answer.output_parsed == Sum(total=5)
    messages: Any = [{"role": "user", "content": "2 + 3"}]
    client.chat.completions.parse(model="tiny", messages=messages, response_format=Sum)
    response, chat = generated(engine)
    assert response.params.grammar == chat.params.grammar != ""


@pytest.mark.parametrize(
    ("body", "param", "reason"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "whole conversation"),
        ({"conversation": "conv_1"}, "conversation", "whole conversation"),
        ({"background": True}, "background", "whole conversation"),
        ({"tools": [{"type": "web_search"}]}, "tools", "'function'"),
        ({"tool_choice": "required"}, "tool_choice", "tools"),
        ({"tools": TOOLS, "tool_choice": F}, "tool_choice", "'f'"),
        (
            {
                "tools": TOOLS,
                "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [ADD, F]},
            },
            "tool_choice",
            "'f'",
        ),
        ({"tools": TOOLS * 2}, "tools", "same name"),
        ({"tools": [{**TOOLS[0], "parameters": json.loads(NESTED)}]}, "tools", "depth"),
        ({"truncation": "auto"}, "truncation", "use disabled"),
        ({"n": 2}, "n", "not supported"),
        ({"text": {"format": {"type": "grammar"}}}, "text", "json_schema"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format", "text.format"),
        ({"input": []}, "input", "at least 1"),
        ({"input": None}, "input", "valid"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input", "'function_call'"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input", "'reasoning'"),
        ({"input": [{"content": "x"}]}, "input", "without a role"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input",
            "'input_image'",
        ),
        ({"input": "x" * 2000}, "input", "tokens"),
    ],
)
def test_what_is_not_supported_is_refused(
    url: str, engine: FakeEngine, body: dict[str, Any], param: str, reason: str
) -> None:
    answer = respond(url, **{"input": "Hello", **body})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert reason in answer.json()["error"]["message"]
    assert generated(engine) == []


def test_an_input_may_have_as_many_items_as_a_list(url: str) -> None:
    items = [{"role": "system", "content": ""}] * 2047 + [{"role": "user", "content": "Hello"}]
    assert respond(url, input=items, instructions="Go.").status_code == 200


def test_what_changes_nothing_is_accepted(url: str) -> None:
    body = {
        "store": True,
        "background": False,
        "tools": [],
        "tool_choice": "auto",
        "text": {"format": {"type": "text"}, "verbosity": "low"},
        "truncation": "disabled",
        "reasoning": {"effort": "low"},
        "prompt_cache_key": "k",
        "safety_identifier": "s",
        "previous_response_id": None,
        "instructions": "\x00text\x00",
        "include": [],
    }
    answer = respond(url, input="Hello", **body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["instructions"] == "\x00text\x00"


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "r1"), ("DELETE", "r1"), ("POST", "r1/cancel"), ("GET", "r1/input_items")],
)
def test_no_response_is_kept(url: str, method: str, path: str) -> None:
    body: Any = {} if method == "POST" else None
    answer = httpx.request(method, f"{url}/v1/responses/{path}", json=body)
    assert answer.status_code == 400
    assert "whole conversation" in answer.json()["error"]["message"]


def test_the_tokens_of_an_input_are_counted(client: openai.OpenAI, engine: FakeEngine) -> None:
    counted = client.responses.input_tokens.count(model="tiny", input="Hello", instructions="Go.")
    client.responses.create(model="tiny", input="Hello", instructions="Go.")
    assert counted.input_tokens == len(generated(engine)[0].prompt_ids)
    long = client.responses.input_tokens.count(model="tiny", input="x" * 3000)
    assert long.input_tokens > 3000


def test_an_error_on_the_way_ends_the_stream(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.reply, engine.delay_s = fixed_reply("x" * 200), 0.02
    stream = client.responses.create(model="tiny", input="Hello", stream=True)
    assert next(stream).type == "response.created"
    hang_up(engine)
    with pytest.raises(openai.APIError, match="engine"):
        list(stream)


def test_the_events_of_an_error_are_published_ones(url: str, engine: FakeEngine) -> None:
    engine.reply, engine.delay_s = fixed_reply("x" * 200), 0.02
    body = {"input": "Hello", "stream": True}
    with httpx.stream("POST", f"{url}/v1/responses", json=body) as answer:
        chunks = answer.iter_text()
        text = next(chunks)
        hang_up(engine)
        *_, error, failed = events(text + "".join(chunks))
    assert (error.type, failed.type) == ("error", "response.failed")
    assert error.message == failed.response.error.message
    assert failed.sequence_number == error.sequence_number + 1
