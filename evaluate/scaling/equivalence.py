"""What a change of score is worth in compute: the factor of budget that a named law trades it for.

A law ``y = a + b·log10(N·D)`` turns a difference d into a factor of budget ``10^(d/b)``: a quantization level that
costs two points where a decade buys ten has thrown away what ``1 − 10^(−2/10)`` = 37 % of the training bought. Both d
(from a finite set of items) and b (from a finite set of families) are uncertain, so both are drawn again together.
The factor is that of the law's own models: it says what such a difference costs *them*, and another set of models has
another slope (Saito et al.'s culture slope is 10 points per decade of Japanese budget, Takase & Honda's Table 2 gives
30). So a law is always named, and more than one should be asked. Outside the scores the law has seen nothing is said.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tsugiki.errors import UserError, raise_problems
from tsugiki.evaluate.scaling.laws import MIN_VALID, Law, Refused, stretch

MIN_ITEMS = 10  # a bootstrap over fewer is not to be trusted


@dataclass(frozen=True)
class Equivalence:
    """A difference of score as a factor of budget.

    Attributes:
        change: what was changed, for example ``Q4_K_M``.
        law: name of the law's score. axis: the budget that is traded: ``total``, ``en`` or ``ja``.
        unit: of the scores. level: of the intervals.
        before, after: mean scores, unit. difference: after − before; ``difference_low``, ``difference_high`` its
            interval over items (paired).
        slope: of the law, unit per decade.
        factor, low, high: of the budget, dimensionless; 0.64 means that a law-abiding model with 0.64 times the
            budget scores as the changed model does. Interval over items and families together.
        n_items, n_clusters: of the evaluation. n_models, n_families: of the law.
        draws: resamples with a positive slope, of those drawn.
        sentence: all this for a reader. notes: the law's, and what else weakens it.
    """

    change: str
    law: str
    axis: str
    unit: str
    level: float
    before: float
    after: float
    difference: float
    difference_low: float
    difference_high: float
    slope: float
    factor: float
    low: float
    high: float
    n_items: int
    n_clusters: int
    n_models: int
    n_families: int
    draws: int
    sentence: str
    notes: tuple[str, ...]


def paired_draws(
    before: np.ndarray, after: np.ndarray, clusters: Sequence | None, draws: int, seed: int
) -> tuple[np.ndarray, int]:
    """Mean difference (after − before) of items drawn again, both answers to an item together.

    Args:
        before, after: float ``(n,)``, scores of the same items.
        clusters: ``(n,)``, what items come from (a document, a device); drawn whole. By default each its own.

    Returns:
        float ``(draws,)`` in the items' unit, and the number of clusters.
    """
    difference = np.asarray(after, float) - np.asarray(before, float)
    _, codes = np.unique(np.arange(len(difference)) if clusters is None else np.asarray(clusters), return_inverse=True)
    sums = np.bincount(codes, weights=difference)
    sizes = np.bincount(codes).astype(float)
    groups = len(sums)
    rng = np.random.default_rng(seed)
    result = np.empty(draws)
    step = max(1, 2_000_000 // groups)  # 16 MB of indices at a time
    for start in range(0, draws, step):
        index = rng.integers(0, groups, size=(min(step, draws - start), groups))
        result[start : start + step] = sums[index].sum(1) / sizes[index].sum(1)
    return result, groups


def budget_factor(
    difference: float, difference_draws: np.ndarray, law: Law, *, level: float = 0.95
) -> tuple[float, float, float, int] | Refused:
    """``10^(d/b)`` with its joint percentile interval.

    The slopes' draws are spread, on a log scale, by :func:`tsugiki.evaluate.scaling.laws.stretch` for the few families
    they come from; the items' are not. So whether 1 is inside is up to the items alone.

    Args:
        difference: d, unit of the law. difference_draws: resampled d, float ``(R,)``; paired with the law's first R
            slope draws, which are independent of them.
        law: with a bootstrap of its slope.

    Returns:
        ``factor, low, high, draws used``; or why there is none: the law has no interval, its slope is not above 0,
        or over a tenth of its resamples have no positive slope (the factor would then have no upper end).
    """
    slopes = law.slope_draws
    if law.slope.low is None or not len(slopes):
        return Refused(law.name, f"the law has {law.n_families} families: too few to say how sure its slope is", law.n)
    if law.slope.value <= 0:
        return Refused(
            law.name,
            f"the law's slope is {law.slope.value:.3g} {law.unit} per decade: more budget does not mean more score here",
            law.n,
        )
    count = min(len(slopes), len(difference_draws))
    b, d = slopes[:count], np.asarray(difference_draws, float)[:count]
    usable = np.isfinite(b) & (b > 0)
    if usable.mean() < MIN_VALID:
        return Refused(
            law.name,
            f"the law's slope is not safely above 0: it is in {usable.mean():.0%} of the resamples of families, and "
            f"{MIN_VALID:.0%} are wanted",
            law.n,
        )
    spread = (b[usable] / law.slope.value) ** stretch(law.n_families, level)
    exponents = np.clip(d[usable] / (law.slope.value * spread), -300, 300)
    low, high = np.quantile(exponents, [(1 - level) / 2, (1 + level) / 2])
    factor = np.clip(difference / law.slope.value, -300, 300)
    return float(10**factor), float(10**low), float(10**high), int(usable.sum())


def equivalent_budget(
    before: np.ndarray,
    after: np.ndarray,
    law: Law,
    *,
    change: str,
    unit: str,
    clusters: Sequence | None = None,
    seed: int = 1,
    level: float = 0.95,
) -> Equivalence | Refused:
    """What a change (a quantization level, an adaptation) gained or cost, as a factor of the law's budget.

    Args:
        before, after: float ``(n,)``: scores of the same items, in the same order, without and with the change, in
            the law's unit (0 or 100 for a right answer counted in points).
        law: fitted with the same task and metric; only its unit can be checked here.
        change, unit: named in the result; the unit must be the law's.
        clusters: ``(n,)``, see :func:`paired_draws`.
        seed: of the items; must differ from the law's own or the two bootstraps would share random numbers.
        level: of the intervals.

    Returns:
        The factor, or why there is none: fewer than 10 items or clusters, a score outside those of the law's models,
        a slope that is not safely positive.

    Raises:
        UserError: different numbers of items, unknown scores, or another unit than the law's.
    """
    before, after = np.asarray(before, float), np.asarray(after, float)
    problems = []
    if unit != law.unit:
        problems.append(f"the scores are in {unit}, the law {law.name} in {law.unit}")
    if before.shape != after.shape or before.ndim != 1:
        problems.append(f"{before.size} scores before and {after.size} after: the same items are needed")
    elif not (np.isfinite(before) & np.isfinite(after)).all():
        problems.append(f"{int((~(np.isfinite(before) & np.isfinite(after))).sum())} of {len(before)} items lack a score")
    if clusters is not None and len(clusters) != before.size:
        problems.append(f"{len(clusters)} clusters for {before.size} items")
    raise_problems(problems, what=f"{change} by the law of {law.name}")
    count = len(before) if clusters is None else len(set(clusters))
    if count < MIN_ITEMS:
        return Refused(change, f"{count} independent items: at least {MIN_ITEMS} are needed", count)
    outside = _outside(float(before.mean()), float(after.mean()), law)
    if outside:
        return Refused(change, outside, len(before))
    draws, groups = paired_draws(before, after, clusters, max(len(law.slope_draws), 1000), seed)
    return _equivalence(
        float(before.mean()), float(after.mean()), draws, law, change=change, items=len(before), groups=groups, level=level
    )


def equivalent_means(
    tasks: Sequence[tuple[np.ndarray, np.ndarray, Sequence]], law: Law, *, change: str, unit: str, seed: int = 1, level: float = 0.95
) -> Equivalence | Refused:
    """:func:`equivalent_budget` for a score that is the mean of several tasks, each with items of its own.

    Args:
        tasks: for each task ``before`` and ``after``, float ``(n,)`` scores of the same items in the law's unit, and the
            cluster of each item. Tasks are drawn independently of one another.

    Raises:
        UserError: no task, or as :func:`equivalent_budget`.
    """
    if len(tasks) == 1:
        before, after, clusters = tasks[0]
        return equivalent_budget(before, after, law, change=change, unit=unit, clusters=clusters, seed=seed, level=level)
    if not tasks or unit != law.unit:
        raise UserError(f"{change}: {len(tasks)} tasks in {unit}, the law {law.name} is in {law.unit}")
    smallest = min(len(set(clusters)) for _, _, clusters in tasks)
    if smallest < MIN_ITEMS:
        return Refused(change, f"{smallest} independent items in one of the tasks: at least {MIN_ITEMS} are needed", smallest)
    was, now = (float(np.mean([np.mean(task[i]) for task in tasks])) for i in (0, 1))
    outside = _outside(was, now, law)
    if outside:
        return Refused(change, outside, smallest)
    number = max(len(law.slope_draws), 1000)
    drawn = [paired_draws(a, b, c, number, seed + i) for i, (a, b, c) in enumerate(tasks)]
    return _equivalence(
        was, now, np.mean([d for d, _ in drawn], axis=0), law, change=change, items=sum(len(a) for a, _, _ in tasks),
        groups=sum(g for _, g in drawn), level=level,
    )  # fmt: skip


def equivalent_difference(
    before: float, difference: float, se: float, law: Law, *, change: str, n_items: int, seed: int = 1, level: float = 0.95
) -> Equivalence | Refused:
    """:func:`equivalent_budget` from a published difference and its standard error: ``d ~ N(difference, se²)``.

    Args:
        before: mean score without the change, unit of the law. difference: after − before. se: of the difference.
        n_items: of the evaluation, for the record.

    Raises:
        UserError: a standard error that is negative or not a number.
    """
    if not (np.isfinite([before, difference, se]).all() and se >= 0):
        raise UserError(f"{change}: a difference of {difference:g} with a standard error of {se:g}")
    outside = _outside(before, before + difference, law)
    if outside:
        return Refused(change, outside, n_items)
    draws = difference + se * np.random.default_rng(seed).standard_normal(max(len(law.slope_draws), 1000))
    return _equivalence(
        before, before + difference, draws, law, change=change, items=n_items, groups=n_items, level=level
    )


def equivalent_budgets(
    before: np.ndarray,
    after: np.ndarray,
    laws: Sequence[Law | Refused],
    *,
    change: str,
    unit: str,
    clusters: Sequence | None = None,
    seed: int = 1,
    level: float = 0.95,
) -> list[Equivalence | Refused]:
    """:func:`equivalent_budget` by several laws of the same score; one law alone hides how much they differ."""
    return [
        law
        if isinstance(law, Refused)
        else equivalent_budget(before, after, law, change=change, unit=unit, clusters=clusters, seed=seed, level=level)
        for law in laws
    ]


def _outside(before: float, after: float, law: Law) -> str | None:
    low, high = float(law.y.min()), float(law.y.max())
    wrong = [f"{v:.2f} {when}" for v, when in ((before, "before"), (after, "after")) if not low <= v <= high]
    if not wrong:
        return None
    return (
        f"the score is {' and '.join(wrong)} the change, the law of {law.name} has seen {low:.2f} to {high:.2f} {law.unit}: "
        "no extrapolation"
    )


def _equivalence(before, after, draws, law, *, change, items, groups, level) -> Equivalence | Refused:
    found = budget_factor(after - before, draws, law, level=level)
    if isinstance(found, Refused):
        return Refused(change, found.reason, items)
    factor, low, high, used = found
    d_low, d_high = (float(v) for v in np.quantile(draws, [(1 - level) / 2, (1 + level) / 2]))
    notes = list(law.notes)
    reach = [before + d_low, before + d_high]
    if min(reach) < law.y.min() or max(reach) > law.y.max():
        notes.append(
            f"part of the score's interval ({reach[0]:.2f} to {reach[1]:.2f}) lies outside what the law has seen "
            f"({law.y.min():.2f} to {law.y.max():.2f})"
        )
    language = {"total": "training", "en": "English", "ja": "Japanese"}[law.axis]
    sure = "a loss" if factor < 1 else "a gain"
    meaning = "which does not exclude no change at all" if low <= 1 <= high else sure
    sentence = (
        f"{change}: {after - before:+.2f} {law.unit} ({d_low:+.2f} to {d_high:+.2f}) is worth ×{factor:.2f} "
        f"({low:.2f} to {high:.2f}) the {language} budget by the law of {law.name} on {law.n} models of "
        f"{law.n_families} families, {meaning}."
    )
    return Equivalence(
        change=change,
        law=law.name,
        axis=law.axis,
        unit=law.unit,
        level=level,
        before=before,
        after=after,
        difference=after - before,
        difference_low=d_low,
        difference_high=d_high,
        slope=law.slope.value,
        factor=factor,
        low=low,
        high=high,
        n_items=items,
        n_clusters=groups,
        n_models=law.n,
        n_families=law.n_families,
        draws=used,
        sentence=sentence,
        notes=tuple(notes),
    )
