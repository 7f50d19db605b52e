"""What is given out bit by bit is the text of the whole, whatever the tokenizer is."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.properties import examples
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from fundamentallm.data.tokenizer import (
    BpeTokenizer,
    ByteTokenizer,
    CharacterTokenizer,
    SubwordTokenizer,
    Tokenizer,
)
from fundamentallm.inference import evaluate
from fundamentallm.inference.decoding import Decoder
from fundamentallm.inference.evaluate import decoded_size
from fundamentallm.inference.generate import LONGEST_RUN, TextStream

TRAINING = "na\u00efve \u4f60\u597d \U0001f600 the cat sat on the mat, the hat. " * 3
REPLACEMENT = "\ufffd"


def byte_fallback(kind: str) -> SubwordTokenizer:
    """BPE of a few letters, all else bytes, as Llama 2 has it; "plain" takes no space away."""
    names = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *"\u2581abc\ufffd",
    ]
    library = tokenizers.Tokenizer(
        models.BPE(
            vocab={name: number for number, name in enumerate(names)},
            merges=[],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    spaces = [normalizers.Replace(" ", "\u2581")]
    strip = []
    if kind != "plain":
        spaces.insert(0, normalizers.Prepend("\u2581"))
        strip.append(decoders.Strip(" ", 1, 0))
    library.normalizer = normalizers.Sequence(spaces)
    library.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    return SubwordTokenizer(json.loads(library.to_str()))


def trained(model: Any, trainer: Any, **parts: Any) -> SubwordTokenizer:
    library = tokenizers.Tokenizer(model)
    for name, part in parts.items():
        setattr(library, name, part)
    library.train_from_iterator([TRAINING], trainer)
    return SubwordTokenizer(json.loads(library.to_str()))


SPECIAL: dict[str, Any] = {"special_tokens": ["<unk>", "</s>"], "show_progress": False}
KINDS = {
    "characters": lambda: CharacterTokenizer("ab \u4f60\U0001f600\ufffd", "replace", end=True),
    "bytes": lambda: ByteTokenizer(end=True),
    "bpe": lambda: BpeTokenizer(270, texts=[TRAINING]),
    "byte fallback": lambda: byte_fallback("prefix"),
    "byte fallback, plain": lambda: byte_fallback("plain"),
    "unigrams": lambda: trained(
        models.Unigram(),
        trainers.UnigramTrainer(vocab_size=60, unk_token="<unk>", **SPECIAL),
        pre_tokenizer=pre_tokenizers.Metaspace(),
        decoder=decoders.Metaspace(),
    ),
    "word pieces": lambda: trained(
        models.WordPiece(unk_token="<unk>"),
        trainers.WordPieceTrainer(vocab_size=60, **SPECIAL),
        pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
        decoder=decoders.WordPiece(),
    ),
    "ends of words": lambda: trained(
        models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"),
        trainers.BpeTrainer(vocab_size=60, end_of_word_suffix="</w>", **SPECIAL),
        pre_tokenizer=pre_tokenizers.Whitespace(),
        decoder=decoders.BPEDecoder(),
    ),
}


@cache
def tokenizer_of(kind: str) -> Tokenizer:
    return KINDS[kind]()


TEXTS = st.text("ab \u00e9\u4f60\U0001f600\ufffd\n", max_size=12)
PIECES = st.lists(st.integers(1, 9), min_size=1, max_size=4)


def any_ids(data: st.DataObject, tokenizer: Tokenizer) -> list[int]:
    """Ids of some texts, of which some tokens are taken out and others put in."""
    one = st.integers(0, tokenizer.vocab_size - 1).map(lambda token: [token])
    parts = st.lists(one | TEXTS.map(lambda text: tokenizer.encode(text).tolist()), max_size=6)
    ids = [token for part in data.draw(parts) for token in part]
    begin = data.draw(st.integers(0, 3))
    return ids[begin : len(ids) - data.draw(st.integers(0, 3))]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=examples(150))
@given(data=st.data(), sizes=PIECES)
def test_any_tokens_join_to_the_text_of_the_whole(
    kind: str, data: st.DataObject, sizes: list[int]
) -> None:
    tokenizer = tokenizer_of(kind)
    ids = any_ids(data, tokenizer)
    whole = tokenizer.decode(ids)
    stream = TextStream(tokenizer)
    assert "".join(map(stream.feed, ids)) + stream.rest() == whole
    decoder, rest, given_out, turn = Decoder(tokenizer), ids, "", 0
    while rest:
        size = sizes[turn % len(sizes)]
        given_out += decoder.feed(rest[:size])
        assert whole.startswith(given_out)
        rest, turn = rest[size:], turn + 1
    assert given_out + decoder.rest() == whole


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=examples(150))
@given(data=st.data(), piece=st.integers(1, 9))
def test_a_size_is_that_of_the_whole_text(kind: str, data: st.DataObject, piece: int) -> None:
    tokenizer = tokenizer_of(kind)
    ids = any_ids(data, tokenizer)
    whole = tokenizer.decode(ids)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "PIECE", piece)
        size = decoded_size(tokenizer, np.array(ids, np.uint16))
    assert size == (len(whole), len(whole.encode()))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=examples(80))
@given(prompt=TEXTS, text=TEXTS)
def test_a_continuation_is_what_the_whole_has_more(kind: str, prompt: str, text: str) -> None:
    tokenizer = tokenizer_of(kind)
    before, ids = tokenizer.encode(prompt).tolist(), tokenizer.encode(text).tolist()
    stream = TextStream(tokenizer, before)
    continuation = "".join(map(stream.feed, ids)) + stream.rest()
    assert tokenizer.decode(before) + continuation == tokenizer.decode(before + ids)


FALLBACK = byte_fallback("prefix")


def streamed(ids: list[int]) -> list[str]:
    stream = TextStream(FALLBACK)
    return [*map(stream.feed, ids), stream.rest()]


def test_characters_in_bytes_are_given_out_when_their_run_ends() -> None:
    text = "a \U0001f600\U0001f600 b"
    assert [piece for piece in streamed(FALLBACK.encode(text).tolist()) if piece] == [
        "a", " ", "\U0001f600\U0001f600 ", "b"
    ]  # fmt: skip


def test_a_long_run_of_bytes_is_given_out_before_it_ends() -> None:
    text = "\u65e5\u672c\u8a9e" * 40
    ids = FALLBACK.encode(text).tolist()
    stream = TextStream(FALLBACK)
    behind, given_out = 0, ""
    for number, token in enumerate(ids, start=1):
        given_out += stream.feed(token)
        behind = max(behind, number - 3 * len(given_out))
    assert behind <= LONGEST_RUN + 4
    assert given_out + stream.rest() == text


def test_bytes_that_are_no_text_are_not_kept_forever() -> None:
    spoilt = [FALLBACK.encode("\n")[1] - 10 + 0xFF] * 1000
    assert FALLBACK.decode(spoilt[:1]) == REPLACEMENT
    stream = TextStream(FALLBACK)
    given_out = "".join(map(stream.feed, spoilt))
    assert len(given_out) >= 1000 - LONGEST_RUN - 4
    assert given_out + stream.rest() == FALLBACK.decode(spoilt)


def test_what_is_kept_of_the_past_does_not_grow() -> None:
    decoder = Decoder(ByteTokenizer())
    for _ in range(200):
        decoder.feed([0xE2, 0x82])  # never a character
        assert len(decoder._ids) <= 4
        assert len(decoder._context) <= 16
