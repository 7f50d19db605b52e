"""What this package relies on in pytorch-ignite, so that an upgrade that changes it fails here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from ignite.engine import Engine, EventEnum, Events, State
from ignite.handlers.param_scheduler import ParamScheduler


class OwnEvents(EventEnum):
    CONTRACT_HAPPENED = "contract_happened"


class Impostor(EventEnum):
    STARTED = "impostor_started"


def engine_of(seen: list[Any]) -> Engine:
    return Engine(lambda engine, batch: seen.append((engine.state.iteration, batch)))


class Positioned:
    """A loader with a position of its own, as this package's are."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.position = 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        while self.position < self.length:
            self.position += 1
            yield self.position - 1
        self.position = 0


def record(engine: Engine, events: list[str]) -> None:
    for event in (
        Events.STARTED,
        Events.EPOCH_STARTED,
        Events.GET_BATCH_STARTED,
        Events.GET_BATCH_COMPLETED,
        Events.ITERATION_STARTED,
        Events.ITERATION_COMPLETED,
        Events.EPOCH_COMPLETED,
        Events.TERMINATE,
        Events.COMPLETED,
    ):
        engine.add_event_handler(event, lambda name: events.append(name), event.name)


def test_events_fire_in_the_order_of_the_drawing() -> None:
    events: list[str] = []
    engine = Engine(lambda engine, batch: events.append("step"))
    record(engine, events)
    engine.run([0], max_iters=1, epoch_length=1)
    assert events == [
        "STARTED",
        "EPOCH_STARTED",
        "GET_BATCH_STARTED",
        "GET_BATCH_COMPLETED",
        "ITERATION_STARTED",
        "step",
        "ITERATION_COMPLETED",
        "EPOCH_COMPLETED",
        "COMPLETED",
    ]


def test_handlers_run_in_registration_order_also_after_terminate() -> None:
    heard: list[int] = []
    engine = engine_of([])

    def first(engine: Engine) -> None:
        heard.append(1)
        engine.terminate()

    engine.add_event_handler(Events.ITERATION_COMPLETED, first)
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: heard.append(2))
    engine.run([0, 1], max_iters=2, epoch_length=2)
    assert heard == [1, 2]


def test_a_stop_inside_an_epoch_leaves_out_epoch_completed() -> None:
    events: list[str] = []
    engine = engine_of([])
    record(engine, events)
    engine.run([0, 1, 2], max_iters=2, epoch_length=3)
    assert "EPOCH_COMPLETED" not in events
    assert events[-2:] == ["TERMINATE", "COMPLETED"]


def test_terminate_with_skip_completed_leaves_out_completed() -> None:
    events: list[str] = []
    engine = engine_of([])
    record(engine, events)
    engine.add_event_handler(
        Events.ITERATION_COMPLETED(once=1), lambda e: e.terminate(skip_completed=True)
    )
    engine.run([0, 1], max_iters=2, epoch_length=2)
    assert "COMPLETED" not in events


def test_events_are_told_apart_by_member_name_which_is_why_ours_have_a_prefix() -> None:
    engine = engine_of([])
    engine.register_events(*Impostor)
    heard: list[str] = []
    engine.add_event_handler(Impostor.STARTED, lambda: heard.append("ours"))
    engine.run([0], max_iters=1, epoch_length=1)
    assert heard == ["ours"]  # although only Events.STARTED fired


def test_filters_of_own_events_read_the_attribute_that_we_advance() -> None:
    engine = engine_of([])
    engine.register_events(
        *OwnEvents, event_to_attr={OwnEvents.CONTRACT_HAPPENED: "contract_count"}
    )
    heard: list[int] = []
    engine.add_event_handler(
        OwnEvents.CONTRACT_HAPPENED(every=2), lambda e: heard.append(e.state.contract_count)
    )
    for _ in range(4):
        engine.state.contract_count += 1
        engine.fire_event(OwnEvents.CONTRACT_HAPPENED)
    assert heard == [2, 4]
    # The mapping is the class's: it shows on every other engine, evaluators included.
    assert OwnEvents.CONTRACT_HAPPENED in State.event_to_attr
    del State.event_to_attr[OwnEvents.CONTRACT_HAPPENED]


def test_own_counters_travel_in_the_state_and_a_missing_one_is_refused() -> None:
    engine = engine_of([])
    engine.state_dict_user_keys.append("tokens")
    engine.state.tokens = 7
    engine.state.epoch_length, engine.state.max_iters = 4, 8
    state = engine.state_dict()
    assert state["tokens"] == 7
    del state["tokens"]
    with pytest.raises(ValueError, match="tokens"):
        engine.load_state_dict(state)


@pytest.mark.parametrize("start", range(13))
def test_a_loader_with_its_own_position_resumes_at_any_iteration(start: int) -> None:
    seen: list[tuple[int, int]] = []
    ends: list[int] = []
    engine = engine_of(seen)
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda e: ends.append(e.state.iteration))
    loader = Positioned(4)
    loader.position = start % 4
    engine.load_state_dict({"iteration": start, "epoch_length": 4, "max_iters": 12})
    if start < 12:
        engine.run(loader, max_iters=12, epoch_length=4)
    assert seen == [(i + 1, i % 4) for i in range(start, 12)]
    assert ends == [end for end in (4, 8, 12) if end > start]


def test_a_finished_engine_would_train_again_which_is_why_our_run_looks_first() -> None:
    seen: list[tuple[int, int]] = []
    engine = engine_of(seen)
    engine.load_state_dict({"iteration": 4, "epoch_length": 4, "max_iters": 4})
    engine.run(Positioned(4), max_iters=4, epoch_length=4)
    assert len(seen) == 4  # pytorch/ignite#3622


def rewound(repair: bool) -> list[int]:
    """Stop at iteration 6 of epochs of 4, go back to 3, and return where epochs end."""
    ends: list[int] = []
    engine = engine_of([])
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda e: ends.append(e.state.iteration))
    handle = engine.add_event_handler(
        Events.ITERATION_COMPLETED(once=6), lambda e: e.terminate(skip_completed=True)
    )
    loader = Positioned(4)
    engine.run(loader, max_iters=12, epoch_length=4)
    handle.remove()
    if repair:
        engine.should_terminate = False
    engine.load_state_dict({"iteration": 3, "epoch_length": 4, "max_iters": 12})
    loader.position = 3
    engine.run(loader, max_iters=12, epoch_length=4)
    return ends


def test_a_rewind_between_runs_keeps_the_epochs_if_the_stop_is_taken_back() -> None:
    assert rewound(repair=True) == [4, 4, 8, 12]


def test_without_taking_the_stop_back_the_epochs_would_shift() -> None:
    assert rewound(repair=False) != [4, 4, 8, 12]  # pytorch/ignite#2669


def test_after_an_exception_a_spent_generator_would_end_the_next_run_at_once() -> None:
    seen: list[tuple[int, int]] = []

    def step(engine: Engine, batch: int) -> None:
        seen.append((engine.state.iteration, batch))
        if len(seen) == 2:
            raise ArithmeticError

    engine = Engine(step)
    with pytest.raises(ArithmeticError):
        engine.run([0, 1, 2, 3], max_iters=4, epoch_length=4)
    engine.run([0, 1, 2, 3], max_iters=4, epoch_length=4)
    assert len(seen) == 2  # nothing ran
    engine._internal_run_generator = None
    engine.run([0, 1, 2, 3], max_iters=4, epoch_length=4)
    assert len(seen) > 2


def test_a_handler_of_exception_raised_would_swallow_the_error() -> None:
    def step(engine: Engine, batch: int) -> None:
        raise ArithmeticError

    engine = Engine(step)
    engine.add_event_handler(Events.EXCEPTION_RAISED, lambda error: None)
    engine.run([0], max_iters=1, epoch_length=1)  # pytorch/ignite#1234


def test_the_parameter_scheduler_sets_the_value_when_it_is_called() -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)

    class Counted(ParamScheduler):
        def get_param(self) -> float:
            return float(self.event_index)

    scheduler = Counted(optimizer, "lr")
    scheduler.event_index = 5
    scheduler(None)
    assert optimizer.param_groups[0]["lr"] == 5.0
    assert scheduler.event_index == 6


def test_handler_signatures_are_checked_when_they_are_attached() -> None:
    engine = engine_of([])
    with pytest.raises(ValueError, match="takes parameters"):
        engine.add_event_handler(Events.STARTED, lambda engine, surplus: None)
