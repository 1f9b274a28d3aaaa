"""The check and the profile from files alone, without a recipe: what to read, what to measure, one JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tsugiki.artifacts import sha256_file, write_json
from tsugiki.errors import UserError, raise_problems
from tsugiki.quantize.check import cache_probe, check, encode_sets
from tsugiki.quantize.profile import file_profile, level_name, read_header
from tsugiki.quantize.verdict import REFERENCE, CheckSettings
from tsugiki.quantize.windows import WINDOW, read_questions, text_files


@dataclass(frozen=True)
class CheckFiles:
    """What a check from files reads.

    Attributes:
        reference, levels: GGUF files.
        samples: questions (:func:`tsugiki.quantize.windows.read_questions`), or ``None``.
        texts: ``NAME=PATH`` or ``PATH`` of plain text.
        model, adapter: Hugging Face folder and PEFT folder for the attribution; without a model there is none.
        items, windows: at most so many questions, and windows of each text.
        window: tokens of a window.
        cache: measure quantized cache types on the recommended file; always done where key biases stand out.
        memory: bytes that the comparison may take.
        margins: ``margin_nll`` and ``margin_score`` where they are not the defaults.
    """

    reference: Path
    levels: tuple[Path, ...]
    samples: Path | None = None
    texts: tuple[str, ...] = ()
    model: Path | None = None
    adapter: Path | None = None
    scoring: str = "exact_match"
    max_new_tokens: int = 64
    items: int | None = None
    windows: int | None = None
    window: int = WINDOW
    cache: bool = False
    memory: int | None = None
    margins: dict[str, float] = field(default_factory=dict)


def check_files(job: CheckFiles, out: Path | None = None) -> dict:
    """Check levels against their reference; with ``out`` also write ``out/check.json``.

    Returns:
        What :func:`tsugiki.quantize.check.check` returns, and ``files`` (name to ``path``, ``sha256``), ``profile`` of
        the reference, ``attribution`` (:func:`tsugiki.quantize.attribution.attribute`) and ``cache``
        (:func:`tsugiki.quantize.check.cache_probe`, with the ``file`` it is of), ``None`` where not asked for.

    Raises:
        UserError: every file that is missing or broken, nothing to read, or no room for the result.
    """
    try:
        result = _check_files(job, out)
    except OSError as error:
        raise UserError(f"{error.strerror or error}", where=error.filename and str(error.filename),
                        hint="Free some space for temporary files (TMPDIR); nothing was left behind.") from error
    if out:
        save(out / "check.json", result)
    return result


def _check_files(job: CheckFiles, out: Path | None) -> dict:
    settings = CheckSettings(**job.margins)
    problems = []
    for path in (job.reference, *job.levels):
        try:
            read_header(path)
        except UserError as error:
            problems.append(f"{error.where}: {error.message}")
    if not job.levels:
        problems.append("no level: name at least one .gguf after the reference")
    if job.samples is None and not job.texts:
        problems.append("nothing to read: give --samples or --text")
    if job.adapter and not job.model:
        problems.append("an adapter without its base: give --model too")
    for path in (job.samples,) if job.samples else ():
        if not path.is_file():
            problems.append(f"{path}: there is no such file")
    raise_problems(problems, what="the check cannot start")
    if out:
        make_folder(out)
    questions = read_questions(job.samples)[: job.items] if job.samples else []
    sets, end_of_turn = encode_sets(job.reference, text_files(job.texts), questions, window=job.window, most=job.windows)
    samples = sets.pop("domain", [])
    given = questions and "prompt_ids" in questions[0]  # ids end with the end-of-turn token of whoever made them
    files = _names(job.levels, job.reference)
    pool = ThreadPoolExecutor(1)  # hashing lets go of the interpreter's lock: it is done while the files are opened
    hashes = {path: pool.submit(sha256_file, path) for path in dict.fromkeys((job.reference, *files.values()))}
    try:
        result = check(
            job.reference, files, samples, texts=sets, settings=settings, scoring=job.scoring,
            max_new_tokens=job.max_new_tokens, end_of_turn=None if given else end_of_turn, memory=job.memory,
        )
        files = {result["levels"][0]["level"]: job.reference, **files}
        result["files"] = {name: {"path": str(p), "sha256": hashes[p].result()} for name, p in files.items()}
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    profile = file_profile(job.reference)
    result["profile"] = profile.as_dict()
    rows = samples or next(iter(sets.values()))  # the domain, else the first text
    result["attribution"] = result["cache"] = None
    if job.model:
        from tsugiki.quantize.attribution import attribute

        result["attribution"] = attribute(job.model, job.adapter, files, rows, settings=settings)
    if job.cache or profile.outlying:
        name = result["recommended"]["level"]
        result["cache"] = {"file": str(files[name]), "rows": cache_probe(files[name], next(iter(sets.values()), samples))}
    return result


def profile_file(path: Path, texts: Sequence[str] = (), *, windows: int | None = None, out: Path | None = None) -> dict:
    """Profile of a file, and, with texts, quantized cache types measured on their windows.

    Returns:
        :class:`~tsugiki.quantize.profile.FileProfile` as a dictionary, with ``file`` and ``cache`` (rows of
        :func:`~tsugiki.quantize.check.cache_probe`, or ``None``).
    """
    found = {"file": str(path), **file_profile(path).as_dict(), "cache": None}
    if texts:
        sets, _ = encode_sets(path, text_files(texts), most=windows)
        found["cache"] = cache_probe(path, [w for rows in sets.values() for w in rows])
    if out:
        make_folder(out.parent)
        save(out, found)
    return found


def make_folder(path: Path) -> None:
    """Make a folder for results before hours are spent on them.

    Raises:
        UserError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder cannot be made: {error.strerror}", where=str(path)) from error


def save(path: Path, value: dict) -> None:
    """Write JSON whole or not at all.

    Raises:
        UserError: the disk is full, or the place cannot be written to.
    """
    try:
        write_json(path, value)
    except OSError as error:
        raise UserError(f"the result cannot be written: {error.strerror}", where=str(path),
                        hint="Free some space, or give another folder; nothing was left behind.") from error


def _names(levels: Sequence[Path], reference: Path) -> dict[str, Path]:
    """Levels by what the files call themselves (Q4_K_M), by their file names where that is not unique."""
    named = [level_name(p) for p in levels]
    count = Counter(named)
    names = [p.stem if count[n] > 1 or n in (REFERENCE, level_name(reference)) else n for n, p in zip(named, levels, strict=True)]
    if len(set(names)) < len(names):
        names = [str(p) for p in levels]
    if len(set(names)) < len(names):
        raise UserError("the same level is named twice", where=str(levels[names.index(Counter(names).most_common(1)[0][0])]))
    return dict(zip(names, levels, strict=True))
