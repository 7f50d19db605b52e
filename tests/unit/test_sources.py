from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import os
import sys
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.properties import examples

from fundamentallm.data.loaders import Batching, TokenWindowLoader, ValidationLoader
from fundamentallm.data.sources import SOURCES, TextSource, read_source, split_tokens
from fundamentallm.data.tokenizer import CharacterTokenizer
from fundamentallm.errors import ConfigError, DataError

TEXT = "To be, or not to be.\nThat is the question: \N{GREEK SMALL LETTER ALPHA}\n"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# files and folders


def read_text_source(source: str | list[str]) -> TextSource:
    read = read_source(source)
    assert isinstance(read, TextSource)
    return read


def test_a_file_is_read_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes("one\r\ntwo\rthree\n\u00e9".encode())
    source = read_text_source(str(path))
    assert source.text == "one\r\ntwo\rthree\n\u00e9"
    assert source.sha256 == sha256(path.read_bytes())
    assert [tuple(piece) for piece in source.pieces] == [(str(path), 0, len(source.text))]
    assert not source.built_in
    assert source.tokenizer is None


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
    assert read_source(str(path)).text == TEXT
    assert read_source(str(path)).sha256 == sha256(TEXT.encode())


def test_a_character_that_is_not_known_is_named_with_its_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abab\n")
    (tmp_path / "b.txt").write_text("abxa\n")
    source = read_text_source([str(tmp_path / "a.txt"), str(tmp_path / "b.txt")])
    with pytest.raises(DataError, match="not in the vocabulary") as caught:
        source.parts(CharacterTokenizer("ab\n"), (1.0, 0.0, 0.0))
    assert caught.value.where == f"{tmp_path / 'b.txt'}: character 2 of the text"


def test_files_are_joined_in_the_order_given(tmp_path: Path) -> None:
    for name, text in (("a.txt", "first\n"), ("b.txt", "second\n"), ("c.txt", "third\n")):
        (tmp_path / name).write_text(text)
    sources = [str(tmp_path / name) for name in ("c.txt", "a.txt", "b.txt")]
    source = read_text_source(sources)
    assert source.text == "third\nfirst\nsecond\n"
    assert [origin for origin, _, _ in source.pieces] == sources
    for origin, start, length in source.pieces:
        assert source.text[start : start + length] == Path(origin).read_text()


def test_a_folder_is_its_text_files_sorted_by_path(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for name in ("z.txt", "a.md", "deep/b.TXT", "deep/er/c.txt"):
        (tmp_path / name).write_text(name + "\n")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0")
    source = read_text_source(str(tmp_path))
    assert source.text == "a.md\ndeep/b.TXT\ndeep/er/c.txt\nz.txt\n"


def test_the_home_directory_may_be_written_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    assert read_source("~/text.txt").text == TEXT


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.txt"):
        read_source(str(tmp_path / "nowhere.txt"))


def test_a_mistyped_built_in_name_gets_a_hint() -> None:
    with pytest.raises(DataError, match="did you mean 'python-docs'"):
        read_source("python-doc")


@pytest.mark.parametrize("content", ["", " \n\t\r\n"])
def test_a_file_without_text_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "empty.txt"
    path.write_text(content)
    with pytest.raises(DataError, match=r"empty\.txt.*text"):
        read_source(str(path))


def test_a_folder_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("1,2\n")
    with pytest.raises(DataError, match=r"\.txt or \.md"):
        read_source(str(tmp_path))


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_text_that_is_not_utf8_says_at_which_byte(tmp_path: Path, mark: bytes) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes(mark + b"caf\xe9 au lait")
    with pytest.raises(DataError) as caught:
        read_source(str(path))
    assert f"byte {len(mark) + 3}" in caught.value.where
    assert "0xe9" in caught.value.got


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
def test_wide_encodings_are_refused(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "wide.txt"
    path.write_bytes("plain words".encode(encoding))
    with pytest.raises(DataError, match="UTF"):
        read_source(str(path))


def test_a_nul_is_refused_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "binary.txt"
    path.write_bytes("caf\u00e9".encode() + b"\0rest")
    with pytest.raises(DataError, match="byte 5"):
        read_source(str(path))


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (gzip.compress(TEXT.encode(), mtime=0), "gzip"),
        (b"PK\x03\x04rest of an archive", "zip"),
        (bz2.compress(TEXT.encode()), "bzip2"),
        (lzma.compress(TEXT.encode()), "xz"),
        (b"PAR1rest of a table", "parquet"),
    ],
)
def test_packed_data_named_txt_is_told(tmp_path: Path, data: bytes, kind: str) -> None:
    path = tmp_path / "packed.txt"
    path.write_bytes(data)
    with pytest.raises(DataError, match=f"(?i){kind}"):
        read_source(str(path))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    path = tmp_path / "pipe.txt"
    os.mkfifo(path)
    with pytest.raises(DataError, match="regular file"):
        read_source(str(path))


def test_a_device_is_refused() -> None:
    if not Path("/dev/zero").exists():
        pytest.skip("needs device files")
    with pytest.raises(DataError, match="regular file"):
        read_source("/dev/zero")


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may read everything"
)
def test_a_file_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "secret.txt"
    path.write_text(TEXT, encoding="utf-8")
    path.chmod(0)
    with pytest.raises(DataError, match=r"secret\.txt"):
        read_source(str(path))


def test_a_failure_while_reading_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")

    def fail(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(DataError) as caught:
        read_source(str(path))
    assert str(path) in caught.value.where
    assert "Permission denied" in str(caught.value)


# built-in sources, in a list too


def test_the_python_documentation_is_every_topic_in_order() -> None:
    source = read_text_source("python-docs")
    assert source.built_in
    assert source.sha256 == sha256(source.text.encode())
    assert len(source.text) > 300_000
    place = -1
    for name in sorted(topics):
        place = source.text.find(topics[name].strip(), place + 1)
        assert place >= 0, name


def test_a_kept_copy_of_a_built_in_text_has_the_same_hash(tmp_path: Path) -> None:
    source = read_text_source("python-docs")
    copy = tmp_path / "corpus.txt"
    copy.write_text(source.text, encoding="utf-8", newline="")
    again = read_source(str(copy))
    assert again.sha256 == source.sha256
    assert again.text == source.text


def test_a_source_of_yours_is_one_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SOURCES, "_factories", dict(SOURCES._factories))
    SOURCES.register("mine")(lambda: TEXT)
    source = read_text_source("mine")
    assert source.text == TEXT
    assert source.built_in


def test_a_built_in_text_may_stand_in_a_list(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text\n")
    source = read_text_source([str(tmp_path / "a.txt"), "python-docs"])
    assert source.text == "text\n" + read_source("python-docs").text
    assert [tuple(piece)[:2] for piece in source.pieces][1] == ("python-docs", 5)
    assert source.built_in  # so that the run keeps a copy


def test_a_configuration_cannot_choose_the_cache() -> None:
    with pytest.raises(ConfigError):
        SOURCES.check("tinyshakespeare", {"cache_dir": "/tmp/elsewhere"})


# splits


@given(
    num_tokens=st.integers(min_value=0, max_value=3000),
    parts=st.tuples(
        st.integers(min_value=1, max_value=100),
        st.integers(min_value=0, max_value=100),
        st.integers(min_value=0, max_value=100),
    ),
)
def test_splits_are_views_that_cover_the_tokens_in_order(
    num_tokens: int, parts: tuple[int, int, int]
) -> None:
    tokens = np.arange(num_tokens)
    fractions = [part / sum(parts) for part in parts]
    splits = split_tokens(tokens, fractions)
    assert list(splits) == ["train", "val", "test"]
    joined = np.concatenate(list(splits.values()))
    assert joined.tolist() == tokens.tolist()
    for fraction, split in zip(fractions, splits.values(), strict=True):
        assert abs(len(split) - fraction * num_tokens) <= 1
        assert len(split) == 0 if fraction == 0 else True
        assert len(split) == 0 or np.shares_memory(split, tokens)


def test_the_usual_split_of_tinyshakespeare() -> None:
    splits = split_tokens(np.zeros(1_115_394, dtype=np.uint8), (0.9, 0.1, 0.0))
    assert {name: len(split) for name, split in splits.items()} == {
        "train": 1_003_854,
        "val": 111_540,
        "test": 0,
    }


def test_a_memory_map_is_split_without_reading_it(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.arange(10, dtype=np.uint16))
    tokens = np.load(tmp_path / "ids.npy", mmap_mode="r")
    assert all(
        isinstance(split, np.memmap) for split in split_tokens(tokens, (0.5, 0.3, 0.2)).values()
    )


def test_a_split_loses_no_token_to_rounding() -> None:
    sizes = [len(split) for split in split_tokens(np.arange(100), (0.29, 0.71, 0.0)).values()]
    assert sizes == [29, 71, 0]
    tokens = np.zeros(10_000_000, dtype=np.uint8)
    splits = split_tokens(tokens, (0.5, 0.4999995, 0.0))  # within the tolerance of the config
    assert sum(len(split) for split in splits.values()) == len(tokens)
    assert len(splits["test"]) == 0


@settings(max_examples=examples(20))
@given(num_tokens=st.integers(min_value=40, max_value=300), length=st.integers(1, 8))
def test_no_token_is_both_trained_and_validated_on(num_tokens: int, length: int) -> None:
    splits = split_tokens(np.arange(num_tokens), (0.5, 0.3, 0.2))
    trained = {
        token
        for window in TokenWindowLoader(splits["train"], Batching(length, 4))
        for micro in window.micro_batches
        for token in torch.cat([*micro.values()]).flatten().tolist()
    }
    for name in ("val", "test"):
        held_out = {
            token
            for micro in ValidationLoader(splits[name], Batching(length, 4))
            for ids in micro.values()
            for token in ids[micro["target_ids"] >= 0].tolist()
        }
        assert held_out
        assert not trained & held_out


# what must not end in a traceback or wait


@pytest.mark.parametrize("name", ["a" * 5000, "a\0b"])
def test_a_path_that_no_system_takes_is_refused(name: str) -> None:
    with pytest.raises(DataError):
        read_source(name)


def test_a_link_to_nowhere_in_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"b\.txt"):
        read_source(str(tmp_path))


def test_a_folder_that_may_not_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "locked").mkdir()
    scandir = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match="locked"):
        read_source(str(tmp_path))


def test_a_name_that_looks_like_the_home_of_a_user_is_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("~notes.txt").write_text(TEXT, encoding="utf-8")
    assert read_source("~notes.txt").text == TEXT


def test_the_bad_file_among_good_ones_is_named(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", "c.txt"):
        (tmp_path / name).write_text(TEXT, encoding="utf-8")
    (tmp_path / "b.txt").write_bytes(b"\xff\x00")
    with pytest.raises(DataError, match=r"b\.txt: byte 0"):
        read_source(str(tmp_path))


def test_half_of_a_surrogate_pair_in_a_source_of_yours_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(SOURCES, "_factories", dict(SOURCES._factories))
    SOURCES.register("mine")(lambda: "ab\ud800")
    with pytest.raises(DataError, match=r"character 2 .*surrogate"):
        read_source("mine")


def test_a_python_without_its_documentation_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(DataError, match="documentation"):
        read_source("python-docs")


@pytest.mark.parametrize("name", ["a.csv", "a.TSV", "a.parquet", "a.npz", "a.CSV.gz", "a.xlsx"])
def test_data_that_is_not_read_is_never_text(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text("prompt,response\na,b\n")
    with pytest.raises(DataError, match="not text to learn") as caught:
        read_source(str(path))
    assert caught.value.where == str(path)
    assert ".txt" in caught.value.fix


@pytest.mark.parametrize("name", ["a", "a.py", "a.TXT", "a.log", "a.csv.txt", ".a", "notes #1.txt"])
def test_any_other_file_that_is_named_is_text(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(TEXT)
    assert read_source(str(tmp_path / name)).text == TEXT
