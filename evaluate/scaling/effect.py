"""The shift of a line between two kinds of models, as a multiplier of budget, with family as what is random.

``y = a + b·log10(budget) + c·[continued] + family + error``; the multiplier is ``10^(c/b)``. Three intervals of it: a random
intercept with Fieller's bounds, a wild cluster bootstrap, and a bootstrap over families.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats
from scipy.optimize import minimize_scalar

from tsugiki.errors import UserError
from tsugiki.evaluate.scaling.laws import (
    MIN_FAMILIES,
    Estimate,
    estimate,
    family_weights,
)

MAX_ENUMERATED = 13  # families; 2^13 sign patterns, above that they are drawn
STEP, REACH = 0.025, 2.0  # of the log10 multipliers tested: 1/100 to 100


@dataclass(frozen=True)
class Effect:
    """The offset of continued models under a random intercept for each family.

    Attributes:
        value: c, unit of the score. se: its standard error. low, high: t interval with ``df`` degrees of freedom.
        slope: b, unit per decade. slope_se: its standard error.
        multiplier: 10^(c/b), dimensionless; NaN where the slope is not positive.
        multiplier_low, multiplier_high: Fieller's interval of it (1954), which knows that the slope is uncertain too;
            ``None`` on both sides where the slope is not safely above 0.
        intraclass: share of the residual variance that lies between families, 0–1.
        df: families − 3. method: ``reml`` or ``ml``.
    """

    value: float
    se: float
    low: float
    high: float
    slope: float
    slope_se: float
    multiplier: float
    multiplier_low: float | None
    multiplier_high: float | None
    intraclass: float
    df: int
    method: str


@dataclass(frozen=True)
class WildTest:
    """Wild cluster bootstrap test of an offset, null imposed (Cameron, Gelbach & Miller 2008).

    Attributes:
        value: c by least squares, unit of the score. se: its CR1 cluster-robust standard error.
        p: share of sign patterns with ``|t|`` at least as large as observed; no smaller than 2/patterns when
            enumerated.
        patterns: of signs; ``enumerated`` when they are all of them.
    """

    value: float
    se: float
    p: float
    patterns: int
    enumerated: bool


def random_intercept(
    y: np.ndarray,
    x: np.ndarray,
    continued: np.ndarray,
    families: Sequence[str],
    *,
    method: str = "reml",
    level: float = 0.95,
) -> Effect:
    """Fit ``y = a + b·x + c·continued + u_family + e`` by (restricted) maximum likelihood.

    ``V = σ²(I + r·ZZᵀ)``; β and σ² are profiled out and the likelihood is maximised over ``ln r ∈ [−6, 6]`` (a grid,
    then Brent's method around its best point). REML: ``(n−p)·ln RSS + Σ ln(1 + n_g·r) + ln|XᵀV⁻¹X|`` (Patterson &
    Thompson 1971); ML: ``n·ln RSS + Σ ln(1 + n_g·r)``. t intervals with families − 3 degrees of freedom.

    Args:
        y, x: float ``(n,)``, finite. continued: bool ``(n,)``. families: ``(n,)``.

    Raises:
        UserError: fewer than five families, an unknown method, or budget and construction that cannot be told apart.
    """
    design = np.column_stack([np.ones(len(y)), x, np.asarray(continued, float)])
    _, codes = np.unique(np.asarray(families), return_inverse=True)
    sizes = np.bincount(codes)
    n, p = design.shape
    if method not in ("reml", "ml"):
        raise UserError(f"method {method!r} is neither reml nor ml")
    if len(sizes) < MIN_FAMILIES:
        raise UserError(f"{len(sizes)} families: at least {MIN_FAMILIES} are needed for a random effect of the family")
    if np.linalg.matrix_rank(design - design.mean(0) + [1, 0, 0]) < p:
        raise UserError("budget and construction cannot be told apart: no model differs in one and not in the other")
    # V⁻¹ = I − r/(1 + n_g·r)·11ᵀ in each family, so only sums over families are needed
    full = np.column_stack([design, y])
    sums = np.zeros((len(sizes), p + 1))
    np.add.at(sums, codes, full)
    plain = full.T @ full

    def profile(log_ratio: float) -> tuple[float, np.ndarray, np.ndarray, float]:
        ratio = np.exp(log_ratio)
        m = plain - (sums * (ratio / (1 + sizes * ratio))[:, None]).T @ sums
        beta = np.linalg.solve(m[:p, :p], m[:p, p])
        rss = max(float(m[p, p] - m[:p, p] @ beta), 1e-300)
        penalty = np.log1p(sizes * ratio).sum()
        if method == "ml":
            return n * np.log(rss) + penalty, beta, m[:p, :p], rss
        return (n - p) * np.log(rss) + penalty + np.linalg.slogdet(m[:p, :p])[1], beta, m[:p, :p], rss

    grid = np.linspace(-6, 6, 49)
    best = grid[int(np.argmin([profile(g)[0] for g in grid]))]
    found = minimize_scalar(lambda g: profile(g)[0], bounds=(max(-6, best - 0.25), min(6, best + 0.25)), method="bounded")
    _, beta, cross, rss = profile(found.x)
    covariance = np.linalg.inv(cross) * rss / (n - p if method == "reml" else n)
    df = len(sizes) - p
    se = float(np.sqrt(covariance[2, 2]))
    t = float(stats.t.ppf((1 + level) / 2, df))
    low, high = fieller(beta[2], beta[1], covariance[2, 2], covariance[1, 1], covariance[1, 2], t)
    ratio = float(np.exp(found.x))
    return Effect(
        value=float(beta[2]),
        se=se,
        low=float(beta[2]) - t * se,
        high=float(beta[2]) + t * se,
        slope=float(beta[1]),
        slope_se=float(np.sqrt(covariance[1, 1])),
        multiplier=power_of_ten(beta[2] / beta[1]) if beta[1] > 0 else float("nan"),
        multiplier_low=None if low is None else power_of_ten(low),
        multiplier_high=None if high is None else power_of_ten(high),
        intraclass=0.0 if found.x < -5.9 else ratio / (1 + ratio),
        df=df,
        method=method,
    )


def one_side(low: float | None, high: float | None) -> bool:
    return (low is not None and low > 1) or (high is not None and high < 1)


def power_of_ten(exponent: float) -> float:
    return float(10 ** np.clip(exponent, -300, 300))


def fieller(c: float, b: float, var_c: float, var_b: float, cov: float, t: float) -> tuple[float | None, float | None]:
    """All ratios m with ``(c − m·b)² ≤ t²·(var_c − 2m·cov + m²·var_b)`` for a positive b, as an interval.

    ``(None, None)`` where b is not above 0 by t standard errors: every ratio, or all but some, would then do.
    """
    a = b * b - t * t * var_b
    if b <= 0 or a <= 0:
        return None, None
    half = b * c - t * t * cov
    root = np.sqrt(max(half * half - a * (c * c - t * t * var_c), 0.0))
    return float((half - root) / a), float((half + root) / a)


def sign_patterns(families: int, draws: int, seed: int) -> tuple[np.ndarray, bool]:
    """Rademacher signs ``(B, G)``: all 2^G for up to 13 families, else ``draws`` random ones after all +1."""
    if families <= MAX_ENUMERATED:
        return np.array(list(itertools.product([1.0, -1.0], repeat=families))), True
    rng = np.random.default_rng(seed)
    return np.concatenate([np.ones((1, families)), rng.choice([1.0, -1.0], size=(draws, families))]), False


def wild_test(
    y: np.ndarray,
    x: np.ndarray,
    continued: np.ndarray,
    families: Sequence[str],
    *,
    log_multiplier: float = 0.0,
    draws: int = 9999,
    seed: int = 0,
) -> WildTest:
    """Test that continued models do as well as others with ``10^log_multiplier`` times their budget.

    Under that null ``y = a + b·(x + log_multiplier·continued)``; the offset left over is tested with its CR1 t
    statistic (factor ``G/(G−1)``: Cameron & Miller 2015, section II; it does not touch p), the residuals of the null model multiplied by one random sign for each
    family. At 0 this is the test of "no difference".

    Args:
        y, x: float ``(n,)``, finite. continued: bool ``(n,)``. families: ``(n,)``.
        log_multiplier: log10 of the multiplier under the null.
        draws, seed: of the signs where they are too many to go through.
    """
    c = np.asarray(continued, float)
    names, codes = np.unique(np.asarray(families), return_inverse=True)
    signs, enumerated = sign_patterns(len(names), draws, seed)
    null = np.column_stack([np.ones(len(y)), x + log_multiplier * c])
    fitted = null @ np.linalg.lstsq(null, y, rcond=None)[0]
    replicas = fitted + signs[:, codes] * (y - fitted)  # (B, n)
    value, t, se = _cluster_t(np.column_stack([null, c]), np.vstack([y, replicas]), codes, len(names))
    extreme = np.abs(t[1:]) >= abs(t[0]) * (1 - 1e-9)
    return WildTest(float(value[0]), float(se[0]), float(extreme.mean()), len(signs), enumerated)


def _cluster_t(design: np.ndarray, ys: np.ndarray, codes: np.ndarray, groups: int) -> tuple[np.ndarray, ...]:
    """Last coefficient, its t and its CR1 standard error for each row of ``ys`` ``(B, n)``."""
    pinv = np.linalg.pinv(design)  # (p, n)
    beta = ys @ pinv.T
    residual = ys - beta @ design.T
    member = (codes[:, None] == np.arange(groups)[None, :]).astype(float)
    scores = (residual * pinv[-1]) @ member  # (B, G)
    se = np.sqrt((scores**2).sum(1) * groups / (groups - 1))
    with np.errstate(invalid="ignore", divide="ignore"):
        t = np.where(se > 1e-12 * (1 + np.abs(beta[:, -1])), beta[:, -1] / se, np.sign(beta[:, -1]) * np.inf)
    return beta[:, -1], np.where(np.isnan(t), 0.0, t), se


def multiplier_interval(
    y: np.ndarray,
    x: np.ndarray,
    continued: np.ndarray,
    families: Sequence[str],
    *,
    level: float = 0.95,
    draws: int = 1999,
    seed: int = 0,
) -> tuple[float | None, float | None]:
    """Multipliers around the estimate that the wild cluster test does not reject: their smallest and largest.

    From the least-squares estimate outward in steps of 1/40 decade, until the first rejection or 1/100 and 100; an
    end not rejected there is ``None``, and both are where the slope is not positive. (Far out the null forces a
    negative slope, and residuals so large that the test cannot reject: those multipliers are no candidates.) With
    few families that have continued models the test rejects too rarely (MacKinnon & Webb 2017): the interval is
    rather too wide.
    """
    design = np.column_stack([np.ones(len(y)), x, np.asarray(continued, float)])
    _, b, c = np.linalg.lstsq(design, y, rcond=None)[0]
    if b <= 0:
        return None, None

    def reach(direction: float) -> float | None:
        at = c / b
        while abs(at + direction * STEP) <= REACH:
            at += direction * STEP
            test = wild_test(y, x, continued, families, log_multiplier=at, draws=draws, seed=seed)
            if test.p <= 1 - level:
                return power_of_ten(at)
        return None

    return reach(-1.0), reach(1.0)


def bootstrap_multiplier(
    y: np.ndarray,
    x: np.ndarray,
    continued: np.ndarray,
    families: Sequence[str],
    *,
    draws: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> Estimate:
    """``10^(c/b)`` by least squares, with an interval from families drawn again.

    A resample whose slope is not positive has no multiplier; where over a tenth of them have none, there is no
    interval (:func:`multiplier_interval` still has one, perhaps unbounded). Resamples without both kinds of model
    count among those.
    """
    weights = np.vstack([np.ones((1, len(y))), family_weights(families, draws, seed)])
    design = np.column_stack([np.ones(len(y)), x - x.mean(), np.asarray(continued, float)])
    outer = (design[:, :, None] * design[:, None, :]).reshape(len(y), 9)
    left = (weights @ outer).reshape(-1, 3, 3)
    right = weights @ (design * y[:, None])
    scale = np.trace(left, axis1=1, axis2=2)
    solvable = np.linalg.det(left / scale[:, None, None]) > 1e-9
    beta = np.full((len(weights), 3), np.nan)
    beta[solvable] = np.linalg.solve(left[solvable], right[solvable][:, :, None])[:, :, 0]
    with np.errstate(over="ignore", invalid="ignore"):
        multiplier = np.where(beta[:, 1] > 0, 10 ** (beta[:, 2] / beta[:, 1]), np.nan)
    return estimate(multiplier[0], multiplier[1:], len(set(families)), level, scale="log")


def detectable_multiplier(
    se: float, slope: float, *, power: float = 0.8, level: float = 0.95, df: float = np.inf
) -> float:
    """Smallest multiplier above 1 that a two-sided test finds with this power: ``10^((t_level + t_power)·se/slope)``.

    Args:
        se: standard error of the offset, unit of the score. slope: unit per decade, above 0.
        df: degrees of freedom; infinite gives the usual ``2.8·se``, which a handful of families does not have.

    Returns:
        The multiplier; infinite where the slope is not positive.
    """
    if slope <= 0:
        return float("inf")
    t = stats.norm if np.isinf(df) else stats.t(df)
    return float(10 ** min((t.ppf((1 + level) / 2) + t.ppf(power)) * se / slope, 300))
