"""Tokenizers in Hugging Face's files: tokenizer.json, or vocab.json with merges.txt.

There a byte is spelt as a letter, and a token is made by merging a listed pair of tokens; ours are
merged in the order of their ids, so the pairs follow from the table and the table from the pairs.
"""

import base64
import json
from collections.abc import Mapping, Set
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from nanogpt.tokenizer import (
    END_OF_TEXT,
    GPT2_PATTERN,
    GPT2_VOCAB_SIZE,
    RESERVED,
    BytePairTokenizer,
    Tokenizer,
    byte_of_letter,
    from_record,
)

TOKENIZER, VOCAB, MERGES = "tokenizer.json", "vocab.json", "merges.txt"
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
GPT2_FINGERPRINT = "5ef7e0bf39ac26d0"  # of GPT-2's table, as gpt2_tokenizer() gives it

Merge = tuple[bytes, bytes]


def read_tokenizer(directory: Path) -> Tokenizer | None:
    """Return the tokenizer whose files lie in a directory, None where there are none.

    tokenizer.json comes first, since only it tells the pattern; with vocab.json and merges.txt it
    is GPT-2's. Raises ValueError where the files are damaged, or describe anything but byte pairs
    that are merged in the order of their ids.
    """
    if (path := directory / TOKENIZER).is_file():
        files = _read_tokenizer_json(path)
    elif (path := directory / VOCAB).is_file() and (directory / MERGES).is_file():
        lines = _read_text(directory / MERGES).split("\n")
        merges = [line for line in lines if line and not line.startswith("#version")]
        special_tokens = {END_OF_TEXT, *RESERVED}
        files = _Files(path, read_json(path), _pairs(path, merges), special_tokens, GPT2_PATTERN)
    else:
        return None
    return files.tokenizer()


def write_tokenizer(
    tokenizer: Tokenizer,
    directory: Path,
    block_size: int,
    chat_template: str | None = None,
    *,
    framed: bool = False,
) -> None:
    """Write the files with which AutoTokenizer encodes as the tokenizer does.

    Special tokens in a text are text, as with us, unless there is a chat template: it writes turn
    markers into the text. With `framed`, texts stand between two `<|endoftext|>`, also where they
    are cut, and shorter ones are padded on the right. Raises ValueError where the merges cannot be
    told from the table.
    """
    vocab = {token: i for i, token in enumerate(spellings(tokenizer))}
    merges = [f"{spell(a)} {spell(b)}" for a, b in merges_of(tokenizer)]
    _write_json(directory / VOCAB, vocab)
    (directory / MERGES).write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    _write_json(directory / TOKENIZER, _tokenizer_json(tokenizer, vocab, merges, framed))
    bos_token = tokenizer.bos_token or END_OF_TEXT
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": block_size,
        "model_input_names": ["input_ids", "attention_mask"],  # GPT-2 would embed token_type_ids
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": chat_template is None,
        **dict.fromkeys(("eos_token", "unk_token"), END_OF_TEXT),
        "bos_token": bos_token,
    }
    if chat_template is not None:
        config["chat_template"] = chat_template
    if framed:
        pad_token = spellings(tokenizer)[padding_id(tokenizer)]
        config |= {"pad_token": pad_token, "padding_side": "right"}
    _write_json(directory / "tokenizer_config.json", config)


def padding_id(tokenizer: Tokenizer) -> int:
    """Return an id that no text gives, other than `<|endoftext|>`.

    A classifier in transformers reads the class at the last token that is not this one. It is the
    last reserved id, or where none is left, as in GPT-2's table, that of a byte that UTF-8 lacks.
    """
    reserved = [i for token, i in tokenizer.special_tokens.items() if token in RESERVED]
    return reserved[-1] if reserved else tokenizer.token_bytes().index(b"\xff")


def merges_of(tokenizer: Tokenizer) -> list[Merge]:
    """Return the pair that each token of more than one byte is merged from, in the order of ids.

    It is what the merges before it leave of the token's bytes. Raises ValueError for a token that
    they do not leave in two: tiktoken gives it where a text is no longer, and merging pairs never.
    """
    ranks = {token: rank for rank, token in enumerate(tokenizer.token_bytes()) if token}
    return [_halves(token, ranks) for token in ranks if len(token) > 1]


def spellings(tokenizer: Tokenizer) -> list[str]:
    """Return every token by id: the letters of its bytes, or the name of a special token."""
    n_ordinary = tokenizer.vocab_size - len(tokenizer.special_tokens)
    return [*map(spell, tokenizer.token_bytes()[:n_ordinary]), *tokenizer.special_tokens]


def spell(token: bytes) -> str:
    """Return the letters of a token's bytes."""
    letters = _letters()
    return "".join([letters[byte] for byte in token])


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; raise ValueError where it is none."""
    text = _read_text(path)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON; fetch it again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} does not hold a JSON object; fetch it again")
    return found


@dataclass(frozen=True)
class _Files:
    """What the files of a tokenizer say; `pattern` is None where texts are not cut."""

    path: Path
    vocab: Mapping[str, int]
    merges: list[tuple[str, str]]
    special_tokens: Set[str]
    pattern: str | None
    bos_token: str | None = None

    def tokenizer(self) -> Tokenizer:
        tokens, special_tokens = self._table()
        if self.pattern is None and tokens != [bytes([i]) for i in range(256)]:
            raise _refused(self.path, "does not cut texts into words")
        is_gpt2 = self.bos_token is None and _is_gpt2(tokens, self.pattern)
        kind = "byte" if self.pattern is None else "bpe"
        record = {
            "kind": kind,
            "name": "gpt2" if is_gpt2 else kind,
            "pattern": self.pattern or "",
            "tokens": [base64.b64encode(token).decode() for token in tokens],
            "special_tokens": special_tokens,
            **({} if self.bos_token is None else {"bos_token": self.bos_token}),
        }
        try:
            tokenizer = from_record(record)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error
        if is_gpt2 or [(spell(a), spell(b)) for a, b in merges_of(tokenizer)] == self.merges:
            return tokenizer
        raise _refused(self.path, "merges pairs that lower ids do not lead to")

    def _table(self) -> tuple[list[bytes], list[str]]:
        """Return the bytes of the ordinary tokens by id, and the special ones that follow them."""
        byte_of = byte_of_letter()
        texts = (*self.vocab, *(token for pair in self.merges for token in pair))
        if {*map(type, texts), *map(type, self.vocab.values())} != {str, int}:
            raise _refused(self.path, "has tokens that are not texts, or ids that are not numbers")
        by_id = sorted(self.vocab, key=lambda token: self.vocab[token])
        if [self.vocab[token] for token in by_id] != list(range(len(by_id))):
            raise _refused(self.path, "does not number its tokens from 0 up without a gap")
        special = self.special_tokens - byte_of.keys()  # a byte may pad: see padding_id
        ordinary = [token for token in by_id if token not in special]
        merged = [a + b for a, b in self.merges]
        if set(ordinary) != {*byte_of, *merged} or by_id[: len(ordinary)] != ordinary:
            raise _refused(
                self.path,
                f"has tokens other than 256 bytes, {len(merged)} merges and final special ones",
            )
        if [token for token in ordinary if token not in byte_of] != merged:
            raise _refused(self.path, "does not merge in the order of its ids")
        special_tokens = by_id[len(ordinary) :]
        if END_OF_TEXT not in special_tokens:
            raise _refused(self.path, f"has no {END_OF_TEXT}")
        return [bytes(byte_of[letter] for letter in token) for token in ordinary], special_tokens


def _is_gpt2(tokens: list[bytes], pattern: str | None) -> bool:
    """Whether a table is GPT-2's, whatever its special tokens are."""
    if pattern is None or len(tokens) != GPT2_VOCAB_SIZE - 1:
        return False
    return BytePairTokenizer("gpt2", pattern, tokens, [END_OF_TEXT]).fingerprint == GPT2_FINGERPRINT


def _read_tokenizer_json(path: Path) -> _Files:
    found = read_json(path)
    try:
        model = found["model"]
        pattern = _pattern(found["pre_tokenizer"])
        plain = not any(
            model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix")
        )
        if model.get("type", "BPE") != "BPE" or found.get("normalizer") or not plain:
            raise KeyError("type")
        added = {token["content"]: token["id"] for token in found.get("added_tokens", ())}
        merges = _pairs(path, model["merges"])
        bos_token = _bos_token(found.get("post_processor") or {})
        return _Files(path, {**model["vocab"], **added}, merges, added.keys(), pattern, bos_token)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise _refused(path, "is not a byte-level BPE without normalisation") from error


def _pattern(pre_tokenizer: Mapping[str, Any]) -> str | None:
    """Return the pattern that cuts texts, None for none; raise KeyError for any other way."""
    *splits, last = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    cuts_words = last.get("use_regex", True)
    if last["type"] == "ByteLevel" and not last["add_prefix_space"]:
        if not splits:
            return GPT2_PATTERN if cuts_words else None
        isolating = {"type": "Split", "behavior": "Isolated", "invert": False}
        if len(splits) == 1 and isolating.items() <= splits[0].items() and not cuts_words:
            return str(splits[0]["pattern"]["Regex"])
    raise KeyError("pre_tokenizer")


def _bos_token(post_processor: Mapping[str, Any]) -> str | None:
    """Return the special token that is put before a text and not after it, None for none."""
    for processor in [post_processor, *post_processor.get("processors", ())]:
        if processor["type"] == "TemplateProcessing" and "SpecialToken" in processor["single"][0]:
            first, *_, last = processor["single"]
            return None if "SpecialToken" in last else str(first["SpecialToken"]["id"])
    return None


def _pairs(path: Path, merges: list[Any]) -> list[tuple[str, str]]:
    """Return merges, each "a b" or ["a", "b"], as pairs."""
    pairs = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in merges]
    if any(len(pair) != 2 for pair in pairs):
        raise _refused(path, "goes with merges that are not all of two tokens")
    return pairs


def _tokenizer_json(
    tokenizer: Tokenizer, vocab: Mapping[str, int], merges: list[str], framed: bool
) -> dict[str, Any]:
    pattern = tokenizer.record()["pattern"]
    cut = {**BYTE_LEVEL, "use_regex": pattern == GPT2_PATTERN}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    plain = pattern in (GPT2_PATTERN, "")
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": content, **flags, "special": True}
            for content, i in tokenizer.special_tokens.items()
        ],
        "normalizer": None,
        "pre_tokenizer": cut
        if plain
        else {"type": "Sequence", "pretokenizers": [{**split, "invert": False}, cut]},
        "post_processor": _post_processor(tokenizer, framed),
        "decoder": {**BYTE_LEVEL, "use_regex": True},
        "model": {
            "type": "BPE",
            **dict.fromkeys(("dropout", "unk_token")),
            **dict.fromkeys(("continuing_subword_prefix", "end_of_word_suffix")),
            **dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"), False),
            "vocab": vocab,
            "merges": merges,
        },
    }


def _post_processor(tokenizer: Tokenizer, framed: bool) -> dict[str, Any]:
    """Return what puts special tokens around a text: `<|endoftext|>` on both sides, or a BOS."""
    token = END_OF_TEXT if framed else tokenizer.bos_token
    if token is None:
        return {**BYTE_LEVEL, "use_regex": True}
    special = {"SpecialToken": {"id": token, "type_id": 0}}
    end = [special] if framed else []
    first, second = ({"Sequence": {"id": text, "type_id": 0}} for text in "AB")
    ids = {"id": token, "ids": [tokenizer.special_tokens[token]], "tokens": [token]}
    return {
        "type": "TemplateProcessing",
        "single": [special, first, *end],
        "pair": [special, first, *end, second, *end],
        "special_tokens": {token: ids},
    }


def _halves(token: bytes, ranks: Mapping[bytes, int]) -> Merge:
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, len(ranks)) for a, b in pairwise(parts)]
        lowest = min(pairs)
        if lowest > ranks[token]:
            raise ValueError(
                f"the token {token!r} cannot be made by merging pairs of tokens with lower ids; "
                f"use a tokenizer whose merges are in the order of its ids"
            )
        i = pairs.index(lowest)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


@cache
def _letters() -> dict[int, str]:
    return {byte: letter for letter, byte in byte_of_letter().items()}


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8; fetch it again") from error


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _refused(path: Path, found: str) -> ValueError:
    return ValueError(
        f"{path} {found}; only byte-level BPE tokenizers like GPT-2's, merged in the order of "
        f"their ids, can be read"
    )
