"""A file from the network, kept and known by its hash."""

from __future__ import annotations

import contextlib
import hashlib
import http
import http.client
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from fundamentallm.errors import DataError

TIMEOUT = 60  # seconds of silence
CHUNK = 1 << 20  # bytes
LARGEST_DOWNLOAD = 1 << 40  # bytes; an answer without an end must not go on for ever


def download(url: str, sha256: str, path: Path) -> Path:
    """Return a file by its hash: at `path` if it is there and whole, else from the network.

    What a broken connection leaves, `path` with `.part` behind it, is gone on with by the next
    call, if the server knows how to send the rest. The file appears whole or not at all.

    Args:
        url: an http or https address.
        sha256: of the contents, in hexadecimal digits.
        path: where the file is kept.

    Returns:
        `path`.

    Raises:
        DataError: the network or the disk refuses, or the contents have another hash.
    """
    if _whole(path, sha256):
        return path
    if not url.startswith(("https://", "http://")):
        raise DataError("a download needs an http or https address", got=url)
    part = path.with_name(path.name + ".part")
    found = _fetch(url, part, path)
    if found.resumed and found.sha256 != sha256:
        part.unlink()  # it began as another version, or the server sent something else
        found = _fetch(url, part, path)
    if found.sha256 != sha256:
        part.unlink()
        raise DataError(
            "the download is not the file that it should be",
            where=url,
            got=f"SHA-256 {found.sha256}",
            expected=f"SHA-256 {sha256}",
            fix=f"put a good copy at {path}",
        )
    try:
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise _unkept(path, error) from error
    return path


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return str(_hash_of(file).hexdigest())


@dataclass(frozen=True)
class _Fetched:
    sha256: str
    resumed: bool


def _whole(path: Path, sha256: str) -> bool:
    """Whether the file is there; one that cannot be read is not."""
    try:
        return path.is_file() and sha256_of(path) == sha256
    except OSError:
        return False


def _fetch(url: str, part: Path, path: Path) -> _Fetched:
    try:
        return _append(url, part, path)
    except DataError:
        with contextlib.suppress(OSError):
            if not part.stat().st_size:  # there is nothing to go on with
                part.unlink()
        raise


def _append(url: str, part: Path, path: Path) -> _Fetched:
    """Download to `part`, behind what it holds already if the server can; `path` for messages."""
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        file = part.open("a+b")
    except OSError as error:
        raise _unkept(path, error) from error
    with file:
        file.seek(0)
        digest = _hash_of(file)
        begun = file.tell()
        try:
            request = urllib.request.Request(url)  # noqa: S310 (the caller looked)
            if begun:
                request.add_header("Range", f"bytes={begun}-")
            with _open(request) as response:
                if begun and response.status != http.HTTPStatus.PARTIAL_CONTENT:
                    begun, digest = 0, hashlib.sha256()
                    file.truncate(0)
                size = begun
                promised = response.headers.get("Content-Length")
                expected = begun + int(promised) if promised else None
                while size < LARGEST_DOWNLOAD and (
                    data := response.read(min(CHUNK, LARGEST_DOWNLOAD - size))
                ):
                    digest.update(data)
                    _write(file, data, path)
                    size += len(data)
        except (OSError, http.client.HTTPException, ValueError) as error:
            if isinstance(error, urllib.error.HTTPError):
                error.close()  # it is the response, with its connection
                if begun and error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                    return _Fetched(digest.hexdigest(), True)  # nothing is missing
            raise _failed(url, str(error), path) from error
    if expected is not None and size < min(expected, LARGEST_DOWNLOAD):
        raise _failed(url, f"the connection ended after {size:,} of {expected:,} bytes", path)
    return _Fetched(digest.hexdigest(), begun > 0)


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
    except OSError as error:
        raise _unkept(path, error) from error


def _failed(url: str, got: str, path: Path) -> DataError:
    return DataError(
        "the download failed",
        where=url,
        got=got,
        fix=f"try again, put a copy at {path}, or name a text of your own in data.source",
    )


def _unkept(path: Path, error: OSError) -> DataError:
    return DataError(
        f"the download cannot be kept: {error.strerror}",
        where=str(path),
        fix="set XDG_CACHE_HOME to a writable place",
    )
