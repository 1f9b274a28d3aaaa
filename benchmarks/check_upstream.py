"""Check of five levels, side by side in one run: ours in lock-step, and llama-perplexity's two steps.

    python benchmarks/check_upstream.py --vocabulary DIR/models/ggml-vocab-qwen2.gguf --upstream DIR [--windows 8]

A random-weight Qwen2 of 0.46B parameters with the real vocabulary of 151,936 (``--layers``, ``--hidden`` for a smaller
one), the same text (this repository's READMEs unless ``--text``), windows of 512 tokens with the second half scored.
Upstream first saves the reference's log-probabilities (``--kl-divergence-base``, about 300 KB a token), then compares
each level; its tools are built from llama-cpp-python's source archive:

    cmake -B build -DLLAMA_CURL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF
    cmake --build build --target llama-perplexity

and found by ``--upstream`` or TSUGIKI_UPSTREAM; the vocabulary is in the same archive (vendor/llama.cpp/models), found by
``--vocabulary`` or under TSUGIKI_LLAMA_CPP. Where its weights repacked for AMX tiles crash (GCC 12), upstream runs with
``--no-repack``, and it is said; built with ``-DCMAKE_CXX_FLAGS=-include$PWD/evaluate/amx_tiles.h`` they do not. Ours repacks
where its own build can and it pays (:mod:`tsugiki.evaluate.tiles`). Routes alternate, the median counts.
Ratios are meaningful between machines, seconds are not.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tsugiki.artifacts import write_json
from tsugiki.machine import cpu_count
from tsugiki.quantize.standalone import CheckFiles, check_files

ROOT = Path(__file__).resolve().parents[1]
LEVELS = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M")


def make_files(folder: Path, vocabulary: Path, layers: int, hidden: int) -> dict[str, Path]:
    """A random-weight Qwen2 with a real tokenizer as F16 and its levels; kept in ``folder`` for a second run."""
    files = {name: folder / f"model-{name}.gguf" for name in ("F16", *LEVELS)}
    if not files["F16"].exists():
        import torch
        from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

        from tsugiki.quantize.convert import convert

        tokenizer = AutoTokenizer.from_pretrained(vocabulary.parent, gguf_file=vocabulary.name)
        torch.manual_seed(0)
        config = Qwen2Config(
            vocab_size=151_936, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
            num_attention_heads=hidden // 64, num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True,
            initializer_range=0.05, dtype="float16",
        )
        base = folder / "base"
        Qwen2ForCausalLM(config).half().save_pretrained(base)
        tokenizer.save_pretrained(base)
        convert(base, files["F16"])
    from tsugiki.quantize.levels import make_level

    for name in LEVELS:
        if not files[name].exists():
            make_level(files["F16"], name, files[name])
    return files


def measured(command: list[str], log: Path) -> tuple[float, float, int, int]:
    """Seconds, processor seconds, peak resident bytes (of the largest process below it) and exit status of a command."""
    started = time.perf_counter()
    with log.open("wb") as out:
        child = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=os.environ | {"PYTHONSAFEPATH": "1"})
        _, status, used = os.wait4(child.pid, 0)
    return time.perf_counter() - started, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024, os.waitstatus_to_exitcode(status)


def upstream(tool: Path, files: dict[str, Path], text: Path, windows: int, work: Path, options: list[str]) -> dict:
    """Two steps: save, compare each; ``None`` where a step failed."""
    saved = work / "logits.bin"
    seconds, cpu, peak, found = 0.0, 0.0, 0, {}
    for name, path in files.items():
        command = [str(tool), "-m", str(path), "-f", str(text), "-t", str(cpu_count()), "--kl-divergence-base", str(saved), *options]
        command += ["--chunks", str(windows)] if name == "F16" else ["--kl-divergence"]
        took, busy, rss, code = measured(command, work / "log.txt")
        said = (work / "log.txt").read_text(encoding="utf-8", errors="replace")
        if code or (name != "F16" and "Same top p:" not in said):
            return {"failed": f"{name}: exit {code}{'' if code else ', its log lacks the result'}"}
        seconds, cpu, peak = seconds + took, cpu + busy, max(peak, rss)
        if name != "F16":
            found[name] = {
                "kld_mean": float(re.search(r"Mean +KLD: +([-\d.]+)", said)[1]),
                "ppl": float(re.search(r"Mean PPL\(Q\) +: +([\d.]+)", said)[1]),
            }
    disk = saved.stat().st_size
    saved.unlink()
    return {"seconds": seconds, "cpu_seconds": cpu, "peak_rss": peak, "disk": disk, "levels": found}


def ours(files: dict[str, Path], text: Path, windows: int, work: Path) -> dict:
    """One call, in a process of its own as a user has it; disk is what its folder for results holds at the end."""
    command = [sys.executable, __file__, "--one", json.dumps([str(text), windows, str(work), *map(str, files.values())])]
    seconds, cpu, peak, code = measured(command, work / "log.txt")
    if code:
        raise SystemExit((work / "log.txt").read_text(encoding="utf-8", errors="replace"))
    found = json.loads((work / "check.json").read_text(encoding="utf-8"))
    import math

    rows = next(iter(found["texts"].values()))["levels"][1:]
    return {
        "seconds": seconds, "cpu_seconds": cpu, "peak_rss": peak, "disk": (work / "check.json").stat().st_size, "memory": found["memory"],
        "levels": {r["level"]: {"kld_mean": r["kld_mean"], "ppl": math.exp(r["nll"])} for r in rows},
    }


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        text, windows, work, reference, *levels = json.loads(sys.argv[2])
        check_files(CheckFiles(Path(reference), tuple(map(Path, levels)), texts=(text,), windows=windows), Path(work))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sources = os.environ.get("TSUGIKI_LLAMA_CPP")
    parser.add_argument("--upstream", type=Path, default=os.environ.get("TSUGIKI_UPSTREAM"))
    parser.add_argument("--vocabulary", type=Path, default=Path(sources) / "models" / "ggml-vocab-qwen2.gguf" if sources else None)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--work", type=Path, help="folder that keeps the models between runs (3 GB)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not options.upstream or not options.vocabulary:
        print("skipped: give --upstream and --vocabulary (TSUGIKI_UPSTREAM and TSUGIKI_LLAMA_CPP)")
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        files = make_files(folder, options.vocabulary, options.layers, options.hidden)
        text, work = options.text, Path(temporary)
        if text is None:
            text = work / "readme.txt"
            text.write_text("".join((ROOT / f).read_text(encoding="utf-8") for f in ("README.ja.md", "README.md")), encoding="utf-8")
        rounds: dict[str, list[dict]] = {"tsugiki": [], "llama-perplexity": []}
        extra: list[str] = []
        for _ in range(options.rounds):
            rounds["tsugiki"].append(ours(files, text, options.windows, work))
            theirs = upstream(options.upstream / "llama-perplexity", files, text, options.windows, work, extra)
            if "exit -" in theirs.get("failed", "") and not extra:
                Console().print(f"llama-perplexity failed ({theirs['failed']}); again with --no-repack")
                extra = ["--no-repack"]
                theirs = upstream(options.upstream / "llama-perplexity", files, text, options.windows, work, extra)
            if "failed" in theirs:  # a log that lacks its end was seen once: not the same twice
                theirs = upstream(options.upstream / "llama-perplexity", files, text, options.windows, work, extra)
            if "failed" in theirs:
                raise SystemExit(f"llama-perplexity failed: {theirs['failed']}")
            rounds["llama-perplexity"].append(theirs)
    medians = {k: statistics.median(r["seconds"] for r in v) for k, v in rounds.items()}
    table = Table("route", "s", "of upstream", "CPU s", "disk MB", "largest process MB", title=f"check of {len(LEVELS)} levels, {options.windows} windows of 512, {cpu_count()} cores {' '.join(extra)}")
    for name, found in rounds.items():
        table.add_row(name, f"{medians[name]:.1f}", f"{medians[name] / medians['llama-perplexity']:.2f}×", f"{statistics.median(r['cpu_seconds'] for r in found):.1f}", f"{found[0]['disk'] / 1e6:,.2f}",
                      f"{max(r['peak_rss'] for r in found) / 1e6:,.0f}")
    Console().print(table)
    table = Table("level", "KL ours", "KL upstream", "perplexity ours", "upstream")
    for name in LEVELS:
        a, b = rounds["tsugiki"][0]["levels"][name], rounds["llama-perplexity"][0]["levels"][name]
        table.add_row(name, f"{a['kld_mean']:.6f}", f"{b['kld_mean']:.6f}", f"{a['ppl']:.3f}", f"{b['ppl']:.3f}")
    Console().print(table)
    memory = rounds["tsugiki"][0]["memory"]
    Console().print(f"memory of the comparison: planned for all files together {memory['needed'] / 1e6:,.0f} MB, in {len(memory['groups'])} "
                    f"group(s); the comparing process took {memory['peak_rss'] / 1e6:,.0f} MB, with pages of the files that the system may drop")
    if options.json:
        write_json(options.json, {"median_seconds": medians, "upstream_options": extra, "rounds": rounds})


if __name__ == "__main__":
    main()
