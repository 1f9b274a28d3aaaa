"""Is the GGUF the same model: token ids, chat template, BOS, and logits against transformers."""

from __future__ import annotations

import io
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing, redirect_stderr
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

import numpy as np

from tsugiki.artifacts import read_json
from tsugiki.chat import prompt_text
from tsugiki.errors import UserError
from tsugiki.evaluate.engine import Engine, check_gguf
from tsugiki.quantize.adapter import vocabulary_rows
from tsugiki.quantize.weights import open_weights
from tsugiki.samples import EncodedSample

# Tokens that llama.cpp makes control tokens whatever their type, and that a vocabulary may hold as plain text.
_CONTROL_LIKE = ("</s>", "<|endoftext|>", "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|end_of_text|>", "<EOT>", "_<EOT>")
MOST_LOGITS = 1 << 30  # bytes of float32 logits held at a time: 1,760 tokens of a vocabulary of 152,064
_BYTE_NAME = re.compile(r"<0x(?=[0-9A-F]{2}>)")


@dataclass(frozen=True)
class Parity:
    """Token ids of a GGUF against those of the Hugging Face tokenizer it was made from.

    Attributes:
        texts, identical: number of texts, and of those with the same ids.
        unknown: texts in which llama.cpp writes the unknown token and Hugging Face does not.
        groups: ``texts``, ``identical``, ``unknown``, ``unexplained`` (reason ``segmentation``) and ``rate`` of each
            group of texts.
        differences: the first ones of each group: ``group``, ``text``, ``at`` (index of the first id that differs),
            ``hf_ids``, ``gguf_ids``, ``hf_tokens``, ``gguf_tokens`` and ``reason``: ``unknown`` (characters outside the
            vocabulary), ``normalizer`` (Hugging Face changes the text before it, llama.cpp does not), ``space`` (one
            of the two puts a space before the text), ``byte`` (the text spells a byte token's name, ``<0x0A>``),
            ``control`` (the text spells a token of the vocabulary that llama.cpp takes for an end of text by its name,
            as Qwen2's unused ``</s>``), ``marks`` (llama.cpp's regexes for Tekken and GPT-4o take combining marks for
            no part of a word) or
            ``segmentation`` (anything else: the file is not the same tokenizer).
        template: whether the stored chat template is the tokenizer's, letter for letter.
        bos: how many BOS ids stand at the start of a rendered conversation in ``hf`` and in ``gguf``, and of a
            plain text with special tokens added (``hf_text``, ``gguf_text``); ``gguf_added``: of the conversation in a
            program that tokenizes the rendered text as if it were plain.
    """

    texts: int
    identical: int
    unknown: int
    groups: dict[str, dict]
    differences: list[dict]
    template: bool
    bos: dict[str, int]

    @property
    def rate(self) -> float:
        """Share of texts with the same ids."""
        return self.identical / self.texts if self.texts else 1.0


def template_texts(tokenizer, prompts: Sequence[str], system: str | None = None) -> list[str]:
    """Rendered conversations: each prompt as one turn, and the first of them as a conversation of two turns."""
    if not tokenizer.chat_template:
        return []
    texts = [prompt_text(tokenizer, p, system) for p in prompts]
    if len(prompts) > 1:
        turns = [{"role": "user", "content": prompts[0]}, {"role": "assistant", "content": prompts[1]}]
        turns.append({"role": "user", "content": prompts[-1]})
        texts.append(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    return texts


def parity(gguf_path: Path | str, tokenizer, texts: Mapping[str, Iterable[str]], *, most: int = 10) -> Parity:
    """Tokenize groups of texts with both, special tokens in the text parsed, nothing added.

    Args:
        gguf_path: the file; only its vocabulary is loaded.
        tokenizer: the transformers tokenizer.
        texts: group name -> texts, for example ``domain``, ``templates``, ``hard``.
        most: differences kept a group.

    Raises:
        UserError: the file is missing or damaged.
    """
    groups, differences = {}, []
    with closing(_vocabulary(gguf_path)) as model:
        unknown_id = tokenizer.unk_token_id

        def gguf_ids(text: str) -> list[int]:
            return model.tokenize(text.encode("utf-8"), add_bos=False, special=True)

        for group, members in texts.items():
            count = {"texts": 0, "identical": 0, "unknown": 0, "unexplained": 0}
            kept = 0
            members = list(members)
            for text, expected in zip(members, _hf_ids(tokenizer, members), strict=True):
                found = gguf_ids(text) if text else []
                unknown = unknown_id is not None and found.count(unknown_id) > expected.count(unknown_id)
                count["texts"] += 1
                count["identical"] += found == expected
                count["unknown"] += unknown
                if found == expected:
                    continue
                reason = "unknown" if unknown else _reason(tokenizer, gguf_ids, text, expected, found)
                count["unexplained"] += reason == "segmentation"
                if kept < most or (reason == "segmentation" and count["unexplained"] == 1):
                    kept += 1
                    differences.append(_difference(group, text, tokenizer, expected, found, reason))
            count["rate"] = count["identical"] / count["texts"] if count["texts"] else 1.0
            groups[group] = count
        stored = model.metadata.get("tokenizer.chat_template")
        bos = _count_bos(tokenizer, model)
    return Parity(
        texts=sum(g["texts"] for g in groups.values()),
        identical=sum(g["identical"] for g in groups.values()),
        unknown=sum(g["unknown"] for g in groups.values()),
        groups=groups, differences=differences, template=stored == tokenizer.chat_template, bos=bos,
    )


def _hf_ids(tokenizer, texts: list[str]) -> list[list[int]]:
    """All texts at once: one by one costs ten times as much."""
    return tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []


def _reason(tokenizer, gguf_ids, text: str, expected: list[int], found: list[int]) -> str:
    plain = _normalized(tokenizer, text)
    if plain is not None and plain != text and gguf_ids(plain) == expected:
        return "normalizer"
    if gguf_ids(f" {text}") == expected or tokenizer(f" {text}", add_special_tokens=False)["input_ids"] == found:
        return "space"
    pieces = [tokenizer.convert_ids_to_tokens(ids) for ids in (expected, found)]
    words, blanks = zip(*(([p for p in row if p.strip("▁")], sum(p.count("▁") for p in row)) for row in pieces), strict=True)
    if words[0] == words[1] and blanks[0] != blanks[1]:
        return "space"
    unspelled = _BYTE_NAME.sub("<0 x", text)
    if unspelled != text and gguf_ids(unspelled) == tokenizer(unspelled, add_special_tokens=False)["input_ids"]:
        return "byte"
    for token in map(tokenizer.convert_ids_to_tokens, set(found) - set(expected)):
        if token in _CONTROL_LIKE and token in text:
            return "control"
    unmarked = "".join(c for c in text if not unicodedata.category(c).startswith("M"))
    if unmarked != text and gguf_ids(unmarked) == tokenizer(unmarked, add_special_tokens=False)["input_ids"]:
        return "marks"
    return "segmentation"


def check_bos(found: Parity) -> None:
    """Refuse a file that would put no BOS, or two, where the original puts one.

    Raises:
        UserError: with the counts.
    """
    b = found.bos
    if b["gguf"] != b["hf"] or b["gguf_text"] != b["hf_text"] or max(v for k, v in b.items() if k != "gguf_added") > 1:
        raise UserError(
            f"BOS at the start: of a conversation {b['hf']} (transformers) and {b['gguf']} (GGUF), "
            f"of a text {b['hf_text']} and {b['gguf_text']}; equal numbers of at most 1 are needed",
            hint="Look at bos_token and chat_template in the base's tokenizer_config.json.",
        )


def bos_notes(found: Parity) -> list[str]:
    """What a program may get wrong with a file that is right."""
    if found.bos.get("gguf_added", 0) <= max(1, found.bos["gguf"]):
        return []
    return [
        f"the chat template writes BOS and the file says that BOS is added (as the base does): a program that renders a "
        f"conversation and then tokenizes it with add_bos=True begins it with {found.bos['gguf_added']} BOS; render, then add nothing"
    ]


def _vocabulary(path: Path | str):
    from llama_cpp import Llama

    check_gguf(path)
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            return Llama(os.fspath(path), vocab_only=True, verbose=False)
    except ValueError as error:
        raise UserError(
            f"llama.cpp cannot load its vocabulary: {error} {said.getvalue().strip()}", where=str(path)
        ) from None


def _normalized(tokenizer, text: str) -> str | None:
    normalizer = tokenizer.backend_tokenizer.normalizer
    return normalizer.normalize_str(text) if normalizer is not None else None


def _difference(group: str, text: str, tokenizer, expected: list[int], found: list[int], reason: str) -> dict:
    at = next((i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), min(len(expected), len(found)))
    return {
        "group": group, "text": text, "at": at, "reason": reason, "hf_ids": expected, "gguf_ids": found,
        "hf_tokens": tokenizer.convert_ids_to_tokens(expected[at : at + 4]),
        "gguf_tokens": tokenizer.convert_ids_to_tokens(found[at : at + 4]),
    }


def _count_bos(tokenizer, model) -> dict[str, int]:
    """BOS ids at the start of a conversation (rendered text, nothing added) and of a text (all added)."""
    bos = tokenizer.bos_token_id
    if bos is None:
        found = model.tokenize("猫".encode(), add_bos=True, special=True)
        plain = tokenizer("猫", add_special_tokens=False)["input_ids"]
        return {"hf": 0, "gguf": 0, "hf_text": 0, "gguf_text": len(found) - len(plain)}

    def leading(ids: list[int]) -> int:
        return next((i for i, token in enumerate(ids) if token != bos), len(ids))

    counts = {
        "hf_text": leading(tokenizer("猫")["input_ids"]),
        "gguf_text": leading(model.tokenize("猫".encode(), add_bos=True, special=True)),
    }
    if tokenizer.chat_template:
        text = prompt_text(tokenizer, "猫")
        counts["hf"] = leading(tokenizer(text, add_special_tokens=False)["input_ids"])
        counts["gguf"] = leading(model.tokenize(text.encode(), add_bos=False, special=True))
        counts["gguf_added"] = leading(model.tokenize(text.encode(), add_bos=True, special=True))
    return {"hf": 0, "gguf": 0} | counts


# --- logits ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Agreement:
    """Logits of a GGUF against transformers in float32, over all completion tokens.

    Attributes:
        samples, tokens: how many were compared.
        kl_mean: mean Kullback–Leibler divergence of the GGUF from transformers, nats a token.
        max_abs: largest absolute difference of two logits.
        top1: share of tokens at which both have the same most likely token.
        nll_hf, nll_gguf: mean negative log-likelihood of the completion, nats a token.
    """

    samples: int
    tokens: int
    kl_mean: float
    max_abs: float
    top1: float
    nll_hf: float
    nll_gguf: float


def logits_agreement(
    gguf_path: Path | str,
    base_dir: Path | str,
    adapter_dir: Path | str | None,
    samples: Sequence[EncodedSample],
    *,
    n: int = 32,
    n_threads: int | None = None,
) -> Agreement:
    """Compare completion logits on the same ids; in transformers the adapter runs beside the base, unmerged.

    Args:
        samples: the first ``n`` are compared, fewer where their logits come to more than :data:`MOST_LOGITS`.

    Raises:
        UserError: no samples, or a vocabulary of another size.
    """
    import torch

    samples = list(samples[:n])
    if not samples:
        raise UserError("no samples to compare logits on")
    model = load_reference(base_dir, adapter_dir, narrow=True)
    room, kept = MOST_LOGITS // (4 * model.get_output_embeddings().weight.shape[0]), []
    for s in samples:
        room -= len(s.completion_ids)
        if room >= 0 or not kept:
            kept.append(s)
    samples = kept
    with torch.no_grad():
        logits = [model(torch.tensor([s.ids])).logits[0, len(s.prompt_ids) - 1 : -1].float().numpy() for s in samples]
    del model  # the two are never in memory together
    kl = nll_hf = nll_gguf = max_abs = 0.0
    tokens = same = 0
    longest = max(len(s.ids) for s in samples)
    with Engine(gguf_path, n_ctx=max(longest, 256), n_seq_max=1, n_threads=n_threads) as engine:
        for index, found in engine.completion_logits(samples):
            sample, expected = samples[index], logits[index]
            if expected.shape != found.shape:
                raise UserError(
                    f"the GGUF's logits are {found.shape}, the base's {expected.shape}", where=str(gguf_path),
                    hint="The file was made from another base.",
                )
            p, q = log_softmax(expected), log_softmax(found)
            rows, targets = np.arange(len(p)), np.asarray(sample.completion_ids)
            kl += float((np.exp(p) * (p - q)).sum())
            nll_hf -= float(p[rows, targets].sum())
            nll_gguf -= float(q[rows, targets].sum())
            max_abs = max(max_abs, float(np.abs(expected - found).max()))
            same += int((p.argmax(1) == q.argmax(1)).sum())
            tokens += len(p)
    return Agreement(len(samples), tokens, kl / tokens, max_abs, same / tokens, nll_hf / tokens, nll_gguf / tokens)


def load_reference(base_dir: Path | str, adapter_dir: Path | str | None, *, narrow: bool = False):
    """The base on the CPU with the adapter beside it, computing in float32, for comparisons.

    Not merged: PEFT's merge writes an update of tied embeddings into both, which is not the model that was trained.

    Args:
        narrow: hold the base in the 16 bits that its files have and widen each module's own parameters to float32 while
            that module computes: bit for bit the same logits, with 2 bytes a parameter instead of 4, and the widest
            matrix once more. Where that would not be exact (:func:`stored_dtype`), all of it is float32.

    Raises:
        UserError: transformers or PEFT cannot load it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    kind = stored_dtype(base_dir, adapter_dir) if narrow else None
    try:
        model = AutoModelForCausalLM.from_pretrained(
            base_dir, dtype=getattr(torch, kind or "float32"), local_files_only=True, trust_remote_code=False
        )
        if adapter_dir:
            from peft import PeftModel

            rows = vocabulary_rows(Path(adapter_dir))
            if rows and rows != model.get_input_embeddings().weight.shape[0]:  # PEFT loads the tables, of this size
                model.resize_token_embeddings(rows, mean_resizing=False)
            model = PeftModel.from_pretrained(model, adapter_dir)  # its own matrices are float32 whatever the base is
    except (OSError, ValueError, KeyError, RuntimeError) as error:  # what the libraries raise on files that do not fit
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"transformers or PEFT cannot load it: {first}", where=str(adapter_dir or base_dir),
                        hint="The adapter may belong to another base.") from error
    if kind:
        _widen_while_computing(model)
    return model.eval()


def stored_dtype(base_dir: Path | str, adapter_dir: Path | str | None) -> str | None:
    """``bfloat16`` or ``float16`` where a base can be held in it and its adapter added in float32 while it computes.

    None where the files hold several types or float32, or where the adapter is more than pairs of matrices beside linear
    layers (DoRA, embeddings, ``modules_to_save``, biases), or changes an output layer that is tied: PEFT then reads or
    replaces the base's own weights.
    """
    kinds = {stored.dtype for stored in open_weights(Path(base_dir)).values()}
    if kinds not in ({"BF16"}, {"F16"}):
        return None
    if adapter_dir:
        from safetensors import safe_open

        try:
            with safe_open(Path(adapter_dir) / "adapter_model.safetensors", "pt") as file:
                names = list(file.keys())
            settings = read_json(Path(adapter_dir) / "adapter_config.json")
            tied = read_json(Path(base_dir) / "config.json").get("tie_word_embeddings")
        except Exception:  # what is damaged is named where it is loaded
            return None
        plain = all(re.search(r"\.lora_[AB]\.weight$", n) for n in names)
        if not plain or settings.get("target_parameters") or (tied is not False and any("lm_head" in n for n in names)):
            return None
    return {"BF16": "bfloat16", "F16": "float16"}[kinds.pop()]


def reference_bytes(base_dir: Path | str, adapter_dir: Path | str | None) -> int:
    """What :func:`load_reference` with ``narrow`` takes: the weights, and the widest matrix twice in float32."""
    sizes = [prod(stored.shape) for stored in open_weights(Path(base_dir)).values()]
    return (2 if stored_dtype(base_dir, adapter_dir) else 4) * sum(sizes) + 8 * max(sizes)


def merge_reference(model):
    """The adapter added to the weights, in float32; a model held in 16 bits gets the sum each time it is widened."""
    import torch

    if all(p.dtype == torch.float32 for p in model.parameters()):
        return model.merge_and_unload()
    from peft.tuners.lora import LoraLayer

    def add(layer, module, _) -> None:  # runs after the widening, on its copy
        module.weight.data += layer.get_delta_weight(layer.active_adapters[0])

    for layer in [m for m in model.modules() if isinstance(m, LoraLayer)]:
        layer.get_base_layer().register_forward_pre_hook(partial(add, layer))
    model.base_model.disable_adapter_layers()
    return model


def _widen_while_computing(model) -> None:
    import torch

    held = {}

    def widen(module, _):
        for weight in module.parameters(recurse=False):
            if weight.dtype in (torch.bfloat16, torch.float16):
                held[weight], weight.data = weight.data, weight.data.float()

    def put_back(module, *_):
        for weight in module.parameters(recurse=False):
            if weight in held:
                weight.data = held.pop(weight)

    for module in model.modules():
        if next(module.parameters(recurse=False), None) is not None:
            module.register_forward_pre_hook(widen)
            module.register_forward_hook(put_back, always_call=True)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-softmax over the last axis, in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
