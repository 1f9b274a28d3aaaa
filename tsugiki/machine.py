"""What this process may use of the machine, and what it has used."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path


def cpu_count() -> int:
    """The CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_rss() -> int:
    """The largest resident memory that this process has had, in bytes (interpreter and mapped files included).

    On Linux from ``VmHWM``: ``ru_maxrss`` survives ``exec``, so that a child would report its parent's memory.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError, ValueError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
