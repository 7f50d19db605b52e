"""A warning where the model learns its training text by heart."""

from __future__ import annotations

import logging

from fundamentallm.config.base import Count
from fundamentallm.events import TrainingEvents
from fundamentallm.training.handlers.base import HANDLERS
from fundamentallm.training.loop import TrainingLoop

logger = logging.getLogger(__name__)

RISE = 1.01  # of the lowest loss; less may be chance


@HANDLERS.register("overfitting")
class Overfitting:
    """Observes: warns once where validation loss rises while training loss falls.

    It compares with the evaluation of the lowest validation loss so far, so that one evaluation by
    chance below the last hides nothing. Nothing of it is kept in a checkpoint: a run that goes on
    counts anew.

    Args:
        patience: evaluations in a row above the lowest, at least 1. The last must be above it by
            1 %.
    """

    def __init__(self, patience: Count = 3) -> None:
        if patience < 1:
            raise ValueError(f"patience must be at least 1, got {patience}")
        self.patience = patience
        self.told = False
        self._lowest: tuple[float, float] | None = None  # the losses in training and validation
        self._above = 0

    def attach(self, trainer: TrainingLoop) -> None:
        """Listen at FLLM_EVALUATION_COMPLETED."""
        trainer.add_event_handler(TrainingEvents.FLLM_EVALUATION_COMPLETED, self.compare)

    def compare(self, trainer: TrainingLoop) -> None:
        """Look at the last evaluations."""
        metrics = trainer.state.metrics
        if self.told or "train/loss_ema" not in metrics:
            return
        train, last = metrics["train/loss_ema"], metrics["val/loss"]
        if self._lowest is None or last <= self._lowest[1]:
            self._lowest, self._above = (train, last), 0
            return
        self._above += 1
        then, lowest = self._lowest
        self.told = self._above >= self.patience and last >= RISE * lowest and train < then
        if self.told:
            logger.warning(
                "step %d: validation loss has risen from %.4f to %.4f over %d evaluations while"
                " training loss fell to %.4f: the model learns its text by heart, or the validation"
                " part is of another kind; more text, a smaller model, dropout or the handler"
                " early_stopping help",
                trainer.state.iteration,
                lowest,
                last,
                self._above,
                train,
            )
