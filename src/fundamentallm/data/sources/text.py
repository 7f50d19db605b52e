"""Text: files, folders and built-in sources, joined with nothing between them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fundamentallm.data.built_in import SOURCES
from fundamentallm.data.paths import no_text, text_files
from fundamentallm.data.prepared import PARTS
from fundamentallm.data.sources.base import (
    MANY,
    Passage,
    SequenceSource,
    draw_parts,
    part_bounds,
    split_tokens,
    within,
)
from fundamentallm.data.text_file import read_text, read_texts, to_utf8
from fundamentallm.data.token_file import Tokens
from fundamentallm.data.tokenizer import Tokenizer, changes_texts
from fundamentallm.errors import DataError
from fundamentallm.files.private import check_file
from fundamentallm.files.run_layout import CORPUS, corpus_of

SHORTEST_PASSAGE = 400  # characters of a paragraph or line that is looked for in other parts

_PARAGRAPHS = re.compile(r"\n\s*\n")


class Piece(NamedTuple):
    """One file of a text: its name, first character and length in characters."""

    name: str
    start: int
    length: int


@dataclass(frozen=True)
class TextSource(SequenceSource):
    """One text.

    Attributes:
        contents: all of it.
        pieces: its files in order.
        built_in: whether any of it is one of `SOURCES`, which can change with Python or a
            download.
        by_position: split as one text, however many files it has.
    """

    contents: str
    pieces: list[Piece]
    built_in: bool = False
    by_position: bool = False

    @classmethod
    def of(
        cls, files: Sequence[tuple[str, str]], built_in: bool = False, by_position: bool = False
    ) -> TextSource:
        """Return the source of the names and texts of files, in order.

        Raises:
            DataError: a text holds half of a surrogate pair.
        """
        pieces = []
        position = 0
        for name, text in files:
            pieces.append(Piece(name, position, len(text)))
            position += len(text)
        joined = "".join(text for _, text in files)
        name = ", ".join(name for name, _ in files)
        return cls(
            name, hashlib.sha256(to_utf8(joined)).hexdigest(), joined, pieces, built_in, by_position
        )

    @classmethod
    def read(cls, names: Sequence[str], cache_dir: Path | None, kept: Path | None) -> TextSource:
        """Read files, folders and built-in sources; arguments as of `read_source`.

        Raises:
            DataError: one cannot be read, or there is no text.
        """
        files = [part for name in names for part in _texts(name, cache_dir, kept)]
        if all(not text or text.isspace() for _, text in files):
            some = any(text for _, text in files)
            raise no_text(names, "only white space" if some else "0 characters")
        return cls.of(files, built_in=any(name in SOURCES for name in names))

    @property
    def text(self) -> str:
        """All of it."""
        return self.contents

    def beginning(self, tokenizer: Tokenizer) -> str:
        """Return its first 1,000 characters."""
        return self.contents[:1_000]

    def encode(self, tokenizer: Tokenizer) -> np.ndarray:
        """Return the ids of all of it, (N,).

        Raises:
            DataError: it cannot be encoded; `where` begins with the file.
        """
        try:
            return tokenizer.encode(self.contents)
        except DataError:
            for name, start, length in self.pieces:  # which of the files is it?
                try:
                    tokenizer.encode(self.contents[start : start + length])
                except DataError as error:
                    error.where = f"{name}: {error.where}" if error.where else name
                    raise
            raise

    def files(self) -> list[TextSource]:
        """Return each of its files as a source."""
        return [
            TextSource.of([(name, self.contents[start : start + length])])
            for name, start, length in self.pieces
        ]

    def units(self, fractions: Sequence[float]) -> list[tuple[TextSource, str | None]]:
        """Return what is split, in order, and the part that the whole of it belongs to.

        A single text is cut by position, and so is each of a few files, so that every kind of text
        is in every part; the part is None then. Of `MANY` files and more each is in one part.

        Args:
            fractions: of train, val and test.
        """
        if self.by_position or len(self.pieces) == 1:
            return [(self, None)]
        files = self.files()
        if len(files) < MANY:
            return [(file, None) for file in files]
        parts = draw_parts([(file.sha256, len(file.contents)) for file in files], fractions)
        return list(zip(files, parts, strict=True))

    def parts(self, tokenizer: Tokenizer, fractions: Sequence[float]) -> dict[str, Tokens]:
        """Return the ids of its parts, (N,) each, the files in order."""
        found: dict[str, list[np.ndarray]] = {part: [] for part in PARTS}
        for unit, own in self.units(fractions):
            ids = unit.encode(tokenizer)
            split = split_tokens(ids, fractions) if own is None else {own: ids}
            for part, tokens in split.items():
                found[part].append(np.asarray(tokens))
        empty = np.empty(0, np.uint8)
        return {
            part: (pieces[0] if len(pieces) == 1 else np.concatenate(pieces)) if pieces else empty
            for part, pieces in found.items()
        }

    def passages(
        self, part: str, tokenizer: Tokenizer, fractions: Sequence[float]
    ) -> Iterator[Passage]:
        """Yield the files of a part, with their long paragraphs and lines."""
        for _, text in self._files_of(part, fractions):
            if text.strip():
                yield _passage(text, tuple(_paragraphs(text)))

    def texts(
        self, part: str, tokenizer: Tokenizer, fractions: Sequence[float], limit: int
    ) -> Iterator[tuple[str, str]]:
        """Yield the files of a part."""
        changes = changes_texts(tokenizer)
        for name, text in within(self._files_of(part, fractions, limit), limit):
            yield name, tokenizer.decode(tokenizer.encode(text)) if changes else text

    def _files_of(
        self, part: str, fractions: Sequence[float], limit: int | None = None
    ) -> Iterator[tuple[str, str]]:
        """Yield name and text of the files of a part, at most `limit` characters of each.

        The ends of a part are taken in characters, which is where the tokens are cut or nearly so.
        """
        for unit, own_part in self.units(fractions):
            if own_part not in (None, part):
                continue
            own = slice(0, len(unit.contents))
            if own_part is None:
                own = part_bounds(len(unit.contents), fractions, part)
            for name, start, length in unit.pieces:
                begin, end = max(start, own.start), min(start + length, own.stop)
                yield name, unit.contents[begin : end if limit is None else min(end, begin + limit)]

    def validation_in_words(self, fractions: Sequence[float]) -> str:
        """Say what the validation part consists of."""
        units = self.units(fractions)
        share = f"{100 * fractions[1]:g} %"
        if len(units) == 1:
            return f"{share} of the text, by position"
        if units[0][1] is None:
            return f"{share} at the end of each of {len(units):,} files"
        own = [unit for unit, part in units if part == "val"]
        size = sum(len(unit.contents) for unit in own)
        names = ", ".join(unit.name for unit in own[:5]) + (", ..." if len(own) > 5 else "")
        return (
            f"{len(own):,} of {len(units):,} files, {100 * size / len(self.contents):.1f} % of the"
            f" text ({names})"
        )

    def kept_texts(self) -> dict[str, str]:
        """Return the text of what is built in, by itself where there is more."""
        if len(self.pieces) == 1:
            return {CORPUS: self.contents} if self.built_in else {}
        return {
            corpus_of(name): self.contents[start : start + length]
            for name, start, length in self.pieces
            if name in SOURCES
        }


def _passage(text: str, inside: tuple[Passage, ...] = ()) -> Passage:
    encoded = text.strip().encode("utf-8", "surrogatepass")
    return Passage(len(text), blake2b(encoded, digest_size=12).digest(), inside)


def _paragraphs(text: str) -> Iterator[Passage]:
    for paragraph in _PARAGRAPHS.split(text):
        if len(paragraph) >= SHORTEST_PASSAGE:
            lines = paragraph.split("\n")
            long = (_passage(line) for line in lines if len(line) >= SHORTEST_PASSAGE)
            yield _passage(paragraph, tuple(long))


def _texts(name: str, cache_dir: Path | None, kept: Path | None) -> Iterator[tuple[str, str]]:
    """Yield name and text of all texts of a source."""
    if name in SOURCES:
        if kept is not None and (copy := kept / corpus_of(name)).exists():
            check_file(copy, writing=False)
            yield name, read_text(copy)
            return
        yield name, SOURCES.build(name, {}, cache_dir=cache_dir)
        return
    yield from read_texts(text_files(name))
