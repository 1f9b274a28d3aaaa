"""The gate lets the same model through, and names what differs in any other."""

import json
import os
import struct
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import gguf
import llama_cpp
import pytest
import torch
from safetensors.torch import load_file, save_file

from tsugiki.errors import UserError
from tsugiki.quantize.convert import convert
from tsugiki.quantize.families import FAMILIES
from tsugiki.quantize.gate import GateSettings, check_gate, conversations, gate, measure, read_texts
from tsugiki.quantize.texts import HARD_TEXTS, hard_texts

ROOT = Path(__file__).resolve().parents[1]
BASES = Path(os.environ.get("TSUGIKI_TEST_BASES", ROOT / "recipes" / "bases"))
TEXTS = [t for t in HARD_TEXTS if len(t) > 20][:12]


def tokenizer_of(name="tiny-llama"):
    from transformers import AutoTokenizer

    if not (BASES / name / "tokenizer.json").is_file():
        pytest.skip(f"the bundled base {name} is not there")
    return AutoTokenizer.from_pretrained(BASES / name)


def make_base(folder, tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3 + (weight.dim() == 1))
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("gate") / "base", tokenizer_of())


def copy_of(base, folder):
    folder.mkdir()
    for file in base.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def here(path, base, texts, settings=None):
    """The gate in this process: it saves a child's imports."""
    return measure(str(path), str(base), None, texts, [], None, settings or GateSettings())


def test_the_same_model_passes(base, tmp_path):
    convert(base, tmp_path / "m.gguf")
    found = gate(tmp_path / "m.gguf", base, texts=TEXTS)
    assert found["problems"] == []
    assert found["passed"] is True
    assert found["ids"]["groups"]["hard"]["texts"] == len(hard_texts())
    assert {k: g["rate"] for k, g in found["ids"]["groups"].items()} == {"domain": 1.0, "conversations": 1.0, "hard": 1.0}
    assert found["templates"]["identical"] == found["templates"]["conversations"] == 2 * len(TEXTS)
    assert found["stops"] is True
    assert 0 < found["logits"]["kl_mean"] <= 1e-4
    check_gate(found)
    json.dumps(found, allow_nan=False)


def edited(path, out, edit):
    """The file with other metadata, written by gguf's own writer."""
    reader = gguf.GGUFReader(path)
    values = {k: (f.types, f.contents()) for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    edit(values)
    writer = gguf.GGUFWriter(out, values.pop("general.architecture")[1])
    for key, (types, value) in values.items():
        writer.add_key_value(key, value, types[0], types[-1] if len(types) > 1 else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def test_every_difference_is_named(base, tmp_path):
    convert(base, tmp_path / "m.gguf")

    def edit(values):
        types, tokens = values["tokenizer.ggml.tokens"]
        tokenizer = tokenizer_of()
        one, other = (tokenizer(c, add_special_tokens=False)["input_ids"][0] for c in "のは")
        tokens[one], tokens[other] = tokens[other], tokens[one]
        values["tokenizer.ggml.tokens"] = (types, tokens)
        values["tokenizer.chat_template"] = (values["tokenizer.chat_template"][0], "{{ messages[0]['content'] }}<|eot_id|>")
        values["tokenizer.ggml.add_bos_token"] = (values["tokenizer.ggml.add_bos_token"][0], False)

    found = here(edited(tmp_path / "m.gguf", tmp_path / "e.gguf", edit), base, TEXTS)
    assert found["passed"] is False
    said = "\n".join(found["problems"])
    tokenizer = tokenizer_of()
    swapped = {tokenizer(c, add_special_tokens=False)["input_ids"][0] for c in "のは"}
    first = next(t for t in TEXTS if swapped & set(tokenizer(t)["input_ids"]))
    assert "texts of “domain” differ, first " + repr(first) in said
    assert "transformers [" in said and "llama.cpp [" in said
    assert "conversations are rendered differently, first" in said
    assert "BOS at the start" in said
    assert "logits" not in said  # they are compared on ids
    with pytest.raises(UserError, match="not the same model"):
        check_gate(found)


def test_another_models_logits_do_not_pass(base, tmp_path, monkeypatch):
    monkeypatch.setitem(FAMILIES, "LlamaForCausalLM", replace(FAMILIES["LlamaForCausalLM"], permute=False))
    convert(base, tmp_path / "m.gguf")
    found = here(tmp_path / "m.gguf", base, TEXTS)
    assert len(found["problems"]) == 1
    assert found["problems"][0].startswith("logits: KL ")


def test_a_missing_end_of_turn_is_found(base, tmp_path):
    """A base whose template ends a turn with a token that llama.cpp does not know as an end."""
    tokenizer = tokenizer_of()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|おしまい|>"]})
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}<|おしまい|>{% endfor %}"
    other = make_base(tmp_path / "b", tokenizer)
    convert(other, tmp_path / "m.gguf")
    assert here(tmp_path / "m.gguf", other, TEXTS)["stops"] is True  # convert names it: eot_token_id
    removed = edited(tmp_path / "m.gguf", tmp_path / "e.gguf", lambda values: values.pop("tokenizer.ggml.eot_token_id"))
    found = here(removed, other, TEXTS)
    assert found["problems"] == ["llama.cpp does not end an answer at the template's end-of-turn token"]


def test_generation_ends_at_the_end_of_turn(base, tmp_path):
    """A model that always says the end-of-turn token: llama-cpp-python's own completion says nothing, and stops."""
    folder = copy_of(base, tmp_path / "b")
    weights = load_file(folder / "model.safetensors")
    end = tokenizer_of().convert_tokens_to_ids("<|eot_id|>")
    for name in weights:
        if "o_proj" in name or "down_proj" in name:
            weights[name].zero_()
    weights["model.embed_tokens.weight"].fill_(1.0)
    weights["model.norm.weight"].fill_(1.0)
    weights["lm_head.weight"].zero_()
    weights["lm_head.weight"][end] = 1.0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    convert(folder, tmp_path / "m.gguf")
    model = llama_cpp.Llama(str(tmp_path / "m.gguf"), n_ctx=64, n_threads=1, verbose=False)
    choice = model.create_completion("猫は", max_tokens=20, temperature=0.0)["choices"][0]
    model.close()
    assert (choice["text"], choice["finish_reason"]) == ("", "stop")


def test_differences_for_a_known_reason_are_limited(tmp_path):
    """A Unigram vocabulary does not know every kanji: counted, and too many of them in the domain's own texts refused."""
    other = make_base(tmp_path / "b", tokenizer_of("tiny-llmjp"))
    convert(other, tmp_path / "m.gguf")
    plain = [t for t in TEXTS if not set(t) & set("𠮷𩸽𠀋𡈽𡌛𡑮𡢽𪐷")]
    found = here(tmp_path / "m.gguf", other, [*plain * 20, "𠮷野家で𩸽を食べる"], GateSettings(max_explained=1.0))
    assert found["problems"] == []
    assert found["ids"]["groups"]["domain"]["unknown"] >= 1
    found = here(tmp_path / "m.gguf", other, ["𠮷野家で𩸽を食べる"])
    assert len(found["problems"]) == 1
    assert "1 of 1 texts of “domain” differ for a known reason (unknown), more than 2%" in found["problems"][0]


def test_conversations_have_one_to_three_turns_with_and_without_a_system_prompt():
    talks = conversations(TEXTS, "設備の質問に答える。")
    assert {len([m for m in talk if m["role"] == "user"]) for talk in talks} == {1, 2, 3}
    assert sum(talk[0]["role"] == "system" for talk in talks) == len(talks) / 2
    assert all(a["role"] != b["role"] for talk in talks for a, b in pairwise(talk))


def test_a_hostile_file_never_ends_this_process(base, tmp_path):
    convert(base, tmp_path / "m.gguf")
    data = bytearray((tmp_path / "m.gguf").read_bytes())
    with pytest.raises(UserError):
        gate(tmp_path / "none.gguf", base, texts=TEXTS)
    (tmp_path / "cut.gguf").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="truncated"):
        gate(tmp_path / "cut.gguf", base, texts=TEXTS)
    key = data.index(b"tokenizer.ggml.bos_token_id") + len("tokenizer.ggml.bos_token_id") + 4
    data[key : key + 4] = struct.pack("<I", 0x7FFFFFFF)  # a token that is not there
    (tmp_path / "bos.gguf").write_bytes(data)
    try:
        found = gate(tmp_path / "bos.gguf", base, texts=TEXTS)
    except UserError:
        return
    assert found["passed"] is False


def test_texts_are_read_from_lines_and_samples(tmp_path):
    assert len(read_texts(None)) > 10
    (tmp_path / "a.txt").write_text("一行目\n\n二行目\n", encoding="utf-8")
    assert read_texts(tmp_path / "a.txt") == ["一行目", "二行目"]
    (tmp_path / "a.jsonl").write_text('{"prompt": "問", "completion": "答"}\n', encoding="utf-8")
    assert read_texts(tmp_path / "a.jsonl") == ["問", "答"]
    for name, content in (("b.jsonl", b"{"), ("c.txt", b"\xff\xfe"), ("d.txt", b""), ("e.jsonl", b"[1]")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError):
            read_texts(tmp_path / name)
    with pytest.raises(UserError, match="no text"):
        gate(tmp_path / "x.gguf", tmp_path, texts=[])
