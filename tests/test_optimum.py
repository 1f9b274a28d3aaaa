"""A learning curve is read with its uncertainty, and documents, not samples, are what was drawn."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tsugiki.adapt.optimum import find_optimum
from tsugiki.intervals import resampled_ratios


def curve(levels, *, samples=400, spread=0.3, own=0.0, seed=0, per_document=1):
    """Nats of each test sample at each count: ``levels`` are nats/token, ``spread`` is shared by all counts."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(5, 30, samples)
    shared = rng.normal(0, spread, samples)
    nats = {n: tokens * (level + shared + rng.normal(0, own, samples)) for n, level in levels.items()}
    return nats, tokens, [f"d{i // per_document}" for i in range(samples)]


def test_estimates_are_plain_sums():
    nats, tokens, documents = curve({100: 2.0, 200: 1.5, 400: 1.6}, own=0.2)
    found = find_optimum(nats, tokens, documents)
    expected = {n: math.fsum(v) / int(tokens.sum()) for n, v in nats.items()}
    assert found.n == min(expected, key=expected.get) == 200
    assert found.nll == pytest.approx(expected[200], rel=1e-12)


def test_long_samples_weigh_more():
    """1 nat/token over 9 tokens and 3 over 1 token are 1.2 nats/token, not 2."""
    found = find_optimum({10: np.array([9.0, 3.0])}, np.array([9, 1]), ["a", "b"])
    assert found.nll == pytest.approx(1.2)


def test_the_spread_is_that_of_the_ratio_estimator():
    """Independent documents of several samples: the textbook (linearised) standard error of a ratio of totals."""
    rng = np.random.default_rng(3)
    documents = np.repeat(np.arange(300), rng.integers(1, 5, 300))
    tokens = rng.integers(5, 30, len(documents))
    nats = tokens * (1.5 + rng.normal(0, 0.4, 300)[documents] + rng.normal(0, 0.2, len(documents)))
    ratio = nats.sum() / tokens.sum()
    residuals = np.bincount(documents, nats) - ratio * np.bincount(documents, tokens)
    expected = math.sqrt(300 * residuals.var(ddof=1)) / tokens.sum()
    names = [f"d{d}" for d in documents]
    draws = resampled_ratios(nats[None], tokens, names, resamples=4000, seed=0)[:, 0]
    assert draws.std(ddof=1) == pytest.approx(expected, rel=0.1)
    assert draws.mean() == pytest.approx(ratio, abs=expected / 5)
    low, high = find_optimum({1: nats}, tokens, names).nll_ci
    assert high - low == pytest.approx(2 * 1.96 * expected, rel=0.1)


def test_repeating_samples_within_their_documents_adds_no_certainty():
    nats, tokens, documents = curve({100: 2.0, 200: 1.9}, own=0.3, per_document=2)
    once = find_optimum(nats, tokens, documents)
    often = find_optimum({n: np.tile(v, 5) for n, v in nats.items()}, np.tile(tokens, 5), documents * 5)
    assert often.nll_ci == pytest.approx(once.nll_ci)
    assert often.one_se_n == once.one_se_n
    as_new = find_optimum(
        {n: np.tile(v, 5) for n, v in nats.items()}, np.tile(tokens, 5), [f"{d}-{i}" for i in range(5) for d in documents]
    )
    width = once.nll_ci[1] - once.nll_ci[0]
    assert as_new.nll_ci[1] - as_new.nll_ci[0] == pytest.approx(width / math.sqrt(5), rel=0.1)


def test_overfitting_is_named_at_the_first_count_that_is_surely_worse():
    found = find_optimum(*curve({250: 2.0, 500: 1.5, 1000: 1.6, 2000: 1.9, 4000: 2.4}, own=0.2))
    assert found.n == 500
    assert found.overfits_at == 1000


def test_a_little_worse_is_not_called_overfitting():
    found = find_optimum(*curve({500: 1.5, 1000: 1.503, 2000: 1.9}, own=0.5, seed=4, samples=100))
    assert found.n in (500, 1000)
    assert found.overfits_at == 2000


def test_a_falling_or_flat_curve_is_not_called_overfitting():
    assert find_optimum(*curve({250: 2.0, 500: 1.5, 1000: 1.2}, own=0.2)).overfits_at is None
    flat = find_optimum(*curve({250: 2.0, 500: 1.5, 1000: 1.5, 2000: 1.5}, own=0.2))
    assert flat.n >= 500
    assert flat.overfits_at is None


def test_a_difference_is_paired():
    """Samples differ by far more than the models do, but every sample is a little worse: that is certain."""
    nats, tokens, documents = curve({100: 1.50, 200: 1.52}, spread=1.0, own=0.01)
    found = find_optimum(nats, tokens, documents)
    assert found.nll_ci[1] - found.nll_ci[0] > 0.05
    assert found.overfits_at == 200
    assert found.one_se_n == 100
    assert found.p_best == 1


def test_one_standard_error_takes_the_smaller_count_where_it_is_as_good():
    found = find_optimum(*curve({100: 2.0, 200: 1.5005, 400: 1.5}, own=1.0, seed=2, samples=2000))
    assert found.n in (200, 400)
    assert found.one_se_n == 200


def test_equal_points_give_the_smallest_count():
    nats, tokens, documents = curve({100: 1.5}, own=0.2)
    found = find_optimum({100: nats[100], 200: nats[100].copy(), 300: nats[100].copy()}, tokens, documents)
    assert (found.n, found.one_se_n, found.overfits_at, found.p_best) == (100, 100, None, 1.0)


def test_a_single_point_is_its_own_optimum():
    found = find_optimum(*curve({70: 1.5}))
    assert (found.n, found.one_se_n, found.p_best, found.overfits_at) == (70, 70, 1.0, None)
    assert found.nll_ci[0] < found.nll < found.nll_ci[1]


def test_the_order_of_the_counts_does_not_matter_and_the_seed_fixes_the_rest():
    nats, tokens, documents = curve({100: 1.6, 200: 1.5, 400: 1.52}, own=0.4)
    again = find_optimum(dict(reversed(nats.items())), tokens, documents)
    assert again == find_optimum(nats, tokens, documents)
    assert again != find_optimum(nats, tokens, documents, seed=1)


@given(
    rows=st.lists(
        st.tuples(st.integers(0, 4), st.integers(1, 40), st.lists(st.floats(0, 12), min_size=3, max_size=3)),
        min_size=1, max_size=25,
    )
)
@settings(max_examples=60, deadline=None)
def test_whatever_the_numbers(rows):
    tokens = np.array([t for _, t, _ in rows])
    nats = {n: np.array([t * v[i] for _, t, v in rows]) for i, n in enumerate((10, 20, 40))}
    found = find_optimum(nats, tokens, [f"d{d}" for d, _, _ in rows], resamples=200)
    nll = {n: v.sum() / tokens.sum() for n, v in nats.items()}
    assert found.nll == pytest.approx(min(nll.values()))
    assert nll[found.n] == pytest.approx(found.nll)
    assert found.one_se_n <= found.n
    assert found.overfits_at is None or (found.overfits_at > found.n and nll[found.overfits_at] > found.nll)
    assert sum(found.p_best_by_n.values()) == pytest.approx(1)
    assert found.p_best == found.p_best_by_n[found.n]
    assert found.nll_ci[0] <= found.nll_ci[1]
