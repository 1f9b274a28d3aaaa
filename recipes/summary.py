"""``summary.json``: the stable reading of one run, for programs.

The stage files (``sweep/sweep.json`` and so on) may gain fields at any time; the summary has exactly the keys
of :data:`SCHEMA` and no others. A stage that has not run yet leaves ``null`` (or an empty list).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tsugiki.artifacts import read_json, write_json
from tsugiki.errors import UserError, raise_problems
from tsugiki.recipes.judged import judged_changes, judged_scores, read_judged

STAGES = ("data", "sweep", "gguf", "levels", "check", "evaluate")
VERDICTS = ("reference", "pass", "degraded", "inconclusive")

# A dict is an object with exactly these keys, a list of one entry an array of such entries, a text names a type;
# "?" at its end allows null, and so does a pair (object, None). An interval is [low, high].
SCHEMA: dict[str, Any] = {
    "domain": "string",
    "base": "string",
    "samples": ({"train": "count", "valid": "count", "test": "count", "dropped": "count"}, None),
    "sweep": (
        {
            "points": [
                {
                    "n": "count",
                    "seed": "count",
                    "epochs": "number",
                    "nll": "number",
                    "nll_ci": "interval?",
                    "bpc": "number?",
                    "train_tokens": "count",
                    "seconds": "number",
                }
            ],
            "optimum": (
                {
                    "n": "count",
                    "nll": "number",
                    "nll_ci": "interval?",
                    "one_se_n": "count",
                    "p_best": "number?",
                    "overfits_at": "count?",
                },
                None,
            ),
        },
        None,
    ),
    "parity": ({"texts": "count", "identical": "count", "rate": "number"}, None),
    "levels": [
        {
            "level": "string",
            "bytes": "count",
            "bpw": "number?",
            "nll": "number",
            "delta_nll": "number",
            "delta_ci": "interval?",
            "kld_mean": "number",
            "kld_p99": "number",
            "top1": "number",
            "score": "number?",
            "score_ci": "interval?",
            "prompt_tok_s": "number?",
            "gen_tok_s": "number?",
            "seconds_per_answer": "number?",
            "peak_rss": "count?",
            "verdict": "verdict",
            "why": "string",
        }
    ],
    "recommended": ({"level": "string", "path": "string", "sha256": "string", "why": "string"}, None),
    "benchmarks": [
        {
            "model": "string",
            "task": "string",
            "metric": "string",
            "value": "number",
            "stderr": "number?",
            "n": "count",
            "unparsed": "number?",
        }
    ],
    "changes": [
        {
            "family": "string",
            "task": "string",
            "metric": "string",
            "from": "string",
            "to": "string",
            "n": "count",
            "before": "number",
            "after": "number",
            "difference": "number",
            "ci": "interval?",
            "change": "string",
        }
    ],
    "report": "string",
}


def read_stages(run_dir: Path) -> dict[str, Any]:
    """Read the JSON file of every stage that has one.

    Returns:
        stage name to the content of ``<stage>/<stage>.json``; stages without a file are absent.

    Raises:
        UserError: a file is not JSON or not an object.
    """
    found = {}
    for stage in STAGES:
        path = run_dir / stage / f"{stage}.json"
        if not path.exists():
            continue
        try:
            value = read_json(path)
        except ValueError as error:
            raise UserError(
                f"not valid JSON: {error}", where=f"{stage}/{path.name}", hint=f"delete the folder {stage}/ and run it again"
            ) from error
        if not isinstance(value, dict):
            raise UserError(f"expected an object, found {type(value).__name__}", where=f"{stage}/{path.name}")
        found[stage] = value
    return found


def run_name(run_dir: Path, data: dict[str, Any]) -> tuple[str, str]:
    """(domain, base) of a run folder ``runs/<domain>/<base>``; the data stage's own words win."""
    run_dir = run_dir.resolve()
    return data.get("domain") or run_dir.parent.name, data.get("base") or run_dir.name


def level_rows(stages: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a level, largest first and F16 on top: what ``levels`` wrote joined with what ``check`` measured.

    Rows have the keys of both files; F16 gets its file's facts from ``gguf`` and, as the reference, the
    differences 0. Levels that were not checked have the written facts only.
    """
    written = {row["level"]: _placed(row, "levels") for row in stages.get("levels", {}).get("levels", [])}
    checked = {row["level"]: row for row in stages.get("check", {}).get("levels", [])}
    reference = next((row for row in checked.values() if row.get("verdict") == "reference"), {})
    reference = stages.get("check", {}).get("reference") or reference
    top = reference.get("level", "F16")
    rows = []
    if "gguf" in stages or reference:
        rows.append({**_file_facts(stages.get("gguf", {})), **written.pop(top, {}), **reference, "level": top})
        checked.pop(top, None)
        if reference:
            zero = {"delta_nll": 0.0, "delta_ci": [0.0, 0.0], "kld_mean": 0.0, "kld_p99": 0.0, "top1": 1.0}
            rows[0] = {**rows[0], **{k: v for k, v in zero.items() if rows[0].get(k) is None}}
            rows[0]["verdict"] = "reference"
            rows[0]["why"] = rows[0].get("why") or {
                "en": "The file every level is compared with.",
                "ja": "各量子化レベルを比べる基準のファイルです。",
            }
    names = list(written) + [name for name in checked if name not in written]
    rest = [{**written.get(name, {}), **checked.get(name, {}), "level": name} for name in names]
    return rows + sorted(rest, key=lambda row: -row.get("bytes", 0))


def _file_facts(gguf: dict[str, Any]) -> dict[str, Any]:
    return _placed({k: gguf[k] for k in ("path", "bytes", "sha256", "bpw", "types") if k in gguf}, "gguf")


def _placed(row: dict[str, Any], stage: str) -> dict[str, Any]:
    """A stage names its files from its own folder; here they are named from the run's, never by a machine's path."""
    return {**row, "path": f"{stage}/{Path(row['path']).name}"} if row.get("path") else row


def english(why: Any) -> str:
    """The English half of a ``{"en", "ja"}`` text (the summary is for programs); a plain text stays."""
    return why.get("en", "") if isinstance(why, dict) else str(why or "")


def _pick(row: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in schema if key in row}


def build_summary(run_dir: Path | str) -> dict[str, Any]:
    """Join the stage files of one run into the documented summary and write ``summary.json``.

    Paths in it are relative to ``run_dir``; ``why`` is English (both languages are in ``check.json``). Units: NLL
    in nats per completion token, ``bpc`` in bits per character, sizes in bytes, ``peak_rss`` in bytes, times in
    seconds, shares and scores from 0 to 1.

    Raises:
        UserError: a stage file lacks a value that the summary promises; every one is listed by its path.
    """
    run_dir = Path(run_dir)
    stages = read_stages(run_dir)
    domain, base = run_name(run_dir, stages.get("data", {}))
    point, optimum = SCHEMA["sweep"][0]["points"][0], SCHEMA["sweep"][0]["optimum"][0]
    summary: dict[str, Any] = {"domain": domain, "base": base, "samples": None, "sweep": None, "parity": None}
    if "data" in stages:
        summary["samples"] = _pick(stages["data"].get("samples", {}), SCHEMA["samples"][0])
    if "sweep" in stages:
        sweep = stages["sweep"]
        best = sweep.get("optimum")
        summary["sweep"] = {
            "points": [_pick(row, point) for row in sweep.get("points", [])],
            "optimum": _pick(best, optimum) if best else None,
        }
    if "gguf" in stages:
        summary["parity"] = _pick(stages["gguf"].get("parity", {}), SCHEMA["parity"][0])
    check = stages.get("check", {})
    checked = {row["level"] for row in [check.get("reference") or {}, *check.get("levels", [])] if "level" in row}
    rows = [row for row in level_rows(stages) if row["level"] in checked]
    summary["levels"] = [
        _pick({"bpw": None, **row, "why": english(row.get("why"))}, SCHEMA["levels"][0]) for row in rows
    ]
    summary["recommended"] = None
    if choice := check.get("recommended"):
        row = next((row for row in rows if row["level"] == choice.get("level")), {})
        summary["recommended"] = _pick({**row, **choice, "why": english(choice.get("why"))}, SCHEMA["recommended"][0])
    judged = read_judged(run_dir)
    benchmarks = [*stages.get("evaluate", {}).get("rows", []), *_level_scores(stages, domain), *judged_scores(judged, domain)]
    summary["benchmarks"] = [_pick({"stderr": None, "unparsed": None, **row}, SCHEMA["benchmarks"][0]) for row in benchmarks]
    changes = stages.get("evaluate", {}).get("changes", [])
    changes = [*changes, *level_changes(check, domain, stages["evaluate"].get("scoring", "score"))] if changes else []
    changes = [*changes, *judged_changes(judged, domain)]
    summary["changes"] = [_pick({"ci": None, **row}, SCHEMA["changes"][0]) for row in changes]
    summary["report"] = "report.html"
    raise_problems(
        validate_summary(summary),
        what="The stage files do not give the summary that is promised",
        hint="These files are from another version of tsugiki, or were edited: delete the stage's folder and run again.",
    )
    write_json(run_dir / "summary.json", summary)
    return summary


def _level_scores(stages: dict[str, Any], domain: str) -> list[dict[str, Any]]:
    """The domain's score of each level as rows beside those of base and adapted model, on the items of the check."""
    evaluated, check = stages.get("evaluate", {}), stages.get("check", {})
    there = {row["model"] for row in evaluated.get("rows", []) if row["task"] == domain}
    if not there:
        return []
    return [
        {"model": row["level"], "task": domain, "metric": evaluated.get("scoring", "score"), "value": row["score"],
         "stderr": row.get("score_se"), "n": check.get("items", check.get("samples")), "unparsed": 0.0}
        for row in check.get("levels", [])
        if row.get("score") is not None and row.get("verdict") != "reference" and row["level"] not in there
    ]  # fmt: skip


def level_changes(check: dict[str, Any], domain: str, scoring: str) -> list[dict[str, Any]]:
    """What each level took on the domain's test against the adapted model in F16: the check's own paired differences.

    Rows like those of ``changes`` in ``evaluate.json`` (:func:`tsugiki.recipes.before_after.before_after`).
    """
    apart = [check["reference"]] if check.get("reference") else []
    rows = [row for row in (*apart, *check.get("levels", [])) if row.get("score") is not None]
    reference = next((row for row in rows if row.get("verdict") == "reference"), apart[0] if apart else None)
    changes = []
    for row in rows:
        difference, ci = row.get("delta_score"), row.get("delta_score_ci")
        if reference is not None and row is not reference and difference is not None:
            changes.append({
                "family": "domain", "task": domain, "metric": scoring, "from": "adapted", "to": row["level"],
                "n": check.get("items", check.get("samples")), "documents": check.get("documents"), "before": reference["score"],
                "after": row["score"], "difference": difference, "ci": list(ci) if ci else None,
                "change": "open" if not ci or ci[0] <= 0 <= ci[1] else "gained" if difference > 0 else "lost",
            })  # fmt: skip
    return changes


def validate_summary(summary: Any) -> list[str]:
    """Every way in which ``summary`` departs from :data:`SCHEMA`, each with its path; an empty list when none."""
    return _problems(summary, SCHEMA, "")


def _problems(value: Any, schema: Any, path: str) -> list[str]:
    if isinstance(schema, tuple):
        return [] if value is None else _problems(value, schema[0], path)
    where = path or "(top)"
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            return [f"{where}: expected an object, found {_kind(value)}"]
        inside = f"{path}." if path else ""
        problems = [f"{inside}{key}: missing" for key in schema if key not in value]
        problems += [f"{inside}{key}: unknown" for key in value if key not in schema]
        for key in schema:
            if key in value:
                problems += _problems(value[key], schema[key], f"{inside}{key}")
        return problems
    if isinstance(schema, list):
        if not isinstance(value, list):
            return [f"{where}: expected a list, found {_kind(value)}"]
        return [p for i, entry in enumerate(value) for p in _problems(entry, schema[0], f"{path}[{i}]")]
    if value is None and schema.endswith("?"):
        return []
    expected = schema.rstrip("?")
    return [] if _is(value, expected) else [f"{where}: expected {expected}, found {_kind(value)}"]


def _is(value: Any, expected: str) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool) and value - value == 0
    if expected == "string":
        return isinstance(value, str)
    if expected == "count":
        return number and value >= 0 and value == int(value)
    if expected == "number":
        return number
    if expected == "interval":
        return (
            isinstance(value, list) and len(value) == 2 and all(_is(end, "number") for end in value) and value[0] <= value[1]
        )
    return value in VERDICTS


def _kind(value: Any) -> str:
    return "null" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
