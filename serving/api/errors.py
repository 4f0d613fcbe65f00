"""Errors as OpenAI's clients expect them: one object for every answer that is not 2xx.

The types and codes are those that clients have words for (openai/openai-python, `_exceptions.py`;
lobehub/lobe-chat, `handleOpenAIError.ts`).
"""

import json
import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from serving.engine.client import EngineError
from serving.engine.messages import FailureKind
from serving.logs import of_request

log = logging.getLogger(__name__)

MAX_MESSAGE_CHARS = 1000  # of a message, which may quote the request
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
OF_ENGINE: dict[FailureKind, tuple[int, str | None, str | None]] = {  # status, code, param
    "invalid": (400, None, None),
    "context_length": (400, "context_length_exceeded", "prompt"),
    "not_found": (404, "model_not_found", "model"),
    "overloaded": (503, "overloaded", None),
    "unavailable": (503, "unavailable", None),
    "internal": (500, None, None),
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
        self.headers = {"Cache-Control": "no-store", **(headers or {})}
        if status in (429, 503):  # soon where the server is busy, never where it would fail again
            self.headers["Retry-After"] = "1"
        elif status >= 500:
            self.headers["x-should-retry"] = "false"

    def content(self) -> dict[str, Any]:
        """Return the body of the answer."""
        default = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = TYPES.get(self.status, default)
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> Response:
        """Return the answer; ASCII only, as a message may quote any text."""
        body = json.dumps(self.content())
        return Response(body, self.status, self.headers, media_type="application/json")


def from_exception(error: Exception, request_id: str) -> ApiError:
    """Return the answer for an exception; the reason of an unexpected one is only logged."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, EngineError):
        status, code, param = OF_ENGINE[error.kind]
        return ApiError(status, str(error), param=param, code=code)
    if isinstance(error, ClientDisconnect):
        return ApiError(499, "The client left.")  # for the log alone
    log.error("a request failed", exc_info=error, extra=of_request(request_id))
    return ApiError(500, "The server failed on this request; its log has the reason.")


def normalized(path: str) -> str:
    """Return the address that is meant.

    >>> normalized("/v1//chat/completions/"), normalized("/v1/v1/models"), normalized("/")
    ('/v1/chat/completions', '/v1/models', '/')
    """
    parts = [part for part in path.split("/") if part]
    while parts[:2] == ["v1", "v1"]:
        del parts[0]
    return "/" + "/".join(parts)


async def answer_http_error(request: Request, error: HTTPException) -> Response:
    """Answer an unknown route and a wrong method with the right one."""
    status, route = error.status_code, f"{request.method} {request.url.path}"
    code, message = None, str(error.detail or HTTPStatus(status).phrase)
    if status == 404:
        meant = normalized(request.url.path)
        use = f"use {meant}" if meant != request.url.path else "the API is under /v1"
        code = "not_found"
        message = f"There is no {route[:200]}; {use}, and GET /v1 lists the routes."
    elif status == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        code, message = "method_not_allowed", f"{route} is not allowed; use {allowed}."
    return ApiError(status, message, code=code, headers=error.headers).response()


async def answer_invalid(request: Request, error: RequestValidationError) -> Response:
    """Answer a body that is not what the route takes, with the first field at fault."""
    problems: Any = error.errors()
    first = problems[0]
    if first["type"] == "json_invalid":
        message = f"The body is not JSON: {first['ctx']['error']}."
        return ApiError(400, message, code="invalid_json").response()
    if len(first["loc"]) < 2:
        return ApiError(400, "The body must be a JSON object.").response()
    param = str(first["loc"][1])
    found = [p for p in problems if p["loc"][1:2] == (param,)]
    # Of a union, the alternatives of the value's own type have the reason.
    found = [p for p in found if not p["type"].endswith("_type")] or found
    either = "; or ".join(dict.fromkeys(p["msg"].removeprefix("Value error, ") for p in found))
    deepest = max(found, key=lambda p: (len(p["loc"]), p["type"] != "missing"))
    if deepest["type"] == "missing" and len(deepest["loc"]) > 2:  # the alternative that was meant
        either = f"the field {deepest['loc'][-1]!r} is missing"
    return ApiError(400, f"Invalid value for {param!r}: {either}.", param=param).response()


HANDLERS: Any = {HTTPException: answer_http_error, RequestValidationError: answer_invalid}
