"""Where a rank is, for the watch-dog of several ranks."""

from __future__ import annotations

from functools import partial

from ignite.engine import Events

from fundamentallm.compute.watchdog import STEP, Watchdog
from fundamentallm.events import TrainingEvents
from fundamentallm.training.loop import TrainingLoop

PHASES = {
    Events.TERMINATE: "load",  # of a rollback; where a run ends, nothing follows
    TrainingEvents.FLLM_EVALUATION_STARTED: "evaluation",
    TrainingEvents.FLLM_EVALUATION_COMPLETED: "sample",
    TrainingEvents.FLLM_CHECKPOINT_DUE: "save",
    TrainingEvents.FLLM_RUN_ENDED: "end",
}


class Phases:
    """Observes: tells the watch-dog which phase begins; attach it before every other handler.

    Args:
        watchdog: of this rank.
    """

    def __init__(self, watchdog: Watchdog) -> None:
        self.watchdog = watchdog
        self._has_stepped = False

    def attach(self, trainer: TrainingLoop) -> None:
        """Listen where a phase begins."""
        trainer.add_event_handler(Events.GET_BATCH_STARTED, self.begin_step)
        for event, phase in PHASES.items():
            trainer.add_event_handler(event, partial(self.begin, phase=phase))

    def begin_step(self, trainer: TrainingLoop) -> None:
        """Tell of a step; the first one may compile."""
        step = trainer.state.iteration + 1
        self.watchdog.enter(STEP, step, patient=not self._has_stepped)
        self._has_stepped = True

    def begin(self, trainer: TrainingLoop, phase: str) -> None:
        """Tell of another phase."""
        self.watchdog.enter(phase, trainer.state.iteration)
