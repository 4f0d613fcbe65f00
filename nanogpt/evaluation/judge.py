"""Replies to instructions scored from 0 to 100 by another model, over any OpenAI-compatible API.

    python -m nanogpt.evaluate RUN --task judge --data FILE.jsonl \\
        --judge-url http://127.0.0.1:11434/v1 --judge-model llama3 [--answers FILE.jsonl]

The judge reads instruction, reference and reply, and is to answer with a number alone. Each answer
is appended to `--answers` word for word, with its prompt; the same command continues after the last
one.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import httpx
import numpy as np
from pydantic import BaseModel, Field, ValidationError
from tqdm import tqdm

from nanogpt.checkpoint import Checkpoint, weights_sha256
from nanogpt.evaluation.instructions import read_conversations, reply
from nanogpt.evaluation.results import Results, mean_and_error, run_dir_of
from nanogpt.prompts import Message, trimmed
from nanogpt.text import first_line

ATTEMPTS = 3  # the later ones at a temperature, so that the judge finds other words
ANSWER_TOKENS = 32
TIMEOUT_S = 120.0
_OUT_OF = re.compile(r"\s*(/|out of)\s*100\b")
# a number that ends its line or its part of a sentence, but for the `1.` that begins a list
_SCORE = re.compile(
    r"(?<![\w.,/–-])(?!1[.)]\s+\w)(\d{1,3})(?:\s*%|\s+points?\b)?(?=[^\w\s/–-]*(?:\s*$|[.,;]\s))",
    re.MULTILINE,
)
_BEGINNING = b'{"key": "'  # of a stored answer
PROMPT = """You are grading a reply to an instruction.

Instruction:
{instruction}

A correct reply:
{reference}

The reply to grade:
{reply}

How good is the reply to grade, from 0 (useless) to 100 (as good as can be)? \
Answer with one whole number and nothing else."""


def evaluate(
    checkpoint: Checkpoint,
    judge_url: str,
    judge_model: str,
    judge_key: str,
    data: Path,
    limit: int | None,
    max_new_tokens: int,
    answers: Path | None,
) -> Results:
    """Let another model score the replies to a file of instructions and responses.

    Stored answers are used again. Raises FileNotFoundError where the answers have no folder, and
    ValueError for a malformed URL or key, and where the judge gives no number for a reply in three
    attempts; its answers up to then are stored.
    """
    path = answers or (run_dir_of(checkpoint.path) or checkpoint.path.parent) / "judge.jsonl"
    if not path.parent.is_dir():
        raise FileNotFoundError(f"--answers {path}: there is no folder for it; make one")
    try:
        url = httpx.URL(judge_url)
        is_address = url.scheme in ("http", "https") and bool(url.host)
    except httpx.InvalidURL:
        is_address = False
    if not is_address:
        raise ValueError(f"--judge-url {judge_url!r} is no address; pass http://HOST:PORT/v1")
    key = judge_key.strip()
    if not (key.isascii() and key.isprintable()):
        raise ValueError("--judge-key has characters that no key has; copy it anew")
    conversations = read_conversations(data, limit)
    weights, known = weights_sha256(checkpoint.model), read_answers(path)
    scores = []
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with httpx.Client(base_url=judge_url, headers=headers, timeout=TIMEOUT_S) as client:
        for messages in tqdm(conversations, "judging"):
            texts = [[m.role, m.content, m.context] for m in messages]
            subject = json.dumps([weights, texts, max_new_tokens, judge_model, PROMPT])
            digest = hashlib.sha256(subject.encode()).hexdigest()
            if digest not in known:
                text = trimmed(reply(checkpoint, messages[:-1], max_new_tokens).text)
                known[digest] = _score(client, judge_model, messages, text, digest, path)
            scores.append(known[digest])
    return {**mean_and_error("score", np.array(scores)), "examples": len(scores)}


def _score(
    client: httpx.Client, model: str, messages: Sequence[Message], reply: str, key: str, path: Path
) -> int:
    """Return the judge's score of a reply; append each of its answers to the file."""
    texts = [text for m in messages[:-1] for text in (m.content, m.context) if text]
    reference = messages[-1].content
    prompt = PROMPT.format(instruction="\n\n".join(texts), reference=reference, reply=reply)
    answer = ""
    for attempt in range(ATTEMPTS):
        answer = _complete(client, model, prompt, temperature=float(attempt > 0))
        score = read_score(answer)
        record = {"key": key, "score": score, "answer": answer, "judge": model}
        record |= {"reply": reply, "prompt": prompt}
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
        if score is not None:
            return score
    raise ValueError(
        f"the judge {model} gave no number from 0 to 100 in {ATTEMPTS} attempts (the last answer "
        f"is {answer[:80]!r}); its answers are in {path}: pass another --judge-model, and the same "
        "command continues from there"
    )


def _complete(client: httpx.Client, model: str, prompt: str, temperature: float) -> str:
    """Return the judge's answer; raises ConnectionError, with the address, where none comes."""
    messages = [{"role": "user", "content": prompt}]
    body = {"model": model, "messages": messages, "temperature": temperature}
    text = ""
    try:
        response = client.post("chat/completions", json={**body, "max_tokens": ANSWER_TOKENS})
        text = f"{response.status_code} {response.text}"
        response.raise_for_status()
        return str(response.json()["choices"][0]["message"]["content"] or "")
    except (httpx.HTTPError, LookupError, TypeError, ValueError, RecursionError) as error:
        reason = " ".join(f"{type(error).__name__}: {first_line(error)}; {text}".split())
        if key := client.headers.get("Authorization", "").removeprefix("Bearer "):
            reason = reason.replace(key, "***")  # some servers repeat it
        raise ConnectionError(
            f"the judge at {client.base_url} gave no chat completion ({reason[:300]}); correct "
            "--judge-url"
        ) from None


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

    A line that a kill cut off is skipped. Raises ValueError, and leaves the file as it is, for one
    that has anything but answers.
    """
    scores: dict[str, int] = {}
    content = path.read_bytes() if path.is_file() else b""
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            answer = _Answer.model_validate_json(line)
        except ValidationError as error:
            is_json = error.errors()[0]["type"] != "json_invalid"
            if is_json or not _BEGINNING.startswith(line[: len(_BEGINNING)]):
                raise ValueError(
                    f"{path}, line {number} is no answer of a judge; pass --answers FILE, a new "
                    "file or one of answers"
                ) from error
        else:
            scores |= {} if answer.score is None else {answer.key: answer.score}
    if content and not content.endswith(b"\n"):
        with path.open("ab") as file:
            file.write(b"\n")
    return scores
