"""``tsugiki quantize …``: GGUF files, levels, the degradation check."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from rich.markup import escape

from tsugiki.bases import Base, load_bases, resolve
from tsugiki.errors import UserError
from tsugiki.progress import console
from tsugiki.recipes.cli_levels import add_commands
from tsugiki.recipes.terminal import (
    HELP,
    BaseOption,
    DataOption,
    RunsOption,
    SetOption,
    plain_table,
    stage_command,
    stdout,
)

quantize_app = typer.Typer(help="GGUF files, quantization levels, the degradation check.", **HELP)
stage_command(quantize_app, "gguf", "gguf", "Write base and best adapter as one F16 GGUF and compare it with transformers.")
add_commands(quantize_app)


@contextmanager
def base_with_template(base: str) -> Iterator[tuple[Path, Base | None]]:
    """The base's folder and, where it has a name, its entry; one that ``bases.yaml`` says has no chat template gets its family's."""
    from tsugiki.chat import supply_template
    from tsugiki.recipes.recipe import BASES

    bases = load_bases(BASES)
    folder, known = resolve(base, bases), bases.get(base)
    with TemporaryDirectory(prefix="tsugiki-base-") as temporary:
        if known and known.chat_template == "supplied":
            folder = supply_template(folder, known.family, Path(temporary) / "base")
        yield folder, known


@quantize_app.command("convert")
def quantize_convert(
    base: Annotated[str, typer.Option("--base", help="A name from `tsugiki recipe list`, or a folder.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The GGUF file to write.", show_default=False)],
    adapter: Annotated[Path | None, typer.Option(help="Folder of a PEFT LoRA adapter.")] = None,
    dtype: Annotated[str, typer.Option(help="f16, bf16 or f32.")] = "f16",
    lora_only: Annotated[bool, typer.Option("--lora-only", help="Write the adapter alone, for llama.cpp's --lora.")] = False,
    tokenizer: Annotated[Path | None, typer.Option(help="Folder of another tokenizer (and chat template) with the same ids; none: the one beside the adapter, else the base's.")] = None,
    name: Annotated[str, typer.Option(help="The model's name in the file; empty: the base's folder.")] = "",
    licence: Annotated[str, typer.Option(help="The model's licence in the file; empty: the base's.")] = "",
    dataset: Annotated[list[str] | None, typer.Option(help="A data set it was trained on; may be repeated.")] = None,
) -> None:
    """Convert a base, with an adapter or without, to GGUF."""
    from tsugiki.quantize.convert import convert, convert_lora

    if lora_only and adapter is None:
        raise UserError("--lora-only writes an adapter, and none is named", hint="Add --adapter DIR.")
    with base_with_template(base) as (folder, known):
        if lora_only:
            written = convert_lora(folder, out, adapter, dtype=dtype, name=name or None)
            console.print(f"{escape(str(out))}: {written.bytes / 1e6:,.1f} MB, {written.merged} updates, for a GGUF of {escape(base)}")
        else:
            told = {"licence": known.licence, "languages": known.languages, "base_model": known.hub_id or known.name} if known else {}
            if licence:
                told["licence"] = licence
            written = convert(folder, out, adapter, dtype=dtype, name=name or (known.name if known else None), datasets=dataset or (),
                              tokenizer_dir=tokenizer, **told)
            console.print(f"{escape(str(out))}: {written.bytes / 1e6:,.1f} MB, {written.tensors} tensors, {written.merged} changed by the adapter")
    for tensor, kind in written.wide.items():
        console.print(f"  {escape(tensor)}: beyond the range of {dtype}, written as {kind}")
    for note in written.notes:
        console.print(f"  [yellow]{escape(note)}[/]")


@quantize_app.command("parity")
def quantize_parity(
    file: Annotated[Path, typer.Argument(help="The F16 GGUF.", show_default=False)],
    base: Annotated[str, typer.Option("--base", help="What it was made from: a name, or a folder.", show_default=False)],
    adapter: Annotated[Path | None, typer.Option(help="The adapter in it.")] = None,
    text: Annotated[Path | None, typer.Option(help="The domain's text, one a line; .jsonl: prompt and completion. None: sample sentences.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Folder of the tokenizer that it was converted with, where one was named.")] = None,
    json_out: Annotated[Path | None, typer.Option("--json", help="Where to write the result.")] = None,
) -> None:
    """Prove that a GGUF is the model it was made from: token ids, chat template, BOS, end of turn, logits."""
    from tsugiki.artifacts import write_json
    from tsugiki.quantize.gate import check_gate, gate, read_texts

    with base_with_template(base) as (folder, _):
        found = gate(file, folder, adapter, texts=read_texts(text), tokenizer_dir=tokenizer)
    if json_out:
        write_json(json_out, found)
    show_gate(file, found)
    check_gate(found)


def show_gate(file: Path, found: dict) -> None:
    """Print what the parity gate compared."""
    table = plain_table(f"{file.name} against transformers", "texts", "number", "same ids", "unknown", "unexplained", numbers=True)
    for group, n in found["ids"]["groups"].items():
        table.add_row(group, f"{n['texts']:,}", f"{n['rate']:.2%}", str(n["unknown"]), str(n["unexplained"]))
    stdout().print(table)
    rendering, logits = found["templates"], found["logits"]
    stdout().print(f"chat template: {rendering['identical']} of {rendering['conversations']} conversations rendered alike")
    stdout().print("end of turn: " + {True: "llama.cpp stops there", False: "llama.cpp does NOT stop there", None: "no chat template"}[found["stops"]])
    if logits:
        stdout().print(f"logits: KL {logits['kl_mean']:.1e} nats/token over {logits['tokens']:,} tokens, top-1 {logits['top1']:.2%}")
    for note in found["notes"]:
        stdout().print(f"note: {escape(note)}", soft_wrap=True)


@quantize_app.command("types")
def quantize_types(file: Annotated[Path, typer.Argument(help="A GGUF file.", show_default=False)]) -> None:
    """Show the types that a GGUF file really holds, and its effective bits per weight."""
    from tsugiki.quantize.levels import read_types

    found = read_types(file)
    table = plain_table(f"{file.name}: {found.level}, {found.bpw:.3f} bits/weight", "type", "tensors", "parameters", "MB", numbers=True)
    for name, part in found.types.items():
        table.add_row(name, str(part["tensors"]), f"{part['parameters']:,}", f"{part['bytes'] / 1e6:.2f}")
    stdout().print(table)


# --- the check ------------------------------------------------------------------------------------------------


@quantize_app.command("check")
def quantize_check(
    what: Annotated[list[str], typer.Argument(help="A domain (its stage of the recipe), or REFERENCE.gguf LEVEL.gguf …", show_default=False)],
    samples: Annotated[Path | None, typer.Option(help="Questions, .jsonl: prompt, completion, document; or a run's data/test.jsonl.")] = None,
    text: Annotated[list[str] | None, typer.Option(help="Plain text, NAME=FILE or NAME=FOLDER of .txt; may be repeated.")] = None,
    model: Annotated[str | None, typer.Option(help="The base in Hugging Face form: attribute the loss step by step.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="Its PEFT adapter, for the same.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for check.json.")] = None,
    scoring: Annotated[str, typer.Option(help="Score of the answers.")] = "exact_match",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    items: Annotated[int | None, typer.Option(min=1, help="At most so many questions.")] = None,
    windows: Annotated[int | None, typer.Option(min=1, help="At most so many windows of each text.")] = None,
    window: Annotated[int, typer.Option(min=4, help="Tokens of a window, the second half scored.")] = 512,
    cache: Annotated[bool, typer.Option(help="Also measure quantized keys and values in the cache.")] = False,
    memory: Annotated[float | None, typer.Option(help="GB that the comparison may take (default: 0.8 of what is free).")] = None,
    margin_nll: Annotated[float | None, typer.Option(help="A level may cost so much, nats/token.")] = None,
    margin_score: Annotated[float | None, typer.Option(help="A level may lose so much of the mean score.")] = None,
    base: BaseOption = "tiny-llama",
    runs: RunsOption = Path("runs"),
    data_dir: DataOption = None,
    set_: SetOption = None,
) -> None:
    """Measure what each level lost against F16, on the same token ids, and judge it."""
    if not any(w.endswith(".gguf") for w in what):
        from tsugiki.recipes.recipe import open_run, run_recipe

        options = {"--samples": samples, "--text": text, "--model": model, "--adapter": adapter, "--out": out}
        given = [name for name, value in options.items() if value]
        if len(what) > 1 or given:
            raise UserError(f"{' '.join([*what, *given])}: a domain is checked alone, files are named *.gguf",
                            hint="tsugiki quantize check DOMAIN, or tsugiki quantize check F16.gguf LEVEL.gguf … --samples FILE")
        run_recipe(open_run(what[0], base, runs=runs, data_dir=data_dir, changes=set_), ("check",))
        return
    from tsugiki.quantize.standalone import CheckFiles, check_files
    from tsugiki.recipes.recipe import BASES

    chosen = {k: v for k, v in (("margin_nll", margin_nll), ("margin_score", margin_score)) if v is not None}
    found = check_files(
        CheckFiles(
            reference=Path(what[0]), levels=tuple(map(Path, what[1:])), samples=samples, texts=tuple(text or ()), adapter=adapter,
            model=resolve(model, load_bases(BASES)) if model else None, scoring=scoring, max_new_tokens=max_new_tokens,
            items=items, windows=windows, window=window, cache=cache, memory=int(memory * 1e9) if memory else None,
            margins=chosen,
        ),
        out,
    )
    show_check(found)
    if out:
        console.print(f"{escape(str(out / 'check.json'))}")


@quantize_app.command("claim")
def quantize_claim(
    base: Annotated[str, typer.Option("--base", help="A name from `tsugiki recipe list`, or a folder.", show_default=False)],
    samples: Annotated[Path, typer.Option(help="Questions, .jsonl: prompt, completion, document.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder for the files, parity.json and check.json.", show_default=False)],
    adapter: Annotated[Path | None, typer.Option(help="Folder of a PEFT LoRA adapter.")] = None,
    level: Annotated[str, typer.Option(help="llama.cpp's names, comma-separated.")] = "Q4_K_M",
    imatrix: Annotated[Path | None, typer.Option(help="Importance matrix for the levels.")] = None,
    items: Annotated[int | None, typer.Option(min=1, help="At most so many questions.")] = None,
    scoring: Annotated[str, typer.Option(help="Score of the answers.")] = "exact_match",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
) -> None:
    """Measure a published claim about a level again: base → F16, proven the same → level → what it lost on your questions."""
    from tsugiki.quantize.claim import measure_claim

    levels = [n.strip() for n in level.split(",") if n.strip()]
    with base_with_template(base) as (folder, known):
        told = {"name": known.name, "licence": known.licence, "languages": known.languages, "base_model": known.hub_id or known.name} if known else {}
        proof, found = measure_claim(folder, samples, out, adapter=adapter, levels=levels, imatrix=imatrix, told=told, items=items,
                                     scoring=scoring, max_new_tokens=max_new_tokens)
    show_gate(out / "model-F16.gguf", proof)
    show_check(found)
    console.print(f"{escape(str(out / 'check.json'))}")


@quantize_app.command("profile")
def quantize_profile(
    file: Annotated[Path, typer.Argument(help="A GGUF file.", show_default=False)],
    text: Annotated[list[str] | None, typer.Option(help="Plain text: measure quantized keys and values in the cache on it.")] = None,
    windows: Annotated[int, typer.Option(min=1, help="At most so many windows of 512 tokens.")] = 16,
    out: Annotated[Path | None, typer.Option(help="A JSON file to write.")] = None,
) -> None:
    """Show what a GGUF file is built of, and what that makes worth probing."""
    from tsugiki.quantize.standalone import profile_file

    found = profile_file(file, tuple(text or ()), windows=windows, out=out)
    show_profile(found)


def show_check(found: dict) -> None:
    """Print a check: the domain's and each text's levels, the steps, the cache, and which file to take."""
    out = stdout()
    parts = {"domain": found} if any("score" in r for r in found["levels"]) else {}
    for name, part in (parts | found["texts"]).items():
        scored = "score" in part["levels"][0]
        title = f"{name}: {part['samples']:,} {'samples' if scored else 'windows'}, {part['tokens']:,} tokens, {part['documents']:,} documents"
        table = plain_table(title, "level", "MB", "NLL", "ΔNLL", "interval", "KL mean", "p99", "max", "top-1", "top-5", "verdict", numbers=True)
        for r in part["levels"]:
            table.add_row(r["level"], f"{r['bytes'] / 1e6:,.1f}", f"{r['nll']:.4f}", f"{r['delta_nll']:+.4f}", _interval(r["delta_ci"], 4),
                          f"{r['kld_mean']:.5f}", f"{r['kld_p99']:.4f}", f"{r['kld_max']:.3f}", f"{r['top1']:.1%}", f"{r['top5']:.1%}", r["verdict"])
        out.print(table)
        if scored:
            table = plain_table(f"{name}: answers", "level", "score", "Δscore", "interval", "→wrong", "→right", "changed", "token/s", numbers=True)
            for r in part["levels"]:
                table.add_row(r["level"], f"{r['score']:.3f}", f"{r['delta_score']:+.3f}", _interval(r["delta_score_ci"], 3), str(r["flips"]["to_wrong"]),
                              str(r["flips"]["to_right"]), str(r["changed"]), f"{r['gen_tok_s']:.0f}")
            out.print(table)
    steps = found["attribution"]
    if steps and "left_out" in steps:
        out.print(f"steps not measured: {escape(steps['left_out'])}", soft_wrap=True)
    elif steps:
        table = plain_table(f"steps: {steps['samples']:,} samples, {steps['tokens']:,} tokens; the largest is {steps['largest']}",
                            "step", "after", "NLL", "ΔNLL", "interval", "KL mean", "max", "top-1", numbers=True)
        for r in steps["steps"]:
            table.add_row(r["step"], r["before"] or "", f"{r['nll']:.5f}", f"{r['delta_nll']:+.5f}", _interval(r["delta_ci"], 5),
                          f"{r['kld_mean']:.2e}", f"{r['kld_max']:.2e}", f"{r['top1']:.1%}")
        out.print(table)
    if found["cache"]:
        _show_cache(found["cache"]["rows"], found["cache"]["file"])
    for probe in found["profile"]["probes"] if found["profile"]["outlying"] else []:
        if probe["what"] == "KV cache, keys":
            out.print(f"[bold]warning[/]: {escape(probe['why'])}", soft_wrap=True)
    for r in found["levels"]:
        out.print(f"{r['level']}: {escape(r['why']['en'])}", soft_wrap=True)
    out.print(f"take [bold]{found['recommended']['level']}[/]: {escape(found['recommended']['why']['en'])}", soft_wrap=True)


def show_profile(found: dict) -> None:
    """Print the profile of a file: what it is, what to probe, what quantized cache types cost."""
    model, out = found["model"], stdout()
    table = plain_table(found["file"], "what", "value")
    biases = {k: f"{min(v):.1f} to {max(v):.1f}" for k, v in found["bias_norms"].items()}
    rows = {
        "architecture": model["architecture"],
        "parameters": f"{model['parameters']:,}" + (f", {model['experts']} experts" if model["experts"] else ""),
        "attention": f"{found['attention']}, {model['heads']} query and {model['kv_heads']} key-value heads of {model['head_dim']}",
        "QKV bias": "norms by layer: " + ", ".join(f"{k} {v}" for k, v in biases.items()) if model["qkv_bias"] else "no",
        "qk-norm": "yes" if model["qk_norm"] else "no",
        "embeddings": "tied" if model["tied_embeddings"] else "untied",
        "rows": "all divisible by 256" if model["rows_256"] else "not divisible by 256: " + ", ".join(model["odd_rows"]),
        "types": ", ".join(f"{n} × {t}" for t, n in found["types"].items()),
    }
    for key, value in rows.items():
        table.add_row(key, escape(str(value)))
    out.print(table)
    table = plain_table("worth probing", "what", "why")
    for probe in found["probes"]:
        table.add_row(probe["what"], escape(probe["why"]))
    out.print(table)
    if found["cache"]:
        _show_cache(found["cache"], found["file"])


def _show_cache(rows: list[dict], file: str) -> None:
    table = plain_table(f"KV cache of {file}", "keys", "values", "NLL", "ΔNLL", "KL mean", "p99", "max", "top-1", numbers=True)
    for r in rows:
        table.add_row(r["keys"], r["values"], f"{r['nll']:.4f}", f"{r['delta_nll']:+.4f}", f"{r['kld_mean']:.5f}", f"{r['kld_p99']:.4f}",
                      f"{r['kld_max']:.3f}", f"{r['top1']:.1%}")
    stdout().print(table)


def _interval(ci: list | None, digits: int) -> str:
    return "–" if ci is None else f"{ci[0]:+.{digits}f} {ci[1]:+.{digits}f}"
