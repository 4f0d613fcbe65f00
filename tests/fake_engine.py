"""An engine without a model that sends prepared replies, for tests of its clients."""

import asyncio
import struct
from collections.abc import AsyncGenerator, Callable, Iterable
from typing import Any

from nanogpt.tokenizer import Tokenizer, byte_tokenizer
from serving.engine.client import EngineClient
from serving.engine.messages import (
    Cancel,
    Classified,
    Classify,
    Describe,
    Embed,
    Embedded,
    EngineError,
    Failed,
    Generate,
    Message,
    ModelDetails,
    ModelInfo,
    Models,
    Score,
    Stats,
    Task,
    Tokens,
    read_frame,
    to_frame,
)

Reply = Callable[[Generate], Iterable[int]]


def echo(request: Generate) -> list[int]:
    """Answer with the prompt's own tokens, again and again up to max_tokens."""
    ids = request.prompt_ids
    return [ids[i % len(ids)] for i in range(request.params.max_tokens)]


class FakeEngine:
    """A server of one model, for use as `async with FakeEngine(f"unix:{tmp_path}/e") as engine`.

    `reply` gives an answer's tokens, sent `step` at a time, a pause of `delay_s` between. `failure`
    replaces the answer. `requests` and `cancelled` record what came.
    """

    def __init__(
        self,
        address: str,
        *,
        reply: Reply = echo,
        step: int = 1,
        delay_s: float = 0.0,
        tokenizer: Tokenizer | None = None,
        block_size: int = 1024,
        template: str | None = None,
        labels: list[str] | None = None,
        stage: str = "pretrain",
        failure: tuple[Any, str] | None = None,
    ) -> None:
        self.path = address.removeprefix("unix:")
        self.reply, self.step, self.delay_s, self.failure = reply, step, delay_s, failure
        self.tokenizer = byte_tokenizer() if tokenizer is None else tokenizer
        self.about: dict[str, Any] = {
            "block_size": block_size,
            "template": template,
            "labels": labels,
            "stage": stage,
        }
        tasks: list[Task | None] = [None, "generate", "classify"]
        names = ["run/tiny", "tiny.ckpt"]
        task: Task = "classify" if labels else "generate"
        self.models = [ModelInfo("tiny", names, 1_700_000_000, "1", True, tasks, task=task)]
        self.requests: list[Message] = []
        self.cancelled: list[str] = []
        self._answering: dict[str, asyncio.Task[None]] = {}
        self._writers: list[asyncio.StreamWriter] = []
        self._server: asyncio.Server | None = None

    def hang_up(self) -> None:
        """Break every connection, as an engine that dies does."""
        for writer in self._writers:
            writer.close()
        for task in self._answering.values():
            task.cancel()

    async def __aenter__(self) -> "FakeEngine":
        self._server = await asyncio.start_unix_server(self._serve, self.path)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.hang_up()
        assert self._server is not None
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        writer.write(to_frame([Models(self.models)]))
        beating = asyncio.create_task(self._beat(writer))
        try:
            while True:
                for message in await read_frame(reader):
                    self._receive(message, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()
        finally:
            beating.cancel()

    async def _beat(self, writer: asyncio.StreamWriter) -> None:
        while True:
            stats = Stats(slots=4, device="cpu", dtype="fp32", threads=1)
            writer.write(to_frame([stats]))
            await asyncio.sleep(0.5)

    def _receive(self, message: Message, writer: asyncio.StreamWriter) -> None:
        self.requests.append(message)
        if isinstance(message, Cancel):
            self.cancelled.append(message.request_id)
            if task := self._answering.pop(message.request_id, None):
                task.cancel()
        elif self.failure and isinstance(message, Generate):
            writer.write(to_frame([Failed(message.request_id, *self.failure)]))
        elif isinstance(message, Generate):
            task = asyncio.create_task(self._generate(message, writer))
            self._answering[message.request_id] = task
        elif answer := self._answer(message):
            writer.write(to_frame([answer]))

    async def _generate(self, request: Generate, writer: asyncio.StreamWriter) -> None:
        ids = list(self.reply(request))[: request.params.max_tokens]
        reason = "length" if len(ids) == request.params.max_tokens else "stop"
        for start in range(0, len(ids), self.step):
            writer.write(to_frame([tokens(request, ids[start : start + self.step])]))
            await writer.drain()
            await asyncio.sleep(self.delay_s)
        end = Tokens(request.request_id, [], finish_reason=reason)  # type: ignore[arg-type]
        writer.write(to_frame([end]))
        self._answering.pop(request.request_id, None)

    def _answer(self, message: Message) -> Message | None:
        if isinstance(message, Describe):
            return ModelDetails(
                message.request_id,
                revision="1",
                step=100,
                vocab_size=self.tokenizer.vocab_size,
                n_embd=2,
                n_params=1000,
                dtype="fp32",
                tokenizer=self.tokenizer.record(),
                **self.about,
            )
        if isinstance(message, Score):
            scored = (-1.0, list(range(message.top)), [-1.0] * message.top)
            rows = [(None, [], []), *[scored] * (len(message.prompt_ids) - 1)][message.start :]
            return Tokens(message.request_id, [], rows, finish_reason="length")
        if isinstance(message, Classify):
            labels = self.about["labels"] or []
            even = [1 / len(labels)] * len(labels)
            return Classified(message.request_id, even, 3)
        if isinstance(message, Embed):
            return Embedded(message.request_id, struct.pack("<2f", 0.6, 0.8))
        return None


def tokens(request: Generate, ids: list[int]) -> Tokens:
    """Return the next tokens of an answer, with uniform logprobs on request."""
    top = request.params.logprobs
    if top is None:
        return Tokens(request.request_id, ids)
    return Tokens(request.request_id, ids, [(-1.0, list(range(top)), [-1.0] * top) for _ in ids])


async def generate(client: EngineClient, request: Generate) -> AsyncGenerator[Tokens, None]:
    """Yield the messages of an answer; cancel it when closed. Raises EngineError."""
    answers: asyncio.Queue[Any] = asyncio.Queue()
    client.submit(request, answers.put_nowait)
    reason = None
    try:
        while reason is None:
            answer = await answers.get()
            if isinstance(answer, Failed):
                raise EngineError(answer.kind, answer.message)
            reason = answer.finish_reason
            yield answer
    finally:
        client.cancel(request.request_id)
