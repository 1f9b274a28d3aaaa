"""The domain score of the untouched base and of the adapted model, on the whole test set."""

from __future__ import annotations

from pathlib import Path

from tsugiki.artifacts import read_json
from tsugiki.evaluate.domain import Answer, domain_answers, summarize
from tsugiki.evaluate.engine import Engine
from tsugiki.progress import progress
from tsugiki.recipes.domains import Domain
from tsugiki.samples import EncodedSample, read_encoded

EXAMPLES_PER_KIND = 3


def before_after(run_dir: Path, domain: Domain) -> dict:
    """Answers of the base and the adapted model in F16 to every test item, and of the recommended level to the examples.

    Returns:
        ``{"scoring", "rows", "examples"}``: one row for each model and kind of item (``task`` is ``domain`` or
        ``domain/kind``), and a few questions with every model's answer.
    """
    data = read_json(run_dir / "data" / "data.json")
    check = read_json(run_dir / "check" / "check.json")
    test = read_encoded(run_dir / "data" / "test.jsonl")
    files = {"base": run_dir / "gguf" / "base-F16.gguf", "adapted": run_dir / "gguf" / "model-F16.gguf"}
    options = {"scoring": domain.scoring, "max_new_tokens": domain.max_new_tokens, "end_of_turn": data["end_of_turn"]}
    answers: dict[str, list[Answer]] = {}
    with progress() as bar:
        for model, path in files.items():
            task = bar.add_task(model, total=len(test), note="")
            with Engine(path, flash_attention=True) as engine:
                answers[model] = domain_answers(
                    engine, test, **options, on_done=lambda done, task=task: bar.update(task, completed=done)
                )
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
