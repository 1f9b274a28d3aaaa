"""Domains: every mistake in a YAML is told with file and key; bundled domains and a user's own file lead to samples."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from tsugiki.adapt.samples import FieldMapping, NearDuplicates
from tsugiki.errors import UserError
from tsugiki.recipes.domains import (
    BUNDLED,
    count_kinds,
    data_files,
    domain_digest,
    init_domain,
    list_domains,
    load_domain,
    load_splits,
    show_found,
    sweep_counts,
)

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("TSUGIKI_DATA") or ROOT.parent / "shared" / "data")
CONSTRUCTION = DATA / "corpora" / "law_qa" / "construction"
needs_data = pytest.mark.skipif(not CONSTRUCTION.is_dir(), reason="the law questions are not on this machine")

GOOD = {
    "title": {"ja": "試験", "en": "Trial"},
    "licence": "CC0",
    "source": {"jsonl": "qa.jsonl"},
    "fields": {"prompt": "質問", "completion": "回答"},
    "scoring": "exact_match",
    "sweep": {"counts": [10, 20]},
}


def write_domain(tmp_path, name="mine", **changes) -> Path:
    value = {k: v for k, v in (GOOD | changes).items() if v != "absent"}
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(value, allow_unicode=True), encoding="utf-8")
    return path


def write_data(path: Path, count: int = 200, **extra) -> Path:
    rows = [{"質問": f"設備{i}の点検は何か月ごとですか。番号は{i * i}です。", "回答": f"{i % 5 + 1}か月", **extra} for i in range(count)]
    path.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows), encoding="utf-8")
    return path


# --- the YAML ---


@pytest.mark.parametrize("name", list_domains(ROOT / "none"))
def test_every_bundled_domain_is_valid_and_says_how_it_is_run(name):
    domain = load_domain(name)
    assert set(domain.title) == {"ja", "en"}
    assert f"make recipe DOMAIN={name}" in domain.path.read_text(encoding="utf-8").splitlines()[0]


def test_setsubi_and_construction_are_bundled():
    assert {"setsubi", "construction"} <= set(list_domains())
    assert load_domain("setsubi").near_duplicates is None
    assert load_domain("construction").sweep["counts"] == [250, 500, 1000, 2000]
    assert load_domain("construction").system


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"titel": "x"}, "mine.yaml (titel): unknown key; known are title"),
        ({"licence": "absent"}, "mine.yaml (licence): the key is missing"),
        ({"max_new_tokens": "64"}, "mine.yaml (max_new_tokens): a whole number is needed, not '64'"),
        ({"max_tokens": True}, "mine.yaml (max_tokens): a whole number is needed, not True"),
        ({"check_items": 0}, "mine.yaml (check_items): 0 is not at least 1"),
        ({"scoring": "bleu"}, "mine.yaml (scoring): 'bleu' is not one of exact_match, char_f1"),
        ({"fields": {"prompt": "質問"}}, "mine.yaml (fields.completion): the key is missing"),
        ({"fields": {"prompt": 1, "completion": "x"}}, "mine.yaml (fields.prompt): text is needed, not 1"),
        ({"source": {"jsonl": "a.jsonl", "generator": "setsubi"}}, "exactly one of generator, jsonl and hub is needed"),
        ({"source": {}}, "mine.yaml (source): exactly one of generator, jsonl and hub is needed, not none"),
        ({"source": {"generator": "plant"}}, "mine.yaml (source.generator): 'plant' is not one of setsubi"),
        ({"source": {"hub": "org/name"}}, "mine.yaml (source.revision): the key is missing"),
        ({"source": {"jsonl": {"test": "a.jsonl"}}}, "mine.yaml (source.jsonl): one file, or train"),
        ({"source": {"jsonl": {"trian": "a.jsonl"}}}, "mine.yaml (source.jsonl.trian)"),
        ({"near_duplicates": {"threshold": 90}}, "mine.yaml (near_duplicates.threshold): 90 is not above 0"),
        ({"sweep": {"counts": [20, 10]}}, "mine.yaml (sweep.counts): an ascending list of whole numbers"),
        ({"sweep": {}}, "mine.yaml (sweep.counts)"),
        ({"valid_share": 0.5, "test_share": 0.6}, "mine.yaml (valid_share, test_share): 0.5 and 0.6"),
        ({"title": {}}, "mine.yaml (title): at least one of ja and en"),
    ],
)
def test_a_mistake_in_the_yaml_is_told_with_file_and_key(tmp_path, changes, message):
    with pytest.raises(UserError) as error:
        load_domain(write_domain(tmp_path, **changes))
    assert message in str(error.value)
    assert "1 problem(s)" in str(error.value)


def test_all_mistakes_are_told_at_once(tmp_path):
    with pytest.raises(UserError) as error:
        load_domain(write_domain(tmp_path, licence="absent", scoring="bleu", colour="red", sweep=[1]))
    assert "4 problem(s)" in str(error.value)


@pytest.mark.parametrize(
    "text, message",
    [("title: {ja: x\nlicence: y", "mine.yaml:"), ("- a\n- b", "mine.yaml: a mapping is needed, not a list"), ("", "null")],
)
def test_what_is_no_mapping_is_refused(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        load_domain(path)


def test_python_objects_in_a_yaml_are_refused(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("title: !!python/object/apply:os.getcwd []", encoding="utf-8")
    with pytest.raises(UserError, match="not YAML"):
        load_domain(path)


@pytest.mark.parametrize("name", ["../etc", "Setsubi", "a b", "", "設備", "-x", "a/b"])
def test_a_name_that_could_leave_its_folder_is_refused(name):
    with pytest.raises(UserError, match="cannot name a domain"):
        load_domain(name)


def test_an_unknown_domain_comes_with_those_that_exist():
    with pytest.raises(UserError, match=r"there are: .*construction.*setsubi"):
        load_domain("hospital")


def test_domains_of_the_working_folder_are_found(tmp_path, monkeypatch):
    (tmp_path / "domains").mkdir()
    write_domain(tmp_path / "domains")
    monkeypatch.chdir(tmp_path)
    assert {"mine", "setsubi"} <= set(list_domains())
    assert load_domain("mine").title["ja"] == "試験"


# --- samples ---


def test_setsubi_needs_no_data_folder_and_loses_nothing():
    splits = load_splits(load_domain("setsubi"))
    assert splits.dropped == {}
    assert len(splits.train) >= 6000
    counts = count_kinds(splits)
    assert set(counts["test"]) == {"rule", "seen_fact", "unanswerable"}
    # A short prefix of the test, as the check uses it, holds every kind.
    prefix = Counter(s.kind for s in splits.test[: load_domain("setsubi").check_items])
    assert min(prefix.values()) >= 30


def test_small_nested_subsets_of_setsubi_hold_every_kind():
    train = load_splits(load_domain("setsubi")).train
    for n in load_domain("setsubi").sweep["counts"]:
        assert len({s.kind for s in train[:n]}) == 3
        assert n <= len(train)


@needs_data
def test_construction_has_the_counts_of_its_record_and_no_article_in_two_splits():
    splits = load_splits(load_domain("construction"), DATA)
    lost = {s: sum(n for reason, n in splits.dropped.items() if reason.startswith(s)) for s in ("train", "valid", "test")}
    report = json.loads((CONSTRUCTION / "report.json").read_text(encoding="utf-8"))
    assert report
    # The record of the data set: 17,615 / 2,126 / 2,591 items from 3,377 / 411 / 467 articles.
    assert [len(getattr(splits, s)) + lost[s] for s in lost] == [17_615, 2_126, 2_591]
    documents = [{x.document for x in getattr(splits, s)} for s in lost]
    assert [len(d) for d in documents] == [3_377, 411, 467]
    assert not documents[0] & documents[1] | documents[0] & documents[2] | documents[1] & documents[2]
    assert splits.train[0].kind


def test_missing_data_says_what_to_get_and_where(tmp_path, monkeypatch):
    monkeypatch.delenv("TSUGIKI_DATA", raising=False)
    with pytest.raises(UserError) as error:
        load_splits(load_domain("construction"), tmp_path)
    text = str(error.value)
    assert "corpora/law_qa/construction/train.jsonl" in text
    assert "https://laws.e-gov.go.jp/" in text and "--data-dir" in text and "Licence: Law text" in text


def test_a_data_folder_that_is_not_there_is_refused(tmp_path, monkeypatch):
    domain = load_domain("construction")
    with pytest.raises(UserError, match=r"--data-dir .*: there is no such folder"):
        data_files(domain, tmp_path / "none")
    monkeypatch.setenv("TSUGIKI_DATA", str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"TSUGIKI_DATA .*: there is no such folder"):
        data_files(domain)


def test_a_file_beside_the_yaml_is_found_and_bad_rows_name_the_file(tmp_path):
    domain = load_domain(write_domain(tmp_path))
    write_data(tmp_path / "qa.jsonl")
    assert sum(len(x) for x in (load_splits(domain).train, load_splits(domain).test)) > 100
    write_data(tmp_path / "qa.jsonl", 3, 質問="")
    with pytest.raises(UserError, match=r"qa.jsonl:2 \(質問\): empty"):
        load_splits(domain)


def test_the_digest_follows_data_and_fields(tmp_path):
    data = write_data(tmp_path / "qa.jsonl")
    first = domain_digest(load_domain(write_domain(tmp_path)))
    assert first == domain_digest(load_domain(write_domain(tmp_path, max_new_tokens=9, sweep={"counts": [5]})))
    assert first != domain_digest(load_domain(write_domain(tmp_path, near_duplicates=None)))
    data.write_text(data.read_text(encoding="utf-8").replace("1か月", "9か月", 1), encoding="utf-8")
    assert first != domain_digest(load_domain(write_domain(tmp_path)))


def test_a_hub_data_set_that_cannot_be_had_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    domain = load_domain(write_domain(tmp_path, source={"hub": str(tmp_path / "nobody"), "revision": "0" * 40}))
    with pytest.raises(UserError, match=r"revision 0{40}, split train\) cannot be loaded") as error:
        load_splits(domain)
    assert "hf auth login" in str(error.value)


def test_a_hub_data_set_is_read_by_the_datasets_library(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    write_data(tmp_path / "set" / "train.jsonl")  # the library takes a folder for an id, too
    domain = load_domain(write_domain(tmp_path, source={"hub": str(tmp_path / "set"), "revision": "main"}))
    write_data(tmp_path / "qa.jsonl")
    same = load_splits(load_domain(write_domain(tmp_path, name="file")))
    assert load_splits(domain).train == same.train


# --- a user's own file ---


def test_init_writes_a_domain_that_loads(tmp_path):
    file = write_data(tmp_path / "点検.jsonl")
    found = init_domain("mine", file, directory=tmp_path / "domains")
    assert (found.fields.prompt, found.fields.completion) == ("質問", "回答")
    assert found.rows == 200
    domain = load_domain("mine", tmp_path / "domains")
    splits = load_splits(domain)
    assert {s: len(getattr(splits, s)) for s in found.splits} == found.splits
    assert domain.sweep["counts"][-1] <= len(splits.train)
    assert domain.scoring == "exact_match"


@pytest.mark.parametrize(
    "row, prompt, completion",
    [
        ({"prompt": "a", "completion": "b"}, "prompt", "completion"),
        ({"Question": "a", "Answer": "b", "id": "1"}, "Question", "Answer"),
        ({"instruction": "a", "output": "b", "input": "c"}, "instruction", "output"),
        ({"質問": "a", "回答": "b"}, "質問", "回答"),
    ],
)
def test_init_knows_the_usual_field_names(tmp_path, row, prompt, completion):
    rows = [{k: f"{v}{i} {i * 7919} {i**3}" for k, v in row.items()} for i in range(100)]
    (tmp_path / "qa.json").write_text(json.dumps(rows), encoding="utf-8")
    found = init_domain("mine", tmp_path / "qa.json", directory=tmp_path / "domains")
    assert (found.fields.prompt, found.fields.completion) == (prompt, completion)


def test_init_takes_the_documents_that_are_there(tmp_path):
    rows = [{"question": f"q{i}", "answer": f"{i}", "document": f"d{i // 4}", "id": i} for i in range(400)]
    (tmp_path / "qa.json").write_text(json.dumps(rows), encoding="utf-8")
    found = init_domain("mine", tmp_path / "qa.json", directory=tmp_path / "domains")
    assert found.fields == FieldMapping("question", "answer", document="document", id="id")
    assert found.documents == 100


def test_init_that_cannot_tell_the_fields_asks_for_them(tmp_path):
    (tmp_path / "qa.csv").write_text("foo,answer\na,b\n", encoding="utf-8")
    with pytest.raises(UserError, match="which field is the question among: answer, foo") as error:
        init_domain("mine", tmp_path / "qa.csv", directory=tmp_path)
    assert "--prompt" in str(error.value)


def test_init_never_overwrites_without_force(tmp_path):
    file = write_data(tmp_path / "qa.jsonl")
    path = init_domain("mine", file, directory=tmp_path).path
    before = path.read_text(encoding="utf-8")
    path.write_text(before + "# mine\n", encoding="utf-8")
    with pytest.raises(UserError, match="there is such a domain already"):
        init_domain("mine", file, directory=tmp_path)
    assert path.read_text(encoding="utf-8").endswith("# mine\n")
    init_domain("mine", file, directory=tmp_path, force=True)
    assert path.read_text(encoding="utf-8") == before
    with pytest.raises(UserError, match="bundled"):
        init_domain("setsubi", file, directory=tmp_path)


def test_init_refuses_bad_rows_and_writes_nothing(tmp_path):
    file = write_data(tmp_path / "qa.jsonl", 3, 回答="")
    with pytest.raises(UserError, match=r"qa.jsonl:3 \(回答\): empty"):
        init_domain("mine", file, directory=tmp_path / "domains")
    assert not (tmp_path / "domains").exists()


def test_init_counts_duplicates_and_shows_lengths_in_tokens(tmp_path):
    transformers = pytest.importorskip("transformers")
    base = BUNDLED.parent / "bases" / "tiny-llama"
    if not (base / "tokenizer.json").is_file():
        pytest.skip("the bundled base is not there")
    rows = [{"質問": f"{chr(0x4E00 + 7 * i) * 30}の番号は?", "回答": str(i)} for i in range(100)]
    hundred = "".join(chr(0x5000 + k) for k in range(100))  # one more character: 91 of 96 10-grams stay
    rows += [*rows[:3], {"質問": hundred, "回答": "x"}, {"質問": hundred + "か", "回答": "x"}, {"質問": "長い" * 300, "回答": "x"}]
    (tmp_path / "qa.json").write_text(json.dumps(rows), encoding="utf-8")
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    found = init_domain("mine", tmp_path / "qa.json", tokenizer=tokenizer, directory=tmp_path)
    assert found.exact_duplicates == 3
    assert found.near_duplicates == 1
    assert found.longest[0] == ("qa.json:item 106", 601)
    assert found.tokens[0] > 0 and found.tokens[-1] > 100
    console = Console(record=True, width=160)
    show_found(found, console)
    text = console.export_text()
    assert "qa.json:item 106 (601 characters)" in text and "prompt ← 質問" in text and "max" in text


@pytest.mark.parametrize("train, counts", [(8786, [500, 1000, 2100, 4300, 8700]), (60, [15, 30, 60]), (5, [5])])
def test_sweep_counts_halve_downward(train, counts):
    got = sweep_counts(train)
    assert got == sorted(got) and got[-1] <= train
    assert abs(len(got) - len(counts)) <= 1 and got[-1] == counts[-1]


def test_the_default_definition_of_near_duplicates_is_the_strict_one():
    assert NearDuplicates() == NearDuplicates(threshold=0.9, ngram=10)
