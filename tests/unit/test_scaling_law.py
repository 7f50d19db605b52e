"""The scaling law against laws that are known, written down here a second time."""

from __future__ import annotations

import math
import random

import pytest

from fundamentallm.engine.planning.scaling_law import Point, ScalingLaw

TEXT = 1_000_000  # tokens
REFERENCE = 1e6
SIZES = (100_000, 700_000, 2_500_000)
RUNS = (  # size, tokens in thousands, rate
    (0, 300, 1.6),
    (0, 300, 0.8),
    (0, 300, 3.2),
    (1, 200, 1.9),
    (0, 1000, 1.0),
    (1, 700, 1.2),
    (2, 300, 1.6),
)


class World:
    """A law with numbers of its own."""

    def __init__(self, seed: int, noise: float = 0.004) -> None:
        self.draw = random.Random(seed)
        self.noise = noise
        uniform = self.draw.uniform
        self.floor, self.size, self.data = uniform(1.0, 1.3), uniform(0.06, 0.2), uniform(0.15, 0.3)
        self.a, self.b = uniform(0.25, 0.5), uniform(0.4, 0.7)
        self.heart = uniform(0.004, 0.008)
        self.cost, self.falling = uniform(0.006, 0.016), uniform(0.25, 0.5)

    def truth(self, point: Point) -> float:
        """Return the loss without noise."""
        passes = point.tokens / TEXT
        worth = float(point.tokens)
        if passes > 1:
            worth = TEXT + TEXT * 15.4 * (1 - math.exp(-(passes - 1) / 15.4))
        loss = self.floor
        loss += self.size * (1e6 / point.parameters) ** self.a
        loss += self.data * (1e6 / worth) ** self.b
        loss += self.heart * (point.parameters / TEXT) * max(passes - 1, 0)
        best = min(point.tokens / REFERENCE, 1.0) ** -self.falling
        cost = self.cost * min(point.tokens / REFERENCE, 1.0) ** -0.7
        return loss * math.exp(cost * math.log(point.rate / best) ** 2)

    def measured(self, point: Point) -> float:
        """Return the loss of one run."""
        return self.truth(point) * math.exp(self.draw.gauss(0, self.noise))

    def fitted(self) -> ScalingLaw:
        """Return the law after the small runs."""
        points = [Point(SIZES[size], 1e3 * tokens, rate) for size, tokens, rate in RUNS]
        losses = [self.measured(point) for point in points]
        return ScalingLaw(points, losses, TEXT, REFERENCE)


def covered(worlds: int) -> tuple[int, int, list[float]]:
    """Return how many held-out losses lie inside, of how many, and the intervals' half-widths."""
    inside, total, widths = 0, 0, []
    for seed in range(worlds):
        world = World(seed)
        law = world.fitted()
        for point in (
            Point(100_000, 6e6, 0.7),
            Point(700_000, 4e6, 1.0),
            Point(2_500_000, 2e6, 1.0),
            Point(1_400_000, 6e6, 1.5),
        ):
            found = law.predict(point)
            inside += found.low <= world.measured(point) <= found.high
            total += 1
            widths.append((found.high - found.low) / 2 / found.loss)
    return inside, total, sorted(widths)


def test_held_out_losses_lie_in_the_interval_of_a_planted_law() -> None:
    inside, total, widths = covered(3)
    assert total == 12
    assert inside >= 8
    assert widths[len(widths) // 2] < 0.04


@pytest.mark.long
def test_the_interval_covers_what_it_says() -> None:
    inside, total, widths = covered(40)
    assert 0.7 * total <= inside <= 0.98 * total, f"{inside} of {total}"
    assert widths[len(widths) // 2] < 0.03


def test_more_and_longer_runs_make_the_interval_narrower() -> None:
    world, target = World(1, noise=0.002), Point(700_000, 8e6, 1.0)
    few = world.fitted().predict(target)
    points = [Point(size, tokens) for size in SIZES for tokens in (2e6, 4e6, 6e6)]
    losses = [world.measured(point) for point in points]
    many = ScalingLaw(points, losses, TEXT, REFERENCE).predict(target)
    assert many.high - many.low < 0.5 * (few.high - few.low)
    assert many.loss == pytest.approx(world.truth(target), rel=0.02)


def test_a_fit_is_a_function_of_its_runs() -> None:
    first, second = World(2).fitted(), World(2).fitted()
    point = Point(900_000, 5e6, 1.1)
    assert first.predict(point) == second.predict(point)


def test_the_best_rate_falls_as_a_run_gets_longer() -> None:
    world = World(3, noise=0.001)
    points = [
        Point(SIZES[0], tokens, rate) for tokens in (1e5, 3e6) for rate in (0.3, 0.6, 1.2, 2.4, 4.8)
    ]
    law = ScalingLaw(points, [world.measured(point) for point in points], TEXT, REFERENCE)
    for tokens in (1e5, 3e6):
        best = min(tokens / REFERENCE, 1.0) ** -world.falling
        assert law.best_rate(tokens) == pytest.approx(best, rel=0.35)


@pytest.mark.parametrize("losses", [[2.0], [2.0, math.nan], [2.0, math.inf], [2.0, 0.0]])
def test_too_little_to_fit_is_refused(losses: list[float]) -> None:
    points = [Point(100_000, 1e5)] * len(losses)
    with pytest.raises(ValueError, match="two finite losses"):
        ScalingLaw(points, losses, TEXT, REFERENCE)
