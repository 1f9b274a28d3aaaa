"""The whole analysis, from a score matrix to ``scaling.json``, figures and a page, in the order of the reading.

Without a score matrix of one's own it is paper B's 35 × 19 where that file is found, else paper A's printed table of
nine models × seven scores; what was analysed stands in the output. Paper B is Saito et al., "Why We Build Local Large
Language Models"; paper A is Takase & Honda, "英語中心の大規模言語モデル開発からの脱却に向けて".
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tsugiki.artifacts import write_json
from tsugiki.bases import Base
from tsugiki.errors import UserError, raise_problems
from tsugiki.evaluate.paired import read_items
from tsugiki.evaluate.scaling.budgets import Convention, budget
from tsugiki.evaluate.scaling.efficiency import budgets_at_share, continued_efficiency, find_pairs
from tsugiki.evaluate.scaling.equivalence import budget_factor, equivalent_difference, equivalent_means
from tsugiki.evaluate.scaling.factors import (
    component_warnings,
    correlate,
    correlations,
    factor_analysis,
    factor_scores,
    kept_components,
    leave_one_out,
    parallel_analysis,
    principal_components,
    printed_loadings,
    subset,
)
from tsugiki.evaluate.scaling.laws import AXES, Law, Refused, fit_component_law, fit_law, predict
from tsugiki.evaluate.scaling.missing import fill, fit_missing_law, fit_ppca
from tsugiki.evaluate.scaling.points import (
    METRICS,
    Placement,
    Point,
    moved,
    own_budget,
    place,
    read_languages,
    read_points,
)
from tsugiki.evaluate.scaling.references import Reference, fetched, own, printed_reference, published
from tsugiki.evaluate.scaling.tables import (
    DATA,
    LANGUAGES,
    TASKS,
    ModelFacts,
    Scores,
    find_model,
    load_models,
    plain_name,
    read_table,
)

FACTORS = 10  # what reproduces paper B's Figure 10; it does not state the number
MANY_DRAWS, FEW_DRAWS = 10_000, 2_000
CHANGES = tuple(float(d) for d in range(-10, 11) if d)  # points, for the curve of equivalent compute


@dataclass(frozen=True)
class Question:
    """A law worth a figure: the mean of ``tasks`` (points), or a component (SD), against a budget.

    Attributes:
        name: of the score. axis: ``total``, ``en`` or ``ja``.
        tasks: of the mean; empty for a component. component: its position from 0.
        key: short and stable, for files and programs.
    """

    key: str
    name: str
    axis: str
    tasks: tuple[str, ...] = ()
    component: int | None = None


QUESTIONS: dict[str, tuple[Question, ...]] = {
    "saito": (
        Question("niilc_ja", "NIILC", "ja", ("niilc",)),
        Question("culture_ja", "mean(NIILC, JEMHopQA)", "ja", ("niilc", "jemhopqa")),
        Question("neutral_total", "mean(MGSM, JMMLU)", "total", ("mgsm_ja", "jmmlu")),
        Question("mgsm_total", "MGSM", "total", ("mgsm_ja",)),
        Question("jmmlu_total", "JMMLU", "total", ("jmmlu",)),
        Question("niilc_total", "NIILC", "total", ("niilc",)),
        Question("neutral_ja", "mean(MGSM, JMMLU)", "ja", ("mgsm_ja", "jmmlu")),
        Question("pc1_en", "PC1", "en", component=0),
        Question("pc1_total", "PC1", "total", component=0),
        Question("pc1_ja", "PC1", "ja", component=0),
        Question("pc2_ja", "PC2", "ja", component=1),
        Question("pc2_en", "PC2", "en", component=1),
        Question("pc2_total", "PC2", "total", component=1),
    ),
    "takase": (
        Question("culture_ja", "mean(NIILC, JMMLU part, JAQKET)", "ja", ("niilcqa", "jmmlu_part", "jaqket")),
        Question("neutral_total", "mean(MGSM-Ja, MMLU-ProX-Ja)", "total", ("mgsm_ja", "mmlu_prox_ja")),
        Question("culture_total", "mean(NIILC, JMMLU part, JAQKET)", "total", ("niilcqa", "jmmlu_part", "jaqket")),
        Question("neutral_ja", "mean(MGSM-Ja, MMLU-ProX-Ja)", "ja", ("mgsm_ja", "mmlu_prox_ja")),
    ),
}


def run_scaling(
    scores: Path | str | None = None,
    out: Path | str = Path("runs") / "scaling",
    *,
    runs: Path | str = Path("runs"),
    models: Path | str | None = None,
    bases: Mapping[str, Base] | None = None,
    language: str = "ja",
    download: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Analyse a score matrix and the user's own runs; write ``scaling.json``, ``figures/``, ``tables/``, ``scaling.html``.

    Args:
        scores: score matrix as CSV (0–1, blanks missing); None for the published one (:func:`published`).
        out: folder to write.
        runs: folder of recipe runs, whose models become points.
        models: table of further models (CSV), added to the shipped one.
        bases: the named bases of the recipe.
        language: of the figures, ``ja`` or ``en``.
        download: fetch the public matrix (pinned commit, checked) into ``out`` where no file is given.
        say: told what is being done.

    Returns:
        the content of ``scaling.json``.

    Raises:
        UserError: a file that cannot be read as what it should be; every problem in it is named.
    """
    from tsugiki.evaluate.scaling.figures import draw_all, write_tables
    from tsugiki.evaluate.scaling.page import write_page

    if language not in ("ja", "en"):
        raise UserError(f"no language {language!r}", hint="Choose ja or en.")
    out = Path(out)
    table = load_models()
    if models:
        table |= load_models(models)
    if scores and download:
        raise UserError("a score matrix is given and another is to be fetched", hint="Leave out --download, or --scores.")
    reference = own(scores, table) if scores else fetched(table, out) if download else published(table)
    say(reference.source)
    points, known, notes = read_points(runs, reference.models, bases, "takase" if reference.kind == "takase" else "saito")
    languages, unread = read_languages(runs)
    result = analyse(reference, points, known, languages=languages, say=say)
    result["notes"] = [*result["notes"], *notes, *unread]
    write_json(out / "scaling.json", result)
    say("figures, tables, page")
    result["warnings"] = draw_all(result, out / "figures", language=language)
    result["files"] = write_tables(result, out / "tables")
    write_page(result, out / "scaling.html")
    write_json(out / "scaling.json", result)
    return result


def analyse(
    reference: Reference,
    points: Sequence[Point] = (),
    known: Mapping[str, ModelFacts] | None = None,
    *,
    languages: Sequence[dict[str, Any]] = (),
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Every number of the analysis, as JSON.

    ``known`` is the table of models with the points' facts in it, ``languages`` what :func:`read_languages` found.
    """
    scores, table, rule = reference.scores, known or reference.models, reference.rule
    notes: list[str] = []
    strangers = [name for name in scores.models if find_model(name, table) is None]
    if strangers:
        notes.append(
            f"{len(strangers)} models are not in the table of models, so they have no budget and stand in no law: "
            f"{', '.join(strangers)}. Add them with --models."
        )
    facts = {name: find_model(name, table) for name in scores.models}
    _refuse_twice(facts)
    families = [facts[name].family if facts[name] else name for name in scores.models]
    x = {axis: _log_budgets(scores.models, table, axis, rule) for axis in AXES}

    say("correlations and components")
    complete, filled_note = _complete(scores)
    if filled_note:
        notes.append(filled_note)
    components = _components(complete, reference, x, notes)
    found = {
        "source": reference.source,
        "kind": reference.kind,
        "convention": rule.name,
        "tasks": list(scores.tasks),
        "correlations": _correlations(scores),
        "components": components,
        "factors": _factors(complete, components, notes),
    }

    say("laws of score and budget")
    laws, questions = {}, _questions(reference, components)
    for question in questions:
        laws[question.key] = _law(question, scores, complete, components, x[question.axis], families)
    found["laws"] = [_law_row(q, laws[q.key], facts) for q in questions]
    found["all_laws"] = [
        _law_brief(fit_law(100 * scores.column(task), x[axis], families, name=task, axis=axis, models=scores.models, draws=FEW_DRAWS))
        for task in scores.tasks
        for axis in AXES
    ]
    found["missing"] = _missing_law(scores, questions, x, families)
    notes += [_missing_words(row) for row in found["missing"]]

    say("is continued pre-training more efficient?")
    found["efficiency"] = _efficiency(scores, questions, components, facts, families, table, x)
    say("equivalent compute")
    found["equivalence"] = _equivalence(reference, questions, laws, table)
    found["own_equivalence"] = own_equivalence(points, questions, laws)
    found["languages"] = _languages(languages)

    found["models"] = [_model_row(name, i, scores, facts[name], table, rule, complete, components) for i, name in enumerate(scores.models)]
    found["yours"] = [_point_row(p, table, rule, questions, laws) for p in points]
    found["notes"] = notes
    return _json(found)


# --- the parts ------------------------------------------------------------------------------------------------------


def _log_budgets(names: Sequence[str], table: Mapping[str, ModelFacts], axis: str, rule: Convention) -> np.ndarray:
    return np.array([budget(name, table, axis, rule).log10 if find_model(name, table) else math.nan for name in names])


def _refuse_twice(facts: Mapping[str, ModelFacts | None]) -> None:
    """A model in two rows, by name and by hub id for example, would count twice in everything."""
    rows: dict[str, list[str]] = {}
    for name, model in facts.items():
        rows.setdefault(plain_name(model.name if model else name), []).append(name)
    problems = [f"{' and '.join(map(repr, names))} are the same model" for names in rows.values() if len(names) > 1]
    raise_problems(problems, what="Models twice in the score matrix", hint="Keep one row of each.")


def _complete(scores: Scores) -> tuple[Scores, str]:
    """The matrix with its holes filled by expected values, for components only, and what that does."""
    holes = np.isnan(scores.values)
    if not holes.any():
        return scores, ""
    rank = max(1, min(2, min(scores.values.shape) - 2))
    model = fit_ppca(scores.values, rank, rows=scores.models, columns=scores.tasks)
    return Scores(scores.models, scores.tasks, np.clip(fill(scores.values, model), 0, 1)), (
        f"{int(holes.sum())} of {holes.size} scores are missing ({holes.mean():.0%}). For components and factors they were filled by a "
        f"model of {rank} components; laws of single tasks leave them out. Filling makes correlations weaker than they are."
    )


def _correlations(scores: Scores) -> dict[str, Any]:
    pearson, spearman = correlations(scores), correlations(scores, "spearman")
    return {"tasks": scores.tasks, "pearson": pearson.values, "spearman": spearman.values, "counts": pearson.counts}


def _with_budgets(which: str, scores: np.ndarray, x: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Correlations of components ``(M, K)`` with log budgets, each over the models whose budget is known."""
    rows = []
    for k in range(scores.shape[1]):
        for axis in AXES:
            (pearson, n), (spearman, _) = (correlate(scores[:, k], x[axis], how) for how in ("pearson", "spearman"))
            rows.append({"models": which, "component": f"PC{k + 1}", "axis": axis, "n": n, "pearson": pearson, "spearman": spearman})
    return rows


def _components(scores: Scores, reference: Reference, x: Mapping[str, np.ndarray], notes: list[str]) -> dict[str, Any] | None:
    count = min(4, len(scores.tasks), len(scores.models) - 1)
    try:
        fit = principal_components(scores, count)
        stability = leave_one_out(scores, count)
    except UserError as error:
        notes.append(f"No components: {error}")
        return None
    noise = parallel_analysis(len(scores.models), len(scores.tasks))
    kept = kept_components(fit.eigenvalues, noise)
    answer = {
        "tasks": fit.tasks, "loadings": fit.loadings, "variance": fit.variance, "scores": fit.scores,
        "eigenvalues": fit.eigenvalues, "noise": noise[: len(fit.eigenvalues)], "kept": kept,
        "lowest_congruence": stability.lowest, "worst": stability.worst, "warnings": component_warnings(fit, stability, kept),
        "scratch": None, "budgets": _with_budgets("all", fit.scores, x),
    }  # fmt: skip
    try:
        scratch = principal_components(subset(scores, reference.models), count)
        at = [scores.models.index(name) for name in scratch.models]
        answer["budgets"] += _with_budgets("scratch", scratch.scores, {axis: v[at] for axis, v in x.items()})
        answer["scratch"] = {"n": len(scratch.models), "loadings": scratch.loadings, "variance": scratch.variance}
        if reference.kind == "saito":
            tasks, printed, _ = printed_loadings()
            same = [fit.tasks.index(t) for t in tasks]
            cells = np.round(scratch.loadings[:, same], 2) == printed[:count]
            answer["scratch"]["printed_cells"] = [int(cells.sum()), cells.size]
    except UserError as error:
        notes.append(f"No components of the models from scratch alone: {error}")
    return answer


def _factors(scores: Scores, components: dict | None, notes: list[str]) -> dict[str, Any] | None:
    """Maximum likelihood and promax: with as many factors as paper B (of its tasks), else as are kept."""
    count = FACTORS if set(scores.tasks) == set(TASKS) else max(1, components["kept"] if components else 1)
    try:
        fit = factor_analysis(scores, count)
    except UserError as error:
        notes.append(f"No factors: {error}")
        return None
    return {
        "count": count, "tasks": fit.tasks, "pattern": fit.pattern, "contribution": fit.contribution,
        "uniquenesses": fit.uniquenesses, "heywood": fit.heywood, "starts": fit.starts, "reached": fit.reached,
        "scores": factor_scores(scores, fit), "warnings": fit.warnings,
    }  # fmt: skip


def _questions(reference: Reference, components: dict | None) -> tuple[Question, ...]:
    kind, tasks = reference.kind, reference.scores.tasks
    if kind == "yours":
        single = [Question(f"{t}_{axis}", t, axis, (t,)) for t in tasks[:6] for axis in ("ja", "total")]
        named = [q for q in QUESTIONS["saito"] if q.tasks and set(q.tasks) <= set(tasks)]
        rest = [q for q in single if q.tasks not in {n.tasks for n in named}]
        questions = (*named, *rest, *(q for q in QUESTIONS["saito"] if q.component is not None))
    else:
        questions = QUESTIONS[kind]
    have = len(components["variance"]) if components else 0
    return tuple(q for q in questions if q.component is None or q.component < have)


def _values(question: Question, scores: Scores, components: dict | None) -> np.ndarray:
    """The question's scores: a mean of tasks in points, or a component's scores; float ``(M,)``, NaN unknown."""
    if question.component is not None:
        return np.asarray(components["scores"])[:, question.component]
    return 100 * np.mean([scores.column(t) for t in question.tasks], axis=0)


def _unit(question: Question) -> str:
    return "points" if question.component is None else "SD"


def _law(
    question: Question, scores: Scores, complete: Scores, components: dict | None, x: np.ndarray, families: list[str]
) -> Law | Refused:
    """The law of a mean of tasks, or of a component: there the components are computed anew in every resample."""
    common = {"name": question.name, "axis": question.axis, "models": scores.models}
    if question.component is None:
        return fit_law(_values(question, scores, components), x, families, unit="points", draws=MANY_DRAWS, **common)
    loading = components["loadings"][question.component]
    return fit_component_law(complete.values, loading, x, families, draws=FEW_DRAWS, **common)


def _law_brief(law: Law | Refused) -> dict[str, Any]:
    if isinstance(law, Refused):
        return {"name": law.name, "n": law.n, "refused": law.reason}
    keep = ("name", "axis", "unit", "n", "n_families", "slope", "intercept", "slope_se", "pearson", "spearman", "kendall",
            "residual_sd", "rmse", "family_rmse", "without", "notes")  # fmt: skip
    return {key: getattr(law, key) for key in keep}


def _law_row(question: Question, law: Law | Refused, facts: Mapping[str, ModelFacts | None]) -> dict[str, Any]:
    row = {"key": question.key, "axis": question.axis, "unit": _unit(question), **_law_brief(law)}
    if isinstance(law, Refused):
        return row
    ends = law.x.min(), law.x.max()
    reach = 0.04 * (ends[1] - ends[0])
    band = []
    for at in np.linspace(ends[0] - reach, ends[1] + reach, 41):
        expected = predict(law, float(at))
        band.append([float(at), expected.low, expected.value, expected.high])
    row["band"] = band
    row["points"] = [
        {"model": m, "x": float(a), "y": float(b), "residual": float(b - law.intercept.value - law.slope.value * a)}
        for m, a, b in zip(law.models, law.x, law.y, strict=True)
    ]
    return row


def _missing_law(scores: Scores, questions: Sequence[Question], x: Mapping[str, np.ndarray], families: list[str]) -> list[dict[str, Any]]:
    """Laws of means whose tasks have holes, again on many fillings; the first two. Empty without missing cells."""
    rows = []
    rank = max(1, min(2, min(scores.values.shape) - 2))
    holes = {task for task, missing in zip(scores.tasks, np.isnan(scores.values).any(axis=0), strict=True) if missing}
    for question in [q for q in questions if holes & set(q.tasks)][:2]:
        at = [scores.tasks.index(t) for t in question.tasks]
        try:
            law = fit_missing_law(
                scores.values, lambda full, at=at: 100 * full[:, at].mean(axis=1), x[question.axis], families, name=question.name, rank=rank
            )
        except UserError as error:
            law = Refused(question.name, str(error), len(scores.models))
        rows.append({"key": question.key, "axis": question.axis, **dataclasses.asdict(law)})
    return rows


def _missing_words(row: Mapping[str, Any]) -> str:
    if "reason" in row:
        return f"{row['name']} ~ {row['axis']}, with its missing scores filled: no law, {row['reason']}."
    slope, pearson = row["slope"], row["pearson"]
    return (
        f"{row['name']} ~ {row['axis']}, with its missing scores filled: {slope['value']:.2f} [{slope['low']:.2f}, {slope['high']:.2f}] per decade, "
        f"r {pearson['value']:.2f} [{pearson['low']:.2f}, {pearson['high']:.2f}]. {row['sentence']}"
    )


def _efficiency(
    scores: Scores, questions: Sequence[Question], components: dict | None, facts: Mapping[str, ModelFacts | None],
    families: list[str], table: Mapping[str, ModelFacts], x: Mapping[str, np.ndarray],
) -> list[dict[str, Any]]:  # fmt: skip
    """Of the scores that go with Japanese: the first law of a mean, and the second component."""
    wanted = [q for q in questions if q.axis == "ja"]
    wanted = [q for q in wanted if q.tasks][:2] + [q for q in wanted if q.component == 1]
    continued = np.array([bool(f and f.construction == "CPT") for f in facts.values()])
    known = np.array([f is not None for f in facts.values()])
    at_share = budgets_at_share([m for m, k in zip(scores.models, known, strict=True) if k], table)

    def shares(share: float) -> np.ndarray:
        """Strangers have no budget; they take nobody else's."""
        x = np.full(len(known), np.nan)
        x[known] = at_share(share)
        return x

    rows = []
    for question in wanted:
        answer = continued_efficiency(
            _values(question, scores, components), x["ja"], continued, families, scores.models, name=question.name, axis="ja",
            unit=_unit(question), pairs=find_pairs(scores.models, table), budgets_at=shares,
        )  # fmt: skip
        row = dataclasses.asdict(answer)
        if isinstance(answer, Refused):
            rows.append({"key": question.key, "refused": answer.reason, **row})
            continue
        row["sensitivity"] = [
            {
                "share": p.share, "multiplier": p.effect.multiplier, "low": p.low, "high": p.high,
                "random_low": p.effect.multiplier_low, "random_high": p.effect.multiplier_high,
                "offset": p.effect.value, "offset_se": p.effect.se, "p": p.p, "pearson": p.pearson, "verdict": p.verdict,
            }
            for p in answer.sensitivity
        ]  # fmt: skip
        rows.append({"key": question.key, **row})
    return rows


def _equivalence(
    reference: Reference, questions: Sequence[Question], laws: Mapping[str, Law | Refused], table: Mapping[str, ModelFacts]
) -> list[dict[str, Any]]:
    """What −10 to +10 points are worth by every law of a mean, on the reference models and on paper A's; no items, no error of theirs."""
    named = [("", q, laws[q.key]) for q in questions if q.tasks and isinstance(laws[q.key], Law)]
    if reference.kind != "takase":
        other = printed_reference(table)
        names = other.scores.models
        families = [find_model(name, table).family for name in names]
        for question in QUESTIONS["takase"][:2]:
            x = _log_budgets(names, table, question.axis, other.rule)
            named.append(("takase_", question, _law(question, other.scores, other.scores, None, x, families)))
    rows = []
    for prefix, question, law in named:
        row = {"key": prefix + question.key, "law": question.name, "axis": question.axis, "n": law.n}
        if isinstance(law, Refused):
            rows.append({**row, "refused": law.reason, "curve": []})
            continue
        curve, refused = [], ""
        for d in CHANGES:
            if abs(d) > np.ptp(law.y):  # no two models of the law are so far apart
                continue
            found = budget_factor(d, np.full(MANY_DRAWS, d), law)
            if isinstance(found, Refused):
                refused = found.reason
                break
            curve.append([d, *found[:3]])
        rows.append({
            **row, "families": law.n_families, "slope": law.slope, "range": [law.y.min(), law.y.max()], "refused": refused, "curve": curve,
            "notes": law.notes,
        })  # fmt: skip
    return rows


def own_equivalence(points: Sequence[Point], questions: Sequence[Question], laws: Mapping[str, Law | Refused]) -> list[dict[str, Any]]:
    """What each adapter (against its base) and each level (against the adapted model) is worth, by every law it has the scores of.

    Where the items' scores are kept the difference is a paired one (``paired``); else the two scores' errors are taken as
    independent, and the interval is too wide.
    """
    rows = []
    for point in points:
        kind = {"adapted": "base", "quantized": "adapted"}.get(point.kind)
        before = next((p for p in points if p.run == point.run and p.kind == kind), None)
        for question in questions:
            law = laws[question.key]
            pairs = [(before.scores.get(t), point.scores.get(t)) for t in question.tasks] if before else []
            if not pairs or isinstance(law, Refused) or any(a is None or b is None or a.metric != b.metric for a, b in pairs):
                continue
            if any(b.metric not in METRICS.get(t, (b.metric,)) for t, (_, b) in zip(question.tasks, pairs, strict=True)):
                continue
            items = [_paired_items(t, before, point) for t in question.tasks]
            if all(items):
                found = equivalent_means(items, law, change=point.name, unit="points")
            else:
                k = len(pairs)
                was, now = (100 * sum(p[i].value for p in pairs) / k for i in (0, 1))
                se = 100 * math.sqrt(sum((s.stderr or 0.0) ** 2 for p in pairs for s in p)) / k
                found = equivalent_difference(was, now - was, se, law, change=point.name, n_items=min(b.n or 0 for _, b in pairs))
            row = dataclasses.asdict(found)
            row = {"refused": row["reason"]} if isinstance(found, Refused) else row
            rows.append({"key": question.key, "point": point.name, "paired": all(items), **row})
    return rows


def _paired_items(task: str, before: Point, after: Point) -> tuple[np.ndarray, np.ndarray, list[str]] | None:
    """The two models' item scores in points ``(n,)`` and the items' documents; None where they are not those of the scores."""
    if task not in before.items or task not in after.items:
        return None
    first, second = ({i.id: i for i in read_items(p.items[task])} for p in (before, after))
    if first.keys() != second.keys() or any(i.score is None for i in (*first.values(), *second.values())):
        return None
    values = [100 * np.array([side[k].score for k in first]) for side in (first, second)]
    if any(abs(v.mean() - 100 * p.scores[task].value) > 1e-6 for v, p in zip(values, (before, after), strict=True)):
        return None  # of another run of the task
    return values[0], values[1], [i.document for i in first.values()]


def _languages(own: Sequence[dict[str, Any]] = ()) -> list[dict[str, Any]]:
    """Paper A's Table 3 and the user's models by the same columns, shares of sequences in percent."""
    header, rows = read_table(DATA / "takase_table3_langdist.csv")
    named = [c for c in header[1:] if c != "others"]
    found = [{"model": row["model"], "shares": {c: float(row[c]) for c in header[1:]}, "source": "Takase & Honda, Table 3"} for _, row in rows]
    for row in own:
        shares = {c: row["shares"].get(c, 0.0) for c in named}
        shares["others"] = sum(row["shares"].values()) - sum(shares.values())
        found.append({**row, "shares": shares})
    return found


def _budgets(facts: ModelFacts | None, table: Mapping[str, ModelFacts], rule: Convention, *, own: bool = False) -> dict[str, Any]:
    if facts is None:
        return {}
    rows = {}
    for language in LANGUAGES:
        b, used = own_budget(facts, table, language, rule) if own else (budget(facts, table, language, rule), rule)
        rows[language] = {
            "parameters": b.parameters, "tokens": b.tokens, "value": b.value, "flops": b.flops, "log10": b.log10,
            "kind": b.kind, "explanation": b.explanation, "convention": used.name,
        }  # fmt: skip
    return rows


def _model_row(
    name: str, i: int, scores: Scores, facts: ModelFacts | None, table: Mapping[str, ModelFacts], rule: Convention,
    complete: Scores, components: dict | None,
) -> dict[str, Any]:  # fmt: skip
    source = find_model(facts.source_model, table) if facts else None
    return {
        "name": name,
        "hf_id": facts.hf_id if facts else "",
        "family": facts.family if facts else "",
        "construction": facts.construction if facts else "",
        "source_model": source.name if source else facts.source_model if facts else "",
        "note": facts.note if facts else "not in the table of models",
        "budgets": _budgets(facts, table, rule),
        "scores": dict(zip(scores.tasks, scores.values[i], strict=True)),
        "components": components["scores"][i] if components else None,
    }


def _point_row(
    point: Point, table: Mapping[str, ModelFacts], rule: Convention, questions: Sequence[Question], laws: Mapping[str, Law | Refused]
) -> dict[str, Any]:
    placements = []
    for question in questions:
        law = laws[question.key]
        if question.component is not None:
            continue
        placed = (
            Placement(point.name, question.name, sentence=f"There is no law of {question.name}: {law.reason}.")
            if isinstance(law, Refused)
            else place(point, law, question.tasks, table, rule)
        )
        placements.append({"key": question.key, **dataclasses.asdict(placed)})
    return {
        "name": point.name,
        "run": point.run,
        "kind": point.kind,
        "size_bytes": point.facts.size_bytes,
        "budgets": _budgets(point.facts, table, rule, own=True),
        "moved": moved(point, table, rule),
        "scores": {task: dataclasses.asdict(s) for task, s in point.scores.items()},
        "placements": placements,
        "notes": list(point.notes),
    }


def _json(value: Any) -> Any:
    """A JSON value: arrays as lists, dataclasses as objects, numbers that are not finite as null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _json(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {str(k): _json(v) for k, v in value.items()}
    if isinstance(value, np.ndarray):
        return _json(value.tolist())
    if isinstance(value, list | tuple):
        return [_json(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
