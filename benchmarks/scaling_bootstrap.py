"""Seconds for 10,000 resamples of families on a 35 × 19 matrix: every task, and components found anew.

    python benchmarks/scaling_bootstrap.py [--draws 10000]

57 laws (19 tasks × total, English and Japanese budgets), each with slope, intercept, Pearson, Spearman and Kendall;
and the laws of two components with the 19 × 19 correlation matrix decomposed in every resample. Beside them, the same
Pearson and slope for one law by a loop over resamples (on a hundredth of them, scaled up). Random scores: the time
does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy import stats

from tsugiki.evaluate.scaling.laws import AXES, fit_component_law, fit_laws

MODELS, TASKS = 35, 19
SIZES = (11, 5, 4, 4, 3, 2, 2, 1, 1, 1, 1)  # paper B's eleven families: one of eleven models, many of one


def matrix(seed: int = 0) -> tuple[np.ndarray, dict[str, np.ndarray], list[str]]:
    """Scores ``(35, 19)`` in points, log budgets by axis with as many unknown as in the paper, and families."""
    rng = np.random.default_rng(seed)
    x = {axis: 22 + rng.normal(0, 0.7, MODELS) for axis in AXES}
    values = 10 * x["total"][:, None] * rng.random(TASKS) + 5 * rng.normal(size=(MODELS, TASKS))
    for axis, unknown in (("total", 8), ("en", 8), ("ja", 10)):
        x[axis][rng.choice(MODELS, unknown, replace=False)] = np.nan
    return values, x, [f"family {i}" for i, size in enumerate(SIZES) for _ in range(size)]


def loop(y: np.ndarray, x: np.ndarray, families: list[str], draws: int) -> float:
    """Seconds of a plain loop: draw families, gather their rows, one regression."""
    rng = np.random.default_rng(0)
    known = np.isfinite(x)
    rows = {f: np.flatnonzero((np.array(families) == f) & known) for f in sorted(set(families))}
    names = list(rows)
    start = time.perf_counter()
    for _ in range(draws):
        index = np.concatenate([rows[names[i]] for i in rng.integers(0, len(names), len(names))])
        if len(np.unique(x[index])) >= 3:
            stats.linregress(x[index], y[index])
    return time.perf_counter() - start


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=10_000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    draws = options.draws
    values, x, families = matrix()
    names = [f"task {i}" for i in range(TASKS)]
    seconds = {}
    start = time.perf_counter(), time.process_time()
    for axis in AXES:
        fit_laws(values, names, x[axis], families, axis=axis, draws=draws)
    middle = time.perf_counter(), time.process_time()
    z = (values - values.mean(0)) / values.std(0)
    loadings = np.linalg.svd(z, full_matrices=False)[2]
    for component in (0, 1):
        fit_component_law(values, loadings[component], x["ja"], families, name="PC", axis="ja", draws=draws)
    end = time.perf_counter(), time.process_time()
    seconds["57 laws"] = middle[0] - start[0]
    seconds["two components found anew"] = end[0] - middle[0]
    seconds["one law by a loop, scaled"] = 100 * loop(values[:, 0], x["ja"], families, max(1, draws // 100))
    table = Table("", "seconds", title=f"{draws:,} resamples of {len(SIZES)} families, {MODELS} × {TASKS}")
    for name, value in seconds.items():
        table.add_row(name, f"{value:.1f}")
    Console().print(table)
    cpu = end[1] - start[1]
    text = json.dumps({
        "seconds": {k: round(v, 2) for k, v in seconds.items()},
        "cpu_seconds": round(cpu, 2),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "numpy": np.__version__,
    })
    print(text)
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
