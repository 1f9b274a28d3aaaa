"""Training speed on the CPU, side by side in one run: our fit, TRL's trainer as it comes, a bare PEFT loop.

    python benchmarks/fit_speed.py [--samples 640]

The same base, samples, batches, rank and thread; tokens of prompt and completion a second. Rounds alternate, the median
counts. Ratios are meaningful between machines, seconds are not.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from tsugiki.adapt.fit import FitSettings, add_adapter, fit
from tsugiki.chat import encode
from tsugiki.recipes.domains import load_domain, load_splits
from tsugiki.samples import EncodedSample

BASE = Path(__file__).parent.parent / "recipes" / "bases" / "tiny-llama"
SETTINGS = FitSettings(epochs=1)


def tokens_of(samples: list[EncodedSample]) -> int:
    return sum(len(s.ids) for s in samples)


def ours(tokenizer, samples: list[EncodedSample]) -> float:
    """Tokens a second of :func:`tsugiki.adapt.fit.fit`."""
    with tempfile.TemporaryDirectory() as work:
        _, report = fit(BASE, tokenizer, samples, SETTINGS, Path(work))
    return report.train_tokens / report.seconds


def trl(tokenizer, samples: list[EncodedSample]) -> float:
    """Tokens a second of TRL's SFTTrainer with its own loss, base in float32."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    model = add_adapter(AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32), SETTINGS, 0)
    data = Dataset.from_dict({
        "input_ids": [s.ids for s in samples],
        "completion_mask": [[0] * len(s.prompt_ids) + [1] * len(s.completion_ids) for s in samples],
    })
    with tempfile.TemporaryDirectory() as work:
        trainer = SFTTrainer(
            model=model, train_dataset=data, processing_class=tokenizer,
            args=SFTConfig(output_dir=work, num_train_epochs=1, per_device_train_batch_size=SETTINGS.batch_size,
                           learning_rate=SETTINGS.learning_rate, completion_only_loss=True, bf16=False, use_cpu=True, gradient_checkpointing=False,
                           report_to="none", save_strategy="no", disable_tqdm=True, logging_strategy="no",
                           dataloader_pin_memory=False),
        )
        began = time.monotonic()
        trainer.train()
        return tokens_of(samples) / (time.monotonic() - began)


def bare_loop(_, samples: list[EncodedSample]) -> float:
    """Tokens a second of the shortest PEFT loop there is: float32, logits at every position."""
    from transformers import AutoModelForCausalLM

    model = add_adapter(AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32), SETTINGS, 0).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=SETTINGS.learning_rate)
    order = random.Random(0).sample(samples, len(samples))
    began = time.monotonic()
    for start in range(0, len(order), SETTINGS.batch_size):
        batch = order[start : start + SETTINGS.batch_size]
        width = max(len(s.ids) for s in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        labels = torch.full_like(ids, -100)
        mask = torch.zeros_like(ids)
        for row, s in enumerate(batch):
            ids[row, : len(s.ids)] = torch.tensor(s.ids)
            labels[row, len(s.prompt_ids) : len(s.ids)] = torch.tensor(s.completion_ids)
            mask[row, : len(s.ids)] = 1
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return tokens_of(samples) / (time.monotonic() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=640)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="a sweep trains one point a core")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    domain = load_domain("setsubi")
    samples = encode(tokenizer, load_splits(domain).train[: options.samples], domain.system)
    routes = {"tsugiki": ours, "bare PEFT loop": bare_loop, "TRL SFTTrainer": trl}
    speeds: dict[str, list[float]] = {name: [] for name in routes}
    for _ in range(options.rounds):
        for name, route in routes.items():
            speeds[name].append(route(tokenizer, samples))
    medians = {name: statistics.median(found) for name, found in speeds.items()}
    table = Table("route", "tokens/s", "of the bare loop", title=f"LoRA on tiny-llama, {options.threads} thread(s), {platform.processor() or platform.machine()}")
    for name, speed in medians.items():
        table.add_row(name, f"{speed:,.0f}", f"{speed / medians['bare PEFT loop']:.2f}×")
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps({"tokens_per_second": speeds, "median": medians}, indent=1))


if __name__ == "__main__":
    main()
