"""Is a number unusual among the ones before it? Median and MAD over a window.

Both resist what they are to find: half of the window would have to be outliers before the verdict
moves (Rousseeuw and Croux, "Alternatives to the Median Absolute Deviation", 1993).
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence
from typing import Any

# The MAD of a normal distribution is 0.6745 standard deviations.
NORMAL_MAD = 0.6744897501960817


class RobustWindow:
    """The last accepted values of a quantity, and how far a new one lies above them.

    The values are kept in order, so that a median is read in constant time and a score costs a
    few microseconds a step.

    Args:
        size: values remembered.
        needed: values before anything is called unusual.
        floor: smallest scale, as a share of the median: values that hardly vary make every change
            look large.
        smallest: smallest scale, in the quantity's own unit.
        early: the scale while there are too few values, as a share of the median of those that
            there are; None calls nothing unusual then.
    """

    def __init__(
        self,
        size: int = 128,
        needed: int = 32,
        floor: float = 0.02,
        smallest: float = 1e-12,
        early: float | None = None,
    ) -> None:
        if not 2 <= needed <= size:
            raise ValueError(f"needed must lie in 2 to {size}, got {needed}")
        self.needed = needed
        self.floor = floor
        self.smallest = smallest
        self.early = early
        self._values: deque[float] = deque(maxlen=size)
        self._ordered: list[float] = []

    def __len__(self) -> int:
        """Return how many values are remembered."""
        return len(self._values)

    def score(self, value: float) -> float:
        """Return how many robust standard deviations a value lies above the median.

        While there are too few values it is 0, or measured by `early`; infinity for NaN and
        infinity.
        """
        if not math.isfinite(value):
            return math.inf if value != -math.inf else 0.0
        if len(self._values) < self.needed:
            if self.early is None or not self._values:
                return 0.0
            return (value - self.median) / max(self.early * abs(self.median), self.smallest)
        return (value - self.median) / self.scale

    def exceeds(self, value: float, threshold: float) -> bool:
        """Tell whether the score is above a threshold, without the MAD where the floors decide."""
        if len(self._values) >= self.needed and math.isfinite(value):
            median = self.median
            if value - median <= threshold * max(self.floor * abs(median), self.smallest):
                return False
        return self.score(value) > threshold

    @property
    def median(self) -> float:
        """The median of the values; NaN if there are none."""
        return _median(self._ordered) if self._ordered else math.nan

    @property
    def scale(self) -> float:
        """The robust standard deviation of the values, at least as large as its floors."""
        median = self.median
        mad = _mad(self._ordered, median) if self._ordered else math.nan
        return max(mad / NORMAL_MAD, self.floor * abs(median), self.smallest)

    def accept(self, value: float) -> None:
        """Remember a value of a healthy step; one that is not finite never enters."""
        if not math.isfinite(value):
            return
        if len(self._values) == self._values.maxlen:
            del self._ordered[bisect_left(self._ordered, self._values[0])]
        self._values.append(value)
        insort(self._ordered, value)

    def clear(self) -> None:
        """Forget all values."""
        self._values.clear()
        self._ordered.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return the window."""
        return {"values": list(self._values)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a window; of a larger one the newest values."""
        self._values.clear()
        self._values.extend(state_dict["values"])
        self._ordered = sorted(self._values)


def _median(ordered: Sequence[float]) -> float:
    middle = len(ordered) // 2
    if len(ordered) % 2:
        return ordered[middle]
    return (ordered[middle - 1] + ordered[middle]) / 2


def _mad(ordered: Sequence[float], median: float) -> float:
    """Return the median distance from the median: the distances grow to both sides of it."""
    right = bisect_left(ordered, median)
    left = right - 1
    distances: list[float] = []
    # One more than half of them, in growing order, holds the median of all.
    for _ in range(len(ordered) // 2 + 1):
        if right == len(ordered) or (
            left >= 0 and median - ordered[left] <= ordered[right] - median
        ):
            distances.append(median - ordered[left])
            left -= 1
        else:
            distances.append(ordered[right] - median)
            right += 1
    if len(ordered) % 2:
        return distances[-1]
    return (distances[-2] + distances[-1]) / 2
