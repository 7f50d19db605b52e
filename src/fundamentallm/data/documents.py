"""Documents of any length from files of any size, as streams: what `prepare` reads.

Text and Markdown are one document a file; JSON lines and Parquet one a record. Each may be
compressed with gzip or Zstandard, which is recognized by its first bytes, not its name. Nothing
is held but the chunk that is being read, or one line of JSON.
"""

from __future__ import annotations

import codecs
import glob
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from fundamentallm.data.file_kinds import SUFFIXES, Kind, kind_of, refuse_other_data
from fundamentallm.data.folder import files_in
from fundamentallm.data.text_file import (
    UTF8_BOM,
    check_regular,
    encoding_fix,
    raise_all,
    refuse_signature,
    to_utf8,
    unreadable,
)
from fundamentallm.errors import DataError, MachineError

FOLDER_KINDS: tuple[Kind, ...] = (
    "text",
    "lines",
    "parquet",
)  # the kinds that are read from a folder
CHUNK = 1 << 20  # bytes read at once
ZSTANDARD_CHUNK = 1 << 11  # bytes decompressed at once: a block of 4 bytes may stand for 128 KiB
LONGEST_LINE = 1 << 24  # bytes of JSON
LARGEST_ARRAY = 1 << 28  # bytes of JSON that are one array
STANDARD_INPUT = "-"
_UNPACK = "unpack or convert it to UTF-8 text first"
_GZIP, _ZSTANDARD, _PARQUET = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1"


@dataclass(frozen=True)
class Input:
    """A file to read documents from.

    Attributes:
        path: where it lies.
        name: what messages call it.
        kind: "text", "lines", "json" or "parquet".
    """

    path: Path
    name: str
    kind: Kind


@dataclass(frozen=True)
class Fingerprint:
    """What tells that a file is still the one that was read.

    Attributes:
        path: as `Input.name`.
        size: in bytes.
        mtime_ns: when it was changed last.
        sha256: of its bytes.
    """

    path: str
    size: int
    mtime_ns: int
    sha256: str

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name."""
        return asdict(self)


@dataclass(frozen=True)
class Document:
    """One document, to be read before the next is asked for.

    Attributes:
        where: file, and line or row.
        chunks: its text.
    """

    where: str
    chunks: Iterable[str]


def find_inputs(
    words: Sequence[str], standard_input: Path | None = None, records: bool = False
) -> list[Input]:
    """Return the files of paths, folders and patterns, each once, folders sorted.

    Args:
        words: paths; patterns with *, ?, [] and **; "-".
        standard_input: where "-" was copied to.
        records: whether that is JSON lines; else it is text.

    Raises:
        DataError: some match nothing, or are of a kind that is not read; all are named.
    """
    found: dict[Path, Input] = {}
    faults: list[DataError] = []
    for word in words:
        if word == STANDARD_INPUT:
            assert standard_input is not None
            found[standard_input] = Input(
                standard_input, "standard input", "lines" if records else "text"
            )
            continue
        try:
            for path in _paths(word):
                refuse_other_data(path, ("other data", "tokens"))
                found.setdefault(path.resolve(), Input(path, str(path), kind_of(path) or "text"))
        except DataError as error:
            faults.append(error)
    raise_all(faults, f"of {len(words):,} inputs cannot be read")
    return list(found.values())


class InputReader:
    """The documents of a file.

    Args:
        source: the file.
        field: the key or column of the text, in JSON lines and Parquet.
        on_bytes: called with the bytes of the file that each read took.

    Attributes:
        fingerprint: of the file, once every document was read.
    """

    def __init__(
        self, source: Input, field: str, on_bytes: Callable[[int], object] = lambda count: None
    ) -> None:
        self.source = source
        self.field = field
        self.on_bytes = on_bytes
        self.fingerprint: Fingerprint | None = None

    def documents(self) -> Iterator[Document]:
        """Yield each document.

        Raises:
            DataError: the file cannot be read, is not what its name says, changed while it was
                read, or a record has no text; `where` has the byte, line or row.
            MachineError: it needs a package that is missing.
        """
        path, name = self.source.path, self.source.name
        check_regular(path)
        try:
            with path.open("rb", buffering=0) as raw:
                before = os.fstat(raw.fileno())
                file = _Counted(raw, self.on_bytes)
                yield from self._documents(file)
                while file.read(CHUNK):  # what the format did not need
                    pass
                after = path.stat()
        except OSError as error:
            raise unreadable(path, error) from error
        if (before.st_size, before.st_mtime_ns, before.st_ino) != (
            after.st_size,
            after.st_mtime_ns,
            after.st_ino,
        ) or file.position != after.st_size:
            raise changed_while_read(name)
        self.fingerprint = Fingerprint(name, after.st_size, after.st_mtime_ns, file.hexdigest())

    def _documents(self, file: _Counted) -> Iterator[Document]:
        kind, name = self.source.kind, self.source.name
        if file.peek(4) == _PARQUET:
            yield from self._rows()
            return
        if kind == "parquet":
            raise DataError(
                "this is not a Parquet file",
                where=name,
                got=f"first bytes {file.peek(4).hex(' ')}",
                fix="convert it, or give it the right suffix",
            )
        read = _decompressed(file, name)
        if kind == "lines":
            yield from self._records(_lines(read, name))
        elif kind == "json":
            yield from self._array(read)
        else:
            yield Document(name, _decoded(read, name))

    def _records(self, lines: Iterable[bytes]) -> Iterator[Document]:
        for number, line in enumerate(lines, start=1):
            if line and not line.isspace():
                where = f"{self.source.name}:{number}"
                yield Document(where, [self._text_of(self._json(line, where, "line"), where)])

    def _array(self, read: Read) -> Iterator[Document]:
        """Yield each record of an array; a file without an array is read as JSON lines."""
        name = self.source.name
        data = b""
        while part := read(CHUNK):
            data += part
            if len(data) > LARGEST_ARRAY:
                raise DataError(
                    "this JSON file is too large to be read at once",
                    where=name,
                    got=f"more than {LARGEST_ARRAY:,} bytes",
                    fix="write one record a line, as with: jq -c '.[]' in.json > out.jsonl",
                )
        data = data.removeprefix(UTF8_BOM)
        if not data.lstrip().startswith(b"["):
            yield from self._records(data.split(b"\n"))
            return
        for number, record in enumerate(self._json(data, name, "file"), start=1):
            where = f"{name}: record {number:,}"
            yield Document(where, [self._text_of(record, where)])

    def _json(self, data: bytes, where: str, what: str) -> Any:
        try:
            return json.loads(data.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"this {what} is not JSON",
                where=where,
                got=str(error),
                expected=f'{{"{self.field}": "...", ...}}',
                fix=f"correct or remove the {what}",
            ) from error

    def _text_of(self, record: Any, where: str) -> str:
        text = record.get(self.field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            keys = list(record) if isinstance(record, dict) else []
            raise DataError(
                f"this line has no text under '{self.field}'",
                where=where,
                got="the keys " + ", ".join(keys[:10]) if keys else type(record).__name__,
                expected=f'{{"{self.field}": "...", ...}}',
                fix="give the key of the text with --field",
            )
        try:
            to_utf8(text)  # JSON can spell half of a surrogate pair
        except DataError as error:
            error.where = f"{where}: {error.where}"
            raise
        return text

    def _rows(self) -> Iterator[Document]:
        name = self.source.name
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError as error:
            raise MachineError(
                "Parquet files need the package `pyarrow`",
                where=name,
                got=str(error),
                fix="pip install 'fundamentallm[parquet]'",
            ) from error
        try:
            # Neither a map nor whole columns: the memory is that of a few pages.
            with parquet.ParquetFile(
                self.source.path, memory_map=False, pre_buffer=False, buffer_size=CHUNK
            ) as table:
                names = table.schema_arrow.names
                if self.field not in names:
                    raise DataError(
                        f"the file has no column '{self.field}'",
                        where=name,
                        got="the columns " + ", ".join(names[:10]),
                        fix="give the column of the text with --field",
                    )
                number = 0
                for batch in table.iter_batches(64, columns=[self.field], use_threads=False):
                    for text in batch.column(0).to_pylist():
                        number += 1
                        if text is not None and not isinstance(text, str):
                            raise DataError(
                                f"the column '{self.field}' holds no text",
                                where=f"{name}: row {number:,}",
                                got=type(text).__name__,
                                fix="give the column of the text with --field",
                            )
                        yield Document(f"{name}: row {number:,}", [text or ""])
        except (pyarrow.ArrowException, OSError) as error:
            if getattr(error, "errno", None):  # from the system, not from the file's contents
                raise
            raise DataError(
                "the Parquet file is damaged",
                where=name,
                got=str(error),
                fix="download or write it again",
            ) from error


def changed_while_read(name: str) -> DataError:
    """Return the error for a file that somebody writes to."""
    return DataError(
        "the file changed while it was read", where=name, fix="wait until it is written, and repeat"
    )


class Read(Protocol):
    """Returns at most as many bytes as asked for, none at the end."""

    def __call__(self, size: int, /) -> bytes:
        """Read."""


class _Counted:
    """A file whose bytes are counted and hashed as they are read."""

    def __init__(self, raw: Any, on_bytes: Callable[[int], object]) -> None:
        self._raw = raw
        self._on_bytes = on_bytes
        self._digest = hashlib.sha256()
        self._ahead = b""
        self.position = 0

    def peek(self, size: int) -> bytes:
        """Return the next bytes without taking them."""
        while len(self._ahead) < size and (data := self._raw.read(size - len(self._ahead))):
            self._ahead += data
        return self._ahead[:size]

    def read(self, size: int = CHUNK) -> bytes:
        """Take at most that many bytes."""
        data: bytes = self._ahead[:size] or self._raw.read(size)
        self._ahead = self._ahead[size:]
        self._digest.update(data)
        self.position += len(data)
        self._on_bytes(len(data))
        return data

    def hexdigest(self) -> str:
        """Return the SHA-256 of what was read."""
        return self._digest.hexdigest()


def _decompressed(file: _Counted, name: str) -> Read:
    """Return what reads the contents; anything that is not text is refused."""
    first = file.peek(16)
    if first.startswith(_GZIP):
        return _Guarded(_gunzip(file), file, name, "gzip").read
    if first.startswith(_ZSTANDARD):
        return _Guarded(_unzstandard(file, name), file, name, "Zstandard").read
    refuse_signature(first, name, _UNPACK)
    return file.read


class _Guarded:
    """A decompressor whose errors name their place."""

    def __init__(self, parts: Iterator[bytes], file: _Counted, name: str, kind: str) -> None:
        self._parts = parts
        self._file = file
        self._name = name
        self._kind = kind
        self._ahead = b""
        self._begun = False

    def read(self, size: int, /) -> bytes:
        """Return some contents."""
        if not self._ahead:
            self._ahead = self._next()
            if not self._begun:
                while len(self._ahead) < 16 and (more := self._next()):
                    self._ahead += more
                refuse_signature(self._ahead, f"{self._name}, unpacked", _UNPACK)
                self._begun = True
        data, self._ahead = self._ahead[:size], self._ahead[size:]
        return data

    def _next(self) -> bytes:
        try:
            return next(self._parts, b"")
        except (EOFError, zlib.error, _ZstandardError) as error:
            raise DataError(
                f"the {self._kind} file is damaged or truncated",
                where=f"{self._name}: byte {self._file.position:,}",
                got=str(error),
                fix="download or compress it again",
            ) from error


class _ZstandardError(Exception):
    pass


def _gunzip(file: _Counted) -> Iterator[bytes]:
    """Unpack members in a row, each sum checked, no more at once than `CHUNK`.

    The headers are read in C: Python's own `gzip` reads a name in them byte by byte, and one of 30
    MB, which any file may have, takes a minute.
    """
    rest = b""
    begun = False
    while rest or (rest := file.read(CHUNK)):
        if begun and not rest.strip(b"\0"):  # padding behind the last member, as of a tape
            rest = b""
            continue
        member = zlib.decompressobj(zlib.MAX_WBITS | 16)
        while not member.eof:
            if not rest and not (rest := file.read(CHUNK)):
                raise EOFError("the file ends within a member")
            data = member.decompress(rest, CHUNK)
            rest = member.unused_data if member.eof else member.unconsumed_tail
            if data:
                yield data
        begun = True
        rest = rest.lstrip(b"\0")


def _unzstandard(file: _Counted, name: str) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError as error:
        raise MachineError(
            "Zstandard files need the package `zstandard`",
            where=name,
            got=str(error),
            fix="pip install 'fundamentallm[zstandard]', or unpack the file",
        ) from error
    rest = b""
    while rest or (rest := file.read(ZSTANDARD_CHUNK)):
        frame = zstandard.ZstdDecompressor().decompressobj()
        while not frame.eof:
            if not rest and not (rest := file.read(ZSTANDARD_CHUNK)):
                raise _ZstandardError("the file ends within a frame")
            try:
                data = frame.decompress(rest)
            except zstandard.ZstdError as error:
                raise _ZstandardError(str(error)) from error
            rest = frame.unused_data if frame.eof else b""
            if data:
                yield data


def _decoded(read: Read, name: str) -> Iterator[str]:
    """Yield the text of UTF-8 bytes in chunks, a byte-order mark removed."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    position = 0
    while True:
        data = read(CHUNK)
        begin = position - len(decoder.getstate()[0])  # bytes of a character that was cut in two
        try:
            text = decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise DataError(
                "the file is not UTF-8 text",
                where=f"{name}: byte {begin + error.start:,}",
                got=f"byte 0x{error.object[error.start]:02x}: {error.reason}",
                expected="UTF-8",
                fix=encoding_fix(error.object),
            ) from error
        if "\0" in text:
            before = len(text[: text.index("\0")].encode())
            raise DataError(
                "the file holds a NUL character: it is binary, or UTF-16 or UTF-32 text",
                where=f"{name}: byte {begin + before:,}",
                expected="UTF-8 text",
                fix=encoding_fix(data),
            )
        if begin == 0:
            text = text.removeprefix("\ufeff")
        if text:
            yield text
        if not data:
            return
        position += len(data)


def _lines(read: Read, name: str) -> Iterator[bytes]:
    """Yield each line without its end; the last only if there is something in it."""
    parts: list[bytes] = []
    size = number = 0
    while data := read(CHUNK):
        lines = data.split(b"\n")
        for line in lines[:-1]:
            parts.append(line)
            yield _without_mark(b"".join(parts), number)
            number += 1
            parts, size = [], 0
        parts.append(lines[-1])
        size += len(lines[-1])
        if size > LONGEST_LINE:
            raise DataError(
                "this line of JSON is too long to be read at once",
                where=f"{name}:{number + 1}",
                got=f"more than {LONGEST_LINE:,} bytes",
                fix="split the record, or put long texts into text files",
            )
    if size:
        yield _without_mark(b"".join(parts), number)


def _without_mark(line: bytes, number: int) -> bytes:
    return line if number else line.removeprefix(UTF8_BOM)


def _paths(word: str) -> list[Path]:
    path = Path(word)
    try:
        path = path.expanduser()
        exists = path.exists()
    except (RuntimeError, OSError, ValueError) as error:
        if isinstance(error, RuntimeError):  # "~notes.txt" looks like the home of a user
            exists = path.exists()
        else:
            raise unreadable(path, error) from error
    if exists and not path.is_dir():
        return [path]
    if exists:
        files = files_in(path, FOLDER_KINDS)
        known = files.read
        if known:
            files.log(word)
        endings = [ending for kind in FOLDER_KINDS for ending in SUFFIXES[kind]]
        expected = "files that end in " + ", ".join(endings)
        what = "this folder holds no files to read"
    else:
        known = sorted(Path(name) for name in glob.glob(str(path), recursive=True))  # noqa: PTH207 (absolute patterns)
        known = [file for file in known if not file.is_dir()]
        what, expected = "no such file or folder", "a path, a pattern or -"
    if not known:
        raise DataError(
            what, where=word, expected=expected, fix=f"paths are relative to {Path.cwd()}"
        )
    return known


def copy_standard_input(stream: BinaryIO, write: Callable[[memoryview], object]) -> None:
    """Copy a stream that can be read once to where it can be read twice."""
    while data := stream.read(CHUNK):
        write(memoryview(data))
