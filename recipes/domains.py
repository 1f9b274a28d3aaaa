"""Domains: one YAML each, what it holds, and the samples that it leads to."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tsugiki.adapt.samples import (
    SPLITS,
    FieldMapping,
    NearDuplicates,
    Row,
    Splits,
    make_splits,
    near_pairs,
    normalise,
    read_rows,
    read_samples,
    validate_rows,
)
from tsugiki.artifacts import digest, sha256_file, write_text
from tsugiki.errors import UserError, raise_problems

BUNDLED = Path(__file__).parent / "domains"
GENERATORS = ("setsubi",)
SCORINGS = ("exact_match", "char_f1")
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")


@dataclass(frozen=True)
class Source:
    """Where a domain's rows come from; exactly one of generator, jsonl and hub is set.

    Attributes:
        generator: a name in :data:`GENERATORS`.
        seed: the generator's seed.
        jsonl: data files (.jsonl, .json, .csv, each also .gz) by split; the key ``all`` for one file that is split
            by document. A relative path is looked for beside the YAML, then in the data folder.
        hub: id of a data set on the Hugging Face hub, loaded at ``revision`` (``config`` where it has several).
        hub_splits: the data set's splits by ours; empty: its split ``train`` is split by document.
        get: what to tell a user whose files are not there: what to download, from where, under which licence.
    """

    generator: str | None = None
    seed: int = 1
    jsonl: dict[str, str] = field(default_factory=dict)
    hub: str | None = None
    revision: str | None = None
    config: str | None = None
    hub_splits: dict[str, str] = field(default_factory=dict)
    get: str = ""


@dataclass(frozen=True)
class Domain:
    """One domain, validated.

    Attributes:
        name: from the file's name; letters a to z, digits, ``_`` and ``-``.
        path: its YAML.
        title: by language, ``ja`` and ``en``.
        licence: of the data.
        credit: the line that the licence asks for (empty: none).
        source: where the rows come from.
        fields: which field is what.
        near_duplicates: what counts as a near-duplicate across splits (``None``: looked for exact ones only).
        system: the system prompt (``None``: none).
        scoring: ``exact_match`` or ``char_f1``, of generated answers.
        max_new_tokens: the longest generated answer, tokens.
        max_tokens: question and answer together, tokens; longer training samples are dropped and counted.
        max_chars: the longest question or answer accepted, characters.
        check_items: how many test items (a prefix in hash order) each level is checked on.
        valid_share, test_share: of the documents, where the data brings no split of its own.
        sweep: settings of the sweep as a plain mapping; ``counts`` is always there.
    """

    name: str
    path: Path
    title: dict[str, str]
    licence: str
    source: Source
    fields: FieldMapping
    scoring: str
    sweep: dict[str, Any]
    credit: str = ""
    near_duplicates: NearDuplicates | None = field(default_factory=NearDuplicates)
    system: str | None = None
    max_new_tokens: int = 64
    max_tokens: int = 512
    max_chars: int = 20_000
    check_items: int = 200
    valid_share: float = 0.1
    test_share: float = 0.1


# --- finding and reading a domain --------------------------------------------------------------------------------


def check_name(name: str) -> str:
    """The name itself, when it may name a domain (and so a folder of runs)."""
    if not _NAME.fullmatch(name):
        raise UserError(
            f"{name!r} cannot name a domain", hint="Use letters a to z, digits, _ and -, beginning with a letter or digit."
        )
    return name


def list_domains(directory: Path | str = "domains") -> dict[str, Path]:
    """All domains by name: the bundled ones and those of ``./domains``, which win where both have a name."""
    found = {}
    for folder in (BUNDLED, Path(directory)):
        if folder.is_dir():
            found |= {p.stem: p for p in sorted(folder.glob("*.yaml")) if _NAME.fullmatch(p.stem)}
    return dict(sorted(found.items()))


def load_domain(name_or_path: str | Path, directory: Path | str = "domains") -> Domain:
    """Read and validate a domain: a bundled one, one in ``./domains``, or a path that ends in ``.yaml``.

    Raises:
        UserError: no such domain, or everything wrong in its YAML, each with file and key.
    """
    text = str(name_or_path)
    if text.endswith((".yaml", ".yml")):
        path = Path(text)
        if not path.is_file():
            raise UserError("there is no such file", where=text)
        check_name(path.stem)
    else:
        check_name(text)
        known = list_domains(directory)
        if text not in known:
            raise UserError(
                f"there is no domain {text!r}; there are: {', '.join(known)}",
                hint=f"For data of your own: tsugiki recipe init {text} --from file.jsonl",
            )
        path = known[text]
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 (byte {error.start + 1})", where=path.name) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path.name}:{mark.line + 1}" if mark else path.name
        raise UserError(f"not YAML: {getattr(error, 'problem', None) or error}", where=where) from error
    return _domain(path, value)


_KEYS: dict[str, tuple[type, ...]] = {
    "title": (dict,),
    "licence": (str,),
    "credit": (str,),
    "source": (dict,),
    "fields": (dict,),
    "near_duplicates": (dict, type(None)),
    "system": (str, type(None)),
    "scoring": (str,),
    "max_new_tokens": (int,),
    "max_tokens": (int,),
    "max_chars": (int,),
    "check_items": (int,),
    "valid_share": (float,),
    "test_share": (float,),
    "sweep": (dict,),
}
_REQUIRED = ("title", "licence", "source", "fields", "scoring", "sweep")
_SOURCE_KEYS: dict[str, tuple[type, ...]] = {
    "generator": (str,),
    "seed": (int,),
    "jsonl": (str, dict),
    "hub": (str,),
    "revision": (str,),
    "config": (str,),
    "splits": (dict,),
    "get": (str,),
}
_FIELD_KEYS: dict[str, tuple[type, ...]] = {
    "prompt": (str,),
    "completion": (str,),
    "document": (str, type(None)),
    "id": (str, type(None)),
    "kind": (str, type(None)),
    "split": (str, type(None)),
}
_TYPE_NAMES = {dict: "a mapping", str: "text", int: "a whole number", float: "a number", type(None): "null", list: "a list"}


def _check_keys(
    value: Any, allowed: dict[str, tuple[type, ...]], required: tuple[str, ...], at: str, problems: list[str]
) -> dict[str, Any]:
    """The keys of a mapping that are known and of the right type; problems are told as ``file (key): …``."""
    prefix = at.partition(" ")[2].strip("()")
    file = at.partition(" ")[0]

    def place(key: object) -> str:
        return f"{file} ({prefix}.{key})" if prefix else f"{file} ({key})"

    if not isinstance(value, dict):
        problems.append(f"{at}: a mapping is needed, not {_TYPE_NAMES.get(type(value), type(value).__name__)}")
        return {}
    good = {}
    for key, item in value.items():
        if key not in allowed:
            problems.append(f"{place(key)}: unknown key; known are {', '.join(allowed)}")
            continue
        types = allowed[key]
        accepted = (*types, int) if float in types else types
        if not isinstance(item, accepted) or (isinstance(item, bool) and bool not in types):
            needed = " or ".join(_TYPE_NAMES.get(t, t.__name__) for t in types)
            problems.append(f"{place(key)}: {needed} is needed, not {item!r}")
            continue
        good[key] = item
    problems += [f"{place(key)}: the key is missing" for key in required if key not in value]
    return good


def _domain(path: Path, value: Any) -> Domain:
    file = path.name
    problems: list[str] = []
    top = _check_keys(value, _KEYS, _REQUIRED, file, problems)

    title = _check_keys(top.get("title", {}), {"ja": (str,), "en": (str,)}, (), f"{file} (title)", problems)
    if "title" in top and not title:
        problems.append(f"{file} (title): at least one of ja and en is needed")
    source = _source(top.get("source"), file, problems) if "source" in top else Source()
    names: dict[str, Any] = {}
    if "fields" in top:
        names = _check_keys(top["fields"], _FIELD_KEYS, ("prompt", "completion"), f"{file} (fields)", problems)
    near: NearDuplicates | None = NearDuplicates()
    if "near_duplicates" in top:
        near = None
        if top["near_duplicates"] is not None:
            keys = {"threshold": (float,), "ngram": (int,)}
            near = NearDuplicates(
                **_check_keys(top["near_duplicates"], keys, (), f"{file} (near_duplicates)", problems)
            )
            if not 0 < near.threshold <= 1:
                problems.append(f"{file} (near_duplicates.threshold): {near.threshold} is not above 0 and at most 1")
            if near.ngram < 1:
                problems.append(f"{file} (near_duplicates.ngram): {near.ngram} is not at least 1")
    if "scoring" in top and top["scoring"] not in SCORINGS:
        problems.append(f"{file} (scoring): {top['scoring']!r} is not one of {', '.join(SCORINGS)}")
    for key in ("max_new_tokens", "max_tokens", "max_chars", "check_items"):
        if top.get(key, 1) < 1:
            problems.append(f"{file} ({key}): {top[key]} is not at least 1")
    shares = [top.get(key, 0.1) for key in ("valid_share", "test_share")]
    if min(shares) <= 0 or sum(shares) >= 1:
        problems.append(f"{file} (valid_share, test_share): {shares[0]} and {shares[1]} must be above 0 and below 1 together")
    if "sweep" in top:
        counts = top["sweep"].get("counts")
        whole = isinstance(counts, list) and counts and all(type(n) is int and n > 0 for n in counts)
        if not whole or sorted(set(counts)) != counts:
            problems.append(f"{file} (sweep.counts): an ascending list of whole numbers above 0 is needed, not {counts!r}")
    raise_problems(problems, what=f"domain {path.stem}", hint=f"Correct {path}.")
    plain = {k: v for k, v in top.items() if k not in ("title", "source", "fields", "near_duplicates")}
    return Domain(
        name=path.stem,
        path=path,
        title=title,
        source=source,
        fields=FieldMapping(**names),
        near_duplicates=near,
        **plain,
    )


def _source(value: Any, file: str, problems: list[str]) -> Source:
    at = f"{file} (source)"
    good = _check_keys(value, _SOURCE_KEYS, (), at, problems)
    kinds = [k for k in ("generator", "jsonl", "hub") if k in good]
    if len(kinds) != 1:
        problems.append(f"{at}: exactly one of generator, jsonl and hub is needed, not {', '.join(kinds) or 'none'}")
    if "generator" in good and good["generator"] not in GENERATORS:
        problems.append(f"{file} (source.generator): {good['generator']!r} is not one of {', '.join(GENERATORS)}")
    files = good.get("jsonl", {})
    files = {"all": files} if isinstance(files, str) else files
    for key, allowed in (("jsonl", ("all", *SPLITS)), ("splits", SPLITS)):
        for split, path in (files if key == "jsonl" else good.get("splits", {})).items():
            if split not in allowed or not isinstance(path, str):
                problems.append(f"{file} (source.{key}.{split}): needs {' | '.join(allowed)} and text, not {path!r}")
    if "jsonl" in good and ("all" in files) == ("train" in files) and not set(files) - {"all", *SPLITS}:
        problems.append(f"{file} (source.jsonl): one file, or train with valid and test, is needed")
    if "hub" in good and "revision" not in good:
        problems.append(f"{file} (source.revision): the key is missing; a hub data set is used at a fixed revision")
    return Source(
        generator=good.get("generator"),
        seed=good.get("seed", 1),
        jsonl=files,
        hub=good.get("hub"),
        revision=good.get("revision"),
        config=good.get("config"),
        hub_splits=good.get("splits", {}),
        get=" ".join(good.get("get", "").split()),
    )


# --- from a domain to samples ------------------------------------------------------------------------------------


def data_folder(data_dir: Path | str | None = None) -> Path | None:
    """The data folder: the one given, else ``$TSUGIKI_DATA``, else ``../shared/data`` beside the working folder."""
    given = data_dir or os.environ.get("TSUGIKI_DATA")
    if given:
        folder = Path(given).expanduser()
        if not folder.is_dir():
            name = "--data-dir" if data_dir else "TSUGIKI_DATA"
            raise UserError("there is no such folder", where=f"{name} {folder}")
        return folder
    for root in (Path.cwd(), Path(__file__).resolve().parent.parent):
        if (root.parent / "shared" / "data").is_dir():
            return root.parent / "shared" / "data"
    return None


def data_files(domain: Domain, data_dir: Path | str | None = None) -> dict[str, Path]:
    """The domain's data files by split (``all`` for one file); empty for a generator or a hub data set.

    Raises:
        UserError: files are missing; says which, and where to get them.
    """
    if not domain.source.jsonl:
        return {}
    found, missing = {}, []
    beside = {split: domain.path.parent / path for split, path in domain.source.jsonl.items()}
    folder = None if all(p.is_file() for p in beside.values()) else data_folder(data_dir)
    for split, path in domain.source.jsonl.items():
        places = [beside[split], *([folder / path] if folder else [])]
        place = next((p for p in places if p.is_file()), None)
        if place is None:
            missing.append(path)
        else:
            found[split] = place
    if missing:
        looked = f"in {folder}" if folder else "there is no data folder"
        raise UserError(
            f"missing data: {', '.join(missing)} ({looked})",
            where=f"domain {domain.name}",
            hint=f"Name the data folder with --data-dir or TSUGIKI_DATA. {domain.source.get}".strip()
            + f" Licence: {domain.licence}.",
        )
    return found


def domain_digest(domain: Domain, data_dir: Path | str | None = None) -> str:
    """A hash that changes when the domain's samples may: its source and fields, and the bytes they come from."""
    files = {split: sha256_file(path) for split, path in data_files(domain, data_dir).items()}
    if domain.source.generator:
        files["generator"] = sha256_file(Path(__file__).with_name(f"{domain.source.generator}.py"))
    parts = [domain.source, domain.fields, domain.near_duplicates, domain.max_chars, domain.valid_share, domain.test_share]
    return digest([[repr(p) for p in parts], files])


def load_rows(domain: Domain, data_dir: Path | str | None = None) -> list[Row]:
    """All rows of a domain, validated, with the split that the data gives them (``None``: none)."""
    source = domain.source
    if source.generator == "setsubi":
        from tsugiki.recipes import setsubi

        rows = [(f"setsubi:{i}", row) for i, row in enumerate(setsubi.generate(source.seed), start=1)]
        return validate_rows(rows, domain.fields, name="setsubi", max_chars=domain.max_chars)
    if source.hub:
        return _hub_rows(domain)
    rows: list[Row] = []
    problems: list[str] = []
    for split, path in data_files(domain, data_dir).items():
        try:
            rows += read_samples(
                path, domain.fields, split=None if split == "all" else split, max_chars=domain.max_chars
            )
        except UserError as error:
            problems.append(str(error))
    if len(problems) > 1:
        raise UserError("\n".join(problems), where=f"domain {domain.name}")
    if problems:
        raise UserError(problems[0])
    return rows


def _hub_rows(domain: Domain) -> list[Row]:
    import datasets

    source = domain.source
    rows: list[Row] = []
    for split, theirs in (source.hub_splits or {"all": "train"}).items():
        try:
            table = datasets.load_dataset(source.hub, name=source.config, revision=source.revision, split=theirs)
        except Exception as error:  # the hub's library raises many kinds, from its own to those of the network's
            reason = str(error).strip().splitlines()
            raise UserError(
                f"data set {source.hub} (revision {source.revision}, split {theirs}) cannot be loaded: "
                f"{type(error).__name__}: {reason[0] if reason else ''}",
                where=f"domain {domain.name}",
                hint="Check the id and the revision, and that this machine reaches the hub; for a gated data set accept "
                "its terms on its page and run `hf auth login`. Or download it and use source.jsonl.",
            ) from error
        located = [(f"{source.hub}/{theirs}:{i}", row) for i, row in enumerate(table, start=1)]
        rows += validate_rows(
            located,
            domain.fields,
            name=source.hub or "",
            split=None if split == "all" else split,
            max_chars=domain.max_chars,
        )
    return rows


def load_splits(domain: Domain, data_dir: Path | str | None = None) -> Splits:
    """A domain's samples: read, validated, split, without duplicates across splits, in nested (hash) order."""
    return make_splits(
        load_rows(domain, data_dir),
        valid_share=domain.valid_share,
        test_share=domain.test_share,
        near=domain.near_duplicates,
        name=f"domain {domain.name}",
    )


# --- a domain for a user's own file ------------------------------------------------------------------------------

_PROMPTS = ("prompt", "question", "instruction", "input", "質問", "問題", "問い", "設問", "指示", "q")
_COMPLETIONS = ("completion", "answer", "output", "response", "回答", "答え", "解答", "応答", "a")
_DOCUMENTS = ("document", "document_id", "doc_id", "doc", "source", "article_id", "文書", "文書名", "出典", "資料")
_IDS = ("id", "qid", "q_id", "sample_id", "番号")
_KINDS = ("kind", "type", "category", "qtype", "種別", "種類", "分類", "カテゴリ")
_SPLITS = ("split", "分割")


@dataclass(frozen=True)
class Found:
    """What :func:`init_domain` found in a file and wrote.

    Attributes:
        path: the YAML written.
        fields: the fields detected or given.
        rows, documents: counts.
        prompt_chars, completion_chars: quantiles (0, 50, 90, 99, 100 %), characters.
        tokens: the same of question and answer together, tokens (``None``: no tokenizer was given).
        exact_duplicates, near_duplicates: rows that repeat an earlier one; pairs of near-duplicates among the rest.
        splits: rows by split, after drops.
        dropped: what was dropped in splitting, by reason.
        longest: (where, characters) of the longest samples.
    """

    path: Path
    fields: FieldMapping
    rows: int
    documents: int
    prompt_chars: tuple[int, ...]
    completion_chars: tuple[int, ...]
    tokens: tuple[int, ...] | None
    exact_duplicates: int
    near_duplicates: int
    splits: dict[str, int]
    dropped: dict[str, int]
    longest: list[tuple[str, int]]


def detect_fields(rows: list[tuple[str, dict[str, Any]]], where: str = "the file") -> FieldMapping:
    """Guess which field is what from the names that every row has (case does not matter).

    Raises:
        UserError: no question or no answer among them.
    """
    common = set(map(str, rows[0][1]))
    for _, row in rows[1:]:
        common &= set(map(str, row))
    by_name = {name.strip().lower(): name for name in sorted(common)}

    def first(names: tuple[str, ...], taken: tuple[str | None, ...] = ()) -> str | None:
        return next((by_name[n] for n in names if n in by_name and by_name[n] not in taken), None)

    prompt, completion = first(_PROMPTS), first(_COMPLETIONS)
    if prompt is None or completion is None:
        lacking = " and ".join(n for n, v in (("the question", prompt), ("the answer", completion)) if v is None)
        raise UserError(
            f"cannot tell which field is {lacking} among: {', '.join(sorted(common)) or 'none that every row has'}",
            where=where,
            hint="Name them: --prompt FIELD --completion FIELD",
        )

    def label(names: tuple[str, ...]) -> str | None:
        key = first(names, (prompt, completion))
        usable = key is not None and all(isinstance(r[key], (str, int)) and str(r[key]).strip() for _, r in rows)
        return key if usable else None

    document, identity, kind, split = (label(n) for n in (_DOCUMENTS, _IDS, _KINDS, _SPLITS))
    if document and len({str(r[document]) for _, r in rows}) < 10:
        document = None  # a split by so few documents would be no split
    if identity and len({str(r[identity]) for _, r in rows}) < len(rows):
        identity = None  # it numbers something else
    if kind and len({str(r[kind]) for _, r in rows}) > 50:
        kind = None  # a name of its own for every row is no kind
    return FieldMapping(prompt, completion, document, identity, kind, split)


def _quantiles(values: list[int]) -> tuple[int, ...]:
    ordered = sorted(values)
    return tuple(ordered[min(len(ordered) - 1, int(q * len(ordered)))] for q in (0, 0.5, 0.9, 0.99, 1))


def init_domain(
    name: str,
    file: Path | str,
    *,
    fields: FieldMapping | None = None,
    tokenizer: Any = None,
    directory: Path | str = "domains",
    force: bool = False,
) -> Found:
    """Write ``domains/NAME.yaml`` for a data file of the user's, after validating every row of it.

    Args:
        fields: which field is what (``None``: detected from the names).
        tokenizer: a Hugging Face tokenizer with a chat template, to tell lengths in tokens.
        force: overwrite a YAML that is there.

    Raises:
        UserError: a bad name or file, rows that cannot be used, or a YAML that is there already.
    """
    check_name(name)
    file, path = Path(file), Path(directory) / f"{name}.yaml"
    if path.exists() and not force:
        raise UserError("there is such a domain already", where=str(path), hint="Take another name, or overwrite with --force.")
    if name in list_domains(BUNDLED) and not force:
        raise UserError(f"{name!r} is a bundled domain", hint="Take another name, or replace it with --force.")
    raw = read_rows(file)
    fields = fields or detect_fields(raw, file.name)
    rows = validate_rows(raw, fields, name=file.name)
    near = NearDuplicates()
    splits = make_splits(rows, near=near, name=file.name)

    unique = {(normalise(r.sample.prompt), normalise(r.sample.completion)): None for r in rows}
    tokens = None
    if tokenizer is not None:
        from tsugiki.chat import encode

        tokens = _quantiles([len(s.ids) for s in encode(tokenizer, (r.sample for r in rows))])
    sizes = sorted(((len(r.sample.prompt) + len(r.sample.completion), r.where) for r in rows), reverse=True)
    completions = _quantiles([len(r.sample.completion) for r in rows])
    write_text(path, _yaml(name, file, path, fields, near, len(splits.train), completions, tokens))
    load_domain(path)
    return Found(
        path=path,
        fields=fields,
        rows=len(rows),
        documents=len({r.sample.document for r in rows}),
        prompt_chars=_quantiles([len(r.sample.prompt) for r in rows]),
        completion_chars=completions,
        tokens=tokens,
        exact_duplicates=len(rows) - len(unique),
        near_duplicates=len(near_pairs([f"{p}\n{c}" for p, c in unique], None, near)),
        splits={s: len(getattr(splits, s)) for s in SPLITS},
        dropped=splits.dropped,
        longest=[(where, size) for size, where in sizes[:3]],
    )


def sweep_counts(train: int, points: int = 5) -> list[int]:
    """Sample counts that halve from about the whole training split downward: two figures, ascending, at least 8."""
    top = train if train < 100 else int(train // 10 ** (len(str(train)) - 2) * 10 ** (len(str(train)) - 2))
    return sorted({max(1, min(top, top // 2**k if top // 2**k > 8 else top)) for k in range(points)})


def _yaml(
    name: str,
    file: Path,
    path: Path,
    fields: FieldMapping,
    near: NearDuplicates,
    train: int,
    completion_chars: tuple[int, ...],
    tokens: tuple[int, ...] | None,
) -> str:
    longest = 2 * completion_chars[3]
    value = {
        "title": {"ja": name, "en": name},
        "licence": "unknown: write here under which terms the data may be used",
        "source": {"jsonl": Path(os.path.relpath(file.resolve(), path.parent.resolve())).as_posix()},
        "fields": {k: v for k, v in vars(fields).items() if v is not None},
        "near_duplicates": {"threshold": near.threshold, "ngram": near.ngram},
        "system": None,
        "scoring": "exact_match" if completion_chars[2] <= 20 else "char_f1",
        "max_new_tokens": max(16, min(512, longest)),
        "max_tokens": 512 if tokens is None else max(64, 1 << math.ceil(math.log2(tokens[3] + 1))),
        "check_items": 200,
        "sweep": {"counts": sweep_counts(train), "epochs": 3},
    }
    head = f"# tsugiki recipe run {name}\n# Written by `tsugiki recipe init`; change what you like.\n"
    return head + yaml.safe_dump(value, allow_unicode=True, sort_keys=False, width=110)


def show_found(found: Found, console: Any = None) -> None:
    """Print what :func:`init_domain` found, as a table."""
    from rich.markup import escape
    from rich.table import Table

    from tsugiki.progress import console as default

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))

    def row(label: str, value: str) -> None:
        table.add_row(label, escape(value))

    def spread(values: tuple[int, ...]) -> str:
        return "  ".join(f"{q} {v:,}" for q, v in zip(("min", "50%", "90%", "99%", "max"), values, strict=True))

    row("fields", ", ".join(f"{k} ← {v}" for k, v in vars(found.fields).items() if v))
    row("rows", f"{found.rows:,} from {found.documents:,} documents")
    row("question, characters", spread(found.prompt_chars))
    row("answer, characters", spread(found.completion_chars))
    row("together, tokens", spread(found.tokens) if found.tokens else "name a base to see them")
    row("exact duplicates", f"{found.exact_duplicates:,}")
    row("near-duplicate pairs", f"{found.near_duplicates:,}")
    row("splits", ", ".join(f"{k} {v:,}" for k, v in found.splits.items()))
    row("dropped", ", ".join(f"{k} {v:,}" for k, v in found.dropped.items()) or "none")
    row("longest", ", ".join(f"{where} ({size:,} characters)" for where, size in found.longest))
    row("written", str(found.path))
    (console or default).print(table)


def count_kinds(splits: Splits) -> dict[str, dict[str, int]]:
    """Items by split and kind."""
    return {s: dict(sorted(Counter(x.kind for x in getattr(splits, s)).items())) for s in SPLITS}
