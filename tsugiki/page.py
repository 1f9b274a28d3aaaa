"""The shell of the pages that people read: one style, one script, nothing fetched.

A page's template says ``{% extends "tsugiki/page.html" %}`` and fills the blocks ``title``, ``style``, ``main``, ``footer``
and ``charts``: the last is script that gives ``charts.<name> = function (host, width) {…}`` for every element with
``data-chart="<name>"``, from ``data``, the JSON that is embedded in the page.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from jinja2 import ChainableUndefined, ChoiceLoader, Environment, PackageLoader, PrefixLoader
from markupsafe import Markup


def environment(package: str) -> Environment:
    """Templates of a package, with the shell's as ``tsugiki/page.html`` and ``tsugiki/macros.html``; every value is escaped."""
    shell = PrefixLoader({"tsugiki": PackageLoader("tsugiki", ".")})
    return Environment(
        loader=ChoiceLoader([shell, PackageLoader(package, ".")]), autoescape=True, undefined=ChainableUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip


def render(page: Environment, template: str, view: Mapping[str, Any], data: Any) -> str:
    """The page as text; ``data`` is what its script draws."""
    return page.get_template(template).render(**view, embedded=embed_json(data))


def embed_json(value: Any) -> Markup:
    """JSON that may stand inside a script element: no ``<``, ``>`` or ``&`` and no line separators are left bare.

    Raises:
        ValueError: NaN or an infinity.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)
