"""Where text comes from: built-in sources, files, folders, token files.

Whatever is wrong with a source is said before anything is trained or written.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fundamentallm.cache_directory import default_cache_dir
from fundamentallm.config.data import SourceConfig
from fundamentallm.data.download import download, sha256_of
from fundamentallm.data.examples import SUFFIX as EXAMPLES_SUFFIX
from fundamentallm.data.examples import Example, digest, read_examples
from fundamentallm.data.prepared import PARTS, WHOLE, is_prepared, read_prepared
from fundamentallm.data.text_file import check_regular, read_text, to_utf8, unreadable
from fundamentallm.data.token_file import SUFFIX as TOKENS_SUFFIX
from fundamentallm.data.token_file import FileTokens, Tokens, read_tokens
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
        text: the whole text; empty for token files.
        pieces: for each file in order its name, first character and length in characters (in
            tokens for a token file).
        sha256: of the text's UTF-8 bytes, or of a token file's ids and tokenizer.
        built_in: whether any of it is one of `SOURCES`, which can change with Python or a
            download.
        tokens: (N,) the ids of a token file, or of a prepared folder split by position, else None.
        tokenizer: the token file's, else None.
        examples: of prompt and response; None for text and token files. `text` is then all of
            theirs, joined, and `sha256` is over the pairs.
        splits: the ids of a prepared folder split by document: some of train, val and test.
        end_id: the id behind each document, where the ids have one.
        mixture: for weighted sources, the weight of each and what it is; `text` is then that of
            all of them that are text, joined, and the tokenizer that of the others.
    """

    text: str
    pieces: list[tuple[str, int, int]]
    sha256: str
    built_in: bool = False
    tokens: FileTokens | None = None
    tokenizer: Tokenizer | None = None
    examples: list[Example] | None = None
    splits: dict[str, FileTokens] | None = None
    end_id: int | None = None
    mixture: tuple[tuple[float, Corpus], ...] = ()

    @property
    def members(self) -> list[Corpus]:
        """The weighted sources; the corpus itself where there are none."""
        return [member for _, member in self.mixture] or [self]

    @property
    def name(self) -> str:
        """What it was read from."""
        return ", ".join(name for name, _, _ in self.pieces)

    def parts(self, tokenizer: Tokenizer, fractions: Sequence[float]) -> dict[str, Tokens]:
        """Return the ids for training, validation and test of a source that is no mixture.

        Args:
            tokenizer: encodes a text.
            fractions: of train, val and test by position; a folder split by document has its own.

        Raises:
            DataError: a text cannot be encoded; `where` begins with its file.
        """
        if self.splits is not None:
            return {name: self.splits.get(name, np.empty(0, np.uint8)) for name in PARTS}
        tokens: Tokens = self._encoded(tokenizer) if self.tokens is None else self.tokens
        return split_tokens(tokens, fractions)

    def _encoded(self, tokenizer: Tokenizer) -> np.ndarray:
        try:
            return tokenizer.encode(self.text)
        except DataError:
            for name, first, length in self.pieces:  # which of the files is it?
                try:
                    tokenizer.encode(self.text[first : first + length])
                except DataError as error:
                    error.where = f"{name}: {error.where}" if error.where else name
                    raise
            raise


def read_source(
    source: str | Sequence[str] | Sequence[SourceConfig],
    cache_dir: Path | None = None,
    kept: Path | None = None,
    *,
    response_end: str | None = None,
) -> Corpus:
    """Read a built-in source, a file, a folder, a token file, a prepared folder, or a list.

    Files of examples (.jsonl, see `fundamentallm.data.examples`) stand alone or in a list of them.

    Args:
        source: a name in `SOURCES`, a path, or a list of these, whose texts are joined in that
            order with nothing between them; token files and prepared folders stand alone. Sources
            with weights are a mixture of whatever each is.
        cache_dir: where downloads are kept; `~/.cache/fundamentallm` if None.
        kept: a run's directory, whose copy of a built-in source is read in its place.
        response_end: as `end` in `read_examples`.

    Raises:
        DataError: the source does not exist, holds no text, or is not UTF-8 text.
    """
    entries: list[str | SourceConfig] = [source] if isinstance(source, str) else [*source]
    weights = [entry.weight for entry in entries if isinstance(entry, SourceConfig)]
    names = [_local(entry, cache_dir) for entry in entries]
    if not any(weight is not None for weight in weights):
        return _read_joined(names, cache_dir, kept, response_end)
    members = [_read_joined([name], cache_dir, kept, response_end) for name in names]
    return _mixed([float(weight or 0) for weight in weights], members)


def kept_copy(run: Path, name: str) -> Path:
    """Return where a run keeps its copy of a built-in source."""
    return run / f"corpus-{name}.txt"


def _local(entry: str | SourceConfig, cache_dir: Path | None) -> str:
    """Return the name or path of a source, downloaded and checked against its hash."""
    if isinstance(entry, str):
        return entry
    if entry.url is not None:
        assert entry.sha256 is not None
        basename = entry.url.partition("?")[0].rstrip("/").rpartition("/")[2] or "download"
        basename = re.sub(r"[^A-Za-z0-9._-]", "_", basename)[-100:]
        path = (cache_dir or default_cache_dir()) / f"{entry.sha256[:16]}-{basename}"
        return str(download(entry.url, entry.sha256, path))
    if entry.path is not None and entry.sha256 is not None:
        path = existing(entry.path)
        check_regular(path)
        found = sha256_of(path)
        if found != entry.sha256:
            raise DataError(
                "the file is not the one that the configuration names",
                where=entry.path,
                got=f"SHA-256 {found}",
                expected=f"SHA-256 {entry.sha256}",
                fix="put the right file there, or correct sha256",
            )
    return entry.text


def _mixed(weights: list[float], members: list[Corpus]) -> Corpus:
    if any(member.examples is not None for member in members):
        raise DataError(
            "examples cannot be mixed by weight",
            where=", ".join(member.name for member in members if member.examples is not None),
            fix="leave out the weights, and name files of examples alone",
        )
    made = [member for member in members if member.tokenizer is not None]
    for member in made[1:]:
        first, own = made[0].tokenizer, member.tokenizer
        assert first is not None
        assert own is not None
        if own.fingerprint() != first.fingerprint():
            raise DataError(
                "the sources were made with different tokenizers",
                where=f"{made[0].name} and {member.name}",
                got=f"tokenizer {own.fingerprint()[:16]}",
                expected=f"tokenizer {first.fingerprint()[:16]}",
                fix="prepare all of them with one tokenizer: --tokenizer FOLDER/tokenizer.json",
            )
    digest = hashlib.sha256(
        json.dumps(
            [[weight, member.sha256] for weight, member in zip(weights, members, strict=True)]
        ).encode()
    )
    ends = {member.end_id for member in members}
    return Corpus(
        "".join(member.text for member in members),
        [piece for member in members for piece in member.pieces],
        digest.hexdigest(),
        any(member.built_in for member in members),
        tokenizer=made[0].tokenizer if made else None,
        end_id=ends.pop() if len(ends) == 1 else None,
        mixture=tuple(zip(weights, members, strict=True)),
    )


def _read_joined(
    names: Sequence[str], cache_dir: Path | None, kept: Path | None, response_end: str | None
) -> Corpus:
    made = [name for name in names if _is_tokens(name)]
    if made:
        if len(names) > 1:
            raise DataError(
                "token files cannot be joined with other sources",
                where=", ".join(made),
                fix="name one alone in data.source, or give each of data.sources a weight",
            )
        return _read_tokens(names[0])
    if any(name.endswith(EXAMPLES_SUFFIX) for name in names):
        return _read_examples(names, response_end)
    parts = []
    pieces = []
    position = 0
    for origin, text in (part for name in names for part in _texts(name, cache_dir, kept)):
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


def _is_tokens(name: str) -> bool:
    return name.endswith((NUMPY_SUFFIX, TOKENS_SUFFIX)) or is_prepared(_expanded(name))


def _read_tokens(name: str) -> Corpus:
    path = existing(name)
    if not path.is_dir():
        read = read_tokens(path)
        return Corpus(
            "",
            [(name, 0, len(read.ids))],
            read.sha256,
            tokens=read.ids,
            tokenizer=read.tokenizer,
            end_id=read.end_id,
        )
    prepared = read_prepared(path)
    pieces = [(name, 0, sum(map(len, prepared.tokens.values())))]
    whole = prepared.tokens.get(WHOLE)
    return Corpus(
        "",
        pieces,
        prepared.sha256,
        tokens=whole,
        tokenizer=prepared.tokenizer,
        splits=None if whole is not None else prepared.tokens,
        end_id=prepared.end_id,
    )


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
        own = read_examples(existing(name), response_end)
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


def split_tokens(tokens: Tokens, fractions: Sequence[float]) -> dict[str, Tokens]:
    """Cut tokens into contiguous parts by position; views that share no token.

    A part ends at the whole token at or before its share; the last part that is not empty ends
    where the tokens end.

    Args:
        tokens: (N,).
        fractions: of train, val and test, which add up to 1.

    Returns:
        `train`, `val` and `test`; a part of fraction 0 is empty.
    """
    bounds = split_bounds(len(tokens), fractions)
    parts = [tokens[begin:end] for begin, end in itertools.pairwise(bounds)]
    return dict(zip(PARTS, parts, strict=True))


def split_bounds(length: int, fractions: Sequence[float]) -> list[int]:
    """Return where the parts of `split_tokens` begin, and where the last ends."""
    bounds = [0]
    for share in itertools.accumulate(fractions):
        # 0.29 of 100 tokens is 28.999999999999996 in binary and must still be 29.
        bounds.append(min(length, int(share * length + 1e-6)))
    # Fractions may miss 1 by a rounding error, which must neither lose tokens nor fill a part of 0.
    last = max(index for index, fraction in enumerate(fractions) if fraction > 0)
    bounds[last + 1 :] = [length] * (len(fractions) - last)
    return bounds


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
    return read_text(download(url, TINYSHAKESPEARE_SHA256, path))


def _texts(name: str, cache_dir: Path | None, kept: Path | None) -> Iterator[tuple[str, str]]:
    """Yield name and text of everything that a source stands for."""
    if name in SOURCES:
        if kept is not None and kept_copy(kept, name).exists():
            yield name, read_text(kept_copy(kept, name))
            return
        yield name, SOURCES.build(name, {}, cache_dir=cache_dir)
        return
    for path in _files(name):
        yield str(path), read_text(path)


def _files(name: str) -> list[Path]:
    """Return the files that a path stands for, those of a folder sorted."""
    path = existing(name)
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


def existing(name: str) -> Path:
    """Return a path that the system knows, `~` expanded.

    Raises:
        DataError: nothing is there, or it cannot be reached.
    """
    path = _expanded(name)
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


def _expanded(name: str) -> Path:
    path = Path(name)
    with contextlib.suppress(RuntimeError):  # "~notes.txt" looks like the home of a user
        path = path.expanduser()
    return path
