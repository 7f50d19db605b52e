"""Loaders: one optimizer step's window of micro-batches at a time, in an order that is computed.

The batch at (epoch, step) is a pure function of the seed, so any point of any epoch is reached at
once, and the sequences of a step are the same however they are split into micro-batches and ranks.

Shapes: N tokens in the split, T sequence length, B batch size, A accumulation steps, R ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from fundamentallm.data.permutation import Permutation, derive_key
from fundamentallm.data.token_file import FileTokens, FileWindows, Tokens
from fundamentallm.errors import DataError

IGNORED = -100  # the target of a token that counts for nothing
_REQUIRED, _OPTIONAL = ("input_ids", "target_ids"), ("document_ids",)

# What a key is drawn for, so that no two draws of a seed and epoch share one.
_ORDER, _PHASE, _SHUFFLE = 1, 2, 3
_STEPS_AHEAD = 64  # whose order is computed at once: alone, a step's would cost it 0.2 ms

Batch = dict[str, Tensor]
"""`input_ids` and `target_ids`, int64 (B, T); where documents are packed apart also `document_ids`,
int64 (B, T): the number of the document that a token belongs to, rising along a row from 0."""


@dataclass(frozen=True, slots=True)
class Window:
    """The data of one optimizer step, as far as this rank has it.

    Attributes:
        micro_batches: each `{"input_ids", "target_ids"}`, int64 (B, T); the last may have fewer
            rows.
        num_tokens: valid targets in them, counted on the host.
    """

    micro_batches: list[Batch]
    num_tokens: int


class EpochLoader(ABC):
    """Windows of rows, each row once an epoch, in an order drawn for that epoch.

    Step s takes positions [s B A R, (s + 1) B A R) of the order; the last step of an epoch may be
    shorter. Micro-batch m of rank r takes rows m B R + r B and the B - 1 after it. What a row is, a
    subclass says.

    Args:
        num_sequences: rows in an epoch.
        sequence_length: T.
        batch_size: B, sequences in a micro-batch of one rank.
        accumulation_steps: A, micro-batches of one rank in a step.
        seed: of the order.
        rank: this rank, 0 to R - 1.
        world_size: R.
    """

    def __init__(
        self,
        num_sequences: int,
        sequence_length: int,
        batch_size: int,
        accumulation_steps: int,
        seed: int,
        rank: int,
        world_size: int,
    ) -> None:
        self.num_sequences = num_sequences
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.rows_per_step = batch_size * accumulation_steps * world_size
        self._epoch = 0
        self._step = 0
        self._drawn: tuple[tuple[int, int], np.ndarray] | None = None

    def __len__(self) -> int:
        """Return the optimizer steps in an epoch."""
        return -(-self.num_sequences // self.rows_per_step)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a full step over all ranks."""
        return self.rows_per_step * self.sequence_length

    def set_position(self, epoch: int, step: int) -> None:
        """Stand before step `step` (from 0) of epoch `epoch` (from 0)."""
        self._epoch, self._step = epoch, step

    def __iter__(self) -> Iterator[Window]:
        """Yield the windows from the position to the end of its epoch, then stand at the next."""
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
            order = Permutation(self.num_sequences, derive_key(self.seed, epoch, _ORDER))
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
        per_round = self.batch_size * self.world_size
        micro_batches = []
        for start in range(0, len(rows), per_round):
            begin = start + self.rank * self.batch_size
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


class TokenWindowLoader(EpochLoader):
    """Windows over a sequence of tokens, shuffled anew in each epoch.

    An epoch cuts the tokens into n = max(1, (N - T) // T) sequences that do not overlap, from a
    phase drawn for that epoch, and visits them in an order drawn for it (`EpochLoader`).

    Args:
        tokens: (N,) integers: an array, a token file or a tensor, never copied, or a list.
        sequence_length: T.
        batch_size: B, sequences in a micro-batch of one rank.
        accumulation_steps: A, micro-batches of one rank in a step.
        seed: of phase and order.
        rank: this rank, 0 to R - 1.
        world_size: R.
        end_id: the token behind each document, if documents are packed apart (`add_documents`).

    Raises:
        DataError: fewer than T + 1 tokens.
        ValueError: a size below 1, no such rank, or tokens that are not one row of integers.
    """

    def __init__(
        self,
        tokens: Tokens | Tensor | Sequence[int],
        sequence_length: int,
        batch_size: int,
        accumulation_steps: int = 1,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        end_id: int | None = None,
    ) -> None:
        check_sizes(sequence_length, batch_size, rank, world_size, accumulation_steps)
        self.end_id = end_id
        ids = as_tokens(tokens)
        if len(ids) < sequence_length + 1:
            raise DataError(
                "the text is too short for a single sequence",
                got=f"{len(ids):,} tokens to train on",
                expected=f"at least {sequence_length + 1:,} (data.sequence_length + 1)",
                fix="lower data.sequence_length or add text",
            )
        super().__init__(
            max(1, (len(ids) - sequence_length) // sequence_length),
            sequence_length,
            batch_size,
            accumulation_steps,
            seed,
            rank,
            world_size,
        )
        slack = len(ids) - 1 - self.num_sequences * sequence_length
        self._num_phases = min(sequence_length - 1, slack) + 1
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
        order = Permutation(self.num_sequences, derive_key(self.seed, epoch, _ORDER))
        return self._starts(epoch, order(positions))

    def _starts(self, epoch: int, sequences: np.ndarray) -> np.ndarray:
        phase = derive_key(self.seed, epoch, _PHASE) % self._num_phases
        starts: np.ndarray = phase + sequences * self.sequence_length
        return starts

    def batch_from(self, starts: np.ndarray) -> Batch:
        """Return the sequences that begin at some tokens."""
        return self._gather(starts)

    def _gather(self, rows: np.ndarray) -> Batch:
        windows = torch.from_numpy(self._windows[rows].astype(np.int64))
        # Contiguous, hence apart: a batch may be viewed flat, and writing to one part of it must
        # not change the other.
        batch = {
            "input_ids": windows[:, :-1].contiguous(),
            "target_ids": windows[:, 1:].contiguous(),
        }
        return add_documents(batch, self.end_id)


class ValidationLoader:
    """Every target of a split exactly once, in order, in windows that do not overlap.

    Args:
        tokens: (N,) integers as for `TokenWindowLoader`; fewer than two are an empty loader.
        sequence_length: T; the last window is padded with ignored targets.
        batch_size: B.
        rank: this rank; rank r takes each world_size-th batch.
        world_size: number of ranks.
        end_id: as for `TokenWindowLoader`.

    Attributes:
        num_tokens: targets over all ranks.

    Raises:
        ValueError: a size below 1, no such rank, or tokens that are not one row of integers.
    """

    def __init__(
        self,
        tokens: Tokens | Tensor | Sequence[int],
        sequence_length: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        end_id: int | None = None,
    ) -> None:
        check_sizes(sequence_length, batch_size, rank, world_size)
        self.end_id = end_id
        self.tokens = as_tokens(tokens)
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.num_tokens = max(0, len(self.tokens) - 1)

    def __len__(self) -> int:
        """Return the batches over all ranks."""
        return -(-self.num_tokens // (self.sequence_length * self.batch_size))

    def __iter__(self) -> Iterator[Batch]:
        """Yield this rank's batches."""
        span = self.sequence_length * self.batch_size
        for number in range(self.rank, len(self), self.world_size):
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


class WindowLoader:
    """A plain DataLoader as windows of `accumulation_steps` batches.

    A loader that shuffles draws its order from torch's CPU generator. Here that generator is seeded
    from (seed, epoch) while the order is drawn and put back after, so the order is a pure function
    and the training's own random numbers are untouched. A generator of the loader's own is seeded
    alike, and a sampler with `set_epoch` is told the epoch.

    Args:
        loader: yields `{"input_ids", "target_ids"}` or `(inputs, targets)`; has a length.
        accumulation_steps: batches in a window; the last window of an epoch may have fewer.
        seed: of the order.

    Raises:
        ValueError: accumulation_steps below 1.
    """

    def __init__(self, loader: Any, accumulation_steps: int = 1, seed: int = 0) -> None:
        if accumulation_steps < 1:
            raise ValueError(f"accumulation_steps must be at least 1, got {accumulation_steps}")
        self.loader = loader
        self.accumulation_steps = accumulation_steps
        self.seed = seed
        self._epoch = 0
        self._step = 0

    def __len__(self) -> int:
        """Return the windows in an epoch."""
        return -(-len(self.loader) // self.accumulation_steps)

    def set_position(self, epoch: int, step: int) -> None:
        """Stand before step `step` of epoch `epoch`; what lies before it is drawn and dropped."""
        self._epoch, self._step = epoch, step

    def __iter__(self) -> Iterator[Window]:
        """Yield the windows from the position to the end of its epoch, then stand at the next."""
        batches = self._epoch_batches()
        for _ in range(self._step * self.accumulation_steps):
            next(batches, None)
        while window := self._next_window(batches):
            self._step += 1
            yield window
        self._epoch, self._step = self._epoch + 1, 0

    def _next_window(self, batches: Iterator[Any]) -> Window | None:
        micro_batches = []
        for batch in batches:
            micro_batches.append(as_batch(batch))
            if len(micro_batches) == self.accumulation_steps:
                break
        if not micro_batches:
            return None
        return Window(micro_batches, sum(count_valid(m["target_ids"]) for m in micro_batches))

    def _epoch_batches(self) -> Iterator[Any]:
        key = derive_key(self.seed, self._epoch, _SHUFFLE) % 2**63
        for part in self._parts_of_the_order():
            if isinstance(getattr(part, "generator", None), torch.Generator):
                part.generator.manual_seed(key)
            if hasattr(part, "set_epoch"):
                part.set_epoch(self._epoch)
        # Creating the iterator draws a seed for workers, and its first batch draws the order.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(key)  # torch.manual_seed seeds every GPU as well
            iterator = iter(self.loader)
            first = next(iterator, None)
        if first is not None:
            yield first
            yield from iterator

    def _parts_of_the_order(self) -> list[Any]:
        owners = [self.loader, getattr(self.loader, "batch_sampler", None)]
        return owners + [getattr(owner, "sampler", None) for owner in owners]


def as_window_loader(loader: Any, accumulation_steps: int = 1, seed: int = 0) -> Any:
    """Return a loader of windows: the loader itself if it is one, else a `WindowLoader` over it."""
    if hasattr(loader, "set_position"):
        return loader
    return WindowLoader(loader, accumulation_steps, seed)


def batch_shape_of(loader: Any) -> tuple[int | None, int | None]:
    """Return rows and tokens of a whole micro-batch, None for what the loader does not tell."""
    source = loader.loader if isinstance(loader, WindowLoader) else loader
    return getattr(source, "batch_size", None), getattr(source, "sequence_length", None)


def as_window(batch: Any) -> Window:
    """Return a batch as a window of one micro-batch; a window as it is."""
    if isinstance(batch, Window):
        return batch
    micro = as_batch(batch)
    return Window([micro], count_valid(micro["target_ids"]))


def as_batch(batch: Any) -> Batch:
    """Return `{"input_ids", "target_ids"}` of a mapping or an (inputs, targets) pair.

    Raises:
        ValueError: it is neither.
    """
    found = f"a {type(batch).__name__}"
    if isinstance(batch, Mapping):
        if {"input_ids", "target_ids"} <= batch.keys():
            return {key: batch[key] for key in (*_REQUIRED, *_OPTIONAL) if key in batch}
        found += " with the keys " + ", ".join(map(str, batch))
    elif isinstance(batch, (tuple, list)):
        if len(batch) == 2:
            return {"input_ids": batch[0], "target_ids": batch[1]}
        found += f" of {len(batch)}"
    raise ValueError(
        f"a batch must be {{'input_ids': ..., 'target_ids': ...}} or (inputs, targets), got {found}"
    )


def check_sizes(
    sequence_length: int,
    batch_size: int,
    rank: int,
    world_size: int,
    accumulation_steps: int = 1,
) -> None:
    """Check a loader's sizes and rank.

    Raises:
        ValueError: a size below 1, or no such rank.
    """
    if sequence_length < 1 or batch_size < 1:
        raise ValueError(
            f"sequence_length and batch_size must be at least 1, got {sequence_length} and"
            f" {batch_size}"
        )
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must lie in 0 to {world_size - 1}, got {rank}")
    if accumulation_steps < 1:
        raise ValueError(f"accumulation_steps must be at least 1, got {accumulation_steps}")


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


def add_documents(batch: Batch, end_id: int | None) -> Batch:
    """Number the documents of each row, in place; without an end there are none to number.

    The token behind a document is the first of the next: what follows it is what a document begins
    with. So every target counts, and each has been seen from its own document alone.
    """
    if end_id is not None:
        batch["document_ids"] = (batch["input_ids"] == end_id).cumsum(dim=1)
    return batch


def count_valid(targets: Tensor) -> int:
    """Return the number of targets that count: those not below 0."""
    return int((targets >= 0).sum())
