"""Plain functions at three common moments."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ignite.engine import Events

from fundamentallm.events import TrainingEvents
from fundamentallm.training.loop import TrainingLoop


class Hooks:
    """Observes: calls functions at the end of an epoch, a validation and a save.

    Args:
        on_epoch_end: called with the trainer and the metrics at EPOCH_COMPLETED.
        on_validation: called with the trainer and the metrics at FLLM_EVALUATION_COMPLETED.
        on_checkpoint: called with the trainer and the checkpoint's path at FLLM_CHECKPOINT_SAVED.
    """

    def __init__(
        self,
        on_epoch_end: Callable[[TrainingLoop, dict[str, Any]], None] | None = None,
        on_validation: Callable[[TrainingLoop, dict[str, Any]], None] | None = None,
        on_checkpoint: Callable[[TrainingLoop, Path], None] | None = None,
    ) -> None:
        self.on_epoch_end = on_epoch_end
        self.on_validation = on_validation
        self.on_checkpoint = on_checkpoint

    def attach(self, trainer: TrainingLoop) -> None:
        """Listen for each function that is given."""
        if self.on_epoch_end is not None:
            trainer.add_event_handler(Events.EPOCH_COMPLETED, self._epoch_end)
        if self.on_validation is not None:
            trainer.add_event_handler(TrainingEvents.FLLM_EVALUATION_COMPLETED, self._validation)
        if self.on_checkpoint is not None:
            trainer.add_event_handler(TrainingEvents.FLLM_CHECKPOINT_SAVED, self._checkpoint)

    def _epoch_end(self, trainer: TrainingLoop) -> None:
        assert self.on_epoch_end is not None
        self.on_epoch_end(trainer, trainer.state.metrics)

    def _validation(self, trainer: TrainingLoop) -> None:
        assert self.on_validation is not None
        self.on_validation(trainer, trainer.state.metrics)

    def _checkpoint(self, trainer: TrainingLoop) -> None:
        assert self.on_checkpoint is not None
        assert trainer.state.last_checkpoint is not None
        self.on_checkpoint(trainer, trainer.state.last_checkpoint)
