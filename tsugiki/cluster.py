"""Tasks on the nodes of a Ray cluster: ``with connected(address): run_tasks(…)``. Ray is an optional extra.

Nodes need the same version of this kit, nothing else in common: what a task reads is sent to nodes that have not the
same at the same path, what it makes comes back through Ray's object store, and only this process writes it to where
it belongs, each thing once. Ray speaks pickle between its processes and runs whatever it is sent; by default it asks
nobody who reaches its ports for a password, so a cluster belongs into a network of people who trust each other.
"""

from __future__ import annotations

import functools
import importlib
import os
import platform
import shutil
import socket
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields, is_dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from tsugiki.artifacts import atomic_path, digest, sha256_file
from tsugiki.bases import sampled_hash
from tsugiki.errors import UserError, raise_problems
from tsugiki.pool import Task, TaskError, died, runner, show_state, told_progress
from tsugiki.progress import progress

RETRIES = 3  # of a task whose worker or node died
LOOK_SECONDS = 0.5  # between two looks at how far the tasks are


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Run the tasks of :func:`tsugiki.pool.run_tasks` on a Ray cluster until the block ends.

    Args:
        address: ``HOST:PORT`` of a cluster of which this machine is a node, or ``ray://HOST:PORT``; ``auto``: the
            cluster that this machine is a node of, else one of this machine alone, which no other machine can reach
            and which ends with the block. None: no cluster, tasks run here.

    Raises:
        UserError: Ray is not installed, or the cluster cannot be reached.
    """
    if address is None:
        yield
        return
    # Ray puts these in front of its workers' search path, where our folder `evaluate` would hide the library.
    unwanted = [os.path.abspath(os.curdir), os.path.dirname(os.path.realpath(sys.argv[0]))]
    ray = _connect(address)
    session = f"tsugiki-{uuid.uuid4().hex}"
    token = runner.set(functools.partial(_run_over_ray, session, unwanted))
    try:
        yield
    finally:
        runner.reset(token)
        with suppress(Exception):  # nothing is left on the nodes that still answer
            ray.get(_on_every_node(_forget, session), timeout=10)
        ray.shutdown()


def _connect(address: str):
    hint = ("Start it with `ray start --head` on one machine and `ray start --address=HOST:6379` on the others (this one too), "
            "with the same versions of Python and Ray.")  # fmt: skip
    if address != "auto":
        _knock(address, hint)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address == "auto":  # read when Ray is imported: a cluster of this machine alone listens on 127.0.0.1 alone
        before = os.environ.get("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER")
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    try:
        import ray
    except ImportError as error:
        raise UserError("Ray is not installed", hint="Install it: pip install 'tsugiki[ray]', on every node.") from error
    finally:
        if address == "auto":
            os.environ.pop("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER")
            if before is not None:
                os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = before
    if ray.is_initialized():
        raise UserError("this process is connected to a Ray cluster already")
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        try:
            ray.init(address=address, **quiet)
        except ConnectionError:
            if address != "auto":
                raise
            ray.init(address="local", include_dashboard=False, **quiet)
            listening = {node["NodeManagerAddress"] for node in ray.nodes()}
            if listening != {"127.0.0.1"}:  # Ray was imported before this, and asked for no such thing
                ray.shutdown()
                raise RuntimeError(f"it would listen on {', '.join(listening)}, where others can reach it") from None
    except Exception as error:  # ConnectionError, ValueError, RuntimeError, ImportError, gRPC's own …
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"the Ray cluster {address} cannot be reached: {said}", hint=hint) from error
    return ray


def _knock(address: str, hint: str) -> None:
    """See that somebody listens: Ray itself tries for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"--ray takes auto, HOST:PORT or ray://HOST:PORT, not {address!r}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"the Ray cluster {address} cannot be reached: {error}", hint=hint) from error


# --- this process -----------------------------------------------------------------------------------------------


def _run_over_ray(session: str, unwanted: list[str], tasks: Sequence[Task], workers: int, note: Callable[[Any], str]) -> Iterator[tuple[Task, Any]]:
    """:func:`tsugiki.pool.run_tasks` over Ray; ``workers`` is left to what the nodes have room for."""
    import ray

    if not tasks:
        return
    needs = _needs(ray.nodes(), tasks)
    inputs = _offer(tasks)
    board = ray.remote(_Board).options(num_cpus=0, max_restarts=-1).remote()
    work, call = ray.remote(_work), uuid.uuid4().hex[:8]
    refs: dict[Any, Task] = {}
    with progress() as bar:
        lines = {task: bar.add_task(task.label, total=None, note="waiting", start=False) for task in tasks}
        try:
            for number, task in enumerate(tasks):
                cpus, gpus = needs[task]
                order = {
                    "function": (task.call.__module__, task.call.__qualname__), "threads": cpus, "session": session, "name": f"{call}-{number}",
                    "inputs": {path: inputs[path] for path in map(_absolute, task.reads)}, "writes": [_absolute(path) for path in task.writes],
                }  # fmt: skip
                # Arguments go apart: to read them imports modules, which has to wait until the search path is mended.
                parcel = [unwanted, ray.put(order), ray.put(task.arguments), board, number]
                options = {"num_cpus": cpus, "num_gpus": gpus, "max_retries": RETRIES, "name": task.label}
                refs[work.options(**options).remote(parcel)] = task
            pending = list(refs)
            while pending:
                finished, pending = ray.wait(pending, timeout=LOOK_SECONDS, fetch_local=False)
                with suppress(Exception):  # a board that a dead node took along starts again
                    for number, state in ray.get(board.read.remote(), timeout=5).items():
                        show_state(bar, lines[tasks[number]], state)
                for ref in finished:
                    task = refs[ref]
                    result = _result(task, ref)
                    bar.update(lines[task], total=1, completed=1, note=note(result))
                    yield task, result
        except BaseException:
            for ref in refs:
                with suppress(Exception):
                    ray.cancel(ref, force=True)
            raise
        finally:
            with suppress(Exception):
                ray.kill(board)


def _result(task: Task, ref) -> Any:
    """What a finished task returned, after its files have been put where they belong."""
    import ray
    from ray.exceptions import NodeDiedError, ObjectLostError, OutOfMemoryError, RayTaskError, WorkerCrashedError

    try:
        answer = ray.get(ref)
    except (WorkerCrashedError, NodeDiedError, OutOfMemoryError, ObjectLostError) as error:
        raise TaskError(task, died(RETRIES + 1)) from error
    except RayTaskError as error:
        raise (error.cause or error) from error
    if "error" in answer:
        raise TaskError(task, UserError(answer["error"][0], where=answer["error"][1], hint=answer["error"][2]))
    for path, files in answer["files"]:
        with atomic_path(path) as temporary:
            _unpack(temporary, files)
    return answer["result"]


def _needs(nodes: Sequence[dict], tasks: Sequence[Task]) -> dict[Task, tuple[int, int]]:
    """``(CPUs, GPUs)`` of each task: those it asks for, else a fair share of the nodes that it can run on.

    Raises:
        UserError: a task that fits no node.
    """
    rooms = [(int(n["Resources"].get("CPU", 0)), int(n["Resources"].get("GPU", 0))) for n in nodes if n["Alive"]]
    needs, problems = {}, []
    for task in tasks:
        gpus = task.gpus if any(g for _, g in rooms) else 0
        fit = [(c, g) for c, g in rooms if c >= max(1, task.cpus) and g >= gpus]
        if not fit:
            problems.append(f"{task.label} needs {max(1, task.cpus)} CPUs and {gpus} GPUs")
        elif gpus:
            needs[task] = task.cpus or max(1, min(c * gpus // g for c, g in fit)), gpus
        else:
            needs[task] = task.cpus or max(1, min(max(c for c, _ in fit), sum(c for c, _ in fit) // len(tasks))), 0
    largest = ", ".join(f"{c} CPUs and {g} GPUs" for c, g in sorted(set(rooms), reverse=True)[:3])
    raise_problems(problems, what="No node of the Ray cluster is large enough", hint=f"The largest have {largest or 'nothing'}.")
    return needs


def _offer(tasks: Sequence[Task]) -> dict[str, tuple[str, list | None]]:
    """What the tasks read: path → digest and, where a node lacks it, its files in the object store.

    Raises:
        UserError: a node whose code is another.
    """
    import ray

    digests = {path: tree_digest(Path(path)) for path in {_absolute(path) for task in tasks for path in task.reads}}
    modules = sorted({"tsugiki.cluster", *(task.call.__module__ for task in tasks)} - {"__main__"})
    code = code_digest(modules)
    found = ray.get(_on_every_node(_survey, modules, digests))
    raise_problems(
        sorted({f"{host} (tsugiki {there['version']})" for host, there in found if there["code"] != code}),
        what="Nodes with other code than here", hint="Install the same version of tsugiki on every node of the Ray cluster.",
    )  # fmt: skip
    lacking = {path for path in digests if any(path not in there["at_hand"] for _, there in found)}
    return {path: (value, _pack(Path(path), ray.put) if path in lacking else None) for path, value in digests.items()}


def _on_every_node(function: Callable, *arguments: Any) -> list:
    """References to the results of a small call on every node."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return [
        ray.remote(function).options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(*arguments)
        for node in ray.nodes() if node["Alive"]
    ]  # fmt: skip


# --- a node -----------------------------------------------------------------------------------------------------


class _Board:
    """An actor that is told how far each task is."""

    def __init__(self) -> None:
        self.states: dict[int, dict] = {}

    def tell(self, number: int, state: dict) -> None:
        self.states[number] = state

    def read(self) -> dict[int, dict]:
        return self.states


def _survey(modules: list[str], digests: dict[str, str]) -> tuple[str, dict]:
    """This node's name, the digest of its code, and what it has at hand."""
    import tsugiki

    try:
        code = code_digest(modules)
    except (ImportError, AttributeError):  # a module is not there
        code = ""
    at_hand = [path for path, value in digests.items() if _is_here(path, value)]
    return platform.node(), {"code": code, "version": tsugiki.__version__, "at_hand": at_hand}


def _work(parcel: list) -> dict:
    """Run one task on this node."""
    import ray

    unwanted, order, arguments, board, number = parcel
    sys.path[:] = [p for p in sys.path if p not in unwanted]
    order = ray.get(order)
    folder = _session_folder(order["session"]) / order["name"]  # the same for a second try: a fit goes on from its checkpoint
    folder.mkdir(exist_ok=True)
    told, ended = folder / "progress.json", threading.Event()
    watch = threading.Thread(target=_report, args=(told, ended, board, number), daemon=True)
    watch.start()
    made = [(path, _under(folder, path)) for path in order["writes"]]
    try:
        for _, place in made:
            place.parent.mkdir(parents=True, exist_ok=True)
        places = {path: _fetch(path, *offer, order["session"]) for path, offer in order["inputs"].items()}
        for path, place in places.items():  # where the call looks for it beside what it writes
            beside = _under(folder, path)
            beside.parent.mkdir(parents=True, exist_ok=True)
            if not beside.exists():
                beside.symlink_to(place)
        module, name = order["function"]
        call = getattr(importlib.import_module(module), name)
        result = call(*_moved(ray.get(arguments), places, order["writes"], folder), threads=order["threads"], progress_file=told)
    except UserError as error:
        return {"error": (error.message, error.where, error.hint)}
    finally:
        ended.set()
        watch.join()
    files = [(path, _pack(place, np.array)) for path, place in made if place.exists()]
    shutil.rmtree(folder)
    return {"result": result, "files": files}


def _report(file: Path, ended: threading.Event, board, number: int) -> None:
    last = None
    while not ended.wait(LOOK_SECONDS):
        state = told_progress(file)
        if state and state != last:
            with suppress(Exception):
                board.tell.remote(number, state)
            last = state


def _fetch(path: str, value: str, files: list | None, session: str) -> Path:
    """Where something that a task reads lies on this node: at its own path, or a copy."""
    import ray

    if _is_here(path, value):
        return Path(path)
    folder = _session_folder(session) / "inputs" / value
    if not folder.exists():
        if files is None:
            raise UserError(f"the node {platform.node()} has joined too late: it lacks {path}", hint="Run again.")
        temporary = folder.with_name(f"{value}.{uuid.uuid4().hex}")
        _unpack(temporary / Path(path).name, ((name, ray.get(ref)) for name, ref in files))
        try:
            temporary.rename(folder)
        except OSError:  # another worker of this node was faster
            shutil.rmtree(temporary)
    return folder / Path(path).name


def _moved(value: Any, places: dict[str, Path], writes: Sequence[str], folder: Path) -> Any:
    """An argument with the paths that hold on this node."""
    if isinstance(value, Path):
        own = Path(_absolute(value))
        for path, place in places.items():
            if own == Path(path) or Path(path) in own.parents:
                return place / own.relative_to(path)
        concerned = any(own == Path(w) or own in Path(w).parents or Path(w) in own.parents for w in writes)
        return _under(folder, str(own)) if concerned else value
    if is_dataclass(value) and not isinstance(value, type):
        changed = {f.name: _moved(getattr(value, f.name), places, writes, folder) for f in fields(value) if f.init}
        return replace(value, **changed)
    if isinstance(value, dict):
        return {k: _moved(v, places, writes, folder) for k, v in value.items()}
    return type(value)(_moved(v, places, writes, folder) for v in value) if type(value) in (tuple, list) else value


def _session_folder(session: str) -> Path:
    """This node's folder of a session, for this user alone."""
    folder = Path(tempfile.gettempdir()) / session
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise UserError("this folder belongs to somebody else", where=str(folder))
    return folder


def _forget(session: str) -> None:
    shutil.rmtree(Path(tempfile.gettempdir()) / session, ignore_errors=True)


# --- files ------------------------------------------------------------------------------------------------------


def _absolute(path: Path) -> str:
    return os.path.abspath(path)


def _under(folder: Path, path: str) -> Path:
    return folder / "files" / Path(path).relative_to(Path(path).anchor)


def _members(path: Path) -> list[tuple[str, Path]]:
    """``(name below path, file)``; of a file ``("", path)``."""
    return sorted((p.relative_to(path).as_posix(), p) for p in path.rglob("*") if p.is_file()) if path.is_dir() else [("", path)]


def tree_digest(path: Path) -> str:
    """SHA-256 over the names and contents of what lies at a path; of files over 64 MiB a sample of their bytes."""
    return digest([[name, sampled_hash(file)] for name, file in _members(path)])


def _is_here(path: str, value: str) -> bool:
    try:
        return tree_digest(Path(path)) == value
    except OSError:
        return False


def _pack(path: Path, keep: Callable[[np.ndarray], Any]) -> list[tuple[str, Any]]:
    """The files at a path as bytes, each given to ``keep``."""
    empty = np.empty(0, np.uint8)
    return [(name, keep(np.asarray(np.memmap(file, np.uint8, "r")) if file.stat().st_size else empty)) for name, file in _members(path)]


def _unpack(path: Path, files) -> None:
    """Write what :func:`_pack` took."""
    for name, data in files:
        file = path / name if name else path
        file.parent.mkdir(parents=True, exist_ok=True)
        data.tofile(file)


def code_digest(modules: Sequence[str]) -> str:
    """SHA-256 over the source files of the folders that modules lie in."""
    folders = {Path(find_spec(name).origin).parent for name in modules}
    return digest(sorted([f.name, sha256_file(f)] for folder in folders for f in folder.glob("*.py")))
