"""Outliers of a series, by the median and the median absolute deviation (MAD) of its history.

Both are robust: half of the history would have to be outliers before they change much (Rousseeuw
and Croux, "Alternatives to the Median Absolute Deviation", 1993).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from typing import Any

from fundamentallm.training.saved import saved_numbers

# The MAD of a normal distribution is 0.6745 standard deviations.
NORMAL_MAD = 0.6744897501960817


class RobustWindow:
    """The last accepted values of a quantity, and how far above them a new value lies.

    Args:
        size: number of values stored.
        needed: number of values from which the MAD is used.
        floor: smallest scale, as a fraction of the median, for values that hardly vary.
        smallest: smallest scale, in the quantity's unit.
        early: the scale while there are fewer than `needed` values, as a fraction of their median;
            None gives no outliers until then.

    Attributes:
        median: of the values; NaN if there are none.
        scale: the unit of a score: the robust standard deviation of the values, not below its
            floors; infinity while there are too few values.
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
        """Return the number of values."""
        return len(self._values)

    @property
    def full(self) -> bool:
        """Whether there are enough values for the MAD."""
        return len(self._values) >= self.needed

    def score(self, value: float) -> float:
        """Return how many robust standard deviations a value lies above the median.

        It is 0 while there are too few values, and infinity for NaN and infinity.
        """
        if not math.isfinite(value):
            return math.inf if value != -math.inf else 0.0
        return 0.0 if self.scale == math.inf else (value - self.median) / self.scale

    def limit(self, threshold: float) -> float:
        """Return the largest value whose score does not exceed a threshold; it may be infinity."""
        return math.inf if self.scale == math.inf else self.median + threshold * self.scale

    def extend(self, values: Iterable[float]) -> None:
        """Add values of accepted steps; values that are not finite are left out."""
        self._values.extend([value for value in values if math.isfinite(value)])
        self._measure()

    def clear(self) -> None:
        """Remove all values."""
        self._values.clear()
        self._measure()

    def state_dict(self) -> dict[str, Any]:
        """Return the values."""
        return {"values": list(self._values)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load values; the newest `size` of them are used."""
        self._values.clear()
        self._values.extend(saved_numbers(state_dict, "values"))
        self._measure()

    def _measure(self) -> None:
        self.median, self.scale = math.nan, math.inf
        if not self._values:
            return
        self.median = _median(self._values)
        if self.full:
            median = self.median
            mad = _median([abs(value - median) for value in self._values])
            self.scale = max(mad / NORMAL_MAD, self.floor * abs(self.median), self.smallest)
        elif self.early is not None:
            self.scale = max(self.early * abs(self.median), self.smallest)


def _median(values: Iterable[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    if len(ordered) % 2:
        return ordered[middle]
    return (ordered[middle - 1] + ordered[middle]) / 2
