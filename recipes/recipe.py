"""The staged recipe, top to bottom: a domain and a base go in, a small model and its proof come out.

    data → sweep → gguf → levels → check → evaluate → report

Each stage is a function of a :class:`Run` and writes one folder of ``runs/<domain>/<base>/``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.markup import escape

import tsugiki
from tsugiki.adapt.fit import FitSettings
from tsugiki.adapt.sweep import SweepSettings, run_sweep
from tsugiki.artifacts import digest, read_json, sha256_file, write_json
from tsugiki.bases import Base, fingerprint, load_bases, profile, resolve
from tsugiki.errors import UserError
from tsugiki.licences import card_licence, check_licence, licence_notes
from tsugiki.progress import console
from tsugiki.quantize.check import CheckSettings
from tsugiki.recipes.before_after import BenchmarkChoice
from tsugiki.recipes.domains import Domain, domain_digest, load_domain, load_splits
from tsugiki.recipes.stages import alone, code_digest, run_stage, stage_hash
from tsugiki.results import Result, replace_results
from tsugiki.samples import read_encoded, write_encoded

BASES = Path(__file__).parent / "bases.yaml"
STAGES = ("data", "sweep", "gguf", "levels", "check", "evaluate", "report")
LEVELS = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M")
STEP_ITEMS = 100  # test items on which adapter, merged model, F16 and levels are compared step by step
LARGE = 500_000_000  # parameters from which a base wants a small rank and rate


@dataclass(frozen=True)
class RecipeSettings:
    """All settings of a run; ``--set sweep.epochs=3`` and the like change them."""

    sweep: SweepSettings = field(default_factory=SweepSettings)
    levels: tuple[str, ...] = field(default=LEVELS, metadata={"help": "quantization levels to make"})
    imatrix: bool = field(default=True, metadata={"help": "quantize with an importance matrix of the training data"})
    imatrix_text: str = field(default="", metadata={"help": "general text (a file) for half of the importance matrix's tokens; empty: training data alone"})
    check_items: int = field(default=200, metadata={"help": "test items that each level is checked on, in hash order"})
    evaluate_items: int = field(default=500, metadata={"help": "test items scored before and after adaptation, in hash order"})
    sensitivity_tokens: int = field(default=512, metadata={"help": "tokens on which each group of tensors is lowered alone, for the heat map; 0: none"})
    check: CheckSettings = field(default_factory=CheckSettings)
    evaluate: BenchmarkChoice = field(default_factory=BenchmarkChoice)

    def __post_init__(self) -> None:
        if self.sensitivity_tokens < 0:
            raise UserError(f"sensitivity_tokens must be at least 0, not {self.sensitivity_tokens}")
        for name in ("check_items", "evaluate_items"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.levels != LEVELS:
            from tsugiki.quantize.levels import file_type

            if not self.levels or len(set(self.levels)) < len(self.levels) or "F16" in self.levels:
                raise UserError(f"levels must be distinct and other than F16, which is always made, not {list(self.levels)}")
            for level in self.levels:
                file_type(level)


@dataclass(frozen=True)
class Run:
    """One domain on one base: what the stages share; ``part`` is the folder between the two of a run beside the main one."""

    domain: Domain
    base: Base
    base_dir: Path
    folder: Path
    data_dir: Path | None
    settings: RecipeSettings
    part: str = ""

    @property
    def name(self) -> str:
        return "/".join(filter(None, (self.domain.name, self.part, self.base.name)))

    @property
    def results(self) -> Path:
        """The results table of all runs."""
        return self.folder.parents[2 if self.part else 1] / "results.sqlite"


def open_run(
    domain: str, base: str, *, runs: Path = Path("runs"), data_dir: Path | None = None, changes: list[str] | None = None
) -> Run:
    """Find the domain and the base, and settle the settings.

    Args:
        domain: a domain's name or YAML.
        base: a name in ``bases.yaml`` or a folder.
        runs: where runs are kept.
        data_dir: where the domain's files lie.
        changes: ``key=value`` settings.

    Raises:
        UserError: an unknown domain, base or setting; a base that cannot be had, or that allows no derived models.
    """
    found = load_domain(domain)
    bases = load_bases(BASES)
    if base in bases:
        check_licence(bases[base])  # before its weights are fetched
    base_dir = resolve(base, bases)
    known = bases.get(base) or Base(name=folder_name(base_dir), path=base_dir, family="", licence=card_licence(base_dir))
    check_licence(known)
    large = (profile(base_dir).parameters or 0) >= LARGE
    settings = settle(found, changes or [], large=large)
    return Run(found, known, base_dir, runs / found.name / known.name, data_dir, settings)


def folder_name(folder: Path) -> str:
    """The name of a base that was given as a folder."""
    name = "".join(c if c.isalnum() or c in "._-" else "-" for c in folder.name).strip(".-")
    if not name:
        raise UserError(f"the folder {folder} has no name that could name a base", hint="Rename it.")
    return name


# --- settings -------------------------------------------------------------------------------------------------


def settle(domain: Domain, changes: list[str], *, large: bool) -> RecipeSettings:
    """The settings of a run: the kit's defaults for the base's size, the domain's own, then the user's."""
    fit = FitSettings()
    if large:
        fit = FitSettings(rank=16, alpha=32, learning_rate=2e-4, epochs=3, batch_size=16, micro_batch=2)
    # of a large base the heat map costs 60 passes: on request
    settings = RecipeSettings(sweep=SweepSettings(fit=fit), **({"sensitivity_tokens": 0} if large else {}))
    for key, value in domain.sweep.items():
        settings = _change(settings, f"sweep.{key}", value, where=f"{domain.path.name} (sweep.{key})")
    settings = dataclasses.replace(settings, check_items=domain.check_items)
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals:
            raise UserError(f"--set wants key=value, not {change!r}", hint="For example --set sweep.epochs=3")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"--set {key}: {text!r} is not a value: {error}") from error
        settings = _change(settings, key.strip(), value, where=f"--set {key}")
    return settings


def setting_names() -> dict[str, dataclasses.Field]:
    """Every key that ``--set`` takes, with its field."""
    names = {f"sweep.{f.name}": f for f in dataclasses.fields(SweepSettings) if f.name != "fit"}
    names |= {f"sweep.{f.name}": f for f in dataclasses.fields(FitSettings)}
    names |= {f"check.{f.name}": f for f in dataclasses.fields(CheckSettings)}
    names |= {f"evaluate.{f.name}": f for f in dataclasses.fields(BenchmarkChoice)}
    names |= {f.name: f for f in dataclasses.fields(RecipeSettings) if f.name in ("levels", "imatrix", "imatrix_text", "check_items", "evaluate_items", "sensitivity_tokens")}
    return names


def _change(settings: RecipeSettings, key: str, value: Any, *, where: str) -> RecipeSettings:
    names = setting_names()
    if key not in names:
        near = difflib.get_close_matches(key, names, n=1)
        raise UserError(f"there is no setting {key!r}", where=where,
                        hint=f"Did you mean {near[0]}? All: {', '.join(names)}" if near else f"All: {', '.join(names)}")
    value = _cast(value, names[key], where)
    section, _, name = key.rpartition(".")
    try:
        if not section:
            return dataclasses.replace(settings, **{name: value})
        if section in ("check", "evaluate"):
            return dataclasses.replace(settings, **{section: dataclasses.replace(getattr(settings, section), **{name: value})})
        sweep = settings.sweep
        if name in {f.name for f in dataclasses.fields(FitSettings)}:
            if name == "batch_size":
                value = {"batch_size": value, "micro_batch": math.gcd(value, sweep.fit.micro_batch)}
            sweep = dataclasses.replace(sweep, fit=dataclasses.replace(sweep.fit, **(value if isinstance(value, dict) else {name: value})))
        else:
            sweep = dataclasses.replace(sweep, **{name: value})
        return dataclasses.replace(settings, sweep=sweep)
    except UserError as error:
        raise UserError(str(error), where=where) from error


def _cast(value: Any, target: dataclasses.Field, where: str) -> Any:
    """Check a YAML value against a field's type."""
    kind = str(target.type)
    if kind.startswith("float") and isinstance(value, str):  # YAML 1.1 reads 3e-3 as text
        with contextlib.suppress(ValueError):
            value = float(value)
    if kind.startswith("tuple"):
        inner = int if "int" in kind else str
        items = value if isinstance(value, (list, tuple)) else [value]
        if all(isinstance(i, inner) and not isinstance(i, bool) for i in items):
            return tuple(items)
    elif (kind.startswith("bool") and (isinstance(value, bool) or (value is None and "None" in kind))) or (kind.startswith("int") and isinstance(value, int) and not isinstance(value, bool)):
        return value
    elif kind.startswith("float") and isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    elif kind.startswith("str") and isinstance(value, str):
        return value
    raise UserError(f"{target.name} must be of type {kind}, not {value!r}", where=where)


# --- the recipe -----------------------------------------------------------------------------------------------


def run_recipe(run: Run, stages: tuple[str, ...] = STAGES) -> Path:
    """Run the stages that are not done yet, in order; returns the run's folder."""
    unknown = [s for s in stages if s not in STAGES]
    if unknown:
        near = difflib.get_close_matches(unknown[0], STAGES, n=1)
        raise UserError(f"there is no stage {unknown[0]!r}",
                        hint=f"{f'Did you mean {near[0]}? ' if near else ''}The stages: {', '.join(STAGES)}")
    began = time.monotonic()
    console.print(f"[bold]{escape(_title(run.domain))}[/] ({run.domain.name}) on [bold]{run.base.name}[/] → {escape(str(run.folder))}")
    for _, note in licence_notes(run.base, run.base_dir):
        console.print(f"  [yellow]{escape(note)}[/]")
    steps = {
        "data": data_stage, "sweep": sweep_stage, "gguf": gguf_stage, "levels": levels_stage,
        "check": check_stage, "evaluate": evaluate_stage, "report": report_stage,
    }
    with alone(run.folder):
        ran = [name for name in STAGES if name in stages and steps[name](run)]
    if ran:
        console.print(f"[bold]{run.name}[/]: {', '.join(ran)} in {time.monotonic() - began:.0f} s")
    else:
        console.print(f"[bold]{run.name}[/]: nothing to do, every stage is done")
    return run.folder


def _title(domain: Domain) -> str:
    return domain.title.get("ja") or domain.title["en"]


def data_stage(run: Run) -> bool:
    """Samples: read, validated, split, without duplicates across splits, encoded with the base's chat template."""
    domain = run.domain
    inputs = {
        "domain": domain_digest(domain, run.data_dir),
        "system": domain.system,
        "max_tokens": domain.max_tokens,
        "base": [fingerprint(run.base_dir), run.base.family],
        "told": [domain.title, domain.licence, domain.credit, domain.scoring],
        "code": code_digest("tsugiki.adapt.samples", "tsugiki.chat", "tsugiki.recipes.domains"),
    }

    def work(folder: Path) -> list[Path]:
        from tsugiki.adapt.samples import drop_long
        from tsugiki.chat import encode, end_of_turn_id, supply_template
        from tsugiki.tokenizers import load_tokenizer

        context = profile(run.base_dir).context
        if context and domain.max_tokens > context:
            raise UserError(f"max_tokens is {domain.max_tokens:,}, and the base {run.base.name} has a context of {context:,} tokens",
                            where=str(domain.path), hint=f"Set max_tokens to {context:,} or less, or take a base with a longer context.")
        base_dir = supply_template(run.base_dir, run.base.family, folder / "base")
        tokenizer = load_tokenizer(base_dir)
        splits = load_splits(domain, run.data_dir)
        dropped = dict(splits.dropped)
        encoded = {}
        for name in ("train", "valid", "test"):
            kept, lost = drop_long(encode(tokenizer, getattr(splits, name), domain.system), domain.max_tokens, split=name)
            encoded[name] = kept
            dropped |= lost
            write_encoded(folder / f"{name}.jsonl", kept)
        everything = [s for part in encoded.values() for s in part]
        if not encoded["train"] or not encoded["test"]:
            raise UserError(f"the domain {domain.name} has {len(encoded['train'])} training and {len(encoded['test'])} test samples",
                            hint="Both are needed.")
        documents = {s.document for s in encoded["test"]}
        if len(documents) < 2:
            raise UserError(
                f"the {len(encoded['test'])} test samples are of one document, so that no interval can be given",
                where=str(domain.path), hint="Name a finer document field, or none: then every sample is its own document.",
            )
        kinds: dict[str, int] = {}
        for s in encoded["test"]:
            kinds[s.kind or "all"] = kinds.get(s.kind or "all", 0) + 1
        write_json(
            folder / "data.json",
            {
                "domain": domain.name, "title": domain.title, "base": run.base.name, "licence": domain.licence,
                "credit": domain.credit, "system": domain.system, "scoring": domain.scoring,
                "end_of_turn": end_of_turn_id(tokenizer),
                "samples": {**{k: len(v) for k, v in encoded.items()}, "dropped": sum(dropped.values())},
                "dropped_by": dropped, "kinds": kinds,
                "tokens": {
                    "prompt_mean": sum(len(s.prompt_ids) for s in everything) / len(everything),
                    "completion_mean": sum(len(s.completion_ids) for s in everything) / len(everything),
                    "longest": max(len(s.ids) for s in everything),
                },
            },
        )
        counts = ", ".join(f"{k} {len(v):,}" for k, v in encoded.items())
        console.print(f"  {counts}; dropped {sum(dropped.values()):,}")
        return [folder / f"{n}.jsonl" for n in ("train", "valid", "test")] + [folder / "data.json"]

    return run_stage(run.folder / "data", inputs, work, console_title="samples, splits, token ids")


def base_folder(run: Run) -> Path:
    """The base as the stages load it: with a chat template, its own or the family's."""
    supplied = run.folder / "data" / "base"
    return supplied if supplied.exists() else run.base_dir


def sweep_stage(run: Run) -> bool:
    """One adapter for each sample count, all scored on the same test samples; the best is kept."""
    watched = ["valid.jsonl"] if run.settings.sweep.search == "adaptive" else []
    inputs = {
        "data": stage_hash(run.folder / "data", "train.jsonl", "test.jsonl", *watched),
        "base": fingerprint(run.base_dir),
        "settings": dataclasses.asdict(run.settings.sweep),
        "code": code_digest("tsugiki.adapt.sweep"),
    }

    def work(folder: Path) -> list[Path]:
        result = run_sweep(base_folder(run), run.folder / "data", folder, run.settings.sweep)
        best = result["optimum"]
        test_items = read_json(run.folder / "data" / "data.json")["samples"]["test"]
        console.print(
            f"  optimum: {best['n']:,} samples, test NLL {best['nll']:.4f} nats/token "
            f"({best['nll_ci'][0]:.4f} to {best['nll_ci'][1]:.4f}); within one standard error: {best['one_se_n']:,}"
        )
        if other := result.get("equal_steps"):
            console.print(f"  with equal steps: {other['optimum']['n']:,} samples, test NLL {other['optimum']['nll']:.4f} nats/token")
        if ahead := result["forecast"]:
            console.print(
                f"  with {ahead['at']:,} samples the law of the curve expects {ahead['nll']:.4f} ({ahead['nll_ci'][0]:.4f} to "
                f"{ahead['nll_ci'][1]:.4f}): {100 * ahead['gain']:.0f} % less; worth collecting: {ahead['answer']}"
            )
        replace_results(
            run.results, run.name, "sweep",
            [
                Result(run.name, run.base.name, run.domain.name, "nll", p["nll"], adapter=f"n{p['n']}-s{p['seed']}",
                       n=test_items, settings={"n": p["n"], "seed": p["seed"], "epochs": p["epochs"], "ci": p["nll_ci"]},
                       provenance=digest(inputs))
                for p in result["points"]
            ],
        )
        return [folder / "sweep.json", folder / "adapter"]

    return run_stage(run.folder / "sweep", inputs, work, console_title="LoRA at each sample count", keep_partial=True)


def gguf_stage(run: Run) -> bool:
    """Base and best adapter as one F16 GGUF; the same token ids and logits as transformers, or it is said."""
    inputs = {
        "sweep": stage_hash(run.folder / "sweep", "adapter"),
        "data": stage_hash(run.folder / "data", "test.jsonl"),
        "base": [fingerprint(run.base_dir), run.base.hub_id, run.base.licence, run.base.languages],
        "code": code_digest("tsugiki.quantize.convert", "tsugiki.quantize.gate"),
    }

    def work(folder: Path) -> list[Path]:
        from transformers.utils import logging as transformers_logging

        from tsugiki.quantize.convert import convert
        from tsugiki.quantize.gate import GateSettings, check_gate, gate
        from tsugiki.quantize.levels import read_types

        transformers_logging.disable_progress_bar()  # a bar over the few tensors of a load says nothing
        base_dir, adapter = base_folder(run), run.folder / "sweep" / "adapter"
        out = folder / "model-F16.gguf"
        written = convert(base_dir, out, adapter, name=f"{run.base.name}-{run.domain.name}",
                          licence=run.base.licence or None, languages=run.base.languages, base_model=run.base.hub_id or run.base.name)
        for note in written.notes:
            console.print(f"  [yellow]{escape(note)}[/]")
        convert(base_dir, folder / "base-F16.gguf", name=run.base.name, languages=run.base.languages)
        test = read_encoded(run.folder / "data" / "test.jsonl")
        # differences with a known reason are counted, not refused: what is trained, scored and compared is ids, not text
        found = gate(out, base_dir, adapter, texts=[t for s in test for t in (s.prompt, s.completion)], samples=test,
                     system=run.domain.system, settings=GateSettings(max_explained=1.0))
        check_gate(found)
        same, logits = found["ids"], found["logits"]
        console.print(
            f"  token ids: {same['identical']:,} of {same['texts']:,} texts as in transformers; logits: KL {logits['kl_mean']:.1e} "
            f"nats/token, NLL {logits['nll_hf']:.4f} → {logits['nll_gguf']:.4f}"
        )
        inside = read_types(out)
        write_json(
            folder / "gguf.json",
            {
                "path": out.name, "bytes": inside.bytes, "sha256": sha256_file(out), "bpw": inside.bpw, "types": inside.types,
                "conversion": dataclasses.asdict(written) | {"path": out.name},
                "parity": {k: same[k] for k in ("texts", "identical", "rate")},
                "parity_groups": [{"group": g, **v} for g, v in same["groups"].items()],
                "differences": same["differences"],
                "template_identical": same["template"], "templates": found["templates"], "bos": same["bos"], "notes": found["notes"], "stops": found["stops"],
                "logits": logits,
            },
        )
        return [out, folder / "base-F16.gguf", folder / "gguf.json"]

    return run_stage(run.folder / "gguf", inputs, work, console_title="base + adapter as F16 GGUF, compared with transformers")


def levels_stage(run: Run) -> bool:
    """The quantized files, and what was really written into them."""
    general = [Path(run.settings.imatrix_text)] if run.settings.imatrix_text else []
    for path in general:
        if not path.is_file():
            raise UserError("there is no such file", where=f"imatrix_text: {path}", hint="Name a file of plain text, or .jsonl.")
    inputs = {
        "gguf": stage_hash(run.folder / "gguf", "model-F16.gguf"),
        "levels": list(run.settings.levels),
        "imatrix": run.settings.imatrix and [stage_hash(run.folder / "data", "train.jsonl"), *map(sha256_file, general)],
        "code": code_digest("tsugiki.quantize.levels", "tsugiki.quantize.imatrix"),
    }

    def work(folder: Path) -> list[Path]:
        from tsugiki.quantize.imatrix import make_imatrix
        from tsugiki.quantize.levels import make_level

        f16 = run.folder / "gguf" / "model-F16.gguf"
        matrix = folder / "imatrix.gguf" if run.settings.imatrix else None
        if matrix:
            make_imatrix(f16, matrix, domain=run.folder / "data" / "train.jsonl", general=general)
        rows = []
        for level in run.settings.levels:
            out = folder / f"model-{level}.gguf"
            made = make_level(f16, level, out, imatrix=matrix)
            rows.append({**dataclasses.asdict(made), "level": level, "path": out.name, "sha256": sha256_file(out)})
            console.print(f"  {level:<7} {made.bytes / 1e6:7.1f} MB  {made.bpw:5.2f} bits/weight"
                          + (f"  [yellow]{len(made.fallbacks)} tensors in another type[/]" if made.fallbacks else ""))
        write_json(folder / "levels.json", {"levels": rows, "imatrix": matrix.name if matrix else None})
        files = [folder / f"model-{level}.gguf" for level in run.settings.levels] + [folder / "levels.json"]
        return [*files, matrix] if matrix else files

    return run_stage(run.folder / "levels", inputs, work, console_title="quantization")


def _level_paths(run: Run) -> dict[str, Path]:
    return {level: run.folder / "levels" / f"model-{level}.gguf" for level in run.settings.levels}


def check_stage(run: Run) -> bool:
    """What each level lost, measured on the same test ids against F16, and which file to take."""
    settings = run.settings.check
    inputs = {
        "data": stage_hash(run.folder / "data", "test.jsonl"),
        "gguf": stage_hash(run.folder / "gguf", "model-F16.gguf"),
        "levels": stage_hash(run.folder / "levels", *(f"model-{level}.gguf" for level in run.settings.levels)),
        "steps": [fingerprint(run.base_dir), stage_hash(run.folder / "sweep", "adapter")],
        "sensitivity": run.settings.sensitivity_tokens and [run.settings.sensitivity_tokens, run.settings.imatrix],
        "settings": {**dataclasses.asdict(settings), "items": run.settings.check_items},
        "scoring": [run.domain.scoring, run.domain.max_new_tokens],
        "code": code_digest("tsugiki.quantize.check", "tsugiki.quantize.attribution", "tsugiki.quantize.sensitivity"),
    }

    def work(folder: Path) -> list[Path]:
        from tsugiki.quantize.attribution import attribute
        from tsugiki.quantize.check import cache_probe, check
        from tsugiki.quantize.profile import file_profile
        from tsugiki.quantize.sensitivity import sensitivity

        data = read_json(run.folder / "data" / "data.json")
        test = read_encoded(run.folder / "data" / "test.jsonl")[: run.settings.check_items]
        found = check(
            run.folder / "gguf" / "model-F16.gguf", _level_paths(run), test, settings=settings,
            scoring=run.domain.scoring, max_new_tokens=run.domain.max_new_tokens, end_of_turn=data["end_of_turn"],
        )
        found["attribution"] = attribute(
            base_folder(run), run.folder / "sweep" / "adapter", {"F16": run.folder / "gguf" / "model-F16.gguf", **_level_paths(run)},
            test[:STEP_ITEMS], settings=settings,
        )
        if why := found["attribution"].get("left_out"):
            console.print(f"  [yellow]the steps are not measured one by one: {escape(why)}[/]")
        if tokens := run.settings.sensitivity_tokens:
            found["sensitivity"] = sensitivity(
                run.folder / "gguf" / "model-F16.gguf", run.folder / "data" / "test.jsonl", tokens=tokens,
                imatrix=run.folder / "levels" / "imatrix.gguf" if run.settings.imatrix else None,
            )
        built = file_profile(run.folder / "gguf" / "model-F16.gguf")
        found["profile"] = built.as_dict()
        level = found["recommended"]["level"]
        if built.outlying:  # quantized keys in the cache may ruin such a model whatever its weights are
            path = ({"F16": run.folder / "gguf" / "model-F16.gguf"} | _level_paths(run))[level]
            found["cache"] = {"file": path.name, "rows": cache_probe(path, test[:STEP_ITEMS])}
            keys = {r["keys"]: r["kld_mean"] for r in found["cache"]["rows"] if r["keys"] != "f16"}
            console.print(f"  [yellow]outlying key biases in {len(built.outlying)} layer(s)[/]: with quantized keys in the cache {level}'s predictions "
                          "move by KL " + ", ".join(f"{kl:.1e} ({kind})" for kind, kl in keys.items()))
        write_json(folder / "check.json", found)
        for row in found["levels"]:
            console.print(f"  {row['level']:<7} {row['verdict']:<12} ΔNLL {row['delta_nll']:+.4f}  KL {row['kld_mean']:.5f}  "
                          f"same top token {row['top1']:.1%}  score {row['score']:.3f}")
        console.print(f"  take [bold]{found['recommended']['level']}[/]: {found['recommended']['why']['en']}")
        replace_results(
            run.results, run.name, "check",
            [
                Result(f"{run.name}/{row['level']}", run.base.name, run.domain.name, metric, row[metric], level=row["level"],
                       n=len(test), provenance=digest(inputs))
                for row in found["levels"]
                for metric in ("nll", "score", "kld_mean", "gen_tok_s", "peak_rss")
                if row.get(metric) is not None
            ],
        )
        return [folder / "check.json"]

    return run_stage(run.folder / "check", inputs, work, console_title="damage of each level, on the same test ids")


def evaluate_stage(run: Run) -> bool:
    """The domain score before and after adaptation, benchmarks on every model, what changed, and examples of answers."""
    choice = run.settings.evaluate
    stage_hash(run.folder / "check")
    level = read_json(run.folder / "check" / "check.json")["recommended"]["level"]
    inputs = {
        "data": stage_hash(run.folder / "data", "test.jsonl"),
        "gguf": stage_hash(run.folder / "gguf", "model-F16.gguf", "base-F16.gguf"),
        "levels": stage_hash(run.folder / "levels", *(f"model-{name}.gguf" for name in run.settings.levels)),
        "recommended": level,
        "scoring": [run.domain.scoring, run.domain.max_new_tokens, run.settings.evaluate_items],
        "benchmarks": [dataclasses.asdict(choice), *(benchmark_data(run.data_dir) if choice.tasks or choice.suites else ())],
        "code": code_digest("tsugiki.recipes.before_after"),
    }
    results = run.results

    def work(folder: Path) -> list[Path]:
        from tsugiki.recipes.before_after import before_after

        found = before_after(
            run.folder, run.domain, folder, items=run.settings.evaluate_items, benchmarks=choice, data_dir=run.data_dir,
            tokenizer=base_folder(run), results=results,
        )
        write_json(folder / "evaluate.json", found)
        own = [r for r in found["rows"] if not r.get("family")]
        for row in own:
            console.print(f"  {row['model']:<8} {row['task']:<28} {row['metric']} {row['value']:.3f} ± {row['stderr'] or 0:.3f} (n {row['n']})")
        for row in (c for c in found["changes"] if c["to"] in ("adapted", level)):  # the others are in the report
            interval = f" ({row['ci'][0]:+.3f} to {row['ci'][1]:+.3f})" if row["ci"] else ""
            console.print(f"  {row['family']:<8} {row['task']:<20} {row['from']} → {row['to']}: {row['difference']:+.3f}{interval} {row['change']}")
        for row in found["not_measured"]:
            console.print(f"  [yellow]not measured[/] {escape(row['task'])}: {escape(row['why'])}")
        replace_results(
            results, run.name, "evaluate",
            [Result(f"{run.name}/{r['model']}", run.base.name, r["task"], r["metric"], r["value"], stderr=r["stderr"], n=r["n"],
                    provenance=digest(inputs))
             for r in own],
        )
        return [folder / name for name in ("evaluate.json", "answers-base.jsonl", "answers-adapted.jsonl")]

    # the benchmarks' finished requests are kept, so that a run that was killed goes on
    return run_stage(run.folder / "evaluate", inputs, work, console_title="what was gained, what was forgotten", keep_partial=True)


def benchmark_data(data_dir: Path | None) -> list[Any]:
    """The tasks' definitions, and which benchmarks lie in the data folder: with more of them, more is measured."""
    from tsugiki.evaluate.data import data_folder
    from tsugiki.evaluate.suites import TASKS

    folder = data_folder(data_dir)[0]
    there = folder / "benchmarks" if folder else None
    return [digest({p.name: sha256_file(p) for p in sorted(TASKS.glob("*")) if p.suffix in (".yaml", ".py")}),
            sorted(p.name for p in there.iterdir()) if there and there.is_dir() else []]


def report_stage(run: Run) -> bool:
    """``summary.json`` for programs, ``report.html`` for people, ``model-card.md`` for whoever gets the files."""
    from tsugiki.recipes.report import bases_page, scaling_page, write_report

    stages = [s for s in STAGES if s != "report" and (run.folder / s / "stage.json").exists()]
    shell = sorted(Path(tsugiki.__file__).parent.glob("*.html"))
    templates = [Path(__file__).with_name("report.html"), Path(__file__).with_name("model_card.md.j2"), *shell]
    inputs = {
        "pages": [scaling_page(run.folder), bases_page(run.folder)],
        "stages": {s: sha256_file(run.folder / s / "stage.json") for s in stages},
        "code": code_digest("tsugiki.recipes.report", "tsugiki.recipes.summary", "tsugiki.recipes.card"),
        "templates": [sha256_file(path) for path in templates],
        "base": [run.base.name, run.base.hub_id, run.base.revision, run.base.licence, run.base.obligations],
    }

    def work(folder: Path) -> list[Path]:
        from tsugiki.recipes.card import write_card
        from tsugiki.recipes.summary import build_summary

        write_card(run.folder, build_summary(run.folder), run.base)
        page = write_report(run.folder)
        console.print(f"  {escape(str(page))}")
        return []

    if not all((run.folder / name).exists() for name in ("report.html", "summary.json", "model-card.md")):
        (run.folder / "report" / "stage.json").unlink(missing_ok=True)
    return run_stage(run.folder / "report", inputs, work, console_title="summary.json and report.html")
