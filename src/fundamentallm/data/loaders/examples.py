"""Windows of examples of prompt and response, one a row."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fundamentallm.data.batch import Batch
from fundamentallm.data.examples import EncodedExamples
from fundamentallm.data.loaders.epoch import Batching, EpochLoader
from fundamentallm.errors import DataError


class ExampleLoader(EpochLoader):
    """Windows of examples, one a row, each once an epoch (`EpochLoader`).

    Args:
        examples: what to train on.
        batching: sizes, seed and rank; T is at least an example's tokens less one.

    Raises:
        DataError: there are no examples.
    """

    def __init__(self, examples: EncodedExamples, batching: Batching) -> None:
        if not len(examples):
            raise DataError(
                "there are no examples to train on",
                expected="at least 1 in the training part of data.split",
                fix="add examples, or raise the first fraction of data.split",
            )
        super().__init__(len(examples), batching)
        self.examples = examples

    @property
    def tokens_per_step(self) -> int:
        """Targets that count in a step over all ranks, on average."""
        return max(1, round(self.targets_per_epoch / len(self)))

    @property
    def targets_per_epoch(self) -> int:
        """Targets that count in an epoch over all ranks."""
        return int(self.examples.num_targets.sum())

    def _steps_within(self, epoch: int, num_tokens: int) -> int:
        step = 0
        while num_tokens > 0:
            num_tokens -= int(self.examples.num_targets[self.rows_at(epoch, step)].sum())
            step += 1
        return step

    def _gather(self, rows: np.ndarray) -> Batch:
        return self.examples.batch(rows, self.sequence_length)


class ExampleValidationLoader:
    """Every example once, in order.

    Args:
        examples: what to evaluate on; none is an empty loader.
        batching: sizes and rank; rank r takes each world_size-th batch.

    Attributes:
        num_tokens: targets that count, over all ranks.
    """

    def __init__(self, examples: EncodedExamples, batching: Batching) -> None:
        self.examples = examples
        self.batching = batching
        self.sequence_length = batching.sequence_length
        self.batch_size = batching.batch_size
        self.num_tokens = int(examples.num_targets.sum())

    def __len__(self) -> int:
        """Return the batches over all ranks."""
        return -(-len(self.examples) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """Yield this rank's batches."""
        for number in range(self.batching.rank, len(self), self.batching.world_size):
            first = number * self.batch_size
            last = min(first + self.batch_size, len(self.examples))
            yield self.examples.batch(np.arange(first, last), self.sequence_length)
