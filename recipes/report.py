"""The report: one self-contained HTML page for the people who decide, from the stage files of a run.

Nothing is fetched by the page: style, script and data are inside it. A stage that has not run leaves its section
out; the numbers are those of the stage files and are not computed again here.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from jinja2 import Undefined
from markupsafe import Markup

from tsugiki.artifacts import read_json, write_text
from tsugiki.page import environment
from tsugiki.page import render as fill
from tsugiki.quantize.notes import file_notes
from tsugiki.quantize.sensitivity import heat_map
from tsugiki.recipes.judged import read_judged
from tsugiki.recipes.summary import STAGES, level_changes, level_rows, read_stages, run_name

Text = dict[str, str]

KIND_NAMES: dict[str, tuple[str, str]] = {
    "all": ("全体", "All items"),
    "rule": ("規則を未知の機器に", "Rules on unseen devices"),
    "seen_fact": ("既知の事実を別の言い方で", "Known facts, new wording"),
    "fact": ("既知の事実を別の言い方で", "Known facts, new wording"),
    "unanswerable": ("答えのない質問", "Unanswerable"),
    "item": ("号の内容", "Items"),
    "text": ("条文", "Article text"),
    "cont": ("条文の続き", "Continuation"),
    "which": ("該当条文", "Which article"),
    "duty": ("義務", "Duties"),
    "permit": ("許可・届出", "Permits"),
    "latter": ("後段", "Second sentence"),
    "proviso": ("ただし書", "Provisos"),
    "ex_proviso": ("ただし書の抜き出し", "Extract a proviso"),
    "ex_item": ("号の抜き出し", "Extract an item"),
    "ex_def": ("定義の抜き出し", "Extract a definition"),
    "itemcol": ("号の表", "Item columns"),
    "def": ("定義", "Definitions"),
    "prohibit": ("禁止", "Prohibitions"),
    "penalty": ("罰則", "Penalties"),
    "period": ("期間", "Periods"),
    "purpose": ("目的", "Purposes"),
}
STAGE_NAMES: dict[str, tuple[str, str]] = {
    "data": ("データの検証と分割", "Check and split the data"),
    "sweep": ("サンプル数ごとの学習", "Fits at each sample count"),
    "gguf": ("GGUFへの変換", "Conversion to GGUF"),
    "levels": ("量子化", "Quantization"),
    "check": ("劣化の測定", "Degradation check"),
    "evaluate": ("採点", "Scoring"),
    "report": ("レポート", "Report"),
}
SCORE_NAMES: dict[str, tuple[str, str]] = {
    "exact_match": ("正答率", "Exact match"),
    "char_f1": ("文字F1", "Character F1"),
    "log2_probability": ("正答の対数確率（ビット／文字）", "log-probability of the right answer, bits a character"),
}
VERDICT_NAMES: dict[str, tuple[str, str]] = {
    "reference": ("基準", "reference"),
    "pass": ("合格", "pass"),
    "degraded": ("劣化", "degraded"),
    "inconclusive": ("判定保留", "inconclusive"),
}
FAMILY_NAMES: dict[str, tuple[str, str]] = {
    "domain": ("この分野", "the domain"),
    "culture": ("日本文化", "Japanese culture"),
    "neutral": ("言語に依らない課題", "language-neutral"),
    "other": ("そのほか", "other"),
}
TASK_NAMES: dict[str, tuple[str, str]] = {
    "niilcqa": ("NIILC", "NIILC"),
    "niilc": ("NIILC", "NIILC"),
    "jemhopqa": ("JEMHopQA", "JEMHopQA"),
    "jmmlu_part": ("JMMLU（日本文化）", "JMMLU (culture)"),
    "jmmlu": ("JMMLU", "JMMLU"),
    "jcom": ("JCommonsenseQA", "JCommonsenseQA"),
    "jsquad": ("JSQuAD", "JSQuAD"),
    "mgsm_ja": ("MGSM（日本語）", "Japanese MGSM"),
    "xwino": ("XWINO（英語）", "English XWINO"),
    "lawqa_jp": ("lawqa_jp（法律の四択）", "lawqa_jp, legal questions"),
    **{f"tsugiki_likelihood_{key}": (f"{ja}の正答", f"{en} (right answers)") for key, ja, en in (
        ("niilc", "NIILC", "NIILC"), ("jemhopqa", "JEMHopQA", "JEMHopQA"), ("jmmlu_culture", "JMMLU（日本文化）", "JMMLU culture"),
        ("jcommonsenseqa", "JCommonsenseQA", "JCommonsenseQA"), ("mgsm_ja", "MGSM（日本語）", "Japanese MGSM"),
        ("xwinograd_ja", "XWINO（日本語）", "Japanese XWINO"))},
}
MALFORMED_NAMES: dict[str, tuple[str, str]] = {
    "no rating": ("点がない", "no rating"), "empty": ("空", "empty"), "several ratings": ("点が複数", "several ratings"),
    "outside the scale": ("範囲の外", "outside the scale"), "cut off": ("途中で切れた", "cut off"),
    "did not fit the context": ("文脈に入らない", "did not fit the context"),
}  # fmt: skip
PACKAGES = ("tsugiki", "torch", "transformers", "peft", "trl", "optuna", "llama-cpp-python", "gguf", "numpy")


def write_report(run_dir: Path | str) -> Path:
    """Write ``report.html`` into a run folder and return its path.

    Raises:
        UserError: a stage file is torn.
    """
    run_dir = Path(run_dir)
    path = run_dir / "report.html"
    write_text(path, render(run_dir))
    return path


def scaling_page(run_dir: Path) -> str:
    """Where the page of ``tsugiki evaluate scaling`` lies from a run's report, or ""."""
    return "../../scaling/scaling.html" if (run_dir / ".." / ".." / "scaling" / "scaling.html").is_file() else ""


def bases_page(run_dir: Path) -> str:
    """Where the page of ``tsugiki recipe bases`` lies from a run's report, or ""."""
    return "../bases.html" if (run_dir / ".." / "bases.html").is_file() else ""


def render(run_dir: Path) -> str:
    """The page as text. Every value is escaped; the embedded JSON cannot end its script element."""
    stages = read_stages(run_dir)
    timings = _timings(run_dir)
    view = _view(run_dir, stages, timings) | {"scaling": scaling_page(run_dir), "bases_page": bases_page(run_dir)}
    page = environment("tsugiki.recipes")
    page.filters.update(num=_num, signed=_signed, pct=_pct, points=_points, score=_score, size=_size, count=_count, plain=_plain)
    page.filters.update(share=_share, reason_ja=reason_ja, visible=_visible, seconds_ja=_seconds_ja, seconds_en=_seconds_en, safe_path=_safe_path)
    return fill(page, "report.html", view, _chart_data(view))


def data_verdict(sweep: dict[str, Any]) -> Text:
    """What the learning curve says about more data.

    Returns:
        ``kind`` (``overfit``: a larger count is worse with its whole interval; ``more``: the largest count is best and clearly so; ``open``: so it is, but
        the forecast does not say what more would bring; ``flat``: it is best, but a smaller count lies within one standard error; ``enough``: a smaller count is best; ``unknown``:
        one count only) and a short and a long sentence in both languages (``short_ja`` … ``long_en``).
    """
    best = sweep.get("optimum") or {}
    counts = sorted({point["n"] for point in sweep.get("points", [])})
    if len(counts) < 2 or "n" not in best:
        return _verdict("unknown", "未測定", "Not measured", "比べるにはサンプル数が二つ以上要ります。", "Two sample counts or more are needed to tell.")  # fmt: skip
    last, one_se = counts[-1], best.get("one_se_n", best["n"])
    if best.get("overfits_at"):
        at = best["overfits_at"]
        return _verdict(
            "overfit", "過学習あり", "Overfits",
            f"{at:,}件のテストNLLは、95%区間ごと{best['n']:,}件より悪くなりました。",
            f"At {at:,} samples the test NLL is worse than at {best['n']:,}, with its whole 95% interval.",
        )  # fmt: skip
    if best["n"] < last:
        return _verdict(
            "enough", "頭打ち", "No gain seen",
            f"{best['n']:,}件を超えても（{last:,}件まで）良くなりませんでした。",
            f"Beyond {best['n']:,} samples (up to {last:,}) it got no better.",
        )  # fmt: skip
    ahead = sweep.get("forecast") or {}
    if one_se < last or ahead.get("answer") == "no":
        return _verdict(
            "flat", "伸びはわずか", "Little to gain",
            f"最良は最大の{last:,}件ですが、{one_se:,}件でも1標準誤差以内です。" if one_se < last else f"最良は最大の{last:,}件ですが、倍にしても見込みは2%未満です。",
            f"The largest count, {last:,}, is best, but {one_se:,} lies within one standard error of it."
            if one_se < last else f"The largest count, {last:,}, is best, but twice as many would gain less than 2%.",
        )  # fmt: skip
    if ahead.get("answer") == "unclear":
        return _verdict(
            "open", "まだ下がっている", "Still falling",
            f"最大の{last:,}件でもまだ下がっていますが、{ahead['at']:,}件でどれだけ下がるかは、この測定では決まりません。",
            f"At {last:,}, the largest count, NLL is still falling; what {ahead['at']:,} would bring, these measurements do not decide.",
        )  # fmt: skip
    return _verdict(
        "more", "まだ伸びる", "More would help",
        f"最大の{last:,}件でもまだ下がっています。" + (f"{ahead['at']:,}件で{100 * ahead['gain']:.0f}%下がる見込みです。" if ahead else "同じ種類のデータを足す価値があります。"),
        f"At {last:,}, the largest count, NLL is still falling"
        + (f"; {ahead['at']:,} would bring about {100 * ahead['gain']:.0f}% less." if ahead else ": more data of this kind is worth having."),
    )  # fmt: skip


def _verdict(kind: str, short_ja: str, short_en: str, long_ja: str, long_en: str) -> Text:
    return {"kind": kind, "short_ja": short_ja, "short_en": short_en, "long_ja": long_ja, "long_en": long_en}


def _view(run_dir: Path, stages: dict[str, Any], timings: list[dict[str, Any]]) -> dict[str, Any]:
    data, sweep, check = (stages.get(name, {}) for name in ("data", "sweep", "check"))
    domain, base = run_name(run_dir, data)
    title = data.get("title") or {}
    rows = level_rows(stages)
    for row in rows:
        total = sum(t["parameters"] for t in row.get("types", {}).values())
        types = sorted(row.get("types", {}).items(), key=lambda item: -item[1]["parameters"])
        row["type_shares"] = [{"name": name, "share": t["parameters"] / max(total, 1), **t} for name, t in types]
    choice = check.get("recommended")
    evaluated = stages.get("evaluate", {})
    scores = _scores(evaluated, check)
    return {
        "domain": domain,
        "base": base,
        "title": {"ja": title.get("ja") or domain, "en": title.get("en") or domain},
        "data": data,
        "sweep": sweep,
        "aside": _aside(sweep.get("search") or {}),
        "gguf": stages.get("gguf", {}),
        "file_notes": file_notes(stages.get("gguf", {}), stages.get("levels", {})),
        "check": check,
        "evaluate": evaluated,
        "stages": stages,
        "missing": [STAGE_NAMES[name] for name in STAGES if name not in stages],
        "levels": rows,
        "checked": [row for row in rows if "nll" in row],
        "choice": choice,
        "because": _because(choice),
        "chosen": next((row for row in rows if choice and row["level"] == choice.get("level")), None),
        "reference": next((row for row in rows if row.get("verdict") == "reference"), {}),
        "heat_map": Markup(heat_map(check["sensitivity"]["rows"])) if check.get("sensitivity") else None,
        "more_data": data_verdict(sweep) if sweep.get("points") else None,
        "score_name": SCORE_NAMES.get(evaluated.get("scoring", ""), ("スコア", "Score")),
        "scores": sorted(scores, key=lambda group: -group["n"])[:6] if len(scores) > 8 else scores,
        "judged": read_judged(run_dir),
        "malformed_names": MALFORMED_NAMES,
        "examples": _in_turn(evaluated.get("examples", [])),
        "level_items": _items(check),
        "task_count": len(scores),
        "base_score": _base_score(evaluated),
        "gains": _gains(evaluated, check, domain, {"ja": title.get("ja") or domain, "en": title.get("en") or domain}),
        "models": {"base": ("元のモデル", "Base"), "adapted": ("適応後", "Adapted")},
        "kind_names": KIND_NAMES,
        "stage_names": STAGE_NAMES,
        "verdict_names": VERDICT_NAMES,
        "margins": _margins(check.get("settings", {})),
        "timings": timings,
        "total_seconds": sum(t["seconds"] for t in timings),
        "environment": environment_rows(),
        "written": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _because(choice: dict[str, Any] | None) -> Text:
    """Why the file is recommended, without the name and size that the headline has already said."""
    why = (choice or {}).get("why") or {}
    why = why if isinstance(why, dict) else {"ja": why, "en": why}
    prefix = re.compile(re.escape((choice or {}).get("level") or "") + r"\s*[(（][^)）]*[)）]\s*[:：]\s*")
    ja, en = (prefix.sub("", why.get(language, ""), count=1) for language in ("ja", "en"))
    return {"ja": ja, "en": en[:1].upper() + en[1:]}


def _scores(evaluated: dict[str, Any], check: dict[str, Any]) -> list[dict[str, Any]]:
    """Score before and after by task: base and adapted from ``evaluate``, the recommended level from either stage."""
    level = (check.get("recommended") or {}).get("level")
    rows = [row for row in _own(evaluated) if row["model"] in ("base", "adapted", level)]
    scored = {row["model"] for row in rows}
    groups: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        kind = row["task"].partition("/")[2]
        ja, en = KIND_NAMES.get(kind, (kind, kind)) if kind else KIND_NAMES["all"]
        metric = SCORE_NAMES.get(row["metric"], (row["metric"], row["metric"]))
        group = groups.setdefault(
            (row["task"], row["metric"]), {"kind": kind, "ja": ja, "en": en, "n": row["n"], "metric": metric, "bars": []}
        )
        group["bars"].append(_bar(row["model"], row["value"], row.get("stderr"), row["n"], row))
    whole = max((row["n"] for row in rows), default=0)
    if rows and level not in scored and _items(check) == whole:  # on fewer items the bars could not be compared
        chosen = next((row for row in check.get("levels", []) if row["level"] == level), {})
        for (_, metric), group in groups.items():
            part = (chosen.get("score_by_kind") or chosen.get("kinds") or {}).get(group["kind"])
            if metric != evaluated.get("scoring"):
                continue
            if part:
                bar = _bar(level, part["score"], part.get("se"), part["n"], {})
                low, high = part.get("score_ci") or (bar["low"], bar["high"])
                group["bars"].append({**bar, "low": low, "high": high})
            elif not group["kind"] and chosen.get("score") is not None:
                low, high = chosen.get("score_ci") or (chosen["score"], chosen["score"])
                group["bars"].append({**_bar(level, chosen["score"], None, _items(check), {}), "low": low, "high": high})
    order = {"base": 0, "adapted": 1}
    for group in groups.values():
        group["bars"].sort(key=lambda bar: order.get(bar["model"], 2))
    return list(groups.values())


def _own(evaluated: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of the domain's own test; those of benchmarks have a family."""
    return [row for row in evaluated.get("rows", []) if not row.get("family")]


def _gains(evaluated: dict[str, Any], check: dict[str, Any], domain: str, title: Text) -> dict[str, Any]:
    """What adaptation gained, what was forgotten and what quantization took, task by task.

    Returns:
        ``groups``: a task each, the domain's own first, with every model's value and step (a paired difference);
        ``gained``, ``forgotten`` (steps of the adaptation), ``taken`` (steps of the recommended level), ``units`` (``points`` of a
        share, ``bits`` a character; a group and a step has its ``unit``), ``blind`` (tasks on which every model scores 0), ``benchmarks`` and ``seen`` (there are tasks outside the domain; one on which
        something can be seen), ``level``, ``models`` and ``not_measured``. Empty where
        nothing was compared.
    """
    if not evaluated.get("changes"):
        return {}
    steps = [*evaluated["changes"], *level_changes(check, domain, evaluated.get("scoring", "score"))]
    level = (check.get("recommended") or {}).get("level")
    families = list(FAMILY_NAMES)
    groups: dict[tuple[str, str], dict[str, Any]] = {}
    for step in sorted(steps, key=lambda s: families.index(s["family"]) if s["family"] in families else len(families)):
        task, _, limited = step["task"].partition("[")
        own = step["family"] == "domain" and "name" not in step
        ja, en = (title["ja"], title["en"]) if own else TASK_NAMES.get(task, (step["task"], step["task"]))
        group = groups.setdefault(
            (step["task"], step["metric"]),
            {"task": step["task"], "family": FAMILY_NAMES.get(step["family"], (step["family"], step["family"])), "ja": ja, "en": en,
             "metric": SCORE_NAMES.get(step["metric"], (step["metric"], step["metric"])), "n": step.get("n") or 0, "limited": bool(limited),
             "values": {}, "steps": []},
        )  # fmt: skip
        group["unit"] = "bits" if step["metric"] == "log2_probability" else "points"
        group["values"].setdefault(step["from"], step["before"])
        group["values"][step["to"]] = step["after"]
        group["steps"].append({**step, "ja": ja, "en": en, "unit": group["unit"]})
    adapted = [s for g in groups.values() for s in g["steps"] if s["to"] == "adapted"]
    models = list(dict.fromkeys(m for g in groups.values() for m in g["values"]))
    return {
        "groups": list(groups.values()),
        "models": [m for m in ("base", "adapted") if m in models] + [m for m in models if m not in ("base", "adapted")],
        "level": level,
        "gained": [s for s in adapted if s["change"] == "gained"],
        "forgotten": [s for s in adapted if s["change"] == "lost"],
        "taken": [s for g in groups.values() for s in g["steps"] if s["to"] == level and s["change"] == "lost"],
        "units": list(dict.fromkeys(g["unit"] for g in groups.values())),
        "quantized": any(s["to"] == level for g in groups.values() for s in g["steps"]),
        "blind": [g for g in groups.values() if not any(g["values"].values())],
        "benchmarks": any(s["family"] != "domain" or "name" in s for s in steps),
        "seen": any(any(g["values"].values()) for g in groups.values() if any("name" in s for s in g["steps"])),
        "not_measured": [
            {**m, "ja": TASK_NAMES.get(m["task"], (m["task"],))[0]} for m in evaluated.get("not_measured", [])
        ],
    }  # fmt: skip


def _items(check: dict[str, Any]) -> int | None:
    """How many test items the degradation check used."""
    return check.get("items", check.get("samples"))


def _bar(model: str, value: float, stderr: float | None, n: int | None, row: dict[str, Any]) -> dict[str, Any]:
    """One bar with its normal 95 % interval inside 0 to 1."""
    spread = 1.96 * (stderr or 0.0)
    return {
        "model": model, "value": value, "low": max(0.0, value - spread), "high": min(1.0, value + spread), "n": n,
        "unparsed": row.get("unparsed"), "truncated": row.get("truncated"),
    }  # fmt: skip


def _in_turn(examples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first example of each kind, then the second of each, and so on."""
    seen: dict[str, int] = {}
    turns = []
    for example in examples:
        kind = example.get("kind", "")
        turns.append(seen.get(kind, 0))
        seen[kind] = turns[-1] + 1
    return [example for _, example in sorted(zip(turns, examples, strict=True), key=lambda pair: pair[0])]


_SPLITS = {"train": "学習", "valid": "検証", "test": "テスト"}
_REASONS = (
    (re.compile(r"exact duplicate of an? (\w+) item"), "{0}と同じ質問"),
    (re.compile(r"exact duplicate"), "同じ質問の重複"),
    (re.compile(r"near-duplicate of an? (\w+) item"), "{0}にほぼ同じものがある"),
    (re.compile(r"longer than ([\d,]+) tokens"), "{0}トークンより長い"),
)


def reason_ja(reason: str) -> str:
    """A reason for dropping samples in Japanese; one that is not known stays as it is."""
    split, colon, rest = reason.partition(": ")
    if not colon or split not in _SPLITS:
        split, rest = "", reason
    for pattern, words in _REASONS:
        if match := pattern.fullmatch(rest):
            said = words.format(*(_SPLITS.get(g, g) for g in match.groups()))
            return f"{_SPLITS[split]}：{said}" if split else said
    return reason


def _base_score(evaluated: dict[str, Any]) -> float | None:
    """The untouched base's score over all test items: the mean over kinds, weighted by their items."""
    rows = [row for row in _own(evaluated) if row["model"] == "base" and row["metric"] == evaluated.get("scoring")]
    whole = [row for row in rows if "/" not in row["task"]] or rows
    items = sum(row["n"] for row in whole)
    return sum(row["value"] * row["n"] for row in whole) / items if items else None


def _margins(settings: dict[str, Any]) -> dict[str, float]:
    """The non-inferiority margins among the settings: the NLL one in nats, the score one from 0 to 1."""
    found = {}
    for key, value in settings.items():
        if "margin" in key and isinstance(value, int | float):
            for name in ("nll", "score"):
                if name in key:
                    found[name] = abs(value)
    return found


def _aside(search: dict[str, Any]) -> list[dict[str, Any]]:
    """The counts without a point on an adaptive sweep's curve, whether their fit was ended early, and why."""
    ended = [
        {"n": fit["n"], "ended": True, "why": {
            "ja": f"{fit['of_steps']:,}ステップ中{fit['steps']:,}で打ち切り（検証NLLで{fit['rival']:,}件を下回れない）",
            "en": f"ended after {fit['steps']:,} of {fit['of_steps']:,} steps: on the validation samples it cannot come under {fit['rival']:,}",
        }}
        for fit in search.get("ended_early", [])
    ]  # fmt: skip
    never = [{"n": row["n"], "ended": False, "why": row["why"]} for row in search.get("not_trained", [])]
    return sorted(ended + never, key=lambda row: row["n"])


def _chart_data(view: dict[str, Any]) -> dict[str, Any]:
    """What the page's script draws."""
    sweep = view["sweep"]
    keys = ("level", "bytes", "delta_nll", "delta_ci", "score", "score_ci", "verdict")
    return {
        "points": sweep.get("points", []),
        "base": sweep.get("base"),
        "optimum": sweep.get("optimum"),
        "p_best": sweep.get("p_best_by_n", {}),
        "equal_steps": (sweep.get("equal_steps") or {}).get("points", []),
        "aside": view["aside"],
        "scores": view["scores"],
        "gains": view["gains"],
        "score_name": view["score_name"],
        "levels": [{key: row.get(key) for key in keys} for row in view["checked"]],
        "margins": view["margins"],
        "recommended": (view["choice"] or {}).get("level"),
        "verdicts": VERDICT_NAMES,
        "models": view["models"],
        "kinds": view["kind_names"],
    }


def _timings(run_dir: Path) -> list[dict[str, Any]]:
    """The ``stage.json`` files in the order of the work."""
    found = []
    for path in run_dir.glob("*/stage.json"):
        try:
            value = read_json(path)
        except ValueError:
            continue  # a torn stage.json means that the stage is not finished
        if isinstance(value, dict) and "seconds" in value:
            stage = value.get("stage", path.parent.name)
            outputs = [{**o, "path": f"{stage}/{_safe_path(o['path'])}"} for o in value.get("outputs", [])]
            found.append({**value, "stage": stage, "outputs": outputs})
    order = {name: position for position, name in enumerate(STAGE_NAMES)}
    return sorted(found, key=lambda stage: (order.get(stage["stage"], len(order)), stage["stage"]))


def environment_rows() -> list[tuple[str, str, str]]:
    """(Japanese label, English label, value) about the machine that writes the report; no host or user names."""
    rows = [("OS", "OS", f"{platform.system()} {platform.release()} ({platform.machine()})")]
    cpu = _cpu_name()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    rows.append(("CPU", "CPU", f"{cpu} × {cores}" if cpu else str(cores)))
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        rows.append(("メモリ", "Memory", f"{memory / 2**30:.1f} GiB"))
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        rows.append(("GPU", "GPU", torch.cuda.get_device_name(0)))
    rows.append(("Python", "Python", platform.python_version()))
    for package in PACKAGES:
        try:
            rows.append((package, package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            continue
    return rows


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()


NONE = "–"


def _absent(value: Any) -> bool:
    return value is None or isinstance(value, Undefined)


def _num(value: Any, digits: int = 3) -> str:
    """A number with fixed digits; one too small for them is written with an exponent."""
    if _absent(value):
        return NONE
    if value and abs(value) < 10**-digits:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        raised = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        return f"{mantissa}×10{raised}".replace("-", "−")
    return f"{value:.{digits}f}".replace("-", "−")


def _signed(value: Any, digits: int = 4) -> str:
    return NONE if _absent(value) else f"{value:+.{digits}f}".replace("-", "−")


def _pct(value: Any, digits: int = 1) -> str:
    return NONE if _absent(value) else f"{100 * value:.{digits}f}%"


def _points(value: Any, unit: str = "points") -> str:
    """A difference: of shares in percentage points, of log-probabilities in bits."""
    return NONE if _absent(value) else (f"{value:+.2f}" if unit == "bits" else f"{100 * value:+.1f}").replace("-", "−")


def _score(value: Any, unit: str) -> str:
    """A score: a share as a percentage, a log-probability as bits."""
    return _num(value, 2) if unit == "bits" else _pct(value)


def _size(value: Any) -> str:
    """Bytes in decimal units."""
    if _absent(value):
        return NONE
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= factor:
            return f"{value / factor:#.3g} {unit}" if value < 99.9 * factor else f"{value / factor:.0f} {unit}"
    return f"{value} B"


def _count(value: Any) -> str:
    return NONE if _absent(value) else f"{round(value):,}"


def _seconds(value: Any, minute: str, second: str) -> str:
    if _absent(value):
        return NONE
    if value < 1:
        return f"{1000 * value:.3g} ms"
    if value < 60:
        return f"{value:.1f}{second}"
    return f"{int(value) // 60}{minute}{int(value) % 60}{second}"


def _seconds_ja(value: Any) -> str:
    return _seconds(value, "分", "秒")


def _seconds_en(value: Any) -> str:
    return _seconds(value, " min ", " s")


def _plain(value: Any) -> str:
    """A setting as a person would write it; a path keeps its last part only."""
    if isinstance(value, str):
        return _safe_path(value)
    if isinstance(value, list | tuple):
        return ", ".join(_plain(v) for v in value)
    if isinstance(value, dict):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


def _share(value: Any) -> str:
    """A share as a percentage, a whole number as a count."""
    if _absent(value):
        return NONE
    return _count(value) if isinstance(value, int) or not value else _pct(value)


def _safe_path(value: str) -> str:
    return Path(value).name if Path(value).is_absolute() else value


def _visible(text: str) -> str:
    """White space that a reader could not see, as symbols."""
    for character, symbol in (("\n", "⏎"), ("\t", "⇥"), ("\u3000", "␣"), ("\r", "␍")):
        text = text.replace(character, symbol)
    return text
