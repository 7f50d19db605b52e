"""How handlers steer a run: what they may wish, what they provide, and what they may ask.

The wishes of a step are collected in its `StepFacts`; `loop.py` carries out what `decision.py`
decides from them.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

from ignite.engine import Engine, Events
from torch import Tensor

from fundamentallm.compute.distributed import Ranks
from fundamentallm.config.training import TrainingConfig
from fundamentallm.events import TrainingEvents
from fundamentallm.training.checkpoint.catalogue import Survey
from fundamentallm.training.decision import (
    GO_ON,
    STOPPED_BY,
    Cadence,
    RollBack,
    Save,
    StepFacts,
)
from fundamentallm.training.dispatch import Dispatcher, caller_name
from fundamentallm.training.epochs import Epochs
from fundamentallm.training.limits import Budget
from fundamentallm.training.recovery.diagnosis import Incident
from fundamentallm.training.state import TrainingState
from fundamentallm.training.step import TrainStep

logger = logging.getLogger(__name__)


class RestorePoint(Protocol):
    """A store of earlier states for rollbacks."""

    @property
    def directory(self) -> Path:
        """Where the states are kept."""

    def step_to_restore(self, before: int | None = None) -> int | None:
        """Return the newest good state's step that is at most `before`, else the oldest's."""

    def restore_before(self, trainer: Any, before: int | None = None) -> None:
        """Load that state into the trainer."""

    def weights_before(
        self, trainer: Any, before: int | None = None
    ) -> Mapping[str, Tensor] | None:
        """Return that state's model, None if there is none; every rank must call it."""

    def restore(self, trainer: Any, path: Path, survey: Survey | None = None) -> None:
        """Load the state at `path` into the trainer, from `survey` if that has read it."""

    def note_end_of_step(self, trainer: Any) -> None:
        """Note the evaluation of a step whose state is kept, and the end of the run."""

    def has_ended_at(self, step: int) -> bool:
        """Return whether the run had ended with the state of a step, from which it continues."""

    def end_due_at(self, step: int) -> str:
        """Return why the run is to end with that state, once it is evaluated; empty if not."""

    def is_scheduled(self, step: int) -> bool:
        """Return whether the step has a state that was saved on schedule."""


class SteeredEngine(Dispatcher):
    """An engine that handlers steer; `TrainingLoop` has the loop itself.

    Attributes:
        evaluation_weights: returns a context in which the model has the weights to evaluate and
            sample with.
        restore_point: the store of earlier states; None without one.
        interrupted_by: the number of the signal that asked the run to stop.
    """

    state: TrainingState
    config: TrainingConfig
    ranks: Ranks
    epochs: Epochs
    budget: Budget
    step: TrainStep
    _cadence: Cadence

    def __init__(self, process_function: Callable[[Engine, Any], Any]) -> None:
        super().__init__(process_function)
        self.evaluation_weights: Callable[[], AbstractContextManager[None]] = nullcontext
        self.restore_point: RestorePoint | None = None
        self.interrupted_by: int | None = None
        self._asked_to_pause: list[Callable[[], bool]] = []
        self._facts, self._next_facts = StepFacts(), StepFacts()  # the latter are voted on first
        self._decision = GO_ON
        self._saving: Save | None = None
        self._stopped_by = self._error_ended_by = ""
        self._is_interrupted = self._skips_completed = False

    # ------------------------------------------------------------------ wishes of handlers

    def redo_step(self) -> None:
        """Repeat the refused step from the state before it; call at FLLM_STEP_REJECTED."""
        self._facts.redo = True

    def reject_step(self, reason: str, details: str = "") -> None:
        """Refuse the update of the current step; call it at FLLM_GRADIENTS_READY.

        Args:
            reason: a short reason for the log; "spike" and "divergence" ask `nan_rollback` to act.
            details: a description for the incident report.
        """
        self.step.veto, self.step.veto_details = reason, details

    def roll_back(self, reason: str, before: int | None = None) -> None:
        """Go back to an earlier checkpoint after this step.

        The caller writes the changes for the repeated steps into the interventions, which a
        rollback keeps. Without a checkpoint the run continues with its present weights: a
        refused update has not changed them.

        Args:
            reason: for the log.
            before: go to the newest checkpoint that is not later than this step, or to the oldest
                if all are; the newest of all if None.
        """
        if self.restore_step() is None:
            logger.warning(
                "step %d: no checkpoint to go back to (%s)", self.state.iteration, reason
            )
            return
        self._facts.roll_back = RollBack(before, reason)

    def finish(self, reason: str) -> None:
        """Wish to end the run for good after this step; the first reason counts."""
        self._facts.finish = self._facts.finish or reason

    def terminate(self, skip_completed: bool = False) -> None:
        """Wish to end the run for good after this step, as handlers written for Ignite do.

        Wherever it is called, the step is completed, evaluated and saved. `finished` names the
        caller. On several ranks the call of one counts from the next step on, or from the end of
        the evaluation in which it is made. Called at EXCEPTION_RAISED it ends the run of a
        single process there, without the error and without a save: the step is half done.

        Args:
            skip_completed: do not fire COMPLETED; on several ranks, on the rank of the call.
        """
        self._skips_completed = skip_completed
        reason = STOPPED_BY + caller_name(sys._getframe(1))
        if not self.ranks.alone:
            self._stopped_by = self._stopped_by or reason
        elif self.last_event_name is Events.EXCEPTION_RAISED:
            self._error_ended_by = reason
        else:
            self.finish(reason)

    def terminate_epoch(self, skip_epoch_completed: bool = False) -> None:
        """Wish to end the epoch with this step; the next step begins the next epoch.

        The step is completed, wherever it is called, and the epoch's end is evaluated and saved as
        any other. A checkpoint holds where the epoch ended. On several ranks the call of one counts
        from the next step on.

        Args:
            skip_epoch_completed: do not fire EPOCH_COMPLETED.

        Raises:
            RuntimeError: called at STARTED or EPOCH_STARTED, as Ignite's own.
        """
        if self.last_event_name in (Events.STARTED, Events.EPOCH_STARTED):
            raise RuntimeError(
                "terminate_epoch() must not be called at STARTED or EPOCH_STARTED: no step of the"
                " epoch has been taken"
            )
        facts = self._facts if self.ranks.alone else self._next_facts
        facts.end_epoch, facts.skip_epoch_completed = True, skip_epoch_completed

    def interrupt(self) -> None:
        """Save and stop after this step; the next `run` goes on, as with Ignite's engine."""
        self._is_interrupted = True

    def interrupt_run(self, signal_number: int) -> None:
        """Ask the run to save and stop after this step, to be resumed later."""
        self.interrupted_by = signal_number

    def pause_when(self, asked: Callable[[], bool]) -> None:
        """Ask a function with every step and validation batch; on True the run saves and stops.

        It can be resumed later, as after `interrupt_run`.
        """
        self._asked_to_pause.append(asked)

    # ------------------------------------------------------------------ what handlers provide

    def evaluate_with(self, weights: Callable[[], AbstractContextManager[None]]) -> None:
        """Evaluate and sample in this context, which puts other weights into the model."""
        self.evaluation_weights = weights

    def restore_from(self, point: RestorePoint) -> None:
        """Return to the states of this store in a rollback, and note there how steps end."""
        self.restore_point = point

    def report_incident(self, incident: Incident) -> None:
        """Make a numerical incident known: `state.incident`, FLLM_INCIDENT_DETECTED."""
        self.state.incident = incident
        self.notify(TrainingEvents.FLLM_INCIDENT_DETECTED)

    def report_saved(self, path: Path) -> None:
        """Make a checkpoint known: `state.last_checkpoint`, FLLM_CHECKPOINT_SAVED."""
        self.state.last_checkpoint = path
        self.notify(TrainingEvents.FLLM_CHECKPOINT_SAVED)

    # ------------------------------------------------------------------ what handlers may ask

    @property
    def grad_norm(self) -> Tensor:
        """The gradient norm of the current step, a scalar on the device, before clipping.

        It is there from FLLM_GRADIENTS_READY on; `state.output` has it as a host number after.
        """
        assert self.step.grad_norm is not None
        return self.step.grad_norm

    def restore_step(self, before: int | None = None) -> int | None:
        """Return the step that a rollback would go to, None if there is none."""
        return self.restore_point.step_to_restore(before) if self.restore_point else None

    def weights_before(self, before: int | None = None) -> Mapping[str, Tensor] | None:
        """Return the model's state in the newest checkpoint that is at most `before`, or None.

        Every rank must call it.
        """
        return self.restore_point.weights_before(self, before) if self.restore_point else None

    @property
    def finished(self) -> str:
        """Why the run is complete; empty before that."""
        return self._decision.reason

    @property
    def stopping(self) -> bool:
        """Whether the run ends with the current step, finally or for now."""
        return self._decision.ends_run

    @property
    def rolling_back(self) -> bool:
        """Whether the run rolls back after this step."""
        return self._facts.roll_back is not None

    @property
    def saving_for_a_stop(self) -> bool:
        """Whether the checkpoint that is asked for now is one that only a stop asks for."""
        return self._saving is Save.FOR_A_STOP

    @property
    def total_steps(self) -> int | None:
        """The last step; None where only the clock or the tokens end the run."""
        return self.budget.limits.total_steps

    @property
    def epoch(self) -> int:
        """The epoch, from 1, of the current step; 0 before the first step.

        Ignite's own count stands one lower between a restored epoch's end and the next start.
        """
        return self.epochs.number(self.state.iteration)

    @property
    def steps_per_epoch(self) -> int:
        """Steps in an epoch that no handler ends early."""
        return self.epochs.length

    def seconds_remaining(self) -> float | None:
        """Estimate the seconds to the end of the run, evaluations included, as far as measured."""
        step, last = self.state.iteration, self.total_steps
        done = step if step and self.state.evaluated_step == step else step - 1
        evaluations = 0 if last is None else self._cadence.evaluations_between(max(0, done), last)
        return self.budget.seconds_remaining(evaluations)

    def is_log_step(self) -> bool:
        """Whether the current step's metrics belong in the logs."""
        return self._cadence.logs_at(self.state.iteration) or bool(self._decision.reason)

    def _wants_to_leave(self) -> bool:
        pause = self.config.stop_after_seconds
        if self.interrupted_by is not None or self._is_interrupted:
            return True
        if pause is not None and self.budget.clock() >= pause:
            return True
        for asks in self._asked_to_pause:  # noqa: SIM110 (any() would make a generator in each step)
            if asks():
                return True
        return False
