"""A smooth training loss."""

from __future__ import annotations

import math
from typing import Any

from ignite.engine import Events

from fundamentallm.config.base import Share
from fundamentallm.training.handlers.base import HANDLERS
from fundamentallm.training.loop import TrainingLoop
from fundamentallm.training.saved import saved_count, saved_number


@HANDLERS.register("loss_ema")
class LossEMA:
    """Observes: writes `train/loss_ema`, the bias-corrected exponential mean of the loss.

    The correction divides by 1 - decay^n (Adam, arXiv 1412.6980, section 3), so the first value
    is the first loss. Losses that are not finite, or whose update was refused,
    are left out, not replaced.

    Args:
        decay: weight of the past, in [0, 1).
    """

    def __init__(self, decay: Share = 0.98) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay must lie in [0, 1), got {decay}")
        self.decay = decay
        self.total = 0.0
        self.count = 0

    def attach(self, trainer: TrainingLoop) -> None:
        """Listen at ITERATION_COMPLETED."""
        trainer.add_event_handler(Events.ITERATION_COMPLETED, self.update)

    @property
    def value(self) -> float:
        """The mean in nats per token; NaN before the first loss."""
        return self.total / (1.0 - self.decay**self.count) if self.count else math.nan

    def update(self, trainer: TrainingLoop) -> None:
        """Add the step's loss, which is on the host already."""
        output = trainer.state.output
        loss = output.loss
        if math.isfinite(loss) and not output.rejection:
            self.total = self.decay * self.total + (1.0 - self.decay) * loss
            self.count += 1
        trainer.state.metrics["train/loss_ema"] = self.value

    def state_dict(self) -> dict[str, Any]:
        """Return the uncorrected sum and the number of losses."""
        return {"total": self.total, "count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a saved mean."""
        self.total = saved_number(state_dict, "total")
        self.count = saved_count(state_dict, "count")
