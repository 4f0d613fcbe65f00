"""The tasks of `python -m nanogpt.evaluate`: functions from a checkpoint to metrics.

The parameters of a task after the checkpoint are the options of the command that it reads; those
without None are required. A first one that is no option, such as `options`, is all of them.
"""

import inspect
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nanogpt.build import locate
from nanogpt.checkpoint import Checkpoint
from nanogpt.classifier import Classifier, class_probabilities
from nanogpt.data.labelled import LabelledTexts
from nanogpt.evaluation.classification import confusion_matrix, majority_class, scores
from nanogpt.evaluation.results import CONFUSION, Results, align, reduced_confusion
from nanogpt.text import print_line

Task = Callable[..., Results]

TASKS = {
    "classify": "nanogpt.evaluation.tasks.classify",
    "harness": "nanogpt.evaluation.harness.evaluate",
    "hellaswag": "nanogpt.evaluation.hellaswag.evaluate",
    "instructions": "nanogpt.evaluation.instructions.evaluate",
    "judge": "nanogpt.evaluation.judge.evaluate",
    "lambada": "nanogpt.evaluation.lambada.evaluate",
    "perplexity": "nanogpt.evaluation.perplexity.evaluate",
}
SHARED = {"hellaswag", "lambada", "perplexity"}  # tasks whose work several processes share
OF_LANGUAGE_MODELS = {*SHARED, "harness"}


def find_task(name: str) -> Task:
    """Return the task of a name or of a function's import path; raises ValueError for neither."""
    if name not in TASKS and "." not in name:
        raise ValueError(
            f"there is no task {name}; it is one of {', '.join(TASKS)}, or the import path "
            "of a function, such as my_package.tasks.my_task"
        )
    task: Task = locate(TASKS.get(name, name), name)
    return task


def task_options(task: Task, options: Namespace) -> dict[str, Any]:
    """Return the options of the command that a task reads, by the names of its parameters.

    Raises ValueError for a missing one that is required, and for a parameter that is no option.
    """
    _, *parameters = inspect.signature(task).parameters.values()
    read: dict[str, Any] = {}
    for p in parameters:
        value = getattr(options, p.name, None)
        if not hasattr(options, p.name):
            if p is parameters[0]:
                read[p.name] = options
            elif p.default is p.empty:
                raise ValueError(f"--task {options.task}: its parameter {p.name} is no option")
        elif value is None and "None" not in str(p.annotation):
            option, (line, *_) = p.name.replace("_", "-"), (task.__doc__ or "").splitlines() or [""]
            raise ValueError(f"--task {options.task} needs --{option} ({line})")
        else:
            read[p.name] = value
    return read


def classify(
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
    predicted = class_probabilities(model, checkpoint.tokenizer, texts).argmax(-1).tolist()
    confusion = confusion_matrix(numbers, predicted, len(labels))
    majority = confusion_matrix(numbers, [majority_class(numbers)] * len(numbers), len(labels))
    names, shown = reduced_confusion(labels, confusion)
    counts = [[name, *map(str, row)] for name, row in zip(names, shown, strict=True)]
    printed = align([["true \\ predicted", *names], *counts])
    print_line(f"{checkpoint.path}\n{printed}\n")
    accuracy = scores(confusion)["accuracy"]
    return {
        **scores(confusion),
        "accuracy_stderr": (accuracy * (1 - accuracy) / max(len(numbers) - 1, 1)) ** 0.5,
        **{f"baseline_majority_{name}": value for name, value in scores(majority).items()},
        "examples": float(len(examples)),
        **{
            f"{CONFUSION}{label}_as_{other}": float(confusion[i, j])
            for i, label in enumerate(labels)
            for j, other in enumerate(labels)
        },
    }
