"""Which base is better, and how sure that is: paired differences of several bases on the same items, ranks, a choice.

Two numbers compare bases with different tokenizers: the domain's task score, and bits per character of the test answers.
Nats per token do not: a tokenizer with longer tokens has fewer of them, each harder to guess.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tsugiki.intervals import expanded, paired_interval, ratio_intervals

CONFIDENCE = 0.95  # of all pairwise statements together


@dataclass(frozen=True)
class Measured:
    """One base after adaptation, item by item; K fits of different seeds.

    Attributes:
        name: of the base.
        scores: float ``(K, I)``, task scores of I answered test items.
        nats: float ``(K, S)``, summed nats of each of S test completions.
    """

    name: str
    scores: np.ndarray
    nats: np.ndarray


def joint_confidence(bases: int, confidence: float = CONFIDENCE) -> float:
    """What each pair's interval needs so that all pairs of ``bases`` hold together (Bonferroni)."""
    return 1 - (1 - confidence) / max(1, math.comb(bases, 2))


def compare_pairs(
    found: Sequence[Measured], score_documents: Sequence[str], characters: np.ndarray, bits_documents: Sequence[str], *,
    confidence: float = CONFIDENCE, resamples: int = 2000, seed: int = 0,
) -> list[dict[str, Any]]:
    """Every pair of bases: paired differences of task score and of bits per character.

    Whole documents are drawn again; where there are several seeds, the spread between them is added
    (:func:`with_seeds`). Together the intervals of one measure hold with ``confidence``.

    Args:
        found: the bases, all measured on the same items in the same order.
        score_documents: ``(I,)``, the document of each answered item.
        characters: ``(S,)``, characters of each scored completion.
        bits_documents: ``(S,)``, its document.

    Returns:
        ``{"first", "second", "score": {"difference", "ci", "better"}, "bits": the same}`` for each pair; differences are
        first − second, ``ci`` is None where there are too few documents, ``better`` names the base whose advantage the
        whole interval shows, or is None.
    """
    each = joint_confidence(len(found), confidence)
    options = {"resamples": resamples, "seed": seed}
    documents = len(set(bits_documents))
    rows = []
    for i, a in enumerate(found):
        for b in found[i + 1 :]:
            difference = a.scores.mean(axis=0) - b.scores.mean(axis=0)
            score = paired_interval(difference, score_documents, confidence=each, **options)
            score = with_seeds(float(difference.mean()), score, [m.scores.mean(axis=1) for m in found], each)
            nats = (a.nats.mean(axis=0) - b.nats.mean(axis=0)) / math.log(2)
            bits = ratio_intervals(nats[None], characters, bits_documents, confidence=expanded(each, documents), **options)[0]
            per_fit = [m.nats.sum(axis=1) / math.log(2) / characters.sum() for m in found]
            mean = float(nats.sum() / characters.sum())
            bits = with_seeds(mean, bits, per_fit, each)
            rows.append({
                "first": a.name, "second": b.name,
                "score": _pair(float(difference.mean()), score, a.name, b.name),
                "bits": _pair(mean, bits, b.name, a.name),  # fewer are better
            })  # fmt: skip
    return rows


def with_seeds(
    middle: float, interval: tuple[float, float] | None, fits: Sequence[np.ndarray], confidence: float
) -> tuple[float, float] | None:
    """An interval over documents, wider by what another seed may bring.

    The difference of two means of K fits has its own interval over seeds: Student's, with the spread between the fits of
    one base pooled over all B bases and ``B (K − 1)`` degrees of freedom. The two distances from the middle are added as
    squares, as those of independent errors. Of one seed nothing can be said: the interval stays.

    Args:
        middle: the difference.
        interval: of it, over documents.
        fits: for every base ``(K,)``, the numbers of its fits.
    """
    from scipy.stats import t

    number = len(fits[0])
    if interval is None or number < 2:
        return interval
    spread = math.sqrt(2 * float(np.mean([np.var(f, ddof=1) for f in fits])) / number)
    reach = spread * t.ppf((1 + confidence) / 2, len(fits) * (number - 1))
    return middle - math.hypot(middle - interval[0], reach), middle + math.hypot(interval[1] - middle, reach)


def _pair(difference: float, ci: tuple[float, float] | None, above: str, below: str) -> dict[str, Any]:
    """``above`` is the better one where the difference is positive."""
    better = None if ci is None or ci[0] <= 0 <= ci[1] else above if difference > 0 else below
    return {"difference": difference, "ci": list(ci) if ci else None, "better": better}


def ranks(names: Sequence[str], pairs: Sequence[Mapping[str, Any]], measure: str) -> dict[str, int]:
    """One more than the number of bases that are surely better: bases that cannot be told apart share a rank."""
    beaten = [p["second"] if p[measure]["better"] == p["first"] else p["first"] for p in pairs if p[measure]["better"]]
    return {name: 1 + beaten.count(name) for name in names}


def choose(bases: Sequence[Mapping[str, Any]], pairs: Sequence[Mapping[str, Any]]) -> tuple[str, str, list[str]]:
    """The base to take: what decides is asked in turn, and only among those that nothing before could tell apart.

    1. ``score``: no base has a surely higher one. 2. ``bits``: none of those left has surely fewer. Not told apart is not
    the same as equal, so then 3. ``measured``: the highest measured score is the best guess. Where that is the same, 4.
    ``forgetting``: the fewest benchmarks surely lost. 5. ``size``: the smallest file. 6. ``order``: the first named.

    Args:
        bases: rows with ``name``, ``score``, ``lost`` (a count, None where nothing was measured) and ``bytes`` of the file.

    Returns:
        the name, what decided, and the bases that were not told apart from it before that.
    """
    left = [b["name"] for b in bases]
    for measure in ("score", "bits"):
        among = [p for p in pairs if p["first"] in left and p["second"] in left]
        best = [name for name in left if ranks(left, among, measure)[name] == 1]
        if len(best) == 1:
            return best[0], measure, [name for name in left if name != best[0]]
        left = best
    of: dict[str, Callable[[Mapping[str, Any]], Any]] = {"measured": lambda b: -b["score"], "forgetting": lambda b: b["lost"], "size": lambda b: b["bytes"]}
    for reason, key in of.items():
        values = {b["name"]: key(b) for b in bases if b["name"] in left}
        if None in values.values():
            continue
        best = [name for name in left if values[name] == min(values.values())]
        if len(best) == 1:
            return best[0], reason, [name for name in left if name != best[0]]
        left = best
    return left[0], "order", left[1:]
