"""How far a run is, from the end of its metrics: told before large libraries are imported."""

from __future__ import annotations

import json
import os
from pathlib import Path

from fundamentallm.errors import CheckpointError
from fundamentallm.files.private import open_to_read
from fundamentallm.files.run_layout import METRICS

TAIL = 1 << 16  # bytes that are read


def glance(run: Path) -> str:
    """Return the last step, time and validation loss of a run; empty if none can be read."""
    try:
        with open_to_read(run / METRICS) as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
            *lines, _ = (file.read(TAIL) or b"").split(b"\n")  # the last one is empty or torn
    except (OSError, CheckpointError):
        return ""
    words = ""
    for line in reversed(lines):
        try:
            record = json.loads(line)
            step, seconds = int(record["step"]), float(record["elapsed_seconds"])
            words = words or f"{run.name}: step {step:,} after {seconds:,.0f} s"
            if "val/loss" in record:
                loss = float(record["val/loss"])
                return f"{words}, validation loss {loss:.4f} at step {step:,}"
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            continue  # the first one may begin in its middle
    return words
