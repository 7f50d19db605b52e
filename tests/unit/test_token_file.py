from __future__ import annotations

import hashlib
import os
import random
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from fundamentallm.data.batch import Batch
from fundamentallm.data.loaders import (
    Batching,
    MixtureLoader,
    TokenWindowLoader,
    ValidationLoader,
)
from fundamentallm.data.sources import TokenSource, read_source
from fundamentallm.data.token_file import (
    CHUNK,
    HEADER_BYTES,
    FileTokens,
    TokenHeader,
    Tokens,
    read_tokens,
)
from fundamentallm.data.tokenizer import CharacterTokenizer
from fundamentallm.errors import DataError


def ids_of(path: str) -> Tokens:
    source = read_source(path)
    assert isinstance(source, TokenSource)
    return source.tokens


def save_tokens(folder: Path, tokens: np.ndarray) -> str:
    np.save(folder / "train.npy", tokens)
    CharacterTokenizer("abc").save(folder / "tokenizer.json")
    return str(folder / "train.npy")


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int64", ">u2"])
def test_a_token_file_is_opened_with_its_tokenizer(tmp_path: Path, dtype: str) -> None:
    path = save_tokens(tmp_path, np.array([0, 2, 1], dtype=dtype))
    source = read_source(path)
    assert isinstance(source, TokenSource)
    assert isinstance(source.tokens, FileTokens)
    assert source.tokens.tolist() == [0, 2, 1]
    assert source.tokenizer is not None
    assert source.tokenizer.decode(source.tokens) == "acb"


def test_a_token_file_in_capitals_is_one(tmp_path: Path) -> None:
    path = Path(save_tokens(tmp_path, np.array([0, 2, 1], dtype=np.uint8)))
    assert ids_of(str(path.rename(path.with_name("TRAIN.NPY")))).tolist() == [0, 2, 1]
    path = write_tokens(tmp_path, [0, 1, 3])
    assert ids_of(str(path.rename(path.with_name("ALL.Tokens")))).tolist() == [0, 1, 3]


def test_token_files_of_other_contents_have_other_hashes(tmp_path: Path) -> None:
    files = [
        np.array([0, 1, 2], dtype=np.uint8),
        np.array([0, 2, 1], dtype=np.uint8),
        np.array([0, 1, 2, 0], dtype=np.uint8),
        np.array([0, 1, 2], dtype="<u2"),
        np.array([0, 1, 2], dtype=">u2"),
    ]
    hashes = [read_source(save_tokens(tmp_path, tokens)).sha256 for tokens in files]
    CharacterTokenizer("xyz").save(tmp_path / "tokenizer.json")  # the same ids, another text
    hashes.append(read_source(str(tmp_path / "train.npy")).sha256)
    assert len(set(hashes)) == len(files) + 1
    assert read_source(save_tokens(tmp_path, files[0])).sha256 == hashes[0]


@pytest.mark.parametrize("bad", [3, -1, 255])
def test_an_id_outside_the_vocabulary_is_found_with_its_place(tmp_path: Path, bad: int) -> None:
    tokens = np.zeros(10, dtype=np.int16)
    tokens[7] = bad
    with pytest.raises(DataError) as caught:
        read_source(save_tokens(tmp_path, tokens))
    assert "token 7" in caught.value.where
    assert caught.value.got == str(bad)
    assert "0 to 2" in caught.value.expected


def test_an_id_beyond_the_first_chunk_is_found(tmp_path: Path) -> None:
    tokens = np.zeros(CHUNK + 10, dtype=np.uint8)
    tokens[-2] = 9
    with pytest.raises(DataError, match=f"token {len(tokens) - 2:,}"):
        read_source(save_tokens(tmp_path, tokens))


@pytest.mark.parametrize(
    "tokens", [np.zeros((2, 3), dtype=np.uint8), np.zeros(3), np.array(["a"]), np.array(1)]
)
def test_an_array_of_anything_else_is_refused(tmp_path: Path, tokens: np.ndarray) -> None:
    with pytest.raises(DataError):
        read_source(save_tokens(tmp_path, tokens))


def test_pickled_objects_are_never_loaded(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        read_source(save_tokens(tmp_path, np.array([{}, None], dtype=object)))


def test_a_token_file_that_was_cut_is_refused(tmp_path: Path) -> None:
    path = Path(save_tokens(tmp_path, np.zeros(100, dtype=np.uint16)))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"train\.npy"):
        read_source(str(path))


def test_a_token_file_needs_its_tokenizer(tmp_path: Path) -> None:
    path = save_tokens(tmp_path, np.zeros(3, dtype=np.uint8))
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        read_source(path)


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04rest of an archive"])
def test_a_file_that_is_no_array_is_refused(tmp_path: Path, content: bytes) -> None:
    path = Path(save_tokens(tmp_path, np.zeros(3, dtype=np.uint8)))
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"train\.npy"):
        read_source(str(path))


def test_an_archive_of_arrays_is_no_token_file(tmp_path: Path) -> None:
    path = Path(save_tokens(tmp_path, np.zeros(3, dtype=np.uint8)))
    with path.open("wb") as file:
        np.savez(file, np.zeros(3))
    with pytest.raises(DataError, match=r"train\.npy"):
        read_source(str(path))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_named_as_a_token_file_is_refused_without_waiting(tmp_path: Path) -> None:
    path = Path(save_tokens(tmp_path, np.zeros(3, dtype=np.uint8)))
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DataError, match="regular file"):
        read_source(str(path))


def test_a_missing_token_file_is_named_itself(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.npy"):
        read_source(str(tmp_path / "none.npy"))


def test_a_token_file_stands_alone(tmp_path: Path) -> None:
    path = save_tokens(tmp_path, np.zeros(3, dtype=np.uint8))
    assert isinstance(read_source([path]), TokenSource)
    with pytest.raises(DataError, match="joined"):
        read_source([path, "python-docs"])


def test_a_token_file_with_more_than_its_tokens_is_refused(tmp_path: Path) -> None:
    path = Path(save_tokens(tmp_path, np.zeros(100, dtype=np.uint16)))
    with path.open("ab") as file:
        file.write(b"\0")
    with pytest.raises(DataError) as caught:
        read_source(str(path))
    assert "one process" in str(caught.value)


def test_an_empty_token_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="0 tokens"):
        read_source(save_tokens(tmp_path, np.zeros(0, dtype=np.uint8)))


def test_a_damaged_token_file_is_refused_or_read_within_the_vocabulary(tmp_path: Path) -> None:
    """A changed header can name another type; it can never end in another error or a wrong id."""
    path = Path(save_tokens(tmp_path, np.array([0, 1, 2, 1], dtype=np.uint16)))
    whole = path.read_bytes()
    draw = random.Random(0)
    refused = 0
    for _ in range(400):
        damaged = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            value = ord(draw.choice("()[]{}',0123456789-<>|uifVO \\\n\0\xff"))
            damaged[draw.randrange(len(whole))] = value
        path.write_bytes(bytes(damaged))
        try:
            tokens = ids_of(str(path))
        except DataError:
            refused += 1
        else:
            assert tokens is not None
            assert set(tokens.tolist()) <= {0, 1, 2}
    assert refused > 200


def test_a_damaged_tokenizer_beside_the_tokens_is_named(tmp_path: Path) -> None:
    path = save_tokens(tmp_path, np.zeros(3, dtype=np.uint8))
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("abc", "abd"))
    with pytest.raises(DataError, match=r"tokenizer\.json.*damaged"):
        read_source(path)


@pytest.mark.parametrize("dtype", ["<u2", ">u2", ">i4", "<i8"])
def test_batches_of_any_byte_order_hold_the_ids(tmp_path: Path, dtype: str) -> None:
    vocabulary = [chr(0x100 + code) for code in range(600)]
    np.save(tmp_path / "train.npy", np.arange(600, dtype=dtype))
    CharacterTokenizer(vocabulary).save(tmp_path / "tokenizer.json")
    tokens = ids_of(str(tmp_path / "train.npy"))
    assert tokens is not None
    loader = TokenWindowLoader(tokens, Batching(8, 4))
    (micro,) = loader.window_at(0, 0).micro_batches
    assert micro["input_ids"][:, 0].tolist() == loader.rows_at(0, 0).tolist()
    validated = [micro["target_ids"] for micro in ValidationLoader(tokens, Batching(8, 4))]
    assert [int(i) for t in validated for i in t[t >= 0]] == list(range(1, 600))


# .tokens: the format of `prepare`


def write_tokens(folder: Path, ids: list[int], **said: object) -> Path:
    tokenizer = CharacterTokenizer("abc", end=True)
    tokenizer.save(folder / "tokenizer.json")
    data = np.array(ids, "|u1").tobytes()
    header = TokenHeader(
        **{
            "dtype": "|u1",
            "count": len(ids),
            "vocab_size": 4,
            "end_id": 3,
            "tokenizer": tokenizer.fingerprint(),
            "sha256": hashlib.sha256(data).hexdigest(),
            **said,
        }
    )
    path = folder / "all.tokens"
    path.write_bytes(header.to_bytes() + data)
    return path


def test_a_file_with_a_header_is_read(tmp_path: Path) -> None:
    read = read_tokens(write_tokens(tmp_path, [0, 1, 3, 2, 3]))
    assert read.ids.tolist() == [0, 1, 3, 2, 3]
    assert read.end_id == 3
    assert len(read.ids[1:4][1:]) == 2
    assert read.ids[1:4][1:].tolist() == [3, 2]
    assert np.asarray(read.ids[3:1]).tolist() == []
    assert np.asarray(read.ids, dtype=np.int64).dtype == np.int64
    assert read.ids.gather(np.array([3, 0]), 2).tolist() == [[2, 3], [0, 1]]
    assert read.ids[1:].gather(np.array([2, 0]), 2).tolist() == [[2, 3], [1, 3]]
    with pytest.raises(ValueError, match="must have step 1"):
        read.ids[::2]


@pytest.mark.parametrize(
    ("said", "says"),
    [
        ({"vocab_size": 3, "end_id": None}, "token 2"),  # the header's limit holds as well
        ({"sha256": "0" * 64}, "damaged"),
        ({"tokenizer": "0" * 64}, "another tokenizer"),
        ({"dtype": "<u2"}, "ends before its last token"),
        ({"dtype": ">u2"}, "dtype"),
        ({"dtype": "<f4"}, "dtype"),
        ({"count": 4}, "continues after its last token"),
        ({"count": 6}, "ends before its last token"),
        ({"count": -1}, "not an integer of at least 0"),
        ({"count": 10**30}, "ends before its last token"),
        ({"count": True}, "not an integer of at least 0"),
        ({"end_id": 4}, "end_id 4"),
        ({"sha256": None}, "the hash is not text"),
    ],
)
def test_a_header_that_is_not_true_is_refused(
    tmp_path: Path, said: dict[str, object], says: str
) -> None:
    path = write_tokens(tmp_path, [0, 1, 3, 2, 3], **said)
    with pytest.raises(DataError, match=says) as caught:
        read_tokens(path)
    assert str(path) in caught.value.where
    assert caught.value.fix


def test_an_id_outside_is_found_by_its_position(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="token 3") as caught:
        read_tokens(write_tokens(tmp_path, [0, 1, 3, 7, 3]))
    assert caught.value.got == "7"


def test_another_version_is_named(tmp_path: Path) -> None:
    path = write_tokens(tmp_path, [0, 1])
    path.write_bytes(path.read_bytes().replace(b'"version": 1', b'"version": 2'))
    with pytest.raises(DataError, match="version 2"):
        read_tokens(path)


def test_no_changed_byte_goes_unnoticed(tmp_path: Path) -> None:
    path = write_tokens(tmp_path, [0, 1, 3, 2, 3])
    whole = path.read_bytes()
    said = whole.index(b"\n", 16) + 1  # behind it are spaces
    for position in [*range(said), *range(HEADER_BYTES, len(whole))]:
        for flip in (1, 0x80):
            damaged = bytearray(whole)
            damaged[position] ^= flip
            path.write_bytes(bytes(damaged))
            # Only the JSON's white space, or the end of its line, may change and mean the same.
            with suppress(DataError):
                assert read_tokens(path).ids.tolist() == [0, 1, 3, 2, 3]
                assert position < said
    for size in range(0, len(whole), 37):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError):
            read_tokens(path)


def test_a_header_is_never_longer_than_its_place() -> None:
    header = TokenHeader("<u4", 10**15, 2**32, 2**32 - 1, "f" * 64, "f" * 64)
    assert len(header.to_bytes()) == HEADER_BYTES
    assert TokenHeader.parse(header.to_bytes(), "") == header


# a file that changes


@pytest.fixture
def watched(tmp_path: Path) -> tuple[Path, FileTokens]:
    path = write_tokens(tmp_path, [0, 1, 2, 1] * 100)
    return path, read_tokens(path).ids


def test_a_file_that_shrinks_is_an_error_and_no_signal(watched: tuple[Path, FileTokens]) -> None:
    path, ids = watched
    os.truncate(path, HEADER_BYTES + 10)
    with pytest.raises(DataError, match="changed while it was in use"):
        ids[200:300].tolist()
    with pytest.raises(DataError, match="changed"):
        ids[:5].tolist()  # what is still there is no longer what was checked


def test_a_file_that_is_written_to_is_an_error(watched: tuple[Path, FileTokens]) -> None:
    path, ids = watched
    with path.open("r+b") as file:
        file.seek(HEADER_BYTES)
        file.write(b"\2")
    with pytest.raises(DataError, match="other contents"):
        ids[:5].tolist()


def test_a_file_that_is_gone_is_an_error(watched: tuple[Path, FileTokens]) -> None:
    path, ids = watched
    path.unlink()
    with pytest.raises(DataError, match="changed while it was in use") as caught:
        ids[:5].tolist()
    assert "No such file" in caught.value.got


def test_a_file_that_was_put_back_is_gone_on_with(watched: tuple[Path, FileTokens]) -> None:
    path, ids = watched
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)
    assert ids[:4].tolist() == [0, 1, 2, 1]
    os.utime(path, (1, 1))
    assert ids[-4:].tolist() == [0, 1, 2, 1]
    path.write_bytes(content[:-1] + b"\0")
    with pytest.raises(DataError):
        ids[:4].tolist()


def test_a_change_during_a_read_is_noticed(
    watched: tuple[Path, FileTokens], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, ids = watched
    read = os.pread

    def slow(descriptor: int, size: int, place: int) -> bytes:
        monkeypatch.setattr(os, "pread", read)
        data = read(descriptor, size, place)
        with path.open("r+b") as file:
            file.seek(HEADER_BYTES + 1)
            file.write(b"\2")
        return data

    monkeypatch.setattr(os, "pread", slow)
    with pytest.raises(DataError, match="changed"):
        ids[:4].tolist()


# two threads


COUNT, TRAINED = 20_000, 18_000


def check_windows(loader: TokenWindowLoader | MixtureLoader, bound: int, steps: int) -> int:
    """Read steps of a file whose ids count up from 0, and return how many are wrong."""
    wrong = 0
    for number in range(steps):
        (micro,) = loader.window_at(0, number % len(loader)).micro_batches
        ids = micro["input_ids"]
        steps_up = (micro["target_ids"] - ids == 1).all()
        # A part is a ring: it goes on at its beginning once in an epoch at most.
        jumps = int((ids.diff(dim=1) != 1).sum())
        wrong += not bool(steps_up and jumps <= 1 and int(micro["target_ids"].max()) < bound)
    return wrong


def check_validation(ids: FileTokens, rounds: int) -> int:
    wrong = 0
    for _ in range(rounds):
        batches: list[Batch] = list(ValidationLoader(ids[TRAINED:], Batching(16, 8)))
        seen = torch.cat([batch["target_ids"].flatten() for batch in batches])
        wrong += seen[seen >= 0].tolist() != list(range(TRAINED + 1, COUNT))
    return wrong


READERS: dict[str, Callable[[FileTokens], int]] = {
    "windows": lambda ids: check_windows(
        TokenWindowLoader(ids[:TRAINED], Batching(16, 8, seed=1)), TRAINED, 150
    ),
    "mixture": lambda ids: check_windows(
        MixtureLoader([ids[:9_000], ids[9_000:TRAINED]], [1, 1], ["a", "b"], Batching(16, 8)),
        TRAINED,
        75,
    ),
    "validation": lambda ids: check_validation(ids, 8),
    "whole": lambda ids: sum(ids.tolist() != list(range(COUNT)) for _ in range(40)),
    "hash": lambda ids: sum(ids.sha256(COUNT) != SHA256 for _ in range(40)),
}
SHA256 = hashlib.sha256(np.arange(COUNT, dtype="<u4").tobytes()).hexdigest()


def slow_disk(seed: int) -> Callable[[int, int, int], bytes]:
    """Return a `pread` that waits now and then and gives less than it was asked for."""
    read, delays = os.pread, random.Random(seed)

    def slow(descriptor: int, size: int, place: int) -> bytes:
        if delays.random() < 0.05:
            time.sleep(0)
        return read(descriptor, min(size, 1 << 14), place)

    return slow


@pytest.mark.parametrize("touched", [False, True])
@pytest.mark.parametrize("reader", READERS)
def test_two_threads_read_one_file(
    reader: str, touched: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each gets its own ids on a slow disk, also while the file is put back again and again."""
    path = tmp_path / "ids"
    np.arange(COUNT, dtype="<u4").tofile(path)
    ids = FileTokens(path, 0, COUNT, np.dtype("<u4"))
    assert ids.sha256(COUNT) == SHA256
    monkeypatch.setattr(os, "pread", slow_disk(0))
    wrong: dict[str, int] = {}

    def run(name: str) -> None:
        wrong[name] = READERS[name](ids)

    threads = [threading.Thread(target=run, args=(name,)) for name in (reader, "validation")]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if touched:
            os.utime(path, (1, 1))
            os.utime(path)
        time.sleep(0.002)
    for thread in threads:
        thread.join()
    assert wrong == dict.fromkeys((reader, "validation"), 0)


@pytest.mark.long
def test_ten_thousand_step_batches_beside_evaluations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ids"
    np.arange(COUNT, dtype="<u4").tofile(path)
    ids = FileTokens(path, 0, COUNT, np.dtype("<u4"))
    monkeypatch.setattr(os, "pread", slow_disk(1))
    steps, evaluations = [], []
    loader = TokenWindowLoader(ids[:TRAINED], Batching(16, 8, seed=1))
    training = threading.Thread(target=lambda: steps.append(check_windows(loader, TRAINED, 10_000)))
    training.start()
    while training.is_alive():
        evaluations.append(check_validation(ids, 1))
    assert steps == [0]
    assert len(evaluations) > 100
    assert set(evaluations) == {0}


def test_a_file_that_is_touched_at_every_read_is_still_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However fast something touches it: the number of reads has a bound."""
    path = tmp_path / "ids"
    np.arange(COUNT, dtype="<u4").tofile(path)
    ids = FileTokens(path, 0, COUNT, np.dtype("<u4"))
    assert ids.sha256(COUNT) == SHA256
    read, reads = os.pread, []

    def touched(descriptor: int, size: int, place: int) -> bytes:
        reads.append(place)
        assert len(reads) < 1000, "it reads for ever"
        data = read(descriptor, min(size, 1 << 12), place)
        os.utime(path, ns=(len(reads), len(reads)))
        return data

    monkeypatch.setattr(os, "pread", touched)
    rows = ids[100:].gather(np.array([0, 1_500, COUNT - 150]), 50)
    assert rows.tolist() == [list(range(100 + at, 150 + at)) for at in (0, 1_500, COUNT - 150)]
