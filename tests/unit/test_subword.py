from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from fundamentallm.data.tokenizer import (
    BpeTokenizer,
    ByteTokenizer,
    CharacterTokenizer,
    FileTokenizer,
    SubwordTokenizer,
    Tokenizer,
    base,
    build_tokenizer,
    load_tokenizer,
    subword,
    tokenizer_from_dict,
)
from fundamentallm.data.tokenizer.subword import out_of_reach
from fundamentallm.data.tokenizer.tokenizer_json import (
    read_tokenizer_json,
    token_name,
    tokenizer_json,
)
from fundamentallm.errors import ConfigError, DataError, MachineError

EXCERPT = Path(__file__).resolve().parents[1] / "data" / "shakespeare_excerpt.txt"
TRAINING = EXCERPT.read_text(encoding="utf-8")
BPE = BpeTokenizer(320, texts=[TRAINING])
# What UTF-8 can express, with what could be taken for a special token or split a word drawn often.
TEXTS = st.text(st.characters(exclude_categories=["Cs"])) | st.lists(
    st.sampled_from(
        ["<|endoftext|>", "</s>", " ", "  ", "\n", "\r\n", "\0", "\ufffd", "\u00a0", "e\u0301", "a",
         "the", "'s", "12", ".", "\U0001f600", "\u200d"]
    )
).map("".join)  # fmt: skip


def direct(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """The library's own tokenizer, told to take special tokens for text."""
    library = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(tokenizer)))
    library.encode_special_tokens = True
    return library


LIBRARY = direct(BPE)


@given(TEXTS)
def test_any_text_comes_back(text: str) -> None:
    ids = BPE.encode(text)
    assert BPE.decode(ids) == text
    assert ids.dtype == np.uint16
    assert BPE.end_id not in ids.tolist()
    assert ids.tolist() == LIBRARY.encode(text, add_special_tokens=False).ids


@given(TEXTS)
def test_any_text_comes_back_from_the_others_with_an_end(text: str) -> None:
    for tokenizer in (ByteTokenizer(end=True), CharacterTokenizer(text or "a", end=True)):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.end_id == tokenizer.vocab_size - 1
        assert tokenizer.end_id not in ids.tolist()
        assert tokenizer.decode([*ids.tolist(), tokenizer.end_id]) == text
        again = tokenizer_from_dict(json.loads(json.dumps(tokenizer.to_dict())))
        assert again.fingerprint() == tokenizer.fingerprint()
        assert again.end_id == tokenizer.end_id


@given(text=TEXTS, piece=st.integers(min_value=8, max_value=40))
def test_a_text_cut_at_spaces_behind_words_has_the_ids_of_the_whole(text: str, piece: int) -> None:
    whole = LIBRARY.encode(text, add_special_tokens=False).ids
    position = 0
    pieces = []
    while len(text) - position > piece:
        cut = subword.last_boundary(text[position : position + piece])
        if not cut:
            return  # a word longer than a piece: nothing is promised
        pieces.append(text[position : position + cut])
        position += cut
    pieces.append(text[position:])
    assert [number for ids in BPE.encode_many(pieces) for number in ids.tolist()] == whole


GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


SPLIT = {"type": "Split", "pattern": {"Regex": GPT4}, "behavior": "Isolated", "invert": False}
WITH_GPT4 = tokenizer_from_dict(
    {
        "type": "file",
        "json": {
            **BPE.json,
            "normalizer": {"type": "NFC"},
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [SPLIT, {**BPE.json["pre_tokenizer"], "use_regex": False}],
            },
        },
    }
)
LIBRARY_WITH_GPT4 = direct(WITH_GPT4)


@given(text=TEXTS, piece=st.integers(min_value=8, max_value=40))
def test_so_it_is_with_the_pattern_of_llama_3_and_qwen(text: str, piece: int) -> None:
    whole = LIBRARY_WITH_GPT4.encode(text, add_special_tokens=False).ids
    assert WITH_GPT4.encode(text).tolist() == whole
    assert WITH_GPT4.find_cut("a b c") == 3
    cut = subword.last_boundary(text[:piece])
    if cut:
        parts = WITH_GPT4.encode_many([text[:cut], text[cut:]])
        assert np.concatenate(parts).tolist() == whole


def test_a_long_text_has_the_ids_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "PIECE", 100)
    monkeypatch.setattr(subword, "BATCH", 1000)
    text = TRAINING[:20_000]
    assert BPE.encode(text).tolist() == LIBRARY.encode(text).ids
    # No space in 100 characters: a word is cut, and still comes back.
    unbroken = "ab\u00e9" * 1000
    assert BPE.decode(BPE.encode(unbroken)) == unbroken


def test_special_tokens_in_a_text_are_text() -> None:
    text = "a<|endoftext|>b"
    assert BPE.end_id not in BPE.encode(text).tolist()
    assert BPE.decode(BPE.encode(text)) == text
    assert BPE.decode([*BPE.encode("a").tolist(), BPE.end_id]) == "a"


def other_models() -> dict[str, dict[str, object]]:
    texts = [TRAINING[:3_000]]
    special = ["<unk>", "</s>"]
    unigram = tokenizers.Tokenizer(tokenizers.models.Unigram())
    unigram.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    unigram.train_from_iterator(
        texts,
        tokenizers.trainers.UnigramTrainer(
            vocab_size=150, special_tokens=special, unk_token="<unk>", show_progress=False
        ),
    )
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.train_from_iterator(
        texts, tokenizers.trainers.WordLevelTrainer(special_tokens=special, show_progress=False)
    )
    pieces = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="<unk>"))
    pieces.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    pieces.train_from_iterator(
        texts,
        tokenizers.trainers.WordPieceTrainer(
            vocab_size=150, special_tokens=special, show_progress=False
        ),
    )
    return {
        "unigram": json.loads(unigram.to_str()),
        "words": json.loads(words.to_str()),
        "word pieces": json.loads(pieces.to_str()),
    }


@pytest.mark.parametrize("kind", ["unigram", "words", "word pieces"])
def test_no_text_is_a_special_token_whatever_the_model_is(kind: str) -> None:
    state = other_models()[kind]
    tokenizer = SubwordTokenizer(state)
    library = tokenizers.Tokenizer.from_str(json.dumps(state))
    library.encode_special_tokens = True
    assert tokenizer.end_id == 1
    assert library.encode("the </s> end").ids.count(1) == 1  # what is to be prevented
    assert 1 not in tokenizer.encode("the </s> end").tolist()
    for text in (TRAINING[:500], "a \u4f60 z"):
        assert tokenizer.encode(text).tolist() == library.encode(text, add_special_tokens=False).ids
    ids = tokenizer.encode("the end").tolist()
    assert tokenizer.decode([*ids, 1]) == tokenizer.decode(ids) == library.decode(ids)


def merging(special: bool) -> dict[str, Any]:
    """A BPE whose merges make the end of a document out of its signs."""
    names = ["</s>", "<", "/", "s", ">", "</", "s>", "a", "as"]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "added_tokens": [{"id": 0, "content": "</s>", **flags, "special": special}],
        "model": {
            "type": "BPE",
            "vocab": {name: number for number, name in enumerate(names)},
            "merges": [["<", "/"], ["s", ">"], ["</", "s>"], ["a", "s"]],
        },
    }


def looked_up() -> dict[str, Any]:
    """A byte-level BPE that takes a word whole where it is in the vocabulary."""
    state = json.loads(json.dumps(BPE.json))
    return {**state, "model": {**state["model"], "ignore_merges": True}, "pre_tokenizer": None}


REACHING = {
    **{
        kind: lambda kind=kind: other_models()[kind] for kind in ("unigram", "words", "word pieces")
    },
    "merges": lambda: merging(special=True),
    "an end that is not special": lambda: merging(special=False),
    "lookup": looked_up,
}


@pytest.mark.parametrize("kind", REACHING)
def test_no_text_of_any_origin_encodes_to_the_end(kind: str) -> None:
    state = REACHING[kind]()
    tokenizer = SubwordTokenizer(state)
    end_id = tokenizer.end_id
    assert end_id is not None
    names = {token_name(state, end_id), token_name(out_of_reach(state), end_id), "a", "s"}
    around = ["", "\0", " ", "\ufffd", "\0" * 2]
    for name in names:
        for before in around:
            for behind in around:
                text = f"{before}{name}{behind}"
                assert end_id not in tokenizer.encode(text).tolist()
                assert end_id not in tokenizer.encode(f"the {text} as").tolist()
    assert tokenizer.decode([end_id]) == ""
    again = tokenizer_from_dict(tokenizer.to_dict())
    assert again.to_dict() == tokenizer.to_dict()


def test_bytes_to_fall_back_on_may_be_special_tokens() -> None:
    library = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>"))
    special = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, show_progress=False
    )
    library.train_from_iterator(["the cat sat on the mat"], trainer)
    decoders = tokenizers.decoders
    library.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = SubwordTokenizer(json.loads(library.to_str()))

    ids = tokenizer.encode("\u00fc").tolist()

    assert ids == [2 + byte for byte in "\u00fc".encode()]
    assert tokenizer.end_id not in tokenizer.encode("</s>").tolist()


def test_text_beside_a_merged_end_keeps_its_merges() -> None:
    assert SubwordTokenizer(merging(special=True)).encode("as</s>a").tolist() == [8, 5, 6, 7]


@pytest.mark.parametrize("dropout", [0.1, 1.0])
def test_dropout_of_merges_is_left_out_and_said(
    dropout: float, caplog: pytest.LogCaptureFixture
) -> None:
    state = json.loads(json.dumps(BPE.json))
    state["model"]["dropout"] = dropout
    library = tokenizers.Tokenizer.from_str(json.dumps(state))
    text = TRAINING[:200]
    found = {tuple(library.encode(text).ids) for _ in range(4)}
    tokenizer = SubwordTokenizer(state)
    assert "at random" in caplog.text
    assert found != {tuple(BPE.encode(text))}  # what is to be prevented
    for _ in range(4):
        assert tokenizer.encode(text).tolist() == BPE.encode(text).tolist()
    assert tokenizer.json["model"]["dropout"] is None
    caplog.clear()
    tokenizer_from_dict(tokenizer.to_dict())
    assert not caplog.text


@pytest.mark.parametrize("kind", ["unigram", "words", "word pieces"])
def test_so_it_is_in_what_is_written_for_others_and_read_back(kind: str, tmp_path: Path) -> None:
    tokenizer = SubwordTokenizer(other_models()[kind])
    written = tokenizer_json(tokenizer)
    library = direct(tokenizer)
    for text in ("the </s> end</s>", "<unk> \u4f60 the", "</s>", "\0</s>\0"):
        ids = tokenizer.encode(text).tolist()
        assert library.encode(text, add_special_tokens=False).ids == ids
        assert library.decode([*ids, 1]) == tokenizer.decode(ids)
    name = token_name(written, 1)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(written))
    for back in (read_tokenizer_json(path, name), FileTokenizer(str(path), end=name)):
        assert (back.fingerprint(), back.end_id) == (tokenizer.fingerprint(), 1)
        assert tokenizer_json(back) == written
        assert tokenizer_from_dict(back.to_dict()).end_id == 1


def test_what_stands_around_a_text_is_no_part_of_the_tokenizer() -> None:
    state = json.loads(json.dumps(BPE.json))
    around = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    library = tokenizers.Tokenizer.from_str(json.dumps(state))
    library.post_processor = around
    library.enable_truncation(3)
    library.enable_padding()
    tokenizer = SubwordTokenizer(json.loads(library.to_str()))
    assert tokenizer.encode("the end of it").tolist() == BPE.encode("the end of it").tolist()
    assert tokenizer.fingerprint() == BPE.fingerprint()
    written = tokenizer_json(tokenizer)
    assert SubwordTokenizer(written).fingerprint() == BPE.fingerprint()
    assert direct(tokenizer).encode("the end of it").ids == BPE.encode("the end of it").tolist()
    assert token_name(written, 0) == "<|endoftext|>"
    assert token_name(written, 10**6) is None


def test_training_is_a_pure_function_of_the_text() -> None:
    again = BpeTokenizer(320, texts=[TRAINING])
    assert again.fingerprint() == BPE.fingerprint()
    assert BPE.vocab_size == 320
    assert BpeTokenizer(320, texts=[TRAINING[: len(TRAINING) // 2]]).fingerprint() != (
        BPE.fingerprint()
    )
    assert len(BPE.encode(TRAINING)) < 0.75 * len(TRAINING)


def test_a_text_too_small_for_the_vocabulary_gives_a_smaller_one() -> None:
    tokenizer = BpeTokenizer(5000, texts=["abab"])
    assert 257 <= tokenizer.vocab_size < 270
    assert tokenizer.decode(tokenizer.encode("\U0001f600")) == "\U0001f600"


def test_a_configuration_trains_one() -> None:
    built = build_tokenizer("bpe", {"vocab_size": 300}, TRAINING)
    assert built.vocab_size == 300
    with pytest.raises(ConfigError, match="from 257 to 1,048,576"):
        build_tokenizer("bpe", {"vocab_size": 256}, TRAINING)
    with pytest.raises(ConfigError, match="from 257 to 1,048,576"):
        build_tokenizer("bpe", {"vocab_size": 10**12}, TRAINING)


def test_a_saved_tokenizer_is_a_tokenizer_json(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    BPE.save(path)
    assert tokenizers.Tokenizer.from_file(str(path)).get_vocab_size() == 320
    read = load_tokenizer(path)
    assert read.fingerprint() == BPE.fingerprint()
    assert read.encode(TRAINING).tolist() == BPE.encode(TRAINING).tolist()
    named = build_tokenizer("file", {"path": str(path)}, "")
    assert type(named) is FileTokenizer
    assert named.fingerprint() == BPE.fingerprint()
    assert named.end_id == BPE.end_id


def test_it_survives_json() -> None:
    again = tokenizer_from_dict(json.loads(json.dumps(BPE.to_dict())))
    assert type(again) is BpeTokenizer
    assert again.to_dict() == BPE.to_dict()
    assert again.fingerprint() == BPE.fingerprint()


def test_the_end_can_be_named(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    BPE.save(path)
    token = BPE.json["model"]["merges"][0]
    name = "".join(token)
    chosen = FileTokenizer(str(path), end=name)
    assert chosen.end_id == BPE.json["model"]["vocab"][name]
    again = tokenizer_from_dict(chosen.to_dict())
    assert again.end_id == chosen.end_id
    with pytest.raises(ConfigError, match="no such token"):
        FileTokenizer(str(path), end="<none>")


def test_truncation_and_padding_are_left_out_of_account() -> None:
    state = {
        **BPE.json,
        "truncation": {
            "direction": "Right",
            "max_length": 3,
            "strategy": "LongestFirst",
            "stride": 0,
        },
    }
    tokenizer = tokenizer_from_dict({"type": "file", "json": state})
    assert tokenizer.encode(TRAINING[:1000]).tolist() == BPE.encode(TRAINING[:1000]).tolist()


def test_what_might_read_across_a_space_is_never_cut() -> None:
    for change in (
        {"pre_tokenizer": None},
        {"pre_tokenizer": {**BPE.json["pre_tokenizer"], "add_prefix_space": True}},
        {"normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "_"}},
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "x"}]}},
    ):
        tokenizer = tokenizer_from_dict({"type": "file", "json": {**BPE.json, **change}})
        assert tokenizer.find_cut("some words here") == 0


def test_half_of_a_surrogate_pair_is_refused_with_its_place() -> None:
    for act in (lambda: BPE.encode("ab\ud800"), lambda: BpeTokenizer(300, texts=["ab\ud800"])):
        with pytest.raises(DataError, match="character 2 "):
            act()


@pytest.mark.parametrize("content", ["{}", "[]", '{"model": {}}', "{", "[" * 100_000])
def test_a_file_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(DataError) as caught:
        build_tokenizer("file", {"path": str(path)}, "")
    assert caught.value.where == str(path)


def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MachineError, match=r"fundamentallm\[tokenizers\]"):
        BpeTokenizer(300, texts=["abc"])
    assert hashlib.sha256(ByteTokenizer().encode("a").tobytes()).hexdigest()  # the others do


def test_the_library_is_imported_late() -> None:
    code = "import sys, fundamentallm.data.tokenizer; assert 'tokenizers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_training_lets_a_signal_through(monkeypatch):
    began, end = threading.Event(), threading.Event()

    def never_ending(self, texts, trainer):
        began.set()
        end.wait(60)

    class Library:
        def __init__(self, model):
            pass

        train_from_iterator = never_ending

    def interrupt():
        began.wait(60)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(tokenizers, "Tokenizer", Library)
    threading.Thread(target=interrupt).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            BpeTokenizer(texts=["a text"], vocab_size=300)
    finally:
        end.set()
