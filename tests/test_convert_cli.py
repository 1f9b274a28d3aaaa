"""quantize convert and quantize parity as a user types them."""

import json
import os
from pathlib import Path

import gguf
import pytest

ROOT = Path(__file__).resolve().parents[1]
BASE = Path(os.environ.get("TSUGIKI_TEST_BASES", ROOT / "recipes" / "bases")) / "tiny-qwen"


@pytest.fixture
def tsugiki_(console, monkeypatch):
    """The console script, where the base that these tests convert is there."""
    if not (BASE / "model.safetensors").is_file():
        pytest.skip("the bundled base tiny-qwen is not there")
    monkeypatch.setenv("COLUMNS", "120")
    return console


def make_adapter(folder):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(BASE)
    get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(folder)
    return folder


def test_convert_writes_what_it_is_told(tsugiki_, tmp_path):
    code, _, said = tsugiki_("quantize", "convert", "--base", BASE, "--out", "m.gguf", "--dtype", "bf16", "--name", "設備",
                             "--licence", "mit", "--dataset", "one", "--dataset", "two")
    assert code == 0, said
    assert "m.gguf: " in said
    value = {k: f.contents() for k, f in gguf.GGUFReader(tmp_path / "m.gguf").fields.items()}
    assert (value["general.name"], value["general.license"], value["general.dataset.count"]) == ("設備", "mit", 2)
    assert value["general.dataset.1.name"] == "two"
    assert value["general.file_type"] == gguf.LlamaFileType.MOSTLY_BF16


def test_the_adapter_alone(tsugiki_, tmp_path):
    code, _, said = tsugiki_("quantize", "convert", "--base", BASE, "--out", "a.gguf", "--lora-only")
    assert code == 2
    assert "Add --adapter DIR." in said
    adapter = make_adapter(tmp_path / "adapter")
    code, _, said = tsugiki_("quantize", "convert", "--base", BASE, "--out", "a.gguf", "--adapter", adapter, "--lora-only")
    assert code == 0, said
    assert gguf.GGUFReader(tmp_path / "a.gguf").fields["general.type"].contents() == "adapter"


def test_parity_says_what_was_compared_and_refuses_another_model(tsugiki_, tmp_path):
    tsugiki_("quantize", "convert", "--base", BASE, "--out", "m.gguf")
    code, out, said = tsugiki_("quantize", "parity", "m.gguf", "--base", BASE, "--json", "parity.json")
    assert code == 0, said
    assert "conversations rendered alike" in out
    assert "llama.cpp stops there" in out
    assert json.loads((tmp_path / "parity.json").read_text())["passed"] is True
    other = BASE.parent / "tiny-llama"
    if not (other / "model.safetensors").is_file():
        return
    code, _, said = tsugiki_("quantize", "parity", "m.gguf", "--base", other)
    assert code == 2
    assert "other vocabulary" in said or "not the same model" in said or "another base" in said


def test_a_base_without_a_template_gets_its_familys_and_stops_there(tsugiki_, tmp_path, monkeypatch):
    from tsugiki.recipes import recipe

    (tmp_path / "base").mkdir()
    for file in BASE.iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / "base" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "bases.yaml").write_text(
        "mine: {path: base, family: qwen2, architecture: Qwen2ForCausalLM, licence: mit, chat_template: supplied, languages: [ja]}\n"
    )
    monkeypatch.setattr(recipe, "BASES", tmp_path / "bases.yaml")
    code, _, said = tsugiki_("quantize", "convert", "--base", "mine", "--out", "m.gguf")
    assert code == 0, said
    value = {k: f.contents() for k, f in gguf.GGUFReader(tmp_path / "m.gguf").fields.items()}
    assert value["tokenizer.ggml.tokens"][value["tokenizer.ggml.eot_token_id"]] == "<|im_end|>"
    assert "<|im_start|>" in value["tokenizer.chat_template"]
    assert (value["general.name"], value["general.languages"]) == ("mine", ["ja"])
    code, out, said = tsugiki_("quantize", "parity", "m.gguf", "--base", "mine")
    assert code == 0, said
    assert "llama.cpp stops there" in out


def test_a_claim_about_a_level_is_one_command(tsugiki_, tmp_path):
    rows = [{"prompt": f"{i}番の部品の名前は何ですか。", "completion": f"部品{i}です。", "document": f"d{i}"} for i in range(12)]
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    code, out, said = tsugiki_("quantize", "claim", "--base", BASE, "--samples", "qa.jsonl", "--level", "Q4_K_M", "--out", "claim",
                               "--max-new-tokens", "4")
    assert code == 0, said
    assert "llama.cpp stops there" in out and "domain: 12 samples" in out
    found = json.loads((tmp_path / "claim" / "check.json").read_text())
    assert [r["level"] for r in found["levels"]] == ["F16", "Q4_K_M"] and found["levels"][1]["delta_ci"] is not None
    assert json.loads((tmp_path / "claim" / "parity.json").read_text())["passed"] is True
    assert gguf.GGUFReader(tmp_path / "claim" / "model-Q4_K_M.gguf").fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q4_K_M
