"""A call of a route that computes: its model, its requests to the engine, its answer."""

import asyncio
import secrets
import time
from collections.abc import Awaitable, Collection, Mapping, Sequence
from functools import partial
from operator import itemgetter
from typing import Any, TypeVar

from fastapi import Request, Response
from starlette.requests import ClientDisconnect

from serving.api.errors import ApiError
from serving.api.generation import Choice, Generation, Prompt
from serving.api.models import Catalogue, ServedModel
from serving.api.schemas import UNSUPPORTED, SamplingRequest
from serving.api.settings import ApiSettings
from serving.api.stream import CompletionFormat, event_stream, events, to_json, whole
from serving.engine.client import Answer, EngineClient
from serving.engine.messages import Generate, SamplingParams, Task
from serving.engine.messages import Request as EngineRequest

FIRST_PIECE_S = 10.0  # a stream's status waits so long for the first token: it may be an error's
SEED_STEP = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio: seeds of n answers are far apart
SHARED = {  # fields of requests and SamplingParams with the same names, ranges and defaults
    *("temperature", "top_p", "min_p"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty"),
}

T = TypeVar("T")
Limits = Sequence[tuple[float, ApiError]]


class Call:
    """A request with what it needs of the application's state, and with its timeouts."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.settings: ApiSettings = request.app.state.settings
        self.client: EngineClient = request.app.state.client
        self.catalogue: Catalogue = request.app.state.catalogue
        self._queue_start = request.state.arrived
        # Requests to the engine take turns by the hash of the API key, and by the client's request.
        self.labels = {"key": request.state.key, "origin": request.state.request_id}

    def limits(self) -> Limits:
        """Return the seconds left for the first answer and for all, each with its error."""
        queue_s, request_s = self.settings.queue_s, self.settings.request_s
        queued = f"The request waited for {queue_s:g} s in vain; try again in a moment."
        late = f"The answer was not complete within {request_s:g} s; request less at once."
        now = time.monotonic()
        return [
            (self._queue_start + queue_s - now, ApiError(503, queued, code="overloaded")),
            (self.request.state.arrived + request_s - now, ApiError(504, late, code="timeout")),
        ]

    async def language_model(self, body: SamplingRequest) -> ServedModel:
        """Return the model that generates.

        Raises ApiError for a classifier, for fields that are not supported, and for more answers or
        stop strings than are allowed.
        """
        check_supported(body.model_extra or {}, UNSUPPORTED)
        max_n = min(self.settings.max_n, self.settings.max_queue)
        check_count("n", body.n or 1, max_n, "answers")
        check_count("stop", len(body.stops) or 1, self.settings.max_stops, "stop strings")
        model = await self.load(body.model, "generate")
        model.check_task("generate")
        return model

    async def load(self, name: str | None, task: Task | None = None) -> ServedModel:
        """Return the model of a name, ready for use; raises ApiError after a timeout."""
        model = await self.within(self.limits(), self.catalogue.load(name, task))
        self.request.state.log["model"] = model.id
        return model

    def max_prompts(self, n: int = 1) -> int:
        """Return how many prompts, of `n` answers each, the engine could take at once."""
        return min(self.settings.max_prompts, self.settings.max_queue // n)

    def new_id(self) -> str:
        """Return an id for a request to the engine; it begins with the client's."""
        return self.client.new_id(self.request.state.request_id)

    async def answers(self, requests: Sequence[EngineRequest], kind: type[Answer]) -> list[Answer]:
        """Return the engine's answers to requests, of which it gets `max_prompts` at a time.

        Raises the first exception of a request, and ApiError at the timeouts. After the answers the
        engine has `queue_s` again.
        """
        answers, n = list[Answer](), self.max_prompts()
        for start in range(0, len(requests), n):
            part = requests[start : start + n]
            tasks = [asyncio.ensure_future(self.client.answer(one, kind)) for one in part]
            try:
                await self.within(self.limits(), asyncio.wait(tasks, return_when="FIRST_COMPLETED"))
                answers += await self.within(self.limits()[1:], asyncio.gather(*tasks))
            finally:
                await _cancel(tasks)
                self._queue_start = time.monotonic()
        return answers

    def choices(
        self,
        body: SamplingRequest,
        model: ServedModel,
        prompts: Sequence[Prompt],
        stop_ids: Sequence[int],
        stops: Sequence[str] = (),
        logprobs: int | None = None,
        grammar: str = "",
    ) -> list[Choice]:
        """Return `n` answers for each prompt, which differ in the seed, to be generated.

        Raises ApiError for token ids that the model lacks.
        """
        own_stops, bias, top_k = body.stop_token_ids or [], body.logit_bias or {}, body.top_k or 0
        model.check_ids(own_stops, "stop_token_ids")
        model.check_ids(bias, "logit_bias")
        params = partial(
            SamplingParams,
            top_k=min(top_k, model.details.vocab_size) if top_k > 0 else None,
            logit_bias=bias,
            stop_ids=tuple(dict.fromkeys([*stop_ids, *own_stops])),
            ignore_eos=bool(body.ignore_eos),
            logprobs=logprobs,
            grammar=grammar,
            **body.model_dump(include=SHARED, exclude_none=True),
        )
        choices: list[Choice] = []
        for prompt in prompts:
            first = secrets.randbits(63) if body.seed is None else body.seed
            for i in range(1 if body.n is None else body.n):
                own = params(max_tokens=prompt.max_tokens, seed=(first + i * SEED_STEP) % 2**64)
                request = Generate(self.new_id(), model.id, prompt.ids, own, **self.labels)
                choice = Choice(
                    len(choices), request, model.token_bytes, [*body.stops, *stops], prompt.echo
                )
                choices.append(choice)
        if self.settings.log_prompts:
            texts = {c.index: model.tokenizer.decode(c.request.prompt_ids) for c in choices}
            self.request.state.log["prompts"] = texts
        return choices

    async def answer(self, form: CompletionFormat, stream: bool | None) -> Response:
        """Generate, and answer with a stream or with one object."""
        generation = self.generation(form.choices)
        if stream:
            await self.within((), generation.wait_for_first(FIRST_PIECE_S))
            return event_stream(events(form, generation))
        answers = await self.within((), generation.whole())
        content = await whole(form, answers, generation.usage())
        return Response(content, media_type="application/json")

    def generation(self, choices: Sequence[Choice]) -> Generation:
        """Start to generate answers; Admission ends it with the request."""
        generation = Generation(self.client, choices, self.limits())
        self.request.state.on_end = partial(self._end, generation)
        return generation

    def _end(self, generation: Generation) -> None:
        generation.close()
        usage = generation.usage()
        self.request.state.log.update(
            prompt_tokens=usage["prompt_tokens"],
            cached_tokens=usage["prompt_tokens_details"]["cached_tokens"],
            completion_tokens=usage["completion_tokens"],
            tokens_per_second=usage["tokens_per_second"],
            finish_reasons=[choice.finish_reason for choice in generation.choices],
        )

    async def within(self, limits: Limits, work: Awaitable[T]) -> T:
        """Return the result of work.

        Raises the error of the first limit that passes, and ClientDisconnect as soon as the client
        disconnects.
        """

        async def disconnect() -> None:
            while (await self.request.receive())["type"] != "http.disconnect":
                pass

        working, waiting = asyncio.ensure_future(work), asyncio.ensure_future(disconnect())
        seconds, late = min(limits, key=itemgetter(0), default=(None, None))
        try:
            await asyncio.wait([working, waiting], timeout=seconds, return_when="FIRST_COMPLETED")
            if not working.done():
                raise ClientDisconnect if waiting.done() or late is None else late
            return working.result()
        finally:
            await _cancel([working, waiting])


def json_response(content: Any) -> Response:
    """Return an answer of 200."""
    return Response(to_json(content), media_type="application/json")


def check_supported(given: Mapping[str, Any], fields: Mapping[str, Sequence[Any]]) -> None:
    """Raise ApiError for a value of fields that is not among those which change nothing."""
    for param, neutral in fields.items():
        if given.get(param) not in (None, *neutral):
            use = "".join(f", or use {value}" for value in neutral if value or value == 0)
            raise ApiError(400, f"{param} is not supported; leave it out{use}.", param=param)


def check_count(param: str, n: int, limit: int, what: str) -> None:
    """Raise ApiError for a field of no values or of more than allowed."""
    if not 1 <= n <= limit:
        raise ApiError(400, f"There are {n} {what}; request 1 to {limit}.", param=param)


async def _cancel(tasks: Collection[asyncio.Future[Any]]) -> None:
    """Cancel tasks, and wait for their end."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
