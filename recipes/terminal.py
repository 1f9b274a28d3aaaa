"""What the commands share: their options, single stages as commands, tables on the terminal."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

HELP = {"no_args_is_help": True, "rich_markup_mode": "rich"}

DomainArgument = Annotated[str, typer.Argument(help="A domain's name, or its YAML.", show_default=False)]
BaseOption = Annotated[str, typer.Option("--base", help="A name from `tsugiki recipe list`, or a folder.")]
RunsOption = Annotated[Path, typer.Option("--runs", help="Where runs are kept.")]
DataOption = Annotated[
    Path | None,
    typer.Option("--data-dir", help="Folder of the domain's data (else $TSUGIKI_DATA, else ../shared/data)."),
]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="A setting, as key=value; may be repeated.")]
RayOption = Annotated[
    str | None,
    typer.Option("--ray", help="Run sweep points and benchmarks on a Ray cluster: auto or HOST:PORT; else here.", show_default=False),
]


def stage_command(app: typer.Typer, name: str, stage: str, help: str) -> None:
    """Add one stage of the recipe to a group of commands."""

    def command(
        domain: DomainArgument, base: BaseOption = "tiny-llama", runs: RunsOption = Path("runs"),
        data_dir: DataOption = None, set_: SetOption = None,
    ) -> None:
        run_stage_command(stage, domain, base, runs, data_dir, set_)

    def on_ray(
        domain: DomainArgument, base: BaseOption = "tiny-llama", runs: RunsOption = Path("runs"),
        data_dir: DataOption = None, set_: SetOption = None, ray: RayOption = None,
    ) -> None:
        run_stage_command(stage, domain, base, runs, data_dir, set_, ray)

    app.command(name, help=help)(on_ray if stage in ("sweep", "evaluate") else command)


def run_stage_command(
    stage: str, domain: str, base: str, runs: Path, data_dir: Path | None, changes: list[str] | None, ray: str | None = None
) -> None:
    """Run one stage of the recipe, on a Ray cluster where one is named."""
    from tsugiki.cluster import connected
    from tsugiki.recipes.recipe import open_run, run_recipe

    run = open_run(domain, base, runs=runs, data_dir=data_dir, changes=changes)
    with connected(ray):
        run_recipe(run, (stage,))


def stdout() -> Console:
    """Standard output; 120 columns wide where it is no terminal."""
    wide = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120
    return Console(highlight=False, width=wide)


def plain_table(title: str, *columns: str, numbers: bool = False) -> Table:
    """A plain table whose first column is never cut; other text is folded, and numbers stay whole."""
    table = Table(title=escape(title), title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    for i, name in enumerate(columns):
        table.add_column(name, no_wrap=numbers or i == 0, overflow="fold", justify="right" if numbers and i else "left")
    table.caption = " "  # an empty line after it
    return table


def number_text(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
