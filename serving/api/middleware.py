"""The middleware: requests are logged, answered across origins, authenticated, counted and read.

Every error of the application is answered here, as one object. A request that is refused is first
read to its end, unless its client waits for `100 Continue`: an earlier answer is lost to clients
that still write (the system resets their connection).
"""

import asyncio
import logging
import re
import secrets
import time
from collections import Counter

import anyio
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.api import errors
from serving.api.auth import allows_any_origin, allows_origin, authenticate
from serving.api.errors import ApiError, normalized
from serving.api.service import Metrics
from serving.api.settings import ApiSettings

MAX_REFUSALS = 1000  # requests that are read although they are refused; more are cut off
PATIENCE_S = 0.3  # that requests wait for others to arrive: 1,000 refusals take about as long
OVERLOAD_LOG_S = 1.0  # requests refused within it are one line of the log
QUIET = ("/health", "/ready", "/metrics")

access = logging.getLogger("nanogpt.access")
_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class RequestLog:
    """Give a request its id, and count and log the end of it, without its text.

    Routes add to `scope["state"]["log"]` what they know: model, tokens, finish reason. Answers are
    not stored by caches unless their route sets other headers.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics
        self._n_refused = 0  # because of max_open, since the last line about these

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        scope = resolved(scope)
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _SANE_ID.fullmatch(given) else f"req-{secrets.token_hex(12)}"
        state = scope.setdefault("state", {})
        state.update(request_id=request_id, key="", log={}, arrived=time.monotonic(), status=0)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                state["status"] = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        try:
            with self.metrics.open.track_inprogress():
                await self.app(scope, receive, send_with_id)
        finally:
            self._log(scope, time.monotonic() - state["arrived"])

    def _log(self, scope: Scope, seconds: float) -> None:
        state, method, path = scope["state"], scope["method"], scope["path"][:200]
        status = state["status"]
        route = getattr(scope.get("route"), "path", "unknown")  # there are only so many
        if state.get("is_overload"):
            route = "refused"
            if not self._n_refused:
                asyncio.get_running_loop().call_later(OVERLOAD_LOG_S, self._log_refused)
            self._n_refused += 1
        else:
            fields = {
                "request_id": state["request_id"],
                "method": method,
                "path": path,
                "status": status,
                "duration_ms": round(seconds * 1e3, 1),
                "client": (scope.get("client") or ("",))[0],
                "key": state["key"][:8],
                **state["log"],
            }
            level = logging.DEBUG if path in QUIET and status < 400 else logging.INFO
            access.log(level, "%s %s %d", method, path, status, extra={"fields": fields})
        self.metrics.count(method, route, status, seconds)

    def _log_refused(self) -> None:
        extra = {"fields": {"refused": self._n_refused}}
        access.warning("refused %d requests as they came", self._n_refused, extra=extra)
        self._n_refused = 0


class Cors(CORSMiddleware):
    """Starlette's middleware for `cors_origins`; a refused preflight is an error like others.

    There are no cookies, so no credentials. Clients send ever new headers (`x-stainless-*`), and
    `*` does not cover Authorization (Fetch standard), so the requested headers are allowed.
    """

    def __init__(self, app: ASGIApp, settings: ApiSettings) -> None:
        super().__init__(
            app,
            allow_origins=["*"] if allows_any_origin(settings) else [],
            allow_methods=["GET", "HEAD", "POST", "OPTIONS"],
            allow_headers=["*"],
            allow_private_network=settings.cors_private_network,
            expose_headers=["x-request-id", "retry-after", "x-should-retry"],
            max_age=86_400,
        )
        self.settings = settings

    def is_allowed_origin(self, origin: str) -> bool:
        return allows_origin(origin, self.settings)

    def preflight_response(self, request_headers: Headers) -> Response:
        origin = request_headers["origin"]
        if not self.is_allowed_origin(origin):
            message = f"Pages of {origin[:80]!r} may not call this server; add it to cors_origins."
            return ApiError(403, message, code="origin_not_allowed").response()
        headers = super().preflight_response(request_headers).headers
        del headers["content-length"], headers["content-type"]
        return Response(None, 204, headers)


class Admission:
    """Let requests of known clients in, `max_open` at a time; only POST routes compute anything."""

    def __init__(self, app: ASGIApp, settings: ApiSettings) -> None:
        self.app, self.settings = app, settings
        self.max_open_per_key = settings.max_open_per_key
        if self.max_open_per_key is None and len(settings.api_keys) > 1:
            self.max_open_per_key = max(1, settings.max_open * 3 // 4)  # no key shuts others out
        self.open: Counter[str] = Counter()  # by key
        self._n_arrived = self._n_refusals = 0
        self._turn = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            if scope["method"] == "POST":
                await self._admit(scope, receive, send)
            else:
                scope["state"]["key"] = authenticate(scope, self.settings)
                app = Response(None, 204) if scope["method"] == "OPTIONS" else self.app
                await app(scope, receive, send)
        except Exception as error:
            answer = errors.from_exception(error, scope["state"]["request_id"])
            if not scope["state"]["status"]:  # the answer has not begun
                await answer.response()(scope, receive, send)

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._n_arrived += 1
        try:
            key = self._check(scope)
        except ApiError as refusal:
            if "expect" not in Headers(scope=scope) and self._n_refusals < MAX_REFUSALS:
                self._n_refusals += 1
                try:
                    await self._read(scope, receive, refusal)
                finally:
                    self._n_refusals -= 1
            raise
        self.open[key] += 1
        try:
            await self._wait_turn()
            body = await self._read(scope, receive)
            waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

            async def replay() -> Message:
                return waiting.pop() if waiting else await receive()

            await self.app(scope, replay, send)
        finally:
            self.open[key] -= 1
            if on_end := scope["state"].get("on_end"):  # of a generation, see Call
                on_end()

    def _check(self, scope: Scope) -> str:
        """Return the name of a request's key; raises ApiError for a request that is refused."""
        if self.open.total() >= self.settings.max_open:
            scope["state"]["is_overload"] = True  # many come at once: see RequestLog
            raise ApiError(503, "The server is busy; try again in a moment.", code="overloaded")
        key = scope["state"]["key"] = authenticate(scope, self.settings)
        most = self.max_open_per_key
        if most is not None and self.open[key] >= most:
            message = f"This key has {most} requests open, as many as it may; wait for one to end."
            raise ApiError(429, message, code="rate_limit_exceeded")
        headers = Headers(scope=scope)
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self.settings.max_body_bytes:
            raise self._too_large()
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # browsers send other types across sites without a preflight
            message = f"The body has Content-Type {kind!r}; send 'Content-Type: application/json'."
            raise ApiError(415, message, code="unsupported_media_type")
        return key

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

    async def _read(self, scope: Scope, receive: Receive, refusal: ApiError | None = None) -> bytes:
        """Return a body that arrives within `body_s`; raises ApiError, a refusal at its end."""
        body = bytearray()
        with anyio.move_on_after(self.settings.body_s):
            async for part in Request(scope, receive).stream():
                if refusal is None:
                    body += part
                    if len(body) > self.settings.max_body_bytes:
                        refusal = self._too_large()
            if refusal is None:
                return bytes(body)
            raise refusal
        message = f"The body did not arrive within {self.settings.body_s:g} s."
        raise ApiError(408, message, headers={"Connection": "close"})

    def _too_large(self) -> ApiError:
        n_bytes = self.settings.max_body_bytes
        message = f"The body is larger than {n_bytes:,} bytes, the most this server reads."
        return ApiError(413, message, code="request_too_large")


def resolved(scope: Scope) -> Scope:
    """Return a request as routes know it: HEAD as GET, and an address of the API as it is meant.

    Addresses of pages stay: the files of a page are relative to it.
    """
    root = scope.get("root_path", "")
    path = normalized(scope["path"].removeprefix(root))
    if path.startswith("/v1") or scope["method"] == "POST":
        scope = {**scope, "path": root + path}
    # Servers leave the body out of an answer to HEAD.
    return {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
