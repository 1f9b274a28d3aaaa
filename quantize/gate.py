"""The gate before any level is made: is this GGUF the same model, and if not, on which string does it differ."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tsugiki.artifacts import write_json
from tsugiki.errors import UserError, raise_problems
from tsugiki.quantize.child import run_child, serve
from tsugiki.quantize.parity import bos_notes, check_bos, logits_agreement, parity
from tsugiki.quantize.texts import SENTENCES, hard_texts
from tsugiki.samples import EncodedSample, read_encoded, write_encoded

STRICT = ("domain",)  # groups whose explained differences are limited; the others' are counted


@dataclass(frozen=True)
class GateSettings:
    """What passes.

    Attributes:
        max_kl: mean divergence of the file's logits from transformers', nats a token. F16 rounding gives about 1e-6.
        max_explained: share of the domain's texts that may have other ids for a reason that is known (characters
            outside a Unigram vocabulary, a normalizer that llama.cpp does not have).
        logit_samples: how many samples are compared by logits.
    """

    max_kl: float = field(default=1e-4, metadata={"help": "largest mean divergence of the logits, nats/token"})
    max_explained: float = field(default=0.02, metadata={"help": "share of domain texts with other ids for a known reason"})
    logit_samples: int = field(default=8, metadata={"help": "samples compared by logits"})


def gate(
    gguf_path: Path | str,
    base_dir: Path | str,
    adapter_dir: Path | str | None = None,
    *,
    texts: Sequence[str],
    samples: Sequence[EncodedSample] = (),
    system: str | None = None,
    settings: GateSettings | None = None,
    tokenizer_dir: Path | str | None = None,
) -> dict:
    """Compare a GGUF with the model that it was made from, in a child process.

    Token ids on the domain's texts, on conversations made of them and on :func:`tsugiki.quantize.texts.hard_texts`; the
    rendered chat template of conversations of one, two and three turns, with and without a system prompt; the number of
    BOS ids; whether llama.cpp ends an answer at the end-of-turn token; the logits on the same ids.

    Args:
        gguf_path: the F16 file.
        base_dir: the folder it was made from, with the tokenizer.
        adapter_dir: the adapter in it.
        texts: of the domain, prompts and answers.
        samples: for the logits; without any, 8 texts are continued.
        system: the domain's system prompt.
        tokenizer_dir: as :func:`tsugiki.quantize.convert.convert` was given it. Tokens that it, or the one beside the adapter, has
            and the base's lacks are texts of their own (``added``), alone and between others.

    Returns:
        JSON-ready: ``passed``; ``problems`` and ``notes``, sentences; ``ids``, what :class:`tsugiki.quantize.parity.Parity` holds;
        ``templates`` ``{"conversations", "identical", "first"}``; ``stops`` (the end-of-turn token ends generation);
        ``logits``, an :class:`tsugiki.quantize.parity.Agreement`; ``settings``.

    Raises:
        UserError: nothing to compare, a missing or damaged file, or one on which llama.cpp crashes.
    """
    settings = settings or GateSettings()
    if not texts:
        raise UserError("no text to compare token ids on")
    with tempfile.TemporaryDirectory(prefix="tsugiki-gate-") as folder:
        write_json(Path(folder) / "texts.json", list(texts))
        write_encoded(Path(folder) / "samples.jsonl", samples)
        return run_child(
            "tsugiki.quantize.gate",
            {
                "path": str(gguf_path), "base": str(base_dir), "adapter": adapter_dir and str(adapter_dir), "folder": folder,
                "system": system, "settings": asdict(settings), "tokenizer": tokenizer_dir and str(tokenizer_dir),
            },
            name="parity",
        )


def check_gate(found: Mapping) -> None:
    """Refuse a file that has not passed.

    Raises:
        UserError: every problem, the first differing string with both tokenizations among them.
    """
    raise_problems(
        list(found["problems"]), what="the GGUF is not the same model",
        hint="Convert it again from the base and the adapter that it is compared with; no level is made from it.",
    )


def read_texts(path: Path | None) -> list[str]:
    """The domain's texts: one a line, or ``prompt`` and ``completion`` of JSON Lines; None: sentences of this kit.

    Raises:
        UserError: no such file, not UTF-8, or no text in it.
    """
    if path is None:
        return list(SENTENCES)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in lines if line.strip()]
            texts = [row[key] for row in rows for key in ("prompt", "completion", "text") if isinstance(row.get(key), str)]
        else:
            texts = [line for line in lines if line.strip()]
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"no text can be read from it: {error}", where=str(path)) from None
    if not texts:
        raise UserError("it holds no text", where=str(path), hint="One text a line, or JSON Lines with prompt and completion.")
    return texts


def conversations(texts: Sequence[str], system: str | None, most: int = 60) -> list[list[dict[str, str]]]:
    """Conversations of one, two and three turns, with and without a system prompt."""
    texts = list(dict.fromkeys(t for t in texts if t.strip()))[: most // 2]
    system = system or "あなたは親切な助手です。"
    made = []
    for i, text in enumerate(texts):
        turns = [{"role": "user", "content": text}]
        for j in range(i % 3):
            turns += [
                {"role": "assistant", "content": texts[(i + j + 1) % len(texts)]},
                {"role": "user", "content": texts[(i + j + 2) % len(texts)]},
            ]
        made += [turns, [{"role": "system", "content": system}, *turns]]
    return made


def _render(make) -> str | None:
    """The rendered text, or None where the template refuses the conversation."""
    try:
        return make()
    except Exception:  # a template raises what it likes
        return None


def templates(engine, tokenizer, talks: Sequence[list[dict[str, str]]]) -> tuple[dict, list[str]]:
    """The file's own template against transformers', on each conversation; also the rendered texts."""
    from tsugiki.evaluate.chat import render

    identical, first, rendered = 0, None, []
    for talk in talks:
        expected = _render(lambda talk=talk: tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True))
        found = _render(lambda talk=talk: render(engine, talk))
        identical += expected == found
        if expected != found and first is None:
            first = {"conversation": talk, "hf": expected, "gguf": found}
        if expected:
            rendered.append(expected)
    return {"conversations": len(talks), "identical": identical, "first": first}, rendered


def measure(
    gguf_path: str, base_dir: str, adapter_dir: str | None, texts: Sequence[str], samples: Sequence[EncodedSample],
    system: str | None, settings: GateSettings, tokenizer_dir: str | None = None,
) -> dict:
    """:func:`gate` in this process."""
    import llama_cpp

    from tsugiki.chat import end_of_turn_id
    from tsugiki.evaluate.engine import Engine
    from tsugiki.quantize.convert import model_tokenizer

    tokenizer, _ = model_tokenizer(base_dir, adapter_dir, tokenizer_dir)
    talks = conversations(texts, system) if tokenizer.chat_template else []
    rendered: list[str] = []
    rendering = {"conversations": 0, "identical": 0, "first": None}
    stops = None
    with Engine(gguf_path, n_ctx=256, n_seq_max=1) as engine:
        if talks:
            rendering, rendered = templates(engine, tokenizer, talks)
            end = end_of_turn_id(tokenizer)
            stops = bool(llama_cpp.llama_vocab_is_eog(engine._vocab, end))
    groups = {"domain": texts, "conversations": rendered, "hard": hard_texts()}
    if added := added_texts(tokenizer, base_dir):
        groups["added"] = added
    ids = parity(gguf_path, tokenizer, groups)
    if not samples:
        encoded = [tokenizer(t, add_special_tokens=False)["input_ids"][:200] for t in texts if len(t) > 20]
        samples = [EncodedSample(str(i), "", "", "", "", e[:1], e[1:]) for i, e in enumerate(encoded) if len(e) > 8]
    logits = logits_agreement(gguf_path, base_dir, adapter_dir, samples, n=settings.logit_samples) if samples else None
    found = {
        "ids": asdict(ids) | {"rate": ids.rate}, "templates": rendering, "stops": stops,
        "logits": logits and asdict(logits), "settings": asdict(settings),
    }
    found["problems"], found["notes"] = problems_of(found, ids), bos_notes(ids)
    return {"passed": not found["problems"], **found}


def added_texts(tokenizer, base_dir: Path | str, most: int = 500) -> list[str]:
    """Tokens that the base's tokenizer lacks, each alone, between Japanese and between English words."""
    from tsugiki.tokenizers import load_tokenizer

    try:
        known = load_tokenizer(base_dir).get_vocab()
    except Exception:  # a base without a tokenizer
        return []
    added = [t.content for _, t in sorted(tokenizer.added_tokens_decoder.items()) if t.content not in known][:most]
    return [form.format(token) for token in added for form in ("{}", "この{}を点検する。", "check the {} now", "{0}{0}\n{0}")]


def problems_of(found: Mapping, ids) -> list[str]:
    """What does not pass, as sentences."""
    settings, problems = found["settings"], []
    for name, group in ids.groups.items():
        if group["unexplained"]:
            first = next(d for d in ids.differences if d["group"] == name and d["reason"] == "segmentation")
            problems.append(
                f"token ids: {group['unexplained']:,} of {group['texts']:,} texts of “{name}” differ, first {first['text']!r}: "
                f"transformers {first['hf_ids']} ({first['hf_tokens']} at {first['at']}), "
                f"llama.cpp {first['gguf_ids']} ({first['gguf_tokens']} at {first['at']})"
            )
        explained = group["texts"] - group["identical"] - group["unexplained"]
        if name in STRICT and explained > settings["max_explained"] * group["texts"]:
            first = next(d for d in ids.differences if d["group"] == name)
            problems.append(
                f"token ids: {explained:,} of {group['texts']:,} texts of “{name}” differ for a known reason ({first['reason']}), "
                f"more than {settings['max_explained']:.0%}, first {first['text']!r}: transformers {first['hf_ids']}, llama.cpp {first['gguf_ids']}"
            )
    rendering = found["templates"]
    if rendering["first"]:
        first = rendering["first"]
        problems.append(
            f"chat template: {rendering['conversations'] - rendering['identical']} of {rendering['conversations']} conversations are "
            f"rendered differently, first {first['conversation']!r}: transformers {first['hf']!r}, the file {first['gguf']!r}"
        )
    try:
        check_bos(ids)
    except UserError as error:
        problems.append(error.message)
    if found["stops"] is False:
        problems.append("llama.cpp does not end an answer at the template's end-of-turn token")
    logits = found["logits"]
    if logits and not logits["kl_mean"] <= settings["max_kl"]:  # NaN does not pass
        problems.append(f"logits: KL {logits['kl_mean']:.2e} nats/token, at most {settings['max_kl']:.0e} passes")
    return problems


def _child(job: dict) -> dict:
    folder = Path(job["folder"])
    texts = json.loads((folder / "texts.json").read_text(encoding="utf-8"))
    samples = read_encoded(folder / "samples.jsonl")
    return measure(job["path"], job["base"], job["adapter"], texts, samples, job["system"], GateSettings(**job["settings"]), job["tokenizer"])


if __name__ == "__main__":
    serve(_child)
