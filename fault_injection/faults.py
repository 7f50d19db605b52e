"""Faults on purpose: a disk that fails or stops at a chosen operation, and one that takes notes."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from fundamentallm.files.filesystem import Filesystem

# What a store of checkpoints does.
CHANGES = (
    "make_directory",
    "create",
    "write",
    "sync",
    "sync_directory",
    "rename",
    "remove_file",
    "remove_directory",
)


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Keep the program from saying thousands of times what a series of trials counts."""
    logger = logging.getLogger("fundamentallm")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def scratch_directory() -> Iterator[Path]:
    """Yield a new empty directory, in memory where the system has one: the disk is not tested."""
    memory = Path("/dev/shm")
    in_memory = memory.is_dir() and os.access(memory, os.W_OK)
    with tempfile.TemporaryDirectory(dir=memory if in_memory else None) as scratch:
        yield Path(scratch)


class Crash(BaseException):
    """The machine stops: no handler of the program may act on it."""


class FaultyFilesystem(Filesystem):
    """Fails at the n-th operation that changes the disk; syncs are counted and not made.

    Args:
        fail_at: the number of the failing operation, from 0; None never fails.
        fault: called there. Whatever it raises after a Crash is raised by every later operation.
    """

    def __init__(self, fail_at: int | None, fault: Callable[[], BaseException]) -> None:
        self.fail_at = fail_at
        self.fault = fault
        self.log: list[str] = []
        self.crashed = False

    def _step(
        self, operation: str, act: Callable[[], Any], torn: Callable[[], Any] = lambda: None
    ) -> Any:
        if self.crashed:
            raise Crash
        self.log.append(operation)
        if len(self.log) - 1 != self.fail_at:
            return act()
        error = self.fault()
        self.crashed = isinstance(error, Crash)
        torn()
        raise error

    def make_directory(self, path: Path) -> None:
        self._step("make_directory", lambda: Filesystem.make_directory(self, path))

    def create(self, path: Path) -> FileIO:
        file: FileIO = self._step("create", lambda: Filesystem.create(self, path))
        return file

    def truncate(self, file: FileIO, size: int) -> None:
        self._step("truncate", lambda: Filesystem.truncate(self, file, size))

    def write(self, file: FileIO, data: memoryview) -> int:
        half = data[: len(data) // 2]
        return int(self._step("write", lambda: file.write(data), lambda: file.write(half)))

    def sync(self, file: FileIO) -> None:
        self._step("sync", lambda: None)

    def sync_directory(self, path: Path) -> None:
        self._step("sync_directory", lambda: None)

    def rename(self, source: Path, target: Path) -> None:
        self._step("rename", lambda: Filesystem.rename(self, source, target))

    def remove_file(self, path: Path) -> None:
        self._step("remove_file", lambda: Filesystem.remove_file(self, path))

    def remove_directory(self, path: Path) -> None:
        self._step("remove_directory", lambda: Filesystem.remove_directory(self, path))


@dataclass(frozen=True)
class Operation:
    """One recorded operation: its method's name, where, and to what path or with which bytes."""

    kind: str
    path: Path
    target: Path | None = None
    data: bytes = b""


class RecordingFilesystem(Filesystem):
    """Writes down every operation that changes the disk, and the syncs, which it does not make.

    Args:
        forget: kinds that are left out of the record, as if the program had never asked for them.
    """

    def __init__(self, forget: Collection[str] = ()) -> None:
        self.forget = forget
        self.log: list[Operation] = []

    def _note(self, operation: Operation) -> None:
        if operation.kind not in self.forget:
            self.log.append(operation)

    def make_directory(self, path: Path) -> None:
        super().make_directory(path)
        self._note(Operation("make_directory", path))

    def create(self, path: Path) -> FileIO:
        file = super().create(path)
        self._note(Operation("create", path))
        return file

    def write(self, file: FileIO, data: memoryview) -> int:
        written = super().write(file, data)
        self._note(Operation("write", Path(str(file.name)), data=bytes(data[:written])))
        return written

    def sync(self, file: FileIO) -> None:
        self._note(Operation("sync", Path(str(file.name))))

    def sync_directory(self, path: Path) -> None:
        self._note(Operation("sync_directory", path))

    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)
        self._note(Operation("rename", source, target))

    def remove_file(self, path: Path) -> None:
        super().remove_file(path)
        self._note(Operation("remove_file", path))

    def remove_directory(self, path: Path) -> None:
        super().remove_directory(path)
        self._note(Operation("remove_directory", path))
