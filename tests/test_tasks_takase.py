"""Takase & Honda's benchmarks, FlexEval's and lawqa_jp are, as lm-eval tasks, what their definitions say to the letter.

References: the digests are of FlexEval's own prompts (commit 8a07c3c, rendered from its jsonnet files); MGSM and MMLU-ProX
are compared with lm-eval's built-in tasks on the same rows; scores with a plain loop over transformers.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import json
import os
import re
import unicodedata
from collections import Counter
from functools import lru_cache
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from tsugiki.errors import UserError
from tsugiki.evaluate import metrics
from tsugiki.evaluate.data import SETS
from tsugiki.evaluate.tasks import docs_takase

ROOT = Path(__file__).resolve().parents[1]
TASKS = ROOT / "evaluate" / "tasks"
DATA = Path(os.environ.get("TSUGIKI_DATA") or ROOT.parent / "shared" / "data")
SPECS = DATA.parent / "facts" / "eval_specs.json"
BASES = ROOT / "recipes" / "bases"
pytestmark = pytest.mark.skipif(not (DATA / "benchmarks").is_dir(), reason="the shared benchmarks are not here")

FILES = sorted(p for p in TASKS.glob("*.yaml") if p.name.startswith(("takase_", "flexeval_", "lawqa")))
OURS = {c["task"]: c for c in (load_yaml(p, resolve_func=False) for p in FILES) if isinstance(c.get("task"), str)}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("TSUGIKI_DATA", str(DATA))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")


@lru_cache(maxsize=1)
def manager() -> TaskManager:
    return TaskManager(include_path=str(TASKS), include_defaults=False)


@lru_cache
def task(name: str) -> ConfigurableTask:
    os.environ["TSUGIKI_DATA"] = str(DATA)
    return manager().load([name])["tasks"][name]


def prompts(name_or_task, limit: int | None = None) -> list[str]:
    found = task(name_or_task) if isinstance(name_or_task, str) else name_or_task
    found.set_fewshot_seed(seed=1234)
    found.build_all_requests(limit=limit)
    return [instance.args[0] for instance in found.instances]


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def specs() -> dict:
    if not SPECS.is_file():
        pytest.skip("the recorded definitions are not here")
    return json.loads(SPECS.read_text(encoding="utf-8"))


# --- all of them -------------------------------------------------------------------------------------------------


def test_every_task_is_found_without_lm_evals_own():
    assert {n for n in manager().all_tasks if n.startswith(("tsugiki_takase", "tsugiki_flexeval", "tsugiki_lawqa"))} == {
        *OURS, "tsugiki_takase_mgsm", "tsugiki_takase_mgsm_1024",
    }  # fmt: skip


@pytest.mark.parametrize("name", sorted(OURS))
def test_every_task_says_where_it_comes_from_and_how_it_is_run(name):
    config = OURS[name]
    metadata = config["metadata"]
    for key in ("version", "suite", "shots", "seed", "bos", "hub_id", "revision", "licence", "item_id", "document", "main_metric",
                "unparsed_metric"):  # fmt: skip
        assert key in metadata, key
    assert metadata["bos"] == ("never" if "flexeval" in name or name.startswith(FLEXEVAL_STYLE) else "model")
    assert config["num_fewshot"] in (0, metadata["shots"])
    for key in ("main_metric", "unparsed_metric"):
        if metadata[key] is not None:
            metric, _, chosen = metadata[key].partition(",")
            assert metric in {m["metric"] for m in config["metric_list"]}
            assert chosen in {f["name"] for f in config.get("filter_list", [])} | {""}
    if config["output_type"] == "generate_until":
        kwargs = config["generation_kwargs"]
        assert kwargs["do_sample"] is False and kwargs["temperature"] == 0.0 and kwargs["until"] and kwargs["max_gen_toks"]
    by_hub = {(s.hub_id, s.published) for s in SETS.values()}
    published = (metadata["github"], metadata["commit"]) if "github" in metadata else None
    assert (metadata["hub_id"], published) in by_hub
    assert metadata["revision"] is None  # a revision is the hub's: none is pinned


FLEXEVAL_STYLE = ("tsugiki_takase_niilc", "tsugiki_takase_jmmlu", "tsugiki_takase_jaqket")


def test_the_suites_are_the_papers_two_abilities_and_the_domain():
    by_suite = {s: {n for n, c in OURS.items() if s in c["metadata"]["suite"]} for s in ("culture", "neutral", "domain")}
    assert by_suite == {
        "culture": {"tsugiki_takase_niilc", "tsugiki_takase_jmmlu_culture", "tsugiki_takase_jaqket"},
        "neutral": {f"tsugiki_takase_{t}_{la}" for t in ("mgsm", "mmlu_prox") for la in ("ja", "en")},
        "domain": {"tsugiki_lawqa_jp"},
    }


def test_the_data_folder_can_be_passed_through_lm_evals_metadata(tmp_path, monkeypatch):
    monkeypatch.setenv("TSUGIKI_DATA", str(tmp_path))
    elsewhere = TaskManager(include_path=str(TASKS), include_defaults=False, metadata={"data_dir": str(DATA)})
    assert len(elsewhere.load(["tsugiki_takase_niilc"])["tasks"]["tsugiki_takase_niilc"].eval_docs) == 127


def test_the_scaling_tables_columns_are_the_papers_seven_scores():
    with (ROOT / "evaluate" / "scaling" / "data" / "takase_table2_scores.csv").open(encoding="utf-8") as file:
        columns = next(csv.reader(file))[2:]
    named = [c["metadata"]["law_task"] for c in OURS.values() if c["metadata"].get("law_task")]
    assert sorted(named) == sorted(columns)


@pytest.mark.parametrize(
    ("name", "n"),
    [
        ("tsugiki_takase_niilc", 127),
        ("tsugiki_takase_jmmlu_culture", 739),
        ("tsugiki_takase_jmmlu_culture_unleaked", 719),
        ("tsugiki_flexeval_jmmlu", 7536),
        ("tsugiki_flexeval_gsm8k", 1319),
        ("tsugiki_flexeval_mgsm_ja_original", 250),
        ("tsugiki_lawqa_jp", 560),
        ("tsugiki_lawqa_jp_original", 140),
        *[(f"tsugiki_takase_mgsm_{language}", 250) for language in docs_takase.MGSM_PROMPTS],
    ],
)
def test_the_number_of_items(name, n):
    docs = task(name).eval_docs
    assert len(docs) == n == OURS[name]["metadata"]["n"]
    assert len(set(docs["id"])) == n


# --- NIILC -------------------------------------------------------------------------------------------------------


def test_niilcs_template_is_flexevals():
    template = docs_takase.NIILC_HEAD + "質問:: {{ text }}, 回答::"
    assert sha256(template) == "e8b5449c781563408edf3c6212f11fa89601777078330e1baec632625c676cb1"
    assert prompts("tsugiki_takase_niilc", 1) == [template.replace("{{ text }}", "初めてノート型パソコンを作ったメーカーは？")]


def test_niilcs_prompts_are_the_recorded_ones():
    spec = specs()["flexeval"]["niilc"]
    found = task("tsugiki_takase_niilc")
    rows = re.findall(r"<question id=\"(.*?)\">\s*<text>(.*?)</text>", (DATA / "benchmarks/niilc/NIILC-ECQA2015_test.xml").read_text(encoding="utf-8"))
    text = dict(rows)
    assert prompts(found) == [spec["prompt"].replace("{text}", text[i]) for i in found.eval_docs["id"]]
    kwargs = found.config.generation_kwargs
    assert kwargs["until"] == spec["stop"] and kwargs["max_gen_toks"] == spec["max_new_tokens"]
    assert len(found.eval_docs) == spec["n"]


def printed(table: str, column: str) -> list[float]:
    with (ROOT / "evaluate" / "scaling" / "data" / table).open(encoding="utf-8") as file:
        return [float(row[column]) for row in csv.DictReader(file)]


def fit(scores: list[float], n: int) -> int:
    """How many printed scores (percent, one digit) are a number of right answers out of ``n``."""
    possible = {round(100 * k / n, 1) for k in range(n + 1)}
    return sum(score in possible for score in scores)


def test_only_these_numbers_of_items_fit_the_printed_scores():
    niilc, jmmlu = printed("takase_table2_scores.csv", "niilcqa"), printed("takase_table2_scores.csv", "jmmlu_part")
    assert [n for n in range(100, 205) if fit(niilc, n) == 9] == [127]
    assert (fit(jmmlu, 739), fit(jmmlu, 719), fit(jmmlu, 589)) == (9, 7, 5)  # five subjects; less their shots; without world history
    for language in ("En", "Ru", "De", "Fr", "Es", "Ja", "Zh", "Th", "Te", "Bn", "Sw"):
        scores = printed("takase_table1_mgsm.csv", language)
        assert fit(scores, 250) == len(scores)


def test_niilc_counts_any_reference_and_what_is_left_after_normalising():
    doc = {"target": ["J・K・ローリング", "ローリング "]}
    right = task("tsugiki_takase_niilc").process_results(doc, [" 『Ｊ・Ｋ・ローリング』"])
    assert right == {"exact_match": 1.0, "flexeval_char_f1": 1.0, "unparsed": 0.0}
    assert task("tsugiki_takase_niilc").process_results(doc, [" ローリング"])["exact_match"] == 1.0
    empty = task("tsugiki_takase_niilc").process_results(doc, [" ・"])
    assert empty == {"exact_match": 0.0, "flexeval_char_f1": 0.0, "unparsed": 1.0}


# --- JMMLU -------------------------------------------------------------------------------------------------------

FLEXEVALS_PREFIXES = {
    "japanese_history": "42f9de3b30f612f5554562b83d252ef041965044dd008d5d28db183cb7f54428",
    "world_history": "905acf5ef272a51583911f9c3354775858af4316364731ff3d3d0b49e9e9fe0e",
    "japanese_civics": "5fc7f1d4359dd805bb11e26d495621f34a43909fe2c10654e5f6f2ae3421f438",
    "japanese_geography": "03d73d0e7f7ce511674ed525bff186901f05968fe01827d732bb896c355773a8",
    "japanese_idiom": "1993fceda67f39de3060cf20e42fd76e47b89d52ab86d759500fde420497f8a6",
}


def raw_jmmlu(subject: str) -> list[list[str]]:
    folder = "JMMLU_NC_ND" if subject in ("japanese_civics", "japanese_geography", "japanese_idiom") else "JMMLU"
    with (DATA / "benchmarks" / "jmmlu" / folder / f"{subject}.csv").open(encoding="utf-8-sig", newline="") as file:
        return list(csv.reader(file))


def test_jmmlu_prefixes_equal_flexevals_own_byte_for_byte():
    found = task("tsugiki_takase_jmmlu_culture").eval_docs
    for subject, digest in FLEXEVALS_PREFIXES.items():
        doc = next(d for d in found if d["subject"] == subject)
        question = f"質問:: {raw_jmmlu(subject)[0][0].strip()}, 選択肢::\n"
        at = doc["prompt"].rindex(question)
        assert sha256(doc["prompt"][:at]) == digest, subject


def test_jmmlu_prompts_are_the_recorded_templates_filled_with_the_rows():
    spec = specs()["flexeval"]["jmmlu"]
    assert spec["culture_subset"]["subjects"] == list(docs_takase.CULTURE)

    def fill(template: str, row: list[str]) -> str:
        parts = {"{q}": row[0].strip(), "{q.strip()}": row[0].strip(), "{text of gold choice}": row[1 + "ABCD".index(row[5])],
                 **{f"{{{x}}}": row[1 + i] for i, x in enumerate("ABCD")}}  # fmt: skip
        return re.sub(r"\{[^{}]*\}", lambda m: parts[m.group(0)], template)

    expected = []
    for subject in spec["culture_subset"]["subjects"]:
        rows = raw_jmmlu(subject)
        first = {}
        for row in rows:
            first.setdefault(row[5], row)
        shots = [row for row in rows if any(row is f for f in first.values())]
        prefix = spec["prompt_head"] + "".join(fill(spec["shot"], row) for row in shots)
        expected += [prefix + fill(spec["query"], row) for row in rows]
    assert prompts("tsugiki_takase_jmmlu_culture") == expected
    kwargs = task("tsugiki_takase_jmmlu_culture").config.generation_kwargs
    assert (kwargs["until"], kwargs["max_gen_toks"]) == (spec["stop"], spec["max_new_tokens"])
    assert len(expected) == spec["culture_subset"]["n"]


def test_four_items_of_every_subject_are_their_own_shots_and_the_variant_leaves_them_out():
    docs = task("tsugiki_takase_jmmlu_culture").eval_docs
    leaked = Counter(d["subject"] for d in docs if f"{_question(d)} {d['target']}\n" in d["prompt"])
    assert leaked == dict.fromkeys(docs_takase.CULTURE, 4)
    kept = task("tsugiki_takase_jmmlu_culture_unleaked").eval_docs
    assert not any(f"{_question(d)} {d['target']}\n" in d["prompt"] for d in kept)
    assert set(kept["prompt"]) < set(docs["prompt"])


def _question(doc: dict) -> str:
    return doc["prompt"][doc["prompt"].rindex("質問:: ") :]


def test_most_of_a_jmmlu_prompt_is_the_shared_prefix():
    texts = prompts("tsugiki_takase_jmmlu_culture")
    own = sum(len(t) - t.rindex("質問:: ") for t in texts)
    assert 1 - own / sum(map(len, texts)) == pytest.approx(0.85, abs=0.01)


def test_the_jmmlu_answer_is_the_options_text_and_anything_else_is_unparsed():
    doc = {"options": ["NHK", "BBC", "CNN", "PBS"], "target": "BBC"}
    grade = task("tsugiki_takase_jmmlu_culture").process_results
    assert grade(doc, [" ｂｂｃ "]) == {"exact_match": 1.0, "flexeval_char_f1": 1.0, "unparsed": 0.0}
    assert (grade(doc, ["CNN"])["exact_match"], grade(doc, ["CNN"])["unparsed"]) == (0.0, 0.0)
    assert (grade(doc, ["B"])["exact_match"], grade(doc, ["B"])["unparsed"]) == (0.0, 1.0)


# --- MGSM --------------------------------------------------------------------------------------------------------


def builtin_mgsm(language: str, folder: Path) -> ConfigurableTask:
    """lm-eval's own task on the same rows, in the hub's columns."""
    rows = {"train": [], "test": []}
    shots = json.loads((DATA / "benchmarks/mgsm/exemplars.json").read_text(encoding="utf-8"))[language]
    for key in "12345678":
        rows["train"].append({"question": shots[key]["q"], "answer": shots[key]["a"], "answer_number": 0})
    for line in (DATA / f"benchmarks/mgsm/mgsm_{language}.tsv").read_text(encoding="utf-8").strip().split("\n"):
        question, answer = line.split("\t")
        rows["test"].append({"question": question, "answer": None, "answer_number": int(answer.replace(",", ""))})
    return builtin(f"mgsm/native_cot/mgsm_native_cot_{language}.yaml", rows, folder, num_fewshot=6)


def builtin(path: str, rows: dict[str, list[dict]], folder: Path, **changes) -> ConfigurableTask:
    import datasets

    at = Path(importlib.util.find_spec("lm_eval").origin).parent / "tasks" / path
    config = load_yaml(at) | changes
    for key in ("tag", "group", "task_list", "dataset_path", "dataset_name"):
        config.pop(key, None)
    made = {split: datasets.Dataset.from_list(r) for split, r in rows.items()}
    return ConfigurableTask(config=config | {"custom_dataset": lambda **_: made})


@pytest.mark.parametrize("language", sorted(docs_takase.MGSM_PROMPTS))
def test_mgsm_prompts_stops_targets_and_filters_equal_lm_evals_own_task(language, tmp_path):
    theirs, ours = builtin_mgsm(language, tmp_path), task(f"tsugiki_takase_mgsm_{language}")
    n = None if language == "ja" else 12
    assert prompts(ours, n) == prompts(theirs, n)
    assert [ours.doc_to_target(d) for d in ours.eval_docs] == [str(theirs.doc_to_target(d)) for d in theirs.eval_docs]
    assert ours.config.generation_kwargs["until"] == theirs.config.generation_kwargs["until"]
    answers = [re.sub(r"\\.|[\[\](){}+?*|]", "", metrics.MGSM_STRICT[language]) + "1,200です。。 7", "no 3.5 or $12.", ""]
    mine, builtins = ({e.name: e for e in t._filters} for t in (ours, theirs))
    assert set(mine) == set(builtins) == {"strict-match", "flexible-extract"}
    for name in mine:
        found = [[f().apply([[a]], [{}]) for f in ensemble.filters[:1]] for ensemble in (mine[name], builtins[name]) for a in answers]
        assert found[: len(answers)] == found[len(answers) :]


@pytest.mark.parametrize("language", sorted(docs_takase.MGSM_PROMPTS))
def test_mgsm_filters_are_the_patterns_of_the_metrics_module(language):
    by_name = {f["name"]: f["filter"][0] for f in OURS[f"tsugiki_takase_mgsm_{language}"]["filter_list"]}
    assert by_name["strict-match"]["regex_pattern"] == metrics.MGSM_STRICT[language]
    assert by_name["flexible-extract"]["regex_pattern"] == metrics.MGSM_FLEXIBLE


def test_lm_eval_cuts_the_first_character_of_japanese_and_chinese_exemplars_only():
    for language in docs_takase.MGSM_PROMPTS:
        clipped, whole = (docs_takase.mgsm(language, clipped=c)["train"]["target"] for c in (True, False))
        if language in ("ja", "zh"):
            assert [w[1:] for w in whole] == list(clipped)
        elif language == "ru":  # its prompt lacks a space, so that the exemplars keep one
            assert [" " + w for w in whole] == list(clipped)
        else:
            assert list(whole) == list(clipped)
    assert "ステップごとの答え: ジャーは最初5個" in "".join(prompts("tsugiki_takase_mgsm_ja", 8))
    assert "ステップごとの答え: ロジャーは最初5個" in "".join(prompts("tsugiki_takase_mgsm_ja_unclipped", 8))


def test_mgsm_shots_are_drawn_anew_for_every_item_and_the_fast_variant_shares_its_prefix():
    def shots(text: str) -> str:
        return text[: text.rindex("問題： ")]

    assert len({shots(p) for p in prompts("tsugiki_takase_mgsm_ja")}) > 200
    assert len({shots(p) for p in prompts("tsugiki_takase_mgsm_ja_fast")}) == 1
    assert all(p.count("ステップごとの答え:") == 7 for p in prompts("tsugiki_takase_mgsm_ja"))


def test_mgsm_exemplars_lack_the_space_that_the_question_has():
    text = prompts("tsugiki_takase_mgsm_ja", 1)[0]
    assert text.count("問題：") == 7 and text.count("問題： ") == 1


@pytest.mark.parametrize("language", sorted(docs_takase.MGSM_PROMPTS))
def test_mgsm_has_a_variant_with_1024_tokens_in_every_language_that_differs_in_nothing_else(language):
    short, long = (task(f"tsugiki_takase_mgsm_{language}{suffix}") for suffix in ("", "_1024"))
    assert (short.config.generation_kwargs["max_gen_toks"], long.config.generation_kwargs["max_gen_toks"]) == (256, 1024)
    assert short.config.generation_kwargs | {"max_gen_toks": 1024} == long.config.generation_kwargs
    assert prompts(short, 3) == prompts(long, 3)
    filters = [OURS[f"tsugiki_takase_mgsm_{language}"]["filter_list"], OURS[f"tsugiki_takase_mgsm_{language}_1024"]["filter_list"]]
    assert filters[0] == filters[1] and [f["name"] for f in filters[1]] == ["strict-match", "flexible-extract"]


def test_the_mgsm_groups_hold_all_eleven_languages():
    for suffix in ("", "_1024"):
        members = load_yaml(TASKS / f"takase_mgsm{suffix}.yaml", resolve_func=False)["task"]
        assert sorted(members) == sorted(f"tsugiki_takase_mgsm_{la}{suffix}" for la in docs_takase.MGSM_PROMPTS)


@pytest.mark.parametrize(
    ("name", "tokens", "clipped"),
    [("ja", 256, True), ("ja_1024", 1024, True), ("ja_unclipped", 256, False), ("ja_unclipped_1024", 1024, False)],
)
def test_mgsms_switches_change_nothing_else(name, tokens, clipped):
    found = task(f"tsugiki_takase_mgsm_{name}")
    assert found.config.generation_kwargs == task("tsugiki_takase_mgsm_ja").config.generation_kwargs | {"max_gen_toks": tokens}
    if clipped:
        assert prompts(found, 5) == prompts("tsugiki_takase_mgsm_ja", 5)
    else:
        questions = [p[p.rindex("問題： ") :] for p in prompts(found, 5)]
        assert questions == [p[p.rindex("問題： ") :] for p in prompts("tsugiki_takase_mgsm_ja", 5)]
        assert [e.name for e in found._filters] == [e.name for e in task("tsugiki_takase_mgsm_ja")._filters]


def test_mgsm_says_what_could_not_be_extracted():
    grade = task("tsugiki_takase_mgsm_ja").process_results
    assert grade({"target": "2125"}, ["2,125"]) == {"exact_match": 1.0, "unparsed": 0.0}
    assert grade({"target": "2125"}, ["[invalid]"]) == {"exact_match": 0.0, "unparsed": 1.0}


# --- MMLU-ProX ---------------------------------------------------------------------------------------------------


def invented_mmlu_prox(language: str) -> dict[str, list[dict]]:
    """Rows with the hub's columns; six exemplars a category, so that the sixth must not be used."""
    exemplar = docs_takase.MMLU_PROX_PROMPTS[language][3]
    rows = {"validation": [], "test": []}
    for split, n in (("validation", 6), ("test", 2)):
        for i in range(n):
            for category in docs_takase.MMLU_PROX_SUBJECTS:
                options = {f"option_{o}": f"{category} {i} {o}" if o < 10 - i else None for o in range(10)}
                rows[split].append({"question": f"{split} {category} {i}？", **options, "answer": "ABCDEFGHIJ"[i], "category": category,
                                    "cot_content": f"{exemplar} {category} {i}。答えは (A) です。"})  # fmt: skip
    return rows


def with_mmlu_prox(folder: Path, rows: dict[str, dict[str, list[dict]]]) -> None:
    for language, splits in rows.items():
        for split, r in splits.items():
            path = folder / "benchmarks" / "mmlu_prox" / language / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in r), encoding="utf-8")


@pytest.mark.parametrize("language", ["ja", "en"])
def test_mmlu_prox_prompts_equal_lm_evals_fourteen_tasks(language, tmp_path, monkeypatch):
    rows = invented_mmlu_prox(language)
    with_mmlu_prox(tmp_path, {language: rows})
    monkeypatch.setenv("TSUGIKI_DATA", str(tmp_path))
    ours = manager().load([f"tsugiki_takase_mmlu_prox_{language}"])["tasks"][f"tsugiki_takase_mmlu_prox_{language}"]
    expected, targets = [], []
    for category in docs_takase.MMLU_PROX_SUBJECTS:
        name = category.replace(" ", "_")
        theirs = builtin(f"mmlu_prox/{language}/mmlu_prox_{language}_{name}.yaml", rows, tmp_path)
        expected += prompts(theirs)
        targets += [theirs.doc_to_target(d) for d in theirs.eval_docs]
        assert ours.config.generation_kwargs == theirs.config.generation_kwargs
    assert prompts(ours) == expected
    assert [ours.doc_to_target(d) for d in ours.eval_docs] == targets
    assert OURS[f"tsugiki_takase_mmlu_prox_{language}"]["filter_list"][0]["filter"][0]["regex_pattern"] == metrics.MMLU_PROX_STRICT[language]


def test_mmlu_prox_parses_strictly_and_tolerantly_beside_each_other(tmp_path, monkeypatch):
    with_mmlu_prox(tmp_path, {"ja": invented_mmlu_prox("ja")})
    monkeypatch.setenv("TSUGIKI_DATA", str(tmp_path))
    ours = manager().load(["tsugiki_takase_mmlu_prox_ja"])["tasks"]["tsugiki_takase_mmlu_prox_ja"]
    ours.build_all_requests(limit=1)
    ours.instances[0].resps = ["考えます。答えは(A)です。"]
    ours.apply_filters()
    found = {name: ours.process_results(ours.eval_docs[0], [text]) for name, text in ours.instances[0].filtered_resps.items()}
    assert found == {
        "custom-extract": {"exact_match": 0.0, "unparsed": 1.0}, "tolerant-extract": {"exact_match": 1.0, "unparsed": 0.0},
    }  # fmt: skip


def test_mmlu_prox_wants_five_exemplars_of_every_category(tmp_path, monkeypatch):
    rows = invented_mmlu_prox("ja")
    rows["validation"] = [r for r in rows["validation"] if r["category"] != "law"][:-1]
    with_mmlu_prox(tmp_path, {"ja": rows})
    with pytest.raises(UserError, match="law has 0 worked examples, 5 are needed"):
        docs_takase.mmlu_prox("ja", data_dir=str(tmp_path))


def test_an_unknown_category_of_mmlu_prox_is_named(tmp_path):
    rows = invented_mmlu_prox("ja")
    rows["test"][0]["category"] = "astrology"
    with_mmlu_prox(tmp_path, {"ja": rows})
    with pytest.raises(UserError, match=r"category.*astrology"):
        docs_takase.mmlu_prox("ja", data_dir=str(tmp_path))


# --- JAQKET, FlexEval's mathematics ------------------------------------------------------------------------------


def test_jaqket_opens_the_answer_with_a_bracket_and_stops_at_its_end(tmp_path, monkeypatch):
    path = tmp_path / "benchmarks" / "jaqket" / "validation.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"question": "世界最大の湖は何？", "answers": ["カスピ海"]}), encoding="utf-8")
    monkeypatch.setenv("TSUGIKI_DATA", str(tmp_path))
    found = manager().load(["tsugiki_takase_jaqket"])["tasks"]["tsugiki_takase_jaqket"]
    assert prompts(found) == ["世界最大の湖は何？答えは「"]
    assert (found.config.generation_kwargs["until"], found.config.generation_kwargs["max_gen_toks"]) == (["」"], 64)
    assert found.process_results(found.eval_docs[0], ["カスピ海"])["exact_match"] == 1.0


def test_flexevals_mgsm_and_gsm8k_templates_are_its_own():
    for name, item, digest in (
        ("tsugiki_flexeval_mgsm_ja_original", "問題: {{ question }}\nステップごとの答え:",
         "14ec48ab2976ae3916ffc3368200aaf55eeff5ce038355dcd11a9242db8eb5f2"),
        ("tsugiki_flexeval_gsm8k", "Q: {{ question }}\nA:",
         "8e751ad0bf609fa2c046654f69564fa2d48f1d61dee456b43a8315fcc7c4e986"),
    ):  # fmt: skip
        text = prompts(name, 1)[0]
        head, end = item.split("{{ question }}")
        at = text.rindex(head)
        assert text.endswith(end)
        assert sha256(text[:at] + item) == digest


def test_the_corrected_mgsm_ja_is_another_set(tmp_path, monkeypatch):
    path = tmp_path / "benchmarks" / "mgsm_ja_fixed" / "test.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"question": "1足す1は？", "answer_number": 2}), encoding="utf-8")
    monkeypatch.setenv("TSUGIKI_DATA", str(tmp_path))
    found = manager().load(["tsugiki_flexeval_mgsm_ja"])["tasks"]["tsugiki_flexeval_mgsm_ja"]
    assert prompts(found)[0].endswith("問題: 1足す1は？\nステップごとの答え:")
    assert found.process_results(found.eval_docs[0], ["1+1=2。答えは2個。"]) == {"exact_match": 1.0, "unparsed": 0.0}
    assert found.process_results(found.eval_docs[0], ["答えはわかりません"]) == {"exact_match": 0.0, "unparsed": 1.0}


def test_gsm8ks_targets_have_no_commas():
    targets = task("tsugiki_flexeval_gsm8k").eval_docs["target"]
    assert all(re.fullmatch(r"-?\d+(\.\d+)?", t) for t in targets)


# --- lawqa_jp ----------------------------------------------------------------------------------------------------


def test_lawqa_asks_every_question_in_four_orders_with_a_balanced_gold():
    docs = task("tsugiki_lawqa_jp").eval_docs
    assert set(Counter(docs["question_id"]).values()) == {4} and len(set(docs["question_id"])) == 140
    assert set(Counter(docs["target"]).values()) == {140}
    assert Counter(task("tsugiki_lawqa_jp_original").eval_docs["law"]) == {"金商法": 80, "薬機法": 39, "借地借家法": 21}


def test_lawqas_prompt_has_no_mark_one_spelling_and_the_article_unless_closed():
    texts = prompts("tsugiki_lawqa_jp", 3)
    assert "following_context" not in "".join(prompts("tsugiki_lawqa_jp"))
    assert len({t.split("\n")[0] for t in prompts("tsugiki_lawqa_jp")}) == 1
    assert "\n\n条文：\n## 金融商品取引法" in texts[0]
    closed = prompts("tsugiki_lawqa_jp_closed", 3)
    assert [re.sub(r"条文：\n.*?\n\n(?=問題文：)", "", t, flags=re.S) for t in texts] == closed


def test_lawqas_four_options_are_the_letters():
    found = task("tsugiki_lawqa_jp_original")
    found.build_all_requests(limit=1)
    assert [i.args[1] for i in found.instances] == ["a", "b", "c", "d"]
    assert len({i.args[0] for i in found.instances}) == 1


# --- scores ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    import torch
    from lm_eval.models.huggingface import HFLM

    torch.set_num_threads(1)
    return HFLM(pretrained=str(BASES / "tiny-llama"), device="cpu", dtype="float32", batch_size=1, add_bos_token=False)


def loop_generate(lm, prompt: str, stop: str, tokens: int) -> str:
    """Greedy, one token at a time, without lm-eval: ids of the prompt without BOS, cut at the first stop string."""
    import torch

    model, tokenizer = lm.model, lm.tokenizer
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    start, past, step = len(ids), None, torch.tensor([ids])
    with torch.no_grad():
        for _ in range(tokens):
            output = model(step, past_key_values=past, use_cache=True)
            past = output.past_key_values
            token = int(output.logits[0, -1].argmax())
            if token == tokenizer.eos_token_id:
                break
            ids.append(token)
            step = torch.tensor([[token]])
            if stop in tokenizer.decode(ids[start:]):
                break
    return tokenizer.decode(ids[start:]).split(stop)[0]


def evaluated(lm, name: str, n: int, **changes) -> list[dict]:
    from lm_eval import simple_evaluate

    output = simple_evaluate(
        model=lm, tasks=[name], task_manager=manager(), limit=n, log_samples=True, bootstrap_iters=0, cache_requests=False, **changes
    )
    return output["samples"][name]


def plain_aio(text: str) -> str:
    text = unicodedata.normalize("NFKC", text.replace("～", "〜")).lower()
    text = re.sub(r"『(.*?)』", r"\1", re.sub(r"「(.*?)」", r"\1", text))
    for mark in "・=-":
        text = text.replace(mark, "")
    return re.sub(r"\((.*?)\)", "", re.sub(r"\s+", "", text))


def plain_niilc(answer: str, references: list[str]) -> tuple[float, float]:
    """Exact match and the best ratio (to the percent) over the references, by rapidfuzz."""
    from rapidfuzz import fuzz

    answer, golds = plain_aio(answer), [plain_aio(g) for g in references]
    return float(answer in golds), max(fuzz.ratio(answer, g) for g in golds) / 100 if answer else 0.0


def test_niilc_scores_equal_a_plain_loop_over_transformers_item_by_item(tiny):
    samples = evaluated(tiny, "tsugiki_takase_niilc", 5, gen_kwargs={"max_gen_toks": 20})
    assert len(samples) == 5
    for sample in samples:
        answer = loop_generate(tiny, sample["doc"]["prompt"], "\n", 20)
        assert sample["filtered_resps"] == [answer]
        exact, ratio = plain_niilc(answer, sample["doc"]["target"])
        assert sample["exact_match"] == exact and sample["flexeval_char_f1"] == pytest.approx(ratio, abs=0.0051)
    assert len({s["filtered_resps"][0] for s in samples}) > 1


def test_niilc_scores_of_nearly_right_answers_equal_the_plain_ones_on_all_127_items():
    found = task("tsugiki_takase_niilc")
    docs = list(found.eval_docs)
    seen = set()
    for doc, other in zip(docs, docs[1:] + docs[:1], strict=True):
        gold = doc["target"][0]
        for answer in (gold, f" 「{gold}」", f"{gold}です。", gold[:-1], f"{gold}（{gold}）", other["target"][0], gold[::-1]):
            scores, (exact, ratio) = found.process_results(doc, [answer]), plain_niilc(answer, doc["target"])
            assert scores["exact_match"] == exact and scores["flexeval_char_f1"] == pytest.approx(ratio, abs=0.0051)
            seen.add((exact, round(ratio, 1)))
    assert len(seen) > 8


def test_jmmlu_scores_equal_a_plain_loop_over_transformers_item_by_item(tiny):
    for sample in evaluated(tiny, "tsugiki_takase_jmmlu_culture", 3, gen_kwargs={"max_gen_toks": 16}):
        answer = loop_generate(tiny, sample["doc"]["prompt"], "\n", 16)
        assert sample["filtered_resps"] == [answer]
        text = unicodedata.normalize("NFKC", answer).lower().strip()
        options = [unicodedata.normalize("NFKC", o).lower().strip() for o in sample["doc"]["options"]]
        gold = unicodedata.normalize("NFKC", sample["doc"]["target"]).lower().strip()
        assert (sample["exact_match"], sample["unparsed"]) == (float(text == gold), float(text not in options))


def test_lawqa_choices_equal_a_plain_loop_over_transformers_item_by_item(tiny):
    import torch

    samples = evaluated(tiny, "tsugiki_lawqa_jp_closed", 4)
    for sample in samples:
        prompt = sample["doc"]["prompt"]
        likelihoods = []
        for letter in "abcd":
            whole = tiny.tokenizer.encode(prompt + letter, add_special_tokens=False)
            context = tiny.tokenizer.encode(prompt, add_special_tokens=False)
            with torch.no_grad():
                logs = torch.log_softmax(tiny.model(torch.tensor([whole])).logits[0].double(), -1)
            likelihoods.append(sum(float(logs[i - 1, whole[i]]) for i in range(len(context), len(whole))))
        theirs = [float(r[0]) for r in sample["filtered_resps"]]
        assert theirs == pytest.approx(likelihoods, abs=1e-3)
        assert sample["acc"] == float(likelihoods.index(max(likelihoods)) == sample["doc"]["target"])


def test_mgsm_scores_equal_a_plain_loop_over_transformers_item_by_item(tiny):
    import random

    train, test = (list(docs_takase.mgsm("ja")[s]) for s in ("train", "test"))
    rng = random.Random(1234)
    samples = evaluated(tiny, "tsugiki_takase_mgsm_ja", 2, gen_kwargs={"max_gen_toks": 48})
    by_filter = {(s["doc_id"], s["filter"]): s for s in samples}
    for i in range(2):
        shots = "".join(f"{t['prompt']} {t['target']}\n\n" for t in rng.sample(train, 6))
        answer = loop_generate(tiny, shots + test[i]["prompt"], "問題：", 48)
        for name, found in (("strict-match", metrics.mgsm_strict(answer, "ja")), ("flexible-extract", metrics.mgsm_flexible(answer))):
            sample = by_filter[i, name]
            assert sample["resps"] == [[answer]]
            assert sample["filtered_resps"] == [found]
            assert sample["exact_match"] == float(re.sub(r"[.,$-]", "", found) == test[i]["target"])
            assert sample["unparsed"] == float(found == metrics.INVALID)


def test_a_gguf_of_the_same_model_gives_the_same_answers_and_choices_item_by_item(tiny, tmp_path):
    from tsugiki.evaluate.harness import TsugikiGGUF
    from tsugiki.quantize.convert import convert

    convert(BASES / "tiny-llama", tmp_path / "tiny.gguf")
    with TsugikiGGUF(tmp_path / "tiny.gguf", tokenizer=BASES / "tiny-llama") as gguf:
        for name, n, changes in (
            ("tsugiki_lawqa_jp_closed", 4, {}), ("tsugiki_takase_niilc", 3, {"gen_kwargs": {"max_gen_toks": 8}}),
        ):  # fmt: skip
            ours, theirs = (evaluated(lm, name, n, **changes) for lm in (gguf, tiny))
            assert len(ours) == len(theirs) == n
            for a, b in zip(ours, theirs, strict=True):
                assert a["doc_id"] == b["doc_id"] and a["arguments"] == b["arguments"]
                if name.startswith("tsugiki_lawqa"):
                    own, reference = ([float(r[0]) for r in sample["filtered_resps"]] for sample in (a, b))
                    assert own == pytest.approx(reference, abs=0.05)  # float16 weights against float32
                    assert a["acc"] == b["acc"]
                else:
                    assert a["filtered_resps"] == b["filtered_resps"]
                    assert a["flexeval_char_f1"] == b["flexeval_char_f1"]
