"""How a conversation becomes tokens: the one truth for training, evaluation and serving.

A template is a scaffold of texts around the contents of messages. Special tokens of the scaffold
become their ids; contents are always encoded as plain text, so that no content can end a text or
begin another's turn by spelling a special token. Scaffolds that are text themselves (`alpaca`,
`plain`) can be imitated by a content that repeats them: only who wrote which token is sure, since
that is taken from the messages and never searched for in the text.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple, Protocol

END_OF_TEXT = "<|endoftext|>"
ROLES = ("system", "user", "assistant")
_SPECIAL = re.compile(r"(<\|[a-z]+\|>)")  # searched for in scaffolds only


class Tokenizer(Protocol):
    """What a template asks of a tokenizer."""

    name: str
    special_tokens: dict[str, int]

    def encode(self, text: str) -> list[int]: ...

    def encode_prompt(self, text: str) -> list[int]: ...

    def decode(self, ids: Iterable[int]) -> str: ...


@dataclass(frozen=True)
class Message:
    """What one side says; `context` is what a user's instruction is about, where it stands apart.

    Raises ValueError for a role other than system, user and assistant.
    """

    role: str
    content: str
    context: str = ""

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"a message has role {self.role!r}; it is one of {', '.join(ROLES)}")


class Around(NamedTuple):
    """The scaffold before and after a content."""

    before: str
    after: str


class Segment(NamedTuple):
    """A piece of a conversation; `is_response` is what a model is to learn to say."""

    text: str
    is_scaffold: bool
    is_response: bool


class Encoded(NamedTuple):
    """The ids of a conversation, and for each whether it is a response's."""

    ids: list[int]
    is_response: list[bool]


@dataclass(frozen=True)
class Template:
    """A scaffold for each role, after an opening.

    `default_system` is said where no system message is. With `trims`, contents lose white space at
    both ends, which would merge with a scaffold that is text; a response keeps the indentation of
    its first line. `stop_texts` end a reply too, beside the ids of `stop_ids`.
    """

    name: str
    system: Around
    user: Around
    context: Around  # after the user's content, where there is one
    assistant: Around
    opening: str = END_OF_TEXT
    default_system: str = ""
    trims: bool = True
    stop_texts: tuple[str, ...] = ()

    @property
    def special_tokens(self) -> list[str]:
        """The special tokens of the scaffold, end of text apart."""
        found = _SPECIAL.findall("".join(text for role in ROLES for text in self._around(role)))
        return [name for name in dict.fromkeys(found) if name != END_OF_TEXT]

    @property
    def teaches_end(self) -> bool:
        """Whether a response ends with the end of text, so that a model learns to stop."""
        return self.assistant.after == END_OF_TEXT

    def stop_ids(self, tokenizer: Tokenizer) -> list[int]:
        """Return the ids that end a reply: end of text, and the markers of another turn."""
        return [_id(tokenizer, name) for name in (END_OF_TEXT, *self.special_tokens)]

    def until_stop(self, reply: str) -> str:
        """Return a reply up to the first of `stop_texts`, trimmed as a response is."""
        for text in self.stop_texts:
            reply = reply.partition(text)[0]
        return trimmed(reply)

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
    ) -> Encoded:
        """Return the ids of a conversation, and which of them are responses'.

        The end of a response belongs to it. With `add_generation_prompt` the assistant's turn is
        opened at the end, for a model to fill; with `continue_final_message` it is the last
        message, which is left open.
        """
        ids: list[int] = []
        is_response: list[bool] = []
        segments = self.render(messages, add_generation_prompt=add_generation_prompt)
        if continue_final_message:
            content = messages[-1].content
            segments[-2:] = [Segment(content.lstrip() if self.trims else content, False, True)]
        pieces = _pieces(segments)
        for (special, response), group in groupby(pieces, key=lambda piece: piece[1:]):
            texts = [piece[0] for piece in group]
            if special:
                new = [_id(tokenizer, name) for name in texts]
            else:
                new = tokenizer.encode("".join(texts))
            ids += new
            is_response += [response] * len(new)
        return Encoded(ids, is_response)

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False
    ) -> list[Segment]:
        """Return the pieces of a conversation; raises ValueError for a late system message."""
        _check_order(messages)
        segments = [Segment(self.opening, True, False)]
        if self.default_system and messages[0].role != "system":
            segments += self._turn(Message("system", self.default_system))
        for message in messages:
            segments += self._turn(message)
        if add_generation_prompt:
            segments.append(Segment(self.assistant.before, True, False))
        return segments

    def jinja(self) -> str:
        """Return this template for Hugging Face's `apply_chat_template`, to the same ids.

        There a conversation is one text before it is encoded, so that, other than here, a content
        that spells a special token becomes that token, and the indentation of an earlier response
        may merge with a scaffold that is text.
        """
        turns = [
            f"{{% if message.role == '{r}' %}}{self._jinja_turn(r)}{{% endif %}}" for r in ROLES
        ]
        return "".join(
            [
                _literal(self.opening),
                self._jinja_default(),
                "{% for message in messages %}",
                *turns,
                "{% endfor %}{% if add_generation_prompt %}",
                _literal(self.assistant.before),
                "{% endif %}",
            ]
        )

    def _jinja_turn(self, role: str) -> str:
        def surrounded(around: Around, key: str) -> str:
            trim = ".rstrip().lstrip('\\r\\n')" if role == "assistant" else " | trim"
            content = f"{{{{ message.{key}{trim if self.trims else ''} }}}}"
            return _literal(around.before) + content + _literal(around.after)

        context = surrounded(self.context, "context")
        said = surrounded(self._around(role), "content")
        return f"{said}{{% if message.context %}}{context}{{% endif %}}"

    def _jinja_default(self) -> str:
        if not self.default_system:
            return ""
        before, after = self.system
        text = _literal(before + self.default_system + after)
        return f"{{% if messages[0].role != 'system' %}}{text}{{% endif %}}"

    def _around(self, role: str) -> Around:
        around: Around = getattr(self, role)
        return around

    def _turn(self, message: Message) -> list[Segment]:
        is_response = message.role == "assistant"
        content, context = message.content, message.context
        if self.trims:
            content, context = trimmed(content) if is_response else content.strip(), context.strip()
        segments = _surrounded(self._around(message.role), content, is_response)
        if context:
            segments += _surrounded(self.context, context, is_response)
        return segments


TEMPLATES = {
    template.name: template
    for template in (
        # Turns begin with ids of their own and a reply ends with the end of text.
        Template(
            name="chat",
            system=Around("<|system|>", ""),
            user=Around("<|user|>", ""),
            context=Around("\n\n", ""),
            assistant=Around("<|assistant|>", END_OF_TEXT),
            trims=False,
        ),
        # Stanford Alpaca's words (tatsu-lab/stanford_alpaca, train.py), its form without an input
        # for both; a system message takes the place of the first sentence.
        Template(
            name="alpaca",
            system=Around("", "\n\n"),
            user=Around("### Instruction:\n", "\n\n"),
            context=Around("### Input:\n", "\n\n"),
            assistant=Around("### Response:\n", END_OF_TEXT),
            default_system=(
                "Below is an instruction that describes a task. "
                "Write a response that appropriately completes the request."
            ),
            stop_texts=("\n### Instruction:",),
        ),
        # For a model that was never taught a template: a dialogue, as it may have read some.
        Template(
            name="plain",
            system=Around("", "\n\n"),
            user=Around("User:\n", "\n\n"),
            context=Around("", "\n\n"),
            assistant=Around("Assistant:\n", "\n\n"),
            stop_texts=("\nUser:",),
        ),
    )
}


def find_template(name: str) -> Template:
    """Return the template of this name."""
    if name not in TEMPLATES:
        raise ValueError(f"template={name!r} is unknown; choose one of {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def encode_prompt(
    tokenizer: Tokenizer, template: Template | None, prompt: str
) -> tuple[list[int], list[int]]:
    """Return the ids of a prompt, and those that end what follows.

    With a template the prompt is a user's message; without one an empty prompt begins a document.
    """
    if template is None:
        return tokenizer.encode_prompt(prompt), [_id(tokenizer, END_OF_TEXT)]
    messages = [Message("user", prompt)]
    ids, _ = template.encode(tokenizer, messages, add_generation_prompt=True)
    return ids, template.stop_ids(tokenizer)


def trimmed(text: str) -> str:
    """Return a text without line breaks before it and white space after it.

    The indentation of its first line is part of it, as in code.
    """
    return text.rstrip().lstrip("\r\n")


def _surrounded(around: Around, content: str, is_response: bool) -> list[Segment]:
    return [
        Segment(around.before, True, False),
        Segment(content, False, is_response),
        Segment(around.after, True, is_response),
    ]


def _pieces(segments: Iterable[Segment]) -> Iterator[tuple[str, bool, bool]]:
    """Yield texts, whether each is a special token, and whether it is a response's."""
    for text, is_scaffold, is_response in segments:
        for piece in _SPECIAL.split(text) if is_scaffold else [text]:
            if piece:
                yield piece, is_scaffold and bool(_SPECIAL.fullmatch(piece)), is_response


def _id(tokenizer: Tokenizer, name: str) -> int:
    if name not in tokenizer.special_tokens:
        raise ValueError(
            f"the tokenizer {tokenizer.name} has no {name}, which the template needs; use the "
            "tokenizer of a checkpoint that was trained with it, or template=alpaca"
        )
    return tokenizer.special_tokens[name]


def _check_order(messages: Sequence[Message]) -> None:
    if not messages:
        raise ValueError("the conversation is empty; give at least one message")
    if any(message.role == "system" for message in messages[1:]):
        raise ValueError("a system message comes after another one; put it first")


def _literal(text: str) -> str:
    """Return an expression of Jinja that gives the text."""
    return f"{{{{ {json.dumps(text)} }}}}" if text else ""
