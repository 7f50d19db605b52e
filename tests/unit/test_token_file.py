from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest

from fundamentallm.data.corpus import read_source
from fundamentallm.data.loader import TokenWindowLoader, ValidationLoader
from fundamentallm.data.token_file import CHUNK, FileTokens
from fundamentallm.data.tokenizer import CharacterTokenizer
from fundamentallm.errors import DataError


def save_tokens(folder: Path, tokens: np.ndarray) -> str:
    np.save(folder / "train.npy", tokens)
    CharacterTokenizer("abc").save(folder / "tokenizer.json")
    return str(folder / "train.npy")


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int64", ">u2"])
def test_a_token_file_is_opened_with_its_tokenizer(tmp_path: Path, dtype: str) -> None:
    path = save_tokens(tmp_path, np.array([0, 2, 1], dtype=dtype))
    corpus = read_source(path)
    assert isinstance(corpus.tokens, FileTokens)
    assert corpus.tokens.tolist() == [0, 2, 1]
    assert corpus.tokenizer is not None
    assert corpus.tokenizer.decode(corpus.tokens) == "acb"


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
    assert read_source([path]).tokens is not None
    with pytest.raises(DataError, match="joined"):
        read_source([path, "python-docs"])


def test_a_token_file_with_more_than_its_tokens_is_refused(tmp_path: Path) -> None:
    path = Path(save_tokens(tmp_path, np.zeros(100, dtype=np.uint16)))
    with path.open("ab") as file:
        file.write(b"\0")
    with pytest.raises(DataError) as caught:
        read_source(str(path))
    assert "one piece" in str(caught.value)


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
            tokens = read_source(str(path)).tokens
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
    tokens = read_source(str(tmp_path / "train.npy")).tokens
    assert tokens is not None
    loader = TokenWindowLoader(tokens, 8, 4)
    (micro,) = loader.window_at(0, 0).micro_batches
    assert micro["input_ids"][:, 0].tolist() == loader.rows_at(0, 0).tolist()
    validated = [micro["target_ids"] for micro in ValidationLoader(tokens, 8, 4)]
    assert [int(i) for t in validated for i in t[t >= 0]] == list(range(1, 600))
