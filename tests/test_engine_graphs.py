"""The decode step as a GPU computes it: one program for any streams, captured as a CUDA graph."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from nanogpt.model import GPT, GPTConfig
from serving.engine.forward import Forward, Span
from tests.engine_models import GROUPED, MODERN, SHIFTED

PROMPTS = [[(7 * slot + 3 * n) % 97 for n in range(5 + 30 * slot)] for slot in range(4)]
N_SLOTS = 12


class Recording(TorchDispatchMode):
    """Append the operations in its block to a list, with their arguments and results."""

    def __init__(self, calls: list[Any]) -> None:
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result


class Graph:
    """A CUDA graph in the host's memory: `replay` computes the same operations on the same tensors.

    As under a real capture, no value exists before the first replay.
    """

    replays = 0

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def end(self) -> None:
        for *_, result in self._new_tensors():
            for tensor in result if isinstance(result, tuple) else (result,):
                if isinstance(tensor, Tensor) and tensor.is_floating_point():
                    tensor.fill_(torch.nan)

    def _new_tensors(self) -> Iterator[tuple[Any, Any, Any, Any]]:
        return (c for c in self.calls if not c[0].is_view and not c[0]._schema.is_mutable)

    def replay(self) -> None:
        Graph.replays += 1
        for func, args, kwargs, result in self.calls:
            if func.is_view:
                continue
            again = func(*args, **kwargs)
            if not func._schema.is_mutable:
                pairs = (
                    zip(again, result, strict=True)
                    if isinstance(result, tuple)
                    else [(again, result)]
                )
                for new, old in pairs:
                    if isinstance(old, Tensor):
                        old.copy_(new)

    def pool(self) -> int:
        return 1


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """Have programs captured in the host's memory; return the pools that are passed."""
    pools: list[int | None] = []

    @contextlib.contextmanager
    def capture(
        graph: Graph, pool: int | None, stream: "Stream", capture_error_mode: str
    ) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        assert stream.device is not None  # else that of the current device, which may be another
        pools.append(pool)
        with Recording(graph.calls):
            yield
        graph.end()

    class Stream:
        def __init__(self, device: Any = None) -> None:
            self.device = device

        def wait_stream(self, other: "Stream") -> None:
            pass

    Graph.replays = 0
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)
    return pools


def forward(on_gpu: bool, **keys: Any) -> Forward:
    """Return a forward pass on the CPU that takes a GPU's way where `on_gpu`."""
    torch.manual_seed(0)
    shape = {"block_size": 160, "vocab_size": 97, "n_layer": 2, "n_head": 2, "n_embd": 64, **keys}
    model = GPT(GPTConfig(**shape)).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) * (0.2 if parameter.dim() > 1 else 0.5))
    c = model.config
    cache = torch.zeros(c.n_layer, 2, N_SLOTS, c.kv_heads, c.block_size, c.head_dim)
    computes = Forward(model, cache)
    computes.is_cpu = not on_gpu
    computes.decode.is_captured = on_gpu
    for slot, prompt in enumerate(PROMPTS):
        computes.hidden_states([Span(slot, 0, prompt)])
    return computes


def decode(computes: Forward, slots: list[int]) -> Callable[[int], Tensor]:
    """Return a function of the step that decodes a token in each of some slots."""

    def step(n: int) -> Tensor:
        spans = [
            Span(
                s,
                len(PROMPTS[s]) + n,
                [(11 * n + s) % 97],
                (11 * n + s - 11) % 97 if n else PROMPTS[s][-1],
            )
            for s in slots
        ]
        return computes.hidden_states(spans).clone()

    return step


@pytest.mark.parametrize("slots", [[1], [3, 0], [0, 2, 3]], ids=str)
@pytest.mark.parametrize(
    "keys", [{}, MODERN, GROUPED, SHIFTED], ids=["gpt2", "modern", "grouped", "shifted"]
)
def test_a_captured_step_computes_what_others_do(
    graphs: list[int | None], keys: dict[str, Any], slots: list[int]
) -> None:
    captured, plain = decode(forward(True, **keys), slots), decode(forward(False, **keys), slots)
    for n in range(40):  # of which one graph reads up to 64, the next up to 128 tokens
        torch.testing.assert_close(captured(n), plain(n), atol=2e-5, rtol=2e-5)
    assert Graph.replays == 40


def test_a_graph_serves_all_steps_of_a_shape(graphs: list[int | None]) -> None:
    computes = forward(True)
    for n, slots in enumerate(([0, 1, 2, 3], [3, 1, 0], [0, 3, 2])):
        decode(computes, slots)(n)
    assert graphs == [None]
    decode(computes, [0])(3)
    assert graphs == [None, 1]  # it shares the memory of the first


def test_states_outlast_the_next_step(graphs: list[int | None]) -> None:
    computes = forward(True)
    first = computes.hidden_states([Span(0, 5, [1], 2)])
    before = first.clone()
    computes.hidden_states([Span(0, 6, [3], 1)])
    assert first.equal(before)


def test_a_step_that_cannot_be_captured_is_computed(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*args: Any) -> None:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.cuda, "Stream", failing)
    captured, plain = decode(forward(True), [1]), decode(forward(False), [1])
    with caplog.at_level(logging.WARNING):
        for n in range(3):
            torch.testing.assert_close(captured(n), plain(n), atol=2e-5, rtol=2e-5)
    (message,) = caplog.messages
    assert message.startswith("decode steps are not captured as CUDA graphs: ")


def test_the_program_of_a_step_does_not_depend_on_its_tokens() -> None:
    computes = forward(True, **SHIFTED)

    def traced(slots: list[int]) -> str:
        spans = [Span(slot, len(PROMPTS[slot]), [slot], 7) for slot in slots]
        numbers, n_rows, n_padded, shapes = computes.layout(spans)
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:  # no operation can read a value
            step = make_fx(lambda numbers: computes.states(numbers, n_rows, n_padded, shapes))
            return str(step(fake.from_tensor(numbers)).code)

    code = traced([3, 0])
    assert code == traced([1, 3])
    n_calls = code.count(" = torch.ops.aten._scaled_dot_product")
    assert n_calls == computes.config.n_layer
