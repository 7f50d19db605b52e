"""The search for the fastest setting: pure, over any function that measures one.

Precision, compilation and attention depend on each other (narrow weights pay when they are compiled
and not before), so all their combinations are tried. How many rows go at once and how many threads
compute depends little on them, and the best is near the start: both are climbed a value at a time,
until it gets worse. Then all of it again around the best, as long as that finds something.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from fundamentallm.config import RunConfig

LEAST_GAIN = 0.03  # share of the time that another setting must save: less may be chance
ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Setting:
    """What `tune` may change: how a step is computed, and not what.

    Attributes:
        precision: "fp32", "bf16" or "fp16".
        bf16_weights: whether bfloat16 copies of the weights take the place of autocast.
        compile: whether the block is compiled: by torch (True) or as native code ("native").
        attention: the kernel's name.
        batch_size: rows of a micro-batch; the step's rows stay, so accumulation follows.
        threads: of the CPU; None for torch's choice.
    """

    precision: str
    bf16_weights: bool
    compile: bool | Literal["native"]
    attention: str
    batch_size: int
    threads: int | None

    @classmethod
    def of(cls, config: RunConfig) -> Setting:
        """Return the setting of a configuration that is resolved."""
        training = config.training
        return cls(
            training.precision,
            training.bf16_weights is True,
            training.compile if training.compile != "auto" else False,
            training.attention,
            config.data.batch_size,
            training.threads,
        )

    def values(self, rows: int) -> dict[str, dict[str, Any]]:
        """Return the fields of a configuration that say this, by section.

        Args:
            rows: sequences of one rank in an optimizer step.
        """
        return {
            "data": {"batch_size": self.batch_size},
            "training": {
                "accumulation_steps": rows // self.batch_size,
                "precision": self.precision,
                "bf16_weights": self.bf16_weights,
                "attention": self.attention,
                "compile": self.compile,
                "threads": self.threads,
            },
        }

    def applied_to(self, config: RunConfig) -> RunConfig:
        """Return a configuration that computes the same steps in this way."""
        values = self.values(config.data.batch_size * config.training.accumulation_steps)
        training = {**values["training"], "mixed_precision": self.precision != "fp32"}
        return config.model_copy(
            update={
                "data": config.data.model_copy(update=values["data"]),
                "training": config.training.model_copy(update=training),
            }
        )


@dataclass(frozen=True)
class Space:
    """The settings to search.

    Attributes:
        kinds: combinations of precision, bf16_weights, compile and attention.
        batch_sizes: rising.
        threads: rising.
    """

    kinds: Sequence[Mapping[str, Any]]
    batch_sizes: Sequence[int]
    threads: Sequence[int | None]


def search(start: Setting, space: Space, seconds_of: Callable[[Setting], float | None]) -> Setting:
    """Return the fastest setting that was found.

    Args:
        start: where to begin; what is no faster than this by `LEAST_GAIN` does not replace it.
        space: what to try.
        seconds_of: seconds of a step, infinite where there is a fault; asked once for each
            setting. None: the time for the search is used up.
    """
    known: dict[Setting, float] = {}
    best = start

    def asked(setting: Setting) -> float:
        if setting not in known:
            seconds = seconds_of(setting)
            if seconds is None:
                raise _OutOfTime
            known[setting] = seconds
        return known[setting]

    try:
        if asked(start) == math.inf:  # too large, perhaps: then what goes on from here is smaller
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


def _better(best: Setting, tried: Setting, asked: Callable[[Setting], float]) -> Setting:
    return tried if asked(tried) < asked(best) * (1 - LEAST_GAIN) else best


def _walks(values: Sequence[Any], start: Any) -> Iterator[Sequence[Any]]:
    """Yield the values above the start, rising, and those below it, falling."""
    place = values.index(start)
    yield values[place + 1 :]
    yield values[:place][::-1]


class _OutOfTime(Exception):  # noqa: N818 - no error: it ends the search
    """The function that measures has no time left."""


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
    """Return the thread counts to try: powers of two up to the cores, those, and the given.

    Args:
        cores: that this process may use.
        given: the configured number; None for the default.
        default: the number that torch chooses, for which None stands.
    """
    powers = itertools.takewhile(lambda count: count < cores, (2**k for k in range(12)))
    counts = sorted({*powers, cores, given or default})
    return [None if given is None and count == default else count for count in counts]
