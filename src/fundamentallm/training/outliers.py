"""Is a number unusual among the ones before it? Median and MAD over a window.

Both resist what they are to find: half of the window would have to be outliers before the verdict
moves (Rousseeuw and Croux, "Alternatives to the Median Absolute Deviation", 1993).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any

# The MAD of a normal distribution is 0.6745 standard deviations.
NORMAL_MAD = 0.6744897501960817


class RobustWindow:
    """The last accepted values of a quantity, and how far a new one lies above them.

    Median and scale are taken anew with each `every`th value, so that a step costs next to nothing:
    8 new values of 128 move the median by 4 ranks at most.

    Args:
        size: values remembered.
        needed: values before anything is called unusual.
        floor: smallest scale, as a share of the median: values that hardly vary make every change
            look large.
        smallest: smallest scale, in the quantity's own unit.
        early: the scale while there are too few values, as a share of the median of those that
            there are; None calls nothing unusual then.
        every: values between two looks at the window; while there are too few, each is looked at.

    Attributes:
        median: of the values at the last look; NaN before there are any.
        scale: their robust standard deviation, at least as large as its floors; NaN likewise.
    """

    def __init__(
        self,
        size: int = 128,
        needed: int = 32,
        floor: float = 0.02,
        smallest: float = 1e-12,
        early: float | None = None,
        every: int = 8,
    ) -> None:
        if not 2 <= needed <= size:
            raise ValueError(f"needed must lie in 2 to {size}, got {needed}")
        self.needed = needed
        self.floor = floor
        self.smallest = smallest
        self.early = early
        self.every = every
        self.median = math.nan
        self.scale = math.nan
        self._values: deque[float] = deque(maxlen=size)
        self._unseen = 0

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
        if len(self._values) >= self.needed:
            return (value - self.median) / self.scale
        if self.early is None or not self._values:
            return 0.0
        return (value - self.median) / max(self.early * abs(self.median), self.smallest)

    def accept(self, value: float) -> bool:
        """Remember a value of a healthy step; one that is not finite never enters.

        Returns:
            whether median and scale were taken anew.
        """
        if not math.isfinite(value):
            return False
        known = len(self._values)
        self._values.append(value)
        self._unseen += 1
        if known >= self.needed and self._unseen < self.every:
            return False
        self._look()
        return True

    def _look(self) -> None:
        self._unseen = 0
        ordered = sorted(self._values)
        self.median = _median(ordered)
        mad = _median(sorted(abs(value - self.median) for value in ordered))
        self.scale = max(mad / NORMAL_MAD, self.floor * abs(self.median), self.smallest)

    def clear(self) -> None:
        """Forget all values."""
        self._values.clear()
        self._unseen = 0
        self.median = self.scale = math.nan

    def state_dict(self) -> dict[str, Any]:
        """Return the window, and what was seen in it at the last look."""
        return {
            "values": list(self._values),
            "unseen": self._unseen,
            "median": self.median if self._values else None,
            "scale": self.scale if self._values else None,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a window; of a larger one the newest values."""
        self._values.clear()
        self._values.extend(state_dict["values"])
        self._unseen = state_dict["unseen"]
        self.median, self.scale = (
            math.nan if state_dict[name] is None else state_dict[name]
            for name in ("median", "scale")
        )


def _median(ordered: Sequence[float]) -> float:
    middle = len(ordered) // 2
    if len(ordered) % 2:
        return ordered[middle]
    return (ordered[middle - 1] + ordered[middle]) / 2
