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


def paired_interval(
    differences: np.ndarray, clusters: Sequence, *, span: float = 1.0, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float] | None:
    """Interval of a mean difference of scores on the same items; ``None`` for fewer than :data:`MIN_CLUSTERS` clusters.

    The bootstrap over clusters, expanded (:func:`expanded`); where items of few clusters differ, or all differences are
    whole (right or wrong), no narrower than :func:`exact_difference`: resampling four flips cannot show a fifth.

    Args:
        differences: float ``(N,)``, each between −span and span.
        clusters: ``(N,)``.
    """
    differences = np.asarray(differences, np.float64) / span
    group = np.unique(np.asarray(clusters), return_inverse=True)[1]
    number, items = int(group.max()) + 1, len(differences)
    wide = expanded(confidence, number)
    interval = ratio_intervals(differences[None], np.ones(items), group, confidence=wide, resamples=resamples, seed=seed)[0]
    if interval is None:
        return None
    if len(np.unique(group[differences != 0])) < MIN_CLUSTERS:
        effective = float(number)  # how alike the answers of one cluster change cannot be told: they count as one
    elif np.isin(differences, (-1, 0, 1)).all():
        residual = differences - differences.mean()
        design = (np.bincount(group, residual) ** 2).sum() / max((residual**2).sum(), np.finfo(float).tiny)
        effective = items / min(max(design, 1.0), items / number)
    else:
        return span * interval[0], span * interval[1]
    lost, won = (float(np.maximum(sign * differences, 0).mean()) for sign in (-1, 1))
    low, high = exact_difference(lost, won, effective, confidence)
    return span * min(interval[0], low), span * max(interval[1], high)


def expanded(confidence: float, number: int) -> float:
    """The confidence to ask of a percentile bootstrap over ``number`` clusters to get ``confidence``.

    A bootstrap knows neither the ``n − 1`` of a variance nor Student's t. Hesterberg's expanded percentile interval (The
    American Statistician 69, 2015, §5.3) has tails of ``Φ(−√(n / (n − 1)) · t)`` with t's quantile at ``n − 1`` degrees
    of freedom.
    """
    from scipy.stats import norm, t

    if number < 2:
        return confidence
    return float(1 - 2 * norm.cdf(np.sqrt(number / (number - 1)) * t.ppf((1 - confidence) / 2, number - 1)))


def exact_difference(lost: float, won: float, number: float, confidence: float) -> tuple[float, float]:
    """Interval of ``won − lost``, two shares of ``number`` paired items, without a normal approximation.

    Each share has its interval by Clopper and Pearson (Biometrika 26, 1934), and the two are joined by squares (MOVER:
    Zou and Donner, Statistics in Medicine 27, 2008). Without a flip it is ``±(1 − ((1 − confidence) / 2) ** (1 / number))``.
    """
    from scipy.stats import beta

    tail = (1 - confidence) / 2

    def limits(share: float) -> tuple[float, float]:
        k = share * number
        low = beta.ppf(tail, k, number - k + 1) if k > 0 else 0.0
        high = beta.ppf(1 - tail, k + 1, number - k) if k < number else 1.0
        return float(low), float(high)

    (lost_low, lost_high), (won_low, won_high) = limits(lost), limits(won)
    middle = won - lost
    return (
        float(middle - np.hypot(won - won_low, lost_high - lost)),
        float(middle + np.hypot(won_high - won, lost - lost_low)),
    )


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
