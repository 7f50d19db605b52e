"""Names, drawing and counters of our events."""

from __future__ import annotations

import re

import pytest
import torch
from ignite.engine import Events
from tests.losses import NaNAt

from fundamentallm import events
from fundamentallm.config.training import TrainingConfig
from fundamentallm.data.tokenizer import CharacterTokenizer
from fundamentallm.events import LOOP, TrainingEvents
from fundamentallm.testing import RecordingHandler, SpoiltGradient, tiny_loaders, tiny_model
from fundamentallm.training.handlers import Checkpointing, Evaluation, NaNRollback, Samples
from fundamentallm.training.trainer import Trainer


@pytest.mark.parametrize("event", TrainingEvents)
def test_is_prefixed_and_stands_once_in_the_loop(event):
    assert event.name.startswith("FLLM_")
    assert event.value == event.name.lower()
    assert isinstance(event, TrainingEvents)
    assert TrainingEvents(event.value) is event
    assert LOOP.count(event) == 1


def test_the_drawing_has_every_event_in_the_order_of_the_loop():
    assert events.__doc__ is not None
    drawing = events.__doc__.split("```")[1]
    drawn = re.findall(r"^ *([A-Z][A-Z_]+[A-Z])\b", drawing, re.MULTILINE)
    assert drawn == [event.name for event in LOOP]


def test_the_engine_filters_by_the_counters_of_the_events():
    trainer = Trainer(tiny_model(), tiny_loaders()[0], device="cpu")
    for number, event in enumerate(TrainingEvents, 5):
        setattr(trainer.state, event.counter, number)
        assert trainer.state.get_event_attrib_value(event) == number


def test_no_name_is_one_of_ignites():
    assert not {event.name for event in TrainingEvents} & {event.name for event in Events}


def test_the_drawing_knows_no_other_events():
    assert events.__doc__ is not None
    names = set(re.findall(r"\bFLLM_[A-Z_]+[A-Z]\b", events.__doc__))
    assert names == {event.name for event in TrainingEvents}


class DamagedMoments:
    """Spoils the optimizer's state after chosen steps, once each, when a checkpoint is due."""

    def __init__(self, *steps: int) -> None:
        self.steps = set(steps)

    def attach(self, trainer: Trainer) -> None:
        trainer.add_event_handler(Events.ITERATION_COMPLETED, self.spoil)

    def spoil(self, trainer: Trainer) -> None:
        if trainer.state.iteration in self.steps:
            self.steps.remove(trainer.state.iteration)
            next(iter(trainer.optimizer.state.values()))["exp_avg"].view(-1)[0] = float("nan")


def run(directory, attach) -> None:
    """Thirteen steps with four rollbacks: every event fires at least twice but for two."""
    torch.manual_seed(0)
    train, val = tiny_loaders(batch_size=2, accumulation_steps=2)
    trainer = Trainer(
        tiny_model(),
        train,
        val,
        device="cpu",
        config=TrainingConfig(total_steps=13, eval_steps=2),
        handlers=[
            NaNRollback(max_per_region=10),
            SpoiltGradient(7, 9),
            DamagedMoments(4, 10),
            Evaluation(),
            Samples(CharacterTokenizer.from_text("0123456789\n"), directory, num_tokens=5),
            Checkpointing(directory),
        ],
    )
    attach(trainer)
    trainer.run()


ONCE_A_RUN = {TrainingEvents.FLLM_RUN_STARTED, TrainingEvents.FLLM_RUN_ENDED}


@pytest.fixture(scope="module")
def heard(tmp_path_factory):
    """By event: the numbers at which it fired, and those that two filters let through."""
    result = {event: ([], [], []) for event in TrainingEvents}

    def note(engine: Trainer, event: TrainingEvents, index: int) -> None:
        result[event][index].append(getattr(engine.state, event.counter))

    def attach(trainer: Trainer) -> None:
        for event in TrainingEvents:
            trainer.add_event_handler(event, note, event, 0)
            trainer.add_event_handler(event(every=2), note, event, 1)
            trainer.add_event_handler(event(once=2), note, event, 2)

    run(tmp_path_factory.mktemp("checkpoints"), attach)
    return result


@pytest.mark.parametrize("event", [event for event in TrainingEvents if event not in ONCE_A_RUN])
def test_filters_count_by_the_mapped_attribute(heard, event):
    numbers, every, once = heard[event]
    assert len(numbers) >= 2
    assert every
    assert every == [n for n in numbers if n % 2 == 0]
    assert once == [n for n in numbers if n == 2]


def test_self_counting_events_are_numbered_one_by_one():
    train, val = tiny_loaders(batch_size=2, accumulation_steps=2)
    trainer = Trainer(
        tiny_model(),
        train,
        val,
        loss_fn=NaNAt(3),
        device="cpu",
        config=TrainingConfig(total_steps=5, eval_steps=2),
        handlers=[Evaluation()],
    )
    numbers: dict[str, list[int]] = {}
    for event in (event for event in TrainingEvents if event.counts):
        trainer.add_event_handler(
            event,
            lambda engine, e: numbers.setdefault(e.name, []).append(
                getattr(engine.state, e.counter)
            ),
            event,
        )
    trainer.run()
    assert numbers == {
        "FLLM_MICRO_BATCH_COMPLETED": list(range(1, 11)),
        "FLLM_OPTIMIZER_STEPPED": [1, 2, 3, 4],
        "FLLM_STEP_REJECTED": [1],
        "FLLM_EVALUATION_STARTED": [1, 2, 3],
    }


def test_every_event_fires_in_a_run_with_a_fault(tmp_path):
    recording = RecordingHandler()
    run(tmp_path, recording.attach)
    fired = set(recording.names())
    assert {event.name for event in TrainingEvents} <= fired
    names = recording.names()
    assert [names.count(event.name) for event in ONCE_A_RUN] == [1, 1]
    assert names[0] == "FLLM_RUN_STARTED"
    assert names[-1] == "FLLM_RUN_ENDED"
