"""Repair of a damaged level: the same bytes, given to the tensors that need them.

    sensitivities (one pass a group) → rounding errors of every type (no pass) → integer program (→ rounds of measurement
    around the choice, where asked for) → the real file by llama.cpp's own quantizer → measured on held-out samples, never worse than stock

The model behind it: with a group's inputs and the loss's curvature fixed, KL grows with the squared rounding error of its
matrices, weighted by how strongly each column is driven (the importance matrix), and the groups' shares add up. Both were
measured on the bundled bases (:func:`tsugiki.quantize.sensitivity.sensitivities`, ``benchmarks/repair_curve.py``); what it predicts
is checked, not believed.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np

from tsugiki.artifacts import atomic_path, digest
from tsugiki.errors import UserError
from tsugiki.evaluate.engine import Engine, check_gguf
from tsugiki.intervals import MIN_CLUSTERS, ratio_intervals, resampled_ratios
from tsugiki.progress import progress
from tsugiki.quantize.child import run_child, say, serve
from tsugiki.quantize.imatrix import read_imatrix, read_source
from tsugiki.quantize.levels import make_level, needs_imatrix, padded_bytes, plan_level, read_types, refuse_imatrix
from tsugiki.quantize.profile import read_header
from tsugiki.quantize.sensitivity import (
    Group,
    groups_of,
    matrices,
    measure,
    open_simulator,
    read_samples,
    sensitivities,
)

KINDS = ("IQ2_S", "Q2_K", "IQ3_XXS", "IQ3_S", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
NARROW = ("IQ4_NL", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")  # for rows that do not divide by 256
MARGIN = 0.05  # nats/token that the smallest file may lose: the check's margin_nll
BELOW = 1.7  # a type so many bits below the budget's mean is not considered: never chosen in trials, and slow to compute
SIZES = 32  # between the smallest types and Q8_0, of which the smallest file is sought


# --- the integer program ------------------------------------------------------------------------------------------


def choose(costs: np.ndarray, sizes: np.ndarray, budget: int) -> list[int]:
    """One option for each group, the sum of costs least, the sum of sizes at most ``budget``.

    An integer program, solved by HiGHS (``scipy.optimize.milp``).

    Args:
        costs: float ``(G, K)``; infinite where an option does not exist.
        sizes: int ``(G, K)``, bytes.
        budget: bytes.

    Returns:
        ``G`` indices of options.

    Raises:
        UserError: even the smallest options do not fit.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_matrix

    exists = np.isfinite(costs)
    least = np.where(exists, sizes, np.iinfo(np.int64).max).min(axis=1).sum()
    if least > budget:
        raise UserError(f"the budget is {budget / 1e6:,.2f} MB of tensors, the smallest types need {least / 1e6:,.2f} MB",
                        hint="Raise the budget, or give an importance matrix: it allows smaller types.")
    groups = np.nonzero(exists)[0]
    number = len(groups)
    cost = costs[exists] / max(costs[exists].max(), 1e-300)
    cost = cost / max(np.median(cost), 1e-12)  # HiGHS stops at absolute gaps: around 1, not around 1e-5
    one = csr_matrix((np.ones(number), (groups, np.arange(number))), shape=(len(costs), number))
    weight = csr_matrix(sizes[exists][None] / 32.0)
    found = milp(
        cost, integrality=np.ones(number), bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one, 1, 1), LinearConstraint(weight, -np.inf, budget / 32)],
        options={"mip_rel_gap": 1e-6, "time_limit": 60},
    )
    if found.x is None:
        raise UserError(f"the integer program found no solution: {found.message}")
    shares = np.full(costs.shape, -1.0)
    shares[exists] = found.x
    return _within(shares.argmax(axis=1), costs, sizes, budget).tolist()


def _within(picked: np.ndarray, costs: np.ndarray, sizes: np.ndarray, budget: int) -> np.ndarray:
    """The choice itself, or, where the solver's tolerance let it pass the budget, with the cheapest steps down that fit."""
    row, picked = np.arange(len(costs)), picked.copy()
    while (over := sizes[row, picked].sum() - budget) > 0:
        saved = sizes[row, picked][:, None] - sizes
        rise = costs - costs[row, picked][:, None]
        # one step that is enough where there is one, else the cheapest a byte
        price = np.where((saved > 0) & np.isfinite(costs), np.maximum(rise, 0) / np.minimum(np.maximum(saved, 1), over), np.inf)
        group, option = np.unravel_index(price.argmin(), price.shape)
        picked[group] = option
    return picked


# --- settings and result ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RepairSettings:
    """How much work the repair may do.

    Attributes:
        tokens: scored calibration tokens of one pass.
        held_tokens: scored held-out tokens.
        rounds: rounds of measurement around the choice, each a pass for every group. None by default: on the bundled bases one
            round took the reduction from 51.3 to 51.7 %.
        blocks: runs of layers that large models are grouped in (:func:`tsugiki.quantize.sensitivity.groups_of`).
        types: that tensors may get, where their rows divide by 256. K-quants alone cost little (predicted: 57.6 % less KL
            instead of 59.8 % on tiny-llama) and are faster on some machines than IQ3 and IQ2.
        margin: nats/token that the smallest file may lose (upper end of the 95 % interval).
    """

    tokens: int = 4096
    held_tokens: int = 16_384
    rounds: int = 0
    blocks: int | None = None
    types: tuple[str, ...] = KINDS
    margin: float = MARGIN
    n_threads: int | None = None
    n_gpu_layers: int = 0

    def __post_init__(self) -> None:
        if not self.types or (wrong := sorted(set(self.types) - set(KINDS))):
            raise UserError(f"types for the repair: {', '.join(wrong) if self.types else 'none'}", hint=f"Known: {', '.join(KINDS)}.")


@dataclass(frozen=True)
class RepairResult:
    """A repaired level.

    Attributes:
        path: the file, and
        bytes, bpw: what it has. ``stock_bytes``, ``stock_bpw``: llama.cpp's own file of ``base_level``.
        budget: as asked for; ``budget_bytes``: the most bytes that the file may have.
        kept: ``repaired``, or ``stock`` where no candidate was better on the held-out samples.
        kl, stock_kl: mean KL against F16 on held-out samples, nats/token; ``reduction``: ``1 − kl / stock_kl``;
            ``reduction_ci``: 95 %, documents drawn again, ``None`` for fewer than 10.
        nll_f16, nll, stock_nll: nats/token, held-out; ``delta_ci``: 95 % interval of ``nll − nll_f16``.
        predicted, simulated: KL on the calibration samples by the additive model, and measured in memory (``None`` for
            the smallest file); ``stock_simulated`` likewise.
        passes: over the calibration tokens, in this run; ``tokens``, ``held_tokens``: scored.
        types: tensor to type; ``changed``: tensor to stock's and its own type, where they differ.
        why: one sentence in ``en`` and ``ja``.
    """

    path: str
    base_level: str
    budget: str
    budget_bytes: int
    bytes: int
    stock_bytes: int
    bpw: float
    stock_bpw: float
    kept: str
    kl: float
    stock_kl: float
    reduction: float
    reduction_ci: tuple[float, float] | None
    nll_f16: float
    nll: float
    stock_nll: float
    delta_ci: tuple[float, float] | None
    predicted: float
    simulated: float | None
    stock_simulated: float
    groups: int
    passes: int
    tokens: int
    held_tokens: int
    seconds: float
    types: dict[str, str] = field(default_factory=dict)
    changed: dict[str, list[str]] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)


def parse_budget(text: str) -> tuple[str, float]:
    """``same``, ``smallest``, ``+MB`` (or ``-MB``) or ``bpw:X`` → its kind and number.

    Raises:
        UserError: anything else.
    """
    if text in ("same", "smallest"):
        return text, 0.0
    kind, number = ("bpw", text[4:]) if text.startswith("bpw:") else ("mb", text)
    try:
        if kind == "mb" and text[:1] not in ("+", "-"):
            raise ValueError
        value = float(number)
        if not np.isfinite(value) or (kind == "bpw" and not 1 < value <= 16):
            raise ValueError
    except ValueError:
        raise UserError(f"the budget {text!r} is not understood", hint="same, smallest, +10 (megabytes) or bpw:4.5") from None
    return kind, value


# --- the repair ---------------------------------------------------------------------------------------------------


def repair(
    f16: Path | str, out: Path | str, *, calib: Path | str, heldout: Path | str, base_level: str = "Q4_K_M",
    imatrix: Path | str | None = None, budget: str = "same", cache: Path | str | None = None,
    settings: RepairSettings | None = None,
) -> RepairResult:
    """Choose a type for each tensor so that KL is least within a budget; the file is whole or absent.

    Args:
        f16: the F16, BF16 or F32 GGUF.
        out: the file to write.
        calib: encoded samples or text that the choice is made on; ``heldout``: others, that the file is judged on.
        base_level: llama.cpp's level to repair, and to be no worse than.
        imatrix: used for stock and for the repaired file alike.
        budget: ``same`` (no more bytes than stock), ``+MB``, ``-MB``, ``bpw:X``, or ``smallest``: the smallest file whose
            loss stays within ``settings.margin``.
        cache: finished sensitivities, so that an interrupted run or another budget need not measure again; by default
            beside ``out``.

    Raises:
        UserError: damaged input, held-out samples that are in the calibration samples, a budget below the smallest
            types, no file within the margin, or a crash of llama.cpp.
    """
    started = time.monotonic()
    settings = settings or RepairSettings()
    f16, out = Path(f16), Path(out)
    kind, _ = parse_budget(budget)
    check_gguf(f16)
    for path in (calib, heldout):
        read_source(path)
    if Path(calib).resolve() == Path(heldout).resolve():
        raise UserError("calibration and held-out samples are the same file", where=str(heldout),
                        hint="A choice judged on the samples that it was made on looks better than it is.")
    shapes = {n: shape for n, (shape, _) in matrices(f16).items()}
    if imatrix:
        refuse_imatrix(read_imatrix(imatrix), {n: (list(t.shape), 0) for n, t in read_header(f16).tensors.items()}, str(imatrix))
    plan = plan_level(f16, base_level, imatrix=imatrix)
    stock_types = {n: plan[n] for n in shapes}
    cache = Path(cache) if cache else out.with_name(f".{out.stem}.sensitivity.jsonl")
    out.parent.mkdir(parents=True, exist_ok=True)
    job = {"path": str(f16), "imatrix": imatrix and str(imatrix), "samples": str(calib), "tokens": settings.tokens,
           "blocks": settings.blocks, "threads": settings.n_threads, "gpu": settings.n_gpu_layers, "cache": str(cache),
           "rounds": settings.rounds, "types": settings.types, "level": base_level, "stock": stock_types}
    with atomic_path(out) as temporary, progress() as bar:
        folder = temporary.with_suffix(".d")
        folder.mkdir(exist_ok=True)
        try:
            stock = folder / "stock.gguf"
            made = make_level(f16, base_level, stock, imatrix=imatrix, n_threads=settings.n_threads)
            fixed = sum(padded_bytes(shapes[n], gguf.GGMLQuantizationType[k]) for n, k in stock_types.items())
            head = made.bytes - fixed  # everything but the matrices: it does not change
            # F32 tensors and the like, which have bits but no choice
            others = made.bpw * made.parameters / 8 - fixed
            tensors = _budget_bytes(budget, fixed, others, made.parameters)
            task = bar.add_task("repair", total=None, note="passes")

            def show(message: dict) -> None:
                bar.update(task, completed=message["done"], total=message["of"])

            def make(number: int, choice: Mapping) -> Path:
                path = folder / f"{number}.gguf"
                size = make_level(f16, base_level, path, imatrix=imatrix, overrides=choice["types"], n_threads=settings.n_threads).bytes
                if size != head + choice["bytes"]:
                    raise UserError(f"llama.cpp wrote {size:,} bytes, {head + choice['bytes']:,} were planned", where=str(f16),
                                    hint="Is there room on the disk? If so, report it: the file may hold a kind of tensor that is not known here.")
                return path

            def held(*files: Path, alone: bool = False) -> dict:
                bar.update(task, note="held-out")
                first, *rest = map(str, files if alone else (f16, *files))
                return run_child("tsugiki.quantize.repair", {
                    "reference": first, "measure": rest, "path": str(f16), "samples": str(heldout), "calib": str(calib),
                    "tokens": settings.held_tokens, "calib_tokens": settings.tokens, "threads": settings.n_threads,
                    "gpu": settings.n_gpu_layers,
                }, name="held-out samples", on_message=show)

            plans = run_child("tsugiki.quantize.repair", job | {"budgets": _series(kind, tensors, shapes, imatrix, settings.types)}, name="repair", on_message=show)
            if kind == "smallest":
                choice, best, found = smallest(plans["plans"], stock, make, held, settings.margin)
                picked = 1
            else:
                choice = plans["plans"][0]
                best = make(0, choice)
                found = held(stock, best)
                picked = better(found)
            numbers = compare(found, picked)
            shutil.move(best if picked else stock, temporary)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        inside = read_types(temporary)
    if not picked:
        choice = {"types": {}, "predicted": plans["stock_predicted"], "simulated": plans["stock_simulated"]}
    types = stock_types | choice["types"]
    return RepairResult(
        path=str(out), base_level=base_level, budget=budget, budget_bytes=head + tensors, bytes=inside.bytes,
        stock_bytes=made.bytes, bpw=inside.bpw, stock_bpw=made.bpw, kept="repaired" if picked else "stock",
        **numbers, predicted=choice["predicted"], simulated=choice["simulated"], stock_simulated=plans["stock_simulated"],
        groups=plans["groups"], passes=plans["passes"], tokens=plans["tokens"], held_tokens=found["scored"],
        seconds=round(time.monotonic() - started, 2), types=types,
        changed={n: [stock_types[n], k] for n, k in types.items() if k != stock_types[n]},
        why=_why(numbers, base_level, inside.bytes, made.bytes, picked, budget),
    )


def _budget_bytes(budget: str, stock: int, others: float, parameters: int) -> int:
    """Bytes that the matrices may have, where stock's have ``stock`` and all other tensors ``others``."""
    kind, value = parse_budget(budget)
    return int({"same": stock, "smallest": 0, "mb": stock + value * 1e6, "bpw": value * parameters / 8 - others}[kind])


def _series(kind: str, most: int, shapes: Mapping[str, Sequence[int]], imatrix, types: Sequence[str]) -> list[int]:
    """The budgets to plan for: one; or, for the smallest file, 32 from the smallest types to Q8_0."""
    if kind != "smallest":
        return [most]
    ends = []
    for index in (0, -1):
        kinds = {n: _kinds(n, s, "", bool(imatrix), types)[index] for n, s in shapes.items()}
        ends.append(sum(padded_bytes(shapes[n], gguf.GGMLQuantizationType[k]) for n, k in kinds.items()))
    return [int(b) for b in np.geomspace(ends[0] + 64 * len(shapes), ends[1], SIZES)]


def _kinds(name: str, shape: Sequence[int], level: str, important: bool, types: Sequence[str] = KINDS, least: float = 0.0) -> list[str]:
    """Types that a tensor may get, smallest first, of at least ``least`` bits a weight."""
    wide = shape[0] % 256 == 0
    kinds = sorted(types if wide else NARROW, key=_bits)
    kinds = [k for k in kinds if shape[0] % _block(k) == 0 and (important or not needs_imatrix(name, k, level))]
    kinds = [k for k in kinds if _bits(k) >= least] or kinds[-1:]
    return kinds or ["F16"]


def _block(kind: str) -> int:
    return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0]


def _bits(kind: str) -> float:
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return 8 * size / block


# --- the child: choices by measurement in memory ------------------------------------------------------------------


def _work(job: dict) -> dict:
    if "measure" in job:
        return _measure(job)
    with ExitStack() as stack:
        simulator, key = open_simulator(job, stack)
        shapes = {n: s for n, (s, _) in matrices(job["path"]).items()}
        groups = groups_of(list(shapes), job["blocks"])
        steps = len(groups) * (1 + job["rounds"]) + 3
        rows = sensitivities(simulator, groups, key=key, cache=Path(job["cache"]), on_done=lambda n: say(done=n, of=steps))
        errors = _Errors(simulator)
        # kl / error of each group, the same for all types
        slopes = [max(r.kl, 0) / max(r.error, 1e-300) for r in rows]
        stock = job["stock"]
        stock_simulated = simulator.divergence(stock)
        stock_predicted = sum(s * sum(errors(n, stock[n]) for n in g.tensors) for s, g in zip(slopes, groups, strict=True))
        plans, done = [], len(groups) + 1
        for budget in job["budgets"]:
            choice, predicted = _choose(groups, slopes, shapes, errors, budget, simulator.importance, job)
            best = {"types": choice, "predicted": predicted, "simulated": None, "round": 0}
            if len(job["budgets"]) == 1:  # of many budgets only a few become files, and those are measured
                best["simulated"] = simulator.divergence(choice)
            for number in range(job["rounds"] if best["simulated"] is not None else 0):
                # what each group adds around the choice, instead of alone
                local = []
                for group in groups:
                    without = simulator.divergence({n: k for n, k in best["types"].items() if n not in group.tensors})
                    error = sum(errors(n, best["types"][n]) for n in group.tensors)
                    local.append(max(best["simulated"] - without, 0) / max(error, 1e-300))
                    done += 1
                    say(done=done, of=steps)
                # the mean of both damps the noise of small differences
                mixed = [(a + b) / 2 for a, b in zip(slopes, local, strict=True)]
                choice, predicted = _choose(groups, mixed, shapes, errors, budget, simulator.importance, job)
                if choice == best["types"]:
                    break
                simulated = simulator.divergence(choice)
                if simulated < best["simulated"]:
                    best = {"types": choice, "predicted": predicted, "simulated": simulated, "round": number + 1}
                else:
                    break
            best["bytes"] = sum(padded_bytes(shapes[n], gguf.GGMLQuantizationType[k]) for n, k in best["types"].items())
            if all(best["types"] != p["types"] for p in plans):
                plans.append(best)
        return {
            "plans": plans, "stock_simulated": stock_simulated, "stock_predicted": stock_predicted, "groups": len(groups),
            "passes": simulator.passes, "tokens": sum(len(s.completion_ids) for s in simulator.samples),
        }


class _Errors:
    """Rounding errors of tensors by type, each computed once."""

    def __init__(self, simulator):
        self.simulator = simulator
        self.known: dict[tuple[str, str], float] = {}

    def __call__(self, name: str, kind: str) -> float:
        if (name, kind) not in self.known:
            self.known[name, kind] = self.simulator.error(name, kind)
        return self.known[name, kind]


def _choose(groups: Sequence[Group], slopes: Sequence[float], shapes: Mapping[str, Sequence[int]], errors, budget: int,
            importance: Mapping, job: Mapping) -> tuple[dict[str, str], float]:
    """Types by the integer program, and the KL that the additive model predicts."""
    bits = 8 * budget / sum(np.prod(s) for s in shapes.values())
    kinds = [*sorted(set(KINDS) | set(NARROW), key=_bits), "F16"]
    costs = np.full((len(groups), len(kinds)), np.inf)
    sizes = np.zeros((len(groups), len(kinds)), np.int64)
    for i, (group, slope) in enumerate(zip(groups, slopes, strict=True)):
        allowed = set.intersection(*(set(_kinds(n, shapes[n], job["level"], n in importance, job["types"], bits - BELOW)) for n in group.tensors))
        for j, kind in enumerate(kinds):
            if kind in allowed:
                costs[i, j] = slope * sum(errors(n, kind) for n in group.tensors)
                sizes[i, j] = sum(padded_bytes(shapes[n], gguf.GGMLQuantizationType[kind]) for n in group.tensors)
    picked = choose(costs, sizes, budget)
    types = {n: kinds[j] for group, j in zip(groups, picked, strict=True) for n in group.tensors}
    return types, float(costs[np.arange(len(groups)), picked].sum())


def _measure(job: dict) -> dict:
    with Engine(job["path"], n_ctx=256, n_seq_max=1) as engine:
        samples = read_samples(job["samples"], engine, job["tokens"])
        calib = read_samples(job["calib"], engine, job["calib_tokens"])
    seen = {digest(s.ids) for s in calib}
    if shared := sum(digest(s.ids) in seen for s in samples):
        raise UserError(f"{shared} of {len(samples)} held-out samples are calibration samples too", where=job["samples"],
                        hint="Give samples that the choice has not seen.")
    found = measure(job["reference"], job["measure"], samples, threads=job["threads"], n_gpu_layers=job["gpu"],
                    on_done=lambda n, of: say(done=n, of=of))
    return {"kl": found["kl"].tolist(), "nll": found["nll"].tolist(), "tokens": found["tokens"].tolist(),
            "documents": [s.document for s in samples], "scored": int(found["tokens"].sum())}


# --- the verdict --------------------------------------------------------------------------------------------------


def better(found: Mapping) -> int:
    """1 where the candidate's mean KL on held-out samples is below stock's, else 0: never worse.

    Args:
        found: ``kl`` ``(2, N)``, summed over each sample's tokens, stock's first.
    """
    stock, own = (sum(row) for row in found["kl"])
    return int(own < stock)


def smallest(plans: Sequence[Mapping], stock: Path, make: Callable[[int, Mapping], Path], held: Callable[..., dict], margin: float):
    """The smallest planned file that is shown to lose less than ``margin``, by halving: a larger file is taken to lose less.

    The search needs each file's NLL only, so F16 is read twice, for stock and for the file that was found, and each file tried
    is read alone: ``n + 4`` passes over the held-out samples for ``n`` tries, instead of ``2 n + 2``, and one file in memory.

    Args:
        plans: with their ``bytes``; ``make(number, plan)`` makes the file, ``held(*files)`` measures files beside F16,
            ``held(file, alone=True)`` its ``nll`` only.

    Returns:
        The plan, its file, and the measurements of stock and of the file together.

    Raises:
        UserError: not even the largest is within the margin.
    """
    base, best = held(stock), None
    plans = sorted(plans, key=lambda p: p["bytes"])
    low, high = 0, len(plans)
    while low < high:
        middle = (low + high) // 2
        path = make(middle, plans[middle])
        tried = held(path, alone=True)
        interval = _loss_interval(base | {"nll": [base["nll"][0], tried["nll"][0]]}, 0)
        if interval is None:
            raise UserError(f"{len(set(base['documents']))} held-out documents are too few for an interval", hint="Give at least 10.")
        if interval[1] <= margin:
            if best:
                best[1].unlink()
            best, high = (plans[middle], path), middle
        else:
            path.unlink()
            low = middle + 1
    if best is None:
        raise UserError(f"no file loses less than {margin:g} nats/token on the held-out samples; the largest tried loses up to {interval[1]:.4f}",
                        hint="Give more held-out samples, or raise the margin.")
    plan, path = best
    own = held(path)
    return plan, path, base | {"kl": base["kl"] + own["kl"], "nll": base["nll"] + own["nll"][1:]}


def _loss_interval(found: Mapping, index: int) -> tuple[float, float] | None:
    """95 % interval of a file's NLL above F16's, nats a token, documents drawn again."""
    nll = np.asarray(found["nll"], np.float64)
    return ratio_intervals((nll[1 + index] - nll[0])[None], np.asarray(found["tokens"]), found["documents"])[0]


def compare(found: Mapping, picked: int) -> dict:
    """Numbers of :class:`RepairResult` from the measurements of stock and the candidate, ``picked`` of the two kept."""
    kl, nll, tokens = (np.asarray(found[k], np.float64) for k in ("kl", "nll", "tokens"))
    total, interval = tokens.sum(), None
    means = kl.sum(axis=1) / total
    if picked and len(set(found["documents"])) >= MIN_CLUSTERS:
        draws = resampled_ratios(kl, tokens, found["documents"], resamples=2000, seed=0)
        interval = tuple(float(x) for x in np.quantile(1 - draws[:, 1] / draws[:, 0], [0.025, 0.975]))
    return {
        "kl": float(means[picked]), "stock_kl": float(means[0]), "reduction": float(1 - means[picked] / means[0]) if means[0] else 0.0,
        "reduction_ci": interval, "nll_f16": float(nll[0].sum() / total), "nll": float(nll[1 + picked].sum() / total),
        "stock_nll": float(nll[1].sum() / total), "delta_ci": _loss_interval(found, picked),
    }


def _why(numbers: Mapping, level: str, size: int, stock: int, picked: int, budget: str) -> dict[str, str]:
    share, kl, old = f"{100 * abs(numbers['reduction']):.0f}", f"{numbers['kl']:.5f}", f"{numbers['stock_kl']:.5f}"
    now, before = f"{size / 1e6:,.2f} MB", f"{stock / 1e6:,.2f} MB"
    if not picked:
        return {"en": f"No choice of types was better than stock {level} on the held-out samples, so the file is stock's ({before}, KL {old}).",
                "ja": f"未使用サンプルで標準の{level}を上回る型の割り当てがなかったため、標準のファイルのままです({before}、KL {old})。"}
    less = numbers["reduction"] >= 0
    return {
        "en": f"{now} against {before} of stock {level}: mean KL {kl} against {old} nats/token on held-out samples, {share} % {'less' if less else 'more'}."
        + (" It is the smallest file tried whose loss stays within the margin." if budget == "smallest" else ""),
        "ja": f"標準の{level}の{before}に対し{now}。未使用サンプルでの平均KLは{old}に対し{kl} nats/トークンで、{share} %{'減' if less else '増'}です。"
        + ("損失が許容幅に収まる、試した中で最小のファイルです。" if budget == "smallest" else ""),
    }


if __name__ == "__main__":
    serve(_work)
