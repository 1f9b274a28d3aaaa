"""A GGUF answers lm-eval as transformers does: the same ids, likelihoods, rolling windows and answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tsugiki.errors import UserError
from tsugiki.quantize.convert import convert

BASES = Path(__file__).resolve().parents[1] / "recipes" / "bases"
# The file's weights are F16, the reference's float32: seen at most 3e-3 nats a continuation token.
PER_TOKEN = 5e-3
CONTEXTS = [
    "日本の首都は", "問題：ポンプの点検は何か月ごとですか。\n回答：", "The old man went to the ", "春はあけぼの。\n\n夏は", "A: 一つ\nB: 二つ\nAnswer:",
    "彼は静かに扉を開けて、\n",
]  # fmt: skip
OPTIONS = ["A", "B", " sea", "東京", "三か月ごとです。", "。", "夜、月のころはさらなり"]


@pytest.fixture(scope="module", params=["tiny-llama", "tiny-qwen", "tiny-llmjp"])
def base(request):
    return BASES / request.param


@pytest.fixture(scope="module")
def gguf(base, tmp_path_factory):
    path = tmp_path_factory.mktemp("harness") / f"{base.name}-F16.gguf"
    convert(base, path)
    return path


@pytest.fixture(scope="module")
def ours(gguf, base):
    from tsugiki.evaluate.harness import TsugikiGGUF

    with TsugikiGGUF(gguf, tokenizer=base) as lm:
        yield lm


@pytest.fixture(scope="module")
def theirs(base):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(base), dtype="float32", device="cpu", batch_size=8, max_length=512)


def requests(kind: str, *arguments: tuple, task: str | None = "t"):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, a, 0, (task, i, 1)) for i, a in enumerate(arguments)]


PAIRS = [(c, o) for c in CONTEXTS for o in OPTIONS] + [("", "東京の天気"), ("  ", "three spaces in all")]


def test_options_of_one_and_of_many_tokens_have_lm_evals_likelihoods(ours, theirs):
    found = ours.loglikelihood(requests("loglikelihood", *PAIRS), disable_tqdm=True)
    pairs = [p for p in PAIRS if p[0].strip() or not p[0]]  # lm-eval asserts on a context of spaces alone
    expected = theirs.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    lengths = {len(ours._pair(c, o)[1]) for c, o in pairs}
    assert {1, 2} <= lengths and max(lengths) > 4
    for (context, option), (ours_, greedy), (theirs_, theirs_greedy) in zip(pairs, found, expected, strict=False):
        tokens = len(ours._pair(context, option)[1])
        assert ours_ == pytest.approx(theirs_, abs=PER_TOKEN * tokens), (context, option)
        assert greedy == theirs_greedy, (context, option)


def test_a_pair_is_split_into_lm_evals_ids(ours, theirs):
    for context, option in [p for p in PAIRS if p[0].strip()]:
        assert ours._pair(context, option) == theirs._encode_pair(context, option)


def test_a_whole_text_is_scored_in_lm_evals_windows(gguf, base, ours, theirs):
    from tsugiki.evaluate.harness import TsugikiGGUF

    texts = [("春はあけぼの。やうやう白くなりゆく山ぎは、すこしあかりて、" * 4,), ("short",), ("夏は夜。月のころはさらなり。",)]
    theirs._max_length = 32
    try:
        expected = theirs.loglikelihood_rolling(requests("loglikelihood_rolling", *texts), disable_tqdm=True)
    finally:
        theirs._max_length = 512
    with TsugikiGGUF(gguf, tokenizer=base, max_length=32) as lm:
        assert lm.max_length == 32 and len(lm.tok_encode(texts[0][0])) > 64
        found = lm.loglikelihood_rolling(requests("loglikelihood_rolling", *texts), disable_tqdm=True)
        lengths = [len(lm.tok_encode(t)) for (t,) in texts]
    for a, b, tokens in zip(found, expected, lengths, strict=True):
        assert a == pytest.approx(b, abs=PER_TOKEN * tokens)


def test_answers_are_lm_evals_with_stop_strings_limits_and_groups_of_options(ours, theirs):
    kinds = [
        {"until": ["。", "\n"], "max_gen_toks": 24, "do_sample": False},
        {"until": ["月"], "max_gen_toks": 12, "temperature": 0.0},
        {"until": [], "max_gen_toks": 5},
    ]
    asked = [(c, kinds[i % 3]) for i, c in enumerate(CONTEXTS * 2)]
    found = ours.generate_until(requests("generate_until", *asked), disable_tqdm=True)
    expected = theirs.generate_until(requests("generate_until", *asked), disable_tqdm=True)
    same = sum(a == b for a, b in zip(found, expected, strict=True))
    # F16 weights against float32: a near-tie may go the other way; seen none on the bundled bases
    assert same == len(asked), [(c, a, b) for (c, _), a, b in zip(asked, found, expected, strict=True) if a != b]
    assert not any(s in text for text, (_, kind) in zip(found, asked, strict=True) for s in kind["until"])


# --- one base is enough for the rest ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    path = tmp_path_factory.mktemp("harness") / "tiny-llama-F16.gguf"
    convert(BASES / "tiny-llama", path)
    return path


@pytest.fixture(scope="module")
def own(llama):
    from tsugiki.evaluate.harness import TsugikiGGUF

    with TsugikiGGUF(llama, bos_policies={"with": "model", "without": "never"}) as lm:
        yield lm


def test_each_tasks_prompts_follow_its_own_bos_policy(own):
    bos = own.engine.bos
    assert own.adds_bos
    plain = own.engine.tokenize("日本")
    for task, head in (("with", [bos]), ("without", []), ("a task without a policy", [bos])):
        encoded = own._with_policy(requests("loglikelihood", ("日本",), task=task), own.tok_encode)
        assert encoded == [head + plain], task


def test_bos_is_not_doubled_where_the_text_brings_it(own):
    text = own.apply_chat_template([{"role": "user", "content": "日本"}])
    assert text.startswith("<|begin_of_text|>") or own.engine.tokenize(text)[0] == own.engine.bos
    assert own.tok_encode(text).count(own.engine.bos) == 1


def test_the_flag_of_lm_evals_command_line_rules_every_task(llama):
    from tsugiki.evaluate.harness import TsugikiGGUF

    with TsugikiGGUF(llama, add_bos_token=False, bos_policies={"with": "model"}) as lm:
        assert lm.policy("with") is False and lm.policy(None) is False


def test_the_bundled_tasks_policies_are_known_without_being_told():
    from tsugiki.evaluate.harness import bundled_bos_policies

    policies = bundled_bos_policies()
    assert policies["tsugiki_takase_jmmlu_culture"] == "never" and set(policies.values()) == {"never", "model"}


def test_the_chat_template_is_the_files_own_as_transformers_renders_it(own):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(BASES / "tiny-llama")
    messages = [{"role": "user", "content": "一"}, {"role": "assistant", "content": "二"}, {"role": "user", "content": "三"}]
    assert own.apply_chat_template(messages) == tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    messages.append({"role": "assistant", "content": "答えは "})
    expected = tokenizer.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    assert own.apply_chat_template(messages, add_generation_prompt=False) == expected.rstrip()
    assert own.chat_template(True) == tokenizer.chat_template and own.chat_template(False) is None


def test_a_total_length_counts_the_prompt(own):
    prompt = "日本の首都は"
    new = len(own.tok_encode(prompt)) + 7
    own.generate_until(requests("generate_until", (prompt, {"max_length": new, "until": []})), disable_tqdm=True)
    assert own._options({"max_length": new}, new - 7)["new"] == 7 and own.truncated["t", 0]


def test_sampled_repeats_differ_and_a_seed_repeats_them(own):
    kind = {"do_sample": True, "temperature": 1.0, "top_p": 0.95, "max_gen_toks": 12, "until": []}
    asked = requests("generate_until", *[("春は", kind)] * 4)
    first, again = (own.generate_until(asked, disable_tqdm=True) for _ in range(2))
    assert len(set(first)) > 1 and first == again


@pytest.mark.parametrize("option", [{"num_beams": 4}, {"repetition_penalty": 1.2}, {"do_sample": True, "temperature": 1.0, "top_k": 5}])
def test_an_option_that_would_change_the_answer_is_refused_not_ignored(own, option):
    with pytest.raises(UserError, match=next(n for n in option if n not in ("do_sample", "temperature"))):
        own.generate_until(requests("generate_until", ("春は", option | {"until": []})), disable_tqdm=True)


def test_an_overlong_prompt_is_refused_or_cut_and_counted(llama):
    from tsugiki.evaluate.harness import TsugikiGGUF

    asked = requests("loglikelihood", ("夏は夜。" * 30, "月"), ("夏は", "夜"))
    with TsugikiGGUF(llama, max_length=32) as lm, pytest.raises(UserError, match="32"):
        lm.loglikelihood(asked, disable_tqdm=True)
    with TsugikiGGUF(llama, max_length=32, truncate="left") as lm:
        lm.loglikelihood(asked, disable_tqdm=True)
        assert lm.cut == {("t", 0)} and lm.truncated == {("t", 0): True}


def test_an_option_that_adds_no_token_is_named(own):
    with pytest.raises(UserError, match="adds no token"):
        own.loglikelihood(requests("loglikelihood", ("Answer:", "\n")), disable_tqdm=True)  # one token, ":\n"


def test_another_bases_tokenizer_is_refused(llama, tmp_path):
    from tsugiki.evaluate.harness import TsugikiGGUF

    big = json.loads((BASES / "tiny-llama" / "tokenizer.json").read_text(encoding="utf-8"))
    big["added_tokens"].append(big["added_tokens"][-1] | {"id": 99_999, "content": "<|too-far|>"})
    for file in ("tokenizer_config.json", "config.json"):
        (tmp_path / file).write_bytes((BASES / "tiny-llama" / file).read_bytes())
    (tmp_path / "tokenizer.json").write_text(json.dumps(big), encoding="utf-8")
    with pytest.raises(UserError, match="vocabulary"):
        TsugikiGGUF(llama, tokenizer=tmp_path)


def test_lm_eval_finds_the_model_by_its_name(llama, tmp_path):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    rows = [{"q": f"{i}の次は", "options": ["一", "二です", "三つ目"], "gold": i % 3} for i in range(5)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    (tmp_path / "task.yaml").write_text(
        f"task: numbers\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: q\ndoc_to_choice: options\ndoc_to_target: gold\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n",
        encoding="utf-8",
    )
    import tsugiki.evaluate.harness  # noqa: F401 (registers the name)

    found = simple_evaluate(
        model="tsugiki-gguf", model_args=f"path={llama}", tasks=["numbers"], bootstrap_iters=0, batch_size=1,
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
    )  # fmt: skip
    assert found["n-samples"]["numbers"]["effective"] == 5 and found["config"]["model_architecture"] == "llama"


def test_lm_evals_own_command_line_starts_with_this_module():
    done = subprocess.run(
        [sys.executable, "-P", "-m", "tsugiki.evaluate.harness", "run", "--help"], env=os.environ | {"COLUMNS": "100"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "--model_args" in done.stdout
