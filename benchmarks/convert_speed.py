"""Convert and merge: ours against PEFT's merge_and_unload, save_pretrained and llama.cpp's own converter, side by side.

    tsugiki's checkout: TSUGIKI_LLAMA_CPP=DIR python -P benchmarks/convert_speed.py --json convert.json

A random-weight Llama-3 of about 1B parameters in bfloat16 with the real Llama-3 tokenizer (read from
``models/ggml-vocab-llama-bpe.gguf`` of the source tree) and a LoRA adapter of rank 16 on all linear layers. DIR is a
llama.cpp source tree: llama-cpp-python's source archive holds one (``pip download --no-binary :all: llama-cpp-python``,
then ``vendor/llama.cpp``); nothing of it has to be built.

Each way runs in child processes of its own, in turn, ``--repeats`` times. Wall time is the median; memory is the largest
resident set of any process of a way (VmHWM); extra disk is what a way leaves on the disk beside its inputs and its file
(temporary files that are gone at the end are not seen). Then, with
``--large``, one conversion at 8B shapes (Llama-3-8B: 16 GB of weights, written shard by shard, each layer the same random
bytes, and 16 GB of GGUF) for its memory and disk. ``--only ours`` leaves the other way out, so that

    python -P benchmarks/convert_speed.py --only ours --large --shape tiny --repeats 1

is that one conversion and little else; memory and disk need no quiet machine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

SHAPES = {
    "tiny": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 12, "num_attention_heads": 32, "num_key_value_heads": 8},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8},
}
TARGETS = {"wall": 0.5, "memory": 0.25, "disk": 0.5, "large_memory_gb": 3.0}

PRELUDE = """
import json, sys, time, warnings
warnings.filterwarnings("ignore")
job = json.loads(sys.argv[1])
"""
REPORT = """
from tsugiki.machine import peak_rss
print("RESULT " + json.dumps({"memory": peak_rss()}))
"""
OURS = PRELUDE + """
from tsugiki.quantize.convert import convert
convert(job["base"], job["out"], job["adapter"])
""" + REPORT
MERGE = PRELUDE + """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from peft import PeftModel
model = AutoModelForCausalLM.from_pretrained(job["base"], dtype=torch.bfloat16)
model = PeftModel.from_pretrained(model, job["adapter"]).merge_and_unload()
model.save_pretrained(job["merged"])
AutoTokenizer.from_pretrained(job["base"]).save_pretrained(job["merged"])
""" + REPORT
# Upstream knows a tokenizer by a hash of a probe string; one read back from a GGUF is in no table.
UPSTREAM = PRELUDE + """
import runpy
sys.path[:0] = [job["tree"] + "/gguf-py", job["tree"]]
from conversion import base
base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "llama-bpe"
sys.argv = ["convert_hf_to_gguf.py", job["merged"], "--outfile", job["out"], "--outtype", "f16"]
runpy.run_path(job["tree"] + "/convert_hf_to_gguf.py", run_name="__main__")
""" + REPORT


def run(code: str, job: dict) -> dict:
    """Run one step in a process of its own: ``seconds``, ``memory`` (bytes)."""
    environment = os.environ | {"PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1"}
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-P", "-c", code, json.dumps(job)], env=environment, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        raise SystemExit(f"a step failed:\n{done.stderr[-3000:]}")
    return {"seconds": seconds, **json.loads(lines[-1][7:])}


def peak_disk(code: str, job: dict, folder: Path) -> dict:
    """:func:`run`, and ``disk``: the most bytes that ``folder`` had meanwhile beyond those at the start (seen every 0.2 s)."""
    before, most, done = size(folder), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.2):
            with contextlib.suppress(FileNotFoundError):  # renamed while it was looked at
                most = max(most, size(folder) - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        found = run(code, job)
    finally:
        done.set()
        watcher.join()
    return found | {"disk": max(most, size(folder) - before)}


def size(path: Path) -> int:
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) if path.is_dir() else path.stat().st_size


def make_base(folder: Path, shape: str, tree: Path) -> None:
    """A random-weight Llama-3 with the real tokenizer, written a layer at a time: any layer has the same bytes."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoTokenizer, LlamaConfig

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(tree / "models", gguf_file="ggml-vocab-llama-bpe.gguf")
    # The vocabulary file names no special tokens' roles; the regex is the tokenizer's own.
    tokenizer.save_pretrained(folder)
    make_llama3(folder)
    config = LlamaConfig(
        **SHAPES[shape], vocab_size=128_256, max_position_embeddings=8192, rope_theta=500_000.0, tie_word_embeddings=False,
        bos_token_id=128_000, eos_token_id=128_001, architectures=["LlamaForCausalLM"], dtype="bfloat16",
    )
    config.save_pretrained(folder)
    from tsugiki.quantize.families import FAMILIES, expected_tensors

    generator = torch.Generator().manual_seed(0)
    parts: dict[str, dict] = {}
    for tensor in expected_tensors(FAMILIES["LlamaForCausalLM"], config):
        layer = tensor.sources[0].split(".")[2] if ".layers." in tensor.sources[0] else tensor.sources[0]
        parts.setdefault(layer, {})[tensor.sources[0]] = tensor.source_shape
    index, random = {}, {}
    for i, part in enumerate(parts.values()):
        name = f"model-{i + 1:05}-of-{len(parts):05}.safetensors"
        made = {}
        for source, dims in part.items():
            if dims not in random:
                random[dims] = (torch.randn(dims, generator=generator) * 0.02 + (len(dims) == 1)).to(torch.bfloat16)
            made[source] = random[dims]
            index[source] = name
        save_file({k: v.clone() for k, v in made.items()}, folder / name, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def make_llama3(folder: Path) -> None:
    """Give a tokenizer that was read from a GGUF the pre-tokenizer of Llama 3, which the GGUF only names."""
    from tsugiki.quantize.tokenizer import PRE_TOKENIZERS

    regex = next(r for (r, _), n in PRE_TOKENIZERS.items() if n == "llama-bpe")
    spec = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    spec["normalizer"] = None
    spec["added_tokens"] = [t for t in spec["added_tokens"] if t["id"] < 128_256]
    spec["model"]["ignore_merges"] = True
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ]}
    (folder / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}))


def make_adapter(folder: Path, base: Path, rank: int = 16) -> None:
    """A LoRA adapter on all linear layers, written without loading the model."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig

    from tsugiki.quantize.families import FAMILIES, expected_tensors

    folder.mkdir(parents=True, exist_ok=True)
    generator, tensors = torch.Generator().manual_seed(1), {}
    for tensor in expected_tensors(FAMILIES["LlamaForCausalLM"], AutoConfig.from_pretrained(base)):
        source = tensor.sources[0]
        if "_proj" in source:
            rows, columns = tensor.source_shape
            module = f"base_model.model.{source.removesuffix('.weight')}"
            tensors[f"{module}.lora_A.weight"] = torch.randn(rank, columns, generator=generator) * 0.02
            tensors[f"{module}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) * 0.02
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    (folder / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets,
        "bias": "none", "base_model_name_or_path": str(base),
    }))


def compare(work: Path, tree: Path, repeats: int, *, both: bool = True) -> dict:
    """Both ways in turn (or ours alone): seconds and memory of each, and how far the two files' tensors are apart."""
    job = {"base": str(work / "base"), "adapter": str(work / "adapter"), "merged": str(work / "merged"), "tree": str(tree)}
    ways: dict[str, list[dict]] = {"ours": [], "theirs": []}
    for _ in range(repeats):
        for leftover in ("ours.gguf", "theirs.gguf"):
            (work / leftover).unlink(missing_ok=True)
        shutil.rmtree(work / "merged", ignore_errors=True)
        before = size(work)
        one = run(OURS, job | {"out": str(work / "ours.gguf")})
        ways["ours"].append(one | {"disk": size(work) - before - size(work / "ours.gguf")})
        if not both:
            continue
        before = size(work)
        merge = run(MERGE, job)
        upstream = run(UPSTREAM, job | {"out": str(work / "theirs.gguf")})
        ways["theirs"].append({
            "seconds": merge["seconds"] + upstream["seconds"], "memory": max(merge["memory"], upstream["memory"]),
            "disk": size(work) - before - size(work / "theirs.gguf"), "merge_seconds": merge["seconds"], "convert_seconds": upstream["seconds"],
        })
    result = {
        way: {key: statistics.median(r[key] for r in rows) for key in rows[0]} for way, rows in ways.items() if rows
    }
    if not both:
        return result
    result["ratio"] = {
        "wall": result["ours"]["seconds"] / result["theirs"]["seconds"],
        "memory": result["ours"]["memory"] / result["theirs"]["memory"],
        "disk": result["ours"]["disk"] / result["theirs"]["disk"],
    }
    result["largest_difference"] = largest_difference(work / "ours.gguf", work / "theirs.gguf")
    return result


def largest_difference(ours: Path, theirs: Path) -> float:
    """Of any two values of the same tensor: theirs were rounded to bfloat16 after the merge."""
    import gguf
    import numpy as np

    one, other = ({t.name: t for t in gguf.GGUFReader(p).tensors} for p in (ours, theirs))
    if set(one) != set(other):
        raise SystemExit(f"the files hold other tensors: {set(one) ^ set(other)}")
    return max(float(np.abs(one[n].data.astype(np.float32) - other[n].data.astype(np.float32)).max()) for n in one)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, default=os.environ.get("TSUGIKI_LLAMA_CPP"), help="a llama.cpp source tree")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()), help="folder in which a temporary one for models and files is made")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    parser.add_argument("--shape", choices=["tiny", "1b"], default="1b")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=["ours"], help="leave PEFT and llama.cpp out")
    parser.add_argument("--large", action="store_true", help="also one conversion at 8B shapes: 33 GB of disk")
    args = parser.parse_args()
    if not args.tree or not (Path(args.tree) / "convert_hf_to_gguf.py").is_file():
        parser.error("--tree (or TSUGIKI_LLAMA_CPP) names no llama.cpp source tree")
    tree = Path(args.tree).resolve()
    args.work.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=args.work.resolve(), prefix="convert-speed-"))
    try:
        make_base(work / "base", args.shape, tree)
        make_adapter(work / "adapter", work / "base")
        result = {"shape": args.shape, "parameters": size(work / "base") // 2, "repeats": args.repeats, "targets": TARGETS}
        result |= compare(work, tree, args.repeats, both=not args.only)
        if args.large:
            shutil.rmtree(work)
            make_base(work / "base", "8b", tree)
            make_adapter(work / "adapter", work / "base")
            job = {"base": str(work / "base"), "adapter": str(work / "adapter"), "out": str(work / "large.gguf")}
            result["large"] = peak_disk(OURS, job, work) | {"weights": size(work / "base"), "file": size(work / "large.gguf")}
    finally:
        shutil.rmtree(work, ignore_errors=True)
    show(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def show(result: dict) -> None:
    print(f"{'':24}{'wall s':>10}{'memory MB':>12}{'extra disk MB':>15}")
    for way, name in (("ours", "tsugiki"), ("theirs", "PEFT + llama.cpp")):
        if way not in result:
            continue
        r = result[way]
        print(f"{name:24}{r['seconds']:>10.1f}{r['memory'] / 1e6:>12,.0f}{r['disk'] / 1e6:>15,.0f}")
    if "ratio" in result:
        print(f"{'ratio':24}" + "".join(f"{result['ratio'][k]:>{w}.2f}" for k, w in (("wall", 10), ("memory", 12), ("disk", 15))))
        print(f"{'target':24}" + "".join(f"{TARGETS[k]:>{w}.2f}" for k, w in (("wall", 10), ("memory", 12), ("disk", 15))))
        print(f"largest difference of two values: {result['largest_difference']:.2e}")
    if "large" in result:
        r = result["large"]
        print(f"8B shapes: {r['seconds']:.0f} s, {r['memory'] / 1e9:.2f} GB of memory (at most {TARGETS['large_memory_gb']}), "
              f"a file of {r['file'] / 1e9:.1f} GB from {r['weights'] / 1e9:.1f} GB of weights, {(r['disk'] - r['file']) / 1e9:.2f} GB of disk beside it")


if __name__ == "__main__":
    main()
