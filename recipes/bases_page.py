"""The page of a comparison of bases: ``bases.html``, self-contained, from the content of ``bases.json`` alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined
from markupsafe import Markup, escape

from tsugiki.artifacts import write_text
from tsugiki.page import environment
from tsugiki.page import render as fill
from tsugiki.recipes.report import FAMILY_NAMES, SCORE_NAMES, TASK_NAMES

WIDTH, ROW, LEFT, RIGHT, TOP, FOOT = 440, 36, 112, 18, 6, 26  # of a chart, units of its view box


def write_page(result: Mapping[str, Any], path: Path) -> None:
    """Write the page of ``result`` (the content of ``bases.json``), atomically."""
    write_text(path, render(result))


def render(result: Mapping[str, Any]) -> str:
    """The page as text; every value is escaped."""
    page = environment("tsugiki.recipes")
    page.undefined = StrictUndefined
    bases, best = result["bases"], result["recommended"]["base"]
    title = result["title"]
    view = result | {
        "chosen": next(b for b in bases if b["name"] == best), "best": best,
        "names": {"ja": title.get("ja") or result["domain"], "en": title.get("en") or result["domain"]},
        "score_name": SCORE_NAMES.get(result["scoring"], ("スコア", "Score")), "gpu": result["device"] == "cuda",
        "score_chart": chart([_mark(b, b["score"]) for b in bases], best=best, percent=True),
        "bits_chart": chart([_mark(b, b["bits"]) | {"before": None} for b in bases], best=best),  # beside it all others would be one
        "tasks": _tasks(bases), "not_measured": _not_measured(bases), "size": _size,
        "written": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }  # fmt: skip
    return fill(page, "bases.html", view, {})


def _mark(base: Mapping, measure: Mapping) -> dict[str, Any]:
    return {"name": base["name"], **{key: measure[key] for key in ("before", "after", "after_ci")}}


def chart(marks: Sequence[Mapping[str, Any]], *, best: str, percent: bool = False) -> Markup:
    """A line a base: a filled circle after adaptation with its interval, an open one before where it is given; the axis starts at 0."""
    highest = max(max(m["before"] or 0, m["after"], *(m["after_ci"] or [0])) for m in marks) or 1.0
    step = next(s * 10.0**e for e in range(-4, 5) for s in (1, 2, 5) if s * 10.0**e * 5 >= highest)
    top = 1.0 if percent and highest > 0.8 else step * -(-highest // step)
    height = TOP + ROW * len(marks) + FOOT

    def x(value: float) -> str:
        return f"{LEFT + (WIDTH - LEFT - RIGHT) * value / top:.1f}"

    def text(value: float) -> str:
        return f"{100 * value:g}%" if percent else f"{value:g}"

    parts = []
    for i in range(round(top / step) + 1):
        value = round(i * step, 10)
        parts.append(f'<path class="grid" d="M{x(value)} {TOP}V{height - FOOT + 4}"/><text x="{x(value)}" y="{height - 6}" text-anchor="middle">{text(value)}</text>')
    for i, m in enumerate(marks):
        y = TOP + ROW * i + ROW / 2
        told = _told(m, percent)
        if m["after_ci"]:
            told += f" ({_value(m['after_ci'][0], percent)} – {_value(m['after_ci'][1], percent)})"
        old = f'<path class="way" d="M{x(m["before"])} {y}H{x(m["after"])}"/>' if m["before"] is not None else ""
        start = f'<circle class="before" cx="{x(m["before"])}" cy="{y}" r="4.5"/>' if m["before"] is not None else ""
        line = f'<path class="reach" d="M{x(m["after_ci"][0])} {y}H{x(m["after_ci"][1])}"/>' if m["after_ci"] else ""
        parts.append(
            f'<g class="{"best" if m["name"] == best else "base"}"><title>{escape(told)}</title>'
            f'<text class="name" x="0" y="{y + 4}">{escape(m["name"] if len(m["name"]) < 18 else m["name"][:16] + "…")}</text>'
            f'{old}{line}{start}<circle class="after" cx="{x(m["after"])}" cy="{y}" r="5.5"/></g>'
        )
    label = escape("; ".join(_told(m, percent) for m in marks))
    return Markup(f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{label}">{"".join(parts)}</svg>')


def _told(m: Mapping[str, Any], percent: bool) -> str:
    before = "" if m["before"] is None else f"{_value(m['before'], percent)} → "
    return f"{m['name']}: {before}{_value(m['after'], percent)}"


def _value(value: float, percent: bool) -> str:
    return f"{100 * value:.1f}%" if percent else f"{value:.3f}"


def _tasks(bases: Sequence[Mapping]) -> list[dict[str, Any]]:
    """Benchmarks as rows, each with the change of every base that it was measured on."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for base in bases:
        for change in base["forgetting"]:
            task = change["task"].partition("[")[0]
            ja, en = TASK_NAMES.get(task, (task, task))
            row = rows.setdefault((change["task"], change["metric"]), {
                "ja": ja, "en": en, "family": FAMILY_NAMES.get(change["family"], (change["family"],) * 2), "metric": change["metric"],
                "n": change["n"], "of": {},
            })  # fmt: skip
            row["of"][base["name"]] = change
    return list(rows.values())


def _not_measured(bases: Sequence[Mapping]) -> list[dict[str, str]]:
    return list({m["task"]: m for base in bases for m in base["not_measured"]}.values())


def _size(number: float) -> str:
    return f"{number / 1e9:,.2f} GB" if number >= 1e9 else f"{number / 1e6:,.1f} MB"
