"""Metrics as JSON lines."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fundamentallm.events import TrainingEvents
from fundamentallm.training.handlers.base import HANDLERS
from fundamentallm.training.json_lines import JsonLines

if TYPE_CHECKING:
    from fundamentallm.training.trainer import Trainer


@HANDLERS.register("logs")
class MetricsLog:
    """Observes: writes `metrics.jsonl`, one JSON object a line.

    Every line has `step`, `epoch`, `tokens` and `elapsed_seconds`, and the `train/` or the `val/`
    metrics of that step. JSON has no NaN or infinity: they stand as the strings "NaN",
    "Infinity" and "-Infinity", never as a number that was not measured. When a run is resumed or
    rolled back, lines of later steps are cut off, so that the file tells one history.

    Args:
        run_dir: the directory of the file.
    """

    def __init__(self, run_dir: Path) -> None:
        self.file = JsonLines(run_dir / "metrics.jsonl", lambda record: "val/loss" in record)

    def attach(self, trainer: Trainer) -> None:
        """Write at FLLM_METRICS_READY and FLLM_EVALUATION_COMPLETED, on the rank that writes."""
        if not trainer.ranks.is_writer:
            return
        trainer.add_event_handler(TrainingEvents.FLLM_RUN_STARTED, self.cut_back)
        trainer.add_event_handler(TrainingEvents.FLLM_ROLLED_BACK, self.cut_back)
        trainer.add_event_handler(TrainingEvents.FLLM_METRICS_READY, self.log_training)
        trainer.add_event_handler(TrainingEvents.FLLM_EVALUATION_COMPLETED, self.log_validation)

    def cut_back(self, trainer: Trainer) -> None:
        """Drop lines of steps that the restored state has not taken."""
        self.file.cut_back(trainer.state.iteration, trainer.evaluation_pending())

    def log_training(self, trainer: Trainer) -> None:
        """Write the step's training metrics if it is a logging step."""
        if trainer.is_log_step():
            self._write(trainer, "train/")

    def log_validation(self, trainer: Trainer) -> None:
        """Write the validation metrics."""
        self._write(trainer, "val/")

    def _write(self, trainer: Trainer, prefix: str) -> None:
        state = trainer.state
        record: dict[str, Any] = {
            "step": state.iteration,
            "epoch": trainer.epoch,
            "tokens": state.tokens_seen,
            "elapsed_seconds": round(trainer.elapsed_seconds(), 3),
        }
        # In an order of names: that of the dict depends on where the process began.
        for key, value in sorted(state.metrics.items()):
            if key.startswith(prefix):
                record[key] = json_number(value)
        self.file.append(record)


def json_number(value: float) -> float | str:
    """Return the number, or its name where JSON has no such number."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
