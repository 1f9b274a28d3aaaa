"""Log-linear laws, scores with holes, the efficiency of continued pre-training: references, planted truths, papers."""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tsugiki.errors import UserError
from tsugiki.evaluate.scaling.budgets import budgets, takase
from tsugiki.evaluate.scaling.effect import (
    detectable_multiplier,
    fieller,
    multiplier_interval,
    random_intercept,
    wild_test,
)
from tsugiki.evaluate.scaling.efficiency import (
    Efficiency,
    budgets_at_share,
    compare_pairs,
    continued_efficiency,
    find_pairs,
)
from tsugiki.evaluate.scaling.factors import principal_components
from tsugiki.evaluate.scaling.laws import (
    Law,
    Refused,
    estimate,
    family_weights,
    fit_component_law,
    fit_law,
    fit_laws,
    predict,
    weighted_lines,
)
from tsugiki.evaluate.scaling.missing import attenuation, fill, fit_missing_law, fit_ppca, impute, pool
from tsugiki.evaluate.scaling.tables import DATA, load_models, load_scores, read_table

SHARED = Path(os.environ.get("TSUGIKI_DATA", Path(__file__).parent.parent.parent / "shared" / "data"))
SCORES = SHARED / "scores" / "scores_35.csv"
needs_scores = pytest.mark.skipif(not SCORES.exists(), reason="the public score matrix is not here")

FAMILIES = [f for f, size in zip("abcdefg", (7, 5, 4, 3, 2, 2, 2), strict=True) for _ in range(size)]  # 25 models


def planted(slope=10.0, noise=1.0, shared=0.0, seed=0):
    """25 models of 7 families on ``y = slope·x``, with noise of their own and of their family."""
    rng = np.random.default_rng(seed)
    _, codes = np.unique(FAMILIES, return_inverse=True)
    x = 22 + rng.normal(0, 0.6, 7)[codes] + rng.normal(0, 0.6, 25)
    return slope * x + shared * rng.normal(0, 1, 7)[codes] + noise * rng.normal(0, 1, 25), x


def b_matrix():
    scores, models = load_scores(SCORES), load_models()
    facts = [models[m] for m in scores.models]
    x = {axis: np.log10(budgets(scores.models, models, axis)) for axis in ("total", "en", "ja")}
    return scores, models, [f.family for f in facts], np.array([f.construction == "CPT" for f in facts]), x


# ---- laws -----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(-4, 4), st.integers(0, 3)), min_size=5, max_size=12))
def test_statistics_of_a_resample_are_scipys_of_the_points_written_out(rows):
    x, y, w = (np.array(column, float) for column in zip(*rows, strict=True))
    long_x, long_y = np.repeat(x, w.astype(int)), np.repeat(y, w.astype(int))
    found = {k: v[0] for k, v in weighted_lines(x, y, w[None]).items()}
    if len(np.unique(long_x)) < 3 or len(np.unique(long_y)) < 2:
        assert all(np.isnan(v) for v in found.values())
        return
    line = stats.linregress(long_x, long_y)
    assert found["slope"] == pytest.approx(line.slope, abs=1e-9)
    assert found["intercept"] == pytest.approx(line.intercept, abs=1e-9)
    assert found["pearson"] == pytest.approx(line.rvalue, abs=1e-9)
    assert found["spearman"] == pytest.approx(stats.spearmanr(long_x, long_y)[0], abs=1e-9)
    assert found["kendall"] == pytest.approx(stats.kendalltau(long_x, long_y)[0], abs=1e-9)
    each = weighted_lines(x, np.stack([y, y]), np.stack([w, w]))  # the scores of each resample given apart
    assert {k: v[1] for k, v in each.items()} == pytest.approx(found)


def test_families_are_drawn_whole_and_as_many_as_there_are():
    weights = family_weights(["a", "b", "b", "c"], 500, seed=0)
    assert weights.shape == (500, 4)
    np.testing.assert_array_equal(weights[:, 1], weights[:, 2])
    np.testing.assert_array_equal(weights[:, [0, 1, 3]].sum(1), np.full(500, 3))
    np.testing.assert_array_equal(weights, family_weights(["a", "b", "b", "c"], 500, seed=0))
    assert (weights != family_weights(["a", "b", "b", "c"], 500, seed=1)).any()


def test_a_law_is_recovered_with_its_standard_error_and_left_out_families():
    y, x = planted()
    law = fit_law(y, x, FAMILIES, name="t", axis="ja", draws=500)
    line = stats.linregress(x, y)
    assert (law.n, law.n_families) == (25, 7)
    assert law.slope.value == pytest.approx(line.slope)
    assert law.slope_se == pytest.approx(line.stderr)
    assert law.slope.low < 10 < law.slope.high
    errors, slopes = [], {}
    for family in "abcdefg":  # leave-one-family-out, written out
        out = np.array(FAMILIES) == family
        rest = stats.linregress(x[~out], y[~out])
        slopes[family] = rest.slope
        errors += list(y[out] - rest.intercept - rest.slope * x[out])
    assert law.family_rmse == pytest.approx(np.sqrt(np.mean(np.square(errors))))
    assert law.without == pytest.approx(slopes)


def test_intervals_from_few_families_hold_the_truth():
    held = plain = 0
    for seed in range(100):
        y, x = planted(noise=0.8, shared=0.6, seed=seed)
        law = fit_law(y, x, FAMILIES, name="t", axis="ja", draws=300, seed=seed)
        held += law.slope.low <= 10 <= law.slope.high
        low, high = np.nanquantile(law.slope_draws, [0.025, 0.975])
        plain += low <= 10 <= high
    assert held >= 0.90 * 100  # 95 % less two standard errors of the simulation
    assert held > plain


def test_prediction_intervals_hold_models_of_new_families():
    held = 0
    for seed in range(100):
        y, x = planted(noise=0.8, shared=0.6, seed=seed)
        law = fit_law(y, x, FAMILIES, name="t", axis="ja", draws=2)
        rng = np.random.default_rng(1000 + seed)
        at = 22 + rng.normal(0, 0.85)
        expected = predict(law, at)
        held += expected.low <= 10 * at + rng.normal(0, 1) <= expected.high
    assert held >= 0.90 * 100


def test_predictions_outside_the_budgets_seen_say_so():
    y, x = planted()
    law = fit_law(y, x, FAMILIES, name="t", axis="ja", draws=10)
    assert not predict(law, x.mean()).extrapolated
    assert predict(law, x.max() + 0.01).extrapolated and predict(law, x.min() - 0.01).extrapolated
    wide = predict(law, x.max() + 2)
    assert wide.high - wide.low > predict(law, x.mean()).high - predict(law, x.mean()).low


def test_no_law_of_too_little_and_a_flag_on_few():
    y, x = planted()
    assert "at least 4" in fit_law(y[:3], x[:3], FAMILIES[:3], name="t", axis="ja").reason
    assert "2 different budgets" in fit_law(y[:6], np.r_[1, 1, 1, 2, 2, 2], FAMILIES[:6], name="t", axis="en").reason
    assert "same score" in fit_law(np.full(9, 0.1), x[:9], FAMILIES[:9], name="t", axis="ja").reason
    few = fit_law(y[::4], x[::4], FAMILIES[::4], name="t", axis="ja", draws=300)
    assert isinstance(few, Law) and few.n == 7 and any("only 7 points" in note for note in few.notes)
    four = fit_law(y[:19], x[:19], FAMILIES[:19], name="t", axis="ja", draws=300)  # a to d
    assert four.n_families == 4 and four.slope.low is None and any("4 families" in note for note in four.notes)


def test_unknown_scores_and_budgets_leave_only_their_own_points_out():
    y, x = planted()
    y[3], x[5] = np.nan, np.nan
    law = fit_law(y, x, FAMILIES, name="t", axis="ja", draws=50, models=[f"m{i}" for i in range(25)])
    assert law.n == 23 and "m3" not in law.models and "m5" not in law.models
    alone = fit_laws(np.stack([y, planted()[0]], 1), ["t", "u"], x, FAMILIES, axis="ja", draws=50)
    assert [a.n for a in alone] == [23, 24]
    assert alone[0].slope == law.slope


def test_a_law_of_unequal_columns_is_refused_with_all_problems():
    y, x = planted()
    with pytest.raises(UserError, match="24 budgets for 25") as error:
        fit_law(y, x[:24], FAMILIES[:20], name="t", axis="fr")
    assert "20 families" in str(error.value) and "'fr'" in str(error.value)


def test_one_family_that_decides_the_sign_is_named():
    x = np.r_[np.linspace(20, 21, 10), 24, 24.1, 24.2]
    y = np.r_[-np.linspace(20, 21, 10), 0, 0.1, 0.2]
    law = fit_law(y, x, [*"abcdeabcde", *"zzz"], name="t", axis="ja", draws=50)
    assert any("changes its sign without z" in note for note in law.notes)


def test_no_interval_where_resamples_have_no_answer():
    assert estimate(1.0, np.r_[np.ones(80), np.full(20, np.nan)], 7).low is None
    assert estimate(1.0, np.ones(100), 4).low is None
    fine = estimate(0.5, np.linspace(0.4, 0.6, 101), 7)
    assert fine.low < 0.405 and fine.high > 0.595  # wider than the percentiles
    correlation = estimate(0.99, np.linspace(0.9, 1, 101), 7, scale="fisher")
    assert correlation.high <= 1


# ---- paper B and paper A --------------------------------------------------------------------------------------------


@needs_scores
@pytest.mark.parametrize(
    ("component", "axis", "n", "pearson", "spearman", "kendall"),
    [
        (0, "en", 27, 0.9160, 0.9113, 0.7611),
        (1, "ja", 25, 0.7793, 0.7524, 0.5930),
        (1, "en", 27, 0.1644, None, None),
        (1, "total", 27, 0.1864, None, None),
        (0, "total", 27, 0.9383, None, None),
        (0, "ja", 25, 0.0635, None, None),
        (2, "ja", 25, 0.3981, None, None),
    ],
)
def test_paper_b_components_against_budgets(component, axis, n, pearson, spearman, kendall):
    scores, _, families, _, x = b_matrix()
    y = principal_components(scores).scores[:, component]
    law = fit_law(y, x[axis], families, name="PC", axis=axis, unit="SD", draws=20)
    assert law.n == n
    assert law.pearson.value == pytest.approx(pearson, abs=6e-5)
    if spearman is not None:
        assert law.spearman.value == pytest.approx(spearman, abs=6e-5)
        assert law.kendall.value == pytest.approx(kendall, abs=6e-5)


@needs_scores
@pytest.mark.parametrize(
    ("tasks", "axis", "n", "slope", "se", "r", "tau"),
    [
        (["niilc"], "ja", 25, 10.2491, 1.3, 0.8602, 0.65),
        (["niilc"], "total", 27, 5.2, 4.0, 0.25, 0.21),
        (["mgsm_ja"], "total", 27, 30.5411, 3.2, 0.8840, 0.73),
        (["jmmlu"], "total", 27, 19.5036, 2.0, 0.8911, 0.77),
        (["mgsm_ja", "jmmlu"], "total", 27, 25.0, 2.5, 0.90, 0.77),
        (["mgsm_ja", "jmmlu"], "ja", 25, 5.7, 4.2, 0.27, 0.11),
        (["niilc", "jemhopqa"], "ja", 25, 7.4, 1.3, 0.78, 0.59),
        (["niilc", "jemhopqa"], "total", 27, 5.7, 2.8, 0.38, 0.29),
    ],
)
def test_paper_a_laws_on_paper_b_models(tasks, axis, n, slope, se, r, tau):
    scores, _, families, _, x = b_matrix()
    y = 100 * np.mean([scores.column(t) for t in tasks], axis=0)
    law = fit_law(y, x[axis], families, name="+".join(tasks), axis=axis, draws=20)
    assert law.n == n
    assert law.slope.value == pytest.approx(slope, abs=0.06)
    assert law.slope_se == pytest.approx(se, abs=0.06)
    assert law.pearson.value == pytest.approx(r, abs=0.006)
    assert law.kendall.value == pytest.approx(tau, abs=0.006)


@needs_scores
def test_paper_b_laws_predict_families_they_have_not_seen_as_measured():
    scores, _, families, _, x = b_matrix()
    niilc = fit_law(100 * scores.column("niilc"), x["ja"], families, name="niilc", axis="ja")
    assert niilc.intercept.value == pytest.approx(-159.8930, abs=1e-3)
    assert (niilc.family_rmse, niilc.rmse) == pytest.approx((4.7, 4.5), abs=0.06)
    # the plain percentiles of the cluster bootstrap; drawn also from families without a budget they are 6.95 to 12.80
    np.testing.assert_allclose(np.nanquantile(niilc.slope_draws, [0.025, 0.975]), [6.95, 12.80], atol=0.6)
    mgsm = fit_law(100 * scores.column("mgsm_ja"), x["total"], families, name="mgsm", axis="total", draws=20)
    assert (mgsm.family_rmse, mgsm.rmse) == pytest.approx((12.6, 10.2), abs=0.06)


@needs_scores
def test_a_component_found_anew_in_each_resample_is_less_sure_than_fixed_scores():
    scores, _, families, _, x = b_matrix()
    pcs = principal_components(scores)
    fixed = fit_law(pcs.scores[:, 1], x["ja"], families, name="PC2", axis="ja", unit="SD", draws=2000)
    anew = fit_component_law(scores.values, pcs.loadings[1], x["ja"], families, name="PC2", axis="ja", draws=800)
    assert anew.pearson.value == pytest.approx(fixed.pearson.value)
    assert anew.slope.value == pytest.approx(1.2194, abs=1e-4)
    assert anew.pearson.low < fixed.pearson.low - 0.2
    first = fit_component_law(scores.values, pcs.loadings[0], x["en"], families, name="PC1", axis="en", draws=500)
    assert first.pearson.low > 0.75


@pytest.mark.parametrize(
    ("score", "axis", "slope", "low", "high", "r", "tau"),
    [
        ("neutral", "total", 15.8, -1.3, 32.9, 0.68, 0.40),
        ("neutral", "ja", 0.0, -60, 60, 0.00, 0.04),
        ("culture", "total", -5.8, -21.6, 9.9, -0.35, 0.04),
        ("culture", "ja", 30.5, -0.1, 61.1, 0.71, 0.25),
    ],
)
def test_paper_a_table_2_alone(score, axis, slope, low, high, r, tau):
    """Eight models (the tokens of ELYZA's are unknown): the order of the paper, and no interval without zero."""
    models = load_models()
    rows = [row for _, row in read_table(DATA / "takase_table2_scores.csv")[1]]
    columns = {"neutral": ("mgsm_ja", "mmlu_prox_ja"), "culture": ("niilcqa", "jmmlu_part", "jaqket")}[score]
    y = np.array([np.mean([float(row[c]) for c in columns]) for row in rows])
    names = [row["model"] for row in rows]
    x = np.log10(budgets(names, models, axis, takase()))
    law = fit_law(y, x, [models[m].family for m in names], name=score, axis=axis)
    half = stats.t.ppf(0.975, law.n - 2) * law.slope_se
    assert law.n == 8
    assert law.slope.value == pytest.approx(slope, abs=0.06)
    assert (law.slope.value - half, law.slope.value + half) == pytest.approx((low, high), abs=0.2)
    assert law.pearson.value == pytest.approx(r, abs=0.006)
    assert law.kendall.value == pytest.approx(tau, abs=0.006)
    assert law.slope.low is None  # four families


# ---- holes ----------------------------------------------------------------------------------------------------------


def correlated(rows=60, seed=0):
    """A matrix of two components and noise, and a budget that the first component follows (r = 0.8)."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(rows, 2))
    loadings = np.array([[1, 0.2], [0.9, -0.4], [0.8, 0.5], [0.7, -0.6], [1, 0.1], [0.9, 0.6], [0.8, -0.3], [1, -0.5]])
    values = 40 + 10 * (z @ loadings.T) + 4 * rng.normal(size=(rows, 8))
    x = 22 + 0.5 * z[:, 0] * 0.8 + 0.5 * 0.6 * rng.normal(size=rows)
    return values, x


def test_without_holes_the_fit_is_the_closed_form_of_tipping_and_bishop():
    values, _ = correlated()
    model = fit_ppca(values, 2, tolerance=1e-12)
    eigen = np.linalg.eigvalsh(np.corrcoef(values.T))[::-1]
    n, t = values.shape
    assert model.noise == pytest.approx(eigen[2:].mean(), rel=1e-5)
    best = -n / 2 * (t * np.log(2 * np.pi) + np.log(eigen[:2]).sum() + (t - 2) * np.log(eigen[2:].mean()) + t)
    assert model.log_likelihood == pytest.approx(best, rel=1e-9)


def test_the_likelihood_is_that_of_the_observed_cells():
    values, _ = correlated()
    rng = np.random.default_rng(1)
    values[rng.random(values.shape) < 0.25] = np.nan
    model = fit_ppca(values, 2, tolerance=1e-10)
    covariance = model.loadings @ model.loadings.T + model.noise * np.eye(8)
    z = (values - model.mean) / model.scale
    expected = 0.0
    for row in z:  # a float64 loop over rows
        seen = np.isfinite(row)
        expected += stats.multivariate_normal.logpdf(row[seen], np.zeros(seen.sum()), covariance[np.ix_(seen, seen)])
    # the reported value is that of the data scaled by observed SDs, before the fitted offset is folded into the mean
    assert model.log_likelihood == pytest.approx(expected, rel=1e-6)
    assert model.converged and model.cells == int(np.isfinite(values).sum())


def test_a_filled_cell_is_its_conditional_expectation_and_known_cells_stay():
    values, _ = correlated()
    holes = values.copy()
    holes[0, 2] = np.nan
    model = fit_ppca(holes, 2)
    filled = fill(holes, model)
    covariance = (model.loadings @ model.loadings.T + model.noise * np.eye(8)) * np.outer(model.scale, model.scale)
    rest = [0, 1, 3, 4, 5, 6, 7]
    gain = np.linalg.solve(covariance[np.ix_(rest, rest)], values[0, rest] - model.mean[rest])
    assert filled[0, 2] == pytest.approx(model.mean[2] + covariance[2, rest] @ gain)
    np.testing.assert_array_equal(filled[1:], values[1:])


def test_fillings_differ_only_in_holes_and_by_seed():
    values, x = correlated()
    holes = values.copy()
    holes[np.random.default_rng(2).random(values.shape) < 0.15] = np.nan
    a = impute(holes, imputations=4, seed=0, auxiliary=x[:, None])
    assert a.shape == (4, *values.shape)
    seen = np.isfinite(holes)
    for filling in a:
        np.testing.assert_array_equal(filling[seen], values[seen])
    assert (a[:, ~seen].std(0) > 0).all()
    np.testing.assert_array_equal(a, impute(holes, imputations=4, seed=0, auxiliary=x[:, None]))


def test_rubins_rules_by_hand():
    pooled = pool(np.array([1.0, 2.0, 3.0]), np.array([1.0, 1.0, 1.0]), complete_df=1e9)
    assert pooled.value == 2
    assert pooled.se == pytest.approx(np.sqrt(1 + 4 / 3 * 1))
    lost = (4 / 3) / (7 / 3)
    assert pooled.df == pytest.approx(2 / lost**2, rel=1e-3)  # Rubin's (1987) limit of Barnard & Rubin
    same = pool(np.array([2.0, 2.0]), np.array([0.25, 0.25]), complete_df=1e9)
    assert (same.se, same.missing_information) == (0.5, 0)
    assert (same.low, same.high) == pytest.approx((2 - 1.96 * 0.5, 2 + 1.96 * 0.5), abs=1e-3)
    with pytest.raises(UserError, match="at least 2"):
        pool(np.array([1.0]), np.array([1.0]), complete_df=5)


def test_filling_without_the_budget_weakens_its_correlation_and_with_it_less():
    rng = np.random.default_rng(0)
    own = rng.normal(size=(80, 4))
    values = rng.normal(size=(80, 1)) + own
    x = own[:, 3] + 0.5 * rng.normal(size=80)  # what the budget explains of task 3 no other task knows

    def r(matrix):
        return float(np.corrcoef(matrix[:, 3], x)[0, 1])

    blind = attenuation(values, r, 0.3, repeats=5)
    knowing = attenuation(values, r, 0.3, repeats=5, auxiliary=x[:, None])
    assert blind.ratio < 0.85
    assert abs(1 - knowing.ratio) < abs(1 - blind.ratio)
    with pytest.raises(UserError, match="between 0 and 1"):
        attenuation(values, r, 1.2)


def test_a_law_over_holes_pools_fillings_and_says_what_they_do():
    values, x = correlated(rows=25)
    complete = fit_missing_law(values, lambda m: m.mean(1), x, FAMILIES, name="mean", draws=200)
    assert complete.attenuation is None and complete.slope.missing_information == 0
    assert complete.slope.value == pytest.approx(stats.linregress(x, values.mean(1)).slope)
    holes = values.copy()
    holes[np.random.default_rng(3).random(values.shape) < 0.2] = np.nan
    law = fit_missing_law(holes, lambda m: m.mean(1), x, FAMILIES, name="mean", draws=200, imputations=8, repeats=4)
    assert law.slope.low < complete.slope.value < law.slope.high
    assert -1 <= law.pearson.low < law.pearson.value < law.pearson.high <= 1
    assert 0 < law.slope.missing_information < 1
    assert "missing" in law.sentence and law.missing == pytest.approx(np.isnan(holes).mean())
    assert isinstance(fit_missing_law(holes[:6], lambda m: m.mean(1), x[:6], FAMILIES[:6], name="m"), Refused)


def test_matrices_that_cannot_be_modelled_are_told_by_name():
    values, _ = correlated(rows=10)
    values[:, 1] = 5.0
    values[2] = np.nan
    values[3:, 4] = np.nan
    with pytest.raises(UserError) as error:
        fit_ppca(values, 2, rows=[f"model {i}" for i in range(10)], columns=[f"task {j}" for j in range(8)])
    text = str(error.value)
    assert "model 2: no score" in text and "task 1: all 9 scores are 5" in text and "task 4: 2 scores" in text
    with pytest.raises(UserError, match="between 1 and 7"):
        fit_ppca(correlated(rows=10)[0], 8)


# ---- continued pre-training -----------------------------------------------------------------------------------------


def trials(offset=0.0, shared=1.0, noise=1.0, seed=0, families=8):
    """From-scratch and continued models in every family: ``y = 10·x + offset·continued`` and noise."""
    rng = np.random.default_rng(seed)
    names = np.repeat([f"f{i}" for i in range(families)], 4)
    continued = np.tile([False, False, True, True], families)
    x = 22 + rng.normal(0, 0.7, len(names)) + 0.5 * continued
    y = 10 * x + offset * continued + np.repeat(shared * rng.normal(size=families), 4) + noise * rng.normal(size=len(names))
    return y, x, continued, names


def dense(y, x, continued, names, ratio, reml):
    """−2·log-likelihood, up to a constant, with V written out."""
    design = np.column_stack([np.ones(len(y)), x, continued])
    v = np.eye(len(y)) + ratio * (names[:, None] == names[None, :])
    inverse = np.linalg.inv(v)
    cross = design.T @ inverse @ design
    beta = np.linalg.solve(cross, design.T @ inverse @ y)
    rss = (y - design @ beta) @ inverse @ (y - design @ beta)
    n, p = design.shape
    logdet = np.linalg.slogdet(v)[1]
    if reml:
        return (n - p) * np.log(rss) + logdet + np.linalg.slogdet(cross)[1], beta
    return n * np.log(rss) + logdet, beta


@pytest.mark.parametrize("method", ["reml", "ml"])
def test_the_random_effect_is_the_optimum_of_the_likelihood_written_out(method):
    y, x, continued, names = trials(offset=3, shared=2, seed=4)
    effect = random_intercept(y, x, continued, names, method=method)
    ratios = np.exp(np.linspace(-6, 6, 401))
    values = [dense(y, x, continued.astype(float), names, r, method == "reml") for r in ratios]
    best = int(np.argmin([v for v, _ in values]))
    assert effect.intraclass == pytest.approx(ratios[best] / (1 + ratios[best]), abs=0.01)
    assert (effect.slope, effect.value) == pytest.approx(tuple(values[best][1][1:]), rel=3e-3)
    assert effect.df == 5


def test_a_planted_multiplier_is_found_and_its_absence_is_not():
    planted_answer = continued_efficiency(
        *trials(offset=10 * np.log10(4), noise=0.5, seed=1), [str(i) for i in range(32)], name="t", draws=500
    )
    assert isinstance(planted_answer, Efficiency) and planted_answer.verdict == "more efficient"
    assert planted_answer.effect.multiplier == pytest.approx(4, rel=0.2)
    assert planted_answer.multiplier.low < 4 < planted_answer.multiplier.high
    y, x, continued, names = trials(offset=-10 * np.log10(4), noise=0.5, seed=2)
    models = [str(i) for i in range(32)]
    assert continued_efficiency(y, x, continued, names, models, name="t", draws=500).verdict == "less efficient"
    y, x, continued, names = trials(offset=0, noise=0.5, seed=3)
    assert continued_efficiency(y, x, continued, names, models, name="t", draws=500).verdict == "equivalent"
    y, x, continued, names = trials(offset=0, noise=8, seed=3)
    unclear = continued_efficiency(y, x, continued, names, models, name="t", draws=500)
    assert unclear.verdict == "inconclusive" and "do not decide" in unclear.sentence
    assert unclear.detectable > 2


def test_the_wild_test_rejects_true_nulls_rarely_and_knows_the_true_multiplier():
    rejected = 0
    for seed in range(120):
        data = trials(offset=10 * np.log10(3), seed=seed, families=7)
        rejected += wild_test(*data, log_multiplier=np.log10(3)).p <= 0.05
    assert rejected <= 0.09 * 120
    data = trials(offset=10 * np.log10(3), noise=0.5, seed=0, families=7)
    low, high = multiplier_interval(*data)
    assert low < 3 < high and low > 1
    test = wild_test(*data)
    assert test.enumerated and test.patterns == 128 and test.p < 0.05
    many = wild_test(*trials(families=15), draws=199, seed=1)
    assert not many.enumerated and many.patterns == 200
    assert many == wild_test(*trials(families=15), draws=199, seed=1)


def test_fiellers_interval_is_unbounded_without_a_slope():
    assert fieller(1.0, 0.5, 1.0, 1.0, 0.0, 2.0) == (None, None)
    assert fieller(1.0, -5.0, 0.1, 0.1, 0.0, 2.0) == (None, None)
    low, high = fieller(2.0, 4.0, 0.01, 0.0, 0.0, 2.0)  # a slope known exactly: (2 ± 0.2) / 4
    assert (low, high) == pytest.approx((0.45, 0.55))
    for ratio in (low, high):
        assert (2.0 - ratio * 4.0) ** 2 == pytest.approx(2.0**2 * 0.01)


def test_budget_and_construction_that_move_together_are_refused():
    y, x, continued, names = trials()
    with pytest.raises(UserError, match="cannot be told apart"):
        random_intercept(y, continued * 1.0, continued, names)
    with pytest.raises(UserError, match="at least 5"):
        random_intercept(y[:8], x[:8], continued[:8], names[:8])
    refused = continued_efficiency(y, x, continued & (np.arange(32) < 3), names, names, name="t")
    assert isinstance(refused, Refused) and "1 continued" in refused.reason
    with pytest.raises(UserError, match="above 1"):
        continued_efficiency(y, x, continued, names, names, name="t", margin=0.5)


def test_pairs_cancel_what_a_family_has_in_common():
    rng = np.random.default_rng(0)
    x = np.r_[rng.normal(22, 0.5, 6), rng.normal(23, 0.3, 6)]
    base_level = rng.normal(0, 50, 6)
    y = 7 * x + np.r_[base_level, base_level]
    continued = np.repeat([False, True], 6)
    pairs = compare_pairs(y, x, [(i, i + 6) for i in range(6)], continued, [str(i) for i in range(12)], draws=200)
    assert pairs.slope.value == pytest.approx(7)
    assert (pairs.slope.low, pairs.slope.high) == pytest.approx((7, 7))
    assert (pairs.n, pairs.n_bases) == (6, 6)
    x[0] = np.nan
    assert compare_pairs(y, x, [(0, 6)], continued, [str(i) for i in range(12)]) is None


@needs_scores
def test_paper_b_does_not_say_whether_continuing_is_more_efficient():
    scores, models, families, continued, x = b_matrix()
    y = 100 * scores.column("niilc")
    pairs = find_pairs(scores.models, models)
    answer = continued_efficiency(
        y, x["ja"], continued, families, scores.models, name="NIILC", pairs=pairs,
        budgets_at=budgets_at_share(scores.models, models),
    )  # fmt: skip
    assert (answer.n, answer.n_continued, answer.n_families) == (25, 15, 7)
    effect = answer.effect
    assert (effect.value, effect.se, effect.slope) == pytest.approx((1.2, 1.95, 10.13), abs=0.01)
    assert (effect.low, effect.high) == pytest.approx((-4.2, 6.6), abs=0.05)
    assert (effect.df, effect.intraclass) == (4, 0)
    assert answer.wild.se == pytest.approx(1.50, abs=0.005)
    assert answer.wild.p == pytest.approx(0.34, abs=0.005) and answer.wild.patterns == 128
    assert answer.multiplier.value == pytest.approx(1.31, abs=0.005)
    assert 0.2 < answer.multiplier.low < 0.67 and 2.5 < answer.multiplier.high < 8
    assert detectable_multiplier(effect.se, effect.slope) == pytest.approx(3.5, abs=0.05)  # with a normal; t is honest
    assert answer.detectable == pytest.approx(5.2, abs=0.05)
    assert answer.pairs.n == 11
    assert answer.pairs.slope.value == pytest.approx(9.6, abs=0.05)
    assert (answer.pairs.scratch_slope, answer.pairs.scratch_se) == pytest.approx((9.5, 1.6), abs=0.05)
    assert answer.verdict == "inconclusive"


@needs_scores
def test_the_answer_hangs_on_the_japanese_assumed_in_llama():
    scores, models, families, continued, x = b_matrix()
    y = 100 * scores.column("niilc")
    answer = continued_efficiency(
        y, x["ja"], continued, families, scores.models, name="NIILC", draws=100,
        budgets_at=budgets_at_share(scores.models, models),
    )  # fmt: skip
    curve = answer.sensitivity
    assert [p.share for p in curve] == [0.0005, 0.001, 0.005, 0.01, 0.018]
    np.testing.assert_allclose([p.effect.value for p in curve], [0.3, 1.2, 3.9, 5.0, 6.4], atol=0.06)
    np.testing.assert_allclose([p.effect.se for p in curve], [2.1, 2.0, 1.8, 2.0, 2.2], atol=0.06)
    np.testing.assert_allclose([p.pearson for p in curve], [0.85, 0.86, 0.85, 0.81, 0.74], atol=0.006)
    assert answer.depends and "hangs on an assumption" in answer.sentence
    assert curve[-1].excludes_one == (True, False)  # one method alone would have said yes
