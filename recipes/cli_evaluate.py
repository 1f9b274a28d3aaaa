"""``tsugiki evaluate …``: scores of the files that ship, and where they stand for the compute spent."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from tsugiki.bases import load_bases
from tsugiki.errors import UserError, raise_problems
from tsugiki.progress import console
from tsugiki.recipes.terminal import HELP, DataOption, RayOption, RunsOption, plain_table, stage_command, stdout

evaluate_app = typer.Typer(help="Scores of the files that ship.", **HELP)
stage_command(evaluate_app, "domain", "evaluate", "Score base and adapted model on the domain's test, by kind of item, and with the levels on the benchmarks at hand.")


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


@evaluate_app.command("judge")
def evaluate_judge(
    answers: Annotated[list[Path], typer.Argument(help="A run's folder or .jsonl files of answers, one a model; for MT-Bench also .gguf files, whose answers are made first.", show_default=False)],
    rubric: Annotated[str, typer.Option(help="domain (0–3), mt-bench-ja or mt-bench-en (1–10).")] = "domain",
    level: Annotated[list[str] | None, typer.Option(help="Of a run: this quantization level's answers too; may be repeated.", show_default=False)] = None,
    endpoint: Annotated[str, typer.Option(help="Base URL of an OpenAI-compatible server, https://…/v1.")] = "",
    model: Annotated[str, typer.Option(help="The judge's name at the endpoint.")] = "",
    gguf: Annotated[Path | None, typer.Option(help="The judge as a file, run in this process.", show_default=False)] = None,
    labels: Annotated[Path | None, typer.Option(help="People's ratings, .jsonl or .csv of id, label (and model): how far the judge agrees.", show_default=False)] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of verdicts.jsonl and judge.json; else judge-RUBRIC beside the answers; a run's report and results table take it from there.", show_default=False)] = None,
    data_dir: DataOption = None,
    limit: Annotated[int | None, typer.Option(help="Only the first so many answers of each model.", show_default=False)] = None,
    sampled: Annotated[bool, typer.Option(help="MT-Bench answers of a .gguf at the benchmark's temperatures; else greedy.")] = False,
    price_in: Annotated[float | None, typer.Option(help="Price of a million tokens read.", show_default=False)] = None,
    price_out: Annotated[float | None, typer.Option(help="Price of a million tokens written.", show_default=False)] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Agree to the estimated cost; without it no other machine is asked.")] = False,
    workers: Annotated[int, typer.Option(help="Requests under way together.")] = 4,
    retries: Annotated[int, typer.Option(help="Of one request, after rate limits, server errors and timeouts.")] = 6,
    timeout: Annotated[float, typer.Option(help="Of one request, seconds.")] = 120.0,
    key_variable: Annotated[str, typer.Option(help="Environment variable of the API key.")] = "OPENAI_API_KEY",
) -> None:
    """Have another model rate answers by a versioned rubric. Finished verdicts are kept; run again to go on."""
    from tsugiki.evaluate.judge import Judge, answer_files, judge_answers, read_answers, read_labels, two_turn_answers
    from tsugiki.evaluate.rubric import load_rubric
    from tsugiki.recipes.before_after import level_answers
    from tsugiki.recipes.judged import keep_judged
    from tsugiki.recipes.summary import read_stages, run_name

    if (price_in is None) != (price_out is None):
        raise UserError("one price is missing", hint="Give --price-in and --price-out together.")
    judge = Judge(endpoint, model, gguf, workers, retries, timeout, key_variable)
    asked = load_rubric(rubric, data_dir)
    people = read_labels(labels) if labels else None
    first = answers[0]
    out = out or (first if first.is_dir() else first.parent) / f"judge-{asked.name}"
    run = first if first.is_dir() and (first / "gguf").is_dir() else None
    models = [(p.stem, p) for p in answers if p.suffix == ".gguf"]
    if models and asked.kind != "two-turn":
        raise UserError(f"{models[0][1].name} is a model, not answers", hint="Answers of a domain come from a run's folder; MT-Bench's are made from a .gguf.")
    levels = list(dict.fromkeys(level or ()))
    if levels and not run:
        raise UserError("--level is of a run", hint="Give the run's folder, for example runs/setsubi/tiny-llama.")
    if run and asked.kind == "two-turn":
        models += [("base", run / "gguf" / "base-F16.gguf"), ("adapted", run / "gguf" / "model-F16.gguf")]
        models += [(name, run / "levels" / f"model-{name}.gguf") for name in levels]
        levels = []
    raise_problems([str(p) for _, p in models if not p.is_file()], what="Models that are not there")
    named = [p for p in answers if p.suffix != ".gguf" and not (p == run and asked.kind == "two-turn")]
    files = answer_files(named) if named else {}
    names = [*files, *(name for name, _ in models), *levels]
    raise_problems(sorted({n for n in names if names.count(n) > 1}), what="More than one model of a name", hint="Rename a file: its name stands for the model.")
    files |= {name: two_turn_answers(p, asked, out, sampled=sampled, limit=limit) for name, p in models}
    files |= {name: level_answers(run, name, out) for name in levels}
    given = {name: read_answers(path, asked)[:limit] for name, path in files.items()}
    prices = (price_in, price_out) if price_in is not None and price_out is not None else None
    found = judge_answers(given, asked, judge, out, labels=people, prices=prices, agreed=yes,
                          say=lambda text: console.print(escape(text)))
    show_judge(found)
    written = [out / "judge.json"]
    if run and out.parent == run:
        run = run.resolve()  # its name is that of the folders it lies in, wherever one stands
        keep_judged(run, written[0], found, *run_name(run, read_stages(run).get("data", {})))
        written += [run.parent.parent / "results.sqlite", *(p for p in (run / "report.html",) if p.exists())]
    stdout().print(f"Written: {escape(', '.join(map(str, written)))}", soft_wrap=True)


@evaluate_app.command("run")
def evaluate_run(
    models: Annotated[list[str], typer.Argument(help="GGUF files, Hugging Face folders, bases, or DOMAIN/BASE of a finished run: its base, the adapted model, every level.", show_default=False)],
    suite: Annotated[list[str] | None, typer.Option(help="culture, neutral, saito19, domain or all; may be repeated.", show_default=False)] = None,
    tasks: Annotated[str, typer.Option(help="Further tasks, a,b: bundled, from --include, lm-eval's own, or YAML files.")] = "",
    limit: Annotated[int | None, typer.Option(help="Only the first so many items of each task: a trial, and called so everywhere.", show_default=False)] = None,
    data_dir: Annotated[Path | None, typer.Option("--data-dir", help="Folder with benchmarks/NAME/… (else $TSUGIKI_DATA, else ../shared/data, else the hub).")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of results; else benchmarks/ in the runs.", show_default=False)] = None,
    runs: RunsOption = Path("runs"),
    include: Annotated[list[Path] | None, typer.Option(help="A folder of lm-eval task files of yours; may be repeated.", show_default=False)] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put every prompt into the model's chat template.")] = False,
    truncate: Annotated[bool, typer.Option("--truncate", help="Cut prompts that do not fit the context on the left and count them, instead of refusing.")] = False,
    context: Annotated[int | None, typer.Option(help="Tokens of context of a GGUF; else all it was trained for.", show_default=False)] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Folder of the base whose Hugging Face tokenizer encodes for GGUF files; else their own.", show_default=False)] = None,
    gpu_layers: Annotated[int | None, typer.Option(help="Layers of a GGUF on the GPU; else all, where there is one.", show_default=False)] = None,
    allow_code: Annotated[bool, typer.Option("--allow-code", help="Run the code that models write (HumanEval, JHumanEval), in a sandbox.")] = False,
    revision: Annotated[list[str] | None, typer.Option(help="TASK=REV: a task's data at this revision of the hub (a commit, tag or branch), else the newest; may be repeated.", show_default=False)] = None,
    ray: RayOption = None,
) -> None:
    """Score models on the papers' benchmarks, by lm-eval. Finished requests are kept; run again to go on."""
    import os

    from tsugiki.cluster import connected
    from tsugiki.evaluate.run import BenchmarkSettings, find_models, run_benchmarks
    from tsugiki.evaluate.suites import load_benchmarks
    from tsugiki.recipes.recipe import BASES

    if data_dir is not None:
        os.environ["TSUGIKI_DATA"] = str(data_dir)  # where the task files look
    settings = BenchmarkSettings(limit=limit, context=context, truncate=truncate, chat=chat, allow_code=allow_code, n_gpu_layers=gpu_layers)
    chosen = find_models(models, runs=runs, bases=load_bases(BASES), tokenizer=tokenizer)
    named = [t.strip() for t in tasks.split(",") if t.strip()]
    pinned = dict(r.partition("=")[::2] for r in revision or ())
    raise_problems([f"{name!r}" for name, rev in pinned.items() if not name or not rev], what="--revision", hint="Write TASK=REV.")
    benchmarks, missing = load_benchmarks(suite or (), named, include=include or (), allow_code=allow_code, revisions=pinned)
    out = out or runs / "benchmarks"
    with connected(ray):
        rows = run_benchmarks(chosen, benchmarks, settings, out=out, results=runs / "results.sqlite", say=lambda text: console.print(escape(text)))
    show_benchmarks(rows, missing, limit)
    stdout().print(f"Written: {escape(str(out))}, {escape(str(runs / 'results.sqlite'))}", soft_wrap=True)


data_app = typer.Typer(help="The benchmarks' data: where it comes from, and what of it is here.", **HELP)
evaluate_app.add_typer(data_app, name="data")


@data_app.command("list")
def data_list() -> None:
    """List the data sets of the benchmarks, with source and licence."""
    from tsugiki.evaluate.data import SETS

    table = plain_table("Benchmark data", "name", "rows", "licence", "from")
    for s in SETS.values():
        hub = f"hub: {s.hub_id}{f' ({s.config})' if s.config else ''}, revision {s.revision or 'not pinned'}" if s.hub_id else ""
        publisher = "GitHub: {} at {}".format(*s.published) if s.published else "" if s.hub_id else s.url
        source = "\n".join(filter(None, (publisher, hub)))
        licence = s.licence if s.redistributable else f"{s.licence}. Not to be passed on changed."
        table.add_row(s.name, ", ".join(f"{k} {n:,}" for k, n in s.counts.items()) or "–", escape(licence), escape(source))
    stdout().print(table)


@data_app.command("check")
def data_check(
    data_dir: Annotated[Path | None, typer.Option("--data-dir", help="Folder with benchmarks/NAME/… (else $TSUGIKI_DATA, else ../shared/data).")] = None,
) -> None:
    """Say which data sets are in the folder and whether they are whole; nothing is fetched."""
    from tsugiki.evaluate.data import check_sets

    found = check_sets(data_dir)
    table = plain_table("Benchmark data in the folder", "name", "here", "rows", "problem, or where it comes from")
    for row in found:
        here = "yes" if row["found"] and not row["problem"] else "damaged" if row["problem"] else "no"
        table.add_row(row["name"], here, ", ".join(f"{k} {n:,}" for k, n in row["n"].items()) or "–",
                      escape(row["problem"] or ("" if row["found"] else f"{row['url']} ({row['licence']})")))
    stdout().print(table)
    wrong = [f"{row['name']}: {row['problem']}" for row in found if row["problem"]]
    raise_problems(wrong, what="Damaged data", hint="Copy the files again from where they come from.")


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


def show_benchmarks(rows: list[dict], missing: dict[str, str], limit: int | None) -> None:
    """Print scores task by task, the models one below the other, and what could not be run."""

    def percent(value: float | None) -> str:
        return "–" if value is None else f"{100 * value:.1f}"

    only = f"; only the first {limit} items of each task: a trial, not a score" if limit else ""
    table = plain_table(f"Benchmarks{only}", "task, metric", "value", "± s.e.", "n", "unparsed %", "truncated %", "ties", numbers=True)
    table.columns[0].no_wrap = False  # a narrow terminal folds names, never numbers
    for column in table.columns[1:]:
        column.min_width = max(5, len(str(column.header)))
    shown = [r for r in rows if r["metric"].partition(",")[0] != "unparsed"]
    for name, metric in dict.fromkeys((r["name"], r["metric"]) for r in shown):
        part = [r for r in shown if (r["name"], r["metric"]) == (name, metric)]
        style = "" if part[0]["main"] else "dim"
        table.add_row(escape(f"{name}, {metric}"), style="bold" if part[0]["main"] else "dim")
        for r in part:
            table.add_row(f"  {escape(r['model'])}", f"{r['value']:.3f}", "–" if r["stderr"] is None else f"{r['stderr']:.3f}",
                          f"{r['n']:,}", percent(r["unparsed"]), percent(r["truncated"]), "–" if r["ties"] is None else str(r["ties"]), style=style)
    stdout().print(table)
    if any(r["ties"] for r in shown):
        stdout().print("Ties: answers in which two tokens lay within 0.01 nats; on another machine they may read otherwise.")
    for name, why in missing.items():
        console.print(f"[yellow]Not run:[/] {escape(why if why.startswith(name) else f'{name}: {why}')}")


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


def show_judge(found: dict) -> None:
    """Print what :func:`tsugiki.evaluate.judge.judge_answers` returned."""
    out, (low, high) = stdout(), found["rubric"]["scale"]
    table = plain_table(f"Rubric {found['rubric']['name']} {found['rubric']['version']} ({found['rubric']['hash']}), {low} to {high}",
                        "model", "mean", "95 % interval", "rated", "malformed", numbers=True)
    for row in found["models"]:
        interval = "–" if row["ci"] is None else f"{row['ci'][0]:.2f} – {row['ci'][1]:.2f}"
        table.add_row(escape(row["model"]), "–" if row["mean"] is None else f"{row['mean']:.2f}", interval, f"{row['rated']:,} / {row['n']:,}",
                      ", ".join(f"{k} {v}" for k, v in row["malformed"].items()) or "0")
    out.print(table)
    for row in found["paired"]:
        interval = "" if row["ci"] is None else f" ({row['ci'][0]:+.2f} to {row['ci'][1]:+.2f})"
        out.print(f"{escape(row['to'])} against {escape(row['from'])}: {row['difference']:+.2f}{interval} on {row['n']:,} answers, {row['change']}")
    for row in found["agreement"]:
        kappa = row["why"] if row["kappa"] is None else f"{row['kappa']:.2f}" + (f" ({row['ci'][0]:.2f} to {row['ci'][1]:.2f})" if row["ci"] else f" ({row['why']})")
        out.print(f"Agreement on {row['n']:,} labelled answers of {escape(row['model'])}: quadratic weighted kappa {kappa}")
    if found["usage"]["cost"] is not None:
        out.print(f"Cost so far: {found['usage']['cost']:.2f} ({found['usage']['read']:,} tokens read, {found['usage']['written']:,} written)")
