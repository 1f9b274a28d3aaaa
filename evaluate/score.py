"""How right an answer is, between 0 and 1."""

from __future__ import annotations

import unicodedata
from collections import Counter

from tsugiki.errors import UserError

SCORES = ("exact_match", "char_f1")


def normalize(text: str) -> str:
    """NFKC (full-width and half-width forms become one), then no spaces around and no 。 or spaces at the end."""
    return unicodedata.normalize("NFKC", text).strip().rstrip("。 \t\r\n")


def exact_match(prediction: str, reference: str) -> float:
    """1 where the normalised texts are equal, else 0."""
    return float(normalize(prediction) == normalize(reference))


def char_f1(prediction: str, reference: str) -> float:
    """F1 over characters without their order: the multiset of characters, spaces not counted, after :func:`normalize`.

    With ``m`` the size of the multisets' intersection, precision is ``m / characters of the prediction``, recall
    ``m / characters of the reference`` and F1 their harmonic mean. Two empty texts score 1, one empty text 0.
    """
    predicted, expected = (Counter("".join(normalize(t).split())) for t in (prediction, reference))
    if not predicted or not expected:
        return float(predicted == expected)
    shared = (predicted & expected).total()
    return 2 * shared / (predicted.total() + expected.total())


def score(name: str, prediction: str, reference: str) -> float:
    """Score by name: ``exact_match`` or ``char_f1``.

    Raises:
        UserError: no score has this name.
    """
    if name == "exact_match":
        return exact_match(prediction, reference)
    if name == "char_f1":
        return char_f1(prediction, reference)
    raise UserError(f"no score is named {name!r}", hint=f"Known scores: {', '.join(SCORES)}.")
