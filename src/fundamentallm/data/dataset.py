"""Windows of text as a torch Dataset."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fundamentallm.data.batch import IGNORED
from fundamentallm.data.loaders import as_tokens
from fundamentallm.data.token_file import Tokens
from fundamentallm.errors import DataError


class LanguageModelDataset(Dataset[dict[str, Tensor]]):
    """Windows of `sequence_length` tokens, each with the tokens that follow.

    Item i is `{"input_ids", "target_ids"}`, int64 (T,): tokens i s to i s + T - 1, and the same
    shifted by one. By default sequences do not overlap (s = T) and cover the text from its start.

    Args:
        tokens: (N,) integers: an array, a token file, a tensor or a list. Arrays are not copied.
        sequence_length: T.
        stride: s, tokens from one sequence's start to the next; T if None.
        pad_last: if targets are left over after the last whole sequence, keep one more sequence for
            them, its inputs padded with 0 and its targets with -100; else they are dropped.

    Raises:
        DataError: too few tokens for one sequence.
        ValueError: sequence_length or stride below 1, or tokens that are not one row of integers.
    """

    def __init__(
        self,
        tokens: Tokens | Tensor | Sequence[int],
        sequence_length: int,
        stride: int | None = None,
        pad_last: bool = False,
    ) -> None:
        if sequence_length < 1 or (stride is not None and stride < 1):
            raise ValueError(
                f"sequence_length and stride must be at least 1, got {sequence_length} and {stride}"
            )
        self.tokens = as_tokens(tokens)
        self.sequence_length = sequence_length
        self.stride = stride or sequence_length
        needed = 2 if pad_last else sequence_length + 1
        if len(self.tokens) < needed:
            raise DataError(
                "the text is too short for a single sequence",
                got=f"{len(self.tokens):,} tokens",
                expected=f"at least {needed:,}" + ("" if pad_last else " (sequence_length + 1)"),
                fix="lower sequence_length or add text",
            )
        # Targets are tokens 1 to last_target; whole sequences come first, and reach one of them.
        last_target = len(self.tokens) - 1
        self._length = max(0, (last_target - sequence_length) // self.stride + 1)
        reached = (self._length - 1) * self.stride + sequence_length if self._length else 0
        if pad_last and max(reached, self._length * self.stride) < last_target:
            self._length += 1

    def __len__(self) -> int:
        """Return the number of sequences."""
        return self._length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return sequence `index`.

        Raises:
            IndexError: there is no such sequence.
        """
        if not -self._length <= index < self._length:
            raise IndexError(f"sequence {index} of {self._length}")
        start = index % self._length * self.stride
        piece = torch.from_numpy(
            self.tokens[start : start + self.sequence_length + 1].astype(np.int64)
        )
        missing = self.sequence_length + 1 - len(piece)
        return {
            "input_ids": torch.nn.functional.pad(piece[:-1], (0, missing), value=0),
            "target_ids": torch.nn.functional.pad(piece[1:], (0, missing), value=IGNORED),
        }
