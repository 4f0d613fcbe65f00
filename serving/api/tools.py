"""Calls of functions: which ones a request forces, and the objects of answers that are calls."""

import json
from collections.abc import Sequence
from typing import Any

from serving.api.errors import ApiError
from serving.api.generation import Choice, Piece
from serving.api.models import ServedModel
from serving.api.schemas import AllowedTools, ChatRequest, Function, Tool
from serving.api.stream import ChatFormat


def functions_to_call(body: ChatRequest) -> list[Function]:
    """Return the functions of which the answer calls one, none where it is a text.

    Raises ApiError for functions of the same name, a choice not among them, and stop strings.
    """
    functions, choice = [tool.function for tool in body.tools or ()], body.tool_choice
    names = [function.name for function in functions]
    mode, chosen = choice, {*names}
    if len(chosen) < len(names):
        raise ApiError(400, "Two tools have the same name; rename one of them.", param="tools")
    if isinstance(choice, Tool):
        mode, chosen = "required", {choice.function.name}
    elif isinstance(choice, AllowedTools):
        mode = choice.allowed_tools.mode
        chosen = {tool.function.name for tool in choice.allowed_tools.tools}
    if (unknown := chosen.difference(names)) or (mode == "required" and not chosen):
        target, known = repr(min(unknown)) if unknown else "a tool", ", ".join(names) or "none"
        message = f"tool_choice needs {target} among tools, which has {known}; add it to tools."
        raise ApiError(400, message, param="tool_choice")
    if mode != "required":
        return []
    if body.stops:
        raise ApiError(400, "A stop string could cut a forced call; leave stop out.", param="stop")
    return [function for function in functions if function.name in chosen]


def call_of(text: str) -> tuple[str, str]:
    """Return the name and the arguments in the text of a call, "" while the name is incomplete."""
    name, found, arguments = text.partition(', "arguments": ')  # in a name, quotes are escaped
    return (json.loads(name.removeprefix('{"name": ')), arguments) if found else ("", "")


class CallFormat(ChatFormat):
    """The objects of `/v1/chat/completions` whose answers are calls."""

    def __init__(self, model: ServedModel, choices: Sequence[Choice], body: ChatRequest) -> None:
        super().__init__(model, choices, body.include_usage)
        self._written = [""] * len(choices)  # so far
        # The OpenAI API has "stop" after a function that tool_choice names.
        self._end = "stop" if isinstance(body.tool_choice, Tool) else "tool_calls"

    def frames(self, piece: Piece) -> bytes:
        index, content = piece.index, b""
        name, before = call_of(self._written[index])
        self._written[index] += piece.text
        call = self._call(index, self._written[index])
        if name:
            new = call["function"]["arguments"].removeprefix(before)
            call = {"function": {"arguments": new}} if new else {}
        if call or piece.tokens:
            delta = {"tool_calls": [{"index": 0, **call}]} if call else {}
            logprobs = self.logprobs(piece.tokens) if piece.tokens else None
            content = self._frame(index, {"delta": delta}, logprobs)
        if piece.finish_reason:
            content += self._frame(index, {"delta": {}}, None, self._reason(piece))
        return content

    def choice(self, answer: Piece) -> dict[str, Any]:
        choice, call = super().choice(answer), self._call(answer.index, answer.text)
        choice["message"] |= {"content": None, "tool_calls": [call] if call else []}
        return {**choice, "finish_reason": self._reason(answer)}

    def _call(self, index: int, text: str) -> dict[str, Any]:
        """Return a call, {} while its name is incomplete."""
        name, arguments = call_of(text)
        function = {"name": name, "arguments": arguments}
        call_id = f"call-{self.head['id'].rpartition('-')[2]}-{index}"
        return {"id": call_id, "type": "function", "function": function} if name else {}

    def _reason(self, piece: Piece) -> str | None:
        return self._end if piece.finish_reason == "stop" else piece.finish_reason
