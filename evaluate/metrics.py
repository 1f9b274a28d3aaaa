"""Normalisers, extractions and metrics of the published benchmarks, each as its own harness defines it.

Three things are called character F1, and they differ:

- :func:`tsugiki.evaluate.score.char_f1`: the kit's own score of a domain's answers, F1 over the multiset of characters;
- :func:`flexeval_char_f1` (FlexEval): an indel-Levenshtein ratio in whole percent, the best over the references;
- :func:`llmjp_char_f1` (llm-jp-eval 1.3.0): the same ratio after sorting the words of both texts.

The last two are fuzzywuzzy's ``ratio`` and ``token_sort_ratio`` with python-Levenshtein installed; without it fuzzywuzzy
falls back to difflib and gives other values.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Iterable
from math import comb

# --- normalisers -----------------------------------------------------------------------------------------------------


def aio_normalize(text: str) -> str:
    """FlexEval's AIONormalizer, its steps in its order.

    ``～`` to ``〜``; NFKC; lower case; 「…」 and 『…』 unwrapped; ``・``, ``=``, ``-`` deleted; all white space deleted;
    ``(…)`` deleted with its content.
    """
    text = unicodedata.normalize("NFKC", text.replace("～", "〜")).lower()
    text = re.sub(r"「(.*?)」", r"\1", text)
    text = re.sub(r"『(.*?)』", r"\1", text)
    text = re.sub(r"[・=\-]", "", text)
    text = re.sub(r"\s+", "", text)
    return re.sub(r"\((.*?)\)", "", text)


def nfkc_lower_strip(text: str) -> str:
    """What FlexEval's JMMLU does to both sides: NFKC, lower case, no white space around."""
    return unicodedata.normalize("NFKC", text).lower().strip()


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact_match_loose(prediction: str, reference: str) -> float:
    """lm-eval's ``exact_match`` with ``ignore_case`` and ``ignore_punctuation``: ASCII punctuation is deleted.

    So ``2,125`` equals ``2125``, but ``-5`` equals ``5`` too, and ``3.5`` equals ``35``.
    """
    a, b = (text.lower().translate(_NO_PUNCTUATION) for text in (prediction, reference))
    return float(a == b)


# --- rounded indel-Levenshtein ratios --------------------------------------------------------------------------------


def longest_common_subsequence(a: str, b: str) -> int:
    """Its length in characters, by bit-parallel dynamic programming (Hyyrö 2004): O(len(a) · len(b) / word size)."""
    where: dict[str, int] = {}
    for i, character in enumerate(a):
        where[character] = where.get(character, 0) | (1 << i)
    mask = (1 << len(a)) - 1
    row = mask  # a zero bit i: the common subsequence grows at a[i]
    for character in b:
        match = row & where.get(character, 0)
        row = ((row + match) | (row - match)) & mask
    return len(a) - row.bit_count()


def indel_distance(a: str, b: str) -> int:
    """Insertions and deletions of single characters that turn ``a`` into ``b``."""
    return len(a) + len(b) - 2 * longest_common_subsequence(a, b)


def fuzz_ratio(a: str, b: str) -> int:
    """fuzzywuzzy's ``fuzz.ratio`` with python-Levenshtein: whole percent.

    ``int(round(100 * ((len(a) + len(b) − indel) / (len(a) + len(b)))))`` in float64, where Python rounds an exact half to
    the even neighbour (12.5 → 12, 13.5 → 14). Equal texts, two empty ones too, score 100; one empty text scores 0.
    """
    if a == b:
        return 100
    if not a or not b:
        return 0
    total = len(a) + len(b)
    return round(100 * ((total - indel_distance(a, b)) / total))


_LATIN_1 = dict.fromkeys(range(128, 256))


def sorted_words(text: str) -> str:
    """What ``fuzz.token_sort_ratio`` compares: U+0080–U+00FF deleted, other than letters, digits and ``_`` to spaces,
    lower case, words sorted by code point and joined by one space.

    The deletion is fuzzywuzzy's ``force_ascii``, on by default: it takes é and × away but leaves Japanese.
    """
    return " ".join(sorted(re.sub(r"\W", " ", text.translate(_LATIN_1)).lower().split()))


def token_sort_ratio(a: str, b: str) -> int:
    """fuzzywuzzy's ``fuzz.token_sort_ratio`` with python-Levenshtein: :func:`fuzz_ratio` of :func:`sorted_words`."""
    return fuzz_ratio(sorted_words(a), sorted_words(b))


def flexeval_char_f1(prediction: str, references: Iterable[str]) -> float:
    """FlexEval's CharF1: the best :func:`fuzz_ratio` over the references, 0–1 in steps of 0.01."""
    return max(fuzz_ratio(prediction, reference) for reference in references) / 100


def llmjp_char_f1(prediction: str, reference: str) -> float:
    """llm-jp-eval 1.3.0's char_f1: :func:`token_sort_ratio`, 0–1 in steps of 0.01."""
    return token_sort_ratio(prediction, reference) / 100


# --- extractions -----------------------------------------------------------------------------------------------------

INVALID = "[invalid]"  # lm-eval's regex filters say this where nothing matched
# MGSM's answer sentence in each language, as lm-eval 0.4.13's strict-match filter looks for it. Bengali is looked for in
# English there, so that its strict score is near zero.
MGSM_STRICT = {
    "bn": r"The answer is (\-?[0-9\.\,]+)", "de": r"Die Antwort lautet (\-?[0-9\.\,]+)", "en": r"The answer is (\-?[0-9\.\,]+)",
    "es": r"La respuesta es (\-?[0-9\.\,]+)", "fr": r"La réponse est (\-?[0-9\.\,]+)", "ja": r"答えは(\-?[0-9\.\,]+)です。",
    "ru": r"Ответ — (\-?[0-9\.\,]+)", "sw": r"Jibu ni (\-?[0-9\.\,]+)", "te": r"సమాధానం (\-?[0-9\.\,]+)",
    "th": r"คำตอบคือ (\-?[0-9\.\,]+)", "zh": r"答案是 (\-?[0-9\.\,]+)。",
}  # fmt: skip
MGSM_FLEXIBLE = r"(-?[$0-9.,]{2,})|(-?[0-9]+)"
MMLU_PROX_STRICT = {"ja": r"答えは \(?([ABCDEFGHIJ])\)? です", "en": r"answer is \(?([ABCDEFGHIJ])\)?"}
MMLU_PROX_TOLERANT = {
    "ja": r"(?:答え|正解|回答)\s*は\s*[:：]?\s*[\W_]{0,4}\s*([A-J])(?![A-Za-z])",
    "en": r"answer\s*(?:is|:)\s*:?\s*[\W_]{0,4}\s*([A-J])(?![A-Za-z])",
}


def mgsm_strict(text: str, language: str) -> str:
    """The first number in the language's answer sentence, else :data:`INVALID`."""
    match = re.search(MGSM_STRICT[language], text)
    return match.group(1).strip() if match else INVALID


def mgsm_flexible(text: str) -> str:
    """The last thing that looks like a number (``$``, ``.`` and ``,`` may be in it), else :data:`INVALID`."""
    matches = re.findall(MGSM_FLEXIBLE, text)
    return next(part for part in matches[-1] if part).strip() if matches else INVALID


def mmlu_prox_strict(text: str, language: str) -> str:
    """The first letter in exactly lm-eval's wording, else :data:`INVALID`.

    In Japanese the ASCII spaces are part of it: ``答えは (A) です`` matches, ``答えは(A)です`` does not.
    """
    match = re.search(MMLU_PROX_STRICT[language], text)
    return match.group(1) if match else INVALID


def mmlu_prox_tolerant(text: str, language: str) -> str:
    """The last letter A–J after "the answer is" in either script's spelling, else :data:`INVALID`; ours.

    After NFKC: full-width letters, any brackets or emphasis around the letter, with or without spaces, in any case of
    "answer". The last one counts, since reasoning may come back on an earlier answer.
    """
    matches = re.findall(MMLU_PROX_TOLERANT[language], unicodedata.normalize("NFKC", text), flags=re.IGNORECASE)
    letters = [m for m in matches if m.isupper()]
    return letters[-1] if letters else INVALID


def flexeval_number(text: str, answer_prefix: str | None = None) -> str:
    """FlexEval's number extraction for MGSM and GSM8K; empty where there is no number.

    What follows the last ``answer_prefix`` (all of the text without one or where it does not occur); commas deleted; the
    last ``-?\\d+\\.?\\d*``; no trailing point, and no trailing zeros after a point.
    """
    if answer_prefix:
        text = text.split(answer_prefix)[-1]
    numbers = re.findall(r"-?\d+\.?\d*", text.replace(",", ""))
    number = numbers[-1].rstrip(".") if numbers else ""
    return number.rstrip("0").rstrip(".") if "." in number else number


# --- code ------------------------------------------------------------------------------------------------------------


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased estimate of the probability that one of ``k`` samples passes, from ``correct`` of ``n`` (Chen et al. 2021).

    ``1 − C(n − correct, k) / C(n, k)``, in exact integers before the one division.

    Raises:
        ValueError: not 0 ≤ correct ≤ n, or not 1 ≤ k ≤ n.
    """
    if not 0 <= correct <= n or not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {correct} in {n}: 0 ≤ correct ≤ n and 1 ≤ k ≤ n are needed")
    return 1 - comb(n - correct, k) / comb(n, k)
