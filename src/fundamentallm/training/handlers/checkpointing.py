"""Checkpoints: saving, and keeping the newest and the best."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from ignite.engine import Events
from pydantic import Field
from torch import Tensor

from fundamentallm.errors import CheckpointError
from fundamentallm.events import TrainingEvents
from fundamentallm.training.checkpoint import snapshot
from fundamentallm.training.checkpoint.background_save import BackgroundSave
from fundamentallm.training.checkpoint.catalogue import Entry
from fundamentallm.training.checkpoint.finite import DamagedStateError
from fundamentallm.training.checkpoint.scores import (
    AWAITS_EVALUATION,
    FOR_A_STOP,
    Score,
    finite,
)
from fundamentallm.training.checkpoint.store import CheckpointStore, step_name
from fundamentallm.training.checkpoint.tree import Stateful, copied
from fundamentallm.training.handlers.base import HANDLERS
from fundamentallm.training.handlers.criterion import Criterion
from fundamentallm.training.handlers.restoring import Restoring
from fundamentallm.training.loop import TrainingLoop

logger = logging.getLogger(__name__)


@HANDLERS.register("checkpointing")
class Checkpointing(Restoring):
    """Controls: saves the whole state when a checkpoint is due; a rollback restores from it.

    It is Ignite's `Checkpoint` with Ignite's vocabulary, over a store that deletes only after the
    new checkpoint is committed, ignores scores that are not finite, and uses no pickle
    (ignite#1117, #1008, #1986 describe the losses of Ignite's own saver). `best` and `last` are
    pointer files beside the checkpoints; a checkpoint that such a file names is never deleted.

    A save counts on every rank from the step that asks for it; if it fails, all ranks remove it at
    the same step. So the step that a rollback returns to depends neither on the speed of a disk nor
    on the rank.

    Args:
        checkpoint_dir: the directory of the checkpoints.
        n_saved: how many of the newest are kept; the best is kept besides.
        score_function: maps the trainer to a score, higher is better, or None for none at this
            step. Of `metric` if not given.
        to_save: further objects with `state_dict` and `load_state_dict`, by name. The trainer,
            model, optimizer, loss scale, random numbers and attached handlers are always saved.
        asynchronous: stop training only to copy the state, and write the copy in a thread. The
            next save waits for it, and so does the end of the run. A save that an evaluation
            follows is written first, since the evaluation may fail: this option is of use for the
            saves in between (`training.checkpoint_steps`).
        on_error: "stop" ends the run when a save fails, "continue" warns and trains on. Earlier
            checkpoints are unchanged in both cases.
        metric: what makes a checkpoint the best, under its name in the log: `val/loss`, or
            `val/NAME` of a metric of `evaluation.metrics`.
        mode: "min" if a lower value is better, "max" if a higher one is. Needed for all but the
            loss, the perplexity and the bits per byte, of which lower is better.

    Attributes:
        catalogue: the checkpoints that training can continue from.
    """

    def __init__(
        self,
        checkpoint_dir: Path,
        n_saved: Annotated[int, Field(ge=2)] = 3,
        score_function: Callable[[TrainingLoop], float | None] | None = None,
        to_save: Mapping[str, Stateful] | None = None,
        asynchronous: bool = False,
        on_error: Literal["stop", "continue"] = "stop",
        metric: str = "val/loss",
        mode: Annotated[Literal["min", "max"] | None, Field(examples=["max"])] = None,
    ) -> None:
        if n_saved < 2:
            raise ValueError(
                f"n_saved must be at least 2, got {n_saved}: with one checkpoint, a damaged file"
                " is a lost run"
            )
        super().__init__(
            CheckpointStore(checkpoint_dir), n_saved, to_save or {}, Criterion.of(metric, mode)
        )
        self.score = score_function or self.criterion.score
        self.asynchronous = asynchronous
        self.on_error = on_error
        self._buffers: dict[str, Tensor] = {}

    def attach(self, trainer: TrainingLoop) -> None:
        """Save at FLLM_CHECKPOINT_DUE; become the trainer's restore point."""
        trainer.restore_from(self)
        self.criterion.attach(trainer)
        trainer.add_event_handler(TrainingEvents.FLLM_CHECKPOINT_DUE, self)
        if self.asynchronous:
            trainer.add_event_handler(Events.ITERATION_COMPLETED, self._look_at_background)
            trainer.add_event_handler(TrainingEvents.FLLM_RUN_ENDED, self._wait_at_the_end)

    def __call__(self, trainer: TrainingLoop) -> None:  # type: ignore[override]
        """Save the state of the current step on the rank that writes, then prune.

        A state that is on the disk already is not written again.

        Raises:
            CheckpointError: the save failed, on any rank, and `on_error` is "stop"; earlier
                checkpoints are unchanged.
        """
        self._take_over(trainer)
        self._finish_background(trainer)
        step = trainer.state.iteration
        before = self.best_score, self.best_step
        awaits_evaluation = trainer.evaluation_pending()
        if not awaits_evaluation:
            self._judge(trainer)
        state = snapshot.capture(trainer)
        state["objects"] = {name: thing.state_dict() for name, thing in self.to_save.items()}
        self._judged = None if awaits_evaluation else step
        known = self.catalogue.get(step)
        if known is not None and self._is_on_disk(trainer, known, state):
            if not trainer.saving_for_a_stop:
                self._note_end_due(trainer, known)
            return
        entry = Entry(
            step,
            "",
            trainer.run_id,
            trainer.saving_for_a_stop,
            awaits_evaluation,
            ended="" if awaits_evaluation else trainer.finished,
        )
        save = self._background = BackgroundSave(entry, known, before, self.best_step)
        self.catalogue = self.catalogue.including(entry)
        if (damage := snapshot.damage_on_any_rank(trainer, state)) is not None:
            save.fail(damage)
            self._finish_background(trainer)
            return
        # An evaluation may fail: what it would cost is on the disk before.
        beside = self.asynchronous and not (awaits_evaluation or trainer.stopping)
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

    def _is_on_disk(self, trainer: TrainingLoop, known: Entry, state: Mapping[str, Any]) -> bool:
        """Return whether a state, but for what each save changes in it, is that of a checkpoint."""
        if known.awaits_evaluation and trainer.state.evaluated_step == known.step:
            return True  # and its score has what the evaluation adds

        def compare() -> bool:
            try:
                saved = self.store.read(self.store.directory / known.name)
            except CheckpointError:
                return False
            return snapshot.are_equal(state, saved)

        return bool(trainer.ranks.first_decides(compare))

    def _note_end_due(self, trainer: TrainingLoop, known: Entry) -> None:
        """Note that the run is to end with a state that is on the disk."""
        pending = trainer.evaluation_pending()
        if pending:
            self._put(trainer, Score(known.step, known.hash, False, due=trainer.finished))
        entry = replace(
            known,
            for_a_stop=False,
            awaits_evaluation=pending or known.awaits_evaluation,
            uncounted=known.uncounted or known.for_a_stop,
        )
        self.catalogue = self.catalogue.including(entry)
        if known.for_a_stop:
            trainer.report_saved(self.store.directory / known.name)

    def _judge(self, trainer: TrainingLoop) -> None:
        """Compare the current step with the best so far."""
        score, self._judged = self.score(trainer), trainer.state.iteration
        if score is not None and math.isfinite(score) and score > self.best_score:
            self.best_score, self.best_step = score, self._judged

    def _metadata(self, trainer: TrainingLoop) -> dict[str, Any]:
        measured_now = trainer.state.evaluated_step == trainer.state.iteration
        val_loss = trainer.state.metrics.get("val/loss", math.nan) if measured_now else math.nan
        return {
            "run_id": trainer.run_id,
            "finished": trainer.finished,
            "val_loss": val_loss if math.isfinite(val_loss) else None,
            FOR_A_STOP: trainer.saving_for_a_stop,
            AWAITS_EVALUATION: trainer.evaluation_pending(),
            **trainer.description,
        }

    def _save(self, save: BackgroundSave, state: dict[str, Any], metadata: dict[str, Any]) -> None:
        step, passing = save.step, self.catalogue.names(for_a_stop=True)
        snapshot.check_usable(state, f"step {step}")
        self.store.write(save.name, state, metadata, step=step)
        save.committed = True
        self._point_at(step, save.best_step)
        if save.best_step == step:
            logger.info("step %d: saved, the best so far", step)
        else:
            logger.debug("step %d: saved", step)
        save.pruned = self._prune(save.best_step, passing)

    def _prune(self, best_step: int | None, passing: Collection[str]) -> Sequence[str]:
        assert self.n_saved is not None
        keep = set() if best_step is None else {step_name(best_step)}
        return self.store.prune(self.n_saved, keep, passing)

    # ------------------ after the evaluation

    def note_end_of_step(self, trainer: TrainingLoop) -> None:
        """Note the result of the evaluation of the saved step, and the end of the run.

        The score is written before the pointer to the best, so the best always has a score.

        Raises:
            CheckpointError: the disk refuses, and `on_error` is "stop".
        """
        if trainer.stopping:
            self._finish_background(trainer)
        step, state = trainer.state.iteration, trainer.state
        entry = self.catalogue.get(step)
        if entry is None or trainer.rolling_back:
            return
        measured = entry.awaits_evaluation and state.evaluated_step == step
        is_new = measured and self._judged != step
        went_on = self.has_ended_at(step) and not (trainer.finished or trainer.evaluation_pending())
        if is_new:
            self._judge(trainer)
        if is_new or went_on or trainer.finished not in ("", entry.ended):
            val_loss, perplexity = (
                finite(state.metrics[name]) if measured else None
                for name in ("val/loss", "val/perplexity")
            )
            score = Score(step, entry.hash, measured, val_loss, perplexity, trainer.finished)
            if measured and self.criterion != Criterion():
                value = finite(self.criterion.value(trainer))
                score = replace(score, metric=self.criterion.metric, value=value)
            self.catalogue = self.catalogue.including(replace(entry, ended=trainer.finished))
            self._put(trainer, replace(score, went_on=went_on))

    def _put(self, trainer: TrainingLoop, score: Score) -> None:
        failure: CheckpointError | None = None
        if trainer.ranks.is_writer:
            try:
                known = self.scores.of_hash(score.manifest)
                if known is not None and known.measured and not score.measured:
                    score = replace(
                        known, finished=score.finished, due=score.due, went_on=score.went_on
                    )
                self.scores.put(replace(score, finished="", due=score.due or score.finished))
                self._point_at_best(self.best_step)
                if score.finished:  # only a run that points at its best is complete
                    self.scores.put(score)
                if score.measured and self.best_step == score.step:
                    logger.info("step %d: the best so far", score.step)
                    pruned = self._prune(self.best_step, self.catalogue.names(for_a_stop=True))
                    self.catalogue = self.catalogue.without(pruned)
            except CheckpointError as error:
                failure = error
        self._tell_catalogue(trainer)
        if trainer.ranks.any(failure is not None):
            failure = failure or CheckpointError("the first rank could not write the score")
            if self.on_error == "stop":
                raise failure
            logger.warning(
                "step %d: its score is not written, training goes on: %s", score.step, failure
            )

    # ------------------ in the background

    def _look_at_background(self, trainer: TrainingLoop) -> None:
        # Several ranks look together, at the next save: an error of one would block the others.
        if self._background is not None and trainer.ranks.alone and not self._background.is_alive:
            self._finish_background(trainer)

    def _finish_background(self, trainer: TrainingLoop) -> None:
        """Wait for the save under way, and report how it ended."""
        if self._background is None:
            return
        save, self._background = self._background, None
        failure = save.wait()
        lost, trouble, damaged = trainer.ranks.sum_counts(
            [
                save.is_lost,
                failure is not None,
                isinstance(failure, DamagedStateError),
            ]
        )
        self.catalogue = self.catalogue.without([save.name, *save.pruned])
        entry = save.replaced
        if not lost:
            entry = replace(save.entry, hash=self.store.known_hash(save.name))
        if entry is not None:
            self.catalogue = self.catalogue.including(entry)
        self._tell_catalogue(trainer)
        if trouble:
            if lost:
                self.best_score, self.best_step = save.best_before
            if damaged:
                trainer.notify(TrainingEvents.FLLM_STATE_DAMAGED)
                if trainer.rolling_back:
                    return
            error = failure or CheckpointError("the first rank could not save the checkpoint")
            if self.on_error == "stop" or damaged or not isinstance(error, CheckpointError):
                raise error  # "continue" is for a failing disk, not for a bug or a NaN
            what = "not saved" if lost else "saved, but old checkpoints are not removed"
            logger.warning("step %d: %s, training goes on: %s", save.step, what, error)
            if lost:
                return
        trainer.report_saved(self.store.directory / save.name)

    def _wait_at_the_end(self) -> None:
        """Wait for the thread of a run that has ended in an exception."""
        if self._background is not None and (failure := self._background.wait()) is not None:
            logger.error("step %d: not saved: %s", self._background.step, failure)
