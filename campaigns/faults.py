"""Faults on purpose: a disk that fails or stops at a chosen operation."""

from __future__ import annotations

from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any

from fundamentallm.training.filesystem import Filesystem

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
