"""What quantization did to a model: each level against its F16 origin, on the same token ids, with a verdict.

All levels are read in lock-step with the reference (:mod:`tsugiki.quantize.compare`), so that no logits are stored.
What may be concluded is in :mod:`tsugiki.quantize.verdict`.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from tsugiki.artifacts import write_jsonl
from tsugiki.errors import UserError, raise_problems
from tsugiki.evaluate.domain import Answer
from tsugiki.evaluate.engine import thread_count
from tsugiki.evaluate.score import score
from tsugiki.machine import available_memory, cpu_count
from tsugiki.progress import progress
from tsugiki.quantize.compare import compare, memory_of, plan_groups, run_task
from tsugiki.quantize.profile import file_profile, level_name, read_header
from tsugiki.quantize.verdict import REFERENCE, CheckSettings, divergences, judge
from tsugiki.quantize.windows import WINDOW
from tsugiki.samples import EncodedSample, read_encoded, write_encoded

CACHE_TYPES = ("q8_0", "q4_0")


def check(
    reference: Path,
    levels: Mapping[str, Path],
    samples: Sequence[EncodedSample],
    *,
    texts: Mapping[str, Sequence[EncodedSample]] | None = None,
    settings: CheckSettings | None = None,
    scoring: str = "exact_match",
    max_new_tokens: int = 64,
    end_of_turn: int | None = None,
    memory: int | None = None,
    on_step: Callable[[str], None] | None = None,
) -> dict:
    """Measure the reference and every level on the samples; judge each level; recommend one.

    Args:
        reference: the F16 GGUF, or another that the levels are made from; its row is called what the file calls itself.
        levels: name of a level to its file.
        samples: test samples as token ids; the NLL and the divergence are over their completion tokens. May be empty
            where texts are given.
        texts: name of a set to its windows (:func:`encode_sets`); measured in the same pass, judged apart.
        scoring: name of a score (:mod:`tsugiki.evaluate.score`), of greedy answers.
        end_of_turn: the id that ends an answer; ``None`` takes the id that ends all completions.
        memory: bytes that the comparison may take; ``None`` takes four fifths of what is free. Levels that do not fit
            beside the reference together go in groups, each a pass over the reference.
        on_step: called with the name of each part when it is finished.

    Returns:
        JSON-ready: ``samples``, ``tokens``, ``documents``, ``settings``, ``seconds`` (by part), ``memory`` (``budget``,
        ``needed`` by all files together and ``peak_rss`` of a comparing process in bytes, ``groups``), ``levels``, ``recommended`` ``{"level", "jointly", "why"}`` and ``texts``
        (the same for each set: ``samples`` are windows; no answers, so verdicts on the NLL alone; without samples
        ``levels`` and ``recommended`` are those of the texts' worst verdicts). Each of ``levels``, F16 first, has
        ``level``, ``bytes``; ``nll`` (nats/token, token-weighted), ``delta_nll``, ``delta_ci``; ``kld_mean``,
        ``kld_median``, ``kld_p90``, ``kld_p99``, ``kld_p999``, ``kld_max`` (KL(F16 ‖ level), nats/token); ``top1`` (share
        of tokens with the same most probable id) and ``top5`` (mean share of F16's five most probable ids among the
        level's five); ``score``, ``score_ci``, ``delta_score``, ``delta_score_ci``, ``flips`` (answers that turn wrong
        or right), ``truncated``, ``kinds`` (the same by kind), ``changed`` (answers that differ from F16's) and
        ``examples`` of them; ``prompt_tok_s``, ``gen_tok_s``, ``seconds_per_answer`` (single stream), ``peak_rss``
        (bytes, of a process that answers one question at a time with a context of 2,048), ``threads``; ``verdict``
        (F16: ``reference``), ``beyond`` (a measured difference, sure or not, is larger than its margin), ``jointly``
        (the verdict with intervals that hold for all levels together), ``why`` in ``en`` and ``ja``, ``more_samples``
        (about how many more would decide; ``None`` where the question does not arise or the answer is beyond a
        million). An interval is ``None`` where fewer than 10 documents are there.

    Memory beside the models' files while comparing, each file: 64 MB of logits
    (:data:`~tsugiki.evaluate.engine.LOGIT_BYTES`), the F16 cache, llama.cpp's buffers; :func:`memory_of` adds them up.
    Nothing is written but 40 bytes a token and file.

    Raises:
        UserError: no samples or levels, broken files (all of them named), another vocabulary than the
            reference's, samples that do not fit, or a file on which llama.cpp crashes.
    """
    settings, texts = settings or CheckSettings(), dict(texts or {})
    try:
        name = level_name(reference)
    except UserError:  # told below, with all other problems
        name = REFERENCE
    if name in levels and Path(levels[name]).resolve() != Path(reference).resolve():
        name = f"{name} (reference)"
    files = {name: Path(reference), **{k: Path(v) for k, v in levels.items() if k != name}}
    _refuse(files, samples, texts, scoring)
    end_of_turn = _end_of_turn(samples) if samples and end_of_turn is None else end_of_turn
    started, seconds = time.perf_counter(), {}
    everything = [*samples, *(w for rows in texts.values() for w in rows)]
    longest = max(len(s.prompt_ids) + max(len(s.completion_ids), max_new_tokens if s.completion else 0) for s in everything)
    n_ctx = -(-max(4096, longest) // 256) * 256
    needs = _memory_needs(files, n_ctx)
    budget = int(0.8 * available_memory()) if memory is None else memory
    groups = plan_groups(needs, budget)
    passes = len(files) - 1 + len(groups)  # of a file over all samples
    stop = threading.Event()
    measured: dict[str, dict] = {}
    answered = None
    with tempfile.TemporaryDirectory(prefix="tsugiki-check-") as folder, progress() as bar:
        rows, own = Path(folder) / "all.jsonl", Path(folder) / "samples.jsonl"
        write_encoded(rows, everything)
        write_encoded(own, samples)
        total = passes * len(everything) + (len(files) * (len(samples) + 1) if samples else 0)
        task = bar.add_task("check", total=total, note="")
        common = {"samples": str(own), "n_ctx": n_ctx, "max_new_tokens": max_new_tokens, "end_of_turn": end_of_turn}

        def advance(n: int) -> None:
            bar.advance(task, n)

        def timed(part: str, work: Callable):
            before = time.perf_counter()
            result = work()
            seconds[part] = round(time.perf_counter() - before, 2)
            bar.update(task, note=part)
            if on_step:
                on_step(part)
            return result

        def child(part: str, job: dict) -> dict:
            return timed(part, lambda: run_task(job | common, name=part, on_step=advance, stopped=stop.is_set))

        def comparing() -> tuple[dict[str, np.ndarray], int]:
            return timed("compare", lambda: compare(files, rows, Path(folder), n_ctx=n_ctx, groups=groups, on_step=advance,
                                                    stopped=stop.is_set))

        def answers(name: str) -> list[Answer]:
            job = {"task": "answers", "path": str(files[name]), "scoring": scoring}
            return [Answer(**a) for a in child(f"answers {name}", job)["answers"]]

        # small models use one thread each, so that several run side by side
        workers = max(1, cpu_count() // max(thread_count(p) for p in files.values()))
        with ThreadPoolExecutor(workers) as pool:
            try:
                future = pool.submit(comparing)
                answering = {name: pool.submit(answers, name) for name in files} if samples else {}
                tokens, peak = future.result()
                if samples:
                    answered = {k: f.result() for k, f in answering.items()}
            except BaseException:
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        if samples:
            for name, path in files.items():  # speed alone, one after the other
                measured[name] = child(f"speed {name}", {"task": "speed", "path": str(path)})
    parts, at = {}, len(samples)
    for name, windows in texts.items():
        parts[name] = judge(windows, files, _part(tokens, at, at + len(windows)), None, settings)
        at += len(windows)
    if samples:
        result = judge(samples, files, _part(tokens, 0, len(samples)), answered, settings)
        for row in result["levels"]:
            row.update(measured[row["level"]])
    else:
        result = _worst(parts)
    result["texts"] = parts
    result["memory"] = {"budget": budget, "needed": sum(needs.values()), "groups": groups, "peak_rss": peak}
    result["seconds"] = {**seconds, "total": round(time.perf_counter() - started, 2)}
    return result


def _refuse(files: Mapping[str, Path], samples: Sequence, texts: Mapping[str, Sequence], scoring: str) -> None:
    problems = []
    if not samples and not any(texts.values()):
        problems.append("no test sample and no text")
    if len(files) < 2:
        problems.append("no level to check")
    for path in files.values():
        try:
            read_header(path)
        except UserError as error:
            problems.append(f"{error.where}: {error.message}")
    raise_problems(problems, what="the check cannot start")
    score(scoring, "", "")


def _end_of_turn(samples: Sequence[EncodedSample]) -> int:
    last = {s.completion_ids[-1] for s in samples if s.completion_ids}
    if len(last) != 1:
        raise UserError(f"the completions end with {len(last)} different ids, not with one end-of-turn token")
    return last.pop()


def _memory_needs(files: Mapping[str, Path], n_ctx: int) -> dict[str, int]:
    model = file_profile(next(iter(files.values()))).model
    kv_bytes = 2 * 2 * model.layers * model.kv_heads * model.head_dim
    return {k: memory_of(p, n_ctx=n_ctx, vocab_size=model.vocab_size, kv_bytes=kv_bytes) for k, p in files.items()}


def _part(tokens: Mapping[str, np.ndarray], start: int, end: int) -> dict[str, np.ndarray]:
    mask = (tokens["sample"] >= start) & (tokens["sample"] < end)
    return {"sample": tokens["sample"][mask] - start, **{k: tokens[k][:, mask] for k in ("nll", "kld", "top1", "top5")}}


def _worst(parts: Mapping[str, dict]) -> dict:
    """One result of several sets of texts: a level's row is that of the set with its worst verdict (in a tie, loss)."""
    from tsugiki.quantize.verdict import recommend

    order = ["reference", "pass", "inconclusive", "degraded"]
    first = next(iter(parts.values()))
    rows = []
    for i in range(len(first["levels"])):
        own = [(order.index(p["levels"][i]["verdict"]), p["levels"][i]["delta_nll"], name) for name, p in parts.items()]
        name = max(own)[2]
        rows.append(parts[name]["levels"][i] | {"text": name})
    totals = {k: sum(p[k] for p in parts.values()) for k in ("samples", "tokens", "documents")}
    return {**totals, "settings": first["settings"], "levels": rows, "recommended": recommend(rows)}


# --- from files, without a recipe -------------------------------------------------------------------------------


def encode_sets(
    path: Path, texts: Mapping[str, Sequence[str]], questions: Sequence[dict] = (), *, window: int = WINDOW, most: int | None = None
) -> tuple[dict[str, list[EncodedSample]], int]:
    """Text files as windows, and questions (under ``domain``), by the tokenizer inside a GGUF file, in a child process.

    Returns:
        Name to samples, and the id that ends an answer.

    Raises:
        UserError: as :mod:`tsugiki.quantize.windows`, or the file is broken.
    """
    read_header(path)
    with tempfile.TemporaryDirectory(prefix="tsugiki-check-") as folder:
        rows = Path(folder) / "questions"
        write_jsonl(rows, questions)
        job = {"task": "encode", "path": str(path), "texts": {k: list(map(str, v)) for k, v in texts.items()}, "out": folder,
               "window": window, "most": most, "questions": str(rows) if questions else None}
        found = run_task(job, name="tokenize")
        return {name: read_encoded(Path(folder) / f"{name}.jsonl") for name in found["sets"]}, found["end_of_turn"]


def cache_probe(path: Path, samples: Sequence[EncodedSample], *, types: Sequence[str] = CACHE_TYPES) -> list[dict]:
    """What quantized keys and values in the cache do to one file: divergence from its own F16 cache.

    Args:
        path: the file as it will run.
        samples: windows or completions.
        types: ggml's names of cache types.

    Returns:
        One row for keys and for values of each type: ``keys``, ``values`` (types), ``nll``, ``delta_nll``, ``kld_mean`` …,
        ``top1``, ``top5``, F16 first. The rows' values are quantized with llama.cpp's fused attention, which they need.

    Raises:
        UserError: a type that does not fit the heads' size, or a broken file.
    """
    read_header(path)
    caches = {"f16": ("f16", "f16")}
    for kind in types:
        caches |= {f"keys {kind}": (kind, "f16"), f"values {kind}": ("f16", kind)}
    with tempfile.TemporaryDirectory(prefix="tsugiki-check-") as folder, progress() as bar:
        rows = Path(folder) / "samples.jsonl"
        write_encoded(rows, samples)
        task = bar.add_task("cache", total=len(caches) * len(samples), note="")
        longest = max(len(s.ids) for s in samples)
        n_ctx = -(-max(4096, longest) // 256) * 256
        files = dict.fromkeys(caches, path)
        groups = plan_groups(_memory_needs(files, n_ctx), int(0.8 * available_memory()))
        tokens, _ = compare(files, rows, Path(folder), n_ctx=n_ctx, cache_types=caches, groups=groups,
                            on_step=lambda n: bar.advance(task, n))
    return [
        {"keys": keys, "values": values, "nll": float(tokens["nll"][i].mean()),
         "delta_nll": float((tokens["nll"][i] - tokens["nll"][0]).mean()), **divergences(tokens, i)}
        for i, (keys, values) in enumerate(caches.values())
    ]
