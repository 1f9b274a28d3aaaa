"""Which sample count is best, and how sure that is: a bootstrap over source documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tsugiki.intervals import resampled_ratios


@dataclass(frozen=True)
class Optimum:
    """The reading of a learning curve on one frozen test set.

    Attributes:
        n: sample count with the lowest NLL.
        nll: its NLL, nats/token.
        nll_ci: 95 % interval of it.
        one_se_n: smallest count whose NLL exceeds the lowest by at most one standard error of their paired
            difference.
        p_best: share of bootstrap resamples in which ``n`` is the best count.
        overfits_at: smallest count above ``n`` that is worse than ``n`` with its whole 95 % interval, or none.
        p_best_by_n: the same share for every count.
    """

    n: int
    nll: float
    nll_ci: tuple[float, float]
    one_se_n: int
    p_best: float
    overfits_at: int | None
    p_best_by_n: dict[int, float]


def find_optimum(
    nats: dict[int, np.ndarray],
    tokens: np.ndarray,
    documents: Sequence[str],
    *,
    resamples: int = 4000,
    seed: int = 0,
) -> Optimum:
    """Read a learning curve.

    Args:
        nats: for each sample count, ``(N,)`` summed nats of each test sample (a mean over seeds where there are
            several).
        tokens: ``(N,)`` completion tokens of each test sample.
        documents: ``(N,)`` source document of each test sample.
        resamples: of the bootstrap.
        seed: of the bootstrap.
    """
    counts = sorted(nats)
    matrix = np.stack([nats[n] for n in counts])
    nll = matrix.sum(axis=1) / tokens.sum()
    resampled = resampled_ratios(matrix, tokens, documents, resamples=resamples, seed=seed)  # nats/token
    low, high = np.percentile(resampled, [2.5, 97.5], axis=0)
    best = int(nll.argmin())
    difference = resampled - resampled[:, [best]]
    standard_error = difference.std(axis=0, ddof=1)
    within = np.flatnonzero(nll - nll[best] <= standard_error)
    worse = np.flatnonzero(np.percentile(difference, 2.5, axis=0) > 0)
    wins = np.bincount(resampled.argmin(axis=1), minlength=len(counts)) / resamples
    beyond = [counts[i] for i in worse if i > best]
    return Optimum(
        n=counts[best],
        nll=float(nll[best]),
        nll_ci=(float(low[best]), float(high[best])),
        one_se_n=counts[int(within.min())],
        p_best=float(wins[best]),
        overfits_at=beyond[0] if beyond else None,
        p_best_by_n={n: float(w) for n, w in zip(counts, wins, strict=True)},
    )
