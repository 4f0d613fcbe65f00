"""What a finished run amounts to: summary.json, and what is said at the end."""

import logging
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nanogpt.checkpoint import weights_sha256
from nanogpt.training.machine import git_revision, versions
from nanogpt.training.metrics import read_metrics
from nanogpt.training.module import StageModule
from nanogpt.training.progress import duration, percent

IN_SUMMARY = ("val/", "hellaswag/")  # columns of metrics.csv

log = logging.getLogger("nanogpt")


def summarise(
    module: StageModule, config: Mapping[str, Any], metrics_path: Path, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the summary of a run whose last step's figures are in metrics.csv.

    `facts` are what the caller knows beyond that; tokens_per_s is over the steps that were timed.
    """
    last = {name: points[-1][1] for name, points in read_metrics(metrics_path).items()}
    tokens_per_step = module.tokens_per_step
    tokens_per_s = module.timed_steps * tokens_per_step / module.train_s if module.train_s else 0.0
    return {
        "stage": config["stage"],
        "name": config["name"],
        "steps": module.max_steps,
        "tokens": module.max_steps * tokens_per_step,
        "wall_s": module.wall_s(),
        "train_s": module.train_s,
        "tokens_per_s": tokens_per_s,
        "mfu": module.mfu(tokens_per_s),
        "train_loss": last.get("train/loss"),
        **{name.replace("/", "_"): v for name, v in last.items() if name.startswith(IN_SUMMARY)},
        **facts,
        **module.measure(),
        "n_params": module.model.num_parameters(),
        "weights_sha256": weights_sha256(module.model),
        "git": git_revision(),
        "versions": versions(),
    }


def tell(summary: Mapping[str, Any], run_dir: Path, prompts: Sequence[str]) -> None:
    """Say what was reached and what may come next, with the first of the data's prompts."""
    log.info(
        "finished: %s steps, %s tokens in %s, %s of it training (%s tokens/s%s)",
        summary["steps"],
        f"{summary['tokens']:,}",
        duration(summary["wall_s"]),
        duration(summary["train_s"]),
        f"{summary['tokens_per_s']:,.0f}",
        f", MFU {percent(summary['mfu'])}" if summary["mfu"] else "",  # 0 where it is unknown
    )
    log.info("%s", reached(summary))
    log.info("report: %s", run_dir / "report.html")
    commands = next_commands(summary["stage"], run_dir, next(filter(None, prompts), "The"))
    log.info("next:\n%s", "\n".join(f"  {command}" for command in commands))


def reached(summary: Mapping[str, Any]) -> str:
    """Return the figures that the stage is about."""
    if "test_accuracy" in summary:
        words = summary["baseline_bag_of_words_test_accuracy"]
        return (
            f"test accuracy {100 * summary['test_accuracy']:.2f} %, macro-F1 "
            f"{summary['test_macro_f1']:.4f} (a bag of words reaches {100 * words:.2f} %); "
            f"validation accuracy {100 * summary['val_accuracy']:.2f} %"
        )
    bits, gzip = summary.get("val_bits_per_byte"), summary.get("gzip_bits_per_byte")
    per_byte = "" if bits is None else f", {bits:.3f} bits per byte"
    beside = f" (gzip -9 needs {gzip:.3f})" if bits is not None and gzip is not None else ""
    if (loss := summary.get("val_loss")) is None:
        return "validation loss unknown (metrics.csv was lost)"
    return f"validation loss {loss:.4f}{per_byte}{beside}"


def next_commands(stage: str, run_dir: Path, prompt: str) -> list[str]:
    """Return what may be done with the run, or after it."""
    if stage == "classify":
        return [
            f"python -m nanogpt.evaluate {run_dir} --task classify --data YOUR_FILE",
            "python train.py stage=classify data=labelled data.path=YOUR_FILE    # own classes",
        ]
    commands = [
        f"python -m nanogpt.generate {run_dir} --prompt {shlex.quote(prompt)}",
        "python serve.py    # a page to write on, and the OpenAI API",
    ]
    if stage == "instruct":
        own = "python train.py stage=instruct data=instructions data.path=YOUR_FILE.jsonl"
        return [*commands, own]
    return [
        *commands,
        "python train.py data=text data.path=YOUR_FOLDER    # the same on your own text",
        "python train.py stage=pretrain model=gpt2_small    # GPT-2 small on FineWeb-Edu",
    ]
