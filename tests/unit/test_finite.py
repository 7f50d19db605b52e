"""A state that holds NaN or infinity is refused, but for what may be infinite."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fundamentallm.errors import CheckpointError
from fundamentallm.training.checkpoint.finite import DamagedStateError, check_finite


def state(value: float = 0.0, name: str = "weight") -> dict[str, Any]:
    model = {"weight": torch.ones(3), "mask": torch.ones(3)}
    model[name][1] = value
    return {"model": model, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}}


def test_finite_states_pass():
    check_finite(state())
    check_finite({})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_is_named(value):
    with pytest.raises(DamagedStateError, match="not finite") as caught:
        check_finite(state(value), "here", ["mask"])
    assert (caught.value.where, caught.value.got) == ("here", "model.weight")


def test_a_moment_that_is_not_finite_is_named():
    damaged = state()
    damaged["optimizer"]["state"][0]["exp_avg"][0] = math.inf
    with pytest.raises(DamagedStateError) as caught:
        check_finite(damaged)
    assert "exp_avg" in caught.value.got


def test_a_buffer_may_be_infinite_and_not_nan():
    check_finite(state(-math.inf, "mask"), constant_buffers=["mask"])
    with pytest.raises(DamagedStateError):
        check_finite(state(-math.inf, "mask"))
    with pytest.raises(DamagedStateError, match=r"model\.mask"):
        check_finite(state(math.nan, "mask"), constant_buffers=["mask"])


def test_three_are_named_and_the_rest_is_counted():
    damaged = {"model": {str(n): torch.tensor([math.nan]) for n in range(5)}}
    with pytest.raises(DamagedStateError) as caught:
        check_finite(damaged)
    assert caught.value.got == "model.0, model.1, model.2 and 2 more"


def test_names_of_buffers_that_are_no_list_are_refused():
    with pytest.raises(CheckpointError, match="are not a list"):
        check_finite(state(), constant_buffers=5)  # type: ignore[arg-type]
