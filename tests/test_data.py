"""Benchmark data comes from the user's folder or the hub, in the same columns, and what is missing says how to get it."""

from __future__ import annotations

import csv
import gzip
import json
import os
import shutil
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from tsugiki.errors import UserError
from tsugiki.evaluate import data, data_files
from tsugiki.evaluate.data import SETS, check_sets, load_set

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("TSUGIKI_DATA") or ROOT.parent / "shared" / "data")
shared = pytest.mark.skipif(not (DATA / "benchmarks").is_dir(), reason="the shared benchmarks are not here")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty data folder; nothing outside it counts."""
    monkeypatch.delenv("TSUGIKI_DATA", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def put(folder: Path, path: str, text: str | bytes) -> Path:
    target = folder / "benchmarks" / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(text if isinstance(text, bytes) else text.encode())
    return target


# --- the real data -----------------------------------------------------------------------------------------------


@shared
def test_every_set_at_hand_is_whole():
    report = {r["name"]: r for r in check_sets(DATA)}
    assert set(report) == set(SETS)
    assert {name: r["problem"] for name, r in report.items() if r["problem"]} == {}
    for name in ("mgsm", "jmmlu", "jmmlu_nc_nd", "niilc", "lawqa_jp", "jcommonsenseqa", "jsquad", "jemhopqa", "gsm8k",
                 "humaneval", "jhumaneval", "bbh", "xwinograd", "mt_bench_ja"):  # fmt: skip
        assert report[name]["found"], name
        assert report[name]["n"] | report[name]["expected"] == report[name]["n"], name
    for name in ("mmlu_prox", "jaqket", "xlsum_ja", "wmt20", "mmlu", "triviaqa", "openbookqa", "hellaswag", "squad2"):
        assert name in report


@shared
def test_jmmlu_is_read_with_its_byte_order_marks_line_breaks_and_lone_carriage_returns():
    rows = load_set("jmmlu", DATA)["test"] + load_set("jmmlu_nc_nd", DATA)["test"]
    assert len(rows) == 7536
    counts = Counter(row["subject"] for row in rows)
    assert [counts[s] for s in ("japanese_history", "world_history", "japanese_civics", "japanese_geography", "japanese_idiom")] == [
        150, 150, 150, 139, 150,
    ]  # fmt: skip
    assert not any(row["question"].startswith("\ufeff") for row in rows)
    assert any("\n" in row["question"] for row in rows) and any("\r" in row["question"] for row in rows)
    assert {row["answer"] for row in rows} == set("ABCD")


@shared
def test_mgsm_answers_lose_their_thousands_separators_in_every_language():
    rows = load_set("mgsm", DATA)["test"]
    for language in data.MGSM_LANGUAGES:
        numbers = [row["answer_number"] for row in rows if row["language"] == language]
        assert len(numbers) == 250 and {2125, 114200, 276000, 5600} <= set(numbers)


@shared
def test_niilc_has_two_test_questions_without_an_answer_and_128_with_a_single_one():
    rows = load_set("niilc", DATA)["test"]
    assert sum(row["answers"] == ["-"] for row in rows) == 2
    assert sum(row["D_3"] == ["唯一"] for row in rows) == 128


@shared
def test_lawqa_is_unbalanced_as_published_and_balanced_over_four_orders():
    rows = load_set("lawqa_jp", DATA)
    assert Counter(r["output"] for r in rows["test"]) == {"c": 48, "b": 37, "d": 32, "a": 23}
    assert set(Counter(r["output"] for r in rows["randomized"]).values()) == {140}
    assert set(Counter(r["ファイル名"] for r in rows["randomized"]).values()) == {4}


@shared
def test_xwino_sentences_have_one_blank_that_an_option_fills():
    for language, n in (("en", 2325), ("jp", 959), ("fr", 83), ("pt", 263), ("ru", 315), ("zh", 16)):
        rows = load_set("xwinograd", DATA, config=language)["test"]
        assert len(rows) == n
        assert all(row["sentence"].count("_") == 1 and row["answer"] in "12" for row in rows)
    english = load_set("xwinograd", DATA, config="en")["test"][0]
    assert english == {
        "language": "en", "sentence": "The city councilmen refused the demonstrators a permit because _ feared violence.",
        "option1": "The city councilmen", "option2": "the demonstrators", "answer": "1",
    }  # fmt: skip


@shared
def test_bbh_examples_leave_their_canary_behind():
    rows = load_set("bbh", DATA)["cot_prompts"]
    assert len(rows) == 27
    assert not any("canary" in row["target"].lower() or row["target"].startswith("-----") for row in rows)


def test_no_derivatives_sets_are_marked():
    assert [s.name for s in SETS.values() if not s.redistributable] == ["jmmlu_nc_nd"]
    assert set(SETS["jmmlu_nc_nd"].configs) == {"japanese_civics", "japanese_geography", "japanese_idiom"}


def test_llm_jp_evals_order_of_subjects_is_the_pages_order():
    assert len(data.JMMLU_SUBJECTS) == 53 and data.JMMLU_SUBJECTS[:2] == ("econometrics", "human_aging")
    assert data.JMMLU_SUBJECTS[-1] == "marketing"


# --- what is missing or wrong ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(SETS))
def test_a_set_that_is_not_there_says_where_it_comes_from_its_licence_and_where_to_put_it(name, folder):
    with pytest.raises(UserError) as error:
        load_set(name, folder)
    s, message = SETS[name], str(error.value)
    assert s.title in message and s.url in message and s.licence in message
    assert f"{folder}/benchmarks/{s.folder or s.name}/" in message
    if not s.redistributable:
        assert "forbids passing on" in message


def test_a_named_folder_means_offline(folder, monkeypatch):
    monkeypatch.setattr(data, "_hub_rows", lambda *_: pytest.fail("the hub was asked"))
    with pytest.raises(UserError, match="leave out --data-dir"):
        load_set("gsm8k", folder)
    monkeypatch.setenv("TSUGIKI_DATA", str(folder))
    with pytest.raises(UserError, match="leave out --data-dir"):
        load_set("gsm8k")


def test_a_folder_that_does_not_exist_is_named(folder, monkeypatch):
    with pytest.raises(UserError, match=r"--data-dir .*nowhere: there is no such folder"):
        load_set("gsm8k", folder / "nowhere")
    monkeypatch.setenv("TSUGIKI_DATA", str(folder / "nowhere"))
    with pytest.raises(UserError, match=r"TSUGIKI_DATA .*nowhere"):
        load_set("gsm8k")


def test_unknown_names_list_the_known_ones(folder):
    with pytest.raises(UserError, match="gsm8k"):
        load_set("gsm9k", folder)
    with pytest.raises(UserError, match=r"language 'kr'[\s\S]*ja"):
        load_set("mgsm", folder, config="kr")
    with pytest.raises(UserError, match=r"no such split[\s\S]*train, test"):
        load_set("gsm8k", folder, splits=["dev"])


def test_a_missing_column_names_the_file_the_row_and_the_column(folder):
    rows = [{"question": "a", "answer": "1"}, {"question": "b"}]
    path = put(folder, "gsm8k/test.jsonl", "\n".join(map(json.dumps, rows)))
    put(folder, "gsm8k/train.jsonl", json.dumps(rows[0]))
    with pytest.raises(UserError) as error:
        load_set("gsm8k", folder)
    assert f"{path} (row 2): no column 'answer'" in str(error.value)
    assert next(r["problem"] for r in check_sets(folder) if r["name"] == "gsm8k").startswith("GSM8K: missing columns")


@pytest.mark.parametrize(
    ("path", "name", "content", "says"),
    [
        ("gsm8k/test.jsonl", "gsm8k", "{not json", "not JSON"),
        ("gsm8k/test.jsonl", "gsm8k", "[1]", "an object was expected"),
        ("gsm8k/test.jsonl", "gsm8k", b"\xff\xfe\x00", "not in this set's format"),
        ("gsm8k/test.jsonl", "gsm8k", "", "no rows"),
        ("humaneval/HumanEval.jsonl.gz", "humaneval", b"no gzip", "not in this set's format"),
        ("niilc/NIILC-ECQA2015_test.xml", "niilc", "<questions><question>", "not XML"),
        ("lawqa_jp/selection.json", "lawqa_jp", '{"items": []}', "'samples'"),
        ("jglue/jsquad-v1.3/test-v1.3.json", "jsquad", '{"data": [{"title": "t"}]}', "not in this set's format"),
        ("xwinograd/dataset.tsv", "xwinograd", "en\tonly three\tcells", "seven cells"),
        ("jemhopqa/corpus/dev.json", "jemhopqa", "{}", "a list of objects"),
    ],
)
def test_a_malformed_file_is_one_sentence_that_names_it(path, name, content, says, folder):
    put(folder, path, content)
    s = SETS[name]
    split = next(k for k, files in s.files.items() if path.endswith(files[0]))
    with pytest.raises(UserError) as error:
        load_set(name, folder, splits=[split])
    assert says in str(error.value)
    assert path.rpartition("/")[2] in str(error.value) or says == "no rows"


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ("q,a,b,c,d,E\n", r"six cells ending in A–D"),
        ("q,a,b,c,D\n", r"found 5 \(?|found 5"),
    ],
)
def test_a_jmmlu_row_must_have_six_cells(rows, says, folder):
    put(folder, "jmmlu/JMMLU/anatomy.csv", rows)
    with pytest.raises(UserError, match=says):
        load_set("jmmlu", folder, config="anatomy")


def test_an_mgsm_answer_must_be_a_number(folder):
    put(folder, "mgsm/mgsm_ja.tsv", "問\t18\n問2\tたくさん\n")
    with pytest.raises(UserError, match=r"mgsm_ja.tsv:2"):
        load_set("mgsm", folder, config="ja", splits=["test"])


def test_a_short_file_is_reported_with_both_numbers(folder):
    row = json.dumps({"question": "q", "answer": "a"})
    put(folder, "gsm8k/train.jsonl", row)
    put(folder, "gsm8k/test.jsonl", row)
    report = next(r for r in check_sets(folder) if r["name"] == "gsm8k")
    assert report["found"] and report["n"] == {"train": 1, "test": 1}
    assert "1,319 expected" in report["problem"] and "7,473 expected" in report["problem"]


def test_half_a_set_is_not_found_and_says_what_is_missing(folder):
    put(folder, "gsm8k/test.jsonl", json.dumps({"question": "q", "answer": "a"}))
    report = next(r for r in check_sets(folder) if r["name"] == "gsm8k")
    assert not report["found"] and report["problem"] == "no train"


def test_one_split_can_be_asked_for_where_another_is_missing(folder):
    put(folder, "gsm8k/test.jsonl", json.dumps({"question": "q", "answer": "a"}))
    assert list(load_set("gsm8k", folder, splits=["test"])) == ["test"]


def test_jmmlu_rows_keep_what_a_spreadsheet_parser_must_not_lose(folder):
    path = folder / "benchmarks" / "jmmlu" / "JMMLU" / "anatomy.csv"
    path.parent.mkdir(parents=True)
    cells = [["一行目\n二行目", "1.50", "NA", "a, b", '"引用"', "C"], ["CR\rの中", "甲", "乙", "丙", "丁", "D"]]
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows(cells)
    rows = load_set("jmmlu", folder, config="anatomy")["test"]
    assert [[row[c] for c in data_files.JMMLU_COLUMNS] for row in rows] == cells


# --- the hub -----------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """No data folder at all: the hub is the source. A folder laid out as a repository stands in for the network."""
    import datasets

    monkeypatch.delenv("TSUGIKI_DATA", raising=False)
    monkeypatch.setattr(data, "data_folder", lambda _=None: (None, False))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "repository").mkdir()

    def stand_in(name: str, **changes) -> Path:
        monkeypatch.setitem(SETS, name, replace(SETS[name], hub_id=str(tmp_path / "repository"), **changes))
        return tmp_path / "repository"

    return stand_in


def test_the_hub_route_loads_a_repository_through_datasets(hub):
    repository = hub("gsm8k", config=None)
    rows = [{"question": f"q{i}", "answer": f"#### {i}"} for i in range(3)]
    for split in ("train", "test"):
        (repository / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert load_set("gsm8k") == {"train": rows, "test": rows}


def test_a_hub_set_of_many_languages_gets_the_column_that_the_files_have(hub):
    repository = hub("mgsm", configs=("ja", "en"))
    configs = []
    for language in ("ja", "en"):
        (repository / language).mkdir(parents=True)
        for split in ("train", "test"):
            row = {"question": language, "answer": "a", "answer_number": 3, "equation_solution": None}
            (repository / language / f"{split}.jsonl").write_text(json.dumps(row), encoding="utf-8")
        files = [{"split": s, "path": f"{language}/{s}.jsonl"} for s in ("train", "test")]
        configs.append({"config_name": language, "data_files": files})
    (repository / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n", encoding="utf-8")
    found = load_set("mgsm", config="en")
    assert found["test"] == [{"language": "en", "question": "en", "answer": "a", "answer_number": 3, "equation_solution": None}]
    assert [row["language"] for row in load_set("mgsm")["test"]] == ["ja", "en"]


def test_a_hub_set_that_lost_a_column_says_so(hub):
    repository = hub("gsm8k", config=None)
    for split in ("train", "test"):
        (repository / f"{split}.jsonl").write_text(json.dumps({"question": "q", "solution": "1"}), encoding="utf-8")
    with pytest.raises(UserError, match="no column 'answer'"):
        load_set("gsm8k")


def test_a_hub_that_cannot_be_reached_says_where_else_the_set_is_had(hub):
    hub("gsm8k", config=None)  # an empty repository
    with pytest.raises(UserError) as error:
        load_set("gsm8k")
    assert "could not be loaded from the hub" in str(error.value) and SETS["gsm8k"].url in str(error.value)
    assert error.value.hint.startswith("It comes from")


def test_a_set_that_is_on_no_hub_is_missing_without_a_folder(hub):
    with pytest.raises(UserError, match="there is no data folder"):
        load_set("lawqa_jp")


def test_the_hubs_jmmlu_archive_is_read_in_place(tmp_path):
    archive = tmp_path / "JMMLU.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("JMMLU/test/anatomy.csv", "\ufeffquestion,A,B,C,D,answer\n問,甲,乙,丙,丁,B\n")
        file.writestr("__MACOSX/JMMLU/test/._anatomy.csv", b"\xff\x00")
    rows = data_files.jmmlu_zip_rows(archive, ["anatomy"])
    assert rows == [{"subject": "anatomy", "question": "問", "A": "甲", "B": "乙", "C": "丙", "D": "丁", "answer": "B"}]
    assert list(tmp_path.iterdir()) == [archive]  # nothing was unpacked beside it
    with pytest.raises(UserError, match="virology"):
        data_files.jmmlu_zip_rows(archive, ["virology"])


def test_hub_rows_written_as_json_lines_are_the_same_set(tmp_path):
    """The layout that the sentence about a missing set asks for, here with MMLU-ProX's columns."""
    row = {"question_id": 1, "question": "q", **{f"option_{i}": None for i in range(10)}, "answer": "A", "cot_content": "c",
           "category": "law"}  # fmt: skip
    for language in ("ja", "en"):
        for split in ("validation", "test"):
            put(tmp_path, f"mmlu_prox/{language}/{split}.jsonl", json.dumps(row))
    found = load_set("mmlu_prox", tmp_path, config="ja")
    assert found["test"] == [{**row, "language": "ja"}]
    assert len(load_set("mmlu_prox", tmp_path)["test"]) == 2


def test_wmt20_is_read_from_sacrebleus_two_files(tmp_path):
    for pair in ("en-ja", "ja-en"):
        put(tmp_path, f"wmt20/wmt20.{pair}.src", "a\nb\n")
        put(tmp_path, f"wmt20/wmt20.{pair}.ref", "甲\n乙\n")
    assert load_set("wmt20", tmp_path, config="ja-en")["test"][1] == {"pair": "ja-en", "source": "b", "reference": "乙"}
    put(tmp_path, "wmt20/wmt20.en-ja.ref", "甲\n")
    with pytest.raises(UserError, match="2 source lines, 1 reference lines"):
        load_set("wmt20", tmp_path)


def test_gzipped_and_plain_json_lines_are_the_same(tmp_path):
    row = {"task_id": "t", "prompt": "p", "entry_point": "e", "canonical_solution": "c", "test": "t"}
    put(tmp_path, "humaneval/HumanEval.jsonl.gz", gzip.compress(json.dumps(row).encode()))
    assert load_set("humaneval", tmp_path)["test"] == [row]


@shared
def test_reading_writes_nothing_beside_the_data(tmp_path):
    """The no-derivatives files above all."""
    source = DATA / "benchmarks" / "jmmlu" / "JMMLU_NC_ND"
    target = tmp_path / "benchmarks" / "jmmlu" / "JMMLU_NC_ND"
    shutil.copytree(source, target)
    before = {p.name: p.stat().st_mtime_ns for p in target.iterdir()}
    load_set("jmmlu_nc_nd", tmp_path)
    assert {p.name: p.stat().st_mtime_ns for p in target.iterdir()} == before
    assert [p for p in tmp_path.rglob("*") if p.is_file() and p.parent != target] == []


@shared
def test_the_blank_of_an_xwino_sentence_stands_for_its_pronoun_wherever_the_word_occurs_before():
    lines = (DATA / "benchmarks" / "xwinograd" / "dataset.tsv").read_text(encoding="utf-8").splitlines()
    for row, line in zip(load_set("xwinograd", DATA)["test"], lines, strict=True):
        text, (_, pronoun, candidates) = line.split("\t")[3], map(json.loads, line.split("\t")[4:])
        before, after = row["sentence"].split("_")
        assert text.startswith(before) and text.endswith(after)
        assert text[len(before) : len(text) - len(after)].replace(" ", "") == pronoun[0].replace(" ", "")
        right = next(c[0] for c in candidates if c[-1])
        assert row[f"option{row['answer']}"] == right
