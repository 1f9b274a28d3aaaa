"""One console and one kind of progress bar for the whole kit."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

# Soft wrap: a line is one line wherever it is read later, in a pipe or a log.
console = Console(stderr=True, highlight=False, soft_wrap=True)


def progress() -> Progress:
    """A progress display; it writes nothing where the output is not a terminal."""
    return Progress(
        TextColumn("  {task.description}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", style="dim"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
