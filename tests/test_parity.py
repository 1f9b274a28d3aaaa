"""Token ids of a GGUF equal those of its Hugging Face tokenizer, and where they do not, the user is told."""

import os
import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llama_cpp import Llama
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from tsugiki.chat import end_of_turn_id, prompt_text
from tsugiki.errors import UserError
from tsugiki.quantize.convert import convert
from tsugiki.quantize.parity import Parity, bos_notes, check_bos, logits_agreement, parity, template_texts
from tsugiki.quantize.texts import HARD_TEXTS, SENTENCES
from tsugiki.recipes.pretrain import TINY_BASES, build_model

ROOT = Path(__file__).resolve().parents[1]
BASES = Path(os.environ.get("TSUGIKI_TEST_BASES", ROOT / "recipes" / "bases"))
DATA = Path(os.environ.get("TSUGIKI_DATA", ROOT.parent / "shared" / "data"))


def tokenizer_at(folder):
    from transformers import AutoTokenizer

    if not (folder / "tokenizer.json").is_file():
        pytest.skip(f"there is no tokenizer in {folder.name}")
    return AutoTokenizer.from_pretrained(folder)


def make_gguf(folder, tokenizer, base):
    """A GGUF with this tokenizer and hardly any model."""
    base = replace(base, layers=1, hidden=32, ffn=32, heads=2, kv_heads=2, vocab_size=len(tokenizer))
    build_model(base, tokenizer).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    convert(folder, folder / "model.gguf")
    return folder / "model.gguf"


@pytest.fixture(scope="module", params=["tiny-llama", "tiny-qwen", "tiny-llmjp"])
def pair(request, tmp_path_factory):
    tokenizer = tokenizer_at(BASES / request.param)
    path = make_gguf(tmp_path_factory.mktemp(request.param), tokenizer, TINY_BASES[request.param])
    model = Llama(str(path), vocab_only=True, verbose=False)
    yield request.param, tokenizer, path, model
    model.close()


def known_characters(tokenizer):
    """Characters that have a token of their own in a Unigram vocabulary, space and ASCII included."""
    pieces = [t for t in tokenizer.get_vocab() if len(t) == 1 and t != "▁"]
    return sorted({*pieces, *map(chr, range(1, 128))})


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_text_has_the_same_ids(pair, data):
    name, tokenizer, _, model = pair
    if name == "tiny-llmjp":  # characters outside a Unigram vocabulary are counted, not equal: see below
        text = data.draw(st.text(st.sampled_from(known_characters(tokenizer)), min_size=1, max_size=40))
        # llama.cpp writes no space before a text of spaces only; "<0x0A>" spelled out is a token to Hugging Face
        text = "あ" if not text.strip(" ") else text.replace("<0x", "<0 x")
    else:
        japanese = st.characters(min_codepoint=0x3040, max_codepoint=0x30FF)
        kanji = st.characters(min_codepoint=0x4E00, max_codepoint=0x9FFF)
        anything = st.characters(exclude_categories=("Cs", "Cn"))
        text = data.draw(st.text(st.one_of(japanese, kanji, st.sampled_from("aZ 1９'\n\t　。ー"), anything), max_size=40))
        if name == "tiny-qwen":
            text = unicodedata.normalize("NFC", text)  # Qwen2's normalizer; llama.cpp has none
    found = model.tokenize(text.encode(), add_bos=False, special=True) if text else []
    assert found == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_hard_japanese_sentences_and_conversations(pair):
    name, tokenizer, path, _ = pair
    found = parity(path, tokenizer, {
        "sentences": SENTENCES, "templates": template_texts(tokenizer, SENTENCES, "設備の質問に答える。"),
        "hard": HARD_TEXTS, "hard templates": template_texts(tokenizer, HARD_TEXTS),
    }, most=100)
    assert found.texts == sum(g["texts"] for g in found.groups.values())
    assert found.identical + len(found.differences) == found.texts
    assert found.template
    check_bos(found)
    reasons = {d["reason"] for d in found.differences}
    if name == "tiny-llama":
        assert found.rate == 1.0
    elif name == "tiny-qwen":
        assert {d["text"] for d in found.differences if d["group"] == "hard"} == {
            t for t in HARD_TEXTS if unicodedata.normalize("NFC", t) != t
        }
        assert reasons == {"normalizer"}
    else:
        unexplained = [d["text"] for d in found.differences if d["reason"] != "unknown"]
        assert all("<0x0A>" in text for text in unexplained)
        assert found.unknown == found.texts - found.identical - len(unexplained)
    assert found.groups["sentences"]["rate"] == 1.0
    assert found.groups["templates"]["rate"] == 1.0


def test_a_character_outside_a_unigram_vocabulary_is_reported(pair):
    name, tokenizer, path, _ = pair
    if name != "tiny-llmjp":
        pytest.skip("byte-level BPE knows every character")
    found = parity(path, tokenizer, {"one": ["𠮷野の桜"]})
    assert (found.identical, found.unknown) == (0, 1)
    (difference,) = found.differences
    assert difference["hf_tokens"][0] == "<0xF0>"
    assert difference["gguf_tokens"][0] == tokenizer.unk_token
    assert difference["hf_ids"][difference["at"]] != difference["gguf_ids"][difference["at"]]


def test_a_conversation_has_one_bos_and_ends_at_the_end_of_turn(pair):
    name, tokenizer, _, model = pair
    text = prompt_text(tokenizer, "猫はどこですか。")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    # As llama-cpp-python's own chat does: render the stored template, then add nothing.
    stored = Jinja2ChatFormatter(
        template=model.metadata["tokenizer.chat_template"],
        bos_token=tokenizer.bos_token or "", eos_token=tokenizer.eos_token,
    )(messages=[{"role": "user", "content": "猫はどこですか。"}])
    assert stored.prompt == text
    assert model.tokenize(stored.prompt.encode(), add_bos=not stored.added_special, special=True) == ids
    assert ids.count(tokenizer.bos_token_id) == (0 if name == "tiny-qwen" else 1)
    import llama_cpp

    vocabulary = llama_cpp.llama_model_get_vocab(model._model.model)
    assert llama_cpp.llama_vocab_eot(vocabulary) == end_of_turn_id(tokenizer)
    assert llama_cpp.llama_vocab_is_eog(vocabulary, end_of_turn_id(tokenizer))
    assert llama_cpp.llama_vocab_get_add_eos(vocabulary) is False


def test_two_bos_are_refused():
    bos = {"hf": 1, "gguf": 2, "hf_text": 1, "gguf_text": 1}
    with pytest.raises(UserError, match=r"1 \(transformers\) and 2 \(GGUF\)"):
        check_bos(Parity(1, 1, 0, {}, [], True, bos))


def test_a_second_bos_in_programs_that_add_one_is_noted_not_refused(pair):
    name, tokenizer, path, model = pair
    found = parity(path, tokenizer, {})
    check_bos(found)
    ids = model.tokenize(prompt_text(tokenizer, "猫").encode(), add_bos=True, special=True)
    doubled = ids[:2] == [tokenizer.bos_token_id] * 2
    assert doubled == (name != "tiny-qwen")  # the others put BOS both into the template and before a text
    assert [f"begins it with {n} BOS" in note for n, note in zip((2,), bos_notes(found), strict=False)] == [True] * doubled


def test_another_tokenizer_is_told_from_the_right_one(tmp_path):
    llama, qwen = tokenizer_at(BASES / "tiny-llama"), tokenizer_at(BASES / "tiny-qwen")
    path = make_gguf(tmp_path / "m", llama, TINY_BASES["tiny-llama"])
    found = parity(path, qwen, {"sentences": SENTENCES})
    assert found.identical == 0
    assert not found.template


def test_damaged_files_are_refused(tmp_path):
    (tmp_path / "no.gguf").write_bytes(b"GGUFxxxx")
    with pytest.raises(UserError):
        parity(tmp_path / "no.gguf", None, {})
    with pytest.raises(UserError, match="no samples"):
        logits_agreement(tmp_path / "no.gguf", tmp_path, None, [])


def test_the_real_llmjp_tokenizer_agrees_on_everything_inside_its_vocabulary(tmp_path):
    tokenizer = tokenizer_at(DATA / "tokenizers" / "llm-jp-v2.2")
    path = make_gguf(tmp_path / "m", tokenizer, TINY_BASES["tiny-llmjp"])
    rows = (DATA / "corpora" / "law_qa" / "construction" / "test.jsonl").read_text(encoding="utf-8").splitlines()[:400]
    import json

    texts = [json.loads(row)[field] for row in rows for field in ("instruction", "output")]
    found = parity(path, tokenizer, {"law": texts, "sentences": SENTENCES, "hard": HARD_TEXTS}, most=1000)
    assert found.groups["sentences"]["rate"] == 1.0
    assert found.groups["law"]["rate"] >= 0.98
    assert {d["reason"] for d in found.differences} <= {"unknown"}
