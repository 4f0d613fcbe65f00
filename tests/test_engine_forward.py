"""The engine's forward passes: the model's logits, and rows that do not see each other."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nanogpt.model import GPT, GPTConfig
from serving.engine import compiling, native
from serving.engine import forward as forward_module
from serving.engine.forward import Forward, Span, round_to_24_bits
from serving.engine.native import ForwardPass, cache_dtype, make_forward
from tests.engine_models import GROUPED, MODERN, SHIFTED, SHORTCUT

IDS = torch.randint(97, (150,), generator=torch.Generator().manual_seed(5)).tolist()
TOLERANCE = {"fp32": 1e-5, "fp24": 1e-4, "bf16": 0.02, "int8": 0.03}  # of the logits' deviation


@pytest.fixture(params=["native", "torch", "tiles"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Compute with our kernels, with torch's, or with torch's as if rows differed in any number."""
    if request.param != "native":
        monkeypatch.setattr(native, "load_library", lambda: None)
        if request.param == "tiles":
            monkeypatch.setattr(forward_module, "MULTIPLES", ())
    elif native.load_library() is None:
        pytest.skip("there is no compiler")
    return str(request.param)


def model(**keys: Any) -> GPT:
    torch.manual_seed(1)
    shape = {"block_size": 160, "n_layer": 2, "n_head": 2, "n_embd": 128, **keys}
    made = GPT(GPTConfig(vocab_size=97, **shape)).eval().requires_grad_(False)
    for parameter in made.parameters():
        parameter.copy_(torch.randn_like(parameter) * (0.1 if parameter.dim() > 1 else 0.5))
    return made


def forward(dtype: str, invariant: bool = True, **keys: Any) -> ForwardPass:
    made = model(**keys)
    c = made.config
    shape = (c.n_layer, 2, 4, c.kv_heads, c.block_size, c.head_dim)
    cache = torch.zeros(shape, dtype=cache_dtype(dtype))
    return make_forward(made, cache, dtype, invariant=invariant)


def logits(computes: ForwardPass, *spans: Span) -> Tensor:
    return computes.logits(computes.hidden_states(list(spans)))


@pytest.mark.parametrize(
    "keys",
    [{}, MODERN, {"bias": False}, GROUPED, SHIFTED, SHORTCUT],
    ids=["gpt2", "modern", "no bias", "grouped", "shifted", "shortcut"],
)
@pytest.mark.parametrize("dtype", ["fp32", "fp24", "bf16", "int8"])
def test_logits_are_the_models(kernels: str, dtype: str, keys: dict[str, Any]) -> None:
    expected = model(**keys)(torch.tensor([IDS]))[0]
    difference = logits(forward(dtype, **keys), Span(1, 0, IDS)) - expected
    assert difference.std() < TOLERANCE[dtype] * expected.std()


@pytest.mark.parametrize(
    "keys",
    [{}, MODERN, GROUPED, SHIFTED, SHORTCUT],
    ids=["gpt2", "modern", "grouped", "shifted", "shortcut"],
)
@pytest.mark.parametrize("dtype", ["fp32", "fp24", "bf16", "int8"])
@pytest.mark.parametrize(
    "cuts",
    [[150], [64, 86], [1] * 150, [7] * 21 + [3]],
    ids=["whole", "halves", "tokens", "sevens"],
)
def test_states_do_not_depend_on_how_a_text_is_cut(
    kernels: str, cuts: list[int], dtype: str, keys: dict[str, Any]
) -> None:
    computes = forward(dtype, **keys)
    whole = computes.hidden_states([Span(0, 0, IDS)])
    parts, start = [], 0
    for n in cuts:
        before = IDS[start - 1] if start else 0
        others = [Span(2, start, IDS[:n], 7), Span(3, 0, [5])]  # in the same step
        own = Span(1, start, IDS[start : start + n], before)
        parts.append(computes.hidden_states([others[0], own, others[1]])[n : 2 * n])
        start += n
    assert torch.cat(parts).equal(whole)


@pytest.mark.parametrize("keys", [{}, MODERN, GROUPED], ids=["gpt2", "modern", "grouped"])
@pytest.mark.parametrize("dtype", ["fp32", "fp24", "bf16", "int8"])
def test_states_and_logits_do_not_depend_on_the_number_of_threads(
    monkeypatch: pytest.MonkeyPatch, dtype: str, keys: dict[str, Any]
) -> None:
    if native.load_library() is None:
        pytest.skip("there is no compiler")
    found = []
    for n_threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=n_threads: n)
        computes = forward(dtype, **keys)
        found.append([logits(computes, Span(1, 0, IDS)), logits(computes, Span(2, 0, IDS[:3]))])
    assert all(
        part.equal(other)
        for parts in found[1:]
        for part, other in zip(found[0], parts, strict=True)
    )


def test_bfloat16_has_the_same_bits_in_prefill_and_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "load_library", lambda: None)
    computes, generator = forward("bf16"), torch.Generator().manual_seed(0)
    for _ in range(3):  # of which two differ where a single query is computed as one
        ids = torch.randint(97, (150,), generator=generator).tolist()
        whole = computes.hidden_states([Span(0, 0, ids)])
        parts = [computes.hidden_states([Span(1, n, [i])]) for n, i in enumerate(ids)]
        assert torch.cat(parts).equal(whole)


@pytest.mark.parametrize("n_rows", [1, 4, 150])
def test_bfloat16_has_the_same_bits_in_both_ways_to_compute_it(n_rows: int) -> None:
    computes = [forward("bf16"), forward("bf16")]
    if isinstance(computes[0], Forward) or "avx512_bf16" not in compiling.processor_flags().split():
        pytest.skip("there is one way here")
    for computed, way in zip(computes, ("bf16", "widened"), strict=True):
        assert isinstance(computed, native.NativeForward)
        computed._native.dtype = native.DTYPES[way]
    paired, widened = (logits(computed, Span(0, 0, IDS[:n_rows])) for computed in computes)
    assert paired.equal(widened)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_states_that_are_no_numbers_give_logits_that_are_none(kernels: str, dtype: str) -> None:
    computes = forward(dtype)
    states = computes.hidden_states([Span(1, 0, IDS[:1])]).clone()
    states[0, 70] = torch.nan
    assert not computes.logits(states).isfinite().any()


def test_weights_of_24_bits_are_the_nearest_ones() -> None:
    rounded = model(n_layer=1)
    rows = rounded.wte.weight[:2]
    unit = 2.0**-15  # between numbers from 1 to 2
    rows[0, :4] = torch.tensor([1 + unit / 2, 1 + unit * 3 / 2, -1 - unit * 0.51, 0.1])
    round_to_24_bits(rounded)
    assert rows[0, :3].tolist() == [1.0, 1 + 2 * unit, -1 - unit]  # ties to even
    assert 0 < abs(rows[0, 3].item() - 0.1) < 2.0**-20


def test_shapes_that_the_kernels_do_not_take_are_computed_by_torch() -> None:
    assert isinstance(forward("fp32", n_embd=96), Forward)


def test_rows_are_not_padded_where_they_may_depend_on_their_company(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(native, "load_library", lambda: None)

    def find(computes: Forward) -> bool:
        computes.row_multiple = 4
        return True

    monkeypatch.setattr(Forward, "_find_row_multiple", find)
    rows: list[int] = []
    for invariant in (True, False):
        computes = forward("fp32", invariant)
        assert isinstance(computes, Forward)
        hook = computes.model.ln_f.register_forward_hook(lambda *a: rows.append(a[1][0].size(-2)))
        computes.hidden_states([Span(0, 0, [1, 2, 3])])
        hook.remove()
    assert rows == [4, 3]


def test_without_a_compiler_there_are_no_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "/bin/false")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compiling._compiled() is None
    assert not list((tmp_path / "nanogpt").iterdir())


EXHAUSTED = """
import resource
import torch
from nanogpt.model import GPT, GPTConfig
from serving.engine.forward import Span
from serving.engine.native import make_forward

model = GPT(GPTConfig(65536, 97, n_layer=1, n_head=1, n_embd=64)).eval()
computes = make_forward(model, torch.zeros(1, 2, 1, 1, 65536, 64), "fp32")
before = computes.hidden_states([Span(0, 0, [1, 2, 3])])
pages = int(open("/proc/self/statm").read().split()[0])
whole = 65536 * 64 * 4  # bytes of a row of numbers for every token
limit = pages * resource.getpagesize() + 6 * whole  # the kernels need 9 more than their input
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    computes.hidden_states([Span(0, 0, [1] * 65536)])
except MemoryError as error:
    print(error)
assert computes.hidden_states([Span(0, 0, [1, 2, 3])]).equal(before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_the_kernels_raise_without_memory_and_recover() -> None:
    if native.load_library() is None:
        pytest.skip("there is no compiler")
    done = subprocess.run([sys.executable, "-c", EXHAUSTED], capture_output=True, text=True)
    assert done.stdout == "there is no memory to compute 65536 rows\n", done.stderr
    assert done.returncode == 0
