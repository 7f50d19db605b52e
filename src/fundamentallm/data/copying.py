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
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

WORDS = 4
"""Length of the n-grams, in words."""

SEARCHED = 1 << 21
"""Characters of a training text that are searched for each sample of a run."""

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
        start: where the span begins in the text.
    """

    length: int
    span: str
    place: Place | None
    distinct: float | None
    repeated: int
    start: int = 0


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
        span, distinct = text[start : start + length], distinct_share(text)
        return Copied(length, span, place, distinct, longest_repeated(text), start)

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
        own = self.hashes(text, length)
        order = np.argsort(own, kind="stable")
        ordered = own[order]
        # Most windows are ruled out by the highest bits of their hashes, in a fraction of the time.
        possible = np.zeros(1 << _HIGH_BITS, np.bool_)
        possible[own >> _SHIFT] = True
        for first in range(0, len(self._codes) - length + 1, _CHUNK):
            theirs = self.hashes(self._codes[first : first + _CHUNK + length - 1], length)
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

    def hashes(self, codes: Codes, length: int) -> NDArray[np.uint64]:
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


class CopyingFigures:
    """What texts copy from the beginning of a training text, and what validation text shares.

    The time of a text and the memory are bounded: `SEARCHED` characters are searched.

    Args:
        training: name and text of documents with at most `SEARCHED` characters together.
        validation: texts to compare with.
    """

    def __init__(self, training: Iterable[tuple[str, str]], validation: Sequence[str]) -> None:
        documents = list(training)
        self._searched = sum(len(text) for _, text in documents)
        self._training = TrainingText(documents)
        self._validation = validation
        self._usual: dict[int, dict[str, Any] | None] = {}

    def of(self, text: str) -> dict[str, Any]:
        """Return the figures of a text as plain JSON.

        `longest`, `start` and `place`: characters of the longest span that also stands in the
        training text, where it begins in the text (from 0) and where it stands first, None without
        one. `distinct` and `repeated`: as in `Copied`. `searched`: characters of the training text
        that were searched, and `whole` whether they are all of it. `validation`: the means of
        `longest`, `distinct` and `repeated` over `count` validation passages of this length or a
        little longer; None if the validation text is too short.
        """
        copied = self._training.examine(text)
        return {
            "longest": copied.length,
            "start": copied.start,
            "place": None if copied.place is None else str(copied.place),
            "distinct": copied.distinct,
            "repeated": copied.repeated,
            "searched": self._searched,
            "whole": self._searched < SEARCHED,
            "validation": self._usual_at(len(text)),
        }

    def _usual_at(self, length: int) -> dict[str, Any] | None:
        """Return the figures of validation text, of few different lengths, so that few are made."""
        step = 1 << max(0, length.bit_length() - 3)
        rounded = -(-length // step) * step
        if rounded not in self._usual:
            found = [self._training.examine(one) for one in passages(self._validation, rounded)]
            distinct = [one.distinct for one in found if one.distinct is not None]
            self._usual[rounded] = (
                {
                    "longest": fmean(one.length for one in found),
                    "distinct": fmean(distinct) if distinct else None,
                    "repeated": fmean(one.repeated for one in found),
                    "count": len(found),
                }
                if found
                else None
            )
        return self._usual[rounded]


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


def longest_repeated(text: str) -> int:
    """Return the characters of the longest span that occurs twice in a text."""
    codes, hashing = codes_of(text), TrainingText([])
    low, high = 0, len(text) - 1
    while low < high:
        middle = (low + high + 1) // 2
        hashes = hashing.hashes(codes, middle)
        order = np.argsort(hashes, kind="stable")
        equal = np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]])
        pairs = zip(order[equal].tolist(), order[equal + 1].tolist(), strict=True)
        if any(np.array_equal(codes[a : a + middle], codes[b : b + middle]) for a, b in pairs):
            low = middle
        else:
            high = middle - 1
    return max(low, 0)


def _powers(base: int, count: int = 1) -> NDArray[np.uint64]:
    """Return base**i modulo 2**64 for i below count."""
    factors = np.full(count, base, np.uint64)
    factors[0] = 1
    return np.cumprod(factors)
