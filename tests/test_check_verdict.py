"""What may be concluded from the check's numbers: intervals, verdicts, the recommendation."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from tsugiki.evaluate.domain import Answer
from tsugiki.intervals import exact_difference, expanded, ratio_intervals
from tsugiki.quantize.verdict import (
    CheckSettings,
    _paired,
    flips,
    judge,
    ratios,
    recommend,
    verdict,
)
from tsugiki.samples import EncodedSample

SETTINGS = CheckSettings()


# --- verdicts ---------------------------------------------------------------------------------------------------

numbers = st.floats(-1, 1)
intervals = st.tuples(numbers, numbers).map(sorted)


@given(intervals, intervals)
def test_a_level_passes_only_with_both_intervals_inside_their_margins(nll, points):
    found = verdict(nll, points, SETTINGS)
    inside = nll[1] < SETTINGS.margin_nll and points[0] > -SETTINGS.margin_score
    outside = nll[0] > SETTINGS.margin_nll or points[1] < -SETTINGS.margin_score
    assert found == ("degraded" if outside else "pass" if inside else "inconclusive")


@given(intervals, intervals, st.floats(0, 1))
def test_more_harm_never_makes_a_better_verdict(nll, points, harm):
    order = ["pass", "inconclusive", "degraded"]
    before = verdict(nll, points, SETTINGS)
    after = verdict([x + harm for x in nll], [x - harm for x in points], SETTINGS)
    assert order.index(after) >= order.index(before)


def synthetic(delta_nll, delta_score, *, number=300, documents=150, noise=0.0, seed=0, kinds=False):
    """What the children would report for F16 and one level: each token costs ``delta_nll`` more, plus noise; a
    share ``delta_score`` of the answers goes wrong."""
    rng = np.random.default_rng(seed)
    samples = [
        EncodedSample(f"s{i}", "q", "a", f"d{i % documents}", ("rule", "fact")[i % 2] if kinds else "", [1], [2, 3])
        for i in range(number)
    ]
    sample = np.repeat(np.arange(number), 2)
    nll = rng.gamma(2, 0.2, 2 * number)
    tokens = {
        "sample": sample,
        "nll": np.stack([nll, nll + delta_nll + noise * rng.normal(size=2 * number)]),
        "kld": np.stack([0 * nll, rng.gamma(1, 0.01, 2 * number)]),
        "top1": np.ones((2, 2 * number)),
        "top5": np.ones((2, 2 * number)),
    }
    wrong = rng.permutation(number) < round(delta_score * number)
    answered = {
        "F16": [Answer(s.id, s.document, s.kind, "a", "a", 1.0, "stop", 0.1) for s in samples],
        "Q4_K_M": [
            Answer(s.id, s.document, s.kind, "b" if w else "a", "a", float(not w), "stop", 0.1)
            for s, w in zip(samples, wrong, strict=True)
        ],
    }
    return samples, tokens, answered


@pytest.fixture
def judged(tmp_path):
    files = {"F16": tmp_path / "f", "Q4_K_M": tmp_path / "q"}
    for i, path in enumerate(files.values()):
        path.write_bytes(b"x" * (10 - i))

    def run(*arguments, **options):
        samples, tokens, answered = synthetic(*arguments, **options)
        return judge(samples, files, tokens, answered, SETTINGS)

    return run


def test_a_harmless_level_passes_and_is_recommended(judged):
    result = judged(0.002, 0.0, noise=0.01)
    level = result["levels"][1]
    assert level["verdict"] == "pass"
    assert level["delta_nll"] == pytest.approx(0.002, abs=0.002)
    assert level["delta_ci"][0] < level["delta_nll"] < level["delta_ci"][1]
    assert result["recommended"]["level"] == "Q4_K_M"
    assert "inside the margins" in level["why"]["en"] and "許容幅に収まっています" in level["why"]["ja"]


@pytest.mark.parametrize(("nll", "points"), [(0.2, 0.0), (0.0, 0.2)])
def test_harm_on_either_measure_degrades_and_f16_is_kept(judged, nll, points):
    result = judged(nll, points, noise=0.01)
    assert result["levels"][1]["verdict"] == "degraded"
    assert result["recommended"]["level"] == "F16"


@pytest.mark.parametrize("nll", [0.0, 0.2])
def test_a_reference_that_is_not_f16_is_called_by_its_own_name(tmp_path, nll):
    files = {"BF16": tmp_path / "f", "Q4_K_M": tmp_path / "q"}
    for path in files.values():
        path.write_bytes(b"x")
    samples, tokens, answered = synthetic(nll, 0.0, noise=0.01)
    result = judge(samples, files, tokens, {"BF16": answered["F16"], "Q4_K_M": answered["Q4_K_M"]}, SETTINGS)
    assert [r["verdict"] == "reference" for r in result["levels"]] == [True, False]
    assert " against BF16 " in result["levels"][1]["why"]["en"] and result["levels"][1]["why"]["ja"].startswith("BF16との差")
    assert result["recommended"]["level"] == ("BF16" if nll > 0.1 else "Q4_K_M")
    said = str(result["recommended"]["why"]) + str([r["why"] for r in result["levels"]])
    assert "BF16" in said and "F16" not in said.replace("BF16", "")


def test_noise_makes_it_inconclusive_and_says_how_many_more_would_do(judged):
    level = judged(0.01, 0.0, noise=0.8)["levels"][1]
    assert level["verdict"] == "inconclusive" and level["more_samples"] > 0
    assert f"about {level['more_samples']:,} more samples" in level["why"]["en"]
    # the estimate rests on one noisy difference: with ten times as many it must be decided
    many = 300 + 10 * level["more_samples"]
    assert judged(0.01, 0.0, noise=0.8, number=many, documents=many // 2)["levels"][1]["verdict"] == "pass"


def test_few_documents_are_never_a_pass(judged):
    level = judged(0.0, 0.0, documents=5)["levels"][1]
    assert level["verdict"] == "inconclusive" and level["delta_ci"] is None
    assert "5 documents are too few" in level["why"]["en"]


def test_equal_answers_on_few_samples_prove_little(judged):
    # no flip in 40 samples: up to 1 − 0.025^(1/40) = 8.8 % may still flip, more than the margin
    level = judged(0.0, 0.0, number=40, documents=40)["levels"][1]
    assert level["delta_score_ci"] == pytest.approx([-0.0881, 0.0881], abs=1e-4)
    assert level["verdict"] == "inconclusive"


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000))
def test_a_level_at_twice_the_margin_never_passes(seed):
    samples, tokens, answered = synthetic(0.1, 0.06, noise=0.1, seed=seed)
    here = {"F16": Path(__file__), "Q4_K_M": Path(__file__)}
    assert judge(samples, here, tokens, answered, replace(SETTINGS, resamples=500))["levels"][1]["verdict"] != "pass"


def test_kinds_and_changed_answers_are_reported(judged):
    level = judged(0.0, 0.1, kinds=True)["levels"][1]
    assert set(level["kinds"]) == {"rule", "fact"} and level["kinds"]["rule"]["n"] == 150
    assert level["changed"] == 30 and len(level["examples"]) == 5
    assert level["examples"][0]["level_score"] < level["examples"][0]["f16_score"]


def test_the_recommendation_is_the_smallest_that_passes_else_the_largest_undecided_else_f16():
    def rows(**verdicts):
        return [{"level": k, "verdict": v, "bytes": int(k[1:3])} for k, v in verdicts.items()]

    assert recommend(rows(F16="reference", Q08="pass", Q05="pass", Q04="degraded"))["level"] == "Q05"
    assert recommend(rows(F16="reference", Q08="inconclusive", Q05="inconclusive", Q04="degraded"))["level"] == "Q08"
    assert recommend(rows(F16="reference", Q08="degraded"))["level"] == "F16"


def test_a_level_that_looks_worse_is_not_recommended_however_few_samples_there_are(judged):
    result = judged(0.5, 0.0, documents=5)
    assert result["levels"][1]["verdict"] == "inconclusive" and result["recommended"]["level"] == "F16"


# --- how often the verdict errs ---------------------------------------------------------------------------------


def share_passed(draw, settings_, trials=300):
    """Share of simulated levels, each exactly at the margin, whose interval lies inside it."""
    passed = 0
    for seed in range(trials):
        low, high = draw(np.random.default_rng(seed))
        passed += high < settings_.margin_nll if settings_.margin_nll < 1 else low > -settings_.margin_score
    return passed / trials


@pytest.mark.parametrize("documents", [10, 25, 100])
def test_a_level_at_the_margin_passes_as_rarely_as_promised(documents):
    # true cost: the margin; documents differ in length and in cost, tokens within them are alike
    rule = replace(SETTINGS, resamples=500)

    def draw(rng):
        tokens = rng.integers(20, 60, documents).astype(float)
        cost = rng.normal(rule.margin_nll, 0.02, documents) + rng.normal(0, 0.1 / np.sqrt(tokens))
        return ratios((tokens * cost)[None], tokens, [str(i) for i in range(documents)], rule, rule.confidence)[0]

    # promised 2.5 %; 300 trials see at most 5.7 % of it in 999 of 1,000 cases
    assert share_passed(draw, rule) <= binom.ppf(0.999, 300, 0.025) / 300


def test_a_plain_percentile_interval_would_not_keep_the_promise():
    rng, covered = np.random.default_rng(0), [0, 0]
    for _ in range(400):
        x, names = rng.normal(size=(1, 10)), [str(i) for i in range(10)]
        for i, confidence in enumerate((0.95, expanded(0.95, 10))):
            low, high = ratio_intervals(x, np.ones(10), names, confidence=confidence, resamples=500)[0]
            covered[i] += low < 0 < high
    assert covered[0] / 400 < 0.925 <= covered[1] / 400


@pytest.mark.parametrize(("number", "documents", "right"), [(120, 120, 0.0), (300, 150, 0.0), (300, 300, 0.02), (600, 60, 0.01)])
def test_answers_at_the_margin_pass_as_rarely_as_promised(number, documents, right):
    # each answer turns wrong or right by chance, three in a hundred more wrong than right
    rule = replace(SETTINGS, resamples=500, margin_nll=1.0)
    names = [str(i % documents) for i in range(number)]

    def draw(rng):
        u = rng.random(number)
        differences = np.where(u < rule.margin_score + right, -1.0, np.where(u > 1 - right, 1.0, 0.0))
        return _paired(differences, names, rule, rule.confidence)

    assert share_passed(draw, rule) <= binom.ppf(0.999, 300, 0.025) / 300


def test_without_a_flip_the_interval_is_the_exact_one():
    assert exact_difference(0, 0, 300, 0.95) == pytest.approx((-(1 - 0.025 ** (1 / 300)), 1 - 0.025 ** (1 / 300)))


def test_flips_of_one_kind_only_have_clopper_and_pearsons_limit():
    # 3 of 100 lost: the exact 95 % limits of 3 %, as printed in tables, are 0.62 % and 8.52 %
    low, high = exact_difference(0.03, 0, 100, 0.95)
    assert low == pytest.approx(-0.0852, abs=5e-5)
    assert high == pytest.approx(-0.03 + np.hypot(0.0362, 0.03 - 0.0062), abs=1e-4)


def test_flips_are_counted_both_ways_with_mcnemars_exact_p():
    def answers(texts):
        return [Answer(str(i), str(i), "", t, "右", float(t == "右"), "stop", 0.1) for i, t in enumerate(texts)]

    before, after = answers("右右右右右右左左左"), answers("左左左左左右右左中")
    # 5 lost and 1 won of 6: two-sided 2 · (1 + 6) / 64
    assert flips(before, after) == {"to_wrong": 5, "to_right": 1, "p": pytest.approx(14 / 64)}


def test_few_flips_in_few_documents_count_as_few():
    alike = np.zeros(400)
    alone = _paired(alike, [str(i) for i in range(400)], SETTINGS, 0.95)
    together = _paired(alike, [str(i % 40) for i in range(400)], SETTINGS, 0.95)
    assert alone[0] == pytest.approx(-0.0092, abs=1e-4) and together[0] == pytest.approx(-0.0881, abs=1e-4)


def test_the_pick_of_many_levels_says_whether_it_holds_for_all(judged):
    sure = judged(0.002, 0.0, noise=0.01)
    assert sure["recommended"]["jointly"] == sure["levels"][1]["jointly"] == "pass"
    assert "judged together" in sure["recommended"]["why"]["en"]


def test_plain_text_is_judged_by_its_nll_alone():
    samples, tokens, _ = synthetic(0.002, 0.0, noise=0.01)
    files = {"F16": Path(__file__), "Q4_K_M": Path(__file__)}
    level = judge(samples, files, tokens, None, SETTINGS)["levels"][1]
    assert level["verdict"] == "pass" and "score" not in level and level["why"]["en"].endswith("the interval lies inside the margin.")
    assert judge(samples, files, tokens | {"nll": tokens["nll"] + [[0], [1]]}, None, SETTINGS)["levels"][1]["verdict"] == "degraded"
