"""What `auto` becomes on this machine, measured for each shape and stored in `probes.json`."""

import logging
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from nanogpt.model import GPTConfig
from nanogpt.ranks import on_rank_zero
from nanogpt.runs.run import Run
from nanogpt.support import ANY, IN_BLOCKS, check_supported
from nanogpt.training.machine import missing_for_compile, usable_cores, usable_memory_bytes
from nanogpt.training.throughput import peak_flops
from nanogpt.training.trials import CPU_PRECISIONS, DTYPES, Trials, isolated_measurement

log = logging.getLogger("nanogpt")
T = TypeVar("T")

SUPPORTED = {**IN_BLOCKS, "position": ANY, "activation": ("gelu", "relu2")}
# bfloat16 must be this many times as fast as float32 on a CPU to be worth its rounding.
WORTH_BF16 = 1.15
# A larger micro-batch is preferred to a smaller one that is faster by less than this.
WORTH_SMALLER = 1.03
# Micro-batches are tried up to these many tokens (more are hardly faster, only larger).
CPU_TOKENS = (8192, 2048, 512)
GPU_TOKENS = 65_536
TRIED_S = 3.0  # a forward and backward thought to take longer is not tried on a CPU
# torch.compile: share of the step it saves and seconds it takes. CPU: 64.7 against 69.1 to 73.1 ms
# and 28 to 40 s (4 layers of 128, one EPYC thread). CUDA: 250 to 135 ms for GPT-2 small (nanoGPT's
# README), about 60 s for its 12 layers.
COMPILE_GAIN = {"cpu": 0.12, "cuda": 0.4}
COMPILE_S = {"cpu": 40.0, "cuda": 30.0}
COMPILE_LAYER_S = {"cpu": 0.0, "cuda": 3.0}


@dataclass(frozen=True)
class Settings:
    """How a run uses this machine, with one sentence of reason for each setting."""

    precision: str
    compile: bool
    micro_batch: int
    threads: int
    peak_flops: float
    reasons: list[str]

    def resolved(self) -> dict[str, Any]:
        """Return the settings without their reasons."""
        return {key: value for key, value in asdict(self).items() if key != "reasons"}


def autotune(
    config: GPTConfig,
    *,
    device: torch.device,
    rows_per_rank: int,
    max_steps: int,
    data_dir: Path,
    local_world_size: int = 1,
    deterministic: bool = False,
    precision: str = "auto",
    compile: bool | str = "auto",
    micro_batch: int | str = "auto",
    threads: int | str = "auto",
    remeasure: bool = False,
) -> Settings:
    """Return the given values, and for each `auto` the best on this machine.

    `rows_per_rank` are the rows of `block_size` tokens of one rank and optimizer step; a
    micro-batch divides them. The first call for a shape measures for seconds, later ones read
    `data_dir/probes.json`; measurements whose rounds disagreed, as on a busy machine, are repeated,
    all of them with `remeasure`. Random states and the number of threads stay as they were.
    """
    reasons: dict[str, str] = {}

    def choose(key: str, value: Any, measure: Callable[[], tuple[Any, str]]) -> Any:
        value, why = measure() if value == "auto" else (value, "as given")
        text = str(value).lower() if isinstance(value, bool) else value
        reasons[key] = f"{key} {text}: {why}"
        return value

    n_threads = choose("threads", threads, lambda: _choose_threads(local_world_size))
    with isolated_measurement(device, n_threads):
        trials = Trials(
            config, device, rows_per_rank, n_threads, local_world_size, data_dir, remeasure
        )
        precision = choose("precision", precision, lambda: _choose_precision(trials))
        rows = choose("micro_batch", micro_batch, lambda: _choose_micro_batch(trials, precision))
        compiled = choose(
            "compile",
            compile,
            lambda: _choose_compile(trials, precision, rows, max_steps, deterministic),
        )
        peak, source = peak_flops(device, DTYPES[precision], trials.rate(precision))
    reasons["peak"] = f"peak {peak / 1e12:.4g} TFLOP/s: {source}"
    ordered = [reasons[key] for key in ("precision", "micro_batch", "compile", "threads", "peak")]
    if trials.stored.provisional:
        ordered.append(
            "provisional: the rounds of a measurement disagree, as on a busy machine; "
            "the next run measures again"
        )
    return Settings(precision, compiled, rows, n_threads, peak, ordered)


def autotune_run(
    run: Run, model_config: GPTConfig, device: torch.device, rows_per_rank: int
) -> Settings:
    """Return the settings of a run, decided by rank zero and logged with their reasons.

    A setting that was not typed is the recorded one, as long as it fits; with `remeasure` that
    holds for the precision alone, which is identity.
    """
    config, recorded, n_local = run.config, run.recorded, run.ranks.local_world_size
    given = {key: config[key] for key in ("compile", "micro_batch", "threads")}
    given["precision"] = config["trainer"]["precision"]
    is_auto = {key for key, value in given.items() if value == "auto"}
    stale = {"compile", "micro_batch", "threads"} if config["remeasure"] else set()
    if rows_per_rank % recorded.get("micro_batch", 1):
        stale.add("micro_batch")
    if recorded.get("local_world_size") != n_local:
        stale.add("threads")
    given |= {key: recorded.get(key, "auto") for key in is_auto - stale}
    if config["trainer"]["deterministic"]:  # cuBLAS reads it at its first product, which is timed
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    settings = on_rank_zero(
        lambda: autotune(
            model_config,
            device=device,
            rows_per_rank=rows_per_rank,
            max_steps=run.max_steps,
            data_dir=Path(config["data_dir"]),
            local_world_size=n_local,
            deterministic=config["trainer"]["deterministic"],
            remeasure=config["remeasure"],
            **given,
        )
    )
    for reason in settings.reasons:
        if reason.partition(" ")[0] in is_auto:
            reason = reason.replace(": as given", ": same as before")
        log.info("%s", reason)
    log.info(
        "tokens_per_step %s = %s rank(s) x %s micro-batch(es) x %s rows x block_size %s",
        f"{config['tokens_per_step']:,}",
        run.ranks.world_size,
        rows_per_rank // settings.micro_batch,
        settings.micro_batch,
        model_config.block_size,
    )
    return settings


def _choose_threads(local_world_size: int) -> tuple[int, str]:
    variable = os.environ.get("OMP_NUM_THREADS", "")
    if local_world_size == 1 and variable.isdecimal() and int(variable) > 0:  # else launchers' own
        return int(variable), "OMP_NUM_THREADS"
    cores = usable_cores()
    return max(1, cores // local_world_size), f"{cores} cores for {local_world_size} process(es)"


def _choose_precision(trials: Trials) -> tuple[str, str]:
    if trials.device.type == "cuda":
        with torch.cuda.device(trials.device):
            if torch.cuda.is_bf16_supported(including_emulation=False):
                return "bf16-mixed", "the GPU has bfloat16"
            if torch.cuda.get_device_capability() >= (7, 0):
                return "16-mixed", "the GPU has float16 tensor cores and no bfloat16"
        return "32-true", "the GPU has no tensor cores"
    if trials.device.type != "cpu":
        return "32-true", f"the gain of others on {trials.device.type} is not known"
    rates = trials.product_rates(CPU_PRECISIONS)
    gain, what = rates["bf16-mixed"] / rates["32-true"], "matrix products"
    rows = _candidates(trials)[0]
    if gain >= WORTH_BF16 and trials.guess_s(rows, "32-true") <= TRIED_S:
        timings = trials.time({name: (rows, name) for name in CPU_PRECISIONS})
        gain, what = timings["32-true"] / timings["bf16-mixed"], "forward and backward"
    choice = "bf16-mixed" if gain >= WORTH_BF16 else "32-true"
    return choice, f"{what} in bfloat16 run {gain:.2f} times as fast"


def _choose_micro_batch(trials: Trials, precision: str) -> tuple[int, str]:
    candidates = _candidates(trials)
    if len(candidates) == 1:
        return candidates[0], f"of {trials.rows_per_rank} rows per step and rank"
    if trials.device.type not in ("cpu", "cuda"):
        return candidates[-1], f"the largest of at most {CPU_TOKENS[0]} tokens"
    timings = trials.time({str(rows): (rows, precision) for rows in candidates})
    row_s = {rows: timings[str(rows)] / rows for rows in candidates if str(rows) in timings}
    if not row_s:
        return candidates[0], "the memory is too small even for this"
    fastest_s = min(row_s.values())
    best = max(rows for rows in row_s if row_s[rows] <= WORTH_SMALLER * fastest_s)
    rate = trials.config.block_size / row_s[best]
    tried = ", ".join(map(str, sorted(row_s)))
    return best, f"the fastest of {tried} ({rate:,.0f} tokens/s without the optimizer)"


def _choose_compile(
    trials: Trials, precision: str, micro_batch: int, max_steps: int, deterministic: bool
) -> tuple[bool, str]:
    kind = trials.device.type
    if kind not in COMPILE_GAIN:
        return False, f"its gain on {kind} is not known"
    if kind == "cuda" and deterministic:
        return False, "its kernels are chosen by timing, and trainer.deterministic is set"
    if (missing := missing_for_compile(trials.device)) is not None:
        return False, f"this machine lacks {missing}"
    micro_batch_s = trials.guess_s(micro_batch, precision)
    if micro_batch_s <= TRIED_S:
        candidates = _candidates(trials)
        timed = candidates if micro_batch in candidates else [micro_batch]
        timings = trials.time({str(rows): (rows, precision) for rows in timed})
        micro_batch_s = timings.get(str(micro_batch), micro_batch_s)
    run_s = max_steps * micro_batch_s * trials.rows_per_rank / micro_batch
    saved_s = COMPILE_GAIN[kind] * run_s
    cost_s = COMPILE_S[kind] + COMPILE_LAYER_S[kind] * trials.config.n_layer
    return saved_s > cost_s, f"would save about {saved_s:.0f} s of the run and take {cost_s:.0f} s"


def _candidates(trials: Trials) -> list[int]:
    """Return micro-batches worth trying, ascending: divisors of the rows of a step."""
    T = trials.config.block_size
    divisors = [n for n in range(1, trials.rows_per_rank + 1) if trials.rows_per_rank % n == 0]
    if trials.device.type == "cuda":
        doubling = [1]
        for rows in divisors:
            if rows >= 2 * doubling[-1] and rows * T <= GPU_TOKENS:
                doubling.append(rows)
        return doubling
    memory = usable_memory_bytes() / 4 / trials.local_world_size
    fitting = [n for n in divisors if n * T * _bytes_per_token(trials.config) <= memory] or [1]
    largest = {max([n for n in fitting if n * T <= tokens] or [1]) for tokens in CPU_TOKENS}
    if trials.device.type != "cpu":
        return [max(largest)]
    quick = [n for n in largest if trials.guess_s(n, "32-true") <= TRIED_S]
    return sorted(quick) or [min(largest)]


def _bytes_per_token(config: GPTConfig) -> int:
    """Return about what a token's forward stores for its backward in float32."""
    consumer = "the memory estimate (nanogpt/training/autotune.py)"
    check_supported(config, consumer, SUPPORTED)
    return 4 * (20 * config.n_layer * config.n_embd + 3 * config.vocab_size)
