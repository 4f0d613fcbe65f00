"""How long a request waits for the engine: for its first word, and for the whole answer."""

import asyncio
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from serving.api.errors import ApiError

T = TypeVar("T")


@dataclass
class Deadlines:
    """A request's: `queue_s` for the engine to say something, `request_s` for all of an answer."""

    queue_s: float
    request_s: float
    arrived: float  # by time.monotonic(), as all here

    def __post_init__(self) -> None:
        self._heard = self.arrived  # when the engine answered last

    @property
    def first_s(self) -> float:
        """Seconds that are left for the engine's first word."""
        return max(self._heard + self.queue_s - time.monotonic(), 0.0)

    @property
    def whole_s(self) -> float:
        """Seconds that are left for the answer."""
        return max(self.arrived + self.request_s - time.monotonic(), 0.0)

    def late(self) -> ApiError:
        """Return what a request is told that the engine said nothing to."""
        message = f"The request waited for {self.queue_s:g} s in vain; try again in a moment."
        return ApiError(503, message, code="overloaded")

    def slow(self) -> ApiError:
        """Return what a request is told that takes too long."""
        message = f"The answer was not complete within {self.request_s:g} s; ask for less at once."
        return ApiError(504, message, code="timeout")

    async def soon(self, answer: Coroutine[Any, Any, T]) -> T:
        """Return what is needed before the engine is asked; ApiError where it does not come."""
        try:
            return await asyncio.wait_for(answer, min(self.first_s, self.whole_s))
        except (asyncio.TimeoutError, TimeoutError) as error:
            raise (self.slow() if self.first_s else self.late()) from error

    async def answers(self, questions: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
        """Return the answers to questions asked side by side.

        Raises what fails first, and ApiError where the first answer or the last does not come.
        """
        try:
            answers = await asyncio.wait_for(self._asked(questions), self.whole_s)
        except (asyncio.TimeoutError, TimeoutError) as error:
            raise self.slow() from error
        self._heard = time.monotonic()
        return answers

    async def _asked(self, questions: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
        tasks = [asyncio.ensure_future(question) for question in questions]
        try:
            first = asyncio.FIRST_COMPLETED
            if not (await asyncio.wait(tasks, timeout=self.first_s, return_when=first))[0]:
                raise self.late()
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
