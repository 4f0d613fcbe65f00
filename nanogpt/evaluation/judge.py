"""Replies to instructions scored from 0 to 100 by another model, over any OpenAI-compatible API.

    python -m nanogpt.evaluate RUN --task judge --data FILE.jsonl \\
        --judge-url http://127.0.0.1:11434/v1 --judge-model llama3 [--answers FILE.jsonl]

The judge reads instruction, reference and reply, and is to answer with a number alone. Each answer
is appended to `--answers` word for word, with its prompt; the same command continues after the last
one. The key is --judge-key, or OPENAI_API_KEY for the hosts that it is meant for.
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
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import SplitResult, urlsplit

import numpy as np
from pydantic import BaseModel, Field, ValidationError

from nanogpt.checkpoint import Checkpoint, weights_sha256
from nanogpt.evaluation.instructions import read_conversations, reply
from nanogpt.evaluation.results import Results, mean_and_error, run_dir_of
from nanogpt.prompts import Message, trimmed

log = logging.getLogger(__name__)

ATTEMPTS = 3  # the later ones at a temperature, so that the judge finds other words
ANSWER_TOKENS = 32
TIMEOUT_S = 120.0
_OUT_OF = re.compile(r"\s*(/|out of)\s*100\b")
# a number that ends its line or its part of a sentence, but for the `1.` that begins a list
_SCORE = re.compile(
    r"(?<![\w.,/–-])(?!1[.)]\s+\w)(\d{1,3})(?:\s*%|\s+points?\b)?(?=[^\w\s/–-]*(?:\s*$|[.,;]\s))",
    re.MULTILINE,
)
_BEGINNING = re.compile(rb'\{"key": "[0-9a-f]{64}", "score": ')  # of every stored answer
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
    """A model behind an OpenAI-compatible API; raises ValueError for a malformed URL or key."""

    url: str
    model: str
    key: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        if _address(self.url) is None:
            raise ValueError(f"--judge-url {self.url!r} is no address; pass http://HOST:PORT/v1")
        if not (self.key.isascii() and self.key.isprintable()):
            raise ValueError(
                "--judge-key (or OPENAI_API_KEY) has characters that no key has; copy it anew"
            )

    def complete(self, prompt: str, temperature: float = 0.0) -> str:
        """Return the judge's answer; raises ConnectionError, with the address, where none comes."""
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": temperature,
            "max_tokens": ANSWER_TOKENS,
        }
        url = f"{self.url.rstrip('/')}/chat/completions"
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        if self.key:  # for this address alone, whatever it redirects to
            request.add_unredirected_header("Authorization", f"Bearer {self.key}")
        answered: Any = None
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
                answered = json.load(response)
            return str(answered["choices"][0]["message"]["content"] or "")
        except urllib.error.HTTPError as error:
            text = self._redacted(error.read().decode("utf-8", "replace"))
            problem = f"refused with {error.code}: {text}"
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            problem = f"cannot be reached ({reason}); start it or correct --judge-url"
        except (LookupError, TypeError):
            problem = f"answered {self._redacted(str(answered))}, no chat completion"
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            problem = f"did not answer in JSON ({error})"
        except ValueError:  # its message may quote a header
            problem = "cannot be reached; correct --judge-url"
        raise ConnectionError(f"the judge at {url} {problem}")

    def _redacted(self, text: str) -> str:
        """Return the beginning of a server's text in one line; some repeat the key."""
        line = " ".join(text.split())
        return (line.replace(self.key, "***") if self.key else line)[:300]


def environment_key(url: str) -> str:
    """Return OPENAI_API_KEY where it may be sent to a judge's address, else an empty key.

    It is sent to OpenAI's API or the host of OPENAI_BASE_URL, over TLS, and to loopback addresses;
    another host would learn a key that was set for other programs.
    """
    key, address = os.environ.get("OPENAI_API_KEY", ""), _address(url)
    own = _address(os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1")
    if not key or address is None:
        return ""
    host = address.hostname or ""
    is_own = address.scheme == "https" and own is not None and host == own.hostname
    if is_own or _is_loopback(host):
        return key
    log.warning(
        "OPENAI_API_KEY is not sent to %s; pass --judge-key KEY if it is meant for it", host
    )
    return ""


def _is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _address(url: str) -> SplitResult | None:
    with contextlib.suppress(ValueError):  # of brackets or a port
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return parts
    return None


def evaluate(
    checkpoint: Checkpoint,
    judge_url: str,
    judge_model: str,
    judge_key: str | None,
    data: Path,
    limit: int | None,
    max_new_tokens: int,
    answers: Path | None,
) -> Results:
    """Let another model score the replies to a file of instructions and responses.

    Stored answers are used again. Raises FileNotFoundError where the answers have no folder, and
    ValueError where the judge gives no number for a reply in three attempts; its answers up to then
    are stored.
    """
    path = answers or (run_dir_of(checkpoint.path) or checkpoint.path.parent) / "judge.jsonl"
    if not path.parent.is_dir():
        raise FileNotFoundError(f"--answers {path}: there is no folder for it; make one")
    conversations = read_conversations(data, limit)
    key = environment_key(judge_url) if judge_key is None else judge_key
    judge = Judge(judge_url, judge_model, key.strip())  # of a file's line end
    weights, known = weights_sha256(checkpoint.model), read_answers(path)
    scores = []
    for number, messages in enumerate(conversations, start=1):
        texts = [[m.role, m.content, m.context] for m in messages]
        subject = json.dumps([weights, texts, max_new_tokens, judge_model, PROMPT])
        digest = hashlib.sha256(subject.encode()).hexdigest()
        if digest not in known:
            text = trimmed(reply(checkpoint, messages[:-1], max_new_tokens).text)
            known[digest] = _score(judge, messages, text, digest, path)
        scores.append(known[digest])
        log.info("%s of %s: %s", number, len(conversations), known[digest])
    return {**mean_and_error("score", np.array(scores)), "examples": len(scores)}


def _score(judge: Judge, messages: Sequence[Message], reply: str, key: str, path: Path) -> int:
    """Return the judge's score of a reply; append each of its answers to the file."""
    texts = [text for m in messages[:-1] for text in (m.content, m.context) if text]
    reference = messages[-1].content
    prompt = PROMPT.format(instruction="\n\n".join(texts), reference=reference, reply=reply)
    answer = ""
    for attempt in range(ATTEMPTS):
        answer = judge.complete(prompt, temperature=float(attempt > 0))
        score = read_score(answer)
        record = {"key": key, "score": score, "answer": answer, "judge": judge.model}
        record |= {"reply": reply, "prompt": prompt}
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
        if score is not None:
            return score
    raise ValueError(
        f"the judge {judge.model} gave no number from 0 to 100 in {ATTEMPTS} attempts (the last "
        f"answer is {answer[:80]!r}); its answers are in {path}: pass another --judge-model, and "
        "the same command continues from there"
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


class _Answer(BaseModel):
    key: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    score: Annotated[int, Field(strict=True)] | None


def read_answers(path: Path) -> dict[str, int]:
    """Return the scores of a file of answers by key, and make it end with a whole line.

    The last line is cut off where a kill left it unfinished. Raises ValueError, and leaves the file
    as it is, for one that has anything but answers.
    """
    answers: list[_Answer] = []
    n_bytes, line = 0, b"\n"
    content = path.read_bytes() if path.is_file() else b""
    for number, line in enumerate(content.splitlines(keepends=True), start=1):
        try:
            answers += [_Answer.model_validate_json(line)] if line.strip() else []
        except ValidationError as error:
            is_cut = not line.endswith(b"\n") and error.errors()[0]["type"] == "json_invalid"
            if is_cut and (answers or _BEGINNING.match(line)):
                os.truncate(path, n_bytes)
                break
            raise ValueError(
                f"{path}, line {number} is no answer of a judge; pass --answers FILE, a new file "
                "or one of answers"
            ) from error
        n_bytes += len(line)
    else:
        if not line.endswith(b"\n"):
            with path.open("ab") as file:
                file.write(b"\n")
    return {answer.key: answer.score for answer in answers if answer.score is not None}
