"""A GGUF made by the kit is the same model: weights, metadata, and refusals of what cannot be converted."""

import json
import os
from dataclasses import replace
from math import prod
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tsugiki.errors import UserError
from tsugiki.quantize.convert import convert
from tsugiki.quantize.families import FAMILIES
from tsugiki.quantize.parity import load_reference, logits_agreement
from tsugiki.recipes.pretrain import TINY_BASES, build_model
from tsugiki.samples import EncodedSample

ROOT = Path(__file__).resolve().parents[1]
BASES = Path(os.environ.get("TSUGIKI_TEST_BASES", ROOT / "recipes" / "bases"))


def tokenizer_of(name):
    from transformers import AutoTokenizer

    if not (BASES / name / "tokenizer.json").is_file():
        pytest.skip(f"the bundled base {name} is not there")
    return AutoTokenizer.from_pretrained(BASES / name)


def make_base(folder, name, *, layers=2, **changes):
    """A model of the family's shape whose every weight, norm and bias matters (a fresh one has biases of zero)."""
    tokenizer = tokenizer_of(name)
    model = build_model(replace(TINY_BASES[name], layers=layers, **changes), tokenizer)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            spread = 0.08 if weight.dim() > 1 else 0.3
            weight.copy_(torch.randn(weight.shape, generator=generator) * spread + ("norm" in key))
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_adapter(folder, base, **settings):
    """A LoRA adapter on all linear layers with random A and B."""
    from peft import LoraConfig, get_peft_model

    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | settings
    model = get_peft_model(load_reference(base, None), LoraConfig(**settings))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if "lora_" in key:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    model.save_pretrained(folder)
    return folder


def samples_of(vocab_size, n=4):
    rng = np.random.default_rng(0)
    rows = rng.integers(0, vocab_size, (n, 40)).tolist()
    return [EncodedSample(str(i), "", "", "", "", ids[:25], ids[25:]) for i, ids in enumerate(rows)]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("convert")


@pytest.fixture(scope="module")
def llama(work):
    return make_base(work / "tiny-llama", "tiny-llama")


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen", "tiny-llmjp"])
def test_logits_of_base_and_adapter_agree_with_transformers(work, name):
    base = make_base(work / f"{name}-logits", name)
    adapter = make_adapter(work / f"{name}-adapter", base)
    out = work / f"{name}.gguf"
    report = convert(base, out, adapter)
    found = logits_agreement(out, base, adapter, samples_of(TINY_BASES[name].vocab_size), n_threads=1)
    plain = logits_agreement(out, base, None, samples_of(TINY_BASES[name].vocab_size), n_threads=1)
    assert report.merged == 2 * 7 + (not report.tied and "lm_head" in _adapted(adapter))
    assert found.tokens == 4 * 15
    assert found.kl_mean <= 1e-4
    assert found.nll_gguf == pytest.approx(found.nll_hf, abs=2e-3)
    assert plain.kl_mean > 100 * found.kl_mean  # the adapter is really in it


def _adapted(adapter):
    return {k.split(".")[2] for k in load_file(adapter / "adapter_model.safetensors")}


def test_logits_find_a_wrong_order_of_rows(work, llama, monkeypatch):
    monkeypatch.setitem(FAMILIES, "LlamaForCausalLM", replace(FAMILIES["LlamaForCausalLM"], permute=False))
    convert(llama, work / "wrong.gguf")
    assert logits_agreement(work / "wrong.gguf", llama, None, samples_of(6144), n_threads=1).kl_mean > 1e-3


def rotated(weight, heads):
    """llama.cpp's order of rows, spelled out: rows i and i + half of a head become 2i and 2i + 1."""
    out = np.empty_like(weight)
    head = len(weight) // heads
    for h in range(heads):
        for i in range(head // 2):
            out[h * head + 2 * i] = weight[h * head + i]
            out[h * head + 2 * i + 1] = weight[h * head + i + head // 2]
    return out


def test_rows_of_q_and_k_are_reordered_and_no_others(work, llama):
    convert(llama, work / "rows.gguf", dtype="f32")
    base = {k: v.float().numpy() for k, v in load_file(llama / "model.safetensors").items()}
    written = {t.name: t.data for t in gguf.GGUFReader(work / "rows.gguf").tensors}
    layer = "model.layers.0.self_attn"
    np.testing.assert_array_equal(written["blk.0.attn_q.weight"], rotated(base[f"{layer}.q_proj.weight"], 8))
    np.testing.assert_array_equal(written["blk.0.attn_k.weight"], rotated(base[f"{layer}.k_proj.weight"], 2))
    np.testing.assert_array_equal(written["blk.0.attn_v.weight"], base[f"{layer}.v_proj.weight"])
    np.testing.assert_array_equal(written["token_embd.weight"], base["model.embed_tokens.weight"])
    assert sum(prod(t.shape) for t in written.values()) == sum(prod(t.shape) for t in base.values())


@pytest.mark.parametrize(("name", "architecture", "eot"), [
    ("tiny-llama", "llama", "<|eot_id|>"), ("tiny-qwen", "qwen2", "<|im_end|>"), ("tiny-llmjp", "llama", "</s>"),
])
def test_metadata_says_what_programs_and_people_need(work, name, architecture, eot):
    base = make_base(work / f"{name}-meta", name, layers=1)
    convert(base, work / "meta.gguf", name="設備", licence="apache-2.0", base_model=name)
    reader = gguf.GGUFReader(work / "meta.gguf")
    value = {k: f.contents() for k, f in reader.fields.items()}
    tokenizer, config = tokenizer_of(name), json.loads((base / "config.json").read_text())
    assert value["general.architecture"] == architecture
    assert (value["general.name"], value["general.license"]) == ("設備", "apache-2.0")
    assert value["general.base_model.0.name"] == name
    assert "general.languages" not in value  # nobody said which
    assert value["general.file_type"] == gguf.LlamaFileType.MOSTLY_F16
    assert value[f"{architecture}.context_length"] == config["max_position_embeddings"]
    assert value[f"{architecture}.rope.freq_base"] == config["rope_parameters"]["rope_theta"]
    assert value[f"{architecture}.attention.head_count_kv"] == config["num_key_value_heads"]
    assert value[f"{architecture}.attention.layer_norm_rms_epsilon"] == pytest.approx(config["rms_norm_eps"])
    assert value["tokenizer.chat_template"] == tokenizer.chat_template
    assert value["tokenizer.ggml.eot_token_id"] == tokenizer.convert_tokens_to_ids(eot)
    assert value["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert value["tokenizer.ggml.padding_token_id"] == tokenizer.pad_token_id
    assert value["tokenizer.ggml.add_bos_token"] == (tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id)
    assert value["tokenizer.ggml.add_eos_token"] is False
    assert len(value["tokenizer.ggml.tokens"]) == config["vocab_size"]
    names = {t.name for t in reader.tensors}
    assert ("output.weight" in names) != config["tie_word_embeddings"]
    assert ("blk.0.attn_q.bias" in names) == (architecture == "qwen2")
    assert all(t.tensor_type.name == ("F32" if len(t.shape) == 1 else "F16") for t in reader.tensors)


def test_where_a_model_comes_from_is_said_as_upstream_says_it(work, llama):
    (llama / "README.md").write_text("---\nlanguage: [ja, en]\nlicense: mit\n---\n", encoding="utf-8")
    convert(llama, work / "card.gguf", base_model="tokyotech-llm/Llama-3.1-Swallow-8B-v0.5")
    value = {k: f.contents() for k, f in gguf.GGUFReader(work / "card.gguf").fields.items()}
    assert value["general.base_model.0.name"] == "Llama 3.1 Swallow 8B v0.5"
    assert value["general.base_model.0.organization"] == "Tokyotech Llm"
    assert value["general.base_model.0.repo_url"].endswith(".co/tokyotech-llm/Llama-3.1-Swallow-8B-v0.5")
    assert (value["general.languages"], value["general.license"]) == (["ja", "en"], "mit")
    convert(llama, work / "card.gguf", languages=["en"])
    assert gguf.GGUFReader(work / "card.gguf").fields["general.languages"].contents() == ["en"]
    (llama / "README.md").unlink()


def test_rows_beyond_the_tokenizer_become_unused_tokens(work):
    base = make_base(work / "padded", "tiny-llama", layers=1, vocab_size=6400)
    convert(base, work / "padded.gguf")
    fields = gguf.GGUFReader(work / "padded.gguf").fields
    assert fields["tokenizer.ggml.tokens"].contents()[-1] == "[PAD6399]"
    assert fields["tokenizer.ggml.token_type"].contents()[-1] == gguf.TokenType.UNUSED


# --- what is refused ------------------------------------------------------------------------------------------


def copy_of(base, folder, **config):
    folder.mkdir()
    for file in base.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    changed = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(changed))
    return folder


def refused(base, tmp_path, *arguments, **settings):
    """The sentence of the refusal; nothing is left behind."""
    out = tmp_path / "out" / "model.gguf"
    with pytest.raises(UserError) as error:
        convert(base, out, *arguments, **settings)
    assert not out.parent.exists() or not list(out.parent.iterdir())
    return str(error.value)


def test_an_unknown_architecture_is_refused_by_name(llama, tmp_path):
    said = refused(copy_of(llama, tmp_path / "b", architectures=["MambaForCausalLM"]), tmp_path)
    assert "MambaForCausalLM" in said
    assert "LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, Qwen3MoeForCausalLM" in said


def test_quantized_weights_are_refused_before_any_work(llama, tmp_path):
    base = copy_of(llama, tmp_path / "a", quantization_config={"quant_method": "bitsandbytes"})
    assert "quantized (bitsandbytes)" in refused(base, tmp_path)
    base = copy_of(llama, tmp_path / "b")
    weights = load_file(base / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight.absmax"] = torch.zeros(3)
    save_file(weights, base / "model.safetensors")
    assert "bitsandbytes-quantized" in refused(base, tmp_path)


def test_truncated_weights_are_refused(llama, tmp_path):
    base = copy_of(llama, tmp_path / "b")
    data = (base / "model.safetensors").read_bytes()
    for cut in (0, 5, 200, len(data) // 2, len(data) - 1):
        (base / "model.safetensors").write_bytes(data[:cut])
        assert "not a whole safetensors file" in refused(base, tmp_path)
    (base / "model.safetensors").unlink()
    assert "model.safetensors is missing" in refused(base, tmp_path)


def test_all_missing_and_misshapen_tensors_are_named_at_once(llama, tmp_path):
    base = copy_of(llama, tmp_path / "b")
    weights = load_file(base / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    weights["model.norm.weight"] = torch.ones(255)
    weights["model.extra.weight"] = torch.ones(3)
    save_file(weights, base / "model.safetensors")
    said = refused(base, tmp_path)
    assert "3 problem(s)" in said
    assert "model.layers.0.mlp.up_proj.weight is missing" in said
    assert "model.norm.weight has shape (255,), the configuration says (256,)" in said
    assert "model.extra.weight is not expected" in said


def test_nan_and_infinite_values_are_refused(llama, tmp_path):
    base = copy_of(llama, tmp_path / "b")
    weights = load_file(base / "model.safetensors")
    for value in ("nan", "inf", "-inf"):
        weights["model.layers.1.mlp.down_proj.weight"][3, 5] = float(value)
        save_file(weights, base / "model.safetensors")
        for dtype in ("f16", "bf16", "f32"):
            assert "model.layers.1.mlp.down_proj.weight holds NaN or infinite values" in refused(base, tmp_path, dtype=dtype)


def test_a_tokenizer_of_another_kind_is_refused(llama, tmp_path):
    base = copy_of(llama, tmp_path / "a")
    spec = json.loads((base / "tokenizer.json").read_text())
    spec["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{Han}+|\P{Han}+"
    (base / "tokenizer.json").write_text(json.dumps(spec))
    said = refused(base, tmp_path)
    assert "pre-tokenizer" in said
    assert "llama-bpe" in said
    larger = copy_of(llama, tmp_path / "b")
    spec = json.loads((larger / "tokenizer.json").read_text())
    spec["added_tokens"].append(spec["added_tokens"][-1] | {"id": 6144, "content": "室外機"})
    (larger / "tokenizer.json").write_text(json.dumps(spec))
    assert "ids up to 6144, the model has 6144 embedding rows" in refused(larger, tmp_path)


def test_a_failed_conversion_leaves_the_old_file(llama, tmp_path):
    out = tmp_path / "model.gguf"
    out.write_bytes(b"old")
    base = copy_of(llama, tmp_path / "b")
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][0] = float("inf")  # found last, when most is written
    save_file(weights, base / "model.safetensors")
    with pytest.raises(UserError, match=r"model.norm.weight holds NaN or infinite"):
        convert(base, out)
    assert out.read_bytes() == b"old"
    assert {p.name for p in tmp_path.iterdir()} == {"model.gguf", "b"}


def test_sharded_checkpoints_give_the_same_file(llama, tmp_path):
    base = copy_of(llama, tmp_path / "b")
    weights = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    names, index = sorted(weights), {}
    for i, part in enumerate((names[:9], names[9:])):
        shard = f"model-{i + 1:05}-of-00002.safetensors"
        save_file({n: weights[n] for n in part}, base / shard)
        index |= dict.fromkeys(part, shard)
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    convert(base, tmp_path / "sharded.gguf", name="x")
    convert(llama, tmp_path / "whole.gguf", name="x")
    assert (tmp_path / "sharded.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
