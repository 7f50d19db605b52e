"""The tokenizer of a prepared folder, learned from a first look at the text where it learns."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from fundamentallm.data.documents import Document, Fingerprint, Input
from fundamentallm.data.permutation import derive_key
from fundamentallm.data.preparing.options import Options
from fundamentallm.data.preparing.pieces import no_text, read_documents
from fundamentallm.data.tokenizer import TOKENIZERS, SubwordTokenizer, Tokenizer
from fundamentallm.errors import ConfigError

SAMPLE_BLOCK = 1 << 16  # characters
SAMPLE_BLOCKS = 384  # 25 million characters teach a subword tokenizer


def learns(name: str) -> bool:
    """Tell whether a registered tokenizer learns from the text."""
    parameters = inspect.signature(TOKENIZERS.get(name)).parameters
    return bool({"texts", "vocabulary"} & set(parameters))


def build_with_end(
    inputs: Sequence[Input],
    options: Options,
    learned: list[Fingerprint],
    on_bytes: Callable[[int], object],
) -> Tokenizer:
    """Build the tokenizer, from a first look at the inputs if it learns, with an end."""
    name, chosen = options.tokenizer.name, dict(options.tokenizer.options)
    parameters = inspect.signature(TOKENIZERS.get(name)).parameters
    if "end" in TOKENIZERS.options(name) and parameters["end"].default is False:
        chosen.setdefault("end", True)
    supplied: dict[str, Any] = {}
    documents = read_documents(inputs, options.field, learned, on_bytes)
    if "texts" in parameters:
        supplied["texts"] = sample(documents)
        if not supplied["texts"]:
            raise no_text(inputs)
    elif "vocabulary" in parameters:
        supplied["vocabulary"] = _characters(documents)
        if not supplied["vocabulary"]:
            raise no_text(inputs)
    elif "text" in parameters:
        raise ConfigError(
            f"the tokenizer '{name}' needs the whole text at once, which `prepare` never holds",
            where="--tokenizer",
            fix="give its constructor a parameter `texts` or `vocabulary`, or use it in a run",
        )
    tokenizer = TOKENIZERS.build(name, chosen, **supplied)
    if tokenizer.end_id is None:
        raise ConfigError(
            f"the tokenizer '{name}' has no token for the end of a document",
            where="--tokenizer",
            fix="name one of its tokens: {name: file, path: ..., end: ...}"
            if isinstance(tokenizer, SubwordTokenizer)
            else "give it a property `end_id`",
        )
    return tokenizer


def sample(documents: Iterable[Document]) -> list[str]:
    """Return texts from all over the documents, 25 million characters at most.

    Blocks of neighbouring texts are drawn with equal chances (algorithm R, Vitter 1985), by numbers
    that are the same each time.
    """
    blocks: list[list[str]] = []
    for number, block in enumerate(_blocks(documents)):
        if number < SAMPLE_BLOCKS:
            blocks.append(block)
        elif (place := derive_key(number) % (number + 1)) < SAMPLE_BLOCKS:
            blocks[place] = block
    return [text for block in blocks for text in block]


def _blocks(documents: Iterable[Document]) -> Iterator[list[str]]:
    block: list[str] = []
    size = 0
    for document in documents:
        for chunk in document.chunks:
            for start in range(0, len(chunk), SAMPLE_BLOCK):
                block.append(chunk[start : start + SAMPLE_BLOCK])
                size += len(block[-1])
                if size >= SAMPLE_BLOCK:
                    yield block
                    block, size = [], 0
    if size:
        yield block


def _characters(documents: Iterable[Document]) -> list[str]:
    """Return every character that occurs."""
    seen = np.zeros(0x110000, dtype=bool)
    for document in documents:
        for chunk in document.chunks:
            for start in range(0, len(chunk), SAMPLE_BLOCK):
                text = chunk[start : start + SAMPLE_BLOCK]
                seen[np.frombuffer(text.encode("utf-32-le"), dtype="<u4")] = True
    return [chr(code) for code in np.flatnonzero(seen)]
