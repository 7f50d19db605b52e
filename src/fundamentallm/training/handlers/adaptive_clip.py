"""Clipping that follows the gradient norm."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import Field

from fundamentallm.config.base import Positive
from fundamentallm.events import TrainingEvents
from fundamentallm.training.handlers.base import HANDLERS
from fundamentallm.training.loop import TrainingLoop
from fundamentallm.training.saved import saved_count, saved_number, saved_numbers


@HANDLERS.register("adaptive_clip")
class AdaptiveClip:
    """Controls: clips a gradient whose norm stands out from the norms before it (ZClip).

    Mean m and variance v of the norm are exponential averages. A norm g with the z-score
    z = (g - m) / sqrt(v) above `threshold` is clipped to m + sqrt(v) * threshold^2 / z: the
    further out, the harder. What enters the averages is the clipped norm, so that a spike does not
    raise the level (Kumar et al. 2025, "ZClip: Adaptive Spike Mitigation for LLM Pre-Training",
    arXiv:2504.02507, algorithm 1 with reciprocal clipping). `training.max_grad_norm` also applies.

    Args:
        threshold: z-score above which a norm is clipped.
        decay: weight of the past in the averages, in (0, 1).
        warmup: applied updates whose norms begin the averages, before anything is clipped.
    """

    def __init__(
        self,
        threshold: Positive = 2.5,
        decay: Annotated[float, Field(gt=0, lt=1)] = 0.97,
        warmup: Annotated[int, Field(ge=2)] = 25,
    ) -> None:
        if not threshold > 0.0:
            raise ValueError(f"threshold must be positive, got {threshold}")
        if not 0.0 < decay < 1.0:
            raise ValueError(f"decay must lie in (0, 1), got {decay}")
        if warmup < 2:
            raise ValueError(f"warmup must be at least 2 to compute a variance, got {warmup}")
        self.threshold = threshold
        self.decay = decay
        self.warmup = warmup
        self.first_norms: list[float] = []
        self.mean = math.nan
        self.variance = math.nan
        self.num_clipped = 0
        self._norm = math.nan

    def attach(self, trainer: TrainingLoop) -> None:
        """Clip before the update; learn from the updates that were applied."""
        trainer.add_event_handler(TrainingEvents.FLLM_GRADIENTS_READY, self.clip)
        trainer.add_event_handler(TrainingEvents.FLLM_OPTIMIZER_STEPPED, self.learn)

    def clip(self, trainer: TrainingLoop) -> None:
        """Set this update's limit if its norm stands out."""
        self._norm = trainer.step.norm
        deviation = math.sqrt(self.variance) if self.variance > 0.0 else 0.0
        if not deviation or not math.isfinite(self._norm):
            return
        z = (self._norm - self.mean) / deviation
        if z > self.threshold:
            self._norm = self.mean + deviation * self.threshold**2 / z
            trainer.step.clip_to(self._norm)

    def learn(self, trainer: TrainingLoop) -> None:
        """Move the averages by the norm that was applied."""
        self.num_clipped += self._norm < trainer.step.norm
        if len(self.first_norms) < self.warmup:
            self.first_norms.append(self._norm)
            if len(self.first_norms) == self.warmup:
                self.mean = sum(self.first_norms) / self.warmup
                squares = ((norm - self.mean) ** 2 for norm in self.first_norms)
                self.variance = sum(squares) / self.warmup
            return
        self.mean = self.decay * self.mean + (1.0 - self.decay) * self._norm
        distance = (self._norm - self.mean) ** 2
        self.variance = self.decay * self.variance + (1.0 - self.decay) * distance

    def state_dict(self) -> dict[str, Any]:
        """Return the averages; None before the first value."""
        begun = len(self.first_norms) == self.warmup
        return {
            "first_norms": list(self.first_norms),
            "mean": self.mean if begun else None,
            "variance": self.variance if begun else None,
            "num_clipped": self.num_clipped,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore saved averages."""
        self.first_norms = saved_numbers(state_dict, "first_norms")
        begun = state_dict["mean"] is not None
        self.mean = saved_number(state_dict, "mean") if begun else math.nan
        self.variance = saved_number(state_dict, "variance") if begun else math.nan
        self.num_clipped = saved_count(state_dict, "num_clipped")
