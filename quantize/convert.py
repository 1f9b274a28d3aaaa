"""A Hugging Face checkpoint, with a LoRA adapter added as each tensor passes, as a GGUF file."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

from tsugiki.artifacts import atomic_path
from tsugiki.chat import end_of_turn_id
from tsugiki.errors import UserError, raise_problems
from tsugiki.licences import card_fields
from tsugiki.lineage import check_lineage
from tsugiki.progress import progress
from tsugiki.quantize.adapter import Adapter, Update, merger, read_adapter, read_adapter_config
from tsugiki.quantize.families import (
    EMBEDDINGS,
    OUTPUT,
    Tensor,
    expected_tensors,
    read_config,
    rope_freqs,
    write_settings,
)
from tsugiki.quantize.tokenizer import gguf_vocabulary
from tsugiki.quantize.weights import FLOATS, Stored, open_weights, same_values
from tsugiki.tokenizers import is_unigram_model, load_tokenizer

_TYPES = {
    "f16": (Kind.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (Kind.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "f32": (Kind.F32, gguf.LlamaFileType.ALL_F32),
}
_BYTES = {Kind.F16: 2, Kind.BF16: 2, Kind.F32: 4}
_LARGEST = {Kind.F16: float(np.finfo(np.float16).max), Kind.BF16: 3.3895e38, Kind.F32: float(np.finfo(np.float32).max)}
_BNB = re.compile(r"\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..*|SCB|weight_format)$")
CHUNK = 4 << 20  # values in memory at a time: 16 MB in float32, a few copies of it


@dataclass(frozen=True)
class ConvertReport:
    """What was written.

    Attributes:
        bytes: size of the file.
        tensors, parameters: of the model (a tied output counts once, rotary factors not).
        merged: tensors that the adapter changed.
        tied: whether the output layer is the embedding matrix.
        wide: tensors whose values ``dtype`` cannot hold, and the type that they were written in.
        tokenizer, pre: llama.cpp's tokenizer model and pre-tokenizer.
        eos, eot: ids of the end-of-text and end-of-turn tokens (None: the tokenizer has none).
        notes: what a reader should know, as sentences.
        seconds: wall time.
    """

    path: str
    architecture: str
    dtype: str
    bytes: int
    tensors: int
    parameters: int
    merged: int
    tied: bool
    tokenizer: str
    pre: str
    add_bos: bool
    eos: int | None
    eot: int | None
    seconds: float
    wide: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def convert(
    base_dir: Path | str,
    out: Path | str,
    adapter_dir: Path | str | None = None,
    *,
    dtype: str = "f16",
    name: str | None = None,
    licence: str | None = None,
    languages: Sequence[str] = (),
    base_model: str | None = None,
    datasets: Sequence[str] = (),
    tokenizer_dir: Path | str | None = None,
) -> ConvertReport:
    """Write base plus LoRA as one GGUF file; no merged checkpoint is written, a few rows are held at a time.

    The update is added in float32, then cast to ``dtype``; norms, biases and routers stay float32. A tensor with
    values that ``dtype`` cannot hold is written as bfloat16 (where the checkpoint is and no adapter changed it) or as
    float32, and named in the report.

    Args:
        base_dir: folder with ``config.json``, safetensors and a tokenizer.
        out: the file to write; whole or absent.
        adapter_dir: folder with ``adapter_config.json`` and ``adapter_model.safetensors`` of PEFT.
        dtype: ``f16``, ``bf16`` or ``f32``.
        name, licence, languages, base_model, datasets: metadata that people read; licence, languages and data sets
            from the base's model card where they are not given. A ``base_model`` of the form ``organisation/name`` is a
            repository on the hub.
        tokenizer_dir: another tokenizer (with its chat template) than the adapter's or the base's, of the same ids.

    Raises:
        UserError: unknown architecture, missing, damaged or quantized weights, an adapter for another base or of
            a kind that is not supported, NaN or infinite values, too little disk space.
    """
    started = time.perf_counter()
    base_dir, out = Path(base_dir), Path(out)
    qtype, file_type = _known_type(dtype)
    family, config, notes = read_config(base_dir)
    weights = open_weights(base_dir)
    tied = config.tie_word_embeddings
    shapes = source_shapes(expected_tensors(family, config))
    check_weights(base_dir, weights, shapes, tied=tied)
    adapter = _open_adapter(adapter_dir, base_dir, shapes, tied, notes, f"{name} {base_model}")
    tokenizer, told = model_tokenizer(base_dir, adapter_dir, tokenizer_dir)
    notes += told
    if adapter and adapter.rows:
        if adapter.rows > config.vocab_size and tokenizer_dir is None and tokenizer_folder(adapter_dir) is None:
            raise UserError(
                f"the adapter has {adapter.rows:,} tokens, the base {config.vocab_size:,}, and no tokenizer that has them lies beside it",
                where=str(adapter_dir), hint="Save it there (tokenizer.save_pretrained), or name its folder with --tokenizer.",
            )
        notes.append(f"the adapter's vocabulary has {adapter.rows:,} tokens, the base's {config.vocab_size:,}: embeddings and output layer are the adapter's")
        config.vocab_size = adapter.rows
    vocabulary = gguf_vocabulary(tokenizer, config.vocab_size)
    if adapter and adapter.unties:
        tied = False
        weights = weights | {OUTPUT: replace(weights[EMBEDDINGS], name=OUTPUT)}
        notes.append("the adapter changes embeddings and output layer, tied in the base, apart: both are written")
    tensors = expected_tensors(family, config, tied=tied)
    template = tokenizer.chat_template
    eot = end_of_turn_id(tokenizer) if template else None
    del tokenizer  # 200 MB for a vocabulary of 128,000, not needed while the tensors pass
    factors = rope_freqs(config)
    updates = adapter.updates if adapter else {}
    card = read_card(base_dir)
    wide: dict[str, Kind] = {}

    def describe(writer) -> None:
        writer.add_type("model")
        writer.add_file_type(file_type)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _write_general(writer, name or base_dir.name, licence or card.get("license"), languages or card.get("languages"), base_model,
                       datasets or card.get("datasets"))
        write_settings(writer, family, config, tensors)
        vocabulary.write(writer)
        if eot is not None:
            writer.add_eot_token_id(eot)
        if isinstance(template, str):
            writer.add_chat_template(template)

    with _writing(out), atomic_path(out) as temporary:
        while True:
            temporary.unlink(missing_ok=True)
            kinds = {t.name: wide.get(t.name, qtype if t.matrix else Kind.F32) for t in tensors}
            extra = {} if factors is None else {"rope_freqs.weight": factors}
            write_head(temporary, family.name, describe, tensors, kinds, extra)
            found = _write_body(temporary, tensors, kinds, extra, weights, updates)
            if not found:
                break
            wide |= found  # rare: the file is written again with these tensors in a wider type
        if wide:
            notes.append(f"{len(wide)} tensor(s) hold values beyond {_LARGEST[qtype]:.6g} and are written wider than {dtype}")
    return ConvertReport(
        path=str(out), architecture=family.name, dtype=dtype, bytes=out.stat().st_size,
        tensors=len(tensors), parameters=sum(prod(t.shape) for t in tensors), merged=len(updates),
        tied=tied, tokenizer=vocabulary.model, pre=vocabulary.pre, add_bos=vocabulary.add_bos,
        eos=vocabulary.special.get("eos"), eot=eot, seconds=time.perf_counter() - started,
        wide={k: v.name for k, v in wide.items()}, notes=notes,
    )


def convert_lora(base_dir: Path | str, out: Path | str, adapter_dir: Path | str, *, dtype: str = "f16", name: str | None = None) -> ConvertReport:
    """Write the adapter alone as a GGUF LoRA, for llama.cpp's ``--lora`` beside a GGUF of the base.

    llama.cpp multiplies every pair by ``adapter.lora.alpha`` over its rank: what an adapter scales otherwise (rslora,
    alpha patterns) is put into that number or into B.

    Args:
        base_dir: folder of the base; its weights are looked at, not read.
        out: the file to write; whole or absent.
        adapter_dir: folder of PEFT's files.

    Raises:
        UserError: as :func:`convert`, and for adapters that are more than low-rank updates (DoRA,
            ``modules_to_save``, tied embeddings): those can only be merged.
    """
    started = time.perf_counter()
    base_dir, out = Path(base_dir), Path(out)
    qtype, file_type = _known_type(dtype)
    family, config, notes = read_config(base_dir)
    weights, tied = open_weights(base_dir), config.tie_word_embeddings
    base = expected_tensors(family, config)
    check_weights(base_dir, weights, source_shapes(base), tied=tied)
    adapter = _open_adapter(adapter_dir, base_dir, source_shapes(base), tied, notes)
    problems = [f"{n}: DoRA scales the whole tensor" for n, u in adapter.updates.items() if u.magnitude]
    shared = [n for n in (EMBEDDINGS, OUTPUT) if tied and n in adapter.updates]
    problems += [f"{n} is tied in the base, llama.cpp has one tensor for both" for n in shared]
    problems += [
        f"{n} is replaced as a whole (modules_to_save)" for n, u in adapter.updates.items()
        # PEFT also saves the untouched table beside an update of embeddings
        if u.replacement and n not in shared and not (u.a and same_values(u.replacement, weights[n]))
    ]
    problems += [f"{n} has trained tokens (trainable_token_indices)" for n, u in adapter.updates.items() if u.token_rows and n not in shared]
    raise_problems(problems, what=f"{adapter.path}: no LoRA file can say this", hint="Merge it: leave out --lora-only.")
    first = next(iter(adapter.updates.values()))
    alpha = first.scale * first.rank
    arrays: dict[str, np.ndarray] = {}
    for tensor in base:
        pairs = [adapter.updates.get(s) for s in tensor.sources]
        if any(pairs):
            a, b = lora_pair(tensor, pairs, alpha)
            arrays |= {f"{tensor.name}.lora_a": a, f"{tensor.name}.lora_b": b}
    wide = {n: Kind.F32 for n, x in arrays.items() if _too_large(n, float(np.min(x)), float(np.max(x)), qtype)}
    tensors = [Tensor(n, x.shape, (n,)) for n, x in arrays.items()]
    kinds = {n: wide.get(n, qtype) for n in arrays}

    def describe(writer) -> None:
        writer.add_type("adapter")
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        writer.add_file_type(file_type)
        _write_general(writer, name or adapter.path.name, None, (), base_dir.name, ())

    with _writing(out), atomic_path(out) as temporary:
        write_head(temporary, family.name, describe, tensors, kinds, {})
        with temporary.open("ab") as file:
            for n, x in arrays.items():
                import torch

                _append(file, [_encode(torch.from_numpy(x), kinds[n])])
    return ConvertReport(
        path=str(out), architecture=family.name, dtype=dtype, bytes=out.stat().st_size, tensors=len(tensors),
        parameters=sum(x.size for x in arrays.values()), merged=len(adapter.updates), tied=tied, tokenizer="", pre="",
        add_bos=False, eos=None, eot=None, seconds=time.perf_counter() - started,
        wide={k: v.name for k, v in wide.items()}, notes=notes,
    )


def lora_pair(tensor: Tensor, updates: Sequence[Update | None], alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """A and B of one GGUF tensor, float32, as llama.cpp multiplies them: ``(r, in)`` and ``(out, r)``.

    Experts are stacked (one without an update is zero); of embeddings A is ``(vocabulary, r)``.

    Raises:
        UserError: experts of one layer with updates of different ranks.
    """
    import torch

    ranks = {u.rank for u in updates if u}
    if len(ranks) > 1:
        raise UserError(f"{tensor.name}: its experts' updates have the ranks {sorted(ranks)}; one rank is needed")
    (rank,) = ranks
    stacked = []
    for update in updates:
        if update is None:
            stacked.append((torch.zeros(rank, tensor.source_shape[1]), torch.zeros(tensor.source_shape[0], rank)))
            continue
        a, b = update.a.rows().to(torch.float32), update.b.rows().to(torch.float32) * (update.scale * rank / alpha)
        stacked.append((a.T.contiguous() if update.embedding else a, permute(b, tensor.heads)))
    if len(updates) == 1:
        return tuple(x.numpy() for x in stacked[0])
    return tuple(torch.stack(x).numpy() for x in zip(*stacked, strict=True))


# --- what goes in ---------------------------------------------------------------------------------------------


def _known_type(dtype: str):
    if dtype not in _TYPES:
        raise UserError(f"dtype {dtype!r} is not known", hint=f"Known: {', '.join(_TYPES)}.")
    return _TYPES[dtype]


def _open_adapter(adapter_dir: Path | str | None, base_dir: Path, shapes: Mapping, tied: bool, notes: list[str], known: str = "") -> Adapter | None:
    """The adapter, compared with its base: by the fingerprint beside it, else by the name that it gives, which is noted only."""
    if adapter_dir is None:
        return None
    adapter = read_adapter(Path(adapter_dir), shapes, tied)
    proven = check_lineage(adapter_dir, base_dir)
    named = str(read_adapter_config(Path(adapter_dir)).get("base_model_name_or_path") or "").rstrip("/").rpartition("/")[2]
    # a folder in the hub's cache has the name as models--organisation--name
    if not proven and named and named.lower() not in f"{base_dir.resolve()} {known}".lower():
        notes.append(f"the adapter says that its base is {named!r}, which this one is not called; their shapes agree, nothing else could be compared")
    return adapter


def read_tokenizer(folder: Path):
    """A folder's tokenizer, from its files alone.

    Raises:
        UserError: transformers cannot read it.
    """
    try:
        return load_tokenizer(folder)
    except Exception as error:
        raise UserError(
            f"transformers cannot read the tokenizer: {error}", where=str(folder),
            hint="The folder needs tokenizer.json (or tokenizer.model) and tokenizer_config.json.",
        ) from error


def tokenizer_folder(adapter_dir: Path | str | None) -> Path | None:
    """An adapter's folder, where a tokenizer lies beside the adapter (trainers save it there)."""
    folder = Path(adapter_dir) if adapter_dir is not None else None
    return folder if folder and any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")) else None


def model_tokenizer(base_dir: Path | str, adapter_dir: Path | str | None = None, tokenizer_dir: Path | str | None = None):
    """The tokenizer of an adapted model, and what a reader should know of it, as sentences.

    The one that is named, else the one beside the adapter (it may have tokens that the base's lacks), else the base's. One
    without a chat template takes the base's. Beside an adapter to a base whose ``tokenizer.model`` is Unigram transformers
    saves a BPE tokenizer, with other ids than the base has learned (:mod:`tsugiki.tokenizers`): the base's is taken then,
    with the tokens that were added to the other.

    Raises:
        UserError: transformers cannot read it, it gives the base's tokens other ids, or llama.cpp would find added tokens in
            other places.
    """
    base_dir, folder = Path(base_dir), Path(tokenizer_dir) if tokenizer_dir else tokenizer_folder(adapter_dir)
    if folder is None:
        return read_tokenizer(base_dir), [_UNIGRAM] if is_unigram_model(base_dir) else []
    tokenizer, notes = read_tokenizer(folder), [_UNIGRAM] if is_unigram_model(folder) else []
    if tokenizer_dir is None:
        notes.append(f"the tokenizer is the one beside the adapter ({len(tokenizer):,} tokens)")
    try:
        own = load_tokenizer(base_dir)
    except Exception:  # a base without a tokenizer: nothing to compare with
        return tokenizer, notes
    have, ids = tokenizer.get_vocab(), own.get_vocab()
    moved = [t for t, i in ids.items() if have.get(t, i) != i]
    lost = [t for t in ids if t not in have]
    if moved or 2 * len(lost) > len(ids):
        first = (moved or lost)[0]
        raise UserError(
            f"the tokenizer gives {len(moved):,} of the base's {len(ids):,} tokens another id and lacks {len(lost):,}: "
            f"{first!r} is {ids[first]} in the base, {have.get(first)} here", where=str(folder),
            hint="It belongs to another model. Remove it, or name the right one with --tokenizer.",
        )
    _refuse_normalized(tokenizer, ids, folder)
    if is_unigram_model(base_dir) and _kind(tokenizer) != "Unigram":
        added = [t for i, t in sorted(tokenizer.added_tokens_decoder.items()) if t.content not in ids]
        own.add_tokens(added)
        if wrong := [t.content for t in added if own.convert_tokens_to_ids(t.content) != have[t.content]]:
            raise UserError(f"the base's Unigram tokenizer has {len(ids):,} tokens, so that {wrong[0]!r} cannot get the id {have[wrong[0]]}",
                            where=str(folder), hint="Save the tokenizer as tsugiki.tokenizers.load_tokenizer reads it, with the tokens added.")
        own.chat_template = tokenizer.chat_template or own.chat_template
        return own, [_UNIGRAM, f"of the tokenizer beside the adapter, BPE, the {len(added)} added tokens are taken"]
    tokenizer.chat_template = tokenizer.chat_template or own.chat_template
    return tokenizer, notes


_UNIGRAM = "tokenizer.model is Unigram and is read as such; transformers alone reads many such files as BPE, with other ids"


def _refuse_normalized(tokenizer, known: Mapping[str, int], folder: Path) -> None:
    """Refuse added tokens that the tokenizer looks for in another form than written: ``▁`` before them, as in LLM-jp's, means that
    in Japanese text they are hardly ever found, while llama.cpp would find them everywhere."""
    normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    if normalizer is None:
        return
    added = [t for t in tokenizer.added_tokens_decoder.values() if t.content not in known and t.normalized and not t.special]
    forms = {t.content: form for t in added if (form := normalizer.normalize_str(t.content)) != t.content}
    if forms:
        first = next(iter(forms))
        raise UserError(
            f"the tokenizer's normalizer turns {len(forms)} of its added tokens into other text, {first!r} into {forms[first]!r}: it finds "
            "them only where a text has that, llama.cpp wherever it has the token", where=str(folder),
            hint="Add them as tokenizers.AddedToken(text, normalized=False), and train with that.",
        )


def _kind(tokenizer) -> str | None:
    return type(tokenizer.backend_tokenizer.model).__name__ if getattr(tokenizer, "is_fast", False) else None


def read_card(folder: Path) -> dict:
    """The settings at the head of a model card (README.md): ``license``, ``languages``, ``datasets``; empty where there are none."""
    card = card_fields(folder)

    def texts(key: str) -> list[str]:
        found = card.get(key)
        return [t for t in (found if isinstance(found, list) else [found]) if isinstance(t, str)]

    return {"license": next(iter(texts("license")), None), "languages": texts("language"), "datasets": texts("datasets")}


def source_shapes(tensors: Sequence[Tensor]) -> dict[str, tuple[int, ...]]:
    """The tensors that the checkpoint must have, with their shapes."""
    return {source: t.source_shape for t in tensors for source in t.sources}


def check_weights(base_dir: Path, weights: Mapping[str, Stored], shapes: Mapping[str, tuple[int, ...]], *, tied: bool) -> None:
    """Compare the tensors of a checkpoint with the expected ones, all problems at once.

    Raises:
        UserError: bitsandbytes-quantized weights; tensors missing, unexpected, misshapen, or no 16- or 32-bit floats.
    """
    bnb = [n for n in weights if _BNB.search(n)]
    if bnb:
        raise UserError(
            f"the weights are bitsandbytes-quantized ({len(bnb)} tensors such as {bnb[0]})", where=str(base_dir),
            hint="Convert from the full-precision checkpoint that the adapter was trained on.",
        )
    problems = [f"{n} is missing" for n in shapes if n not in weights]
    allowed = {OUTPUT} if tied else set()
    problems += [
        f"{n} is not expected" for n in weights
        if n not in shapes and n not in allowed and not n.endswith("rotary_emb.inv_freq")
    ]
    for n, shape in shapes.items():
        found = weights.get(n)
        if found is None:
            continue
        if found.shape != shape:
            problems.append(f"{n} has shape {found.shape}, the configuration says {shape}")
        elif found.dtype not in FLOATS:
            problems.append(f"{n} has type {found.dtype}; F32, F16 or BF16 is needed")
    raise_problems(problems, what=f"{base_dir}: the weights do not fit config.json")


# --- what comes out -------------------------------------------------------------------------------------------


@contextmanager
def _writing(out: Path):
    try:
        yield
    except OSError as error:
        raise UserError(
            f"could not be written: {error.strerror or error}", where=str(out),
            hint="Free some space, or write to another disk. What was there before is unchanged.",
        ) from error


def write_head(
    path: Path, architecture: str, describe: Callable, tensors: Sequence[Tensor], kinds: Mapping[str, Kind], extra: Mapping[str, np.ndarray]
) -> None:
    """Write everything before the tensors' data, padded to where the data begins.

    Raises:
        UserError: the disk has less room than the whole file needs.
    """
    writer = gguf.GGUFWriter(path, architecture)
    try:
        describe(writer)
        sizes = [(n, x.shape, Kind.F32) for n, x in extra.items()]
        sizes += [(t.name, t.shape, kinds[t.name]) for t in tensors]
        for name, shape, kind in sizes:
            writer.add_tensor_info(name, shape, np.dtype(np.float32), prod(shape) * _BYTES[kind], raw_dtype=kind)
        need = sum(prod(shape) * _BYTES[kind] for _, shape, kind in sizes)
        free = shutil.disk_usage(path.parent).free
        if free < need:
            raise UserError(
                f"the file needs {need / 1e6:,.0f} MB, the disk has {free / 1e6:,.0f} MB free", where=str(path.parent),
                hint="Free some space, or write to another disk.",
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.write_padding(writer.fout[0], writer.fout[0].tell())
    finally:
        writer.close()


def _write_body(
    path: Path, tensors: Sequence[Tensor], kinds: Mapping[str, Kind], extra: Mapping[str, np.ndarray],
    weights: Mapping[str, Stored], updates: Mapping[str, Update],
) -> dict[str, Kind]:
    """Append the tensors' data; returns the tensors that their type cannot hold, after which the file is worthless."""
    found: dict[str, Kind] = {}
    with progress() as bar, path.open("ab") as file:
        task = bar.add_task("convert", total=len(tensors), note="")
        for array in extra.values():
            _append(file, [array])
        for tensor in tensors:
            _append(file, _pieces(tensor, kinds[tensor.name], weights, updates, found))
            bar.advance(task)
    return found


def _pieces(tensor: Tensor, kind: Kind, weights: Mapping[str, Stored], updates: Mapping[str, Update], found: dict[str, Kind]):
    """The tensor's data, a few rows at a time; nothing more where a value was too large before."""
    import torch

    number = tensor.source_shape[0]
    unit = number // tensor.heads if tensor.heads else 1
    step = max(1, CHUNK // (unit * prod(tensor.source_shape[1:]))) * unit
    for source in tensor.sources:
        update = updates.get(source)
        rows_of = merger(update, weights[source], step) if update else weights[source].rows
        for start in range(0, number, step):
            rows = rows_of(start, min(start + step, number))
            low, high = (float(x) for x in torch.aminmax(rows))
            if _too_large(source, low, high, kind):
                exact = weights[source].dtype == "BF16" and update is None
                found[tensor.name] = Kind.BF16 if exact and found.get(tensor.name) is not Kind.F32 else Kind.F32
            if not found:
                yield _encode(permute(rows, tensor.heads, unit), kind)


def _append(file, pieces) -> None:
    """Write arrays one after the other and pad what they come to."""
    written = 0
    for piece in pieces:
        written += file.write(memoryview(np.ascontiguousarray(piece)).cast("B"))
    file.write(b"\0" * (-written % gguf.GGUF_DEFAULT_ALIGNMENT))


def permute(rows, heads: int, size: int = 0):
    """Reorder the rows of whole heads: row i and row i + half of each head become neighbours.

    Args:
        rows: ``(n · size, …)``.
        heads: 0 leaves the rows as they are.
        size: rows of a head; 0: all rows over ``heads``.
    """
    if not heads:
        return rows
    size = size or rows.shape[0] // heads
    halves = rows.reshape(rows.shape[0] // size, 2, size // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape).contiguous()


def _encode(rows, kind: Kind) -> np.ndarray:
    import torch

    if kind is Kind.BF16:
        return rows.to(torch.bfloat16).view(torch.int16).numpy()
    return rows.to(torch.float16 if kind is Kind.F16 else torch.float32).numpy()


def _too_large(name: str, low: float, high: float, kind: Kind) -> bool:
    """Whether values would become infinities.

    Raises:
        UserError: some already are, or are NaN.
    """
    if not (np.isfinite(low) and np.isfinite(high)):
        raise UserError(f"{name} holds NaN or infinite values", hint="The checkpoint or the adapter is damaged.")
    return max(-low, high) > _LARGEST[kind]


def _write_general(writer, name, licence, languages, base_model, datasets) -> None:
    writer.add_name(name)
    writer.add_quantized_by("tsugiki")
    if licence:
        writer.add_license(licence)
    if languages:
        writer.add_languages(list(languages))
    if base_model:
        writer.add_base_model_count(1)
        organisation, _, model = base_model.rpartition("/")
        writer.add_base_model_name(0, gguf.Metadata.id_to_title(model) if organisation else model)
        if organisation:
            writer.add_base_model_organization(0, gguf.Metadata.id_to_title(organisation))
            writer.add_base_model_repo_url(0, f"https://huggingface.co/{base_model}")
    if datasets:
        writer.add_dataset_count(len(datasets))
        for i, dataset in enumerate(datasets):
            writer.add_dataset_name(i, dataset)
