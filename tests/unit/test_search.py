"""The search for the fastest setting, over costs that are known."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fundamentallm.compute import compilation
from fundamentallm.compute.plan import Machine, ModelFacts, Plan
from fundamentallm.config import RunConfig
from fundamentallm.engine.tuning.search import Space, batch_sizes, search, thread_counts
from fundamentallm.engine.tuning.tune import space_around

START = Plan("fp32", False, False, "flash", 8, None)
KINDS = [
    {"precision": p, "bf16_weights": w, "compile": c, "attention": a}
    for c, (p, w), a in itertools.product(
        [False, True], [("fp32", False), ("bf16", False), ("bf16", True)], ["flash", "explicit"]
    )
]
SPACE = Space(KINDS, [1, 2, 4, 8, 16, 32, 64], [None, 2, 4, 8])


class Measured:
    """Seconds by a formula; remembers what it was asked."""

    def __init__(self, cost: Callable[[Plan], float], most: int = 10_000) -> None:
        self.cost = cost
        self.most = most
        self.asked: list[Plan] = []

    def __call__(self, setting: Plan) -> float | None:
        if len(self.asked) == self.most:
            return None
        self.asked.append(setting)
        return self.cost(setting)


def cost(setting: Plan) -> float:
    """Narrow weights lose unless compiled and explicit; 32 rows and 4 threads are best."""
    kind = 1.0
    if setting.bf16_weights:
        kind = 0.3 if setting.compile and setting.attention == "explicit" else 1.5
    elif setting.precision == "bf16":
        kind = 1.2
    rows = 1 + 0.1 * abs(math.log2(setting.batch_size) - 5)
    return kind * rows * (1 + 0.2 * abs(math.log2(setting.threads or 1) - 2))


def test_the_fastest_is_found_with_a_part_of_the_measurements():
    measured = Measured(cost)

    best = search(START, SPACE, measured)

    assert best == Plan("bf16", True, True, "explicit", 32, 4)
    assert len(measured.asked) == len(set(measured.asked)) < 12 * 7 * 4 / 8


def test_a_small_gain_replaces_nothing():
    assert search(START, SPACE, lambda s: 1.0 if s == START else 0.98) == START


def test_a_setting_that_fails_is_passed_over():
    def failing(setting: Plan) -> float:
        return math.inf if setting.compile or setting.batch_size > 16 else cost(setting)

    best = search(START, SPACE, failing)

    assert not best.compile
    assert best.batch_size == 16


def test_from_a_start_that_does_not_fit_it_goes_to_smaller_micro_batches():
    best = search(
        replace(START, batch_size=32), SPACE, lambda s: math.inf if s.batch_size > 4 else cost(s)
    )

    assert best.batch_size == 4


def test_if_nothing_works_the_start_remains():
    assert search(START, SPACE, lambda setting: math.inf) == START


@pytest.mark.parametrize("most", range(20))
def test_when_the_time_is_up_the_best_so_far_is_taken(most: int):
    measured = Measured(cost, most)

    best = search(START, SPACE, measured)

    assert len(measured.asked) == most
    if most:
        fastest = min(measured.asked, key=cost)
        assert cost(best) <= cost(fastest) / (1 - 0.03)
    else:
        assert best == START


def test_a_space_of_one_setting_is_measured_once():
    kind = {"precision": "fp32", "bf16_weights": False, "compile": False, "attention": "flash"}
    measured = Measured(cost)

    assert search(START, Space([kind], [8], [None]), measured) == START
    assert measured.asked == [START]


@given(st.data(), st.integers(1, 2000))
def test_micro_batches_divide_the_rows_of_a_step(data: st.DataObject, rows: int):
    given_size = data.draw(st.sampled_from([d for d in range(1, rows + 1) if rows % d == 0]))

    sizes = batch_sizes(rows, given_size)

    assert given_size in sizes
    assert sizes == sorted(set(sizes))
    assert all(rows % size == 0 for size in sizes)
    assert all(2 * low <= high for low, high in itertools.pairwise(sizes))


def test_micro_batches_of_a_power_of_two():
    assert batch_sizes(64, 16) == [1, 2, 4, 8, 16, 32, 64]
    assert batch_sizes(7, 7) == [1, 7]


@pytest.mark.parametrize(
    ("cores", "chosen", "default", "expected"),
    [
        (2, None, 2, [1, None]),
        (2, None, 1, [None, 2]),
        (8, None, 4, [1, 2, None, 8]),
        (6, None, 6, [1, 2, 4, None]),
        (8, 3, 8, [1, 2, 3, 4, 8]),
        (1, None, 1, [None]),
    ],
)
def test_thread_counts(cores: int, chosen: int | None, default: int, expected: list[int | None]):
    assert thread_counts(cores, chosen, default) == expected


@pytest.mark.parametrize("size", [1, 3, 12, 24])
def test_a_plan_leaves_the_steps_rows_as_they_are(size: int, monkeypatch):
    monkeypatch.setattr(compilation, "find_compiler", lambda: "/usr/bin/g++")
    config = RunConfig.from_yaml("data: {batch_size: 6}\ntraining: {accumulation_steps: 4}")

    changed = Plan("bf16", True, True, "explicit", size, 3).applied_to(config)

    assert changed.data.batch_size * changed.training.accumulation_steps == 24
    facts, machine = ModelFacts.of(changed.model), Machine(torch.device("cpu"))
    again = Plan.resolve(changed.training, facts, machine, changed.data.batch_size)
    assert again == Plan("bf16", True, True, "explicit", size, 3)
    assert RunConfig.from_yaml(changed.to_yaml()) == changed


@pytest.mark.parametrize(("major", "narrow"), [(8, "bf16"), (7, "fp16")])
def test_a_gpu_is_offered_the_half_type_that_it_has_units_for(major, narrow, monkeypatch):
    def is_bf16_supported(including_emulation: bool = True) -> bool:
        return major >= 8 or including_emulation  # as torch: older GPUs emulate it

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    config = RunConfig.from_yaml("{data: {batch_size: 8}, model: {vocab_size: 11}}")
    start = replace(START, machine=Machine(torch.device("cuda", 0)))
    space = space_around(config, start, 1, [])
    assert {kind["precision"] for kind in space.kinds} == {"fp32", narrow}
