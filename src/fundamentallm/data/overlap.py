"""How much of the validation text a model has read in training: equal documents in both parts.

A document is an example of prompt and response, what stands between two ends in prepared text, or
a file. Text that is not made of these is compared by its paragraphs and lines of `SHORTEST`
characters or more; so verses, dialogues and whatever was changed in a single character are not
found.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from hashlib import blake2b

import numpy as np

from fundamentallm.data.corpus import Corpus, split_bounds
from fundamentallm.data.tokenizer import Tokenizer

SHORTEST = 400
CHUNK = 1 << 20  # ids read at once

_TRAIN, _VAL = "train", "val"
_PARAGRAPHS = re.compile(r"\n\s*\n")


def overlap(corpus: Corpus, tokenizer: Tokenizer, fractions: Sequence[float]) -> float:
    """Return the share of the validation split that stands in documents of the training split.

    In examples, characters, or tokens; for text the split's ends are taken in characters, which is
    where the tokens are cut or nearly so. NaN where nothing can be compared.

    Args:
        corpus: the source.
        tokenizer: of the ids.
        fractions: of train, val and test.
    """
    if corpus.examples is not None:
        pairs = [(example.prompt, example.response) for example in corpus.examples]
        train, val = (pairs[_cut(len(pairs), fractions, part)] for part in (_TRAIN, _VAL))
        known = set(train)
        return _share(sum(pair in known for pair in val), len(val))
    if corpus.splits is not None:
        return 0.0  # equal documents went to the same part
    sources = [_Source(member, tokenizer, fractions) for member in corpus.members]
    # What is to be found is held, and not what there is to search: that may be all of a disk.
    wanted = {digest for source in sources for digest in source.digests(_VAL)}
    repeated = {
        digest for source in sources for digest in source.digests(_TRAIN) if digest in wanted
    }
    found, sizes = zip(*(source.repeated(repeated) for source in sources), strict=True)
    return _share(sum(found), sum(sizes))


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")


def _cut(length: int, fractions: Sequence[float], part: str) -> slice:
    bounds = itertools.pairwise(split_bounds(length, fractions))
    return slice(*dict(zip((_TRAIN, _VAL, "test"), bounds, strict=True))[part])


def _digest(text: str) -> bytes:
    return blake2b(text.strip().encode("utf-8", "surrogatepass"), digest_size=12).digest()


class _Source:
    """One source that is text, or ids with or without ends."""

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer, fractions: Sequence[float]) -> None:
        self._corpus = corpus
        self._tokenizer = tokenizer
        self._fractions = fractions
        self._is_text = corpus.tokens is None and corpus.splits is None

    def digests(self, part: str) -> Iterator[bytes]:
        """Yield the hashes of everything that may be equal to something."""
        if not self._is_text:
            yield from (digest for digest, _ in self._documents(part))
            return
        for file in self._files(part):
            yield _digest(file)
            for paragraph in _PARAGRAPHS.split(file):
                for passage in (paragraph, *paragraph.split("\n")):
                    if len(passage) >= SHORTEST:
                        yield _digest(passage)

    def repeated(self, known: set[bytes]) -> tuple[int, int]:
        """Return how much of the validation split is known, and how much there is."""
        if self._is_text:
            files = list(self._files(_VAL))
            return sum(_known_of(file, known) for file in files), sum(map(len, files))
        documents = list(self._documents(_VAL))
        found = sum(size for digest, size in documents if digest in known)
        return found, sum(size for _, size in documents)

    def _files(self, part: str) -> Iterator[str]:
        """Yield the files of a part, those at its ends cut."""
        own = _cut(len(self._corpus.text), self._fractions, part)
        for _, start, length in self._corpus.pieces:
            text = self._corpus.text[max(start, own.start) : min(start + length, own.stop)]
            if text.strip():
                yield text

    def _documents(self, part: str) -> Iterator[tuple[bytes, int]]:
        """Yield hash and tokens of each document; none where nothing marks an end."""
        end_id = self._corpus.end_id
        if end_id is None:
            return
        tokens = self._corpus.parts(self._tokenizer, self._fractions)[part]
        document, size = blake2b(digest_size=12), 0
        for start in range(0, len(tokens), CHUNK):
            ids = np.ascontiguousarray(tokens[start : start + CHUNK])
            begin = 0
            for end in np.flatnonzero(ids == end_id).tolist():
                document.update(ids[begin:end].data)
                yield document.digest(), size + end - begin
                document, size, begin = blake2b(digest_size=12), 0, end + 1
            document.update(ids[begin:].data)
            size += len(ids) - begin
        if size:
            yield document.digest(), size


def _known_of(file: str, known: set[bytes]) -> int:
    """Return the characters of a file that are known from training."""
    if _digest(file) in known:
        return len(file)
    found = 0
    for paragraph in _PARAGRAPHS.split(file):
        if len(paragraph) >= SHORTEST and _digest(paragraph) in known:
            found += len(paragraph)
            continue
        lines = (line for line in paragraph.split("\n") if len(line) >= SHORTEST)
        found += sum(len(line) for line in lines if _digest(line) in known)
    return found
