"""The summary of a finished run: summary.json, the report, and the log's last lines."""

import logging
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanogpt.checkpoint import weights_sha256
from nanogpt.disk import write_json
from nanogpt.ranks import on_rank_zero
from nanogpt.report.report import write_report
from nanogpt.runs.directory import reached
from nanogpt.runs.metrics import read_metrics
from nanogpt.runs.run import Run
from nanogpt.text import first_line, format_duration, format_percent
from nanogpt.training.checkpointing import stopping_reason
from nanogpt.training.machine import device_name, git_revision, versions
from nanogpt.training.module import StageModule

LARGE_PARAMS = 100_000_000  # GPT-2 small has 124 million
IN_SUMMARY = ("val/", "hellaswag/")  # columns of metrics.csv

log = logging.getLogger("nanogpt")


def finish(run: Run, module: StageModule, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Write summary.json and report.html of a trained run and log what was reached.

    `facts` are added to the last metrics in metrics.csv; tokens_per_s is over the steps that were
    timed. Called on every rank; returns the summary, an empty one after `trainer.fast_dev_run`,
    which saves nothing.
    """
    if module.trainer.fast_dev_run:  # type: ignore[attr-defined]
        log.info("fast_dev_run: training and validation work; nothing was saved")
        return {}

    def write() -> dict[str, Any]:
        trainer, stopped = module.trainer, stopping_reason(module.trainer)
        last = {
            name: points[-1][1] for name, points in read_metrics(run.files.metrics_path).items()
        }
        timed_tokens = module.timed_steps * module.tokens_per_step
        tokens_per_s = timed_tokens / module.train_s if module.train_s else 0.0
        summary = {
            "stage": run.config["stage"],
            "name": run.config["name"],
            "steps": trainer.global_step,
            "tokens": trainer.global_step * module.tokens_per_step,
            "wall_s": module.wall_s(),
            "train_s": module.train_s,
            "tokens_per_s": tokens_per_s,
            "mfu": module.mfu(tokens_per_s),
            "train_loss": last.get("train/loss"),
            **{
                name.replace("/", "_"): v for name, v in last.items() if name.startswith(IN_SUMMARY)
            },
            **({"stopped": stopped} if stopped else {}),
            **facts,
            **module.measure(),
            "device": device_name(trainer.strategy.root_device),
            "n_ranks": trainer.world_size,
            "precision": run.recorded["precision"],
            "n_params": module.model.num_parameters(),
            "weights_sha256": weights_sha256(module.model),
            "git": git_revision(),
            "versions": versions(),
        }
        write_json(run.files.summary_path, summary)
        _write_report(run)
        log_summary(summary, run.path, run.config["data"], module.model.config.block)
        return summary

    return on_rank_zero(write)


def finished(run: Run) -> dict[str, Any]:
    """Return the summary of a run that has nothing left to do, whose report is there."""
    assert run.finished is not None
    if run.ranks.rank == 0 and not run.files.report_path.is_file():
        _write_report(run)
    return run.finished


def _write_report(run: Run) -> None:
    """Write report.html from the run's other files; a failure is logged."""
    try:
        write_report(run.path)
    except Exception as error:
        log.warning("%s was not written: %s", run.files.report_path, first_line(error))


def log_summary(
    summary: Mapping[str, Any], run_dir: Path, data: Mapping[str, Any], block: str | None = None
) -> None:
    """Log what was reached and what may come next, of a run on the `data` node."""
    log.info(
        "finished: %s steps, %s tokens in %s, %s of it training (%s tokens/s%s)",
        summary["steps"],
        f"{summary['tokens']:,}",
        format_duration(summary["wall_s"]),
        format_duration(summary["train_s"]),
        f"{summary['tokens_per_s']:,.0f}",
        f", MFU {format_percent(summary['mfu'])}" if summary["mfu"] else "",  # 0 where unknown
    )
    if stopped := summary.get("stopped"):
        log.info("ended before its budget by %s", stopped)
    log.info("%s", reached(summary))
    log.info("report: %s", run_dir / "report.html")
    commands = next_commands(summary, run_dir, data, block)
    log.info("next:\n%s", "\n".join(f"  {command}" for command in commands))


def next_commands(
    summary: Mapping[str, Any], run_dir: Path, data: Mapping[str, Any], block: str | None = None
) -> list[str]:
    """Return what may be done with the run, or after it; examples have the data's first prompt.

    Models with a block of another package are generated from alone: the server refuses them.
    """
    run, prompt = shlex.quote(str(run_dir)), next(filter(None, data.get("prompts", ())), "The")
    generate = f"python -m nanogpt.generate {run} --prompt {shlex.quote(prompt)}"
    if block is not None:
        return [f"{generate} --allow-module {block.partition('.')[0]}"]
    stage, is_own = summary["stage"], data.get("path") is not None
    is_large = summary.get("n_params", 0) >= LARGE_PARAMS
    classifies, replies = stage == "classify", stage == "instruct"
    writes = not classifies and not replies
    labelled = "python train.py stage=classify data=labelled data.path=YOUR_FILE    # own classes"
    pairs = "python train.py stage=instruct data=instructions data.path=YOUR_FILE.jsonl"
    reply = f"python train.py stage=instruct init_from={run}    # learns to reply, on Dolly"
    text = "python train.py data=text data.path=YOUR_FOLDER    # the same on your own text"
    gpt2 = "python train.py stage=pretrain model=gpt2_small    # GPT-2 small on FineWeb-Edu"
    fitting = {
        f"python -m nanogpt.evaluate {run} --task classify --data YOUR_FILE": classifies,
        generate: not classifies,
        f"python serve.py checkpoint={run}    # web UI and OpenAI-compatible API": True,
        labelled: classifies and not is_own,
        pairs: replies and not is_own,
        reply: writes and (is_own or is_large),
        text: writes and not (is_own or is_large),
        gpt2: writes and not is_large,
    }
    return [command for command, fits in fitting.items() if fits]
