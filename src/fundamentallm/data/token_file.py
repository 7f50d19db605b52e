"""Token ids in a `.npy` file, memory-mapped, with the `tokenizer.json` beside it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from fundamentallm.data.text_file import check_regular
from fundamentallm.data.tokenizer import Tokenizer, load_tokenizer
from fundamentallm.errors import DataError

CHUNK = 1 << 22  # tokens checked at once


def read_tokens(path: Path) -> tuple[np.ndarray, Tokenizer, str]:
    """Open a token file, every id of it checked.

    Args:
        path: of one row of integers that numpy saved, of any width and byte order.

    Returns:
        (N,) ids, read-only and memory-mapped; the tokenizer; a SHA-256 that two token files share
        if they hold the same ids in the same type for the same tokenizer.

    Raises:
        DataError: either file is missing or damaged, or an id lies outside the vocabulary.
    """
    check_regular(path)
    tokenizer = load_tokenizer(path.with_name("tokenizer.json"))
    tokens = _map(path)
    digest = hashlib.sha256(f"{tokenizer.fingerprint()} {tokens.dtype.str} ".encode())
    for start in range(0, len(tokens), CHUNK):
        part = tokens[start : start + CHUNK]
        digest.update(part.data)
        outside = (part < 0) | (part >= tokenizer.vocab_size)
        if outside.any():
            position = int(outside.argmax())
            raise DataError(
                "a token id lies outside the tokenizer's vocabulary",
                where=f"{path}: token {start + position:,}",
                got=str(int(part[position])),
                expected=f"0 to {tokenizer.vocab_size - 1}",
                fix="make the token file with the tokenizer.json beside it",
            )
    return tokens, tokenizer, digest.hexdigest()


def _map(path: Path) -> np.ndarray:
    fix = "save it anew, as with numpy.save"
    try:
        # Reads .npy alone: neither pickles nor archives of arrays, which numpy.load also opens.
        tokens = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # numpy parses the header as Python: a damaged one raises anything
        raise DataError(
            "the token file cannot be read", where=str(path), got=str(error), fix=fix
        ) from error
    if tokens.ndim != 1 or tokens.dtype.kind not in "ui":
        raise DataError(
            "a token file holds one row of integers",
            where=str(path),
            got=f"shape {tokens.shape}, {tokens.dtype}",
            fix=fix,
        )
    if tokens.size == 0:
        raise DataError("the token file is empty", where=str(path), got="0 tokens", fix=fix)
    size, whole = path.stat().st_size, tokens.offset + tokens.nbytes
    if size != whole:
        raise DataError(
            "the token file goes on after its last token, so it was not written in one piece",
            where=str(path),
            got=f"{size:,} bytes",
            expected=f"{whole:,} bytes",
            fix=fix,
        )
    return tokens
