"""What a fit sees of a sample: which tokens are read, which are learnt, where a turn ends."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from tsugiki.chat import special_ids
from tsugiki.samples import EncodedSample


def runs_of_tokens(tokenizer, sample: EncodedSample) -> list[tuple[str, bool, bool]]:
    """A sample as text in runs of like tokens: ``(text, learned, special)``.

    Learned tokens are those that loss and NLL count; special ones show as the tokenizer writes them (``<|eot_id|>``).
    """
    special = special_ids(tokenizer)
    marked = [(i, False, i in special) for i in sample.prompt_ids] + [(i, True, i in special) for i in sample.completion_ids]
    runs = []
    for (learned, is_special), run in groupby(marked, key=lambda token: token[1:]):
        ids = [i for i, *_ in run]
        text = "".join(tokenizer.convert_ids_to_tokens(ids)) if is_special else tokenizer.decode(ids)
        runs.append((text, learned, is_special))
    return runs


def first_of_each_kind(samples: Sequence[EncodedSample], count: int) -> list[EncodedSample]:
    """``count`` samples in their order, kinds in turn, so that a rare kind is among them."""
    kinds: dict[str, list[EncodedSample]] = {}
    for s in samples:
        kinds.setdefault(s.kind, []).append(s)
    ranked = [(i, order, s) for order, group in enumerate(kinds.values()) for i, s in enumerate(group)]
    return [s for *_, s in sorted(ranked, key=lambda r: r[:2])[:count]]
