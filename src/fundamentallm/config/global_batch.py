"""The rows of a step over all ranks (`data.global_batch`), from which accumulation follows.

The order of the data is one for all ranks, so the same rows make the same step however they are
split into ranks and micro-batches: a run may go on with another number of ranks.
"""

from __future__ import annotations

import math

from fundamentallm.config.run import RunConfig
from fundamentallm.errors import ConfigError

FREE_WITH_EQUAL_ROWS = frozenset(
    {"data.global_batch", "data.batch_size", "training.accumulation_steps"}
)
"""Keys that may change when a run is resumed with as many rows a step as it had."""


def with_global_batch(config: RunConfig, world_size: int) -> RunConfig:
    """Return the configuration with the accumulation that its `data.global_batch` asks for.

    Args:
        config: as written; without a `global_batch` it is returned as it is.
        world_size: the number of ranks.

    Raises:
        ConfigError: no whole number of micro-batches makes the step, or `accumulation_steps` is set
            to another one.
    """
    rows, data, training = config.data.global_batch, config.data, config.training
    if rows is None:
        return config
    at_once = data.batch_size * world_size
    on_ranks = "on one rank" if world_size == 1 else f"on each of {world_size} ranks"
    if rows % at_once:
        with config.locating_errors("data.global_batch"):
            raise ConfigError(
                "data.global_batch is no whole number of micro-batches of all ranks",
                got=f"{rows} rows, in micro-batches of {data.batch_size} {on_ranks}",
                expected=_nearest(rows, data.batch_size, world_size),
                fix="change one of them, or the number of ranks",
            )
    steps = rows // at_once
    if "accumulation_steps" in training.model_fields_set and training.accumulation_steps != steps:
        with config.locating_errors("training.accumulation_steps"):
            raise ConfigError(
                "training.accumulation_steps and data.global_batch disagree",
                got=f"accumulation_steps {training.accumulation_steps}, global_batch {rows}",
                expected=f"accumulation_steps {steps}: {rows} rows in micro-batches of"
                f" {data.batch_size} {on_ranks}",
                fix="remove training.accumulation_steps; it follows from data.global_batch",
            )
    update = {"training": training.model_copy(update={"accumulation_steps": steps})}
    return config.model_copy(update=update)


def _nearest(rows: int, batch_size: int, world_size: int) -> str:
    """Return the nearest values that are possible, in words."""
    at_once = batch_size * world_size
    below = rows // at_once * at_once
    possible = "data.global_batch " + _either([below, below + at_once])
    if rows % world_size == 0:
        sizes = _divisors(rows // world_size)
        smaller = [size for size in sizes if size < batch_size][-1:]
        larger = [size for size in sizes if size > batch_size][:1]
        return f"{possible}, or data.batch_size {_either([*smaller, *larger])}"
    if rows % batch_size == 0:
        counts = _divisors(rows // batch_size)
        fewer = [count for count in counts if count < world_size][-1:]
        more = [count for count in counts if count > world_size][:1]
        return f"{possible}, or {_either([*fewer, *more])} ranks"
    return possible


def _divisors(number: int) -> list[int]:
    """Return all divisors, rising."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def _either(numbers: list[int]) -> str:
    return " or ".join(str(number) for number in numbers if number)
