"""Which step did the harm: base with its adapter → merged → the reference GGUF (F16) → each level, on the same token ids and mask.

Torch and llama.cpp run in one child process, one model at a time; between two steps the logits of the samples are held
(at most :data:`HELD_BYTES` twice), so the samples are as many as fit.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from tsugiki.errors import UserError, raise_problems
from tsugiki.evaluate.engine import Engine, check_gguf
from tsugiki.machine import available_memory, cpu_count, peak_rss
from tsugiki.progress import progress
from tsugiki.quantize.child import say
from tsugiki.quantize.compare import WIDTH, divergence, run_task, same_vocabulary, serve_tasks
from tsugiki.quantize.parity import load_reference, merge_reference, reference_bytes
from tsugiki.quantize.verdict import CheckSettings, divergences, ratios
from tsugiki.samples import EncodedSample, read_encoded, write_encoded

HELD_BYTES = 512 << 20  # of float32 logits: 880 completion tokens of a vocabulary of 150,000, 21,000 of 6,144


def attribute(
    base: Path,
    adapter: Path | None,
    files: Mapping[str, Path],
    samples: Sequence[EncodedSample],
    *,
    settings: CheckSettings | None = None,
) -> dict:
    """Measure each step on the first samples and say what it changed from the step before.

    Args:
        base: Hugging Face folder.
        adapter: PEFT folder, or ``None``: the first step is then the base itself.
        files: name to GGUF, the reference first, under the name that its type has; every other is compared with it.
        samples: token ids; as many of the first as fit (:data:`HELD_BYTES`).

    Returns:
        JSON-ready: ``samples``, ``tokens``, ``documents``, ``peak_rss`` (bytes), ``largest`` (the step after
        the first with the largest mean divergence, by name) and ``steps``: ``step`` (``adapter``, ``merged``, ``F16`` or what the reference is,
        levels), ``before`` (the step it is compared with), ``nll`` (nats/token), ``delta_nll`` and ``delta_ci``
        against the step before, ``kld_mean`` and its quantiles (KL(before ‖ step), nats/token), ``top1``, ``top5``.
        Where the memory does not suffice, ``left_out`` alone: a sentence with both numbers.

    Raises:
        UserError: broken files, an adapter for another base, another vocabulary, or a child that died.
    """
    settings = settings or CheckSettings()
    problems = []
    for path in files.values():
        try:
            check_gguf(path)
        except UserError as error:
            problems.append(f"{error.where}: {error.message}")
    for folder, name in ((base, "config.json"), (adapter, "adapter_config.json")):
        if folder is not None and not (Path(folder) / name).is_file():
            problems.append(f"{folder}: there is no {name}")
    if not samples:
        problems.append("no sample")
    raise_problems(problems, what="the steps cannot be measured")
    need, free = reference_bytes(base, adapter) + 3 * HELD_BYTES, available_memory()
    if need > free:
        return {"left_out": f"the model in transformers needs {need / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free"}
    with tempfile.TemporaryDirectory(prefix="tsugiki-steps-") as folder, progress() as bar:
        rows, out = Path(folder) / "samples.jsonl", Path(folder) / "tokens.npz"
        write_encoded(rows, samples)
        steps = [*(["adapter", "merged"] if adapter else ["model"]), *files]
        task = bar.add_task("steps", total=len(steps), note="")
        job = {
            "task": "attribute", "base": str(base), "adapter": str(adapter) if adapter else None,
            "files": {k: str(v) for k, v in files.items()}, "samples": str(rows), "out": str(out),
        }
        report = run_task(job, name="attribution", on_step=lambda n: bar.advance(task, n), module="tsugiki.quantize.attribution")
        with np.load(out) as arrays:
            tokens = dict(arrays)
    used = samples[: report["samples"]]
    sums = np.stack([np.bincount(tokens["sample"], row, len(used)) for row in tokens["nll"]])
    counts = np.bincount(tokens["sample"], minlength=len(used)).astype(float)
    documents = [s.document for s in used]
    rows = []
    for i, step in enumerate(steps):
        before = min(max(0, i - 1), len(steps) - len(files))  # of a level: the reference
        interval = ratios((sums[i] - sums[before])[None], counts, documents, settings, settings.confidence)[0]
        rows.append({
            "step": step,
            "before": steps[before] if i else None,
            "nll": float(sums[i].sum() / counts.sum()),
            "delta_nll": float((sums[i] - sums[before]).sum() / counts.sum()),
            "delta_ci": interval,
            **divergences(tokens, i),
        })
    return {
        "samples": len(used), "tokens": int(counts.sum()), "documents": len(set(documents)),
        "peak_rss": report["peak_rss"], "largest": max(rows[1:], key=lambda r: r["kld_mean"])["step"], "steps": rows,
    }


# --- the child --------------------------------------------------------------------------------------------------


def _attribute(job: dict) -> dict:
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(1)
    samples = read_encoded(Path(job["samples"]))
    model = load_reference(job["base"], job["adapter"], narrow=True)
    # one thread for each 64 MB, as the engine has it: small matrices stall on a barrier
    torch.set_num_threads(min(cpu_count(), 16, 1 + sum(4 * p.numel() for p in model.parameters()) // 64_000_000))
    vocab_size = model.get_output_embeddings().weight.shape[0]
    samples = _that_fit(samples, vocab_size)
    targets = np.concatenate([s.completion_ids for s in samples])
    found = []

    def measured(before: np.ndarray | None, now: np.ndarray) -> None:
        pair = divergence([now] if before is None else [before, now], targets)
        found.append({k: v[-1] for k, v in pair.items()})
        say(steps=1)

    held = _torch_logits(model, samples, vocab_size)
    measured(None, held)
    if job["adapter"]:
        model = merge_reference(model)
        merged = _torch_logits(model, samples, vocab_size)
        measured(held, merged)
        held = merged
    del model
    reference, reference_name = None, next(iter(job["files"]))
    longest = max(len(s.ids) for s in samples)
    with Engine(job["files"][reference_name], n_ctx=max(longest, 256), n_seq_max=1) as first:
        for name, path in job["files"].items():
            say(at=path)
            if name == reference_name:
                now = _engine_logits(first, samples, vocab_size)
                measured(held, now)
                reference, held = now, None
                continue
            with Engine(path, n_ctx=max(longest, 256), n_seq_max=WIDTH) as engine:
                same_vocabulary(first, engine)
                measured(reference, _engine_logits(engine, samples, vocab_size))
    arrays = {k: np.stack([f[k] for f in found]) for k in ("nll", "kld", "top1", "top5")}
    index = np.repeat(np.arange(len(samples)), [len(s.completion_ids) for s in samples])
    np.savez(job["out"], sample=index, **arrays)
    return {"samples": len(samples), "peak_rss": peak_rss()}


def _that_fit(samples: Sequence[EncodedSample], vocab_size: int) -> list[EncodedSample]:
    room, picked = HELD_BYTES // (4 * vocab_size), []
    for s in samples:
        room -= len(s.completion_ids)
        if room < 0:
            break
        picked.append(s)
    if not picked:
        raise UserError(f"the first sample's {len(samples[0].completion_ids)} completion tokens are more than fit")
    return picked


def _torch_logits(model, samples: Sequence[EncodedSample], vocab_size: int) -> np.ndarray:
    """Logits that predict the completion tokens, float32 ``(T, V)``, one sample at a time."""
    import torch

    logits, at = np.empty((sum(len(s.completion_ids) for s in samples), vocab_size), np.float32), 0
    with torch.no_grad():
        for s in samples:
            first, n = len(s.prompt_ids) - 1, len(s.completion_ids)
            logits[at : at + n] = model(torch.tensor([s.ids[:-1]])).logits[0, first:].float().numpy()
            at += n
    return logits


def _engine_logits(engine: Engine, samples: Sequence[EncodedSample], vocab_size: int) -> np.ndarray:
    if engine.vocab_size != vocab_size:
        raise UserError(f"its vocabulary has {engine.vocab_size} tokens, the model's output {vocab_size}",
                        where=str(engine.path), hint="The file was made from another base.")
    logits, at = np.empty((sum(len(s.completion_ids) for s in samples), vocab_size), np.float32), 0
    for rows, block in engine.logit_blocks(samples):
        logits[at : at + len(rows)] = block
        at += len(rows)
    return logits


if __name__ == "__main__":
    serve_tasks({"attribute": _attribute})
