"""The search for rank, learning rate and epochs at a fixed number of samples: an Optuna study over validation NLL.

A trial is one fit, read several times on its way; one that is worse than the median of the others at the same share of
their fits is ended. All that is known lies in the study, the nats of every validation sample included, so that a killed
search goes on, and several machines with one database work on one search.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.markup import escape

from tsugiki.adapt.fit import FitSettings, Probe, device_name, fit, quiet
from tsugiki.adapt.nll import completion_nll
from tsugiki.adapt.study import HEARTBEAT, beating, join_study, put_back, refusals, shown_storage
from tsugiki.adapt.sweep import NOT_OF_THE_RESULT
from tsugiki.artifacts import digest, sha256_file, write_json
from tsugiki.bases import fingerprint
from tsugiki.errors import UserError
from tsugiki.intervals import MIN_CLUSTERS, resampled_ratios
from tsugiki.machine import cpu_count
from tsugiki.pool import Task, run_tasks, tell_progress
from tsugiki.progress import console
from tsugiki.samples import EncodedSample, read_encoded
from tsugiki.tokenizers import load_tokenizer

NAMES = ("rank", "learning_rate", "epochs")
UNTIMELY = 600  # seconds after which a trial that never gave a sign of life is taken for dead
HOPELESS = 3  # failed trials, and no other, after which a search ends
MIN_COMPLETE = 5  # finished trials below which importances are noise
FOREST_RESAMPLES = 20  # of the trials, for the spread of the importances


@dataclass(frozen=True)
class SearchSpace:
    """What is searched. The defaults suit the bundled tiny bases; :data:`LARGE_SPACE` those of 0.5B parameters and more.

    Each range reaches from about a fifth to some times the recipe's own setting.

    Attributes:
        rank: LoRA ranks to choose from; alpha keeps its proportion to the rank.
        learning_rate: lowest and highest peak rate, searched on a logarithmic scale, three digits.
        epochs: fewest and most passes over the samples.
    """

    rank: tuple[int, ...] = (8, 16, 32, 64)
    learning_rate: tuple[float, float] = (5e-4, 1e-2)
    epochs: tuple[int, int] = (2, 8)

    def __post_init__(self) -> None:
        low, high = self.learning_rate
        if not self.rank or min(self.rank) < 1 or len(set(self.rank)) < len(self.rank):
            raise UserError(f"the ranks must be distinct whole numbers from 1 up, not {list(self.rank)}")
        if not 0 < low <= high < 1:
            raise UserError(f"the learning rates must rise from above 0 to below 1, not from {low} to {high}")
        if not 1 <= self.epochs[0] <= self.epochs[1]:
            raise UserError(f"the epochs must rise from 1 or more, not from {self.epochs[0]} to {self.epochs[1]}")

    def nearest(self, settings: FitSettings) -> dict[str, Any]:
        """The point of the space that is nearest to these settings."""
        return {
            "rank": min(self.rank, key=lambda r: abs(math.log(r / settings.rank))),
            "learning_rate": min(max(settings.learning_rate, self.learning_rate[0]), self.learning_rate[1]),
            "epochs": min(max(settings.epochs, self.epochs[0]), self.epochs[1]),
        }


LARGE_SPACE = SearchSpace(rank=(8, 16, 32, 64), learning_rate=(4e-5, 8e-4), epochs=(1, 4))


@dataclass(frozen=True)
class SearchSettings:
    """One search; ``fit`` is where it starts from, and what it leaves as it is.

    Attributes:
        n: training samples of every trial: the first of the sweep's order.
        trials: finished and pruned ones in all, on all machines, the search's earlier runs included.
        space: what is searched.
        fit: settings of the first trial.
        minutes: after which no trial starts; 0: no limit.
        valid_items: validation samples that trials are judged by, in hash order; 0: all.
        readings: on the way of each fit, at equal shares of it.
        seed: of the fits and of the sampler.
        workers: trials at a time on this machine; 0: one a core on the CPU, one on a GPU.
        heartbeat: seconds between two signs of life of a running trial.
    """

    n: int = 1000
    trials: int = 20
    space: SearchSpace = field(default_factory=SearchSpace)
    fit: FitSettings = field(default_factory=FitSettings)
    minutes: float = 0.0
    valid_items: int = 300
    readings: int = 6
    seed: int = 0
    workers: int = 0
    heartbeat: int = HEARTBEAT

    def __post_init__(self) -> None:
        for name, least in (("n", 1), ("trials", 1), ("minutes", 0), ("valid_items", 0), ("readings", 1), ("heartbeat", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if self.fit.max_steps:
            raise UserError(f"the epochs are searched, and max_steps is {self.fit.max_steps}", hint="Leave max_steps out.")
        if self.fit.processes > 1:
            raise UserError(f"a trial trains in one process, and processes is {self.fit.processes}",
                            hint="Leave processes out; several GPUs search together over one database (--storage), each with its own --runs.")


@dataclass(frozen=True)
class SearchJob:
    """What a trial is made from; small, so that it can be sent to another process."""

    study: str
    storage: str | None
    base_dir: Path
    data: Path
    out: Path
    settings: SearchSettings
    owner: str
    deadline: float


def search(base_dir: Path, data: Path, out: Path, settings: SearchSettings, *, name: str, storage: str | None = None) -> dict:
    """Search, and say what was found.

    Args:
        base_dir: folder of the base.
        data: folder with ``train.jsonl`` (nested order) and ``valid.jsonl``, encoded with the base's tokenizer. The test
            samples are not read: settings chosen by them would make every later score too good.
        out: folder of the search, which one process at a time works in.
        settings: how to search.
        name: of domain and base, before the name of the study.
        storage: URL of a database that several machines share; none: a file in ``out``.

    Returns:
        The content of ``search.json``.

    Raises:
        UserError: too few samples, a database that cannot be used, or no fit that came to its end.
    """
    from optuna.trial import TrialState

    train, valid = _samples(data, settings)
    # Trials of other code, data or settings, or of a GPU beside those of a CPU, are not compared.
    told = {k: v for k, v in asdict(settings.fit).items() if k not in NOT_OF_THE_RESULT}
    key = digest([told, asdict(settings.space), settings.n, settings.valid_items, settings.readings, settings.seed, device_name(),
                  sha256_file(data / "train.jsonl"), sha256_file(data / "valid.jsonl"), fingerprint(base_dir), _code_digest()])
    job = SearchJob(f"{name}/search-n{settings.n}-{key[:12]}", storage, base_dir, data, out, settings, f"{os.getpid()}-{uuid.uuid4().hex[:8]}",
                    time.time() + 60 * settings.minutes if settings.minutes else math.inf)
    study = join_study(job.study, out, storage, heartbeat=settings.heartbeat)
    with refusals(storage):
        for trial in study.get_trials(states=(TrialState.RUNNING,)):
            if not storage:  # this folder is ours alone: the trial's worker was killed
                put_back(study, trial)
        begun = _queue_first(study, settings)
    done = sum(t.state in (TrialState.COMPLETE, TrialState.PRUNED) for t in begun)
    if done:
        console.print(f"  {done} of {settings.trials} trials are there already")
    tasks = [Task(f"trial {i + 1} of {settings.trials}", run_trial, (job,)) for i in range(done, settings.trials)]
    workers = settings.workers or (1 if device_name() == "cuda" else cpu_count())
    try:
        for _, said in run_tasks(tasks, workers, note=lambda said: escape(said or "")):
            if said:
                console.print(f"  {escape(said)}")
    except BaseException:
        with contextlib.suppress(UserError), refusals(storage):
            for trial in study.get_trials(states=(TrialState.RUNNING,)):
                if trial.user_attrs.get("owner") == job.owner:
                    put_back(study, trial)
        raise
    with refusals(storage):
        trials = study.get_trials()
    if not any(t.state == TrialState.RUNNING for t in trials):
        shutil.rmtree(out / "unfinished", ignore_errors=True)
    result = {
        **conclude(trials, settings, valid), "n": settings.n, "valid_items": len(valid), "train_items": len(train), "study": job.study,
        "storage": shown_storage(storage), "space": asdict(settings.space),
        "settings": {k: v for k, v in asdict(settings).items() if k not in ("n", "space")} | {"device": device_name()},
    }
    write_json(out / "search.json", result)
    return result


# --- one trial ------------------------------------------------------------------------------------------------


def run_trial(job: SearchJob, *, threads: int, progress_file: Path | None = None) -> str | None:
    """Take one trial of the study, fit and score it, and tell the study; in a process of its own.

    Returns:
        What to say of it; none where there is no trial left to take.
    """
    import torch
    from optuna.exceptions import UpdateFinishedTrialError

    quiet()
    torch.set_num_threads(threads)
    samples = _samples(job.data, job.settings)
    study = join_study(job.study, job.out, job.storage, heartbeat=job.settings.heartbeat, pruner=_pruner(job.settings))
    with refusals(job.storage):
        while taken := _take(study, job, progress_file):
            try:
                with beating(study, taken, job.settings.heartbeat):
                    return _fit_trial(study, taken, job, samples, progress_file)
            except UpdateFinishedTrialError:  # this machine was away for so long that the trial was given to another
                continue
            finally:
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
    return None


def _fit_trial(study, trial, job: SearchJob, samples: tuple[list[EncodedSample], list[EncodedSample]], progress_file: Path | None) -> str:
    from optuna.exceptions import UpdateFinishedTrialError
    from optuna.trial import TrialState

    settings = job.settings
    train, valid = samples
    chosen = fit_settings(settings.fit, trial.params)
    label = f"trial {trial.number}: {_told(chosen)}"
    same = _finished_twin(study, trial)
    if same is not None:
        for name in ("nats", "seconds"):
            trial.set_user_attr(name, same.user_attrs[name])
        study.tell(trial, same.value)
        return f"{label}: as trial {same.number}, NLL {same.value:.4f}"
    # Of these settings, data and base alone: a trial that was put back goes on from its checkpoint.
    work = job.out / "unfinished" / f"{job.study.rpartition('-')[2]}-{digest(asdict(chosen))[:12]}"
    first = trial.user_attrs.get("start", False)

    def go_on(step: int, steps: int, nll: float) -> bool:
        trial.report(nll, step * settings.readings // steps)
        # What all are compared with comes to its end; a fit at its end has nothing more to save.
        return first or step == steps or not trial.should_prune()

    began = time.monotonic()
    try:
        model, report = fit(
            job.base_dir, load_tokenizer(job.base_dir), train, chosen, work, seed=settings.seed, progress_file=progress_file,
            logs=job.out / "logs" / f"n{settings.n}-trial{trial.number:03d}", probe=Probe(valid, settings.readings, go_on),
        )
        nll = None if report.stopped else completion_nll(model, valid)
    except UpdateFinishedTrialError:
        raise
    except UserError as error:  # a rate at which the loss diverges, a rank that the memory has no room for: a finding
        shutil.rmtree(work, ignore_errors=True)
        trial.set_user_attr("why", error.message)
        study.tell(trial, state=TrialState.PRUNED)
        ended = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
        if len(ended) >= HOPELESS and all(_state(t) == "failed" for t in ended):
            raise  # not the settings' fault
        return f"{label}: failed, {error.message}"
    shutil.rmtree(work, ignore_errors=True)
    trial.set_user_attr("seconds", round(time.monotonic() - began, 2))
    if nll is None:
        share = report.readings[-1][0] / _steps(len(train), chosen)
        trial.set_user_attr("why", f"worse than the median at {share:.0%} of the fit")
        study.tell(trial, state=TrialState.PRUNED)
        return f"{label}: pruned at {share:.0%}, NLL {report.readings[-1][1]:.4f}"
    trial.set_user_attr("nats", [float(f"{x:.7g}") for x in nll.nats])
    study.tell(trial, nll.per_token)
    return f"{label}: validation NLL {nll.per_token:.4f}"


def _take(study, job: SearchJob, progress_file: Path | None):
    """The next trial, running; none when there are enough, or the time is over. Waits while others run the last ones."""
    from optuna.storages import fail_stale_trials
    from optuna.trial import TrialState

    settings = job.settings
    while time.time() < job.deadline:
        fail_stale_trials(study)
        _put_back_unheard(study)
        trials = study.get_trials(deepcopy=False)
        done = sum(t.state in (TrialState.COMPLETE, TrialState.PRUNED) for t in trials)
        running = sum(t.state == TrialState.RUNNING for t in trials)
        if done >= settings.trials:
            return None
        if done + running >= settings.trials:  # one of them may die with its worker
            tell_progress(progress_file, 0, 1, "waiting for trials of other workers")
            time.sleep(min(settings.heartbeat, 5))
            continue
        # Seeded by what is there: a search that was killed asks what an unbroken one would have asked.
        study.sampler = _sampler(settings, done + running, job)
        trial = study.ask(_distributions(settings.space))
        study._storage.record_heartbeat(trial._trial_id)
        trial.set_user_attr("owner", job.owner)
        trial.set_user_attr("alive", trial.number)
        before = [t for t in study.get_trials(deepcopy=False) if t.number < trial.number]
        if sum(t.state in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING) for t in before) < settings.trials:
            return trial
        trial.set_user_attr("why", "one more than asked for")  # two workers asked at once
        study.tell(trial, state=TrialState.FAIL)
    return None


def _put_back_unheard(study) -> None:
    """Put back trials whose worker died before its first sign of life, which the storage does not know for dead."""
    from datetime import datetime, timedelta

    from optuna.trial import TrialState

    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        late = trial.datetime_start and datetime.now() - trial.datetime_start > timedelta(seconds=UNTIMELY)
        if late and trial.user_attrs.get("alive") != trial.number:  # a queued one has the words of the one that it repeats
            put_back(study, trial)


def _queue_first(study, settings: SearchSettings) -> list:
    """Queue the settings to start from, unless they are there; returns the trials."""
    from optuna.trial import TrialState

    trials = study.get_trials()
    if not any(t.user_attrs.get("start") and t.state != TrialState.FAIL for t in trials):
        study.enqueue_trial(settings.space.nearest(settings.fit), user_attrs={"start": True})
    return trials


def _finished_twin(study, trial):
    from optuna.trial import TrialState

    settled = _rounded(trial.params)
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return next((t for t in done if _rounded(t.params) == settled and "nats" in t.user_attrs), None)


def _distributions(space: SearchSpace) -> dict[str, Any]:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    return {
        "rank": CategoricalDistribution(space.rank),
        "learning_rate": FloatDistribution(*space.learning_rate, log=True),
        "epochs": IntDistribution(*space.epochs),
    }


def _pruner(settings: SearchSettings):
    """The median rule, from the middle of a fit on.

    Not Hyperband: it shares the trials out to brackets with a sampler each, which twenty trials are too few for. Not
    before the middle: under a cosine schedule a high rate looks bad until it has come down. Readings are numbered by the
    share of the fit, so that fits of two and of eight epochs are compared at the same place of the schedule.
    """
    from optuna.pruners import MedianPruner

    return MedianPruner(n_startup_trials=4, n_warmup_steps=math.ceil(settings.readings / 2), n_min_trials=3)


def _sampler(settings: SearchSettings, asked: int, job: SearchJob):
    from optuna.samplers import TPESampler

    # On one database every machine must draw for itself.
    salt = [int(digest(job.owner)[:8], 16)] if job.storage else []
    seed = int(np.random.SeedSequence([settings.seed, asked, *salt]).generate_state(1)[0])
    return TPESampler(seed=seed, multivariate=True, constant_liar=True, n_startup_trials=8)


# --- what was found -------------------------------------------------------------------------------------------


def conclude(trials: Sequence, settings: SearchSettings, valid: Sequence[EncodedSample]) -> dict:
    """What a study says: its trials, the best, how it stands to the settings the search started from, what mattered.

    Args:
        trials: Optuna's, of one study.
        settings: of the search.
        valid: the samples that the trials were judged by.

    Raises:
        UserError: no fit came to its end.
    """
    from optuna.trial import TrialState

    ended = [t for t in trials if t.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    complete = [t for t in ended if t.state == TrialState.COMPLETE]
    if not complete:
        why = next((t.user_attrs["why"] for t in ended if "why" in t.user_attrs), "the time was over")
        raise UserError(f"of {len(ended)} trials none came to its end: {why}")
    best = min(complete, key=lambda t: (t.value, t.number))
    start = next((t for t in complete if t.user_attrs.get("start")), None)
    asked = settings.space.nearest(settings.fit)
    return {
        "trials": [_trial_json(t, settings) for t in ended],
        "best": best.number,
        "start": start.number if start else None,
        "start_is_yours": _rounded(asked) == _rounded({name: getattr(settings.fit, name) for name in NAMES}),
        "difference": _difference(complete, best, start, valid),
        "importances": importances(complete, settings.space),
        "set": set_line(fit_settings(settings.fit, best.params)),
    }


def _difference(complete: Sequence, best, start, valid: Sequence[EncodedSample]) -> dict | None:
    """NLL of the best trial minus that of the first, nats/token; none where the first did not come to its end."""
    if start is None:
        return None
    tokens = np.asarray([len(s.completion_ids) for s in valid])
    nats = np.asarray([t.user_attrs["nats"] for t in complete]) - np.asarray(start.user_attrs["nats"])
    row = complete.index(best)
    interval = chosen_interval(nats, tokens, [s.document for s in valid], row) if best is not start else None
    return {
        "nll": float(nats[row].sum() / tokens.sum()), "ci": interval, "compared": len(complete) - 1,
        "told_apart": interval is not None and interval[1] < 0,
    }


def chosen_interval(
    differences: np.ndarray, counts: np.ndarray, clusters: Sequence, row: int, *, confidence: float = 0.95, resamples: int = 4000, seed: int = 0
) -> tuple[float, float] | None:
    """Interval of a difference that was chosen because it was the largest: it holds for all K differences at once.

    The best of twenty trials looks good by luck alone. The largest studentised deviation over all trials, in a bootstrap
    over clusters, gives the one factor of the standard errors under which all K intervals hold together (max-t; Romano
    and Wolf, Econometrica 73, 2005).

    Args:
        differences: float ``(K, N)``, of K trials to one and the same reference, on N items.
        counts: ``(N,)``, what the sums are divided by (tokens).
        clusters: ``(N,)``, the cluster of each item.
        row: which difference.
        confidence, resamples, seed: of the bootstrap.

    Returns:
        ``(low, high)``; ``None`` for fewer than :data:`tsugiki.intervals.MIN_CLUSTERS` clusters.
    """
    if len(set(np.asarray(clusters).tolist())) < MIN_CLUSTERS:
        return None
    middle = differences.sum(axis=1) / counts.sum()
    draws = resampled_ratios(differences, counts, clusters, resamples=resamples, seed=seed)
    spread = draws.std(axis=0, ddof=1)
    moving = spread > 0  # not the reference itself
    if not moving[row]:
        return float(middle[row]), float(middle[row])
    factor = np.quantile((np.abs(draws - middle)[:, moving] / spread[moving]).max(axis=1), confidence)
    return float(middle[row] - factor * spread[row]), float(middle[row] + factor * spread[row])


def importances(complete: Sequence, space: SearchSpace) -> dict | None:
    """Share of the variance of the validation NLL that each searched setting explains, by fANOVA.

    Args:
        complete: Optuna's finished trials. Pruned ones have no value that could be compared.
        space: what was searched; a setting with one value is left out.

    Returns:
        Of each setting ``value`` and, of bootstrap samples of the trials, ``low`` and ``high`` (5 and 95 %): few trials
        leave a wide range. ``None`` for fewer than :data:`MIN_COMPLETE` different trials.
    """
    varied = [name for name in NAMES if len(set(getattr(space, name))) > 1]
    distinct = {tuple(_rounded(t.params).values()): t for t in complete}
    if not varied or len(distinct) < MIN_COMPLETE or len({t.value for t in complete}) < 2:
        return None
    whole = _fanova(list(distinct.values()), varied)
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(FOREST_RESAMPLES):
        sample = [list(distinct.values())[i] for i in rng.integers(0, len(distinct), len(distinct))]
        if len({t.number for t in sample}) > 2:
            draws.append(_fanova(sample, varied))
    low, high = np.quantile([[d[name] for name in varied] for d in draws], [0.05, 0.95], axis=0)
    return {
        name: {"value": whole[name], "low": min(float(a), whole[name]), "high": max(float(b), whole[name])}
        for name, a, b in zip(varied, low, high, strict=True)
    }


def _fanova(trials: Sequence, names: list[str]) -> dict[str, float]:
    import optuna
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    study = optuna.create_study(direction="minimize")
    study.add_trials(list(trials))
    found = get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0), params=names)
    return {name: float(found[name]) for name in names}


def fit_settings(start: FitSettings, params: Mapping[str, Any]) -> FitSettings:
    """The settings of a trial: alpha keeps its proportion to the rank, the rate has three digits, as it is shown."""
    params = _rounded(params)
    alpha = max(1, round(params["rank"] * start.alpha / start.rank))
    return replace(start, rank=params["rank"], alpha=alpha, learning_rate=params["learning_rate"], epochs=params["epochs"])


def set_line(settings: FitSettings) -> str:
    """The settings as options of the command line."""
    return " ".join(f"--set sweep.{name}={getattr(settings, name):g}" for name in ("rank", "alpha", "learning_rate", "epochs"))


def _rounded(params: Mapping[str, Any]) -> dict[str, Any]:
    return {"rank": int(params["rank"]), "learning_rate": float(f"{params['learning_rate']:.3g}"), "epochs": int(params["epochs"])}


def _trial_json(trial, settings: SearchSettings) -> dict:
    readings = sorted(trial.intermediate_values.items())
    return {
        "number": trial.number, **_rounded(trial.params), "alpha": fit_settings(settings.fit, trial.params).alpha,
        "state": _state(trial), "why": trial.user_attrs.get("why"), "nll": trial.value if _state(trial) == "complete" else None,
        "readings": [[i / settings.readings, nll] for i, nll in readings],
        "seconds": trial.user_attrs.get("seconds"), "owner": trial.user_attrs.get("owner"), "start": bool(trial.user_attrs.get("start")),
    }


def _state(trial) -> str:
    """Of an ended trial: ``complete``, ``pruned``, or ``failed``, which Optuna keeps as pruned, so that its sampler avoids it."""
    from optuna.trial import TrialState

    if trial.state == TrialState.COMPLETE:
        return "complete"
    return "pruned" if "seconds" in trial.user_attrs else "failed"


def _told(settings: FitSettings) -> str:
    return f"rank {settings.rank}, rate {settings.learning_rate:g}, {settings.epochs} epochs"


def _steps(n: int, settings: FitSettings) -> int:
    return settings.epochs * math.ceil(n / settings.batch_size)


def _samples(data: Path, settings: SearchSettings) -> tuple[list[EncodedSample], list[EncodedSample]]:
    """The training samples and the validation samples of every trial."""
    train, valid = read_encoded(data / "train.jsonl"), read_encoded(data / "valid.jsonl")
    if len(train) < settings.n:
        raise UserError(f"there are {len(train)} training samples, the search is to take {settings.n}", hint=f"Take at most that: --n {len(train)}")
    if not valid:
        raise UserError("there is no validation sample, by which settings could be chosen; the test samples are not for that",
                        hint="Name a file or a share for the split `valid` in the domain's YAML.")
    return train[: settings.n], valid[: settings.valid_items or len(valid)]


def _code_digest() -> list[str]:
    """The code that a trial's numbers come from."""
    return [sha256_file(Path(__file__).with_name(name)) for name in ("fit.py", "loss.py", "nll.py")]


def parse_space(space: SearchSpace, *, rank: str = "", learning_rate: str = "", epochs: str = "") -> SearchSpace:
    """A space with other ranges: ranks as ``8,16,32``, rates and epochs as ``1e-4:5e-3`` and ``2:6``, or one value.

    Raises:
        UserError: a text that is no such range.
    """
    changes: dict[str, Any] = {}
    if rank:
        changes["rank"] = tuple(_numbers(rank, ",", int, "--rank", "8,16,32"))
    if learning_rate:
        changes["learning_rate"] = _range(learning_rate, float, "--learning-rate", "1e-4:5e-3")
    if epochs:
        changes["epochs"] = _range(epochs, int, "--epochs", "2:6")
    return replace(space, **changes)


def _range(text: str, kind: type, name: str, example: str) -> tuple:
    ends = list(_numbers(text, ":", kind, name, example))
    if len(ends) > 2:
        raise UserError(f"{name} wants a range, not {text!r}", hint=f"For example {name} {example}")
    return ends[0], ends[-1]


def _numbers(text: str, between: str, kind: type, name: str, example: str) -> Iterator:
    try:
        yield from [kind(part) for part in text.split(between)]
    except ValueError as error:
        raise UserError(f"{name} wants {'whole numbers' if kind is int else 'numbers'}, not {text!r}", hint=f"For example {name} {example}") from error
