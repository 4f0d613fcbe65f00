"""Access to the Hugging Face hub: its reachability and its errors, each in one sentence."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from nanogpt.text import first_line

TIMEOUT_S = 5.0
BAD_GATEWAY = (502, 503, 504)  # a proxy that has no way to the hub
TRANSPORTS = {"httpx", "httpx2", "httpcore", "requests", "urllib3", "h11", "aiohttp"}

log = logging.getLogger("nanogpt")


@contextmanager
def hub_errors(what: str, instead: str) -> Iterator[None]:
    """Check that the hub answers; raise an error of the hub in the block in one sentence.

    `what` is fetched in the block, `instead` is how a user avoids it: both complete the sentence.
    Raises ConnectionError where the hub cannot be reached, within seconds, and where it breaks off,
    PermissionError where it has no such repository for this machine, FileNotFoundError where that
    has no such file or revision, and ValueError where `datasets` cannot read it. Other errors pass.

    >>> with hub_errors("the weights of gpt2", "copy data/weights/gpt2 here"):
    ...     hf_hub_download("openai-community/gpt2", "config.json")
    ConnectionError: the weights of gpt2 cannot be fetched: https://huggingface.co cannot be reached
    (ConnectError); copy data/weights/gpt2 here
    """
    from huggingface_hub import constants

    offline = constants.HF_HUB_OFFLINE
    if problem := "HF_HUB_OFFLINE is set" if offline else problem_of(constants.ENDPOINT):
        raise ConnectionError(f"{what} cannot be fetched: {problem}; {instead}")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # no warning for each retry
    try:
        yield
    except Exception as error:
        if (explained := _explanation(error, what, instead)) is None:
            raise
        raise explained from error


def problem_of(endpoint: str) -> str:
    """Return why an endpoint does not answer within `TIMEOUT_S` seconds, "" if it does.

    The request is one of huggingface_hub's own session, so that proxies apply; its downloads would
    retry for a minute and more.
    """
    from huggingface_hub.utils import get_session

    log.info("connecting to %s", endpoint)
    try:
        answer = get_session().head(endpoint, timeout=TIMEOUT_S)
    except Exception as error:  # of requests, httpx or httpx2, by the version of huggingface_hub
        return f"{endpoint} cannot be reached ({type(error).__name__})"
    return f"{endpoint} answered {answer.status_code}" if answer.status_code in BAD_GATEWAY else ""


def _explanation(error: Exception, what: str, instead: str) -> Exception | None:
    """Return an error of huggingface_hub, or of a library below it, as one sentence, else None."""
    from huggingface_hub import errors

    chain: list[BaseException] = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)

    def is_a(kind: type[Exception]) -> bool:
        return any(isinstance(e, kind) for e in chain)

    http = [e for e in chain if isinstance(e, errors.HfHubHTTPError)]
    status = next((e.response.status_code for e in http if e.response is not None), None)
    is_lost = any(
        isinstance(e, errors.LocalEntryNotFoundError | ConnectionError | TimeoutError)
        or type(e).__module__.partition(".")[0] in TRANSPORTS
        for e in chain
    )
    if is_a(errors.RevisionNotFoundError) or (is_a(errors.EntryNotFoundError) and not is_lost):
        return FileNotFoundError(f"{what} has no such file or revision ({brief(error)}); {instead}")
    hidden = type(error).__name__ == "DatasetNotFoundError"  # datasets drops its cause
    if hidden or is_a(errors.RepositoryNotFoundError) or status in (401, 403):
        return PermissionError(
            f"{what} is not on the hub, or is gated or private: correct its name, accept its terms "
            f"on its page, and set HF_TOKEN to a token that may read it "
            f"(huggingface.co/settings/tokens)"
        )
    if status or is_lost:
        return ConnectionError(
            f"fetching {what} broke off ({type(error).__name__}: {brief(error)}); "
            f"the same command continues it, or {instead}"
        )
    if type(error).__module__.startswith("datasets."):
        return ValueError(f"{what} cannot be read ({brief(error)}); {instead}")
    return None


def brief(error: Exception) -> str:
    """Return the first line of an error's message within 200 characters."""
    return first_line(error).rstrip(".")[:200]
