"""Quantization levels of a GGUF file, and what a file really holds."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import gguf

from tsugiki.artifacts import atomic_path
from tsugiki.errors import UserError, raise_problems
from tsugiki.evaluate.engine import check_gguf
from tsugiki.machine import available_memory
from tsugiki.progress import progress
from tsugiki.quantize.child import run_child, say, serve
from tsugiki.quantize.imatrix import Imatrix, read_imatrix
from tsugiki.quantize.profile import read_header

LEVELS = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M")
_FILE_TYPES = {t.name.removeprefix("MOSTLY_").removeprefix("ALL_"): int(t) for t in gguf.LlamaFileType}
_FILE_TYPES.pop("GUESSED", None)
NEED_IMATRIX = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS")
BUFFER = 1 << 30  # bytes of rows that llama.cpp holds at once; the embeddings of a large vocabulary alone are more


@dataclass(frozen=True)
class LevelFile:
    """What a GGUF file holds, read from the file itself.

    Attributes:
        level: as the file calls itself (``general.file_type``).
        bytes: size of the file.
        parameters: of all tensors.
        bpw: effective bits per weight, the tensors' bits over ``parameters``; metadata not counted.
        types: type name -> ``{"tensors", "parameters", "bytes"}``.
        fallbacks: matrices whose rows do not divide by the level's block, written in another type:
            ``{"name", "row", "type"}``.
    """

    level: str
    path: str
    bytes: int
    parameters: int
    bpw: float
    types: dict[str, dict[str, int]]
    fallbacks: list[dict] = field(default_factory=list)


def file_type(level: str) -> int:
    """llama.cpp's number of a level named like ``Q4_K_M``.

    Raises:
        UserError: no such level.
    """
    if level not in _FILE_TYPES:
        raise UserError(f"the level {level!r} is not known", hint=f"Known: {', '.join(sorted(_FILE_TYPES))}.")
    return _FILE_TYPES[level]


def block_type(level: str) -> gguf.GGMLQuantizationType:
    """The type that gives a level its name: Q4_K of Q4_K_M."""
    for name in (level, level.rpartition("_")[0]):
        if name in gguf.GGMLQuantizationType.__members__:
            return gguf.GGMLQuantizationType[name]
    return gguf.GGMLQuantizationType.Q4_K  # IQ3_M and the like: mixtures of 256-blocks


def make_level(
    f16: Path | str,
    level: str,
    out: Path | str,
    *,
    imatrix: Path | str | None = None,
    overrides: Mapping[str, str] | None = None,
    n_threads: int | None = None,
) -> LevelFile:
    """Quantize an F16, BF16 or F32 GGUF to one level; the file is whole or absent.

    llama.cpp runs in a child process, so that an abort in native code cannot end this one.

    Args:
        level: any of llama.cpp's names, K-quants, IQ and older ones.
        imatrix: an importance matrix; the lowest IQ types need one.
        overrides: name of a tensor to its type (``Q6_K``), against the level's own choice.

    Raises:
        UserError: unknown level or type, damaged input, an importance matrix of another model or none where the level
            needs one, too little disk space or memory, or llama.cpp's refusal with its last words.
    """
    out = Path(out)
    job = _job(f16, level, imatrix, overrides)
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(out) as temporary, progress() as bar:
        task = bar.add_task(level, total=None, note="tensors")
        job |= {"out": str(temporary), "folder": str(out.parent), "threads": n_threads or 0}
        run_child("tsugiki.quantize.levels", job, name=f"{level} of {Path(f16).name}",
                  on_message=lambda m: bar.update(task, completed=m["done"], total=m["of"]))
        found = read_types(temporary)
    return LevelFile(**{**vars(found), "path": str(out)})


def plan_level(
    f16: Path | str, level: str, *, imatrix: Path | str | None = None, overrides: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The type that llama.cpp would give each tensor, without writing anything (its ``dry_run``).

    Raises:
        UserError: as :func:`make_level`.
    """
    return run_child("tsugiki.quantize.levels", _job(f16, level, imatrix, overrides), name=f"plan of {level}")["types"]


def _job(f16: Path | str, level: str, imatrix: Path | str | None, overrides: Mapping[str, str] | None) -> dict:
    number = file_type(level)
    check_gguf(f16)
    if imatrix is not None:
        read_imatrix(imatrix)  # damaged ones are refused here
    kinds = {name: tensor_type(kind) for name, kind in (overrides or {}).items()}
    return {"path": str(f16), "level": level, "number": number, "imatrix": imatrix and str(imatrix), "overrides": kinds}


def tensor_type(name: str) -> int:
    """ggml's number of a type named like ``Q6_K``.

    Raises:
        UserError: no such type.
    """
    if name not in gguf.GGMLQuantizationType.__members__:
        known = ", ".join(sorted(gguf.GGMLQuantizationType.__members__))
        raise UserError(f"the type {name!r} is not known", hint=f"Known: {known}.")
    return int(gguf.GGMLQuantizationType[name])


def check_space(need: int, folder: Path, level: str) -> None:
    """Refuse when the disk has less room than the level needs, bytes."""
    free = shutil.disk_usage(folder).free
    if free < need:
        raise UserError(
            f"{level} needs {need / 1e6:,.1f} MB, the disk has {free / 1e6:,.1f} MB free", where=str(folder),
            hint="Free some space, or write to another disk.",
        )


def read_types(path: Path | str) -> LevelFile:
    """Read the types actually written, the effective bits per weight and the fallbacks from a GGUF file.

    Raises:
        UserError: the file is missing or damaged.
    """
    path = Path(path)
    header = read_header(path)
    number = header.values.get("general.file_type", -1)
    level = next((name for name, n in _FILE_TYPES.items() if n == number), f"file type {number}")
    return LevelFile(
        level=level, path=str(path), bytes=path.stat().st_size,
        **summarize(((n, list(t.shape), gguf.GGMLQuantizationType[t.type], t.bytes) for n, t in header.tensors.items()), level),
    )


def summarize(tensors: Iterable[tuple[str, list[int], gguf.GGMLQuantizationType, int]], level: str) -> dict:
    """Types, bits per weight and fallbacks of ``(name, shape with the row's length first, type, bytes)``."""
    types: dict[str, dict[str, int]] = {}
    fallbacks = []
    block = gguf.GGML_QUANT_SIZES[block_type(level)][0] if level in _FILE_TYPES else 1
    for name, shape, tensor_type, nbytes in tensors:
        count = 1
        for n in shape:
            count *= n
        row = types.setdefault(tensor_type.name, {"tensors": 0, "parameters": 0, "bytes": 0})
        row["tensors"] += 1
        row["parameters"] += count
        row["bytes"] += nbytes
        if len(shape) > 1 and shape[0] % block:
            fallbacks.append({"name": name, "row": shape[0], "type": tensor_type.name})
    parameters = sum(t["parameters"] for t in types.values())
    bits = 8 * sum(t["bytes"] for t in types.values())
    return {"parameters": parameters, "bpw": bits / parameters if parameters else 0.0, "types": types, "fallbacks": fallbacks}


# --- the child process --------------------------------------------------------------------------------------------

_PLAN = re.compile(r"^\[\s*(\d+)/\s*(\d+)\]\s+(\S+)\s+- \[.*\], type =\s*(\S+), (?:size = .*?(?:\((\w+)\))?\s*$)?")


def _quantize(job: dict) -> dict:
    """Plan the level, refuse what cannot work, then let llama.cpp quantize (unless there is no ``out``)."""
    import llama_cpp

    shapes = {n: (list(t.shape), gguf.GGMLQuantizationType[t.type]) for n, t in read_header(job["path"]).tensors.items()}
    matrix = read_imatrix(job["imatrix"]) if job["imatrix"] else None
    refuse_imatrix(matrix, shapes, job["imatrix"])
    unknown = sorted(set(job["overrides"]) - set(shapes))
    raise_problems([f"{name}: there is no such tensor" for name in unknown], what="types for single tensors")

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.max_buf_size = job["number"], BUFFER
    params.nthread = job.get("threads", 0)
    alive = []  # ctypes arrays hold no references to what they point to
    if matrix:
        means = matrix.means()
        data = (llama_cpp.llama_model_imatrix_data * (len(means) + 1))()
        for entry, (name, values) in zip(data, means.items(), strict=False):
            entry.name, entry.size = name.encode(), values.size
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        about = _about(matrix, Path(job["imatrix"]).name)
        alive += [means, data, about]
        params.imatrix, params.kv_overrides = data, about
    if job["overrides"]:
        kinds = (llama_cpp.llama_model_tensor_override * (len(job["overrides"]) + 1))()
        for entry, (name, kind) in zip(kinds, job["overrides"].items(), strict=False):
            entry.pattern, entry.type = f"^{re.escape(name)}$".encode(), kind
        alive.append(kinds)
        params.tt_overrides = kinds

    said: list[str] = []
    pending = ""

    @llama_cpp.llama_log_callback
    def log(level: int, text: bytes, _) -> None:
        nonlocal pending
        pending += text.decode("utf-8", "replace")
        *lines, pending = pending.split("\n")
        said.extend(line for line in lines if line.strip())
        sys.stderr.writelines(f"{line}\n" for line in lines if level == 3 or line.startswith("="))
        if not params.dry_run and (found := _PLAN.match(lines[-1] if lines else pending)):
            say(done=int(found[1]), of=int(found[2]))

    llama_cpp.llama_log_set(log, ctypes.c_void_p(0))
    params.dry_run = True
    out = job.get("out", job["path"] + ".none").encode("utf-8", "surrogateescape")
    code = llama_cpp.llama_model_quantize(os.fsencode(job["path"]), out, params)
    if code:
        raise UserError(f"llama.cpp could not plan {job['level']} (code {code}): {' | '.join(said[-3:])}", where=job["path"])
    types = {m[3]: (m[5] or m[4]).upper() for line in said if (m := _PLAN.match(line))}
    if set(types) != set(shapes):
        raise UserError(f"llama.cpp's plan names {len(types)} tensors, the file has {len(shapes)}", where=job["path"])
    _refuse_types(job, types, matrix)
    if "out" not in job:
        return {"types": types}
    _refuse_resources(job, shapes, types)
    params.dry_run = False
    said.clear()
    code = llama_cpp.llama_model_quantize(os.fsencode(job["path"]), os.fsencode(job["out"]), params)
    if code:
        telling = [w for w in said if "error" in w.lower() or "fail" in w.lower()]
        if any("iostream error" in w for w in telling):  # its ofstream's exception, which says no more
            raise UserError(f"{job['level']} could not be written", where=job["folder"],
                            hint="Free some space, or write to another place. Nothing half-written was kept.")
        raise UserError(f"llama.cpp could not make {job['level']} (code {code}): {' | '.join((telling or said)[-3:])}",
                        where=job["path"], hint="Nothing was written.")
    return {"types": types}


def _about(matrix: Imatrix, file: str):
    """Where the importance comes from, in the keys that llama-quantize writes (texts of at most 127 bytes)."""
    import llama_cpp

    def text(value: str) -> bytes:
        return value.encode()[:127].decode("utf-8", "ignore").encode()

    pairs = [("file", text(file))] + [("dataset", text(name)) for name in matrix.datasets[:1]]
    pairs += [("entries_count", len(matrix.sums))] + ([("chunks_count", matrix.chunks)] if matrix.chunks else [])
    found = (llama_cpp.llama_model_kv_override * (len(pairs) + 1))()
    for entry, (key, value) in zip(found, pairs, strict=False):
        entry.key = f"quantize.imatrix.{key}".encode()
        if isinstance(value, int):
            entry.tag, entry.value.val_i64 = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_INT, value
        else:
            entry.tag, entry.value.val_str = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_STR, value
    return found


def refuse_imatrix(matrix: Imatrix | None, shapes: Mapping[str, tuple[list[int], int]], where: str | None) -> None:
    """Refuse an importance matrix of another model: a name that is not there, or another number of columns."""
    if matrix is None:
        return
    problems = []
    for name, sums in matrix.sums.items():
        shape = shapes.get(name, (None,))[0]
        if shape is None:
            problems.append(f"{name}: the model has no such tensor")
        elif sums.size != shape[0] * (shape[2] if len(shape) > 2 else 1):
            problems.append(f"{name}: {sums.size} columns, the model has {shape[0] * (shape[2] if len(shape) > 2 else 1)}")
    raise_problems(problems, what=f"{where}: an importance matrix of another model", most=5)


def needs_imatrix(name: str, kind: str, level: str) -> bool:
    """Whether llama.cpp refuses a tensor's type without importance (``tensor_requires_imatrix`` of its llama-quant.cpp)."""
    if name in ("token_embd.weight", "per_layer_token_embd.weight", "output.weight"):
        return False
    return kind in NEED_IMATRIX or (kind == "Q2_K" and level == "Q2_K_S")


def _refuse_types(job: dict, types: Mapping[str, str], matrix: Imatrix | None) -> None:
    missing = [n for n, kind in types.items() if needs_imatrix(n, kind, job["level"]) and (matrix is None or n not in matrix.sums)]
    if missing and matrix is None:
        raise UserError(
            f"{job['level']} needs an importance matrix: {missing[0]} and {len(missing) - 1} others would be {types[missing[0]]}, "
            "which is noise without one", where=job["path"],
            hint="Make one: tsugiki quantize imatrix MODEL.gguf --domain-data train.jsonl --out F, then --imatrix F.",
        )
    raise_problems([f"{n}: {types[n]} needs importance, and there is none for it" for n in missing],
                   what=f"{job['imatrix']}: not enough for {job['level']}", most=5)


def _refuse_resources(job: dict, shapes: Mapping[str, tuple[list[int], int]], types: Mapping[str, str]) -> None:
    """Disk: the header and every tensor in its planned type. Memory: one buffer, the mapped tensor and the matrix."""
    before = sum(padded_bytes(shape, kind) for shape, kind in shapes.values())
    after = sum(padded_bytes(shapes[n][0], gguf.GGMLQuantizationType[kind]) for n, kind in types.items())
    check_space(os.stat(job["path"]).st_size - before + after + 1024, Path(job["folder"]), job["level"])
    largest = max(min(4 * prod(shape), BUFFER) + prod(shape) for shape, _ in shapes.values())
    free = available_memory()
    if free < largest:
        raise UserError(f"{job['level']} needs about {largest / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free",
                        where=job["path"], hint="Close other programs.")


def padded_bytes(shape: Sequence[int], kind: gguf.GGMLQuantizationType) -> int:
    """Bytes of a tensor in a file: blocks of its type, then to a multiple of 32 (GGUF's alignment)."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return -(-prod(shape) // block * size // 32) * 32


if __name__ == "__main__":
    serve(_quantize)
