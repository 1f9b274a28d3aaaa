"""Weights repacked for a CPU's matrix tiles (AMX): whether this build of llama.cpp can, and for which files it pays.

A plain build with GCC 12 crashes in the first prompt: its ``_tile_loadconfig`` loads uninitialised memory
(``evaluate/amx_tiles.h`` says how, and mends it in the builds of ``make setup``). Upstream knows the symptom:
https://github.com/ggml-org/llama.cpp/issues/20824, and a mending since 2026-08, https://github.com/ggml-org/llama.cpp/pull/26954.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

import gguf
from llama_cpp import llama_cpp as _bindings

# Two cores of a Sapphire Rapids Xeon, 0.46B parameters, tiles against none: Q8_0 2.6 times the prompt tokens a second
# and 1.8 times the generated ones, Q4_K_M 1.15 and 1.1, Q5_K_M 1.05 and 1.0, Q3_K_M 1.13 and 1.08; Q6_K 0.8 and 0.8,
# F16 0.9 and 0.9.
_FASTER = {gguf.GGMLQuantizationType[n] for n in ("Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q5_K", "IQ4_XS")}
_SLOWER = {gguf.GGMLQuantizationType[n] for n in ("F16", "Q6_K")}


def tiles_work() -> bool:
    """Whether llama.cpp was compiled with the mended instructions (on a CPU with AMX).

    Version 1 of them, a day old when version 2 came, lost its tiles to whatever else used them in the same thread.
    """
    try:
        return ctypes.c_int.in_dll(_bindings._lib, "tsugiki_tiles").value >= 2
    except ValueError:  # not there
        return False


def tiles_pay(kinds: Iterable[int]) -> bool:
    """Whether more of a file's tensors (numbers of ggml's types) are multiplied faster in tiles than slower."""
    kinds = list(kinds)
    return sum(k in _FASTER for k in kinds) > sum(k in _SLOWER for k in kinds)
