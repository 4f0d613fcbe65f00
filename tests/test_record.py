"""A checkpoint's record: what no run writes is refused in one sentence, before it is used."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanogpt.checkpoint import (
    KEY,
    Checkpoint,
    load_checkpoint,
    model_weights,
    record,
    write_checkpoint,
)
from nanogpt.classifier import Classifier
from nanogpt.model import GPTConfig
from nanogpt.tokenizer import byte_tokenizer
from nanogpt.weights import check_weights

CONFIG = GPTConfig(block_size=8, vocab_size=273, n_layer=2, n_head=2, n_embd=8)
LABELS = ["ham", "spam", "中文"]


def valid() -> dict[str, Any]:
    """Return the content of a checkpoint with everything that a record can have."""
    torch.manual_seed(0)
    about = record("classify", CONFIG, byte_tokenizer(), labels=list(LABELS))
    about["init_from"] = {"path": "/a/b.ckpt", "sha256": "0" * 64}
    about["clock"] = {"train_s": 1.5, "timed_steps": 3, "wall_s": 2}
    about["run"] = {"identity": "0123456789abcdef", "corpus": "text-0123"}
    weights = Classifier(CONFIG, len(LABELS)).state_dict()
    return {
        "global_step": 3,
        "state_dict": {f"model.{name}": tensor for name, tensor in weights.items()},
        KEY: about,
    }


def attempt(content: Any, path: Path) -> Checkpoint | str:
    """Return a checkpoint as loaded, or the one sentence with which it is refused."""
    write_checkpoint(content, path)
    try:
        return load_checkpoint(path)
    except ValueError as error:
        why = str(error)
    assert why.startswith(str(path))
    assert len(why.splitlines()) == 1
    assert len(why) < 1000
    return why


def refusal(content: Any, tmp_path: Path) -> str:
    """Return why a checkpoint is refused."""
    why = attempt(content, tmp_path / "a.ckpt")
    assert isinstance(why, str)
    return why


def places(value: Any, *path: Any) -> Iterator[tuple[Any, ...]]:
    """Yield where a value stands, and where all within it do, but most of the 256 tokens."""
    if path:
        yield path
    if isinstance(value, dict | list):
        keys = list(value)[:30] if isinstance(value, dict) else range(len(value))[:3]
        for key in keys:
            yield from places(value[key], *path, key)


def put(content: dict[str, Any], place: tuple[Any, ...], value: Any) -> None:
    *parents, last = place
    for key in parents:
        content = content[key]
    content[last] = value


def self_sharing(kind: type, depth: int = 40) -> Any:
    """Return a small value that is 2**depth long when it is written out."""
    value: Any = kind()
    for _ in range(depth):
        value = {"a": value, "b": value} if kind is dict else kind([value, value])
    return value


def deep(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-5, 300)
    | st.sampled_from([2**31, 2**63, 2**64, 10**18, 10**400, -(10**400)])
    | st.floats()
    | st.text(st.characters(exclude_categories=()), max_size=20)
    | st.sampled_from(
        ["", "x" * 10**5, "pretrain", "chat", "alpaca", "rotary", "\x1b[31m", "\ud800"]
    )
    | st.binary(max_size=8)
    | st.sampled_from([torch.zeros(()), torch.zeros(3, 2), torch.ones(8, dtype=torch.int32)])
)
SHARING = st.sampled_from([list, tuple, dict]).map(self_sharing)
VALUES = st.recursive(
    SCALARS | SHARING | st.just(90).map(deep),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=4)
        | st.tuples(inner, inner)
    ),
    max_leaves=8,
)
PLACES = list(places(valid()))


@settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(place=st.sampled_from(PLACES), value=VALUES)
def test_a_changed_value_is_loaded_as_it_is_or_refused(
    tmp_path: Path, place: tuple[Any, ...], value: Any
) -> None:
    content = valid()
    put(content, place, value)
    loaded = attempt(content, tmp_path / "a.ckpt")
    if isinstance(loaded, str):
        return
    assert (loaded.step, loaded.labels) == (content["global_step"], content[KEY]["labels"])
    assert (loaded.stage, loaded.template) == (content[KEY]["stage"], content[KEY]["template"])
    assert loaded.config == GPTConfig(**content[KEY]["model"])
    assert loaded.tokenizer.record() == content[KEY]["tokenizer"]
    for name, tensor in model_weights(content).items():
        assert torch.equal(loaded.model.state_dict()[name], tensor.float())


def test_a_record_with_everything_is_loaded(tmp_path: Path) -> None:
    write_checkpoint(valid(), tmp_path / "a.ckpt")
    assert load_checkpoint(tmp_path / "a.ckpt").labels == LABELS


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        (("global_step",), None, "global_step=None should be a whole number"),
        (("global_step",), True, "global_step=True should be a whole number"),
        (("global_step",), -1, "global_step=-1 should be at least 0"),
        (("state_dict",), [], r"state_dict=\[\] should be a (valid dict|mapping)"),
        (("state_dict", "model.wte.weight"), "x", "state_dict='x' should be an instance of Tensor"),
        ((KEY, "format"), True, "nanogpt.format=True should be a whole number"),
        ((KEY, "stage"), "speak", "stage='speak' should be 'pretrain', 'instruct' or"),
        ((KEY, "template"), {}, "template={} should be text"),
        ((KEY, "template"), "vicuna", "template='vicuna' is unknown; choose one of chat"),
        ((KEY, "template"), "chat", "template=chat and a tokenizer with 273 ids and "),
        ((KEY, "labels"), "", "labels is empty"),
        ((KEY, "labels"), [], r"labels=\[\] should be at least 1 item"),
        ((KEY, "labels"), ["a", "b", "\ud800"], "should be text, unable to parse"),
        ((KEY, "labels"), ["a", "b", "c" * 2**20], "should be at most 65536 char"),
        ((KEY, "labels"), [str(i) for i in range(2**16 + 1)], "at most 65536 items"),
        ((KEY, "labels"), ["a", "b"], r"classes.weight: .*\[3, 8\].*\[2, 8\]"),
        ((KEY, "labels"), None, "Unexpected key.*classes.weight"),
        ((KEY, "model", "n_layer"), 1.0, "nanogpt.model.n_layer=1.0 should be a whole number"),
        ((KEY, "model", "n_layer"), 10**8, "has weights of 2 layers and n_layer=100000000"),
        ((KEY, "model", "n_layer"), 1, "has weights of 2 layers and n_layer=1"),
        ((KEY, "model", "block_size"), 10**9, r"wpe.weight: .*\[8, 8\].*\[1000000000, 8\]"),
        ((KEY, "model", "n_embd"), 2**52, "has weights that do not fit its model .*overflow"),
        ((KEY, "model", "speed"), 1, "there is no key nanogpt.model.speed"),
        ((KEY, "tokenizer"), [], r"tokenizer=\[\] should be a (valid dict|mapping)"),
        ((KEY, "tokenizer", "special_tokens"), ["<|endoftext|>"], "and a tokenizer with 257 ids"),
        ((KEY, "tokenizer", "tokens", 3), "/w==", "record is malformed"),
        ((KEY, "run"), {"identity": 5, "corpus": "c"}, "run=5 should be text"),
        ((KEY, "run"), {"identity": "5"}, "run={'id.* should be at least 2 items"),
        ((KEY, "clock", "wall_s"), float("nan"), "clock=nan should be a finite number"),
        ((KEY, "init_from", "sha256"), None, "init_from=None should be text"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_value_that_no_run_writes_is_named(
    place: tuple[Any, ...], value: Any, reason: str, tmp_path: Path
) -> None:
    content = valid()
    put(content, place, value)
    assert re.search(reason, refusal(content, tmp_path))


def test_a_tokenizer_with_other_ids_than_the_model_is_refused(tmp_path: Path) -> None:
    content = valid()
    special_tokens = content[KEY]["tokenizer"]["special_tokens"]
    special_tokens.append("<|more|>")
    why = refusal(content, tmp_path)
    assert "has vocab_size=273, template=None and a tokenizer with 274 ids" in why


@pytest.mark.parametrize("missing", ["init_from", "clock", "run"])
def test_what_older_versions_did_not_write_may_be_missing(tmp_path: Path, missing: str) -> None:
    content = valid()
    del content[KEY][missing]
    write_checkpoint(content, tmp_path / "a.ckpt")
    assert load_checkpoint(tmp_path / "a.ckpt").step == 3


@pytest.mark.parametrize("key", sorted(valid()[KEY].keys() - {"init_from", "clock", "run"}))
def test_a_record_that_lacks_a_key_is_refused(tmp_path: Path, key: str) -> None:
    content = valid()
    del content[KEY][key]
    assert f"{key} must be given" in refusal(content, tmp_path)


def test_weights_of_whole_numbers_are_refused(tmp_path: Path) -> None:
    content = valid()
    content["state_dict"]["model.ln_f.weight"] = torch.ones(8, dtype=torch.int64)
    assert "has torch.int64 for ln_f.weight" in refusal(content, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_weights_of_another_precision_are_read(tmp_path: Path, dtype: torch.dtype) -> None:
    content = valid()
    content["state_dict"]["model.ln_f.weight"] = torch.full((8,), 0.5, dtype=dtype)
    write_checkpoint(content, tmp_path / "a.ckpt")
    weights = load_checkpoint(tmp_path / "a.ckpt").model.state_dict()
    assert weights["ln_f.weight"].tolist() == [0.5] * 8


def test_names_that_could_garble_a_terminal_are_escaped(tmp_path: Path) -> None:
    content = valid()
    content["state_dict"]["model.\x1b[2J" + "x" * 10**5] = torch.zeros(1)
    assert "\x1b" not in refusal(content, tmp_path)


def test_as_many_layers_as_are_claimed_are_not_built() -> None:
    config = GPTConfig(block_size=8, vocab_size=9, n_layer=10**8, n_head=1, n_embd=4)
    with pytest.raises(ValueError, match="weights of 0 layers and n_layer=100000000"):
        check_weights({}, config, None)
