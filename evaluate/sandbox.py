"""Programs that a model wrote run here and nowhere else: walled off, limited, and ended for certain.

What a program gets: a Python with the standard library and this environment's packages, read-only; a private
``/tmp`` of a few MB in memory; nothing else. No network, no home, no other file of the machine, no other
process, no environment, no capability; limits on wall time, CPU seconds, address space, processes, open files,
file size and output. When the time is over or the parent ends, the kernel ends everything that was started.

How: bubblewrap (``bwrap``) where it is installed, else Linux namespaces directly
(:mod:`tsugiki.evaluate.sandbox_child`). Whichever it is, a probe program first tries to get out; where neither
holds, nothing is run and :class:`UserError` says so. There is no fallback without walls. The kernel itself is
shared: this is a sandbox for a model's mistakes, not a virtual machine for an attacker's exploits.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tsugiki.errors import UserError
from tsugiki.evaluate import sandbox_child
from tsugiki.machine import cpu_count

ALLOW = "TSUGIKI_ALLOW_CODE"
CHILD = Path(sandbox_child.__file__)
STARTUP_SECONDS = 30.0  # for the walls to stand; a program's own time begins after
TMP_BYTES = 16 << 20
PROCESSES = 8  # processes and threads that a program may have, the sandbox's own three among them
DEVICES = [f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom")]
ENVIRONMENT = {
    "PATH": "/usr/bin:/bin", "HOME": "/tmp", "TMPDIR": "/tmp", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0",
    "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
}  # fmt: skip

ESCAPES = """
import os, resource, socket
assert {name for _, name in socket.if_nameindex()} <= {"lo"}, "the network is there"
try:
    socket.create_connection(("127.0.0.1", 9), timeout=1)
    raise AssertionError("a connection was made")
except OSError:
    pass
assert set(os.environ) <= set(ALLOWED), "the environment is there"
for path in FORBIDDEN:
    assert not os.path.exists(path), path + " is there"
for path in ("/out", "/usr/out", os.path.dirname(os.__file__) + "/out"):
    try:
        open(path, "w")
    except OSError:
        continue
    raise AssertionError(path + " can be written")
started = []
try:
    while len(started) < 64:
        child = os.fork()
        if child == 0:
            import time
            time.sleep(30)
        started.append(child)
    raise AssertionError("there is no limit on processes")
except BlockingIOError:
    pass
"""


@dataclass(frozen=True)
class RunResult:
    """How a program ended.

    Args:
        ok: it ran to its last line without an exception (``sys.exit`` before that is one).
        timed_out: its wall time was over.
        error: one line: the exception, or what ended it; None when ok.
        stdout: what it printed, at most the allowed bytes, UTF-8 with replacement characters.
    """

    ok: bool
    timed_out: bool = False
    error: str | None = None
    stdout: str = ""


def allowed() -> None:
    """Raise :class:`UserError` unless running model-written code was asked for and a sandbox holds here."""
    if os.environ.get(ALLOW) != "1":
        raise UserError(
            "this benchmark runs programs that the model writes, and that was not asked for",
            hint=f"Add --allow-code (elsewhere: {ALLOW}=1) to let them run in a sandbox: no network, none of your files, "
            "limits on time and memory",
        )
    mechanism()


@functools.cache
def mechanism() -> str:
    """``"bwrap"`` or ``"namespaces"``: the first that a probe program did not get out of.

    Raises:
        UserError: there is none on this machine; with what each said.
    """
    said = []
    # Root's own processes are not counted against a limit, and bwrap keeps the user that it is started by.
    order = ("namespaces", "bwrap") if sys.platform == "linux" and os.geteuid() == 0 else ("bwrap", "namespaces")
    for name in order:
        problem = probe(name)
        if problem is None:
            return name
        said.append(f"{name}: {problem}")
    raise UserError(
        "model-written code cannot be walled off on this machine, so it is not run (" + "; ".join(said) + ")",
        hint="Install bubblewrap (bwrap), or allow unprivileged user namespaces, on Linux 5.14 or newer; inside a "
        "container start it with --security-opt seccomp=unconfined, or leave the code benchmarks out",
    )


def probe(name: str) -> str | None:
    """Why a mechanism does not hold here, in one line; None when a program that tries to get out fails at it."""
    if sys.platform != "linux":
        return "needs Linux"
    if name == "bwrap" and not shutil.which("bwrap"):
        return "not installed"
    forbidden = sorted({str(Path.home()), str(Path.cwd()), "/home", "/proc/1", "/etc/passwd", "/etc/hostname", "/root"})
    kept = [bound for bound, _ in _binds()]
    forbidden = [path for path in forbidden if not any(_below(bound, path) for bound in kept)]
    code = f"ALLOWED = {sorted({*ENVIRONMENT, 'PWD', 'LC_CTYPE'})!r}\nFORBIDDEN = {forbidden!r}\n{ESCAPES}"
    result = _run(code, name, timeout=10.0, memory_bytes=1 << 30, output_bytes=1 << 16)
    return None if result.ok else result.error


def run_python(
    code: str, *, timeout: float = 3.0, memory_bytes: int = 1 << 30, output_bytes: int = 1 << 20
) -> RunResult:
    """Run one Python program in the sandbox.

    Args:
        code: its text.
        timeout: wall seconds from its first line on (the sandbox's own start is not counted).
        memory_bytes: address space of each of its few processes, in bytes.
        output_bytes: what it may write to standard output and standard error together, in bytes.

    Raises:
        UserError: no sandbox holds on this machine.
    """
    return _run(code, mechanism(), timeout=timeout, memory_bytes=memory_bytes, output_bytes=output_bytes)


def run_many(
    programs: Sequence[str],
    *,
    timeout: float = 3.0,
    memory_bytes: int = 1 << 30,
    output_bytes: int = 1 << 20,
    workers: int | None = None,
) -> list[RunResult]:
    """Run programs, a few at a time (as many as there are processors unless ``workers`` says), in their order."""
    mechanism()
    with ThreadPoolExecutor(max(1, workers or cpu_count())) as pool:
        return list(
            pool.map(
                lambda code: run_python(code, timeout=timeout, memory_bytes=memory_bytes, output_bytes=output_bytes),
                programs,
            )
        )


# --- how -----------------------------------------------------------------------------------------------------


def _below(path: str, folder: str) -> bool:
    """Whether ``path`` is ``folder`` or lies below it."""
    return os.path.commonpath([path, folder]) == folder


@functools.cache
def _binds() -> list[tuple[str, str]]:
    """What a program sees of this machine, as (path here, path there): the interpreter, libraries, packages."""
    paths = ["/usr", "/etc/ld.so.cache", "/etc/alternatives", "/nix/store"]
    paths += [path for path in ("/lib", "/lib64", "/lib32", "/bin") if not os.path.islink(path)]
    paths += [sys.base_prefix, os.path.dirname(os.path.realpath(sys.executable)), *_packages()]
    kept: list[str] = []
    for path in sorted({os.path.realpath(p) if p != "/etc/ld.so.cache" else p for p in paths if os.path.exists(p)}):
        if not any(_below(path, other) for other in kept):
            kept.append(path)
    return [(path, path) for path in kept] + [(str(CHILD.resolve()), "/program.py")]


def _packages() -> list[str]:
    """This environment's site-packages."""
    return sorted({os.path.realpath(sysconfig.get_path(kind)) for kind in ("purelib", "platlib")})


def _links() -> list[tuple[str, str]]:
    """/lib and its like where they are links, as (path, what it points to)."""
    return [(path, os.readlink(path)) for path in ("/lib", "/lib64", "/lib32", "/bin") if os.path.islink(path)]


def _command(name: str) -> list[str]:
    inner = [os.path.realpath(sys.executable), "-S", "-s", "-B", "/program.py", "program"]
    if name == "namespaces":
        config = {
            "bind": _binds(), "links": _links(), "devices": DEVICES, "tmp_bytes": TMP_BYTES,
            "argv": inner, "env": ENVIRONMENT, "parent": os.getpid(),
        }  # fmt: skip
        return [sys.executable, "-I", "-S", str(CHILD), "jail", json.dumps(config)]
    known = _bwrap_options()
    command = ["bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL", "--clearenv"]
    if "--disable-userns" in known:
        command += ["--unshare-user", "--disable-userns"]
    for key, value in ENVIRONMENT.items():
        command += ["--setenv", key, value]
    # Without a limit on its size a memory file system is a way round the limit on memory: then /tmp stays read-only.
    # It comes before the binds: an environment may itself lie below /tmp.
    command += ["--size", str(TMP_BYTES), "--tmpfs", "/tmp"] if "--size" in known else ["--dir", "/tmp"]
    for source, target in _binds():
        command += ["--ro-bind", source, target]
    for path, target in _links():
        command += ["--symlink", target, path]
    for device in DEVICES:
        command += ["--dev-bind", device, device]
    return [*command, "--remount-ro", "/", "--chdir", "/tmp", *inner]


@functools.cache
def _bwrap_options() -> frozenset[str]:
    shown = subprocess.run(["bwrap", "--help"], capture_output=True, text=True, check=False)
    return frozenset(word for word in (shown.stdout + shown.stderr).split() if word.startswith("--"))


def _run(code: str, name: str, *, timeout: float, memory_bytes: int, output_bytes: int) -> RunResult:
    token = secrets.token_hex(16)
    config = {
        "token": token, "path": _packages(), "memory_bytes": memory_bytes, "file_bytes": TMP_BYTES,
        "cpu_seconds": math.ceil(timeout) + 2, "processes": PROCESSES,
    }  # fmt: skip
    given = json.dumps(config).encode() + b"\n" + code.encode("utf-8", "surrogatepass")
    as_nobody = name == "bwrap" and os.geteuid() == 0
    try:
        process = subprocess.Popen(
            _command(name),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True, env={"PATH": os.environ.get("PATH", "/usr/bin:/bin")}, cwd="/",
            **({"user": sandbox_child.NOBODY, "group": sandbox_child.NOBODY, "extra_groups": []} if as_nobody else {}),
        )  # fmt: skip
    except OSError as error:
        return RunResult(False, error=f"the sandbox did not start: {error}")
    try:
        out, err, ended = _converse(process, given, token, timeout, output_bytes)
        if ended == "end":
            with contextlib.suppress(subprocess.TimeoutExpired):  # its status, unless it only closed its streams
                process.wait(1.0)
    finally:
        _end(process)
    stdout = out[:output_bytes].decode("utf-8", "replace")
    if ended == "time":
        return RunResult(False, True, f"the program ran for more than {timeout:g} seconds", stdout)
    if ended == "output":
        return RunResult(False, False, f"the program wrote more than {output_bytes} bytes", stdout)
    lines = err.decode("utf-8", "replace").splitlines()
    said = [line[len(token) + 1 :] for line in lines if line.startswith(token)]
    if not said:
        last = next((line for line in reversed(lines) if line.strip()), f"exit status {process.returncode}")
        return RunResult(False, error=f"the sandbox did not start: {last}", stdout=stdout)
    failed = [line[len("error ") :] for line in said if line.startswith("error ")]
    if failed:
        return RunResult(False, error=failed[-1], stdout=stdout)
    status = process.returncode
    if status == 0 and said[-1] == "ok":  # both: a process that the program started can say "ok" too
        return RunResult(True, stdout=stdout)
    how = _signal_name(status - 128) if status > 128 else _signal_name(-status) if status < 0 else f"exit status {status}"
    return RunResult(False, error=f"the program ended before its last line ({how})", stdout=stdout)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _converse(
    process: subprocess.Popen, given: bytes, token: str, timeout: float, output_bytes: int
) -> tuple[bytes, bytes, str]:
    """Write the program, read what it says, until it ends or has to be ended: (stdout, stderr, why)."""
    read = {process.stdout: bytearray(), process.stderr: bytearray()}
    start = f"{token} start".encode()
    begun, deadline = False, time.monotonic() + STARTUP_SECONDS
    with selectors.DefaultSelector() as selector:
        for stream in (process.stdin, process.stdout, process.stderr):
            os.set_blocking(stream.fileno(), False)
        selector.register(process.stdin, selectors.EVENT_WRITE)
        selector.register(process.stdout, selectors.EVENT_READ)
        selector.register(process.stderr, selectors.EVENT_READ)
        why = "end"
        while selector.get_map():
            left = deadline - time.monotonic()
            if left <= 0:
                why = "time" if begun else "end"
                break
            for key, _ in selector.select(left):
                stream = key.fileobj
                if stream is process.stdin:
                    try:
                        given = given[os.write(stream.fileno(), given[: 1 << 16]) :]
                    except BrokenPipeError:
                        given = b""
                    if not given:
                        selector.unregister(stream)
                        stream.close()
                    continue
                chunk = os.read(stream.fileno(), 1 << 16)
                if not chunk:
                    selector.unregister(stream)
                read[stream] += chunk
            if not begun and start in read[process.stderr]:
                begun, deadline = True, time.monotonic() + timeout
            if sum(map(len, read.values())) > output_bytes + 1024:  # the marks' own lines are not the program's
                why = "output"
                break
    return bytes(read[process.stdout]), bytes(read[process.stderr]), why


def _end(process: subprocess.Popen) -> None:
    """End the sandbox's first process and its group; the kernel ends the rest with it."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        if not stream.closed:
            stream.close()
