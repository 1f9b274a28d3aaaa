"""The command line: ``tsugiki …``. Every Makefile target calls one of these commands."""

from __future__ import annotations

import os
import signal
import sys
import traceback
import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

import tsugiki
from tsugiki.adapt.processes import is_first_process
from tsugiki.artifacts import read_json, refusal
from tsugiki.bases import load_bases
from tsugiki.errors import UserError
from tsugiki.progress import console
from tsugiki.recipes.cli_adapt import adapt_app
from tsugiki.recipes.cli_evaluate import evaluate_app
from tsugiki.recipes.cli_quantize import quantize_app
from tsugiki.recipes.terminal import (
    HELP,
    BaseOption,
    DataOption,
    DomainArgument,
    RayOption,
    RunsOption,
    SetOption,
    number_text,
    plain_table,
    stage_command,
    stdout,
)

app = typer.Typer(help=tsugiki.__doc__, add_completion=False, pretty_exceptions_enable=False, **HELP)
recipe_app = typer.Typer(help="The staged recipe: domains, bases, runs.", **HELP)
app.add_typer(recipe_app, name="recipe")
app.add_typer(adapt_app, name="adapt")
app.add_typer(quantize_app, name="quantize")
app.add_typer(evaluate_app, name="evaluate")
stage_command(recipe_app, "data", "data", "Read, check, split and encode a domain's samples.")
stage_command(recipe_app, "report", "report", "Write summary.json, report.html and model-card.md from the stages that have run.")

# --- recipe ---------------------------------------------------------------------------------------------------


@recipe_app.command("run")
def recipe_run(
    domain: DomainArgument,
    base: BaseOption = "tiny-llama",
    runs: RunsOption = Path("runs"),
    data_dir: DataOption = None,
    stages: Annotated[str, typer.Option(help="Stages to run, comma-separated; empty: all.")] = "",
    set_: SetOption = None,
    ray: RayOption = None,
) -> None:
    """Run the recipe: data → sweep → gguf → levels → check → evaluate → report. Finished stages are skipped."""
    from tsugiki.cluster import connected
    from tsugiki.recipes.recipe import STAGES, open_run, run_recipe

    run = open_run(domain, base, runs=runs, data_dir=data_dir, changes=set_)
    wanted = tuple(s.strip() for s in stages.split(",") if s.strip()) or STAGES
    with connected(ray):
        folder = run_recipe(run, wanted)
    if (folder / "summary.json").exists() and "report" in wanted:
        show_summary(folder)


@recipe_app.command("list")
def recipe_list() -> None:
    """List the domains, the bases and the settings that --set takes."""
    from tsugiki.recipes.domains import list_domains, load_domain
    from tsugiki.recipes.recipe import BASES, setting_names

    domains = plain_table("Domains", "domain", "title; score; samples from")
    for name, path in list_domains().items():
        domain = load_domain(path)
        source = domain.source
        domains.add_row(name, f"{' / '.join(domain.title.values())}; {domain.scoring}\n[dim]"
                        + escape(source.generator or source.hub or "\n".join(source.jsonl.values())) + "[/]")
    bases = plain_table("Bases", "base", "from; parameters; licence")
    for base in load_bases(BASES).values():
        size = f"{base.parameters / 1e9:.2f}B" if (base.parameters or 0) > 1e8 else f"{(base.parameters or 0) / 1e6:.1f}M"
        bases.add_row(base.name, escape("bundled" if base.path else f"{base.hub_id}{' (gated)' if base.gated else ''}")
                      + f"\n[dim]{size if base.parameters else 'unknown size'}; {escape(base.licence)}[/]")
    settings = plain_table("Settings", "--set", "default", "what")
    for key, setting in setting_names().items():
        default = setting.default
        text = ",".join(map(str, default)) if isinstance(default, tuple) else "null" if default is None else str(default)
        settings.add_row(key, escape(f"[{text}]" if isinstance(default, tuple) else text), escape(setting.metadata.get("help", "")))
    for table in (domains, bases, settings):
        stdout().print(table)


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
    from tsugiki.adapt.samples import FieldMapping
    from tsugiki.bases import resolve
    from tsugiki.recipes.domains import init_domain, show_found
    from tsugiki.recipes.recipe import BASES
    from tsugiki.tokenizers import load_tokenizer

    if bool(prompt) != bool(completion) or (document and not prompt):
        raise UserError("--prompt and --completion are named together, and --document with them")
    fields = FieldMapping(prompt, completion, document or None) if prompt else None
    tokenizer = load_tokenizer(resolve(base, load_bases(BASES)))
    found = init_domain(name, file, fields=fields, tokenizer=tokenizer, force=force)
    show_found(found)
    console.print(f"Next: [bold]tsugiki recipe run {name}[/]" + (f" --base {escape(base)}" if base != "tiny-llama" else ""))


@recipe_app.command("show")
def recipe_show(domain: DomainArgument, base: BaseOption = "tiny-llama", runs: RunsOption = Path("runs")) -> None:
    """Show a finished run: learning curve, levels, recommendation."""
    show_summary(_run_folder(runs, domain, base))


@recipe_app.command("bases")
def recipe_bases(
    domain: DomainArgument,
    bases: Annotated[str, typer.Option("--bases", help="Names from `tsugiki recipe list` or folders, comma-separated.")] = "tiny-llama,tiny-qwen,tiny-llmjp",
    n: Annotated[int | None, typer.Option("--n", min=1, help="Training samples, the same for all; none: the domain's largest count up to 1,000.", show_default=False)] = None,
    seeds: Annotated[str, typer.Option(help="One fit of each base for each seed, comma-separated.")] = "0",
    runs: RunsOption = Path("runs"), data_dir: DataOption = None, set_: SetOption = None, ray: RayOption = None,
) -> None:
    """Compare bases on the same samples: task score, bits per character, cost, what was forgotten, and which one to take."""
    from tsugiki.cluster import connected
    from tsugiki.recipes.compare_bases import compare_bases

    if not all(part.strip().isdecimal() for part in seeds.split(",")):
        raise UserError(f"--seeds wants whole numbers, comma-separated, not {seeds!r}", hint="For example --seeds 0,1,2")
    named = [b.strip() for b in bases.split(",") if b.strip()]
    with connected(ray):
        path = compare_bases(domain, named, n=n, seeds=[int(s) for s in seeds.split(",")], runs=runs, data_dir=data_dir, changes=set_ or ())
    show_bases(path)


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
        table = plain_table(q, "level", "answer")
        if q in references:
            table.add_row("reference", escape(references[q]), style="green")
        for level in levels:
            table.add_row(level, escape(answers[level][i]))
        stdout().print(table)


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


def show_summary(folder: Path) -> None:
    """Print a finished run: where the time went, the learning curve, the levels, the recommendation."""
    if not (folder / "summary.json").exists():
        raise UserError("this run has no summary yet", where=str(folder),
                        hint=f"Finish it: tsugiki recipe run {folder.parent.name} --base {folder.name}")
    summary = read_json(folder / "summary.json")
    out = stdout()
    times = {p.parent.name: read_json(p)["seconds"] for p in folder.glob("*/stage.json")}
    out.print("time: " + ", ".join(f"{name} {s:.0f} s" for name, s in sorted(times.items(), key=lambda t: -t[1])))
    if summary["sweep"]:
        table = plain_table("Sweep", "samples", "test NLL", "95 % interval", "bits/char", "train tokens", "seconds", numbers=True)
        best = summary["sweep"]["optimum"]["n"]
        for p in summary["sweep"]["points"]:
            table.add_row(f"{p['n']:,}", f"{p['nll']:.4f}", f"{p['nll_ci'][0]:.4f} – {p['nll_ci'][1]:.4f}" if p["nll_ci"] else "–", number_text(p["bpc"], ".3f"),
                          f"{p['train_tokens']:,}", f"{p['seconds']:.0f}", style="bold" if p["n"] == best else None)
        out.print(table)
    if summary["levels"]:
        # Two tables: twelve columns do not fit an ordinary terminal.
        table = plain_table("What each level lost", "level", "bits/w", "NLL", "ΔNLL", "KL", "top-1", "score", "verdict", numbers=True)
        cost = plain_table("What each level costs", "level", "MB", "prompt tok/s", "gen tok/s", "s/answer", "memory MB", numbers=True)
        for r in summary["levels"]:
            table.add_row(r["level"], number_text(r["bpw"], ".2f"), number_text(r["nll"], ".4f"), number_text(r["delta_nll"], "+.4f"),
                          number_text(r["kld_mean"], ".5f"), number_text(r["top1"], ".1%"), number_text(r["score"], ".3f"), r["verdict"])
            cost.add_row(r["level"], f"{r['bytes'] / 1e6:,.1f}", number_text(r["prompt_tok_s"], ",.0f"), number_text(r["gen_tok_s"], ",.0f"),
                         number_text(r["seconds_per_answer"], ".3f"), number_text(r["peak_rss"] and r["peak_rss"] / 1e6, ",.0f"))
        out.print(table)
        out.print(cost)
    before_after = [b for b in summary["benchmarks"] if b["model"] in ("base", "adapted")]
    if before_after:
        table = plain_table("Before and after", "task, metric", "base", "adapted", "n", numbers=True)
        for task, metric in dict.fromkeys((b["task"], b["metric"]) for b in before_after):
            by = {b["model"]: b for b in before_after if (b["task"], b["metric"]) == (task, metric)}
            table.add_row(escape(f"{task}, {metric}"), *(f"{by[m]['value']:.3f}" if m in by else "" for m in ("base", "adapted")), str(next(iter(by.values()))["n"]))
        out.print(table)
    if summary["recommended"]:
        out.print(f"Take [bold]{summary['recommended']['level']}[/]: {escape(summary['recommended']['why'])}")
    out.print(f"Report: {escape(str(folder / summary['report']))}", soft_wrap=True)


def show_bases(path: Path) -> None:
    """Print a comparison of bases: score and bits, pairs, cost, the recommendation."""
    found, out = read_json(path), stdout()
    unit, level = found["bases"][0]["cost"]["unit"], found["level"]
    best = found["recommended"]["base"]

    def between(interval: list[float] | None, form: str, by: float = 1.0) -> str:
        return f"{by * interval[0]:{form}} – {by * interval[1]:{form}}" if interval else "–"

    out.print(f"{found['samples']['n']:,} samples, {found['answered']} test items, {len(found['seeds'])} seed(s)")
    tables = []  # narrow ones: eighty columns hold each whole
    for key, title in (("score", found["scoring"]), ("bits", "Bits per character")):
        table = plain_table(title, "base", "rank", "after", "95 % interval", "before", numbers=True)
        for r in found["bases"]:
            table.add_row(r["name"], str(r[f"rank_{key}"]), f"{r[key]['after']:.3f}", between(r[key]["after_ci"], ".3f"), f"{r[key]['before']:.3f}",
                          style="bold" if r["name"] == best else None)
        tables.append(table)
    for key, title, form, by in (("score", "score, points", "+.1f", 100), ("bits", "bits per character", "+.3f", 1)):
        table = plain_table(f"Pair by pair, {title}; together at {found['confidence']:.0%}", "first − second", "difference", "interval", "better", numbers=True)
        for p in found["pairs"]:
            table.add_row(f"{p['first']} − {p['second']}", f"{by * p[key]['difference']:{form}}", between(p[key]["ci"], form, by), p[key]["better"] or "open")
        tables.append(table)
    cost = plain_table("What it costs", "base", unit, "memory MB", "F16 MB", f"{level} MB", "s/answer", numbers=True)
    budget = plain_table("Budget and forgetting", "base", "tokens", "operations", "lost / gained", numbers=True)
    for r in found["bases"]:
        cost.add_row(r["name"], f"{r['cost']['hours']:.4f}", f"{r['cost']['peak_memory'] / 1e6:,.0f}", f"{r['bytes']['F16'] / 1e6:,.1f}",
                     f"{r['bytes'][level] / 1e6:,.1f}", f"{r['speed']['seconds_per_answer']:.3f}")
        budget.add_row(r["name"], f"{r['budget']['tokens']:,}", number_text(r["budget"]["flops"], ".2e"), f"{r['lost']} / {r['gained']}" if r["forgetting"] else "–")
    for table in (*tables, cost, budget):
        out.print(table)
    if len(found["seeds"]) == 1:
        out.print("One seed: how much another one would change was not measured (--seeds 0,1,2 measures it).")
    out.print(f"Take [bold]{escape(best)}[/]: {escape(found['recommended']['why']['en'].removeprefix(f'{best}: '))}")
    out.print(f"Written: {escape(str(path))}, {escape(str(path.with_suffix('.html')))}", soft_wrap=True)


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


def _stopped() -> None:
    console.print("interrupted: what was finished is kept, and nothing half-written; run the same command again to go on", soft_wrap=True)
    sys.exit(2)


def main() -> None:
    """Run a command; exit 1 for a fault of ours, 2 for all else that ends it early: a mistake, a full disk, Ctrl-C, SIGTERM."""
    if not is_first_process():
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # temporary files go and children end, as after Ctrl-C
    try:
        app()
    except SystemExit as end:
        if end.code != 130:  # typer's status for Ctrl-C
            raise
        _stopped()
    except KeyboardInterrupt:
        _stopped()
    except Exception as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
        known = error if isinstance(error, UserError) else refusal(error)
        if known:
            console.print(f"[bold red]error:[/] {escape(str(known))}")
            sys.exit(2)
        console.print(f"[bold red]internal error:[/] {escape(f'{type(error).__name__}: {error}')}")
        console.print("Run again with --debug in front of the command for the traceback, and report it.")
        sys.exit(1)
