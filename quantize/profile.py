"""What a GGUF file is built of, in the words of :class:`tsugiki.bases.Profile`, and what that makes worth probing."""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections import Counter
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from tsugiki.bases import Profile
from tsugiki.errors import UserError
from tsugiki.evaluate.engine import check_gguf

OUTLYING = 5.0  # times the median layer's norm of the key bias
K_QUANT_ROW = 256
_PLAIN = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MODEL_TYPES = {"qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe"}  # llama.cpp's name to transformers', where they differ
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor's entry in the header: ``shape`` with the row's length first, ``offset`` from the file's start."""

    shape: tuple[int, ...]
    type: str
    bytes: int
    offset: int


@dataclass(frozen=True)
class Header:
    """A GGUF file's header: plain values by key (arrays of text as their number of elements), tensors by name."""

    values: dict[str, Any]
    tensors: dict[str, TensorInfo]


@dataclass(frozen=True)
class FileProfile:
    """The architecture of a GGUF file.

    Attributes:
        model: the same fields as of a base's folder; ``architecture`` is the file's ``general.architecture``
            and ``model_type`` the same in transformers' spelling (a Mistral is a llama there), ``bytes`` the file's size,
            ``odd_rows`` in llama.cpp's names, ``rope_scaling`` its type alone.
        attention: ``multi-head``, ``grouped-query`` or ``multi-query``.
        bias_norms: ``q``, ``k``, ``v`` to the Euclidean norm of the bias of each layer; empty without biases.
        outlying: layers whose key bias is more than five times the median layer's.
        types: type name to number of matrices (tensors of two or more dimensions).
        probes: what to measure on such a model: ``{"what", "why"}``.
    """

    model: Profile
    attention: str
    bias_norms: dict[str, list[float]]
    outlying: list[int]
    types: dict[str, int]
    probes: list[dict[str, str]]

    def as_dict(self) -> dict:
        """JSON-ready."""
        found = asdict(self)
        found["model"]["odd_rows"] = list(self.model.odd_rows)
        return found


def read_header(path: Path | str) -> Header:
    """Header of a GGUF file, 0.3 s for a vocabulary of 150,000 (gguf's own reader: seconds, it keeps every token).

    A file that has not changed since is not read again.

    Raises:
        UserError: as :func:`tsugiki.evaluate.engine.check_gguf`.
    """
    path = Path(path)
    found = path.stat() if path.is_file() else None
    return _read_header(path, found and (found.st_size, found.st_mtime_ns))


@lru_cache(maxsize=64)
def _read_header(path: Path, _state: tuple[int, int] | None) -> Header:
    check_gguf(path)
    try:
        return _parse_header(path)
    except (ValueError, LookupError, TypeError, OverflowError, struct.error) as error:
        raise UserError(f"not a readable GGUF file: {type(error).__name__}: {error}", where=str(path)) from error


def _parse_header(path: Path) -> Header:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at = 8

        def number(form: str) -> Any:
            nonlocal at
            (value,) = struct.unpack_from(f"<{form}", data, at)
            at += struct.calcsize(f"<{form}")
            return value

        def text() -> str:
            nonlocal at
            length = number("Q")
            at += length
            return data[at - length : at].decode("utf-8", "replace")

        def value(kind: int) -> Any:
            nonlocal at
            if kind == _STRING:
                return text()
            if kind != _ARRAY:
                return number(_PLAIN[kind])
            inner, count = number("I"), number("Q")
            if inner in _PLAIN:
                size = struct.calcsize(f"<{_PLAIN[inner]}")
                at += count * size
                found = struct.unpack_from(f"<{min(count, 4096)}{_PLAIN[inner]}", data, at - count * size)
                return list(found) if count <= 4096 else count
            for _ in range(count):
                if inner == _STRING:
                    at += 8 + struct.unpack_from("<Q", data, at)[0]
                else:
                    value(inner)
            return count

        tensors, pairs = number("Q"), number("Q")
        values = {}
        for _ in range(pairs):
            key = text()
            values[key] = value(number("I"))
        found = []
        for _ in range(tensors):
            name = text()
            shape = tuple(number("Q") for _ in range(number("I")))
            kind, offset = GGMLQuantizationType(number("I")), number("Q")
            block, size = GGML_QUANT_SIZES[kind]
            found.append((name, shape, kind.name, math.prod(shape) // block * size, offset))
        alignment = values.get("general.alignment", 32)
        start = -(-at // alignment) * alignment
        return Header(values, {n: TensorInfo(shape, kind, size, start + o) for n, shape, kind, size, o in found})


def level_name(path: Path | str) -> str:
    """What a file calls itself (``Q4_K_M``, ``F16``), its file name's stem where it does not say.

    Raises:
        UserError: as :func:`read_header`.
    """
    known = {int(t): t.name.removeprefix("MOSTLY_").removeprefix("ALL_") for t in LlamaFileType}
    return known.get(read_header(path).values.get("general.file_type"), Path(path).stem)


def file_profile(path: Path | str) -> FileProfile:
    """Profile of the model in a GGUF file, from its header and its biases.

    Raises:
        UserError: a broken file, or one that lacks what every decoder has.
    """
    path = Path(path)
    header = read_header(path)
    values, tensors = header.values, header.tensors
    kind = values.get("general.architecture")
    needed = ("block_count", "embedding_length", "attention.head_count")
    wrong = [f"{kind}.{k}" for k in needed if type(values.get(f"{kind}.{k}")) is not int or not values[f"{kind}.{k}"]]
    if wrong or "token_embd.weight" not in tensors or len(tensors["token_embd.weight"].shape) != 2:
        raise UserError(
            f"no decoder language model: {', '.join(wrong) or 'token_embd.weight'} is missing or not what it should be",
            where=str(path), hint="Give a GGUF of a text model (general.architecture llama, qwen2, qwen3 …).",
        )

    def entry(key: str, otherwise: Any = None) -> Any:
        found = values.get(f"{kind}.{key}", otherwise)
        return max(found) if isinstance(found, list) and found else found

    layers, hidden, heads = (entry(k) for k in needed)
    kv_heads = entry("attention.head_count_kv") or heads
    head_dim = entry("attention.key_length") or hidden // heads
    vocab_size = tensors["token_embd.weight"].shape[1]
    experts = entry("expert_count", 0) or 0
    matrices = {n: t for n, t in tensors.items() if len(t.shape) > 1}
    widths = {re.sub(r"\.\d+\.", ".*.", n).removesuffix(".weight"): t.shape[0] for n, t in matrices.items()}
    odd = tuple(f"{name} ({width})" for name, width in widths.items() if width % K_QUANT_ROW)
    sizes: Counter[str] = Counter()
    for t in tensors.values():
        sizes[t.type] += t.bytes
    stored = sizes.most_common(1)[0][0]
    scaling = entry("rope.scaling.type")
    if "rope_freqs.weight" in tensors:  # the frequency factors of Llama 3.1
        scaling = "llama3"
    model = Profile(
        architecture=str(kind),
        model_type=_MODEL_TYPES.get(kind, kind),
        family=_family(_MODEL_TYPES.get(kind, kind), str(values.get("tokenizer.ggml.model"))),
        layers=layers,
        hidden=hidden,
        ffn=entry("feed_forward_length", 0),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        queries_per_kv=heads // kv_heads,
        qkv_bias="blk.0.attn_q.bias" in tensors,
        qk_norm="blk.0.attn_q_norm.weight" in tensors,
        tied_embeddings="output.weight" not in tensors,
        vocab_size=vocab_size,
        parameters=sum(math.prod(t.shape) for n, t in tensors.items() if not n.startswith("rope_")),
        bytes=path.stat().st_size,
        dtype=_DTYPES.get(stored, stored),
        context=entry("context_length"),
        rope_theta=float(entry("rope.freq_base") or 10_000.0),
        rope_scaling=None if scaling in (None, "none") else {"rope_type": scaling},
        rows_256=not odd,
        odd_rows=odd,
        experts=experts,
    )
    norms = _bias_norms(path, tensors, layers) if model.qkv_bias else {}
    keys = np.array(norms.get("k", []))
    outlying = [] if not len(keys) else np.flatnonzero(keys > OUTLYING * np.median(keys)).tolist()
    attention = "multi-head" if kv_heads == heads else "multi-query" if kv_heads == 1 else "grouped-query"
    return FileProfile(
        model, attention, norms, outlying, dict(Counter(t.type for t in matrices.values())), _probes(model, keys, outlying)
    )


def _family(kind: str, tokenizer: str) -> str:
    if kind != "llama":
        return kind
    return "llama-3" if tokenizer == "gpt2" else "llama-2"


def _bias_norms(path: Path, tensors: dict[str, TensorInfo], layers: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    kinds = {"F32": np.float32, "F16": np.float16}
    with path.open("rb") as file:
        for letter in "qkv":
            entries = [tensors.get(f"blk.{i}.attn_{letter}.bias") for i in range(layers)]
            norms = []
            for t in entries:
                if t is None or t.type not in kinds:
                    break
                file.seek(t.offset)
                norms.append(float(np.linalg.norm(np.frombuffer(file.read(t.bytes), kinds[t.type]).astype(np.float64))))
            if len(norms) == layers and np.isfinite(norms).all():
                found[letter] = norms
    return found


def _probes(model: Profile, keys: np.ndarray, outlying: list[int]) -> list[dict[str, str]]:
    """Groups of tensors and cache types that this architecture makes worth a measurement, cheapest cause first."""
    probes = []
    if model.queries_per_kv > 1:
        why = f"{model.queries_per_kv} query heads read each key and value: few weights, many readers"
        probes += [{"what": "attn_k", "why": why}, {"what": "attn_v", "why": why}]
    probes.append({"what": "ffn_down", "why": "its inputs are products with outliers; stock mixtures raise it in half the layers only"})
    if model.tied_embeddings:
        probes.append({"what": "token_embd", "why": "one matrix is embedding and output: its error enters twice"})
    else:
        probes += [
            {"what": "output", "why": "its error reaches the logits directly"},
            {"what": "token_embd", "why": f"{model.vocab_size * model.hidden / model.parameters:.0%} of all weights"},
        ]
    if model.experts:
        probes.append({"what": "ffn_down_exps", "why": f"{model.experts} experts a layer, most of the file, and each sees a part of the tokens only"})
    if model.odd_rows:
        probes.append({
            "what": "fallbacks",
            "why": f"rows not divisible by {K_QUANT_ROW}, K-quants become other types: {', '.join(model.odd_rows)}",
        })
    if outlying:
        norms = ", ".join(f"layer {i}: {keys[i]:.0f}" for i in outlying)
        probes.append({
            "what": "KV cache, keys",
            "why": f"outlying key biases ({norms}; median {np.median(keys):.0f}): quantized keys may ruin it, measure before use",
        })
    elif model.qkv_bias:
        probes.append({"what": "KV cache, keys", "why": "biases on the keys widen their range; none stands out here"})
    return probes
