"""The repaired file is no larger than stock's, closer to F16 on samples it has not seen, and otherwise it is stock's."""

import itertools
import json
import os
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tsugiki.errors import UserError
from tsugiki.quantize import repair as module
from tsugiki.quantize.imatrix import make_imatrix
from tsugiki.quantize.levels import make_level
from tsugiki.quantize.repair import RepairSettings, better, choose, compare, parse_budget, repair, smallest
from tsugiki.quantize.sensitivity import measure
from tsugiki.samples import EncodedSample, read_encoded, write_encoded

SMALL = RepairSettings(tokens=500, held_tokens=600, n_threads=1, types=("Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0"))


def write_model(path, width=256, ffn=512, vocab=512, layers=3):
    """A llama of random weights whose matrices differ in how much they matter, F16."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    for add, value in ((writer.add_context_length, 256), (writer.add_embedding_length, width), (writer.add_block_count, layers),
                       (writer.add_feed_forward_length, ffn), (writer.add_head_count, 4), (writer.add_head_count_kv, 4),
                       (writer.add_layer_norm_rms_eps, 1e-5)):
        add(value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list([f"t{i}" for i in range(vocab)])
    writer.add_token_types([gguf.TokenType.NORMAL] * vocab)
    writer.add_token_merges(["t 0"])
    shapes = {"token_embd": (vocab, width), "output": (vocab, width)}
    for i in range(layers):
        shapes |= {f"blk.{i}.attn_{n}": (width, width) for n in ("q", "k", "v", "output")}
        shapes |= {f"blk.{i}.ffn_{n}": (ffn, width) for n in ("gate", "up")} | {f"blk.{i}.ffn_down": (width, ffn)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", (rng.normal(0, 0.06, shape) * rng.gamma(1, 1, shape[1])).astype(np.float16))
    for name in ["output_norm", *(f"blk.{i}.{n}_norm" for i in range(layers) for n in ("attn", "ffn"))]:
        writer.add_tensor(f"{name}.weight", np.ones(width, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def samples(count, seed):
    rng = np.random.default_rng(seed)
    return [EncodedSample(f"{seed}-{i}", "", "", f"d{i}", prompt_ids=rng.integers(0, 512, 6).tolist(), completion_ids=rng.integers(0, 512, 10).tolist())
            for i in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An F16 file, an importance matrix, calibration and held-out samples."""
    out = tmp_path_factory.mktemp("repair")
    write_model(out / "f16.gguf")
    write_encoded(out / "calib.jsonl", samples(60, 1))
    write_encoded(out / "held.jsonl", samples(80, 2))
    make_imatrix(out / "f16.gguf", out / "im.gguf", domain=out / "calib.jsonl", tokens=2000, output=True, n_threads=1)
    return out


@pytest.fixture(scope="module")
def repaired(folder):
    return repair(folder / "f16.gguf", folder / "out" / "repaired.gguf", calib=folder / "calib.jsonl", heldout=folder / "held.jsonl",
                  imatrix=folder / "im.gguf", settings=SMALL)


def test_a_repaired_level_has_no_more_bytes_and_is_closer_to_f16_on_unseen_samples(folder, repaired):
    make_level(folder / "f16.gguf", "Q4_K_M", folder / "stock.gguf", imatrix=folder / "im.gguf")
    assert repaired.kept == "repaired"
    assert Path(repaired.path).stat().st_size == repaired.bytes <= repaired.stock_bytes == (folder / "stock.gguf").stat().st_size
    unseen = read_encoded(folder / "held.jsonl")[::-1]
    found = measure(folder / "f16.gguf", [folder / "stock.gguf", repaired.path], unseen, threads=1)
    stock, own = found["kl"].sum(1) / found["tokens"].sum()
    assert own < 0.8 * stock
    assert repaired.reduction == pytest.approx(1 - repaired.kl / repaired.stock_kl)
    assert repaired.reduction_ci[0] < repaired.reduction < repaired.reduction_ci[1]


def test_the_file_holds_the_types_that_the_result_names(repaired):
    written = {t.name: t.tensor_type.name for t in gguf.GGUFReader(repaired.path).tensors}
    assert {n: written[n] for n in repaired.types} == repaired.types
    assert all(repaired.types[n] == new != old for n, (old, new) in repaired.changed.items())
    assert len(repaired.changed) > 5


def test_the_additive_prediction_is_near_what_is_measured(repaired):
    assert repaired.passes == 1 + 23 + 2  # the reference, each matrix, stock, the choice
    assert repaired.predicted == pytest.approx(repaired.simulated, rel=0.5)
    assert repaired.simulated == pytest.approx(repaired.kl, rel=0.3)


def test_a_second_budget_needs_no_sensitivity_again_and_keeps_to_its_bytes(folder, repaired):
    found = repair(folder / "f16.gguf", folder / "out" / "small.gguf", calib=folder / "calib.jsonl", heldout=folder / "held.jsonl",
                   imatrix=folder / "im.gguf", budget="bpw:4.6", cache=folder / "out" / ".repaired.sensitivity.jsonl", settings=SMALL)
    assert found.passes == 3
    assert found.bpw <= 4.6 and found.bytes < found.stock_bytes
    assert found.kl > repaired.kl


def test_the_smallest_file_within_the_margin_is_smaller_than_stock_and_within_the_margin(folder, repaired):
    found = repair(folder / "f16.gguf", folder / "out" / "least.gguf", calib=folder / "calib.jsonl", heldout=folder / "held.jsonl",
                   imatrix=folder / "im.gguf", budget="smallest", cache=folder / "out" / ".repaired.sensitivity.jsonl",
                   settings=replace(SMALL, margin=0.2, types=("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0")))
    assert found.bytes < found.stock_bytes
    assert found.delta_ci[1] <= 0.2


def test_rows_that_do_not_divide_by_256_get_types_of_smaller_blocks(tmp_path):
    write_model(tmp_path / "f16.gguf", width=160, ffn=288, layers=1)
    for name, seed in (("calib", 1), ("held", 2)):
        write_encoded(tmp_path / f"{name}.jsonl", samples(30, seed))
    found = repair(tmp_path / "f16.gguf", tmp_path / "r.gguf", calib=tmp_path / "calib.jsonl", heldout=tmp_path / "held.jsonl", settings=SMALL)
    written = {t.name: t.tensor_type.name for t in gguf.GGUFReader(found.path).tensors if "norm" not in t.name}
    assert found.kept == "repaired" and found.bytes <= found.stock_bytes and found.kl < found.stock_kl
    assert set(written.values()) <= {"IQ4_NL", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"}


def test_only_the_types_asked_for_are_given(folder, repaired):
    found = repair(folder / "f16.gguf", folder / "out" / "k.gguf", calib=folder / "calib.jsonl", heldout=folder / "held.jsonl", imatrix=folder / "im.gguf",
                   cache=folder / "out" / ".repaired.sensitivity.jsonl", settings=replace(SMALL, types=("Q3_K", "Q4_K", "Q6_K")))
    assert set(found.types.values()) == {"Q3_K", "Q4_K", "Q6_K"} and found.kl < found.stock_kl
    with pytest.raises(UserError, match="types for the repair: Q7_K"):
        RepairSettings(types=("Q4_K", "Q7_K"))


# --- never worse --------------------------------------------------------------------------------------------------


def measured(kl, nll_loss=(0.0, 0.0), documents=12):
    """Held-out numbers of stock and candidates: KL and loss a token, equal in every document."""
    tokens = np.full(documents, 10)
    noise = np.linspace(0.9, 1.1, documents)
    return {"kl": [(10 * k * noise).tolist() for k in kl], "nll": [(10 * (2 + d) * np.ones(documents)).tolist() for d in (0.0, *nll_loss)],
            "tokens": tokens.tolist(), "documents": [str(i) for i in range(documents)]}


def test_stock_is_kept_where_the_candidate_is_no_better():
    for kl, picked in (([0.010, 0.012], 0), ([0.010, 0.010], 0), ([0.010, 0.0099], 1)):
        assert better(measured(kl)) == picked
    numbers = compare(measured([0.010, 0.012], (0.01, 0.02)), 0)
    assert numbers["reduction"] == 0 and numbers["kl"] == numbers["stock_kl"] == pytest.approx(0.010)
    assert numbers["nll"] == pytest.approx(2.01) and numbers["delta_ci"] == pytest.approx((0.01, 0.01))
    numbers = compare(measured([0.010, 0.004], (0.01, 0.02)), 1)
    assert numbers["reduction"] == pytest.approx(0.6) and numbers["reduction_ci"] == pytest.approx((0.6, 0.6))
    assert compare(measured([0.010, 0.004], documents=9), 1)["reduction_ci"] is None


@pytest.mark.parametrize("first", range(8))
def test_the_smallest_is_the_one_of_fewest_bytes_whose_interval_is_within_the_margin(tmp_path, first):
    made, together = [], []

    def make(number, plan):
        made.append(number)
        path = tmp_path / f"{plan['bytes']}.gguf"
        path.write_bytes(b"x")
        return path

    def held(path, alone=False):
        loss = 0.01 if path.stem == "stock" else 0.04 if int(path.stem) >= 10 * first else 0.06
        found = measured([loss], (loss,))
        together.append(not alone)
        return {"nll": found["nll"][1:]} if alone else found

    plans = [{"bytes": 10 * i} for i in range(8)]
    plan, path, found = smallest(plans, tmp_path / "stock.gguf", make, held, 0.05)
    assert plan["bytes"] == 10 * first and path.exists() and len(made) <= 4
    assert sum(together) == 2 and len(together) == 2 + len(made)  # F16 is read for stock and for the file found, not for those tried
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert compare(found, 1)["delta_ci"] == pytest.approx((0.04, 0.04)) and compare(found, 1)["stock_kl"] == pytest.approx(0.01)
    with pytest.raises(UserError, match=r"no file loses less than 0.03 .* loses up to 0.0400"):
        smallest(plans, tmp_path / "stock.gguf", make, held, 0.03)


# --- the integer program ------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 4), st.floats(0, 1))
def test_the_choice_is_the_best_of_all_choices(seed, groups, options, share):
    rng = np.random.default_rng(seed)
    costs = rng.gamma(0.3, 1e-4, (groups, options))
    costs[rng.random(costs.shape) < 0.2] = np.inf
    costs[:, 0] = np.where(np.isfinite(costs[:, 0]), costs[:, 0], 1e-3)
    sizes = 32 * rng.integers(1, 1000, (groups, options))
    exists = np.where(np.isfinite(costs), sizes, np.iinfo(np.int64).max)
    low, high = exists.min(1).sum(), np.where(np.isfinite(costs), sizes, 0).max(1).sum()
    budget = int(low + share * (high - low))
    best = min(
        sum(costs[i, j] for i, j in enumerate(pick))
        for pick in itertools.product(range(options), repeat=groups)
        if sum(sizes[i, j] for i, j in enumerate(pick)) <= budget
    )
    found = choose(costs, sizes, budget)
    assert sum(sizes[i, j] for i, j in enumerate(found)) <= budget
    assert sum(costs[i, j] for i, j in enumerate(found)) <= best * (1 + 1e-5) + 1e-12


def test_a_budget_below_the_smallest_types_is_refused():
    with pytest.raises(UserError, match="the smallest types need"):
        choose(np.ones((2, 2)), np.array([[32, 64], [32, 64]]), 60)


@pytest.mark.parametrize(("text", "expected"), [("same", ("same", 0)), ("+10", ("mb", 10)), ("-2.5", ("mb", -2.5)), ("bpw:4.5", ("bpw", 4.5)),
                                                ("smallest", ("smallest", 0))])
def test_budgets_are_read(text, expected):
    assert parse_budget(text) == expected


@pytest.mark.parametrize("text", ["", "10", "bpw:", "bpw:0.2", "bpw:nan", "+x", "+inf", "smaller"])
def test_other_budgets_are_refused(text):
    with pytest.raises(UserError, match="is not understood"):
        parse_budget(text)


# --- bad input and interruption -----------------------------------------------------------------------------------


def test_samples_that_the_choice_has_seen_are_refused(folder, repaired):
    with pytest.raises(UserError, match="the same file"):
        repair(folder / "f16.gguf", folder / "x" / "a.gguf", calib=folder / "calib.jsonl", heldout=folder / "calib.jsonl")
    rows = (folder / "held.jsonl").read_text(encoding="utf-8") + (folder / "calib.jsonl").read_text(encoding="utf-8")
    (folder / "mixed.jsonl").write_text(rows, encoding="utf-8")
    with pytest.raises(UserError, match="held-out samples are calibration samples too"):
        repair(folder / "f16.gguf", folder / "x" / "a.gguf", calib=folder / "calib.jsonl", heldout=folder / "mixed.jsonl",
               imatrix=folder / "im.gguf", cache=folder / "out" / ".repaired.sensitivity.jsonl",
               settings=replace(SMALL, held_tokens=100_000))
    assert [p.name for p in (folder / "x").iterdir()] == []


COMMANDS = {
    "levels": ("levels", "f16.gguf", "--levels", "Q4_K_M", "--out", "full"),
    "imatrix": ("imatrix", "f16.gguf", "--domain-data", "calib.jsonl", "--tokens", "400", "--out", "full/im.gguf"),
    "sensitivity": ("sensitivity", "f16.gguf", "--samples", "calib.jsonl", "--tokens", "100", "--out", "full"),
    "repair": ("repair", "f16.gguf", "--calib", "calib.jsonl", "--heldout", "held.jsonl", "--imatrix", "im.gguf", "--out", "full/r.gguf",
               "--tokens", "100", "--held-tokens", "100", "--types", "Q4_K,Q6_K"),
}


@pytest.mark.parametrize(("command", "limit"), [("levels", 0), ("levels", 600_000), ("imatrix", 1000), ("imatrix", 20_000), ("sensitivity", 1500),
                                                ("repair", 1500), ("repair", 600_000)])
def test_a_full_disk_is_a_sentence_with_exit_2_and_leaves_nothing_half_written(folder, command, limit):
    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = subprocess.run(
        [Path(sys.executable).with_name("tsugiki"), "quantize", *COMMANDS[command], "--threads", "1"], cwd=folder, capture_output=True, text=True, preexec_fn=full,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "200"},
    )
    assert done.returncode == 2, done.stderr
    assert "error:" in done.stderr and "Free some space" in done.stderr and "Traceback" not in done.stderr
    # finished measurements may stay: another run goes on with them
    assert {p.name for p in (folder / "full").iterdir()} <= {".sensitivity.jsonl", ".r.sensitivity.jsonl"}


def test_an_interruption_leaves_nothing_but_finished_measurements(folder, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "run_child", interrupted)
    with pytest.raises(KeyboardInterrupt):
        repair(folder / "f16.gguf", folder / "i" / "a.gguf", calib=folder / "calib.jsonl", heldout=folder / "held.jsonl", settings=SMALL)
    assert list((folder / "i").iterdir()) == []


def test_the_command_prints_both_files_and_writes_the_result(folder, repaired):
    done = subprocess.run(
        [Path(sys.executable).with_name("tsugiki"), "quantize", "repair", "f16.gguf", "--calib", "calib.jsonl", "--heldout", "held.jsonl", "--imatrix",
         "im.gguf", "--out", "out/repaired.gguf", "--tokens", "500", "--held-tokens", "600", "--threads", "1", "--types", ",".join(SMALL.types), "--json", "r.json"],
        cwd=folder, capture_output=True, text=True, check=True,
    )
    found = json.loads((folder / "r.json").read_text())
    assert found["types"] == repaired.types and found["kl"] == repaired.kl
    assert "stock" in done.stdout and "repaired" in done.stdout and "% less" in done.stdout
