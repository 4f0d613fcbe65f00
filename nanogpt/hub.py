"""Whether the Hugging Face hub answers: asked once and briefly, before anything is fetched."""

import logging
import threading

ANSWERS_WITHIN_S = 5.0
log = logging.getLogger("nanogpt")
BAD_GATEWAY = (502, 503, 504)  # a proxy that has no way to the hub


def check_reachable(wanted: str, instead: str) -> None:
    """Raise ConnectionError, within `ANSWERS_WITHIN_S` seconds, where the hub does not answer.

    Asked through huggingface_hub's own session, so that proxies, HF_ENDPOINT and HF_HUB_OFFLINE
    count; its downloads would retry for a minute and more. `wanted` is what was to be fetched and
    `instead` what the user can do without: they complete the sentence.

    >>> check_reachable("the weights of gpt2", "copy data/weights/gpt2 here")
    ConnectionError: the weights of gpt2 cannot be fetched: https://huggingface.co cannot be reached
    (ConnectError); copy data/weights/gpt2 here
    """
    from huggingface_hub import constants

    problem = "HF_HUB_OFFLINE is set"
    if not constants.HF_HUB_OFFLINE:
        problem = problem_of(constants.ENDPOINT)
    if problem:
        raise ConnectionError(f"{wanted} cannot be fetched: {problem}; {instead}")


def problem_of(endpoint: str) -> str:
    """Return why an endpoint does not answer within `ANSWERS_WITHIN_S` seconds, "" if it does."""
    log.info("connecting to %s", endpoint)
    found: list[str] = []
    # The name service has no time limit of its own, hence a thread that can be left behind.
    thread = threading.Thread(target=lambda: found.append(_ask(endpoint)), daemon=True)
    thread.start()
    thread.join(ANSWERS_WITHIN_S)
    return found[0] if found else f"{endpoint} did not answer in {ANSWERS_WITHIN_S:g} s"


def _ask(endpoint: str) -> str:
    from huggingface_hub.utils import get_session

    try:
        answer = get_session().head(endpoint, timeout=ANSWERS_WITHIN_S)
    except Exception as error:  # of requests, httpx or httpx2, by the version of huggingface_hub
        return f"{endpoint} cannot be reached ({type(error).__name__})"
    return f"{endpoint} answered {answer.status_code}" if answer.status_code in BAD_GATEWAY else ""
