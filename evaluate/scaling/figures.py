"""Figures for papers and slides (SVG, PDF, PNG), and everything that is drawn as CSV and Parquet.

The figures are drawn from the content of ``scaling.json`` alone. Labels are Japanese where a Japanese font is
installed; without one they are English, and a warning says so.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from matplotlib import font_manager, rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from tsugiki.artifacts import atomic_path

FORMATS = ("svg", "pdf", "png")
FONTS = (
    "Noto Sans CJK JP", "Noto Sans JP", "IPAexGothic", "IPAGothic", "BIZ UDPGothic", "Hiragino Sans", "Yu Gothic",
    "Meiryo", "TakaoPGothic", "VL PGothic", "MS Gothic",
)  # fmt: skip
INK, SOFT, LINE, MOSS, INDIGO, SHU, ASH = "#1f2421", "#5d655f", "#d8d6ca", "#2c6a49", "#2d4f86", "#b53f26", "#a3a79d"
DIVERGING = LinearSegmentedColormap.from_list("tsugiki", [SHU, "#e9c3b6", "#fbfaf5", "#b9c6dd", INDIGO])
GROUPS = {
    "PT": ("o", INDIGO, ("一から", "from scratch")),
    "CPT": ("^", MOSS, ("継続事前学習", "continued")),
    "yours": ("*", SHU, ("手元のモデル", "yours")),
    "": ("s", ASH, ("不明", "unknown")),
}
AXIS_NAMES = {
    "total": ("全体の計算量 N·D", "total budget N·D"),
    "en": ("英語の計算量 N·D", "English budget N·D"),
    "ja": ("日本語の計算量 N·D", "Japanese budget N·D"),
}
TASK_NAMES = {
    "jcom": "JCom", "jemhopqa": "JEMHopQA", "niilc": "NIILC", "jsquad": "JSQuAD", "xlsum_ja": "XL-Sum",
    "mgsm_ja": "MGSM", "wmt20_en_ja": "WMT20 en-ja", "wmt20_ja_en": "WMT20 ja-en", "jmmlu": "JMMLU",
    "jhumaneval": "JHumanEval", "openbookqa": "OpenBookQA", "triviaqa": "TriviaQA", "hellaswag": "HellaSwag",
    "squad2": "SQuAD2", "xwino": "XWINO", "mmlu": "MMLU", "gsm8k": "GSM8K", "bbh": "BBH", "humaneval": "HumanEval",
    "mgsm_en": "MGSM-En", "mmlu_prox_en": "MMLU-ProX-En", "mmlu_prox_ja": "MMLU-ProX-Ja", "niilcqa": "NIILC",
    "jmmlu_part": "JMMLU part", "jaqket": "JAQKET",
}  # fmt: skip
LANGUAGE_COLOURS = (INDIGO, "#7c93b8", "#5b7f8c", "#86a7a0", "#b6b98f", SHU, "#d79a52", "#c9b7a4", "#9a86a4", "#6f6a7d", LINE)

Words = Callable[[str, str], str]


def japanese_font(candidates: Sequence[str] = FONTS) -> str | None:
    """The first of these font families that is installed, or None."""
    installed = {font.name for font in font_manager.fontManager.ttflist}
    return next((name for name in candidates if name in installed), None)


def figure_style(font: str | None) -> dict[str, Any]:
    """Matplotlib's settings for all figures of the kit; ``font``: the Japanese one, or none."""
    return {
        "font.family": [*([font] if font else []), "DejaVu Sans"], "font.size": 9, "axes.edgecolor": SOFT, "axes.linewidth": 0.7,
        "axes.labelcolor": INK, "text.color": INK, "xtick.color": SOFT, "ytick.color": SOFT, "axes.spines.top": False,
        "axes.spines.right": False, "legend.frameon": False, "svg.hashsalt": "tsugiki", "pdf.fonttype": 42, "axes.titlelocation": "left",
        "axes.titlesize": 9.5, "mathtext.default": "regular",
    }  # fmt: skip


def draw_all(result: Mapping[str, Any], out: Path, language: str = "ja", formats: Sequence[str] = FORMATS) -> list[str]:
    """Draw every figure that ``result`` (the content of ``scaling.json``) has numbers for.

    Args:
        out: folder for ``<figure>.<format>``.
        language: of the labels, ``ja`` or ``en``.

    Returns:
        warnings, for example that no Japanese font was found.
    """
    font = japanese_font()
    warnings = []
    if language == "ja" and font is None:
        language = "en"
        warnings.append(
            "No Japanese font is installed, so the figures are labelled in English. "
            f"Install one of {', '.join(FONTS[:3])} (Debian, Ubuntu: fonts-noto-cjk)."
        )
    words: Words = (lambda ja, en: ja) if language == "ja" else (lambda ja, en: en)
    with rc_context(figure_style(font)):
        for name, draw in FIGURES.items():
            figure = draw(result, words)
            if figure is None:
                continue
            FigureCanvasAgg(figure)
            for kind in formats:
                extra = {"metadata": {"Date": None} if kind == "svg" else {"CreationDate": None}} if kind != "png" else {"dpi": 200}
                with atomic_path(out / f"{name}.{kind}") as path:
                    figure.savefig(path, format=kind, facecolor="white", bbox_inches="tight", pad_inches=0.08, **extra)
    return warnings


# --- the figures ----------------------------------------------------------------------------------------------------


def correlation_figure(result: Mapping[str, Any], words: Words) -> Figure | None:
    """Task × task Pearson correlations."""
    tasks, values = result["correlations"]["tasks"], _array(result["correlations"]["pearson"])
    n = len(tasks)
    figure = Figure(figsize=(1.6 + 0.36 * n, 1.3 + 0.36 * n), layout="constrained")
    axes = figure.subplots()
    image = _heat(axes, values, size=5.6)
    names = [_task(t) for t in tasks]
    axes.set_xticks(range(n), names, rotation=90)
    axes.set_yticks(range(n), names)
    counts = _array(result["correlations"]["counts"])
    axes.set_title(words("タスク間の相関（ピアソン）", "Correlation between tasks (Pearson)") + f", n = {_range(counts)}")
    figure.colorbar(image, ax=axes, shrink=0.5, aspect=30, pad=0.02).outline.set_visible(False)
    return figure


def loadings_figure(result: Mapping[str, Any], words: Words) -> Figure | None:
    """Loadings of the components on all models, and on those from scratch alone."""
    components = result["components"]
    if not components:
        return None
    parts = [(words("全モデル", "all models") + f", n = {len(result['models'])}", components)]
    if components["scratch"]:
        parts.append((words("一から学習したモデルのみ", "from scratch only") + f", n = {components['scratch']['n']}", components["scratch"]))
    tasks = components["tasks"]
    figure = Figure(figsize=(1.6 + 0.42 * len(tasks), 1.0 + 1.7 * len(parts)), layout="constrained")
    rows = figure.subplots(len(parts), 1, squeeze=False)[:, 0]
    for i, (axes, (title, part)) in enumerate(zip(rows, parts, strict=True)):
        values = _array(part["loadings"])
        _heat(axes, values, size=6.2, limit=0.6, aspect="auto")
        shares = part["variance"]
        axes.set_yticks(range(len(values)), [f"PC{k + 1}{'*' if k >= components['kept'] else ''}  {100 * shares[k]:.1f}%" for k in range(len(values))])
        last = i == len(parts) - 1
        axes.set_xticks(range(len(tasks)), [_task(t) for t in tasks] if last else [], rotation=60, ha="right", rotation_mode="anchor")
        axes.set_title(words("主成分の負荷量：", "Loadings: ") + title)
    if components["kept"] < len(components["loadings"]):
        figure.supxlabel(words("* 平行分析でノイズと区別できない成分", "* not above noise in parallel analysis"), fontsize=7.5, color=SOFT, x=0.01, ha="left")
    return figure


def components_figure(result: Mapping[str, Any], words: Words) -> Figure | None:
    """Models by their first two components."""
    components = result["components"]
    if not components or len(components["variance"]) < 2:
        return None
    figure = Figure(figsize=(7.6, 5.6), layout="constrained")
    axes = figure.subplots()
    models = result["models"]
    x = np.array([m["components"][0] for m in models])
    y = np.array([m["components"][1] for m in models])
    groups = [_group(m["construction"]) for m in models]
    _scatter(axes, x, y, groups, words)
    shares = components["variance"]
    axes.set_xlabel(f"PC1 ({100 * shares[0]:.1f}%)")
    axes.set_ylabel(f"PC2 ({100 * shares[1]:.1f}%)")
    axes.axhline(0, color=LINE, lw=0.7, zorder=0)
    axes.axvline(0, color=LINE, lw=0.7, zorder=0)
    axes.margins(0.07)
    _name_points(figure, axes, x, y, [m["name"] for m in models])
    axes.set_title(words("主成分得点", "Component scores"))
    axes.legend(loc="best", fontsize=8)
    return figure


def laws_figure(result: Mapping[str, Any], words: Words) -> Figure | None:
    """Scores against log budget by group, with the line and its prediction interval for a new family."""
    wanted = ("niilc_ja", "neutral_total", "pc2_ja", "pc1_en", "culture_ja")
    laws = [law for key in wanted for law in result["laws"] if law["key"] == key and "points" in law]
    laws = (laws or [law for law in result["laws"] if "points" in law])[:4]
    if not laws:
        return None
    rows = (len(laws) + 1) // 2
    figure = Figure(figsize=(8.6, 3.5 * rows + 0.3), layout="constrained")
    panels = figure.subplots(rows, 2, squeeze=False).ravel()
    construction = {m["name"]: m["construction"] for m in result["models"]}
    for axes, law in zip(panels, laws, strict=False):
        law_panel(axes, law, construction, result["yours"], words)
    for axes in panels[len(laws) :]:
        axes.set_visible(False)
    handles, labels = [], []
    for axes in panels[: len(laws)]:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            if label not in labels:
                handles.append(handle)
                labels.append(label)
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=8.5)
    return figure


def law_panel(axes: Axes, law: Mapping[str, Any], construction: Mapping[str, str], yours: Sequence[Mapping[str, Any]], words: Words) -> None:
    """One law: points by group, the line, its interval, and the user's models that could be placed."""
    band = _array(law["band"])
    axes.fill_between(band[:, 0], band[:, 1], band[:, 3], color=ASH, alpha=0.18, lw=0, label=words("95%予測区間", "95% prediction interval"))
    axes.plot(band[:, 0], band[:, 2], color=INK, lw=1.1)
    x, y = (np.array([p[k] for p in law["points"]]) for k in ("x", "y"))
    _scatter(axes, x, y, [_group(construction.get(p["model"], "")) for p in law["points"]], words, size=26)
    placed = [q for point in yours for q in point["placements"] if q["key"] == law["key"] and q["value"] is not None]
    if placed:
        marker, colour, names = GROUPS["yours"]
        axes.scatter([q["log_budget"] for q in placed], [q["value"] for q in placed], marker=marker, s=90, color=colour, zorder=4, label=words(*names))
    elif law["unit"] == "points":
        # a model without this score still has a budget: where it stands on the axis
        at = [q["log_budget"] for point in yours for q in point["placements"] if q["key"] == law["key"] and q["log_budget"]]
        low, high = band[0, 0], band[-1, 0]
        for value in sorted(set(at)):
            if low <= value <= high:
                axes.axvline(value, color=SHU, lw=0.9, ls=(0, (2, 3)), zorder=1)
    if law["unit"] == "points":
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, 0), min(high, 100))
    unit = words("点", "points") if law["unit"] == "points" else "SD"
    axes.set_ylabel(f"{law['name']} ({unit})")
    axes.set_xlabel(words(*AXIS_NAMES[law["axis"]]))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"$10^{{{v:.0f}}}$"))
    slope = law["slope"]
    interval = f" [{_number(slope['low'])}, {_number(slope['high'])}]" if slope["low"] is not None else ""
    axes.set_title(
        f"r = {law['pearson']['value']:.2f}, n = {law['n']};  " + words("傾き", "slope") + f" {_number(slope['value'])}{interval}", fontsize=8.5, color=SOFT
    )


def efficiency_figure(result: Mapping[str, Any], words: Words) -> Figure | None:
    """The efficiency multiplier of continued pre-training along the assumed Japanese share of the base."""
    rows = [e for e in result["efficiency"] if e.get("sensitivity")]
    if not rows:
        return None
    figure = Figure(figsize=(3.1 * len(rows) + 0.6, 3.3), layout="constrained")
    for axes, row in zip(figure.subplots(1, len(rows), sharey=True, squeeze=False)[0], rows, strict=True):
        points = [p for p in row["sensitivity"] if p["multiplier"]]
        share = np.array([100 * p["share"] for p in points])
        middle = np.array([p["multiplier"] for p in points])
        low = np.array([p["low"] or 0.01 for p in points])
        high = np.array([p["high"] or 100 for p in points])
        axes.fill_between(share, low, high, color=MOSS, alpha=0.14, lw=0)
        axes.plot(share, middle, color=MOSS, marker="o", ms=4.5, lw=1.4)
        axes.axhline(1, color=INK, lw=0.8, ls=(0, (4, 3)))
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_ylim(0.05, 50)
        axes.set_xticks(share, [f"{s:g}" for s in share])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_tick_params(which="minor", size=0)
        axes.set_yticks([0.1, 0.3, 1, 3, 10, 30], ["0.1", "0.3", "1", "3", "10", "30"])
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_tick_params(which="minor", size=0)
        axes.set_title(row["name"])
        axes.set_xlabel(words("ベースの学習データに占める\n日本語の割合（仮定、%）", "assumed Japanese share of\nthe base's training data (%)"))
    figure.axes[0].set_ylabel(words("継続事前学習の効率（倍）", "efficiency of continued pre-training (×)"))
    return figure


def languages_figure(result: Mapping[str, Any], words: Words) -> Figure | None:
    """Language shares of generated text, one bar a model."""
    rows = result["languages"]
    if not rows:
        return None
    languages = list(dict.fromkeys(lang for row in rows for lang in row["shares"]))
    figure = Figure(figsize=(7.6, 0.9 + 0.36 * len(rows)), layout="constrained")
    axes = figure.subplots()
    left = np.zeros(len(rows))
    for i, lang in enumerate(languages):
        values = np.array([row["shares"].get(lang, 0.0) for row in rows])
        colour = LANGUAGE_COLOURS[i % len(LANGUAGE_COLOURS)]
        axes.barh(range(len(rows)), values, left=left, color=colour, height=0.7, label=lang if lang != "others" else words("その他", "others"))
        for k, value in enumerate(values):
            if value >= 4:
                axes.text(left[k] + value / 2, k, f"{value:.1f}", ha="center", va="center", fontsize=6.8, color=INK if lang in ("others", "it", "es") else "white")
        left += values
    axes.set_yticks(range(len(rows)), [row["model"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, max(100, left.max()))
    axes.set_xlabel(words("系列の割合（%）", "share of sequences (%)"))
    axes.spines["left"].set_visible(False)
    axes.tick_params(left=False)
    figure.legend(loc="outside upper center", ncols=len(languages), fontsize=7.5, handlelength=1, handleheight=1, columnspacing=1.1)
    return figure


def equivalence_figure(result: Mapping[str, Any], words: Words) -> Figure | None:
    """What a change in points is worth as a factor of the budget, by the laws that can say it."""
    rows = [row for row in result["equivalence"] if row["curve"]]
    keys = ("niilc_ja", "takase_culture_ja", "neutral_total", "culture_ja")
    rows = sorted(rows, key=lambda row: keys.index(row["key"]) if row["key"] in keys else len(keys))[:3]
    if not rows:
        return None
    figure = Figure(figsize=(3.1 * len(rows) + 0.6, 3.4), layout="constrained")
    for axes, row in zip(figure.subplots(1, len(rows), sharey=True, squeeze=False)[0], rows, strict=True):
        curve = np.array([*row["curve"], [0, 1, 1, 1]])
        curve = curve[np.argsort(curve[:, 0])]
        axes.fill_between(curve[:, 0], curve[:, 2], curve[:, 3], color=INDIGO, alpha=0.14, lw=0)
        axes.plot(curve[:, 0], curve[:, 1], color=INDIGO, lw=1.5)
        axes.axhline(1, color=LINE, lw=0.8, zorder=0)
        axes.axvline(0, color=LINE, lw=0.8, zorder=0)
        own = [q for q in result["own_equivalence"] if q["key"] == row["key"] and "factor" in q]
        for q in own:
            axes.errorbar(q["difference"], q["factor"], yerr=[[q["factor"] - q["low"]], [q["high"] - q["factor"]]], fmt="*", ms=8, color=SHU, lw=1)
        axes.set_yscale("log")
        axes.set_ylim(0.01, 100)
        axes.set_yticks([0.01, 0.1, 0.3, 1, 3, 10, 100], ["0.01", "0.1", "0.3", "1", "3", "10", "100"])
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_tick_params(which="minor", size=0)
        who = words("Takase & Hondaの", "Takase & Honda, ") if row["key"].startswith("takase_") else ""
        axes.set_title(f"{who}{row['n']}" + words("モデル", " models") + f"\n{row['law']}", fontsize=8.5)
        axes.set_xlabel(words("スコアの差（点）", "difference of score (points)"))
        axes.set_ylabel({"ja": words("日本語の計算量（倍）", "Japanese budget (×)"), "total": words("全体の計算量（倍）", "total budget (×)"), "en": words("英語の計算量（倍）", "English budget (×)")}[row["axis"]])
    return figure


FIGURES: dict[str, Callable[[Mapping[str, Any], Words], Figure | None]] = {
    "correlations": correlation_figure,
    "loadings": loadings_figure,
    "components": components_figure,
    "laws": laws_figure,
    "efficiency": efficiency_figure,
    "languages": languages_figure,
    "equivalence": equivalence_figure,
}


# --- drawing --------------------------------------------------------------------------------------------------------


def _array(values: Any) -> np.ndarray:
    return np.array([[np.nan if v is None else v for v in row] for row in values], dtype=float)


def _task(name: str) -> str:
    return TASK_NAMES.get(name, name)


def _group(construction: str) -> str:
    return construction if construction in GROUPS else ""


def _range(counts: np.ndarray) -> str:
    low, high = int(counts.min()), int(counts.max())
    return str(low) if low == high else f"{low}–{high}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}".replace("-", "−")


def _heat(axes: Axes, values: np.ndarray, *, size: float, limit: float = 1.0, aspect: str = "equal") -> Any:
    image = axes.imshow(values, cmap=DIVERGING, vmin=-limit, vmax=limit, aspect=aspect)
    for (i, j), value in np.ndenumerate(values):
        if np.isfinite(value):
            text = f"{value:.2f}".replace("-", "−").replace("0.", ".")
            axes.text(j, i, text, ha="center", va="center", fontsize=size, color="white" if abs(value) > 0.72 * limit else INK)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0)
    return image


def _scatter(axes: Axes, x: np.ndarray, y: np.ndarray, groups: Sequence[str], words: Words, size: float = 34) -> None:
    for group, (marker, colour, names) in GROUPS.items():
        at = [i for i, g in enumerate(groups) if g == group]
        if at:
            axes.scatter(x[at], y[at], marker=marker, s=size, color=colour, alpha=0.85, lw=0, zorder=3, label=words(*names))


def _name_points(figure: Figure, axes: Axes, x: np.ndarray, y: np.ndarray, names: Sequence[str], size: float = 6.4) -> None:
    """Write names beside points where they cover neither points nor other names; a thin line where they had to move."""
    FigureCanvasAgg(figure)
    figure.canvas.draw()
    scale = figure.dpi / 72
    points = axes.transData.transform(np.column_stack([x, y]))
    frame = axes.get_window_extent()
    taken = [(px - 4 * scale, py - 4 * scale, px + 4 * scale, py + 4 * scale) for px, py in points]
    for i in np.argsort(-points[:, 1]):
        width, height = 0.56 * size * len(names[i]) * scale, 1.15 * size * scale
        best = None
        for radius in (6, 10, 16, 24, 34, 46):
            for dx, dy in ((1, 0), (-1, 0), (0.7, 0.7), (-0.7, 0.7), (0.7, -0.7), (-0.7, -0.7), (0, 1), (0, -1)):
                cx, cy = points[i, 0] + dx * radius * scale, points[i, 1] + dy * radius * scale
                left = cx if dx > 0 else cx - width if dx < 0 else cx - width / 2
                box = (left, cy - height / 2, left + width, cy + height / 2)
                outside = max(0, frame.x0 - box[0]) + max(0, box[2] - frame.x1) + max(0, frame.y0 - box[1]) + max(0, box[3] - frame.y1)
                cost = 10 * outside + sum(_overlap(box, other) for j, other in enumerate(taken) if j != i) + radius
                if best is None or cost < best[0]:
                    best = (cost, box, radius)
        box, radius = best[1], best[2]
        taken.append(box)
        to = axes.transData.inverted()
        side = "left" if box[0] >= points[i, 0] else "right" if box[2] <= points[i, 0] else "center"
        edge = {"left": box[0], "right": box[2], "center": (box[0] + box[2]) / 2}[side]
        axes.text(*to.transform((edge, (box[1] + box[3]) / 2)), names[i], fontsize=size, ha=side, va="center", color=INK, zorder=5)
        if radius > 10:
            near = to.transform((min(max(points[i, 0], box[0]), box[2]), min(max(points[i, 1], box[1]), box[3])))
            axes.plot([x[i], near[0]], [y[i], near[1]], color=ASH, lw=0.5, zorder=1)


def _overlap(a: Sequence[float], b: Sequence[float]) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


# --- tables ---------------------------------------------------------------------------------------------------------


def write_tables(result: Mapping[str, Any], out: Path) -> list[str]:
    """Write everything plotted as ``<table>.csv`` and ``<table>.parquet``; returns their file names."""
    written = []
    for name, rows in tables(result).items():
        if not rows:
            continue
        columns = list(dict.fromkeys(key for row in rows for key in row))
        with atomic_path(out / f"{name}.csv") as path, path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
        with atomic_path(out / f"{name}.parquet") as path:
            pyarrow.parquet.write_table(pyarrow.table({c: [row.get(c) for row in rows] for c in columns}), path)
        written += [f"{name}.csv", f"{name}.parquet"]
    return written


def tables(result: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The plotted numbers as rows, by table."""
    components = result["components"]
    parts = []
    if components:
        parts = [("all", components), *([("scratch", components["scratch"])] if components["scratch"] else [])]
    corr, factors = result["correlations"], result["factors"]
    return {
        "models": [
            {
                "model": m["name"], "hf_id": m["hf_id"], "family": m["family"], "construction": m["construction"],
                **{f"{k}_{lang}": b[k] for lang, b in m["budgets"].items() for k in ("tokens", "value", "flops", "kind")},
                **{f"pc{k + 1}": v for k, v in enumerate(m["components"] or [])},
                **m["scores"],
            }
            for m in result["models"]
        ],
        "correlations": [
            {"a": a, "b": b, "pearson": corr["pearson"][i][j], "spearman": corr["spearman"][i][j], "models": corr["counts"][i][j]}
            for i, a in enumerate(corr["tasks"])
            for j, b in enumerate(corr["tasks"])
            if j > i
        ],
        "loadings": [
            {"models": which, "component": f"PC{k + 1}", "variance": part["variance"][k], "task": task, "loading": part["loadings"][k][t]}
            for which, part in parts
            for k in range(len(part["loadings"]))
            for t, task in enumerate(components["tasks"])
        ],
        "budget_correlations": list(components["budgets"]) if components else [],
        "factors": [
            {"factor": k + 1, "contribution": factors["contribution"][k], "task": task, "pattern": factors["pattern"][k][t], "uniqueness": factors["uniquenesses"][t]}
            for k in range(factors["count"])
            for t, task in enumerate(factors["tasks"])
        ] if factors else [],
        "factor_scores": [
            {"model": m["name"], **{f"factor{k + 1}": v for k, v in enumerate(row)}}
            for m, row in zip(result["models"], factors["scores"], strict=True)
        ] if factors else [],
        "laws": [_law_table_row(law) for law in [*result["laws"], *result["all_laws"]] if "slope" in law],
        "law_points": [{"law": law["key"], **p} for law in result["laws"] for p in law.get("points", [])],
        "law_bands": [
            {"law": law["key"], "x": x, "low": low, "expected": expected, "high": high}
            for law in result["laws"]
            for x, low, expected, high in law.get("band", [])
        ],
        "efficiency": [
            {"score": e["name"], **p}
            for e in result["efficiency"]
            for p in e.get("sensitivity", [])
        ],
        "languages": [{"model": row["model"], "language": lang, "percent": v, "source": row["source"]} for row in result["languages"] for lang, v in row["shares"].items()],
        "equivalence": [
            {"law": row["key"], "score": row["law"], "axis": row["axis"], "models": row["n"], "difference": d, "factor": factor, "low": low, "high": high}
            for row in result["equivalence"]
            for d, factor, low, high in row["curve"]
        ],
        "own_equivalence": [
            {k: q.get(k) for k in ("point", "key", "axis", "difference", "difference_low", "difference_high", "factor", "low", "high", "refused", "sentence")}
            for q in result["own_equivalence"]
        ],
        "yours": [
            {"model": p["name"], "kind": p["kind"], "size_bytes": p["size_bytes"], **{f"value_{lang}": b["value"] for lang, b in p["budgets"].items()},
             "law": q["key"], **{k: q[k] for k in ("log_budget", "value", "predicted", "low", "high", "residual", "extrapolated", "convention", "sentence")}}
            for p in result["yours"]
            for q in p["placements"]
        ],
    }  # fmt: skip


def _law_table_row(law: Mapping[str, Any]) -> dict[str, Any]:
    row = {k: law.get(k) for k in ("key", "name", "axis", "unit", "n", "n_families")}
    for k in ("slope", "intercept", "pearson", "spearman", "kendall"):
        row |= {k: law[k]["value"], f"{k}_low": law[k]["low"], f"{k}_high": law[k]["high"]}
    row |= {k: law[k] for k in ("slope_se", "residual_sd", "rmse", "family_rmse")}
    return row | {"notes": "; ".join(law["notes"])}
