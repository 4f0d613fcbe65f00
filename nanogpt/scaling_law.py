"""The scaling law L(N, D) = E + A / N^alpha + B / D^beta of runs (arXiv:2203.15556, approach 3).

N are the parameters of a model, a tied head counted once, D its training tokens, and L the bits per
byte of validation. Training takes 6 N D FLOPs.
"""

from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from nanogpt.evaluation.results import align
from nanogpt.report.figures import draw_frontier
from nanogpt.text import format_number

HUBER = 1e-3  # residuals of log L beyond it count linearly (arXiv:2203.15556, section D.3)
N_SAMPLES = 500
BOUNDS = np.log([(1e-5, 1e-5, 1e-5, 0.05, 0.05), (99, 99, 99, 2, 2)])[..., None]  # while fitting
Array = np.ndarray


class ScalingLaw(NamedTuple):
    """The constants of the law: numbers, or arrays of bootstrap samples."""

    E: Any
    A: Any
    B: Any
    alpha: Any
    beta: Any

    def loss(self, n: Any, d: Any) -> Any:
        """Return L(N, D)."""
        return self.E + self.A / n**self.alpha + self.B / d**self.beta

    def optimum(self, flops: Any) -> tuple[Any, Any]:
        """Return the N and D of the lowest loss at these FLOPs (arXiv:2203.15556, equation 4)."""
        total = self.alpha + self.beta
        ratio = (self.alpha * self.A / (self.beta * self.B)) ** (1 / total)
        n = ratio * (flops / 6) ** (self.beta / total)
        return n, flops / 6 / n


def fit(n: Array, d: Array, loss: Array) -> tuple[ScalingLaw, Array]:
    """Fit the law to runs (R,); return its constants (S + 1,) and the residuals of log L (R,).

    The first of each constant is the fit, the others are fits to losses with resampled residuals,
    which are enlarged for the five degrees of freedom. Raises ValueError for too few runs.
    """
    counts = len(loss), len({*n}), len({*d})
    if counts[0] < 6 or min(counts) < 3:
        given = "{} runs of {} sizes and {} budgets".format(*counts)
        raise ValueError(f"{given} do not determine a scaling law; pass 6 or more, of 3 and 3")
    means, low = np.log([n, d]).mean(1), loss.min()
    x, target = np.log([n, d]) - means[:, None], np.log(loss)
    grid = product((0.3, 0.6, 0.9), (0.1, 0.3, 0.6, 1.0), (0.1, 0.3, 0.6, 1.0))
    starts = [[s * low, *2 * [(loss.mean() - s * low) / 2], *exponents] for s, *exponents in grid]
    found, costs = _minimise(np.log(starts), x, target)
    best = found[[costs.argmin()]]

    def law(logs: Array) -> ScalingLaw:  # (S, 5), of N and D over their means
        E, a, b, alpha, beta = np.exp(logs).T
        return ScalingLaw(E, a * np.exp(alpha * means[0]), b * np.exp(beta * means[1]), alpha, beta)

    fitted = np.log(law(best).loss(n, d))
    residuals = (target - fitted) * np.sqrt(len(loss) / (len(loss) - 5))
    drawn = np.random.default_rng(0).choice(residuals, (N_SAMPLES, len(loss)))
    samples, _ = _minimise(best.repeat(N_SAMPLES, 0), x, fitted + drawn)
    return law(np.concatenate([best, samples])), residuals


def _minimise(logs: Array, x: Array, target: Array) -> tuple[Array, Array]:
    """Return the minima from logarithmic starts (S, 5) by Levenberg-Marquardt, and costs (S,)."""

    def evaluate(logs: Array) -> list[Array]:
        E, a, b, alpha, beta = np.exp(logs).swapaxes(0, 1)  # (S, 1) each
        of_n, of_d = a * np.exp(-alpha * x[0]), b * np.exp(-beta * x[1])  # (S, R)
        total = E + of_n + of_d
        terms = [E + 0 * of_n, of_n, of_d, -alpha * x[0] * of_n, -beta * x[1] * of_d]
        slope = np.stack(terms, 1) / total[:, None]  # (S, 5, R)
        residual = (np.log(total) - target)[:, None]
        weighted = residual * (weight := HUBER / np.maximum(np.abs(residual), HUBER))
        cost = (weighted * residual - weighted**2 / 2).sum(2, keepdims=True)
        return [logs, cost, slope * weight @ slope.swapaxes(1, 2), slope @ weighted.swapaxes(1, 2)]

    state, damping, eye = evaluate(logs[..., None]), np.full((len(logs), 1, 1), 0.01), np.eye(5)
    for _ in range(300):
        hessian = state[2] + damping * (eye * state[2] + 1e-9 * eye)
        step = np.clip(np.linalg.solve(hessian, state[3]), -1, 1)
        trial = evaluate(np.clip(state[0] - step, *BOUNDS))
        better = trial[1] < state[1]
        state = [np.where(better, new, old) for new, old in zip(trial, state, strict=True)]
        damping = np.clip(np.where(better, damping / 3, damping * 4), 1e-9, 1e9)
    return state[0][..., 0], state[1].ravel()


def analyse(
    n: Array, d: Array, loss: Array, new: Sequence[float] | None = None, times: float = 8
) -> tuple[dict[str, Any], str]:
    """Return the fit to runs (R,), with the prediction for a `new` N and D, and its picture.

    Without `new` these are the optimum at `times` the FLOPs of the largest run. Values are those of
    the fit and the ends of an interval of 95 %, which includes a run's noise in the predicted loss.
    """
    law, residuals = fit(n, d, loss)
    flops = float(6 * new[0] * new[1] if new else times * 6 * (n * d).max())
    optimum = dict(zip(("optimal_parameters", "optimal_tokens"), law.optimum(flops), strict=True))
    size, tokens = new or (float(values[0]) for values in optimum.values())
    noise = np.random.default_rng(1).choice(residuals, N_SAMPLES + 1)
    noise[0] = 0  # of the fit itself
    found = {**law._asdict(), **optimum, "predicted_loss": law.loss(size, tokens) * np.exp(noise)}
    report: dict[str, Any] = {
        name: [float(values[0]), *np.percentile(values[1:], (2.5, 97.5)).tolist()]
        for name, values in found.items()
    }
    best, spans = ScalingLaw(*(values[0] for values in law)), np.geomspace(6 * (n * d).min(), flops)
    curves = [best.loss(one, spans / 6 / one) for one in sorted({*n})]
    curves.append(best.loss(*best.optimum(spans)))
    picture = draw_frontier(6 * n * d, loss, spans, curves, report["predicted_loss"])
    rms = float(np.sqrt(np.square(residuals).mean()))
    about = {"runs": len(n), "rms_residual": rms, "flops": flops}
    return {**report, "about": {**about, "parameters": size, "tokens": tokens}}, picture


def as_text(report: dict[str, Any]) -> str:
    """Return a report as a table, and how it was made."""
    rows = {k: [format_number(v, 4) for v in report[k]] for k in report if k != "about"}
    table = [["", "value", "2.5 %", "97.5 %"], *([name, *row] for name, row in rows.items())]
    about = [f"{name} {format_number(value, 4)}" for name, value in report["about"].items()]
    law = "L(N, D) = E + A / N^alpha + B / D^beta, for N parameters and D tokens"
    return "\n".join([law, align(table, n_left=1), ", ".join(about)])
