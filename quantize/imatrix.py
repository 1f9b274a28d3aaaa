"""Importance matrix: how strongly each input column of each weight matrix is driven, on domain and general text.

For a matrix ``W`` the importance of column ``j`` is the mean of ``x_j²`` over all tokens; quantization then weighs the
rounding error of that column with it. Collected while llama.cpp computes, from the GGUF alone. Stored as llama.cpp
stores it: ``NAME.in_sum2`` (sums of squares, one row for each expert) and ``NAME.counts``.
"""

from __future__ import annotations

import errno
import json
import os
import struct
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np

from tsugiki.artifacts import atomic_path, digest, sha256_file
from tsugiki.errors import UserError, raise_problems
from tsugiki.evaluate.engine import Engine, check_gguf
from tsugiki.progress import progress
from tsugiki.quantize.child import run_child, say, serve

CHUNK = 512  # tokens of a chunk of plain text, as llama-imatrix has it
SAVE_EVERY = 60  # seconds between the partial results that an interrupted run continues from


@dataclass(frozen=True)
class Imatrix:
    """An importance matrix.

    Attributes:
        sums: name of a weight to float32 ``(experts, columns)``: sums of squared inputs (one expert: a dense matrix).
        counts: name to float32 ``(experts,)``: tokens that went through it.
        datasets: the texts' file names.
        chunks: number of chunks, and
        chunk_size: tokens of one.
    """

    sums: dict[str, np.ndarray]
    counts: dict[str, np.ndarray]
    datasets: list[str] = field(default_factory=list)
    chunks: int = 0
    chunk_size: int = CHUNK

    def means(self) -> dict[str, np.ndarray]:
        """Name to float32 ``(experts · columns,)`` mean squares, as llama-quantize uses them: 1 for an expert never used."""
        found = {}
        for name, sums in self.sums.items():
            counts = self.counts[name].astype(np.float32)[:, None]
            found[name] = np.where(counts > 0, sums / np.maximum(counts, 1), np.float32(1)).astype(np.float32).ravel()
        return found


# --- files --------------------------------------------------------------------------------------------------------


def write_imatrix(path: Path | str, matrix: Imatrix, *, extra: dict[str, str] | None = None) -> None:
    """Write llama.cpp's GGUF form, atomically."""
    with atomic_path(path) as temporary:
        writer = gguf.GGUFWriter(temporary, "")
        writer.kv_data[0].pop("general.architecture", None)  # it is no model
        writer.add_string("general.type", "imatrix")
        writer.add_array("imatrix.datasets", matrix.datasets or ["unknown"])
        writer.add_uint32("imatrix.chunk_count", matrix.chunks)
        writer.add_uint32("imatrix.chunk_size", matrix.chunk_size)
        for key, value in (extra or {}).items():
            writer.add_string(key, value)
        for name in sorted(matrix.sums):
            writer.add_tensor(f"{name}.in_sum2", np.ascontiguousarray(matrix.sums[name], np.float32))
            writer.add_tensor(f"{name}.counts", np.ascontiguousarray(matrix.counts[name], np.float32)[:, None])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        try:
            check_gguf(temporary)
        except UserError as error:  # numpy's tofile does not say that the disk was full for the last bytes
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error


def read_imatrix(path: Path | str) -> Imatrix:
    """Read llama.cpp's importance matrix, the GGUF form or the older ``.dat``.

    Raises:
        UserError: the file is missing, damaged, no importance matrix, or holds a value that is no finite number ≥ 0.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError("there is no such importance matrix", where=str(path), hint="Make one: tsugiki quantize imatrix.")
    with path.open("rb") as file:
        new = file.read(4) == b"GGUF"
    matrix = _read_gguf(path) if new else _read_legacy(path)
    problems = [
        f"{name}: values that are no finite numbers ≥ 0"
        for name, sums in matrix.sums.items()
        if not (np.isfinite(sums).all() and (sums >= 0).all() and (matrix.counts[name] >= 0).all())
    ]
    raise_problems(problems, what=f"{path.name} cannot be used")
    return matrix


def _read_gguf(path: Path) -> Imatrix:
    check_gguf(path)
    try:
        reader = gguf.GGUFReader(path)
        tensors = {t.name: np.array(t.data) for t in reader.tensors}
        fields = {k: f.contents() for k, f in reader.fields.items() if k.startswith(("general.", "imatrix."))}
    except Exception as error:  # the reader raises whatever its numpy views raise
        raise UserError(f"not a readable GGUF file: {error}", where=str(path)) from error
    sums, counts = ({n.removesuffix(s): t for n, t in tensors.items() if n.endswith(s)} for s in (".in_sum2", ".counts"))
    if fields.get("general.type") != "imatrix" or not sums or set(sums) != set(counts):
        raise UserError(
            f"no importance matrix: general.type is {fields.get('general.type')!r}, {len(sums)} sums and {len(counts)} counts",
            where=str(path), hint="Give a file that tsugiki quantize imatrix or llama-imatrix wrote.",
        )
    if any(t.dtype != np.float32 or t.size % c.size for t, c in ((sums[n], counts[n]) for n in sums)):
        raise UserError("damaged: sums and counts are not float32 or do not fit each other", where=str(path))
    return Imatrix(
        {n: s.reshape(counts[n].size, -1) for n, s in sums.items()}, {n: c.ravel() for n, c in counts.items()},
        list(fields.get("imatrix.datasets", [])), int(fields.get("imatrix.chunk_count", 0)),
        int(fields.get("imatrix.chunk_size", CHUNK)),
    )


def _read_legacy(path: Path) -> Imatrix:
    """The older form: values are mean squares times the number of chunks."""
    data, at = path.read_bytes(), 0

    def take(n: int) -> bytes:
        nonlocal at
        if n < 0 or at + n > len(data):
            raise UserError("neither a GGUF nor an older importance matrix, or truncated", where=str(path))
        at += n
        return data[at - n : at]

    def number() -> int:
        return struct.unpack("<i", take(4))[0]

    sums, counts = {}, {}
    for _ in range(number()):
        name = take(number()).decode("utf-8", "replace")
        calls = number()
        sums[name] = np.frombuffer(take(4 * number()), np.float32)[None].copy()
        counts[name] = np.array([max(calls, 1)], np.float32)
    if not sums:
        raise UserError("it holds no entry", where=str(path))
    chunks, datasets = 0, []
    if at < len(data):
        chunks = number()
        datasets = [take(number()).decode("utf-8", "replace")]
    return Imatrix(sums, counts, datasets, chunks)


# --- what to compute it on ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """What one file holds: token ids of whole samples, or text."""

    path: Path
    samples: list[list[int]]
    text: str


def read_source(path: Path | str) -> Source:
    """Read ids or text from a file.

    A ``.jsonl`` row has ``prompt_ids`` and ``completion_ids`` (an encoded sample), ``ids``, ``text``, or ``prompt`` and
    ``completion`` (or ``question`` and ``answer``); any other file is plain UTF-8 text.

    Raises:
        UserError: the file is missing, empty, no UTF-8, or a row has none of these fields.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError("there is no such file", where=str(path))
    try:
        text = path.read_bytes().decode("utf-8")  # as it is: reading as text would turn \r\n into \n
    except UnicodeDecodeError as error:
        raise UserError(f"no UTF-8 text: {error.reason} at byte {error.start}", where=str(path)) from error
    samples, texts, problems = [], [], []
    if path.suffix == ".jsonl":
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                if "prompt_ids" in row or "ids" in row:
                    ids = row["ids"] if "ids" in row else row["prompt_ids"] + row["completion_ids"]
                    if not all(isinstance(i, int) for i in ids):
                        raise TypeError("an id that is no number")
                    samples.append(ids)
                elif "text" in row:
                    texts.append(str(row["text"]))
                else:
                    pair = ("prompt", "completion") if "prompt" in row else ("question", "answer")
                    texts.append("\n".join(str(row[k]) for k in pair))
            except (ValueError, KeyError, TypeError) as error:
                problems.append(f"line {number}: {type(error).__name__}: {error}")
        raise_problems(problems, what=str(path), hint="A row has prompt_ids and completion_ids, ids, text, or prompt and completion.")
        text = "\n\n".join(texts)
    if not text.strip() and not any(samples):
        raise UserError("the file is empty", where=str(path))
    return Source(path, [s for s in samples if s], "" if samples and not texts else text)


def chunks_of(source: Source, engine, tokens: int, size: int = CHUNK) -> list[list[int]]:
    """Up to ``tokens`` token ids of a source: whole samples in a fixed random order, then chunks of its text.

    Text is cut as llama-imatrix cuts it: ids of the whole text in pieces of ``size``, the first id of each replaced by
    BOS where the model wants one, a shorter rest left out (unless it is all there is).
    """
    found, count = [], 0
    for i in np.random.default_rng(0).permutation(len(source.samples)):
        if count >= tokens:
            return found
        found.append(source.samples[i])
        count += len(found[-1])
    if source.text and count < tokens:
        # no tokenizer packs more than about 12 characters into a token on average
        ids = engine.tokenize(source.text[: 12 * (tokens - count + size)], special=False, add_bos=True)
        bos = [engine.bos] if engine.tokenize("a", add_bos=True)[:1] == [engine.bos] else None
        ids = ids[: max(size, (tokens - count) // size * size)]
        for start in range(0, len(ids), size):
            piece = ids[start : start + size]
            if len(piece) == size or not found:
                found.append(bos + piece[1:] if bos else piece)
    return found


# --- collecting ---------------------------------------------------------------------------------------------------


class Collector:
    """Sums of squares of the inputs of matrix products, as llama.cpp computes them.

    Args:
        output: collect the output matrix too (``output.weight``, or the embedding that is also the output).
    """

    def __init__(self, *, output: bool = False):
        self.output = output
        self.sums: dict[str, np.ndarray] = {}  # float64 (experts, columns)
        self.counts: dict[str, np.ndarray] = {}

    def __call__(self, tensor, ask: bool) -> bool:
        from tsugiki.quantize.native import F32, base_name, operation, values

        kind = operation(tensor)
        if kind not in ("MUL_MAT", "MUL_MAT_ID"):
            return False
        matrix, inputs = tensor.src[0].contents, tensor.src[1].contents
        name = base_name(matrix.name)
        if ask:
            wanted = name.startswith("blk.") or (self.output and name in ("output.weight", "token_embd.weight"))
            return wanted and name.endswith(".weight") and inputs.type == F32
        x = values(inputs)
        experts, width = int(matrix.ne[2]), int(inputs.ne[0])
        sums = self.sums.setdefault(name, np.zeros((experts, width)))
        counts = self.counts.setdefault(name, np.zeros(experts))
        if kind == "MUL_MAT":
            # (ne3, ne2, tokens, columns): the activations of matrix ne2 of a three-dimensional weight, else of the only one
            squares = np.einsum("abij,abij->bj", x, x)
            if experts > 1:
                sums += squares
                counts += x.shape[0] * x.shape[2]
            else:
                sums[0] += squares.sum(axis=0)
                counts += x.shape[0] * x.shape[1] * x.shape[2]
            return True
        ids = values(tensor.src[2].contents, np.int32)[0, 0]  # (tokens, used)
        x = x[0]  # (tokens, used or 1, columns)
        for expert in np.unique(ids):
            token, slot = np.nonzero(ids == expert)
            rows = x[token, slot % x.shape[1]]
            sums[expert] += np.einsum("ij,ij->j", rows, rows)
            counts[expert] += len(rows)
        return True

    def matrix(self, datasets: Sequence[str], chunks: int, size: int) -> Imatrix:
        wrong = [name for name, s in self.sums.items() if not np.isfinite(s).all()]
        if wrong:
            raise UserError(f"the model computes values that are no finite numbers, first at {sorted(wrong)[0]}")
        return Imatrix({n: s.astype(np.float32) for n, s in self.sums.items()},
                       {n: c.astype(np.float32) for n, c in self.counts.items()}, list(datasets), chunks, size)


def make_imatrix(
    model: Path | str,
    out: Path | str,
    *,
    domain: Path | str | None = None,
    general: Iterable[Path | str] = (),
    ratio: float = 0.5,
    tokens: int = 32_768,
    chunk: int = CHUNK,
    output: bool = True,
    n_threads: int | None = None,
    n_gpu_layers: int = 0,
) -> Imatrix:
    """Collect an importance matrix from a GGUF; the file is whole or absent, and an interrupted run continues.

    Args:
        model: the F16, BF16 or F32 GGUF that levels are made from.
        domain: training data (:func:`read_source` says which forms).
        general: other texts; the tokens left are shared out evenly among them.
        ratio: share of the tokens that come from ``domain`` where both are given.
        tokens: how many in all; fewer where the files have fewer.
        chunk: tokens of a piece of text.
        output: include the output matrix, which llama-imatrix leaves out unless told (``--process-output``). For stock levels it
            makes no difference (tiny-llama, Q4_K_M: KL 0.00995 with, 0.00997 without); a repair may lower that matrix.

    Returns:
        What was written.

    Raises:
        UserError: unreadable input, ids outside the vocabulary, no text at all, or a model on which llama.cpp crashes.
    """
    model, out = Path(model), Path(out)
    sources = [Path(p) for p in general]
    if domain is None and not sources:
        raise UserError("no text to compute on", hint="Give domain data, general texts or both.")
    problems = [f"{n} must be {rule}, not {v}" for n, v, rule, ok in (
        ("ratio", ratio, "between 0 and 1", 0 <= ratio <= 1), ("tokens", tokens, "at least 16", tokens >= 16),
        ("chunk", chunk, "at least 16", chunk >= 16)) if not ok]
    raise_problems(problems, what="the importance matrix cannot be made")
    check_gguf(model)
    share = [0.0 if domain is None else float(ratio) if sources else 1.0]
    share += [(1 - share[0]) / len(sources)] * len(sources) if sources else []
    files = ([Path(domain)] if domain is not None else []) + sources
    wanted = [round(tokens * s) for s in (share if domain is not None else share[1:])]
    for file in files:
        read_source(file)  # before any model is loaded
    job = {"path": str(model), "files": [str(f) for f in files], "tokens": wanted, "chunk": chunk, "output": output,
           "threads": n_threads, "gpu": n_gpu_layers}
    job["digest"] = digest([job | {"threads": 0}, sha256_file(model), [sha256_file(f) for f in files]])
    partial = out.with_name(f".{out.name}.partial")
    with atomic_path(out) as temporary, progress() as bar:
        task = bar.add_task("importance matrix", total=sum(wanted), note="tokens")

        def show(message: dict) -> None:
            bar.update(task, completed=message["tokens"], total=message["total"])

        run_child("tsugiki.quantize.imatrix", job | {"out": str(temporary), "partial": str(partial)},
                  name="importance matrix", on_message=show)
        partial.unlink(missing_ok=True)
        matrix = read_imatrix(temporary)
    return matrix


def _work(job: dict) -> dict:
    from tsugiki.quantize.native import Probe, pack

    collector = Collector(output=job["output"])
    sources = [read_source(f) for f in job["files"]]
    longest = max((len(s) for source in sources for s in source.samples), default=0)
    with Engine(job["path"], n_ctx=256, n_seq_max=1) as engine:
        trained = int(engine.metadata.get(f"{engine.metadata['general.architecture']}.context_length", 1 << 30))
        size = min(job["chunk"], trained)
        chunks = [c for s, n in zip(sources, job["tokens"], strict=True) for c in chunks_of(s, engine, n, size)]
    if longest > trained:
        raise UserError(f"a sample has {longest} tokens, the model was trained for {trained}", where=job["path"])
    total, done = sum(map(len, chunks)), 0
    if total < 16:
        raise UserError(f"{total} tokens are too few for an importance matrix", where=", ".join(job["files"]))
    n_ctx = -(-max(min(4096, trained), longest, size) // 256) * 256
    with Probe(job["path"], watch=collector, n_ctx=n_ctx, n_threads=job["threads"], n_gpu_layers=job["gpu"]) as probe:
        partial, saved = Path(job["partial"]), time.monotonic()
        first = _resume(partial, job["digest"], collector)
        for number, group in enumerate(pack([len(c) for c in chunks], probe.SEQUENCES)):
            part = [chunks[i] for i in group]
            if number >= first:
                # every token is an output, else the last layer would skip most
                for _ in probe.decode(part, [[1] * len(c) for c in part]):
                    pass
            done += sum(map(len, part))
            say(tokens=done, total=total)
            if number >= first and time.monotonic() - saved > SAVE_EVERY:
                write_imatrix(partial, collector.matrix([], 0, size),
                              extra={"tsugiki.digest": job["digest"], "tsugiki.groups": str(number + 1)})
                saved = time.monotonic()
    names = [Path(f).name for f in job["files"]]
    write_imatrix(job["out"], collector.matrix(names, max(1, total // size), size))
    return {"tokens": total}


def _resume(partial: Path, wanted: str, collector: Collector) -> int:
    """Groups that an interrupted run of the same job has done; their sums go into the collector."""
    if not partial.exists():
        return 0
    try:
        check_gguf(partial)
        found = {k: f.contents() for k, f in gguf.GGUFReader(partial).fields.items() if k.startswith("tsugiki.")}
        if found.get("tsugiki.digest") != wanted:
            return 0
        matrix = read_imatrix(partial)
    except (UserError, ValueError):
        return 0
    collector.sums.update({n: s.astype(np.float64) for n, s in matrix.sums.items()})
    collector.counts.update({n: c.astype(np.float64) for n, c in matrix.counts.items()})
    return int(found["tsugiki.groups"])


if __name__ == "__main__":
    serve(_work)
