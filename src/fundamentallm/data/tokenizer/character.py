"""One token for each character.

A text is encoded in pieces that fit a core's cache: UTF-16 gives the code points of most texts as
an array that numpy can view, and one gather in a table of the vocabulary gives the ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np

from fundamentallm.data.text_file import to_utf8
from fundamentallm.data.tokenizer.base import TOKENIZERS, Tokenizer, checked_end, checked_ids
from fundamentallm.errors import DataError

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
CHUNK = 1 << 15  # characters encoded at once; measured: 1,000 MB/s there, a quarter at 1 << 20

UnknownPolicy = Literal["error", "replace", "skip"]


@TOKENIZERS.register("character")
class CharacterTokenizer(Tokenizer):
    """One token for each character of a vocabulary, in the order of code points.

    Args:
        vocabulary: the characters, each once counted.
        unknown: the policy for other characters: "error" refuses it, "replace" gives it one
            more id, which decodes to U+FFFD, "skip" leaves it out.
        end: whether there is one more id, for the end of a document.
        text: its characters belong to the vocabulary too.

    Raises:
        DataError: no character, or one that UTF-8 cannot express (half of a surrogate pair).
        ValueError: the vocabulary has strings of another length than 1, or there is no such
            policy.
    """

    def __init__(
        self,
        vocabulary: Iterable[str] = (),
        unknown: UnknownPolicy = "error",
        *,
        end: bool = False,
        text: str | None = None,
    ) -> None:
        self.vocabulary = sorted(set(vocabulary) | set(text or ""))
        if not self.vocabulary:
            raise DataError("a vocabulary needs at least one character", fix="give it some text")
        if any(len(character) != 1 for character in self.vocabulary):
            raise ValueError("every entry of a vocabulary must be a single character")
        if unknown not in ("error", "replace", "skip"):
            raise ValueError(f"unknown must be 'error', 'replace' or 'skip', got {unknown!r}")
        to_utf8("".join(self.vocabulary))
        self.unknown = unknown
        self.end = end
        codes = np.array([ord(character) for character in self.vocabulary], dtype=np.int64)
        # One gather encodes a text: ids by code point, up to the largest that occurs, and one
        # entry more, where all larger code points are looked up. An id beyond the last says that
        # the vocabulary lacks the character.
        self._missing = len(codes)
        table = np.full(int(codes.max()) + 2, self._missing, np.min_scalar_type(self._missing))
        table[codes] = np.arange(len(codes))
        self._table = table
        unknown_codes = [ord(REPLACEMENT)] if unknown == "replace" else []
        self._codes = np.array([*codes, *unknown_codes], dtype="<u4")

    @classmethod
    def from_text(cls, text: str, unknown: UnknownPolicy = "error") -> CharacterTokenizer:
        """Make a tokenizer with the characters of a text."""
        return cls(text, unknown)

    @property
    def vocab_size(self) -> int:
        """The characters, one id more under "replace", and one for the end of a document."""
        return len(self._codes) + self.end

    @property
    def end_id(self) -> int | None:
        """The last id, where there is an end."""
        return len(self._codes) if self.end else None

    def find_cut(self, text: str) -> int:
        """Return all of it: no character depends on another."""
        return len(text)

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of a text.

        Raises:
            DataError: a character outside the vocabulary, under the policy "error".
        """
        ids = np.empty(len(text), np.min_scalar_type(self.vocab_size - 1))
        filled = 0
        for start in range(0, len(text), CHUNK):
            piece = self._encode_piece(text[start : start + CHUNK], start)
            ids[filled : filled + len(piece)] = piece
            filled += len(piece)
        return ids[:filled]

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Return the text of ids."""
        array = checked_ids(ids, self.vocab_size)
        if self.end:
            array = array[array != self.end_id]
        return str(self._codes[array].tobytes(), "utf-32-le")

    def to_dict(self) -> dict[str, Any]:
        """Return type, vocabulary (as one string) and policy, and the end if there is one."""
        end = {"end": True} if self.end else {}
        return {
            "type": "character",
            "vocabulary": "".join(self.vocabulary),
            "unknown": self.unknown,
            **end,
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> CharacterTokenizer:
        """Make a tokenizer from `to_dict`.

        Raises:
            ValueError: the vocabulary is not as `to_dict` writes it, so its ids would shift.
        """
        tokenizer = cls(state["vocabulary"], state["unknown"], end=checked_end(state))
        if "".join(tokenizer.vocabulary) != state["vocabulary"]:
            raise ValueError("the vocabulary is not a string of distinct characters in order")
        return tokenizer

    def _encode_piece(self, text: str, start: int) -> np.ndarray:
        # Twice as wide as most texts need, and half as wide as all need: told by the length.
        codes = np.frombuffer(text.encode("utf-16-le", "surrogatepass"), dtype="<u2")
        if len(codes) != len(text):
            codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
        ids: np.ndarray = self._table.take(codes.astype(np.intp), mode="clip")
        missing = ids == self._missing
        if not missing.any():
            return ids
        if self.unknown == "error":
            position = int(missing.argmax())
            raise self._unknown_character(text[position], start + position)
        # Under "replace" the id beyond the last character is the replacement's own.
        return ids if self.unknown == "replace" else ids[~missing]

    def _unknown_character(self, character: str, position: int) -> DataError:
        return DataError(
            f"the character {character!a} is not in the vocabulary",
            where=f"character {position:,} of the text",
            got=f"U+{ord(character):04X}",
            expected=f"one of {len(self.vocabulary)} characters",
            fix="change the text, or train with data.tokenizer: {name: character, unknown:"
            " replace} or with the tokenizer 'byte'",
        )
