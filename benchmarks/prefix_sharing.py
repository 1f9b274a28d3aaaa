"""Few-shot generation and parallel generation, side by side in one run: how much shared prefixes and batches save.

    python -P benchmarks/prefix_sharing.py --llama-cpp DIR --upstream DIR [--items 40] [--slow-items 2] [--keep DIR]

The random-weight model of benchmarks/loglikelihood_speed.py (0.4B, the 128k vocabulary of Llama 3, Q4_K_M). Parts:

- (b) JMMLU, the five subjects on Japan's culture, 4-shot prompts as FlexEval writes them (made-up ids of the same lengths
  where the data is not at hand), ``--tokens`` generated a question, EOS and stops ignored, so that each route does the
  same work: the engine; llama-cpp-python item by item, which reuses the prefix of its last prompt; lm-eval's own class on
  transformers in float32 and bfloat16, prompt by prompt in its order, on the first ``--slow-items`` of each subject.
- (c) 32 answers of ``--answer-tokens`` to prompts of 16 tokens, in parallel and (8 of them) one at a time.
- (d) generation of one sequence: the engine and ``llama-bench`` of the same source, rounds alternating.
- (e) the floor of (b): unique prompt tokens over the measured prompt rate and generated tokens over the measured rate at
  the engine's width, both measured behind a shared prefix of the same length.
- answers on the trained tiny-llama: the engine with shared prefixes against transformers one at a time. Random weights
  have near-ties, so their answers are not compared.

``--llama-cpp`` (or ``TSUGIKI_LLAMA_CPP``) is a source tree of llama.cpp, ``--upstream`` (or ``TSUGIKI_UPSTREAM``) a folder
of its built programs (cmake with ``-DLLAMA_CURL=OFF``, target ``llama-bench``); without it (d) is left out. llama-cpp-python
and the engine both repack weights for AMX tiles where this build can (:mod:`tsugiki.evaluate.tiles`), else neither does.
``llama-bench`` repacks either way; to compare like with like, build it with ``-include evaluate/amx_tiles.h`` too.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import llama_cpp
import numpy as np
from rich.console import Console
from rich.table import Table

from tsugiki.artifacts import write_json
from tsugiki.errors import UserError
from tsugiki.evaluate.engine import Engine
from tsugiki.evaluate.prefixes import prefix_tree, visit
from tsugiki.evaluate.tiles import tiles_work
from tsugiki.machine import cpu_count
from tsugiki.quantize.convert import convert

HERE = Path(__file__).resolve().parent
TINY = HERE.parent / "recipes" / "bases" / "tiny-llama"


def beside(name: str):
    """Another benchmark of this folder, as a module."""
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def prompts_of(engine: Engine, items: int, subjects: int) -> tuple[list[list[list[int]]], str]:
    """For each subject ``items`` prompts of ids, and where they come from."""
    from tsugiki.evaluate.tasks.docs_takase import CULTURE, jmmlu_culture

    try:
        rows = jmmlu_culture()["test"]
        texts = [[row["prompt"] for row in rows if row["subject"] == subject][:items] for subject in CULTURE[:subjects]]
        return [[engine.tokenize(text, special=False) for text in found] for found in texts], "JMMLU"
    except UserError:
        rng = np.random.default_rng(0)
        lengths = ((400, 60), (450, 80), (450, 80), (400, 70), (300, 40))  # like the five subjects'
        return [[p + rng.integers(1000, 100_000, int(rng.integers(q // 2, 2 * q))).tolist() for _ in range(items)]
                for p, q in ((rng.integers(1000, 100_000, p).tolist(), q) for p, q in lengths[:subjects])], "made-up ids"


def engine_route(path: Path, prompts: list[list[int]], tokens: int, threads: int) -> tuple[float, int]:
    """Items a second, and the width chosen."""
    with Engine(path, n_threads=threads) as engine:
        engine.generate(prompts[:1], max_new_tokens=1, stop_ids=())
        began = time.perf_counter()
        engine.generate(prompts, max_new_tokens=tokens, stop_ids=())
        seconds = time.perf_counter() - began
        return len(prompts) / seconds, engine.last_width


def item_by_item_route(path: Path, prompts: list[list[int]], tokens: int, threads: int) -> float:
    from llama_cpp import llama_cpp as low

    defaults = low.llama_model_default_params

    def plain():
        params = defaults()
        if b"AMX_INT8 = 1" in low.llama_print_system_info() and not tiles_work():
            params.use_extra_bufts = False
        return params

    low.llama_model_default_params = plain
    try:
        model = llama_cpp.Llama(str(path), n_ctx=4096, n_threads=threads, n_threads_batch=threads, verbose=False,
                                n_gpu_layers=-1 if low.llama_supports_gpu_offload() else 0)
    finally:
        low.llama_model_default_params = defaults
    try:
        model.create_completion(prompts[0][:8], max_tokens=1, temperature=0.0)
        began = time.perf_counter()
        for prompt in prompts:
            # the low-level loop of create_completion, so that no EOS ends an answer early
            for count, _ in enumerate(model.generate(prompt, temp=0.0, top_k=1), 1):
                if count == tokens:
                    break
        return len(prompts) / (time.perf_counter() - began)
    finally:
        model.close()


def lm_eval_route(hf: Path, texts: list[str], tokens: int, dtype: str) -> float:
    import torch
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=str(hf), device="cuda" if torch.cuda.is_available() else "cpu", dtype=dtype, batch_size=1, add_bos_token=False)
    lm.model.generation_config.eos_token_id = None
    options = {"until": ["◆"], "max_gen_toks": tokens, "min_new_tokens": tokens, "do_sample": False}
    asked = [Instance("generate_until", {}, (text, options), i, ("bench", i, 1)) for i, text in enumerate(texts)]
    began = time.perf_counter()
    lm.generate_until(asked, disable_tqdm=True)
    return len(texts) / (time.perf_counter() - began)


def rates(path: Path, prefix: int, own: int, width: int, threads: int) -> tuple[float, float]:
    """Prompt tokens and generated tokens a second, behind a shared prefix; the second at ``width`` sequences."""
    rng = np.random.default_rng(0)
    with Engine(path, n_threads=threads, n_ctx=prefix + 256 + width * (own + 16), n_seq_max=width) as engine:
        def decode(start: int, n: int, seq, flags: int) -> None:
            engine.decode(rng.integers(0, engine.vocab_size, n), np.arange(start, start + n), seq, [0] * (n - flags) + [1] * flags)

        for start in range(0, prefix, engine.batch):
            decode(start, min(engine.batch, prefix - start), 0, 0)
        prompt = []
        for _ in range(4):  # the first is the warm-up
            began = time.perf_counter()
            decode(prefix, engine.batch, 0, 1)
            prompt.append(time.perf_counter() - began)
            llama_cpp.llama_memory_seq_rm(engine.memory, 0, prefix, -1)
        for seq in range(1, width):
            llama_cpp.llama_memory_seq_cp(engine.memory, 0, seq, -1, -1)
        for seq in range(width):
            decode(prefix, own, seq, 0)
        steps = []
        for step in range(9):
            began = time.perf_counter()
            engine.decode(rng.integers(0, engine.vocab_size, width), [prefix + own + step] * width, range(width), [1] * width)
            steps.append(time.perf_counter() - began)
        return engine.batch / statistics.median(prompt[1:]), width / statistics.median(steps[1:])


def parallel(path: Path, threads: int, tokens: int) -> tuple[float, float]:
    """Generated tokens a second: 32 answers together, and one at a time (8 of them)."""
    prompts = np.random.default_rng(1).integers(1000, 100_000, (32, 16)).tolist()
    found = []
    for width, count in ((None, 32), (1, 8)):
        with Engine(path, n_threads=threads, n_seq_max=width) as engine:
            engine.generate(prompts[:1], max_new_tokens=1, stop_ids=())
            began = time.perf_counter()
            engine.generate(prompts[:count], max_new_tokens=tokens, stop_ids=())
            found.append(tokens * count / (time.perf_counter() - began))
    return found[0], found[1]


def single_stream(path: Path, bench: Path, threads: int, rounds: int) -> tuple[float, float]:
    """Generated tokens a second of one sequence: the engine and llama-bench, medians of alternating rounds."""
    ours, theirs = [], []
    for _ in range(rounds):
        with Engine(path, n_ctx=512, n_seq_max=1, n_threads=threads, flash_attention=True) as engine:
            ours.append(engine.speed(prompt_tokens=8, gen_tokens=64, repeats=1).gen_tok_s)
        command = [bench, "-m", path, "-t", str(threads), "-p", "0", "-n", "64", "-r", "1", "-o", "json"]
        theirs.append(json.loads(subprocess.run(command, capture_output=True, check=True).stdout)[0]["avg_ts"])
    return statistics.median(ours), statistics.median(theirs)


def same_answers(folder: Path, items: int) -> dict[str, int]:
    """Greedy answers of tiny-llama, shared prefixes against transformers' generate one at a time."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(TINY), AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    path = folder / "tiny-F16.gguf"
    convert(TINY, path)
    words = ["東京", "大阪の町", "古い寺", "The river", "彼の友人", "海", "春の山", "町の人々", "一匹の猫", "My friend"]
    shots = "猫は動物である。\n海は広い。\n春は暖かい。\n"
    texts = [f"{shots}{words[i % len(words)]}{'は' * (1 + i // len(words))}" for i in range(items)]
    prompts = [tokenizer(text).input_ids for text in texts]
    same = ties = 0
    with Engine(path, n_threads=1) as engine:
        for prompt, answer in zip(prompts, engine.generate(prompts, max_new_tokens=16, stop_ids=()), strict=True):
            expected = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                                      max_new_tokens=16, min_new_tokens=16, do_sample=False, eos_token_id=None,
                                      pad_token_id=0)[0, len(prompt):].tolist()
            part = next((i for i, (a, b) in enumerate(zip(answer.ids, expected, strict=True)) if a != b), None)
            same += part is None
            ties += part is not None and answer.margins[part] < 1e-2
    return {"prompts": items, "same": same, "parted at a tie (under 0.01 nats)": ties}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-cpp", type=Path, default=os.environ.get("TSUGIKI_LLAMA_CPP"))
    parser.add_argument("--upstream", type=Path, default=os.environ.get("TSUGIKI_UPSTREAM"))
    parser.add_argument("--items", type=int, default=40, help="of each subject")
    parser.add_argument("--subjects", type=int, default=5)
    parser.add_argument("--slow-items", type=int, default=2, help="of each subject, for lm-eval on transformers")
    parser.add_argument("--tokens", type=int, default=8, help="generated a question: the choices of JMMLU have 5 to 10")
    parser.add_argument("--answer-tokens", type=int, default=64, help="of an answer in part (c)")
    parser.add_argument("--threads", type=int, default=cpu_count())
    parser.add_argument("--rounds", type=int, default=5, help="of part (d)")
    parser.add_argument("--parts", default="bcde=", help="= is the comparison of answers")
    parser.add_argument("--keep", type=Path, help="folder to make the model in, or to take it from")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.llama_cpp is None and not (given.keep and (given.keep / "hf" / "config.json").exists()):
        parser.exit(0, "prefix_sharing: left out, it needs --llama-cpp DIR or TSUGIKI_LLAMA_CPP\n")
    console, result = Console(), {"threads": given.threads, "machine": platform.processor() or platform.machine()}
    table = Table("", "measured", "against", "ratio", title=f"0.4B at Q4_K_M, {given.threads} threads")

    def compare(name: str, ours: float, unit: str, other: str, theirs: float) -> None:
        table.add_row(name, f"{ours:,.2f} {unit}", f"{other}: {theirs:,.2f}", f"{ours / theirs:.2f}×")
        result[f"{name} / {other}"] = {"ours": ours, "theirs": theirs, "ratio": ours / theirs, "unit": unit}

    with tempfile.TemporaryDirectory() as temporary:
        folder = given.keep or Path(temporary)
        hf, path = beside("loglikelihood_speed").random_model(folder, Path(given.llama_cpp or "."))
        if set("be") & set(given.parts):
            with Engine(path, n_threads=1) as engine:
                by_subject, source = prompts_of(engine, given.items, given.subjects)
                texts = [engine.detokenize(p) for subject in by_subject for p in subject[: given.slow_items]]
            prompts = [p for subject in by_subject for p in subject]
            unique = sum(len(node.tokens) for node in visit(prefix_tree(prompts)[0]))
            ours, width = engine_route(path, prompts, given.tokens, given.threads)
            result |= {"prompts": source, "items": len(prompts), "tokens": sum(map(len, prompts)), "unique": unique, "width": width}
            console.print(f"{source}: {len(prompts)} prompts, {sum(map(len, prompts)):,} tokens, {unique:,} after sharing; width {width}")
        if "b" in given.parts:
            compare("(b) JMMLU culture", ours, "items/s", "llama-cpp-python", item_by_item_route(path, prompts, given.tokens, given.threads))
            import torch

            torch.set_num_threads(given.threads)
            for dtype in ("float32", "bfloat16") if given.slow_items else ():
                compare("(b) JMMLU culture", ours, "items/s", f"lm-eval hf {dtype}", lm_eval_route(hf, texts, given.tokens, dtype))
        if "e" in given.parts:
            shared = [prefix_tree(subject)[0].children[0].end if len(subject) > 1 else len(subject[0]) for subject in by_subject]
            own = sum(map(len, prompts)) // len(prompts) - sum(shared) // len(shared)
            prompt, generated = rates(path, sum(shared) // len(shared), own, width, given.threads)
            floor = unique / prompt + given.tokens * len(prompts) / generated
            result |= {"prompt tok/s": prompt, "generated tok/s": generated}
            compare("(e) the floor", len(prompts) / ours, "s", f"{prompt:,.0f} and {generated:,.0f} tok/s, s", floor)
        if "c" in given.parts:
            together, alone = parallel(path, given.threads, given.answer_tokens)
            compare("(c) 32 in parallel", together, "tok/s", "one at a time", alone)
        if "d" in given.parts and given.upstream:
            ours, theirs = single_stream(path, Path(given.upstream) / "llama-bench", given.threads, given.rounds)
            compare("(d) one sequence", ours, "tok/s", "llama-bench", theirs)
        if "=" in given.parts:
            result["tiny-llama"] = same_answers(Path(temporary), 20)
            console.print(f"tiny-llama against transformers one at a time: {result['tiny-llama']}")
    console.print(table)
    if given.json:
        write_json(given.json, result)


if __name__ == "__main__":
    main()
