"""Seconds since the process began, for budgets that count from there."""

from __future__ import annotations

import os
import time
from pathlib import Path


def seconds_since_start() -> float:
    """Return the age of this process in seconds, from the same origin at every call."""
    return time.monotonic() - _started_at


def _age() -> float:
    """Ask the kernel how long the process has lived; 0 if it is unknown.

    Imports of several seconds come before the first line of a training program, and a budget
    that ignored them would not be the user's two minutes.
    """
    try:
        # Field 22 of /proc/self/stat: start time in clock ticks since boot (man 5 proc). The
        # command name in field 2 may hold spaces, so count from its closing parenthesis.
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 0.0
    return max(0.0, uptime - started)


def _look() -> None:
    """Ask when this process began: at import, and anew where it was forked from one that had."""
    global _started_at
    _started_at = time.monotonic() - _age()


_started_at: float
_look()
if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_look)
