"""Pre-training of the bundled bases: the same weights from the same seed, exact language shares, errors with file and line."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from tsugiki.artifacts import read_json
from tsugiki.errors import UserError
from tsugiki.recipes.pretrain import (
    TINY_BASES,
    TinyBase,
    bits_per_character,
    build_model,
    build_windows,
    language_of,
    passage_ids,
    passages_of,
    pretrain,
    read_corpus,
    train_tokenizer,
)

JAPANESE = ["設備", "点検", "ポンプ", "圧力", "は", "の", "を", "確認する", "毎月", "行う", "異常", "がある", "とき", "止める", "、", "潤滑油"]
ENGLISH = ["the", "pump", "valve", "pressure", "is", "checked", "every", "month", "when", "it", "stops", "call", "oil", "and", "a", "boiler"]
SMALL = TinyBase(
    "small", "llama", "llama3-bpe", 300, 1, 2, False, 0.7, hidden=256, ffn=256, heads=8, tokens=6000, sequence=32, batch=8,
    chat_share=0.3, seed=3,
)


def sentences(words: list[str], joint: str, count: int, seed: int) -> str:
    chance = random.Random(seed)
    return "\n".join(joint.join(chance.choices(words, k=12)) + "。." [joint == " "] for _ in range(count))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    with (folder / "ja.jsonl").open("w", encoding="utf-8") as file:
        for i in range(120):
            file.write(json.dumps({"id": i, "text": sentences(JAPANESE, "", 6, i)}, ensure_ascii=False) + "\n")
    with (folder / "en.jsonl").open("w", encoding="utf-8") as file:
        for i in range(120):
            file.write(json.dumps({"id": i, "text": sentences(ENGLISH, " ", 6, i)}) + "\n")
    return folder


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    pretrain(SMALL, corpus, folder / "out", folder / "work", compiled=False, checkpoint_every=5)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "out" / "model.safetensors")


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(corpus, trained, tmp_path):
    pretrain(SMALL, corpus, tmp_path / "out", tmp_path / "work", compiled=False)
    assert same(weights(tmp_path), weights(trained))
    start = build_model(replace(SMALL, seed=4), _tokenizer(trained)).state_dict()
    assert not same(start, build_model(SMALL, _tokenizer(trained)).state_dict())


def _tokenizer(trained: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(trained / "out")


def test_training_lowers_the_loss(trained):
    rows = [json.loads(line) for line in (trained / "work" / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < 0.8 * math.log(SMALL.vocab_size)


def test_a_killed_training_goes_on_to_the_same_weights(corpus, trained, tmp_path):
    code = (
        "import sys; from pathlib import Path; from tsugiki.recipes.pretrain import TinyBase, pretrain; "
        "corpus, folder = map(Path, sys.argv[1:]); "
        f"pretrain(TinyBase(**{asdict(SMALL)!r}), corpus, folder / 'out', folder / 'work', compiled=False, checkpoint_every=5)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, corpus, tmp_path], stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while not (tmp_path / "work" / "checkpoint.safetensors").exists():
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    pretrain(SMALL, corpus, tmp_path / "out", tmp_path / "work", compiled=False, checkpoint_every=5)
    assert same(weights(tmp_path), weights(trained))


def test_a_work_folder_of_another_training_is_refused(corpus, trained):
    with pytest.raises(UserError, match="another training run"):
        pretrain(replace(SMALL, seed=9), corpus, trained / "out", trained / "work", compiled=False)


def test_the_shares_on_the_card_are_those_of_the_windows(trained, corpus):
    card, windows = read_json(trained / "out" / "training.json"), np.load(trained / "work" / "windows.npy")
    tokenizer = _tokenizer(trained)
    # Every document ends with EOS; its language is that of its text. The last one may be cut off.
    counts, held = {"ja": 0, "en": 0}, []
    for token in [*windows.ravel().tolist(), None]:
        if token is not None:
            held.append(token)
        if held and (token is None or token == tokenizer.eos_token_id):
            counts[language_of(tokenizer.decode(held, skip_special_tokens=True))] += len(held)
            held = []
    assert card["tokens"] == counts
    assert sum(counts.values()) == windows.size == card["windows"] * (SMALL.sequence + 1)
    assert abs(counts["ja"] / windows.size - SMALL.japanese_share) < 0.05
    text = (trained / "out" / "README.md").read_text(encoding="utf-8")
    assert f"{counts['ja']:,} ({counts['ja'] / windows.size:.4f})" in text


def test_too_few_tokens_for_one_step_are_refused(trained):
    few = list(passages_of("a", "ja", "設備の点検", most=100)) + list(passages_of("b", "en", "the pump", most=100))
    with pytest.raises(UserError, match="do not fill one step of 264"):
        build_windows(replace(SMALL, tokens=100), _tokenizer(trained), few)


# --- tokenizers ---


@pytest.fixture(scope="module", params=["llama3-bpe", "qwen2-bpe", "unigram"])
def tokenizer(request):
    texts = [sentences(JAPANESE, "", 6, i) for i in range(40)] + [sentences(ENGLISH, " ", 6, i) for i in range(40)]
    size = 460 if request.param == "unigram" else 300
    made = train_tokenizer(replace(SMALL, tokenizer=request.param, vocab_size=size), texts)
    assert len(made) == size
    return made


HARD = ["設備の点検", "a  b", "一行目\n\n二行目", "タブ\tと末尾 ", "😀👨‍👩‍👧", "𠮷野家", "ﾊﾝｶｸ", " 先頭", "\n", "x=1;\r\n", "①㈱"]


@pytest.mark.parametrize("text", HARD)
def test_a_tokenizer_gives_back_the_text(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.unk_token_id is None or tokenizer.unk_token_id not in ids


@pytest.fixture(scope="module")
def byte_level():
    return train_tokenizer(SMALL, [sentences(JAPANESE, "", 6, 1), sentences(ENGLISH, " ", 60, 1)])


@given(text=st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cn", "Co")), max_size=20))
@settings(max_examples=60, deadline=None)
def test_any_text_survives_a_byte_level_tokenizer(byte_level, text):
    assert byte_level.decode(byte_level(text, add_special_tokens=False)["input_ids"]) == text


def test_a_passage_begins_with_bos_where_there_is_one_and_ends_with_eos(tokenizer):
    passage = next(passages_of("d", "ja", "点検は毎月行う。\n異常があるときは止める。", most=100))
    for chat in (False, True):
        ids = passage_ids(tokenizer, passage, chat=chat)
        assert ids[-1] == tokenizer.eos_token_id
        if tokenizer.bos_token_id is not None:
            assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
    chat_ids = set(passage_ids(tokenizer, passage, chat=True)) & set(tokenizer.all_special_ids)
    assert chat_ids and tokenizer.pad_token_id not in chat_ids


# --- bits per character ---


def test_bits_per_character_equal_a_plain_loop(trained):
    tokenizer = _tokenizer(trained)
    model = build_model(SMALL, tokenizer).eval()
    documents = [("a", "ja", "点検は毎月行う。\n異常があるときは止める。"), ("b", "ja", "潤滑油を確認する。")]
    nats, characters = 0.0, 0
    for _, _, text in documents:
        ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        for i in range(1, len(ids)):
            with torch.no_grad():
                logits = model(torch.tensor([ids[:i]])).logits[0, -1].double()
            nats -= (logits[ids[i]] - logits.exp().sum().log()).item()
        characters += len(text)
    assert bits_per_character(model, tokenizer, documents) == pytest.approx(nats / math.log(2) / characters, rel=1e-5)
    assert bits_per_character(model, tokenizer, []) is None


# --- the corpus ---


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "a.jsonl:2: not JSON"),
        ("a.jsonl", b'{"text": "x"}\n[1]\n', "a.jsonl:2: a line must be a JSON object"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": "\x83\x65"}\n', "a.jsonl:3: not UTF-8 (byte 0x83 at byte 11)"),
        ("a.txt", b"abc\xff", "a.txt: not UTF-8 (byte 0xff at byte 4)"),
        ("a.jsonl", b'{"title": "x"}\n', "no text found below"),
        ("a.pdf", b"x", "no text found below"),
    ],
)
def test_a_bad_corpus_is_told_by_file_and_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        list(read_corpus(tmp_path))
    assert message in str(error.value)


def test_an_empty_folder_and_a_missing_language_are_sentences(tmp_path, trained):
    with pytest.raises(UserError, match="no text found below"):
        list(read_corpus(tmp_path))
    with pytest.raises(UserError, match="the corpus has no en text; small needs 1,800 tokens of it"):
        build_windows(SMALL, _tokenizer(trained), list(passages_of("a", "ja", "設備の点検", most=100)))


def test_every_kind_of_file_is_read(tmp_path):
    (tmp_path / "a.txt").write_text("設備の点検\r\nを行う", encoding="utf-8", newline="")
    (tmp_path / "b.jsonl").write_text('{"id": 7, "ja": "点検", "en": "check"}\n\n{"text": "pump", "lang": "en"}\n', encoding="utf-8")
    assert list(read_corpus(tmp_path)) == [
        ("a.txt", "ja", "設備の点検\nを行う"),
        ("b.jsonl:7:ja", "ja", "点検"),
        ("b.jsonl:7:en", "en", "check"),
        ("b.jsonl:3", "en", "pump"),
    ]


# --- the bundled bases ---

BASES = Path(__file__).resolve().parents[1] / "recipes" / "bases"


@pytest.fixture(params=[n for n in TINY_BASES if (BASES / n / "model.safetensors").exists()])
def bundled(request) -> Path:
    return BASES / request.param


def test_a_bundled_base_is_small_and_k_quants_apply(bundled):
    assert sum(p.stat().st_size for p in bundled.iterdir()) <= 13e6
    for name, tensor in load_file(bundled / "model.safetensors").items():
        assert tensor.dtype == torch.bfloat16 and torch.isfinite(tensor).all()
        assert tensor.ndim == 1 or tensor.shape[1] % 256 == 0, name


def test_a_bundled_base_has_the_parameters_that_the_list_and_the_card_state(bundled):
    from tsugiki.bases import load_bases
    from tsugiki.recipes.recipe import BASES as LIST

    count = sum(t.numel() for t in load_file(bundled / "model.safetensors").values())
    assert load_bases(LIST)[bundled.name].parameters == count == read_json(bundled / "training.json")["parameters"]


def test_the_card_of_a_bundled_base_states_shares_bits_and_licence(bundled):
    training, text = read_json(bundled / "training.json"), (bundled / "README.md").read_text(encoding="utf-8")
    base, total = TINY_BASES[bundled.name], sum(training["tokens"].values())
    assert total == training["windows"] * (base.sequence + 1) >= 10_000_000
    shares = {lang: tokens / total for lang, tokens in training["tokens"].items()}
    assert sum(shares.values()) == pytest.approx(1, abs=1e-12)
    assert shares["ja"] == pytest.approx(base.japanese_share, abs=1e-3)
    assert f"| {total:,} | {training['tokens']['ja']:,} ({shares['ja']:.4f}) |" in text
    for bits in training["held_out_bits_per_character"].values():
        assert 1 < bits < 6 and f"{bits:.3f}" in text
    assert "license: apache-2.0" in text


def test_the_chat_template_of_a_bundled_base_uses_tokens_that_are_there(bundled):
    from transformers import AutoTokenizer

    from tsugiki.chat import end_of_turn_id, prompt_text, special_ids

    tokenizer = AutoTokenizer.from_pretrained(bundled)
    assert len(tokenizer) == read_json(bundled / "config.json")["vocab_size"] == TINY_BASES[bundled.name].vocab_size
    text = prompt_text(tokenizer, "点検は？", "あなたは助手です。")
    assert "点検は？" in text and "あなたは助手です。" in text
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert set(ids) & special_ids(tokenizer) and end_of_turn_id(tokenizer) in special_ids(tokenizer)
    config = read_json(bundled / "config.json")
    for name in ("bos_token", "eos_token", "pad_token"):
        token = getattr(tokenizer, name)
        assert config[f"{name}_id"] == (None if token is None else tokenizer.convert_tokens_to_ids(token))


def test_a_bundled_base_writes_what_is_recognisably_japanese(bundled):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bundled)
    model = AutoModelForCausalLM.from_pretrained(bundled, dtype=torch.float32).eval()
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = torch.tensor([[*bos, *tokenizer("吾輩は", add_special_tokens=False)["input_ids"]]])
    torch.manual_seed(0)
    out = model.generate(ids, do_sample=True, temperature=0.8, max_new_tokens=60, pad_token_id=tokenizer.pad_token_id)
    assert language_of(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)) == "ja"
