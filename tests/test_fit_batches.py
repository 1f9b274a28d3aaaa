"""How samples share a pass through the model changes no number: packed or padded, activations here or in main memory."""

import functools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tsugiki.adapt import fit as module
from tsugiki.adapt.fit import FitSettings, fit, load_base
from tsugiki.adapt.loss import batch_loss, in_main_memory
from tsugiki.errors import UserError
from tsugiki.samples import EncodedSample

TINY_LLAMA = Path(__file__).resolve().parents[1] / "recipes" / "bases" / "tiny-llama"
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 6144}
LENGTHS = (5, 1, 12, 7, 3, 9)


def adapted(kind, attention):
    torch.manual_seed(3)
    config = AutoConfig.for_model(kind, **SHAPE, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if "norm" in name else 0.0, 0.3)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False))
    return model.train()


def batch():
    """Rows of unlike lengths, one of a single token; the first token of a row is learnt by none."""
    rng = np.random.default_rng(0)
    ids, mask, labels = torch.zeros(6, 12, dtype=torch.long), torch.zeros(6, 12, dtype=torch.long), torch.full((6, 12), -100)
    for row, length in enumerate(LENGTHS):
        ids[row, :length] = torch.from_numpy(rng.integers(0, 6000, length))
        mask[row, :length] = 1
        labels[row, length // 2 : length] = ids[row, length // 2 : length]
    return ids, mask, labels


def loss_and_gradients(model, tokens_per_pass, **options):
    model.zero_grad()
    loss = batch_loss(model, *batch(), tokens_per_pass=tokens_per_pass, **options)
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def row_by_row(model):
    """The reference: transformers' own loss of each row alone, without padding."""
    ids, _, labels = batch()
    model.zero_grad()
    total = 0.0
    for row, length in enumerate(LENGTHS):
        learned = int((labels[row, 1:length] != -100).sum())
        if learned:
            total = total + learned * model(input_ids=ids[row : row + 1, :length], labels=labels[row : row + 1, :length]).loss
    total.backward()
    return total.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("tokens", [99, 13, 1])
def test_packed_rows_see_nothing_of_each_other(kind, attention, tokens):
    """Loss and gradients are those of each row alone: in one pass, in several, and with a row a pass."""
    model = adapted(kind, attention)
    expected, gradients = row_by_row(model)
    for packed in (True, False):
        loss, found = loss_and_gradients(model, tokens, packed=packed)
        assert loss == pytest.approx(expected, rel=1e-6)
        for name, gradient in gradients.items():
            torch.testing.assert_close(found[name], gradient, atol=2e-5 * float(gradient.abs().max()), rtol=0)


def test_rows_that_saw_each_other_would_have_another_loss():
    """What the test above would find: the same long row without positions that begin again."""
    model = adapted("llama", "sdpa")
    ids, _, labels = batch()
    long = torch.cat([ids[row, :length] for row, length in enumerate(LENGTHS)])[None]
    wanted = torch.cat([torch.cat([torch.tensor([-100]), labels[row, 1:length]]) for row, length in enumerate(LENGTHS)])[None]
    blind = batch_loss(model, long, torch.ones_like(long), wanted, tokens_per_pass=99).item()
    assert abs(blind - row_by_row(model)[0]) > 0.1


@pytest.mark.parametrize("packed", [True, False])
def test_a_fit_has_one_loss_curve_packed_or_padded(packed, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "load_base", functools.partial(load_base, exact=True))
    rng = np.random.default_rng(0)
    samples = [EncodedSample(f"s{i}", "問", "答え", "d", "", rng.integers(0, 6000, 20 - i).tolist(), rng.integers(0, 6000, 1 + i).tolist()) for i in range(8)]
    settings = FitSettings(rank=4, alpha=8, batch_size=4, micro_batch=4, max_steps=5, report_to="none")
    _, whole = fit(TINY_LLAMA, AutoTokenizer.from_pretrained(TINY_LLAMA), samples, replace(settings, packing=packed), tmp_path)
    _, alone = fit(TINY_LLAMA, AutoTokenizer.from_pretrained(TINY_LLAMA), samples, replace(settings, micro_batch=1), tmp_path)
    assert whole.losses == pytest.approx(alone.losses, abs=1e-5)


# --- activations in main memory -------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_that_waited_in_main_memory_give_the_same_gradients(checkpointing):
    model = adapted("llama", "sdpa")
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    expected, gradients = loss_and_gradients(model, 99)
    loss, found = loss_and_gradients(model, 99, offload=True)
    assert loss == expected
    assert all(torch.equal(found[name], gradient) for name, gradient in gradients.items())


def test_only_the_weights_stay_where_they_are():
    weight, x = torch.nn.Parameter(torch.randn(4, 3)), torch.randn(2, 3)
    context = in_main_memory(torch.nn.ParameterList([weight]))
    assert context.unpack_hook(context.pack_hook(weight.T)).data_ptr() == weight.data_ptr()
    packed = context.pack_hook(x)
    wanted = x.clone()
    x.zero_()
    assert torch.equal(context.unpack_hook(packed), wanted)


def test_what_needs_a_gpu_is_refused_without_one(tmp_path, monkeypatch):
    if module.device_name() == "cuda":
        pytest.skip("there is a GPU")
    find = module.importlib.util.find_spec
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None if name == "liger_kernel" else find(name))
    tokenizer = AutoTokenizer.from_pretrained(TINY_LLAMA)
    with pytest.raises(UserError) as caught:
        fit(TINY_LLAMA, tokenizer, [], FitSettings(offload=True, liger=True), tmp_path)
    said = str(caught.value)
    assert "offload needs a GPU" in said and "liger needs a GPU" in said and "liger-kernel, which is not installed" in said


def test_offload_stands_with_checkpointing_alone():
    for wrong in ({"checkpointing": False}, {"fsdp": True}):
        with pytest.raises(UserError, match="offload must be left out with fsdp or without checkpointing"):
            FitSettings(offload=True, **wrong)
