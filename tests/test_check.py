"""The check's numbers, its verdicts, and what it does with files that are not what they should be."""

import json
import stat
import struct
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tsugiki.chat import encode, end_of_turn_id
from tsugiki.errors import UserError
from tsugiki.evaluate.domain import Answer
from tsugiki.evaluate.engine import Engine
from tsugiki.quantize.check import (
    WIDTH,
    CheckSettings,
    bootstrap,
    check,
    divergence,
    judge,
    recommend,
    run_child,
    verdict,
)
from tsugiki.quantize.convert import convert
from tsugiki.quantize.levels import make_level
from tsugiki.samples import EncodedSample, Sample, write_encoded

BASE = Path(__file__).resolve().parents[1] / "recipes" / "bases" / "tiny-llama"
SETTINGS = CheckSettings()


# --- numbers ----------------------------------------------------------------------------------------------------


def plain_loop(p_logits, q_logits, target):
    """NLL of q and KL(p ‖ q) of one position, float64, term by term."""
    p, q = p_logits.astype(np.float64), q_logits.astype(np.float64)
    log_p, log_q = p - np.logaddexp.reduce(p), q - np.logaddexp.reduce(q)
    kld = 0.0
    for a, b in zip(log_p, log_q, strict=True):
        kld += np.exp(a) * (a - b)
    return -log_q[target], kld


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(1e-3, 3), st.floats(-20, 20))
def test_divergence_is_that_of_a_plain_loop_in_float64(seed, noise, offset):
    rng = np.random.default_rng(seed)
    p = (rng.normal(size=(4, 50)) * 4).astype(np.float32)
    q = (p + noise * rng.normal(size=p.shape) + offset).astype(np.float32)
    targets = rng.integers(0, 50, 4)
    found = divergence([p, q], targets)
    for row in range(4):
        nll, kld = plain_loop(p[row], q[row], targets[row])
        assert found["nll"][1, row] == pytest.approx(nll, abs=1e-5)
        assert found["kld"][1, row] == pytest.approx(kld, abs=1e-6, rel=1e-4)
        best_p, best_q = set(np.argsort(-p[row])[:5]), set(np.argsort(-q[row])[:5])
        assert found["top5"][1, row] == pytest.approx(len(best_p & best_q) / 5)
        assert found["top1"][1, row] == (p[row].argmax() == q[row].argmax())
    assert (found["kld"][0] == 0).all() and (found["top1"][0] == 1).all()


def test_a_file_does_not_diverge_from_itself_even_by_rounding():
    x = (np.random.default_rng(0).normal(size=(8, 1000)) * 5).astype(np.float32)
    found = divergence([x, x + np.float32(0)], np.zeros(8, int))
    assert (found["kld"] == 0).all() and (found["nll"][0] == found["nll"][1]).all()


def test_the_bootstrap_interval_of_independent_documents_is_the_normal_one():
    rng = np.random.default_rng(0)
    x = rng.normal(1.0, 2.0, 400)
    low, high = bootstrap(x[None], np.ones(400), np.arange(400), SETTINGS)[0]
    half = 1.96 * x.std(ddof=1) / 20
    assert low == pytest.approx(x.mean() - half, abs=0.15 * half)
    assert high == pytest.approx(x.mean() + half, abs=0.15 * half)


def test_tokens_weigh_in_the_ratio():
    # every document costs 0.5 nats a token, whatever its length: no resample can say anything else
    tokens = np.arange(1, 31, dtype=float)
    assert bootstrap((0.5 * tokens)[None], tokens, np.arange(30), SETTINGS)[0] == pytest.approx([0.5, 0.5])


def test_copies_of_documents_do_not_narrow_the_interval():
    x = np.random.default_rng(1).normal(size=40)
    once = bootstrap(x[None], np.ones(40), np.arange(40), SETTINGS)[0]
    four = bootstrap(np.tile(x, 4)[None], np.ones(160), np.tile(np.arange(40), 4), SETTINGS)[0]
    assert four == pytest.approx(once)


def test_few_documents_have_no_interval():
    assert bootstrap(np.ones((2, 90)), np.ones(90), np.arange(90) % 9, SETTINGS) == [None, None]


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


# --- real files -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(BASE)


@pytest.fixture(scope="module")
def samples(tokenizer):
    places = ["東京", "大阪", "名古屋", "札幌", "仙台", "広島", "福岡", "京都", "神戸", "横浜", "千葉", "新潟"]
    rows = [
        Sample(f"s{i}", f"{p}の天気はどうですか。", ("雨が降っています。", "晴れ")[i % 2], f"d{i}", ("a", "b")[i % 2])
        for i, p in enumerate(places)
    ]
    return encode(tokenizer, rows)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("levels")
    found = {"F16": folder / "model-F16.gguf"}
    convert(BASE, found["F16"])
    for level in ("Q8_0", "Q3_K_M"):
        found[level] = folder / f"model-{level}.gguf"
        make_level(found["F16"], level, found[level])
    return found


@pytest.fixture(scope="module")
def result(files, samples, tokenizer):
    levels = {k: v for k, v in files.items() if k != "F16"}
    return check(
        files["F16"], levels, samples, scoring="char_f1", max_new_tokens=8, end_of_turn=end_of_turn_id(tokenizer)
    )


def test_every_level_has_every_number_of_the_summary(result):
    json.dumps(result, allow_nan=False)
    assert [r["level"] for r in result["levels"]] == ["F16", "Q8_0", "Q3_K_M"]
    keys = {
        "level", "bytes", "nll", "delta_nll", "delta_ci", "kld_mean", "kld_p99", "top1", "score", "score_ci",
        "prompt_tok_s", "gen_tok_s", "seconds_per_answer", "peak_rss", "verdict", "why",
    }
    for row in result["levels"]:
        assert keys <= set(row)
        assert row["prompt_tok_s"] > 0 and row["gen_tok_s"] > 0 and row["seconds_per_answer"] > 0
        assert 20e6 < row["peak_rss"] < 500e6


def test_the_reference_differs_from_itself_by_nothing(result):
    row = result["levels"][0]
    assert (row["verdict"], row["delta_nll"], row["kld_max"], row["top1"], row["changed"]) == ("reference", 0, 0, 1, 0)


def test_eight_bits_diverge_less_than_three(result):
    _, eight, three = result["levels"]
    assert 0 < eight["kld_mean"] < three["kld_mean"] and eight["kld_mean"] < 1e-3


def test_the_numbers_are_those_of_two_engines_read_one_after_the_other(result, files, samples):
    def log_p(path):
        with Engine(path, n_seq_max=WIDTH) as engine:
            logits = np.concatenate([x for _, x in engine.completion_logits(samples)]).astype(np.float64)
        return logits - np.logaddexp.reduce(logits, axis=1)[:, None]

    p, q = log_p(files["F16"]), log_p(files["Q3_K_M"])
    targets = np.concatenate([s.completion_ids for s in samples])
    row = result["levels"][2]
    kld = (np.exp(p) * (p - q)).sum(axis=1)
    assert row["kld_mean"] == pytest.approx(kld.mean(), rel=1e-2)
    assert row["kld_p99"] == pytest.approx(np.quantile(kld, 0.99), rel=1e-2)
    assert row["nll"] == pytest.approx(-q[np.arange(len(targets)), targets].mean(), rel=1e-5)
    assert row["top1"] == pytest.approx((p.argmax(1) == q.argmax(1)).mean())


def run(files, samples, **levels):
    return check(files["F16"], levels, samples, max_new_tokens=4, end_of_turn=2)


def test_all_broken_files_are_named_at_once(files, samples, tmp_path):
    cut, other = tmp_path / "cut.gguf", tmp_path / "text.gguf"
    cut.write_bytes(files["Q8_0"].read_bytes()[:-1000])
    other.write_text("this is no model at all, only text")
    with pytest.raises(UserError) as error:
        run(files, samples, A=cut, B=other, C=tmp_path / "missing.gguf")
    message = str(error.value)
    assert "3 problem(s)" in message and "truncated" in message and "not a GGUF" in message and "no such file" in message


def test_nothing_to_check_is_refused(files):
    with pytest.raises(UserError, match="no test sample"):
        run(files, [])


def test_another_vocabulary_is_refused(files, samples, tmp_path):
    data = files["Q8_0"].read_bytes()
    name = b"<|eot_id|>"
    token = struct.pack("<Q", len(name)) + name
    assert data.count(token) == 1
    other = tmp_path / "other.gguf"
    other.write_bytes(data.replace(token, token.replace(b"eot", b"end")))
    with pytest.raises(UserError, match="other tokens than that of model-F16"):
        run(files, samples, Q8_0=other)


def test_a_vocabulary_of_another_size_is_refused(files, samples, tmp_path, tokenizer):
    from tsugiki.recipes.pretrain import TINY_BASES, build_model

    base = tmp_path / "base"
    build_model(replace(TINY_BASES["tiny-llama"], vocab_size=6400, layers=1), tokenizer).save_pretrained(base)
    tokenizer.save_pretrained(base)
    convert(base, tmp_path / "large.gguf")
    with pytest.raises(UserError, match=r"has 6400 tokens, that of model-F16\.gguf 6144"):
        run(files, samples, Q8_0=tmp_path / "large.gguf")


def test_a_sample_that_does_not_fit_is_refused_with_both_numbers(files, samples):
    long = replace(samples[0], prompt_ids=[5] * 3000)
    with pytest.raises(UserError, match=r"30\d\d tokens; the context holds 2048"):
        run(files, [*samples, long], Q8_0=files["Q8_0"])


def test_the_parent_survives_a_child_that_aborts(tmp_path, monkeypatch):
    script = tmp_path / "aborts"
    script.write_text("#!/bin/sh\ncat > /dev/null\necho 'GGML_ASSERT failed' >&2\nkill -ABRT $$\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(script))
    with pytest.raises(UserError, match=r"SIGABRT: GGML_ASSERT failed") as error:
        run_child({"task": "speed", "path": "model-Q8_0.gguf"}, name="speed Q8_0", on_step=lambda n: None)
    assert "model-Q8_0.gguf" in str(error.value)


def test_the_parent_survives_a_file_with_impossible_numbers(files, samples, tmp_path):
    key = b"llama.attention.head_count"
    data = bytearray(files["Q8_0"].read_bytes())
    at = data.index(struct.pack("<Q", len(key)) + key) + 8 + len(key) + 4
    data[at : at + 4] = struct.pack("<I", 0)
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(data)
    rows = tmp_path / "samples.jsonl"
    write_encoded(rows, samples)
    job = {"task": "speed", "path": str(broken), "samples": str(rows), "n_ctx": 512, "max_new_tokens": 4, "end_of_turn": 2}
    with pytest.raises(UserError, match=r"broken\.gguf"):
        run_child(job, name="speed", on_step=lambda n: None)
