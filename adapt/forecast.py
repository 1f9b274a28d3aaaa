"""Should more samples be collected? The learning curve as a power law with an offset, and what twice the data brings.

``NLL(n) = c + a · n^(−b)``: ``c`` is what no amount of such data removes, ``b`` how fast the rest falls (the form of
Hestness et al. 2017, arXiv:1712.00409, and of the data term of Hoffmann et al. 2022, arXiv:2203.15556).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tsugiki.intervals import resampled_ratios

MIN_COUNTS = 4  # three parameters need a fourth count to be wrong about
EXPONENTS = np.geomspace(0.02, 3.0, 160)  # published learning curves have exponents of 0.05 to 0.5; small data are steeper
# Of two counts most exponents are possible. Log-normal around 0.5, a factor e wide: 0.07 to 3.6 in 95 of 100 cases.
PRIOR = np.exp(-0.5 * np.log(EXPONENTS / 0.5) ** 2)
WORTH = 0.02  # a gain in NLL, relative, below which nobody collects twice the data


@dataclass(frozen=True)
class Forecast:
    """A learning curve drawn further.

    Attributes:
        a, b, c: of ``c + a · n^(−b)``, nats/token.
        at: the sample count that is forecast: twice the largest.
        nll: the law's NLL there, nats/token.
        nll_ci: 95 % interval: the bootstrap over test documents, each with its own fit, widened on both sides by the
            relative error of ``backcast``. What another seed or another sample of training data would have changed is in
            it only as far as ``backcast`` shows it.
        backcast: the law fitted without the largest count and asked for it: ``{"n", "predicted", "measured"}``.
        gain: ``1 − nll / lowest measured NLL``; ``gain_ci`` likewise.
        answer: ``yes`` (the whole interval of the gain lies above 2 %), ``no`` (all below) or ``unclear``.
    """

    a: float
    b: float
    c: float
    at: int
    nll: float
    nll_ci: tuple[float, float]
    backcast: dict[str, float]
    gain: float
    gain_ci: tuple[float, float]
    answer: str


def fit_power_law(counts: Sequence[int], nll: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Least squares of the relative errors of ``c + a · n^(−b)`` with ``a, c ≥ 0``, for many curves at once.

    For each exponent of a grid ``a`` and ``c`` are a weighted linear fit in closed form; the best exponent wins.

    Args:
        counts: ``(P,)`` sample counts.
        nll: float64 ``(R, P)``, nats/token, above 0.

    Returns:
        ``a, b, c``, float64 ``(R,)`` each.
    """
    a, c, error = _laws(counts, np.atleast_2d(np.asarray(nll, np.float64)))
    best, rows = error.argmin(1), np.arange(len(a))
    return a[rows, best], EXPONENTS[best], c[rows, best]


def _laws(counts: Sequence[int], nll: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each curve ``(R, P)`` and each exponent the best ``a`` and ``c``, and the sum of squared relative errors: ``(R, B)``."""
    power = np.asarray(counts, np.float64) ** -EXPONENTS[:, None]  # (B, P)
    weight = 1 / nll**2  # (R, P)
    total = weight.sum(1)[:, None]
    x, y = weight @ power.T, (weight * nll).sum(1)[:, None]
    xx, xy = weight @ (power**2).T, (weight * nll) @ power.T
    spread = total * xx - x**2
    a = np.where(spread > 1e-12 * total * xx, (total * xy - x * y) / np.where(spread > 0, spread, 1), 0)
    c = (y - a * x) / total
    a = np.where(c < 0, xy / xx, a)  # the offset at its bound: a line through the origin
    c = np.maximum(c, 0)
    flat = a <= 0
    a, c = np.where(flat, 0, a), np.where(flat, y / total, c)
    return a, c, (((c[..., None] + a[..., None] * power - nll[:, None]) / nll[:, None]) ** 2).sum(-1)


def chance_below(counts: Sequence[int], nll: np.ndarray, at: int, level: np.ndarray, *, noise: float, seed: int = 0) -> float:
    """How probable it is that the learning curve lies below ``level`` at a count that was not measured.

    Every exponent counts by its prior and by how well its law goes through the measured counts. Two counts leave most
    exponents possible, among them those of a curve that has gone flat in between: that doubt is in the answer.

    Args:
        counts: ``(P,)`` measured sample counts, two or more.
        nll: ``(R, P)``, nats/token: resamples of the test documents.
        at: the count in question.
        level: ``(R,)``, nats/token, in the same resamples.
        noise: standard deviation of a fit's NLL from seed to seed, relative, above 0.
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    a, c, error = _laws(counts, nll * np.exp(noise * rng.standard_normal(nll.shape)))
    weight = PRIOR * np.exp(-(error - error.min(1, keepdims=True)) / (2 * noise**2))
    below = c + a * float(at) ** -EXPONENTS < level[:, None]
    return float(((weight * below).sum(1) / weight.sum(1)).mean())


def forecast(
    nats: dict[int, np.ndarray], tokens: np.ndarray, documents: Sequence[str], *, resamples: int = 1000, seed: int = 0
) -> Forecast | None:
    """Fit the learning curve and say what twice the largest count would bring.

    Args:
        nats: for each sample count, ``(N,)`` summed nats of each test sample (a mean over seeds).
        tokens: ``(N,)`` completion tokens of each test sample.
        documents: ``(N,)`` source document of each.
        resamples, seed: of the bootstrap.

    Returns:
        ``None`` for fewer than four counts.
    """
    counts = sorted(nats)
    if len(counts) < MIN_COUNTS:
        return None
    matrix = np.stack([nats[n] for n in counts])
    curve = matrix.sum(1) / np.sum(tokens)
    drawn = resampled_ratios(matrix, tokens, documents, resamples=resamples, seed=seed)
    at = 2 * counts[-1]

    def ahead(curves: np.ndarray, known: Sequence[int], n: int) -> np.ndarray:
        a, b, c = fit_power_law(known, curves)
        return c + a * float(n) ** -b

    a, b, c = (float(v[0]) for v in fit_power_law(counts, curve))
    back = float(ahead(curve[None, :-1], counts[:-1], counts[-1])[0])
    miss = abs(back / curve[-1] - 1)
    expected, nll = ahead(drawn, counts, at), c + a * float(at) ** -b
    low, high = np.percentile(expected, [2.5, 97.5])
    gain_low, gain_high = np.percentile(1 - expected / drawn.min(1), [2.5, 97.5])
    gain_ci = (float(gain_low - miss * (1 - gain_low)), float(gain_high + miss * (1 - gain_high)))
    return Forecast(
        a=a, b=b, c=c, at=at, nll=nll, nll_ci=(float(low * (1 - miss)), float(high * (1 + miss))),
        backcast={"n": counts[-1], "predicted": back, "measured": float(curve[-1])},
        gain=float(1 - nll / curve.min()), gain_ci=gain_ci,
        answer="yes" if gain_ci[0] > WORTH else "no" if gain_ci[1] < WORTH else "unclear",
    )
