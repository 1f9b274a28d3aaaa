"""Training speed and loss curve of our fit beside TRL's SFTTrainer with its defaults, in one run.

    python benchmarks/qlora_speed.py [--steps 50] [--only llama-3-8b] [--json FILE.json]     on a GPU: QLoRA at 8B shapes
    python benchmarks/qlora_speed.py --cpu [--steps 50] [--samples 400]                      the bundled tiny base in float32

Both train the same random weights (on the CPU the bundled base) on the same samples in the same order, from the same start
of the adapter, with the same rank, batch, micro-batch, optimizer, schedule and checkpointing; what differs is what TRL
does by default. The targets are 1.5 times TRL's tokens a second, and per-step losses that differ by at most 0.1 %.

On a GPU the samples are random tokens whose lengths are spread as those of questions and answers are: log-normal around
a third of the sequence. Without a GPU the 8B shapes are not measured, and that is said.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tsugiki.adapt import fit as fit_module
from tsugiki.adapt.fit import FitSettings, add_adapter, fit
from tsugiki.chat import encode
from tsugiki.recipes.domains import load_domain, load_splits
from tsugiki.samples import EncodedSample

sys.path.append(str(Path(__file__).parent))
from qlora_memory import SHAPES, TOKENIZER, random_model


def spread_samples(count: int, sequence: int, vocabulary: int) -> list[EncodedSample]:
    """Random tokens; lengths log-normal around a third of ``sequence``, at most that; the last third is the answer."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(sequence / 3), 0.6, count).astype(int), 16, sequence)
    return [
        EncodedSample(f"s{i}", "q", "a", "d", "", rng.integers(0, vocabulary, n - n // 3).tolist(), rng.integers(0, vocabulary, n // 3).tolist())
        for i, n in enumerate(lengths)
    ]


def ours(model, tokenizer, samples: list[EncodedSample], settings: FitSettings) -> tuple[float, list[float]]:
    """Tokens a second and the loss of every step of :func:`tsugiki.adapt.fit.fit`."""
    load, every = fit_module.load_base, fit_module.LOG_EVERY
    fit_module.load_base, fit_module.LOG_EVERY = lambda *args, **options: model, 1
    try:
        with tempfile.TemporaryDirectory() as work:
            _, report = fit(Path(), tokenizer, samples, settings, Path(work))
    finally:
        fit_module.load_base, fit_module.LOG_EVERY = load, every
    return report.train_tokens / report.seconds, report.losses


def trl(model, tokenizer, samples: list[EncodedSample], settings: FitSettings) -> tuple[float, list[float]]:
    """Tokens a second and the loss of every step of TRL's trainer, whatever the settings do not name as it comes."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    gpu, four_bit = torch.cuda.is_available() and next(model.parameters()).is_cuda, getattr(model, "is_loaded_in_4bit", False)
    model = add_adapter(model, settings, 0)
    data = Dataset.from_dict({
        "input_ids": [s.ids for s in samples],
        "completion_mask": [[0] * len(s.prompt_ids) + [1] * len(s.completion_ids) for s in samples],
    })
    with tempfile.TemporaryDirectory() as work:
        trainer = SFTTrainer(
            model=model, train_dataset=data, processing_class=tokenizer,
            args=SFTConfig(
                output_dir=work, max_steps=settings.max_steps, per_device_train_batch_size=settings.micro_batch,
                gradient_accumulation_steps=settings.batch_size // settings.micro_batch, learning_rate=settings.learning_rate,
                lr_scheduler_type="cosine", warmup_steps=settings.warmup, weight_decay=settings.weight_decay,
                completion_only_loss=True, bf16=gpu, use_cpu=not gpu, gradient_checkpointing=bool(settings.checkpointing),
                optim="paged_adamw_8bit" if four_bit else "adamw_torch_fused", logging_steps=1, seed=0, data_seed=0,
                report_to="none", save_strategy="no", disable_tqdm=True, log_level="error", dataloader_pin_memory=gpu,
            ),
        )
        began = time.monotonic()
        trainer.train()
        seconds = time.monotonic() - began
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    passes = trainer.state.global_step / -(-len(samples) // settings.batch_size)
    return sum(len(s.ids) for s in samples) * passes / seconds, losses


def compare(name: str, load: Callable, tokenizer, samples: list[EncodedSample], settings: FitSettings, rounds: int) -> dict:
    """Both routes in turn, each on a model of its own; the fastest round of each counts."""
    speeds: dict[str, list[float]] = {"tsugiki": [], "TRL": []}
    curves = {}
    for _ in range(rounds):
        for route, train in (("tsugiki", ours), ("TRL", trl)):
            speed, curves[route] = train(load(), tokenizer, samples, settings)
            speeds[route].append(speed)
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    a, b = (np.asarray(curves[route]) for route in ("tsugiki", "TRL"))
    return {
        "shape": name, "tokens_per_second": {route: max(found) for route, found in speeds.items()}, "rounds": speeds,
        "ratio": max(speeds["tsugiki"]) / max(speeds["TRL"]), "losses": curves, "steps": len(a),
        "largest_difference": float((np.abs(a - b) / b).max()),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="the bundled tiny-llama in float32 on the CPU")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--sequence", type=int, default=1024)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument("--only", choices=list(SHAPES), help="one shape in place of both")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    settings = FitSettings(rank=options.rank, alpha=2 * options.rank, learning_rate=2e-4, batch_size=options.batch_size,
                           micro_batch=options.micro_batch, max_steps=options.steps, checkpoint_minutes=0, report_to="none",
                           checkpointing=not options.cpu)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    console, rows = Console(width=120), []
    if options.cpu:
        torch.set_num_threads(1)
        domain = load_domain("setsubi")
        samples = encode(tokenizer, load_splits(domain).train[: options.samples], domain.system)
        rows.append(compare("tiny-llama", lambda: AutoModelForCausalLM.from_pretrained(TOKENIZER, dtype=torch.float32), tokenizer, samples,
                            settings, options.rounds))
    elif not torch.cuda.is_available() or not importlib.util.find_spec("bitsandbytes"):
        console.print("There is no GPU, or no bitsandbytes: nothing was measured. `--cpu` compares both on the bundled tiny base.")
        return
    else:
        for name, (kind, fields) in SHAPES.items():
            if options.only in (None, name):
                config = AutoConfig.for_model(kind, tie_word_embeddings=False, **fields)
                samples = spread_samples(options.samples, options.sequence, fields["vocab_size"])
                rows.append(compare(name, lambda config=config: random_model(config, "cuda", four_bit=True), tokenizer, samples, settings, options.rounds))
    table = Table("base", "tsugiki tokens/s", "TRL tokens/s", "ratio", "largest difference of a step's loss", title=f"{options.steps} steps, {rows[0]['device']}")
    for row in rows:
        table.add_row(row["shape"], *(f"{row['tokens_per_second'][r]:,.0f}" for r in ("tsugiki", "TRL")), f"{row['ratio']:.2f}×", f"{row['largest_difference']:.1e}")
    console.print(table)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
