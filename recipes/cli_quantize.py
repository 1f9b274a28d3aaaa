"""``tsugiki quantize …``: GGUF files, levels, the degradation check."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from tsugiki.bases import load_bases
from tsugiki.progress import console
from tsugiki.recipes.terminal import HELP, plain_table, stage_command, stdout

quantize_app = typer.Typer(help="GGUF files, quantization levels, the degradation check.", **HELP)
stage_command(quantize_app, "gguf", "gguf", "Write base and best adapter as one F16 GGUF and compare it with transformers.")
stage_command(quantize_app, "levels", "levels", "Quantize to every level and read back what was written.")
stage_command(quantize_app, "check", "check", "Measure what each level lost against F16 on the same test ids.")


@quantize_app.command("convert")
def quantize_convert(
    base: Annotated[str, typer.Option("--base", help="A name from `tsugiki recipe list`, or a folder.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The GGUF file to write.", show_default=False)],
    adapter: Annotated[Path | None, typer.Option(help="Folder of a PEFT LoRA adapter.")] = None,
    dtype: Annotated[str, typer.Option(help="f16, bf16 or f32.")] = "f16",
) -> None:
    """Convert a base, with an adapter or without, to GGUF."""
    from tsugiki.bases import resolve
    from tsugiki.quantize.convert import convert
    from tsugiki.recipes.recipe import BASES

    bases = load_bases(BASES)
    written = convert(resolve(base, bases), out, adapter, dtype=dtype, licence=bases[base].licence if base in bases else None)
    console.print(f"{escape(str(out))}: {written.bytes / 1e6:,.1f} MB, {written.tensors} tensors, {written.merged} changed by the adapter")


@quantize_app.command("types")
def quantize_types(file: Annotated[Path, typer.Argument(help="A GGUF file.", show_default=False)]) -> None:
    """Show the types that a GGUF file really holds, and its effective bits per weight."""
    from tsugiki.quantize.levels import read_types

    found = read_types(file)
    table = plain_table(f"{file.name}: {found.level}, {found.bpw:.3f} bits/weight", "type", "tensors", "parameters", "MB", numbers=True)
    for name, part in found.types.items():
        table.add_row(name, str(part["tensors"]), f"{part['parameters']:,}", f"{part['bytes'] / 1e6:.2f}")
    stdout().print(table)
