"""Which tensors bear quantization badly: KL against F16 when one group of them alone is at a lower type.

The F16 model is opened once, in memory. For a variant the group's matrices are quantized with ggml's own functions and
written back over their F16 selves (:class:`Simulator`): no file is written and nothing is loaded again, so a variant
costs one pass over the tokens. What that leaves out is the rounding of the *inputs* that llama.cpp does for quantized
matrices, and the F16 rounding of the result: files that people get are always measured themselves.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path

import gguf
import numpy as np

from tsugiki.artifacts import digest, sha256_file
from tsugiki.errors import UserError
from tsugiki.evaluate.engine import Engine, check_gguf
from tsugiki.machine import available_memory, cpu_count
from tsugiki.progress import progress
from tsugiki.quantize.child import run_child, say, serve
from tsugiki.quantize.compare import divergence
from tsugiki.quantize.imatrix import chunks_of, read_imatrix, read_source
from tsugiki.quantize.profile import TensorInfo, read_header
from tsugiki.samples import EncodedSample, read_encoded

MOST_LOGITS = 1 << 30  # bytes of the reference's float32 logits that are kept: 1,760 tokens of Qwen's 152,064
SINGLE = 64  # matrices up to which each is a group of its own
LOW, LOW_NARROW = "Q3_K", "Q4_0"  # what a group is lowered to; where rows do not divide by 256 by 32
ROWS = 256  # of a matrix, evenly spread, from which its rounding error is taken
NOTHING = 1e-6  # nats/token: rounding to F16 and back alone gives 1e-7


# --- groups -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Matrices that are measured, and get their type, together.

    Attributes:
        kind: ``attn_k`` and the like; ``layers``: first and last, or ``None`` for embeddings and output.
    """

    name: str
    kind: str
    layers: tuple[int, int] | None
    tensors: tuple[str, ...]


def matrices(path: Path | str) -> dict[str, tuple[list[int], int]]:
    """The weights that llama.cpp quantizes: name to shape (row length first) and ggml type.

    Of llama.cpp's rules (``tensor_allows_quantization``) those for the families that this kit converts.
    """
    return {
        n: (list(t.shape), int(gguf.GGMLQuantizationType[t.type])) for n, t in read_header(path).tensors.items()
        if len(t.shape) > 1 and n.endswith("weight") and "_norm." not in n and "ffn_gate_inp" not in n
    }


def groups_of(names: Sequence[str], blocks: int | None = None) -> list[Group]:
    """Each matrix alone where there are at most 64, else kind by kind in ``blocks`` (8) runs of neighbouring layers.

    Args:
        blocks: runs of layers; 0 for each matrix alone; ``None`` decides by their number.
    """
    places = {n: re.fullmatch(r"blk\.(\d+)\.(.+)\.weight", n) for n in names}
    depth = 1 + max((int(m[1]) for m in places.values() if m), default=0)
    if blocks is None:
        blocks = 0 if len(names) <= SINGLE else 8
    blocks = min(blocks, depth) or depth
    found: dict[tuple, list[str]] = {}
    for name in names:
        place = places[name]
        key = (place[2], int(place[1]) * blocks // depth) if place else (name.removesuffix(".weight"), -1)
        found.setdefault(key, []).append(name)
    groups = []
    for (kind, block), tensors in found.items():
        layers = sorted(int(places[t][1]) for t in tensors) if block >= 0 else None
        span = "" if layers is None else f".{layers[0]}" + (f"-{layers[-1]}" if len(layers) > 1 else "")
        groups.append(Group(kind + span, kind, layers and (layers[0], layers[-1]), tuple(tensors)))
    return groups


# --- samples ------------------------------------------------------------------------------------------------------


def read_samples(path: Path | str, engine: Engine, tokens: int, chunk: int = 512) -> list[EncodedSample]:
    """Samples with about ``tokens`` scored tokens: completions of encoded samples, or text in chunks.

    A chunk of text is scored from its second token on, and is a document of its own.

    Raises:
        UserError: as :func:`tsugiki.quantize.imatrix.read_source`.
    """
    source = read_source(path)
    if source.text:
        pieces = chunks_of(source, engine, tokens, chunk)
        return [EncodedSample(f"{i}", "", "", str(i), prompt_ids=p[:1], completion_ids=p[1:])
                for i, p in enumerate(pieces) if len(p) > 1]
    try:
        rows = read_encoded(Path(path))
    except TypeError as error:
        raise UserError(f"no encoded samples: {error}", where=str(path)) from error
    found, count = [], 0
    for i in np.random.default_rng(0).permutation(len(rows)):
        if count >= tokens:
            break
        if rows[i].prompt_ids and rows[i].completion_ids:
            found.append(rows[i])
            count += len(rows[i].completion_ids)
    return found


# --- the simulator ------------------------------------------------------------------------------------------------


class Simulator:
    """The F16 model in memory, any of whose matrices can be as if quantized.

    Args:
        probe: the model, writable.
        path: its file, from which original weights are read again.
        importance: name to mean squares; a matrix without an entry is quantized without.
        samples: what is scored.
    """

    def __init__(self, probe, path: Path | str, importance: Mapping[str, np.ndarray], samples: Sequence[EncodedSample],
                 *, threads: int = 1, cache_bytes: int = 1 << 30):
        self.probe, self.importance, self.samples, self.threads = probe, importance, samples, threads
        self.tensors, self._file = read_header(path).tensors, np.memmap(path, np.uint8, "r")
        self.state: dict[str, str] = {}  # name to type where it is not the original
        self.passes = 0
        self._cache: OrderedDict[tuple[str, str], np.ndarray] = OrderedDict()
        self._left = cache_bytes
        size = 4 * probe.vocab_size
        tokens = sum(len(s.completion_ids) for s in samples)
        if tokens * size > 2 * MOST_LOGITS:
            raise UserError(f"{tokens} tokens of {probe.vocab_size} logits need {tokens * size / 1e9:.1f} GB",
                            hint=f"Take at most {MOST_LOGITS // size} tokens.")
        refuse_ids(samples, probe)
        self._targets = np.concatenate([s.completion_ids for s in samples])
        self._reference = [x.copy() for x in self._logits()]

    def _logits(self) -> Iterator[np.ndarray]:
        self.passes += 1
        ids = [s.ids[:-1] for s in self.samples]
        flags = [[0] * (len(s.prompt_ids) - 1) + [1] * len(s.completion_ids) for s in self.samples]
        return self.probe.decode(ids, flags)

    def original(self, name: str) -> np.ndarray:
        """Float32 ``(rows of all experts, columns)`` of a matrix as it is in the file."""
        from tsugiki.quantize.native import dequantize_rows

        t = self.tensors[name]
        width = t.shape[0]
        return dequantize_rows(int(gguf.GGMLQuantizationType[t.type]), self._stored(t).reshape(math.prod(t.shape) // width, -1), width)

    def _stored(self, t: TensorInfo) -> np.ndarray:
        return np.asarray(self._file[t.offset : t.offset + t.bytes])

    def quantized(self, name: str, kind: str) -> np.ndarray:
        """The matrix after quantization to ``kind`` and back, float32; kept as F16 for the next time."""
        from tsugiki.quantize.native import dequantize_rows, quantize_rows

        key = (name, kind)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key].astype(np.float32)
        weights, number = self.original(name), int(gguf.GGMLQuantizationType[kind])
        shape = self.tensors[name].shape
        experts = shape[2] if len(shape) > 2 else 1
        importance = self.importance.get(name)
        parts = np.split(weights, experts)
        means = np.split(importance, experts) if importance is not None else [None] * experts
        rows = [quantize_rows(number, w, m, self.threads) for w, m in zip(parts, means, strict=True)]
        found = dequantize_rows(number, np.concatenate(rows), weights.shape[1])
        half = found.astype(np.float16)
        while self._cache and self._left < half.nbytes:
            self._left += self._cache.popitem(last=False)[1].nbytes
        if half.nbytes <= self._left:
            self._cache[key] = half
            self._left -= half.nbytes
        return found

    def error(self, name: str, kind: str) -> float:
        """``Σ importance · (w − w')²`` over the matrix, from 256 of its rows.

        What the type does to the matrix's output, up to the correlation of its inputs: the KL of one tensor at another
        type goes with it (see :func:`sensitivities`).
        """
        from tsugiki.quantize.native import dequantize_rows, quantize_rows

        number, total = int(gguf.GGMLQuantizationType[kind]), 0.0
        weights = self._rows(name)
        importance = self.importance.get(name)
        means = np.split(importance, len(weights)) if importance is not None else [None] * len(weights)
        for rows, mean in zip(weights, means, strict=True):
            back = dequantize_rows(number, quantize_rows(number, rows, mean, self.threads), rows.shape[1])
            squares = np.square(rows - back, out=back).sum(axis=0, dtype=np.float64)
            total += float(squares.sum() if mean is None else squares @ mean)
        return total * math.prod(self.tensors[name].shape) / weights.size

    def _rows(self, name: str) -> np.ndarray:
        """Float32 ``(experts, rows, columns)``: evenly spread rows of a matrix, the same of each expert."""
        from tsugiki.quantize.native import dequantize_rows

        t = self.tensors[name]
        width, experts = t.shape[0], t.shape[2] if len(t.shape) > 2 else 1
        data = self._stored(t).reshape(experts, -1, t.bytes // (math.prod(t.shape) // width))
        picked = np.unique(np.linspace(0, data.shape[1] - 1, max(1, min(data.shape[1], ROWS // experts))).astype(int))
        part = np.ascontiguousarray(data[:, picked])
        return dequantize_rows(int(gguf.GGMLQuantizationType[t.type]), part.reshape(-1, part.shape[2]), width).reshape(experts, -1, width)

    def set(self, types: Mapping[str, str]) -> None:
        """Put the named matrices at the given types and all others back to what they are in the file."""
        for name in [n for n in self.state if n not in types]:
            self.probe.replace(name, self.original(name))
            del self.state[name]
        for name, kind in types.items():
            if self.state.get(name) != kind:
                self.probe.replace(name, self.quantized(name, kind))
                self.state[name] = kind

    def divergence(self, types: Mapping[str, str]) -> float:
        """Mean KL(F16 ‖ variant), nats a token: one pass with the matrices of :meth:`set`."""
        self.set(types)
        total = at = 0
        for reference, logits in zip(self._reference, self._logits(), strict=True):
            total += float(divergence([reference, logits], self._targets[at : at + len(logits)], self.threads)["kld"][1].sum())
            at += len(logits)
        return total / at


def refuse_ids(samples: Sequence[EncodedSample], probe) -> None:
    """Refuse samples without prompt or completion, and ids outside the vocabulary (the last one is never decoded)."""
    for s in samples:
        if not s.prompt_ids or not s.completion_ids or min(s.ids) < 0 or max(s.ids) >= probe.vocab_size:
            raise UserError(
                f"sample {s.id!r} has {len(s.prompt_ids)} prompt and {len(s.completion_ids)} completion tokens, ids up to "
                f"{max(s.ids, default=-1)}; each needs at least 1, and the vocabulary has {probe.vocab_size}", where=str(probe.path),
                hint="Encode the samples with this model's own tokenizer.",
            )
    if not samples:
        raise UserError("there is no sample with both prompt and completion")


# --- sensitivities ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sensitivity:
    """What one group alone costs.

    Attributes:
        kl: mean KL against F16, nats a token, with this group at ``low`` and everything else as it is.
        error: ``Σ importance · (w − w')²`` of the group at ``low``; ``kl / error`` hardly depends on the type.
        parameters, bytes_low, bytes_f16: of the group.
    """

    group: Group
    low: str
    kl: float
    error: float
    parameters: int
    bytes_low: int
    bytes_f16: int


def low_type(shape: Sequence[int], low: str = LOW) -> str:
    """The low type, or a type of smaller blocks where the rows do not divide."""
    return low if shape[0] % gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[low]][0] == 0 else LOW_NARROW


def sensitivities(
    simulator: Simulator, groups: Sequence[Group], *, low: str = LOW, key: str = "", cache: Path | None = None,
    on_done: Callable[[int], None] | None = None,
) -> list[Sensitivity]:
    """Measure every group at the low type: one pass each, fewer where the cache has the answer.

    One pass a group is enough for all types: on the bundled bases ``kl / error`` of a tensor is the same at IQ3_S, Q4_K and
    Q6_K (median deviation 4 %, tensors above :data:`NOTHING`), so the KL at another type is the KL here times the ratio of
    the rounding errors, which need no pass.

    Args:
        key: digest of the model, the samples and the importance; with the group and the type it names a cached result.
        cache: a JSON Lines file; each result is appended as soon as it is there.
    """
    known = {}
    if cache and cache.exists():
        for line in cache.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
                known[row["key"]] = row
            except (ValueError, KeyError):  # the last line of an interrupted run
                continue
    found = []
    for number, group in enumerate(groups):
        types = {n: low_type(simulator.tensors[n].shape, low) for n in group.tensors}
        name = digest([key, sorted(types.items())])
        if name not in known:
            row = {"key": name, "kl": simulator.divergence(types), "error": sum(simulator.error(n, k) for n, k in types.items())}
            if cache:
                cache.parent.mkdir(parents=True, exist_ok=True)
                with cache.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
            known[name] = row
        tensors = [simulator.tensors[n] for n in group.tensors]
        found.append(Sensitivity(
            group, low, known[name]["kl"], known[name]["error"], sum(math.prod(t.shape) for t in tensors),
            sum(tensor_bytes(t, types[n]) for t, n in zip(tensors, group.tensors, strict=True)), sum(t.bytes for t in tensors),
        ))
        if on_done:
            on_done(number + 1)
    simulator.set({})
    return found


def tensor_bytes(tensor: TensorInfo, kind: str) -> int:
    """Bytes of a tensor in another type."""
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return math.prod(tensor.shape) // block * size


def open_simulator(job: Mapping, stack) -> tuple[Simulator, str]:
    """The simulator of a child's job, and the digest that its measurements are cached under."""
    from tsugiki.quantize.native import Probe

    path = Path(job["path"])
    importance = read_imatrix(job["imatrix"]).means() if job["imatrix"] else {}
    with Engine(path, n_ctx=256, n_seq_max=1) as engine:
        tokens = min(job["tokens"], MOST_LOGITS // (4 * engine.vocab_size))
        samples = read_samples(job["samples"], engine, tokens)
        logits = 4 * engine.vocab_size * sum(len(s.completion_ids) for s in samples)
    # the model, the reference, and the largest matrix in float32 before and after and in blocks
    largest = max(math.prod(t.shape) for t in read_header(path).tensors.values())
    need, free = path.stat().st_size + logits + 12 * largest + (1 << 28), available_memory()
    if free < need:
        raise UserError(f"it needs about {need / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free", where=str(path),
                        hint="Close other programs, or take fewer tokens.")
    probe = stack.enter_context(Probe(path, writable=True, n_ctx=context_for(samples), n_threads=job["threads"], n_gpu_layers=job["gpu"]))
    simulator = Simulator(probe, path, importance, samples, threads=job["threads"] or cpu_count(), cache_bytes=min(1 << 30, free - need))
    key = digest([sha256_file(path), [s.ids for s in samples], [len(s.prompt_ids) for s in samples],
                  sha256_file(job["imatrix"]) if job["imatrix"] else ""])
    return simulator, key


def sensitivity(
    model: Path | str, samples: Path | str, *, imatrix: Path | str | None = None, low: str = LOW, tokens: int = 4096,
    blocks: int | None = None, cache: Path | str | None = None, n_threads: int | None = None, n_gpu_layers: int = 0,
) -> dict:
    """KL against F16 when one group of tensors alone is at a low type, for every group.

    The cost is one pass over the tokens for each group and two more. A model of at most 64 matrices has as many groups (30
    for tiny-llama: 32 passes of 4,088 tokens); a Llama of 8B has 7 kinds in 8 runs of layers, embeddings and output: 58
    groups, 60 passes. Memory: the whole F16 model, 1 GiB at most for the reference, and the largest matrix three times in
    float32.

    Args:
        model: the F16, BF16 or F32 GGUF.
        samples: encoded samples (their completions are scored) or text.
        low: the type to lower to (``Q4_0`` for rows that do not divide by 256).
        tokens: scored tokens of a pass; at most 1 GiB of log-probabilities are kept, 1,760 tokens of a vocabulary of 152,064.
        blocks: as in :func:`groups_of`.
        cache: file of finished measurements, so that an interrupted run continues.

    Returns:
        JSON-ready: ``rows`` (of each group ``name``, ``kind``, ``layers``, ``tensors``, ``kl``, ``error``, ``parameters``,
        ``bytes_low``, ``bytes_f16``), ``all`` (KL with every group low at once), ``sum`` (of the single ones), ``low``,
        ``tokens``, ``passes`` (over the tokens, in this run) and ``seconds``.

    Raises:
        UserError: damaged input, samples that do not fit the model, or a crash of llama.cpp.
    """
    check_gguf(model)
    read_source(samples)
    job = {"path": str(model), "samples": str(samples), "imatrix": imatrix and str(imatrix), "low": low, "tokens": tokens,
           "blocks": blocks, "cache": cache and str(cache), "threads": n_threads, "gpu": n_gpu_layers}
    with progress() as bar:
        task = bar.add_task("sensitivity", total=None, note="passes")
        return run_child("tsugiki.quantize.sensitivity", job, name="sensitivity",
                         on_message=lambda m: bar.update(task, completed=m["done"], total=m["of"]))


def _work(job: dict) -> dict:
    started = time.monotonic()
    with ExitStack() as stack:
        simulator, key = open_simulator(job, stack)
        shapes = matrices(job["path"])
        groups = groups_of(list(shapes), job["blocks"])
        rows = sensitivities(simulator, groups, low=job["low"], key=key, cache=job["cache"] and Path(job["cache"]),
                             on_done=lambda n: say(done=n, of=len(groups) + 1))
        together = simulator.divergence({n: low_type(shape, job["low"]) for n, (shape, _) in shapes.items()})
        return {
            "model": Path(job["path"]).name, "low": job["low"], "samples": len(simulator.samples),
            "tokens": sum(len(s.completion_ids) for s in simulator.samples), "passes": simulator.passes,
            "all": together, "sum": sum(r.kl for r in rows), "seconds": round(time.monotonic() - started, 2),
            "rows": [row_of(r) for r in rows],
        }


def row_of(sensitivity: Sensitivity) -> dict:
    """JSON form of a measurement."""
    row = asdict(sensitivity)
    group = row.pop("group")
    return {"name": group["name"], "kind": group["kind"], "layers": group["layers"], "tensors": list(group["tensors"]), **row}


# --- the picture --------------------------------------------------------------------------------------------------


def heat_map(rows: Sequence[Mapping], *, title: str = "") -> str:
    """An SVG: kinds of tensors down, layers across, the colour by the logarithm of the KL, the number in the cell.

    Args:
        rows: ``name``, ``kind``, ``layers`` and ``kl`` (nats a token), as :func:`sensitivity` returns them.
    """
    layered = [r for r in rows if r["layers"] is not None]
    single = [r for r in rows if r["layers"] is None]
    kinds = list(dict.fromkeys(r["kind"] for r in layered))
    spans = sorted({tuple(r["layers"]) for r in layered})
    low, high = (f(max(r["kl"], NOTHING) for r in rows) for f in (min, max))
    width, height, left, top = 74, 26, 150, 54 if title else 26
    parts = []

    def cell(x: int, y: int, row: Mapping) -> None:
        share = 0.5 if high <= low else math.log(max(row["kl"], NOTHING) / low) / math.log(high / low)
        # pale yellow to dark red, lightness falling evenly
        colour = f"hsl({48 - 48 * share:.0f} {75 + 10 * share:.0f}% {93 - 58 * share:.0f}%)"
        ink = "#fff" if share > 0.6 else "#222"
        text = "<1e-6" if row["kl"] < NOTHING else f"{row['kl']:.1e}"
        parts.append(f'<g><title>{escape(row["name"])}: {row["kl"]:.3e}</title><rect x="{x}" y="{y}" width="{width - 2}" '
                     f'height="{height - 2}" rx="3" fill="{colour}"/><text x="{x + width / 2 - 1}" y="{y + 16}" style="fill:{ink}" '
                     f'text-anchor="middle">{escape(text)}</text></g>')

    for j, span in enumerate(spans):
        label = str(span[0]) if span[0] == span[1] else f"{span[0]}–{span[1]}"
        parts.append(f'<text x="{left + j * width + width / 2}" y="{top - 8}" text-anchor="middle">{label}</text>')
    for i, kind in enumerate(kinds):
        parts.append(f'<text x="{left - 8}" y="{top + i * height + 16}" text-anchor="end">{escape(kind)}</text>')
    for row in layered:
        cell(left + spans.index(tuple(row["layers"])) * width, top + kinds.index(row["kind"]) * height, row)
    y = top + len(kinds) * height + 10
    for i, row in enumerate(single):
        parts.append(f'<text x="{left - 8}" y="{y + i * height + 16}" text-anchor="end">{escape(row["name"])}</text>')
        cell(left, y + i * height, row)
    total_width, total_height = max(left + max(len(spans), 1) * width + 10, 420), y + len(single) * height + 10
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total_width} {total_height}" width="{total_width}" '
        f'role="img" font-family="system-ui, sans-serif" font-size="12" fill="#222">'
        f'<text x="8" y="18" font-size="14" font-weight="600">{escape(title)}</text>{"".join(parts)}</svg>'
    )


def heat_page(found: Mapping) -> str:
    """A self-contained HTML page of what :func:`sensitivity` returned, in Japanese and English."""
    rows = sorted(found["rows"], key=lambda r: -r["kl"])
    lines = "".join(
        f"<tr><td>{escape(r['name'])}</td><td>{r['kl']:.2e}</td><td>{100 * r['kl'] / max(found['sum'], 1e-30):.1f}</td>"
        f"<td>{r['parameters']:,}</td><td>{r['bytes_low'] / 1e6:.3f}</td></tr>" for r in rows
    )
    svg = heat_map(found["rows"], title=f"KL(F16 ‖ {found['low']}), nats/token")
    return f"""<!doctype html>
<html lang="ja"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>感度 / sensitivity: {escape(found["model"])}</title>
<style>body{{font:15px/1.6 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}}
div{{overflow-x:auto}}table{{border-collapse:collapse}}td,th{{padding:.15em .8em;text-align:right}}
td:first-child,th:first-child{{text-align:left}}tr{{border-bottom:1px solid #ddd}}</style>
<h1>{escape(found["model"])}</h1>
<p>一つのテンソル群だけを{found["low"]}にしたときの、F16からのKLダイバージェンス(nats/トークン)。{found["tokens"]:,}トークンで測定。<br>
KL divergence from F16 when one group of tensors alone is at {found["low"]}, on {found["tokens"]:,} tokens.</p>
<div>{svg}</div>
<p>全群を同時に: {found["all"]:.2e} / 個別の和: {found["sum"]:.2e}<br>
All groups at once: {found["all"]:.2e}; sum of the single ones: {found["sum"]:.2e}</p>
<div><table><tr><th>群 / group</th><th>KL</th><th>%</th><th>weights</th><th>MB</th></tr>{lines}</table></div></html>
"""


# --- files against their reference --------------------------------------------------------------------------------


def measure(reference: Path | str, files: Sequence[Path | str], samples: Sequence[EncodedSample], *,
            threads: int | None = None, n_gpu_layers: int = 0, memory: int | None = None,
            on_done: Callable[[int, int], None] | None = None) -> dict[str, np.ndarray]:
    """Files against their reference, read in lock-step; one after another, each with the reference, where memory is short.

    Args:
        files: none: the NLL of the reference alone.
        memory: bytes that may be taken; by default what is available. Without an effect on a GPU's.

    Returns:
        ``kl``: float64 ``(files, N)``, KL(reference ‖ file) summed over a sample's scored tokens, nats; ``nll``: float64
        ``(1 + files, N)``, the reference first; ``tokens``: int64 ``(N,)``.

    Raises:
        UserError: a broken file, another vocabulary than the reference's, or no memory for the reference and one file.
    """
    from tsugiki.quantize.native import Probe

    sizes = [Path(p).stat().st_size + (1 << 27) for p in (reference, *files)]
    memory = available_memory() if memory is None else memory
    if len(files) > 1 and sum(sizes) > memory:
        parts = [
            measure(reference, [f], samples, threads=threads, n_gpu_layers=n_gpu_layers, memory=memory,
                    on_done=on_done and (lambda n, of, i=i: on_done(i * of + n, len(files) * of)))
            for i, f in enumerate(files)
        ]
        nll = np.concatenate([parts[0]["nll"][:1], *(p["nll"][1:] for p in parts)])
        return {"kl": np.concatenate([p["kl"] for p in parts]), "nll": nll, "tokens": parts[0]["tokens"]}
    if sum(sizes) > memory:
        raise UserError(f"{'two files' if files else 'one file'} and room for computing take about {sum(sizes) / 1e9:.1f} GB of memory, {memory / 1e9:.1f} GB are free",
                        where=str(reference), hint="Close other programs.")
    n_ctx = context_for(samples)
    ids = [s.ids[:-1] for s in samples]
    flags = [[0] * (len(s.prompt_ids) - 1) + [1] * len(s.completion_ids) for s in samples]
    owner = np.repeat(np.arange(len(samples)), [len(s.completion_ids) for s in samples])
    targets = np.concatenate([s.completion_ids for s in samples])
    kl, nll, at = np.zeros((len(files), len(samples))), np.zeros((1 + len(files), len(samples))), 0
    with ExitStack() as stack:
        probes = [stack.enter_context(Probe(p, n_ctx=n_ctx, n_threads=threads, n_gpu_layers=n_gpu_layers)) for p in (reference, *files)]
        if wrong := [p for p in probes if p.vocab_size != probes[0].vocab_size]:
            raise UserError(f"its vocabulary has {wrong[0].vocab_size} tokens, the reference's {probes[0].vocab_size}",
                            where=str(wrong[0].path), hint="Compare files made from the same F16 file.")
        refuse_ids(samples, probes[0])
        for blocks in zip(*(p.decode(ids, flags) for p in probes), strict=True):
            part = slice(at, at + len(blocks[0]))
            at = part.stop
            found = divergence(blocks, targets[part], threads)
            for i in range(len(blocks)):
                np.add.at(nll[i], owner[part], found["nll"][i])
                if i:
                    np.add.at(kl[i - 1], owner[part], found["kld"][i])
            if on_done:
                on_done(at, len(targets))
    return {"kl": kl, "nll": nll, "tokens": np.bincount(owner, minlength=len(samples))}


def context_for(samples: Sequence[EncodedSample]) -> int:
    """Cells of KV memory for a batch of samples."""
    return -(-max([2048, *(len(s.ids) for s in samples)]) // 256) * 256


if __name__ == "__main__":
    serve(_work)
