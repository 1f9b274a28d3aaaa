"""Score matrices and the facts about base models, read strictly: every problem is a sentence naming its row.

The papers: Saito et al., "Why We Build Local Large Language Models" ("paper B"), and Takase & Honda,
"英語中心の大規模言語モデル開発からの脱却に向けて" ("paper A"). Their printed tables are in ``data/``.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from tsugiki.artifacts import atomic_path, sha256_file
from tsugiki.errors import UserError, raise_problems

DATA = Path(__file__).parent / "data"
TEXT_COLUMNS = ("hf_id", "family", "source", "source_url", "url", "note", "group")
MISSING = ("", "-", "–", "—", "na", "n/a", "nan")

COMMIT = "d60c0e635c46446c949a4d427a6f625141fa3464"
DATA_JS_SHA256 = "7962847d97b29ddaa53af623fb0f119e33c240a7d421a90adfc50953dc5e3d04"
ENDPOINT = "https://raw.githubusercontent.com"
# Column here -> key in the public file, in paper B's order.
TASKS = {
    "jcom": "JCom", "jemhopqa": "JEMHopQA", "niilc": "NIILC", "jsquad": "JSQuAD", "xlsum_ja": "XL-Sum",
    "mgsm_ja": "MGSM", "wmt20_en_ja": "WMT20 (en-ja)", "wmt20_ja_en": "WMT20 (ja-en)", "jmmlu": "JMMLU",
    "jhumaneval": "JHumanEval", "openbookqa": "OpenBookQA", "triviaqa": "TriviaQA", "hellaswag": "HellaSwag",
    "squad2": "SQuAD2", "xwino": "XWINO", "mmlu": "MMLU", "gsm8k": "GSM8K", "bbh": "BBH",
    "humaneval": "HumanEval",
}  # fmt: skip

KINDS = ("reported", "derived", "assumed")
CONSTRUCTIONS = ("PT", "CPT", "adapter", "quantized")
LANGUAGES = ("total", "en", "ja")


@dataclass(frozen=True)
class Scores:
    """A score matrix.

    Args:
        models: M names, unique.
        tasks: T names, unique.
        values: float64 ``(M, T)`` in 0–1, NaN where missing.
    """

    models: list[str]
    tasks: list[str]
    values: np.ndarray

    def __post_init__(self) -> None:
        values = np.array(self.values, dtype=np.float64)
        if values.shape != (len(self.models), len(self.tasks)):
            raise UserError(
                f"the matrix is {values.shape}, but there are {len(self.models)} models and {len(self.tasks)} tasks"
            )
        problems = [f"{kind} {name!r} occurs {count} times" for kind, names in
                    (("model", self.models), ("task", self.tasks))
                    for name, count in Counter(names).items() if count > 1]  # fmt: skip
        raise_problems(problems, what="Duplicates in the score matrix")
        values.setflags(write=False)
        object.__setattr__(self, "values", values)

    def select(self, models: Iterable[str] | None = None, tasks: Iterable[str] | None = None) -> Scores:
        """The rows and columns named, in the order named; an unknown name raises :class:`UserError`."""
        rows = _indices(self.models, models, "model")
        columns = _indices(self.tasks, tasks, "task")
        return Scores([self.models[i] for i in rows], [self.tasks[j] for j in columns], self.values[np.ix_(rows, columns)])

    def column(self, task: str) -> np.ndarray:
        """The scores of one task, float64 ``(M,)``."""
        return self.values[:, _indices(self.tasks, [task], "task")[0]]


def _indices(names: Sequence[str], wanted: Iterable[str] | None, kind: str) -> list[int]:
    if wanted is None:
        return list(range(len(names)))
    at = {name: i for i, name in enumerate(names)}
    wanted = list(wanted)
    raise_problems(
        [f"unknown {kind} {name!r}" for name in wanted if name not in at],
        what="Not in the score matrix",
        hint=f"The {kind}s are: {', '.join(names)}",
    )
    return [at[name] for name in wanted]


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a model's size and training data; None = unknown.

    Args:
        name: the name in the tables.
        hf_id: Hugging Face repository, or "".
        family: the base family whose tokenizer, architecture and data it shares (the bootstrap's cluster); read from a table
            without it, that of the source model.
        parameters, active_parameters: counts; active are those used per token (mixture of experts).
        construction: "PT" from scratch, "CPT" continued, "adapter", "quantized".
        source_model: the model it was made from, or "".
        tokens_total, tokens_en, tokens_ja: training tokens, those of the base included.
        architecture: in words.
        sources: field -> (reported | derived | assumed, where).
        added: tokens added to the source model's, by "total", "en", "ja", where those are what is known.
        added_ja_share: share of Japanese in the added tokens where the authors say it (0–1).
        table_set: which table the row is from.
        note: the row's remark.
        size_bytes: the file's own size, for a quantized model.
    """

    name: str
    hf_id: str = ""
    family: str = ""
    parameters: float | None = None
    active_parameters: float | None = None
    construction: str = "PT"
    source_model: str = ""
    tokens_total: float | None = None
    tokens_en: float | None = None
    tokens_ja: float | None = None
    architecture: str = ""
    sources: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    added: Mapping[str, float] = field(default_factory=dict)
    added_ja_share: float | None = None
    table_set: str = ""
    note: str = ""
    size_bytes: int | None = None

    def tokens(self, language: str) -> float | None:
        """Training tokens in ``language`` ("total", "en" or "ja")."""
        if language not in LANGUAGES:
            raise UserError(f"no budget for language {language!r}", hint=f"Choose one of {', '.join(LANGUAGES)}.")
        return getattr(self, f"tokens_{language}")


def read_table(path: Path | str) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """Read a CSV file with a header: its columns, and its rows as (line number, {column: text}).

    Raises:
        UserError: not UTF-8, no header, a column named twice, a row longer or shorter than the header.
    """
    path = Path(path)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            lines = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    except FileNotFoundError:
        raise UserError("no such file", where=str(path)) from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"not UTF-8 at byte {error.start}", where=str(path), hint="Save it as CSV UTF-8 (Excel: 'CSV UTF-8')."
        ) from None
    except (csv.Error, OSError) as error:
        raise UserError(f"not a readable CSV file: {error}", where=str(path)) from None
    lines = [(number, row) for number, row in lines if any(row)]
    if not lines:
        raise UserError("the file is empty", where=str(path), hint="The first line names the columns, 'model' first.")
    header = lines[0][1]
    problems = [f"{path.name}:1: column {name!r} occurs {n} times" for name, n in Counter(header).items() if n > 1]
    problems += [f"{path.name}:1: column {i + 1} has no name" for i, name in enumerate(header) if not name]
    problems += [
        f"{path.name}:{number} ({row[0]}): {len(row)} cells, but the header has {len(header)}"
        for number, row in lines[1:]
        if len(row) != len(header)
    ]
    raise_problems(problems, what=f"Cannot read {path.name}")
    return header, [(number, dict(zip(header, row, strict=True))) for number, row in lines[1:]]


def _number(text: str) -> float | None:
    """A finite number, None for a missing one; ``ValueError`` for anything else."""
    if text.lower() in MISSING:
        return None
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def load_scores(path: Path | str) -> Scores:
    """Read a score matrix: CSV with a ``model`` column and one column per task, scores in 0–1, blank = missing.

    Text columns named in ``TEXT_COLUMNS`` are ignored. Raises :class:`UserError` listing every problem: scores
    outside 0–1, percent mixed with fractions, models twice, columns that are neither tasks nor known text.
    """
    path = Path(path)
    header, rows = read_table(path)
    if "model" not in header:
        raise UserError("there is no column 'model'", where=str(path), hint=f"The columns are: {', '.join(header)}")
    tasks = [c for c in header if c != "model" and c not in TEXT_COLUMNS]
    problems, values, unknown = [], np.full((len(rows), len(tasks)), np.nan), set()
    for i, (number, row) in enumerate(rows):
        where = f"{path.name}:{number} ({row['model'] or 'no model name'})"
        if not row["model"]:
            problems.append(f"{where}: the model has no name")
        for j, task in enumerate(tasks):
            try:
                value = _number(row[task])
            except ValueError:
                if task not in unknown:
                    unknown.add(task)
                    problems.append(
                        f"{where}: column {task!r} holds {row[task]!r}, which is no score; "
                        f"unknown text columns are refused (known: {', '.join(TEXT_COLUMNS)})"
                    )
                continue
            values[i, j] = np.nan if value is None else value
        if tasks and all(row[t].lower() in MISSING for t in tasks):
            problems.append(f"{where}: the row has no score at all")
    problems += _duplicates(path, [(n, r["model"]) for n, r in rows])
    problems += _scale_problems(path, rows, tasks, values)
    if not tasks:
        problems.append(f"{path.name}:1: no task column")
    if not rows:
        problems.append(f"{path.name}: no model row")
    raise_problems(problems, what=f"Scores in {path.name}", hint="Scores are fractions from 0 to 1; a blank is missing.")
    return Scores([row["model"] for _, row in rows], tasks, values)


def _duplicates(path: Path, names: list[tuple[int, str]]) -> list[str]:
    first: dict[str, int] = {}
    problems = []
    for number, name in names:
        if name and name in first:
            problems.append(f"{path.name}:{number} ({name}): the model occurs already in line {first[name]}")
        first.setdefault(name, number)
    return problems


def _scale_problems(path: Path, rows: list, tasks: list[str], values: np.ndarray) -> list[str]:
    outside = np.argwhere(~np.isnan(values) & ((values < 0) | (values > 1)))
    at = [(f"{path.name}:{rows[i][0]} ({rows[i][1]['model']})", tasks[j], values[i, j]) for i, j in outside]
    percent = sorted({task for _, task, value in at if 1 < value <= 100}, key=tasks.index)
    problems = [f"{where}: {task} is {value:g}, outside 0–1" for where, task, value in at if not 1 < value <= 100]
    for task in percent:
        column = values[:, tasks.index(task)]
        above, below = np.flatnonzero(column > 1), np.flatnonzero((column >= 0) & (column <= 1))
        where = f"{path.name}:{rows[above[0]][0]} ({rows[above[0]][1]['model']})"
        text = f"{where}: {task} is {column[above[0]]:g}, which looks like percent"
        if len(below):
            other = rows[below[0]]
            text += f", while line {other[0]} ({other[1]['model']}) has {column[below[0]]:g}: mixed scales"
        problems.append(text + f" ({len(above)} of {np.count_nonzero(~np.isnan(column))} cells above 1)")
    whole = [t for t in tasks if t not in percent and np.nanmax(np.append(values[:, tasks.index(t)], 0)) > 0]
    if percent and whole:
        problems.append(f"{path.name}: mixed scales: {percent[0]} in percent, {whole[0]} in fractions")
    return problems


def fetch_scores(cache: Path | str, endpoint: str = ENDPOINT, sha256: str = DATA_JS_SHA256) -> Scores:
    """Paper B's 35 × 19 score matrix from ``swallow-llm/evaluation`` (MIT), at its pinned commit.

    The file is kept in ``cache`` and downloaded once; its SHA-256 is checked each time. Raises
    :class:`UserError` when there is no network or the bytes are not those the analysis was checked with.
    """
    path = Path(cache) / f"swallow-evaluation-{COMMIT[:12]}.js"
    if not path.exists() or sha256_file(path) != sha256:
        url = f"{endpoint.rstrip('/')}/swallow-llm/evaluation/{COMMIT}/assets/data.js"
        hint = "Without a network, give the matrix as a CSV file with --scores FILE."
        if not url.startswith(("https://", "http://127.0.0.1", "http://localhost")):
            raise UserError(f"the endpoint must be https, not {endpoint}")
        try:
            with urllib.request.urlopen(url, timeout=60) as answer:
                content = answer.read(8 << 20)
        except (urllib.error.URLError, OSError) as error:
            raise UserError(f"cannot download the score matrix: {error}", where=url, hint=hint) from None
        got = hashlib.sha256(content).hexdigest()
        if got != sha256:
            raise UserError(f"the file has SHA-256 {got}, not {sha256}", where=url, hint=hint)
        with atomic_path(path) as temporary:
            temporary.write_bytes(content)
    return parse_public_scores(path.read_text(encoding="utf-8"))


def parse_public_scores(text: str) -> Scores:
    """The 35 base models of paper B out of ``assets/data.js`` (``const dataSet = [ … ];``, NaN = missing).

    A model can have an "inst" row beside its "base" row; only base rows are read.
    """
    head, _, body = text.partition("=")
    if head.split() != ["const", "dataSet"]:
        raise UserError("not the public score file: it does not begin with 'const dataSet ='", where="data.js")
    try:
        entries = json.loads(body.strip().removesuffix(";"))
        base = {e["Model"]: e for e in entries if e["Type"] == "base"}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"not the public score file: {error}", where="data.js") from None
    wanted = [m for m in load_models().values() if m.table_set == "saito_table1"]
    problems = []
    for m in wanted:
        row = base.get(m.hf_id)
        if row is None:
            problems.append(f"{m.hf_id}: no row of type 'base'")
        else:
            keys = [k for k in TASKS.values() if not isinstance(row.get(k), (int, float))]
            problems += [f"{m.hf_id}: no score {k!r}" for k in keys]
    raise_problems(problems, what="The public score file")
    values = [[float(base[m.hf_id][key]) for key in TASKS.values()] for m in wanted]
    return Scores([m.name for m in wanted], list(TASKS), np.array(values))


MODEL_COLUMNS = (
    "model", "hf_id", "family", "params_b", "active_params_b", "construction", "source_model", "tokens_total_b",
    "tokens_en_b", "tokens_ja_b", "added_total_b", "added_en_b", "added_ja_b", "added_ja_share", "kind_total",
    "kind_en", "kind_ja", "where_en", "where_ja", "corpus", "arch", "reference", "source", "table_set", "note",
)  # fmt: skip


def load_models(path: Path | str | None = None) -> dict[str, ModelFacts]:
    """Read a table of models (default: the shipped one); numbers in billions in the file, plain counts here.

    Columns: see ``MODEL_COLUMNS``; only ``model`` is needed. ``added_*_b`` are tokens added to the source
    model's. Raises :class:`UserError` listing every problem, contradictory budgets among them.
    """
    path = Path(path) if path else DATA / "base_models.csv"
    header, rows = read_table(path)
    if "model" not in header:
        raise UserError("there is no column 'model'", where=str(path), hint=f"The columns are: {', '.join(header)}")
    raise_problems(
        [f"{path.name}:1: unknown column {c!r}" for c in header if c not in MODEL_COLUMNS],
        what=f"Models in {path.name}",
        hint=f"Known columns: {', '.join(MODEL_COLUMNS)}",
    )
    problems, models = [], {}
    for number, row in rows:
        where = f"{path.name}:{number} ({row['model'] or 'no model name'})"
        facts, wrong = _facts(path, number, row)
        problems += [f"{where}: {text}" for text in wrong]
        models[facts.name] = facts
    problems += _duplicates(path, [(n, r["model"]) for n, r in rows])
    lines = {row["model"]: number for number, row in rows}
    for name, text in contradictions(models):
        problems.append(f"{path.name}:{lines[name]} ({name}): {text}")
    raise_problems(problems, what=f"Models in {path.name}")
    return _follow_families(models, {row["model"] for _, row in rows if not row.get("family")}, path)


def _follow_families(models: dict[str, ModelFacts], blank: set[str], path: Path) -> dict[str, ModelFacts]:
    """Without a ``family`` a continued model is of its source model's: it shares that one's data, and the bootstrap's cluster."""
    if not any(models[name].source_model for name in blank):
        return models
    known = models if path == DATA / "base_models.csv" else load_models() | models

    def family(m: ModelFacts) -> str:
        if not m.source_model or m.name not in blank or models.get(m.name) is not m:
            return m.family
        source = find_model(m.source_model, known)
        return family(source) if source else m.source_model  # children of one unknown base stay together

    return {name: replace(m, family=family(m)) for name, m in models.items()}


def _facts(path: Path, number: int, row: dict[str, str]) -> tuple[ModelFacts, list[str]]:
    wrong: list[str] = []

    def count(column: str, scale: float = 1e9) -> float | None:
        try:
            value = _number(row.get(column, ""))
        except ValueError:
            wrong.append(f"{column} is {row[column]!r}, not a number")
            return None
        if value is not None and value < 0:
            wrong.append(f"{column} is {value:g}, below 0")
        # round: 3.4 * 1e9 must be 3400000000.0 exactly, so that sums compare
        return None if value is None else round(value * scale, 3)

    text = {c: row.get(c, "") for c in MODEL_COLUMNS}
    if not text["model"]:
        wrong.append("the model has no name")
    construction = text["construction"] or ("CPT" if text["source_model"] else "PT")
    if construction not in CONSTRUCTIONS:
        wrong.append(f"construction is {construction!r}, not one of {', '.join(CONSTRUCTIONS)}")
    elif construction != "PT" and not text["source_model"]:
        wrong.append(f"construction is {construction}, but no source_model is named")
    elif construction == "PT" and text["source_model"]:
        wrong.append(f"construction is PT (from scratch), but source_model is {text['source_model']!r}")
    share = count("added_ja_share", 1)
    if share is not None and share > 1:
        wrong.append(f"added_ja_share is {share:g}, outside 0–1")
    parameters, active = count("params_b"), count("active_params_b")
    tokens = {language: count(f"tokens_{language}_b") for language in LANGUAGES}
    added = {language: count(f"added_{language}_b") for language in LANGUAGES}
    origin = text["source"] or f"{path.name}:{number}"
    sources: dict[str, tuple[str, str]] = {}
    for name, value in (("parameters", parameters), ("active_parameters", active)):
        if value is not None:
            sources[name] = ("reported", origin)
    for language, value in tokens.items():
        if value is not None:
            kind = text[f"kind_{language}"] or "reported"
            if kind not in KINDS:
                wrong.append(f"kind_{language} is {kind!r}, not one of {', '.join(KINDS)}")
            sources[f"tokens_{language}"] = (kind, text.get(f"where_{language}") or origin)
    facts = ModelFacts(
        name=text["model"],
        hf_id=text["hf_id"],
        family=text["family"] or text["model"],
        parameters=parameters,
        # a blank is "all of them" for a dense model only: the papers leave a mixture's active count open
        active_parameters=active if active is not None or "MoE" in text["arch"] else parameters,
        construction=construction,
        source_model=text["source_model"],
        tokens_total=tokens["total"],
        tokens_en=tokens["en"],
        tokens_ja=tokens["ja"],
        architecture=text["arch"],
        sources=sources,
        added={k: v for k, v in added.items() if v is not None},
        added_ja_share=share,
        table_set=text["table_set"],
        note=text["note"],
    )
    return facts, wrong


def contradictions(models: Mapping[str, ModelFacts]) -> list[tuple[str, str]]:
    """(model, sentence) for each budget that contradicts itself or its source model's."""
    found = []

    def more(a: float | None, b: float | None) -> bool:
        return a is not None and b is not None and a > b * (1 + 1e-9)

    def billions(value: float) -> str:
        return f"{value / 1e9:g} B"

    for name, m in models.items():
        say = lambda text, name=name: found.append((name, text))  # noqa: E731
        if more(m.active_parameters, m.parameters):
            say(f"active parameters {billions(m.active_parameters)} > all parameters {billions(m.parameters)}")
        for facts, what in (({"en": m.tokens_en, "ja": m.tokens_ja, "total": m.tokens_total}, "tokens"),
                            (m.added, "added tokens")):  # fmt: skip
            en, ja, total = facts.get("en"), facts.get("ja"), facts.get("total")
            if en is not None and ja is not None and more(en + ja, total):
                say(f"{what}: English {billions(en)} + Japanese {billions(ja)} > total {billions(total)}")
            else:
                for label, part in (("English", en), ("Japanese", ja)):
                    if more(part, total):
                        say(f"{what}: {label} {billions(part)} > total {billions(total)}")
        source, seen = find_model(m.source_model, models), {name}
        if source:
            for language in LANGUAGES:
                if more(source.tokens(language), m.tokens(language)):
                    say(
                        f"{language} tokens {billions(m.tokens(language))} < those of its source model "
                        f"{source.name}, {billions(source.tokens(language))}"
                    )
        while source:
            if source.name in seen:
                say(f"its source models form a circle through {source.name}")
                break
            seen.add(source.name)
            source = find_model(source.source_model, models)
    return found


def find_model(name: str, models: Mapping[str, ModelFacts]) -> ModelFacts | None:
    """The model of that name or Hugging Face id, whatever the case, spaces and hyphens; None when unknown."""
    if not name:
        return None
    if name in models:
        return models[name]
    wanted = plain_name(name)
    for m in models.values():
        if wanted in (plain_name(m.name), plain_name(m.hf_id)):
            return m
    return None


def plain_name(name: str) -> str:
    """A name by which spellings of it compare: no case, spaces, hyphens, underscores."""
    return "".join(c for c in name.casefold() if c not in " -_")
