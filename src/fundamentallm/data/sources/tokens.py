"""Token ids: a token file, or a folder that `prepare` wrote."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np

from fundamentallm.data.paths import existing
from fundamentallm.data.prepared import PARTS, WHOLE, read_prepared
from fundamentallm.data.sources.base import Passage, SequenceSource, split_tokens, within
from fundamentallm.data.token_file import Tokens, read_tokens
from fundamentallm.data.tokenizer import Tokenizer

CHUNK = 1 << 20  # ids read at once


class _Ids(SequenceSource):
    """Ids that were made before, with their own tokenizer."""

    def beginning(self, tokenizer: Tokenizer) -> str:
        """Return the text of the first 1,000 ids to train on."""
        ids = self.parts(tokenizer, (1.0, 0.0, 0.0))["train"]
        return tokenizer.decode(np.asarray(ids[:1_000]))

    def passages(
        self, part: str, tokenizer: Tokenizer, fractions: Sequence[float]
    ) -> Iterator[Passage]:
        """Yield the documents of a part; none where nothing marks an end."""
        if self.end_id is None:
            return
        tokens = self.parts(tokenizer, fractions)[part]
        document, size = blake2b(digest_size=12), 0
        for start in range(0, len(tokens), CHUNK):
            ids = np.ascontiguousarray(tokens[start : start + CHUNK])
            begin = 0
            for end in np.flatnonzero(ids == self.end_id).tolist():
                document.update(ids[begin:end].data)
                yield Passage(size + end - begin, document.digest())
                document, size, begin = blake2b(digest_size=12), 0, end + 1
            document.update(ids[begin:].data)
            size += len(ids) - begin
        if size:
            yield Passage(size, document.digest())

    def texts(
        self, part: str, tokenizer: Tokenizer, fractions: Sequence[float], limit: int
    ) -> Iterator[tuple[str, str]]:
        """Yield the documents of a part; one where nothing marks where they end."""

        def decoded(ids: np.ndarray) -> str:
            text = tokenizer.decode(ids[:limit])
            return tokenizer.decode(ids) if len(ids) > limit > len(text) else text

        # A character has four bytes at most, and so it has four ids at most.
        ids = np.asarray(self.parts(tokenizer, fractions)[part][: 4 * limit])
        ends = [] if self.end_id is None else np.flatnonzero(ids == self.end_id).tolist()
        documents = (
            (f"{self.name}: document {number:,}", decoded(ids[begin + 1 : end]))
            for number, (begin, end) in enumerate(itertools.pairwise([-1, *ends, len(ids)]), 1)
            if end > begin + 1
        )
        yield from within(documents, limit)


@dataclass(frozen=True)
class TokenSource(_Ids):
    """Ids that are split by position.

    Attributes:
        tokens: (N,), in a file or in memory.
    """

    tokens: Tokens

    def parts(self, tokenizer: Tokenizer, fractions: Sequence[float]) -> dict[str, Tokens]:
        """Return the ids of each part."""
        return split_tokens(self.tokens, fractions)

    def validation_in_words(self, fractions: Sequence[float]) -> str:
        """Say that it is cut by position."""
        return f"{100 * fractions[1]:g} % of the tokens, by position"


@dataclass(frozen=True)
class SplitTokenSource(_Ids):
    """Ids of a folder that was split by document when it was prepared.

    Attributes:
        splits: some of train, val and test.
    """

    splits: Mapping[str, Tokens]

    @property
    def has_own_split(self) -> bool:
        """It has."""
        return True

    def parts(self, tokenizer: Tokenizer, fractions: Sequence[float]) -> dict[str, Tokens]:
        """Return the ids of each part, whose shares were chosen when it was prepared."""
        empty = np.empty(0, np.uint8)
        return {part: self.splits.get(part, empty) for part in PARTS}

    def validation_in_words(self, fractions: Sequence[float]) -> str:
        """Say that whole documents were drawn."""
        sizes = {part: len(tokens) for part, tokens in self.splits.items()}
        share = 100 * sizes.get("val", 0) / max(1, sum(sizes.values()))
        return f"documents drawn when the text was prepared, {share:.1f} % of the tokens"


def read_token_source(name: str) -> TokenSource | SplitTokenSource:
    """Open a token file or a folder that `prepare` wrote.

    Raises:
        DataError: as `read_tokens` and `read_prepared`.
    """
    path = existing(name)
    if not path.is_dir():
        read = read_tokens(path)
        return TokenSource(
            name, read.sha256, read.ids, tokenizer=read.tokenizer, end_id=read.end_id
        )
    folder = read_prepared(path)
    whole = folder.tokens.get(WHOLE)
    made_with: dict[str, Any] = {"tokenizer": folder.tokenizer, "end_id": folder.end_id}
    if whole is None:
        return SplitTokenSource(name, folder.sha256, folder.tokens, **made_with)
    return TokenSource(name, folder.sha256, whole, **made_with)
