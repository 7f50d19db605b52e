"""What every kind of source can do, and how it is cut into parts."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from fundamentallm.data.loaders import (
    Batching,
    EpochLoader,
    TokenWindowLoader,
    ValidationBatches,
    ValidationLoader,
)
from fundamentallm.data.prepared import PARTS
from fundamentallm.data.token_file import Tokens
from fundamentallm.data.tokenizer import Tokenizer
from fundamentallm.errors import CheckpointError

MANY = 50
"""Documents from which on whole ones make up a part."""


class Loaders(NamedTuple):
    """The loaders of a source.

    Attributes:
        train: of the training part.
        validation: of the validation part; may be empty.
        num_tokens: of the whole source.
    """

    train: EpochLoader
    validation: ValidationBatches
    num_tokens: int


@dataclass(frozen=True)
class Passage:
    """Something of a part that may be equal to something of another part.

    Attributes:
        size: in the unit of its source: examples, characters or tokens.
        digest: equal for equal contents.
        inside: smaller passages to look for where this one is not found.
    """

    size: int
    digest: bytes
    inside: tuple[Passage, ...] = ()

    def digests(self) -> Iterator[bytes]:
        """Yield the digest of this and of all passages inside."""
        yield self.digest
        for passage in self.inside:
            yield from passage.digests()

    def size_within(self, known: set[bytes]) -> int:
        """Return how much of it has a digest among `known`."""
        if self.digest in known:
            return self.size
        return sum(passage.size_within(known) for passage in self.inside)


@dataclass(frozen=True)
class Source(ABC):
    """Data to train on, read and checked; each kind of source is a subclass.

    Attributes:
        name: what it was read from.
        sha256: equal for sources with the same contents.
        tokenizer: that its ids were made with; None for text.
        end_id: the id behind each document, None if nothing marks where one ends.
    """

    name: str
    sha256: str
    tokenizer: Tokenizer | None = field(default=None, kw_only=True)
    end_id: int | None = field(default=None, kw_only=True)

    @property
    def text(self) -> str:
        """All its text, from which a tokenizer can be built; empty for token ids."""
        return ""

    @property
    def has_own_split(self) -> bool:
        """Whether any of it was split when it was prepared."""
        return False

    @property
    def response_end(self) -> str | None:
        """The text that ends every response of its examples, if it has any."""
        return None

    @abstractmethod
    def beginning(self, tokenizer: Tokenizer) -> str:
        """Return some text from where it begins, about 1,000 characters or tokens of it."""

    @abstractmethod
    def loaders(
        self,
        tokenizer: Tokenizer,
        fractions: Sequence[float],
        batching: Batching,
        end_id: int | None = None,
    ) -> Loaders:
        """Cut the source into its parts and return the loaders for training and validation.

        Args:
            tokenizer: encodes text.
            fractions: of train, val and test.
            batching: the sizes, the seed and this rank.
            end_id: the id after each document, if documents are masked.

        Raises:
            DataError: there is too little, or something cannot be encoded.
        """

    @abstractmethod
    def validation_in_words(self, fractions: Sequence[float]) -> str:
        """Say what the validation part consists of."""

    @abstractmethod
    def passages(
        self, part: str, tokenizer: Tokenizer, fractions: Sequence[float]
    ) -> Iterator[Passage]:
        """Yield what a part ("train", "val" or "test") consists of, as far as known."""

    @abstractmethod
    def texts(
        self, part: str, tokenizer: Tokenizer, fractions: Sequence[float], limit: int
    ) -> Iterator[tuple[str, str]]:
        """Yield name and text of the documents of a part, as the tokenizer writes them.

        Args:
            part: "train", "val" or "test".
            tokenizer: of the ids.
            fractions: of train, val and test.
            limit: characters of all texts together; the part is read from its beginning.
        """

    def kept_texts(self) -> dict[str, str]:
        """Return file name and text of what a run keeps a copy of: text that can change."""
        return {}

    def require_unchanged(self, sha256: str, fix: str) -> None:
        """Refuse a source that differs from the one that a run started with.

        Args:
            sha256: of that one.
            fix: how to continue.

        Raises:
            CheckpointError: it is another.
        """
        if self.sha256 != sha256:
            raise CheckpointError(
                "the text differs from the one that the run started with",
                where=self.name,
                got=f"SHA-256 {self.sha256}",
                expected=f"SHA-256 {sha256}",
                fix=fix,
            )


class SequenceSource(Source):
    """A source whose parts are sequences of tokens, cut into sequences."""

    @abstractmethod
    def parts(self, tokenizer: Tokenizer, fractions: Sequence[float]) -> dict[str, Tokens]:
        """Return the ids of train, val and test, (N,) each.

        Args:
            tokenizer: encodes text.
            fractions: of the parts.

        Raises:
            DataError: a text cannot be encoded; `where` begins with its file.
        """

    def loaders(
        self,
        tokenizer: Tokenizer,
        fractions: Sequence[float],
        batching: Batching,
        end_id: int | None = None,
    ) -> Loaders:
        """Return loaders of step batches."""
        parts = self.parts(tokenizer, fractions)
        return Loaders(
            TokenWindowLoader(parts["train"], batching, end_id),
            ValidationLoader(parts["val"], batching, end_id),
            sum(map(len, parts.values())),
        )


def within(texts: Iterable[tuple[str, str]], limit: int) -> Iterator[tuple[str, str]]:
    """Yield names and texts until they have `limit` characters; the last one may be cut."""
    for name, text in texts:
        if limit <= 0:
            return
        yield name, text[:limit]
        limit -= len(text)


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


def draw_parts(documents: Sequence[tuple[str, int]], fractions: Sequence[float]) -> list[str]:
    """Return the part of each of many documents: whole ones, drawn by a hash of their contents.

    In the order of the hashes, a document goes to the test part, then to the validation part, as
    long as that brings the part nearer to its share; all others are for training. Equal documents
    are in the same part, and a new one moves only those near the ends of the shares.

    Args:
        documents: hash and size of each.
        fractions: of train, val and test.
    """
    sizes: dict[str, int] = {}
    for digest, size in documents:
        sizes[digest] = sizes.get(digest, 0) + size
    whole = sum(sizes.values())
    part_of = dict.fromkeys(sizes, "train")
    waiting = sorted(sizes)
    for part, share in (("test", fractions[2]), ("val", fractions[1])):
        left = share * whole
        for digest in [one for one in waiting if part_of[one] == "train"]:
            if 0 < sizes[digest] / 2 <= left:
                part_of[digest] = part
                left -= sizes[digest]
    return [part_of[digest] for digest, _ in documents]


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


def part_bounds(length: int, fractions: Sequence[float], part: str) -> slice:
    """Return the slice of a part of `split_tokens`."""
    number = PARTS.index(part)
    return slice(*split_bounds(length, fractions)[number : number + 2])
