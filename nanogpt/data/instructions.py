"""Conversations to learn from: JSON Lines, or a JSON array, of instructions or lists of messages.

A record has `instruction` (or `prompt`, `question`), `response` (or `output`, `completion`,
`answer`) and maybe `context` (or `input`). Or else it has `messages`, a list of
`{"role": "system" | "user" | "assistant", "content": "..."}`, or ShareGPT's `conversations`, a list
of `{"from": "system" | "human" | "gpt", "value": "..."}`.
"""

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic.dataclasses import dataclass

from nanogpt.data.records import BadRecord, json_records, read_all, shown, text_under
from nanogpt.data.source import Source, files_fingerprint, local_path
from nanogpt.data.tokenizing import choose_split
from nanogpt.prompts import ROLES, Message, trimmed
from nanogpt.values import CHECKED, Count, FilePath, Flag, Share, Text

SUFFIXES = (".jsonl", ".json")
PROMPT_KEYS = ("instruction", "prompt", "question")
RESPONSE_KEYS = ("response", "output", "completion", "answer")
MESSAGE_KEYS = ("messages", "conversations", "conversation")
ROLE_OF = {role: role for role in ROLES} | {"human": "user", "gpt": "assistant"}  # ShareGPT's
SHAPES = (
    "write instruction and response (or prompt and completion, question and answer), or messages, "
    "a list of objects with role and content (or conversations, with from and value)"
)

Conversation = tuple[Message, ...]


@dataclass(frozen=True, config=CHECKED)
class Instructions(Source):
    """The conversations of one file, at most the first `max_examples` of them.

    With `skip_bad`, records that cannot be read are left out, and their number is logged. To stages
    that read text, a conversation is the text of its messages.
    """

    path: FilePath | None = None
    val_fraction: Share = 0.1
    max_examples: Count | None = None
    skip_bad: Flag = False
    name: Text = "instructions"

    @cached_property
    def conversations(self) -> list[Conversation]:
        """The conversations in the order of the file, read once.

        Raises ValueError, naming file and line, for a record that cannot be read, and
        FileNotFoundError or ConnectionError where there is no file.
        """
        path = self.file()
        records = read_records(path)
        return read_all(
            path, records, conversation, skip_bad=self.skip_bad, limit=self.max_examples
        )

    def splits(self) -> dict[str, list[Conversation]]:
        """Return the conversations of "train" and "val": by a hash, so that copies stay together.

        Raises ValueError where there are not two different ones.
        """
        if len(set(map(text_of, self.conversations))) < 2:
            raise ValueError(
                f"{self.file()} has {len(self.conversations)} conversations and needs two that "
                "differ, for training and validation; pass more"
            )
        split = choose_split(self)
        parts: dict[str, list[Conversation]] = {"train": [], "val": []}
        for one in self.conversations:
            [(name, _)] = split.parts(text_of(one))
            parts[name].append(one)
        return parts

    def file(self) -> Path:
        """Return the file; raises FileNotFoundError where it is none of JSON."""
        endings = " or ".join(SUFFIXES)
        path = local_path(self.path, self.name, f"a file that ends in {endings}")
        if not path.is_file() or path.suffix.lower() not in SUFFIXES:
            raise FileNotFoundError(f"data.path={self.path} is no file that ends in {endings}")
        return path

    def documents(self, skip: int = 0) -> Iterator[str | None]:
        """Yield the text of the conversations after the first `skip`."""
        yield from map(text_of, self.conversations[skip:])

    def fingerprint(self) -> str:
        """Return a hash over the file's name and content, after `max_examples`."""
        path = self.file()
        return f"{self.max_examples}-{files_fingerprint(path.parent, [path])}"

    def description(self) -> dict[str, Any]:
        return {"path": str(self.path), "max_examples": self.max_examples}


def read_records(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the position of each record of a JSON array or of JSON Lines, and the record.

    A line that is not JSON is a BadRecord in place of its record.
    """
    try:
        records = json.loads(path.read_text("utf-8-sig"))
    except (ValueError, RecursionError):
        records = None
    if isinstance(records, list):
        yield from ((f"record {number}", record) for number, record in enumerate(records, 1))
    else:
        yield from json_records(path)


def conversation(record: object) -> Conversation:
    """Return the messages of a record; raises BadRecord with what the record lacks.

    >>> conversation({"instruction": "Add.", "input": "2 and 3", "output": "5"})
    (Message('user', 'Add.', '2 and 3'), Message('assistant', '5', ''))
    """
    if not isinstance(record, dict):
        raise BadRecord(f"is no JSON object but {shown(record)}", SHAPES)
    for key in MESSAGE_KEYS:
        if record.get(key) is not None:
            return _talk(record[key], key)
    if all(isinstance(record.get(key), list) for key in ("prompt", "completion")):
        return _talk(record["prompt"] + record["completion"], "prompt and completion")
    context = _text(record, "context", "input", required=False)
    return (
        Message("user", _text(record, *PROMPT_KEYS), context),
        Message("assistant", _text(record, *RESPONSE_KEYS, indented=True)),
    )


def text_of(one: Conversation) -> str:
    """Return the text of a conversation's messages."""
    texts = (text for message in one for text in (message.content, message.context))
    return "\n\n".join(filter(None, texts))


def _talk(messages: object, key: str) -> Conversation:
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise BadRecord(f"has {key} that are no list of objects with role and content", SHAPES)
    talk = tuple(map(_message, messages))
    if not talk or talk[-1].role != "assistant":
        raise BadRecord(f"has {key} that do not end with one of the assistant", "add its reply")
    if any(message.role == "system" for message in talk[1:]):
        raise BadRecord("has a system message that is not the first", "put it first")
    return talk


def _message(message: dict[str, Any]) -> Message:
    name = message.get("from") if message.get("role") is None else message["role"]
    role = ROLE_OF.get(name) if isinstance(name, str) else None
    if role is None:
        raise BadRecord(f"has a message of role {name!r}", f"let it be one of {', '.join(ROLE_OF)}")
    return Message(role, _text(message, "content", "value", indented=role == "assistant"))


def _text(record: dict[str, Any], *keys: str, required: bool = True, indented: bool = False) -> str:
    """Return the text under the first of the keys that is not null."""
    key = next((key for key in keys if record.get(key) is not None), None)
    if key is None and not required:
        return ""
    text = text_under(record, key or next((k for k in keys if k in record), keys[0]), SHAPES)
    text = trimmed(text) if indented else text.strip()
    if required and not text:
        raise BadRecord(f"has no text under {key!r} (it is empty)", SHAPES)
    return text
