"""The chunked loss against the plain one."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from nanogpt.model import GPT, GPTConfig
from nanogpt.training import cross_entropy
from nanogpt.training.cross_entropy import summed_cross_entropy

SMALL = GPTConfig(block_size=8, vocab_size=50, n_layer=1, n_head=2, n_embd=16)


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        dataclasses.replace(SMALL, tie_embeddings=False),
        dataclasses.replace(SMALL, logit_softcap=0.5),
        dataclasses.replace(SMALL, vocab_size=8201),  # padded by 55 rows
    ],
    ids=["tied", "untied", "softcap", "padded"],
)
@pytest.mark.parametrize("n_chunks", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradients_are_those_of_the_plain_form(
    config: GPTConfig, n_chunks: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = GPT(config)
    n_rows = model.unembedding.weight.size(0)
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", -(-16 // n_chunks) * n_rows)
    states = torch.randn(2, 8, 16)
    targets = torch.randint(config.vocab_size, (2, 8))
    targets[0, 3:5] = -100
    results = []
    for chunked in (True, False):
        h = states.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            if chunked:
                loss = summed_cross_entropy(model, h, targets)
            else:
                loss = F.cross_entropy(
                    model.head(h).flatten(0, 1), targets.flatten(), reduction="sum"
                )
        (loss / 7).backward()
        weight_grad = model.unembedding.weight.grad
        assert h.grad is not None
        assert weight_grad is not None
        results.append((loss.detach(), h.grad, weight_grad.clone()))
        weight_grad.zero_()
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(
            ours, plain, rtol=tolerance, atol=tolerance * float(plain.abs().max())
        )


def test_without_gradients_the_loss_is_the_same() -> None:
    torch.manual_seed(0)
    model, states = GPT(SMALL), torch.randn(2, 8, 16)
    targets = torch.randint(50, (2, 8))
    loss = summed_cross_entropy(model, states, targets)
    with torch.no_grad():
        assert torch.equal(summed_cross_entropy(model, states, targets), loss.detach())


def test_frozen_head_passes_gradients_on() -> None:
    torch.manual_seed(0)
    model, states = GPT(SMALL), torch.randn(2, 8, 16, requires_grad=True)
    model.requires_grad_(False)
    summed_cross_entropy(model, states, torch.randint(50, (2, 8))).backward()
    assert states.grad is not None
    assert model.wte.weight.grad is None


def test_no_scored_target_is_no_loss() -> None:
    states = torch.randn(2, 8, 16, requires_grad=True)
    loss = summed_cross_entropy(GPT(SMALL), states, torch.full((2, 8), -100))
    loss.backward()
    assert loss.detach() == 0.0
    assert states.grad is not None
    assert not states.grad.any()
