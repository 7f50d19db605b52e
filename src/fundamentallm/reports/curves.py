"""The values of one metric over a run, and how many of them are drawn.

Up to `MAX_VALUES` values are exact. Of more, each bin of equally many values has its minimum, its
maximum and its first value that is not finite, at their own steps; the first and the last value
and those at the steps of incidents stay exact.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

MAX_VALUES = 4000


@dataclass(frozen=True)
class Curve:
    """The values of a metric in the order of the file.

    Attributes:
        steps: of each value.
        tokens: of the run up to each value.
        seconds: of the run up to each value.
        values: numbers, or "NaN", "Infinity" or "-Infinity" as `metrics.jsonl` has them.
    """

    steps: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    values: list[float | str] = field(default_factory=list)

    @property
    def columns(self) -> tuple[list[Any], ...]:
        """Steps, tokens, seconds and values."""
        return self.steps, self.tokens, self.seconds, self.values

    def finite(self) -> list[tuple[int, float]]:
        """Return (step, value) of the finite values."""
        pairs = zip(self.steps, self.values, strict=True)
        return [(step, value) for step, value in pairs if not isinstance(value, str)]

    def lowest(self) -> tuple[int, float] | None:
        """Return (step, value) of the first lowest finite value, None without one."""
        return min(self.finite(), key=lambda pair: pair[1], default=None)

    def last(self) -> tuple[int, float] | None:
        """Return (step, value) of the last finite value, None without one."""
        return next(reversed(self.finite()), None)


def drawn(curve: Curve, exact_at: Collection[int] = (), limit: int = MAX_VALUES) -> dict[str, Any]:
    """Return the values to draw as plain JSON: `step`, `tokens`, `seconds`, `value` and `bins`.

    `bins` is present only if values were left out: (first step, last step, number of values) of
    each bin, in order.

    Args:
        curve: all values.
        exact_at: steps whose values stay, beyond the limit if need be.
        limit: how many values are drawn, at least 5.
    """
    count = len(curve.steps)
    kept: Sequence[int] = range(count)
    bins: list[tuple[int, int, int]] = []
    if count > limit:
        width = math.ceil(count / ((limit - 2) // 3))
        chosen = {0, count - 1}
        chosen.update(i for i, step in enumerate(curve.steps) if step in exact_at)
        for first in range(0, count, width):
            inside = range(first, min(first + width, count))
            chosen.update(_outstanding(curve.values, inside))
            bins.append((curve.steps[inside[0]], curve.steps[inside[-1]], len(inside)))
        kept = sorted(chosen)
    shown: dict[str, Any] = {
        name: [column[i] for i in kept]
        for name, column in zip(("step", "tokens", "seconds", "value"), curve.columns, strict=True)
    }
    return {**shown, "bins": bins} if bins else shown


def _outstanding(values: Sequence[float | str], inside: range) -> set[int]:
    numbers: list[tuple[float, int]] = []
    found: set[int] = set()
    for i in inside:
        value = values[i]
        if isinstance(value, str):
            if not found:
                found.add(i)
        else:
            numbers.append((value, i))
    return found | ({min(numbers)[1], max(numbers)[1]} if numbers else set())
