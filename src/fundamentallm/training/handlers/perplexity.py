"""Perplexity of the training data."""

from __future__ import annotations

import math
from typing import Any

from ignite.engine import Events

from fundamentallm.training.handlers.base import HANDLERS
from fundamentallm.training.loop import TrainingLoop
from fundamentallm.training.saved import saved_count, saved_number
from fundamentallm.training.step import perplexity_of


@HANDLERS.register("perplexity")
class Perplexity:
    """Observes: writes `train/perplexity`, exp of the token-weighted mean loss of the epoch.

    The mean of exponentials, or the exponential of a mean of batch means, would be another
    number: the sum of nats and the count of tokens are kept separately, in float64.
    """

    def __init__(self) -> None:
        self.nll = 0.0
        self.num_tokens = 0

    def attach(self, trainer: TrainingLoop) -> None:
        """Reset at each epoch's first step; listen at ITERATION_COMPLETED."""
        trainer.add_event_handler(Events.ITERATION_COMPLETED, self.update)

    def update(self, trainer: TrainingLoop) -> None:
        """Take in the step's loss, weighted by its tokens."""
        state = trainer.state
        # By the step, not at EPOCH_STARTED: that fires again in the middle of an epoch when a
        # run is resumed or rolled back.
        if trainer.epochs.end_with(state.iteration - 1):
            self.nll, self.num_tokens = 0.0, 0
        if math.isfinite(state.output.loss) and not state.output.rejection:
            self.nll += state.output.loss * state.output.num_tokens
            self.num_tokens += state.output.num_tokens
        mean = self.nll / self.num_tokens if self.num_tokens else math.nan
        state.metrics["train/perplexity"] = perplexity_of(mean)

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch's sums so far."""
        return {"nll": self.nll, "num_tokens": self.num_tokens}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the sums of a saved epoch."""
        self.nll = saved_number(state_dict, "nll")
        self.num_tokens = saved_count(state_dict, "num_tokens")
