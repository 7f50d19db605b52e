"""Tokenizer files that are wrong in ways that only show when they are used: a DataError each."""

from __future__ import annotations

import base64
import json
import resource
from pathlib import Path
from typing import Any

import pytest

from fundamentallm.data.prepared import read_manifest
from fundamentallm.data.token_file import TokenHeader
from fundamentallm.data.tokenizer import load_tokenizer, tokenizer_from_dict
from fundamentallm.data.tokenizer.subword import BpeTokenizer, FileTokenizer, check_growth
from fundamentallm.errors import DataError

REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aaaaaaaaaa"}
BACKTRACKING = {
    "type": "Split",
    "pattern": {"Regex": "(a+)+$"},
    "behavior": "Isolated",
    "invert": False,
}


def tokenizer_file(**parts: Any) -> dict[str, Any]:
    """Return a tokenizer.json of two words with some parts exchanged."""
    empty = ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    model = {"type": "WordLevel", "vocab": {"a": 0, "[UNK]": 1}, "unk_token": "[UNK]"}
    return {"version": "1.0", **dict.fromkeys(empty), "added_tokens": [], "model": model, **parts}


def added(number: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": "</s>", **flags, "special": True}


def sequence(*rules: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": list(rules)}


def loaded(tmp_path: Path, state: Any) -> Any:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(state), encoding="utf-8")
    return load_tokenizer(path)


def test_a_word_without_an_unknown_token_is_refused_when_it_comes(tmp_path):
    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"}
    tokenizer = loaded(tmp_path, tokenizer_file(model=model))
    assert tokenizer.encode("a").tolist() == [0]
    with pytest.raises(DataError, match="cannot encode this text") as caught:
        tokenizer.encode("b")
    assert "UNK" in caught.value.got


def test_an_expression_that_gives_up_is_an_error_of_the_data(tmp_path, capfd):
    tokenizer = loaded(tmp_path, tokenizer_file(pre_tokenizer=BACKTRACKING))
    with pytest.raises(DataError, match="cannot encode this text") as caught:
        tokenizer.encode("a" * 40 + "c")
    assert "retry-limit" in caught.value.got


def test_rules_that_multiply_are_refused_before_a_text_is_read(tmp_path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError) as caught:
        loaded(tmp_path, tokenizer_file(normalizer=sequence(*[REPLACE] * 9)))
    assert "times as long" in caught.value.got
    decoder = {"type": "Sequence", "decoders": [REPLACE] * 9}
    with pytest.raises(DataError):
        loaded(tmp_path, tokenizer_file(decoder=decoder))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 18  # KiB


@pytest.mark.parametrize(
    ("rules", "growth"),
    [
        ([REPLACE], 10),
        ([{**REPLACE, "pattern": {"String": "aa"}}], 5),
        ([{**REPLACE, "pattern": {"Regex": "x*"}}], 11),
        ([{**REPLACE, "pattern": {"String": ""}}], 11),
        ([{**REPLACE, "content": ""}], 1),
        ([{"type": "NFC"}, {**REPLACE, "content": "\u2581"}], 3),
        ([{"type": "Precompiled", "precompiled_charsmap": base64.b64encode(
            (4).to_bytes(4, "little") + b"\1\2\3\4" + b"ab\0" + b"x" * 33 + b"\0"
        ).decode()}], 11),
    ],
)  # fmt: skip
def test_growth_is_that_of_the_rules_one_after_the_other(rules, growth):
    from fundamentallm.data.tokenizer import subword

    assert subword._growth(rules[-1]) == growth
    check_growth({"normalizer": sequence(*rules)})
    with pytest.raises(ValueError, match="times as long"):
        check_growth({"normalizer": sequence(*rules, *[REPLACE] * 2)})


def test_the_rules_of_known_models_are_taken(tmp_path):
    # T5 and XLM-RoBERTa: SentencePiece's table, then a space for runs of them.
    spaces = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "\u2581"}
    charsmap = base64.b64encode(b"\0\0\0\0" + b"x" * 33 + b"\0").decode()
    check_growth({"normalizer": sequence(
        {"type": "Precompiled", "precompiled_charsmap": charsmap}, spaces)})  # fmt: skip
    # Llama 2: a mark before the text, and one for each space.
    prepend = {"type": "Prepend", "prepend": "\u2581"}
    assert loaded(tmp_path, tokenizer_file(normalizer=sequence(prepend, spaces))).vocab_size == 2


@pytest.mark.parametrize("number", [7, 2**31])
def test_a_token_with_another_id_than_the_library_gives_it_is_refused(tmp_path, number):
    assert loaded(tmp_path, tokenizer_file(added_tokens=[added(2)])).end_id == 2
    with pytest.raises(DataError) as caught:
        loaded(tmp_path, tokenizer_file(added_tokens=[added(number)]))
    assert "other ids" in caught.value.got


def test_a_vocabulary_of_holes_is_refused(tmp_path):
    model = {"type": "WordLevel", "vocab": {"a": 0, "[UNK]": 2**31}, "unk_token": "[UNK]"}
    with pytest.raises(DataError) as caught:
        loaded(tmp_path, tokenizer_file(model=model))
    assert "2147483648" in caught.value.got


@pytest.mark.parametrize("end", [5, ["a"], {"a": 1}, True])
def test_an_end_of_another_type_is_refused(end):
    with pytest.raises(DataError, match="does not describe a tokenizer"):
        tokenizer_from_dict({"type": "file", "json": tokenizer_file(), "end": end})
    if end is not True:
        for state in (
            {"type": "byte", "end": end},
            {"type": "character", "vocabulary": "ab", "unknown": "error", "end": end},
        ):
            with pytest.raises(DataError, match="does not describe a tokenizer"):
                tokenizer_from_dict(state)


WRONG = {
    "rules that are text": {"normalizer": {"type": "Sequence", "normalizers": ["x"]}},
    "a rule without a pattern": {"normalizer": {"type": "Replace", "content": "x"}},
    "tokens that are text": {"added_tokens": ["</s>"]},
    "tokens that are a number": {"added_tokens": 5},
    "a model that is a list": {"model": []},
    "a vocabulary of numbers": {"model": {"type": "Unigram", "vocab": [1, 2]}},
    "merges that are numbers": {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [5]}},
    "a split without a pattern": {"pre_tokenizer": {"type": "Split", "pattern": 5}},
}


@pytest.mark.parametrize("parts", WRONG.values(), ids=WRONG)
def test_parts_of_another_form_are_refused(tmp_path, parts):
    state = tokenizer_file(**parts)
    (tmp_path / "file.json").write_text(json.dumps(state))
    for read in (
        lambda: loaded(tmp_path, state),
        lambda: FileTokenizer(str(tmp_path / "file.json")),
        lambda: tokenizer_from_dict({"type": "file", "json": state}),
    ):
        with pytest.raises(DataError):
            read()


def test_rules_nested_without_end_are_refused():
    rule: dict[str, Any] = {"type": "NFC"}
    for _ in range(3_000):
        rule = {"type": "Sequence", "normalizers": [rule]}
    with pytest.raises(DataError):
        tokenizer_from_dict({"type": "file", "json": tokenizer_file(normalizer=rule)})


def test_a_tokenizer_that_was_trained_here_is_none_of_these(tmp_path):
    tokenizer = BpeTokenizer(300, texts=["one two one two, three"] * 3)
    (tmp_path / "t.json").write_text(tokenizer.to_json())
    assert load_tokenizer(tmp_path / "t.json").encode("one").tolist() == (
        tokenizer.encode("one").tolist()
    )


@pytest.mark.parametrize(
    ("dtype", "vocab_size", "end_id"), [("|u1", 257, 256), ("<u2", 2**31 + 1, 2**31)]
)
def test_a_header_whose_ids_do_not_fit_its_type_is_refused(dtype, vocab_size, end_id):
    header = TokenHeader(dtype, 0, vocab_size, end_id, "t", "s").to_bytes()
    with pytest.raises(DataError, match="damaged") as caught:
        TokenHeader.parse(header, "x.tokens")
    assert "do not fit" in caught.value.got


@pytest.mark.parametrize("files", [["all"], "all", 3, None])
def test_files_that_are_no_table_are_refused(tmp_path, files):
    said = {"format": 1, "options": {}, "tokenizer": "t", "inputs": [], "files": files}
    (tmp_path / "prepare.json").write_text(json.dumps(said))
    with pytest.raises(DataError, match="not what `prepare` writes"):
        read_manifest(tmp_path)
