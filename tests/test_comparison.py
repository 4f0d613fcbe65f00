"""The statistics of comparisons: by hand, against published quantiles, and by simulation."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from nanogpt.runs.comparison import (
    Group,
    compare,
    critical_value,
    crossed_effects,
    difference,
    group_runs,
    p_value,
    reached_at,
    read_run,
)


def write_run(
    folder: Path,
    name: str,
    bits: list[float] | None = None,
    *,
    seed: int = 1,
    total: float = 2.0,
    corpus: str = "c0",
    final_tokens: int | None = None,
    summary: dict[str, Any] | None = None,
    **config: Any,
) -> Path:
    """Write a finished run; `bits` are its bits per byte in two parts of 1,000 bytes each."""
    path = folder / name
    path.mkdir(parents=True)
    resolved = {"corpus": corpus, "micro_batch": 8, "threads": 1}
    recorded: dict[str, Any] = {
        "seed": seed,
        "tokens_per_step": 100,
        "command": f"python train.py name={name}",
    }
    recorded["callbacks"] = {"validation": {"tokens": None, "final_tokens": final_tokens}}
    (path / "config.yaml").write_text(yaml.safe_dump({**recorded, **config, "resolved": resolved}))
    total = sum(bits) / 2 if bits else total
    (path / "metrics.csv").write_text(
        "step,wall_s,val/bits_per_byte\n"
        + "".join(f"{n},{n / 10},{total + 3 - n / 10}\n" for n in (10, 20, 30))
    )
    written = {"stage": "pretrain", "steps": 30, "tokens": 3000, "tokens_per_s": 1000.0}
    written |= {"wall_s": 3.0, "val_bits_per_byte": total}
    (path / "summary.json").write_text(json.dumps({**written, **(summary or {})}))
    if bits:
        rows = (f"{i * 1000},{b * 1000 * np.log(2)},300,1000\n" for i, b in enumerate(bits))
        (path / "validation.csv").write_text("start,nats,tokens,bytes\n" + "".join(rows))
    return path


def groups_of(*paths: Path) -> list[Group]:
    return group_runs([read_run(path) for path in paths])


@pytest.mark.parametrize(
    ("t", "df", "p"),  # of tables of Student's distribution
    [(12.706, 1, 0.05), (4.303, 2, 0.05), (9.925, 2, 0.01), (2.571, 5, 0.05), (1.960, 1e6, 0.05)],
)
def test_p_values_are_those_of_published_tables(t: float, df: float, p: float) -> None:
    assert p_value(t, [(1.0, df)]) == pytest.approx(p, rel=2e-3)
    if p == 0.05:
        assert critical_value([(1.0, df)]) == pytest.approx(t, rel=2e-4)


def test_effects_by_hand() -> None:
    # Seed means 2 and 4, part means 2 and 4; no residual is left.
    value, effects = crossed_effects([np.array([[1.0, 3.0], [3.0, 5.0]])])
    assert value == 3.0
    assert effects == {"seeds": (1.0, 1.0), "text": (1.0, 1)}
    # A residual of +-1: the variance of the parts is that of the residual alone.
    value, effects = crossed_effects([np.array([[3.0, 1.0], [3.0, 5.0]])])
    assert (value, effects["seeds"]) == (3.0, (1.0, 1.0))
    assert effects["text"][0] == 0.0


def test_runs_are_paired_by_seed_and_by_part(tmp_path: Path) -> None:
    # Seeds differ by 1, parts by 0.2; the second group needs 0.10 and 0.14 bits more in the mean.
    base = [write_run(tmp_path, f"a{s}", [s, s + 0.2], seed=s, lr=1) for s in (1, 2)]
    other = [
        write_run(tmp_path, "b1", [1.1, 1.3], seed=1, lr=2),
        write_run(tmp_path, "b2", [2.14, 2.34], seed=2, lr=2),
    ]
    one, two = groups_of(*base, *other)
    assert (one.label, two.label) == ("lr=1", "lr=2")
    found, about = difference(one, two)
    assert found["difference"] == pytest.approx(0.12)
    assert found["difference_percent"] == pytest.approx(100 * 0.12 / 1.6)
    assert found["difference_stderr"] == pytest.approx(0.02)  # of 0.10 and 0.14; parts agree
    assert found["difference_high"] == pytest.approx(0.12 + 12.706 * 0.02, rel=1e-4)
    assert found["seeds_variance"] == pytest.approx(0.02**2)
    assert found["seeds_variance_unpaired"] == pytest.approx((0.5 + 1.04**2 / 2) / 2)
    assert about == {"covers": "seeds and text", "paired_seeds": [1, 2]}


def test_one_seed_has_an_interval_over_the_text_and_no_p_value(tmp_path: Path) -> None:
    base = write_run(tmp_path, "a", [1.0, 1.4], lr=1)
    other = write_run(tmp_path, "b", [1.1, 1.7], lr=2)  # 0.1 and 0.3 more
    found, about = difference(*groups_of(base, other))
    assert found["difference"] == pytest.approx(0.2)
    assert found["difference_stderr"] == pytest.approx(0.1)
    assert about["covers"] == "text"
    assert "p_value" not in found


def test_seeds_that_are_not_in_common_are_compared_by_welch(tmp_path: Path) -> None:
    base = [write_run(tmp_path, f"a{s}", seed=s, total=s, lr=1) for s in (1, 2)]
    other = [write_run(tmp_path, f"b{s}", seed=s, total=s, lr=2) for s in (3, 5)]
    found, about = difference(*groups_of(*base, *other))
    assert found["difference"] == pytest.approx(2.5)
    assert found["difference_stderr"] == pytest.approx((0.25 + 1) ** 0.5)
    assert about == {"covers": "seeds", "paired_seeds": []}


@pytest.mark.parametrize("n_seeds", [2, 3, 5])
def test_false_positives_stay_within_their_level(n_seeds: int) -> None:
    random = np.random.default_rng(n_seeds)
    n_pairs, n_parts = 200, 64
    p_values = []
    for i in range(n_pairs):
        of_seed, of_part, rest = [(1, 1, 1), (1, 0.1, 0.1), (0.05, 1, 0.3)][i % 3]
        terms = of_part * random.normal(size=(1, n_parts)) + rest * random.normal(
            size=(n_seeds, n_parts)
        )
        terms += 0.1 * of_seed * random.normal(size=(n_seeds, 1))
        value, effects = crossed_effects([terms])
        variance = sum(part for part, _ in effects.values())
        p_values.append(p_value(value / variance**0.5, [*effects.values()]))
    # Of 200 fair trials at 0.05, more than 16 are positive once in 40.
    assert np.mean(np.array(p_values) < 0.05) <= 16 / 200


def test_a_true_difference_is_found() -> None:
    random = np.random.default_rng(0)
    terms = 0.004 + 0.0004 * random.normal(size=(3, 1)) + 0.01 * random.normal(size=(3, 256))
    value, effects = crossed_effects([terms])
    assert p_value(value / sum(v for v, _ in effects.values()) ** 0.5, [*effects.values()]) < 0.01


def test_a_loss_is_reached_between_two_validations() -> None:
    curve = np.array([[100, 1.0, 4.0], [400, 4.0, 2.0], [500, 5.0, 1.9]])
    assert reached_at(curve, 3.0) == pytest.approx([200, 2])  # half the way in log tokens
    assert reached_at(curve, 4.5) == pytest.approx([100, 1])
    assert reached_at(curve, 1.0) is None


def test_rows_have_ratios_where_the_loss_of_the_first_is_reached(tmp_path: Path) -> None:
    paths = [write_run(tmp_path, "a", total=2.0, lr=1), write_run(tmp_path, "b", total=1.0, lr=2)]
    rows = compare(groups_of(*paths))
    assert rows[1]["results"]["tokens_ratio"] == pytest.approx(3000 / 2000)
    assert "tokens_ratio" not in compare(groups_of(*reversed(paths)))[1]["results"]


def test_a_last_validation_of_more_text_is_no_point_of_the_curve(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path, "a", total=2.0, final_tokens=500))
    assert run.curve.tolist() == [[1000, 1.0, 4.0], [2000, 2.0, 3.0]]


def test_another_tokenizer_of_the_same_text_is_comparable(tmp_path: Path) -> None:
    def runs(corpora: tuple[str, str], sources: tuple[str, str]) -> list[Group]:
        paths = [
            write_run(tmp_path, f"{c}-{s}", [1.0, 2.0], corpus=c, lr=c)
            for c, s in zip(corpora, sources, strict=True)
        ]
        for path, source in zip(paths, sources, strict=True):
            config = yaml.safe_load((path / "config.yaml").read_text())
            config["resolved"]["source"] = source
            (path / "config.yaml").write_text(yaml.safe_dump(config))
        return groups_of(*paths)

    assert len(runs(("c1", "c2"), ("s", "s"))) == 2
    with pytest.raises(ValueError, match=r"c3-s \(pretrain, c3\) and .*c4-t .* have different"):
        runs(("c3", "c4"), ("s", "t"))
