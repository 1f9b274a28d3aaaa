"""Files read in lock-step with their reference, in child processes: divergences, answers, speed; no logits are stored.

Native code runs here only: a file that makes llama.cpp abort gives a sentence, and the memory of a run is its own.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import llama_cpp
import numpy as np
from gguf import GGMLQuantizationType

from tsugiki.artifacts import read_jsonl
from tsugiki.errors import UserError
from tsugiki.evaluate.domain import domain_answers
from tsugiki.evaluate.engine import BATCH, LOGIT_BYTES, Engine, thread_count
from tsugiki.machine import cpu_count, peak_rss
from tsugiki.quantize.child import run_child, say, serve
from tsugiki.samples import EncodedSample, read_encoded, write_encoded

WIDTH = 8  # sequences decoded together: 16 took a third more time on a CPU, attention runs over all of them
CHUNK = 131_072  # logits of one file that are worked on at a time: four such rows of float32 stay in the cache
LEAF = 256  # values summed in float32 before the sums are summed in float64
BLOCK = 512  # logits of which the largest is found first, when the five largest of a row are wanted

# --- children ---------------------------------------------------------------------------------------------------


def run_task(
    job: dict,
    *,
    name: str,
    on_step: Callable[[int], None] = lambda n: None,
    stopped: Callable[[], bool] = lambda: False,
    module: str = "tsugiki.quantize.compare",
) -> dict:
    """Run one task of this module in a process of its own, and return its result.

    Args:
        name: of the part, for a message.
        on_step: called with the number of steps just done.
        stopped: asked every half second; once true, the child is ended.

    Raises:
        UserError: what the child raised, or that it died, with the file that it was reading.
    """
    at = None

    def hear(message: dict) -> None:
        nonlocal at
        if stopped():
            raise InterruptedError(name)
        at = message.get("at", at)
        on_step(message.get("steps", 0))

    try:
        return run_child(module, job, name=name, on_message=hear)
    except UserError as error:
        if error.where or not at:
            raise
        raise UserError(error.message, where=at, hint=error.hint) from None


def serve_tasks(tasks: Mapping[str, Callable[[dict], dict]]) -> None:
    """The child's side of :func:`run_task`, with a sign of life every half second."""

    ended = threading.Event()

    def live() -> None:
        while not ended.wait(0.5):
            say(steps=0)

    thread = threading.Thread(target=live, daemon=True)
    thread.start()
    try:
        serve(lambda job: tasks[job["task"]](job))
    finally:
        ended.set()
        thread.join()


# --- lock-step --------------------------------------------------------------------------------------------------


def compare(
    files: Mapping[str, Path | str],
    samples: Path,
    out: Path,
    *,
    n_ctx: int,
    cache_types: Mapping[str, tuple[str | None, str | None]] | None = None,
    groups: Sequence[Sequence[str]] | None = None,
    on_step: Callable[[int], None] = lambda n: None,
    stopped: Callable[[], bool] = lambda: False,
) -> tuple[dict[str, np.ndarray], int]:
    """Run every file over the samples and compare it with the first, token by token.

    Args:
        files: name to path, the reference first.
        samples: as :func:`tsugiki.samples.write_encoded` wrote them.
        out: folder for the children's arrays (40 bytes a token and file).
        cache_types: name to the types of cached keys and values (``q8_0`` …); attention is then llama.cpp's fused one
            for all files, since quantized values need it.
        groups: names compared together, without the reference; ``None`` takes all at once. Each group is one pass over
            the reference, in a process of its own.

    Returns:
        ``sample`` int64 ``(T,)``; ``nll``, ``kld``, ``top1``, ``top5`` float64 ``(files, T)``, files in their order; and
        the largest resident memory of a child, bytes.
    """
    first, *others = files
    peak = 0
    found: dict[str, dict[str, np.ndarray]] = {}
    for i, group in enumerate(groups or [others]):
        names = [first, *group]
        job = {
            "task": "compare", "samples": str(samples), "n_ctx": n_ctx, "out": str(out / f"tokens-{i}.npz"),
            "files": {n: {"path": str(files[n]), "cache": (cache_types or {}).get(n)} for n in names},
            "fused": cache_types is not None,
        }
        done = run_task(job, name="compare", on_step=on_step, stopped=stopped)
        peak = max(peak, done["peak_rss"])
        with np.load(out / f"tokens-{i}.npz") as arrays:
            for row, name in enumerate(names):
                found.setdefault(name, {k: arrays[k][row] for k in ("nll", "kld", "top1", "top5")})
            sample = arrays["sample"]
    arrays = {k: np.stack([found[n][k] for n in files]) for k in ("nll", "kld", "top1", "top5")}
    return {"sample": sample, **arrays}, peak


def memory_of(path: Path | str, *, n_ctx: int, vocab_size: int, kv_bytes: int) -> int:
    """Bytes that one open file takes at most: weights, F16 cache (``kv_bytes`` a token), logits, activations.

    Weights repacked for a CPU are a copy, up to an eighth larger (Q8_0 in AMX tiles); the file's own pages can then go.
    """
    return Path(path).stat().st_size * 9 // 8 + n_ctx * kv_bytes + 4 * BATCH * vocab_size + LOGIT_BYTES + (64 << 20)


def plan_groups(needs: Mapping[str, int], budget: int) -> list[list[str]]:
    """Levels that fit into ``budget`` bytes together with the reference, in their order; at least one a group.

    Args:
        needs: name to bytes (:func:`memory_of`), the reference first.
    """
    first, *others = needs
    groups: list[list[str]] = []
    room = 0
    for name in others:
        if not groups or needs[name] > room:
            groups.append([])
            room = budget - needs[first]
        groups[-1].append(name)
        room -= needs[name]
    return groups


def _compare(job: dict) -> dict:
    samples = read_encoded(Path(job["samples"]))
    with ExitStack() as stack:
        try:
            engines = _open_all(stack, job, None)
        except UserError:
            if not llama_cpp.llama_supports_gpu_offload():
                raise
            # the files together do not fit on the GPU: all on the CPU, since two devices do not round alike
            stack.close()
            engines = _open_all(stack, job, 0)
        digest = None
        for engine in {e.path: e for e in engines[1:]}.values():
            digest = same_vocabulary(engines[0], engine, digest)
        index, parts = [], []
        for blocks in _lock_step(engines, samples):
            rows = blocks[0][0]
            index.append(rows[:, 0])
            parts.append(divergence([logits for _, logits in blocks], rows[:, 2]))
            # steps: finished samples, once for each file
            say(steps=int((rows[:, 1] == 0).sum()) * len(engines))
    arrays = {key: np.concatenate([p[key] for p in parts], axis=1) for key in parts[0]}
    for file, nll, kld in zip(job["files"].values(), arrays["nll"], arrays["kld"], strict=True):
        if wrong := int((~np.isfinite(nll + kld)).sum()):
            raise UserError(f"its logits are not finite at {wrong:,} of {len(nll):,} tokens", where=file["path"],
                            hint="The weights are damaged: make or copy the file again.")
    np.savez(job["out"], sample=np.concatenate(index), **arrays)
    return {"peak_rss": peak_rss()}


def _open_all(stack: ExitStack, job: dict, n_gpu_layers: int | None) -> list[Engine]:
    engines = []
    for file in job["files"].values():
        say(at=file["path"])
        kinds = {
            key: GGMLQuantizationType[kind.upper()]
            for key, kind in zip(("type_k", "type_v"), file.get("cache") or (None, None), strict=True)
            if kind
        }
        engine = Engine(file["path"], n_ctx=job["n_ctx"], n_seq_max=WIDTH, n_gpu_layers=n_gpu_layers,
                        flash_attention=job["fused"], **kinds)
        engines.append(stack.enter_context(engine))
    return engines


def same_vocabulary(first: Engine, other: Engine, digest: str | None = None) -> str | None:
    """Refuse a file whose tokens are not those of the first; the first's ``digest`` is returned for the next file.

    Raises:
        UserError: with both sizes, or that tokens differ.
    """
    if other.path == first.path:
        return digest
    hint = "A level is compared with the F16 file that it was made from."
    if other.vocab_size != first.vocab_size:
        raise UserError(f"its vocabulary has {other.vocab_size} tokens, that of {first.path.name} {first.vocab_size}",
                        where=str(other.path), hint=hint)
    digest = digest or first.vocab_digest()
    if other.vocab_digest() != digest:
        raise UserError(f"its vocabulary has other tokens than that of {first.path.name} ({first.vocab_size} each)",
                        where=str(other.path), hint=hint)
    return digest


def _lock_step(engines: Sequence[Engine], samples: Sequence[EncodedSample]) -> Iterator[list]:
    streams = [e.logit_blocks(samples) for e in engines]
    for first in streams[0]:
        blocks = [first]
        for engine, stream in zip(engines[1:], streams[1:], strict=True):
            say(at=str(engine.path))
            blocks.append(next(stream))
        if any(not np.array_equal(rows, first[0]) for rows, _ in blocks[1:]):
            raise AssertionError("the engines cut the samples differently")
        yield blocks


# --- divergence -------------------------------------------------------------------------------------------------


def divergence(logits: Sequence[np.ndarray], targets: np.ndarray, threads: int | None = None) -> dict[str, np.ndarray]:
    """What each file makes of the same ``R`` positions; the first of the files is the reference ``p``.

    With each file's logits less their largest, ``u = x − max x``, and ``m = Σ exp u``:
    ``KL(p ‖ q) = Σ p · (u_p − u_q) / Σ p − log(m_p / m_q)`` over the whole vocabulary. The differences are small numbers and
    nearly exact in float32; sums over 256 values are float32, their sums and the logarithms float64. Dividing by
    ``Σ p`` keeps the rounding of ``p`` out. What rounding leaves below zero is cut off. Rows are worked on a few at a
    time, in the processor's cache, by one thread a core.

    Args:
        logits: float32 ``(R, V)`` of each file.
        targets: ``(R,)`` token ids.
        threads: at most; ``None``: one a core.

    Returns:
        ``nll`` and ``kld`` in nats, ``top1`` (the reference's most probable id is the file's, 0 or 1) and ``top5``
        (share of the reference's five most probable ids among the file's five), each float64 ``(files, R)``.
    """
    number, width = logits[0].shape
    step = max(1, CHUNK // width)
    found = {key: np.zeros((len(logits), number)) for key in ("nll", "kld", "top1", "top5")}
    threads = min(threads or cpu_count(), 16, -(-number // step)) if number * width > 4 * CHUNK else 1

    def work(thread: int) -> None:
        # rows padded with zeros to whole leaves; written below width only
        scratch = np.zeros((4, step, -(-width // LEAF) * LEAF), np.float32)
        for start in range(thread * step, number, threads * step):
            rows = slice(start, min(start + step, number))
            _divergence([x[rows] for x in logits], targets[rows], scratch, {k: v[:, rows] for k, v in found.items()})

    if threads == 1:
        work(0)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, range(threads)))
    return found


def _divergence(logits: Sequence[np.ndarray], targets: np.ndarray, scratch: Sequence[np.ndarray], found: dict) -> None:
    number, width = logits[0].shape
    row = np.arange(number)
    p, other = (x[:number] for x in scratch[:2])
    below, gap = (x[:number, :width] for x in scratch[2:])  # logits less their largest, the reference's and a file's

    def exponentials(x: np.ndarray, top: np.ndarray, less: np.ndarray, out: np.ndarray) -> np.ndarray:
        np.subtract(x, top[:, None], out=less)
        np.exp(less, out=out[:, :width])
        return _sum("rij->ri", out)

    reference = logits[0]
    five = _five_largest(reference)
    values = reference[row[:, None], five]
    best, top = five[row, values.argmax(axis=1)], values.max(axis=1)
    mass = exponentials(reference, top, below, p)
    found["nll"][0] = top + np.log(mass) - reference[row, targets]
    found["top1"][0] = found["top5"][0] = 1
    for i, x in enumerate(logits[1:], 1):
        own_five = x[row[:, None], _five_largest(x)]
        own_top = own_five.max(axis=1)
        log_mass = np.log(exponentials(x, own_top, gap, other))
        np.subtract(below, gap, out=other[:, :width])
        found["nll"][i] = own_top + log_mass - x[row, targets]
        found["kld"][i] = np.maximum(_sum("rij,rij->ri", p, other) / mass - (np.log(mass) - log_mass), 0)
        found["top1"][i] = x[row, best] == own_top
        found["top5"][i] = (x[row[:, None], five] >= own_five.min(axis=1)[:, None]).mean(axis=1)


def _sum(terms: str, *rows: np.ndarray) -> np.ndarray:
    """Sums of the rows, or of two arrays' products, float64: leaves in float32, nothing written between."""
    return np.einsum(terms, *(x.reshape(len(x), -1, LEAF) for x in rows)).sum(axis=1, dtype=np.float64)


def _five_largest(x: np.ndarray) -> np.ndarray:
    """Columns of the five largest values of each row, int ``(R, 5)`` (fewer where there are fewer columns).

    They lie in the five blocks with the largest maxima, or in the rest that fills no block: a tenth of a partition's
    time, with the same result.
    """
    number, width = x.shape
    k, blocks = min(5, width), width // BLOCK
    if blocks < 16:
        return np.argpartition(x, width - k, axis=1)[:, width - k :]
    split = blocks * BLOCK
    most = x[:, :split].reshape(number, BLOCK, blocks).max(axis=1)  # a block: every ``blocks``-th column
    picked = np.argpartition(most, blocks - k, axis=1)[:, blocks - k :]
    columns = (picked[:, :, None] + blocks * np.arange(BLOCK)).reshape(number, -1)
    columns = np.concatenate([columns, np.broadcast_to(np.arange(split, width), (number, width - split))], axis=1)
    candidates = np.take_along_axis(x, columns, axis=1)
    inside = np.argpartition(candidates, candidates.shape[1] - k, axis=1)[:, -k:]
    return np.take_along_axis(columns, inside, axis=1)


# --- answers and speed ------------------------------------------------------------------------------------------


def _answers(job: dict) -> dict:
    samples = read_encoded(Path(job["samples"]))
    done = 0

    def step(_: int) -> None:
        nonlocal done
        done += 1
        if done % 25 == 0 or done == len(samples):
            say(steps=25 if done % 25 == 0 else done % 25)

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
        say(steps=1)
        return {
            "prompt_tok_s": speed.prompt_tok_s,
            "gen_tok_s": speed.gen_tok_s,
            "seconds_per_answer": sum(times) / len(times),
            "peak_rss": peak_rss(),
            "load_seconds": engine.load_seconds,
            "threads": thread_count(engine.path),
        }


# --- text to ids ------------------------------------------------------------------------------------------------


def _encode(job: dict) -> dict:
    """Texts cut into windows and questions in the chat template, by the tokenizer in the file itself."""
    from tsugiki.quantize.windows import encode_questions, encode_texts

    with Engine(job["path"], n_ctx=256, n_seq_max=1) as engine:
        sets = encode_texts(engine, job["texts"], job["window"], job["most"])
        if job.get("questions"):
            sets["domain"] = encode_questions(engine, read_jsonl(job["questions"]))
        for name, rows in sets.items():
            write_encoded(Path(job["out"]) / f"{name}.jsonl", rows)
        end = engine.eot if engine.eot >= 0 else engine.eos
    return {"end_of_turn": end, "sets": {name: len(rows) for name, rows in sets.items()}}


if __name__ == "__main__":
    serve_tasks({"compare": _compare, "answers": _answers, "speed": _speed, "encode": _encode})
