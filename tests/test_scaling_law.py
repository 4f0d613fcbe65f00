"""The scaling law: fits to losses of known constants, the optimum, and the prediction."""

import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from nanogpt.compare import main
from nanogpt.scaling_law import analyse, as_text, fit, loss_of, optimum
from tests.test_comparison import write_run

TRUE = np.array([0.7, 30.0, 300.0, 0.3, 0.45])  # E, A, B, alpha, beta
N, D = (a.ravel() for a in np.meshgrid([0.18e6, 0.66e6, 3.7e6], [0.26e6, 0.61e6, 1.3e6, 3.1e6]))


def noisy(deviation: float, seed: int) -> np.ndarray:
    """Losses of TRUE at (N, D) with normal noise of their logarithm."""
    noise = np.random.default_rng(seed).normal(0, deviation, len(N))
    return loss_of(TRUE, N, D) * np.exp(noise)


def summaries(losses: np.ndarray) -> list[dict[str, float]]:
    keys = ("n_params", "tokens", "val_bits_per_byte")
    return [dict(zip(keys, row, strict=True)) for row in zip(N, D, losses, strict=True)]


def test_losses_without_noise_give_their_constants() -> None:
    law, residuals = fit(N, D, loss_of(TRUE, N, D))
    np.testing.assert_allclose(law[:, 0], TRUE, rtol=1e-6)
    assert np.ptp(law[0]) < 1e-6
    assert np.abs(residuals).max() < 1e-9


def test_an_outlier_moves_the_prediction_by_less_than_in_least_squares() -> None:
    losses = loss_of(TRUE, N, D)
    losses[5] *= 1.05
    law = fit(N, D, losses)[0][:, 0]
    np.testing.assert_allclose(
        loss_of(law, N, D)[np.arange(12) != 5], np.delete(loss_of(TRUE, N, D), 5), rtol=5e-3
    )


def test_intervals_contain_the_true_prediction() -> None:
    truth = loss_of(TRUE, 11e6, 8e6)
    found = [
        analyse(summaries(noisy(2e-3, seed)), (11e6, 8e6))[0]["predicted_loss"] for seed in range(8)
    ]
    assert sum(low < truth < high for _, low, high in found) >= 6
    assert all(abs(value / truth - 1) < 0.02 for value, _, _ in found)


def test_the_optimum_is_where_the_derivative_along_the_budget_is_zero() -> None:
    flops = 3e14
    n, d = optimum(TRUE, flops)
    assert 6 * n * d == pytest.approx(flops)
    around = [loss_of(TRUE, n * step, d / step) for step in (0.99, 1, 1.01)]
    assert around[1] == min(around)


def test_published_constants_give_the_published_optimum() -> None:
    """Besiroglu et al. (arXiv:2404.10102): about 20 tokens per parameter at Chinchilla's FLOPs."""
    n, d = optimum(np.array([1.8172, 482.01, 2085.43, 0.3478, 0.3658]), 5.76e23)
    assert d / n == pytest.approx(20, rel=0.15)
    assert n == pytest.approx(70e9, rel=0.1)


def test_a_prediction_is_for_a_multiple_of_the_largest_run_or_for_a_size() -> None:
    report, picture = analyse(summaries(noisy(1e-3, 0)), times=4)
    assert report["about"]["flops"] == pytest.approx(4 * 6 * 3.7e6 * 3.1e6)
    assert report["about"]["parameters"] == report["optimal_parameters"][0]
    given, _ = analyse(summaries(noisy(1e-3, 0)), (1e7, 2e7))
    assert (given["about"]["parameters"], given["about"]["tokens"]) == (1e7, 2e7)
    assert given["about"]["flops"] == 6 * 1e7 * 2e7
    assert ElementTree.fromstring(picture).tag == "svg"
    assert json.loads(json.dumps(report)) == report
    assert "parameters 10M, tokens 20M" in as_text(given)


def test_losses_that_follow_no_law_have_finite_intervals() -> None:
    report, _ = analyse(summaries(np.random.default_rng(0).uniform(1, 3, len(N))))
    assert np.isfinite([values for name, values in report.items() if name != "about"]).all()
    _, low, high = report["predicted_loss"]
    assert high / low > 1.5


@pytest.mark.parametrize("rows", [[0, 1, 2, 4, 5], [0, 1, 3, 4, 6, 7], [0, 1, 2, 3, 4, 5]])
def test_too_few_runs_are_refused(rows: list[int]) -> None:
    with pytest.raises(ValueError, match=r"do not determine a scaling law; pass 6 or more"):
        fit(N[rows], D[rows], loss_of(TRUE, N, D)[rows])


def test_the_command_fits_the_runs_of_a_sweep(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i, (n, d, loss) in enumerate(zip(N, D, loss_of(TRUE, N, D), strict=True)):
        write_run(tmp_path / "law", f"r{i}", total=loss, summary={"n_params": n, "tokens": d}, x=i)
    words = [str(tmp_path / "law"), "--fit-scaling-law", "--json", str(tmp_path / "law.json")]
    assert main([*words, "--predict", "1e7", "2e7"]) == 0
    found = json.loads((tmp_path / "law.json").read_text())["predicted_loss"]
    assert found == pytest.approx([loss_of(TRUE, 1e7, 2e7)] * 3)
    assert "beta" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words", [["--times", "0"], ["--times", "nan"], ["--predict", "1e6", "-1"]]
)
def test_a_prediction_for_less_than_nothing_is_refused(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path, "r", summary={"n_params": 1})
    assert main([str(tmp_path), "--fit-scaling-law", *words]) == 1
    assert "take numbers above 0" in capsys.readouterr().err
