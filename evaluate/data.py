"""Benchmark data: from a folder of the user's, else from the Hugging Face hub; never remote code, never a copy.

The folder holds ``benchmarks/<folder>/…``, the files as their publishers give them (:data:`SETS` says which). A set that
is not there says where it comes from, under which licence and where to put it. Rows have the same columns from either
source. Sets under a no-derivatives licence are read where they lie: nothing here writes, reshapes or caches them.

A set has two homes, and they are never mixed up: its publisher's files (``url``: a GitHub permalink, whose repository and
commit :attr:`DataSet.published` gives, where it has one) and its copy on the hub (``hub_id`` and ``revision``). No hub
revision is pinned here (None: the newest is loaded), because none was checked against these numbers; :func:`reading`
pins one, and records the commit that the hub gave.
"""

from __future__ import annotations

import gzip
import http.client
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from tsugiki.artifacts import digest, sha256_file
from tsugiki.errors import UserError, raise_problems
from tsugiki.evaluate import data_files
from tsugiki.evaluate.data_files import Row


@dataclass(frozen=True)
class DataSet:
    """Where one benchmark lives and what it must hold.

    Args:
        name: how :func:`load_set` calls it.
        title: for people.
        licence: of the data, in words.
        url: where the files come from; on GitHub a permalink to the commit.
        files: split -> files relative to ``<data-dir>/benchmarks/<folder>/``; ``*`` matches, ``{config}`` is one of
            ``configs``. The splits in ``optional`` may be absent.
        columns: every row has these.
        counts: split -> rows, where known.
        hub_id, config, revision: on the hub; None where there is no such set, configuration or pinned revision.
        redistributable: False where the licence forbids passing on changed or reshaped copies.
        folder: the folder's name where it is not ``name``.
        configs: sub-sets (languages, subjects), and ``column`` the row's column that names them.
        hub_splits: split here -> split on the hub, where the names differ.
        read: ``(path) -> rows`` of one file.
        reshape: a hub row -> a row with this set's columns, where they differ.
        note: what else to know.
    """

    name: str
    title: str
    licence: str
    url: str
    files: Mapping[str, tuple[str, ...]]
    columns: tuple[str, ...]
    counts: Mapping[str, int] = field(default_factory=dict)
    hub_id: str | None = None
    config: str | None = None
    revision: str | None = None
    redistributable: bool = True
    folder: str = ""
    configs: tuple[str, ...] = ()
    column: str = ""
    optional: tuple[str, ...] = ()
    hub_splits: Mapping[str, str] = field(default_factory=dict)
    read: Callable[[Path], list[Row]] | None = None
    reshape: Callable[[Row], Row] | None = None
    note: str = ""

    @property
    def published(self) -> tuple[str, str] | None:
        """GitHub repository (``owner/name``) and commit of the publisher's files; None where they are not on GitHub."""
        owner_name, tree, rest = self.url.removeprefix(_GITHUB).partition("/tree/")
        return (owner_name, rest.partition("/")[0]) if self.url.startswith(_GITHUB) and tree else None


# --- the sets --------------------------------------------------------------------------------------------------------

MGSM_LANGUAGES = ("bn", "de", "en", "es", "fr", "ja", "ru", "sw", "te", "th", "zh")
JMMLU_NC_ND = ("japanese_civics", "japanese_geography", "japanese_idiom")
# The 53 subjects that may be passed on, in the fixed order of llm-jp-eval 1.3.0 (its seeded shuffle depends on it).
_JMMLU_53 = """econometrics human_aging high_school_psychology professional_medicine electrical_engineering college_mathematics
    medical_genetics formal_logic nutrition prehistory world_religions japanese_history high_school_geography
    international_law logical_fallacies human_sexuality philosophy college_medicine professional_accounting
    high_school_mathematics global_facts business_ethics high_school_chemistry college_physics high_school_statistics
    moral_disputes high_school_biology miscellaneous high_school_macroeconomics high_school_computer_science
    abstract_algebra elementary_mathematics jurisprudence security_studies high_school_physics college_computer_science
    public_relations management computer_security college_chemistry anatomy high_school_european_history
    machine_learning virology high_school_microeconomics astronomy world_history college_biology clinical_knowledge
    conceptual_physics professional_psychology sociology marketing"""
JMMLU_SUBJECTS = tuple(_JMMLU_53.split())
_BBH_27 = """boolean_expressions causal_judgement date_understanding disambiguation_qa dyck_languages formal_fallacies
    geometric_shapes hyperbaton logical_deduction_five_objects logical_deduction_seven_objects
    logical_deduction_three_objects movie_recommendation multistep_arithmetic_two navigate object_counting
    penguins_in_a_table reasoning_about_colored_objects ruin_names salient_translation_error_detection snarks
    sports_understanding temporal_sequences tracking_shuffled_objects_five_objects
    tracking_shuffled_objects_seven_objects tracking_shuffled_objects_three_objects web_of_lies word_sorting"""
BBH_SUBTASKS = tuple(_BBH_27.split())
MMLU_PROX_OPTIONS = tuple(f"option_{i}" for i in range(10))

_GITHUB = "https://github.com/"
_HUB = "https://huggingface.co/datasets/"
_JMMLU = _GITHUB + "nlp-waseda/JMMLU/tree/762cbf192c9e"
_MT_BENCH = {
    "ja": "mt_bench_ja/question/question_full-v3.jsonl",
    "ja_v4": "mt_bench_ja/question/question_full-v4.jsonl",
    "ja_reference": "mt_bench_ja/reference_answer/gpt-4-v1.jsonl",
    "ja_reference_checked": "mt_bench_ja/reference_answer/base-gpt4o-with-human-annotation-v0.jsonl",
    "en": "mt_bench_en/question/question-v0.jsonl",
    "en_reference": "mt_bench_en/reference_answer/gpt-4-v0.jsonl",
}  # fmt: skip

_ALL = [
    DataSet(
        "mgsm", "MGSM", "CC BY 4.0", _GITHUB + "google-research/url-nlp/tree/452a21ad3dae/mgsm",
        {"train": ("exemplars.json",), "test": ("mgsm_{config}.tsv",)},
        ("language", "question", "answer", "answer_number"), {"train": 88, "test": 2750},
        hub_id="juletxara/mgsm", configs=MGSM_LANGUAGES, column="language", read=data_files.read_mgsm,
        note="exemplars.json is the publisher's exemplars.py written as JSON: {language: {\"1\"–\"8\": {q, a}}}.",
    ),
    DataSet(
        "mgsm_ja_fixed", "MGSM, Japanese, corrected", "CC BY-SA 4.0", _HUB + "sbintuitions/MGSM_ja",
        {"test": ("test.jsonl",)}, ("question", "answer_number"), {"test": 250},
        hub_id="sbintuitions/MGSM_ja", config="fixed",
    ),
    DataSet(
        "jmmlu", "JMMLU, 53 subjects", "CC BY-SA 4.0; japanese_history and world_history © Step Co., commercial use only "
        "for research and evaluation of language models", _JMMLU,
        {"test": ("JMMLU/{config}.csv",)}, ("subject", *data_files.JMMLU_COLUMNS), {"test": 7097},
        hub_id="nlp-waseda/JMMLU", configs=JMMLU_SUBJECTS, column="subject", read=data_files.read_jmmlu,
        note="On the hub it is JMMLU.zip, read in place.",
    ),
    DataSet(
        "jmmlu_nc_nd", "JMMLU, three subjects under a no-derivatives licence", "CC BY-NC-ND 4.0, © VIST; commercial use "
        "only for research and evaluation of language models; verbatim copies only", _JMMLU,
        {"test": ("JMMLU_NC_ND/{config}.csv",)}, ("subject", *data_files.JMMLU_COLUMNS), {"test": 439},
        hub_id="nlp-waseda/JMMLU", redistributable=False, folder="jmmlu", configs=JMMLU_NC_ND, column="subject",
        read=data_files.read_jmmlu, note="On the hub it is JMMLU.zip, read in place.",
    ),
    DataSet(
        "niilc", "NIILC-QA", "CC BY-SA 4.0", _GITHUB + "mynlp/niilc-qa/tree/b6d47968b2e3/data",
        {"dev": ("NIILC-ECQA2015_dev.xml",), "test": ("NIILC-ECQA2015_test.xml",)},
        ("id", "text", "answers", "D_3"), {"dev": 800, "test": 200},
        hub_id="sbintuitions/niilc-qa", config="v1.2", read=data_files.read_niilc,
        note="The hub's v1.2 holds edited answers: a score may differ by an item or two.",
    ),
    DataSet(
        "jaqket", "AI王 (JAQKET), answers extended", "see the hub page", _HUB + "sbintuitions/aio-extended-answers",
        {"validation": ("validation.jsonl",)}, ("question", "answers"), {},
        hub_id="sbintuitions/aio-extended-answers", note="About 1,000 questions; the number is not confirmed.",
    ),
    DataSet(
        "mmlu_prox", "MMLU-ProX", "see the hub page", _HUB + "li-lab/MMLU-ProX",
        {"validation": ("{config}/validation.jsonl",), "test": ("{config}/test.jsonl",)},
        ("language", "question", *MMLU_PROX_OPTIONS, "answer", "cot_content", "category"), {},
        hub_id="li-lab/MMLU-ProX", configs=("ja", "en"), column="language",
    ),
    DataSet(
        "lawqa_jp", "日本の法令に関する多肢選択式QA", "Public Data License 1.0 (attribution)",
        _GITHUB + "digital-go-jp/lawqa_jp/tree/6165cc9748a1/data",
        {"test": ("selection.json",), "randomized": ("selection_randomized.json",)},
        ("ファイル名", "コンテキスト", "問題文", "指示", "選択肢", "output"), {"test": 140, "randomized": 560},
        read=data_files.read_lawqa,
    ),
    DataSet(
        "jcommonsenseqa", "JCommonsenseQA (JGLUE 1.3)", "CC BY-SA 4.0", _GITHUB + "yahoojapan/JGLUE/tree/6f071c09316b",
        {s: (f"jcommonsenseqa-v1.3/{s}-v1.3.json",) for s in ("train", "valid", "test")},
        ("q_id", "question", *(f"choice{i}" for i in range(5)), "label"), {"train": 8939, "valid": 1119, "test": 1118},
        hub_id="sbintuitions/JCommonsenseQA", folder="jglue", read=data_files.read_lines, optional=("test",),
        hub_splits={"valid": "validation"}, note="train and valid are the same in 1.1 and 1.3.",
    ),
    DataSet(
        "jsquad", "JSQuAD (JGLUE 1.3)", "CC BY-SA 4.0", _GITHUB + "yahoojapan/JGLUE/tree/6f071c09316b",
        {s: (f"jsquad-v1.3/{s}-v1.3.json",) for s in ("train", "valid", "test")},
        ("id", "title", "context", "question", "answers"), {"valid": 4442, "test": 4420},
        hub_id="sbintuitions/JSQuAD", folder="jglue", read=data_files.read_jsquad, optional=("train", "test"),
        hub_splits={"valid": "validation"}, note="valid is the same in 1.1 and 1.3; the shots come from train.",
    ),
    DataSet(
        "jemhopqa", "JEMHopQA 1.0", "CC BY-SA 4.0", _GITHUB + "aiishii/JEMHopQA/tree/fed5024f4f39",
        {"train": ("corpus/train.json",), "dev": ("corpus/dev.json",)}, ("qid", "type", "question", "answer"),
        {"train": 1059, "dev": 120}, hub_id="sbintuitions/JEMHopQA", config="v1", hub_splits={"dev": "validation"},
        read=data_files.read_jemhopqa,
        note="llm-jp-eval 1.3.0 uses 1.0; 1.1 and 1.2 change two and three answers of dev.",
    ),
    DataSet(
        "gsm8k", "GSM8K", "MIT", _GITHUB + "openai/grade-school-math/tree/3101c7d50724",
        {"train": ("train.jsonl",), "test": ("test.jsonl",)}, ("question", "answer"), {"train": 7473, "test": 1319},
        hub_id="openai/gsm8k", config="main",
    ),
    DataSet(
        "humaneval", "HumanEval", "MIT", _GITHUB + "openai/human-eval/tree/6d43fb980f9f", {"test": ("HumanEval.jsonl.gz",)},
        ("task_id", "prompt", "entry_point", "canonical_solution", "test"), {"test": 164},
        hub_id="openai/openai_humaneval",
    ),
    DataSet(
        "jhumaneval", "JHumanEval", "MIT", _GITHUB + "KuramitsuLab/jhuman-eval/tree/def32e75b363",
        {"test": ("jhuman-eval.jsonl.gz",)}, ("task_id", "prompt", "entry_point", "canonical_solution", "test"),
        {"test": 164}, hub_id="kogi-jwu/jhumaneval",
    ),
    DataSet(
        "bbh", "BIG-Bench Hard", "MIT", _GITHUB + "suzgunmirac/BIG-Bench-Hard/tree/9ee07bd481fe",
        {"test": ("bbh/{config}.json",), "cot_prompts": ("cot-prompts/{config}.txt",)}, ("subtask", "input", "target"),
        {"test": 6511, "cot_prompts": 27}, hub_id="SaylorTwift/bbh", configs=BBH_SUBTASKS, column="subtask",
        optional=("cot_prompts",), read=data_files.read_bbh,
        note="cot_prompts: the worked examples of a subtask are its one row's target, without the canary.",
    ),
    DataSet(
        "xwinograd", "XWINO", "Apache-2.0; the sentences are from WSC and others: see the README",
        _GITHUB + "yandex-research/crosslingual_winograd/tree/d2cfbbf7dc8f", {"test": ("dataset.tsv",)},
        ("language", "sentence", "option1", "option2", "answer"), {"test": 3961}, hub_id="Muennighoff/xwinograd",
        configs=("en", "jp", "fr", "pt", "ru", "zh"), column="language", read=data_files.read_xwinograd,
    ),
    *[
        DataSet(
            f"mt_bench_{split}", f"MT-Bench ({split.replace('_', ', ')})", "Apache-2.0",
            _GITHUB + "llm-jp/llm-jp-judge/tree/4392b3b00ddd", {"test": (path,)},
            ("question_id", "choices") if "reference" in split else ("question_id", "category", "turns"),
            {"test": 30 if split == "en_reference" else 80}, folder="mt_bench_ja",
        )
        for split, path in _MT_BENCH.items()
    ],
    DataSet(
        "xlsum_ja", "XL-Sum, Japanese", "CC BY-NC-SA 4.0, by the publisher's page", _HUB + "mkshing/xlsum_ja",
        {"train": ("train.jsonl",), "test": ("test.jsonl",)}, ("text", "summary"), {}, hub_id="mkshing/xlsum_ja",
    ),
    DataSet(
        "wmt20", "WMT20 news, en-ja and ja-en", "for research, by the WMT20 page",
        "https://www.statmt.org/wmt20/ (sacrebleu -t wmt20 -l en-ja and ja-en)", {"test": ("wmt20.{config}.src",)},
        ("pair", "source", "reference"), {"test": 1993}, configs=("en-ja", "ja-en"), column="pair", read=data_files.read_wmt20,
        note="sacrebleu keeps both files of a pair in ~/.sacrebleu/wmt20; copy the .src and .ref files here.",
    ),
    DataSet(
        "mmlu", "MMLU", "MIT", _HUB + "cais/mmlu", {"dev": ("dev.jsonl",), "test": ("test.jsonl",)},
        ("question", "subject", "choices", "answer"), {}, hub_id="cais/mmlu", config="all",
    ),
    DataSet(
        "triviaqa", "TriviaQA, closed book", "unknown, by the hub page", _HUB + "mandarjoshi/trivia_qa",
        {"train": ("train.jsonl",), "validation": ("validation.jsonl",)}, ("question", "answer"), {},
        hub_id="mandarjoshi/trivia_qa", config="rc.nocontext",
    ),
    DataSet(
        "openbookqa", "OpenBookQA", "see the hub page", _HUB + "allenai/openbookqa",
        {"train": ("train.jsonl",), "test": ("test.jsonl",)}, ("question_stem", "choices", "answerKey"), {},
        hub_id="allenai/openbookqa", config="main",
    ),
    DataSet(
        "hellaswag", "HellaSwag", "MIT", _HUB + "Rowan/hellaswag",
        {"train": ("train.jsonl",), "validation": ("validation.jsonl",)},
        ("activity_label", "ctx_a", "ctx_b", "endings", "label"), {}, hub_id="Rowan/hellaswag",
    ),
    DataSet(
        "squad2", "SQuAD 2.0", "CC BY-SA 4.0", _HUB + "rajpurkar/squad_v2",
        {"train": ("train.jsonl",), "validation": ("validation.jsonl",)},
        ("id", "title", "context", "question", "answers"), {}, hub_id="rajpurkar/squad_v2",
    ),
]  # fmt: skip
SETS: dict[str, DataSet] = {s.name: s for s in _ALL}


# --- which data was read ---------------------------------------------------------------------------------------------


@dataclass
class Reading:
    """What :func:`load_set` read inside :func:`reading`.

    Attributes:
        revision: of the hub, to load; None: the newest.
        files: set -> file -> SHA-256, of sets that were read from a folder.
        commits: set -> the hub's commits, of sets that came from there.
        elsewhere: sets that came from neither, and from where.
    """

    revision: str | None = None
    files: dict[str, dict[str, str]] = field(default_factory=dict)
    commits: dict[str, set[str]] = field(default_factory=dict)
    elsewhere: dict[str, str] = field(default_factory=dict)

    def rows(self) -> list[dict[str, Any]]:
        """One JSON-ready row a set: ``set``, ``from`` (``folder``, ``hub`` or a name), and what identifies the data:
        ``sha256`` of the files, or ``hub_id`` and ``revision`` (the hub's commit, None where it could not be known)."""
        found: list[dict[str, Any]] = [{"set": s, "from": "folder", "sha256": digest(files)} for s, files in self.files.items()]
        found += [{"set": s, "from": "hub", "hub_id": SETS[s].hub_id, "revision": ", ".join(sorted(commits)) or None}
                  for s, commits in self.commits.items()]
        return found + [{"set": s, "from": where} for s, where in self.elsewhere.items()]


_READING: ContextVar[Reading | None] = ContextVar("reading", default=None)


@contextmanager
def reading(revision: str | None = None) -> Iterator[Reading]:
    """Pin the hub revision of the sets that are read inside, and learn what was read: see :class:`Reading`."""
    found = Reading(revision)
    token = _READING.set(found)
    try:
        yield found
    finally:
        _READING.reset(token)


def hub_commit(rows: Any) -> str | None:
    """The hub's commit of a ``datasets.Dataset``: its cache folder is named so. None for other sources."""
    names = {Path(file["filename"]).parent.name for file in getattr(rows, "cache_files", None) or ()}
    commits = {name for name in names if re.fullmatch("[0-9a-f]{40}", name)}
    return commits.pop() if len(commits) == 1 else None


# --- loading ---------------------------------------------------------------------------------------------------------


def data_folder(data_dir: Path | str | None = None) -> tuple[Path | None, bool]:
    """The data folder, and whether it was named (by argument or ``$TSUGIKI_DATA``) or is the default ``../shared/data``.

    Raises:
        UserError: a folder was named and is not there.
    """
    named = data_dir or os.environ.get("TSUGIKI_DATA")
    if named:
        folder = Path(named).expanduser()
        if not folder.is_dir():
            raise UserError("there is no such folder", where=f"{'--data-dir' if data_dir else 'TSUGIKI_DATA'} {folder}")
        return folder, True
    for root in (Path(__file__).resolve().parents[1], Path.cwd()):
        if (root.parent / "shared" / "data").is_dir():
            return root.parent / "shared" / "data", False
    return None, False


def load_set(
    name: str,
    data_dir: Path | str | None = None,
    *,
    config: str | None = None,
    splits: Iterable[str] | None = None,
) -> dict[str, list[Row]]:
    """Rows by split, in the publisher's order.

    From ``data_dir``, else ``$TSUGIKI_DATA``, else ``../shared/data``; where no folder is named and the set is not in
    the default one, from the hub through ``datasets`` (parquet or JSON only: no remote code). A named folder means
    offline: nothing is fetched.

    Args:
        name: one of :data:`SETS`.
        config: one of the set's ``configs`` (a language, a subject); all of them when None.
        splits: only these; else all that are there.

    Raises:
        UserError: unknown set, configuration or split; the set is not there (says where it comes from, under which
            licence and where to put it); a file is malformed, short or lacks a column.
    """
    found = _set(name)
    configs = _configs(found, config)
    wanted = tuple(splits) if splits is not None else tuple(found.files)
    unknown = [s for s in wanted if s not in found.files]
    raise_problems([f"{s!r}" for s in unknown], what=f"{name} has no such split", hint=f"It has {', '.join(found.files)}.")
    required = [s for s in wanted if splits is not None or s not in found.optional]
    folder, named = data_folder(data_dir)
    paths = _paths(found, folder, wanted, configs) if folder else {}
    missing = [s for s in required if not paths.get(s)]
    seen = _READING.get() or Reading()
    revision = seen.revision
    if revision and not found.hub_id:
        raise UserError(f"revision {revision!r} was asked for, and {found.title} is not read from the hub", where=name,
                        hint="Leave --revision out for this task.")
    if not missing:
        if revision:
            raise UserError(f"revision {revision!r} of {found.hub_id} was asked for, and the set lies in {folder}", where=name,
                            hint="A folder's files have no hub revision: leave --revision out, or name another folder with --data-dir.")
        if _READING.get():
            seen.files.setdefault(name, {}).update({str(f.relative_to(folder)): sha256_file(f) for files in paths.values() for f in files})
        rows = {split: _read(found, files) for split, files in paths.items() if files}
        rows = {split: _only(found, r, config) for split, r in rows.items()}
    elif named or not _on_hub(found):
        raise _absent(found, missing, folder, named)
    else:
        rows = _from_hub(replace(found, revision=revision or found.revision), [s for s in wanted if s in required], configs)
    for split, r in rows.items():
        if not r:
            raise UserError("no rows", where=f"{name}/{split}", hint=_how_to_get(found, folder))
    return rows


def check_sets(data_dir: Path | str | None = None) -> list[dict]:
    """What of :data:`SETS` is in the data folder; reads the files, never the hub.

    Returns:
        One dictionary a set: name, title, found, n and expected (split -> rows), licence, redistributable, url, hub_id,
        config, revision, problem (empty when all is well).
    """
    folder, _ = data_folder(data_dir)
    report = []
    for s in SETS.values():
        n, problem = {}, ""
        paths = _paths(s, folder, tuple(s.files), s.configs) if folder else {}
        try:
            n = {split: len(_read(s, files)) for split, files in paths.items() if files}
        except UserError as error:
            problem = str(error).split("\n")[0]
        short = [split for split in s.files if split not in s.optional and not paths.get(split)]
        found = not short
        if not problem and any(paths.values()) and short:
            problem = f"no {', '.join(short)}"
        if not problem and found:
            wrong = [f"{split}: {n[split]:,} rows, {want:,} expected" for split, want in s.counts.items() if n.get(split, want) != want]
            problem = "; ".join(wrong)
        report.append({"name": s.name, "title": s.title, "found": found, "n": n, "expected": dict(s.counts),
                       "licence": s.licence, "redistributable": s.redistributable, "url": s.url, "hub_id": s.hub_id,
                       "config": s.config, "revision": s.revision, "problem": problem})  # fmt: skip
    return report


def _set(name: str) -> DataSet:
    if name not in SETS:
        raise UserError(f"no benchmark data is named {name!r}", hint=f"Known: {', '.join(SETS)}.")
    return SETS[name]


def _configs(s: DataSet, config: str | None) -> tuple[str, ...]:
    if config is None:
        return s.configs
    if config not in s.configs:
        raise UserError(f"{s.name} has no {s.column or 'configuration'} {config!r}", hint=f"Known: {', '.join(s.configs) or 'none'}.")
    return (config,)


def _paths(s: DataSet, folder: Path, splits: Iterable[str], configs: tuple[str, ...]) -> dict[str, list[Path]]:
    """Split -> its files; none when one of them is missing."""
    root = folder / "benchmarks" / (s.folder or s.name)
    found = {}
    for split in splits:
        names = [n.replace("{config}", c) for n in s.files[split] for c in (configs if "{config}" in n else ("",))]
        paths = [root / n for n in names]
        found[split] = paths if all(p.is_file() for p in paths) else []
    return found


def _read(s: DataSet, files: list[Path]) -> list[Row]:
    rows = []
    for path in files:
        try:
            read = (s.read or data_files.read_lines)(path)
        except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, KeyError, TypeError, IndexError, AttributeError) as error:
            raise UserError(f"not in this set's format: {type(error).__name__}: {error}", where=str(path)) from error
        if s.column and s.read is None:  # hub rows written as JSON Lines, one folder a configuration
            read = [{**row, s.column: row.get(s.column, path.parent.name)} for row in read]
        _check_columns(s, read, str(path))
        rows += read
    return rows


def _check_columns(s: DataSet, rows: list[Row], where: str) -> None:
    problems = [f"{where} (row {i + 1}): no column {c!r}" for i, row in enumerate(rows) for c in s.columns if c not in row]
    raise_problems(problems, what=f"{s.title}: missing columns", hint=f"Expected: {', '.join(s.columns)}.")


def _only(s: DataSet, rows: list[Row], config: str | None) -> list[Row]:
    return rows if config is None else [row for row in rows if row[s.column] == config]


def _on_hub(s: DataSet) -> bool:
    return s.hub_id is not None or s.name == "wmt20"


def _from_hub(s: DataSet, splits: list[str], configs: tuple[str, ...]) -> dict[str, list[Row]]:
    if s.name in ("jmmlu", "jmmlu_nc_nd"):
        return {"test": _jmmlu_from_hub(s, configs)}
    if s.name == "wmt20":
        return {"test": _wmt20_from_sacrebleu(s, configs)}
    rows: dict[str, list[Row]] = {split: [] for split in splits}
    for config in configs or (None,):
        for split in splits:
            for row in _hub_rows(s, config or s.config, s.hub_splits.get(split, split)):
                row = s.reshape(row) if s.reshape else row
                rows[split].append({s.column: config, **row} if s.column else row)
    for split, r in rows.items():
        _check_columns(s, r, f"{s.hub_id} ({split})")
    return rows


def _hub_rows(s: DataSet, config: str | None, split: str) -> list[Row]:
    import datasets

    with _asking_the_hub(s, f"{s.hub_id} ({config or 'default'}, {split})"):
        try:
            rows = datasets.load_dataset(s.hub_id, config, revision=s.revision, split=split)
        except RuntimeError as error:  # a repository with a loading script, which is not run: the hub's own conversion of it
            if "no longer supported" not in str(error) or s.revision:
                raise
            rows = datasets.load_dataset(s.hub_id, data_dir=config or "default", revision="refs/convert/parquet", split=split)
        _note_commit(s.name, hub_commit(rows))
        return list(rows)


def _jmmlu_from_hub(s: DataSet, configs: tuple[str, ...]) -> list[Row]:
    from huggingface_hub import hf_hub_download

    with _asking_the_hub(s, f"{s.hub_id} (JMMLU.zip)"):
        archive = hf_hub_download(s.hub_id, "JMMLU.zip", repo_type="dataset", revision=s.revision)
    _note_commit(s.name, Path(archive).parent.name)  # …/snapshots/<commit>/JMMLU.zip
    return data_files.jmmlu_zip_rows(Path(archive), configs)


@contextmanager
def _asking_the_hub(s: DataSet, where: str) -> Iterator[None]:
    """Where the hub does not answer at all, only its cache is looked into: no half a minute of tries for every set.

    Raises:
        UserError: whatever went wrong inside, with where else the set is had.
    """
    import datasets
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    silent = not any(before) and not Path(s.hub_id or "").is_dir() and not hub_answers(constants.ENDPOINT)
    if silent:
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    except Exception as error:  # the libraries raise a dozen kinds: network, gate, script, configuration
        reason = f"{type(error).__name__}: {str(error).strip().split(chr(10))[0]}"
        reason = f"{constants.ENDPOINT} does not answer, and nothing of it is in the cache" if silent else reason
        raise UserError(f"{s.title} could not be loaded from the hub: {reason}", where=where, hint=_how_to_get(s, None)) from error
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


@lru_cache(maxsize=1)
def hub_answers(endpoint: str) -> bool:
    """Whether the hub can be reached, asked once in a process and for at most 5 s."""
    try:
        with urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=5):
            return True
    except urllib.error.HTTPError:  # it answers
        return True
    except (OSError, http.client.HTTPException):
        return False


def _note_commit(name: str, commit: str | None) -> None:
    if seen := _READING.get():
        seen.commits.setdefault(name, set()).update({commit} if commit else ())


def _wmt20_from_sacrebleu(s: DataSet, configs: tuple[str, ...]) -> list[Row]:
    from sacrebleu.utils import get_reference_files, get_source_file

    rows = []
    for pair in configs:
        try:
            paths = [Path(get_source_file("wmt20", pair)), Path(get_reference_files("wmt20", pair)[0])]
            if seen := _READING.get():
                seen.elsewhere["wmt20"] = "sacrebleu"
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"sacrebleu could not fetch WMT20: {reason}", where=pair, hint=_how_to_get(s, None)) from error
        texts = [p.read_text(encoding="utf-8").rstrip("\n").split("\n") for p in paths]
        rows += [{"pair": pair, "source": a, "reference": b} for a, b in zip(*texts, strict=True)]
    return rows


def _how_to_get(s: DataSet, folder: Path | None) -> str:
    root = f"{folder or '<data-dir>'}/benchmarks/{s.folder or s.name}/"
    names = list(dict.fromkeys(n for group in s.files.values() for n in group))
    listed = ", ".join(names).replace("{config}", f"<{s.column}>")
    if s.hub_id and names[0].endswith(".jsonl"):  # the publisher's files are the hub's: JSON Lines are made from them
        config = f", <{s.column}>" if s.configs else f", {s.config!r}" if s.config else ""
        listed += f" (datasets.load_dataset({s.hub_id!r}{config}, split=…).to_json(…, force_ascii=False))"
    which = f" <{s.column}> is one of {', '.join(s.configs)}." if 0 < len(s.configs) <= 12 and "{config}" in names[0] else ""
    keep = "" if s.redistributable else " Read it only: this licence forbids passing on changed copies."
    return f"It comes from {s.url}. Licence: {s.licence}. Put {listed} into {root}.{which}{keep} {s.note}".rstrip()


def _absent(s: DataSet, missing: list[str], folder: Path | None, named: bool) -> UserError:
    where = f"in {folder}" if folder else "there is no data folder"
    instead = " Or leave out --data-dir and TSUGIKI_DATA to load it from the hub." if named and _on_hub(s) else ""
    return UserError(
        f"{s.title}: no data for {', '.join(missing)} ({where})", where=s.name, hint=_how_to_get(s, folder) + instead
    )
