"""One LoRA fit: the loss is the exact NLL, the adapter learns, and the base stays as it was."""

import functools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from tsugiki.adapt import fit as module
from tsugiki.adapt.fit import FitSettings, add_adapter, fit, load_base
from tsugiki.adapt.nll import completion_nll
from tsugiki.errors import UserError
from tsugiki.recipes.pretrain import TINY_BASES, build_model
from tsugiki.samples import EncodedSample

TINY_LLAMA = Path(__file__).resolve().parents[1] / "recipes" / "bases" / "tiny-llama"
SMALL = FitSettings(rank=4, alpha=8, batch_size=8, micro_batch=8, epochs=5)
LINEAR = {f"self_attn.{p}_proj" for p in "qkvo"} | {f"mlp.{p}_proj" for p in ("gate", "up", "down")}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY_LLAMA)


@pytest.fixture(scope="module", params=["tiny-llama", "tiny-qwen"])
def base(request, tokenizer, tmp_path_factory):
    shape = replace(TINY_BASES[request.param], layers=1, hidden=32, ffn=48, heads=4, kv_heads=2, vocab_size=len(tokenizer))
    model = build_model(shape, tokenizer)
    torch.manual_seed(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if "norm" in name else 0.0, 0.2)
    folder = tmp_path_factory.mktemp(request.param)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def in_float32(monkeypatch):
    """Train in float32, so that losses can be compared with the exact NLL."""
    monkeypatch.setattr(module, "load_base", functools.partial(load_base, exact=True))


def samples(count=8):
    """Short answers to long prompts, no two of one length, so that a mean of means would show."""
    rng = np.random.default_rng(0)
    return [
        EncodedSample(f"s{i}", "問", "答え", "d", "", rng.integers(0, 6000, 20 - i).tolist(), rng.integers(0, 6000, 1 + i).tolist())
        for i in range(count)
    ]


def base_parameters(model):
    return {
        n.replace("base_model.model.", "").replace(".base_layer", ""): p.detach()
        for n, p in model.named_parameters() if "lora_" not in n
    }


def adapter_parameters(model):
    return {n: p.detach() for n, p in model.named_parameters() if "lora_" in n}


@pytest.mark.parametrize("micro_batch", [8, 2])
def test_the_loss_is_the_exact_nll_of_the_completions(base, tokenizer, tmp_path, in_float32, micro_batch):
    """The first logged loss is a mean of five steps; at a vanishing rate each is the base's own."""
    _, report = fit(base, tokenizer, samples(), replace(SMALL, learning_rate=1e-12, micro_batch=micro_batch), tmp_path)
    model = load_base(base, exact=True).eval()
    exact = completion_nll(model, samples())
    of_samples = np.mean(exact.nats / exact.tokens)
    of_whole_texts = completion_nll(model, [replace(s, prompt_ids=s.ids[:1], completion_ids=s.ids[1:]) for s in samples()])
    assert abs(exact.per_token - of_samples) > 1e-3 and abs(exact.per_token - of_whole_texts.per_token) > 1e-3
    assert report.losses == [pytest.approx(exact.per_token, abs=1e-4)]


def test_a_pad_token_that_is_the_end_of_turn_hides_no_end_of_turn(base, tokenizer, tmp_path, in_float32):
    """Padding is known by its place: many bases pad with the token that ends a turn, and it must be learnt all the same."""
    end = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    ended = [replace(s, completion_ids=[*s.completion_ids, end]) for s in samples()]
    losses = []
    for name in ("<|eot_id|>", tokenizer.pad_token):
        padded = AutoTokenizer.from_pretrained(TINY_LLAMA)
        padded.pad_token = name
        assert (padded.pad_token_id == end) == (name == "<|eot_id|>")
        _, report = fit(base, padded, ended, replace(SMALL, learning_rate=1e-12), tmp_path / str(padded.pad_token_id))
        losses.append(report.losses)
    exact = completion_nll(load_base(base, exact=True).eval(), ended).per_token
    assert losses == [[pytest.approx(exact, abs=1e-4)]] * 2


def test_accumulated_steps_learn_the_same_as_whole_ones(base, tokenizer, tmp_path, in_float32):
    _, whole = fit(base, tokenizer, samples(), SMALL, tmp_path / "a")
    _, split = fit(base, tokenizer, samples(), replace(SMALL, micro_batch=4), tmp_path / "b")
    assert split.losses == pytest.approx(whole.losses, abs=1e-4)
    assert split.steps == whole.steps == 5


def test_every_adapter_parameter_moves_and_no_base_parameter_does(base, tokenizer, tmp_path):
    trained, _ = fit(base, tokenizer, samples(), SMALL, tmp_path, seed=3)
    start = adapter_parameters(add_adapter(load_base(base), SMALL, seed=3))
    moved = adapter_parameters(trained)
    assert moved.keys() == start.keys()
    assert all(not torch.equal(moved[n], start[n]) for n in start)
    assert all(p.dtype == torch.float32 for p in moved.values())
    original, after = base_parameters(load_base(base)), base_parameters(trained)
    assert after.keys() == original.keys()
    assert all(torch.equal(after[n], original[n]) for n in original)
    assert not trained.training


def test_all_linear_layers_but_the_output_are_adapted(base):
    adapted = add_adapter(load_base(base), SMALL, seed=0)
    names = {n.split(".layers.0.")[-1].split(".lora_A")[0] for n in adapter_parameters(adapted) if "lora_A" in n}
    assert names == LINEAR


def test_a_fit_lowers_the_nll_of_what_it_saw(base, tokenizer, tmp_path):
    trained, report = fit(base, tokenizer, samples(), replace(SMALL, epochs=10, learning_rate=2e-2), tmp_path)
    before = completion_nll(load_base(base, exact=True).eval(), samples()).per_token
    assert report.losses[-1] < before - 0.5
    assert completion_nll(trained, samples()).per_token < before - 0.5


def test_the_seed_fixes_a_fit(base, tokenizer, tmp_path):
    batches = replace(SMALL, batch_size=4, micro_batch=4, epochs=3)  # six steps in an order of their own
    runs = [fit(base, tokenizer, samples(), batches, tmp_path / str(i), seed=seed) for i, seed in enumerate((0, 0, 1))]
    assert runs[0][1].losses == runs[1][1].losses != runs[2][1].losses
    first, same, other = (adapter_parameters(model) for model, _ in runs)
    assert all(torch.equal(first[n], same[n]) for n in first)
    assert any(not torch.equal(first[n], other[n]) for n in first)


def test_the_report_counts_tokens_and_steps(base, tokenizer, tmp_path):
    _, report = fit(base, tokenizer, samples(7), replace(SMALL, batch_size=4, micro_batch=4, epochs=2), tmp_path)
    assert report.train_tokens == 2 * 7 * 21
    assert report.steps == 2 * math.ceil(7 / 4)
    assert report.seconds > 0
    assert report.peak_rss > 50_000_000


def test_progress_is_written_where_the_parent_reads_it(base, tokenizer, tmp_path):
    fit(base, tokenizer, samples(), SMALL, tmp_path / "work", progress_file=tmp_path / "p.json")
    from tsugiki.artifacts import read_json

    assert read_json(tmp_path / "p.json").items() >= {"step": 5, "steps": 5}.items()


@pytest.mark.parametrize("epochs", [1, 5])
def test_a_loss_that_is_not_finite_is_refused_however_short_the_fit(base, tokenizer, tmp_path, epochs):
    for file in base.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.norm.weight"][0] = float("inf")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"loss is (nan|inf)") as caught:
        fit(tmp_path, tokenizer, samples(), replace(SMALL, epochs=epochs), tmp_path / "work")
    assert "learning_rate" in caught.value.hint


def test_no_sample_is_refused(tokenizer, tmp_path):
    with pytest.raises(UserError, match="no sample"):
        fit(TINY_LLAMA, tokenizer, [], SMALL, tmp_path)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rank": 0}, "rank must be at least 1, not 0"),
        ({"alpha": 0}, "alpha must be above 0, not 0"),
        ({"dropout": 1.0}, "dropout must be from 0 to below 1, not 1.0"),
        ({"learning_rate": 2.0}, "learning_rate must be between 0 and 1, not 2.0"),
        ({"learning_rate": math.nan}, "learning_rate must be between 0 and 1, not nan"),
        ({"epochs": 0}, "epochs must be at least 1, not 0"),
        ({"micro_batch": 64, "batch_size": 32}, r"micro_batch must be a divisor of batch_size \(32\), not 64"),
        ({"micro_batch": 32, "batch_size": 48}, r"micro_batch must be a divisor of batch_size \(48\), not 32"),
        ({"warmup": -0.1}, "warmup must be from 0 to below 1, not -0.1"),
    ],
)
def test_settings_that_cannot_be_are_refused_with_both_numbers(wrong, message):
    with pytest.raises(UserError, match=message):
        FitSettings(**wrong)


def test_all_wrong_settings_are_named_at_once():
    with pytest.raises(UserError, match=r"rank .*epochs .*warmup"):
        FitSettings(rank=0, epochs=0, warmup=1.0)


def test_four_bits_need_a_gpu(base):
    if module.device_name() == "cuda":
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match="four_bit needs a GPU"):
        load_base(base, four_bit=True)


def test_four_bits_need_bitsandbytes(base, monkeypatch):
    find = module.importlib.util.find_spec
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    monkeypatch.setattr(module, "device_name", lambda: "cuda")
    with pytest.raises(UserError, match="bitsandbytes, which is not installed") as caught:
        load_base(base, four_bit=True)
    assert "tsugiki[gpu]" in caught.value.hint
