"""Tasks in worker processes, some at a time, with a line of progress each."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tsugiki.errors import UserError
from tsugiki.machine import cpu_count
from tsugiki.progress import progress


@dataclass(frozen=True, eq=False)
class Task:
    """One call in a process of its own.

    Attributes:
        label: what the line of progress says.
        call: a function of a module, called as ``call(*arguments, threads=…, progress_file=…)``; what it writes to
            ``progress_file`` by :func:`tell_progress` is shown.
        arguments: small things that can be sent to another process: settings, paths, numbers.
    """

    label: str
    call: Callable[..., Any]
    arguments: tuple[Any, ...]


class TaskError(UserError):
    """A task that failed for a reason of the user's; ``task`` is the task."""

    def __init__(self, task: Task, error: UserError) -> None:
        super().__init__(f"{task.label}: {error.message}", where=error.where, hint=error.hint)
        self.task = task


def tell_progress(file: Path | None, step: int, steps: int, note: str = "") -> None:
    """Say from within a task how far it is: steps done, steps in all, and a word beside them."""
    if file:
        file.write_text(json.dumps({"step": step, "steps": steps, "note": note}), encoding="utf-8")


def run_tasks(tasks: Sequence[Task], workers: int, *, note: Callable[[Any], str] = str) -> Iterator[tuple[Task, Any]]:
    """Run tasks in worker processes; small matrices do not fill two threads, two tasks do.

    Where a task fails, or the caller lets go (Ctrl-C), the tasks under way are ended at once.

    Args:
        tasks: in the order in which they start.
        workers: tasks at a time; each gets its share of the cores.
        note: what the line of progress says of a result.

    Yields:
        ``(task, result)`` as they finish.

    Raises:
        TaskError: a task raised a UserError.
    """
    if not tasks:
        return
    workers = min(workers, len(tasks))
    threads = max(1, cpu_count() // workers)
    folder = Path(tempfile.mkdtemp(prefix="tsugiki-progress-"))
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(workers, mp_context=context, initializer=_die_with, initargs=(os.getpid(),)) as pool, progress() as bar:
            try:
                lines, files, futures = {}, {}, {}
                for number, task in enumerate(tasks):
                    lines[task] = bar.add_task(task.label, total=None, note="waiting", start=False)
                    files[task] = folder / f"{number}.json"
                    futures[pool.submit(task.call, *task.arguments, threads=threads, progress_file=files[task])] = task
                pending = set(futures)
                while pending:
                    finished, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
                    for task, line in lines.items():
                        _show(bar, line, files[task])
                    for future in finished:
                        task = futures[future]
                        try:
                            result = future.result()
                        except UserError as error:
                            raise TaskError(task, error) from error
                        bar.update(lines[task], total=1, completed=1, note=note(result))
                        yield task, result
            except BaseException:
                # A failed task or Ctrl-C: the pool would first finish the tasks under way, and one more.
                for worker in set(multiprocessing.active_children()) - others:
                    worker.terminate()
                raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _show(bar, line, file: Path) -> None:
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if bar.tasks[line].finished:
        return
    bar.start_task(line)
    bar.update(line, total=state["steps"], completed=state["step"], note=state["note"])


def _die_with(parent: int) -> None:
    """End this worker when its parent is killed, so that nothing works on unseen."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
