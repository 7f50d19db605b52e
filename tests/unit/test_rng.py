from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from fundamentallm.compute.rng import (
    capture_generators,
    capture_rng,
    restore_generators,
    restore_rng,
)
from fundamentallm.errors import CheckpointError
from fundamentallm.training.checkpoint.tree import flatten, unflatten


@pytest.fixture(autouse=True)
def own_generators() -> Iterator[None]:
    """Leave the global generators as they were, without the code under test."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(before[0])
    np.random.set_state(before[1])
    torch.set_rng_state(before[2])


def draw() -> list[Any]:
    return [
        random.random(),
        random.gauss(0, 1),
        np.random.random(),
        np.random.standard_normal(),
        torch.rand(3).tolist(),
        torch.randn(2).tolist(),
        torch.nn.functional.dropout(torch.ones(8)).tolist(),
    ]


# The Gaussian generators keep the second of a pair for later: both phases are tried.
@pytest.mark.parametrize("draws_before", [0, 1, 2, 700])
def test_the_numbers_go_on_as_they_would_have(draws_before: int) -> None:
    for _ in range(draws_before):
        draw()
    state = capture_rng()
    expected = [draw(), draw()]
    draw()

    for _ in range(2):  # a restored state is not used up
        restore_rng(state)
        assert [draw(), draw()] == expected


def test_a_state_survives_a_checkpoint() -> None:
    random.gauss(0, 1)
    skeleton, tensors = flatten(capture_rng())
    expected = draw()

    restore_rng(unflatten(json.loads(json.dumps(skeleton, allow_nan=False)), tensors))
    assert draw() == expected


def test_capturing_disturbs_nothing() -> None:
    state = capture_rng()
    expected = draw()
    restore_rng(state)
    capture_rng()

    assert draw() == expected


@pytest.mark.parametrize("part", ["python", "numpy", "torch"])
def test_every_part_is_restored(part: str) -> None:
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    first = capture_rng()
    random.seed(2), np.random.seed(2), torch.manual_seed(2)
    second = capture_rng()

    numbers = {}
    for name, state in {
        "first": first,
        "second": second,
        "mixed": {**first, part: second[part]},
    }.items():
        restore_rng(state)
        numbers[name] = {
            "python": random.random(),
            "numpy": np.random.random(),
            "torch": torch.rand(1).item(),
        }
    assert numbers["mixed"] == {**numbers["first"], part: numbers["second"][part]}
    assert numbers["mixed"] != numbers["first"]


@pytest.mark.parametrize(
    "damage",
    [
        {"python": {}},
        {"python": {"version": 9, "key": torch.arange(624), "pos": 1, "gauss": None}},
        {"python": {"version": 3, "key": torch.arange(3), "pos": 1, "gauss": None}},
        {"numpy": {"bit_generator": "PCG64"}},
        {"numpy": None},
        {
            "numpy": {
                "bit_generator": "MT19937",
                "key": torch.arange(3),
                "pos": 1,
                "has_gauss": 0,
                "gauss": 0.0,
            }
        },
        {"torch": torch.zeros(10, dtype=torch.uint8)},
        {"torch": [1, 2]},
    ],
    ids=lambda damage: str(damage)[:60],
)
def test_a_damaged_state_changes_no_generator(damage: dict[str, Any]) -> None:
    good = capture_rng()
    expected = draw()
    restore_rng(good)
    other = capture_rng()
    other["python"]["pos"] = 17

    with pytest.raises(CheckpointError, match="random generators"):
        restore_rng({**other, **damage})
    assert draw() == expected


def test_a_missing_part_is_refused() -> None:
    state = capture_rng()
    del state["numpy"]

    with pytest.raises(CheckpointError, match="numpy"):
        restore_rng(state)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_states_of_devices_that_are_not_here_are_announced() -> None:
    state = capture_rng()
    expected = draw()
    state["cuda:0"] = torch.zeros(16, dtype=torch.uint8)

    with pytest.warns(UserWarning, match="1 CUDA generators, this machine 0"):
        restore_rng(state)
    assert draw() == expected


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> dict[int, torch.Tensor]:
    """Three GPUs in use, and the state of the generator of each."""
    states = {index: torch.Generator().manual_seed(index).get_state() for index in range(3)}
    real = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": real())
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(states))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_rng_state", states.__getitem__)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: list(states.values()))
    monkeypatch.setattr(
        torch.cuda, "set_rng_state", lambda state, index: states.update({index: state})
    )
    return states


def test_of_many_gpus_a_run_keeps_the_generator_of_its_own(gpus) -> None:
    state = capture_rng(torch.device("cuda", 2))
    assert [name for name in state if name.startswith("cuda")] == ["cuda:2"]
    assert torch.equal(state["cuda:2"], gpus[2])
    assert {"cuda:0", "cuda:1", "cuda:2"} <= capture_rng().keys()


def test_a_run_goes_on_with_its_numbers_on_a_gpu_of_another_number(gpus) -> None:
    state = capture_rng(torch.device("cuda", 2))
    before = dict(gpus)
    restore_rng(state, torch.device("cuda", 1))  # a warning would be an error here
    assert torch.equal(gpus[1], before[2])
    assert torch.equal(gpus[0], before[0])


def test_a_state_of_many_gpus_goes_to_those_of_the_same_number(gpus) -> None:
    state = capture_rng()
    saved = dict(gpus)
    for index in gpus:
        gpus[index] = torch.zeros_like(gpus[index])
    del state["cuda:0"]  # of a GPU that the run does not compute on
    restore_rng(state, torch.device("cuda", 1))
    assert torch.equal(gpus[1], saved[1])
    assert torch.equal(gpus[2], saved[2])
    with pytest.warns(UserWarning, match="random numbers on the others start again"):
        restore_rng(state, torch.device("cuda", 0))


def test_the_generators_of_a_step_are_put_back_on_any_device(gpus) -> None:
    state = capture_generators(torch.device("cuda", 2))
    before = dict(gpus)
    restore_generators(state, torch.device("cuda", 0))
    assert torch.equal(gpus[0], before[2])
    gpus.update(before)
    restore_generators(state, torch.device("cpu"))
    assert all(torch.equal(gpus[index], before[index]) for index in gpus)


@pytest.mark.cuda
def test_cuda_generators_go_on_too() -> None:
    torch.rand(3, device="cuda")
    state = capture_rng()
    expected = torch.rand(3, device="cuda").tolist()

    restore_rng(state)
    assert torch.rand(3, device="cuda").tolist() == expected
    assert state["cuda:0"].dtype == torch.uint8
    assert state["cuda:0"].device.type == "cpu"
