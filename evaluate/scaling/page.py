"""One self-contained interactive page of the analysis: hover, tap or focus a point for its model, budget and sources.

Everything is inside the file: style, script and data. The numbers are those of ``scaling.json`` and are not computed
again here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tsugiki.artifacts import write_text
from tsugiki.evaluate.scaling.figures import AXIS_NAMES, TASK_NAMES
from tsugiki.page import environment
from tsugiki.page import render as fill

VERDICTS = {
    "more efficient": ("より効率的", "more efficient"),
    "less efficient": ("効率は劣る", "less efficient"),
    "equivalent": ("同等", "equivalent"),
    "inconclusive": ("判定できない", "inconclusive"),
}
KINDS = {
    "reported": ("公表値", "reported"),
    "derived": ("公表値から計算", "derived"),
    "assumed": ("仮定", "assumed"),
    "unknown": ("不明", "unknown"),
}
CONVENTIONS_JA = {
    "Saito et al.": "（このモデルのトークン数は、直線と同じSaitoらのA.3の数え方による推定です。）",
    "Takase & Honda": "（このモデルのトークン数は高瀬・本田の表3による推定で、直線のモデルとは数え方が違います。差は割り引いて読んでください。）",
}
POINT_KINDS = {"base": ("ベース", "base"), "adapted": ("適応後", "adapted"), "quantized": ("量子化", "quantized")}
_NOTES = (
    (r"only (\d+) points: .*", r"点が\1個しかなく、目安にとどまります"),
    (r"only (\d+) families: no interval.*", r"系列が\1つしかなく、系列に共通する偏りを含む区間は出せません"),
    (r"only (\d+) families: the intervals.*", r"系列が\1つしかなく、区間はおおよそで、狭めです"),
    (r"over a tenth of the resamples have no line: no interval", "再標本の一割以上で直線が引けず、区間は出せません"),
    (r"(.+) gives (\d+%) of the points", r"点の\2が\1です"),
    (r"the slope changes its sign without (.+)", r"\1を除くと傾きの符号が変わります"),
)


def write_page(result: Mapping[str, Any], path: Path | str) -> None:
    """Write the page of ``result`` (the content of ``scaling.json``), atomically."""
    write_text(path, render(result))


def render(result: Mapping[str, Any]) -> str:
    """The page as text. Every value is escaped; the embedded JSON cannot end its script element."""
    page = environment("tsugiki.evaluate.scaling")
    page.filters.update(num=_num, power=_power, size=_size, billions=_billions, note_ja=note_ja)
    page.tests["contains_pc"] = lambda text, k: f"PC{k}:" in text
    laws = [law for law in result["laws"] if "points" in law]
    view = {
        "r": result,
        "laws": laws,
        "lead": next((law for law in laws if law["unit"] == "points" and law["axis"] == "ja" and (law["slope"]["low"] or 0) > 0), None),
        "efficiency": [{**e, **_efficiency_words(e)} for e in result["efficiency"] if "refused" not in e],
        "efficiency_refused": [e for e in result["efficiency"] if "refused" in e],
        "curves": [row for row in result["equivalence"] if row["curve"]],
        "curves_refused": [row for row in result["equivalence"] if not row["curve"]],
        "yours": [{**p, "said": _said(p, {law["key"]: law["axis"] for law in result["laws"]})} for p in result["yours"]],
        "kinds": KINDS,
        "point_kinds": POINT_KINDS,
        "verdicts": VERDICTS,
        "axes": AXIS_NAMES,
        "source": source_words(result),
    }
    data = {
        "laws": laws,
        "models": result["models"],
        "yours": result["yours"],
        "correlations": result["correlations"],
        "components": result["components"] and {k: result["components"][k] for k in ("loadings", "variance", "tasks", "kept")},
        "efficiency": [{k: e.get(k) for k in ("name", "key", "sensitivity")} for e in view["efficiency"]],
        "curves": view["curves"],
        "languages": result["languages"],
        "tasks": TASK_NAMES,
        "kinds": KINDS,
        "axes": AXIS_NAMES,
        "point_kinds": POINT_KINDS,
        "verdicts": VERDICTS,
    }
    return fill(page, "page.html", view, data)


def source_words(result: Mapping[str, Any]) -> tuple[str, str]:
    """What was analysed, in both languages."""
    models, tasks = len(result["models"]), len(result["tasks"])
    ja = {
        "saito": f"{models}のベースモデル × {tasks}タスク（Saitoらのスコア行列、計算量は論文の表1）。",
        "takase": f"高瀬・本田の表2に載っている{models}モデル × {tasks}スコアだけを分析しました。35 × 19の行列が見つからなかったためです（--scores FILE で渡せます）。点が少なく、どの結論も弱いものです。",
        "yours": f"ご指定の{models}モデル × {tasks}タスク。",
    }[result["kind"]]
    return ja, result["source"]


def note_ja(text: str) -> str:
    """A law's note in Japanese; one that is not known stays as it is."""
    for pattern, words in _NOTES:
        if match := re.fullmatch(pattern, text):
            return match.expand(words)
    return text


def _efficiency_words(e: Mapping[str, Any]) -> dict[str, str]:
    effect = e["effect"]
    head = (
        f"{e['name']}：継続事前学習のモデルは、{_times(effect['multiplier'])}の日本語計算量で一から学習したモデルと同じスコアです"
        f"（系列を変量効果とすると{_span(effect['multiplier_low'], effect['multiplier_high'])}、"
        f"ワイルドクラスターブートストラップでは{_span(e['wild_low'], e['wild_high'])}）。"
    )
    said = {
        "more efficient": "この計算量の数え方では、継続のほうが効率的です。",
        "less efficient": "この計算量の数え方では、継続のほうが効率は劣ります。",
        "equivalent": f"この計算量の数え方では、{e['margin']:g}倍以内で同等です。",
        "inconclusive": f"このデータでは決まりません。{e['detectable']:.1f}倍以上の差でなければ見つけられません。",
    }[e["verdict"]]
    tail = ""
    if e["depends"] and e["sensitivity"]:
        a, b = e["sensitivity"][0], e["sensitivity"][-1]
        tail = (
            f"しかも答えは仮定しだいです。ベースの学習データの{a['share']:.2%}が日本語なら{_times(a['multiplier'])}、"
            f"{b['share']:.1%}なら{_times(b['multiplier'])}です。"
        )
    return {"ja": head + said + tail, "en": e["sentence"]}


def _span(low: float | None, high: float | None) -> str:
    if low is None and high is None:
        return "範囲が定まらず"
    return f"{'0.01未満' if low is None else f'{low:.2f}'}〜{'100超' if high is None else f'{high:.2f}'}"


def _times(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}倍"


def _said(point: Mapping[str, Any], axes: Mapping[str, str]) -> list[dict[str, str]]:
    """What can be said of the point by each law, in both languages; the same sentence is said once."""
    rows = []
    for q in point["placements"]:
        if q["value"] is not None:
            ja = f"{q['law']}：{q['value']:.1f}点。この{AXIS_NAMES[axes[q['key']]][0][:-4]}で見込まれるのは{q['predicted']:.1f}点（{q['low']:.1f}〜{q['high']:.1f}）、差は{q['residual']:+.1f}点。".replace("-", "−")
            ja += CONVENTIONS_JA.get(q.get("convention") or "", "")
            if q["extrapolated"]:
                ja += "公開モデルの範囲の外なので、読み取れることはありません。"
            rows.append({"ja": ja, "en": q["sentence"]})
    if rows:
        return rows
    first = point["placements"][0] if point["placements"] else None
    if first is None:
        return []
    if first["log_budget"] is None:
        return [{"ja": "計算量が分からないため、直線の上に置けません。", "en": first["sentence"]}]
    outside = "計算量も公開モデルの範囲の外です。" if first["extrapolated"] else ""
    return [{"ja": f"法則のタスクの採点がないため、直線の上に置けません。{outside}", "en": first["sentence"]}]


def _num(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}".replace("-", "−")


_RAISED = str.maketrans("-0123456789.", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹·")


def _power(value: float | None) -> str:
    """A count as 1.2×10²¹."""
    if not value:
        return "–" if value is None else "0"
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}×10{str(int(exponent)).translate(_RAISED)}"


def _billions(value: float | None) -> str:
    """A count of tokens or parameters: 1.5T, 8.0B, 6.2M."""
    if value is None:
        return "–"
    for unit, factor in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= factor:
            return f"{value / factor:.3g}{unit}" if value < 999.5 * factor else f"{value / factor:.0f}{unit}"
    return f"{value:.0f}"


def _size(value: int | None) -> str:
    if value is None:
        return "–"
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.2f} MB"
