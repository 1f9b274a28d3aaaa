"""Adapters with tokens of their own: the GGUF has the trained model's logits and the extended tokenizer's ids."""

import json
import os
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tsugiki.artifacts import read_json, write_json
from tsugiki.errors import UserError
from tsugiki.evaluate.engine import Engine
from tsugiki.quantize.convert import convert, convert_lora, model_tokenizer
from tsugiki.quantize.gate import added_texts, check_gate, gate
from tsugiki.quantize.parity import logits_agreement, parity
from tsugiki.samples import EncodedSample
from tsugiki.tokenizers import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
BASES = Path(os.environ.get("TSUGIKI_TEST_BASES", ROOT / "recipes" / "bases"))
WORDS = ["全熱交換器", "VRF室外機", "<|unit|>"]
TEXTS = ["全熱交換器のフィルターは何か月ごとに点検しますか。", "VRF室外機と全熱交換器を交換した。", "The VRF室外機 is on the roof.", "点検は毎日行います。"]


def make_base(folder, name, tied):
    """A random-weight model of two layers with a bundled base's tokenizer and template."""
    if not (BASES / name / "tokenizer.json").is_file():
        pytest.skip(f"the bundled base {name} is not there")
    shutil.copytree(BASES / name, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = AutoConfig.for_model(
        AutoConfig.from_pretrained(BASES / name).model_type, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, vocab_size=len(tokenizer), tie_word_embeddings=tied,
    )
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config)
    scatter(model, lambda key: True)
    model.save_pretrained(folder)
    return folder


def scatter(model, picked, seed=2):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if picked(key):
                weight.add_(torch.randn(weight.shape, generator=generator) * (0.1 if weight.dim() > 1 else 0.02))


def trained(base, folder, words=WORDS, rows=None, normalized=False, **settings):
    """An adapter to a resized base, with its tokenizer beside it, and the model in memory that it was saved from."""
    from peft import LoraConfig, get_peft_model

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([AddedToken(w, normalized=normalized) for w in words[:-1]])
    tokenizer.add_special_tokens({"additional_special_tokens": words[-1:]})
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(rows or len(tokenizer), mean_resizing=False)
    scatter(model, lambda key: "embed_tokens" in key or "lm_head" in key, seed=3)  # training may move the base's own table, too
    settings = {k: (v(len(tokenizer)) if callable(v) else v) for k, v in settings.items()}
    model = get_peft_model(model, LoraConfig(**{"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"} | settings))
    scatter(model, lambda key: "lora_" in key or "modules_to_save" in key or "trainable_tokens_delta" in key, seed=4)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.eval(), tokenizer


def sample(tokens):
    ids = [*np.random.default_rng(0).integers(0, tokens, 40).tolist(), *range(tokens - 3, tokens)]
    return EncodedSample("0", "", "", "", "", ids[:8], ids[8:])


def assert_same_logits(path, model, tokens):
    one = sample(tokens)
    with torch.no_grad():
        expected = model(torch.tensor([one.ids])).logits[0, len(one.prompt_ids) - 1 : -1].numpy()
    with Engine(path, n_ctx=256, n_seq_max=1, n_threads=1) as engine:
        found = next(x for _, x in engine.completion_logits([one]))
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-2)  # keys and values are cached in F16


FORMS = {
    "linear layers only": {},
    "both saved": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "embeddings saved": {"modules_to_save": ["embed_tokens"]},
    "rows of the tokens": {"trainable_token_indices": lambda n: [n - 1, n - 3, n - 2]},
    "rows of both": {"trainable_token_indices": lambda n: {"embed_tokens": [n - 3, n - 2], "lm_head": [n - 1]}},
    "low-rank tables": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
}
TIED = FORMS | {
    "low-rank embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "low-rank output": {"target_modules": ["q_proj", "lm_head"]},
    "embeddings saved, kept tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "low-rank embeddings, kept tied": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "rows of the output, not tied": {"trainable_token_indices": lambda n: {"lm_head": [n - 1]}, "ensure_weight_tying": True},
}
STAY_TIED = {"linear layers only", "rows of the tokens", "embeddings saved, kept tied", "low-rank embeddings, kept tied"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("vocabulary") / "llama", "tiny-llama", tied=False)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("vocabulary") / "qwen", "tiny-qwen", tied=True)


@pytest.mark.parametrize("form", FORMS)
def test_a_resized_vocabulary_gives_pefts_merged_model(llama, tmp_path, form):
    model, tokenizer = trained(llama, tmp_path / "a", **FORMS[form])
    report = convert(llama, tmp_path / "m.gguf", tmp_path / "a", dtype="f32")
    assert any(f"{len(tokenizer):,} tokens, the base's {len(tokenizer) - 3:,}" in n for n in report.notes)
    assert_same_logits(tmp_path / "m.gguf", model, len(tokenizer))
    assert_same_logits(tmp_path / "m.gguf", model.merge_and_unload(), len(tokenizer))


@pytest.mark.parametrize("form", TIED)
def test_a_resized_vocabulary_of_tied_weights_gives_the_model_that_was_trained(qwen, tmp_path, form):
    model, tokenizer = trained(qwen, tmp_path / "a", **TIED[form])
    report = convert(qwen, tmp_path / "m.gguf", tmp_path / "a", dtype="f32")
    assert report.tied is (form in STAY_TIED)
    assert_same_logits(tmp_path / "m.gguf", model, len(tokenizer))


@pytest.mark.parametrize("ids", [[5, 3, 7], {"embed_tokens": [5], "lm_head": [3]}, {"embed_tokens": [5, 9], "lm_head": [5, 9]}, {"lm_head": [3, 2]}], ids=str)
@pytest.mark.parametrize("base", ["llama", "qwen"])
def test_trained_rows_of_a_vocabulary_as_it_was(base, tmp_path, request, ids):
    from peft import LoraConfig, get_peft_model

    folder = request.getfixturevalue(base)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=ids))
    scatter(model, lambda key: "lora_" in key or "trainable_tokens_delta" in key)
    model.save_pretrained(tmp_path / "a")
    convert(folder, tmp_path / "m.gguf", tmp_path / "a", dtype="f32")
    rows = model.get_base_model().config.vocab_size
    one = sample(rows)
    used = EncodedSample("0", "", "", "", "", one.prompt_ids, [5, 3, 7, 9, 2, *one.completion_ids])
    with torch.no_grad():
        expected = model.eval()(torch.tensor([used.ids])).logits[0, 7:-1].numpy()
    with Engine(tmp_path / "m.gguf", n_ctx=256, n_seq_max=1, n_threads=1) as engine:
        np.testing.assert_allclose(next(x for _, x in engine.completion_logits([used])), expected, rtol=0, atol=1e-2)
    with pytest.raises(UserError, match=r"has trained tokens|is tied in the base"):
        convert_lora(folder, tmp_path / "lora.gguf", tmp_path / "a")


@pytest.mark.parametrize(("name", "tied"), [("tiny-llama", False), ("tiny-qwen", True), ("tiny-llmjp", False)])
def test_the_parity_gate_passes_a_tokenizer_with_domain_tokens(tmp_path, name, tied):
    base = make_base(tmp_path / "base", name, tied)
    _, tokenizer = trained(base, tmp_path / "a", modules_to_save=["embed_tokens", "lm_head"])
    convert(base, tmp_path / "m.gguf", tmp_path / "a")
    found = gate(tmp_path / "m.gguf", base, tmp_path / "a", texts=TEXTS)
    check_gate(found)
    assert found["ids"]["groups"]["added"]["texts"] == 4 * len(WORDS) and found["ids"]["groups"]["added"]["rate"] == 1
    assert found["stops"] and found["logits"]["kl_mean"] < 1e-4
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    assert fields["tokenizer.ggml.tokens"].contents()[-3:] == WORDS
    types = fields["tokenizer.ggml.token_type"].contents()
    assert types[-3:] == [gguf.TokenType.USER_DEFINED, gguf.TokenType.USER_DEFINED, gguf.TokenType.CONTROL]
    assert len(types) == len(tokenizer)


def test_a_file_without_the_domains_tokens_is_seen(llama, tmp_path):
    trained(llama, tmp_path / "a", modules_to_save=["embed_tokens", "lm_head"])
    convert(llama, tmp_path / "m.gguf", tmp_path / "a", tokenizer_dir=llama)
    tokenizer, _ = model_tokenizer(llama, tmp_path / "a")
    found = parity(tmp_path / "m.gguf", tokenizer, {"domain": TEXTS, "added": added_texts(tokenizer, llama)})
    assert found.groups["domain"]["unexplained"] == 3 and found.groups["added"]["rate"] == 0
    assert found.differences[0]["text"] == TEXTS[0]
    assert added_texts(model_tokenizer(llama)[0], llama) == []


def test_a_smaller_vocabulary_and_one_padded_to_a_round_number(llama, tmp_path):
    rows = len(AutoTokenizer.from_pretrained(llama))
    model, _ = trained(llama, tmp_path / "a", rows=rows + 64, modules_to_save=["embed_tokens", "lm_head"])
    convert(llama, tmp_path / "m.gguf", tmp_path / "a", dtype="f32")
    assert_same_logits(tmp_path / "m.gguf", model, rows + 64)
    assert logits_agreement(tmp_path / "m.gguf", llama, tmp_path / "a", [sample(rows + 64)], n_threads=1).kl_mean < 1e-5


def test_tokens_that_fit_into_unused_rows_need_no_larger_tables(llama, tmp_path):
    """As Qwen's bases have them: more rows than tokens."""
    padded = tmp_path / "padded"
    model = AutoModelForCausalLM.from_pretrained(llama)
    model.resize_token_embeddings(len(AutoTokenizer.from_pretrained(llama)) + 8, mean_resizing=False)
    model.save_pretrained(padded)
    AutoTokenizer.from_pretrained(llama).save_pretrained(padded)
    model, tokenizer = trained(padded, tmp_path / "a", rows=model.config.vocab_size)
    report = convert(padded, tmp_path / "m.gguf", tmp_path / "a", dtype="f32")
    assert any("the tokenizer is the one beside the adapter" in n for n in report.notes)
    tokens = gguf.GGUFReader(tmp_path / "m.gguf").fields["tokenizer.ggml.tokens"].contents()
    assert [tokens.index(w) for w in WORDS] == tokenizer.convert_tokens_to_ids(WORDS)
    assert parity(tmp_path / "m.gguf", tokenizer, {"domain": TEXTS, "added": added_texts(tokenizer, padded)}).rate == 1


# --- what is refused ------------------------------------------------------------------------------------------


def refused(base, adapter, tmp_path):
    with pytest.raises(UserError) as error:
        convert(base, tmp_path / "out" / "m.gguf", adapter)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
    return str(error.value)


def test_new_tokens_without_a_tokenizer_are_refused(llama, tmp_path):
    trained(llama, tmp_path / "a", modules_to_save=["embed_tokens", "lm_head"])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "a" / name).unlink()
    assert "no tokenizer that has them lies beside it" in refused(llama, tmp_path / "a", tmp_path)


def test_a_tokenizer_with_more_ids_than_rows_is_refused(llama, tmp_path):
    trained(llama, tmp_path / "a")
    weights = load_file(tmp_path / "a" / "adapter_model.safetensors")
    save_file({k: v for k, v in weights.items() if "lora_" in k}, tmp_path / "a" / "adapter_model.safetensors")  # the tables are lost
    assert "embedding rows" in refused(llama, tmp_path / "a", tmp_path)


def test_tables_of_two_sizes_are_refused(llama, tmp_path):
    _, tokenizer = trained(llama, tmp_path / "a", modules_to_save=["embed_tokens", "lm_head"])
    weights = load_file(tmp_path / "a" / "adapter_model.safetensors")
    cut = {k: v[:-1].contiguous() if "lm_head" in k else v for k, v in weights.items()}
    save_file(cut, tmp_path / "a" / "adapter_model.safetensors")
    said = refused(llama, tmp_path / "a", tmp_path)
    assert f"({len(tokenizer)}, 64)" in said and f"({len(tokenizer) - 1}, 64)" in said


@pytest.mark.parametrize("ids", [[0, 1], [0, 1, 1], [0, 1, 99_999], [0, 1, -1], ["0", "1", "2"]], ids=str)
def test_ids_that_do_not_fit_their_rows_are_refused(llama, tmp_path, ids):
    trained(llama, tmp_path / "a", trainable_token_indices=[0, 1, 2])
    config = tmp_path / "a" / "adapter_config.json"
    write_json(config, read_json(config) | {"trainable_token_indices": ids})
    assert "trained rows for the ids" in refused(llama, tmp_path / "a", tmp_path)


def test_a_tokenizer_that_gives_the_bases_tokens_other_ids_is_refused(llama, qwen, tmp_path):
    trained(llama, tmp_path / "a", modules_to_save=["embed_tokens", "lm_head"])
    spec = json.loads((tmp_path / "a" / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = spec["model"]["vocab"]
    one, other = list(vocabulary)[300:302]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    (tmp_path / "a" / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False), encoding="utf-8")
    said = refused(llama, tmp_path / "a", tmp_path)
    assert "gives 2 of the base's" in said and "belongs to another model" in said


def test_added_tokens_that_unigram_finds_only_after_a_space_are_refused_with_the_reason(tmp_path):
    base = make_base(tmp_path / "base", "tiny-llmjp", tied=False)
    _, tokenizer = trained(base, tmp_path / "a", normalized=True, modules_to_save=["embed_tokens", "lm_head"])
    token = tokenizer.convert_tokens_to_ids("全熱交換器")  # the reason itself:
    assert token in tokenizer("全熱交換器")["input_ids"] and token not in tokenizer("この全熱交換器")["input_ids"]
    said = refused(base, tmp_path / "a", tmp_path)
    assert "turns 2 of its added tokens into other text, '全熱交換器' into '▁全熱交換器'" in said and "normalized=False" in said


def test_a_unigram_model_beside_which_transformers_saved_bpe_keeps_the_bases_ids(tmp_path):
    """As Sarashina's: tokenizer.model alone, which transformers reads as BPE."""
    import sentencepiece

    base = make_base(tmp_path / "base", "tiny-llama", tied=False)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).unlink()
    lines = [f"設備{i}の点検は{i % 12}か月ごとに行い、記録を{i}年間保存します。The unit {i} is checked every {i % 7} months." for i in range(400)]
    (tmp_path / "text").write_text("\n".join(lines), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(base / "tokenizer"), vocab_size=400, model_type="unigram", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False, minloglevel=2)
    write_json(base / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})
    saved = AutoTokenizer.from_pretrained(base)
    saved.add_tokens([AddedToken(w, normalized=False) for w in WORDS[:2]])
    saved.save_pretrained(tmp_path / "a")
    assert type(saved.backend_tokenizer.model).__name__ == "BPE"
    own, (tokenizer, notes) = load_tokenizer(base), model_tokenizer(base, tmp_path / "a")
    plain = "設備12の点検は6か月ごとに行います。"
    assert tokenizer(plain)["input_ids"] == own(plain)["input_ids"] != saved(plain)["input_ids"]
    assert tokenizer.convert_tokens_to_ids(WORDS[:2]) == [len(own), len(own) + 1] == saved.convert_tokens_to_ids(WORDS[:2])
    assert any("BPE, the 2 added tokens are taken" in n for n in notes)


def test_a_tokenizer_without_a_template_takes_the_bases(llama, tmp_path):
    trained(llama, tmp_path / "a", modules_to_save=["embed_tokens", "lm_head"])
    (tmp_path / "a" / "chat_template.jinja").unlink()
    assert model_tokenizer(llama, tmp_path / "a")[0].chat_template == AutoTokenizer.from_pretrained(llama).chat_template
