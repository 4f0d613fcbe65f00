"""Labelled files of every kind, splits without copies across them, and batches of a step."""

import gzip
import hashlib
import logging
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn
from pydantic import ValidationError

from nanogpt.data.labelled import LabelledTexts
from nanogpt.data.labelled_module import Augmentation, LabelledDataModule, spell
from nanogpt.data.module import TokenizerChoice
from nanogpt.data.sms_spam import SmsSpam
from nanogpt.data.splits import Example, Splits, class_weights
from nanogpt.data.text import TextFiles
from nanogpt.tokenizer import BPE_PATTERN, END_OF_TEXT, Tokenizer, bpe_tokenizer, byte_tokenizer
from nanogpt.values import explain

Batch = dict[str, Any]
TOKENIZER = byte_tokenizer()
EXPECTED = [Example('one "hi"', "yes"), Example("go, now", "no")]


def read_examples(
    path: Path, text: str = "text", label: str = "label", *, skip_bad: bool = False
) -> list[Example]:
    return LabelledTexts(path, text, label, skip_bad=skip_bad).examples()


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8", newline="")
    return path


# Files


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("SMSSpamCollection", 'yes\tone "hi"\nno\tgo, now\n'),
        ("a.tsv", 'text\tlabel\r\none "hi"\tyes\r\ngo, now\tno\r\n'),
        ("b.tsv", 'id\tlabel\ttext\n1\tyes\tone "hi"\n\n2\tno\tgo, now'),
        ("a.csv", 'label,text\nyes,"one ""hi"""\nno,"go, now"\n'),
        (
            "a.jsonl",
            '{"text": "one \\"hi\\"", "label": "yes"}\n\n{"label": "no", "text": "go, now"}',
        ),
    ],
)
def test_every_kind_of_file_gives_the_same_examples(name: str, text: str, tmp_path: Path) -> None:
    assert read_examples(written(tmp_path / name, text)) == EXPECTED


def test_a_lone_quote_in_tsv_is_text(tmp_path: Path) -> None:
    path = written(tmp_path / "a.tsv", 'ham\t"Open\nspam\tquote\n')
    assert [e.text for e in read_examples(path)] == ['"Open', "quote"]


def test_a_csv_cell_may_span_lines(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", 'text,label\n"one\ntwo",x\n')
    assert read_examples(path) == [Example("one\ntwo", "x")]


def test_columns_are_named(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", "body,topic\nhello,greeting\n")
    assert read_examples(path, "body", "topic") == [Example("hello", "greeting")]


def test_labels_may_be_whole_numbers_and_truth_values(tmp_path: Path) -> None:
    lines = '{"text": "a", "label": 1}\n{"text": "b", "label": true}\n'
    assert [e.label for e in read_examples(written(tmp_path / "a.jsonl", lines))] == ["1", "true"]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.csv", "text,label\na,x\n,y\n", r"a\.csv, line 3 has no text"),
        ("a.csv", "text,label\na,x\nb\n", r"a\.csv, line 3 has 1 cells and 2 are expected"),
        ("a.csv", "text,topic\na,x\n", r"no column 'label' .*text, topic"),
        ("a.csv", 'text,label\n"a"b,x\n', r"a\.csv, line 2 is not CSV"),
        ("a.csv", "", r"no column 'text'"),
        ("a.tsv", "x\ta\ny\n", r"a\.tsv, line 2 has 1 cells and 2 are expected"),
        ("a.tsv", "1\tx\ta\n", r"a\.tsv has no column 'text'"),
        ("a.tsv", "x\ta\n\ty\n", r"a\.tsv, line 2 has no label"),
        ("a.tsv", "\n\n", r"a\.tsv has no"),
        ("a.jsonl", '{"text": "a"}\n', r"a\.jsonl, line 1 has no label under 'label'"),
        ("a.jsonl", '{"text": "a", "label": 0.5}\n', r"a\.jsonl, line 1 has no label"),
        (
            "a.jsonl",
            '{"text": "a", "label": "\\ud800"}\n',
            r"line 1 has no label .*ud800",
        ),
        ("a.jsonl", '{"text": null, "label": "x"}\n', r"a\.jsonl, line 1 has no text"),
        ("a.jsonl", "[1]\n", r"a\.jsonl, line 1 has no text .* not an object"),
        ("a.jsonl", "{\n", r"a\.jsonl, line 1 is not JSON \("),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(
    name: str, text: str, expected: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=expected) as error:
        read_examples(written(tmp_path / name, text))
    assert "\n" not in str(error.value)


def test_bytes_that_are_no_utf8_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_bytes(b"ham\tcaf\xe9\n")
    with pytest.raises(ValueError, match="is not UTF-8"):
        read_examples(path)


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_a_file_in_latin_1_is_named_with_line_byte_and_remedy(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    rows = ["text,label", "caf\u00e9,x", '"two\nna\u00efve",x', "plain,y"]
    text = "\n".join(rows) if name == "a.csv" else "\n".join(["ham\tok", "ham\tcaf\u00e9"])
    path.write_bytes(text.encode("latin-1"))
    found = r"line 2 is not UTF-8 at byte \d+ \(0xe9\); .* convert it with iconv -f ENC"
    with pytest.raises(ValueError, match=found):
        read_examples(path)
    read = read_examples(path, skip_bad=True)
    assert read == [Example("plain", "y") if name == "a.csv" else Example("ok", "ham")]


@pytest.mark.parametrize(
    ("name", "data", "found"),
    [
        (
            "a.csv",
            gzip.compress(b"text,label\n", mtime=0),
            r"line 1 is not UTF-8 at byte 1 \(0x8b\); unpack it",
        ),
        ("a.csv.gz", gzip.compress(b"text,label\n", mtime=0), "unpack it"),
        ("a.tsv", "ham\tok".encode("utf-16"), r"is not UTF-8 at byte 0 .*iconv -f ENCODING"),
        ("a.csv", b"PK\x03\x04\n", "no column 'text'"),
    ],
)
def test_another_format_is_named_and_never_skipped(
    name: str, data: bytes, found: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(data)
    for skip_bad in (False, True):
        with pytest.raises(ValueError, match=found):
            read_examples(tmp_path / name, skip_bad=skip_bad)


def test_a_header_in_latin_1_is_refused_in_a_sentence_that_can_be_printed(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"text,cat\xe9gorie\na,b\n")
    with pytest.raises(ValueError, match="line 1 is not UTF-8") as error:
        read_examples(tmp_path / "a.csv")
    assert str(error.value).encode()


def test_a_quote_without_an_end_is_never_skipped(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", 'text,label\na,x\n"b,y\nc,z\n')
    for skip_bad in (False, True):
        with pytest.raises(ValueError, match="line 3 opens a quote that ends nowhere up to line 4"):
            read_examples(path, skip_bad=skip_bad)


def test_the_first_ten_bad_rows_are_listed_at_once(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", "text,label\n" + ",x\ngood,y\nb\n" * 6)
    with pytest.raises(ValueError, match=r"a\.csv, line 2 has no text") as error:
        read_examples(path)
    text = str(error.value)
    assert [f"line {n} has" in text for n in (2, 4, 5, 7, 8, 10, 11, 13, 14, 16)] == [True] * 10
    assert "line 17" not in text
    assert "and 2 more; correct it" in text
    assert text.count("data.skip_bad=true") == 1
    assert "\n" not in text


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.tsv", "x\tone\n\tno label\ny\ttwo\textra\ny\ttwo\n"),
        ("a.csv", 'text,label\none,x\n"a"b,x\n,y\ntwo,y\n'),
        ("a.jsonl", '{"text": "one", "label": "x"}\n{\n[1]\n{"text": "two", "label": "y"}\n'),
    ],
)
def test_bad_rows_can_be_left_out(
    name: str, text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = written(tmp_path / name, text)
    with caplog.at_level(logging.INFO):
        found = LabelledTexts(path, skip_bad=True).examples()
    assert found == [Example("one", "x"), Example("two", "y")]
    assert "2 records that cannot be read were left out" in caplog.text
    with pytest.raises(ValueError, match=r", line \d .*; line \d "):
        LabelledTexts(path).examples()


def test_the_error_for_a_missing_file_names_what_to_pass(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="pass a labelled"):
        read_examples(tmp_path / "nothing.tsv")


def test_the_error_without_a_path_names_what_to_pass() -> None:
    with pytest.raises(ValueError, match=r"data=labelled needs data\.path="):
        LabelledTexts().examples()


def test_spam_comes_from_the_file(tmp_path: Path) -> None:
    path = written(tmp_path / "SMSSpamCollection", 'ham\t"Ok\nspam\tWIN\n')
    assert SmsSpam(path).examples() == [Example('"Ok', "ham"), Example("WIN", "spam")]


def test_to_other_stages_labelled_texts_are_documents(tmp_path: Path) -> None:
    path = written(tmp_path / "a.tsv", "x\tone\ny\ttwo\n")
    assert list(LabelledTexts(path).documents()) == ["one", "two"]
    assert list(SmsSpam(path).documents(skip=1)) == ["two"]
    before = LabelledTexts(path).fingerprint()
    assert LabelledTexts(written(path, "x\tone\ny\tthree\n")).fingerprint() != before


def test_the_error_without_the_spam_data_names_what_to_pass(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match=r"pass data\.path=<the file SMSSpamCollection"):
        SmsSpam().examples()


# Splits


def made_up(**counts: int) -> list[Example]:
    return [Example(f"{label} {i}", label) for label, n in counts.items() for i in range(n)]


def by_label(examples: list[Example]) -> dict[str, int]:
    return dict(Counter(example.label for example in examples))


def splits_of(examples: list[Example], **options: Any) -> Any:
    class Given(LabelledTexts):
        def examples(self) -> list[Example]:
            return examples

    return Given(**options).splits()


def test_every_class_is_split_in_proportion() -> None:
    splits = splits_of(made_up(a=100, b=50, c=20))
    assert by_label(splits.test) == {"a": 20, "b": 10, "c": 4}
    assert by_label(splits.val) == {"a": 10, "b": 5, "c": 2}
    assert by_label(splits.train) == {"a": 70, "b": 35, "c": 14}
    assert splits.labels == ["a", "b", "c"]
    assert splits.rest == []


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ("10 2 0", "0 2 10"),
        ("1.5 10 -2 +1", "-2 +1 1.5 10"),
        ("01 1 0 10 2", "0 01 1 2 10"),
        ("1e3 20 .5", ".5 20 1e3"),
        ("10 2 x", "10 2 x"),
        ("10 2 nan", "10 2 nan"),
        ("1_0 2", "1_0 2"),
    ],
)
def test_labels_are_sorted_by_value_where_all_are_numbers(labels: str, expected: str) -> None:
    examples = [Example(f"{label} {i}", label) for label in labels.split() for i in range(10)]
    assert splits_of(examples).labels == expected.split()


def test_the_numbers_of_the_classes_are_part_of_the_fingerprint() -> None:
    digits = splits_of([Example(f"{i} {j}", str(i)) for i in range(11) for j in range(10)])
    by_text = hashlib.sha256(repr(digits.hashes()).encode()).hexdigest()[:16]
    assert digits.fingerprint != by_text  # a checkpoint with the classes in another order
    names = splits_of(made_up(a=10, b=10))
    assert names.fingerprint == hashlib.sha256(repr(names.hashes()).encode()).hexdigest()[:16]


def test_balancing_leaves_over_what_the_larger_classes_have_more() -> None:
    examples = made_up(a=100, b=30)
    splits = splits_of(examples, balance=True)
    assert by_label(splits.train + splits.val + splits.test) == {"a": 30, "b": 30}
    assert by_label(splits.rest) == {"a": 70}
    assert by_label(splits.test + splits.rest) == {"a": 76, "b": 6}
    assert sorted(e.text for part in vars(splits).values() for e in part) == sorted(
        e.text for e in examples
    )


def test_text_sets_number_the_classes() -> None:
    splits = splits_of(made_up(a=20, b=10), balance=True)
    sets = splits.text_sets()
    assert sets.keys() == {"train", "test", "imbalanced"}
    assert all((text[0] == "b") == number for text, number in zip(*sets["test"], strict=True))
    assert len(sets["imbalanced"][0]) == 14
    assert "imbalanced" not in splits_of(made_up(a=20, b=10)).text_sets()


def test_a_summary_has_the_size_and_the_hash_of_every_split() -> None:
    facts = splits_of(made_up(a=20, b=10)).facts()
    assert facts["splits"] == {"train": 21, "val": 3, "test": 6}
    assert facts["split_hashes"].keys() == facts["splits"].keys()


def test_copies_of_a_text_stay_together() -> None:
    examples = [
        Example(f"{'Text' if j else ' text'}  {i} ", "ab"[i % 2])
        for i in range(60)
        for j in range(3)
    ]
    splits = splits_of(examples, balance=True)
    texts = [{" ".join(e.text.lower().split()) for e in part} for part in vars(splits).values()]
    assert sum(map(len, texts)) == len(set.union(*texts)) == 60


def test_the_seed_makes_the_splits() -> None:
    examples = made_up(a=40, b=40)
    one, again, other = (splits_of(examples, split_seed=seed) for seed in (0, 0, 1))
    assert one == again
    assert one.fingerprint != other.fingerprint
    assert one.hashes().keys() == {"train", "val", "test"}


def test_the_order_of_the_file_is_no_part_of_a_hash() -> None:
    splits = splits_of(made_up(a=40, b=40))
    turned = type(splits)(splits.train[::-1], splits.val, splits.test, [])
    assert turned.hashes() == splits.hashes()


def test_fewer_examples_keep_the_proportions() -> None:
    splits = splits_of(made_up(a=400, b=200), max_examples=90)
    assert by_label(splits.train + splits.val + splits.test) == {"a": 60, "b": 30}


def test_weights_make_the_classes_equal_and_the_mean_one() -> None:
    examples = made_up(a=30, b=10)
    weights = class_weights(examples, ["a", "b"])
    assert weights == pytest.approx([2 / 3, 2])
    assert 30 * weights[0] + 10 * weights[1] == pytest.approx(40)


@pytest.mark.parametrize(
    ("examples", "options", "expected"),
    [
        (made_up(a=100, b=2), {}, r"class 'b' has 2 examples.* 0 to test"),
        (made_up(a=9, b=2, c=1), {}, r"class 'b' has 2 .*class 'c' has 1 .*add examples of them"),
        (
            made_up(a=9, **{f"r{i:02}": 1 for i in range(12)}),
            {},
            r"class 'r09' has.*; and 2 more; add",
        ),
        (made_up(a=100), {}, "only one class, 'a'"),
        (made_up(a=9, b=9), {"val_fraction": 0.5, "test_fraction": 0.5}, "nothing to train on"),
    ],
)
def test_splits_that_cannot_be_are_one_sentence(
    examples: list[Example], options: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ValueError, match=expected):
        splits_of(examples, **options)


# Batches

BLOCK_SIZE = 12
NO_AUGMENTATION, HALF = Augmentation(), Augmentation(recase=0.5, token_split=0.5, token_dropout=0.5)


class InMemory(LabelledTexts):
    """Examples that are split already."""

    def __init__(self, splits: Splits) -> None:
        object.__setattr__(self, "_splits", splits)

    def splits(self) -> Splits:
        splits: Splits = vars(self)["_splits"]
        return splits


def module(
    *,
    rows: int = 8,
    micro_batch: int = 8,
    augmentation: Augmentation = NO_AUGMENTATION,
    val_tokens: int | None = None,
    **trainer: Any,
) -> LabelledDataModule:
    splits = splits_of([Example("x" * (i % 9 + 1) + str(i), "ab"[i % 2]) for i in range(60)])
    built = LabelledDataModule(
        source=InMemory(splits),
        **vars(augmentation),
        block_size=BLOCK_SIZE,
        tokens_per_step=rows * BLOCK_SIZE,
        seed=5,
        val_tokens=val_tokens,
    )
    built.use_tokenizer(TokenizerChoice.from_tokenizer(TOKENIZER))
    built.train_texts.weights[:] = np.array([1.0, 3.0])[built.train_texts.labels]
    built.micro_batch = micro_batch
    values = {"global_step": 0, "max_steps": 3, "global_rank": 0, "world_size": 1} | trainer
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    state = SimpleNamespace(fn=TrainerFn.FITTING)
    built.trainer = SimpleNamespace(**values, strategy=strategy, state=state)  # type: ignore[assignment]
    return built


def texts_of(batches: list[Batch]) -> list[tuple[tuple[int, ...], int]]:
    return [
        (tuple(ids[:n].tolist()), int(label))
        for batch in batches
        for ids, n, label in zip(batch["input_ids"], batch["lengths"], batch["labels"], strict=True)
    ]


def seeds_of(batches: list[Batch]) -> list[tuple[int, tuple[int, ...]]]:
    """Return each row's seed, with its ids."""
    seeds = [seed for batch in batches for seed in batch["row_seeds"].tolist()]
    return sorted(zip(seeds, (ids for ids, _ in texts_of(batches)), strict=True))


def test_a_micro_batch_is_as_wide_as_its_longest_text() -> None:
    for step in module(micro_batch=2).train_dataloader():
        for batch in step:
            assert batch["input_ids"].shape == (2, int(batch["lengths"].max()))


def test_a_pass_sees_every_training_text_once() -> None:
    built = module(rows=21, micro_batch=21, max_steps=2)
    seen = [text for step in built.train_dataloader() for text in texts_of(step)]
    texts = built.train_texts
    assert sorted(seen) == sorted(
        (tuple(row.tolist()), int(label))
        for row, label in zip(texts.rows, texts.labels, strict=True)
    )


@pytest.mark.parametrize("augmentation", [NO_AUGMENTATION, HALF])
@pytest.mark.parametrize(("micro_batch", "world_size"), [(8, 1), (2, 1), (1, 4), (4, 2)])
def test_no_split_of_a_step_changes_what_it_sees(
    micro_batch: int, world_size: int, augmentation: Augmentation
) -> None:
    whole = list(module(augmentation=augmentation).train_dataloader())
    ranks = [
        list(
            module(
                augmentation=augmentation,
                micro_batch=micro_batch,
                world_size=world_size,
                global_rank=rank,
            ).train_dataloader()
        )
        for rank in range(world_size)
    ]
    for step, parts in zip(whole, zip(*ranks, strict=True), strict=True):
        batches = [batch for part in parts for batch in part]
        assert sorted(texts_of(step)) == sorted(texts_of(batches))
        assert seeds_of(step) == seeds_of(batches)
        assert {b["step_targets"] for b in batches} == {step[0]["step_targets"]}
        assert {b["step_tokens"] for b in batches} == {step[0]["step_tokens"]}


def test_a_continued_run_sees_the_steps_that_are_left() -> None:
    whole = list(module(augmentation=HALF).train_dataloader())
    rest = list(module(augmentation=HALF, global_step=2).train_dataloader())
    assert [texts_of(step) for step in rest] == [texts_of(whole[2])]


def test_a_step_counts_its_weights_and_its_next_tokens() -> None:
    for step in module(micro_batch=4).train_dataloader():
        texts = texts_of(step)
        assert step[0]["step_targets"] == sum([1.0, 3.0][label] for _, label in texts)
        assert step[0]["step_tokens"] == sum(len(ids) - 1 for ids, _ in texts)


def test_token_dropout_leaves_out_its_share_and_keeps_both_ends() -> None:
    whole = {ids for ids, _ in texts_of(next(iter(module().train_dataloader())))}
    thinned = [
        ids
        for step in module(
            augmentation=Augmentation(token_dropout=0.5), max_steps=200
        ).train_dataloader()
        for ids, _ in texts_of(step)
    ]
    eot = TOKENIZER.eot_id
    assert all(ids[0] == eot and ids[-1] == eot for ids in thinned)
    inner = np.mean([len(ids) - 2 for ids in thinned])
    before = np.mean([len(row) - 2 for row in module().train_texts.rows])
    assert inner / before == pytest.approx(0.5, abs=0.03)
    assert not whole & set(thinned[:2])


def test_recasing_changes_its_share_to_small_and_to_capital_letters() -> None:
    augmentation = Augmentation(recase=0.4)
    assert augmentation.variants(["One Two", "Three"]) == [
        ["One Two", "Three"],
        ["one two", "three"],
        ["ONE TWO", "THREE"],
    ]
    rows = [np.array([0, i, 0]) for i in range(3)]
    table = spell(TOKENIZER)
    drawn = Counter(
        int(augmentation.apply(rows, (0, step, 0), table, BLOCK_SIZE)[1]) for step in range(2000)
    )
    assert drawn[0] / 2000 == pytest.approx(0.6, abs=0.05)
    assert drawn[1] / 2000 == pytest.approx(0.2, abs=0.05)


MERGED = bpe_tokenizer(["win now"] * 9, 300)  # "win" and " now" are a token each
EOT = MERGED.eot_id


def spelled(token_split: float, step: int = 0, block_size: int = 100) -> list[int]:
    ids = np.array([EOT, *MERGED.encode("win now now"), EOT])
    assert len(ids) == 5
    augmentation = Augmentation(token_split=token_split)
    return augmentation.apply([ids], (0, step, 0), spell(MERGED), block_size).tolist()


def test_a_split_token_is_spelled_by_the_ids_of_its_bytes() -> None:
    assert spelled(1.0) == [EOT, *b"win now now", EOT]


def test_tokens_are_split_in_their_share_and_keep_the_text() -> None:
    rows = [spelled(0.25, step) for step in range(500)]
    assert {MERGED.decode(row) for row in rows} == {"win now now"}
    assert np.mean([row[1] < 256 for row in rows]) == pytest.approx(0.25, abs=0.06)
    assert rows == [spelled(0.25, step) for step in range(500)]


def test_a_text_too_long_when_split_keeps_its_end() -> None:
    assert spelled(1.0, block_size=6) == [EOT, *b"win ", EOT]


def test_tokens_of_a_table_in_any_order_are_split() -> None:
    letters = [bytes([i]) for i in reversed(range(256))]
    tokenizer = Tokenizer("other", BPE_PATTERN, [*letters, b"ab"], [END_OF_TEXT])
    row, table = np.array([257, 256, 257]), spell(tokenizer)
    found = Augmentation(token_split=1.0).apply([row], (0, 0, 0), table, 9)
    assert found.tolist() == [257, 255 - 97, 255 - 98, 257]


@pytest.mark.parametrize("values", [{"recase": 1.5}, {"token_split": -1}, {"token_dropout": 1.0}])
def test_augmentation_that_cannot_be_is_refused(values: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match=next(iter(values))):
        module(augmentation=Augmentation(**values))


def test_a_rank_without_validation_texts_has_a_batch_that_scores_nothing() -> None:
    loader = module(val_tokens=BLOCK_SIZE, global_rank=1, world_size=2).val_dataloader()
    (batch,) = loader
    assert batch["labels"].tolist() == [-100]
    assert batch["input_ids"].shape == (1, int(batch["lengths"].max()))


def test_a_part_of_validation_has_every_class() -> None:
    (batch,) = module(val_tokens=2 * BLOCK_SIZE).val_dataloader()
    assert sorted(batch["labels"].tolist()) == [0, 1]


def test_classification_needs_labelled_texts(tmp_path: Path) -> None:
    with pytest.raises(ValidationError) as error:
        LabelledDataModule(source=TextFiles(tmp_path), block_size=8, tokens_per_step=8, seed=0)
    sentence = "data=text has no labels for stage=classify; pass data=sms_spam"
    assert explain(error.value, "data").startswith(sentence)


def test_class_weights_balance_the_classes() -> None:
    splits = splits_of([Example(str(i), "ab"[i % 4 == 0]) for i in range(60)])
    options: dict[str, Any] = {"block_size": 8, "tokens_per_step": 8, "seed": 0}
    for weighted in (False, True):
        built = LabelledDataModule(source=InMemory(splits), class_weights=weighted, **options)
        built.use_tokenizer(TokenizerChoice.from_tokenizer(TOKENIZER))
        assert built.labels == ["a", "b"]
        assert built.weights == (
            class_weights(splits.train, built.labels) if weighted else [1.0, 1.0]
        )
        assert built.fingerprint == splits.fingerprint
        assert built.facts() == splits.facts()


def test_validation_scores_every_text_once_over_all_ranks() -> None:
    built = module()
    shares = [
        texts_of(list(module(global_rank=rank, world_size=2).val_dataloader())) for rank in (0, 1)
    ]
    assert sorted(shares[0] + shares[1]) == sorted(
        (tuple(row.tolist()), int(label))
        for row, label in zip(built.val_texts.rows, built.val_texts.labels, strict=True)
    )


def test_long_texts_are_cut_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    splits = splits_of(
        [Example(f"{i:02}" + "x" * 20 * (i % 2), "ab"[i % 4 // 2]) for i in range(40)]
    )
    with caplog.at_level("INFO", logger="nanogpt"):
        built = LabelledDataModule(
            source=InMemory(splits), block_size=BLOCK_SIZE, tokens_per_step=BLOCK_SIZE, seed=0
        )
        built.use_tokenizer(TokenizerChoice.from_tokenizer(TOKENIZER))
    n_long = sum(len(e.text) > 10 for e in splits.train + splits.val)
    assert f"{n_long} of 32 texts cut to block_size=12 tokens" in caplog.text
    assert max(len(row) for row in built.train_texts.rows) == BLOCK_SIZE
