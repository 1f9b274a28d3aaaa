"""Extractions and metrics of Saito et al.'s 19 tasks that :mod:`tsugiki.evaluate.metrics` does not have.

All scores are 0–1, as in the scaling tables; BLEU and ROUGE are their usual 0–100 divided by 100.
"""

from __future__ import annotations

import re
import string
import unicodedata
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import cache
from itertools import pairwise

import numpy as np

from tsugiki.evaluate.metrics import INVALID

# --- extractions ---------------------------------------------------------------------------------------------


def before_blank_line(text: str) -> str:
    """What llm-jp-eval 1.3.0 scores of an answer: up to the first blank line, no white space around, NFKC."""
    return unicodedata.normalize("NFKC", text.split("\n\n")[0].strip())


def last_integer(text: str) -> int | None:
    """The JP harness's answer of MGSM: the last number-like run, if it is a whole number.

    ``-?[0-9.,]+``, points around it and commas dropped; ``3.0`` is 3, ``3.5`` and ``1.2.3`` are None.
    """
    found = re.findall(r"-?[0-9.,]+", text)
    if not found:
        return None
    try:
        number = float(found[-1].strip(".").replace(",", ""))
    except ValueError:
        return None
    return int(number) if number.is_integer() else None


def first_match(pattern: str, text: str) -> str:
    """lm-eval's regex filter: group 1 of the first match without white space around, else ``[invalid]``."""
    match = re.search(pattern, text)
    return match.group(1).strip() if match else INVALID


GSM8K_STRICT = r"#### (\-?[0-9\.\,]+)"
BBH_ANSWER = r"(?<=the answer is )(.*)(?=.)"


def gsm8k_plain(text: str) -> str:
    """What lm-eval's GSM8K compares: lower case; commas, dollar signs, all up to ``#### `` and a final point dropped."""
    for pattern in (",", r"\$", r"(?s).*#### ", r"\.$"):
        text = re.sub(pattern, "", text)
    return text.lower()


def first_stop(text: str, stops: Sequence[str]) -> str:
    """``text`` up to the first of the stop strings."""
    return text[: min((at for at in map(text.find, stops) if at >= 0), default=len(text))]


# --- the model's tokenizer -----------------------------------------------------------------------------------
# Saito et al.'s XL-Sum is scored on, and its answers are limited by, the tokens of the model that is scored.


class _Model:
    """What the tasks may ask of the model that answers: its tokens and its context."""

    encode: Callable[[str], list[int]] | None = None
    context: int | None = None


def use_model(lm) -> None:
    """Tell the tasks which model answers; call it before ``lm_eval.evaluate``. None forgets it.

    Args:
        lm: an lm-eval model with ``tok_encode(text, add_special_tokens=False)`` and ``max_length``.
    """
    _Model.encode = None if lm is None else lambda text: list(lm.tok_encode(text, add_special_tokens=False))
    _Model.context = getattr(lm, "max_length", None)


def model_tokens(text: str) -> list[int] | None:
    """Token ids of ``text`` in the model that answers, without special tokens; None where none was named."""
    return None if _Model.encode is None else _Model.encode(text)


def model_context() -> int | None:
    """Tokens of context of the model that answers; None where none was named."""
    return _Model.context


def cut_articles(prompt: str, most: int, *, article: str = "ニュース記事:", summary: str = "要約:") -> str:
    """The JP harness's way of making a long XL-Sum prompt fit: each article keeps whole sentences of its share.

    Args:
        prompt: description, then for each shot and the item ``article`` + text + newline + ``summary`` + summary.
        most: tokens that the prompt may have; each article gets an equal share of them.

    Returns:
        the prompt as it is when it fits or when no model was named. As in the original, what is cut ends in ``。`` and
        a newline, and the description's tokens are not counted; a first sentence that is too long is cut within.
    """
    tokens = model_tokens(prompt)
    if tokens is None or len(tokens) <= most:
        return prompt
    head, *parts = prompt.split(article)
    share = most // len(parts)
    cut = head
    for part in parts:
        text, answer = (article + part).rsplit(summary, 1)
        kept: list[str] = []
        for sentence in text.split("。"):
            if len(model_tokens("。".join([*kept, sentence]))) > share:
                if kept:
                    kept[-1] += "。\n"
                else:
                    fits = bisect_right(range(1, len(sentence)), share, key=lambda n: len(model_tokens(sentence[:n])))
                    kept.append(sentence[:fits] + "\n")
                break
            kept.append(sentence)
        cut += "。".join(kept) + summary + answer
    return cut


# --- ROUGE-2 -------------------------------------------------------------------------------------------------


def rouge2(prediction: Sequence[Hashable], reference: Sequence[Hashable]) -> float:
    """ROUGE-2 F1 of two token sequences (words or ids), as ``rouge_score`` defines it: clipped bigram matches."""
    a, b = (Counter(pairwise(tokens)) for tokens in (prediction, reference))
    overlap = sum((a & b).values())
    precision, recall = overlap / max(a.total(), 1), overlap / max(b.total(), 1)
    return 2 * precision * recall / (precision + recall) if overlap else 0.0


def bootstrap_mid(scores: Sequence[float]) -> float:
    """Median of the means of 1,000 resamples, as ``rouge_score``'s BootstrapAggregator has it, from NumPy's seed 1234.

    The JP harness sets that seed when it starts; the mean differs from this only by the noise of resampling.
    """
    values = np.asarray(scores, dtype=np.float64)
    draws = np.random.RandomState(1234)
    return float(np.median([values[draws.choice(len(values), size=len(values))].mean() for _ in range(1000)]))


_EMOJI = re.compile("[\U0001f000-\U0001faff\u2702-\u27b0\ufe0f\u200d]")


@cache
def _tagger():
    from fugashi import Tagger

    return Tagger("-Owakati")


def mecab_words(text: str) -> list[str]:
    """Words by MeCab (fugashi with unidic-lite) after NFKC, without emoji and doubled white space.

    The harness meant fugashi after neologdn's normalisation; NFKC stands in for that here.
    """
    plain = " ".join(_EMOJI.sub("", unicodedata.normalize("NFKC", text)).split())
    return _tagger().parse(plain).split() if plain else []


# --- BLEU ----------------------------------------------------------------------------------------------------


def nagisa_words(text: str) -> str:
    """Japanese text with spaces between words, as the JP harness cuts it for BLEU; sacrebleu's ``ja-mecab`` differs."""
    import nagisa

    return " ".join(nagisa.tagging(text.strip()).words)


def corpus_bleu(pairs: Sequence[tuple[str, str]]) -> float:
    """sacrebleu's corpus BLEU with its defaults (13a, exponential smoothing) of (reference, prediction) pairs, 0–1."""
    import sacrebleu

    references, predictions = zip(*pairs, strict=True)
    return sacrebleu.corpus_bleu(list(predictions), [list(references)]).score / 100


def corpus_bleu_stderr(pairs: Sequence[tuple[str, str]], resamples: int = 300) -> float:
    """Standard deviation of :func:`corpus_bleu` over resamples of the sentences (seed 1234).

    From the n-gram counts of each sentence, summed anew for each resample.
    """
    from sacrebleu.metrics import BLEU

    one = BLEU(effective_order=True)
    found = [one.sentence_score(prediction, [reference]) for reference, prediction in pairs]
    counts = np.array([[*f.counts, *f.totals, f.sys_len, f.ref_len] for f in found], dtype=np.int64)
    draws = np.random.RandomState(1234)
    scores = []
    for _ in range(resamples):
        total = counts[draws.choice(len(counts), size=len(counts))].sum(axis=0).tolist()
        scores.append(BLEU.compute_bleu(total[:4], total[4:8], total[8], total[9], smooth_method="exp").score / 100)
    return float(np.std(scores, ddof=1))


# --- SQuAD 2.0 -----------------------------------------------------------------------------------------------

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def squad_plain(text: str) -> str:
    """SQuAD's normal form: lower case, without ASCII punctuation, articles and doubled white space."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split())


def _squad_references(references: Sequence[str]) -> list[str]:
    return [reference for reference in references if squad_plain(reference)] or [""]


def squad_exact(prediction: str, references: Sequence[str]) -> float:
    """1 when the prediction's normal form is that of a reference; of none, when it is empty ("unanswerable" is not)."""
    return float(any(squad_plain(prediction) == squad_plain(r) for r in _squad_references(references)))


def squad_f1(prediction: str, references: Sequence[str]) -> float:
    """Best F1 over the references, of the words of the normal forms; of none, 1 when the prediction is empty."""

    def one(reference: str) -> float:
        a, b = squad_plain(prediction).split(), squad_plain(reference).split()
        if not a or not b:
            return float(a == b)
        overlap = sum((Counter(a) & Counter(b)).values())
        return 2 * overlap / (len(a) + len(b))

    return max(one(reference) for reference in _squad_references(references))


def squad_best_exact(items: Sequence[tuple[float, float, bool, bool]]) -> float:
    """The exact score at the best threshold on the probability of "unanswerable" (the official script's best_exact).

    Args:
        items: (exact score, probability of no answer, whether the question has an answer, whether the prediction is
            not empty) of each question.
    """
    score = best = float(sum(not has_answer for _, _, has_answer, _ in items))
    for exact, _, has_answer, said in sorted(items, key=lambda item: item[1]):
        score += exact if has_answer else -float(said)
        best = max(best, score)
    return best / len(items)


# --- code ----------------------------------------------------------------------------------------------------


def code_program(row: Mapping[str, str], completion: str) -> str:
    """The program whose undisturbed end means that a completion passes: prompt, completion, tests, ``check(…)``."""
    return f"{row['prompt']}{completion}\n\n{row['test']}\ncheck({row['entry_point']})"
