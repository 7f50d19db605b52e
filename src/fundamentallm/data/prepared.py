"""A folder that `prepare` wrote: token files, their tokenizer.json, and prepare.json about them.

prepare.json      what was read, with which options, and what came of it
tokenizer.json    of the ids
all.tokens        split by position: all documents; or
train.tokens, val.tokens, test.tokens      split by document, as far as they have any
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fundamentallm.data.paths import PREPARED
from fundamentallm.data.text_file import read_text
from fundamentallm.data.token_file import FileTokens, read_tokens
from fundamentallm.data.tokenizer import TOKENIZER_FILE, Tokenizer, load_tokenizer
from fundamentallm.errors import DataError

WHOLE = "all"
PARTS = ("train", "val", "test")
FORMAT = 1


@dataclass(frozen=True)
class Prepared:
    """What a folder holds.

    Attributes:
        tokens: by "all", or by "train", "val" and "test".
        tokenizer: of the ids.
        end_id: the id behind each document.
        sha256: two folders share it if they hold the same ids for the same tokenizer.
    """

    tokens: dict[str, FileTokens]
    tokenizer: Tokenizer
    end_id: int | None
    sha256: str


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read prepare.json.

    Raises:
        DataError: it is not what `prepare` writes.
    """
    path = folder / PREPARED
    try:
        said = json.loads(read_text(path))
        if said["format"] != FORMAT:
            raise ValueError(f"format {said['format']}, not {FORMAT}")
        if not isinstance(said["files"], dict):
            raise ValueError("files is not a mapping")
        names = list(said["files"])
        if names != [WHOLE] and not set(names) <= set(PARTS):
            raise ValueError(f"files {names}")
        _check_types(said)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            "this folder is not what `prepare` writes",
            where=str(path),
            got=f"{type(error).__name__}: {error}",
            fix="prepare the text again, with another --out",
        ) from error
    manifest: dict[str, Any] = said
    return manifest


def _check_types(said: Mapping[str, Any]) -> None:
    """Raise a ValueError, KeyError or TypeError where a field is not as `prepare` writes it."""
    wanted: list[tuple[Any, str, type]] = [(said, "options", dict), (said, "tokenizer", str)]
    for entry in said["inputs"]:
        kinds = (("path", str), ("size", int), ("mtime_ns", int), ("sha256", str))
        wanted += [(entry, name, kind) for name, kind in kinds]
    for entry in said["files"].values():
        wanted += [(entry, "tokens", int), (entry, "sha256", str)]
    for place, name, kind in wanted:
        if type(place[name]) is not kind:
            raise ValueError(f"{name} is {place[name]!r:.50}")


def read_prepared(folder: Path) -> Prepared:
    """Open a folder, every id of it checked.

    Raises:
        DataError: a part of it is missing or damaged, or the parts do not belong together.
    """
    names = list(read_manifest(folder)["files"])
    tokenizer = load_tokenizer(folder / TOKENIZER_FILE)
    digest = hashlib.sha256()
    tokens = {}
    end_id = None
    for name in names:
        read = read_tokens(folder / f"{name}.tokens", tokenizer)
        tokens[name], end_id = read.ids, read.end_id
        digest.update(f"{name} {read.sha256} ".encode())
    return Prepared(tokens, tokenizer, end_id, digest.hexdigest())
