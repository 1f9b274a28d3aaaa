"""What the simulator says of a lowered tensor is what the lowered tensor does."""

import copy
import json
import xml.etree.ElementTree as ET
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

from tsugiki.errors import UserError
from tsugiki.quantize.levels import make_level
from tsugiki.quantize.native import Probe, dequantize_rows, quantize_rows
from tsugiki.quantize.sensitivity import (
    Simulator,
    groups_of,
    heat_map,
    heat_page,
    matrices,
    measure,
    sensitivities,
    sensitivity,
)
from tsugiki.samples import EncodedSample, write_encoded

BASE = Path(__file__).parent.parent / "recipes" / "bases" / "tiny-llama"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from tsugiki.quantize.convert import convert

    out = tmp_path_factory.mktemp("sensitivity") / "tiny.gguf"
    convert(BASE, out)
    return out


def texts(count, length=40, seed=0):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(BASE)
    ids = tokenizer("吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。The pump needs oil every month. " * 20)["input_ids"]
    rng = np.random.default_rng(seed)
    found = []
    for i in range(count):
        start = int(rng.integers(0, len(ids) - length))
        part = ids[start : start + length]
        found.append(EncodedSample(f"s{i}", "", "", f"d{i}", prompt_ids=[6138, *part[:8]], completion_ids=part[8:]))
    return found


@pytest.mark.parametrize("kind", ["Q4_K", "IQ4_XS", "Q5_0"])
def test_ggmls_functions_write_the_bytes_of_llama_cpps_file_and_read_them_as_the_reference_does(model, tmp_path, kind):
    name = "blk.1.ffn_down.weight"
    make_level(model, "Q4_K_M", tmp_path / "q.gguf", overrides={name: kind})
    written = next(t for t in gguf.GGUFReader(tmp_path / "q.gguf").tensors if t.name == name)
    original = next(t for t in gguf.GGUFReader(model).tensors if t.name == name)
    weights = original.data.astype(np.float32)
    number = int(gguf.GGMLQuantizationType[kind])
    data = quantize_rows(number, weights)
    assert written.tensor_type.name == kind
    assert data.tobytes() == written.data.tobytes()
    assert quantize_rows(number, weights, threads=3).tobytes() == data.tobytes()
    np.testing.assert_array_equal(dequantize_rows(number, data, weights.shape[1]), dequantize(data, gguf.GGMLQuantizationType[kind]))


def test_the_kl_of_a_lowered_matrix_is_that_of_transformers_with_the_same_matrix(model, tmp_path):
    from transformers import AutoModelForCausalLM

    samples, name = texts(6), "blk.0.ffn_down.weight"
    with Probe(model, writable=True, n_threads=1) as probe:
        simulator = Simulator(probe, model, {}, samples)
        found = simulator.divergence({name: "Q3_K"})
        restored = simulator.divergence({})
    net = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
    low = copy.deepcopy(net)
    weights = net.model.layers[0].mlp.down_proj.weight.detach().numpy().astype(np.float16).astype(np.float32)
    data = quantize_rows(int(gguf.GGMLQuantizationType.Q3_K), weights)
    with torch.no_grad():
        low.model.layers[0].mlp.down_proj.weight.copy_(torch.from_numpy(dequantize(data, gguf.GGMLQuantizationType.Q3_K)))
        values = []
        for s in samples:
            p, q = (torch.log_softmax(m(torch.tensor([s.ids[:-1]])).logits[0, len(s.prompt_ids) - 1 :].double(), -1) for m in (net, low))
            values.append((p.exp() * (p - q)).sum(-1))
    assert found == pytest.approx(float(torch.cat(values).mean()), rel=0.02)
    assert restored < 1e-6 < found


def test_the_simulators_kl_is_near_that_of_the_real_file(model, tmp_path):
    samples, name = texts(6), "blk.1.attn_v.weight"
    keep = {n: "F16" for n in matrices(model) if n != name}
    make_level(model, "Q4_K_M", tmp_path / "q.gguf", overrides=keep | {name: "Q3_K"})
    found = measure(model, [tmp_path / "q.gguf", model], samples, threads=1)
    with Probe(model, writable=True, n_threads=1) as probe:
        simulated = Simulator(probe, model, {}, samples).divergence({name: "Q3_K"})
    assert found["tokens"].tolist() == [len(s.completion_ids) for s in samples]
    assert found["kl"][1].sum() == pytest.approx(0, abs=1e-4)
    np.testing.assert_array_equal(found["nll"][0], found["nll"][2])
    one_by_one = measure(model, [tmp_path / "q.gguf", model], samples, threads=1, memory=2 * model.stat().st_size + (1 << 28))
    assert all(np.array_equal(one_by_one[k], found[k]) for k in found)
    with pytest.raises(UserError, match="two files and room for computing take about"):
        measure(model, [tmp_path / "q.gguf"], samples, threads=1, memory=1000)
    # the file's matrix product also rounds its inputs
    assert found["kl"][0].sum() / found["tokens"].sum() == pytest.approx(simulated, rel=0.15)


def test_an_error_from_some_rows_is_that_of_all(model):
    with Probe(model, writable=True, n_threads=1) as probe:
        importance = {"output.weight": np.random.default_rng(0).gamma(1, 1, 256).astype(np.float32)}
        simulator = Simulator(probe, model, importance, texts(1))
        for name in ("output.weight", "blk.0.attn_k.weight"):
            difference = (simulator.original(name) - simulator.quantized(name, "Q4_K")).astype(float) ** 2
            assert simulator.error(name, "Q4_K") == pytest.approx((difference @ importance.get(name, np.ones(256))).sum(), rel=0.05)


def test_every_group_is_measured_once_and_remembered(model, tmp_path):
    write_encoded(tmp_path / "s.jsonl", texts(3))
    found = sensitivity(model, tmp_path / "s.jsonl", tokens=200, blocks=2, cache=tmp_path / "c.jsonl", n_threads=1)
    assert len(found["rows"]) == 2 + 7 * 2  # embeddings, output; 7 kinds in 2 runs of layers
    assert found["passes"] == 1 + 16 + 1  # the reference, the groups, all together
    assert sorted(t for r in found["rows"] for t in r["tensors"]) == sorted(matrices(model))
    assert all(r["kl"] > 0 and r["bytes_low"] < r["bytes_f16"] for r in found["rows"])
    # the sum of the single ones and all at once are of one size: the additive model is worth something
    assert found["all"] == pytest.approx(found["sum"], rel=0.5)
    with (tmp_path / "c.jsonl").open("a") as file:
        file.write('{"key": "half a li')  # an interrupted run's last line
    again = sensitivity(model, tmp_path / "s.jsonl", tokens=200, blocks=2, cache=tmp_path / "c.jsonl", n_threads=1)
    assert again["passes"] == 2 and [r["kl"] for r in again["rows"]] == [r["kl"] for r in found["rows"]]
    page = heat_page(found)
    root = ET.fromstring(heat_map(found["rows"], title="KL <F16>"))
    cells = [e.text for e in root.iter("{http://www.w3.org/2000/svg}title")]
    assert len(cells) == 16 and all(any(c.startswith(r["name"] + ":") for c in cells) for r in found["rows"])
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "") and "感度" in page


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(0, 12), st.booleans())
def test_groups_share_the_matrices_out_without_rest(layers, blocks, tied):
    kinds = ("attn_q", "attn_k", "ffn_gate_exps")
    names = ["token_embd.weight"] + [f"blk.{i}.{k}.weight" for i in range(layers) for k in kinds] + ([] if tied else ["output.weight"])
    groups = groups_of(names, blocks)
    assert sorted(t for g in groups for t in g.tensors) == sorted(names)
    assert len({g.name for g in groups}) == len(groups)
    assert all(len({t.split(".")[2] for t in g.tensors}) == 1 for g in groups if g.layers)
    assert len(groups) == (2 - tied) + 3 * (min(blocks, layers) or layers)


def test_samples_of_another_vocabulary_are_refused(model, tmp_path):
    write_encoded(tmp_path / "s.jsonl", [EncodedSample("a", "", "", "d", prompt_ids=[1], completion_ids=[9000])])
    with pytest.raises(UserError, match="the vocabulary has 6144"):
        sensitivity(model, tmp_path / "s.jsonl", tokens=10)
    (tmp_path / "t.jsonl").write_text(json.dumps({"prompt_ids": [1], "wrong": 2}) + "\n")
    with pytest.raises(UserError, match="completion_ids"):
        sensitivity(model, tmp_path / "t.jsonl", tokens=10)


def test_one_pass_serves_all_types(model):
    """KL over rounding error is the same at every type, so that one measurement prices them all."""
    with Probe(model, writable=True, n_threads=1) as probe:
        simulator = Simulator(probe, model, {}, texts(8))
        groups = [g for g in groups_of(list(matrices(model))) if g.name in ("ffn_down.0", "output", "attn_v.1")]
        rows = sensitivities(simulator, groups)
        for row in rows:
            name = row.group.tensors[0]
            for kind in ("Q4_K", "Q5_K"):
                predicted = row.kl / row.error * simulator.error(name, kind)
                # between Q3_K and Q5_K the KL itself changes by a factor of 16
                assert 0.5 < simulator.divergence({name: kind}) / predicted < 2, (name, kind)
