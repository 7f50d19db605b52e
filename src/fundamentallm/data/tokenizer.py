"""Text to token ids and back."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fundamentallm.data.text_file import read_text, to_utf8
from fundamentallm.errors import DataError, FundamentaLLMError
from fundamentallm.registry import Registry

FORMAT = 1
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_UNKNOWN = -1  # in the lookup table: a code point outside the vocabulary
_CHUNK = 1 << 20  # characters encoded at once: the passes over them need 13 bytes for each
_SAVE_ANEW = "use a file that Tokenizer.save wrote"

UnknownPolicy = Literal["error", "replace", "skip"]


class Tokenizer(ABC):
    """Encodes text as token ids 0 .. vocab_size - 1.

    A registered tokenizer of yours subclasses this; its constructor takes the options of the
    configuration and, if it has a parameter `text`, the whole source.
    """

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """V, the number of token ids."""

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Return the ids of a text, (N,), in the smallest unsigned type that holds V - 1.

        Raises:
            DataError: the text cannot be encoded.
        """

    @abstractmethod
    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Return the text of ids.

        Raises:
            DataError: an id outside the vocabulary.
        """

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON from which `from_dict` of the same class makes an equal tokenizer.

        It has a key "type", the registered name.
        """

    @classmethod
    @abstractmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Tokenizer:
        """Make a tokenizer from `to_dict`."""

    def fingerprint(self) -> str:
        """Return a SHA-256 that two tokenizers share if they encode alike."""
        return hashlib.sha256(
            json.dumps(self.to_dict(), sort_keys=True, ensure_ascii=True).encode()
        ).hexdigest()

    def save(self, path: str | Path) -> None:
        """Write the tokenizer as JSON, with its fingerprint to tell damage by."""
        state = {"format": FORMAT, **self.to_dict(), "fingerprint": self.fingerprint()}
        Path(path).write_text(json.dumps(state, ensure_ascii=True) + "\n", encoding="utf-8")

    @staticmethod
    def load(path: str | Path) -> Tokenizer:
        """Read a tokenizer of any registered kind from JSON.

        Raises:
            DataError: no such file, or not a tokenizer's.
        """
        return load_tokenizer(path)


TOKENIZERS: Registry[Tokenizer] = Registry("tokenizer", supplied=("text", "vocabulary"))


@TOKENIZERS.register("character")
class CharacterTokenizer(Tokenizer):
    """One token for each character of a vocabulary, in the order of code points.

    Args:
        vocabulary: the characters, each once counted.
        unknown: what becomes of another character: "error" refuses it, "replace" gives it one
            more id, which decodes to U+FFFD, "skip" leaves it out.
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
        text: str | None = None,
    ) -> None:
        self.vocabulary = sorted(set(vocabulary) | set(text or ""))
        if not self.vocabulary:
            raise DataError("a vocabulary needs at least one character", fix="give it some text")
        if any(len(character) != 1 for character in self.vocabulary):
            raise ValueError("a vocabulary is made of single characters")
        if unknown not in ("error", "replace", "skip"):
            raise ValueError(f"unknown must be 'error', 'replace' or 'skip', got {unknown!r}")
        to_utf8("".join(self.vocabulary))
        self.unknown = unknown
        codes = np.array([ord(character) for character in self.vocabulary], dtype=np.int64)
        # One gather encodes a whole text: ids by code point, up to the largest that occurs.
        self._ids = np.full(int(codes.max()) + 2, _UNKNOWN, dtype=np.int32)
        self._ids[codes] = np.arange(len(codes))
        unknown_codes = [ord(REPLACEMENT)] if unknown == "replace" else []
        self._codes = np.array([*codes, *unknown_codes], dtype="<u4")

    @classmethod
    def from_text(cls, text: str, unknown: UnknownPolicy = "error") -> CharacterTokenizer:
        """Make a tokenizer with the characters of a text."""
        return cls(text, unknown)

    @property
    def vocab_size(self) -> int:
        """The characters, and one id more under "replace"."""
        return len(self._codes)

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of a text.

        Raises:
            DataError: a character outside the vocabulary, under the policy "error".
        """
        dtype = np.min_scalar_type(self.vocab_size - 1)
        pieces = [
            self._encode_piece(text[start : start + _CHUNK], start).astype(dtype)
            for start in range(0, len(text), _CHUNK)
        ]
        return np.concatenate(pieces) if pieces else np.empty(0, dtype)

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Return the text of ids."""
        codes = self._codes[_checked_ids(ids, self.vocab_size)]
        return str(codes.tobytes(), "utf-32-le")

    def to_dict(self) -> dict[str, Any]:
        """Return type, vocabulary (as one string) and policy."""
        return {
            "type": "character",
            "vocabulary": "".join(self.vocabulary),
            "unknown": self.unknown,
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> CharacterTokenizer:
        """Make a tokenizer from `to_dict`.

        Raises:
            ValueError: the vocabulary is not as `to_dict` writes it, so its ids would shift.
        """
        tokenizer = cls(state["vocabulary"], state["unknown"])
        if "".join(tokenizer.vocabulary) != state["vocabulary"]:
            raise ValueError("the vocabulary is not a string of distinct characters in order")
        return tokenizer

    def _encode_piece(self, text: str, start: int) -> np.ndarray:
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
        # The last entry of the table is unknown: all larger code points are looked up there.
        ids: np.ndarray = self._ids[np.minimum(codes, len(self._ids) - 1)]
        missing = ids == _UNKNOWN
        if not missing.any():
            return ids
        if self.unknown == "error":
            position = int(missing.argmax())
            raise self._unknown_character(text[position], start + position)
        if self.unknown == "skip":
            ids = ids[~missing]
        else:
            ids = np.where(missing, len(self.vocabulary), ids)
        return ids

    def _unknown_character(self, character: str, position: int) -> DataError:
        return DataError(
            f"the character {character!a} is not in the vocabulary",
            where=f"character {position:,} of the text",
            got=f"U+{ord(character):04X}",
            expected=f"one of {len(self.vocabulary)} characters",
            fix="change the text, or train with data.tokenizer: {name: character, unknown:"
            " replace} or with the tokenizer 'byte'",
        )


@TOKENIZERS.register("byte")
class ByteTokenizer(Tokenizer):
    """One token for each byte of UTF-8: any text, 256 ids."""

    @property
    def vocab_size(self) -> int:
        """256."""
        return 256

    def encode(self, text: str) -> np.ndarray:
        """Return the bytes of a text, uint8.

        Raises:
            DataError: a lone surrogate, which UTF-8 cannot express.
        """
        # Of a bytearray, since torch warns of arrays that cannot be written to.
        return np.frombuffer(bytearray(to_utf8(text)), dtype=np.uint8)

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Return the text; bytes that are no UTF-8 become U+FFFD."""
        octets = _checked_ids(ids, 256).astype(np.uint8)
        return str(octets.tobytes(), "utf-8", "replace")

    def to_dict(self) -> dict[str, Any]:
        """Return the type; there is nothing else to say."""
        return {"type": "byte"}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> ByteTokenizer:
        """Make a tokenizer from `to_dict`."""
        return cls()


def build_tokenizer(name: str, options: Mapping[str, Any], text: str) -> Tokenizer:
    """Build the tokenizer that a configuration names, for a source text.

    Raises:
        ConfigError: an unknown name or option.
        DataError: the text does not suit it.
    """
    return TOKENIZERS.build(name, options, text=text)


def tokenizer_from_dict(state: Any, where: str = "") -> Tokenizer:
    """Make a tokenizer of any registered kind from `to_dict`.

    Args:
        state: what `to_dict` returned.
        where: its place, for messages.

    Raises:
        ConfigError: its type is not registered.
        DataError: it is not what `to_dict` returns.
    """
    try:
        factory: Any = TOKENIZERS.get(state["type"])
        tokenizer: Tokenizer = factory.from_dict(state)
    except FundamentaLLMError as error:
        error.where = error.where or where
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            "this does not describe a tokenizer",
            where=where,
            got=f"{type(error).__name__}: {error}",
            fix=_SAVE_ANEW,
        ) from error
    return tokenizer


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a tokenizer of any registered kind from JSON.

    Raises:
        ConfigError: its type is not registered.
        DataError: no such file, not a tokenizer's, or a damaged one.
    """
    where = str(path)
    try:
        state = json.loads(read_text(Path(path)))
    except (ValueError, RecursionError) as error:
        raise DataError(
            "the tokenizer file is not JSON", where=where, got=str(error), fix=_SAVE_ANEW
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise DataError(
            "this is not a tokenizer file",
            where=where,
            expected=f'"format": {FORMAT}',
            fix=_SAVE_ANEW,
        )
    tokenizer = tokenizer_from_dict(state, where)
    if tokenizer.fingerprint() != state.get("fingerprint"):
        raise DataError(
            "the tokenizer file is damaged",
            where=where,
            got=f"fingerprint {tokenizer.fingerprint()}",
            expected=f"fingerprint {state.get('fingerprint')}",
            fix=_SAVE_ANEW,
        )
    return tokenizer


def _checked_ids(ids: Iterable[int] | np.ndarray, vocab_size: int) -> np.ndarray:
    array = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids))
    if array.size == 0:
        return np.empty(0, dtype=np.uint8)  # numpy takes an empty list for one of floats
    if array.ndim != 1 or array.dtype.kind not in "ui":
        raise ValueError(f"ids must be one row of integers, got {array.shape} of {array.dtype}")
    outside = (array < 0) | (array >= vocab_size)
    if outside.any():
        position = int(outside.argmax())
        raise DataError(
            "a token id lies outside the vocabulary",
            where=f"token {position:,}",
            got=str(int(array[position])),
            expected=f"0 to {vocab_size - 1}",
        )
    return array
