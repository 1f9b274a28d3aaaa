"""The sweep over sample counts: one adapter for each count, all scored on one frozen test set.

Each point is a folder, written whole or not at all, and a trial of an Optuna study on disk. A killed sweep keeps its
finished points; those that were being trained go on from their last checkpoint, where they had come to one.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from tsugiki.adapt.fit import FitSettings, device_name
from tsugiki.adapt.forecast import forecast
from tsugiki.adapt.optimum import Optimum, find_optimum
from tsugiki.adapt.point import PointJob, point_task, read_samples
from tsugiki.adapt.study import ask_point, open_study, record_untold
from tsugiki.artifacts import atomic_path, digest, read_json, sha256_file, write_json
from tsugiki.bases import fingerprint
from tsugiki.errors import UserError
from tsugiki.machine import cpu_count
from tsugiki.pool import TaskError, run_tasks
from tsugiki.progress import console

MODES = ("epochs", "steps")
NOT_OF_THE_RESULT = ("report_to", "checkpoint_minutes")  # settings that change no number


@dataclass(frozen=True)
class SweepSettings:
    """Which points to train."""

    counts: tuple[int, ...] = field(default=(250, 500, 1000, 2000, 4000), metadata={"help": "sample counts"})
    mode: str = field(default="epochs", metadata={"help": "what all counts have in common: epochs, or steps (those of the largest count)"})
    seeds: tuple[int, ...] = field(default=(0,), metadata={"help": "one fit for each seed at each count"})
    workers: int = field(default=0, metadata={"help": "points at a time; 0: one a core on the CPU, one on a GPU"})
    test_items: int = field(default=1000, metadata={"help": "test samples scored for the test NLL, in hash order; 0: all"})
    train_items: int = field(default=400, metadata={"help": "training samples scored for the train NLL"})
    fit: FitSettings = field(default_factory=FitSettings)

    def __post_init__(self) -> None:
        if not self.counts or min(self.counts) < 1 or len(set(self.counts)) < len(self.counts):
            raise UserError(f"counts must be distinct whole numbers from 1 up, not {list(self.counts)}")
        if self.mode not in MODES:
            raise UserError(f"mode must be {' or '.join(MODES)}, not {self.mode!r}")
        if self.mode == "steps" and self.fit.max_steps:
            raise UserError(f"mode steps counts the steps itself, and max_steps is {self.fit.max_steps}", hint="Set one of the two.")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"seeds must be distinct, not {list(self.seeds)}")
        if self.test_items < 0 or self.train_items < 1:
            raise UserError(
                f"test_items must be at least 0 and train_items at least 1, not {self.test_items} and {self.train_items}"
            )


def run_sweep(base_dir: Path, data: Path, out: Path, settings: SweepSettings) -> dict:
    """Train and score every point, then keep the adapter of the best.

    Args:
        base_dir: folder of the base.
        data: folder with ``train.jsonl`` (nested order) and ``test.jsonl``, encoded with the base's tokenizer.
        out: folder of the sweep; finished points found there are kept when their settings are these.
        settings: which points, and how to train.

    Returns:
        The content of ``sweep.json``.

    Raises:
        UserError: fewer training samples than the smallest count, or a fit that failed for a reason of the user's.
    """
    train, test = read_samples(data, settings.test_items)
    counts = [n for n in sorted(settings.counts) if n <= len(train)]
    if not counts:
        raise UserError(f"there are {len(train)} training samples, the smallest count is {min(settings.counts)}",
                        hint="Name smaller counts: --set sweep.counts=[100,200,400]")
    left_out = sorted(set(settings.counts) - set(counts))
    if left_out:
        console.print(f"  [yellow]counts {left_out} left out: there are {len(train)} training samples[/]")
    mode, settings = settings.mode, _settled(settings, max(counts))
    told = {name: value for name, value in asdict(settings.fit).items() if name not in NOT_OF_THE_RESULT}
    key = digest([told, settings.test_items, settings.train_items, _file_digest(data), fingerprint(base_dir), _code_digest()])
    base = PointJob(0, 0, base_dir, data, out, settings.fit, settings.test_items, settings.train_items, key)
    jobs = [replace(base, n=n, seed=seed) for n in counts for seed in settings.seeds]
    stale = [f for f in (out / "unfinished").glob("*") if not f.name.startswith(key[:16])]
    for leftover in [*(out / "points").glob(".*"), *stale]:  # of a killed sweep
        shutil.rmtree(leftover, ignore_errors=True)
    study = open_study("sweep", out)
    # The longest fit first, so that the workers end together.
    missing = [job for job in [base, *sorted(jobs, key=lambda j: -j.n)] if not job.done]
    _run_jobs(missing, settings, study)
    shutil.rmtree(out / "unfinished", ignore_errors=True)

    points = {job: job.read() for job in jobs}
    record_untold(study, {(p.n, p.seed): p.nll for p in points.values()}, key)
    nats = {n: np.mean([job.read_nats() for job in jobs if job.n == n], axis=0) for n in counts}
    tokens = np.asarray([len(s.completion_ids) for s in test])
    documents = [s.document for s in test]
    optimum = find_optimum(nats, tokens, documents)
    base_reading = find_optimum({0: base.read_nats()}, tokens, documents)
    best = min((job for job in jobs if job.n == optimum.n), key=lambda job: points[job].nll)
    with atomic_path(out / "adapter") as folder:
        shutil.copytree(best.folder / "adapter", folder)
    intervals = {job: find_optimum({job.n: job.read_nats()}, tokens, documents).nll_ci for job in jobs}
    result = {
        "points": [{**asdict(points[job]), "nll_ci": list(intervals[job])} for job in jobs],
        "base": {**asdict(base.read()), "nll_ci": list(base_reading.nll_ci)},
        "optimum": _optimum_json(optimum),
        "forecast": (ahead := forecast(nats, tokens, documents)) and asdict(ahead),
        "p_best_by_n": {str(n): p for n, p in optimum.p_best_by_n.items()},
        "kept": {"n": best.n, "seed": best.seed},
        "test_items": len(test),
        "left_out": left_out,
        "settings": {**asdict(settings), "mode": mode, "device": device_name()},
    }
    write_json(out / "sweep.json", result)
    return result


def _optimum_json(optimum: Optimum) -> dict:
    return {
        "n": optimum.n, "nll": optimum.nll, "nll_ci": list(optimum.nll_ci), "one_se_n": optimum.one_se_n,
        "p_best": optimum.p_best, "overfits_at": optimum.overfits_at,
    }


def _settled(settings: SweepSettings, largest: int) -> SweepSettings:
    """The settings with the number of steps written down, where all counts have as many as the largest count."""
    if settings.mode == "epochs":
        return settings
    steps = settings.fit.epochs * math.ceil(largest / settings.fit.batch_size)
    return replace(settings, mode="epochs", fit=replace(settings.fit, max_steps=steps))


def _file_digest(data: Path) -> str:
    return digest([sha256_file(data / "train.jsonl"), sha256_file(data / "test.jsonl")])


def _code_digest() -> list[str]:
    """The code that a point's numbers come from."""
    return [sha256_file(Path(__file__).with_name(name)) for name in ("fit.py", "loss.py", "nll.py", "point.py")]


def _workers(settings: SweepSettings) -> int:
    if settings.workers:
        return settings.workers
    return 1 if device_name() == "cuda" else cpu_count()


def _run_jobs(jobs: list[PointJob], settings: SweepSettings, study) -> None:
    """Train the missing points, and tell the study of each."""
    from optuna.trial import TrialState

    trials = {job: ask_point(study, job.n, job.seed, job.key) for job in jobs if job.n}
    tasks = {point_task(_label(job, settings), job): job for job in jobs}
    try:
        for task, nll in run_tasks(list(tasks), _workers(settings), note=lambda nll: f"test NLL {nll:.4f}"):
            job = tasks[task]
            if job.n:
                study.tell(trials.pop(job), nll)
            console.print(f"  {task.label}: test NLL {nll:.4f} nats/token")
    except TaskError as error:
        job = tasks[error.task]
        kept = [f.name for f in sorted((job.out / "points").glob("n*")) if (f / "point.json").exists() and read_json(f / "point.json")["key"] == job.key]
        said = f"Finished points are kept: {', '.join(kept)}." if kept else ""
        raise UserError(error.message, where=error.where, hint=" ".join(filter(None, [error.hint, said])) or None) from error
    finally:
        for trial in trials.values():
            study.tell(trial, state=TrialState.FAIL)


def _label(job: PointJob, settings: SweepSettings) -> str:
    if not job.n:
        return "base"
    return f"{job.n:,} samples" + (f", seed {job.seed}" if len(settings.seeds) > 1 else "")
