"""The engine says what transformers says about the same ids, whatever the batch; broken files get a sentence."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tsugiki.chat import encode, end_of_turn_id
from tsugiki.errors import UserError
from tsugiki.evaluate import engine as engine_module
from tsugiki.evaluate.engine import Engine, check_gguf, thread_count
from tsugiki.quantize.convert import convert
from tsugiki.samples import EncodedSample, Sample

BASE = Path(__file__).resolve().parents[1] / "recipes" / "bases" / "tiny-llama"
PROMPTS = [
    "こんにちは。", "吾輩は猫である。名前はまだ", "ポンプの点検周期は何か月ですか。", "The old man went to the",
    "春はあけぼの。", "東京の天気", "彼は静かに扉を開けて、", "It was a dark and",
]


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(BASE)


@pytest.fixture(scope="module")
def model():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    out = tmp_path_factory.mktemp("gguf") / "model-F16.gguf"
    convert(BASE, out)
    return out


@pytest.fixture(scope="module")
def samples(tokenizer):
    answers = ["分かりません。", "三か月ごとです。", "6", "yes"]
    rows = [Sample(f"s{i}", p, answers[i % 4], f"d{i}") for i, p in enumerate(PROMPTS)]
    return encode(tokenizer, rows)


@pytest.fixture(scope="module")
def engine(path):
    with Engine(path, n_seq_max=4) as opened:
        yield opened


def reference_logits(model, sample):
    """(C, V) float64 log-probabilities of transformers, one sample, no padding."""
    with torch.no_grad():
        logits = model(torch.tensor([sample.ids])).logits[0].double()
    first = len(sample.prompt_ids) - 1
    return logits[first : first + len(sample.completion_ids)].log_softmax(-1).numpy()


def reference_nll(model, sample):
    log_p = reference_logits(model, sample)
    return -sum(log_p[i, t] for i, t in enumerate(sample.completion_ids))


def test_nll_is_that_of_transformers_in_float32(engine, model, samples):
    nll, tokens = engine.completion_nll(samples)
    assert tokens.tolist() == [len(s.completion_ids) for s in samples]
    assert np.allclose(nll / tokens, [reference_nll(model, s) / len(s.completion_ids) for s in samples], atol=2e-3)


def test_a_sample_alone_has_the_nll_that_it_has_in_a_batch(engine, samples):
    batched, _ = engine.completion_nll(samples)
    alone = [engine.completion_nll([s])[0][0] for s in samples]
    assert np.abs(batched - alone).max() < 1e-3


def test_the_order_of_samples_does_not_matter(engine, samples):
    forward, _ = engine.completion_nll(samples)
    backward, _ = engine.completion_nll(samples[::-1])
    assert np.abs(forward - backward[::-1]).max() < 1e-3


def test_logits_come_in_input_order_one_row_a_completion_token(engine, model, samples):
    found = list(engine.completion_logits(samples))
    assert [i for i, _ in found] == list(range(len(samples)))
    for i, logits in found:
        expected = reference_logits(model, samples[i])
        assert logits.dtype == np.float32 and logits.shape == expected.shape
        log_p = torch.tensor(logits).double().log_softmax(-1).numpy()
        assert (np.exp(expected) * (expected - log_p)).sum(axis=1).max() < 1e-4


def test_a_sample_longer_than_a_batch_is_scored_whole(path, model):
    ids = np.random.default_rng(1).integers(300, 6000, 700).tolist()
    long = EncodedSample("long", "", "", "d", "", ids[:600], ids[600:])
    with Engine(path) as engine:
        nll, tokens = engine.completion_nll([long])
    assert tokens[0] == 100
    assert nll[0] / 100 == pytest.approx(reference_nll(model, long) / 100, abs=2e-3)


def test_blocks_hold_no_more_logits_than_stated(engine, samples, monkeypatch):
    whole, _ = engine.completion_nll(samples)
    monkeypatch.setattr(engine_module, "LOGIT_BYTES", 3 * 4 * engine.vocab_size)
    assert all(len(logits) <= 3 for _, logits in engine.logit_blocks(samples))
    assert np.abs(engine.completion_nll(samples)[0] - whole).max() < 1e-3


def greedy(model, prompt, stop, n):
    with torch.no_grad():
        out = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), max_new_tokens=n,
            do_sample=False, eos_token_id=stop, pad_token_id=stop,
        )[0, len(prompt) :].tolist()
    return out[: out.index(stop)] if stop in out else out


def test_greedy_answers_are_those_of_transformers_one_at_a_time(engine, model, samples, tokenizer):
    stop = end_of_turn_id(tokenizer)
    prompts = [s.prompt_ids for s in samples]
    answers = engine.generate(prompts, max_new_tokens=12, stop_ids=[stop])
    # more prompts than slots: freed slots were filled again
    assert len(prompts) > 4
    assert [a.ids for a in answers] == [greedy(model, p, stop, 12) for p in prompts]


def test_a_stream_is_the_same_answer(engine, samples, tokenizer):
    stop = end_of_turn_id(tokenizer)
    whole = engine.generate([samples[1].prompt_ids], max_new_tokens=12, stop_ids=[stop])[0].ids
    assert list(engine.stream(samples[1].prompt_ids, max_new_tokens=12, stop_ids=[stop])) == whole


def test_an_answer_says_why_it_ended(path, engine, samples):
    prompt = samples[1].prompt_ids
    free = engine.generate([prompt], max_new_tokens=6, stop_ids=[])[0]
    assert (len(free.ids), free.finished) == (6, "length")
    stop = free.ids[3]
    stopped = engine.generate([prompt], max_new_tokens=6, stop_ids=[stop])[0]
    assert (stopped.ids, stopped.finished) == (free.ids[: free.ids.index(stop)], "stop")
    with Engine(path, n_ctx=256, n_seq_max=2) as small:
        long = (prompt * 50)[:250]
        answers = small.generate([long, prompt], max_new_tokens=20, stop_ids=[])
    # 250 decoded, 6 more fit, and the last decoded position still predicts one
    assert (len(answers[0].ids), answers[0].finished) == (7, "context")
    assert (len(answers[1].ids), answers[1].finished) == (20, "length")


def test_sampling_repeats_with_its_seed_and_differs_with_another(engine, samples):
    def draw(seed):
        prompts = [s.prompt_ids for s in samples[:3]]
        return [a.ids for a in engine.generate(prompts, max_new_tokens=8, stop_ids=[], temperature=1.0, seed=seed)]

    assert draw(1) == draw(1) != draw(2)


def test_special_ids_and_vocabulary_are_the_tokenizers(engine, tokenizer):
    assert engine.vocab_size == len(tokenizer)
    assert engine.bos == tokenizer.bos_token_id
    assert end_of_turn_id(tokenizer) in (engine.eos, engine.eot)
    assert engine.metadata["general.architecture"] == "llama"
    assert engine.metadata["tokenizer.chat_template"] == tokenizer.chat_template


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=40))
def test_text_survives_the_way_to_ids_and_back(engine, text):
    ids = engine.tokenize(text, special=False)
    assert engine.detokenize(ids) == text
    assert "".join(engine.stream_text(ids)) == text


def test_a_stream_of_text_gives_a_character_when_all_its_bytes_are_there(engine):
    ids = engine.tokenize("😀𠮷")
    assert len(ids) > 2  # several tokens a character
    assert list(engine.stream_text(ids)) == ["😀", "𠮷"]


def test_special_tokens_are_dropped_from_text(engine, tokenizer):
    stop = end_of_turn_id(tokenizer)
    assert engine.detokenize([*engine.tokenize("はい"), stop]) == "はい"


def test_speed_is_measured(engine):
    speed = engine.speed(prompt_tokens=32, gen_tokens=4, repeats=1)
    assert speed.prompt_tok_s > 0 and speed.gen_tok_s > 0


@pytest.mark.parametrize("options", [{"n_ctx": 40}, {"n_ctx": 100, "n_seq_max": 500}, {"n_ctx": 64, "n_seq_max": 8, "separate": True}])
def test_a_tiny_memory_opens_and_answers(path, samples, options):
    with Engine(path, n_threads=1, **options) as engine:
        assert len(engine.generate([samples[0].prompt_ids] * 3, max_new_tokens=2, stop_ids=[])) == 3


def test_memory_grows_with_what_requests_need(path, samples):
    with Engine(path, n_threads=1) as engine:
        assert engine.context == 2048  # what the model was trained for
        engine.generate([samples[0].prompt_ids], max_new_tokens=2, stop_ids=[])
        assert engine.cells == 4096
        ids = np.random.default_rng(0).integers(300, 6000, (5, 40)).tolist()
        engine.generate([*ids, *ids], max_new_tokens=1900, stop_ids=range(6144))
        assert engine.cells > 4096


def test_the_width_is_the_callers_or_falls_with_the_cells_that_answers_need(path, samples):
    with Engine(path, n_seq_max=3, n_threads=1) as engine:
        engine.generate([s.prompt_ids for s in samples], max_new_tokens=2, stop_ids=[])
        assert engine.last_width == 3
    with Engine(path, n_threads=1) as engine:
        widths = [engine.width(cells) for cells in (1, 20, 200, 2000)]
        assert widths == sorted(widths, reverse=True) and widths[0] > 16 and widths[-1] == 4


def test_a_small_model_gets_one_thread(path):
    assert thread_count(path) == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such file"),
        (b"", "0 bytes"),
        (b"PK\x03\x04" + b"\0" * 60, "not a GGUF file"),
        (b"GGUF" + b"\x09\0\0\0" + b"\0" * 40, "version 9"),
        (b"GGUF" + b"\x03\0\0\0" + b"\xff" * 16, "past the end"),
    ],
)
def test_what_is_no_model_is_refused_by_name(tmp_path, content, words):
    path = tmp_path / "bad.gguf"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=words) as error:
        Engine(path)
    assert "bad.gguf" in str(error.value)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.floats(0, 0.99999))
def test_a_file_cut_anywhere_is_refused(path, tmp_path, share):
    data = path.read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(data[: int(share * len(data))])
    with pytest.raises(UserError, match=r"truncated|not a GGUF"):
        check_gguf(cut)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(4, 400), st.integers(0, 255)), min_size=1, max_size=8))
def test_a_damaged_header_is_accepted_or_refused_but_never_crashes_the_check(path, tmp_path, flips):
    data = bytearray(path.read_bytes())
    for at, value in flips:
        data[at] = value
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(data)
    try:
        check_gguf(damaged)
    except UserError as error:
        assert "damaged.gguf" in str(error)


def test_a_file_without_the_tensors_of_its_architecture_gives_llama_cpps_reason(tmp_path):
    import gguf

    path = tmp_path / "empty.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_tensor("other", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match=r"llama\.cpp cannot load it"):
        Engine(path)


def test_a_sample_longer_than_the_context_is_refused_with_both_numbers(path):
    long = EncodedSample("s1", "", "", "d", "", [5] * 290, [6] * 10)
    with Engine(path, n_ctx=256) as engine:
        with pytest.raises(UserError, match="300 tokens; the context holds 256"):
            engine.completion_nll([long])
        with pytest.raises(UserError, match="the context holds 256"):
            engine.generate([long.prompt_ids], max_new_tokens=4, stop_ids=[])


def test_ids_of_another_tokenizer_and_empty_samples_are_refused(engine):
    with pytest.raises(UserError, match="the id 6144; the vocabulary has 6144"):
        engine.completion_nll([EncodedSample("s", "", "", "d", "", [1], [6144])])
    with pytest.raises(UserError, match="0 prompt"):
        engine.completion_nll([EncodedSample("s", "", "", "d", "", [], [5])])
    with pytest.raises(UserError, match="prompt 1 is empty"):
        engine.generate([[5], []], max_new_tokens=2, stop_ids=[])


def test_nothing_to_do_is_nothing_done(engine):
    nll, tokens = engine.completion_nll([])
    assert len(nll) == len(tokens) == 0
    assert engine.generate([], max_new_tokens=4, stop_ids=[]) == []


def test_many_threads_open_engines_at_once(tmp_path):
    """llama.cpp describes its system in one static string: opened together without a lock, the heap was torn now and then."""
    code = (
        "import sys\nfrom concurrent.futures import ThreadPoolExecutor\nfrom tsugiki.evaluate.engine import Engine\n"
        "def opened(_):\n    with Engine(sys.argv[1], n_ctx=256, n_seq_max=1) as engine:\n        return engine.vocab_size\n"
        "with ThreadPoolExecutor(8) as pool:\n    print(*set(pool.map(opened, range(24))))"
    )
    convert(BASE, tmp_path / "m.gguf")
    done = subprocess.run([sys.executable, "-P", "-c", code, str(tmp_path / "m.gguf")], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.split()) == (0, ["6144"]), done.stderr
