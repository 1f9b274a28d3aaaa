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
    """Say whether a fit goes on a card, with which micro-batch and checkpointing; nothing is loaded or trained."""
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
    stdout().print(f"micro-batch {found.micro_batch} of {batch_size}, gradient checkpointing {'on' if found.checkpointing else 'off'}")
    changes = {"rank": rank, "alpha": 2 * rank, "batch_size": batch_size, "micro_batch": found.micro_batch,
               "checkpointing": str(found.checkpointing).lower(), "four_bit": str(found.four_bit).lower()}
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
        raise UserError(f"the configuration of {name} cannot be had from {base.hub_id}: {str(error).splitlines()[0]}",
                        hint="Give a folder with its config.json: --base FOLDER") from error
