"""Windows over a sequence of tokens.

Shapes: N tokens in the split, T sequence length, B batch size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from fundamentallm.data.batch import IGNORED, Batch, add_documents
from fundamentallm.data.loaders.epoch import ORDER, PHASE, Batching, EpochLoader
from fundamentallm.data.permutation import Permutation, derive_key
from fundamentallm.data.token_file import FileTokens, FileWindows, Tokens
from fundamentallm.errors import DataError

_FORMAT = torch.contiguous_format


class TokenWindowLoader(EpochLoader):
    """Sequences cut from a row of tokens, reshuffled in each epoch.

    An epoch cuts the N - 1 targets into n = (N - 1) // T sequences that do not overlap, from a
    phase in [0, T) drawn for that epoch, and visits them in an order drawn for it (`EpochLoader`).
    The text is taken as a ring: a sequence that reaches its end goes on at its beginning, where
    documents that are packed apart begin anew. So an epoch leaves out (N - 1) % T targets, fewer
    than one sequence, and another phase reaches them.

    Args:
        tokens: (N,) integers: an array, a token file or a tensor, never copied, or a list.
        batching: sizes, seed and rank.
        end_id: the token after each document, if documents are masked (`add_documents`).

    Raises:
        DataError: fewer than T + 1 tokens.
        ValueError: the tokens are not one row of integers.
    """

    def __init__(
        self,
        tokens: Tokens | Tensor | Sequence[int],
        batching: Batching,
        end_id: int | None = None,
    ) -> None:
        sequence_length = batching.sequence_length
        self.end_id = end_id
        ids = as_tokens(tokens)
        if len(ids) < sequence_length + 1:
            raise DataError(
                "the text is too short for a single sequence",
                got=f"{len(ids):,} tokens to train on",
                expected=f"at least {sequence_length + 1:,} (data.sequence_length + 1)",
                fix="lower data.sequence_length or add text",
            )
        super().__init__((len(ids) - 1) // sequence_length, batching)
        self._ids = ids
        # The only sequence of a text never goes on at its beginning.
        self._num_phases = (
            sequence_length if self.num_sequences > 1 else (len(ids) - 1) % sequence_length + 1
        )
        # A view: row i is tokens i to i + T, so inputs and targets are two slices of one gather.
        self._windows = (
            FileWindows(ids, sequence_length + 1)
            if isinstance(ids, FileTokens)
            else sliding_window_view(ids, sequence_length + 1)
        )

    def rows_at(self, epoch: int, step: int) -> np.ndarray:
        """Return the first token's index of each sequence of a step, over all ranks, in order.

        Raises:
            ValueError: an epoch has no such step.
        """
        return self._starts(epoch, super().rows_at(epoch, step))

    def starts_at(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """Return the first token's index of the sequences at positions of an epoch's order."""
        order = Permutation(self.num_sequences, derive_key(self.batching.seed, epoch, ORDER))
        return self._starts(epoch, order(positions))

    def _starts(self, epoch: int, sequences: np.ndarray) -> np.ndarray:
        phase = derive_key(self.batching.seed, epoch, PHASE) % self._num_phases
        starts: np.ndarray = phase + sequences * self.sequence_length
        return starts

    def batch_from(self, starts: np.ndarray) -> Batch:
        """Return the sequences that begin at some tokens."""
        return self._gather(starts)

    def _gather(self, rows: np.ndarray) -> Batch:
        end = len(self._ids) - 1
        beyond = rows > end - self.sequence_length
        across: list[tuple[int, int]] = []  # rows that reach the text's end, and the targets left
        if beyond.any():
            across = [(int(row), end - int(rows[row])) for row in np.flatnonzero(beyond)]
            windows = self._windows[np.where(beyond, 0, rows)]
        else:
            windows = self._windows[rows]
        tokens = torch.from_numpy(windows.astype(np.int64))
        # Copies: a batch may be viewed flat, and writing to one part must not change the other.
        inputs = tokens[:, :-1].clone(memory_format=_FORMAT)
        targets = tokens[:, 1:].clone(memory_format=_FORMAT)
        for row, left in across:  # they go on at the text's beginning
            tail = self._read(rows[row], left + 1)
            head = self._read(0, self.sequence_length - left + 1)
            inputs[row] = torch.cat([tail[:-1], head[:-1]])
            targets[row] = torch.cat([tail[1:], head[1:]])
        batch = add_documents({"input_ids": inputs, "target_ids": targets}, self.end_id)
        if "document_ids" in batch:
            for row, left in across:
                batch["document_ids"][row, left:] += 1
        return batch

    def _read(self, start: int, length: int) -> Tensor:
        return torch.from_numpy(self._ids[start : start + length].astype(np.int64))


class ValidationLoader:
    """Every target of a split exactly once, in order, in sequences that do not overlap.

    Args:
        tokens: (N,) integers as for `TokenWindowLoader`; fewer than two are an empty loader.
        batching: sizes and rank; the last sequence is padded with ignored targets, and rank r takes
            each world_size-th batch.
        end_id: as for `TokenWindowLoader`.

    Attributes:
        num_tokens: targets over all ranks.

    Raises:
        ValueError: the tokens are not one row of integers.
    """

    def __init__(
        self,
        tokens: Tokens | Tensor | Sequence[int],
        batching: Batching,
        end_id: int | None = None,
    ) -> None:
        self.end_id = end_id
        self.tokens = as_tokens(tokens)
        self.batching = batching
        self.sequence_length = batching.sequence_length
        self.batch_size = batching.batch_size
        self.num_tokens = max(0, len(self.tokens) - 1)

    def __len__(self) -> int:
        """Return the batches over all ranks."""
        return -(-self.num_tokens // (self.sequence_length * self.batch_size))

    def __iter__(self) -> Iterator[Batch]:
        """Yield this rank's batches."""
        span = self.sequence_length * self.batch_size
        for number in range(self.batching.rank, len(self), self.batching.world_size):
            piece = self.tokens[number * span : (number + 1) * span + 1].astype(np.int64)
            yield self._batch(torch.from_numpy(piece))

    def _batch(self, piece: Tensor) -> Batch:
        inputs, targets = piece[:-1], piece[1:]
        missing = -len(inputs) % self.sequence_length
        inputs = torch.nn.functional.pad(inputs, (0, missing), value=0)
        targets = torch.nn.functional.pad(targets, (0, missing), value=IGNORED)
        batch = {
            "input_ids": inputs.view(-1, self.sequence_length),
            "target_ids": targets.view(-1, self.sequence_length),
        }
        return add_documents(batch, self.end_id)


def as_tokens(tokens: Tokens | Tensor | Sequence[int]) -> Tokens:
    """Return token ids (N,); arrays, token files and CPU tensors are not copied.

    Raises:
        ValueError: they are not one row of integers.
    """
    if isinstance(tokens, FileTokens):
        return tokens
    array = tokens.numpy() if isinstance(tokens, Tensor) else np.asarray(tokens)
    # numpy takes an empty list for one of floats.
    if array.ndim != 1 or (array.size > 0 and array.dtype.kind not in "ui"):
        raise ValueError(f"tokens must be one row of integers, got {array.shape} of {array.dtype}")
    return array
