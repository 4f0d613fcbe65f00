"""Conversations from files: the records that are read or refused, and their splits."""

import json
import logging
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from nanogpt.data.dolly import FILE, Dolly
from nanogpt.data.instruction_module import InstructionDataModule, pack_conversations
from nanogpt.data.instructions import Instructions, conversation
from nanogpt.data.module import TokenizerChoice
from nanogpt.data.text import TextFiles
from nanogpt.data.windows import Rows
from nanogpt.prompts import Message, find_template
from nanogpt.tokenizer import byte_tokenizer, gpt2_tokenizer
from tests import hub_server
from tests.hub_server import Hub

CHAT = find_template("chat")
BYTES = byte_tokenizer().with_special_tokens(CHAT.special_tokens)
SUM = (Message("user", "Add.", "2 and 3"), Message("assistant", "5"))


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def numbered(n: int) -> list[dict[str, str]]:
    return [{"instruction": f"Double {i}.", "response": f"It is {2 * i}."} for i in range(n)]


def module(source: Any, **options: Any) -> InstructionDataModule:
    return InstructionDataModule(
        **{"source": source, "template": "chat", "block_size": 64, "tokens_per_step": 64}
        | {"seed": 0}
        | options
    )


def packed(path: Path, **options: Any) -> InstructionDataModule:
    data = module(Instructions(path), **options)
    data.use_tokenizer(TokenizerChoice.from_tokenizer(BYTES))
    return data


def targets_of(rows: Rows) -> np.ndarray:
    """Return all targets of the rows (N, T)."""
    targets: np.ndarray = rows.batch(np.arange(len(rows)))["targets"].numpy()
    return targets


@pytest.mark.parametrize(
    "record",
    [
        {"instruction": "Add.", "context": "2 and 3", "response": "5", "category": "sums"},
        {"instruction": "Add.", "input": "2 and 3", "output": "5"},
        {"instruction": " Add.\n", "input": "2 and 3", "context": None, "output": "5 "},
    ],
)
def test_dollys_and_alpacas_names_are_one(record: dict[str, Any]) -> None:
    assert conversation(record) == SUM


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Add.", "context": "2 and 3", "completion": " 5"},
        {"question": "Add.", "input": "2 and 3", "answer": " 5\n"},
        {"messages": None, "question": "Add.", "input": "2 and 3", "output": None, "answer": " 5"},
    ],
)
def test_prompts_and_questions_are_instructions(record: dict[str, Any]) -> None:
    question, answer = SUM
    assert conversation(record) == (question, Message("assistant", f" {answer.content}"))


@pytest.mark.parametrize("key", ["conversations", "conversation"])
def test_sharegpts_turns_are_messages(key: str) -> None:
    turns = [
        ("system", "Be brief."),
        ("human", "Hi"),
        ("gpt", "Hello"),
        ("human", "?"),
        ("gpt", "!"),
    ]
    expected = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "?")]
    record = {key: [{"from": role, "value": text, "weight": 1} for role, text in turns]}
    assert conversation(record) == tuple(Message(*m) for m in [*expected, ("assistant", "!")])


def test_prompt_and_completion_may_be_messages() -> None:
    record = {
        "prompt": [{"role": "user", "content": "Hi"}],
        "completion": [{"role": "assistant", "content": "Hello"}],
    }
    assert conversation(record) == (Message("user", "Hi"), Message("assistant", "Hello"))


@pytest.mark.parametrize("indentation", ["    ", "\t", " ", "\u3000"])
@pytest.mark.parametrize("template", ["chat", "alpaca"])
def test_the_indentation_of_a_response_is_taught(
    indentation: str, template: str, tmp_path: Path
) -> None:
    reply = f"{indentation}for x in xs:\n{indentation * 2}print(x)"
    talk = [
        {"role": "user", "content": " Loop. "},
        {"role": "assistant", "content": f"\n{reply}\n"},
    ]
    for record in ({"instruction": "Loop.", "response": f"\r\n{reply} \n"}, {"messages": talk}):
        one = conversation(record)
        assert one == (Message("user", "Loop."), Message("assistant", reply))
        ids, is_response = find_template(template).encode(BYTES, one)
        taught = [i for i, response in zip(ids, is_response, strict=True) if response]
        assert BYTES.decode(taught) == reply


def test_messages_are_taken_as_they_are() -> None:
    prompt = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "?")]
    talk = [Message(*message) for message in [*prompt, ("assistant", "!")]]
    assert conversation({"messages": [vars(message) for message in talk]}) == tuple(talk)


@pytest.mark.parametrize("name", ["own.jsonl", "own.json"])
def test_json_lines_and_an_array_give_the_same(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, numbered(5))
    if name.endswith(".json"):
        path.write_text(json.dumps(numbered(5), indent=2))
    read = Instructions(path).conversations
    assert read[3] == (Message("user", "Double 3."), Message("assistant", "It is 6."))
    assert len(read) == 5


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("{", "line 2 is not JSON"),
        ("[1]", "line 2 is no JSON object"),
        ('{"instruction": "Hi"}', "line 2 has no text under 'response'"),
        ('{"instruction": " ", "output": "x"}', "line 2 has no text under 'instruction'"),
        ('{"instruction": 5, "output": "x"}', "line 2 has no text under 'instruction' .5 is there"),
        (
            '{"instruction": null, "output": "x"}',
            r"'instruction' \(null is there\); write .* messages",
        ),
        ('{"text": "Hi"}', r"under 'instruction' \(it has text\); write instruction and"),
        (
            '{"prompt": "Hi", "completion": ["x"]}',
            r"has no text under 'completion' \(\[\"x\"\] is there",
        ),
        (
            '{"messages": [{"role": "assistant", "content": null}]}',
            r"has no text under 'content' \(null is there\)",
        ),
        ('{"messages": [{"role": "tool", "content": "x"}]}', "role 'tool'; let it be one of syst"),
        ('{"messages": [{"role": ["user"], "content": "x"}]}', "of role .'user'"),
        ('{"conversations": [{"from": "human", "value": "x"}]}', "conversations that do not end"),
        ('{"messages": "Hi"}', "line 2 has messages that are no list"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "do not end with one of the assist"),
        ('{"messages": [{"role": "bot", "content": "x"}]}', "role 'bot'"),
    ],
)
def test_a_bad_record_is_named_by_file_and_line(line: str, found: str, tmp_path: Path) -> None:
    good = json.dumps(numbered(1)[0])
    path = tmp_path / "own.jsonl"
    path.write_text(f"{good}\n{line}\n")
    with pytest.raises(ValueError, match=found) as error:
        _ = Instructions(path).conversations
    assert str(error.value).startswith(str(path))
    assert "data.skip_bad=true" in str(error.value)


def test_bad_records_can_be_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "own.jsonl", [*numbered(3), {"text": "?"}, 7])
    with pytest.raises(ValueError, match=r"line 4 has .*; line 5 is no JSON object but 7"):
        _ = Instructions(path).conversations
    with caplog.at_level(logging.INFO):
        assert len(Instructions(path, skip_bad=True).conversations) == 3
    assert "2 records that cannot be read were left out" in caplog.text


@pytest.mark.parametrize(
    ("path", "error", "found"),
    [
        (None, ValueError, "needs data.path="),
        ("nowhere.jsonl", FileNotFoundError, "nowhere.jsonl is no file"),
        (__file__, FileNotFoundError, "is no file that ends in .jsonl or .json"),
    ],
)
def test_a_path_that_is_no_such_file_is_refused(
    path: str | None, error: type[Exception], found: str
) -> None:
    with pytest.raises(error, match=found):
        Instructions(path).splits()


def test_one_conversation_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "own.jsonl", numbered(1) * 9)
    with pytest.raises(ValueError, match="has 9 conversations and needs two that differ"):
        Instructions(path).splits()


def test_copies_are_never_in_both_splits(tmp_path: Path) -> None:
    path = write(tmp_path / "own.jsonl", numbered(40) * 3)
    splits = Instructions(path, val_fraction=0.3).splits()
    assert len(splits["train"]) + len(splits["val"]) == 120
    assert splits["val"]
    assert not set(splits["train"]) & set(splits["val"])


def test_other_conversations_leave_one_in_its_split(tmp_path: Path) -> None:
    few = Instructions(write(tmp_path / "few.jsonl", numbered(40)), val_fraction=0.3).splits()
    more = Instructions(write(tmp_path / "more.jsonl", numbered(80)), val_fraction=0.3).splits()
    assert set(few["train"]) < set(more["train"])
    assert set(few["val"]) < set(more["val"])


def test_max_examples_takes_the_first(tmp_path: Path) -> None:
    path = write(tmp_path / "own.jsonl", [*numbered(5), "never looked at"])
    assert len(Instructions(path, max_examples=5).conversations) == 5


def test_responses_and_their_ends_are_the_targets(tmp_path: Path) -> None:
    targets = targets_of(packed(write(tmp_path / "own.jsonl", numbered(20))).train_rows)
    learnt = BYTES.decode(targets[targets != -100]).split("It is ")[1:]
    assert sorted(learnt) == sorted(
        c[1].content[6:] for c in Instructions(tmp_path / "own.jsonl").splits()["train"]
    )
    assert (targets == BYTES.eot_id).sum() == len(learnt)


def test_the_loss_can_be_on_all_tokens_and_validation_stays_on_responses(tmp_path: Path) -> None:
    path = write(tmp_path / "own.jsonl", numbered(20))
    responses, all_ = packed(path), packed(path, loss_on="all")
    counts = [(targets_of(data.train_rows) != -100).sum() for data in (responses, all_)]
    facts = all_.facts()["splits"]["train"]
    assert counts[1] == facts["tokens"] - facts["examples"] > counts[0]
    assert (targets_of(responses.val_rows) == targets_of(all_.val_rows)).all()


def test_long_conversations_lose_their_end_and_those_without_a_response_are_left_out(
    tmp_path: Path,
) -> None:
    fits = {"instruction": "a", "response": "b" * 28}  # 3 scaffold ids, 30 texts', 1 end: 33
    cut = {"instruction": "a", "response": "b" * 29}
    dropped = {"instruction": "a" * 40, "response": "b"}
    path = write(tmp_path / "own.jsonl", [fits, cut, dropped])
    conversations = Instructions(path).conversations
    rows, facts = pack_conversations(conversations, CHAT, BYTES, 32, "responses", "train")
    assert [facts[name] for name in ("examples", "cut", "dropped")] == [2, 1, 1]
    assert (rows.input_ids == BYTES.eot_id).sum() == 2  # the openings
    assert (rows.targets == BYTES.eot_id).sum() == 1
    with pytest.raises(ValueError, match="block_size=2 tokens; use shorter ones"):
        pack_conversations(conversations, CHAT, BYTES, 2, "responses", "train")


def test_the_fingerprint_knows_conversations_tokens_and_loss(tmp_path: Path) -> None:
    path, other = (write(tmp_path / f"{n}.jsonl", numbered(n)) for n in (20, 21))
    variants = [packed(path), packed(other)]
    variants += [packed(path, block_size=32), packed(path, loss_on="all")]
    assert len({variant.fingerprint for variant in variants}) == 4
    assert packed(path).fingerprint == variants[0].fingerprint
    hashes = [packed(p).facts()["splits"]["train"]["sha256"] for p in (path, other)]
    assert hashes[0] != hashes[1]


def test_the_tokenizer_of_a_new_model_learns_the_templates_tokens(tmp_path: Path) -> None:
    path = write(tmp_path / "own.jsonl", numbered(20))
    data = module(Instructions(path))
    tokenizer = data.use_tokenizer(TokenizerChoice(byte_tokenizer, "byte"))
    assert tokenizer.fingerprint == BYTES.fingerprint
    assert data.special_tokens == tuple(CHAT.special_tokens)
    assert data.fingerprint == packed(path).fingerprint
    assert data.facts() == packed(path).facts()
    assert {key: data.facts()[key] for key in ("template", "loss_on")} == {
        "template": "chat",
        "loss_on": "responses",
    }


@pytest.mark.parametrize("passes", [1, 3])
def test_passes_over_the_conversations_end_the_data(tmp_path: Path, passes: int) -> None:
    source = Instructions(write(tmp_path / "own.jsonl", numbered(20)))
    data = module(source, max_passes=passes, tokens_per_step=128)
    data.use_tokenizer(TokenizerChoice.from_tokenizer(BYTES))
    assert data.max_steps == math.ceil(passes * len(data.train_rows) / 2)
    endless = module(source)
    endless.use_tokenizer(TokenizerChoice.from_tokenizer(BYTES))
    assert endless.max_steps is None


@pytest.mark.parametrize(
    ("key", "value"),
    [("template", ""), ("template", 1), ("loss_on", "half"), ("max_passes", 0), ("passes", 1)],
)
def test_wrong_arguments_are_refused_by_name(tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(ValidationError, match=key):
        module(Instructions(tmp_path / "own.jsonl"), **{key: value})


def test_instruction_tuning_needs_conversations(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="data=text has no conversations for stage=instruct; pass data=dolly"
    ):
        module(TextFiles(tmp_path))
    with pytest.raises(ValueError, match="template='verse'"):
        module(Instructions(tmp_path / "own.jsonl"), template="verse")


def test_dolly_takes_a_copy_of_its_file(tmp_path: Path) -> None:
    path = write(tmp_path / FILE, numbered(10))
    assert len(Dolly(path).conversations) == 10


def test_dolly_without_a_network_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match=r"cannot be fetched: HF_HUB_OFFLINE is set.*data\.p"):
        _ = Dolly().conversations


def test_dolly_is_fetched_once(tmp_path: Path) -> None:
    folder = tmp_path / "hub" / "databricks/databricks-dolly-15k"
    folder.mkdir(parents=True)
    write(folder / FILE, numbered(3))
    expected = [f"Double {i}.\n\nIt is {2 * i}." for i in range(3)]
    with (
        hub_server.serving(Hub(tmp_path / "hub")) as hub,
        hub_server.visitor(hub.url, tmp_path / "cache") as process,
    ):
        assert process.submit(hub_server.documents, Dolly()).result(timeout=60) == expected
        (folder / FILE).unlink()
        assert process.submit(hub_server.documents, Dolly()).result(timeout=60) == expected
        other = process.submit(hub_server.documents, Dolly(revision="none"))
        with pytest.raises(FileNotFoundError, match="at none has no such file or revision"):
            other.result(timeout=60)


@pytest.mark.skipif("NANOGPT_TEST_DATA" not in os.environ, reason="NANOGPT_TEST_DATA is not set")
@pytest.mark.parametrize("block_size", [256, 512, 1024])
@pytest.mark.parametrize("template", ["chat", "alpaca"])
@pytest.mark.parametrize("name", ["instruction-data.json", "dolly_151.jsonl"])
def test_real_instructions_leave_less_than_a_twentieth_empty(
    name: str, template: str, block_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Path(os.environ["NANOGPT_TEST_DATA"])
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(data / "tiktoken_cache"))
    tokenizer = gpt2_tokenizer().with_special_tokens(CHAT.special_tokens)
    splits = Instructions(data / "instruction" / name).splits()
    _, facts = pack_conversations(
        splits["train"], find_template(template), tokenizer, block_size, "responses", "train"
    )
    assert facts["padding"] < 0.05
    assert facts["examples"] + facts["dropped"] == len(splits["train"])
