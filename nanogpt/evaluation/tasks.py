"""The tasks of `python -m nanogpt.evaluate`: from a checkpoint and the options to figures."""

import argparse
import gzip
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import yaml

from nanogpt.build import locate
from nanogpt.checkpoint import Checkpoint
from nanogpt.classifier import Classifier, class_probabilities
from nanogpt.data.corpus import MANIFEST, open_corpus
from nanogpt.data.instructions import Conversation, Instructions
from nanogpt.data.labelled import read_examples
from nanogpt.data.pretokenized import TokenShards
from nanogpt.data.records import PASS_OVER
from nanogpt.data.splits import Example
from nanogpt.data.text import TextFiles
from nanogpt.evaluation import hellaswag, instructions, lambada, perplexity
from nanogpt.evaluation.classification import (
    confusion_matrix,
    majority_class,
    scores,
)
from nanogpt.evaluation.examples import Benchmark, find_benchmark
from nanogpt.evaluation.judge import Judge, environment_key
from nanogpt.evaluation.judge import evaluate as ask_judge
from nanogpt.evaluation.processes import rank_zero_first
from nanogpt.evaluation.results import (
    CONFUSION,
    Results,
    align,
    reduced_confusion,
    run_dir_of,
    with_published,
)
from nanogpt.text import print_line

GZIP_BYTES = 64 * 2**20  # of a text, at most, are compressed for comparison
SHARDS = (".bin", ".npy")


@dataclass(frozen=True)
class Task:
    """How figures are made, `reads` being options that they depend on beside data and limit.

    Of a task that `shares_work` several processes are faster than one.
    """

    run: Callable[[Checkpoint, argparse.Namespace], Results]
    shares_work: bool = False
    reads: tuple[str, ...] = ()


def run_hellaswag(checkpoint: Checkpoint, options: argparse.Namespace) -> Results:
    """Score HellaSwag, the published figures of GPT-2 beside."""
    check_language_model(checkpoint)
    items = hellaswag.read_items(data_of(options, hellaswag.BENCHMARK), options.limit)
    results = hellaswag.evaluate(checkpoint.model, checkpoint.tokenizer, items, options.batch_size)
    return with_published(results, hellaswag.PUBLISHED)


def run_lambada(checkpoint: Checkpoint, options: argparse.Namespace) -> Results:
    """Score the last words of LAMBADA."""
    check_language_model(checkpoint)
    passages = lambada.read_passages(data_of(options, lambada.BENCHMARK), options.limit)
    return lambada.evaluate(checkpoint.model, checkpoint.tokenizer, passages, options.batch_size)


def run_perplexity(checkpoint: Checkpoint, options: argparse.Namespace) -> Results:
    """Score a text or prepared tokens, with what gzip needs beside."""
    check_language_model(checkpoint)
    path = data_of(options)
    tokens = read_tokens(path, checkpoint, options)
    results = perplexity.evaluate(
        checkpoint.model,
        checkpoint.tokenizer,
        tokens,
        stride=options.stride,
        batch_size=options.batch_size,
    )
    if 0 < results["bytes"] <= GZIP_BYTES:
        text = checkpoint.tokenizer.decode_bytes(tokens.tolist())
        bits = 8 * len(gzip.compress(text, 9, mtime=0)) / len(text)
        results["baseline_gzip_bits_per_byte"] = bits
    return results


def run_classify(checkpoint: Checkpoint, options: argparse.Namespace) -> Results:
    """Score a classifier on a labelled file: accuracy, macro-F1, and the majority class beside."""
    path = data_of(options)
    model, labels = checkpoint.model, checkpoint.labels
    if labels is None or not isinstance(model, Classifier):
        raise ValueError(
            f"{checkpoint.path} is a language model (stage {checkpoint.stage}) and names no "
            "classes; pass a checkpoint of stage=classify"
        )
    with in_this_commands_words():
        examples = read_examples(path, options.text_column, options.label_column)[: options.limit]
    if is_training_data(checkpoint, path):
        print(
            f"nanogpt.evaluate: {checkpoint.path} was trained on {path}, so these figures are not "
            "those of unseen texts; the run's summary.json has the test split's",
            file=sys.stderr,
        )
    numbers = class_numbers(examples, labels, path)
    texts = [example.text for example in examples]
    predicted = class_probabilities(model, checkpoint.tokenizer, texts).argmax(-1).tolist()
    confusion = confusion_matrix(numbers, predicted, len(labels))
    guessed = confusion_matrix(numbers, [majority_class(numbers)] * len(numbers), len(labels))
    names, shown = reduced_confusion(labels, confusion)
    counts = [[name, *map(str, row)] for name, row in zip(names, shown, strict=True)]
    printed = align([["true \\ predicted", *names], *counts])
    print_line(f"{checkpoint.path}\n{printed}\n")
    accuracy = scores(confusion)["accuracy"]
    return {
        **scores(confusion),
        "accuracy_stderr": (accuracy * (1 - accuracy) / max(len(numbers) - 1, 1)) ** 0.5,
        **{f"baseline_majority_{name}": value for name, value in scores(guessed).items()},
        "examples": float(len(examples)),
        **{
            f"{CONFUSION}{label}_as_{other}": float(confusion[i, j])
            for i, label in enumerate(labels)
            for j, other in enumerate(labels)
        },
    }


def run_instructions(checkpoint: Checkpoint, options: argparse.Namespace) -> Results:
    """Measure the replies to an instruction set."""
    return instructions.evaluate(
        checkpoint,
        read_conversations(options),
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
    )


def run_judge(checkpoint: Checkpoint, options: argparse.Namespace) -> Results:
    """Let another model score the replies to an instruction set."""
    if options.judge_url is None or options.judge_model is None:
        raise ValueError("--task judge needs --judge-url URL and --judge-model NAME")
    path = options.answers
    if path is None:
        run_dir = run_dir_of(checkpoint.path)
        path = (run_dir or checkpoint.path.parent) / "judge.jsonl"
    if not path.parent.is_dir():
        raise FileNotFoundError(f"--answers {path}: there is no folder for it; make one")
    conversations = read_conversations(options)
    key = options.judge_key
    if key is None:
        key = environment_key(options.judge_url)
    judge = Judge(options.judge_url, options.judge_model, key)
    tokens = options.max_new_tokens
    return ask_judge(checkpoint, conversations, judge, path, max_new_tokens=tokens)


def run_harness(checkpoint: Checkpoint, options: argparse.Namespace) -> Results:
    """Run tasks of lm-evaluation-harness in this process."""
    from nanogpt.evaluation.harness import evaluate

    check_language_model(checkpoint)
    if not options.harness_tasks:
        raise ValueError("--task harness needs --harness-tasks NAME[,NAME ...]")
    return evaluate(
        checkpoint,
        options.harness_tasks.split(","),
        include_path=options.include_path,
        limit=options.limit,
        batch_size=options.batch_size,
    )


TASKS: Mapping[str, Task] = {
    "hellaswag": Task(run_hellaswag, shares_work=True),
    "lambada": Task(run_lambada, shares_work=True),
    "perplexity": Task(
        run_perplexity, shares_work=True, reads=("stride", "text_column", "separator")
    ),
    "classify": Task(run_classify, reads=("text_column", "label_column")),
    "instructions": Task(run_instructions, reads=("max_new_tokens",)),
    "judge": Task(run_judge, reads=("judge_model", "max_new_tokens")),
    "harness": Task(run_harness, reads=("harness_tasks",)),
}


def find_task(name: str) -> Task:
    """Return the task of a name, or that of a function's import path.

    Raises ValueError where there is none.
    """
    if name in TASKS:
        return TASKS[name]
    if "." not in name:
        raise ValueError(
            f"there is no task {name}; it is one of {', '.join(sorted(TASKS))}, or the import path "
            "of a function, such as my_package.tasks.my_task"
        )
    return Task(locate(name, name))


def data_of(options: argparse.Namespace, benchmark: Benchmark | None = None) -> Path:
    """Return the file to score: the one given, else a benchmark's own."""
    if options.data is not None:
        path: Path = options.data
        return path
    if benchmark is not None:
        with rank_zero_first():
            return find_benchmark(benchmark, options.data_dir)
    what = {
        "classify": "FILE, a labelled .tsv, .csv or .jsonl file",
        "perplexity": "PATH, text (.txt .md .py .jsonl .parquet) or token shards",
    }.get(options.task, "FILE, a .jsonl or .json file of instructions and responses")
    raise ValueError(f"--task {options.task} needs --data {what}")


def check_language_model(checkpoint: Checkpoint) -> None:
    """Raise ValueError for a classifier, whose next tokens mean nothing."""
    if checkpoint.labels is not None:
        raise ValueError(
            f"{checkpoint.path} is a classifier of {', '.join(checkpoint.labels)} and this task "
            "scores language models; pass a checkpoint of stage=pretrain or instruct, or "
            "--task classify"
        )


def is_training_data(checkpoint: Checkpoint, path: Path) -> bool:
    """Return whether a file is the one that the checkpoint's run took its splits from."""
    run_dir = run_dir_of(checkpoint.path)
    if run_dir is None:
        return False
    with suppress(OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        config = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
        return os.path.samefile(config["data"]["path"], path)
    return False


def read_tokens(path: Path, checkpoint: Checkpoint, options: argparse.Namespace) -> np.ndarray:
    """Return the tokens to score: of texts, the documents'; of a corpus, those held out."""
    tokenizer = checkpoint.tokenizer
    is_corpus = (path / MANIFEST).is_file()
    files = path.iterdir() if path.is_dir() else [path]
    are_shards = any(file.suffix in SHARDS for file in files)
    if options.limit is not None and (is_corpus or are_shards):
        raise ValueError(f"--limit counts documents and {path} holds tokens; leave it out")
    if is_corpus:
        corpus = open_corpus(path)
        if corpus.tokenizer.fingerprint != tokenizer.fingerprint:
            raise ValueError(
                f"{path} has tokens of {corpus.tokenizer.name} and {checkpoint.path} another "
                f"tokenizer ({tokenizer.name}); pass the text itself"
            )
        return corpus.val.read(0, len(corpus.val))
    if are_shards:
        with in_this_commands_words():
            corpus = TokenShards(path).open(tokenizer, tokenizer.name)
        parts = [corpus.val] if path.is_dir() else [corpus.train, corpus.val]
        return np.concatenate([part.read(0, len(part)) for part in parts])
    ids: list[int] = []
    n_documents = 0
    documents = TextFiles(path, options.text_column, separator=options.separator).documents()
    with in_this_commands_words():
        for text in islice(documents, options.limit):
            ids += [tokenizer.eot_id, *tokenizer.encode(text or "")]
            n_documents += 1
    if options.limit is not None and n_documents == 1:  # counts windows instead
        stride = options.stride or max(checkpoint.config.block_size // 2, 1)
        ids = ids[: 1 + options.limit * stride]
    return np.array(ids, dtype=np.int64)


def read_conversations(options: argparse.Namespace) -> list[Conversation]:
    """Return the conversations of an instruction set; raises ValueError where there are none."""
    path = data_of(options)
    with in_this_commands_words():
        found = Instructions(path, max_examples=options.limit).conversations
    if not found:
        raise ValueError(f"{path} has no conversations; pass instructions and responses")
    return found


@contextmanager
def in_this_commands_words() -> Iterator[None]:
    """Say what is wrong with data by the names of this command's options."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        text = str(error).replace("data.path=", "--data ").replace(f", {PASS_OVER}", "")
        text = text.replace("data.text_column=", "--text-column ")
        kind = ValueError if isinstance(error, ValueError) else FileNotFoundError
        raise kind(text) from error


def class_numbers(examples: Sequence[Example], labels: Sequence[str], path: Path) -> list[int]:
    """Return the number of each example's class among `labels`."""
    unknown = sorted({example.label for example in examples} - set(labels))
    if unknown:
        raise ValueError(
            f"{path} has the label {unknown[0]!r} and the checkpoint knows {', '.join(labels)}; "
            "pass a file with these labels"
        )
    return [labels.index(example.label) for example in examples]
