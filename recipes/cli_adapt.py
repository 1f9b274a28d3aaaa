"""``tsugiki adapt …``: the sweep, what training sees, what fits on a card."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from tsugiki.bases import load_bases
from tsugiki.errors import UserError
from tsugiki.recipes.terminal import (
    HELP,
    BaseOption,
    DataOption,
    DomainArgument,
    RunsOption,
    SetOption,
    number_text,
    plain_table,
    stage_command,
    stdout,
)

adapt_app = typer.Typer(help="LoRA adaptation and the sweep over sample counts.", **HELP)
stage_command(adapt_app, "sweep", "sweep", "Train one adapter for each sample count and find the lowest test NLL.")


@adapt_app.command("preview")
def adapt_preview(
    domain: DomainArgument, base: BaseOption = "tiny-llama", runs: RunsOption = Path("runs"),
    data_dir: DataOption = None, set_: SetOption = None,
    samples: Annotated[int, typer.Option(min=1, help="How many to show.")] = 4,
) -> None:
    """Show in colour what training sees: read tokens grey, learnt tokens green, special tokens yellow."""
    from rich.text import Text

    from tsugiki.adapt.preview import first_of_each_kind, runs_of_tokens
    from tsugiki.recipes.recipe import base_folder, open_run, run_recipe
    from tsugiki.samples import read_encoded
    from tsugiki.tokenizers import load_tokenizer

    run = open_run(domain, base, runs=runs, data_dir=data_dir, changes=set_)
    run_recipe(run, ("data",))
    tokenizer = load_tokenizer(base_folder(run))
    train = read_encoded(run.folder / "data" / "train.jsonl")
    for s in first_of_each_kind(train, samples):
        text = Text()
        for part, learned, special in runs_of_tokens(tokenizer, s):
            text.append(part, style=("bold " if learned else "") + ("yellow" if special else "green" if learned else "bright_black"))
        kind = f", {s.kind}" if s.kind else ""
        stdout().print(f"[bold]{escape(s.id)}[/]{escape(kind)}: {len(s.completion_ids)} of {len(s.ids)} tokens are learnt", text, "", sep="\n")
    learnt, total = sum(len(s.completion_ids) for s in train), sum(len(s.ids) for s in train)
    ends = sorted({s.completion_ids[-1] for s in train})
    stdout().print(f"{len(train):,} training samples: {learnt:,} of {total:,} tokens are learnt; each answer ends with "
                   + escape(" or ".join(tokenizer.convert_ids_to_tokens(ends))))


@adapt_app.command("contamination")
def adapt_contamination(
    domain: DomainArgument, base: BaseOption = "tiny-llama", runs: RunsOption = Path("runs"),
    data_dir: DataOption = None, set_: SetOption = None,
) -> None:
    """Look for benchmark items among the training samples: a score on what was trained on says nothing."""
    from tsugiki.recipes.contamination import contamination
    from tsugiki.recipes.recipe import open_run, run_recipe
    from tsugiki.samples import read_encoded

    run = open_run(domain, base, runs=runs, data_dir=data_dir, changes=set_)
    run_recipe(run, ("data",))
    path = run.folder / "contamination.json"
    found = contamination(read_encoded(run.folder / "data" / "train.jsonl"), path, data_dir=data_dir)
    rows = plain_table(f"Items of which a training sample holds {found['share']:.0%} or more ({found['ngram']}-character runs)",
                       "set", "items", "found", "texts too short to tell", numbers=True)
    for row in found["sets"]:
        rows.add_row(row["name"], f"{row['items']:,}", f"{row['found']:,}", f"{row['short']:,} of {row['texts']:,}", style="bold red" if row["found"] else None)
    stdout().print(rows)
    if found["absent"]:
        stdout().print(f"Not at hand: {', '.join(found['absent'])}")
    stdout().print(f"Written: {escape(str(path))}", soft_wrap=True)


@adapt_app.command("plan")
def adapt_plan(
    base: BaseOption = "tiny-llama",
    gpu: Annotated[str, typer.Option(help="Memory of the card, for example 8GB; what is free of it where a desktop runs on it.")] = "8GB",
    seq: Annotated[int, typer.Option(min=1, help="Tokens of the longest sample (a domain's max_tokens).")] = 1024,
    rank: Annotated[int, typer.Option(min=1, help="LoRA rank.")] = 16,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples an optimizer step.")] = 16,
    completion: Annotated[int | None, typer.Option(min=1, help="Tokens of the longest answer; none: the whole sample.")] = None,
    four_bit: Annotated[bool | None, typer.Option(help="NF4 base (QLoRA); none: from 4 GB of weights.")] = None,
) -> None:
    """Say whether a fit goes on a card, with which micro-batch, checkpointing and offload; nothing is loaded or trained."""
    from tsugiki.adapt.plan import GIB, card_bytes, plan
    from tsugiki.bases import profile
    from tsugiki.recipes.recipe import BASES

    bases = load_bases(BASES)
    others = {b.name: b.parameters for b in bases.values() if b.parameters and b.name != base}
    found = plan(profile(_config_folder(base, bases)), card_bytes(gpu), sequence=seq, rank=rank, batch_size=batch_size,
                 four_bit=four_bit, learned=completion, others=others)
    table = plain_table("Peak memory, predicted", "what", "GiB", numbers=True)
    names = {"weights": "base, NF4" if found.four_bit else "base, bf16", "adapter": "adapter", "gradients": "its gradients",
             "optimizer": "AdamW, paged 8-bit" if found.four_bit else "AdamW", "activations": "kept activations",
             "working": "at the worst moment", "outside": "CUDA and fragmentation (assumed)"}
    for name, label in names.items():
        table.add_row(label, f"{getattr(found.memory, name) / GIB:.2f}")
    table.add_row("in all", f"{found.memory.total / GIB:.2f} of {found.card / GIB:.2f}", style="bold")
    stdout().print(table)
    stdout().print(f"micro-batch {found.micro_batch} of {batch_size}, gradient checkpointing {'on' if found.checkpointing else 'off'}"
                   + (f", its activations in main memory ({found.memory.offloaded / GIB:.2f} GiB)" if found.offload else ""))
    changes = {"rank": rank, "alpha": 2 * rank, "batch_size": batch_size, "micro_batch": found.micro_batch,
               "checkpointing": str(found.checkpointing).lower(), "offload": str(found.offload).lower(), "four_bit": str(found.four_bit).lower()}
    stdout().print(" ".join(f"--set sweep.{key}={value}" for key, value in changes.items()), soft_wrap=True)


def _config_folder(name: str, bases: dict) -> Path:
    """A folder with a base's ``config.json``; of a base on the hub that file alone is fetched, not its weights."""
    from tsugiki.bases import resolve

    base = bases.get(name)
    if base is None or base.path:
        folder = Path(name).expanduser()
        return folder if base is None and (folder / "config.json").is_file() else resolve(name, bases)
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(base.hub_id, "config.json", revision=base.revision)).parent
    except Exception as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"the configuration of {name} cannot be had from {base.hub_id}: {said}",
                        hint="Give a folder with its config.json: --base FOLDER") from error


@adapt_app.command("search")
def adapt_search(
    domain: DomainArgument, base: BaseOption = "tiny-llama", runs: RunsOption = Path("runs"),
    data_dir: DataOption = None, set_: SetOption = None,
    n: Annotated[int, typer.Option("--n", min=1, help="Training samples of every trial.")] = 1000,
    trials: Annotated[int, typer.Option(min=1, help="Trials in all, on all machines, earlier runs of this search included.")] = 20,
    storage: Annotated[str | None, typer.Option(envvar="TSUGIKI_STORAGE", help="A database that several machines share, as postgresql://user@host/name; none: a file of the run.", show_default=False)] = None,
    timeout: Annotated[float, typer.Option(min=0, help="Minutes after which no trial starts; 0: no limit.")] = 0,
    rank: Annotated[str, typer.Option(help="Ranks to choose from, as 8,16,32; empty: by the base's size.")] = "",
    learning_rate: Annotated[str, typer.Option(help="Range of the learning rate, as 1e-4:5e-3; empty: by the base's size.")] = "",
    epochs: Annotated[str, typer.Option(help="Range of the epochs, as 2:6; empty: by the base's size.")] = "",
    valid_items: Annotated[int, typer.Option(min=0, help="Validation samples that trials are judged by; 0: all.")] = 300,
    seed: Annotated[int, typer.Option(min=0, help="Of the fits and of the search.")] = 0,
) -> None:
    """Search rank, learning rate and epochs at one sample count, by validation NLL; the run's own settings are the first trial."""
    from tsugiki.adapt.search import LARGE_SPACE, SearchSettings, SearchSpace, parse_space, search
    from tsugiki.bases import profile
    from tsugiki.recipes.recipe import LARGE, base_folder, open_run, run_recipe
    from tsugiki.recipes.search_figure import draw_search
    from tsugiki.recipes.stages import alone

    run = open_run(domain, base, runs=runs, data_dir=data_dir, changes=set_)
    large = (profile(run.base_dir).parameters or 0) >= LARGE
    space = parse_space(LARGE_SPACE if large else SearchSpace(), rank=rank, learning_rate=learning_rate, epochs=epochs)
    settings = SearchSettings(n=n, trials=trials, space=space, fit=run.settings.sweep.fit, minutes=timeout, valid_items=valid_items,
                              seed=seed, workers=run.settings.sweep.workers)
    run_recipe(run, ("data",))
    out = run.folder / "search"
    with alone(run.folder):
        result = search(base_folder(run), run.folder / "data", out, settings, name=run.name, storage=storage)
        draw_search(result, out / "search.png")
    _show_search(result)
    stdout().print(f"Written: {escape(str(out / 'search.json'))} and search.png", soft_wrap=True)


def _show_search(result: dict) -> None:
    """Print a finished search: its trials, what mattered, how the best stands to the settings it started from."""
    table = plain_table(f"{result['n']:,} samples, judged by {result['valid_items']:,} validation samples",
                        "trial", "rank", "learning rate", "epochs", "validation NLL", "seconds", "", numbers=True)
    for t in sorted(result["trials"], key=lambda t: (t["nll"] is None, t["nll"] or 0, t["number"])):
        last = t["readings"][-1] if t["readings"] else None
        value = f"{t['nll']:.4f}" if t["nll"] is not None else f"({last[1]:.4f} at {last[0]:.0%})" if last else "–"
        table.add_row(str(t["number"]), str(t["rank"]), f"{t['learning_rate']:g}", str(t["epochs"]), value, number_text(t["seconds"], ".0f"),
                      "start" if t["start"] else "" if t["state"] == "complete" else t["state"],
                      style="bold" if t["number"] == result["best"] else "dim" if t["nll"] is None else None)
    out = stdout()
    out.print(table)
    for t in result["trials"]:
        if t["state"] == "failed":
            out.print(f"trial {t['number']} failed: {escape(t['why'] or '')}")
    if found := result["importances"]:
        shares = sorted(found.items(), key=lambda item: -item[1]["value"])
        out.print("Importances (fANOVA; in brackets 5 to 95 % over resampled trials): "
                  + ", ".join(f"{name} {f['value']:.2f} ({f['low']:.2f}–{f['high']:.2f})" for name, f in shares), soft_wrap=True)
    out.print(escape(_verdict(result)), soft_wrap=True)
    out.print(f"Best settings: [bold]{result['set']}[/]", soft_wrap=True)


def _verdict(result: dict) -> str:
    """Whether the best trial differs from the settings the search started from by more than its interval."""
    yours = "the run's settings" if result["start_is_yours"] else "the first trial (the point of the search space nearest to the run's settings)"
    found = result["difference"]
    if not found:
        return f"Trial {result['best']} is the best; {yours} did not come to the end of the fit, so that nothing can be compared with them."
    if result["best"] == result["start"]:
        return f"No trial was better than {yours}: keep them."
    if not found["ci"]:
        return (f"Trial {result['best']} has {found['nll']:+.4f} nats/token against {yours}; the validation samples come from too few documents "
                "for an interval.")
    said = (f"Trial {result['best']} against {yours}: {found['nll']:+.4f} nats/token ({found['ci'][0]:+.4f} to {found['ci'][1]:+.4f}, 95 %, over "
            f"documents, allowing for the choice among {found['compared']}; one seed, whose own noise is not in it).")
    return f"{said} It is better." if found["told_apart"] else f"{said} They are not told apart: keep the run's settings or search on."
