"""The sweep over sample counts: one adapter for each count, all scored on one frozen test set.

Trained is the whole grid of counts, or what :mod:`tsugiki.adapt.adaptive` asks for, round by round.
Each point is a folder, written whole or not at all, and a trial of an Optuna study on disk. A killed sweep keeps its
finished points; those that were being trained go on from their last checkpoint, where they had come to one.
"""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from tsugiki.adapt.adaptive import Decision, Measured, next_fits, turned_up
from tsugiki.adapt.fit import FitSettings, device_name
from tsugiki.adapt.forecast import forecast
from tsugiki.adapt.launch import settled
from tsugiki.adapt.optimum import Optimum, find_optimum
from tsugiki.adapt.point import Lost, PointJob, point_task, read_samples
from tsugiki.adapt.processes import PROCESSES
from tsugiki.adapt.study import STORAGE_VARIABLE, ask_point, open_study, record_untold, refusals
from tsugiki.artifacts import atomic_path, digest, read_json, sha256_file, write_json
from tsugiki.bases import fingerprint
from tsugiki.errors import UserError
from tsugiki.machine import cpu_count
from tsugiki.pool import TaskError, run_tasks
from tsugiki.progress import console
from tsugiki.samples import EncodedSample, read_encoded

MODES = ("epochs", "steps", "both")
SEARCHES = ("grid", "adaptive")
WATCHED = 400  # validation samples that an adaptive sweep's fits are read on
NOT_OF_THE_RESULT = ("report_to", "checkpoint_minutes")  # settings that change no number


@dataclass(frozen=True)
class SweepSettings:
    """Which points to train."""

    counts: tuple[int, ...] = field(default=(250, 500, 1000, 2000, 4000), metadata={"help": "sample counts"})
    mode: str = field(default="epochs", metadata={"help": "what all counts have in common: epochs, steps (those of the largest count), or both: a second curve"})
    search: str = field(default="grid", metadata={"help": "grid: every count; adaptive: the largest and a small one, others only where doubt is left"})
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
        if self.search not in SEARCHES:
            raise UserError(f"search must be {' or '.join(SEARCHES)}, not {self.search!r}")
        if self.search == "adaptive" and self.mode == "both":
            raise UserError("search adaptive follows one curve, and mode both has two", hint="Set mode to epochs or steps.")
        if self.mode != "epochs" and self.fit.max_steps:
            raise UserError(f"mode {self.mode} counts the steps itself, and max_steps is {self.fit.max_steps}", hint="Set one of the two.")
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
        data: folder with ``train.jsonl`` (nested order) and ``test.jsonl``, encoded with the base's tokenizer; an adaptive
            sweep reads ``valid.jsonl`` too.
        out: folder of the sweep; finished points found there are kept when their settings are these.
        settings: which points, and how to train.

    Returns:
        The content of ``sweep.json``. Of mode ``both`` its curve is that of equal epochs, and ``equal_steps`` has the other;
        of an adaptive sweep ``search`` says what was trained, what was not, and why.

    Raises:
        UserError: fewer training samples than the smallest count, a fit that failed for a reason of the user's, or a
            database that cannot be used, or no longer.
    """
    with refusals(os.environ.get(STORAGE_VARIABLE)):
        return _sweep(base_dir, data, out, settings)


def _sweep(base_dir: Path, data: Path, out: Path, settings: SweepSettings) -> dict:
    train, test = read_samples(data, settings.test_items)
    counts = [n for n in sorted(settings.counts) if n <= len(train)]
    if not counts:
        raise UserError(f"there are {len(train)} training samples, the smallest count is {min(settings.counts)}",
                        hint="Name smaller counts: --set sweep.counts=[100,200,400]")
    left_out = sorted(set(settings.counts) - set(counts))
    if left_out:
        console.print(f"  [yellow]counts {left_out} left out: there are {len(train)} training samples[/]")
    tokens, documents = np.asarray([len(s.completion_ids) for s in test]), [s.document for s in test]
    digests = [settings.test_items, settings.train_items, _file_digest(data), fingerprint(base_dir), _code_digest()]

    def scored_base(mode: str, folder: Path) -> PointJob:
        fit = _settled(settings.fit, mode, max(counts))
        told = {name: value for name, value in asdict(fit).items() if name not in NOT_OF_THE_RESULT}
        key = digest([told, *digests])
        stale = [f for f in (folder / "unfinished").glob("*") if not f.name.startswith(key[:16])]
        for leftover in [*(folder / "points").glob(".*"), *stale]:  # of a killed sweep
            shutil.rmtree(leftover, ignore_errors=True)
        return PointJob(0, 0, base_dir, data, folder, fit, settings.test_items, settings.train_items, key)

    base = scored_base("steps" if settings.mode == "steps" else "epochs", out)
    studies = {out: open_study("sweep", out)}
    curves, search = [[base.of(n, seed) for n in counts for seed in settings.seeds]], None
    if settings.search == "adaptive":
        base = replace(base, watched=WATCHED)
        curves[0], search = _search(base, counts, settings, train, tokens, documents, studies)
    else:
        if settings.mode == "both":  # of the largest count both are one
            other = scored_base("steps", out / "equal_steps")
            studies[other.out] = open_study("sweep-equal-steps", other.out)
            curves.append([job if job.n == max(counts) else other.of(job.n, job.seed) for job in curves[0]])
        # The longest fit first, so that the workers end together.
        jobs = dict.fromkeys(job for curve in curves for job in curve)
        _run_jobs([base, *sorted(jobs, key=lambda j: (-len(train) if j.fit.max_steps else -j.n))], settings, studies)
    for folder, study in studies.items():
        shutil.rmtree(folder / "unfinished", ignore_errors=True)
        done = [job for curve in curves for job in curve if job.out == folder]
        if done:
            record_untold(study, {(job.n, job.seed): job.read().nll for job in done}, done[0].key)

    read = [_read_curve(curve, tokens, documents) for curve in curves]
    at = read[0]["optimum"]["n"]
    best = min((job for job in curves[0] if job.n == at), key=lambda job: job.read().nll)
    with atomic_path(out / "adapter") as folder:
        shutil.copytree(best.folder / "adapter", folder)
    base_interval = find_optimum({0: base.read_nats()}, tokens, documents).nll_ci
    result = {
        **read[0],
        "base": {**asdict(base.read()), "nll_ci": list(base_interval)},
        "kept": {"n": best.n, "seed": best.seed},
        **({"equal_steps": read[1]} if settings.mode == "both" else {}),
        **({"search": search} if search else {}),
        "test_items": len(test),
        "left_out": left_out,
        "settings": {**asdict(settings), "fit": asdict(base.fit), "device": device_name()},
    }
    write_json(out / "sweep.json", result)
    return result


def _read_curve(jobs: list[PointJob], tokens: np.ndarray, documents: list[str]) -> dict:
    """Points, optimum and forecast of the finished points of one curve."""
    nats = {n: np.mean([job.read_nats() for job in jobs if job.n == n], axis=0) for n in sorted({job.n for job in jobs})}
    optimum = find_optimum(nats, tokens, documents)
    intervals = {job: find_optimum({job.n: job.read_nats()}, tokens, documents).nll_ci for job in jobs}
    return {
        "points": [{**asdict(job.read()), "nll_ci": list(intervals[job])} for job in jobs],
        "optimum": _optimum_json(optimum),
        "forecast": (ahead := forecast(nats, tokens, documents)) and asdict(ahead),
        "p_best_by_n": {str(n): p for n, p in optimum.p_best_by_n.items()},
    }


# --- the adaptive sweep ---------------------------------------------------------------------------------------


def _search(
    base: PointJob, counts: list[int], settings: SweepSettings, train: list[EncodedSample], tokens: np.ndarray, documents: list[str], studies: dict
) -> tuple[list[PointJob], dict]:
    """Train round by round what :func:`next_fits` asks for; the finished jobs, and what ``sweep.json`` says of the search.

    A round whose points are there already is decided again from them: a killed sweep comes to the end it would have come to.
    """
    file = base.data / "valid.jsonl"
    valid = read_encoded(file)[: base.watched] if file.exists() else []
    if not valid:
        raise UserError("an adaptive sweep reads validation samples, and there are none", where=str(file),
                        hint="Train all counts: --set sweep.search=grid")
    if (settings.fit.processes or int(os.environ.get(PROCESSES, 1))) > 1:
        console.print("  [yellow]fits in several processes are not read on the way: none is ended early, and overtraining is not seen[/]")
    fits: dict[int, int] = {}
    rounds = []
    while True:
        jobs = [base.of(n, seed) for n in sorted(fits) for seed in settings.seeds[: fits[n]]]
        lost = [job.lost() for job in jobs if not job.done]
        finished = [job for job in jobs if job.done]
        measured = {n: _measured([job for job in finished if job.n == n], valid) for n in sorted({job.n for job in finished})}
        decision = next_fits(counts, measured, tokens, documents, pruned=[fit.n for fit in lost], seeds=len(settings.seeds))
        if not decision.fits:
            break
        rival = min(measured, key=lambda n: measured[n].nats.sum()) if measured else None
        wanted = [
            replace(base.of(n, seed), rival=(rival, settings.seeds[0]) if rival and n not in fits else None)
            for n, number in sorted(decision.fits.items(), reverse=True) for seed in settings.seeds[:number]
        ]
        rounds.append({"counts": sorted(decision.fits), "fits": max(decision.fits.values()), "why": decision.why[max(decision.fits)]})
        console.print(f"  {_listed(rounds[-1]['counts'])} samples: {rounds[-1]['why']['en']}")
        _run_jobs([base, *wanted], settings, studies)
        fits |= decision.fits
    return finished, _searched(finished, lost, decision, rounds, counts, settings, train)


def _measured(jobs: list[PointJob], valid: list[EncodedSample]) -> Measured:
    tokens, documents = np.asarray([len(s.completion_ids) for s in valid]), [s.document for s in valid]
    watched = [nats for job in jobs if (nats := job.read_watched()) is not None]
    return Measured(
        np.mean([job.read_nats() for job in jobs], axis=0), len(jobs), any(turned_up(nats, tokens, documents) for nats in watched)
    )


def _searched(
    finished: list[PointJob], lost: list[Lost], decision: Decision, rounds: list[dict], counts: list[int], settings: SweepSettings,
    train: list[EncodedSample],
) -> dict:
    """What ``sweep.json`` says of the search; tokens are those passed through the model in training."""
    fit = finished[0].fit
    passes = {n: fit.max_steps / math.ceil(n / fit.batch_size) if fit.max_steps else fit.epochs for n in counts}
    grid = len(settings.seeds) * sum(round(sum(len(s.ids) for s in train[:n]) * passes[n]) for n in counts)
    spent = sum(job.read().train_tokens for job in finished) + sum(fit.train_tokens for fit in lost)
    never = sorted(decision.why)
    console.print(
        f"  {100 * spent / grid:.0f} % of the training tokens of the whole grid"
        + (f"; ended early: {_listed([fit.n for fit in lost])}" if lost else "") + (f"; not trained: {_listed(never)}" if never else "")
    )
    return {
        "rounds": rounds,
        "ended_early": [asdict(fit) for fit in lost],
        "not_trained": [{"n": n, "chance": decision.chances.get(n), "why": decision.why[n]} for n in never],
        "train_tokens": spent,
        "grid_tokens": grid,
    }


def _listed(counts: list[int]) -> str:
    return ", ".join(f"{n:,}" for n in counts)


def _optimum_json(optimum: Optimum) -> dict:
    return {
        "n": optimum.n, "nll": optimum.nll, "nll_ci": list(optimum.nll_ci), "one_se_n": optimum.one_se_n,
        "p_best": optimum.p_best, "overfits_at": optimum.overfits_at,
    }


def _settled(fit: FitSettings, mode: str, largest: int) -> FitSettings:
    """The settings with the number of steps written down, where all counts have as many as the largest count."""
    return fit if mode == "epochs" else replace(fit, max_steps=fit.epochs * math.ceil(largest / fit.batch_size))


def _file_digest(data: Path) -> str:
    return digest([sha256_file(data / "train.jsonl"), sha256_file(data / "test.jsonl")])


def _code_digest() -> list[str]:
    """The code that a point's numbers come from."""
    return [sha256_file(Path(__file__).with_name(name)) for name in ("fit.py", "launch.py", "loss.py", "nll.py", "point.py", "processes.py")]


def _workers(settings: SweepSettings) -> int:
    if settings.workers:
        return settings.workers
    return 1 if device_name() == "cuda" else max(1, cpu_count() // settled(settings.fit).processes)


def _run_jobs(jobs: list[PointJob], settings: SweepSettings, studies: dict) -> None:
    """Train the missing points, and tell the study of their folder of each."""
    from optuna.trial import TrialState

    jobs = [job for job in jobs if not job.done and not (job.rival and job.lost())]
    trials = {job: ask_point(studies[job.out], job.n, job.seed, job.key) for job in jobs if job.n}
    tasks = {point_task(_label(job, settings), job): job for job in jobs}
    try:
        for task, nll in run_tasks(list(tasks), _workers(settings), note=lambda nll: f"test NLL {nll:.4f}" if nll is not None else "ended"):
            job = tasks[task]
            if job.n:
                trial = trials.pop(job)
                for step, reading in job.readings():
                    trial.report(reading, step)
                studies[job.out].tell(trial, nll, state=TrialState.COMPLETE if nll is not None else TrialState.PRUNED)
            console.print(f"  {task.label}: " + (f"test NLL {nll:.4f} nats/token" if nll is not None else _ended(job.lost())))
    except TaskError as error:
        job = tasks[error.task]
        records = {f.parent.name: read_json(f) for f in sorted((job.out / "points").glob("n*/point.json"))}
        kept = [name for name, record in records.items() if record["key"] == job.key and "point" in record]
        said = f"Finished points are kept: {', '.join(kept)}." if kept else ""
        raise UserError(error.message, where=error.where, hint=" ".join(filter(None, [error.hint, said])) or None) from error
    finally:
        for job, trial in trials.items():
            studies[job.out].tell(trial, state=TrialState.FAIL)


def _ended(lost: Lost) -> str:
    return f"ended after {lost.steps} of {lost.of_steps} steps: on the validation samples it cannot come under {lost.rival:,}"


def _label(job: PointJob, settings: SweepSettings) -> str:
    if not job.n:
        return "base"
    steps = ", equal steps" if settings.mode == "both" and job.fit.max_steps else ""
    return f"{job.n:,} samples{steps}" + (f", seed {job.seed}" if len(settings.seeds) > 1 else "")
