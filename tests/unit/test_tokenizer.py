from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
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
from fundamentallm.errors import ConfigError, DataError

ANY_TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]))
NONEMPTY_TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1)


@settings(deadline=None)
@given(ANY_TEXT)
def test_bytes_round_trip_any_text(text: str) -> None:
    ids = ByteTokenizer().encode(text)
    assert ids.tolist() == list(text.encode("utf-8"))
    assert ByteTokenizer().decode(ids) == text


@settings(deadline=None)
@given(NONEMPTY_TEXT)
def test_characters_round_trip_their_own_text(text: str) -> None:
    tokenizer = CharacterTokenizer.from_text(text)
    ids = tokenizer.encode(text)
    assert ids.tolist() == [sorted(set(text)).index(character) for character in text]
    assert tokenizer.decode(ids) == text


@settings(deadline=None)
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
@settings(deadline=None)
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


def test_a_tokenizer_that_is_not_registered_is_named() -> None:
    with pytest.raises(ConfigError, match="did you mean 'byte'"):
        tokenizer_from_dict({"type": "bytes"})


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
    with pytest.raises(ValueError, match="single characters"):
        CharacterTokenizer(vocabulary)


def test_an_empty_vocabulary_is_refused() -> None:
    with pytest.raises(DataError, match="at least one"):
        CharacterTokenizer.from_text("")


def test_a_file_nested_without_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text("[" * 100_000)
    with pytest.raises(DataError):
        load_tokenizer(path)
