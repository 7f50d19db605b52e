"""Download a file and check its hash."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import http
import http.client
import os
import stat
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, BinaryIO

from fundamentallm.errors import DataError
from fundamentallm.files.authorization import request_for
from fundamentallm.files.lock import lock_file
from fundamentallm.files.private import PRIVATE_FILE, make_directory

TIMEOUT = 60  # seconds of silence
CHUNK = 1 << 20  # bytes
LARGEST_DOWNLOAD = 1 << 40  # bytes; a limit for a response that never ends


def download(url: str, sha256: str, path: Path) -> Path:
    """Download a file, unless `path` has it already.

    After a broken connection the next call continues from `path` + `.part`, if the server supports
    ranges. The file appears at `path` only when it is complete, and several processes may download
    it at the same time.

    Args:
        url: an http or https address; `files.authorization` tells how a secret is passed.
        sha256: of the contents, in hexadecimal digits.
        path: where the file is stored.

    Returns:
        `path`.

    Raises:
        DataError: the download or the writing fails, or the contents have another hash.
    """
    if _whole(path, sha256):
        return path
    if not url.startswith(("https://", "http://")):
        raise DataError("a download needs an http or https address", got=url)
    with _Partial(path) as part:
        if _whole(path, sha256):  # another process downloaded it meanwhile
            return path
        resumed = _fetch(url, part)
        found = part.sha256()
        if resumed and found != sha256:
            part.file.truncate(0)  # the first part was of another version
            _fetch(url, part)
            found = part.sha256()
        if found != sha256:
            part.remove()
            raise DataError(
                "the downloaded file has the wrong contents",
                where=url,
                got=f"SHA-256 {found}",
                expected=f"SHA-256 {sha256}",
                fix=f"put a correct copy at {path}",
            )
        part.keep()
    return path


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return str(_hash_of(file).hexdigest())


def _whole(path: Path, sha256: str) -> bool:
    """Whether the file can be read and has this hash."""
    try:
        return path.is_file() and sha256_of(path) == sha256
    except OSError:
        return False


class _Partial:
    """The part of a file that is downloaded so far; only this process writes to it.

    It is `path` + `.part`, locked. If another process holds the lock, or that path is not a plain
    file, it is a new temporary file, which is removed at the end of the block.

    Raises:
        DataError: it cannot be created.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.place = path.with_name(path.name + ".part")
        self._private = False
        try:
            make_directory(path.parent)
            file = self._shared()
            self._private = file is None
            if file is None:
                descriptor, name = tempfile.mkstemp(".part", path.name + ".", path.parent)
                self.place, file = Path(name), os.fdopen(descriptor, "r+b")
        except OSError as error:
            raise _cannot_store(path, error) from error
        self.file = file

    def __enter__(self) -> _Partial:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError, ValueError):  # ValueError: the file is closed
            if self._private or not os.fstat(self.file.fileno()).st_size:  # nothing to continue
                self.remove()
        self.file.close()

    def _shared(self) -> BinaryIO | None:
        """Return `path` + `.part`, open and locked; None if it cannot be used."""
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0)
        flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        try:
            descriptor = os.open(self.place, flags, PRIVATE_FILE)
        except OSError as error:
            if self.place.is_symlink() or error.errno in (errno.EISDIR, errno.ENXIO):
                return None
            raise
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            return None
        file = os.fdopen(descriptor, "r+b")
        with contextlib.suppress(OSError):
            lock_file(file)
            if self._is_ours(file):  # it was not replaced before it was locked
                return file
        file.close()
        return None

    def _is_ours(self, file: BinaryIO) -> bool:
        own, there = os.fstat(file.fileno()), self.place.lstat()
        return (own.st_dev, own.st_ino) == (there.st_dev, there.st_ino)

    def sha256(self) -> str:
        """Return the SHA-256 of the contents so far."""
        self.file.seek(0)
        return str(_hash_of(self.file).hexdigest())

    def keep(self) -> None:
        """Move the file to its final path."""
        try:
            self.file.flush()
            if not self._is_ours(self.file):
                raise OSError(errno.ESTALE, "the file was replaced while it was written")
            if sys.platform == "win32":
                self.file.close()  # an open file cannot be moved there
            self.place.replace(self.path)
            self._private = False
        except OSError as error:
            self.remove()
            raise _cannot_store(self.path, error) from error

    def remove(self) -> None:
        """Remove the file if it exists."""
        with contextlib.suppress(OSError):
            if self._is_ours(self.file):
                self.place.unlink()


def _fetch(url: str, part: _Partial) -> bool:
    """Download what the file lacks; return whether a part of it existed and was used."""
    file, path = part.file, part.path
    begun = file.seek(0, os.SEEK_END)
    try:
        request = request_for(url)
        if begun:
            request.add_header("Range", f"bytes={begun}-")
        with _open(request) as response:
            if begun and response.status != http.HTTPStatus.PARTIAL_CONTENT:
                begun = file.seek(0)
                file.truncate()
            size = begun
            promised = response.headers.get("Content-Length")
            expected = begun + int(promised) if promised else None
            while size < LARGEST_DOWNLOAD and (
                data := response.read(min(CHUNK, LARGEST_DOWNLOAD - size))
            ):
                _write(file, data, path)
                size += len(data)
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # this closes the connection
            if begun and error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                return True  # the file is complete
        raise _failed(url, str(error), path) from error
    if expected is not None and size < min(expected, LARGEST_DOWNLOAD):
        raise _failed(url, f"the connection ended after {size:,} of {expected:,} bytes", path)
    return begun > 0


def _open(request: urllib.request.Request) -> http.client.HTTPResponse:
    response: http.client.HTTPResponse = urllib.request.urlopen(  # noqa: S310 (checked above)
        request, timeout=TIMEOUT
    )
    return response


def _hash_of(file: BinaryIO) -> Any:
    digest = hashlib.sha256()
    while data := file.read(CHUNK):
        digest.update(data)
    return digest


def _write(file: BinaryIO, data: bytes, path: Path) -> None:
    try:
        file.write(data)
        file.flush()
    except OSError as error:
        raise _cannot_store(path, error) from error


def _failed(url: str, got: str, path: Path) -> DataError:
    return DataError(
        "the download failed",
        where=url,
        got=got,
        fix=f"try again, put a copy at {path}, or set data.source to a text of your own",
    )


def _cannot_store(path: Path, error: OSError) -> DataError:
    return DataError(
        f"the download cannot be stored: {error.strerror}",
        where=str(path),
        fix="set XDG_CACHE_HOME to a writable directory",
    )
