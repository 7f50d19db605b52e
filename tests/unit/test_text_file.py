"""A text that is not UTF-8: the advice is a command that works."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from fundamentallm.data.text_file import read_text, read_texts
from fundamentallm.errors import DataError

TEXT = "She said \u201cna\u00efve\u201d \u2014 and left.\n" * 3


@pytest.mark.skipif(shutil.which("iconv") is None, reason="needs iconv")
@pytest.mark.parametrize("encoding", ["cp1252", "utf-16", "utf-16-le", "utf-16-be"])
def test_the_advice_turns_the_file_into_the_text(tmp_path: Path, encoding: str) -> None:
    old, new = tmp_path / "old.txt", tmp_path / "new.txt"
    old.write_bytes(TEXT.encode(encoding))
    with pytest.raises(DataError) as raised:
        read_text(old)
    words = raised.value.fix.partition("iconv ")[2].split()[:4]
    new.write_bytes(
        subprocess.run(["iconv", *words, str(old)], check=True, capture_output=True).stdout
    )
    assert read_text(new) == TEXT


def test_binary_data_is_not_called_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(bytes(range(128)) * 4)
    with pytest.raises(DataError) as raised:
        read_text(tmp_path / "a.txt")
    assert "iconv" not in raised.value.fix


def test_all_bad_files_are_told_at_once(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number:02}.txt" for number in range(30)]
    for number, path in enumerate(paths):
        path.write_bytes(b"\xff\xfea\0" if number % 10 == 3 else b"\xe9" if number > 4 else b"good")
    with pytest.raises(DataError) as raised:
        list(read_texts(paths))
    message = str(raised.value)
    assert raised.value.what == "26 of 30 files are not text"
    assert [path.name for path in paths if path.name in message] == [
        f"{number:02}.txt" for number in [3, *range(5, 24)]
    ]
    assert "and 6 more" in message
    assert message.count("iconv -f UTF-16 ") == message.count("iconv -f WINDOWS-1252") == 1


def test_one_bad_file_is_told_as_if_it_were_alone(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xe9")
    (tmp_path / "b.txt").write_bytes(b"good")
    with pytest.raises(DataError) as one:
        read_text(tmp_path / "a.txt")
    with pytest.raises(DataError) as among_others:
        list(read_texts([tmp_path / "a.txt", tmp_path / "b.txt"]))
    assert str(among_others.value) == str(one.value)
