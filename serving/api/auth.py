"""Authentication by API keys, and the names of loopback addresses."""

import hashlib
import hmac
import ipaddress
import time
from collections.abc import Iterable
from contextlib import suppress
from functools import lru_cache
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.api.errors import ApiError

PUBLIC = {"/", "/health", "/ready"}
PUBLIC_PREFIX = "/static/"  # the page's files
TICKET_S = 3600


class ApiKeys:
    """The keys that open the API; only their hashes are kept."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys if key]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def identify(self, key: bytes) -> str | None:
        """Return a name for the key that does not tell it, or None where it is not one of ours.

        Takes as long for a right key as for a wrong one.
        """
        given = hashlib.sha256(key).digest()
        known = [hmac.compare_digest(given, digest) for digest in self._digests]
        return given.hex()[:16] if any(known) else None

    def ticket(self, path: str) -> str:
        """Return what opens one path for an hour, for an address that is opened without headers."""
        return self._ticket(path, int(time.time()) + TICKET_S)

    def admits(self, path: str, ticket: str) -> bool:
        """Return whether a ticket is one of ours, for this path, and not too old."""
        expires = ticket.partition("-")[0]
        if not (expires.isascii() and expires.isdecimal()) or len(expires) > 12 or not self:
            return False
        ours = self._ticket(path, int(expires))
        return hmac.compare_digest(ours.encode(), ticket.encode()) and time.time() < int(expires)

    def _ticket(self, path: str, expires: int) -> str:
        message = f"{expires}\n{path}".encode("utf-8", "surrogateescape")
        return f"{expires}-{hmac.new(b''.join(self._digests), message, 'sha256').hexdigest()}"


class Auth:
    """Require a key where there are any; `scope["state"]["key"]` names the one given."""

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self.app = app
        self.keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not is_public(scope["path"]):
            try:
                scope.setdefault("state", {})["key"] = self._identify(scope)
            except ApiError as error:
                await error.response()(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _identify(self, scope: Scope) -> str:
        if not self.keys:
            return ""
        if self.keys.admits(scope["path"], _given_ticket(scope)):
            return "ticket"
        given = _given_key(Headers(scope=scope))
        name = self.keys.identify(given) if given else None
        if name is None:
            what = "Incorrect API key" if given else "No API key"
            message = f"{what}; send it as 'Authorization: Bearer KEY' or 'X-API-Key: KEY'."
            headers = {"WWW-Authenticate": "Bearer"}
            raise ApiError(401, message, code="invalid_api_key", headers=headers)
        return name


def is_public(path: str) -> bool:
    """Return whether a path is answered without a key."""
    return path in PUBLIC or path.startswith(PUBLIC_PREFIX)


def is_loopback(server: tuple[str, int | None] | None) -> bool:
    """Return whether a request came to an address that only this machine can reach."""
    if server is None or server[1] is None:  # a Unix socket
        return True
    return _is_loopback(server[0])


@lru_cache(maxsize=64)
def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def host_name(host: str) -> str:
    """Return the name or address in a Host header, or in an origin after its `//`."""
    with suppress(ValueError):
        return urlsplit(f"//{host}").hostname or ""
    return ""


def _given_key(headers: Headers) -> bytes | None:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip().encode("latin-1")
    key = headers.get("x-api-key", "").strip() or headers.get("api-key", "").strip()  # Azure's
    return key.encode("latin-1") if key else None


def _given_ticket(scope: Scope) -> str:
    if scope["method"] not in ("GET", "HEAD"):
        return ""
    query = parse_qs(scope.get("query_string", b"").decode("latin-1"))
    return query.get("ticket", [""])[0]
