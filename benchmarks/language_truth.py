"""Language shares on known truth: the identifier on labelled mixes, and whole bases whose training tokens are counted.

    python benchmarks/language_truth.py [--sequences 640] [--tokens 500] [--json FILE]

It makes the two tables of ``docs/languages.md``. The mixes are ``corpora/lang_ratio_check`` of the shared data
(``$TSUGIKI_DATA``, else ``../shared/data``): labelled lines in Japanese and English, their bytes counted. The bases are
the three bundled ones; truth is ``tokens`` of their ``training.json``, the estimate that of
``tsugiki evaluate languages``. ``--samples 0`` leaves out the coverage of intervals, ``--bases`` chooses bases.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from tsugiki.artifacts import read_json, read_jsonl, write_json
from tsugiki.evaluate.languages import LanguageSettings, estimate_languages, identify
from tsugiki.quantize.convert import convert

ROOT = Path(__file__).resolve().parents[1]
MIXES = Path(os.environ.get("TSUGIKI_DATA", ROOT.parent / "shared" / "data")) / "corpora" / "lang_ratio_check"
BASES = ("tiny-llama", "tiny-qwen", "tiny-llmjp")
GROUP, SAMPLE, RESAMPLES = 20, 100, 1000  # lines under one label; lines of a sample; resamples of its interval


def mix(name: str, truth: float, samples: int) -> dict:
    """What the identifier makes of a mix; ``truth``: its share of Japanese bytes. Shares are of bytes."""
    rows = read_jsonl(MIXES / f"{name}.jsonl")
    rng = np.random.default_rng(0)
    rows = [rows[i] for i in rng.permutation(len(rows))]
    found = identify([row["text"] for row in rows])
    size = np.array([len(row["text"].encode()) for row in rows], float)
    label = np.array([code for code, _ in found])
    lang = np.array([row["lang"] for row in rows])
    ja, sure = label == "ja", np.array([p >= 0.5 for _, p in found])
    groups = [" ".join(r["text"] for r in rows[i : i + GROUP]) for i in range(0, len(rows) - GROUP + 1, GROUP)]
    inside = 0
    for _ in range(samples):
        at = rng.choice(len(rows), SAMPLE, replace=False)
        again = at[rng.integers(0, SAMPLE, (RESAMPLES, SAMPLE))]
        low, high = np.percentile((size * ja)[again].sum(1) / size[again].sum(1), [2.5, 97.5])
        inside += bool(low <= truth <= high)
    share = float(size[ja].sum() / size.sum())
    return {
        "mix": name, "lines": len(rows), "truth": truth, "by_line": share, "bias": share - truth,
        "lines_right": {k: float((label[lang == k] == k).mean()) for k in ("ja", "en") if (lang == k).any()},
        "one_label_says_ja": float(np.mean([code == "ja" for code, _ in identify(groups)])),
        "coverage": inside / samples if samples else None,
        "und_bytes": float(size[label == "und"].sum() / size.sum()),
        "bytes_of_p_half_or_more": float(size[sure].sum() / size.sum()),
        "by_line_of_p_half_or_more": float(size[sure & ja].sum() / size[sure].sum()),
    }  # fmt: skip


def base(name: str, settings: LanguageSettings, threads: int) -> dict:
    """A bundled base: its share of Japanese training tokens, and what its generations say."""
    folder = ROOT / "recipes" / "bases" / name
    tokens = read_json(folder / "training.json")["tokens"]
    with tempfile.TemporaryDirectory() as work:
        path = Path(work) / f"{name}-F16.gguf"
        convert(folder, path)
        found = estimate_languages(path, settings, Path(work) / "out", reported=tokens, n_threads=threads)
    ja = next((row for row in found["languages"] if row["language"] == "ja"), None)
    keep = ("tokens", "tokens_ci", "token_quarters", "length_corrected", "length_corrected_ci", "sequences", "sequences_ci")
    return {
        "base": name, "sequences_done": found["done"], "tokens_each": settings.tokens,
        "truth": tokens["ja"] / sum(tokens.values()), **{k: ja.get(k) if ja else None for k in keep},
        "why_not_length_corrected": found["length_correction"],
        "identification_share": found["identification_share"], "sequences_per_s": found["sequences_per_s"],
    }  # fmt: skip


def shown(value: float | None, interval: list[float] | None = None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" + (f" ({interval[0]:.3f} – {interval[1]:.3f})" if interval else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=640, help="of each base")
    parser.add_argument("--tokens", type=int, default=500, help="of each sequence")
    parser.add_argument("--samples", type=int, default=300, help="of 100 lines, for the coverage of intervals")
    parser.add_argument("--bases", nargs="*", default=list(BASES), choices=BASES)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    console, mixes = Console(), []
    if MIXES.is_dir():
        truth = json.loads((MIXES / "TRUTH.json").read_text(encoding="utf-8"))
        mixes = [mix(name, row["ja_bytes"] / (row["ja_bytes"] + row["en_bytes"]), options.samples) for name, row in truth.items()]
        table = Table("truth", "by line", "bias", "lines right (ja / en)", f"one label for {GROUP} lines says ja", "interval holds the truth",
                      title="Japanese bytes of labelled mixes")  # fmt: skip
        for m in mixes:
            right = " / ".join(shown(m["lines_right"].get(k)) for k in ("ja", "en"))
            coverage = "–" if m["coverage"] is None else f"{m['coverage']:.2f}"
            table.add_row(f"{m['truth']:.4f}", f"{m['by_line']:.4f}", f"{m['bias']:+.4f}", right, f"{m['one_label_says_ja']:.2f}", coverage)
        console.print(table)
        worst = max(m["und_bytes"] for m in mixes)
        console.print(f"und: {worst:.2%} of the bytes at most; probability 0.5 or more: {min(m['bytes_of_p_half_or_more'] for m in mixes):.2%} at least")
    else:
        console.print(f"The labelled mixes are not at {MIXES}: set TSUGIKI_DATA.")
    bases = [base(name, LanguageSettings(options.sequences, options.tokens), options.threads) for name in options.bases]
    if bases:
        table = Table("Japanese", *(b["base"] for b in bases), title=f"{options.sequences} sequences of {options.tokens} tokens from each base")
        table.add_row("truth, share of training tokens", *(shown(b["truth"]) for b in bases))
        table.add_row("share of tokens by line", *(shown(b["tokens"], b["tokens_ci"]) for b in bases))
        table.add_row("the same by quarter", *(", ".join(shown(q) for q in b["token_quarters"] or ()) for b in bases))
        table.add_row("length_corrected", *(shown(b["length_corrected"], b["length_corrected_ci"]) for b in bases))
        table.add_row("share of sequences (the paper's)", *(shown(b["sequences"], b["sequences_ci"]) for b in bases))
        console.print(table)
    if options.json:
        write_json(options.json, {"mixes": mixes, "bases": bases})


if __name__ == "__main__":
    main()
