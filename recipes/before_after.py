"""Before and after: what adaptation gained, what it made the base forget, and what quantization took.

Three families of tasks, on the same items for every model: the domain's own test, Japanese culture and
language-neutral tasks (:mod:`tsugiki.evaluate.suites`). Differences are paired, with intervals that draw documents
again (:mod:`tsugiki.evaluate.paired`). What was not measured is said, with the reason.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.progress import Progress

from tsugiki.artifacts import digest, read_json, sha256_file, write_jsonl
from tsugiki.errors import UserError
from tsugiki.evaluate.data import data_folder
from tsugiki.evaluate.domain import Answer, domain_answers, summarize
from tsugiki.evaluate.engine import Engine
from tsugiki.evaluate.paired import Item, compare_items, read_items
from tsugiki.progress import progress
from tsugiki.recipes.domains import Domain
from tsugiki.samples import EncodedSample, read_encoded

EXAMPLES_PER_KIND = 3
FAMILIES = ("domain", "culture", "neutral")
# Chosen by measurement on a base of 6M parameters. It answers none of the papers' tasks (0, or chance), so that their
# scores cannot fall; the probabilities of the right answers can, and base and adapted model differ clearly on all six
# after 100 items and 3 to 4 s a file. JEMHopQA is the one score that is not 0 throughout.
QUICK = ("tsugiki_saito_jemhopqa", "tsugiki_likelihood_niilc", "tsugiki_likelihood_jemhopqa", "tsugiki_likelihood_jmmlu_culture",
         "tsugiki_likelihood_jcommonsenseqa", "tsugiki_likelihood_mgsm_ja", "tsugiki_likelihood_xwinograd_ja")  # fmt: skip
CULTURE = ("niilc", "niilcqa", "jemhopqa", "jmmlu_part", "jaqket")  # what the papers call so, by their tasks' names
NEUTRAL = ("mgsm_ja", "mgsm_en", "jmmlu", "mmlu", "mmlu_prox_ja", "mmlu_prox_en", "gsm8k", "bbh", "jcom", "openbookqa", "hellaswag",
           "xwino", "humaneval", "jhumaneval")  # fmt: skip


@dataclass(frozen=True)
class BenchmarkChoice:
    """Which benchmarks a run measures beside its own test."""

    tasks: tuple[str, ...] = field(default=QUICK, metadata={"help": "tasks measured where their data is at hand; [] for none"})
    suites: tuple[str, ...] = field(default=(), metadata={"help": "whole suites: culture, neutral, saito19, domain or all"})
    limit: int = field(default=100, metadata={"help": "items of each task, the first ones; 0: all"})

    def __post_init__(self) -> None:
        if self.limit < 0:
            raise UserError(f"limit must be at least 0 (all items), not {self.limit}")


def before_after(
    run_dir: Path,
    domain: Domain,
    out: Path,
    *,
    items: int,
    benchmarks: BenchmarkChoice | None = None,
    data_dir: Path | None = None,
    tokenizer: Path | None = None,
    results: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Scores of base, adapted model and levels, side by side, and their paired differences.

    Args:
        run_dir: the run's folder, ``<domain>/<base>``.
        domain: the run's domain.
        out: folder for the answers (``answers-<model>.jsonl``, what a judge reads) and the benchmarks' files.
        items: how many test items, a prefix in hash order.
        benchmarks: which benchmarks; None: none.
        data_dir: folder of benchmark data; else ``$TSUGIKI_DATA``, else ``../shared/data``.
        tokenizer: folder of the base, whose tokenizer encodes the benchmarks' prompts; None: the files' own.
        results: the results table for the benchmarks' rows.
        say: told what is going on.

    Returns:
        ``scoring`` and ``answering`` (how the test was answered); ``rows``, one for each model and kind of test item (``task`` is ``domain`` or ``domain/kind``) and
        for each model and benchmark (with ``family``); ``changes``, paired differences of the adapted model against the
        base and, on benchmarks, of each level against the adapted model (:func:`tsugiki.evaluate.paired.compare_items`; on
        the domain's test the check stage has them); ``not_measured`` with the reasons; ``examples``, a few questions
        with every model's answer.
    """
    data = read_json(run_dir / "data" / "data.json")
    check = read_json(run_dir / "check" / "check.json")
    test = read_encoded(run_dir / "data" / "test.jsonl")[:items]
    files = {"base": run_dir / "gguf" / "base-F16.gguf", "adapted": run_dir / "gguf" / "model-F16.gguf"}
    options = {"scoring": domain.scoring, "max_new_tokens": domain.max_new_tokens, "end_of_turn": data["end_of_turn"]}

    def answered(model: str, bar: Progress) -> list[Answer]:
        task = bar.add_task(model, total=len(test), note="")
        with Engine(files[model], flash_attention=True) as engine:
            return domain_answers(engine, test, **options, on_done=lambda done: bar.update(task, completed=done))

    # A small model uses one thread well: the two files are answered side by side.
    with progress() as bar, ThreadPoolExecutor(2) as pool:
        answers = dict(zip(files, pool.map(lambda model: answered(model, bar), files), strict=True))
    examples = _examples(test)
    shown = {s.id: {m: next(a.text for a in rows if a.id == s.id) for m, rows in answers.items()} for s in examples}
    level = check["recommended"]["level"]
    if level != "F16":
        with Engine(run_dir / "levels" / f"model-{level}.gguf", flash_attention=True) as engine:
            for answer in domain_answers(engine, examples, **options):
                shown[answer.id][level] = answer.text
    for model, found in answers.items():
        _write_answers(out / f"answers-{model}.jsonl", test, found)
    rows = [row for model, found in answers.items() for row in _rows(model, domain, found)]
    changes = [domain_change(domain, answers)]
    missing: list[dict] = []
    if benchmarks and (benchmarks.tasks or benchmarks.suites):
        found = measure_benchmarks(run_dir, out / "benchmarks", benchmarks, data_dir=data_dir, tokenizer=tokenizer, results=results, say=say)
        rows += found["rows"]
        changes += found["changes"]
        missing = found["not_measured"]
    return {
        "scoring": domain.scoring, "answering": {**options, "items": items}, "rows": rows, "changes": changes, "not_measured": missing,
        "examples": [
            {"kind": s.kind, "prompt": s.prompt, "reference": s.completion, "answers": shown[s.id]} for s in examples
        ],
    }  # fmt: skip


def _examples(test: list[EncodedSample]) -> list[EncodedSample]:
    """The first few test items of each kind, in hash order: nobody chose them."""
    kinds: dict[str, list[EncodedSample]] = {}
    for s in test:
        kinds.setdefault(s.kind, []).append(s)
    few = EXAMPLES_PER_KIND if len(kinds) <= 4 else 1
    return [s for kind in sorted(kinds) for s in kinds[kind][:few]]


def _write_answers(path: Path, test: Sequence[EncodedSample], answers: Sequence[Answer]) -> None:
    write_jsonl(path, [
        {"id": s.id, "document": s.document, "kind": s.kind, "question": s.prompt, "reference": s.completion,
         "answer": a.text, "score": a.score, "finished": a.finished}
        for s, a in zip(test, answers, strict=True)
    ])  # fmt: skip


def answer_test(model: Path, test: Sequence[EncodedSample], path: Path, *, note: str, scoring: str, max_new_tokens: int, end_of_turn: int) -> None:
    """Answer test items with a GGUF and write them, scored, one a line; ``note`` stands beside the bar."""
    with Engine(model, flash_attention=True) as engine, progress() as bar:
        task = bar.add_task("answers", total=len(test), note=note)
        answers = domain_answers(
            engine, test, scoring=scoring, max_new_tokens=max_new_tokens, end_of_turn=end_of_turn,
            on_done=lambda done: bar.update(task, completed=done),
        )
    _write_answers(path, test, answers)


def level_answers(run_dir: Path, level: str, out: Path) -> Path:
    """A level's answers to the test items that the evaluate stage used; those already made are not made again.

    Returns:
        ``out/answers-<level>-<hash>.jsonl``.

    Raises:
        UserError: the stage has not been run, or there is no such level.
    """
    model = run_dir / "levels" / f"model-{level}.gguf"
    if not model.is_file():
        there = ", ".join(sorted(p.stem.removeprefix("model-") for p in (run_dir / "levels").glob("model-*.gguf")))
        raise UserError(f"the run has no level {level!r}", where=str(run_dir), hint=f"It has {there or 'none'}.")
    try:
        how = read_json(run_dir / "evaluate" / "evaluate.json")["answering"]
    except (FileNotFoundError, KeyError) as error:
        raise UserError("the stage `evaluate` has not been run", where=str(run_dir), hint="Run it first: tsugiki recipe run …") from error
    test = read_encoded(run_dir / "data" / "test.jsonl")[: how.pop("items")]
    path = out / f"answers-{level}-{digest([sha256_file(model), how, [s.ids for s in test]])[:8]}.jsonl"
    if not path.exists():
        answer_test(model, test, path, note=level, **how)
    return path


def _rows(model: str, domain: Domain, answers: list[Answer]) -> list[dict]:
    found = summarize(answers)
    groups = {domain.name: found} | {f"{domain.name}/{kind}": part for kind, part in found["kinds"].items()}
    return [
        {
            "model": model, "task": task, "metric": domain.scoring, "value": part["mean"], "stderr": part["stderr"],
            "n": part["n"], "unparsed": 0.0, "truncated": part["truncated"], "ties": part["ties"],
        }
        for task, part in groups.items()
    ]


# --- what changed -------------------------------------------------------------------------------------------------


def domain_change(domain: Domain, answers: Mapping[str, Sequence[Answer]]) -> dict:
    """What adaptation changed on the domain's own test; what levels took there is the check stage's to say."""
    items = {model: [Item(a.id, a.document, a.score) for a in found] for model, found in answers.items()}
    return {
        "family": "domain", "task": domain.name, "metric": domain.scoring, "from": "base", "to": "adapted",
        **compare_items(items["base"], items["adapted"]),
    }  # fmt: skip


# --- benchmarks ---------------------------------------------------------------------------------------------------


def measure_benchmarks(
    run_dir: Path,
    out: Path,
    choice: BenchmarkChoice,
    *,
    data_dir: Path | None = None,
    tokenizer: Path | None = None,
    results: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, list[dict]]:
    """The benchmarks whose data is at hand, on base, adapted model and every level of a run.

    A task of ``choice.tasks`` is never fetched: without its data it is not measured, and that is said. Whole suites were
    asked for by name, and are had as ``tsugiki evaluate run`` has them.

    Returns:
        ``rows``, ``changes`` and ``not_measured`` as in :func:`before_after`.
    """
    folder, named = data_folder(data_dir)
    if folder is None and not choice.suites:
        why = "there is no folder of benchmark data (--data-dir, TSUGIKI_DATA, or ../shared/data)"
        return {"rows": [], "changes": [], "not_measured": [{"task": task, "why": f"{why}. {_source(task)}"} for task in choice.tasks]}
    from tsugiki.evaluate.run import BenchmarkSettings, items_path, run_benchmarks, run_models
    from tsugiki.evaluate.suites import load_benchmarks

    loaded, missing = [], []
    if choice.suites:  # asked for by name: what is not in the folder may come from the hub, as with `evaluate run`
        with _data_from(folder if named else None):
            found, absent = load_benchmarks(choice.suites)
        loaded += found
        missing += [{"task": task, "why": _brief(why)} for task, why in absent.items()]
    with _data_from(folder):
        for task in choice.tasks if folder else ():
            if task not in {b.name for b in loaded}:
                try:
                    loaded += load_benchmarks((), (task,))[0]
                except UserError as error:
                    missing.append({"task": task, "why": f"{_brief(str(error))}. {_source(task)}"})
    run = f"{run_dir.parent.name}/{run_dir.name}"
    models = run_models(run_dir.parent.parent, run, tokenizer=tokenizer)
    settings = BenchmarkSettings(limit=choice.limit or None)
    scored, unfit = _one_by_one(loaded, lambda part: run_benchmarks(models, part, settings, out=out, results=results, say=say))
    rows, changes = [], []
    for benchmark in loaded:
        family = family_of(benchmark.metadata, benchmark.law_task)
        by_model = {r["model"].removeprefix(f"{run}/"): r for r in scored if r["main"] and r["name"] == benchmark.name}
        kept = {name: read_items(items_path(out, r["model"], benchmark.name)) for name, r in by_model.items()}
        rows += [
            {"model": name, "family": family, **{k: r[k] for k in ("task", "name", "metric", "value", "stderr", "n", "unparsed", "truncated", "ties")}}
            for name, r in by_model.items()
        ]
        for name, row in by_model.items():
            if name != "base":
                before = "base" if name == "adapted" else "adapted"
                common = {"family": family, "task": row["task"], "name": benchmark.name, "metric": row["metric"], "from": before, "to": name}
                changes.append(common | _change(kept[before], kept[name], by_model[before], row))
    missing += unfit
    return {"rows": rows, "changes": changes, "not_measured": missing}


def _source(task: str) -> str:
    """Where the data of a bundled task is had, and under which licence."""
    from tsugiki.evaluate.suites import TASKS, task_files

    meta = task_files(TASKS).get(task, {}).get("metadata") or {}
    places = [f"github.com/{meta['github']}, commit {meta['commit']}" if meta.get("github") else "",
              f"huggingface.co/datasets/{meta['hub_id']}" if meta.get("hub_id") else ""]
    return f"Its data: {' or '.join(filter(None, places))} ({meta.get('licence')})." if any(places) else ""


def _one_by_one(loaded: Sequence[Any], run: Callable[[Sequence[Any]], list[dict]]) -> tuple[list[dict], list[dict]]:
    """All benchmarks in one go, so that each model is opened once; where one does not fit these models, each by itself."""
    try:
        return run(loaded) if loaded else [], []
    except UserError as error:
        if len(loaded) == 1:
            return [], [{"task": loaded[0].name, "why": _brief(str(error))}]
    parts = [_one_by_one([benchmark], run) for benchmark in loaded]
    return [r for rows, _ in parts for r in rows], [m for _, missing in parts for m in missing]


def _change(before: list[Item], after: list[Item], was: dict, now: dict) -> dict:
    """A paired difference; of a score that items do not have (a corpus's BLEU) the plain one, without an interval."""
    try:
        return compare_items(before, after)
    except UserError as error:
        return {
            "n": now["n"], "documents": None, "before": was["value"], "after": now["value"], "difference": now["value"] - was["value"],
            "ci": None, "change": "open", "why": _brief(str(error)),
        }  # fmt: skip


def family_of(metadata: Mapping[str, Any], task: str) -> str:
    """``culture``, ``neutral`` or ``domain`` by a task's suites or ``family``, else by its name; ``other`` for what is in none."""
    suites = metadata.get("suite") or []
    suites = [*([suites] if isinstance(suites, str) else suites), metadata.get("family")]
    named = next((f for f in ("culture", "neutral", "domain") if f in suites), "")
    return named or ("culture" if task in CULTURE else "neutral" if task in NEUTRAL else "other")


def _brief(text: str) -> str:
    """The first problem of an error, in one line."""
    lines = [line.strip().removeprefix("- ") for line in text.splitlines() if line.strip()]
    line = lines[1] if len(lines) > 1 and lines[0].endswith("problem(s)") else lines[0]
    line = re.sub(r"(?<![\w.:/])/(?:[\w.-]+/)+([\w.-]+)", r"\1", line)  # a report names no folder of this machine
    return line if len(line) <= 300 else f"{line[:299]}…"


@contextmanager
def _data_from(folder: Path | None) -> Iterator[None]:
    """Read benchmark data from this folder alone: a named folder means that nothing is fetched."""
    before = os.environ.get("TSUGIKI_DATA")
    if folder is not None:
        os.environ["TSUGIKI_DATA"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("TSUGIKI_DATA", None)
        else:
            os.environ["TSUGIKI_DATA"] = before
