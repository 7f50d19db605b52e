"""Which files of a folder are read: one rule for `run` and `prepare`."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fundamentallm.data.file_kinds import Kind, kind_of
from fundamentallm.data.text_file import unreadable

logger = logging.getLogger(__name__)

_MOST_NAMED = 5


@dataclass
class FolderFiles:
    """The files of a folder.

    Attributes:
        read: those to read, sorted by their paths.
        passed_over: the others by the reason.
    """

    read: list[Path] = field(default_factory=list)
    passed_over: dict[str, list[Path]] = field(default_factory=dict)

    def log(self, name: str) -> None:
        """Say which files are read and which are not."""
        number = len(self.read)
        parts = [f"{number:,} file{'s' if number != 1 else ''} read{_named(self.read)}"]
        parts += [
            f"{len(paths):,} passed over, {reason}{_named(paths)}"
            for reason, paths in self.passed_over.items()
        ]
        logger.info("%s: %s", name, "; ".join(parts))


def files_in(folder: Path, kinds: Sequence[Kind]) -> FolderFiles:
    """Return the files of some kinds in a folder and all below it, each once.

    Linked folders and files are followed. What was seen already is passed over, so a link to a
    folder above ends; its own path comes before that of a link to it. Hidden files and folders,
    whose names begin with a dot, are passed over.

    Raises:
        DataError: a folder cannot be read.
    """
    found = FolderFiles()
    seen_folders: set[tuple[int, int]] = set()
    candidates: list[Path] = []
    folders, linked = [folder], list[Path]()

    def pass_over(path: Path, reason: str) -> None:
        found.passed_over.setdefault(reason, []).append(path)

    while folders or linked:
        at = folders.pop(0) if folders else linked.pop(0)
        try:
            status = at.stat()
            entries = sorted(os.scandir(at), key=lambda entry: entry.name)
        except OSError as error:
            raise unreadable(Path(error.filename or at), error) from error
        if (status.st_dev, status.st_ino) in seen_folders:
            pass_over(at, "seen already")
            continue
        seen_folders.add((status.st_dev, status.st_ino))
        for entry in entries:
            path = at / entry.name
            if entry.name.startswith("."):
                pass_over(path, "hidden")
            elif entry.is_dir():
                (linked if entry.is_symlink() else folders).append(path)
            elif kind_of(path) not in kinds:
                pass_over(path, "of other kinds")
            else:
                candidates.append(path)
    seen_files = set()
    for path in sorted(candidates, key=lambda path: (path.is_symlink(), path)):
        real = path.resolve()
        if real in seen_files:
            pass_over(path, "seen already")
        else:
            seen_files.add(real)
            found.read.append(path)
    found.read.sort()
    return found


def _named(paths: Sequence[Path]) -> str:
    names = ", ".join(str(path) for path in paths[:_MOST_NAMED])
    more = ", ..." if len(paths) > _MOST_NAMED else ""
    return f" ({names}{more})" if names else ""
