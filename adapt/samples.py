"""Samples: read and validate rows, split them by source document, drop what leaks, order them for nested subsets."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import math
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from tsugiki.errors import UserError, raise_problems
from tsugiki.samples import EncodedSample, Sample

SPLITS = ("train", "valid", "test")
_SPLIT_NAMES = {"train": "train", "valid": "valid", "validation": "valid", "val": "valid", "dev": "valid", "test": "test"}
_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz")


@dataclass(frozen=True)
class FieldMapping:
    """Which field of a row is what.

    Attributes:
        prompt: the question.
        completion: the answer.
        document: the source document, the group that splits go by (absent: rows with one question are one document).
        id: unique in the data set (absent: a hash of the question and the answer).
        kind: items of one kind are also scored apart.
        split: ``train``, ``valid`` (``validation``, ``val``, ``dev``) or ``test``; it wins over our own split.
    """

    prompt: str = "prompt"
    completion: str = "completion"
    document: str | None = None
    id: str | None = None
    kind: str | None = None
    split: str | None = None


@dataclass(frozen=True)
class Row:
    """A validated sample, the split that its data set gives it (if any), and where it was read."""

    sample: Sample
    split: str | None
    where: str


@dataclass(frozen=True)
class NearDuplicates:
    """Two texts are near-duplicates where their sets of character n-grams have a Jaccard index ≥ ``threshold``."""

    threshold: float = 0.9
    ngram: int = 10


@dataclass
class Splits:
    """The three splits, each in hash order (a prefix is a nested subset), and what was dropped, by reason."""

    train: list[Sample]
    valid: list[Sample]
    test: list[Sample]
    dropped: dict[str, int] = field(default_factory=dict)


def normalise(text: str) -> str:
    """The form in which texts are compared, never the form in which they are learnt: NFKC, runs of whitespace as one."""
    return " ".join(unicodedata.normalize("NFKC", text).split())


# --- reading -----------------------------------------------------------------------------------------------------


def read_rows(path: Path | str) -> list[tuple[str, dict[str, Any]]]:
    """Rows of a ``.jsonl``, ``.json`` (one list) or ``.csv`` file (each also ``.gz``) as (``file:line``, row).

    Raises:
        UserError: no such file, an unknown kind of file, or a list of everything unreadable in it, by line.
    """
    path = Path(path)
    problems: list[str] = []
    rows = list(_parse(path, problems))
    raise_problems(problems, what=f"{path.name} cannot be read", hint=_ENCODING_HINT if _is_encoding(problems) else None)
    if not rows:
        raise UserError("the file holds no rows", where=path.name)
    return rows


_ENCODING_HINT = "Save the file as UTF-8 (in Excel: “CSV UTF-8”); Shift_JIS can be converted with `iconv -f CP932 -t UTF-8`."


def _is_encoding(problems: list[str]) -> bool:
    return any("not UTF-8" in p for p in problems)


def _parse(path: Path, problems: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    name = path.name
    suffix = next((s for s in sorted(_SUFFIXES, key=len, reverse=True) if name.lower().endswith(s)), None)
    if suffix is None:
        raise UserError(f"{path.suffix or 'no'} suffix is not one of {', '.join(_SUFFIXES)}", where=name)
    if not path.is_file():
        raise UserError("there is no such file", where=str(path))
    try:
        data = gzip.decompress(path.read_bytes()) if suffix.endswith(".gz") else path.read_bytes()
    except (OSError, EOFError) as error:
        raise UserError(f"cannot be decompressed: {error}", where=name) from error
    data = data.removeprefix(b"\xef\xbb\xbf")
    if suffix.startswith(".jsonl"):
        yield from _parse_jsonl(name, data, problems)
        return
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        problems.append(f"{name}:{line}: not UTF-8 (byte 0x{data[error.start]:02x})")
        return
    yield from (_parse_json if suffix.startswith(".json") else _parse_csv)(name, text, problems)


def _parse_jsonl(name: str, data: bytes, problems: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, raw in enumerate(data.split(b"\n"), start=1):
        where = f"{name}:{number}"
        try:
            line = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            problems.append(f"{where}: not UTF-8 (byte 0x{raw[error.start]:02x} at byte {error.start + 1})")
            continue
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            problems.append(f"{where}: not JSON ({error})")
            continue
        if not isinstance(row, dict):
            problems.append(f"{where}: a JSON object is needed, not {_kind_of(row)}")
            continue
        yield where, row


def _parse_json(name: str, text: str, problems: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        rows = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        problems.append(f"{name}:{line}: not JSON ({error})")
        return
    if not isinstance(rows, list):
        problems.append(f"{name}:1: one list of objects is needed, not {_kind_of(rows)}")
        return
    for number, row in enumerate(rows, start=1):
        where = f"{name}:item {number}"
        if isinstance(row, dict):
            yield where, row
        else:
            problems.append(f"{where}: a JSON object is needed, not {_kind_of(row)}")


def _parse_csv(name: str, text: str, problems: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    while True:
        where = f"{name}:{reader.line_num + 1}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            problems.append(f"{where}: not CSV ({error})")
            return
        if not cells:
            continue
        if header is None:
            header = [c.strip() for c in cells]
            twice = [c for c, n in Counter(header).items() if n > 1]
            if twice:
                problems.append(f"{where}: column {twice[0]!r} is there {header.count(twice[0])} times")
                return
        elif len(cells) != len(header):
            problems.append(f"{where}: {len(cells)} cells, but the header has {len(header)}")
        else:
            yield where, dict(zip(header, cells, strict=True))


def _kind_of(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true/false", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


# --- validating --------------------------------------------------------------------------------------------------


def read_samples(
    path: Path | str, fields: FieldMapping | None = None, *, split: str | None = None, max_chars: int = 20_000
) -> list[Row]:
    """Read one data file and validate every row of it.

    Args:
        split: the split that the whole file is (it wins over a split field).
        max_chars: the most characters that a question or an answer may have.

    Raises:
        UserError: every problem found, each as ``file:line (field): …``.
    """
    return validate_rows(read_rows(path), fields, name=Path(path).name, split=split, max_chars=max_chars)


def validate_rows(
    rows: Iterable[tuple[str, dict[str, Any]]],
    fields: FieldMapping | None = None,
    *,
    name: str = "rows",
    split: str | None = None,
    max_chars: int = 20_000,
) -> list[Row]:
    """Turn (where, row) pairs into validated :class:`Row`; see :func:`read_samples`."""
    fields = fields or FieldMapping()
    problems: list[str] = []
    good: list[Row] = []
    seen_ids: dict[str, str] = {}
    for where, row in rows:
        before = len(problems)
        prompt = _text(row, fields.prompt, where, problems, max_chars)
        completion = _text(row, fields.completion, where, problems, max_chars)
        document = _label(row, fields.document, where, problems)
        identity = _label(row, fields.id, where, problems)
        kind = _label(row, fields.kind, where, problems)
        own_split = split
        if split is None and fields.split is not None:
            label = _label(row, fields.split, where, problems)
            own_split = _SPLIT_NAMES.get((label or "").lower())
            if label and own_split is None:
                problems.append(f"{where} ({fields.split}): {label!r} is not one of {', '.join(_SPLIT_NAMES)}")
        if identity is not None:
            if identity in seen_ids:
                problems.append(f"{where} ({fields.id}): id {identity!r} is already at {seen_ids[identity]}")
            seen_ids.setdefault(identity, where)
        if len(problems) > before:
            continue
        sample = Sample(
            id=identity or _sha(prompt, completion)[:16],
            prompt=prompt,
            completion=completion,
            # Rows that ask the same thing must not be torn apart by the split.
            document=document or f"prompt-{_sha(normalise(prompt))[:16]}",
            kind=kind or "",
        )
        good.append(Row(sample, own_split, where))
    raise_problems(problems, what=f"{name} has rows that cannot be used", hint="Correct or remove these rows.")
    return good


def _text(row: dict, key: str, where: str, problems: list[str], max_chars: int) -> str:
    if key not in row:
        have = ", ".join(map(str, row)) or "none"
        problems.append(f"{where} ({key}): the field is missing (fields: {have})")
        return ""
    value = row[key]
    at = f"{where} ({key})"
    if not isinstance(value, str):
        problems.append(f"{at}: text is needed, not {_kind_of(value)}")
    elif not value.strip():
        problems.append(f"{at}: empty")
    elif len(value) > max_chars:
        problems.append(f"{at}: {len(value):,} characters, but at most {max_chars:,} are allowed")
    elif "\ufffd" in value:
        problems.append(f"{at}: holds U+FFFD, the mark of a character lost in an earlier conversion")
    elif any("\ud800" <= c <= "\udfff" for c in value):
        problems.append(f"{at}: holds half of a surrogate pair, which is no character")
    else:
        return value
    return ""


def _label(row: dict, key: str | None, where: str, problems: list[str]) -> str | None:
    """An identifier: text or a whole number; ``None`` when the mapping has no such field."""
    if key is None:
        return None
    value = row.get(key)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if isinstance(value, str) and value.strip():
        return value
    what = "the field is missing" if key not in row else "empty" if value == "" else f"text is needed, not {_kind_of(value)}"
    problems.append(f"{where} ({key}): {what}")
    return None


# --- splitting ---------------------------------------------------------------------------------------------------


def _sha(*parts: str) -> str:
    return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()


def _share(salt: str, document: str) -> float:
    """A number in [0, 1) that depends on the document (and the salt) alone."""
    return int(_sha(salt, document)[:13], 16) / 16**13


def split_by_document(
    samples: Iterable[Sample], *, salt: str = "tsugiki", valid_share: float = 0.1, test_share: float = 0.1
) -> dict[str, list[Sample]]:
    """Split samples so that a source document is in one split only.

    A document's place depends on its own SHA-256 and the salt, so that added documents move no others.
    """
    splits: dict[str, list[Sample]] = {name: [] for name in SPLITS}
    for sample in samples:
        place = _share(salt, sample.document)
        name = "test" if place < test_share else "valid" if place < test_share + valid_share else "train"
        splits[name].append(sample)
    return splits


def nested_order(samples: Iterable[Sample]) -> list[Sample]:
    """Samples by SHA-256 of their id: the first n are the n-sample subset, and 1,000 ⊂ 2,000 ⊂ 3,000."""
    return sorted(samples, key=lambda s: (_sha(s.id), s.id))


def make_splits(
    rows: Sequence[Row],
    *,
    salt: str = "tsugiki",
    valid_share: float = 0.1,
    test_share: float = 0.1,
    near: NearDuplicates | None = NearDuplicates(),
    name: str = "the data",
) -> Splits:
    """Rows to three splits without leaks: the data's own splits where it has them, else by source document.

    A data set that gives only some splits keeps those, and the missing ones are taken from its training documents.

    Raises:
        UserError: some rows name a split and some do not, or a split ends up empty.
    """
    named = [r for r in rows if r.split is not None]
    if named and len(named) < len(rows):
        first = next(r for r in rows if r.split is None)
        raise UserError(f"{len(named):,} of {len(rows):,} rows name a split; all or none must", where=first.where)
    splits: dict[str, list[Sample]] = {s: [r.sample for r in rows if r.split == s] for s in SPLITS}
    unplaced = splits["train"] if named else [r.sample for r in rows]
    cut = split_by_document(
        unplaced,
        salt=salt,
        valid_share=0 if splits["valid"] else valid_share,
        test_share=0 if splits["test"] else test_share,
    )
    splits = {"train": cut["train"], "valid": splits["valid"] or cut["valid"], "test": splits["test"] or cut["test"]}
    result = drop_duplicates({s: nested_order(v) for s, v in splits.items()}, near)
    for split in SPLITS:
        if not getattr(result, split):
            documents = len({r.sample.document for r in rows})
            raise UserError(
                f"the {split} split is empty: {len(rows):,} rows from {documents:,} documents, dropped {result.dropped}",
                where=name,
                hint="Add data, name a finer document field, or give each row its split (train, valid, test).",
            )
    return result


# --- duplicates --------------------------------------------------------------------------------------------------


def drop_duplicates(splits: dict[str, list[Sample]], near: NearDuplicates | None) -> Splits:
    """Drop exact duplicates everywhere and near-duplicates across splits; count them by reason.

    Exact means the same question and answer after :func:`normalise`. The first of a split stays; test keeps its item
    against valid and train, valid keeps its item against train. ``near=None`` looks for exact ones only.
    """
    dropped: Counter[str] = Counter()
    seen: dict[tuple[str, str], str] = {}
    kept: dict[str, list[Sample]] = {}
    for split in reversed(SPLITS):
        kept[split] = []
        for sample in splits[split]:
            key = (normalise(sample.prompt), normalise(sample.completion))
            if key in seen:
                other = seen[key]
                dropped[f"{split}: exact duplicate" + ("" if other == split else f" of a {other} item")] += 1
                continue
            seen[key] = split
            kept[split].append(sample)
    if near is not None:
        texts = {split: [_compared(s) for s in kept[split]] for split in SPLITS}
        for split, others in (("valid", ("test",)), ("train", ("test", "valid"))):
            bad: dict[int, str] = {}
            for other in others:
                for mine, _ in near_pairs(texts[split], texts[other], near):
                    bad.setdefault(mine, other)
            for other in bad.values():
                dropped[f"{split}: near-duplicate of a {other} item"] += 1
            for values in (kept, texts):
                values[split] = [v for i, v in enumerate(values[split]) if i not in bad]
    return Splits(kept["train"], kept["valid"], kept["test"], dict(sorted(dropped.items())))


def _compared(sample: Sample) -> str:
    return f"{normalise(sample.prompt)}\n{normalise(sample.completion)}"


def near_pairs(
    left: Sequence[str], right: Sequence[str] | None, near: NearDuplicates
) -> list[tuple[int, int]]:
    """All pairs (i, j) of texts whose n-gram sets have Jaccard index ≥ the threshold; ``right=None``: i < j in left.

    Exact, by prefix filtering (Chaudhuri, Ganti and Kaushik 2006; Bayardo, Ma and Srikant 2007): order every set by
    one global order, rarest first; two sets that are similar enough then share a gram among the first
    ``|x| - ceil(t·|x|) + 1`` of each. Only pairs that do are compared.
    """
    if not 0 < near.threshold <= 1 or near.ngram < 1:
        raise UserError(f"near-duplicates need 0 < threshold ≤ 1 and ngram ≥ 1, not {near.threshold} and {near.ngram}")
    texts = [*left, *(right or [])]
    if not left or not texts or right == []:
        return []
    sets = [character_ngrams(t, near.ngram) for t in texts]
    sizes = np.array([len(s) for s in sets])
    vocabulary, ids, counts = np.unique(np.concatenate(sets), return_inverse=True, return_counts=True)
    order = np.empty(len(vocabulary), dtype=np.int64)
    order[np.argsort(counts, kind="stable")] = np.arange(len(vocabulary))
    ranked = [np.sort(r) for r in np.split(order[ids], np.cumsum(sizes)[:-1])]
    # The tolerance keeps a product such as 0.9 · 10 = 9.000000000000002 from shortening a prefix.
    prefixes = [r[: len(r) - math.ceil(near.threshold * len(r) - 1e-9) + 1] for r in ranked]
    lengths = np.array([len(p) for p in prefixes])
    matrix = csr_matrix(
        (np.ones(lengths.sum(), dtype=np.int32), np.concatenate(prefixes), np.concatenate([[0], np.cumsum(lengths)])),
        shape=(len(texts), len(vocabulary)),
    )
    start = 0 if right is None else len(left)
    candidates = matrix[start:].T.tocsr()
    pairs = []
    for begin in range(0, len(left), 2048):
        found = (matrix[begin : min(begin + 2048, len(left))] @ candidates).tocoo()
        for i, j in zip((found.row + begin).tolist(), found.col.tolist(), strict=True):
            if right is None and i >= j:
                continue
            a, b = ranked[i], ranked[start + j]
            small, large = sorted((len(a), len(b)))
            if small < near.threshold * large - 1e-9:
                continue
            shared = len(np.intersect1d(a, b, assume_unique=True))
            if shared >= near.threshold * (len(a) + len(b) - shared) - 1e-9:
                pairs.append((i, j))
    return sorted(pairs)


def character_ngrams(text: str, n: int) -> np.ndarray:
    """The set of a text's character n-grams as sorted 64-bit hashes; a shorter text is one gram of its own."""
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)
    width = max(1, min(n, len(points)))
    if not len(points):
        return np.zeros(1, dtype=np.uint64)
    value = np.full(len(points) - width + 1, width, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for k in range(width):
            value = (value ^ points[k : len(points) - width + 1 + k]) * np.uint64(0x9E3779B97F4A7C15)
            value ^= value >> np.uint64(29)
    return np.unique(value)


# --- lengths in tokens -------------------------------------------------------------------------------------------


def drop_long(
    samples: Sequence[EncodedSample], max_tokens: int, *, split: str = "train", most: float = 0.05
) -> tuple[list[EncodedSample], dict[str, int]]:
    """Drop encoded samples of more than ``max_tokens`` (question and answer together); nothing is ever truncated.

    Returns:
        The samples that fit, in their order, and ``{reason: count}`` to add to ``Splits.dropped`` (empty: none).

    Raises:
        UserError: more than ``most`` of them are too long.
    """
    kept = [s for s in samples if len(s.prompt_ids) + len(s.completion_ids) <= max_tokens]
    lost = len(samples) - len(kept)
    if lost > most * len(samples):
        longest = max(samples, key=lambda s: len(s.ids))
        raise UserError(
            f"{lost:,} of {len(samples):,} {split} samples ({lost / len(samples):.1%}) are longer than {max_tokens:,} "
            f"tokens; at most {most:.0%} may be dropped. The longest, {longest.id}, has {len(longest.ids):,}",
            hint=f"Raise max_tokens (for all: {len(longest.ids):,}), or shorten or divide the long samples.",
        )
    return kept, {f"{split}: longer than {max_tokens} tokens": lost} if lost else {}
