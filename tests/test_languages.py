"""Language shares: labels on labelled text, `und` where nothing is known, one answer whatever the shards."""

import json
import os
import shutil
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, kendalltau

from tsugiki.artifacts import read_json
from tsugiki.errors import UserError
from tsugiki.evaluate import languages
from tsugiki.evaluate.engine import Engine
from tsugiki.evaluate.languages import (
    LanguageSettings,
    count_languages,
    estimate_languages,
    generate_languages,
    identify,
    kendall_tau_b,
    parse_shard,
    read_distribution,
    start_token,
    summarise,
    table3,
    token_bytes,
    wilson,
)
from tsugiki.quantize.convert import convert

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / "recipes" / "bases" / "tiny-llama"
MIXES = Path(os.environ.get("TSUGIKI_DATA", ROOT.parent / "shared" / "data")) / "corpora" / "lang_ratio_check"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    out = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    convert(BASE, out)
    return out


def run(path, out, **changes):
    settings = LanguageSettings(**{"sequences": 10, "tokens": 24, "width": 4, **changes})
    generate_languages(path, settings, out, n_threads=1)
    return {p.name: [json.loads(line) for line in p.open(encoding="utf-8")][1:] for p in sorted((out / "chunks").iterdir())}


# --- identification -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", " \n\t", "12345 67.8", "😀😀", "HELLO WORLD", "Hello, world!"])
def test_text_without_a_known_n_gram_is_und(text):
    assert identify([text])[0][0] == "und"


def test_text_with_known_n_grams_has_the_label_of_fasttext():
    found = identify(["吾輩は猫である。", "hello world this is a test", "Der alte Mann ging\nlangsam nach Hause."])
    assert [label for label, _ in found] == ["ja", "en", "de"]
    assert found[1][1] == pytest.approx(0.94, abs=0.005)  # fastText's own value
    assert all(0 < p <= 1 for _, p in found)


@pytest.mark.skipif(not MIXES.is_dir(), reason="no shared data")
@pytest.mark.parametrize("mix", ["mix_ja000", "mix_ja010", "mix_ja050", "mix_ja090", "mix_ja100"])
def test_shares_by_line_are_those_of_labelled_mixes(mix):
    rows = [json.loads(line) for line in (MIXES / f"{mix}.jsonl").open(encoding="utf-8")]
    truth = json.loads((MIXES / "TRUTH.json").read_text(encoding="utf-8"))[mix]["ja_byte_share"]
    got = Counter()
    right = 0
    for row, (label, _) in zip(rows, identify([r["text"] for r in rows]), strict=True):
        got[label] += len(row["text"].encode())
        right += label == row["lang"]
    assert got["ja"] / got.total() == pytest.approx(truth, abs=0.005)
    assert got["und"] / got.total() < 0.005
    assert right / len(rows) > 0.99


# --- counting -------------------------------------------------------------------------------------------------

PIECES = [b"", b"", "吾輩は".encode(), "猫である。".encode(), "名前はまだ無い。".encode(), b"\n", b"The old man ",
          b"went to the ", b"house of his mother.", b"12345", b".\n", "猫".encode()[:1], "猫".encode()[1:]]
BOS, EOS = 0, 1


def test_tokens_are_counted_by_the_language_of_their_line():
    ids = [2, 3, 4, 5, 6, 7, 8, 10, 5, 9, 5, EOS, BOS, 2, 3, 4]
    row, = count_languages([ids], PIECES, frozenset({BOS, EOS}))
    tokens = {label: sum(v[3:]) for label, v in row["lines"].items()}
    # ja 3 and its line end; en 4 and the blank line after it; the number and its line end; ja 3; EOS and BOS nowhere
    assert tokens == {"ja": 4 + 3, "en": 5, "und": 2}
    assert row["lines"]["ja"][:3] == [2, 32, 96]
    assert row["lines"]["en"][:3] == [1, 45, 45]
    assert row["first"] == row["label"] == "ja"
    assert {k: v[1] for k, v in row["documents"].items()} == {"ja": 1} and row["documents"]["ja"][0] == 14


def test_a_character_split_over_tokens_is_read_whole():
    row, = count_languages([[2, 11, 12]], PIECES, frozenset({BOS, EOS}))
    assert [v[:3] for v in row["lines"].values()] == [[1, 4, 12]]


@given(st.lists(st.lists(st.integers(0, len(PIECES) - 1), max_size=30), max_size=4))
@settings(deadline=None)
def test_every_token_that_is_not_special_is_counted_once(sequences):
    rows = count_languages(sequences, PIECES, frozenset({BOS, EOS}))
    for ids, row in zip(sequences, rows, strict=True):
        plain = sum(i not in (BOS, EOS) for i in ids)
        assert sum(sum(v[3:]) for v in row["lines"].values()) == plain
        assert sum(v[0] for v in row["documents"].values()) == plain
        # bytes without line ends
        assert sum(v[2] for v in row["lines"].values()) == sum(
            len(line) for line in b"".join(PIECES[i] or b"\n" for i in ids).split(b"\n") if line.strip())


# --- the run --------------------------------------------------------------------------------------------------


def test_shards_together_are_the_whole_run_and_a_killed_run_goes_on(path, tmp_path, monkeypatch):
    monkeypatch.setattr(languages, "CHUNK", 4)
    whole = run(path, tmp_path / "whole")
    assert [len(rows) for rows in whole.values()] == [4, 4, 2]
    first = run(path, tmp_path / "first", shard=1, shards=2)
    second = run(path, tmp_path / "second", shard=2, shards=2)
    assert {**first, **second} == whole and not first.keys() & second.keys()
    (tmp_path / "whole" / "chunks" / "000001.jsonl").unlink()
    kept = (tmp_path / "whole" / "chunks" / "000000.jsonl").stat().st_mtime_ns
    assert run(path, tmp_path / "whole") == whole
    assert (tmp_path / "whole" / "chunks" / "000000.jsonl").stat().st_mtime_ns == kept
    for chunk in (tmp_path / "second" / "chunks").iterdir():
        shutil.copy(chunk, tmp_path / "first" / "chunks")
    assert summarise(tmp_path / "first", resamples=20)["languages"] == summarise(tmp_path / "whole", resamples=20)["languages"]


def test_another_seed_writes_other_text_and_chunks_differ(path, tmp_path, monkeypatch):
    monkeypatch.setattr(languages, "CHUNK", 4)
    examples = {
        json.loads((tmp_path / out / "chunks" / name).open(encoding="utf-8").readline())["example"]
        for out, seed in (("a", 0), ("b", 1)) for name in run(path, tmp_path / out, seed=seed)
    }
    assert len(examples) == 6


def test_generation_goes_on_after_the_end_of_a_document(path):
    with Engine(path, n_ctx=1024, n_seq_max=4, n_threads=1, separate=True) as engine:
        start, kind = start_token(engine)
        answers = engine.generate([[start]] * 4, max_new_tokens=256, stop_ids=(), temperature=1.0, seed=3)
        assert kind == "BOS" and start == engine.bos
        assert [len(a.ids) for a in answers] == [256] * 4
        assert any(engine.eos in a.ids[:-1] for a in answers)


def test_sampling_follows_the_probabilities_of_the_model(path):
    with Engine(path, n_ctx=2048, n_seq_max=32, n_threads=1, separate=True) as engine:
        from tsugiki.samples import EncodedSample

        (_, logits), = engine.completion_logits([EncodedSample("x", "", "", "d", "", [engine.bos], [5])])
        p = np.exp(logits[0].astype(float) - logits[0].max())
        p /= p.sum()
        drawn = engine.generate([[engine.bos]] * 2000, max_new_tokens=1, stop_ids=(), temperature=1.0)
    seen = np.bincount([a.ids[0] for a in drawn], minlength=len(p))
    top = p.argsort()[-20:]
    assert np.all(np.abs(seen[top] - 2000 * p[top]) < 5 * np.sqrt(2000 * p[top]) + 1)


def test_shares_sum_to_one_and_lie_in_their_intervals(path, tmp_path):
    settings = LanguageSettings(sequences=24, tokens=64, width=24)
    found = estimate_languages(path, settings, tmp_path, reported=read_distribution(str(BASE / "training.json")), n_threads=1)
    for unit in ("sequences", "tokens", "characters", "bytes"):
        assert sum(r[unit] for r in found["languages"]) == pytest.approx(1)
    for row in found["languages"]:
        assert row["tokens_ci"][0] <= row["tokens"] <= row["tokens_ci"][1]
    for quarter in range(4):
        assert sum(row["token_quarters"][quarter] for row in found["languages"]) == pytest.approx(1)
    assert sum(r["tokens_known"] or 0 for r in found["languages"]) == pytest.approx(1)
    assert found["languages"][0]["language"] == "ja"
    assert [k["variant"] for k in found["kendall"]] == ["tau-b", "tau-b"]
    assert read_json(tmp_path / "languages.json") == found
    assert (tmp_path / "languages.csv").read_text(encoding="utf-8").startswith("language,sequences,tokens")


@pytest.mark.parametrize(("seen", "n"), [(0, 10), (3, 10), (50, 100), (400, 400)])
def test_intervals_of_shares_of_sequences_are_those_of_scipy(seen, n):
    expected = binomtest(seen, n).proportion_ci(method="wilson")
    assert wilson(np.array([seen / n]), n)[0] == pytest.approx([expected.low, expected.high])


def test_the_length_correction_turns_documents_into_tokens():
    """600 Japanese documents of 900 tokens and 400 English of 300: 83.3 % of the tokens, 60 % of the documents."""
    first, ends = np.array([600.0, 400.0]), np.array([600.0, 400.0])
    found = languages._length_corrected(first, np.array([600 * 900.0, 400 * 300.0]), ends, np.array([True, True]))
    assert found == pytest.approx([540 / 660, 120 / 660])


# --- Kendall's tau --------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=12))
def test_kendalls_tau_is_that_of_scipy(pairs):
    x, y = zip(*pairs, strict=True)
    assert kendall_tau_b(x, y) == pytest.approx(kendalltau(x, y, variant="b").statistic, nan_ok=True)


@pytest.mark.parametrize(("name", "tau"), [("Llama 2", 0.75), ("Llama 3.1", 0.52), ("Qwen 2.5", 0.57), ("Qwen 3", 0.41),
                                           ("Gemma 3", 0.49), ("Sarashina2.2", 0.50), ("LLM-jp-3", 0.25)])
def test_table_3_against_commoncrawl_over_its_ten_languages(name, tau):
    table = table3()
    codes = [k for k in table["CommonCrawl"] if k != "others"]
    assert len(codes) == 10
    assert kendall_tau_b([table[name][k] for k in codes], [table["CommonCrawl"][k] for k in codes]) == pytest.approx(tau, abs=0.005)


# --- bad input ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["5/4", "0/4", "1", "a/b", "1/0", "-1/4", "1/4/2"])
def test_a_shard_that_is_none_is_refused(text):
    with pytest.raises(UserError, match="shard"):
        parse_shard(text)
    assert parse_shard("4/4") == (4, 4)


def test_numbers_out_of_range_are_named_together(path, tmp_path):
    with pytest.raises(UserError, match=r"sequences is 0(.|\n)*tokens is -1"):
        run(path, tmp_path, sequences=0, tokens=-1)


def test_sequences_longer_than_the_model_knows_are_refused(path, tmp_path):
    with pytest.raises(UserError, match=r"3000 tokens; the model was trained for 2048(.|\n)*--tokens 2048"):
        run(path, tmp_path, tokens=3000, width=1)


def test_a_missing_file_and_a_folder_of_another_run_are_refused(path, tmp_path):
    with pytest.raises(UserError, match="no such file"):
        run(tmp_path / "none.gguf", tmp_path)
    run(path, tmp_path, sequences=2)
    with pytest.raises(UserError, match=r"another run(.|\n)*seed: 0 there, 7 now"):
        run(path, tmp_path, sequences=2, seed=7)


def test_chunks_gathered_from_a_run_with_another_seed_are_refused(path, tmp_path):
    run(path, tmp_path / "here", sequences=2)
    run(path, tmp_path / "there", sequences=2, seed=7)
    shutil.copy(tmp_path / "there" / "chunks" / "000000.jsonl", tmp_path / "here" / "chunks" / "000001.jsonl")
    with pytest.raises(UserError, match=r"another run(.|\n)*000001\.jsonl: seed 7, this run's is 0"):
        summarise(tmp_path / "here")


def test_a_folder_without_a_chunk_has_no_estimate(path, tmp_path):
    run(path, tmp_path, sequences=2)
    shutil.rmtree(tmp_path / "chunks")
    with pytest.raises(UserError, match="no finished chunk"):
        summarise(tmp_path)


@pytest.mark.parametrize("content", ["{", "[1, 2]", '{"ja": 1}', '{"ja": -1, "en": 2}', '{"ja": "x", "en": 1}'])
def test_a_reported_distribution_that_is_none_is_refused(content, tmp_path):
    file = tmp_path / "d.json"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"d\.json"):
        read_distribution(str(file))
    with pytest.raises(UserError, match="Llama 2"):
        read_distribution("Lama 2")


# --- vLLM ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["tiny-llama", "tiny-qwen", "tiny-llmjp"])
def test_the_bytes_of_a_hugging_face_tokenizer_are_those_that_llama_cpp_reads(base, tmp_path):
    from transformers import AutoTokenizer

    folder = BASE.parent / base
    convert(folder, tmp_path / "tiny.gguf")
    with Engine(tmp_path / "tiny.gguf", n_ctx=256) as engine:
        expected = [engine.piece(i) for i in range(engine.vocab_size)]
    assert token_bytes(AutoTokenizer.from_pretrained(folder), len(expected)) == expected


def test_a_folder_without_vllm_is_answered_with_the_command_that_converts_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match="vLLM, which is not installed") as error:
        generate_languages(BASE, LanguageSettings(sequences=2, tokens=8), tmp_path)
    assert "tsugiki quantize convert --base" in error.value.hint


def test_a_folder_goes_to_vllm_with_the_settings_of_the_paper(tmp_path, monkeypatch):
    """vLLM needs a GPU; what stands in for it here draws from the same model with transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(BASE)
    asked = []

    class LLM:
        def __init__(self, model, max_model_len, max_num_seqs, disable_log_stats):
            assert model == str(BASE) and max_model_len == 9 and max_num_seqs == 64  # a chunk at once

        def generate(self, prompts, params, use_tqdm):
            asked.extend(params)
            outputs = []
            for prompt, p in zip(prompts, params, strict=True):
                torch.manual_seed(p["seed"] % 2**32)
                ids = model.generate(torch.tensor([prompt["prompt_token_ids"]]), do_sample=True, top_k=0, eos_token_id=None,
                                     max_new_tokens=p["max_tokens"], min_new_tokens=p["max_tokens"])
                outputs.append(SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids[0, 1:].tolist())]))
            return outputs

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=LLM, SamplingParams=dict))
    generate_languages(BASE, LanguageSettings(sequences=5, tokens=8), tmp_path)
    found = summarise(tmp_path, resamples=20)
    assert found["engine"] == "vLLM" and found["done"] == 5 and found["start"]["kind"] == "BOS"
    longest = json.loads((BASE / "config.json").read_text(encoding="utf-8"))["max_position_embeddings"]
    with pytest.raises(UserError, match=f"trained for {longest - 1}"):  # vLLM counts the start token
        generate_languages(BASE, LanguageSettings(sequences=5, tokens=longest), tmp_path / "long")
    assert len({p.pop("seed") for p in asked}) == 5
    assert asked == [{"temperature": 1.0, "top_p": 1.0, "top_k": 0, "ignore_eos": True, "max_tokens": 8, "detokenize": False}] * 5
