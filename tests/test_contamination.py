"""Benchmark items inside training samples are found, and nothing else is."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tsugiki.adapt.contamination import NGRAM, index_samples, overlaps
from tsugiki.errors import UserError
from tsugiki.recipes.contamination import contamination
from tsugiki.samples import EncodedSample

QUESTION = "建築基準法において、居室の天井の高さは何メートル以上でなければならないか。"


def held(item, sample, n):
    """The share of an item's character n-grams that are in a sample, by plain sets of strings."""
    grams = {item[i : i + n] for i in range(len(item) - n + 1)}
    return sum(g in sample for g in grams) / len(grams)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.text("あいう鉄骨b", min_size=1, max_size=60), min_size=1, max_size=6), st.lists(st.text("あいう鉄骨b", max_size=60), min_size=1, max_size=6))
def test_the_best_sample_is_that_of_plain_sets(items, samples):
    found, short = overlaps(items, index_samples(samples, ngram=4), share=0.5)
    expected = {}
    for i, item in enumerate(items):
        if len(item) >= 4 and (best := max(held(item, s, 4) for s in samples)) >= 0.5:
            expected[i] = best
    assert {o.item: o.share for o in found} == pytest.approx(expected)
    assert all(held(items[o.item], samples[o.sample], 4) == pytest.approx(o.share) for o in found)
    assert short == sum(len(item) < 4 for item in items)


def test_full_width_forms_and_line_breaks_do_not_hide_an_item():
    sample = QUESTION.replace("、", "、\n ").replace("建築", "建築")
    found, _ = overlaps([QUESTION.replace("。", "。 ")], index_samples([f"問: {QUESTION}\n2.1メートル", sample]))
    assert [(o.item, o.sample) for o in found] == [(0, 0)]


def test_a_common_phrase_is_no_leak():
    assert overlaps([QUESTION], index_samples(["次のうち正しいものはどれか。何メートル以上でなければならないか。"]))[0] == []


def test_a_sample_with_a_benchmark_question_is_named(tmp_path):
    folder = tmp_path / "benchmarks" / "gsm8k"
    folder.mkdir(parents=True)
    rows = [{"question": f"Question number {i}: how many apples are in {i} baskets of twelve?", "answer": f"{12 * i}\n#### {12 * i}"} for i in range(1, 4)]
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    train = [EncodedSample("s1", "何か", "別の答え", "d"), EncodedSample("s2", rows[1]["question"], "24", "d")]
    found = contamination(train, tmp_path / "out.json", data_dir=tmp_path)
    (row,) = found["sets"]
    assert (row["name"], row["items"], row["found"]) == ("gsm8k", 3, 1)
    assert row["examples"][0]["sample"] == "s2" and row["examples"][0]["share"] == 1.0
    assert json.loads((tmp_path / "out.json").read_text(encoding="utf-8")) == found
    assert "niilc" in found["absent"]


def test_without_a_set_there_is_nothing_to_compare(tmp_path):
    with pytest.raises(UserError, match="no benchmark set"):
        contamination([], tmp_path / "out.json", data_dir=tmp_path)
    assert len(QUESTION) > NGRAM
