"""How fast one shape runs on this machine: timed once, kept in `probes.json`."""

import contextlib
import json
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.memory import is_oom_error

from nanogpt.model import GPT, GPTConfig
from nanogpt.training.machine import machine_id
from nanogpt.training.pretrain import next_token_loss
from nanogpt.training.throughput import flops_per_token, peak_flops, synchronize

log = logging.getLogger(__name__)

Timings = dict[str, float]  # what was tried -> seconds, or another figure

DTYPES = {
    "32-true": torch.float32,
    "bf16-mixed": torch.bfloat16,
    "16-mixed": torch.float16,
}
MEASURE_S = 1.0  # per decision, but at least two rounds of what is tried
# Memory beside the trial's own: AdamW's two moments and a gradient bucket, and some of the whole.
BYTES_PER_PARAMETER = 12
HEADROOM = 0.1


class Bench:
    """One shape on one device, timed or read from what was timed before."""

    def __init__(
        self,
        config: GPTConfig,
        device: torch.device,
        rows_per_rank: int,
        threads: int,
        local_world_size: int,
        data_dir: Path,
    ) -> None:
        self.config = config
        self.device = device
        self.rows_per_rank = rows_per_rank
        self.local_world_size = local_world_size
        self.where = f"{threads} threads, {local_world_size} ranks"
        self.shape = " ".join(f"{key}={value}" for key, value in asdict(config).items())
        self.kept = Measurements(data_dir / "probes.json", machine_id(device))
        self.row_timings: Timings = {}  # the latest of `time_rows`

    def peak(self, precision: str) -> tuple[float, str]:
        """Return the device's rate in the precision's products, and where the figure is from."""

        def measure() -> Timings:
            value, source = peak_flops(self.device, DTYPES[precision])
            return {source: value}

        figures = self.kept.recall(f"peak {precision}, {self.where}", measure)
        source, value = next(iter(figures.items()))
        return value, source

    def time_precisions(self, rows: int) -> Timings:
        """Return the seconds of a forward and backward of some rows by precision, on a CPU."""
        names = ["32-true", "bf16-mixed"]
        return self.kept.recall(
            f"precision, {rows} rows, {self.where}, {self.shape}",
            lambda: self._time({name: (rows, name) for name in names}),
        )

    def time_rows(self, candidates: list[int], precision: str) -> Timings:
        """Return the seconds of a forward and backward by rows, for those that fit."""
        measure = self._time_until_full if self.device.type == "cuda" else self._time
        self.row_timings = self.kept.recall(
            f"rows {candidates}, {precision}, {self.where}, {self.shape}",
            lambda: measure({str(rows): (rows, precision) for rows in candidates}),
        )
        return self.row_timings

    def guess_s(self, rows: int, precision: str) -> float:
        """Return the seconds of a forward and backward at half of the device's peak."""
        tokens = rows * self.config.block_size
        return 2 * flops_per_token(self.config) * tokens / self.peak(precision)[0]

    def _time(self, trials: dict[str, tuple[int, str]]) -> Timings:
        """Time the trials (rows, precision) in turn, several times; keep the best of each."""
        model = self._model()
        best = dict.fromkeys(trials, float("inf"))
        start = time.perf_counter()
        for n_rounds in range(100):
            elapsed_s = time.perf_counter() - start
            if n_rounds >= 2 and elapsed_s * (n_rounds + 1) / n_rounds > MEASURE_S:
                break
            for name, (rows, precision) in trials.items():
                best[name] = min(best[name], self._seconds(model, rows, precision))
        return best

    def _time_until_full(self, trials: dict[str, tuple[int, str]]) -> Timings:
        """Time ever more rows while they fit in a GPU's memory beside the optimizer's state."""
        best: Timings = {}
        try:
            model = self._model()
            ballast = self._ballast(model)
            for name, (rows, precision) in trials.items():
                self._seconds(model, rows, precision)  # kernels are loaded and chosen
                best[name] = min(self._seconds(model, rows, precision) for _ in range(2))
            del ballast
        except RuntimeError as error:
            if not is_oom_error(error):
                raise
            log.debug("memory is full beyond %s rows", list(best))
        return best

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
    """The measurements of one machine in a JSON file that several processes may share."""

    def __init__(self, path: Path, machine: str) -> None:
        self.path = path
        self.machine = machine

    def recall(self, key: str, measure: Callable[[], Timings]) -> Timings:
        """Return the figures kept under the key; where there are none, measure and keep them."""
        known = self._read().get(self.machine, {}).get(key)
        if _are_timings(known):
            return known
        figures = measure()
        self._keep(key, figures)
        return figures

    def _read(self) -> dict[str, Any]:
        """Return the file's content, or nothing where it is missing or not ours."""
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        if isinstance(content, dict) and all(isinstance(v, dict) for v in content.values()):
            return content
        return {}

    def _keep(self, key: str, figures: Timings) -> None:
        content = self._read()  # again: another process may have written meanwhile
        content.setdefault(self.machine, {})[key] = figures
        temporary = self.path.with_name(f".probes-{secrets.token_hex(4)}.json")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(content, indent=1, sort_keys=True), encoding="utf-8")
            os.replace(temporary, self.path)
        except OSError as error:
            log.warning("measurements are not kept: %s cannot be written (%s)", self.path, error)
            with contextlib.suppress(OSError):
                temporary.unlink()


def _are_timings(figures: object) -> bool:
    if not isinstance(figures, dict) or not figures:
        return False
    return all(isinstance(value, int | float) and value > 0 for value in figures.values())
