"""The lock of a run: only one process trains in a directory.

It is the operating system's lock on an open file, so it ends with its process, also after a kill,
and a stale lock never has to be removed. The contents of the file are used only in the message.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import socket
import sys
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import IO

from fundamentallm.errors import MachineError
from fundamentallm.files.private import open_to_update
from fundamentallm.files.run_layout import LOCK

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """Hold the lock of a run for a block.

    Args:
        run: the run's directory, which exists.

    Raises:
        CheckpointError: the lock is not a plain file.
        MachineError: another process holds it; the message tells its pid and host.
    """
    with open_to_update(run / LOCK) as file:
        _take(file, run)
        file.truncate(0)
        owner = json.dumps({"pid": os.getpid(), "host": socket.gethostname()})
        file.write(f"{owner}\n".encode())
        yield


def refuse_if_owned(run: Path) -> None:
    """Refuse a directory in which another process trains; nothing is written.

    Raises:
        MachineError: another process trains there.
    """
    with contextlib.suppress(OSError), open_to_update(run / LOCK, create=False) as file:
        _take(file, run)


def _take(file: FileIO, run: Path) -> None:
    try:
        lock_file(file)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            # A network file system without locks: training without a lock is better than none.
            logger.warning("%s cannot be locked; two processes could use it: %s", run, error)
            return
        owner = _owner(file)
        raise MachineError(
            "another process is training in this directory",
            where=str(run),
            got=owner,
            fix="wait for it or stop it; --run-dir or --resume never uses another directory",
        ) from error


def _owner(file: FileIO) -> str:
    try:
        file.seek(0)
        said = json.loads(file.read(1_000))
        return f"process {int(said['pid'])} on {str(said['host'])[:100]}"
    except (OSError, ValueError, KeyError, TypeError):
        return "an unknown process"


if sys.platform == "win32":
    import msvcrt

    def lock_file(file: IO[bytes]) -> None:
        """Lock an open file until it is closed; OSError: another process holds the lock."""
        # Lock a byte behind the contents, so that others can read those.
        file.seek(1 << 20)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    def lock_file(file: IO[bytes]) -> None:
        """Lock an open file until it is closed; OSError: another process holds the lock."""
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
