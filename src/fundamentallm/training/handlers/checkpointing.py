"""Checkpoints: the newest few, the best, and the way back to them."""

from __future__ import annotations

import functools
import logging
import math
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from ignite.engine import Events
from ignite.handlers import Checkpoint
from ignite.handlers.checkpoint import BaseSaveHandler
from torch import Tensor

from fundamentallm.errors import CheckpointError
from fundamentallm.events import TrainingEvents
from fundamentallm.files.run_layout import BEST, CORRUPT, LAST, SUPERSEDED
from fundamentallm.training import snapshot
from fundamentallm.training.finite import DamagedStateError, bit_sum
from fundamentallm.training.handlers.base import HANDLERS
from fundamentallm.training.loop import TrainingLoop
from fundamentallm.training.manifest import Manifest
from fundamentallm.training.state_tree import Stateful, copied
from fundamentallm.training.store import CheckpointStore, step_name

logger = logging.getLogger(__name__)


FOR_A_STOP = "for_a_stop"  # in the metadata of a checkpoint that no schedule asked for


def negative_val_loss(trainer: TrainingLoop) -> float | None:
    """Score a checkpoint by its validation loss, if one was measured at this very step."""
    loss = trainer.state.metrics.get("val/loss")
    if loss is None or trainer.state.evaluated_step != trainer.state.iteration:
        return None
    return -float(loss)


class StoreSaver(BaseSaveHandler):
    """A `CheckpointStore` as Ignite's save handler."""

    def __init__(self, store: CheckpointStore) -> None:
        self.store = store

    def __call__(
        self,
        checkpoint: Mapping[str, Any],
        filename: str,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Commit a state under a step's name, durably."""
        step = int(filename.removeprefix("step-"))
        self.store.write(filename, checkpoint, metadata, step=step)

    def remove(self, filename: str) -> None:
        """Delete a checkpoint."""
        self.store.retire([filename])


class BackgroundSave:
    """One save, in this thread or in one of its own, and how it ended.

    Args:
        step: the step that is saved.
        best_before: best score and step that hold again if the save fails.

    Attributes:
        committed: whether the checkpoint is on the disk; what fails after that loses nothing.
    """

    def __init__(self, step: int, best_before: tuple[float, int | None]) -> None:
        self.step = step
        self.best_before = best_before
        self.committed = False
        self._failure: Exception | None = None
        self._thread: threading.Thread | None = None

    def run(self, work: Callable[[], None]) -> None:
        """Do the work and keep its error."""
        try:
            work()
        except Exception as error:  # raised again by whoever waits
            self._failure = error

    def fail(self, error: Exception) -> None:
        """End it before it has begun."""
        self._failure = error

    def start(self, work: Callable[[], None]) -> None:
        """Do the work in a thread."""
        self._thread = threading.Thread(target=self.run, args=(work,), name=f"save-{self.step}")
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether it is still being written."""
        return self._thread is not None and self._thread.is_alive()

    def join(self) -> None:
        """Wait for the end."""
        if self._thread is not None:
            self._thread.join()

    def wait(self) -> Exception | None:
        """Wait for the end; return the error, None if the checkpoint is committed."""
        self.join()
        return self._failure


@HANDLERS.register("checkpointing")
class Checkpointing(Checkpoint):
    """Controls: saves the whole state when a checkpoint is due; what a rollback goes back to.

    It is Ignite's `Checkpoint` with Ignite's vocabulary, over a store that never deletes before
    the new checkpoint is committed, never counts a score that is not finite, and holds no pickle
    (ignite#1117, #1008, #1986 tell what its own saver loses). `best` and `last` are pointer files
    beside the checkpoints; a checkpoint that any such file names is never deleted.

    Args:
        checkpoint_dir: the directory of the checkpoints.
        n_saved: how many of the newest are kept; the best is kept besides.
        score_function: maps the trainer to a score, higher is better, or None for none at this
            step. The validation loss, negated, if not given.
        score_name: what the score is called in the log.
        to_save: further objects with `state_dict` and `load_state_dict`, by name. The trainer,
            model, optimizer, loss scale, random numbers and attached handlers are always saved.
        asynchronous: hold the training for a copy of the state alone, and write the copy in a
            thread. The next save waits for it, and so does the end of the run; the last save is
            always written before training ends.
        on_error: "stop" ends the run where a save fails, "continue" says so and trains on. Earlier
            checkpoints stay whole either way.
    """

    def __init__(
        self,
        checkpoint_dir: Path,
        n_saved: int = 3,
        score_function: Callable[[TrainingLoop], float | None] | None = None,
        score_name: str = "validation loss",
        to_save: Mapping[str, Stateful] | None = None,
        asynchronous: bool = False,
        on_error: Literal["stop", "continue"] = "stop",
    ) -> None:
        if n_saved < 2:
            raise ValueError(
                f"n_saved must be at least 2, got {n_saved}: with one checkpoint, a damaged file"
                " is a lost run"
            )
        self.store = CheckpointStore(checkpoint_dir)
        super().__init__(
            to_save=dict(to_save or {}),
            save_handler=StoreSaver(self.store),
            n_saved=n_saved,
        )
        self.score = score_function or negative_val_loss
        self.score_name = score_name
        self.asynchronous = asynchronous
        self.on_error = on_error
        self.best_score = -math.inf
        self.best_step: int | None = None
        self._is_ours = False
        self._background: BackgroundSave | None = None
        self._buffers: dict[str, Tensor] = {}

    @property
    def directory(self) -> Path:
        """The directory of the checkpoints."""
        return self.store.directory

    def attach(self, trainer: TrainingLoop) -> None:
        """Save at FLLM_CHECKPOINT_DUE; offer the trainer the way back."""
        trainer.restore_point = self
        trainer.add_event_handler(TrainingEvents.FLLM_CHECKPOINT_DUE, self)
        if self.asynchronous:
            trainer.add_event_handler(Events.ITERATION_COMPLETED, self._look_at_background)
            trainer.add_event_handler(TrainingEvents.FLLM_RUN_ENDED, self._wait_at_the_end)

    def __call__(self, trainer: TrainingLoop) -> None:  # type: ignore[override]
        """Save the state of the current step on the rank that writes, then prune.

        Raises:
            CheckpointError: the save failed, on any rank, and `on_error` is "stop"; earlier
                checkpoints are whole.
        """
        self._take_over(trainer)
        self._finish_background(trainer)
        step = trainer.state.iteration
        before = self.best_score, self.best_step
        score = self.score(trainer)
        if score is not None and math.isfinite(score) and score > self.best_score:
            self.best_score, self.best_step = score, step
        state = snapshot.capture(trainer)
        state["objects"] = {name: thing.state_dict() for name, thing in self.to_save.items()}
        save = self._background = BackgroundSave(step, before)
        if (damage := self._damage_somewhere(trainer, state)) is not None:
            save.fail(damage)
            self._finish_background(trainer)
            return
        beside = self.asynchronous and not trainer.stopping
        if trainer.ranks.is_writer:
            if beside:
                state = copied(state, self._buffers)
            work = functools.partial(self._save, save, state, self._metadata(trainer))
            if beside:
                save.start(work)
            else:
                save.run(work)
        if not beside:
            self._finish_background(trainer)

    def _damage_somewhere(
        self, trainer: TrainingLoop, state: Mapping[str, Any]
    ) -> DamagedStateError | None:
        """Let every rank look at its own state before one of them writes; all get an error or none.

        A moment that is infinite on one rank alone holds that rank's weight where it is, and the
        ranks part without a sign of it in the loss.
        """
        ranks, found = trainer.ranks, None
        if ranks.alone:  # what is written is looked at, in the thread that writes it
            return None
        where = f"step {trainer.state.iteration}, rank {ranks.rank}"
        try:
            snapshot.check_usable(state, where)
        except DamagedStateError as error:
            found = error
        if ranks.any(found is not None):
            return found or DamagedStateError("the state of another rank is not finite")
        if ranks.all_equal(bit_sum(trainer.model.parameters())):
            return None
        return DamagedStateError(
            "the ranks no longer have the same weights",
            where=where,
            fix="use an earlier checkpoint; if it comes again, look for a machine that miscounts",
        )

    def _metadata(self, trainer: TrainingLoop) -> dict[str, Any]:
        measured_now = trainer.state.evaluated_step == trainer.state.iteration
        val_loss = trainer.state.metrics.get("val/loss", math.nan) if measured_now else math.nan
        return {
            "run_id": trainer.run_id,
            "finished": trainer.finished,
            "val_loss": val_loss if math.isfinite(val_loss) else None,
            FOR_A_STOP: trainer.saving_for_a_stop,
            **trainer.description,
        }

    def _save(self, save: BackgroundSave, state: dict[str, Any], metadata: dict[str, Any]) -> None:
        step, name = save.step, step_name(save.step)
        snapshot.check_usable(state, f"step {step}")
        self.save_handler(state, name, metadata)
        save.committed = True
        self._point_at(step)
        if self.best_step == step:
            logger.info("step %d: saved, the best %s so far", step, self.score_name)
        else:
            logger.debug("step %d: saved", step)
        assert self.n_saved is not None
        self.store.prune(self.n_saved, self._best_name(), self._for_stops())

    def _best_name(self) -> set[str]:
        return {step_name(self.best_step)} if self.best_step is not None else set()

    def _for_stops(self) -> set[str]:
        """Return the checkpoints that only a stop asked for."""
        found = set()
        for name in self.store.step_names():
            with suppress(CheckpointError):
                if self.store.manifest(self.store.directory / name).metadata.get(FOR_A_STOP):
                    found.add(name)
        return found

    def _point_at(self, step: int) -> None:
        """Let the pointers say what this object knows, whatever a crash has left them saying."""
        self.store.point(LAST, step_name(step))
        if self.best_step is None:
            self.store.forget(BEST)
        elif self.store.pointed(BEST) != step_name(self.best_step):
            self.store.point(BEST, step_name(self.best_step))

    # ------------------------------------------------------------------ in the background

    def _look_at_background(self, trainer: TrainingLoop) -> None:
        # Ranks speak of it together, at the next save: one that raised here would strand the rest.
        if self._background is not None and trainer.ranks.alone and not self._background.is_alive:
            self._finish_background(trainer)

    def _finish_background(self, trainer: TrainingLoop) -> None:
        """Wait for the save under way, and tell how it ended."""
        if self._background is None:
            return
        save, self._background = self._background, None
        failure = save.wait()
        lost, trouble, damaged = trainer.ranks.sum_counts(
            [
                failure is not None and not save.committed,
                failure is not None,
                isinstance(failure, DamagedStateError),
            ]
        )
        if trouble:
            if lost:
                self.best_score, self.best_step = save.best_before
            if damaged:
                trainer.notify(TrainingEvents.FLLM_STATE_DAMAGED)
                if trainer.rolling_back:
                    return
            error = failure or CheckpointError("the first rank could not save the checkpoint")
            if self.on_error == "stop" or damaged or not isinstance(error, CheckpointError):
                raise error  # "continue" is for a disk that fails, not for a bug or a NaN
            what = "not saved" if lost else "saved, but not tidied up"
            logger.warning("step %d: %s, training goes on: %s", save.step, what, error)
            if lost:
                return
        trainer.state.last_checkpoint = self.store.directory / step_name(save.step)
        trainer.notify(TrainingEvents.FLLM_CHECKPOINT_SAVED)

    def _wait_at_the_end(self) -> None:
        """A run that ended in an exception must not leave a thread that writes."""
        if self._background is not None and (failure := self._background.wait()) is not None:
            logger.error("step %d: not saved: %s", self._background.step, failure)

    # ------------------------------------------------------------------ whose directory it is

    def _take_over(self, trainer: TrainingLoop) -> None:
        """Before the first save: never mix two runs in one directory, and clean up after a crash.

        Raises:
            CheckpointError: it holds another run's checkpoints.
        """
        if self._is_ours:
            return
        newest = self.newest()
        if newest is not None and newest.metadata.get("run_id") != trainer.run_id:
            raise CheckpointError(
                "the checkpoints here belong to another run",
                where=str(self.store.directory),
                fix="choose another checkpoint directory, or continue that run with"
                " trainer.resume(path)",
            )
        if trainer.ranks.is_writer and self.store.directory.exists():
            self.store.recover()  # what a killed process left half done
            for fault in self.store.quarantine(snapshot.check_usable):
                logger.warning("moved to %s: %s", self.store.directory / CORRUPT, fault)
        trainer.ranks.barrier()
        self._is_ours = True

    @property
    def last_checkpoint(self) -> Path | None:
        """The path of the newest checkpoint, None before the first."""
        newest = self.newest()
        return self.store.directory / newest.name if newest is not None else None

    # ------------------------------------------------------------------ the way back

    def newest(self) -> Manifest | None:
        """Return the manifest of the newest checkpoint that training can go on from."""
        return self.store.newest(snapshot.check_usable)

    def step_to_restore(self, before: int | None = None) -> int | None:
        """Return the step of the newest checkpoint that is at most `before`, else of the oldest."""
        found = self._to_restore(before)
        return found.step if found is not None else None

    def restore_before(self, trainer: TrainingLoop, before: int | None = None) -> None:
        """Load that checkpoint into the trainer."""
        self._finish_background(trainer)
        found = self._to_restore(before)
        assert found is not None
        self.restore(trainer, self.store.directory / found.name)

    def weights_before(self, before: int | None = None) -> Mapping[str, Tensor] | None:
        """Return the model's state in the newest checkpoint that is at most `before`, or None."""
        found = self._to_restore(before)
        if found is None or (before is not None and found.step > before):
            return None
        model: Mapping[str, Tensor] = self.store.read(self.store.directory / found.name)["model"]
        return model

    def _to_restore(self, before: int | None) -> Manifest | None:
        if self._background is not None:
            self._background.join()
        # A run that was stopped on its way must go back to where one that never was would go: not
        # to what a stop alone has left, nor to what a kill has kept from being pruned.
        best, num_scheduled = self._best_name(), 0
        oldest = only_for_a_stop = None
        assert self.n_saved is not None
        for manifest in self.store.usable(snapshot.check_usable):
            if manifest.metadata.get(FOR_A_STOP):
                only_for_a_stop = only_for_a_stop or manifest
                continue
            num_scheduled += 1
            if num_scheduled > self.n_saved and manifest.name not in best:
                continue
            oldest = manifest
            if before is None or manifest.step <= before:
                break
        return oldest or only_for_a_stop

    def restore(self, trainer: TrainingLoop, path: Path) -> None:
        """Load a checkpoint into the trainer; later ones of its run are set aside.

        Raises:
            CheckpointError: it is damaged or of another run; nothing was changed.
        """
        state = self.store.read(path)
        snapshot.restore(trainer, state)
        for name, thing in self.to_save.items():
            thing.load_state_dict(state["objects"][name])
        trainer.state.last_checkpoint = path
        if path.parent.resolve() == self.store.directory.resolve():
            self._is_ours = False  # not before it was looked over once more
            self._take_over(trainer)
            self._leave_later_ones(trainer)

    def _leave_later_ones(self, trainer: TrainingLoop) -> None:
        """Make the restored state the newest, and the best what is best among those left."""
        step = trainer.state.iteration
        if self.best_step is not None and not self.store.holds(step_name(self.best_step)):
            self.best_score, self.best_step = -math.inf, None
        if trainer.ranks.is_writer:
            superseded = self.store.supersede(step)
            self._point_at(step)
            if superseded:
                logger.info(
                    "going on from step %d: moved %s to %s",
                    step,
                    ", ".join(superseded),
                    self.store.directory / SUPERSEDED,
                )
        trainer.ranks.barrier()

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """Return the best score and its step."""
        return {"best_score": self.best_score, "best_step": self.best_step}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on comparing with a saved best score."""
        self.best_score = state_dict["best_score"]
        self.best_step = state_dict["best_step"]
