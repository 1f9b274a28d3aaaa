"""summary.json: exactly the documented keys, from whatever stages have run."""

from __future__ import annotations

import copy
import json
import runpy
from pathlib import Path

import pytest

from tsugiki.errors import UserError
from tsugiki.recipes.summary import build_summary, level_changes, validate_summary

synthetic = runpy.run_path(str(Path(__file__).with_name("synthetic_run.py")))
write_run, stage_files = synthetic["write_run"], synthetic["stage_files"]

# The contract of design.md ("How a recipe flows"), typed here a second time on purpose.
TOP = {"domain", "base", "samples", "sweep", "parity", "levels", "recommended", "benchmarks", "changes", "report"}
POINT = {"n", "seed", "epochs", "nll", "nll_ci", "bpc", "train_tokens", "seconds"}
OPTIMUM = {"n", "nll", "nll_ci", "one_se_n", "p_best", "overfits_at"}
LEVEL = {
    "level", "bytes", "bpw", "nll", "delta_nll", "delta_ci", "kld_mean", "kld_p99", "top1", "score", "score_ci",
    "prompt_tok_s", "gen_tok_s", "seconds_per_answer", "peak_rss", "verdict", "why",
}  # fmt: skip


def test_a_full_run_gives_the_documented_keys_and_no_others(tmp_path):
    run_dir = write_run(tmp_path)
    summary = build_summary(run_dir)
    assert set(summary) == TOP
    assert set(summary["samples"]) == {"train", "valid", "test", "dropped"}
    assert set(summary["sweep"]) == {"points", "optimum"}
    assert all(set(point) == POINT for point in summary["sweep"]["points"])
    assert set(summary["sweep"]["optimum"]) == OPTIMUM
    assert set(summary["parity"]) == {"texts", "identical", "rate"}
    assert all(set(level) == LEVEL for level in summary["levels"])
    assert set(summary["recommended"]) == {"level", "path", "sha256", "why"}
    assert all(
        set(row) == {"model", "task", "metric", "value", "stderr", "n", "unparsed"} for row in summary["benchmarks"]
    )
    assert summary["report"] == "report.html"
    assert validate_summary(summary) == []
    assert json.loads((run_dir / "summary.json").read_text(encoding="utf-8")) == summary


def test_f16_is_the_first_level_and_differs_from_itself_by_nothing(tmp_path):
    levels = build_summary(write_run(tmp_path))["levels"]
    assert [row["level"] for row in levels] == ["F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M"]
    first = levels[0]
    assert (first["delta_nll"], first["kld_mean"], first["top1"], first["verdict"]) == (0, 0, 1, "reference")
    assert first["bytes"] == stage_files()["gguf"]["bytes"]


def test_the_recommended_file_is_named_relative_to_the_run_folder(tmp_path):
    stages = stage_files()
    run_dir = tmp_path / "setsubi" / "tiny-llama"
    for row in stages["levels"]["levels"]:
        row["path"] = str(run_dir / row["path"])
    recommended = build_summary(write_run(tmp_path, stages))["recommended"]
    assert recommended["path"] == "levels/model-Q4_K_M.gguf"
    assert recommended["sha256"] == next(
        row["sha256"] for row in stages["levels"]["levels"] if row["level"] == "Q4_K_M"
    )


def test_the_reference_may_also_stand_apart_from_the_levels(tmp_path):
    apart = stage_files()
    apart["check"]["reference"] = apart["check"]["levels"].pop(0)
    together = build_summary(write_run(tmp_path / "a"))
    assert build_summary(write_run(tmp_path / "b", apart)) == together


def test_f16_can_be_the_recommendation(tmp_path):
    stages = stage_files()
    stages["check"]["recommended"]["level"] = "F16"
    assert build_summary(write_run(tmp_path, stages))["recommended"]["path"] == "gguf/model-F16.gguf"


@pytest.mark.parametrize("count", range(7))
def test_a_run_that_stopped_early_still_has_every_key(tmp_path, count):
    stages = dict(list(stage_files().items())[:count])
    summary = build_summary(write_run(tmp_path, stages))
    assert set(summary) == TOP
    assert (summary["domain"], summary["base"]) == ("setsubi", "tiny-llama")
    assert (summary["sweep"] is None) == ("sweep" not in stages)
    assert (summary["levels"] == []) == ("check" not in stages)
    assert validate_summary(summary) == []


def test_every_missing_value_is_named_by_its_path(tmp_path):
    stages = stage_files()
    del stages["sweep"]["points"][2]["nll"]
    del stages["check"]["levels"][2]["kld_p99"]
    stages["evaluate"]["rows"][0]["value"] = "0.5"
    with pytest.raises(UserError) as error:
        build_summary(write_run(tmp_path, stages))
    for expected in ("sweep.points[2].nll: missing", "levels[2].kld_p99: missing", "benchmarks[0].value: expected number"):
        assert expected in str(error.value)
    assert not (tmp_path / "setsubi" / "tiny-llama" / "summary.json").exists()


def test_a_torn_stage_file_is_refused_with_its_name(tmp_path):
    run_dir = write_run(tmp_path)
    (run_dir / "gguf" / "gguf.json").write_text('{"parity": ', encoding="utf-8")
    with pytest.raises(UserError, match=r"gguf/gguf\.json: not valid JSON"):
        build_summary(run_dir)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda s: s.pop("parity"), "parity: missing"),
        (lambda s: s.update(extra=1), "extra: unknown"),
        (lambda s: s["levels"][0].update(verdict="fine"), "levels[0].verdict: expected verdict"),
        (lambda s: s["levels"][1].update(delta_ci=[1.0, 0.0]), "levels[1].delta_ci: expected interval"),
        (lambda s: s["levels"][1].update(nll=float("nan")), "levels[1].nll: expected number"),
        (lambda s: s["samples"].update(train=1.5), "samples.train: expected count"),
        (lambda s: s["samples"].update(train=True), "samples.train: expected count"),
        (lambda s: s["sweep"]["optimum"].update(n=None), "sweep.optimum.n: expected count, found null"),
        (lambda s: s.update(levels={}), "levels: expected a list"),
        (lambda s: s.update(parity=[]), "parity: expected an object"),
    ],
)
def test_the_validator_says_what_is_wrong_and_where(tmp_path, change, problem):
    summary = copy.deepcopy(build_summary(write_run(tmp_path)))
    change(summary)
    assert len(validate_summary(summary)) == 1
    assert validate_summary(summary)[0].startswith(problem)


def test_benchmarks_hold_base_adapted_and_every_level_side_by_side(tmp_path):
    stages = stage_files()
    rows = build_summary(write_run(tmp_path, stages))["benchmarks"]
    domain = {r["model"]: r for r in rows if r["task"] == "setsubi"}
    assert set(domain) == {"base", "adapted", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M"}
    checked = {row["level"]: row for row in stages["check"]["levels"]}
    assert domain["Q4_K_M"]["value"] == checked["Q4_K_M"]["score"]
    assert domain["Q4_K_M"]["n"] == stages["check"]["samples"]
    assert {r["model"]: r["unparsed"] for r in rows if r["task"] == "niilc[:50]"} == {"base": 0.1, "adapted": 0.1, "Q4_K_M": 0.1}


def test_what_levels_took_is_the_checks_own_paired_difference():
    rows = [
        {"level": "F16", "score": 0.5, "verdict": "reference", "delta_score": 0.0},
        {"level": "Q4_K_M", "score": 0.4, "delta_score": -0.1, "delta_score_ci": [-0.2, -0.05], "verdict": "degraded"},
        {"level": "Q8_0", "score": 0.5, "delta_score": 0.0, "delta_score_ci": None, "verdict": "inconclusive"},
        {"level": "Q6_K", "score": None, "verdict": "pass"},  # windows of text: nothing was answered
    ]
    found = level_changes({"samples": 20, "documents": 10, "levels": rows}, "setsubi", "exact_match")
    assert [(c["to"], c["before"], c["after"], c["difference"], c["ci"], c["change"]) for c in found] == [
        ("Q4_K_M", 0.5, 0.4, -0.1, [-0.2, -0.05], "lost"), ("Q8_0", 0.5, 0.5, 0.0, None, "open"),
    ]  # fmt: skip
    assert level_changes({"levels": rows[1:]}, "setsubi", "exact_match") == []
