"""Is a number unusual among the ones before it? Median and MAD over a window.

Both resist what they are to find: half of the window would have to be outliers before the verdict
moves (Rousseeuw and Croux, "Alternatives to the Median Absolute Deviation", 1993).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from typing import Any

# The MAD of a normal distribution is 0.6745 standard deviations.
NORMAL_MAD = 0.6744897501960817


class RobustWindow:
    """The last accepted values of a quantity, and how far a new one lies above them.

    Args:
        size: values remembered.
        needed: values before anything is called unusual.
        floor: smallest scale, as a share of the median: values that hardly vary make every change
            look large.
        smallest: smallest scale, in the quantity's own unit.
        early: the scale while there are too few values, as a share of the median of those that
            there are; None calls nothing unusual then.

    Attributes:
        median: of the values; NaN if there are none.
        scale: what a score is measured in: the values' robust standard deviation, at least as large
            as its floors; infinity while nothing is called unusual.
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
        self.median = math.nan
        self.scale = math.inf
        self._values: deque[float] = deque(maxlen=size)

    def __len__(self) -> int:
        """Return how many values are remembered."""
        return len(self._values)

    @property
    def full(self) -> bool:
        """Whether there are enough values for the MAD to hold."""
        return len(self._values) >= self.needed

    def score(self, value: float) -> float:
        """Return how many robust standard deviations a value lies above the median.

        While nothing is called unusual it is 0; infinity for NaN and infinity.
        """
        if not math.isfinite(value):
            return math.inf if value != -math.inf else 0.0
        return 0.0 if self.scale == math.inf else (value - self.median) / self.scale

    def limit(self, threshold: float) -> float:
        """Return the largest value whose score is no more than a threshold; it may be infinity."""
        return math.inf if self.scale == math.inf else self.median + threshold * self.scale

    def extend(self, values: Iterable[float]) -> None:
        """Remember values of healthy steps; those that are not finite never enter."""
        self._values.extend(value for value in values if math.isfinite(value))
        self._measure()

    def clear(self) -> None:
        """Forget all values."""
        self._values.clear()
        self._measure()

    def state_dict(self) -> dict[str, Any]:
        """Return the window."""
        return {"values": list(self._values)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a window; of a larger one the newest values."""
        self._values.clear()
        self._values.extend(state_dict["values"])
        self._measure()

    def _measure(self) -> None:
        self.median, self.scale = math.nan, math.inf
        if not self._values:
            return
        self.median = _median(self._values)
        if self.full:
            mad = _median(abs(value - self.median) for value in self._values)
            self.scale = max(mad / NORMAL_MAD, self.floor * abs(self.median), self.smallest)
        elif self.early is not None:
            self.scale = max(self.early * abs(self.median), self.smallest)


def _median(values: Iterable[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    if len(ordered) % 2:
        return ordered[middle]
    return (ordered[middle - 1] + ordered[middle]) / 2
