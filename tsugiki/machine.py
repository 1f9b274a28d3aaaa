"""What this process may use of the machine, and what it has used."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path


def cpu_count() -> int:
    """The CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_memory() -> int:
    """Bytes that this process may still take: free memory and what the system gives back, within its cgroup."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        free = 1024 * int(text.split("MemAvailable:")[1].split()[0])
    except (OSError, IndexError, ValueError):
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    group = Path("/sys/fs/cgroup")
    try:
        most = (group / "memory.max").read_text(encoding="ascii").strip()
        used = int((group / "memory.current").read_text(encoding="ascii"))
        cached = int((group / "memory.stat").read_text(encoding="ascii").split("\ninactive_file ")[1].split()[0])
        return free if most == "max" else max(0, min(free, int(most) - used + cached))
    except (OSError, IndexError, ValueError):
        return free


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
