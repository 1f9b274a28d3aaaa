"""The bases a recipe starts from: named ones, local folders, hub downloads, and what their files say of them."""

from __future__ import annotations

import difflib
import errno
import hashlib
import json
import math
import re
import shutil
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tsugiki.artifacts import digest, sha256_file
from tsugiki.errors import UserError, raise_problems

TEMPLATE_POLICIES = ("own", "supplied")
# Weights, tokenizer, settings and licence texts of the top folder: no pickles, no code, no second copy of the weights.
ALLOWED_FILES = (
    "*.safetensors",
    "*.json",
    "*.jinja",
    "*.model",
    "merges.txt",
    "vocab.txt",
    "README.md",
    "LICEN[CS]E*",
    "[Nn][Oo][Tt][Ii][Cc][Ee]*",
    "*TERMS_OF_USE*",
    "USE_POLICY*",
)
IGNORED_FILES = ("*/*", "*.bin", "*.pt", "*.pth", "*.py", "*.gguf", "consolidated*")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
FINGERPRINT_FILES = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json"
    r"|merges\.txt|.*\.model|chat_template\..*|model\.safetensors\.index\.json|.*\.safetensors"
)
FULL_HASH_BYTES = 64 << 20
SAMPLED_BLOCKS, SAMPLED_BLOCK_BYTES = 64, 64 << 10
MAX_HEADER_BYTES = 100 << 20
DTYPE_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I8": "int8", "U8": "uint8"}


# --- the list of bases ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Base:
    """A base that has a name.

    Attributes:
        name: what the user types.
        path: folder of a bundled base, or None for one on the hub.
        hub_id, revision: repository and commit on the hub (``main`` where no commit was checked), or None.
        family: what its tokenizer and layers are like: ``llama-3``, ``llama-2``, ``qwen2``, ``qwen3`` …
        architecture: the class named in its ``config.json``.
        licence: name of the licence of the weights.
        obligations: what the licence asks of a derived model, in a sentence.
        parameters: exact count, tied weights once; None where it is not known.
        gated: the hub asks to accept a licence before the download.
        chat_template: ``own`` (the repository has one) or ``supplied`` (it has none: the recipe supplies one).
        languages: ISO 639-1 codes.
        note: anything else a user should know.
        unverified: fields of this entry that were not checked against a source.
    """

    name: str
    path: Path | None = None
    hub_id: str | None = None
    revision: str | None = None
    family: str = ""
    architecture: str = ""
    licence: str = ""
    obligations: str = ""
    parameters: int | None = None
    gated: bool = False
    chat_template: str = "own"
    languages: tuple[str, ...] = ()
    note: str = ""
    unverified: tuple[str, ...] = ()


_KINDS: dict[str, type] = {
    "path": str,
    "hub_id": str,
    "revision": str,
    "family": str,
    "architecture": str,
    "licence": str,
    "obligations": str,
    "parameters": int,
    "gated": bool,
    "chat_template": str,
    "languages": list,
    "note": str,
    "unverified": list,
}
_ALWAYS = ("family", "architecture", "licence", "chat_template", "languages")
_ON_HUB = ("revision", "gated")
_KIND_NAMES = {str: "text", int: "a whole number", bool: "true or false", list: "a list of texts"}


def load_bases(yaml_path: Path | str) -> dict[str, Base]:
    """Read the named bases from a YAML mapping of name to fields; ``path`` is relative to the YAML's folder.

    Raises:
        UserError: the file is missing or not YAML, or its entries are wrong: every problem is listed with its
            file, line and key.
    """
    yaml_path = Path(yaml_path)
    try:
        text = yaml_path.read_text(encoding="utf-8")
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        content = yaml.safe_load(text)
    except FileNotFoundError as error:
        raise UserError("there is no such list of bases", where=str(yaml_path)) from error
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8: byte {error.start}", where=str(yaml_path)) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{yaml_path}:{mark.line + 1}" if mark else str(yaml_path)
        raise UserError(f"not YAML: {getattr(error, 'problem', None) or error}", where=where) from error
    if not isinstance(content, dict):
        raise UserError(
            "a list of bases is a mapping of name to fields",
            where=str(yaml_path),
            hint="Write one entry a base, for example `my-base:` and below it `hub_id: organisation/model`.",
        )

    problems: list[str] = []
    lines = _key_lines(tree, yaml_path, problems)
    bases = {}
    for name, fields in content.items():
        found = [
            f"{yaml_path}:{lines.get((name, key), lines.get((name, None), 1))} ({name}{'.' if key else ''}{key or ''}):"
            f" {message}"
            for key, message in _entry_problems(name, fields)
        ]
        problems += found
        if not found:
            values = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
            if "path" in values:
                values["path"] = (yaml_path.parent / values["path"]).resolve()
            bases[name] = Base(name=name, **values)
    raise_problems(problems, what=str(yaml_path), hint=f"The keys of an entry are {', '.join(_KINDS)}.")
    return bases


def _key_lines(tree: yaml.MappingNode, path: Path, problems: list[str]) -> dict[tuple[Any, Any], int]:
    """Line of every name and of every field; a key written twice is a problem, since YAML keeps only the last."""
    lines: dict[tuple[Any, Any], int] = {}
    for name_node, value in tree.value:
        name, line = name_node.value, name_node.start_mark.line + 1
        if (name, None) in lines:
            problems.append(f"{path}:{line} ({name}): a second entry of this name; the first is on line {lines[name, None]}")
        lines[name, None] = line
        for key_node, _ in value.value if isinstance(value, yaml.MappingNode) else ():
            key, line = key_node.value, key_node.start_mark.line + 1
            if (name, key) in lines:
                problems.append(f"{path}:{line} ({name}.{key}): written twice; the first is on line {lines[name, key]}")
            lines[name, key] = line
    return lines


def _entry_problems(name: Any, fields: Any) -> list[tuple[str | None, str]]:
    """Problems of one entry as (key or None, message)."""
    if not isinstance(name, str):
        return [(None, f"the name is {name!r}, not text: put it in quotes")]
    if not isinstance(fields, dict):
        return [(None, f"its fields are {fields!r}, not a mapping")]
    problems: list[tuple[str | None, str]] = []
    for key, value in fields.items():
        if key not in _KINDS:
            close = difflib.get_close_matches(str(key), _KINDS, 1)
            problems.append((str(key), f"no such key{f'; do you mean {close[0]}?' if close else ''}"))
        elif type(value) is not _KINDS[key]:  # not isinstance: a bool is an int
            problems.append((key, f"{value!r} is not {_KIND_NAMES[_KINDS[key]]}"))
        elif isinstance(value, list) and not all(isinstance(v, str) for v in value):
            problems.append((key, f"{value!r} is not a list of texts"))
        elif isinstance(value, str) and not value.strip():
            problems.append((key, "is empty"))
    if ("path" in fields) == ("hub_id" in fields):
        problems.append((None, "needs either path (a folder beside this file) or hub_id, and not both"))
    required = _ALWAYS + (_ON_HUB if "hub_id" in fields else ())
    problems += [(key, "is missing") for key in required if key not in fields]
    if "path" in fields:
        problems += [(key, "belongs to a base on the hub, not to one with a path") for key in _ON_HUB if key in fields]
    policy = fields.get("chat_template")
    if isinstance(policy, str) and policy.strip() and policy not in TEMPLATE_POLICIES:
        problems.append(("chat_template", f"{policy!r} is none of {', '.join(TEMPLATE_POLICIES)}"))
    hub_id = fields.get("hub_id")
    if isinstance(hub_id, str) and hub_id.strip() and not re.fullmatch(r"[\w.-]+/[\w.-]+", hub_id):
        problems.append(("hub_id", f"{hub_id!r} is not of the form organisation/model"))
    if type(fields.get("parameters")) is int and fields["parameters"] < 1:
        problems.append(("parameters", f"{fields['parameters']} is less than 1"))
    if isinstance(fields.get("unverified"), list):
        problems += [("unverified", f"{v!r} is no key of an entry") for v in fields["unverified"] if v not in _KINDS]
    return problems


# --- from a name to a folder ---------------------------------------------------------------------------------------


def resolve(
    name_or_path: str | Path,
    bases: Mapping[str, Base],
    *,
    cache_dir: Path | str | None = None,
    endpoint: str | None = None,
) -> Path:
    """The folder of a base: bundled, local, or downloaded from the hub (its own cache; a second call is offline).

    Only safetensors weights are taken, and never code: nothing from the folder is executed.

    Args:
        name_or_path: a name in ``bases``, or a folder.
        bases: what :func:`load_bases` returned.
        cache_dir: cache of downloads (default: the hub library's own, ``HF_HUB_CACHE``).
        endpoint: another hub's address (default: ``HF_ENDPOINT``, then the public hub).

    Raises:
        UserError: unknown name; folder incomplete; licence not accepted; no such repository or revision; no
            network; disk full. Each says what to do.
    """
    name = str(name_or_path)
    if name in bases:
        base = bases[name]
        if base.path is None:
            return _download(base, cache_dir, endpoint)
        if not base.path.is_dir():
            raise UserError(
                f"the bundled base {name} has no folder {base.path}",
                hint="Train it with `make tiny-bases CORPUS=DIR`, or take another base: " + ", ".join(bases) + ".",
            )
        return check_folder(base.path)
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        return check_folder(folder.resolve())
    if folder.is_file():
        raise UserError(f"{name} is a file; a base is a folder", hint="Name the folder that holds its config.json.")
    by_hub_id = {b.hub_id.lower(): b.name for b in bases.values() if b.hub_id}
    known = {n.lower(): n for n in bases}
    close = difflib.get_close_matches(name.lower(), [*known, *by_hub_id], 3, 0.5)
    names = list(dict.fromkeys(known.get(c) or by_hub_id[c] for c in close))
    suggestion = f"Do you mean {' or '.join(names)}? " if names else f"The bases are {', '.join(sorted(bases))}. "
    raise UserError(
        f"no base is named {name!r}, and there is no folder of that name",
        hint=suggestion + "A base of your own is an entry in recipes/bases.yaml or a folder with config.json,"
        " tokenizer files and *.safetensors.",
    )


def check_folder(folder: Path | str) -> Path:
    """Return the folder if it holds a whole model: config, tokenizer, and every byte of its safetensors.

    Raises:
        UserError: everything that is missing, cut short or of the wrong kind.
    """
    folder = Path(folder)
    problems = []
    if not (folder / "config.json").is_file():
        problems.append("config.json is missing")
    if not any((folder / f).is_file() for f in TOKENIZER_FILES):
        problems.append("tokenizer files are missing (tokenizer.json, tokenizer.model, or vocab.json with merges.txt)")
    elif not any((folder / f).is_file() for f in ("tokenizer.json", "tokenizer.model", "merges.txt")):
        problems.append("vocab.json is there, but merges.txt is missing")
    present = {p.name: p for p in sorted(folder.glob("*.safetensors"))}
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        wanted = _index_shards(index, problems)
        missing = [s for s in wanted if s not in present]
        if missing:
            problems.append(f"{len(missing)} of {len(wanted)} weight files are missing: {', '.join(missing)}")
    elif not present and pickles:
        problems.append(
            f"its weights are pickles ({', '.join(pickles)}), which can run code when they are opened: safetensors only"
        )
    elif not present:
        problems.append("no *.safetensors weights are there")
    for file in present.values():
        try:
            _header(file)
        except UserError as error:
            problems.append(error.message)
    raise_problems(
        problems,
        what=f"{folder} is not a whole base",
        hint="Copy the missing files from where the model came from, or save it again with"
        " `model.save_pretrained(folder)` and `tokenizer.save_pretrained(folder)`.",
    )
    return folder


def _index_shards(index: Path, problems: list[str]) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        problems.append(f"{index.name} is damaged: {error!r}")
        return []


def _download(base: Base, cache_dir: Path | str | None, endpoint: str | None) -> Path:
    from huggingface_hub import constants, errors, snapshot_download  # half a second, only when it is needed

    page = f"{endpoint or constants.ENDPOINT}/{base.hub_id}"
    what = f"{base.name} ({base.hub_id}, revision {base.revision})"
    accept = (
        f"Open {page}, accept the licence ({base.licence}) with your account, then run `hf auth login` with a token of"
        " that account and start again."
    )
    offline = "Connect to the network, or give a local folder as the base; what is in the cache already needs no network."
    try:
        folder = snapshot_download(
            base.hub_id,
            revision=base.revision,
            cache_dir=cache_dir,
            endpoint=endpoint,
            allow_patterns=list(ALLOWED_FILES),
            ignore_patterns=list(IGNORED_FILES),
        )
    except errors.GatedRepoError as error:
        raise UserError(f"the hub asks for a licence to be accepted before {what} can be downloaded", hint=accept) from error
    except errors.RepositoryNotFoundError as error:
        if base.gated:
            raise UserError(f"the hub does not show {what} without an accepted licence", hint=accept) from error
        raise UserError(
            f"the hub has no repository {base.hub_id}, or hides it from you",
            hint=f"Look at {page}: correct hub_id of {base.name} in the list of bases, or, if the page asks for it,"
            " accept the licence and run `hf auth login`.",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(
            f"the repository {base.hub_id} has no revision {base.revision!r}",
            hint=f"Take a commit from {page}/commits/main as the revision of {base.name} in the list of bases.",
        ) from error
    except Exception as error:
        cause = error.__cause__ or error
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if getattr(cause, "errno", None) == errno.ENOSPC or getattr(error, "errno", None) == errno.ENOSPC:
            cache = Path(cache_dir or constants.HF_HUB_CACHE)
            needed = f"about {2 * base.parameters / 1e9:.1f} GB" if base.parameters else "an unknown number of bytes"
            free = shutil.disk_usage(next(p for p in (cache, *cache.absolute().parents) if p.exists())).free
            raise UserError(
                f"the disk is full: {what} needs {needed} in {cache}, {free / 1e9:.1f} GB are free",
                hint="Free some space, or set HF_HUB_CACHE to a folder on another disk; the download goes on where it stopped.",
            ) from error
        if isinstance(cause, errors.OfflineModeIsEnabled) or (
            isinstance(error, errors.LocalEntryNotFoundError) and constants.HF_HUB_OFFLINE
        ):
            raise UserError(
                f"{what} is not wholly in the cache, and the hub is switched off (HF_HUB_OFFLINE)",
                hint="Unset HF_HUB_OFFLINE for one run with a network, or give a local folder as the base.",
            ) from error
        if status in (401, 403):
            raise UserError(f"the hub refuses {what} to this account (status {status})", hint=accept) from error
        if status is not None:
            raise UserError(
                f"the hub answered with status {status} when asked for {what}",
                hint="Try again later, or give a local folder as the base.",
            ) from error
        if isinstance(error, (errors.LocalEntryNotFoundError, ConnectionError)) or "httpx" in type(cause).__module__:
            raise UserError(
                f"the hub at {endpoint or constants.ENDPOINT} cannot be reached, and {what} is not wholly in the cache",
                hint=offline,
            ) from error
        raise
    return check_folder(folder)


# --- what the files say --------------------------------------------------------------------------------------------


def _header(file: Path) -> dict[str, dict]:
    """The tensors of a safetensors file, name to {dtype, shape, data_offsets}, read without its data.

    Raises:
        UserError: not safetensors, or shorter or longer than its header says.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(8)
        if head.startswith(b"version "):
            raise UserError(f"{file.name} is a Git LFS pointer of {size} bytes, not the weights: run `git lfs pull`")
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise UserError(f"{file.name} ({size} bytes) is not a safetensors file, or its beginning is cut off")
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            end = max((t["data_offsets"][1] for t in header.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{file.name} has a damaged safetensors header: {error!r}") from error
    if size != 8 + length + end:
        raise UserError(f"{file.name} has {size} bytes, its header says {8 + length + end}: download it again")
    return header


def tensor_headers(path: Path | str) -> dict[str, dict]:
    """Name to {dtype, shape, data_offsets} of all tensors in a folder's safetensors files, without reading data."""
    headers: dict[str, dict] = {}
    for file in sorted(Path(path).glob("*.safetensors")):
        headers |= _header(file)
    return headers


def fingerprint(path: Path | str) -> str:
    """SHA-256 (hexadecimal) of what a model's results depend on: configuration, tokenizer, template, weights.

    Model card and licence are left out. A safetensors file over 64 MiB is not read whole: its size, its header
    (names, shapes, dtypes) and 64 blocks of 64 KiB spread evenly from the first to the last byte count, so that 16 GB
    take a moment; a change of a few bytes between two blocks goes unseen, any training or conversion does not.
    """
    path = Path(path)
    files = sorted(f for f in path.iterdir() if f.is_file() and FINGERPRINT_FILES.fullmatch(f.name))
    return digest([[f.name, sampled_hash(f) if f.suffix == ".safetensors" else sha256_file(f)] for f in files])


def sampled_hash(file: Path) -> str:
    """SHA-256 of a safetensors file; of one over 64 MiB, of its size, its header and evenly spaced blocks."""
    size = file.stat().st_size
    if size <= FULL_HASH_BYTES:
        return sha256_file(file)
    sha = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        length = min(struct.unpack("<Q", stream.read(8))[0], MAX_HEADER_BYTES)
        sha.update(stream.read(length))
        for i in range(SAMPLED_BLOCKS):
            stream.seek((size - SAMPLED_BLOCK_BYTES) * i // (SAMPLED_BLOCKS - 1))
            sha.update(stream.read(SAMPLED_BLOCK_BYTES))
    return sha.hexdigest()


@dataclass(frozen=True)
class Profile:
    """What a base is built of, read from its ``config.json`` and the headers of its weights.

    Attributes:
        architecture, model_type: as written in the configuration.
        family: guess from model type and tokenizer: ``llama-3`` (byte-level BPE), ``llama-2`` (SentencePiece), else
            the model type.
        hidden, ffn, head_dim: widths; ``queries_per_kv``: query heads that share one key-value head.
        parameters: counted from the headers, tied weights once; from the configuration where there are no weights;
            None where neither is possible.
        bytes: of the safetensors files; None without weights.
        dtype: of most bytes of the weights, else the configuration's.
        context: longest sequence in tokens that the configuration allows.
        rope_scaling: None, or the scaling's own fields (``rope_type`` …).
        rows_256: every matrix has rows (input width) divisible by 256, as K-quants need.
        odd_rows: the matrices that do not, as ``name (width)`` with ``*`` for the layer's number.
        experts: number of experts of a mixture; 0 for a dense model.
    """

    architecture: str
    model_type: str
    family: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    queries_per_kv: int
    qkv_bias: bool
    qk_norm: bool
    tied_embeddings: bool
    vocab_size: int
    parameters: int | None
    bytes: int | None
    dtype: str | None
    context: int | None
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    rows_256: bool
    odd_rows: tuple[str, ...]
    experts: int

    @property
    def moe(self) -> bool:
        """Whether it is a mixture of experts."""
        return self.experts > 0


def profile(path: Path | str) -> Profile:
    """Profile of the model in a folder; the weights may be absent, the configuration may not.

    Both spellings of the rotary settings are read: ``rope_theta`` and ``rope_scaling``, and the ``rope_parameters``
    that transformers 5 writes. Nothing is imported from transformers or torch.

    Raises:
        UserError: no readable ``config.json``, or fields that every decoder needs are missing.
    """
    path = Path(path)
    config = _config(path / "config.json")
    model_type = config["model_type"]
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or hidden // heads
    experts = next((config[k] for k in ("num_experts", "num_local_experts", "n_routed_experts") if config.get(k)), 0)
    tied = bool(config.get("tie_word_embeddings", model_type in ("gemma", "gemma2", "gemma3_text")))
    rope = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or {k: v for k, v in rope.items() if k != "rope_theta"}
    scaling_type = scaling.get("rope_type", scaling.get("type", "default"))
    tensors = tensor_headers(path)
    widths = _row_widths(tensors) or {
        "embed_tokens, q_proj, k_proj, v_proj, gate_proj, up_proj, lm_head": hidden,
        "o_proj": heads * head_dim,
        "down_proj": config.get("moe_intermediate_size" if experts else "intermediate_size") or config["intermediate_size"],
    }
    odd = tuple(f"{name} ({width})" for name, width in widths.items() if width % 256)
    bias_by_type = model_type in ("qwen2", "qwen2_moe")
    norm_by_type = model_type in ("qwen3", "qwen3_moe", "olmo2", "gemma3_text")
    bytes_by_dtype: Counter[str] = Counter()
    for t in tensors.values():
        bytes_by_dtype[t["dtype"]] += t["data_offsets"][1] - t["data_offsets"][0]
    stored = bytes_by_dtype.most_common(1)[0][0] if bytes_by_dtype else None
    if tensors:
        parameters = sum(math.prod(t["shape"]) for n, t in tensors.items() if _is_parameter(n, tied))
    else:
        parameters = count_parameters(config)
    return Profile(
        architecture=(config.get("architectures") or [""])[0],
        model_type=model_type,
        family=_family(path, config),
        layers=config["num_hidden_layers"],
        hidden=hidden,
        ffn=config["intermediate_size"],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        queries_per_kv=heads // kv_heads,
        qkv_bias=any(n.endswith("q_proj.bias") for n in tensors)
        if tensors
        else bool(config.get("attention_bias", bias_by_type)),
        qk_norm=any(n.endswith("q_norm.weight") for n in tensors) if tensors else norm_by_type,
        tied_embeddings=tied,
        vocab_size=config["vocab_size"],
        parameters=parameters,
        bytes=sum(f.stat().st_size for f in path.glob("*.safetensors")) if tensors else None,
        dtype=DTYPE_NAMES.get(stored, stored) if stored else config.get("dtype") or config.get("torch_dtype"),
        context=config.get("max_position_embeddings"),
        rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0),
        rope_scaling=None if scaling_type == "default" else dict(scaling),
        rows_256=not odd,
        odd_rows=odd,
        experts=experts,
    )


def _config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError("there is no config.json", where=str(file.parent), hint="Name a folder with a model.") from error
    except ValueError as error:
        raise UserError(f"not JSON: {error}", where=str(file)) from error
    if not isinstance(config, dict):
        raise UserError("not a JSON object", where=str(file))
    if isinstance(config.get("text_config"), dict):  # a model that also sees keeps its language part below
        config = {**config, **config["text_config"]}
    needed = ("model_type", "num_attention_heads", "hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size")
    problems = []
    for key in needed:
        value, kind = config.get(key), str if key == "model_type" else int
        if type(value) is not kind or not value:
            problems.append(f"{key} is {value!r}" if key in config else f"{key} is missing")
    raise_problems(
        problems,
        what=str(file),
        hint="A base is a decoder language model in the layout that transformers' save_pretrained writes.",
    )
    return config


def count_parameters(config: Mapping[str, Any]) -> int | None:
    """Parameters of a dense Llama, Mistral, Qwen2 or Qwen3 from its configuration, tied weights once; else None."""
    model_type = config["model_type"]
    if model_type not in ("llama", "mistral", "qwen2", "qwen3"):
        return None
    hidden, heads, ffn = config["hidden_size"], config["num_attention_heads"], config["intermediate_size"]
    head_dim = config.get("head_dim") or hidden // heads
    q, kv = heads * head_dim, (config.get("num_key_value_heads") or heads) * head_dim
    every_bias = bool(config.get("attention_bias"))
    layer = hidden * (2 * q + 2 * kv) + 3 * hidden * ffn + 2 * hidden
    layer += (q + 2 * kv) * (every_bias or model_type == "qwen2") + hidden * (every_bias and model_type != "qwen2")
    layer += (2 * ffn + hidden) * bool(config.get("mlp_bias")) + 2 * head_dim * (model_type == "qwen3")
    embeddings = config["vocab_size"] * hidden * (1 if config.get("tie_word_embeddings") else 2)
    return embeddings + config["num_hidden_layers"] * layer + hidden


def _is_parameter(name: str, tied: bool) -> bool:
    # Old Llama files also store the rotary frequencies; tied models may store the output matrix a second time.
    return not name.endswith("inv_freq") and not (tied and name == "lm_head.weight")


def _row_widths(tensors: Mapping[str, dict]) -> dict[str, int]:
    """Row width (input features) of every matrix, layers folded into one name."""
    widths = {}
    for name, tensor in tensors.items():
        if name.endswith(".weight") and len(tensor["shape"]) == 2:
            widths[re.sub(r"\.\d+\.", ".*.", name.removesuffix(".weight").removeprefix("model."))] = tensor["shape"][1]
    return widths


def _family(path: Path, config: Mapping[str, Any]) -> str:
    if config["model_type"] != "llama":
        return config["model_type"]
    try:
        model = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))["model"]
        return "llama-3" if model["type"] == "BPE" and not model.get("byte_fallback") else "llama-2"
    except (OSError, ValueError, KeyError, TypeError):
        if (path / "tokenizer.model").is_file():
            return "llama-2"
        return "llama-3" if config["vocab_size"] == 128_256 else "llama-2"
