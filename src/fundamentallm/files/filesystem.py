"""The calls to the operating system that a checkpoint depends on.

The checkpoint store accesses the disk only through the methods of `Filesystem`, so a test can
override one of them to make any operation fail, stop or be recorded. The functions below combine
them into durable operations.

A file is durable once its contents *and* the directory that contains it are synced.
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
    open_to_update,
)

READ_CHUNK_BYTES = 1 << 20
_WORTH_A_THREAD = 1 << 18  # bytes that take longer to hash than a thread to start

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
        file_mode, directory_mode: of new files and directories; private, since they may contain the
            user's text.
    """

    file_mode = PRIVATE_FILE
    directory_mode = PRIVATE_DIRECTORY

    def make_directory(self, path: Path) -> None:
        """Create one directory whose parent exists."""
        path.mkdir(self.directory_mode)

    def create(self, path: Path) -> FileIO:
        """Create a file and open it for writing, unbuffered; the path must not exist."""
        return FileIO(path, "xb", opener=partial(os.open, mode=self.file_mode))

    def open_to_update(self, path: Path) -> FileIO:
        """Open a plain file that exists for reading and writing, without a buffer."""
        return open_to_update(path, create=False)

    def truncate(self, file: FileIO, size: int) -> None:
        """Cut a file off after so many bytes."""
        file.truncate(size)

    def write(self, file: FileIO, data: memoryview) -> int:
        """Write; return the number of bytes written, which may be smaller than given."""
        return file.write(data)

    def sync(self, file: FileIO) -> None:
        """Wait until the contents of the file are on the disk."""
        os.fsync(file.fileno())

    def sync_directory(self, path: Path) -> None:
        """Wait until the entries of the directory are on the disk."""
        if os.name == "nt":  # Windows cannot open a directory; NTFS journals renames
            return
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """Rename atomically; a file at the target is replaced, a non-empty directory is not."""
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
        """Return the status of a path (links are not followed); None if it does not exist."""
        try:
            return path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def free_bytes(self, directory: Path) -> int:
        """Return the free bytes for this user on the directory's volume."""
        return shutil.disk_usage(directory).free


class ReadableFilesystem(Filesystem):
    """A `Filesystem` for files that other users may read, as exports."""

    file_mode = READABLE_FILE
    directory_mode = READABLE_DIRECTORY


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and SHA-256 (hexadecimal) of a file."""

    size: int
    sha256: str


def write_all(filesystem: Filesystem, file: FileIO, data: memoryview) -> None:
    """Write all of `data`, with as many calls as needed."""
    while data.nbytes:
        written = filesystem.write(file, data)
        if written == 0:  # or the loop would never end
            raise OSError(errno.EIO, "the system wrote nothing", str(file.name))
        data = data[written:]


def write_file(
    filesystem: Filesystem, path: Path, chunks: Iterable[bytes | memoryview]
) -> FileRecord:
    """Write a new file, hash it meanwhile, and sync its contents (not its directory)."""
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
    """SHA-256 of the written bytes, computed in a second thread from the first large chunk on.

    Hashing takes as long as writing, and both release the GIL. A small chunk is hashed sooner than
    a thread takes it. At most a few chunks wait in a queue; they must not change before the block
    ends.
    """

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._chunks: queue.Queue[memoryview | None] = queue.Queue(maxsize=4)
        self._thread: threading.Thread | None = None

    def __enter__(self) -> HashBeside:
        """Begin."""
        return self

    def __exit__(self, *error: object) -> None:
        """Wait until all chunks are hashed."""
        if self._thread is not None:
            self._chunks.put(None)
            self._thread.join()

    def update(self, chunk: memoryview) -> None:
        """Add the next bytes."""
        if self._thread is None:
            if chunk.nbytes < _WORTH_A_THREAD:
                self._digest.update(chunk)
                return
            self._thread = threading.Thread(target=self._work, name="sha256", daemon=True)
            self._thread.start()
        self._chunks.put(chunk)

    def hexdigest(self) -> str:
        """Return the hash, after the end of the block."""
        return self._digest.hexdigest()

    def _work(self) -> None:
        while (chunk := self._chunks.get()) is not None:
            self._digest.update(chunk)


def replace_file(
    filesystem: Filesystem, path: Path, chunks: Iterable[bytes | memoryview]
) -> FileRecord:
    """Write a file durably and atomically: a crash leaves the old or the new contents."""
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


def append_line(filesystem: Filesystem, path: Path, line: bytes) -> None:
    """Add a line to a file durably, in place of a torn one that a killed process has left.

    Raises:
        OSError: the disk refuses; the file has its whole lines as before.
        CheckpointError: it is not a plain file with one name.
    """
    with filesystem.open_to_update(path) as file:
        end = file.readall().rfind(b"\n") + 1
        try:
            if file.tell() > end:
                filesystem.truncate(file, end)
            file.seek(end)
            write_all(filesystem, file, memoryview(line))
            filesystem.sync(file)
        except OSError:
            with contextlib.suppress(OSError):
                filesystem.truncate(file, end)
            raise


def make_directories(filesystem: Filesystem, path: Path) -> None:
    """Create a directory and its missing parents, each durable before the next."""
    if filesystem.status(path) is not None:
        return
    make_directories(filesystem, path.parent)
    with contextlib.suppress(FileExistsError):  # another process created it meanwhile
        filesystem.make_directory(path)
    filesystem.sync_directory(path.parent)


def read_chunks(filesystem: Filesystem, path: Path) -> Iterator[bytes]:
    """Yield the contents of a file in chunks of at most READ_CHUNK_BYTES bytes."""
    with filesystem.open(path) as file:
        while chunk := file.read(READ_CHUNK_BYTES):
            yield chunk


def same_contents(filesystem: Filesystem, path: Path, chunks: Iterable[bytes | memoryview]) -> bool:
    """Return whether a file contains exactly these bytes."""
    with filesystem.open(path) as file:
        for chunk in chunks:
            rest = memoryview(chunk).cast("B")
            while rest.nbytes:
                data = file.read(min(READ_CHUNK_BYTES, rest.nbytes))
                # Bytes are compared in one call, memory views element by element.
                if not data or bytes(rest[: len(data)]) != data:
                    return False
                rest = rest[len(data) :]
        return not file.read(1)


def random_suffix() -> str:
    """Return 12 hexadecimal digits, different in each call; no global generator is used."""
    return uuid.uuid4().hex[:12]


@contextlib.contextmanager
def saving_to(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into a CheckpointError with the reason."""
    try:
        yield
    except OSError as error:
        code = errno.errorcode.get(error.errno or 0, "")
        reason = REASONS.get(code, error.strerror or str(error))
        raise CheckpointError(
            f"the checkpoint could not be saved: {reason}",
            where=str(path),
            got=str(error),
            fix="free space or choose a writable directory; earlier checkpoints are untouched",
        ) from error


@contextlib.contextmanager
def reading_from(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into a CheckpointError with the path."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            "the checkpoint cannot be read", where=str(path), got=str(error)
        ) from error
