"""The routes of the Responses API: chats in another format. Nothing is kept between requests.

An event of a stream has its type as its name, and a number; the last is `response.completed`,
`response.incomplete` or, after an `error`, `response.failed`.
"""

import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response

from serving.api.call import Call, check_supported, json_response
from serving.api.errors import ApiError
from serving.api.generation import Choice, Piece
from serving.api.models import ServedModel
from serving.api.schemas import (
    UNSUPPORTED,
    AllowedFunctions,
    ChatMessage,
    ChatRequest,
    ContentPart,
    Function,
    InputItem,
    ResponsesRequest,
    SamplingRequest,
    TokenizeRequest,
    Tool,
)
from serving.api.stream import STREAMS, ChatFormat, frame
from serving.api.tools import call_of, functions_to_call
from serving.api.v1 import chat_choices

STATELESS = "this server keeps no responses: send the whole conversation as input"
STATEFUL = ("previous_response_id", "conversation", "background", "prompt")
NEUTRAL: dict[str, tuple[Any, ...]] = {"truncation": ("disabled",)}
PARAMS = {"messages": "input", "response_format": "text.format"}  # of a chat, and their names here
PARTS = dict.fromkeys(("input_text", "output_text"), "text")
LOGPROBS = "message.output_text.logprobs"  # of `include`
REPEATED = {"instructions", "max_output_tokens", "metadata", "temperature", "top_logprobs", "top_p"}

router = APIRouter()


@router.post("/responses", responses=STREAMS)
async def responses(request: Request, body: ResponsesRequest) -> Response:
    """Reply to a text or a conversation."""
    call = Call(request)
    with _own_params():
        chat = _as_chat(body)
        model = await call.language_model(chat)
        functions = functions_to_call(chat)
        choices = await chat_choices(call, model, chat, functions)
    form = (ResponsesCallFormat if functions else ResponsesFormat)(model, choices, body)
    return await call.answer(form, body.stream)


@router.post("/responses/input_tokens")
async def input_tokens(request: Request, body: ResponsesRequest) -> Response:
    """Return the number of tokens that a response's input has."""
    with _own_params():
        chat = _as_chat(body)
        model = await Call(request).language_model(chat)
        shared = {name: getattr(chat, name) for name in ("messages", "tools", "tool_choice")}
        ids = await model.encode_chat(TokenizeRequest(**shared))
    return json_response({"object": "response.input_tokens", "input_tokens": len(ids)})


@router.api_route(
    "/responses/{rest:path}", methods=["GET", "POST", "DELETE"], include_in_schema=False
)
async def kept_response(rest: str) -> Response:
    """Refuse what needs a response that was kept."""
    raise ApiError(400, f"There is no response {rest[:200]!r}; {STATELESS}.", param="response_id")


class ResponsesFormat(ChatFormat):
    """The objects and events of `/v1/responses`, whose output is one message of one text."""

    prefix, kinds = "resp", ("response", "response")

    def __init__(
        self, model: ServedModel, choices: Sequence[Choice], body: ResponsesRequest
    ) -> None:
        super().__init__(model, choices, include_usage=False)
        self._answer, self._n_events = Piece(0, ""), 0
        item_id = f"msg-{secrets.token_hex(12)}"
        self._message = {"id": item_id, "type": "message"}
        self._place: Any = {"item_id": item_id, "output_index": 0, "content_index": 0}
        text_format = body.text_format.model_dump(exclude_none=True, by_alias=True)
        self.head |= {
            **dict.fromkeys(("background", "store"), False),
            **body.model_dump(include=REPEATED),
            "created_at": self.head.pop("created"),
            "error": None,
            "parallel_tool_calls": True,
            "text": {"format": text_format},
            "tool_choice": "auto",
            **body.model_dump(include={"tool_choice"}, exclude_none=True),
            "tools": [tool.model_dump(exclude={"arguments"}) for tool in body.tools or ()],
        }

    def opening(self) -> bytes:
        item, part = self._item("in_progress"), self._part(self._answer)
        frames = self._beginning() + self._event("output_item.added", item=item, output_index=0)
        return frames + self._event("content_part.added", part=part, **self._place)

    def frames(self, piece: Piece) -> bytes:
        self._answer.add(piece)
        frames = b""
        if piece.text or piece.tokens:
            new = {"delta": piece.text, "logprobs": self._part(piece)["logprobs"]}
            frames = self._event("output_text.delta", **new, **self._place)
        if piece.finish_reason is None:
            return frames
        item, part = self.choice(self._answer), self._part(self._answer)
        text = {"text": part["text"], "logprobs": part["logprobs"]}
        frames += self._event("output_text.done", **text, **self._place)
        frames += self._event("content_part.done", part=part, **self._place)
        return frames + self._event("output_item.done", item=item, output_index=0)

    def closing(self, usage: dict[str, Any]) -> bytes:
        response = self.envelope([self.choice(self._answer)], usage)
        return self._event(response["status"], response=response)

    def failure(self, error: ApiError) -> bytes:
        about = error.content()["error"]  # clients of the OpenAI API raise at an object of that
        own = {"code": about["code"] or "server_error", "param": about["param"], "error": about}
        frames = self._event("error", "", message=about["message"], **own)
        failed = {"error": {"code": "server_error", "message": about["message"]}}
        return frames + self._event("failed", response={**self._response("failed"), **failed})

    def choice(self, answer: Piece) -> dict[str, Any]:
        """Return the message of the output."""
        return self._item(_status(answer), self._part(answer))

    def envelope(self, content: list[Any], usage: dict[str, Any]) -> dict[str, Any]:
        own = {
            k.replace("prompt", "input").replace("completion", "output"): usage[k] for k in usage
        }
        cached = own["input_tokens_details"]["cached_tokens"]
        written = {"cached_tokens": cached, "cache_write_tokens": own["input_tokens"] - cached}
        own["input_tokens_details"] = written
        return self._response(_status(self.choices[0]), content, own)

    def _beginning(self) -> bytes:
        response = self._response("in_progress")
        frames = self._event("created", response=response)
        return frames + self._event("in_progress", response=response)

    def _response(
        self, status: str, output: Sequence[Any] = (), usage: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return the response; nothing after its output is of the request."""
        reason = {"reason": "max_output_tokens"} if status == "incomplete" else None
        state = {"status": status, "incomplete_details": reason}
        return {**self.head, **state, "output": output, "usage": usage}

    def _item(self, status: str, *content: dict[str, Any]) -> dict[str, Any]:
        return {**self._message, "role": "assistant", "status": status, "content": content}

    def _part(self, answer: Piece) -> dict[str, Any]:
        logprobs = self.logprobs(answer.tokens)["content"]
        return {"type": "output_text", "text": answer.text, "annotations": [], "logprobs": logprobs}

    def _event(self, kind: str, prefix: str = "response.", **fields: Any) -> bytes:
        event = {"type": prefix + kind, "sequence_number": self._n_events, **fields}
        self._n_events += 1
        return f"event: {prefix}{kind}\n".encode() + frame(event)


class ResponsesCallFormat(ResponsesFormat):
    """The objects and events of a response whose output is one call."""

    def opening(self) -> bytes:
        return self._beginning()

    def frames(self, piece: Piece) -> bytes:
        had_name, before = call_of(self._answer.text)
        self._answer.add(piece)
        item, frames = self.choice(self._answer), b""
        place = {"item_id": item["id"], "output_index": 0}
        if not had_name and (item["name"] or piece.finish_reason):
            begun = {**item, "status": "in_progress", "arguments": ""}
            frames = self._event("output_item.added", item=begun, output_index=0)
        if delta := item["arguments"].removeprefix(before):
            frames += self._event("function_call_arguments.delta", delta=delta, **place)
        if piece.finish_reason is None:
            return frames
        call = {"name": item["name"], "arguments": item["arguments"]}
        frames += self._event("function_call_arguments.done", **call, **place)
        return frames + self._event("output_item.done", item=item, output_index=0)

    def choice(self, answer: Piece) -> dict[str, Any]:
        """Return the call of the output, whose name is "" where the answer was cut in it."""
        name, arguments = call_of(answer.text)
        own = self.head["id"].removeprefix("resp-")
        ids = {"id": f"fc-{own}", "call_id": f"call-{own}"}
        call = {"name": name, "arguments": arguments, "status": _status(answer)}
        return {"type": "function_call", **ids, **call}


def _status(answer: Choice | Piece) -> str:
    return "incomplete" if answer.finish_reason == "length" else "completed"


@contextmanager
def _own_params() -> Iterator[None]:
    """Name the fields of this API in errors about those of a chat."""
    try:
        yield
    except ApiError as error:
        if own := PARAMS.get(error.param or ""):
            error.args = (str(error).replace(str(error.param), own),)
            error.param = own
        raise


def _as_chat(body: ResponsesRequest) -> ChatRequest:
    """Return the chat with the same answer; raises ApiError for fields that are not supported."""
    extra = body.model_extra or {}
    for param in STATEFUL:
        if extra.get(param):
            raise ApiError(400, f"{param} is not supported, as {STATELESS}.", param=param)
    check_supported({"n": body.n, **extra}, {**UNSUPPORTED, **NEUTRAL, "n": (1,)})
    items = body.input
    items = [InputItem(role="user", content=items)] if isinstance(items, str) else items
    shared: dict[str, Any] = {name: getattr(body, name) for name in SamplingRequest.model_fields}
    if (form := body.text_format).type != "text":
        schema = form.model_dump(exclude={"type"}, by_alias=True)
        shared["response_format"] = {"type": form.type, "json_schema": schema}
    if body.max_output_tokens is not None:
        shared["max_tokens"] = body.max_output_tokens
    tool = partial(Tool, type="function")
    shared["tools"] = [tool(function=function) for function in body.tools or ()]
    shared["tool_choice"] = choice = body.tool_choice
    if isinstance(choice, Function):
        shared["tool_choice"] = tool(function=choice)
    elif isinstance(choice, AllowedFunctions):
        allowed = {"mode": choice.mode, "tools": [tool(function=one) for one in choice.tools]}
        shared["tool_choice"] = {"type": choice.type, "allowed_tools": allowed}
    messages: list[ChatMessage] = []
    for message in map(_message, items):
        if message.tool_calls and messages and messages[-1].role == "assistant":
            messages[-1].tool_calls = [*(messages[-1].tool_calls or ()), *message.tool_calls]
        else:
            messages.append(message)
    chat = ChatRequest(messages=messages, **shared)
    if body.instructions:
        chat.messages.insert(0, ChatMessage(role="system", content=body.instructions))
    chat.logprobs, chat.top_logprobs = LOGPROBS in (body.include or []), body.top_logprobs
    return chat


def _message(item: InputItem) -> ChatMessage:
    """Return an item of the input as a message; raises ApiError for one of another kind."""
    if item.type == "function_call" and item.name and item.arguments is not None:
        function = Function(name=item.name, arguments=item.arguments)
        call = Tool(id=item.call_id, type="function", function=function)
        return ChatMessage(role="assistant", tool_calls=[call])
    role: Any = "tool" if item.type == "function_call_output" else item.role
    if item.type not in (None, "message", "function_call_output") or role is None:
        kind = f"of type {item.type[:40]!r}" if item.type else "without a role"
        text = f"The input has an item {kind}; send messages, whole function calls and outputs."
        raise ApiError(400, text, param="input")
    content = item.output if role == "tool" else item.content
    if isinstance(content, list):
        content = [ContentPart(type=PARTS.get(p.type, p.type), text=p.text) for p in content]
    return ChatMessage(role=role, content=content, tool_call_id=item.call_id)
