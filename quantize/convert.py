"""A Hugging Face checkpoint, with a LoRA adapter added as each tensor passes, as a GGUF file."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod, sqrt
from pathlib import Path

import gguf
import numpy as np

from tsugiki.artifacts import atomic_path
from tsugiki.chat import end_of_turn_id
from tsugiki.errors import UserError, raise_problems
from tsugiki.progress import progress
from tsugiki.quantize.tokenizer import gguf_vocabulary


@dataclass(frozen=True)
class Family:
    """What differs between the architectures.

    Attributes:
        architecture: llama.cpp's architecture.
        permute: llama.cpp rotates neighbouring rows of q and k, transformers rows half a head apart.
        qkv_bias: q, k and v have biases whatever the configuration says.
    """

    architecture: gguf.MODEL_ARCH
    permute: bool
    qkv_bias: bool = False


FAMILIES = {
    "LlamaForCausalLM": Family(gguf.MODEL_ARCH.LLAMA, permute=True),
    "Qwen2ForCausalLM": Family(gguf.MODEL_ARCH.QWEN2, permute=False, qkv_bias=True),
}
_TYPES = {
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
}
_LARGEST = {"f16": float(np.finfo(np.float16).max), "bf16": 3.3895e38, "f32": float(np.finfo(np.float32).max)}
_BNB = re.compile(r"\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..*|SCB|weight_format)$")


@dataclass(frozen=True)
class ConvertReport:
    """What was written.

    Attributes:
        bytes: size of the file.
        tensors, parameters: of the model (a tied output counts once).
        merged: tensors that the adapter changed.
        tied: whether the output layer is the embedding matrix.
        tokenizer, pre: llama.cpp's tokenizer model and pre-tokenizer.
        eos, eot: ids of the end-of-text and end-of-turn tokens (None: the tokenizer has none).
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


def convert(
    base_dir: Path | str,
    out: Path | str,
    adapter_dir: Path | str | None = None,
    *,
    dtype: str = "f16",
    name: str | None = None,
    licence: str | None = None,
    languages: Sequence[str] = ("ja", "en"),
    base_model: str | None = None,
) -> ConvertReport:
    """Write base plus LoRA as one GGUF file; no merged checkpoint is written, and one tensor is held at a time.

    The update is added in float32, then cast to ``dtype``; norms and biases stay float32.

    Args:
        base_dir: folder with ``config.json``, safetensors and ``tokenizer.json``.
        out: the file to write; whole or absent.
        adapter_dir: folder with ``adapter_config.json`` and ``adapter_model.safetensors`` of PEFT.
        dtype: ``f16``, ``bf16`` or ``f32``.
        name, licence, languages, base_model: metadata that people read.

    Raises:
        UserError: unknown architecture, missing, damaged or quantized weights, an adapter for another base or of
            a kind that is not supported, or values that ``dtype`` cannot hold.
    """
    started = time.perf_counter()
    base_dir, out = Path(base_dir), Path(out)
    if dtype not in _TYPES:
        raise UserError(f"dtype {dtype!r} is not known", hint=f"Known: {', '.join(_TYPES)}.")
    family, config = read_config(base_dir)
    tokenizer = read_tokenizer(base_dir)
    vocabulary = gguf_vocabulary(tokenizer, config.vocab_size)
    shapes = expected_tensors(family, config)
    with ExitStack() as stack:
        weights = open_weights(base_dir, stack)
        check_weights(base_dir, weights, shapes, tied=config.tie_word_embeddings)
        adapter = read_adapter(Path(adapter_dir), shapes, config.tie_word_embeddings) if adapter_dir else {}
        names = gguf.get_tensor_name_map(family.architecture, config.num_hidden_layers)
        qtype, file_type = _TYPES[dtype]
        eot = end_of_turn_id(tokenizer) if tokenizer.chat_template else None
        with atomic_path(out) as temporary:
            writer = gguf.GGUFWriter(temporary, gguf.MODEL_ARCH_NAMES[family.architecture])
            try:
                _write_metadata(writer, config, file_type, name or base_dir.name, licence, languages, base_model)
                vocabulary.write(writer)
                if eot is not None:
                    writer.add_eot_token_id(eot)
                if isinstance(tokenizer.chat_template, str):
                    writer.add_chat_template(tokenizer.chat_template)
                for tensor, shape in shapes.items():
                    as_type = qtype if len(shape) > 1 else gguf.GGMLQuantizationType.F32
                    block, size = gguf.GGML_QUANT_SIZES[as_type]
                    writer.add_tensor_info(
                        names.get_name(tensor, try_suffixes=(".weight", ".bias")), shape, np.dtype(np.float32),
                        prod(shape) // block * size, raw_dtype=as_type,
                    )
                writer.write_header_to_file()
                writer.write_kv_data_to_file()
                writer.write_ti_data_to_file()
                with progress() as bar:
                    task = bar.add_task("convert", total=len(shapes), note="")
                    for tensor, shape in shapes.items():
                        array = read_tensor(weights[tensor], tensor)
                        if tensor in adapter:
                            array = array + adapter[tensor].update()
                        if family.permute:
                            array = permute(array, tensor, config)
                        check_range(array, tensor, dtype if len(shape) > 1 else "f32")
                        as_type = qtype if len(shape) > 1 else gguf.GGMLQuantizationType.F32
                        writer.write_tensor_data(gguf.quants.quantize(array, as_type))
                        bar.advance(task)
            finally:
                writer.close()
    return ConvertReport(
        path=str(out), architecture=gguf.MODEL_ARCH_NAMES[family.architecture], dtype=dtype, bytes=out.stat().st_size,
        tensors=len(shapes), parameters=sum(map(prod, shapes.values())), merged=len(adapter),
        tied=config.tie_word_embeddings, tokenizer=vocabulary.model, pre=vocabulary.pre, add_bos=vocabulary.add_bos,
        eos=vocabulary.special.get("eos"), eot=eot, seconds=time.perf_counter() - started,
    )


# --- the base -------------------------------------------------------------------------------------------------


def read_config(base_dir: Path) -> tuple[Family, object]:
    """The base's family and its transformers configuration.

    Raises:
        UserError: no readable ``config.json``, an unknown architecture, quantized weights, or scaled RoPE.
    """
    from transformers import AutoConfig

    path = base_dir / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError("there is no config.json", where=str(base_dir), hint="Name the folder of a model.") from None
    except ValueError as error:
        raise UserError(f"not a JSON file: {error}", where=str(path)) from None
    architectures = raw.get("architectures") or [None]
    if architectures[0] not in FAMILIES:
        raise UserError(
            f"the architecture {architectures[0]} is not known", where=f"{path} (architectures)",
            hint=f"Known: {', '.join(FAMILIES)}.",
        )
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method", "unknown")
        raise UserError(
            f"the base's weights are quantized ({method})", where=f"{path} (quantization_config)",
            hint="Convert from the full-precision checkpoint that the adapter was trained on.",
        )
    try:
        config = AutoConfig.from_pretrained(base_dir, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise UserError(f"transformers cannot read the configuration: {error}", where=str(path)) from error
    rope = config.rope_parameters or {}
    if rope.get("rope_type", "default") != "default":
        raise UserError(
            f"RoPE scaling {rope['rope_type']!r} is not supported yet", where=f"{path} (rope_parameters)",
            hint="Supported: default.",
        )
    return FAMILIES[architectures[0]], config


def read_tokenizer(base_dir: Path):
    """The base's tokenizer, from the folder alone."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(base_dir, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise UserError(
            f"transformers cannot read the tokenizer: {error}", where=str(base_dir),
            hint="The folder needs tokenizer.json and tokenizer_config.json.",
        ) from error


def head_dim(config) -> int:
    """Columns of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def expected_tensors(family: Family, config) -> dict[str, tuple[int, ...]]:
    """The tensors that a model of this configuration has, in the order they are written, with their shapes."""
    width, ffn, head = config.hidden_size, config.intermediate_size, head_dim(config)
    q, kv = config.num_attention_heads * head, config.num_key_value_heads * head
    attention_bias = family.qkv_bias or getattr(config, "attention_bias", False)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, width)}
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        shapes[f"{layer}.input_layernorm.weight"] = (width,)
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = (rows, width)
            if attention_bias:
                shapes[f"{layer}.self_attn.{name}_proj.bias"] = (rows,)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (width, q)
        if getattr(config, "attention_bias", False) and not family.qkv_bias:
            shapes[f"{layer}.self_attn.o_proj.bias"] = (width,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (width,)
        for name, shape in (("gate", (ffn, width)), ("up", (ffn, width)), ("down", (width, ffn))):
            shapes[f"{layer}.mlp.{name}_proj.weight"] = shape
            if getattr(config, "mlp_bias", False):
                shapes[f"{layer}.mlp.{name}_proj.bias"] = shape[:1]
    shapes["model.norm.weight"] = (width,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, width)
    return shapes


def open_weights(base_dir: Path, stack: ExitStack) -> dict[str, object]:
    """Open all safetensors files of a checkpoint; returns which open file holds each tensor.

    Raises:
        UserError: no safetensors file, a file that the index names but is missing, or a damaged one.
    """
    index = base_dir / "model.safetensors.index.json"
    if index.exists():
        try:
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise UserError(f"not a safetensors index: {error!r}", where=str(index)) from None
    else:
        files = ["model.safetensors"]
    missing = [f for f in files if not (base_dir / f).is_file()]
    raise_problems(
        [f"{base_dir / f} is missing" for f in missing], what="weights",
        hint="The kit reads safetensors only: model.safetensors, or shards with model.safetensors.index.json.",
    )
    weights: dict[str, object] = {}
    for name in files:
        file = open_safetensors(base_dir / name, stack)
        weights |= dict.fromkeys(file.keys(), file)
    return weights


def open_safetensors(path: Path, stack: ExitStack):
    """Open one safetensors file; a damaged one raises :class:`UserError`."""
    from safetensors import SafetensorError, safe_open

    try:
        return stack.enter_context(safe_open(path, framework="pt"))
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"not a whole safetensors file: {error}", where=str(path), hint="Copy or download the file again."
        ) from None


def check_weights(base_dir: Path, weights: dict, shapes: dict[str, tuple[int, ...]], *, tied: bool) -> None:
    """Compare the tensors of a checkpoint with the expected ones, all problems at once."""
    bnb = [n for n in weights if _BNB.search(n)]
    if bnb:
        raise UserError(
            f"the weights are bitsandbytes-quantized ({len(bnb)} tensors such as {bnb[0]})", where=str(base_dir),
            hint="Convert from the full-precision checkpoint that the adapter was trained on.",
        )
    problems = [f"{n} is missing" for n in shapes if n not in weights]
    allowed = {"lm_head.weight"} if tied else set()
    problems += [
        f"{n} is not expected" for n in weights
        if n not in shapes and n not in allowed and not n.endswith("rotary_emb.inv_freq")
    ]
    for n, shape in shapes.items():
        if n not in weights:
            continue
        found = weights[n].get_slice(n)
        if tuple(found.get_shape()) != shape:
            problems.append(f"{n} has shape {tuple(found.get_shape())}, the configuration says {shape}")
        elif found.get_dtype() not in ("F32", "F16", "BF16"):
            problems.append(f"{n} has type {found.get_dtype()}; F32, F16 or BF16 is needed")
    raise_problems(problems, what=f"{base_dir}: the weights do not fit config.json")


def read_tensor(file, name: str) -> np.ndarray:
    """One tensor of an open safetensors file, float32."""
    import torch

    return file.get_tensor(name).to(torch.float32).numpy()


def permute(array: np.ndarray, name: str, config) -> np.ndarray:
    """Reorder the rows of q and k: row i and row i + head/2 of each head become neighbours."""
    match = re.search(r"\.self_attn\.([qk])_proj\.(weight|bias)$", name)
    if not match:
        return array
    heads = config.num_attention_heads if match[1] == "q" else config.num_key_value_heads
    halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(array.shape)


def check_range(array: np.ndarray, name: str, dtype: str) -> None:
    """Refuse values that would become infinities, and such that already are."""
    largest = float(np.max(np.abs(array)))
    if not np.isfinite(largest):
        raise UserError(f"{name} holds NaN or infinite values", hint="The checkpoint or the adapter is damaged.")
    if largest > _LARGEST[dtype]:
        raise UserError(
            f"{name} holds values up to {largest:.6g}, {dtype} ends at {_LARGEST[dtype]:.6g}",
            hint="Convert with dtype bf16 or f32.",
        )


# --- the adapter ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LoraUpdate:
    """``scale · B A`` of one tensor: B ``(out, r)``, A ``(r, in)``, float32."""

    a: np.ndarray
    b: np.ndarray
    scale: float

    def update(self) -> np.ndarray:
        """The update ``(out, in)``."""
        return (self.b @ self.a) * np.float32(self.scale)


def read_adapter(folder: Path, shapes: dict[str, tuple[int, ...]], tied: bool) -> dict[str, LoraUpdate]:
    """Read a PEFT LoRA adapter; keys are the base's tensor names.

    Raises:
        UserError: not a LoRA adapter, a kind of LoRA that is not supported, or one for another base.
    """
    config_path, path = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError("there is no adapter_config.json", where=str(folder), hint="Name a PEFT adapter's folder.") from None
    except ValueError as error:
        raise UserError(f"not a JSON file: {error}", where=str(config_path)) from None
    unsupported = {
        f"peft_type {config.get('peft_type')}": config.get("peft_type") != "LORA",
        "DoRA (use_dora)": config.get("use_dora"),
        f"modules_to_save {config.get('modules_to_save')}": config.get("modules_to_save"),
        "trained biases": config.get("bias", "none") != "none" or config.get("lora_bias"),
        "fan_in_fan_out": config.get("fan_in_fan_out"),
        "QALoRA": config.get("use_qalora"),
        "trainable_token_indices": config.get("trainable_token_indices"),
    }
    raise_problems(
        [f"{what} is not supported" for what, there in unsupported.items() if there],
        what=str(config_path), hint="Supported: LoRA on linear layers (rslora, alpha and rank patterns).",
    )
    problems, pairs = [], {}
    with ExitStack() as stack:
        file = open_safetensors(path, stack)
        for key in file.keys():  # noqa: SIM118 - safe_open is not a mapping
            match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key)
            if not match:
                problems.append(f"{key} is not a LoRA matrix of a linear layer")
                continue
            pairs.setdefault(match[1], {})[match[2]] = read_tensor(file, key)
    updates = {}
    for module, pair in pairs.items():
        name = f"{module}.weight"
        if set(pair) != {"A", "B"}:
            problems.append(f"{module} has lora_{min(pair)} only")
            continue
        a, b = pair["A"], pair["B"]
        rank = _pattern(config.get("rank_pattern"), module, config["r"])
        alpha = _pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
        update = (b.shape[0], a.shape[1])
        if name not in shapes:
            tie = " (it is tied to the embeddings)" if tied and module == "lm_head" else ""
            problems.append(f"the base has no {name}{tie}")
        elif len(shapes[name]) != 2 or "embed_tokens" in name:
            problems.append(f"{name} is not a linear layer")
        elif update != shapes[name]:
            problems.append(f"{name}: the adapter's update is {update}, the base's tensor {shapes[name]}")
        elif not a.shape[0] == b.shape[1] == rank:
            problems.append(f"{module}: ranks {a.shape[0]} (A), {b.shape[1]} (B) and {rank} (adapter_config.json) differ")
        else:
            updates[name] = LoraUpdate(a, b, alpha / (sqrt(rank) if config.get("use_rslora") else rank))
    raise_problems(
        problems, what=f"{path}: the adapter does not fit the base",
        hint=f"It was trained on {config.get('base_model_name_or_path')!r}.",
    )
    if not updates:
        raise UserError("the adapter holds no weights", where=str(path))
    return updates


def _pattern(patterns: dict | None, module: str, default: float) -> float:
    """PEFT's rule: the first pattern that matches the end of the module's name, as a regular expression."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


# --- metadata -------------------------------------------------------------------------------------------------


def _write_metadata(writer, config, file_type, name, licence, languages, base_model) -> None:
    writer.add_type("model")
    writer.add_name(name)
    writer.add_quantized_by("tsugiki")
    writer.add_file_type(file_type)
    if licence:
        writer.add_license(licence)
    if languages:
        writer.add_languages(list(languages))
    if base_model:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, base_model)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim(config))
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
