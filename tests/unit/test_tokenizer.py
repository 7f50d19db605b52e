from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fundamentallm.data.tokenizer import (
    TOKENIZERS,
    ByteTokenizer,
    CharacterTokenizer,
    Tokenizer,
    build_tokenizer,
    load_tokenizer,
    tokenizer_from_dict,
)
from fundamentallm.data.tokenizer import character as tokenizer_module
from fundamentallm.errors import ConfigError, DataError

ANY_TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]))
NONEMPTY_TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1)


@given(ANY_TEXT)
def test_bytes_round_trip_any_text(text: str) -> None:
    ids = ByteTokenizer().encode(text)
    assert ids.tolist() == list(text.encode("utf-8"))
    assert ByteTokenizer().decode(ids) == text


@given(NONEMPTY_TEXT)
def test_characters_round_trip_their_own_text(text: str) -> None:
    tokenizer = CharacterTokenizer.from_text(text)
    ids = tokenizer.encode(text)
    assert ids.tolist() == [sorted(set(text)).index(character) for character in text]
    assert tokenizer.decode(ids) == text


@given(vocabulary=NONEMPTY_TEXT, text=ANY_TEXT)
def test_unknown_characters_follow_the_policy(vocabulary: str, text: str) -> None:
    known = set(vocabulary)
    skip = CharacterTokenizer(vocabulary, unknown="skip")
    assert skip.decode(skip.encode(text)) == "".join(c for c in text if c in known)
    replace = CharacterTokenizer(vocabulary, unknown="replace")
    assert replace.decode(replace.encode(text)) == "".join(
        c if c in known else "\N{REPLACEMENT CHARACTER}" for c in text
    )


def test_an_unknown_character_is_named_with_its_place() -> None:
    with pytest.raises(DataError) as caught:
        CharacterTokenizer("abc").encode("abcz")
    message = str(caught.value)
    assert "'z'" in message
    assert "U+007A" in message
    assert "character 3 " in message


def test_a_code_point_beyond_every_known_one_is_unknown() -> None:
    with pytest.raises(DataError, match="U\\+1F600"):
        CharacterTokenizer("abc").encode("a\U0001f600")


@pytest.mark.parametrize(
    ("characters", "dtype"), [(1, np.uint8), (256, np.uint8), (257, np.uint16), (65537, np.uint32)]
)
def test_ids_take_the_smallest_type_that_holds_the_vocabulary(
    characters: int, dtype: type[np.unsignedinteger]
) -> None:
    vocabulary = [chr(0x10000 + code) for code in range(characters)]
    tokenizer = CharacterTokenizer(vocabulary)
    ids = tokenizer.encode("".join(vocabulary))
    assert tokenizer.vocab_size == characters
    assert ids.dtype == dtype
    assert ids.tolist() == list(range(characters))  # the type holds the largest id


def test_replace_adds_one_token() -> None:
    tokenizer = CharacterTokenizer("ab", unknown="replace")
    assert tokenizer.vocab_size == 3
    assert tokenizer.encode("a?b").tolist() == [0, 2, 1]


@pytest.mark.parametrize("tokenizer", [CharacterTokenizer("ab"), ByteTokenizer()])
def test_empty_text_is_no_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("").shape == (0,)
    assert tokenizer.decode([]) == ""


@pytest.mark.parametrize("ids", [[-1], [0, 2], [10**6]])
def test_ids_outside_the_vocabulary_are_refused(ids: list[int]) -> None:
    with pytest.raises(DataError, match="outside the vocabulary"):
        CharacterTokenizer("ab").decode(ids)


def test_bytes_outside_the_range_are_refused_and_do_not_wrap() -> None:
    with pytest.raises(DataError, match="256"):
        ByteTokenizer().decode([256])


def test_bytes_that_are_no_utf8_become_the_replacement_character() -> None:
    assert ByteTokenizer().decode([0x61, 0xFF, 0x62]) == "a\N{REPLACEMENT CHARACTER}b"


def test_a_lone_surrogate_is_refused_with_its_place() -> None:
    with pytest.raises(DataError) as caught:
        ByteTokenizer().encode("ab\ud800")
    assert "character 2 " in str(caught.value)
    assert "U+D800" in str(caught.value)


@pytest.mark.parametrize("unknown", ["error", "replace", "skip"])
@given(vocabulary=NONEMPTY_TEXT)
def test_a_character_tokenizer_survives_json(vocabulary: str, unknown: str) -> None:
    tokenizer = CharacterTokenizer(vocabulary, unknown=unknown)  # type: ignore[arg-type]
    again = tokenizer_from_dict(json.loads(json.dumps(tokenizer.to_dict())))
    assert type(again) is CharacterTokenizer
    assert again.to_dict() == tokenizer.to_dict()
    assert again.fingerprint() == tokenizer.fingerprint()
    assert again.encode(vocabulary).tolist() == tokenizer.encode(vocabulary).tolist()


@pytest.mark.parametrize(
    "tokenizer", [ByteTokenizer(), CharacterTokenizer('a\n"\\\x00\U0001f600', unknown="replace")]
)
def test_a_saved_tokenizer_loads_as_what_it_was(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    for loaded in (load_tokenizer(path), Tokenizer.load(path)):
        assert type(loaded) is type(tokenizer)
        assert loaded.fingerprint() == tokenizer.fingerprint()


def test_fingerprints_tell_tokenizers_apart() -> None:
    tokenizers = [
        CharacterTokenizer("ab"),
        CharacterTokenizer("abc"),
        CharacterTokenizer("ab", unknown="skip"),
        CharacterTokenizer("ab", unknown="replace"),
        ByteTokenizer(),
    ]
    assert len({tokenizer.fingerprint() for tokenizer in tokenizers}) == len(tokenizers)
    assert CharacterTokenizer("ba").fingerprint() == CharacterTokenizer("aab").fingerprint()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{not json",
        '{"type": "byte"}',  # no format number
        '{"format": 999, "type": "byte"}',
        '{"format": 1}',
        '{"format": 1, "type": []}',
        '{"format": 1, "type": "character"}',
        '{"format": 1, "type": "character", "vocabulary": "", "unknown": "error"}',
        '{"format": 1, "type": "character", "vocabulary": ["ab"], "unknown": "error"}',
        '{"format": 1, "type": "character", "vocabulary": 5, "unknown": "error"}',
        '{"format": 1, "type": "character", "vocabulary": "ab", "unknown": "other"}',
    ],
)
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(DataError):
        load_tokenizer(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.json"):
        load_tokenizer(tmp_path / "nowhere.json")


def test_a_tokenizer_that_is_not_registered_is_named_with_its_file(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text('{"format": 1, "type": "bytes"}')
    with pytest.raises(ConfigError, match=f"(?s){re.escape(str(path))}.*did you mean 'byte'"):
        load_tokenizer(path)


def test_a_configuration_builds_a_tokenizer_from_the_source() -> None:
    assert build_tokenizer("character", {}, "banana").decode([0, 1, 2]) == "abn"
    assert build_tokenizer("character", {"unknown": "replace"}, "banana").vocab_size == 4
    assert build_tokenizer("byte", {}, "banana").vocab_size == 256


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("word", {}),
        ("byte", {"unknown": "skip"}),
        ("character", {"unknown": "ignore"}),
        ("character", {"text": "abc"}),  # the program's to give
        ("character", {"vocabulary": "abc"}),
    ],
)
def test_a_configuration_cannot_write_anything_else(name: str, options: dict[str, str]) -> None:
    with pytest.raises(ConfigError):
        TOKENIZERS.check(name, options)


@pytest.mark.parametrize("vocabulary", [["ab"], [""]])
def test_a_vocabulary_is_made_of_single_characters(vocabulary: list[str]) -> None:
    with pytest.raises(ValueError, match="single character"):
        CharacterTokenizer(vocabulary)


def test_an_empty_vocabulary_is_refused() -> None:
    with pytest.raises(DataError, match="at least one"):
        CharacterTokenizer.from_text("")


def test_a_file_nested_without_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text("[" * 100_000)
    with pytest.raises(DataError):
        load_tokenizer(path)


def save(folder: Path, tokenizer: Tokenizer) -> Path:
    path = folder / "tokenizer.json"
    tokenizer.save(path)
    return path


def test_no_changed_character_of_a_saved_tokenizer_goes_unnoticed(tmp_path: Path) -> None:
    tokenizer = CharacterTokenizer("abz", unknown="replace")
    path = save(tmp_path, tokenizer)
    whole = path.read_bytes()
    for position in range(len(whole)):
        for value in b"a1":
            path.write_bytes(whole[:position] + bytes([value]) + whole[position + 1 :])
            with suppress(DataError, ConfigError):
                assert load_tokenizer(path).to_dict() == tokenizer.to_dict()
    for size in range(0, len(whole) - 1, 7):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"tokenizer\.json"):
            load_tokenizer(path)


@pytest.mark.parametrize("vocabulary", ["ba", "aab", ["a", "b"], ""])
def test_a_vocabulary_that_would_shift_the_ids_is_refused(vocabulary: Any) -> None:
    state = {"type": "character", "vocabulary": vocabulary, "unknown": "error"}
    with pytest.raises(DataError, match="MANIFEST"):
        tokenizer_from_dict(state, "MANIFEST.json")


def test_a_tokenizer_file_that_is_not_utf8_says_at_which_byte(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(b'{"\xe9": 1}')
    with pytest.raises(DataError, match=r"tokenizer\.json: byte 2"):
        load_tokenizer(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    os.mkfifo(path)
    with pytest.raises(DataError, match="regular file"):
        load_tokenizer(path)


@given(text=ANY_TEXT, chunk=st.integers(min_value=1, max_value=5))
def test_a_long_text_is_encoded_in_pieces_to_the_same_ids(text: str, chunk: int) -> None:
    for policy in ("replace", "skip"):
        tokenizer = CharacterTokenizer("abcdefg \n0123456789", unknown=policy)  # type: ignore[arg-type]
        whole = tokenizer.encode(text)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tokenizer_module, "CHUNK", chunk)
            pieces = tokenizer.encode(text)
        assert pieces.tolist() == whole.tolist()
        assert pieces.dtype == whole.dtype


def test_an_unknown_character_in_a_later_piece_has_its_place_in_the_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tokenizer_module, "CHUNK", 4)
    with pytest.raises(DataError, match="'z'") as caught:
        CharacterTokenizer("ab").encode("abababaz")
    assert "character 7 " in str(caught.value)


@pytest.mark.parametrize("tokenizer", [CharacterTokenizer("ab"), ByteTokenizer()])
def test_ids_become_a_tensor_without_a_warning(tokenizer: Tokenizer) -> None:
    ids = torch.from_numpy(tokenizer.encode("ab"))  # warns if the array cannot be written to
    assert tokenizer.decode(ids) == "ab"  # type: ignore[arg-type]


@pytest.mark.parametrize("ids", [[0.5], np.zeros((2, 2), dtype=np.int64), [2**70], ["a"]])
def test_ids_that_are_no_row_of_integers_are_misuse(ids: Any) -> None:
    for tokenizer in (CharacterTokenizer("ab"), ByteTokenizer()):
        with pytest.raises(ValueError, match="one row of integers"):
            tokenizer.decode(ids)


def test_half_of_a_surrogate_pair_is_no_character() -> None:
    """JSON would join two halves to one character, and no UTF-8 file could hold the text."""
    with pytest.raises(DataError, match="surrogate"):
        CharacterTokenizer("\ud83d\ude00")


def test_a_tokenizer_of_yours_is_one_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TOKENIZERS, "_factories", dict(TOKENIZERS._factories))

    @TOKENIZERS.register("shifted")
    class ShiftedTokenizer(ByteTokenizer):
        def __init__(self, by: int = 1) -> None:
            self.by = by

        def encode(self, text: str) -> np.ndarray:
            return super().encode(text) + np.uint8(self.by)

        def decode(self, ids: Iterable[int] | np.ndarray) -> str:
            return super().decode((np.asarray(ids, dtype=int) - self.by) % 256)

        def to_dict(self) -> dict[str, Any]:
            return {"type": "shifted", "by": self.by}

        @classmethod
        def from_dict(cls, state: Mapping[str, Any]) -> ShiftedTokenizer:
            return cls(state["by"])

    built = build_tokenizer("shifted", {"by": 3}, "any text")
    assert built.encode("a").tolist() == [100]
    loaded = load_tokenizer(save(tmp_path, built))
    assert type(loaded) is ShiftedTokenizer
    assert loaded.decode(built.encode("any text")) == "any text"


def test_a_text_from_nothing_begins_behind_the_end_of_a_document() -> None:
    assert ByteTokenizer(end=True).prompt_ids("") == [256]
    assert CharacterTokenizer("ab", end=True).prompt_ids("") == [2]
    assert ByteTokenizer().prompt_ids("") == [0]
    assert ByteTokenizer(end=True).prompt_ids("ab") == [*b"ab"]
