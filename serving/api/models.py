"""The models of the engine with their tokenizers and templates."""

import asyncio
import json
import unicodedata
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from functools import partial
from typing import TypeVar

from nanogpt.prompts import Message, find_template
from nanogpt.tokenizer import from_record
from serving.api.errors import ApiError
from serving.api.schemas import ChatMessage, ChatRequest, TokenizeRequest
from serving.engine.client import EngineClient
from serving.engine.messages import EngineError, ModelDetails, ModelInfo, Task

LONG_CHARS = 10_000  # of a text that takes milliseconds to encode
MESSAGE_CHARS = 50  # of a text that takes as long as the scaffold of a message
ROLES = {"developer": "system", "tool": "user", "function": "user"}
BASE_TEMPLATE = "plain"  # of models without a template

T = TypeVar("T")


class ServedModel:
    """A revision of a model with its tokenizer; `token_bytes` has the bytes of each id."""

    def __init__(self, model_id: str, details: ModelDetails) -> None:
        self.id, self.details = model_id, details
        self.tokenizer = from_record(details.tokenizer)
        self.tokenizer.encode("warm up")  # builds the table
        self.template = find_template(details.template or BASE_TEMPLATE)
        self.token_bytes = self.tokenizer.token_bytes()
        # Of a text whose tokens can fit the context.
        self.max_chars = details.block_size * max(map(len, self.token_bytes))

    async def encode(self, text: str, *, add_special_tokens: bool | None = True) -> list[int]:
        """Return the ids of a text as a prompt, or those of the text alone.

        An empty prompt begins a document; see `Tokenizer.encode_prompt`.
        """
        alone = add_special_tokens is False
        encode = self.tokenizer.encode if alone else self.tokenizer.encode_prompt
        return await _encoded(len(text), partial(encode, text))

    async def encode_chat(self, body: ChatRequest | TokenizeRequest) -> list[int]:
        """Return the ids of a conversation, by default with the assistant's turn opened.

        `continue_final_message` leaves the last message open instead. Raises ApiError where the
        template or the tokenizer cannot encode the conversation, and for one to answer that cannot
        fit the context.
        """
        messages, continues = body.messages or [], bool(body.continue_final_message)
        if continues and body.add_generation_prompt:
            text = "Use either continue_final_message or add_generation_prompt."
            raise ApiError(400, text, param="continue_final_message")
        if continues and (messages[-1].role != "assistant" or messages[-1].tool_calls):
            text = "continue_final_message continues an assistant's text; the last message is none."
            raise ApiError(400, text, param="messages")
        try:
            has_tools = body.tools or any(m.tool_calls or m.role == "tool" for m in messages)
            shows_tools = bool(has_tools) and "tools" in self.template.jinja(self.tokenizer)
            conversation = to_messages(messages, with_fields=shows_tools)
            shown = body.tools if shows_tools and body.tool_choice != "none" else None
            tools = [tool.model_dump(exclude_none=True) for tool in shown or ()]
            n_chars = sum(len(m.content) + len(str(m.fields or "")) for m in conversation)
            n_chars += len(str(tools or ""))
            if isinstance(body, ChatRequest):
                self.check_chars(n_chars, "messages")
            encode = partial(
                self.template.encode,
                self.tokenizer,
                conversation,
                tools,
                add_generation_prompt=body.add_generation_prompt is not False and not continues,
                continue_final_message=continues,
            )
            ids, _ = await _encoded(n_chars + MESSAGE_CHARS * len(conversation), encode)
            return ids
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f"The messages cannot be written: {error}.") from error

    def check_chars(self, n_chars: int, param: str) -> None:
        """Raise ApiError for a text that cannot fit the context, before it is encoded."""
        if n_chars > self.max_chars:
            raise self.too_long(f"more than {self.details.block_size}", param)

    def room_for(self, ids: Sequence[int], limit: int | None, param: str) -> int:
        """Return how many tokens may follow a prompt, up to a limit and the end of the context.

        None and -1 are no limit. Raises ApiError for a prompt that leaves no room.
        """
        room = self.details.block_size - len(ids)
        if limit == 0 and room >= 0:
            return 0
        if room < 1:
            raise self.too_long(f"{len(ids)}", param)
        return room if limit is None or limit < 0 else min(limit, room)

    def too_long(self, n_tokens: str, param: str) -> ApiError:
        """Return the error of a prompt that leaves no room for an answer, or of a text."""
        answer = "" if param in ("input", "questions") else ", at least one of them for the answer"
        return ApiError(
            400,
            f"The prompt has {n_tokens} tokens, and the context of {self.id!r} is "
            f"{self.details.block_size} tokens{answer}; shorten it.",
            param=param,
            code="context_length_exceeded",
        )

    def check_ids(self, ids: Collection[int], param: str) -> None:
        """Raise ApiError for a token id that the model lacks."""
        if ids and max(ids) >= self.details.vocab_size:
            message = f"Token id {max(ids)} is not below vocab_size={self.details.vocab_size}."
            raise ApiError(400, message, param=param)

    def check_task(self, task: Task) -> None:
        """Raise ApiError for a classifier that is to generate, a language model to classify."""
        if (task == "classify") != (self.details.labels is not None):
            but = {
                "generate": "is a classifier; use POST /classify for its labels",
                "classify": "has no labels; /classify needs a classifier",
            }
            raise ApiError(400, f"The model {self.id!r} {but[task]}.", param="model")


class Catalogue:
    """The models by name, each with its tokenizer, which is built once for each revision."""

    def __init__(self, client: EngineClient, *, lenient: bool) -> None:
        self.client = client
        self.lenient = lenient  # an unknown name is the default model's
        self._built: dict[tuple[str, str], asyncio.Task[ServedModel]] = {}  # by id and revision

    def find(self, name: str | None, task: Task | None = None) -> ModelInfo:
        """Return the model of an id or alias, or the default one for a task for None and "".

        Raises EngineError: "not_found" for others, "unavailable" as `EngineClient.models` does.
        """
        models = self.client.models()
        name = name and unicodedata.normalize("NFC", name)  # as the registry's names are
        found = [model for model in models if name and name in (model.id, *model.aliases)]
        if not found and (self.lenient or not name):
            found = [model for model in models if task in model.default_for]
        if found:
            return found[0]
        known = ", ".join(model.id for model in models)
        there = f"there are {known}" if known else "there are none yet"
        raise EngineError("not_found", f"The model {name!r} does not exist; {there}.")

    async def load(self, name: str | None, task: Task | None = None) -> ServedModel:
        """Return the model of a name, ready for use."""
        info = self.find(name, task)
        key = (info.id, info.revision)
        building = self._built.get(key)
        if building is None or (building.done() and building.exception()):
            served = {(model.id, model.revision) for model in self.client.models()}
            self._built = {k: task for k, task in self._built.items() if k in served}
            building = self._built[key] = asyncio.create_task(self._build(info))
        return await asyncio.shield(building)  # shared by concurrent requests

    async def _build(self, info: ModelInfo) -> ServedModel:
        details = await self.client.details(info)
        return await asyncio.to_thread(ServedModel, info.id, details)


def to_messages(messages: Sequence[ChatMessage], *, with_fields: bool) -> list[Message]:
    """Return a conversation for a template: the system messages are joined to one at the start.

    Clients send several, also after other messages; models are trained on one at the start. Tool
    calls and tool messages have fields of their own, or else are text.
    """
    turns = [_turn(message, with_fields) for message in messages]
    system = "\n\n".join(m.content for m in turns if m.role == "system" and m.content)
    others = [message for message in turns if message.role != "system"]
    return [Message("system", system), *others] if system or not others else others


async def _encoded(n_chars: int, encode: Callable[[], T]) -> T:
    """Return what `encode` does, of a long text in a thread."""
    if n_chars > LONG_CHARS:
        return await asyncio.to_thread(encode)
    await asyncio.sleep(0)  # streams go on between the many texts of a request
    return encode()


def _turn(message: ChatMessage, with_fields: bool) -> Message:
    role, text, calls = ROLES.get(message.role, message.role), _text(message), message.tool_calls
    if not with_fields or not (calls or message.role == "tool"):
        texts = [text, *(call.function.text + "}" for call in calls or ())]
        return Message(role, "\n".join(filter(None, texts)))
    fields = message.model_dump(exclude={"content"}, exclude_none=True)
    for call in fields.get("tool_calls", ()):
        with suppress(ValueError, KeyError, RecursionError):  # of a call that was cut
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    return Message(role, text, fields=fields)


def _text(message: ChatMessage) -> str:
    if not isinstance(message.content, list):
        return message.content or ""
    for part in message.content:
        if part.type != "text" or part.text is None:
            kind = part.type[:40]
            text = f"A message has a part of type {kind!r}; this server reads text only."
            raise ApiError(400, text, param="messages")
    return "\n".join(part.text or "" for part in message.content)
