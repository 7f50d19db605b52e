"""The cache directory: downloads, measurements and compiled code of this user."""

from __future__ import annotations

import os
from pathlib import Path

from fundamentallm.errors import DataError


def default_cache_dir() -> Path:
    """Return the path of `fundamentallm` in the user's cache directory.

    Raises:
        DataError: the user has no home directory, as in some containers.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "fundamentallm"
    except RuntimeError as error:
        raise DataError(
            f"there is no cache directory: {error}",
            fix="set XDG_CACHE_HOME to a writable directory",
        ) from error
