"""What differs between the architectures: their tensors, their shapes, and the settings that llama.cpp reads."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import gguf
import numpy as np

from tsugiki.errors import UserError, raise_problems


@dataclass(frozen=True)
class Family:
    """How an architecture is written.

    Attributes:
        architecture: llama.cpp's architecture.
        permute: llama.cpp rotates neighbouring rows of q and k, transformers rows half a head apart.
        qkv_bias: q, k and v have biases whatever the configuration says.
        qk_norm: each head of q and k is normalised.
        experts: the feed-forward part is a mixture.
        llama3_rope: llama.cpp reads scaled rotary frequencies (``rope_freqs``) for it.
    """

    architecture: gguf.MODEL_ARCH
    permute: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    experts: bool = False
    llama3_rope: bool = False

    @property
    def name(self) -> str:
        """llama.cpp's name of the architecture."""
        return gguf.MODEL_ARCH_NAMES[self.architecture]


# LLM-jp and Sarashina2.2 say LlamaForCausalLM, LLM-jp-4-32B-A3B says Qwen3MoeForCausalLM.
FAMILIES = {
    "LlamaForCausalLM": Family(gguf.MODEL_ARCH.LLAMA, permute=True, llama3_rope=True),
    "MistralForCausalLM": Family(gguf.MODEL_ARCH.LLAMA, permute=True, llama3_rope=True),
    "Qwen2ForCausalLM": Family(gguf.MODEL_ARCH.QWEN2, qkv_bias=True),
    "Qwen3ForCausalLM": Family(gguf.MODEL_ARCH.QWEN3, qk_norm=True),
    "Qwen3MoeForCausalLM": Family(gguf.MODEL_ARCH.QWEN3MOE, qk_norm=True, experts=True),
}
EMBEDDINGS, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
_YARN_BETAS = {"beta_fast": 32, "beta_slow": 1}
_ROPE = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class Tensor:
    """One tensor of the GGUF.

    Attributes:
        name: in the GGUF.
        shape: numpy's order, rows first.
        sources: names in the checkpoint; several are experts, stacked.
        heads: the rows of so many heads are reordered (0: as they are).
        matrix: written in the type that was asked for; norms, biases and routers stay float32.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    heads: int = 0
    matrix: bool = True

    @property
    def source_shape(self) -> tuple[int, ...]:
        """The shape of each source."""
        return self.shape[1:] if len(self.sources) > 1 or len(self.shape) > 2 else self.shape


def read_config(base_dir: Path) -> tuple[Family, object, list[str]]:
    """The base's family, its transformers configuration, and what llama.cpp will do differently, as sentences.

    Raises:
        UserError: no readable ``config.json``, an unknown architecture, quantized weights, or settings that
            llama.cpp has no equal for (all of them named).
    """
    from transformers import AutoConfig

    path = base_dir / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        architectures = raw.get("architectures") or [None]
    except FileNotFoundError:
        raise UserError("there is no config.json", where=str(base_dir), hint="Name the folder of a model.") from None
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"not a JSON object: {error}", where=str(path)) from None
    if architectures[0] not in FAMILIES:
        raise UserError(
            f"the architecture {architectures[0]} is not known", where=f"{path} (architectures)",
            hint=f"Known: {', '.join(FAMILIES)}.",
        )
    quantized = raw.get("quantization_config")
    if quantized:
        method = quantized.get("quant_method", "unknown") if isinstance(quantized, dict) else "unknown"
        raise UserError(
            f"the base's weights are quantized ({method})", where=f"{path} (quantization_config)",
            hint="Convert from the full-precision checkpoint that the adapter was trained on.",
        )
    try:
        config = AutoConfig.from_pretrained(base_dir, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever its validation raises
        raise UserError(f"transformers cannot read the configuration: {error}", where=str(path)) from error
    family = FAMILIES[architectures[0]]
    raise_problems(_unsupported(family, config), what=f"{path}: llama.cpp has no equal for this model")
    window = sliding_window(config)
    notes = []
    if window and window < config.max_position_embeddings:
        notes.append(
            f"attention slides over {window:,} tokens, llama.cpp's does not for {family.name}: "
            f"the context length is written as {window:,} instead of {config.max_position_embeddings:,}, where both are equal"
        )
    return family, config, notes


def _unsupported(family: Family, config) -> list[str]:
    """Settings under which the file would be another model."""
    rope = config.rope_parameters or {}
    kind = rope.get("rope_type", "default")
    problems = []
    if kind not in _ROPE:
        problems.append(f"RoPE scaling {kind!r} (known: {', '.join(_ROPE)})")
    if kind == "llama3" and not family.llama3_rope:
        problems.append(f"RoPE scaling 'llama3' in the architecture {family.name}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        problems.append(f"rotation of a part of each head (partial_rotary_factor {rope['partial_rotary_factor']})")
    if kind == "yarn" and rope.get("truncate", True) is False:
        problems.append("YaRN without truncation (rope_parameters.truncate false)")
    for key, usual in _YARN_BETAS.items():
        if kind == "yarn" and (rope.get(key) or usual) != usual:
            problems.append(f"YaRN with {key} {rope[key]} (llama.cpp reads none for {family.name} and takes {usual})")
    if config.hidden_act != "silu":
        problems.append(f"the activation {config.hidden_act!r} (known: silu)")
    if getattr(config, "attention_bias", False) and family.architecture not in (gguf.MODEL_ARCH.LLAMA, gguf.MODEL_ARCH.QWEN2):
        problems.append(f"attention biases in the architecture {family.name}")
    if family.experts:
        if not config.norm_topk_prob:
            problems.append("expert weights that are not normalised (norm_topk_prob false)")
        dense = config.mlp_only_layers or config.decoder_sparse_step != 1
        if dense:
            problems.append(f"dense layers among the mixtures (mlp_only_layers {config.mlp_only_layers}, decoder_sparse_step {config.decoder_sparse_step})")
    return problems


def head_dim(config) -> int:
    """Columns of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def sliding_window(config) -> int | None:
    """Tokens that attention reaches back, where it is limited."""
    if not getattr(config, "use_sliding_window", True):
        return None
    return getattr(config, "sliding_window", None)


def expected_tensors(family: Family, config, *, tied: bool | None = None) -> list[Tensor]:
    """The tensors of a model of this configuration, in the order they are written.

    Args:
        tied: whether the output layer is the embedding matrix; None as the configuration says.
    """
    width, head, heads, kv_heads = config.hidden_size, head_dim(config), config.num_attention_heads, config.num_key_value_heads
    q, kv, layers = heads * head, kv_heads * head, config.num_hidden_layers
    names = gguf.get_tensor_name_map(family.architecture, layers)
    found: list[Tensor] = []

    def add(source: str, shape: tuple[int, ...], **settings) -> None:
        name = names.get_name(source, try_suffixes=(".weight", ".bias"))
        found.append(Tensor(name, shape, settings.pop("sources", (source,)), matrix=settings.pop("matrix", len(shape) > 1), **settings))

    add(EMBEDDINGS, (config.vocab_size, width))
    attention_bias = getattr(config, "attention_bias", False)
    for i in range(layers):
        layer = f"model.layers.{i}"
        add(f"{layer}.input_layernorm.weight", (width,))
        for letter, rows in (("q", q), ("k", kv), ("v", kv)):
            turned = (heads if letter == "q" else kv_heads) if family.permute and letter != "v" else 0
            add(f"{layer}.self_attn.{letter}_proj.weight", (rows, width), heads=turned)
            if family.qkv_bias or attention_bias:
                add(f"{layer}.self_attn.{letter}_proj.bias", (rows,), heads=turned)
        if family.qk_norm:
            add(f"{layer}.self_attn.q_norm.weight", (head,))
            add(f"{layer}.self_attn.k_norm.weight", (head,))
        add(f"{layer}.self_attn.o_proj.weight", (width, q))
        if attention_bias and not family.qkv_bias:
            add(f"{layer}.self_attn.o_proj.bias", (width,))
        add(f"{layer}.post_attention_layernorm.weight", (width,))
        if family.experts:
            ffn, number = config.moe_intermediate_size, config.num_experts
            add(f"{layer}.mlp.gate.weight", (number, width), matrix=False)
        else:
            ffn, number = config.intermediate_size, 0
        for part, shape in (("gate", (ffn, width)), ("up", (ffn, width)), ("down", (width, ffn))):
            if number:
                sources = tuple(f"{layer}.mlp.experts.{e}.{part}_proj.weight" for e in range(number))
                add(f"{layer}.mlp.experts.{part}_proj.weight", (number, *shape), sources=sources)
                continue
            add(f"{layer}.mlp.{part}_proj.weight", shape)
            if getattr(config, "mlp_bias", False):
                add(f"{layer}.mlp.{part}_proj.bias", shape[:1])
    add("model.norm.weight", (width,))
    if not (config.tie_word_embeddings if tied is None else tied):
        add(OUTPUT, (config.vocab_size, width))
    return found


def rope_freqs(config) -> np.ndarray | None:
    """What llama.cpp divides the rotary frequencies by, float32 ``(head_dim/2,)``; None without Llama-3.1's scaling.

    The formula of Llama 3.1: frequencies whose wavelength exceeds the original context over ``low_freq_factor`` are
    divided by ``factor``, those below it over ``high_freq_factor`` stay, and between the two it is interpolated.
    """
    rope = config.rope_parameters or {}
    if rope.get("rope_type", "default") != "llama3":
        return None
    size = head_dim(config)
    frequency = rope["rope_theta"] ** -(np.arange(0, size, 2, dtype=np.float64) / size)
    turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)  # in the original context
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


def write_settings(writer, family: Family, config, tensors: Sequence[Tensor]) -> None:
    """Put what llama.cpp needs to run the model into a :class:`gguf.GGUFWriter`."""
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(min(config.max_position_embeddings, sliding_window(config) or config.max_position_embeddings))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim(config))
    if family.experts:
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    total, experts = sum(prod(t.shape) for t in tensors), sum(prod(t.shape) for t in tensors if len(t.sources) > 1)
    number = config.num_experts if family.experts else 0
    writer.add_size_label(gguf.size_label(total, total - experts, experts // max(1, number), number))
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType[kind.upper()])
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        _write_yarn(writer, config)


def _write_yarn(writer, config) -> None:
    """YaRN's settings. llama.cpp itself multiplies by ``1 + 0.1 ln(factor)``: only what differs from it is written."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = config.rope_parameters
    writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    _, factor = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    usual = 1 + 0.1 * math.log(rope["factor"])
    if not math.isclose(factor, usual, rel_tol=1e-6):
        writer.add_rope_scaling_attn_factors(factor / usual)
