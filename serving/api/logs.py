"""One line of the log for each request, with the request's id and without its text."""

import asyncio
import logging
import re
import secrets
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.api.metrics import Metrics
from serving.api.paths import resolved

OVERLOAD_LOG_S = 1.0  # requests refused within it are one line of the log
QUIET = ("/health", "/ready", "/metrics")

access = logging.getLogger("nanogpt.access")
_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class RequestLog:
    """Give a request its id, and count and log the end of it.

    Routes add to `scope["state"]["log"]` what they know: model, tokens, finish reason. Answers are
    not stored by caches unless their route sets other headers.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics
        self._n_refused = 0  # because of max_open, since the last line about these

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        scope = resolved(scope)
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _SANE_ID.fullmatch(given) else f"req-{secrets.token_hex(12)}"
        state = scope.setdefault("state", {})
        began = time.monotonic()
        state.update(request_id=request_id, key="", log={}, arrived=began, status=0)
        if connection := state.get("connection"):
            connection.request_started(request_id)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                state["status"] = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers.setdefault("Cache-Control", "no-store")
            await send(message)
            if (
                connection
                and message["type"] == "http.response.body"
                and not message.get("more_body")
            ):
                connection.request_ended()

        try:
            with self.metrics.open.track_inprogress():
                await self.app(scope, receive, send_with_id)
        finally:
            seconds = time.monotonic() - began
            route = getattr(scope.get("route"), "path", "unknown")  # there are only so many
            if state.get("is_overload"):
                self._log_overload()
                route = "refused"
            else:
                self._log(scope, seconds)
            self.metrics.count(scope["method"], route, state["status"], seconds)

    def _log(self, scope: Scope, seconds: float) -> None:
        state, method, path = scope["state"], scope["method"], scope["path"][:200]
        status = state["status"]
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

    def _log_overload(self) -> None:
        if not self._n_refused:
            asyncio.get_running_loop().call_later(OVERLOAD_LOG_S, self._log_refused)
        self._n_refused += 1

    def _log_refused(self) -> None:
        fields = {"refused": self._n_refused}
        access.warning(
            "refused %d requests as they came", self._n_refused, extra={"fields": fields}
        )
        self._n_refused = 0
