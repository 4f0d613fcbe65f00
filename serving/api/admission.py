"""Admission: where requests are authenticated, counted, read, and refused.

Every error of the application is answered here, as one object. A request that is refused is first
read to its end, unless its client waits for `100 Continue`: an earlier answer is lost to clients
that still write (the system resets their connection).
"""

import asyncio
from collections import Counter

import anyio
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.api import errors
from serving.api.auth import ApiKeys, authenticate
from serving.api.errors import ApiError
from serving.api.pages import key_page
from serving.api.settings import ApiSettings

MAX_CONTAINERS = 350_000  # of a body's lists and objects; nested ones take longest to parse
PATIENCE_S = 0.3  # that requests wait for others to arrive: 1,000 refusals take about as long


class Admission:
    """Let requests of known clients in, `max_open` at a time; only POST routes compute anything."""

    def __init__(self, app: ASGIApp, settings: ApiSettings, keys: ApiKeys) -> None:
        self.app = app
        self.settings = settings
        self.keys = keys
        self.max_open_per_key = settings.max_open_per_key
        if self.max_open_per_key is None and len(settings.api_keys) > 1:
            self.max_open_per_key = max(1, settings.max_open * 3 // 4)  # no key shuts others out
        self.open: Counter[str] = Counter()  # by key
        self._n_arrived = 0
        self._turn = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            if scope["method"] == "POST":
                await self._admit(scope, receive, send)
            else:
                scope["state"]["key"] = authenticate(scope, self.settings, self.keys)
                app = Response(None, 204) if scope["method"] == "OPTIONS" else self.app
                await app(scope, receive, send)
        except Exception as error:
            answer = errors.from_exception(error, scope["state"]["request_id"])
            if not scope["state"]["status"]:  # the answer has not begun
                page = key_page(scope, answer.status)
                await (page or answer.response())(scope, receive, send)

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._n_arrived += 1
        headers = Headers(scope=scope)
        key = ""
        try:
            self._check_room(scope)
            key = scope["state"]["key"] = authenticate(scope, self.settings, self.keys)
            self._check_room_of(key)
            self._check_headers(headers)
        except ApiError as refusal:
            if "expect" in headers:
                raise
            await self._read(receive, refusal)
        self.open[key] += 1
        try:
            await self._wait_turn()
            body = await self._read(receive)
            await self.app(scope, _replay(body, receive), send)
        finally:
            self.open[key] -= 1

    def _check_room(self, scope: Scope) -> None:
        if self.open.total() >= self.settings.max_open:
            scope["state"]["is_overload"] = True  # many come at once: see RequestLog
            raise ApiError(503, "The server is busy; try again in a moment.", code="overloaded")

    def _check_room_of(self, key: str) -> None:
        most = self.max_open_per_key
        if most is not None and self.open[key] >= most:
            message = f"This key has {most} requests open, as many as it may; wait for one to end."
            raise ApiError(429, message, code="rate_limit_exceeded")

    def _check_headers(self, headers: Headers) -> None:
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self.settings.max_body_bytes:
            raise self._too_large()
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # browsers send other types across sites without a preflight
            message = f"The body has Content-Type {kind!r}; send 'Content-Type: application/json'."
            raise ApiError(415, message, code="unsupported_media_type")

    async def _wait_turn(self) -> None:
        """Wait while others arrive, and then for one round of the event loop each.

        Of a thousand that come at once, the many to be refused do not wait for the work of the few.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + PATIENCE_S
        async with self._turn:
            n_seen = 0
            while n_seen != self._n_arrived and loop.time() < end:
                n_seen = self._n_arrived
                await asyncio.sleep(0)  # uvloop accepts one connection,
                await asyncio.sleep(0)  # and reads a request of it in the next round

    async def _read(self, receive: Receive, refusal: ApiError | None = None) -> bytes:
        """Return a body that arrives within `body_s`; raises ApiError, a refusal at its end."""
        body = bytearray()
        with anyio.move_on_after(self.settings.body_s):
            more = True
            while more:
                part = await receive()
                if part["type"] == "http.disconnect":
                    raise ClientDisconnect
                more = part.get("more_body", False)
                if refusal is None:
                    body += part.get("body", b"")
                    refusal = (
                        self._too_large() if len(body) > self.settings.max_body_bytes else None
                    )
            if refusal is None and body.count(b"[") + body.count(b"{") > MAX_CONTAINERS:
                refusal = ApiError(
                    400, f"The body has more than {MAX_CONTAINERS:,} lists and objects."
                )
            if refusal is None:
                return bytes(body)
            raise refusal
        seconds = self.settings.body_s
        message = f"The body did not arrive within {seconds:g} s."
        raise ApiError(408, message, headers={"Connection": "close"})

    def _too_large(self) -> ApiError:
        n_bytes = self.settings.max_body_bytes
        message = f"The body is larger than {n_bytes:,} bytes, the most this server reads."
        return ApiError(413, message, code="request_too_large")


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the body, and then what comes after it."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return waiting.pop() if waiting else await receive()

    return replayed
