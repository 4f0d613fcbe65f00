"""The pretraining loss and its validation metrics, by hand."""

import copy
import dataclasses
import logging
import math
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.data import DataLoader

from nanogpt.model import GPT, GPTConfig, run_block
from nanogpt.optim import Constant, adamw
from nanogpt.training.compiled import block_runner
from nanogpt.training.language_model import LanguageModel, next_token_loss

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # Lightning's own
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
]

CONFIG = GPTConfig(block_size=4, vocab_size=5, n_layer=1, n_head=1, n_embd=4)


def uniform_model() -> GPT:
    model = GPT(CONFIG)
    torch.nn.init.zeros_(model.wte.weight)
    return model


def module(token_bytes: list[int], **options: Any) -> LanguageModel:
    defaults: dict[str, Any] = {
        "model": uniform_model(),
        "tokenizer": SimpleNamespace(token_bytes=lambda: [b"x" * n for n in token_bytes]),
        "make_optimizer": adamw,
        "schedule": Constant(),
        "max_steps": 1,
        "tokens_per_step": 4,
        "grad_clip": None,
        "compiled": False,
        "metadata": {},
    }
    return LanguageModel(**{**defaults, **options})


def silent_trainer(**options: Any) -> Trainer:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **options,
    )


def validate(built: LanguageModel, batches: list[dict[str, Any]]) -> Any:
    loader: Any = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    return silent_trainer().validate(built, loader, verbose=False)[0]


def batch(targets: list[int]) -> dict[str, Any]:
    row = torch.tensor([targets])
    return {
        "input_ids": row.clamp(min=0),
        "targets": row,
        "step_targets": 4,
        "row_seeds": torch.zeros(1, dtype=torch.int64),
    }


def test_the_loss_is_summed_over_scored_positions_only() -> None:
    row = batch([1, -100, 2, -100])
    loss = next_token_loss(uniform_model(), row["input_ids"], row["targets"])
    assert loss.item() == pytest.approx(2 * math.log(5), abs=1e-6)


def test_a_uniform_model_has_the_loss_of_its_vocabulary() -> None:
    metrics = validate(module([1] * 5), [batch([1, 2, 3, 4]), batch([1, -100, -100, -100])])
    assert metrics["val/loss"] == pytest.approx(math.log(5), abs=1e-6)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # which the compiler reads
@pytest.mark.parametrize("switches", [{}, {"dropout": 0.5}, {"embd_shortcut": True}])
def test_all_layers_share_a_compiled_block(
    monkeypatch: pytest.MonkeyPatch, switches: dict[str, Any]
) -> None:
    torch._dynamo.reset()
    counted = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counted, fullgraph=True))
    torch.manual_seed(0)
    shape = dataclasses.replace(CONFIG, n_layer=12, position="rotary", **switches)
    models = [GPT(shape).train() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    ids, seeds = torch.randint(5, (2, 3, 4)), torch.arange(6).view(2, 3)
    for run, model in zip((run_block, block_runner(True)), models, strict=True):
        for rows, of_rows in zip(ids, seeds, strict=True):
            next_token_loss(model, rows, rows, row_seeds=of_rows, run=run).backward()
    assert counted.frame_count == 1
    for ours, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(ours.grad, other.grad)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # which the compiler reads
@pytest.mark.parametrize("compiled", [False, True])
def test_recomputed_blocks_have_the_same_loss_and_gradients(
    monkeypatch: pytest.MonkeyPatch, compiled: bool
) -> None:
    torch._dynamo.reset()
    aot = partial(torch.compile, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", aot)
    torch.manual_seed(0)
    shape = GPTConfig(16, 64, n_layer=3, n_head=2, n_embd=16, dropout=0.2, position="rotary")
    model, ids, found = GPT(shape).train(), torch.randint(64, (3, 16)), []
    rows = (ids, ids, (torch.arange(16) // 5).expand(3, 16), torch.arange(3))
    for recompute in (False, True):
        model.zero_grad()
        loss = next_token_loss(model, *rows, run=block_runner(compiled, recompute))
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("recompute", [False, True])
def test_the_backward_runs_blocks_again_where_activations_are_not_stored(recompute: bool) -> None:
    built = module([1] * 5, activation_checkpointing=recompute)
    calls: list[Any] = []
    built.model.h[0].register_forward_pre_hook(lambda *args: calls.append(args))
    loss = built.summed_loss(batch([1, 2, 3, 4]))
    assert len(calls) == 1
    loss.backward()
    assert len(calls) == 1 + recompute


def test_bits_per_byte_divide_by_the_bytes_of_the_scored_tokens() -> None:
    # Targets 1 and 2 have 2 and 3 bytes, target 0 (a special token) none: three tokens, five bytes.
    metrics = validate(module([0, 2, 3, 1, 1]), [batch([1, 2, 0, -100])])
    assert metrics["val/bits_per_byte"] == pytest.approx(3 * math.log2(5) / 5, abs=1e-6)


def test_evaluation_leaves_the_model_in_training_mode() -> None:
    built = module([1] * 5)
    built.model.train()
    validate(built, [batch([1, 2, 3, 4])])
    assert built.model.training


@pytest.mark.parametrize("grad_clip", [0.05, None, 1e6])
def test_clipped_steps_are_those_of_torchs_own_clipping(grad_clip: float | None) -> None:
    torch.manual_seed(0)
    model = GPT(CONFIG)
    reference = copy.deepcopy(model)
    rows = [batch([1, 2, 3, 4]), batch([4, 0, 2, 1]), batch([3, 3, 1, 2])]

    optimizer = torch.optim.SGD(reference.parameters(), lr=0.5)
    norms = []
    for row in rows:
        (next_token_loss(reference, row["input_ids"], row["targets"]) / 4).backward()
        largest = math.inf if grad_clip is None else grad_clip
        norms.append(torch.nn.utils.clip_grad_norm_(reference.parameters(), largest).item())
        optimizer.step()
        optimizer.zero_grad()
    assert min(norms) > 0.05

    def sgd(model: GPT) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.5)

    trained = module([1] * 5, model=model, make_optimizer=sgd, grad_clip=grad_clip, max_steps=3)
    trainer = silent_trainer(max_steps=3)
    steps: Any = [[row] for row in rows]
    trainer.fit(trained, DataLoader(steps, batch_size=None))
    assert trained.read_metrics()["grad_norm"] == pytest.approx(norms[-1])
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("world_size", [1, 2])
def test_gradients_stay_where_they_are_on_several_ranks_alone(
    world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In DDP's buckets; gradients of their own would be additional memory."""
    trained = module([1] * 5)
    trainer = silent_trainer(max_steps=1)
    monkeypatch.setattr(Trainer, "world_size", world_size)
    steps: Any = [[batch([1, 2, 3, 4])]]
    trainer.fit(trained, DataLoader(steps, batch_size=None))
    grads = [parameter.grad for parameter in trained.model.parameters()]
    if world_size == 1:
        assert all(grad is None for grad in grads)
    else:
        assert all(grad is not None and not grad.any() for grad in grads)
