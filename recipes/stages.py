"""A stage is a function from declared inputs to files; it is done when its ``stage.json`` says so."""

from __future__ import annotations

import ast
import contextlib
import fcntl
import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import tsugiki
from tsugiki.artifacts import digest, read_json, sha256_tree, write_json
from tsugiki.errors import UserError
from tsugiki.machine import peak_rss
from tsugiki.progress import console

# No number depends on what these say.
SPEAKS = ("tsugiki.errors", "tsugiki.progress", "tsugiki.recipes.terminal")


def code_digest(*modules: str) -> str:
    """A hash of the code of modules of this kit, named like ``tsugiki.adapt.fit``, and of all that they import from it.

    Comments, docstrings and layout do not count, nor does what only speaks to the user (``SPEAKS``).
    """
    waiting, found = [*modules], {}
    while waiting:
        name = waiting.pop()
        path = _source(name)
        if path and name not in found and name not in SPEAKS:
            found[name], imported = _read_code(path)
            waiting += imported
    return digest(found)


@cache
def _read_code(path: Path) -> tuple[str, tuple[str, ...]]:
    """The hash of a file's code, and the names of the kit's modules that it imports, at its top or inside a function."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    return digest(ast.dump(tree)), tuple(sorted(n for n in names if n.startswith("tsugiki")))


@cache
def _source(name: str) -> Path | None:
    """The file of a module of this kit; none for a name in a module."""
    with contextlib.suppress(ModuleNotFoundError):
        spec = find_spec(name)
        if spec and spec.origin:
            return Path(spec.origin)
    return None


def stage_hash(folder: Path, *names: str) -> str:
    """The hash of a finished stage's outputs, or of those named: what depends on one file ignores the others.

    Raises:
        UserError: the stage has not been run.
    """
    path = folder / "stage.json"
    if not path.exists():
        raise UserError(f"the stage {folder.name!r} has not been run", where=str(folder.parent),
                        hint=f"Run it first: tsugiki recipe run DOMAIN --base BASE --stages {folder.name}")
    outputs = {o["path"]: o["sha256"] for o in read_json(path)["outputs"]}
    return digest([outputs[n] for n in names] if names else list(outputs.values()))


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a run's folder for this process; a killed process lets go of it.

    Raises:
        UserError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError("another process is at work on this run", where=str(folder), hint="Wait until it ends, or stop it.") from error
        yield


def run_stage(
    folder: Path,
    inputs: dict[str, Any],
    work: Callable[[Path], list[Path]],
    *,
    console_title: str = "",
    keep_partial: bool = False,
) -> bool:
    """Run one stage unless it is done for these inputs.

    The stage writes into a folder beside its own, which takes the place of the old one when all is there: a
    mistake or a kill leaves what an earlier run made.

    Args:
        folder: of the stage.
        inputs: everything the outputs depend on, as JSON (settings, hashes of code and of upstream stages).
        work: writes into the folder it is given and returns the output files and folders.
        console_title: shown while it runs.
        keep_partial: work in the stage's own folder, on what an earlier, unfinished or outdated run left there
            (the stage knows what it can use).

    Returns:
        Whether it ran (``False``: it was done already).
    """
    record = folder / "stage.json"
    key = digest(inputs)
    if record.exists() and is_done(folder, key):
        console.print(f"[dim]{folder.name:<9} done already[/]")
        return False
    place = folder if keep_partial else folder.with_name(f".{folder.name}.new")
    old = folder.with_name(f".{folder.name}.old")
    for leftover in (old, folder.with_name(f".{folder.name}.new")):
        shutil.rmtree(leftover, ignore_errors=True)
    if keep_partial:
        record.unlink(missing_ok=True)
    place.mkdir(parents=True, exist_ok=True)
    console.print(f"[bold]{folder.name:<9}[/] {console_title}")
    began = time.monotonic()
    outputs = work(place)
    seconds = time.monotonic() - began
    write_json(
        place / "stage.json",
        {
            "stage": folder.name,
            "key": key,
            "inputs": inputs,
            "outputs": [_output(place, p) for p in outputs],
            "seconds": round(seconds, 2),
            "peak_rss": largest_rss(),
            "version": tsugiki.__version__,
            "pid": os.getpid(),
        },
    )
    if place != folder:
        if folder.exists():
            os.replace(folder, old)
        os.replace(place, folder)
        shutil.rmtree(old, ignore_errors=True)
    console.print(f"[dim]{'':<9} {seconds:.1f} s[/]")
    return True


def is_done(folder: Path, key: str) -> bool:
    """Whether the stage finished with this key and its outputs are still there, with their sizes."""
    try:
        record = read_json(folder / "stage.json")
    except ValueError:
        return False
    return record["key"] == key and all(_size(folder / o["path"]) == o["bytes"] for o in record["outputs"])


def largest_rss() -> int:
    """The largest resident memory of this process or of any finished child so far, bytes."""
    return max(peak_rss(), 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)


def _output(folder: Path, path: Path) -> dict:
    return {"path": path.relative_to(folder).as_posix(), "bytes": _size(path), "sha256": sha256_tree(path)}


def _size(path: Path) -> int:
    if path.is_dir():
        return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    return path.stat().st_size if path.exists() else -1
