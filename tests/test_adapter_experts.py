"""LoRA on experts that transformers holds fused (PEFT's ``target_parameters``): the GGUF has PEFT's unmerged logits."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tsugiki.errors import UserError
from tsugiki.evaluate.engine import Engine
from tsugiki.quantize import adapter as adapter_module
from tsugiki.quantize.convert import convert, convert_lora
from tsugiki.quantize.parity import logits_agreement
from tsugiki.samples import EncodedSample

ROOT = Path(__file__).resolve().parents[1]
BASES = Path(os.environ.get("TSUGIKI_TEST_BASES", ROOT / "recipes" / "bases"))
IDS = np.random.default_rng(0).integers(0, 5000, 40).tolist()
SAMPLE = EncodedSample("0", "", "", "", "", IDS[:8], IDS[8:])


def make_base(folder, width=64, ffn=48):
    if not (BASES / "tiny-qwen" / "tokenizer.json").is_file():
        pytest.skip("the bundled base tiny-qwen is not there")
    tokenizer = AutoTokenizer.from_pretrained(BASES / "tiny-qwen")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(
        "qwen3_moe", hidden_size=width, intermediate_size=96, moe_intermediate_size=ffn, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, num_experts=6, num_experts_per_tok=3, norm_topk_prob=True, max_position_embeddings=256,
        vocab_size=len(tokenizer), tie_word_embeddings=False,
    ))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape) * (0.15 if weight.dim() > 1 else 0.05))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def trained(base, folder, **settings):
    """An adapter with random matrices, and the model in memory that it was saved from."""
    from peft import LoraConfig, get_peft_model

    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | settings
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**settings))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if "lora_" in key:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    model.save_pretrained(folder)
    return model.eval()


def hf_logits(model):
    with torch.no_grad():
        return model(torch.tensor([SAMPLE.ids])).logits[0, len(SAMPLE.prompt_ids) - 1 : -1].numpy()


def gguf_logits(path):
    with Engine(path, n_ctx=256, n_seq_max=1, n_threads=1) as engine:
        return next(x for _, x in engine.completion_logits([SAMPLE]))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("experts") / "base")


BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.mark.parametrize("settings", [
    {"target_parameters": BOTH},
    {"target_parameters": BOTH[1:]},
    {"target_parameters": BOTH[:1], "target_modules": []},
    {"target_parameters": [*BOTH, "mlp.gate.weight"]},
    {"target_parameters": BOTH, "use_rslora": True},
    {"target_parameters": BOTH, "rank_pattern": {"experts.down_proj": 2}, "alpha_pattern": {"layers.1.mlp.experts.gate_up_proj": 3}},
], ids=["both", "down", "gate and up alone", "router too", "rslora", "patterns"])
def test_the_file_is_the_model_that_was_trained(base, tmp_path, settings):
    model = trained(base, tmp_path / "a", **settings)
    convert(base, tmp_path / "m.gguf", tmp_path / "a", dtype="f32")
    expected = hf_logits(model)
    np.testing.assert_allclose(gguf_logits(tmp_path / "m.gguf"), expected, rtol=0, atol=1e-2)  # keys and values are cached in F16
    with model.disable_adapter():
        assert np.abs(hf_logits(model) - expected).max() > 0.1
    assert logits_agreement(tmp_path / "m.gguf", base, tmp_path / "a", [SAMPLE], n_threads=1).kl_mean < 1e-5


@pytest.mark.parametrize(("width", "ffn"), [(64, 64), (64, 32), (64, 128)])
def test_the_two_parameters_are_told_apart_whatever_their_sizes(tmp_path, width, ffn):
    base = make_base(tmp_path / "base", width, ffn)
    model = trained(base, tmp_path / "a", target_parameters=BOTH)
    convert(base, tmp_path / "m.gguf", tmp_path / "a", dtype="f32")
    np.testing.assert_allclose(gguf_logits(tmp_path / "m.gguf"), hf_logits(model), rtol=0, atol=1e-2)


def test_each_matrix_is_read_once_a_tensor_and_two_are_held(base, tmp_path, monkeypatch):
    """Of a 30B mixture, a read for each of 128 experts would be 150 GB from the disk."""
    trained(base, tmp_path / "a", target_parameters=BOTH, target_modules=[])
    reads = []
    real = adapter_module.Stored.rows
    monkeypatch.setattr(adapter_module.Stored, "rows", lambda self, *a: reads.append(self) or real(self, *a))
    convert(base, tmp_path / "m.gguf", tmp_path / "a", dtype="f32")
    of_adapter = [r for r in reads if r.file.parent == tmp_path / "a"]
    assert len(of_adapter) == len(set(of_adapter)) == 2 * 2 * 2  # layers, parameters, A and B; gate and up read the same


def test_a_lora_file_of_fused_experts_is_the_merged_model(base, tmp_path):
    import ctypes

    import llama_cpp

    trained(base, tmp_path / "a", target_parameters=BOTH)
    convert(base, tmp_path / "m.gguf", tmp_path / "a", dtype="f32")
    convert(base, tmp_path / "base.gguf", dtype="f32")
    convert_lora(base, tmp_path / "lora.gguf", tmp_path / "a", dtype="f32")
    with Engine(tmp_path / "base.gguf", n_ctx=256, n_seq_max=1, n_threads=1) as engine:
        loaded = llama_cpp.llama_adapter_lora_init(engine._model, os.fsencode(tmp_path / "lora.gguf"))
        assert loaded
        adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(loaded)
        assert llama_cpp.llama_set_adapters_lora(engine._context, adapters, 1, (ctypes.c_float * 1)(1.0)) == 0
        beside = next(x for _, x in engine.completion_logits([SAMPLE]))
    np.testing.assert_allclose(beside, gguf_logits(tmp_path / "m.gguf"), rtol=0, atol=1e-2)


def changed(adapter, **tensors):
    path = adapter / "adapter_model.safetensors"
    weights = load_file(path)
    for key in list(weights):
        for end, value in tensors.items():
            if key.endswith(f"layers.0.mlp.experts.{end}.weight"):
                weights[key] = value
    save_file({k: v for k, v in weights.items() if v is not None}, path)


@pytest.mark.parametrize(("tensors", "sentence"), [
    ({"lora_A": None}, "fused experts with"),
    ({"lora_A": torch.zeros(24, 63)}, "fit neither gate_up_proj"),
    ({"lora_A": torch.zeros(20, 48)}, "ranks 20 .A. and 24 .B. for 6 experts, 4 each"),
    ({"lora_A": torch.full((24, 48), float("nan"))}, "NaN"),
])
def test_pairs_that_do_not_fit_are_refused(base, tmp_path, tensors, sentence):
    trained(base, tmp_path / "a", target_parameters=BOTH[1:], target_modules=[])
    changed(tmp_path / "a", **tensors)
    with pytest.raises(UserError, match=sentence):
        convert(base, tmp_path / "m.gguf", tmp_path / "a")
    assert not (tmp_path / "m.gguf").exists()


def test_a_base_without_experts_is_another_base(tmp_path, base):
    trained(base, tmp_path / "a", target_parameters=BOTH, target_modules=[])
    with pytest.raises(UserError, match="the base has no experts of this name"):
        convert(BASES / "tiny-qwen", tmp_path / "m.gguf", tmp_path / "a")
