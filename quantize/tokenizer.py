"""A Hugging Face fast tokenizer as a GGUF vocabulary.

What the tokenizer does is read from its own definition (``tokenizer.json``), never guessed from a probe string.
What llama.cpp cannot do the same way is either refused here or measured by :mod:`tsugiki.quantize.parity`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from gguf import TokenType

from tsugiki.chat import prompt_text, special_ids
from tsugiki.errors import UserError

# (regex, ignore_merges) of a byte-level BPE tokenizer -> llama.cpp's name for that pre-tokenizer.
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = _SHORT + r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SLASH = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LOWER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_UPPER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
PRE_TOKENIZERS = {
    (_WORDS + r"\p{N}{1,3}" + _REST, True): "llama-bpe",
    (_WORDS + r"\p{N}{1,3}" + _REST, False): "smaug-bpe",
    (_WORDS + r"\p{N}" + _REST, False): "qwen2",
    (f"{_LOWER}|{_UPPER}" + r"|\p{N}" + _SLASH, True): "tekken",
    (f"{_LOWER}{_SHORT}?|{_UPPER}{_SHORT}?" + r"|\p{N}{1,3}" + _SLASH, False): "gpt-4o",
}
GPT2 = "gpt-2"  # ByteLevel with its own regex
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "▁"


@dataclass(frozen=True)
class GGUFVocabulary:
    """The vocabulary as llama.cpp reads it.

    Attributes:
        model: ``gpt2`` (byte-level BPE), ``llama`` (SentencePiece BPE with byte fallback) or ``t5`` (Unigram).
        pre: llama.cpp's name of the pre-tokenizer.
        tokens: the texts, one an id.
        types: :class:`gguf.TokenType`, one an id.
        scores: one an id, log-probabilities (Unigram) or the negative order of merging (SentencePiece BPE); else empty.
        merges: BPE merges, ``"left right"`` (else empty).
        special: ids of ``bos``, ``eos``, ``unk``, ``pad`` where the tokenizer has them.
        add_bos: whether the tokenizer itself puts BOS before a text.
        add_space_prefix: whether it puts a space before a text (not of byte-level BPE).
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[TokenType]
    scores: list[float]
    merges: list[str]
    special: dict[str, int]
    add_bos: bool
    add_space_prefix: bool = False

    def write(self, writer) -> None:
        """Put the vocabulary into a :class:`gguf.GGUFWriter`."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.model == "gpt2":
            writer.add_token_merges(self.merges)
        else:
            writer.add_token_scores(self.scores)
            writer.add_add_space_prefix(self.add_space_prefix)
            writer.add_remove_extra_whitespaces(False)
        for name, token in self.special.items():
            getattr(writer, f"add_{name}_token_id")(token)
        writer.add_add_bos_token(self.add_bos)
        # Written out because llama.cpp adds EOS to every Unigram text by default: a prompt must not end with EOS,
        # even where the Hugging Face tokenizer would append it for training.
        writer.add_add_eos_token(False)


def gguf_vocabulary(tokenizer, vocab_size: int) -> GGUFVocabulary:
    """Read a transformers fast tokenizer.

    Args:
        tokenizer: a ``PreTrainedTokenizerFast``.
        vocab_size: rows of the embedding matrix; ids that the tokenizer does not use become unused tokens.

    Raises:
        UserError: a kind of tokenizer that llama.cpp has no equal for, or one with more ids than rows.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            "the base has no fast tokenizer (tokenizer.json)",
            hint="Save it once with transformers: AutoTokenizer.from_pretrained(…).save_pretrained(…).",
        )
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    kind = spec["model"].get("type")
    scores: dict[int, float] = {}
    if kind == "BPE" and spec["model"].get("byte_fallback"):
        model, pre = "llama", "default"
        texts = {i: t for t, i in spec["model"]["vocab"].items()}
        scores = _merge_order(spec["model"])
    elif kind == "BPE":
        model, pre = "gpt2", _pre_tokenizer(spec)
        texts = {i: t for t, i in spec["model"]["vocab"].items()}
    elif kind == "Unigram":
        model, pre = "t5", "default"
        texts = {i: t for i, (t, _) in enumerate(spec["model"]["vocab"])}
        scores = {i: s for i, (_, s) in enumerate(spec["model"]["vocab"])}
    else:
        raise UserError(f"a tokenizer of type {kind} cannot be converted", hint="Known: BPE (byte-level, SentencePiece), Unigram.")
    added = {t["id"]: t for t in spec["added_tokens"]}
    texts |= {i: t["content"] for i, t in added.items()}
    if max(texts) >= vocab_size:
        raise UserError(
            f"the tokenizer has ids up to {max(texts)}, the model has {vocab_size} embedding rows",
            hint="The tokenizer belongs to another model, or tokens were added without resizing the embeddings.",
        )

    types = dict.fromkeys(texts, TokenType.NORMAL)
    for i, token in added.items():
        types[i] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    special = _special_ids(tokenizer)
    prefix = False
    if model == "t5":
        prefix = _unigram_normalizer(spec)
        _unigram_bytes(spec, texts, types, scores)
        if spec["model"].get("unk_id") is not None:
            special["unk"] = spec["model"]["unk_id"]
            types[special["unk"]] = TokenType.UNKNOWN
    elif model == "llama":
        prefix = _space_prefix(spec, tokenizer)
        for i, text in texts.items():
            if i not in added and _BYTE.fullmatch(text):
                types[i] = TokenType.BYTE
        unknown = next((i for i, t in texts.items() if t == spec["model"].get("unk_token")), special.get("unk"))
        if unknown is not None:
            special["unk"], types[unknown] = unknown, TokenType.UNKNOWN
        # Control, unknown and byte tokens have no score in SentencePiece; only merged pieces are compared.
        scores = {i: 0.0 if types[i] in (TokenType.BYTE, TokenType.CONTROL, TokenType.UNKNOWN) else scores.get(i, -1000.0) for i in texts}
    for i in range(vocab_size):
        if i not in texts:
            texts[i], types[i] = f"[PAD{i}]", TokenType.UNUSED
    order = range(vocab_size)
    lowest = min(scores.values(), default=0.0)
    return GGUFVocabulary(
        model=model,
        pre=pre,
        tokens=[texts[i] for i in order],
        types=[types[i] for i in order],
        scores=[float(scores.get(i, lowest)) for i in order] if scores else [],
        merges=[m if isinstance(m, str) else " ".join(m) for m in spec["model"].get("merges", [])] if model == "gpt2" else [],
        special=special,
        add_bos=_adds_bos(tokenizer),
        add_space_prefix=prefix,
    )


def _merge_order(model: dict) -> dict[int, float]:
    """Scores under which SentencePiece's rule (the pair with the best piece first) merges as the list of merges does.

    A piece is as good as the first merge that makes it, counted in pieces: the numbers that SentencePiece itself gives
    to its BPE pieces. Single characters follow, in the order of their ids.
    """
    vocabulary, order = model["vocab"], {}
    for merge in model.get("merges", []):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        made = vocabulary.get(left + right)
        if made is not None:
            order.setdefault(made, len(order))
    rest = (i for t, i in sorted(vocabulary.items(), key=lambda item: item[1]) if i not in order and not _BYTE.fullmatch(t) and len(t) == 1)
    for i in rest:
        order[i] = len(order)
    return {i: -float(n) for i, n in order.items()}


def _space_prefix(spec: dict, tokenizer) -> bool:
    """Whether llama.cpp is to put a space before a text of a SentencePiece BPE tokenizer.

    llama.cpp puts it before the text and behind every special token, or never. A tokenizer that puts it before the
    very first text only is the same as the latter in conversations that begin with a special token.

    Raises:
        UserError: another normalizer or pre-tokenizer than SentencePiece's.
    """
    normalizer, pre = spec.get("normalizer"), spec.get("pre_tokenizer")
    steps = (normalizer or {}).get("normalizers", [normalizer] if normalizer else [])
    prepend = any(s["type"] == "Prepend" and s.get("prepend") == _SPACE for s in steps)
    rest = [s for s in steps if s["type"] != "Prepend"]
    replaces = [s for s in rest if s["type"] == "Replace" and s.get("content") == _SPACE and s["pattern"] == {"String": " "}]
    metaspace = pre is not None and pre["type"] == "Metaspace" and pre["replacement"] == _SPACE and pre.get("split") is False
    if len(replaces) != len(rest) or not (metaspace or (pre is None and replaces)):
        raise UserError(
            f"a SentencePiece BPE tokenizer with the normalizer {json.dumps(normalizer, ensure_ascii=False)} and the "
            f"pre-tokenizer {json.dumps(pre, ensure_ascii=False)} cannot be converted",
            hint="Known: Prepend ▁ and Replace, or Metaspace that does not split.",
        )
    if prepend or not metaspace:
        return prepend
    if pre["prepend_scheme"] == "first" and tokenizer.chat_template:
        first = tokenizer(prompt_text(tokenizer, "x"), add_special_tokens=False)["input_ids"][:1]
        return not special_ids(tokenizer).intersection(first)
    return pre["prepend_scheme"] != "never"


def _pre_tokenizer(spec: dict) -> str:
    """llama.cpp's name for the pre-tokenizer of a byte-level BPE tokenizer."""
    pre = spec.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", [pre])
    regexes = [s["pattern"].get("Regex") for s in steps if s.get("type") == "Split"]
    byte_level = [s for s in steps if s.get("type") == "ByteLevel"]
    plain = len(steps) == 2 and len(byte_level) == 1 and not byte_level[0]["use_regex"]
    ignore_merges = bool(spec["model"].get("ignore_merges"))
    if pre.get("type") == "ByteLevel" and pre["use_regex"] and not pre["add_prefix_space"] and not ignore_merges:
        return _normalized(spec, GPT2)
    name = PRE_TOKENIZERS.get((regexes[0], ignore_merges)) if len(regexes) == 1 and plain else None
    if name is None or byte_level[0]["add_prefix_space"]:
        known = "\n".join(f"  {n} (ignore_merges={i}): {r}" for (r, i), n in PRE_TOKENIZERS.items())
        raise UserError(
            f"the tokenizer's pre-tokenizer is not one of llama.cpp's: {json.dumps(pre, ensure_ascii=False)}, "
            f"ignore_merges={ignore_merges}",
            hint=f"Known, each a Split by this regex and then ByteLevel:\n{known}",
        )
    return _normalized(spec, name)


def _normalized(spec: dict, name: str) -> str:
    normalizer = spec.get("normalizer")
    if normalizer and normalizer["type"] != "NFC":  # NFC changes few texts; the parity check finds and counts them
        raise UserError(f"llama.cpp has no normalizer {normalizer['type']} for BPE tokenizers", hint="Known: none, NFC.")
    return name


def _unigram_normalizer(spec: dict) -> bool:
    """Whether a Unigram tokenizer puts a space before a text; other normalizers than LLM-jp's are refused."""
    normalizer, pre = spec.get("normalizer"), spec.get("pre_tokenizer")
    steps = (normalizer or {}).get("normalizers", [normalizer] if normalizer else [])
    prefix = spaces = False
    for step in steps:
        pattern, content = step.get("pattern", {}), step.get("content")
        if step["type"] == "Replace" and content == _SPACE and pattern.get("Regex") in (r"(?<!\n)^", "^"):
            prefix = True
        elif step["type"] == "Replace" and content == _SPACE and " " in pattern.values():
            spaces = True
        elif step["type"] == "Prepend" and step.get("prepend") == _SPACE:
            prefix = True
        else:
            raise UserError(
                f"a Unigram tokenizer with the normalizer {json.dumps(step, ensure_ascii=False)} cannot be converted",
                hint="Known: LLM-jp's, which writes ▁ at the start of a text and for each space.",
            )
    if pre is not None and _plain_metaspace(spec, pre) and not steps:
        return pre["prepend_scheme"] != "never"
    if pre is not None or not spaces:
        raise UserError(
            f"a Unigram tokenizer with the pre-tokenizer {json.dumps(pre, ensure_ascii=False)} cannot be converted",
            hint="Known: LLM-jp's construction, a normalizer that writes ▁ for each space and no pre-tokenizer.",
        )
    return prefix


def _plain_metaspace(spec: dict, pre: dict) -> bool:
    """Whether a Metaspace pre-tokenizer cuts nothing that a piece of the vocabulary could span."""
    inner = any(_SPACE in t[1:] for t, _ in spec["model"]["vocab"])
    return pre["type"] == "Metaspace" and pre["replacement"] == _SPACE and (pre.get("split") is False or not inner)


def _unigram_bytes(spec: dict, texts: dict[int, str], types: dict, scores: dict[int, float]) -> None:
    """Byte tokens: llama.cpp's Unigram has no byte fallback, so ASCII ones are written as their character.

    Their score is the one that the Hugging Face tokenizer gives a character it does not know (lowest − 10), so
    the best segmentation stays the same. The others keep type BYTE: they can be generated, but a character
    outside the vocabulary becomes the unknown token. Two tokens with one text would abort llama.cpp, so a
    character that has a token of its own keeps that one.
    """
    if not spec["model"].get("byte_fallback"):
        return
    known = set(texts.values())
    unknown_score = min(scores.values()) - 10.0
    for i, text in list(texts.items()):
        match = _BYTE.fullmatch(text)
        if not match:
            continue
        byte = int(match[1], 16)
        types[i] = TokenType.BYTE
        # NUL ends a C string, and a space is written ▁.
        if 0 < byte < 0x80 and chr(byte) != " " and chr(byte) not in known:
            texts[i], types[i], scores[i] = chr(byte), TokenType.NORMAL, unknown_score


def _special_ids(tokenizer) -> dict[str, int]:
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
    found = {name: i for name, i in ids.items() if i is not None}
    # Without these llama.cpp takes ids that happen to be right for other models (11 for BPE).
    if "eos" in found:
        found.setdefault("bos", found["eos"])
    return found


def _adds_bos(tokenizer) -> bool:
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("x")["input_ids"][:1] == [bos]
