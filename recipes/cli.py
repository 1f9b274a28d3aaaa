"""The command line: ``tsugiki …``. Every Makefile target calls one of these commands."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import tsugiki
from tsugiki.artifacts import read_json
from tsugiki.bases import load_bases
from tsugiki.errors import UserError
from tsugiki.progress import console

HELP = {"no_args_is_help": True, "rich_markup_mode": "rich"}
app = typer.Typer(help=tsugiki.__doc__, add_completion=False, pretty_exceptions_enable=False, **HELP)
recipe_app = typer.Typer(help="The staged recipe: domains, bases, runs.", **HELP)
adapt_app = typer.Typer(help="LoRA adaptation and the sweep over sample counts.", **HELP)
quantize_app = typer.Typer(help="GGUF files, quantization levels, the degradation check.", **HELP)
evaluate_app = typer.Typer(help="Scores of the files that ship.", **HELP)
app.add_typer(recipe_app, name="recipe")
app.add_typer(adapt_app, name="adapt")
app.add_typer(quantize_app, name="quantize")
app.add_typer(evaluate_app, name="evaluate")

DomainArgument = Annotated[str, typer.Argument(help="A domain's name, or its YAML.", show_default=False)]
BaseOption = Annotated[str, typer.Option("--base", help="A name from `tsugiki recipe list`, or a folder.")]
RunsOption = Annotated[Path, typer.Option("--runs", help="Where runs are kept.")]
DataOption = Annotated[
    Path | None,
    typer.Option("--data-dir", help="Folder of the domain's data (else $TSUGIKI_DATA, else ../shared/data)."),
]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="A setting, as key=value; may be repeated.")]


# --- recipe ---------------------------------------------------------------------------------------------------


@recipe_app.command("run")
def recipe_run(
    domain: DomainArgument,
    base: BaseOption = "tiny-llama",
    runs: RunsOption = Path("runs"),
    data_dir: DataOption = None,
    stages: Annotated[str, typer.Option(help="Stages to run, comma-separated; empty: all.")] = "",
    set_: SetOption = None,
) -> None:
    """Run the recipe: data → sweep → gguf → levels → check → evaluate → report. Finished stages are skipped."""
    from tsugiki.recipes.recipe import STAGES, open_run, run_recipe

    run = open_run(domain, base, runs=runs, data_dir=data_dir, changes=set_)
    wanted = tuple(s.strip() for s in stages.split(",") if s.strip()) or STAGES
    folder = run_recipe(run, wanted)
    if (folder / "summary.json").exists() and "report" in wanted:
        show_summary(folder)


@recipe_app.command("list")
def recipe_list() -> None:
    """List the domains, the bases and the settings that --set takes."""
    from tsugiki.recipes.domains import list_domains, load_domain
    from tsugiki.recipes.recipe import BASES, setting_names

    domains = _table("Domains", "domain", "title; score; samples from")
    for name, path in list_domains().items():
        domain = load_domain(path)
        source = domain.source
        domains.add_row(name, f"{' / '.join(domain.title.values())}; {domain.scoring}\n[dim]"
                        + escape(source.generator or source.hub or "\n".join(source.jsonl.values())) + "[/]")
    bases = _table("Bases", "base", "from; parameters; licence")
    for base in load_bases(BASES).values():
        size = f"{base.parameters / 1e9:.2f}B" if (base.parameters or 0) > 1e8 else f"{(base.parameters or 0) / 1e6:.1f}M"
        bases.add_row(base.name, escape("bundled" if base.path else f"{base.hub_id}{' (gated)' if base.gated else ''}")
                      + f"\n[dim]{size if base.parameters else 'unknown size'}; {escape(base.licence)}[/]")
    settings = _table("Settings", "--set", "default", "what")
    for key, setting in setting_names().items():
        default = setting.default
        text = ",".join(map(str, default)) if isinstance(default, tuple) else "null" if default is None else str(default)
        settings.add_row(key, escape(f"[{text}]" if isinstance(default, tuple) else text), escape(setting.metadata.get("help", "")))
    for table in (domains, bases, settings):
        _out().print(table)


@recipe_app.command("init")
def recipe_init(
    name: Annotated[str, typer.Argument(help="The new domain's name: a-z, 0-9, _ and -.", show_default=False)],
    file: Annotated[Path, typer.Option("--from", help="Your questions and answers: .jsonl, .json or .csv.", show_default=False)],
    base: BaseOption = "tiny-llama",
    prompt: Annotated[str, typer.Option(help="Field of the question; empty: by its name.")] = "",
    completion: Annotated[str, typer.Option(help="Field of the answer; empty: by its name.")] = "",
    document: Annotated[str, typer.Option(help="Field of the source document, which splits go by.")] = "",
    force: Annotated[bool, typer.Option(help="Replace a domain of that name.")] = False,
) -> None:
    """Write domains/NAME.yaml for your own data, after checking every row, and show what was found."""
    from transformers import AutoTokenizer

    from tsugiki.adapt.samples import FieldMapping
    from tsugiki.bases import resolve
    from tsugiki.recipes.domains import init_domain, show_found
    from tsugiki.recipes.recipe import BASES

    if bool(prompt) != bool(completion) or (document and not prompt):
        raise UserError("--prompt and --completion are named together, and --document with them")
    fields = FieldMapping(prompt, completion, document or None) if prompt else None
    tokenizer = AutoTokenizer.from_pretrained(resolve(base, load_bases(BASES)))
    found = init_domain(name, file, fields=fields, tokenizer=tokenizer, force=force)
    show_found(found)
    console.print(f"Next: [bold]tsugiki recipe run {name}[/]" + (f" --base {escape(base)}" if base != "tiny-llama" else ""))


@recipe_app.command("show")
def recipe_show(domain: DomainArgument, base: BaseOption = "tiny-llama", runs: RunsOption = Path("runs")) -> None:
    """Show a finished run: learning curve, levels, recommendation."""
    show_summary(_run_folder(runs, domain, base))


@recipe_app.command("report")
def recipe_report(
    domain: DomainArgument, base: BaseOption = "tiny-llama", runs: RunsOption = Path("runs"),
    data_dir: DataOption = None, set_: SetOption = None,
) -> None:
    """Write summary.json and report.html from the stages that have run."""
    _stage("report", domain, base, runs, data_dir, set_)


@recipe_app.command("tiny-bases")
def tiny_bases(
    corpus: Annotated[Path, typer.Option(help="Folder of text: .jsonl (text, or ja and en) and .txt.", show_default=False)],
    only: Annotated[str, typer.Option(help="Names, comma-separated; empty: all three.")] = "",
    out: Annotated[Path, typer.Option(help="Where the bases go; a clone's own are in recipes/bases.")] = Path("recipes/bases"),
    work: Annotated[Path, typer.Option(help="Tokenizers, token ids and checkpoints; delete to start over.")] = Path("work-bases"),
    tokens: Annotated[int, typer.Option(help="Training tokens of each base; 0: its own default.")] = 0,
) -> None:
    """Pre-train the bundled tiny bases from a folder of text (about 20 minutes each on two cores)."""
    import dataclasses

    from tsugiki.adapt.fit import device_name
    from tsugiki.recipes.pretrain import TINY_BASES, pretrain

    names = [n.strip() for n in only.split(",") if n.strip()] or list(TINY_BASES)
    unknown = [n for n in names if n not in TINY_BASES]
    if unknown:
        raise UserError(f"there is no tiny base {unknown[0]!r}", hint=f"They are {', '.join(TINY_BASES)}.")
    if not corpus.is_dir():
        raise UserError(f"there is no folder {corpus}", hint="Name a folder of text: --corpus DIR")
    for name in names:
        base = TINY_BASES[name]
        base = dataclasses.replace(base, tokens=tokens) if tokens else base
        pretrain(base, corpus, out / name, work / name, device=device_name())


# --- single stages --------------------------------------------------------------------------------------------


def _stage(name: str, domain: str, base: str, runs: Path, data_dir: Path | None, changes: list[str] | None) -> None:
    from tsugiki.recipes.recipe import open_run, run_recipe

    run_recipe(open_run(domain, base, runs=runs, data_dir=data_dir, changes=changes), (name,))


@recipe_app.command("data")
def recipe_data(
    domain: DomainArgument, base: BaseOption = "tiny-llama", runs: RunsOption = Path("runs"),
    data_dir: DataOption = None, set_: SetOption = None,
) -> None:
    """Read, check, split and encode a domain's samples."""
    _stage("data", domain, base, runs, data_dir, set_)


@adapt_app.command("sweep")
def adapt_sweep(
    domain: DomainArgument, base: BaseOption = "tiny-llama", runs: RunsOption = Path("runs"),
    data_dir: DataOption = None, set_: SetOption = None,
) -> None:
    """Train one adapter for each sample count and find the lowest test NLL."""
    _stage("sweep", domain, base, runs, data_dir, set_)


@quantize_app.command("gguf")
def quantize_gguf(
    domain: DomainArgument, base: BaseOption = "tiny-llama", runs: RunsOption = Path("runs"),
    data_dir: DataOption = None, set_: SetOption = None,
) -> None:
    """Write base and best adapter as one F16 GGUF and compare it with transformers."""
    _stage("gguf", domain, base, runs, data_dir, set_)


@quantize_app.command("levels")
def quantize_levels(
    domain: DomainArgument, base: BaseOption = "tiny-llama", runs: RunsOption = Path("runs"),
    data_dir: DataOption = None, set_: SetOption = None,
) -> None:
    """Quantize to every level and read back what was written."""
    _stage("levels", domain, base, runs, data_dir, set_)


@quantize_app.command("check")
def quantize_check(
    domain: DomainArgument, base: BaseOption = "tiny-llama", runs: RunsOption = Path("runs"),
    data_dir: DataOption = None, set_: SetOption = None,
) -> None:
    """Measure what each level lost against F16 on the same test ids."""
    _stage("check", domain, base, runs, data_dir, set_)


@evaluate_app.command("domain")
def evaluate_domain(
    domain: DomainArgument, base: BaseOption = "tiny-llama", runs: RunsOption = Path("runs"),
    data_dir: DataOption = None, set_: SetOption = None,
) -> None:
    """Score the base and the adapted model on the domain's test, by kind of item."""
    _stage("evaluate", domain, base, runs, data_dir, set_)


@evaluate_app.command("languages")
def evaluate_languages(
    model: Annotated[Path, typer.Argument(help="A base model's GGUF file.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder for chunks, languages.json and languages.csv.", show_default=False)],
    sequences: Annotated[int, typer.Option(help="Sequences of the whole run, all shards together.")] = 100_000,
    tokens: Annotated[int, typer.Option(help="Tokens of each sequence.")] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of the whole run.")] = 0,
    shard: Annotated[str, typer.Option(help="K/N: this machine's part; gather the chunks of all in one folder, run again without.")] = "1/1",
    width: Annotated[int, typer.Option(help="Sequences decoded together; fewer need less memory.")] = 32,
    reported: Annotated[str, typer.Option(help="For Kendall's tau: a row of Takase & Honda's table 3, or a JSON file of language → share.")] = "",
) -> None:
    """Estimate the languages of a base's training data from what it writes. Run again to go on."""
    from tsugiki.evaluate.languages import LanguageSettings, estimate_languages, parse_shard, read_distribution

    first, of = parse_shard(shard)
    settings = LanguageSettings(sequences, tokens, seed, first, of, width)
    show_languages(estimate_languages(model, settings, out, reported=read_distribution(reported) if reported else None))
    console.print(f"Written: {out / 'languages.json'}, {out / 'languages.csv'}")


@evaluate_app.command("scaling")
def evaluate_scaling(
    scores: Annotated[Path | None, typer.Option(help="Score matrix as CSV: model, one column a task, 0–1. None: the published one.", show_default=False)] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for scaling.html, scaling.json, figures/ and tables/; else scaling/ in the runs.", show_default=False)] = None,
    runs: RunsOption = Path("runs"),
    models: Annotated[Path | None, typer.Option(help="CSV of further models: size, tokens, family.", show_default=False)] = None,
    language: Annotated[str, typer.Option(help="Of the figures: ja or en. The page has both.")] = "ja",
    download: Annotated[bool, typer.Option(help="Fetch the public 35 × 19 matrix (pinned commit, checked) where no file is given.")] = False,
) -> None:
    """Score against compute: laws with honest intervals, the published models, and yours among them."""
    from tsugiki.evaluate.scaling.analysis import run_scaling
    from tsugiki.recipes.recipe import BASES

    out = out or runs / "scaling"
    result = run_scaling(scores, out, runs=runs, models=models, bases=load_bases(BASES), language=language,
                         download=download, say=lambda text: console.print(escape(text)))
    show_scaling(result)
    _out().print(f"Page: {escape(str(out / 'scaling.html'))}", soft_wrap=True)


@evaluate_app.command("budget")
def evaluate_budget(
    models: Annotated[list[str], typer.Argument(help="Names or hub ids, names of bases, or folders with a training.json.", show_default=False)],
    convention: Annotated[str, typer.Option(help="What counts where nobody reports it: printed, saito or takase.")] = "printed",
    table: Annotated[Path | None, typer.Option("--models", help="CSV of further models.", show_default=False)] = None,
) -> None:
    """Say how the training budgets of models came about, figure by figure."""
    from tsugiki.evaluate.scaling import budgets, tables
    from tsugiki.recipes.recipe import BASES

    known = tables.load_models() | (tables.load_models(table) if table else {})
    bases, rule = load_bases(BASES), budgets.convention(convention)
    for name in models:
        folder = bases[name].path if name in bases else Path(name)
        if folder is not None and (folder / "training.json").exists():
            model = budgets.from_folder(folder)
        else:
            model = budgets.named(bases[name].hub_id if name in bases else name, known)
        _out().print(escape(budgets.explain(model, known, rule)) + "\n", soft_wrap=True)


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
    table = _table(f"{file.name}: {found.level}, {found.bpw:.3f} bits/weight", "type", "tensors", "parameters", "MB", numbers=True)
    for name, part in found.types.items():
        table.add_row(name, str(part["tensors"]), f"{part['parameters']:,}", f"{part['bytes'] / 1e6:.2f}")
    _out().print(table)


# --- the finished model ---------------------------------------------------------------------------------------


@app.command()
def chat(
    domain: DomainArgument,
    level: Annotated[str, typer.Option(help="Which level to talk to; empty: the recommended one.")] = "",
    base: BaseOption = "tiny-llama",
    runs: RunsOption = Path("runs"),
    question: Annotated[str, typer.Option(help="Ask this one question and leave.")] = "",
    history: Annotated[bool, typer.Option(help="Keep the conversation; adapters trained on single questions do better without.")] = False,
    temperature: Annotated[float, typer.Option(min=0.0, max=2.0, help="0: always the most likely token.")] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer, tokens.")] = 256,
) -> None:
    """Talk to the finished model on this machine, through llama.cpp."""
    from tsugiki.evaluate.chat import answer
    from tsugiki.evaluate.engine import Engine

    path, system = _model_file(_run_folder(runs, domain, base), level)
    start = [{"role": "system", "content": system}] if system else []
    with Engine(path, n_seq_max=1, flash_attention=True) as engine:
        if question:
            _say(answer(engine, [*start, {"role": "user", "content": question}], max_new_tokens=max_new_tokens, temperature=temperature))
            return
        console.print(f"[dim]{escape(path.name)}. An empty line or Ctrl-D ends. / 空行で終了します。[/]")
        messages = list(start)
        while line := _ask():
            messages = [*(messages if history else start), {"role": "user", "content": line}]
            text = _say(answer(engine, messages, max_new_tokens=max_new_tokens, temperature=temperature))
            messages.append({"role": "assistant", "content": text})


def _ask() -> str:
    try:
        return console.input("[bold]> [/]").strip()
    except (EOFError, KeyboardInterrupt):
        console.print()
        return ""


def _say(pieces) -> str:
    text = ""
    for piece in pieces:
        text += piece
        print(piece, end="", flush=True)
    print()
    return text


@app.command()
def compare(
    domain: DomainArgument,
    base: BaseOption = "tiny-llama",
    runs: RunsOption = Path("runs"),
    question: Annotated[list[str] | None, typer.Option(help="A question; may be repeated. None: the report's examples.")] = None,
) -> None:
    """Put the same questions to every quantization level, side by side."""
    from tsugiki.evaluate.chat import answer
    from tsugiki.evaluate.engine import Engine

    folder = _run_folder(runs, domain, base)
    _, system = _model_file(folder, "F16")
    start = [{"role": "system", "content": system}] if system else []
    examples = read_json(folder / "evaluate" / "evaluate.json")["examples"] if (folder / "evaluate" / "evaluate.json").exists() else []
    references = {e["prompt"]: e["reference"] for e in examples}
    questions = question or list(references)
    if not questions:
        raise UserError("there is no question", hint="Give one with --question, or run the evaluate stage first.")
    made = folder / "levels" / "levels.json"
    levels = ["F16", *(row["level"] for row in (read_json(made)["levels"] if made.exists() else []))]
    answers: dict[str, list[str]] = {}
    for level in levels:
        with Engine(_model_file(folder, level)[0], n_seq_max=1, flash_attention=True) as engine:
            answers[level] = [
                "".join(answer(engine, [*start, {"role": "user", "content": q}], max_new_tokens=256)) for q in questions
            ]
    for i, q in enumerate(questions):
        table = _table(q, "level", "answer")
        if q in references:
            table.add_row("reference", escape(references[q]), style="green")
        for level in levels:
            table.add_row(level, escape(answers[level][i]))
        _out().print(table)


def _run_folder(runs: Path, domain: str, base: str) -> Path:
    from tsugiki.recipes.domains import check_name
    from tsugiki.recipes.recipe import BASES, folder_name

    name = base if base in load_bases(BASES) else folder_name(Path(base).expanduser().resolve())
    folder = runs / check_name(Path(domain).stem if domain.endswith((".yaml", ".yml")) else domain) / name
    if not folder.is_dir():
        raise UserError(f"there is no run of {domain} on {base} in {runs}/", hint=f"Run it first: tsugiki recipe run {domain} --base {base}")
    return folder


def _model_file(folder: Path, level: str) -> tuple[Path, str | None]:
    """The GGUF file of a level (empty: the recommended one) and the domain's system prompt."""
    level = level or (read_json(folder / "check" / "check.json")["recommended"]["level"] if (folder / "check" / "check.json").exists() else "F16")
    path = folder / "gguf" / "model-F16.gguf" if level == "F16" else folder / "levels" / f"model-{level}.gguf"
    if not path.exists():
        have = sorted(p.stem.removeprefix("model-") for p in folder.glob("*/model-*.gguf"))
        raise UserError(f"there is no level {level!r} in {folder}", hint=f"There is: {', '.join(have) or 'none yet; run the recipe'}")
    return path, read_json(folder / "data" / "data.json")["system"]


# --- output ---------------------------------------------------------------------------------------------------


def _out() -> Console:
    """Standard output; 120 columns wide where it is no terminal."""
    wide = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120
    return Console(highlight=False, width=wide)


def _table(title: str, *columns: str, numbers: bool = False) -> Table:
    """A plain table whose first column is never cut; other text is folded, and numbers stay whole."""
    table = Table(title=escape(title), title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    for i, name in enumerate(columns):
        table.add_column(name, no_wrap=numbers or i == 0, overflow="fold", justify="right" if numbers and i else "left")
    table.caption = " "  # an empty line after it
    return table


def show_summary(folder: Path) -> None:
    """Print a finished run: where the time went, the learning curve, the levels, the recommendation."""
    if not (folder / "summary.json").exists():
        raise UserError("this run has no summary yet", where=str(folder),
                        hint=f"Finish it: tsugiki recipe run {folder.parent.name} --base {folder.name}")
    summary = read_json(folder / "summary.json")
    out = _out()
    times = {p.parent.name: read_json(p)["seconds"] for p in folder.glob("*/stage.json")}
    out.print("time: " + ", ".join(f"{name} {s:.0f} s" for name, s in sorted(times.items(), key=lambda t: -t[1])))
    if summary["sweep"]:
        table = _table("Sweep", "samples", "test NLL", "95 % interval", "bits/char", "train tokens", "seconds", numbers=True)
        best = summary["sweep"]["optimum"]["n"]
        for p in summary["sweep"]["points"]:
            table.add_row(f"{p['n']:,}", f"{p['nll']:.4f}", f"{p['nll_ci'][0]:.4f} – {p['nll_ci'][1]:.4f}" if p["nll_ci"] else "–", _number(p["bpc"], ".3f"),
                          f"{p['train_tokens']:,}", f"{p['seconds']:.0f}", style="bold" if p["n"] == best else None)
        out.print(table)
    if summary["levels"]:
        # Two tables: twelve columns do not fit an ordinary terminal.
        table = _table("What each level lost", "level", "bits/w", "NLL", "ΔNLL", "KL", "top-1", "score", "verdict", numbers=True)
        cost = _table("What each level costs", "level", "MB", "prompt tok/s", "gen tok/s", "s/answer", "memory MB", numbers=True)
        for r in summary["levels"]:
            table.add_row(r["level"], _number(r["bpw"], ".2f"), _number(r["nll"], ".4f"), _number(r["delta_nll"], "+.4f"),
                          _number(r["kld_mean"], ".5f"), _number(r["top1"], ".1%"), _number(r["score"], ".3f"), r["verdict"])
            cost.add_row(r["level"], f"{r['bytes'] / 1e6:,.1f}", _number(r["prompt_tok_s"], ",.0f"), _number(r["gen_tok_s"], ",.0f"),
                         _number(r["seconds_per_answer"], ".3f"), _number(r["peak_rss"] and r["peak_rss"] / 1e6, ",.0f"))
        out.print(table)
        out.print(cost)
    before_after = [b for b in summary["benchmarks"] if b["model"] in ("base", "adapted")]
    if before_after:
        table = _table("Before and after", "task", "base", "adapted", "n", numbers=True)
        for task in dict.fromkeys(b["task"] for b in before_after):
            by = {b["model"]: b for b in before_after if b["task"] == task}
            table.add_row(task, *(f"{by[m]['value']:.3f}" if m in by else "" for m in ("base", "adapted")), str(next(iter(by.values()))["n"]))
        out.print(table)
    if summary["recommended"]:
        out.print(f"Take [bold]{summary['recommended']['level']}[/]: {escape(summary['recommended']['why'])}")
    out.print(f"Report: {escape(str(folder / summary['report']))}", soft_wrap=True)


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def show_languages(found: dict) -> None:
    """Print an estimate of :mod:`tsugiki.evaluate.languages`: the 12 largest languages and ``und``, in percent."""

    def percent(row: dict, key: str) -> str:
        if row[key] is None:
            return "–"
        ci = row.get(f"{key}_ci")
        return f"{100 * row[key]:.1f}" + (f" ({100 * ci[0]:.1f}–{100 * ci[1]:.1f})" if ci else "")

    out = Console(highlight=False)
    table = Table("%", "sequences", "tokens by line", "length-corrected", "bytes",
                  title=f"{found['model']}: {found['done']:,} of {found['sequences']:,} sequences of {found['tokens']:,} tokens from {found['start']['kind']}",
                  title_justify="left")
    for i, row in enumerate(found["languages"]):
        if row["language"] == "und" or (i < 12 and max(row["sequences"], row["tokens"]) >= 0.0005):
            table.add_row(row["language"], *(percent(row, k) for k in ("sequences", "tokens", "length_corrected", "bytes")))
    out.print(table)
    if found["length_correction"]:
        out.print(f"No length correction: {found['length_correction']}.")
    for k in found["kendall"]:
        tau = "undefined" if k["tau"] is None else f"{k['tau']:.2f}" + (f" ({k['ci'][0]:.2f} – {k['ci'][1]:.2f})" if k["ci"] else "")
        out.print(f"Kendall's {k['variant']} with {k['against']}, {k['of']} over {len(k['languages'])} languages ({', '.join(k['languages'])}): {tau}")


def show_scaling(result: dict) -> None:
    """Print the laws, the answer about continued pre-training, and where the user's models stand."""
    out = _out()
    table = _table("Score against compute", "score ~ budget", "n", "per decade", "95 % interval", "r", numbers=True)
    for law in result["laws"]:
        if "slope" in law:
            slope = law["slope"]
            interval = "–" if slope["low"] is None else f"{slope['low']:.2f} – {slope['high']:.2f}"
            table.add_row(f"{escape(law['name'])} ~ {law['axis']}", str(law["n"]), f"{slope['value']:.2f}", interval, f"{law['pearson']['value']:.2f}")
    out.print(table)
    for answer in result["efficiency"][:1]:
        out.print(escape(answer.get("sentence") or f"Continued pre-training, {answer['name']}: {answer['refused']}."))
    for point in result["yours"]:
        told = [q["sentence"] for q in point["placements"] if q["value"] is not None] or [q["sentence"] for q in point["placements"][:1]]
        if point["kind"] != "quantized" or any(q["value"] is not None for q in point["placements"]):
            for sentence in told:
                out.print(escape(sentence))
    for text in (*result["notes"], *result["warnings"]):
        out.print(f"[yellow]{escape(text)}[/]")


@app.callback(invoke_without_command=True)
def options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    if version:
        print(tsugiki.__version__)
        raise typer.Exit
    context.obj = {"debug": debug}
    if not debug:
        _quiet()


def _quiet() -> None:
    """Keep the libraries' notes to their developers, and the bars over a second's work, off the terminal; errors stay."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="(transformers|peft|trl|torch|accelerate|optuna)")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def main() -> None:
    """Run a command; exit 2 for the user's mistake, 1 for ours, 130 when interrupted."""
    try:
        app()
    except SystemExit as end:
        if end.code == 130:
            console.print("interrupted; run the same command again to go on")
        raise
    except UserError as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
        console.print(f"[bold red]error:[/] {escape(str(error))}")
        sys.exit(2)
    except Exception as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
        console.print(f"[bold red]internal error:[/] {escape(f'{type(error).__name__}: {error}')}")
        console.print("Run again with --debug in front of the command for the traceback, and report it.")
        sys.exit(1)
