"""Attention by documents on a simulated GPU, with a kernel that loops over them."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import varlen as torch_varlen

from nanogpt.data.packing import PackedRows
from nanogpt.model import GPT, GPTConfig
from nanogpt.training import varlen
from nanogpt.training.language_model import next_token_loss
from nanogpt.training.varlen import DocumentAttend, document_attend
from tests.simulated_gpu import simulated_gpu

T = 32
SHAPE: dict[str, Any] = {"block_size": T, "vocab_size": 61, "n_layer": 2, "n_head": 4, "n_embd": 32}


def looped_attention(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, _: Any, T_q: int, T_k: int, **keys: Any
) -> Tensor:
    """The kernel of `varlen_attn` as a loop; (N, H, D)."""
    assert (T_q, T_k, keys) == (T_q, T_q, {"window_size": (-1, 0)})
    assert bounds.dtype == torch.int32
    ends = getattr(bounds, "cpu_tensor", bounds).tolist()  # which the GPU knows without a wait
    assert (ends[0], ends[-1]) == (0, len(q))
    attended = []
    for start, end in itertools.pairwise(ends):
        if start < end:
            mask = q.new_ones(end - start, end - start, dtype=torch.bool).tril()
            one, key, value = (part[start:end].transpose(0, 1) for part in (q, k, v))
            found = F.scaled_dot_product_attention(one, key, value, mask)
            attended.append(found.transpose(0, 1))
    return torch.cat(attended)


@pytest.fixture
def dtypes(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The types of the queries of each call."""
    found: list[torch.dtype] = []

    def varlen_attn(q: Tensor, *args: Any, window_size: tuple[int, int]) -> Tensor:
        found.append(q.dtype)
        return looped_attention(q, *args, window_size=window_size)

    monkeypatch.setattr(torch_varlen, "varlen_attn", varlen_attn)
    return found


def packed() -> dict[str, Tensor]:
    rng = np.random.default_rng(0)
    texts = [(rng.integers(61, size=n).tolist(), [True] * n) for n in rng.integers(3, T, size=12)]
    rows = PackedRows.from_texts(texts, T)
    return rows.batch(np.arange(len(rows)))


def gradients(model: GPT, starts: bool, reduced: bool = False) -> list[Tensor]:
    model.zero_grad()
    batch = {name: tensor.to("cuda") for name, tensor in packed().items()}
    with torch.autocast("cuda", torch.bfloat16, reduced):
        loss = next_token_loss(
            model,
            batch["input_ids"],
            batch["targets"],
            batch["documents"],
            starts=batch["document_starts"] if starts else None,
        )
    loss.backward()
    grads = [parameter.grad for parameter in model.parameters()]
    return [tensor.cpu() for tensor in (loss.detach(), *grads) if tensor is not None]


@pytest.mark.parametrize(
    "switches", [{}, {"position": "rotary", "qk_norm": True, "n_kv_head": 2, "token_shift": True}]
)
def test_loss_and_gradients_are_those_of_the_mask(
    switches: dict[str, Any], dtypes: list[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(varlen, "KERNEL_DTYPES", (torch.float32,))
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPE, **switches))
    with simulated_gpu():
        model.to("cuda")
        by_kernel, by_mask = gradients(model, True), gradients(model, False)
    assert dtypes == [torch.float32] * 2
    for one, other in zip(by_kernel, by_mask, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_the_kernel_gets_queries_of_the_autocast(dtypes: list[torch.dtype]) -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPE, qk_norm=True, norm="rmsnorm"))
    with simulated_gpu():
        model.to("cuda")
        by_kernel, by_mask = gradients(model, True, True), gradients(model, False, True)
    assert dtypes == [torch.bfloat16] * 2
    assert by_kernel[0].item() == pytest.approx(by_mask[0].item(), rel=1e-3)


@pytest.mark.parametrize(
    ("switches", "device", "capability", "dtype"),
    [
        ({}, "cuda", (8, 0), torch.bfloat16),
        ({"n_embd": 48}, "cuda", (8, 0), torch.bfloat16),
        ({"head_size": 264}, "cuda", (8, 0), torch.bfloat16),
        ({"dropout": 0.1}, "cuda", (8, 0), torch.bfloat16),
        ({}, "cuda", (7, 5), torch.float16),
        ({}, "cuda", (8, 0), torch.float32),
        ({}, "cpu", (8, 0), torch.bfloat16),
    ],
)
def test_the_mask_stays_where_the_kernel_does_not_apply(
    switches: dict[str, Any],
    device: str,
    capability: tuple[int, int],
    dtype: torch.dtype,
    dtypes: list[torch.dtype],
) -> None:
    applies = (switches, device, capability, dtype) == ({}, "cuda", (8, 0), torch.bfloat16)
    with simulated_gpu(capability):
        model = GPT(GPTConfig(**{**SHAPE, **switches})).to(device, dtype).train()
        starts = packed()["document_starts"].to(device)
        found = document_attend(model, starts, T)
        assert document_attend(model, None, T) is None
    assert isinstance(found, DocumentAttend) is applies


def old_varlen_attn(q: Tensor, k: Tensor, v: Tensor, *args: Any, is_causal: bool = False) -> None:
    """That of torch 2.10."""


@pytest.mark.parametrize("found", [old_varlen_attn, None])
def test_the_mask_stays_where_torch_has_no_such_kernel(
    found: Callable[..., None] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if found is None:
        monkeypatch.delattr(torch_varlen, "varlen_attn")
    else:
        monkeypatch.setattr(torch_varlen, "varlen_attn", found)
    with simulated_gpu():
        model = GPT(GPTConfig(**SHAPE)).to("cuda", torch.bfloat16)
        assert document_attend(model, packed()["document_starts"].to("cuda"), T) is None
