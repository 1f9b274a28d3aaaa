"""A point that several processes train is the point that one trains; a process that fails ends the fit with a sentence."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tsugiki.adapt import launch as module
from tsugiki.adapt.fit import FitSettings, OutOfMemory, share_of_batch
from tsugiki.adapt.launch import fit_in_processes, settled
from tsugiki.adapt.point import PointJob, train_point
from tsugiki.adapt.processes import WholeBatches, is_first_process
from tsugiki.adapt.sweep import SweepSettings, run_sweep
from tsugiki.artifacts import read_json
from tsugiki.errors import UserError
from tsugiki.recipes.pretrain import TINY_BASES, build_model
from tsugiki.samples import EncodedSample, write_encoded

TINY_LLAMA = Path(__file__).resolve().parents[1] / "recipes" / "bases" / "tiny-llama"
# 11 samples in batches of 4: the last batch of an epoch is not full, and two processes cannot share it evenly.
FIT = FitSettings(rank=4, alpha=8, learning_rate=1e-2, epochs=5, batch_size=4, micro_batch=4, report_to="none")


def samples(count, name="train"):
    rng = np.random.default_rng(len(name))
    return [
        EncodedSample(f"{name}{i}", "問", "答え", f"{name}{i}", "", rng.integers(0, 6000, 20 - i % 7).tolist(), rng.integers(0, 6000, 1 + i).tolist())
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    tokenizer = AutoTokenizer.from_pretrained(TINY_LLAMA)
    model = build_model(replace(TINY_BASES["tiny-llama"], layers=2, hidden=32, ffn=48, heads=4, kv_heads=2, vocab_size=len(tokenizer)), tokenizer)
    torch.manual_seed(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if "norm" in name else 0.0, 0.2)
    folder = tmp_path_factory.mktemp("bases") / "my-base"
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_encoded(folder / "train.jsonl", samples(11))
    write_encoded(folder / "test.jsonl", samples(6, "test"))
    return folder


def job(base, data, out, **changes):
    return PointJob(11, 0, base, data, out, replace(FIT, **changes), 0, 11, "key")


@pytest.fixture(scope="module")
def alone(base, data, tmp_path_factory):
    point = job(base, data, tmp_path_factory.mktemp("alone"))
    train_point(point, threads=1)
    return point.folder


def children():
    return {p.pid for p in multiprocessing.active_children()}


# --- the same point -------------------------------------------------------------------------------------------


def assert_same_point(folder, alone):
    found, expected = read_json(folder / "point.json"), read_json(alone / "point.json")
    assert len(expected["losses"]) == 3 and expected["losses"][-1] < expected["losses"][0] - 0.5
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-3)
    for name in ("steps", "train_tokens", "epochs"):
        assert found["point"][name] == expected["point"][name]
    assert found["point"]["nll"] == pytest.approx(expected["point"]["nll"], rel=1e-3)
    assert found["point"]["train_nll"] == pytest.approx(expected["point"]["train_nll"], rel=1e-3)
    saved, wanted = (load_file(f / "adapter" / "adapter_model.safetensors") for f in (folder, alone))
    assert saved.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert saved[name].shape == tensor.shape and saved[name].dtype == tensor.dtype
        torch.testing.assert_close(saved[name], tensor, atol=5e-3, rtol=0)


def test_a_sweep_whose_points_two_processes_train_is_that_of_one(base, data, alone, tmp_path):
    """The real entry: sweep, point, processes."""
    settings = SweepSettings(counts=(11,), workers=1, train_items=11, test_items=0, fit=replace(FIT, processes=2))
    result = run_sweep(base, data, tmp_path, settings)
    assert [p["n"] for p in result["points"]] == [11]
    assert_same_point(tmp_path / "points" / "n000011-s0", alone)


def test_a_divided_base_trains_the_same_adapter_and_saves_it_whole(base, data, alone, tmp_path):
    """FSDP through gloo, with checkpointed activations: two processes hold a half of every matrix each."""
    point = job(base, data, tmp_path, processes=2, fsdp=True, checkpointing=True)
    train_point(point, threads=2)
    assert_same_point(point.folder, alone)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), point.folder / "adapter")  # by anyone
    assert {n for n, _ in plain.named_parameters() if "lora_B" in n and not torch.count_nonzero(_)} == set()


def test_processes_draw_the_order_of_one_and_fill_up_with_nothing():
    """Against the sampler that accelerate gives one process, epoch for epoch."""
    from accelerate.data_loader import SeedableRandomSampler

    ours, theirs = WholeBatches(11, 12, 7), SeedableRandomSampler(range(11), data_seed=7)
    drawn = []
    for epoch in range(3):
        ours.set_epoch(epoch)
        theirs.set_epoch(epoch)
        drawn.append(list(ours))
        assert drawn[-1] == [*theirs, 11] and len(drawn[-1]) == len(ours)
    assert drawn[0] != drawn[1] != drawn[2]


# --- what ends a fit ------------------------------------------------------------------------------------------


def test_a_process_that_is_killed_ends_the_fit_with_its_number(base, tmp_path):
    others = children()

    def kill():
        while len(found := children() - others) < 2:
            time.sleep(0.05)
        time.sleep(0.5)
        os.kill(max(found), signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    with pytest.raises(UserError, match=r"process [12] of 2 of the fit was killed \(SIGKILL\)") as caught:
        fit_in_processes(base, samples(11), replace(FIT, processes=2), tmp_path / "work", tmp_path / "adapter", seed=0, threads=2)
    assert "memory" in caught.value.hint
    assert children() == others and not (tmp_path / "adapter").exists()


def test_a_loss_that_is_not_finite_is_one_sentence_whoever_finds_it(base, tmp_path):
    others, broken = children(), tmp_path / "broken"
    broken.mkdir()
    for file in base.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = float("inf")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"loss is (nan|inf)") as caught:
        fit_in_processes(broken, samples(11), replace(FIT, processes=2), tmp_path / "work", tmp_path / "adapter", seed=0, threads=2)
    assert "learning_rate" in caught.value.hint and children() == others


def test_memory_that_runs_out_in_a_process_begins_again_with_half_a_pass(base, tmp_path, monkeypatch, capsys):
    """The processes' own running is tested above; here it always runs out of memory."""
    tried = []

    def starved(arguments, processes, threads):
        tried.append(arguments[2].micro_batch)
        raise OutOfMemory("out of memory")

    monkeypatch.setattr(module, "_run", starved)
    with pytest.raises(OutOfMemory):
        fit_in_processes(base, samples(11), replace(FIT, batch_size=24, micro_batch=12, processes=2), tmp_path, tmp_path, seed=0, threads=2)
    assert tried == [12, 6, 3, 1]
    assert "out of memory: beginning again with 6 samples a pass, 24 a step as before" in capsys.readouterr().err


def test_the_processes_meet_where_no_other_machine_can_reach():
    def listening():
        return {c.laddr for c in psutil.Process().net_connections() if c.status == psutil.CONN_LISTEN}

    before = listening()
    store = module.meeting_point()
    assert {tuple(a) for a in listening() - before} == {("127.0.0.1", store.port)}


# --- how many processes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "micro", "processes", "expected"), [(32, 32, 2, 16), (32, 8, 2, 8), (12, 4, 2, 3), (6, 6, 3, 2), (8, 8, 1, 8)])
def test_a_pass_is_a_divisor_of_a_processs_share(batch, micro, processes, expected):
    settings = FitSettings(batch_size=batch, micro_batch=micro)
    assert share_of_batch(settings, processes) == expected


def test_settings_of_processes_that_cannot_be_are_refused():
    with pytest.raises(UserError, match=r"processes must be a divisor of batch_size \(4\), or 0, not 3"):
        replace(FIT, processes=3)
    with pytest.raises(UserError, match="fsdp must be left out where one process trains"):
        replace(FIT, processes=1, fsdp=True)
    with pytest.raises(UserError, match="3 processes cannot share a batch of 4 samples"):
        share_of_batch(FIT, 3)
    with pytest.raises(UserError, match="fsdp divides a base among several processes, and there is one"):
        settled(replace(FIT, fsdp=True))


def test_the_first_process_of_a_launcher_works_for_all(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "TSUGIKI_PROCESSES", "TSUGIKI_FSDP"):  # set and put back
        monkeypatch.setenv(name, "0")
    launched = {"WORLD_SIZE": "2", "MASTER_PORT": "29500", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "LOCAL_RANK": "0"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    assert is_first_process()
    assert not set(launched) & set(os.environ) and "RANK" not in os.environ
    found = settled(FIT)
    assert (found.processes, found.fsdp) == (2, True)
    assert settled(replace(FIT, processes=4, fsdp=False)) == replace(FIT, processes=4, fsdp=False)
    monkeypatch.setenv("RANK", "1")
    assert not is_first_process()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")  # a launcher of one process: nothing else may wait for it either
    assert is_first_process() and settled(FIT).processes == 1 and not {"RANK", "WORLD_SIZE"} & set(os.environ)


def test_a_launcher_runs_a_command_once():
    command = Path(sys.executable).with_name("torchrun")
    done = subprocess.run(
        [command, "--nproc-per-node", "2", Path(sys.executable).with_name("tsugiki"), "--version"], capture_output=True, text=True, timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 1
