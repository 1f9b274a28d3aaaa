"""The NLL of a completion is a property of model and sample: not of batch, order or padding."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from tsugiki.adapt.nll import batches_by_length, bits_per_character, completion_nll
from tsugiki.chat import encode
from tsugiki.errors import UserError
from tsugiki.recipes.pretrain import TINY_BASES, build_model
from tsugiki.samples import EncodedSample, Sample

TINY_LLAMA = Path(__file__).resolve().parents[1] / "recipes" / "bases" / "tiny-llama"
VOCABULARY = 97
SHAPES = {
    "llama, grouped queries": ("tiny-llama", {"heads": 4, "kv_heads": 1}),
    "llama, multi-head": ("tiny-llmjp", {"heads": 4, "kv_heads": 4}),
    "qwen2, biases, tied": ("tiny-qwen", {"heads": 4, "kv_heads": 2}),
    "llama with an adapter": ("tiny-llama", {"heads": 4, "kv_heads": 2}),
    "qwen2 with an adapter": ("tiny-qwen", {"heads": 4, "kv_heads": 2}),
}


def random_model(base, changes):
    """A model whose answers are far from uniform, biases and norms included."""
    special = SimpleNamespace(bos_token_id=0, eos_token_id=1, pad_token_id=2)
    model = build_model(replace(TINY_BASES[base], layers=2, hidden=32, ffn=48, vocab_size=VOCABULARY, **changes), special)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
    return model.float().eval()


def with_adapter(model):
    adapted = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    ).eval()
    assert all(p.abs().sum() > 0 for n, p in adapted.named_parameters() if "lora_B" in n)
    return adapted


def sample(name, prompt, completion):
    return EncodedSample(name, "問", "答え", name, "", list(prompt), list(completion))


def random_samples(count=9, seed=0, longest=40):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, longest // 2, size=(count, 2))
    return [sample(f"s{i}", rng.integers(0, VOCABULARY, a), rng.integers(0, VOCABULARY, b)) for i, (a, b) in enumerate(sizes)]


def token_nats(model, s):
    """Nats of each completion token: one sample at a time, transformers' logits, log-softmax in float64."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([s.ids])).logits[0].double().numpy()
    nats = []
    for position in range(len(s.prompt_ids), len(s.ids)):
        row = logits[position - 1]
        shifted = row - row.max()
        nats.append(math.log(np.exp(shifted).sum()) - shifted[s.ids[position]])
    return nats


@pytest.fixture(scope="module", params=SHAPES)
def model(request):
    built = random_model(*SHAPES[request.param])
    return with_adapter(built) if "adapter" in request.param else built


@pytest.fixture(scope="module")
def llama():
    return random_model("tiny-llama", {"heads": 4, "kv_heads": 2})


def test_equals_a_float64_loop_over_transformers_logits(model):
    samples = random_samples()
    found = completion_nll(model, samples, tokens_per_batch=90)
    expected = [sum(token_nats(model, s)) for s in samples]
    assert np.ptp(expected) > 1  # the samples differ, so that a mix-up would show
    np.testing.assert_allclose(found.nats, expected, atol=1e-4, rtol=0)
    assert found.tokens.tolist() == [len(s.completion_ids) for s in samples]
    assert found.per_token == pytest.approx(sum(expected) / sum(len(s.completion_ids) for s in samples), abs=1e-5)


def test_an_adapter_counts():
    samples = random_samples()
    adapted = with_adapter(random_model("tiny-llama", {"heads": 4, "kv_heads": 2}))
    with adapted.disable_adapter():
        plain = completion_nll(adapted, samples).nats
    assert np.abs(completion_nll(adapted, samples).nats - plain).min() > 1e-3


def test_the_bundled_base_on_japanese_with_its_chat_template():
    tokenizer = AutoTokenizer.from_pretrained(TINY_LLAMA)
    base = AutoModelForCausalLM.from_pretrained(TINY_LLAMA, dtype=torch.float32).eval()
    texts = [("ポンプの点検は？", "三か月ごとに行う。"), ("What is it?", "A pump."), ("圧力は？", "0.7 MPa")]
    samples = encode(tokenizer, [Sample(str(i), q, a, str(i)) for i, (q, a) in enumerate(texts)])
    expected = [sum(token_nats(base, s)) for s in samples]
    np.testing.assert_allclose(completion_nll(base, samples).nats, expected, atol=1e-4, rtol=0)


@given(data=st.data(), tokens_per_batch=st.integers(1, 400))
@settings(max_examples=25, deadline=None)
def test_neither_order_nor_batch_size_matters(llama, data, tokens_per_batch):
    samples = random_samples(12)
    alone = np.asarray([completion_nll(llama, [s]).nats[0] for s in samples])
    order = data.draw(st.permutations(range(len(samples))))
    found = completion_nll(llama, [samples[i] for i in order], tokens_per_batch=tokens_per_batch)
    np.testing.assert_allclose(found.nats, alone[order], atol=1e-4, rtol=0)


def test_a_long_neighbour_and_its_padding_do_not_matter(llama):
    short, long = sample("short", [5], [7, 8]), sample("long", range(60), range(30))
    together = completion_nll(llama, [short, long], tokens_per_batch=10_000)
    assert together.nats[0] == pytest.approx(completion_nll(llama, [short]).nats[0], abs=1e-4)


@given(lengths=st.lists(st.integers(1, 50), max_size=30), budget=st.integers(1, 200))
@settings(deadline=None)
def test_batches_hold_every_sample_once_within_the_budget(lengths, budget):
    batches = batches_by_length(lengths, budget)
    assert sorted(i for b in batches for i in b) == list(range(len(lengths)))
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= budget for b in batches)


def test_the_end_of_turn_token_is_counted(llama):
    whole = sample("a", [3, 1, 4], [15, 9, 26])
    cut = sample("a", [3, 1, 4], [15, 9])
    own = token_nats(llama, whole)[-1]
    difference = completion_nll(llama, [whole]).nats[0] - completion_nll(llama, [cut]).nats[0]
    assert own > 0.01
    assert difference == pytest.approx(own, abs=1e-4)


def test_prompt_tokens_are_not_counted(llama):
    """Moving the border by one token takes away exactly that token's nats, and none of the prompt's."""
    nats = token_nats(llama, sample("a", [3], [1, 4, 15, 9]))
    for border in range(1, 5):
        ids = [3, 1, 4, 15, 9]
        found = completion_nll(llama, [sample("a", ids[:border], ids[border:])])
        assert found.nats[0] == pytest.approx(sum(nats[border - 1 :]), abs=1e-4)
        assert found.tokens[0] == 5 - border


def test_finished_samples_are_reported_as_they_come(llama):
    seen = []
    completion_nll(llama, random_samples(7), tokens_per_batch=60, on_done=seen.append)
    assert seen == sorted(seen) and len(seen) > 1 and seen[-1] == 7


def test_over_long_samples_are_refused_with_both_numbers(llama):
    context = llama.config.max_position_embeddings
    with pytest.raises(UserError, match=rf"sample long has {context + 1} tokens.*{context}"):
        completion_nll(llama, [sample("ok", [1], [2]), sample("long", [1] * context, [2])])


@pytest.mark.parametrize(("prompt", "completion", "which"), [([], [1], "prompt"), ([1], [], "completion")])
def test_empty_parts_are_refused(llama, prompt, completion, which):
    with pytest.raises(UserError, match=f"sample gap has an empty {which}"):
        completion_nll(llama, [sample("ok", [1], [2]), sample("gap", prompt, completion)])


def test_no_sample_is_refused(llama):
    with pytest.raises(UserError, match="no sample"):
        completion_nll(llama, [])


def test_broken_weights_are_refused_with_the_sample():
    broken = random_model("tiny-llama", {"heads": 4, "kv_heads": 2})
    with torch.no_grad():
        broken.get_output_embeddings().weight[0, 0] = float("inf")
    with pytest.raises(UserError, match=r"NLL of sample .* is not finite"):
        completion_nll(broken, random_samples(3))


def test_bits_per_character_counts_the_characters_of_the_completions(llama):
    samples = [replace(s, completion=text) for s, text in zip(random_samples(3), ("はい", "㌧𠮷", "a b"), strict=True)]
    nll = completion_nll(llama, samples)
    assert bits_per_character(nll, samples) == pytest.approx(sum(nll.nats) * math.log2(math.e) / 7, rel=1e-12)
