"""Tokenizers: bytes, GPT-2's byte pairs, and byte pairs trained on the user's own text.

A tokenizer is a table: the bytes of every ordinary token by id, then the names of the special
tokens. The whole table travels with prepared data and with checkpoints (`record`, `from_record`),
so that reading either needs neither the network nor the library that trained it. Encoding never
returns a special token: a text that spells `<|endoftext|>` is thirteen characters.
"""

import base64
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from nanogpt.text import first_line

if TYPE_CHECKING:
    import tiktoken
    import tokenizers

END_OF_TEXT = "<|endoftext|>"
BYTES = tuple(bytes([i]) for i in range(256))
RESERVED = tuple(f"<|reserved_{i}|>" for i in range(16))  # for turn markers and the like, later

# How text is cut before byte pairs are merged (merges never cross a cut): Qwen2's pattern, because
# llama.cpp and Ollama cut by the patterns of a list alone. The letters of contractions are listed
# because `(?i:s)` is `ſ`, too, but not in llama.cpp. Bytes per token at a vocabulary of 2,048 on
# held-out files of the Python standard library: 2.87, Llama 3's pattern (digits in threes) 2.90,
# GPT-2's 2.95; on English prose: 2.81, 2.81, 2.56.
QWEN2_CUTS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BPE_PATTERN = r"'(?:[sdmtSDMT]|[lL][lL]|[vV][eE]|[rR][eE])" + QWEN2_CUTS
# GPT-2's pattern (openai/gpt-2, src/encoder.py) with possessive quantifiers, as tiktoken writes it.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
GPT2_VOCAB_SIZE = 50257

# GPT-2's spelling of bytes as letters (openai/gpt-2, src/encoder.py): printable Latin-1 stands for
# itself; the other bytes are, in order, the letters from U+0100.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTE_OF_LETTER = {chr(byte): byte for byte in _PRINTABLE}
BYTE_OF_LETTER |= {chr(0x100 + i): b for i, b in enumerate(sorted({*range(256)} - {*_PRINTABLE}))}

SURROGATE = re.compile("[\ud800-\udfff]")
PATTERN_SAMPLE = "It's 1,234 words: naïve\n\n  \tif (x != 0) {\r\n 中文，テスト   🙂\u00a0..."

# A vocabulary is learnt from at most this much text: more changes little and costs memory.
TRAINING_SAMPLE_BYTES = 256 * 2**20

# BPE training is quadratic in the length of a word: longer ones are cut, for training only.
MAX_WORD_CHARS = 1000

# tiktoken panics (its regular expressions overflow their stack) on a run of about a million spaces.
LONGEST_SPACE = 100_000
_LONG_SPACE = re.compile(rf"(?<!\s)\s{{{LONGEST_SPACE}}}\s+")

# Between a lone line break and what follows it, and before the space between two words, both
# patterns above always cut: there a text can be encoded in pieces to the same ids.
PIECE_CHARS = 2**20
_SAFE_CUT = re.compile(r"(?<=\S\n)(?=\S)|(?<=[A-Za-z])(?= [A-Za-z])")


def byte_tokenizer(documents: Iterable[str] | None = None) -> "Tokenizer":
    """Return the tokenizer whose tokens are the 256 bytes, `<|endoftext|>` and the reserved ids."""
    return Tokenizer("byte", "", BYTES, [END_OF_TEXT, *RESERVED])


def gpt2_tokenizer(documents: Iterable[str] | None = None) -> "Tokenizer":
    """Return GPT-2's tokenizer, from tiktoken's cache or else its download.

    Raises FileNotFoundError where neither gives the table.
    """
    import tiktoken

    try:
        encoding = tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"GPT-2's tokens are not in {os.environ.get('TIKTOKEN_CACHE_DIR', 'a cache')} and "
            f"could not be downloaded from openaipublic.blob.core.windows.net "
            f"({type(error).__name__}); set TIKTOKEN_CACHE_DIR to a folder with them, or choose "
            f"the tokenizer bpe or byte"
        ) from error
    tokens = [encoding.decode_single_token_bytes(i) for i in range(GPT2_VOCAB_SIZE - 1)]
    return Tokenizer("gpt2", GPT2_PATTERN, tokens, [END_OF_TEXT])


def bpe_tokenizer(documents: Iterable[str], vocab_size: int) -> "Tokenizer":
    """Train a byte-level BPE of at most `vocab_size` ids, special ones included, on the documents.

    A text with too few pairs that occur twice gives a smaller vocabulary. The same documents give
    the same tokenizer. Only about the first `TRAINING_SAMPLE_BYTES` are read. Raises ValueError for
    a vocabulary below the 256 bytes and the special tokens.
    """
    n_special = 1 + len(RESERVED)
    if type(vocab_size) is not int or vocab_size < 256 + n_special:
        raise ValueError(
            f"vocab_size={vocab_size!r} is not a whole number of at least {256 + n_special}: "
            f"256 bytes, {END_OF_TEXT} and {len(RESERVED)} reserved ids"
        )
    merged = _tokens(_train(_sample(documents), vocab_size - n_special))[256:]
    return Tokenizer("bpe", BPE_PATTERN, [*BYTES, *merged], [END_OF_TEXT, *RESERVED])


def from_record(record: Any) -> "Tokenizer":
    """Return the tokenizer that a record describes.

    Raises ValueError where it lacks a key of `Tokenizer.record`, has another kind of value, or its
    tokens or pattern lose part of a text.
    """
    try:
        if record["kind"] == "published":
            from nanogpt.published import PublishedTokenizer

            return PublishedTokenizer(**record)
        tokens = [base64.b64decode(token, validate=True) for token in record["tokens"]]
        name, pattern, special_tokens = (record[k] for k in ("name", "pattern", "special_tokens"))
        bos_token = record.get("bos_token")
        tokenizer = Tokenizer(name, pattern, tokens, special_tokens, bos_token)
        probe = Tokenizer("probe", pattern, BYTES, [END_OF_TEXT])
        if (
            not all(isinstance(text, str) for text in (name, pattern, *special_tokens))
            or len({END_OF_TEXT, *special_tokens}) != len(special_tokens)
            or bos_token not in (None, *special_tokens)
            or len({b"", *tokens}) <= len(tokens)
            or not {*BYTES} <= {*tokens}
            or tokenizer.kind != record["kind"]
            or not (pattern or tokens == [*BYTES])
            or probe.decode(probe.encode(PATTERN_SAMPLE)) != PATTERN_SAMPLE
        ):
            raise ValueError("a kind, token, special token or pattern that loses part of a text")
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # tiktoken panics where a pattern cuts an empty piece
        reason = f"{type(error).__name__}: {first_line(error)}"[:200]
        raise ValueError(
            f"the tokenizer's record is malformed ({reason}); use the checkpoint or tokenizer.json "
            f"as it was written, or make it again"
        ) from error
    return tokenizer


class Tokenizer:
    """The bytes of the ordinary tokens by id, then the special tokens.

    tiktoken cuts a text by the pattern and merges byte pairs in the order of their ids; without a
    pattern the ids are the bytes of the text.
    """

    eot_token = END_OF_TEXT
    chat_template: str | None = None

    def __init__(
        self,
        name: str,
        pattern: str,
        tokens: Sequence[bytes],
        special_tokens: Sequence[str],
        bos_token: str | None = None,
    ) -> None:
        self.kind = "bpe" if pattern else "byte"
        self.name = name
        self.pattern = pattern
        self.special_tokens = {s: len(tokens) + i for i, s in enumerate(special_tokens)}
        self.bos_token = bos_token
        self._token_bytes = [*tokens, *(b"" for _ in special_tokens)]

    @property
    def vocab_size(self) -> int:
        """The number of ids, special ones included."""
        return len(self._token_bytes)

    @property
    def eot_id(self) -> int:
        """The id of `eot_token`, which precedes each document."""
        return self.special_tokens[self.eot_token]

    @property
    def end_ids(self) -> list[int]:
        """The ids that end an answer."""
        return [self.eot_id]

    @property
    def bos_id(self) -> int | None:
        """The id that begins every text, None where the tokenizer declares none, as ours."""
        return None if self.bos_token is None else self.special_tokens[self.bos_token]

    def encode_array(self, text: str) -> np.ndarray:
        """Return the ids of the text, (N,) uint16 of bytes, else uint32.

        The GIL is released, so threads scale.
        """
        text = well_formed(text)
        if not self.pattern:
            return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint16)
        encode = partial(self._encoding.encode_to_numpy, disallowed_special=())
        return np.concatenate([encode(piece) for piece in _within_longest_space(text)])

    @cached_property
    def _encoding(self) -> "tiktoken.Encoding":
        import tiktoken

        ranks = {token: i for i, token in enumerate(self._token_bytes) if token}
        # Without any tiktoken would search for the empty text; this one is never allowed.
        special_tokens = {END_OF_TEXT: max(ranks.values()) + 1}
        return tiktoken.Encoding(
            self.name, pat_str=self.pattern, mergeable_ranks=ranks, special_tokens=special_tokens
        )

    def encode(self, text: str) -> list[int]:
        """Return the ids of the text."""
        ids: list[int] = self.encode_array(text).tolist()
        return ids

    def encode_parts(self, parts: Sequence[str | None]) -> np.ndarray:
        """Return the ids of the texts end to end, (N,); None stands for `<|endoftext|>`."""
        none = self.encode_array("")
        eot = np.array([self.eot_id], dtype=none.dtype)
        return np.concatenate(
            [none, *(eot if part is None else self.encode_array(part) for part in parts)]
        )

    def pieces(self, text: str) -> list[str]:
        """Return the text in pieces that, encoded on their own, give its ids end to end.

        Each has about a million characters where the text has line breaks or words.
        """
        if len(text) <= PIECE_CHARS or self.pattern not in ("", GPT2_PATTERN, BPE_PATTERN):
            return [text]
        cuts = [0]
        while cut := _SAFE_CUT.search(text, cuts[-1] + PIECE_CHARS):
            cuts.append(cut.start())
        return _cut(text, cuts)

    def encode_prompt(self, text: str) -> list[int]:
        """Return the ids that a model reads of a text, after the `bos_id` where there is one.

        An empty text begins a document: it is the `<|endoftext|>` before one, as in training.

        >>> tokenizer.encode_prompt("a"), tokenizer.encode_prompt("")
        ([97], [256])
        """
        begin = [] if self.bos_id is None else [self.bos_id]
        return [*begin, *self.encode(text)] or [self.eot_id]

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of the SHA-256 of the record."""
        text = json.dumps(self.record(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of the ids; bytes that are not UTF-8 become U+FFFD.

        >>> tokenizer.decode([tokenizer.eot_id, *tokenizer.encode("Grüße")])
        'Grüße'
        """
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of the ids; special tokens have none."""
        return b"".join([self._token_bytes[i] for i in ids])

    def token_bytes(self) -> list[bytes]:
        """Return the bytes of every id, `b""` for the special ones."""
        return list(self._token_bytes)

    def record(self) -> dict[str, Any]:
        """Return the whole table as plain types; `tokens` are the ordinary ones, in base64."""
        tokens = self._token_bytes[: len(self._token_bytes) - len(self.special_tokens)]
        return {
            "kind": self.kind,
            "name": self.name,
            "pattern": self.pattern,
            "tokens": [base64.b64encode(token).decode() for token in tokens],
            "special_tokens": list(self.special_tokens),
            **({} if self.bos_token is None else {"bos_token": self.bos_token}),
        }

    def with_special_tokens(self, names: Sequence[str]) -> "Tokenizer":
        """Return this tokenizer with the names among its special tokens.

        Each new one takes over the first reserved name that is left, and its id; where none is
        left, it gets a new id at the end.

        >>> byte_tokenizer().with_special_tokens(["<|user|>"]).special_tokens["<|user|>"]
        257
        """
        reserved = [t for t in self.special_tokens if t in RESERVED and t != self.bos_token]
        new = [name for name in names if name not in self.special_tokens]
        renamed = dict(zip(reserved, new, strict=False))
        special_tokens = [renamed.get(token, token) for token in self.special_tokens]
        special_tokens += new[len(reserved) :]
        return from_record({**self.record(), "special_tokens": special_tokens})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self.record() == other.record()

    def __hash__(self) -> int:
        return hash(self.fingerprint)


def well_formed(text: str) -> str:
    """Return the text, surrogates joined where they pair and else replaced, as tiktoken does."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _within_longest_space(text: str) -> list[str]:
    """Cut the text inside runs of white space too long for tiktoken; nearly always one piece."""
    if len(text) <= LONGEST_SPACE:
        return [text]
    cuts = [0]
    for run in _LONG_SPACE.finditer(text):
        cuts += range(run.start() + LONGEST_SPACE, run.end(), LONGEST_SPACE)
    return _cut(text, cuts)


def _cut(text: str, cuts: list[int]) -> list[str]:
    return [text[a:b] for a, b in zip(cuts, [*cuts[1:], len(text)], strict=True)]


def _sample(documents: Iterable[str]) -> Iterator[str]:
    """Yield documents, cut as for tiktoken, until there is enough to learn from."""
    n_bytes = 0
    for document in documents:
        for piece in _within_longest_space(well_formed(document)):
            yield piece
            n_bytes += len(piece.encode())
        if n_bytes >= TRAINING_SAMPLE_BYTES:
            return


def _train(texts: Iterable[str], n_tokens: int) -> "tokenizers.Tokenizer":
    """Return the trainer library's own tokenizer, whose first 256 ids are the bytes."""
    # The library reads this when a process that has trained forks, and else prints a warning.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    trainer = trainers.BpeTrainer(
        vocab_size=n_tokens,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(BPE_PATTERN), behavior="isolated"),
            pre_tokenizers.Split(Regex(rf"[\s\S]{{1,{MAX_WORD_CHARS}}}"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _tokens(trained: "tokenizers.Tokenizer") -> list[bytes]:
    """Return the bytes of each token by its id in the trainer library."""
    vocabulary = sorted(trained.get_vocab().items(), key=lambda item: item[1])
    return [bytes(BYTE_OF_LETTER[letter] for letter in token) for token, _ in vocabulary]
