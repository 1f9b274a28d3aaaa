"""Gained, forgotten, taken: real models of a small run, on benchmarks from a folder of invented rows."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tsugiki.artifacts import read_jsonl, write_json
from tsugiki.errors import UserError
from tsugiki.evaluate.domain import Answer
from tsugiki.recipes import before_after as module
from tsugiki.recipes.before_after import BenchmarkChoice, before_after, domain_change, family_of, measure_benchmarks
from tsugiki.recipes.domains import load_domain
from tsugiki.recipes.recipe import settle
from tsugiki.results import read_results
from tsugiki.samples import Sample, write_encoded

BASE = Path(__file__).resolve().parents[1] / "recipes" / "bases" / "tiny-llama"
DOMAIN = dataclasses.replace(load_domain("setsubi"), scoring="char_f1", max_new_tokens=6)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run's folder: the base, as "adapted" the base with other weights in one layer, and one level of that."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tsugiki.chat import encode, end_of_turn_id
    from tsugiki.quantize.convert import convert
    from tsugiki.quantize.levels import make_level

    folder = tmp_path_factory.mktemp("runs") / "setsubi" / "tiny-llama"
    for name in ("data", "gguf", "levels", "check"):
        (folder / name).mkdir(parents=True)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    samples = [Sample(f"s{i}", f"ポンプP-{100 + i}の油は何ですか。", f"油{i % 3}", f"d{i // 2}", ("rule", "fact")[i % 2]) for i in range(24)]
    write_encoded(folder / "data" / "test.jsonl", encode(tokenizer, samples))
    write_json(folder / "data" / "data.json", {"end_of_turn": end_of_turn_id(tokenizer)})
    other = folder / "other"
    shutil.copytree(BASE, other)
    model = AutoModelForCausalLM.from_pretrained(BASE)
    model.model.layers[1].mlp.down_proj.weight.data *= 0.3
    model.save_pretrained(other)
    convert(BASE, folder / "gguf" / "base-F16.gguf")
    convert(other, folder / "gguf" / "model-F16.gguf")
    make_level(folder / "gguf" / "model-F16.gguf", "Q4_K_M", folder / "levels" / "model-Q4_K_M.gguf")
    write_json(folder / "check" / "check.json", {"recommended": {"level": "Q4_K_M"}})
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A data folder that holds JEMHopQA's files with invented rows, and nothing else."""
    folder = tmp_path_factory.mktemp("data")
    corpus = folder / "benchmarks" / "jemhopqa" / "corpus"
    corpus.mkdir(parents=True)
    for name, number in (("train", 12), ("dev", 30)):
        rows = [{"qid": f"{name}{i}", "type": "comparison", "question": f"第{i}工場と第{i + 1}工場はどちらが古いですか。", "answer": f"第{i}工場"}
                for i in range(number)]
        (corpus / f"{name}.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def found(run, data):
    choice = BenchmarkChoice(tasks=("tsugiki_saito_jemhopqa", "tsugiki_saito_niilc"), limit=12)
    out = run / "evaluate"
    return before_after(run, DOMAIN, out, items=20, benchmarks=choice, data_dir=data, tokenizer=BASE, results=run.parents[1] / "results.sqlite")


def test_every_model_is_measured_on_the_same_items(found, run):
    rows = [r for r in found["rows"] if r.get("family")]
    assert {(r["model"], r["family"], r["task"], r["metric"], r["n"]) for r in rows} == {
        (m, "culture", "jemhopqa[:12]", "char_f1", 12) for m in ("base", "adapted", "Q4_K_M")
    }
    own = {(r["model"], r["task"], r["n"]) for r in found["rows"] if not r.get("family")}
    assert own == {(m, t, n) for m in ("base", "adapted") for t, n in (("setsubi", 20), ("setsubi/rule", 10), ("setsubi/fact", 10))}


def test_differences_are_those_of_the_kept_items_by_plain_arithmetic(found, run):
    steps = [c for c in found["changes"] if c["family"] == "culture"]
    assert [(c["from"], c["to"]) for c in steps] == [("base", "adapted"), ("adapted", "Q4_K_M")]
    kept = {p.parent.name.rpartition("__")[2]: p for p in (run / "evaluate" / "benchmarks").rglob("items-*.jsonl")}
    scores = {m: {r["id"]: r["score"] for r in read_jsonl(kept[m])} for m in ("base", "adapted", "Q4_K_M")}
    for step in steps:
        a, b = scores[step["from"]], scores[step["to"]]
        assert a.keys() == b.keys() and step["n"] == 12
        assert step["difference"] == pytest.approx(np.mean([b[i] - a[i] for i in a]))
        assert (step["better"], step["worse"]) == (sum(b[i] > a[i] for i in a), sum(b[i] < a[i] for i in a))
        assert step["ci"][0] <= step["difference"] <= step["ci"][1]


def test_what_was_not_measured_is_said_without_a_path_of_this_machine(found, data):
    [missing] = found["not_measured"]
    assert missing["task"] == "tsugiki_saito_niilc" and "NIILC" in missing["why"]
    assert str(data.parent) not in missing["why"]


def test_the_answers_are_kept_for_a_judge(found, run):
    from tsugiki.evaluate.judge import answer_files, read_answers
    from tsugiki.evaluate.rubric import load_rubric

    files = answer_files([run])
    assert set(files) == {"base", "adapted"}
    rows = read_answers(files["adapted"], load_rubric("domain"))
    assert len(rows) == 20 and rows[0]["question"].startswith("ポンプP-") and rows[0]["reference"].startswith("油")


def test_a_levels_answers_are_made_on_demand_and_once(found, run, tmp_path):
    write_json(run / "evaluate" / "evaluate.json", found)
    path = module.level_answers(run, "Q4_K_M", tmp_path)
    rows = read_jsonl(path)
    assert [r["id"] for r in rows] == [r["id"] for r in read_jsonl(run / "evaluate" / "answers-adapted.jsonl")]
    before = path.stat().st_mtime_ns
    assert module.level_answers(run, "Q4_K_M", tmp_path) == path and path.stat().st_mtime_ns == before
    with pytest.raises(UserError, match="It has Q4_K_M"):
        module.level_answers(run, "Q5_K_M", tmp_path)


def test_benchmark_rows_reach_the_results_table_under_the_laws_names(found, run):
    rows = read_results(run.parents[1] / "results.sqlite")
    kept = {r["model"]: r["value"] for r in rows if r["task"] == "jemhopqa[:12]" and r["metric"] == "char_f1"}
    shown = {f"setsubi/tiny-llama/{r['model']}": r["value"] for r in found["rows"] if r.get("family")}
    assert kept == pytest.approx(shown)


def test_all_items_are_measured_under_the_name_that_the_laws_know(run, data, tmp_path):
    choice = BenchmarkChoice(tasks=("tsugiki_saito_jemhopqa",), limit=0)
    rows = measure_benchmarks(run, tmp_path, choice, data_dir=data, tokenizer=BASE)["rows"]
    assert {(r["task"], r["n"]) for r in rows} == {("jemhopqa", 30)}


def test_without_data_nothing_is_measured_and_every_task_says_why(run, tmp_path, monkeypatch):
    empty = tmp_path / "empty"
    empty.mkdir()
    found = measure_benchmarks(run, tmp_path / "out", BenchmarkChoice(), data_dir=empty)
    assert found["rows"] == found["changes"] == []
    assert [m["task"] for m in found["not_measured"]] == list(module.QUICK)
    monkeypatch.setattr(module, "data_folder", lambda _: (None, False))
    found = measure_benchmarks(run, tmp_path / "out", BenchmarkChoice())
    assert all("no folder of benchmark data" in m["why"] for m in found["not_measured"]) and len(found["not_measured"]) == len(module.QUICK)


def test_a_task_that_does_not_fit_the_models_leaves_the_others(run, data, tmp_path):
    """A task of the user's whose prompt is longer than any context."""
    long = tmp_path / "long.yaml"
    (tmp_path / "long.jsonl").write_text(json.dumps({"q": "長" * 9000, "a": "短"}, ensure_ascii=False) + "\n", encoding="utf-8")
    long.write_text(
        f"task: long\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'long.jsonl'}}}}}\ntest_split: test\n"
        "output_type: generate_until\ndoc_to_text: q\ndoc_to_target: a\nmetric_list: [{metric: exact_match}]\nmetadata: {suite: [domain]}\n",
        encoding="utf-8",
    )
    found = measure_benchmarks(run, tmp_path / "out", BenchmarkChoice(tasks=("tsugiki_saito_jemhopqa", str(long)), limit=12), data_dir=data)
    assert {r["name"] for r in found["rows"]} == {"tsugiki_saito_jemhopqa"}
    [missing] = found["not_measured"]
    assert missing["task"] == "long" and "longest prompt has" in missing["why"]


def test_adaptation_is_compared_item_by_item():
    def answers(scores):
        return [Answer(str(i), f"d{i}", "", "", "", float(s), "stop", 0.0) for i, s in enumerate(scores)]

    step = domain_change(DOMAIN, {"base": answers([0] * 30), "adapted": answers([1] * 20 + [0] * 10)})
    assert (step["difference"], step["change"], step["better"], step["worse"]) == (pytest.approx(2 / 3), "gained", 20, 0)


@pytest.mark.parametrize(
    ("suite", "task", "family"),
    [("culture", "niilcqa", "culture"), (["saito19"], "niilc", "culture"), (["saito19"], "jmmlu", "neutral"),
     (["domain"], "lawqa_jp", "domain"), (["saito19"], "jsquad", "other"), (None, "mine", "other")],
)  # fmt: skip
def test_tasks_belong_to_a_family(suite, task, family):
    assert family_of({"suite": suite}, task) == family


def test_the_choice_is_set_like_every_setting():
    settings = settle(load_domain("setsubi"), ["evaluate.tasks=[]", "evaluate.suites=[culture,neutral]", "evaluate.limit=0"], large=False)
    assert settings.evaluate == BenchmarkChoice(tasks=(), suites=("culture", "neutral"), limit=0)
    with pytest.raises(UserError, match="at least 0"):
        settle(load_domain("setsubi"), ["evaluate.limit=-1"], large=False)
