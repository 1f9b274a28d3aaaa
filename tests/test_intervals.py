"""Intervals of means whose items come in clusters."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, ttest_1samp

from tsugiki.intervals import cluster_weights, paired_interval, ratio_intervals, resampled_ratios


def test_every_resample_draws_as_many_clusters_as_there_are():
    weights = np.concatenate(list(cluster_weights(3, 50, 0)))
    assert weights.shape == (50, 3)
    assert set(weights.sum(axis=1)) == {3.0}


def test_drawing_in_blocks_draws_the_same(monkeypatch):
    whole = np.concatenate(list(cluster_weights(7, 40, 5)))
    monkeypatch.setattr("tsugiki.intervals.WEIGHT_BYTES", 8 * 7 * 3)
    blocks = list(cluster_weights(7, 40, 5))
    assert len(blocks) == 14
    assert (np.concatenate(blocks) == whole).all()


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9), st.floats(-3, 3), st.floats(-3, 3)), min_size=1, max_size=25)
)
@settings(max_examples=50, deadline=None)
def test_a_ratio_is_that_of_the_drawn_items_written_out(rows):
    """Each drawn cluster's items written as often as it was drawn, then plain sums."""
    clusters, counts = [f"d{r[0]}" for r in rows], [r[1] for r in rows]
    values = np.array([[r[2] for r in rows], [r[3] for r in rows]])
    names = sorted(set(clusters))
    found = resampled_ratios(values, counts, clusters, resamples=8, seed=3)
    for draw, weights in zip(found, np.concatenate(list(cluster_weights(len(names), 8, 3))), strict=True):
        drawn = [i for name, w in zip(names, weights, strict=True) for _ in range(int(w)) for i, c in enumerate(clusters) if c == name]
        for k in (0, 1):
            expected = math.fsum(values[k][i] for i in drawn) / sum(counts[i] for i in drawn)
            assert draw[k] == pytest.approx(expected, abs=1e-9)


def test_the_interval_of_independent_items_is_the_normal_one():
    x = np.random.default_rng(0).normal(0.3, 0.5, 900)
    low, high = ratio_intervals(x[None], np.ones(900), np.arange(900), resamples=4000)[0]
    half = 1.96 * x.std(ddof=1) / 30
    assert (low, high) == pytest.approx((x.mean() - half, x.mean() + half), abs=0.05 * half * 2)


def test_items_of_one_cluster_add_no_certainty():
    x = np.random.default_rng(1).normal(size=40)
    once = ratio_intervals(x[None], np.ones(40), np.arange(40))[0]
    four = ratio_intervals(np.tile(x, 4)[None], np.ones(160), np.tile(np.arange(40), 4))[0]
    assert four == pytest.approx(once)


def test_fewer_than_ten_clusters_give_no_interval():
    assert ratio_intervals(np.ones((2, 90)), np.ones(90), np.arange(90) % 9) == [None, None]


def test_the_95_percent_interval_of_a_paired_difference_covers_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(2)
    inside = 0
    for trial in range(200):
        cluster = np.repeat(np.arange(60), 3)
        difference = 0.1 + rng.normal(0, 0.3, 60)[cluster] + rng.normal(0, 0.2, 180)
        low, high = ratio_intervals(difference[None], np.ones(180), cluster, resamples=400, seed=trial)[0]
        inside += low <= 0.1 <= high
    assert 180 <= inside <= 199


def test_equal_values_prove_no_more_than_their_number_allows():
    """No difference in 30 answers: 95 % sure only of less than 11.6 points (scipy's exact binomial test)."""
    low, high = paired_interval(np.zeros(30), np.arange(30))
    assert high == -low == pytest.approx(binomtest(0, 30).proportion_ci(0.95).high)
    assert paired_interval(np.zeros(30), np.arange(30) // 5) is None  # six documents


def test_few_flips_have_the_exact_interval_and_clusters_count_as_one():
    """Three answers of 100 lost and none won: Clopper and Pearson's limits of 3 in 100 and of 0 in 100, joined by squares."""
    lost = np.r_[-np.ones(3), np.zeros(97)]
    low, high = paired_interval(lost, np.arange(100))
    three, none = binomtest(3, 100).proportion_ci(0.95), binomtest(0, 100).proportion_ci(0.95)
    assert low <= -0.03 - (three.high - 0.03) + 1e-9
    assert high >= -0.03 + math.hypot(none.high, 0.03 - three.low) - 1e-9
    pairs = paired_interval(lost, np.arange(100) // 2)
    assert pairs[1] - pairs[0] > high - low


def test_many_differences_have_students_interval():
    x = np.random.default_rng(5).normal(0.2, 0.3, 40)
    expected = ttest_1samp(x, 0).confidence_interval(0.95)
    assert paired_interval(x, np.arange(40), resamples=8000) == pytest.approx((expected.low, expected.high), abs=0.012)


def test_a_wider_scale_only_scales():
    x = np.random.default_rng(6).integers(-3, 4, 50) / 3
    narrow = paired_interval(x, np.arange(50))
    assert paired_interval(3 * x, np.arange(50), span=3) == pytest.approx([3 * v for v in narrow])


@pytest.mark.parametrize(("number", "confidence"), [(10, 0.95), (40, 0.95), (30, 0.9)])
def test_the_expanded_interval_covers_a_normal_mean_of_few_clusters(number, confidence):
    rng = np.random.default_rng(number)
    inside = 0
    for trial in range(200):
        x = rng.normal(0, 0.2, number)
        low, high = paired_interval(x, np.arange(number), confidence=confidence, resamples=500, seed=trial)
        inside += low <= 0 <= high
    assert inside / 200 == pytest.approx(confidence, abs=0.05)
