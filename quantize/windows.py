"""What a check reads: plain text cut into windows as llama-perplexity cuts it, and questions in the file's own template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import llama_cpp

from tsugiki.errors import UserError, raise_problems
from tsugiki.evaluate.chat import render
from tsugiki.evaluate.engine import Engine
from tsugiki.intervals import MIN_CLUSTERS
from tsugiki.samples import EncodedSample

WINDOW = 512  # tokens; llama-perplexity's default


def cut(ids: Sequence[int], *, window: int = WINDOW, bos: int | None, name: str = "", document: str | None = None) -> list[EncodedSample]:
    """Windows of ``window`` tokens side by side, the second half of each scored: llama-perplexity's definition.

    The first token of each window becomes BOS where the file wants one. Scored are the tokens at the positions
    ``window / 2 + 1`` to ``window − 1``, each predicted from all before it in its window; a rest that fills no
    window is dropped. Without ``document`` each window is its own.
    """
    rows = []
    for i in range(len(ids) // window):
        part = list(ids[i * window : (i + 1) * window])
        if bos is not None:
            part[0] = bos
        first = window // 2 + 1
        rows.append(EncodedSample(f"{name}:{i}", "", "", document or f"{name}:{i}", "", part[:first], part[first:]))
    return rows


def encode_texts(
    engine: Engine, texts: Mapping[str, Sequence[str]], window: int = WINDOW, most: int | None = None
) -> dict[str, list[EncodedSample]]:
    """Windows of each named set of text files (at most ``most`` of a set, spread over its files).

    Ten files or more are the set's documents; of fewer, each window is.

    Raises:
        UserError: no UTF-8, or too short for one window.
    """
    add_bos = llama_cpp.llama_vocab_get_add_bos(engine._vocab)
    sets = {}
    for name, paths in texts.items():
        rows, longest = [], 0
        for path in paths:
            ids = engine.tokenize(read_text(Path(path)), special=False, add_bos=True)
            longest = max(longest, len(ids))
            document = str(path) if len(paths) >= MIN_CLUSTERS else None
            own = cut(ids, window=window, bos=engine.bos if add_bos else None, name=str(path), document=document)
            rows.append(own[: -(-most // len(paths))] if most else own)
        sets[name] = [row for own in rows for row in own][:most]
        if not sets[name]:
            raise UserError(f"{longest} tokens, a window has {window}", where=str(paths[0]), hint="Give a longer text.")
    return sets


def read_text(path: Path) -> str:
    """A text file without the newline at its end, as llama.cpp's tools read it.

    Raises:
        UserError: missing, or not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8").removesuffix("\n")
    except FileNotFoundError:
        raise UserError("there is no such file", where=str(path)) from None
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8: byte {error.start}", where=str(path), hint="Save the text as UTF-8.") from None


def text_files(arguments: Sequence[str]) -> dict[str, list[str]]:
    """Sets of text files from ``NAME=PATH`` or ``PATH`` (named by its stem); a folder stands for its ``*.txt``.

    Raises:
        UserError: what does not exist or holds no text, all of it.
    """
    sets: dict[str, list[str]] = {}
    problems = []
    for argument in arguments:
        name, equals, path = argument.partition("=")
        path = Path(path if equals else argument)
        name = name if equals else path.stem
        found = sorted(path.glob("*.txt")) if path.is_dir() else [path] if path.is_file() else []
        if not found:
            problems.append(f"{path}: {'no *.txt in this folder' if path.is_dir() else 'there is no such file'}")
        if not name or name == "domain" or "/" in name:
            problems.append(f"{argument}: a set of texts cannot be named {name!r}")
        sets.setdefault(name, []).extend(map(str, found))
    raise_problems(problems, what="--text", hint="Write --text ja=FILE or --text FILE.")
    return sets


def read_questions(path: Path) -> list[dict]:
    """Questions of a JSON Lines file: ``prompt`` and ``completion`` as text, or token ids as the recipe's
    ``data/test.jsonl`` has them (``prompt_ids``, ``completion_ids``); ``id``, ``document`` and ``kind`` as there are.

    Raises:
        UserError: every line that cannot be used, by its number.
    """
    rows, problems = [], []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            problems.append(f"{path}:{number}: not JSON: {error}")
            continue
        problem = _question_problem(row)
        if problem:
            problems.append(f"{path}:{number}: {problem}")
        else:
            rows.append({"id": str(number), "document": str(row.get("id", number)), "kind": "", **row})
    kinds = {"prompt_ids" in row for row in rows}
    if len(kinds) == 2:
        problems.append("some lines hold token ids, others do not")
    if not rows and not problems:
        problems.append("no line")
    raise_problems(problems, what=str(path), hint='A line is {"prompt": "…", "completion": "…", "document": "…"}.')
    return rows


def _question_problem(row: object) -> str | None:
    if not isinstance(row, dict):
        return "not a JSON object"
    for key in ("prompt", "completion"):
        if not isinstance(row.get(key), str):
            return f"{key} is {'missing' if key not in row else 'not text'}"
    for key in ("id", "document", "kind"):
        if key in row and not isinstance(row[key], str):
            return f"{key} is not text"
    ids = [row.get("prompt_ids"), row.get("completion_ids")]
    if ids != [None, None] and not all(isinstance(x, list) and x and all(type(t) is int for t in x) for x in ids):
        return "prompt_ids and completion_ids are not lists of token ids"
    if ids == [None, None] and not (row["prompt"] and row["completion"]):
        return "prompt or completion is empty"
    return None


def encode_questions(engine: Engine, rows: Sequence[dict]) -> list[EncodedSample]:
    """Questions as token ids: those given, else the file's chat template and tokenizer, the answer with its end of turn.

    A file without a template gets the question as it stands (a base model). As in :func:`tsugiki.chat.encode` the
    answer's ids are those of the whole text where the prompt's are a prefix of them.

    Raises:
        UserError: the template refuses a question, or the file names no token that ends an answer.
    """
    end = engine.eot if engine.eot >= 0 else engine.eos
    if end < 0:
        raise UserError("it names no token that ends an answer (EOT or EOS)", where=str(engine.path))
    template = bool(engine.metadata.get("tokenizer.chat_template"))
    found = []
    for row in rows:
        common = [row[k] for k in ("id", "prompt", "completion", "document", "kind")]
        if "prompt_ids" in row:
            found.append(EncodedSample(*common, row["prompt_ids"], row["completion_ids"]))
            continue
        text = render(engine, [{"role": "user", "content": row["prompt"]}]) if template else row["prompt"]
        prompt, whole = (engine.tokenize(t, add_bos=not template) for t in (text, text + row["completion"]))
        answer = whole[len(prompt) :] if whole[: len(prompt)] == prompt else engine.tokenize(row["completion"])
        found.append(EncodedSample(*common, prompt, [*answer, end]))
    return found
