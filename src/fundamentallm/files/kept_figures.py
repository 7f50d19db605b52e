"""Figures measured on this machine: small JSON files in the user's cache directory.

An entry belongs to circumstances, plain values such as the processor's name, and is read in equal
ones alone. A file is replaced as a whole, so a reader never meets half of one; if two processes
write at once, one entry is lost. Nothing depends on such a file: one that is damaged, or is no file
of ours, is written anew, and where nothing can be written nothing is kept.
"""

from __future__ import annotations

import hashlib
import json
import logging
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from fundamentallm.errors import DataError
from fundamentallm.files.cache_directory import default_cache_dir
from fundamentallm.files.filesystem import Filesystem, make_directories, replace_file

logger = logging.getLogger(__name__)

T = TypeVar("T")

LARGEST_FILE = 4 << 20  # bytes
MOST_ENTRIES = 500  # the oldest go first


class KeptFigures(Generic[T]):
    """One file of figures.

    Args:
        path: of the file, in whose place there may be nothing yet, or None: nothing is kept.
        parse: turns an entry's plain values into figures; a ValueError, LookupError, TypeError
            or AttributeError of it means that the file is damaged.
        plain: turns figures into plain values.
        store_or_warn: whether a disk that refuses the file is worth a warning.
    """

    def __init__(
        self,
        path: Path | None,
        parse: Callable[[Any], T],
        plain: Callable[[T], Any],
        store_or_warn: bool = True,
    ) -> None:
        self.path = path
        self._parse, self._plain = parse, plain
        self._level = logging.WARNING if store_or_warn else logging.DEBUG

    def get(self, circumstances: Mapping[str, Any]) -> T | None:
        """Return the figures for these circumstances; None if unknown, or the file is damaged."""
        entry = self._entries().get(key_of(circumstances))
        return None if entry is None else self._parse(entry["measured"])

    def put(self, circumstances: Mapping[str, Any], figures: T) -> None:
        """Store figures, as far as the disk allows."""
        if self.path is None:
            return
        entries = self._entries(warn=False)
        key = key_of(circumstances)
        entries.pop(key, None)
        entries[key] = {"of": dict(circumstances), "measured": self._plain(figures)}
        kept = dict(list(entries.items())[-MOST_ENTRIES:])
        try:
            text = json.dumps({"version": 1, "entries": kept}, indent=1, allow_nan=False)
            filesystem = Filesystem()
            make_directories(filesystem, self.path.parent)
            replace_file(filesystem, self.path, [text.encode()])
        except OSError as error:
            logger.log(self._level, "the measurements cannot be stored in %s: %s", self.path, error)

    def _entries(self, warn: bool = True) -> dict[str, dict[str, Any]]:
        """Return the entries as stored, each known to be one that `parse` understands."""
        if self.path is None:
            return {}
        try:
            status = self.path.stat()
            if not stat.S_ISREG(status.st_mode):
                raise ValueError("it is no file")
            if status.st_size > LARGEST_FILE:
                raise ValueError("it is too large")
            read = json.loads(self.path.read_text(encoding="utf-8"))
            if read["version"] != 1:
                raise ValueError(f"version {read['version']}")
            entries = {str(key): dict(entry) for key, entry in read["entries"].items()}
            for entry in entries.values():
                dict(entry["of"]), self._parse(entry["measured"])
            return entries
        except FileNotFoundError:
            return {}
        except (
            OSError,
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
            RecursionError,
        ) as error:
            if warn:
                logger.warning("%s is damaged and will be rewritten: %s", self.path, error)
            return {}


def cache_file(name: str) -> Path | None:
    """Return the path of a file in the user's cache directory; None without a home directory."""
    try:
        return default_cache_dir() / name
    except DataError:
        return None


def key_of(circumstances: Mapping[str, Any]) -> str:
    """Return the key of an entry."""
    return hashlib.sha256(canonical(circumstances)).hexdigest()


def canonical(plain: Any) -> bytes:
    """Return plain values as JSON, equal for equal values."""
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), default=str).encode()
