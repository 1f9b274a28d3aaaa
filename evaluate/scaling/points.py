"""The user's own models as points among the published ones.

A run of the recipe gives three kinds of models: its base, the base with the adapter, and quantized files of that.
A base has the budget the table of models (or its own ``training.json``) gives it; an adapter adds the tokens it was
trained on; a quantized file has its model's budget and a size of its own. A model can be placed on a law only where
it was scored on the law's task, by the law's metric; where it was not, a sentence says so.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tsugiki.artifacts import read_json
from tsugiki.bases import Base
from tsugiki.errors import UserError
from tsugiki.evaluate.scaling.budgets import (
    PRINTED,
    SAITO,
    Budget,
    Convention,
    adapted,
    budget,
    from_folder,
    quantized,
    takase,
)
from tsugiki.evaluate.scaling.laws import Law, predict
from tsugiki.evaluate.scaling.tables import LANGUAGES, ModelFacts, find_model
from tsugiki.results import read_results
from tsugiki.samples import read_encoded

# What a published score of a task is measured by; a score by another metric is on another scale.
_RIGHT = ("exact_match", "acc", "accuracy")
METRICS: dict[str, tuple[str, ...]] = {
    "jcom": _RIGHT, "mgsm_ja": _RIGHT, "jmmlu": _RIGHT, "mmlu": _RIGHT, "gsm8k": _RIGHT, "bbh": _RIGHT,
    "openbookqa": _RIGHT, "hellaswag": _RIGHT, "xwino": _RIGHT, "triviaqa": _RIGHT, "squad2": ("exact", *_RIGHT),
    "jemhopqa": ("char_f1",), "niilc": ("char_f1",), "jsquad": ("char_f1",), "xlsum_ja": ("rouge2", "rouge_2"),
    "wmt20_en_ja": ("bleu",), "wmt20_ja_en": ("bleu",), "jhumaneval": ("pass@1",), "humaneval": ("pass@1",),
    "niilcqa": ("exact_match",), "jaqket": ("exact_match",), "jmmlu_part": _RIGHT, "mmlu_prox_ja": _RIGHT,
    "mmlu_prox_en": _RIGHT, "mgsm_en": _RIGHT,
}  # fmt: skip
BUDGET_WORDS = {"total": "total budget", "en": "English budget", "ja": "Japanese budget"}
_KANA = re.compile(r"[\u3041-\u30ff\uff66-\uff9f]")
_KANJI = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]")
_LATIN = re.compile(r"[A-Za-z]")


@dataclass(frozen=True)
class Score:
    """A score of one task: ``value`` and ``stderr`` from 0 to 1, ``n`` items, by ``metric``."""

    value: float
    stderr: float | None = None
    n: int | None = None
    metric: str = ""


@dataclass(frozen=True)
class Point:
    """A model of the user's.

    Attributes:
        name: ``<domain>/<base>`` and ``base``, ``adapted`` or the quantization level.
        run: ``<domain>/<base>``.
        kind: ``base``, ``adapted`` or ``quantized``.
        facts: what its budget is made of.
        scores: task → score, for tasks that have one from 0 to 1.
        items: task → file of the items' scores behind it, where that is kept (:mod:`tsugiki.evaluate.run`).
        notes: what is unknown or assumed about its budget.
    """

    name: str
    run: str
    kind: str
    facts: ModelFacts
    scores: Mapping[str, Score] = field(default_factory=dict)
    items: Mapping[str, Path] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Placement:
    """A point on a law, or why it cannot be placed.

    Attributes:
        point, law: their names.
        log_budget: log10(N·D) on the law's axis; None where unknown.
        value: its score in the law's unit; None where it was not scored.
        stderr: of the score, in the law's unit.
        predicted, low, high: the score the law expects at this budget, with the prediction interval of a model of a
            new family; the score's own error is not in it.
        residual: value − predicted.
        extrapolated: the budget lies outside those of the law's points.
        sentence: what this says, or why there is nothing to say.
        convention: by which its tokens were counted where none are printed for it; else "".
    """

    point: str
    law: str
    log_budget: float | None = None
    value: float | None = None
    stderr: float | None = None
    predicted: float | None = None
    low: float | None = None
    high: float | None = None
    residual: float | None = None
    extrapolated: bool | None = None
    sentence: str = ""
    convention: str = ""


def read_points(
    runs: Path | str, models: Mapping[str, ModelFacts], bases: Mapping[str, Base] | None = None, paper: str = "saito"
) -> tuple[list[Point], dict[str, ModelFacts], list[str]]:
    """Read base, adapted and quantized models of every run below ``runs``.

    Args:
        runs: folder of runs (``<domain>/<base>/summary.json``, ``results.sqlite``).
        models: the table of models; a base is looked up in it by its name and its hub id.
        bases: the named bases, which say where a base comes from.
        paper: ``saito`` or ``takase``: whose definition of a task counts where a model was scored by both (MGSM).

    Returns:
        the points, the table with their facts added (a point's budget is looked up there), and notes about runs
        that could not be read.
    """
    runs, points, notes = Path(runs), [], []
    table = dict(models)
    rows = _defined_by(paper, read_results(runs / "results.sqlite"))
    for path in sorted(runs.glob("*/*/summary.json")):
        run = path.parent.relative_to(runs).as_posix()
        try:
            summary = read_json(path)
            found = _run_points(path.parent, run, summary, rows, table, bases or {})
        except (ValueError, KeyError, TypeError, UserError) as error:
            notes.append(f"{run}: the run cannot be read ({type(error).__name__}: {error})")
            continue
        points += found
        table |= {p.facts.name: p.facts for p in found}
    return points, table, notes


def _defined_by(paper: str, rows: list[dict]) -> list[dict]:
    """Rows without those of another paper's definition where the same model was scored by this paper's."""

    def key(row: dict) -> tuple:
        return row["run"], row["model"], row["task"]

    ours = {key(r) for r in rows if str(r["settings"].get("task")).startswith(f"tsugiki_{paper}_")}
    return [r for r in rows if key(r) not in ours or str(r["settings"].get("task")).startswith(f"tsugiki_{paper}_")]


def _run_points(
    folder: Path, run: str, summary: dict, rows: list[dict], models: Mapping[str, ModelFacts], bases: Mapping[str, Base]
) -> list[Point]:
    base, note = base_facts(summary["base"], models, bases)
    notes = (note,) if note else ()
    kept = (folder.parents[1] / "benchmarks", folder / "evaluate" / "benchmarks")  # of `evaluate run`, of the recipe
    points = [Point(f"{run} base", run, "base", base, *_scores(rows, run, ("base",), kept), notes)]
    sweep = summary.get("sweep") or {}
    best = (sweep.get("optimum") or {}).get("n")
    fits = [p for p in sweep.get("points", []) if p["n"] == best]
    if not fits:
        return points
    fit = min(fits, key=lambda p: p["nll"])  # of several seeds, the recipe keeps the best
    tokens, how = tokens_by_language(folder / "data" / "train.jsonl", fit["n"], fit["train_tokens"])
    grown = adapted(base, f"{run} adapted", tokens)
    notes = (*notes, how)
    points.append(Point(grown.name, run, "adapted", grown, *_scores(rows, run, ("adapted", "F16"), kept), notes))
    for level in summary.get("levels", []):
        if level["level"] == "F16":
            continue
        facts = quantized(grown, f"{run} {level['level']}", level["bytes"])
        points.append(Point(facts.name, run, "quantized", facts, *_scores(rows, run, (level["level"],), kept), notes))
    return points


def base_facts(name: str, models: Mapping[str, ModelFacts], bases: Mapping[str, Base]) -> tuple[ModelFacts, str]:
    """What is known of a run's base, and a sentence about what is not (empty where all is known)."""
    named = bases.get(name)
    if named is not None and named.path is not None and (named.path / "training.json").exists():
        return from_folder(named.path), ""
    found = find_model(named.hub_id, models) if named and named.hub_id else None
    found = found or find_model(name, models)
    if found is not None:
        unknown = not found.added and all(found.tokens(language) is None for language in LANGUAGES)
        return found, f"The training tokens of {found.name} were not found: add a row for it with --models." if unknown else ""
    size = float(named.parameters) if named and named.parameters else None
    sources = dict.fromkeys(("parameters", "active_parameters"), ("reported", "list of bases")) if size else {}
    facts = ModelFacts(
        name=name, hf_id=(named.hub_id or "") if named else "", family=name, parameters=size, active_parameters=size, sources=sources
    )
    return facts, f"The training tokens of {name} are not in the table of models: add a row for it with --models."


def tokens_by_language(train: Path, n: int, tokens: int) -> tuple[dict[str, float], str]:
    """Training tokens of an adapter by language, and how they were divided.

    The first ``n`` rows of ``train`` are its samples; a sample counts as Japanese with kana or at least as many kanji
    as Latin letters; one with Latin letters alone has the language that fastText identifies; else it is undetermined.
    (fastText for every sample would be worse: it reads short questions with many kanji as Chinese.)
    Without the file all tokens are undetermined.
    """
    if not train.exists():
        return {"und": float(tokens)}, f"The adapter's {tokens:,} tokens are of undetermined language: no training rows are kept."
    counts, latin = Counter(), []
    for sample in read_encoded(train)[:n]:
        text = f"{sample.prompt}\n{sample.completion}"
        language = language_by_script(text)
        if language == "en":
            latin.append((text, len(sample.ids)))
        else:
            counts[language] += len(sample.ids)
    if latin:
        from tsugiki.evaluate.languages import identify  # with llama.cpp behind it

        for (language, _), (_, size) in zip(identify([text for text, _ in latin]), latin, strict=True):
            counts[language] += size
    whole = sum(counts.values())
    if not whole:
        return {"und": float(tokens)}, f"The adapter's {tokens:,} tokens are of undetermined language."
    shares = {k: c / whole for k, c in counts.items()}
    said = ", ".join(f"{share:.1%} {k}" for k, share in shares.items() if share)
    return {k: share * tokens for k, share in shares.items()}, f"The adapter's {tokens:,} tokens were divided by script{', Latin text by fastText' if latin else ''}: {said}."


def language_by_script(text: str) -> str:
    """``ja``, ``en`` (any text in Latin letters alone) or ``und`` by the scripts in a text."""
    kana, kanji, latin = (len(p.findall(text)) for p in (_KANA, _KANJI, _LATIN))
    if kana or (kanji and kanji >= latin):
        return "ja"
    return "en" if latin and not kanji else "und"


def _scores(
    rows: Iterable[dict], run: str, names: tuple[str, ...], kept: Iterable[Path] = ()
) -> tuple[dict[str, Score], dict[str, Path]]:
    """The scores from 0 to 1 of one model of a run, and the files of their items; of two rows of a task the one with more items."""
    wanted = {f"{run}/{name}" for name in names}
    fractions = {metric for known in METRICS.values() for metric in known}
    scores: dict[str, Score] = {}
    items: dict[str, Path] = {}
    for row in rows:
        metric = row["metric"]
        if row["run"] != run or row["model"] not in wanted or metric not in fractions or not 0 <= row["value"] <= 1:
            continue
        task = row["task"].casefold().replace("-", "_")
        known = METRICS.get(task)
        right = known is None or metric in known
        old = scores.get(task)
        old_right = old is not None and (known is None or old.metric in known)
        if old is None or (right, row["n"] or 0) > (old_right, old.n or 0):
            scores[task] = Score(row["value"], row["stderr"], row["n"], metric)
            file = f"items-{str(row['settings'].get('task') or '').replace('/', '__')}.jsonl"
            items.pop(task, None)
            for path in (folder / row["model"].replace("/", "__") / file for folder in kept):
                if path.is_file():
                    items[task] = path
                    break
    return scores, items


def read_languages(runs: Path | str) -> tuple[list[dict[str, Any]], list[str]]:
    """What ``tsugiki evaluate languages`` found of the user's models: every ``languages.json`` below ``runs``.

    Returns:
        rows ``{"model", "shares", "source"}`` (language → share of sequences, percent; ``und`` is text of no language),
        named by their folders, and notes about files that could not be read.
    """
    runs, rows, notes = Path(runs), [], []
    for path in sorted(runs.rglob("languages.json")):
        name = path.parent.relative_to(runs).as_posix()
        try:
            found = read_json(path)
            shares = {str(row["language"]): 100 * float(row["sequences"]) for row in found["languages"]}
            source = f"{int(found['done']):,} of {int(found['sequences']):,} sequences of {int(found['tokens']):,} tokens"
            model = str(found["model"]).removesuffix(".gguf") if name == "." else name
        except (OSError, ValueError, KeyError, TypeError) as error:
            notes.append(f"{name}/languages.json cannot be read ({type(error).__name__}: {error})")
            continue
        rows.append({"model": model, "shares": shares, "source": source})
    return rows, notes


def own_budget(
    facts: ModelFacts, models: Mapping[str, ModelFacts], language: str, rule: Convention = PRINTED
) -> tuple[Budget, Convention]:
    """The budget of a model of the user's, and the convention it was counted by.

    ``rule``; where nothing is printed for the model, Saito et al.'s appendix A.3 (what the printed figures are made by),
    then Takase & Honda's Table 3, whose shares are others: for Llama 3 18 times as much Japanese.
    """
    have = budget(facts, models, language, rule)
    if have.value is None and rule == PRINTED:
        for other in (SAITO, takase()):
            try:
                guess = budget(facts, models, language, other)
            except UserError:  # its shares contradict what is known of this model
                continue
            if guess.value is not None:
                return guess, other
    return have, rule


def _counted(used: Convention, rule: Convention) -> str:
    if used == rule:
        return ""
    if used == SAITO:
        return " (its tokens by Saito et al.'s A.3, as the law's own are made)"
    return f" (its tokens by {used.name}'s Table 3: another convention than the law's, so read the residual with care)"


def place(
    point: Point, law: Law, tasks: Iterable[str], models: Mapping[str, ModelFacts], rule: Convention = PRINTED,
) -> Placement:
    """Put a point on a law whose score is the mean of ``tasks`` in points (0–100).

    Returns:
        value, prediction interval and residual; or a sentence: the budget is unknown, the law's unit is not points,
        a task has no score or one by another metric.
    """
    have, used = own_budget(point.facts, models, law.axis, rule)
    counted = _counted(used, rule)
    log_budget = have.log10 if math.isfinite(have.log10) else None
    expected = predict(law, log_budget) if log_budget is not None else None
    common = {
        "point": point.name, "law": law.name, "log_budget": log_budget,
        "predicted": expected and expected.value, "low": expected and expected.low, "high": expected and expected.high,
        "extrapolated": expected and expected.extrapolated, "convention": used.name if counted else "",
    }  # fmt: skip
    if expected is None:
        return Placement(**common, sentence=_unknown(point, have))
    if law.unit != "points":
        return Placement(**common, sentence=f"{law.name} needs every task of the published matrix, which {point.name} was not scored on.")
    values, variances = [], []
    for task in tasks:
        score, metrics = point.scores.get(task), METRICS.get(task, ())
        if score is None:
            return Placement(**common, sentence=f"{point.name} was not scored on {task}, so it cannot be placed on {law.name}." + _expects(expected, counted))
        if metrics and score.metric not in metrics:
            return Placement(
                **common,
                sentence=f"{point.name}: {task} was scored by {score.metric}, the published scores by {metrics[0]}: not the same scale.",
            )
        values.append(100 * score.value)
        variances.append((100 * (score.stderr or math.nan)) ** 2)
    value = sum(values) / len(values)
    stderr = math.sqrt(sum(variances)) / len(values)
    residual = value - expected.value
    inside = expected.low <= value <= expected.high
    sentence = (
        f"{point.name} scores {value:.1f} on {law.name}; at its {BUDGET_WORDS[law.axis]}{counted} {expected.value:.1f} [{expected.low:.1f}, {expected.high:.1f}] "
        f"is expected: {residual:+.1f}, {'inside' if inside else 'outside'} the {expected.level:.0%} prediction interval."
    )
    if expected.extrapolated:
        sentence += " Its budget lies outside those of the published models: the line is extrapolated, so read nothing into this."
    return Placement(
        **common, value=value, stderr=None if math.isnan(stderr) else stderr, residual=residual, sentence=sentence
    )


def _expects(expected: Any, counted: str) -> str:
    if expected.extrapolated:
        return f" Its budget{counted} lies outside those of the published models, too."
    return f" At its budget{counted} {expected.value:.1f} [{expected.low:.1f}, {expected.high:.1f}] would be expected."


def _unknown(point: Point, have: Budget) -> str:
    what = BUDGET_WORDS[have.language]
    if have.tokens == 0:
        return f"{point.name} has seen no token of the law's language: its {what} has no logarithm."
    why = next((line for line in have.explanation if "not known" in line or "not in the table" in line), "")
    return f"The {what} of {point.name} is not known" + (f" ({why})." if why else ".")


def moved(point: Point, models: Mapping[str, ModelFacts], rule: Convention = PRINTED) -> dict[str, float | None]:
    """How far an adapter moved its base along each budget, decades: log10((D + added) / D) by language.

    None where the base's tokens are unknown or zero.
    """
    source = find_model(point.facts.source_model, models)
    if point.kind != "adapted" or source is None:
        return {}
    before, after = {}, {}
    for lang in LANGUAGES:
        have, used = own_budget(source, models, lang, rule)
        before[lang], after[lang] = have.value, budget(point.facts, models, lang, used).value
    return {
        lang: math.log10(after[lang] / before[lang]) if before[lang] and after[lang] else None for lang in LANGUAGES
    }
