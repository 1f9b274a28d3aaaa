"""A PEFT LoRA adapter: what it does to each tensor of its base, rows at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import sqrt
from pathlib import Path

from tsugiki.errors import UserError, raise_problems
from tsugiki.quantize.families import EMBEDDINGS, OUTPUT
from tsugiki.quantize.weights import FLOATS, Stored, read_header

_KEY = re.compile(
    r"base_model\.model\.(?P<module>.+?)\.(?:"
    r"lora_(?P<side>[AB])\.weight|lora_embedding_(?P<table>[AB])|lora_magnitude_vector(?:\.weight)?(?P<magnitude>)"
    r"|(?:modules_to_save\.|base_layer\.)?weight(?P<whole>))"
)

# Beginnings of PEFT's init_lora_weights that take something away from the base's weights before training.
_CHANGES_BASE = {"pissa": "PiSSA", "olora": "OLoRA", "corda": "CorDA", "loftq": "LoftQ", "lora_ga": "LoRA-GA"}


@dataclass(frozen=True)
class Update:
    """What the adapter does to one tensor W ``(out, in)``.

    Attributes:
        scale: alpha over rank, or over its root (rslora).
        a, b: A ``(r, in)`` and B ``(out, r)``, the update is ``scale · B A``; of embeddings A ``(r, out)`` and
            B ``(in, r)``, the update is ``scale · (B A)ᵀ``. None: no low-rank part.
        magnitude: DoRA's vector: ``(out,)``, of embeddings ``(in,)``.
        replacement: a whole trained tensor (``modules_to_save``) in place of the base's.
        embedding: the transposed form of embeddings.
    """

    scale: float = 0.0
    a: Stored | None = None
    b: Stored | None = None
    magnitude: Stored | None = None
    replacement: Stored | None = None
    embedding: bool = False

    @property
    def rank(self) -> int:
        return self.a.shape[0] if self.a else 0


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter that fits its base.

    Attributes:
        updates: the base's tensor name to what is done to it.
        keeps_ties: embeddings and output layer were trained as one tensor (PEFT's ``ensure_weight_tying``).
        alpha: ``lora_alpha`` of the configuration.
    """

    path: Path
    updates: dict[str, Update]
    keeps_ties: bool
    alpha: float

    def unties(self, tied: bool) -> bool:
        """Whether embeddings and output layer, tied in the base, differ in the adapted model.

        PEFT adds an update to one of the two only: the model that was trained has an output layer of its own. (PEFT's
        merge_and_unload writes into the shared tensor, and so changes both; that is not the model that was trained.)
        """
        return tied and not self.keeps_ties and bool({EMBEDDINGS, OUTPUT} & set(self.updates))


def read_adapter(folder: Path, shapes: Mapping[str, tuple[int, ...]], tied: bool) -> Adapter:
    """Read a PEFT LoRA adapter; its matrices are read when they are needed.

    Args:
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.
        shapes: the base's tensors.
        tied: whether the base's output layer is its embedding matrix.

    Raises:
        UserError: not a LoRA adapter, a kind of LoRA that is not supported, or one for another base.
    """
    config, path = read_adapter_config(folder), folder / "adapter_model.safetensors"
    if not path.is_file() and (folder / "adapter_model.bin").is_file():
        raise UserError(
            "the adapter is a pickle (adapter_model.bin), which can run code when it is opened", where=str(folder),
            hint="Save it again with PEFT's save_pretrained: safetensors only.",
        )
    problems, parts, whole = [], {}, {}
    for key, stored in read_header(path).items():
        match = _KEY.fullmatch(key)
        if not match:
            what = "a trained bias" if key.endswith(".bias") else "no LoRA matrix of a layer that is known here"
            problems.append(f"{key} is {what}")
        elif stored.dtype not in FLOATS:
            problems.append(f"{key} has type {stored.dtype}; F32, F16 or BF16 is needed")
        elif match["whole"] is not None:
            whole[f"{match['module']}.weight"] = stored
        else:
            kind = f"lora_{match['side']}" if match["side"] else f"lora_embedding_{match['table']}" if match["table"] else "magnitude"
            parts.setdefault(match["module"], {})[kind] = stored
    shapes = dict(shapes)
    if tied and EMBEDDINGS in shapes:
        shapes[OUTPUT] = shapes[EMBEDDINGS]
    keeps_ties = bool(config.get("ensure_weight_tying")) and tied
    updates: dict[str, Update] = {}
    for module, found in parts.items():
        if keeps_ties and module == "lm_head":
            continue  # the same matrices as the embeddings', transposed
        update = _update(module, found, config, shapes, problems)
        if update:
            updates[f"{module}.weight"] = update
    for name, stored in whole.items():
        if keeps_ties and name == OUTPUT:
            continue
        if name not in shapes:
            problems.append(f"the base has no {name}")
        elif stored.shape != shapes[name]:
            problems.append(f"{name}: the adapter's tensor is {stored.shape}, the base's {shapes[name]}")
        else:
            updates[name] = Update(**{**vars(updates.get(name, Update())), "replacement": stored})
    hint = f"It was trained on {config.get('base_model_name_or_path')!r}."
    rows = {n: u for n, u in _rows_of(parts, whole).items() if n in shapes and u != shapes[n][0]}
    if rows:  # the tokenizer was extended, which resizes both
        hint += (f" Its vocabulary has {max(rows.values()):,} tokens, the base's {shapes[next(iter(rows))][0]:,}: give the base the same size "
                 "first (resize_token_embeddings(…), save_pretrained), and convert with that.")
    raise_problems(problems, what=f"{path}: the adapter does not fit the base", hint=hint)
    if not updates:
        raise UserError("the adapter holds no weights", where=str(path))
    return Adapter(folder, updates, keeps_ties, float(config["lora_alpha"]))


def _rows_of(parts: Mapping[str, Mapping[str, Stored]], whole: Mapping[str, Stored]) -> dict[str, int]:
    """Rows that the adapter takes embeddings and output layer to have."""
    found = {n: s.shape[0] for n, s in whole.items() if n in (EMBEDDINGS, OUTPUT)}
    for name in (EMBEDDINGS, OUTPUT):
        part = parts.get(name.removesuffix(".weight"), {})
        if "lora_embedding_A" in part:
            found[name] = part["lora_embedding_A"].shape[-1]
        elif "lora_B" in part:
            found[name] = part["lora_B"].shape[0]
    return found


def read_adapter_config(folder: Path) -> dict:
    """An adapter's ``adapter_config.json``, where it is a kind of LoRA that can be merged.

    Raises:
        UserError: there is none, it is damaged, or names what is not supported.
    """
    path = folder / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError("there is no adapter_config.json", where=str(folder), hint="Name a PEFT adapter's folder.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"not a JSON file: {error}", where=str(path)) from None
    if not isinstance(config, dict):
        raise UserError("not a JSON object", where=str(path))
    start = str(config.get("init_lora_weights")).lower()
    if name := next((n for n in _CHANGES_BASE if start.startswith(n)), None):
        raise UserError(
            f"init_lora_weights is {config['init_lora_weights']!r}: {_CHANGES_BASE[name]} changed the base before training, so the "
            "adapter does not fit the base as it was", where=str(path),
            hint="Train from another initialisation." if name == "loftq" else
            "Save it as a plain LoRA: PEFT's save_pretrained with path_initial_model_for_weight_conversion.",
        )
    unsupported = {
        f"peft_type {config.get('peft_type')}": config.get("peft_type") != "LORA",
        f"trained biases (bias {config.get('bias')!r})": config.get("bias", "none") != "none",
        "trained biases (lora_bias)": config.get("lora_bias"),
        "fan_in_fan_out": config.get("fan_in_fan_out"),
        "QALoRA": config.get("use_qalora"),
        "aLoRA (it changes the model from an invocation on)": config.get("alora_invocation_tokens"),
        "LoRA on fused experts (target_parameters)": config.get("target_parameters"),
        "trainable_token_indices": config.get("trainable_token_indices"),
        "KaSA (it changes the base)": config.get("kasa_config"),
        "BD-LoRA (block-diagonal matrices)": config.get("use_bdlora"),
        "Arrow (it routes among adapters)": config.get("arrow_config"),
        "layers copied by layer_replication": config.get("layer_replication"),
    }
    raise_problems(
        [f"{what} is not supported" for what, there in unsupported.items() if there],
        what=str(path), hint="Supported: LoRA and DoRA on linear layers and embeddings (rslora, alpha and rank patterns, modules_to_save).",
    )
    wrong = [
        f"{k} is {config.get(k)!r}, not a positive number"
        for k in ("r", "lora_alpha") if not isinstance(config.get(k), int | float) or config[k] <= 0
    ]
    raise_problems(wrong, what=str(path))
    return config


def _update(module: str, found: dict[str, Stored], config: dict, shapes: dict, problems: list[str]) -> Update | None:
    name = f"{module}.weight"
    embedding = "lora_embedding_A" in found or "lora_embedding_B" in found
    prefix = "lora_embedding_" if embedding else "lora_"
    a, b = found.get(prefix + "A"), found.get(prefix + "B")
    if a is None or b is None:
        problems.append(f"{module} has {min(found)} only")
        return None
    if len(a.shape) != 2 or len(b.shape) != 2:
        problems.append(f"{module}: A {a.shape} and B {b.shape} are no matrices")
        return None
    rank = _pattern(config.get("rank_pattern"), module, config["r"])
    alpha = _pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    update = (a.shape[1], b.shape[0]) if embedding else (b.shape[0], a.shape[1])
    magnitude = found.get("magnitude")
    if name not in shapes:
        problems.append(f"the base has no {name}")
    elif len(shapes[name]) != 2 or embedding != (name == EMBEDDINGS):
        problems.append(f"{name} is not a linear layer" if not embedding else f"{name} is no table of embeddings")
    elif update != shapes[name]:
        problems.append(f"{name}: the adapter's update is {update}, the base's tensor {shapes[name]}")
    elif not a.shape[0] == b.shape[1] == rank:
        problems.append(f"{module}: ranks {a.shape[0]} (A), {b.shape[1]} (B) and {rank} (adapter_config.json) differ")
    elif bool(config.get("use_dora")) != (magnitude is not None):
        problems.append(f"{module}: use_dora is {bool(config.get('use_dora'))}, a magnitude is {'there' if magnitude else 'missing'}")
    elif magnitude and magnitude.shape != (shapes[name][1 if embedding else 0],):
        problems.append(f"{module}: the magnitude is {magnitude.shape}, the tensor {shapes[name]}")
    else:
        return Update(alpha / (sqrt(rank) if config.get("use_rslora") else rank), a, b, magnitude, None, embedding)
    return None


def _pattern(patterns: dict | None, module: str, default: float) -> float:
    """PEFT's rule: the first pattern that matches the end of the module's name, as a regular expression."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def merger(update: Update, source: Stored, rows_at_once: int) -> Callable:
    """The function ``(start, stop) -> rows``, float32 ``(stop − start, in)``, of the adapted tensor.

    DoRA: ``m · (W + ΔW) / ‖W + ΔW‖``, the norm over each row, of embeddings over each column of the whole table.
    Sums are float32, as in PEFT.
    """
    import torch

    origin = update.replacement or source
    a, b = (x.rows().to(torch.float32) if x else None for x in (update.a, update.b))
    magnitude = update.magnitude.rows().to(torch.float32) if update.magnitude else None

    def plain(start: int, stop: int):
        rows = origin.rows(start, stop).to(torch.float32)
        if a is None:
            return rows
        delta = a[:, start:stop].T @ b.T if update.embedding else b[start:stop] @ a
        return rows.add_(delta, alpha=update.scale)

    if magnitude is None:
        return plain
    if not update.embedding:

        def rows_with_norm(start: int, stop: int):
            rows = plain(start, stop)
            return rows * (magnitude[start:stop] / torch.linalg.norm(rows, dim=1))[:, None]

        return rows_with_norm
    squares = torch.zeros(origin.shape[1], dtype=torch.float64)
    for start in range(0, origin.shape[0], rows_at_once):
        squares += plain(start, min(start + rows_at_once, origin.shape[0])).to(torch.float64).square().sum(dim=0)
    factor = magnitude / squares.sqrt().to(torch.float32)
    return lambda start, stop: plain(start, stop) * factor
