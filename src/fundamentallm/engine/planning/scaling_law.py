"""The loss of a run from its size, tokens and learning rate: a law fitted to a few small runs.

The law is that of Hoffmann et al. 2022 (equation 10), with three additions:

    L = (E + A N^-a + B D'^-b + O) exp(c ln(r / r')^2)

N parameters, D tokens, r the learning rate. A text of U tokens that is read more than once is worth
D' tokens (Muennighoff et al. 2023, equation 5), and is learnt by heart: O, over the passes P = D/U,
grows as N/U (P - 1). r' is the best rate, by a rule for the size; in runs of
a few hundred steps, of fewer than D0 tokens, it is higher, as (D/D0)^-h, and c is larger.

A few short runs do not determine so many numbers, so each has a prior: published values for the
exponents, the spread of our own runs for the rest (docs/lab.md). The posterior is sampled, and
gives an interval rather than a number. It holds what the runs leave open, the scatter of a
single run, and the error of the law itself, which grows with the distance from what was measured.

Losses are in nats per token; logarithms are natural.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

REPETITIONS_WORTH = 15.4  # R* of Muennighoff et al. 2023: passes whose data are worth new data
DEGREES = 5.0  # of freedom of the scatter, a Student t: one odd run does not bend the law
WALKERS, STEPS, KEPT = 96, 1600, 40  # of the sampler; a draw of each walker from the last steps
# Errors of the law, of the loss: for each factor of e beyond the largest measured run, and for each
# between a rate and the best one.
DRIFT, RATE_DRIFT = 0.004, 0.01

# name: (mean, standard deviation); all but `rate_shift` are logarithms. `floor`, `size` and `data`
# are shares of the lowest measured loss: E, and the two terms at the middle of the measured runs.
PRIORS = {
    "floor": (math.log(0.7), 0.12),
    "size": (math.log(0.07), 0.6),
    "size_exponent": (math.log(0.35), 0.25),
    "data": (math.log(0.25), 0.6),
    "data_exponent": (math.log(0.5), 0.12),
    "overfitting": (math.log(0.004), 0.25),
    "rate_cost": (math.log(0.01), 0.4),
    "rate_shift": (0.0, 0.2),
    "rate_exponent": (math.log(0.5), 0.25),
    "scatter": (math.log(0.0045), 0.4),
}
SHORT_COST = 0.7  # c grows as (D/D0)^-0.7 below D0: a rate that is off matters more in a short run


@dataclass(frozen=True, slots=True)
class Point:
    """A run as the law sees it.

    Attributes:
        parameters: N.
        tokens: D, those of repeated passes included.
        rate: r over the rate that the rule for its size gives (`choice.rule_rate`).
    """

    parameters: int
    tokens: float
    rate: float = 1.0


@dataclass(frozen=True, slots=True)
class Prediction:
    """The expected loss of a run.

    Attributes:
        loss: the median.
        low, high: between them it is with a probability of 80 %.
    """

    loss: float
    low: float
    high: float


class ScalingLaw:
    """The posterior of the law after some runs.

    Args:
        points: the runs.
        losses: the validation loss of each.
        unique_tokens: U, of the training text.
        reference_tokens: D0, from which on the best rate stays.
        seed: of the sampler.

    Raises:
        ValueError: fewer than two runs, or a loss that is not finite and positive.
    """

    def __init__(
        self,
        points: Sequence[Point],
        losses: Sequence[float],
        unique_tokens: int,
        reference_tokens: float,
        seed: int = 0,
    ) -> None:
        if len(points) < 2 or not all(0 < loss < math.inf for loss in losses):
            raise ValueError("a law needs two finite losses")
        self._unique = float(unique_tokens)
        self._reference = float(reference_tokens)
        self._lowest = min(losses)
        self._middle = (
            math.exp(np.mean([math.log(point.parameters) for point in points])),
            math.exp(np.mean([math.log(point.tokens) for point in points])),
        )
        self._largest = (
            max(point.parameters for point in points),
            max(point.tokens for point in points),
        )
        self._inputs = self._columns(points)
        self._observed = np.log(np.asarray(losses, dtype=np.float64))
        self._random = np.random.default_rng(seed)
        self._draws = self._sampled()

    def predict(self, point: Point) -> Prediction:
        """Return the expected loss of a run, and its interval."""
        medians = self._log_losses(self._draws, self._columns([point]))[:, 0]
        random = np.random.default_rng(0)  # the same for each run, so that equals compare as equal
        scatter = np.exp(self._draws[:, -1]) * random.standard_t(DEGREES, len(medians))
        beyond = sum(
            max(0.0, math.log(value / largest))
            for value, largest in zip((point.parameters, point.tokens), self._largest, strict=True)
        )
        off = abs(math.log(point.rate / self.best_rate(point.tokens)))
        drift = math.hypot(DRIFT * beyond, RATE_DRIFT * off)
        around = scatter + drift * random.standard_normal(len(medians))
        low, high = np.exp(np.quantile(medians + around, [0.1, 0.9]))
        return Prediction(float(np.exp(np.median(medians))), float(low), float(high))

    def best_rate(self, tokens: float) -> float:
        """Return the best rate over that of the rule, of a run of so many tokens."""
        names = list(PRIORS)
        shift, exponent = (
            self._draws[:, names.index(name)] for name in ("rate_shift", "rate_exponent")
        )
        logs = shift - np.exp(exponent) * min(0.0, math.log(tokens / self._reference))
        return math.exp(float(np.median(logs)))

    def _columns(self, points: Sequence[Point]) -> Array:
        """Return ln N, ln D', passes - 1, ln r and ln D/D0 below 0: (5, runs)."""
        tokens = np.array([point.tokens for point in points], dtype=np.float64)
        again = np.maximum(tokens / self._unique - 1, 0.0)
        worth = self._unique * (1 + REPETITIONS_WORTH * -np.expm1(-again / REPETITIONS_WORTH))
        sizes = np.array([point.parameters for point in points], dtype=np.float64)
        rates = np.array([point.rate for point in points], dtype=np.float64)
        worth = np.minimum(tokens, worth)
        length = np.minimum(np.log(tokens / self._reference), 0.0)
        return np.stack([np.log(sizes), np.log(worth), again, np.log(rates), length])

    def _log_losses(self, draws: Array, columns: Array) -> Array:
        """Return ln L of each run under each draw: (draws, runs)."""
        log_size, log_tokens, again, log_rate, length = columns
        floor, size, size_exponent, data, data_exponent, overfitting, cost, shift, falling = (
            draws[:, place, None] for place in range(len(PRIORS) - 1)
        )
        middle_size, middle_tokens = map(math.log, self._middle)
        loss = (
            np.exp(floor)
            + np.exp(size - np.exp(size_exponent) * (log_size - middle_size))
            + np.exp(data - np.exp(data_exponent) * (log_tokens - middle_tokens))
            + np.exp(overfitting + log_size - math.log(self._unique)) * again
        )
        logs: Array = (
            math.log(self._lowest)
            + np.log(loss)
            + np.exp(cost - SHORT_COST * length)
            * (log_rate - shift + np.exp(falling) * length) ** 2
        )
        return logs

    def _log_posterior(self, draws: Array) -> Array:
        """Return the logarithm of the posterior density, up to a constant."""
        means, deviations = np.array(list(PRIORS.values())).T
        prior = -0.5 * (((draws - means) / deviations) ** 2).sum(axis=1)
        scale = np.exp(draws[:, -1:])
        residuals = (self._observed - self._log_losses(draws, self._inputs)) / scale
        likelihood = -0.5 * (DEGREES + 1) * np.log1p(residuals**2 / DEGREES) - draws[:, -1:]
        total: Array = prior + likelihood.sum(axis=1)
        return total

    def _sampled(self) -> Array:
        """Sample the posterior by walkers that stretch towards each other (Goodman, Weare 2010)."""
        random = self._random
        means, deviations = np.array(list(PRIORS.values())).T
        walkers = means + deviations * random.standard_normal((WALKERS, len(PRIORS)))
        heights = self._log_posterior(walkers)
        half, kept = WALKERS // 2, []
        for step in range(STEPS):
            for own, other in (
                (slice(0, half), slice(half, None)),
                (slice(half, None), slice(0, half)),
            ):
                partners = walkers[other][random.integers(half, size=half)]
                stretch = (1 + random.random(half)) ** 2 / 2  # density 1/sqrt(z) on [1/2, 2]
                proposed = partners + stretch[:, None] * (walkers[own] - partners)
                height = self._log_posterior(proposed)
                chance = (len(PRIORS) - 1) * np.log(stretch) + height - heights[own]
                accepted = np.log(random.random(half)) < chance
                walkers[own] = np.where(accepted[:, None], proposed, walkers[own])
                heights[own] = np.where(accepted, height, heights[own])
            if step >= STEPS // 2 and step % (STEPS // 2 // KEPT) == 0:
                kept.append(walkers.copy())
        return np.concatenate(kept)
