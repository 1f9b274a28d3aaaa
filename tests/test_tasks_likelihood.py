"""The graded measures ask for the right answers of the benchmarks' own rows, and score them as a plain loop does."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval")

from tsugiki.artifacts import read_jsonl
from tsugiki.evaluate.data import load_set
from tsugiki.evaluate.run import BenchmarkSettings, Model, items_path, run_benchmarks
from tsugiki.evaluate.suites import TASKS, load_benchmarks, task_files
from tsugiki.evaluate.tasks import docs_likelihood as d
from tsugiki.quantize.convert import convert
from tsugiki.recipes.before_after import QUICK, family_of

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("TSUGIKI_DATA") or ROOT.parent / "shared" / "data")
BASE = ROOT / "recipes" / "bases" / "tiny-llama"
shared = pytest.mark.skipif(not (DATA / "benchmarks").is_dir(), reason="the shared benchmarks are not here")


@shared
@pytest.mark.parametrize("name", sorted(d._PAIRS))
def test_every_item_is_there_once_and_the_task_says_how_many(name):
    rows = d.likelihood(name, DATA)["test"]
    meta = task_files(TASKS)[f"tsugiki_likelihood_{name}"]["metadata"]
    assert len(rows) == len(set(rows["id"])) == meta["n"]
    assert family_of(meta, name) in ("culture", "neutral")


@shared
def test_the_right_answer_is_the_rows_own():
    jmmlu = d.likelihood("jmmlu_culture", DATA)["test"]
    assert [i.split("/")[0] for i in jmmlu["id"][:5]] == list(d.CULTURE)  # a limit sees all five subjects
    first = load_set("jmmlu", DATA, config="japanese_history")["test"][0]
    assert jmmlu[0]["target"] == first[first["answer"]] and first["question"].strip() in jmmlu[0]["prompt"]
    wino = load_set("xwinograd", DATA, config="jp")["test"]
    for row, doc in zip(wino, d.likelihood("xwinograd_ja", DATA)["test"], strict=True):
        before, after = row["sentence"].split("_", 1)
        assert doc["prompt"] == before + (row["option1"], row["option2"])[int(row["answer"]) - 1] and doc["target"] == after.strip()
    assert "-" not in d.likelihood("niilc", DATA)["test"]["target"]


def test_a_probability_is_per_character():
    found = d.score({"target": "四文字だ"}, [(4 * math.log(0.25), False)])
    assert found == pytest.approx({"log2_probability": -2.0, "char_probability": 0.25})


@shared
def test_scores_equal_a_plain_loop_over_transformers_item_by_item(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv("TSUGIKI_DATA", str(DATA))
    convert(BASE, tmp_path / "base.gguf")
    name = "tsugiki_likelihood_jcommonsenseqa"
    benchmarks, _ = load_benchmarks((), (name,))
    rows = run_benchmarks([Model("base", tmp_path / "base.gguf")], benchmarks, BenchmarkSettings(limit=6), out=tmp_path / "out")
    tokenizer, model = AutoTokenizer.from_pretrained(BASE), AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
    expected = []
    for row in load_set("jcommonsenseqa", DATA, splits=["valid"])["valid"][:6]:
        prompt, answer = f"質問：{row['question']}\n答え：", row[f"choice{row['label']}"]
        head = len(tokenizer(prompt)["input_ids"])
        ids = tokenizer(prompt + answer)["input_ids"]
        with torch.no_grad():
            logp = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        expected.append(sum(float(logp[i - 1, ids[i]]) for i in range(head, len(ids))) / math.log(2) / len(answer))
    items = read_jsonl(items_path(tmp_path / "out", "base", name))
    assert [i["score"] for i in items] == pytest.approx(expected, abs=0.01)
    (main,) = [r for r in rows if r["main"]]
    assert (main["metric"], main["value"]) == ("log2_probability", pytest.approx(sum(expected) / 6, abs=0.01))


def test_the_default_choice_is_of_bundled_tasks_of_both_families():
    known = task_files(TASKS)
    families = {family_of(known[n]["metadata"], str(known[n]["metadata"].get("law_task") or n)) for n in QUICK}
    assert families == {"culture", "neutral"}
