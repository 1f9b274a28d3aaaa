"""Samples: bad files are refused by line and field, splits do not leak, subsets are nested."""

from __future__ import annotations

import gzip
import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tsugiki.adapt.samples import (
    SPLITS,
    FieldMapping,
    NearDuplicates,
    Row,
    drop_duplicates,
    drop_long,
    make_splits,
    near_pairs,
    nested_order,
    normalise,
    read_rows,
    read_samples,
    split_by_document,
)
from tsugiki.errors import UserError
from tsugiki.samples import EncodedSample, Sample

GOOD = {"id": "1", "prompt": "ポンプの点検は?", "completion": "3か月"}
MAPPED = FieldMapping(id="id")


def write(path, *lines) -> object:
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else json.dumps(x, ensure_ascii=False).encode() for x in lines))
    return path


def sample(i: int | str, prompt: str, completion: str = "答え", document: str | None = None) -> Sample:
    return Sample(str(i), prompt, completion, document or str(i))


# --- reading ---


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json", ".csv"])
def test_the_same_rows_are_read_from_every_kind_of_file(tmp_path, suffix):
    rows = [{"prompt": "改行\n入り, 読点、\"引用\"", "completion": "①"}, {"prompt": "😀𠮟る", "completion": "ｱｲｳ"}]
    path = tmp_path / f"qa{suffix}"
    if suffix == ".csv":
        quoted = [[f'"{v.replace(chr(34), chr(34) * 2)}"' for v in r.values()] for r in rows]
        path.write_text("\ufeffprompt,completion\r\n" + "\r\n".join(map(",".join, quoted)), encoding="utf-8", newline="")
    elif suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        data = "\n".join(json.dumps(r, ensure_ascii=False) for r in rows).encode()
        path.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
    assert [row for _, row in read_rows(path)] == rows
    assert [r.sample.prompt for r in read_samples(path)] == [r["prompt"] for r in rows]


BAD_LINES = {
    "not JSON": (b'{"id": "2", "prompt": ', "qa.jsonl:2: not JSON"),
    "Shift_JIS": ('{"id": "2", "prompt": "質問", "completion": "答"}'.encode("cp932"), "qa.jsonl:2: not UTF-8"),
    "no object": ([1, 2], "qa.jsonl:2: a JSON object is needed, not a list"),
    "missing": ({"id": "2", "prompt": "質問"}, "qa.jsonl:2 (completion): the field is missing"),
    "empty": ({"id": "2", "prompt": " \u3000", "completion": "答"}, "qa.jsonl:2 (prompt): empty"),
    "a number": ({"id": "2", "prompt": "質問", "completion": 3}, "qa.jsonl:2 (completion): text is needed, not a number"),
    "null": ({"id": "2", "prompt": None, "completion": "答"}, "qa.jsonl:2 (prompt): text is needed, not null"),
    "over-long": (
        {"id": "2", "prompt": "長" * 101, "completion": "答"},
        "qa.jsonl:2 (prompt): 101 characters, but at most 100",
    ),
    "same id": ({**GOOD, "prompt": "別"}, "qa.jsonl:2 (id): id '1' is already at qa.jsonl:1"),
    "no id": ({"prompt": "質問", "completion": "答"}, "qa.jsonl:2 (id): the field is missing"),
    "lost character": ({"id": "2", "prompt": "質\ufffd問", "completion": "答"}, "qa.jsonl:2 (prompt): holds U+FFFD"),
    "half a pair": (b'{"id": "2", "prompt": "\\ud83d", "completion": "x"}', "qa.jsonl:2 (prompt): holds half"),
}


@pytest.mark.parametrize("line, message", BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_row_is_refused_with_file_line_and_field(tmp_path, line, message):
    path = write(tmp_path / "qa.jsonl", GOOD, line, {**GOOD, "id": "3"})
    with pytest.raises(UserError) as error:
        read_samples(path, MAPPED, max_chars=100)
    assert message in str(error.value)
    assert "1 problem" in str(error.value)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("qa.xlsx", b"PK", ".xlsx suffix is not one of .jsonl"),
        ("qa.jsonl", b"\n \n", "holds no rows"),
        ("qa.json", b'{"prompt": "x"}', "qa.json:1: one list of objects is needed, not an object"),
        ("qa.json", b'[{"prompt": "x"},\n{"prompt" "x"}]', "qa.json:2: not JSON"),
        ("qa.csv", "質問,回答\n一,二\n".encode("cp932"), "qa.csv:1: not UTF-8"),
        ("qa.csv", b"prompt,completion\na,b\na,b,c\n", "qa.csv:3: 3 cells, but the header has 2"),
        ("qa.csv", b"prompt,prompt\na,b\n", "qa.csv:1: column 'prompt' is there 2 times"),
        ("qa.csv", b'prompt,completion\n"a\nb",c\nd,\n', "qa.csv:4 (completion): empty"),
        ("qa.jsonl.gz", b"no gzip", "cannot be decompressed"),
        ("none/qa.jsonl", None, "there is no such file"),
    ],
)
def test_a_bad_file_is_refused(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_samples(path)
    assert message in str(error.value)


def test_all_bad_rows_are_told_at_once(tmp_path):
    path = write(tmp_path / "qa.jsonl", {"prompt": ""}, GOOD, {"completion": 1})
    with pytest.raises(UserError) as error:
        read_samples(path)
    assert "4 problem(s)" in str(error.value)
    assert all(f"qa.jsonl:{n} ({f})" in str(error.value) for n in (1, 3) for f in ("prompt", "completion"))


def test_shift_jis_comes_with_the_remedy(tmp_path):
    with pytest.raises(UserError, match="CSV UTF-8"):
        read_samples(write(tmp_path / "qa.jsonl", BAD_LINES["Shift_JIS"][0]))


def test_text_is_kept_as_it_is_and_ids_follow_the_content(tmp_path):
    rows = [{"prompt": " ｶﾅ\u3000と①\n", "completion": "ｱ "}, {"prompt": "x", "completion": "ｱ "}]
    first, second = (r.sample for r in read_samples(write(tmp_path / "a.jsonl", *rows)))
    assert (first.prompt, first.completion) == (" ｶﾅ\u3000と①\n", "ｱ ")
    assert first.id != second.id
    again = [r.sample for r in read_samples(write(tmp_path / "b.jsonl", *reversed(rows)))]
    assert {first, second} == set(again)


def test_comparison_ignores_width_and_whitespace():
    assert normalise(" ｶﾞ１\u3000\n Ａ") == normalise("ガ1 A")


# --- splitting ---

DOCUMENTS = st.lists(st.tuples(st.text(max_size=5), st.integers(0, 30)), min_size=1, max_size=80)


@given(DOCUMENTS, st.text(max_size=3))
def test_no_document_is_in_two_splits_and_no_sample_is_lost(items, salt):
    samples = [sample(i, text, document=f"d{d}") for i, (text, d) in enumerate(items)]
    splits = split_by_document(samples, salt=salt, valid_share=0.3, test_share=0.3)
    where = {}
    for name, members in splits.items():
        for s in members:
            assert where.setdefault(s.document, name) == name
    assert sorted(s.id for m in splits.values() for s in m) == sorted(s.id for s in samples)


@given(DOCUMENTS, DOCUMENTS)
def test_added_documents_move_no_others(first, second):
    a = [sample(f"a{i}", t, document=f"d{d}") for i, (t, d) in enumerate(first)]
    b = [sample(f"b{i}", t, document=f"e{d}") for i, (t, d) in enumerate(second)]
    alone, together = split_by_document(a), split_by_document(a + b)
    for name in SPLITS:
        assert set(alone[name]) <= set(together[name])


def test_the_shares_are_about_those_asked_for():
    splits = split_by_document([sample(i, "x") for i in range(5000)], valid_share=0.1, test_share=0.2)
    assert [round(len(splits[s]) / 5000, 1) for s in SPLITS] == [0.7, 0.1, 0.2]


@given(st.lists(st.text(max_size=8), unique=True, max_size=60), st.randoms(use_true_random=False))
def test_subsets_are_nested_whatever_the_order_of_the_file(ids, random):
    samples = [sample(i, "x") for i in ids]
    order = nested_order(samples)
    random.shuffle(samples)
    assert nested_order(samples) == order
    # Adding a sample moves no two others past each other.
    assert [s for s in nested_order([*samples, sample("new one", "x")]) if s.id != "new one"] == order


def test_the_order_is_by_sha256_of_the_id():
    # sha256sum: "b" 3e23…, "c" 2e7d…, "a" ca97…
    assert [s.id for s in nested_order([sample(i, "x") for i in "abc"])] == ["c", "b", "a"]


def rows_of(samples, splits=None):
    return [Row(s, splits[i] if splits else None, f"qa.jsonl:{i + 1}") for i, s in enumerate(samples)]


def test_the_datas_own_split_wins():
    samples = [sample(i, f"質問{i}", document="one") for i in range(30)]
    splits = make_splits(rows_of(samples, ["train"] * 10 + ["valid"] * 10 + ["test"] * 10), near=None)
    assert {s.id for s in splits.test} == {str(i) for i in range(20, 30)}


def test_a_missing_split_is_taken_from_the_training_documents():
    samples = [sample(i, f"質問{i}", document=f"d{i // 2}") for i in range(200)]
    splits = make_splits(rows_of(samples, ["train"] * 180 + ["test"] * 20), near=None)
    assert len(splits.test) == 20
    assert splits.valid
    assert not {s.document for s in splits.valid} & {s.document for s in splits.train}


def test_half_named_splits_and_empty_splits_are_refused():
    samples = [sample(i, f"質問{i}") for i in range(3)]
    with pytest.raises(UserError, match=r"qa.jsonl:2: 2 of 3 rows name a split"):
        make_splits(rows_of(samples, ["train", None, "test"]))
    with pytest.raises(UserError, match="split is empty: 3 rows from 1 documents"):
        make_splits(rows_of([sample(i, f"質問{i}", document="one") for i in range(3)]))


def test_an_unknown_split_name_is_refused(tmp_path):
    path = write(tmp_path / "qa.jsonl", {**GOOD, "split": "holdout"})
    with pytest.raises(UserError, match=r"qa.jsonl:1 \(split\): 'holdout' is not one of train"):
        read_samples(path, FieldMapping(split="split"))


# --- duplicates ---


def jaccard(a: str, b: str, n: int) -> float:
    """The definition, in plain Python."""
    first, second = ({t[i : i + n] for i in range(max(1, len(t) - n + 1))} for t in (a, b))
    return len(first & second) / len(first | second)


TEXTS = st.lists(st.text(alphabet="abあ", max_size=14), max_size=14)


@settings(max_examples=150)
@given(TEXTS, TEXTS, st.sampled_from([0.3, 0.5, 0.8, 0.9, 1.0]), st.integers(1, 4))
def test_near_pairs_are_exactly_those_of_the_definition(left, right, threshold, n):
    near = NearDuplicates(threshold, n)
    across = [(i, j) for i, a in enumerate(left) for j, b in enumerate(right) if jaccard(a, b, n) >= threshold]
    within = [(i, j) for j, b in enumerate(left) for i, a in enumerate(left[:j]) if jaccard(a, b, n) >= threshold]
    assert near_pairs(left, right, near) == across
    assert near_pairs(left, None, near) == sorted(within)


@settings(max_examples=100)
@given(
    st.lists(st.tuples(st.text(alphabet="aｱあ ", min_size=1, max_size=8), st.sampled_from(SPLITS)), max_size=40),
    st.sampled_from([0.5, 0.9]),
)
def test_after_the_drops_no_train_item_is_near_a_held_out_one(items, threshold):
    near = NearDuplicates(threshold, 3)
    splits = {s: [sample(i, text) for i, (text, where) in enumerate(items) if where == s] for s in SPLITS}
    kept = drop_duplicates(splits, near)
    texts = {s: [f"{normalise(x.prompt)}\n{normalise(x.completion)}" for x in getattr(kept, s)] for s in SPLITS}
    for mine, others in (("train", texts["valid"] + texts["test"]), ("valid", texts["test"])):
        assert all(jaccard(a, b, 3) < threshold for a in texts[mine] for b in others)
    assert all(len(set(t)) == len(t) for t in texts.values())
    assert sum(kept.dropped.values()) == len(items) - sum(map(len, texts.values()))


def test_drops_are_counted_by_reason_and_the_test_keeps_its_items():
    long = "建設業を営もうとする者は、国土交通大臣の許可を受けなければならない。ただし軽微な工事を除く。"
    splits = {
        "train": [sample(1, "ｱ"), sample(2, "ア"), sample(3, long + "か"), sample(4, "別の質問"), sample(5, "い")],
        "valid": [sample(6, "い"), sample(7, long + "ね")],
        "test": [sample(8, long)],
    }
    result = drop_duplicates(splits, NearDuplicates(0.8, 5))
    assert [s.id for s in result.train] == ["1", "4"]
    assert [s.id for s in result.valid] == ["6"]
    assert [s.id for s in result.test] == ["8"]
    assert result.dropped == {
        "train: exact duplicate": 1,
        "train: exact duplicate of a valid item": 1,
        "train: near-duplicate of a test item": 1,
        "valid: near-duplicate of a test item": 1,
    }
    exact_only = drop_duplicates(splits, None)
    assert [s.id for s in exact_only.train] == ["1", "3", "4"]


def test_twenty_thousand_samples_are_compared_in_seconds():
    def text(i: int) -> str:
        return "".join(chr(0x4E00 + (i * 7919 + k * k * (i % 97 + 3)) % 2000) for k in range(140)) + "この法律による。"

    left, right = [text(i) for i in range(17_000)], [text(i) for i in range(16_990, 20_000)]
    start = time.perf_counter()
    pairs = near_pairs(left, right, NearDuplicates())
    assert time.perf_counter() - start < 20
    assert {(16_990 + k, k) for k in range(10)} <= set(pairs)


# --- lengths in tokens ---


def encoded(i: int, prompt: int, completion: int) -> EncodedSample:
    return EncodedSample(str(i), "p", "c", "d", "", [1] * prompt, [2] * completion)


def test_long_samples_are_dropped_and_counted_never_truncated():
    samples = [encoded(i, 10, 5) for i in range(99)] + [encoded(99, 10, 6)]
    kept, dropped = drop_long(samples, 15)
    assert kept == samples[:99]
    assert dropped == {"train: longer than 15 tokens": 1}
    assert drop_long(kept, 15) == (kept, {})


def test_too_many_long_samples_are_refused_with_both_numbers():
    with pytest.raises(UserError, match=r"6 of 100 train samples \(6.0%\) are longer than 15.*at most 5%.*has 30"):
        drop_long([encoded(i, 10, 20 if i < 6 else 5) for i in range(100)], 15)
