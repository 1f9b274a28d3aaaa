"""Our importance matrix against llama-imatrix: the same model, text, chunks and BOS rule.

    TSUGIKI_UPSTREAM=DIR python -P benchmarks/imatrix_upstream.py [--base tiny-llama] [--tokens 16384] [--json F]

``DIR`` holds ``llama-imatrix``, built from the source archive of the installed llama-cpp-python (``pip download --no-binary :all:
llama-cpp-python``, ``vendor/llama.cpp``): ``cmake -B build -DLLAMA_CURL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_SERVER=OFF`` and
``cmake --build build --target llama-quantize llama-imatrix llama-perplexity``. Both read the same text with llama.cpp's own tokenizer, so that
tokenisation is no difference; llama-imatrix runs with its default fused attention and without.

The relative difference of a tensor is ``Σ |ours − theirs| / Σ theirs``; the target is 1e-3.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from tsugiki.quantize.convert import convert
from tsugiki.quantize.imatrix import make_imatrix, read_imatrix
from tsugiki.quantize.texts import HARD_TEXTS
from tsugiki.recipes.domains import load_domain, load_splits

BASES = Path(__file__).parent.parent / "recipes" / "bases"
DATA = Path(os.environ.get("TSUGIKI_DATA", Path(__file__).parent.parent.parent / "shared" / "data"))


def write_text(path: Path, characters: int) -> str:
    """Japanese text: Wikipedia paragraphs where the shared data are at hand, else the bundled domain's questions and answers."""
    corpus = DATA / "corpora" / "jaquad_wikipedia" / "contexts.jsonl"
    if corpus.exists():
        with corpus.open(encoding="utf-8") as file:
            lines, name = [json.loads(line)["text"] for _, line in zip(range(2000), file, strict=False)], "jaquad_wikipedia"
    else:
        lines, name = [f"{s.prompt}\n{s.completion}" for s in load_splits(load_domain("setsubi")).train], "setsubi"
    path.write_text("\n".join([*HARD_TEXTS, *lines])[:characters], encoding="utf-8")
    return name


def differences(ours: Path, theirs: Path) -> dict[str, float]:
    """Relative difference of each tensor's sums; the counts must be equal."""
    a, b = read_imatrix(ours), read_imatrix(theirs)
    missing = set(b.sums) - set(a.sums)
    if missing or any(not np.array_equal(a.counts[n], b.counts[n]) for n in b.sums):
        raise SystemExit(f"other tensors or counts: {sorted(missing)[:3]}")
    return {n: float(np.abs(a.sums[n] - s).sum() / s.sum()) for n, s in b.sums.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upstream", type=Path, default=os.environ.get("TSUGIKI_UPSTREAM"), help="folder with llama-imatrix")
    parser.add_argument("--base", action="append", help="a bundled base; may be repeated (default: all three)")
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not options.upstream:
        parser.exit(0, "imatrix_upstream: left out, it needs the folder with llama-imatrix: --upstream or TSUGIKI_UPSTREAM\n")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        text = write_text(work / "t.txt", 6 * options.tokens)
        for base in options.base or ("tiny-llama", "tiny-qwen", "tiny-llmjp"):
            model = work / f"{base}.gguf"
            convert(BASES / base, model)
            began = time.monotonic()
            found = make_imatrix(model, work / "ours.gguf", general=[work / "t.txt"], tokens=options.tokens, output=True, n_threads=options.threads)
            seconds = time.monotonic() - began
            for attention in ("off", "auto"):
                began = time.monotonic()
                subprocess.run([options.upstream / "llama-imatrix", "-m", model, "-f", work / "t.txt", "-o", work / "theirs.gguf", "-c", "512", "--chunks",
                                str(found.chunks), "-t", str(options.threads), "-fa", attention, "--process-output", "--no-ppl"], check=True, capture_output=True)
                theirs = time.monotonic() - began
                gaps = differences(work / "ours.gguf", work / "theirs.gguf")
                worst = max(gaps, key=gaps.get)
                rows.append({"base": base, "text": text, "chunks": found.chunks, "attention": attention, "tensors": len(gaps), "worst": gaps[worst],
                             "worst_tensor": worst, "median": float(np.median(list(gaps.values()))), "seconds": seconds, "seconds_upstream": theirs})
    table = Table("base", "fused attention", "tensors", "worst", "of", "median", "s", "s upstream", title="relative difference to llama-imatrix")
    for r in rows:
        table.add_row(r["base"], r["attention"], str(r["tensors"]), f"{r['worst']:.1e}", r["worst_tensor"], f"{r['median']:.1e}", f"{r['seconds']:.1f}",
                      f"{r['seconds_upstream']:.1f}")
    Console(width=120).print(table)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
