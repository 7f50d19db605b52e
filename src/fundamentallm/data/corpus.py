"""Where text comes from: built-in sources, files, folders, token files.

Whatever is wrong with a source is said before anything is trained or written.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import stat
import tempfile
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fundamentallm.data.tokenizer import Tokenizer, load_tokenizer
from fundamentallm.errors import DataError, did_you_mean
from fundamentallm.registry import Registry

SOURCES: Registry[str] = Registry("data source", supplied=("cache_dir",))

TEXT_SUFFIXES = (".txt", ".md")
# First bytes that give away what a file is, whatever its name says.
SIGNATURES = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"PAR1": "Parquet",
    b"\x28\xb5\x2f\xfd": "Zstandard",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
    b"%PDF": "PDF",
}
UTF8_BOM = b"\xef\xbb\xbf"

TINYSHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
TINYSHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
DOWNLOAD_SECONDS = 60
MAX_DOWNLOAD_BYTES = 1 << 24  # an answer without an end must not fill the memory


@dataclass(frozen=True)
class Corpus:
    """A source, read.

    Attributes:
        text: the whole text; empty for token files.
        pieces: for each file in order its name, first character and length in characters.
        sha256: of the text's UTF-8 bytes, or of the token files.
        built_in: whether it is one of `SOURCES`, which can change with Python or a download.
        tokens: (N,) memory-mapped token ids of a token file, else None.
        tokenizer: the token file's, else None.
    """

    text: str
    pieces: list[tuple[str, int, int]]
    sha256: str
    built_in: bool = False
    tokens: np.ndarray | None = None
    tokenizer: Tokenizer | None = None


def read_source(source: str | Sequence[str], cache_dir: Path | None = None) -> Corpus:
    """Read a built-in source, a file, a folder, a token file (.npy), or a list of texts.

    Args:
        source: a name in `SOURCES`, a path, or a list of these, which are joined in that order; a
            token file stands alone.
        cache_dir: where downloads are kept.

    Raises:
        DataError: the source does not exist, holds no text, or is not UTF-8 text.
    """
    sources = [source] if isinstance(source, str) else list(source)
    if any(name.endswith(".npy") for name in sources):
        if len(sources) > 1:
            raise DataError(
                "a token file cannot be joined with other sources",
                where=", ".join(sources),
                fix="name the .npy file alone, or text files alone, in data.source",
            )
        return _read_tokens(_existing(sources[0]))
    parts = []
    pieces = []
    position = 0
    for origin, text in (part for name in sources for part in _texts(name, cache_dir)):
        parts.append(text)
        pieces.append((origin, position, len(text)))
        position += len(text)
    text = "".join(parts)
    if not text.strip():
        raise DataError(
            "there is no text in the source",
            where=", ".join(sources),
            got="only white space" if text else "0 characters",
            fix="name a file or folder with text in data.source",
        )
    return Corpus(text, pieces, _hash(text), built_in=any(name in SOURCES for name in sources))


def read_text(path: Path) -> str:
    """Return a file's text, line ends as they are, a byte-order mark removed.

    Raises:
        DataError: it cannot be read, or is not UTF-8 text.
    """
    where = str(path)
    _check_regular(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error
    for signature, kind in SIGNATURES.items():
        if data.startswith(signature):
            raise DataError(
                f"this is a {kind} file, not UTF-8 text",
                where=where,
                got=f"first bytes {data[:4].hex(' ')}",
                fix="unpack or convert it to UTF-8 text first",
            )
    try:
        text = data.removeprefix(UTF8_BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        offset = error.start + (len(UTF8_BOM) if data.startswith(UTF8_BOM) else 0)
        raise DataError(
            "the file is not UTF-8 text",
            where=f"{where}: byte {offset:,}",
            got=f"byte 0x{data[offset]:02x}: {error.reason}",
            fix="convert it, as with: iconv -f LATIN1 -t UTF-8",
        ) from error
    if "\0" in text:
        raise DataError(
            "the file holds a NUL character: it is binary, or UTF-16 or UTF-32 text",
            where=f"{where}: byte {data.index(0):,}",
            fix="convert it to UTF-8 text first",
        )
    return text


def split_tokens(tokens: np.ndarray, fractions: Sequence[float]) -> dict[str, np.ndarray]:
    """Cut tokens into contiguous parts by position; views that share no token.

    Args:
        tokens: (N,).
        fractions: of train, val and test, which add up to 1.

    Returns:
        `train`, `val` and `test`; a part of fraction 0 is empty.
    """
    bounds = [0]
    total = 0.0
    for fraction in fractions:
        total += fraction
        # 0.29 of 100 tokens is 28.999999999999996 in binary and must still be 29.
        bounds.append(min(len(tokens), int(total * len(tokens) + 1e-6)))
    # Fractions may miss 1 by a rounding error: the last part that is not empty ends at the end.
    last = max(index for index, fraction in enumerate(fractions) if fraction > 0)
    bounds[last + 1 :] = [len(tokens)] * (len(fractions) - last)
    return {
        name: tokens[bounds[index] : bounds[index + 1]]
        for index, name in enumerate(("train", "val", "test"))
    }


@SOURCES.register("python-docs")
def python_docs() -> str:
    """The language reference inside every CPython, about 465,000 characters of English.

    The text differs a little between releases of Python.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError(
            "this Python lacks its own documentation (pydoc_data)",
            fix="install the standard library's documentation, or name a text in data.source",
        ) from error
    return "\n\n".join(topics[name] for name in sorted(topics))


@SOURCES.register("tinyshakespeare")
def tinyshakespeare(cache_dir: Path | None = None) -> str:
    """1.1 M characters of Shakespeare's plays, downloaded once and checked by SHA-256.

    Args:
        cache_dir: where it is kept; `~/.cache/fundamentallm` if None.

    Raises:
        DataError: it cannot be downloaded, or is not what it should be.
    """
    url = os.environ.get("FUNDAMENTALLM_TINYSHAKESPEARE_URL", TINYSHAKESPEARE_URL)
    path = (cache_dir or default_cache_dir()) / "tinyshakespeare.txt"
    return download(url, TINYSHAKESPEARE_SHA256, path).decode("utf-8")


def default_cache_dir() -> Path:
    """Return where downloads are kept: `fundamentallm` in the user's cache directory."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fundamentallm"


def download(url: str, sha256: str, path: Path) -> bytes:
    """Return a file by its hash: from `path` if it is there and whole, else from the network.

    Raises:
        DataError: the network or the disk refuses, or the contents have another hash.
    """
    if path.is_file():
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() == sha256:
            return data
    if not url.startswith(("https://", "http://")):
        raise DataError("a download needs an http or https address", got=url)
    try:
        with urllib.request.urlopen(url, timeout=DOWNLOAD_SECONDS) as response:  # noqa: S310 (above)
            data = bytes(response.read(MAX_DOWNLOAD_BYTES))
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it is the response, with its connection
        raise DataError(
            "the download failed",
            where=url,
            got=str(error),
            fix=f"put a copy at {path}, or name a text of your own in data.source",
        ) from error
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


def _texts(name: str, cache_dir: Path | None) -> list[tuple[str, str]]:
    """Return name and text of everything that a source stands for."""
    if name in SOURCES:
        return [(name, SOURCES.build(name, {}, cache_dir=cache_dir))]
    return [(str(path), read_text(path)) for path in _files(name)]


def _files(name: str) -> list[Path]:
    """Return the files that a path stands for."""
    path = _existing(name)
    if not path.is_dir():
        return [path]

    def refuse(error: OSError) -> None:
        raise _unreadable(Path(error.filename or path), error) from error

    found = sorted(
        Path(parent, file)
        for parent, _, files in os.walk(path, onerror=refuse)
        for file in files
        if Path(file).suffix in TEXT_SUFFIXES
    )
    if not found:
        raise DataError(
            "there is no text in this folder",
            where=name,
            expected="files that end in " + " or ".join(TEXT_SUFFIXES),
        )
    return found


def _existing(name: str) -> Path:
    path = Path(name).expanduser()
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in the name
        hint = did_you_mean(name, SOURCES.names())
        raise DataError(
            "no such file or folder",
            where=name,
            expected="a path, or one of " + ", ".join(SOURCES.names()),
            fix=hint or f"the path is taken from {Path.cwd()}",
        ) from None
    except OSError as error:
        raise _unreadable(path, error) from error
    return path


def _check_regular(path: Path) -> None:
    """Refuse pipes and devices before they are opened: opening a pipe waits for its writer."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise _unreadable(path, error) from error
    if not stat.S_ISREG(mode):
        raise DataError("this is not a regular file", where=str(path), expected="a file")


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(
        f"this cannot be read: {error.strerror}", where=str(path), fix="check the path"
    )


def _read_tokens(path: Path) -> Corpus:
    """Memory-map token ids that numpy saved, with the `tokenizer.json` beside them."""
    where = str(path)
    _check_regular(path)
    tokenizer = load_tokenizer(path.with_name("tokenizer.json"))
    try:
        # Reads .npy alone: neither pickles nor archives of arrays, which numpy.load also opens.
        tokens = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError) as error:
        raise DataError("the token file cannot be read", where=where, got=str(error)) from error
    if tokens.ndim != 1 or tokens.dtype.kind not in "ui":
        raise DataError(
            "a token file holds one row of integers",
            where=where,
            got=f"shape {tokens.shape}, {tokens.dtype}",
        )
    digest = hashlib.sha256()
    chunk = 1 << 22
    for start in range(0, len(tokens), chunk):
        part = np.ascontiguousarray(tokens[start : start + chunk])
        digest.update(part.data)
        outside = (part < 0) | (part >= tokenizer.vocab_size)
        if outside.any():
            position = int(outside.argmax())
            raise DataError(
                "a token id lies outside the tokenizer's vocabulary",
                where=f"{where}: token {start + position:,}",
                got=str(int(part[position])),
                expected=f"0 to {tokenizer.vocab_size - 1}",
                fix="make the token file with the tokenizer.json beside it",
            )
    return Corpus("", [(where, 0, len(tokens))], digest.hexdigest(), False, tokens, tokenizer)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
