"""Saves in the background: the run does not feel them, and none is ever half believed."""

from __future__ import annotations

import errno
import logging
import threading
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Events

from fundamentallm.config.training import TrainingConfig
from fundamentallm.errors import CheckpointError, MachineError
from fundamentallm.events import TrainingEvents
from fundamentallm.files.filesystem import Filesystem
from fundamentallm.testing import tiny_loaders, tiny_model
from fundamentallm.training.checkpoint import snapshot
from fundamentallm.training.checkpoint.finite import DamagedStateError
from fundamentallm.training.checkpoint.store import CheckpointStore
from fundamentallm.training.checkpoint.tree import flatten
from fundamentallm.training.handlers import Checkpointing, Evaluation, LossEMA, WeightEMA
from fundamentallm.training.trainer import Trainer


class HeldFilesystem(Filesystem):
    """Writes the files of a chosen step only after `gate` is set; notes the order of commits."""

    def __init__(self, step: int) -> None:
        self.held = f"step-{step:08d}"
        self.gate = threading.Event()
        self.reached = threading.Event()
        self.committed: list[str] = []
        self.fails = False

    def sync(self, file: FileIO) -> None:
        if self.fails and self.held in str(file.name):
            raise OSError(errno.ENOSPC, "No space left on device")
        super().sync(file)

    def create(self, path: Path) -> FileIO:
        if self.held in str(path):
            self.reached.set()
            assert self.gate.wait(20), "nobody opened the gate"
        return super().create(path)

    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)
        if target.name.startswith("step-"):
            self.committed.append(target.name)


class FullFilesystem(Filesystem):
    """A disk that is full while the files of a chosen step are written."""

    def __init__(self, step: int, error: BaseException | None = None) -> None:
        self.failing = f"step-{step:08d}"
        self.error = error or OSError(errno.ENOSPC, "No space left on device")

    def sync(self, file: FileIO) -> None:
        if self.failing in str(file.name):
            raise self.error


def make_trainer(checkpointing: Checkpointing | None, **options: Any) -> Trainer:
    torch.manual_seed(1)
    train, val = tiny_loaders()
    handlers = [WeightEMA(), LossEMA(), Evaluation()]
    if checkpointing is not None:
        handlers.append(checkpointing)
    # Saves of their own cadence: one before an evaluation is waited for.
    cadence = {"checkpoint_steps": 3, "eval_steps": 100, "eval_epochs": False}
    fields = {"learning_rate": 1e-2, "total_steps": 12, **cadence, **options}
    trainer = Trainer(
        tiny_model(dropout=0.1),
        train,
        val,
        device="cpu",
        config=TrainingConfig(**fields),
        handlers=handlers,
    )
    trainer._checkpoint_dir = None
    return trainer


def saving_on(filesystem: Filesystem, directory: Path, **options: Any) -> Checkpointing:
    checkpointing = Checkpointing(directory, 2, asynchronous=True, **options)
    checkpointing.store.filesystem = filesystem
    return checkpointing


def learned(trainer: Trainer) -> tuple[Any, list[bytes]]:
    """The state that no save may change: all but what tells of saves, time and the run's name."""
    state = snapshot.capture(trainer)
    state["handlers"].pop("checkpointing", None)
    for key in ("checkpoints", "elapsed_before", "run_id"):
        state["trainer"].pop(key)
    skeleton, tensors = flatten(state)
    return skeleton, [tensor.numpy().tobytes() for tensor in tensors.values()]


def saving_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("save-")]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_run_is_bitwise_the_same_with_saves_on_and_off(tmp_path, asynchronous):
    silent = make_trainer(None, eval_steps=3)
    silent.train()
    expected = learned(silent)
    checkpointing = Checkpointing(tmp_path, 2, asynchronous=asynchronous)
    saving = make_trainer(checkpointing, checkpoint_steps=1, eval_steps=3)
    saving.train()
    assert saving.state.checkpoints == 13
    assert learned(saving) == expected
    assert saving.history.train_loss == silent.history.train_loss
    assert saving.history.validations == silent.history.validations


def test_a_background_save_holds_the_state_of_its_own_step(tmp_path):
    at_once, later = (
        Checkpointing(tmp_path / name, 20, asynchronous=name == "later")
        for name in ("at once", "later")
    )
    for checkpointing in (at_once, later):
        trainer = make_trainer(checkpointing, checkpoint_steps=1)
        trainer.run_id = "0" * 32
        trainer.train()
    for step in range(13):
        states = [c.store.read(c.store.directory / f"step-{step:08d}") for c in (at_once, later)]
        for state in states:
            state["trainer"].pop("elapsed_before")
        (skeleton, tensors), (other_skeleton, other_tensors) = map(flatten, states)
        assert skeleton == other_skeleton
        for name in tensors:
            assert torch.equal(tensors[name], other_tensors[name]), (step, name)


def test_training_goes_on_while_a_save_is_written_and_the_next_save_waits(tmp_path):
    filesystem = HeldFilesystem(3)
    trainer = make_trainer(saving_on(filesystem, tmp_path))
    steps_before_gate = []

    def look(engine: Trainer) -> None:
        assert filesystem.reached.wait(20)
        assert filesystem.committed == ["step-00000000"]
        steps_before_gate.append(engine.state.iteration)
        if engine.state.iteration == 5:
            # Opened only when step 6 has long asked for its save, if it did not wait.
            threading.Timer(0.3, filesystem.gate.set).start()

    trainer.add_event_handler(
        Events.ITERATION_COMPLETED(event_filter=lambda _, n: n in (4, 5)), look
    )
    saved = []
    trainer.add_event_handler(
        TrainingEvents.FLLM_CHECKPOINT_SAVED,
        lambda engine: saved.append(engine.state.last_checkpoint),
    )
    trainer.train()
    assert steps_before_gate == [4, 5]
    expected = [f"step-{step:08d}" for step in (0, 3, 6, 9, 12)]
    assert filesystem.committed == expected
    assert [path.name for path in saved] == expected
    assert saving_threads() == []


def test_a_background_error_ends_the_run_at_the_next_step(tmp_path):
    checkpointing = saving_on(FullFilesystem(6), tmp_path, on_error="stop")
    trainer = make_trainer(checkpointing)
    wait_for_background(trainer, checkpointing, 6)
    with pytest.raises(CheckpointError, match="the disk is full"):
        trainer.train()
    assert trainer.state.iteration == 7
    store = CheckpointStore(tmp_path)
    assert [manifest.step for manifest in store.list()] == [3, 0]
    assert store.resolve("last") == tmp_path / "step-00000003"
    assert not list(tmp_path.glob(".*"))
    assert saving_threads() == []


def wait_for_background(trainer: Trainer, checkpointing: Checkpointing, after: int) -> None:
    """Let the save of a step end before the next step's end asks for it."""
    trainer.add_event_handler(
        Events.ITERATION_STARTED(once=after + 1), lambda: checkpointing._background.join()
    )


def test_a_background_error_is_a_warning_where_the_run_may_go_on(tmp_path, caplog):
    checkpointing = saving_on(FullFilesystem(6), tmp_path, on_error="continue")
    trainer = make_trainer(checkpointing)
    wait_for_background(trainer, checkpointing, 6)
    told_at = []
    trainer.add_event_handler(
        TrainingEvents.FLLM_METRICS_READY,
        lambda engine: told_at.append(engine.state.iteration) if "not saved" in caplog.text else 0,
    )
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert told_at[0] == 7
    assert "step 6: not saved, training goes on" in caplog.text
    assert "the disk is full" in caplog.text
    assert trainer.state.iteration == 12
    assert trainer.state.checkpoints == 4
    assert CheckpointStore(tmp_path).newest().step == 12

    quiet = make_trainer(None)
    quiet.train()
    assert learned(trainer) == learned(quiet)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_best_score_is_taken_back_when_its_save_failed(tmp_path, asynchronous):
    scores = {0: 1.0, 3: 2.0, 6: 9.0, 9: 3.0, 12: 1.0, 15: 1.0}
    checkpointing = Checkpointing(
        tmp_path,
        2,
        score_function=lambda trainer: scores[trainer.state.iteration],
        asynchronous=asynchronous,
        on_error="continue",
    )
    checkpointing.store.filesystem = FullFilesystem(6)
    make_trainer(checkpointing, total_steps=15).train()
    assert (checkpointing.best_score, checkpointing.best_step) == (3.0, 9)
    store = CheckpointStore(tmp_path)
    assert store.resolve("best") == tmp_path / "step-00000009"
    assert [manifest.step for manifest in store.list()] == [15, 12, 9]


def test_the_last_save_is_whole_when_training_returns(tmp_path):
    trainer = make_trainer(Checkpointing(tmp_path, 2, asynchronous=True))
    trainer.train()
    assert CheckpointStore(tmp_path).verify(tmp_path / "step-00000012").step == 12
    assert trainer.state.last_checkpoint == tmp_path / "step-00000012"
    assert saving_threads() == []


def test_the_save_of_a_stop_is_whole_when_training_returns(tmp_path):
    filesystem = HeldFilesystem(6)
    trainer = make_trainer(saving_on(filesystem, tmp_path))

    def stop(engine: Trainer) -> None:
        filesystem.gate.set()
        engine.interrupt_run(15)

    trainer.add_event_handler(Events.ITERATION_STARTED(once=7), stop)
    trainer.train()
    whole = [manifest.step for manifest in CheckpointStore(tmp_path).list()]
    assert whole[:2] == [7, 6]
    assert saving_threads() == []


def test_an_exception_in_training_leaves_no_thread_and_a_whole_save(tmp_path):
    filesystem = HeldFilesystem(6)
    trainer = make_trainer(saving_on(filesystem, tmp_path))

    def fail() -> None:
        assert filesystem.reached.wait(20)
        threading.Timer(0.3, filesystem.gate.set).start()
        raise RuntimeError("a handler broke")

    trainer.add_event_handler(Events.ITERATION_STARTED(once=7), fail)
    with pytest.raises(RuntimeError, match="a handler broke"):
        trainer.train()
    assert saving_threads() == []
    assert CheckpointStore(tmp_path).newest().step == 6


@pytest.mark.parametrize("failing", [6, 99])
def test_an_exception_in_training_hides_no_error_of_the_save_under_way(tmp_path, caplog, failing):
    checkpointing = saving_on(FullFilesystem(failing), tmp_path)
    trainer = make_trainer(checkpointing)

    def fail() -> None:
        checkpointing._background.join()
        raise RuntimeError("a handler broke")

    trainer.add_event_handler(Events.ITERATION_STARTED(once=7), fail)
    with pytest.raises(RuntimeError, match="a handler broke"):
        trainer.train()
    said = [record.getMessage() for record in caplog.records if "saved" in record.getMessage()]
    assert len(said) == (failing == 6)
    assert all("step 6: not saved: " in line and "the disk is full" in line for line in said)


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), MemoryError()])
@pytest.mark.parametrize("on_error", ["stop", "continue"])
def test_no_error_in_the_background_passes_for_a_save(tmp_path, error, on_error):
    checkpointing = saving_on(FullFilesystem(6, error), tmp_path, on_error=on_error)
    trainer = make_trainer(checkpointing)
    saved = []
    trainer.add_event_handler(
        TrainingEvents.FLLM_CHECKPOINT_SAVED,
        lambda engine: saved.append(engine.state.last_checkpoint),
    )
    wait_for_background(trainer, checkpointing, 6)
    with pytest.raises(MachineError, match="out of memory"):
        trainer.train()
    assert tmp_path / "step-00000006" not in saved
    assert trainer.state.iteration == 7
    assert CheckpointStore(tmp_path).newest().step == 3
    assert saving_threads() == []


def test_damage_that_a_save_finds_is_told_before_it_ends_the_run(tmp_path):
    damage = DamagedStateError("the state is not finite")
    checkpointing = saving_on(FullFilesystem(6, damage), tmp_path, on_error="continue")
    trainer = make_trainer(checkpointing)
    wait_for_background(trainer, checkpointing, 6)
    told = []
    trainer.add_event_handler(
        TrainingEvents.FLLM_STATE_DAMAGED, lambda engine: told.append(engine.state.iteration)
    )
    with pytest.raises(DamagedStateError, match="not finite"):
        trainer.train()
    assert told == [7]


def test_a_rollback_waits_for_the_save_under_way(tmp_path):
    filesystem = HeldFilesystem(6)
    trainer = make_trainer(saving_on(filesystem, tmp_path))
    went_to: list[int] = []

    def break_down(engine: Trainer) -> None:
        if went_to:
            return
        assert filesystem.reached.wait(20)
        threading.Timer(0.3, filesystem.gate.set).start()
        engine.roll_back("a test")

    trainer.add_event_handler(Events.ITERATION_STARTED(once=8), break_down)
    trainer.add_event_handler(
        TrainingEvents.FLLM_ROLLED_BACK, lambda engine: went_to.append(engine.state.iteration)
    )
    trainer.train()
    assert went_to == [6]
    assert trainer.state.iteration == 12


@pytest.mark.parametrize("fails", [False, True])
def test_a_save_counts_from_when_it_was_asked_for_until_it_has_failed(tmp_path, fails):
    """However fast the disk is, the same question has the same answer at the same step."""
    filesystem = HeldFilesystem(6)
    checkpointing = saving_on(filesystem, tmp_path, on_error="continue")
    trainer = make_trainer(checkpointing)
    answers = {}

    def open_the_gate() -> None:
        filesystem.fails = fails
        filesystem.gate.set()
        checkpointing._background.join()

    trainer.add_event_handler(Events.ITERATION_STARTED(once=9), open_the_gate)
    trainer.add_event_handler(
        TrainingEvents.FLLM_METRICS_READY,
        lambda engine: answers.update({engine.state.iteration: engine.restore_step()}),
    )
    trainer.train()
    assert {step: answers[step] for step in (6, 7, 8, 9, 10)} == {
        **{6: 3, 7: 6, 8: 6, 9: 3 if fails else 6, 10: 9}
    }
