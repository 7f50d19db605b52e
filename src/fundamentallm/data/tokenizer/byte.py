"""One token for each byte."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from fundamentallm.data.text_file import to_utf8
from fundamentallm.data.tokenizer.base import TOKENIZERS, Tokenizer, checked_end, checked_ids


@TOKENIZERS.register("byte")
class ByteTokenizer(Tokenizer):
    """One token for each byte of UTF-8: any text, 256 ids.

    Args:
        end: whether there is one more id, for the end of a document.
    """

    end = False  # also for a subclass whose constructor does not say

    def __init__(self, end: bool = False) -> None:
        self.end = end

    @property
    def vocab_size(self) -> int:
        """256, and one for the end of a document."""
        return 256 + self.end

    @property
    def end_id(self) -> int | None:
        """256, where there is an end."""
        return 256 if self.end else None

    def find_cut(self, text: str) -> int:
        """Return all of it: no byte depends on another."""
        return len(text)

    def encode(self, text: str) -> np.ndarray:
        """Return the bytes of a text, uint8, or uint16 where there is an end.

        Raises:
            DataError: a lone surrogate, which UTF-8 cannot express.
        """
        # Of a bytearray, since torch warns of arrays that cannot be written to.
        octets = np.frombuffer(bytearray(to_utf8(text)), dtype=np.uint8)
        return octets.astype(np.uint16) if self.end else octets

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Return the text; bytes that are not UTF-8 become U+FFFD."""
        array = checked_ids(ids, self.vocab_size)
        if self.end:
            array = array[array != self.end_id]
        return str(array.astype(np.uint8).tobytes(), "utf-8", "replace")

    def to_dict(self) -> dict[str, Any]:
        """Return the type, and the end if there is one."""
        return {"type": "byte", "end": True} if self.end else {"type": "byte"}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> ByteTokenizer:
        """Make a tokenizer from `to_dict`."""
        return cls(end=checked_end(state))
