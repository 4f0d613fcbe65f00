"""Published models: their byte-level BPE tokenizers, and the chat templates that these carry.

The whole tokenizer.json travels with checkpoints and prepared data. Its special and other added
tokens are ids that no text gives: they are removed from the library's tokenizer, which encodes
texts only. A chat template is Jinja, rendered in a sandbox. A content never gives a special token,
as with our templates: the template is rendered a second time with a mark in place of each content,
which shows where contents lie in the text.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import datetime
from functools import cache, cached_property, partial
from itertools import groupby, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from nanogpt.prompts import Encoded, Message, Segment, Template
from nanogpt.text import first_line
from nanogpt.tokenizer import BYTE_OF_LETTER, END_OF_TEXT, PATTERN_SAMPLE, Tokenizer, well_formed

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Library

Turns = Sequence[Mapping[str, Any]]  # messages, or tools, as a chat template reads them
MARK = re.compile("\ue000(\\d+)\ue001")
# What templates do to contents: nothing, strip them, or leave earlier reasoning out.
CHANGES: tuple[Callable[[str], str], ...] = (
    str,
    str.strip,
    lambda text: text.strip("\n"),
    lambda text: text.rpartition("</think>")[2].lstrip("\n"),
)


@dataclass(eq=False)
class PublishedTokenizer(Tokenizer):
    """A tokenizer.json with `n_ids` ids, of which some may be unused.

    `eot_token` separates documents, `end_tokens` end a reply in `chat_template`. Raises ValueError
    where the file lacks one of them or has more ids than `n_ids`.
    """

    name: str
    content: str
    n_ids: int
    eot_token: str
    bos_token: str | None = None
    chat_template: str | None = None
    end_tokens: Sequence[str] = ()
    kind: str = "published"
    pattern = ""

    def __post_init__(self) -> None:
        described = json.loads(self.content)
        self.added: dict[str, int] = {t["content"]: t["id"] for t in described["added_tokens"]}
        special = {t["content"] for t in described["added_tokens"] if t["special"]}
        special |= {*self.end_tokens, *filter(None, [self.eot_token, self.bos_token])}
        self.special_tokens = {text: i for text, i in self.added.items() if text in special}
        vocab = described["model"]["vocab"]
        ids = [*vocab.values(), *self.added.values()]
        if max(ids) >= self.n_ids or min(ids) < 0:
            raise ValueError(f"has ids up to {max(ids)}; the model has {self.n_ids}")
        for token in special - self.added.keys():
            raise ValueError(f"has no token {token}, which ends documents or replies")
        self._token_bytes = [b""] * self.n_ids
        for text, i in {**vocab, **self.added}.items():
            if text not in special:
                is_text = text in self.added  # and not the letters of bytes
                letters = text.encode() if is_text else map(BYTE_OF_LETTER.__getitem__, text)
                self._token_bytes[i] = bytes(letters)

    @property
    def end_ids(self) -> list[int]:
        """The ids that end an answer, as published, the eos_token first."""
        return [*(self.added[name] for name in self.end_tokens), self.eot_id]

    def encode_array(self, text: str) -> np.ndarray:
        """Return the ids of the text, (N,) uint32."""
        encoded = self.library.encode(well_formed(text), add_special_tokens=False)
        return np.array(encoded.ids, dtype=np.uint32)

    @cached_property
    def added_pattern(self) -> re.Pattern[str]:
        """The pattern of an added token in a text of the template's own."""
        names = sorted(self.added, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, names))})")

    def record(self) -> dict[str, Any]:
        """Return the file and what is read with it, as plain types."""
        return {key.name: getattr(self, key.name) for key in fields(self)}

    def with_special_tokens(self, names: Sequence[str]) -> "PublishedTokenizer":
        """Return this tokenizer with the names among its special tokens.

        As in transformers, an added or an ordinary token of that name keeps its id, a new name gets
        the one after all others.
        """
        if {*names} <= self.special_tokens.keys():
            return self  # whose content, and thus fingerprint, stays

        from tokenizers import AddedToken
        from tokenizers import Tokenizer as Library

        library = Library.from_str(self.content)
        library.add_special_tokens([AddedToken(n, normalized=False, special=True) for n in names])
        n_ids = max(self.n_ids - 1, *library.get_added_tokens_decoder()) + 1
        return replace(self, content=library.to_str(), n_ids=n_ids)

    @cached_property
    def library(self) -> "Library":
        """The library's tokenizer, which encodes texts only."""
        from tokenizers import Tokenizer as Library

        described = json.loads(self.content)
        model, added = described["model"], self.added.keys()
        model["vocab"] = {token: i for token, i in model["vocab"].items() if token not in added}
        model["merges"] = [m for m in model["merges"] if added.isdisjoint([*m, "".join(m)])]
        described |= {"added_tokens": [], "post_processor": None, "truncation": None}
        return Library.from_str(json.dumps({**described, "padding": None}))


def read_published(directory: Path, content: str, n_ids: int | None) -> PublishedTokenizer:
    """Return the tokenizer of a directory, of which `content` is the tokenizer.json.

    `<|endoftext|>` separates documents where the file has it, else the eos_token that
    tokenizer_config.json names, which with generation_config.json names what ends a reply. Raises
    ValueError for anything but a byte-level BPE, one that loses text, and where no token separates
    documents.
    """
    described = json.loads(content)
    model = described["model"]
    last = described.get("decoder") or {}
    decoders = last.get("decoders", [last])
    is_byte_level = model["type"] == "BPE" and not model.get("byte_fallback")
    if not is_byte_level or "ByteLevel" not in [decoder.get("type") for decoder in decoders]:
        raise ValueError("is not a byte-level BPE")
    added = {token["id"]: token["content"] for token in described["added_tokens"]}
    config = _read_object(directory / "tokenizer_config.json")
    eos = config.get("eos_token")
    eos = eos.get("content") if isinstance(eos, dict) else eos
    ends = _read_object(directory / "generation_config.json").get("eos_token_id") or []
    names = [added.get(i) for i in (ends if isinstance(ends, list) else [ends])]
    eot_token = END_OF_TEXT if END_OF_TEXT in added.values() else eos
    if eot_token is None:
        raise ValueError(f"has no {END_OF_TEXT}, and its tokenizer_config.json no eos_token")
    tokenizer = PublishedTokenizer(
        name=directory.name,
        content=content,
        n_ids=n_ids or max([*model["vocab"].values(), *added]) + 1,
        eot_token=eot_token,
        bos_token=bos_token_of(described),
        chat_template=_chat_template(directory, config),
        end_tokens=list(dict.fromkeys(filter(None, [eos, *names]))),
    )
    if tokenizer.decode(tokenizer.encode(PATTERN_SAMPLE)) != PATTERN_SAMPLE:
        raise ValueError("loses part of a text")
    return tokenizer


def _chat_template(directory: Path, config: Mapping[str, Any]) -> str | None:
    """Return the template of chat_template.jinja or tokenizer_config.json, None for none."""
    path = directory / "chat_template.jinja"
    found = path.read_text("utf-8") if path.is_file() else config.get("chat_template")
    if isinstance(found, list):
        found = {one["name"]: one["template"] for one in found}.get("default")
    return found


def _read_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes()) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path.name} beside it is no JSON: {error}") from error
    return found if isinstance(found, dict) else {}


def bos_token_of(described: Mapping[str, Any]) -> str | None:
    """Return the special token that the file puts before a text and not after it."""
    post_processor = described["post_processor"] or {}
    for processor in [post_processor, *post_processor.get("processors", ())]:
        if processor.get("type") == "TemplateProcessing":
            first, *_, last = processor["single"]
            if "SpecialToken" in first and "SpecialToken" not in last:
                return str(first["SpecialToken"]["id"])
    return None


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
        tools: Turns = (),
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
    ) -> Encoded:
        """Return the ids of a conversation, and which of them are responses'.

        They are those of transformers, but where a content spells an added token. The token that
        ends a response belongs to it. Raises ValueError where the template fails, refuses the
        conversation or changes contents in another way than `CHANGES`, for a tool or a call that
        spells a special token or another added one that is neither a word nor white space, alone
        or with what the template writes next to it, and for a tokenizer without a template.
        """
        published = _with_template(tokenizer)
        if not messages:
            raise ValueError("the conversation is empty; give at least one message")
        texts = ["\n\n".join(filter(None, (m.content, m.context))) for m in messages]
        contents = [*map(well_formed, texts)]
        # A message of calls has no content, for which templates have another scaffold.
        has_mark = [bool(contents[i] or not m.fields) for i, m in enumerate(messages)]
        marks = [f"\ue000{i}\ue001" * has for i, has in enumerate(has_mark)]
        marked = [i for i, has in enumerate(has_mark) if has]
        turns = [{"role": message.role, **(message.fields or {})} for message in messages]
        render = partial(_render, published, add_generation_prompt)
        text = render(contents, turns, tools)
        pieces = MARK.split(render(marks, turns, tools))
        if tools or any(message.fields for message in messages):
            _check_fields(published, turns, tools, partial(render, marks))
        scaffolds, order = pieces[::2], [int(i) for i in pieces[1::2]]
        if order != marked:
            raise ValueError("the chat template omits, repeats or reorders messages; pass others")
        contents = _as_rendered(text, scaffolds, [contents[i] for i in marked])
        roles = [messages[i].role for i in marked]
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
                encoded = published.library.encode("".join(parts), add_special_tokens=False)
                own = [r for part, r in zip(parts, responses, strict=True) for _ in part]
                ids += encoded.ids
                is_response += [own[end - 1] for _, end in encoded.offsets]
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
    tokenizer: PublishedTokenizer, opens: bool, contents: Sequence[str], turns: Turns, tools: Turns
) -> str:
    """Return the template's text, in the environment that transformers renders it in."""
    messages = [{**turn, "content": c} for turn, c in zip(turns, contents, strict=True)]
    try:
        text: str = _compiled(str(tokenizer.chat_template)).render(
            messages=messages,
            add_generation_prompt=opens,
            bos_token=tokenizer.bos_token or "",
            eos_token=tokenizer.end_tokens[0] if tokenizer.end_tokens else tokenizer.eot_token,
            tools=tools or None,
            documents=None,
        )
        return well_formed(text)  # tools and calls may have lone surrogates
    except Exception as error:  # whatever a template does
        message = f"the chat template of {tokenizer.name} fails: {first_line(error)}"
        raise ValueError(message) from error


def _check_fields(
    published: PublishedTokenizer, turns: Turns, tools: Turns, render: Callable[[Turns, Turns], str]
) -> None:
    """Raise ValueError for a tool or a call that spells a token, alone or with what is next to it.

    The text must keep its tokens when each sign in them, such as `<` and `|`, is another character,
    for private use, in tools and calls. Letters and digits stay, as templates compare words.
    """
    words = {name for name in published.added if name.isidentifier() or name.isspace()}
    names = published.special_tokens.keys() | published.added.keys() - words
    signs = {ord(c): 0xF0000 | ord(c) & 0xFFFF for name in names for c in name if not c.isalnum()}

    def spelt(text: str) -> list[str]:
        return [*filter(names.__contains__, published.added_pattern.findall(well_formed(text)))]

    def masked(value: Any) -> Any:
        if isinstance(value, str):
            return value.translate(signs)
        if isinstance(value, Mapping):
            return {masked(name): masked(own) for name, own in value.items()}
        return [*map(masked, value)] if isinstance(value, (list, tuple)) else value

    given = [turn[name] for turn in turns for name in turn if name != "role"]
    found = spelt(json.dumps([tools, given], ensure_ascii=False))
    if not found:
        safe = [{name: masked(own) for name, own in turn.items()} for turn in turns]  # roles stay
        pairs = zip_longest(spelt(render(turns, tools)), spelt(render(safe, masked(tools))))
        found = [one or other for one, other in pairs if one != other]
    if found:
        raise ValueError(f"a tool or a call spells {found[0]}, a token of the model")


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
