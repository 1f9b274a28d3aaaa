"""One point of a sweep: an adapter for one sample count and seed, trained and scored in a process of its own."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from tsugiki.adapt.adaptive import READINGS, cannot_win, reading
from tsugiki.adapt.fit import FitReport, FitSettings, Probe, device_name, fit, load_base, quiet
from tsugiki.adapt.launch import fit_in_processes, settled
from tsugiki.adapt.nll import Nll, bits_per_character, completion_nll
from tsugiki.artifacts import atomic_path, read_json, sha256_file, write_json
from tsugiki.lineage import write_lineage
from tsugiki.pool import Task, tell_progress
from tsugiki.samples import EncodedSample, read_encoded
from tsugiki.tokenizers import load_tokenizer


@dataclass(frozen=True)
class Point:
    """One finished point of the sweep; ``nll`` and ``train_nll`` in nats/token, ``bpc`` in bits per character.

    ``epochs``: passes over the samples, the last one maybe in part where the steps were given. ``seconds``: wall time of
    loading, training and scoring, on ``cores`` threads. ``gpu_peak``: bytes of the GPU's memory at most; 0 without a GPU.
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
    cores: int
    gpu_peak: int


@dataclass(frozen=True)
class Lost:
    """A fit that was ended on the way: ``nll`` in nats/token of the watched validation samples, after ``steps`` of ``of_steps``."""

    n: int
    seed: int
    rival: int
    steps: int
    of_steps: int
    nll: float
    train_tokens: int
    seconds: float


@dataclass(frozen=True)
class PointJob:
    """What one point is made from; small, so that it can be sent to another process.

    Attributes:
        n: training samples; 0 scores the base.
        seed: of the adapter's start and of the order of the samples.
        base_dir: folder of the base.
        data: folder with ``train.jsonl`` (nested order) and ``test.jsonl``.
        out: folder of the sweep.
        fit: how to train.
        test_items: test samples that are scored, in hash order; 0: all.
        train_items: training samples that are scored.
        key: digest of everything that the numbers depend on.
        watched: samples of ``valid.jsonl`` that are read on the way (in one process); 0: none.
        rival: the finished fit ``(n, seed)`` that this one must beat on them; once it cannot, it is ended.
    """

    n: int
    seed: int
    base_dir: Path
    data: Path
    out: Path
    fit: FitSettings
    test_items: int
    train_items: int
    key: str
    watched: int = 0
    rival: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        return f"n{self.n:06d}-s{self.seed}" if self.n else "base"

    @property
    def folder(self) -> Path:
        """Of the finished point."""
        return self.out / "points" / self.name

    @property
    def work(self) -> Path:
        """Checkpoints of a fit under way: of these settings, data and base alone."""
        return self.out / "unfinished" / f"{self.key[:16]}-{self.name}"

    @property
    def logs(self) -> Path:
        """Curves of the fit."""
        return self.out / "logs" / self.name

    @property
    def done(self) -> bool:
        return "point" in self._record()

    def read(self) -> Point:
        """The finished point."""
        return Point(**self._record()["point"])

    def lost(self) -> Lost | None:
        """What is known of a fit that was ended because it could not win."""
        record = self._record().get("lost")
        return Lost(**record) if record else None

    def readings(self) -> list[tuple[int, float]]:
        """``(step, validation nats/token)`` of the readings on the way."""
        return [(step, nll) for step, nll in self._record().get("readings", [])]

    def read_watched(self) -> np.ndarray | None:
        """``(K, S)`` float64: nats of each watched sample at each reading; none where these samples were not read."""
        if not self.watched or self._record().get("watched") != self.watched_key():
            return None
        return np.load(self.folder / "watched.npy", allow_pickle=False)

    def watched_key(self) -> list:
        """What tells the watched samples from others."""
        return [self.watched, READINGS, sha256_file(self.data / "valid.jsonl")]

    def of(self, n: int, seed: int) -> PointJob:
        """Another point of the same sweep."""
        return replace(self, n=n, seed=seed, rival=None)

    def _record(self) -> dict:
        file = self.folder / "point.json"
        record = read_json(file) if file.exists() else {}
        return record if record.get("key") == self.key else {}

    def read_nats(self) -> np.ndarray:
        """``(S,)`` float64: nats of each test sample's completion."""
        return np.load(self.folder / "nats.npy", allow_pickle=False)


def read_samples(data: Path, test_items: int) -> tuple[list[EncodedSample], list[EncodedSample]]:
    """Training samples in nested order, and the test samples that every point is scored on: one frozen prefix."""
    test = read_encoded(data / "test.jsonl")
    return read_encoded(data / "train.jsonl"), test[: test_items or len(test)]


def point_task(label: str, job: PointJob) -> Task:
    """The task that trains and scores a point, here or on a node of a cluster; its result is the test NLL, nats/token."""
    reads = (job.base_dir, job.data, *([job.of(*job.rival).folder] if job.rival else []))
    return Task(label, train_point, (job,), reads=reads, writes=(job.folder, job.logs), gpus=job.fit.processes or 1)


def train_point(job: PointJob, *, threads: int, progress_file: Path | None = None) -> float | None:
    """Train and score one point, or score the base, in a process of its own.

    Returns:
        The test NLL, nats/token; ``None`` of a fit that was ended because it could not win.
    """
    import torch

    quiet()
    torch.set_num_threads(threads)
    began = time.monotonic()
    train, test = read_samples(job.data, job.test_items)
    settings, fitted, trained = settled(job.fit), None, None
    if not job.n:
        model = load_base(job.base_dir, four_bit=settings.four_bit, exact=True, spread=settings.fsdp).eval()
    with atomic_path(job.folder) as temporary:
        temporary.mkdir(parents=True)
        if job.n:
            adapter = temporary / "adapter"
            probe, watched = _probe(job)
            options = {"seed": job.seed, "progress_file": progress_file, "logs": job.logs}
            if settings.processes > 1:
                fitted = fit_in_processes(job.base_dir, train[: job.n], settings, job.work, adapter, threads=threads, **options)
            else:
                trained, fitted = fit(job.base_dir, load_tokenizer(job.base_dir), train[: job.n], settings, job.work, probe=probe, **options)
            if fitted.stopped:
                _write_lost(temporary, job, fitted, time.monotonic() - began)
                shutil.rmtree(job.work, ignore_errors=True)
                return None
            if trained:
                trained.save_pretrained(adapter, safe_serialization=True)
            _name_base(adapter, job.base_dir)
            model = _exact(job.base_dir, adapter, trained, settings)
        nll = completion_nll(model, test, on_done=lambda done: tell_progress(progress_file, done, len(test), "scoring"))
        shown = train[: job.n or len(train)]
        train_nll = completion_nll(model, shown[: job.train_items])
        np.save(temporary / "nats.npy", nll.nats, allow_pickle=False)
        point = Point(
            n=job.n, seed=job.seed, epochs=_epochs(job.fit, fitted, job.n) if fitted else 0, steps=fitted.steps if fitted else 0,
            nll=nll.per_token, bpc=bits_per_character(nll, test), train_nll=train_nll.per_token,
            train_tokens=fitted.train_tokens if fitted else 0, seconds=round(time.monotonic() - began, 2),
            peak_rss=fitted.peak_rss if fitted else 0, nll_by_kind=_by_kind(nll, test),
            cores=threads,
            gpu_peak=max(fitted.gpu_peak if fitted else 0, torch.cuda.max_memory_allocated() if device_name() == "cuda" else 0),
        )
        if fitted and fitted.readings:
            np.save(temporary / "watched.npy", watched, allow_pickle=False)
        write_json(temporary / "point.json", {
            "key": job.key, "point": asdict(point), "losses": fitted.losses if fitted else [], "resumed_at": fitted.resumed_at if fitted else 0,
            **({"watched": job.watched_key(), "readings": fitted.readings} if fitted and fitted.readings else {}),
        })
    shutil.rmtree(job.work, ignore_errors=True)
    return point.nll


def _probe(job: PointJob) -> tuple[Probe | None, np.ndarray]:
    """The readings on the way, and the array ``(K, S)`` of nats that they fill; NaN: not read."""
    if not job.watched:
        return None, np.empty((0, 0))
    samples = read_encoded(job.data / "valid.jsonl")[: job.watched]
    tokens, documents = np.asarray([len(s.completion_ids) for s in samples]), [s.document for s in samples]
    rival = job.of(*job.rival).read_watched() if job.rival else None
    watched, latest = np.full((READINGS, len(samples)), np.nan), []

    def go_on(step: int, steps: int, nll: float) -> bool:
        at = reading(step, steps)
        watched[at] = latest[-1]
        return rival is None or not cannot_win(watched[: at + 1], rival, tokens, documents)

    return Probe(samples, READINGS, go_on, latest.append), watched


def _write_lost(folder: Path, job: PointJob, fitted: FitReport, seconds: float) -> None:
    of_steps = job.fit.max_steps or job.fit.epochs * math.ceil(job.n / job.fit.batch_size)
    lost = Lost(
        n=job.n, seed=job.seed, rival=job.rival[0], steps=fitted.steps, of_steps=of_steps, nll=fitted.readings[-1][1],
        train_tokens=fitted.train_tokens, seconds=round(seconds, 2),
    )
    write_json(folder / "point.json", {"key": job.key, "lost": asdict(lost), "readings": fitted.readings, "losses": fitted.losses})


def _epochs(settings: FitSettings, fitted: FitReport, n: int) -> int:
    return math.ceil(fitted.steps / math.ceil(n / settings.batch_size)) if settings.max_steps else settings.epochs


def _exact(base_dir: Path, adapter: Path, trained, settings: FitSettings):
    """The model to score with: float32 on the CPU; on a GPU the trained model itself, whose base may be in 4 bits.

    Where other processes trained it, it is loaded as it was trained; a base that they divided goes on all GPUs in turn.
    """
    if device_name() == "cuda" and trained is not None:
        return trained.eval()
    from peft import PeftModel

    base = load_base(base_dir, four_bit=settings.four_bit, exact=True, spread=settings.fsdp)
    return PeftModel.from_pretrained(base, adapter).eval()


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
