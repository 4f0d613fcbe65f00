"""Limits that hold before a request is read: how many are open, how large and slow a body is."""

import asyncio
from collections import Counter, deque

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.api.errors import ApiError
from serving.api.settings import ApiSettings

MAX_CONTAINERS = 350_000  # of a body's lists and objects; nested ones take longest to parse
PATIENCE_S = 0.1  # that those let in wait while others arrive


class Arrivals:
    """How many connections there were."""

    def __init__(self) -> None:
        self.n = 0


def busy() -> ApiError:
    """Return what a request is told that comes when too many are open."""
    return ApiError(503, "The server is busy; try again in a moment.", code="overloaded")


class Admission:
    """Turn requests away at once when too many are open; only POST routes compute anything.

    Those let in begin one in each round of the event loop, and none while others arrive: of a
    thousand that come at once, the many to be refused do not wait for the work of the few. (uvloop
    accepts one connection in each round.)
    """

    def __init__(self, app: ASGIApp, settings: ApiSettings, arrivals: Arrivals) -> None:
        self.app = app
        self.arrivals = arrivals
        self.max_open = settings.max_open
        self.max_open_per_key = settings.max_open_per_key
        if self.max_open_per_key is None and len(settings.api_keys) > 1:
            self.max_open_per_key = max(1, self.max_open * 3 // 4)  # none shuts the others out
        self.open: Counter[str] = Counter()
        self._turns: deque[asyncio.Future[None]] = deque()
        self._n_seen = 0  # of those who arrived
        self._patience_ends = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        key = scope["state"].get("key", "")
        if error := self._refusal(key):
            await error.response()(scope, receive, send)
            return
        self.open[key] += 1
        try:
            await self._turn()
            await self.app(scope, receive, send)
        finally:
            self.open[key] -= 1
            if not self.open[key]:
                del self.open[key]

    def _refusal(self, key: str) -> ApiError | None:
        if self.max_open_per_key is not None and self.open[key] >= self.max_open_per_key:
            n = self.max_open_per_key
            message = f"This key has {n} requests open, as many as it may; wait for one to end."
            return ApiError(429, message, code="rate_limit_exceeded")
        if self.open.total() >= self.max_open:
            return busy()
        return None

    async def _turn(self) -> None:
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[None] = loop.create_future()
        self._turns.append(turn)
        if len(self._turns) == 1:
            self._patience_ends = loop.time() + PATIENCE_S
            loop.call_soon(self._next, loop)
        await turn

    def _next(self, loop: asyncio.AbstractEventLoop) -> None:
        others = self.arrivals.n != self._n_seen and loop.time() < self._patience_ends
        self._n_seen = self.arrivals.n
        if not others:
            turn = self._turns.popleft()
            if not turn.done():  # cancelled
                turn.set_result(None)
        if self._turns:
            loop.call_soon(self._next, loop)


class Body:
    """Read a POST's body here, JSON of at most so many bytes in at most so many seconds."""

    def __init__(self, app: ASGIApp, settings: ApiSettings) -> None:
        self.app = app
        self.max_bytes = settings.max_body_bytes
        self.seconds = settings.body_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        try:
            self._check_headers(Headers(scope=scope))
            body = await asyncio.wait_for(self._read(receive), self.seconds)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        except (asyncio.TimeoutError, TimeoutError):
            late = ApiError(408, f"The body did not arrive within {self.seconds:g} s.")
            await late.response()(scope, receive, send)
            return
        if body is not None:
            await self.app(scope, _replay(body, receive), send)

    def _check_headers(self, headers: Headers) -> None:
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self.max_bytes:
            raise self._too_large()
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # browsers send other types across sites without a preflight
            message = f"The body has Content-Type {kind!r}; send 'Content-Type: application/json'."
            raise ApiError(415, message, code="unsupported_media_type")

    async def _read(self, receive: Receive) -> bytes | None:
        """Return the body, or None where the client has left."""
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > self.max_bytes:
                raise self._too_large()
            if not message.get("more_body", False):
                break
        if body.count(b"[") + body.count(b"{") > MAX_CONTAINERS:
            raise ApiError(400, f"The body has more than {MAX_CONTAINERS:,} lists and objects.")
        return bytes(body)

    def _too_large(self) -> ApiError:
        message = f"The body is larger than {self.max_bytes:,} bytes, the most this server reads."
        return ApiError(413, message, code="request_too_large")


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the body, and then what comes after it."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return waiting.pop() if waiting else await receive()

    return replayed
