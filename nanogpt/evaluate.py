"""Measure checkpoints side by side.

    python -m nanogpt.evaluate CHECKPOINT [CHECKPOINT ...] --task hellaswag [--data FILE]
    python -m nanogpt.evaluate RUN --task perplexity --data TEXT --json scores.json

CHECKPOINT is a .ckpt, a run directory, the name of a run under runs/, a Hugging Face GPT-2's
directory, or one of gpt2, gpt2-medium, gpt2-large and gpt2-xl. Results are printed as a table with
standard errors and published scores; `--json` and `--picture` write them to files, and those of a
run's own checkpoints become part of its report.html. Tasks are scored in fp32, as
docs/EVALUATION.md describes.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from nanogpt.checkpoint import find_init_from, init_model, load_checkpoint
from nanogpt.command import add_shared, guard_output, parse, run_command
from nanogpt.evaluation.processes import device_of_rank, explain, joined, rank_zero_first
from nanogpt.evaluation.results import Row, add_evaluation, lines, run_dir_of, table, write_rows
from nanogpt.evaluation.scoring import BATCH_SIZE
from nanogpt.evaluation.tasks import SHARED, TASKS, find_task, task_options
from nanogpt.ranks import Ranks, launch_ranks
from nanogpt.report.figures import draw_scores, drawn_metrics, standalone
from nanogpt.report.report import write_report
from nanogpt.runs.directory import RunDirectory
from nanogpt.text import print_line

NOT_RECORDED = {"data", "limit", "data_dir", "batch_size", "options"}  # or recorded by other keys
NOT_RECORDED |= {"judge_url", "judge_key", "answers", "include_path"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    guard_output()
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(parser(), given)
    ranks = Ranks.from_environment()
    exit_code = 0

    def work() -> None:
        nonlocal exit_code
        check(options, ranks)
        if options.processes > 1 and ranks.world_size == 1:
            find_checkpoints(options)  # so that one process reports a missing one
            n_threads = max(1, (os.cpu_count() or 1) // options.processes)
            os.environ.setdefault("OMP_NUM_THREADS", str(n_threads))
            exit_code = launch_ranks(options.processes, ["-m", "nanogpt.evaluate", *given])
        else:
            measure(options, is_first=ranks.rank == 0)

    rank = f" (process {ranks.rank} of {ranks.world_size})" if ranks.rank > 0 else ""
    return run_command(f"nanogpt.evaluate{rank}", work, explain=explain) or exit_code


def check(options: argparse.Namespace, ranks: Ranks) -> None:
    """Raise ValueError for options that cannot work, before anything is loaded."""
    for option in ("json", "picture"):
        path = getattr(options, option)
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise ValueError(f"--{option} {path} is no file of an existing folder; name one")
    for option in ("limit", "batch_size", "max_new_tokens", "processes"):
        value = getattr(options, option)
        if value is not None and value < 1:
            raise ValueError(f"--{option.replace('_', '-')} {value} is not a number of at least 1")
    several = max(options.processes, ranks.world_size) > 1
    if several and options.task not in SHARED:
        raise ValueError(f"--task {options.task} runs in one process; leave --processes out")
    task_options(find_task(options.task), options)


def find_checkpoints(options: argparse.Namespace) -> list[Path]:
    """Return the paths of the checkpoints, published ones fetched; raises where one is missing."""
    with rank_zero_first():
        return [
            find_init_from(reference, options.runs_dir, options.data_dir)
            for reference in options.checkpoints
        ]


def measure(options: argparse.Namespace, is_first: bool) -> None:
    """Score all checkpoints and, on the first rank, print the results before any failure."""
    rows: list[Row] = []
    if is_first:
        log = logging.getLogger("nanogpt.evaluation")  # the scorer's progress
        log.handlers = [logging.StreamHandler()]
        log.setLevel(logging.INFO)
    try:
        with joined():
            paths = find_checkpoints(options)
            for reference, path in zip(options.checkpoints, paths, strict=True):
                rows.append(score(reference, path, options, is_first))
    finally:
        if rows and is_first:
            print_results(rows, options)


def score(reference: str, path: Path, options: argparse.Namespace, is_first: bool) -> Row:
    """Return the results of a checkpoint; the first rank adds them to the report of its run."""
    device = device_of_rank(options.device)
    checkpoint = (
        load_checkpoint(path, device=device, allow_modules=options.allow_module)
        if path.is_file()
        else init_model(path)
    )
    checkpoint.model.to(device).eval()
    task = find_task(options.task)
    read = task_options(task, options)
    row = {"checkpoint": reference, "task": options.task, "results": task(checkpoint, **read)}
    run_dir = run_dir_of(checkpoint.path)
    if run_dir is not None and is_first and options.report:
        default = parser().get_default
        own = {k: v for k, v in read.items() if k not in NOT_RECORDED and v != default(k)}
        data = None if options.data is None else str(options.data.resolve())
        about = {"step": checkpoint.step, "data": data, "limit": options.limit, **own}
        try:
            add_evaluation(run_dir, {**row, "checkpoint": run_dir.name}, about)
            if RunDirectory(run_dir).report_path.is_file():  # of a finished run
                write_report(run_dir)
        except OSError as error:
            print(f"nanogpt.evaluate: {run_dir} stays as it was ({error})", file=sys.stderr)
    return row


def print_results(rows: Sequence[Row], options: argparse.Namespace) -> None:
    """Write `--json`, print the table, draw `--picture`; raises ValueError for an empty picture."""
    if options.json is not None:
        write_rows(options.json, rows)
    print_line(table(rows))
    if options.picture is not None:
        scores = lines(rows)
        metrics = drawn_metrics(scores)
        if not metrics:
            raise ValueError(
                "there is nothing to draw, as no metric has a standard error; the table has them "
                "all: leave --picture out, or score more than one example"
            )
        picture = standalone(draw_scores(scores, metrics))
        options.picture.write_text(picture, encoding="utf-8")


def task_name(text: str) -> str:
    """Return the name of a task; raises ArgumentTypeError for an unknown one."""
    try:
        find_task(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    parser = argparse.ArgumentParser(
        prog="python -m nanogpt.evaluate", description="Measure checkpoints side by side."
    )
    add = parser.add_argument
    add(
        "checkpoints",
        nargs="+",
        metavar="CHECKPOINT",
        help="a .ckpt, a run, a run's name, a Hugging Face directory, or gpt2 to gpt2-xl",
    )
    add(
        "--task",
        required=True,
        type=task_name,
        help=f"{', '.join(sorted(TASKS))}, or the import path of a function",
    )
    add("--data", type=Path, help="what to score (default of benchmarks: the hub's file)")
    add(
        "--limit",
        type=int,
        metavar="N",
        help="score the first N examples, documents, or windows of a single document alone",
    )
    add("--json", type=Path, help="a file to write the results to")
    add("--picture", type=Path, metavar="FILE.svg", help="a file to draw the results in")
    add("--no-report", dest="report", action="store_false", help="leave the run's report as it is")
    add_shared(parser, "--device", "--allow-module", "--runs-dir", "--data-dir")
    add("--batch-size", type=int, default=BATCH_SIZE, help="changes the speed alone (%(default)s)")
    add("--processes", type=int, default=1, help="that share the work, on this machine")
    add("--stride", type=int, help="perplexity: tokens scored per window (default: half a context)")
    add("--text-column", default="text", help="classify, perplexity: of the file (default text)")
    add("--separator", help="perplexity: between documents of a plain text file")
    add("--label-column", default="label", help="classify: of the file (default label)")
    add("--max-new-tokens", type=int, default=256, help="of a reply (default %(default)s)")
    add("--judge-url", metavar="URL", help="judge: an OpenAI-compatible API, ending in /v1")
    add("--judge-model", metavar="NAME", help="judge: the model there")
    add(
        "--judge-key",
        metavar="KEY",
        help="judge: the key (default OPENAI_API_KEY, for OpenAI's own address and loopback)",
    )
    add("--answers", type=Path, help="judge: the file of its answers (default: judge.jsonl)")
    add("--harness-tasks", metavar="NAMES", help="harness: its tasks, with commas between")
    add("--include-path", type=Path, metavar="DIR", help="harness: a folder of task files")
    return parser


if __name__ == "__main__":
    sys.exit(main())
