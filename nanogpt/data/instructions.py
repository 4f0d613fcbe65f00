"""Conversations to learn from: JSON Lines, or a JSON array, of instructions or lists of messages.

A record has `instruction`, `response` (or `output`) and maybe `context` (or `input`), or else
`messages`, a list of `{"role": "system" | "user" | "assistant", "content": "..."}`.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from nanogpt.data.files import PASS_OVER
from nanogpt.data.source import Source, files_fingerprint
from nanogpt.data.tokenizing import choose_split
from nanogpt.prompts import Message

SUFFIXES = (".jsonl", ".json")

Conversation = tuple[Message, ...]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ConversationSplits:
    """Conversations to learn from and to validate on; no conversation is in both."""

    train: list[Conversation]
    val: list[Conversation]


@dataclass(frozen=True)
class Instructions(Source):
    """The conversations of one file, at most the first `max_examples` of them.

    With `skip_bad`, records that cannot be read are left out, and counted in the log. To stages
    that read text, a conversation is what is said in it.
    """

    path: str | Path | None = None
    val_fraction: float = 0.1
    max_examples: int | None = None
    skip_bad: bool = False
    name: str = "instructions"

    @cached_property
    def conversations(self) -> list[Conversation]:
        """The conversations in the order of the file, read once.

        Raises ValueError, naming file and line, for a record that cannot be read, and
        FileNotFoundError or ConnectionError where there is no file.
        """
        path = self.file()
        kept: list[Conversation] = []
        n_bad = 0
        for where, record in read_records(path):
            if len(kept) == self.max_examples:
                break
            try:
                kept.append(conversation(record))
            except ValueError as error:
                if not self.skip_bad:
                    raise ValueError(f"{where} {error}; mend the record, {PASS_OVER}") from error
                n_bad += 1
        if n_bad:
            log.info("%s: %s records that cannot be read were left out", path, f"{n_bad:,}")
        return kept

    def splits(self) -> ConversationSplits:
        """Return the conversations in splits: by a hash, so that copies stay together.

        Raises ValueError where there are not two different ones.
        """
        if len(set(map(text_of, self.conversations))) < 2:
            raise ValueError(
                f"{self.file()} has {len(self.conversations)} conversations and needs two that "
                "differ, to learn from and to validate on; pass more"
            )
        split = choose_split(self)
        parts: dict[str, list[Conversation]] = {"train": [], "val": []}
        for one in self.conversations:
            [(name, _)] = split.parts(text_of(one))
            parts[name].append(one)
        return ConversationSplits(**parts)

    def file(self) -> Path:
        """Return the file to read."""
        endings = " or ".join(SUFFIXES)
        if self.path is None:
            raise ValueError(f"data={self.name} needs data.path=<a file that ends in {endings}>")
        path = Path(self.path).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"data.path={self.path} is no file; pass one in {endings}")
        if path.suffix.lower() not in SUFFIXES:
            raise ValueError(f"data.path={self.path} does not end in {endings}; pass such a file")
        return path

    def documents(self, skip: int = 0) -> Iterator[str | None]:
        """Yield what is said in the conversations after the first `skip`."""
        for one in self.conversations[skip:]:
            yield text_of(one)

    def fingerprint(self) -> str:
        """Return a hash over the file's name and content, and how much of it is taken."""
        path = self.file()
        return f"{self.max_examples}-{files_fingerprint(path.parent, [path])}"

    def description(self) -> dict[str, Any]:
        return {"path": str(self.path), "max_examples": self.max_examples}


def read_records(path: Path) -> Iterator[tuple[str, object]]:
    """Yield where each record of a JSON array or of JSON Lines is, and the record.

    A line that is not JSON is a ValueError in place of its record.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 at byte {error.start}; convert it") from error
    if text.lstrip().startswith("["):
        yield from _array(path, text)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield f"{path}, line {number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                yield f"{path}, line {number}", ValueError(f"is not JSON ({error})")


def _array(path: Path, text: str) -> Iterator[tuple[str, object]]:
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a JSON array ({error}); mend the file") from error
    for number, record in enumerate(records, start=1):
        yield f"{path}, record {number}", record


def conversation(record: object) -> Conversation:
    """Return the messages of a record; raises ValueError with what the record lacks.

    >>> conversation({"instruction": "Add.", "input": "2 and 3", "output": "5"})
    (Message('user', 'Add.', '2 and 3'), Message('assistant', '5', ''))
    """
    if isinstance(record, ValueError):
        raise record
    if not isinstance(record, dict):
        raise ValueError("is no JSON object")
    if "messages" in record:
        return _talk(record["messages"])
    context = _text(record, "context", "input", required=False)
    return (
        Message("user", _text(record, "instruction"), context),
        Message("assistant", _text(record, "response", "output")),
    )


def text_of(one: Conversation) -> str:
    """Return what is said in a conversation."""
    return "\n\n".join(
        said for message in one for said in (message.content, message.context) if said
    )


def conversations_sha256(conversations: Iterable[Conversation]) -> str:
    """Return a hash over conversations in their order."""
    digest = hashlib.sha256()
    for one in conversations:
        digest.update(f"{json.dumps([vars(message) for message in one])}\n".encode())
    return digest.hexdigest()


def _talk(messages: object) -> Conversation:
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise ValueError("has messages that are no list of objects with role and content")
    talk = tuple(Message(str(m.get("role")), _text(m, "content")) for m in messages)
    if not talk or talk[-1].role != "assistant":
        raise ValueError("has messages that do not end with one of the assistant")
    if any(message.role == "system" for message in talk[1:]):
        raise ValueError("has a system message that is not the first")
    return talk


def _text(record: dict[str, Any], *keys: str, required: bool = True) -> str:
    """Return the text under the first of the keys that is there."""
    found = [record[key] for key in keys if record.get(key) is not None]
    if found and not isinstance(found[0], str):
        raise ValueError(f"has {type(found[0]).__name__} and not text under {' or '.join(keys)!r}")
    text = found[0].strip() if found else ""
    if required and not text:
        raise ValueError(f"has no text under {' or '.join(keys)!r} (it has {', '.join(record)})")
    return text
