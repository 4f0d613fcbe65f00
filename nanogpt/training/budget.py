"""A budget in minutes: the depth and the steps that fit, chosen and recorded in the run."""

import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from nanogpt.build import ConfigurationError
from nanogpt.model import GPTConfig
from nanogpt.optim import Schedule, may_extend
from nanogpt.ranks import on_rank_zero
from nanogpt.runs.directory import RunDirectory
from nanogpt.runs.identity import budget_steps, identity_differences
from nanogpt.runs.run import Run
from nanogpt.training import autotune
from nanogpt.training.recipe import DEPTH, MAX_PASSES, choices, tokens_of, with_choices
from nanogpt.weights import model_without_weights

log = logging.getLogger("nanogpt")

STEP_OVERHEAD_S = 1e-3  # of Lightning and the data
END_S = 3.0  # of the report and the end of the process
CHECKPOINT_S = 12 / 200e6  # for each parameter: written, read back and hashed
FIXED_AT = 0.25  # of the estimated steps, after which they are fixed by the time that these took
SLACK = 2.0  # times the estimated steps are the most


def settle(config: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration with the choices that its run records, or those of its depth.

    A run keeps its choices on every machine. Raises ConfigurationError where depth, minutes and
    model do not fit together, and as `RunDirectory.recorded_config`.
    """
    depth, minutes = config.get("depth"), config.get("minutes")
    is_open = config["model"].get("n_layer", 0) is None
    if depth is not None and not is_open:
        raise ConfigurationError(f"depth={depth} needs model=auto, which has that many layers")
    if is_open and depth is None and minutes is None:
        raise ConfigurationError("model=auto needs depth=N, or minutes=N to choose it; pass one")
    if minutes is not None and config["stage"] == "classify":
        what = f"minutes={minutes} needs a language model, and stage=classify trains none"
        raise ConfigurationError(f"{what}; pass max_steps")
    files = RunDirectory.from_config(config)
    recorded = (files.recorded_config() if config["resume"] else None) or {}
    if before := recorded.get("chosen"):
        now, then = config["typed"], recorded["typed"]
        kept = {key: value for key, value in before.items() if now.get(key) == then.get(key)}
        kept = with_choices(config, kept)
        if files.has_begun or not identity_differences(recorded, kept):
            return kept
    if not is_open:
        return config
    tokens = config["typed"].get("max_tokens") or tokens_of(depth or DEPTH)
    chosen = choices(config, depth or DEPTH, tokens)
    if minutes is not None:  # until the data is prepared; the rest is chosen then
        chosen = {key: value for key, value in chosen.items() if key.startswith("model.")}
    return with_choices(config, chosen)


def tune(
    run: Run, shape: Callable[[Mapping[str, Any]], GPTConfig], device: torch.device, data: Any
) -> tuple[dict[str, Any], autotune.Settings, float | None]:
    """Return the configuration with all choices, the settings of `autotune`, and `end_s`.

    These are the seconds after the last step, None where the steps are fixed. `shape` returns the
    model of a configuration whose `data` is prepared. Raises ValueError where the minutes that are
    left are too few for a step.
    """
    chosen = run.config.get("chosen", {})
    is_open = run.config.get("minutes") is not None and "max_steps" not in chosen
    if is_open and "model.n_layer" in chosen:
        run.config = _with_depth(run, shape, device, data)
    config, model = dict(run.config), shape(run.config)
    run.max_steps = budget_steps(config, data.max_steps)
    settings = autotune.autotune(run, model, device, _left_s(config) if is_open else None)
    end_s = run.recorded.get("end_s")
    if is_open:
        known = {**config, **settings._asdict()}
        trials = autotune.Trials(known, run.ranks, model, device)
        estimate, end_s = _steps(config, trials, settings, data)
        if data.max_steps or config["max_steps"] or config["max_tokens"]:
            end_s = None  # as one of these may be the first reached
        config = with_choices(config, {"max_steps": budget_steps(config, estimate)})
    return config, settings, end_s


class FixedSteps(Callback):
    """Fix the number of steps of a run of `minutes` by the time that its first quarter took.

    Until then the trainer goes on for up to `SLACK` times the estimate, if the schedule has the
    same factors for both. The run records the number, so that it continues with it, and the
    micro-batch of any run that memory became too small for.
    """

    def __init__(self, run: Run, schedule: Schedule) -> None:
        self.run, self.schedule, self.estimate = run, schedule, run.max_steps
        self.at, self.most = int(FIXED_AT * run.max_steps), int(SLACK * run.max_steps)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        permits = may_extend(self.schedule, self.at, self.estimate, self.most)
        if stage == "fit" and permits and self.run.recorded["end_s"] is not None:
            trainer.fit_loop.epoch_loop.max_steps = self.most

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        module: Any = pl_module
        if module.micro_batch not in (None, self.run.recorded["micro_batch"]):  # of one rank
            self.run.record({**self.run.recorded, "micro_batch": module.micro_batch})
        if trainer.global_step == self.at and trainer.max_steps == self.most:
            module.max_steps = on_rank_zero(lambda: self._fix(module.wall_s()))
            trainer.fit_loop.epoch_loop.max_steps = module.max_steps

    def _fix(self, trained_s: float) -> int:
        """Record the steps that fit, of which the first `self.at` took `trained_s`."""
        run, step_s = self.run, trained_s / self.at
        steps = self.at + int((_left_s(run.config) - run.recorded["end_s"]) / step_s)
        steps = min(max(steps, self.estimate // 2), self.most - 1)
        if not may_extend(self.schedule, self.at, steps, self.most):
            steps = self.estimate
        what = f"{steps:,} steps, as the first {self.at:,} took {trained_s:.0f} s"
        log.info("minutes %s: %s", run.config["minutes"], what)
        run.config = with_choices(run.config, {"max_steps": steps})
        run.record({**run.recorded, "end_s": None})
        return steps


def _left_s(config: Mapping[str, Any]) -> float:
    began = float(os.environ.get("NANOGPT_BEGAN", time.time()))  # nanogpt/config.py sets it
    return float(max(60 * config["minutes"] - (time.time() - began) - END_S, 0.1))


def _useful_tokens(config: Mapping[str, Any], data: Any, block_size: int) -> float:
    """Return the tokens of MAX_PASSES over the data, infinity with another budget."""
    if data.max_steps or config["max_steps"] or config["max_tokens"]:
        return math.inf
    return MAX_PASSES * len(getattr(data, "train_rows", ())) * block_size or math.inf


def _with_depth(run: Run, shape: Any, device: torch.device, data: Any) -> dict[str, Any]:
    """Return the configuration at the depth whose tokens take about the time that is left.

    The time of a depth grows with its sixth power, as its weights and its tokens with the third;
    where the data limit the tokens, with the third.
    """
    config, taken, token_s = dict(run.config), {}, {}
    useful = _useful_tokens(config, data, config["model"]["block_size"])
    given = config["threads"], config["trainer"]["precision"]
    threads, _ = autotune.choose_threads(run.ranks.local_world_size)
    torch.set_num_threads(threads if given[0] == "auto" else given[0])
    depth = config["depth"] or DEPTH
    while depth not in taken:
        tokens = min(tokens_of(depth), useful)
        tried = with_choices(config, choices(config, depth, tokens))
        model, per_step = shape(tried), tried["tokens_per_step"]
        trials = autotune.Trials(tried, run.ranks, model, device)
        precision = autotune.choose_precision(trials)[0] if given[1] == "auto" else given[1]
        timings = trials.step(trials.candidates()[-1], precision, tried["optim"])
        token_s[depth] = timings.step_s / per_step
        taken[depth] = token_s[depth] * tokens
        log.info("depth %s: %s tokens take %.0f s", depth, f"{tokens:,}", taken[depth])
        if config["depth"] is None:
            power = 6 if tokens < useful else 3
            depth = max(1, round(depth * (_left_s(config) / taken[depth]) ** (1 / power)))
    left_s = _left_s(config)
    depth = min(taken, key=lambda depth: abs(math.log(taken[depth] / left_s)))
    return with_choices(config, choices(config, depth, min(left_s / token_s[depth], useful)))


def _steps(
    config: dict[str, Any], trials: autotune.Trials, settings: autotune.Settings, data: Any
) -> tuple[int, float | None]:
    """Return the steps that fit the time that is left, and the seconds after the last.

    They include all that interrupts them. Where the data limit the steps, the seconds are None.
    """
    model, callbacks, minutes = trials.config, config["callbacks"], config["minutes"]
    timings = trials.step(settings.micro_batch, settings.precision, config["optim"])
    step_s, end_s = timings.step_s + STEP_OVERHEAD_S, 0.0
    if settings.compile:
        saved_s, end_s = trials.compiled(settings.micro_batch, settings.precision, step_s)
        step_s -= saved_s
    n_val = len(getattr(data, "val_rows", ())) * model.block_size
    validation, samples = callbacks["validation"], callbacks.get("samples") or {}
    last, part = (min(validation[key] or n_val, n_val) for key in ("final_tokens", "tokens"))
    n_sampled = len(samples.get("prompts", ())) * samples.get("max_new_tokens", 0)
    checkpoint_s = CHECKPOINT_S * model_without_weights(model).num_parameters()
    for every, seconds, at_end_s in (
        (validation["every_n_steps"], timings.validated_s * part, timings.validated_s * last),
        (samples.get("every_n_steps") or math.inf, *[timings.sampled_s * n_sampled] * 2),
        (callbacks["checkpoint"].get("every_n_steps", 500), *[checkpoint_s] * 2),
    ):
        step_s, end_s = step_s + seconds / every, end_s + at_end_s
    steps, per_step = int((_left_s(config) - end_s) / step_s), config["tokens_per_step"]
    if steps < 1:
        what = f"what is left of minutes={minutes} is {_left_s(config):.0f} s, and the last"
        what += f" validation takes {end_s:.0f} s and a step {step_s:.2g} s; pass more minutes"
        raise ValueError(what)
    useful = _useful_tokens(config, data, model.block_size) / per_step
    fits, steps = steps, max(int(min(steps, useful)), 1)
    what = f"minutes {minutes}: {steps:,} steps of {per_step:,} tokens, {step_s:.3g} s each"
    what += f"; more than {MAX_PASSES} passes over the data would gain little" * (steps < fits)
    log.info("%s", what)
    return steps, end_s if steps == fits else None
