"""The domain's own test: real answers of a model file, scored, kind by kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tsugiki.errors import UserError
from tsugiki.evaluate.engine import Engine
from tsugiki.evaluate.score import score
from tsugiki.intervals import clustered_stderr
from tsugiki.samples import EncodedSample


@dataclass(frozen=True)
class Answer:
    """A model's answer to one sample.

    Attributes:
        finished: ``stop``, ``length`` or ``context``; the last two are truncated answers.
        seconds: from admission to the last token, in a batch with other answers.
        ties: picks whose lead on the runner-up was below 0.01 nats.
    """

    id: str
    document: str
    kind: str
    text: str
    reference: str
    score: float
    finished: str
    seconds: float
    ties: int = 0


def domain_answers(
    engine: Engine,
    samples: Sequence[EncodedSample],
    *,
    scoring: str,
    max_new_tokens: int,
    end_of_turn: int,
    on_done: Callable[[int], None] | None = None,
) -> list[Answer]:
    """Greedy answers of a model to the samples' prompts, scored against their completions, in input order.

    Raises:
        UserError: no sample, an unknown score, or a prompt that does not fit the context.
    """
    if not samples:
        raise UserError("there is no sample to answer")
    score(scoring, "", "")
    generated = engine.generate(
        [s.prompt_ids for s in samples],
        max_new_tokens=max_new_tokens,
        stop_ids=[end_of_turn],
        on_done=on_done,
    )
    answers = []
    for s, g in zip(samples, generated, strict=True):
        text = engine.detokenize(g.ids).strip()
        points = score(scoring, text, s.completion)
        answers.append(Answer(s.id, s.document, s.kind, text, s.completion, points, g.finished, g.seconds, g.ties()))
    return answers


def summarize(answers: Sequence[Answer]) -> dict:
    """JSON-ready means over all answers and over each kind.

    Returns:
        ``{"n", "documents", "mean", "stderr", "truncated", "ties", "kinds": {kind: the same}}``; ``truncated`` is the share
        of answers that did not end by themselves, ``ties`` the answers with a near-tie, ``stderr`` clusters by document. ``kinds`` is empty where all
        answers are of one kind.
    """

    def one(part: Sequence[Answer]) -> dict:
        return {
            "n": len(part),
            "documents": len({a.document for a in part}),
            "mean": float(np.mean([a.score for a in part])),
            "stderr": clustered_stderr([a.score for a in part], [a.document for a in part]),
            "truncated": sum(a.finished != "stop" for a in part) / len(part),
            "ties": sum(a.ties > 0 for a in part),
        }

    kinds = sorted({a.kind for a in answers})
    by_kind = {k: one([a for a in answers if a.kind == k]) for k in kinds} if len(kinds) > 1 else {}
    return {**one(answers), "kinds": by_kind}
