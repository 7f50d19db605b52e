"""Text to token ids and back."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fundamentallm.data.text_file import read_text
from fundamentallm.errors import DataError, FundamentaLLMError
from fundamentallm.files.private import narrow
from fundamentallm.registry import Registry

FORMAT = 1
PIECE = 1 << 15  # characters of a long text that are encoded as one
TOKENIZER_FILE = "tokenizer.json"
"""The name of a tokenizer's file beside token files and in folders of other tools."""
_SAVE_ANEW = "use a file that Tokenizer.save wrote"


class Tokenizer(ABC):
    """Encodes text as token ids 0 .. vocab_size - 1.

    A registered tokenizer of yours subclasses this; its constructor takes the options of the
    configuration and, if it has parameters of these names, what the program knows of the source:
    `text`, all of it, `texts`, an iterable of pieces of it, or `vocabulary`, its characters.
    `prepare` never holds the whole text, so it can only use the latter two.
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

    @property
    def end_id(self) -> int | None:
        """The token after each document; None without one.

        `encode` never returns it, for any text; it decodes to no text.
        """
        return None

    def find_cut(self, text: str) -> int:
        """Return how much of the beginning of a longer text may be encoded separately.

        The ids of text[:cut] and those of what follows are then the ids of the whole. 0 says that
        there is no such place, also if a tokenizer cannot find one; `prepare` then keeps
        each document in one piece.
        """
        return 0

    def find_join(self, ids: Sequence[int]) -> int:
        """Return how many of the first ids decode to the same text for any following ids.

        A last character of which they have only a part counts as decoded (it is U+FFFD). So it is
        all of them, but for a tokenizer that decodes whole runs of ids as one.
        """
        return len(ids)

    def pieces(self, chunks: Iterable[str], longest: int | None = None) -> Iterator[str]:
        """Cut a text, given in chunks of any size, into pieces to encode one by one.

        The pieces follow from the text and not from its chunks; each has at most `PIECE` characters
        where the tokenizer can cut at all.

        Args:
            chunks: the text.
            longest: characters that a text may have which the tokenizer cannot cut; None: any.

        Raises:
            DataError: such a text is longer.
        """
        buffer = ""
        for chunk in chunks:
            buffer += chunk
            start = 0
            while len(buffer) - start > PIECE:
                window = buffer[start : start + PIECE]
                cut = self.find_cut(window)
                if not cut:
                    break
                yield window[:cut]
                start += cut
            buffer = buffer[start:]
            if longest is not None and len(buffer) > max(longest, PIECE):
                raise DataError(
                    "the document is too long for a tokenizer that has to read it in one piece",
                    got=f"more than {longest:,} characters",
                    fix="cut it into several documents, or use the tokenizer bpe, byte or"
                    " character",
                )
        if buffer:
            yield buffer

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each text, as `encode` does; may use several cores."""
        return [self.encode(text) for text in texts]

    def prompt_ids(self, text: str) -> list[int]:
        """Return the ids of a text to continue; for a text without tokens, one to start from.

        That is the end of a document, behind which the next begins, or else id 0.

        Raises:
            DataError: the text cannot be encoded.
        """
        return [int(token) for token in self.encode(text)] or [self.end_id or 0]

    def fingerprint(self) -> str:
        """Return a SHA-256 that two tokenizers share if they encode alike."""
        return hashlib.sha256(
            json.dumps(self.to_dict(), sort_keys=True, ensure_ascii=True).encode()
        ).hexdigest()

    def to_json(self) -> str:
        """Return what `save` writes: JSON, with the fingerprint to tell damage by."""
        state = {"format": FORMAT, **self.to_dict(), "fingerprint": self.fingerprint()}
        return json.dumps(state, ensure_ascii=True) + "\n"

    def save(self, path: str | Path) -> None:
        """Write the tokenizer as JSON that `load` reads."""
        with open(path, "w", encoding="utf-8", opener=narrow) as file:
            file.write(self.to_json())

    @staticmethod
    def load(path: str | Path) -> Tokenizer:
        """Read a tokenizer of any registered kind from JSON.

        Raises:
            DataError: no such file, or not a tokenizer's.
        """
        return load_tokenizer(path)


TOKENIZERS: Registry[Tokenizer] = Registry("tokenizer", supplied=("text", "texts", "vocabulary"))


def build_tokenizer(name: str, options: Mapping[str, Any], text: str) -> Tokenizer:
    """Build the tokenizer that a configuration names, for a source text.

    Raises:
        ConfigError: an unknown name or option.
        DataError: the text does not suit it.
    """
    return TOKENIZERS.build(name, options, text=text, texts=[text])


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
    except (
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        RecursionError,
        OverflowError,
    ) as error:
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
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        # What the `tokenizers` library writes; subword tokenizers are saved as that library's.
        return tokenizer_from_dict({"type": "file", "json": state}, where)
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


def checked_ids(ids: Iterable[int] | np.ndarray, vocab_size: int) -> np.ndarray:
    """Return ids as an array (N,).

    Raises:
        DataError: one lies outside the vocabulary.
        ValueError: they are not one row of integers.
    """
    array = np.asarray(ids if hasattr(ids, "__array__") else list(ids))
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


def checked_end(state: Mapping[str, Any]) -> bool:
    """Return whether a stored tokenizer of characters or bytes has an end.

    Raises:
        ValueError: it says something else than true or false.
    """
    end = state.get("end", False)
    if not isinstance(end, bool):
        raise ValueError(f"'end' is true or false, not {end!r:.50}")
    return end


# What tokenizers change: case, white space, composed marks, signs beside words, rare characters.
_VARIED = (
    "Hello, World  don't ( x ) .\n\n\tna\u00efve e\u0301 \ufb01 \u4f60\u597d \U0001f600 \ue000 "
)


def changes_texts(tokenizer: Tokenizer) -> bool:
    """Whether decoding can change a text, so that its size is lost.

    A tokenizer that refuses unknown text never changes it.
    """
    try:
        return tokenizer.decode(tokenizer.encode(_VARIED)) != _VARIED
    except DataError:
        return False
