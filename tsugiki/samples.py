"""The rows that every stage shares: samples as text, and samples as token ids."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tsugiki.artifacts import read_jsonl, write_jsonl


@dataclass(frozen=True)
class Sample:
    """One question and its answer.

    Attributes:
        id: unique within the domain.
        prompt: the question, without the chat template.
        completion: the answer, without the end-of-turn token.
        document: the source document; splits and bootstraps go by it.
        kind: items of one kind are also scored apart (empty: one kind only).
    """

    id: str
    prompt: str
    completion: str
    document: str
    kind: str = ""


@dataclass(frozen=True)
class EncodedSample:
    """A sample as the token ids that training, scoring and every comparison use.

    Attributes:
        prompt_ids: the rendered chat template up to and including the assistant's header.
        completion_ids: the answer and its end-of-turn token: the ids that the loss and the NLL count.
    """

    id: str
    prompt: str
    completion: str
    document: str
    kind: str = ""
    prompt_ids: list[int] = field(default_factory=list)
    completion_ids: list[int] = field(default_factory=list)

    @property
    def ids(self) -> list[int]:
        return self.prompt_ids + self.completion_ids


def write_encoded(path: Path, samples: Iterable[EncodedSample]) -> None:
    """Write encoded samples as JSON Lines."""
    write_jsonl(path, (asdict(s) for s in samples))


def read_encoded(path: Path) -> list[EncodedSample]:
    """Read what :func:`write_encoded` wrote."""
    return [EncodedSample(**row) for row in read_jsonl(path)]
