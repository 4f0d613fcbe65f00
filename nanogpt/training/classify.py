"""Classification: a head on each text's last token, with the next token as an auxiliary loss."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import validate_call
from torch import Tensor

from nanogpt.classifier import Classifier, class_probabilities, train_layers
from nanogpt.evaluation.classification import baselines, confusion_matrix, scores
from nanogpt.model import GPT, run_block
from nanogpt.tokenizer import Tokenizer
from nanogpt.training.compiled import block_runner
from nanogpt.training.cross_entropy import summed_cross_entropy
from nanogpt.training.module import Batch, StageModule
from nanogpt.values import Amount, BelowOne

MAX_MISTAKES = 12  # shown in the report
MISTAKE_CHARS = 300

Loss = Callable[[Classifier, Batch], Tensor]
TextSet = tuple[Sequence[str], Sequence[int]]  # texts and the numbers of their classes


@validate_call
def make_loss(
    class_weights: list[float],
    label_smoothing: BelowOne = 0.0,
    lm_weight: Amount = 0.0,
    run: Callable[..., Tensor] = run_block,
) -> Loss:
    """Return the loss of a micro-batch, to be divided by the step's `step_targets`.

    `class_weights` (K,) weigh the examples of each class. `label_smoothing` is the share of
    certainty spread over all classes. `lm_weight` weighs the loss of the next token, averaged over
    the step's tokens, against that of the class, averaged over its examples. `run` is
    that of `GPT.hidden_states`.
    """

    weight = torch.tensor(class_weights)

    def loss_of(model: Classifier, batch: Batch) -> Tensor:
        input_ids, lengths, labels = batch["input_ids"], batch["lengths"], batch["labels"]
        hidden_states = model.hidden_states(input_ids, row_seeds=batch.get("row_seeds"), run=run)
        loss = F.cross_entropy(
            model.classify(hidden_states, lengths),
            labels,
            weight=weight.to(labels.device, non_blocking=True),
            label_smoothing=label_smoothing,
            reduction="sum",
        )
        if not lm_weight:
            return loss
        nats = next_token_nats(model, hidden_states, input_ids, lengths)
        share = batch["step_targets"] / batch["step_tokens"]
        return loss + lm_weight * share * nats

    return loss_of


def next_token_nats(
    model: Classifier, hidden_states: Tensor, input_ids: Tensor, lengths: Tensor
) -> Tensor:
    """Return the summed cross-entropy of every token of texts (B, T) but their first."""
    positions = torch.arange(1, input_ids.size(1), device=lengths.device)
    targets = input_ids[:, 1:].masked_fill(positions >= lengths[:, None], -100)
    return summed_cross_entropy(model, hidden_states[:, :-1], targets)


class ClassifyModule(StageModule):
    """A classifier in training; the test sets are scored once, after training.

    `data` has the labels, the class weights and the text sets. `layers` are those that are trained:
    all, head, or last_1, last_2, ...
    """

    model: Classifier

    def __init__(
        self,
        model: GPT,
        *,
        data: Any,
        layers: str = "all",
        label_smoothing: float = 0.0,
        lm_weight: float = 0.0,
        **kwargs: Any,
    ) -> None:
        classifier = Classifier.from_model(model, len(data.labels))
        train_layers(classifier, layers)
        super().__init__(classifier, **kwargs)
        self.data = data
        run = block_runner(self.compiled, self.recompute)
        self.loss = make_loss(
            data.weights, label_smoothing=label_smoothing, lm_weight=lm_weight, run=run
        )

    def measure(self) -> dict[str, Any]:
        """Return the metrics of the trained model on the test sets, on the training's device."""
        model = self.model.to(self.trainer.strategy.root_device)
        return measure(model, self.tokenizer, self.data.labels, self.data.text_sets())

    def summed_loss(self, batch: Batch) -> Tensor:
        """Return the loss of texts `input_ids` (B, T) as a scalar."""
        return self.loss(self.model, batch)

    def scores(self, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the cross-entropy in nats, and whether the class is right, of texts (B, T)."""
        labels = batch["labels"]  # (B,), -100 = not scored
        logits = self.model.class_logits(batch["input_ids"], batch["lengths"])
        nats = F.cross_entropy(logits.float(), labels, reduction="none")
        hits, scored = logits.argmax(-1) == labels, labels != -100
        return {"loss": (nats, scored), "accuracy": (hits, scored)}


def measure(
    model: Classifier,
    tokenizer: Tokenizer,
    labels: Sequence[str],
    text_sets: Mapping[str, TextSet],
) -> dict[str, Any]:
    """Return a trained classifier's scores, and those of the baselines, for the summary.

    The baselines learn from the set "train"; all others are tests. Of the set "test" the confusion
    matrix and mistakes are returned too.
    """
    facts: dict[str, Any] = {"labels": list(labels)}
    for name, (texts, numbers) in text_sets.items():
        if name == "train":
            continue
        probabilities = class_probabilities(model, tokenizer, texts).numpy()
        confusion = confusion_matrix(numbers, probabilities.argmax(-1), len(labels))
        by_method = baselines(*text_sets["train"], texts, numbers, len(labels))
        named = {f"baseline_{method}_{name}": found for method, found in by_method.items()}
        for prefix, metrics in {name: scores(confusion), **named}.items():
            facts |= {f"{prefix}_{key}": value for key, value in metrics.items()}
        if name == "test":
            facts["confusion"] = confusion.tolist()
            facts["mistakes"] = mistakes((texts, numbers), probabilities, labels)
    return facts


def mistakes(
    text_set: TextSet, probabilities: np.ndarray, labels: Sequence[str]
) -> list[dict[str, Any]]:
    """Return the misclassified texts, by (N, K) probabilities, the most confident first."""
    (texts, numbers), predicted = text_set, probabilities.argmax(-1)
    surest = probabilities.max(-1)
    wrong = [i for i in np.argsort(-surest, kind="stable") if predicted[i] != numbers[i]]
    return [
        {
            "text": texts[i][:MISTAKE_CHARS],
            "label": labels[numbers[i]],
            "predicted": labels[predicted[i]],
            "probability": float(surest[i]),
        }
        for i in wrong[:MAX_MISTAKES]
    ]
