"""One picture of a hyperparameter search, drawn from the content of ``search.json`` alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure

from tsugiki.artifacts import atomic_path
from tsugiki.evaluate.scaling.figures import ASH, INDIGO, INK, LINE, MOSS, SHU, SOFT, figure_style, japanese_font

LABELS = {"rank": ("ランク", "rank"), "learning_rate": ("学習率", "learning rate"), "epochs": ("エポック数", "epochs")}
GOOD_TO_BAD = LinearSegmentedColormap.from_list("search", [MOSS, "#a9bf9f", "#dcd9c6"])


def draw_search(result: Mapping[str, Any], path: Path) -> None:
    """Draw history, importances, readings on the way and parallel coordinates into one PNG.

    Args:
        result: the content of ``search.json``.
        path: of the PNG; labels are Japanese where a Japanese font is installed.
    """
    font = japanese_font()
    with rc_context(figure_style(font)):
        figure = search_figure(result, 0 if font else 1)
        FigureCanvasAgg(figure)
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="png", dpi=200, facecolor="white", bbox_inches="tight", pad_inches=0.1)


def search_figure(result: Mapping[str, Any], language: int) -> Figure:
    """The four panels; ``language``: 0 Japanese, 1 English."""
    figure = Figure(figsize=(9.2, 6.4), layout="constrained")
    ((history, weights), (way, parallel)) = figure.subplots(2, 2)
    draw_history(history, result, language)
    draw_importances(weights, result, language)
    draw_readings(way, result, language)
    draw_parallel(parallel, result, language)
    return figure


def draw_history(axes: Axes, result: Mapping[str, Any], language: int) -> None:
    """Validation NLL of every finished trial, and the lowest so far; pruned trials where they were left."""
    done = [t for t in result["trials"] if t["nll"] is not None]
    pruned = [t for t in result["trials"] if t["state"] == "pruned" and t["readings"]]
    axes.scatter([t["number"] for t in pruned], [t["readings"][-1][1] for t in pruned], marker="x", s=26, color=ASH, linewidths=1.1,
                 label=("打ち切り", "pruned")[language])
    axes.scatter([t["number"] for t in done], [t["nll"] for t in done], s=26, color=INDIGO, label=("完了", "finished")[language], zorder=3)
    axes.step([t["number"] for t in done], np.minimum.accumulate([t["nll"] for t in done]), where="post", color=INDIGO, linewidth=1)
    if result["start"] is not None:
        start = _trial(result, result["start"])["nll"]
        axes.axhline(start, color=SOFT, linewidth=0.8, linestyle=":")
        axes.annotate(("出発点", "start")[language], (1, start), xycoords=("axes fraction", "data"), xytext=(-2, 2), textcoords="offset points",
                      ha="right", fontsize=7.5, color=SOFT)
    best = _trial(result, result["best"])
    axes.scatter([best["number"]], [best["nll"]], s=90, facecolors="none", edgecolors=SHU, linewidths=1.4, zorder=4)
    axes.set(title=("試行の経過 (検証NLL)", "History (validation NLL)")[language], xlabel=("試行", "trial")[language], ylabel="nats/token", yscale="log")
    _plain_log(axes)
    axes.legend(fontsize=7.5, loc="upper right")


def draw_importances(axes: Axes, result: Mapping[str, Any], language: int) -> None:
    """Share of the NLL's variance that each setting explains, with its range over bootstrap samples of the trials."""
    found = result["importances"]
    axes.set_title(("重要度 (fANOVA)", "Importances (fANOVA)")[language])
    if not found:
        axes.text(0.5, 0.5, ("完了した試行が少なすぎます", "too few finished trials")[language], ha="center", va="center", color=SOFT)
        axes.set_axis_off()
        return
    names = sorted(found, key=lambda name: found[name]["value"])
    values = np.asarray([found[name]["value"] for name in names])
    reach = np.asarray([[found[n]["value"] - found[n]["low"], found[n]["high"] - found[n]["value"]] for n in names]).T
    axes.barh(range(len(names)), values, height=0.5, color=INDIGO)
    axes.errorbar(values, range(len(names)), xerr=reach, fmt="none", ecolor=INK, elinewidth=0.9, capsize=3)
    axes.set_yticks(range(len(names)), [LABELS[name][language] for name in names])
    axes.set_xlim(0, 1)
    axes.set_xlabel(("分散の割合。線: 試行の再標本で5〜95 %", "share of the variance; lines: 5–95 % over resampled trials")[language])


def draw_readings(axes: Axes, result: Mapping[str, Any], language: int) -> None:
    """Validation NLL of each trial on its way; pruned ones end where they were left."""
    for trial in sorted(result["trials"], key=lambda t: t["number"] == result["best"]):
        if not trial["readings"]:
            continue
        shares, values = zip(*trial["readings"], strict=True)
        best = trial["number"] == result["best"]
        colour = SHU if best else INK if trial["start"] else ASH if trial["state"] == "pruned" else "#8fa2c2"
        axes.plot(shares, values, color=colour, linewidth=1.5 if best or trial["start"] else 0.9, marker="x" if trial["state"] == "pruned" else None,
                  markevery=[-1], markersize=5, linestyle=":" if trial["start"] else "-")
    axes.set(title=("学習中の検証NLL (赤: 最良、点線: 出発点、×: 打ち切り)", "On the way (red: best, dotted: start, ×: pruned)")[language],
             xlabel=("学習の進み", "share of the fit")[language], ylabel="nats/token", yscale="log")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
    _plain_log(axes)


def draw_parallel(axes: Axes, result: Mapping[str, Any], language: int) -> None:
    """Parallel coordinates: each finished trial a line through its settings to its NLL."""
    done = [t for t in result["trials"] if t["nll"] is not None]
    columns = {name: np.log([t[name] for t in done]) for name in LABELS}
    columns["nll"] = np.log([t["nll"] for t in done])
    ends = {name: (values.min(), values.max()) for name, values in columns.items()}
    places = np.stack([(v - ends[n][0]) / (ends[n][1] - ends[n][0]) if np.ptp(v) else np.full(len(v), 0.5) for n, v in columns.items()], axis=1)
    norm = Normalize(0, 1)
    for i in np.argsort(-columns["nll"]):
        best = done[i]["number"] == result["best"]
        axes.plot(range(len(columns)), places[i], color=SHU if best else GOOD_TO_BAD(norm(places[i, -1])), linewidth=1.8 if best else 1.1)
    for x, (low, high) in enumerate(ends.values()):
        axes.axvline(x, color=LINE, linewidth=0.8, zorder=0)
        for y, value in ((1, high), (0, low)) if high > low else ((0.5, low),):
            axes.annotate(f"{np.exp(value):.3g}", (x, y), xytext=(0, 5 if y else -11), textcoords="offset points", ha="center", fontsize=7.5, color=SOFT)
    axes.set_xticks(range(len(columns)), [*(LABELS[name][language] for name in LABELS), ("検証NLL", "validation NLL")[language]])
    axes.set_yticks([])
    axes.set(ylim=(-0.12, 1.12), title=("平行座標 (対数、完了した試行)", "Parallel coordinates (log, finished trials)")[language])
    axes.tick_params(axis="x", length=0, pad=8)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)


def _trial(result: Mapping[str, Any], number: int) -> dict[str, Any]:
    return next(t for t in result["trials"] if t["number"] == number)


def _plain_log(axes: Axes) -> None:
    """Ticks of a short logarithmic axis as plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5) if high / low > 5 else (1, 1.5, 2, 3, 4, 5, 6, 8), numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
