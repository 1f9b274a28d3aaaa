"""``tsugiki evaluate …``: scores of the files that ship, and where they stand for the compute spent."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from tsugiki.bases import load_bases
from tsugiki.progress import console
from tsugiki.recipes.terminal import HELP, RunsOption, plain_table, stage_command, stdout

evaluate_app = typer.Typer(help="Scores of the files that ship.", **HELP)
stage_command(evaluate_app, "domain", "evaluate", "Score the base and the adapted model on the domain's test, by kind of item.")


@evaluate_app.command("languages")
def evaluate_languages(
    model: Annotated[Path, typer.Argument(help="A base model's GGUF file, or its Hugging Face folder (with vLLM).", show_default=False)],
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
    stdout().print(f"Page: {escape(str(out / 'scaling.html'))}", soft_wrap=True)


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
        stdout().print(escape(budgets.explain(model, known, rule)) + "\n", soft_wrap=True)


# --- output ---------------------------------------------------------------------------------------------------


def show_languages(found: dict) -> None:
    """Print an estimate of :mod:`tsugiki.evaluate.languages`: the 12 largest languages and ``und``, in percent."""

    def percent(row: dict, key: str) -> str:
        if row[key] is None:
            return "–"
        ci = row.get(f"{key}_ci")
        return f"{100 * row[key]:.1f}" + (f" ({100 * ci[0]:.1f}–{100 * ci[1]:.1f})" if ci else "")

    out = stdout()
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
    out = stdout()
    table = plain_table("Score against compute", "score ~ budget", "n", "per decade", "95 % interval", "r", numbers=True)
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
