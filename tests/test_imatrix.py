"""The importance matrix is the sum of squared inputs of every matrix, and llama.cpp's tools read it."""

import json
import os
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from tsugiki.errors import UserError
from tsugiki.quantize import imatrix
from tsugiki.quantize.imatrix import Imatrix, make_imatrix, read_imatrix, write_imatrix

BASES = Path(__file__).parent.parent / "recipes" / "bases"
TEXT = "ポンプの軸受は、運転時間が二千時間を超える前に給油します。圧力が下がったときは、まず弁の開度を確かめてください。\n" * 30


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from tsugiki.quantize.convert import convert

    out = tmp_path_factory.mktemp("imatrix") / "tiny.gguf"
    convert(BASES / "tiny-llama", out, dtype="f32")
    return out


def chunks(count=6, length=40):
    rng = np.random.default_rng(0)
    return [[6138, *rng.integers(10, 6000, length + 3 * i).tolist()] for i in range(count)]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return path


GGUF = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "gate_proj": "ffn_gate", "up_proj": "ffn_up",
        "down_proj": "ffn_down"}


def hooked_sums(folder, rows):
    """Squared inputs of every linear layer in transformers, float64 sums over all tokens."""
    from transformers import AutoModelForCausalLM

    net = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    sums = {}

    def hook(name):
        def add(module, args):
            x = args[0].detach().double().reshape(-1, args[0].shape[-1])
            sums[name] = sums.get(name, 0) + (x**2).sum(0)
        return add

    for name, module in net.named_modules():
        if isinstance(module, torch.nn.Linear):
            parts = name.split(".")
            target = "output" if name == "lm_head" else f"blk.{parts[2]}.{GGUF[parts[-1]]}"
            module.register_forward_pre_hook(hook(f"{target}.weight"))
    with torch.no_grad():
        for ids in rows:
            net(torch.tensor([ids]))
    return {n: s.numpy() for n, s in sums.items()}


def test_sums_equal_those_of_transformers_forward_hooks(model, tmp_path):
    rows = chunks()
    data = write_rows(tmp_path / "ids.jsonl", [{"ids": r} for r in rows])
    found = make_imatrix(model, tmp_path / "im.gguf", domain=data, tokens=10_000, output=True)
    expected = hooked_sums(BASES / "tiny-llama", rows)
    assert set(found.sums) == set(expected)
    for name, sums in expected.items():
        assert found.counts[name].tolist() == [sum(map(len, rows))]
        # llama.cpp multiplies float32 matrices in another order than torch
        assert np.abs(found.sums[name][0] - sums).sum() <= 1e-3 * np.abs(sums).sum(), name


def test_without_the_output_matrix_the_names_are_llama_imatrix_own(model, tmp_path):
    data = write_rows(tmp_path / "ids.jsonl", [{"ids": r} for r in chunks(2)])
    found = make_imatrix(model, tmp_path / "im.gguf", domain=data, tokens=10_000, output=False)
    assert len(found.sums) == 28 and all(n.startswith("blk.") for n in found.sums)


def moe(folder):
    """A Qwen3-MoE of random weights with the tokenizer of a bundled base."""
    from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    AutoTokenizer.from_pretrained(BASES / "tiny-qwen").save_pretrained(folder)
    net = Qwen3MoeForCausalLM(Qwen3MoeConfig(
        vocab_size=json.loads((BASES / "tiny-qwen" / "config.json").read_text())["vocab_size"], hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_experts=6, num_experts_per_tok=2, decoder_sparse_step=1, max_position_embeddings=256,
        norm_topk_prob=True, tie_word_embeddings=False,
    ))
    net.save_pretrained(folder)
    return net.eval()


def test_each_expert_has_sums_and_a_count_of_its_own(tmp_path):
    from tsugiki.quantize.convert import convert

    net = moe(tmp_path / "moe")
    convert(tmp_path / "moe", tmp_path / "moe.gguf", dtype="f32")
    rows = [r[1:] for r in chunks(4, 30)]
    sums, counts, seen = {}, {}, []

    def hook(layer):
        def add(module, args):
            x, picked = args[0].double(), args[1]
            for expert in range(6):
                tokens = (picked == expert).any(-1)
                gate, up = (x[tokens] @ module.gate_up_proj[expert].double().T).chunk(2, -1)
                inner = torch.nn.functional.silu(gate) * up
                seen.append(int(tokens.sum()))
                for kind, value in (("gate", x[tokens]), ("up", x[tokens]), ("down", inner)):
                    key = (f"blk.{layer}.ffn_{kind}_exps.weight", expert)
                    sums[key] = sums.get(key, 0) + (value**2).sum(0)
                    counts[key] = counts.get(key, 0) + int(tokens.sum())
        return add

    for i, layer in enumerate(net.model.layers):
        layer.mlp.experts.register_forward_pre_hook(hook(i))
    with torch.no_grad():
        for ids in rows:
            net(torch.tensor([ids]))
    found = make_imatrix(tmp_path / "moe.gguf", tmp_path / "im.gguf", domain=write_rows(tmp_path / "r.jsonl", [{"ids": r} for r in rows]), tokens=10_000)
    assert sum(seen) == 2 * 2 * sum(map(len, rows))
    for (name, expert), expected in sums.items():
        assert found.counts[name][expert] == counts[name, expert], name
        assert np.abs(found.sums[name][expert] - expected.numpy()).sum() <= 1e-3 * float(expected.sum()) + 1e-12, name


def upstream(name):
    tool = Path(os.environ.get("TSUGIKI_UPSTREAM", "")) / name
    if not tool.is_file():
        pytest.skip(f"TSUGIKI_UPSTREAM does not name a folder with {name}")
    return tool


def test_the_matrix_equals_llama_imatrix_on_the_same_text(model, tmp_path):
    tool = upstream("llama-imatrix")
    (tmp_path / "t.txt").write_bytes(TEXT.replace("。\n", "。\r\n").encode())
    found = make_imatrix(model, tmp_path / "im.gguf", general=[tmp_path / "t.txt"], tokens=512, chunk=128, output=True)
    subprocess.run([tool, "-m", model, "-f", "t.txt", "-o", "up.gguf", "-c", "128", "--chunks", "4", "-t", "1", "--process-output", "--no-ppl"],
                   cwd=tmp_path, check=True, capture_output=True)
    theirs = read_imatrix(tmp_path / "up.gguf")
    assert set(found.sums) == set(theirs.sums)
    assert (found.chunks, found.chunk_size, found.datasets) == (theirs.chunks, theirs.chunk_size, theirs.datasets)
    for name, sums in theirs.sums.items():
        assert np.array_equal(found.counts[name], theirs.counts[name])
        assert np.abs(found.sums[name] - sums).sum() <= 1e-3 * sums.sum(), name


def test_llama_imatrix_reads_ours_and_writes_the_older_form_that_we_read(model, tmp_path):
    tool = upstream("llama-imatrix")
    ours = made_up()
    write_imatrix(tmp_path / "im.gguf", ours)
    subprocess.run([tool, "-m", model, "--in-file", "im.gguf", "-o", "old.dat", "--output-format", "dat", "-c", "512"], cwd=tmp_path, check=True,
                   capture_output=True)
    old = read_imatrix(tmp_path / "old.dat")
    assert old.datasets == ours.datasets[-1:]
    for name, mean in ours.means().items():
        np.testing.assert_allclose(old.means()[name], mean, rtol=1e-5)


def made_up():
    rng = np.random.default_rng(0)
    return Imatrix(
        {"blk.0.attn_q.weight": rng.gamma(1, 9, (1, 8)).astype(np.float32), "blk.0.ffn_up_exps.weight": rng.gamma(1, 9, (3, 8)).astype(np.float32)},
        {"blk.0.attn_q.weight": np.array([512], np.float32), "blk.0.ffn_up_exps.weight": np.array([100, 0, 412], np.float32)}, ["a.txt", "b.txt"], 1,
    )


def test_what_is_written_is_read_and_an_unused_expert_weighs_one(tmp_path):
    ours = made_up()
    write_imatrix(tmp_path / "im.gguf", ours)
    back = read_imatrix(tmp_path / "im.gguf")
    assert (back.datasets, back.chunks, back.chunk_size) == (["a.txt", "b.txt"], 1, 512)
    for name in ours.sums:
        assert np.array_equal(back.sums[name], ours.sums[name]) and np.array_equal(back.counts[name], ours.counts[name])
    means = back.means()["blk.0.ffn_up_exps.weight"].reshape(3, 8)
    assert (means[1] == 1).all()
    np.testing.assert_allclose(means[2], ours.sums["blk.0.ffn_up_exps.weight"][2] / 412, rtol=1e-6)


def test_the_older_form_is_mean_times_number_of_chunks(tmp_path):
    values = np.arange(1, 5, dtype=np.float32)
    name = b"blk.0.attn_q.weight"
    data = struct.pack("<ii", 1, len(name)) + name + struct.pack("<ii", 7, 4) + (values * 7).tobytes() + struct.pack("<ii", 7, 5) + b"a.txt"
    (tmp_path / "im.dat").write_bytes(data)
    found = read_imatrix(tmp_path / "im.dat")
    np.testing.assert_allclose(found.means()["blk.0.attn_q.weight"], values, rtol=1e-6)
    assert (found.chunks, found.datasets) == (7, ["a.txt"])
    for cut in (2, 9, 30, len(data) - 12):
        (tmp_path / "cut.dat").write_bytes(data[:cut])
        with pytest.raises(UserError):
            read_imatrix(tmp_path / "cut.dat")


def test_damaged_and_foreign_files_are_refused(model, tmp_path):
    with pytest.raises(UserError, match="there is no such importance matrix"):
        read_imatrix(tmp_path / "none.gguf")
    with pytest.raises(UserError, match="no importance matrix"):
        read_imatrix(model)
    bad = made_up()
    bad.sums["blk.0.attn_q.weight"][0, 3] = np.nan
    write_imatrix(tmp_path / "nan.gguf", bad)
    with pytest.raises(UserError, match="no finite numbers"):
        read_imatrix(tmp_path / "nan.gguf")
    whole = (tmp_path / "nan.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[:-40])
    with pytest.raises(UserError, match="truncated"):
        read_imatrix(tmp_path / "cut.gguf")


def test_domain_and_general_text_share_the_tokens_by_the_ratio(model, tmp_path):
    domain = write_rows(tmp_path / "d.jsonl", [{"prompt_ids": [6138, *range(100, 115)], "completion_ids": list(range(200, 216))} for _ in range(100)])
    (tmp_path / "t.txt").write_text(TEXT, encoding="utf-8")
    found = make_imatrix(model, tmp_path / "im.gguf", domain=domain, general=[tmp_path / "t.txt"], ratio=0.25, tokens=1024, chunk=64)
    # 256 tokens are 8 samples of 32, 768 tokens are 12 chunks of 64
    assert {int(c[0]) for c in found.counts.values()} == {1024}
    assert found.datasets == ["d.jsonl", "t.txt"]


def test_line_separators_within_a_row_are_no_line_ends(tmp_path):
    rows = write_rows(tmp_path / "t.jsonl", [{"text": "一行\u2028続き"}, {"text": "二\x85三"}])
    assert imatrix.read_source(rows).text == "一行\u2028続き\n\n二\x85三"
    (tmp_path / "t.txt").write_bytes("一\r\n二".encode())
    assert imatrix.read_source(tmp_path / "t.txt").text == "一\r\n二"


def test_bad_input_is_named_before_any_model_is_loaded(model, tmp_path):
    rows = write_rows(tmp_path / "bad.jsonl", [{"text": "良い"}, {"other": 1}, {"ids": ["x"]}])
    with pytest.raises(UserError, match=r"2 problem[\s\S]*line 2[\s\S]*line 3"):
        make_imatrix(model, tmp_path / "im.gguf", domain=rows)
    with pytest.raises(UserError, match="no text to compute on"):
        make_imatrix(model, tmp_path / "im.gguf")
    with pytest.raises(UserError, match=r"ratio must be between 0 and 1, not 1.5"):
        make_imatrix(model, tmp_path / "im.gguf", domain=rows, ratio=1.5)
    ids = write_rows(tmp_path / "ids.jsonl", [{"ids": list(range(6000, 6300))}])
    with pytest.raises(UserError, match="the vocabulary has 6144"):
        make_imatrix(model, tmp_path / "im.gguf", domain=ids)
    assert not (tmp_path / "im.gguf").exists()


def test_an_interrupted_run_continues_where_it_was(model, tmp_path, monkeypatch):
    rows = chunks(6, 60)
    data = write_rows(tmp_path / "ids.jsonl", [{"ids": r} for r in rows])
    whole = make_imatrix(model, tmp_path / "whole.gguf", domain=data, tokens=10_000, output=False)
    monkeypatch.setattr(imatrix, "SAVE_EVERY", 0)
    messages = []

    class Stopped(Exception):
        pass

    def stop_after_two(**message):
        messages.append(message)
        if len(messages) == 2 and "tokens" in message:
            raise Stopped

    # in this process, so that it can be stopped between two batches
    monkeypatch.setattr(imatrix, "say", stop_after_two)
    job = {"path": str(model), "files": [str(data)], "tokens": [10_000], "chunk": 512, "output": False, "threads": 1, "gpu": 0, "digest": "d",
           "out": str(tmp_path / "half.gguf"), "partial": str(tmp_path / ".half.partial")}
    with pytest.raises(Stopped):
        imatrix._work(job)
    assert (tmp_path / ".half.partial").exists() and not (tmp_path / "half.gguf").exists()
    done = []
    collect = imatrix.Collector.__call__

    def counting(self, tensor, ask):
        done.append(ask)
        return collect(self, tensor, ask)

    monkeypatch.setattr(imatrix.Collector, "__call__", counting)
    imatrix._work(job)
    half = read_imatrix(tmp_path / "half.gguf")
    resumed = len(done)
    for name in whole.sums:
        assert half.counts[name].tolist() == whole.counts[name].tolist()
        np.testing.assert_allclose(half.sums[name], whole.sums[name], rtol=2e-3)
    (tmp_path / ".half.partial").unlink()
    done.clear()
    imatrix._work(job)
    assert resumed < len(done)  # the first batch was not computed again
