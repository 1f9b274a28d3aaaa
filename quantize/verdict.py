"""From what was measured to what may be said: paired intervals, non-inferiority, which file to take."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from scipy.stats import binomtest

from tsugiki.errors import UserError
from tsugiki.evaluate.domain import Answer, summarize
from tsugiki.evaluate.score import exact_match
from tsugiki.intervals import MIN_CLUSTERS, expanded, paired_interval, ratio_intervals
from tsugiki.samples import EncodedSample

REFERENCE = "F16"  # the recipe's; a check of files takes the name from the file
MOST_SAMPLES = 1_000_000  # "how many more samples" is not counted beyond this
QUANTILES = {"median": 0.5, "p90": 0.9, "p99": 0.99, "p999": 0.999}


@dataclass(frozen=True)
class CheckSettings:
    """How much harm is too much, and how sure to be of it.

    Attributes:
        margin_nll: a level may cost this much, nats per completion token. 0.05 is 5 % of perplexity: the losses
            published for Q4_K_M, which people use without complaint, lie below it (+0.014 for Llama-2-7B and
            +0.028 for Llama-3-8B, llama.cpp#6936), those of Q2_K, which people notice, above (+0.10 and +0.45).
        margin_score: a level may lose this much of the mean score, between 0 and 1. 0.03 is three answers in a
            hundred; less than that, users do not tell apart, and a few hundred samples cannot either.
        confidence: of the two-sided intervals.
        resamples: of the bootstrap over documents.
        seed: of the bootstrap.
    """

    margin_nll: float = field(default=0.05, metadata={"help": "a level may cost so much, nats/token"})
    margin_score: float = field(default=0.03, metadata={"help": "a level may lose so much of the mean score, 0 to 1"})
    confidence: float = field(default=0.95, metadata={"help": "of the two-sided intervals"})
    resamples: int = field(default=2000, metadata={"help": "bootstrap samples of the documents"})
    seed: int = field(default=0, metadata={"help": "of the bootstrap"})

    def __post_init__(self) -> None:
        wrong = [
            f"{name} must be {rule}, not {getattr(self, name)!r}"
            for name, ok, rule in (
                ("margin_nll", self.margin_nll > 0, "above 0"),
                ("margin_score", 0 < self.margin_score <= 1, "above 0 and at most 1"),
                ("confidence", 0 < self.confidence < 1, "between 0 and 1"),
                ("resamples", self.resamples >= 100, "at least 100"),
                ("seed", self.seed >= 0, "at least 0"),
            )
            if not ok
        ]
        if wrong:
            raise UserError("; ".join(wrong))


def judge(
    samples: Sequence[EncodedSample],
    files: Mapping[str, Path],
    tokens: Mapping[str, np.ndarray],
    answered: Mapping[str, Sequence[Answer]] | None,
    settings: CheckSettings,
) -> dict:
    """Statistics and verdicts of what the child processes measured; see :func:`tsugiki.quantize.check.check`.

    Args:
        files: name to path, the reference first.
        tokens: ``sample`` int64 ``(T,)``; ``nll``, ``kld``, ``top1``, ``top5`` ``(files, T)``.
        answered: name to answers, in the order of ``samples``; ``None`` where nothing was answered (plain text): the
            verdict then rests on the NLL alone.
    """
    names, number = list(files), len(samples)
    documents = [s.document for s in samples]
    count = len(set(documents))
    sums = np.stack([np.bincount(tokens["sample"], row, number) for row in tokens["nll"]])  # (files, N)
    counts = np.bincount(tokens["sample"], minlength=number).astype(float)
    points = None if answered is None else np.array([[a.score for a in answered[n]] for n in names])  # (files, N)
    joint = 1 - (1 - settings.confidence) / max(1, len(names) - 1)  # Bonferroni over the levels

    def nll_intervals(confidence: float) -> list:
        return ratios(sums - sums[0], counts, documents, settings, confidence)

    delta_ci, joint_ci = nll_intervals(settings.confidence), nll_intervals(joint)
    rows = []
    for i, name in enumerate(names):
        row = {
            "level": name,
            "bytes": Path(files[name]).stat().st_size,
            "nll": float(sums[i].sum() / counts.sum()),
            "delta_nll": float((sums[i] - sums[0]).sum() / counts.sum()),
            "delta_ci": delta_ci[i],
            **divergences(tokens, i),
        }
        scored = points is not None
        if scored:
            row |= _scores(samples, answered, (names[0], name), points[i], points[0], settings)
        if i == 0:
            row |= {"verdict": "reference", "more_samples": None, "why": _why_reference(row, number)}
        else:
            row["verdict"] = verdict(row["delta_ci"], row.get("delta_score_ci"), settings, scored=scored)
            row["more_samples"] = _more_samples(row, number, settings) if row["verdict"] == "inconclusive" else None
            row["beyond"] = row["delta_nll"] > settings.margin_nll or row.get("delta_score", 0) < -settings.margin_score
            score_ci = _paired(points[i] - points[0], documents, settings, joint) if scored else None
            row["jointly"] = verdict(joint_ci[i], score_ci, settings, scored=scored)
            row["why"] = _why(row, number, count, settings, names[0])
        rows.append(row)
    return {
        "samples": number,
        "tokens": int(counts.sum()),
        "documents": count,
        "settings": asdict(settings),
        "levels": rows,
        "recommended": recommend(rows),
    }


def divergences(tokens: Mapping[str, np.ndarray], i: int) -> dict:
    """Mean, quantiles and maximum of file ``i``'s divergence (nats/token), and the agreement of its first choices."""
    kld = tokens["kld"][i]
    quantiles = np.quantile(kld, list(QUANTILES.values()))
    return {
        "kld_mean": float(kld.mean()),
        **{f"kld_{k}": float(q) for k, q in zip(QUANTILES, quantiles, strict=True)},
        "kld_max": float(kld.max()),
        "top1": float(tokens["top1"][i].mean()),
        "top5": float(tokens["top5"][i].mean()),
    }


def _scores(samples, answered, names: tuple[str, str], own: np.ndarray, reference: np.ndarray, settings: CheckSettings) -> dict:
    documents, ones = [s.document for s in samples], np.ones(len(own))
    before, after = (answered[n] for n in names)
    return {
        "score": float(own.mean()),
        "score_ci": ratios(own[None], ones, documents, settings, settings.confidence)[0],
        "delta_score": float((own - reference).mean()),
        "delta_score_ci": _paired(own - reference, documents, settings, settings.confidence),
        "flips": flips(before, after),
        "kinds": _by_kind(samples, own, reference, settings),
        "truncated": summarize(after)["truncated"],
        **_changed(samples, before, after),
    }


def flips(reference: Sequence[Answer], level: Sequence[Answer]) -> dict:
    """Items whose answer changes from right to wrong and from wrong to right (right: equal to the expected answer
    after normalisation), and the two-sided exact p-value of their difference (McNemar's test)."""
    before = [exact_match(a.text, a.reference) for a in reference]
    after = [exact_match(a.text, a.reference) for a in level]
    lost, won = (sum(a == x and b == 1 - x for a, b in zip(before, after, strict=True)) for x in (1, 0))
    return {"to_wrong": lost, "to_right": won, "p": float(binomtest(lost, lost + won).pvalue) if lost + won else 1.0}


# --- intervals --------------------------------------------------------------------------------------------------


def ratios(values: np.ndarray, counts: np.ndarray, documents: Sequence[str], settings: CheckSettings, confidence: float) -> list:
    """Interval ``[low, high]`` of ``Σ values / Σ counts`` for each row of ``values`` ``(K, N)``, by the bootstrap over
    documents; ``None`` for fewer than 10 of them."""
    wide = expanded(confidence, len(set(documents)))
    found = ratio_intervals(values, counts, documents, confidence=wide, resamples=settings.resamples, seed=settings.seed)
    return [None if x is None else list(x) for x in found]


def _paired(differences: np.ndarray, documents: Sequence[str], settings: CheckSettings, confidence: float) -> list | None:
    """:func:`tsugiki.intervals.paired_interval` with the check's bootstrap."""
    found = paired_interval(differences, documents, confidence=confidence, resamples=settings.resamples, seed=settings.seed)
    return found and list(found)


# --- verdicts ---------------------------------------------------------------------------------------------------


def verdict(
    delta_ci: Sequence[float] | None, score_ci: Sequence[float] | None, settings: CheckSettings, *, scored: bool = True
) -> str:
    """Non-inferiority of a level to its reference by the paired intervals of its NLL and score differences (level − F16).

    ``pass``: both intervals lie inside their margins. ``degraded``: at least one lies wholly outside.
    ``inconclusive``: anything else, a missing interval included. A level that is worse than the margin passes with a
    probability of at most ``(1 − confidence) / 2``: both tests must be passed, so two tests are no looser than one.
    Without ``scored`` there is no score, and the NLL alone decides.
    """
    if delta_ci is None or (scored and score_ci is None):
        return "inconclusive"
    if delta_ci[0] > settings.margin_nll or (scored and score_ci[1] < -settings.margin_score):
        return "degraded"
    if delta_ci[1] < settings.margin_nll and (not scored or score_ci[0] > -settings.margin_score):
        return "pass"
    return "inconclusive"


def _more_samples(row: dict, number: int, settings: CheckSettings) -> int | None:
    """Intervals shrink with the root of the samples: how many until none straddles its margin any more."""
    needed = number
    measures = [(row["delta_nll"], row["delta_ci"], settings.margin_nll)]
    if "delta_score" in row:
        turned = row["delta_score_ci"] and [-x for x in row["delta_score_ci"][::-1]]
        measures.append((-row["delta_score"], turned, settings.margin_score))
    for value, interval, margin in measures:
        if interval is None:
            return None
        if interval[0] <= margin <= interval[1]:
            half = interval[1] - value if value < margin else value - interval[0]
            distance = abs(margin - value)
            if number * half**2 > distance**2 * MOST_SAMPLES:
                return None
            needed = max(needed, math.ceil(number * (half / distance) ** 2))
    return max(1, needed - number)


_JOINTLY = {
    ("pass", "pass"): {"en": ", also when all levels are judged together", "ja": "(全レベルをまとめて判定しても合格)"},
    ("pass", "inconclusive"): {
        "en": "; judged together with all other levels it is not proven yet",
        "ja": "(全レベルをまとめて判定した場合は、まだ合格と断定できません)",
    },
}


def recommend(rows: Sequence[dict]) -> dict:
    """The smallest file that passes; if none, the largest that neither is shown nor looks to be worse; if none, the reference.

    Where nothing is proven the careful choice is the one closest to the reference. Each verdict stands for itself; that the best
    of several was picked is told by ``jointly``: the verdict of the picked level with intervals that hold for all
    levels together (Bonferroni).
    """
    f16 = next((r["level"] for r in rows if r["verdict"] == "reference"), REFERENCE)
    for wanted, en, ja in (
        ("pass", "the smallest file that passes", "合格した中で最小のファイルです"),
        (
            "inconclusive",
            f"no level is proven yet; of those not shown to be degraded it is the closest to {f16}, so check with more samples",
            f"まだ合格と言える量子化はなく、劣化と断定できない中で{f16}に最も近いファイルです。サンプルを増やして確かめてください",
        ),
        ("reference", f"no level is shown to keep the quality, so keep {f16}", f"品質を保つと言える量子化がないため、{f16}を使ってください"),
    ):
        found = [r for r in rows if r["verdict"] == wanted and not r.get("beyond")]
        if found:
            best = (max if wanted == "inconclusive" else min)(found, key=lambda r: r["bytes"])
            size = f"{best['bytes'] / 1e6:,.1f} MB"
            together = _JOINTLY.get((wanted, best.get("jointly")), {"en": "", "ja": ""})
            return {
                "level": best["level"],
                "jointly": best.get("jointly"),
                "why": {
                    "en": f"{best['level']} ({size}): {en}{together['en']}.",
                    "ja": f"{best['level']}({size}):{ja}{together['ja']}。",
                },
            }
    raise ValueError("there is no row to recommend")


def _by_kind(samples, points: np.ndarray, reference: np.ndarray, settings: CheckSettings) -> dict:
    kinds = np.array([s.kind for s in samples])
    if len(set(kinds)) < 2:
        return {}
    found = {}
    for kind in sorted(set(kinds)):
        mask = kinds == kind
        documents = [s.document for s in samples if s.kind == kind]
        own, differences = points[mask], points[mask] - reference[mask]
        found[str(kind)] = {
            "n": int(mask.sum()),
            "score": float(own.mean()),
            "score_ci": ratios(own[None], np.ones(len(own)), documents, settings, settings.confidence)[0],
            "delta_score": float(differences.mean()),
            "delta_score_ci": _paired(differences, documents, settings, settings.confidence),
        }
    return found


def _changed(samples, reference: Sequence[Answer], level: Sequence[Answer], most: int = 5) -> dict:
    changed = [
        {"id": s.id, "prompt": s.prompt, "reference": s.completion, "f16": r.text, "level": a.text,
         "f16_score": r.score, "level_score": a.score}
        for s, r, a in zip(samples, reference, level, strict=True)
        if r.text != a.text
    ]
    # the ones that cost the most first
    return {"changed": len(changed), "examples": sorted(changed, key=lambda c: c["level_score"] - c["f16_score"])[:most]}


def _signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")


def _why_reference(row: dict, number: int) -> dict:
    nll = f"{row['nll']:.4f}"
    if "score" not in row:
        return {"en": f"The reference: NLL {nll} nats/token on {number} windows.", "ja": f"基準です。{number}区間でNLL {nll} nats/トークン。"}
    points = f"{100 * row['score']:.1f}"
    return {
        "en": f"The reference: NLL {nll} nats/token and score {points} points on {number} samples.",
        "ja": f"基準です。{number}件でNLL {nll} nats/トークン、スコア {points}点。",
    }


def _why(row: dict, number: int, documents: int, settings: CheckSettings, reference: str) -> dict:
    """One sentence with the numbers, in English and in Japanese."""
    nll, scored = _signed(row["delta_nll"], 4), "score" in row
    points = _signed(100 * row["delta_score"], 1) if scored else ""
    if row["delta_ci"] is None or (scored and row["delta_score_ci"] is None):
        return {
            "en": f"NLL {nll} nats/token" + (f" and score {points} points" if scored else "") + f" against {reference}, but {documents} "
            f"documents are too few for an interval; at least {MIN_CLUSTERS} are needed.",
            "ja": f"{reference}との差はNLL {nll} nats/トークン" + (f"、スコア {points}点" if scored else "") + f"ですが、文書が{documents}件"
            f"しかなく区間を推定できません({MIN_CLUSTERS}件以上が必要です)。",
        }
    a, b = (_signed(x, 4) for x in row["delta_ci"])
    percent, margin, more = f"{100 * settings.confidence:g}", f"{settings.margin_nll:g}", row["more_samples"]
    intervals = ("both intervals lie", "どちらの区間も") if scored else ("the interval lies", "区間が")
    en = {
        "pass": f"{intervals[0]} inside the margin{'s' if scored else ''}",
        "degraded": "an interval lies wholly beyond its margin",
        "inconclusive": f"an interval straddles its margin; about {more:,} more samples would decide"
        if more
        else "an interval straddles its margin, too close to it to be decided by more samples",
    }[row["verdict"]]
    ja = {
        "pass": f"{intervals[1]}許容幅に収まっています",
        "degraded": "区間全体が許容幅を超えています",
        "inconclusive": f"区間が許容幅をまたぐため判定できません(あと約{more:,}件で判定できる見込みです)"
        if more
        else "区間が許容幅の境界に近く、サンプルを増やしても判定は難しい見込みです",
    }[row["verdict"]]
    score_en = score_ja = ""
    if scored:
        c, d = (_signed(100 * x, 1) for x in row["delta_score_ci"])
        points_margin = f"{100 * settings.margin_score:g}"
        score_en = f", score {points} points ({c} to {d}, margin {points_margin})"
        score_ja = f"、スコア {points}点({c}〜{d}、許容幅 {points_margin}点)"
    return {
        "en": f"NLL {nll} nats/token against {reference} ({percent} % interval {a} to {b}, margin {margin}){score_en} "
        f"on {number} {'samples' if scored else 'windows'}: {en}.",
        "ja": f"{reference}との差はNLL {nll} nats/トークン({percent} %区間 {a}〜{b}、許容幅 {margin}){score_ja}。"
        f"{number}{'件のテスト' if scored else '区間'}で、{ja}。",
    }
