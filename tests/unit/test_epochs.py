"""Epochs that a handler ends early, with Ignite's `terminate_epoch()`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events, State

from fundamentallm.config import TrainingConfig
from fundamentallm.events import TrainingEvents
from fundamentallm.testing import SpoiltGradient, tiny_loaders, tiny_model
from fundamentallm.training.checkpoint.store import CheckpointStore
from fundamentallm.training.epochs import Epochs
from fundamentallm.training.handlers import NaNRollback
from fundamentallm.training.loop import TrainingLoop
from fundamentallm.training.trainer import Trainer

STEPS = 10  # an epoch of the tiny loaders


class EndEpochAt:
    """Calls terminate_epoch() at some steps."""

    def __init__(self, *steps: int, event: Any = Events.ITERATION_COMPLETED) -> None:
        self.steps, self.event = steps, event

    def attach(self, engine: Engine, **options: Any) -> None:
        engine.add_event_handler(self.event, self.end, **options)

    def end(self, engine: Engine, **options: Any) -> None:
        if engine.state.iteration in self.steps:
            engine.terminate_epoch(**options)


def make_trainer(place: Path | None = None, **fields: Any) -> Trainer:
    fields = {"eval_steps": 4, "learning_rate": 1e-2, "keep_last": 20, **fields}
    torch.manual_seed(3)
    config = TrainingConfig(checkpoint_dir=str(place), **fields)
    model, (train, val) = tiny_model(dropout=0.1), tiny_loaders()
    trainer = Trainer(model, train, val, device="cpu", config=config)
    if place is None:
        trainer._checkpoint_dir = None
    return trainer


def events_of(engine: Engine) -> list[tuple[str, int, int]]:
    seen: list[tuple[str, int, int]] = []

    def note(engine: Engine, name: str) -> None:
        seen.append((name, engine.state.epoch, engine.state.iteration))

    for event in (
        Events.STARTED,
        Events.EPOCH_STARTED,
        Events.ITERATION_COMPLETED,
        Events.EPOCH_COMPLETED,
        Events.COMPLETED,
    ):
        engine.add_event_handler(event, note, event.name)
    return seen


@pytest.mark.parametrize(
    ("steps", "skip"),
    [((3,), False), ((3, 7), True), ((10,), False), ((13, 20, 21), False), ((1, 2, 3), True)],
    ids=str,
)
def test_events_and_epochs_are_those_of_a_plain_engine(steps: tuple[int, ...], skip: bool) -> None:
    trainer, plain = make_trainer(), Engine(lambda *_: None)
    for engine in (trainer, plain):
        EndEpochAt(*steps).attach(engine, skip_epoch_completed=skip)
    ours, theirs = events_of(trainer), events_of(plain)
    trainer.train(num_epochs=3)
    plain.run(range(STEPS), max_epochs=3)
    assert ours == theirs
    assert trainer.finished == "the last step is done"


def test_the_next_step_reads_the_next_epoch_and_the_end_is_evaluated_saved_and_measured(
    tmp_path: Path,
) -> None:
    whole, cut = make_trainer(total_steps=23), make_trainer(tmp_path, total_steps=23)
    EndEpochAt(3).attach(cut)
    batches: dict[str, list[torch.Tensor]] = {"whole": [], "cut": []}
    for name, trainer in (("whole", whole), ("cut", cut)):
        trainer.add_event_handler(
            Events.ITERATION_COMPLETED,
            lambda e, name=name: batches[name].append(e.window.micro_batches[0]["input_ids"]),
        )
        trainer.train()
    expected = batches["whole"][:3] + batches["whole"][10:]
    for one, other in zip(batches["cut"], expected, strict=False):
        assert torch.equal(one, other)
    assert [entry["step"] for entry in cut.history.epochs] == [3, 13, 23]
    assert [entry["epoch"] for entry in cut.history.epochs] == [1, 2, 3]
    mean = sum(cut.history.train_loss[:3]) / 3
    assert cut.history.epoch_train_loss[0] == pytest.approx(mean)
    assert [it["step"] for it in cut.history.validations] == [3, 4, 8, 12, 13, 16, 20, 23]
    assert CheckpointStore(tmp_path).load(tmp_path / "step-00000003")


@pytest.mark.parametrize(
    "event",
    [
        Events.ITERATION_COMPLETED,
        pytest.param(TrainingEvents.FLLM_METRICS_READY, marks=pytest.mark.long),
        pytest.param(Events.ITERATION_STARTED, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_a_resume_from_any_checkpoint_is_bitwise(tmp_path: Path, event: Any) -> None:
    check_resumes(tmp_path, EndEpochAt(6, 13, event=event), (3, 6, 9, 13, 15))


def test_a_resume_is_bitwise_where_an_evaluation_ended_the_epoch(tmp_path: Path) -> None:
    ending = EndEpochAt(4, 8, event=TrainingEvents.FLLM_EVALUATION_COMPLETED)
    check_resumes(tmp_path, ending, (4, 8, 12))


def check_resumes(place: Path, ending: EndEpochAt, steps: tuple[int, ...]) -> None:
    fields: dict[str, Any] = {"total_steps": 20}
    if ending.event is not TrainingEvents.FLLM_EVALUATION_COMPLETED:
        fields["checkpoint_steps"] = 1
    whole = make_trainer(place, **fields)
    ending.attach(whole)
    whole.train()
    for step in steps:
        again = make_trainer(place / str(step), **fields)
        ending.attach(again)
        again.resume(place / f"step-{step:08d}")
        again.train()
        assert again.history.train_loss == whole.history.train_loss[step:], step
        assert again.epochs == whole.epochs
        for one, other in zip(whole.model.parameters(), again.model.parameters(), strict=True):
            assert torch.equal(one, other)


def test_a_rollback_takes_the_end_of_an_epoch_back(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, total_steps=16)
    for handler in (SpoiltGradient(7), NaNRollback(), EndEpochAt(6)):
        handler.attach(trainer)
    trainer.train()
    assert trainer.state.rollbacks > 0
    assert trainer.epochs.cuts == [(6, 1)]
    assert trainer.history.steps == list(range(1, 17))


@pytest.mark.parametrize("event", [Events.STARTED, Events.EPOCH_STARTED], ids=str)
def test_it_is_refused_before_a_step_as_by_ignite(event: Any) -> None:
    trainer = make_trainer()
    EndEpochAt(0, event=event).attach(trainer)
    with pytest.raises(RuntimeError, match="STARTED or EPOCH_STARTED"):
        trainer.train(num_epochs=1)


def test_positions_are_those_of_whole_epochs_and_of_what_follows_a_cut() -> None:
    epochs = Epochs(10)
    assert [epochs.position(step) for step in (0, 9, 10, 25)] == [(0, 0), (0, 9), (1, 0), (2, 5)]
    assert not epochs.end_early(20)
    assert epochs.end_early(23)
    assert [epochs.position(step) for step in (22, 23, 24, 33)] == [(2, 2), (3, 0), (3, 1), (4, 0)]
    assert [epochs.number(step) for step in (0, 1, 20, 21, 23, 24, 33, 34)] == [
        *(0, 1, 2, 3, 3, 4, 4, 5)
    ]
    assert epochs.last_step(5) == 43
    copied = Epochs(10)
    copied.load_state_dict(epochs.state_dict())
    assert copied == epochs


@pytest.mark.parametrize("cut", [1, 3])
def test_logs_loss_and_completion_of_an_epoch_come_with_its_end_also_with_an_early_one(
    cut: int,
) -> None:
    trainer = make_trainer(total_steps=25, log_steps=4)
    EndEpochAt(cut).attach(trainer)
    logged: list[int] = []
    with_loss: list[int] = []
    completed: list[int] = []
    read: list[torch.Tensor] = []

    @trainer.on(TrainingEvents.FLLM_METRICS_READY)
    def note(engine: Trainer) -> None:
        step = engine.state.iteration
        logged.extend([step] if engine.is_log_step() else [])
        with_loss.extend([step] if "train/epoch_loss" in engine.state.metrics else [])
        read.append(engine.window.micro_batches[0]["input_ids"])

    trainer.add_event_handler(
        Events.EPOCH_COMPLETED, lambda: completed.append(trainer.state.iteration)
    )
    trainer.train()
    ends = [cut, cut + STEPS, cut + 2 * STEPS]
    assert logged == sorted({4, 8, 12, 16, 20, 24, *ends, 25})
    assert with_loss == completed == ends
    # The step behind the cut reads the first window of the next epoch.
    first = trainer.train_loader.window_at(1, 0).micro_batches[0]["input_ids"]
    assert torch.equal(read[cut], first)


def test_train_epoch_ends_where_a_handler_ends_the_epoch() -> None:
    trainer = make_trainer()
    EndEpochAt(3).attach(trainer)
    for step in (3, 13):
        trainer.train_epoch()
        assert trainer.state.iteration == step


def test_a_rollback_behind_an_early_end_evaluates_as_a_run_that_never_went_there(
    tmp_path: Path,
) -> None:
    """Step 3 would end an epoch if they were counted from the cut at 13."""
    trainer = make_trainer(tmp_path, total_steps=16, eval_steps=100, checkpoint_steps=3)
    EndEpochAt(13).attach(trainer)
    back: list[int] = []

    @trainer.on(Events.ITERATION_COMPLETED)
    def go_back() -> None:
        if trainer.state.iteration == 14 and not back:
            trainer.roll_back("a test", before=3)

    trainer.add_event_handler(
        TrainingEvents.FLLM_ROLLED_BACK, lambda: back.append(trainer.state.iteration)
    )
    trainer.train()
    assert back == [3]
    assert [entry["step"] for entry in trainer.history.validations] == [10, 13, 16]
    assert trainer.state.evaluations == 3


@pytest.mark.parametrize("step", range(25))
@pytest.mark.parametrize("rows", [1, 3, 4, 5, 8, 30])
def test_a_change_of_the_rows_leaves_out_less_than_a_step(step, rows):
    """30 rows an epoch; steps of 4, and then of other, the same or more rows."""
    before, length = Epochs(8), -(-30 // rows)
    after = Epochs(length, rows=[(step, 4), (None, rows)])
    assert after.load_state_dict(before.state_dict(), 8, step)
    epoch, within = before.position(step)
    trained = min(30, within * 4)
    now = after.position(step)
    assert (
        0 <= (now[0] - epoch) * 30 + now[1] * rows - trained < max(rows, 2) or now[1] == length - 1
    )
    assert after.number(step) == before.number(step)
    again = Epochs(length)
    assert again.load_state_dict(after.state_dict())
    for later in range(step, step + 3 * length):
        assert (
            again.position(later)
            == after.position(later)
            == divmod(now[0] * length + now[1] + later - step, length)
        )


def test_epochs_of_another_length_without_a_known_change_are_refused():
    epochs = Epochs(8, [(3, 1)], [8])
    assert not epochs.load_state_dict([], 10, 4)
    assert epochs.state_dict() == [[3, 1]]


def test_two_changes_of_the_rows_follow_each_other():
    first = Epochs(4, rows=[(2, 4), (None, 8)])
    assert first.load_state_dict([], 8, 2)
    assert first.position(2) == (0, 1)
    second = Epochs(8, rows=[(2, 4), (4, 8), (None, 4)])
    assert second.load_state_dict(first.state_dict(), 4, 4)
    assert second.position(4) == (0, 6)  # 8 rows, and two steps of 8
    assert second.state_dict() == [[1, 0], [-2, 0, 4]]
    assert second.position(6) == (1, 0)


@pytest.mark.parametrize(
    ("iteration", "epoch", "is_done"),
    [(3, 0, False), (4, 0, True), (3, 2, True), (4, 2, True), (5, 3, True)],
)
def test_the_first_limit_of_steps_or_epochs_ends_a_run(iteration, epoch, is_done):
    state = State(iteration=iteration, max_iters=4, epoch=epoch, max_epochs=2)
    assert TrainingLoop._is_done(state) is is_done


def test_a_run_without_limits_is_never_done():
    assert not TrainingLoop._is_done(State(iteration=9, max_iters=None, epoch=9, max_epochs=None))


def test_an_epoch_that_a_handler_ends_in_the_evaluation_of_a_step_ends_with_that_step():
    trainer = make_trainer(total_steps=6, eval_steps=2)

    @trainer.on(TrainingEvents.FLLM_EVALUATION_COMPLETED)
    def end_epoch(engine: Engine) -> None:
        if engine.state.iteration == 2:
            engine.terminate_epoch()

    trainer.train()
    assert trainer.epochs.cuts == [(2, 1)]
