"""End a run that is worse than earlier ones of its sweep."""

from __future__ import annotations

import logging
from typing import Annotated

from pydantic import Field

from fundamentallm.config.base import Count
from fundamentallm.events import TrainingEvents
from fundamentallm.training.handlers.base import HANDLERS
from fundamentallm.training.loop import TrainingLoop

logger = logging.getLogger(__name__)

PRUNED = "pruned"


@HANDLERS.register("pruning")
class Pruning:
    """Controls: ends the run at an evaluation whose loss is above a limit; `sweep` sets the limits.

    A loss that is not finite is above every limit.

    Args:
        limits: (step, highest validation loss in nats per token) of evaluations.
    """

    def __init__(
        self,
        limits: Annotated[tuple[tuple[Count, float], ...], Field(examples=[[[100, 2.5]]])] = (),
    ) -> None:
        self.limits = dict(limits)

    def attach(self, trainer: TrainingLoop) -> None:
        """Listen at FLLM_EVALUATION_COMPLETED."""
        trainer.add_event_handler(TrainingEvents.FLLM_EVALUATION_COMPLETED, self.judge)

    def judge(self, trainer: TrainingLoop) -> None:
        """Compare with the limit of this step, if there is one."""
        step, loss = trainer.state.iteration, trainer.state.metrics["val/loss"]
        limit = self.limits.get(step)
        if limit is None or loss <= limit:
            return
        message = f"{PRUNED} at step {step}: validation loss {loss:.4f} is above {limit:.4f}"
        logger.info("%s", message)
        trainer.finish(message)
