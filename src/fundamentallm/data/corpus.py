"""Where text comes from: built-in sources, files, folders, token files.

Whatever is wrong with a source is said before anything is trained or written.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fundamentallm.data.download import default_cache_dir, download
from fundamentallm.data.examples import SUFFIX as EXAMPLES_SUFFIX
from fundamentallm.data.examples import Example, digest, read_examples
from fundamentallm.data.text_file import read_text, to_utf8, unreadable
from fundamentallm.data.token_file import read_tokens
from fundamentallm.data.tokenizer import Tokenizer
from fundamentallm.errors import DataError, did_you_mean
from fundamentallm.registry import Registry

SOURCES: Registry[str] = Registry("data source", supplied=("cache_dir",))

TEXT_SUFFIXES = (".txt", ".md")
NUMPY_SUFFIX = ".npy"

TINYSHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
TINYSHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


@dataclass(frozen=True)
class Corpus:
    """A source, read.

    Attributes:
        text: the whole text; empty for a token file.
        pieces: for each file in order its name, first character and length in characters (in
            tokens for a token file).
        sha256: of the text's UTF-8 bytes, or of a token file's ids and tokenizer.
        built_in: whether any of it is one of `SOURCES`, which can change with Python or a
            download.
        tokens: (N,) memory-mapped token ids of a token file, else None.
        tokenizer: the token file's, else None.
        examples: of prompt and response; None for text and token files. `text` is then all of
            theirs, joined, and `sha256` is over the pairs.
    """

    text: str
    pieces: list[tuple[str, int, int]]
    sha256: str
    built_in: bool = False
    tokens: np.ndarray | None = None
    tokenizer: Tokenizer | None = None
    examples: list[Example] | None = None


def read_source(
    source: str | Sequence[str],
    cache_dir: Path | None = None,
    *,
    response_end: str | None = None,
) -> Corpus:
    """Read a built-in source, a file, a folder, a token file (.npy), or a list of texts.

    Files of examples (.jsonl, see `fundamentallm.data.examples`) stand alone or in a list of them.

    Args:
        source: a name in `SOURCES`, a path, or a list of these, whose texts are joined in that
            order with nothing between them; a token file stands alone.
        cache_dir: where downloads are kept; `~/.cache/fundamentallm` if None.
        response_end: as `end` in `read_examples`.

    Raises:
        DataError: the source does not exist, holds no text, or is not UTF-8 text.
    """
    names = [source] if isinstance(source, str) else list(source)
    if any(name.endswith(NUMPY_SUFFIX) for name in names):
        if len(names) > 1:
            raise DataError(
                "a token file cannot be joined with other sources",
                where=", ".join(names),
                fix=f"name the {NUMPY_SUFFIX} file alone, or text files alone, in data.source",
            )
        tokens, tokenizer, sha256 = read_tokens(_existing(names[0]))
        return Corpus("", [(names[0], 0, len(tokens))], sha256, False, tokens, tokenizer)
    if any(name.endswith(EXAMPLES_SUFFIX) for name in names):
        return _read_examples(names, response_end)
    parts = []
    pieces = []
    position = 0
    for origin, text in (part for name in names for part in _texts(name, cache_dir)):
        parts.append(text)
        pieces.append((origin, position, len(text)))
        position += len(text)
    text = "".join(parts)
    if not text or text.isspace():
        raise DataError(
            "there is no text in the source",
            where=", ".join(names),
            got="only white space" if text else "0 characters",
            fix="name a file or folder with text in data.source",
        )
    sha256 = hashlib.sha256(to_utf8(text)).hexdigest()
    return Corpus(text, pieces, sha256, built_in=any(name in SOURCES for name in names))


def _read_examples(names: Sequence[str], response_end: str | None) -> Corpus:
    others = [name for name in names if not name.endswith(EXAMPLES_SUFFIX)]
    if others:
        raise DataError(
            "examples cannot be joined with text, which has no prompts to mask",
            where=", ".join(others),
            fix=f"name {EXAMPLES_SUFFIX} files alone in data.source",
        )
    examples: list[Example] = []
    pieces = []
    position = 0
    for name in names:
        own = read_examples(_existing(name), response_end)
        length = sum(len(example.prompt) + len(example.response) for example in own)
        pieces.append((name, position, length))
        position += length
        examples += own
    if not examples:
        raise DataError(
            "there is no example in the source",
            where=", ".join(names),
            got="0 lines",
            fix="name a file with one JSON object a line in data.source",
        )
    text = "".join(example.prompt + example.response for example in examples)
    return Corpus(text, pieces, digest(examples), examples=examples)


def split_tokens(tokens: np.ndarray, fractions: Sequence[float]) -> dict[str, np.ndarray]:
    """Cut tokens into contiguous parts by position; views that share no token.

    A part ends at the whole token at or before its share; the last part that is not empty ends
    where the tokens end.

    Args:
        tokens: (N,).
        fractions: of train, val and test, which add up to 1.

    Returns:
        `train`, `val` and `test`; a part of fraction 0 is empty.
    """
    bounds = [0]
    for share in itertools.accumulate(fractions):
        # 0.29 of 100 tokens is 28.999999999999996 in binary and must still be 29.
        bounds.append(min(len(tokens), int(share * len(tokens) + 1e-6)))
    # Fractions may miss 1 by a rounding error, which must neither lose tokens nor fill a part of 0.
    last = max(index for index, fraction in enumerate(fractions) if fraction > 0)
    bounds[last + 1 :] = [len(tokens)] * (len(fractions) - last)
    parts = [tokens[begin:end] for begin, end in itertools.pairwise(bounds)]
    return dict(zip(("train", "val", "test"), parts, strict=True))


@SOURCES.register("python-docs")
def python_docs() -> str:
    """The language reference inside every CPython, about 465,000 characters of English.

    The text differs a little between releases of Python.

    Raises:
        DataError: this Python comes without it.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError(
            "this Python lacks its own documentation (pydoc_data)",
            where="python-docs",
            fix="install the standard library's documentation, or name a text in data.source",
        ) from error
    return "\n\n".join(topics[name] for name in sorted(topics))


@SOURCES.register("tinyshakespeare")
def tinyshakespeare(cache_dir: Path | None = None) -> str:
    """1.1 M characters of Shakespeare's plays, downloaded once and checked by SHA-256.

    The environment variable FUNDAMENTALLM_TINYSHAKESPEARE_URL names a mirror.

    Args:
        cache_dir: where it is kept; `~/.cache/fundamentallm` if None.

    Raises:
        DataError: it cannot be downloaded, or is not what it should be.
    """
    url = os.environ.get("FUNDAMENTALLM_TINYSHAKESPEARE_URL", TINYSHAKESPEARE_URL)
    path = (cache_dir or default_cache_dir()) / "tinyshakespeare.txt"
    return download(url, TINYSHAKESPEARE_SHA256, path).decode("utf-8")


def _texts(name: str, cache_dir: Path | None) -> Iterator[tuple[str, str]]:
    """Yield name and text of everything that a source stands for."""
    if name in SOURCES:
        yield name, SOURCES.build(name, {}, cache_dir=cache_dir)
        return
    for path in _files(name):
        yield str(path), read_text(path)


def _files(name: str) -> list[Path]:
    """Return the files that a path stands for, those of a folder sorted."""
    path = _existing(name)
    if not path.is_dir():
        return [path]

    def refuse(error: OSError) -> None:
        raise unreadable(Path(error.filename or path), error) from error

    found = sorted(
        Path(parent, file)
        for parent, _, files in os.walk(path, onerror=refuse)
        for file in files
        if Path(file).suffix.lower() in TEXT_SUFFIXES
    )
    if not found:
        raise DataError(
            "there is no text in this folder",
            where=name,
            expected="files that end in " + " or ".join(TEXT_SUFFIXES),
            fix="name the files themselves in data.source",
        )
    return found


def _existing(name: str) -> Path:
    path = Path(name)
    with contextlib.suppress(RuntimeError):  # "~notes.txt" looks like the home of a user
        path = path.expanduser()
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in the name
        raise DataError(
            "no such file or folder",
            where=name,
            expected="a path, or one of " + ", ".join(SOURCES.names()),
            fix=did_you_mean(name, SOURCES.names()) or f"the path is taken from {Path.cwd()}",
        ) from None
    except OSError as error:
        raise unreadable(path, error) from error
    return path
