"""What `auto` becomes on this machine, measured for each shape and stored in `probes.json`."""

import dataclasses
import itertools
import logging
import os
import statistics
import time
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from nanogpt.build import build_optimizer
from nanogpt.command import out_of_memory
from nanogpt.disk import replacing
from nanogpt.model import GPT, Attend, GPTConfig
from nanogpt.ranks import Ranks
from nanogpt.runs.run import Run
from nanogpt.text import first_line
from nanogpt.training.machine import machine_id, usable_cores, usable_memory_bytes
from nanogpt.training.memory import DTYPES, run_pass, step_memory
from nanogpt.training.throughput import flops_per_token, peak_flops
from nanogpt.values import CHECKED, Flag, Positive

log = logging.getLogger("nanogpt")

Trial = tuple[int, str]  # rows and precision of a forward and backward

CPU_PRECISIONS = ("32-true", "bf16-mixed")  # among which a CPU has the choice
# bfloat16 must be this many times as fast as float32 on a CPU to be worth its rounding.
WORTH_BF16 = 1.15
# A larger micro-batch is preferred to a smaller one that is faster by less than this.
WORTH_SMALLER = 1.03
# Micro-batches are tried up to these many tokens (more are hardly faster, only larger).
CPU_TOKENS = (512, 2048, 8192)
GPU_TOKENS = 65_536
TRIED_S = 3.0  # a forward and backward thought to take longer is not tried on a CPU
# torch.compile: share of the step it saves, and seconds it takes. CPU: 64.7 against 69.1 to 73.1 ms
# and 28 to 40 s (4 layers of 128, one EPYC thread); where that would pay, a block is compiled and
# timed. CUDA: 250 to 135 ms for GPT-2 small (nanoGPT's README); the seconds are an estimate for a
# block and the head, which do not depend on the number of layers.
COMPILE = {"cpu": (0.12, 40.0), "cuda": (0.4, 30.0)}
# Sides of the measured product: large enough to reach the device's rate.
PRODUCT_SIDE = {"cpu": 1024, "mps": 2048, "cuda": 8192}
PRODUCT_S = 0.3  # of measuring each product
MEASURE_S = 1.0  # of measuring passes, but at least MIN_ROUNDS
STEPS_S = 3.0  # of measuring optimizer steps
MIN_ROUNDS = 3
# Rounds agree where each best time was reached twice, within this factor, while this thread had a
# processor for this share of the time.
AGREEMENT = 1.1
MIN_CPU_SHARE = 0.8
RECOMPUTED = ", activation checkpointing"  # of trials whose backward recomputes the blocks
# Memory beyond the trial's own: AdamW's two moments and a gradient bucket, and some of the whole.
BYTES_PER_PARAMETER = 12
HEADROOM = 0.1


class Settings(NamedTuple):
    """How a run uses this machine."""

    precision: str
    compile: bool
    micro_batch: int
    threads: int
    peak_flops: float
    activation_checkpointing: bool = False


class Timings(NamedTuple):
    """Seconds of an optimizer step, of a validated and of a sampled token, and their origin."""

    step_s: float
    validated_s: float
    sampled_s: float
    how: str


def autotune(
    run: Run, model: GPTConfig, device: torch.device, run_s: float | None = None
) -> Settings:
    """Return the given values, and for each `auto` the best on this machine; log the reasons.

    A run of `run_s` seconds has as many steps as fit these, without it `run.max_steps`. The first
    call for a shape measures for seconds, later ones read `data_dir/probes.json`; measurements
    whose rounds disagreed, as on a busy machine, are repeated, all of them with `remeasure`. A
    setting that was not typed is the recorded one, as long as it fits; with `remeasure` that holds
    for the precision alone, which is identity. Changes the number of threads and the random state.
    """
    config, recorded, n_local = run.config, run.recorded, run.ranks.local_world_size
    trainer = config["trainer"]
    stale = set(config) if config["remeasure"] else set()
    if recorded.get("local_world_size") != n_local:
        stale.add("threads")

    def choose(key: str, node: Mapping[str, Any], measure: Callable[..., Any], *args: Any) -> Any:
        value, why = node[key], "as given"
        if value == "auto" and key in recorded and key not in stale:
            value, why = recorded[key], "same as before"
        elif value == "auto":
            value, why = measure(*args)
        log.info("%s %s: %s", key, str(value).lower(), why)
        return value

    threads = choose("threads", config, choose_threads, n_local)
    torch.set_num_threads(threads)
    trials = Trials(config, run.ranks, model, device)
    if trials.rows_per_rank % recorded.get("micro_batch", 1):
        stale.add("micro_batch")
    precision = choose("precision", trainer, choose_precision, trials)
    given = config["micro_batch"]
    key = "activation_checkpointing"
    trials.recompute = choose(key, config, _choose_recompute, trials, precision, given)
    rows = choose("micro_batch", config, _choose_micro_batch, trials, precision)
    n_steps = float(run.max_steps)
    if run_s is not None:
        n_steps = run_s / trials.guess_s(trials.rows_per_rank, "32-true")
    how = (trials, precision, rows, n_steps, trainer["deterministic"])
    compiled = choose("compile", config, _choose_compile, *how)
    peak, source = peak_flops(device, DTYPES[precision], trials.rate(precision))
    torch.cuda.empty_cache()  # NCCL and compiled kernels allocate outside of it
    log.info("peak %.4g TFLOP/s: %s", peak / 1e12, source)
    if trials.provisional:
        log.info(
            "provisional: the rounds of a measurement disagree, as on a busy machine; "
            "the next run measures again"
        )
    log.info(
        "tokens_per_step %s = %s rank(s) x %s micro-batch(es) x %s rows x block_size %s",
        f"{config['tokens_per_step']:,}",
        run.ranks.world_size,
        trials.rows_per_rank // rows,
        rows,
        model.block_size,
    )
    return Settings(precision, compiled, rows, threads, peak, trials.recompute)


def choose_threads(local_world_size: int) -> tuple[int, str]:
    """Return the threads of a process among those of this machine, and why."""
    variable = os.environ.get("OMP_NUM_THREADS", "")
    if local_world_size == 1 and variable.isdecimal() and int(variable) > 0:  # else launchers' own
        return int(variable), "OMP_NUM_THREADS"
    cores = usable_cores()
    return max(1, cores // local_world_size), f"{cores} cores for {local_world_size} process(es)"


def has_slow_bf16() -> bool:
    """Whether bfloat16 products are known to be slow: a hundredth of float32's rate on an EPYC."""
    return torch.backends.cpu.get_cpu_capability() == "AVX2"


def choose_precision(trials: "Trials") -> tuple[str, str]:
    """Return the precision in which this machine trains a model best, and why."""
    if trials.device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16-mixed", "the GPU has bfloat16"
        if torch.cuda.get_device_capability() >= (7, 0):
            return "16-mixed", "the GPU has float16 tensor cores and no bfloat16"
        return "32-true", "the GPU has no tensor cores"
    if trials.device.type != "cpu":
        return "32-true", f"the gain of others on {trials.device.type} is not known"
    if has_slow_bf16():
        return "32-true", "the processor has no matrix products in bfloat16"
    gain, what = trials.rate("bf16-mixed") / trials.rate("32-true"), "matrix products"
    rows = trials.candidates()[0]
    if gain >= WORTH_BF16 and trials.guess_s(rows, "32-true") <= TRIED_S:
        timings = trials.time([(rows, precision) for precision in CPU_PRECISIONS])
        gain, what = timings[rows, "32-true"] / timings[rows, "bf16-mixed"], "forward and backward"
    choice = "bf16-mixed" if gain >= WORTH_BF16 else "32-true"
    return choice, f"{what} in bfloat16 run {gain:.2f} times as fast"


def _choose_recompute(trials: "Trials", precision: str, given: int | str) -> tuple[bool, str]:
    if given != "auto":
        return False, "micro_batch is given"
    if trials.device.type == "cuda":
        fits = bool(trials.time([(rows, precision) for rows in trials.candidates()]))
    else:
        row = step_memory(trials.config, 1, recompute=False)
        n_bytes = 4 * row.weights + row.activations + row.logits  # with gradients and AdamW's state
        fits = n_bytes <= usable_memory_bytes() / trials.local_world_size
    return not fits, f"a row {'fits' if fits else 'does not fit'} in memory without it"


def _choose_micro_batch(trials: "Trials", precision: str) -> tuple[int, str]:
    candidates = trials.candidates()
    if len(candidates) == 1:
        return candidates[0], f"of {trials.rows_per_rank} rows per step and rank"
    timings = trials.time([(rows, precision) for rows in candidates])
    row_s = {rows: seconds / rows for (rows, _), seconds in timings.items()}
    if not row_s:
        return candidates[0], "the memory is too small even for this"
    fastest_s = min(row_s.values())
    best = max(rows for rows in row_s if row_s[rows] <= WORTH_SMALLER * fastest_s)
    rate = trials.config.block_size / row_s[best]
    tried = ", ".join(map(str, sorted(row_s)))
    return best, f"the fastest of {tried} ({rate:,.0f} tokens/s without the optimizer)"


def _choose_compile(
    trials: "Trials", precision: str, rows: int, n_steps: float, deterministic: bool
) -> tuple[bool, str]:
    kind = trials.device.type
    if kind not in COMPILE:
        return False, f"its gain on {kind} is not known"
    if kind == "cuda" and deterministic:
        return False, "its kernels are chosen by timing, and trainer.deterministic is set"
    pass_s = trials.guess_s(rows, precision)
    if pass_s <= TRIED_S:
        candidates = trials.candidates()
        timed = candidates if rows in candidates else [rows]
        pass_s = trials.time([(n, precision) for n in timed]).get((rows, precision), pass_s)
    step_s = pass_s * trials.rows_per_rank / rows
    saved_s, cost_s = trials.compiling(step_s)
    if n_steps * saved_s > cost_s:  # on a CPU these numbers only decide whether to measure
        try:
            saved_s, cost_s = trials.compiled(rows, precision, step_s)
        except Exception as error:  # whatever the compilers of a machine raise
            return False, f"it fails on this machine ({first_line(error)})"
    saved_s *= n_steps
    return saved_s > cost_s, f"would save about {saved_s:.0f} s of the run and take {cost_s:.0f} s"


@dataclass(config=CHECKED)
class Measured:
    """Seconds by trial; provisional where the rounds disagree, as on a busy machine."""

    seconds: dict[str, Positive]
    provisional: Flag


STORED = TypeAdapter(dict[str, Measured])  # by machine and what was measured


class Trials:
    """Forward and backward passes of one shape, and matrix products, timed on one device.

    The times are stored in a JSON file that several processes may share. Provisional ones, and with
    `remeasure` all, are measured again by the next process; so is everything where the file is
    damaged.
    """

    def __init__(
        self, config: Mapping[str, Any], ranks: Ranks, model: GPTConfig, device: torch.device
    ) -> None:
        if config["trainer"]["deterministic"]:  # cuBLAS reads it at its first product
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        self.config, self.device, self.local_world_size = model, device, ranks.local_world_size
        self.recompute = config["activation_checkpointing"] is True
        self.rows_per_rank = config["tokens_per_step"] // (model.block_size * ranks.world_size)
        used = f"{torch.get_num_threads()} threads, {self.local_world_size} ranks"
        self.scope = f"{machine_id(self.device)}, {used}"
        self.shape = " ".join(f"{key}={value}" for key, value in model.record().items())
        self.path = Path(config["data_dir"]) / "probes.json"
        self.provisional = False  # whether any measurement of this process is
        stored = {} if config["remeasure"] else _read(self.path)
        self.known = {key: found for key, found in stored.items() if not found.provisional}

    def rate(self, precision: str) -> float:
        """Return the FLOP/s of matrix products in a precision."""
        is_cpu = self.device.type == "cpu"
        is_choice = is_cpu and precision in CPU_PRECISIONS and not has_slow_bf16()
        precisions = CPU_PRECISIONS if is_choice else (precision,)
        side = PRODUCT_SIDE.get(self.device.type, PRODUCT_SIDE["cuda"])

        def measure() -> Measured:
            products = {}
            for name in precisions:
                a = torch.rand(side, side, device=self.device).to(DTYPES[name])
                out = torch.empty_like(a)
                products[name] = partial(torch.mm, a, a.t().contiguous(), out=out)
            return self._in_turn(products, PRODUCT_S * len(products))

        seconds = self.recall(f"product {', '.join(precisions)}", measure)
        return 2 * side**3 / seconds[precision]

    def time(self, trials: Collection[Trial]) -> dict[Trial, float]:
        """Return the seconds of a forward and backward of each trial whose memory suffices.

        The rows ascend.
        """
        names = {trial: "{} rows {}".format(*trial) for trial in trials}
        what = f"{'; '.join(names.values())}, {self.shape}{RECOMPUTED * self.recompute}"
        seconds = self.recall(what, lambda: self._measure(names))
        return {trial: seconds[name] for trial, name in names.items() if name in seconds}

    def step(self, rows: int, precision: str, optim: Mapping[str, Any]) -> Timings:
        """Return the seconds of an optimizer step in micro-batches, and of evaluations.

        They are medians over steps with the optimizer that the node `optim` names, which updates
        nothing. On a CPU, those of slow models follow from `guess_s`.
        """
        n_before, n_tokens = self.rows_per_rank // rows - 1, rows * self.config.block_size
        if self.device.type == "cpu" and (guess_s := self.guess_s(rows, precision)) > TRIED_S:
            forward_s = guess_s / 3 / n_tokens
            how = "from matrix products"
            return Timings((n_before + 1) * guess_s, forward_s, forward_s, how)
        how = ", ".join(f"{key}={value}" for key, value in optim.items())
        how += f", {self.shape}{RECOMPUTED * self.recompute}"
        what = f"steps of {rows} rows {precision}, {how}"
        found = self.recall(what, lambda: self._measure_step(rows, precision, optim))
        step_s = n_before * found.get("pass", 0.0) + found["update"]
        return Timings(step_s, found["forward"] / n_tokens, found["token"], "measured")

    def compiling(self, step_s: float) -> tuple[float, float]:
        """Return the seconds that torch.compile may save of a step of `step_s`, and take."""
        gain, cost_s = COMPILE[self.device.type]
        return gain * step_s, cost_s

    def compiled(self, rows: int, precision: str, step_s: float) -> tuple[float, float]:
        """Return the same as `compiling`, on a CPU of a block that is compiled and timed.

        Raises whatever the compiler raises.
        """
        if self.device.type != "cpu":
            torch.compile(lambda x: x + 1)(torch.ones(8, device=self.device))
            return self.compiling(step_s)
        what = f"block of {rows} rows {precision}, {self.shape}"
        block = self.recall(what, lambda: self._measure_block(rows, precision))
        saved_s = (block["eager"] - block["compiled"]) * self.rows_per_rank / rows
        return saved_s * self.config.n_layer, block["compilation"] * self.config.n_layer

    def guess_s(self, rows: int, precision: str) -> float:
        """Return the seconds of a forward and backward at half the rate of matrix products."""
        tokens = rows * self.config.block_size
        return 2 * flops_per_token(self.config) * tokens / self.rate(precision)

    def candidates(self) -> list[int]:
        """Return micro-batches worth trying, ascending: divisors of the rows of a step."""
        T, kind = self.config.block_size, self.device.type
        rows = [n for n in range(1, self.rows_per_rank + 1) if self.rows_per_rank % n == 0]
        sizes: tuple[int, ...] = CPU_TOKENS if kind == "cpu" else CPU_TOKENS[-1:]
        if kind == "cuda":
            sizes = tuple(T << i for i in range(max(1, (GPU_TOKENS // T).bit_length())))
        else:
            memory = usable_memory_bytes() / 4 / self.local_world_size
            row = step_memory(self.config, 1, recompute=self.recompute)
            row_bytes = row.activations + row.logits
            rows = [n for n in rows if n * row_bytes <= memory] or [1]
        largest = sorted({max(n for n in rows if n == 1 or n * T <= size) for size in sizes})
        quick = [n for n in largest if kind != "cpu" or self.guess_s(n, "32-true") <= TRIED_S]
        return quick or largest[:1]

    def recall(self, what: str, measure: Callable[[], Measured]) -> dict[str, float]:
        """Return the seconds stored for a measurement, which is taken where there are none."""
        key = f"{self.scope}: {what}"
        if key not in self.known:
            self.known[key] = measure()
            self.provisional |= self.known[key].provisional
            content = _read(self.path) | {key: self.known[key]}  # another process may have written
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with replacing(self.path) as file:
                    file.write(STORED.dump_json(content, indent=1))
            except OSError as error:
                log.warning(
                    "measurements are not stored: %s cannot be written (%s)", self.path, error
                )
        return self.known[key].seconds

    def _in_turn(
        self,
        trials: Mapping[str, Callable[[], object]],
        budget_s: float,
        choose: Callable[[list[float]], float] = min,
    ) -> Measured:
        """Return the best (or other) seconds of trials that take turns, over several rounds."""
        times: dict[str, list[float]] = {name: [] for name in trials}
        start, cpu_start = time.perf_counter(), time.thread_time()
        for n_rounds in itertools.count():
            elapsed_s = time.perf_counter() - start
            if n_rounds >= MIN_ROUNDS and elapsed_s * (n_rounds + 1) / n_rounds > budget_s:
                break
            for name, trial in trials.items():
                began = time.perf_counter()
                trial()
                if self.device.type != "cpu":
                    torch.accelerator.synchronize(self.device)
                times[name].append(time.perf_counter() - began)
        cpu_s = time.thread_time() - cpu_start
        waited = self.device.type == "cpu" and cpu_s < MIN_CPU_SHARE * elapsed_s
        two_best = [sorted(seconds)[:2] for seconds in times.values()]
        disagree = not times or any(second > AGREEMENT * best for best, second in two_best)
        chosen = {name: choose(seconds) for name, seconds in times.items()}
        return Measured(chosen, waited or disagree)

    def _measure(self, trials: Mapping[Trial, str]) -> Measured:
        """Time the trials in turn, on a GPU those that its memory suffices for."""
        passes: dict[str, Callable[[], None]] = {}
        is_gpu = self.device.type == "cuda"
        with self.device:
            model = GPT(self.config).train()
        try:
            reserve = self._memory_reserve(model) if is_gpu else None
            for trial, name in trials.items():
                passes[name] = partial(run_pass, model, *trial, self.recompute)
                if is_gpu:
                    passes[name]()  # which loads and chooses kernels
            del reserve
        except RuntimeError as error:  # cuBLAS has no class of its own for it
            if not is_gpu or not out_of_memory(error):
                raise
            log.debug("memory is full at %s", passes.popitem()[0] if passes else "no rows")
        return self._in_turn(passes, MEASURE_S)

    def _measure_step(self, rows: int, precision: str, optim: Mapping[str, Any]) -> Measured:
        """Time steps, micro-batches before a step's last, forwards, and those of one token."""
        with self.device:
            model = GPT(self.config).train()
        optimizer = build_optimizer(optim, model)
        for group in optimizer.param_groups:
            group["lr"] = 0.0

        def update() -> None:
            run_pass(model, rows, precision, self.recompute)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        one = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        passes: dict[str, Callable[[], object]] = {
            "update": update,
            "pass": partial(run_pass, model, rows, precision, self.recompute),
            "forward": partial(run_pass, model, rows, precision, learns=False),
            "token": torch.no_grad()(partial(model, one)),
        }
        if rows == self.rows_per_rank:
            del passes["pass"]
        return self._in_turn(passes, STEPS_S, statistics.median)

    def _measure_block(self, rows: int, precision: str) -> Measured:
        """Time a block's forward and backward, eager and compiled, and its compilation."""
        model = GPT(dataclasses.replace(self.config, n_layer=1)).train()
        T, block = self.config.block_size, model.h[0]
        x = torch.randn(rows, T, self.config.n_embd, requires_grad=True)
        rotation = model.rotation(torch.arange(T))

        def run(block: Callable[..., torch.Tensor]) -> None:
            with torch.autocast("cpu", DTYPES[precision], precision != "32-true"):
                loss = block(x, rotation, Attend()).sum()
            loss.backward()

        compiled, began = partial(run, torch.compile(block)), time.perf_counter()
        compiled()
        compilation_s = time.perf_counter() - began
        found = self._in_turn({"eager": partial(run, block), "compiled": compiled}, MEASURE_S)
        found.seconds["compilation"] = compilation_s
        return found

    def _memory_reserve(self, model: GPT) -> torch.Tensor:
        """Return a tensor (N,) of the bytes that training needs and a trial does not."""
        total = torch.cuda.get_device_properties(self.device).total_memory
        n_bytes = BYTES_PER_PARAMETER * model.num_parameters() + int(HEADROOM * total)
        return torch.empty(n_bytes, dtype=torch.uint8, device=self.device)


def _read(path: Path) -> dict[str, Measured]:
    try:
        return STORED.validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return {}
