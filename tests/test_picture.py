"""The picture of figures: a panel for what is known or uncertain, a word where there is none."""

from typing import Any

import pytest

from nanogpt.evaluation.picture import picture
from nanogpt.training.evaluations import evaluations_section


def row(**results: float) -> dict[str, Any]:
    return {"checkpoint": "a", "task": "harness", "results": results}


def test_a_figure_of_any_name_is_drawn_where_it_has_a_standard_error() -> None:
    drawn = picture([row(arc_acc=0.5, arc_acc_stderr=0.1, arc_examples=40, sum_acc=0.75)])
    assert "arc acc: a 0.5000 ± 0.1000" in drawn
    assert "sum" not in drawn
    assert "examples" not in drawn
    assert drawn.count("<circle") == 1


def test_a_figure_that_one_row_alone_has_an_error_of_is_drawn_of_all() -> None:
    rows = [row(arc_acc=0.5, arc_acc_stderr=0.0), row(arc_acc=0.75)]
    assert picture(rows).count("<circle") == picture(rows[::-1]).count("<circle") == 2


def test_known_figures_come_first() -> None:
    drawn = picture([row(arc_acc=0.5, arc_acc_stderr=0.1, acc=0.25, acc_stderr=0.1)])
    assert drawn.index(">accuracy<") < drawn.index(">arc acc<")


def test_nothing_to_draw_is_said() -> None:
    with pytest.raises(ValueError, match="there is nothing to draw, as no figure has a standard"):
        picture([row(arc_acc=0.5)])
    section = evaluations_section([row(arc_acc=0.5)])
    assert "there is nothing to draw" in section
    assert "<svg" not in section
