"""A tokenizer as the `tokenizer.json` of the `tokenizers` library, with the same ids.

The format is written from its own description (https://huggingface.co/docs/tokenizers); the
library itself is not needed for it. A tokenizer of yours joins with one decorated function:

```python
@TOKENIZER_JSON.register("mine")
def mine(tokenizer: MyTokenizer) -> dict[str, Any]: ...
```
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fundamentallm.data.text_file import read_text
from fundamentallm.data.tokenizer import (
    ByteTokenizer,
    CharacterTokenizer,
    SubwordTokenizer,
    Tokenizer,
    tokenizer_from_dict,
)
from fundamentallm.data.tokenizer.character import REPLACEMENT
from fundamentallm.data.tokenizer.subword import END, UNUSED, ids_by_name, out_of_reach
from fundamentallm.errors import ConfigError, DataError
from fundamentallm.registry import Registry

TOKENIZER_JSON: Registry[dict[str, Any]] = Registry("tokenizer that can be written as JSON")
"""By the tokenizer's registered name: a function of a tokenizer that returns the JSON object."""

# Longer than any character of a vocabulary, so that it is never confused with one.
_UNKNOWN = "<unk>"


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the `tokenizer.json` that encodes and decodes as a tokenizer does.

    Raises:
        ConfigError: no function is registered for this kind of tokenizer.
    """
    kind = tokenizer.to_dict()["type"]
    if kind not in TOKENIZER_JSON:
        raise ConfigError(
            f"the tokenizer '{kind}' cannot be written as a tokenizer.json",
            key="data.tokenizer",
            got=kind,
            expected="one of " + ", ".join(TOKENIZER_JSON.names()),
            fix="register a function for it in TOKENIZER_JSON in a plugin, or use --format torch",
        )
    return TOKENIZER_JSON.get(kind)(tokenizer)


def read_tokenizer_json(path: Path, end: str | None = None) -> Tokenizer:
    """Read a `tokenizer.json`: characters or bytes if this package wrote it so, else subwords.

    Args:
        path: the file.
        end: the token that ends a document, if it has it; else one that is known by its name.

    Raises:
        DataError: it cannot be read.
        MachineError: it needs the package `tokenizers`, which is missing.
    """
    try:
        state = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise DataError("the tokenizer is not JSON", where=str(path), got=str(error)) from error
    for tokenizer in _candidates(state):
        # Apart from other fields, the file means exactly what this tokenizer does.
        if tokenizer_json(tokenizer) == state:
            return tokenizer
    try:
        tokenizer = tokenizer_from_dict({"type": "file", "json": state}, str(path))
    except DataError as error:
        error.fix = "name the tokenizer in data.tokenizer"
        raise
    if end in ids_by_name(state) and ids_by_name(state)[end] != tokenizer.end_id:
        return tokenizer_from_dict({"type": "file", "json": state, "end": end}, str(path))
    return tokenizer


def token_name(state: Mapping[str, Any], number: int) -> str | None:
    """Return the name of a token of a tokenizer.json by its id, None if it has no such token."""
    return next((name for name, found in ids_by_name(state).items() if found == number), None)


@TOKENIZER_JSON.register("bpe")
@TOKENIZER_JSON.register("file")
def subword_json(tokenizer: SubwordTokenizer) -> dict[str, Any]:
    """Subwords, without what their tokenizer.json cuts off a text or puts around it.

    A model that was trained here has never seen any of that, nor a special token where its name
    stands in a text; so special tokens that would be found there have other names.
    """
    around = tokenizer.json.get("post_processor") or {}
    kept = around if around.get("type") == "ByteLevel" else None  # offsets, no ids
    return out_of_reach({**tokenizer.json, **dict.fromkeys(UNUSED), "post_processor": kept})


@TOKENIZER_JSON.register("byte")
def byte_json(tokenizer: ByteTokenizer) -> dict[str, Any]:
    """Bytes, under the 256 printable stand-ins of byte-level BPE, with nothing to merge."""
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    return _file(
        pre_tokenizer=byte_level,
        decoder=byte_level,
        model=_bpe({character: byte for byte, character in enumerate(byte_characters())}),
        added_tokens=_end(tokenizer),
    )


@TOKENIZER_JSON.register("character")
def character_json(tokenizer: CharacterTokenizer) -> dict[str, Any]:
    """Characters; a character outside the vocabulary is refused, replaced or left out as here."""
    vocabulary = {character: number for number, character in enumerate(tokenizer.vocabulary)}
    decoders: list[dict[str, Any]] = [{"type": "Fuse"}]
    if tokenizer.unknown == "skip":
        # BPE without an unknown token leaves out what it does not know.
        return _file(
            pre_tokenizer=None,
            decoder=decoders[0],
            model=_bpe(vocabulary),
            added_tokens=_end(tokenizer),
        )
    if tokenizer.unknown == "replace":
        vocabulary[_UNKNOWN] = len(vocabulary)
        unknown = {"type": "Replace", "pattern": {"String": _UNKNOWN}, "content": REPLACEMENT}
        decoders = [unknown, *decoders]
    return _file(
        pre_tokenizer={
            "type": "Split",
            "pattern": {"Regex": r"[\s\S]"},
            "behavior": "Isolated",
            "invert": False,
        },
        decoder={"type": "Sequence", "decoders": decoders},
        # Whose unknown token is not in the vocabulary, it refuses what it does not know.
        model={"type": "WordLevel", "vocab": vocabulary, "unk_token": _UNKNOWN},
        added_tokens=_end(tokenizer),
    )


def byte_characters() -> list[str]:
    """Return the character that stands for each byte in byte-level BPE (GPT-2's encoder).

    A byte that prints in Latin-1 stands for itself; the others, in order, are U+0100 and on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (chr(code) for code in range(0x100, 0x200))
    return [chr(byte) if byte in printable else next(others) for byte in range(256)]


def _candidates(state: Any) -> list[Tokenizer]:
    """Return the tokenizers that a JSON object might have been written for."""
    model = state.get("model") if isinstance(state, Mapping) else None
    vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    if not isinstance(vocabulary, Mapping):
        return []
    # JSON can spell half of a surrogate pair, which no tokenizer of ours holds.
    characters = [
        token for token in vocabulary if len(token) == 1 and not "\ud800" <= token <= "\udfff"
    ]
    end = bool(state.get("added_tokens"))
    candidates: list[Tokenizer] = [ByteTokenizer(end)]
    if characters:
        candidates += [
            CharacterTokenizer(characters, policy, end=end)
            for policy in ("error", "replace", "skip")
        ]
    return candidates


def _end(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Return the token behind a document, if there is one, as a special token."""
    if tokenizer.end_id is None:
        return []
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return [{"id": tokenizer.end_id, "content": END, **flags, "special": True}]


def _bpe(vocabulary: dict[str, int]) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": vocabulary,
        "merges": [],
    }


def _file(**parts: Any) -> dict[str, Any]:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "post_processor": None,
        **parts,
    }
