"""The tasks of `python -m nanogpt.evaluate`: functions from a checkpoint to metrics.

The parameters of a task after the checkpoint are the options of the command that it reads; those
without None are required. A first one that is no option, such as `options`, is all of them.
"""

import gzip
import inspect
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from nanogpt.build import locate
from nanogpt.checkpoint import Checkpoint
from nanogpt.classifier import Classifier, class_probabilities
from nanogpt.data.corpus import MANIFEST, open_corpus
from nanogpt.data.instructions import Conversation, Instructions
from nanogpt.data.labelled import read_examples
from nanogpt.data.pretokenized import TokenShards
from nanogpt.data.records import PASS_OVER
from nanogpt.data.text import TextFiles
from nanogpt.evaluation import hellaswag, instructions, judge, lambada, perplexity
from nanogpt.evaluation.classification import confusion_matrix, majority_class, scores
from nanogpt.evaluation.examples import Benchmark, find_benchmark
from nanogpt.evaluation.processes import rank_zero_first
from nanogpt.evaluation.results import (
    CONFUSION,
    Results,
    align,
    reduced_confusion,
    run_dir_of,
    with_published,
)
from nanogpt.runs.directory import read_config
from nanogpt.text import print_line

MAX_GZIP_BYTES = 64 * 2**20  # of a text that is compressed for comparison
SHARDS = (".bin", ".npy")

Task = Callable[..., Results]


def run_hellaswag(
    checkpoint: Checkpoint, data: Path | None, limit: int | None, batch_size: int, data_dir: Path
) -> Results:
    """Score HellaSwag, and return the published metrics of GPT-2 with it."""
    check_language_model(checkpoint)
    items = hellaswag.read_items(benchmark_path(hellaswag.BENCHMARK, data, data_dir), limit)
    results = hellaswag.evaluate(checkpoint.model, checkpoint.tokenizer, items, batch_size)
    return with_published(results, hellaswag.PUBLISHED)


def run_lambada(
    checkpoint: Checkpoint, data: Path | None, limit: int | None, batch_size: int, data_dir: Path
) -> Results:
    """Score the last words of LAMBADA."""
    check_language_model(checkpoint)
    passages = lambada.read_passages(benchmark_path(lambada.BENCHMARK, data, data_dir), limit)
    return lambada.evaluate(checkpoint.model, checkpoint.tokenizer, passages, batch_size)


def run_perplexity(
    checkpoint: Checkpoint,
    data: Path,
    limit: int | None,
    batch_size: int,
    stride: int | None,
    text_column: str,
    separator: str | None,
) -> Results:
    """Score text (.txt .md .py .jsonl .parquet) or token shards, and compress it with gzip."""
    check_language_model(checkpoint)
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    stride = max(model.config.block_size // 2, 1) if stride is None else stride
    tokens = prepared_tokens(data, checkpoint, limit)
    if tokens is None:
        texts = TextFiles(data, text_column, separator=separator).documents()
        with option_names():
            documents = [
                [tokenizer.eot_id, *tokenizer.encode(text or "")] for text in islice(texts, limit)
            ]
        tokens = np.array([token for ids in documents for token in ids], dtype=np.int64)
        if limit is not None and len(documents) == 1:  # counts windows instead
            tokens = tokens[: 1 + limit * stride]
    results = perplexity.evaluate(model, tokenizer, tokens, stride=stride, batch_size=batch_size)
    if 0 < results["bytes"] <= MAX_GZIP_BYTES:
        content = tokenizer.decode_bytes(tokens.tolist())
        bits = 8 * len(gzip.compress(content, 9, mtime=0)) / len(content)
        results["baseline_gzip_bits_per_byte"] = bits
    return results


def prepared_tokens(path: Path, checkpoint: Checkpoint, limit: int | None) -> np.ndarray | None:
    """Return the tokens (N,) of shards, of a corpus those held out; None where `path` holds text.

    Raises ValueError for a limit, and for tokens of another tokenizer.
    """
    tokenizer = checkpoint.tokenizer
    files = path.iterdir() if path.is_dir() else [path]
    is_corpus = (path / MANIFEST).is_file()
    if not is_corpus and not any(file.suffix in SHARDS for file in files):
        return None
    if limit is not None:
        raise ValueError(f"--limit counts documents and {path} holds tokens; leave it out")
    with option_names():
        corpus = (
            open_corpus(path) if is_corpus else TokenShards(path).open(tokenizer, tokenizer.name)
        )
    if corpus.tokenizer.fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"{path} has tokens of {corpus.tokenizer.name} and {checkpoint.path} another "
            f"tokenizer ({tokenizer.name}); pass the text itself"
        )
    parts = [corpus.val] if path.is_dir() else [corpus.train, corpus.val]
    return np.concatenate([part.read(0, len(part)) for part in parts])


def run_classify(
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
    with option_names():
        examples = read_examples(data, text_column, label_column)[:limit]
    if unknown := sorted({example.label for example in examples} - set(labels)):
        raise ValueError(
            f"{data} has the label {unknown[0]!r} and the checkpoint knows {', '.join(labels)}; "
            "pass a file with these labels"
        )
    if is_training_data(checkpoint, data):
        print(
            f"nanogpt.evaluate: {checkpoint.path} was trained on {data}, so these metrics are not "
            "those of unseen texts; the run's summary.json has the test split's",
            file=sys.stderr,
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


def is_training_data(checkpoint: Checkpoint, path: Path) -> bool:
    """Return whether a file is the one that the checkpoint's run took its splits from."""
    run_dir = run_dir_of(checkpoint.path)
    with suppress(OSError, ValueError, TypeError, KeyError):
        return run_dir is not None and os.path.samefile(
            read_config(run_dir / "config.yaml")["data"]["path"], path
        )
    return False


def run_instructions(
    checkpoint: Checkpoint, data: Path, limit: int | None, batch_size: int, max_new_tokens: int
) -> Results:
    """Measure the replies to a .jsonl or .json file of instructions and responses."""
    conversations = read_conversations(data, limit)
    return instructions.evaluate(
        checkpoint, conversations, max_new_tokens=max_new_tokens, batch_size=batch_size
    )


def run_judge(
    checkpoint: Checkpoint,
    judge_url: str,
    judge_model: str,
    judge_key: str | None,
    data: Path,
    limit: int | None,
    max_new_tokens: int,
    answers: Path | None,
) -> Results:
    """Let another model score the replies to a file of instructions and responses.

    Raises FileNotFoundError where the answers have no folder.
    """
    if answers is None:
        answers = (run_dir_of(checkpoint.path) or checkpoint.path.parent) / "judge.jsonl"
    if not answers.parent.is_dir():
        raise FileNotFoundError(f"--answers {answers}: there is no folder for it; make one")
    conversations = read_conversations(data, limit)
    key = judge.environment_key(judge_url) if judge_key is None else judge_key
    other = judge.Judge(judge_url, judge_model, key.strip())  # of a file's line end
    return judge.evaluate(checkpoint, conversations, other, answers, max_new_tokens=max_new_tokens)


def read_conversations(data: Path, limit: int | None) -> list[Conversation]:
    """Return the conversations of an instruction set; raises ValueError where it has none."""
    with option_names():
        found = Instructions(data, max_examples=limit).conversations
    if not found:
        raise ValueError(f"{data} has no conversations; pass instructions and responses")
    return found


def run_harness(
    checkpoint: Checkpoint,
    limit: int | None,
    batch_size: int,
    harness_tasks: str,
    include_path: Path | None,
) -> Results:
    """Run tasks of lm-evaluation-harness, with commas between their names."""
    from nanogpt.evaluation.harness import evaluate

    check_language_model(checkpoint)
    return evaluate(
        checkpoint,
        harness_tasks.split(","),
        include_path=include_path,
        limit=limit,
        batch_size=batch_size,
    )


TASKS: dict[str, Task] = {
    "hellaswag": run_hellaswag,
    "lambada": run_lambada,
    "perplexity": run_perplexity,
    "classify": run_classify,
    "instructions": run_instructions,
    "judge": run_judge,
    "harness": run_harness,
}
SHARED = {"hellaswag", "lambada", "perplexity"}  # tasks whose work several processes share


def find_task(name: str) -> Task:
    """Return the task of a name or of a function's import path; raises ValueError for neither."""
    if name in TASKS:
        return TASKS[name]
    if "." not in name:
        raise ValueError(
            f"there is no task {name}; it is one of {', '.join(sorted(TASKS))}, or the import path "
            "of a function, such as my_package.tasks.my_task"
        )
    task: Task = locate(name, name)
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


def benchmark_path(benchmark: Benchmark, data: Path | None, data_dir: Path) -> Path:
    """Return the file of a benchmark: the given one, else the hub's."""
    with rank_zero_first():
        return find_benchmark(benchmark, data_dir) if data is None else data


def check_language_model(checkpoint: Checkpoint) -> None:
    """Raise ValueError for a classifier, whose next tokens mean nothing."""
    if checkpoint.labels is not None:
        raise ValueError(
            f"{checkpoint.path} is a classifier of {', '.join(checkpoint.labels)} and this task "
            "scores language models; pass a checkpoint of stage=pretrain or instruct, or "
            "--task classify"
        )


@contextmanager
def option_names() -> Iterator[None]:
    """Replace keys of training's configuration by this command's options in errors on data.

    Raises the ValueError or FileNotFoundError of its block with another message.
    """
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        text = str(error).replace("data.path=", "--data ").replace(f", {PASS_OVER}", "")
        text = text.replace("data.text_column=", "--text-column ")
        kind = ValueError if isinstance(error, ValueError) else FileNotFoundError
        raise kind(text) from error
