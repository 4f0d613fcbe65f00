"""Tokenizers: any text comes back, and the table alone rebuilds them."""

import base64
import json
import os
import pickle
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt import tokenizer as tokenizer_module
from nanogpt.tokenizer import (
    BPE_PATTERN,
    END_OF_TEXT,
    GPT2_PATTERN,
    LONGEST_SPACE,
    MAX_WORD_CHARS,
    RESERVED,
    Tokenizer,
    _tokens,
    _train,
    bpe_tokenizer,
    byte_tokenizer,
    from_record,
    gpt2_tokenizer,
)

# Enough repetition to learn from, with what trips pre-tokenisers: indentation, digits, scripts.
SAMPLE = [
    Path(__file__).read_text(encoding="utf-8"),
    "def f(self):\n    if x_1 == 10_000:\n\n        return 'ä' + \"€\"\r\n\t# don't\n" * 20,
    "Ünïcödé 汉字汉字 🙂🙂 don't we'll I'D 12345 \u00a0\u3000 \x1c\x85 e\u0301 end.  \n" * 20,
]
BPE = bpe_tokenizer(SAMPLE, vocab_size=600)
TOKENIZERS = [byte_tokenizer(), BPE]
every_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=lambda t: t.name)


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    if "NANOGPT_TEST_DATA" not in os.environ:
        pytest.skip("NANOGPT_TEST_DATA is not set")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", os.environ["NANOGPT_TEST_DATA"] + "/tiktoken_cache")
        patch.delitem(tiktoken.registry.ENCODINGS, "gpt2", raising=False)
        return gpt2_tokenizer()


@every_tokenizer
@settings(deadline=None)
@given(text=st.text())
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@every_tokenizer
@settings(deadline=None)
@given(text=st.text(alphabet=" \t\r\n\x0b\x85\u00a0\u3000a_.1'(汉e\u0301"))
def test_text_of_spaces_and_marks_comes_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@every_tokenizer
@settings(deadline=None)
@given(text=st.text())
def test_parts_hold_the_ids_of_encode(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.encode_parts([text]).tolist() == tokenizer.encode(text)


@every_tokenizer
@settings(deadline=None)
@given(parts=st.lists(st.none() | st.text(alphabet="\x00\x01 a\n<|endoftext|>")))
def test_parts_are_encoded_on_their_own(tokenizer: Tokenizer, parts: list[str | None]) -> None:
    expected = [[tokenizer.eot_id] if part is None else tokenizer.encode(part) for part in parts]
    assert tokenizer.encode_parts(parts).tolist() == [i for ids in expected for i in ids]


@every_tokenizer
@settings(deadline=None)
@given(text=st.text(alphabet="a b\r\n\t.1'é汉²\x1c\u3000", max_size=60))
def test_pieces_give_the_ids_of_the_whole(tokenizer: Tokenizer, text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_module, "PIECE_CHARS", 3)
        pieces = tokenizer.pieces(text)
    assert "".join(pieces) == text
    ids = tokenizer.encode_parts(pieces)
    assert ids.tolist() == tokenizer.encode(text)


@every_tokenizer
def test_long_prose_is_cut_into_pieces(tokenizer: Tokenizer) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_module, "PIECE_CHARS", 10)
        assert max(map(len, tokenizer.pieces("Some words, and more.\nOf it. " * 20))) < 30


@every_tokenizer
def test_empty_text_has_no_ids(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("") == []
    assert tokenizer.encode_parts([]).shape == tokenizer.encode_parts([""]).shape == (0,)
    assert tokenizer.decode([]) == ""


@every_tokenizer
@pytest.mark.parametrize("text", [END_OF_TEXT, f"a{END_OF_TEXT}b", *RESERVED[:2]])
def test_text_like_a_special_token_stays_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert not set(ids) & set(tokenizer.special_tokens.values())
    assert tokenizer.decode(ids) == text


@every_tokenizer
def test_special_ids_come_last_and_decode_to_nothing(tokenizer: Tokenizer) -> None:
    assert list(tokenizer.special_tokens) == [END_OF_TEXT, *RESERVED]
    assert list(tokenizer.special_tokens.values()) == list(
        range(tokenizer.vocab_size - 17, tokenizer.vocab_size)
    )
    assert tokenizer.eot_id == tokenizer.special_tokens[END_OF_TEXT]
    assert tokenizer.decode([tokenizer.eot_id, *tokenizer.encode("a"), tokenizer.eot_id]) == "a"


@every_tokenizer
def test_token_bytes_spell_the_text(tokenizer: Tokenizer) -> None:
    token_bytes = tokenizer.token_bytes()
    assert len(token_bytes) == tokenizer.vocab_size
    text = SAMPLE[2]
    assert b"".join(token_bytes[i] for i in tokenizer.encode(text)) == text.encode()
    assert all(token_bytes[i] == b"" for i in tokenizer.special_tokens.values())


@every_tokenizer
def test_lone_surrogates_become_replacement_characters(tokenizer: Tokenizer) -> None:
    text = "a\ud800b\ud83d\ude42"
    assert tokenizer.decode(tokenizer.encode(text)) == "a\ufffdb🙂"
    assert tokenizer.encode_parts([text]).tolist() == tokenizer.encode(text)


@every_tokenizer
def test_bytes_cut_inside_a_character_decode_to_a_replacement(tokenizer: Tokenizer) -> None:
    ids = byte_tokenizer().encode("é")[:1]
    assert tokenizer.decode(ids) == "\ufffd"
    assert tokenizer.decode_bytes(ids) == "é".encode()[:1]


def test_byte_ids_are_the_bytes() -> None:
    tokenizer = byte_tokenizer()
    assert tokenizer.vocab_size == 273
    assert tokenizer.encode("aé") == [97, 0xC3, 0xA9]


def test_bpe_has_the_given_vocabulary_size() -> None:
    assert BPE.vocab_size == 600
    assert BPE.token_bytes()[:256] == [bytes([i]) for i in range(256)]


def test_bpe_of_a_tiny_text_is_smaller_than_its_limit() -> None:
    tokenizer = bpe_tokenizer(["abab"], vocab_size=1000)
    assert tokenizer.vocab_size == 256 + 1 + 17  # the one pair that occurs twice
    assert tokenizer.decode(tokenizer.encode("abab xyz")) == "abab xyz"


def test_bpe_without_text_is_the_bytes() -> None:
    assert bpe_tokenizer([], vocab_size=1000).vocab_size == 273


def test_bpe_refuses_a_vocabulary_below_the_bytes() -> None:
    with pytest.raises(ValueError, match=r"vocab_size=272 is not a whole number of at least 273"):
        bpe_tokenizer(["text"], vocab_size=272)


def test_bpe_training_is_deterministic() -> None:
    assert bpe_tokenizer(iter(SAMPLE), vocab_size=600) == BPE


@pytest.mark.parametrize("n", range(len(SAMPLE)))
def test_bpe_encodes_as_the_trainer_library(n: int) -> None:
    library = _train(SAMPLE, n_tokens=583)
    tokens, ours = _tokens(library), BPE.token_bytes()
    expected = [tokens[i] for i in library.encode(SAMPLE[n]).ids]
    assert [ours[i] for i in BPE.encode(SAMPLE[n])] == expected


def test_punctuation_takes_the_line_break_and_digits_stand_alone() -> None:
    tokenizer = bpe_tokenizer(["if x:\n        y(12)\n" * 10], vocab_size=400)
    tokens = [tokenizer.decode([i]) for i in tokenizer.encode("if x:\n        y(12)\n")]
    assert tokens == ["if", " x", ":\n", "       ", " y", "(", "1", "2", ")\n"]


def test_bpe_training_cuts_longer_words_alone() -> None:
    for n_chars in (MAX_WORD_CHARS - 200, 4 * MAX_WORD_CHARS):
        tokenizer = bpe_tokenizer(["ab" * (n_chars // 2), "ab" * (n_chars // 2)], 1000)
        longest = max(map(len, tokenizer.token_bytes()))
        assert longest == min(n_chars, MAX_WORD_CHARS)


@pytest.mark.parametrize("character", ["a", "中", "=", "\n", " ", "7"])
def test_bpe_is_trained_on_a_megabyte_without_a_break(character: str) -> None:
    text = character * 1_200_000  # minutes or hours where time is quadratic in it
    tokenizer = bpe_tokenizer([text], 300)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_bpe_encodes_a_megabyte_of_one_character() -> None:
    for character in (" ", "\n", "a", "1", "!"):
        text = character * 1_000_000 + "z"
        assert BPE.decode(BPE.encode(text)) == text


def test_gpt2_encodes_a_megabyte_of_one_character(gpt2: Tokenizer) -> None:
    for text in ("a" * 1_000_000, "中" * 300_000):
        assert gpt2.decode(gpt2.encode(text)) == text


def test_gpt2_encodes_as_tiktoken(gpt2: Tokenizer) -> None:
    reference = tiktoken.get_encoding("gpt2")
    for text in SAMPLE:
        assert gpt2.encode(text) == reference.encode_ordinary(text)
    assert (gpt2.vocab_size, gpt2.eot_id) == (reference.n_vocab, reference.eot_token)


@settings(deadline=None)
@given(text=st.text(alphabet="a b\r\n\t.1'é汉²\x1c\u3000", max_size=60))
def test_gpt2_pieces_give_the_ids_of_the_whole(gpt2: Tokenizer, text: str) -> None:
    test_pieces_give_the_ids_of_the_whole.hypothesis.inner_test(gpt2, text)


def test_gpt2_takes_a_longer_run_of_spaces_than_tiktoken(gpt2: Tokenizer) -> None:
    text = "a" + " " * (10 * LONGEST_SPACE) + "b"
    assert gpt2.decode(gpt2.encode(text)) == text


def test_gpt2_comes_back_from_its_record(gpt2: Tokenizer) -> None:
    assert from_record(gpt2.record()) == gpt2


def test_the_error_for_gpt2_without_its_table_names_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def unreachable(path: str) -> bytes:
        raise ConnectionError("no route")

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("tiktoken.load.read_file", unreachable)
    monkeypatch.delitem(tiktoken.registry.ENCODINGS, "gpt2", raising=False)
    with pytest.raises(FileNotFoundError) as error:
        gpt2_tokenizer()
    for word in (str(tmp_path), "TIKTOKEN_CACHE_DIR", "tokenizer bpe or byte"):
        assert word in str(error.value)


@every_tokenizer
def test_record_is_json_and_rebuilds_an_equal_tokenizer(tokenizer: Tokenizer) -> None:
    rebuilt = from_record(json.loads(json.dumps(tokenizer.record())))
    assert rebuilt == tokenizer
    assert rebuilt.fingerprint == tokenizer.fingerprint
    assert rebuilt.encode(SAMPLE[2]) == tokenizer.encode(SAMPLE[2])


def test_fingerprints_distinguish_tables() -> None:
    other = bpe_tokenizer(SAMPLE, vocab_size=599)
    fingerprints = {t.fingerprint for t in (*TOKENIZERS, other)}
    assert len(fingerprints) == 3
    assert all(len(f) == 16 and int(f, 16) >= 0 for f in fingerprints)


@every_tokenizer
def test_tokenizers_travel_between_processes(tokenizer: Tokenizer) -> None:
    tokenizer.encode("built")
    assert pickle.loads(pickle.dumps(tokenizer)).encode("a b") == tokenizer.encode("a b")


def _without(field: str) -> dict[str, object]:
    return {key: value for key, value in BPE.record().items() if key != field}


@pytest.mark.parametrize(
    "record",
    [
        None,
        [],
        {},
        *(_without(field) for field in BPE.record()),
        BPE.record() | {"kind": "sentencepiece"},
        BPE.record() | {"tokens": [1, 2]},
        BPE.record() | {"tokens": ["not base64!"]},
        BPE.record() | {"tokens": [base64.b64encode(b"ab").decode()]},
        BPE.record() | {"tokens": BPE.record()["tokens"] * 2},
        BPE.record() | {"special_tokens": []},
        BPE.record() | {"special_tokens": [END_OF_TEXT, END_OF_TEXT]},
        BPE.record() | {"special_tokens": [END_OF_TEXT, 7]},
        BPE.record() | {"pattern": "(unclosed"},
        BPE.record() | {"kind": "byte"},
    ],
)
def test_malformed_records_are_refused(record: object) -> None:
    with pytest.raises(ValueError, match=r"tokenizer's record is malformed \(.+\); use") as error:
        from_record(record)
    assert "\n" not in str(error.value)


def test_patterns_cover_every_character() -> None:
    """A pattern with a gap would drop text, as tiktoken keeps only what matches."""
    every_character = "".join(chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000)
    tokens = [bytes([i]) for i in range(256)]
    for pattern in (BPE_PATTERN, GPT2_PATTERN):
        tokenizer = Tokenizer("gap", pattern, tokens, [END_OF_TEXT])
        assert tokenizer.decode(tokenizer.encode(every_character)) == every_character


@pytest.mark.parametrize("tokenizer", [byte_tokenizer(), BPE])
def test_a_new_special_token_takes_the_first_reserved_id(tokenizer: Tokenizer) -> None:
    named = tokenizer.with_special_tokens(["<|user|>", "<|tool|>"])
    first = tokenizer.special_tokens[RESERVED[0]]
    assert named.special_tokens["<|user|>"] == first
    assert named.special_tokens["<|tool|>"] == first + 1
    assert named.vocab_size == tokenizer.vocab_size
    assert named.with_special_tokens(["<|tool|>"]) == named
    assert from_record(named.record()) == named


def test_without_reserved_ids_a_new_special_token_gets_a_new_id() -> None:
    tokens = [bytes([i]) for i in range(256)]
    tokenizer = Tokenizer("own", GPT2_PATTERN, tokens, [END_OF_TEXT])
    named = tokenizer.with_special_tokens(["<|user|>"])
    assert named.special_tokens == {END_OF_TEXT: 256, "<|user|>": 257}
    assert named.vocab_size == 258
