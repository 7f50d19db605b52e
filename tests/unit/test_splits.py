"""Which files are read, and which part each text belongs to."""

from __future__ import annotations

import hashlib
import json
import logging
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.properties import examples

from fundamentallm.config.data import SourceConfig
from fundamentallm.data.documents import find_inputs
from fundamentallm.data.preparing.folder import _tell_other_shares
from fundamentallm.data.preparing.pieces import Counts
from fundamentallm.data.sources import (
    ExampleSource,
    MixtureSource,
    TextSource,
    TokenSource,
    read_source,
)
from fundamentallm.data.sources.base import draw_parts
from fundamentallm.data.tokenizer import ByteTokenizer
from fundamentallm.errors import DataError

BYTES = ByteTokenizer()
TENTH = (0.8, 0.1, 0.1)


def texts_of(source: TextSource, fractions: tuple[float, float, float]) -> dict[str, str]:
    return {part: BYTES.decode(ids) for part, ids in source.parts(BYTES, fractions).items()}


# parts


def test_a_single_text_is_cut_by_position() -> None:
    source = TextSource.of([("a.txt", "0123456789")])
    assert texts_of(source, TENTH) == {"train": "01234567", "val": "8", "test": "9"}


@pytest.mark.parametrize("count", [1, 3, 60])
def test_the_texts_of_a_part_are_those_of_its_tokens(count: int) -> None:
    source = TextSource.of([(f"{i}.txt", f"{i:04} " * (i + 9)) for i in range(count)])
    mixture = MixtureSource.of([1.0, 1.0], [source, source])
    for part, text in texts_of(source, TENTH).items():
        found = list(source.texts(part, BYTES, TENTH, 10**6))
        assert "".join(one for _, one in found) == text
        assert "".join(one for _, one in source.texts(part, BYTES, TENTH, 7)) == text[:7]
        assert all(name.endswith(".txt") for name, _ in found)
        assert list(mixture.texts(part, BYTES, TENTH, 10**6)) == found * 2
        bounded = mixture.texts(part, BYTES, TENTH, len(text) + 3)
        assert "".join(one for _, one in bounded) == text + text[:3]


@pytest.mark.parametrize("end", [False, True])
def test_the_texts_of_tokens_are_their_documents(end: bool) -> None:
    documents = ["\u20ac" * 30, "b" * 8, "c" * 50]
    tokenizer = ByteTokenizer(end=end)
    ids = [tokenizer.encode(text) for text in documents]
    if end:
        ids = [np.append(one, tokenizer.end_id).astype(np.uint16) for one in ids]
    source = TokenSource(
        "t", "", tokenizer=tokenizer, end_id=tokenizer.end_id, tokens=np.concatenate(ids)
    )
    whole = documents if end else ["".join(documents)]
    named = [(f"t: document {number}", text) for number, text in enumerate(whole, 1)]
    assert list(source.texts("train", tokenizer, (1.0, 0.0, 0.0), 1000)) == named
    # 40 characters of the text are more than 40 of its ids.
    found = source.texts("train", tokenizer, (1.0, 0.0, 0.0), 40)
    assert "".join(text for _, text in found) == "".join(documents)[:40]


def test_the_texts_of_examples_are_prompt_and_response(tmp_path: Path) -> None:
    pairs = [{"prompt": f"p{i}", "response": f"r{i}"} for i in range(10)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    source = read_source(str(path), response_end="!")
    texts = [text for _, text in source.texts("train", BYTES, TENTH, 1000)]
    assert texts == [f"p{i}r{i}!" for i in range(8)]


def test_a_few_files_hold_out_the_end_of_each() -> None:
    """So that every language of a folder is in both parts, whatever its file is called."""
    source = TextSource.of([("de.txt", "a" * 20), ("el.txt", "b" * 10), ("fr.txt", "c" * 30)])
    assert texts_of(source, TENTH) == {
        "train": "a" * 16 + "b" * 8 + "c" * 24,
        "val": "aabccc",
        "test": "aabccc",
    }
    assert source.validation_in_words(TENTH) == "10 % at the end of each of 3 files"


def test_files_that_are_read_as_one_text_are_cut_once() -> None:
    files = [("a.txt", "a" * 5), ("b.txt", "b" * 5)]
    source = TextSource.of(files, by_position=True)
    assert texts_of(source, TENTH)["val"] == "b"


def test_many_files_are_in_one_part_each_by_their_text() -> None:
    drawn = random.Random(0)
    files = [(f"{n}.txt", f"{n:04} " * drawn.randint(20, 60)) for n in range(200)]
    source = TextSource.of(files)
    parts = texts_of(source, TENTH)
    for part, share in zip(("train", "val", "test"), TENTH, strict=True):
        assert len(parts[part]) / len(source.text) == pytest.approx(share, abs=0.005)
        for _, text in files:  # whole or not at all
            assert parts[part].count(text[:5]) in (0, len(text) // 5)
    # Names and places mean nothing: the same texts are in the same parts.
    drawn.shuffle(files)
    again = texts_of(TextSource.of([(f"x{n}", text) for n, (_, text) in enumerate(files)]), TENTH)
    for part, text in parts.items():
        assert sorted(text.split()) == sorted(again[part].split())
    words = source.validation_in_words(TENTH)
    assert " of 200 files, 10." in words or " of 200 files, 9." in words


@settings(max_examples=examples(60))
@given(
    sizes=st.lists(st.integers(1, 1_000), min_size=50, max_size=120),
    val=st.floats(0, 0.4),
    test=st.floats(0, 0.4),
)
def test_no_document_would_bring_a_share_nearer(sizes: list[int], val: float, test: float) -> None:
    documents = [(hashlib.sha256(b"%d" % n).hexdigest(), size) for n, size in enumerate(sizes)]
    parts = draw_parts(documents, (1 - val - test, val, test))
    for part, share in (("val", val), ("test", test)):
        taken = sum(size for size, own in zip(sizes, parts, strict=True) if own == part)
        left = share * sum(sizes) - taken
        smallest = min(
            (size for size, own in zip(sizes, parts, strict=True) if own == "train"), default=0
        )
        assert abs(left) <= max(smallest / 2, max(sizes) / 2)
        assert left <= smallest / 2 or not smallest


def test_equal_documents_are_in_one_part() -> None:
    documents = [("same", 10)] * 5 + [(f"{n:03}", 10) for n in range(95)]
    parts = draw_parts(documents, (0.5, 0.5, 0.0))
    assert len(set(parts[:5])) == 1
    assert parts.count("val") == pytest.approx(50, abs=5)


def write_examples(path: Path, numbers: range) -> Path:
    lines = [json.dumps({"prompt": f"p{n}", "response": f"r{n}"}) for n in numbers]
    path.write_text("\n".join(lines))
    return path


def prompts(source: ExampleSource, part: str) -> list[str]:
    return [source.examples[n].prompt for n in source.numbers(TENTH, part)]


def test_a_few_examples_hold_out_the_end_of_each_file(tmp_path: Path) -> None:
    names = [str(write_examples(tmp_path / f"{n}.jsonl", range(n, n + 20))) for n in (0, 20)]
    source = read_source(names)
    assert isinstance(source, ExampleSource)
    assert prompts(source, "val") == ["p16", "p17", "p36", "p37"]
    assert prompts(source, "test") == ["p18", "p19", "p38", "p39"]


def test_many_examples_are_drawn_and_each_is_in_one_part(tmp_path: Path) -> None:
    source = read_source(str(write_examples(tmp_path / "a.jsonl", range(100))))
    assert isinstance(source, ExampleSource)
    own = {part: prompts(source, part) for part in ("train", "val", "test")}
    assert [len(found) for found in own.values()] == [80, 10, 10]
    assert sorted(prompt for found in own.values() for prompt in found) == sorted(
        f"p{n}" for n in range(100)
    )
    assert own["val"] != [f"p{n}" for n in range(80, 90)]
    moved = write_examples(tmp_path / "b.jsonl", range(99, -1, -1))
    again = read_source(str(moved))
    assert isinstance(again, ExampleSource)
    assert set(prompts(again, "val")) == set(own["val"])


def test_the_copies_of_a_run_split_as_their_source_did(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a" * 5_000)
    run = tmp_path / "run"
    run.mkdir()
    for source in (
        [str(tmp_path / "a.txt"), "python-docs"],
        [
            SourceConfig(path=str(tmp_path / "a.txt"), weight=1),
            SourceConfig(name="python-docs", weight=1),
        ],
    ):
        first = read_source(source)
        for name, text in first.kept_texts().items():
            (run / name).write_text(text, encoding="utf-8", newline="")
        assert [path.name for path in run.iterdir()] == ["corpus-python-docs.txt"]
        again = read_source(source, kept=run)
        assert again.sha256 == first.sha256
        members = zip(
            *(one.members if isinstance(one, MixtureSource) else [one] for one in (first, again)),
            strict=True,
        )
        for own, other in members:
            parts = [member.parts(BYTES, TENTH) for member in (own, other)]
            for part in ("train", "val", "test"):
                assert np.array_equal(parts[0][part], parts[1][part])


# files


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    (folder / ".cache").mkdir(parents=True)
    (folder / "deep").mkdir()
    for name in ("a.txt", "deep/b.md", ".hidden.txt", ".cache/c.txt", "d.pdf"):
        (folder / name).write_text(f"text of {name}\n")
    (folder / "._a.txt").write_bytes(b"\0\5\26\7")
    return folder


def names_read(folder: Path) -> tuple[list[str], list[str]]:
    """What a run and what `prepare` reads."""
    source = read_source(str(folder))
    assert isinstance(source, TextSource)
    run = [str(Path(name).relative_to(folder)) for name, _, _ in source.pieces]
    prepare = [str(Path(one.name).relative_to(folder)) for one in find_inputs([str(folder)])]
    return run, prepare


def test_hidden_files_and_folders_are_passed_over(
    texts: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fundamentallm")
    assert names_read(texts) == (["a.txt", "deep/b.md"], ["a.txt", "deep/b.md"])
    for line in caplog.messages:
        assert "2 files read" in line
        assert "3 passed over, hidden" in line
        assert "1 passed over, of other kinds" in line
        assert "d.pdf" in line
    assert len(caplog.messages) == 2


def test_a_folder_that_is_hidden_itself_is_read_where_it_is_named(tmp_path: Path) -> None:
    (tmp_path / ".notes").mkdir()
    (tmp_path / ".notes" / "a.txt").write_text("text")
    assert names_read(tmp_path / ".notes")[0] == ["a.txt"]


def test_linked_folders_and_files_are_read_once(texts: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "e.txt").write_text("text of e\n")
    (texts / "part2").symlink_to(elsewhere)
    (texts / "again").symlink_to(elsewhere)  # the same by another name
    (texts / "0-deep").symlink_to(texts / "deep")  # what has a path of its own
    (texts / "0-a.txt").symlink_to(texts / "a.txt")
    expected = ["a.txt", "again/e.txt", "deep/b.md"]
    assert names_read(texts) == (expected, expected)


def test_links_that_lead_up_end(texts: Path) -> None:
    (texts / "deep" / "up").symlink_to(texts)
    (texts / "self").symlink_to(texts)
    (texts / "deep" / "two").mkdir()
    (texts / "deep" / "two" / "one").symlink_to(texts / "deep")
    assert names_read(texts) == (["a.txt", "deep/b.md"], ["a.txt", "deep/b.md"])


def test_a_folder_with_nothing_but_hidden_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".a.txt").write_text("text")
    with pytest.raises(DataError, match="no text in this folder"):
        read_source(str(tmp_path))
    with pytest.raises(DataError, match="no files to read"):
        find_inputs([str(tmp_path)])


@pytest.mark.parametrize(("val", "said"), [(10, False), (12, False), (0, True), (35, True)])
def test_prepare_says_where_few_documents_miss_their_share(
    val: int, said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    counts = Counts(documents=7, tokens=100)
    files = {"train": {"tokens": 100 - val}, **({"val": {"tokens": val}} if val else {})}
    _tell_other_shares(counts, files, (0.9, 0.1, 0.0))
    assert (f"val has {val}.0 % of the tokens and not 10.0 %" in caplog.text) == said
    assert ("--split position" in caplog.text) == said
