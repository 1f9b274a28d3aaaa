"""The benchmark tasks: which there are, their data loaded, and what is wrong with them before anything is computed.

Every task is an ordinary lm-eval task; the bundled ones are in ``tasks/``. What this kit reads of a task beside lm-eval's
own fields stands in its ``metadata``: ``suite``, ``law_task`` (its name in the scaling tables), ``bos``,
``main_metric``, ``unparsed_metric``, ``licence``, ``normaliser``, ``seed`` (of the shots), ``family`` (of a task in no
suite), and where its data lives: ``hub_id`` and ``revision`` on the hub, ``github`` and ``commit`` at its publisher's.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partialmethod
from pathlib import Path
from typing import Any

import yaml

from tsugiki.errors import UserError, raise_problems

TASKS = Path(__file__).parent / "tasks"
SUITES = ("culture", "neutral", "saito19", "domain")
SHOT_SEED = 1234  # lm-eval's default
FORMATS = ("json", "csv", "parquet", "text")  # of files, as a task's dataset_path


def task_files(folder: Path) -> dict[str, dict]:
    """Task or group name → its configuration (functions unresolved, includes merged) for every YAML below a folder.

    Raises:
        UserError: every file that is empty, no YAML, no mapping, or neither a task, a group nor an included part.
    """
    if not folder.is_dir():
        raise UserError("there is no such folder of tasks", where=str(folder))
    problems: list[str] = []
    read = {path: _read_task(path, problems) for path in sorted(folder.rglob("*.yaml"))}
    parts = {
        (path.parent / part).resolve()
        for path, (raw, _) in read.items()
        for part in ([raw["include"]] if isinstance(raw.get("include"), str) else raw.get("include") or [])
    }
    found: dict[str, dict] = {}
    for path, (_, config) in read.items():
        name = config.get("group", config.get("task"))
        if isinstance(name, str):
            if name in found:
                problems.append(f"{path}: the name {name!r} is taken")
            found[name] = config | {"_path": path}
            problems += _metadata_problems(path, config.get("metadata") or {})
        elif config and path.resolve() not in parts and not path.name.startswith("_"):
            problems.append(f"{path}: neither `task: NAME` nor `group: NAME`")
    raise_problems(problems, what="Task files", hint="A task file is an lm-eval YAML: task, output_type, doc_to_text, doc_to_target …")
    return found


def _read_task(path: Path, problems: list[str]) -> tuple[dict, dict]:
    """A file's own mapping and the one with its includes; two empty ones where there is a problem."""
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        if not path.read_text(encoding="utf-8").strip():
            problems.append(f"{path}: empty")
            return {}, {}
        raw = load_yaml(path, resolve_func=False, recursive=False)
        return raw, load_yaml(path, resolve_func=False)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        problems.append(f"{where}: not YAML: {getattr(error, 'problem', None) or error}")
    except (ValueError, OSError) as error:
        problems.append(f"{path}: {error}")
    return {}, {}


def _metadata_problems(path: Path, metadata: Any) -> list[str]:
    if not isinstance(metadata, dict):
        return [f"{path} (metadata): a mapping was expected, not {metadata!r}"]
    wrong = [s for s in _suites(metadata) if s not in SUITES]
    found = [f"{path} (metadata.suite): there is no suite {s!r}; there are {', '.join(SUITES)}" for s in wrong]
    if metadata.get("bos", "model") not in ("never", "model"):
        found.append(f"{path} (metadata.bos): never or model, not {metadata['bos']!r}")
    return found


def _suites(metadata: Mapping) -> list[str]:
    suites = metadata.get("suite") or []
    return [suites] if isinstance(suites, str) else list(suites)


@dataclass(frozen=True)
class Asked:
    """By what a task was loaded, so that another process can load it too, wherever it runs: paths are absolute."""

    name: str
    include: tuple[Path, ...]
    revision: str | None


@dataclass
class Benchmark:
    """A chosen task (or a group, with its subtasks), loaded.

    Attributes:
        name: as chosen; for a YAML file the task's name.
        metadata: the task's or group's.
        tasks, groups: lm-eval's objects by name.
        read: which data was read (:meth:`data`).
        asked: by what it was loaded.
    """

    name: str
    metadata: dict
    tasks: dict[str, Any]
    groups: dict[str, Any]
    read: list[dict] = field(default_factory=list)
    asked: Asked | None = None

    def data(self) -> dict[str, Any]:
        """Where the data lives, and which of it was read: JSON-ready.

        Returns:
            ``hub_id`` and ``revision`` (the hub's; ``not pinned`` where nobody asked for one), ``github`` and ``commit`` (the
            publisher's repository, where there is one), ``read``: one row a set, see :meth:`tsugiki.evaluate.data.Reading.rows`.
        """
        meta = self.metadata
        path = next(iter(self.tasks.values())).config.dataset_path
        hub_id = meta["hub_id"] if "hub_id" in meta else path if _of_the_hub(path) else None
        pinned = (self.asked and self.asked.revision) or meta.get("revision") or "not pinned"
        where = {"hub_id": hub_id, "revision": pinned if hub_id else None}
        return where | {"github": meta.get("github"), "commit": meta.get("commit"), "read": self.read}

    @property
    def law_task(self) -> str:
        """Its name in the scaling tables and the results table."""
        return str(self.metadata.get("law_task") or self.name)

    @property
    def policies(self) -> dict[str, str]:
        """BOS policy of each task: its own, else the group's, else what the model asks for."""
        own = {n: (t.config.metadata or {}).get("bos") for n, t in self.tasks.items()}
        return {n: p or self.metadata.get("bos") or "model" for n, p in own.items()}

    @property
    def new_tokens(self) -> int:
        """The most tokens that an answer may have; 0 where nothing is generated."""
        from lm_eval.models.utils import normalize_gen_kwargs

        asked = (t.config.generation_kwargs or {} for t in self.tasks.values() if t.OUTPUT_TYPE == "generate_until")
        return max((normalize_gen_kwargs(g)["max_gen_toks"] for g in asked), default=0)


def load_benchmarks(
    suites: Sequence[str],
    names: Sequence[str] = (),
    *,
    include: Sequence[Path] = (),
    allow_code: bool = False,
    revisions: Mapping[str, str] | None = None,
) -> tuple[list[Benchmark], dict[str, str]]:
    """Choose tasks and load their data.

    Args:
        suites: of :data:`SUITES`, or ``all``.
        names: further tasks: bundled, from ``include``, lm-eval's built-in ones, or YAML files.
        include: folders with task YAMLs of the user's.
        allow_code: tasks that run model-written code are wanted.
        revisions: task → the hub revision of its data (a commit, a tag or a branch).

    Returns:
        the benchmarks, and task → sentence for those of the suites whose data is not there (or that would run code).

    Raises:
        UserError: an unknown suite or task, a malformed task, data that lacks a column; of a task that was named, also
            data that is not there. All problems at once.
    """
    files: dict[str, dict] = {}
    for folder in (TASKS, *include):
        files |= task_files(folder)
    unknown = [s for s in suites if s not in (*SUITES, "all")]
    raise_problems([f"there is no suite {s!r}" for s in unknown], what="Suites", hint=f"There are {', '.join(SUITES)} and all.")
    wanted = set(SUITES if "all" in suites else suites)
    chosen = [n for n, c in files.items() if wanted & set(_suites(c.get("metadata") or {}))]
    named = [n for n in dict.fromkeys(names) if n not in chosen]
    if not chosen and not named:
        bundled = "none" if not files else ", ".join(files)
        raise UserError("no task was chosen", hint=f"Give --suite {'|'.join(SUITES)}|all or --tasks; bundled or included: {bundled}.")
    with quiet():
        return _load_all(chosen, named, files, include, allow_code, dict(revisions or {}))


def _load_all(
    chosen: list[str], named: list[str], files: Mapping[str, dict], include: Sequence[Path], allow_code: bool, revisions: dict[str, str]
):
    manager = _manager(files, named, include)
    found, missing = [], {}
    problems = [f"--revision {name}: this task was not chosen" for name in revisions if name not in (*chosen, *named)]
    for name in (*chosen, *named):
        try:
            loaded = _load(manager, name, files, revisions.get(name))
            unsafe = [t for b in loaded for t in b.tasks.values() if getattr(t, "UNSAFE_CODE", False)]
            if unsafe and not allow_code:
                raise _NotHere(f"{name} runs code that the model writes: it needs --allow-code, and then runs it in a sandbox")
            if unsafe:
                _see_the_sandbox(name)
            own = str(Path(name).resolve()) if name.endswith((".yaml", ".yml")) else name
            asked = Asked(own, tuple(Path(p).resolve() for p in include), revisions.get(name))
            found += [replace(benchmark, asked=asked) for benchmark in loaded]
        except _NotHere as error:
            if name in named:
                problems.append(str(error))
            else:
                missing[name] = str(error)
        except UserError as error:
            problems.append(str(error))
    raise_problems(problems, what="Tasks that cannot be run")
    if not found:
        raise_problems([f"{name}: {why}" for name, why in missing.items()], what="No task can be run")
    return found, missing


@contextmanager
def quiet() -> Iterator[None]:
    """lm-eval warns about every custom data set and default value and shows a bar for every loop: errors stay.

    Bars that were asked for explicitly stay too: those over the requests to a Hugging Face model.
    """
    import datasets
    from tqdm import tqdm

    datasets.disable_progress_bars()
    logger, bar = logging.getLogger("lm_eval"), tqdm.__init__
    before = logger.level
    logger.setLevel(logging.ERROR)
    tqdm.__init__ = partialmethod(bar, disable=True)  # a default, not a command
    try:
        yield
    finally:
        logger.setLevel(before)
        tqdm.__init__ = bar


class _NotHere(UserError):
    """What a suite can do without: its other tasks go on."""


def _see_the_sandbox(name: str) -> None:
    from tsugiki.evaluate.sandbox import mechanism

    try:
        mechanism()
    except UserError as error:
        raise _NotHere(f"{name}: {error}") from error


def _manager(files: Mapping[str, dict], named: Iterable[str], include: Sequence[Path]):
    """lm-eval's task manager; its thousands of built-in files are only read where a name is not among ours."""
    from lm_eval.tasks import TaskManager

    others = [n for n in named if n not in files and not n.endswith((".yaml", ".yml"))]
    inside = any(isinstance(t, str) and t not in files for c in files.values() if "group" in c for t in _members(c))
    manager = TaskManager(include_path=[str(TASKS), *map(str, include)], include_defaults=bool(others) or inside)
    problems = []
    for name in others:
        if name not in manager.task_index:
            near = [n for n in manager.all_tasks if name.casefold() in n][:3] or difflib.get_close_matches(name, manager.all_tasks, n=3)
            problems.append(f"there is no task {name!r}" + (f"; near: {', '.join(near)}" if near else ""))
    raise_problems(problems, what="Tasks", hint="Bundled, built into lm-eval, from --include, or the path of a YAML file.")
    return manager


def _members(config: Mapping) -> list:
    members = config.get("task") or []
    return [members] if isinstance(members, str) else [m.get("task", m) if isinstance(m, dict) else m for m in members]


def _load(manager, name: str, files: Mapping[str, dict], revision: str | None = None) -> list[Benchmark]:
    from datasets.exceptions import DatasetNotFoundError
    from jinja2 import TemplateError

    from tsugiki.evaluate.data import reading

    where = str(files[name]["_path"]) if name in files else name
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise UserError("there is no such task file", where=name)
        problems: list[str] = []
        _read_task(Path(name), problems)
        raise_problems(problems, what="Task files")
    try:
        with reading(revision) as read:
            loaded = manager.load([_pinned(manager, name, revision) if revision else name])
        for task in loaded["tasks"].values():
            draw_shots_anew(task, files.get(name, {}).get("metadata"))
            task.build_all_requests(limit=1)
    except UserError as error:
        if (error.hint or "").startswith("It comes from"):  # data.py: the set is not here, and where it would be had
            raise _NotHere(f"{name}: {error}") from error
        raise UserError(f"{name}: {error}") from error
    except (ConnectionError, DatasetNotFoundError) as error:
        raise _NotHere(f"{name}: its data cannot be loaded: {first_line(error)}") from error
    except (TemplateError, KeyError) as error:
        columns = _columns(error)
        hint = f"The data has the columns {', '.join(columns)}." if columns else None
        raise UserError(f"{name}: the data lacks a column that the task reads: {first_line(error)}", where=where, hint=hint) from error
    except Exception as error:  # whatever a task file can get wrong: a function, a metric, a filter, a split
        raise UserError(f"{name} is no task that lm-eval can build: {type(error).__name__}: {first_line(error)}", where=where) from error
    tasks, groups = dict(loaded["tasks"]), dict(loaded.get("groups") or {})
    if name in groups and groups[name].has_aggregation:
        metadata = dict(files.get(name, {}).get("metadata") or groups[name].metadata or {})
        benchmarks = [Benchmark(name, metadata, tasks, groups, read.rows() + _read_by_lm_eval(tasks))]
    else:  # a task, or a tag or group without a score of its own: its tasks one by one
        benchmarks = [
            Benchmark(n, dict(t.config.metadata or {}), {n: t}, {}, read.rows() + _read_by_lm_eval({n: t})) for n, t in tasks.items()
        ]
    for benchmark in benchmarks:
        wanted = str(benchmark.metadata.get("main_metric") or "").partition(",")[0]
        known = sorted({m for t in benchmark.tasks.values() for m in t.aggregation()})
        if wanted and wanted not in known:
            raise UserError(f"{benchmark.name}: main_metric is {wanted!r}, the task has {', '.join(known)}", where=where)
    return benchmarks


def _of_the_hub(path: str | None) -> bool:
    """Whether a task's ``dataset_path`` is a data set of the hub, and not files here (a folder of that name goes first)."""
    return path is not None and path not in FORMATS and not Path(path).is_dir()


def _pinned(manager, name: str, revision: str) -> str | dict[str, Any]:
    """A task with its hub revision. Ours read it from :func:`tsugiki.evaluate.data.reading`, others load it themselves."""
    from lm_eval.tasks._yaml_loader import load_yaml

    path = Path(name) if name.endswith((".yaml", ".yml")) else getattr(manager.task_index.get(name), "yaml_path", None)
    config = load_yaml(path) if path else {}
    if config.get("custom_dataset") or (path and path.parent == TASKS):  # ours, groups of ours included
        return name
    if not isinstance(config.get("task"), str) or not _of_the_hub(config.get("dataset_path")):
        raise UserError("it loads no data set of the hub by itself", hint="--revision takes single tasks whose data is on the hub.")
    return config | {"dataset_kwargs": {**(config.get("dataset_kwargs") or {}), "revision": revision}}


def _read_by_lm_eval(tasks: Mapping[str, Any]) -> list[dict]:
    """The hub's commit of what lm-eval loaded by itself, a row a data set; None where it is not to be known."""
    from tsugiki.evaluate.data import hub_commit

    rows = {}
    for task in tasks.values():
        path = task.config.dataset_path
        if not task.config.custom_dataset and _of_the_hub(path):
            commits = {hub_commit(part) for part in dict(task.dataset).values()} if task.dataset else set()
            rows[path] = {"set": path, "from": "hub", "hub_id": path, "revision": commits.pop() if len(commits) == 1 else None}
    return list(rows.values())


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _columns(error: BaseException) -> list[str]:
    """The columns of the task in whose code an error was raised."""
    trace, columns = error.__traceback__, []
    while trace is not None:
        columns = getattr(trace.tb_frame.f_locals.get("self"), "features", columns)
        trace = trace.tb_next
    return list(columns)


def draw_shots_anew(task, metadata: Mapping | None = None) -> None:
    """The state in which lm-eval's own command line starts a task: its shots are drawn anew from the seed."""
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=shot_seed(task, metadata))


def shot_seed(task, metadata: Mapping | None = None) -> int:
    """The seed of a task's shots: its own, its group's, or lm-eval's default."""
    seeds = [(m or {}).get("seed") for m in (task.config.metadata, metadata)]
    return next((int(s) for s in seeds if s is not None), SHOT_SEED)
