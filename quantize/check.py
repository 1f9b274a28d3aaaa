"""What quantization did to the model: each level against its F16 origin, on the same token ids, with a verdict.

All levels are read in lock-step with the reference, so that no logits are stored. Native code runs in child
processes only: a file that makes llama.cpp abort gives a sentence, and the memory of each level is its own.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from tsugiki.errors import UserError, raise_problems
from tsugiki.evaluate.domain import Answer, domain_answers, summarize
from tsugiki.evaluate.engine import Engine, check_gguf, log_sum_exp, thread_count
from tsugiki.evaluate.score import score
from tsugiki.machine import cpu_count, peak_rss
from tsugiki.progress import progress
from tsugiki.samples import EncodedSample, read_encoded, write_encoded

REFERENCE = "F16"
MIN_DOCUMENTS = 10  # a bootstrap over fewer is not to be trusted: no interval, so no verdict
WIDTH = 8  # sequences decoded together: 16 took a third more time on a CPU, attention runs over all of them
MOST_SAMPLES = 1_000_000  # "how many more samples" is not counted beyond this


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


def check(
    reference: Path,
    levels: Mapping[str, Path],
    samples: Sequence[EncodedSample],
    *,
    settings: CheckSettings | None = None,
    scoring: str = "exact_match",
    max_new_tokens: int = 64,
    end_of_turn: int,
    on_step: Callable[[str], None] | None = None,
) -> dict:
    """Measure the reference and every level on the samples; judge each level; recommend one.

    Args:
        reference: the F16 GGUF.
        levels: name of a level to its file.
        samples: test samples as token ids; the NLL and the divergence are over their completion tokens.
        scoring: name of a score (:mod:`tsugiki.evaluate.score`), of greedy answers.
        end_of_turn: the id that ends an answer.
        on_step: called with the name of each part when it is finished.

    Returns:
        JSON-ready: ``samples``, ``tokens``, ``documents``, ``settings``, ``seconds`` (by part), ``levels``,
        ``recommended`` ``{"level", "why"}``. Each of ``levels``, F16 first, has ``level``, ``bytes``; ``nll``
        (nats/token, token-weighted), ``delta_nll``, ``delta_ci``; ``kld_mean``, ``kld_median``, ``kld_p90``,
        ``kld_p99``, ``kld_p999``, ``kld_max`` (KL(F16 ‖ level), nats/token); ``top1`` (share of tokens with the
        same most probable id) and ``top5`` (mean share of F16's five most probable ids among the level's five);
        ``score``, ``score_ci``, ``delta_score``, ``delta_score_ci``, ``truncated``, ``kinds`` (the same by kind),
        ``changed`` (answers that differ from F16's) and ``examples`` of them; ``prompt_tok_s``, ``gen_tok_s``,
        ``seconds_per_answer`` (single stream), ``peak_rss`` (bytes, of a process that answers one question at
        a time with a context of 2,048), ``threads``; ``verdict`` (F16: ``reference``), ``why`` in ``en`` and
        ``ja``, ``more_samples`` (about how many more would decide; ``None`` where the question does not arise or
        the answer is beyond a million). An interval is ``None`` where fewer than 10 documents are there.

    Memory while comparing, beside the models: about ``(files + 4) × 64 MB`` (:data:`LOGIT_BYTES` a file in
    native memory, four temporary blocks).

    Raises:
        UserError: no samples or levels, broken files (all of them named), another vocabulary than the
            reference's, samples that do not fit, or a file on which llama.cpp crashes.
    """
    settings = settings or CheckSettings()
    files = {REFERENCE: Path(reference), **{k: Path(v) for k, v in levels.items() if k != REFERENCE}}
    _refuse(files, samples, settings, scoring)
    started, seconds = time.perf_counter(), {}
    longest = max(len(s.prompt_ids) + max(len(s.completion_ids), max_new_tokens) for s in samples)
    n_ctx = -(-max(4096, longest) // 256) * 256
    measured: dict[str, dict] = {}
    with tempfile.TemporaryDirectory(prefix="tsugiki-check-") as folder, progress() as bar:
        rows = Path(folder) / "samples.jsonl"
        write_encoded(rows, samples)
        task = bar.add_task("check", total=len(files) * (2 * len(samples) + 1), note="")
        common = {"samples": str(rows), "n_ctx": n_ctx}

        def run(part: str, job: dict) -> dict:
            before = time.perf_counter()
            result = run_child(job | common, name=part, on_step=lambda n: bar.advance(task, n))
            seconds[part] = round(time.perf_counter() - before, 2)
            bar.update(task, note=part)
            if on_step:
                on_step(part)
            return result

        def answers(name: str) -> dict:
            return run(
                f"answers {name}",
                {
                    "task": "answers",
                    "path": str(files[name]),
                    "scoring": scoring,
                    "max_new_tokens": max_new_tokens,
                    "end_of_turn": end_of_turn,
                },
            )

        # small models use one thread each, so that several run side by side
        workers = max(1, cpu_count() // max(thread_count(p) for p in files.values()))
        out = Path(folder) / "tokens.npz"
        with ThreadPoolExecutor(workers) as pool:
            comparing = pool.submit(
                run,
                "compare",
                {"task": "compare", "paths": {k: str(p) for k, p in files.items()}, "out": str(out)},
            )
            answering = {name: pool.submit(answers, name) for name in files}
            try:
                comparing.result()
                answered = {k: [Answer(**a) for a in f.result()["answers"]] for k, f in answering.items()}
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        with np.load(out) as arrays:
            tokens = dict(arrays)
        for name, path in files.items():  # speed alone, one after the other
            measured[name] = run(
                f"speed {name}",
                {
                    "task": "speed",
                    "path": str(path),
                    "max_new_tokens": max_new_tokens,
                    "end_of_turn": end_of_turn,
                },
            )
    result = judge(samples, files, tokens, answered, settings)
    for row in result["levels"]:
        row.update(measured[row["level"]])
    result["seconds"] = {**seconds, "total": round(time.perf_counter() - started, 2)}
    return result


def _refuse(files: Mapping[str, Path], samples: Sequence, settings: CheckSettings, scoring: str) -> None:
    problems = []
    if not samples:
        problems.append("no test sample")
    if len(files) < 2:
        problems.append("no level to check")
    if not 0 < settings.confidence < 1:
        problems.append(f"confidence is {settings.confidence}, not between 0 and 1")
    for key in ("margin_nll", "margin_score"):
        if not getattr(settings, key) > 0:
            problems.append(f"{key} is {getattr(settings, key)}; a margin is above 0")
    for path in files.values():
        try:
            check_gguf(path)
        except UserError as error:
            problems.append(f"{error.where}: {error.message}")
    raise_problems(problems, what="the check cannot start")
    score(scoring, "", "")


# --- from numbers to verdicts -----------------------------------------------------------------------------------


def judge(
    samples: Sequence[EncodedSample],
    files: Mapping[str, Path],
    tokens: Mapping[str, np.ndarray],
    answered: Mapping[str, Sequence[Answer]],
    settings: CheckSettings,
) -> dict:
    """Statistics and verdicts of what the child processes measured; see :func:`check` for what is returned.

    Args:
        files: name to path, the reference first.
        tokens: ``sample`` int64 ``(T,)``; ``nll``, ``kld``, ``top1``, ``top5`` ``(files, T)``.
        answered: name to answers, in the order of ``samples``.
    """
    names, number = list(files), len(samples)
    documents, group = np.unique([s.document for s in samples], return_inverse=True)
    sums = np.stack([np.bincount(tokens["sample"], row, number) for row in tokens["nll"]])  # (files, N)
    counts = np.bincount(tokens["sample"], minlength=number).astype(float)
    points = np.array([[a.score for a in answered[n]] for n in names])  # (files, N)
    ones = np.ones(number)
    delta_ci = bootstrap(sums - sums[0], counts, group, settings)
    score_ci = bootstrap(points, ones, group, settings)
    paired = points - points[0]
    paired_ci = bootstrap(paired, ones, group, settings)
    paired_ci = [_widen(ci, d, settings) for ci, d in zip(paired_ci, paired, strict=True)]
    rows = []
    for i, name in enumerate(names):
        kld = tokens["kld"][i]
        quantiles = np.quantile(kld, [0.5, 0.9, 0.99, 0.999])
        row = {
            "level": name,
            "bytes": files[name].stat().st_size,
            "nll": float(sums[i].sum() / counts.sum()),
            "delta_nll": float((sums[i] - sums[0]).sum() / counts.sum()),
            "delta_ci": delta_ci[i],
            "kld_mean": float(kld.mean()),
            **{f"kld_{k}": float(q) for k, q in zip(("median", "p90", "p99", "p999"), quantiles, strict=True)},
            "kld_max": float(kld.max()),
            "top1": float(tokens["top1"][i].mean()),
            "top5": float(tokens["top5"][i].mean()),
            "score": float(points[i].mean()),
            "score_ci": score_ci[i],
            "delta_score": float(paired[i].mean()),
            "delta_score_ci": paired_ci[i],
            "kinds": _by_kind(samples, points[i], points[0], group, settings),
            "truncated": summarize(answered[name])["truncated"],
            **_changed(samples, answered[REFERENCE], answered[name]),
        }
        if name == REFERENCE:
            row |= {"verdict": "reference", "more_samples": None, "why": _why_reference(row, number)}
        else:
            row["verdict"] = verdict(row["delta_ci"], row["delta_score_ci"], settings)
            row["more_samples"] = _more_samples(row, number, settings) if row["verdict"] == "inconclusive" else None
            row["why"] = _why(row, number, len(documents), settings)
        rows.append(row)
    return {
        "samples": number,
        "tokens": int(counts.sum()),
        "documents": len(documents),
        "settings": asdict(settings),
        "levels": rows,
        "recommended": recommend(rows),
    }


def bootstrap(values: np.ndarray, counts: np.ndarray, group: np.ndarray, settings: CheckSettings) -> list:
    """Percentile intervals of ``Σ values / Σ counts`` when documents are drawn again with replacement.

    Args:
        values: float ``(K, N)``: K quantities of N samples; each gets its own interval from the same draws.
        counts: float ``(N,)``: what a quantity is divided by (tokens, or ones).
        group: int ``(N,)``: the document of each sample, 0 … D − 1.

    Returns:
        K intervals ``[low, high]``, or ``None`` for fewer than 10 documents.
    """
    number = int(group.max()) + 1
    if number < MIN_DOCUMENTS:
        return [None] * len(values)
    sums = np.stack([np.bincount(group, v, number) for v in values], axis=1)  # (D, K)
    counts = np.bincount(group, counts, number)
    rng = np.random.default_rng(settings.seed)
    share = np.full(number, 1 / number)
    step = max(1, 4_000_000 // number)  # bounds the weights to 32 MB
    drawn = []
    for start in range(0, settings.resamples, step):
        weights = rng.multinomial(number, share, min(step, settings.resamples - start)).astype(float)
        drawn.append((weights @ sums) / (weights @ counts)[:, None])
    tail = (1 - settings.confidence) / 2
    low, high = np.quantile(np.concatenate(drawn), [tail, 1 - tail], axis=0)
    return [[float(a), float(b)] for a, b in zip(low, high, strict=True)]


def _widen(interval: list | None, differences: np.ndarray, settings: CheckSettings) -> list | None:
    """No narrower than the exact binomial bound for no event in N: a bootstrap of all-equal values is a point."""
    if interval is None:
        return None
    floor = 1 - ((1 - settings.confidence) / 2) ** (1 / len(differences))
    mean = float(differences.mean())
    return [min(interval[0], mean - floor), max(interval[1], mean + floor)]


def verdict(delta_ci: Sequence[float] | None, score_ci: Sequence[float] | None, settings: CheckSettings) -> str:
    """Non-inferiority of a level to F16 by the paired intervals of its NLL and score differences (level − F16).

    ``pass``: both intervals lie inside their margins. ``degraded``: at least one lies wholly outside.
    ``inconclusive``: anything else, a missing interval included.
    """
    if delta_ci is None or score_ci is None:
        return "inconclusive"
    if delta_ci[0] > settings.margin_nll or score_ci[1] < -settings.margin_score:
        return "degraded"
    if delta_ci[1] < settings.margin_nll and score_ci[0] > -settings.margin_score:
        return "pass"
    return "inconclusive"


def _more_samples(row: dict, number: int, settings: CheckSettings) -> int | None:
    """Intervals shrink with the root of the samples: how many until none straddles its margin any more."""
    needed = number
    for value, interval, margin in (
        (row["delta_nll"], row["delta_ci"], settings.margin_nll),
        (-row["delta_score"], row["delta_score_ci"] and [-x for x in row["delta_score_ci"][::-1]], settings.margin_score),
    ):
        if interval is None:
            return None
        if interval[0] <= margin <= interval[1]:
            half = interval[1] - value if value < margin else value - interval[0]
            distance = abs(margin - value)
            if number * half**2 > distance**2 * MOST_SAMPLES:
                return None
            needed = max(needed, math.ceil(number * (half / distance) ** 2))
    return max(1, needed - number)


def recommend(rows: Sequence[dict]) -> dict:
    """The smallest file that passes; if none, the largest that is not shown to be worse; if none, F16.

    Where nothing is proven the careful choice is the one closest to F16.
    """
    for wanted, en, ja in (
        ("pass", "the smallest file that passes", "合格した中で最小のファイルです"),
        (
            "inconclusive",
            "no level is proven yet; of those not shown to be degraded it is the closest to F16, so check with more samples",
            "まだ合格と言える量子化はなく、劣化と断定できない中でF16に最も近いファイルです。サンプルを増やして確かめてください",
        ),
        ("reference", "every level is degraded, so keep F16", "すべての量子化で劣化が認められたため、F16を使ってください"),
    ):
        found = [r for r in rows if r["verdict"] == wanted]
        if found:
            best = (max if wanted == "inconclusive" else min)(found, key=lambda r: r["bytes"])
            size = f"{best['bytes'] / 1e6:,.1f} MB"
            return {"level": best["level"], "why": {"en": f"{best['level']} ({size}): {en}.", "ja": f"{best['level']}({size}):{ja}。"}}
    raise ValueError("there is no row to recommend")


def _by_kind(samples, points: np.ndarray, reference: np.ndarray, group: np.ndarray, settings: CheckSettings) -> dict:
    kinds = np.array([s.kind for s in samples])
    if len(set(kinds)) < 2:
        return {}
    found = {}
    for kind in sorted(set(kinds)):
        mask = kinds == kind
        inner = np.unique(group[mask], return_inverse=True)[1]
        values = np.stack([points[mask], points[mask] - reference[mask]])
        own, paired = bootstrap(values, np.ones(int(mask.sum())), inner, settings)
        found[str(kind)] = {
            "n": int(mask.sum()),
            "score": float(values[0].mean()),
            "score_ci": own,
            "delta_score": float(values[1].mean()),
            "delta_score_ci": _widen(paired, values[1], settings),
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
    nll, points = f"{row['nll']:.4f}", f"{100 * row['score']:.1f}"
    return {
        "en": f"The reference: NLL {nll} nats/token and score {points} points on {number} samples.",
        "ja": f"基準です。{number}件でNLL {nll} nats/トークン、スコア {points}点。",
    }


def _why(row: dict, number: int, documents: int, settings: CheckSettings) -> dict:
    """One sentence with the numbers, in English and in Japanese."""
    nll, points = _signed(row["delta_nll"], 4), _signed(100 * row["delta_score"], 1)
    if row["delta_ci"] is None or row["delta_score_ci"] is None:
        return {
            "en": f"NLL {nll} nats/token and score {points} points against F16, but {documents} documents are too few "
            f"for an interval; at least {MIN_DOCUMENTS} are needed.",
            "ja": f"F16との差はNLL {nll} nats/トークン、スコア {points}点ですが、文書が{documents}件しかなく区間を"
            f"推定できません({MIN_DOCUMENTS}件以上が必要です)。",
        }
    a, b = (_signed(x, 4) for x in row["delta_ci"])
    c, d = (_signed(100 * x, 1) for x in row["delta_score_ci"])
    percent = f"{100 * settings.confidence:g}"
    margin, points_margin = f"{settings.margin_nll:g}", f"{100 * settings.margin_score:g}"
    more = row["more_samples"]
    en = {
        "pass": "both intervals lie inside the margins",
        "degraded": "an interval lies wholly beyond its margin",
        "inconclusive": f"an interval straddles its margin; about {more:,} more samples would decide"
        if more
        else "an interval straddles its margin, too close to it to be decided by more samples",
    }[row["verdict"]]
    ja = {
        "pass": "どちらの区間も許容幅に収まっています",
        "degraded": "区間全体が許容幅を超えています",
        "inconclusive": f"区間が許容幅をまたぐため判定できません(あと約{more:,}件で判定できる見込みです)"
        if more
        else "区間が許容幅の境界に近く、サンプルを増やしても判定は難しい見込みです",
    }[row["verdict"]]
    return {
        "en": f"NLL {nll} nats/token against F16 ({percent} % interval {a} to {b}, margin {margin}), score {points} points "
        f"({c} to {d}, margin {points_margin}) on {number} samples: {en}.",
        "ja": f"F16との差はNLL {nll} nats/トークン({percent} %区間 {a}〜{b}、許容幅 {margin})、スコア {points}点"
        f"({c}〜{d}、許容幅 {points_margin}点)。{number}件のテストで、{ja}。",
    }


# --- child processes --------------------------------------------------------------------------------------------


def run_child(job: dict, *, name: str, on_step: Callable[[int], None]) -> dict:
    """Run one job of :func:`_main` in a process of its own and return its result.

    Raises:
        UserError: what the child raised, or that it died, with the signal and its last words.
    """
    with tempfile.TemporaryFile() as words:
        child = subprocess.Popen(
            [sys.executable, "-m", "tsugiki.quantize.check"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=words,
            env=os.environ | {"PYTHONSAFEPATH": "1"},
        )
        result = at = None
        try:
            with child.stdin:
                child.stdin.write(json.dumps(job).encode())
            for line in child.stdout:
                message = json.loads(line)
                if "error" in message:
                    raise UserError(message["error"], where=message["where"], hint=message["hint"])
                at = message.get("at", at)
                on_step(message.get("steps", 0))
                result = message.get("result", result)
            child.wait()
        finally:
            child.kill()
            child.wait()
            child.stdout.close()
        if child.returncode or result is None:
            words.seek(max(0, words.seek(0, os.SEEK_END) - 400))
            last = words.read().decode("utf-8", "replace").strip().splitlines()[-1:] or ["no last words"]
            code = child.returncode
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
            raise UserError(
                f"the process of “{name}” {how}: {last[0]}",
                where=at or job.get("path"),
                hint="The file may be damaged or the memory too small: make the level again, or free memory.",
            )
    return result


def _say(**message) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def _main() -> None:
    job = json.load(sys.stdin)
    try:
        task = {"compare": _compare, "answers": _answers, "speed": _speed}[job["task"]]
        _say(result=task(job))
    except UserError as error:
        _say(error=error.message, where=error.where, hint=error.hint)


def _compare(job: dict) -> dict:
    samples = read_encoded(Path(job["samples"]))
    with ExitStack() as stack:
        engines = []
        for path in job["paths"].values():
            _say(at=path)
            engines.append(stack.enter_context(Engine(path, n_ctx=job["n_ctx"], n_seq_max=WIDTH)))
        first = engines[0]
        for other in engines[1:]:
            if other.vocab_size != first.vocab_size:
                raise UserError(
                    f"its vocabulary has {other.vocab_size} tokens, that of {first.path.name} {first.vocab_size}",
                    where=str(other.path),
                    hint="A level is compared with the F16 file that it was made from.",
                )
            if other.vocab_digest() != first.vocab_digest():
                raise UserError(
                    f"its vocabulary has other tokens than that of {first.path.name} ({first.vocab_size} each)",
                    where=str(other.path),
                    hint="A level is compared with the F16 file that it was made from.",
                )
        index, parts = [], []
        for blocks in _lock_step(engines, samples):
            rows = blocks[0][0]
            index.append(rows[:, 0])
            parts.append(divergence([logits for _, logits in blocks], rows[:, 2]))
            # steps: finished samples, once for each file
            _say(steps=int((rows[:, 1] == 0).sum()) * len(engines))
    arrays = {key: np.concatenate([p[key] for p in parts], axis=1) for key in parts[0]}
    np.savez(job["out"], sample=np.concatenate(index), **arrays)
    return {}


def _lock_step(engines: Sequence[Engine], samples: Sequence[EncodedSample]):
    streams = [e.logit_blocks(samples) for e in engines]
    for first in streams[0]:
        blocks = [first]
        for engine, stream in zip(engines[1:], streams[1:], strict=True):
            _say(at=str(engine.path))
            blocks.append(next(stream))
        if any(not np.array_equal(rows, first[0]) for rows, _ in blocks[1:]):
            raise AssertionError("the engines cut the samples differently")
        yield blocks


def divergence(logits: Sequence[np.ndarray], targets: np.ndarray) -> dict[str, np.ndarray]:
    """What each file makes of the same ``R`` positions; the first of the files is the reference ``p``.

    ``KL(p ‖ q) = Σ p · (x_p − x_q) / Σ p − (lse_p − lse_q)``: the difference of logits is nearly exact in float32,
    sums and log-sum-exps are float64, and dividing by ``Σ p`` keeps a constant between the two files' logits out
    of the rounding of ``p``. Rounding below zero is cut off.

    Args:
        logits: float32 ``(R, V)`` of each file.
        targets: ``(R,)`` token ids.

    Returns:
        ``nll`` and ``kld`` in nats, ``top1`` (same most probable id, 0 or 1) and ``top5`` (share of the reference's
        five most probable ids among the file's five), each float64 ``(files, R)``.
    """
    reference, row = logits[0], np.arange(len(targets))
    lse = log_sum_exp(reference)
    p = np.exp(reference - lse[:, None].astype(np.float32))
    mass = p.sum(axis=1, dtype=np.float64)
    best, five = reference.argmax(axis=1), _top(reference, 5)
    found = {key: np.zeros((len(logits), len(targets))) for key in ("nll", "kld", "top1", "top5")}
    for i, x in enumerate(logits):
        own = lse if i == 0 else log_sum_exp(x)
        found["nll"][i] = own - x[row, targets]
        if i == 0:
            found["top1"][i] = found["top5"][i] = 1
            continue
        gap = reference - x
        gap *= p
        found["kld"][i] = np.maximum(gap.sum(axis=1, dtype=np.float64) / mass - (lse - own), 0)
        found["top1"][i] = x.argmax(axis=1) == best
        found["top5"][i] = (five[:, :, None] == _top(x, 5)[:, None, :]).any(axis=2).mean(axis=1)
    return found


def _top(logits: np.ndarray, k: int) -> np.ndarray:
    k = min(k, logits.shape[1])
    return np.argpartition(logits, logits.shape[1] - k, axis=1)[:, -k:]


def _answers(job: dict) -> dict:
    samples = read_encoded(Path(job["samples"]))
    done = 0

    def step(_: int) -> None:
        nonlocal done
        done += 1
        if done % 25 == 0 or done == len(samples):
            _say(steps=25 if done % 25 == 0 else done % 25)

    with Engine(job["path"], n_ctx=job["n_ctx"], n_seq_max=WIDTH) as engine:
        found = domain_answers(
            engine,
            samples,
            scoring=job["scoring"],
            max_new_tokens=job["max_new_tokens"],
            end_of_turn=job["end_of_turn"],
            on_done=step,
        )
    return {"answers": [asdict(a) for a in found]}


def _speed(job: dict) -> dict:
    """Speed and memory as a user has them: one answer at a time, llama.cpp's own attention, nothing else running."""
    samples = read_encoded(Path(job["samples"]))
    picked = [samples[i] for i in np.unique(np.linspace(0, len(samples) - 1, 16).astype(int))]
    longest = max(len(s.prompt_ids) for s in picked) + job["max_new_tokens"]
    with Engine(job["path"], n_ctx=max(2048, longest), n_seq_max=1, flash_attention=True) as engine:
        speed = engine.speed()
        times = []
        while len(times) < len(picked) and (not times or sum(times) < 20):
            started = time.perf_counter()
            engine.generate(
                [picked[len(times)].prompt_ids], max_new_tokens=job["max_new_tokens"], stop_ids=[job["end_of_turn"]]
            )
            times.append(time.perf_counter() - started)
        _say(steps=1)
        return {
            "prompt_tok_s": speed.prompt_tok_s,
            "gen_tok_s": speed.gen_tok_s,
            "seconds_per_answer": sum(times) / len(times),
            "peak_rss": peak_rss(),
            "load_seconds": engine.load_seconds,
            "threads": thread_count(engine.path),
        }


if __name__ == "__main__":
    _main()
