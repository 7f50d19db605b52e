"""Files of a run: private, plain, and never a way out of the run's directory.

A run's directory may come from somebody else. What is opened here is a plain file under its own
name: a link is not followed, a pipe, device or folder is refused before it can hang a run or fill
the memory, and a file that has a second name elsewhere (a hard link) is not written to. What is
made here is for its owner alone, 0600 and 0700, since it may hold the user's text.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from io import FileIO
from pathlib import Path

from fundamentallm.errors import CheckpointError

PRIVATE_FILE = 0o600
PRIVATE_DIRECTORY = 0o700
READABLE_FILE = 0o644
READABLE_DIRECTORY = 0o755

# Windows lacks some; there the look before the opening has to do.
_PLAIN = sum(
    getattr(os, name, 0)
    for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC", "O_BINARY")
)


def open_to_read(path: Path) -> FileIO:
    """Open a file that exists.

    Raises:
        CheckpointError: it is no plain file.
        OSError: there is none, or the system refuses.
    """
    return FileIO(_opened(path, os.O_RDONLY), "rb")


def open_to_append(path: Path) -> FileIO:
    """Open a file for writing at its end; one that does not exist is made.

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
    """Open as `open` does: an `opener` whose new files others may read at most, never write."""
    return os.open(path, flags, READABLE_FILE)


def check_file(path: Path, writing: bool = True) -> None:
    """Refuse what lies at a path unless it is nothing or a plain file.

    Args:
        path: a file of a run.
        writing: refuse a file with a second name as well, which would be changed too.

    Raises:
        CheckpointError: it is something else.
    """
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        _check_status(path, path.lstat(), writing)


def check_directory(path: Path, fix: str = "") -> None:
    """Refuse what lies at a path unless it is nothing or a directory.

    Args:
        path: a directory of a run.
        fix: the way on, for the message; "{target}" stands for where a link leads.

    Raises:
        CheckpointError: it is something else, a link to a directory too.
    """
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        mode = path.lstat().st_mode
        if not stat.S_ISDIR(mode):
            target = os.path.realpath(path) if stat.S_ISLNK(mode) else ""
            raise CheckpointError(
                "this is not a directory of the run's own",
                where=str(path),
                got=_kind(path, mode),
                expected="a directory",
                fix=fix.format(target=target) if fix and target else f"remove it: rm {path}",
            )


def make_directory(path: Path) -> None:
    """Make a private directory, unless there is one; missing parents may be read by others.

    Raises:
        OSError: something else lies there, or the system refuses.
    """
    missing = [parent for parent in path.parents if not parent.exists()]
    for parent in reversed(missing):
        parent.mkdir(READABLE_DIRECTORY, exist_ok=True)
    path.mkdir(PRIVATE_DIRECTORY, exist_ok=True)


def _opened(path: Path, flags: int) -> int:
    writing = flags & (os.O_WRONLY | os.O_RDWR) != 0
    check_file(path, writing)
    try:
        descriptor = os.open(path, flags | _PLAIN, PRIVATE_FILE)
    except OSError as error:
        if error.errno == errno.ELOOP:  # a link that came in between
            check_file(path, writing)
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
    names = f" with {status.st_nlink} names (hard links)" if stat.S_ISREG(status.st_mode) else ""
    raise CheckpointError(
        "this is not a plain file of the run's own",
        where=str(path),
        got=_kind(path, status.st_mode) + names,
        expected="a file, with one name",
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
