"""Which small runs to measure within a time, and what they say about the speed of any size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fundamentallm.engine.planning.shapes import Shape

LEAST_STEPS = 60  # of a small run: fewer are all warmup
LEAST_RUNS = 4
SPARE = 0.9  # of the time that is planned for: speeds vary
BEST_RATIO = 4.0  # tokens a parameter, about which the best size lies in short runs
MOST_PASSES = 16.0  # over a text that count as new text, for this first guess
SIZE_STEP = 3.0  # parameters of one measured size over those of the next smaller one

# (size, from 0 for the smallest; share of the time; learning rate over that of the rule). The
# middle size, about the best one, takes most, since the plan extrapolates from it; rates are
# cheapest to compare on the smallest. Where the time is short, runs of too few steps are left out.
RUNS = (
    (1, 0.36, 1.0),
    (0, 0.14, 1.0),
    (1, 0.10, 1.0),
    (2, 0.22, 1.0),
    (0, 0.04, 1.0),
    (0, 0.04, 0.5),
    (0, 0.04, 2.0),
)


@dataclass(frozen=True, slots=True)
class Speed:
    """Seconds to train on a token: `base` + `per_flop` times the model's operations for it."""

    base: float
    per_flop: float

    def token_seconds(self, flops: float) -> float:
        """Return the seconds of a token for a model of so many operations a token."""
        return self.base + self.per_flop * flops

    @classmethod
    def fitted(cls, flops: Sequence[float], seconds: Sequence[float]) -> Speed:
        """Fit both numbers, neither negative, so that the relative errors are small.

        Args:
            flops: of each measured model.
            seconds: of a token of each.
        """
        times = np.asarray(seconds, dtype=np.float64)
        columns = np.stack([1 / times, np.asarray(flops, dtype=np.float64) / times], axis=1)
        if len(set(flops)) > 1:
            base, per_flop = np.linalg.lstsq(columns, np.ones(len(times)), rcond=None)[0]
            if base >= 0 and per_flop >= 0:
                return cls(float(base), float(per_flop))
            if per_flop < 0:
                return cls(float(columns[:, 0].sum() / (columns[:, 0] ** 2).sum()), 0.0)
        return cls(0.0, float(columns[:, 1].sum() / (columns[:, 1] ** 2).sum()))


@dataclass(frozen=True, slots=True)
class PlannedTrial:
    """A small run to measure.

    Attributes:
        shape: the model's.
        steps: of the run.
        rate: its learning rate over that of the rule for its size.
        seconds: that it is expected to take.
    """

    shape: Shape
    steps: int
    rate: float
    seconds: float


def sizes_to_measure(
    shapes: Sequence[Shape], speed: Speed, seconds: float, unique_tokens: int
) -> list[Shape]:
    """Return up to three sizes, the smallest first, about the best one to plan.

    Args:
        shapes: to choose from, the smallest first.
        speed: of training.
        seconds: of the planned run.
        unique_tokens: of the training text.
    """

    def off_balance(shape: Shape) -> float:
        tokens = min(seconds / speed.token_seconds(shape.flops), MOST_PASSES * unique_tokens)
        return abs(math.log(tokens / (BEST_RATIO * shape.parameters)))

    middle = min(shapes, key=off_balance).parameters
    places = {_nearest(shapes, middle * SIZE_STEP**power) for power in (-1, 0, 1)}
    while len(places) < min(3, len(shapes)):
        places.add(min(places) - 1 if min(places) > 0 else max(places) + 1)
    return [shapes[place] for place in sorted(places)]


def _nearest(shapes: Sequence[Shape], parameters: float) -> int:
    return min(
        range(len(shapes)), key=lambda place: abs(math.log(shapes[place].parameters / parameters))
    )


def design(
    sizes: Sequence[Shape], speed: Speed, seconds: float, step_tokens: int, extra: float
) -> list[PlannedTrial]:
    """Return the small runs, those with the fewest seconds first.

    Args:
        sizes: from `sizes_to_measure`.
        speed: of training.
        seconds: for all of them.
        step_tokens: tokens of an optimizer step.
        extra: seconds of a run besides its steps: to build the model and to evaluate.
    """
    chosen = list(RUNS)
    while chosen:
        usable = (seconds - extra * len(chosen)) / sum(share for _, share, _ in chosen)
        trials = []
        for size, share, rate in chosen:
            shape = sizes[min(size, len(sizes) - 1)]
            step = step_tokens * speed.token_seconds(shape.flops)
            steps = int(SPARE * usable * share / step)
            trials.append(PlannedTrial(shape, steps, rate, steps * step + extra))
        short = [place for place, trial in enumerate(trials) if trial.steps < LEAST_STEPS]
        if not short:
            return sorted(trials, key=lambda trial: trial.seconds)
        del chosen[max(short, key=lambda place: chosen[place][0])]  # its time serves the others
    return []
