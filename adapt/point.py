"""One point of a sweep: an adapter for one sample count and seed, trained and scored in a process of its own."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from tsugiki.adapt.fit import FitReport, FitSettings, device_name, fit, load_base, quiet
from tsugiki.adapt.launch import fit_in_processes, settled
from tsugiki.adapt.nll import Nll, bits_per_character, completion_nll
from tsugiki.artifacts import atomic_path, read_json, write_json
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
        file = self.folder / "point.json"
        return file.exists() and read_json(file)["key"] == self.key

    def read(self) -> Point:
        """The finished point."""
        return Point(**read_json(self.folder / "point.json")["point"])

    def read_nats(self) -> np.ndarray:
        """``(S,)`` float64: nats of each test sample's completion."""
        return np.load(self.folder / "nats.npy", allow_pickle=False)


def read_samples(data: Path, test_items: int) -> tuple[list[EncodedSample], list[EncodedSample]]:
    """Training samples in nested order, and the test samples that every point is scored on: one frozen prefix."""
    test = read_encoded(data / "test.jsonl")
    return read_encoded(data / "train.jsonl"), test[: test_items or len(test)]


def point_task(label: str, job: PointJob) -> Task:
    """The task that trains and scores a point, here or on a node of a cluster; its result is the test NLL, nats/token."""
    return Task(label, train_point, (job,), reads=(job.base_dir, job.data), writes=(job.folder, job.logs), gpus=job.fit.processes or 1)


def train_point(job: PointJob, *, threads: int, progress_file: Path | None = None) -> float:
    """Train and score one point, or score the base, in a process of its own; returns the test NLL, nats/token."""
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
            options = {"seed": job.seed, "progress_file": progress_file, "logs": job.logs}
            if settings.processes > 1:
                fitted = fit_in_processes(job.base_dir, train[: job.n], settings, job.work, adapter, threads=threads, **options)
            else:
                trained, fitted = fit(job.base_dir, load_tokenizer(job.base_dir), train[: job.n], settings, job.work, **options)
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
        write_json(temporary / "point.json", {
            "key": job.key, "point": asdict(point), "losses": fitted.losses if fitted else [], "resumed_at": fitted.resumed_at if fitted else 0,
        })
    shutil.rmtree(job.work, ignore_errors=True)
    return point.nll


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
