"""Two models on the same items: the paired difference of their scores, with an interval that draws documents again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tsugiki.artifacts import read_jsonl, write_jsonl
from tsugiki.errors import UserError
from tsugiki.intervals import clustered_stderr, paired_interval


@dataclass(frozen=True)
class Item:
    """One item's score.

    Attributes:
        id: of the item; the pairs go by it.
        document: what it comes from; items of one document are drawn together.
        score: usually 0 to 1; ``None`` where there is none.
        unparsed: nothing could be read from the answer (its score, if any, is that of a wrong answer).
        truncated: the answer did not end by itself.
    """

    id: str
    document: str
    score: float | None
    unparsed: bool = False
    truncated: bool = False


def write_items(path: Path, items: Sequence[Item]) -> None:
    """Write items as JSON Lines."""
    write_jsonl(path, (asdict(i) for i in items))


def read_items(path: Path) -> list[Item]:
    """Read items; further fields are ignored, an item without a document is its own.

    Raises:
        UserError: a row without id or score.
    """
    items = []
    for number, row in enumerate(read_jsonl(path), 1):
        try:
            id, score = str(row["id"]), row["score"]
            score = None if score is None else float(score)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"not an item with an id and a score: {error}", where=f"{path}:{number}") from error
        items.append(Item(id, str(row.get("document") or id), score, bool(row.get("unparsed")), bool(row.get("truncated"))))
    return items


def compare_items(
    before: Sequence[Item], after: Sequence[Item], *, span: float = 1.0, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """What changed from one model to the other, on the same items.

    Args:
        before, after: the items of the two models, in any order.
        span: the largest difference that a score's scale allows.
        confidence, resamples, seed: of the bootstrap over documents.

    Returns:
        ``n``, ``documents``, ``before`` and ``after`` (mean scores), ``difference`` (after − before), ``ci`` of it
        (:func:`tsugiki.intervals.paired_interval`), ``better`` and ``worse`` (items whose score rose or fell), ``change``: ``gained`` or ``lost`` where the interval lies on one
        side of zero, else ``open``.

    Raises:
        UserError: the items are not the same, one lacks a score, or there is none.
    """
    first, second = ({i.id: i for i in items} for items in (before, after))
    if len(first) != len(before) or len(second) != len(after):
        raise UserError("an item is there twice")
    if first.keys() != second.keys():
        raise UserError(
            f"the two models were not scored on the same items: {len(first):,} and {len(second):,}, {len(first.keys() & second.keys()):,} shared",
            hint="Score both with the same --limit and the same data.",
        )
    if not first:
        raise UserError("there is no item to compare")
    ids = sorted(first)
    missing = [i for i in ids if first[i].score is None or second[i].score is None]
    if missing:
        raise UserError(f"{len(missing):,} of {len(ids):,} items lack a score, first {missing[0]!r}")
    old, new = (np.array([side[i].score for i in ids]) for side in (first, second))
    documents = [first[i].document for i in ids]
    difference = new - old
    mean = float(difference.mean())
    ci = paired_interval(difference, documents, span=span, confidence=confidence, resamples=resamples, seed=seed)
    change = "open" if ci is None or ci[0] <= 0 <= ci[1] else "gained" if mean > 0 else "lost"
    return {
        "n": len(ids), "documents": len(set(documents)), "before": float(old.mean()), "after": float(new.mean()), "difference": mean,
        "ci": list(ci) if ci else None, "better": int((difference > 0).sum()), "worse": int((difference < 0).sum()), "change": change,
    }  # fmt: skip


def standard_error(items: Sequence[Item]) -> float | None:
    """Standard error of the items' mean score, by document; ``None`` for fewer than two documents."""
    return clustered_stderr([i.score for i in items], [i.document for i in items])
