"""Accuracy, macro-F1 and the confusion of classes, and what simple methods reach beside.

K classes, N texts; a confusion matrix has a row per true class and a column per predicted one.
"""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

WORD = re.compile(r"\w+")
RIDGE = (
    1.0  # half of it times the squared weights is added to the summed loss, as scikit-learn's C=1
)
MAX_ITERATIONS = 100


def confusion_matrix(labels: Sequence[int], predicted: Sequence[int], n_labels: int) -> np.ndarray:
    """Return how many texts of each class were taken for each class, (K, K) int64."""
    confusion = np.zeros((n_labels, n_labels), dtype=np.int64)
    np.add.at(confusion, (np.asarray(labels), np.asarray(predicted)), 1)
    return confusion


def scores(confusion: np.ndarray) -> dict[str, float]:
    """Return accuracy and macro-F1 of a confusion matrix.

    Macro-F1 is the plain mean over the classes that occur, as truth or as prediction, of
    2 TP / (2 TP + FP + FN); with rare classes it falls where accuracy does not.
    """
    hits = np.diag(confusion)
    either = confusion.sum(0) + confusion.sum(1)  # 2 TP + FP + FN
    f1 = 2 * hits[either > 0] / either[either > 0]
    return {"accuracy": float(hits.sum() / confusion.sum()), "macro_f1": float(f1.mean())}


def majority_class(labels: Sequence[int]) -> int:
    """Return the most frequent class, the first of several."""
    counts = Counter(labels)
    return min(counts, key=lambda label: (-counts[label], label))


class BagOfWords:
    """Multinomial logistic regression on the counts of words: the baseline to beat.

    It knows no order of words. Fitted to the optimum by L-BFGS, without random numbers.
    """

    def __init__(self, texts: Sequence[str], labels: Sequence[int], n_labels: int) -> None:
        seen = sorted({word for text in texts for word in words(text)})
        self.column = {word: i for i, word in enumerate(seen)}
        self.weight = torch.zeros(len(seen), n_labels, requires_grad=True)
        self.bias = torch.zeros(n_labels, requires_grad=True)
        self._fit(self._counts(texts), torch.tensor(labels))

    def predict(self, texts: Sequence[str]) -> list[int]:
        """Return the likeliest class of each text."""
        with torch.no_grad():
            predicted: list[int] = self._logits(self._counts(texts)).argmax(-1).tolist()
        return predicted

    def _fit(self, counts: Tensor, labels: Tensor) -> None:
        optimizer = torch.optim.LBFGS(
            [self.weight, self.bias], max_iter=MAX_ITERATIONS, line_search_fn="strong_wolfe"
        )

        def loss() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(self._logits(counts), labels, reduction="sum")
            loss = loss + RIDGE / 2 * self.weight.square().sum()
            loss.backward()
            return loss

        with torch.enable_grad():
            optimizer.step(loss)

    def _logits(self, counts: Tensor) -> Tensor:
        return torch.sparse.mm(counts, self.weight) + self.bias  # (N, K)

    def _counts(self, texts: Sequence[str]) -> Tensor:
        """Return how often each known word is in each text, (N, words) sparse."""
        cells = Counter(
            (i, self.column[word])
            for i, text in enumerate(texts)
            for word in words(text)
            if word in self.column
        )
        index = torch.tensor(list(cells), dtype=torch.int64).view(-1, 2).T
        values = torch.tensor(list(cells.values()), dtype=torch.float32)
        size = (len(texts), len(self.column))
        return torch.sparse_coo_tensor(index, values, size, check_invariants=True).coalesce()


def words(text: str) -> list[str]:
    """Return the runs of letters, digits and underscores of a text, in lower case."""
    return WORD.findall(text.lower())


def baselines(
    train_texts: Sequence[str],
    train_labels: Sequence[int],
    texts: Sequence[str],
    labels: Sequence[int],
    n_labels: int,
) -> dict[str, dict[str, float]]:
    """Return the scores on some texts of what simple methods learn from others."""
    predictions = {
        "majority": [majority_class(train_labels)] * len(texts),
        "bag_of_words": BagOfWords(train_texts, train_labels, n_labels).predict(texts),
    }
    return {
        name: scores(confusion_matrix(labels, predicted, n_labels))
        for name, predicted in predictions.items()
    }
