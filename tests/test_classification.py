"""Scores of classification, by hand, and what the baselines learn."""

import numpy as np
import pytest

from nanogpt.evaluation.classification import (
    bag_of_words,
    baselines,
    confusion_matrix,
    scores,
)
from nanogpt.evaluation.results import reduced_confusion


def test_a_confusion_matrix_has_a_row_per_true_class() -> None:
    confusion = confusion_matrix([0, 0, 0, 1], [0, 1, 1, 1], 2)
    assert confusion.tolist() == [[1, 2], [0, 1]]


def test_accuracy_and_macro_f1_by_hand() -> None:
    # Class 0: TP 1, FP 0, FN 2, F1 1/2. Class 1: TP 1, FP 2, FN 0, F1 1/2.
    assert scores(np.array([[1, 2], [0, 1]])) == {"accuracy": 0.5, "macro_f1": 0.5}


def test_macro_f1_falls_where_a_rare_class_is_never_found() -> None:
    # Class 0: 2 * 98 / (2 * 98 + 2); class 1: 0.
    metrics = scores(np.array([[98, 0], [2, 0]]))
    assert metrics["accuracy"] == pytest.approx(0.98)
    assert metrics["macro_f1"] == pytest.approx((196 / 198 + 0) / 2)


def test_a_class_that_never_occurs_does_not_count() -> None:
    assert scores(np.diag([3, 0, 2]))["macro_f1"] == 1.0


TEXTS = ["free prize now", "win a free prize", "see you at home", "at home now"]


def predicted(texts: list[str], labels: list[int], new: list[str], n_labels: int) -> list[int]:
    return list(bag_of_words(texts, labels, new, n_labels).argmax(-1).tolist())


def test_a_bag_of_words_learns_the_words_of_each_class() -> None:
    new = ["a PRIZE!", "home", "free free home"]
    assert predicted(TEXTS, [1, 1, 0, 0], new, 2) == [1, 0, 1]


def test_a_bag_of_words_is_at_its_optimum() -> None:
    # At the minimum the gradient of the bias is zero: predicted and true class totals agree.
    totals = bag_of_words(TEXTS, [1, 1, 1, 0], TEXTS, 2).softmax(-1).sum(0)
    assert totals.tolist() == pytest.approx([1.0, 3.0], abs=1e-3)


def test_a_bag_of_words_guesses_by_frequency_where_it_knows_no_word() -> None:
    assert predicted(TEXTS, [1, 1, 1, 0], ["unseen", ""], 2) == [1, 1]


def test_several_classes_are_distinguished() -> None:
    assert predicted(["red", "green", "blue"], [0, 1, 2], ["blue", "red", "green"], 3) == [2, 0, 1]


def test_the_majority_baseline_has_the_accuracy_of_its_share() -> None:
    metrics = baselines(TEXTS, [1, 1, 1, 0], ["free", "home", "home"], [1, 0, 0], 2)
    assert metrics["majority"]["accuracy"] == pytest.approx(1 / 3)
    assert metrics["majority"]["macro_f1"] == pytest.approx((2 / 4 + 0) / 2)
    ties = baselines(TEXTS, [1, 1, 0, 0], ["free", "home", "home"], [1, 0, 0], 2)
    assert ties["majority"]["accuracy"] == pytest.approx(2 / 3)  # of the first class


def test_a_reduced_confusion_keeps_the_classes_with_the_most_mistakes() -> None:
    confusion = np.array([[9, 0, 0, 1], [0, 8, 0, 0], [0, 0, 7, 4], [0, 0, 0, 6]])
    labels, reduced = reduced_confusion(["a", "b", "c", "d"], confusion, 3)
    assert labels == ["c", "d", "2 others"]
    assert reduced.tolist() == [[7, 4, 0], [0, 6, 0], [0, 1, 17]]
    assert reduced_confusion(["a", "b", "c", "d"], confusion, 4)[1] is confusion
