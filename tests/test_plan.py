"""The memory planner: its terms are what torch, PEFT and the optimizer really hold; its choices fit, its refusals do not."""

import contextlib
import functools
import math
import re
import weakref
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AutoConfig, AutoModelForCausalLM

from tsugiki.adapt.loss import batch_loss, in_main_memory, summed_loss
from tsugiki.adapt.plan import (
    GIB,
    LORA_CPU,
    LORA_GPU,
    QLORA,
    activation_bytes,
    adapter_bytes,
    card_bytes,
    linear_shapes,
    nf4_bytes,
    plan,
    predict,
    weight_bytes,
    working_bytes,
)
from tsugiki.bases import profile
from tsugiki.errors import UserError

# The fields of the published configurations that memory depends on.
PUBLISHED = {
    "llama-3-8b": ("llama", {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
                             "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192}),
    "qwen2.5-7b": ("qwen2", {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
                             "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 32768}),
    "qwen2.5-0.5b": ("qwen2", {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
                               "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
                               "max_position_embeddings": 32768}),
    "qwen3-8b": ("qwen3", {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
                           "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960}),
}
SMALL = ({"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2},
         {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4})


@functools.cache
def published(name, folder):
    kind, fields = PUBLISHED[name]
    config = AutoConfig.for_model(kind, **{"tie_word_embeddings": False, **fields})
    config.save_pretrained(folder / name)
    with torch.device("meta"):
        return profile(folder / name), AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("shapes")


@functools.cache
def small(kind, shape, folder, vocabulary=500):
    config = AutoConfig.for_model(kind, **SMALL[shape], vocab_size=vocabulary, tie_word_embeddings=False)
    config.save_pretrained(folder / f"{kind}-{shape}-{vocabulary}")
    return profile(folder / f"{kind}-{shape}-{vocabulary}"), config


def adapted(config, rank, numerics):
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    model = get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM"))
    for p in model.parameters():
        if p.requires_grad and numerics.adapter == 2:
            p.data = p.data.to(torch.bfloat16)
    return model.train()


def passes(numerics):
    return torch.autocast("cpu", dtype=torch.bfloat16) if numerics.autocast else contextlib.nullcontext()


def batch(micro_batch, sequence):
    """Token ids and a mask with some padding, as a batch of unlike lengths has."""
    ids = torch.randint(0, 500, (micro_batch, sequence))
    mask = torch.ones_like(ids)
    mask[-1, -2:] = 0
    return ids, mask


# --- weights, adapter, optimizer ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_bytes_of_the_weights_are_those_of_the_model(name, folder):
    base, model = published(name, folder)
    assert weight_bytes(base, four_bit=False) == sum(p.numel() * p.element_size() for p in model.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_in_four_bits_the_layers_matrices_shrink_and_the_rest_stays(name, folder):
    base, model = published(name, folder)
    expected = 0
    for n, p in model.named_parameters():
        inside = p.ndim == 2 and ".layers." in n
        # of bitsandbytes' tensors: packed pairs, 8-bit magnitudes of 64, float32 ones of 256, an offset, a code of 16
        expected += (p.numel() // 2 + p.numel() // 64 + 4 * math.ceil(p.numel() / 64 / 256) + 4 + 64) if inside else 2 * p.numel()
    assert weight_bytes(base, four_bit=True) == expected


def test_nf4_costs_the_bits_that_the_qlora_paper_states():
    """arXiv:2305.14314, §3: double quantization brings the constants to 8/64 + 32/(64 · 256) = 0.127 bits a parameter."""
    count = 4096 * 14336
    assert 8 * nf4_bytes(count) / count == pytest.approx(4.127, abs=5e-4)


def test_the_adapter_of_llama_3_8b_has_the_parameters_that_peft_prints(folder):
    base, model = published("llama-3-8b", folder)
    lora = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    with torch.device("meta"):
        trained = sum(p.numel() for p in get_peft_model(model, lora).parameters() if p.requires_grad)
    published.cache_clear()  # PEFT changed the model in place
    assert trained == 41_943_040
    assert adapter_bytes(base, 16, four_bit=False)[0] == 4 * trained
    assert adapter_bytes(base, 16, four_bit=True)[:2] == (2 * trained, 2 * trained)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("rank", [4, 16])
def test_adapter_gradients_and_states_are_the_tensors_of_a_real_step(kind, rank, folder):
    base, config = small(kind, 0, folder)
    model = adapted(config, rank, LORA_CPU)
    optimizer = torch.optim.AdamW(trained := [p for p in model.parameters() if p.requires_grad])
    ids, mask = batch(1, 8)
    batch_loss(model, ids, mask, ids, tokens_per_pass=99).backward()
    optimizer.step()
    states = sum(t.nbytes for state in optimizer.state.values() for name, t in state.items() if name != "step")
    assert adapter_bytes(base, rank, four_bit=False) == (sum(p.nbytes for p in trained), sum(p.grad.nbytes for p in trained), states)


def test_eight_bit_states_follow_the_tensors_sizes(folder):
    """Two bytes a parameter and a float32 a block and state; matrices of fewer than 4,096 elements stay in float32."""
    base, _ = small("llama", 0, folder)
    rank, expected = 8, 0
    for o, i in linear_shapes(base):
        for n in (rank * i, rank * o):
            expected += 2 * (n + 4 * math.ceil(n / 256)) if n >= 4096 else 8 * n
    assert adapter_bytes(base, rank, four_bit=True)[2] == base.layers * expected
    assert min(rank * o for o, _ in linear_shapes(base)) < 4096 < rank * base.ffn


# --- activations ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("numerics", [QLORA, LORA_GPU, LORA_CPU], ids=["qlora", "autocast", "cpu"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize(("kind", "shape"), [("llama", 0), ("llama", 1), ("qwen2", 0), ("qwen2", 1)])
def test_saved_activations_are_within_a_tenth_of_those_predicted(kind, shape, checkpointing, numerics, folder):
    base, config = small(kind, shape, folder)
    rank, micro_batch, sequence = (16, 2, 192) if shape == 0 else (8, 3, 96)
    model = adapted(config, rank, numerics)
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    held = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids, mask = batch(micro_batch, sequence)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), passes(numerics):
        kept = model.get_base_model().model(input_ids=ids, attention_mask=mask, use_cache=False)  # noqa: F841
    predicted = activation_bytes(base, rank, micro_batch, sequence, numerics, checkpointing=checkpointing)
    assert predicted == pytest.approx(sum(saved.values()), rel=0.1)


class Allocations(TorchDispatchMode):
    """Bytes of all storages that operations make, the highest at any moment; ``known`` ones count nothing."""

    def __init__(self, known):
        super().__init__()
        self.kept = [t.untyped_storage() for t in known]
        self.sizes = {id(s): 0 for s in self.kept}
        self.live = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in self.sizes:
                    self.sizes[id(storage)] = storage.nbytes()
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self.freed, id(storage))
                    self.peak = max(self.peak, self.live)
        return result

    def freed(self, key):
        self.live -= self.sizes.pop(key, 0)


@pytest.mark.parametrize("numerics", [QLORA, LORA_GPU, LORA_CPU], ids=["qlora", "autocast", "cpu"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("vocabulary", [500, 20_000], ids=["layers", "logits"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_the_peak_of_a_whole_pass_is_within_a_tenth_of_that_predicted(kind, vocabulary, checkpointing, numerics, folder):
    """Every allocation of a forward and a backward pass, the loss included: the layers dominate, or the logits do."""
    base, config = small(kind, 0, folder, vocabulary)
    rank, micro_batch, sequence, learned = 16, 2, 192, 150
    model = adapted(config, rank, numerics)
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    ids, mask = batch(micro_batch, sequence)
    labels = ids.clone()
    labels[:, : sequence - learned] = -100
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    known = [t for p in model.parameters() for t in (p, p.grad) if t is not None]
    with Allocations(known) as allocations:
        with passes(numerics):
            loss = batch_loss(model, ids, mask, labels, tokens_per_pass=10**6)
        loss.backward()
    predicted = activation_bytes(base, rank, micro_batch, sequence, numerics, checkpointing=checkpointing) + working_bytes(
        base, rank, micro_batch, sequence, numerics, checkpointing=checkpointing, four_bit=False, learned=learned
    )
    assert predicted == pytest.approx(allocations.peak, rel=0.1)


def test_more_logits_than_fit_are_computed_in_parts_with_the_same_loss_and_gradients(monkeypatch):
    torch.manual_seed(0)
    head, targets = torch.nn.Linear(8, 50, bias=False), torch.randint(0, 50, (23,))
    whole, parts = (torch.randn(23, 8, generator=torch.Generator().manual_seed(1), requires_grad=True) for _ in range(2))
    expected = summed_loss(head, whole, targets)
    monkeypatch.setattr("tsugiki.adapt.loss.LOGITS_AT_A_TIME", 7 * 50)  # 7, 7, 7 and 2 positions
    found = summed_loss(head, parts, targets)
    expected.backward()
    found.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(parts.grad, whole.grad)


# --- the plan -------------------------------------------------------------------------------------------------


def test_an_eight_billion_base_fits_the_target_of_a_small_card(folder):
    """The target: at most 7.0 GiB at sequence 1,024 and micro-batch 1; measured only where there is a GPU."""
    for name in ("llama-3-8b", "qwen2.5-7b"):
        base, _ = published(name, folder)
        memory = predict(base, sequence=1024, rank=16, micro_batch=1, four_bit=True, checkpointing=True)
        assert memory.allocated <= 7.0 * GIB
        assert plan(base, 8 * GIB, sequence=1024).checkpointing


shapes = st.sampled_from(["llama-3-8b", "qwen2.5-7b", "qwen2.5-0.5b", "qwen3-8b"])


@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(2, 80), st.sampled_from([64, 512, 1024, 4096]), st.sampled_from([4, 16, 64]), st.sampled_from([None, True, False]))
def test_a_plan_fits_its_card_and_the_next_larger_one_does_not(folder, name, gib, sequence, rank, four_bit):
    base, _ = published(name, folder)
    try:
        found = plan(base, gib * GIB, sequence=sequence, rank=rank, four_bit=four_bit)
    except UserError as error:
        assert f"the card has {gib:.2f} GiB" in str(error)
        wanted = four_bit if four_bit is not None else 2 * base.parameters > 4e9
        least = predict(base, sequence=sequence, rank=rank, micro_batch=1, four_bit=wanted, checkpointing=True, offload=True)
        assert least.total > gib * GIB
        return
    asked = {"sequence": sequence, "rank": rank, "four_bit": found.four_bit}
    assert found.memory.total <= gib * GIB
    assert 16 % found.micro_batch == 0
    if found.micro_batch < 16:
        assert predict(base, micro_batch=2 * found.micro_batch, checkpointing=found.checkpointing, offload=found.offload, **asked).total > gib * GIB
    if found.offload:  # only where nothing else fits
        assert found.checkpointing and found.memory.offloaded > 0
        assert predict(base, micro_batch=1, checkpointing=True, **asked).total > gib * GIB
    if found.checkpointing:
        enough = next(m for m in (1, 2, 4, 8, 16) if m * sequence >= 2048 or m == 16)
        assert predict(base, micro_batch=enough, checkpointing=False, **asked).total > gib * GIB


def test_offload_is_chosen_where_it_alone_makes_a_long_sequence_fit(folder):
    """Layer inputs of 32 layers, 2 · 4,096 bytes a token each: 2 GiB at 8,192 tokens."""
    base, _ = published("llama-3-8b", folder)
    without = predict(base, sequence=8192, rank=16, micro_batch=1, four_bit=True, checkpointing=True)
    card = without.total - GIB
    found = plan(base, card, sequence=8192)
    assert (found.checkpointing, found.offload, found.micro_batch) == (True, True, 1)
    assert found.memory.offloaded > without.activations > 2 * GIB
    assert without.allocated - found.memory.allocated == without.activations - 2 * 4096 * 8192
    assert not plan(base, without.total, sequence=8192).offload


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_what_waits_in_main_memory_is_what_was_predicted(kind, folder):
    """Counted at a real pass: every tensor that :func:`in_main_memory` takes, the weights excepted."""
    base, config = small(kind, 0, folder)
    rank, micro_batch, sequence = 16, 2, 192
    model = adapted(config, rank, QLORA)
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    ids, mask = batch(micro_batch, sequence)
    taken = []
    body = model.get_base_model().model
    context = in_main_memory(body)

    def pack(tensor):
        packed = context.pack_hook(tensor)
        if packed[0] is not None:
            taken.append(packed[1].nbytes)
        return packed

    with torch.autograd.graph.saved_tensors_hooks(pack, context.unpack_hook):
        body(input_ids=ids, attention_mask=mask, use_cache=False)
    predicted = predict(base, sequence=sequence, rank=rank, micro_batch=micro_batch, four_bit=True, checkpointing=True, offload=True)
    assert sum(taken) == pytest.approx(predicted.offloaded, rel=0.02)


def test_more_of_anything_needs_more(folder):
    base, _ = published("llama-3-8b", folder)
    asked = {"sequence": 512, "rank": 16, "micro_batch": 2, "four_bit": True, "checkpointing": True}
    least = predict(base, **asked).total
    for change in ({"sequence": 1024}, {"rank": 32}, {"micro_batch": 4}, {"four_bit": False}, {"checkpointing": False}):
        assert predict(base, **{**asked, **change}).total > least


@pytest.mark.parametrize(("card", "sequence", "four_bit"), [(8, 8192, True), (12, 1024, False), (6, 1024, True)])
def test_a_refusal_says_what_would_fit_and_it_does(folder, card, sequence, four_bit):
    base, _ = published("llama-3-8b", folder)
    with pytest.raises(UserError, match=rf"needs [\d.]+ GiB .* the card has {card}.00 GiB") as caught:
        plan(base, card * GIB, sequence=sequence, four_bit=four_bit)
    hint = caught.value.hint
    if shorter := re.search(r"; sequences of ([\d,]+) tokens|: sequences of ([\d,]+) tokens", hint):
        tokens = int((shorter[1] or shorter[2]).replace(",", ""))
        plan(base, card * GIB, sequence=tokens, four_bit=four_bit)
        with pytest.raises(UserError):
            plan(base, card * GIB, sequence=tokens + 64, four_bit=four_bit)
    if "an NF4 base (four_bit)" in hint and "with sequences" not in hint:
        plan(base, card * GIB, sequence=sequence, four_bit=True)
    if rank := re.search(r"rank (\d+)", hint):
        plan(base, card * GIB, sequence=sequence, four_bit=four_bit, rank=int(rank[1]))
    larger = int(re.search(r"a card of (\d+) GB", hint)[1])
    plan(base, larger * GIB, sequence=sequence, four_bit=four_bit)
    with pytest.raises(UserError):
        plan(base, (larger - 1) * GIB, sequence=sequence, four_bit=four_bit)


def test_a_refusal_names_the_bases_that_would_fit(folder):
    base, _ = published("llama-3-8b", folder)
    with pytest.raises(UserError) as caught:
        plan(base, 6 * GIB, sequence=1024, others={"giant": 70_000_000_000, "half": 500_000_000, "small": 3_000_000_000})
    assert re.search(r"a smaller base, of about \d\.\dB parameters in NF4 \(small, half\)", caught.value.hint)


def test_what_cannot_be_planned_is_refused(folder):
    base, _ = published("llama-3-8b", folder)
    with pytest.raises(UserError, match="9,000 tokens is longer than the base's context of 8,192"):
        plan(base, 80 * GIB, sequence=9000)
    with pytest.raises(UserError, match="mixture of experts is not known"):
        plan(replace(base, experts=8), 80 * GIB, sequence=64)
    with pytest.raises(UserError, match="gemma2 is not known"):
        plan(replace(base, model_type="gemma2"), 80 * GIB, sequence=64)
    with pytest.raises(UserError, match="rank must be at least 1, not 0"):
        plan(base, 80 * GIB, sequence=64, rank=0)


def test_the_command_says_what_to_set(folder, monkeypatch, capsys):
    import sys

    from tsugiki.recipes import cli
    from tsugiki.recipes.domains import list_domains, load_domain
    from tsugiki.recipes.recipe import settle

    published("llama-3-8b", folder)
    monkeypatch.setattr(sys, "argv", ["tsugiki", "adapt", "plan", "--base", str(folder / "llama-3-8b"), "--gpu", "8GB"])
    with contextlib.suppress(SystemExit):
        cli.main()
    out = capsys.readouterr().out
    assert re.search(r"base, NF4 +5\.31 *\n", out) and re.search(r"in all +[67]\.\d\d of 8\.00", out)
    changes = re.findall(r"--set (\S+)", out)
    domain = load_domain(str(next(iter(list_domains().values()))))
    fit = settle(domain, changes, large=True).sweep.fit
    assert (fit.rank, fit.batch_size, fit.four_bit, fit.checkpointing) == (16, 16, True, True)
    assert fit.offload is False
    assert fit.micro_batch == int(re.search(r"micro-batch (\d+) of 16", out)[1])


def test_a_hub_that_says_nothing_is_a_sentence(console, monkeypatch):
    def silent(*_, **__):
        raise TimeoutError

    monkeypatch.setattr("huggingface_hub.hf_hub_download", silent)
    code, _, err = console("adapt", "plan", "--base", "swallow-8b")
    assert code == 2 and "the configuration of swallow-8b cannot be had" in err and "TimeoutError" in err


@pytest.mark.parametrize(("text", "size"), [("8GB", 8 * GIB), ("23.5 GiB", int(23.5 * GIB)), ("7800MiB", 7800 * 2**20), ("24", 24 * GIB)])
def test_a_card_is_named_as_its_maker_names_it(text, size):
    assert card_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "0GB", "-8GB", "infGB", "nan", "8TB"])
def test_what_is_no_card_is_refused(text):
    with pytest.raises(UserError, match="is not the size of a card"):
        card_bytes(text)
