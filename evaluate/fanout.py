"""Models × tasks as tasks of their own, each in a process of its own, on the nodes of a cluster."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from tsugiki.artifacts import digest
from tsugiki.errors import UserError
from tsugiki.evaluate.cache import merge_cache
from tsugiki.evaluate.data import data_folder
from tsugiki.evaluate.run import BenchmarkSettings, Model, Scored, opened, score, told_of
from tsugiki.evaluate.suites import Asked, Benchmark, load_benchmarks, quiet
from tsugiki.pool import Task, run_tasks, tell_progress

KEPT = "requests.sqlite"


def score_apart(
    models: Sequence[Model], benchmarks: Sequence[Benchmark], settings: BenchmarkSettings, out: Path
) -> Iterator[tuple[Model, Benchmark, Scored]]:
    """Score every model on every task, as they finish, on the nodes of a cluster.

    A node loads model and task by itself. Models, their tokenizers, the folder of benchmark data and finished requests
    are sent to nodes that lack them; task files of the user's must lie there at the same path. Finished requests come back.
    Of Hugging Face models only whole tasks are kept.

    Raises:
        TaskError: a task failed for a reason of the user's.
    """
    held = out / "apart" / KEPT  # a copy: the file itself grows while tasks read
    if (out / KEPT).is_file():
        merge_cache(held, out / KEPT)
    folder, _ = data_folder()
    data = folder / "benchmarks" if folder and (folder / "benchmarks").is_dir() else None
    tasks = {}
    for model in models:
        for benchmark in benchmarks:
            if benchmark.asked is None:
                raise ValueError(f"{benchmark.name} was not loaded by load_benchmarks")
            own = out / "apart" / digest([model.name, benchmark.name])[:16]
            before = held if model.is_gguf and held.is_file() else None
            arguments = (model, benchmark.name, benchmark.asked, settings, data, before, own)
            reads = tuple(path for path in (model.path, model.tokenizer, data, before) if path)
            task = Task(f"{model.name}, {benchmark.name}", score_one, arguments, reads, (own / KEPT,), gpus=0 if settings.n_gpu_layers == 0 else 1)
            tasks[task] = (model, benchmark, own)
    try:
        for task, scored in run_tasks(list(tasks), 1, note=lambda scored: f"{scored.seconds:.0f} s"):
            model, benchmark, own = tasks[task]
            if (own / KEPT).exists():
                merge_cache(out / KEPT, own / KEPT)
            yield model, benchmark, scored
    finally:
        shutil.rmtree(out / "apart", ignore_errors=True)


def score_one(
    model: Model, name: str, asked: Asked, settings: BenchmarkSettings, data: Path | None, before: Path | None, own: Path, *,
    threads: int, progress_file: Path | None = None,
) -> Scored:  # fmt: skip
    """Score one model on one task; finished requests of ``before`` are taken over into ``own``, a folder."""
    if data:
        os.environ["TSUGIKI_DATA"] = str(data.parent)  # where the task files look
    tell_progress(progress_file, 0, 1, "under way")
    own.mkdir(parents=True, exist_ok=True)
    if before and not (own / KEPT).exists():  # a second try has its own
        shutil.copyfile(before, own / KEPT)
    revisions = {asked.name: asked.revision} if asked.revision else None
    loaded, _ = load_benchmarks((), [asked.name], include=asked.include, allow_code=settings.allow_code, revisions=revisions)
    benchmark = next((b for b in loaded if b.name == name), None)
    if benchmark is None:
        raise UserError(f"{asked.name} has no task {name} on this node", hint="The files of the tasks must be the same on every node.")
    with quiet(), opened(model, settings, cache=own, threads=threads) as lm:
        return score(lm, model, benchmark, settings, told_of(lm, settings))
