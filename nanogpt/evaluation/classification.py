"""Accuracy, macro-F1 and confusion of classes, and the scores of simple methods.

K classes, N texts; a confusion matrix has a row per true class and a column per predicted one.
"""

import re
from collections.abc import Sequence
from itertools import accumulate, chain
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nanogpt.checkpoint import Checkpoint
from nanogpt.classifier import Classifier, class_probabilities
from nanogpt.data.labelled import LabelledTexts
from nanogpt.evaluation.results import CONFUSION, Results, align, mean_and_error, reduced_confusion
from nanogpt.text import print_line

WORD = re.compile(r"\w+")
RIDGE = 1.0  # scikit-learn's C=1: half of it times the squared weights joins the summed loss
MAX_ITERATIONS = 100


def evaluate(
    checkpoint: Checkpoint, data: Path, limit: int | None, text_column: str, label_column: str
) -> Results:
    """Score a classifier on a labelled .tsv, .csv or .jsonl file; print the confusion.

    Raises ValueError for a language model and for unknown labels.
    """
    model, labels = checkpoint.model, checkpoint.labels
    if labels is None or not isinstance(model, Classifier):
        raise ValueError(
            f"{checkpoint.path} is a language model (stage {checkpoint.stage}) and names no "
            "classes; pass a checkpoint of stage=classify"
        )
    examples = LabelledTexts(data, text_column, label_column).examples()[:limit]
    if unknown := sorted({example.label for example in examples} - set(labels)):
        raise ValueError(
            f"{data} has the label {unknown[0]!r} and the checkpoint knows {', '.join(labels)}; "
            "pass a file with these labels"
        )
    numbers = [labels.index(example.label) for example in examples]
    texts = [example.text for example in examples]
    read = (checkpoint.tokenizer, texts, checkpoint.around)
    predicted = class_probabilities(model, *read).argmax(-1).tolist()
    confusion = confusion_matrix(numbers, predicted, len(labels))
    most_frequent = [int(np.bincount(numbers).argmax())] * len(numbers)
    majority = confusion_matrix(numbers, most_frequent, len(labels))
    names, shown = reduced_confusion(labels, confusion)
    counts = [[name, *map(str, row)] for name, row in zip(names, shown, strict=True)]
    printed = align([["true \\ predicted", *names], *counts])
    print_line(f"{checkpoint.path}\n{printed}\n")
    return {
        **scores(confusion),
        **mean_and_error("accuracy", np.equal(predicted, numbers)),
        **{f"baseline_majority_{name}": value for name, value in scores(majority).items()},
        "examples": float(len(examples)),
        **{
            f"{CONFUSION}{label}_as_{other}": float(confusion[i, j])
            for i, label in enumerate(labels)
            for j, other in enumerate(labels)
        },
    }


def confusion_matrix(labels: Sequence[int], predicted: Sequence[int], n_labels: int) -> np.ndarray:
    """Return how many texts of each class were predicted as each class, (K, K) int64."""
    confusion = np.zeros((n_labels, n_labels), dtype=np.int64)
    np.add.at(confusion, (np.asarray(labels), np.asarray(predicted)), 1)
    return confusion


def scores(confusion: np.ndarray) -> dict[str, float]:
    """Return accuracy and macro-F1 of a confusion matrix (K, K).

    Macro-F1 is the plain mean over the classes that occur, as truth or as prediction, of
    2 TP / (2 TP + FP + FN); with rare classes it falls where accuracy does not. (torchmetrics has
    both; its import takes longer than most evaluations of a classifier.)
    """
    hits = np.diag(confusion)
    either = confusion.sum(0) + confusion.sum(1)  # 2 TP + FP + FN
    f1 = 2 * hits[either > 0] / either[either > 0]
    return {"accuracy": float(hits.sum() / confusion.sum()), "macro_f1": float(f1.mean())}


def bag_of_words(
    train_texts: Sequence[str], train_labels: Sequence[int], texts: Sequence[str], n_labels: int
) -> Tensor:
    """Return the logits (N, K) of multinomial logistic regression on the counts of words.

    The order of words does not matter. Fitted to the optimum by L-BFGS, without random numbers.
    """
    vocabulary = sorted({word for text in train_texts for word in WORD.findall(text.lower())})
    numbers = {word: i for i, word in enumerate(vocabulary)}

    def bags(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return the numbers of all known words (W,), and where each text begins (N,)."""
        known = [[numbers[w] for w in WORD.findall(t.lower()) if w in numbers] for t in texts]
        starts = [0, *accumulate(map(len, known))][:-1]
        return torch.tensor([*chain(*known)], dtype=torch.int64), torch.tensor(starts)

    weight = torch.zeros(len(numbers), n_labels, requires_grad=True)
    bias = torch.zeros(n_labels, requires_grad=True)
    (words, starts), labels = bags(train_texts), torch.tensor(train_labels)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=MAX_ITERATIONS, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits = F.embedding_bag(words, weight, starts, mode="sum") + bias
        loss = F.cross_entropy(logits, labels, reduction="sum")
        loss = loss + RIDGE / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(loss)
    words, starts = bags(texts)
    return (F.embedding_bag(words, weight, starts, mode="sum") + bias).detach()


def baselines(
    train_texts: Sequence[str],
    train_labels: Sequence[int],
    texts: Sequence[str],
    labels: Sequence[int],
    n_labels: int,
) -> dict[str, dict[str, float]]:
    """Return the scores on some texts of simple methods that learn from others."""
    majority = [int(np.bincount(train_labels).argmax())] * len(texts)
    by_words = bag_of_words(train_texts, train_labels, texts, n_labels).argmax(-1).tolist()
    return {
        name: scores(confusion_matrix(labels, predicted, n_labels))
        for name, predicted in (("majority", majority), ("bag_of_words", by_words))
    }
