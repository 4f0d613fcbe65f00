"""What the routes of one front end share, and how they answer what is generated."""

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request, Response
from msgspec.structs import replace
from starlette.requests import ClientDisconnect

from serving.api.deadlines import Deadlines
from serving.api.errors import ApiError
from serving.api.generation import Choice, Generation, Prompt
from serving.api.metrics import Metrics
from serving.api.models import Catalogue, ServedModel
from serving.api.sampling import seeds
from serving.api.schemas import SamplingRequest
from serving.api.settings import ApiSettings
from serving.api.stream import EventStream, Format, to_json, whole
from serving.engine.client import EngineClient
from serving.engine.messages import Generate, SamplingParams, Task

FIRST_PIECE_S = 10.0  # a stream's status waits so long for the first token, to be an error's yet

T = TypeVar("T")


@dataclass
class FrontEnd:
    """The engine's client and what goes with it."""

    settings: ApiSettings
    client: EngineClient
    catalogue: Catalogue
    metrics: Metrics
    began: float
    draining: bool = False

    async def language_model(self, request: Request, body: SamplingRequest) -> ServedModel:
        """Return the model that is asked to generate.

        Raises ApiError for a classifier, and for more answers or stop strings than are allowed.
        """
        for param, wanted, most, what in (
            ("n", body.n or 1, min(self.settings.max_n, self.settings.max_queue), "answers"),
            ("stop", len(body.stops), self.settings.max_stops, "stop strings"),
        ):
            if wanted > most:
                message = f"{wanted} {what} are too many; ask for at most {most}."
                raise ApiError(400, message, param=param)
        model = await self.load(request, body.model, "generate")
        model.check_generates()
        return model

    def most_prompts(self, n: int = 1) -> int:
        """Return how many prompts, of `n` answers each, the engine could take at once."""
        return min(self.settings.max_prompts, self.settings.max_queue // n)

    async def load(
        self, request: Request, name: str | None, task: Task | None = None
    ) -> ServedModel:
        """Return the model of a name, ready for use; raises ApiError where it is not in time."""
        model = await self.deadlines(request).soon(self.catalogue.load(name, task))
        request.state.log["model"] = model.id
        return model

    async def ask(self, request: Request, questions: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
        """Return the engine's answers to questions asked side by side, within the deadlines."""
        return await unless_left(request, self.deadlines(request).answers(questions))

    def deadlines(self, request: Request) -> Deadlines:
        """Return how long a request may wait."""
        state = request.state
        if not hasattr(state, "deadlines"):
            limits = self.settings.queue_s, self.settings.request_s
            state.deadlines = Deadlines(*limits, arrived=state.arrived)
        deadlines: Deadlines = state.deadlines
        return deadlines

    def new_id(self, request: Request) -> str:
        """Return an id for what the engine is asked, that tells the request's."""
        return self.client.new_id(request.state.request_id)

    def labels(self, request: Request) -> dict[str, str]:
        """Return whose turn the engine's work for a request counts as: the key's hash, an id."""
        return {"key": request.state.key, "origin": request.state.request_id}

    def choices(
        self,
        request: Request,
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
                    logged = request.state.log.setdefault("prompts", {})
                    logged[len(choices)] = model.tokenizer.decode(prompt.ids)
                own = replace(params, max_tokens=prompt.max_tokens, seed=seed)
                labels = self.labels(request)
                asked = Generate(self.new_id(request), model.id, prompt.ids, own, **labels)
                choices.append(Choice(len(choices), asked, model.token_bytes, stops, prompt.echo))
        return choices

    def generation(self, request: Request, choices: Sequence[Choice]) -> Generation:
        """Start to generate answers; whoever asked closes it."""
        generation = Generation(self.client, choices)
        generation.start(self.deadlines(request))
        return generation

    async def answer(
        self, request: Request, body: SamplingRequest, choices: Sequence[Choice], form: Format
    ) -> Response:
        """Generate, and answer with a stream or with one object, as was asked for."""
        generation = self.generation(request, choices)
        streams = False
        try:
            if body.stream:
                await unless_left(request, generation.wait_for_first(FIRST_PIECE_S))
                streams = True
                return EventStream(
                    generation,
                    form,
                    include_usage=body.include_usage,
                    on_end=lambda: _note(request, generation),
                )
            answers = await unless_left(request, generation.whole())
            content = await whole(form, answers, generation.usage())
            return Response(content, media_type="application/json")
        finally:
            if not streams:
                await generation.close()
                _note(request, generation)


def front_end(request: Request) -> FrontEnd:
    """Return the front end that a request came to."""
    found: FrontEnd = request.app.state.front_end
    return found


def json_response(content: Any) -> Response:
    """Return an answer of 200."""
    return Response(to_json(content), media_type="application/json")


async def unless_left(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return what the work gives; raises ClientDisconnect as soon as the client has left."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait([working, watching], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _note(request: Request, generation: Generation) -> None:
    """Tell the log what a generation came to."""
    usage = generation.usage()
    request.state.log.update(
        prompt_tokens=usage["prompt_tokens"],
        cached_tokens=usage["prompt_tokens_details"]["cached_tokens"],
        completion_tokens=usage["completion_tokens"],
        tokens_per_second=usage["tokens_per_second"],
        finish_reasons=[choice.finish_reason for choice in generation.choices],
    )
