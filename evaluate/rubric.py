"""Rubrics: what a judge is asked, and how its answer is read. YAML files with a version, hashed with all they use."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from tsugiki.artifacts import digest
from tsugiki.errors import UserError, raise_problems
from tsugiki.evaluate.data import data_folder, load_set

RUBRICS = ("domain", "mt-bench-ja", "mt-bench-en")
MT_BENCH = Path("benchmarks") / "mt_bench_ja"
MT_BENCH_SOURCE = "They are in https://github.com/llm-jp/llm-jp-judge at 4392b3b00ddd (Apache-2.0), in its folders prompt/."
_PROMPTS = ("single-v1", "single-v1-multi-turn", "single-math-v1", "single-math-v1-multi-turn")


@dataclass(frozen=True)
class Prompt:
    """One prompt to a judge: ``{name}`` in ``text`` is filled; ``verdict`` finds the rating in its group 1."""

    system: str
    text: str
    verdict: str


@dataclass(frozen=True)
class Rubric:
    """What a judge is asked.

    Attributes:
        name, version: which rubric; any change of a word raises the version.
        kind: ``single`` (a question and an answer) or ``two-turn`` (MT-Bench).
        scale: lowest and highest rating; ratings are whole numbers.
        prompts: by name: ``plain`` and ``reference``; for two turns also ``plain-2`` and ``reference-2``.
        max_tokens: the longest verdict.
        max_new_tokens: the longest answer of a two-turn benchmark.
        questions: of a two-turn benchmark: id → ``{"category", "turns"}``, in the benchmark's order.
        references: id → the two reference answers, for the questions whose judge sees them.
        temperatures: of the answers, by category.
    """

    name: str
    version: int
    kind: str
    scale: tuple[int, int]
    prompts: Mapping[str, Prompt]
    max_tokens: int
    max_new_tokens: int = 0
    questions: Mapping[str, dict] = field(default_factory=dict)
    references: Mapping[str, Sequence[str]] = field(default_factory=dict)
    temperatures: Mapping[str, float] = field(default_factory=dict)

    @cached_property
    def hash(self) -> str:
        """Of everything that decides what a judge reads: prompts, scale, questions, references."""
        prompts = {k: [p.system, p.text, p.verdict] for k, p in self.prompts.items()}
        return digest([self.name, self.version, self.scale, prompts, self.max_tokens, self.questions, self.references])[:16]


def load_rubric(name: str, data_dir: Path | None = None) -> Rubric:
    """A rubric by name; MT-Bench's questions, references and prompts are in the data folder (:mod:`tsugiki.evaluate.data`).

    Raises:
        UserError: an unknown name; MT-Bench's files are not there or not as they should be.
    """
    if name not in RUBRICS:
        raise UserError(f"no rubric is named {name!r}", hint=f"The rubrics: {', '.join(RUBRICS)}.")
    text = files("tsugiki.evaluate").joinpath("rubrics", f"{name}.yaml").read_text(encoding="utf-8")
    content = yaml.safe_load(text)
    common = {k: content[k] for k in ("name", "version", "kind", "max_tokens")} | {"scale": tuple(content["scale"])}
    if content["kind"] == "single":
        prompts = {
            key: Prompt(content["system"], content[source], content["verdict"])
            for key, source in (("reference", "prompt"), ("plain", "prompt_without_reference"))
        }
        return Rubric(**common, prompts=prompts)
    rows = {key: load_set(content[key], data_dir)["test"] for key in ("questions", "references")}
    questions = {str(q["question_id"]): q for q in rows["questions"]}
    answers = {str(r["question_id"]): r["choices"][0]["turns"] for r in rows["references"]}
    wanted = [q for q, row in questions.items() if row["category"] in content["with_reference"]]
    raise_problems(
        [f"question {q} ({questions[q]['category']}) has no two reference answers" for q in wanted if len(answers.get(q, ())) != 2]
        + [f"question {q} has {len(row['turns'])} turns, not 2" for q, row in questions.items() if len(row["turns"]) != 2],
        what=name,
    )
    folder, _ = data_folder(data_dir)
    return Rubric(
        **common,
        prompts=_benchmark_prompts(folder / MT_BENCH / content["prompts"]),
        max_new_tokens=content["max_new_tokens"],
        questions={q: {"category": row["category"], "turns": row["turns"]} for q, row in questions.items()},
        references={q: answers[q] for q in wanted},
        temperatures=content["temperatures"],
    )


def _benchmark_prompts(path: Path) -> dict[str, Prompt]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        found = {k: Prompt(content[k]["system_prompt"].strip(), content[k]["prompt_template"], content[k]["regex"]) for k in _PROMPTS}
    except FileNotFoundError as error:
        raise UserError("MT-Bench's judge prompts are not there", where=str(path), hint=MT_BENCH_SOURCE) from error
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"not MT-Bench's judge prompts: {error}", where=str(path), hint=MT_BENCH_SOURCE) from error
    return dict(zip(("plain", "plain-2", "reference", "reference-2"), (found[k] for k in _PROMPTS), strict=True))


def fill(template: str, values: Mapping[str, str]) -> str:
    """Put values for ``{name}``, once: braces inside a value stay as they are.

    Raises:
        KeyError: a name without a value.
    """
    return re.sub(r"\{([a-z_]+[0-9_]*)\}", lambda m: values[m.group(1)], template)


def read_verdict(text: str, prompt: Prompt, scale: tuple[int, int]) -> tuple[int | None, str]:
    """The rating in a judge's answer and ``""``, or ``None`` and why it is malformed.

    Malformed is an answer without a rating, with one outside the scale, or with several that are not the same: nothing
    is guessed.
    """
    found = {int(m) for m in re.findall(prompt.verdict, text)}
    if not found:
        return None, "no rating" if text.strip() else "empty"
    if len(found) > 1:
        return None, "several ratings"
    rating = found.pop()
    return (rating, "") if scale[0] <= rating <= scale[1] else (None, "outside the scale")


def requests(rubric: Rubric, answers: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What to ask about each answer: ``{"id", "document", "kind", "prompt", "messages"}``, two of them for two turns.

    Args:
        answers: ``{"id", "question", "answer", "reference"?, "document"?, "kind"?}``; for two turns ``{"id", "turns"}``
            with the two answers to the benchmark's question of that id.
    """
    asked = []
    for row in answers:
        if rubric.kind == "single":
            name = "reference" if row.get("reference") else "plain"
            values = {k: str(row.get(k) or "") for k in ("question", "reference", "answer")}
            asked.append(_request(rubric, name, values, row["id"], row.get("document") or row["id"], row.get("kind") or ""))
            continue
        question, references = rubric.questions[row["id"]], rubric.references.get(row["id"])
        values = {
            "question": question["turns"][0], "answer": row["turns"][0],
            **{f"question_{i}": question["turns"][i - 1] for i in (1, 2)},
            **{f"answer_{i}": row["turns"][i - 1] for i in (1, 2)},
            **({f"ref_answer_{i}": references[i - 1] for i in (1, 2)} if references else {}),
        }  # fmt: skip
        name = "reference" if references else "plain"
        for turn, suffix in ((1, ""), (2, "-2")):
            asked.append(_request(rubric, name + suffix, values, f"{row['id']}/{turn}", row["id"], question["category"]))
    return asked


def _request(rubric: Rubric, name: str, values: dict[str, str], id: str, document: str, kind: str) -> dict[str, Any]:
    prompt = rubric.prompts[name]
    messages = [{"role": "system", "content": prompt.system}] if prompt.system else []
    messages.append({"role": "user", "content": fill(prompt.text, values)})
    return {"id": id, "document": document, "kind": kind, "prompt": name, "messages": messages}
