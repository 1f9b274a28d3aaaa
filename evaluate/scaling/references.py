"""The score matrices that the analysis can start from, each with the convention that its models' budgets are counted by."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tsugiki.evaluate.scaling.budgets import PRINTED, Convention, takase
from tsugiki.evaluate.scaling.tables import (
    COMMIT,
    DATA,
    TASKS,
    ModelFacts,
    Scores,
    fetch_scores,
    load_scores,
    read_table,
)

SCORES_FILE = Path("scores") / "scores_35.csv"


@dataclass(frozen=True)
class Reference:
    """A score matrix, and by which convention its models' budgets are counted.

    Attributes:
        scores, models, rule: the matrix, the table of models, the convention of budgets.
        kind: ``saito`` (35 × 19), ``takase`` (nine models as printed) or ``yours``.
        source: a sentence for the output.
    """

    scores: Scores
    models: Mapping[str, ModelFacts]
    rule: Convention
    kind: str
    source: str


def published(models: Mapping[str, ModelFacts]) -> Reference:
    """Paper B's matrix at ``$TSUGIKI_DATA/scores/scores_35.csv`` (else ``../shared/data/…``), else paper A's table."""
    folders = [Path(os.environ["TSUGIKI_DATA"])] if os.environ.get("TSUGIKI_DATA") else []
    for folder in (*folders, Path("..") / "shared" / "data"):
        path = folder / SCORES_FILE
        if path.exists():
            found = load_scores(path)
            source = (
                f"{len(found.models)} base models × {len(found.tasks)} tasks, the matrix of Saito et al. ({SCORES_FILE.name}), "
                "budgets as printed in their Table 1."
            )
            return Reference(found, models, PRINTED, "saito", source)
    return printed_reference(models)


def fetched(models: Mapping[str, ModelFacts], cache: Path) -> Reference:
    """Paper B's matrix from its public repository, kept in ``cache``."""
    found = fetch_scores(cache)
    source = f"{len(found.models)} base models × {len(found.tasks)} tasks, the matrix of Saito et al. at commit {COMMIT[:12]}, budgets as printed in their Table 1."
    return Reference(found, models, PRINTED, "saito", source)


def printed_reference(models: Mapping[str, ModelFacts]) -> Reference:
    """Paper A's Table 2 with its conventions of budgets."""
    _, rows = read_table(DATA / "takase_table2_scores.csv")
    tasks = [c for c in rows[0][1] if c not in ("model", "group")]
    values = np.array([[float(row[t]) / 100 for t in tasks] for _, row in rows])
    source = (
        "Only the nine models × seven scores that Takase & Honda print (Table 2): the 35 × 19 matrix was not found. "
        "Give it with --scores FILE, or fetch it with --download; with nine models every statement here is weak."
    )
    return Reference(Scores([row["model"] for _, row in rows], tasks, values), models, takase(), "takase", source)


def own(path: Path | str, models: Mapping[str, ModelFacts]) -> Reference:
    """A score matrix of the user's; with paper B's tasks it is read as paper B's is."""
    found = load_scores(path)
    kind = "saito" if set(found.tasks) >= set(TASKS) else "yours"
    source = f"{len(found.models)} models × {len(found.tasks)} tasks of {Path(path).name}, budgets as printed."
    return Reference(found, models, PRINTED, kind, source)
