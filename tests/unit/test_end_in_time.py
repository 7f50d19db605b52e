"""A run under a clock ends in its time, with its last validation and sample."""

from __future__ import annotations

import itertools
import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ignite.engine import Events

from fundamentallm.config.training import TrainingConfig
from fundamentallm.data.tokenizer import CharacterTokenizer
from fundamentallm.events import TrainingEvents
from fundamentallm.testing import tiny_loaders, tiny_model
from fundamentallm.training import evaluator
from fundamentallm.training.decision import Cadence
from fundamentallm.training.handlers import Evaluation, Samples, Schedule
from fundamentallm.training.schedulers import SCHEDULERS
from fundamentallm.training.trainer import Trainer

STEP, VALIDATION, SAMPLE = 1.0, 10.0, 5.0  # seconds


class Hands:
    """A clock that only the work of a run moves."""

    def __init__(self, trainer: Trainer, estimate: float, validation: float = VALIDATION) -> None:
        self.now = 0.0
        trainer.budget.clock = lambda: self.now
        trainer.budget._estimates = [lambda: estimate]
        for event, seconds in (
            (Events.ITERATION_COMPLETED, STEP),
            (TrainingEvents.FLLM_EVALUATION_STARTED, validation),
            (TrainingEvents.FLLM_EVALUATION_COMPLETED, SAMPLE),
        ):
            trainer.add_event_handler(event, self.move, seconds)

    def move(self, seconds: float) -> None:
        self.now += seconds


def make_trainer(*handlers: Any, **fields: Any) -> Trainer:
    torch.manual_seed(0)
    train, val = tiny_loaders()
    config = TrainingConfig(**{"eval_epochs": False, "eval_steps": 10**6, **fields})
    return Trainer(
        tiny_model(), train, val, device="cpu", config=config, handlers=[*handlers, Evaluation()]
    )


def run(trainer: Trainer, estimate: float = VALIDATION + SAMPLE, **options: Any) -> Hands:
    hands = Hands(trainer, estimate, **options)
    trainer.run()
    return hands


def validated_at(trainer: Trainer) -> list[int]:
    return [row["step"] for row in trainer.history.validations]


def test_the_first_validation_is_the_last_and_inside_by_its_estimate():
    trainer = make_trainer(max_seconds=100.0)
    hands = run(trainer)
    assert trainer.state.iteration == 85
    assert hands.now == 100.0
    assert trainer.finished == "the budget is used up"


def test_what_earlier_ones_took_counts_in_place_of_the_estimate():
    trainer = make_trainer(max_seconds=100.0, eval_steps=30)
    hands = run(trainer, estimate=0.0)
    assert hands.now == 100.0
    # 30 steps and 15 seconds, 30 steps and 15 seconds are 90: the second would leave no time.
    assert validated_at(trainer) == [30, 70]


def test_a_validation_for_which_there_is_time_is_made():
    trainer = make_trainer(max_seconds=100.0, eval_steps=20)
    hands = run(trainer, estimate=0.0)
    assert validated_at(trainer) == [20, 40, 55]
    assert hands.now == 100.0


def test_a_rate_that_follows_the_clock_reaches_its_end_with_the_last_step():
    trainer = make_trainer(max_seconds=100.0, scheduler="linear", warmup_steps=0)
    scheduler = SCHEDULERS.build(
        "linear", {}, optimizer=trainer.optimizer, total_steps=10**9, warmup_steps=0, min_lr=0.0
    )
    schedule = Schedule(scheduler)
    schedule.attach(trainer)
    rates: list[float] = []
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda: rates.append(trainer.state.metrics["train/lr"])
    )
    run(trainer)
    assert schedule.progress == pytest.approx(84 / 85)
    assert rates[-1] < 0.02 * rates[0]


def test_steps_alone_are_not_shortened_by_a_clock_that_is_far():
    trainer = make_trainer(max_seconds=1000.0, total_steps=20, eval_steps=5)
    run(trainer)
    assert trainer.state.iteration == 20
    assert validated_at(trainer) == [5, 10, 15, 20]


def test_an_end_that_takes_more_than_the_budget_leaves_half_of_it_and_is_told(caplog):
    trainer = make_trainer(max_seconds=40.0, eval_steps=5)
    with caplog.at_level(logging.WARNING, "fundamentallm"):
        hands = run(trainer, estimate=105.0, validation=100.0)
    assert trainer.state.iteration == 20
    assert validated_at(trainer) == [20]
    assert hands.now == 125.0
    assert [r.message for r in caplog.records if "max_seconds is 40" in r.message]


def test_the_remaining_time_has_the_validations_to_come():
    trainer = make_trainer(total_steps=100, eval_steps=30)
    left: dict[int, float | None] = {}
    trainer.add_event_handler(
        TrainingEvents.FLLM_METRICS_READY,
        lambda: left.update({trainer.state.iteration: trainer.seconds_remaining()}),
    )
    hands = Hands(trainer, 0.0)
    ends: dict[int, float] = {}
    trainer.add_event_handler(
        TrainingEvents.FLLM_METRICS_READY,
        lambda: ends.update({trainer.state.iteration: hands.now}),
    )
    trainer.run()
    assert hands.now == 100 + 4 * 15
    for step in (31, 45, 60, 61, 99, 100):
        assert left[step] == pytest.approx(hands.now - ends[step]), step


@pytest.mark.parametrize("eval_epochs", [True, False])
@pytest.mark.parametrize("epochs_from", [0, 5])
@pytest.mark.parametrize("last", [50, 51, 60])
def test_evaluations_to_come_are_counted(last, epochs_from, eval_epochs):
    cadence = Cadence(12, 10, 10, eval_epochs, None, epochs_from)
    for step in range(5, last):
        at = [k for k in range(step + 1, last + 1) if cadence.evaluates_at(k) or k == last]
        twice = [k for k in at if epochs_from and eval_epochs and k % 10 == 0 and (k - 5) % 12 == 0]
        assert cadence.evaluations_between(step, last) == len(at) + len(twice), step


# What each call takes, preparation first, in order and over and over; how many calls are timed
# within 10 s, and the estimate for one of the micro-batches.
CALLS = {
    "quiet": ([9.0, 1.0, 1.0], 3, 1.0),
    "restless": ([9.0, 1.2, 0.8], 5, 1.04 + (0.192 / 4 / 5) ** 0.5),
    "disturbed": ([9.0, 0.5, 1.5], 10, 1.0 + (2.5 / 9 / 10) ** 0.5),
    "at the end of the time": ([9.0, 4.0, 8.0], 2, 6.0),
    "slow": ([9.0, 20.0], 1, 20.0),
}


@pytest.mark.parametrize(("calls", "number", "expected"), CALLS.values(), ids=CALLS)
def test_a_pass_is_measured_until_its_mean_is_known(calls, number, expected, monkeypatch):
    trainer = make_trainer()
    first, *others = calls
    durations = itertools.chain([first], itertools.cycle(others))
    now = 0.0

    def evaluate(*arguments: Any) -> Any:
        nonlocal now
        now += next(durations)
        evaluated.append(now)
        return real(*arguments)

    real, evaluated = evaluator.evaluate_batch, []
    monkeypatch.setattr(evaluator, "evaluate_batch", evaluate)
    monkeypatch.setattr(evaluator, "time", SimpleNamespace(perf_counter=lambda: now))
    seconds = trainer.evaluator.seconds_for(trainer.val_loader, 10.0)
    assert len(evaluated) == 1 + number
    assert seconds == pytest.approx(expected * len(trainer.val_loader))


def test_the_estimates_are_of_the_right_size_and_leave_no_trace(tmp_path):
    writer = Samples(CharacterTokenizer("\nabcdefghij"), tmp_path, num_tokens=200)
    plain, estimated = make_trainer(total_steps=6), make_trainer(writer, total_steps=6)
    trainer = estimated
    state = torch.get_rng_state()
    assert 0 < trainer.evaluator.seconds_for(trainer.val_loader, 1.0) < 5
    assert 0 < writer.seconds(trainer) < 60
    assert torch.equal(torch.get_rng_state(), state)
    assert trainer.model.training
    plain.run()
    trainer.run()
    assert trainer.history.train_loss == plain.history.train_loss
