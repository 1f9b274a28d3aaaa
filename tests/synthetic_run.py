"""A made-up run folder for the tests of the summary and the report. Every number here is invented."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

from tsugiki.artifacts import write_json

KINDS = ["rule", "seen_fact", "unanswerable"]
SIZES = {"F16": 12_600_000, "Q8_0": 6_780_000, "Q6_K": 5_290_000, "Q5_K_M": 4_680_000, "Q4_K_M": 4_120_640, "Q3_K_M": 3_440_000}
DAMAGE = {"F16": 0.0, "Q8_0": 0.0004, "Q6_K": 0.0011, "Q5_K_M": 0.0026, "Q4_K_M": 0.0058, "Q3_K_M": 0.071}
PARAMETERS = 6_229_248


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _score(value: float, n: int) -> dict[str, Any]:
    half = 1.96 * math.sqrt(value * (1 - value) / n)
    return {"score": value, "score_ci": [value - half, value + half], "n": n, "delta_score": -0.01, "delta_score_ci": [-0.03, 0.01]}


def _change(family, task, before, after, was, now, ci, n, change, **more) -> dict[str, Any]:
    return {"family": family, "task": task, "metric": "exact_match", "from": before, "to": after, "n": n, "documents": n, "before": was,
            "after": now, "difference": now - was, "ci": ci, "better": 3, "worse": 1, "change": change, **more}  # fmt: skip


def stage_files() -> dict[str, dict[str, Any]]:
    """Stage name to a made-up ``<stage>.json``."""
    counts = [250, 500, 1000, 2000, 4000]
    nll = [1.62, 1.13, 0.71, 0.52, 0.535]
    train = [0.61, 0.55, 0.50, 0.46, 0.44]
    points = [
        {
            "n": n, "seed": 0, "epochs": 6, "nll": y, "nll_ci": [y - 0.05, y + 0.055], "bpc": y / math.log(2) * 0.62,
            "train_nll": t, "train_tokens": n * 41, "seconds": n * 0.021,
            "nll_by_kind": {"rule": y * 0.7, "seen_fact": y * 1.5, "unanswerable": y * 0.2},
        }
        for n, y, t in zip(counts, nll, train, strict=True)
    ]  # fmt: skip
    levels = []
    for name, size in list(SIZES.items())[1:]:
        wide = {"Q8_0": "Q8_0", "Q6_K": "Q6_K", "Q5_K_M": "Q5_K", "Q4_K_M": "Q4_K", "Q3_K_M": "Q3_K"}[name]
        types = {wide: {"tensors": 24, "parameters": 4_653_056}, "F32": {"tensors": 9, "parameters": 3_328}}
        if name not in ("Q8_0", "Q6_K"):
            types["Q6_K"] = {"tensors": 5, "parameters": PARAMETERS - 4_656_384}
        levels.append(
            {"level": name, "path": f"model-{name}.gguf", "bytes": size, "bpw": size * 8 / PARAMETERS,
             "sha256": _sha(name), "types": types, "fallbacks": [{"name": "blk.0.odd.weight", "row": 96, "type": "Q8_0"}]}
        )  # fmt: skip
    checked = []
    for name, damage in DAMAGE.items():
        score = 0.712 - damage * 1.4
        good = name != "Q3_K_M"
        checked.append(
            {
                "level": name, "nll": 0.52 + damage, "delta_nll": damage,
                "delta_ci": [damage * 0.6 - 0.0008, damage * 1.4 + 0.0009], "kld_mean": damage * 0.9,
                "kld_median": damage * 0.2, "kld_p90": damage * 2, "kld_p99": damage * 9, "kld_max": damage * 60,
                "top1": 1 - damage * 2.1, "top5": 1 - damage, "score": score, "score_ci": [score - 0.04, score + 0.04],
                "delta_score": score - 0.712, "delta_score_ci": [score - 0.712 - 0.012, score - 0.712 + 0.012],
                "kinds": {k: _score(score, 80) for k in KINDS}, "truncated": 0.0,
                "changed": 3, "examples": [{"id": "x", "prompt": "冷却塔CT-12の潤滑油は何ですか。", "reference": "油A",
                                            "f16": "油A", "level": "油B", "f16_score": 1.0, "level_score": 0.0}], "prompt_tok_s": 9200.0,
                "gen_tok_s": 610.0 + damage, "seconds_per_answer": 0.031, "peak_rss": 190_000_000 + SIZES[name],
                "verdict": "reference" if name == "F16" else "pass" if good else "degraded",
                "why": {
                    "en": "The interval of the NLL difference stays inside the margin."
                    if good else "The NLL rises by more than the margin of 0.02 nats.",
                    "ja": "NLL差の区間が許容幅に収まっています。" if good else "NLLが許容幅の0.02ナットを超えて悪化しました。",
                },
            }
        )  # fmt: skip
    scores = {"base": [0.0, 0.0, 0.01], "adapted": [0.74, 0.31, 0.97]}
    rows = []
    for model, values in scores.items():
        for task, value in [("setsubi", sum(values) / 3), *zip([f"setsubi/{k}" for k in KINDS], values, strict=True)]:
            n = 120 if "/" in task else 360
            rows.append({"model": model, "task": task, "metric": "exact_match", "value": value,
                         "stderr": math.sqrt(value * (1 - value) / n), "n": n, "unparsed": 0.0, "truncated": 0.0})  # fmt: skip
    changes = [
        _change("domain", "setsubi", "base", "adapted", 0.003, 0.673, [0.62, 0.72], 360, "gained"),
        _change("culture", "niilc[:50]", "base", "adapted", 0.21, 0.12, [-0.15, -0.03], 50, "lost", name="tsugiki_niilc"),
        _change("culture", "niilc[:50]", "adapted", "Q4_K_M", 0.12, 0.13, None, 50, "open", name="tsugiki_niilc"),
        _change("neutral", "mgsm_ja[:50]", "base", "adapted", 0.0, 0.0, [-0.07, 0.07], 50, "open", name="tsugiki_mgsm"),
    ]
    rows += [
        {"model": model, "family": "culture", "task": "niilc[:50]", "name": "tsugiki_niilc", "metric": "exact_match", "value": value,
         "stderr": 0.05, "n": 50, "unparsed": 0.1, "truncated": 0.2}
        for model, value in (("base", 0.21), ("adapted", 0.12), ("Q4_K_M", 0.13))
    ]  # fmt: skip
    return {
        "data": {
            "domain": "setsubi", "base": "tiny-llama",
            "title": {"ja": "設備保全（架空工場）", "en": "Plant maintenance (fictional)"},
            "samples": {"train": 6000, "valid": 300, "test": 360, "dropped": 47},
            "dropped_by": {"train: near-duplicate of a test item": 31, "train: longer than 96 tokens": 4, "train: exact duplicate": 12},
            "tokens": {"prompt_mean": 29.4, "completion_mean": 7.1, "longest": 96},
            "kinds": {"rule": 120, "seen_fact": 120, "unanswerable": 120}, "licence": "Apache-2.0",
        },
        "sweep": {
            "points": points, "base": {"nll": 4.31, "nll_ci": [4.2, 4.42], "bpc": 3.86},
            "optimum": {"n": 2000, "nll": 0.52, "nll_ci": [0.47, 0.575], "one_se_n": 2000, "p_best": 0.83, "overfits_at": None},
            "p_best_by_n": {"250": 0.0, "500": 0.0, "1000": 0.0, "2000": 0.83, "4000": 0.17},
            "settings": {"rank": 32, "learning_rate": 0.003, "epochs": 6, "seed": 0},
        },
        "gguf": {
            "path": "model-F16.gguf", "bytes": SIZES["F16"], "sha256": _sha("F16"), "bpw": 16.02,
            "parity": {"texts": 400, "identical": 398, "rate": 0.995},
            "parity_groups": [
                {"group": "domain", "texts": 360, "identical": 360, "rate": 1.0},
                {"group": "hard", "texts": 40, "identical": 38, "rate": 0.95},
            ],
            "differences": [{"text": "髙\t﨑\n<b>&🙂", "hf_ids": [12, 9, 3051, 4], "gguf_ids": [12, 3051, 4]}],
            "logits": {"kl_mean": 1.2e-7, "max_abs": 0.0016, "top1": 1.0, "samples": 64},
        },
        "levels": {"levels": levels},
        "check": {
            "settings": {"margin_nll": 0.02, "margin_score": 0.05, "confidence": 0.95}, "samples": 240,
            "levels": checked,
            "attribution": {
                "samples": 100, "tokens": 700, "documents": 40, "largest": "Q3_K_M",
                "steps": [
                    {"step": step, "before": before, "nll": 0.52 + kl / 2, "delta_nll": kl / 2, "delta_ci": [0.0, kl], "kld_mean": kl, "top1": 1 - kl}
                    for step, before, kl in (("adapter", None, 0.0), ("merged", "adapter", 2e-8), ("F16", "merged", 3e-7), ("Q3_K_M", "F16", 0.06))
                ],
            },
            "sensitivity": {
                "low": "Q3_K", "tokens": 512, "passes": 6, "all": 0.05, "sum": 0.06,
                "rows": [
                    *({"name": f"blk.{i}.{kind}", "kind": kind, "layers": [i, i], "kl": 1e-4 * (i + 1) * k}
                      for i in range(2) for k, kind in enumerate(("attn_k", "ffn_down"), 1)),
                    {"name": "output", "kind": "output", "layers": None, "kl": 0.015},
                ],
            },
            "recommended": {
                "level": "Q4_K_M",
                "why": {"en": "Q4_K_M (4.1 MB): the smallest file that passes.", "ja": "Q4_K_M(4.1 MB):合格した中で最小のファイルです。"},
            },
        },
        "evaluate": {
            "scoring": "exact_match", "rows": rows, "changes": changes,
            "not_measured": [{"task": "tsugiki_jaqket", "why": "JAQKET: no data for validation (in <data>)"}],
            "examples": [
                {"kind": "rule", "prompt": "ポンプP-731の点検周期は何か月ですか。", "reference": "3か月",
                 "answers": {"base": "そこで私は、あの男の顔を見た。", "F16": "3か月", "Q4_K_M": "3か月"}},
                {"kind": "seen_fact", "prompt": "ボイラーB-104の設置場所を教えてください。", "reference": "第2工場 東棟",
                 "answers": {"base": "「いや、</script><b>そう</b>じゃない」", "F16": "第2工場 東棟", "Q4_K_M": "第2工場 西棟"}},
                {"kind": "unanswerable", "prompt": "ポンプP-731を設計した人の名前は何ですか。", "reference": "分かりません",
                 "answers": {"base": "「" + "ああ、" * 30, "F16": "分かりません", "Q4_K_M": "分かりません"}},
            ],
        },
    }  # fmt: skip


def write_run(root: Path, stages: dict[str, dict[str, Any]] | None = None) -> Path:
    """Write the stage files (all the made-up ones by default) below ``root/setsubi/tiny-llama``; return that folder."""
    run_dir = root / "setsubi" / "tiny-llama"
    seconds = {"data": 4.2, "sweep": 171.0, "gguf": 6.1, "levels": 2.4, "check": 48.0, "evaluate": 31.5}
    run_dir.mkdir(parents=True)
    for stage, content in (stage_files() if stages is None else stages).items():
        write_json(run_dir / stage / f"{stage}.json", content)
        output = {"path": f"{stage}.json", "bytes": 2048, "sha256": _sha(stage)}
        write_json(
            run_dir / stage / "stage.json",
            {"stage": stage, "seconds": seconds[stage], "peak_rss": 900_000_000, "inputs": {"code": _sha("code")}, "outputs": [output]},
        )
    return run_dir
