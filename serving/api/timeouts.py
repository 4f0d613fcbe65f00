"""Timeouts of a request: for the engine's first answer, and for all of the answer."""

import asyncio
import time
from collections.abc import Awaitable, Sequence
from typing import TypeVar

from serving.api.errors import ApiError

T = TypeVar("T")


class Timeouts:
    """The timeouts of a request that arrived at a time of `time.monotonic`."""

    def __init__(self, queue_s: float, request_s: float, arrived: float) -> None:
        self.queue_s, self.request_s = queue_s, request_s
        self._queue_end, self._end = arrived + queue_s, arrived + request_s

    @property
    def remaining_queue_s(self) -> float:
        """Seconds that are left for the engine's first answer."""
        return max(self._queue_end - time.monotonic(), 0.0)

    @property
    def remaining_s(self) -> float:
        """Seconds that are left for all of the answer."""
        return max(self._end - time.monotonic(), 0.0)

    def queue_error(self) -> ApiError:
        """Return the error of a request that the engine did not begin to answer."""
        message = f"The request waited for {self.queue_s:g} s in vain; try again in a moment."
        return ApiError(503, message, code="overloaded")

    def response_error(self) -> ApiError:
        """Return the error of an answer that is not complete."""
        message = f"The answer was not complete within {self.request_s:g} s; request less at once."
        return ApiError(504, message, code="timeout")

    async def within(self, work: Awaitable[T]) -> T:
        """Return the result of what precedes the engine's first answer; raises ApiError."""
        try:
            return await asyncio.wait_for(work, min(self.remaining_queue_s, self.remaining_s))
        except asyncio.TimeoutError as error:
            raise (
                self.response_error() if self.remaining_queue_s else self.queue_error()
            ) from error

    async def gather(self, requests: Sequence[Awaitable[T]]) -> list[T]:
        """Return the engine's answers to concurrent requests.

        Raises the first exception of a request, and ApiError at the timeouts. After the answers the
        engine has `queue_s` again.
        """
        tasks = [asyncio.ensure_future(request) for request in requests]
        try:
            await self.within(asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED))
            answers = await asyncio.wait_for(asyncio.gather(*tasks), self.remaining_s)
        except asyncio.TimeoutError as error:
            raise self.response_error() from error
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        self._queue_end = time.monotonic() + self.queue_s
        return answers
