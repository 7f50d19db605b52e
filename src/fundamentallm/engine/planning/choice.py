"""What to train in a time: the size, tokens and learning rate with the lowest expected loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fundamentallm.engine.planning.design import Speed
from fundamentallm.engine.planning.scaling_law import Point, Prediction, ScalingLaw
from fundamentallm.engine.planning.shapes import Shape

FARTHEST = 4.0  # times the largest measured size: the law is not trusted beyond
SHARES = (1.0, 0.8, 0.65, 0.5, 0.4, 0.3, 0.2)  # of the tokens that the time allows
LEAST_STEPS = 100
EVALUATIONS = 10
MOST_EVALUATING = 0.1  # share of the time, above which evaluations are made rarer
SAVING_SECONDS = 0.5  # of a checkpoint of a small model
LOWEST_RATE, HIGHEST_RATE = 0.5, 2.0  # over that of the rule, of a planned run
HIGHEST_TRIED = 4.0  # of a small run

# How the best rate falls with the number of parameters, as N^-k. Adam's: 0.65 from 0.06 to 0.8
# million parameters (docs/lab.md), 0.33 to 0.71 in publications. Muon's rate is relative to the
# size of each matrix.
RATE_EXPONENTS = {"adamw": 0.5, "adam": 0.5, "lion": 0.5}
# The best rate of a run of fewer steps than these is higher, as steps^-k (docs/lab.md).
SHORT_STEPS, SHORT_EXPONENT = 500, 0.4
LEAST_CONFIGURED = (
    2_000  # steps: a shorter run is a test, whose batch tells nothing about long ones
)
# How the step's tokens grow with those of the run (Bergsma et al. 2025, "Power lines").
BATCH_EXPONENT = 0.38


@dataclass(frozen=True, slots=True)
class Costs:
    """What the seconds of a run go into.

    Attributes:
        speed: of training.
        start: seconds until the first step.
        evaluation: seconds of a validation pass over those of training on as many tokens.
        validation_tokens: of a pass.
    """

    speed: Speed
    start: float
    evaluation: float
    validation_tokens: int

    def evaluating(self, shape: Shape) -> float:
        """Return the seconds of a validation pass and its checkpoint."""
        tokens = self.evaluation * self.validation_tokens
        return tokens * self.speed.token_seconds(shape.flops) + SAVING_SECONDS


@dataclass(frozen=True, slots=True)
class Cadence:
    """When a run evaluates.

    Attributes:
        steps: from one evaluation to the next.
        epochs: whether it also does at the end of each epoch.
        epoch_steps: of an epoch.
    """

    steps: int
    epochs: bool
    epoch_steps: int

    def count(self, steps: float) -> float:
        """Return the evaluations in so many steps, without the last one."""
        return steps / self.steps + (steps / self.epoch_steps if self.epochs else 0.0)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A run that could be planned.

    Attributes:
        shape: of the model.
        tokens: to train on.
        rate: the learning rate over that of the rule for the size.
        seconds: that it takes, from the start of the process to its end.
        is_full: whether it uses all of the time.
        prediction: of its validation loss.
    """

    shape: Shape
    tokens: int
    rate: float
    seconds: float
    is_full: bool
    prediction: Prediction


def affordable_tokens(
    shape: Shape, costs: Costs, cadence: Cadence, seconds: float, step_tokens: int
) -> float:
    """Return the tokens that a run of so many seconds trains on; below 0 if it cannot begin."""
    evaluating = costs.evaluating(shape)
    left = seconds - costs.start - evaluating - SAVING_SECONDS
    token = costs.speed.token_seconds(shape.flops)
    token += evaluating * cadence.count(1.0) / step_tokens
    return left / token


def calmer(
    shape: Shape, costs: Costs, cadence: Cadence, seconds: float, step_tokens: int
) -> Cadence:
    """Return a cadence that takes at most `MOST_EVALUATING` of the time for a model of a shape."""
    tokens = affordable_tokens(shape, costs, cadence, seconds, step_tokens)
    if tokens <= 0:
        return cadence
    if costs.evaluating(shape) * cadence.count(tokens / step_tokens) <= MOST_EVALUATING * seconds:
        return cadence
    free = Cadence(2**62, False, cadence.epoch_steps)
    steps = affordable_tokens(shape, costs, free, seconds, step_tokens) / step_tokens
    count = min(EVALUATIONS, max(1, int(MOST_EVALUATING * seconds / costs.evaluating(shape))))
    return Cadence(max(1, math.ceil(steps / count)), False, cadence.epoch_steps)


def candidates(
    shapes: Sequence[Shape],
    law: ScalingLaw,
    costs: Costs,
    cadence: Cadence,
    seconds: float,
    step_tokens: int,
    largest_measured: int,
) -> list[Candidate]:
    """Return the best run of each size that the time and the measurements allow, smallest first.

    Args:
        shapes: to choose from.
        law: of the loss.
        costs: of a run.
        cadence: of evaluations.
        seconds: of the run, from the start of the process.
        step_tokens: tokens of an optimizer step.
        largest_measured: parameters of the largest small run.
    """
    found = []
    for shape in shapes:
        if shape.parameters > FARTHEST * largest_measured:
            break
        own = calmer(shape, costs, cadence, seconds, step_tokens)
        most = affordable_tokens(shape, costs, own, seconds, step_tokens)
        choices = []
        for share in SHARES:
            tokens = int(share * most / step_tokens) * step_tokens
            if tokens < LEAST_STEPS * step_tokens:
                continue
            rate = min(max(law.best_rate(tokens), LOWEST_RATE), HIGHEST_RATE)
            prediction = law.predict(Point(shape.parameters, tokens, rate))
            time = seconds - (1 - share) * (seconds - costs.start)
            choices.append(Candidate(shape, tokens, rate, time, share == 1.0, prediction))
        if choices:
            found.append(min(choices, key=lambda choice: choice.prediction.loss))
    return found


def rule_rate(learning_rate: float, optimizer: str, parameters: int, configured: int) -> float:
    """Return the learning rate of a size, from the configured one for the configured size."""
    exponent = RATE_EXPONENTS.get(optimizer, 0.0)
    return learning_rate * math.pow(parameters / configured, -exponent)


def trial_rate(steps: int) -> float:
    """Return the rate of a small run over that of the rule."""
    raised = math.pow(steps / SHORT_STEPS, -SHORT_EXPONENT)
    return float(f"{min(max(raised, 1.0), HIGHEST_TRIED):.2g}")


def batch_factor(tokens: float, configured: float) -> float:
    """Return by how much the tokens of a step grow, a power of 2; 1 below twice as many.

    Args:
        tokens: of the planned run.
        configured: of the run that the configuration describes.
    """
    wished = BATCH_EXPONENT * math.log2(max(tokens, 1.0) / max(configured, 1.0))
    return float(2 ** max(0, int(wished)))
