"""The check's numbers, and what it does with files that are not what they should be."""

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
from tsugiki.evaluate.engine import Engine
from tsugiki.quantize.check import check
from tsugiki.quantize.compare import WIDTH, divergence, run_task
from tsugiki.quantize.convert import convert
from tsugiki.quantize.levels import make_level
from tsugiki.samples import Sample, write_encoded

BASE = Path(__file__).resolve().parents[1] / "recipes" / "bases" / "tiny-llama"


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
    script.write_text("#!/bin/sh\nread job\necho 'GGML_ASSERT failed' >&2\nkill -ABRT $$\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(script))
    with pytest.raises(UserError, match=r"SIGABRT: GGML_ASSERT failed") as error:
        run_task({"task": "speed", "path": "model-Q8_0.gguf"}, name="speed Q8_0", on_step=lambda n: None)
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
        run_task(job, name="speed", on_step=lambda n: None)
