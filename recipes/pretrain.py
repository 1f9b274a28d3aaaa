"""Pre-training of the bundled tiny bases: real little Japanese models, one for each family users bring.

    make tiny-bases CORPUS=DIR

The corpus is a folder of text: ``*.jsonl`` with ``text`` (and ``lang``) or with ``ja`` and ``en``, and ``*.txt``.
Everything is deterministic by seed; a killed run goes on from its last checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from tsugiki.artifacts import atomic_path, digest, read_json, write_json, write_text
from tsugiki.chat import TEMPLATES
from tsugiki.errors import UserError
from tsugiki.progress import console, progress

LLAMA3_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ASCII_CHARACTERS = "".join(map(chr, range(0x21, 0x7F)))
QWEN2_REGEX = LLAMA3_REGEX.replace(r"\p{N}{1,3}", r"\p{N}")


@dataclass(frozen=True)
class TinyBase:
    """What a bundled base is made of."""

    name: str
    architecture: str  # "llama" or "qwen2"
    tokenizer: str  # "llama3-bpe", "qwen2-bpe" or "unigram"
    vocab_size: int
    layers: int
    kv_heads: int
    tied: bool
    japanese_share: float  # of the training tokens
    hidden: int = 256
    ffn: int = 768
    heads: int = 8
    tokens: int = 12_000_000
    sequence: int = 512
    batch: int = 16  # sequences a step
    learning_rate: float = 4e-3  # AdamW: embeddings, output, norms, biases
    muon_rate: float = 0.02  # Muon: the matrices of the layers
    chat_share: float = 0.05  # passages written as a chat turn, so that the chat tokens are trained
    seed: int = 0


TINY_BASES = {
    b.name: b
    for b in (
        TinyBase("tiny-llama", "llama", "llama3-bpe", 6144, 4, 2, False, 0.80),
        TinyBase("tiny-qwen", "qwen2", "qwen2-bpe", 6144, 6, 2, True, 0.65, tokens=10_400_000),
        TinyBase("tiny-llmjp", "llama", "unigram", 5120, 4, 8, False, 0.90, tokens=10_400_000),
    )
}


# --- corpus ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Passage:
    """Whole paragraphs of one document, in one language."""

    document: str
    lang: str  # "ja" or "en"
    paragraphs: tuple[str, ...]


_JAPANESE = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]")


def language_of(text: str) -> str:
    """``ja`` when at least a fifth of the characters that are not spaces are kana or kanji, else ``en``."""
    letters = sum(not c.isspace() for c in text)
    return "ja" if letters and len(_JAPANESE.findall(text)) >= 0.2 * letters else "en"


def read_corpus(folder: Path) -> Iterator[tuple[str, str, str]]:
    """Yield ``(document id, language, text)`` of every text below ``folder``, files in name order.

    Raises:
        UserError: the folder holds no text, or a line is not a JSON object with text.
    """
    found_files = (Path(d) / n for d, _, names in os.walk(folder, followlinks=True) for n in names)
    files = sorted(p for p in found_files if p.suffix in (".jsonl", ".txt") and p.stem != "NOTICE")
    found = False
    for path in files:
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".txt":
            text = _utf8(path.read_bytes(), str(path))
            yield name, language_of(text), text
            found = True
            continue
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                where = f"{path}:{number}"
                if not line.strip():
                    continue
                try:
                    row = json.loads(_utf8(line, where))
                except json.JSONDecodeError as error:
                    raise UserError(f"not JSON ({error})", where=where) from error
                if not isinstance(row, dict):
                    raise UserError("a line must be a JSON object", where=where)
                key = str(row.get("id", number))
                if isinstance(row.get("text"), str):
                    yield f"{name}:{key}", row.get("lang") or language_of(row["text"]), row["text"]
                    found = True
                else:
                    for lang in ("ja", "en"):
                        if isinstance(row.get(lang), str):
                            yield f"{name}:{key}:{lang}", lang, row[lang]
                            found = True
    if not found:
        raise UserError(f"no text found below {folder}", hint="Name a folder with .jsonl or .txt files: CORPUS=DIR")


def _utf8(data: bytes, where: str) -> str:
    """Text as text mode reads it: UTF-8, every line end a newline."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 (byte 0x{data[error.start]:02x} at byte {error.start + 1})", where=where) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def passages_of(document: str, lang: str, text: str, *, most: int) -> Iterator[Passage]:
    """Cut a document into passages of whole paragraphs, about ``most`` characters each."""
    held: list[str] = []
    size = 0
    for paragraph in (p.strip() for p in text.split("\n")):
        if not paragraph:
            continue
        if held and size + len(paragraph) > most:
            yield Passage(document, lang, tuple(held))
            held, size = [], 0
        held.append(paragraph)
        size += len(paragraph)
    if held:
        yield Passage(document, lang, tuple(held))


def is_held_out(document: str) -> bool:
    """One document in a hundred, by hash of its id, is kept for measuring bits per character."""
    return int(hashlib.sha256(document.encode()).hexdigest(), 16) % 100 == 0


# --- tokenizers -----------------------------------------------------------------------------------------------


def train_tokenizer(base: TinyBase, texts: list[str]):
    """Train the base's tokenizer; returns a transformers fast tokenizer with chat template."""
    from transformers import PreTrainedTokenizerFast

    if base.tokenizer == "unigram":
        backend, special = _train_unigram(texts, base.vocab_size)
        template = TEMPLATES["llm-jp"]
    else:
        llama3 = base.tokenizer == "llama3-bpe"
        backend, special = _train_bpe(texts, base.vocab_size, llama3=llama3)
        template = TEMPLATES["llama-3" if llama3 else "chatml"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=2048, clean_up_tokenization_spaces=False, **special
    )
    tokenizer.chat_template = template
    return tokenizer


def _train_bpe(texts: list[str], vocab_size: int, *, llama3: bool):
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )

    if llama3:
        names = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
                 "<|finetune_right_pad_id|>"]
        special = {"bos_token": names[0], "eos_token": names[1], "pad_token": names[5]}
    else:
        names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|fim_pad|>"]
        special = {"eos_token": names[0], "pad_token": names[3]}
    tokenizer = Tokenizer(models.BPE(ignore_merges=llama3))
    if not llama3:
        tokenizer.normalizer = normalizers.NFC()  # as Qwen2's
    regex = LLAMA3_REGEX if llama3 else QWEN2_REGEX
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(regex), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(names), min_frequency=2, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # Special tokens come last, as in Llama-3 and Qwen2.
    tokenizer.add_special_tokens([AddedToken(n, special=True, normalized=False) for n in names])
    if llama3:
        bos = names[0]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return tokenizer, special


def _train_unigram(texts: list[str], vocab_size: int):
    """A SentencePiece Unigram model with byte fallback, as a fast tokenizer (LLM-jp's construction)."""
    import io

    import sentencepiece
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors

    names = ["<unk>", "<s>", "</s>", "<pad>"]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.split("\n") if line),
        model_writer=model, model_type="unigram", vocab_size=vocab_size - 1, byte_fallback=True,
        character_coverage=0.9995, split_digits=True, required_chars=ASCII_CHARACTERS, normalization_rule_name="identity",
        remove_extra_whitespaces=False, max_sentence_length=8192, num_threads=2, minloglevel=2,
        unk_id=0, bos_id=1, eos_id=2, pad_id=3, unk_piece="<unk>", pad_piece="<pad>",
    )
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    vocab = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(pieces.get_piece_size())]
    lowest = min(score for _, score in vocab)
    vocab = [(p, lowest if p in names or p.startswith("<0x") else s) for p, s in vocab]
    vocab.append(("\n", lowest))
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace(Regex(r"(?<!\n)^"), "▁"), normalizers.Replace(Regex(" "), "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Replace(Regex("▁"), " "), decoders.Fuse(),
         decoders.Replace(Regex(r"(?<!\n)^ "), "")]
    )
    tokenizer.add_special_tokens([AddedToken(n, special=True, normalized=False) for n in names])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer, {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


# --- training data --------------------------------------------------------------------------------------------


def passage_ids(tokenizer, passage: Passage, *, chat: bool) -> list[int]:
    """One passage as token ids: BOS (where the family has one), text, end; or as one chat turn."""
    eos = tokenizer.eos_token_id
    if chat and len(passage.paragraphs) > 1:
        half = len(passage.paragraphs) // 2
        messages = [
            {"role": "user", "content": "\n".join(passage.paragraphs[:half])},
            {"role": "assistant", "content": "\n".join(passage.paragraphs[half:])},
        ]
        text = tokenizer.apply_chat_template(messages, tokenize=False).rstrip("\n")
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids if ids[-1] == eos else [*ids, eos]
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return [*bos, *tokenizer("\n".join(passage.paragraphs), add_special_tokens=False)["input_ids"], eos]


def build_windows(base: TinyBase, tokenizer, passages: list[Passage]) -> tuple[np.ndarray, dict]:
    """Pack passages into windows until the language shares and the token count are met.

    Returns:
        ``(windows, counts)``: uint16 token ids ``(W, sequence + 1)``, and the tokens of each language in them.
    """
    rng = random.Random(base.seed)
    rows: list[tuple[str, np.ndarray]] = []
    counts: Counter = Counter()
    passes: dict[str, float] = {}
    wanted = {"ja": round(base.tokens * base.japanese_share), "en": round(base.tokens * (1 - base.japanese_share))}
    for lang, goal in wanted.items():
        pool = [p for p in passages if p.lang == lang]
        if not pool:
            raise UserError(f"the corpus has no {lang} text; {base.name} needs {goal:,} tokens of it")
        while counts[lang] < goal:
            rng.shuffle(pool)
            for i, passage in enumerate(pool):
                ids = passage_ids(tokenizer, passage, chat=rng.random() < base.chat_share)
                rows.append((lang, np.asarray(ids, dtype=np.uint16)))
                counts[lang] += len(ids)
                if counts[lang] >= goal:
                    passes[lang] = round(passes.get(lang, 0) + (i + 1) / len(pool), 3)
                    break
            else:
                passes[lang] = passes.get(lang, 0) + 1.0
    rng.shuffle(rows)
    stream = np.concatenate([ids for _, ids in rows])
    width = base.sequence + 1
    kept = len(stream) // (width * base.batch) * base.batch * width
    if not kept:
        raise UserError(f"{len(stream):,} tokens do not fill one step of {width * base.batch:,}", hint="Ask for more tokens.")
    # The rest of the stream is not trained on, so its tokens do not count.
    tokens, at = dict.fromkeys(wanted, 0), 0
    for lang, ids in rows:
        tokens[lang] += max(0, min(len(ids), kept - at))
        at += len(ids)
    windows = stream[:kept].reshape(-1, width)
    return windows, {"tokens": tokens, "passes": passes, "windows": len(windows)}


# --- training -------------------------------------------------------------------------------------------------


def build_model(base: TinyBase, tokenizer):
    """A random-weight model of the base's shape, seeded."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(base.seed)
    shape = {
        "vocab_size": base.vocab_size, "hidden_size": base.hidden, "intermediate_size": base.ffn,
        "num_hidden_layers": base.layers, "num_attention_heads": base.heads, "num_key_value_heads": base.kv_heads,
        "max_position_embeddings": 2048, "tie_word_embeddings": base.tied, "rms_norm_eps": 1e-5,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }
    if base.architecture == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**shape))
    return LlamaForCausalLM(LlamaConfig(**shape))


def pretrain(
    base: TinyBase,
    corpus: Path,
    out: Path,
    work: Path,
    *,
    device: str = "cpu",
    compiled: bool = True,
    checkpoint_every: int = 200,
) -> None:
    """Train one bundled base and write it to ``out`` (config, tokenizer, bf16 safetensors, model card).

    Args:
        base: its definition.
        corpus: folder of text.
        out: the base's folder; replaced when training is complete.
        work: tokenizer, windows and checkpoints; delete it to start over.
        device: a torch device.
        compiled: through torch.compile: faster after a minute, with other roundings.
        checkpoint_every: steps from one checkpoint to the next; a kill loses at most so many.

    Raises:
        UserError: a corpus that cannot be read or is too small, or a work folder of another training run.
    """
    import torch
    from safetensors.torch import load_file, save_file

    work.mkdir(parents=True, exist_ok=True)
    settings = digest(asdict(base))
    if (work / "settings.json").exists() and read_json(work / "settings.json")["digest"] != settings:
        raise UserError(f"{work} holds another training run", hint="Delete that folder to start over.")
    write_json(work / "settings.json", {"digest": settings, "base": asdict(base)})

    documents = sorted(read_corpus(corpus))
    train_docs = [d for d in documents if not is_held_out(d[0])]
    if not (work / "tokenizer").exists():
        console.print(f"[bold]{base.name}[/]: training the tokenizer ({base.tokenizer}, {base.vocab_size} tokens)")
        with atomic_path(work / "tokenizer") as folder:
            train_tokenizer(base, _tokenizer_texts(base, train_docs)).save_pretrained(folder)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer")
    if len(tokenizer) != base.vocab_size:
        raise UserError(f"the tokenizer has {len(tokenizer)} tokens, {base.name} wants {base.vocab_size}",
                        hint="The corpus is too small for that vocabulary.")
    if not (work / "windows.npy").exists():
        passages = [
            p for d, lang, text in train_docs for p in passages_of(d, lang, text, most=500 if lang == "ja" else 1500)
        ]
        windows, counts = build_windows(base, tokenizer, passages)
        write_json(work / "counts.json", counts)
        with atomic_path(work / "windows.npy") as path, path.open("wb") as file:
            np.save(file, windows)
    windows, counts = np.load(work / "windows.npy", allow_pickle=False), read_json(work / "counts.json")

    model = build_model(base, tokenizer).to(device)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n]
    others = [p for n, p in model.named_parameters() if not (p.ndim == 2 and ".layers." in n)]
    optimizers = [
        torch.optim.Muon(matrices, lr=base.muon_rate, weight_decay=0.1),
        torch.optim.AdamW(others, lr=base.learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    rates = [base.muon_rate, base.learning_rate]

    def loss_of(ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.split(":")[0], torch.bfloat16):
            hidden = model.model(ids[:, :-1]).last_hidden_state
            logits = model.lm_head(hidden)
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())

    step_loss = torch.compile(loss_of) if compiled else loss_of
    order = np.random.default_rng(base.seed).permutation(len(windows))
    steps = len(windows) // base.batch
    start = _load_checkpoint(work, model, optimizers, load_file)
    began, seen = time.monotonic(), 0
    warmup = max(1, steps // 20)
    with progress() as bar:
        task = bar.add_task(base.name, total=steps, completed=start, note="")
        for step in range(start, steps):
            scale = min(1.0, (step + 1) / warmup) * max(0.0, min(1.0, (steps - step) / (0.8 * steps)))
            for optimizer, rate in zip(optimizers, rates, strict=True):
                for group in optimizer.param_groups:
                    group["lr"] = rate * scale
            rows = order[step * base.batch : (step + 1) * base.batch]
            ids = torch.from_numpy(windows[rows].astype(np.int64)).to(device)
            loss = step_loss(ids)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            seen += ids.numel()
            if step % 20 == 19 or step == steps - 1:
                rate = seen / (time.monotonic() - began)
                bar.update(task, completed=step + 1, note=f"{loss.item():.3f} nats/token, {rate:,.0f} tokens/s")
                with (work / "log.jsonl").open("a") as log:
                    log.write(json.dumps({"step": step + 1, "loss": round(loss.item(), 4), "tokens_s": round(rate)}) + "\n")
            if (step + 1) % checkpoint_every == 0:
                _save_checkpoint(work, step + 1, model, optimizers, save_file)

    model = model.eval().to("cpu")
    held_out = [d for d in documents if is_held_out(d[0])]
    bits = {lang: bits_per_character(model, tokenizer, [d for d in held_out if d[1] == lang]) for lang in ("ja", "en")}
    samples = _samples(model, tokenizer, base.seed)
    model.generation_config.max_length = None
    with atomic_path(out) as folder:
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        card = {"base": asdict(base), **counts, "held_out_bits_per_character": bits,
                "parameters": sum(p.numel() for p in model.parameters()),
                "documents": dict(Counter(lang for _, lang, _ in train_docs))}
        write_json(folder / "training.json", card)
        write_text(folder / "README.md", model_card(base, card, samples))
    console.print(
        f"[bold]{base.name}[/]: bits/character on held-out Japanese {_bits(bits['ja'])}, on English {_bits(bits['en'])}"
    )


def _tokenizer_texts(base: TinyBase, documents: list[tuple[str, str, str]], characters: int = 6_000_000) -> list[str]:
    """Text for the tokenizer, in the languages' shares; characters of English count a third of Japanese ones."""
    rng = random.Random(base.seed)
    texts: list[str] = []
    share = {"ja": base.japanese_share, "en": (1 - base.japanese_share) * 3}
    for lang, part in share.items():
        passages = [p for d, g, t in documents if g == lang for p in passages_of(d, g, t, most=1000)]
        rng.shuffle(passages)
        size = 0
        for passage in passages:
            texts.append("\n".join(passage.paragraphs))
            size += len(texts[-1])
            if size > characters * part:
                break
    return texts


def _save_checkpoint(work: Path, step: int, model, optimizers, save_file) -> None:
    tensors = {f"model.{n}": p.detach().contiguous() for n, p in model.named_parameters()}
    for o, optimizer in enumerate(optimizers):
        for i, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{o}.{i}.{k}": v.detach().contiguous() for k, v in state.items()}
    with atomic_path(work / "checkpoint.safetensors") as path:
        save_file(tensors, path, metadata={"step": str(step)})


def _load_checkpoint(work: Path, model, optimizers, load_file) -> int:
    """Restore model and optimizers; returns the step to go on from."""
    import torch
    from safetensors import safe_open

    path = work / "checkpoint.safetensors"
    if not path.exists():
        return 0
    tensors = load_file(path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
    for o, optimizer in enumerate(optimizers):
        state = optimizer.state_dict()
        for name, value in tensors.items():
            if name.startswith(f"optimizer.{o}."):
                _, _, i, key = name.split(".", 3)
                state["state"].setdefault(int(i), {})[key] = value
        optimizer.load_state_dict(state)
    with safe_open(path, "pt") as file:
        return int(file.metadata()["step"])


def _bits(value: float | None) -> str:
    return "not measured: no document was held out" if value is None else f"{value:.3f}"


def bits_per_character(
    model, tokenizer, documents: list[tuple[str, str, str]], characters: int = 120_000
) -> float | None:
    """Held-out bits per character: summed nats of all tokens after BOS, over ln 2 and the characters scored.

    ``None`` where the documents hold no text.
    """
    import torch

    nats, scored = 0.0, 0
    for _, _, text in documents:
        for passage in passages_of("", "", text, most=600):
            body = "\n".join(passage.paragraphs)
            ids = tokenizer(body, add_special_tokens=False)["input_ids"][:1000]
            first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
            with torch.no_grad():
                logits = model(torch.tensor([[first, *ids]])).logits[0, :-1].float()
            nats += torch.nn.functional.cross_entropy(logits, torch.tensor(ids), reduction="sum").item()
            scored += len(tokenizer.decode(ids))
            if scored >= characters:
                return nats / math.log(2) / scored
    return nats / math.log(2) / scored if scored else None


def _samples(model, tokenizer, seed: int) -> dict[str, str]:
    import torch

    torch.manual_seed(seed)
    written = {}
    for prompt in ("吾輩は", "この機械を動かすには、", "The old man"):
        ids = torch.tensor([[*( [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []),
                             *tokenizer(prompt, add_special_tokens=False)["input_ids"]]])
        out = model.generate(ids, do_sample=True, temperature=0.8, top_p=0.95, max_new_tokens=60,
                             pad_token_id=tokenizer.pad_token_id, attention_mask=torch.ones_like(ids))
        written[prompt] = tokenizer.decode(out[0], skip_special_tokens=True)
    return written


def model_card(base: TinyBase, card: dict, samples: dict[str, str]) -> str:
    """The README.md of a bundled base."""
    tokens = card["tokens"]
    total = sum(tokens.values())
    bits = card["held_out_bits_per_character"]
    kv = "full multi-head attention" if base.kv_heads == base.heads else f"grouped-query attention {base.heads}:{base.kv_heads}"
    lines = [
        "---", "language: [ja, en]", "license: apache-2.0", "---", f"# {base.name}", "",
        f"A {card['parameters'] / 1e6:.1f}M-parameter {base.architecture} model ({base.layers} layers, hidden {base.hidden}, {kv}, "
        f"{'tied' if base.tied else 'untied'} embeddings, {base.vocab_size} tokens, {base.tokenizer} tokenizer), pre-trained from "
        "scratch by this kit (`make tiny-bases`). It exists so that every stage of the kit can be run in minutes on a CPU; "
        "it is a model of the phenomena, not of the world.", "",
        "| training tokens | Japanese | English |", "|---|---|---|",
        f"| {total:,} | {tokens['ja']:,} ({tokens['ja'] / total:.4f}) | {tokens['en']:,} ({tokens['en'] / total:.4f}) |", "",
        f"Passes over the text: {card['passes']['ja']} Japanese, {card['passes']['en']} English. "
        f"{base.chat_share:.0%} of the passages were written as one chat turn, so that the chat tokens are trained.", "",
        "| held-out bits per character | |", "|---|---|",
        f"| Japanese | {_bits(bits['ja'])} |", f"| English | {_bits(bits['en'])} |", "",
        "Text: public-domain works of Aozora Bunko (authors who died by 1945; annotations removed), English public-domain books and "
        "US presidential addresses, and the Rust book in Japanese and English (MIT OR Apache-2.0). See NOTICE in the repository. "
        "The literary text is from before 1946; some of it holds language now considered discriminatory.", "",
        "What it writes (temperature 0.8, top-p 0.95):", "",
        *(f"> {text.replace(chr(10), ' ')}\n" for text in samples.values()),
    ]
    return "\n".join(lines)
