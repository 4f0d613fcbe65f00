"""Compare runs in bits per byte, in pairs by seed and by text.

    python -m nanogpt.compare RUN OTHER_RUN [...]              the first is the baseline
    python -m nanogpt.compare runs/sweep-1a2b3c4d              a leaderboard
    python -m nanogpt.compare 'base-*' 'wide-*' --json FILE --picture FILE.svg

RUN is a run directory, the name of a run under runs/, a checkpoint of a run, a directory of runs or
a pattern. Runs that differ in nothing but the seed are a group. docs/EVALUATION.md describes the
statistics.
"""

import argparse
import sys
from collections.abc import Sequence
from contextlib import suppress
from glob import glob
from pathlib import Path

from nanogpt.command import check_files, make_parser, parse, run_command
from nanogpt.disk import write_json
from nanogpt.evaluation.results import Row, align, format_metric, run_dir_of
from nanogpt.report.figures import draw_comparison, standalone
from nanogpt.runs.comparison import (
    Group,
    MeasuredRun,
    compare,
    differing,
    group_runs,
    read_run,
    yaml_of,
)
from nanogpt.runs.directory import find_runs
from nanogpt.runs.log import print_text
from nanogpt.scaling_law import analyse, as_text
from nanogpt.text import first_line, format_duration, format_list, format_number, print_line

HEADER = ["run", "seeds", "bits per byte", "difference", "percent", "95 % interval", "p"]
HEADER += ["fewer tokens", "less time", "tokens/s", "wall time"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    options = parse(parser(), arguments)

    def work() -> None:
        check_files(options, "json", "picture")
        runs = find_measured(options.runs, options.runs_dir)
        groups = group_runs(runs, ranked=len(options.runs) == 1)
        content: object
        if options.fit_scaling_law:
            summaries = [run.summary for run in runs]
            content, picture = analyse(summaries, options.predict, options.times)
            text = as_text(content)
        else:
            content = rows = compare(groups)
            text = describe(groups, rows)
            curves = {group.label: group.curve for group in groups}
            picture = draw_comparison(curves, rows) if options.picture else ""
        if options.json is not None:
            write_json(options.json, content)
        if options.picture is not None:
            options.picture.write_text(standalone(picture), encoding="utf-8")
        print_line(text)

    return run_command("nanogpt.compare", work)


def leaderboard(sweep: Path) -> None:
    """Print the comparison of a sweep's language models, the best first; write leaderboard.json."""
    summaries = [run.summary() or {} for run in find_runs(sweep)]
    if not any("val_bits_per_byte" in summary for summary in summaries):
        return  # classifiers, or every job failed
    with suppress(ValueError):  # of jobs on several corpora
        groups = group_runs(find_measured([str(sweep)], sweep), ranked=True)
        rows = compare(groups)
        write_json(sweep / "leaderboard.json", rows)
        print_text(f"\n{describe(groups, rows)}")


def find_measured(references: Sequence[str], runs_dir: Path) -> list[MeasuredRun]:
    """Return the finished runs that references name, each once.

    Of a directory of runs or a pattern, runs that cannot be compared are left out, with a line on
    standard error. Raises ValueError and FileNotFoundError for others.
    """
    found: dict[Path, MeasuredRun] = {}
    for reference in references:
        paths = find_paths(reference, runs_dir)
        for path in paths:
            try:
                found.setdefault(path.resolve(), read_run(path))
            except (ValueError, OSError, LookupError, TypeError) as error:
                what = first_line(error)
                if isinstance(error, LookupError | TypeError):
                    what = f"{path} is damaged or incomplete ({type(error).__name__}: {what})"
                if len(paths) == 1:
                    raise ValueError(what) from error
                print(f"nanogpt.compare: left out: {what}", file=sys.stderr)
    if not found:
        raise ValueError(f"no run of {format_list(references)} is finished; finish at least one")
    return [*found.values()]


def find_paths(reference: str, runs_dir: Path) -> list[Path]:
    """Return the directories of the runs that a reference names; raises FileNotFoundError."""
    for folder in (Path(), runs_dir):
        path = folder / reference
        matches = [path] if path.exists() else map(Path, glob(str(path), recursive=True))
        runs = {run.path for match in matches for run in find_runs(run_dir_of(match) or match)}
        if runs:
            return sorted(runs)
    raise FileNotFoundError(
        f"there is no run {reference!r}: neither a directory with runs, nor a name or a pattern "
        f"under {runs_dir}; pass one of these"
    )


def describe(groups: Sequence[Group], rows: Sequence[Row]) -> str:
    """Return the table of a comparison as text, differing keys, and what intervals cover."""
    tables = [[HEADER, *map(cells, rows)]]
    runs = [[*group.runs.values()] for group in groups]
    keys = differing([members[0].keys(identity=True) for members in runs])
    if keys and runs[0][0].path.name == groups[0].label:  # the labels are not the keys
        header = ["key", *(group.label for group in groups)]
        tables.append([header, *([key, *map(yaml_of, keys[key])] for key in keys)])
    operational = differing([run.keys(identity=False) for members in runs for run in members])
    lines = [*dict.fromkeys(note for row in rows[1:] for note in notes(row))]
    if len(groups) == 1:
        lines = ["one group: these runs differ in nothing but the seed"]
        if len(losses := groups[0].losses) > 1:
            lines[0] += f"; the standard deviation over seeds is {losses.std(ddof=1):.4f}"
    for key, values in operational.items():
        lines.append(f"operational: {key} {' | '.join(dict.fromkeys(map(yaml_of, values)))}")
    return "\n\n".join([*(align(table, n_left=1) for table in tables), "\n".join(lines)]).rstrip()


def cells(row: Row) -> list[str]:
    """Return a row of the table."""
    results = row["results"]
    forms = {
        "difference": "{difference:+.4f}",
        "difference_percent": "{difference_percent:+.2f} %",
        "difference_low": "{difference_low:+.4f} to {difference_high:+.4f}",
        "p_value": "{p_value:.2g}",
        "tokens_ratio": "{tokens_ratio:.2f} x",
        "seconds_ratio": "{seconds_ratio:.2f} x",
    }
    missing = {"tokens_ratio", "seconds_ratio"} if "difference" in results else set()
    return [
        row["checkpoint"],
        str(len(row["about"]["seeds"])),
        format_metric(results["bits_per_byte"], results.get("bits_per_byte_stderr")),
        *(
            form.format(**results) if key in results else "not reached" if key in missing else ""
            for key, form in forms.items()
        ),
        f"{results['tokens_per_s']:,.0f}",
        format_duration(results["wall_s"]),
    ]


def notes(row: Row) -> list[str]:
    """Return what the interval of a difference covers, and what pairs of seeds gain."""
    about, results = row["about"], row["results"]
    text = [] if "text" in about["covers"] else ["no interval over the text: no validation.csv"]
    if "seeds" not in about["covers"]:
        return [*text, "one seed: no interval over training noise, which takes more seeds"]
    if not about["paired_seeds"]:
        return [*text, "no two seeds in common: the variance is Welch's, without pairs"]
    gains = [
        f"over {name} {format_number(results[f'{name}_variance'])} in pairs, "
        f"{format_number(results[f'{name}_variance_unpaired'])} without"
        for name in about["covers"].split(" and ")
    ]
    return [*text, f"{row['checkpoint']}: variance {'; '.join(gains)}"]


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    what = "Compare runs in pairs by seed and by text."
    parser = make_parser("nanogpt.compare", what, "--runs-dir")
    help = "a run, its name or checkpoint, a directory of runs, or a pattern; first the baseline"
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help=help)
    add("--json", type=Path, help="a file to write the results to")
    add("--picture", type=Path, metavar="FILE.svg", help="a file to draw them in")
    fit = "fit L(N, D) = E + A / N^alpha + B / D^beta to the runs, instead of comparing them"
    add("--fit-scaling-law", action="store_true", help=fit)
    new = "predict the loss of N parameters after D tokens"
    add("--predict", nargs=2, type=float, metavar=("N", "D"), help=new)
    times = "predict the lowest loss at so many times the FLOPs of the largest run (default 8)"
    add("--times", type=float, default=8.0, help=times)
    return parser


if __name__ == "__main__":
    sys.exit(main())
