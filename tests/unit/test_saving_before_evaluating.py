"""An evaluation that fails, runs out of memory or is killed costs no step and changes no bit."""

from __future__ import annotations

import errno
import logging
import math
import os
import random
import signal
import sys
import threading
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Events
from tests import forked

from fundamentallm.config.training import TrainingConfig
from fundamentallm.data.loaders import Batching, ValidationLoader
from fundamentallm.data.tokenizer import CharacterTokenizer
from fundamentallm.errors import CheckpointError, MachineError
from fundamentallm.events import TrainingEvents
from fundamentallm.files.filesystem import Filesystem
from fundamentallm.testing import tiny_loaders, tiny_model, tiny_tokens
from fundamentallm.training.checkpoint import snapshot
from fundamentallm.training.checkpoint.catalogue import Survey
from fundamentallm.training.checkpoint.scores import Score, Scores
from fundamentallm.training.checkpoint.store import CheckpointStore
from fundamentallm.training.handlers import (
    Checkpointing,
    EarlyStopping,
    Evaluation,
    LossEMA,
    MetricsLog,
    Samples,
    WeightEMA,
)
from fundamentallm.training.trainer import Trainer

BATCHES = 3  # of a validation
STEPS, EVERY = 10, 3  # evaluated after 3, 6, 9 and 10
AFTER = (3, 6, 9, 10)


class Killed(BaseException):
    """Nothing of the program acts on it."""


class Batches:
    """Validation batches; in place of the n-th of the run, from 0, something happens."""

    def __init__(self, at: int | None, happens: Any = None) -> None:
        self.loader = ValidationLoader(tiny_tokens()[320:], Batching(8, 4))
        assert len(self.loader) == BATCHES
        self.at, self.happens, self.number = at, happens, 0

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            if self.number == self.at:
                self.happens()
            self.number += 1
            yield batch


def raising(error: BaseException) -> Any:
    def happens() -> None:
        raise error

    return happens


def make_trainer(
    place: Path, batches: Batches | None = None, patience: int = 2, **options: Any
) -> Trainer:
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    place.mkdir(exist_ok=True)
    checkpointing = options.pop("checkpointing", None) or Checkpointing(place / "checkpoints", 2)
    fields = {"total_steps": STEPS, "eval_steps": EVERY, "learning_rate": 0.3, "log_steps": 1}
    trainer = Trainer(
        tiny_model(dropout=0.1),
        tiny_loaders()[0],
        batches or Batches(None),
        device="cpu",
        config=TrainingConfig(**{**fields, "eval_epochs": False, **options}),
        handlers=(
            EarlyStopping(patience),
            MetricsLog(place),
            Samples(CharacterTokenizer("\nabcdefghij"), place, num_tokens=5),
            checkpointing,
            LossEMA(),
            WeightEMA(0.9),
            Evaluation(),
        ),
    )
    # So that two runs may be equal to the last bit.
    trainer.run_id, trainer.budget.clock = "0" * 32, lambda: 0.0
    trainer.attach_defaults()
    return trainer


def go_on(place: Path, **options: Any) -> Trainer:
    """Do what `run` does: go on from the newest checkpoint."""
    store = CheckpointStore(place / "checkpoints")
    survey = Survey(store, snapshot.check_usable)
    newest = survey.newest()
    assert newest is not None
    assert Scores(store.directory).end_of(newest) == ""
    trainer = make_trainer(place, **options)
    trainer.resume(store.directory / newest.name, survey)
    return trainer


def outcome(place: Path, trainer: Trainer) -> dict[str, Any]:
    """Everything that a run leaves, bit by bit."""
    checkpoints = place / "checkpoints"
    files = [place / "metrics.jsonl", place / "samples.jsonl"]
    files += [path for path in checkpoints.rglob("*") if path.is_file()]
    state = snapshot.capture(trainer)
    return {
        "files": {str(path.relative_to(place)): path.read_bytes() for path in files},
        "trainer": state["trainer"],
        "handlers": {
            name: handler
            for name, handler in state["handlers"].items()
            if name not in ("weight_ema",)
        },
        "weights": [p.tolist() for p in trainer.model.parameters()],
        "finished": trainer.finished,
    }


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for part in expected:
        assert found[part] == expected[part], part


@pytest.fixture(scope="module", params=["to the end", "stopped early"])
def quiet(request, tmp_path_factory) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of a run, and what it leaves undisturbed."""
    options: dict[str, Any] = {"patience": 9 if request.param == "to the end" else 1}
    if request.param == "stopped early":
        options["learning_rate"] = 3.0  # each loss is higher than the one before
    place = tmp_path_factory.mktemp("quiet") / "run"
    trainer = make_trainer(place, **options)
    trainer.run()
    ended = trainer.state.iteration
    assert ended == (STEPS if options["patience"] == 9 else 6)
    assert trainer.state.evaluations == AFTER.index(ended) + 1
    return options, outcome(place, trainer)


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (RuntimeError("broken"), RuntimeError),
        pytest.param(MemoryError(), MachineError, marks=pytest.mark.long),
        pytest.param(Killed(), Killed, marks=pytest.mark.long),
    ],
)
@pytest.mark.parametrize("at", range(BATCHES * len(AFTER)))
def test_a_failing_evaluation_costs_no_step(tmp_path, quiet, error, raised, at):
    options, expected = quiet
    trainer = make_trainer(tmp_path / "run", Batches(at, raising(error)), **options)
    try:
        trainer.run()
    except raised:
        pass
    else:
        pytest.skip("the run is over before that batch")
    broke_at = AFTER[at // BATCHES]
    assert trainer.state.iteration == broke_at
    again = go_on(tmp_path / "run", **options)
    assert again.state.iteration == broke_at
    assert again.evaluation_pending()
    again.run()
    assert_same(outcome(tmp_path / "run", again), expected)


def run_and_be_killed(place: Path, at: int, patience: int, learning_rate: float) -> None:
    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    batches = Batches(at, kill)
    make_trainer(place, batches, patience=patience, learning_rate=learning_rate).run()


@pytest.mark.parametrize(
    "at",
    [
        4,
        pytest.param(11, marks=pytest.mark.long),
        *(pytest.param(at, marks=pytest.mark.long) for at in (0, 1, 2, 3, 5, 6, 7, 8, 9, 10)),
    ],
)
def test_a_process_that_is_killed_in_an_evaluation_loses_no_step(tmp_path, quiet, at):
    options, expected = quiet
    place = tmp_path / "run"
    rate = options.get("learning_rate", 0.3)
    words = [str(place), str(at), str(options["patience"]), str(rate)]
    process = forked.run(words, tmp_path, program=__file__)
    if process.returncode == 0:
        pytest.skip("the run is over before that batch")
    assert process.returncode == -signal.SIGKILL
    again = go_on(place, **options)
    assert again.state.iteration == AFTER[at // BATCHES]
    again.run()
    assert_same(outcome(place, again), expected)


def test_the_committed_directory_is_never_changed(tmp_path):
    trainer = make_trainer(tmp_path / "run", patience=9)
    directory = tmp_path / "run" / "checkpoints"
    before: dict[Path, bytes] = {}

    @trainer.on(TrainingEvents.FLLM_EVALUATION_STARTED)
    def look() -> None:
        path = directory / f"step-{trainer.state.iteration:08d}"
        before.update({file: file.read_bytes() for file in path.iterdir()})

    trainer.run()
    assert len(before) == 4 * len(AFTER)
    kept = {file: data for file, data in before.items() if file.exists()}
    assert len(kept) >= 8
    assert all(file.read_bytes() == data for file, data in kept.items())


def test_scores_say_what_was_measured_and_what_ended_the_run(tmp_path):
    trainer = make_trainer(tmp_path / "run", patience=1, learning_rate=3.0)
    trainer.run()
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    scores = Scores(store.directory)
    first, second = scores.all()
    assert [first.step, second.step] == [3, 6]
    assert [first.val_loss, second.val_loss] == trainer.history.val_loss
    assert first.perplexity == pytest.approx(math.exp(trainer.history.val_loss[0]))
    assert first.finished == ""
    assert second.finished == trainer.finished
    assert trainer.finished.startswith("no lower validation loss")
    for score in (first, second):
        manifest = store.manifest(store.directory / f"step-{score.step:08d}")
        assert manifest.hash == score.manifest
        assert manifest.metadata["finished"] == ""
        assert scores.of(manifest) == score
        assert scores.val_loss(manifest) == score.val_loss
        assert scores.end_of(manifest) == score.finished
    assert (store.directory / "best").read_text() == "step-00000003\n"


def test_the_last_evaluation_decides_whether_a_run_is_finished(tmp_path):
    place = tmp_path / "run"
    last = BATCHES * len(AFTER) - 1
    with pytest.raises(MachineError, match="out of memory"):
        make_trainer(place, Batches(last, raising(MemoryError())), patience=9).run()
    store = CheckpointStore(place / "checkpoints")
    manifest = store.manifest(store.directory / "step-00000010")
    assert manifest.metadata["finished"] == "the last step is done"
    assert Scores(store.directory).end_of(manifest) == ""
    again = go_on(place, patience=9)
    again.run()
    assert again.finished == "the last step is done"
    assert again.state.iteration == STEPS
    assert Scores(store.directory).end_of(manifest) == "the last step is done"


def test_a_pause_that_is_due_once_the_owed_evaluation_is_made_leaves_one_step(tmp_path):
    with pytest.raises(Killed):
        make_trainer(tmp_path / "run", Batches(1, raising(Killed()))).run()
    again = go_on(tmp_path / "run", stop_after_seconds=5.0)
    again.budget.clock = lambda: 9.0 if again.state.evaluated_step == 3 else 0.0
    again.run()
    assert (again.state.iteration, again.finished) == (4, "")


def test_a_run_that_stopped_early_goes_on_when_it_is_told_to(tmp_path):
    place = tmp_path / "run"
    make_trainer(place, patience=1, learning_rate=3.0).run()
    again = make_trainer(place, patience=1, learning_rate=3.0)
    again.resume(place / "checkpoints" / "step-00000006")
    steps = []
    again.add_event_handler(
        Events.ITERATION_STARTED, lambda engine: steps.append(engine.state.iteration)
    )
    again.run()
    assert steps[:3] == [7, 8, 9]  # to the next evaluation, whose loss may be lower
    assert again.state.evaluations > 2


def test_a_run_that_was_told_to_go_on_does_so_again_after_a_kill(tmp_path):
    place = tmp_path / "run"
    make_trainer(place, patience=1, learning_rate=3.0).run()
    killed = make_trainer(place, patience=1, learning_rate=3.0)
    killed.resume(place / "checkpoints" / "step-00000006")
    killed.add_event_handler(Events.ITERATION_STARTED(once=7), raising(Killed()))
    with pytest.raises(Killed):
        killed.run()
    store = CheckpointStore(place / "checkpoints")
    score = Scores(store.directory).of(store.manifest(store.directory / "step-00000006"))
    assert (score.went_on, score.finished) == (True, "")
    assert score.val_loss == Scores(store.directory).val_loss(
        store.manifest(store.directory / "step-00000006")
    )
    again = go_on(place, patience=1, learning_rate=3.0)
    again.run()
    assert again.state.iteration > 6
    assert again.state.evaluations > 2


def test_a_run_without_validation_that_was_told_to_go_on_does_so_again(tmp_path):
    def make() -> Trainer:
        trainer = make_trainer(tmp_path / "run")
        trainer.val_loader = None
        return terminated(trainer, 4)

    make().run()
    path = tmp_path / "run" / "checkpoints" / "step-00000004"
    store = CheckpointStore(path.parent)
    assert Scores(path.parent).end_of(store.manifest(path)).startswith("stopped by")
    killed = make()
    killed.resume(path)
    killed.add_event_handler(Events.ITERATION_STARTED(once=5), raising(Killed()))
    with pytest.raises(Killed):
        killed.run()
    assert Scores(path.parent).end_of(store.manifest(path)) == ""
    assert Scores(path.parent).has_ended_at(store.manifest(path))


def contents(directory: Path) -> dict[str, tuple[int, bytes]]:
    """The files of a checkpoint, and which ones they are: a file written again is another one."""
    return {p.name: (p.stat().st_ino, p.read_bytes()) for p in directory.iterdir()}


def test_a_wish_to_finish_after_a_save_leaves_the_checkpoint_as_it_is(tmp_path):
    def make(place: Path, batches: Batches | None = None) -> Trainer:
        trainer = make_trainer(place, batches, patience=9, checkpoint_steps=2, eval_steps=9)

        @trainer.on(TrainingEvents.FLLM_CHECKPOINT_SAVED)
        def end(engine: Trainer) -> None:
            if engine.state.iteration == 4:
                seen.setdefault(place.name, contents(engine.state.last_checkpoint))
                engine.terminate()

        return trainer

    seen: dict[str, dict[str, tuple[int, bytes]]] = {}
    whole = make(tmp_path / "whole")
    whole.run()
    path = tmp_path / "whole" / "checkpoints" / "step-00000004"
    assert contents(path) == seen["whole"]
    (score,) = Scores(path.parent).all()
    assert (score.step, score.measured, score.due) == (4, True, "")
    assert score.finished == whole.finished != ""
    assert whole.history.val_loss == [score.val_loss]
    assert (path.parent / "best").read_text() == "step-00000004\n"
    # The wish is on the disk before the evaluation, so a kill there does not lose it.
    with pytest.raises(Killed):
        make(tmp_path / "run", Batches(1, raising(Killed()))).run()
    (score,) = Scores(tmp_path / "run" / "checkpoints").all()
    assert (score.measured, score.due, score.finished) == (False, whole.finished, "")
    again = go_on(tmp_path / "run", patience=9, checkpoint_steps=2, eval_steps=9)
    again.run()
    assert again.finished == whole.finished
    assert_same(
        {**outcome(tmp_path / "run", again), "files": None},
        {**outcome(tmp_path / "whole", whole), "files": None},
    )
    assert contents(tmp_path / "run" / "checkpoints" / "step-00000004") == seen["run"]


def test_a_state_that_a_handler_changed_after_its_save_is_written_again(tmp_path):
    trainer = make_trainer(tmp_path / "run", patience=9, checkpoint_steps=2, eval_steps=9)

    @trainer.on(TrainingEvents.FLLM_CHECKPOINT_SAVED)
    def end(engine: Trainer) -> None:
        if engine.state.iteration == 4 and not engine.finished:
            engine.attached["early_stopping"].waited = 7
            engine.terminate()

    trainer.run()
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    state = store.read(store.directory / "step-00000004")
    assert state["handlers"]["early_stopping"]["waited"] == 7


@pytest.mark.parametrize("at", [4, 9], ids=["a last step", "one that ends it early"])
def test_a_state_that_was_saved_for_a_stop_is_what_the_run_ends_with(tmp_path, at):
    options: dict[str, Any] = {"checkpoint_steps": 5, "eval_steps": 3, "patience": 9}
    if at == 4:
        options["total_steps"] = 4  # neither saved nor evaluated by the cadence
    else:
        options |= {"patience": 1, "learning_rate": 3.0}  # ends after 6, between two saves
        at = 6
    quiet = make_trainer(tmp_path / "quiet", **options)
    quiet.run()
    assert quiet.state.iteration == at
    place = tmp_path / "run"
    # Cut off in the evaluation of that step, before the second of its batches.
    batches = Batches({4: BATCHES + 1, 6: BATCHES + 1}[at], lambda: stopped.interrupt_run(15))
    stopped = make_trainer(place, batches, **options)
    stopped.run()
    assert (stopped.state.iteration, stopped.finished) == (at, "")
    path = place / "checkpoints" / f"step-{at:08d}"
    before = contents(path)
    again = go_on(place, **options)
    again.run()
    assert contents(path) == before
    assert again.finished == quiet.finished != ""
    found, expected = outcome(place, again), outcome(tmp_path / "quiet", quiet)
    for part in ("trainer", "handlers", "weights"):
        assert found[part] == expected[part], part
    for part in ("metrics.jsonl", "samples.jsonl"):
        assert found["files"][part] == expected["files"][part]
    # Whoever continues from there counts and goes back as after a run that was never stopped.
    for where in (place, tmp_path / "quiet"):
        further = make_trainer(where, **{**options, "total_steps": 12})
        further.resume(where / "checkpoints" / f"step-{at:08d}")
        assert further.state.checkpoints == quiet.state.checkpoints
        assert further.restore_step() == at


def test_a_run_that_stopped_early_goes_on_elsewhere(tmp_path):
    make_trainer(tmp_path / "run", patience=1, learning_rate=3.0).run()
    again = make_trainer(tmp_path / "other", patience=1, learning_rate=3.0)
    again.resume(tmp_path / "run" / "checkpoints" / "step-00000006")
    again.run()
    assert again.state.iteration > 6
    best = (tmp_path / "other" / "checkpoints" / "best").read_text().strip()
    assert (tmp_path / "other" / "checkpoints" / best).is_dir()


def terminated(trainer: Trainer, step: int) -> Trainer:
    """Have a handler end the run after a step that no evaluation is due after."""

    def end(engine: Trainer) -> None:
        if engine.state.iteration == step:
            engine.terminate()

    trainer.add_event_handler(Events.ITERATION_COMPLETED, end)
    return trainer


def test_a_failing_evaluation_does_not_lose_the_wish_of_a_handler_to_end_the_run(tmp_path):
    whole = terminated(make_trainer(tmp_path / "whole", patience=9), 4)
    whole.run()
    place = tmp_path / "run"
    failing = terminated(
        make_trainer(place, Batches(BATCHES + 1, raising(MemoryError())), patience=9), 4
    )
    with pytest.raises(MachineError, match="out of memory"):
        failing.run()
    again = terminated(go_on(place, patience=9), 4)
    again.run()
    assert again.finished == whole.finished != ""
    assert_same(outcome(place, again), outcome(tmp_path / "whole", whole))
    further = terminated(make_trainer(place, patience=9), 4)
    further.resume(place / "checkpoints" / "step-00000004")  # complete now: it is to go on
    further.run()
    assert further.state.iteration == STEPS


@pytest.mark.parametrize("write", [1, 2])
def test_a_run_is_complete_only_once_its_best_is_pointed_at(tmp_path, write, monkeypatch):
    place = tmp_path / "run"
    trainer = make_trainer(place, patience=9, learning_rate=1e-3)
    put, writes = Scores.put, []

    def killed_after(self: Scores, score: Score) -> None:
        put(self, score)
        writes.extend([score] * (score.step == STEPS))
        if len(writes) == write:
            raise Killed

    monkeypatch.setattr(Scores, "put", killed_after)
    with pytest.raises(Killed):
        trainer.run()
    monkeypatch.undo()
    store = CheckpointStore(place / "checkpoints")
    manifest = store.manifest(store.directory / "step-00000010")
    best = (store.directory / "best").read_text()
    complete = Scores(store.directory).end_of(manifest) != ""
    assert (complete, best) == [(False, "step-00000009\n"), (True, "step-00000010\n")][write - 1]
    if not complete:
        go_on(place, patience=9, learning_rate=1e-3).run()
        assert (store.directory / "best").read_text() == "step-00000010\n"
        assert Scores(store.directory).end_of(manifest) != ""


@pytest.mark.parametrize("to", [3, 6])
def test_a_rollback_to_a_state_before_its_evaluation_changes_nothing(tmp_path, to):
    quiet = make_trainer(tmp_path / "quiet", patience=9)
    quiet.run()
    trainer = make_trainer(tmp_path / "run", patience=9)
    gone: list[int] = []

    @trainer.on(Events.ITERATION_STARTED)
    def go_back() -> None:
        if trainer.state.iteration == 8 and not gone:
            gone.append(8)
            trainer.roll_back("a test", to)

    trainer.run()
    assert trainer.state.rollbacks == 1
    for part in ("metrics.jsonl", "samples.jsonl"):
        assert (tmp_path / "run" / part).read_bytes() == (tmp_path / "quiet" / part).read_bytes()
    found, expected = (snapshot.capture(each) for each in (trainer, quiet))
    found["trainer"]["rollbacks"] = 0
    assert found["trainer"] == expected["trainer"]
    for name in ("early_stopping", "checkpointing", "loss_ema", "samples"):
        assert found["handlers"][name] == expected["handlers"][name], name
    for key, weight in found["model"].items():
        assert torch.equal(weight, expected["model"][key])
    assert trainer.history == quiet.history
    lines = [Scores(tmp_path / name / "checkpoints").all() for name in ("run", "quiet")]
    assert [(s.step, s.val_loss) for s in lines[0]] == [(s.step, s.val_loss) for s in lines[1]]


def test_a_stop_behind_an_evaluation_between_two_saves_owes_only_the_sample(tmp_path):
    options = {"patience": 9, "checkpoint_steps": 5}
    quiet = make_trainer(tmp_path / "quiet", **options)
    quiet.run()
    trainer = make_trainer(tmp_path / "run", **options)
    # The handlers of make_trainer listen already: all but the sample is done, and that is cut off.
    trainer.history.record_validation, record = (
        lambda *given: (record(*given), trainer.interrupt_run(15))[0],
        trainer.history.record_validation,
    )
    trainer.run()
    assert trainer.state.iteration == 3
    again = go_on(tmp_path / "run", **options)
    assert not again.evaluation_pending()
    assert again.attached["samples"].owed == 3
    again.run()
    found = outcome(tmp_path / "run", again)
    expected = outcome(tmp_path / "quiet", quiet)
    for part in ("metrics.jsonl", "samples.jsonl"):
        assert found["files"][part] == expected["files"][part]
    assert found["trainer"] == expected["trainer"]
    assert found["handlers"] == expected["handlers"]
    assert found["weights"] == expected["weights"]


# ------------------------------------------------------------------ in the background


class Held(Filesystem):
    """Writes the checkpoint of step 6 when the gate is open, and fails if it is told to."""

    def __init__(self) -> None:
        self.gate, self.fails = threading.Event(), False

    def create(self, path: Path) -> FileIO:
        if "step-00000006" in str(path):
            assert self.gate.wait(20)
            if self.fails:
                raise OSError(errno.ENOSPC, "No space left on device")
        return super().create(path)


@pytest.mark.parametrize("fails", [False, True])
def test_an_evaluation_begins_when_the_save_before_it_has_ended(tmp_path, fails):
    checkpointing = Checkpointing(
        tmp_path / "run" / "checkpoints", 9, asynchronous=True, on_error="continue"
    )
    disk = checkpointing.store.filesystem = Held()
    disk.fails = fails
    trainer = make_trainer(tmp_path / "run", patience=9, checkpointing=checkpointing)
    scores = Scores(checkpointing.store.directory)
    seen = []

    @trainer.on(TrainingEvents.FLLM_EVALUATION_STARTED)
    def look() -> None:
        if trainer.state.iteration == 6:
            seen.append((checkpointing.store.directory / "step-00000006").is_dir())
            disk.gate.set()  # whoever began before would wait for ever

    threading.Timer(0.3, disk.gate.set).start()
    trainer.run()
    assert seen == [not fails]
    assert [score.step for score in scores.all()] == [s for s in AFTER if s != 6 or not fails]
    for score in scores.all():
        path = checkpointing.store.directory / f"step-{score.step:08d}"
        assert checkpointing.store.manifest(path).hash == score.manifest


def test_a_run_that_ends_early_waits_for_the_score_of_its_last_save(tmp_path):
    checkpointing = Checkpointing(tmp_path / "run" / "checkpoints", 9, asynchronous=True)
    disk = checkpointing.store.filesystem = Held()
    threading.Timer(1.0, disk.gate.set).start()
    trainer = make_trainer(
        tmp_path / "run", patience=1, learning_rate=3.0, checkpointing=checkpointing
    )
    trainer.run()
    assert [score.step for score in Scores(checkpointing.store.directory).all()] == [3, 6]
    assert trainer.finished == Scores(checkpointing.store.directory).all()[-1].finished != ""


def test_a_disk_that_refuses_a_score_stops_the_run_or_not(tmp_path, caplog):
    class Full(Filesystem):
        def create(self, path: Path) -> FileIO:
            if "scores" in path.name:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().create(path)

    for on_error in ("stop", "continue"):
        place = tmp_path / on_error
        checkpointing = Checkpointing(place / "checkpoints", on_error=on_error)
        checkpointing.store.filesystem = Full()
        trainer = make_trainer(place, patience=9, checkpointing=checkpointing)
        if on_error == "stop":
            with pytest.raises(CheckpointError, match="the disk is full"):
                trainer.run()
            assert trainer.state.iteration == 3
            assert not (place / "checkpoints" / "best").exists()
        else:
            with caplog.at_level(logging.WARNING):
                trainer.run()
            assert trainer.state.iteration == STEPS
            assert "its score is not written" in caplog.text


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_and_be_killed(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
