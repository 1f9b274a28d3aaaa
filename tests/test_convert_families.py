"""Every family's GGUF gives the logits of transformers, and is byte for byte what upstream's converter writes."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tsugiki.errors import UserError
from tsugiki.quantize.convert import convert
from tsugiki.quantize.parity import logits_agreement
from tsugiki.samples import EncodedSample

ROOT = Path(__file__).resolve().parents[1]
BASES = Path(os.environ.get("TSUGIKI_TEST_BASES", ROOT / "recipes" / "bases"))
SHAPE = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Case:
    """A model to make: its transformers type, the bundled tokenizer, settings beside SHAPE."""

    kind: str
    tokenizer: str
    settings: dict


CASES = {
    "llama-2": Case("llama", "tiny-llmjp", {"num_key_value_heads": 4}),
    "llama-2-biases": Case("llama", "tiny-llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-3": Case("llama", "tiny-llama", {"rope_theta": 500_000.0}),
    "llama-3.1": Case("llama", "tiny-llama", {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64}}),
    "llama-3.2-tied": Case("llama", "tiny-llama", {"tie_word_embeddings": True, "head_dim": 32}),
    "llama-linear": Case("llama", "tiny-llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}}),
    "mistral": Case("mistral", "tiny-llama", {"head_dim": 32, "sliding_window": None}),
    "qwen2": Case("qwen2", "tiny-qwen", {}),
    "qwen2-yarn": Case("qwen2", "tiny-qwen", {"rope_parameters": {
        "rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 128}}),
    "qwen3": Case("qwen3", "tiny-qwen", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3-yarn": Case("qwen3", "tiny-qwen", {"head_dim": 32, "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 128,
        "attention_factor": 0.8}}),
    "qwen3-moe": Case("qwen3_moe", "tiny-qwen", {
        "head_dim": 32, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True,
        "decoder_sparse_step": 1, "mlp_only_layers": []}),
}


def make_model(folder, case):
    """A saved model whose every weight, norm and bias matters, with the bundled tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if not (BASES / case.tokenizer / "tokenizer.json").is_file():
        pytest.skip(f"the bundled base {case.tokenizer} is not there")
    tokenizer = AutoTokenizer.from_pretrained(BASES / case.tokenizer)
    config = AutoConfig.for_model(
        case.kind, **(SHAPE | case.settings), vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            spread = 0.15 if weight.dim() > 1 else 0.3
            weight.copy_(torch.randn(weight.shape, generator=generator) * spread + ("norm" in key))
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def samples_of(vocab_size, length=200, n=2):
    rows = np.random.default_rng(0).integers(0, vocab_size, (n, length)).tolist()
    return [EncodedSample(str(i), "", "", "", "", ids[:20], ids[20:]) for i, ids in enumerate(rows)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("families")


@pytest.fixture(scope="module")
def models(folder):
    made = {}

    def get(name):
        if name not in made:
            made[name] = make_model(folder / name, CASES[name])
        return made[name]

    return get


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(models, folder, name):
    base, out = models(name), folder / f"{name}.gguf"
    report = convert(base, out)
    vocab = json.loads((base / "config.json").read_text())["vocab_size"]
    found = logits_agreement(out, base, None, samples_of(vocab), n_threads=1)
    assert found.tokens == 360
    assert found.kl_mean <= 1e-4
    assert found.nll_gguf == pytest.approx(found.nll_hf, abs=2e-3)
    assert report.wide == {}
    assert report.parameters == sum(t.numel() for t in load_file(base / "model.safetensors").values())


@pytest.mark.parametrize(("name", "without"), [
    ("llama-3.1", {"rope_type": "default", "rope_theta": 10_000.0}),
    ("llama-linear", {"rope_type": "default", "rope_theta": 10_000.0}),
    ("qwen3-yarn", {"rope_type": "default", "rope_theta": 10_000.0}),
    ("qwen3-yarn", {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 128}),
])
def test_the_logits_would_show_a_lost_rope_scaling(models, folder, tmp_path, name, without):
    base = copy_of(models(name), tmp_path / "b", rope_parameters=without)
    convert(base, tmp_path / "other.gguf")
    vocab = json.loads((base / "config.json").read_text())["vocab_size"]
    assert logits_agreement(tmp_path / "other.gguf", models(name), None, samples_of(vocab), n_threads=1).kl_mean > 1e-3


def copy_of(base, folder, **config):
    folder.mkdir()
    for file in base.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    changed = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(changed))
    return folder


def test_experts_are_stacked_and_the_router_stays_float32(models, folder):
    base = models("qwen3-moe")
    convert(base, folder / "moe.gguf", dtype="bf16")
    written = {t.name: t for t in gguf.GGUFReader(folder / "moe.gguf").tensors}
    weights = load_file(base / "model.safetensors")
    assert list(written["blk.1.ffn_down_exps.weight"].shape) == [32, 64, 8]
    expected = torch.stack([weights[f"model.layers.1.mlp.experts.{e}.down_proj.weight"] for e in range(8)])
    assert written["blk.1.ffn_down_exps.weight"].data.tobytes() == expected.view(torch.int16).numpy().tobytes()
    assert written["blk.0.ffn_gate_inp.weight"].tensor_type.name == "F32"


@pytest.mark.parametrize(("name", "config", "sentence"), [
    ("llama-3", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "short_factor": [1.0] * 8,
                                     "long_factor": [2.0] * 8, "original_max_position_embeddings": 64}}, "RoPE scaling 'longrope'"),
    ("llama-3", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}}, "RoPE scaling 'dynamic'"),
    ("llama-3", {"hidden_act": "gelu"}, "activation 'gelu'"),
    ("qwen3", {"attention_bias": True}, "attention biases in the architecture qwen3"),
    ("qwen2", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
                                   "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}, "'llama3' in the architecture qwen2"),
    ("qwen2", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "beta_fast": 16.0,
                                   "original_max_position_embeddings": 128}}, "YaRN with beta_fast 16.0"),
    ("qwen3-moe", {"norm_topk_prob": False}, "norm_topk_prob"),
    ("qwen3-moe", {"mlp_only_layers": [0]}, "dense layers among the mixtures"),
])
def test_what_llama_cpp_would_run_as_another_model_is_refused(models, tmp_path, name, config, sentence):
    with pytest.raises(UserError) as error:
        convert(copy_of(models(name), tmp_path / "b", **config), tmp_path / "out.gguf")
    assert sentence in str(error.value)
    assert not (tmp_path / "out.gguf").exists()


def test_a_sliding_window_shortens_the_context_and_is_said(models, tmp_path):
    report = convert(copy_of(models("mistral"), tmp_path / "b", sliding_window=128), tmp_path / "out.gguf")
    assert "slides over 128 tokens" in report.notes[0]
    assert gguf.GGUFReader(tmp_path / "out.gguf").fields["llama.context_length"].contents() == 128


def test_rows_are_the_same_however_many_are_read_at_a_time(models, folder, monkeypatch):
    from tsugiki.quantize import convert as conversion

    convert(models("llama-3"), folder / "whole.gguf", name="x")
    monkeypatch.setattr(conversion, "CHUNK", 1000)
    convert(models("llama-3"), folder / "chunks.gguf", name="x")
    assert (folder / "whole.gguf").read_bytes() == (folder / "chunks.gguf").read_bytes()


def test_values_beyond_f16_are_written_wider_and_named(models, tmp_path):
    base = copy_of(models("qwen2"), tmp_path / "b")
    weights = load_file(base / "model.safetensors")
    big, other = "model.layers.1.mlp.down_proj.weight", "model.layers.0.mlp.up_proj.weight"
    weights[big][3, 5] = 1e5
    weights[other] = weights[other].float()
    weights[other][0, 0] = -70_000.0
    weights["model.layers.1.mlp.up_proj.weight"][5] = 0  # what they multiply is zero: llama.cpp's activations are F16
    weights["model.layers.0.mlp.gate_proj.weight"][0] = 0
    save_file(weights, base / "model.safetensors")
    report = convert(base, tmp_path / "b.gguf")
    assert report.wide == {"blk.1.ffn_down.weight": "BF16", "blk.0.ffn_up.weight": "F32"}
    assert "2 tensor(s)" in report.notes[-1]
    written = {t.name: t for t in gguf.GGUFReader(tmp_path / "b.gguf").tensors}
    assert written["blk.1.ffn_down.weight"].data.tobytes() == weights[big].view(torch.int16).numpy().tobytes()
    np.testing.assert_array_equal(written["blk.0.ffn_up.weight"].data, weights[other].numpy())
    assert {t.tensor_type.name for n, t in written.items() if "ffn_gate" in n} == {"F16"}
    assert logits_agreement(tmp_path / "b.gguf", base, None, samples_of(2000), n_threads=1).kl_mean <= 1e-4
    assert convert(base, tmp_path / "f.gguf", dtype="bf16").wide == {}
