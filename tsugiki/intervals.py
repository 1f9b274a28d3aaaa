"""How sure a mean is whose items come in clusters (questions of one document, templates of one device).

The one bootstrap of the kit: whole clusters are drawn again with replacement, and what is compared is drawn together
(paired), so that a difference of two models has the interval of the difference, not of two models.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

MIN_CLUSTERS = 10  # a bootstrap over fewer is not to be trusted: no interval
WEIGHT_BYTES = 32 << 20  # of the weights drawn at a time


def cluster_weights(number: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each of ``number`` clusters is drawn: float64 ``(r, number)`` a block, ``resamples`` rows in all."""
    rng = np.random.default_rng(seed)
    step = max(1, WEIGHT_BYTES // (8 * number))
    for start in range(0, resamples, step):
        yield rng.multinomial(number, np.full(number, 1 / number), size=min(step, resamples - start)).astype(np.float64)


def resampled_ratios(
    values: np.ndarray, counts: np.ndarray, clusters: Sequence, *, resamples: int, seed: int
) -> np.ndarray:
    """``Σ values / Σ counts`` in every resample of the clusters.

    Args:
        values: float ``(K, N)``, K quantities of N items; all share the same draws.
        counts: ``(N,)``, what a quantity is divided by (tokens, or ones for a mean).
        clusters: ``(N,)``, the cluster of each item.
        resamples, seed: of the bootstrap.

    Returns:
        float64 ``(resamples, K)``.
    """
    group = np.unique(np.asarray(clusters), return_inverse=True)[1]
    number = int(group.max()) + 1
    sums = np.stack([np.bincount(group, row, number) for row in np.asarray(values, np.float64)], axis=1)
    totals = np.bincount(group, np.asarray(counts, np.float64), number)
    return np.concatenate([(w @ sums) / (w @ totals)[:, None] for w in cluster_weights(number, resamples, seed)])


def ratio_intervals(
    values: np.ndarray,
    counts: np.ndarray,
    clusters: Sequence,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> list[tuple[float, float] | None]:
    """Percentile intervals of ``Σ values / Σ counts``: one for each of the K quantities, from the same draws.

    ``None`` for fewer than :data:`MIN_CLUSTERS` clusters. Arguments as in :func:`resampled_ratios`.
    """
    if len(set(np.asarray(clusters).tolist())) < MIN_CLUSTERS:
        return [None] * len(values)
    draws = resampled_ratios(values, counts, clusters, resamples=resamples, seed=seed)
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws, [tail, 1 - tail], axis=0)
    return [(float(a), float(b)) for a, b in zip(low, high, strict=True)]


def widen(
    interval: tuple[float, float] | None, mean: float, number: int, *, span: float = 1.0, confidence: float = 0.95
) -> tuple[float, float] | None:
    """An interval no narrower than what ``number`` equal values can prove.

    A bootstrap of all-equal values is a point. By the exact binomial bound for no event in ``number`` trials (Clopper
    and Pearson 1934), a share up to ``1 − ((1 − confidence) / 2) ** (1 / number)`` may have gone unseen on either side;
    each of them moves the mean by at most ``span``.
    """
    if interval is None:
        return None
    unseen = span * (1 - ((1 - confidence) / 2) ** (1 / number))
    return min(interval[0], mean - unseen), max(interval[1], mean + unseen)


def clustered_stderr(values: Sequence[float], clusters: Sequence) -> float | None:
    """Standard error of a mean whose items come in clusters: that of a ratio of cluster sums to counts.

    ``sqrt(D / (D − 1) · Σ_d (Σ_{i in d} (x_i − mean))²) / N`` over ``D`` clusters and ``N`` items (Cochran, Sampling
    Techniques, §6.3, with equal weights); ``None`` for fewer than two clusters.
    """
    values = np.asarray(values, dtype=np.float64)
    group = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)[1]
    count = int(group.max()) + 1
    if count < 2:
        return None
    residuals = np.bincount(group, values - values.mean(), count)
    return float(np.sqrt(count / (count - 1) * (residuals**2).sum()) / len(values))
