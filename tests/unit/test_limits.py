"""Which budget ends a run."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fundamentallm.config.training import TrainingConfig
from fundamentallm.training.limits import Limits


@pytest.mark.parametrize(
    ("fields", "tokens_per_step", "expected"),
    [
        ({}, 32, (30, None, None)),  # three epochs, the default, of ten steps
        ({"num_epochs": 2}, 32, (20, None, None)),
        ({"num_epochs": 2}, None, (20, None, None)),
        ({"num_epochs": 2, "total_steps": 7}, 32, (7, None, None)),
        ({"num_epochs": 2, "total_steps": 70}, 32, (70, None, None)),
        ({"max_tokens": 320}, 32, (10, None, 320)),
        ({"max_tokens": 321}, 32, (11, None, 321)),
        ({"max_tokens": 1}, 32, (1, None, 1)),
        ({"max_tokens": 320}, None, (None, None, 320)),
        ({"max_tokens": 320, "total_steps": 4}, 32, (4, None, 320)),
        ({"max_tokens": 320, "total_steps": 40}, 32, (10, None, 320)),
        ({"max_seconds": 9.0}, 32, (None, 9.0, None)),
        ({"max_seconds": 9.0, "num_epochs": 2}, 32, (None, 9.0, None)),
        ({"max_seconds": 9.0, "total_steps": 4}, 32, (4, 9.0, None)),
        ({"max_seconds": 9.0, "max_tokens": 64}, 32, (2, 9.0, 64)),
        ({"max_seconds": 9.0, "max_tokens": 64}, None, (None, 9.0, 64)),
    ],
)
def test_budgets_are_resolved(fields, tokens_per_step, expected):
    limits = Limits.resolve(TrainingConfig(**fields), 10, tokens_per_step)
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


@given(max_tokens=st.integers(1, 10**15), per_step=st.integers(1, 10**9))
def test_the_steps_of_a_token_budget_are_the_fewest_that_reach_it(max_tokens, per_step):
    limits = Limits.resolve(TrainingConfig(max_tokens=max_tokens), 10, per_step)
    assert limits.total_steps is not None
    assert limits.total_steps * per_step >= max_tokens
    assert (limits.total_steps - 1) * per_step < max_tokens
