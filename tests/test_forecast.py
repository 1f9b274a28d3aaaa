"""The learning curve drawn further: a law that made the points is found again, and doubt is said as doubt."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from tsugiki.adapt.forecast import EXPONENTS, WORTH, fit_power_law, forecast

COUNTS = (250, 500, 1000, 2000, 4000)


def law(a, b, c, n):
    return c + a * np.asarray(n, float) ** -b


def samples(levels, *, number=300, spread=0.2, own=0.0, seed=0):
    """Nats of each test sample at each count: what a document adds is shared by all counts, ``own`` is not."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(5, 30, number)
    shared = rng.normal(0, spread, number)
    nats = {n: tokens * (level + shared + rng.normal(0, own, number)) for n, level in levels.items()}
    return nats, tokens, [f"d{i}" for i in range(number)]


@settings(deadline=None, max_examples=60)
@given(st.integers(0, len(EXPONENTS) - 1).filter(lambda i: 0.1 < EXPONENTS[i] < 1.5), st.floats(0.05, 3), st.floats(0.2, 3))
def test_a_law_that_made_the_points_is_found_again(i, c, drop):
    b = EXPONENTS[i]
    a = drop * 250**b
    found = fit_power_law(COUNTS, law(a, b, c, COUNTS))
    assert law(*(float(v[0]) for v in found), 8000) == pytest.approx(law(a, b, c, 8000), rel=1e-6)


def test_the_fit_is_the_least_squares_that_a_general_optimiser_finds():
    curve = np.array([0.906, 0.527, 0.283, 0.200, 0.156])
    a, b, c = (float(v[0]) for v in fit_power_law(COUNTS, curve))

    def error(p):
        return (((law(np.exp(p[0]), p[1], abs(p[2]), COUNTS) - curve) / curve) ** 2).sum()

    best = min(minimize(error, start, method="Nelder-Mead", options={"maxiter": 20000, "xatol": 1e-10, "fatol": 1e-14}).fun
               for start in ((5.0, 1.0, 0.1), (3.0, 0.6, 0.05), (8.0, 1.3, 0.1)))
    assert (((law(a, b, c, COUNTS) - curve) / curve) ** 2).sum() == pytest.approx(best, rel=0.02)


def test_offset_and_slope_are_never_negative():
    rising = np.array([1.0, 1.1, 1.2, 1.3, 1.4])
    convex = np.array([4.0, 2.0, 1.0, 0.45, 0.15])
    for curve in (rising, convex):
        a, _, c = fit_power_law(COUNTS, curve)
        assert a[0] >= 0 and c[0] >= 0


def test_many_curves_at_once_are_each_alone():
    rng = np.random.default_rng(1)
    curves = law(30, 0.7, 0.4, COUNTS) * rng.uniform(0.9, 1.1, (20, 5))
    together = fit_power_law(COUNTS, curves)
    for i, curve in enumerate(curves):
        assert [float(v[i]) for v in together] == pytest.approx([float(v[0]) for v in fit_power_law(COUNTS, curve)], rel=1e-9)


def test_a_curve_that_still_falls_asks_for_more_samples():
    nats, tokens, documents = samples({n: law(10, 0.3, 0.5, n) for n in COUNTS})
    found = forecast(nats, tokens, documents)
    assert found.at == 8000 and found.answer == "yes" and found.gain_ci[0] > WORTH
    assert found.nll == pytest.approx(float((sum(nats[4000]) / tokens.sum()) - law(10, 0.3, 0, 4000) + law(10, 0.3, 0, 8000)), rel=0.02)
    assert found.nll_ci[0] < found.nll < found.nll_ci[1]


def test_a_curve_that_has_gone_flat_does_not():
    nats, tokens, documents = samples({n: 1.0 + 2.0 * (n / 250) ** -3.0 for n in COUNTS})
    assert forecast(nats, tokens, documents).answer == "no"


def test_a_law_that_cannot_say_its_own_last_point_is_in_doubt():
    """A sudden drop at the largest count: the law without it misses it, and the miss widens the interval."""
    nats, tokens, documents = samples({250: 1.0, 500: 0.97, 1000: 0.95, 2000: 0.94, 4000: 0.7})
    found = forecast(nats, tokens, documents)
    assert found.backcast["predicted"] > 1.25 * found.backcast["measured"]
    assert found.answer == "unclear"


def test_three_counts_are_too_few():
    nats, tokens, documents = samples({250: 1.0, 500: 0.9, 1000: 0.8})
    assert forecast(nats, tokens, documents) is None
