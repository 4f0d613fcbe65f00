"""Timed trials of one shape on this machine, taken in rounds and stored in `probes.json`."""

import contextlib
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
from lightning.pytorch.utilities.memory import is_oom_error
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from nanogpt.disk import replacing
from nanogpt.model import GPT, GPTConfig
from nanogpt.training.language_model import next_token_loss
from nanogpt.training.machine import machine_id
from nanogpt.training.throughput import flops_per_token, make_product, synchronize
from nanogpt.values import CHECKED, Flag

log = logging.getLogger(__name__)

Timings = dict[str, float]  # seconds by the name of a trial
Trial = Callable[[], float]  # runs once and returns its seconds

DTYPES = {
    "32-true": torch.float32,
    "bf16-mixed": torch.bfloat16,
    "16-mixed": torch.float16,
}
CPU_PRECISIONS = ("32-true", "bf16-mixed")  # among which a CPU has the choice
MEASURE_S = 1.0  # per measurement, but at least MIN_ROUNDS
PRODUCT_S = 0.3  # the same for each matrix product
MIN_ROUNDS, MAX_ROUNDS = 3, 100
# Rounds agree where each best time was reached twice, within this factor, while this thread had a
# processor for this share of the time.
AGREEMENT = 1.1
MIN_CPU_SHARE = 0.8
# Memory beyond the trial's own: AdamW's two moments and a gradient bucket, and some of the whole.
BYTES_PER_PARAMETER = 12
HEADROOM = 0.1


@dataclass(config=CHECKED)
class Measured:
    """Seconds by trial; provisional where the rounds disagree, as on a busy machine."""

    seconds: dict[str, Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]]
    provisional: Flag


STORED = TypeAdapter(dict[str, dict[str, Measured]])  # by machine and key


class Trials:
    """Forward and backward passes of one shape, and matrix products, on one device."""

    def __init__(
        self,
        config: GPTConfig,
        device: torch.device,
        rows_per_rank: int,
        threads: int,
        local_world_size: int,
        data_dir: Path,
        remeasure: bool = False,
    ) -> None:
        self.config = config
        self.device = device
        self.rows_per_rank = rows_per_rank
        self.local_world_size = local_world_size
        self.where = f"{threads} threads, {local_world_size} ranks"
        self.shape = " ".join(f"{key}={value}" for key, value in config.record().items())
        self.stored = Measurements(data_dir / "probes.json", machine_id(device), remeasure)

    def product_rates(self, precisions: Collection[str]) -> dict[str, float]:
        """Return the FLOP/s of matrix products by precision, measured in turn."""
        seconds = self.stored.recall(
            f"product {', '.join(precisions)}, {self.where}",
            lambda: self._in_turn(
                {name: make_product(self.device, DTYPES[name]) for name in precisions},
                PRODUCT_S * len(precisions),
            ),
            precisions,
        )
        return {name: 1 / seconds[name] for name in precisions}

    def rate(self, precision: str) -> float:
        """Return the FLOP/s of matrix products in a precision."""
        both = self.device.type == "cpu" and precision in CPU_PRECISIONS
        return self.product_rates(CPU_PRECISIONS if both else [precision])[precision]

    def time(self, trials: Mapping[str, tuple[int, str]]) -> Timings:
        """Return the seconds of a forward and backward of (rows, precision), for those that fit.

        On a GPU the rows are to ascend, and the first trial alone is sure to be among the results.
        """
        required = list(trials)[:1] if self.device.type == "cuda" else trials
        key = "; ".join(f"{rows} rows {precision}" for rows, precision in trials.values())
        return self.stored.recall(
            f"{key}, {self.where}, {self.shape}", lambda: self._measure(trials), required
        )

    def guess_s(self, rows: int, precision: str) -> float:
        """Return the seconds of a forward and backward at half the rate of matrix products."""
        tokens = rows * self.config.block_size
        return 2 * flops_per_token(self.config) * tokens / self.rate(precision)

    def _in_turn(self, trials: Mapping[str, Trial], budget_s: float) -> Measured:
        """Return the best seconds of trials that take turns, over several rounds."""
        times: dict[str, list[float]] = {name: [] for name in trials}
        start, cpu_start = time.perf_counter(), time.thread_time()
        for n_rounds in range(MAX_ROUNDS):
            elapsed_s = time.perf_counter() - start
            if n_rounds >= MIN_ROUNDS and elapsed_s * (n_rounds + 1) / n_rounds > budget_s:
                break
            for name, trial in trials.items():
                times[name].append(trial())
        elapsed_s, cpu_s = time.perf_counter() - start, time.thread_time() - cpu_start
        waited = self.device.type == "cpu" and cpu_s < MIN_CPU_SHARE * elapsed_s
        two_best = [sorted(seconds)[:2] for seconds in times.values()]
        disagree = any(second > AGREEMENT * best for best, second in two_best)
        return Measured({name: min(seconds) for name, seconds in times.items()}, waited or disagree)

    def _measure(self, trials: Mapping[str, tuple[int, str]]) -> Measured:
        """Time the trials in turn; on a GPU one after another while its memory suffices."""
        best: Timings = {}
        provisional = False
        try:
            with self.device:
                model = GPT(self.config).train()
            passes = {name: partial(self._seconds, model, *trial) for name, trial in trials.items()}
            if self.device.type != "cuda":
                return self._in_turn(passes, MEASURE_S)
            reserve = self._memory_reserve(model)
            for name, trial in passes.items():
                trial()  # kernels are loaded and chosen
                measured = self._in_turn({name: trial}, 0)
                best |= measured.seconds
                provisional |= measured.provisional
            del reserve
        except RuntimeError as error:
            if self.device.type != "cuda" or not is_oom_error(error):
                raise
            log.debug("memory is full beyond %s rows", list(best))
        return Measured(best, provisional)

    def _memory_reserve(self, model: GPT) -> torch.Tensor:
        """Return a tensor (N,) of the bytes that training needs and a trial does not."""
        n_parameters = sum(p.numel() for p in model.parameters())
        total = torch.cuda.get_device_properties(self.device).total_memory
        n_bytes = BYTES_PER_PARAMETER * n_parameters + int(HEADROOM * total)
        return torch.empty(n_bytes, dtype=torch.uint8, device=self.device)

    def _seconds(self, model: GPT, rows: int, precision: str) -> float:
        """Time one forward and backward; gradients add up, as over the micro-batches of a step."""
        shape = (rows, self.config.block_size)
        input_ids = torch.randint(self.config.vocab_size, shape, device=self.device)
        synchronize(self.device)
        start = time.perf_counter()
        with torch.autocast(self.device.type, DTYPES[precision], enabled=precision != "32-true"):
            loss = next_token_loss(model, input_ids, input_ids)
        (loss / input_ids.numel()).backward()
        synchronize(self.device)
        return time.perf_counter() - start


@contextlib.contextmanager
def isolated_measurement(device: torch.device, threads: int) -> Iterator[None]:
    """Measure with some threads; afterwards random states and memory are as they were."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
            yield
    finally:
        torch.set_num_threads(n_threads)
        if device.type == "cuda":
            torch.cuda.empty_cache()


class Measurements:
    """The measurements of one machine in a JSON file that several processes may share.

    Provisional ones, and with `remeasure` all, are measured again by the next process; so is
    everything where the file is damaged.
    """

    def __init__(self, path: Path, machine: str, remeasure: bool = False) -> None:
        self.path = path
        self.machine = machine
        self.remeasure = remeasure
        self.provisional = False  # whether any recalled measurement is
        self._measured: dict[str, Timings] = {}  # by this process

    def recall(
        self, key: str, measure: Callable[[], Measured], required: Collection[str] = ()
    ) -> Timings:
        """Return the seconds stored under the key, those of `required` trials among them."""
        if key in self._measured:
            return self._measured[key]
        stored = None if self.remeasure else self._read().get(self.machine, {}).get(key)
        if stored and not stored.provisional and stored.seconds.keys() >= set(required):
            return stored.seconds
        measured = measure()
        self.provisional |= measured.provisional
        self._measured[key] = measured.seconds
        content = self._read()  # again: another process may have written meanwhile
        content.setdefault(self.machine, {})[key] = measured
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.path) as file:
                file.write(STORED.dump_json(content, indent=1))
        except OSError as error:
            log.warning("measurements are not stored: %s cannot be written (%s)", self.path, error)
        return measured.seconds

    def _read(self) -> dict[str, dict[str, Measured]]:
        try:
            return STORED.validate_json(self.path.read_bytes())
        except (OSError, ValidationError):
            return {}
