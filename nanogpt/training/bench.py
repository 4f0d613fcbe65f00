"""How fast one shape runs on this machine, measured in rounds and stored in `probes.json`."""

import contextlib
import json
import logging
import math
import os
import secrets
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities.memory import is_oom_error

from nanogpt.model import GPT, GPTConfig
from nanogpt.training.language_model import next_token_loss
from nanogpt.training.machine import machine_id
from nanogpt.training.throughput import (
    flops_per_token,
    make_product,
    peak_flops,
    synchronize,
)

log = logging.getLogger(__name__)

Timings = dict[str, float]  # what was tried -> seconds, or another figure

DTYPES = {
    "32-true": torch.float32,
    "bf16-mixed": torch.bfloat16,
    "16-mixed": torch.float16,
}
CPU_PRECISIONS = ["32-true", "bf16-mixed"]  # among which a CPU has the choice
MEASURE_S = 1.0  # per measurement, but at least MIN_ROUNDS
PRODUCT_S = 0.3  # the same for each matrix product
MIN_ROUNDS, MAX_ROUNDS = 3, 100
# Rounds agree where each best time was reached twice, within this factor ...
AGREEMENT = 1.1
# ... and this thread had a processor for this share of the time.
MIN_CPU_SHARE = 0.8
# Memory beside the trial's own: AdamW's two moments and a gradient bucket, and some of the whole.
BYTES_PER_PARAMETER = 12
HEADROOM = 0.1


class Measured(NamedTuple):
    """Figures by what was tried; provisional where the rounds disagree, as on a busy machine."""

    figures: Timings
    provisional: bool


class Bench:
    """One shape on one device, measured now or before."""

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
        self.row_timings: Timings = {}  # the latest of `time_rows`

    def peak(self, precision: str) -> tuple[float, str]:
        """Return the device's rate in the precision's products, and where the figure is from."""

        def measure() -> Measured:
            rates, provisional = self._time_products([precision])
            rate, source = peak_flops(self.device, DTYPES[precision], rates[precision])
            return Measured({source: rate}, provisional)

        figures = self.stored.recall(f"peak {precision}, {self.where}", measure)
        source, value = next(iter(figures.items()))
        return value, source

    def compare_products(self) -> Timings:
        """Return the device's rate in products of float32 and of bfloat16, measured in turn."""
        return self.stored.recall(
            f"products, {self.where}", lambda: self._time_products(CPU_PRECISIONS), CPU_PRECISIONS
        )

    def _time_products(self, precisions: list[str]) -> Measured:
        products = {name: make_product(self.device, DTYPES[name]) for name in precisions}
        trials = {name: product.seconds for name, product in products.items()}
        best, provisional = self._in_turn(trials, PRODUCT_S * len(trials))
        rates = {name: products[name].flops / seconds for name, seconds in best.items()}
        return Measured(rates, provisional)

    def time_precisions(self, rows: int) -> Timings:
        """Return the seconds of a forward and backward of some rows by precision, on a CPU."""
        return self.stored.recall(
            f"precision, {rows} rows, {self.where}, {self.shape}",
            lambda: self._time({name: (rows, name) for name in CPU_PRECISIONS}),
            CPU_PRECISIONS,
        )

    def time_rows(self, candidates: list[int], precision: str) -> Timings:
        """Return the seconds of a forward and backward by rows, for those that fit."""
        measure = self._time_until_full if self.device.type == "cuda" else self._time
        self.row_timings = self.stored.recall(
            f"rows {candidates}, {precision}, {self.where}, {self.shape}",
            lambda: measure({str(rows): (rows, precision) for rows in candidates}),
            [str(candidates[0])],
        )
        return self.row_timings

    def guess_s(self, rows: int, precision: str) -> float:
        """Return the seconds of a forward and backward at half of the device's peak."""
        tokens = rows * self.config.block_size
        return 2 * flops_per_token(self.config) * tokens / self.peak(precision)[0]

    def _time(self, trials: dict[str, tuple[int, str]]) -> Measured:
        """Time the trials (rows, precision) in turn."""
        model = self._model()
        return self._in_turn(
            {name: partial(self._seconds, model, *trial) for name, trial in trials.items()},
            MEASURE_S,
        )

    def _in_turn(self, trials: Mapping[str, Callable[[], float]], budget_s: float) -> Measured:
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
        best = {name: min(seconds) for name, seconds in times.items()}
        return Measured(best, waited or disagree)

    def _time_until_full(self, trials: dict[str, tuple[int, str]]) -> Measured:
        """Time ever more rows while they fit in a GPU's memory beside the optimizer's state."""
        best: Timings = {}
        provisional = False
        try:
            model = self._model()
            ballast = self._ballast(model)
            for name, trial in trials.items():
                self._seconds(model, *trial)  # kernels are loaded and chosen
                measured = self._in_turn({name: partial(self._seconds, model, *trial)}, 0)
                best |= measured.figures
                provisional |= measured.provisional
            del ballast
        except RuntimeError as error:
            if not is_oom_error(error):
                raise
            log.debug("memory is full beyond %s rows", list(best))
        return Measured(best, provisional)

    def _model(self) -> GPT:
        with self.device:
            return GPT(self.config).train()

    def _ballast(self, model: GPT) -> torch.Tensor:
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
def undisturbed(device: torch.device, threads: int) -> Iterator[None]:
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

    What is provisional, and with `remeasure` everything, is measured again by the next process.
    """

    def __init__(self, path: Path, machine: str, remeasure: bool = False) -> None:
        self.path = path
        self.machine = machine
        self.remeasure = remeasure
        self.provisional = False  # whether any figure recalled is
        self._now: dict[str, Timings] = {}  # measured by this process

    def recall(
        self, key: str, measure: Callable[[], Measured], names: Collection[str] = ()
    ) -> Timings:
        """Return the figures stored under the key, `names` among them, or else measure them."""
        if key in self._now:
            return self._now[key]
        stored = None if self.remeasure else self._read().get(self.machine, {}).get(key)
        if stored and not stored["provisional"] and stored["figures"].keys() >= set(names):
            figures: Timings = stored["figures"]
            return figures
        measured = measure()
        self.provisional |= measured.provisional
        self._now[key] = measured.figures
        self._store(key, measured)
        return measured.figures

    def _read(self) -> dict[str, dict[str, Any]]:
        """Return the file's records by machine and key, without what is damaged."""
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        machines = content.items() if isinstance(content, dict) else ()
        return {
            machine: {key: record for key, record in records.items() if _is_record(record)}
            for machine, records in machines
            if isinstance(records, dict)
        }

    def _store(self, key: str, measured: Measured) -> None:
        content = self._read()  # again: another process may have written meanwhile
        content.setdefault(self.machine, {})[key] = measured._asdict()
        temporary = self.path.with_name(f".probes-{secrets.token_hex(4)}.json")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(content, indent=1, sort_keys=True), encoding="utf-8")
            os.replace(temporary, self.path)
        except OSError as error:
            log.warning("measurements are not stored: %s cannot be written (%s)", self.path, error)
            with contextlib.suppress(OSError):
                temporary.unlink()


def _is_record(record: object) -> bool:
    """Return whether a value read from the file is a measurement as it was stored."""
    if not isinstance(record, dict) or record.keys() != set(Measured._fields):
        return False
    figures, provisional = record["figures"], record["provisional"]
    if not isinstance(figures, dict) or not figures or type(provisional) is not bool:
        return False
    return all(type(value) is float and 0 < value < math.inf for value in figures.values())
