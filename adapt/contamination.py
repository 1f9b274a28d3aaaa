"""Do training samples hold benchmark items? A score on a benchmark that was trained on says nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tsugiki.adapt.samples import character_ngrams, normalise

NGRAM = 16  # characters: a Japanese clause; shorter runs are everyday phrases ("次のうち正しいものはどれか")
SHARE = 0.7  # of an item's n-grams in one sample


@dataclass(frozen=True)
class Overlap:
    """One benchmark item and the training sample that holds most of it.

    Attributes:
        item, sample: their positions.
        share: of the item's n-grams that the sample holds, 0 to 1.
    """

    item: int
    sample: int
    share: float


@dataclass(frozen=True)
class Index:
    """Character n-grams of all samples as sorted hashes uint64 ``(G,)``, and the sample of each ``(G,)``."""

    ngram: int
    grams: np.ndarray
    owner: np.ndarray


def index_samples(samples: Sequence[str], *, ngram: int = NGRAM) -> Index:
    """Index the training samples' texts; they are normalised (NFKC, runs of spaces), so that layout hides nothing."""
    held = [character_ngrams(normalise(t), ngram) for t in samples]
    owner = np.repeat(np.arange(len(held)), [len(h) for h in held])
    grams = np.concatenate(held) if held else np.zeros(0, np.uint64)
    order = np.argsort(grams, kind="stable")
    return Index(ngram, grams[order], owner[order])


def overlaps(items: Sequence[str], index: Index, *, share: float = SHARE) -> tuple[list[Overlap], int]:
    """Benchmark items of whose character n-grams one training sample holds ``share`` or more.

    Returns:
        the overlaps, in the order of the items, and how many items are too short to tell (fewer characters than an
        n-gram has).
    """
    ngram, grams, owner = index.ngram, index.grams, index.owner
    found, short = [], 0
    for i, text in enumerate(items):
        text = normalise(text)
        if len(text) < ngram:
            short += 1
            continue
        wanted = character_ngrams(text, ngram)
        first, last = np.searchsorted(grams, wanted, "left"), np.searchsorted(grams, wanted, "right")
        if np.count_nonzero(last > first) < share * len(wanted):
            continue  # not even all samples together hold so much
        counts = np.bincount(np.concatenate([owner[a:b] for a, b in zip(first, last, strict=True)]), minlength=1)
        best = int(counts.argmax())
        if counts[best] >= share * len(wanted):
            found.append(Overlap(i, best, float(counts[best] / len(wanted))))
    return found, short
