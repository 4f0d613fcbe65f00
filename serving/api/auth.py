"""Authentication: API keys, or without keys only programs and pages of this machine.

A loopback address keeps other machines out, but not what reaches it through this one: a web page
in its user's browser sends requests across sites, or lets its own host name resolve to 127.0.0.1
(DNS rebinding), and a reverse proxy passes on what others send. A proxy that adds no forwarding
header cannot be recognised.
"""

import hashlib
import hmac
import ipaddress
import time
from contextlib import suppress
from functools import lru_cache
from urllib.parse import urlsplit

from starlette.datastructures import Headers, QueryParams
from starlette.types import Scope

from serving.api.errors import ApiError
from serving.api.settings import ApiSettings

PUBLIC = {"/", "/runs", "/health", "/ready"}  # and the pages' files
TICKET_S = 3600
FORWARDING = {
    *("forwarded", "via", "x-real-ip", "x-client-ip", "x-cluster-client-ip", "true-client-ip"),
    *("cf-connecting-ip", "fastly-client-ip", "x-original-host", "x-original-forwarded-for"),
    *("x-envoy-external-address", "x-proxycontextpath"),
}


def key_name(key: bytes, settings: ApiSettings) -> str | None:
    """Return a name for an API key that does not reveal it, None for an unknown one.

    Takes as long for a right key as for a wrong one.
    """
    given = _digest(key)
    known = [hmac.compare_digest(given, _digest(k.encode())) for k in settings.api_keys]
    return given.hex()[:16] if any(known) else None


def ticket(path: str, settings: ApiSettings, expires: str = "") -> str:
    """Return what opens one path for an hour, for an address that is opened without headers."""
    expires = expires or str(int(time.time()) + TICKET_S)
    message = f"{expires}\n{path}".encode("utf-8", "surrogateescape")
    secret = b"".join(_digest(key.encode()) for key in settings.api_keys)
    return f"{expires}-{hmac.new(secret, message, 'sha256').hexdigest()}"


def admits(path: str, given: str, settings: ApiSettings) -> bool:
    """Return whether a ticket was issued here, for this path, and has not expired."""
    expires = given.partition("-")[0]
    ours = ticket(path, settings, expires)
    is_ours = bool(settings.api_keys) and hmac.compare_digest(ours.encode(), given.encode())
    return is_ours and time.time() < int(expires)


def authenticate(scope: Scope, settings: ApiSettings) -> str:
    """Return the name of the key that a request carries, "" where none is needed.

    Raises ApiError: 401 for an unknown key, 403 without keys for a request of another machine, or
    of a page of another site.
    """
    if not settings.api_keys:
        if not settings.insecure:
            check_local(scope, settings)
        return ""
    path = scope["path"]
    if path in PUBLIC or path.startswith("/static/") or scope["method"] == "OPTIONS":
        return ""
    given_ticket = QueryParams(scope["query_string"]).get("ticket", "")
    if scope["method"] == "GET" and admits(path, given_ticket, settings):
        return "ticket"
    given = _given_key(Headers(scope=scope))
    name = key_name(given, settings) if given else None
    if name is None:
        what = "Incorrect API key" if given else "No API key"
        message = f"{what}; send it as 'Authorization: Bearer KEY' or 'X-API-Key: KEY'."
        headers = {"WWW-Authenticate": "Bearer"}
        raise ApiError(401, message, code="invalid_api_key", headers=headers)
    return name


def check_local(scope: Scope, settings: ApiSettings) -> None:
    """Raise ApiError 403 for what another machine, or a page of another site, may have sent."""
    headers = Headers(scope=scope)
    hosts = [host_name(host) for host in headers.getlist("host")] or [""]
    is_listed = {host.lower() for host in settings.allowed_hosts}.issuperset(hosts)
    proxies = [h for h in headers if h in FORWARDING or h.startswith("x-forwarded-")]
    address, port = scope.get("server") or ("", None)  # no port: a Unix socket
    if port is not None and not is_loopback(address):
        code, answered = "no_api_keys", "its own machine only"
    elif not is_listed and not all(map(is_loopback, hosts)):
        code = "host_not_allowed"
        answered = f"loopback names and allowed_hosts, not the Host {hosts[0][:80]!r}; add it there"
    elif proxies and not is_listed:
        code = "proxy_not_allowed"
        answered = f"no proxy (here is {proxies[0]!r}); add the proxy's Host to allowed_hosts"
    elif not _is_same_site(headers, scope["method"], settings):
        code, origin = "origin_not_allowed", headers.get("origin", "the origin")[:80]
        answered = f"pages of its own origin and of cors_origins; add {origin!r} there"
    else:
        return
    way = f"{answered}, or set NANOGPT_API_KEYS and send a key"
    raise ApiError(403, f"Without API keys this server answers {way}.", code=code)


def allows_origin(origin: str, settings: ApiSettings) -> bool:
    """Return whether pages of an origin may call the API; see `allows_any_origin`.

    With `auto` among `cors_origins`, those of loopback addresses may.
    """
    scheme, _, host = origin.partition("://")
    is_local = scheme in ("http", "https") and is_loopback(host_name(host))
    listed = settings.cors_origins
    return allows_any_origin(settings) or origin in listed or (is_local and "auto" in listed)


def allows_any_origin(settings: ApiSettings) -> bool:
    """Return whether pages of all origins may call the API: with keys that is the default."""
    listed = settings.cors_origins
    return "*" in listed or ("auto" in listed and bool(settings.api_keys))


@lru_cache(maxsize=64)
def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach a host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def host_name(host: str) -> str:
    """Return the name or address in a Host header, or in an origin after its `//`."""
    with suppress(ValueError):
        return urlsplit(f"//{host}").hostname or ""
    return ""


def _is_same_site(headers: Headers, method: str, settings: ApiSettings) -> bool:
    """Return whether a page that may call the API sent a request, or none did.

    Browsers name the page's origin but where it navigates or embeds; older ones send no
    Sec-Fetch-Site.
    """
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if site in ("same-origin", "none"):
        return True
    if origin is not None:
        return origin.partition("://")[2] == headers["host"] or allows_origin(origin, settings)
    followed_a_link = headers.get("sec-fetch-dest") == "document" and method == "GET"
    return site != "cross-site" or followed_a_link


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _given_key(headers: Headers) -> bytes | None:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip().encode("latin-1")
    key = headers.get("x-api-key", "").strip() or headers.get("api-key", "").strip()  # Azure's
    return key.encode("latin-1") if key else None
