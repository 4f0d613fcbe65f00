"""Measure checkpoints side by side.

    python -m nanogpt.evaluate CHECKPOINT [CHECKPOINT ...] --task classify --data FILE [--json OUT]

CHECKPOINT is a .ckpt, a run directory, or the name of a run under runs/. A task is one function
from a checkpoint and the options to figures by name; `TASKS` lists them.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nanogpt.checkpoint import Checkpoint, load_checkpoint
from nanogpt.classifier import Classifier, class_probabilities
from nanogpt.data.labelled import read_examples
from nanogpt.data.splits import Example
from nanogpt.evaluation.classification import confusion_matrix, majority_class, scores

Results = dict[str, float]
Row = dict[str, Any]  # {"checkpoint", "task", "results"}, as in the JSON file


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    options = parser().parse_args(arguments)
    try:
        if options.json is not None and not options.json.parent.is_dir():
            raise FileNotFoundError(f"--json {options.json}: there is no folder for it; make one")
        rows = [row(reference, options) for reference in options.checkpoints]
        print(table(rows))
        if options.json is not None:
            options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    except (ValueError, OSError, RuntimeError, AssertionError) as error:  # torch's, without CUDA
        print(f"nanogpt.evaluate: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def row(reference: str, options: argparse.Namespace) -> Row:
    """Return what a task makes of one checkpoint."""
    checkpoint = load_checkpoint(reference, device=options.device, runs_dir=options.runs_dir)
    results = TASKS[options.task](checkpoint, options)
    return {"checkpoint": str(reference), "task": options.task, "results": results}


def classify(checkpoint: Checkpoint, options: argparse.Namespace) -> Results:
    """Score a classifier on a labelled file: accuracy, macro-F1, and the majority class beside."""
    if options.data is None:
        raise ValueError("--task classify needs --data FILE, a labelled .tsv, .csv or .jsonl file")
    model, labels = checkpoint.model, checkpoint.labels
    if labels is None or not isinstance(model, Classifier):
        raise ValueError(
            f"{checkpoint.path} is a language model (stage {checkpoint.stage}) and names no "
            "classes; pass a checkpoint of stage=classify"
        )
    examples = read_examples(options.data, options.text_column, options.label_column)
    numbers = class_numbers(examples, labels, options.data)
    texts = [example.text for example in examples]
    predicted = class_probabilities(model, checkpoint.tokenizer, texts).argmax(-1).tolist()
    guessed = [majority_class(numbers)] * len(numbers)
    results = scores(confusion_matrix(numbers, predicted, len(labels)))
    beside = scores(confusion_matrix(numbers, guessed, len(labels)))
    majority = {f"baseline_majority_{name}": value for name, value in beside.items()}
    return {**results, **majority, "examples": float(len(examples))}


def class_numbers(examples: Sequence[Example], labels: Sequence[str], path: Path) -> list[int]:
    """Return the number of each example's class among `labels`."""
    unknown = sorted({example.label for example in examples} - set(labels))
    if unknown:
        raise ValueError(
            f"{path} has the label {unknown[0]!r} and the checkpoint knows {', '.join(labels)}; "
            "pass a file with these labels"
        )
    return [labels.index(example.label) for example in examples]


TASKS: Mapping[str, Callable[[Checkpoint, argparse.Namespace], Results]] = {"classify": classify}


def table(rows: Sequence[Row]) -> str:
    """Return the figures as text, a line per checkpoint."""
    names = list(dict.fromkeys(name for row in rows for name in row["results"]))
    cells = [["checkpoint", "task", *names]]
    for one in rows:
        figures = [_figure(one["results"].get(name)) for name in names]
        cells.append([one["checkpoint"], one["task"], *figures])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    )


def _figure(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if value > 1 and value.is_integer() else f"{value:.4f}"


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    parser = argparse.ArgumentParser(
        prog="python -m nanogpt.evaluate", description="Measure checkpoints side by side."
    )
    parser.add_argument(
        "checkpoints", nargs="+", metavar="CHECKPOINT", help="a .ckpt, a run, or a run's name"
    )
    parser.add_argument("--task", required=True, choices=sorted(TASKS))
    parser.add_argument("--data", type=Path, help="the file to score")
    parser.add_argument("--text-column", default="text", help="of the file (default text)")
    parser.add_argument("--label-column", default="label", help="of the file (default label)")
    parser.add_argument("--json", type=Path, help="a file to write the figures to")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda", "mps"))
    parser.add_argument(
        "--runs-dir",
        default=os.environ.get("NANOGPT_RUNS_DIR", "runs"),
        help="where runs lie (default runs, or NANOGPT_RUNS_DIR)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
