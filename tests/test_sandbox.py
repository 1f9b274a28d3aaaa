"""What a program that a model wrote cannot do: each wall is tried by a real program, whatever it is made of."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tsugiki.errors import UserError
from tsugiki.evaluate import sandbox
from tsugiki.evaluate.sandbox import RunResult, run_many, run_python

MECHANISMS = ("bwrap", "namespaces")
PROBED: dict[str, str | None] = {}


@pytest.fixture(params=MECHANISMS)
def walls(request, monkeypatch):
    """Each mechanism that holds on this machine."""
    name = request.param
    if name not in PROBED:
        PROBED[name] = sandbox.probe(name)
    if PROBED[name] is not None:
        pytest.skip(f"{name} does not hold here: {PROBED[name]}")
    monkeypatch.setattr(sandbox, "mechanism", lambda: name)
    return name


def named(marker: str) -> str:
    """Lines that give a program's processes a name which can be seen from outside."""
    return f"import ctypes\nctypes.CDLL(None).prctl(15, b{marker!r}, 0, 0, 0)\n"


def alive(marker: str) -> list[str]:
    """Processes of this machine with that name."""
    found = []
    for path in Path("/proc").glob("[0-9]*/comm"):
        try:
            if path.read_text().strip() == marker:
                found.append(path.parent.name)
        except OSError:
            continue
    return found


def gone(marker: str, seconds: float = 5.0) -> bool:
    until = time.monotonic() + seconds
    while alive(marker) and time.monotonic() < until:
        time.sleep(0.02)
    return not alive(marker)


@pytest.fixture
def marker() -> str:
    return "p-" + secrets.token_hex(5)


# --- what a program may ----------------------------------------------------------------------------------------


def test_a_program_runs_to_its_end_and_its_output_comes_back(walls):
    found = run_python("import math, json, re, itertools, hashlib, heapq\nprint('合計', math.comb(5, 2))")
    assert found == RunResult(True, False, None, "合計 10\n")


def test_a_program_sees_the_installed_packages_and_its_own_tmp(walls, marker):
    code = f"import numpy, os\nopen({marker!r}, 'w').write('1')\nprint(os.getcwd(), open({marker!r}).read(), numpy.arange(3).sum())"
    found = run_python(code, timeout=20)
    assert found.stdout == "/tmp 1 3\n" and found.ok
    assert not Path("/tmp", marker).exists()


@pytest.mark.parametrize(("code", "said"), [
    ("assert 1 == 2, '違う'", "AssertionError: 違う"),
    ("def (", "SyntaxError"),
    ("1 / 0", "ZeroDivisionError"),
    ("import sys; sys.exit(0)", "SystemExit: 0"),
    ("import os; os._exit(0)", "ended before its last line"),
    ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "ended before its last line"),
    ("import ctypes; ctypes.string_at(0)", "SIGSEGV"),
    ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    ("input()", "EOFError"),
    ("raise ValueError('a\\nb' + 'c' * 10_000)", "ValueError: a b"),
])  # fmt: skip
def test_a_program_that_does_not_reach_its_last_line_has_failed_and_says_how_in_one_line(walls, code, said):
    found = run_python(code)
    assert not found.ok and not found.timed_out
    assert said in found.error and len(found.error) < 600 and "\n" not in found.error


def test_a_process_that_a_program_started_cannot_pass_for_it(walls):
    assert not run_python("import os\nif os.fork():\n    os.wait()\n    raise ValueError\nprint('child')").ok


def test_a_program_is_not_the_main_module_as_in_the_original_harness(walls):
    assert run_python("assert __name__ != '__main__'\nimport sys\nassert sys.argv == ['program']").ok


# --- what it cannot --------------------------------------------------------------------------------------------


def test_no_connection_reaches_this_machine(walls):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        code = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=1)"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0  # it works outside
        server.accept()
        found = run_python(code)
        assert not found.ok and ("OSError" in found.error or "Connection" in found.error)
        with pytest.raises(TimeoutError):
            server.accept()


def test_the_only_network_interface_is_the_loopback(walls):
    assert run_python("import socket\nassert {n for _, n in socket.if_nameindex()} <= {'lo'}").ok


def test_no_socket_file_and_no_abstract_socket_can_be_reached(walls, tmp_path):
    name = "\0tsugiki-" + secrets.token_hex(4)
    with socket.socket(socket.AF_UNIX) as abstract, socket.socket(socket.AF_UNIX) as file:
        abstract.bind(name), abstract.listen()
        file.bind(str(tmp_path / "s")), file.listen()
        for address in (name, str(tmp_path / "s")):
            found = run_python(f"import socket\nsocket.socket(socket.AF_UNIX).connect({address!r})")
            assert not found.ok and ("refused" in found.error or "No such file" in found.error)


def test_files_of_this_machine_are_not_there(walls, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("the secret")
    for path in (secret, Path(__file__), Path("/etc/passwd"), Path("/proc/self/environ"), Path("/sys/kernel")):
        assert path.exists()
        found = run_python(f"import os\nassert not os.path.exists({str(path)!r})")
        assert found.ok, (path, found)


def test_of_the_home_only_the_path_to_the_interpreter_is_there(walls):
    home = Path.home()
    bound = {Path(path).relative_to(home).parts[0] for path, _ in sandbox._binds() if Path(path).is_relative_to(home) and Path(path) != home}
    found = run_python(f"import os\nprint(*(os.listdir({str(home)!r}) if os.path.exists({str(home)!r}) else []))")
    # the kit's own script is bound under another name
    assert found.ok and set(found.stdout.split()) <= bound


def test_nothing_can_be_written_but_the_private_tmp(walls, tmp_path):
    tmp_path.chmod(0o777)
    places = ["/", "/usr", "/usr/lib", os.path.dirname(os.__file__), str(tmp_path), "/dev", "/etc", "/var/tmp"]
    code = f"""
import os
for place in {places!r}:
    for how in (lambda p: open(p, "w"), os.mkdir):
        try:
            how(place + "/tsugiki-out")
        except OSError:
            continue
        raise AssertionError(place)
for path in ("/program.py", os.__file__):
    for how in (lambda p: open(p, "a"), os.unlink, lambda p: os.chmod(p, 0o777), lambda p: os.rename(p, "y")):
        try:
            how(path)
        except OSError:
            continue
        raise AssertionError(path)
"""
    found = run_python(code)
    assert found.ok, found
    assert not [p for p in places if Path(p, "tsugiki-out").exists()] and Path(os.__file__).is_file()


def test_the_environment_is_not_handed_on(walls, monkeypatch):
    monkeypatch.setenv("TSUGIKI_TEST_TOKEN", "a secret")
    found = run_python("import os\nprint(sorted(os.environ))")
    assert found.ok and "TSUGIKI_TEST_TOKEN" not in found.stdout
    assert set(eval(found.stdout)) <= {*sandbox.ENVIRONMENT, "PWD", "LC_CTYPE"}


def test_no_privilege_is_left_and_none_can_be_had(walls):
    code = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
assert libc.mount(b"tmpfs", b"/tmp", b"tmpfs", 0, None) == -1
assert libc.mount(None, b"/", None, 32 | 4096, None) == -1  # to make it writable again
assert libc.umount2(b"/usr", 2) == -1
assert libc.sethostname(b"x", 1) == -1
assert libc.chroot(b"/tmp") == -1
for user in (0, 1, 2):
    if user != os.getuid():
        assert libc.setuid(user) == -1
for kind in (0x10000000, 0x00020000, 0x20000000, 0x40000000):  # new user, mount, process, network namespaces
    assert libc.unshare(kind) == -1, kind
"""
    found = run_python(code)
    assert found.ok, found


def test_other_processes_can_be_neither_seen_nor_ended(walls):
    code = f"""
import os, signal
for pid in ({os.getpid()}, {os.getppid()}):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        continue
    raise AssertionError(pid)
assert os.getpid() < 10
"""
    assert run_python(code).ok


# --- what ends it ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["while True: pass", "import time; time.sleep(60)", "import signal\nsignal.pause()"])
def test_what_does_not_end_is_ended(walls, code, marker):
    start = time.monotonic()
    found = run_python(named(marker) + code, timeout=0.5)
    assert found.timed_out and not found.ok and "0.5 seconds" in found.error
    assert time.monotonic() - start < 10 and gone(marker)


def test_signals_cannot_be_ignored(walls, marker):
    code = "import signal\nfor s in range(1, 32):\n    try: signal.signal(s, signal.SIG_IGN)\n    except OSError: pass\nwhile True: pass"
    assert run_python(named(marker) + code, timeout=0.5).timed_out and gone(marker)


def test_output_without_end_is_ended_and_capped(walls, marker):
    for stream in ("stdout", "stderr"):
        found = run_python(f"{named(marker)}import sys\nwhile True: sys.{stream}.write('x' * 4096)", timeout=20, output_bytes=20_000)
        assert not found.ok and not found.timed_out and "20000 bytes" in found.error
        assert len(found.stdout) <= 20_000 and gone(marker)


def test_a_memory_hog_is_stopped(walls):
    found = run_python("x = []\nwhile True: x.append(bytearray(1 << 20))", memory_bytes=200 << 20, timeout=20)
    assert found.error == "MemoryError: " and not found.timed_out


def test_files_cannot_eat_memory_either(walls):
    code = "for i in range(1000):\n    with open(str(i), 'wb') as f: f.write(bytes(1 << 20))"
    found = run_python(code, timeout=20)
    assert not found.ok and "OSError" in found.error


def test_a_fork_bomb_stops_and_this_process_goes_on(walls, marker):
    code = named(marker) + "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    found = run_python(code, timeout=1)
    assert found.timed_out and gone(marker)
    assert run_python("print('still here')").stdout == "still here\n"


def test_a_program_may_have_a_few_processes_but_not_many(walls):
    code = """
import os, time
children = 0
try:
    for _ in range(100):
        if os.fork() == 0:
            time.sleep(30)
        children += 1
except BlockingIOError:
    pass
assert children < 16, children
"""
    assert run_python(code).ok


def test_what_a_program_leaves_behind_ends_with_it(walls, marker):
    code = named(marker) + "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(60)\n    os._exit(0)"
    assert run_python(code).ok and gone(marker)


def test_a_program_ends_when_the_one_who_started_it_is_killed(walls, marker):
    code = f"""
from tsugiki.evaluate import sandbox
sandbox.mechanism = lambda: {walls!r}
sandbox.run_python({named(marker) + "import time; time.sleep(60)"!r}, timeout=60)
"""
    parent = subprocess.Popen([sys.executable, "-P" if sys.version_info >= (3, 11) else "-s", "-c", code])
    until = time.monotonic() + 20
    while not alive(marker) and time.monotonic() < until:
        time.sleep(0.05)
    assert alive(marker)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    assert gone(marker)


def test_many_programs_come_back_in_their_order(walls):
    codes = [f"import time\ntime.sleep({0.2 if i % 2 else 0})\nprint({i})" for i in range(6)] + ["1 / 0"]
    found = run_many(codes, workers=3)
    assert [f.stdout for f in found] == [f"{i}\n" for i in range(6)] + [""] and not found[-1].ok


def test_the_time_that_the_walls_take_is_not_the_programs(walls):
    found = run_many(["print(1)"] * 4, timeout=0.5, workers=4)
    assert all(f.ok for f in found)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(code=st.text(max_size=60))
def test_any_text_at_all_comes_back_as_a_result(walls, code):
    found = run_python(code, timeout=2)
    assert isinstance(found, RunResult) and found.ok == (found.error is None)


# --- where there is none ----------------------------------------------------------------------------------------


def test_without_walls_nothing_is_run_and_the_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setattr(sandbox, "probe", lambda name: f"no {name}")
    with pytest.raises(UserError, match="bwrap: no bwrap") as caught:
        sandbox.mechanism.__wrapped__()
    assert "namespaces: no namespaces" in str(caught.value) and "bubblewrap" in caught.value.hint


def test_a_mechanism_that_lets_something_through_does_not_count(monkeypatch):
    """Unwalled Python in a mechanism's place: the probe gets out of it, so it is refused."""
    monkeypatch.setattr(sandbox, "_command", lambda name: [sys.executable, "-S", "-s", str(sandbox.CHILD), "program"])
    assert sandbox.probe("namespaces") is not None


def test_a_missing_bwrap_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert sandbox.probe("bwrap") == "not installed"


def test_code_runs_only_when_asked_for(monkeypatch):
    for value in (None, "0", "", "true"):
        monkeypatch.delenv(sandbox.ALLOW, raising=False)
        if value is not None:
            monkeypatch.setenv(sandbox.ALLOW, value)
        with pytest.raises(UserError, match="was not asked for"):
            sandbox.allowed()
