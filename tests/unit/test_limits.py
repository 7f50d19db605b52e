"""Which budget ends a run."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.properties import examples

from fundamentallm.config.training import TrainingConfig
from fundamentallm.data.examples import EncodedExamples
from fundamentallm.data.loaders import Batching, ExampleLoader, MixtureLoader, TokenWindowLoader
from fundamentallm.training.limits import Limits


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


@settings(deadline=None, max_examples=examples(60))
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
