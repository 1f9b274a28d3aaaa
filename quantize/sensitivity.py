"""Which tensors bear quantization badly: KL against F16 when one group of them alone is at a lower type.

The F16 model is opened once, in memory. For a variant the group's matrices are quantized with ggml's own functions and
written back over their F16 selves (:class:`Simulator`): no file is written and nothing is loaded again, so a variant
costs one pass over the tokens. What that leaves out is the rounding of the *inputs* that llama.cpp does for quantized
matrices, and the F16 rounding of the result: files that people get are always measured themselves.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import gguf
import numpy as np

from tsugiki.artifacts import digest, sha256_file
from tsugiki.errors import UserError
from tsugiki.evaluate.engine import Engine, log_sum_exp
from tsugiki.quantize.child import run_child, say, serve
from tsugiki.quantize.imatrix import chunks_of, read_imatrix, read_source
from tsugiki.samples import EncodedSample, read_encoded

MOST_LOGITS = 1 << 30  # bytes of the reference's float32 log-probabilities that are kept: 1,760 tokens of Qwen's 152,064
SINGLE = 64  # matrices up to which each is a group of its own
KINDS = ("IQ3_XXS", "IQ3_S", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0")


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
    found = {}
    for t in gguf.GGUFReader(path).tensors:
        shape = [int(n) for n in t.shape]
        if len(shape) > 1 and t.name.endswith("weight") and "_norm." not in t.name and "ffn_gate_inp" not in t.name:
            found[t.name] = (shape, int(t.tensor_type))
    return found


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

    A chunk of text is scored from its second token on; documents are runs of eight chunks.

    Raises:
        UserError: as :func:`tsugiki.quantize.imatrix.read_source`.
    """
    source = read_source(path)
    if source.text:
        pieces = chunks_of(source, engine, tokens, chunk)
        return [EncodedSample(f"{i}", "", "", f"{i // 8}", prompt_ids=p[:1], completion_ids=p[1:])
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
        self.tensors = {t.name: t for t in gguf.GGUFReader(path).tensors}
        self.state: dict[str, str] = {}  # name to type where it is not the original
        self.passes = 0
        self._cache: OrderedDict[tuple[str, str], np.ndarray] = OrderedDict()
        self._left = cache_bytes
        size = 4 * probe.vocab_size
        tokens = sum(len(s.completion_ids) for s in samples)
        if tokens * size > 2 * MOST_LOGITS:
            raise UserError(f"{tokens} tokens of {probe.vocab_size} log-probabilities need {tokens * size / 1e9:.1f} GB",
                            hint=f"Take at most {MOST_LOGITS // size} tokens.")
        self._reference = [x - log_sum_exp(x)[:, None].astype(np.float32) for x in self._logits()]

    def _logits(self) -> Iterator[np.ndarray]:
        self.passes += 1
        ids = [s.ids[:-1] for s in self.samples]
        flags = [[0] * (len(s.prompt_ids) - 1) + [1] * len(s.completion_ids) for s in self.samples]
        return self.probe.decode(ids, flags)

    def original(self, name: str) -> np.ndarray:
        """Float32 ``(rows of all experts, columns)`` of a matrix as it is in the file."""
        from tsugiki.quantize.native import dequantize_rows

        t = self.tensors[name]
        width = int(t.shape[0])
        return dequantize_rows(int(t.tensor_type), np.ascontiguousarray(t.data).view(np.uint8).reshape(t.n_elements // width, -1), width)

    def quantized(self, name: str, kind: str) -> np.ndarray:
        """The matrix after quantization to ``kind`` and back, float32; kept as F16 for the next time."""
        from tsugiki.quantize.native import dequantize_rows, quantize_rows

        key = (name, kind)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key].astype(np.float32)
        weights, number = self.original(name), int(gguf.GGMLQuantizationType[kind])
        experts = int(self.tensors[name].shape[2]) if len(self.tensors[name].shape) > 2 else 1
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
        """``Σ importance · (w − w')²``: what the type does to the matrix's output, up to the correlation of its inputs."""
        importance = self.importance.get(name)
        weights = self.original(name)
        difference = (weights - self.quantized(name, kind)) ** 2
        if importance is None:
            return float(difference.sum(dtype=np.float64))
        scale = importance.reshape(-1, weights.shape[1])
        return float((difference.reshape(len(scale), -1, weights.shape[1]) * scale[:, None]).sum(dtype=np.float64))

    def divergence(self, types: Mapping[str, str]) -> float:
        """Mean KL(F16 ‖ variant), nats a token, with the named matrices at the given types and all others as they are."""
        for name in [n for n in self.state if types.get(n) != self.state[n]]:
            if name not in types:
                self.probe.replace(name, self.original(name))
                del self.state[name]
        for name, kind in types.items():
            if self.state.get(name) != kind:
                self.probe.replace(name, self.quantized(name, kind))
                self.state[name] = kind
        total = tokens = 0
        for reference, logits in zip(self._reference, self._logits(), strict=True):
            total += float(kl_rows(reference, logits).sum())
            tokens += len(logits)
        return total / tokens


def kl_rows(reference: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """``KL(p ‖ q)`` in nats, float64 ``(R,)``, from log-probabilities ``log p`` and logits of ``q``, float32 ``(R, V)``.

    ``Σ p (log p − log q)`` with the difference taken at p's most probable token first, so that what is summed in
    float32 is small.
    """
    row = np.arange(len(reference))
    best = reference.argmax(axis=1)
    gap = reference - logits
    first = gap[row, best].copy()
    gap -= first[:, None]
    gap *= np.exp(reference)
    return np.maximum(gap.sum(axis=1, dtype=np.float64) + first + log_sum_exp(logits), 0)


def measure(reference: Path | str, files: Sequence[Path | str], samples: Sequence[EncodedSample], *,
            threads: int | None = None, on_done: Callable[[int, int], None] | None = None) -> dict[str, np.ndarray]:
    """Files against their reference, read in lock-step.

    Returns:
        ``kl``: float64 ``(files, N)``, KL(reference ‖ file) summed over a sample's scored tokens, nats; ``nll``: float64
        ``(1 + files, N)``, the reference first; ``tokens``: int64 ``(N,)``.

    Raises:
        UserError: a broken file or another vocabulary than the reference's.
    """
    from contextlib import ExitStack

    from tsugiki.quantize.native import Probe

    n_ctx = context_for(samples)
    ids = [s.ids[:-1] for s in samples]
    flags = [[0] * (len(s.prompt_ids) - 1) + [1] * len(s.completion_ids) for s in samples]
    owner = np.repeat(np.arange(len(samples)), [len(s.completion_ids) for s in samples])
    targets = np.concatenate([s.completion_ids for s in samples])
    kl, nll, at = np.zeros((len(files), len(samples))), np.zeros((1 + len(files), len(samples))), 0
    with ExitStack() as stack:
        probes = [stack.enter_context(Probe(p, n_ctx=n_ctx, n_threads=threads)) for p in (reference, *files)]
        if wrong := [p for p in probes if p.vocab_size != probes[0].vocab_size]:
            raise UserError(f"its vocabulary has {wrong[0].vocab_size} tokens, the reference's {probes[0].vocab_size}",
                            where=str(wrong[0].path), hint="Compare files made from the same F16 file.")
        for blocks in zip(*(p.decode(ids, flags) for p in probes), strict=True):
            part = slice(at, at + len(blocks[0]))
            at = part.stop
            row = np.arange(len(blocks[0]))
            logp = blocks[0] - log_sum_exp(blocks[0])[:, None].astype(np.float32)
            np.add.at(nll[0], owner[part], -logp[row, targets[part]])
            for i, logits in enumerate(blocks[1:]):
                np.add.at(kl[i], owner[part], kl_rows(logp, logits))
                np.add.at(nll[1 + i], owner[part], log_sum_exp(logits) - logits[row, targets[part]])
            if on_done:
                on_done(at, len(targets))
    return {"kl": kl, "nll": nll, "tokens": np.bincount(owner, minlength=len(samples))}


def context_for(samples: Sequence[EncodedSample]) -> int:
    """Cells of KV memory for a batch of samples."""
    return -(-max([2048, *(len(s.ids) for s in samples)]) // 256) * 256
