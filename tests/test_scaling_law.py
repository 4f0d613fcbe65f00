"""The scaling law: fits to losses of known constants, the optimum, and the prediction."""

import json
from xml.etree import ElementTree

import numpy as np
import pytest

from nanogpt.scaling_law import ScalingLaw, analyse, as_text, fit

TRUE = ScalingLaw(E=0.7, A=30.0, B=300.0, alpha=0.3, beta=0.45)
N, D = (a.ravel() for a in np.meshgrid([0.18e6, 0.66e6, 3.7e6], [0.26e6, 0.61e6, 1.3e6, 3.1e6]))


def noisy(deviation: float, seed: int) -> np.ndarray:
    """Losses of TRUE at (N, D) with normal noise of their logarithm."""
    return TRUE.loss(N, D) * np.exp(np.random.default_rng(seed).normal(0, deviation, len(N)))


def test_losses_without_noise_give_their_constants() -> None:
    law, residuals = fit(N, D, TRUE.loss(N, D))
    np.testing.assert_allclose([values[0] for values in law], TRUE, rtol=1e-6)
    assert np.ptp(law.E) < 1e-6
    assert np.abs(residuals).max() < 1e-9


def test_an_outlier_moves_the_prediction_by_less_than_in_least_squares() -> None:
    losses = TRUE.loss(N, D)
    losses[5] *= 1.05
    law = ScalingLaw(*(values[0] for values in fit(N, D, losses)[0]))
    np.testing.assert_allclose(
        law.loss(N, D)[np.arange(12) != 5], np.delete(TRUE.loss(N, D), 5), rtol=5e-3
    )


def test_intervals_contain_the_true_prediction() -> None:
    truth = TRUE.loss(11e6, 8e6)
    found = [
        analyse(N, D, noisy(2e-3, seed), (11e6, 8e6))[0]["predicted_loss"] for seed in range(8)
    ]
    assert sum(low < truth < high for _, low, high in found) >= 6
    assert all(abs(value / truth - 1) < 0.02 for value, _, _ in found)


def test_the_optimum_is_where_the_derivative_along_the_budget_is_zero() -> None:
    flops = 3e14
    n, d = TRUE.optimum(flops)
    assert 6 * n * d == pytest.approx(flops)
    around = [TRUE.loss(n * step, d / step) for step in (0.99, 1, 1.01)]
    assert around[1] == min(around)


def test_published_constants_give_the_published_optimum() -> None:
    """Besiroglu et al. (arXiv:2404.10102): about 20 tokens per parameter at Chinchilla's FLOPs."""
    n, d = ScalingLaw(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658).optimum(5.76e23)
    assert d / n == pytest.approx(20, rel=0.15)
    assert n == pytest.approx(70e9, rel=0.1)


def test_a_prediction_is_for_a_multiple_of_the_largest_run_or_for_a_size() -> None:
    report, picture = analyse(N, D, noisy(1e-3, 0), times=4)
    assert report["about"]["flops"] == pytest.approx(4 * 6 * 3.7e6 * 3.1e6)
    assert report["about"]["parameters"] == report["optimal_parameters"][0]
    given, _ = analyse(N, D, noisy(1e-3, 0), (1e7, 2e7))
    assert (given["about"]["parameters"], given["about"]["tokens"]) == (1e7, 2e7)
    assert given["about"]["flops"] == 6 * 1e7 * 2e7
    assert ElementTree.fromstring(picture).tag == "svg"
    assert json.loads(json.dumps(report)) == report
    assert "parameters 10M, tokens 20M" in as_text(given)


def test_losses_that_follow_no_law_have_finite_intervals() -> None:
    report, _ = analyse(N, D, np.random.default_rng(0).uniform(1, 3, len(N)))
    assert np.isfinite([values for name, values in report.items() if name != "about"]).all()
    _, low, high = report["predicted_loss"]
    assert high / low > 1.5


@pytest.mark.parametrize("rows", [[0, 1, 2, 4, 5], [0, 1, 3, 4, 6, 7], [0, 1, 2, 3, 4, 5]])
def test_too_few_runs_are_refused(rows: list[int]) -> None:
    with pytest.raises(ValueError, match=r"do not determine a scaling law; pass 6 or more"):
        fit(N[rows], D[rows], TRUE.loss(N, D)[rows])
