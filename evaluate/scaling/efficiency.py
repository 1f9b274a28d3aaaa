"""Is continued pre-training a more efficient way to a score than training from scratch on as many tokens?

Model: ``y = a + b·log10(N·D) + c·[continued] + family + error``. A continued model does as well as one from scratch
with ``10^(c/b)`` times its budget: the *efficiency multiplier*. Takase & Honda (section 3, figure 2) read "not
particularly efficient" from a scatter plot; neither their data nor Saito et al.'s can say so. Models of one family
share a base, so the number of independent observations is nearer the number of families than of models; and the
Japanese tokens inside an English base are a guess that moves the answer. So three designs are set side by side, each
with its interval, the smallest multiplier they could have seen, and the answer for each assumed share. What they do
not decide is called inconclusive; nothing here is causal: continued models differ from the others in more than their
tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tsugiki.errors import raise_problems
from tsugiki.evaluate.scaling.budgets import assumed_base_share, budgets
from tsugiki.evaluate.scaling.effect import (
    Effect,
    WildTest,
    bootstrap_multiplier,
    detectable_multiplier,
    multiplier_interval,
    one_side,
    random_intercept,
    wild_test,
)
from tsugiki.evaluate.scaling.laws import (
    FEW_POINTS,
    MIN_FAMILIES,
    MIN_VALID,
    Estimate,
    Refused,
    estimate,
    family_weights,
    weighted_lines,
)
from tsugiki.evaluate.scaling.tables import ModelFacts, find_model

VERDICTS = ("more efficient", "less efficient", "equivalent", "inconclusive")


@dataclass(frozen=True)
class Pairs:
    """Continued models against their own bases.

    Attributes:
        slope: unit per decade, ``Σ(Δx·Δy)/Σ(Δx²)`` through the origin; interval by drawing *base models* again.
        scratch_slope, scratch_se: least-squares slope of the models from scratch alone, unit per decade.
        gain: mean Δy, unit. decades: mean Δx.
        n, n_bases: pairs and different bases. scratch_n: models from scratch.
        pairs: (base, continued) names.
    """

    slope: Estimate
    scratch_slope: float | None
    scratch_se: float | None
    gain: float
    decades: float
    n: int
    n_bases: int
    scratch_n: int
    pairs: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class SharePoint:
    """The answer under one assumed share of the language in the base's pre-training.

    Attributes:
        share: assumed, 0–1. effect: the random-effects fit, with the multiplier and its Fieller interval.
        low, high: interval of the multiplier by inverted wild cluster tests; ``None`` is unbounded on that side.
        p: of the wild cluster test of no difference.
        pearson: correlation of score and log budget.
        verdict: one of :data:`VERDICTS`, for this share alone.
    """

    share: float
    effect: Effect
    low: float | None
    high: float | None
    p: float
    pearson: float
    verdict: str

    @property
    def excludes_one(self) -> tuple[bool, bool]:
        """Whether the random-effects interval, and the wild tests' interval, lie on one side of a multiplier of 1."""
        return (
            one_side(self.effect.multiplier_low, self.effect.multiplier_high),
            one_side(self.low, self.high),
        )


@dataclass(frozen=True)
class Efficiency:
    """All there is to say about the efficiency of continued pre-training for one score.

    Attributes:
        name, axis, unit: of the score and the budget.
        n, n_continued, n_families: points.
        effect: random intercept by family. wild: wild cluster bootstrap.
        multiplier: 10^(c/b), dimensionless, interval by the cluster bootstrap; above 1 a continued model
            does as well as one from scratch with more budget than it had.
        wild_low, wild_high: interval of the multiplier by inverting the wild cluster test; ``None`` is unbounded.
        detectable: smallest multiplier (above 1) found with 80 % probability given the standard error and df.
        pairs: base/continued pairs; ``None`` without any.
        margin: multipliers within [1/margin, margin] count as equivalent; said before looking.
        verdict: one of :data:`VERDICTS`, at the budgets given.
        sensitivity: the answer along the assumed share; empty when not asked for.
        depends: along ``sensitivity`` the sign changes, or the verdict, or whether either method alone would exclude 1.
        sentence: all this for a reader.
        notes: what weakens it.
    """

    name: str
    axis: str
    unit: str
    n: int
    n_continued: int
    n_families: int
    effect: Effect
    wild: WildTest
    multiplier: Estimate
    wild_low: float | None
    wild_high: float | None
    detectable: float
    pairs: Pairs | None
    margin: float
    verdict: str
    sensitivity: tuple[SharePoint, ...]
    depends: bool
    sentence: str
    notes: tuple[str, ...]


def find_pairs(models: Sequence[str], facts: Mapping[str, ModelFacts]) -> list[tuple[int, int]]:
    """Positions (base, continued) in ``models`` of all continued models whose source model is there too."""
    at = {find_model(name, facts).name: i for i, name in enumerate(models) if find_model(name, facts)}
    pairs = []
    for i, name in enumerate(models):
        own = find_model(name, facts)
        base = find_model(own.source_model, facts) if own and own.construction == "CPT" else None
        if base and base.name in at:
            pairs.append((at[base.name], i))
    return pairs


def compare_pairs(
    y: np.ndarray,
    x: np.ndarray,
    pairs: Sequence[tuple[int, int]],
    continued: np.ndarray,
    models: Sequence[str],
    *,
    draws: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> Pairs | None:
    """What a decade of added budget gives within base/continued pairs, against models from scratch.

    Within a pair everything the family has in common cancels. Pairs with an unknown score or budget are left out;
    bases are the clusters (several models continue one base), and fewer than five give no interval.

    Args:
        y, x: float ``(M,)``, NaN unknown. pairs: (base, continued) positions. continued: bool ``(M,)``.

    Returns:
        ``None`` where no pair is known or no budget grew.
    """
    y, x, continued = np.asarray(y, float), np.asarray(x, float), np.asarray(continued, bool)
    known = [(a, b) for a, b in pairs if np.isfinite([y[a], y[b], x[a], x[b]]).all()]
    if not known:
        return None
    base, child = np.array([a for a, _ in known]), np.array([b for _, b in known])
    dx, dy = x[child] - x[base], y[child] - y[base]
    if not (dx @ dx) > 0:
        return None
    value = float(dx @ dy / (dx @ dx))
    bases = [str(b) for b in base]
    weights = family_weights(bases, draws, seed)
    with np.errstate(invalid="ignore"):
        slopes = (weights @ (dx * dy)) / (weights @ (dx * dx))
    slope = estimate(value, slopes, len(set(bases)), level)
    scratch = np.isfinite(x) & np.isfinite(y) & ~continued
    line, se = None, None
    if scratch.sum() >= 4:
        xs, ys = x[scratch], y[scratch]
        line = float(weighted_lines(xs, ys, np.ones((1, len(xs))))["slope"][0])
        centred = xs - xs.mean()
        rest = ys - ys.mean() - line * centred
        se = float(np.sqrt(rest @ rest / (len(xs) - 2) / (centred @ centred)))
    return Pairs(
        slope=slope,
        scratch_slope=line,
        scratch_se=se,
        gain=float(dy.mean()),
        decades=float(dx.mean()),
        n=len(known),
        n_bases=len(set(bases)),
        scratch_n=int(scratch.sum()),
        pairs=tuple((models[a], models[b]) for a, b in known),
    )


def judge(low: float | None, high: float | None, effect: Effect, margin: float) -> str:
    """A verdict only where two methods agree: Fieller's interval of the random-effects fit and the wild tests'.

    ``more``/``less efficient``: both exclude a multiplier of 1 on the same side. ``equivalent``: both lie within
    [1/margin, margin]. Anything else, an unbounded interval included, is ``inconclusive``.
    """
    lows, highs = (low, effect.multiplier_low), (high, effect.multiplier_high)
    if all(v is not None and v > 1 for v in lows):
        return "more efficient"
    if all(v is not None and v < 1 for v in highs):
        return "less efficient"
    if all(v is not None and v >= 1 / margin for v in lows) and all(v is not None and v <= margin for v in highs):
        return "equivalent"
    return "inconclusive"


def share_curve(
    y: np.ndarray,
    budgets_at: Callable[[float], np.ndarray],
    continued: np.ndarray,
    families: Sequence[str],
    shares: Sequence[float],
    *,
    margin: float = 2.0,
    level: float = 0.95,
) -> tuple[SharePoint, ...]:
    """The answer for each assumed share of the language in the bases' pre-training.

    Args:
        y: float ``(M,)``, NaN unknown.
        budgets_at: share (0–1) → ``log10(N·D)``, float ``(M,)``, NaN unknown.
        continued, families: ``(M,)``.
    """
    y, continued, families = np.asarray(y, float), np.asarray(continued, bool), np.asarray(families)
    points = []
    for share in shares:
        x = np.asarray(budgets_at(share), float)
        known = np.isfinite(x) & np.isfinite(y)
        sub = (y[known], x[known], continued[known], families[known])
        effect = random_intercept(*sub, level=level)
        low, high = multiplier_interval(*sub, level=level)
        points.append(
            SharePoint(
                share=float(share),
                effect=effect,
                low=low,
                high=high,
                p=wild_test(*sub).p,
                pearson=float(np.corrcoef(*sub[:2])[0, 1]),
                verdict=judge(low, high, effect, margin),
            )
        )
    return tuple(points)


def budgets_at_share(
    models: Sequence[str], facts: Mapping[str, ModelFacts], bases: Sequence[str] = ("Llama 2", "Llama 3")
) -> Callable[[float], np.ndarray]:
    """``log10(N·D_ja)`` of the models as a function of the assumed Japanese share of these families' pre-training."""

    def at(share: float) -> np.ndarray:
        with np.errstate(divide="ignore"):
            x = np.log10(budgets(models, facts, "ja", assumed_base_share(share, bases)))
        return np.where(np.isfinite(x), x, np.nan)  # no token of a language has no logarithm

    return at


def continued_efficiency(
    y: np.ndarray,
    x: np.ndarray,
    continued: np.ndarray,
    families: Sequence[str],
    models: Sequence[str],
    *,
    name: str,
    axis: str = "ja",
    unit: str = "points",
    pairs: Sequence[tuple[int, int]] = (),
    budgets_at: Callable[[float], np.ndarray] | None = None,
    shares: Sequence[float] = (0.0005, 0.001, 0.005, 0.01, 0.018),
    margin: float = 2.0,
    draws: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> Efficiency | Refused:
    """Every design side by side, and a verdict only where they give one.

    Args:
        y: float ``(M,)``, scores in ``unit``; NaN unknown.
        x: float ``(M,)``, ``log10(N·D)``; NaN unknown.
        continued: bool ``(M,)``. families, models: ``(M,)``.
        name, axis, unit: of the score and the budget.
        pairs: (base, continued) positions: :func:`find_pairs`.
        budgets_at: budgets for an assumed share (:func:`budgets_at_share`); ``None`` for no sensitivity curve.
        shares: assumed, 0–1. margin: of equivalence, a factor above 1.
        draws, seed, level: of the bootstraps.

    Returns:
        The answer, or why there is none: fewer than 8 points, fewer than 3 of either kind, fewer than 5 families.

    Raises:
        UserError: lengths differ, or the margin is not above 1.
    """
    problems = [
        f"{len(v)} {what} for {len(y)} scores"
        for what, v in (("budgets", x), ("constructions", continued), ("families", families), ("models", models))
        if len(v) != len(y)
    ]
    if not margin > 1:
        problems.append(f"equivalence within a factor of {margin:g}: the factor must be above 1")
    raise_problems(problems, what=f"efficiency of continued pre-training ({name})")
    y, x, continued = np.asarray(y, float), np.asarray(x, float), np.asarray(continued, bool)
    known = np.isfinite(x) & np.isfinite(y)
    sub = (y[known], x[known], continued[known], np.asarray(families)[known])
    n, made = int(known.sum()), int(continued[known].sum())
    groups = len(set(sub[3]))
    if n < FEW_POINTS or min(made, n - made) < 3 or groups < MIN_FAMILIES:
        return Refused(
            name,
            f"{n} models ({made} continued) of {groups} families: at least {FEW_POINTS}, 3 of either kind and "
            f"{MIN_FAMILIES} families are needed",
            n,
        )
    effect = random_intercept(*sub, level=level)
    wild = wild_test(*sub, seed=seed)
    low, high = multiplier_interval(*sub, level=level, seed=seed)
    curve = (
        share_curve(y, budgets_at, continued, families, shares, margin=margin, level=level)
        if budgets_at is not None
        else ()
    )
    verdict = judge(low, high, effect, margin)
    answer = Efficiency(
        name=name,
        axis=axis,
        unit=unit,
        n=n,
        n_continued=made,
        n_families=groups,
        effect=effect,
        wild=wild,
        multiplier=bootstrap_multiplier(*sub, draws=draws, seed=seed, level=level),
        wild_low=low,
        wild_high=high,
        detectable=detectable_multiplier(effect.se, effect.slope, level=level, df=effect.df),
        pairs=compare_pairs(y, x, pairs, continued, models, draws=draws, seed=seed, level=level),
        margin=margin,
        verdict=verdict,
        sensitivity=curve,
        depends=len({(p.verdict, np.sign(p.effect.value), *p.excludes_one) for p in curve}) > 1,
        sentence="",
        notes=(),
    )
    return replace(answer, sentence=_sentence(answer), notes=_notes(answer, sub[2], sub[3]))


def _sentence(e: Efficiency) -> str:
    head = (
        f"{e.name}: a continued model does as well as one from scratch with ×{e.effect.multiplier:.2f} its budget "
        f"({_range(e.effect.multiplier_low, e.effect.multiplier_high)} by a random effect of the family, "
        f"{_range(e.wild_low, e.wild_high)} by wild cluster tests)"
    )
    said = {
        "more efficient": "continuing is the more efficient way at the budgets given",
        "less efficient": "continuing is the less efficient way at the budgets given",
        "equivalent": f"the two are equivalent within a factor of {e.margin:g} at the budgets given",
        "inconclusive": f"the data do not decide it: only a factor of {e.detectable:.1f} or more would have been found",
    }[e.verdict]
    tail = ""
    if e.depends:
        first, last = e.sensitivity[0], e.sensitivity[-1]
        tail = f"; and the answer hangs on an assumption: {_at(first)}, {_at(last)}"
    return f"{head}; {said}{tail}."


def _at(p: SharePoint) -> str:
    alone = [m for m, out in zip(("a random effect", "wild cluster tests"), p.excludes_one, strict=True) if out]
    verdict = p.verdict
    if verdict == "inconclusive" and alone:
        verdict += f", though {alone[0]} alone would reject ×1"
    return f"×{p.effect.multiplier:.2f} ({verdict}) if {p.share:.2%} of the bases' tokens are of the language"


def _range(low: float | None, high: float | None) -> str:
    if low is None and high is None:
        return "no bounds"
    return f"{'below 0.01' if low is None else f'{low:.2f}'} to {'above 100' if high is None else f'{high:.2f}'}"


def _notes(e: Efficiency, continued: np.ndarray, families: np.ndarray) -> tuple[str, ...]:
    both = [f for f in sorted(set(families)) if 0 < continued[families == f].mean() < 1]
    notes = [f"{len(both)} of {e.n_families} families have models of both kinds ({', '.join(both) or 'none'})"]
    if e.multiplier.low is None:
        notes.append(f"over {1 - MIN_VALID:.0%} of the resamples have no positive slope or only one kind of model")
    if e.pairs and e.pairs.slope.low is None:
        notes.append(f"{e.pairs.n} pairs on {e.pairs.n_bases} bases: too few bases for an interval")
    notes.append("an association: continued models also differ from the others in their bases, data and time")
    return tuple(notes)
