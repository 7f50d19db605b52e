"""Checkpoints: the newest few, the best, and the way back to them."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ignite.handlers import Checkpoint
from ignite.handlers.checkpoint import BaseSaveHandler

from fundamentallm.errors import CheckpointError
from fundamentallm.events import TrainingEvents
from fundamentallm.training import snapshot
from fundamentallm.training.handlers.base import HANDLERS
from fundamentallm.training.store import SUPERSEDED, CheckpointStore, step_name

if TYPE_CHECKING:
    from fundamentallm.training.trainer import Trainer

logger = logging.getLogger(__name__)


def negative_val_loss(trainer: Trainer) -> float | None:
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


@HANDLERS.register("checkpointing")
class Checkpointing(Checkpoint):
    """Controls: saves the whole state when a checkpoint is due; what a rollback goes back to.

    It is Ignite's `Checkpoint` with Ignite's vocabulary, over a store that never deletes before
    the new checkpoint is committed, never counts a score that is not finite, and holds no pickle
    (ignite#1117, #1008, #1986 tell what its own saver loses). `best` and `last` are pointer files
    beside the checkpoints.

    Args:
        checkpoint_dir: the directory of the checkpoints.
        n_saved: how many of the newest are kept; the best is kept besides.
        score_function: maps the trainer to a score, higher is better, or None for none at this
            step. The validation loss, negated, if not given.
        score_name: what the score is called in the log.
        to_save: further objects with `state_dict` and `load_state_dict`, by name. The trainer,
            model, optimizer, loss scale, random numbers and attached handlers are always saved.
    """

    def __init__(
        self,
        checkpoint_dir: Path,
        n_saved: int = 3,
        score_function: Callable[[Trainer], float | None] | None = None,
        score_name: str = "validation loss",
        to_save: Mapping[str, Any] | None = None,
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
        self.best_score = -math.inf
        self.best_step: int | None = None
        self._is_ours = False

    def attach(self, trainer: Trainer) -> None:
        """Save at FLLM_CHECKPOINT_DUE; offer the trainer the way back."""
        trainer.restore_point = self
        trainer.add_event_handler(TrainingEvents.FLLM_CHECKPOINT_DUE, self)

    def __call__(self, trainer: Trainer) -> None:  # type: ignore[override]
        """Save the state of the current step on the rank that writes, then prune.

        Raises:
            CheckpointError: the save failed, on any rank; earlier checkpoints are whole.
        """
        self._refuse_foreign(trainer)
        step = trainer.state.iteration
        score = self.score(trainer)
        best = score is not None and math.isfinite(score) and score > self.best_score
        if best:
            assert score is not None
            self.best_score, self.best_step = score, step
        state = snapshot.capture(trainer)
        state["objects"] = {name: thing.state_dict() for name, thing in self.to_save.items()}
        failure: CheckpointError | None = None
        if trainer.ranks.is_writer:
            try:
                self._save(trainer, state, step, best)
            except CheckpointError as error:
                failure = error
        if trainer.ranks.any(failure is not None):
            raise failure or CheckpointError("the first rank could not save the checkpoint")
        trainer.state.last_checkpoint = self.store.directory / step_name(step)
        trainer.notify(TrainingEvents.FLLM_CHECKPOINT_SAVED)

    def _save(self, trainer: Trainer, state: dict[str, Any], step: int, best: bool) -> None:
        name = step_name(step)
        measured_now = trainer.state.evaluated_step == step
        val_loss = trainer.state.metrics.get("val/loss", math.nan) if measured_now else math.nan
        metadata = {
            "run_id": trainer.run_id,
            "finished": trainer.finished,
            "val_loss": val_loss if math.isfinite(val_loss) else None,
            **trainer.description,
        }
        self.save_handler(state, name, metadata)
        self.store.point("last", name)
        if best:
            self.store.point("best", name)
            logger.info("step %d: saved, the best %s so far", step, self.score_name)
        else:
            logger.debug("step %d: saved", step)
        keep = {step_name(self.best_step)} if self.best_step is not None else set()
        assert self.n_saved is not None
        self.store.prune(self.n_saved, keep)

    def _refuse_foreign(self, trainer: Trainer) -> None:
        """Before the first save: never mix two runs in one directory."""
        if self._is_ours:
            return
        newest = self.store.newest()
        if newest is not None and newest.metadata.get("run_id") != trainer.run_id:
            raise CheckpointError(
                "the checkpoints here belong to another run",
                where=str(self.store.directory),
                fix="choose another checkpoint directory, or continue that run with"
                " trainer.resume(path)",
            )
        if trainer.ranks.is_writer:
            self.store.recover()  # what a killed process left half done
        self._is_ours = True

    @property
    def last_checkpoint(self) -> Path | None:
        """The path of the newest checkpoint, None before the first."""
        newest = self.store.newest()
        return self.store.directory / newest.name if newest is not None else None

    # ------------------------------------------------------------------ the way back

    def newest_step(self) -> int | None:
        """Return the step of the newest whole checkpoint."""
        newest = self.store.newest()
        return newest.step if newest is not None else None

    def restore_newest(self, trainer: Trainer) -> None:
        """Load the newest whole checkpoint into the trainer."""
        path = self.last_checkpoint
        assert path is not None
        self.restore(trainer, path)

    def restore(self, trainer: Trainer, path: Path) -> None:
        """Load a checkpoint into the trainer; later ones of its run are set aside.

        Raises:
            CheckpointError: it is damaged or of another run; nothing was changed.
        """
        state = self.store.read(path)
        snapshot.restore(trainer, state)
        for name, thing in self.to_save.items():
            thing.load_state_dict(state["objects"][name])
        if path.parent.resolve() == self.store.directory.resolve():
            self._leave_later_ones(trainer)

    def _leave_later_ones(self, trainer: Trainer) -> None:
        """Make the restored state the newest, and the best what is best among those left."""
        step = trainer.state.iteration
        if self.best_step is not None and not self.store.holds(step_name(self.best_step)):
            self.best_score, self.best_step = -math.inf, None
        if trainer.ranks.is_writer:
            superseded = self.store.supersede(step)
            if superseded:
                self.store.point("last", step_name(step))
                if self.best_step is not None:
                    self.store.point("best", step_name(self.best_step))
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
