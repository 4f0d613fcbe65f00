"""Fit the constants of nanogpt/training/recipe.py: sweeps over depth, learning rate and step size.

    python benchmarks/recipe.py --minutes 5 --depths 2,3,4 --rates 0.5,1,2 --steps 0.5,1,2
    python benchmarks/recipe.py --quick
    python benchmarks/recipe.py --fit

Every point is a run of `train.py minutes=N model=auto depth=D` with a factor on the learning rates
and on tokens_per_step of the rules, and one line of the results. Repeated, the command trains what
is missing. `--fit` prints the best point of each budget and the constants that lie through them.
"""

import argparse
import itertools
import json
import math
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nanogpt.training import recipe

ROOT = Path(__file__).parent.parent
QUICK = {"minutes": [0.5], "depths": [1, 2], "rates": [1.0], "steps": [1.0], "seeds": [1]}
Point = dict[str, Any]


def main() -> None:
    options = parser().parse_args()
    if options.quick:
        vars(options).update(QUICK)
    if not options.fit:
        sweep(options)
    for line in fit(read(options.results)):
        print(line)


def sweep(options: argparse.Namespace) -> None:
    """Train the points that the results lack."""
    grid = (options.minutes, options.depths, options.rates, options.steps, options.seeds)
    names = ("minutes", "depth", "rate", "step", "seed")
    known = [{name: point[name] for name in names} for point in read(options.results)]
    for values in itertools.product(*grid):
        point = dict(zip(names, values, strict=True))
        if point in known:
            continue
        result = train(point, options)
        with open(options.results, "a", encoding="utf-8") as file:
            file.write(f"{json.dumps({**point, **result})}\n")
        print(point, result["val_bits_per_byte"], flush=True)


def train(point: Mapping[str, Any], options: argparse.Namespace) -> Point:
    """Train a point, or find it finished; return what it reached.

    Factors apply to what the rules choose for the depth, with the tokens that the rule gives it.
    """
    depth, tokens = point["depth"], recipe.tokens_of(point["depth"])
    base = recipe.step_tokens(tokens, options.block_size)
    per_step = max(round(base * point["step"] / options.block_size), 1) * options.block_size
    name = "-".join(f"{key}{value}" for key, value in point.items())
    overrides = [
        *("model=auto", f"depth={depth}", f"minutes={point['minutes']}", f"seed={point['seed']}"),
        f"model.block_size={options.block_size}",
        f"tokens_per_step={per_step}",
        f"optim.learning_rate={options.learning_rate * point['rate']:.4g}",
        f"optim.adamw_learning_rate={options.adamw_learning_rate * point['rate']:.4g}",
        *(f"name=recipe/{name}", f"runs_dir={options.runs_dir}", f"data_dir={options.data_dir}"),
        *options.overrides,
    ]
    subprocess.run([sys.executable, str(ROOT / "train.py"), *overrides], check=True)
    summary = json.loads((options.runs_dir / "recipe" / name / "summary.json").read_text())
    keys = ("val_bits_per_byte", "tokens", "steps", "tokens_per_s", "wall_s")
    return {**{key: summary[key] for key in keys}, "tokens_per_step": per_step}


def read(path: Path) -> list[Point]:
    """Return the points of a results file, none where it is missing."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines()]


def fit(points: Iterable[Point]) -> Iterable[str]:
    """Yield the best point of each budget, and the constants of the rules through these points.

    Of several seeds the mean counts. Slopes need at least two budgets with different best points.
    """
    groups: dict[tuple[Any, ...], list[Point]] = defaultdict(list)
    for point in points:
        groups[tuple(point[key] for key in ("minutes", "depth", "rate", "step"))].append(point)
    means = {
        key: float(np.mean([point["val_bits_per_byte"] for point in group]))
        for key, group in groups.items()
    }
    best = []
    for minutes in sorted({key[0] for key in means}):
        key = min((key for key in means if key[0] == minutes), key=means.__getitem__)
        point = groups[key][0]
        weights = recipe.tokens_of(point["depth"]) / recipe.TOKENS_PER_WEIGHT
        best.append({**point, "ratio": point["tokens"] / weights})
        yield (
            f"{minutes:g} min: {means[key]:.4f} bits per byte at depth {point['depth']}, "
            f"{point['tokens']:,} tokens ({best[-1]['ratio']:.2f} per weight), "
            f"{point['tokens_per_step']:,} per step, learning rates x {point['rate']:g}"
        )
    if not best:
        return
    ratio = math.exp(np.mean([math.log(point["ratio"]) for point in best]))
    yield f"TOKENS_PER_WEIGHT = {ratio:.2f}"
    if len({point["tokens"] for point in best}) > 1:
        tokens, steps = (
            np.log([point[key] for point in best]) for key in ("tokens", "tokens_per_step")
        )
        yield f"STEP_EXPONENT = {np.polyfit(tokens, steps, 1)[0]:.3f}"


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    parser = argparse.ArgumentParser(description="Fit the rules of the depth dial.")
    numbers = {"minutes": (float, "5"), "depths": (int, "2,3,4"), "rates": (float, "0.5,1,2")}
    numbers |= {"steps": (float, "0.5,1,2"), "seeds": (int, "1")}
    for name, (kind, default) in numbers.items():

        def values(text: str, kind: Any = kind) -> list[Any]:
            return [kind(word) for word in text.split(",")]

        parser.add_argument(f"--{name}", type=values, default=default, help=f"default {default}")
    parser.add_argument("--learning-rate", type=float, default=5e-3, help="of the anchor")
    parser.add_argument("--adamw-learning-rate", type=float, default=1e-2, help="of the anchor")
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--results", type=Path, default=Path("recipe.jsonl"))
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"))
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--quick", action="store_true", help="two runs of half a minute")
    parser.add_argument("--fit", action="store_true", help="train nothing")
    parser.add_argument("overrides", nargs="*", help="more arguments of train.py")
    return parser


if __name__ == "__main__":
    main()
