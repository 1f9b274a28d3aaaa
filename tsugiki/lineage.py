"""Which base an adapter was trained on: written beside the adapter, compared before the two are joined."""

from __future__ import annotations

from pathlib import Path

from tsugiki.artifacts import digest, read_json, write_json
from tsugiki.bases import sampled_hash
from tsugiki.errors import UserError

LINEAGE = "base.json"


def weights_fingerprint(base_dir: Path | str) -> str:
    """SHA-256 (hexadecimal) of a base's weight files alone: a chat template may change, the weights may not.

    Files over 64 MiB are hashed in samples, as :func:`tsugiki.bases.fingerprint` does.
    """
    files = sorted(Path(base_dir).glob("*.safetensors"))
    return digest([[f.name, sampled_hash(f)] for f in files])


def write_lineage(adapter_dir: Path | str, base_dir: Path | str, name: str | None = None) -> None:
    """Write ``base.json`` into an adapter's folder: the base's name and the fingerprint of its weights."""
    base_dir = Path(base_dir)
    write_json(Path(adapter_dir) / LINEAGE, {"name": name or base_dir.name, "weights": weights_fingerprint(base_dir)})


def check_lineage(adapter_dir: Path | str, base_dir: Path | str) -> bool | None:
    """Whether an adapter was trained on these weights; None where its folder does not say.

    Raises:
        UserError: it was trained on others, or ``base.json`` is damaged.
    """
    path = Path(adapter_dir) / LINEAGE
    if not path.is_file():
        return None
    try:
        written = read_json(path)
        name, expected = written["name"], written["weights"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"damaged: {error!r}", where=str(path)) from None
    found = weights_fingerprint(base_dir)
    if found != expected:
        raise UserError(
            f"the adapter was trained on {name!r} with weights {str(expected)[:12]}, those of {Path(base_dir).name!r} are {found[:12]}",
            where=str(path),
            hint="Take the base that it was trained on. The same weights in other files also differ: remove base.json if you are sure.",
        )
    return True
