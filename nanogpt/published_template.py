"""Chat templates of published models: Jinja, rendered in a sandbox.

A content never gives a special token, as with our templates: the template is rendered a second time
with a mark in place of each content, which shows where contents lie in the text.
"""

import json
import re
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import cache
from itertools import groupby
from typing import Any, NoReturn

from nanogpt.prompts import Encoded, Message, Segment, Template
from nanogpt.published_tokenizer import PublishedTokenizer
from nanogpt.text import first_line
from nanogpt.tokenizer import END_OF_TEXT, Tokenizer, well_formed

MARK = re.compile("\ue000(\\d+)\ue001")
# What templates do to contents: nothing, strip them, or leave earlier reasoning out.
CHANGES: tuple[Callable[[str], str], ...] = (
    str,
    str.strip,
    lambda text: text.strip("\n"),
    lambda text: text.rpartition("</think>")[2].lstrip("\n"),
)


class PublishedTemplate(Template):
    """The chat template that the tokenizer of a published model carries."""

    def stop_ids(self, tokenizer: Tokenizer) -> list[int]:
        """Return the ids that end a reply."""
        return _with_template(tokenizer).end_ids

    def jinja(self, tokenizer: Tokenizer) -> str:
        """Return the template as it was published."""
        return str(_with_template(tokenizer).chat_template)

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
    ) -> Encoded:
        """Return the ids of a conversation, and which of them are responses'.

        They are those of transformers, but where a content spells an added token. The token that
        ends a response belongs to it. Raises ValueError where the template fails, refuses the
        conversation or changes contents in another way than `CHANGES`, and for a tokenizer without
        a template.
        """
        published = _with_template(tokenizer)
        if not messages:
            raise ValueError("the conversation is empty; give at least one message")
        texts = ["\n\n".join(filter(None, (m.content, m.context))) for m in messages]
        contents = [*map(well_formed, texts)]
        marks = [f"\ue000{i}\ue001" for i in range(len(messages))]
        roles = [message.role for message in messages]
        text = _render(published, roles, contents, add_generation_prompt)
        pieces = MARK.split(_render(published, roles, marks, add_generation_prompt))
        scaffolds, order = pieces[::2], [int(i) for i in pieces[1::2]]
        if order != list(range(len(messages))):
            raise ValueError("the chat template omits, repeats or reorders messages; pass others")
        contents = _as_rendered(text, scaffolds, contents)
        if continue_final_message:
            scaffolds[-1] = ""
        segments: list[Segment] = []
        for i, scaffold in enumerate(scaffolds):
            follows = i > 0 and roles[i - 1] == "assistant"
            for piece in filter(None, published.added_pattern.split(scaffold)):
                is_added = piece in published.added
                segments.append((piece, is_added, follows and piece in published.end_tokens))
                follows = follows and not is_added
            if i < len(contents):
                segments.append((contents[i], False, roles[i] == "assistant"))
        ids: list[int] = []
        is_response: list[bool] = []
        for is_added, group in groupby(segments, key=lambda segment: segment[1]):
            parts, _, responses = zip(*group, strict=True)
            if is_added:
                ids += [published.added[part] for part in parts]
                is_response += responses
            else:  # merges may reach from a scaffold into a content
                new, ends = published.encode_with_ends("".join(parts))
                own = [r for part, r in zip(parts, responses, strict=True) for _ in part]
                ids += new
                is_response += [own[end - 1] for end in ends]
        return ids, is_response


EMPTY = ("", "")
PUBLISHED = PublishedTemplate("published", EMPTY, EMPTY, EMPTY, assistant=("", END_OF_TEXT))


def _with_template(tokenizer: Tokenizer) -> PublishedTokenizer:
    if not isinstance(tokenizer, PublishedTokenizer) or tokenizer.chat_template is None:
        raise ValueError(
            f"the tokenizer {tokenizer.name} has no chat template of its own; pass template=chat"
        )
    return tokenizer


@cache
def _compiled(template: str) -> Any:
    """Return a Jinja template: to compile one takes longer than to render a conversation."""
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> NoReturn:
        raise ValueError(message)

    def to_json(value: Any, indent: int | None = None, **_: Any) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def _render(
    tokenizer: PublishedTokenizer,
    roles: Sequence[str],
    contents: Sequence[str],
    add_generation_prompt: bool,
) -> str:
    """Return the template's text, in the environment that transformers renders it in."""
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]
    try:
        text: str = _compiled(str(tokenizer.chat_template)).render(
            messages=messages,
            add_generation_prompt=add_generation_prompt,
            bos_token=tokenizer.bos_token or "",
            eos_token=tokenizer.end_tokens[0] if tokenizer.end_tokens else tokenizer.eot_token,
            tools=None,
            documents=None,
        )
        return text
    except Exception as error:  # whatever a template does
        raise ValueError(
            f"the chat template of {tokenizer.name} fails: {first_line(error)}"
        ) from error


def _as_rendered(text: str, scaffolds: list[str], contents: list[str]) -> list[str]:
    """Return the contents as they stand in a text between scaffolds."""
    found: list[str] = []
    at = len(scaffolds[0]) if text.startswith(scaffolds[0]) else len(text)
    for content, scaffold in zip(contents, scaffolds[1:], strict=True):
        changed = [change(content) for change in CHANGES]
        found += [new for new in changed if text.startswith(new + scaffold, at)][:1]
        at += len(found[-1]) + len(scaffold) if found else 0
    if len(found) < len(contents) or at != len(text):
        raise ValueError("the chat template changes the messages' texts; pass template=chat")
    return found
