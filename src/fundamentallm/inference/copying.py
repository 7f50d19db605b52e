"""Whether generated text copies: the longest span that it shares with the training text.

Spans are counted in characters. The longest shared span of two texts of lengths n and N is found by
bisecting its length: windows of one length are compared by a polynomial hash modulo 2**64, of all
training text in vectorized chunks, and a hash that agrees is believed only if the characters do.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

WORDS = 4
"""Length of the n-grams, in words."""

NUM_PASSAGES = 4
_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2**64
_CHUNK = 1 << 18
_HIGH_BITS = 20
_SHIFT = np.uint64(64 - _HIGH_BITS)
_BETWEEN = 0x110000  # between documents; no character has this number

Codes = NDArray[np.uint32]


@dataclass(frozen=True)
class Place:
    """A place in the training text: a document, and line and column there, from 1."""

    document: str
    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.document}:{self.line}:{self.column}"


@dataclass(frozen=True)
class Copied:
    """How much of a text is copied or repeated.

    Attributes:
        length: characters of the longest span that also stands in the training text.
        span: the span.
        place: where it stands first; None if there is no such span.
        distinct: the share of different ones among its n-grams of `WORDS` words; None of a text
            with fewer words.
        repeated: characters of the longest span that occurs twice in the text itself.
    """

    length: int
    span: str
    place: Place | None
    distinct: float | None
    repeated: int


class TrainingText:
    """Documents in which spans are looked for.

    Args:
        documents: name and text of each.
    """

    def __init__(self, documents: Iterable[tuple[str, str]]) -> None:
        self.names: list[str] = []
        self._texts: list[str] = []
        for name, text in documents:
            self.names.append(name)
            self._texts.append(text)
        lengths = [len(text) + 1 for text in self._texts]
        self._starts = [0, *itertools.accumulate(lengths)]
        between = np.array([_BETWEEN], np.uint32)
        parts = [part for text in self._texts for part in (codes_of(text), between)]
        self._codes: Codes = np.concatenate(parts) if parts else np.zeros(0, np.uint32)
        self._powers, self._inverses = _powers(_BASE), _powers(pow(_BASE, -1, 1 << 64))

    def examine(self, text: str) -> Copied:
        """Return what a text copies from the documents, and what it repeats."""
        length, start, at = self._longest(codes_of(text))
        place = self._place(at) if length else None
        repeated = _longest_repeated(text)
        return Copied(length, text[start : start + length], place, distinct_share(text), repeated)

    def _longest(self, text: Codes) -> tuple[int, int, int]:
        """Return length, place in the text and first place in the documents."""
        found = (0, 0, 0)
        low, high = 1, len(text)
        while low <= high:
            middle = (low + high) // 2
            shared = self._shared(text, middle)
            if shared is None:
                high = middle - 1
            else:
                found, low = (middle, *shared), middle + 1
        return found

    def _shared(self, text: Codes, length: int) -> tuple[int, int] | None:
        """Return the places of a span of a length that both have, None if there is none."""
        own = self._hashes(text, length)
        order = np.argsort(own, kind="stable")
        ordered = own[order]
        # Most windows are ruled out by the highest bits of their hashes, in a fraction of the time.
        possible = np.zeros(1 << _HIGH_BITS, np.bool_)
        possible[own >> _SHIFT] = True
        for first in range(0, len(self._codes) - length + 1, _CHUNK):
            theirs = self._hashes(self._codes[first : first + _CHUNK + length - 1], length)
            candidates = np.flatnonzero(possible[theirs >> _SHIFT])
            hashes = theirs[candidates]
            spots = np.minimum(np.searchsorted(ordered, hashes), len(ordered) - 1)
            for i in np.flatnonzero(ordered[spots] == hashes).tolist():
                start, there = int(order[spots[i]]), first + int(candidates[i])
                if np.array_equal(
                    text[start : start + length], self._codes[there : there + length]
                ):
                    return start, there
        return None

    def _hashes(self, codes: Codes, length: int) -> NDArray[np.uint64]:
        """Return the hash of each window of a length."""
        sums = np.zeros(len(codes) + 1, np.uint64)
        self._grow(len(codes))
        np.cumsum(codes.astype(np.uint64) * self._powers[: len(codes)], out=sums[1:])
        windows = sums[length:] - sums[:-length]
        return np.asarray(windows * self._inverses[: len(windows)])

    def _grow(self, count: int) -> None:
        if count > len(self._powers):
            self._powers = _powers(_BASE, count)
            self._inverses = _powers(pow(_BASE, -1, 1 << 64), count)

    def _place(self, at: int) -> Place:
        number = bisect.bisect_right(self._starts, at) - 1
        before = self._texts[number][: at - self._starts[number]]
        line = before.count("\n") + 1
        return Place(self.names[number], line, len(before) - (before.rfind("\n") + 1) + 1)


def codes_of(text: str) -> Codes:
    """Return the numbers of the characters of a text, (N,)."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.dtype("<u4"))


def distinct_share(text: str, words: int = WORDS) -> float | None:
    """Return the share of different ones among a text's n-grams of words; None without one."""
    parts = text.split()
    grams = [tuple(parts[i : i + words]) for i in range(len(parts) - words + 1)]
    return len(set(grams)) / len(grams) if grams else None


def passages(documents: Sequence[str], length: int, count: int = NUM_PASSAGES) -> list[str]:
    """Return passages of a length, evenly chosen from documents, to compare a text with.

    A document that is shorter is passed over; fewer are returned if there are not as many.
    """
    whole = [text for text in documents if len(text) >= length]
    places = [len(text) - length + 1 for text in whole]
    ends = list(itertools.accumulate(places))
    if not ends or length < 1:
        return []
    chosen = sorted({ends[-1] * (2 * i + 1) // (2 * count) for i in range(count)})
    found = []
    for at in chosen:
        number = bisect.bisect_right(ends, at)
        start = at - (ends[number] - places[number])
        found.append(whole[number][start : start + length])
    return found


def _longest_repeated(text: str) -> int:
    low, high = 0, len(text) - 1
    while low < high:
        middle = (low + high + 1) // 2
        windows = [text[i : i + middle] for i in range(len(text) - middle + 1)]
        if len(set(windows)) < len(windows):
            low = middle
        else:
            high = middle - 1
    return max(low, 0)


def _powers(base: int, count: int = 1) -> NDArray[np.uint64]:
    """Return base**i modulo 2**64 for i below count."""
    factors = np.full(count, base, np.uint64)
    factors[0] = 1
    return np.cumprod(factors)
