"""Show what a training run would take: parameters, arithmetic, memory, time and disk.

    python -m nanogpt.plan
    python -m nanogpt.plan stage=pretrain model=gpt2_small micro_batch=8 --json

The arguments are those of train.py. Nothing is trained, downloaded or prepared. What is `auto` is
chosen as training would, by short measurements, which are stored for it.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as train.py, before torch is loaded

from nanogpt.command import run_command
from nanogpt.config import SWEEP, with_job
from nanogpt.text import format_duration, format_number, format_percent, print_line

PROGRAM = "nanogpt.plan"
MFU = 0.4  # of GPUs: assumed, and reached by large models only
PARTS = {"wte": "embeddings", "wpe": "embeddings", "shift": "embeddings", "lm_head": "head"}
PARTS |= {"attn": "attention"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    options = parser().parse_known_args(words)[0]
    if refused := [word for word in words if word in SWEEP]:
        print(f"{PROGRAM}: {refused[0]} is not taken; a plan is that of one run", file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.INFO, format="%(message)s")  # the choices, to stderr

    lines: list[str] = []

    def describe(config: dict[str, Any]) -> None:
        tree: dict[str, dict[str, Any]] = {}
        for key, value, note in plan(config):
            group, _, name = key.partition(".")
            tree.setdefault(group, {})[name or "total"] = value
            if not options.json:
                label = f"  {name.replace('_', ' ')}" if name else group
                lines.append(f"{label:26}{as_text(group, value):>18}  {note}".rstrip())
        if options.json:
            lines.append(json.dumps(tree, indent=1))

    def show() -> None:
        for line in lines:
            print_line(line)

    code = with_job([word for word in words if word != "--json"], describe, PROGRAM)
    return code or run_command(PROGRAM, show)


def as_text(group: str, value: Any) -> str:
    """Return a value of a group of rows as the table has it."""
    if value is None:
        return "unknown"
    if group in ("memory", "disk"):
        return f"{format_number(value)}B"
    if group == "time":
        return format_duration(value)
    if group == "FLOPs" or isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:,}" if isinstance(value, int) else str(value)


def plan(config: dict[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """Yield the rows (key, value, note) of the plan of a frozen configuration.

    A key is a group's, or a group's and a name with a dot between; values are in bytes and seconds.
    Those that only prepared data would show are None. Raises as `train.train` does for bad input.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"  # before the hub's client is imported
    from nanogpt import build
    from nanogpt.data.module import split_step
    from nanogpt.model import PRESETS, GPTConfig
    from nanogpt.optim import factor_at
    from nanogpt.ranks import Ranks
    from nanogpt.runs.directory import RunDirectory
    from nanogpt.runs.identity import budget_steps
    from nanogpt.runs.run import Run
    from nanogpt.training.autotune import Trials
    from nanogpt.training.budget import settle, tune
    from nanogpt.training.launch import count_devices, resolve_device
    from nanogpt.training.machine import keep_freed_memory
    from nanogpt.training.memory import step_memory
    from nanogpt.training.throughput import DENSE_HALF_FLOPS, flops_per_token

    config = settle(config)
    trainer = config["trainer"]
    build.check_nodes(config, budget_steps(config))
    device = resolve_device(trainer["accelerator"])
    keep_freed_memory(device)
    data, schedule = build.build_data(config), build.build_schedule(config["schedule"])
    build.source_fingerprint(data)
    n_local = count_devices(trainer["devices"], trainer["accelerator"])

    class Planned(Run):
        ranks = Ranks(0, 0, n_local * trainer["num_nodes"], n_local)

    run = Planned(config, RunDirectory.from_config(config))
    manifest = prepared(data, choice := build.choose_tokenizer(config["tokenizer"], None, None))
    splits = {name: split["tokens"] for name, split in manifest["splits"].items()}
    n_ids, start = count_ids(config["tokenizer"], choice, manifest), config["init_from"]
    # The weights of a preset may have to be downloaded.
    fixed: Any = GPTConfig.preset(start) if start in PRESETS else run.initial_checkpoint()
    fixed = getattr(fixed, "config", fixed)

    def shape(config: Mapping[str, Any]) -> GPTConfig:
        return fixed or build.build(config["model"], "model", vocab_size=n_ids)

    T, given = shape(config).block_size, config["micro_batch"]
    world_size = run.ranks.world_size
    split_step(config["tokens_per_step"], T, world_size, 1 if given == "auto" else given)
    data.train_rows, data.val_rows = (range(splits.get(s, 0) // T) for s in ("train", "val"))
    config, settings, _ = tune(run, shape, device, data)
    model, optim, per_step = shape(config), config["optim"], config["tokens_per_step"]
    how = (settings.micro_batch, settings.precision)
    trials = Trials({**config, **settings._asdict()}, run.ranks, model, device)
    timings, accumulates = trials.step(*how, optim), settings.micro_batch < trials.rows_per_rank
    make = partial(build.build_optimizer, optim)
    memory = step_memory(model, *how, make, accumulates, settings.activation_checkpointing)

    counts, steps = count_parameters(model), budget_steps(config)
    n_params, tokens = sum(counts.values()), steps * per_step
    corpus = splits.get("train", config["data"].get("tokens"))
    yield "run", str(run.path), ""
    yield "model", f"{model.n_layer} layers", f"of {model.n_embd} channels"
    yield "parameters", n_params, ""
    for part, n in counts.items():
        if n or part == "head":
            yield f"parameters.{part}", n, format_percent(n / n_params)
    yield "tokens", tokens, f"{tokens / n_params:.3g} per parameter"
    yield "tokens.corpus", corpus, "for training"
    yield "tokens.passes", corpus and tokens / corpus, "over the corpus"
    yield "steps", steps, f"of {per_step:,} tokens"
    factors = {step: factor_at(schedule, step, steps) for step in (0, steps // 2, steps - 1)}
    name = config["schedule"]["_target_"].rpartition(".")[2]
    yield "steps.schedule", name, ", ".join(f"{f:.3g} at {step}" for step, f in factors.items())
    for key, rate in optim.items():
        if key.endswith(("learning_rate", "lr")) and rate is not None:
            yield f"steps.{key}", rate, "at the top of the schedule"
    flops = flops_per_token(model)
    yield "FLOPs", flops * tokens, f"{flops:.3g} per token"
    what = f"of each rank, at the peak of a step of {settings.micro_batch} rows"
    yield "memory", memory.peak, what
    for part in ("weights", "gradients", "optimizer", "activations", "logits"):
        yield f"memory.{part}", getattr(memory, part), ""
    yield "settings", device.type, "why: above, on standard error"
    for key, value in settings._asdict().items():
        yield f"settings.{key}", value, ""
    origin = timings.how + ", not compiled" * settings.compile
    what = f"of training here, {timings.step_s:.3g} s per step ({origin})"
    yield "time", steps * timings.step_s, what
    for name, peak in DENSE_HALF_FLOPS.items():
        what = f"at {format_percent(MFU)} of the {peak / 1e12:.4g} TFLOP/s of its data sheet"
        yield f"time.{name}", flops * tokens / peak / MFU, what
    n_files = min(config["callbacks"]["checkpoint"].get("keep", 2) + 1, steps)
    yield "disk", n_files * (memory.weights + memory.optimizer), f"of {n_files} checkpoints"
    id_bytes = 2 if model.vocab_size <= 2**16 else 4
    yield "disk.corpus", sum(splits.values()) * id_bytes or None, ""


def count_parameters(config: Any) -> dict[str, int]:
    """Return the number of a model's parameters by part; a tied head has none."""
    from nanogpt.weights import model_without_weights

    counts = dict.fromkeys(("embeddings", "attention", "mlp", "norms", "head", "other"), 0)
    for name, tensor in model_without_weights(config).state_dict().items():
        parts = [PARTS.get(word, word) for word in name.split(".")]
        is_norm = any(part.startswith("ln_") or part.endswith("norm") for part in parts)
        part = next((part for part in parts if part in counts), "other")
        counts["norms" if is_norm else part] += tensor.numel()
    return counts


def prepared(data: Any, choice: Any) -> Mapping[str, Any]:
    """Return the manifest of a corpus of documents, without splits where it is not prepared."""
    from nanogpt.data.corpus import MANIFEST, read_manifest
    from nanogpt.data.source import Source

    if isinstance(getattr(data, "source", None), Source) and hasattr(data, "preparation"):
        directory = data.preparation(choice).directory
        if data.pretokenized is None and (directory / MANIFEST).exists():
            return read_manifest(directory)
    return {"splits": {}}


def count_ids(node: Mapping[str, Any], choice: Any, manifest: Mapping[str, Any]) -> int:
    """Return the ids of a tokenizer, as many as are configured where it is not trained yet."""
    from nanogpt.tokenizer import GPT2_VOCAB_SIZE

    known = {**node, **manifest.get("tokenizer", {})}
    if "vocab_size" in known:
        return int(known["vocab_size"])
    is_gpt2 = choice.key == "gpt2"  # whose table may have to be downloaded
    return GPT2_VOCAB_SIZE if is_gpt2 else int(choice.make_without_text().vocab_size)


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    parser = argparse.ArgumentParser(prog=f"python -m {PROGRAM}", allow_abbrev=False)
    parser.add_argument("overrides", nargs="*", help="arguments of train.py, such as model=nano")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
