"""Tokenizers survive Hugging Face's files, and encode there as here."""

import json
import random
import unicodedata
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Library

from nanogpt.published import PublishedTokenizer
from nanogpt.tokenizer import (
    BPE_PATTERN,
    END_OF_TEXT,
    GPT2_PATTERN,
    Tokenizer,
    bpe_tokenizer,
    byte_tokenizer,
    from_record,
    gpt2_tokenizer,
)
from nanogpt.tokenizer_files import (
    GPT2_FINGERPRINT,
    LLAMA3_PATTERN,
    QWEN2_PATTERN,
    merges_of,
    read_tokenizer,
    write_tokenizer,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from transformers import AutoTokenizer

EDGES = [
    "",
    "\r\n\r\n  indented\r\n\tx",
    "a<|endoftext|>b <|reserved_3|>",
    "😀👩‍👩‍👧 naïve e\u0301 \u3000\u2028\u0085 \x00\x1f",
    "don't DON'T 'ſ it''s 1234567 ½ ٣٤",
    "def f():\n\n\n    return {1: 'x'}   \n",
    " " * 300 + "x" + "\n" * 50,
]


def small_bpe() -> Tokenizer:
    source = Path(__file__).read_text(encoding="utf-8")
    return bpe_tokenizer([source, "Grüße, 😀😀! " * 9], 500)


def gpt2() -> Tokenizer:
    try:
        return gpt2_tokenizer()
    except FileNotFoundError as error:
        pytest.skip(str(error))


MAKERS: dict[str, Callable[[], Tokenizer]] = {
    "byte": byte_tokenizer,
    "bpe": small_bpe,
    "gpt2": gpt2,
}
each_tokenizer = pytest.mark.parametrize("name", MAKERS)


@cache
def written(name: str, directory: Path) -> tuple[Tokenizer, Any, Path]:
    """Return a tokenizer, transformers' reading of its files, and where these lie."""
    tokenizer = MAKERS[name]()
    path = directory / f"tokenizer-{name}"
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "gpt2"}')
    write_tokenizer(tokenizer, path, block_size=64)
    return tokenizer, AutoTokenizer.from_pretrained(path), path


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizers")


def encoded(there: Any, text: str) -> list[int]:
    return list(there(text)["input_ids"])


@each_tokenizer
def test_transformers_encodes_awkward_texts_as_we_do(name: str, directory: Path) -> None:
    tokenizer, there, _ = written(name, directory)
    for text in EDGES:
        ids = tokenizer.encode(text)
        assert encoded(there, text) == ids, text
        assert there.decode(ids) == tokenizer.decode(ids) == text


def known(text: str) -> bool:
    """Whether every character is of Unicode 3.2: of the newest, libraries know different ones."""
    return all(unicodedata.ucd_3_2_0.category(c) != "Cn" for c in text)


@each_tokenizer
def test_transformers_encodes_any_text_as_we_do(name: str, directory: Path) -> None:
    tokenizer, there, _ = written(name, directory)

    @settings(max_examples=300, deadline=None)
    @given(st.text(st.characters(codec="utf-8"), max_size=60).filter(known))
    def check(text: str) -> None:
        assert encoded(there, text) == tokenizer.encode(text)

    check()


MIXED = [
    *(
        "😀",
        "👩‍👩‍👧",
        "🏳️‍🌈",
        "中文",
        "你好，世界。",
        "日本語",
        "العربية ١٢٣",
        "हिन्दी",
        "e\u0301",
        "\u0301",
        "\u200d",
    ),
    *(
        "def f(self):",
        "\treturn x",
        "    if (x != 0) {",
        ":\n        ",
        "\r\n",
        "\n\n",
        "\n",
        "\t\t",
    ),
    *(
        " ",
        "  ",
        "\u00a0",
        "\u3000",
        "\u2028",
        "\x85",
        "\x1c",
        "\x00",
        "\x07",
        "123",
        "4567.89",
        "½",
        "Ⅷ",
    ),
    *(
        "don't",
        "DON'T",
        "we'll",
        "THEY'RE",
        "'s",
        "''",
        "naïve",
        "Grüße",
        "İ",
        "word",
        "Hello",
        "foo_bar",
    ),
    *(
        "<|endoftext|>",
        "...",
        "——",
        "“quoted”",
        "$100",
        "a+b=c",
        "//",
        "{}",
        "();",
        "\\n",
        "🙂\n",
        "。\n",
        "`",
    ),
]


def mixed_lines(n_lines: int = 10_000) -> list[str]:
    choose = random.Random(0)
    return [
        "".join(choose.choices(MIXED, k=choose.randint(1, 6)))
        + chr(choose.randrange(0x300, 0xD800))
        for _ in range(n_lines)
    ]


def published_bpe(name: str, directory: Path) -> Tokenizer:
    """Return a tokenizer that the library trains with a published pattern and normalisation."""
    pattern = LLAMA3_PATTERN if name == "llama" else QWEN2_PATTERN
    library = Library(models.BPE(ignore_merges=name == "llama"))
    library.normalizer = None if name == "llama" else normalizers.NFC()
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1000, initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator([Path(__file__).read_text(encoding="utf-8")], trainer)
    library.add_special_tokens([END_OF_TEXT])
    directory.mkdir()
    library.save(str(directory / "tokenizer.json"))
    tokenizer = read_tokenizer(directory)
    assert tokenizer is not None
    return tokenizer


@pytest.mark.parametrize("name", ["bpe", "llama", "qwen"])
def test_transformers_gives_our_ids_of_ten_thousand_lines(name: str, tmp_path: Path) -> None:
    tokenizer = small_bpe() if name == "bpe" else published_bpe(name, tmp_path / "there")
    write_tokenizer(tokenizer, tmp_path, block_size=64)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    there = AutoTokenizer.from_pretrained(tmp_path)
    lines = mixed_lines()
    for line, ids in zip(lines, there(lines)["input_ids"], strict=True):
        assert tokenizer.encode(line) == ids, line


@each_tokenizer
def test_the_special_tokens_keep_their_ids_and_none_is_added(name: str, directory: Path) -> None:
    tokenizer, there, _ = written(name, directory)
    assert there.eos_token_id == there.bos_token_id == tokenizer.eot_id
    assert len(there) == tokenizer.vocab_size
    special_ids = there.convert_tokens_to_ids(list(tokenizer.special_tokens))
    assert special_ids == list(tokenizer.special_tokens.values())
    assert encoded(there, "x") == tokenizer.encode("x")


@each_tokenizer
def test_a_model_is_given_no_token_types(name: str, directory: Path) -> None:
    content = (written(name, directory)[2] / "tokenizer_config.json").read_text(encoding="utf-8")
    assert json.loads(content)["model_input_names"] == ["input_ids", "attention_mask"]


@each_tokenizer
def test_files_read_back_are_the_same_tokenizer(name: str, directory: Path) -> None:
    tokenizer, _, path = written(name, directory)
    there = read_tokenizer(path)
    assert there is not None
    assert there.fingerprint == tokenizer.fingerprint


@each_tokenizer
def test_the_names_of_turn_markers_come_back(name: str, tmp_path: Path) -> None:
    tokenizer = MAKERS[name]().with_special_tokens(["<|user|>", "<|assistant|>"])
    write_tokenizer(tokenizer, tmp_path, block_size=64)
    there = read_tokenizer(tmp_path)
    assert there is not None
    assert there.fingerprint == tokenizer.fingerprint


def test_gpt2_is_recognised_in_vocab_and_merges_alone(directory: Path, tmp_path: Path) -> None:
    tokenizer, _, path = written("gpt2", directory)
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((path / name).read_bytes())
    there = read_tokenizer(tmp_path)
    assert there is not None
    assert there.fingerprint == tokenizer.fingerprint == GPT2_FINGERPRINT
    assert there.name == "gpt2"


def test_what_transformers_saves_is_read_back(directory: Path, tmp_path: Path) -> None:
    tokenizer, there, _ = written("bpe", directory)
    there.save_pretrained(tmp_path)
    back = read_tokenizer(tmp_path)
    assert back is not None
    assert back.fingerprint == tokenizer.fingerprint


def test_a_directory_without_files_has_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text("{}")
    assert read_tokenizer(tmp_path) is None


def table(*merged: bytes) -> Tokenizer:
    tokens = [*(bytes([i]) for i in range(256)), *merged]
    return Tokenizer("bpe", GPT2_PATTERN, tokens, [END_OF_TEXT])


def test_merges_follow_from_the_table() -> None:
    merges = merges_of(table(b"he", b"lo", b"hel", b"hello", b"loh"))
    assert merges == [(b"h", b"e"), (b"l", b"o"), (b"he", b"l"), (b"hel", b"lo"), (b"lo", b"h")]


def test_a_table_that_no_merges_lead_to_is_refused() -> None:
    with pytest.raises(ValueError, match=r"b'abc' cannot be made by merging pairs"):
        merges_of(table(b"abc"))


def test_another_table_than_gpt2s_is_read_as_one_of_its_own(tmp_path: Path) -> None:
    write_tokenizer(table(b"he", b"ll"), tmp_path, block_size=8)
    (tmp_path / "tokenizer.json").unlink()
    there = read_tokenizer(tmp_path)
    assert there is not None
    assert (there.name, there.vocab_size) == ("bpe", 259)
    assert there.encode("hell") == [256, 257]


Change = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.pop("model"),
        lambda t: t["model"].update(type="Unigram"),
        lambda t: t.update(model={"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 0}),
        lambda t: t.update(normalizer={"type": "Lowercase"}),
        lambda t: t["pre_tokenizer"].update(type="Whitespace"),
        lambda t: t["pre_tokenizer"].update(add_prefix_space=True),
        lambda t: t["model"]["merges"].append("a b c"),
        lambda t: (t["model"]["vocab"].pop(END_OF_TEXT), t["added_tokens"].clear()),
    ],
)
def test_another_kind_of_tokenizer_is_refused_by_name(change: Change, tmp_path: Path) -> None:
    write_tokenizer(table(b"he", b"ll"), tmp_path, block_size=8)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content))
    message = r"tokenizer\.json cannot be read \(.+\); remove .* pass a byte-level BPE tokenizer"
    with pytest.raises(ValueError, match=message) as caught:
        read_tokenizer(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.update(normalizer={"type": "NFC"}),
        lambda t: t["pre_tokenizer"].update(use_regex=False),
        lambda t: t["model"]["merges"].reverse(),
        lambda t: t["model"]["merges"].pop(),
        lambda t: t["model"]["vocab"].update(zzz=999),
    ],
)
def test_another_byte_level_bpe_encodes_as_its_file(change: Change, tmp_path: Path) -> None:
    write_tokenizer(table(b"he", b"ll", b"hell"), tmp_path, block_size=8)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content))
    tokenizer = read_tokenizer(tmp_path)
    assert isinstance(tokenizer, PublishedTokenizer)
    library = Library.from_file(str(path))
    text = "shell hell\n\tello naïve 中文 🙂"
    assert tokenizer.encode(text) == library.encode(text).ids
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert from_record(json.loads(json.dumps(tokenizer.record()))) == tokenizer


def test_merges_in_another_order_than_the_table_encode_as_the_file(tmp_path: Path) -> None:
    write_tokenizer(table(b"he", b"el", b"hel"), tmp_path, block_size=8)
    merges = tmp_path / "merges.txt"
    merges.write_text(merges.read_text().replace("he l", "h el"))
    (tmp_path / "tokenizer.json").unlink()
    tokenizer = read_tokenizer(tmp_path)
    assert isinstance(tokenizer, PublishedTokenizer)
    assert tokenizer.encode("hel") == [256, 108]  # he, l


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff"])
def test_a_damaged_file_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read \(.*\); remove it"):
        read_tokenizer(tmp_path)


def test_a_template_lets_its_markers_be_special(tmp_path: Path) -> None:
    write_tokenizer(byte_tokenizer(), tmp_path, block_size=8, chat_template="{{ 1 }}")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    there = AutoTokenizer.from_pretrained(tmp_path)
    assert there.chat_template == "{{ 1 }}"
    assert encoded(there, "a<|endoftext|>") == [97, 256]


def test_our_own_pattern_travels(directory: Path) -> None:
    _, _, path = written("bpe", directory)
    content = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))
    assert content["pre_tokenizer"]["pretokenizers"][0]["pattern"] == {"Regex": BPE_PATTERN}
