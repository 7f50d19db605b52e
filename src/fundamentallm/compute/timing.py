"""Time on the device: by the host's clock on a CPU, by stream events on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch


class Timer(Protocol):
    """Marks moments in the device's work and measures the time between two of them."""

    def mark(self) -> Any:
        """Return the moment when the device finishes all work queued so far."""

    def seconds(self, began: Any, ended: Any) -> float | None:
        """Return the time between two moments; None if the device has not reached it yet."""


class HostTimer:
    """The host's clock: on a CPU, queued work is already done.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock

    def mark(self) -> float:
        """Return now."""
        return self._clock()

    def seconds(self, began: float, ended: float) -> float:
        """Return the difference."""
        return ended - began


class CudaTimer:
    """Events in the stream of a GPU, timed by the GPU's clock; no call waits for the GPU.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> torch.cuda.Event:
        """Record an event after the work in the current stream."""
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def seconds(self, began: torch.cuda.Event, ended: torch.cuda.Event) -> float | None:
        """Return the time between them by the GPU's clock (to half a microsecond)."""
        if not ended.query():  # type: ignore[no-untyped-call]
            return None
        milliseconds: float = began.elapsed_time(ended)
        return milliseconds / 1e3


def device_timer(device: torch.device) -> Timer:
    """Return the timer for a device."""
    return CudaTimer(device) if device.type == "cuda" else HostTimer()
