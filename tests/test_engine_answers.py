"""Answers end where they should, whatever their tokens; an interrupted run goes on where it was."""

import sqlite3
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tsugiki.errors import UserError
from tsugiki.evaluate.cache import cached_generate, cached_loglikelihood
from tsugiki.evaluate.decoding import sample
from tsugiki.evaluate.engine import Engine
from tsugiki.quantize.convert import convert

BASE = Path(__file__).resolve().parents[1] / "recipes" / "bases" / "tiny-llama"
TEXTS = ["吾輩は猫である。名前はまだ", "The old man went to the", "春はあけぼの。", "東京の天気は"]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    out = tmp_path_factory.mktemp("gguf") / "model-F16.gguf"
    convert(BASE, out)
    return out


@pytest.fixture(scope="module")
def engine(path):
    with Engine(path, n_threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def prompts(engine):
    return [engine.tokenize(text) for text in TEXTS]


@pytest.fixture(scope="module")
def free(engine, prompts):
    """What the model says when nothing stops it."""
    return engine.generate(prompts, max_new_tokens=16, stop_ids=[])


def test_the_text_of_an_answer_is_that_of_its_ids(engine, free):
    assert all(answer.text == engine.detokenize(answer.ids) and len(answer.ids) == 16 for answer in free)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 3), st.data())
def test_an_answer_is_cut_before_the_first_stop_string_wherever_tokens_begin(engine, prompts, free, which, data):
    text = free[which].text.rstrip("\ufffd")
    start = data.draw(st.integers(0, len(text) - 1))
    stop = text[start : data.draw(st.integers(start + 1, min(len(text), start + 5)))]
    answer = engine.generate([prompts[which]], max_new_tokens=16, stop_ids=[], stop_strings=["◆ない◆", stop])[0]
    assert answer.text == text[: text.index(stop)]
    assert answer.finished == "stop"
    assert answer.ids == free[which].ids[: len(answer.ids)]


class Script(Engine):
    """An engine whose model says what the test wants: the walk, the batches and the memory are real."""

    def say(self, ids):
        self.script = ids

    def decode(self, token, pos, seq, flag):
        logits = super().decode(token, pos, seq, flag)
        last = np.asarray(pos)[np.asarray(flag) == 1] - self.begins
        logits[:] = 0
        for row, place in zip(logits, last, strict=True):
            row[self.script[place]] = 9
        return logits


@pytest.mark.parametrize(("said", "stop", "expected"), [
    ("これは😀です", "😀", "これは"),
    ("𠮷野家に行く", "家に", "𠮷野"),
    ("答え：はい\n\n次", "\n\n", "答え：はい"),
    ("ああいいう", "いう", "ああい"),
])
def test_a_stop_string_of_several_bytewise_tokens_is_found(path, said, stop, expected):
    with Script(path, n_threads=1) as engine:
        script = [t for c in said for t in engine.tokenize(c, special=False)]  # character by character: no merges
        engine.begins = 0
        engine.say([*script, *[5] * 8])
        answer = engine.generate([[300]], max_new_tokens=len(script), stop_ids=[], stop_strings=[stop])[0]
        assert (answer.text, answer.finished) == (expected, "stop")
        half = engine.generate([[300]], max_new_tokens=len(engine.tokenize(said[0], special=False)), stop_ids=[],
                               stop_strings=[stop])[0]
        assert (half.text, half.finished) == (said[0], "length")


def test_each_prompt_may_have_its_own_stops_and_limit(engine, prompts, free):
    stops = [[], [free[1].text[3]], [], [free[3].text[1]]]
    answers = engine.generate(prompts, max_new_tokens=[3, 16, 5, 16], stop_ids=[], stop_strings=stops)
    assert [len(answers[i].ids) for i in (0, 2)] == [3, 5]
    assert [a.finished for a in answers] == ["length", "stop", "length", "stop"]
    assert answers[1].text == free[1].text[: free[1].text.index(stops[1][0])]


def test_a_special_token_written_as_a_stop_string_stops(path, engine):
    with Script(path, n_threads=1) as scripted:
        name = "<|eot_id|>"
        token = scripted.special_id(name)
        assert token is not None and scripted.special_id("はい") is None
        scripted.begins = 0
        scripted.say([*scripted.tokenize("はい"), token, 5, 5, 5])
        answer = scripted.generate([[300]], max_new_tokens=9, stop_ids=[], stop_strings=[name])[0]
    assert (answer.text, answer.finished) == ("はい", "stop")


def test_leads_are_the_gaps_between_the_two_most_probable(engine, prompts, free):
    for prompt, answer in zip(prompts, free, strict=True):
        assert len(answer.margins) == len(answer.ids) and min(answer.margins) >= 0
        best = answer.ids[0]
        scores = engine.loglikelihood([(prompt, [t]) for t in range(engine.vocab_size)])
        gaps = scores[best].logprob - np.array([s.logprob for t, s in enumerate(scores) if t != best])
        assert gaps.min() == pytest.approx(answer.margins[0], abs=2e-3)
        assert answer.ties(within=1e9) == 16 and answer.ties(within=0.0) == 0
        break


def test_wrong_options_are_refused_before_anything_is_decoded(engine, prompts):
    before = engine.decoded_tokens
    for options, words in [
        ({"max_new_tokens": [1, 2]}, "4 prompts, 2 limits"),
        ({"max_new_tokens": 0}, "the least 0"),
        ({"max_new_tokens": 2, "stop_strings": "abc"}, "not a list"),
        ({"max_new_tokens": 2, "stop_strings": [["a"]]}, "1 lists of stop strings"),
        ({"max_new_tokens": 2, "truncate": "right"}, "'right'"),
    ]:
        with pytest.raises(UserError, match=words):
            engine.generate(prompts, stop_ids=[], **options)
    assert engine.decoded_tokens == before


def test_top_p_keeps_the_fewest_tokens_of_that_probability():
    logits = np.log(np.array([[0.5, 0.3, 0.15, 0.05]], np.float32))
    rngs = [np.random.default_rng(3)]
    for top_p, expected in ((0.4, {0}), (0.6, {0, 1}), (0.9, {0, 1, 2}), (1.0, {0, 1, 2, 3})):
        assert {sample(logits, 1.0, top_p, rngs)[0] for _ in range(300)} == expected
    drawn = np.bincount([sample(logits, 1.0, 0.7, rngs)[0] for _ in range(4000)], minlength=4) / 4000
    assert drawn == pytest.approx([0.5 / 0.8, 0.3 / 0.8, 0, 0], abs=0.03)


# --- resume -----------------------------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


def after(n):
    """A callback that interrupts at the n-th result."""
    seen = []

    def call(*_):
        seen.append(1)
        if len(seen) == n:
            raise Interrupted

    return call


def test_an_interrupted_run_repeats_no_finished_request(path, tmp_path, engine, prompts):
    rng = np.random.default_rng(0)
    requests = [(p, rng.integers(300, 6000, 2).tolist()) for p in prompts for _ in range(3)]
    expected = engine.loglikelihood(requests)
    store = tmp_path / "cache" / "requests.sqlite"
    with Engine(path, n_threads=1, n_ctx=256, n_seq_max=1) as other, pytest.raises(Interrupted):
        cached_loglikelihood(other, requests, cache=store, on_result=after(7))
    with Engine(path, n_threads=1, n_ctx=256, n_seq_max=1) as other:
        computed = []
        plain = other.loglikelihood
        other.loglikelihood = lambda rows, **options: computed.extend(rows) or plain(rows, **options)
        results, counts = {}, []
        found = cached_loglikelihood(other, requests, cache=store, on_done=counts.append, on_result=results.__setitem__)
        assert len(computed) == 5 and counts == list(range(1, 13))
        assert [results[i] for i in range(12)] == found
        assert max(abs(a.logprob - b.logprob) for a, b in zip(found, expected, strict=True)) < 1e-2
        before = other.decoded_tokens
        assert cached_loglikelihood(other, requests, cache=store) == found
        assert other.decoded_tokens == before


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_are_the_same_with_and_without_interruption(path, tmp_path, prompts, temperature):
    options = {"max_new_tokens": 6, "stop_ids": [2], "stop_strings": ["。"], "temperature": temperature, "seed": 4}
    prompts = [*prompts, prompts[0]]
    with Engine(path, n_threads=1, n_seq_max=1) as engine:
        whole = cached_generate(engine, prompts, cache=None, **options)
        with pytest.raises(Interrupted):
            cached_generate(engine, prompts, cache=tmp_path / "c", on_result=after(2), **options)
        before = engine.decoded_tokens
        resumed = cached_generate(engine, prompts, cache=tmp_path / "c", **options)
        assert engine.decoded_tokens - before < sum(map(len, prompts))
        assert [a.text for a in resumed] == [a.text for a in whole]
        other = cached_generate(engine, prompts, cache=tmp_path / "c", **options | {"max_new_tokens": 2})
        assert all(len(a.ids) <= 2 for a in other)
    assert (resumed[0].ids == resumed[4].ids) or temperature > 0


def test_another_model_or_setting_has_results_of_its_own(path, tmp_path, engine, prompts):
    store = tmp_path / "c"
    convert(BASE, tmp_path / "other.gguf", dtype="f32")
    cached_loglikelihood(engine, [(prompts[0], [400])], cache=store)
    with Engine(tmp_path / "other.gguf", n_threads=1) as other:
        cached_loglikelihood(other, [(prompts[0], [400])], cache=store)
        assert other.decoded_tokens == len(prompts[0])
    before = engine.decoded_tokens
    cached_loglikelihood(engine, [(prompts[0], [400])], cache=store, truncate="left")
    assert engine.decoded_tokens > before


def test_a_file_that_is_no_cache_is_refused_by_name(tmp_path, engine, prompts):
    store = tmp_path / "requests.sqlite"
    store.write_bytes(b"not a database, but long enough to be taken for one" * 40)
    with pytest.raises(UserError, match=r"requests\.sqlite"):
        cached_loglikelihood(engine, [(prompts[0], [400])], cache=store)
    with pytest.raises(sqlite3.Error):
        sqlite3.connect(store).execute("SELECT 1 FROM results")
