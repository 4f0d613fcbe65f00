"""One line of the log for each request, with the request's id and without its text."""

import logging
import re
import secrets
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.api.metrics import Metrics

access = logging.getLogger("nanogpt.access")
_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class RequestLog:
    """Give a request its id, and count and log the end of it.

    Routes add to `scope["state"]["log"]` what they know: model, tokens, finish reason.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = new_request_id(Headers(scope=scope))
        state = scope.setdefault("state", {})
        status, began = 0, time.monotonic()
        state.update(request_id=request_id, log={}, arrived=began)

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        self.metrics.open += 1
        try:
            await self.app(scope, receive, send_with_id)
        finally:
            self.metrics.open -= 1
            seconds = time.monotonic() - began
            self.metrics.count(scope["method"], _route(scope), status, seconds)
            self._log(scope, status, seconds)

    def _log(self, scope: Scope, status: int, seconds: float) -> None:
        state = scope["state"]
        fields = {
            "request_id": state["request_id"],
            "method": scope["method"],
            "path": scope["path"][:200],
            "status": status,
            "duration_ms": round(seconds * 1e3, 1),
            "client": (scope.get("client") or ("",))[0],
            "key": state.get("key", "")[:8],
            **state["log"],
        }
        quiet = scope["path"] in ("/health", "/ready", "/metrics") and status < 400
        level = logging.DEBUG if quiet else logging.INFO
        access.log(
            level, "%s %s %d", scope["method"], fields["path"], status, extra={"fields": fields}
        )


def new_request_id(headers: Headers) -> str:
    """Return the client's id for the request where it is harmless, else a new one."""
    given = headers.get("x-request-id", "")
    return given if _SANE_ID.fullmatch(given) else f"req-{secrets.token_hex(12)}"


def _route(scope: Scope) -> str:
    """Return the route's pattern, so that there are only so many labels of a metric."""
    return getattr(scope.get("route"), "path", "unknown")
