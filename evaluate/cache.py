"""Finished requests are kept, so that a run that was interrupted at any moment goes on where it was.

One SQLite file for all models. A result's key is the SHA-256 of the model file's contents, the ids and every setting
that the result depends on; results are committed one by one as they come.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from tsugiki.artifacts import digest, sha256_file
from tsugiki.errors import UserError
from tsugiki.evaluate.decoding import Generation, Likelihood
from tsugiki.evaluate.engine import Engine


def cached_loglikelihood(
    engine: Engine,
    requests: Sequence[tuple[list[int], list[int]]],
    *,
    cache: Path | str | None,
    truncate: str = "error",
    on_done: Callable[[int], None] | None = None,
    on_result: Callable[[int, Likelihood], None] | None = None,
) -> list[Likelihood]:
    """:meth:`Engine.loglikelihood`, except that requests found in the file ``cache`` are not computed again.

    Equal requests are computed once. ``cache=None`` keeps nothing. ``on_result`` and ``on_done`` are called for
    stored results too.

    Raises:
        UserError: as the engine does, or the cache is no such file.
    """
    keys = [_ids(context) + _ids(continuation) for context, continuation in requests]

    def compute(which: list[int], store: Callable[[int, Likelihood], None]) -> None:
        engine.loglikelihood([requests[i] for i in which], truncate=truncate, on_result=store)

    return _cached(engine, cache, {"kind": "loglikelihood", "truncate": truncate}, keys, Likelihood, compute,
                   on_done, on_result)


def cached_generate(
    engine: Engine,
    prompts: Sequence[list[int]],
    *,
    cache: Path | str | None,
    max_new_tokens: int | Sequence[int],
    stop_ids: Iterable[int],
    stop_strings: Sequence[str] | Sequence[Sequence[str]] = (),
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    truncate: str = "error",
    on_done: Callable[[int], None] | None = None,
    on_result: Callable[[int, Generation], None] | None = None,
) -> list[Generation]:
    """:meth:`Engine.generate`, except that prompts found in the file ``cache`` are not answered again.

    Equal prompts with equal limits and stop strings are answered once, unless the answer is sampled: then a prompt's
    place among the prompts is a part of its seed, as in the engine. Otherwise as :func:`cached_loglikelihood`.
    """
    n, stops = len(prompts), sorted(stop_ids)
    limits = [max_new_tokens] * n if isinstance(max_new_tokens, int) else list(max_new_tokens)
    common = all(isinstance(s, str) for s in stop_strings)
    strings = [list(stop_strings)] * n if common else [list(s) for s in stop_strings]
    keys = [_ids(prompt) + json.dumps([limit, ends, i if temperature > 0 else 0]).encode()
            for i, (prompt, limit, ends) in enumerate(zip(prompts, limits, strings, strict=True))]

    def compute(which: list[int], store: Callable[[int, Generation], None]) -> None:
        engine.generate(
            [prompts[i] for i in which], max_new_tokens=[limits[i] for i in which], stop_ids=stops,
            stop_strings=[strings[i] for i in which], temperature=temperature, top_p=top_p, seed=seed,
            numbers=which, truncate=truncate, on_result=store,
        )

    settings = {"kind": "generation", "stops": stops, "temperature": temperature, "truncate": truncate}
    if temperature > 0:
        settings |= {"top_p": top_p, "seed": seed}
    return _cached(engine, cache, settings, keys, Generation, compute, on_done, on_result)


def merge_cache(cache: Path, other: Path) -> None:
    """Add the finished requests of another file to a cache.

    Raises:
        UserError: one of the two is no such file.
    """
    with _opened(other), _opened(cache) as store:  # the other first: errors name the file that is to blame
        store.execute("ATTACH ? AS other", (str(other),))
        store.execute("INSERT OR IGNORE INTO results SELECT * FROM other.results")
        store.commit()
        store.execute("DETACH other")


def _ids(ids: Sequence[int]) -> bytes:
    return np.asarray([len(ids), *ids], "<i8").tobytes()


def _cached(engine: Engine, cache: Path | str | None, settings: dict, requests: Sequence[bytes], kind: type,
            compute: Callable, on_done: Callable | None, on_result: Callable | None) -> list:
    results: list[Any] = [None] * len(requests)
    done = 0

    def give(i: int, result: Any) -> None:
        nonlocal done
        results[i] = result
        done += 1
        if on_result:
            on_result(i, result)
        if on_done:
            on_done(done)

    with _opened(cache) as store:
        head = digest(settings | engine.settings | {"llama_cpp": llama_cpp.__version__,
                                                    "file": _file_digest(store, engine.path) if cache else ""}).encode()
        same: dict[bytes, list[int]] = {}
        for i, request in enumerate(requests):
            same.setdefault(hashlib.sha256(head + request).digest(), []).append(i)
        missing = []
        for key, places in same.items():
            found = store.execute("SELECT value FROM results WHERE key = ?", (key,)).fetchone()
            if not found:
                missing.append((key, places))
            for i in places if found else ():
                give(i, kind(**json.loads(found[0])))

        def keep(at: int, result: Any) -> None:
            key, places = missing[at]
            store.execute("INSERT OR REPLACE INTO results VALUES (?, ?)", (key, json.dumps(asdict(result))))
            store.commit()
            for i in places:
                give(i, result)

        if missing:
            compute([places[0] for _, places in missing], keep)
    return results


@contextmanager
def _opened(cache: Path | str | None) -> Iterator[sqlite3.Connection]:
    if cache:
        Path(cache).parent.mkdir(parents=True, exist_ok=True)
    try:
        with closing(sqlite3.connect(cache or ":memory:", timeout=60)) as store:
            store.execute("PRAGMA journal_mode = WAL")  # a commit costs no wait for the disk, and a kill loses none
            store.execute("PRAGMA synchronous = NORMAL")
            store.execute("CREATE TABLE IF NOT EXISTS results (key BLOB PRIMARY KEY, value TEXT) WITHOUT ROWID")
            store.execute("CREATE TABLE IF NOT EXISTS files (name TEXT PRIMARY KEY, digest TEXT)")
            store.commit()
            yield store
    except sqlite3.Error as error:
        raise UserError(f"the cache of finished requests cannot be used: {error}", where=str(cache),
                        hint="Delete the file, or name another.") from error


def _file_digest(store: sqlite3.Connection, path: Path) -> str:
    """SHA-256 of a file, computed again when its name, size or time has changed."""
    state = path.stat()
    name = f"{path.resolve()}:{state.st_size}:{state.st_mtime_ns}"
    if found := store.execute("SELECT digest FROM files WHERE name = ?", (name,)).fetchone():
        return found[0]
    found = sha256_file(path)
    store.execute("INSERT OR REPLACE INTO files VALUES (?, ?)", (name, found))
    store.commit()
    return found
