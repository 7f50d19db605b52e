"""Metrics for TensorBoard."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fundamentallm.events import TrainingEvents
from fundamentallm.training.handlers.base import HANDLERS

if TYPE_CHECKING:
    from fundamentallm.training.trainer import Trainer

logger = logging.getLogger(__name__)


@HANDLERS.register("tensorboard")
class TensorBoard:
    """Observes: writes every metric as a scalar to event files under `tensorboard/`.

    Args:
        run_dir: the run's directory.
    """

    def __init__(self, run_dir: Path) -> None:
        self.directory = run_dir / "tensorboard"
        self._writer: Any = None
        self._failed = False

    def attach(self, trainer: Trainer) -> None:
        """Write at FLLM_METRICS_READY and FLLM_EVALUATION_COMPLETED, on the rank that writes."""
        if not trainer.ranks.is_writer:
            return
        trainer.add_event_handler(TrainingEvents.FLLM_RUN_STARTED, self.open)
        trainer.add_event_handler(TrainingEvents.FLLM_ROLLED_BACK, self.open)
        trainer.add_event_handler(TrainingEvents.FLLM_METRICS_READY, self.log_training)
        trainer.add_event_handler(TrainingEvents.FLLM_EVALUATION_COMPLETED, self.log_validation)
        trainer.add_event_handler(TrainingEvents.FLLM_RUN_ENDED, self.close)

    def open(self, trainer: Trainer) -> None:
        """Begin a file at the current step; TensorBoard hides what older files say beyond it."""
        # Imported here: protobuf and the writer thread are not for those who switch this off.
        from tensorboardX import SummaryWriter

        self.close()
        self._writer = SummaryWriter(str(self.directory), purge_step=trainer.state.iteration + 1)

    def log_training(self, trainer: Trainer) -> None:
        """Write the step's training metrics if it is a logging step."""
        if trainer.is_log_step():
            self._write(trainer, "train/")

    def log_validation(self, trainer: Trainer) -> None:
        """Write the validation metrics."""
        self._write(trainer, "val/")

    def close(self) -> None:
        """Flush and close the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _write(self, trainer: Trainer, prefix: str) -> None:
        if self._failed:
            return
        try:
            for key, value in trainer.state.metrics.items():
                if key.startswith(prefix):
                    self._writer.add_scalar(key, value, trainer.state.iteration)
        except OSError as error:
            self._failed = True
            logger.warning("TensorBoard files cannot be written, training goes on: %s", error)
