"""Every call to the operating system that a checkpoint depends on.

`Filesystem` is the seam: the store and the portable file touch the disk through its methods
alone, so a test that overrides one of them can fail, stop or record any operation. The functions
below it are the few durable sequences made of those calls.

A file is durable once its own contents are synced *and* the directory that names it is synced.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import queue
import shutil
import threading
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from io import FileIO
from pathlib import Path

from fundamentallm.errors import CheckpointError
from fundamentallm.files.private import (
    PRIVATE_DIRECTORY,
    PRIVATE_FILE,
    READABLE_DIRECTORY,
    READABLE_FILE,
)

READ_CHUNK_BYTES = 1 << 20

REASONS = {
    "ENOSPC": "the disk is full",
    "EDQUOT": "the disk quota is used up",
    "EROFS": "the file system is read-only",
    "EACCES": "permission is denied",
    "EPERM": "permission is denied",
    "EIO": "the disk reports an input/output error",
}


class Filesystem:
    """The disk operations, one system call each. All raise OSError.

    Attributes:
        file_mode, directory_mode: of what is made; private, since it may hold the user's text.
    """

    file_mode = PRIVATE_FILE
    directory_mode = PRIVATE_DIRECTORY

    def make_directory(self, path: Path) -> None:
        """Create one directory whose parent exists."""
        path.mkdir(self.directory_mode)

    def create(self, path: Path) -> FileIO:
        """Open a new file for writing, without a buffer; nothing of that name may exist."""
        return FileIO(path, "xb", opener=partial(os.open, mode=self.file_mode))

    def write(self, file: FileIO, data: memoryview) -> int:
        """Write and return how many bytes the system took, which may be fewer than given."""
        return file.write(data)

    def sync(self, file: FileIO) -> None:
        """Wait until the contents of the file are on the disk."""
        os.fsync(file.fileno())

    def sync_directory(self, path: Path) -> None:
        """Wait until the names in the directory are on the disk."""
        if os.name == "nt":  # Windows cannot open a directory; its renames are journalled
            return
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """Rename in one atomic step; a file at the target is replaced, a full directory is not."""
        source.replace(target)

    def remove_file(self, path: Path) -> None:
        """Remove one file."""
        path.unlink()

    def remove_directory(self, path: Path) -> None:
        """Remove one empty directory."""
        path.rmdir()

    def open(self, path: Path) -> FileIO:
        """Open a file for reading, without a buffer."""
        return path.open("rb", buffering=0)

    def names(self, directory: Path) -> tuple[str, ...]:
        """Return the names in a directory, sorted."""
        return tuple(sorted(path.name for path in directory.iterdir()))

    def status(self, path: Path) -> os.stat_result | None:
        """Return what lies at the path (a link is not followed), or None for nothing."""
        try:
            return path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def free_bytes(self, directory: Path) -> int:
        """Return the bytes that this user may still write on the directory's volume."""
        return shutil.disk_usage(directory).free


class ReadableFilesystem(Filesystem):
    """A `Filesystem` for what is made to be handed on: others may read it, never write."""

    file_mode = READABLE_FILE
    directory_mode = READABLE_DIRECTORY


@dataclass(frozen=True)
class FileRecord:
    """What a file must be: its size in bytes and the SHA-256 of its contents in hexadecimal."""

    size: int
    sha256: str


def write_all(filesystem: Filesystem, file: FileIO, data: memoryview) -> None:
    """Write all of `data`, however little the system takes at a time."""
    while data.nbytes:
        written = filesystem.write(file, data)
        if written == 0:  # a loop here would never end
            raise OSError(errno.EIO, "the system wrote nothing", str(file.name))
        data = data[written:]


def write_file(
    filesystem: Filesystem, path: Path, chunks: Iterable[bytes | memoryview]
) -> FileRecord:
    """Write a new file, hash it on the way, and sync its contents (not its directory)."""
    size = 0
    with filesystem.create(path) as file, HashBeside() as digest:
        for chunk in chunks:
            rest = memoryview(chunk)
            digest.update(rest)
            size += rest.nbytes
            write_all(filesystem, file, rest)
        filesystem.sync(file)
    return FileRecord(size, digest.hexdigest())


class HashBeside:
    """SHA-256 of what is being written, computed in a thread beside the writing.

    Hashing costs as much as writing, and neither holds Python's lock meanwhile. A few chunks wait
    in a queue at most; nothing may change them before the block ends.
    """

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._chunks: queue.Queue[memoryview | None] = queue.Queue(maxsize=4)
        self._thread = threading.Thread(target=self._work, name="sha256", daemon=True)

    def __enter__(self) -> HashBeside:
        """Begin."""
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Wait until everything handed over is hashed."""
        self._chunks.put(None)
        self._thread.join()

    def update(self, chunk: memoryview) -> None:
        """Hand over the next bytes."""
        self._chunks.put(chunk)

    def hexdigest(self) -> str:
        """Return the hash, once the block has ended."""
        return self._digest.hexdigest()

    def _work(self) -> None:
        while (chunk := self._chunks.get()) is not None:
            self._digest.update(chunk)


def replace_file(
    filesystem: Filesystem, path: Path, chunks: Iterable[bytes | memoryview]
) -> FileRecord:
    """Put a durable file at the path: at every instant the old or the new one is there, whole."""
    staging = path.with_name(f".{path.name}.tmp-{random_suffix()}")
    try:
        record = write_file(filesystem, staging, chunks)
        filesystem.rename(staging, path)
    except BaseException:
        with contextlib.suppress(OSError):
            filesystem.remove_file(staging)
        raise
    filesystem.sync_directory(path.parent)
    return record


def make_directories(filesystem: Filesystem, path: Path) -> None:
    """Create a directory and its missing parents, each durable before the next."""
    if filesystem.status(path) is not None:
        return
    make_directories(filesystem, path.parent)
    with contextlib.suppress(FileExistsError):  # another process made it in between
        filesystem.make_directory(path)
    filesystem.sync_directory(path.parent)


def read_chunks(filesystem: Filesystem, path: Path) -> Iterator[bytes]:
    """Yield the contents of a file in pieces of at most READ_CHUNK_BYTES bytes."""
    with filesystem.open(path) as file:
        while chunk := file.read(READ_CHUNK_BYTES):
            yield chunk


def same_contents(filesystem: Filesystem, path: Path, chunks: Iterable[bytes | memoryview]) -> bool:
    """Tell whether a file holds these bytes and no more."""
    with filesystem.open(path) as file:
        for chunk in chunks:
            rest = memoryview(chunk).cast("B")
            while rest.nbytes:
                data = file.read(min(READ_CHUNK_BYTES, rest.nbytes))
                # As bytes: two of them are compared at once, views element by element.
                if not data or bytes(rest[: len(data)]) != data:
                    return False
                rest = rest[len(data) :]
        return not file.read(1)


def random_suffix() -> str:
    """Return 12 hexadecimal digits that no other call returns (no global RNG is drawn from)."""
    return uuid.uuid4().hex[:12]


@contextlib.contextmanager
def saving_to(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into the error that tells a user why the save failed."""
    try:
        yield
    except OSError as error:
        code = errno.errorcode.get(error.errno or 0, "")
        reason = REASONS.get(code, error.strerror or str(error))
        raise CheckpointError(
            f"the checkpoint could not be saved: {reason}",
            where=str(path),
            got=str(error),
            fix="free space or choose a writable place; checkpoints saved earlier are untouched",
        ) from error


@contextlib.contextmanager
def reading_from(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into an error that names the checkpoint."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            "the checkpoint cannot be read", where=str(path), got=str(error)
        ) from error
