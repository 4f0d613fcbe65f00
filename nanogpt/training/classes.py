"""What a report tells of a classifier: its scores beside the baselines', confusion, mistakes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nanogpt.evaluation.classification import reduced_confusion
from nanogpt.training.page import details, escape, section

CELL, MARGIN, TOP = 64, 116, 34  # of the picture, in pixels
MOST_CLASSES = 20  # in a picture
LABEL_CHARS = 14

METHODS = {
    "": "this model",
    "baseline_bag_of_words_": "bag of words",
    "baseline_majority_": "majority",
}
TESTS = {"test": "test", "imbalanced": "imbalanced test"}
MEASURES = {"accuracy": "accuracy", "macro_f1": "macro-F1"}

# keys of the summary that this section tells
TOLD_OF_CLASSES = {"labels", "confusion", "mistakes"} | {
    f"{method}{test}_{measure}" for method in METHODS for test in TESTS for measure in MEASURES
}


def classes_section(summary: Mapping[str, Any]) -> str:
    """Return the section of a classifier's summary, nothing for another's."""
    if "confusion" not in summary:
        return ""
    labels, confusion = summary["labels"], summary["confusion"]
    body = f'<div class="pair"><div class="card">{scores_table(summary)}</div>'
    names, shown = reduced_confusion(labels, np.array(confusion), MOST_CLASSES)
    body += f"<figure>{confusion_picture(names, shown.tolist())}</figure></div>"
    body += mistakes_table(summary["mistakes"])
    n = sum(map(sum, confusion))
    return section("Classes", body, f"on {n:,} test examples, looked at once, after training")


def scores_table(summary: Mapping[str, Any]) -> str:
    """Return the scores of the model and the baselines, a row each."""
    tests = [test for test in TESTS if f"{test}_accuracy" in summary]
    head = "".join(
        f'<th scope="col">{TESTS[test]} {measure}</th>'
        for test in tests
        for measure in MEASURES.values()
    )
    rows = ""
    for prefix, method in METHODS.items():
        cells = "".join(
            f"<td>{share(summary[f'{prefix}{test}_{measure}'])}</td>"
            for test in tests
            for measure in MEASURES
        )
        rows += f'<tr><th scope="row" style="white-space: nowrap">{method}</th>{cells}</tr>'
    return f'<table class="numbers"><tr><th></th>{head}</tr>{rows}</table>'


def confusion_picture(labels: Sequence[str], confusion: Sequence[Sequence[int]]) -> str:
    """Return an `<svg>` with a row per true class and a column per predicted one.

    A cell is as dark as its share of the row.
    """
    names = [name if len(name) <= LABEL_CHARS else f"{name[: LABEL_CHARS - 1]}…" for name in labels]
    width, height = MARGIN + CELL * len(names) + 8, TOP + CELL * len(names) + 26
    parts = []
    for i, (name, row) in enumerate(zip(names, confusion, strict=True)):
        parts.append(_text(MARGIN - 10, TOP + CELL * (i + 0.5), name, "end"))
        parts.append(_text(MARGIN + CELL * (i + 0.5), TOP - 14, name))
        for j, count in enumerate(row):
            x, y, dark = MARGIN + CELL * j, TOP + CELL * i, count / max(sum(row), 1)
            parts.append(
                f'<rect x="{x + 1}" y="{y + 1}" width="{CELL - 2}" height="{CELL - 2}" rx="4" '
                f'fill="var(--accent)" fill-opacity="{0.04 + 0.5 * dark:.3f}"/>'
            )
            parts.append(_text(x + CELL / 2, y + CELL / 2, f"{count:,}"))
    parts.append(_text(width / 2, height - 8, "rows: true class, columns: predicted"))
    told = "; ".join(
        f"{label}: " + ", ".join(f"{n} as {other}" for n, other in zip(row, labels, strict=True))
        for label, row in zip(labels, confusion, strict=True)
    )
    return (
        f'<svg viewBox="0 0 {width} {height}" style="max-width: {width}px" role="img" '
        f'aria-label="{escape(f"Confusion matrix. {told}")}" fill="var(--ink)" font-size="12.5">'
        f"{''.join(parts)}</svg>"
    )


def mistakes_table(mistakes: Sequence[Mapping[str, Any]]) -> str:
    """Return the test examples that were put in a wrong class, folded."""
    if not mistakes:
        return ""
    rows = "".join(
        f"<tr><td>{escape(mistake['label'])}</td><td>{escape(mistake['predicted'])} "
        f"<small>{share(mistake['probability'])}</small></td><td>{escape(mistake['text'])}</td></tr>"
        for mistake in mistakes
    )
    head = (
        '<tr><th scope="col">class</th><th scope="col">taken for</th><th scope="col">text</th></tr>'
    )
    table = f'<div class="card"><table>{head}{rows}</table></div>'
    return details(f"{len(mistakes)} mistakes, the surest first", table)


def share(part: float) -> str:
    """Return e.g. `97.5 %`, with the decimal that tells classifiers apart."""
    return f"{100 * part:.1f} %"


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" dominant-baseline="central">'
        f"{escape(text)}</text>"
    )
