"""Notice, inside a process, that it writes where it should not, or starts code."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

OUTSIDE = (
    "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.chmod",
    "os.truncate", "os.chown", "shutil.rmtree", "shutil.move",
)  # fmt: skip
FOLLOWING = ("os.chmod", "os.chown", "os.truncate")  # the others act on a link itself
STARTS = (
    "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn",
    "subprocess.Popen", "pty.spawn", "pickle.find_class", "ctypes.dlopen", "socket.connect",
)  # fmt: skip


class Breach(BaseException):
    """The program did what it may not do here."""


def watch(place: Path, *, may_start: bool = False) -> None:
    """Raise a `Breach` in this process from now on where it writes elsewhere or starts code.

    Args:
        place: everything in it may be written.
        may_start: whether processes and libraries may be started.
    """
    inside = str(place.resolve()) + os.sep
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

    def is_inside(path: Any, follow: bool = True) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return True  # a descriptor, which was opened before
        name = os.fsdecode(path)
        real = os.path.realpath(name if follow else Path(name).parent)
        return (real + os.sep).startswith(inside) or real == os.devnull

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & writing and not is_inside(path):
                raise Breach(f"{path!r} was opened for writing")
        elif event in OUTSIDE:
            paths = [value for value in arguments[:2] if isinstance(value, str | bytes)]
            if event in ("os.symlink", "os.link"):
                paths = paths[1:]
            if not all(is_inside(path, event in FOLLOWING) for path in paths):
                raise Breach(f"{event} of {paths}")
        elif (event in STARTS and not may_start) or (event == "import" and arguments[0] == "evil"):
            raise Breach(f"{event} {arguments[:1]!r}")

    sys.addaudithook(hook)
