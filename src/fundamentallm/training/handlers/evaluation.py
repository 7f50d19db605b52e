"""Validation."""

from __future__ import annotations

import logging
import time
from functools import partial
from typing import Any

from fundamentallm.events import TrainingEvents
from fundamentallm.training.handlers.base import HANDLERS
from fundamentallm.training.loop import TrainingLoop
from fundamentallm.training.metrics import named_metrics

logger = logging.getLogger(__name__)

_SHARE = 0.02  # of `max_seconds`, for which the time of an evaluation is measured beforehand


@HANDLERS.register("evaluation")
class Evaluation:
    """Observes: measures the validation data when that is due; writes `val/loss`, `val/perplexity`
    and `val/NAME` for each metric that is attached to `trainer.evaluator`.

    Due means every `eval_steps`, at each epoch's end (unless `eval_epochs` is off) and at the last
    step. The weights are those that `trainer.evaluation_weights()` puts in: the averaged ones where
    weight EMA is attached.
    """

    role = "evaluation"

    def attach(self, trainer: TrainingLoop) -> None:
        """Listen at FLLM_EVALUATION_DUE; estimate the time of the first pass for the budget."""
        trainer.budget.estimate_end(partial(self.seconds, trainer))
        trainer.add_event_handler(TrainingEvents.FLLM_EVALUATION_DUE, self.run)

    def seconds(self, trainer: TrainingLoop) -> float:
        """Estimate the seconds of an evaluation, in a small part of the run's seconds."""
        data = trainer.val_loader
        if data is None or len(data) == 0:
            return 0.0
        longest = trainer.budget.limits.max_seconds
        return trainer.evaluator.seconds_for(data, _SHARE * (longest or 0.0))

    def run(self, trainer: TrainingLoop) -> None:
        """Evaluate, unless the validation split is empty."""
        if trainer.val_loader is None or len(trainer.val_loader) == 0:
            return
        state = trainer.state
        trainer.notify(TrainingEvents.FLLM_EVALUATION_STARTED)
        started = time.perf_counter()
        metrics: dict[str, Any] = {}
        try:
            metrics = trainer.validate()
        finally:
            if not metrics:  # a signal or an error; it runs again when the run continues
                state.evaluations -= 1
        if not metrics:
            return
        logger.info(
            "step %d: validation loss %.4f, perplexity %.3f%s (%.1f s)",
            state.iteration,
            metrics["val/loss"],
            metrics["val/perplexity"],
            named_metrics(metrics),
            time.perf_counter() - started,
        )
        trainer.notify(TrainingEvents.FLLM_EVALUATION_COMPLETED)
