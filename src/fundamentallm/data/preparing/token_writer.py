"""A token file, written as its ids become known."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from fundamentallm.data.token_file import HEADER_BYTES, TokenHeader
from fundamentallm.files.filesystem import Filesystem, write_all


class TokenWriter:
    """Writes a token file: an empty header, the ids, and at last the header.

    Args:
        filesystem: makes the changes.
        path: of the file, which does not exist.
        dtype: of an id.

    Attributes:
        count: ids written.
    """

    def __init__(self, filesystem: Filesystem, path: Path, dtype: np.dtype[Any]) -> None:
        self.path = path
        self.count = 0
        self._filesystem = filesystem
        self._dtype = dtype
        self._digest = hashlib.sha256()
        self.file = filesystem.create(path)

    def leave_room(self) -> None:
        """Write an empty header."""
        write_all(self._filesystem, self.file, memoryview(bytes(HEADER_BYTES)))

    def add(self, ids: np.ndarray) -> None:
        """Append ids."""
        data = memoryview(np.ascontiguousarray(ids, self._dtype).data).cast("B")
        self._digest.update(data)
        write_all(self._filesystem, self.file, data)
        self.count += len(ids)

    def hexdigest(self) -> str:
        """Return the SHA-256 of the ids."""
        return self._digest.hexdigest()

    def finish(self, header: TokenHeader) -> None:
        """Write the header and wait for the disk: only now is it a token file."""
        with self.path.open("r+b", buffering=0) as file:
            write_all(self._filesystem, file, memoryview(header.to_bytes()))
            self._filesystem.sync(file)
