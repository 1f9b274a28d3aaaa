"""A GGUF opened with a view inside: ggml's tensors as llama.cpp computes, its weights, its quantization functions.

llama-cpp-python does not wrap ggml. What is used here is ggml's own C interface through ctypes, and a mirror of its
``struct ggml_tensor`` (``ggml.h``), which is checked against the library on real tensors before anything relies on
it. Native code may abort: callers run this in a child process (:mod:`tsugiki.quantize.child`).
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
from llama_cpp import llama_cpp as _bindings

from tsugiki.errors import UserError
from tsugiki.evaluate.engine import BATCH, check_gguf, thread_count

F32, F16, BF16 = (int(gguf.GGMLQuantizationType[n]) for n in ("F32", "F16", "BF16"))


class Tensor(ctypes.Structure):
    """``struct ggml_tensor`` of ggml.h."""


Tensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(Tensor) * 10),
    ("view_src", ctypes.POINTER(Tensor)),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
    ("extra", ctypes.c_void_p),
    ("padding", ctypes.c_char * 8),
]


class _Traits(ctypes.Structure):
    """``struct ggml_type_traits`` of ggml.h."""

    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("block", ctypes.c_int64),
        ("block_interleave", ctypes.c_int64),
        ("size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float_ref", ctypes.c_void_p),
    ]


_floats = ctypes.POINTER(ctypes.c_float)
_tensor = ctypes.POINTER(Tensor)


@cache
def _ggml(name: str) -> Callable:
    """A function of ggml, from the library that llama-cpp-python has loaded."""
    result, arguments = {
        "ggml_op_desc": (ctypes.c_char_p, [_tensor]),
        "ggml_get_name": (ctypes.c_char_p, [_tensor]),
        "ggml_get_data": (ctypes.c_void_p, [_tensor]),
        "ggml_nbytes": (ctypes.c_size_t, [_tensor]),
        "ggml_backend_buffer_is_host": (ctypes.c_bool, [ctypes.c_void_p]),
        "ggml_backend_tensor_get": (None, [_tensor, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]),
        "ggml_backend_tensor_set": (None, [_tensor, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]),
        "ggml_get_type_traits": (ctypes.POINTER(_Traits), [ctypes.c_int]),
        "ggml_row_size": (ctypes.c_size_t, [ctypes.c_int, ctypes.c_int64]),
        "ggml_quantize_chunk": (
            ctypes.c_size_t,
            [ctypes.c_int, _floats, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, _floats],
        ),
    }[name]
    function = getattr(_bindings._lib, name)
    function.restype, function.argtypes = result, arguments
    return function


# --- quantization of single matrices ------------------------------------------------------------------------------


def row_bytes(kind: int, width: int) -> int:
    """Bytes of a row of ``width`` weights in a ggml type."""
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
    return width // block * size


def quantize_rows(kind: int, weights: np.ndarray, importance: np.ndarray | None = None, threads: int = 1) -> np.ndarray:
    """Quantize a matrix with ggml's own function: the bytes that llama-quantize writes.

    Args:
        kind: a ggml type whose block divides the width.
        weights: float32 ``(R, W)``, finite.
        importance: float32 ``(W,)``, mean squared input of each column, or ``None``.

    Returns:
        uint8 ``(R, row_bytes)``.
    """
    rows, width = weights.shape
    weights = np.ascontiguousarray(weights, np.float32)
    out = np.empty((rows, row_bytes(kind, width)), np.uint8)
    importance = None if importance is None else np.ascontiguousarray(importance, np.float32)
    pointer = importance.ctypes.data_as(_floats) if importance is not None else None

    def part(start: int) -> None:
        n = min(step, rows - start)
        done = _ggml("ggml_quantize_chunk")(
            kind, weights[start:].ctypes.data_as(_floats), out[start:].ctypes.data, 0, n, width, pointer
        )
        assert done == n * out.shape[1]

    step = max(1, -(-rows // max(1, threads)), (1 << 18) // width) if threads > 1 else rows
    with ThreadPoolExecutor(max(1, threads)) as pool:  # ctypes lets go of the interpreter's lock
        list(pool.map(part, range(0, rows, step)))
    return out


def dequantize_rows(kind: int, data: np.ndarray, width: int) -> np.ndarray:
    """Float32 ``(R, W)`` of rows in a ggml type, uint8 ``(R, row_bytes)``, by ggml's own function."""
    if kind == F32:
        return data.view(np.float32)
    out = np.empty((len(data), width), np.float32)
    data = np.ascontiguousarray(data)
    _ggml("ggml_get_type_traits")(kind).contents.to_float(data.ctypes.data, out.ctypes.data, out.size)
    return out


@llama_cpp.llama_log_callback
def _log(level: int, text: bytes, _) -> None:
    """Errors go to standard error, the child's last words; the rest is dropped."""
    if level == 3:
        sys.stderr.write(text.decode("utf-8", "replace"))


# --- a model with a view inside -----------------------------------------------------------------------------------


class Probe:
    """A GGUF whose tensors are shown to ``watch`` as llama.cpp computes, and whose weights can be replaced in memory.

    A context manager: it owns native memory. Tokens are decoded in batches of 256 with attention that is not fused.

    Args:
        path: the GGUF.
        watch: called as ``watch(tensor, ask)`` for each operation: with ``ask`` it says whether it wants to see the
            operation's result and inputs, and is then called again without.
        writable: read the weights into memory instead of mapping the file, so that :meth:`replace` works.
        n_ctx: cells of the KV memory, shared by up to 8 sequences.

    Attributes:
        weights: name to the tensors of that name (more than one where a device has a copy of its own).
        vocab_size: ``V``.

    Raises:
        UserError: the file is broken, there is no memory, or tensors are not laid out as the mirror says.
    """

    SEQUENCES = 8

    def __init__(self, path: Path | str, *, watch: Callable | None = None, writable: bool = False, n_ctx: int = 2048,
                 n_threads: int | None = None, n_gpu_layers: int = 0):
        self.path, self._watch, self.error, self.weights = Path(path), watch, None, {}
        self._model = self._context = None
        check_gguf(path)
        llama_cpp.llama_log_set(_log, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_default_params()
        model.n_gpu_layers = n_gpu_layers
        model.use_extra_bufts = False  # repacked weights have another layout
        if writable:
            model.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE
        self._model = llama_cpp.llama_model_load_from_file(os.fsencode(self.path), model)
        if not self._model:
            raise UserError("llama.cpp cannot load it, or there is no memory for it", where=str(path))
        params = llama_cpp.llama_context_default_params()
        # Never below a batch: decode fills batches of that size, and llama.cpp aborts where one has no room for a token of each sequence.
        params.n_ctx, params.n_seq_max = max(n_ctx, BATCH), self.SEQUENCES
        params.n_batch = params.n_ubatch = BATCH
        params.n_threads = params.n_threads_batch = n_threads or thread_count(self.path)
        params.kv_unified, params.no_perf = True, True
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._callback = _bindings.ggml_backend_sched_eval_callback(self._see)
        params.cb_eval = self._callback
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            self.close()
            raise UserError(f"there is no memory for a context of {n_ctx} tokens", where=str(path))
        self._memory = llama_cpp.llama_get_memory(self._context)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(params.n_batch, 0, 1)
        self._checking = True
        list(self.decode([[0, 0]], [[1, 1]]))
        self._checking = False

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Free the native memory."""
        if self._context:
            llama_cpp.llama_batch_free(self._batch)
            llama_cpp.llama_free(self._context)
        if self._model:
            llama_cpp.llama_model_free(self._model)
        self._model = self._context = None
        self.weights = {}

    def decode(self, sequences: Sequence[Sequence[int]], flags: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
        """Decode token sequences, several at a time; yield the logits of the flagged tokens in order, batch by batch.

        Yields:
            float32 ``(R, V)``, a view that is valid until the next is asked for.

        Raises:
            UserError: an id outside the vocabulary, a sequence without room, or what ``watch`` raised.
        """
        room = llama_cpp.llama_n_ctx(self._context)
        for ids in sequences:
            if len(ids) > room or min(ids) < 0 or max(ids) >= self.vocab_size:
                raise UserError(
                    f"a sequence of {len(ids)} ids from {min(ids)} to {max(ids)}; the context holds {room} and the "
                    f"vocabulary has {self.vocab_size}", where=str(self.path),
                    hint="The ids come from another tokenizer, or a sample is too long.",
                )
        for group in pack([len(s) for s in sequences], self.SEQUENCES):
            llama_cpp.llama_memory_clear(self._memory, False)
            rows = [(t, p, slot, f) for slot, i in enumerate(group)
                    for p, (t, f) in enumerate(zip(sequences[i], flags[i], strict=True))]
            for start in range(0, len(rows), BATCH):
                part = rows[start : start + BATCH]
                for at, (token, pos, slot, flag) in enumerate(part):
                    self._batch.token[at], self._batch.pos[at], self._batch.logits[at] = token, pos, flag
                    self._batch.n_seq_id[at], self._batch.seq_id[at][0] = 1, slot
                self._batch.n_tokens = len(part)
                code = llama_cpp.llama_decode(self._context, self._batch)
                if self.error:
                    raise self.error
                if code:
                    raise UserError(f"llama_decode returned {code} for {len(part)} tokens", where=str(self.path))
                flagged = sum(r[3] for r in part)
                if flagged:
                    yield np.ctypeslib.as_array(llama_cpp.llama_get_logits(self._context), (flagged, self.vocab_size))

    def _see(self, pointer: int, ask: bool, _) -> bool:
        try:
            tensor = ctypes.cast(pointer, _tensor).contents
            if self._checking:
                if ask:
                    self._learn(tensor)
                return False
            return bool(self._watch and not self.error and self._watch(tensor, ask))
        except Exception as error:  # ctypes would print it and go on
            self.error = error
            return False

    def _learn(self, tensor: Tensor) -> None:
        """Check the mirror on an operation's tensors; note the weights among its inputs."""
        for source in (tensor, *(s.contents for s in tensor.src if s)):
            traits = _ggml("ggml_get_type_traits")(source.type).contents
            packed = source.nb[0] == traits.size and source.nb[1] == traits.size * (source.ne[0] // traits.block)
            nbytes = source.nb[1] + sum((n - 1) * b for n, b in zip(source.ne[1:], source.nb[1:], strict=True))
            if (
                source.name != _ggml("ggml_get_name")(source)
                or source.data != _ggml("ggml_get_data")(source)
                or (packed and nbytes != _ggml("ggml_nbytes")(source))
            ):
                raise UserError(
                    "this build of llama.cpp lays out its tensors otherwise than llama-cpp-python 0.3.36's",
                    hint="Install the pinned version of llama-cpp-python.",
                )
            name = base_name(source.name)
            if name.endswith(".weight") and not source.view_src:
                places = self.weights.setdefault(name, [])
                if all(p.data != source.data for p in places):
                    places.append(source)

    def replace(self, name: str, weights: np.ndarray) -> None:
        """Write float32 ``(R, W)`` over a matrix in memory, in the type that the file has it in (F32, F16 or BF16)."""
        places = self.weights[name]
        kind = places[0].type
        data = weights if kind == F32 else quantize_rows(kind, weights)
        for place in places:
            nbytes = _ggml("ggml_nbytes")(place)
            assert nbytes == data.nbytes and place.type == kind
            _ggml("ggml_backend_tensor_set")(place, np.ascontiguousarray(data).ctypes.data, 0, nbytes)


def pack(lengths: Sequence[int], width: int) -> Iterator[list[int]]:
    """Indices of neighbours that fill one batch together, at most ``width``."""
    group: list[int] = []
    for i, n in enumerate(lengths):
        if group and (len(group) == width or sum(lengths[g] for g in group) + n > BATCH):
            yield group
            group = []
        group.append(i)
    if group:
        yield group


def base_name(name: bytes) -> str:
    """``CUDA0#blk.0.attn_k.weight#0``, as a copy is called, → ``blk.0.attn_k.weight``."""
    parts = name.decode("utf-8", "replace").split("#")
    return parts[1] if len(parts) > 1 else parts[0]


def values(tensor: Tensor, dtype: type = np.float32) -> np.ndarray:
    """A copy or view of a tensor's values as numpy has them, ``(ne3, ne2, ne1, ne0)``, with its strides."""
    nbytes = _ggml("ggml_nbytes")(tensor)
    if _ggml("ggml_backend_buffer_is_host")(tensor.buffer):
        buffer = (ctypes.c_char * nbytes).from_address(tensor.data)
    else:
        buffer = ctypes.create_string_buffer(nbytes)
        _ggml("ggml_backend_tensor_get")(tensor, buffer, 0, nbytes)
    return np.ndarray(tuple(tensor.ne)[::-1], dtype, buffer, strides=tuple(tensor.nb)[::-1])


def operation(tensor: Tensor) -> str:
    """``MUL_MAT`` and the like."""
    return _ggml("ggml_op_desc")(tensor).decode()
