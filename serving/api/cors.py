"""Cross-origin requests: which pages may call the API, on every answer, errors included.

There are no cookies, so no credentials. Clients send ever new headers (`x-stainless-*`), and `*`
does not cover Authorization (Fetch standard), so the requested headers are allowed.
"""

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

from serving.api.auth import allows_any_origin, allows_origin
from serving.api.errors import ApiError
from serving.api.settings import ApiSettings


class Cors(CORSMiddleware):
    """Starlette's middleware for `cors_origins`; a refused preflight is an error like others."""

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
