"""The domain score of the untouched base and of the adapted model, on the same test items."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.progress import Progress

from tsugiki.artifacts import read_json
from tsugiki.evaluate.domain import Answer, domain_answers, summarize
from tsugiki.evaluate.engine import Engine
from tsugiki.progress import progress
from tsugiki.recipes.domains import Domain
from tsugiki.samples import EncodedSample, read_encoded

EXAMPLES_PER_KIND = 3


def before_after(run_dir: Path, domain: Domain, *, items: int) -> dict:
    """Answers of the base and the adapted model in F16, and of the recommended level to the examples.

    Args:
        run_dir: the run's folder.
        domain: the run's domain.
        items: how many test items, a prefix in hash order.

    Returns:
        ``{"scoring", "rows", "examples"}``: one row for each model and kind of item (``task`` is ``domain`` or
        ``domain/kind``), and a few questions with every model's answer.
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
    return {
        "scoring": domain.scoring,
        "rows": [row for model, rows in answers.items() for row in _rows(model, domain, rows)],
        "examples": [
            {"kind": s.kind, "prompt": s.prompt, "reference": s.completion, "answers": shown[s.id]} for s in examples
        ],
    }


def _examples(test: list[EncodedSample]) -> list[EncodedSample]:
    """The first few test items of each kind, in hash order: nobody chose them."""
    kinds: dict[str, list[EncodedSample]] = {}
    for s in test:
        kinds.setdefault(s.kind, []).append(s)
    few = EXAMPLES_PER_KIND if len(kinds) <= 4 else 1
    return [s for kind in sorted(kinds) for s in kinds[kind][:few]]


def _rows(model: str, domain: Domain, answers: list[Answer]) -> list[dict]:
    found = summarize(answers)
    groups = {domain.name: found} | {f"{domain.name}/{kind}": part for kind, part in found["kinds"].items()}
    return [
        {
            "model": model, "task": task, "metric": domain.scoring, "value": part["mean"], "stderr": part["stderr"],
            "n": part["n"], "unparsed": 0.0, "truncated": part["truncated"],
        }
        for task, part in groups.items()
    ]
