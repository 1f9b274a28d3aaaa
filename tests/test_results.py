"""One table of results: a stage that runs again replaces its own rows and no others."""

import sqlite3
from concurrent.futures import ThreadPoolExecutor

import pytest

from tsugiki.results import Result, read_results, replace_results


def row(metric, value, **more):
    return Result("setsubi/tiny-llama", "tiny-llama", "setsubi", metric, value, **more)


def test_what_is_written_comes_back(tmp_path):
    full = row("nll", 0.25, adapter="n2000-s0", level="Q4_K_M", stderr=0.01, n=270, settings={"拠点": [1, None]},
               provenance="ab" * 32)
    replace_results(tmp_path / "new" / "r.sqlite", "setsubi/tiny-llama", "sweep", [full])
    assert read_results(tmp_path / "new" / "r.sqlite") == [
        {"run": "setsubi/tiny-llama", "stage": "sweep", "model": "setsubi/tiny-llama", "base": "tiny-llama",
         "adapter": "n2000-s0", "level": "Q4_K_M", "task": "setsubi", "metric": "nll", "value": 0.25, "stderr": 0.01,
         "n": 270, "settings": {"拠点": [1, None]}, "provenance": "ab" * 32}
    ]


def test_no_table_is_no_results(tmp_path):
    assert read_results(tmp_path / "absent.sqlite") == []
    assert not (tmp_path / "absent.sqlite").exists()


def test_a_stage_replaces_its_own_rows_only(tmp_path):
    path = tmp_path / "r.sqlite"
    for run, stage, value in (("a", "sweep", 1.0), ("a", "check", 2.0), ("b", "sweep", 3.0)):
        replace_results(path, run, stage, [row("nll", value), row("bpc", value)])
    replace_results(path, "a", "sweep", [row("nll", 9.0)])
    left = sorted((r["run"], r["stage"], r["metric"], r["value"]) for r in read_results(path))
    assert left == [
        ("a", "check", "bpc", 2.0), ("a", "check", "nll", 2.0), ("a", "sweep", "nll", 9.0),
        ("b", "sweep", "bpc", 3.0), ("b", "sweep", "nll", 3.0),
    ]
    replace_results(path, "a", "check", [])
    assert {r["stage"] for r in read_results(path)} == {"sweep"}


def test_rows_that_cannot_be_written_leave_the_old_ones(tmp_path):
    path = tmp_path / "r.sqlite"
    replace_results(path, "a", "sweep", [row("nll", 1.0)])
    with pytest.raises(TypeError):
        replace_results(path, "a", "sweep", [row("nll", 2.0), row("nll", 3.0, settings={"no JSON": object()})])
    with pytest.raises(ZeroDivisionError):
        replace_results(path, "a", "sweep", (row("nll", 1 / i) for i in (1, 0)))
    assert [r["value"] for r in read_results(path)] == [1.0]


def test_text_is_data(tmp_path):
    path = tmp_path / "r.sqlite"
    name = "'; DROP TABLE results; --"
    replace_results(path, name, "sweep", [row(name, 1.0)])
    assert [(r["run"], r["metric"]) for r in read_results(path)] == [(name, name)]


def _write(path, run):
    for value in range(5):
        replace_results(path, run, "sweep", [row("nll", float(value)), row("bpc", float(value))])


def test_two_runs_may_write_at_once(tmp_path):
    path = tmp_path / "r.sqlite"
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(_write, [path, path], "ab"))
    assert sorted((r["run"], r["value"]) for r in read_results(path)) == [("a", 4.0)] * 2 + [("b", 4.0)] * 2


def test_any_sqlite_reads_it(tmp_path):
    replace_results(tmp_path / "r.sqlite", "a", "sweep", [row("nll", 1.5)])
    connection = sqlite3.connect(tmp_path / "r.sqlite")
    assert connection.execute("SELECT value FROM results WHERE metric = 'nll'").fetchall() == [(1.5,)]
    connection.close()
