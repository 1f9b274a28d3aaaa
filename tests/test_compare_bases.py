"""Which base to take: the same samples for all, paired intervals, ranks that claim no more than was seen, a choice."""

from __future__ import annotations

import json
import math
import re
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tsugiki.artifacts import read_json, read_jsonl, write_text
from tsugiki.bases import profile
from tsugiki.errors import UserError
from tsugiki.recipes import bases_page
from tsugiki.recipes.compare_bases import compare_bases, fit_flops, open_bases
from tsugiki.recipes.rank_bases import Measured, choose, compare_pairs, joint_confidence, ranks, with_seeds
from tsugiki.results import read_results

BASES = Path(__file__).resolve().parents[1] / "recipes" / "bases"


# --- ranks and intervals ------------------------------------------------------------------------------------------


def some(name: str, scores, nats) -> Measured:
    return Measured(name, np.atleast_2d(np.asarray(scores, float)), np.atleast_2d(np.asarray(nats, float)))


def test_all_pairs_hold_together():
    assert joint_confidence(2) == pytest.approx(0.95)
    assert joint_confidence(4) == pytest.approx(1 - 0.05 / 6)


def test_bits_of_a_pair_are_those_of_a_plain_loop_and_fewer_are_better():
    rng = np.random.default_rng(0)
    characters, documents = rng.integers(3, 30, 60), [f"d{i // 3}" for i in range(60)]
    a, b = rng.gamma(4, 2, (2, 60)), rng.gamma(4, 2, (2, 60)) + 4
    total = sum(float(x) for row in b for x in row) / 2 - sum(float(x) for row in a for x in row) / 2
    expected = -total / math.log(2) / sum(int(c) for c in characters)
    [pair] = compare_pairs([some("a", np.zeros((2, 60)), a), some("b", np.zeros((2, 60)), b)], documents, characters, documents)
    assert pair["bits"]["difference"] == pytest.approx(expected)
    assert pair["bits"]["ci"][0] < expected < pair["bits"]["ci"][1] < 0
    assert pair["bits"]["better"] == "a" and pair["score"]["better"] is None


def test_a_higher_score_wins_only_where_the_interval_says_so():
    documents = [f"d{i}" for i in range(100)]
    right, wrong, few = np.ones(100), np.zeros(100), np.r_[np.ones(3), np.zeros(97)]
    found = [some(n, s, np.ones(100)) for n, s in (("few", few), ("right", right), ("wrong", wrong))]
    pairs = compare_pairs(found, documents, np.ones(100), documents)
    assert {(p["first"], p["second"]): p["score"]["better"] for p in pairs} == {
        ("few", "right"): "right", ("few", "wrong"): None, ("right", "wrong"): "right",
    }  # fmt: skip
    assert ranks(["few", "right", "wrong"], pairs, "score") == {"right": 1, "few": 2, "wrong": 2}
    assert all(p["score"]["ci"][0] <= p["score"]["difference"] <= p["score"]["ci"][1] for p in pairs)


def test_too_few_documents_have_no_interval_and_no_winner():
    [pair] = compare_pairs([some("a", np.ones(30), np.ones(30)), some("b", np.zeros(30), np.full(30, 9.0))], ["d1", "d2", "d3"] * 10, np.ones(30), ["d1", "d2", "d3"] * 10)
    assert pair["score"]["ci"] is None and pair["bits"]["ci"] is None
    assert pair["score"]["better"] is None and pair["bits"]["better"] is None


def test_three_equal_bases_are_seldom_told_apart():
    """At 95 % together, of 100 comparisons of three bases that are equally good some 5 may name a winner."""
    rng, named = np.random.default_rng(7), 0
    documents = [f"d{i // 2}" for i in range(80)]
    for trial in range(100):
        scores = rng.random((3, 80)) < np.repeat(rng.beta(2, 2, (3, 40)), 2, axis=1)  # answers about one document are alike
        found = [some(n, s, np.ones(80)) for n, s in zip("abc", scores, strict=True)]
        named += any(p["score"]["better"] for p in compare_pairs(found, documents, np.ones(80), documents, resamples=400, seed=trial))
    assert named <= stats.binom.ppf(0.999, 100, 0.05)


@given(st.lists(st.integers(0, 100).map(lambda k: k / 100), min_size=2, max_size=6), st.floats(-0.5, 0.5), st.sampled_from([0.9, 0.95, 0.99]))
@settings(max_examples=60, deadline=None)
def test_the_spread_between_seeds_is_students_where_documents_say_nothing(first, shift, confidence):
    a, b = np.asarray(first), np.asarray(first[::-1]) * 0.7 + shift
    middle = float(a.mean() - b.mean())
    found = with_seeds(middle, (middle, middle), [a, b], confidence)
    if len(set(first)) == 1:
        assert found == pytest.approx((middle, middle), abs=1e-9)
    else:
        expected = stats.ttest_ind(a, b).confidence_interval(confidence)
        assert found == pytest.approx((expected.low, expected.high), abs=1e-9)
    wide = with_seeds(middle, (middle - 0.1, middle + 0.2), [a, b], confidence)
    assert wide[0] <= middle - 0.1 + 1e-12 and wide[1] >= middle + 0.2 - 1e-12


def test_all_bases_tell_how_far_seeds_spread():
    """With three bases the pooled spread is the root of the within-group mean square of an analysis of variance."""
    fits = [np.array([0.3, 0.4]), np.array([0.5, 0.52]), np.array([0.1, 0.16])]
    within = sum((x - f.mean()) ** 2 for f in fits for x in f) / 3
    expected = stats.t.ppf(0.975, 3) * math.sqrt(within * (1 / 2 + 1 / 2))
    assert with_seeds(0.0, (0.0, 0.0), fits, 0.95) == pytest.approx((-expected, expected))


def test_one_seed_leaves_the_interval_and_seeds_that_disagree_undo_a_winner():
    assert with_seeds(0.1, (0.05, 0.15), [np.array([0.6]), np.array([0.5])], 0.95) == (0.05, 0.15)
    documents = [f"d{i}" for i in range(200)]
    better = np.r_[np.ones(120), np.zeros(80)]
    worse = np.r_[np.ones(20), np.zeros(180)]
    one = compare_pairs([some("a", better, np.ones(200)), some("b", worse, np.ones(200))], documents, np.ones(200), documents)
    two = compare_pairs([some("a", [better, worse], np.ones((2, 200))), some("b", [worse, worse], np.ones((2, 200)))], documents, np.ones(200), documents)
    assert one[0]["score"]["better"] == "a" and two[0]["score"]["better"] is None


def pair(first, second, score=None, bits=None):
    return {"first": first, "second": second, "score": {"better": score}, "bits": {"better": bits}}


ROWS = [{"name": n, "score": 0.0, "lost": lost, "bytes": size} for n, lost, size in (("a", 1, 300), ("b", 1, 200), ("c", 0, 400))]


@pytest.mark.parametrize(("pairs", "rows", "expected"), [
    ([pair("a", "b", "a", "b"), pair("a", "c", "a", "c"), pair("b", "c")], ROWS, ("a", "score", ["b", "c"])),
    # the score sets c apart and not a from b, which bits tell apart; that c has the fewest bits does not bring it back
    ([pair("a", "b", None, "b"), pair("a", "c", "a", "c"), pair("b", "c", "b", "c")], ROWS, ("b", "bits", ["a"])),
    # the highest measured score comes before what is lost and what is small
    ([pair("a", "b"), pair("a", "c"), pair("b", "c")], [{**ROWS[0], "score": 0.37}, {**ROWS[1], "score": 0.29}, ROWS[2]], ("a", "measured", ["b", "c"])),
    ([pair("a", "b"), pair("a", "c"), pair("b", "c")], ROWS, ("c", "forgetting", ["a", "b"])),
    ([pair("a", "b"), pair("a", "c"), pair("b", "c")], [{**r, "lost": None} for r in ROWS], ("b", "size", ["a", "c"])),
    ([pair("a", "b"), pair("a", "c"), pair("b", "c")], [{**r, "lost": 0, "bytes": 5} for r in ROWS], ("a", "order", ["b", "c"])),
])  # fmt: skip
def test_what_decides_is_asked_in_turn(pairs, rows, expected):
    assert choose(rows, pairs) == expected


def test_operations_are_those_that_torch_counts():
    """The matrix products of a forward and backward pass of tiny-llama with an adapter, by PyTorch's own counter."""
    import torch
    from peft import LoraConfig, get_peft_model
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    for name in ("tiny-llama", "tiny-qwen"):  # separate and shared output matrix
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(BASES / name, dtype=torch.float32), LoraConfig(r=8, target_modules="all-linear"))
        inner, tokens, learned = model.get_base_model(), 4 * 32, 4 * 5
        with FlopCounterMode(display=False) as counter:
            hidden = inner.model(input_ids=torch.arange(tokens).view(4, 32) + 300, use_cache=False).last_hidden_state
            inner.lm_head(hidden[:, -5:].reshape(learned, -1)).logsumexp(-1).sum().backward()
        products = sum(v for op, v in counter.get_flop_counts()["Global"].items() if str(op).split(".")[1] in ("mm", "addmm"))
        adapter = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert fit_flops(profile(BASES / name), adapter, tokens, learned) == pytest.approx(products, rel=0.02)


# --- a whole comparison -------------------------------------------------------------------------------------------

YAML = """\
title: {ja: 試験, en: Trial}
licence: CC0
source: {jsonl: qa.jsonl}
fields: {prompt: q, completion: a, id: id, split: split}
near_duplicates: null
scoring: char_f1
max_new_tokens: 4
max_tokens: 46
sweep: {counts: [16, 24], epochs: 1}
"""
CHANGES = ("sweep.workers=1", "evaluate.tasks=[]", "evaluate_items=14", "sweep.test_items=16", "sweep.train_items=4")
NAMES = ("tiny-llama", "tiny-llmjp")


@pytest.fixture(scope="module")
def domain(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    def question(i: int) -> str:  # the longer ones have 42 tokens in tiny-llama and 49 in tiny-llmjp
        return f"ポンプP-{100 + i}の{'点検と清掃の間隔' if i in (5, 50) else '点検'}は何か月ごとですか。"

    rows = [{"id": f"r{i}", "q": question(i), "a": f"{i % 5 + 1}か月", "split": "train" if i < 40 else "test" if i < 70 else "valid"} for i in range(76)]
    write_text(folder / "qa.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    write_text(folder / "mine.yaml", YAML)
    return folder / "mine.yaml"


@pytest.fixture(scope="module")
def compared(domain) -> Path:
    return compare_bases(str(domain), NAMES, n=16, seeds=(0, 1), runs=domain.parent / "runs", changes=CHANGES)


@pytest.fixture(scope="module")
def found(compared) -> dict:
    return read_json(compared)


def test_every_base_gets_the_samples_that_all_can_take(compared, found):
    from transformers import AutoTokenizer

    rows = {r["id"]: r for r in read_jsonl(compared.parents[2] / "qa.jsonl")}
    fits = {}
    for name in NAMES:
        tokenizer = AutoTokenizer.from_pretrained(BASES / name)
        turns = {id: [{"role": "user", "content": r["q"]}, {"role": "assistant", "content": r["a"]}] for id, r in rows.items()}
        fits[name] = {id for id, t in turns.items() if len(tokenizer.apply_chat_template(t, return_dict=False)) <= 46}
    assert fits["tiny-llama"] != fits["tiny-llmjp"], "the test needs samples that only one base can take"
    kept = {}
    for name in NAMES:
        folder = compared.parent / "bases" / name
        kept[name] = {split: [r["id"] for r in read_jsonl(folder / "data" / f"{split}.jsonl")] for split in ("train", "valid", "test")}
        own = sum(len(read_jsonl(folder / "own" / "data" / f"{split}.jsonl")) for split in ("train", "valid", "test"))
        assert sum(found["samples"]["given_up"][name].values()) == own - sum(map(len, kept[name].values()))
    assert kept["tiny-llama"] == kept["tiny-llmjp"]
    assert {id for ids in kept["tiny-llama"].values() for id in ids} == fits["tiny-llama"] & fits["tiny-llmjp"]
    assert found["samples"]["given_up"] == {"tiny-llama": {"train": 1, "valid": 0, "test": 1}, "tiny-llmjp": {"train": 0, "valid": 0, "test": 0}}
    assert {r["budget"]["samples"] for r in found["bases"]} == {16} and found["differs"] == {}


def test_scores_and_bits_are_those_of_the_kept_answers_by_plain_arithmetic(compared, found):
    for row in found["bases"]:
        folder = compared.parent / "bases" / row["name"]
        test = read_jsonl(folder / "data" / "test.jsonl")[:16]
        characters = sum(len(r["completion"]) for r in test)
        nats = [np.load(folder / "sweep" / "points" / f"n000016-s{seed}" / "nats.npy").sum() for seed in (0, 1)]
        assert row["bits"]["after"] == pytest.approx(sum(nats) / 2 / math.log(2) / characters)
        assert row["bits"]["by_seed"] == pytest.approx({"0": nats[0] / math.log(2) / characters, "1": nats[1] / math.log(2) / characters})
        base = np.load(folder / "sweep" / "points" / "base" / "nats.npy").sum()
        assert row["bits"]["before"] == pytest.approx(base / math.log(2) / characters)
        answers = [read_jsonl(folder / "answers" / f"answers-{part}.jsonl") for part in ("base", "s0", "s1")]
        assert [[a["id"] for a in rows] for rows in answers] == [[r["id"] for r in test[:14]]] * 3
        assert row["score"]["before"] == pytest.approx(np.mean([a["score"] for a in answers[0]]))
        assert row["score"]["after"] == pytest.approx(np.mean([a["score"] for rows in answers[1:] for a in rows]))


def test_cost_is_measured_and_named_by_what_there_was(compared, found):
    for row in found["bases"]:
        folder = compared.parent / "bases" / row["name"]
        points = [read_json(folder / "sweep" / "points" / f"n000016-s{seed}" / "point.json")["point"] for seed in (0, 1)]
        if row["cost"]["device"] == "cpu":
            assert row["cost"]["unit"] == "core-hours"
            assert row["cost"]["hours"] == pytest.approx(sum(p["seconds"] * p["cores"] for p in points) / 2 / 3600)
            assert row["cost"]["peak_memory"] == max(p["peak_rss"] for p in points)
        assert row["bytes"] == {"F16": (folder / "gguf" / "model-F16.gguf").stat().st_size, "Q4_K_M": (folder / "levels" / "model-Q4_K_M.gguf").stat().st_size}
        assert row["budget"]["tokens"] == points[0]["train_tokens"] and row["speed"]["seconds_per_answer"] > 0
        assert not (folder / "answers" / "other-seed-F16.gguf").exists()


def test_nothing_is_computed_twice(compared, domain):
    def records() -> dict:
        return {p: p.stat().st_mtime_ns for p in (compared.parent / "bases").rglob("stage.json")}

    before = records()
    assert len(before) == len(NAMES) * 6
    assert compare_bases(str(domain), NAMES, n=16, seeds=(0, 1), runs=domain.parent / "runs", changes=CHANGES) == compared
    assert records() == before


def test_rows_of_the_results_table_lie_beside_those_of_a_runs_own(compared, found):
    rows = [r for r in read_results(compared.parents[1] / "results.sqlite") if r["stage"] == "bases"]
    assert {r["run"] for r in rows} == {f"mine/bases/{name}" for name in NAMES}
    value = {(r["base"], r["model"].rpartition("/")[2], r["metric"]): r["value"] for r in rows}
    for row in found["bases"]:
        assert value[row["name"], "adapted", "char_f1"] == row["score"]["after"]
        assert value[row["name"], "base", "bits_per_character"] == row["bits"]["before"]
        assert value[row["name"], "adapted", row["cost"]["unit"]] == row["cost"]["hours"]


def test_the_page_needs_nothing_from_elsewhere_and_tells_the_numbers(compared, found):
    page = compared.with_suffix(".html").read_text(encoding="utf-8")
    plain = page.replace('"http://www.w3.org/2000/svg"', "")  # a name, which is not fetched
    assert "http://" not in plain and "https://" not in plain and str(compared.parents[2]) not in page
    for row in found["bases"]:
        assert f"{row['bits']['after']:.3f}" in page and f"{100 * row['score']['after']:.1f}%" in page
    best, why = found["recommended"]["base"], found["recommended"]["why"]
    assert why["ja"].removeprefix(f"{best}：") in page and why["en"].removeprefix(f"{best}: ").replace("'", "&#39;") in page
    assert page.count('class="ja" lang="ja"') == page.count('class="en" lang="en"') > 50


def test_names_and_reasons_cannot_break_out_of_the_page(found):
    evil = '<script>alert(1)</script>"'
    text = json.dumps(found).replace("tiny-llmjp", "EVIL")
    broken = json.loads(text.replace("EVIL", json.dumps(evil)[1:-1]))
    page = bases_page.render(broken)
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page


def test_the_command_prints_what_to_take_whole_in_eighty_columns(compared, capsys, monkeypatch):
    from tsugiki.recipes.cli import show_bases

    monkeypatch.setenv("COLUMNS", "80")
    show_bases(compared)
    text = capsys.readouterr().out
    best = read_json(compared)["recommended"]["base"]
    assert f"Take {best}: " in text and ("core-hours" in text or "GPU-hours" in text)
    for base in read_json(compared)["bases"]:
        assert base["name"] in NAMES and text.count(f"\n{base['name']} ") >= 4
        assert f"{base['score']['after_ci'][0]:.3f} – {base['score']['after_ci'][1]:.3f}" in text and f"{base['budget']['tokens']:,}" in text


def test_a_runs_report_links_to_the_page_that_is_there(tmp_path):
    from tsugiki.recipes.report import write_report

    run = runpy.run_path(str(Path(__file__).with_name("synthetic_run.py")))["write_run"](tmp_path)
    assert "bases.html" not in write_report(run).read_text(encoding="utf-8")
    write_text(run.parent / "bases.html", "")
    links = re.findall(r'href="([^"]*bases\.html)"', write_report(run).read_text(encoding="utf-8"))
    assert [(run / link).resolve() for link in links] == [(run.parent / "bases.html").resolve()]


# --- what cannot be compared --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "said"), [
    (("setsubi", "--bases", "tiny-llama"), "1 base is nothing to compare"),
    (("setsubi", "--bases", "tiny-llama,tiny-lama"), "no base is named 'tiny-lama'"),
    (("setsubi", "--bases", "tiny-llama,tiny-llama"), "tiny-llama: named 2 times"),
    (("setsubii", "--bases", "tiny-llama,tiny-qwen"), "there is no domain 'setsubii'"),
    (("setsubi", "--set", "sweep.rnk=3"), "there is no setting 'sweep.rnk'"),
    (("setsubi", "--seeds", "0,x"), "--seeds wants whole numbers"),
    (("setsubi", "--seeds", "1,1"), "--seeds must be distinct"),
])  # fmt: skip
def test_a_mistake_is_one_clear_sentence(console, arguments, said):
    code, _, error = console("recipe", "bases", *arguments)
    assert code == 2 and said in error and "Traceback" not in error
    assert not Path("runs").exists()


def test_all_bases_that_cannot_be_had_are_told_at_once(tmp_path):
    theirs = shutil.copytree(BASES / "tiny-qwen", tmp_path / "theirs")
    write_text(theirs / "README.md", "---\nlicense: cc-by-nd-4.0\n---\n")
    with pytest.raises(UserError) as caught:
        open_bases("setsubi", ["tiny-llama", "nobody", str(theirs)], runs=tmp_path / "runs")
    assert "2 problem(s)" in str(caught.value) and "no base is named 'nobody'" in str(caught.value) and "allows no derived models" in str(caught.value)


def test_a_base_whose_tokenizer_takes_too_few_samples_is_named(domain, tmp_path):
    narrow = tmp_path / "narrow.yaml"
    write_text(narrow, YAML.replace("max_tokens: 46", "max_tokens: 40").replace("qa.jsonl", str(domain.parent / "qa.jsonl")))
    with pytest.raises(UserError, match=r"tiny-llmjp: 40 of 40 train samples"):
        compare_bases(str(narrow), NAMES, n=16, runs=tmp_path / "runs", changes=CHANGES)


def test_more_samples_than_all_bases_can_take_are_refused(domain):
    with pytest.raises(UserError, match=r"there are \d+ training samples that all bases can take, --n asks for 5,000"):
        compare_bases(str(domain), NAMES, n=5000, runs=domain.parent / "runs", changes=CHANGES)
