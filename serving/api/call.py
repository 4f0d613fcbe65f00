"""A call of a route that computes: its model, its requests to the engine, its answer."""

import asyncio
from collections.abc import Awaitable, Sequence
from typing import Any, TypeVar

from fastapi import Request, Response
from msgspec.structs import replace
from starlette.requests import ClientDisconnect

from serving.api.errors import ApiError
from serving.api.generation import Choice, Generation, Prompt
from serving.api.models import Catalogue, ServedModel
from serving.api.sampling import seeds
from serving.api.schemas import SamplingRequest
from serving.api.settings import ApiSettings
from serving.api.stream import EventStream, Format, to_json, whole
from serving.api.timeouts import Timeouts
from serving.engine.client import EngineClient
from serving.engine.messages import Generate, SamplingParams, Task

FIRST_PIECE_S = 10.0  # a stream's status waits so long for the first token: it may be an error's

T = TypeVar("T")


class Call:
    """A request with what it needs of the application's state, and with its timeouts."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.settings: ApiSettings = request.app.state.settings
        self.client: EngineClient = request.app.state.client
        self.catalogue: Catalogue = request.app.state.catalogue
        limits = self.settings.queue_s, self.settings.request_s
        self.timeouts = Timeouts(*limits, request.state.arrived)
        # Requests to the engine take turns by the hash of the API key, and by the client's request.
        self.labels = {"key": request.state.key, "origin": request.state.request_id}

    async def language_model(self, body: SamplingRequest) -> ServedModel:
        """Return the model that generates.

        Raises ApiError for a classifier, and for more answers or stop strings than are allowed.
        """
        for param, n, limit, what in (
            ("n", body.n or 1, min(self.settings.max_n, self.settings.max_queue), "answers"),
            ("stop", len(body.stops), self.settings.max_stops, "stop strings"),
        ):
            if n > limit:
                message = f"{n} {what} are too many; request at most {limit}."
                raise ApiError(400, message, param=param)
        model = await self.load(body.model, "generate")
        model.check_task("generate")
        return model

    async def load(self, name: str | None, task: Task | None = None) -> ServedModel:
        """Return the model of a name, ready for use; raises ApiError after a timeout."""
        model = await self.timeouts.within(self.catalogue.load(name, task))
        self.request.state.log["model"] = model.id
        return model

    def max_prompts(self, n: int = 1) -> int:
        """Return how many prompts, of `n` answers each, the engine could take at once."""
        return min(self.settings.max_prompts, self.settings.max_queue // n)

    def new_id(self) -> str:
        """Return an id for a request to the engine; it begins with the client's."""
        return self.client.new_id(self.request.state.request_id)

    async def gather(self, requests: Sequence[Awaitable[T]]) -> list[T]:
        """Return the engine's answers to concurrent requests; raises ApiError after a timeout."""
        return await self.until_disconnect(self.timeouts.gather(requests))

    def choices(
        self,
        body: SamplingRequest,
        model: ServedModel,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        stops: Sequence[str],
    ) -> list[Choice]:
        """Return `n` answers for each prompt, which differ in the seed, to be generated."""
        choices: list[Choice] = []
        for prompt in prompts:
            for seed in seeds(body.seed, 1 if body.n is None else body.n):
                if self.settings.log_prompts:
                    logged = self.request.state.log.setdefault("prompts", {})
                    logged[len(choices)] = model.tokenizer.decode(prompt.ids)
                own = replace(params, max_tokens=prompt.max_tokens, seed=seed)
                request = Generate(self.new_id(), model.id, prompt.ids, own, **self.labels)
                choices.append(Choice(len(choices), request, model.token_bytes, stops, prompt.echo))
        return choices

    def generation(self, choices: Sequence[Choice]) -> Generation:
        """Start to generate answers; the caller closes the generation."""
        generation = Generation(self.client, choices)
        generation.start(self.timeouts)
        return generation

    async def answer(
        self,
        body: SamplingRequest,
        model: ServedModel,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        stops: Sequence[str],
        form_class: type[Format],
    ) -> Response:
        """Generate, and answer with a stream or with one object."""
        choices = self.choices(body, model, prompts, params, stops)
        with_logprobs = params.logprobs is not None
        form = form_class(model, len(choices), with_logprobs, body.include_usage)
        generation = self.generation(choices)
        streams = False
        try:
            if body.stream:
                await self.until_disconnect(generation.wait_for_first(FIRST_PIECE_S))
                streams = True
                return EventStream(generation, form, on_end=lambda: self._log_usage(generation))
            answers = await self.until_disconnect(generation.whole())
            content = await whole(form, answers, generation.usage())
            return Response(content, media_type="application/json")
        finally:
            if not streams:
                await generation.close()
                self._log_usage(generation)

    async def until_disconnect(self, work: Awaitable[T]) -> T:
        """Return the result of work; raises ClientDisconnect as soon as the client disconnects."""
        working = asyncio.ensure_future(work)
        waiting = asyncio.ensure_future(self._wait_for_disconnect())
        try:
            await asyncio.wait([working, waiting], return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise ClientDisconnect
            return working.result()
        finally:
            for task in (working, waiting):
                task.cancel()
            await asyncio.gather(working, waiting, return_exceptions=True)

    async def _wait_for_disconnect(self) -> None:
        while (await self.request.receive())["type"] != "http.disconnect":
            pass

    def _log_usage(self, generation: Generation) -> None:
        usage = generation.usage()
        self.request.state.log.update(
            prompt_tokens=usage["prompt_tokens"],
            cached_tokens=usage["prompt_tokens_details"]["cached_tokens"],
            completion_tokens=usage["completion_tokens"],
            tokens_per_second=usage["tokens_per_second"],
            finish_reasons=[choice.finish_reason for choice in generation.choices],
        )


def json_response(content: Any) -> Response:
    """Return an answer of 200."""
    return Response(to_json(content), media_type="application/json")
