"""Schedules against formulas written another way, and the laws that all of them keep."""

from __future__ import annotations

import inspect
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.properties import examples

from fundamentallm.config import RunConfig
from fundamentallm.engine.wiring.assemble import check_names
from fundamentallm.errors import CheckpointError, ConfigError
from fundamentallm.training.schedulers import (
    SCHEDULERS,
    ConstantLRScheduler,
    CosineAnnealingScheduler,
    ExponentialDecayScheduler,
    InverseSquareRootScheduler,
    LearningRateScheduler,
    LinearDecayScheduler,
    LinearWarmup,
    WarmupStableDecayScheduler,
)

BASE = 0.02


def sgd(*lrs: float) -> torch.optim.SGD:
    groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr": lr} for lr in lrs or [BASE]]
    return torch.optim.SGD(groups)


def by_interpolation(total, warmup, floor, decay_start):
    corners = [0, warmup, decay_start, total]
    heights = [0.0 if warmup else 1.0, 1.0, 1.0, floor]
    return lambda k: float(np.interp(k, corners, heights))


def by_half_angle(total, warmup, floor):
    def formula(k):
        if k <= warmup:
            return k / warmup
        angle = min(k - warmup, total - warmup) / (total - warmup) * math.pi / 2
        return 1 - (1 - floor) * math.sin(angle) ** 2

    return formula


def by_repeated_multiplication(steps_per_epoch, rate):
    def formula(k):
        value = 1.0
        for step in range(2, k + 1):
            if step % steps_per_epoch == 1 or steps_per_epoch == 1:
                value *= rate
        return value

    return formula


def by_vaswani(warmup):
    return lambda k: math.sqrt(warmup) * min(k**-0.5, k * warmup**-1.5)


# (schedule, its formula as a function of the update's number)
CASES = {
    "constant": (lambda o: ConstantLRScheduler(o), lambda k: 1.0),
    "linear_warmup": (lambda o: LinearWarmup(o, 7), lambda k: [k / 7, 1.0][k > 7]),
    "linear_warmup_0": (lambda o: LinearWarmup(o, 0), lambda k: 1.0),
    "cosine": (
        lambda o: CosineAnnealingScheduler(o, 30, 5, 0.002),
        by_half_angle(30, 5, 0.1),
    ),
    "cosine_bare": (lambda o: CosineAnnealingScheduler(o, 20), by_half_angle(20, 0, 0.0)),
    "cosine_one_step": (lambda o: CosineAnnealingScheduler(o, 1, 0, 0.01), lambda k: 0.5),
    "linear": (
        lambda o: LinearDecayScheduler(o, 30, 5, 0.002),
        by_interpolation(30, 5, 0.1, 5),
    ),
    "linear_bare": (lambda o: LinearDecayScheduler(o, 20), by_interpolation(20, 0, 0.0, 0)),
    "wsd": (
        lambda o: WarmupStableDecayScheduler(o, 40, 5, 0.002, 0.25),
        by_interpolation(40, 5, 0.1, 30),
    ),
    "wsd_all_decay": (
        lambda o: WarmupStableDecayScheduler(o, 20, 4, 0.0, 1.0),
        by_interpolation(20, 4, 0.0, 4),
    ),
    "exponential": (
        lambda o: ExponentialDecayScheduler(o, 6, 0.5),
        by_repeated_multiplication(6, 0.5),
    ),
    "exponential_1": (
        lambda o: ExponentialDecayScheduler(o, 1),
        by_repeated_multiplication(1, 0.95),
    ),
    "inverse_square_root": (lambda o: InverseSquareRootScheduler(o, 9), by_vaswani(9)),
    "inverse_square_root_0": (lambda o: InverseSquareRootScheduler(o, 0), by_vaswani(1)),
}


@pytest.mark.parametrize("case", CASES)
def test_the_applied_rate_of_every_update_equals_the_formula(case):
    build, formula = CASES[case]
    optimizer = sgd(BASE, 0.5)
    weight = optimizer.param_groups[0]["params"][0]
    scheduler = build(optimizer)
    for k in range(1, 61):  # beyond the end of each
        returned = scheduler.step()
        weight.grad = torch.ones(1)
        before = weight.item()
        optimizer.step()
        assert returned == pytest.approx(BASE * formula(k), rel=1e-12, abs=1e-16)
        assert returned == scheduler.learning_rate(k)
        assert [g["lr"] for g in optimizer.param_groups] == [
            returned,
            pytest.approx(0.5 * formula(k), rel=1e-12, abs=1e-16),
        ]
        assert before - weight.item() == pytest.approx(returned, rel=1e-3, abs=1e-6)


def test_warmup_begins_with_a_share_and_not_with_zero():
    scheduler = LinearWarmup(sgd(), 4)
    assert [scheduler.multiplier(k) for k in (1, 2, 3, 4, 5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


COUNTS = st.tuples(st.integers(1, 200), st.integers(0, 199)).filter(lambda c: c[1] < c[0])
FLOORS = st.floats(0, 1)


@settings(max_examples=examples(60))
@given(COUNTS, FLOORS, st.floats(0.01, 1))
def test_a_horizon_is_reached_exactly_and_held(counts, floor, fraction):
    total, warmup = counts
    min_lr = BASE * floor
    for scheduler in (
        CosineAnnealingScheduler(sgd(), total, warmup, min_lr),
        LinearDecayScheduler(sgd(), total, warmup, min_lr),
        WarmupStableDecayScheduler(sgd(), total, warmup, min_lr, fraction),
    ):
        if warmup:
            assert scheduler.multiplier(warmup) == 1
        end = scheduler.multiplier(total)
        assert end == min_lr / BASE
        # A cyclic schedule would jump back here.
        assert {scheduler.multiplier(total + k) for k in (1, 2, total, 10**9)} == {end}
        assert scheduler.learning_rate(total) == pytest.approx(min_lr, rel=1e-15)


@settings(max_examples=examples(60))
@given(COUNTS, FLOORS, st.floats(0.01, 1))
@example((10, 0), 0.9999999999999999, 1.0)  # a floor one rounding error below the base
def test_bounded_continuous_and_one_peak(counts, floor, fraction):
    total, warmup = counts
    min_lr = BASE * floor
    decay_steps = min(total - warmup, total * fraction)
    # The steepest slope of each course after the warmup, per step.
    courses = [
        (CosineAnnealingScheduler(sgd(), total, warmup, min_lr), math.pi / 2 / (total - warmup)),
        (LinearDecayScheduler(sgd(), total, warmup, min_lr), 1 / (total - warmup)),
        (WarmupStableDecayScheduler(sgd(), total, warmup, min_lr, fraction), 1 / decay_steps),
        (LinearWarmup(sgd(), warmup), 0.0),
        (InverseSquareRootScheduler(sgd(), warmup), 0.5 / max(1, warmup)),
    ]
    for scheduler, slope in courses:
        values = [scheduler.multiplier(k) for k in range(1, total + 20)]
        assert all(0 <= value <= 1 for value in values)
        if scheduler.needs_total:
            assert min(values[max(0, warmup - 1) :]) >= min_lr / BASE
        peak = max(0, warmup - 1)
        rising, falling = values[: peak + 1], values[peak:]
        assert rising == sorted(rising)
        assert falling == sorted(falling, reverse=True)
        allowed = max(1 / warmup if warmup else 0.0, slope) + 1e-12
        assert all(abs(b - a) <= allowed for a, b in itertools.pairwise(values))


@settings(max_examples=examples(30))
@given(st.integers(1, 50), st.floats(0.01, 1))
def test_the_staircase_is_bounded_and_falls_only_between_epochs(steps_per_epoch, rate):
    scheduler = ExponentialDecayScheduler(sgd(), steps_per_epoch, rate)
    for epoch in range(4):
        first = epoch * steps_per_epoch + 1
        values = {scheduler.multiplier(k) for k in range(first, first + steps_per_epoch)}
        assert len(values) == 1
        assert values.pop() == pytest.approx(rate**epoch)
    assert 0 <= scheduler.multiplier(10**12) <= 1
    assert ExponentialDecayScheduler(sgd(), steps_per_epoch, 1.0).multiplier(10**12) == 1


@pytest.mark.parametrize("case", CASES)
def test_multiplier_is_pure(case):
    build, _ = CASES[case]
    scheduler = build(sgd())
    forward = [scheduler.multiplier(k) for k in range(1, 50)]
    for _ in range(13):
        scheduler.step()
    scheduler.optimizer.param_groups[0]["lr"] = 123.0
    assert [scheduler.multiplier(k) for k in range(49, 0, -1)] == forward[::-1]


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_count_goes_on_where_it_was(case):
    build, _ = CASES[case]
    whole, first = build(sgd()), build(sgd())
    expected = [whole.step() for _ in range(40)]
    actual = [first.step() for _ in range(17)]
    second = build(sgd())
    second.load_state_dict(first.state_dict())
    assert first.state_dict() == {"last_step": 17}
    assert actual + [second.step() for _ in range(23)] == expected


@pytest.mark.parametrize("state", [{}, {"last_step": -1}, {"last_step": True}, {"last_step": 1.0}])
def test_a_foreign_state_is_refused(state):
    scheduler = ConstantLRScheduler(sgd())
    with pytest.raises(CheckpointError, match="last_step"):
        scheduler.load_state_dict(state)
    assert scheduler.last_step == 0
    scheduler.step()
    scheduler.load_state_dict({"last_step": 0})  # of a schedule before its first step
    assert scheduler.last_step == 0


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rate", [0.3, 3.0, 30.0])  # steps in a hundredth of the time
def test_under_a_clock_nothing_jumps_and_warmup_ends_in_time(case: str, rate: float) -> None:
    """From one step to the next a rate changes by what the step's share of the time allows."""
    scheduler = CASES[case][0](sgd())
    if case.startswith("exponential"):
        return  # a staircase of epochs
    num_steps = round(100 * rate)
    values = [scheduler.multiplier(k, k / num_steps) for k in range(1, num_steps + 1)]
    assert all(0 <= value <= 1 for value in values)
    warmup = getattr(scheduler, "warmup_steps", 0)
    longest = max(1 / max(1, warmup), 10 / num_steps)  # a rise of the warmup in one step
    steepest = 10 / num_steps + 1 / max(1, warmup)
    differences = np.diff([0.0, *values]) if warmup else np.diff(values)
    assert differences.max(initial=0) <= longest + 1e-12
    assert -differences.min(initial=0) <= max(steepest, 0.3 / max(1, warmup))
    peak = int(np.argmax(values)) + 1
    assert peak <= max(1, warmup, math.ceil(num_steps / 10) + 1)


@pytest.mark.parametrize(
    ("kind", "course"),
    [
        (CosineAnnealingScheduler, lambda p: 0.5 * (1 + math.cos(math.pi * p))),
        (LinearDecayScheduler, lambda p: 1 - p),
        (WarmupStableDecayScheduler, lambda p: min(1.0, (1 - p) / 0.2)),
    ],
)
def test_a_horizon_in_time_is_the_course_times_the_warmup(kind, course) -> None:
    scheduler = kind(sgd(), 10**9, 8, 0.0)
    for step in (1, 4, 7, 8, 9, 500):
        for progress in (0.0, 0.02, 0.05, 0.1, 0.5, 0.9, 1.0):
            warm = min(1.0, max(step / 8, progress * 10))
            found = scheduler.multiplier(step, progress)
            assert found == pytest.approx(warm * course(progress), abs=1e-12)


def test_progress_is_nothing_to_schedules_without_a_horizon_after_their_warmup():
    for case, (build, _) in CASES.items():
        scheduler = build(sgd())
        if not scheduler.needs_total:
            assert scheduler.multiplier(23, 0.5) == scheduler.multiplier(23), case


def test_steps_and_progress_are_checked():
    scheduler = ConstantLRScheduler(sgd())
    with pytest.raises(ValueError, match="numbered from 1, got step 0"):
        scheduler.learning_rate(0)
    for progress in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="progress"):
            scheduler.step(progress)
    assert scheduler.last_step == 0
    assert [scheduler.learning_rate(1, progress) for progress in (0, 0.5, 1)] == [BASE] * 3


def test_a_group_without_a_base_rate_is_refused():
    scheduler = ConstantLRScheduler(sgd())
    scheduler.optimizer.add_param_group({"params": [torch.zeros(1, requires_grad=True)]})
    with pytest.raises(ValueError, match="zip"):
        scheduler.step()


def test_a_tensor_rate_is_written_in_place():
    rate = torch.tensor(BASE, dtype=torch.float64)
    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=rate, capturable=True)
    group_rate = optimizer.param_groups[0]["lr"]
    LinearWarmup(optimizer, 4).step()
    assert optimizer.param_groups[0]["lr"] is group_rate
    assert group_rate.item() == BASE / 4


@pytest.mark.parametrize(
    "kind", [CosineAnnealingScheduler, LinearDecayScheduler, WarmupStableDecayScheduler]
)
def test_a_course_has_no_warmup_and_no_floor_unless_asked(kind):
    scheduler = kind(sgd(), 1)
    assert (scheduler.warmup_steps, scheduler.floor) == (0, 0.0)
    assert scheduler.multiplier(1) == 0.0


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LinearWarmup(sgd(), -1), "warmup_steps.*-1"),
        (lambda: InverseSquareRootScheduler(sgd(), -1), "warmup_steps.*-1"),
        (lambda: CosineAnnealingScheduler(sgd(), 0), "total_steps.*0"),
        (lambda: CosineAnnealingScheduler(sgd(), 10, -1), "warmup_steps.*-1"),
        (lambda: CosineAnnealingScheduler(sgd(), 10, 10), r"\(10\) must be below .*\(10\)"),
        (lambda: CosineAnnealingScheduler(sgd(), 10, 0, 0.03), "min_lr.*0.02.*0.03"),
        (lambda: CosineAnnealingScheduler(sgd(), 10, 0, -0.1), "min_lr"),
        (lambda: CosineAnnealingScheduler(sgd(), 10, 0, math.nan), "min_lr"),
        (lambda: WarmupStableDecayScheduler(sgd(), 10, 10), r"\(10\) must be below .*\(10\)"),
        (lambda: WarmupStableDecayScheduler(sgd(), 10, decay_fraction=0.0), "decay_fraction"),
        (lambda: WarmupStableDecayScheduler(sgd(), 10, decay_fraction=1.1), "decay_fraction"),
        (lambda: ExponentialDecayScheduler(sgd(), 0), "steps_per_epoch.*0"),
        (lambda: ExponentialDecayScheduler(sgd(), 5, 0.0), "decay_rate"),
        (lambda: ExponentialDecayScheduler(sgd(), 5, 1.5), "decay_rate"),
    ],
)
def test_what_cannot_be_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


SUPPLIED = {"total_steps": 100, "warmup_steps": 10, "min_lr": 0.001, "steps_per_epoch": 20}


@pytest.mark.parametrize("name", SCHEDULERS.names())
def test_every_name_is_built_from_what_a_run_supplies(name):
    scheduler = SCHEDULERS.build(name, {}, optimizer=sgd(), **SUPPLIED)
    assert isinstance(scheduler, LearningRateScheduler)
    parameters = inspect.signature(type(scheduler)).parameters
    assert scheduler.uses_warmup == ("warmup_steps" in parameters)
    assert scheduler.needs_total == ("total_steps" in parameters)
    with pytest.raises(ConfigError, match="no option 'total_steps'"):
        SCHEDULERS.build(name, {"total_steps": 5}, optimizer=sgd(), **SUPPLIED)


def test_the_names_and_their_options():
    assert {name: list(SCHEDULERS.options(name)) for name in SCHEDULERS.names()} == {
        "constant": [],
        "cosine": [],
        "exponential": ["decay_rate"],
        "inverse_square_root": [],
        "linear": [],
        "linear_warmup": [],
        "warmup_stable_decay": ["decay_fraction"],
    }
    built = SCHEDULERS.build("exponential", {"decay_rate": 0.5}, optimizer=sgd(), **SUPPLIED)
    assert built.multiplier(21) == 0.5


def test_a_schedule_of_ones_own_is_one_method():
    class Halves(LearningRateScheduler):
        def multiplier(self, step, progress=None):
            return 0.5**step

    scheduler = Halves(sgd(1.0))
    assert [scheduler.step() for _ in range(3)] == [0.5, 0.25, 0.125]


def with_warmup(schedule: str, warmup_steps: int | None) -> RunConfig:
    lines = ["training:", f"  scheduler: {schedule}", "  total_steps: 100"]
    if warmup_steps is not None:
        lines.append(f"  warmup_steps: {warmup_steps}")
    return RunConfig.from_yaml("\n".join(lines))


@pytest.mark.parametrize("schedule", SCHEDULERS.names())
def test_a_warmup_longer_than_the_run_is_refused_where_the_schedule_has_one(schedule):
    check_names(with_warmup(schedule, None))
    check_names(with_warmup(schedule, 99))
    if not SCHEDULERS.get(schedule).uses_warmup:
        check_names(with_warmup(schedule, 100))
        return
    with pytest.raises(ConfigError) as caught:
        check_names(with_warmup(schedule, 100))
    assert caught.value.where == "YAML text:4: training.warmup_steps"
    assert caught.value.what == "warmup_steps 100 is not below the run's total_steps 100"


def test_a_schedule_of_somebody_else_says_that_it_warms_up(monkeypatch):
    monkeypatch.setattr(SCHEDULERS, "_factories", {**SCHEDULERS._factories})

    @SCHEDULERS.register("rising")
    class Rising(LearningRateScheduler):
        uses_warmup = True

        def __init__(self, optimizer, warmup_steps: int) -> None:
            super().__init__(optimizer)

        def multiplier(self, step, progress=None):
            return 1.0

    with pytest.raises(ConfigError, match="warmup_steps 100 is not below"):
        check_names(with_warmup("rising", 100))
