from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from fundamentallm.data.tokenizer import (
    TOKENIZERS,
    ByteTokenizer,
    CharacterTokenizer,
    FileTokenizer,
    Tokenizer,
)
from fundamentallm.data.tokenizer.tokenizer_json import (
    byte_characters,
    read_tokenizer_json,
    tokenizer_json,
)
from fundamentallm.errors import ConfigError, DataError

# What UTF-8 can express; special-looking texts are drawn often.
TEXTS = st.text(st.characters(exclude_categories=["Cs"])) | st.lists(
    st.sampled_from(["<unk>", "<s>", "</s>", " ", "\r\n", "\0", "\ufffd", "e\u0301", "\u00e9", "a"])
).map("".join)


def library(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(tokenizer)))


BYTES = library(ByteTokenizer())


@given(TEXTS)
def test_bytes_encode_and_decode_alike(text: str) -> None:
    ids = BYTES.encode(text).ids
    assert ids == ByteTokenizer().encode(text).tolist()
    assert BYTES.decode(ids) == text


@given(st.binary())
def test_bytes_that_are_no_utf8_decode_alike(octets: bytes) -> None:
    assert BYTES.decode(list(octets)) == ByteTokenizer().decode(np.frombuffer(octets, np.uint8))


@given(TEXTS.filter(bool))
def test_characters_encode_and_decode_alike(text: str) -> None:
    ours = CharacterTokenizer.from_text(text)
    theirs = library(ours)
    assert theirs.get_vocab_size() == ours.vocab_size
    assert theirs.encode(text).ids == ours.encode(text).tolist()
    assert theirs.decode(ours.encode(text).tolist()) == text


@given(TEXTS.filter(bool), TEXTS, st.sampled_from(["replace", "skip"]))
def test_unknown_characters_are_treated_alike(vocabulary: str, text: str, policy: str) -> None:
    ours = CharacterTokenizer(vocabulary, policy)  # type: ignore[arg-type]
    theirs = library(ours)
    ids = ours.encode(text)
    assert theirs.encode(text).ids == ids.tolist()
    assert theirs.decode(ids.tolist()) == ours.decode(ids)
    assert theirs.get_vocab_size() == ours.vocab_size


def test_an_unknown_character_is_refused_by_both() -> None:
    ours = CharacterTokenizer("ab")
    with pytest.raises(DataError):
        ours.encode("abc")
    with pytest.raises(Exception, match="Missing"):
        library(ours).encode("abc")


def test_the_stand_ins_of_bytes_are_the_library_s() -> None:
    assert sorted(byte_characters()) == sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    assert len(set(byte_characters())) == 256


@pytest.mark.parametrize(
    "tokenizer",
    [
        ByteTokenizer(),
        CharacterTokenizer("some text\n"),
        CharacterTokenizer("some text\n", "replace"),
        CharacterTokenizer("some text\n", "skip"),
        CharacterTokenizer("".join(byte_characters()), "skip"),
        ByteTokenizer(end=True),
        CharacterTokenizer("some text\n", end=True),
        CharacterTokenizer("some text\n", "replace", end=True),
        CharacterTokenizer("some text\n", "skip", end=True),
    ],
)
def test_what_was_written_is_read_back(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(tokenizer_json(tokenizer)))
    assert read_tokenizer_json(path).to_dict() == tokenizer.to_dict()


@pytest.mark.parametrize(
    "change", [{"normalizer": {"type": "NFC"}}, {"added_tokens": [], "post_processor": None}]
)
def test_another_tokenizer_is_not_taken_for_one_of_ours(
    change: dict[str, object], tmp_path: Path
) -> None:
    path = tmp_path / "tokenizer.json"
    state = {**tokenizer_json(CharacterTokenizer("ab", "skip")), **change, "truncation": None}
    state["model"] = {**state["model"], "vocab": {"a": 1, "b": 0}}
    path.write_text(json.dumps(state))
    read = read_tokenizer_json(path)
    assert type(read) is FileTokenizer
    assert read.encode("ab").tolist() == [1, 0]


@pytest.mark.parametrize("change", [{"model": None}, {"model": {"type": "BPE", "vocab": {}}}])
def test_what_the_library_cannot_read_is_refused(change: dict[str, object], tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({**tokenizer_json(CharacterTokenizer("ab")), **change}))
    with pytest.raises(DataError, match="describe a tokenizer"):
        read_tokenizer_json(path)


@pytest.mark.parametrize("text", ["{", "[]", "null", "[" * 100_000])
def test_what_is_no_tokenizer_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        read_tokenizer_json(path)
    assert caught.value.where == str(path)


def test_a_tokenizer_of_your_own_is_refused_until_it_says_how() -> None:
    class Own(ByteTokenizer):
        def to_dict(self) -> dict[str, object]:
            return {"type": "own"}

    with pytest.raises(ConfigError) as caught:
        tokenizer_json(Own())
    assert caught.value.key == "data.tokenizer"
    assert "TOKENIZER_JSON" in caught.value.fix


def test_every_tokenizer_of_the_package_can_be_written() -> None:
    for name in TOKENIZERS.names():
        if name == "file":  # the others write what it reads
            continue
        tokenizer = TOKENIZERS.build(name, {}, text="abc", texts=["abc"])
        assert library(tokenizer).encode("abc").ids == tokenizer.encode("abc").tolist()


@pytest.mark.parametrize(
    "tokenizer", [ByteTokenizer(end=True), CharacterTokenizer("ab<|endotx>", "replace", end=True)]
)
def test_the_end_of_a_document_is_a_special_token(tokenizer: Tokenizer) -> None:
    theirs = library(tokenizer)
    assert theirs.token_to_id("<|endoftext|>") == tokenizer.end_id
    assert theirs.get_vocab_size() == tokenizer.vocab_size
    theirs.encode_special_tokens = True
    text = "ab<|endoftext|>"
    assert theirs.encode(text).ids == tokenizer.encode(text).tolist()
    ids = [*tokenizer.encode("ab").tolist(), tokenizer.end_id]
    assert theirs.decode(ids) == tokenizer.decode(ids) == "ab"
