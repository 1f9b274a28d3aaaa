"""Prompt and completion as token ids: together they are the rendered conversation up to the end of the turn."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tsugiki.chat import TEMPLATES, encode, end_of_turn_id, prompt_text, supply_template
from tsugiki.errors import UserError
from tsugiki.samples import Sample

BASES = Path(__file__).resolve().parents[1] / "recipes" / "bases"
MARKERS = {
    "llama-3": ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "chatml": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "llm-jp": ["<s>", "</s>"],
}
END = {"llama-3": "<|eot_id|>", "chatml": "<|im_end|>", "llm-jp": "</s>"}
ANSWERS = ("三か月ごとに行う。", "0.7 MPa", "分かりません", "一行目\n二行目", "𠮷野家😀", "a  b", "\n改行から", "タブ\tと空白 ")
QUESTION = Sample("q", "ポンプP-101の点検は？", "三か月ごとに行う。", "d")


def byte_tokenizer(family, *, template=True):
    """A byte-level BPE of 256 tokens with the markers of a family; Qwen's normalises to NFC."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    if family == "chatml":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(m, special=True, normalized=False) for m in MARKERS[family]])
    names = MARKERS[family]
    special = {"eos_token": names[0]} if family == "chatml" else {"bos_token": names[0], "eos_token": names[1]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special)
    if template:
        tokenizer.chat_template = TEMPLATES[family]
    return tokenizer


@pytest.fixture(scope="module", params=["llama-3", "chatml", "llm-jp", "tiny-llama", "tiny-qwen", "tiny-llmjp"])
def tokenizer(request):
    if request.param in TEMPLATES:
        return byte_tokenizer(request.param)
    if not (BASES / request.param).is_dir():
        pytest.skip(f"{request.param} is not there")
    return AutoTokenizer.from_pretrained(BASES / request.param)


@pytest.fixture(scope="module")
def llama():
    return AutoTokenizer.from_pretrained(BASES / "tiny-llama")


def rendered(tokenizer, sample, system):
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": "user", "content": sample.prompt}, {"role": "assistant", "content": sample.completion}]
    return tokenizer.apply_chat_template(messages, tokenize=False)


@pytest.mark.parametrize("system", [None, "短く答えてください。"])
def test_the_ids_are_the_rendered_conversation_up_to_the_end_of_the_turn(tokenizer, system):
    [s] = encode(tokenizer, [QUESTION], system)
    end = tokenizer.decode([end_of_turn_id(tokenizer)])
    text = rendered(tokenizer, QUESTION, system)
    whole = text[: text.rindex(end) + len(end)]
    # A Unigram tokenizer writes a space at the start of a text, after BOS too.
    assert tokenizer.decode(s.ids).replace("<s> ", "<s>") == whole
    assert (system or "") in tokenizer.decode(s.prompt_ids)
    assert QUESTION.completion not in tokenizer.decode(s.prompt_ids)


def test_a_completion_ends_with_the_end_of_the_turn_and_holds_it_once(tokenizer):
    end = end_of_turn_id(tokenizer)
    for s in encode(tokenizer, [Sample(str(i), "問", a, "d") for i, a in enumerate(ANSWERS)]):
        assert s.completion_ids[-1] == end
        assert s.completion_ids.count(end) == 1


@pytest.mark.parametrize("family", TEMPLATES)
def test_the_end_of_the_turn_is_the_familys(family):
    tokenizer = byte_tokenizer(family)
    assert end_of_turn_id(tokenizer) == tokenizer.convert_tokens_to_ids(END[family])


def test_the_prompt_is_tokenised_as_at_inference(tokenizer):
    [s] = encode(tokenizer, [QUESTION], "短く。")
    text = prompt_text(tokenizer, QUESTION.prompt, "短く。")
    assert s.prompt_ids == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_the_beginning_of_the_text_is_written_once(tokenizer):
    if tokenizer.bos_token is None:
        pytest.skip("no token begins a text")
    [s] = encode(tokenizer, [QUESTION])
    assert s.prompt_ids[0] == tokenizer.bos_token_id
    assert s.ids.count(tokenizer.bos_token_id) == 1


@given(answer=st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda t: "<|" not in t))
@settings(max_examples=60, deadline=None)
def test_a_byte_level_completion_decodes_to_the_answer(llama, answer):
    [s] = encode(llama, [Sample("s", "問", answer, "d")])
    assert llama.decode(s.completion_ids[:-1]) == answer


def test_a_tokenizer_that_merges_across_the_border_keeps_the_mask_out_of_the_prompt():
    """``応答:\\n`` + ``\\n`` is one token here: the prompt keeps its own newline and the answer its own."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate([*alphabet, "ĊĊ"])}
    backend = Tokenizer(models.BPE(vocabulary, [("Ċ", "Ċ")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(m, special=True, normalized=False) for m in MARKERS["llm-jp"]])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = TEMPLATES["llm-jp"]
    head = prompt_text(tokenizer, "問")
    whole = tokenizer(head + "\n答", add_special_tokens=False)["input_ids"]
    [s] = encode(tokenizer, [Sample("s", "問", "\n答", "d")])
    assert whole[: len(s.prompt_ids)] != s.prompt_ids  # it does merge
    assert tokenizer.decode(s.prompt_ids) == head
    assert tokenizer.decode(s.completion_ids) == "\n答</s>"


def test_samples_keep_their_names_and_order(llama):
    samples = [Sample(f"s{i}", f"問{i}", a, f"d{i % 2}", "rule") for i, a in enumerate(ANSWERS)]
    encoded = encode(llama, samples)
    assert [(s.id, s.prompt, s.completion, s.document, s.kind) for s in encoded] == [
        (s.id, s.prompt, s.completion, s.document, s.kind) for s in samples
    ]
    assert encode(llama, iter(samples)) == encoded
    assert [encode(llama, [s])[0] for s in samples] == encoded
    assert encode(llama, []) == []


# --- refusals -------------------------------------------------------------------------------------------------


def test_no_template_is_refused():
    with pytest.raises(UserError, match="no chat template") as caught:
        encode(byte_tokenizer("llama-3", template=False), [QUESTION])
    assert "instruct" in caught.value.hint


@pytest.mark.parametrize("tail", ["", "\n", "###"])
def test_an_answer_that_never_ends_is_refused(tail):
    tokenizer = byte_tokenizer("llm-jp")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '" + tail.replace("\n", "\\n") + "' }}{% endfor %}"
    with pytest.raises(UserError, match="not with a special token") as caught:
        end_of_turn_id(tokenizer)
    assert "end-of-turn" in caught.value.hint


def test_a_template_that_drops_the_answer_is_refused():
    tokenizer = byte_tokenizer("llm-jp")
    tokenizer.chat_template = "{{ bos_token }}{{ messages[0]['content'] }}"
    with pytest.raises(UserError, match="answer"):
        end_of_turn_id(tokenizer)


def test_a_template_that_drops_the_system_prompt_is_refused(llama):
    kept, llama.chat_template = llama.chat_template, "{% for m in messages if m['role'] != 'system' %}{{ m['content'] + eos_token }}{% endfor %}"
    try:
        assert prompt_text(llama, "問い") == "問い" + llama.eos_token
        with pytest.raises(UserError, match="the chat template drops the system prompt"):
            prompt_text(llama, "問い", "あなたは設備士です。")
    finally:
        llama.chat_template = kept


def test_a_template_that_refuses_a_system_prompt_says_which_roles():
    tokenizer = byte_tokenizer("llm-jp")
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + TEMPLATES["llm-jp"]
    )
    encode(tokenizer, [QUESTION])
    with pytest.raises(UserError, match=r"refuses roles \['system', 'user'\].*no system role"):
        encode(tokenizer, [QUESTION], "短く。")


# --- bases without a template ---------------------------------------------------------------------------------


def saved(folder, family, **options):
    folder.mkdir()
    byte_tokenizer(family, template=False, **options).save_pretrained(folder)
    (folder / "config.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("family", "markers", "supplied"),
    [
        ("llama-3", "llama-3", "llama-3"), ("qwen2", "chatml", "chatml"), ("qwen3", "chatml", "chatml"),
        ("llm-jp-3", "llm-jp", "llm-jp"), ("", "llm-jp", "llm-jp"), ("llama-3", "llm-jp", "llm-jp"), ("qwen2", "llm-jp", "llm-jp"),
    ],
)
def test_a_base_without_a_template_is_given_its_familys(tmp_path, family, markers, supplied):
    base = saved(tmp_path / "base", markers)
    before = sorted(p.name for p in base.iterdir())
    out = supply_template(base, family, tmp_path / "run" / "base")
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert end_of_turn_id(tokenizer) == tokenizer.convert_tokens_to_ids(END[supplied])
    [s] = encode(tokenizer, [QUESTION], "短く。")
    assert [s] == encode(byte_tokenizer(markers), [QUESTION], "短く。")
    assert (out / "config.json").read_text() == "{}"
    assert sorted(p.name for p in base.iterdir()) == before  # the user's own folder stays as it is


def test_a_family_without_its_markers_and_without_bos_still_ends_its_turns(tmp_path):
    base = saved(tmp_path / "base", "chatml")
    tokenizer = AutoTokenizer.from_pretrained(supply_template(base, "", tmp_path / "out"))
    [s] = encode(tokenizer, [QUESTION])
    assert s.completion_ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(s.prompt_ids) == "\n\n### 指示:\n" + QUESTION.prompt + "\n\n### 応答:\n"


def test_a_base_with_a_template_keeps_its_own(tmp_path):
    assert supply_template(BASES / "tiny-llama", "qwen2", tmp_path / "out") == BASES / "tiny-llama"
    assert not (tmp_path / "out").exists()


def test_a_base_that_cannot_end_a_text_is_refused(tmp_path):
    tokenizer = byte_tokenizer("llm-jp", template=False)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match="neither a chat template nor an EOS token"):
        supply_template(tmp_path / "base", "llama-2", tmp_path / "out")
