"""Every kind of tokenizer gives the same ids in llama.cpp: SentencePiece's BPE and Unigram, byte-level BPE, added tokens."""

import json
import shutil
import unicodedata
from pathlib import Path

import gguf
import pytest
import sentencepiece
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llama_cpp import Llama
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tsugiki.errors import UserError
from tsugiki.quantize.convert import convert
from tsugiki.quantize.parity import parity
from tsugiki.quantize.texts import HARD_TEXTS, hard_texts
from tsugiki.quantize.texts import SENTENCES as ORDINARY
from tsugiki.quantize.tokenizer import PRE_TOKENIZERS, gguf_vocabulary
from tsugiki.recipes.setsubi import generate
from tsugiki.tokenizers import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
SENTENCES = [t for t in HARD_TEXTS if len(t) > 12]
TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{{ eos_token }}{% endfor %}"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("tokenizer")


@pytest.fixture(scope="module")
def trained(work):
    """SentencePiece models of both kinds, trained on this kit's sentences, hard strings and generated questions."""
    questions = [row["prompt"] for row in generate(train_devices=12, valid_devices=4, test_devices=4)]
    lines = [*SENTENCES, *ORDINARY] * 9 + questions
    for kind in ("bpe", "unigram"):
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(line for line in lines if line.strip()), model_prefix=str(work / kind), vocab_size=1600,
            model_type=kind, byte_fallback=True, character_coverage=0.98, normalization_rule_name="identity",
            remove_extra_whitespaces=False, hard_vocab_limit=False, num_threads=1, minloglevel=2,
        )
    return work


def folder_with(trained, name, kind, cls="LlamaTokenizer", **config):
    """A folder as Sarashina's and the old Llama ones are: tokenizer.model, no tokenizer.json."""
    folder = trained / name
    folder.mkdir()
    shutil.copy(trained / f"{kind}.model", folder / "tokenizer.model")
    settings = {"tokenizer_class": cls, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | config))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return add_model(folder, sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).vocab_size())


def add_model(folder, vocab_size):
    config = LlamaConfig(vocab_size=vocab_size, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def saved(tokenizer, folder):
    folder.mkdir()
    tokenizer.save_pretrained(folder)
    return add_model(folder, len(tokenizer))


def compared(folder, texts, **settings):
    """The report of the conversion, the file, and its parity with what transformers loads from the folder."""
    report = convert(folder, folder / "model.gguf", **settings)
    tokenizer = load_tokenizer(folder)
    return report, parity(folder / "model.gguf", tokenizer, {"texts": texts}, most=10_000), tokenizer


def test_sentencepiece_bpe_without_tokenizer_json(trained):
    folder = folder_with(trained, "bpe-model", "bpe", legacy=True)
    report, found, _ = compared(folder, hard_texts())
    assert (report.tokenizer, report.pre, report.add_bos) == ("llama", "default", True)
    assert found.groups["texts"]["unexplained"] == 0
    assert {d["reason"] for d in found.differences} <= {"space", "byte"}
    assert all(d["text"].startswith((" ", "▁")) or "<" in d["text"] for d in found.differences)
    assert found.rate > 0.95
    # SentencePiece itself, the origin of both
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    model = Llama(str(folder / "model.gguf"), vocab_only=True, verbose=False)
    assert [model.tokenize(t.encode(), add_bos=False, special=False) for t in SENTENCES] == [processor.encode(t) for t in SENTENCES]
    model.close()


def test_scores_are_sentencepieces_own(trained):
    processor = sentencepiece.SentencePieceProcessor(model_file=str(trained / "bpe.model"))
    tokenizer = AutoTokenizer.from_pretrained(folder_with(trained, "bpe-scores", "bpe"))
    found = gguf_vocabulary(tokenizer, processor.vocab_size())
    kinds = {gguf.TokenType.NORMAL: lambda i: False, gguf.TokenType.CONTROL: processor.is_control, gguf.TokenType.UNKNOWN: processor.is_unknown,
             gguf.TokenType.BYTE: processor.is_byte}
    for i in range(processor.vocab_size()):
        assert found.tokens[i] == processor.id_to_piece(i)
        if found.types[i] == gguf.TokenType.NORMAL:
            assert found.scores[i] == processor.get_score(i)
        else:
            assert kinds[found.types[i]](i)


@given(text=st.text(st.one_of(
    st.characters(min_codepoint=0x3040, max_codepoint=0x30FF), st.characters(min_codepoint=0x4E00, max_codepoint=0x9FFF),
    st.sampled_from("aZ 1９'\n\t　。ー…▁"), st.characters(exclude_categories=("Cs", "Cn"))), max_size=40))
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_text_after_a_letter_has_sentencepieces_ids(bpe, text):
    tokenizer, model = bpe
    text = "あ" + text.replace("<", "＜")  # a text that begins with a space, or names a token: counted, see above
    assert model.tokenize(text.encode(), add_bos=False, special=True) == tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.fixture(scope="module")
def bpe(trained):
    folder = folder_with(trained, "bpe-any", "bpe", legacy=True)
    convert(folder, folder / "model.gguf")
    model = Llama(str(folder / "model.gguf"), vocab_only=True, verbose=False)
    yield AutoTokenizer.from_pretrained(folder), model
    model.close()


def test_llama_2s_own_tokenizer_json(trained, work):
    """Its normalizer writes ▁ before the text and for every space, and nothing is split before BPE."""
    base = AutoTokenizer.from_pretrained(folder_with(trained, "bpe-json", "bpe"))
    backend = base.backend_tokenizer
    backend.normalizer = tokenizers.normalizers.Sequence([tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = None
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=TEMPLATE)
    _, found, _ = compared(saved(tokenizer, work / "llama-2"), hard_texts())
    assert found.groups["texts"]["unexplained"] == 0
    assert {d["reason"] for d in found.differences} <= {"byte", "space"}
    assert found.rate > 0.99


def test_a_space_before_the_first_text_only_is_exact_in_conversations(trained):
    folder = folder_with(trained, "bpe-first", "bpe", legacy=False, chat_template=TEMPLATE)
    talks = ["<s>[user] " + t + "</s>[assistant] はい</s>" for t in SENTENCES]
    _, found, tokenizer = compared(folder, talks)
    assert json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"]["prepend_scheme"] == "first"
    assert found.identical == found.texts == len(SENTENCES)
    assert gguf.GGUFReader(folder / "model.gguf").fields["tokenizer.ggml.add_space_prefix"].contents() is False
    plain = parity(folder / "model.gguf", tokenizer, {"plain": SENTENCES})
    assert {d["reason"] for d in plain.differences} == {"space"}


@pytest.mark.parametrize("cls", ["LlamaTokenizer", "TokenizersBackend"])
def test_unigram_without_tokenizer_json_is_sentencepieces_own(trained, cls):
    """Sarashina's files: the class says Llama, the model is Unigram, and transformers alone reads it as BPE."""
    folder = folder_with(trained, f"unigram-{cls}", "unigram", cls=cls)
    report, found, tokenizer = compared(folder, SENTENCES)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    plain = [t for t in SENTENCES if "<" not in t]
    expected = [processor.encode(t) for t in plain]
    assert tokenizer(plain, add_special_tokens=False)["input_ids"] == expected
    assert tokenizer("猫")["input_ids"] == [1, *processor.encode("猫")]
    assert [tokenizer.decode(ids) for ids in expected] == plain
    assert (report.tokenizer, report.add_bos) == ("t5", True)
    assert "tokenizer.model is Unigram" in report.notes[0]
    assert {d["reason"] for d in found.differences} <= {"unknown", "byte"}
    assert found.rate > 0.5
    assert AutoTokenizer.from_pretrained(folder)(plain, add_special_tokens=False)["input_ids"] != expected


@pytest.mark.parametrize(("regex", "ignore_merges"), [*PRE_TOKENIZERS, (None, False)], ids=[*PRE_TOKENIZERS.values(), "gpt-2"])
def test_every_known_regex_cuts_as_llama_cpp_does(work, regex, ignore_merges):
    name = PRE_TOKENIZERS.get((regex, ignore_merges), "gpt-2")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=ignore_merges))
    level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex is None)
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(regex), "isolated") if regex else None
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, level]) if split else level
    backend.train_from_iterator(hard_texts() * 2, tokenizers.trainers.BpeTrainer(
        vocab_size=2500, min_frequency=2, show_progress=False, special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    report, found, _ = compared(saved(tokenizer, work / f"regex-{name}"), hard_texts())
    assert (report.tokenizer, report.pre) == ("gpt2", name)
    different = [d["text"] for d in found.differences]
    if name in ("tekken", "gpt-4o"):  # llama.cpp has \p{L} where the originals have \p{L} and \p{M}
        assert {d["reason"] for d in found.differences} == {"marks"}
        assert all(any(unicodedata.category(c).startswith("M") for c in text) for text in different)
    else:
        assert different == []


def test_added_domain_tokens_convert(work):
    base = ROOT / "recipes" / "bases" / "tiny-llama"
    if not (base / "tokenizer.json").is_file():
        pytest.skip("the bundled base tiny-llama is not there")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["設備番号", "ポンプ室", "P-101", "設備番号一覧"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|部署|>"]})
    texts = ["設備番号はP-101です", "設備番号一覧のポンプ室", "<|部署|>保全課", "ポンプ室 P-1011", *hard_texts()]
    report, found, _ = compared(saved(tokenizer, work / "added"), texts)
    assert report.pre == "llama-bpe"
    assert found.identical == found.texts
    types = gguf.GGUFReader(work / "added" / "model.gguf").fields["tokenizer.ggml.token_type"].contents()
    assert types[-5:] == [gguf.TokenType.USER_DEFINED] * 4 + [gguf.TokenType.CONTROL]


@pytest.mark.parametrize(("change", "sentence"), [
    ({"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}}, "pre-tokenizer"),
    ({"normalizer": {"type": "NFKC"}}, "NFKC"),
])
def test_another_sentencepiece_construction_is_refused(trained, work, change, sentence):
    source = trained / "bpe-refused"
    if not source.exists():
        folder_with(trained, "bpe-refused", "bpe")
    spec = json.loads(AutoTokenizer.from_pretrained(source).backend_tokenizer.to_str()) | change
    backend = tokenizers.Tokenizer.from_str(json.dumps(spec))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    with pytest.raises(UserError, match=sentence):
        gguf_vocabulary(tokenizer, 2600)
