"""Servers without API keys: only programs and pages of this machine are answered.

A loopback address keeps other machines out, but not what reaches it through this one: a web page
in its user's browser sends requests across sites, or lets its own host name resolve to 127.0.0.1
(DNS rebinding), and a reverse proxy passes on what others send. A proxy that adds no forwarding
header cannot be recognised.
"""

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.api.auth import host_name, is_loopback
from serving.api.cors import Origins
from serving.api.errors import ApiError
from serving.api.settings import ApiSettings

FORWARDING = {
    *("forwarded", "via", "x-real-ip", "x-client-ip", "x-cluster-client-ip", "true-client-ip"),
    *("cf-connecting-ip", "fastly-client-ip", "x-original-host", "x-original-forwarded-for"),
    *("x-envoy-external-address", "x-proxycontextpath"),
}
WAYS_ON = "set NANOGPT_API_KEYS and send a key"


class LocalOnly:
    """Refuse on every route, with 403, what does not come from this machine."""

    def __init__(self, app: ASGIApp, settings: ApiSettings, origins: Origins) -> None:
        self.app = app
        self.settings = settings
        self.origins = origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not (self.settings.api_keys or self.settings.insecure):
            try:
                check_local(scope, self.settings, self.origins)
            except ApiError as error:
                await error.response()(scope, receive, send)
                return
        await self.app(scope, receive, send)


def check_local(scope: Scope, settings: ApiSettings, origins: Origins) -> None:
    """Raise ApiError 403 for what another machine, or a page of another site, may have sent."""
    headers = Headers(scope=scope)
    if not is_loopback(scope.get("server")):
        message = f"Without API keys this server answers its own machine only; {WAYS_ON}."
        raise ApiError(403, message, code="no_api_keys")
    hosts = [host_name(host) for host in headers.getlist("host")] or [""]
    allowed = {host.lower() for host in settings.allowed_hosts}
    listed = allowed.issuperset(hosts)
    if not listed and not all(is_loopback((host, 0)) for host in hosts):
        message = (
            "Without API keys this server answers requests whose Host is a loopback name or one of "
            f"allowed_hosts, and this Host is {hosts[0][:80]!r}; add it there, or {WAYS_ON}."
        )
        raise ApiError(403, message, code="host_not_allowed")
    forwarding = next((h for h in headers if h in FORWARDING or h.startswith("x-forwarded-")), None)
    if forwarding and not listed:
        message = (
            f"Without API keys this server answers no proxy (the request carries {forwarding!r}); "
            f"add the proxy's Host to allowed_hosts, or {WAYS_ON}."
        )
        raise ApiError(403, message, code="proxy_not_allowed")
    if not _is_same_site(headers, scope["method"], origins):
        message = (
            "Without API keys this server answers pages of its own origin and of cors_origins; "
            f"add {headers.get('origin', 'the origin')[:80]!r} there, or {WAYS_ON}."
        )
        raise ApiError(403, message, code="origin_not_allowed")


def _is_same_site(headers: Headers, method: str, origins: Origins) -> bool:
    """Return whether a page that may call the API sent a request, or none did.

    Browsers name the page's origin but where it navigates or embeds; older ones send no
    Sec-Fetch-Site.
    """
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if site in ("same-origin", "none"):
        return True
    if origin is not None:
        return origin.partition("://")[2] == headers["host"] or origins.allow(origin)
    followed_a_link = headers.get("sec-fetch-dest") == "document" and method in ("GET", "HEAD")
    return site != "cross-site" or followed_a_link
