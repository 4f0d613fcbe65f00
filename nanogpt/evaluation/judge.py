"""Replies to instructions scored from 0 to 100 by another model, over any OpenAI-compatible API.

    python -m nanogpt.evaluate RUN --task judge --data FILE.jsonl \\
        --judge-url http://127.0.0.1:11434/v1 --judge-model llama3 [--answers FILE.jsonl]

The judge sees instruction, reference and reply, and is to answer with a number alone. Every answer
is written to `--answers` as it comes, word for word, with what was asked; the same command goes on
after the last one. The key is --judge-key, or OPENAI_API_KEY for the hosts that it is meant for.
"""

import contextlib
import hashlib
import http.client
import ipaddress
import json
import logging
import os
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nanogpt.checkpoint import Checkpoint, weights_sha256
from nanogpt.evaluation.instructions import Conversation, reply
from nanogpt.evaluation.results import Results, mean_and_error
from nanogpt.prompts import trimmed

log = logging.getLogger(__name__)

ATTEMPTS = 3  # the later ones at a temperature, for the judge to find other words
ANSWER_TOKENS = 32
TIMEOUT_S = 120.0
_OUT_OF = re.compile(r"\s*(/|out of)\s*100\b")
# a number that ends its line or its part of a sentence, but for the `1.` that begins a list
_SCORE = re.compile(
    r"(?<![\w.,/–-])(?!1[.)]\s+\w)(\d{1,3})(?:\s*%|\s+points?\b)?(?=[^\w\s/–-]*(?:\s*$|[.,;]\s))",
    re.MULTILINE,
)
_BEGINNING = re.compile(rb'\{"key": "[0-9a-f]{64}", "score": ')  # of every answer that is kept
PROMPT = """You are grading a reply to an instruction.

Instruction:
{instruction}

A correct reply:
{reference}

The reply to grade:
{reply}

How good is the reply to grade, from 0 (useless) to 100 (as good as can be)? \
Answer with one whole number and nothing else."""


@dataclass(frozen=True)
class Judge:
    """A model behind an OpenAI-compatible API."""

    url: str
    model: str
    key: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", self.key.strip())  # of a file's line end
        if not _is_address(self.url):
            raise ValueError(f"--judge-url {self.url!r} is no address; pass http://HOST:PORT/v1")
        if not (self.key.isascii() and self.key.isprintable()):
            raise ValueError(
                "--judge-key (or OPENAI_API_KEY) has characters that no key has; copy it anew"
            )

    def ask(self, prompt: str, temperature: float = 0.0) -> str:
        """Return the judge's answer; raises ConnectionError, with the address, where none comes."""
        request = self._request(prompt, temperature)
        judge = f"the judge at {request.full_url}"
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
                text = response.read()
        except urllib.error.HTTPError as error:
            said = self._without_key(error.read().decode("utf-8", "replace"))[:300]
            raise ConnectionError(f"{judge} refused with {error.code}: {said}") from error
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise ConnectionError(
                f"{judge} cannot be reached ({reason}); start it or mend --judge-url"
            ) from error
        except ValueError as error:  # its text may quote a header
            raise ConnectionError(f"{judge} cannot be asked; mend --judge-url") from error
        try:
            answered = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConnectionError(f"{judge} did not answer in JSON ({error})") from error
        try:
            return str(answered["choices"][0]["message"]["content"] or "")
        except (LookupError, TypeError) as error:
            said = self._without_key(str(answered))[:200]
            raise ConnectionError(f"{judge} answered {said}, no chat completion") from error

    def _request(self, prompt: str, temperature: float) -> urllib.request.Request:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": temperature,
            "max_tokens": ANSWER_TOKENS,
        }
        request = urllib.request.Request(
            f"{self.url.rstrip('/')}/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        if self.key:  # for this address alone, whatever it redirects to
            request.add_unredirected_header("Authorization", f"Bearer {self.key}")
        return request

    def _without_key(self, said: str) -> str:
        """Return a server's words in one line; some repeat what they were sent."""
        line = " ".join(said.split())
        return line.replace(self.key, "***") if self.key else line


def environment_key(url: str) -> str:
    """Return OPENAI_API_KEY where a judge's address may have it, else an empty key.

    It goes to OpenAI's API or the host of OPENAI_BASE_URL, over TLS, and to loopback addresses;
    another host would learn a key that was set for other programs.
    """
    key = os.environ.get("OPENAI_API_KEY", "")
    own = os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"
    if not key or not _is_address(url):
        return ""
    host, scheme = _host(url), urllib.parse.urlsplit(url).scheme
    if _is_loopback(host) or (scheme == "https" and host == _host(own)):
        return key
    log.warning(
        "OPENAI_API_KEY is not sent to %s; pass --judge-key KEY if it is meant for it", host
    )
    return ""


def _host(url: str) -> str:
    return urllib.parse.urlsplit(url).hostname or ""


def _is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _is_address(url: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # of brackets or a port
        return False


def evaluate(
    checkpoint: Checkpoint,
    conversations: Sequence[Conversation],
    judge: Judge,
    answers_path: Path,
    *,
    max_new_tokens: int,
) -> Results:
    """Return the mean score of the replies; what was answered before is not asked again.

    Raises ValueError where the judge does not give a number in three attempts at one reply; all of
    its answers up to then are kept.
    """
    weights = weights_sha256(checkpoint.model)
    known = read_answers(answers_path)
    scores = []
    for number, messages in enumerate(conversations, start=1):
        key = _key(weights, messages, max_new_tokens, judge.model)
        if key not in known:
            said = trimmed(reply(checkpoint, messages[:-1], max_new_tokens).text)
            known[key] = _score(judge, messages, said, key, answers_path)
        scores.append(known[key])
        log.info("%s of %s: %s", number, len(conversations), known[key])
    return {**mean_and_error("score", np.array(scores)), "examples": len(scores)}


def _score(judge: Judge, messages: Conversation, said: str, key: str, path: Path) -> int:
    """Ask for the score of one reply, keeping every answer."""
    asked = "\n\n".join(text for m in messages[:-1] for text in (m.content, m.context) if text)
    prompt = PROMPT.format(instruction=asked, reference=messages[-1].content, reply=said)
    answer = ""
    for attempt in range(ATTEMPTS):
        answer = judge.ask(prompt, temperature=float(attempt > 0))
        score = read_score(answer)
        record = {"key": key, "score": score, "answer": answer, "judge": judge.model}
        _append(path, {**record, "reply": said, "prompt": prompt})
        if score is not None:
            return score
    raise ValueError(
        f"the judge {judge.model} gave no number from 0 to 100 in {ATTEMPTS} attempts (it said "
        f"{answer[:80]!r}); its answers are in {path}: pass another --judge-model, and the same "
        "command goes on from there"
    )


def read_score(answer: str) -> int | None:
    """Return the one whole number from 0 to 100 in an answer, None for anything else.

    `85`, `Score: 85`, `85/100` and `**85**` are 85; `8.5`, `8/10`, `70-80` and `2 mistakes` are
    nothing.
    """
    text = _OUT_OF.sub(".", answer)
    found = [int(match[1]) for match in _SCORE.finditer(text)]
    is_one = len(set(found)) == 1 and len(found) == len(re.findall(r"\d+", text))
    return found[0] if is_one and found[0] <= 100 else None


def read_answers(path: Path) -> dict[str, int]:
    """Return the scores that a file of answers has, by key, and make it end with a whole line.

    What a kill left of a last line is cut off. Raises ValueError, and leaves the file as it is, for
    one that has anything but answers.
    """
    if not path.is_file():
        return {}
    text = path.read_bytes()
    *lines, last = text.split(b"\n")
    rows = [_row(line, f"{path}, line {i}") for i, line in enumerate(lines, 1) if line.strip()]
    if last and (rows or _BEGINNING.match(last)) and _json(last) is None:
        os.truncate(path, len(text) - len(last))
    elif last.strip():
        rows.append(_row(last, f"{path}, line {len(lines) + 1}"))
        with path.open("ab") as file:
            file.write(b"\n")
    return {row["key"]: row["score"] for row in rows if row["score"] is not None}


def _row(line: bytes, where: str) -> dict[str, Any]:
    """Return what `_score` has written; raises ValueError where it has not."""
    row = _json(line)
    if (
        not isinstance(row, dict)
        or not re.fullmatch("[0-9a-f]{64}", str(row.get("key")))
        or not isinstance(row.get("score", ""), int | None)
    ):
        raise ValueError(
            f"{where} is no answer of a judge; pass --answers FILE, a new file or one of answers"
        )
    return row


def _json(line: bytes) -> Any:
    """Return what a line says, None where it is not JSON."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _append(path: Path, record: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _key(weights: str, messages: Conversation, max_new_tokens: int, judge_model: str) -> str:
    said = [[m.role, m.content, m.context] for m in messages]
    asked = json.dumps([weights, said, max_new_tokens, judge_model, PROMPT])
    return hashlib.sha256(asked.encode()).hexdigest()
