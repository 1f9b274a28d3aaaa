"""What judges said of a run's answers: for the report, the summary and the results table.

``tsugiki evaluate judge RUN`` leaves ``<run>/judge-<rubric>/judge.json``. A judge is another model's opinion, so it stands
beside the deterministic score and never in its place.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tsugiki.artifacts import digest, read_json, read_jsonl, write_json
from tsugiki.evaluate.judge import answers_digest
from tsugiki.results import Result, replace_results


def read_judged(run_dir: Path) -> list[dict[str, Any]]:
    """Every ``judge.json`` of a run, by rubric; its rows of ``models`` have ``stale``: the model, or its answers to the test, are
    others now."""
    found, files = [], model_files(run_dir)
    for path in sorted(run_dir.glob("judge-*/judge.json")):
        verdicts = read_json(path)
        for row in verdicts["models"]:
            row["stale"] = row.get("file") is not None and row["file"] != files.get(row["model"])
            answers = run_dir / "evaluate" / f"answers-{row['model']}.jsonl"
            if not row.get("turns") and answers.is_file():  # a two-turn benchmark has answers of its own
                row["stale"] |= answers_digest(read_jsonl(answers)[: row["n"]]) != row["answers"]
        found.append(verdicts)
    return found


def model_files(run_dir: Path) -> dict[str, str]:
    """The hashes of a run's files by model (base, adapted, each level), as its stages recorded them."""
    records = [run_dir / stage / "stage.json" for stage in ("gguf", "levels")]
    outputs = {o["path"]: o["sha256"] for path in records if path.is_file() for o in read_json(path).get("outputs", [])}
    names = {"base-F16.gguf": "base", "model-F16.gguf": "adapted"}
    return {names.get(path, Path(path).stem.removeprefix("model-")): sha for path, sha in outputs.items() if path.endswith(".gguf")}


def keep_judged(run_dir: Path, path: Path, verdicts: dict[str, Any], domain: str, base: str) -> None:
    """Put a judge's mean ratings (the content of ``judge.json`` at ``path``) into the results table beside the run, and into
    its summary and report where it has them; which model files they are of is noted in ``judge.json``."""
    files = model_files(run_dir)
    write_json(path, verdicts | {"models": [{**row, "file": files.get(row["model"])} for row in verdicts["models"]]})
    run = f"{run_dir.parent.name}/{run_dir.name}"
    rubric, judge = verdicts["rubric"], verdicts["judge"]
    rows = [
        Result(f"{run}/{m['model']}", base, task(verdicts, domain), metric(verdicts), m["mean"],
               adapter="" if m["model"] == "base" else run, level="F16" if m["model"] in ("base", "adapted") else m["model"],
               stderr=m["stderr"], n=m["rated"],
               settings={"rubric": rubric, "judge": judge, "answers": m["n"], "malformed": m["malformed"], "ci": m["ci"]},
               provenance=digest([rubric["hash"], judge, m["answers"]]))
        for m in verdicts["models"] if m["mean"] is not None
    ]  # fmt: skip
    replace_results(run_dir.parent.parent / "results.sqlite", run, f"judge {rubric['name']}", rows)
    if (run_dir / "report.html").exists():
        from tsugiki.recipes.report import write_report
        from tsugiki.recipes.summary import build_summary

        build_summary(run_dir)
        write_report(run_dir)


def metric(verdicts: dict[str, Any]) -> str:
    """What a judge's rating is called beside other scores: ``judge domain 1.0 (0 to 3)``."""
    rubric = verdicts["rubric"]
    return f"judge {rubric['name']} {rubric['version']} ({rubric['scale'][0]} to {rubric['scale'][1]})"


def judged_scores(judged: list[dict[str, Any]], domain: str) -> list[dict[str, Any]]:
    """Mean ratings as rows like those of other scores; ``unparsed`` is the share of malformed verdicts."""
    return [
        {"model": m["model"], "task": task(v, domain), "metric": metric(v), "value": m["mean"], "stderr": m["stderr"], "n": m["rated"],
         "unparsed": 1 - m["rated"] / m["n"]}
        for v in judged for m in v["models"] if m["mean"] is not None and not m["stale"]
    ]  # fmt: skip


def judged_changes(judged: list[dict[str, Any]], domain: str) -> list[dict[str, Any]]:
    """Paired differences of the ratings, as rows like those of ``changes`` in ``evaluate.json``."""
    stale = [{m["model"] for m in v["models"] if m["stale"]} for v in judged]
    return [
        {"family": "domain", "task": task(v, domain), "metric": metric(v), **{k: p[k] for k in ("from", "to", "n", "before", "after", "difference", "ci", "change")}}
        for v, old in zip(judged, stale, strict=True) for p in v["paired"] if not {p["from"], p["to"]} & old
    ]  # fmt: skip


def task(verdicts: dict[str, Any], domain: str) -> str:
    """The domain's own test, or the benchmark that the rubric belongs to."""
    return domain if verdicts["rubric"]["name"] == "domain" else verdicts["rubric"]["name"]
