"""Errors as OpenAI's clients expect them: one object for every answer that is not 2xx.

The types and codes are those that clients have words for (openai/openai-python, `_exceptions.py`;
lobehub/lobe-chat, `handleOpenAIError.ts`).
"""

import json
import logging
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.api.paths import alternative
from serving.engine.client import EngineError
from serving.engine.messages import FailureKind
from serving.logs import of_request

log = logging.getLogger(__name__)

RETRY_AFTER_S = 1
MAX_MESSAGE_CHARS = 1000  # of a message, which may quote the request
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
OF_ENGINE: dict[FailureKind, tuple[int, str | None]] = {
    "invalid": (400, None),
    "context_length": (400, "context_length_exceeded"),
    "not_found": (404, "model_not_found"),
    "overloaded": (503, "overloaded"),
    "unavailable": (503, "unavailable"),
    "internal": (500, None),
}


class ApiError(Exception):
    """A request that is answered with an error; `param` names the field at fault."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        if len(message) > MAX_MESSAGE_CHARS:
            message = f"{message[:MAX_MESSAGE_CHARS]}..."
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = {**_retry_headers(status), **(headers or {})}

    def content(self) -> dict[str, Any]:
        """Return the body of the answer."""
        default = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": str(self),
                "type": TYPES.get(self.status, default),
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> Response:
        """Return the answer; ASCII only, as a message may quote any text."""
        body = json.dumps(self.content())
        headers = {"Cache-Control": "no-store", **self.headers}
        return Response(body, self.status, headers, media_type="application/json")


def of_engine(error: EngineError) -> ApiError:
    """Return the answer to a request that the engine refused or failed."""
    status, code = OF_ENGINE[error.kind]
    param = {"not_found": "model", "context_length": "prompt"}.get(error.kind)
    return ApiError(status, str(error), param=param, code=code)


def of_any(error: Exception, request_id: str) -> ApiError:
    """Return the answer for an exception; one that was not meant is logged, not told."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, EngineError):
        return of_engine(error)
    if isinstance(error, ClientDisconnect):
        return ApiError(499, "The client left.")  # for the log: nobody reads it
    log.error("a request failed", exc_info=error, extra=of_request(request_id))
    return ApiError(500, "The server failed on this request; its log says why.")


class CatchAll:
    """Answer what nobody caught, before a header was sent."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def note_start(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, receive, note_start)
        except Exception as error:
            request_id = scope.get("state", {}).get("request_id", "")
            response = of_any(error, request_id).response()
            if not started:
                await response(scope, receive, send)


def install(app: FastAPI) -> None:
    """Make the app answer its exceptions so."""

    async def ours(request: Request, error: Exception) -> Response:
        return of_any(error, request.state.request_id).response()

    async def of_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return _of_status(request, error).response()

    async def of_validation(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return _of_validation(error.errors()).response()

    app.add_exception_handler(ApiError, ours)
    app.add_exception_handler(EngineError, ours)
    app.add_exception_handler(ClientDisconnect, ours)
    app.add_exception_handler(HTTPException, of_http)
    app.add_exception_handler(RequestValidationError, of_validation)


def _of_status(request: Request, error: HTTPException) -> ApiError:
    asked = f"{request.method} {request.url.path}"
    if error.status_code == 404:
        other = alternative(request.url.path)
        use = f"use {other}" if other else "the API is under /v1"
        message = f"There is no {asked[:200]}; {use}, and GET /v1 lists the routes."
        return ApiError(404, message, code="not_found")
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        message = f"{asked} is not allowed; use {allowed}."
        return ApiError(405, message, code="method_not_allowed", headers=error.headers)
    phrase = str(error.detail or HTTPStatus(error.status_code).phrase)
    return ApiError(error.status_code, phrase, headers=error.headers)


def _of_validation(errors: Sequence[Any]) -> ApiError:
    """Return the answer to a body that is not what the route takes."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"The body is not JSON: {first['ctx']['error']}.", code="invalid_json")
    place = [str(part) for part in first["loc"][1:]]
    if not place:
        return ApiError(400, "The body must be a JSON object.")
    param = place[0]
    reasons = [e["msg"].removeprefix("Value error, ") for e in errors if e["loc"][1:2] == (param,)]
    either = "; or ".join(dict.fromkeys(reasons))
    return ApiError(400, f"Invalid value for {param!r}: {either}.", param=param)


def _retry_headers(status: int) -> dict[str, str]:
    """Return when to try again: soon where the server is busy, never where it would fail again."""
    if status in (429, 503):
        return {"Retry-After": str(RETRY_AFTER_S)}
    return {"x-should-retry": "false"} if status >= 500 else {}
