"""A warning where the model learns its training text by heart."""

from __future__ import annotations

import itertools
import logging

from fundamentallm.config.base import Count
from fundamentallm.events import TrainingEvents
from fundamentallm.training.handlers.base import HANDLERS
from fundamentallm.training.loop import TrainingLoop

logger = logging.getLogger(__name__)


@HANDLERS.register("overfitting")
class Overfitting:
    """Observes: warns once where validation loss rises while training loss falls.

    Nothing of it is kept in a checkpoint: a run that goes on counts anew.

    Args:
        patience: evaluations in a row at which both happen, at least 1.
    """

    def __init__(self, patience: Count = 3) -> None:
        if patience < 1:
            raise ValueError(f"patience must be at least 1, got {patience}")
        self.patience = patience
        self.told = False
        self._losses: list[tuple[float, float]] = []

    def attach(self, trainer: TrainingLoop) -> None:
        """Listen at FLLM_EVALUATION_COMPLETED."""
        trainer.add_event_handler(TrainingEvents.FLLM_EVALUATION_COMPLETED, self.compare)

    def compare(self, trainer: TrainingLoop) -> None:
        """Look at the last evaluations."""
        metrics = trainer.state.metrics
        if self.told or "train/loss_ema" not in metrics:
            return
        losses = [*self._losses, (metrics["train/loss_ema"], metrics["val/loss"])]
        self._losses = losses[-self.patience - 1 :]
        self.told = len(self._losses) > self.patience and all(
            then[0] > now[0] and then[1] < now[1] for then, now in itertools.pairwise(self._losses)
        )
        if self.told:
            (_, first), (train, last) = self._losses[0], self._losses[-1]
            logger.warning(
                "step %d: validation loss has risen from %.4f to %.4f over %d evaluations while"
                " training loss fell to %.4f: the model learns its text by heart, or the validation"
                " part is of another kind; more text, a smaller model, dropout or the handler"
                " early_stopping help",
                trainer.state.iteration,
                first,
                last,
                self.patience,
                train,
            )
