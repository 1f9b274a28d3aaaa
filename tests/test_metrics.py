"""The published benchmarks' normalisers, ratios and extractions give what the originals give.

Expected values were obtained by running fuzzywuzzy (af443f9), FlexEval (8a07c3c) and lm-eval 0.4.13, or are those of their
own documentation; ratios are compared with rapidfuzz on open input.
"""

from __future__ import annotations

import itertools
import re
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rapidfuzz import fuzz
from rapidfuzz.distance import Indel, LCSseq

from tsugiki.evaluate import metrics, score

text = st.text(alphabet=st.one_of(st.sampled_from("ab c1-・「」()（）東京都ー〜～é×_。答えは"), st.characters()), max_size=40)


# --- ratios ------------------------------------------------------------------------------------------------------


@given(text, text)
def test_the_common_subsequence_and_the_indel_distance_equal_rapidfuzz(a, b):
    assert metrics.longest_common_subsequence(a, b) == LCSseq.similarity(a, b)
    assert metrics.indel_distance(a, b) == Indel.distance(a, b)


def rounded_reference(a: str, b: str) -> tuple[int, ...]:
    """rapidfuzz's ratio in whole percent; where the exact value is a half, both neighbours (it subtracts from 1, so that
    its float may lie on the other side)."""
    if a == b:
        return (100,)
    if not a or not b:
        return (0,)
    total = len(a) + len(b)
    exact = Fraction(100 * (total - Indel.distance(a, b)), total)
    return (int(exact), int(exact) + 1) if exact % 1 == Fraction(1, 2) else (round(fuzz.ratio(a, b)),)


@given(text, text)
def test_the_rounded_ratio_equals_rapidfuzz(a, b):
    assert metrics.fuzz_ratio(a, b) in rounded_reference(a, b)


@given(text, text)
def test_the_ratio_of_sorted_words_equals_rapidfuzz(a, b):
    assert metrics.token_sort_ratio(a, b) in rounded_reference(metrics.sorted_words(a), metrics.sorted_words(b))


def test_an_exact_half_rounds_to_the_even_neighbour():
    assert metrics.fuzz_ratio("a" * 15 + "b", "b" + "c" * 15) == 6  # 2·1/32 = 6.25 %
    assert metrics.fuzz_ratio("a" + "b" * 7, "a" + "c" * 7) == 12  # 2·1/16 = 12.5 %
    assert metrics.fuzz_ratio("aaa" + "b" * 5, "aaa" + "c" * 5) == 38  # 37.5 %


@pytest.mark.parametrize(
    ("a", "b", "sorted_ratio", "ratio"),
    [
        ("夏目 漱石", "漱石、夏目", 100, 40),
        ("café au lait", "caf au lait", 100, 96),  # é is deleted by token_sort_ratio, not by ratio
        ("東京都", "東京", 80, 80),
        ("。", "！", 100, 0),  # both empty once only words are left
        ("", "", 100, 100),
        ("a", "", 0, 0),
    ],
)
def test_values_of_fuzzywuzzy(a, b, sorted_ratio, ratio):
    assert (metrics.token_sort_ratio(a, b), metrics.fuzz_ratio(a, b)) == (sorted_ratio, ratio)


def test_flexevals_char_f1_is_the_best_over_the_references():
    # The example of FlexEval's documentation.
    assert metrics.flexeval_char_f1("abcd", ["abcd", "ABCD"]) == 1.0
    assert metrics.flexeval_char_f1("efgh", ["efGH"]) == 0.5


def test_the_three_character_f1s_are_three_different_scores():
    prediction, reference = "漱石 夏目", "夏目 漱石"
    assert score.char_f1(prediction, reference) == 1.0  # order does not count
    assert metrics.llmjp_char_f1(prediction, reference) == 1.0  # the order of words does not count
    assert metrics.flexeval_char_f1(prediction, [reference]) == 0.4  # order counts
    assert score.char_f1("京東", "東京") == 1.0
    assert metrics.llmjp_char_f1("京東", "東京") == 0.5


# --- normalisers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_text", "expected"),
    [
        ("「蛹化(ようか)」", "蛹化"),  # FlexEval's documentation
        ("蛹化（ようか）", "蛹化"),
        ("J・K・ローリング", "jkローリング"),
        ("660cc 以下\n", "660cc以下"),
        ("『坊っちゃん』", "坊っちゃん"),
        ("スーパー=マリオ-ブラザーズ", "スーパーマリオブラザーズ"),
        ("10～20", "10〜20"),  # before NFKC, which would make it an ASCII tilde
        ("（注）「", "「"),
        ("Ｔｏｋｙｏ", "tokyo"),
    ],
)
def test_aio_normaliser(given_text, expected):
    assert metrics.aio_normalize(given_text) == expected


@given(text)
def test_aio_normaliser_leaves_no_space_and_none_of_the_marks(a):
    assert not re.search(r"[\s・=\-]", metrics.aio_normalize(a))


def test_the_jmmlu_normaliser_keeps_inner_spaces_and_brackets():
    assert metrics.nfkc_lower_strip(" ＡＢ　（Ｃ） \n") == "ab (c)"


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("2,125", "2125", 1.0), ("$18", "18", 1.0), ("18.", "18", 1.0), ("A", "a", 1.0),
        ("-5", "5", 1.0), ("3.5", "35", 1.0),  # the trap of ignore_punctuation
        ("１８", "18", 0.0), ("18円", "18", 0.0), ("[invalid]", "18", 0.0),
    ],
)  # fmt: skip
def test_loose_exact_match_equals_lm_evals(prediction, reference, expected):
    from lm_eval.api.metrics import exact_match_hf_evaluate

    theirs = exact_match_hf_evaluate([prediction], [reference], ignore_case=True, ignore_punctuation=True)
    assert metrics.exact_match_loose(prediction, reference) == expected == theirs["exact_match"]


# --- extractions -------------------------------------------------------------------------------------------------


def lm_eval_regex(pattern: str, group: int, answer: str) -> str:
    from lm_eval.filters.extraction import RegexFilter

    return RegexFilter(pattern, group_select=group).apply([[answer]], [{}])[0][0]


ANSWERS = [
    "16-3-4=9。9*2=18。答えは18です。", "答えは$1,200です。余りは3です。", "答えは 18 です。", "わかりません。", "",
    "答えは-5です。答えは7です。", "合計は 3.5 と 12.", "The answer is 42. The answer is 7.",
]  # fmt: skip


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("language", ["ja", "en"])
def test_mgsm_extractions_equal_lm_evals_filters(answer, language):
    assert metrics.mgsm_strict(answer, language) == lm_eval_regex(metrics.MGSM_STRICT[language], 0, answer)
    assert metrics.mgsm_flexible(answer) == lm_eval_regex(metrics.MGSM_FLEXIBLE, -1, answer)


@given(st.text(alphabet="0123456789$,.- 答えはです。", max_size=30))
def test_mgsm_flexible_equals_lm_evals_filter_on_any_text(answer):
    assert metrics.mgsm_flexible(answer) == lm_eval_regex(metrics.MGSM_FLEXIBLE, -1, answer)


def test_strict_takes_the_first_and_flexible_the_last_number():
    assert metrics.mgsm_strict("答えは-5です。答えは7です。", "ja") == "-5"
    assert metrics.mgsm_flexible("答えは-5です。答えは7です。") == "7"


def test_the_japanese_mmlu_prox_filter_wants_ascii_spaces_and_the_tolerant_one_does_not():
    for answer in ("答えは(A)です", "答えはAです。", "答えは（Ａ） です", "答えは「A」です"):
        assert metrics.mmlu_prox_strict(answer, "ja") == metrics.INVALID
        assert metrics.mmlu_prox_tolerant(answer, "ja") == "A"
    assert metrics.mmlu_prox_strict("答えは (C) です", "ja") == "C"
    assert metrics.mmlu_prox_tolerant("答えは (C) です", "ja") == "C"


def test_the_tolerant_extraction_takes_the_last_answer_and_no_word():
    assert metrics.mmlu_prox_strict("the answer is (B). No, the answer is (D).", "en") == "B"
    assert metrics.mmlu_prox_tolerant("the answer is (B). No, the answer is (D).", "en") == "D"
    assert metrics.mmlu_prox_tolerant("The answer is **J**.", "en") == "J"
    assert metrics.mmlu_prox_tolerant("The answer is a matter of taste.", "en") == metrics.INVALID
    assert metrics.mmlu_prox_tolerant("The answer is Germany", "en") == metrics.INVALID
    assert metrics.mmlu_prox_tolerant("答えは次のとおり", "ja") == metrics.INVALID


@given(st.sampled_from("ABCDEFGHIJ"), st.sampled_from(["ja", "en"]), text)
def test_what_is_parsed_strictly_is_parsed_tolerantly(letter, language, before):
    answer = {"ja": f"答えは ({letter}) です", "en": f"the answer is ({letter})."}[language]
    assert metrics.mmlu_prox_strict(answer, language) == letter
    assert metrics.mmlu_prox_tolerant(before + "\n" + answer, language) == letter


@pytest.mark.parametrize(
    ("answer", "prefix", "expected"),
    [
        ("Step 1: 30.0 + 20.0 = 50.0\nStep 2: 50.0 × 40.0 = 2,000.0\nAnswer: 2,000.0", None, "2000"),  # FlexEval's docs
        ("答えは11です。", "答えは", "11"),
        ("答えは3です。答えは12.50個", "答えは", "12.5"),
        ("1+2=3", "答えは", "3"),  # without the prefix the whole text counts
        ("答えは不明です", "答えは", ""),
        ("5 apples", None, "5"),
        ("#### 10.", None, "10"),
        ("-7", None, "-7"),
        ("no number", None, ""),
    ],
)
def test_flexevals_number_extraction(answer, prefix, expected):
    assert metrics.flexeval_number(answer, prefix) == expected


# --- code --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(n):
    for correct, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = list(itertools.combinations([i < correct for i in range(n)], k))
        assert metrics.pass_at_k(n, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_pass_at_1_of_many_samples_is_the_share_of_right_ones():
    assert metrics.pass_at_k(10, 3, 1) == pytest.approx(0.3)
    assert metrics.pass_at_k(200, 0, 100) == 0.0
    assert metrics.pass_at_k(200, 101, 100) == 1.0


@pytest.mark.parametrize("arguments", [(10, 11, 1), (10, -1, 1), (10, 3, 0), (10, 3, 11)])
def test_pass_at_k_refuses_impossible_counts(arguments):
    with pytest.raises(ValueError, match="pass@"):
        metrics.pass_at_k(*arguments)
