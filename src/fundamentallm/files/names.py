"""Numbered names for new files."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path


def numbered(path: Path, suffix: str = "") -> Iterator[Path]:
    """Yield `path`, `path-2`, `path-3`, ... without end, each with `suffix` appended."""
    for number in itertools.count(1):
        yield path.with_name(path.name + (f"-{number}" if number > 1 else "") + suffix)
