"""Tasks in worker processes: each result once, a killed process's task again, a failure at once and with its reason."""

import importlib
import os
import time

import pytest

from tsugiki.errors import UserError
from tsugiki.pool import Task, TaskError, run_tasks, told_progress

CALLS = """
import os, signal, time
from pathlib import Path
from tsugiki.errors import UserError
from tsugiki.pool import tell_progress

def square(x, log, threads, progress_file):
    with open(log, "a") as file:
        file.write(f"{x}\\n")
    tell_progress(progress_file, 1, 2, "half")
    return x * x, threads

def killed(times, log, threads, progress_file):
    with open(log, "a") as file:
        file.write("killed\\n")
    if Path(log).read_text().count("killed") <= times:
        time.sleep(0.3)  # the others are under way
        os.kill(os.getpid(), signal.SIGKILL)
    return "survived", threads

def slow(log, threads, progress_file):
    with open(log, "a") as file:
        file.write(f"pid {os.getpid()}\\n")
    time.sleep(1)
    return "slow", threads

def refused(threads, progress_file):
    raise UserError("it is empty", where="data.jsonl:7", hint="Fill it.")
"""


@pytest.fixture
def calls(tmp_path, monkeypatch):
    (tmp_path / "calls_of_a_test.py").write_text(CALLS)
    monkeypatch.syspath_prepend(tmp_path)
    return importlib.import_module("calls_of_a_test")


def lines(log):
    return sorted(log.read_text().split("\n"))[1:]


def gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_every_task_is_run_once_and_gives_its_own_result(calls, tmp_path):
    tasks = [Task(str(x), calls.square, (x, tmp_path / "log")) for x in range(4)]
    found = {task.label: result[0] for task, result in run_tasks(tasks, 2)}
    assert found == {str(x): x * x for x in range(4)}
    assert lines(tmp_path / "log") == ["0", "1", "2", "3"]


def test_no_tasks_are_no_results():
    assert list(run_tasks([], 2)) == []


def test_a_task_whose_process_is_killed_runs_again_and_nothing_is_given_twice(calls, tmp_path):
    log = tmp_path / "log"
    tasks = [Task("killed", calls.killed, (1, log)), *(Task(str(x), calls.square, (x, log)) for x in range(3))]
    found = [(task.label, result[0]) for task, result in run_tasks(tasks, 1)]
    assert sorted(found) == [("0", 0), ("1", 1), ("2", 4), ("killed", "survived")]
    assert lines(log) == ["0", "1", "2", "killed", "killed"]


def test_a_task_that_kills_every_process_is_named_and_the_one_beside_it_is_not_blamed(calls, tmp_path):
    # The slow task loses its process each time that the pool breaks: twice, as often as the one that is to blame.
    tasks = [Task("slow one", calls.slow, (tmp_path / "slow",)), Task("the killer", calls.killed, (99, tmp_path / "log"))]
    with pytest.raises(TaskError, match="the killer: its process was killed 2 times") as caught:
        list(run_tasks(tasks, 2))
    assert caught.value.task is tasks[1] and "memory" in caught.value.hint
    assert lines(tmp_path / "log") == ["killed", "killed"]


def test_a_users_mistake_is_told_with_the_task_and_ends_the_others(calls, tmp_path):
    tasks = [Task("slow one", calls.slow, (tmp_path / "slow",)), Task("refused", calls.refused, ()), Task("later", calls.slow, (tmp_path / "later",))]
    with pytest.raises(UserError) as caught:
        list(run_tasks(tasks, 2))
    assert (caught.value.message, caught.value.where, caught.value.hint) == ("refused: it is empty", "data.jsonl:7", "Fill it.")
    if (tmp_path / "slow").exists() and lines(tmp_path / "slow"):  # it had begun
        assert gone(int(lines(tmp_path / "slow")[0].split()[1]))


def test_an_interrupted_run_leaves_no_process(calls, tmp_path):
    tasks = [Task("slow one", calls.slow, (tmp_path / "slow",)), Task("first", calls.square, (2, tmp_path / "log"))]
    running = run_tasks(tasks, 2)
    assert next(running)[0].label == "first"
    deadline = time.monotonic() + 20
    while not ((tmp_path / "slow").exists() and lines(tmp_path / "slow")) and time.monotonic() < deadline:
        time.sleep(0.01)
    pid = int(lines(tmp_path / "slow")[0].split()[1])
    with pytest.raises(KeyboardInterrupt):
        running.throw(KeyboardInterrupt)
    assert gone(pid)


def test_what_a_task_tells_can_be_read_and_half_a_file_is_nothing(tmp_path, calls):
    calls.square(3, tmp_path / "log", 1, tmp_path / "told.json")
    assert told_progress(tmp_path / "told.json") == {"step": 1, "steps": 2, "note": "half"}
    (tmp_path / "told.json").write_text('{"step": 1, "st')
    assert told_progress(tmp_path / "told.json") is None
    assert told_progress(tmp_path / "absent.json") is None
