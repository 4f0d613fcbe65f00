"""Chat templates: how training, evaluation and serving encode a conversation.

A template is a scaffold of texts around the contents of messages. Special tokens of the scaffold
become their ids; contents are always encoded as plain text, so that no content can end a text or
begin another's turn by spelling a special token. A content can imitate scaffolds that are plain
text (`alpaca`, `plain`): which tokens are a response's is taken from the messages, and never
searched for in the text.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from nanogpt.tokenizer import END_OF_TEXT, Tokenizer

ROLES = ("system", "user", "assistant")
_SPECIAL = re.compile(r"(<\|[a-z]+\|>)")  # searched for in scaffolds only

Around = tuple[str, str]  # the scaffold before and after a content
Segment = tuple[str, bool, bool]  # text, whether it is a special token, whether of a response
Encoded = tuple[list[int], list[bool]]  # ids, and for each whether it is of a response


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; `context` is a separate text that a user's instruction refers to.

    `fields` are others of a published template's: tool calls, and the role of a tool's answer.

    Raises ValueError for a role other than system, user and assistant.
    """

    role: str
    content: str
    context: str = ""
    fields: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"a message has role {self.role!r}; it is one of {', '.join(ROLES)}")


@dataclass(frozen=True)
class Template:
    """A scaffold for each role, after an opening.

    `default_system` stands in for a missing system message. With `trims`, contents are stripped of
    white space, which would merge with a scaffold that is text; a response keeps the indentation of
    its first line. A reply ends at a token of `stop_ids` or a text of `stop_texts`.
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
        found = _SPECIAL.findall("".join(text for role in ROLES for text in getattr(self, role)))
        return [name for name in dict.fromkeys(found) if name != END_OF_TEXT]

    def stop_ids(self, tokenizer: Tokenizer) -> list[int]:
        """Return the ids that end a reply: end of text, and the markers of another turn."""
        return [_special_id(tokenizer, name) for name in (END_OF_TEXT, *self.special_tokens)]

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
    ) -> Encoded:
        """Return the ids of a conversation, and which of them are responses'.

        The end of a response belongs to it. `add_generation_prompt` opens the assistant's turn
        after the last message; `continue_final_message` leaves the last message open. `tools` are
        described in published templates only.

        Raises ValueError for a conversation out of order and for a tokenizer without the
        template's special tokens.
        """
        ids: list[int] = []
        is_response: list[bool] = []
        segments = self.render(messages, add_generation_prompt, continue_final_message)
        for (special, response), group in groupby(segments, key=lambda segment: segment[1:]):
            texts = [text for text, *_ in group]
            if special:
                new = [_special_id(tokenizer, name) for name in texts]
            else:
                new = tokenizer.encode("".join(texts))
            ids += new
            is_response += [response] * len(new)
        return ids, is_response

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
    ) -> Iterator[Segment]:
        """Yield the pieces of a conversation; the flags are those of `encode`.

        Raises ValueError for an empty conversation and for a system message that is not the first.
        """
        if not messages:
            raise ValueError("the conversation is empty; give at least one message")
        if any(message.role == "system" for message in messages[1:]):
            raise ValueError("a system message comes after another one; put it first")
        yield from _scaffold(self.opening)
        if self.default_system and messages[0].role != "system":
            yield from self._turn(Message("system", self.default_system))
        for i, message in enumerate(messages, start=1):
            yield from self._turn(message, continue_final_message and i == len(messages))
        if add_generation_prompt:
            yield from _scaffold(self.assistant[0])

    def _turn(self, message: Message, is_open: bool = False) -> Iterator[Segment]:
        (before, after), is_response = getattr(self, message.role), message.role == "assistant"
        content, context = message.content, message.context
        if self.trims:
            trim = str.lstrip if is_open else trimmed if is_response else str.strip
            content, context = trim(content), context.strip()
        yield from _scaffold(before)
        yield content, False, is_response
        if not is_open:
            yield from _scaffold(after, is_response)
        if context:
            yield from _scaffold(self.context[0])
            yield context, False, is_response
            yield from _scaffold(self.context[1], is_response)

    def jinja(self, tokenizer: Tokenizer) -> str:
        """Return this template for Hugging Face's `apply_chat_template`, to the same ids.

        There a conversation is one text before it is encoded, so that, other than here, a content
        that spells a special token becomes that token, and the indentation of an earlier response
        may merge with a scaffold that is text.
        """

        def surrounded(around: Around, key: str, trim: str) -> str:
            content = f"{{{{ message.{key}{trim if self.trims else ''} }}}}"
            return _literal(around[0]) + content + _literal(around[1])

        default, turns = "", ""
        if self.default_system:
            text = _literal(self.default_system.join(self.system))
            default = f"{{% if messages[0].role != 'system' %}}{text}{{% endif %}}"
        for role in ROLES:
            trim = ".rstrip().lstrip('\\r\\n')" if role == "assistant" else " | trim"
            turns += f"{{% if message.role == '{role}' %}}"
            turns += surrounded(getattr(self, role), "content", trim) + "{% if message.context %}"
            turns += surrounded(self.context, "context", trim) + "{% endif %}{% endif %}"
        text = (
            f"{_literal(self.opening)}{default}{{% for message in messages %}}{turns}{{% endfor %}}"
            f"{{% if add_generation_prompt %}}{_literal(self.assistant[0])}{{% endif %}}"
        )
        return text.replace(END_OF_TEXT, tokenizer.eot_token)

    def go(self, tokenizer: Tokenizer) -> str:
        """Return this template for Ollama, where contents are not trimmed and have no context."""
        default = self.default_system and self.default_system.join(self.system)
        text = (
            f"{self.opening}{{{{ if not .System }}}}{default}{{{{ end }}}}{{{{ range .Messages }}}}"
        )
        for role in ROLES:
            before, after = getattr(self, role)
            text += f'{{{{ if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}{{{{ end }}}}'
        text += f"{{{{ end }}}}{self.assistant[0]}"
        return text.replace(END_OF_TEXT, tokenizer.eot_token)


TEMPLATES = {
    template.name: template
    for template in (
        # Special tokens begin the turns, and a reply ends with the end of text.
        Template(
            name="chat",
            system=("<|system|>", ""),
            user=("<|user|>", ""),
            context=("\n\n", ""),
            assistant=("<|assistant|>", END_OF_TEXT),
            trims=False,
        ),
        # The texts of Stanford Alpaca (tatsu-lab/stanford_alpaca, train.py), without the other
        # opening for instructions with an input; a system message replaces the first sentence.
        Template(
            name="alpaca",
            system=("", "\n\n"),
            user=("### Instruction:\n", "\n\n"),
            context=("### Input:\n", "\n\n"),
            assistant=("### Response:\n", END_OF_TEXT),
            default_system=(
                "Below is an instruction that describes a task. "
                "Write a response that appropriately completes the request."
            ),
            stop_texts=("\n### Instruction:",),
        ),
        # For base models: a dialogue as it may occur in their training text.
        Template(
            name="plain",
            system=("", "\n\n"),
            user=("User:\n", "\n\n"),
            context=("", "\n\n"),
            assistant=("Assistant:\n", "\n\n"),
            stop_texts=("\nUser:",),
        ),
    )
}


def find_template(name: str) -> Template:
    """Return the template of this name; raises ValueError for an unknown one.

    `published` is the one that a published model's tokenizer carries.
    """
    if name == "published":
        from nanogpt.published import PUBLISHED

        return PUBLISHED
    if name not in TEMPLATES:
        known = ", ".join([*TEMPLATES, "published"])
        raise ValueError(f"template={name!r} is unknown; choose one of {known}")
    return TEMPLATES[name]


def trimmed(text: str) -> str:
    """Return a text without line breaks before it and white space after it.

    The indentation of its first line is preserved, as code needs it.
    """
    return text.rstrip().lstrip("\r\n")


def _scaffold(text: str, is_response: bool = False) -> Iterator[Segment]:
    for piece in filter(None, _SPECIAL.split(text)):
        yield piece, bool(_SPECIAL.fullmatch(piece)), is_response


def _special_id(tokenizer: Tokenizer, name: str) -> int:
    if name == END_OF_TEXT:
        return tokenizer.eot_id
    if name not in tokenizer.special_tokens:
        raise ValueError(
            f"the tokenizer {tokenizer.name} has no {name}, which the template needs; use the "
            "tokenizer of a checkpoint that was trained with it, or template=alpaca"
        )
    return tokenizer.special_tokens[name]


def _literal(text: str) -> str:
    """Return a Jinja expression of the text."""
    return f"{{{{ {json.dumps(text)} }}}}" if text else ""
