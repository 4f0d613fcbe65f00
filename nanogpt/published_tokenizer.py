"""Byte-level BPE tokenizers of published models, as their tokenizer.json describes them.

The whole file travels with checkpoints and prepared data. Its special and other added tokens are
ids that no text gives: they are removed from the library's tokenizer, which encodes texts only.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nanogpt.tokenizer import BYTE_OF_LETTER, END_OF_TEXT, PATTERN_SAMPLE, Tokenizer, well_formed

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Library


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
        encoded = self._library.encode(well_formed(text), add_special_tokens=False)
        return np.array(encoded.ids, dtype=np.uint32)

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        """Return the ids of the text, and the offset in characters of the end of each."""
        encoded = self._library.encode(text, add_special_tokens=False)
        return encoded.ids, [end for _, end in encoded.offsets]

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
    def _library(self) -> "Library":
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
