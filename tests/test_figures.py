"""Figures of curves and scores: every value within the frame, in the page's colours, in words."""

import re
from typing import Any

import pytest

from nanogpt.evaluation.results import lines
from nanogpt.report.figures import (
    CURVE_HEIGHT,
    Chart,
    Series,
    draw_curves,
    draw_scores,
    drawn_metrics,
    smooth,
    standalone,
)


def row(**results: float) -> dict[str, Any]:
    return {"checkpoint": "a", "task": "harness", "results": results}


def drawn(*rows: dict[str, Any]) -> str:
    found = lines(rows)
    return draw_scores(found, drawn_metrics(found))


def test_a_metric_of_any_name_is_drawn_where_it_has_a_standard_error() -> None:
    svg = drawn(row(arc_acc=0.5, arc_acc_stderr=0.1, arc_examples=40, sum_acc=0.75))
    assert "arc acc: a 0.5000 ± 0.1000" in svg
    assert "sum" not in svg
    assert "examples" not in svg
    assert svg.count("<use") == 1


def test_a_metric_that_one_row_alone_has_an_error_of_is_drawn_of_all() -> None:
    rows = [row(arc_acc=0.5, arc_acc_stderr=0.0), row(arc_acc=0.75)]
    assert drawn(*rows).count("<use") == drawn(*rows[::-1]).count("<use") == 2


def test_known_metrics_come_first() -> None:
    svg = drawn(row(arc_acc=0.5, arc_acc_stderr=0.1, acc=0.25, acc_stderr=0.1))
    assert svg.index(">accuracy<") < svg.index(">arc acc<")


def test_metrics_without_a_standard_error_are_not_drawn() -> None:
    assert drawn_metrics(lines([row(arc_acc=0.5)])) == []


def test_names_are_no_markup_and_no_formula() -> None:
    svg = drawn(row(acc=0.5, acc_stderr=0.1) | {"checkpoint": "<b> $x_2$ 中文"})
    assert ">&lt;b&gt; $x_2$ 中文<" in svg


def test_a_picture_stands_alone_in_light_and_dark() -> None:
    picture = standalone(drawn(row(acc=0.5, acc_stderr=0.1)))
    assert picture.startswith('<svg xmlns="http://www.w3.org/2000/svg"')
    assert "prefers-color-scheme: dark" in picture


def vertical_labels(svg: str) -> list[float]:
    return [float(x) for x in re.findall(r"text-anchor: end[^>]*>([\d.]+)</text>", svg)]


def heights(svg: str) -> list[float]:
    """Return the y of every point of the curves, which grows downwards."""
    curves = re.findall(r'<path d="(M[^"]*)"[^>]*style="fill: none; stroke: var.--series', svg)
    return [float(y) for curve in curves for y in re.findall(r"[ML] [-\d.]+ ([-\d.]+)", curve)]


def test_long_runs_stay_small() -> None:
    points = [(step, 2 + (step * 7919 % 1000) / 1000) for step in range(1, 20_001)]
    svg = draw_curves(Chart("Loss", "", [Series("training", points, noisy=True)]), 20_000)
    assert len(svg) < 60_000


@pytest.mark.parametrize("noisy", [False, True])
def test_no_value_is_outside_the_frame(noisy: bool) -> None:
    points = [(1, 11.0), *((step, 3 - step / 1000) for step in range(10, 1001, 10)), (1001, 5.0)]
    chart = Chart("Loss", "", [Series("training", points, noisy=noisy)])
    ys = heights(draw_curves(chart, 1001))
    assert len(ys) > 20
    assert min(ys) > 10  # below the frame's top, with a margin
    assert max(ys) < CURVE_HEIGHT - 20


def test_labels_of_small_values_fit_next_to_the_axis() -> None:
    points = [(step, step * 1e-6) for step in range(1001)]
    svg = draw_curves(Chart("Learning rate", "", [Series("", points)], from_zero=True), 1000)
    labels = re.findall(r"text-anchor: end[^>]*>([^<]+)</text>", svg)
    assert labels == ["0", "2.5e-4", "5e-4", "7.5e-4", "0.001"]


def test_late_spike_is_drawn_on_a_logarithmic_axis() -> None:
    points = [(step, 0.5) for step in range(1, 100)] + [(100, 400.0)]
    labels = vertical_labels(draw_curves(Chart("Norm", "", [Series("norm", points)]), 100))
    assert labels == [1, 10, 100]


def test_reference_line_is_within_the_frame() -> None:
    points = [(step, 3 - step / 100) for step in range(1, 101)]
    chart = Chart("Bits", "", [Series("validation", points)], reference=("gzip -9: 1.20", 1.2))
    svg = draw_curves(chart, 100)
    assert "gzip -9: 1.20" in svg
    assert min(vertical_labels(svg)) <= 1.5


def test_moving_average_keeps_a_constant() -> None:
    points = [(step, 2.0) for step in range(500)]
    assert [value for _, value in smooth(points)] == pytest.approx([2.0] * 500)


def test_curves_of_few_points_are_smoothed_too() -> None:
    points = [(step, float(step == 2)) for step in range(5)]
    # Means of three, twice, of what there is at the ends.
    assert [value for _, value in smooth(points)] == pytest.approx(
        [1 / 6, 2 / 9, 1 / 3, 2 / 9, 1 / 6]
    )
    assert smooth(points[:2]) == points[:2]


def test_chart_colours_follow_the_page() -> None:
    svg = draw_curves(Chart("Loss", "", [Series("training", [(1, 2.0), (2, 1.0)])]), 2)
    assert "var(--series-0)" in svg
    assert not re.search(r"#[0-9a-f]{6}\b", svg)
