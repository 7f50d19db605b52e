from __future__ import annotations

import gzip
import io
import json
import os
import sys
import time
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.properties import examples

from fundamentallm.data import documents as documents_module
from fundamentallm.data.documents import InputReader, find_inputs
from fundamentallm.errors import DataError, MachineError

TEXT = "To be, or not to be.\nThat is \N{GREEK SMALL LETTER ALPHA} question \U0001f600\n"
LINES = "".join(json.dumps({"text": text, "n": 1}) + "\n" for text in ("one", "two\n", "dr\u00e9i"))


def read(path: Path, field: str = "text") -> list[tuple[str, str]]:
    (source,) = find_inputs([str(path)])
    reader = InputReader(source, field)
    return [(document.where, "".join(document.chunks)) for document in reader.documents()]


def texts(path: Path, field: str = "text") -> list[str]:
    return [text for _, text in read(path, field)]


@pytest.fixture(params=[1, 3, 1 << 20])
def any_chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents_module, "CHUNK", request.param)
    monkeypatch.setattr(documents_module, "ZSTANDARD_CHUNK", request.param)


def packed(content: bytes, how: str) -> bytes:
    if how == ".gz":
        half = len(content) // 2
        return gzip.compress(content[:half]) + gzip.compress(content[half:])  # two members
    if how == ".zst":
        half = len(content) // 2
        compress = zstandard.ZstdCompressor().compress
        return compress(content[:half]) + compress(content[half:])
    return content


@pytest.mark.usefixtures("any_chunk")
@pytest.mark.parametrize("how", ["", ".gz", ".zst"])
def test_text_and_records_are_read_in_any_packing(tmp_path: Path, how: str) -> None:
    text = tmp_path / f"a.md{how}"
    text.write_bytes(packed(b"\xef\xbb\xbf" + TEXT.encode(), how))
    assert read(text) == [(str(text), TEXT)]
    lines = tmp_path / f"b.jsonl{how}"
    lines.write_bytes(packed(b"\xef\xbb\xbf" + LINES.replace("\n", "\r\n\n", 1).encode(), how))
    assert [where for where, _ in read(lines)] == [f"{lines}:{n}" for n in (1, 3, 4)]
    assert texts(lines) == ["one", "two\n", "dr\u00e9i"]


@pytest.mark.parametrize("how", [".gz", ".zst"])
def test_what_a_file_is_its_first_bytes_say(tmp_path: Path, how: str) -> None:
    path = tmp_path / "plain.txt"
    path.write_bytes(packed(TEXT.encode(), how))
    assert texts(path) == [TEXT]


def test_parquet_is_read_row_by_row(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "c.txt"  # whatever its name says
    table = pyarrow.table({"body": ["one", None, "dr\u00e9i"] * 50, "n": list(range(150))})
    parquet.write_table(table, path)
    assert texts(path, "body") == ["one", "", "dr\u00e9i"] * 50
    assert read(path, "body")[149][0] == f"{path}: row 150"
    with pytest.raises(DataError, match="no column 'text'") as caught:
        read(path)
    assert "body" in caught.value.got
    with pytest.raises(DataError, match="holds no text"):
        read(path, "n")
    data = bytearray(path.read_bytes())
    data[4:24] = bytes(20)  # the head of the first page
    (tmp_path / "flipped").write_bytes(data)
    with pytest.raises(DataError, match="Parquet file is damaged"):
        read(tmp_path / "flipped", "body")
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match="Parquet file is damaged"):
        read(path, "body")


def test_a_missing_package_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1....")
    with pytest.raises(MachineError, match=r"fundamentallm\[parquet\]"):
        read(tmp_path / "a.parquet")
    (tmp_path / "a.txt.zst").write_bytes(zstandard.ZstdCompressor().compress(b"text"))
    with pytest.raises(MachineError, match=r"fundamentallm\[zstandard\]"):
        read(tmp_path / "a.txt.zst")


@settings(max_examples=examples(50))
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")))
def test_any_text_is_read_as_it_is(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("any") / "a.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents_module, "CHUNK", 3)
        assert texts(path) == [text.removeprefix("\ufeff")]
    lines = path.with_name("b.jsonl")
    lines.write_text(json.dumps({"text": text}) + "\n")
    assert texts(lines) == [text]


@pytest.mark.usefixtures("any_chunk")
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"ab\xc3\xa9\xff.", ("byte 4", "0xff")),
        (b"\xef\xbb\xbfab\xff", ("byte 5", "0xff")),
        (b"ab\xc3", ("byte 2", "unexpected end")),
        (b"ab\xed\xa0\x80", ("byte 2", "invalid continuation")),
        ("\u00e9a\0".encode(), ("byte 3", "NUL")),
        ("text".encode("utf-16"), ("UTF-16", "first bytes")),
        (b"%PDF-1.7", ("PDF",)),
        (b"PK\x03\x04....", ("zip",)),
        (gzip.compress(b"PK\x03\x04....", mtime=0), ("zip", "unpacked")),
        (gzip.compress(TEXT.encode() * 100, mtime=0)[:-9], ("gzip", "truncated", "byte")),
        (gzip.compress(b"\xff" * 9, mtime=0), ("byte 0", "0xff")),
        (zstandard.ZstdCompressor().compress(os.urandom(9000).hex().encode())[:-5], ("truncated",)),
    ],
)
def test_what_is_no_text_is_told_with_its_place(
    tmp_path: Path, content: bytes, says: tuple[str, ...]
) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read(path)
    for words in (*says, "bad.txt"):
        assert words in str(caught.value)
    assert caught.value.fix


def test_a_header_of_30_megabytes_costs_no_minute(tmp_path: Path) -> None:
    whole = gzip.compress(TEXT.encode() * 100, mtime=0)
    # Bit 3 of the flags says that a file's name follows, up to a zero byte (RFC 1952, 2.3.1).
    named = whole[:3] + b"\x08" + whole[4:10] + b"n" * 30_000_000 + b"\0" + whole[10:]
    (tmp_path / "a.txt.gz").write_bytes(named + whole)
    started = time.process_time()
    assert texts(tmp_path / "a.txt.gz") == [TEXT * 200]
    assert time.process_time() - started < 10


def test_zeros_behind_an_archive_are_padding_and_anything_else_is_damage(tmp_path: Path) -> None:
    whole = gzip.compress(TEXT.encode(), mtime=0)
    (tmp_path / "a.txt.gz").write_bytes(whole + b"\0" * 1000 + whole + b"\0" * 3_000_000)
    assert texts(tmp_path / "a.txt.gz") == [TEXT * 2]
    (tmp_path / "a.txt.gz").write_bytes(whole + b"\0\0garbage")
    with pytest.raises(DataError, match="gzip file is damaged"):
        texts(tmp_path / "a.txt.gz")


def test_a_damaged_archive_is_told(tmp_path: Path) -> None:
    for name, content in (
        ("a.gz", gzip.compress(TEXT.encode() * 1000, mtime=0)),
        ("a.zst", zstandard.ZstdCompressor(write_checksum=True).compress(TEXT.encode() * 1000)),
    ):
        damaged = bytearray(content)
        damaged[len(content) // 2] ^= 0x55
        (tmp_path / name).write_bytes(bytes(damaged))
        with pytest.raises(DataError, match=rf"{name}"):
            read(tmp_path / name)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('"text"', "no text under 'text'"),
        ('{"body": "x"}', "the keys body"),
        ('{"text": 3}', "no text under 'text'"),
        ('{"text": "a\\ud800"}', "surrogate"),
        ("\udcff", "not JSON"),
    ],
)
def test_a_bad_record_is_told_with_its_line(tmp_path: Path, line: str, says: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes((LINES + "\n" + line + "\n").encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=says) as caught:
        read(path)
    assert f"{path}:5" in caught.value.where


def test_a_record_that_cannot_be_held_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents_module, "LONGEST_LINE", 1000)
    monkeypatch.setattr(documents_module, "CHUNK", 100)
    path = tmp_path / "long.jsonl"
    path.write_text(LINES + json.dumps({"text": "x" * 2000}))
    with pytest.raises(DataError, match="too long") as caught:
        read(path)
    assert caught.value.where == f"{path}:4"


def test_paths_stand_for_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("b/z.txt", "b/c/a.md.gz", "b/x.jsonl", "b/.hidden/a.txt", "b/image.png", "a.log"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("x")
    assert [source.name for source in find_inputs(["b"])] == ["b/c/a.md.gz", "b/x.jsonl", "b/z.txt"]
    found = find_inputs(["a.log", "b/**/*.txt", "./a.log", "b/z.txt"])
    assert [source.name for source in found] == ["a.log", "b/z.txt"]
    assert [source.kind for source in find_inputs(["b"])] == ["text", "lines", "text"]
    for word in ("nowhere.txt", "*.none", "b/.hidden/../image.txt"):
        with pytest.raises(DataError, match="no such file"):
            find_inputs([word])
    Path("empty").mkdir()
    with pytest.raises(DataError, match="this folder holds no files to read"):
        find_inputs(["empty"])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(DataError, match="regular file"):
        read(tmp_path / "pipe.txt")


def test_a_file_that_grows_while_it_is_read_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(LINES)
    (source,) = find_inputs([str(path)])
    reader = InputReader(source, "text")
    documents = reader.documents()
    next(documents)
    with path.open("a") as file:
        file.write("\n")
    with pytest.raises(DataError, match="changed while it was read"):
        list(documents)


def test_the_fingerprint_is_of_the_file(tmp_path: Path) -> None:
    import hashlib

    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(LINES.encode()))
    (source,) = find_inputs([str(path)])
    taken = []
    reader = InputReader(source, "text", taken.append)
    assert reader.fingerprint is None
    for document in reader.documents():
        list(document.chunks)
    assert reader.fingerprint is not None
    assert reader.fingerprint.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert reader.fingerprint.size == sum(taken) == path.stat().st_size


def test_standard_input_is_copied(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    with copy.open("wb") as file:
        documents_module.copy_standard_input(io.BytesIO(LINES.encode()), file.write)
    (source,) = find_inputs(["-"], copy, records=True)
    assert source.name == "standard input"
    reader = InputReader(source, "text")
    assert ["".join(d.chunks) for d in reader.documents()] == ["one", "two\n", "dr\u00e9i"]


@pytest.mark.usefixtures("any_chunk")
@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("name", ["a.json", "a.JSON", "a.json.gz"])
def test_an_array_of_records_is_a_document_each(
    tmp_path: Path, name: str, indent: int | None
) -> None:
    records = [{"text": text} for text in ("one", "two\n", "dr\u00e9i")]
    path = tmp_path / name
    path.write_bytes(packed(json.dumps(records, indent=indent).encode(), path.suffix))
    assert read(path) == [
        (f"{path}: record {n}", text) for n, text in enumerate(("one", "two\n", "dr\u00e9i"), 1)
    ]


def test_lines_in_a_json_file_are_records(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(LINES)
    assert texts(tmp_path / "a.json") == ["one", "two\n", "dr\u00e9i"]


@pytest.mark.parametrize(
    ("text", "what", "where"),
    [
        ('[{"text": "a"}, {"body": 1}]', "no text under 'text'", "record 2"),
        ('[{"text": "a"}', "file is not JSON", "a.json"),
        ('{"text": ["a"]}', "no text under 'text'", "a.json:1"),
    ],
)
def test_a_bad_array_is_told_with_its_place(
    tmp_path: Path, text: str, what: str, where: str
) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=what) as caught:
        read(tmp_path / "a.json")
    assert caught.value.where.endswith(where)


def test_an_array_that_cannot_be_held_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents_module, "LARGEST_ARRAY", 10)
    (tmp_path / "a.json").write_text('[{"text": "abcdef"}]')
    with pytest.raises(DataError, match="too large") as caught:
        read(tmp_path / "a.json")
    assert "jq" in caught.value.fix


@pytest.mark.parametrize("name", ["a.csv", "a.tokens", "a.NPY", "a.tsv.gz", "a.npz"])
def test_data_that_is_not_read_is_never_text(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("a,b\n")
    with pytest.raises(DataError, match="not text to learn"):
        find_inputs([str(tmp_path / name)])
