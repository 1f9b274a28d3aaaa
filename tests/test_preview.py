"""The preview shows exactly the tokens that the loss counts."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tsugiki.adapt.preview import first_of_each_kind, runs_of_tokens
from tsugiki.chat import encode
from tsugiki.samples import EncodedSample, Sample

BASES = Path(__file__).resolve().parents[1] / "recipes" / "bases"


@pytest.mark.parametrize("base", ["tiny-llama", "tiny-qwen", "tiny-llmjp"])
def test_the_learnt_text_is_the_answer_and_its_end_of_turn(base):
    tokenizer = AutoTokenizer.from_pretrained(BASES / base)
    (sample,) = encode(tokenizer, [Sample("a", "鉄骨の\n接合は？", "高力ボルト。🔩", "d")])
    runs = runs_of_tokens(tokenizer, sample)
    learned = [(text, special) for text, learned, special in runs if learned]
    assert [special for _, special in learned] == [False, True]
    assert learned[0][0].strip() == "高力ボルト。🔩"
    assert tokenizer.convert_tokens_to_ids(learned[1][0]) == sample.completion_ids[-1]
    assert "鉄骨の\n接合は？" in "".join(text for text, learned, _ in runs if not learned)
    assert sum(len(tokenizer(t, add_special_tokens=False)["input_ids"]) for t, learned, special in runs if special) == sum(
        i in set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids) for i in sample.ids
    )


def test_every_kind_is_among_the_first():
    samples = [EncodedSample(str(i), "", "", "d", "rare" if i == 9 else "common") for i in range(10)]
    assert [s.id for s in first_of_each_kind(samples, 3)] == ["0", "9", "1"]
