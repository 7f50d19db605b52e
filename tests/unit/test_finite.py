"""A state that holds NaN or infinity is refused, but for what may be infinite."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fundamentallm.errors import CheckpointError
from fundamentallm.training.checkpoint.finite import (
    DamagedStateError,
    all_finite,
    bit_sum,
    check_finite,
    nonfinite_tensors,
)


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


@pytest.mark.parametrize(("num_bad", "more"), [(3, ""), (4, " and 1 more"), (5, " and 2 more")])
def test_three_are_named_and_the_rest_is_counted(num_bad, more):
    damaged = {"model": {str(n): torch.tensor([math.nan]) for n in range(num_bad)}}
    with pytest.raises(DamagedStateError) as caught:
        check_finite(damaged)
    assert caught.value.got == f"model.0, model.1, model.2{more}"


def test_tensors_in_lists_are_named_by_their_place():
    bad = torch.tensor([math.nan])
    tree = {"a": [torch.ones(1), {"b": (bad, "text")}], "c": 3, "d": "text", "e": None}
    assert [name for name, _ in nonfinite_tensors(tree)] == ["a.1.b.0"]
    assert [name for name, _ in nonfinite_tensors([1, bad])] == ["1"]


def test_names_of_buffers_that_are_no_list_are_refused():
    with pytest.raises(CheckpointError, match="are not a list"):
        check_finite(state(), constant_buffers=5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "dtype",
    [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float32],
)
def test_one_bad_element_of_any_type_is_found_and_large_ones_are_not_bad(dtype):
    large = torch.full((3,), torch.finfo(dtype).max).to(dtype)  # their sum is not finite
    assert all_finite(large)
    assert all_finite(torch.zeros(0, dtype=dtype))
    assert not all_finite(torch.tensor([0.0, math.nan, 0.0]).to(dtype))
    if dtype is not torch.float8_e4m3fn:  # which has no infinity
        assert not all_finite(torch.tensor([0.0, -math.inf]).to(dtype))


def test_the_sum_of_bits_is_that_of_the_integers_modulo_their_range():
    assert bit_sum([]) == 0
    assert bit_sum([torch.tensor([1.0, 2.0])]) == 0x3F800000 + 0x40000000
    assert bit_sum([torch.tensor([[1.0]]), torch.tensor([-0.0])]) == 2**64 + 0x3F800000 - 2**31
    assert bit_sum([torch.tensor([-1, -3])]) == 2**64 - 4
    assert bit_sum([torch.tensor([1.0, 2.0], dtype=torch.bfloat16)]) == 0x3F80 + 0x4000
    assert bit_sum([torch.tensor([1, 255], dtype=torch.uint8)]) == 256
