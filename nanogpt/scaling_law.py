"""The scaling law L(N, D) = E + A / N^alpha + B / D^beta of runs (arXiv:2203.15556, approach 3).

N are the parameters of a model, a tied head counted once, D its training tokens, and L the bits per
byte of validation. Training takes 6 N D FLOPs.
"""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np

from nanogpt.evaluation.results import align
from nanogpt.report.figures import draw_frontier
from nanogpt.text import format_number

CONSTANTS = ("E", "A", "B", "alpha", "beta")
BOUNDS = np.log([(1e-5, 1e-5, 1e-5, 0.05, 0.05), (99, 99, 99, 2, 2)])  # while fitting
HUBER = 1e-3  # residuals of log L beyond it count linearly (arXiv:2203.15556, section D.3)
N_SAMPLES = 500
Array = np.ndarray


def loss_of(law: Array, n: Any, d: Any) -> Any:
    """Return L(N, D) for constants (5,) or (5, S)."""
    E, A, B, alpha, beta = law
    return E + A / n**alpha + B / d**beta


def optimum(law: Array, flops: Any) -> tuple[Any, Any]:
    """Return the N and D of the lowest loss at these FLOPs (arXiv:2203.15556, equation 4)."""
    _, A, B, alpha, beta = law
    n = (alpha * A / (beta * B) * (flops / 6) ** beta) ** (1 / (alpha + beta))
    return n, flops / 6 / n


def fit(n: Array, d: Array, loss: Array) -> tuple[Array, Array]:
    """Fit the law to runs (R,); return its constants (5, 1 + S) and the residuals of log L (R,).

    The first are the fit, the others are fits to losses with resampled residuals, which are
    enlarged for the five degrees of freedom. Raises ValueError for too few runs.
    """
    counts = len(loss), len({*n}), len({*d})
    if counts[0] < 6 or min(counts) < 3:
        given = "{} runs of {} sizes and {} budgets".format(*counts)
        raise ValueError(f"{given} do not determine a scaling law; pass 6 or more, of 3 and 3")
    logs, target = np.log([n, d]), np.log(loss)
    means = logs.mean(1, keepdims=True)
    grid = product(loss.min() * np.array([0.3, 0.6, 0.9]), *2 * [(0.1, 0.3, 0.6, 1.0)])
    starts = [[E, *2 * [(loss.mean() - E) / 2], *exponents] for E, *exponents in grid]
    found, costs, values = _minimise(np.log(starts), logs - means, target)
    best, fitted = found[[costs.argmin()]], values[costs.argmin()]
    residuals = (target - fitted) * np.sqrt(len(loss) / (len(loss) - 5))
    drawn = fitted + np.random.default_rng(0).choice(residuals, (N_SAMPLES, len(loss)))
    samples, *_ = _minimise(best.repeat(N_SAMPLES, 0), logs - means, drawn)
    law = np.exp(np.concatenate([best, samples])).T
    law[1:3] *= np.exp(law[3:] * means)
    return law, residuals


def _minimise(logs: Array, x: Array, target: Array) -> tuple[Array, Array, Array]:
    """Minimise the Huber loss by damped Gauss-Newton steps, from logarithms of constants (S, 5).

    Returns the minima, their costs (S,) and log L (S, R).
    """
    for _ in range(300):
        E, a, b, alpha, beta = np.exp(logs).T[..., None]  # (S, 1) each
        of_n, of_d = a * np.exp(-alpha * x[0]), b * np.exp(-beta * x[1])  # (S, R)
        total = E + of_n + of_d
        terms = [E + 0 * of_n, of_n, of_d, -alpha * x[0] * of_n, -beta * x[1] * of_d]
        slope, residual = np.stack(terms, 1) / total[:, None], np.log(total) - target
        weight = HUBER / np.maximum(np.abs(residual), HUBER)
        weighted = slope * weight[:, None]  # (S, 5, R)
        hessian = weighted @ slope.swapaxes(1, 2) * (1 + 1e-4 * np.eye(5)) + 1e-10 * np.eye(5)
        step = np.linalg.solve(hessian, weighted @ residual[..., None])[..., 0]
        logs = np.clip(logs - np.clip(step, -0.5, 0.5), *BOUNDS)
    return logs, (weight * (1 - weight / 2) * residual**2).sum(1), np.log(total)


def analyse(
    summaries: Sequence[Mapping[str, Any]], new: Sequence[float] | None = None, times: float = 8
) -> tuple[dict[str, Any], str]:
    """Return the fit to runs, with the prediction for a `new` N and D, and its picture.

    Without `new` these are the optimum at `times` the FLOPs of the largest run. Values are those of
    the fit and the ends of an interval of 95 %, which includes a run's noise in the predicted loss.
    Raises ValueError for values that are not positive, and for too few runs.
    """
    if not all(0 < value < 1e30 for value in new or [times]):
        raise ValueError("--predict and --times take numbers above 0")
    keys = ("n_params", "tokens", "val_bits_per_byte")
    n, d, loss = np.array([[run[key] for key in keys] for run in summaries], dtype=float).T
    law, residuals = fit(n, d, loss)
    flops = 6 * float(new[0] * new[1] if new else times * (n * d).max())
    best, spans = law[:, 0], np.geomspace(6 * (n * d).min(), flops)
    size, tokens = new or map(float, optimum(best, flops))
    noise = np.random.default_rng(1).choice(residuals, N_SAMPLES + 1)
    noise[0] = 0  # of the fit itself
    names = (*CONSTANTS, "optimal_parameters", "optimal_tokens", "predicted_loss")
    found = (*law, *optimum(law, flops), loss_of(law, size, tokens) * np.exp(noise))
    report: dict[str, Any] = {
        name: [float(values[0]), *np.percentile(values[1:], (2.5, 97.5)).tolist()]
        for name, values in zip(names, found, strict=True)
    }
    curves = [loss_of(best, one, spans / 6 / one) for one in {*n}]
    curves.append(loss_of(best, *optimum(best, spans)))
    picture = draw_frontier(6 * n * d, loss, spans, curves, report["predicted_loss"])
    rms = float(np.sqrt(np.square(residuals).mean()))
    about = {"runs": len(n), "rms_residual": rms, "flops": flops}
    return {**report, "about": {**about, "parameters": size, "tokens": tokens}}, picture


def as_text(report: Mapping[str, Any]) -> str:
    """Return a report as a table, and how it was made."""
    rows = [[k, *(format_number(v, 4) for v in report[k])] for k in report if k != "about"]
    about = [f"{name} {format_number(value, 4)}" for name, value in report["about"].items()]
    law = "L(N, D) = E + A / N^alpha + B / D^beta, for N parameters and D tokens"
    table = align([["", "value", "2.5 %", "97.5 %"], *rows], n_left=1)
    return "\n".join([law, table, ", ".join(about)])
