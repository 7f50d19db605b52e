"""Metrics as JSON lines."""

from __future__ import annotations

import math
from pathlib import Path

from fundamentallm.files.json_lines import JsonLines
from fundamentallm.files.run_layout import METRICS
from fundamentallm.training.handlers.base import HANDLERS
from fundamentallm.training.handlers.metrics_writer import MetricsWriter, Record


@HANDLERS.register("logs")
class MetricsLog(MetricsWriter):
    """Observes: writes `metrics.jsonl`, one JSON object a line.

    Every line has `step`, `epoch`, `tokens` and `elapsed_seconds`, and the `train/` or the `val/`
    metrics of that step. JSON has no NaN or infinity: they are written as the strings "NaN",
    "Infinity" and "-Infinity", never as a number that was not measured. When a run is resumed or
    rolled back, lines of later steps are cut off, so that the file tells one history.

    Args:
        run_dir: the directory of the file.
    """

    target = METRICS

    def __init__(self, run_dir: Path) -> None:
        self.file = JsonLines(run_dir / self.target, lambda record: "val/loss" in record)

    def cut_back(self, step: int, evaluation_pending: bool) -> None:
        """Drop lines of steps that the restored state has not taken."""
        self.file.cut_back(step, evaluation_pending)

    def write(self, record: Record) -> None:
        """Add a line."""
        if record.kind in ("train", "val"):
            self.file.append(
                {
                    "step": record.step,
                    "epoch": record.epoch,
                    "tokens": record.tokens,
                    "elapsed_seconds": round(record.elapsed_seconds, 3),
                    **{name: json_number(value) for name, value in record.metrics.items()},
                }
            )


def json_number(value: float) -> float | str:
    """Return the number, or its name if JSON has no such number."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
