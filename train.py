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
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises, and main() prints one sentence
# Threads that spin for long while they wait make a step several times slower on a busy machine,
# threads that sleep at once make a small model's steps slower: see docs/PERFORMANCE.md.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch is loaded
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a missing name service is no error

from nanogpt.build import (
    HANDED_OVER,
    build,
    build_data,
    build_each,
    build_optimizer,
    build_schedule,
    check_nodes,
    choose_tokenizer,
    source_fingerprint,
)
from nanogpt.config import sweep_name, with_job


def main(arguments: Sequence[str]) -> int:
    """Run one job, a sweep, or with `--frozen FILE` one rank of a job; return the exit code."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # for modules that the configuration names
    os.environ["NANOGPT_SWEEP"] = sweep_name(arguments)  # for hydra.sweep.dir
    return with_job(arguments, start)


def start(config: dict[str, Any]) -> float:
    """Train a frozen job here, or in as many processes as configured.

    Returns its validation bits per byte, a classifier's loss.
    """
    from nanogpt.training.launch import run_on_ranks

    summary = run_on_ranks(config, train)
    return float(summary.get("val_bits_per_byte", summary.get("val_loss", math.nan)))


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
    from nanogpt.training.budget import FixedSteps, settle, tune
    from nanogpt.training.launch import resolve_device
    from nanogpt.training.machine import keep_freed_memory
    from nanogpt.training.trainer import build_trainer, fit, quieten_lightning

    quieten_lightning()
    config = settle(config)
    check_nodes(config, budget_steps(config))
    device, ranks = resolve_device(config["trainer"]["accelerator"]), Ranks.from_environment()
    keep_freed_memory(device)
    data, schedule = build_data(config), build_schedule(config["schedule"])
    opened = open_run(
        config,
        device,
        source_fingerprint=partial(source_fingerprint, data),
        may_extend=partial(may_extend, schedule),
    )
    with opened as run:
        if run.finished is not None:
            return summary.finished(run)
        live = {key: config[key] for key in HANDED_OVER}
        live |= {"run_dir": run.path, "save_dir": str(run.path)}
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
        config, settings, end_s = on_rank_zero(lambda: tune(run, shape, device, data))
        model_config, run.config = shape(config), config
        run.max_steps = budget_steps(config, data.max_steps)
        data.tokens_per_step = config["tokens_per_step"]
        run.begin({"corpus": data.fingerprint, **settings._asdict(), "end_s": end_s})
        callbacks["steps"] = FixedSteps(run, schedule)
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
            "activation_checkpointing": settings.activation_checkpointing,
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
