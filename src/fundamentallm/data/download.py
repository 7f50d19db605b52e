"""A file from the network, kept and known by its hash."""

from __future__ import annotations

import hashlib
import http.client
import os
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

from fundamentallm.errors import DataError

TIMEOUT = 60  # seconds of silence
LARGEST_DOWNLOAD = 1 << 24  # bytes; an answer without an end must not fill the memory


def default_cache_dir() -> Path:
    """Return where downloads are kept: `fundamentallm` in the user's cache directory.

    Raises:
        DataError: the user has no home, as in some containers.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "fundamentallm"
    except RuntimeError as error:
        raise DataError(
            f"there is no place for downloads: {error}",
            fix="set XDG_CACHE_HOME to a writable place",
        ) from error


def download(url: str, sha256: str, path: Path) -> bytes:
    """Return a file by its hash: from `path` if it is there and whole, else from the network.

    Args:
        url: an http or https address.
        sha256: of the contents, in hexadecimal digits.
        path: where the file is kept.

    Raises:
        DataError: the network or the disk refuses, or the contents have another hash.
    """
    kept = _kept(path)
    if kept is not None and hashlib.sha256(kept).hexdigest() == sha256:
        return kept
    data = _fetch(url, path)
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise DataError(
            "the download is not the file that it should be",
            where=url,
            got=f"SHA-256 {found}",
            expected=f"SHA-256 {sha256}",
            fix=f"put a good copy at {path}",
        )
    _keep(path, data)
    return data


def _kept(path: Path) -> bytes | None:
    """Return what is kept; None where nothing is, or nothing that can be read."""
    try:
        return path.read_bytes() if path.is_file() else None
    except OSError:
        return None


def _fetch(url: str, path: Path) -> bytes:
    if not url.startswith(("https://", "http://")):
        raise DataError("a download needs an http or https address", got=url)
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response:  # noqa: S310 (above)
            return bytes(response.read(LARGEST_DOWNLOAD))
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it is the response, with its connection
        raise DataError(
            "the download failed",
            where=url,
            got=str(error),
            fix=f"put a copy at {path}, or name a text of your own in data.source",
        ) from error


def _keep(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            temporary = Path(file.name)
            file.write(data)
        temporary.replace(path)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise DataError(
            f"the download cannot be kept: {error.strerror}",
            where=str(path),
            fix="set XDG_CACHE_HOME to a writable place",
        ) from error
