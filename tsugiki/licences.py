"""What the name of a base's licence says about models derived from it; a reading aid, not legal advice."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from tsugiki.bases import Base
from tsugiki.errors import UserError

UNKNOWN = {"", "unknown", "other", "none", "unlicensed", "tbd"}


def card_fields(folder: Path) -> dict:
    """The front matter of a model card (``README.md``); empty where there is none that can be read."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8", errors="replace")
        front = re.match(r"---\s*\n(.*?)\n---\s*(?:\n|$)", text, re.S)
        fields = yaml.safe_load(front[1]) if front else {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError):  # an impossible date is a ValueError
        return {}
    return fields if isinstance(fields, dict) else {}


def card_licence(folder: Path) -> str:
    """The licence that a model card names; empty where it names none."""
    fields = card_fields(folder)
    names = fields.get("license")
    names = [str(n) for n in (names if isinstance(names, list) else [names]) if n]
    own = str(fields.get("license_name") or "")
    return " and ".join(n for n in names if n.lower() != "other") or own or " and ".join(names)


def allows_derivatives(licence: str) -> bool | None:
    """Whether a licence of this name lets derived models be handed out; None where the name says nothing.

    False for what calls itself ND or "no derivatives" (Creative Commons' BY-ND and BY-NC-ND, and texts like them).
    """
    if licence.strip().lower() in UNKNOWN:
        return None
    words = re.findall(r"[a-z]+", licence.lower())
    creative = "cc" in words or "by" in words or "commons" in words
    plain = "".join(words)
    return not (("nd" in words and creative) or "noderiv" in plain)


def is_non_commercial(licence: str) -> bool:
    """Whether the name of the licence says that commercial use is not allowed."""
    words = re.findall(r"[a-z]+", licence.lower())
    return ("nc" in words and ("cc" in words or "by" in words)) or "noncommercial" in "".join(words) or "research only" in licence.lower()


def check_licence(base: Base) -> None:
    """Refuse a base whose licence allows no derived models: an adapter, a merged or a quantized file is one.

    Raises:
        UserError: the licence's name says so.
    """
    if allows_derivatives(base.licence) is False:
        raise UserError(
            f"the licence of {base.name} ({base.licence}) allows no derived models, and an adapter or a quantized file made from it is one",
            hint="Take another base. With the rights holder's permission, name that permission as the licence of an entry in bases.yaml.",
        )


def licence_notes(base: Base, folder: Path | None = None) -> list[tuple[str, str]]:
    """What a user should hear of a licence before files are made from the base, in Japanese and English; mostly nothing.

    Args:
        base: the base.
        folder: its files, whose model card may name another licence than the list of bases.
    """
    notes = []
    if allows_derivatives(base.licence) is None:
        notes.append((f"{base.name}のライセンスが分かりません。派生モデルを配る前に確かめてください。",
                      f"the licence of {base.name} is not known: find out whether derived models may be handed out before you do"))
    if is_non_commercial(base.licence):
        notes.append((f"{base.name}のライセンス（{base.licence}）は商用利用を認めていません。",
                      f"the licence of {base.name} ({base.licence}) allows no commercial use"))
    card = card_licence(folder) if folder else ""
    if allows_derivatives(card) is False:
        notes.append((f"{base.name}のモデルカードのライセンス（{card}）は派生モデルを認めていません。一覧では{base.licence}です。",
                      f"the model card of {base.name} names a licence without derivatives ({card}), the list of bases {base.licence}: ask which holds"))
    return notes
