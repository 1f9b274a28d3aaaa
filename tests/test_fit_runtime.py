"""A fit that runs out of memory, is killed, diverges, gets bad samples, or runs in several processes."""

import functools
import json
import math
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from tsugiki.adapt import fit as module
from tsugiki.adapt.fit import FitSettings, Probe, fit, last_checkpoint, load_base, log_targets
from tsugiki.adapt.loss import batch_loss
from tsugiki.adapt.nll import completion_nll
from tsugiki.errors import UserError
from tsugiki.recipes.pretrain import TINY_BASES, build_model
from tsugiki.samples import EncodedSample, write_encoded

TINY_LLAMA = Path(__file__).resolve().parents[1] / "recipes" / "bases" / "tiny-llama"
SMALL = FitSettings(rank=4, alpha=8, batch_size=8, micro_batch=8, epochs=5)
BATCHES = replace(SMALL, batch_size=4, micro_batch=4, epochs=6)  # twelve steps


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY_LLAMA)


@pytest.fixture(scope="module")
def base(tokenizer, tmp_path_factory):
    model = build_model(replace(TINY_BASES["tiny-llama"], layers=1, hidden=32, ffn=48, heads=4, kv_heads=2, vocab_size=len(tokenizer)), tokenizer)
    torch.manual_seed(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if "norm" in name else 0.0, 0.2)
    folder = tmp_path_factory.mktemp("tiny-llama")
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def in_float32(monkeypatch):
    monkeypatch.setattr(module, "load_base", functools.partial(load_base, exact=True))


def samples(count=8):
    rng = np.random.default_rng(0)
    return [
        EncodedSample(f"s{i}", "問", "答え", "d", "", rng.integers(0, 6000, 20 - i).tolist(), rng.integers(0, 6000, 1 + i).tolist())
        for i in range(count)
    ]


def adapter_parameters(model):
    return {n: p.detach() for n, p in model.named_parameters() if "lora_" in n}


# --- memory, kills, losses that are not finite ----------------------------------------------------------------


@pytest.mark.parametrize("fails_at", [1, 4])
def test_out_of_memory_goes_on_in_smaller_passes_to_the_same_losses(base, tokenizer, tmp_path, in_float32, monkeypatch, capsys, fails_at):
    """Two passes a step; memory runs out in the first of all, or in the second of a step, after its gradients were made."""
    halves = replace(BATCHES, micro_batch=2)
    whole, expected = fit(base, tokenizer, samples(), halves, tmp_path / "a")
    calls = []

    def starved(model, ids, *rest, **options):
        calls.append(len(ids))
        loss = batch_loss(model, ids, *rest, **options)
        if len(calls) == fails_at:
            loss.backward()  # gradients of the failed pass are there already, and must not count
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss

    monkeypatch.setattr(module, "batch_loss", starved)
    split, report = fit(base, tokenizer, samples(), halves, tmp_path / "b")
    assert set(calls[:fails_at]) == {2} and set(calls[fails_at:]) == {1}
    assert report.micro_batch == 1 and expected.micro_batch == 2
    assert report.losses == pytest.approx(expected.losses, abs=1e-5)
    assert report.steps == expected.steps
    for name, p in adapter_parameters(split).items():
        torch.testing.assert_close(p, adapter_parameters(whole)[name], atol=1e-3, rtol=0)
    assert "out of memory: going on with 1 samples a pass, 4 a step as before" in capsys.readouterr().err


def test_out_of_memory_with_one_sample_is_refused_with_what_to_do(base, tokenizer, tmp_path, monkeypatch):
    def starved(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(module, "batch_loss", starved)
    with pytest.raises(UserError, match=r"out of memory with 1 sample\(s\) a forward pass") as caught:
        fit(base, tokenizer, samples(), BATCHES, tmp_path)
    assert "tsugiki adapt plan" in caught.value.hint


class KilledAt:
    """A progress file that ends the fit at a step, as a signal would."""

    def __init__(self, step):
        self.step = step

    def write_text(self, text, encoding):
        if json.loads(text)["step"] >= self.step:
            raise KeyboardInterrupt


# --- the probe ------------------------------------------------------------------------------------------------


def test_a_probe_reads_the_nll_at_equal_steps_and_may_end_the_fit(base, tokenizer, tmp_path):
    held_out = samples()[:3]
    whole, full = fit(base, tokenizer, samples(), replace(BATCHES, epochs=8), tmp_path / "a",
                      probe=Probe(held_out, 4, lambda step, steps, nll: True))
    assert [step for step, _ in full.readings] == [4, 8, 12, 16] and not full.stopped
    assert full.readings[-1][1] == pytest.approx(completion_nll(whole, held_out).per_token, rel=1e-6)
    _, part = fit(base, tokenizer, samples(), replace(BATCHES, epochs=8), tmp_path / "b",
                  probe=Probe(held_out, 4, lambda step, steps, nll: step < 8))
    assert part.readings == full.readings[:2] and part.stopped
    assert (part.steps, part.train_tokens) == (8, full.train_tokens // 2)


def test_measuring_on_the_way_changes_nothing(base, tokenizer, tmp_path):
    plain, _ = fit(base, tokenizer, samples(), replace(BATCHES, dropout=0.1, epochs=8), tmp_path / "a")
    probed, _ = fit(base, tokenizer, samples(), replace(BATCHES, dropout=0.1, epochs=8), tmp_path / "b",
                    probe=Probe(samples()[:3], 4, lambda *_: True))
    for name, p in adapter_parameters(plain).items():
        assert torch.equal(p, adapter_parameters(probed)[name]), name


def test_a_killed_fit_goes_on_from_its_checkpoint_to_the_same_losses(base, tokenizer, tmp_path):
    often = replace(BATCHES, checkpoint_minutes=1e-9, dropout=0.1, epochs=8)  # sixteen steps; the fifth is within an epoch
    whole, expected = fit(base, tokenizer, samples(), replace(often, checkpoint_minutes=0), tmp_path / "a")
    assert last_checkpoint(tmp_path / "a") is None
    with pytest.raises(KeyboardInterrupt):
        fit(base, tokenizer, samples(), often, tmp_path / "b", progress_file=KilledAt(10))
    assert last_checkpoint(tmp_path / "b") == str(tmp_path / "b" / "checkpoint-5")
    seen = tmp_path / "progress.json"
    resumed, report = fit(base, tokenizer, samples(), often, tmp_path / "b", progress_file=seen)
    assert len(report.losses) == 3 and report.losses == pytest.approx(expected.losses, abs=1e-6)
    assert (report.steps, report.train_tokens) == (expected.steps, expected.train_tokens)
    assert (report.resumed_at, expected.resumed_at) == (5, 0)
    for name, p in adapter_parameters(resumed).items():
        assert torch.equal(p, adapter_parameters(whole)[name]), name


def test_a_checkpoint_that_was_not_finished_is_not_taken(tmp_path):
    (tmp_path / "checkpoint-5").mkdir()
    assert last_checkpoint(tmp_path) is None
    (tmp_path / "last.json").write_text('{"checkpoint": "checkpoint-10"}')
    assert last_checkpoint(tmp_path) is None
    (tmp_path / "last.json").write_text('{"checkpoint": "checkpoint-5"}')
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-5")


def test_weights_that_are_not_finite_are_no_checkpoint(base, tokenizer, tmp_path, monkeypatch):
    """The loss of step 5 is finite, the update after it is not: the state of step 5 would go on to nothing."""
    def broken(model, *rest, **options):
        loss = batch_loss(model, *rest, **options)
        calls.append(1)
        return loss * (math.inf if len(calls) == 7 else 1)

    calls = []
    monkeypatch.setattr(module, "batch_loss", broken)
    with pytest.raises(UserError, match=r"the loss is (nan|inf) at step 10"):
        fit(base, tokenizer, samples(), replace(BATCHES, checkpoint_minutes=1e-9), tmp_path)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-5")


def test_samples_that_cannot_be_learnt_from_are_refused_before_training_all_at_once(tokenizer, tmp_path):
    good = samples(4)
    end = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    wrong = [
        replace(good[0], id="masked", completion_ids=[]),
        replace(good[1], id="empty", completion=" ", completion_ids=[end]),
        replace(good[2], id="bare", prompt_ids=[]),
        replace(good[3], id="long", prompt_ids=[5] * 5000),
    ]
    with pytest.raises(UserError) as caught:
        fit(TINY_LLAMA, tokenizer, [*good, *wrong], SMALL, tmp_path / "work")
    said = str(caught.value)
    assert "training samples: 4 problem(s)" in said
    assert "sample masked has no completion token: every token is masked" in said
    assert "sample empty has an empty answer: after templating only its end-of-turn token is left" in said
    assert "sample bare has no prompt token" in said
    assert "sample long has 5,004 tokens, the base's context is" in said
    assert not (tmp_path / "work").exists()


# --- kinds of LoRA, memory, steps, logs -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", [{"rslora": True}, {"dora": True}])
def test_rslora_and_dora_train_and_are_saved_as_such(base, tokenizer, tmp_path, kind):
    plain, _ = fit(base, tokenizer, samples(), SMALL, tmp_path / "a")
    other, report = fit(base, tokenizer, samples(), replace(SMALL, **kind), tmp_path / "b")
    config = other.peft_config["default"]
    assert (config.use_rslora, config.use_dora) == (kind.get("rslora", False), kind.get("dora", False))
    if "rslora" in kind:
        assert {m.scaling["default"] for m in other.modules() if hasattr(m, "lora_A")} == {8 / math.sqrt(4)}
    assert completion_nll(other, samples()).per_token != completion_nll(plain, samples()).per_token
    assert all(map(math.isfinite, report.losses))


def test_checkpointed_activations_change_no_number(base, tokenizer, tmp_path):
    _, kept = fit(base, tokenizer, samples(), SMALL, tmp_path / "a")
    _, again = fit(base, tokenizer, samples(), replace(SMALL, checkpointing=True), tmp_path / "b")
    assert again.losses == pytest.approx(kept.losses, abs=1e-6)


def test_a_number_of_steps_stands_in_for_the_epochs(base, tokenizer, tmp_path):
    _, report = fit(base, tokenizer, samples(), replace(BATCHES, max_steps=7), tmp_path)
    assert report.steps == 7
    assert report.train_tokens == round(8 * 21 * 7 / 2)


def test_curves_go_to_tensorboard_where_it_is_installed(monkeypatch):
    found = {"tensorboard"}
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: name in found or None)
    assert log_targets("auto") == ["tensorboard"] == log_targets("tensorboard")
    found.clear()
    assert log_targets("auto") == [] == log_targets("none")
    assert log_targets("wandb, mlflow") == ["wandb", "mlflow"]
    with pytest.raises(UserError, match="tensorboard, which is not installed"):
        log_targets("tensorboard")


# --- several processes ----------------------------------------------------------------------------------------


PROCESS = """
import functools, json, sys
from pathlib import Path
from transformers import AutoTokenizer
from tsugiki.adapt import fit as module
from tsugiki.samples import read_encoded
module.load_base = functools.partial(module.load_base, exact=True)
base, data, work, tokenizer = map(Path, sys.argv[1:])
settings = module.FitSettings(rank=4, alpha=8, batch_size=4, micro_batch=2, epochs=5)
model, report = module.fit(base, AutoTokenizer.from_pretrained(tokenizer), read_encoded(data), settings, work)
first = next(p for n, p in model.named_parameters() if "lora_B" in n).detach().flatten()[:8].tolist()
print(json.dumps({"losses": report.losses, "steps": report.steps, "first": first}))
"""


def test_two_processes_train_the_same_as_one(base, tokenizer, tmp_path, in_float32):
    """gloo on the CPU: the gradients synchronise, so both hold one adapter, and the losses are those of one process."""
    write_encoded(tmp_path / "data.jsonl", samples())
    (tmp_path / "run.py").write_text(PROCESS)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def start(rank):
        shared = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1",
                  "MASTER_PORT": port, "OMP_NUM_THREADS": 1, "CUDA_VISIBLE_DEVICES": ""}
        arguments = [base, tmp_path / "data.jsonl", tmp_path / "work", TINY_LLAMA]
        return subprocess.Popen(
            [sys.executable, "-P", str(tmp_path / "run.py"), *map(str, arguments)], cwd=tmp_path, stdout=subprocess.PIPE, text=True,
            env={**os.environ, **{k: str(v) for k, v in shared.items()}},
        )

    running = [start(0), start(1)]
    try:
        both = [json.loads(p.communicate(timeout=300)[0].splitlines()[-1]) for p in running]
    finally:
        for p in running:
            p.kill()
    one = FitSettings(rank=4, alpha=8, batch_size=4, micro_batch=2, epochs=5)
    model, alone = fit(base, tokenizer, samples(), one, tmp_path / "alone")
    first = next(p for n, p in model.named_parameters() if "lora_B" in n).detach().flatten()[:8].tolist()
    assert alone.steps == both[0]["steps"] == 10
    assert both[0]["first"] == both[1]["first"]
    assert both[0]["losses"] == pytest.approx(alone.losses, abs=1e-4)
    assert both[0]["first"] == pytest.approx(first, abs=1e-4)


def test_a_batch_that_processes_cannot_share_is_refused(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="3 processes cannot share a batch of 8 samples"):
        fit(TINY_LLAMA, tokenizer, samples(), SMALL, tmp_path)
