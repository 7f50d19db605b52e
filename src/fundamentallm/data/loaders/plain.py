"""Other loaders, such as torch's DataLoader, as loaders of step batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from fundamentallm.data.batch import Window, as_batch, count_valid
from fundamentallm.data.loaders.epoch import SHUFFLE
from fundamentallm.data.permutation import derive_key
from fundamentallm.errors import DataError


class WindowLoader:
    """A plain DataLoader as step batches of `accumulation_steps` batches.

    A loader that shuffles draws its order from torch's CPU generator. Here that generator is seeded
    from (seed, epoch) while the order is drawn and put back after, so the order is a pure function
    and the training's own random numbers are untouched. A generator of the loader's own is seeded
    alike, and a sampler with `set_epoch` gets the epoch.

    Args:
        loader: yields what `as_batch` takes; has a length.
        accumulation_steps: batches in a step batch; the last of an epoch may have fewer.
        seed: of the order.

    Raises:
        DataError: the loader has no length.
        ValueError: accumulation_steps below 1.
    """

    def __init__(self, loader: Any, accumulation_steps: int = 1, seed: int = 0) -> None:
        if accumulation_steps < 1:
            raise ValueError(f"accumulation_steps must be at least 1, got {accumulation_steps}")
        try:
            len(loader)
        except TypeError as error:
            raise DataError(
                "the loader has no length, so that a step has no place in an epoch",
                got=type(loader).__name__,
                expected="a loader over a dataset with a length",
                fix="read the stream into a file once (`fundamentallm prepare`, or"
                " Dataset.from_generator of datasets), and train on that",
            ) from error
        self.loader = loader
        self.accumulation_steps = accumulation_steps
        self.seed = seed
        self._epoch = 0
        self._step = 0

    def __len__(self) -> int:
        """Return the number of step batches in an epoch."""
        return -(-len(self.loader) // self.accumulation_steps)

    def set_position(self, epoch: int, step: int) -> None:
        """Stand before step `step` of epoch `epoch`; what lies before it is drawn and dropped."""
        self._epoch, self._step = epoch, step

    def __iter__(self) -> Iterator[Window]:
        """Yield the step batches from the position to its epoch's end; the next epoch follows."""
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
        key = derive_key(self.seed, self._epoch, SHUFFLE) % 2**63
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
    """Return a loader of step batches: the loader itself, or a `WindowLoader` over it."""
    if hasattr(loader, "set_position"):
        return loader
    return WindowLoader(loader, accumulation_steps, seed)


def batch_shape_of(loader: Any) -> tuple[int | None, int | None]:
    """Return rows and tokens of a whole micro-batch, None for what the loader does not tell."""
    source = loader.loader if isinstance(loader, WindowLoader) else loader
    return getattr(source, "batch_size", None), getattr(source, "sequence_length", None)
