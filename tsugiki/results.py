"""The one results table of all runs: ``runs/results.sqlite``."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path

_COLUMNS = (
    "run", "stage", "model", "base", "adapter", "level", "task", "metric", "value", "stderr", "n", "settings", "provenance",
)


@dataclass(frozen=True)
class Result:
    """One number and where it comes from.

    Attributes:
        model: what was measured, for example ``setsubi/tiny-llama``.
        base, adapter, level: its parts; empty where there is none.
        task, metric: for example ``setsubi/rule`` and ``exact_match``.
        value, stderr, n: the number, its standard error, the items behind it.
        settings: whatever else is needed to measure it again.
        provenance: hash of the stage that measured it.
    """

    model: str
    base: str
    task: str
    metric: str
    value: float
    adapter: str = ""
    level: str = ""
    stderr: float | None = None
    n: int | None = None
    settings: dict = field(default_factory=dict)
    provenance: str = ""


def replace_results(path: Path | str, run: str, stage: str, rows: Iterable[Result]) -> None:
    """Replace all rows of one stage of one run, in one transaction."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(path, timeout=60)) as connection, connection:
        connection.execute(f"CREATE TABLE IF NOT EXISTS results ({', '.join(_COLUMNS)})")
        connection.execute("DELETE FROM results WHERE run = ? AND stage = ?", (run, stage))
        for row in rows:
            values = {**asdict(row), "run": run, "stage": stage}
            values["settings"] = json.dumps(row.settings, ensure_ascii=False, sort_keys=True)
            connection.execute(
                f"INSERT INTO results VALUES ({', '.join('?' * len(_COLUMNS))})", [values[c] for c in _COLUMNS]
            )


def read_results(path: Path | str) -> list[dict]:
    """All rows, as dictionaries; ``settings`` is decoded."""
    if not Path(path).exists():
        return []
    with closing(sqlite3.connect(path, timeout=60)) as connection:
        connection.row_factory = sqlite3.Row
        rows = [dict(r) for r in connection.execute("SELECT * FROM results")]
    return [{**r, "settings": json.loads(r["settings"])} for r in rows]
