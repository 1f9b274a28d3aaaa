"""``tsugiki evaluate run``: scores as a plain loop over transformers finds them, results where others look for them,
and every mistake one sentence before anything is computed. Sets and models are small; nothing needs the network."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tsugiki.artifacts import read_json, read_jsonl, write_json
from tsugiki.errors import UserError
from tsugiki.evaluate.run import BenchmarkSettings, find_models, items_path, model_folder
from tsugiki.evaluate.suites import load_benchmarks, task_files
from tsugiki.quantize.convert import convert
from tsugiki.results import read_results

BASES = Path(__file__).resolve().parents[1] / "recipes" / "bases"
BASE = BASES / "tiny-llama"
ROWS = [
    {"id": f"law-{i}", "document": f"d{i // 2}", "question": f"{i}番の設備の点検は何か月ごとですか。", "options": ["毎日", "三か月ごと", "年に一度です", "六"], "gold": i % 4}
    for i in range(10)
]  # fmt: skip
OPTIONS = """\
task: try_options
dataset_path: json
dataset_kwargs: {data_files: {test: DATA, shots: DATA}}
test_split: test
fewshot_split: shots
num_fewshot: 2
output_type: multiple_choice
doc_to_text: "問い：{{question}}\\n答え："
doc_to_choice: options
doc_to_target: gold
target_delimiter: ""
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
metadata: {version: 1.0, bos: never, law_task: jmmlu, main_metric: acc, suite: [domain], revision: abc, licence: CC0, hub_id: me/mine}
"""
ANSWERS = """\
task: try_answers
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "問い：{{question}}\\n答え："
doc_to_target: "{{options[1]}}"
generation_kwargs: {until: ["。", "\\n"], max_gen_toks: 9, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
filter_list:
  - name: number
    filter: [{function: regex, regex_pattern: "([一二三四五六七八九0-9]+)"}, {function: take_first}]
  - name: raw
    filter: [{function: take_first}]
metadata: {version: 1.0, bos: model, main_metric: "exact_match,raw"}
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of the user's own tasks on local JSON."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in ROWS), encoding="utf-8")
    for name, text in (("options", OPTIONS), ("answers", ANSWERS)):
        (folder / f"{name}.yaml").write_text(text.replace("DATA", str(data)), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "base.gguf"
    convert(BASE, path)
    return path


@pytest.fixture
def tsugiki_(console, monkeypatch):
    """The console script on a wide terminal, off the hub."""
    monkeypatch.setenv("COLUMNS", "200")
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("TSUGIKI_DATA", os.environ.get("TSUGIKI_DATA", ""))  # put back what --data-dir sets
    return console


# --- scores -----------------------------------------------------------------------------------------------------


def shots_of(count: int) -> list[list[int]]:
    """Which rows lm-eval shows before each question: drawn anew each time from one generator, seed 1234."""
    import random

    rng = random.Random(1234)
    return [rng.sample(range(len(ROWS)), 2) for _ in range(count)]


def plain_loop() -> list[int]:
    """The likeliest option of each item by transformers, one text at a time, prompts written out here, no BOS."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(BASE)
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()

    def ask(row: dict) -> str:
        return f"問い：{row['question']}\n答え："

    picked = []
    for row, shots in zip(ROWS, shots_of(len(ROWS)), strict=True):
        prompt = "".join(ask(ROWS[s]) + ROWS[s]["options"][ROWS[s]["gold"]] + "\n\n" for s in shots) + ask(row)
        head = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        scores = []
        for option in row["options"]:
            ids = tokenizer(prompt + option, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logp = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            scores.append(sum(float(logp[i - 1, ids[i]]) for i in range(len(head), len(ids))))
        picked.append(int(np.argmax(scores)))
    return picked


@pytest.fixture(scope="module")
def reference():
    return plain_loop()


def test_scores_equal_a_plain_loop_over_transformers_item_by_item(tsugiki_, tasks, gguf, reference, tmp_path):
    code, out, err = tsugiki_("evaluate", "run", gguf, BASE, "--tasks", "try_options", "--include", tasks)
    assert code == 0, err
    expected = [float(p == row["gold"]) for p, row in zip(reference, ROWS, strict=True)]
    assert 0 < sum(expected) < len(expected)
    for model in ("base", "tiny-llama"):
        items = read_jsonl(items_path(tmp_path / "runs" / "benchmarks", model, "try_options"))
        assert [i["score"] for i in items] == expected
        assert [i["id"] for i in items] == [r["id"] for r in ROWS] and [i["document"] for i in items] == [r["document"] for r in ROWS]
    assert f"{np.mean(expected):.3f}" in out and "± s.e." in out


def test_bundled_tasks_answer_as_a_plain_loop_over_transformers_with_the_same_prompts(tsugiki_, gguf, tmp_path):
    shared = Path(os.environ.get("TSUGIKI_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
    if not all((shared / "benchmarks" / name).is_dir() for name in ("niilc", "lawqa_jp")):
        pytest.skip("the shared data is not here")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    code, _out, err = tsugiki_("evaluate", "run", gguf, "--tasks", "tsugiki_takase_niilc,tsugiki_lawqa_jp", "--limit", 5, "--data-dir", shared)
    assert code == 0, err
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
    folder = tmp_path / "runs" / "benchmarks" / "base"
    options = read_jsonl(next(folder.glob("samples_tsugiki_lawqa_jp_*.jsonl")))
    for sample, item in zip(options, read_jsonl(items_path(folder.parent, "base", "tsugiki_lawqa_jp")), strict=True):
        scores = []
        for asked in sample["arguments"].values():
            head = tokenizer(asked["arg_0"])["input_ids"]  # with BOS, as the tokenizer has it: the task says `bos: model`
            ids = torch.tensor([tokenizer(asked["arg_0"] + asked["arg_1"])["input_ids"]])
            with torch.no_grad():
                logp = model(ids).logits[0].double().log_softmax(-1)
            scores.append(sum(float(logp[i - 1, ids[0, i]]) for i in range(len(head), ids.shape[1])))
        assert item["score"] == float(np.argmax(scores) == int(sample["target"]))
        assert [float(r[0][0]) for r in sample["resps"]] == pytest.approx(scores, abs=0.02)
    answers = read_jsonl(next(folder.glob("samples_tsugiki_takase_niilc_*.jsonl")))
    for sample, item in zip(answers, read_jsonl(items_path(folder.parent, "base", "tsugiki_takase_niilc")), strict=True):
        asked = sample["arguments"]["gen_args_0"]
        ids = tokenizer(asked["arg_0"], add_special_tokens=False, return_tensors="pt")["input_ids"]  # `bos: never`
        with torch.no_grad():
            whole = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=64, pad_token_id=0)
        assert item["text"] == tokenizer.decode(whole[0, ids.shape[1]:], skip_special_tokens=True).split("\n")[0]


def test_a_score_is_kept_in_lm_evals_layout_and_in_the_results_table(tsugiki_, tasks, gguf, tmp_path):
    code, _out, err = tsugiki_("evaluate", "run", gguf, "--tasks", "try_options,try_answers", "--include", tasks)
    assert code == 0, err
    folder = model_folder(tmp_path / "runs" / "benchmarks", "base")
    kept = read_json(next(folder.glob("results_*.json")))
    assert set(kept["results"]) == {"try_options", "try_answers"} == set(kept["configs"]) and kept["n-samples"]["try_options"]["effective"] == 10
    samples = read_jsonl(next(folder.glob("samples_try_options_*.jsonl")))
    assert len(samples) == 10 and samples[0]["doc"]["id"] == "law-0" and samples[0]["arguments"]["gen_args_0"]["arg_0"].endswith("答え：")
    rows = {(r["task"], r["metric"]): r for r in read_results(tmp_path / "runs" / "results.sqlite")}
    assert set(rows) == {("jmmlu", "acc"), ("jmmlu", "acc_norm,none"), ("try_answers", "exact_match"), ("try_answers", "exact_match,number")}
    row = rows["jmmlu", "acc"]
    assert row["value"] == kept["results"]["try_options"]["acc,none"] and row["n"] == 10 and row["model"] == "base"
    said = row["settings"]
    assert (said["shots"], said["shots_seed"], said["bos"], said["limit"], said["prompts_cut"]) == (2, 1234, "never", None, 0)
    assert said["data"] == {"hub_id": "me/mine", "revision": "abc", "github": None, "commit": None, "read": []}
    answers = rows["try_answers", "exact_match"]["settings"]
    assert answers["stop"] == ["。", "\n"] and answers["max_new_tokens"] == 9 and 0 <= answers["truncated"] <= 1


def test_the_standard_error_takes_a_documents_items_together(tsugiki_, tasks, gguf, tmp_path):
    tsugiki_("evaluate", "run", gguf, "--tasks", "try_options", "--include", tasks)
    (row,) = [r for r in read_results(tmp_path / "runs" / "results.sqlite") if r["metric"] == "acc"]
    items = read_jsonl(items_path(tmp_path / "runs" / "benchmarks", "base", "try_options"))
    sums = np.zeros(5)
    for item in items:
        sums[int(item["document"][1:])] += item["score"] - row["value"]
    assert row["stderr"] == pytest.approx(np.sqrt(5 / 4 * (sums**2).sum()) / 10)


def test_unparsed_and_truncated_answers_are_counted(tsugiki_, tasks, gguf, tmp_path):
    text = (tasks / "answers.yaml").read_text(encoding="utf-8").replace("exact_match,raw", "exact_match,number").replace("try_answers", "try_numbers")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "numbers.yaml").write_text(text, encoding="utf-8")
    code, _out, err = tsugiki_("evaluate", "run", gguf, "--tasks", "try_numbers", "--include", mine)
    assert code == 0, err
    (row,) = [r for r in read_results(tmp_path / "runs" / "results.sqlite") if r["metric"] == "exact_match"]
    items = read_jsonl(items_path(tmp_path / "runs" / "benchmarks", "base", "try_numbers"))
    import re

    assert [i["unparsed"] for i in items] == [not re.search("[一二三四五六七八九0-9]", i["text"]) for i in items]
    assert row["settings"]["unparsed"] == np.mean([i["unparsed"] for i in items])
    assert row["settings"]["truncated"] == np.mean([i["truncated"] for i in items])
    # an answer that reached its nine tokens did not end by itself
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(BASE)
    longest = [len(tokenizer(i["text"], add_special_tokens=False)["input_ids"]) for i in items]
    assert all(i["truncated"] for i, n in zip(items, longest, strict=True) if n >= 9)


def test_near_ties_of_greedy_answers_are_counted_shown_and_kept(tsugiki_, tasks, gguf, tmp_path):
    """Answers of which some pick leads by less than 0.01 nats, by transformers' logits on the same ids."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    code, out, err = tsugiki_("evaluate", "run", gguf, "--tasks", "try_answers,try_options", "--include", tasks)
    assert code == 0, err
    items = {i["id"]: i for i in read_jsonl(items_path(tmp_path / "runs" / "benchmarks", "base", "try_answers"))}
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
    for row in ROWS:
        ids = tokenizer(f"問い：{row['question']}\n答え：", return_tensors="pt")["input_ids"]
        leads = []
        for _ in range(9):
            with torch.no_grad():
                best = model(ids).logits[0, -1].double().log_softmax(-1).topk(2)
            leads.append(float(best.values[0] - best.values[1]))
            ids = torch.cat([ids, best.indices[None, :1]], 1)
        if min(abs(lead - 0.01) for lead in leads) > 0.005:  # F16 weights move a lead a little
            assert items[row["id"]]["ties"] <= sum(lead < 0.01 for lead in leads)
    said = read_json(next((tmp_path / "runs" / "benchmarks" / "base").glob("results_*.json")))["tsugiki"]
    assert said["try_answers"]["ties"] == sum(i["ties"] > 0 for i in items.values())
    assert said["try_options"]["ties"] is None  # nothing is picked there
    assert "ties" in out


@pytest.mark.parametrize(("lead", "ties"), [(0.0, 1), (0.5, 0)])
def test_an_answer_whose_two_likeliest_tokens_are_equal_is_a_tie(lead, ties, tmp_path):
    """A model whose output layer gives two tokens logits that differ by ``lead``, and 0 to all others."""
    from lm_eval.api.instance import Instance
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tsugiki.evaluate.harness import TsugikiGGUF

    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    ids = torch.tensor([AutoTokenizer.from_pretrained(BASE)("油")["input_ids"]])
    with torch.no_grad():
        hidden = model.model(ids).last_hidden_state[0, -1]
        model.lm_head.weight.zero_()
        for token, logit in ((300, 8.0), (301, 8.0 - lead)):
            model.lm_head.weight[token] = logit * hidden / hidden.norm() ** 2
    shutil.copytree(BASE, tmp_path / "tied")
    model.save_pretrained(tmp_path / "tied")
    convert(tmp_path / "tied", tmp_path / "tied.gguf")
    with TsugikiGGUF(tmp_path / "tied.gguf", tokenizer=BASE) as lm:
        asked = ("油", {"until": [], "max_gen_toks": 1, "do_sample": False})
        lm.generate_until([Instance("generate_until", {}, asked, 0, metadata=("t", 0, 1))], disable_tqdm=True)
        assert lm.ties == {("t", 0): ties}


def test_a_limited_run_says_so_everywhere(tsugiki_, tasks, gguf, tmp_path):
    code, out, err = tsugiki_("evaluate", "run", gguf, "--tasks", "try_options", "--include", tasks, "--limit", 3)
    assert code == 0, err
    assert "only the first 3 items" in out and "first 3 items only" in err
    rows = read_results(tmp_path / "runs" / "results.sqlite")
    assert {r["task"] for r in rows} == {"jmmlu[:3]"} and {r["settings"]["limit"] for r in rows} == {3} and {r["n"] for r in rows} == {3}
    kept = read_json(next(model_folder(tmp_path / "runs" / "benchmarks", "base").glob("results_*.json")))
    assert kept["config"]["limit"] == 3


def test_a_run_again_replaces_its_own_rows(tsugiki_, tasks, gguf, tmp_path):
    for _ in range(2):
        tsugiki_("evaluate", "run", gguf, "--tasks", "try_options", "--include", tasks)
    rows = read_results(tmp_path / "runs" / "results.sqlite")
    assert len(rows) == len({(r["model"], r["task"], r["metric"]) for r in rows}) == 2


def test_a_run_that_was_stopped_goes_on_where_it_was(tsugiki_, tasks, gguf, tmp_path, monkeypatch):
    from tsugiki.evaluate.engine import Engine

    whole = Engine.generate
    asked: list[int] = []

    def stops_in_the_middle(self, prompts, *, on_result, **options):
        asked.append(len(prompts))
        given = 0

        def count(i, result):
            nonlocal given
            on_result(i, result)
            given += 1
            if given == 4 and len(asked) == 1:
                raise KeyboardInterrupt

        return whole(self, prompts, on_result=count, **options)

    monkeypatch.setattr(Engine, "generate", stops_in_the_middle)
    arguments = ("evaluate", "run", gguf, "--tasks", "try_answers", "--include", tasks)
    code, _out, _err = tsugiki_(*arguments)
    assert code != 0 and not items_path(tmp_path / "runs" / "benchmarks", "base", "try_answers").exists()
    code, _out, err = tsugiki_(*arguments)
    assert code == 0 and asked == [10, 6], err
    again = tsugiki_(*arguments)
    assert again[0] == 0 and asked == [10, 6]  # everything is kept
    texts = [i["text"] for i in read_jsonl(items_path(tmp_path / "runs" / "benchmarks", "base", "try_answers"))]
    tsugiki_(*arguments, "--out", tmp_path / "afresh")
    assert asked == [10, 6, 10]
    assert texts == [i["text"] for i in read_jsonl(items_path(tmp_path / "afresh", "base", "try_answers"))]


def test_a_hugging_face_model_is_not_asked_twice(tsugiki_, tasks, tmp_path, monkeypatch):
    from lm_eval.models.huggingface import HFLM

    arguments = ("evaluate", "run", BASE, "--tasks", "try_options", "--include", tasks, "--limit", 3)
    assert tsugiki_(*arguments)[0] == 0
    first = read_jsonl(items_path(tmp_path / "runs" / "benchmarks", "tiny-llama", "try_options"))
    monkeypatch.setattr(HFLM, "_model_call", lambda *_: pytest.fail("it was asked again"))
    assert tsugiki_(*arguments)[0] == 0
    assert first == read_jsonl(items_path(tmp_path / "runs" / "benchmarks", "tiny-llama", "try_options"))


# --- models of a run --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory, gguf):
    """A run whose base, adapted model and level are all the same file: what matters is where they lie."""
    root = tmp_path_factory.mktemp("runs")
    folder = root / "setsubi" / "tiny-llama"
    for name in ("gguf/base-F16.gguf", "gguf/model-F16.gguf", "levels/model-Q4_K_M.gguf"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(gguf, folder / name)
    write_json(
        folder / "summary.json",
        {"domain": "setsubi", "base": "tiny-llama", "sweep": {"points": [{"n": 8, "seed": 0, "nll": 1.0, "train_tokens": 99}], "optimum": {"n": 8}},
         "levels": [{"level": "Q4_K_M", "bytes": 4_000_000}]},
    )  # fmt: skip
    return root


def test_base_adapted_and_levels_of_a_run_become_points_of_the_laws(tsugiki_, tasks, runs, tmp_path):
    from tsugiki.bases import load_bases
    from tsugiki.evaluate.scaling.points import read_points
    from tsugiki.evaluate.scaling.tables import load_models
    from tsugiki.recipes.recipe import BASES as NAMED

    shutil.copytree(runs, tmp_path / "runs")
    code, out, err = tsugiki_("evaluate", "run", "setsubi/tiny-llama", "--tasks", "try_options", "--include", tasks)
    assert code == 0, err
    assert [name in out for name in ("setsubi/tiny-llama/base", "setsubi/tiny-llama/adapted", "setsubi/tiny-llama/Q4_K_M")] == [True] * 3
    points, _, _notes = read_points(tmp_path / "runs", load_models(), load_bases(NAMED))
    rows = [r for r in read_results(tmp_path / "runs" / "results.sqlite") if r["metric"] == "acc"]
    value = rows[0]["value"]
    assert [(p.kind, p.scores["jmmlu"].value, p.scores["jmmlu"].n, p.scores["jmmlu"].metric) for p in points] == [
        (kind, value, 10, "acc") for kind in ("base", "adapted", "quantized")
    ]
    assert {r["settings"]["tokenizer"] for r in rows} == {str(BASE)}  # every file was asked the same ids


def test_one_level_of_a_run_can_be_named(runs):
    from tsugiki.bases import load_bases
    from tsugiki.recipes.recipe import BASES as NAMED

    (model,) = find_models(["setsubi/tiny-llama/Q4_K_M"], runs=runs, bases=load_bases(NAMED))
    assert (model.name, model.level, model.base, model.run) == ("setsubi/tiny-llama/Q4_K_M", "Q4_K_M", "tiny-llama", "setsubi/tiny-llama")
    with pytest.raises(UserError, match="Q9_K") as raised:
        find_models(["setsubi/tiny-llama/Q9_K", "nothing.gguf"], runs=runs)
    assert "nothing.gguf" in str(raised.value) and "base, adapted, Q4_K_M" in str(raised.value)


def test_two_models_of_one_name_are_refused(gguf, tmp_path):
    (tmp_path / "a").mkdir()
    twin = shutil.copy(gguf, tmp_path / "a" / gguf.name)
    with pytest.raises(UserError, match="2 models are named 'base'"):
        find_models([str(gguf), str(twin)])


# --- mistakes, before anything is computed ----------------------------------------------------------------------


def broken(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "bad.yaml: empty"),
        ("task: [unclosed\n", "bad.yaml:2: not YAML"),
        ("- a list\n", "dict"),
        ("output_type: generate_until\n", "neither `task: NAME` nor `group: NAME`"),
        ("task: t\nmetadata: {suite: [nowhere]}\n", "there is no suite 'nowhere'"),
        ("task: t\nmetadata: {bos: always}\n", "never or model, not 'always'"),
    ],
)
def test_a_malformed_task_file_is_named_with_its_line(tsugiki_, gguf, tmp_path, text, said):
    code, _out, err = tsugiki_("evaluate", "run", gguf, "--suite", "domain", "--include", broken(tmp_path / "mine", "bad.yaml", text))
    assert code == 2 and "bad.yaml" in err and said in err and "Traceback" not in err
    assert not (tmp_path / "runs").exists()


def test_all_malformed_task_files_are_named_at_once(tmp_path):
    broken(tmp_path, "one.yaml", "")
    broken(tmp_path, "two.yaml", "task: [\n")
    with pytest.raises(UserError, match=r"2 problem") as raised:
        task_files(tmp_path)
    assert "one.yaml" in str(raised.value) and "two.yaml" in str(raised.value)


def test_data_with_a_missing_column_is_named_with_the_columns_there_are(tsugiki_, tasks, gguf, tmp_path):
    text = (tasks / "options.yaml").read_text(encoding="utf-8").replace("{{question}}", "{{inquiry}}")
    code, _out, err = tsugiki_("evaluate", "run", gguf, "--tasks", "try_options", "--include", broken(tmp_path / "mine", "t.yaml", text))
    assert code == 2 and "'inquiry' is undefined" in err and "document, question, options, gold" in err
    assert not (tmp_path / "runs").exists()


def test_a_task_that_lm_eval_cannot_build_is_named(tsugiki_, tasks, gguf, tmp_path):
    text = (tasks / "options.yaml").read_text(encoding="utf-8").replace("multiple_choice", "many_choices")
    code, _out, err = tsugiki_("evaluate", "run", gguf, "--tasks", "try_options", "--include", broken(tmp_path / "mine", "t.yaml", text))
    assert code == 2 and "many_choices" in err and "t.yaml" in err and not (tmp_path / "runs").exists()


def test_a_main_metric_that_the_task_lacks_is_named(tsugiki_, tasks, gguf, tmp_path):
    text = (tasks / "options.yaml").read_text(encoding="utf-8").replace("main_metric: acc", "main_metric: f1")
    code, _out, err = tsugiki_("evaluate", "run", gguf, "--tasks", "try_options", "--include", broken(tmp_path / "mine", "t.yaml", text))
    assert code == 2 and "main_metric is 'f1', the task has acc, acc_norm" in err


def test_a_chat_without_a_template_is_refused(tsugiki_, tasks, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(BASE, bare)
    (bare / "chat_template.jinja").unlink(missing_ok=True)
    settings = read_json(bare / "tokenizer_config.json")
    settings.pop("chat_template", None)
    write_json(bare / "tokenizer_config.json", settings)
    code, _out, err = tsugiki_("evaluate", "run", bare, "--tasks", "try_options", "--include", tasks, "--chat")
    assert code == 2 and "bare has no chat template" in err and not (tmp_path / "runs").exists()


def test_a_chat_task_goes_through_the_files_template(tsugiki_, tasks, gguf, tmp_path):
    code, _out, err = tsugiki_("evaluate", "run", gguf, BASE, "--tasks", "try_answers", "--include", tasks, "--chat", "--limit", 4)
    assert code == 0, err
    both = [read_jsonl(items_path(tmp_path / "runs" / "benchmarks", m, "try_answers")) for m in ("base", "tiny-llama")]
    assert [i["text"] for i in both[0]] == [i["text"] for i in both[1]]
    asked = read_jsonl(next(model_folder(tmp_path / "runs" / "benchmarks", "base").glob("samples_*.jsonl")))[0]["arguments"]["gen_args_0"]["arg_0"]
    assert asked.startswith("<|begin_of_text|>") and asked.endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")


def test_a_context_too_small_for_the_shots_is_refused_with_both_numbers(tsugiki_, tasks, gguf, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(BASE)
    code, _out, err = tsugiki_("evaluate", "run", gguf, "--tasks", "try_options", "--include", tasks, "--context", 24)
    assert code == 2 and "context of 24" in err and not (tmp_path / "runs").exists()
    longest = max(
        len(tokenizer(_prompt(row, shots) + option, add_special_tokens=True)["input_ids"])
        for row, shots in zip(ROWS, shots_of(10), strict=True) for option in row["options"]
    )  # fmt: skip
    assert f"its longest prompt has {longest} tokens" in err


def _prompt(row: dict, shots: list[int]) -> str:
    ask = "問い：{question}\n答え：".format
    return "".join(ask(**ROWS[s]) + ROWS[s]["options"][ROWS[s]["gold"]] + "\n\n" for s in shots) + ask(**row)


def test_an_unknown_task_suite_or_model_is_named(tsugiki_, tasks, gguf, tmp_path):
    for arguments, said in (
        ((gguf, "--suite", "cultures"), "there is no suite 'cultures'"),
        ((tmp_path / "none.gguf", "--suite", "culture"), "none.gguf"),
        ((gguf,), "no task was chosen"),
        ((gguf, "--suite", "culture", "--limit", 0), "limit must be at least 1, not 0"),
        ((gguf, "--tasks", tmp_path / "no.yaml"), "there is no such task file"),
    ):
        code, _out, err = tsugiki_("evaluate", "run", *arguments)
        assert code == 2 and said in err and "Traceback" not in err, arguments


# --- data that is not here --------------------------------------------------------------------------------------


def test_a_suite_goes_on_without_a_set_that_is_not_here(tsugiki_, tasks, gguf, tmp_path):
    text = (tasks / "options.yaml").read_text(encoding="utf-8").replace("suite: [domain]", "suite: [culture]")
    mine = broken(tmp_path / "mine", "t.yaml", text)
    (tmp_path / "empty").mkdir()
    code, out, err = tsugiki_("evaluate", "run", gguf, "--suite", "culture", "--include", mine, "--data-dir", tmp_path / "empty", "--limit", 2)
    assert code == 0, err
    assert "try_options" in out and "Not run: tsugiki_takase_jaqket" in err
    assert "sbintuitions/aio-extended-answers" in err and "Licence:" in err  # where it comes from, and under what


def test_a_task_that_was_named_does_not_go_missing_silently(tsugiki_, gguf, tmp_path):
    (tmp_path / "empty").mkdir()
    code, _out, err = tsugiki_("evaluate", "run", gguf, "--tasks", "tsugiki_takase_jaqket", "--data-dir", tmp_path / "empty")
    assert code == 2 and "Licence:" in err and not (tmp_path / "runs").exists()


def test_code_of_models_is_not_run_unasked(monkeypatch):
    shared = Path(os.environ.get("TSUGIKI_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
    unsafe = [n for n, c in task_files(Path(__file__).resolve().parents[1] / "evaluate" / "tasks").items() if c.get("unsafe_code")]
    if not (shared / "benchmarks" / "humaneval").is_dir() or not unsafe:
        pytest.skip("no task with code, or its data is not here")
    monkeypatch.setenv("TSUGIKI_DATA", str(shared))
    with pytest.raises(UserError, match="--allow-code"):
        load_benchmarks((), unsafe[:1])


def test_the_data_commands_say_what_is_here_and_where_the_rest_is_from(tsugiki_, tmp_path):
    from tsugiki.evaluate.data import SETS

    code, out, _ = tsugiki_("evaluate", "data", "list")
    assert code == 0 and all(name in out for name in SETS)
    (tmp_path / "data").mkdir()
    code, out, _ = tsugiki_("evaluate", "data", "check", "--data-dir", tmp_path / "data")
    assert code == 0 and out.count(" no ") >= len(SETS) - 1
    (tmp_path / "data" / "benchmarks" / "mgsm").mkdir(parents=True)
    (tmp_path / "data" / "benchmarks" / "mgsm" / "exemplars.json").write_text("{", encoding="utf-8")
    code, out, err = tsugiki_("evaluate", "data", "check", "--data-dir", tmp_path / "data")
    assert code == 2 and "mgsm" in err and "not JSON" in err


def test_settings_are_refused_where_they_are_impossible():
    with pytest.raises(UserError, match="batch_size must be at least 1, not 0"):
        BenchmarkSettings(batch_size=0)
