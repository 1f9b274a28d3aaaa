"""A merged GGUF is the adapted model as PEFT runs it, for every form of LoRA; what cannot be merged is refused by name."""

import ctypes
import json
import os
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tsugiki.artifacts import read_json, write_json
from tsugiki.errors import UserError
from tsugiki.evaluate.engine import Engine
from tsugiki.lineage import check_lineage, write_lineage
from tsugiki.quantize.convert import convert, convert_lora
from tsugiki.quantize.parity import load_reference, logits_agreement
from tsugiki.recipes.pretrain import TINY_BASES
from tsugiki.samples import EncodedSample

ROOT = Path(__file__).resolve().parents[1]
BASES = Path(os.environ.get("TSUGIKI_TEST_BASES", ROOT / "recipes" / "bases"))
SHAPE = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_base(folder, kind, **settings):
    """A small model with random weights; ``tied`` models share embeddings and output."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    name = "tiny-llama" if kind == "llama" else "tiny-qwen"
    if not (BASES / name / "tokenizer.json").is_file():
        pytest.skip(f"the bundled base {name} is not there")
    assert name in TINY_BASES
    tokenizer = AutoTokenizer.from_pretrained(BASES / name)
    config = AutoConfig.for_model(kind, **(SHAPE | settings), vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * (0.15 if weight.dim() > 1 else 0.3) + ("norm" in key))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_adapter(folder, base, **settings):
    """An adapter whose every trained tensor is random."""
    from peft import LoraConfig, get_peft_model

    settings = {"r": 4, "lora_alpha": 8, "target_modules": LINEAR, "task_type": "CAUSAL_LM"} | settings
    model = get_peft_model(load_reference(base, None), LoraConfig(**settings))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if "lora_" in key or "modules_to_save" in key:
                spread = torch.randn(weight.shape, generator=generator) * 0.1
                weight.copy_(weight * (1 + spread) if "magnitude" in key else weight + spread)
    model.save_pretrained(folder)
    return folder


def samples_of(vocab_size, n=2):
    rows = np.random.default_rng(0).integers(0, vocab_size, (n, 60)).tolist()
    return [EncodedSample(str(i), "", "", "", "", ids[:20], ids[20:]) for i, ids in enumerate(rows)]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("adapter")


@pytest.fixture(scope="module")
def llama(work):
    return make_base(work / "llama", "llama", tie_word_embeddings=False)


@pytest.fixture(scope="module")
def tied(work):
    return make_base(work / "tied", "qwen2", tie_word_embeddings=True)


FORMS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"layers.1.mlp.down_proj": 2}},
    "some layers": {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
    "dora": {"use_dora": True},
    "output": {"target_modules": [*LINEAR, "lm_head"]},
    "embeddings": {"target_modules": [*LINEAR, "embed_tokens"]},
    "embeddings with dora": {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    "saved embeddings and output": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "saved output": {"modules_to_save": ["lm_head"]},
    "saved norm": {"modules_to_save": ["norm"]},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_merged_as_peft_does(work, llama, form):
    adapter = make_adapter(work / f"llama-{form}", llama, **FORMS[form])
    out = work / "merged.gguf"
    convert(llama, out, adapter, dtype="f32")
    expected = load_reference(llama, adapter).merge_and_unload().state_dict()
    written = {t.name: t.data for t in gguf.GGUFReader(out).tensors}
    pairs = {"token_embd.weight": "model.embed_tokens.weight", "output.weight": "lm_head.weight", "output_norm.weight": "model.norm.weight"}
    for i in range(2):
        for ours, theirs in (("attn_v", "self_attn.v_proj"), ("attn_output", "self_attn.o_proj"), ("ffn_gate", "mlp.gate_proj"),
                             ("ffn_up", "mlp.up_proj"), ("ffn_down", "mlp.down_proj")):
            pairs[f"blk.{i}.{ours}.weight"] = f"model.layers.{i}.{theirs}.weight"
    for ours, theirs in pairs.items():
        np.testing.assert_allclose(written[ours], expected[theirs].numpy(), rtol=2e-5, atol=2e-6, err_msg=ours)
    found = logits_agreement(out, llama, adapter, samples_of(6144), n_threads=1)  # q and k, whose rows are reordered, too
    assert found.kl_mean <= 1e-5
    assert logits_agreement(out, llama, None, samples_of(6144), n_threads=1).kl_mean > 1e-3


@pytest.mark.parametrize(("form", "still_tied"), [
    ({"target_modules": [*LINEAR, "lm_head"]}, False),
    ({"target_modules": [*LINEAR, "embed_tokens"]}, False),
    ({"target_modules": [*LINEAR, "embed_tokens", "lm_head"]}, False),
    ({"modules_to_save": ["embed_tokens"]}, False),
    ({"modules_to_save": ["lm_head"]}, False),
    ({"target_modules": [*LINEAR, "embed_tokens"], "ensure_weight_tying": True}, True),
    ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
    ({}, True),
])
def test_tied_weights_give_the_model_that_was_trained(work, tied, form, still_tied):
    adapter = make_adapter(work / f"tied-{abs(hash(str(form)))}", tied, **form)
    out = work / "tied.gguf"
    report = convert(tied, out, adapter, dtype="f32")
    names = {t.name for t in gguf.GGUFReader(out).tensors}
    assert report.tied is still_tied
    assert ("output.weight" in names) is not still_tied
    assert logits_agreement(out, tied, adapter, samples_of(6144), n_threads=1).kl_mean <= 1e-5


def test_pefts_own_merge_of_tied_weights_is_another_model(work, tied):
    """The reason why the merged checkpoint is not the yardstick there."""
    adapter = make_adapter(work / "tied-output", tied, target_modules=["lm_head"])
    ids = torch.tensor([samples_of(6144)[0].ids])
    with torch.no_grad():
        trained = load_reference(tied, adapter)(ids).logits
        merged = load_reference(tied, adapter).merge_and_unload()(ids).logits
    assert (trained - merged).abs().max() > 0.1


# --- the adapter alone ----------------------------------------------------------------------------------------


def logits_of(path, ids, lora=None):
    """Logits in llama.cpp, with a LoRA file beside the base or without."""
    with Engine(path, n_ctx=256, n_seq_max=1, n_threads=1) as engine:
        if lora:
            add_lora(engine, lora)
        return next(x for _, x in engine.completion_logits([EncodedSample("0", "", "", "", "", ids[:20], ids[20:])]))


def add_lora(engine, lora):
    loaded = llama_cpp.llama_adapter_lora_init(engine._model, os.fsencode(lora))
    assert loaded, "llama.cpp refuses the file"
    adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(loaded)
    assert llama_cpp.llama_set_adapters_lora(engine._context, adapters, 1, (ctypes.c_float * 1)(1.0)) == 0


@pytest.mark.parametrize("form", ["plain", "rslora", "patterns", "some layers", "output", "embeddings"])
def test_a_lora_file_beside_the_base_is_the_merged_model(work, llama, form):
    adapter = make_adapter(work / f"lora-{form}", llama, **FORMS[form])
    convert(llama, work / "base.gguf", dtype="f32")
    convert(llama, work / "merged.gguf", adapter, dtype="f32")
    report = convert_lora(llama, work / "lora.gguf", adapter, dtype="f32")
    assert report.bytes < (work / "merged.gguf").stat().st_size
    ids = samples_of(6144)[0].ids
    beside, merged = logits_of(work / "base.gguf", ids, work / "lora.gguf"), logits_of(work / "merged.gguf", ids)
    base = logits_of(work / "base.gguf", ids)
    np.testing.assert_allclose(beside, merged, rtol=0, atol=5e-3)  # keys and values are cached in F16
    assert np.abs(beside - base).max() > 0.1


@pytest.fixture(scope="module")
def moe(work):
    """A mixture with an adapter on attention and on some experts, as trainers wrote it before experts were fused."""
    base = make_base(work / "moe", "qwen3_moe", head_dim=32, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48,
                     norm_topk_prob=True, tie_word_embeddings=False)
    adapter = make_adapter(work / "moe-adapter", base, target_modules=["q_proj", "v_proj"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(3)
    for module, rows, columns in (("0.mlp.experts.2.down_proj", 64, 48), ("1.mlp.experts.0.gate_proj", 48, 64)):
        name = f"base_model.model.model.layers.{module}"
        tensors[f"{name}.lora_A.weight"] = torch.randn(4, columns, generator=generator) * 0.1
        tensors[f"{name}.lora_B.weight"] = torch.randn(rows, 4, generator=generator) * 0.1
    save_file(tensors, adapter / "adapter_model.safetensors")
    return base, adapter, tensors


def test_experts_take_their_own_updates(work, moe):
    base, adapter, tensors = moe
    report = convert(base, work / "moe.gguf", adapter, dtype="f32")
    assert report.merged == 2 * 2 + 2
    written = {t.name: t.data for t in gguf.GGUFReader(work / "moe.gguf").tensors}
    weights = load_file(base / "model.safetensors")
    name = "layers.0.mlp.experts.2.down_proj"
    update = 2.0 * tensors[f"base_model.model.model.{name}.lora_B.weight"] @ tensors[f"base_model.model.model.{name}.lora_A.weight"]
    experts = [weights[f"model.layers.0.mlp.experts.{e}.down_proj.weight"] for e in range(4)]
    experts[2] = experts[2] + update
    np.testing.assert_allclose(written["blk.0.ffn_down_exps.weight"], torch.stack(experts).numpy(), atol=2e-6)
    q = "base_model.model.model.layers.1.self_attn.q_proj"
    expected = weights["model.layers.1.self_attn.q_proj.weight"] + 2.0 * tensors[f"{q}.lora_B.weight"] @ tensors[f"{q}.lora_A.weight"]
    np.testing.assert_allclose(written["blk.1.attn_q.weight"], expected.numpy(), atol=2e-6)


def test_a_lora_file_of_experts_is_the_merged_model(work, moe):
    base, adapter, _ = moe
    convert(base, work / "moe-base.gguf", dtype="f32")
    convert(base, work / "moe.gguf", adapter, dtype="f32")
    convert_lora(base, work / "moe-lora.gguf", adapter, dtype="f32")
    ids = samples_of(6144)[0].ids
    beside, merged = logits_of(work / "moe-base.gguf", ids, work / "moe-lora.gguf"), logits_of(work / "moe.gguf", ids)
    np.testing.assert_allclose(beside, merged, rtol=0, atol=5e-3)
    assert np.abs(logits_of(work / "moe-base.gguf", ids) - merged).max() > 0.1


def test_a_lora_file_says_what_it_is(work, llama):
    adapter = make_adapter(work / "lora-meta", llama, use_rslora=True)
    convert_lora(llama, work / "lora.gguf", adapter, dtype="f16", name="設備")
    reader = gguf.GGUFReader(work / "lora.gguf")
    value = {k: f.contents() for k, f in reader.fields.items()}
    assert (value["general.type"], value["adapter.type"], value["general.architecture"]) == ("adapter", "lora", "llama")
    assert value["adapter.lora.alpha"] == pytest.approx(8 * 4 / 4**0.5)  # alpha / sqrt(r) = this / r
    assert (value["general.name"], value["general.base_model.0.name"]) == ("設備", "llama")
    assert {t.tensor_type.name for t in reader.tensors} == {"F16"}
    assert len(reader.tensors) == 2 * 7 * 2


@pytest.mark.parametrize(("base", "form", "sentence"), [
    ("llama", {"use_dora": True}, "DoRA scales the whole tensor"),
    ("llama", {"modules_to_save": ["lm_head"]}, "lm_head.weight is replaced as a whole"),
    ("tied", {"target_modules": ["lm_head"]}, "lm_head.weight is tied in the base"),
])
def test_what_no_lora_file_can_say_is_refused(work, base, form, sentence, request):
    folder = request.getfixturevalue(base)
    adapter = make_adapter(work / f"not-{abs(hash(sentence))}", folder, **form)
    with pytest.raises(UserError, match=sentence):
        convert_lora(folder, work / "not.gguf", adapter)
    assert not (work / "not.gguf").exists()


# --- what is refused ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(work, llama):
    return make_adapter(work / "plain", llama)


def changed(adapter, folder, tensors=None, **config):
    folder.mkdir(exist_ok=True)
    write_json(folder / "adapter_config.json", read_json(adapter / "adapter_config.json") | config)
    weights = load_file(adapter / "adapter_model.safetensors") | (tensors or {})
    save_file({k: v for k, v in weights.items() if v is not None}, folder / "adapter_model.safetensors")
    return folder


def refused(base, tmp_path, adapter):
    with pytest.raises(UserError) as error:
        convert(base, tmp_path / "out" / "model.gguf", adapter)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
    return str(error.value)


@pytest.mark.parametrize(("config", "sentence"), [
    ({"peft_type": "IA3"}, "peft_type IA3"), ({"bias": "all"}, "trained biases (bias 'all')"), ({"lora_bias": True}, "lora_bias"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out"),
    ({"trainable_token_indices": [1]}, "the rows of trainable_token_indices are missing"), ({"use_dora": True}, "a magnitude is missing"),
    ({"init_lora_weights": "pissa_niter_4"}, "PiSSA changed the base before training"), ({"init_lora_weights": "olora"}, "OLoRA changed the base"),
    ({"init_lora_weights": "corda"}, "path_initial_model_for_weight_conversion"), ({"init_lora_weights": "loftq"}, "LoftQ changed the base"),
    ({"init_lora_weights": "lora_ga"}, "LoRA-GA changed the base"), ({"kasa_config": {"beta": 1e-4}}, "KaSA"),
    ({"use_bdlora": {"nblocks": 2}}, "BD-LoRA"), ({"arrow_config": {"top_k": 3}}, "Arrow"),
    ({"r": 5}, "ranks 4 (A), 4 (B) and 5 (adapter_config.json) differ"), ({"r": 0}, "r is 0"), ({"modules_to_save": 5}, "modules_to_save is 5"), ({"rank_pattern": ["q"]}, "rank_pattern is ['q']"),
    ({"alpha_pattern": {"q_(": 2}}, "'q_(' is no regular expression"), ({"rank_pattern": {"q_proj": "x"}}, "'q_proj' is 'x', not a positive number"),
    ({"lora_alpha": "x"}, "lora_alpha is 'x'"),
])
def test_kinds_that_would_be_merged_wrongly_are_refused_by_name(llama, plain, tmp_path, config, sentence):
    assert sentence in refused(llama, tmp_path, changed(plain, tmp_path / "a", **config))


def test_a_pissa_adapter_of_pefts_own_is_refused_and_its_converted_form_is_merged(work, llama, tmp_path):
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "down_proj"], init_lora_weights="pissa", task_type="CAUSAL_LM")
    model = get_peft_model(load_reference(llama, None), settings)
    model.peft_config["default"].init_lora_weights = True  # or PEFT would initialise again when it reads it back
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if "lora_" in key:
                weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)))
    model.save_pretrained(tmp_path / "raw")
    assert "PiSSA" in refused(llama, tmp_path, tmp_path / "raw")
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    convert(llama, tmp_path / "model.gguf", tmp_path / "plain", dtype="f32")
    written = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    expected = model.merge_and_unload().state_dict()["model.layers.1.mlp.down_proj.weight"].numpy()
    np.testing.assert_allclose(written["blk.1.ffn_down.weight"], expected, rtol=1e-3, atol=1e-4)


def test_an_adapter_of_a_larger_vocabulary_without_its_output_layer_says_how_to_resize_the_base(work, llama, tmp_path):
    """PEFT saves only the table that has a low-rank update."""
    from peft import LoraConfig, get_peft_model

    base = load_reference(llama, None)
    rows = base.get_input_embeddings().weight.shape[0]
    base.resize_token_embeddings(rows + 3)
    settings = LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM")
    get_peft_model(base, settings).save_pretrained(tmp_path / "lora")
    said = refused(llama, tmp_path, tmp_path / "lora")
    assert f"{rows + 3:,} tokens, the base's {rows:,}" in said and "does not hold the whole lm_head.weight" in said
    assert "resize_token_embeddings" in said


def test_every_tensor_that_does_not_belong_is_named(llama, plain, tmp_path):
    prefix = "base_model.model.model.layers.0."
    said = refused(llama, tmp_path, changed(plain, tmp_path / "a", {
        prefix + "self_attn.q_proj.lora_A.weight": None,
        prefix + "self_attn.q_proj.bias": torch.zeros(64),
        prefix + "mlp.up_proj.lora_B.weight": torch.zeros(95, 4),
        prefix + "mlp.extra.lora_A.weight": torch.zeros(4, 64), prefix + "mlp.extra.lora_B.weight": torch.zeros(64, 4),
        prefix + "mlp.down_proj.lora_A.weight": torch.zeros(4, 96, dtype=torch.int8),
    }))
    assert "self_attn.q_proj has lora_B only" in said
    assert "self_attn.q_proj.bias is a trained bias" in said
    assert "the adapter's update is (95, 64), the base's tensor (96, 64)" in said
    assert "the base has no model.layers.0.mlp.extra.weight" in said
    assert "has type I8" in said


def test_a_pickled_adapter_is_refused(llama, plain, tmp_path):
    folder = changed(plain, tmp_path / "a")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    assert "pickle" in refused(llama, tmp_path, folder)
    (folder / "adapter_config.json").unlink()
    assert "no adapter_config.json" in refused(llama, tmp_path, folder)


def test_an_adapter_that_names_another_base_of_the_same_shapes_is_noted(llama, plain, tmp_path):
    assert not any("says that its base" in n for n in convert(llama, tmp_path / "m.gguf", plain).notes)
    other = changed(plain, tmp_path / "a", base_model_name_or_path="somebody/other-7b")
    assert any("says that its base is 'other-7b'" in n for n in convert(llama, tmp_path / "m.gguf", other).notes)
    assert not any("says that" in n for n in convert(llama, tmp_path / "m.gguf", other, base_model="somebody/Other-7B").notes)
    write_lineage(other, llama)
    assert not any("says that" in n for n in convert(llama, tmp_path / "m.gguf", other).notes)


def test_an_adapter_that_was_trained_on_other_weights_is_refused(llama, plain, tmp_path):
    folder = changed(plain, tmp_path / "a")
    assert check_lineage(folder, llama) is None
    write_lineage(folder, llama)
    assert check_lineage(folder, llama) is True
    convert(llama, tmp_path / "same.gguf", folder)
    other = tmp_path / "other"
    other.mkdir()
    for file in llama.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    (other / "chat_template.jinja").write_text("{{ messages[0]['content'] }}<|eot_id|>")
    assert check_lineage(folder, other) is True  # the template is no part of what was trained on
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    said = refused(other, tmp_path, folder)
    assert "trained on 'llama' with weights" in said
    (folder / "base.json").write_text("[1]")
    with pytest.raises(UserError, match="damaged"):
        check_lineage(folder, llama)


def test_the_report_counts_what_the_adapter_changed(llama, plain, tmp_path):
    assert convert(llama, tmp_path / "m.gguf", plain).merged == 14
    assert json.loads((plain / "adapter_config.json").read_text())["r"] == 4
