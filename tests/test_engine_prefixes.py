"""What requests share is decoded once, and nobody can tell from the results."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tsugiki.errors import UserError
from tsugiki.evaluate.engine import Engine
from tsugiki.evaluate.prefixes import prefix_tree, visit
from tsugiki.quantize.convert import convert
from tsugiki.samples import EncodedSample

BASE = Path(__file__).resolve().parents[1] / "recipes" / "bases" / "tiny-llama"
F32 = 0  # ggml's number of the type

# few distinct ids, so that prefixes are shared; nested, repeated and equal to whole others
PATHS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=25)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Weights and cached values in float32: what is left is the order of sums, not the rounding of each term."""
    out = tmp_path_factory.mktemp("gguf") / "model-F32.gguf"
    convert(BASE, out, dtype="f32")
    return out


@pytest.fixture(scope="module")
def engine(path):
    with Engine(path, type_k=F32, type_v=F32, n_threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def model():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()


def distinct_prefixes(paths) -> int:
    """Nodes of the trie of these paths: the fewest tokens that any engine must decode for them."""
    return len({tuple(path[: i + 1]) for path in paths for i in range(len(path))})


def reference(model, context, continuation) -> tuple[float, bool]:
    """Log-likelihood and greediness by transformers, one request, no cache."""
    with torch.no_grad():
        logits = model(torch.tensor([[*context, *continuation]])).logits[0].double()
    rows = logits[len(context) - 1 : -1]
    log_p = rows.log_softmax(-1)
    picked = log_p[torch.arange(len(continuation)), torch.tensor(continuation)]
    return float(picked.sum()), rows.argmax(-1).tolist() == list(continuation)


@settings(max_examples=200, deadline=None)
@given(PATHS)
def test_the_tree_holds_each_path_and_no_token_twice(paths):
    root, leaves = prefix_tree(paths)
    nodes = list(visit(root))
    for path, leaf in zip(paths, leaves, strict=True):
        found, node = [], leaf
        while node is not None:
            assert not found or node.end == len(path) - len(found)
            found = node.tokens + found
            node = node.parent
        assert found == path
    assert sum(len(node.tokens) for node in nodes) == distinct_prefixes(paths)
    assert sorted(i for node in nodes for i in node.ends) == list(range(len(paths)))


@settings(max_examples=200, deadline=None)
@given(PATHS)
def test_few_branching_nodes_wait_at_any_time(paths):
    root, _ = prefix_tree(paths)
    order = list(visit(root))
    waiting = [0]

    def go(node, held):
        for i, child in enumerate(node.children):
            last = i == len(node.children) - 1
            waiting[0] = max(waiting[0], held + (not last))
            go(child, held + (not last))

    go(root, 0)
    assert waiting[0] <= np.log2(len(paths)) + 1e-9
    assert len(order) <= 2 * len(paths) + 1


@pytest.fixture(scope="module")
def requests():
    """Two few-shot prefixes, questions below each, options of one to four tokens below those; shuffled."""
    rng = np.random.default_rng(5)
    found = []
    for shots in (rng.integers(300, 6000, n).tolist() for n in (70, 12)):
        for _ in range(4):
            question = shots + rng.integers(300, 6000, rng.integers(2, 20)).tolist()
            found += [(question, rng.integers(300, 6000, n).tolist()) for n in (1, 1, 2, 4)]
        found.append((shots, question[len(shots) : len(shots) + 2]))  # the prefix itself is a context too
    rng.shuffle(found)
    return [(list(map(int, c)), list(map(int, a))) for c, a in found]


def test_likelihoods_are_those_of_one_request_at_a_time_and_of_transformers(engine, model, requests):
    together = engine.loglikelihood(requests)
    alone = [engine.loglikelihood([r])[0] for r in requests]
    expected = [reference(model, *r) for r in requests]
    assert max(abs(a.logprob - b.logprob) for a, b in zip(together, alone, strict=True)) < 1e-4
    assert max(abs(a.logprob - b) for a, (b, _) in zip(together, expected, strict=True)) < 1e-3
    assert [a.greedy for a in together] == [b for _, b in expected]
    assert not any(a.truncated for a in together)


def test_in_half_precision_sharing_changes_no_more_than_rounding_does(tmp_path, requests):
    """llama.cpp multiplies F16 by one row and by many rows in other ways: 1e-3 nats a token, in the mean less."""
    convert(BASE, tmp_path / "model-F16.gguf")
    with Engine(tmp_path / "model-F16.gguf", n_threads=1) as engine:
        together = engine.loglikelihood(requests)
        alone = [engine.loglikelihood([r])[0] for r in requests]
    differences = [abs(a.logprob - b.logprob) / len(r[1]) for a, b, r in zip(together, alone, requests, strict=True)]
    assert np.mean(differences) < 1e-3 and max(differences) < 1e-2


def test_each_distinct_prefix_is_decoded_once(engine, requests):
    before = engine.decoded_tokens
    engine.loglikelihood(requests)
    shared = engine.decoded_tokens - before
    assert shared == distinct_prefixes([[*c, *a[:-1]] for c, a in requests])
    engine.loglikelihood(requests, share=False)
    assert engine.decoded_tokens - before - shared == sum(len(c) + len(a) - 1 for c, a in requests)


def test_a_greedy_continuation_is_called_greedy(engine, model):
    prompt = engine.tokenize("吾輩は猫である。名前は")
    answer = engine.generate([prompt], max_new_tokens=5, stop_ids=[])[0].ids
    found = engine.loglikelihood([(prompt, answer), (prompt, [*answer[:-1], (answer[-1] + 1) % 6144])])
    assert [f.greedy for f in found] == [True, False]
    assert found[0].logprob == pytest.approx(reference(model, prompt, answer)[0], abs=1e-3)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(PATHS.map(lambda p: p[0]), PATHS.map(lambda p: p[0])), min_size=1, max_size=30),
       st.integers(0, 2**32))
def test_any_requests_have_the_results_that_they_have_unshared(engine, rows, seed):
    rng = np.random.default_rng(seed)
    base = rng.integers(300, 6000, 3)
    requests = [([int(base[i]) for i in c], [int(base[i]) for i in a]) for c, a in rows]
    before = engine.decoded_tokens
    shared = engine.loglikelihood(requests)
    assert engine.decoded_tokens - before == distinct_prefixes([[*c, *a[:-1]] for c, a in requests])
    unshared = engine.loglikelihood(requests, share=False)
    assert max(abs(a.logprob - b.logprob) for a, b in zip(shared, unshared, strict=True)) < 1e-4


@pytest.mark.parametrize("options", [{"n_ctx": 512, "n_seq_max": 1}, {"n_ctx": 512, "n_seq_max": 3}, {"n_seq_max": 40},
                                     {"n_ctx": 2048, "n_seq_max": 4, "separate": True}])
def test_a_small_memory_and_any_width_give_the_same(path, engine, requests, options):
    expected = engine.loglikelihood(requests)
    prompts = [c for c, _ in requests]
    answers = engine.generate(prompts, max_new_tokens=6, stop_ids=[])
    with Engine(path, type_k=F32, type_v=F32, n_threads=1, **options) as other:
        found = other.loglikelihood(requests)
        others = other.generate(prompts, max_new_tokens=6, stop_ids=[])
    assert max(abs(a.logprob - b.logprob) for a, b in zip(expected, found, strict=True)) < 1e-4
    for one, two in zip(answers, others, strict=True):
        part = next((i for i, (a, b) in enumerate(zip(one.ids, two.ids, strict=True)) if a != b), None)
        assert part is None or one.margins[part] < 1e-3


def test_a_chain_of_nested_prefixes_fits_into_two_sequences(path):
    rng = np.random.default_rng(2)
    text = rng.integers(300, 6000, 240).tolist()
    requests = [(text[:n], text[n : n + 1]) for n in range(1, 200, 3)]
    with Engine(path, n_ctx=256, n_seq_max=1, type_k=F32, type_v=F32, n_threads=1) as engine:
        found = engine.loglikelihood(requests)
        assert engine.decoded_tokens == len(requests[-1][0])
        alone = engine.loglikelihood(requests[-1:])[0]
    assert found[-1].logprob == pytest.approx(alone.logprob, abs=1e-4)


def test_shared_prompts_generate_what_each_generates_alone(engine, requests):
    prompts = [c for c, _ in requests]
    before = engine.decoded_tokens
    together = engine.generate(prompts, max_new_tokens=8, stop_ids=[])
    assert engine.decoded_tokens - before == distinct_prefixes(prompts) + 7 * len(prompts)
    for prompt, answer in zip(prompts, together, strict=True):
        alone = engine.generate([prompt], max_new_tokens=8, stop_ids=[])[0]
        part = next((i for i, (a, b) in enumerate(zip(answer.ids, alone.ids, strict=True)) if a != b), None)
        assert part is None or answer.margins[part] < 1e-3


def test_likelihoods_and_those_of_samples_are_one_quantity(engine, requests):
    nll, _ = engine.completion_nll([EncodedSample(f"s{i}", "", "", "d", "", c, a) for i, (c, a) in enumerate(requests)])
    assert np.abs(nll + [a.logprob for a in engine.loglikelihood(requests)]).max() < 1e-4


def test_an_overlong_context_is_an_error_or_a_counted_cut_from_the_left(path, model):
    ids = np.random.default_rng(1).integers(300, 6000, 300).tolist()
    with Engine(path, n_ctx=256, type_k=F32, type_v=F32, n_threads=1) as engine:
        with pytest.raises(UserError, match="request 1 has 299 tokens; the context holds 256"):
            engine.loglikelihood([(ids[:5], ids[5:8]), (ids[:290], ids[290:])])
        short, long = engine.loglikelihood([(ids[:5], ids[5:8]), (ids[:290], ids[290:])], truncate="left")
        assert (short.truncated, long.truncated) == (0, 43)
        assert long.logprob == pytest.approx(reference(model, ids[43:290], ids[290:])[0], abs=1e-3)
        with pytest.raises(UserError, match="and 5 of them are its context"):
            engine.loglikelihood([(ids[:5], ids[5:])], truncate="left")
        answer = engine.generate([ids], max_new_tokens=6, stop_ids=[], truncate="left")[0]
        assert (answer.truncated, answer.finished, len(answer.ids)) == (50, "length", 6)
        assert answer.ids == engine.generate([ids[50:]], max_new_tokens=6, stop_ids=[])[0].ids


def test_requests_without_text_and_ids_of_another_tokenizer_are_refused(engine):
    with pytest.raises(UserError, match="request 0 has an empty context"):
        engine.loglikelihood([([], [5])])
    with pytest.raises(UserError, match="request 1 has an empty continuation"):
        engine.loglikelihood([([5], [5]), ([5], [])])
    with pytest.raises(UserError, match="the id 6144; the vocabulary has 6144"):
        engine.loglikelihood([([5], [6144])])
    assert engine.loglikelihood([]) == []


def test_progress_and_results_come_one_by_one(engine, requests):
    counts, results = [], {}
    found = engine.loglikelihood(requests, on_done=counts.append, on_result=results.__setitem__)
    assert counts == list(range(1, len(requests) + 1))
    assert [results[i] for i in range(len(requests))] == found
