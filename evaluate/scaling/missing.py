"""Score matrices with holes: a likelihood of the cells that are there, and many fillings instead of one.

Model: probabilistic PCA, ``x = μ + W·z + ε`` with ``z ~ N(0, I_k)`` and ``ε ~ N(0, σ²I)`` on columns scaled to unit
observed SD (Tipping & Bishop 1999); with holes, the EM of Ilin & Raiko (2010), section 2, whose likelihood counts
observed cells only. Uncertainty of the fit enters the fillings by refitting to rows drawn again (Honaker & King 2010);
estimates from the fillings are pooled by Rubin's rules with Barnard & Rubin's (1999) degrees of freedom.

A filled cell is what the other cells predict, so anything the model leaves out comes out weaker in filled data. How
much is measured here, by digging as many holes again where the truth is known: :func:`attenuation`. Give the log
budget as an extra column (``auxiliary``) when the question is about the budget: an imputation that ignores the other
side of a correlation weakens it (Meng 1994).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from tsugiki.errors import UserError, raise_problems
from tsugiki.evaluate.scaling.laws import MIN_FAMILIES, MIN_POINTS, Refused, family_weights, weighted_lines

FLOOR = 1e-6  # of the noise variance, in units of a column's variance: a perfect fit must not divide by zero


@dataclass(frozen=True, eq=False)
class PPCA:
    """A fitted model of T columns with k components.

    Attributes:
        mean, scale: float ``(T,)``, in the data's unit.
        loadings: float ``(T, k)``, in units of ``scale``. Only ``W Wᵀ`` is determined: W may be rotated.
        noise: variance σ², in units of ``scale²``.
        log_likelihood: nats, sum over observed cells' rows, of the scaled data.
        iterations, converged: of EM.
        rows, cells: rows used and cells observed in them.
    """

    mean: np.ndarray
    scale: np.ndarray
    loadings: np.ndarray
    noise: float
    log_likelihood: float
    iterations: int
    converged: bool
    rows: int
    cells: int


@dataclass(frozen=True)
class Pooled:
    """An estimate from several fillings of the same holes (Rubin's rules).

    Attributes:
        value: mean of the estimates. se: sqrt(within + (1 + 1/m)·between).
        low, high: t interval with ``df`` degrees of freedom.
        missing_information: share of the information that the holes took, between 0 and 1.
        imputations: m.
    """

    value: float
    se: float
    low: float
    high: float
    df: float
    missing_information: float
    imputations: int


@dataclass(frozen=True)
class Attenuation:
    """What filling holes does to a statistic, measured on holes dug where the truth is known.

    Attributes:
        share: of the observed cells hidden in each repeat.
        before: the statistic without the new holes.
        after: mean over the repeats, the holes filled with random draws (as the imputations are).
        after_mean_filled: the same with the holes filled with their expected value.
        ratio: after / before; below 1 the statistic comes out too weak. NaN where before is 0.
        repeats: how often it was done.
    """

    share: float
    before: float
    after: float
    after_mean_filled: float
    ratio: float
    repeats: int


@dataclass(frozen=True)
class MissingLaw:
    """A log-linear law fitted to several fillings.

    Attributes:
        name, unit: of the score.
        slope: unit per decade. pearson: pooled on Fisher's z and turned back.
        attenuation: of Pearson's r; ``None`` without holes.
        missing: share of the score cells that are holes.
        n, n_families: points and families.
        sentence: what the holes may have done, in words.
    """

    name: str
    unit: str
    slope: Pooled
    pearson: Pooled
    attenuation: Attenuation | None
    missing: float
    n: int
    n_families: int
    sentence: str


def fit_ppca(
    values: np.ndarray,
    rank: int = 2,
    *,
    weights: np.ndarray | None = None,
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    tolerance: float = 1e-7,
    max_iterations: int = 2000,
) -> PPCA:
    """Fit probabilistic PCA to the observed cells of a matrix by EM.

    Args:
        values: float ``(M, T)``; NaN is a hole.
        rank: number of components k.
        weights: float ``(M,)``, how often each row counts; by default once.
        rows, columns: names for messages.
        tolerance: EM stops when the log-likelihood grows by less than this, in nats per observed cell.
        max_iterations: of EM; a fit that needs more is returned with ``converged`` False.

    Raises:
        UserError: k is not between 1 and min(M, T) − 1, a row has no cell, or a column has fewer than k + 2 cells
            or a constant one. All such problems are named at once.
    """
    values = np.asarray(values, float)
    m, t = values.shape
    weights = np.ones(m) if weights is None else np.asarray(weights, float)
    seen = np.isfinite(values)
    _check(values, seen, weights, rank, rows, columns)
    w_cell = seen * weights[:, None]
    count = w_cell.sum(0)
    mean = np.where(seen, values, 0.0).T @ weights / count
    scale = np.sqrt((np.where(seen, values - mean, 0.0) ** 2).T @ weights / count)
    z = np.where(seen, (values - mean) / scale, 0.0)
    offset = np.zeros(t)
    _, s, right = np.linalg.svd(np.sqrt(weights)[:, None] * z, full_matrices=False)
    loadings = right[:rank].T * s[:rank] / np.sqrt(weights.sum())
    noise = max(FLOOR, float((s[rank:] ** 2).sum() / weights.sum() / t))
    before, after, done = -np.inf, -np.inf, 0
    converged = False
    for step in range(1, max_iterations + 1):
        latent, spread, after = _expect(z, seen, weights, offset, loadings, noise)
        done = step
        if after - before < tolerance * float(w_cell.sum()) and step > 1:
            converged = True
            break
        before = after
        offset, loadings, noise = _maximise(z, seen, w_cell, latent, spread, loadings)
    return PPCA(
        mean + offset * scale,
        scale,
        loadings,
        noise,
        float(after),
        done,
        converged,
        int((weights > 0).sum()),
        int(seen.sum()),
    )


def _check(values, seen, weights, rank, rows, columns) -> None:
    m, t = values.shape
    problems = []
    if not 1 <= rank < min(m, t):
        problems.append(f"{rank} components of {m} models × {t} tasks: between 1 and {min(m, t) - 1} are possible")
    row = rows if rows is not None else [f"row {i + 1}" for i in range(m)]
    column = columns if columns is not None else [f"column {j + 1}" for j in range(t)]
    problems += [f"{row[i]}: no score at all" for i in np.flatnonzero(~seen.any(1))]
    for j in range(t):
        there = seen[:, j] & (weights > 0)
        if there.sum() < rank + 2:
            problems.append(f"{column[j]}: {there.sum()} scores, at least {rank + 2} are needed for {rank} components")
        elif np.ptp(values[there, j]) == 0:
            problems.append(f"{column[j]}: all {there.sum()} scores are {values[there, j][0]:g}")
    raise_problems(problems, what="a model of the missing scores")


def _expect(z, seen, weights, offset, loadings, noise):
    """Mean ``(M, k)`` and covariance ``(M, k, k)`` of the latent of each row, and the observed log-likelihood."""
    k = loadings.shape[1]
    centred = np.where(seen, z - offset, 0.0)
    outer = (loadings[:, :, None] * loadings[:, None, :]).reshape(len(loadings), k * k)
    inner = (seen.astype(float) @ outer).reshape(-1, k, k) + noise * np.eye(k)  # Wᵀ W over observed columns, + σ²I
    inverse = np.linalg.inv(inner)
    projected = centred @ loadings
    latent = (inverse @ projected[:, :, None])[:, :, 0]
    # |σ²I + W Wᵀ| = σ^(2(d−k))·|WᵀW + σ²I|, and Woodbury for the quadratic form
    d = seen.sum(1)
    logdet = (d - k) * np.log(noise) + np.linalg.slogdet(inner)[1]
    quadratic = ((centred**2).sum(1) - (projected * latent).sum(1)) / noise
    return latent, noise * inverse, float(weights @ (-0.5 * (d * np.log(2 * np.pi) + logdet + quadratic)))


def _maximise(z, seen, w_cell, latent, spread, loadings):
    """New offset, loadings and noise; each column is one regression on the latent and a constant."""
    m, k = latent.shape
    extended = np.concatenate([latent, np.ones((m, 1))], axis=1)
    second = extended[:, :, None] * extended[:, None, :]
    second[:, :k, :k] += spread
    left = (w_cell.T @ second.reshape(m, -1)).reshape(-1, k + 1, k + 1)
    right = (w_cell * z).T @ extended
    solved = np.linalg.solve(left + 1e-12 * np.eye(k + 1), right[:, :, None])[:, :, 0]
    loadings, offset = solved[:, :k], solved[:, k]
    residual = np.where(seen, z - offset - latent @ loadings.T, 0.0)
    doubt = np.einsum("ta,mab,tb->mt", loadings, spread, loadings, optimize=True)
    noise = float((w_cell * (residual**2 + doubt)).sum() / w_cell.sum())
    return offset, loadings, max(FLOOR, noise)


def fill(values: np.ndarray, model: PPCA, rng: np.random.Generator | None = None) -> np.ndarray:
    """The matrix with its holes filled: expected values, or with ``rng`` one random draw of each, noise included.

    Observed cells are returned untouched; a filled one may lie outside the scale (a score below 0), which is right for
    estimating and wrong for printing.
    """
    values = np.asarray(values, float)
    seen = np.isfinite(values)
    z = np.where(seen, (values - model.mean) / model.scale, 0.0)
    latent, spread, _ = _expect(z, seen, np.ones(len(z)), np.zeros(z.shape[1]), model.loadings, model.noise)
    noise = 0.0
    if rng is not None:
        root = np.linalg.cholesky(spread)
        latent = latent + (root @ rng.standard_normal((*latent.shape, 1)))[:, :, 0]
        noise = np.sqrt(model.noise) * rng.standard_normal(z.shape)
    filled = model.mean + model.scale * (latent @ model.loadings.T + noise)
    return np.where(seen, values, filled)


def impute(
    values: np.ndarray,
    *,
    rank: int = 2,
    imputations: int = 20,
    seed: int = 0,
    auxiliary: np.ndarray | None = None,
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
) -> np.ndarray:
    """Fillings of the same matrix: float ``(imputations, M, T)``.

    Each comes from a model refitted to rows drawn again, so that the doubt about the model is among the differences.

    Args:
        values: float ``(M, T)``; NaN is a hole.
        rank, rows, columns: see :func:`fit_ppca`.
        imputations: how many; 20 leave the pooled standard error about 1/20 of the lost information too uncertain.
        seed: of rows and draws.
        auxiliary: float ``(M, A)``, known of the models apart from their scores (log budgets), holes allowed.

    Raises:
        UserError: as :func:`fit_ppca`, or the holes lie so that rows drawn again cannot be fitted.
    """
    values = np.asarray(values, float)
    tasks = values.shape[1]
    if columns is not None and auxiliary is not None:
        columns = [*columns, *(f"auxiliary {i + 1}" for i in range(np.asarray(auxiliary).reshape(len(values), -1).shape[1]))]
    joined = values if auxiliary is None else np.column_stack([values, np.asarray(auxiliary, float)])
    fit_ppca(joined, rank, rows=rows, columns=columns, max_iterations=1)  # complains by name before anything is drawn
    rng = np.random.default_rng(seed)
    return np.stack([fill(joined, _refit(joined, rank, rng), rng)[:, :tasks] for _ in range(imputations)])


def _refit(values: np.ndarray, rank: int, rng: np.random.Generator) -> PPCA:
    m = len(values)
    for _ in range(100):
        weights = np.bincount(rng.integers(0, m, m), minlength=m).astype(float)
        try:
            return fit_ppca(values, rank, weights=weights, tolerance=1e-5, max_iterations=500)
        except UserError:  # a resample without enough cells in some column: the next one
            continue
    raise UserError(
        f"the {int((~np.isfinite(values)).sum())} missing scores lie in too few columns or rows to be modelled",
        hint="leave out the task or model with the most missing scores",
    )


def pool(estimates: np.ndarray, variances: np.ndarray, *, complete_df: float, level: float = 0.95) -> Pooled:
    """Rubin's rules.

    Args:
        estimates, variances: float ``(m,)``: of each filling, the variance as if nothing had been missing.
        complete_df: degrees of freedom had nothing been missing.

    Raises:
        UserError: fewer than two fillings.
    """
    q, u = np.asarray(estimates, float), np.asarray(variances, float)
    m = len(q)
    if m < 2:
        raise UserError(f"{m} imputation: at least 2 are needed to see how far they differ")
    within, between = u.mean(), q.var(ddof=1)
    total = within + (1 + 1 / m) * between
    lost = (1 + 1 / m) * between / total if total > 0 else 0.0
    observed = (complete_df + 1) / (complete_df + 3) * complete_df * (1 - lost)
    df = observed if lost == 0 else 1 / (lost**2 / (m - 1) + 1 / max(observed, 1e-9))
    half = stats.t.ppf((1 + level) / 2, df) * np.sqrt(total)
    ratio = (1 + 1 / m) * between / within if within > 0 else np.inf
    information = 1.0 if np.isinf(ratio) else (ratio + 2 / (df + 3)) / (ratio + 1) if lost > 0 else 0.0
    return Pooled(
        float(q.mean()),
        float(np.sqrt(total)),
        float(q.mean() - half),
        float(q.mean() + half),
        float(df),
        float(information),
        m,
    )


def attenuation(
    values: np.ndarray,
    statistic: Callable[[np.ndarray], float],
    share: float,
    *,
    rank: int = 2,
    repeats: int = 20,
    seed: int = 0,
    auxiliary: np.ndarray | None = None,
) -> Attenuation:
    """Hide a share of the observed cells at random, fill all holes, and see what becomes of a statistic.

    Args:
        values: float ``(M, T)``; NaN is a hole. Those already there are filled in ``before`` too, with expected values.
        statistic: of a full matrix ``(M, T)``; a component's sign must be fixed in it.
        share: of the observed cells to hide, between 0 and 1.
        rank, auxiliary, seed: see :func:`impute`.
        repeats: patterns of holes.

    Raises:
        UserError: the share is not between 0 and 1, or leaves too little to fit.
    """
    if not 0 < share < 1:
        raise UserError(f"share {share:g} of the cells to hide: between 0 and 1")
    values = np.asarray(values, float)
    tasks = values.shape[1]
    extra = np.empty((len(values), 0)) if auxiliary is None else np.asarray(auxiliary, float).reshape(len(values), -1)
    rng = np.random.default_rng(seed)

    def filled(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        joined = np.column_stack([matrix, extra])
        model = fit_ppca(joined, rank, tolerance=1e-5, max_iterations=500)
        return fill(joined, model)[:, :tasks], fill(joined, model, rng)[:, :tasks]

    before = statistic(filled(values)[0] if np.isnan(values).any() else values)
    seen = np.argwhere(np.isfinite(values))
    hide = max(1, round(share * len(seen)))
    drawn, expected = [], []
    for _ in range(100 * repeats):
        holes = seen[rng.choice(len(seen), hide, replace=False)]
        matrix = values.copy()
        matrix[holes[:, 0], holes[:, 1]] = np.nan
        try:
            once, random = filled(matrix)
        except UserError:  # this pattern empties a row or a column
            continue
        expected.append(statistic(once))
        drawn.append(statistic(random))
        if len(drawn) == repeats:
            break
    if len(drawn) < repeats:
        raise UserError(f"with {share:.0%} of {len(seen)} scores hidden nothing can be fitted", hint="hide fewer")
    after = float(np.mean(drawn))
    ratio = after / before if before else float("nan")
    return Attenuation(share, float(before), after, float(np.mean(expected)), float(ratio), repeats)


def fit_missing_law(
    values: np.ndarray,
    score_of: Callable[[np.ndarray], np.ndarray],
    x: np.ndarray,
    families: Sequence[str],
    *,
    name: str,
    unit: str = "points",
    rank: int = 2,
    imputations: int = 20,
    repeats: int = 20,
    draws: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> MissingLaw | Refused:
    """``y = a + b·x`` where the score y is made of a matrix with holes.

    The budgets are an auxiliary column of the imputation; a model without a budget (NaN in x) still informs the model
    of the holes and is left out of the law. Within one filling, variances come from the cluster bootstrap over
    families, times ``G/(G−1)``; complete-data degrees of freedom are families − 2.

    Args:
        values: float ``(M, T)``; NaN is a hole.
        score_of: full matrix ``(M, T)`` → scores ``(M,)`` in ``unit``; fixes its own sign.
        x, families: ``(M,)``, see :func:`tsugiki.evaluate.scaling.laws.fit_law`.
        rank, imputations, seed: see :func:`impute`. repeats: of :func:`attenuation`. draws: of the bootstrap.

    Returns:
        The law, or why there is none: fewer than 4 points or 5 families.

    Raises:
        UserError: as :func:`fit_ppca`.
    """
    values, x = np.asarray(values, float), np.asarray(x, float)
    known = np.isfinite(x)
    kept = [f for f, k in zip(families, known, strict=True) if k]
    n, groups = len(kept), len(set(kept))
    if n < MIN_POINTS or groups < MIN_FAMILIES:
        return Refused(name, f"{n} points of {groups} families: at least {MIN_POINTS} of {MIN_FAMILIES} are needed", n)
    holes = ~np.isfinite(values)
    missing = float(holes.mean())
    budget = x[:, None]
    fillings = (
        impute(values, rank=rank, imputations=imputations, seed=seed, auxiliary=budget)
        if holes.any()
        else np.stack([values, values])
    )
    weights = family_weights(kept, draws, seed)
    slopes, slope_vars, zs, z_vars = [], [], [], []
    for filling in fillings:
        y = np.asarray(score_of(filling), float)[known]
        point = weighted_lines(x[known], y, np.ones((1, n)))
        again = weighted_lines(x[known], y, weights)
        slopes.append(point["slope"][0])
        slope_vars.append(np.nanvar(again["slope"], ddof=1))
        zs.append(np.arctanh(np.clip(point["pearson"][0], -1 + 1e-9, 1 - 1e-9)))
        z_vars.append(np.nanvar(np.arctanh(np.clip(again["pearson"], -1 + 1e-9, 1 - 1e-9)), ddof=1))
    df = max(groups - 2, 1)
    few = groups / (groups - 1)
    slope = pool(np.array(slopes), few * np.array(slope_vars), complete_df=df, level=level)
    z = pool(np.array(zs), few * np.array(z_vars), complete_df=df, level=level)
    pearson = Pooled(
        float(np.tanh(z.value)),
        float(z.se * (1 - np.tanh(z.value) ** 2)),
        float(np.tanh(z.low)),
        float(np.tanh(z.high)),
        z.df,
        z.missing_information,
        z.imputations,
    )
    if not holes.any():
        return MissingLaw(name, unit, slope, pearson, None, 0.0, n, groups, "No score is missing.")

    def correlation(matrix: np.ndarray) -> float:
        return float(np.corrcoef(np.asarray(score_of(matrix), float)[known], x[known])[0, 1])

    lost = attenuation(values, correlation, min(missing, 0.5), rank=rank, repeats=repeats, seed=seed, auxiliary=budget)
    sentence = (
        f"{missing:.0%} of the scores are missing and were filled {imputations} times. Hiding as many again moves r from "
        f"{lost.before:.3f} to {lost.after:.3f} (×{lost.ratio:.2f}): expect the filled r to be off by about as much."
    )
    return MissingLaw(name, unit, slope, pearson, lost, missing, n, groups, sentence)
