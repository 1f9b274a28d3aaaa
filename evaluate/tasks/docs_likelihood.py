"""How likely a model holds the right answers of the benchmarks' questions: a graded score beside the papers' own.

A small model answers none of these questions, so that its scores are all zero or chance and say nothing about what
adaptation made it forget. The probability that it gives to the right answer says it on a hundred questions in a second.
These are the kit's own measures, comparable between files of one base and with no published number.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, zip_longest
from math import exp, log

from datasets import Dataset

from tsugiki.evaluate.data import JMMLU_NC_ND, Row, load_set
from tsugiki.evaluate.tasks.docs_takase import CULTURE

Pair = tuple[str, str, str]  # id, prompt, right answer


def likelihood(of: str, data_dir: str | None = None, **_) -> dict[str, Dataset]:
    """Questions without examples, each with its right answer: ``id``, ``prompt``, ``target``.

    Args:
        of: ``niilc``, ``jemhopqa``, ``jmmlu_culture``, ``jcommonsenseqa``, ``mgsm_ja`` or ``xwinograd_ja`` (there the
            sentence up to and with the right candidate is the prompt, and the rest of the sentence the answer).
        data_dir: of :func:`tsugiki.evaluate.data.load_set`.
    """
    pairs = [p for p in _PAIRS[of](data_dir) if p[2].strip()]
    return {"test": Dataset.from_list([{"id": i, "prompt": prompt, "target": answer} for i, prompt, answer in pairs])}


def _asked(question: object) -> str:
    return f"質問：{str(question).strip()}\n答え："


def _niilc(data_dir: str | None) -> list[Pair]:
    rows = load_set("niilc", data_dir, splits=["test"])["test"]
    return [(r["id"], _asked(r["text"]), r["answers"][0]) for r in rows if r["answers"] and r["answers"] != ["-"]]


def _jemhopqa(data_dir: str | None) -> list[Pair]:
    return [(r["qid"], _asked(r["question"]), r["answer"]) for r in load_set("jemhopqa", data_dir, splits=["dev"])["dev"]]


def _jmmlu_culture(data_dir: str | None) -> list[Pair]:
    subjects = []
    for subject in CULTURE:
        rows = load_set("jmmlu_nc_nd" if subject in JMMLU_NC_ND else "jmmlu", data_dir, config=subject)["test"]
        subjects.append([(f"{subject}/{i}", _asked(r["question"]), r[r["answer"]]) for i, r in enumerate(rows)])
    return [pair for pair in chain.from_iterable(zip_longest(*subjects)) if pair]  # in turn: a limit sees all five


def _jcommonsenseqa(data_dir: str | None) -> list[Pair]:
    rows = load_set("jcommonsenseqa", data_dir, splits=["valid"])["valid"]
    return [(str(r["q_id"]), _asked(r["question"]), r[f"choice{r['label']}"]) for r in rows]


def _mgsm_ja(data_dir: str | None) -> list[Pair]:
    rows = load_set("mgsm", data_dir, config="ja", splits=["test"])["test"]
    return [(f"ja/{i}", _asked(r["question"]), str(r["answer_number"])) for i, r in enumerate(rows)]


def _xwinograd_ja(data_dir: str | None) -> list[Pair]:
    pairs = []
    for i, r in enumerate(load_set("xwinograd", data_dir, config="jp", splits=["test"])["test"]):
        before, _, rest = r["sentence"].partition("_")
        pairs.append((f"jp/{i}", before + r[f"option{r['answer']}"], rest.strip()))
    return pairs


_PAIRS = {"niilc": _niilc, "jemhopqa": _jemhopqa, "jmmlu_culture": _jmmlu_culture, "jcommonsenseqa": _jcommonsenseqa,
          "mgsm_ja": _mgsm_ja, "xwinograd_ja": _xwinograd_ja}  # fmt: skip


def score(doc: Row, results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """The answer's log2 probability a character (bits, at most 0; more is better) and the probability itself (0 to 1).

    A character and not a token, so that a tokenizer's coarseness does not count.
    """
    logprob, _ = results[0]
    nats = logprob / len(doc["target"])
    return {"log2_probability": nats / log(2), "char_probability": exp(nats)}
