"""A text file's bytes -> text, or one sentence on why it is none."""

from __future__ import annotations

import stat
from pathlib import Path

from fundamentallm.errors import DataError

# First bytes that give away what a file is, whatever its name says.
SIGNATURES = {
    b"\x1f\x8b": "gzip",
    b"BZh91AY&SY": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "Zstandard",
    b"PK\x03\x04": "zip",
    b"PAR1": "Parquet",
    b"%PDF-": "PDF",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
UTF8_BOM = b"\xef\xbb\xbf"


def read_text(path: Path) -> str:
    """Return a file's text, line ends as they are, a byte-order mark removed.

    Raises:
        DataError: it cannot be read, or is not UTF-8 text.
    """
    where = str(path)
    check_regular(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error
    for signature, kind in SIGNATURES.items():
        if data.startswith(signature):
            raise DataError(
                f"this is a {kind} file, not UTF-8 text",
                where=where,
                got=f"first bytes {data[:4].hex(' ')}",
                fix="`prepare` reads gzip, Zstandard and Parquet; unpack or convert anything else",
            )
    try:
        text = data.removeprefix(UTF8_BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        offset = error.start + (len(UTF8_BOM) if data.startswith(UTF8_BOM) else 0)
        raise DataError(
            "the file is not UTF-8 text",
            where=f"{where}: byte {offset:,}",
            got=f"byte 0x{data[offset]:02x}: {error.reason}",
            expected="UTF-8",
            fix="convert it, as with: iconv -f LATIN1 -t UTF-8",
        ) from error
    if "\0" in text:
        raise DataError(
            "the file holds a NUL character: it is binary, or UTF-16 or UTF-32 text",
            where=f"{where}: byte {data.index(0):,}",
            expected="UTF-8 text",
            fix="convert it to UTF-8 text first",
        )
    return text


def to_utf8(text: str) -> bytes:
    """Return a text in UTF-8.

    Raises:
        DataError: it holds a lone surrogate, which UTF-8 cannot express; no text file holds one.
    """
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            "the text holds half of a surrogate pair, which UTF-8 cannot express",
            where=f"character {error.start:,} of the text",
            got=f"U+{ord(text[error.start]):04X}",
            fix="remove it",
        ) from error


def check_regular(path: Path) -> None:
    """Refuse pipes, devices and folders before they are opened: a pipe waits for its writer.

    Raises:
        DataError: it is none of the disk's files, or cannot be reached.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error
    if not stat.S_ISREG(mode):
        raise DataError(
            "this is not a regular file",
            where=str(path),
            got="a folder" if stat.S_ISDIR(mode) else "a pipe, socket or device",
            expected="a file",
            fix="copy its contents to a file" if not stat.S_ISDIR(mode) else "name a file in it",
        )


def unreadable(path: Path, error: OSError | ValueError) -> DataError:
    """Return the error for a path that the system refuses (ValueError: a NUL in its name)."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return DataError(
        f"this cannot be read: {reason}", where=str(path), fix="check the path and who may read it"
    )
