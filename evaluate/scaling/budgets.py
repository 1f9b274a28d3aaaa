"""Compute budgets N·D_l and training FLOPs 6·N·D_l of models, and how each figure came about.

N are the parameters active per token, D_l the training tokens in language l, those of the source model included
(Saito et al., A.3; Takase & Honda, section 4). The factor 6 is Kaplan et al. (2020): 2 FLOPs a parameter and
token forward, 4 backward.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from tsugiki.artifacts import read_json
from tsugiki.errors import UserError, raise_problems
from tsugiki.evaluate.scaling.tables import DATA, LANGUAGES, ModelFacts, contradictions, find_model, read_table

_WORDS = {"total": "in total", "en": "in English", "ja": "in Japanese"}
_MADE = {"PT": "trained from scratch", "CPT": "continued from", "adapter": "adapter on", "quantized": "quantized from"}
_FAMILIES = {"Llama 3.1": "Llama 3", "Qwen 2.5": "Qwen2.5", "Qwen 3": "Qwen3"}  # printed in A's Table 3 -> family


@dataclass(frozen=True)
class Convention:
    """What is assumed where nobody reports it.

    Args:
        name: how it is called in explanations.
        shares: language ("en", "ja") -> family -> share (0–1) of the from-scratch base's tokens in that language;
            it replaces the table's figure, for the base and for all that was made from it.
        added_ja: share of Japanese in continued tokens where their authors do not say it; None = as the table has it.
    """

    name: str
    shares: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    added_ja: float | None = None

    def __post_init__(self) -> None:
        problems = [
            f"{family}: {language} share {share!r} is not between 0 and 1"
            for language, families in self.shares.items()
            for family, share in families.items()
            if not 0 <= share <= 1
        ]
        problems += [f"no language {language!r}" for language in self.shares if language not in ("en", "ja")]
        if self.added_ja is not None and not 0 <= self.added_ja <= 1:
            problems.append(f"share of Japanese in continued tokens {self.added_ja!r} is not between 0 and 1")
        raise_problems(problems, what=f"Convention {self.name}")


PRINTED = Convention("as printed")
# Saito et al., A.3. Yi-1.5 and Qwen are left as printed: Yi-1.5 6B contradicts A.3's 70 % of its own total.
SAITO = Convention(
    "Saito et al.",
    {"ja": {"Llama 2": 0.001, "Llama 3": 0.001}, "en": {"Llama 2": 0.897, "Llama 3": 0.95}},
    added_ja=1.0,
)


def takase() -> Convention:
    """Takase & Honda: shares of their Table 3 (estimated from generations, one model a family), continued tokens
    counted as Japanese unless their authors say otherwise."""
    _, rows = read_table(DATA / "takase_table3_langdist.csv")
    families = [(_FAMILIES.get(r["model"], r["model"]), r) for _, r in rows if r["model"] != "CommonCrawl"]
    shares = {lang: {family: float(row[lang]) / 100 for family, row in families} for lang in ("en", "ja")}
    return Convention("Takase & Honda", shares, added_ja=1.0)


def assumed_base_share(ja: float, families: Iterable[str] = ("Llama 2", "Llama 3")) -> Convention:
    """As printed, but with this share (0–1) of Japanese in the pre-training of ``families``: for sensitivity curves."""
    return Convention(f"{ja:.2%} Japanese in {' and '.join(families)}", {"ja": dict.fromkeys(families, ja)})


def convention(name: str) -> Convention:
    """The convention of that name: "printed", "saito" (paper B) or "takase" (paper A)."""
    if name not in ("printed", "saito", "takase"):
        raise UserError(f"no convention {name!r}", hint="Choose printed, saito or takase.")
    return takase() if name == "takase" else {"printed": PRINTED, "saito": SAITO}[name]


@dataclass(frozen=True)
class Budget:
    """What went into a model, for one language.

    Args:
        model: its name; language: "total", "en" or "ja".
        parameters: active parameters N, or None when unknown.
        tokens: training tokens D_l, or None when unknown.
        value: N·D_l, or None.
        flops: 6·N·D_l, or None. An adapter's frozen weights need about 4 of the 6, which is not subtracted.
        kind: "reported", "derived" or "assumed", the weakest of what it is made from; "unknown" without a value.
        explanation: sentences saying where each figure is from.
    """

    model: str
    language: str
    parameters: float | None
    tokens: float | None
    value: float | None
    flops: float | None
    kind: str
    explanation: list[str]

    @property
    def log10(self) -> float:
        """log10(N·D_l), NaN when unknown or zero (a language the model has not seen has no logarithm)."""
        return math.log10(self.value) if self.value else math.nan


def from_folder(folder: Path | str) -> ModelFacts:
    """A bundled base's facts from its ``training.json``: exact counts, not estimates.

    Raises :class:`UserError` when the file is absent or lacks ``parameters`` or ``tokens`` by language.
    """
    path = Path(folder) / "training.json"
    try:
        facts = read_json(path)
        tokens, name = {k: float(v) for k, v in facts["tokens"].items()}, str(facts["base"]["name"])
        parameters = float(facts["parameters"])
    except FileNotFoundError:
        raise UserError("no training.json: what it was trained on is not known", where=str(folder)) from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"not a record of a training: {error!r}", where=str(path)) from None
    fields = ("parameters", "active_parameters", "tokens_total", "tokens_en", "tokens_ja")
    return ModelFacts(
        name=name, family=name, parameters=parameters, active_parameters=parameters,
        architecture=str(facts["base"].get("architecture", "")),
        tokens_total=sum(tokens.values()), tokens_en=tokens.get("en", 0.0), tokens_ja=tokens.get("ja", 0.0),
        sources=dict.fromkeys(fields, ("reported", f"training.json of {name}")),
    )  # fmt: skip


def named(model: str | ModelFacts, models: Mapping[str, ModelFacts]) -> ModelFacts:
    """The model of that name, Hugging Face id, or folder with a ``training.json``.

    An unknown one raises :class:`UserError` with the names most like it.
    """
    if isinstance(model, ModelFacts):
        return model
    found = find_model(model, models)
    if found is None and (Path(model) / "training.json").is_file():
        return from_folder(model)
    if found is None:
        names = [n for m in models.values() for n in (m.name, m.hf_id) if n]
        near = difflib.get_close_matches(model, names, n=3, cutoff=0.4)
        hint = f"Did you mean {', '.join(near)}?" if near else "Give its facts as a row of a table of models."
        raise UserError(f"{model!r} is not in the table of models", hint=hint)
    return found


def adapted(base: ModelFacts, name: str, tokens: Mapping[str, float], *, passes: float = 1.0) -> ModelFacts:
    """A domain-adapted model: ``base`` plus the tokens its adapter was trained on.

    Args:
        base: the model adapted.
        name: what to call the result.
        tokens: training tokens of one pass over the samples by identified language, all of them: for example
            ``{"ja": 3e5, "en": 1e4, "und": 2e3}``.
        passes: epochs, not necessarily whole.
    """
    wrong = [f"{k}: {v!r} tokens" for k, v in tokens.items() if not (math.isfinite(v) and v >= 0)]
    if not (math.isfinite(passes) and passes >= 0):
        wrong.append(f"{passes!r} passes")
    raise_problems(wrong, what=f"{name}: the adapter's tokens")
    added = {"total": sum(tokens.values()) * passes, **{k: tokens.get(k, 0.0) * passes for k in ("en", "ja")}}
    return ModelFacts(
        name=name, family=base.family, parameters=base.parameters, active_parameters=base.active_parameters,
        construction="adapter", source_model=base.name, architecture=base.architecture, added=added,
        sources={k: base.sources[k] for k in ("parameters", "active_parameters") if k in base.sources},
    )  # fmt: skip


def quantized(model: ModelFacts, name: str, size_bytes: int) -> ModelFacts:
    """A quantized file of ``model``: its budget, and a size of its own."""
    return ModelFacts(
        name=name, family=model.family, parameters=model.parameters, active_parameters=model.active_parameters,
        construction="quantized", source_model=model.name, architecture=model.architecture, size_bytes=size_bytes,
        sources={k: model.sources[k] for k in ("parameters", "active_parameters") if k in model.sources},
    )  # fmt: skip


@dataclass(frozen=True)
class _Tokens:
    """A token count with its kind and the sentences that explain it; ``value`` None = unknown."""

    value: float | None
    kind: str
    lines: list[str]


def _weaker(*kinds: str) -> str:
    for kind in ("unknown", "assumed", "derived"):
        if kind in kinds:
            return kind
    return "reported"


def _billions(value: float) -> str:
    return f"{value / 1e9:,.10g} B" if value >= 1e9 else f"{value:,.10g}"


def _chain(model: ModelFacts, models: Mapping[str, ModelFacts]) -> list[ModelFacts]:
    """The model and what it was made from, as far as the table knows."""
    chain, seen = [model], {model.name}
    while source := find_model(chain[-1].source_model, models):
        if source.name in seen:
            raise UserError(f"its source models form a circle through {source.name}", where=model.name)
        seen.add(source.name)
        chain.append(source)
    return chain


def _tokens(chain: list[ModelFacts], language: str, rule: Convention) -> _Tokens:
    m, source = chain[0], chain[1] if len(chain) > 1 else None
    printed, share = m.tokens(language), rule.shares.get(language, {}).get(m.family)
    kind, where = m.sources.get(f"tokens_{language}", ("reported", "given"))
    if not m.source_model:
        if share is not None and m.tokens_total is not None:
            value = share * m.tokens_total
            of = f"{share:.4g} × {_billions(m.tokens_total)} ({rule.name}'s share for {m.family})"
            return _Tokens(value, "assumed", [f"{m.name}: {_billions(value)} {_WORDS[language]} = {of}"])
        if printed is None:
            return _Tokens(None, "unknown", [f"{m.name}: tokens {_WORDS[language]} are not known"])
        return _Tokens(printed, kind, [f"{m.name}: {_billions(printed)} {_WORDS[language]} ({kind}: {where})"])

    added = _added(m, source, language, rule)
    changed = printed is not None and m.construction == "CPT" and (share is not None or _recounted(m, language, rule))
    if printed is not None and not changed:
        line = f"{m.name}: {_billions(printed)} {_WORDS[language]} ({kind}: {where})"
        if added.value is not None and source is not None and source.tokens(language) is not None:
            line += f" = {_billions(source.tokens(language))} of {source.name} + {_billions(added.value)}"
        return _Tokens(printed, kind, [line])
    if source is None:
        line = f"{m.name}: its source model {m.source_model} is not in the table of models"
        base = _Tokens(None, "unknown", [line])
    else:
        base = _tokens(chain[1:], language, rule)
    if added.value is not None and base.value is None and changed and share is None:
        # paper B counts Mistral's Japanese as 0 % although it prints a dash: the continued tokens are all there is
        line = f"{m.name}: its base's tokens {_WORDS[language]} count as 0, as in the printed {_billions(printed)}"
        return _Tokens(added.value, "assumed", [*added.lines, line])
    if added.value is None or base.value is None:
        return _Tokens(None, "unknown", [*base.lines, *added.lines])
    value = base.value + added.value
    line = f"{m.name}: {_billions(base.value)} + {_billions(added.value)} = {_billions(value)} {_WORDS[language]}"
    return _Tokens(value, _weaker(base.kind, added.kind), [*base.lines, *added.lines, line])


def _recounted(m: ModelFacts, language: str, rule: Convention) -> bool:
    """Whether the table's Japanese figure counts all added tokens as Japanese and the convention counts otherwise."""
    assumed = m.sources.get("tokens_ja", ("",))[0] == "assumed"
    return language == "ja" and rule.added_ja is not None and m.added_ja_share is None and assumed


def _added(m: ModelFacts, source: ModelFacts | None, language: str, rule: Convention) -> _Tokens:
    """Tokens this step added to its source model's."""
    if m.construction == "quantized":
        return _Tokens(0.0, "reported", [f"{m.name}: a quantized file adds no tokens"])
    if language in m.added:
        value = m.added[language]
        return _Tokens(value, "reported", [f"{m.name}: {_billions(value)} added {_WORDS[language]}"])
    printed, base = m.tokens(language), source.tokens(language) if source else None
    if printed is not None:
        value = printed - (base or 0.0)
        if _recounted(m, language, rule):
            value *= rule.added_ja
            how = f"{rule.added_ja:.0%} of the added tokens counted as Japanese ({rule.name})"
            return _Tokens(value, "assumed", [f"{m.name}: {_billions(value)} added {_WORDS[language]}: {how}"])
        return _Tokens(value, "derived", [f"{m.name}: {_billions(value)} added {_WORDS[language]} (difference)"])
    total = m.added.get("total")
    if total is None and m.tokens_total is not None and source and source.tokens_total is not None:
        total = m.tokens_total - source.tokens_total
    if m.construction == "adapter" or total is None or language == "total":
        return _Tokens(None, "unknown", [f"{m.name}: the tokens added {_WORDS[language]} are not known"])
    ja, said = m.added_ja_share, "its authors' share"
    if ja is None:
        ja, said = rule.added_ja, f"{rule.name}'s share"
    if ja is None:
        lines = [f"{m.name}: the share of Japanese in its {_billions(total)} added tokens is not known"]
        return _Tokens(None, "unknown", lines)
    part = ja if language == "ja" else 1 - ja
    line = f"{m.name}: {_billions(part * total)} added {_WORDS[language]} = {part:.4g} × {_billions(total)} ({said})"
    return _Tokens(part * total, "derived" if m.added_ja_share is not None else "assumed", [line])


def budget(
    model: str | ModelFacts, models: Mapping[str, ModelFacts], language: str = "total", rule: Convention = PRINTED
) -> Budget:
    """N·D_l and 6·N·D_l of a model.

    A continued model's tokens include its base's; an adapter adds its own by language; a quantized file has its
    model's budget. What is unknown stays None and the explanation says why.

    Raises:
        UserError: an unknown model or language, or tokens that contradict each other (English + Japanese > total,
            less than the source model's), naming the model.
    """
    m = named(model, models)
    if language not in LANGUAGES:
        raise UserError(f"no budget for language {language!r}", hint=f"Choose one of {', '.join(LANGUAGES)}.")
    chain = _chain(m, models)
    every = {lang: _tokens(chain, lang, rule) for lang in LANGUAGES}
    _refuse_contradictions(chain, {lang: t.value for lang, t in every.items()}, rule)
    n, n_line, n_kind = _parameters(chain)
    tokens = every[language]
    value = None if n is None or tokens.value is None else n * tokens.value
    lines = [n_line, *tokens.lines]
    if value is not None:
        lines.append(f"N·D {_WORDS[language]} = {value:.4g}, 6·N·D = {6 * value:.4g} FLOPs")
    kind = "unknown" if value is None else _weaker(n_kind, tokens.kind)
    return Budget(m.name, language, n, tokens.value, value, None if value is None else 6 * value, kind, lines)


def _parameters(chain: list[ModelFacts]) -> tuple[float | None, str, str]:
    m = chain[0]
    for owner in chain if m.construction in ("quantized", "adapter") else chain[:1]:
        if owner.active_parameters is not None:
            kind, where = owner.sources.get("active_parameters") or owner.sources.get("parameters") or ("reported", "given")
            line = f"{owner.name}: N = {_billions(owner.active_parameters)} active parameters ({kind}: {where})"
            if owner.parameters and owner.parameters != owner.active_parameters:
                line += f", of {_billions(owner.parameters)}"
            return owner.active_parameters, line, kind
    return None, f"{m.name}: the number of active parameters is not known", "unknown"


def _refuse_contradictions(chain: list[ModelFacts], tokens: Mapping[str, float | None], rule: Convention) -> None:
    resolved = replace(
        chain[0], tokens_total=tokens["total"], tokens_en=tokens["en"], tokens_ja=tokens["ja"], source_model=""
    )
    found = contradictions({m.name: m for m in chain}) + contradictions({resolved.name: resolved})
    problems = list(dict.fromkeys(f"{name}: {text}" for name, text in found))
    raise_problems(problems, what=f"Contradictory budget ({rule.name})", hint="Correct the table, or the assumed share.")


def budgets(
    names: Iterable[str], models: Mapping[str, ModelFacts], language: str = "total", rule: Convention = PRINTED
) -> np.ndarray:
    """N·D_l of each model named, float64 ``(M,)``; NaN where it is unknown. All unknown names are told at once."""
    names = list(names)
    raise_problems(
        [f"{name}" for name in names if find_model(name, models) is None],
        what="Not in the table of models",
        hint="Add their facts as rows of a table of models.",
    )
    values = [budget(name, models, language, rule).value for name in names]
    return np.array([np.nan if v is None else v for v in values], dtype=np.float64)


def explain(model: str | ModelFacts, models: Mapping[str, ModelFacts], rule: Convention = PRINTED) -> str:
    """How the budgets of a model came about, several lines of text."""
    m = named(model, models)
    made = _MADE[m.construction] + (f" {m.source_model}" if m.source_model else "")
    facts = [made, m.architecture, f"family {m.family}", f"convention: {rule.name}"]
    lines = [m.name + (f" ({m.hf_id})" if m.hf_id else ""), f"  {'; '.join(f for f in facts if f)}"]
    seen: set[str] = set()
    for language in LANGUAGES:
        b = budget(m, models, language, rule)
        value = "unknown" if b.value is None else f"N·D {b.value:.4g}, {b.flops:.4g} FLOPs ({b.kind})"
        lines.append(f"  {_WORDS[language]}: {value}")
        fresh = [line for line in b.explanation if line not in seen and not line.startswith("N·D ")]
        lines += [f"    {line}" for line in fresh]
        seen.update(fresh)
    if m.size_bytes is not None:
        lines.append(f"  file: {m.size_bytes:,} bytes")
    if m.note:
        lines.append(f"  note: {m.note}")
    return "\n".join(lines)
