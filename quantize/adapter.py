"""A PEFT LoRA adapter: what it does to each tensor of its base, rows at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path

from tsugiki.errors import UserError, raise_problems
from tsugiki.quantize.families import EMBEDDINGS, OUTPUT
from tsugiki.quantize.weights import FLOATS, Stored, read_header

_KEY = re.compile(
    r"base_model\.model\.(?P<module>.+?)\.(?:"
    r"lora_(?P<side>[AB])\.weight|lora_embedding_(?P<table>[AB])|lora_magnitude_vector(?:\.weight)?(?P<magnitude>)"
    r"|token_adapter\.(?P<tokens>trainable_tokens_delta)"
    r"|(?:(?P<copy>modules_to_save\.)|(?P<base>base_layer\.|original_module\.|token_adapter\.base_layer\.))?weight(?P<whole>))"
)
_FUSED = re.compile(r"(?P<experts>.+\.mlp\.experts)(?:\.base_layer)*")  # one base_layer for each parameter wrapped before

# Beginnings of PEFT's init_lora_weights that take something away from the base's weights before training.
_CHANGES_BASE = {"pissa": "PiSSA", "olora": "OLoRA", "corda": "CorDA", "loftq": "LoftQ", "lora_ga": "LoRA-GA"}


@dataclass(frozen=True)
class Part:
    """Some rows and columns of a stored matrix: one expert's pair of fused experts, where PEFT interleaves them.

    Attributes:
        held: the matrices read last, whole, shared by the parts of an adapter: an expert's columns lie apart in the file.
    """

    whole: Stored
    row: slice
    column: slice
    shape: tuple[int, int]
    held: dict = field(compare=False, repr=False)

    def rows(self, start: int = 0, stop: int | None = None):
        """Rows ``[start, stop)`` of the part; raises as :meth:`tsugiki.quantize.weights.Stored.rows`."""
        if self.whole not in self.held:
            while len(self.held) > 1:  # A and B of the layer at hand
                del self.held[next(iter(self.held))]
            self.held[self.whole] = self.whole.rows()
        return self.held[self.whole][self.row, self.column][start:stop]


@dataclass(frozen=True)
class Update:
    """What the adapter does to one tensor W ``(out, in)``.

    Attributes:
        scale: alpha over rank, or over its root (rslora).
        a, b: A ``(r, in)`` and B ``(out, r)``, the update is ``scale · B A``; of embeddings A ``(r, out)`` and
            B ``(in, r)``, the update is ``scale · (B A)ᵀ``. None: no low-rank part.
        magnitude: DoRA's vector: ``(out,)``, of embeddings ``(in,)``.
        replacement: a whole trained tensor (``modules_to_save``, a table of another size) in place of the base's.
        embedding: the transposed form of embeddings.
        tokens, token_rows: ids whose rows are replaced (``trainable_token_indices``), and those rows ``(ids, in)``.
    """

    scale: float = 0.0
    a: Stored | Part | None = None
    b: Stored | Part | None = None
    magnitude: Stored | None = None
    replacement: Stored | None = None
    embedding: bool = False
    tokens: tuple[int, ...] = ()
    token_rows: Stored | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[0] if self.a else 0


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter that fits its base.

    Attributes:
        updates: the base's tensor name to what is done to it.
        unties: embeddings and output layer, tied in the base, differ in the adapted model. PEFT adds an update to one of the
            two only: the model that was trained has an output layer of its own. (PEFT's merge_and_unload writes into the
            shared tensor, and so changes both; that is not the model that was trained.)
        rows: tokens of its vocabulary, where that is of another size than the base's; both tables are replaced then.
    """

    path: Path
    updates: dict[str, Update]
    unties: bool
    rows: int | None = None


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
    problems: list[str] = []
    found = _sorted_tensors(path, config, problems)
    shapes = dict(shapes)
    if tied and EMBEDDINGS in shapes:
        shapes[OUTPUT] = shapes[EMBEDDINGS]
    hint = f"It was trained on {config.get('base_model_name_or_path')!r}."
    rows = _rows_of(found)
    base_rows = shapes.get(EMBEDDINGS, (0,))[0]
    resized = bool(rows) and set(rows.values()) != {base_rows}
    if resized:
        kept = [n for n in (EMBEDDINGS, OUTPUT) if _origin(n, found, tied) is not None]
        if len(set(rows.values())) == 1 and len(kept) == 2:
            shapes |= {n: (max(rows.values()), *shapes[n][1:]) for n in kept}
        else:
            problems += [
                f"its vocabulary has {max(rows.values()):,} tokens, the base's {base_rows:,}, and it does not hold the whole {n}"
                for n in (EMBEDDINGS, OUTPUT) if n not in kept
            ]
            hint += (f" Its vocabulary has {max(rows.values()):,} tokens, the base's {base_rows:,}: save it again with both tables "
                     "(save_embedding_layers=True, modules_to_save), or give the base the same size first "
                     "(resize_token_embeddings(…), save_pretrained), and convert with that.")
    trained = {n: ids for n, (ids, _) in found.tokens.items()}
    apart = OUTPUT in trained and trained[OUTPUT] != trained.get(EMBEDDINGS)  # PEFT does not tie these rows
    keeps_ties = bool(config.get("ensure_weight_tying")) and tied and not apart
    updates: dict[str, Update] = {}
    held: dict = {}
    for module, pair in found.pairs.items():
        if keeps_ties and module == "lm_head":
            continue  # the same matrices as the embeddings', transposed
        if fused := _FUSED.fullmatch(module):
            updates |= _fused_updates(fused["experts"], pair, config, shapes, held, problems)
        elif update := _update(module, pair, config, shapes, problems):
            updates[f"{module}.weight"] = update
    if config.get("trainable_token_indices") and not found.tokens:
        problems.append("the rows of trainable_token_indices are missing")
    own = _set_tables(updates, found, shapes, tied and not keeps_ties, problems)
    for name, stored in (found.tables | found.copies).items():
        if name in (EMBEDDINGS, OUTPUT):
            continue
        if name not in shapes:
            problems.append(f"the base has no {name}")
        elif stored.shape != shapes[name]:
            problems.append(f"{name}: the adapter's tensor is {stored.shape}, the base's {shapes[name]}")
        else:
            updates[name] = Update(**{**vars(updates.get(name, Update())), "replacement": stored})
    raise_problems(problems, what=f"{path}: the adapter does not fit the base", hint=hint)
    unties = tied and not keeps_ties and own
    if tied and not unties:
        updates.pop(OUTPUT, None)
    if not updates:
        raise UserError("the adapter holds no weights", where=str(path))
    return Adapter(folder, updates, unties, next(iter(rows.values())) if resized else None)


@dataclass(frozen=True)
class _Found:
    """The tensors of an adapter's file.

    Attributes:
        pairs: module to its matrices, ``lora_A`` and the like.
        copies: name to a tensor trained as a whole (``modules_to_save``).
        tables: name to the base's own tensor, saved because its size changed or a table was adapted.
        tokens: name to the trained rows of ``trainable_token_indices``, and their ids.
    """

    pairs: dict[str, dict[str, Stored]]
    copies: dict[str, Stored]
    tables: dict[str, Stored]
    tokens: dict[str, tuple[tuple[int, ...], Stored]]


def _sorted_tensors(path: Path, config: dict, problems: list[str]) -> _Found:
    found = _Found({}, {}, {}, {})
    saved = config.get("modules_to_save") or []
    for key, stored in read_header(path).items():
        match = _KEY.fullmatch(key)
        if not match:
            what = "a trained bias" if key.endswith(".bias") else "no LoRA matrix of a layer that is known here"
            problems.append(f"{key} is {what}")
            continue
        module = match["module"]
        if stored.dtype not in FLOATS:
            problems.append(f"{key} has type {stored.dtype}; F32, F16 or BF16 is needed")
        elif match["tokens"]:
            found.tokens[f"{module}.weight"] = (_token_ids(module, config), stored)
        elif match["whole"] is not None:
            trained = match["copy"] or (not match["base"] and any(module.endswith(s) for s in saved))
            (found.copies if trained else found.tables)[f"{module}.weight"] = stored
        else:
            kind = f"lora_{match['side']}" if match["side"] else f"lora_embedding_{match['table']}" if match["table"] else "magnitude"
            found.pairs.setdefault(module, {})[kind] = stored
    return found


def _token_ids(module: str, config: dict) -> tuple[int, ...]:
    """The ids of a module in ``trainable_token_indices``: a list is of the embeddings, a dictionary names modules."""
    given = config.get("trainable_token_indices")
    if isinstance(given, dict):
        given = next((ids for name, ids in given.items() if module.endswith(name)), None)
        if given is None and module == "lm_head":  # tied: the ids of the embeddings
            given = next((ids for name, ids in config["trainable_token_indices"].items() if "embed" in name), None)
    return tuple(given) if isinstance(given, list) and all(type(i) is int for i in given) else ()


def _rows_of(found: _Found) -> dict[str, int]:
    """Rows that the adapter takes embeddings and output layer to have."""
    rows = {n: s.shape[0] for n, s in (found.tables | found.copies).items() if n in (EMBEDDINGS, OUTPUT) and s.shape}
    for name in (EMBEDDINGS, OUTPUT):
        pair = found.pairs.get(name.removesuffix(".weight"), {})
        if "lora_embedding_A" in pair:
            rows[f"{name}, A"] = pair["lora_embedding_A"].shape[-1]
        elif "lora_B" in pair:
            rows[f"{name}, B"] = pair["lora_B"].shape[0]
    return rows


def vocabulary_rows(folder: Path) -> int | None:
    """Rows of the embeddings or the output layer that an adapter holds whole; None where it holds neither.

    Raises:
        UserError: as :func:`read_adapter`.
    """
    found = _sorted_tensors(folder / "adapter_model.safetensors", read_adapter_config(folder), [])
    tables = found.tables | found.copies
    return next((tables[n].shape[0] for n in (EMBEDDINGS, OUTPUT) if n in tables and tables[n].shape), None)


def _origin(name: str, found: _Found, tied: bool) -> Stored | None:
    """What embeddings or output layer start from, where it is not the base's: a copy, a table, the table that both share."""
    other = OUTPUT if name == EMBEDDINGS else EMBEDDINGS
    return found.copies.get(name) or found.tables.get(name) or (found.tables.get(other) if tied else None)


def _set_tables(updates: dict[str, Update], found: _Found, shapes: dict, tied: bool, problems: list[str]) -> bool:
    """Add replaced tables and rows of embeddings and output layer; returns whether the two, if tied, become different."""
    own = bool(found.copies.keys() & {EMBEDDINGS, OUTPUT}) or bool(updates.keys() & {EMBEDDINGS, OUTPUT})
    tokens = dict(found.tokens)
    if tied and EMBEDDINGS in tokens and tokens.get(OUTPUT, tokens[EMBEDDINGS])[0] == tokens[EMBEDDINGS][0]:
        tokens[OUTPUT] = tokens[EMBEDDINGS]  # PEFT ties the rows too
    elif tokens.keys() & {EMBEDDINGS, OUTPUT}:
        own = True
    for name in (EMBEDDINGS, OUTPUT):
        origin, (ids, rows) = _origin(name, found, tied), tokens.pop(name, ((), None))
        if name not in shapes or (origin is None and rows is None):
            if origin or rows:
                problems.append(f"the base has no {name}")
            continue
        before = updates.get(name, Update())
        if origin and origin.shape != shapes[name]:
            problems.append(f"{name}: the adapter's tensor is {origin.shape}, the base's {shapes[name]}")
        elif rows and before.a:
            problems.append(f"{name} has both trained tokens and a low-rank update")
        elif rows and (rows.shape != (len(ids), *shapes[name][1:]) or len(set(ids)) < len(ids) or not all(0 <= i < shapes[name][0] for i in ids)):
            problems.append(f"{name}: {rows.shape} trained rows for the ids {list(ids)[:5]} … of a table {shapes[name]} (trainable_token_indices)")
        else:
            updates[name] = Update(**{**vars(before), "replacement": origin, "tokens": ids, "token_rows": rows})
    problems.extend(f"{n} is no table of tokens (trainable_token_indices)" for n in tokens)
    return own


def _fused_updates(experts: str, pair: dict[str, Stored], config: dict, shapes: dict, held: dict, problems: list[str]) -> dict[str, Update]:
    """One pair of matrices for all experts of a layer (``target_parameters``), as each expert's updates.

    transformers holds a layer's experts as ``gate_up_proj`` ``(E, 2·ffn, width)`` and ``down_proj`` ``(E, width, ffn)``. PEFT's
    A is ``(E·r, in)``, an expert's rows together; B is ``(out, r·E)``, the experts' columns alternating
    (``peft.tuners.lora.layer.ParamWrapper.get_delta_weight``). Which of the two parameters it is, the shapes say.
    """
    a, b = pair.get("lora_A"), pair.get("lora_B")
    number = sum(1 for n in shapes if n.startswith(f"{experts}.") and n.endswith(".down_proj.weight"))
    down, gate = shapes.get(f"{experts}.0.down_proj.weight"), shapes.get(f"{experts}.0.gate_proj.weight")
    if not number or a is None or b is None or len(a.shape) != 2 or len(b.shape) != 2:
        problems.append(f"{experts}: {'the base has no experts of this name' if not number else f'fused experts with {sorted(pair)} only'}")
        return {}
    kinds = {(gate[1], 2 * gate[0]): ("gate_up_proj", gate[0]), (down[1], down[0]): ("down_proj", down[0])}
    kind, size = kinds.get((a.shape[1], b.shape[0]), (None, 0))
    if kind is None:
        problems.append(f"{experts}: A {a.shape} and B {b.shape} fit neither gate_up_proj {number, 2 * gate[0], gate[1]} nor down_proj {number, *down}")
        return {}
    rank = _pattern(config.get("rank_pattern"), f"{experts}.{kind}", config["r"])
    alpha = _pattern(config.get("alpha_pattern"), f"{experts}.{kind}", config["lora_alpha"])
    if not a.shape[0] == b.shape[1] == rank * number:
        problems.append(f"{experts}.{kind}: ranks {a.shape[0]} (A) and {b.shape[1]} (B) for {number} experts, {rank} each (adapter_config.json)")
        return {}
    scale = alpha / (sqrt(rank) if config.get("use_rslora") else rank)
    updates = {}
    for e in range(number):
        of_a = Part(a, slice(e * rank, (e + 1) * rank), slice(None), (rank, a.shape[1]), held)
        for i, part in enumerate(("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)):
            of_b = Part(b, slice(i * size, (i + 1) * size), slice(e, None, number), (size, rank), held)
            updates[f"{experts}.{e}.{part}.weight"] = Update(scale, of_a, of_b)
    return updates


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
        "KaSA (it changes the base)": config.get("kasa_config"),
        "BD-LoRA (block-diagonal matrices)": config.get("use_bdlora"),
        "Arrow (it routes among adapters)": config.get("arrow_config"),
        "layers copied by layer_replication": config.get("layer_replication"),
    }
    raise_problems(
        [f"{what} is not supported" for what, there in unsupported.items() if there],
        what=str(path), hint="Supported: LoRA and DoRA on linear layers and embeddings, LoRA on fused experts (rslora, alpha and rank patterns, "
        "modules_to_save, trainable_token_indices).",
    )
    wrong = [
        f"{k} is {config.get(k)!r}, not a positive number"
        for k in ("r", "lora_alpha") if not isinstance(config.get(k), int | float) or config[k] <= 0
    ]
    saved = config.get("modules_to_save")
    if saved is not None and not (isinstance(saved, list) and all(isinstance(m, str) for m in saved)):
        wrong.append(f"modules_to_save is {saved!r}, no list of names")
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict):
            wrong.append(f"{key} is {patterns!r}, no object")
            continue
        for pattern, value in patterns.items():
            try:
                re.compile(pattern)
            except re.error as error:
                wrong.append(f"{key}: {pattern!r} is no regular expression: {error}")
            if not isinstance(value, int | float) or value <= 0:
                wrong.append(f"{key}: {pattern!r} is {value!r}, not a positive number")
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

    places = torch.tensor(update.tokens)
    trained = update.token_rows.rows().to(torch.float32) if update.token_rows else None

    def plain(start: int, stop: int):
        rows = origin.rows(start, stop).to(torch.float32)
        if trained is not None:
            inside = (places >= start) & (places < stop)
            rows[places[inside] - start] = trained[inside]
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
