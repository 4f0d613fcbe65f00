"""The comparison of runs: groups of seeds, and their differences in pairs by seed and by text.

    groups = group_runs([read_run(path) for path in paths])  # by their identity but for the seed
    rows = compare(groups)                                   # each group against the first

The difference of seed s in part b of the validation set is delta + u_s + v_b + e_sb: seeds and the
parts of `validation.csv` are crossed random effects.
"""

import csv
import json
import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from mpmath import betainc

from nanogpt.runs.directory import RunDirectory, read_config, read_summary
from nanogpt.runs.identity import NEW_KEYS, flatten, is_identity
from nanogpt.runs.metrics import read_metrics

CONFIDENCE = 0.95
MAX_LABEL_CHARS = 60
# Operational keys without effect on execution; EXECUTED are taken from `resolved`.
UNSHOWN = {"name", "runs_dir", "data_dir", "resume", "overwrite", "debug", "remeasure"}
UNSHOWN |= {"command", "typed", "resolved", "datamodule"}  # which repeats callbacks.validation
EXECUTED = ("micro_batch", "compile", "threads", "local_world_size", "activation_checkpointing")

Effect = tuple[float, float]  # a variance and its degrees of freedom


@dataclass(frozen=True, eq=False)
class MeasuredRun:
    """A finished run of a language model: its configuration by dotted key, and what it measured.

    `parts` are bits and bytes by the start of their part, None without validation.csv; `curve`
    (N, 3) the tokens, seconds and bits per byte of its validations.
    """

    path: Path
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    parts: Mapping[str, tuple[float, float]] | None
    curve: np.ndarray

    def keys(self, *, identity: bool) -> dict[str, Any]:
        """Return the keys that determine the result, but for the seed, or the operational ones."""
        keys = {k: v for k, v in self.config.items() if is_identity(k) == identity and k != "seed"}
        if identity:
            keys["init_from.sha256"] = self.config.get("resolved.init_from.sha256")
            return {**keys, "corpus": self.config["resolved.corpus"]}
        became = {k: keys.get(f"resolved.{k}") for k in EXECUTED}
        shown = {k: v for k, v in keys.items() if k.partition(".")[0] not in UNSHOWN}
        return {**shown, **became, "device": self.summary.get("device")}

    @property
    def text(self) -> tuple[Any, ...]:
        """What stands for the validation text, of which tokenizers make different corpora."""
        stage, source = self.summary["stage"], self.config.get("resolved.source")
        split = [self.config.get(f"data.{key}") for key in ("val_fraction", "tokens")]
        last_start = [*(self.parts or "0")][-1]
        is_source = stage == "pretrain" and source is not None
        return stage, source if is_source else self.config["resolved.corpus"], *split, last_start


@dataclass(frozen=True, eq=False)
class Group:
    """Runs that differ in nothing but their seed; `label` distinguishes it from other groups."""

    runs: Mapping[Any, MeasuredRun]  # by seed
    label: str

    @property
    def losses(self) -> np.ndarray:
        """The bits per byte of the runs, (S,)."""
        return np.array([run.summary["val_bits_per_byte"] for run in self.runs.values()])

    @property
    def curve(self) -> np.ndarray:
        """The means over seeds of tokens, seconds and bits per byte, (N, 3)."""
        n = min(len(run.curve) for run in self.runs.values())
        return np.mean([run.curve[:n] for run in self.runs.values()], axis=0)


def read_run(path: Path) -> MeasuredRun:
    """Return what a run measured; raises ValueError unless it is a finished language model."""
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
    validation = config["callbacks"]["validation"]
    if len(curve) > 1 and validation["tokens"] != validation["final_tokens"]:
        curve = curve[:-1]  # the last validation is of another text
    parts = None
    if files.validation_path.is_file():
        rows = csv.DictReader(files.validation_path.read_text(encoding="utf-8").splitlines())
        parts = {r["start"]: (float(r["nats"]) / math.log(2), float(r["bytes"])) for r in rows}
    return MeasuredRun(path, {**NEW_KEYS, **flatten(config)}, summary, parts, curve)


def group_runs(runs: Iterable[MeasuredRun], *, ranked: bool = False) -> list[Group]:
    """Return the groups of one identity each, in the order of their first runs or, ranked, losses.

    A run that repeats a seed begins another group. Raises ValueError for runs of other stages or
    validation sets than the first, whose bits per byte are not comparable.
    """
    found: dict[tuple[str, int], dict[Any, MeasuredRun]] = {}
    for run in runs:
        identity, n = repr(sorted(run.keys(identity=True).items())), 0
        while run.config["seed"] in found.get((identity, n), {}):
            n += 1
        found.setdefault((identity, n), {})[run.config["seed"]] = run
    firsts = [next(iter(seeds.values())) for seeds in found.values()]
    corpus = "resolved.corpus"
    for one, run in product(firsts[:1], firsts[1:]):
        if one.text != run.text and one.config[corpus] != run.config[corpus]:
            texts = (f"{r.path} ({r.summary['stage']}, {r.config[corpus]})" for r in (one, run))
            raise ValueError(
                f"{' and '.join(texts)} have different stages or validation sets, so that their "
                "bits per byte are not comparable; pass runs of one stage on the same data"
            )
    keys = differing([run.keys(identity=True) for run in firsts])
    labels = [
        " ".join(f"{key.rpartition('.')[2]}={yaml_of(of[i])}" for key, of in keys.items())
        for i in range(len(firsts))
    ]
    if len({*labels}) < len(labels) or not 0 < max(map(len, labels)) <= MAX_LABEL_CHARS:
        labels = [run.path.name for run in firsts]
    groups = [Group(*group) for group in zip(found.values(), labels, strict=True)]
    return sorted(groups, key=lambda group: group.losses.mean()) if ranked else groups


def differing(of: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return the keys in which mappings differ, with the value of each, None where it has none."""
    columns = {key: [one.get(key) for one in of] for one in of for key in one}
    found = {k: values for k, values in columns.items() if any(v != values[0] for v in values)}
    if len(found) > 1:
        found.pop("corpus", None)  # which the others imply
    return found


def yaml_of(value: Any) -> str:
    """Return a value of the configuration as YAML writes it."""
    return value if isinstance(value, str) else json.dumps(value)


def compare(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Return a row for each group: its bits per byte and its difference to the first.

    A row is `{"checkpoint": label, "task": "compare", "results": {...}, "about": {...}}`.
    """
    base, rows = groups[0], []
    for group in groups:
        losses, runs = group.losses, group.runs.values()
        results = {"bits_per_byte": float(losses.mean())}
        if len(losses) > 1:
            results["bits_per_byte_stderr"] = float(losses.std(ddof=1)) / math.sqrt(len(losses))
        for key in ("tokens", "tokens_per_s", "wall_s"):
            results[key] = float(np.mean([run.summary[key] for run in runs]))
        about = {"runs": [str(run.path) for run in runs], "seeds": [*group.runs]}
        if group is not base:
            found, covers = difference(base, group)
            results, about = results | found, about | covers
            *end, loss = base.curve[-1]
            if (at := reached_at(group.curve, loss)) is not None:
                results |= zip(("tokens_ratio", "seconds_ratio"), (end / at).tolist(), strict=True)
        rows.append(
            {"checkpoint": group.label, "task": "compare", "results": results, "about": about}
        )
    return rows


def difference(base: Group, other: Group) -> tuple[dict[str, float], dict[str, Any]]:
    """Return how many more bits per byte `other` needs, with an interval, and what this covers.

    Seeds that both have are pairs; without two of them, all are compared by Welch's variance. A
    single seed has an interval over the text alone, and no p-value.
    """
    seeds = sorted(base.runs.keys() & other.runs.keys())
    is_paired = len(seeds) > 1 or (len(seeds) == 1 in (len(base.runs), len(other.runs)))
    one, two = by_part(
        [[g.runs[s] for s in (seeds if is_paired else g.runs)] for g in (base, other)]
    )
    value, effects = crossed_effects([two - one] if is_paired else [-one, two])
    results = {"difference": value, "difference_percent": 100 * value / float(one.mean())}
    if effects:
        stderr = math.sqrt(sum(variance for variance, _ in effects.values()))
        ends = (value + sign * stderr * critical_value([*effects.values()]) for sign in (-1, 1))
        names = ("difference_stderr", "difference_low", "difference_high")
        results |= zip(names, (stderr, *ends), strict=True)
    if "seeds" in effects:
        t = value / stderr if stderr else math.inf if value else 0.0
        results["p_value"] = p_value(t, [*effects.values()])
    apart = [crossed_effects([table])[1] for table in (one, two)]  # as if nothing were in pairs
    for name in effects if is_paired else ():
        results[f"{name}_variance"] = effects[name][0]
        results[f"{name}_variance_unpaired"] = sum(of[name][0] for of in apart)
    return results, {"covers": " and ".join(effects), "paired_seeds": seeds if is_paired else []}


def by_part(groups: Sequence[Sequence[MeasuredRun]]) -> list[np.ndarray]:
    """Return the bits per byte of the runs of each group by part, (S, P), to first order.

    Their mean over parts is the run's. Where a run has no parts, the total is the only one.
    """
    runs = [run for group in groups for run in group]
    if any(run.parts is None for run in runs):
        return [np.array([[run.summary["val_bits_per_byte"]] for run in group]) for group in groups]
    starts = sorted({start for run in runs for start in run.parts or ()}, key=int)
    tables = []
    for group in groups:
        sums = np.array([[(run.parts or {}).get(n, (0, 0)) for n in starts] for run in group])
        (bits, sizes), totals = np.moveaxis(sums, 2, 0), sums.sum(1)[..., None]
        mean = totals[:, 0] / totals[:, 1]  # (S, 1)
        tables.append(mean + len(starts) * (bits - mean * sizes) / totals[:, 1])
    return tables


def crossed_effects(terms: Sequence[np.ndarray]) -> tuple[float, dict[str, Effect]]:
    """Return the sum of the means of terms (S, P), and its variance by effect: seeds and text.

    Rows are seeds, independent between terms; columns are the parts of one text. An effect that is
    not repeated has no variance. The degrees of freedom of two terms are Welch's.
    """
    n_parts, effects = terms[0].shape[1], {}
    of_parts = np.sum([term.mean(0) for term in terms], axis=0)
    text = float(of_parts.var(ddof=1)) / n_parts if n_parts > 1 else 0.0
    if min(map(len, terms)) > 1:
        of_terms = [(float(term.mean(1).var(ddof=1)) / len(term), len(term) - 1) for term in terms]
        variance, squares = sum(v for v, _ in of_terms), sum(v * v / n for v, n in of_terms)
        effects["seeds"] = (variance, variance**2 / squares if squares else 1.0)
        for term in terms:  # the residual is in both variances
            residual = term - term.mean(0) - term.mean(1, keepdims=True) + term.mean()
            text -= float(np.square(residual).mean()) / (len(term) - 1) / max(n_parts - 1, 1)
    if n_parts > 1:
        effects["text"] = (max(text, 0.0), n_parts - 1)
    return float(of_parts.mean()), effects


def p_value(t: float, effects: Sequence[Effect]) -> float:
    """Return the p-value of t, a difference over its standard error.

    It is the mean of those of Student's distributions, weighted by the variances of the effects,
    which stays within its level where few seeds meet many parts; Satterthwaite's does not.
    """
    tails = [
        float(betainc(df / 2, 0.5, 0, df / (df + t * t), regularized=True)) for _, df in effects
    ]
    variances = [variance for variance, _ in effects]
    return float(np.average(tails, weights=variances if any(variances) else None))


def critical_value(effects: Sequence[Effect]) -> float:
    """Return the t, at most 100, whose p-value is 1 - CONFIDENCE."""
    n = bisect_left(range(10**11), CONFIDENCE - 1, key=lambda n: -p_value(n / 1e9, effects))
    return n / 1e9


def reached_at(curve: np.ndarray, loss: float) -> np.ndarray | None:
    """Return the tokens and the seconds (2,) at which a curve (N, 3) first has a loss.

    The loss is linear in their logarithms between validations; None where it stays above.
    """
    if not (below := np.flatnonzero(curve[:, 2] <= loss)).size:
        return None
    last, first = curve[max(int(below[0]) - 1, 0)], curve[int(below[0])]
    share = (last[2] - loss) / (last[2] - first[2]) if last[2] > first[2] else 1.0
    return last[:2] ** (1 - share) * first[:2] ** share
