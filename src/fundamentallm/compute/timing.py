"""How long the device took: by the host's clock on a CPU, by events of its stream on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch


class Timer(Protocol):
    """Marks moments in the device's work, and tells the time between two of them."""

    def mark(self) -> Any:
        """Return a moment: when the device has done all it was given so far."""

    def seconds(self, began: Any, ended: Any) -> float | None:
        """Return the time between two moments; None where the device has not got there yet."""


class HostTimer:
    """The host's clock: on a CPU what was given is done.

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
    """Events in the stream of a GPU, whose own clock tells them apart; no call waits for it.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> torch.cuda.Event:
        """Put an event behind what the current stream has to do."""
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
    """Return the timer that sees a device's work."""
    return CudaTimer(device) if device.type == "cuda" else HostTimer()
