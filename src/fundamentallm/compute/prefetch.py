"""Read the next step batch and copy it to the device during the present step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import torch

from fundamentallm.data.batch import Batch, Window
from fundamentallm.data.loaders import EpochLoader


def ahead(loader: Iterable[Any], device: torch.device) -> Iterable[Any]:
    """Return the loader; on a GPU a `Prefetch` of it, if it is a function of its position.

    A CPU computes directly with the memory of a step batch; reading it takes about 60
    microseconds, and no second processor could do it.
    """
    if device.type != "cuda" or not isinstance(loader, EpochLoader):
        return loader
    return Prefetch(loader, device)


class Prefetch:
    """Yields the step batches of a loader in order, in the device's memory.

    A thread reads the next step batch into pinned memory, and copies it
    on a separate stream. Pinned and device memory come from torch's caches, so that a step
    allocates neither. An error of the loader is raised in place of its step batch.

    Args:
        loader: whose step batches are a pure function of its position: a thread calls it.
        device: the target device.
    """

    def __init__(self, loader: EpochLoader, device: torch.device) -> None:
        self._loader = loader
        self._device = device
        self._stream = (
            torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            if device.type == "cuda"
            else None
        )

    def __iter__(self) -> Iterator[Window]:
        """Yield until the loader ends."""
        windows = iter(self._loader)
        with ThreadPoolExecutor(1, "prefetch") as thread:
            coming = thread.submit(self._read, windows)
            while (window := coming.result()) is not None:
                self._await_copy(window)
                coming = thread.submit(self._read, windows)
                yield window

    def _read(self, windows: Iterator[Window]) -> Window | None:
        window = next(windows, None)
        if window is None:
            return None
        with torch.cuda.stream(self._stream) if self._stream else nullcontext():
            return Window([self._sent(batch) for batch in window.micro_batches], window.num_tokens)

    def _sent(self, batch: Batch) -> Batch:
        if self._stream is None:
            return {name: tensor.to(self._device) for name, tensor in batch.items()}
        return {
            name: tensor.pin_memory().to(self._device, non_blocking=True)
            for name, tensor in batch.items()
        }

    def _await_copy(self, window: Window) -> None:
        if self._stream is None:
            return
        computing = torch.cuda.current_stream(self._device)
        computing.wait_stream(self._stream)
        for batch in window.micro_batches:
            for tensor in batch.values():
                tensor.record_stream(computing)  # do not reuse the memory before it is read
