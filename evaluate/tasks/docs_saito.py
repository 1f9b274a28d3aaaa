"""Saito et al.'s 19 tasks: rows whose prompts are complete, and how their answers are scored.

Every builder returns a ``DatasetDict`` with the split ``test``; a row's ``prompt`` holds description, shots and item to the
byte, so that ``num_fewshot`` is 0 and no harness draws anything. Three families, each as its own harness had it:

- llm-jp-eval 1.3.0: one fixed prefix; the shots are the first of the training items shuffled with seed 42.
- the JP harness (lm-evaluation-harness jp, 9b42d41): one ``Random(42)`` shuffles the items, then draws each item's shots.
- lm-evaluation-harness 0.4.2: ``Random(1234)`` draws each item's shots, in item order (``--seed 42`` did not reach it).
  Its templates lost one final newline, so that a description is followed by one, not two.

The built-in tasks of today's lm-eval have drifted from 0.4.2 and are not used. Rows stand in the order in which the
original ran through them, except that the subjects of MMLU and BBH take turns, so that ``--limit`` sees all of them.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.resources import files
from importlib.util import find_spec
from itertools import zip_longest
from math import exp
from typing import Any

import yaml
from datasets import Dataset, DatasetDict
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask

from tsugiki.errors import UserError
from tsugiki.evaluate import metrics_saito as m
from tsugiki.evaluate.data import BBH_SUBTASKS, JMMLU_SUBJECTS, load_set
from tsugiki.evaluate.metrics import INVALID, exact_match_loose, llmjp_char_f1, pass_at_k

Row = dict[str, Any]
ROOM = 10  # tokens beyond the reference's own that the JP harness allows a summary


def _test(rows: list[Row]) -> DatasetDict:
    return DatasetDict({"test": Dataset.from_list(rows)})


def _needs(*modules: str) -> None:
    """Say before anything is computed that a word splitter is missing."""
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise UserError(
            f"the words of Japanese text cannot be counted without {' and '.join(missing)}",
            hint="It comes from the extra `tasks`: pip install 'tsugiki[tasks]'",
        )


# --- llm-jp-eval 1.3.0 ---------------------------------------------------------------------------------------

LLMJP_HEAD = (
    "以下は、タスクを説明する指示と、文脈のある入力の組み合わせです。要求を適切に満たす応答を書きなさい。\n\n### 指示:\n"
)


def llmjp_prompt(instruction: str, shots: Iterable[tuple[str, str]], item: str) -> str:
    """The prompt of llm-jp-eval 1.3.0 from its instruction, (input, output) shots and the item's input."""
    parts = [f"\n\n### 入力:\n{given}\n\n### 応答:\n{answer}" for given, answer in [*shots, (item, "")]]
    return LLMJP_HEAD + instruction + "".join(parts)


def llmjp_shots(train: Sequence[tuple[str, str]], shots: int) -> list[tuple[str, str]]:
    """The first ``shots`` of the training items after ``random.seed(42); random.shuffle``."""
    shuffled = list(train)
    random.Random(42).shuffle(shuffled)
    return shuffled[:shots]


def _llmjp(
    name: str, train: str, test: str, pair: Callable[[Row], tuple[str, str]], *, key: str, instruction: str, shots: int,
    data_dir: str | None, keep: Callable[[Row], bool] = lambda row: True,
) -> DatasetDict:  # fmt: skip
    data = load_set(name, data_dir, splits=(train, test))
    chosen = llmjp_shots([pair(row) for row in data[train] if keep(row)], shots)
    rows = []
    for row in filter(keep, data[test]):
        given, target = pair(row)
        rows.append({"id": str(row[key]), "prompt": llmjp_prompt(instruction, chosen, given), "target": target})
    return _test(rows)


def jcommonsenseqa(instruction: str, shots: int, data_dir: str | None = None, **_) -> DatasetDict:
    def pair(row: Row) -> tuple[str, str]:
        choices = ",".join(f"{i}.{row[f'choice{i}']}" for i in range(5))
        return f"質問：{row['question']}\n選択肢：{choices}", str(row["label"])

    return _llmjp("jcommonsenseqa", "train", "valid", pair, key="q_id", instruction=instruction, shots=shots, data_dir=data_dir)


def jemhopqa(instruction: str, shots: int, data_dir: str | None = None, **_) -> DatasetDict:
    def pair(row: Row) -> tuple[str, str]:
        return f"質問：{row['question']}", row["answer"]

    return _llmjp("jemhopqa", "train", "dev", pair, key="qid", instruction=instruction, shots=shots, data_dir=data_dir)


def niilc(instruction: str, shots: int, data_dir: str | None = None, **_) -> DatasetDict:
    """Answers joined by commas; the items whose answer is ``-`` are left out."""

    def pair(row: Row) -> tuple[str, str]:
        return f"質問：{row['text'].strip()}", ",".join(a.strip() for a in row["answers"] if a and a.strip())

    return _llmjp("niilc", "dev", "test", pair, key="id", instruction=instruction, shots=shots, data_dir=data_dir,
                  keep=lambda row: pair(row)[1] != "-")  # fmt: skip


def jsquad(instruction: str, shots: int, data_dir: str | None = None, **_) -> DatasetDict:
    """Scored against the first of the two or three answers only."""

    def pair(row: Row) -> tuple[str, str]:
        return f"文章：{row['context']}\n質問：{row['question']}", row["answers"]["text"][0]

    return _llmjp("jsquad", "train", "valid", pair, key="id", instruction=instruction, shots=shots, data_dir=data_dir)


def jmmlu_split(rows: Iterable[Row]) -> tuple[list[Row], list[Row], list[Row]]:
    """llm-jp-eval's (train, dev, test) of JMMLU's 53 subjects: 32, 3,524 and 3,541 rows.

    One ``random.seed(42)``; each subject, in :data:`JMMLU_SUBJECTS`' order, is shuffled and halved; then the halves of all
    are shuffled; the first 16 of each become train.
    """
    by_subject: dict[str, list[Row]] = {subject: [] for subject in JMMLU_SUBJECTS}
    for row in rows:
        by_subject[row["subject"]].append(row)
    draws = random.Random(42)
    dev: list[Row] = []
    test: list[Row] = []
    for found in by_subject.values():
        draws.shuffle(found)
        dev += found[: len(found) // 2]
        test += found[len(found) // 2 :]
    draws.shuffle(dev)
    draws.shuffle(test)
    return dev[:16] + test[:16], dev[16:], test[16:]


def jmmlu(instruction: str, shots: int, data_dir: str | None = None, **_) -> DatasetDict:
    def pair(row: Row) -> tuple[str, str]:
        # The original opened the files as text, where every kind of line end becomes \n.
        question, *choices = (row[c].replace("\r\n", "\n").replace("\r", "\n") for c in ("question", *"ABCD"))
        options = ",".join(f"{letter}.{choice}" for letter, choice in zip("ABCD", choices, strict=True))
        return f"質問：{question}\n選択肢：{options}", row["answer"]

    rows = load_set("jmmlu", data_dir)["test"]
    train, _dev, test = jmmlu_split([{**row, "id": f"jmmlu-{i}"} for i, row in enumerate(rows)])
    chosen = [pair(row) for row in train[:shots]]
    return _test(
        [
            {"id": row["id"], "subject": row["subject"], "prompt": llmjp_prompt(instruction, chosen, pair(row)[0]),
             "target": row["answer"]}
            for row in test
        ]
    )  # fmt: skip


def score_choice(doc: Row, results: Sequence[str]) -> dict[str, float]:
    """The whole answer is the index or letter; ``unparsed`` when it is none of them."""
    said = m.before_blank_line(results[0])
    known = "01234" if doc["target"].isdigit() else "ABCD"
    return {"exact_match": float(said == m.before_blank_line(doc["target"])), "unparsed": float(len(said) != 1 or said not in known)}


def score_char_f1(doc: Row, results: Sequence[str]) -> dict[str, float]:
    said, target = m.before_blank_line(results[0]), m.before_blank_line(doc["target"])
    return {"char_f1": llmjp_char_f1(said, target), "exact_match": float(said == target)}


# --- the JP harness ------------------------------------------------------------------------------------------


def jp_shots(items: Sequence[Row], train: Sequence[Row] | None, shots: int) -> list[tuple[Row, list[Row]]]:
    """(item, its shots) in the JP harness's order.

    One ``Random(42)`` shuffles the items, then draws each one's shots from ``train``; without it from the items in their
    own order, one more than needed, so that the item itself can be left out.
    """
    draws = random.Random(42)
    pool, order = list(items if train is None else train), list(items)
    draws.shuffle(order)
    found = []
    for item in order:
        chosen = draws.sample(pool, shots + (train is None))
        found.append((item, chosen if train is not None else [row for row in chosen if row != item][:shots]))
    return found


def mgsm_ja(shots: int, data_dir: str | None = None, **_) -> DatasetDict:
    data = load_set("mgsm", data_dir, config="ja")

    def text(row: Row) -> str:
        return f"問題：{row['question'].replace('問題：', '')}\nステップごとの答え："

    items = [{**row, "id": f"mgsm-ja-{i}"} for i, row in enumerate(data["test"])]
    rows = []
    for item, chosen in jp_shots(items, data["train"], shots):
        shown = [text(row) + row["answer"].replace("ステップごとの答え：", "") for row in chosen]
        rows.append({"id": item["id"], "prompt": "\n\n".join([*shown, text(item)]), "target": str(item["answer_number"])})
    return _test(rows)


def score_integer(doc: Row, results: Sequence[str]) -> dict[str, float]:
    number = m.last_integer(results[0])
    return {"acc": float(number == int(doc["target"])), "unparsed": float(number is None)}


def xlsum_ja(shots: int, data_dir: str | None = None, **_) -> DatasetDict:
    _needs("fugashi", "unidic_lite")
    data = load_set("xlsum_ja", data_dir, splits=("train", "test"))
    items = [{"id": str(row.get("id") or f"xlsum-{i}"), "text": row["text"], "summary": row["summary"]}
             for i, row in enumerate(data["test"])]  # fmt: skip
    rows = []
    for item, chosen in jp_shots(items, data["train"], shots):
        shown = [f"ニュース記事:{row['text']}\n要約:{row['summary']}" for row in chosen]
        prompt = "\n\n".join([*shown, f"ニュース記事:{item['text']}\n要約:"])
        rows.append({"id": item["id"], "prompt": "与えられたニュース記事を要約してください。\n\n" + prompt, "target": item["summary"]})
    return _test(rows)


class _OwnTask(ConfigurableTask):
    """A task whose requests are more than a template: lm-eval hands such a class its YAML."""

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        super().__init__(config={key: value for key, value in (config or {}).items() if key != "class"})


class XLSum(_OwnTask):
    """XL-Sum's requests depend on the model: long articles are cut to its context, and in the paper's variant
    (``metadata: reference_length: true``) an answer may have as many of its tokens as the reference, and ten more.

    Where no model was named (:func:`tsugiki.evaluate.metrics_saito.use_model`) neither is done.
    """

    def construct_requests(self, doc: Row, ctx: str, **kwargs) -> Instance:
        request = super().construct_requests(doc, ctx, **kwargs)
        prompt, options = request.arguments
        tokens = m.model_tokens(doc["target"])
        if tokens is not None and (self.config.metadata or {}).get("reference_length"):
            options = {**options, "max_gen_toks": len(tokens) + ROOM}
        if m.model_context() is not None:
            prompt = m.cut_articles(prompt, m.model_context() - options["max_gen_toks"])
        request.arguments = (prompt, options)
        return request


def score_summary(doc: Row, results: Sequence[str]) -> dict[str, float]:
    """``rouge2``: over the tokens of the model itself, as the paper's harness did; ``rouge2_mecab``: over words.

    The first is NaN where no model was named.
    """
    said, target = results[0], doc["target"]
    ids = [m.model_tokens(text) for text in (said, target)]
    own = float("nan") if ids[0] is None else m.rouge2(*ids)
    return {"rouge2": own, "rouge2_mid": own, "rouge2_mecab": m.rouge2(m.mecab_words(said), m.mecab_words(target))}


rouge2_mid = m.bootstrap_mid


def _wmt20(pair: str, shots: int, data_dir: str | None) -> DatasetDict:
    source, target = ({"en": "English", "ja": "Japanese"}[code] for code in pair.split("-"))
    items = [
        {"src": row["source"].rstrip(), "ref": row["reference"].rstrip()}
        for row in load_set("wmt20", data_dir, config=pair)["test"]
    ]

    def text(row: Row) -> str:
        return f"{source} phrase: {row['src']}\n{target} phrase:"

    rows = []
    for i, (item, chosen) in enumerate(jp_shots(items, None, shots)):
        shown = [f"{text(row)} {row['ref']}" for row in chosen]
        rows.append({"id": f"wmt20-{pair}-{i}", "prompt": "\n\n".join([*shown, text(item)]), "target": item["ref"]})
    return _test(rows)


def wmt20_en_ja(shots: int, data_dir: str | None = None, **_) -> DatasetDict:
    _needs("nagisa")
    return _wmt20("en-ja", shots, data_dir)


def wmt20_ja_en(shots: int, data_dir: str | None = None, **_) -> DatasetDict:
    return _wmt20("ja-en", shots, data_dir)


def _bleu(reference: str, prediction: str) -> dict[str, tuple[str, str]]:
    # The second is what lm-eval calls BLEU's standard error; it computes none itself for a metric of ours.
    return {"bleu": (reference, prediction), "bleu_stderr": (reference, prediction)}


def score_into_japanese(doc: Row, results: Sequence[str]) -> dict[str, tuple[str, str]]:
    return _bleu(m.nagisa_words(doc["target"]), m.nagisa_words(results[0]))


def score_into_english(doc: Row, results: Sequence[str]) -> dict[str, tuple[str, str]]:
    return _bleu(doc["target"], results[0])


corpus_bleu = m.corpus_bleu
corpus_bleu_stderr = m.corpus_bleu_stderr


# --- lm-evaluation-harness 0.4.2 -----------------------------------------------------------------------------


def lm_eval_shots(items: Sequence[Row], pool: Sequence[Row], shots: int, *, extra: bool) -> list[list[Row]]:
    """Each item's shots as 0.4.2's default sampler draws them: one ``Random(1234)``, in item order.

    Args:
        extra: one more is drawn and the first ``shots`` other than the item kept; so where the task's YAML names neither
            a few-shot nor a test split (for 0.4.2 the two are then "the same").
    """
    draws = random.Random(1234)
    pool = list(pool)
    return [[row for row in draws.sample(pool, shots + extra) if row != item][:shots] for item in items]


def _shown(shots: Iterable[Row], text: Callable[[Row], str], target: Callable[[Row], str]) -> str:
    """Shots as 0.4.2 joins them: text, one space, target, and a blank line after each."""
    return "".join(f"{text(row)} {target(row)}\n\n" for row in shots)


def openbookqa(shots: int, data_dir: str | None = None, **_) -> DatasetDict:
    data = load_set("openbookqa", data_dir, splits=("train", "test"))

    def gold(row: Row) -> int:
        return list(row["choices"]["label"]).index(row["answerKey"].lstrip())

    def text(row: Row) -> str:
        return row["question_stem"]

    def target(row: Row) -> str:
        return row["choices"]["text"][gold(row)]

    drawn = lm_eval_shots(data["test"], data["train"], shots, extra=False)
    return _test(
        [
            {"id": str(row.get("id", i)), "prompt": _shown(chosen, text, target) + text(row),
             "choices": list(row["choices"]["text"]), "gold": gold(row)}
            for i, (row, chosen) in enumerate(zip(data["test"], drawn, strict=True))
        ]
    )  # fmt: skip


def triviaqa(shots: int, data_dir: str | None = None, **_) -> DatasetDict:
    """The question mark is added to the question's own."""
    data = load_set("triviaqa", data_dir, splits=("train", "validation"))

    def text(row: Row) -> str:
        return f"Question: {row['question']}?\nAnswer:"

    def target(row: Row) -> str:
        return row["answer"]["aliases"][0]

    drawn = lm_eval_shots(data["validation"], data["train"], shots, extra=True)
    return _test(
        [
            {"id": str(row.get("question_id", i)), "prompt": _shown(chosen, text, target) + text(row),
             "target": list(row["answer"]["aliases"])}
            for i, (row, chosen) in enumerate(zip(data["validation"], drawn, strict=True))
        ]
    )  # fmt: skip


def score_trivia(doc: Row, results: Sequence[str]) -> dict[str, float]:
    """One leading space dropped, then equal to any alias but for case and ASCII punctuation."""
    said = results[0].removeprefix(" ")
    return {"exact_match": max((exact_match_loose(said, alias) for alias in doc["target"]), default=0.0)}


def hellaswag_text(text: str) -> str:
    """HellaSwag's cleaning: WikiHow's bracketed marks dropped, doubled spaces halved once."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def hellaswag(shots: int, data_dir: str | None = None, **_) -> DatasetDict:
    data = load_set("hellaswag", data_dir, splits=("train", "validation"))

    def clean(row: Row) -> Row:
        context = f"{row['ctx_a']} {row['ctx_b'].capitalize()}"
        return {"query": hellaswag_text(f"{row['activity_label']}: {context}"),
                "choices": [hellaswag_text(ending) for ending in row["endings"]], "gold": int(row["label"])}  # fmt: skip

    items, pool = ([clean(row) for row in data[split]] for split in ("validation", "train"))
    drawn = lm_eval_shots(items, pool, shots, extra=True)

    def text(row: Row) -> str:
        return row["query"]

    def target(row: Row) -> str:
        return row["choices"][row["gold"]]

    return _test(
        [
            {"id": f"hellaswag-{i}", "prompt": _shown(chosen, text, target) + text(row), "choices": row["choices"], "gold": row["gold"]}
            for i, (row, chosen) in enumerate(zip(items, drawn, strict=True))
        ]
    )


def squad2(shots: int, data_dir: str | None = None, **_) -> DatasetDict:
    """0.4.2's class writes a space before each shot's answer itself, beside the usual one: there are two."""
    data = load_set("squad2", data_dir, splits=("train", "validation"))

    def text(row: Row) -> str:
        return f"Title: {row['title']}\n\nBackground: {row['context']}\n\nQuestion: {row['question']}\n\nAnswer:"

    def target(row: Row) -> str:
        return " " + (row["answers"]["text"] or ["unanswerable"])[0]

    drawn = lm_eval_shots(data["validation"], data["train"], shots, extra=True)
    return _test(
        [
            {"id": str(row["id"]), "prompt": _shown(chosen, text, target) + text(row), "target": list(row["answers"]["text"])}
            for row, chosen in zip(data["validation"], drawn, strict=True)
        ]
    )


class SQuAD2(_OwnTask):
    """Two requests an item: the answer up to a line's end, and how likely `` unanswerable`` is."""

    def construct_requests(self, doc: Row, ctx: str, **kwargs) -> list[Instance]:
        answer = super().construct_requests(doc, ctx, **kwargs)
        for key in ("apply_chat_template", "chat_template"):
            kwargs.pop(key, None)
        none = Instance(request_type="loglikelihood", doc=doc, arguments=(ctx, " unanswerable"), idx=1, **kwargs)
        return [answer, none]


def score_squad2(doc: Row, results: Sequence[Any]) -> dict[str, Any]:
    said, (logprob, _greedy) = results
    exact, references = m.squad_exact(said, doc["target"]), doc["target"]
    best = (exact, exp(logprob), bool(references), bool(said))
    return {"exact": exact, "f1": m.squad_f1(said, references), "best_exact": best}


squad_best_exact = m.squad_best_exact


def xwino(shots: int, data_dir: str | None = None, **_) -> DatasetDict:
    """Two contexts, the sentence up to the pronoun with either candidate, and the same continuation.

    The shots come from the test set: an item that draws itself has one shot less, as in 0.4.2.
    """
    items = load_set("xwinograd", data_dir, config="en")["test"]

    def contexts(row: Row) -> list[str]:
        before = row["sentence"][: row["sentence"].index("_")]
        return [before + row["option1"], before + row["option2"]]

    def gold(row: Row) -> int:
        return int(row["answer"]) - 1

    def rest(row: Row) -> str:
        return row["sentence"][row["sentence"].index("_") + 1 :].strip()

    drawn = lm_eval_shots(items, items, shots, extra=False)
    rows = []
    for i, (row, chosen) in enumerate(zip(items, drawn, strict=True)):
        head = _shown(chosen, lambda shot: contexts(shot)[gold(shot)], rest)
        rows.append({"id": f"xwino-en-{i}", "contexts": [head + c for c in contexts(row)], "gold": gold(row), "target": rest(row)})
    return _test(rows)


def _in_turn(groups: Iterable[Sequence[Row]]) -> list[Row]:
    """The first of each group, then the second of each, and so on."""
    return [row for rank in zip_longest(*groups) for row in rank if row is not None]


def mmlu(shots: int, data_dir: str | None = None, **_) -> DatasetDict:
    data = load_set("mmlu", data_dir, splits=("dev", "test"))

    def text(row: Row) -> str:
        options = "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABCD", row["choices"], strict=True))
        return f"{row['question'].strip()}\n{options}\nAnswer:"

    def target(row: Row) -> str:
        return "ABCD"[int(row["answer"])]

    first: dict[str, list[Row]] = {}
    for row in data["dev"]:
        first.setdefault(row["subject"], []).append(row)
    by_subject: dict[str, list[Row]] = {}
    for row in data["test"]:
        subject = row["subject"]
        found = by_subject.setdefault(subject, [])
        about = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n"
        shown = _shown(first.get(subject, [])[:shots], text, target)
        found.append({"id": f"{subject}-{len(found)}", "subject": subject, "prompt": about + shown + text(row),
                      "choices": list("ABCD"), "gold": int(row["answer"])})  # fmt: skip
    return _test(_in_turn(by_subject.values()))


def gsm8k(shots: int, data_dir: str | None = None, **_) -> DatasetDict:
    data = load_set("gsm8k", data_dir, splits=("train", "test"))

    def text(row: Row) -> str:
        return f"Question: {row['question']}\nAnswer:"

    def target(row: Row) -> str:
        return row["answer"]

    drawn = lm_eval_shots(data["test"], data["train"], shots, extra=False)
    return _test(
        [
            {"id": f"gsm8k-{i}", "prompt": _shown(chosen, text, target) + text(row), "target": row["answer"]}
            for i, (row, chosen) in enumerate(zip(data["test"], drawn, strict=True))
        ]
    )


def score_gsm8k(doc: Row, results: Sequence[str]) -> dict[str, float]:
    """strict-match: the number after the first ``####``."""
    said = m.first_match(m.GSM8K_STRICT, results[0])
    return {"exact_match": float(m.gsm8k_plain(said) == m.gsm8k_plain(doc["target"])), "unparsed": float(said == INVALID)}


def bbh_heads(cot_prompts: Iterable[Row] | None) -> dict[str, str]:
    """Sub-task -> description and three worked examples, up to the item, as 0.4.2's YAML has them.

    From the publisher's files; without them (the hub has none) from lm-eval's own YAML of today, whose examples are the
    same but for one line end.
    """
    heads = {}
    for row in cot_prompts or ():
        about, _, examples = row["target"].partition("\n\nQ: ")
        heads[row["subtask"]] = f"{about}\nQ: {examples.rstrip()}\n\n"
    for subtask in () if heads else BBH_SUBTASKS:
        config = yaml.safe_load((files("lm_eval") / f"tasks/bbh/cot_fewshot/{subtask}.yaml").read_text(encoding="utf-8"))
        between = " " if subtask == "sports_understanding" else "\n"
        shown = [f"Q: {s['input']}\nA: Let's think step by step.{between}{s['target']}\n\n" for s in config["fewshot_config"]["samples"]]
        heads[subtask] = config["description"].rstrip("\n") + "\n" + "".join(shown)
    return heads


def bbh(data_dir: str | None = None, **_) -> DatasetDict:
    data = load_set("bbh", data_dir)
    heads = bbh_heads(data.get("cot_prompts"))
    by_subtask: dict[str, list[Row]] = {}
    for row in data["test"]:
        subtask = row["subtask"]
        found = by_subtask.setdefault(subtask, [])
        prompt = f"{heads[subtask]}Q: {row['input']}\nA: Let's think step by step."
        found.append({"id": f"{subtask}-{len(found)}", "subject": subtask, "prompt": prompt, "target": row["target"]})
    return _test(_in_turn(by_subtask.values()))


def score_bbh(doc: Row, results: Sequence[str]) -> dict[str, float]:
    said = m.first_match(m.BBH_ANSWER, results[0])
    return {"exact_match": float(said == doc["target"]), "unparsed": float(said == INVALID)}


# --- code ----------------------------------------------------------------------------------------------------


def _code(name: str, data_dir: str | None) -> DatasetDict:
    kept = ("prompt", "entry_point", "test")
    return _test([{"id": row["task_id"], **{k: row[k] for k in kept}} for row in load_set(name, data_dir)["test"]])


def humaneval(data_dir: str | None = None, **_) -> DatasetDict:
    return _code("humaneval", data_dir)


def jhumaneval(data_dir: str | None = None, **_) -> DatasetDict:
    return _code("jhumaneval", data_dir)


CODE_STOPS = ("\nclass", "\ndef", "\n#", "\n@", "\nprint", "\nif", "\n```", "<file_sep>")
CODE_SECONDS = 3.0


def score_code(doc: Row, results: Sequence[Sequence[str]]) -> dict[str, float]:
    """pass@1 (and pass@10) over an item's completions, each run with the item's tests in the sandbox.

    ``timed_out`` and ``empty`` are shares of the completions.

    Raises:
        UserError: running model-written code was not asked for, or no sandbox holds here.
    """
    from tsugiki.evaluate import sandbox

    sandbox.allowed()
    said = [m.first_stop(completion, CODE_STOPS) for completion in results[0]]
    # Alike completions end alike: each is run once.
    distinct = list(dict.fromkeys(said))
    ran = dict(zip(distinct, sandbox.run_many([m.code_program(doc, c) for c in distinct], timeout=CODE_SECONDS), strict=True))
    n, passed = len(said), sum(ran[c].ok for c in said)
    scores = {f"pass@{k}": pass_at_k(n, passed, k) for k in (1, 10) if k <= n}
    return scores | {
        "timed_out": sum(ran[c].timed_out for c in said) / n,
        "empty": sum(not c.strip() for c in said) / n,
    }
