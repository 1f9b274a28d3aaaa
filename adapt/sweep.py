"""The sweep over sample counts: one adapter for each count, all scored on one frozen test set.

Each point is a folder, written whole or not at all, and a trial of an Optuna study on disk. A killed sweep keeps its
finished points; those that were being trained go on from their last checkpoint, where they had come to one.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from tsugiki.adapt.fit import FitReport, FitSettings, device_name, fit, load_base
from tsugiki.adapt.forecast import forecast
from tsugiki.adapt.nll import Nll, bits_per_character, completion_nll
from tsugiki.adapt.optimum import Optimum, find_optimum
from tsugiki.artifacts import atomic_path, digest, read_json, sha256_file, write_json
from tsugiki.bases import fingerprint
from tsugiki.errors import UserError
from tsugiki.lineage import write_lineage
from tsugiki.machine import cpu_count
from tsugiki.progress import console, progress
from tsugiki.samples import EncodedSample, read_encoded
from tsugiki.tokenizers import load_tokenizer

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


@dataclass(frozen=True)
class Point:
    """One finished point of the sweep; ``nll`` and ``train_nll`` in nats/token, ``bpc`` in bits per character.

    ``epochs``: passes over the samples, the last one maybe in part where the steps were given.
    """

    n: int
    seed: int
    epochs: int
    steps: int
    nll: float
    bpc: float
    train_nll: float
    train_tokens: int
    seconds: float
    peak_rss: int
    nll_by_kind: dict[str, float]


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
    train, test = _samples(data, settings)
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
    # The longest fit first, so that the workers end together.
    wanted = [(n, seed) for n in sorted(counts, reverse=True) for seed in settings.seeds]
    base_folder = out / "points" / "base"
    stale = [f for f in (out / "unfinished").glob("*") if not f.name.startswith(key[:16])]
    for leftover in [out / "progress", *(out / "points").glob(".*"), *stale]:  # of a killed sweep
        shutil.rmtree(leftover, ignore_errors=True)
    study = _study(out)
    missing = [p for p in wanted if not _is_done(_folder(out, *p), key)]
    base_missing = not _is_done(base_folder, key)
    _run_jobs(base_dir, data, out, settings, key, [None] * base_missing + missing, study)
    shutil.rmtree(out / "unfinished", ignore_errors=True)

    base = read_json(base_folder / "point.json")
    points = [Point(**read_json(_folder(out, n, s) / "point.json")["point"]) for n in counts for s in settings.seeds]
    _record_untold(study, points, key)
    nats = {
        n: np.mean([_nats(_folder(out, n, s)) for s in settings.seeds], axis=0) for n in counts
    }
    tokens = np.asarray([len(s.completion_ids) for s in test])
    documents = [s.document for s in test]
    optimum = find_optimum(nats, tokens, documents)
    base_reading = find_optimum({0: _nats(base_folder)}, tokens, documents)
    best = min((p for p in points if p.n == optimum.n), key=lambda p: p.nll)
    with atomic_path(out / "adapter") as folder:
        shutil.copytree(_folder(out, best.n, best.seed) / "adapter", folder)
    intervals = {
        (p.n, p.seed): find_optimum({p.n: _nats(_folder(out, p.n, p.seed))}, tokens, documents).nll_ci for p in points
    }
    result = {
        "points": [{**asdict(p), "nll_ci": list(intervals[p.n, p.seed])} for p in points],
        "base": {**base["point"], "nll_ci": list(base_reading.nll_ci)},
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


# --- points ---------------------------------------------------------------------------------------------------


def _folder(out: Path, n: int, seed: int) -> Path:
    return out / "points" / f"n{n:06d}-s{seed}"


def _is_done(folder: Path, key: str) -> bool:
    return (folder / "point.json").exists() and read_json(folder / "point.json")["key"] == key


def _nats(folder: Path) -> np.ndarray:
    return np.load(folder / "nats.npy", allow_pickle=False)


def _samples(data: Path, settings: SweepSettings) -> tuple[list[EncodedSample], list[EncodedSample]]:
    """Training samples in nested order, and the test samples that every point is scored on: one frozen prefix."""
    test = read_encoded(data / "test.jsonl")
    return read_encoded(data / "train.jsonl"), test[: settings.test_items or len(test)]


def _file_digest(data: Path) -> str:
    return digest([sha256_file(data / "train.jsonl"), sha256_file(data / "test.jsonl")])


def _code_digest() -> list[str]:
    """The code that a point's numbers come from."""
    return [sha256_file(Path(__file__).with_name(name)) for name in ("fit.py", "loss.py", "nll.py")]


def _workers(settings: SweepSettings) -> int:
    if settings.workers:
        return settings.workers
    return 1 if device_name() == "cuda" else cpu_count()


def _run_jobs(base_dir, data, out, settings, key, jobs, study) -> None:
    """Run the missing points in worker processes: small matrices do not fill two threads, two points do."""
    if not jobs:
        return
    workers = min(_workers(settings), len(jobs))
    threads = max(1, cpu_count() // workers)
    trials = {job: _ask(study, *job, key) for job in jobs if job}
    context = multiprocessing.get_context("spawn")
    (out / "progress").mkdir(parents=True, exist_ok=True)
    others = set(multiprocessing.active_children())
    try:
        with ProcessPoolExecutor(workers, mp_context=context, initializer=_die_with, initargs=(os.getpid(),)) as pool, progress() as bar:
            try:
                futures, bars = {}, {}
                for job in jobs:
                    label = "base" if job is None else f"{job[0]:,} samples" + (f", seed {job[1]}" if len(settings.seeds) > 1 else "")
                    bars[job] = bar.add_task(label, total=None, note="waiting", start=False)
                    futures[pool.submit(_train_point, base_dir, data, out, settings, key, job, threads)] = job
                pending = set(futures)
                while pending:
                    finished, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
                    for job in bars:
                        _show(bar, bars[job], _progress_file(out, job))
                    for future in finished:
                        job = futures[future]
                        try:
                            nll = future.result()
                        except UserError as error:
                            raise _with_kept(error, bar.tasks[bars[job]].description, out, key) from error
                        if job:
                            study.tell(trials.pop(job), nll)
                        bar.update(bars[job], total=1, completed=1, note=f"test NLL {nll:.4f}")
                        console.print(f"  {bar.tasks[bars[job]].description}: test NLL {nll:.4f} nats/token")
            except BaseException:
                # A failed point or Ctrl-C: the pool would first finish the points under way, and one more.
                for worker in set(multiprocessing.active_children()) - others:
                    worker.terminate()
                raise
    finally:
        from optuna.trial import TrialState

        for trial in trials.values():
            study.tell(trial, state=TrialState.FAIL)
        shutil.rmtree(out / "progress", ignore_errors=True)


def _with_kept(error: UserError, label: str, out: Path, key: str) -> UserError:
    """The error of a point, with the point's name and what is kept of the sweep."""
    kept = [f.name for f in sorted((out / "points").glob("n*")) if _is_done(f, key)]
    hint = " ".join(filter(None, [error.hint, f"Finished points are kept: {', '.join(kept)}." if kept else ""]))
    return UserError(f"{label}: {error.message}", where=error.where, hint=hint or None)


def _work(out: Path, key: str, n: int, seed: int) -> Path:
    """Checkpoints of a fit under way: of these settings, data and base alone."""
    return out / "unfinished" / f"{key[:16]}-n{n:06d}-s{seed}"


def _progress_file(out: Path, job: tuple[int, int] | None) -> Path:
    return out / "progress" / ("base.json" if job is None else f"n{job[0]}-s{job[1]}.json")


def _show(bar, task, path: Path) -> None:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if bar.tasks[task].finished:
        return
    bar.start_task(task)
    bar.update(task, total=state["steps"], completed=state["step"], note=state.get("note") or f"loss {state['loss']:.3f}")


def _train_point(base_dir, data, out, settings, key, job, threads) -> float:
    """Train and score one point (or score the base, where ``job`` is none) in a process of its own."""
    import logging
    import warnings

    import torch
    from transformers.utils import logging as transformers_logging

    warnings.filterwarnings("ignore")
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(threads)
    began = time.monotonic()
    train, test = _samples(data, settings)
    progress_file = _progress_file(out, job)
    fitted = None
    if job is None:
        folder = out / "points" / "base"
        model = load_base(base_dir, four_bit=settings.fit.four_bit, exact=True).eval()
    else:
        n, seed = job
        folder = _folder(out, n, seed)
        tokenizer = load_tokenizer(base_dir)
        trained, fitted = fit(
            base_dir, tokenizer, train[:n], settings.fit, _work(out, key, n, seed),
            seed=seed, progress_file=progress_file, logs=out / "logs" / f"n{n:06d}-s{seed}",
        )
    with atomic_path(folder) as temporary:
        temporary.mkdir(parents=True)
        if job is not None:
            trained.save_pretrained(temporary / "adapter", safe_serialization=True)
            _name_base(temporary / "adapter", base_dir)
            model = _exact(base_dir, temporary / "adapter", trained, settings)

        def scoring(done: int) -> None:
            progress_file.write_text(json.dumps({"step": done, "steps": len(test), "loss": 0.0, "note": "scoring"}))

        nll = completion_nll(model, test, on_done=scoring)
        shown = train[: job[0]] if job else train
        train_nll = completion_nll(model, shown[: settings.train_items])
        np.save(temporary / "nats.npy", nll.nats, allow_pickle=False)
        point = Point(
            n=job[0] if job else 0, seed=job[1] if job else 0, epochs=_epochs(settings.fit, fitted, job[0]) if job else 0,
            steps=fitted.steps if fitted else 0,
            nll=nll.per_token, bpc=bits_per_character(nll, test), train_nll=train_nll.per_token,
            train_tokens=fitted.train_tokens if fitted else 0, seconds=round(time.monotonic() - began, 2),
            peak_rss=fitted.peak_rss if fitted else 0, nll_by_kind=_by_kind(nll, test),
        )
        write_json(temporary / "point.json", {
            "key": key, "point": asdict(point), "losses": fitted.losses if fitted else [], "resumed_at": fitted.resumed_at if fitted else 0,
        })
    if job is not None:
        shutil.rmtree(_work(out, key, *job), ignore_errors=True)
    return point.nll


def _epochs(settings: FitSettings, fitted: FitReport, n: int) -> int:
    return math.ceil(fitted.steps / math.ceil(n / settings.batch_size)) if settings.max_steps else settings.epochs


def _exact(base_dir: Path, adapter: Path, trained, settings: SweepSettings):
    """The model to score with: float32 on the CPU; on a GPU the trained model itself, whose base may be in 4 bits."""
    if device_name() == "cuda":
        return trained.eval()
    from peft import PeftModel

    return PeftModel.from_pretrained(load_base(base_dir, exact=True), adapter).eval()


def _name_base(adapter: Path, base_dir: Path) -> None:
    """Name the base in the adapter's files by its name, not by a path of this machine."""
    config = read_json(adapter / "adapter_config.json")
    config["base_model_name_or_path"] = base_dir.name
    write_json(adapter / "adapter_config.json", config)
    (adapter / "README.md").unlink(missing_ok=True)
    write_lineage(adapter, base_dir)


def _by_kind(nll: Nll, samples: Sequence[EncodedSample]) -> dict[str, float]:
    kinds = np.asarray([s.kind for s in samples])
    return {
        str(k): float(nll.nats[kinds == k].sum() / nll.tokens[kinds == k].sum()) for k in np.unique(kinds) if k
    }


def _die_with(parent: int) -> None:
    """End this worker when its parent is killed, so that nothing trains on unseen."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


# --- the study ------------------------------------------------------------------------------------------------


def _distributions() -> dict:
    from optuna.distributions import IntDistribution

    return {"n": IntDistribution(1, 100_000_000), "seed": IntDistribution(0, 2**31 - 1)}


def _study(out: Path):
    """The Optuna study of this sweep; trials that a kill left running are marked as failed."""
    import optuna
    from optuna.trial import TrialState

    out.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        study_name="sweep", storage=f"sqlite:///{(out / 'study.sqlite3').resolve()}", direction="minimize", load_if_exists=True
    )
    for trial in study.get_trials(states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
    return study


def _ask(study, n: int, seed: int, key: str):
    study.enqueue_trial({"n": n, "seed": seed}, user_attrs={"key": key})
    return study.ask(_distributions())


def _record_untold(study, points: Sequence[Point], key: str) -> None:
    """Complete trials of the points that were finished when a kill came before the study heard of it."""
    from optuna.trial import TrialState, create_trial

    told = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    known = {(t.params["n"], t.params["seed"]) for t in told if t.user_attrs.get("key") == key}
    for p in points:
        if (p.n, p.seed) not in known:
            study.add_trial(
                create_trial(params={"n": p.n, "seed": p.seed}, distributions=_distributions(), value=p.nll, user_attrs={"key": key})
            )
