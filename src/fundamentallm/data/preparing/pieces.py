"""Documents, cut into pieces that are encoded one by one."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from fundamentallm.data.documents import Document, Fingerprint, Input, InputReader
from fundamentallm.data.prepared import PARTS, WHOLE
from fundamentallm.data.preparing.options import Options
from fundamentallm.data.text_file import MOST_NAMED, raise_all
from fundamentallm.data.tokenizer import Tokenizer
from fundamentallm.errors import DataError

BATCH = 1 << 20  # characters under way in one thread
# Of a document that its tokenizer cannot cut, and of many such at once: the library needs some 100
# bytes a character meanwhile, and all of `prepare` is to stay below 400 MB.
LONGEST_WHOLE = 1 << 20
BATCH_WHOLE = 1 << 18


@dataclass
class Counts:
    """Counts of what was read.

    Attributes:
        documents, characters, tokens: how many; an end is a token.
        empty: documents without a character, which are left out.
        seen: whether there was anything but white space.
        duplicates: documents that are equal to an earlier one.
    """

    documents: int = 0
    characters: int = 0
    tokens: int = 0
    empty: int = 0
    seen: bool = False
    duplicates: int = 0


@dataclass
class Pieces:
    """Some pieces of documents that are encoded in one go.

    Attributes:
        texts: one after the other.
        parts: which file each belongs to.
        ends: whether a document ends with it.
        wheres: the documents.
        size: characters.
    """

    texts: list[str] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)
    ends: list[bool] = field(default_factory=list)
    wheres: list[str] = field(default_factory=list)
    size: int = 0


def read_documents(
    inputs: Sequence[Input],
    text_field: str,
    fingerprints: list[Fingerprint],
    on_bytes: Callable[[int], object],
) -> Iterator[Document]:
    """Yield the documents of all inputs, and note what each input was.

    Once an input is found to be bad nothing more is yielded: the others are looked at, and all bad
    ones are raised together.

    Raises:
        DataError: as from `InputReader`; of several inputs, the message has a line for each.
    """
    faults: list[DataError] = []
    for source in inputs:
        reader = InputReader(source, text_field, on_bytes)
        try:
            for document in reader.documents():
                chunks = _noting(document.chunks, faults)
                if not faults:
                    yield Document(document.where, chunks)
                for _ in chunks:  # what was not asked for
                    pass
        except DataError as error:
            faults.append(error)
        if len(faults) >= MOST_NAMED:
            break
        if not faults:
            assert reader.fingerprint is not None
            fingerprints.append(reader.fingerprint)
    raise_all(faults, f"of {len(inputs):,} inputs cannot be prepared")


def _noting(chunks: Iterable[str], faults: list[DataError]) -> Iterator[str]:
    """Yield chunks up to a fault, which is noted."""
    try:
        yield from chunks
    except DataError as error:
        faults.append(error)


def cut(
    documents: Iterable[Document], tokenizer: Tokenizer, options: Options, counts: Counts
) -> Iterator[Pieces]:
    """Yield pieces of documents, enough for one go each; count the documents."""
    hashes = array(
        "Q"
    )  # 64 bits of each: a false duplicate in 5 million has odds of 1 to a million
    batch = Pieces()
    most = BATCH_WHOLE if reads_whole(tokenizer) else BATCH
    for document in documents:
        digest = hashlib.blake2b(digest_size=8)
        part = ""
        size = 0
        try:
            for piece in tokenizer.pieces(document.chunks, LONGEST_WHOLE):
                data = piece.encode("utf-8")
                digest.update(data)
                # By its beginning, so that equal documents go to the same part.
                part = part or _part_of(data, options)
                size += len(piece)
                counts.seen = counts.seen or not piece.isspace()
                if batch.texts and batch.size + len(piece) > most:
                    yield batch
                    batch = Pieces()
                batch.texts.append(piece)
                batch.parts.append(part)
                batch.ends.append(False)
                batch.wheres.append(document.where)
                batch.size += len(piece)
        except DataError as error:
            error.where = error.where or document.where
            raise
        if not size:
            counts.empty += 1
            continue
        batch.ends[-1] = True
        counts.documents += 1
        counts.characters += size
        hashes.append(int.from_bytes(digest.digest(), "little"))
    if batch.texts:
        yield batch
    counts.duplicates = len(hashes) - len(np.unique(np.array(hashes, np.uint64)))


def reads_whole(tokenizer: Tokenizer) -> bool:
    """Tell whether a tokenizer reads a document in one piece: it cuts no plain text."""
    return not tokenizer.find_cut("plain text " * 9)


def _part_of(data: bytes, options: Options) -> str:
    if options.split == "position":
        return WHOLE
    drawn = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") / 2**64
    bound = 0.0
    for name, fraction in zip(PARTS, options.fractions, strict=True):
        bound += fraction
        if drawn < bound:
            return name
    return PARTS[0]  # fractions that miss 1 by a rounding error


def no_text(inputs: Sequence[Input], num_blank: int = 0) -> DataError:
    """Return the error for inputs without text; `num_blank` documents hold only white space."""
    return DataError(
        "the inputs hold no text",
        where=", ".join(source.name for source in inputs[:5]),
        got="only white space" if num_blank else "only empty documents",
        fix="name files with text",
    )
