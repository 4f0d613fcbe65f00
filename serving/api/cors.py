"""Cross-origin requests: which pages may call the API, on every answer, errors included.

Starlette's own middleware answers a preflight with a fixed list of headers; clients send ever new
ones (`x-stainless-*`), and `*` does not cover Authorization (Fetch standard), so the requested
headers are allowed. There are no cookies, so no credentials.
"""

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.api.auth import host_name, is_loopback
from serving.api.settings import ApiSettings

EXPOSED = "x-request-id, retry-after, x-should-retry"
METHODS = "GET, HEAD, POST, OPTIONS"
MAX_AGE_S = 86_400


class Origins:
    """The origins whose pages may call the API.

    Of `cors_origins`, `*` is any and `auto` is any where API keys protect the server, else those
    of loopback addresses.
    """

    def __init__(self, settings: ApiSettings) -> None:
        self._origins = set(settings.cors_origins)
        auto = "auto" in self._origins
        self._any = "*" in self._origins or (auto and bool(settings.api_keys))
        self._loopback = auto

    def allow(self, origin: str) -> bool:
        """Return whether pages of an origin may call the API."""
        return self._any or origin in self._origins or (self._loopback and _is_local_page(origin))

    def headers(self, origin: str) -> dict[str, str]:
        """Return the headers of an answer to a page of this origin."""
        if not self.allow(origin):
            return {}
        allowed = "*" if self._any else origin
        return {"Access-Control-Allow-Origin": allowed, "Access-Control-Expose-Headers": EXPOSED}


class Cors:
    """Answer every OPTIONS, and add the headers to every other answer, which no cache may store."""

    def __init__(self, app: ASGIApp, origins: Origins, private_network: bool) -> None:
        self.app = app
        self.origins = origins
        self.private_network = private_network

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        requested = Headers(scope=scope)
        allowed = self.origins.headers(requested.get("origin", ""))

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(allowed)
                headers.add_vary_header("Origin")
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        if scope["method"] == "OPTIONS":
            preflight = Response(status_code=204, headers=self._preflight(requested))
            await preflight(scope, receive, send_with_headers)
        else:
            await self.app(scope, receive, send_with_headers)

    def _preflight(self, requested: Headers) -> dict[str, str]:
        headers = {
            "Access-Control-Allow-Methods": METHODS,
            "Access-Control-Allow-Headers": requested.get("access-control-request-headers", "*"),
            "Access-Control-Max-Age": str(MAX_AGE_S),
        }
        if self.private_network and "access-control-request-private-network" in requested:
            headers["Access-Control-Allow-Private-Network"] = "true"
        return headers


def _is_local_page(origin: str) -> bool:
    scheme, _, host = origin.partition("://")
    return scheme in ("http", "https") and is_loopback((host_name(host), 0))
