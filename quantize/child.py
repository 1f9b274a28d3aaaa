"""Native code runs in child processes: one JSON job in, one JSON object a line out, a sentence when it dies.

A child ends with its parent, even one that was killed and could end nothing: the parent keeps the pipe of the job open,
and the system closes it with the parent, which the child sees.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping

from tsugiki.artifacts import refusal
from tsugiki.errors import UserError


def run_child(module: str, job: Mapping, *, name: str, on_message: Callable[[dict], None] | None = None) -> dict:
    """Run ``python -m module`` with ``job`` as a line of JSON on its standard input, and return its result.

    The child writes one JSON object a line: ``{"result": …}`` last, ``{"error", "where", "hint"}`` where it refuses
    (:func:`serve` does), anything else goes to ``on_message``.

    Raises:
        UserError: what the child raised, or that it died, with the signal and its last words.
    """
    with tempfile.TemporaryFile() as words:
        # Without safe path a folder of ours would hide a library of the same name.
        environment = os.environ | {"PYTHONSAFEPATH": "1", "PYTHONIOENCODING": "utf-8"}
        child = subprocess.Popen([sys.executable, "-m", module], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                 stderr=words, env=environment)
        result = None
        try:
            with contextlib.suppress(BrokenPipeError):  # it has died; its last words say why
                child.stdin.write(json.dumps(job).encode() + b"\n")
                child.stdin.flush()
            for line in child.stdout:
                message = json.loads(line)
                if "error" in message:
                    raise UserError(message["error"], where=message["where"], hint=message["hint"])
                result = message.get("result", result)
                if on_message and "result" not in message:
                    on_message(message)
            child.wait()
        finally:
            child.kill()
            child.wait()
            child.stdout.close()
            with contextlib.suppress(BrokenPipeError):
                child.stdin.close()
        if child.returncode or result is None:
            words.seek(max(0, words.seek(0, os.SEEK_END) - 4000))
            lines = [w.strip() for w in words.read().decode("utf-8", "replace").splitlines() if w.strip()]
            telling = [w for w in lines if any(k in w.lower() for k in ("error", "fail", "assert"))]
            code = child.returncode
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
            raise UserError(
                f"the process of “{name}” {how}: {' | '.join((telling or lines)[-3:]) or 'no last words'}",
                where=str(job.get("path", "")) or None,
                hint="Nothing was written. The file may be damaged, or the memory too small.",
            )
    return result


_channel = None  # where the child speaks; sys.stdout until serve


def serve(task: Callable[[dict], dict]) -> None:
    """The child's side of :func:`run_child`.

    What libraries print (HiGHS, llama.cpp) goes to standard error, so that it cannot mix with the messages.
    """
    global _channel
    _channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    job = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        say(result=task(job))
    except UserError as error:
        say(error=error.message, where=error.where, hint=error.hint)
    except Exception as error:
        known = refusal(error)
        if known is None:
            raise
        say(error=known.message, where=known.where, hint=known.hint)


def _end_with_parent() -> None:
    """Wait for the end of standard input, then end this process at once, whatever native code is doing."""
    while os.read(0, 1):  # not sys.stdin, whose lock the interpreter wants when it ends
        pass
    os._exit(1)


def say(**message) -> None:
    """Send one message to the parent."""
    channel = _channel or sys.stdout
    channel.write(json.dumps(message) + "\n")
    channel.flush()
