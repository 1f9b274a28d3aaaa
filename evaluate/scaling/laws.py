"""Log-linear laws of a score against the logarithm of the compute spent on a language.

``y = a + b·log10(N·D_l)``: Takase & Honda, section 3 and figure 2 (score against model size × tokens of Japanese, or
of all languages); Saito et al., section 4.4 (principal components against the same budgets, ``N`` active parameters).
Neither paper gives an interval. Models of one family share their base's data, so they are not independent: every
coefficient here carries an interval from drawing *families* again with replacement, and every law says how well it
predicts a family it has not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from tsugiki.errors import UserError, raise_problems

MIN_POINTS = 4  # a line through three points has one degree of freedom: nothing to say about its error
FEW_POINTS = 8
MIN_FAMILIES = 5  # four families have but 35 different resamples, and a t of three degrees of freedom
FEW_FAMILIES = 10
MIN_VALID = 0.9  # share of resamples that must have an answer for their percentiles to be an interval
AXES = ("total", "en", "ja")
LINEAR = ("slope", "intercept")


@dataclass(frozen=True)
class Estimate:
    """A number with its interval.

    Attributes:
        value: the point estimate, in the unit its field names.
        low, high: ends of the two-sided interval (:func:`estimate`); ``None`` where there are too few families.
        draws: resamples that gave an answer.
    """

    value: float
    low: float | None = None
    high: float | None = None
    draws: int = 0


@dataclass(frozen=True)
class Refused:
    """No answer, and why. ``n`` is the number of points there were."""

    name: str
    reason: str
    n: int


@dataclass(frozen=True, eq=False)
class Law:
    """A fitted law ``y = a + b·x`` with ``x = log10(N·D)``.

    Attributes:
        name: of the score (a task, a mean of tasks, a factor).
        axis: whose tokens ``D`` counts: ``total``, ``en`` or ``ja``.
        unit: of the score, for example ``points`` (0–100) or ``SD``.
        n, n_families: points and families.
        slope: unit per decade of budget. intercept: unit, at a budget of one parameter × token.
        slope_se: ordinary least-squares standard error of the slope (unit per decade), families ignored.
        pearson, spearman, kendall: correlations of y and x; Kendall's is tau-b.
        residual_sd: sqrt(SSE / (n − 2)), unit. rmse: sqrt(SSE / n), unit.
        family_rmse: root mean squared error, unit, of each family predicted from all others; ``None`` where some
            family cannot be left out (fewer than three different budgets stay).
        without: slope without each family (unit per decade; NaN where too little stays).
        level: of all intervals.
        notes: what a reader must know before using it: few points, few families, one family deciding the slope.
        models, families, x, y: the points, ``(n,)`` each, in the order given.
        slope_draws: slopes of the resamples, unit per decade, float ``(draws,)``, NaN where a resample has no line;
            empty where there are too few families.
    """

    name: str
    axis: str
    unit: str
    n: int
    n_families: int
    slope: Estimate
    intercept: Estimate
    slope_se: float
    pearson: Estimate
    spearman: Estimate
    kendall: Estimate
    residual_sd: float
    rmse: float
    family_rmse: float | None
    without: Mapping[str, float]
    level: float
    notes: tuple[str, ...]
    models: tuple[str, ...]
    families: tuple[str, ...]
    x: np.ndarray
    y: np.ndarray
    slope_draws: np.ndarray


@dataclass(frozen=True)
class Prediction:
    """A score expected at a budget.

    Attributes:
        value, low, high: unit of the law; a prediction interval for one new model of a family not in the law.
        extrapolated: the budget lies outside those of the law's points.
    """

    value: float
    low: float
    high: float
    level: float
    extrapolated: bool


def family_weights(families: Sequence[str], draws: int, seed: int) -> np.ndarray:
    """How often each point occurs when its family is drawn with replacement: float ``(draws, n)``.

    As many families are drawn as there are; all points of a family come together (cluster bootstrap: Cameron &
    Miller 2015, section VI).
    """
    names, codes = np.unique(np.asarray(families), return_inverse=True)
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=draws)
    return counts[:, codes].astype(float)


def weighted_lines(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Least-squares line and three correlations of the same points under many weightings at once.

    Args:
        x: float ``(n,)``, finite.
        y: float ``(n,)``, or ``(R, n)`` where the scores themselves differ between resamples.
        weights: float ``(R, n)``: how often each point counts in each of R resamples.

    Returns:
        ``slope, intercept, pearson, spearman, kendall``: float ``(R,)``; NaN where a resample has fewer than three
        different budgets (a line through two is no estimate) or a constant score. Spearman's is Pearson's of the
        midranks within the resample, Kendall's is tau-b; both equal those of the points written out as often as they
        weigh.
    """
    x0, y0 = x.mean(), y.mean()
    dx, dy = x - x0, y - y0
    # NaN of a resample without points or spread stays NaN
    with np.errstate(invalid="ignore", divide="ignore"):
        mass = weights.sum(1)
        mx, my = weights @ dx / mass, (weights * dy).sum(1) / mass
        sxx = weights @ (dx * dx) / mass - mx * mx
        sxy = (weights * dy) @ dx / mass - mx * my
        syy = (weights * dy * dy).sum(1) / mass - my * my
        different = ((weights @ (x[:, None] == np.unique(x)[None, :])) > 0).sum(1)
        bad = (different < 3) | ~(syy > 1e-12 * max(float((dy * dy).mean()), 1e-300))
        slope = sxy / sxx
        rank_x, rank_y = _midranks(x, weights, mass), _midranks(y, weights, mass)
        wx = weights * rank_x
        result = {
            "slope": slope,
            "intercept": y0 + my - slope * (x0 + mx),
            "pearson": sxy / np.sqrt(sxx * syy),
            "spearman": (wx * rank_y).sum(1) / np.sqrt((wx * rank_x).sum(1) * (weights * rank_y**2).sum(1)),
            "kendall": _pairs(weights, _signs(x) * _signs(y))
            / np.sqrt(_pairs(weights, np.abs(_signs(x))) * _pairs(weights, np.abs(_signs(y)))),
        }
    return {name: np.where(bad, np.nan, values) for name, values in result.items()}


def _midranks(v: np.ndarray, weights: np.ndarray, mass: np.ndarray) -> np.ndarray:
    """Centred midranks ``(R, n)`` of the values within each resample."""
    below = 0.5 - 0.5 * _signs(v)  # [i, j]: 1 where j < i, ½ at ties; summed over j with weights
    ranks = weights @ (1 - below) if v.ndim == 1 else (below @ weights[:, :, None])[:, :, 0]
    return ranks - (weights * ranks).sum(1, keepdims=True) / mass[:, None]


def _signs(v: np.ndarray) -> np.ndarray:
    return np.sign(v[..., None, :] - v[..., :, None])


def _pairs(weights: np.ndarray, table: np.ndarray) -> np.ndarray:
    """``Σ_ij w_i·w_j·t_ij`` of each resample."""
    if table.ndim == 2:
        return ((weights @ table) * weights).sum(1)
    return ((table @ weights[:, :, None])[:, :, 0] * weights).sum(1)


def stretch(groups: int, level: float = 0.95) -> float:
    """How much wider than a normal interval one from so few groups must be: ``t(G−1)/z · sqrt(G/(G−1))``."""
    tail = (1 + level) / 2
    return float(stats.t.ppf(tail, groups - 1) / stats.norm.ppf(tail) * np.sqrt(groups / (groups - 1)))


def estimate(
    value: float, resampled: np.ndarray, groups: int, level: float = 0.95, *, scale: str = "linear"
) -> Estimate:
    """A value with the percentile interval of its resamples, stretched about it for the few groups drawn.

    Plain percentiles of a bootstrap over G groups are too narrow, as a variance over G instead of G − 1 and a normal
    instead of a t are (Hesterberg 2015, section 5.3, who goes further out in the percentiles instead; with seven
    unequal families those are degenerate resamples). On simulated laws with seven families of 1 to 11 models, plain
    95 % intervals held the true slope in 88–92 % of cases, stretched ones in 95–96 %.

    Args:
        value: the point estimate. resampled: ``(R,)``, NaN where a resample gave no answer.
        groups: that were drawn. level: of the interval.
        scale: on which it is stretched: ``linear``, ``fisher`` (correlations) or ``log`` (factors).

    Returns:
        Without an interval where over a tenth of the resamples gave no answer, or there are fewer than five groups.
    """
    answered = resampled[~np.isnan(resampled)]
    if groups < MIN_FAMILIES or not len(answered) or len(answered) < MIN_VALID * len(resampled):
        return Estimate(float(value), draws=len(answered))
    there, back = {
        "linear": (lambda v: v, lambda v: v),
        "fisher": (lambda v: np.arctanh(np.clip(v, -1 + 1e-9, 1 - 1e-9)), np.tanh),
        "log": (lambda v: np.log(np.maximum(v, 1e-300)), lambda v: np.exp(np.clip(v, -690, 690))),
    }[scale]
    ends = there(np.quantile(answered, [(1 - level) / 2, (1 + level) / 2]))
    centre = there(value)
    low, high = back(centre + stretch(groups, level) * (ends - centre))
    return Estimate(float(value), float(low), float(high), len(answered))


def _problems(axis: str, count: int, **columns: Sequence) -> list[str]:
    problems = [f"{len(v)} {what} for {count} scores" for what, v in columns.items() if len(v) != count]
    if axis not in AXES:
        problems.append(f"axis {axis!r} is none of {', '.join(AXES)}")
    return problems


def fit_law(
    y: np.ndarray,
    x: np.ndarray,
    families: Sequence[str],
    *,
    name: str,
    axis: str,
    unit: str = "points",
    models: Sequence[str] | None = None,
    draws: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> Law | Refused:
    """Fit ``y = a + b·x`` by least squares, with cluster-bootstrap intervals over families.

    A point whose score or budget is unknown (NaN) is left out of this law only: nothing is imputed. A law of a factor
    takes the factor scores as given; for a component with its own error see :func:`fit_component_law`.

    Args:
        y: float ``(M,)``, the scores in ``unit``; NaN is unknown.
        x: float ``(M,)``, ``log10(N·D)``; NaN is unknown.
        families: ``(M,)``, the base family of each model.
        name, axis, unit: see :class:`Law`.
        models: ``(M,)`` names; by default their positions.
        draws, seed, level: of the bootstrap.

    Returns:
        The law, or why there is none: fewer than 4 points, fewer than three different budgets, a constant score.

    Raises:
        UserError: lengths differ, or an unknown axis.
    """
    y, x = np.asarray(y, float), np.asarray(x, float)
    models = [str(i) for i in range(len(y))] if models is None else list(models)
    problems = _problems(axis, len(y), budgets=x, families=families, models=models)
    raise_problems(problems, what=f"law of {name}")
    keep = np.isfinite(y) & np.isfinite(x)
    y, x = y[keep], x[keep]
    models = [m for m, k in zip(models, keep, strict=True) if k]
    families = [f for f, k in zip(families, keep, strict=True) if k]

    def resample() -> dict[str, np.ndarray]:
        return weighted_lines(x, y, family_weights(families, draws, seed))

    return _law(y, x, families, models, resample, name=name, axis=axis, unit=unit, level=level)


def _law(
    y: np.ndarray,
    x: np.ndarray,
    families: list[str],
    models: list[str],
    resample: Callable[[], dict[str, np.ndarray]],
    *,
    name: str,
    axis: str,
    unit: str,
    level: float,
) -> Law | Refused:
    """The law of points that are all known; ``resample`` gives the statistics of the resamples, ``(draws,)`` each."""
    n = len(y)
    if n < MIN_POINTS:
        return Refused(name, f"{n} models have both a score and a budget ({axis}): a law needs at least {MIN_POINTS}", n)
    if len(np.unique(x)) < 3:
        return Refused(name, f"the {n} models have only {len(np.unique(x))} different budgets ({axis})", n)
    if np.ptp(y) <= 1e-12 * max(1.0, float(np.abs(y).max())):
        return Refused(name, f"all {n} models have the same score, {y[0]:g}", n)
    point = {k: float(v[0]) for k, v in weighted_lines(x, y, np.ones((1, n))).items()}
    residual = y - point["intercept"] - point["slope"] * x
    sse = float(residual @ residual)
    residual_sd = float(np.sqrt(sse / (n - 2)))
    names, codes = np.unique(np.asarray(families), return_inverse=True)
    without, errors = _leave_families_out(x, y, codes, len(names))
    interval, slopes = {k: Estimate(v) for k, v in point.items()}, np.empty(0)
    if len(names) >= MIN_FAMILIES:
        resampled = resample()
        interval = {
            k: estimate(point[k], resampled[k], len(names), level, scale="linear" if k in LINEAR else "fisher")
            for k in point
        }
        slopes = resampled["slope"]
    return Law(
        name=name,
        axis=axis,
        unit=unit,
        n=n,
        n_families=len(names),
        slope=interval["slope"],
        intercept=interval["intercept"],
        slope_se=residual_sd / float(np.sqrt(((x - x.mean()) ** 2).sum())),
        pearson=interval["pearson"],
        spearman=interval["spearman"],
        kendall=interval["kendall"],
        residual_sd=residual_sd,
        rmse=float(np.sqrt(sse / n)),
        family_rmse=None if np.isnan(errors).any() else float(np.sqrt(np.mean(errors**2))),
        without={str(f): float(s) for f, s in zip(names, without, strict=True)},
        level=level,
        notes=_notes(n, names, codes, point["slope"], without, interval["slope"]),
        models=tuple(models),
        families=tuple(str(f) for f in families),
        x=x,
        y=y,
        slope_draws=slopes,
    )


def fit_component_law(
    values: np.ndarray,
    loading: np.ndarray,
    x: np.ndarray,
    families: Sequence[str],
    *,
    name: str,
    axis: str,
    models: Sequence[str] | None = None,
    draws: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> Law | Refused:
    """The law of a principal component's scores, its intervals with the error of the component itself.

    In every resample of families the components are computed anew from the resample's own means, spreads and
    correlations, the one most like ``loading`` is taken (largest absolute cosine) with its sign, and its scores are
    regressed. Models without a budget take part in the components and not in the line. Fixed scores
    (:func:`fit_law`) give intervals that are too narrow where a component is not sure of itself.

    Args:
        values: float ``(M, T)``, complete.
        loading: float ``(T,)``, the component's loadings in the full sample, unit length, sign fixed.
        x, families, name, axis, models, draws, seed, level: see :func:`fit_law`; the unit is the component's score
            (standard deviations of the tasks, weighted by the loadings).

    Raises:
        UserError: cells are missing (see :mod:`tsugiki.evaluate.scaling.missing`), a column is constant, or lengths
            differ.
    """
    values, loading, x = np.asarray(values, float), np.asarray(loading, float), np.asarray(x, float)
    m, t = values.shape
    models = [str(i) for i in range(m)] if models is None else list(models)
    problems = _problems(axis, m, budgets=x, families=families, models=models)
    if len(loading) != t:
        problems.append(f"{len(loading)} loadings for {t} tasks")
    if not np.isfinite(values).all():
        problems.append(f"{int((~np.isfinite(values)).sum())} of {values.size} scores are missing")
    elif (np.ptp(values, axis=0) == 0).any():
        problems.append(f"{int((np.ptp(values, axis=0) == 0).sum())} of {t} tasks have the same score for all models")
    raise_problems(problems, what=f"law of {name}")
    known = np.isfinite(x)
    z = (values - values.mean(0)) / values.std(0)
    kept = [f for f, k in zip(families, known, strict=True) if k]

    def resample() -> dict[str, np.ndarray]:
        weights = family_weights(families, draws, seed)
        parts = []
        for start in range(0, draws, 500):  # 500 × 35 × 35 float64 at a time
            w = weights[start : start + 500]
            parts.append(weighted_lines(x[known], _component_scores(z, w, loading)[:, known], w[:, known]))
        return {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}

    return _law(
        (z @ loading)[known],
        x[known],
        kept,
        [model for model, k in zip(models, known, strict=True) if k],
        resample,
        name=name,
        axis=axis,
        unit="SD",
        level=level,
    )


def _component_scores(z: np.ndarray, weights: np.ndarray, loading: np.ndarray) -> np.ndarray:
    """Scores ``(R, M)`` of the component most like ``loading``, computed anew under each weighting."""
    t = z.shape[1]
    mass = weights.sum(1)
    mean = weights @ z / mass[:, None]
    outer = (z[:, :, None] * z[:, None, :]).reshape(len(z), t * t)
    covariance = (weights @ outer / mass[:, None]).reshape(-1, t, t) - mean[:, :, None] * mean[:, None, :]
    # a task that is constant in a resample has no correlation: it gets a loading of about 0
    sd = np.sqrt(np.maximum(np.diagonal(covariance, axis1=1, axis2=2), 1e-12))
    _, vectors = np.linalg.eigh(covariance / (sd[:, :, None] * sd[:, None, :]))
    leading = vectors[:, :, -min(6, t) :]  # a component found below the sixth is not the same one
    cosine = np.einsum("rtk,t->rk", leading, loading)
    best = np.abs(cosine).argmax(1)
    rows = np.arange(len(best))
    chosen = leading[rows, :, best] * np.where(cosine[rows, best] < 0, -1.0, 1.0)[:, None]
    scaled = chosen / sd
    return scaled @ z.T - (scaled * mean).sum(1, keepdims=True)


def fit_laws(
    values: np.ndarray,
    names: Sequence[str],
    x: np.ndarray,
    families: Sequence[str],
    *,
    axis: str,
    unit: str = "points",
    models: Sequence[str] | None = None,
    draws: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> list[Law | Refused]:
    """:func:`fit_law` of every column of ``values`` (float ``(M, T)``, NaN missing) against the same budgets."""
    values = np.asarray(values, float)
    if values.ndim != 2 or values.shape[1] != len(names):
        raise UserError(f"{len(names)} names for a score matrix of shape {values.shape}")
    return [
        fit_law(
            values[:, t],
            x,
            families,
            name=name,
            axis=axis,
            unit=unit,
            models=models,
            draws=draws,
            seed=seed,
            level=level,
        )
        for t, name in enumerate(names)
    ]


def _leave_families_out(x: np.ndarray, y: np.ndarray, codes: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Slope without each family ``(G,)``, and each point's error ``(n,)`` when its family was left out."""
    weights = (codes[None, :] != np.arange(count)[:, None]).astype(float)
    lines = weighted_lines(x, y, weights) if count > 1 else {k: np.full(1, np.nan) for k in ("slope", "intercept")}
    errors = y - (lines["intercept"][codes] + lines["slope"][codes] * x)
    return lines["slope"], errors


def _notes(n, names, codes, slope, without, interval: Estimate) -> tuple[str, ...]:
    notes = []
    if n < FEW_POINTS:
        notes.append(f"only {n} points: read it as a sketch, not a law (at least {FEW_POINTS} are wanted)")
    if len(names) < MIN_FAMILIES:
        notes.append(f"only {len(names)} families: no interval that allows for what they have in common")
    elif interval.low is None:
        notes.append("over a tenth of the resamples have no line: no interval")
    elif len(names) < FEW_FAMILIES:
        notes.append(f"only {len(names)} families: the intervals are approximate")
    biggest = np.bincount(codes).argmax()
    share = np.bincount(codes).max() / n
    if share > 0.4 and len(names) > 1:
        notes.append(f"{names[biggest]} gives {share:.0%} of the points")
    turned = [str(f) for f, s in zip(names, without, strict=True) if s * slope < 0]
    if turned:
        notes.append(f"the slope changes its sign without {', '.join(turned)}")
    return tuple(notes)


def predict(law: Law, log_budget: float, level: float = 0.95) -> Prediction:
    """Score expected of one more model, of a family of its own, at a budget ``log10(N·D)``.

    ``ŷ ± t(n−2)·s·sqrt(1 + 1/n + (x − x̄)²/Sxx)``, with s the larger of the residual SD and the leave-one-family-out
    RMSE: the ordinary formula knows only models of families it has seen. Where no family could be left out, the
    residual SD alone is used, and the law's notes say that there are few families. The band is not cut at the ends of
    the score's scale.
    """
    s = max(law.residual_sd, law.family_rmse or 0.0)
    centre = law.x.mean()
    reach = np.sqrt(1 + 1 / law.n + (log_budget - centre) ** 2 / ((law.x - centre) ** 2).sum())
    half = float(stats.t.ppf((1 + level) / 2, law.n - 2) * s * reach)
    value = law.intercept.value + law.slope.value * log_budget
    outside = not law.x.min() <= log_budget <= law.x.max()
    return Prediction(value, value - half, value + half, level, bool(outside))

