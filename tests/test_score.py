"""Scores and their standard errors."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tsugiki.errors import UserError
from tsugiki.evaluate.domain import Answer, summarize
from tsugiki.evaluate.score import char_f1, exact_match, score
from tsugiki.intervals import clustered_stderr


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("3か月", "3か月", 1),
        (" 3か月。 ", "3か月", 1),
        ("VG32", "ＶＧ３２", 1),  # full width
        ("ﾎﾟﾝﾌﾟ", "ポンプ", 1),  # half-width kana
        ("3か月です", "3か月", 0),
        ("", "3か月", 0),
        ("。", "", 1),
    ],
)
def test_exact_match_forgives_width_spaces_and_the_full_stop_alone(prediction, reference, expected):
    assert exact_match(prediction, reference) == expected


def test_character_f1_is_that_of_the_shared_characters():
    # 東京 is shared: precision 2/2, recall 2/3
    assert char_f1("東京", "東京都") == pytest.approx(2 * 1 * (2 / 3) / (1 + 2 / 3))
    # a character counts as often as it is there: one of two あ
    assert char_f1("ああ", "あい") == pytest.approx(0.5)
    assert char_f1("東 京", "東京。") == 1
    assert char_f1("", "") == 1
    assert char_f1("", "あ") == char_f1("あ", "") == 0


@given(st.text(max_size=20), st.text(max_size=20))
def test_scores_lie_between_0_and_1_and_f1_is_symmetric(a, b):
    assert 0 <= char_f1(a, b) <= 1
    assert char_f1(a, b) == pytest.approx(char_f1(b, a))
    assert score("exact_match", a, a) == score("char_f1", a, a) == 1
    if exact_match(a, b):
        assert char_f1(a, b) == 1


def test_an_unknown_score_names_the_known_ones():
    with pytest.raises(UserError, match="exact_match, char_f1"):
        score("bleu", "a", "a")


def test_with_one_item_a_document_the_standard_error_is_the_usual_one():
    x = [0, 1, 1, 0, 1, 1, 1]
    assert clustered_stderr(x, [str(i) for i in range(7)]) == pytest.approx(np.std(x, ddof=1) / 7**0.5)


def test_copies_of_a_document_add_no_certainty():
    x = [0, 1, 1, 0, 1]
    documents = ["a", "b", "c", "d", "e"]
    assert clustered_stderr(x * 3, documents * 3) == pytest.approx(clustered_stderr(x, documents))


def test_one_document_has_no_standard_error():
    assert clustered_stderr([0, 1, 1], ["a"] * 3) is None


def test_kinds_are_reported_apart_and_truncated_answers_counted():
    answers = [
        Answer("1", "a", "rule", "x", "x", 1.0, "stop", 0.1),
        Answer("2", "b", "rule", "y", "x", 0.0, "length", 0.1),
        Answer("3", "c", "fact", "z", "z", 1.0, "stop", 0.1),
    ]
    found = summarize(answers)
    assert (found["n"], found["mean"], found["truncated"]) == (3, pytest.approx(2 / 3), pytest.approx(1 / 3))
    assert found["kinds"]["rule"]["n"] == 2 and found["kinds"]["rule"]["mean"] == 0.5
    assert found["kinds"]["fact"]["stderr"] is None
