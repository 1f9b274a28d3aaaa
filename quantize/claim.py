"""A published claim about a level, measured again from the base itself: conversion, proof, levels and check in one go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tsugiki.artifacts import write_json
from tsugiki.quantize.convert import convert
from tsugiki.quantize.gate import GateSettings, check_gate, gate, read_texts
from tsugiki.quantize.levels import file_type, make_level
from tsugiki.quantize.standalone import CheckFiles, check_files, make_folder


def measure_claim(
    base_dir: Path,
    samples: Path,
    out: Path,
    *,
    adapter: Path | None = None,
    levels: Sequence[str] = ("Q4_K_M",),
    imatrix: Path | None = None,
    told: Mapping[str, object] | None = None,
    items: int | None = None,
    scoring: str = "exact_match",
    max_new_tokens: int = 64,
) -> tuple[dict, dict]:
    """Convert a base, prove that the file is the same model, make levels of it and check them.

    Args:
        base_dir: Hugging Face folder with a chat template.
        samples: questions (:func:`tsugiki.quantize.windows.read_questions`).
        out: folder for the files (``model-F16.gguf``, one a level), ``parity.json`` and ``check.json``.
        imatrix: importance matrix for the levels; published claims are about levels without one.
        told: metadata for :func:`~tsugiki.quantize.convert.convert`.
        items: at most so many questions.

    Returns:
        What :func:`~tsugiki.quantize.gate.gate` and :func:`~tsugiki.quantize.standalone.check_files` return.

    Raises:
        UserError: an unknown level, a base or samples that cannot be read, a file that does not pass the gate.
    """
    for level in levels:
        file_type(level)
    texts = read_texts(samples)
    make_folder(out)
    f16 = out / "model-F16.gguf"
    convert(base_dir, f16, adapter, **(told or {}))
    # differences with a known reason are counted, not refused: ids are compared, not text
    proof = gate(f16, base_dir, adapter, texts=texts[:400], settings=GateSettings(max_explained=1.0))
    write_json(out / "parity.json", proof)
    check_gate(proof)
    files = tuple(out / f"model-{level}.gguf" for level in levels)
    for level, path in zip(levels, files, strict=True):
        make_level(f16, level, path, imatrix=imatrix)
    job = CheckFiles(reference=f16, levels=files, samples=samples, items=items, scoring=scoring, max_new_tokens=max_new_tokens)
    return proof, check_files(job, out)
