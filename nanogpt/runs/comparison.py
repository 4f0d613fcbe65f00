"""The comparison of runs: groups of seeds, and their differences in pairs by seed and by text.

    groups = group_runs([read_run(path) for path in paths])  # by their identity but for the seed
    difference(groups[0], groups[1])                         # {"difference": ..., "p_value": ...}

The difference of seed s in part b of the validation set is delta + u_s + v_b + e_sb: seeds and the
parts of `validation.csv` are crossed random effects.
"""

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nanogpt.runs.directory import RunDirectory, read_config, read_summary
from nanogpt.runs.identity import NEW_KEYS, flatten, is_identity
from nanogpt.runs.metrics import read_metrics

CONFIDENCE = 0.95
NODES, WEIGHTS = np.polynomial.legendre.leggauss(100)
MAX_LABEL_CHARS = 60
# Operational keys without effect on how a run was executed, and those recorded in its place.
UNSHOWN = {"name", "runs_dir", "data_dir", "resume", "overwrite", "debug", "remeasure"}
UNSHOWN |= {"command", "typed", "resolved", "_target_"}
EXECUTED = ("micro_batch", "compile", "threads", "local_world_size")


@dataclass(frozen=True, eq=False)
class MeasuredRun:
    """A finished run of a language model: its configuration by dotted key, and its metrics.

    `parts` are the bits and bytes of the validation set by the start of their part; None for runs
    without validation.csv. `curve` (N, 3) are the tokens, seconds and bits per byte of validations.
    """

    path: Path
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    parts: Mapping[float, tuple[float, float]] | None
    curve: np.ndarray

    @property
    def seed(self) -> Any:
        return self.config["seed"]

    @property
    def identity(self) -> dict[str, Any]:
        """The keys that determine the result, but for the seed, and the corpus."""
        own = {k: v for k, v in self.config.items() if is_identity(k) and k != "seed"}
        start = self.config.get("resolved.init_from.sha256")
        return {**own, "corpus": self.config["resolved.corpus"], "init_from.sha256": start}

    @property
    def execution(self) -> dict[str, Any]:
        """The operational keys, `auto` as what it became, and the device."""
        own = {k: v for k, v in self.config.items() if not is_identity(k)}
        shown = {k: v for k, v in own.items() if k.partition(".")[0] not in UNSHOWN}
        became = {k: own.get(f"resolved.{k}") for k in EXECUTED}
        return {**shown, **became, "device": self.summary.get("device")}


@dataclass(frozen=True, eq=False)
class Group:
    """Runs of one identity by their seed; `label` distinguishes it from the other groups."""

    runs: Mapping[Any, MeasuredRun]
    label: str

    @property
    def first(self) -> MeasuredRun:
        return next(iter(self.runs.values()))

    @property
    def losses(self) -> np.ndarray:
        """The bits per byte of each run, (S,)."""
        return np.array([run.summary["val_bits_per_byte"] for run in self.runs.values()])

    @property
    def curve(self) -> np.ndarray:
        """The means over seeds of tokens, seconds and bits per byte, (N, 3)."""
        n = min(len(run.curve) for run in self.runs.values())
        return np.mean([run.curve[:n] for run in self.runs.values()], axis=0)


def read_run(path: Path) -> MeasuredRun:
    """Return what a finished run measured.

    Raises ValueError, with the way on, for an unfinished run and for one that is no language model.
    """
    files = RunDirectory(path)
    config = read_config(files.config_path)
    if not files.summary_path.is_file():
        raise ValueError(f"{path} is not finished; issue its command again: {config['command']}")
    summary = read_summary(files.summary_path)
    if summary.get("val_bits_per_byte") is None:
        raise ValueError(
            f"{path} has no bits per byte (stage={summary.get('stage')}); pass runs of language "
            "models, of stage=pretrain or instruct"
        )
    metrics = read_metrics(files.metrics_path)
    steps, losses = np.array(metrics["val/bits_per_byte"]).T
    seconds = np.interp(steps, *np.array(metrics["wall_s"]).T)
    curve = np.stack([steps * config["tokens_per_step"], seconds, losses], 1)
    parts = None
    if files.validation_path.is_file():
        with open(files.validation_path, newline="", encoding="utf-8") as file:
            parts = {
                float(row["start"]): (float(row["nats"]) / math.log(2), float(row["bytes"]))
                for row in csv.DictReader(file)
            }
    return MeasuredRun(path, {**NEW_KEYS, **flatten(config)}, summary, parts, curve)


def group_runs(runs: Iterable[MeasuredRun]) -> list[Group]:
    """Return the groups of one identity each, in the order of their first runs.

    A run that repeats a seed begins another group. Raises ValueError for runs whose bits per byte
    are of different texts.
    """
    found: dict[tuple[str, int], dict[Any, MeasuredRun]] = {}
    for run in runs:
        identity, n = repr(sorted(run.identity.items())), 0
        while run.seed in found.get((identity, n), {}):
            n += 1
        found.setdefault((identity, n), {})[run.seed] = run
    firsts = [next(iter(seeds.values())) for seeds in found.values()]
    for other in firsts[1:]:
        _check_same_text(firsts[0], other)
    keys = differing([run.identity for run in firsts])
    labels = [
        " ".join(f"{key.rpartition('.')[2]}={shown(values[i])}" for key, values in keys.items())
        for i in range(len(firsts))
    ]
    is_short = len({*labels}) == len(labels) > 1 and max(map(len, labels)) <= MAX_LABEL_CHARS
    names = labels if is_short else [run.path.name for run in firsts]
    return [Group(seeds, name) for seeds, name in zip(found.values(), names, strict=True)]


def _check_same_text(one: MeasuredRun, other: MeasuredRun) -> None:
    """Raise ValueError where the runs are of different stages or validation sets.

    Another tokenizer makes another corpus of the same text, which its source stands for.
    """
    stages = [run.summary.get("stage") for run in (one, other)]
    corpora = [run.config["resolved.corpus"] for run in (one, other)]
    texts = [
        {k: v for k, v in run.identity.items() if k.startswith("data.")}
        | {"source": run.config.get("resolved.source", run.config["resolved.corpus"])}
        for run in (one, other)
    ]
    starts = [set(run.parts or ()) for run in (one, other)]
    is_cut_alike = not all(starts) or len(starts[0] ^ starts[1]) < len(starts[0]) / 10
    is_same = texts[0] == texts[1] and {*stages} == {"pretrain"} and is_cut_alike
    if stages[0] != stages[1] or (corpora[0] != corpora[1] and not is_same):
        what = "stages" if stages[0] != stages[1] else "validation sets"
        values = " and ".join(map(str, stages if stages[0] != stages[1] else corpora))
        raise ValueError(
            f"{one.path} and {other.path} have different {what} ({values}), so that their bits per "
            "byte are not comparable; pass runs of one stage on the same data"
        )


def differing(of: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return the keys in which mappings differ, with the value of each, None where it has none."""
    keys = dict.fromkeys(key for one in of for key in one)
    columns = {key: [one.get(key) for one in of] for key in keys}
    return {k: values for k, values in columns.items() if any(v != values[0] for v in values)}


def shown(value: Any) -> str:
    """Return a value of the configuration as YAML writes it."""
    return str(value) if isinstance(value, str | list) else json.dumps(value)


def difference(base: Group, other: Group) -> dict[str, Any]:
    """Return how many more bits per byte `other` needs than `base`, with an interval.

    Seeds that both have are pairs, unless only one is; then all are compared by Welch's variance.
    A single seed has an interval over the text alone and no p-value: "covers" names what it is
    over. Degrees of freedom are Satterthwaite's.
    """
    seeds = base.runs.keys() & other.runs.keys()
    is_paired = len(seeds) > 1 or (len(seeds) == 1 in (len(base.runs), len(other.runs)))
    groups = [[g.runs[s] for s in (sorted(seeds) if is_paired else g.runs)] for g in (base, other)]
    one, two = by_part(groups)
    value, effects = crossed_effects([two - one] if is_paired else [-one, two])
    variance = sum(part for part, _ in effects.values())
    results = {"difference": value, "difference_percent": 100 * value / float(one.mean())}
    about = {"covers": " and ".join(effects), "n_pairs": len(seeds) if is_paired else 0}
    if effects:
        stderr = math.sqrt(variance)
        half = stderr * critical_value([*effects.values()])
        results |= {"difference_stderr": stderr}
        results |= {"difference_low": value - half, "difference_high": value + half}
    if "seeds" in effects:
        t = value / stderr if stderr else math.inf * abs(value) if value else 0.0
        results["p_value"] = tail(t, [*effects.values()])
    if is_paired and len(seeds) > 1:  # the variance over seeds alone, and as if they were not pairs
        results["seeds_variance"] = (two - one).mean(1).var(ddof=1) / len(seeds)
        unpaired = sum(table.mean(1).var(ddof=1) for table in (one, two)) / len(seeds)
        results["seeds_variance_unpaired"] = unpaired
    return {**{k: float(v) for k, v in results.items()}, **about}


def by_part(groups: Sequence[Sequence[MeasuredRun]]) -> list[np.ndarray]:
    """Return the bits per byte of the runs of each group by part, (S, P), to first order.

    The mean over parts is the run's bits per byte: a part adds its deviation from those, times its
    size over the mean size. Where a run has no parts, the total is the only one.
    """
    runs = [run for group in groups for run in group]
    if any(run.parts is None for run in runs):
        return [np.array([[run.summary["val_bits_per_byte"]] for run in group]) for group in groups]
    starts = sorted({start for run in runs for start in run.parts or ()})
    tables = []
    for group in groups:
        sums = np.array([[(run.parts or {}).get(n, (0.0, 0.0)) for n in starts] for run in group])
        bits, sizes = sums[..., 0], sums[..., 1]  # (S, P) each
        totals = sizes.sum(1, keepdims=True)
        means = bits.sum(1, keepdims=True) / totals
        tables.append(means + len(starts) * (bits - means * sizes) / totals)
    return tables


def crossed_effects(terms: Sequence[np.ndarray]) -> tuple[float, dict[str, tuple[float, float]]]:
    """Return the sum of the means of terms (S, P), and its variance by effect: seeds and text.

    Rows are seeds, independent between terms; columns are the parts of one text. A variance comes
    with its degrees of freedom, of two terms Welch's. An effect that is not repeated has none.
    """
    n_parts = terms[0].shape[1]
    value, effects = sum(float(term.mean()) for term in terms), {}
    text = (
        float(np.sum([term.mean(0) for term in terms], axis=0).var(ddof=1)) / n_parts
        if n_parts > 1
        else 0.0
    )
    if min(map(len, terms)) > 1:
        of_terms = [(float(term.mean(1).var(ddof=1)) / len(term), len(term) - 1) for term in terms]
        variance, squares = sum(v for v, _ in of_terms), sum(v * v / n for v, n in of_terms)
        effects["seeds"] = (variance, variance**2 / squares if squares else 1.0)
        for term in terms:  # the residual is in both variances
            residual = term - term.mean(0) - term.mean(1, keepdims=True) + term.mean()
            n = (len(term) - 1) * max(n_parts - 1, 1)
            text -= float(np.square(residual).sum()) / n / term.size
    if n_parts > 1:
        effects["text"] = (max(text, 0.0), n_parts - 1)
    return value, effects


def tail(t: float, effects: Sequence[tuple[float, float]]) -> float:
    """Return the p-value of t, a difference over its standard error.

    It is the mean of those of Student's distributions, weighted by the variances of the effects
    (variance, degrees of freedom), which stays within its level where few seeds meet many parts.
    """
    weights = [variance for variance, _ in effects] if any(v for v, _ in effects) else None
    return float(np.average([student_tail(t, df) for _, df in effects], weights=weights))


def critical_value(effects: Sequence[tuple[float, float]]) -> float:
    """Return the t whose p-value is 1 - CONFIDENCE."""
    low, high = 0.0, 100.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if tail(middle, effects) > 1 - CONFIDENCE else (low, middle)
    return high


def student_tail(t: float, df: float) -> float:
    """Return the probability that |T| exceeds |t|, for Student's T with `df` of at least 1.

    With t = sqrt(df) tan(a), the density of the angle a is proportional to cos(a) ** (df - 1).
    """
    start = math.atan(abs(t) / math.sqrt(df))
    end = min(math.pi / 2, start + 12 / math.sqrt(df))  # beyond it, less than e ** -70
    angles = start + (NODES + 1) * (end - start) / 2
    beyond = float(WEIGHTS @ np.cos(angles) ** (df - 1)) * (end - start) / 2
    log_all = math.log(math.pi) / 2 + math.lgamma(df / 2) - math.lgamma((df + 1) / 2)
    return min(2 * beyond / math.exp(log_all), 1.0)


def reached_at(curve: np.ndarray, loss: float, column: int) -> float | None:
    """Return where a curve (N, 3) first has a loss: tokens (column 0) or seconds (column 1).

    The loss is linear in the logarithm of these between validations; None where it stays above.
    """
    below = np.flatnonzero(curve[:, 2] <= loss)
    if not len(below):
        return None
    i = int(below[0])
    if i == 0:
        return float(curve[0, column])
    (x, y), (then, after) = curve[i - 1, [column, 2]], curve[i, [column, 2]]
    return float(x * (then / x) ** ((y - loss) / (y - after)))


def compare(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Return a row for each group: its bits per byte and its difference to the first.

    A row is `{"checkpoint": label, "task": "compare", "results": {...}, "about": {...}}`.
    """
    base, rows = groups[0], []
    for group in groups:
        losses, n = group.losses, len(group.runs)
        results = {"bits_per_byte": float(losses.mean())}
        if n > 1:
            results["bits_per_byte_stderr"] = float(losses.std(ddof=1)) / math.sqrt(n)
        for key in ("tokens", "tokens_per_s", "wall_s"):
            results[key] = float(np.mean([run.summary[key] for run in group.runs.values()]))
        about = {"runs": [str(run.path) for run in group.runs.values()], "seeds": [*group.runs]}
        if group is not base:
            found = difference(base, group)
            about |= {key: found.pop(key) for key in ("covers", "n_pairs")}
            results |= found
            for name, column in (("tokens", 0), ("seconds", 1)):
                at = reached_at(group.curve, base.curve[-1, 2], column)
                if at is not None:
                    results[f"{name}_ratio"] = float(base.curve[-1, column]) / at
        rows.append(
            {"checkpoint": group.label, "task": "compare", "results": results, "about": about}
        )
    return rows
