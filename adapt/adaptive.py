"""The adaptive sweep's rules: which counts of a grid to train next, and when a fit has lost. Pure functions of what was measured.

The curve is taken to have one lowest count: it falls before it and, where it overfits, rises beyond. So the largest count
is trained with one far smaller. Where the largest is best, a count in between is trained only if the law of the curve
(:func:`tsugiki.adapt.forecast.chance_below`) leaves it a chance, or if the largest fit overtrained; where a smaller one is
best, its neighbours are, until no count beside it is unknown.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tsugiki.adapt.forecast import chance_below
from tsugiki.intervals import resampled_ratios

COARSE = 8  # the second count is the one nearest to the largest divided by this
DOUBT = 0.05  # a count with a smaller chance of being the best is not trained
NOISE = 0.03  # standard deviation of a fit's test NLL from seed to seed, relative
READINGS = 4  # of the validation NLL while a fit trains, at equal numbers of steps
RESAMPLES = 1000

Text = dict[str, str]


@dataclass(frozen=True)
class Measured:
    """What is known of a trained count.

    Attributes:
        nats: ``(N,)`` summed nats of each test sample, a mean over its fits.
        fits: how many fits (seeds) there are.
        overtrained: whether the validation NLL of one turned upward before its end (:func:`turned_up`).
    """

    nats: np.ndarray
    fits: int = 1
    overtrained: bool = False


@dataclass(frozen=True)
class Decision:
    """What to train next.

    Attributes:
        fits: for each count to train, how many fits it is to have in all; empty: the sweep is finished.
        why: in Japanese and English; of each count in ``fits``, or at the end of each count that was never trained.
        chances: of unmeasured counts between the best and the next smaller one, that the curve lies lower there.
    """

    fits: dict[int, int]
    why: dict[int, Text]
    chances: dict[int, float]


def coarse_counts(grid: Collection[int]) -> list[int]:
    """The two counts to begin with: the largest, and the one nearest to an eighth of it on the log scale."""
    largest = max(grid)
    smaller = [n for n in sorted(grid) if n < largest]
    return [*([_nearest(smaller, largest / COARSE)] if smaller else []), largest]


def next_fits(
    grid: Collection[int],
    measured: Mapping[int, Measured],
    tokens: np.ndarray,
    documents: Sequence[str],
    *,
    pruned: Collection[int] = (),
    seeds: int = 1,
    noise: float = NOISE,
) -> Decision:
    """Decide what to train next.

    Args:
        grid: the counts that may be trained.
        measured: the counts that were trained to the end.
        tokens: ``(N,)`` completion tokens of each test sample.
        documents: ``(N,)`` source document of each.
        pruned: counts whose fit was ended because it could not win.
        seeds: fits that a count may have; only counts that may be the best get more than one.
        noise: standard deviation of a fit's NLL from seed to seed, relative.
    """
    grid = sorted(grid)
    begin = coarse_counts(grid)
    if begin[-1] not in measured or len(measured) < len(begin):
        missing = [n for n in begin if n not in measured]
        return Decision(dict.fromkeys(missing, 1), dict.fromkeys(missing, _FIRST), {})
    counts = sorted(n for n in measured if n in grid)
    matrix = np.stack([measured[n].nats for n in counts])
    drawn = resampled_ratios(matrix, tokens, documents, resamples=RESAMPLES, seed=0)
    at = int(matrix.sum(1).argmin())
    best, known = counts[at], {*counts, *pruned}
    below, above = max((n for n in known if n < best), default=None), min((n for n in known if n > best), default=None)
    left = [n for n in grid if (below or 0) < n < best and n not in known]
    right = [n for n in grid if above and best < n < above and n not in known]
    chances: dict[int, float] = {}
    wanted: dict[int, Text] = {}
    if above is None:
        chances = {n: chance_below(counts, drawn, n, drawn[:, at], noise=noise) for n in left}
        if left and measured[best].overtrained:
            wanted = {left[-1]: _OVERTRAINED}
        elif likely := [n for n in left if chances[n] > DOUBT]:
            n = max(likely, key=lambda n: chances[n])
            wanted = {n: _chance(best, chances[n])}
    else:
        if left:
            wanted[_nearest(left, math.sqrt(below * best)) if below else left[-1]] = _beside(best)
        if right:
            wanted[_nearest(right, math.sqrt(best * above))] = _beside(best)
    if wanted:
        return Decision(dict.fromkeys(wanted, 1), wanted, chances)
    if more := _more_seeds(counts, measured, drawn, seeds, noise):
        return Decision(dict.fromkeys(more, seeds), dict.fromkeys(more, _SEEDS), chances)
    never = [n for n in grid if n not in known]
    return Decision({}, {n: _chance(best, chances[n]) if n in chances else _beyond(best, below if n < best else above) for n in never}, chances)


def _more_seeds(counts: list[int], measured: Mapping[int, Measured], drawn: np.ndarray, seeds: int, noise: float) -> list[int]:
    """The counts that other seeds might make the best, where they are two or more, and which have not had all seeds."""
    spread = noise / np.sqrt([measured[n].fits for n in counts])
    moved = drawn * np.exp(spread * np.random.default_rng(0).standard_normal(drawn.shape))
    wins = np.bincount(moved.argmin(1), minlength=len(counts)) / len(moved)
    rivals = [n for n, share in zip(counts, wins, strict=True) if share > DOUBT]
    return [n for n in rivals if measured[n].fits < seeds] if len(rivals) > 1 else []


def _nearest(counts: Sequence[int], to: float) -> int:
    """The count nearest on the log scale; of two as near the smaller."""
    return min(counts, key=lambda n: (round(abs(math.log(n / to)), 9), n))


# --- readings on the way --------------------------------------------------------------------------------------


def reading(step: int, steps: int) -> int:
    """Which of the :data:`READINGS` a reading after ``step`` of ``steps`` is, from 0."""
    return step * READINGS // steps - 1


def turned_up(nats: np.ndarray, tokens: np.ndarray, documents: Sequence[str]) -> bool:
    """Whether a fit overtrained: its last reading lies above an earlier one by more than two standard errors.

    Args:
        nats: ``(K, S)``, summed nats of each validation sample at each reading; a row of NaN was not read.
        tokens, documents: ``(S,)`` of each.
    """
    rows = nats[~np.isnan(nats).any(1)]
    if len(rows) < 2 or np.isnan(nats[-1]).any():
        return False
    drawn = resampled_ratios(rows, tokens, documents, resamples=RESAMPLES, seed=0)
    rise = drawn[:, -1] - drawn[:, int(rows[:-1].sum(1).argmin())]
    return bool(rise.mean() > 2 * rise.std(ddof=1))


def cannot_win(
    nats: np.ndarray, rival: np.ndarray, tokens: np.ndarray, documents: Sequence[str], *, noise: float = NOISE
) -> bool:
    """Whether a fit has lost against a finished one, from half of its steps on.

    Its lag, the logarithm of its NLL over the rival's at the same share of the steps (over the rival's at its end, where
    that is higher), is drawn on to its end in a straight line if it shrinks. The fit has lost if the lag then still
    lies above 0 by 1.96 standard errors: those of the paired bootstrap, and the noise from seed to seed.

    Args:
        nats: ``(K, S)``, summed nats of each validation sample at each reading so far; a row of NaN was not read.
        rival: likewise, of all :data:`READINGS`.
        tokens, documents: ``(S,)`` of each.
        noise: as in :func:`next_fits`.
    """
    now = len(nats) - 1
    rows = np.concatenate([nats[now - 1 :], rival[now - 1 : now + 1], rival[-1:]])
    if len(rows) < 5 or 2 * len(nats) < READINGS or now == READINGS - 1 or np.isnan(rows).any():
        return False
    before, here, rival_before, rival_here, rival_end = np.log(resampled_ratios(rows, tokens, documents, resamples=RESAMPLES, seed=0)).T
    lag, earlier = here - np.maximum(rival_here, rival_end), before - np.maximum(rival_before, rival_end)
    at_end = lag + np.minimum(lag - earlier, 0) * (READINGS - 1 - now)
    return bool(at_end.mean() > 1.96 * math.hypot(at_end.std(ddof=1), math.sqrt(2) * noise))


# --- what is said ---------------------------------------------------------------------------------------------

_FIRST = {"ja": "学習曲線の両側", "en": "the two sides of the curve first"}
_OVERTRAINED = {"ja": "最大の件数の検証NLLが途中から上がった", "en": "the validation NLL of the largest count turned upward before its end"}
_SEEDS = {"ja": "シードによって最良が変わりうる", "en": "another seed might change which count is best"}


def _chance(best: int, chance: float) -> Text:
    share = "<0.1" if chance < 0.001 else f"{100 * chance:.1f}"
    return {
        "ja": f"{best:,}件より良い見込みは{share}%（学習曲線の法則から）",
        "en": f"a chance of {share}% to be better than {best:,}, by the law of the curve",
    }


def _beside(best: int) -> Text:
    return {"ja": f"測った中で最良の{best:,}件の隣", "en": f"beside {best:,}, the best so far"}


def _beyond(best: int, edge: int | None) -> Text:
    return {"ja": f"{edge:,}件が{best:,}件より悪く、その先にある", "en": f"beyond {edge:,}, which is worse than {best:,}"}
