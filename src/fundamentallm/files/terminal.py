"""The width of a terminal."""

from __future__ import annotations

import os
from typing import TextIO

_USUAL_COLUMNS = 80


def room_in(stream: TextIO | None) -> int | None:
    """Return the columns for a bar; for 80 where a terminal does not know its width.

    None for a stream that is no terminal of the system. Three columns stay free: a terminal shows
    `^C` behind the bar, and in a full line it would go to the next one and leave a torn bar above.
    """
    try:
        columns = os.get_terminal_size(stream.fileno()).columns if stream is not None else 0
    except (OSError, ValueError, AttributeError):
        return None
    if not columns:  # under `script`, or in a container without a size
        told = os.environ.get("COLUMNS", "")
        columns = int(told) if told.isdecimal() and int(told) else _USUAL_COLUMNS
    return max(columns - 3, 1)
