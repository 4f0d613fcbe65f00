"""Tiny checkpoints with random weights for tests of the engine, and requests to it."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from nanogpt.checkpoint import KEY, record, write_checkpoint
from nanogpt.classifier import Classifier
from nanogpt.model import GPT, GPTConfig
from nanogpt.tokenizer import byte_tokenizer
from serving.engine.engine import Engine, Events
from serving.engine.messages import Generate, Message, SamplingParams, Settings, Tokens

MODERN: dict[str, Any] = {
    "position": "rotary",
    "norm": "rmsnorm",
    "activation": "relu2",
    "qk_norm": True,
    "bias": False,
}
SHIFTED: dict[str, Any] = {**MODERN, "token_shift": True}
SHORTCUT: dict[str, Any] = {**MODERN, "embd_shortcut": True}  # which the C++ kernels lack
GROUPED: dict[str, Any] = {  # Qwen3's switches, and those that it lacks
    "position": "rotary",
    "rope_base": 1e6,
    "norm": "rmsnorm",
    "norm_eps": 1e-6,
    "norm_weight": False,
    "embd_norm": True,
    "bias": False,
    "activation": "swiglu",
    "n_inner": 192,
    "n_kv_head": 1,
    "head_size": 32,
    "qk_norm": True,
    "qk_norm_weight": True,
    "tie_embeddings": False,
    "logit_softcap": 20.0,
}


def write_model(
    path: Path,
    seed: int = 0,
    labels: list[str] | None = None,
    template: str | None = None,
    **keys: Any,
) -> GPT:
    """Write a checkpoint of a byte model whose answers are neither constant nor a loop."""
    tokenizer = byte_tokenizer()
    shape = {"block_size": 256, "n_layer": 2, "n_head": 2, "n_embd": 64, **keys}
    config = GPTConfig(vocab_size=tokenizer.vocab_size, **shape)
    torch.manual_seed(seed)
    model = GPT(config) if labels is None else Classifier(config, len(labels))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 0.5))
    about = record("pretrain", config, tokenizer, template=template, labels=labels)
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_checkpoint({"state_dict": weights, "global_step": 1, KEY: about}, path)
    return model.eval()


@dataclass
class Answer:
    """The messages of an engine for one request."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)
    top: list[tuple[list[int], list[float]]] = field(default_factory=list)
    end: Message | None = None

    @property
    def outcome(self) -> tuple[object, ...]:
        """Return the part that must depend on the request alone."""
        reason = self.end.finish_reason if isinstance(self.end, Tokens) else self.end
        return self.ids, self.logprobs, self.top, reason


class InlineEngine:
    """An engine in the caller's thread, with the answers to its requests."""

    def __init__(self, models: Path, **settings: Any) -> None:
        self.answers: dict[str, Answer] = {}
        self.messages: list[Message] = []
        chosen = {"dtype": "fp32", "chunk_tokens": 16, "max_slots": 4, "cache_gb": 1.0, **settings}
        self.engine = Engine(Settings(models=str(models), **chosen), self._record)

    def _record(self, events: Events) -> None:
        for message in chain.from_iterable(events.values()):
            self.messages.append(message)
            answer = self.answers.setdefault(getattr(message, "request_id", ""), Answer())
            if isinstance(message, Tokens):
                answer.ids += message.ids
                answer.logprobs += [own for own, _, _ in message.logprobs or []]
                answer.top += [(ids, values) for _, ids, values in message.logprobs or []]
            if not isinstance(message, Tokens) or message.finish_reason:
                answer.end = message

    def step(self) -> None:
        """Run the posted calls and compute one step."""
        self.engine.take_inbox(wait=self.engine.idle or not self.engine.runners)
        self.engine.step()

    def all(self, requests: Iterable[Message]) -> dict[str, Answer]:
        """Submit all requests at once and return their answers by request id."""
        requests = list(requests)
        for request in requests:
            self.engine.accept(self, request)
        self.settle()
        return {r.request_id: self.answers[r.request_id] for r in requests}  # type: ignore[attr-defined]

    def settle(self) -> None:
        """Compute until the engine is idle."""
        self.step()
        while not self.engine.idle:
            self.step()

    def one(self, request: Message) -> Answer:
        """Submit a request and return its answer."""
        (answer,) = self.all([request]).values()
        return answer


def generate(
    request_id: str, prompt_ids: list[int], *, key: str = "", origin: str = "", **params: Any
) -> Generate:
    """Return a request for the only model."""
    params = {"max_tokens": 8, "temperature": 0.0, **params}
    return Generate(request_id, "run", prompt_ids, SamplingParams(**params), key=key, origin=origin)
