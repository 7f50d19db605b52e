"""Which budget ends a run."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.properties import examples

from fundamentallm.compute.distributed import Ranks
from fundamentallm.config.training import TrainingConfig
from fundamentallm.data.examples import EncodedExamples
from fundamentallm.data.loaders import Batching, ExampleLoader, MixtureLoader, TokenWindowLoader
from fundamentallm.training.limits import Budget, Limits
from fundamentallm.training.state import TrainingState


def of_tokens(num_tokens: int) -> int:
    """Steps of epochs of nine steps of 32 tokens and one of 8, counted one by one."""
    steps = reached = 0
    while reached < num_tokens:
        reached += 8 if steps % 10 == 9 else 32
        steps += 1
    return steps


@pytest.mark.parametrize(
    ("fields", "steps_for_tokens", "expected"),
    [
        ({}, of_tokens, (30, None, None)),  # three epochs, the default, of ten steps
        ({"num_epochs": 2}, of_tokens, (20, None, None)),
        ({"num_epochs": 2}, None, (20, None, None)),
        ({"num_epochs": 2, "total_steps": 7}, of_tokens, (7, None, None)),
        ({"num_epochs": 2, "total_steps": 70}, of_tokens, (70, None, None)),
        ({"max_tokens": 288}, of_tokens, (9, None, 288)),
        ({"max_tokens": 296}, of_tokens, (10, None, 296)),
        ({"max_tokens": 320}, of_tokens, (11, None, 320)),
        ({"max_tokens": 2_960}, of_tokens, (100, None, 2_960)),
        ({"max_tokens": 1}, of_tokens, (1, None, 1)),
        ({"max_tokens": 320}, None, (None, None, 320)),
        ({"max_tokens": 320, "total_steps": 4}, of_tokens, (4, None, 320)),
        ({"max_tokens": 320, "total_steps": 40}, of_tokens, (11, None, 320)),
        ({"max_seconds": 9.0}, of_tokens, (None, 9.0, None)),
        ({"max_seconds": 9.0, "num_epochs": 2}, of_tokens, (None, 9.0, None)),
        ({"max_seconds": 9.0, "total_steps": 4}, of_tokens, (4, 9.0, None)),
        ({"max_seconds": 9.0, "max_tokens": 64}, of_tokens, (2, 9.0, 64)),
        ({"max_seconds": 9.0, "max_tokens": 64}, None, (None, 9.0, 64)),
    ],
)
def test_budgets_are_resolved(fields, steps_for_tokens, expected):
    limits = Limits.resolve(TrainingConfig(**fields), 10, steps_for_tokens)
    assert (limits.total_steps, limits.max_seconds, limits.max_tokens) == expected


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        (Limits(10), False),
        (Limits(10, 5.0), False),
        (Limits(None, 5.0), True),
        (Limits(None, 5.0, 100), True),
        (Limits(None, None, 100), False),
    ],
)
def test_follows_the_clock_where_nothing_else_tells_the_last_step(limits, expected):
    assert limits.follows_clock is expected


@settings(max_examples=examples(60))
@given(
    num_tokens=st.integers(10, 400),
    length=st.integers(1, 9),
    batch=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    budget=st.integers(1, 3_000),
)
def test_the_steps_of_a_token_budget_are_the_fewest_that_reach_it(
    num_tokens, length, batch, accumulation, budget
):
    """Of windows, a mixture and examples, by reading step after step."""
    batching = Batching(length, batch, accumulation, seed=3)
    ids = np.arange(num_tokens) % 7
    starts = np.arange(0, len(ids) + 1, 2)[: len(ids) // 2 + 1]
    examples = EncodedExamples(ids, starts, np.arange(len(starts) - 1) % 2)
    for loader in (
        TokenWindowLoader(ids, batching),
        MixtureLoader([ids, ids], [1, 2], ["a", "b"], batching),
        ExampleLoader(examples, batching),
    ):
        steps, reached = 0, 0
        while reached < budget:
            window = loader.window_at(*divmod(steps, len(loader)))
            reached += window.num_tokens
            steps += 1
        assert loader.steps_for_tokens(budget) == steps


def budget(limits: Limits, seconds: float = 0.0, **state: float) -> Budget:
    """Return a budget whose clock stands at some seconds."""
    known = TrainingState()
    for name, value in state.items():
        setattr(known, name, value)
    found = Budget(limits, known, Ranks())
    found.clock = lambda: seconds
    return found


@pytest.mark.parametrize(
    ("limits", "used", "expected"),
    [
        (Limits(100, 10.0, 50), {"seconds": 9.9, "tokens_seen": 49}, False),
        (Limits(100, 10.0, 50), {"seconds": 10.0, "tokens_seen": 49}, True),
        (Limits(100, 10.0, 50), {"seconds": 9.9, "tokens_seen": 50}, True),
        (Limits(100, 10.0), {"seconds": 6.0, "elapsed_before": 4.0}, True),
        (Limits(100), {"seconds": 1e9, "tokens_seen": 10**12}, False),
    ],
)
def test_a_budget_is_used_up_with_its_last_second_or_token(limits, used, expected):
    assert budget(limits, **used).is_used_up() is expected


@pytest.mark.parametrize(
    ("limits", "steps", "expected"),
    [
        (Limits(100), 0, None),  # no step tells how long one takes
        (Limits(100), 1, 99 * 8.0),
        (Limits(100), 4, 96 * 2.0),
        (Limits(None, 20.0), 0, 12.0),
        (Limits(None, 5.0), 0, 0.0),
        (Limits(100, 20.0), 4, 12.0),
        (Limits(5, 20.0), 4, 2.0),
        (Limits(None, None, 50), 4, None),
    ],
)
def test_the_seconds_that_remain_are_those_to_the_nearer_end(limits, steps, expected):
    assert budget(limits, 8.0, iteration=steps).seconds_remaining() == expected


def test_the_speed_of_a_step_is_that_of_this_run():
    resumed = budget(Limits(100), 30.0, iteration=40)
    resumed.begin()
    assert resumed.seconds_remaining() is None
    resumed.clock = lambda: 36.0
    resumed._state.iteration = 43
    assert resumed.seconds_remaining() == 57 * 2.0


def test_progress_by_the_clock_ends_at_one():
    assert budget(Limits(None, 20.0), 5.0).clock_progress() == 0.25
    assert budget(Limits(None, 20.0), 30.0).clock_progress() == 1.0
    assert budget(Limits(10, 20.0), 5.0).clock_progress() is None


def test_progress_by_the_clock_ends_at_one_on_many_ranks(monkeypatch):
    monkeypatch.setattr(Ranks, "sum_counts", lambda self, counts: list(counts))  # the others add 0
    used = Budget(Limits(None, 20.0), TrainingState(), Ranks(0, 2))
    used.clock = lambda: 30.0
    assert used.clock_progress() == 1.0
