"""A text file's bytes -> text, or one sentence that says why it is not text."""

from __future__ import annotations

import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from fundamentallm.errors import DataError

# First bytes that identify a file's kind.
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
MOST_NAMED = 20  # files in one message
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
    unpack = "`prepare` reads gzip, Zstandard and Parquet; unpack or convert anything else"
    refuse_signature(data, where, unpack)
    try:
        text = data.removeprefix(UTF8_BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        offset = error.start + (len(UTF8_BOM) if data.startswith(UTF8_BOM) else 0)
        raise DataError(
            "the file is not UTF-8 text",
            where=f"{where}: byte {offset:,}",
            got=f"byte 0x{data[offset]:02x}: {error.reason}",
            expected="UTF-8",
            fix=encoding_fix(data),
        ) from error
    if "\0" in text:
        raise DataError(
            "the file holds a NUL character: it is binary, or UTF-16 or UTF-32 text",
            where=f"{where}: byte {data.index(0):,}",
            expected="UTF-8 text",
            fix=encoding_fix(data),
        )
    return text


def refuse_signature(data: bytes, where: str, unpack: str) -> None:
    """Refuse a file whose first bytes show that it is not UTF-8 text.

    Args:
        data: the contents, or the first 16 bytes of them.
        where: the place for the message.
        unpack: how to mend it, unless the file is in another encoding.

    Raises:
        DataError: it is of another kind.
    """
    for signature, kind in SIGNATURES.items():
        if data.startswith(signature):
            raise DataError(
                f"this is a {kind} file, not UTF-8 text",
                where=where,
                got=f"first bytes {data[:4].hex(' ')}",
                fix=encoding_fix(data) if kind == "UTF-16" else unpack,
            )


def read_texts(paths: Sequence[Path]) -> Iterator[tuple[str, str]]:
    """Yield name and text of files; all errors are raised together, at the end.

    Raises:
        DataError: as `read_text`; of several files, the message has a line for each.
    """
    faults: list[DataError] = []
    for path in paths:
        try:
            yield str(path), read_text(path)
        except DataError as error:
            faults.append(error)
    raise_all(faults, f"of {len(paths):,} files are not text")


def raise_all(faults: Sequence[DataError], are: str) -> None:
    """Raise faults of several files as one error with a line for each; a single one as it is.

    Args:
        faults: of the files; nothing is raised where there are none.
        are: what follows their number in the message.
    """
    if len(faults) == 1:
        raise faults[0]
    if faults:
        more = len(faults) - MOST_NAMED
        lines = [str(fault).splitlines()[0] for fault in faults[:MOST_NAMED]]
        raise DataError(
            f"{len(faults):,} {are}",
            got="\n            ".join(lines + [f"and {more:,} more"] * (more > 0)),
            fix="\n            ".join(dict.fromkeys(fault.fix for fault in faults)),
        )


def encoding_fix(data: bytes) -> str:
    """Return how to convert a text that is not UTF-8, judged by its bytes or some of them.

    Western European text is called Windows-1252, which is Latin-1 but for the 32 bytes from 0x80:
    there Latin-1 has control characters, which no text holds.
    """
    head = data[:4096]
    zeros = [head[start::2].count(0) for start in (0, 1)]
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        encoding = "UTF-16"
    elif max(zeros) > max(4 * min(zeros), len(head) // 20):  # every other byte, or nearly
        encoding = "UTF-16LE" if zeros[1] > zeros[0] else "UTF-16BE"
    elif 0 in data:
        return "this looks like binary data; choose a text file, or convert it to UTF-8 first"
    else:
        encoding = "WINDOWS-1252"
    command = f"iconv -f {encoding} -t UTF-8 OLD > NEW"
    return f"convert it: {command}" + (
        " (if it is Western European text)" if encoding == "WINDOWS-1252" else ""
    )


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
        DataError: it is not a regular file, or cannot be read.
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
        f"the file cannot be read: {reason}",
        where=str(path),
        fix="check the path and its permissions",
    )
