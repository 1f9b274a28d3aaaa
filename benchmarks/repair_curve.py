"""KL against size: llama.cpp's stock levels and repaired files, with the same importance matrix, on held-out text.

    python -P benchmarks/repair_curve.py [--base tiny-llama] [--threads 2] [--json F] [--figure F.svg]

Texts: Wikipedia paragraphs of different articles and different English books for the importance matrix, the choice and the judgement,
where the shared data are at hand; else questions about different devices of the bundled domain. Every repaired file has a stock level's
bytes; two stock levels without importance are shown beside. About five minutes a base on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tsugiki.evaluate.engine import Engine
from tsugiki.intervals import ratio_intervals
from tsugiki.quantize.convert import convert
from tsugiki.quantize.imatrix import make_imatrix
from tsugiki.quantize.levels import make_level
from tsugiki.quantize.repair import RepairSettings, repair
from tsugiki.quantize.sensitivity import measure, read_samples
from tsugiki.recipes.domains import load_domain, load_splits

BASES = Path(__file__).parent.parent / "recipes" / "bases"
DATA = Path(os.environ.get("TSUGIKI_DATA", Path(__file__).parent.parent.parent / "shared" / "data"))
LEVELS = ("Q3_K_M", "IQ4_XS", "Q4_K_M", "Q5_K_M", "Q6_K")
PLAIN = ("Q3_K_M", "Q4_K_M")  # also without importance
CHARACTERS = {"im": 80_000, "calib": 16_000, "held": 60_000}  # a fourth of it English


def write_texts(folder: Path) -> str:
    """``im.txt``, ``calib.txt`` and ``held.txt`` that share no article, book or device; where they come from."""
    wiki, books = DATA / "corpora" / "jaquad_wikipedia" / "contexts.jsonl", DATA / "corpora" / "english_pd" / "books_en.jsonl"
    if not wiki.exists() or not books.exists():
        splits = load_splits(load_domain("setsubi"))
        half = len(splits.train) // 2
        for name, part in (("im", splits.train[:half]), ("calib", splits.train[half:]), ("held", splits.test)):
            (folder / f"{name}.txt").write_text("\n\n".join(f"{s.prompt}\n{s.completion}" for s in part)[: CHARACTERS[name]], encoding="utf-8")
        return "the bundled domain's questions"
    articles: dict[str, list[str]] = {}
    with wiki.open(encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            articles.setdefault(row["title"], []).append(row["text"])
    with books.open(encoding="utf-8") as file:
        english = [json.loads(line)["text"] for _, line in zip(range(15), file, strict=False)]
    for number, (name, size) in enumerate(CHARACTERS.items()):
        titles, parts = sorted(articles)[number::3], english[number::3]
        # every article gives its beginning, so that many are read
        japanese = "\n\n".join("\n".join(articles[t])[:400] for t in titles)[: size * 3 // 4]
        text = japanese + "\n\n" + "\n\n".join(p[: size // 4 // len(parts)] for p in parts)
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return "Japanese Wikipedia and English books"


def curve(base: str, work: Path, options: argparse.Namespace) -> dict:
    """Stock and repaired files of one base, measured together on the held-out text."""
    work.mkdir()
    f16, im = work / "f16.gguf", work / "im.gguf"
    convert(BASES / base if (BASES / base).exists() else Path(base), f16)
    source = write_texts(work)
    began = time.monotonic()
    make_imatrix(f16, im, general=[work / "im.txt"], tokens=options.tokens, output=True, n_threads=options.threads)
    seconds, files, repairs = {"imatrix": time.monotonic() - began}, {}, {}
    settings = RepairSettings(held_tokens=options.held, n_threads=options.threads)
    for level in options.levels:
        stock = make_level(f16, level, work / f"stock-{level}.gguf", imatrix=im, n_threads=options.threads)
        files["stock", level] = stock
        if level in PLAIN:
            files["stock, no importance", level] = make_level(f16, level, work / f"plain-{level}.gguf", n_threads=options.threads)
        began = time.monotonic()
        found = repair(f16, work / f"repaired-{level}.gguf", calib=work / "calib.txt", heldout=work / "held.txt", base_level=level, imatrix=im,
                       cache=work / "sensitivity.jsonl", settings=settings)
        seconds[f"repair {level}"] = time.monotonic() - began
        files["repaired", level] = found
        repairs[level] = asdict(found)
    with Engine(f16, n_ctx=256, n_seq_max=1) as engine:
        samples = read_samples(work / "held.txt", engine, options.held)
    measured = measure(f16, [f.path for f in files.values()], samples, threads=options.threads)
    tokens = measured["tokens"]
    means = measured["kl"].sum(axis=1) / tokens.sum()
    intervals = ratio_intervals(measured["kl"], tokens, [s.document for s in samples])
    rows = [
        {"kind": kind, "level": level, "bytes": f.bytes, "bpw": f.bpw, "kl": float(kl), "kl_ci": ci, "nll": float(nll.sum() / tokens.sum())}
        for ((kind, level), f), kl, ci, nll in zip(files.items(), means, intervals, measured["nll"][1:], strict=True)
    ]
    return {"base": base, "text": source, "tokens": int(tokens.sum()), "nll_f16": float(measured["nll"][0].sum() / tokens.sum()), "rows": rows,
            "repairs": repairs, "seconds": seconds}


def draw(found: list[dict], path: Path) -> None:
    """KL (logarithmic) against bits a weight, a panel for each base."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(found), figsize=(5 * len(found), 4), squeeze=False)
    for axis, result in zip(axes[0], found, strict=True):
        for kind, style in (("stock, no importance", "s"), ("stock", "o-"), ("repaired", "D-")):
            rows = sorted((r for r in result["rows"] if r["kind"] == kind), key=lambda r: r["bpw"])
            axis.plot([r["bpw"] for r in rows], [r["kl"] for r in rows], style, label=kind, markersize=5)
            for r in rows if kind == "stock" else ():
                axis.annotate(r["level"], (r["bpw"], r["kl"]), fontsize=7, xytext=(4, 4), textcoords="offset points")
        axis.set(title=result["base"], xlabel="bits a weight", ylabel="mean KL on held-out text, nats/token", yscale="log")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", action="append", help="a bundled base or a Hugging Face folder; may be repeated (default: all three)")
    parser.add_argument("--levels", type=lambda text: text.split(","), default=list(LEVELS))
    parser.add_argument("--tokens", type=int, default=32_768, help="of the importance matrix")
    parser.add_argument("--held", type=int, default=16_384, help="held-out tokens")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = [curve(base, Path(folder) / Path(base).name, options) for base in options.base or ("tiny-llama", "tiny-qwen", "tiny-llmjp")]
    for result in found:
        table = Table("level", "stock MB", "KL", "repaired MB", "KL", "less", "KL, no importance", title=f"{result['base']}: {result['tokens']:,} held-out tokens, {result['text']}")
        for level in options.levels:
            stock, own, plain = (next((r for r in result["rows"] if r["kind"] == k and r["level"] == level), None)
                                 for k in ("stock", "repaired", "stock, no importance"))
            table.add_row(level, f"{stock['bytes'] / 1e6:.3f}", f"{stock['kl']:.5f}", f"{own['bytes'] / 1e6:.3f}", f"{own['kl']:.5f}",
                          f"{1 - own['kl'] / stock['kl']:.0%}", f"{plain['kl']:.5f}" if plain else "")
        Console(width=120).print(table)
        Console(width=120).print("seconds: " + ", ".join(f"{k} {v:.0f}" for k, v in result["seconds"].items()))
    if options.json:
        options.json.write_text(json.dumps(found, ensure_ascii=False, indent=1), encoding="utf-8")
    if options.figure:
        draw(found, options.figure)


if __name__ == "__main__":
    main()
