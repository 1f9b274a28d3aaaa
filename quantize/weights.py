"""Safetensors files as rows on demand: the header is checked here, and nothing is mapped into memory.

A mapped file counts as resident memory as soon as it has been read, so that a conversion would appear to hold the
whole model; reads into one buffer do not.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path

from tsugiki.errors import UserError, raise_problems

MAX_HEADER_BYTES = 100 << 20  # the format's own limit
FLOATS = ("F32", "F16", "BF16")
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}
_AGAIN = "Copy or download the file again."


@dataclass(frozen=True)
class Stored:
    """Where one tensor lies.

    Attributes:
        dtype: as the format spells it: ``F32``, ``BF16`` …
        offset: of its first byte in ``file``.
    """

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def rows(self, start: int = 0, stop: int | None = None):
        """Rows ``[start, stop)`` of the first axis as a torch tensor of the stored type, on the CPU.

        Raises:
            UserError: the file has become shorter, or cannot be read.
        """
        import torch

        kind = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[self.dtype]
        stop = self.shape[0] if stop is None else stop
        width = prod(self.shape[1:]) * kind.itemsize
        data = torch.empty((stop - start) * width, dtype=torch.uint8)
        view, done = memoryview(data.numpy()), 0
        try:
            with self.file.open("rb", buffering=0) as stream:
                stream.seek(self.offset + start * width)
                while done < len(view) and (n := stream.readinto(view[done:])):
                    done += n
        except OSError as error:
            raise UserError(f"cannot be read: {error.strerror}", where=str(self.file)) from error
        if done < len(view):
            raise UserError(f"{self.name} is cut off: the file has become shorter", where=str(self.file), hint=_AGAIN)
        return data.view(kind).reshape(stop - start, *self.shape[1:])


def same_values(one: Stored, other: Stored, rows: int = 4096) -> bool:
    """Whether two tensors hold the same numbers, whatever their types."""
    import torch

    return one.shape == other.shape and all(
        torch.equal(*(s.rows(i, min(i + rows, s.shape[0])).to(torch.float32) for s in (one, other)))
        for i in range(0, one.shape[0], rows)
    )


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of one safetensors file, by name.

    Raises:
        UserError: no such file, a pickle or a Git LFS pointer, a damaged or hostile header (too long, not JSON,
            names twice, tensors that overlap, leave holes, or do not have the bytes of their shape), a cut-off file.
    """
    what = "not a whole safetensors file"
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            head = stream.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
            if head.startswith(b"version "):
                raise UserError(f"a Git LFS pointer of {size} bytes, not the weights", where=str(path), hint="Run `git lfs pull`.")
            if head[:4] == b"PK\x03\x04" or head[:2] == b"\x80\x02":
                raise UserError("a pickle, which can run code when it is opened", where=str(path), hint="safetensors only.")
            if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise UserError(f"{what}: {size:,} bytes, its header says that it has {length:,}", where=str(path), hint=_AGAIN)
            text = stream.read(length)
    except FileNotFoundError:
        raise UserError("there is no such file", where=str(path)) from None
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=str(path)) from error
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_once)
        if not isinstance(header, dict):
            raise ValueError("it is no JSON object")
        header.pop("__metadata__", None)
        spans = {name: _span(name, entry) for name, entry in header.items()}
    except (ValueError, RecursionError) as error:  # a broken encoding is a ValueError too
        raise UserError(f"{what}: its header is damaged: {error}", where=str(path), hint=_AGAIN) from None
    end = 0
    for name, (_, _, begin, stop) in sorted(spans.items(), key=lambda item: item[1][2:]):
        if begin != end:
            how = "overlaps the tensor before it" if begin < end else f"leaves a hole of {begin - end:,} bytes before it"
            raise UserError(f"{what}: {name} {how}", where=str(path), hint=_AGAIN)
        end = stop
    if size != 8 + length + end:
        raise UserError(f"{what}: {size:,} bytes, its header says {8 + length + end:,}", where=str(path), hint=_AGAIN)
    return {n: Stored(path, n, dtype, shape, 8 + length + begin) for n, (dtype, shape, begin, _) in spans.items()}


def _once(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [n for n, _ in pairs]
        raise ValueError(f"the name {next(n for n in names if names.count(n) > 1)!r} comes twice")
    return found


def _span(name: str, entry: object) -> tuple[str, tuple[int, ...], int, int]:
    if not isinstance(entry, dict):
        raise ValueError(f"{name} is described by {entry!r}")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    numbers = [*(shape if isinstance(shape, list) else [None]), *(offsets if isinstance(offsets, list) else [None])]
    if any(type(n) is not int or n < 0 for n in numbers) or len(offsets) != 2:
        raise ValueError(f"{name} has the shape {shape!r} and the offsets {offsets!r}")
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"{name} has the unknown type {dtype!r}")
    if prod(shape) * _BITS[dtype] != 8 * (offsets[1] - offsets[0]):
        raise ValueError(f"{name} has {offsets[1] - offsets[0]:,} bytes, its shape {tuple(shape)} of {dtype} says otherwise")
    return dtype, tuple(shape), offsets[0], offsets[1]


def open_weights(base_dir: Path) -> dict[str, Stored]:
    """All tensors of a checkpoint: of ``model.safetensors``, or of the shards that its index names.

    Raises:
        UserError: no safetensors, a shard that is missing or damaged, a name outside the folder, a tensor twice.
    """
    index = base_dir / "model.safetensors.index.json"
    if index.exists():
        try:
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"not a safetensors index: {error!r}", where=str(index)) from None
        outside = [f for f in files if not isinstance(f, str) or Path(f).name != f or not f.endswith(".safetensors")]
        raise_problems([f"{f!r} is not a safetensors file of this folder" for f in outside], what=str(index))
    else:
        files = ["model.safetensors"]
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in base_dir.glob(pattern))
    raise_problems(
        [f"{base_dir / f} is missing" for f in files if not (base_dir / f).is_file()], what="weights",
        hint="The kit reads safetensors only: model.safetensors, or shards with model.safetensors.index.json."
        + (f" {', '.join(pickles)}: pickles can run code; save the model again with save_pretrained." if pickles else ""),
    )
    weights: dict[str, Stored] = {}
    for name in files:
        found = read_header(base_dir / name)
        twice = [f"{n} is in {weights[n].file.name} and in {name}" for n in found if n in weights]
        raise_problems(twice, what=f"{base_dir}: tensors in two files")
        weights |= found
    return weights
