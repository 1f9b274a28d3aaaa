"""Generated sequences a second, side by side in one run: the engine in parallel, and one sequence at a time.

    python benchmarks/generation_speed.py [--sequences 32] [--tokens 200]

The same tiny base, tokens and temperature, EOS ignored. "One at a time" twice: transformers' generate in float32, as a
script would call it, and the engine itself with one sequence. In parallel twice: ``--width`` sequences with KV cells of
their own, and as many as the engine chooses in one memory. The engine's routes include the identification of
languages, whose share of the time is shown. One thread and seconds of CPU time, so that a busy machine does not count;
rounds alternate, the median counts.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tsugiki.evaluate.engine import Engine
from tsugiki.evaluate.languages import count_languages, start_token
from tsugiki.quantize.convert import convert

BASE = Path(__file__).parent.parent / "recipes" / "bases" / "tiny-llama"


def engine_route(path: Path, width: int | None, sequences: int, tokens: int) -> tuple[float, float]:
    """Sequences a CPU second, and the share of the time that language identification took.

    ``width`` sequences with cells of their own; ``None``: as the engine chooses, in one memory.
    """
    options = {"n_ctx": width * -(-tokens // 256) * 256, "n_seq_max": width, "flash_attention": True, "separate": True} if width else {}
    with Engine(path, n_threads=1, **options) as engine:
        start, _ = start_token(engine)
        pieces = [engine.piece(token) for token in range(engine.vocab_size)]
        count_languages([[start]], pieces, frozenset({engine.eos}))  # the identifier is loaded once a run
        began = time.process_time()
        answers = engine.generate([[start]] * sequences, max_new_tokens=tokens, stop_ids=(), temperature=1.0)
        generated = time.process_time()
        count_languages([a.ids for a in answers], pieces, frozenset({engine.eos, engine.bos}))
        ended = time.process_time()
    return sequences / (ended - began), (ended - generated) / (ended - began)


def transformers_route(model, start: int, sequences: int, tokens: int) -> float:
    """Sequences a CPU second of transformers' generate, one sequence a call."""
    import torch

    began = time.process_time()
    for _ in range(sequences):
        model.generate(torch.tensor([[start]]), attention_mask=torch.ones(1, 1, dtype=torch.long), do_sample=True,
                       temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=tokens, min_new_tokens=tokens,
                       eos_token_id=None, pad_token_id=start)
    return sequences / (time.process_time() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=32, help="in parallel; one at a time: an eighth of them")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
    few, tokens = max(1, options.sequences // 8), options.tokens
    speeds: dict[str, list[float]] = {"transformers, one at a time": [], "engine, one at a time": [],
                                      "engine, in parallel, its own choice": [], "engine, in parallel": []}
    shares = []
    with tempfile.TemporaryDirectory() as work:
        path = Path(work) / "model-F16.gguf"
        convert(BASE, path)
        for _ in range(options.rounds):
            speeds["transformers, one at a time"].append(transformers_route(model, model.config.bos_token_id, few, tokens))
            speeds["engine, one at a time"].append(engine_route(path, 1, few, tokens)[0])
            speeds["engine, in parallel, its own choice"].append(engine_route(path, None, options.sequences, tokens)[0])
            speed, share = engine_route(path, options.width, options.sequences, tokens)
            speeds["engine, in parallel"].append(speed)
            shares.append(share)
    medians = {name: statistics.median(found) for name, found in speeds.items()}
    parallel = max(medians["engine, in parallel"], medians["engine, in parallel, its own choice"])
    table = Table("route", "sequences/CPU s", "tokens/CPU s", "the faster is",
                  title=f"Sequences of {tokens} tokens, tiny-llama, 1 thread, {platform.processor() or platform.machine()}")
    for name, speed in medians.items():
        table.add_row(name, f"{speed:.2f}", f"{speed * tokens:,.0f}", f"{parallel / speed:.1f}×")
    console = Console()
    console.print(table)
    console.print(f"language identification: {statistics.median(shares):.1%} of the parallel route's time")
    if options.json:
        options.json.write_text(json.dumps({"sequences_per_second": speeds, "median": medians,
                                            "identification_share": statistics.median(shares)}, indent=1))


if __name__ == "__main__":
    main()
