"""Correlations, principal components and maximum-likelihood factors of a score matrix.

Conventions are those that reproduce Saito et al. to every printed digit: columns standardised with ddof 0,
components from the singular value decomposition, signs fixed against their Figure 8. Nothing is imputed here;
a missing cell is an error for components and factors, and is left out pairwise for correlations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment, minimize
from scipy.stats import rankdata

from tsugiki.errors import UserError, raise_problems
from tsugiki.evaluate.scaling.tables import DATA, ModelFacts, Scores, find_model, read_table

STABLE = 0.95  # congruence from which components count as equal (Lorenzo-Seva & ten Berge, 2006)
LOWEST_UNIQUENESS = 0.005


@dataclass(frozen=True)
class Correlations:
    """Task × task correlations.

    Args:
        tasks: T names.
        values: float64 ``(T, T)``; NaN where fewer than three models have both scores, or one does not vary.
        counts: int ``(T, T)``, models with both scores.
        method: "pearson" or "spearman".
    """

    tasks: list[str]
    values: np.ndarray
    counts: np.ndarray
    method: str

    def of(self, a: str, b: str) -> float:
        """The correlation of two tasks by name."""
        return float(self.values[self.tasks.index(a), self.tasks.index(b)])


@dataclass(frozen=True)
class Components:
    """Principal components of standardised scores.

    Args:
        models, tasks: M and T names.
        loadings: float64 ``(K, T)``, rows of unit length.
        scores: float64 ``(M, K)``, standardised values times loadings.
        variance: float64 ``(K,)``, share of the total variance (0–1).
        mean, sd: float64 ``(T,)``, of the models it was fitted on (ddof 0).
        eigenvalues: float64 ``(min(M, T),)`` of the correlation matrix, descending.
    """

    models: list[str]
    tasks: list[str]
    loadings: np.ndarray
    scores: np.ndarray
    variance: np.ndarray
    mean: np.ndarray
    sd: np.ndarray
    eigenvalues: np.ndarray

    def project(self, values: np.ndarray) -> np.ndarray:
        """Component scores ``(…, K)`` of other models' scores ``(…, T)``, on this fit's means and spreads."""
        return (np.asarray(values, dtype=np.float64) - self.mean) / self.sd @ self.loadings.T


@dataclass(frozen=True)
class Stability:
    """What leaving one model out does to the components.

    Args:
        congruence: float64 ``(M, K)``, |cosine| of each refit's component with the full fit's.
        lowest: float64 ``(K,)``, the minimum over models.
        worst: K names, the model whose absence gives that minimum.
        spread: float64 ``(K, T)``, standard deviation (ddof 0) of each loading over the M refits, signs aligned.
    """

    congruence: np.ndarray
    lowest: np.ndarray
    worst: list[str]
    spread: np.ndarray


@dataclass(frozen=True)
class Factors:
    """Maximum-likelihood factors with varimax and promax rotations.

    Args:
        tasks: T names.
        loadings: float64 ``(K, T)``, unrotated.
        varimax: float64 ``(K, T)``, orthogonal rotation.
        pattern: float64 ``(K, T)``, promax pattern.
        correlations: float64 ``(K, K)``, between promax factors.
        uniquenesses: float64 ``(T,)``.
        contribution: float64 ``(K,)``, sum of squared pattern loadings over T.
        objective: the minimised discrepancy −Σ_{j>K}(ln e_j − e_j) − K + T.
        starts: optimisations tried; reached: how many of them ended at the objective.
        heywood: tasks whose uniqueness stands at its lower bound (an improper solution).
        warnings: sentences to print before a factor is named.
    """

    tasks: list[str]
    loadings: np.ndarray
    varimax: np.ndarray
    pattern: np.ndarray
    correlations: np.ndarray
    uniquenesses: np.ndarray
    contribution: np.ndarray
    objective: float
    starts: int
    reached: int
    heywood: list[str]
    warnings: list[str]


def correlate(x: np.ndarray, y: np.ndarray, method: str = "pearson") -> tuple[float, int]:
    """Correlation of two vectors over the pairs where neither is NaN, and the number of pairs.

    NaN when there are fewer than three pairs or one side does not vary.
    """
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    both = ~(np.isnan(x) | np.isnan(y))
    x, y, n = x[both], y[both], int(both.sum())
    if method == "spearman":
        x, y = rankdata(x), rankdata(y)
    elif method != "pearson":
        raise UserError(f"no correlation {method!r}", hint="Choose pearson or spearman.")
    if n < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan"), n
    x, y = x - x.mean(), y - y.mean()
    return float(np.clip(x @ y / np.sqrt((x @ x) * (y @ y)), -1, 1)), n


def correlations(scores: Scores, method: str = "pearson") -> Correlations:
    """Correlations of all pairs of tasks, each over the models that have both scores.

    Raises :class:`UserError` naming the columns that do not vary.
    """
    raise_problems(_constant(scores), what="No correlation with a constant column", hint=_DROP)
    size = len(scores.tasks)
    values, counts = np.eye(size), np.zeros((size, size), dtype=int)
    for i in range(size):
        counts[i, i] = np.count_nonzero(~np.isnan(scores.values[:, i]))
        for j in range(i):
            values[i, j], counts[i, j] = correlate(scores.values[:, i], scores.values[:, j], method)
            values[j, i], counts[j, i] = values[i, j], counts[i, j]
    return Correlations(list(scores.tasks), values, counts, method)


_DROP = "Leave the column out, or add models that differ in it."


def _constant(scores: Scores) -> list[str]:
    problems = []
    for task, column in zip(scores.tasks, scores.values.T, strict=True):
        seen = column[~np.isnan(column)]
        if not len(seen):
            problems.append(f"column {task!r} has no score")
        elif np.ptp(seen) == 0:
            problems.append(f"column {task!r} is {seen[0]:g} for all {len(seen)} models that have it")
    return problems


def _complete(scores: Scores, wanted: int, what: str) -> None:
    problems = [
        f"{scores.models[i]}: no score in {scores.tasks[j]!r}" for i, j in np.argwhere(np.isnan(scores.values))
    ]
    raise_problems(
        problems,
        what=f"{what} need every cell",
        hint="Leave those models or tasks out, or estimate with missing cells (which attenuates correlations).",
    )
    if len(scores.models) < 3:
        raise UserError(f"{what} need at least 3 models; there are {len(scores.models)}")
    raise_problems(_constant(scores), what=f"{what} need columns that vary", hint=_DROP)
    models, tasks = scores.values.shape
    if not 1 <= wanted <= min(models - 1, tasks):
        raise UserError(
            f"{wanted} {what.lower()} from {models} models and {tasks} tasks; at most {min(models - 1, tasks)}",
            hint="Ask for fewer, or add models.",
        )


def printed_loadings(name: str = "saito_loadings_n20") -> tuple[list[str], np.ndarray, np.ndarray]:
    """Tasks, loadings ``(4, 19)`` and shares in percent ``(4,)`` as paper B prints them.

    ``name``: "saito_loadings_n20" (Figure 8) or "saito_promax" (Figure 10).
    """
    header, rows = read_table(DATA / f"{name}.csv")
    values = np.array([[float(row[c]) for c in header[1:]] for _, row in rows])
    return header[2:], values[:, 1:], values[:, 0]


def _fix_signs(loadings: np.ndarray, tasks: Sequence[str]) -> np.ndarray:
    """+1 or −1 for each of the K components: along Figure 8 where tasks are shared, else largest loading positive."""
    names, printed, _ = printed_loadings()
    shared = [t for t in tasks if t in names]
    largest = loadings[np.arange(len(loadings)), np.abs(loadings).argmax(axis=1)]
    signs = np.where(largest < 0, -1.0, 1.0)
    if len(shared) >= 3:
        known = min(len(loadings), len(printed))
        mine = loadings[:known][:, [list(tasks).index(t) for t in shared]]
        dots = (mine * printed[:known][:, [names.index(t) for t in shared]]).sum(axis=1)
        signs[:known] = np.where(dots < 0, -1.0, 1.0)
    return signs


def _standardise(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    mean, sd = values.mean(axis=0), values.std(axis=0)
    return (values - mean) / sd, mean, sd


def principal_components(scores: Scores, components: int = 4) -> Components:
    """Principal components of the standardised scores (ddof 0), on their own means and spreads.

    Signs: along the same component of paper B's Figure 8 where at least three tasks are shared, else the
    largest loading is positive. Raises :class:`UserError` for missing cells, constant columns, too few models.
    """
    _complete(scores, components, "Components")
    z, mean, sd = _standardise(scores.values)
    _, s, loadings = np.linalg.svd(z, full_matrices=False)
    loadings = loadings[:components]
    loadings = loadings * _fix_signs(loadings, scores.tasks)[:, None]
    return Components(
        models=list(scores.models),
        tasks=list(scores.tasks),
        loadings=loadings,
        scores=z @ loadings.T,
        variance=(s**2 / (s**2).sum())[:components],
        mean=mean,
        sd=sd,
        eigenvalues=s**2 / len(z),
    )


def subset(scores: Scores, models: Mapping[str, ModelFacts], construction: str = "PT") -> Scores:
    """The rows whose model was made that way ("PT" from scratch, "CPT" continued); refit on what it returns."""
    facts = {name: find_model(name, models) for name in scores.models}
    raise_problems(
        [f"{name}: not in the table of models" for name, m in facts.items() if m is None],
        what="Whether these models were trained from scratch is not known",
        hint="Add them to the table of models.",
    )
    kept = [name for name, m in facts.items() if m.construction == construction]
    if not kept:
        raise UserError(f"no model of the {len(facts)} has construction {construction!r}")
    return scores.select(models=kept)


def congruence(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Tucker's congruence coefficient (cosine) of each row of ``a`` with the same row of ``b``, ``(K, T)`` each."""
    return (a * b).sum(axis=-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))


def leave_one_out(scores: Scores, components: int = 4) -> Stability:
    """Refit the components without each model in turn and compare them with the full fit, rank by rank."""
    full = principal_components(scores, components).loadings
    refits = []
    for i, left_out in enumerate(scores.models):
        rest = np.delete(scores.values, i, axis=0)
        constant = [t for t, same in zip(scores.tasks, np.ptp(rest, axis=0) == 0, strict=True) if same]
        if constant:
            raise UserError(f"without {left_out}, column {constant[0]!r} is constant", hint=_DROP)
        refits.append(np.linalg.svd(_standardise(rest)[0], full_matrices=False)[2][:components])
    loadings = np.stack(refits)
    cosines = congruence(loadings, full)
    aligned = loadings * np.where(cosines < 0, -1.0, 1.0)[..., None]
    cosines = np.abs(cosines)
    worst = [scores.models[i] for i in cosines.argmin(axis=0)]
    return Stability(cosines, cosines.min(axis=0), worst, aligned.std(axis=0))


def parallel_analysis(models: int, tasks: int, draws: int = 2000, quantile: float = 0.95, seed: int = 0) -> np.ndarray:
    """Horn's parallel analysis: the ``quantile`` of each eigenvalue of correlations of pure noise, ``(tasks,)``.

    ``draws`` matrices of independent normal numbers, ``models`` × ``tasks``. A component is kept while its
    eigenvalue is above this; see :func:`kept_components`.
    """
    if models < 3 or tasks < 2:
        raise UserError(f"parallel analysis needs 3 models and 2 tasks; there are {models} and {tasks}")
    random = np.random.default_rng(seed)
    eigenvalues = []
    for start in range(0, draws, 200):  # in parts: all draws at once would take draws × models × tasks × 8 bytes
        z = random.standard_normal((min(200, draws - start), models, tasks))
        z -= z.mean(axis=1, keepdims=True)
        z /= np.sqrt((z**2).mean(axis=1, keepdims=True))
        eigenvalues.append(np.linalg.eigvalsh(np.swapaxes(z, 1, 2) @ z / models)[:, ::-1])
    return np.quantile(np.concatenate(eigenvalues), quantile, axis=0)


def kept_components(eigenvalues: np.ndarray, noise: np.ndarray) -> int:
    """How many leading eigenvalues are above those of noise."""
    size = min(len(eigenvalues), len(noise))
    below = np.flatnonzero(eigenvalues[:size] <= noise[:size])
    return int(below[0]) if len(below) else size


def component_warnings(fit: Components, stability: Stability, kept: int) -> list[str]:
    """Sentences to print before a component is given a name: noise by parallel analysis, or not stable."""
    warnings = []
    for k, lowest in enumerate(stability.lowest):
        reasons = []
        if k >= kept:
            reasons.append(f"its eigenvalue {fit.eigenvalues[k]:.2f} is not above that of noise (parallel analysis)")
        if lowest < STABLE:
            reasons.append(f"without {stability.worst[k]} it changes to a congruence of {lowest:.2f} (below {STABLE})")
        if reasons:
            warnings.append(f"Do not name PC{k + 1}: {'; '.join(reasons)}.")
    return warnings


def factor_analysis(scores: Scores, factors: int, starts: int = 20, seed: int = 0) -> Factors:
    """Maximum-likelihood factor analysis with varimax and promax (power 4), Kaiser-normalised.

    Uniquenesses minimise f(ψ) = −Σ_{j>K}(ln e_j − e_j) − K + T, where e are the descending eigenvalues of
    Ψ^(−1/2) R Ψ^(−1/2) (Jöreskog 1967; Lawley & Maxwell 1971), within [0.005, 1]; first from
    (1 − K/2T)/diag(R⁻¹), then from ``starts`` − 1 random starts, uniform 0.01–0.9. The best is kept.
    With factors=10 on its 35 models this is paper B's Figure 10.

    Raises:
        UserError: missing cells, constant columns, fewer models than factors, fewer models than tasks
            (their correlation matrix is then singular).
    """
    _complete(scores, factors, "Factors")
    models, size = scores.values.shape
    if factors >= size:
        raise UserError(f"{factors} factors of {size} tasks; there must be fewer factors than tasks")
    z = _standardise(scores.values)[0]
    r = z.T @ z / models
    lowest, vector = (part[..., 0] for part in np.linalg.eigh(r))
    if lowest < 1e-10:
        involved = [scores.tasks[j] for j in np.argsort(-np.abs(vector)) if abs(vector[j]) > 0.1]
        raise UserError(
            f"the correlations of {size} tasks over {models} models are singular; they depend on each other: "
            f"{', '.join(involved[:6])}",
            hint=f"Maximum likelihood needs more than {size} models, and no task that is a sum of others.",
        )
    random = np.random.default_rng(seed)
    first = (1 - 0.5 * factors / size) / np.diag(np.linalg.inv(r))
    guesses = [first, *random.uniform(0.01, 0.9, (max(starts, 1) - 1, size))]
    fits = [
        minimize(
            _discrepancy, guess, args=(r, factors), jac=True, method="L-BFGS-B",
            bounds=[(LOWEST_UNIQUENESS, 1)] * size, options={"maxiter": 1000},
        )
        for guess in guesses
    ]  # fmt: skip
    best = min(fits, key=lambda fit: fit.fun)
    reached = sum(fit.fun < best.fun + 1e-3 for fit in fits)
    if fits[0].fun < best.fun + 1e-6:
        best = fits[0]  # equal optima: the start without chance
    loadings = _loadings(best.x, r, factors)
    varimax, pattern, phi = promax(loadings)
    order = np.argsort(-(pattern**2).sum(axis=0))
    signs = np.where(pattern.sum(axis=0) < 0, -1.0, 1.0)[order]
    pattern, varimax = pattern[:, order] * signs, varimax[:, order] * signs
    phi = phi[np.ix_(order, order)] * np.outer(signs, signs)
    heywood = [t for t, u in zip(scores.tasks, best.x, strict=True) if u <= LOWEST_UNIQUENESS + 1e-6]
    return Factors(
        tasks=list(scores.tasks),
        loadings=loadings.T,
        varimax=varimax.T,
        pattern=pattern.T,
        correlations=phi,
        uniquenesses=best.x,
        contribution=(pattern**2).sum(axis=0) / size,
        objective=float(best.fun),
        starts=len(fits),
        reached=reached,
        heywood=heywood,
        warnings=_factor_warnings(factors, models, size, heywood, reached, len(fits), best),
    )


def _factor_warnings(factors: int, models: int, size: int, heywood: list, reached: int, starts: int, best) -> list[str]:
    warnings = []
    freedom = ((size - factors) ** 2 - size - factors) // 2
    if freedom < 0:
        warnings.append(f"{factors} factors of {size} tasks are not identified ({freedom} degrees of freedom).")
    if heywood:
        warnings.append(
            f"Improper solution (Heywood): {len(heywood)} of {size} uniquenesses stand at the bound "
            f"{LOWEST_UNIQUENESS}: {', '.join(heywood)}. Do not name the factors."
        )
    if reached < starts:
        warnings.append(f"Only {reached} of {starts} starts reach this optimum: the solution depends on the start.")
    if not best.success:
        warnings.append(f"The optimiser did not converge: {best.message}.")
    if models < 5 * factors:
        warnings.append(f"{models} models for {factors} factors: fewer than 5 models a factor.")
    return warnings


def _spectrum(psi: np.ndarray, r: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    root = 1 / np.sqrt(psi)
    values, vectors = np.linalg.eigh(r * np.outer(root, root))
    return values[::-1], vectors[:, ::-1]


def _discrepancy(psi: np.ndarray, r: np.ndarray, k: int) -> tuple[float, np.ndarray]:
    """f(ψ) and its gradient Σ_{j>k} (1 − e_j) v_ij² / ψ_i, since de_j/dψ_i = −e_j v_ij² / ψ_i."""
    values, vectors = _spectrum(psi, r)
    tail = np.maximum(values[k:], 1e-12)
    f = -(np.log(tail) - tail).sum() - k + len(r)
    gradient = ((1 - tail) * vectors[:, k:] ** 2).sum(axis=1) / psi
    return float(f), gradient


def _loadings(psi: np.ndarray, r: np.ndarray, k: int) -> np.ndarray:
    values, vectors = _spectrum(psi, r)
    return vectors[:, :k] * np.sqrt(np.maximum(values[:k] - 1, 0)) * np.sqrt(psi)[:, None]


def varimax(loadings: np.ndarray, iterations: int = 500, tolerance: float = 1e-5) -> np.ndarray:
    """Kaiser's varimax of ``(T, K)`` loadings by singular value decompositions; rows are taken as they are."""
    rotation, before = np.eye(loadings.shape[1]), 0.0
    for _ in range(iterations):
        rotated = loadings @ rotation
        target = rotated**3 - rotated * (rotated**2).mean(axis=0)
        u, s, vt = np.linalg.svd(loadings.T @ target)
        rotation = u @ vt
        if s.sum() < before * (1 + tolerance):
            break
        before = s.sum()
    return loadings @ rotation


def promax(loadings: np.ndarray, power: int = 4) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Promax of ``(T, K)`` loadings: (varimax ``(T, K)``, pattern ``(T, K)``, factor correlations ``(K, K)``).

    Rows are Kaiser-normalised to length 1 first and scaled back (Hendrickson & White 1964).
    """
    if loadings.shape[1] == 1:
        return loadings, loadings, np.eye(1)
    h = np.linalg.norm(loadings, axis=1, keepdims=True)
    h = np.where(h == 0, 1, h)
    v = varimax(loadings / h)
    c = np.linalg.lstsq(v, v * np.abs(v) ** (power - 1), rcond=None)[0]
    c = c * np.sqrt(np.diag(np.linalg.inv(c.T @ c)))
    inverse = np.linalg.inv(c)
    return v * h, v @ c * h, inverse @ inverse.T


def factor_scores(scores: Scores, factors: Factors, method: str = "regression") -> np.ndarray:
    """Scores ``(M, K)`` of the promax factors: Thurstone's "regression" or "bartlett"."""
    z = _standardise(scores.select(tasks=factors.tasks).values)[0]
    p = factors.pattern.T
    if method == "regression":
        return z @ np.linalg.solve(z.T @ z / len(z), p @ factors.correlations)
    if method == "bartlett":
        weighted = p / factors.uniquenesses[:, None]
        return z @ weighted @ np.linalg.inv(p.T @ weighted)
    raise UserError(f"no factor scores by {method!r}", hint="Choose regression or bartlett.")


def match_rows(loadings: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """The rows of ``loadings (K, T)`` that go best with ``reference (P, T)``, P ≤ K, in its order and sign.

    By the largest sum of |cosines| over one-to-one assignments.
    """
    if len(reference) > len(loadings):
        raise UserError(f"{len(loadings)} factors cannot be matched with {len(reference)}")
    cosines = (reference @ loadings.T) / np.outer(np.linalg.norm(reference, axis=1), np.linalg.norm(loadings, axis=1))
    rows, columns = linear_sum_assignment(-np.abs(cosines))
    return loadings[columns] * np.where(cosines[rows, columns] < 0, -1.0, 1.0)[:, None]
