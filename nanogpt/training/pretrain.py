"""Language modelling: the next token at every scored position, of a corpus or of responses."""

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanogpt.model import GPT
from nanogpt.training.module import Batch, StageModule


def next_token_loss(
    model: GPT,
    input_ids: Tensor,
    targets: Tensor,
    documents: Tensor | None = None,
    row_seeds: Tensor | None = None,
) -> Tensor:
    """Return the summed cross-entropy in nats of targets (B, T), those of -100 left out."""
    logits = model(input_ids, documents=documents, row_seeds=row_seeds)  # (B, T, V)
    return F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum"
    )


class PretrainModule(StageModule):
    """A language model in training; `token_bytes` (V,) counts each token's bytes of text.

    What it learns is what its batches score: all of a corpus, or the responses of instructions.
    """

    def __init__(self, *args: Any, token_bytes: list[int], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("token_bytes", torch.tensor(token_bytes), persistent=False)
        self.token_bytes: Tensor
        self.loss = torch.compile(next_token_loss) if self.compiled else next_token_loss

    def summed_loss(self, batch: Batch) -> Tensor:
        return self.loss(
            self.model,
            batch["input_ids"],
            batch["targets"],
            batch.get("documents"),
            batch["row_seeds"],
        )

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Return the loss per token in nats and the bits per byte over all ranks' batches.

        Bits per byte divide by the bytes of the scored tokens; special tokens add loss and no
        bytes.
        """
        sums = torch.zeros(3, dtype=torch.float64)  # nats, tokens, bytes
        self.model.eval()
        for batch in batches:
            batch = self.trainer.strategy.batch_to_device(batch)
            targets = batch["targets"]  # (B, T)
            with self.trainer.precision_plugin.forward_context():
                nats = next_token_loss(
                    self.model, batch["input_ids"], targets, batch.get("documents")
                )
            scored = targets != -100
            n_bytes = self.token_bytes[targets.clamp(min=0)].where(scored, 0).sum()
            sums += torch.stack([nats.float(), scored.sum(), n_bytes]).cpu()
        self.model.train()
        sums = self.trainer.strategy.reduce(sums, reduce_op="sum")
        nats, n_tokens, n_bytes = sums.tolist()
        return {
            "loss": nats / n_tokens,
            "bits_per_byte": nats / math.log(2) / n_bytes if n_bytes else math.nan,
        }
