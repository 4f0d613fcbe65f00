"""Addresses as clients write them: superfluous slashes, a doubled /v1, routes of other servers."""

from starlette.types import Scope

CHAT, COMPLETIONS = "POST /v1/chat/completions", "POST /v1/completions"
# Routes of the OpenAI API, of Anthropic's, Ollama's, llama.cpp's and TGI's, by the first part.
ALTERNATIVES = {
    **dict.fromkeys(("responses", "messages", "chat", "assistants", "threads", "realtime"), CHAT),
    **dict.fromkeys(("edits", "completion", "generate", "infill", "batches"), COMPLETIONS),
    **dict.fromkeys(("engines", "tags", "deployments"), "GET /v1/models"),
    "moderations": "POST /classify",
    "fine_tuning": "python train.py stage=instruct",
}


def resolved(scope: Scope) -> Scope:
    """Return a request as routes know it: HEAD as GET, and an address of the API as it is meant.

    Addresses of pages stay: the files of a page are relative to it.
    """
    root = scope.get("root_path", "")
    path = normalized(scope["path"].removeprefix(root))
    if path.startswith("/v1") or scope["method"] == "POST":
        scope = {**scope, "path": root + path}
    # Servers leave the body out of an answer to HEAD.
    return {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope


def normalized(path: str) -> str:
    """Return the address that is meant.

    >>> normalized("/v1//chat/completions/"), normalized("/v1/v1/models"), normalized("/")
    ('/v1/chat/completions', '/v1/models', '/')
    """
    parts = [part for part in path.split("/") if part]
    while parts[:2] == ["v1", "v1"]:
        del parts[0]
    return "/" + "/".join(parts)


def alternative(path: str) -> str:
    """Return what to use instead of an unknown route, "" for nothing known."""
    if (meant := normalized(path)) != path:
        return meant
    if path.endswith("/chat/completions"):
        return CHAT
    parts = [part for part in path.split("/") if part not in ("", "v1", "api", "openai")]
    return ALTERNATIVES.get(parts[0] if parts else "", "")
