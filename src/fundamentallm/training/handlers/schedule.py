"""Apply the learning-rate schedule."""

from __future__ import annotations

from typing import Any

from ignite.engine import Events
from ignite.handlers.param_scheduler import ParamScheduler

from fundamentallm.training.handlers.base import HANDLERS
from fundamentallm.training.loop import TrainingLoop
from fundamentallm.training.saved import saved_number
from fundamentallm.training.schedulers import LearningRateScheduler


@HANDLERS.register("schedule")
class Schedule(ParamScheduler):
    """Controls: sets each parameter group's learning rate before its step.

    The rate is a pure function of the step (and, in a run limited by the clock, of the progress
    at that step), so resume and rollback need no other state.

    Args:
        scheduler: the schedule; its base rates were taken from the optimizer's groups.
    """

    role = "schedule"

    def __init__(self, scheduler: LearningRateScheduler) -> None:
        super().__init__(scheduler.optimizer, "lr")
        self.scheduler = scheduler
        self.progress: float | None = None

    def attach(self, trainer: TrainingLoop) -> None:  # type: ignore[override]
        """Set the rate at ITERATION_STARTED, so that it holds for that very step."""
        trainer.add_event_handler(Events.ITERATION_STARTED, self.apply)

    def apply(self, trainer: TrainingLoop) -> None:
        """Write the rates for step `state.iteration`, lowered by interventions; note `train/lr`.

        Where a scheduler of Ignite sets the rate, do nothing.
        """
        if trainer.rate_is_foreign:
            return
        # Ignite counts events from 0 and would count on after a rollback; the step knows better.
        step = self.event_index = trainer.state.iteration
        self.progress = trainer.budget.clock_progress()
        multiplier = self.scheduler.multiplier(step, self.progress)
        factor = trainer.interventions.rate_factor(step) if trainer.interventions.cuts else 1.0
        groups = self.optimizer.param_groups
        for group, base in zip(groups, self.scheduler.base_lrs, strict=True):
            group["lr"] = base * multiplier * factor
        trainer.state.metrics["train/lr"] = groups[0]["lr"]

    def get_param(self) -> list[float]:
        """Return the rate of each group for update number `event_index + 1`."""
        multiplier = self.scheduler.multiplier(self.event_index + 1, self.progress)
        return [base * multiplier for base in self.scheduler.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """Return the progress of the last step: None if steps, not the clock, count."""
        return {"progress": self.progress}

    def load_state_dict(self, state_dict: Any) -> None:
        """Restore the progress; the clock continues from there."""
        known = state_dict["progress"] is not None
        self.progress = saved_number(state_dict, "progress") if known else None
