from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fundamentallm.errors import CheckpointError
from fundamentallm.files.filesystem import (
    Filesystem,
    make_directories,
    random_suffix,
    read_chunks,
    reading_from,
    replace_file,
    saving_to,
    write_file,
)


def test_a_file_is_written_and_hashed_as_it_is(tmp_path: Path) -> None:
    record = write_file(Filesystem(), tmp_path / "x", [b"ab", memoryview(b"cd"), b"", b"e" * 9999])

    data = (tmp_path / "x").read_bytes()
    assert data == b"abcd" + b"e" * 9999
    assert record.size == len(data)
    assert record.sha256 == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("large", [0, 1, 3])
def test_a_second_thread_hashes_from_the_first_large_chunk_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: int
) -> None:
    started = []
    start = threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", lambda it: (started.append(it.name), start(it)))
    chunks = [b"a" * 1000, *[bytes([b]) * 700_000 for b in range(large)], b"b" * 1000]

    record = write_file(Filesystem(), tmp_path / "x", chunks)

    assert record.sha256 == hashlib.sha256(b"".join(chunks)).hexdigest()
    assert (tmp_path / "x").read_bytes() == b"".join(chunks)
    assert started == ["sha256"] * (large > 0)


def test_an_existing_file_is_never_written_into(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("old")

    with pytest.raises(FileExistsError):
        write_file(Filesystem(), tmp_path / "x", [b"new"])
    assert (tmp_path / "x").read_text() == "old"


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    def failing() -> Iterator[bytes]:
        yield b"half"
        raise ZeroDivisionError

    replace_file(Filesystem(), tmp_path / "x", [b"old"])
    with pytest.raises(ZeroDivisionError):
        replace_file(Filesystem(), tmp_path / "x", failing())
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_text() == "old"

    replace_file(Filesystem(), tmp_path / "x", [b"new"])
    assert (tmp_path / "x").read_text() == "new"


def test_directories_are_made_and_each_synced_into_its_parent(tmp_path: Path) -> None:
    synced = []

    class Watching(Filesystem):
        def sync_directory(self, path: Path) -> None:
            synced.append(path)
            super().sync_directory(path)

    make_directories(Watching(), tmp_path / "a" / "b")

    assert (tmp_path / "a" / "b").is_dir()
    assert synced == [tmp_path, tmp_path / "a"]


def test_a_long_file_is_read_in_pieces(tmp_path: Path) -> None:
    data = os.urandom(3_000_000)
    (tmp_path / "x").write_bytes(data)

    pieces = list(read_chunks(Filesystem(), tmp_path / "x"))
    assert b"".join(pieces) == data
    assert max(map(len, pieces)) <= 1 << 20


def test_links_are_seen_as_links(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nothing")

    assert Filesystem().status(tmp_path / "link") is not None
    assert Filesystem().status(tmp_path / "nothing") is None
    assert Filesystem().names(tmp_path) == ("link",)
    assert Filesystem().free_bytes(tmp_path) > 0


def test_suffixes_differ() -> None:
    assert len({random_suffix() for _ in range(100)}) == 100


@pytest.mark.parametrize("around", [saving_to, reading_from])
def test_system_errors_become_ours_with_their_cause(around: type[saving_to]) -> None:
    with pytest.raises(CheckpointError, match="/a/b") as caught, around(Path("/a/b")):
        raise OSError(28, "No space left on device")
    assert isinstance(caught.value.__cause__, OSError)
    assert "No space left" in str(caught.value)
