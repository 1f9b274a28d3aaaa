"""The loss is put down to the step that did it: adapter, merge, conversion, quantization."""

from pathlib import Path

import numpy as np
import pytest

from tsugiki.chat import encode
from tsugiki.errors import UserError
from tsugiki.quantize.attribution import attribute
from tsugiki.quantize.convert import convert
from tsugiki.quantize.levels import make_level
from tsugiki.quantize.standalone import CheckFiles, check_files
from tsugiki.samples import Sample

BASES = Path(__file__).resolve().parents[1] / "recipes" / "bases"
BASE = BASES / "tiny-llama"


def make_adapter(base, folder):
    """An adapter that changes the model: both of its matrices random."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False,
                        task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.03)
    model.save_pretrained(folder)
    return model.eval()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("steps")
    model = make_adapter(BASE, folder / "adapter")
    files = {"F16": folder / "F16.gguf", "Q8_0": folder / "Q8_0.gguf", "Q3_K_M": folder / "Q3_K_M.gguf"}
    convert(BASE, files["F16"], folder / "adapter")
    for level in ("Q8_0", "Q3_K_M"):
        make_level(files["F16"], level, files[level])
    rows = [Sample(f"s{i}", f"{i}番の部品の名前は何ですか。", f"部品{i}です。", f"d{i}") for i in range(12)]
    return folder, model, files, encode(AutoTokenizer.from_pretrained(BASE), rows)


def log_p(model, samples):
    """Log-probabilities of the completion positions by transformers and PEFT, unmerged, in float64."""
    import torch

    found = []
    with torch.no_grad():
        for s in samples:
            logits = model(torch.tensor([s.ids])).logits[0, len(s.prompt_ids) - 1 : -1].double().numpy()
            found.append(logits - np.logaddexp.reduce(logits, axis=1)[:, None])
    return np.concatenate(found)


def test_a_sound_export_loses_only_to_the_quantizer(made):
    folder, model, files, samples = made
    found = attribute(BASE, folder / "adapter", files, samples)
    steps = {r["step"]: r for r in found["steps"]}
    assert [(r["step"], r["before"]) for r in found["steps"]] == [
        ("adapter", None), ("merged", "adapter"), ("F16", "merged"), ("Q8_0", "F16"), ("Q3_K_M", "F16"),
    ]
    expected = log_p(model, samples)
    targets = np.concatenate([s.completion_ids for s in samples])
    nll = -expected[np.arange(len(targets)), targets].mean()
    assert found["tokens"] == len(targets) and found["samples"] == len(samples)
    assert steps["adapter"]["nll"] == pytest.approx(nll, rel=1e-5)
    assert steps["merged"]["nll"] == pytest.approx(nll, rel=1e-5) and steps["merged"]["kld_max"] < 1e-6
    assert steps["F16"]["kld_mean"] < 1e-4 and abs(steps["F16"]["delta_nll"]) < 1e-3
    assert steps["F16"]["kld_mean"] < steps["Q8_0"]["kld_mean"] < steps["Q3_K_M"]["kld_mean"]
    assert found["largest"] == "Q3_K_M" and steps["Q3_K_M"]["delta_ci"] is not None


def test_a_forgotten_merge_shows_at_the_conversion(made, tmp_path):
    folder, model, _, samples = made
    forgotten = tmp_path / "F16.gguf"
    convert(BASE, forgotten)
    found = attribute(BASE, folder / "adapter", {"F16": forgotten}, samples)
    with model.disable_adapter():
        q = log_p(model, samples)
    p = log_p(model, samples)
    assert found["largest"] == "F16"
    assert found["steps"][2]["kld_mean"] == pytest.approx((np.exp(p) * (p - q)).sum(axis=1).mean(), rel=1e-2)


def test_a_reference_that_is_not_f16_is_called_what_it_is(made, tmp_path):
    folder, _, files, _ = made
    (tmp_path / "ja.txt").write_text("水は百度で沸きます。設備の点検は六か月ごとに行います。" * 40, encoding="utf-8")
    job = CheckFiles(files["Q8_0"], (files["Q3_K_M"],), texts=(f"ja={tmp_path / 'ja.txt'}",), window=64, windows=2, model=BASE, adapter=folder / "adapter")
    steps = check_files(job)["attribution"]["steps"]
    assert [(r["step"], r["before"]) for r in steps] == [("adapter", None), ("merged", "adapter"), ("Q8_0", "merged"), ("Q3_K_M", "Q8_0")]
    assert 1e-7 < steps[2]["kld_mean"] < steps[3]["kld_mean"]


def test_without_an_adapter_the_base_itself_is_the_first_step(made, tmp_path):
    *_, samples = made
    convert(BASE, tmp_path / "F16.gguf")
    found = attribute(BASE, None, {"F16": tmp_path / "F16.gguf"}, samples[:4])
    assert [r["step"] for r in found["steps"]] == ["model", "F16"] and found["steps"][1]["kld_mean"] < 1e-4


def test_an_adapter_of_another_base_is_refused_in_a_sentence(made, tmp_path):
    _, _, files, samples = made
    make_adapter(BASES / "tiny-llmjp", tmp_path / "adapter")
    with pytest.raises(UserError, match="may belong to another base"):
        attribute(BASE, tmp_path / "adapter", {"F16": files["F16"]}, samples[:2])


def test_what_is_missing_is_named_at_once(made, tmp_path):
    _, _, files, samples = made
    with pytest.raises(UserError, match=r"2 problem\(s\)[\s\S]*config\.json[\s\S]*adapter_config\.json"):
        attribute(tmp_path, tmp_path, {"F16": files["F16"]}, samples)


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen"])  # untied, and tied with biases
def test_a_base_held_in_16_bits_computes_in_float32(name, tmp_path):
    """Two bytes a parameter, bit for bit the logits of a float32 load; merging too is done in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tsugiki.quantize.parity import load_reference, merge_reference, reference_bytes

    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(BASES / name, dtype=torch.bfloat16).save_pretrained(base)
    make_adapter(base, tmp_path / "adapter")
    ids = AutoTokenizer.from_pretrained(BASES / name)("建築物の敷地は、道より高くなければならない。", return_tensors="pt")["input_ids"]
    wide, narrow = load_reference(base, tmp_path / "adapter"), load_reference(base, tmp_path / "adapter", narrow=True)
    own = [p for n, p in narrow.named_parameters() if "lora_" not in n]
    assert {p.dtype for p in own} == {torch.bfloat16}
    assert reference_bytes(base, tmp_path / "adapter") == 2 * sum(p.numel() for p in own) + 8 * max(p.numel() for p in own)
    with torch.no_grad():
        assert torch.equal(wide(ids).logits, narrow(ids).logits)
        assert {p.dtype for p in own} == {torch.bfloat16}  # put back
        plain = load_reference(base, None, narrow=True)(ids).logits
        merged = [merge_reference(m)(ids).logits for m in (wide, narrow)]
        again = narrow(ids).logits
    assert torch.equal(*merged) and torch.equal(again, merged[1])
    assert (merged[1] - plain).abs().max() > 0.1


def test_without_memory_the_steps_are_left_out(made, monkeypatch):
    folder, _, files, samples = made
    monkeypatch.setattr("tsugiki.quantize.attribution.available_memory", lambda: 1 << 30)
    assert "1.1 GB are free" in attribute(BASE, folder / "adapter", files, samples)["left_out"]


def test_what_cannot_be_added_beside_16_bits_is_loaded_in_float32(tmp_path):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from tsugiki.quantize.parity import stored_dtype

    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    assert stored_dtype(tmp_path / "base", None) == "bfloat16"
    for i, more in enumerate(({"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"target_modules": ["embed_tokens"]})):
        settings = LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | more)
        made = get_peft_model(AutoModelForCausalLM.from_pretrained(BASE), settings)
        made.save_pretrained(tmp_path / str(i))
        assert stored_dtype(tmp_path / "base", tmp_path / str(i)) is None
