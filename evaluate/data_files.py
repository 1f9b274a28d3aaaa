"""Readers of the benchmarks' files as their publishers give them: ``(path) -> rows``, columns as on the hub."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from xml.etree import ElementTree

from tsugiki.errors import UserError, raise_problems

Row = dict[str, object]


def read_lines(path: Path) -> list[Row]:
    """JSON Lines, plain or gzipped."""
    opener = gzip.open if path.suffix == ".gz" else open
    rows = []
    with opener(path, "rt", encoding="utf-8-sig") as file:
        for i, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"not JSON: {error}", where=f"{path}:{i}") from error
            if not isinstance(row, dict):
                raise UserError(f"an object was expected, {type(row).__name__} found", where=f"{path}:{i}")
            rows.append(row)
    return rows


def read_json(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise UserError(f"not JSON: {error}", where=str(path)) from error


def rows_of(value: object, path: Path, key: str | None = None) -> list[Row]:
    """The list of objects that ``value`` is, or holds under ``key``."""
    found = value.get(key) if key and isinstance(value, dict) else value
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise UserError("a list of objects was expected" + (f" under {key!r}" if key else ""), where=str(path))
    return found


def read_mgsm_tsv(path: Path) -> list[Row]:
    """``question TAB answer`` without a header; thousands separators leave the answer."""
    language = path.stem.removeprefix("mgsm_")
    rows = []
    for i, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        question, tab, answer = line.rstrip("\r").partition("\t")
        number = answer.strip().replace(",", "")
        if not tab or not re.fullmatch(r"-?\d+", number):
            raise UserError("question, a tab and a whole number were expected", where=f"{path}:{i}")
        rows.append({"language": language, "question": question, "answer": None, "answer_number": int(number)})
    return rows


def read_mgsm_exemplars(path: Path) -> list[Row]:
    """The eight worked examples of each language, in their order; the prefixes stay in ``question`` and ``answer``."""
    rows = []
    exemplars = read_json(path)
    for language, shots in exemplars.items() if isinstance(exemplars, dict) else ():
        for key in sorted(shots, key=int):
            row = {"language": language, "question": shots[key]["q"], "answer": shots[key]["a"], "answer_number": None}
            rows.append(row)
    return rows


def read_mgsm(path: Path) -> list[Row]:
    return read_mgsm_exemplars(path) if path.suffix == ".json" else read_mgsm_tsv(path)


JMMLU_COLUMNS = ("question", "A", "B", "C", "D", "answer")


def jmmlu_rows(text: str, subject: str, where: str) -> list[Row]:
    """Rows of one JMMLU file: ``question, A, B, C, D, answer``, with or without a header row.

    Cells hold line breaks (CR alone too) and quotes; the byte-order mark is the caller's to drop.
    """
    rows = []
    for i, cells in enumerate(csv.reader(io.StringIO(text, newline=""))):
        if not cells or (i == 0 and cells[-1].strip().lower() == "answer"):
            continue
        if len(cells) != 6 or cells[5].strip() not in ("A", "B", "C", "D"):
            raise UserError(f"six cells ending in A–D were expected, found {len(cells)}", where=f"{where} (row {i + 1})")
        rows.append({"subject": subject, **dict(zip(JMMLU_COLUMNS, [*cells[:5], cells[5].strip()], strict=True))})
    return rows


def read_jmmlu(path: Path) -> list[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return jmmlu_rows(file.read(), path.stem, str(path))


def read_niilc(path: Path) -> list[Row]:
    """Questions of the XML; ``D_3`` is the list of uniqueness labels, as in ``sbintuitions/niilc-qa``."""
    try:
        root = ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        raise UserError(f"not XML: {error}", where=str(path)) from error
    return [
        {
            "id": question.get("id"),
            "text": question.findtext("text") or "",
            "answers": [answer.text for answer in question.findall("answers/answer") if answer.text is not None],
            "D_3": [label for label in (question.findtext("meta/D.3") or "").split(";") if label],
        }
        for question in root.findall("question")
    ]


def read_jsquad(path: Path) -> list[Row]:
    """SQuAD 1.1 JSON, one row a question, in the hub's columns."""
    rows = []
    for article in rows_of(read_json(path), path, "data"):
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                answers = {
                    "text": [a["text"] for a in qa["answers"]],
                    "answer_start": [a["answer_start"] for a in qa["answers"]],
                }
                rows.append({"id": qa["id"], "title": article["title"], "context": paragraph["context"],
                             "question": qa["question"], "answers": answers})  # fmt: skip
    return rows


def read_jemhopqa(path: Path) -> list[Row]:
    return rows_of(read_json(path), path)


def read_bbh(path: Path) -> list[Row]:
    if path.suffix == ".txt":  # the first two lines are a canary and a rule, not part of the prompt
        return [{"subtask": path.stem, "input": "", "target": path.read_text(encoding="utf-8").split("\n", 2)[2]}]
    return [{"subtask": path.stem, **row} for row in rows_of(read_json(path), path, "examples")]


def read_xwinograd(path: Path) -> list[Row]:
    """The TSV in the hub's columns: the sentence with ``_`` for the pronoun, two options, ``"1"`` or ``"2"``."""
    rows = []
    for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        cells = line.split("\t")
        if len(cells) != 7:
            raise UserError(f"seven cells were expected, found {len(cells)}", where=f"{path}:{i}")
        text, tokens, pronoun, candidates = cells[3], *map(json.loads, cells[4:])
        first, last = pronoun[1]
        at = 0
        for token in tokens[:first]:  # some tokens were normalised and are not in the text: those are stepped over
            found = text.find(token, at)
            at = found + len(token) if found >= 0 else at
        start = text.find(tokens[first], at)
        end = start + len(tokens[first])
        for token in tokens[first + 1 : last]:
            end = text.find(token, end) + len(token)
        if start < 0 or len(candidates) != 2:
            raise UserError(f"the pronoun {pronoun[0]!r} is not in the sentence", where=f"{path}:{i}")
        rows.append({"language": cells[0], "sentence": text[:start] + "_" + text[end:], "option1": candidates[0][0],
                     "option2": candidates[1][0], "answer": "1" if candidates[0][-1] else "2"})  # fmt: skip
    return rows


def read_lawqa(path: Path) -> list[Row]:
    return rows_of(read_json(path), path, "samples")


def read_wmt20(path: Path) -> list[Row]:
    """A sacrebleu source file with its reference beside it (``….src``, ``….ref``)."""
    pair = path.name.split(".")[1]
    beside = path.with_suffix(".ref")
    if not beside.is_file():
        raise UserError("the reference file is missing", where=str(beside))
    sources, references = (p.read_text(encoding="utf-8").rstrip("\n").split("\n") for p in (path, beside))
    if len(sources) != len(references):
        raise UserError(f"{len(sources)} source lines, {len(references)} reference lines", where=str(path))
    return [{"pair": pair, "source": s, "reference": r} for s, r in zip(sources, references, strict=True)]



def jmmlu_zip_rows(archive: Path, subjects: Iterable[str]) -> list[Row]:
    """The subjects' test rows of the hub's JMMLU.zip, read inside the archive: nothing is unpacked.

    Raises:
        UserError: a subject is not in the archive, or a row is malformed.
    """
    rows = []
    with zipfile.ZipFile(archive) as file:
        names = {Path(n).stem: n for n in file.namelist() if n.endswith(".csv") and Path(n).parent.name == "test"}
        subjects = list(subjects)
        raise_problems([s for s in subjects if s not in names], what="Subjects that are not in the archive")
        for subject in subjects:
            rows += jmmlu_rows(file.read(names[subject]).decode("utf-8-sig"), subject, f"{archive}:{names[subject]}")
    return rows
