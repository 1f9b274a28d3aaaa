"""Quantization levels of a GGUF file, and what a file really holds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import gguf

from tsugiki.artifacts import atomic_path
from tsugiki.errors import UserError
from tsugiki.evaluate.engine import check_gguf

LEVELS = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M")
_FILE_TYPES = {t.name.removeprefix("MOSTLY_").removeprefix("ALL_"): int(t) for t in gguf.LlamaFileType}
_FILE_TYPES.pop("GUESSED", None)


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


def make_level(f16: Path | str, level: str, out: Path | str, *, n_threads: int | None = None) -> LevelFile:
    """Quantize an F16, BF16 or F32 GGUF to one level; the file is whole or absent.

    llama.cpp runs in a child process, so that an abort in native code cannot end this one.

    Raises:
        UserError: unknown level, damaged input, too little disk space, or llama.cpp's refusal with its last words.
    """
    f16, out = Path(f16), Path(out)
    number = file_type(level)
    check_gguf(f16)
    check_space(f16, level, out)
    with atomic_path(out) as temporary:
        job = [sys.executable, "-m", "tsugiki.quantize.levels", f16, temporary, number, n_threads or 0]
        # Without safe path a folder of ours would hide a library of the same name.
        environment = os.environ | {"PYTHONSAFEPATH": "1", "PYTHONIOENCODING": "utf-8"}
        done = subprocess.run([str(a) for a in job], env=environment, capture_output=True, text=True, errors="replace")
        if done.returncode or not temporary.is_file():
            words = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            telling = [w for w in words if "error" in w.lower() or "fail" in w.lower() or "assert" in w.lower()]
            raise UserError(
                f"llama.cpp could not make {level} (exit {done.returncode}): {' | '.join((telling or words)[-3:])}",
                where=str(f16), hint="Nothing was written.",
            )
        found = read_types(temporary)
    return LevelFile(**{**vars(found), "path": str(out)})


def check_space(f16: Path, level: str, out: Path) -> None:
    """Refuse when the disk has less room than the level may need.

    The bound is the source's size in proportion to the level's bits, and half as much again for the tensors that
    a mixture keeps higher, at most the source's size (twice that for F32).
    """
    block, size = gguf.GGML_QUANT_SIZES[block_type(level)]
    source = f16.stat().st_size
    need = int(min(source * (size / block / 2) * 1.5, source * (2 if level == "F32" else 1)))
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    if free < need:
        raise UserError(
            f"{level} needs up to {need / 1e6:,.0f} MB, the disk has {free / 1e6:,.0f} MB free", where=str(out.parent),
            hint="Free some space, or write to another disk.",
        )


def read_types(path: Path | str) -> LevelFile:
    """Read the types actually written, the effective bits per weight and the fallbacks from a GGUF file.

    Raises:
        UserError: the file is missing or damaged.
    """
    path = Path(path)
    check_gguf(path)
    try:
        reader = gguf.GGUFReader(path)
    except Exception as error:  # the reader raises whatever its numpy views raise
        raise UserError(f"not a readable GGUF file: {error}", where=str(path)) from error
    entry = reader.fields.get("general.file_type")
    number = int(entry.contents()) if entry else -1
    level = next((name for name, n in _FILE_TYPES.items() if n == number), f"file type {number}")
    return LevelFile(
        level=level, path=str(path), bytes=path.stat().st_size,
        **summarize(((t.name, [int(n) for n in t.shape], t.tensor_type, int(t.n_bytes)) for t in reader.tensors), level),
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


def quantize_here(f16: str, out: str, number: int, n_threads: int = 0) -> int:
    """Quantize in this process; llama.cpp's return code (0: done)."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = number
    params.nthread = n_threads
    return llama_cpp.llama_model_quantize(os.fsencode(f16), os.fsencode(out), params)


if __name__ == "__main__":
    sys.exit(quantize_here(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
