"""A child process ends with its parent, whatever ends that one, and what a child said last is told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tsugiki.errors import UserError
from tsugiki.quantize.child import run_child

# Native code that does not come back, as a decode of minutes; ctypes lets other threads run meanwhile, as llama-cpp-python does.
SLEEPER = """
import ctypes
from pathlib import Path
from tsugiki.quantize.child import serve

def work(job):
    if job.get("die"):
        print("GGML_ASSERT: the file is damaged")
        ctypes.CDLL(None).abort()
    Path(job["started"]).write_text("")
    ctypes.CDLL(None).sleep(job["seconds"])
    return {"slept": job["seconds"]}

if __name__ == "__main__":
    serve(work)
"""
PARENT = """
import sys
from tsugiki.quantize.child import run_child
run_child("sleeper_for_tests", {"seconds": 60, "started": sys.argv[1], "long": "x" * 200_000}, name="sleep")
"""


@pytest.fixture
def modules(tmp_path, monkeypatch):
    (tmp_path / "sleeper_for_tests.py").write_text(SLEEPER, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name)
def test_a_child_does_not_outlive_its_parent(modules, end):
    started = modules / "started"
    parent = subprocess.Popen([sys.executable, "-P", "-c", PARENT, str(started)], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not started.exists():
        assert time.monotonic() < deadline and parent.poll() is None
        time.sleep(0.05)
    (child,) = psutil.Process(parent.pid).children()
    os.kill(parent.pid, end)  # the parent alone, as `kill` does
    parent.communicate(timeout=30)
    _, alive = psutil.wait_procs([child], timeout=10)
    assert not alive


def test_a_result_comes_back_and_the_child_is_gone(modules):
    before = set(psutil.Process().children())
    assert run_child("sleeper_for_tests", {"seconds": 0, "started": str(modules / "x")}, name="sleep") == {"slept": 0}
    assert set(psutil.Process().children()) <= before


def test_a_crash_is_told_with_its_signal_and_last_words(modules):
    with pytest.raises(UserError, match=r"“sleep” was ended by SIGABRT: GGML_ASSERT: the file is damaged"):
        run_child("sleeper_for_tests", {"die": True}, name="sleep")


def test_a_module_that_cannot_even_start_is_told():
    with pytest.raises(UserError, match=r"ended with status 1: .*no_such_module_of_ours"):
        run_child("no_such_module_of_ours", {"long": "x" * 200_000}, name="nothing")
