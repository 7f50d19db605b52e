"""Open the files of a run safely: plain files only, readable only by their owner.

A run directory may come from somebody else. Only plain files are opened: links are not followed;
pipes, devices and directories are refused, since they could block a run or fill the memory; and
files with hard links are not written to. New files and directories have the modes 0600 and 0700,
since they may contain the user's text.
"""

from __future__ import annotations

import contextlib
import os
import stat
from io import FileIO
from pathlib import Path

from fundamentallm.errors import CheckpointError

PRIVATE_FILE = 0o600
PRIVATE_DIRECTORY = 0o700
READABLE_FILE = 0o644
READABLE_DIRECTORY = 0o755

# Windows lacks some of these; there the file is checked before it is opened.
_PLAIN = sum(
    getattr(os, name, 0)
    for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC", "O_BINARY")
)
_OPENS_PLAINLY = all(hasattr(os, name) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_NOCTTY"))


def open_to_read(path: Path) -> FileIO:
    """Open an existing file for reading.

    Raises:
        CheckpointError: it is not a plain file.
        OSError: it does not exist, or the system call fails.
    """
    return FileIO(_opened(path, os.O_RDONLY), "rb")


def open_to_append(path: Path) -> FileIO:
    """Open a file for appending; create it if it does not exist.

    Raises:
        CheckpointError, OSError: as `open_to_read`.
    """
    return FileIO(_opened(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab")


def open_to_update(path: Path, create: bool = True) -> FileIO:
    """Open a file for reading and writing at its start.

    Raises:
        CheckpointError, OSError: as `open_to_read`.
    """
    return FileIO(_opened(path, os.O_RDWR | (os.O_CREAT if create else 0)), "rb+")


def narrow(path: str, flags: int) -> int:
    """Open a file: an `opener` for `open` whose new files other users may only read."""
    return os.open(path, flags, READABLE_FILE)


def check_file(path: Path, writing: bool = True) -> None:
    """Refuse a path that exists and is not a plain file.

    Args:
        path: a file of a run.
        writing: refuse a file with several hard links too, since writing would change them all.

    Raises:
        CheckpointError: it is not a plain file.
    """
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        _check_status(path, path.lstat(), writing)


def check_directory(path: Path, fix: str = "") -> None:
    """Refuse a path that exists and is not a directory.

    Args:
        path: a directory of a run.
        fix: for the message, if the path is a link; "{target}" is replaced by its target.

    Raises:
        CheckpointError: it is not a directory, or it is a link.
    """
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        mode = path.lstat().st_mode
        if not stat.S_ISDIR(mode):
            target = os.path.realpath(path) if stat.S_ISLNK(mode) else ""
            raise CheckpointError(
                "this is not a directory of the run",
                where=str(path),
                got=_kind(path, mode),
                expected="a directory",
                fix=fix.format(target=target) if fix and target else f"remove it: rm {path}",
            )


def make_directory(path: Path) -> None:
    """Create a private directory if it does not exist; other users may read new parents.

    Raises:
        OSError: the path is something else, or the system call fails.
    """
    missing = [parent for parent in path.parents if not parent.exists()]
    for parent in reversed(missing):
        parent.mkdir(READABLE_DIRECTORY, exist_ok=True)
    path.mkdir(PRIVATE_DIRECTORY, exist_ok=True)


def _opened(path: Path, flags: int) -> int:
    writing = flags & (os.O_WRONLY | os.O_RDWR) != 0
    if not _OPENS_PLAINLY:
        check_file(path, writing)
    try:
        descriptor = os.open(path, flags | _PLAIN, PRIVATE_FILE)
    except OSError:
        check_file(path, writing)  # the reason, where it is not a plain file
        raise
    try:
        _check_status(path, os.fstat(descriptor), writing)
    except CheckpointError:
        os.close(descriptor)
        raise
    return descriptor


def _check_status(path: Path, status: os.stat_result, writing: bool) -> None:
    if stat.S_ISREG(status.st_mode) and not (writing and status.st_nlink > 1):
        return
    names = f" with {status.st_nlink} hard links" if stat.S_ISREG(status.st_mode) else ""
    raise CheckpointError(
        "this is not a plain file of the run",
        where=str(path),
        got=_kind(path, status.st_mode) + names,
        expected="a file without further hard links",
        fix=f"look at it, and remove it if it is not yours: rm {path}",
    )


def _kind(path: Path, mode: int) -> str:
    if stat.S_ISLNK(mode):
        return f"a link to {path.readlink()}"
    kinds = {
        stat.S_IFREG: "a file",
        stat.S_IFDIR: "a directory",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
    }
    return kinds.get(stat.S_IFMT(mode), "a device")
