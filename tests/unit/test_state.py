"""The typed state of a run."""

from __future__ import annotations

from typing import get_type_hints

from fundamentallm.config.training import TrainingConfig
from fundamentallm.events import TrainingEvents
from fundamentallm.testing import tiny_loaders, tiny_model
from fundamentallm.training.state import COUNTERS, IRREVERSIBLE, TrainingState
from fundamentallm.training.trainer import Trainer


def make_trainer() -> Trainer:
    train, val = tiny_loaders()
    config = TrainingConfig(total_steps=3)
    return Trainer(tiny_model(), train, val, device="cpu", config=config)


def test_begins_with_every_counter():
    state = TrainingState()
    assert {name: getattr(state, name) for name in COUNTERS} == COUNTERS
    assert state.iteration == 0
    assert state.metrics == {}
    assert state.last_checkpoint is None


def test_every_counter_is_declared_with_its_type():
    hints = get_type_hints(TrainingState)
    assert {name: hints[name] for name in COUNTERS} == {
        name: type(value) for name, value in COUNTERS.items()
    }


def test_two_states_share_nothing():
    first, second = TrainingState(), TrainingState()
    first.metrics["x"] = 1
    first.tokens_seen += 1
    assert second.metrics == {}
    assert second.tokens_seen == 0


def test_events_count_by_fields_of_the_state():
    state = TrainingState()
    assert all(hasattr(state, event.counter) for event in TrainingEvents)


def test_what_no_rollback_takes_back_is_a_counter():
    assert set(IRREVERSIBLE) < set(COUNTERS)


def test_counters_go_through_a_checkpoints_state():
    trainer = make_trainer()
    trainer.run()
    trainer.budget.clock = lambda: 0.0
    for number, name in enumerate(COUNTERS, 1):
        setattr(trainer.state, name, type(COUNTERS[name])(number))
    other = make_trainer()
    other.load_state_dict(trainer.state_dict())
    assert {name: getattr(other.state, name) for name in COUNTERS} == {
        name: number for number, name in enumerate(COUNTERS, 1)
    }
    assert other.state.iteration == 3


def test_the_engines_own_state_is_this_type():
    trainer = make_trainer()
    assert type(trainer.state) is TrainingState
    state = trainer.state
    trainer.run()
    assert trainer.state is state
