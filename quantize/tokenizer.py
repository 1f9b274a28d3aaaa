"""A Hugging Face fast tokenizer as a GGUF vocabulary.

What the tokenizer does is read from its own definition (``tokenizer.json``), never guessed from a probe string.
What llama.cpp cannot do the same way is either refused here or measured by :mod:`tsugiki.quantize.parity`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from gguf import TokenType

from tsugiki.errors import UserError

# (regex, ignore_merges) of a byte-level BPE tokenizer -> llama.cpp's name for that pre-tokenizer.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE_TOKENIZERS = {
    (_WORDS + r"\p{N}{1,3}" + _REST, True): "llama-bpe",
    (_WORDS + r"\p{N}{1,3}" + _REST, False): "smaug-bpe",
    (_WORDS + r"\p{N}" + _REST, False): "qwen2",
}
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "▁"


@dataclass(frozen=True)
class GGUFVocabulary:
    """The vocabulary as llama.cpp reads it.

    Attributes:
        model: ``gpt2`` (byte-level BPE) or ``t5`` (Unigram).
        pre: llama.cpp's name of the pre-tokenizer.
        tokens: the texts, one an id.
        types: :class:`gguf.TokenType`, one an id.
        scores: log-probabilities, one an id (Unigram only, else empty).
        merges: BPE merges, ``"left right"`` (else empty).
        special: ids of ``bos``, ``eos``, ``unk``, ``pad`` where the tokenizer has them.
        add_bos: whether the tokenizer itself puts BOS before a text.
        add_space_prefix: whether it puts a space before a text (Unigram only).
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
        if self.model == "t5":
            writer.add_token_scores(self.scores)
            writer.add_add_space_prefix(self.add_space_prefix)
            writer.add_remove_extra_whitespaces(False)
        else:
            writer.add_token_merges(self.merges)
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
    if kind == "BPE":
        model, pre = "gpt2", _pre_tokenizer(spec)
        texts = {i: t for t, i in spec["model"]["vocab"].items()}
        scores: dict[int, float] = {}
    elif kind == "Unigram":
        model, pre = "t5", "default"
        texts = {i: t for i, (t, _) in enumerate(spec["model"]["vocab"])}
        scores = {i: s for i, (_, s) in enumerate(spec["model"]["vocab"])}
    else:
        raise UserError(f"a tokenizer of type {kind} cannot be converted", hint="Known: BPE (byte-level), Unigram.")
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
        merges=[m if isinstance(m, str) else " ".join(m) for m in spec["model"].get("merges", [])],
        special=special,
        add_bos=_adds_bos(tokenizer),
        add_space_prefix=prefix,
    )


def _pre_tokenizer(spec: dict) -> str:
    """llama.cpp's name for the pre-tokenizer of a byte-level BPE tokenizer."""
    pre = spec.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", [pre])
    regexes = [s["pattern"].get("Regex") for s in steps if s.get("type") == "Split"]
    byte_level = [s for s in steps if s.get("type") == "ByteLevel"]
    plain = len(steps) == 2 and len(byte_level) == 1 and not byte_level[0]["use_regex"]
    ignore_merges = bool(spec["model"].get("ignore_merges"))
    name = PRE_TOKENIZERS.get((regexes[0], ignore_merges)) if len(regexes) == 1 and plain else None
    if name is None or byte_level[0]["add_prefix_space"]:
        known = "\n".join(f"  {n} (ignore_merges={i}): {r}" for (r, i), n in PRE_TOKENIZERS.items())
        raise UserError(
            f"the tokenizer's pre-tokenizer is not one of llama.cpp's: {json.dumps(pre, ensure_ascii=False)}, "
            f"ignore_merges={ignore_merges}",
            hint=f"Known, each a Split by this regex and then ByteLevel:\n{known}",
        )
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
    if pre is not None or not spaces:
        raise UserError(
            f"a Unigram tokenizer with the pre-tokenizer {json.dumps(pre, ensure_ascii=False)} cannot be converted",
            hint="Known: LLM-jp's construction, a normalizer that writes ▁ for each space and no pre-tokenizer.",
        )
    return prefix


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
