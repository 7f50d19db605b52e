"""The path that a name in a configuration means."""

from __future__ import annotations

import contextlib
from pathlib import Path

from fundamentallm.data.sources.built_in import SOURCES
from fundamentallm.data.text_file import unreadable
from fundamentallm.errors import DataError, did_you_mean


def existing(name: str) -> Path:
    """Return a path that the system knows, `~` expanded.

    Raises:
        DataError: nothing is there, or it cannot be reached.
    """
    path = expanded(name)
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in the name
        raise DataError(
            "no such file or folder",
            where=name,
            expected="a path, or one of " + ", ".join(SOURCES.names()),
            fix=did_you_mean(name, SOURCES.names()) or f"the path is relative to {Path.cwd()}",
        ) from None
    except OSError as error:
        raise unreadable(path, error) from error
    return path


def expanded(name: str) -> Path:
    """Return a path, `~` expanded."""
    path = Path(name)
    with contextlib.suppress(RuntimeError):  # "~notes.txt" looks like the home of a user
        path = path.expanduser()
    return path
