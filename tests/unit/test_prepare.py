from __future__ import annotations

import argparse
import gzip
import io
import json
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fault_injection.faults import Crash, FaultyFilesystem
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.properties import examples

from fundamentallm.config.component import Component
from fundamentallm.data.documents import Document
from fundamentallm.data.prepared import read_prepared
from fundamentallm.data.preparing import pieces as pieces_module
from fundamentallm.data.preparing import tokenizer as tokenizer_module
from fundamentallm.data.preparing.folder import write_prepared
from fundamentallm.data.preparing.options import Options, check_options, tokenizer_choice
from fundamentallm.data.sources import SplitTokenSource, TokenSource, read_source
from fundamentallm.data.tokenizer import TOKENIZERS, ByteTokenizer, base, load_tokenizer
from fundamentallm.errors import ConfigError, DataError
from fundamentallm.files.filesystem import Filesystem

EXCERPT = Path(__file__).resolve().parents[1] / "data" / "shakespeare_excerpt.txt"
BYTE = Options(Component(name="byte"))


def options(tokenizer: str = "byte", **rest: object) -> Options:
    return Options(tokenizer_choice(tokenizer, None), **rest)  # type: ignore[arg-type]


@pytest.fixture
def inputs(tmp_path: Path) -> list[str]:
    folder = tmp_path / "in"
    folder.mkdir()
    shutil.copy(EXCERPT, folder / "a.txt")
    (folder / "b.md").write_text("# Title\n\u00e9\U0001f600 <|endoftext|>\n", encoding="utf-8")
    lines = [json.dumps({"text": f"record {n % 7} of some words"}) for n in range(10)]
    (folder / "c.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    (folder / "empty.txt").write_text("")
    return [str(folder)]


def all_documents(folder: Path) -> list[str]:
    found = [(folder / name).read_text(encoding="utf-8") for name in ("a.txt", "b.md")]
    lines = gzip.decompress((folder / "c.jsonl.gz").read_bytes()).decode().splitlines()
    return [*found, *(json.loads(line)["text"] for line in lines)]


@pytest.mark.parametrize("tokenizer", ["character", "byte", "{name: bpe, vocab_size: 300}"])
@pytest.mark.parametrize("batch", [1, 50, 1 << 20])
def test_documents_are_encoded_one_behind_the_other(
    inputs: list[str],
    tmp_path: Path,
    tokenizer: str,
    batch: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pieces_module, "BATCH", batch)
    assert write_prepared(inputs, tmp_path / "out", options(tokenizer))
    prepared = read_prepared(tmp_path / "out")
    made = prepared.tokenizer
    expected: list[int] = []
    for text in all_documents(Path(inputs[0])):
        expected += [*made.encode(text).tolist(), made.end_id]
    assert prepared.tokens["all"].tolist() == expected
    assert prepared.end_id == made.end_id
    manifest = json.loads((tmp_path / "out/prepare.json").read_text())
    assert (manifest["documents"], manifest["empty"], manifest["duplicates"]) == (12, 1, 3)
    assert manifest["tokens"] == len(expected)
    source = read_source(str(tmp_path / "out"))
    assert isinstance(source, TokenSource)
    assert source.sha256 == prepared.sha256
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


@settings(max_examples=examples(25))
@given(
    documents=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=60), min_size=1),
    piece=st.integers(5, 30),
    batch=st.integers(1, 100),
    tokenizer=st.sampled_from(["character", "byte", "{name: bpe, vocab_size: 270}"]),
)
def test_whatever_the_documents_and_however_they_are_cut(
    tmp_path_factory: pytest.TempPathFactory,
    documents: list[str],
    piece: int,
    batch: int,
    tokenizer: str,
) -> None:
    if not "".join(documents).strip():  # white space by itself is no text, and refused
        documents = [*documents, "a"]
    place = tmp_path_factory.mktemp("any")
    path = place / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces_module, "BATCH", batch)
        patch.setattr(base, "PIECE", piece)
        write_prepared([str(path)], place / "out", options(tokenizer))
    prepared = read_prepared(place / "out")
    ids = np.asarray(prepared.tokens["all"])
    ends = np.flatnonzero(ids == prepared.end_id)
    found = [prepared.tokenizer.decode(part) for part in np.split(ids, ends)]
    assert found == [*(text for text in documents if text), ""]


@pytest.mark.parametrize(
    ("characters", "dtype"), [(254, "|u1"), (255, "|u1"), (256, "<u2"), (70_000, "<u4")]
)
def test_the_type_holds_the_whole_id_space(tmp_path: Path, characters: int, dtype: str) -> None:
    """With the end of a document there is one id more than characters."""
    path = tmp_path / "a.txt"
    path.write_text("".join(chr(0x10000 + code) for code in range(characters)), encoding="utf-8")
    write_prepared([str(path)], tmp_path / "out", options("character"))
    ids = read_prepared(tmp_path / "out").tokens["all"]
    assert ids.dtype == np.dtype(dtype)
    assert ids.tolist() == list(range(characters + 1))


def test_documents_go_to_a_part_as_a_whole_and_equal_ones_to_the_same(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    texts = [f"document {n % 300}" for n in range(900)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    asked = options("byte", split="document", fractions=(0.8, 0.1, 0.1))
    write_prepared([str(path)], tmp_path / "out", asked)
    prepared = read_prepared(tmp_path / "out")
    parts = {}
    for name, ids in prepared.tokens.items():
        text = ByteTokenizer().decode(np.where(np.asarray(ids) == 256, 10, np.asarray(ids)))
        parts[name] = text.splitlines()
    assert sorted(line for lines in parts.values() for line in lines) == sorted(texts)
    assert not set(parts["train"]) & set(parts["val"])
    assert not set(parts["train"]) & set(parts["test"])
    assert 0.7 < len(parts["train"]) / 900 < 0.9
    assert parts["val"] and parts["test"]  # noqa: PT018
    source = read_source(str(tmp_path / "out"))
    assert isinstance(source, SplitTokenSource)
    assert source.parts(prepared.tokenizer, (1, 0, 0))["val"] is not None


def test_a_part_without_documents_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one document")
    write_prepared([str(tmp_path / "a.txt")], tmp_path / "out", options("byte", split="document"))
    (name,) = read_prepared(tmp_path / "out").tokens
    empty = {"train", "val", "test"} - {name}
    source = read_source(str(tmp_path / "out"))
    assert isinstance(source, SplitTokenSource)
    parts = source.parts(ByteTokenizer(), (1, 0, 0))
    assert all(len(parts[other]) == 0 for other in empty)


# the second run


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path): (path.stat().st_mtime_ns, path.stat().st_ino)
        for path in [folder, *folder.rglob("*")]
    }


def test_a_second_run_does_nothing(inputs: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert write_prepared(inputs, out, BYTE)
    before = contents(tmp_path)
    assert not write_prepared(inputs, out, BYTE)
    (tmp_path / "in/a.txt").touch()  # the same contents
    assert not write_prepared(inputs, out, BYTE)
    after = contents(tmp_path)
    touched = str(tmp_path / "in/a.txt")
    assert {**before, touched: after[touched]} == after


def test_other_inputs_or_options_are_never_mixed_up(inputs: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_prepared(inputs, out, BYTE)
    before = contents(out)
    for words, asked, says in (
        (inputs, options("character"), "other options"),
        (inputs, options("byte", split="document"), "other options"),
        ([inputs[0] + "/a.txt"], BYTE, "other inputs"),
    ):
        with pytest.raises(DataError, match=says):
            write_prepared(words, out, asked)
    with (tmp_path / "in/a.txt").open("a") as file:
        file.write("x")
    with pytest.raises(DataError, match="before it changed"):
        write_prepared(inputs, out, BYTE)
    assert contents(out) == before


def test_a_tokenizer_json_that_changed_is_noticed(inputs: list[str], tmp_path: Path) -> None:
    write_prepared(inputs, tmp_path / "first", options("{name: bpe, vocab_size: 300}"))
    path = tmp_path / "tokenizer.json"
    shutil.copy(tmp_path / "first/tokenizer.json", path)
    asked = options(str(path))
    assert write_prepared(inputs, tmp_path / "second", asked)
    assert not write_prepared(inputs, tmp_path / "second", asked)
    first, second = (read_prepared(tmp_path / name) for name in ("first", "second"))
    assert first.sha256 == second.sha256
    state = json.loads(path.read_text())
    state["model"]["merges"].pop()
    path.write_text(json.dumps(state))
    with pytest.raises(DataError, match="tokenizer before it changed"):
        write_prepared(inputs, tmp_path / "second", asked)


@pytest.mark.parametrize("what", ["file", "folder", "link"])
def test_what_is_there_already_is_left_alone(tmp_path: Path, inputs: list[str], what: str) -> None:
    out = tmp_path / "out"
    if what == "file":
        out.write_text("mine")
    elif what == "folder":
        out.mkdir()
        (out / "mine").write_text("mine")
    else:
        out.symlink_to("nowhere")
    before = contents(tmp_path / "in")
    with pytest.raises(DataError, match="something else"):
        write_prepared(inputs, out, BYTE)
    assert contents(tmp_path / "in") == before
    assert out.is_symlink() or out.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_an_empty_folder_is_filled(tmp_path: Path, inputs: list[str]) -> None:
    (tmp_path / "out").mkdir()
    assert write_prepared(inputs, tmp_path / "out", BYTE)
    read_prepared(tmp_path / "out")


# whole or not at all


def is_whole_or_absent(out: Path, expected: str) -> bool:
    """Whether the target is there; if it is, it opens and holds what it should."""
    if not out.exists():
        return False
    assert read_prepared(out).sha256 == expected
    return True


@pytest.mark.parametrize("tokenizer", ["byte", "{name: bpe, vocab_size: 300}"])
def test_a_crash_at_any_operation_leaves_all_or_nothing(
    inputs: list[str], tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces_module, "BATCH", 100)  # several writes
    # A machine that stops removes nothing: what the program would tidy up stays.
    monkeypatch.setattr(shutil, "rmtree", lambda path, **_: None)
    asked = options(tokenizer, split="document", fractions=(0.5, 0.3, 0.2))
    counting = FaultyFilesystem(None, Crash)
    write_prepared(inputs, tmp_path / "whole", asked, counting)
    expected = read_prepared(tmp_path / "whole").sha256
    appeared = []
    for number in range(len(counting.log)):
        place = tmp_path / str(number)
        place.mkdir()
        with pytest.raises(Crash):
            write_prepared(inputs, place / "out", asked, FaultyFilesystem(number, Crash))
        appeared.append(is_whole_or_absent(place / "out", expected))
        for path in place.rglob("*.tokens"):
            # In a folder that has no name yet, a file that opens is whole as well.
            try:
                tokens = read_source(str(path)).tokens
            except DataError:
                continue
            assert tokens is not None
            assert tokens.tolist() == read_prepared(tmp_path / "whole").tokens[path.stem].tolist()
        with monkeypatch.context() as patch:
            patch.undo()
            assert write_prepared(inputs, place / "out", asked) is not appeared[-1]
        assert is_whole_or_absent(place / "out", expected)
        monkeypatch.setattr(pieces_module, "BATCH", 100)
        monkeypatch.setattr(shutil, "rmtree", lambda path, **_: None)
    # The rename alone makes the difference; the sync behind it is the last operation.
    assert appeared == [False] * (len(appeared) - 1) + [True]
    kinds = counting.log
    assert kinds[-2:] == ["rename", "sync_directory"]
    assert kinds.index("rename") > max(i for i, kind in enumerate(kinds) if kind == "sync")
    assert kinds[-3] == "sync_directory"


@pytest.mark.parametrize("code", [28, 5])
def test_a_failing_disk_leaves_nothing(inputs: list[str], tmp_path: Path, code: int) -> None:
    class Failing(FaultyFilesystem):
        def __init__(self, number: int) -> None:
            super().__init__(number, lambda: OSError(code, "fault"))

    counting = FaultyFilesystem(None, Crash)
    write_prepared(inputs, tmp_path / "whole", BYTE, counting)
    for number in range(len(counting.log) - 1):
        place = tmp_path / str(number)
        place.mkdir()
        with pytest.raises(OSError, match="fault"):
            write_prepared(
                inputs,
                place / "out",
                BYTE,
                FaultyFilesystem(number, lambda: OSError(code, "fault")),
            )
        assert list(place.iterdir()) == []


def test_two_at_once_do_not_disturb_each_other(inputs: list[str], tmp_path: Path) -> None:
    """The second finds the first's hidden folder locked, leaves it, and loses the race."""
    results: list[object] = []

    class Second(Filesystem):
        def rename(self, source: Path, target: Path) -> None:
            results.append(write_prepared(inputs, tmp_path / "out", BYTE))
            super().rename(source, target)

    class First(Filesystem):
        def create(self, path: Path):  # type: ignore[no-untyped-def]
            if path.name == "prepare.json" and not results:
                thread = threading.Thread(target=lambda: results.append(another()))
                thread.start()
                thread.join()
            return super().create(path)

    def another() -> bool:
        return write_prepared(inputs, tmp_path / "out", BYTE)

    with pytest.raises(DataError, match="another process"):
        write_prepared(inputs, tmp_path / "out", BYTE, First())
    assert results == [True]
    read_prepared(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_only_what_a_killed_run_left_is_removed(inputs: list[str], tmp_path: Path) -> None:
    left, foreign = tmp_path / ".out.tmp-0123", tmp_path / ".out.tmp-mine"
    for folder, name in ((left, "all.tokens"), (foreign, "letters.txt")):
        folder.mkdir()
        (folder / name).write_text("x")
    write_prepared(inputs, tmp_path / "out", BYTE)
    assert not left.exists()
    assert (foreign / "letters.txt").exists()


# faults


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"", "the inputs hold no text"),
        ("a.txt", b"ab\xff", "byte 2"),
        ("a.txt", b"PK\x03\x04", "zip"),
        ("a.jsonl", b'{"text": "x"}\n{"body": 1}\n', "a.jsonl:2"),
        ("a.jsonl", b"\n\n", "the inputs hold no text"),
        ("a.txt.gz", gzip.compress(b"some text", mtime=0)[:-2], "gzip"),
    ],
)
@pytest.mark.parametrize("tokenizer", ["character", "byte"])
def test_bad_inputs_write_nothing(
    tmp_path: Path, name: str, content: bytes, says: str, tokenizer: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=says) as caught:
        write_prepared([str(path)], tmp_path / "out", options(tokenizer))
    assert caught.value.fix
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("tokenizer", ["character", "byte"])
def test_all_bad_files_are_named_at_once(tmp_path: Path, tokenizer: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name, content in {
        "a.txt": b"good",
        "b.txt": b"ab\xff",
        "c.jsonl": b'{"text": "x"}\n{"body": 1}\n',
        "d.txt": b"PK\x03\x04",
        "e.txt.gz": gzip.compress(b"some text", mtime=0)[:-2],
        "f.txt": b"good too",
    }.items():
        (folder / name).write_bytes(content)
    with pytest.raises(DataError, match="4 of 6 inputs cannot be prepared") as caught:
        write_prepared([str(folder)], tmp_path / "out", options(tokenizer))
    lines = caught.value.got.splitlines()
    assert len(lines) == 4
    for line, says in zip(lines, ["b.txt: byte 2", "c.jsonl:2", "d.txt", "e.txt.gz"], strict=True):
        assert says in line
    assert "iconv" in caught.value.fix
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_of_very_many_bad_files_the_first_are_named(tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"{number:02}.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match="20 of 30 inputs cannot be prepared") as caught:
        write_prepared([str(tmp_path)], tmp_path / "out", BYTE)
    assert caught.value.got.count("not UTF-8") == 20


def test_all_inputs_that_are_none_are_named_at_once(tmp_path: Path, inputs: list[str]) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"x")
    words = [str(tmp_path / "no"), *inputs, str(tmp_path / "model.safetensors"), "nor/this/*.txt"]
    with pytest.raises(DataError, match="of 4 inputs cannot be read") as caught:
        write_prepared(words, tmp_path / "out", BYTE)
    for name in (str(tmp_path / "no"), "nor/this/*.txt"):
        assert name in caught.value.got


def test_a_character_outside_a_given_vocabulary_is_found(tmp_path: Path) -> None:
    """An input that changes between the two readings can bring one."""
    path = tmp_path / "a.txt"
    path.write_text("abc " * 100)

    class Changing(Filesystem):
        def create(self, new: Path):  # type: ignore[no-untyped-def]
            if new.name == "all.tokens":
                path.write_text("abz " * 100)
            return super().create(new)

    with pytest.raises(DataError, match="'z'") as caught:
        write_prepared([str(path)], tmp_path / "out", options("character"), Changing())
    assert "a.txt" in caught.value.where
    path.write_text("abc " * 100)
    Changing.create = lambda self, new: (  # type: ignore[method-assign,assignment]
        path.write_text("cba " * 100) if new.name == "all.tokens" else None,
        Filesystem.create(self, new),
    )[1]
    with pytest.raises(DataError, match="changed while it was read"):
        write_prepared([str(path)], tmp_path / "out", options("character"), Changing())
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize(
    "text", ["[a]", "{vocab_size: 3}", "3", "{name: 3}", "{name: bpe, vocab_size: [1]}", "word"]
)
def test_what_is_no_tokenizer_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        check_options(options(text))


def test_fractions_are_of_a_whole() -> None:
    for fractions in ((0.5, 0.4, 0.0), (0.0, 1.0, 0.0), (1.5, -0.5, 0.0), (float("nan"), 0, 0)):
        with pytest.raises(ConfigError, match="fractions"):
            check_options(options("byte", fractions=fractions))


def test_a_tokenizer_that_cannot_be_cut_reads_documents_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TOKENIZERS, "_factories", dict(TOKENIZERS._factories))

    @TOKENIZERS.register("pairs")
    class Pairs(ByteTokenizer):
        """Ids that depend on where the text began."""

        def __init__(self) -> None:
            super().__init__(end=True)

        def find_cut(self, text: str) -> int:
            return 0

        def encode(self, text: str) -> np.ndarray:
            ids = super().encode(text)
            ids[::2] ^= 1
            return ids

        def to_dict(self) -> dict[str, object]:
            return {"type": "pairs"}

        @classmethod
        def from_dict(cls, state: object) -> Pairs:
            return cls()

    monkeypatch.setattr(base, "PIECE", 7)
    path = tmp_path / "a.txt"
    path.write_text("abcdefghijklmnop" * 10)
    write_prepared([str(path)], tmp_path / "out", options("pairs"))
    assert read_prepared(tmp_path / "out").tokens["all"].tolist()[:-1] == (
        Pairs().encode(path.read_text()).tolist()
    )
    monkeypatch.setattr(pieces_module, "LONGEST_WHOLE", 50)
    with pytest.raises(DataError, match="too long for a tokenizer") as caught:
        write_prepared([str(path)], tmp_path / "out2", options("pairs"))
    assert str(path) in caught.value.where


@pytest.mark.parametrize("tokenizer", ["character", "byte"])
@pytest.mark.parametrize("records", [False, True])
def test_standard_input_is_read_once_or_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: str, records: bool
) -> None:
    said = b'{"body": "one"}\n{"body": "two"}\n' if records else b"some text\n"
    asked = options(tokenizer, field="body" if records else "text", records_on_input=records)
    for expected in (True, False):
        monkeypatch.setattr(sys, "stdin", argparse.Namespace(buffer=io.BytesIO(said)))
        assert write_prepared(["-"], tmp_path / "out", asked) is expected
    prepared = read_prepared(tmp_path / "out")
    text = prepared.tokenizer.decode(prepared.tokens["all"])
    assert text == ("onetwo" if records else "some text\n")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "all.tokens",
        "prepare.json",
        "tokenizer.json",
    ]
    monkeypatch.setattr(sys, "stdin", argparse.Namespace(buffer=io.BytesIO(said + said)))
    with pytest.raises(DataError, match="before it changed"):
        write_prepared(["-"], tmp_path / "out", asked)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_sample_is_drawn_from_all_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_module, "SAMPLE_BLOCK", 10)
    monkeypatch.setattr(tokenizer_module, "SAMPLE_BLOCKS", 50)
    documents = [Document("", [f"{number:010d}"]) for number in range(5000)]
    drawn = [int(text) for text in tokenizer_module.sample(documents)]
    assert len(set(drawn)) == 50
    assert 1800 < np.mean(drawn) < 3200
    assert drawn == [int(text) for text in tokenizer_module.sample(documents)]


def test_the_tokenizer_beside_the_ids_is_the_one(inputs: list[str], tmp_path: Path) -> None:
    write_prepared(inputs, tmp_path / "out", options("character"))
    path = tmp_path / "out/tokenizer.json"
    made = load_tokenizer(path)
    other = type(made)("abc", end=True)  # type: ignore[call-arg]
    other.save(path)
    with pytest.raises(DataError, match="another tokenizer"):
        read_prepared(tmp_path / "out")


def test_a_second_run_notices_what_is_missing_or_foreign_in_the_folder(
    inputs: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    write_prepared(inputs, out, BYTE)
    write_prepared([*inputs, *inputs], tmp_path / "other", options("character"))

    def refused(match: str) -> None:
        with pytest.raises(DataError, match=match):
            write_prepared(inputs, out, BYTE)

    tokenizer, tokens = out / "tokenizer.json", out / "all.tokens"
    kept = tokenizer.read_bytes(), tokens.read_bytes()
    tokenizer.unlink()
    refused("cannot be read")
    shutil.copy(tmp_path / "other/tokenizer.json", tokenizer)
    refused("tokenizer in the folder")
    tokenizer.write_bytes(kept[0])
    shutil.copy(tmp_path / "other/all.tokens", tokens)
    refused("has changed since it was prepared")
    tokens.write_bytes(kept[1])
    write_prepared(inputs, out, BYTE)


def test_white_space_alone_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "white.txt").write_text(" \n\t")
    with pytest.raises(DataError, match="no text") as caught:
        write_prepared([str(tmp_path / "white.txt")], tmp_path / "out", BYTE)
    assert caught.value.got == "only white space"
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_of_no_name_is_refused_with_a_size_too() -> None:
    with pytest.raises(ConfigError, match="not a tokenizer"):
        tokenizer_choice("3", 3)


def test_a_manifest_that_is_none_is_refused(inputs: list[str], tmp_path: Path) -> None:
    write_prepared(inputs, tmp_path / "out", BYTE)
    path = tmp_path / "out/prepare.json"
    whole = path.read_text()
    change: Callable[[str], str]
    for change in (
        lambda text: "",
        lambda text: "[]",
        lambda text: text.replace('"format": 1', '"format": 2'),
        lambda text: text.replace('"all"', '"../../etc/x"'),
        lambda text: text.replace('"all"', '"train"'),
        lambda text: '{"format": 1, "files": {"all": {}}}',
        lambda text: text.replace('"options"', '"option"'),
        lambda text: text.replace('"mtime_ns"', '"mtime"'),
        lambda text: text.replace('"size": ', '"size": -0.5e'),
    ):
        path.write_text(change(whole))
        with pytest.raises(DataError):
            read_prepared(tmp_path / "out")
