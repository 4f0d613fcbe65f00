"""Tokenizers in Hugging Face's files: tokenizer.json, or vocab.json with merges.txt.

There a byte is spelled as a letter, and a token is the merge of a listed pair of tokens; ours are
merged in the order of their ids, so that the pairs follow from the table and the table from them.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanogpt.published import PublishedTokenizer, bos_token_of, read_published
from nanogpt.text import first_line
from nanogpt.tokenizer import (
    BPE_PATTERN,
    BYTE_OF_LETTER,
    END_OF_TEXT,
    GPT2_PATTERN,
    QWEN2_CUTS,
    RESERVED,
    Tokenizer,
    from_record,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Library

TOKENIZER, VOCAB, MERGES = "tokenizer.json", "vocab.json", "merges.txt"
GPT2_FINGERPRINT = "5ef7e0bf39ac26d0"  # of GPT-2's table, as gpt2_tokenizer() returns it
QWEN2_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)" + QWEN2_CUTS
LLAMA3_PATTERN = QWEN2_PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
# llama.cpp's name (tokenizer.ggml.pre) for the patterns that cut a text, one after another, and for
# whether a cut that is a token is taken as it is, without merges.
PRE_TOKENIZERS = {
    ((GPT2_PATTERN,), False): "gpt-2",
    ((BPE_PATTERN,), False): "qwen2",
    ((QWEN2_PATTERN,), False): "qwen2",
    ((LLAMA3_PATTERN,), True): "llama-bpe",
    ((LLAMA3_PATTERN,), False): "smaug-bpe",
    ((r"\p{N}", GPT2_PATTERN), False): "smollm",
}
EACH_DIGIT = {"type": "Digits", "individual_digits": True}
SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False}
AFFIXES = ("continuing_subword_prefix", "end_of_word_suffix")
LETTERS = {byte: letter for letter, byte in BYTE_OF_LETTER.items()}  # that spell bytes


def read_tokenizer(directory: Path, n_ids: int | None = None) -> Tokenizer | None:
    """Return the tokenizer whose files lie in a directory, None where there are none.

    tokenizer.json comes first, since it alone has the pattern; that of vocab.json and merges.txt is
    GPT-2's. One that no tokenizer of ours equals is a `PublishedTokenizer` with `n_ids` ids, those
    of its model. Raises ValueError where the files are damaged, or describe anything but a
    byte-level BPE.
    """
    for path in (directory / TOKENIZER, directory / VOCAB):
        if path.is_file() and (path.name == TOKENIZER or (directory / MERGES).is_file()):
            try:
                library = _load(path)
                with suppress(ValueError, KeyError, TypeError, AttributeError):
                    return _from_library(library)
                return read_published(directory, library.to_str(), n_ids)
            except Exception as error:  # the library raises no other class
                name = path if path.name == TOKENIZER else f"{path} with {MERGES}"
                raise ValueError(
                    f"{name} cannot be read ({first_line(error)[:200]}); remove it and fetch it "
                    f"again, or pass a byte-level BPE tokenizer"
                ) from error
    return None


def frame_of(directory: Path) -> tuple[list[int], list[int]]:
    """Return the ids that the tokenizer.json of a directory puts before and after a text."""
    path = directory / TOKENIZER
    if not path.is_file():
        return [], []
    library = _load(path)
    library.no_padding()
    library.no_truncation()
    found = library.encode("a")
    first, n_end = found.special_tokens_mask.index(0), found.special_tokens_mask[::-1].index(0)
    return found.ids[:first], found.ids[len(found.ids) - n_end :]


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
    are cut, and shorter ones are padded on the right. Raises ValueError where no merges lead to the
    table.
    """
    library = _to_library(tokenizer, framed)
    library.save(str(directory / TOKENIZER))
    library.model.save(str(directory))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": block_size,
        "model_input_names": ["input_ids", "attention_mask"],  # GPT-2 would embed token_type_ids
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": chat_template is None,
        **dict.fromkeys(("eos_token", "unk_token"), tokenizer.eot_token),
        "bos_token": tokenizer.bos_token or tokenizer.eot_token,
    }
    if chat_template is not None:
        config["chat_template"] = chat_template
    if framed:
        config |= {"pad_token": library.id_to_token(padding_id(tokenizer)), "padding_side": "right"}
    text = json.dumps(config, ensure_ascii=False, indent=1) + "\n"
    (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")


def described(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the tokenizer.json of a tokenizer."""
    content: dict[str, Any] = json.loads(_to_library(tokenizer, framed=False).to_str())
    return content


def llama_cpp_name(content: Mapping[str, Any]) -> str:
    """Return the name under which llama.cpp encodes as a tokenizer.json describes.

    Except text that NFC changes, where the file applies it: llama.cpp never does. Raises
    ValueError, naming the part of the file, for what llama.cpp lacks.
    """
    model, patterns = content["model"], _patterns(content["pre_tokenizer"] or {})
    if not model["merges"]:  # bytes that never merge may be cut by any
        patterns = (GPT2_PATTERN,)
    name = PRE_TOKENIZERS.get((patterns, bool(model["ignore_merges"])))
    parts = {"normalizer": content["normalizer"], **{key: model[key] for key in AFFIXES}}
    unknown = {key: part for key, part in parts.items() if part and part != {"type": "NFC"}}
    if name is None or unknown:
        raise ValueError(json.dumps(unknown or {"pre_tokenizer": patterns}))
    return name


def padding_id(tokenizer: Tokenizer) -> int:
    """Return an id that no text gives, other than `<|endoftext|>`.

    A classifier in transformers reads the class at the last token that is not this one. It is the
    last reserved id, or where none is left, as in GPT-2's table, that of a byte that UTF-8 lacks.
    """
    reserved = [i for token, i in tokenizer.special_tokens.items() if token in RESERVED]
    return reserved[-1] if reserved else tokenizer.token_bytes().index(b"\xff")


def merges_of(tokenizer: Tokenizer) -> list[tuple[bytes, bytes]]:
    """Return the pair that each token of more than one byte is merged from, in the order of ids.

    It is what the merges before it leave of the token's bytes. Raises ValueError for a token that
    they do not leave in two: tiktoken gives it where a text is no longer, and merging pairs never.
    """
    ranks = {token: rank for rank, token in enumerate(tokenizer.token_bytes()) if token}
    merges = []
    for token in (token for token in ranks if len(token) > 1):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = [ranks.get(a + b, len(ranks)) for a, b in pairwise(parts)]
            lowest = min(pairs)
            if lowest > ranks[token]:
                raise ValueError(
                    f"the token {token!r} cannot be made by merging pairs of tokens with lower "
                    "ids; use a tokenizer whose merges are in the order of its ids"
                )
            i = pairs.index(lowest)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        merges.append((parts[0], parts[1]))
    return merges


def spell(token: bytes) -> str:
    """Return the letters of a token's bytes."""
    return "".join([LETTERS[byte] for byte in token])


def _load(path: Path) -> "Library":
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers

    if path.name == TOKENIZER:
        return Library.from_file(str(path))
    library = Library(models.BPE.from_file(str(path), str(path.with_name(MERGES))))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    names = [END_OF_TEXT, *RESERVED]
    library.add_special_tokens([name for name in names if library.token_to_id(name) is not None])
    return library


def _from_library(library: "Library") -> Tokenizer:
    """Return our tokenizer for the library's; raise ValueError or KeyError where there is none."""
    content = json.loads(library.to_str())
    model = content["model"]
    (pattern,) = _patterns(content["pre_tokenizer"]) or ("",)
    vocab = library.get_vocab(with_added_tokens=True)
    by_id = sorted(vocab, key=vocab.__getitem__)
    merges = [tuple(merge) for merge in model["merges"]]
    special_tokens = by_id[256 + len(merges) :]
    added = {token.content for token in library.get_added_tokens_decoder().values()}
    if (
        content["normalizer"]
        or any(map(model.get, AFFIXES))
        or not {*special_tokens} <= added
        or vocab[by_id[-1]] >= len(by_id)
    ):
        raise ValueError("it has another normalisation or special tokens")
    tokens = [bytes(BYTE_OF_LETTER[letter] for letter in t) for t in by_id[: 256 + len(merges)]]
    bos_token = bos_token_of(content)
    # GPT-2's table has its name, whatever its special tokens are.
    plain = Tokenizer("gpt2", pattern, tokens, [END_OF_TEXT], bos_token)
    is_gpt2 = plain.fingerprint == GPT2_FINGERPRINT
    record = {**plain.record(), "special_tokens": special_tokens}
    tokenizer = from_record(record if is_gpt2 else {**record, "name": record["kind"]})
    if not is_gpt2 and [(spell(a), spell(b)) for a, b in merges_of(tokenizer)] != merges:
        raise ValueError("it does not merge in the order of its ids")
    return tokenizer


def _patterns(pre_tokenizer: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the patterns by which a byte-level pre_tokenizer cuts a text, one after another.

    Raises ValueError where it cuts in another way.
    """
    *steps, last = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    known = [step if step == EACH_DIGIT else step | SPLIT for step in steps]
    if [*steps, last] != [*known, last | BYTE_LEVEL]:
        raise ValueError(json.dumps({"pre_tokenizer": pre_tokenizer}))
    patterns = [r"\p{N}" if s == EACH_DIGIT else s["pattern"].get("Regex") for s in steps]
    return tuple(patterns + [GPT2_PATTERN] * last["use_regex"])


def _to_library(tokenizer: Tokenizer, framed: bool) -> "Library":
    """Return the library's tokenizer that encodes as ours, with special tokens around a text."""
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors
    from tokenizers import Tokenizer as Library

    token = tokenizer.eot_token if framed else tokenizer.bos_token
    end = [token] if framed else []
    around = token and processors.TemplateProcessing(
        [token, "$A", *end],
        [token, "$A", *end, "$B:0", *end],
        [(token, tokenizer.special_tokens[token])],
    )
    if isinstance(tokenizer, PublishedTokenizer):
        library = Library.from_str(tokenizer.content)
        library.post_processor = around or library.post_processor
        return library
    names = tokenizer.special_tokens  # whose ids come last
    ordinary = tokenizer.token_bytes()[: tokenizer.vocab_size - len(names)]
    vocab = {spell(token): i for i, token in enumerate(ordinary)} | names
    library = Library(models.BPE(vocab, [(spell(a), spell(b)) for a, b in merges_of(tokenizer)]))
    byte_level = pre_tokenizers.ByteLevel(
        add_prefix_space=False, trim_offsets=False, use_regex=tokenizer.pattern == GPT2_PATTERN
    )
    library.pre_tokenizer = byte_level
    if tokenizer.pattern not in (GPT2_PATTERN, ""):
        split = pre_tokenizers.Split(Regex(tokenizer.pattern), "isolated")
        library.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    library.decoder = decoders.ByteLevel()
    library.post_processor = around or processors.ByteLevel(
        add_prefix_space=False, trim_offsets=False
    )
    library.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names])
    return library
