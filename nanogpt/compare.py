"""Compare runs: bits per byte in pairs by seed and by text, curves, and a leaderboard of a sweep.

    python -m nanogpt.compare RUN OTHER_RUN [...]                the first is the baseline
    python -m nanogpt.compare runs/sweep-1a2b3c4d                a leaderboard
    python -m nanogpt.compare 'base-*' 'wide-*' --json FILE --picture FILE.svg

RUN is a run directory, the name of a run under runs/, a checkpoint of a run, a directory of runs or
a pattern. Runs that differ in nothing but the seed are a group. The statistics are described in
docs/EVALUATION.md.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nanogpt.command import add_shared, guard_output, parse, run_command
from nanogpt.disk import write_json
from nanogpt.evaluation.results import Row, align, format_metric, run_dir_of
from nanogpt.report.figures import standalone
from nanogpt.runs.comparison import (
    Group,
    MeasuredRun,
    compare,
    differing,
    group_runs,
    read_run,
    shown,
)
from nanogpt.runs.directory import find_runs
from nanogpt.scaling_law import analyse, as_text
from nanogpt.text import first_line, format_duration, format_list, format_number, print_line

PATTERN = set("*?[")
CURVE_PLACES = 5


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    guard_output()
    options = parse(parser(), arguments)
    if options.fit_scaling_law:
        return run_command("nanogpt.compare", lambda: print_scaling_law(options))

    def work() -> None:
        groups = group_runs(find_measured(options.runs, options.runs_dir))
        ranked = len(options.runs) == 1 < len(groups)
        if ranked:
            groups.sort(key=lambda group: group.losses.mean())
        rows = compare(groups)
        if options.json is not None:
            write_json(options.json, rows)
        print_line(describe(groups, rows, ranked=ranked))

    return run_command("nanogpt.compare", work)


def find_measured(references: Sequence[str], runs_dir: Path) -> list[MeasuredRun]:
    """Return the runs that references name, each once.

    Of directories of runs and patterns, runs that cannot be compared are left out, with a line on
    standard error. Raises ValueError for others, and FileNotFoundError where there is no run.
    """
    found: dict[Path, MeasuredRun] = {}
    for reference in references:
        paths = find_paths(reference, runs_dir)
        for path in paths:
            try:
                found.setdefault(path.resolve(), read_run(path))
            except (ValueError, KeyError, OSError) as error:
                if len(paths) == 1:
                    raise
                print(f"nanogpt.compare: left out: {first_line(error)}", file=sys.stderr)
    if not found:
        raise ValueError(f"no run of {format_list(references)} is finished; finish at least one")
    return [*found.values()]


def find_paths(reference: str, runs_dir: Path) -> list[Path]:
    """Return the directories of runs that a reference names; raises FileNotFoundError."""
    for folder in (Path(), runs_dir):
        is_pattern = not PATTERN.isdisjoint(reference) and not Path(reference).is_absolute()
        matches = sorted(folder.glob(reference)) if is_pattern else [folder / reference]
        paths = [run_dir_of(path) or path for path in matches]
        runs = [run.path for path in paths for run in find_runs(path)]
        if runs:
            return sorted(runs)
    raise FileNotFoundError(
        f"there is no run {reference!r}: neither a directory with runs, nor a name or a pattern "
        f"under {runs_dir}; pass one of these"
    )


def describe(groups: Sequence[Group], rows: Sequence[Row], *, ranked: bool) -> str:
    """Return a comparison as text: its table, curves, differing keys and what intervals cover."""
    keys = differing([group.first.identity for group in groups])
    operational = differing([run.execution for group in groups for run in group.runs.values()])
    tables = [cells(rows, ranked=ranked)]
    if len(groups) > 1:
        tables += [curve_cells(groups, "tokens", 0), curve_cells(groups, "seconds", 1)]
    if any("=" not in row["checkpoint"] for row in rows) and keys:
        header = ["key", *(group.label for group in groups)]
        tables.append([header, *([key, *map(shown, values)] for key, values in keys.items())])
    found = [align(table, n_left=1 + ranked) for table in tables]
    lines = notes(groups, rows)
    for key, values in operational.items():
        lines.append(f"operational: {key} {' | '.join(dict.fromkeys(map(shown, values)))}")
    return "\n\n".join([*found, "\n".join(lines)]).rstrip()


def cells(rows: Sequence[Row], *, ranked: bool) -> list[list[str]]:
    """Return the table of a comparison, its header first."""
    header = ["run", "seeds", "bits per byte", "difference", "percent", "95 % interval", "p"]
    table = [[*header, "fewer tokens", "less time", "tokens/s", "wall time"]]
    for row in rows:
        results = row["results"]
        low, high = (results.get(f"difference_{end}") for end in ("low", "high"))
        p = results.get("p_value")
        ratios = [results.get(f"{name}_ratio") for name in ("tokens", "seconds")]
        is_base = "difference" not in results
        table.append(
            [
                row["checkpoint"],
                str(len(row["about"]["seeds"])),
                format_metric(results["bits_per_byte"], results.get("bits_per_byte_stderr")),
                "" if is_base else f"{results['difference']:+.4f}",
                "" if is_base else f"{results['difference_percent']:+.2f} %",
                "" if low is None else f"{low:+.4f} to {high:+.4f}",
                "" if p is None else "<0.0001" if p < 1e-4 else f"{p:.4f}",
                *("" if is_base else f"{r:.2f} x" if r else "not reached" for r in ratios),
                f"{results['tokens_per_s']:,.0f}",
                format_duration(results["wall_s"]),
            ]
        )
    numbers = ["rank", *map(str, range(1, len(table)))]
    return [[n, *line] for n, line in zip(numbers, table, strict=True)] if ranked else table


def curve_cells(groups: Sequence[Group], name: str, column: int) -> list[list[str]]:
    """Return the mean curves at common tokens (column 0) or seconds (column 1)."""
    curves = [group.curve[:, [column, 2]] for group in groups]
    first, last = max(c[0, 0] for c in curves), min(c[-1, 0] for c in curves)
    places = np.linspace(first, last, CURVE_PLACES) if first < last else np.array([last])
    header = [f"bits per byte at {name}", *(format_number(place) for place in places)]
    return [
        header,
        *(
            [g.label, *(f"{v:.4f}" for v in np.interp(places, *c.T))]
            for g, c in zip(groups, curves, strict=True)
        ),
    ]


def notes(groups: Sequence[Group], rows: Sequence[Row]) -> list[str]:
    """Return what the intervals cover, and what is missing for more."""
    if len(groups) == 1:
        losses = groups[0].losses
        spread = f"standard deviation {losses.std(ddof=1):.4f}" if len(losses) > 1 else "one seed"
        return [f"one group: these runs differ in nothing but the seed ({spread})"]
    found = []
    for row in rows:
        covers, results = row["about"].get("covers"), row["results"]
        if covers is None:
            continue
        if "seeds" not in covers:
            found.append(
                "one seed: intervals are over the text alone; training noise needs more seeds"
            )
        elif not row["about"]["n_pairs"]:
            found.append("without two seeds in common the variance is Welch's, of unpaired seeds")
        else:
            both = [results[f"seeds_variance{kind}"] for kind in ("", "_unpaired")]
            paired, unpaired = map(format_number, both)
            label = row["checkpoint"]
            found.append(f"{label}: variance over seeds {paired} in pairs, {unpaired} without")
        if "text" not in covers:
            found.append("runs without validation.csv have no interval over the text")
    return [*dict.fromkeys(found)]


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    parser = argparse.ArgumentParser(
        prog="python -m nanogpt.compare",
        description="Compare runs in bits per byte, in pairs by seed and by text.",
    )
    add = parser.add_argument
    add(
        "runs",
        nargs="+",
        metavar="RUN",
        help="a run, its name or checkpoint, a directory of runs or a pattern; first the baseline",
    )
    add("--json", type=Path, help="a file to write the results to")
    add_shared(parser, "--runs-dir")
    fit = "fit L(N, D) = E + A / N^alpha + B / D^beta to the runs, instead of comparing them"
    add("--fit-scaling-law", action="store_true", help=fit)
    new = "predict the loss of N parameters after D tokens"
    add("--predict", nargs=2, type=float, metavar=("N", "D"), help=new)
    times = "predict the lowest loss at so many times the FLOPs of the largest run (default 8)"
    add("--times", type=float, default=8.0, help=times)
    return parser


def print_scaling_law(options: argparse.Namespace) -> None:
    """Print the scaling law of the runs, and write its report and picture."""
    groups = group_runs(find_measured(options.runs, options.runs_dir))
    summaries = [run.summary for group in groups for run in group.runs.values()]
    report, picture = analyse(summaries, options.predict, options.times)
    print_line(as_text(report))
    if options.json is not None:
        write_json(options.json, report)
    if getattr(options, "picture", None) is not None:
        options.picture.write_text(standalone(picture), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
