"""The search for the fastest plan: pure, over any function that measures a plan.

Precision, compilation and attention depend on each other (narrow weights pay off when compiled
and not before), so all their combinations are tried. How many rows go at once and how many threads
compute depends little on them, and the best is near the start: both climb one value at a time,
until it gets worse. The search repeats around the best plan while it finds a better one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fundamentallm.compute.plan import Plan

LEAST_GAIN = 0.03  # share of the time that another plan must save; less may be noise
ROUNDS = 3


@dataclass(frozen=True)
class Space:
    """The plans to search.

    Attributes:
        kinds: combinations of precision, bf16_weights, compile and attention.
        batch_sizes: rising.
        threads: rising.
    """

    kinds: Sequence[Mapping[str, Any]]
    batch_sizes: Sequence[int]
    threads: Sequence[int | None]


def search(start: Plan, space: Space, seconds_of: Callable[[Plan], float | None]) -> Plan:
    """Return the fastest plan that was found.

    Args:
        start: where to begin; only a plan faster by `LEAST_GAIN` replaces it.
        space: what to try.
        seconds_of: seconds of a step, infinite after a fault; called once for each
            plan. None: the time is used up.
    """
    known: dict[Plan, float] = {}
    best = start

    def asked(setting: Plan) -> float:
        if setting not in known:
            seconds = seconds_of(setting)
            if seconds is None:
                raise _OutOfTime
            known[setting] = seconds
        return known[setting]

    try:
        if asked(start) == math.inf:  # perhaps too large: continue with smaller ones
            smaller = [size for size in space.batch_sizes if size < start.batch_size]
            tries = (replace(start, batch_size=size) for size in reversed(smaller))
            best = next((tried for tried in tries if asked(tried) < math.inf), start)
        for _ in range(ROUNDS):
            before = best
            for kind in space.kinds:
                best = _better(best, replace(best, **kind), asked)
            for axis, values in (("batch_size", space.batch_sizes), ("threads", space.threads)):
                for walk in _walks(values, getattr(best, axis)):
                    for value in walk:
                        tried = replace(best, **{axis: value})
                        best = _better(best, tried, asked)
                        if best != tried:
                            break
            if best == before:
                break
    except _OutOfTime:
        pass
    return best


def _better(best: Plan, tried: Plan, asked: Callable[[Plan], float]) -> Plan:
    return tried if asked(tried) < asked(best) * (1 - LEAST_GAIN) else best


def _walks(values: Sequence[Any], start: Any) -> Iterator[Sequence[Any]]:
    """Yield the values above the start, rising, and those below it, falling."""
    place = values.index(start)
    yield values[place + 1 :]
    yield values[:place][::-1]


class _OutOfTime(Exception):  # noqa: N818 - not an error: it ends the search
    """The time for measuring is used up."""


def batch_sizes(rows: int, given: int) -> list[int]:
    """Return the micro-batches to try: divisors of the step's rows, about a factor 2 apart.

    Args:
        rows: sequences of one rank in an optimizer step.
        given: the configured micro-batch, a divisor of them.
    """
    divisors = [size for size in range(1, rows + 1) if rows % size == 0]
    chosen = [given]
    for size in divisors[divisors.index(given) + 1 :]:
        if size >= 2 * chosen[-1]:
            chosen.append(size)
    for size in reversed(divisors[: divisors.index(given)]):
        if 2 * size <= chosen[0]:
            chosen.insert(0, size)
    return chosen


def thread_counts(cores: int, given: int | None, default: int) -> list[int | None]:
    """Return the thread counts to try: powers of two, the cores and the configured number.

    Args:
        cores: that this process may use.
        given: the configured number; None for the default.
        default: the number that torch chooses, for which None stands.
    """
    powers = itertools.takewhile(lambda count: count < cores, (2**k for k in range(12)))
    counts = sorted({*powers, cores, given or default})
    return [None if given is None and count == default else count for count in counts]
