"""Train a model: compose the configuration, build the objects, fit, report.

    python train.py                                      a small GPT on Python's sources, offline
    python train.py stage=pretrain model=gpt2_small      GPT-2 small on FineWeb-Edu
    python train.py stage=instruct                       the newest model learns to reply
    python train.py -m optim.learning_rate=1e-2,2e-2     a sweep
    torchrun --nproc_per_node=8 train.py trainer=ddp     eight GPUs

Issuing a command again continues its run. Every key is in conf/, with a comment.
"""

import math
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises, and main() prints one sentence
# Threads that spin for long while they wait make a step several times slower on a busy machine,
# threads that sleep at once make a small model's steps slower: see docs/PERFORMANCE.md.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch is loaded
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a missing name service is no error

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from nanogpt.build import (
    build,
    build_data,
    build_each,
    build_optimizer,
    build_schedule,
    check_nodes,
    choose_tokenizer,
    source_fingerprint,
)
from nanogpt.config import CONF, expand_environment, freeze, report_failure, run_hydra, sweep_name

# Plain values that constructors of nodes receive where they name them.
HANDED_OVER = ("seed", "stage", "data_dir", "tokens_per_step", "grad_clip")

failures: list[int] = []  # exit codes of this command's jobs


def main(arguments: Sequence[str]) -> int:
    """Run one job, a sweep, or with `--frozen FILE` one rank of a job; return the exit code."""
    expand_environment()
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # for modules that the configuration names
    os.environ["NANOGPT_SWEEP"] = sweep_name(arguments)  # for hydra.sweep.dir

    def work() -> None:
        if arguments[:1] == ["--frozen"]:
            run_job(yaml.safe_load(Path(arguments[1]).read_text(encoding="utf-8")), train)
        else:
            compose()

    return run_hydra("train", arguments, work) or max(failures, default=0)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")
def compose(cfg: DictConfig) -> float:
    """Run one composed job; return what a sweeper may minimise."""
    return run_job(cfg, lambda _: start(freeze(cfg)))


def run_job(config: Any, job: Callable[[Any], Mapping[str, Any]]) -> float:
    """Run a job and return its validation bits per byte, a classifier's loss, NaN if it failed.

    Why it failed is printed, and a sweep goes on.
    """
    try:
        summary = job(config)
        return float(summary.get("val_bits_per_byte", summary.get("val_loss", math.nan)))
    except Exception as error:
        failures.append(report_failure(error, config))
        sweep = Path(config["runs_dir"], os.environ["NANOGPT_SWEEP"])
        if sweep.is_dir() and {path.name for path in sweep.iterdir()} <= {"multirun.yaml"}:
            shutil.rmtree(sweep)  # of Hydra, which holds no run
        return math.nan


def start(config: dict[str, Any]) -> Mapping[str, Any]:
    """Train a frozen job here, or in as many processes as configured; return its summary."""
    from nanogpt.training.launch import run_on_ranks

    return run_on_ranks(config, train, is_sweep=HydraConfig.get().mode == RunMode.MULTIRUN)


def train(config: dict[str, Any]) -> dict[str, Any]:
    """Train one run on this rank, or find it finished; return its summary."""
    import torch

    from nanogpt.checkpoint import with_special_tokens
    from nanogpt.data.module import split_step
    from nanogpt.model import GPT, GPTConfig
    from nanogpt.optim import may_extend
    from nanogpt.ranks import Ranks, on_rank_zero
    from nanogpt.runs.identity import budget_steps
    from nanogpt.runs.run import open_run
    from nanogpt.training import summary
    from nanogpt.training.budget import settle, tune
    from nanogpt.training.launch import resolve_device
    from nanogpt.training.machine import keep_freed_memory
    from nanogpt.training.trainer import build_trainer, fit, quieten_lightning

    quieten_lightning()
    config = settle(config)
    check_nodes(config, budget_steps(config))
    device, ranks = resolve_device(config["trainer"]["accelerator"]), Ranks.from_environment()
    keep_freed_memory(device)
    plain = {key: config[key] for key in HANDED_OVER}
    data = build_data(config, **plain, block_size=config["model"]["block_size"])
    schedule = build_schedule(config["schedule"])
    opened = open_run(
        config,
        device,
        source_fingerprint=partial(source_fingerprint, data),
        may_extend=partial(may_extend, schedule),
    )
    with opened as run:
        if run.finished is not None:
            return summary.finished(run)
        live = {**plain, "run_dir": run.path, "save_dir": str(run.path)}
        callbacks = build_each(config["callbacks"], "callbacks", **live)

        # Data, tokenizer and the model's shape
        start = run.initial_checkpoint()
        block_size = config["model"]["block_size"] if start is None else start.config.block_size
        micro_batch = 1 if config["micro_batch"] == "auto" else config["micro_batch"]
        split_step(config["tokens_per_step"], block_size, ranks.world_size, micro_batch)  # checks
        data.block_size = block_size
        unchanged = run.source in (None, run.recorded.get("source", run.source))
        data.prepared = run.recorded.get("corpus") if unchanged else None
        if start is not None:
            start = with_special_tokens(start, data.special_tokens)
        tokenizer = data.use_tokenizer(choose_tokenizer(config["tokenizer"], start, run.checkpoint))

        def shape(config: Mapping[str, Any]) -> GPTConfig:
            own = partial(build, config["model"], "model", vocab_size=tokenizer.vocab_size)
            return own() if start is None else start.config

        # How this machine runs it, and what fits a budget in minutes
        config, settings = on_rank_zero(lambda: tune(run, shape, device, data))
        model_config, run.config, run.max_steps = shape(config), config, budget_steps(config)
        run.max_steps = min(run.max_steps, data.max_steps or run.max_steps)
        data.tokens_per_step = config["tokens_per_step"]
        run.begin({"corpus": data.fingerprint, **settings._asdict()})
        torch.set_num_threads(settings.threads)
        data.micro_batch = settings.micro_batch

        # Training
        torch.manual_seed(config["seed"])
        model = GPT(model_config) if start is None else start.model
        template, labels = getattr(data, "template", None), getattr(data, "labels", None)
        live |= {
            "model": model,
            "tokenizer": tokenizer,
            "data": data,
            "template": template,
            "metadata": run.metadata(model_config, tokenizer, template, labels),
            "make_optimizer": partial(build_optimizer, config["optim"]),
            "schedule": schedule,
            "max_steps": run.max_steps,
            "tokens_per_step": config["tokens_per_step"],
            "compiled": settings.compile,
            "peak_flops": settings.peak_flops,
            "wandb_id": run.recorded["wandb_id"],
        }
        module = build(config["module"], "module", **live)
        loggers = build_each(config["logger"], "logger", **live, name=config["name"])
        trainer = build_trainer(config["trainer"], run, device, callbacks, loggers)
        on_rank_zero(run.rewind)
        named = {"callbacks": callbacks, "logger": loggers}
        fit(trainer, module, data, named, run.checkpoint)
        return summary.finish(run, module, data.facts())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
