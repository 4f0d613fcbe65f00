"""Cross-origin requests: pages of any origin may ask, on every answer, errors included.

Starlette's own middleware answers a preflight with a fixed list of headers; clients send ever new
ones (`x-stainless-*`), and `*` does not cover Authorization (Fetch standard), so what was asked for
is allowed. There are no cookies, so no credentials.
"""

from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

EXPOSED = "x-request-id, retry-after, x-should-retry"
METHODS = "GET, POST, OPTIONS"
MAX_AGE_S = 86_400


class Origins:
    """The origins whose pages may ask; `*` is all."""

    def __init__(self, origins: Sequence[str]) -> None:
        self._origins = set(origins)

    def headers(self, origin: str) -> dict[str, str]:
        """Return what an answer to a page of this origin says."""
        exposed = {"Access-Control-Expose-Headers": EXPOSED}
        if "*" in self._origins:
            return {"Access-Control-Allow-Origin": "*", **exposed}
        if origin in self._origins:
            return {"Access-Control-Allow-Origin": origin, "Vary": "Origin", **exposed}
        return {"Vary": "Origin"}


class Cors:
    """Answer every OPTIONS, and put the headers on every other answer."""

    def __init__(self, app: ASGIApp, origins: Sequence[str], private_network: bool) -> None:
        self.app = app
        self.origins = Origins(origins)
        self.private_network = private_network

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        asked = Headers(scope=scope)
        allowed = self.origins.headers(asked.get("origin", ""))

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(allowed)
            await send(message)

        if scope["method"] == "OPTIONS":
            preflight = Response(status_code=204, headers=self._preflight(asked))
            await preflight(scope, receive, send_with_headers)
        else:
            await self.app(scope, receive, send_with_headers)

    def _preflight(self, asked: Headers) -> dict[str, str]:
        headers = {
            "Access-Control-Allow-Methods": METHODS,
            "Access-Control-Allow-Headers": asked.get("access-control-request-headers", "*"),
            "Access-Control-Max-Age": str(MAX_AGE_S),
        }
        if self.private_network and "access-control-request-private-network" in asked:
            headers["Access-Control-Allow-Private-Network"] = "true"
        return headers
