"""The profile of a GGUF file says what the base's configuration says, and what it warns of can be measured."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from tsugiki import bases
from tsugiki.errors import UserError
from tsugiki.quantize.check import cache_probe, encode_sets
from tsugiki.quantize.convert import convert
from tsugiki.quantize.levels import make_level
from tsugiki.quantize.profile import file_profile, read_header

ROOT = Path(__file__).resolve().parents[1]
BASES = ROOT / "recipes" / "bases"
OF_THE_FILE = {"architecture", "bytes", "dtype", "odd_rows"}  # these describe the file, the rest the model


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("profile")
    found = {}
    for name in ("tiny-llama", "tiny-qwen", "tiny-llmjp"):
        found[name] = folder / f"{name}.gguf"
        convert(BASES / name, found[name])
    return found


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen", "tiny-llmjp"])
def test_file_and_configuration_agree(files, name):
    ours, theirs = (dataclasses.asdict(p) for p in (file_profile(files[name]).model, bases.profile(BASES / name)))
    assert {k: v for k, v in ours.items() if k not in OF_THE_FILE} == {k: v for k, v in theirs.items() if k not in OF_THE_FILE}
    assert ours["odd_rows"] == theirs["odd_rows"] == ()


SMALL = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "max_position_embeddings": 1024, "tie_word_embeddings": False}
LLAMA_31 = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 512}
FAMILIES = {
    "Qwen3": ("tiny-qwen", {"head_dim": 128}),
    "Qwen3Moe": ("tiny-qwen", {"head_dim": 64, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256,
                               "norm_topk_prob": True}),
    "Llama": ("tiny-llama", {"rope_parameters": LLAMA_31}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_random_models_of_other_families_agree_too(family, tmp_path):
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(BASES / FAMILIES[family][0])
    config = getattr(transformers, f"{family}Config")(vocab_size=len(tokenizer), **SMALL | FAMILIES[family][1])
    base = tmp_path / "base"
    getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(base)
    tokenizer.save_pretrained(base)
    convert(base, tmp_path / "model.gguf")
    ours, theirs = file_profile(tmp_path / "model.gguf"), bases.profile(base)
    for field in dataclasses.fields(theirs):
        if field.name not in OF_THE_FILE | {"rope_scaling"}:
            assert getattr(ours.model, field.name) == getattr(theirs, field.name), field.name
    assert (ours.model.rope_scaling or {}).get("rope_type") == (theirs.rope_scaling or {}).get("rope_type")
    assert ours.model.qk_norm == family.startswith("Qwen3") and ours.model.moe == ("Moe" in family)
    assert ("ffn_down_exps" in [p["what"] for p in ours.probes]) == ("Moe" in family)


@pytest.mark.parametrize(("name", "attention"), [("tiny-llama", "grouped-query"), ("tiny-llmjp", "multi-head")])
def test_attention_kind(files, name, attention):
    assert file_profile(files[name]).attention == attention


def test_a_level_has_the_profile_of_its_origin(files, tmp_path):
    out = tmp_path / "q.gguf"
    make_level(files["tiny-qwen"], "Q4_K_M", out)
    level, origin = file_profile(out), file_profile(files["tiny-qwen"])
    same = OF_THE_FILE - {"architecture", "odd_rows"}
    for field in dataclasses.fields(level.model):
        assert field.name in same or getattr(level.model, field.name) == getattr(origin.model, field.name)
    assert level.types.keys() - origin.types.keys() and level.bias_norms == origin.bias_norms


def test_the_norms_of_the_biases_are_those_of_the_weights(files):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(BASES / "tiny-qwen", dtype="float32")
    found = file_profile(files["tiny-qwen"]).bias_norms
    for letter in "qkv":
        expected = [getattr(layer.self_attn, f"{letter}_proj").bias.double().norm().item() for layer in model.model.layers]
        assert found[letter] == pytest.approx(expected, rel=1e-3)


def test_odd_rows_are_named_with_their_width(tmp_path):
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(BASES / "tiny-qwen")
    config = Qwen2Config(vocab_size=len(tokenizer), hidden_size=224, intermediate_size=512, num_hidden_layers=1,
                         num_attention_heads=7, num_key_value_heads=1, tie_word_embeddings=True)
    base = tmp_path / "base"
    Qwen2ForCausalLM(config).save_pretrained(base)
    tokenizer.save_pretrained(base)
    convert(base, tmp_path / "odd.gguf")
    found, config = file_profile(tmp_path / "odd.gguf"), bases.profile(base)
    assert found.attention == "multi-query" and not found.model.rows_256 and not config.rows_256
    assert "blk.*.attn_k (224)" in found.model.odd_rows and "blk.*.ffn_down (512)" not in found.model.odd_rows
    assert {r.rpartition("(")[2] for r in found.model.odd_rows} == {r.rpartition("(")[2] for r in config.odd_rows} == {"224)"}
    assert "fallbacks" in [p["what"] for p in found.probes]


def test_what_is_worth_probing_follows_from_the_architecture(files):
    llama, qwen, llmjp = ({p["what"] for p in file_profile(files[n]).probes} for n in ("tiny-llama", "tiny-qwen", "tiny-llmjp"))
    assert {"attn_k", "attn_v", "ffn_down", "output", "token_embd"} <= llama
    assert "attn_k" not in llmjp and "output" in llmjp  # every query head has its own keys there
    assert "output" not in qwen and "token_embd" in qwen  # tied
    assert "KV cache, keys" in qwen and "KV cache, keys" not in llama


@pytest.fixture(scope="module")
def outlying(files, tmp_path_factory):
    """tiny-qwen with the key bias of one layer as far from the others as Qwen2.5-7B's first and last are."""
    path = tmp_path_factory.mktemp("outlying") / "outlying.gguf"
    shutil.copy(files["tiny-qwen"], path)
    entry = read_header(path).tensors["blk.0.attn_k.bias"]
    with path.open("r+b") as file:
        file.seek(entry.offset)
        bias = np.frombuffer(file.read(entry.bytes), np.float32)
        file.seek(entry.offset)
        file.write((40 * bias).astype(np.float32).tobytes())
    return path


def test_an_outlying_key_bias_is_warned_of(outlying):
    found = file_profile(outlying)
    assert found.outlying == [0]
    warning = next(p["why"] for p in found.probes if p["what"] == "KV cache, keys")
    assert "layer 0" in warning and "measure before use" in warning


def test_quantized_cache_types_are_measured_and_outlying_keys_show(files, outlying):
    sets, _ = encode_sets(files["tiny-qwen"], {"ja": [str(ROOT / "README.ja.md")]}, window=256, most=4)
    plain, harmed = ({(r["keys"], r["values"]): r for r in cache_probe(p, sets["ja"])} for p in (files["tiny-qwen"], outlying))
    assert plain["f16", "f16"]["kld_max"] == 0 and plain["f16", "f16"]["top1"] == 1
    for rows in (plain, harmed):
        assert 0 < rows["q8_0", "f16"]["kld_mean"] < rows["q4_0", "f16"]["kld_mean"]
        assert 0 < rows["f16", "q8_0"]["kld_mean"] < rows["f16", "q4_0"]["kld_mean"]
    assert harmed["q4_0", "f16"]["kld_mean"] > 3 * plain["q4_0", "f16"]["kld_mean"]
    assert harmed["q4_0", "f16"]["kld_mean"] > 10 * harmed["f16", "q4_0"]["kld_mean"]


def test_a_file_that_is_no_language_model_is_refused(tmp_path):
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "clip")
    writer.add_tensor("v.patch_embd.weight", np.zeros((4, 32), np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    with pytest.raises(UserError, match="no decoder language model"):
        file_profile(tmp_path / "x.gguf")
