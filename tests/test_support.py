"""A field or value of the configuration that a consumer was not written for is refused."""

import logging
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from pydantic.dataclasses import dataclass

from nanogpt.checkpoint import Checkpoint
from nanogpt.evaluation.scoring import Request, loglikelihoods
from nanogpt.export import check_exportable
from nanogpt.generation import KVCache
from nanogpt.model import GPT, GPTConfig
from nanogpt.support import ANY, GENERAL, IN_MODEL, check_supported, unsupported
from nanogpt.tokenizer import byte_tokenizer
from nanogpt.training.throughput import flops_per_token
from serving.engine import native
from serving.engine.slots import slot_bytes


@dataclass(frozen=True)
class Extended(GPTConfig):
    """A configuration with one more field, and a new value of each switch."""

    position: Literal["learned", "rotary", "alibi"] = "learned"  # type: ignore[assignment]
    norm: Literal["layernorm", "rmsnorm", "none"] = "layernorm"  # type: ignore[assignment]
    activation: Literal["gelu", "relu2", "swiglu", "tanh"] = "gelu"  # type: ignore[assignment]
    n_expert: int | None = None


TINY = Extended(block_size=16, vocab_size=64, n_layer=1, n_head=2, n_embd=64)
NEW: dict[str, Any] = {"position": "alibi", "norm": "none", "activation": "tanh", "n_expert": 1}


def export(config: GPTConfig) -> None:
    model = GPT(GPTConfig(16, 273, 1, 2, 64))
    about = (byte_tokenizer(), None, None, "pretrain", config, 0, Path("a.ckpt"))
    check_exportable(Checkpoint(model, *about), "hf")


def score(config: GPTConfig) -> None:
    model = GPT(GPTConfig(16, 64, 1, 2, 64)).eval()
    model.config = config
    loglikelihoods(model, [Request([1], [[2]])])


def cache(config: GPTConfig) -> None:
    model = GPT(GPTConfig(16, 64, 1, 2, 64))
    model.config = config
    KVCache(model)


CONSUMERS: dict[str, tuple[Callable[[Any], Any], set[str]]] = {  # and what each refuses
    "export": (export, {"position", "norm", "activation", "n_expert"}),
    "the FLOP count": (flops_per_token, {"activation", "n_expert"}),
    "the KV cache": (cache, {"position", "n_expert"}),
    "the scorer": (score, {"position", "n_expert"}),
    "the server's KV cache": (
        lambda config: slot_bytes(config, torch.float32),
        {"position", "n_expert"},
    ),
}


@pytest.mark.parametrize("field", NEW)
@pytest.mark.parametrize("consumer", CONSUMERS)
def test_each_consumer_refuses_what_it_was_not_written_for(consumer: str, field: str) -> None:
    use, refused = CONSUMERS[consumer]
    use(TINY)
    config = replace(TINY, **{field: NEW[field]})
    if field not in refused:
        use(config)
        return
    with pytest.raises(ValueError, match=f"{field}={NEW[field]}") as caught:
        use(config)
    assert consumer in str(caught.value) or consumer == "export"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", NEW)
def test_the_kernels_leave_to_torch_what_they_were_not_written_for(
    field: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, cpu = GPT(GPTConfig(16, 64, 1, 2, 64)), torch.device("cpu")
    expected = native.load_library() is not None
    model.config = TINY
    assert native.supported(model, "fp32", cpu) == expected
    model.config = replace(TINY, **{field: NEW[field]})
    caplog.set_level(logging.INFO)
    assert not native.supported(model, "fp32", cpu)
    assert [record.message for record in caplog.records] == [
        f"the C++ kernels do not support {field}={NEW[field]}; computing with torch"
    ]


def test_the_shortcut_is_refused_by_the_kernels_and_by_every_architecture(
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = GPTConfig(16, 273, 1, 2, 64, embd_shortcut=True)
    with pytest.raises(ValueError, match="embd_shortcut=True"):
        export(config)
    caplog.set_level(logging.INFO)
    assert not native.supported(GPT(config), "fp32", torch.device("cpu"))
    assert "do not support embd_shortcut=True" in caplog.text


def test_every_field_is_known_to_some_consumer_or_to_all() -> None:
    assert {field.name for field in fields(GPTConfig)} == {*GENERAL, *IN_MODEL}


def test_a_field_without_mention_is_supported_at_its_default() -> None:
    assert unsupported(TINY, {}) == {}
    assert unsupported(replace(TINY, n_expert=1), {}) == {"n_expert": 1}
    assert unsupported(replace(TINY, n_expert=1), {"n_expert": ANY}) == {}
    with pytest.raises(ValueError, match=r"^the x does not support norm=none, n_expert=1; impl"):
        check_supported(replace(TINY, norm="none", n_expert=1), "the x", {})
