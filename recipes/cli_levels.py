"""``tsugiki quantize imatrix | levels | sensitivity | repair``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from tsugiki.artifacts import write_json, write_text
from tsugiki.errors import UserError
from tsugiki.progress import console
from tsugiki.recipes.terminal import BaseOption, DataOption, RunsOption, SetOption, plain_table, stdout

F16Argument = Annotated[Path, typer.Argument(help="The F16, BF16 or F32 GGUF.", show_default=False)]
ImatrixOption = Annotated[Path | None, typer.Option("--imatrix", help="Importance matrix, from `tsugiki quantize imatrix` or llama-imatrix.")]
ThreadsOption = Annotated[int | None, typer.Option("--threads", help="CPU threads.")]
GpuOption = Annotated[int, typer.Option("--gpu-layers", help="Layers on the GPU (all: -1).")]


def add_commands(app: typer.Typer) -> None:
    """Add this page's commands to ``tsugiki quantize``."""
    app.command("levels")(quantize_levels)
    app.command("imatrix")(quantize_imatrix)
    app.command("sensitivity")(quantize_sensitivity)
    app.command("repair")(quantize_repair)


def quantize_levels(
    what: Annotated[str, typer.Argument(help="A domain (its stage of the recipe), or an F16 .gguf file.", show_default=False)],
    levels: Annotated[str, typer.Option(help="With a file: llama.cpp's names, comma-separated.")] = "",
    out: Annotated[Path | None, typer.Option(help="With a file: the folder to write to.")] = None,
    imatrix: ImatrixOption = None,
    threads: ThreadsOption = None,
    base: BaseOption = "tiny-llama",
    runs: RunsOption = Path("runs"),
    data_dir: DataOption = None,
    set_: SetOption = None,
) -> None:
    """Quantize to every level and read back what was written."""
    if not what.endswith(".gguf"):
        if levels or out or imatrix:
            raise UserError(f"{what}: --levels, --out and --imatrix go with a .gguf file", hint="For a domain: --set levels=[Q4_K_M,Q6_K]")
        from tsugiki.recipes.recipe import open_run, run_recipe

        run_recipe(open_run(what, base, runs=runs, data_dir=data_dir, changes=set_), ("levels",))
        return
    from tsugiki.quantize.levels import file_type, make_level

    names = [n.strip() for n in levels.split(",") if n.strip()] or ["Q4_K_M"]
    for name in names:
        file_type(name)
    table = plain_table(Path(what).name, "level", "MB", "bits/weight", "types", numbers=True)
    stem = Path(what).stem.removesuffix("-F16").removesuffix("-f16").removesuffix("-BF16")
    for name in names:
        made = make_level(what, name, (out or Path(what).parent) / f"{stem}-{name}.gguf", imatrix=imatrix, n_threads=threads)
        types = ", ".join(f"{part['tensors']} × {kind}" for kind, part in made.types.items())
        table.add_row(name, f"{made.bytes / 1e6:,.2f}", f"{made.bpw:.3f}", types)
        if made.fallbacks:
            first = made.fallbacks[0]
            console.print(f"[yellow]{name}: {len(made.fallbacks)} matrices in another type, first {first['name']} "
                          f"(rows of {first['row']}): {first['type']}[/]")
    stdout().print(table)


def quantize_imatrix(
    model: F16Argument,
    out: Annotated[Path, typer.Option(help="The file to write.", show_default=False)],
    domain_data: Annotated[Path | None, typer.Option(help="Training data: encoded samples, .jsonl of text or of prompt and completion, or text.")] = None,
    general: Annotated[list[Path] | None, typer.Option(help="General text, .txt or .jsonl; may be repeated.")] = None,
    ratio: Annotated[float, typer.Option(help="Share of the tokens that come from the domain.")] = 0.5,
    tokens: Annotated[int, typer.Option(help="Tokens in all.")] = 32_768,
    chunk: Annotated[int, typer.Option(help="Tokens of a piece of plain text.")] = 512,
    output: Annotated[bool, typer.Option("--process-output/--no-process-output", help="Also for the output matrix.")] = True,
    threads: ThreadsOption = None,
    gpu_layers: GpuOption = 0,
) -> None:
    """Collect an importance matrix on domain and general text, in llama.cpp's format."""
    from tsugiki.quantize.imatrix import make_imatrix

    found = make_imatrix(model, out, domain=domain_data, general=general or (), ratio=ratio, tokens=tokens, chunk=chunk,
                         output=output, n_threads=threads, n_gpu_layers=gpu_layers)
    unused = sum(int((c == 0).sum()) for c in found.counts.values())
    console.print(f"{escape(str(out))}: {len(found.sums)} matrices, {int(max(c.max() for c in found.counts.values())):,} tokens"
                  + (f", [yellow]{unused} experts never used[/]" if unused else ""))


def quantize_sensitivity(
    model: F16Argument,
    samples: Annotated[Path, typer.Option(help="Encoded samples, or text.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder for sensitivity.json and sensitivity.html.", show_default=False)],
    imatrix: ImatrixOption = None,
    low: Annotated[str, typer.Option(help="The type that one group at a time is lowered to.")] = "Q3_K",
    tokens: Annotated[int, typer.Option(help="Scored tokens of one pass.")] = 4096,
    blocks: Annotated[int | None, typer.Option(help="Runs of layers that are measured together (0: each matrix alone).")] = None,
    threads: ThreadsOption = None,
    gpu_layers: GpuOption = 0,
) -> None:
    """Measure which tensors bear quantization badly: KL against F16 with one group of them lowered."""
    from tsugiki.quantize.sensitivity import heat_page, sensitivity

    found = sensitivity(model, samples, imatrix=imatrix, low=low, tokens=tokens, blocks=blocks,
                        cache=out / ".sensitivity.jsonl", n_threads=threads, n_gpu_layers=gpu_layers)
    write_json(out / "sensitivity.json", found)
    write_text(out / "sensitivity.html", heat_page(found))
    table = plain_table(f"KL with one group at {low}, nats/token on {found['tokens']:,} tokens", "group", "KL", "share", "weights", numbers=True)
    for row in sorted(found["rows"], key=lambda r: -r["kl"])[:15]:
        table.add_row(row["name"], f"{row['kl']:.2e}", f"{row['kl'] / max(found['sum'], 1e-30):.1%}", f"{row['parameters']:,}")
    stdout().print(table)
    console.print(f"{len(found['rows'])} groups, {found['passes']} passes in {found['seconds']:.0f} s; all groups at once {found['all']:.2e}, "
                  f"sum {found['sum']:.2e}; {escape(str(out / 'sensitivity.html'))}")


def quantize_repair(
    model: F16Argument,
    calib: Annotated[Path, typer.Option(help="Samples or text that the choice is made on.", show_default=False)],
    heldout: Annotated[Path, typer.Option(help="Others, that the file is judged on.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The GGUF to write.", show_default=False)],
    base_level: Annotated[str, typer.Option(help="The level to repair.")] = "Q4_K_M",
    budget: Annotated[str, typer.Option(help="same (no more bytes than the level), +MB, bpw:X, or smallest.")] = "same",
    imatrix: ImatrixOption = None,
    tokens: Annotated[int, typer.Option(help="Scored calibration tokens of one pass.")] = 4096,
    held_tokens: Annotated[int, typer.Option(help="Scored held-out tokens.")] = 16_384,
    rounds: Annotated[int, typer.Option(help="Rounds of measurement around the choice.")] = 0,
    blocks: Annotated[int | None, typer.Option(help="Runs of layers that get their type together (0: each matrix alone).")] = None,
    types: Annotated[str, typer.Option(help="Types that tensors may get, comma-separated; empty: K-quants, IQ4_XS, IQ3, IQ2 and Q8_0.")] = "",
    margin: Annotated[float, typer.Option(help="What the smallest file may lose, nats/token.")] = 0.05,
    json: Annotated[Path | None, typer.Option(help="A JSON file to write the result to.")] = None,
    threads: ThreadsOption = None,
    gpu_layers: GpuOption = 0,
) -> None:
    """Give a level's bytes to the tensors that need them; never worse than the level on held-out samples."""
    from tsugiki.quantize.repair import KINDS, RepairSettings, repair

    kinds = tuple(k.strip() for k in types.split(",") if k.strip()) or KINDS
    found = repair(model, out, calib=calib, heldout=heldout, base_level=base_level, imatrix=imatrix, budget=budget, settings=RepairSettings(
        tokens=tokens, held_tokens=held_tokens, rounds=rounds, blocks=blocks, types=kinds, margin=margin, n_threads=threads, n_gpu_layers=gpu_layers))
    if json:
        write_json(json, asdict(found))
    show_repair(found)


def show_repair(found) -> None:
    """Print a repair: both files side by side, what changed, and the sentence."""
    table = plain_table(f"{found.base_level}, held-out samples: {found.held_tokens:,} tokens", "file", "MB", "bits/weight", "KL", "NLL", numbers=True)
    table.add_row("F16", "", "", "", f"{found.nll_f16:.4f}")
    table.add_row("stock", f"{found.stock_bytes / 1e6:,.2f}", f"{found.stock_bpw:.3f}", f"{found.stock_kl:.5f}", f"{found.stock_nll:.4f}")
    table.add_row(found.kept, f"{found.bytes / 1e6:,.2f}", f"{found.bpw:.3f}", f"{found.kl:.5f}", f"{found.nll:.4f}")
    stdout().print(table)
    moves: dict[tuple[str, str], list[str]] = {}
    for name, (old, new) in found.changed.items():
        moves.setdefault((old, new), []).append(name.removesuffix(".weight").removeprefix("blk."))
    if moves:
        table = plain_table("types changed", "from", "to", "tensors")
        for (old, new), names in sorted(moves.items()):
            table.add_row(old, new, escape(", ".join(names)))
        stdout().print(table)
    ci = f" (95 % {100 * found.reduction_ci[0]:.0f} to {100 * found.reduction_ci[1]:.0f} %)" if found.reduction_ci and found.reduction > 0 else ""
    stdout().print(escape(found.why["en"]) + ci, soft_wrap=True)
    console.print(f"{found.groups} groups, {found.passes} passes of {found.tokens:,} tokens, {found.seconds:.0f} s; {escape(found.path)}")
