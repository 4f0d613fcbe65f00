"""Measure checkpoints side by side.

    python -m nanogpt.evaluate CHECKPOINT [CHECKPOINT ...] --task hellaswag [--data FILE]
    python -m nanogpt.evaluate RUN --task perplexity --data TEXT --json scores.json
    python -m nanogpt.evaluate RUN --task hellaswag --processes 8 --device cuda
    torchrun --nproc_per_node=8 -m nanogpt.evaluate RUN --task hellaswag --device cuda

CHECKPOINT is a .ckpt, a run directory, the name of a run under runs/, a Hugging Face GPT-2's
directory, or one of gpt2, gpt2-medium, gpt2-large and gpt2-xl. Results are printed as a table with
standard errors and published scores; `--json` and `--picture` write them to files, and those of a
run's own checkpoints become part of its report.html. Tasks are scored in fp32, as
docs/EVALUATION.md describes.
"""

import argparse
import inspect
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nanogpt.build import locate
from nanogpt.checkpoint import find_init_from, load_checkpoint
from nanogpt.command import check_files, make_parser, parse, run_command
from nanogpt.data.records import PASS_OVER
from nanogpt.disk import write_json
from nanogpt.evaluation import results
from nanogpt.evaluation.scoring import BATCH_SIZE
from nanogpt.ranks import Ranks, launch_ranks, leave_with_launcher
from nanogpt.report.figures import draw_scores, drawn_metrics, standalone
from nanogpt.report.report import write_report
from nanogpt.runs.directory import RunDirectory
from nanogpt.text import first_line, print_line

Task = Callable[..., results.Results]

TASKS = ("classify", "harness", "hellaswag", "instructions", "lambada", "perplexity")
SHARED = {"hellaswag", "lambada", "perplexity"}  # tasks whose work several processes share
OF_LANGUAGE_MODELS = {*SHARED, "harness"}
REPORT_S = 2.0  # in which rank zero reports an error of all
# options that are recorded in a run's evaluations.json, if they are not the defaults
RECORDED = {"stride", "text_column", "separator", "label_column", "max_new_tokens", "harness_tasks"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(parser(), given)
    try:
        find_task(options.task)
    except ValueError as error:
        parser().error(f"argument --task: {error}")
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
            measure(options, ranks)

    rank = f" (process {ranks.rank} of {ranks.world_size})" if ranks.rank > 0 else ""
    return run_command(f"nanogpt.evaluate{rank}", work, explain=explain) or exit_code


def explain(error: Exception) -> str:
    """Return an error's message, delayed where rank zero may print the same and end the others."""
    if Ranks.from_environment().rank > 0:
        time.sleep(REPORT_S)
    text = first_line(error)
    # of training's configuration, which readers of data name
    text = text.replace("data.path=", "--data ").replace("data.text_column=", "--text-column ")
    return text.replace(f", {PASS_OVER}", "")


def check(options: argparse.Namespace, ranks: Ranks) -> None:
    """Raise ValueError for options that cannot work, before anything is loaded."""
    check_files(options, "json", "picture")
    for option in ("limit", "batch_size", "max_new_tokens", "processes"):
        value = getattr(options, option)
        if value is not None and value < 1:
            raise ValueError(f"--{option.replace('_', '-')} {value} is not a number of at least 1")
    several = max(options.processes, ranks.world_size) > 1
    if several and options.task not in SHARED:
        raise ValueError(f"--task {options.task} runs in one process; leave --processes out")
    task_options(find_task(options.task), options)


def find_task(name: str) -> Task:
    """Return the task of a name or of a function's import path; raises ValueError for neither."""
    if name not in TASKS and "." not in name:
        raise ValueError(
            f"there is no task {name}; it is one of {', '.join(TASKS)}, or the import path "
            "of a function, such as my_package.tasks.my_task"
        )
    module = "classification" if name == "classify" else name
    task: Task = locate(f"nanogpt.evaluation.{module}.evaluate" if name in TASKS else name, name)
    return task


def task_options(task: Task, options: argparse.Namespace) -> dict[str, Any]:
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


def find_checkpoints(options: argparse.Namespace) -> list[Path]:
    """Return the paths of the checkpoints, published ones fetched; raises where one is missing."""
    folders = (options.runs_dir, options.data_dir)
    return [find_init_from(reference, *folders) for reference in options.checkpoints]


def measure(options: argparse.Namespace, ranks: Ranks) -> None:
    """Score all checkpoints and, on the first rank, print the results before any failure."""
    rows: list[results.Row] = []
    leave_with_launcher()
    if ranks.world_size > 1:
        dist.init_process_group("gloo")  # for objects only
    try:
        paths = find_checkpoints(options)
        for reference, path in zip(options.checkpoints, paths, strict=True):
            rows.append(score(reference, path, options, ranks))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        if rows and ranks.rank == 0:
            print_results(rows, options)


def score(reference: str, path: Path, options: argparse.Namespace, ranks: Ranks) -> results.Row:
    """Return the results of a checkpoint; the first rank adds them to the report of its run.

    Raises ValueError for a classifier in a task of language models.
    """
    is_cuda = options.device == "cuda"
    device = torch.device(f"cuda:{ranks.local_rank}" if is_cuda else options.device)
    checkpoint = load_checkpoint(path, device=device, allow_modules=options.allow_module)
    if checkpoint.labels is not None and options.task in OF_LANGUAGE_MODELS:
        raise ValueError(
            f"{checkpoint.path} is a classifier of {', '.join(checkpoint.labels)} and this task "
            "scores language models; pass a checkpoint of stage=pretrain or instruct, or "
            "--task classify"
        )
    task = find_task(options.task)
    read = task_options(task, options)
    row = {"checkpoint": reference, "task": options.task, "results": task(checkpoint, **read)}
    run_dir = results.run_dir_of(checkpoint.path)
    if run_dir is not None and ranks.rank == 0 and options.report:
        default = parser().get_default
        own = {k: v for k, v in read.items() if k in RECORDED and v != default(k)}
        data = None if options.data is None else str(options.data.resolve())
        about = {"step": checkpoint.step, "data": data, "limit": options.limit, **own}
        try:
            results.add_evaluation(run_dir, {**row, "checkpoint": run_dir.name}, about)
            if RunDirectory(run_dir).report_path.is_file():  # of a finished run
                write_report(run_dir)
        except (OSError, LookupError, TypeError, ValueError) as error:  # of its summary.json
            reason = f"{type(error).__name__}: {first_line(error)}"
            text = f"{run_dir} gets no new report ({reason}); look at its files"
            print(f"nanogpt.evaluate: {text}", file=sys.stderr)
    return row


def print_results(rows: Sequence[results.Row], options: argparse.Namespace) -> None:
    """Write `--json`, print the table, draw `--picture`; raises ValueError for an empty picture."""
    if options.json is not None:
        write_json(options.json, rows)
    print_line(results.table(rows))
    if options.picture is not None:
        scores = results.lines(rows)
        metrics = drawn_metrics(scores)
        if not metrics:
            raise ValueError(
                "no metric has a standard error to draw; leave --picture out, or score more than "
                "one example"
            )
        picture = standalone(draw_scores(scores, metrics))
        options.picture.write_text(picture, encoding="utf-8")


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    shared = ("--device", "--allow-module", "--runs-dir", "--data-dir")
    parser = make_parser("nanogpt.evaluate", "Measure checkpoints side by side.", *shared)
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
        help=f"{', '.join(TASKS)}, or the import path of a function",
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
    add("--batch-size", type=int, default=BATCH_SIZE, help="changes the speed alone (%(default)s)")
    add("--processes", type=int, default=1, help="that share the work, on this machine")
    add("--stride", type=int, help="perplexity: tokens scored per window (default: half a context)")
    add("--text-column", default="text", help="classify, perplexity: of the file (default text)")
    add("--separator", help="perplexity: between documents of a plain text file")
    add("--label-column", default="label", help="classify: of the file (default label)")
    add("--max-new-tokens", type=int, default=256, help="of a reply (default %(default)s)")
    add("--harness-tasks", metavar="NAMES", help="harness: its tasks, with commas between")
    add("--include-path", type=Path, metavar="DIR", help="harness: a folder of task files")
    return parser


if __name__ == "__main__":
    sys.exit(main())
