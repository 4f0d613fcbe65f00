"""Language modelling: the next token at every scored position, of a corpus or of responses."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanogpt.model import GPT, run_block
from nanogpt.training.compiled import training_loss
from nanogpt.training.cross_entropy import summed_cross_entropy
from nanogpt.training.module import Batch, StageModule, wide
from nanogpt.training.throughput import flops_per_token
from nanogpt.training.varlen import document_attend


def next_token_loss(
    model: GPT,
    input_ids: Tensor,
    targets: Tensor,
    documents: Tensor | None = None,
    row_seeds: Tensor | None = None,
    starts: Tensor | None = None,
    run: Callable[..., Tensor] = run_block,
    cross_entropy: Callable[..., Tensor] = summed_cross_entropy,
) -> Tensor:
    """Return the summed cross-entropy in nats of targets (B, T), those of -100 left out."""
    attend = document_attend(model, starts, input_ids.size(1))
    hidden_states = model.hidden_states(input_ids, attend, documents, row_seeds, run)
    return cross_entropy(model, hidden_states, targets)


class LanguageModel(StageModule):
    """A language model in training, on all of a corpus or on the responses of conversations."""

    def __init__(self, model: GPT, **kwargs: Any) -> None:
        super().__init__(model, flops_per_token=flops_per_token(model.config), **kwargs)
        n_bytes = [len(token) for token in self.tokenizer.token_bytes()]
        # (V,) float32: Lightning's averages of weights take buffers too, and cut whole numbers.
        self.register_buffer("token_bytes", torch.tensor(n_bytes).float(), persistent=False)
        self.token_bytes: Tensor
        self.loss = training_loss(next_token_loss, self.compiled, self.recompute)

    def summed_loss(self, batch: Batch) -> Tensor:
        """Return the loss of rows `input_ids` (B, T) as a scalar."""
        keys = ("input_ids", "targets", "documents", "row_seeds", "document_starts")
        return self.loss(self.model, *map(batch.get, keys))

    def scores(self, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the nats and scored tokens, the bits and bytes, of each target (B, T).

        Special tokens have a loss and no bytes.
        """
        targets = batch["targets"]  # (B, T)
        ids = batch["input_ids"]
        attend = document_attend(self.model, batch.get("document_starts"), ids.size(1))
        logits = self.model(ids, attend, batch.get("documents")).flatten(0, 1)
        nats = F.cross_entropy(logits, targets.flatten(), ignore_index=-100, reduction="none")
        nats, scored = wide(nats).view_as(targets), targets != -100
        n_bytes = self.token_bytes[targets.clamp(min=0)].where(scored, 0).round()
        return {"loss": (nats, scored), "bits_per_byte": (nats / math.log(2), n_bytes)}
