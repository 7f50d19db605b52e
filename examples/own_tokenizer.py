"""A tokenizer of your own: words and what stands between them, without touching the package.

    python examples/own_tokenizer.py
    PYTHONPATH=examples fundamentallm run train \\
        --plugins own_tokenizer 'data.tokenizer={name: words, max_words: 500}'
    PYTHONPATH=examples fundamentallm generate runs/train --plugins own_tokenizer

What to learn: a tokenizer encodes, decodes, and says what it is as plain JSON, which travels in
every checkpoint. A checkpoint never imports code: later commands name the plugin again.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from fundamentallm.data.tokenizer import TOKENIZERS, Tokenizer

PIECES = re.compile(r"\w+|\W")


@TOKENIZERS.register("words")
class WordTokenizer(Tokenizer):
    """Frequent words are one token, all else is spelled in characters.

    Args:
        text: the source, supplied by the program.
        max_words: how many of the most frequent words get a token.
        vocabulary: the tokens themselves, in place of a text.
    """

    def __init__(
        self, text: str = "", max_words: int = 1000, *, vocabulary: Iterable[str] = ()
    ) -> None:
        words = Counter(piece for piece in PIECES.findall(text) if len(piece) > 1)
        frequent = [word for word, _ in words.most_common(max_words)]
        self.vocabulary = list(vocabulary) or [*sorted(set(text)), *frequent]
        self._ids = {token: index for index, token in enumerate(self.vocabulary)}

    @property
    def vocab_size(self) -> int:
        """Characters and words."""
        return len(self.vocabulary)

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of a text."""
        ids: list[int] = []
        for piece in PIECES.findall(text):
            tokens = [piece] if piece in self._ids else piece
            ids.extend(self._ids[token] for token in tokens if token in self._ids)
        return np.array(ids, dtype=np.uint32)

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Return the text of ids."""
        return "".join(self.vocabulary[int(index)] for index in ids)

    def to_dict(self) -> dict[str, Any]:
        """Return the type and the tokens."""
        return {"type": "words", "vocabulary": self.vocabulary}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> WordTokenizer:
        """Make a tokenizer from `to_dict`."""
        return cls(vocabulary=state["vocabulary"])


def main() -> None:
    """Encode a sentence and bring it back."""
    tokenizer = WordTokenizer("the cat sat on the mat and the dog sat on the cat")
    text = "the dog sat on the mat"
    ids = tokenizer.encode(text)
    print(f"{len(text)} characters, {len(ids)} tokens: {ids.tolist()}")
    print(tokenizer.decode(ids))


if __name__ == "__main__":
    main()
