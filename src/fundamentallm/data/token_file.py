"""Token ids in a file, read where they are needed and never mapped.

Two formats. `prepare` writes `.tokens`: a header of `HEADER_BYTES` bytes, then the ids. The header
is the text MAGIC, a line of JSON, and spaces; it says the format's version, the type of an id, the
number of ids, the size of the vocabulary, the fingerprint of the tokenizer whose `tokenizer.json`
lies beside, the end of a document, and the SHA-256 of the ids. `.npy` is numpy's, with a
`tokenizer.json` beside it.

A memory map of a file that shrinks ends its process by a signal (SIGBUS) with nothing saved. Here
every read looks afterwards whether the file is still the one that was opened; if it is not, and its
contents are others, that is a DataError, which a run can save its state after.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fundamentallm.data.text_file import check_regular, unreadable
from fundamentallm.data.tokenizer import TOKENIZER_FILE, Tokenizer, load_tokenizer
from fundamentallm.errors import DataError

SUFFIX = ".tokens"
MAGIC = b"\x89FLLMTOKENS\r\n\x1a\n"  # as PNG's: a transfer as text damages it visibly
VERSION = 1
HEADER_BYTES = 1024
CHUNK = 1 << 22  # tokens checked at once
_DTYPES = ("|u1", "<u2", "<u4")
_PREPARE_ANEW = "write it again with `prepare`"


@dataclass(frozen=True)
class TokenHeader:
    """What a `.tokens` file says of itself.

    Attributes:
        dtype: of an id, as numpy writes it: "|u1", "<u2" or "<u4".
        count: number of ids.
        vocab_size: V; every id is below it.
        end_id: the id after each document; None without one.
        tokenizer: the fingerprint of the tokenizer.
        sha256: of the ids as they stand in the file.
    """

    dtype: str
    count: int
    vocab_size: int
    end_id: int | None
    tokenizer: str
    sha256: str

    def to_bytes(self) -> bytes:
        """Return the header as it stands in a file."""
        said = json.dumps({"version": VERSION, **asdict(self)}).encode()
        return (MAGIC + said + b"\n").ljust(HEADER_BYTES)

    @classmethod
    def parse(cls, data: bytes, where: str) -> TokenHeader:
        """Read the first `HEADER_BYTES` bytes of a file.

        Raises:
            DataError: they are not a header of this version, or contradict each other.
        """
        if len(data) < HEADER_BYTES or not data.startswith(MAGIC):
            raise DataError(
                "this is not a token file, or it was not finished",
                where=where,
                got=f"first bytes {data[:8].hex(' ')}" if data else "0 bytes",
                fix=_PREPARE_ANEW,
            )
        try:
            said = json.loads(data[len(MAGIC) :])
            version = said.pop("version")
            if version == VERSION:
                header = cls(**said)
                header._check()
                return header
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise DataError(
                "the header of the token file is damaged",
                where=where,
                got=f"{type(error).__name__}: {error}",
                fix=_PREPARE_ANEW,
            ) from error
        raise DataError(
            "the token file is of another version",
            where=where,
            got=f"version {version}",
            expected=f"version {VERSION}",
            fix=_PREPARE_ANEW,
        )

    def _check(self) -> None:
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype {self.dtype!r}, not one of {', '.join(_DTYPES)}")
        numbers = [self.count, self.vocab_size] + ([] if self.end_id is None else [self.end_id])
        if any(type(number) is not int or number < 0 for number in numbers):
            raise ValueError("the count is not an integer of at least 0")
        if type(self.tokenizer) is not str or type(self.sha256) is not str:
            raise ValueError("the hash is not text")
        if self.vocab_size > 1 + np.iinfo(self.dtype).max:
            raise ValueError(f"ids of a vocabulary of {self.vocab_size} do not fit {self.dtype}")
        if self.end_id is not None and self.end_id >= self.vocab_size:
            raise ValueError(f"end_id {self.end_id} in a vocabulary of {self.vocab_size}")


class FileTokens:
    """Ids in a file, (N,), or a part of them; read when indexed, sliced without reading.

    Args:
        path: of the file.
        offset: bytes before the first id.
        count: number of ids.
        dtype: of an id in the file.

    Raises:
        DataError: the file cannot be opened.
    """

    ndim = 1

    def __init__(self, path: Path, offset: int, count: int, dtype: np.dtype[Any]) -> None:
        self.dtype = dtype
        self._file = _WatchedFile(path, offset, count * dtype.itemsize)
        self._start, self._stop = 0, count

    def __len__(self) -> int:
        """Return N."""
        return self._stop - self._start

    @property
    def size(self) -> int:
        """N."""
        return len(self)

    @property
    def shape(self) -> tuple[int]:
        """(N,)."""
        return (len(self),)

    def __getitem__(self, index: slice) -> FileTokens:
        """Return the part that a slice of step 1 names; it shares the open file."""
        start, stop, step = index.indices(len(self))
        if step != 1:
            raise ValueError("slices of a token file must have step 1")
        part = object.__new__(FileTokens)
        part.dtype, part._file = self.dtype, self._file
        part._start = self._start + start
        part._stop = self._start + max(start, stop)
        return part

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Read all of it.

        Raises:
            DataError: the file is not what it was.
        """
        if copy is False:
            raise ValueError("ids in a file cannot be read without a copy")
        ids: np.ndarray = self.gather(np.zeros(1, np.int64), len(self))[0]
        if dtype is not None:
            ids = ids.astype(dtype)
        return ids

    def astype(self, dtype: Any) -> np.ndarray:
        """Read all of it as another type."""
        return self.__array__(dtype)

    def tolist(self) -> list[int]:
        """Read all of it."""
        ids: list[int] = self.__array__().tolist()
        return ids

    def __iter__(self) -> Iterator[int]:
        """Read all of it and yield each id."""
        return iter(self.tolist())

    def gather(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Return `length` ids from each of some places, (n, length).

        Raises:
            DataError: the file is not what it was.
        """
        rows = np.empty((len(starts), length), self.dtype)
        width = self.dtype.itemsize
        places = (np.asarray(starts, np.int64) + self._start) * width
        self._file.read_into([memoryview(row).cast("B") for row in rows], places.tolist())
        return rows

    def sha256(self, vocab_size: int) -> str:
        """Return the SHA-256 of the ids after a look at each of them.

        Raises:
            DataError: one lies outside the vocabulary; `where` has its position.
        """
        digest = hashlib.sha256()
        for start in range(0, len(self), CHUNK):
            part = self[start : start + CHUNK].__array__()
            digest.update(part.data)
            outside = (part < 0) | (part >= vocab_size)
            if outside.any():
                position = int(outside.argmax())
                raise DataError(
                    "a token id lies outside the tokenizer's vocabulary",
                    where=f"{self._file.path}: token {start + position:,}",
                    got=str(int(part[position])),
                    expected=f"0 to {vocab_size - 1}",
                    fix="make the token file with the tokenizer.json beside it",
                )
        self._file.expected_sha256 = digest.hexdigest()
        return digest.hexdigest()


@dataclass(frozen=True)
class FileWindows:
    """All sequences of a length in a file of ids, as numpy's sliding window view shows an array's.

    Attributes:
        tokens: (N,).
        length: T.
    """

    tokens: FileTokens
    length: int

    def __getitem__(self, starts: np.ndarray) -> np.ndarray:
        """Return the sequences from n places, (n, T)."""
        return self.tokens.gather(starts, self.length)


Tokens = np.ndarray | FileTokens
"""Ids (N,), in memory or in a file."""


@dataclass(frozen=True)
class ReadTokens:
    """A token file, opened and checked.

    Attributes:
        ids: (N,).
        tokenizer: the one beside the file.
        sha256: two files share it if they hold the same ids in the same type for the same
            tokenizer.
        end_id: the id after each document; None without one.
    """

    ids: FileTokens
    tokenizer: Tokenizer
    sha256: str
    end_id: int | None


def read_tokens(path: Path, tokenizer: Tokenizer | None = None) -> ReadTokens:
    """Open a token file, every id of it checked.

    Args:
        path: a `.tokens` file, or a `.npy` file with one row of integers of any width and byte
            order.
        tokenizer: the one beside it, where it is known already.

    Raises:
        DataError: either file is missing or damaged, they do not belong together, or an id lies
            outside the vocabulary.
    """
    check_regular(path)
    tokenizer = tokenizer or load_tokenizer(path.with_name(TOKENIZER_FILE))
    fingerprint = tokenizer.fingerprint()
    header = None
    if path.suffix.lower() == SUFFIX:
        header = read_header(path)
        ids = FileTokens(path, HEADER_BYTES, header.count, np.dtype(header.dtype))
        end_id = header.end_id
        if header.tokenizer != fingerprint:
            raise DataError(
                "the token file was made with another tokenizer than the one beside it",
                where=str(path),
                got=f"tokenizer {fingerprint[:16]} in {path.with_name(TOKENIZER_FILE)}",
                expected=f"tokenizer {header.tokenizer[:16]}",
                fix=_PREPARE_ANEW,
            )
        # What the header says, not the tokenizer: an id below its own limit may be above ours.
        found = ids.sha256(min(header.vocab_size, tokenizer.vocab_size))
        if found != header.sha256:
            raise DataError(
                "the token file is damaged",
                where=str(path),
                got=f"SHA-256 {found}",
                expected=f"SHA-256 {header.sha256}",
                fix=_PREPARE_ANEW,
            )
    else:
        ids = FileTokens(path, *_npy_layout(path))
        end_id = tokenizer.end_id
        found = ids.sha256(tokenizer.vocab_size)
    digest = hashlib.sha256(f"{fingerprint} {ids.dtype.str} {found}".encode())
    return ReadTokens(ids, tokenizer, digest.hexdigest(), end_id)


def read_header(path: Path) -> TokenHeader:
    """Read the header of a `.tokens` file; the file's size must be what it says.

    Raises:
        DataError: it cannot be read, is not a token file, or is truncated.
    """
    check_regular(path)
    try:
        with path.open("rb") as file:
            header = TokenHeader.parse(file.read(HEADER_BYTES), str(path))
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise unreadable(path, error) from error
    _check_size(path, size, HEADER_BYTES + header.count * np.dtype(header.dtype).itemsize)
    return header


def _check_size(path: Path, size: int, whole: int) -> None:
    if size != whole:
        raise DataError(
            "the token file continues after its last token, so it was not written by one process"
            if size > whole
            else "the token file ends before its last token",
            where=str(path),
            got=f"{size:,} bytes",
            expected=f"{whole:,} bytes",
            fix="save or copy it again",
        )


def _npy_layout(path: Path) -> tuple[int, int, np.dtype[Any]]:
    """Return offset, count and type of the ids in a `.npy` file."""
    fix = "save it again, for example with numpy.save"
    try:
        # Reads only .npy: neither pickles nor archives of arrays, which numpy.load also opens.
        with path.open("rb") as file:
            major, _ = np.lib.format.read_magic(file)
            read = (
                np.lib.format.read_array_header_1_0
                if major == 1
                else np.lib.format.read_array_header_2_0
            )
            shape, _, dtype = read(file)
            offset = file.tell()
            size = os.fstat(file.fileno()).st_size
    except Exception as error:  # numpy parses the header as Python: a damaged one raises anything
        raise DataError(
            "the token file cannot be read", where=str(path), got=str(error), fix=fix
        ) from error
    if len(shape) != 1 or dtype.kind not in "ui":
        raise DataError(
            "a token file holds one row of integers",
            where=str(path),
            got=f"shape {shape}, {dtype}",
            fix=fix,
        )
    if shape[0] < 1:
        raise DataError("the token file is empty", where=str(path), got="0 tokens", fix=fix)
    _check_size(path, size, offset + shape[0] * dtype.itemsize)
    return offset, shape[0], dtype


class _WatchedFile:
    """A part of a file that must not change.

    Args:
        path: of the file.
        offset: bytes before the part.
        size: bytes of the part.

    Attributes:
        expected_sha256: of the part, once it is known: a file that was only touched or put back is
            then no other file.
    """

    def __init__(self, path: Path, offset: int, size: int) -> None:
        self.path = path
        self.expected_sha256 = ""
        self._offset = offset
        self._size = size
        self._reopening = threading.Lock()
        self._file = _OpenFile(path)

    def read_into(self, parts: list[memoryview], places: list[int]) -> None:
        """Fill memory from places in the part; any number of threads may read at once.

        Raises:
            DataError: the file is not what it was.
        """
        if self._filled(parts, places):
            return
        with self._reopening:
            if not self._filled(parts, places):  # another thread may have opened it again
                self._file = self._accept_or_refuse(parts, places)

    def _filled(self, parts: list[memoryview], places: list[int]) -> bool:
        file = self._file  # another thread may put a new one in its place
        whole = all(
            file.fill(part, self._offset + place) for part, place in zip(parts, places, strict=True)
        )
        # After the reading: data read before a change is valid.
        return whole and self._unchanged(file)

    def _unchanged(self, file: _OpenFile) -> bool:
        try:
            return _stamp(self.path.stat()) == file.stamp
        except OSError:
            return False

    def _accept_or_refuse(self, parts: list[memoryview], places: list[int]) -> _OpenFile:
        """Open the path again, fill memory, and return the file if it holds the same.

        Memory gets the bytes that the hash has seen: they are right however often something touches
        the file meanwhile, so one pass is enough.
        """
        try:
            file = _OpenFile(self.path)
        except DataError as error:
            raise self._changed(error.what) from error
        digest = hashlib.sha256()
        at = 0
        while at < self._size and (
            data := file.read(min(1 << 20, self._size - at), self._offset + at)
        ):
            digest.update(data)
            for part, place in zip(parts, places, strict=True):
                first, last = max(place, at), min(place + part.nbytes, at + len(data))
                if first < last:
                    part[first - place : last - place] = data[first - at : last - at]
            at += len(data)
        if at < self._size or digest.hexdigest() != self.expected_sha256:
            raise self._changed(f"{file.stamp[2]:,} bytes, other contents")
        return file

    def _changed(self, got: str) -> DataError:
        return DataError(
            "the token file changed while it was in use",
            where=str(self.path),
            got=got,
            expected=f"the file that was opened, {self._file.stamp[2]:,} bytes",
            fix="restore the file; the same command then continues the run",
        )


class _OpenFile:
    """A file that is open as long as anyone refers to it.

    A descriptor that was closed under a reader could have become that of another file.

    Attributes:
        stamp: what tells whether it is still the one at its path.

    Raises:
        DataError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            self.stamp = _stamp(os.fstat(self._descriptor))
        except OSError as error:
            raise unreadable(path, error) from error
        self._seeking = threading.Lock()

    def __del__(self) -> None:
        """Close it."""
        if "_descriptor" in self.__dict__:
            os.close(self._descriptor)

    def read(self, size: int, place: int) -> bytes:
        """Return at most that many bytes from a place, without a position that readers share."""
        if sys.platform != "win32":
            return os.pread(self._descriptor, size, place)
        with self._seeking:
            os.lseek(self._descriptor, place, os.SEEK_SET)
            return os.read(self._descriptor, size)

    def fill(self, part: memoryview, place: int) -> bool:
        """Fill memory from a place; return whether the file has that much."""
        while part.nbytes and (data := self.read(part.nbytes, place)):
            part[: len(data)] = data
            part, place = part[len(data) :], place + len(data)
        return not part.nbytes


def _stamp(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
