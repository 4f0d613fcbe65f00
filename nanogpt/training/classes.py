"""What a report tells of a classifier: its scores beside the baselines', confusion, mistakes."""

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nanogpt.evaluation.classification import reduced_confusion
from nanogpt.training.page import details, escape, section

CELL, MARGIN, TOP = 64, 116, 34  # of the picture, in pixels
SLANTED_TOP, SLANTED_RIGHT = 92, 52  # where a name is too long for its column
COLUMN_CHARS = 8  # that fit above a cell
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
    picture = confusion_picture(names, shown.tolist())
    body += f'<figure class="centred">{picture}</figure></div>'
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
    names = [_shortened(name) for name in labels]
    slant = -40 if max(map(_columns, names)) > COLUMN_CHARS else 0
    top, right = (SLANTED_TOP, SLANTED_RIGHT) if slant else (TOP, 8)
    width, height = MARGIN + CELL * len(names) + right, top + CELL * len(names) + 26
    parts = []
    for i, (name, row) in enumerate(zip(names, confusion, strict=True)):
        parts.append(_text(MARGIN - 10, top + CELL * (i + 0.5), name, "end"))
        parts.append(_heading(MARGIN + CELL * (i + 0.5), top - 14, name, slant))
        for j, count in enumerate(row):
            x, y, dark = MARGIN + CELL * j, top + CELL * i, count / max(sum(row), 1)
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
    table = f'<div class="card"><table class="wide">{head}{rows}</table></div>'
    return details(f"{len(mistakes)} mistakes, the surest first", table)


def share(part: float) -> str:
    """Return e.g. `97.5 %`, with the decimal that tells classifiers apart."""
    return f"{100 * part:.1f} %"


def _columns(text: str) -> int:
    """Return the width of a text in characters of a fixed-width font."""
    return sum(1 + (unicodedata.east_asian_width(character) in "WF") for character in text)


def _shortened(name: str) -> str:
    if _columns(name) <= LABEL_CHARS:
        return name
    while _columns(name) >= LABEL_CHARS:
        name = name[:-1]
    return f"{name}…"


def _heading(x: float, y: float, text: str, slant: int) -> str:
    if not slant:
        return _text(x, y, text)
    return f'<g transform="rotate({slant} {x:g} {y:g})">{_text(x, y, text, "start")}</g>'


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" dominant-baseline="central">'
        f"{escape(text)}</text>"
    )
