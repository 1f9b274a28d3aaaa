"""Peak memory of a QLoRA fit on a GPU, beside the planner's prediction, at the shapes of Llama-3-8B and Qwen2.5-7B.

    python benchmarks/qlora_memory.py [--sequence 1024] [--micro-batch 1] [--rank 16] [--steps 4] [--json FILE.json]

Random weights of the published shapes and vocabularies are quantized matrix by matrix on the card (bitsandbytes NF4 with
double quantization), so that no download and no 16 GB of main memory are needed; then our own fit trains some steps.
The targets are a peak of 7.0 GiB at sequence 1,024 and micro-batch 1, and a prediction within 10 %. Without a GPU
nothing is measured, and that is said; the predictions are printed all the same.

`--smoke` runs the same steps at a small shape in bf16, wherever it is: it shows that the benchmark runs, nothing else.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tsugiki.adapt import fit as fit_module
from tsugiki.adapt.fit import FitSettings, fit
from tsugiki.adapt.plan import GIB, predict
from tsugiki.bases import Profile, profile
from tsugiki.samples import EncodedSample

TOKENIZER = Path(__file__).parent.parent / "recipes" / "bases" / "tiny-llama"
# The fields of the published config.json files that memory depends on.
SHAPES = {
    "llama-3-8b": ("llama", {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
                             "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192}),
    "qwen2.5-7b": ("qwen2", {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
                             "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 32768}),
}
SMOKE = {"smoke": ("llama", {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
                             "num_key_value_heads": 2, "vocab_size": 8000, "max_position_embeddings": 2048})}


def shape_profile(config) -> Profile:
    """Profile of a configuration, as the planner reads it from a folder."""
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return profile(folder)


def random_model(config, device: str, *, four_bit: bool):
    """A causal language model of random weights on a device, made layer by layer; its decoder's matrices in NF4 if wanted."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    generator = torch.Generator(device).manual_seed(0)

    def weights(like: torch.Tensor) -> torch.Tensor:
        made = torch.empty(like.shape, dtype=torch.bfloat16, device=device)
        return made.fill_(1.0) if like.ndim == 1 else made.normal_(0, 0.02, generator=generator)

    for name, module in list(model.named_modules()):
        if four_bit and isinstance(module, torch.nn.Linear) and ".layers." in name:
            import bitsandbytes as bnb

            made = bnb.nn.Linear4bit(module.in_features, module.out_features, bias=module.bias is not None,
                                     compute_dtype=torch.bfloat16, compress_statistics=True, quant_type="nf4", device="meta")
            made.weight = bnb.nn.Params4bit(weights(module.weight).cpu(), requires_grad=False, compress_statistics=True, quant_type="nf4")
            if module.bias is not None:
                made.bias = torch.nn.Parameter(torch.zeros_like(module.bias, device="cpu"), requires_grad=False)
            model.set_submodule(name, made.to(device))  # moving to the card is what quantizes
            continue
        for key, p in list(module.named_parameters(recurse=False)):
            setattr(module, key, torch.nn.Parameter(weights(p), requires_grad=False))
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    if config.tie_word_embeddings:
        model.tie_weights()
    model.is_loaded_in_4bit = four_bit
    return model


def samples(count: int, sequence: int, vocabulary: int) -> list[EncodedSample]:
    """Random tokens, a fifth of each sample the answer, all of one length: the planner's worst case for a sequence."""
    rng, learned = np.random.default_rng(0), sequence // 5
    return [
        EncodedSample(f"s{i}", "q", "a", "d", "", rng.integers(0, vocabulary, sequence - learned).tolist(),
                      rng.integers(0, vocabulary, learned).tolist())
        for i in range(count)
    ]


def measure(name: str, kind: str, fields: dict, settings: FitSettings, sequence: int, *, four_bit: bool) -> dict:
    """Fit some steps; bytes at the peak and tokens a second, beside the prediction."""
    config = AutoConfig.for_model(kind, tie_word_embeddings=False, **fields)
    gpu = torch.cuda.is_available()
    device = "cuda" if gpu else "cpu"
    predicted = predict(shape_profile(config), sequence=sequence, rank=settings.rank, micro_batch=settings.micro_batch,
                        four_bit=four_bit, checkpointing=True, learned=sequence // 5)
    model = random_model(config, device, four_bit=four_bit)
    original, fit_module.load_base = fit_module.load_base, lambda *args, **options: model
    try:
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        with tempfile.TemporaryDirectory() as work:
            _, report = fit(Path(), AutoTokenizer.from_pretrained(TOKENIZER), samples(settings.batch_size, sequence, fields["vocab_size"]),
                            settings, Path(work))
    finally:
        fit_module.load_base = original
    free, whole = torch.cuda.mem_get_info() if gpu else (0, 0)
    return {
        "shape": name, "sequence": sequence, "micro_batch": report.micro_batch, "rank": settings.rank, "four_bit": four_bit,
        "predicted": asdict(predicted) | {"allocated": predicted.allocated, "total": predicted.total},
        "peak_allocated": torch.cuda.max_memory_allocated() if gpu else None,
        "peak_reserved": torch.cuda.max_memory_reserved() if gpu else None,
        "used_on_card": whole - free if gpu else None,
        "tokens_per_second": report.train_tokens / report.seconds, "losses": report.losses,
        "gpu": torch.cuda.get_device_name() if gpu else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequence", type=int, default=1024)
    parser.add_argument("--micro-batch", type=int, default=1)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--only", choices=list(SHAPES), help="one shape in place of both")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    console = Console(width=120)
    settings = FitSettings(rank=options.rank, alpha=2 * options.rank, learning_rate=2e-4, batch_size=4 * options.micro_batch,
                           micro_batch=options.micro_batch, max_steps=options.steps, checkpointing=True, checkpoint_minutes=0,
                           report_to="none")
    if options.smoke:
        row = measure("smoke", *SMOKE["smoke"], replace(settings, max_steps=5), min(options.sequence, 64), four_bit=False)
        console.print(f"smoke: {row['tokens_per_second']:,.0f} tokens/s, loss {row['losses'][-1]:.3f}; memory is measured on a GPU only")
        return
    lacking = ("no GPU" if not torch.cuda.is_available()
               else "no bitsandbytes (pip install bitsandbytes)" if not importlib.util.find_spec("bitsandbytes") else None)
    rows = []
    table = Table("shape", "predicted GiB", "measured GiB", "prediction / measured", "tokens/s",
                  title=f"QLoRA, sequence {options.sequence:,}, micro-batch {options.micro_batch}, rank {options.rank}, checkpointing")
    for name, (kind, fields) in SHAPES.items():
        if options.only not in (None, name):
            continue
        if lacking:
            base = shape_profile(AutoConfig.for_model(kind, tie_word_embeddings=False, **fields))
            predicted = predict(base, sequence=options.sequence, rank=options.rank, micro_batch=options.micro_batch, four_bit=True,
                                checkpointing=True, learned=options.sequence // 5)
            table.add_row(name, f"{predicted.allocated / GIB:.2f}", "not measured", "–", "–")
            continue
        row = measure(name, kind, fields, settings, options.sequence, four_bit=True)
        rows.append(row)
        table.add_row(name, f"{row['predicted']['allocated'] / GIB:.2f}", f"{row['peak_allocated'] / GIB:.2f}",
                      f"{row['predicted']['allocated'] / row['peak_allocated']:.3f}", f"{row['tokens_per_second']:,.0f}")
        torch.cuda.empty_cache()
    console.print(table)
    if lacking:
        console.print(f"There is {lacking} here: nothing was measured. The column is the planner's prediction alone.")
    if options.json:
        options.json.write_text(json.dumps({"measured": rows, "not_measured": lacking}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
