"""Loaders: one step batch of micro-batches at a time, in an order that is computed.

The batch at (epoch, step) is a pure function of the seed, so any point of any epoch is reached at
once, and the sequences of a step are the same however they are split into micro-batches and ranks.

Shapes: T sequence length, B batch size, A accumulation steps, R ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from fundamentallm.data.batch import IGNORED, Batch, Window, count_valid
from fundamentallm.data.permutation import Permutation, derive_key

# What a key is drawn for, so that no two draws of a seed and epoch share one.
ORDER, PHASE, SHUFFLE, MIXTURE = 1, 2, 3, 4
_STEPS_AHEAD = 64  # whose order is computed at once; one step at a time would cost 0.2 ms each


@dataclass(frozen=True)
class Batching:
    """How sequences are put together: sizes, order, and this rank's share.

    Attributes:
        sequence_length: T.
        batch_size: B, sequences in a micro-batch of one rank.
        accumulation_steps: A, micro-batches of one rank in a step.
        seed: of the order.
        rank: this rank, 0 to R - 1.
        world_size: R.

    Raises:
        ValueError: a size below 1, or no such rank.
    """

    sequence_length: int
    batch_size: int
    accumulation_steps: int = 1
    seed: int = 0
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        """Check the sizes."""
        if self.sequence_length < 1 or self.batch_size < 1:
            raise ValueError(
                f"sequence_length and batch_size must be at least 1, got {self.sequence_length}"
                f" and {self.batch_size}"
            )
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank must lie in 0 to {self.world_size - 1}, got {self.rank}")
        if self.accumulation_steps < 1:
            raise ValueError(
                f"accumulation_steps must be at least 1, got {self.accumulation_steps}"
            )


class ValidationBatches(Protocol):
    """What yields the micro-batches of a validation split.

    Attributes:
        num_tokens: targets that count, over all ranks.
    """

    num_tokens: int

    def __len__(self) -> int:
        """Return the batches over all ranks."""

    def __iter__(self) -> Iterator[Batch]:
        """Yield this rank's batches."""


class EpochLoader(ABC):
    """Windows of rows, each row once an epoch, in an order drawn for that epoch.

    Step s takes positions [s B A R, (s + 1) B A R) of the order; the last step of an epoch may be
    shorter. Micro-batch m of rank r takes rows m B R + r B and the B - 1 after it. What a row is, a
    subclass says.

    Args:
        num_sequences: rows in an epoch.
        batching: sizes, seed and rank.
    """

    def __init__(self, num_sequences: int, batching: Batching) -> None:
        self.num_sequences = num_sequences
        self.batching = batching
        self.sequence_length = batching.sequence_length
        self.batch_size = batching.batch_size
        self.rows_per_step = batching.batch_size * batching.accumulation_steps * batching.world_size
        self._epoch = 0
        self._step = 0
        self._drawn: tuple[tuple[int, int], np.ndarray] | None = None

    def __len__(self) -> int:
        """Return the optimizer steps in an epoch."""
        return -(-self.num_sequences // self.rows_per_step)

    @property
    def tokens_per_step(self) -> int:
        """Targets that count in a full step over all ranks."""
        return self.computed_per_step

    @property
    def computed_per_step(self) -> int:
        """Tokens that a model computes in a full step over all ranks, padding included."""
        return self.rows_per_step * self.sequence_length

    @property
    def targets_per_epoch(self) -> int:
        """Targets that count in an epoch over all ranks."""
        return self.num_sequences * self.sequence_length

    def steps_for_tokens(self, num_tokens: int) -> int:
        """Return the fewest steps from the first on whose targets are at least that many.

        The last step of an epoch may be shorter than the others.
        """
        epochs, rest = divmod(num_tokens, self.targets_per_epoch)
        return epochs * len(self) + self._steps_within(epochs, rest)

    def _steps_within(self, epoch: int, num_tokens: int) -> int:
        """Return the fewest steps of an epoch for fewer tokens than it has."""
        return -(-num_tokens // (self.rows_per_step * self.sequence_length))

    def set_position(self, epoch: int, step: int) -> None:
        """Stand before step `step` (from 0) of epoch `epoch` (from 0)."""
        self._epoch, self._step = epoch, step

    def __iter__(self) -> Iterator[Window]:
        """Yield the step batches from the position to its epoch's end; the next epoch follows."""
        while self._step < len(self):
            window = self.window_at(self._epoch, self._step)
            self._step += 1
            yield window
        self._epoch, self._step = self._epoch + 1, 0

    def rows_at(self, epoch: int, step: int) -> np.ndarray:
        """Return the number of each sequence of a step, over all ranks, in order.

        Raises:
            ValueError: an epoch has no such step.
        """
        if not 0 <= step < len(self):
            raise ValueError(f"step {step} of an epoch of {len(self)} steps")
        block, place = divmod(step, _STEPS_AHEAD)
        drawn = self._drawn  # looked at once: a thread may read ahead meanwhile
        if drawn is None or drawn[0] != (epoch, block):
            first = block * _STEPS_AHEAD * self.rows_per_step
            last = min(first + _STEPS_AHEAD * self.rows_per_step, self.num_sequences)
            order = Permutation(self.num_sequences, derive_key(self.batching.seed, epoch, ORDER))
            drawn = self._drawn = (epoch, block), order(np.arange(first, last))
        begin = place * self.rows_per_step
        rows: np.ndarray = drawn[1][begin : begin + self.rows_per_step].copy()
        return rows

    def window_at(self, epoch: int, step: int) -> Window:
        """Return this rank's share of a step.

        Raises:
            ValueError: an epoch has no such step.
        """
        rows = self.rows_at(epoch, step)
        per_round = self.batch_size * self.batching.world_size
        micro_batches = []
        for start in range(0, len(rows), per_round):
            begin = start + self.batching.rank * self.batch_size
            own = rows[begin : min(begin + self.batch_size, start + per_round)]
            # The other ranks wait for this one in the collectives of their backward pass.
            micro_batches.append(self._gather(own) if len(own) else self._masked_row())
        return Window(micro_batches, sum(count_valid(m["target_ids"]) for m in micro_batches))

    @abstractmethod
    def _gather(self, rows: np.ndarray) -> Batch:
        """Return the batch of some rows as `rows_at` returns them, at least one."""

    def _masked_row(self) -> Batch:
        shape = (1, self.sequence_length)
        return {
            "input_ids": torch.zeros(shape, dtype=torch.int64),
            "target_ids": torch.full(shape, IGNORED, dtype=torch.int64),
        }
