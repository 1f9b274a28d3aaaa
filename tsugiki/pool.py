"""Tasks in worker processes, some at a time, with a line of progress each; over Ray by :mod:`tsugiki.cluster`."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tsugiki.errors import UserError
from tsugiki.machine import cpu_count
from tsugiki.progress import progress

RETRIES = 1  # of a task whose process was killed


@dataclass(frozen=True, eq=False)
class Task:
    """One call in a process of its own.

    Attributes:
        label: what the line of progress says.
        call: a function of a module, called as ``call(*arguments, threads=…, progress_file=…)``; what it writes to
            ``progress_file`` by :func:`tell_progress` is shown.
        arguments: small things that can be sent to another process: settings, paths, numbers.
        reads: files and folders that the call reads. A node of a cluster that has not the same at the same path is
            given copies, and the paths in ``arguments`` are then those of the copies.
        writes: files and folders that the call makes. On a node they are made elsewhere (the paths in ``arguments``
            tell where), then brought here, each whole or not at all.
        cpus: CPUs on a node of a cluster; 0: a fair share.
        gpus: GPUs on a node of a cluster; none where no node has any.
    """

    label: str
    call: Callable[..., Any]
    arguments: tuple[Any, ...]
    reads: tuple[Path, ...] = ()
    writes: tuple[Path, ...] = ()
    cpus: int = 0
    gpus: int = 0


class TaskError(UserError):
    """A task that failed for a reason of the user's; ``task`` is the task."""

    def __init__(self, task: Task, error: UserError) -> None:
        super().__init__(f"{task.label}: {error.message}", where=error.where, hint=error.hint)
        self.task = task


def tell_progress(file: Path | None, step: int, steps: int, note: str = "") -> None:
    """Say from within a task how far it is: steps done, steps in all, and a word beside them."""
    if file:
        file.write_text(json.dumps({"step": step, "steps": steps, "note": note}), encoding="utf-8")


def told_progress(file: Path) -> dict | None:
    """What :func:`tell_progress` said last; None where nothing can be read."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def run_tasks(tasks: Sequence[Task], workers: int, *, note: Callable[[Any], str] = str) -> Iterator[tuple[Task, Any]]:
    """Run tasks in worker processes; small matrices do not fill two threads, two tasks do.

    Within :func:`tsugiki.cluster.connected` they run on the nodes of a Ray cluster. A task whose process is killed is
    run again. Where a task fails, or the caller lets go (Ctrl-C), the tasks under way are ended at once.

    Args:
        tasks: in the order in which they start.
        workers: tasks at a time, each with its share of the cores; on a cluster as many as it has room for.
        note: what the line of progress says of a result.

    Yields:
        ``(task, result)`` as they finish, each once.

    Raises:
        TaskError: a task raised a UserError, or its process was killed again and again.
    """
    yield from runner.get()(tasks, workers, note)


def run_here(tasks: Sequence[Task], workers: int, note: Callable[[Any], str]) -> Iterator[tuple[Task, Any]]:
    """:func:`run_tasks` on this machine."""
    if not tasks:
        return
    workers = min(workers, len(tasks))
    threads = max(1, cpu_count() // workers)
    folder = Path(tempfile.mkdtemp(prefix="tsugiki-progress-"))
    files = {task: folder / f"{number}.json" for number, task in enumerate(tasks)}
    left, killed = list(tasks), dict.fromkeys(tasks, 0)
    try:
        with progress() as bar:
            lines = {task: bar.add_task(task.label, total=None, note="waiting", start=False) for task in tasks}
            while left:
                children: set = set()
                for task, result in _in_one_pool(left, workers, threads, files, children, lambda: show_progress(bar, lines, files)):
                    left.remove(task)
                    bar.update(lines[task], total=1, completed=1, note=note(result))
                    yield task, result
                for task in _whose_process_died(left, files, children):
                    killed[task] += 1
                    if killed[task] > RETRIES:
                        raise TaskError(task, died(killed[task]))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


runner: ContextVar[Callable[..., Iterator[tuple[Task, Any]]]] = ContextVar("runner", default=run_here)


def died(times: int) -> UserError:
    """What is said of a task that took its process along ``times`` times."""
    return UserError(f"its process was killed {times} times",
                     hint="Mostly memory has run out: fewer tasks at a time, smaller batches or a smaller model need less.")  # fmt: skip


def show_progress(bar, lines: dict, files: dict[Task, Path]) -> None:
    for task, line in lines.items():
        show_state(bar, line, told_progress(files[task]))


def show_state(bar, line, state: dict | None) -> None:
    if state and not bar.tasks[line].finished:
        bar.start_task(line)
        bar.update(line, total=state["steps"], completed=state["step"], note=state["note"])


def _in_one_pool(tasks: Sequence[Task], workers: int, threads: int, files: dict[Task, Path], children: set,
                 look: Callable[[], None]) -> Iterator[tuple[Task, Any]]:  # fmt: skip
    """Run tasks until all are done or one of the processes has died, which ends the others; ``children`` gets them all."""
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")
    futures = {}
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_die_with, initargs=(os.getpid(),)) as pool:
        try:
            with contextlib.suppress(BrokenProcessPool):
                for task in tasks:
                    futures[pool.submit(_call, task.call, task.arguments, threads, files[task])] = task
            pending = set(futures)
            while pending:
                children |= set(multiprocessing.active_children()) - others
                finished, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
                look()
                for future in finished:
                    try:
                        result = future.result()
                    except BrokenProcessPool:
                        continue
                    except UserError as error:
                        raise TaskError(futures[future], error) from error
                    yield futures[future], result
        except BaseException:
            # A failed task or Ctrl-C: the pool would first finish the tasks under way, and one more.
            for worker in set(multiprocessing.active_children()) - others:
                worker.terminate()
            raise


def _call(call: Callable, arguments: tuple, threads: int, progress_file: Path) -> Any:
    progress_file.with_suffix(".pid").write_text(str(os.getpid()), encoding="ascii")
    return call(*arguments, threads=threads, progress_file=progress_file)


def _whose_process_died(tasks: Sequence[Task], files: dict[Task, Path], children: set) -> list[Task]:
    """Of the tasks that a broken pool left: those whose process died by itself (the pool ends the others by SIGTERM)."""
    begun = {task: files[task].with_suffix(".pid") for task in tasks if files[task].with_suffix(".pid").exists()}
    processes = {task: int(file.read_text(encoding="ascii") or 0) for task, file in begun.items()}
    for file in begun.values():
        file.unlink()
    dead = {c.pid for c in children if c.exitcode not in (None, 0, -signal.SIGTERM)}
    return [task for task, pid in processes.items() if pid in dead] or list(begun) or list(tasks[:1])


def _die_with(parent: int) -> None:
    """End this worker when its parent is killed, so that nothing works on unseen."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
