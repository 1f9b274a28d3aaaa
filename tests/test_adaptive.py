"""An adaptive sweep trains what could be the best count, and says of every other one why it need not be trained."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.trial import TrialState
from transformers import AutoTokenizer

from tsugiki.adapt.adaptive import DOUBT, READINGS, Measured, cannot_win, coarse_counts, next_fits, reading, turned_up
from tsugiki.adapt.fit import FitSettings, probe_steps
from tsugiki.adapt.forecast import chance_below
from tsugiki.adapt.optimum import find_optimum
from tsugiki.adapt.sweep import SweepSettings, run_sweep
from tsugiki.artifacts import read_json, write_json
from tsugiki.errors import UserError
from tsugiki.recipes.pretrain import TINY_BASES, build_model
from tsugiki.recipes.report import render
from tsugiki.samples import EncodedSample, write_encoded

TINY_LLAMA = Path(__file__).resolve().parents[1] / "recipes" / "bases" / "tiny-llama"
GRID = (250, 500, 1000, 2000, 4000)


def setsubi(n):
    """The law through the bundled domain's grid."""
    return 0.1 + 199 * n**-0.9957


def construction(n):
    return 0.37 + 9.79 * n**-0.2


def world(curve, *, noise=0.0, fits=1, samples=200, seed=0):
    """Nats of each test sample of every fit on the grid: documents differ, fits differ by their seed's noise, a sample a little."""
    rng = np.random.default_rng(seed)
    tokens, document = rng.integers(5, 30, samples), np.arange(samples) % 60
    shared = rng.normal(0, 0.3, 60)[document]
    nats = {
        (n, fit): tokens * curve(n) * np.exp(noise * rng.standard_normal() + shared + rng.normal(0, 0.1 if noise else 0, samples))
        for n in GRID for fit in range(fits)
    }
    return nats, tokens, [f"d{d}" for d in document]


def sweep(nats, tokens, documents, *, seeds=1, overtrained=()):
    """Follow the policy to its end: fits of each count, the last decision, and how many rounds it took."""
    fits, rounds = {}, 0
    while True:
        measured = {n: Measured(np.mean([nats[n, i] for i in range(k)], axis=0), k, n in overtrained) for n, k in fits.items()}
        decision = next_fits(GRID, measured, tokens, documents, seeds=seeds)
        if not decision.fits:
            return fits, decision, rounds
        assert set(decision.fits) == set(decision.why) <= set(GRID)
        assert all(k > fits.get(n, 0) for n, k in decision.fits.items())
        fits |= decision.fits
        rounds += 1


def share(fits):
    return sum(n * k for n, k in fits.items()) / sum(GRID)


# --- which counts ---------------------------------------------------------------------------------------------


def test_the_largest_and_an_eighth_of_it_come_first():
    assert coarse_counts(GRID) == [500, 4000]
    assert coarse_counts((250, 500, 1000, 2000)) == [250, 2000]
    assert coarse_counts((900, 1000)) == [900, 1000]
    assert coarse_counts((70,)) == [70]
    assert next_fits((70,), {}, np.array([3]), ["a"]).fits == {70: 1}


@pytest.mark.parametrize("curve", [setsubi, construction])
def test_a_curve_that_falls_is_known_from_two_counts(curve):
    fits, decision, _ = sweep(*world(curve))
    assert fits == {500: 1, 4000: 1}
    assert share(fits) < 0.6
    assert set(decision.why) == {250, 1000, 2000}
    assert decision.chances[1000] < decision.chances[2000] < DOUBT


def test_ends_that_do_not_differ_leave_doubt():
    assert len(sweep(*world(lambda n: 1.0, noise=0.02))[0]) > 2


@given(best=st.sampled_from(GRID[:-1]), steep=st.floats(0.05, 1.5), rise=st.floats(0.05, 1.5))
@settings(max_examples=25, deadline=None)
def test_a_lowest_count_below_the_largest_is_found_with_what_lies_beside_it(best, steep, rise):
    """Any curve with one lowest count, if its rise is seen at the largest: as worse than the small count, or as overtraining."""
    def curve(n):
        octaves = np.log2(n / best)
        return 1 + (steep * -octaves if octaves < 0 else rise * octaves)

    fits, decision, _ = sweep(*world(curve), overtrained={4000})
    at = GRID.index(best)
    assert min(fits, key=curve) == best
    assert {GRID[max(at - 1, 0)], GRID[at + 1]} <= set(fits)
    assert set(decision.why) == set(GRID) - set(fits)


def test_a_largest_fit_that_overtrained_is_set_beside_the_next_smaller():
    nats, tokens, documents = world(setsubi)
    fits, _, rounds = sweep(nats, tokens, documents, overtrained={4000})
    assert set(fits) == {500, 2000, 4000} and rounds == 2


def test_a_count_whose_fit_was_ended_is_not_asked_for_again_and_bounds_the_rest():
    nats, tokens, documents = world(lambda n: 1.5 + 0.3 * np.log2(n / 1000) ** 2)  # 4,000 as good as 250
    measured = {n: Measured(nats[n, 0]) for n in (500, 4000)}
    first = next_fits(GRID, measured, tokens, documents)
    assert set(first.fits) == {250, 1000}
    measured[1000] = Measured(nats[1000, 0])
    assert set(next_fits(GRID, measured, tokens, documents, pruned=[250]).fits) == {2000}
    done = next_fits(GRID, measured, tokens, documents, pruned=[250, 2000])
    assert done.fits == {} and done.why == {}


def test_only_counts_in_doubt_get_more_than_one_seed():
    assert sweep(*world(setsubi, fits=3), seeds=3)[0] == {500: 1, 4000: 1}
    nats, tokens, documents = world(lambda n: {2000: 1.00, 4000: 0.999}.get(n, 2.0 + 1 / n), fits=3)
    fits, _, _ = sweep(nats, tokens, documents, seeds=3, overtrained={4000})
    assert {n for n, k in fits.items() if k == 3} == {2000, 4000}
    assert {k for n, k in fits.items() if n not in (2000, 4000)} == {1}


@pytest.mark.parametrize(
    ("curve", "overtrained", "least_inside", "most_tokens"),
    [
        (setsubi, (), 0.95, 0.60),
        (construction, (), 0.95, 0.65),
        (lambda n: 0.5 + 20 * n**-0.5, (), 0.95, 0.65),
        (lambda n: 1.0, (), 0.85, 1.0),
        (lambda n: 1.5 + 0.3 * np.log2(n / 500) ** 2, (), 0.95, 0.80),
        (lambda n: 1 + 0.15 * np.log2(n / 1000) ** 2, (), 0.95, 1.0),
        (lambda n: 1 + 0.15 * np.log2(n / 2000) ** 2, (4000,), 0.95, 1.0),
    ],
    ids=["setsubi", "construction", "square root", "flat", "lowest at 500", "lowest at 1,000", "lowest at 2,000, seen to overtrain"],
)
def test_against_the_grid_in_simulation(curve, overtrained, least_inside, most_tokens):
    """Two in a hundred of noise between seeds: how often the choice lies in the grid's interval, and what it cost."""
    inside, spent = [], []
    for seed in range(12):
        nats, tokens, documents = world(curve, noise=0.02, seed=seed)
        fits, _, _ = sweep(nats, tokens, documents, overtrained=overtrained)
        nll = {n: nats[n, 0].sum() / tokens.sum() for n in GRID}
        grid = find_optimum({n: nats[n, 0] for n in GRID}, tokens, documents, resamples=300)
        inside.append(grid.nll_ci[0] <= nll[min(fits, key=nll.get)] <= grid.nll_ci[1])
        spent.append(share(fits))
    assert np.mean(inside) >= least_inside
    assert np.mean(spent) <= most_tokens


# --- the chance of a count that was not measured --------------------------------------------------------------


def test_with_the_law_pinned_down_the_chance_is_whether_it_lies_below():
    counts = (250, 500, 1000, 4000)
    nll = np.tile([setsubi(n) for n in counts], (50, 1))
    for factor, expected in ((0.97, 0.0), (1.03, 1.0)):
        level = np.full(50, factor * setsubi(2000))
        assert chance_below(counts, nll, 2000, level, noise=0.001) == pytest.approx(expected, abs=0.02)


def test_between_two_counts_that_are_the_same_the_chance_is_about_even():
    """Somewhat above it: a law falls or is flat, so the larger of two equal counts was rather the unlucky one."""
    nll = np.ones((4000, 2))
    assert 0.5 < chance_below((500, 4000), nll, 2000, nll[:, 1], noise=0.03) < 0.65


def test_more_noise_is_more_doubt_and_the_next_count_is_more_doubtful_than_a_far_one():
    nll = np.tile([construction(500), construction(4000)], (500, 1))
    chances = [[chance_below((500, 4000), nll, at, nll[:, 1], noise=noise) for at in (1000, 2000)] for noise in (0.01, 0.03, 0.1)]
    assert chances == sorted(chances)
    assert all(far < near for far, near in chances)


# --- readings on the way --------------------------------------------------------------------------------------


def readings(levels, *, own=0.05, seed=0):
    """Nats of 150 validation samples at each reading."""
    rng = np.random.default_rng(seed)
    tokens, shared = rng.integers(5, 30, 150), rng.normal(0, 0.3, 150)
    return np.stack([tokens * level * np.exp(shared + rng.normal(0, own, 150)) for level in levels]), tokens, [f"d{i // 2}" for i in range(150)]


@given(steps=st.integers(READINGS, 5000))
def test_every_reading_knows_its_place(steps):
    assert [reading(step, steps) for step in sorted(probe_steps(steps, READINGS))] == list(range(READINGS))


def test_overtraining_is_a_last_reading_surely_above_an_earlier_one():
    assert turned_up(*readings([3.0, 1.2, 1.0, 1.1]))
    assert not turned_up(*readings([3.0, 1.2, 1.0, 0.9]))
    assert not turned_up(*readings([3.0, 1.2, 1.0, 1.002], own=0.3))
    nats, tokens, documents = readings([3.0, 1.2, 1.0, 1.1])
    nats[:3] = np.nan  # resumed behind them
    assert not turned_up(nats, tokens, documents)


def test_a_fit_far_behind_at_half_of_its_steps_has_lost():
    rival, tokens, documents = readings([2.0, 1.0, 0.7, 0.6])
    behind, level, catching_up = (readings(levels, seed=1)[0] for levels in ([3.0, 1.6], [2.0, 1.02], [4.0, 1.3]))
    assert cannot_win(behind, rival, tokens, documents)
    assert not cannot_win(level, rival, tokens, documents)
    assert not cannot_win(catching_up, rival, tokens, documents)  # its lag has halved and more


def test_before_half_of_its_steps_nothing_is_lost_and_at_the_end_nothing_is_saved():
    rival, tokens, documents = readings([2.0, 1.0, 0.7, 0.6])
    behind = readings([9.0, 9.0, 9.0, 9.0], seed=1)[0]
    assert [cannot_win(behind[:k], rival, tokens, documents) for k in (1, 2, 3, 4)] == [False, True, True, False]


def test_a_rival_that_overtrained_must_be_beaten_at_its_end_only():
    rival, tokens, documents = readings([1.0, 0.6, 0.8, 1.0])
    assert not cannot_win(readings([1.5, 0.9], seed=1)[0], rival, tokens, documents)


def test_readings_that_a_resumed_fit_lacks_end_nothing():
    rival, tokens, documents = readings([2.0, 1.0, 0.7, 0.6])
    nats = readings([9.0, 9.0, 9.0])[0]
    nats[1] = np.nan
    assert not cannot_win(nats, rival, tokens, documents)


# --- the sweep ------------------------------------------------------------------------------------------------

FIT = FitSettings(rank=4, alpha=8, learning_rate=1e-2, epochs=2, batch_size=4, micro_batch=4, report_to="none")
SETTINGS = SweepSettings(counts=(4, 8, 16, 32), search="adaptive", workers=1, train_items=5, fit=FIT)


def rows(split, count):
    rng = np.random.default_rng(len(split))
    return [
        EncodedSample(f"{split}{i}", "問", "答", f"{split}{i // 2}", "", rng.integers(0, 6000, 3 + i % 7).tolist(), rng.integers(0, 50, 2 + i % 5).tolist())
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base of one layer with random weights, on which more samples hardly help: there is doubt."""
    folder = tmp_path_factory.mktemp("adaptive")
    tokenizer = AutoTokenizer.from_pretrained(TINY_LLAMA)
    shape = replace(TINY_BASES["tiny-llama"], layers=1, hidden=32, ffn=48, heads=4, kv_heads=2, vocab_size=len(tokenizer))
    model = build_model(shape, tokenizer)
    torch.manual_seed(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if "norm" in name else 0.0, 0.2)
    model.to(torch.bfloat16).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    for split, count in (("train", 40), ("valid", 30), ("test", 30)):
        write_encoded(folder / "data" / f"{split}.jsonl", rows(split, count))
    return folder


@pytest.fixture(scope="module")
def swept(folder):
    return run_sweep(folder / "base", folder / "data", folder / "out", SETTINGS)


def times(out):
    return {p.parent.name: p.stat().st_mtime_ns for p in out.glob("points/*/point.json")}


def test_every_count_is_trained_or_named_with_a_reason(swept, folder):
    search = swept["search"]
    trained = {p["n"] for p in swept["points"]}
    ended, never = {row["n"] for row in search["ended_early"]}, {row["n"] for row in search["not_trained"]}
    assert search["rounds"][0]["counts"] == [4, 32]
    assert {n for r in search["rounds"] for n in r["counts"]} == trained | ended
    assert sorted([*trained, *ended, *never]) == [4, 8, 16, 32]
    assert all(row["why"]["ja"] and row["why"]["en"] for row in [*search["rounds"], *search["not_trained"]])
    lengths = {n: 2 * sum(len(s.ids) for s in rows("train", 40)[:n]) for n in (4, 8, 16, 32)}
    assert search["grid_tokens"] == sum(lengths.values())
    assert search["train_tokens"] == sum(lengths[n] for n in trained) + sum(row["train_tokens"] for row in search["ended_early"])
    assert swept["optimum"]["n"] in trained


def test_run_again_it_decides_again_from_the_same_points(swept, folder):
    before = times(folder / "out")
    again = run_sweep(folder / "base", folder / "data", folder / "out", SETTINGS)
    assert times(folder / "out") == before
    assert json.loads(json.dumps(again)) == json.loads(json.dumps(swept))


def test_a_fit_that_cannot_win_is_ended_and_a_grid_trains_it_after_all(swept, folder, tmp_path):
    """The winner's readings are made far lower than any fit's can be: whatever is trained beside it has lost at once."""
    out = tmp_path / "out"
    shutil.copytree(folder / "out", out)
    assert len(swept["search"]["rounds"]) > 1, "the base is such that two counts leave doubt"
    for point in out.glob("points/n*"):
        if point.name in ("n000004-s0", "n000032-s0"):
            np.save(point / "watched.npy", 1e-3 * np.load(point / "watched.npy"))
        else:
            shutil.rmtree(point)
    result = run_sweep(folder / "base", folder / "data", out, SETTINGS)
    ended = result["search"]["ended_early"]
    assert ended and {row["n"] for row in ended}.isdisjoint(p["n"] for p in result["points"])
    for row in ended:
        assert 2 * row["steps"] == row["of_steps"]
        assert row["train_tokens"] == sum(len(s.ids) for s in rows("train", 40)[: row["n"]])  # one of two passes
        assert not (out / "points" / f"n{row['n']:06d}-s0" / "adapter").exists()
    trials = optuna.load_study(study_name="sweep", storage=f"sqlite:///{out / 'study.sqlite3'}").get_trials(states=(TrialState.PRUNED,))
    assert [t.params["n"] for t in trials] == [row["n"] for row in ended]
    assert all(len(t.intermediate_values) == READINGS // 2 for t in trials)

    n = ended[0]["n"]
    grid = run_sweep(folder / "base", folder / "data", out, replace(SETTINGS, search="grid", counts=(n, 32)))
    assert [p["n"] for p in grid["points"]] == [n, 32] and "search" not in grid


def test_the_report_shows_what_was_not_trained_and_why(swept, tmp_path):
    ended = {"n": 16, "seed": 0, "rival": 32, "steps": 4, "of_steps": 8, "nll": 9.0, "train_tokens": 5, "seconds": 1.0}
    never = {"n": 8, "chance": 0.01, "why": {"ja": "見込みは1.0%", "en": "a chance of 1.0%"}}
    search = {**swept["search"], "ended_early": [ended], "not_trained": [never]}
    write_json(tmp_path / "sweep" / "sweep.json", {**swept, "points": [p for p in swept["points"] if p["n"] in (4, 32)], "search": search})
    write_json(tmp_path / "sweep" / "stage.json", {"stage": "sweep", "key": "k", "inputs": {}, "outputs": [], "seconds": 1.0})
    page = render(tmp_path)
    chart = json.loads(re.search(r'<script type="application/json"[^>]*>(.*?)</script>', page, re.S).group(1))
    assert [(row["n"], row["ended"]) for row in chart["aside"]] == [(8, False), (16, True)]
    assert "見込みは1.0%" in page and "ended after 4 of 8 steps" in page


def test_without_validation_samples_it_is_refused(folder, tmp_path):
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / name).write_bytes((folder / "data" / name).read_bytes())
    with pytest.raises(UserError, match="validation samples") as caught:
        run_sweep(folder / "base", tmp_path, tmp_path / "out", SETTINGS)
    assert "sweep.search=grid" in caught.value.hint


def test_it_follows_one_curve():
    with pytest.raises(UserError, match="one curve"):
        SweepSettings(search="adaptive", mode="both")
    with pytest.raises(UserError, match="search must be grid or adaptive"):
        SweepSettings(search="optuna")


def test_the_file_is_what_was_returned(swept, folder):
    assert read_json(folder / "out" / "sweep.json")["search"] == json.loads(json.dumps(swept["search"]))
