"""Benchmarks on finished models: tasks run by lm-eval on GGUF files and Hugging Face folders, results kept."""

from __future__ import annotations

import importlib.metadata
import math
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tsugiki.artifacts import digest, write_jsonl
from tsugiki.bases import Base, fingerprint, resolve
from tsugiki.errors import UserError, raise_problems
from tsugiki.evaluate.gguf_file import check_gguf
from tsugiki.evaluate.suites import Benchmark, draw_shots_anew, first_line, quiet, shot_seed
from tsugiki.intervals import clustered_stderr
from tsugiki.pool import run_here, runner
from tsugiki.results import Result, replace_results

LONGEST = 8  # prompts of a task, the longest by bytes, that are encoded to see whether they fit the context


@dataclass(frozen=True)
class Model:
    """One model to score.

    Attributes:
        name: in tables, file names and the results table, for example ``setsubi/tiny-llama/Q4_K_M``.
        path: a ``.gguf`` file, or the folder of a Hugging Face model.
        run: ``<domain>/<base>`` where it belongs to a run of the recipe.
        base, adapter, level: its parts as the results table names them; empty where there is none.
        tokenizer: folder whose Hugging Face tokenizer encodes a GGUF's prompts; None: the file's own.
    """

    name: str
    path: Path
    run: str = ""
    base: str = ""
    adapter: str = ""
    level: str = ""
    tokenizer: Path | None = None

    @property
    def is_gguf(self) -> bool:
        return self.path.suffix == ".gguf"


@dataclass(frozen=True)
class BenchmarkSettings:
    """How tasks are run; all of it is kept beside the scores."""

    limit: int | None = field(default=None, metadata={"help": "items of each task, the first ones; None: all"})
    context: int | None = field(default=None, metadata={"help": "tokens of context of a GGUF; None: all it was trained for"})
    truncate: bool = field(default=False, metadata={"help": "cut prompts that do not fit on the left and count them"})
    chat: bool = field(default=False, metadata={"help": "put every prompt into the model's chat template"})
    allow_code: bool = field(default=False, metadata={"help": "run the code that models write, in the sandbox"})
    n_gpu_layers: int | None = field(default=None, metadata={"help": "layers on the GPU; None: all, where there is one"})
    batch_size: int = field(default=8, metadata={"help": "of Hugging Face models"})

    def __post_init__(self) -> None:
        for name in ("limit", "context", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, not {value}")


# --- models -----------------------------------------------------------------------------------------------------


def find_models(
    names: Sequence[str], *, runs: Path = Path("runs"), bases: Mapping[str, Base] | None = None, tokenizer: Path | None = None
) -> list[Model]:
    """Models by what the user typed.

    Args:
        names: a GGUF file; a folder or the name of a base (run by transformers); ``<domain>/<base>`` of a finished run
            (its base, the adapted model and every level), or one of these as ``<domain>/<base>/<base|adapted|level>``.
        runs: where runs are kept.
        bases: the named bases.
        tokenizer: encodes the prompts of GGUF files, instead of their own tokenizers.

    Raises:
        UserError: every name that is none of these.
    """
    bases, models, problems = bases or {}, [], []
    for name in names:
        run, _, part = name.rpartition("/") if name.count("/") == 2 else (name, "", "")
        try:
            if name.endswith(".gguf"):
                check_gguf(name)
                models.append(Model(Path(name).stem, Path(name), tokenizer=tokenizer))
            elif run.count("/") == 1 and (runs / run / "gguf").is_dir():
                found = run_models(runs, run, bases, tokenizer)
                chosen = [m for m in found if not part or m.name == name]
                if not chosen:
                    raise UserError(f"{run} has no {part!r}", hint=f"It has {', '.join(m.name.rpartition('/')[2] for m in found)}.")
                models += chosen
            else:
                models.append(Model(Path(name).name, resolve(name, bases), base=name if name in bases else ""))
        except UserError as error:
            problems.append(f"{name}: {error}")
    raise_problems(
        problems, what="Models", hint="A model is a .gguf file, a Hugging Face folder, a base, or <domain>/<base> of a finished run."
    )
    counts: dict[str, int] = {}
    for m in models:
        counts[m.name] = counts.get(m.name, 0) + 1
    raise_problems([f"{n} models are named {name!r}" for name, n in counts.items() if n > 1], what="Models",
                   hint="Results are kept by name: rename a file, or run them apart with another --out.")  # fmt: skip
    return models


def run_models(
    runs: Path, run: str, bases: Mapping[str, Base] | None = None, tokenizer: Path | None = None
) -> list[Model]:
    """Base, adapted model (F16) and every level of a finished run, encoded by the base's own tokenizer where it is at hand.

    Raises:
        UserError: the run has no GGUF files yet.
    """
    folder, base = runs / run, run.rpartition("/")[2]
    known = (bases or {}).get(base)
    tokenizer = tokenizer or (known.path if known else None)
    files = {"base": folder / "gguf" / "base-F16.gguf", "adapted": folder / "gguf" / "model-F16.gguf"}
    missing = [str(f) for f in files.values() if not f.is_file()]
    raise_problems(missing, what=f"The run {run} has no", hint="Finish it: tsugiki recipe run …")
    levels = {f.stem.removeprefix("model-"): f for f in sorted((folder / "levels").glob("model-*.gguf"))}
    models = [
        Model(f"{run}/{name}", path, run, base, "" if name == "base" else run, "F16", tokenizer) for name, path in files.items()
    ]
    by_size = sorted(levels.items(), key=lambda item: -item[1].stat().st_size)
    return models + [Model(f"{run}/{level}", path, run, base, run, level, tokenizer) for level, path in by_size]


# --- before anything is computed --------------------------------------------------------------------------------


def check_models(models: Sequence[Model], benchmarks: Sequence[Benchmark], settings: BenchmarkSettings) -> None:
    """Open every model once and see that the longest prompts fit it, and that it has the template a chat needs.

    Raises:
        UserError: all that is wrong, with the tokens asked for and those there are.
    """
    from lm_eval.api.task import ConfigurableTask

    from tsugiki.evaluate.metrics_saito import use_model

    problems: list[str] = []
    # prompts that are the same for every model are made once
    plain = {b.name: None for b in benchmarks if not settings.chat and all(type(t) is ConfigurableTask for t in b.tasks.values())}
    for model in models:
        with opened(model, settings, probe=True) as lm:
            if settings.chat and not lm.chat_template(True):
                problems.append(f"{model.name} has no chat template")
                continue
            room = f"{model.name} has a context of {lm.max_length:,}"
            if settings.truncate and not model.is_gguf:
                problems.append(f"{model.name}: lm-eval's class for Hugging Face models does not count what it cuts; leave --truncate out")
                continue
            if settings.truncate:  # what an answer may need is kept free
                problems += [f"{b.name}: its answers may have {b.new_tokens:,} tokens; {room}" for b in benchmarks if b.new_tokens >= lm.max_length]
                continue
            use_model(lm)
            mixed = [] if model.is_gguf else [b.name for b in benchmarks if len(set(b.policies.values())) > 1]
            problems += [f"{name}: some of its tasks are asked with BOS, some without; lm-eval's class for {model.name} has one policy" for name in mixed]
            for benchmark in benchmarks:
                texts = plain.get(benchmark.name) or _longest(benchmark, settings, lm.apply_chat_template if settings.chat else None)
                if benchmark.name in plain:
                    plain[benchmark.name] = texts
                longest = max((len(lm.tok_encode(text)) for text in texts), default=0)
                # lm-eval's class would cut the prompt without a word to keep room for the longest answer
                answers = 0 if model.is_gguf or benchmark.name not in plain else benchmark.new_tokens
                if answers and longest + answers > lm.max_length:
                    problems.append(f"{benchmark.name}: its longest prompt has {longest:,} tokens and its answers may have {answers:,}; {room}")
                elif longest >= lm.max_length:
                    problems.append(f"{benchmark.name}: its longest prompt has {longest:,} tokens; {room}")
            use_model(None)
    raise_problems(
        problems, what="These models cannot run these tasks",
        hint="Leave these tasks out, or cut prompts that are too long with --truncate: they are counted."
        if any("context" in p for p in problems) else "Leave --chat out, or take the base's instruct variant.",
    )  # fmt: skip


def _longest(benchmark: Benchmark, settings: BenchmarkSettings, template: Callable | None = None) -> list[str]:
    texts = []
    for task in benchmark.tasks.values():
        _build(task, benchmark, settings, template)
        if task.OUTPUT_TYPE != "loglikelihood_rolling":
            whole = ("".join(a for a in r.args if isinstance(a, str)) for r in task.instances)
            texts += sorted(whole, key=lambda text: -len(text.encode()))[:LONGEST]
    return texts


def _build(task, benchmark: Benchmark, settings: BenchmarkSettings, template: Callable | None) -> None:
    draw_shots_anew(task, benchmark.metadata)
    try:
        task.build_all_requests(
            limit=settings.limit, apply_chat_template=template is not None, fewshot_as_multiturn=True, chat_template=template
        )
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{benchmark.name}: an item cannot be made into a prompt: {type(error).__name__}: {first_line(error)}") from error


@contextmanager
def opened(
    model: Model, settings: BenchmarkSettings, *, cache: Path | None = None, probe: bool = False, threads: int | None = None
) -> Iterator[Any]:
    """A model as lm-eval knows it: a :class:`TsugikiGGUF`, or lm-eval's own class for Hugging Face models.

    Args:
        cache: folder for finished requests, of all models.
        probe: only its tokenizer, context and chat template are asked for.
        threads: CPU threads at most; None: all that help.
    """
    if model.is_gguf:
        from tsugiki.evaluate.engine import thread_count
        from tsugiki.evaluate.harness import TsugikiGGUF

        lm = TsugikiGGUF(
            model.path, tokenizer=model.tokenizer, max_length=settings.context, truncate="left" if settings.truncate else "error",
            n_gpu_layers=0 if probe else settings.n_gpu_layers, cache=cache and cache / "requests.sqlite",
            n_threads=threads and min(threads, thread_count(model.path)),
        )  # fmt: skip
        with closing(lm):
            yield lm
    elif probe:
        yield _HubProbe(model.path)
    else:
        import torch
        from lm_eval.models.huggingface import HFLM

        if threads:
            torch.set_num_threads(threads)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        lm = HFLM(pretrained=str(model.path), device=device, batch_size=settings.batch_size)
        lm.requests_kept = cache and str(cache / f"requests-hf-{fingerprint(model.path)[:16]}")
        yield lm


class _HubProbe:
    """Tokenizer, context and template of a Hugging Face folder, as lm-eval's class finds them, without the weights."""

    def __init__(self, path: Path):
        from lm_eval.models.utils import DEFAULT_MAX_LENGTH, resolve_max_length
        from transformers import AutoConfig, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.max_length = resolve_max_length(AutoConfig.from_pretrained(path), self.tokenizer, default=DEFAULT_MAX_LENGTH)

    def tok_encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def chat_template(self, _: bool) -> str | None:
        return self.tokenizer.chat_template

    def apply_chat_template(self, messages: list[dict], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, continue_final_message=not add_generation_prompt
        )


# --- running ----------------------------------------------------------------------------------------------------


def run_benchmarks(
    models: Sequence[Model],
    benchmarks: Sequence[Benchmark],
    settings: BenchmarkSettings = BenchmarkSettings(),
    *,
    out: Path,
    results: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> list[dict]:
    """Score every model on every task.

    Written below ``out``, one folder a model (:func:`model_folder`): ``results_<date>.json`` and
    ``samples_<task>_<date>.jsonl`` in lm-eval's own layout, ``items-<task>.jsonl`` with one row an item (``id``,
    ``document``, ``score`` of the main metric, ``unparsed``, ``truncated``, ``ties``, ``text`` of a generated answer), and the
    finished requests, so that a run that was killed goes on where it was.

    Args:
        models, benchmarks, settings: what is run and how.
        out: folder of results.
        results: the results table (``runs/results.sqlite``); None writes none.
        say: called with a sentence a task and model.

    Returns:
        One row a model, task and metric: ``model, task, name, metric, main, value, stderr, n, unparsed, truncated, ties,
        settings``; rates are shares of items, None where they cannot be known; ``ties`` are the greedy answers in which a
        pick led by less than 0.01 nats, so that another machine or batch may answer otherwise.

    Raises:
        UserError: a model that cannot run a task (nothing has been computed then).
    """
    with quiet():
        check_models(models, benchmarks, settings)
        if runner.get() is run_here:
            scores = _score_here(models, benchmarks, settings, out)
        else:
            from tsugiki.evaluate.fanout import score_apart

            scores = score_apart(models, benchmarks, settings, out)
        parts: dict[str, dict[str, Scored]] = {model.name: {} for model in models}
        for model, benchmark, scored in scores:
            write_jsonl(items_path(out, model.name, benchmark.name), scored.items)
            if results is not None:
                _keep(results, model, benchmark, scored.rows)
            parts[model.name][benchmark.name] = scored
            say(_sentence(scored.rows, scored.seconds))
            if len(parts[model.name]) == len(benchmarks):
                _write_lm_eval(model_folder(out, model.name), model, [(b, parts[model.name][b.name]) for b in benchmarks], settings)
    return [row for model in models for benchmark in benchmarks for row in parts[model.name][benchmark.name].rows]


@dataclass(frozen=True)
class Scored:
    """One model on one task.

    Attributes:
        found: what lm-eval's ``evaluate`` returned.
        rows, items: of :func:`score_rows`.
        seconds: it took.
        told: of :func:`told_of`.
    """

    found: dict
    rows: list[dict]
    items: list[dict]
    seconds: float
    told: tuple[str | None, dict]


def _score_here(
    models: Sequence[Model], benchmarks: Sequence[Benchmark], settings: BenchmarkSettings, out: Path
) -> Iterator[tuple[Model, Benchmark, Scored]]:
    for model in models:
        out.mkdir(parents=True, exist_ok=True)
        with opened(model, settings, cache=out) as lm:
            told = told_of(lm, settings)
            for benchmark in benchmarks:
                yield model, benchmark, score(lm, model, benchmark, settings, told)


def told_of(lm, settings: BenchmarkSettings) -> tuple[str | None, dict]:
    """A model's chat template, where it is used, and what the model says of itself."""
    return lm.chat_template(True) if settings.chat else None, lm.get_model_info() if hasattr(lm, "get_model_info") else {}


def score(lm, model: Model, benchmark: Benchmark, settings: BenchmarkSettings, told: tuple[str | None, dict]) -> Scored:
    """Score an opened model on one task."""
    began = time.monotonic()
    found = _evaluate(lm, benchmark, settings)
    rows, items = score_rows(model, benchmark, found, lm, settings)
    return Scored(found, rows, items, time.monotonic() - began, told)


def model_folder(out: Path, model: str) -> Path:
    """Where a model's results lie below ``out``: its name with ``/`` as ``__``, as lm-eval names folders."""
    from lm_eval.utils import sanitize_model_name

    return out / sanitize_model_name(model)


def items_path(out: Path, model: str, task: str) -> Path:
    """The file of a model's item scores on a task."""
    return model_folder(out, model) / f"items-{task.replace('/', '__')}.jsonl"


def _evaluate(lm, benchmark: Benchmark, settings: BenchmarkSettings) -> dict:
    """lm-eval's ``evaluate`` from the state its command line starts in."""
    from lm_eval.api.model import CachingLM
    from lm_eval.evaluator import evaluate

    from tsugiki.evaluate import sandbox
    from tsugiki.evaluate.metrics_saito import use_model

    for task in benchmark.tasks.values():
        draw_shots_anew(task, benchmark.metadata)
    random.seed(0)
    np.random.seed(1234)
    answering = lm
    if hasattr(lm, "bos_policies"):
        lm.bos_policies |= benchmark.policies
    else:  # lm-eval's class has one policy for all of a call; None is what its tokenizer does
        policy = benchmark.policies[next(iter(benchmark.tasks))]
        lm.add_bos_token = False if policy == "never" else None
        if lm.requests_kept:
            answering = CachingLM(lm, f"{lm.requests_kept}-{policy}.db")
    before = os.environ.get(sandbox.ALLOW)
    os.environ[sandbox.ALLOW] = "1" if settings.allow_code else "0"
    use_model(lm)  # some tasks cut prompts and count tokens as the model does
    try:
        return evaluate(
            lm=answering, task_dict={"tasks": benchmark.tasks, "groups": benchmark.groups}, limit=settings.limit, log_samples=True,
            apply_chat_template=settings.chat, fewshot_as_multiturn=True, confirm_run_unsafe_code=settings.allow_code,
        )  # fmt: skip
    finally:
        use_model(None)
        if before is None:
            del os.environ[sandbox.ALLOW]
        else:
            os.environ[sandbox.ALLOW] = before


# --- scores -----------------------------------------------------------------------------------------------------


def score_rows(model: Model, benchmark: Benchmark, found: dict, lm, settings: BenchmarkSettings) -> tuple[list[dict], list[dict]]:
    """Rows of the results table and item scores from what lm-eval's ``evaluate`` returned."""
    name = benchmark.name
    entry = (found["results"] | found.get("groups", {}))[name]
    main = main_metric(_metrics(entry), benchmark.metadata)
    samples = [(m, s) for m in benchmark.tasks for s in found["samples"][m] if s["filter"] == main.partition(",")[2]]
    items = _items(samples, main.partition(",")[0], benchmark, lm)
    truncated = _rate([i["truncated"] for i in items])
    greedy = [i["ties"] > 0 for i in items if i["ties"] is not None]
    ties = sum(greedy) if greedy else None
    extracted: dict[str, list] = {}  # each filter reads answers in its own way, and fails on others
    for member in benchmark.tasks:
        for s in found["samples"][member]:
            extracted.setdefault(s["filter"], []).append(_unparsed(s, benchmark.metadata.get("unparsed_metric")))
    how = _how(model, benchmark, found, lm, settings)
    scores = [i["score"] for i in items if i["score"] is not None]
    documents = [i["document"] for i in items if i["score"] is not None]
    if len(set(documents)) == len(documents):
        documents = []
    rows = []
    for key in _metrics(entry):
        metric, _, by = key.partition(",")
        value, stderr = entry[key], entry.get(f"{metric}_stderr,{by}")
        if key == main and documents and math.isclose(float(np.mean(scores)), value, abs_tol=1e-9):
            stderr = clustered_stderr(scores, documents)  # lm-eval's takes every item for one of its own
        if isinstance(value, (int, float)) and math.isfinite(value):
            rates = {"unparsed": _rate(extracted.get(by, [])), "truncated": truncated, "ties": ties}
            rows.append({
                "model": model.name, "task": benchmark.law_task + (f"[:{settings.limit}]" if settings.limit else ""), "name": name,
                "metric": metric if key == main else key, "main": key == main, "value": float(value),
                "stderr": float(stderr) if isinstance(stderr, (int, float)) and math.isfinite(stderr) else None,
                "n": len(items), **rates, "settings": how | rates | {"filter": by},
            })  # fmt: skip
    return rows, items


def _metrics(entry: Mapping[str, Any]) -> list[str]:
    return [k for k in entry if "," in k and not k.partition(",")[0].endswith("_stderr")]


def main_metric(keys: Sequence[str], metadata: Mapping[str, Any]) -> str:
    """The ``metric,filter`` that stands for a task: the one its metadata names, else its first."""
    wanted = str(metadata.get("main_metric") or keys[0])
    found = [k for k in keys if k == wanted or k.partition(",")[0] == wanted]
    if not found:
        raise UserError(f"main_metric is {wanted!r}, the task has {', '.join(keys)}", where=str(metadata.get("config_source", "")) or None)
    return found[0]


def _items(samples: Sequence[tuple[str, dict]], metric: str, benchmark: Benchmark, lm) -> list[dict]:
    """One row an item; its id and document are the columns that the metadata names, else ``id`` and ``document``."""
    several = len({task for task, _ in samples}) > 1
    columns = [str(benchmark.metadata.get(key) or default) for key, default in (("item_id", "id"), ("document", "document"))]
    own = [s["doc"].get(columns[0]) if isinstance(s["doc"], dict) else None for _, s in samples]
    use_own = None not in own and len(set(map(str, own))) == len(own)
    items = []
    for id, (task, sample) in zip(own, samples, strict=True):
        id = str(id if use_own else sample["doc_id"])
        id = f"{task}/{id}" if several and not use_own else id
        doc = sample["doc"] if isinstance(sample["doc"], dict) else {}
        score = sample.get(metric)
        item = {
            "id": id, "document": str(doc.get(columns[1]) or id),
            "score": float(score) if isinstance(score, (int, float, np.number)) and math.isfinite(score) else None,
            "unparsed": _unparsed(sample, benchmark.metadata.get("unparsed_metric")),
            "truncated": lm.truncated.get((task, sample["doc_id"]), False) if hasattr(lm, "truncated") else None,
            "ties": lm.ties.get((task, sample["doc_id"])) if hasattr(lm, "ties") else None,
        }  # fmt: skip
        first = sample["resps"][0][0] if sample["resps"] and sample["resps"][0] else None
        items.append(item | ({"text": first} if isinstance(first, str) else {}))
    return items


def _unparsed(sample: Mapping[str, Any], metric: str | None) -> bool | None:
    """Whether nothing could be read from an answer: by the task's own metric, else by the mark of lm-eval's extractions."""
    if metric and metric in sample:
        return bool(sample[metric])
    answers = np.asarray(sample["filtered_resps"], dtype=object).ravel().tolist()
    return any(isinstance(a, str) and a == "[invalid]" for a in answers) if any(isinstance(a, str) for a in answers) else None


def _rate(flags: Sequence[bool | None]) -> float | None:
    known = [f for f in flags if f is not None]
    return sum(known) / len(known) if known else None


def _how(model: Model, benchmark: Benchmark, found: dict, lm, settings: BenchmarkSettings) -> dict:
    """Whatever else is needed to measure a score again."""
    first, meta = next(iter(benchmark.tasks)), benchmark.metadata
    config = benchmark.tasks[first].config
    generation = config.generation_kwargs if config.output_type == "generate_until" else {}
    cut = getattr(lm, "cut", None)
    return {
        "task": benchmark.name, "version": meta.get("version"), "shots": meta.get("shots", config.num_fewshot),
        "shots_seed": shot_seed(benchmark.tasks[first], meta), "bos": benchmark.policies[first], "stop": generation.get("until"),
        "max_new_tokens": generation.get("max_gen_toks"), "normaliser": meta.get("normaliser"),
        "data": benchmark.data(), "licence": meta.get("licence"),
        "prompts_cut": None if cut is None else len({(m, s["doc_id"]) for m in benchmark.tasks for s in found["samples"][m]} & cut),
        "tokenizer": str(getattr(lm, "tokenizer_source", "transformers")), "chat": settings.chat, "limit": settings.limit,
        "engine": "llama.cpp" if model.is_gguf else "transformers", "lm_eval": importlib.metadata.version("lm_eval"),
    }  # fmt: skip


def _keep(path: Path, model: Model, benchmark: Benchmark, rows: Sequence[dict]) -> None:
    stat = model.path.stat()
    key = digest([str(model.path.name), stat.st_size, benchmark.name, [r["settings"] for r in rows]])
    limited = f" first {rows[0]['settings']['limit']}" if rows and rows[0]["settings"]["limit"] else ""
    replace_results(
        path, model.run or model.name, f"benchmark {benchmark.name}{limited} {model.name}",
        [Result(model.name, model.base, r["task"], r["metric"], r["value"], adapter=model.adapter, level=model.level,
                stderr=r["stderr"], n=r["n"], settings=r["settings"], provenance=key) for r in rows],
    )  # fmt: skip


def _sentence(rows: Sequence[dict], seconds: float) -> str:
    first = [r for r in rows if r["main"]]
    scores = ", ".join(f"{r['name']} {r['metric']} {r['value']:.3f}" for r in first[:3]) + (" …" if len(first) > 3 else "")
    limit = rows[0]["settings"]["limit"] if rows else None
    return f"{rows[0]['model']}: {scores} in {seconds:.0f} s" + (f" (first {limit} items only)" if limit else "") if rows else "no score"


# --- lm-eval's own files ----------------------------------------------------------------------------------------


def _write_lm_eval(folder: Path, model: Model, parts: Sequence[tuple[Benchmark, Scored]], settings: BenchmarkSettings) -> None:
    """``results_<date>.json`` and ``samples_<task>_<date>.jsonl`` as lm-eval 0.4.13's own tracker writes them."""
    from lm_eval.loggers import EvaluationTracker

    tracker = EvaluationTracker(output_path=str(folder.parent))
    template, info = parts[0][1].told
    tracker.general_config_tracker.log_experiment_args(
        model_source="tsugiki-gguf" if model.is_gguf else "hf", model_args={"model": model.name, "path": str(model.path)},
        system_instruction=None, chat_template=template, fewshot_as_multiturn=True,
    )  # fmt: skip
    results: dict[str, Any] = {}
    for _, scored in parts:
        for key, value in scored.found.items():
            results[key] = results.get(key, {}) | value if isinstance(value, dict) else value
    samples = results.pop("samples")
    for benchmark, _ in parts:
        if benchmark.metadata.get("redistributable") is False:  # no changed copies: answers and scores alone
            for name in benchmark.tasks:
                samples[name] = [{**s, "doc": {}, "arguments": [], "target": ""} for s in samples[name]]
    results["config"] = {
        "model": "tsugiki-gguf" if model.is_gguf else "hf", "model_args": {"path": str(model.path)}, "limit": settings.limit,
        "random_seed": 0, "numpy_seed": 1234, "tsugiki": asdict(settings),
    }  # fmt: skip
    results["config"] |= info
    results["tsugiki"] = {  # what lm-eval's layout has no place for: data, rates and ties of each task
        b.name: next((r["settings"] for r in scored.rows if r["main"]), {}) for b, scored in parts
    }
    results["date"], results["lm_eval_version"] = time.time(), importlib.metadata.version("lm_eval")
    tracker.save_results_aggregated(results=results, samples=samples)
    for name, rows in samples.items():
        tracker.save_results_samples(task_name=name, samples=rows)
    if not list(folder.glob(f"results_{getattr(tracker, 'date_id', '')}.json")):  # the tracker only logs what goes wrong
        raise RuntimeError(f"lm-eval could not write its results into {folder}")
