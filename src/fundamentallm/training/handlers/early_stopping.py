"""Stop when validation no longer improves."""

from __future__ import annotations

import logging
import math
from typing import Annotated, Any, Literal

from pydantic import Field

from fundamentallm.config.base import Count, NonNegative
from fundamentallm.events import TrainingEvents
from fundamentallm.training.handlers.base import HANDLERS
from fundamentallm.training.handlers.criterion import Criterion
from fundamentallm.training.loop import TrainingLoop
from fundamentallm.training.saved import saved_count, saved_number

logger = logging.getLogger(__name__)


@HANDLERS.register("early_stopping")
class EarlyStopping:
    """Controls: ends the run after `patience` evaluations without a lower validation loss, or a
    better value of another metric.

    A value that is not finite never counts as an improvement. (Ignite's own EarlyStopping takes a
    NaN for the best score and never stops.)

    Args:
        patience: evaluations in a row without improvement.
        min_delta: an improvement counts from this much on, in the unit of the metric (of the loss:
            nats per token).
        metric: what decides, under its name in the log: `val/loss`, or `val/NAME` of a metric of
            `evaluation.metrics`.
        mode: "min" if a lower value is better, "max" if a higher one is. Needed for all but the
            loss, the perplexity and the bits per byte, of which lower is better.

    Raises:
        ValueError: the patience is below 1.
        ConfigError: the mode is needed; or, when the run starts, there is no such metric.
    """

    def __init__(
        self,
        patience: Count = 5,
        min_delta: NonNegative = 0.0,
        metric: str = "val/loss",
        mode: Annotated[Literal["min", "max"] | None, Field(examples=["max"])] = None,
    ) -> None:
        if patience < 1:
            raise ValueError(f"patience must be at least 1 evaluation, got {patience}")
        self.patience = patience
        self.min_delta = min_delta
        self.criterion = Criterion.of(metric, mode)
        self.best = self._worst
        self.waited = 0

    def attach(self, trainer: TrainingLoop) -> None:
        """Listen at FLLM_EVALUATION_COMPLETED; look for the metric when the run starts."""
        self.criterion.attach(trainer)
        trainer.add_event_handler(TrainingEvents.FLLM_EVALUATION_COMPLETED, self.judge)

    def judge(self, trainer: TrainingLoop) -> None:
        """Compare with the best value."""
        value = self.criterion.value(trainer)
        if self._is_better(value):
            self.best, self.waited = value, 0
            return
        self.waited += 1
        if self.waited >= self.patience:
            message = (
                f"no {self.criterion.in_words} in {self.waited} evaluations (best {self.best:.4f})"
            )
            logger.info("step %d: stopping early: %s", trainer.state.iteration, message)
            trainer.finish(message)

    @property
    def _worst(self) -> float:
        return math.inf if self.criterion.lower else -math.inf

    def _is_better(self, value: float) -> bool:
        if self.criterion.lower:
            return value < self.best - self.min_delta
        return self.best + self.min_delta < value < math.inf

    def state_dict(self) -> dict[str, Any]:
        """Return the best value and the evaluations since."""
        return {"best": self.best, "waited": self.waited, **self.criterion.state_of()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a saved count; one of another metric does not count."""
        best, waited = saved_number(state_dict, "best"), saved_count(state_dict, "waited")
        known = self.criterion.is_of(state_dict)
        self.best, self.waited = (best, waited) if known else (self._worst, 0)
