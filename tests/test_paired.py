"""The same items before and after: what changed, and how sure that is."""

import numpy as np
import pytest
from scipy.stats import ttest_rel

from tsugiki.errors import UserError
from tsugiki.evaluate.paired import Item, compare_items, read_items, standard_error, write_items


def items(scores, documents=None):
    return [Item(str(i), documents[i] if documents else str(i), float(s)) for i, s in enumerate(scores)]


def test_a_paired_interval_is_much_narrower_than_two_unpaired_ones():
    """Two models that differ on few of many hard and easy items: scipy's paired t interval is the reference."""
    rng = np.random.default_rng(0)
    before = rng.random(400)
    after = np.clip(before + rng.normal(0.03, 0.1, 400), 0, 1)
    found = compare_items(items(before), items(after))
    expected = ttest_rel(after, before).confidence_interval(0.95)
    assert found["ci"] == pytest.approx([expected.low, expected.high], abs=0.003)
    assert found["change"] == "gained"
    unpaired = 1.96 * np.sqrt(before.var() / 400 + after.var() / 400)
    assert found["ci"][1] - found["ci"][0] < unpaired


def test_better_and_worse_items_are_counted():
    found = compare_items(items([0, 1, 1, 0.5]), items([1, 0, 1, 0.25]))
    assert (found["n"], found["better"], found["worse"]) == (4, 1, 2)
    assert found["difference"] == pytest.approx((1 - 1 - 0.25) / 4)
    assert found["ci"] is None and found["change"] == "open"  # four documents


def test_the_order_of_the_items_does_not_matter():
    rng = np.random.default_rng(1)
    a, b = items(rng.random(30)), items(rng.random(30))
    assert compare_items(a, b[::-1]) == compare_items(a[::-1], b)


def test_a_model_compared_with_itself_differs_by_nothing_but_that_proves_little():
    same = items([0, 1] * 15)
    found = compare_items(same, same)
    assert found["difference"] == 0 and found["change"] == "open"
    assert found["ci"] == pytest.approx([-0.1157, 0.1157], abs=1e-4)  # scipy's binomtest(0, 30), exact


def test_small_but_steady_changes_are_seen():
    """Every item loses 0.01: with 40 items that differ, nothing is unseen."""
    found = compare_items(items([0.5] * 40), items([0.49] * 40))
    assert found["change"] == "lost"


def test_other_items_cannot_be_compared():
    with pytest.raises(UserError, match="3 and 2, 2 shared"):
        compare_items(items([1, 1, 1]), items([1, 1]))
    with pytest.raises(UserError, match="1 of 2 items lack a score"):
        compare_items([Item("a", "a", None), Item("b", "b", 1.0)], [Item("a", "a", 1.0), Item("b", "b", 1.0)])


def test_items_survive_a_file_and_further_fields_are_ignored(tmp_path):
    rows = [Item("a", "d", 0.5, True, False), Item("b", "d", None)]
    write_items(tmp_path / "items.jsonl", rows)
    assert read_items(tmp_path / "items.jsonl") == rows
    (tmp_path / "more.jsonl").write_text('{"id": 3, "score": 1, "prompt": "x"}\n', encoding="utf-8")
    assert read_items(tmp_path / "more.jsonl") == [Item("3", "3", 1.0)]
    (tmp_path / "bad.jsonl").write_text('{"id": 3}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"bad\.jsonl:1"):
        read_items(tmp_path / "bad.jsonl")


def test_the_standard_error_of_independent_items_is_the_textbook_one():
    x = np.random.default_rng(2).random(50)
    assert standard_error(items(x)) == pytest.approx(x.std(ddof=1) / 50**0.5)
