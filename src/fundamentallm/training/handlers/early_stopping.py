"""Stop when validation no longer improves."""

from __future__ import annotations

import logging
import math
from typing import Any

from fundamentallm.events import TrainingEvents
from fundamentallm.training.handlers.base import HANDLERS
from fundamentallm.training.loop import TrainingLoop
from fundamentallm.training.saved import saved_count, saved_number

logger = logging.getLogger(__name__)


@HANDLERS.register("early_stopping")
class EarlyStopping:
    """Controls: ends the run after `patience` evaluations without a lower validation loss.

    A loss that is not finite never counts as an improvement. (Ignite's own EarlyStopping takes a
    NaN for the best score and never stops.)

    Args:
        patience: evaluations in a row without improvement.
        min_delta: nats per token by which the loss must fall to count.
    """

    def __init__(self, patience: int = 5, min_delta: float = 0.0) -> None:
        if patience < 1:
            raise ValueError(f"patience must be at least 1 evaluation, got {patience}")
        self.patience = patience
        self.min_delta = min_delta
        self.best = math.inf
        self.waited = 0

    def attach(self, trainer: TrainingLoop) -> None:
        """Listen at FLLM_EVALUATION_COMPLETED."""
        trainer.add_event_handler(TrainingEvents.FLLM_EVALUATION_COMPLETED, self.judge)

    def judge(self, trainer: TrainingLoop) -> None:
        """Compare with the best loss."""
        loss = trainer.state.metrics["val/loss"]
        if loss < self.best - self.min_delta:
            self.best, self.waited = loss, 0
            return
        self.waited += 1
        if self.waited >= self.patience:
            message = (
                f"no lower validation loss in {self.waited} evaluations (best {self.best:.4f})"
            )
            logger.info("step %d: stopping early: %s", trainer.state.iteration, message)
            trainer.finish(message)

    def state_dict(self) -> dict[str, Any]:
        """Return the best loss and the evaluations since."""
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a saved count."""
        self.best = saved_number(state_dict, "best")
        self.waited = saved_count(state_dict, "waited")
