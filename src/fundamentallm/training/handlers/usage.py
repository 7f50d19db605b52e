"""What a run spends: seconds by phase, and energy."""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path

from fundamentallm.compute.energy import EnergyMeter
from fundamentallm.config.base import NonNegative
from fundamentallm.events import TrainingEvents
from fundamentallm.files.json_lines import JsonLines
from fundamentallm.files.run_layout import USAGE
from fundamentallm.training.handlers.base import HANDLERS
from fundamentallm.training.loop import TrainingLoop

PHASES = ("start", "training", "evaluation", "sampling", "saving")


@HANDLERS.register("usage")
class Usage:
    """Observes: writes `usage.jsonl`, the seconds of each phase and the energy, where readable.

    A line has `process` (when this process began, Unix seconds), `step`, `seconds` by phase and
    `joules` by counter, both since the process began; so the last lines of all processes add up to
    the run. `start` is what comes before the first step, training everything that is no other
    phase. A line is written at a logging step if the last one is `min_interval` old, and at the
    end. Lines stay when a run goes back, for the time is spent. Energy is counted from the first
    step on, of the whole processor or GPU (`compute.energy`); of several ranks, the first one's.

    Args:
        run_dir: the directory of the file.
        min_interval: seconds between two lines, at least.
    """

    def __init__(self, run_dir: Path, min_interval: NonNegative = 10.0) -> None:
        if not min_interval >= 0:
            raise ValueError(f"min_interval must be at least 0, got {min_interval}")
        self.file = JsonLines(run_dir / USAGE, lambda record: False)
        self.interval = min_interval
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._process = 0.0
        self._phase, self._since, self._written = "start", 0.0, 0.0
        self._meter: EnergyMeter | None = None

    def attach(self, trainer: TrainingLoop) -> None:
        """Listen where a phase begins; attach it before the handlers whose time it counts."""
        trainer.add_event_handler(TrainingEvents.FLLM_RUN_STARTED, self.begin)
        for event, phase in (
            (TrainingEvents.FLLM_CHECKPOINT_DUE, "saving"),
            (TrainingEvents.FLLM_EVALUATION_STARTED, "evaluation"),
            (TrainingEvents.FLLM_EVALUATION_COMPLETED, "sampling"),
        ):
            trainer.add_event_handler(event, partial(self.enter, phase=phase))
        trainer.add_event_handler(TrainingEvents.FLLM_LOG_DUE, self.log)
        trainer.add_event_handler(TrainingEvents.FLLM_RUN_ENDED, self.end)

    def begin(self, trainer: TrainingLoop) -> None:
        """End the start, and listen behind the handlers that save, evaluate and sample."""
        if self._meter is None:
            self._process = round(time.time() - trainer.budget.clock(), 3)
            self._meter = EnergyMeter(trainer.device)
            if trainer.ranks.is_writer:
                self.file.cut_back(sys.maxsize, False)  # a line that a killed process left torn
            resume = partial(self.enter, phase="training")
            for event in (
                TrainingEvents.FLLM_CHECKPOINT_DUE,
                TrainingEvents.FLLM_EVALUATION_COMPLETED,
            ):
                trainer.add_event_handler(event, resume)
        else:  # a second run of this process; what was between them is no part of it
            self._since = trainer.budget.clock()
        self.enter(trainer, "training")

    def enter(self, trainer: TrainingLoop, phase: str) -> None:
        """End a phase and begin another."""
        now = trainer.budget.clock()
        self.seconds[self._phase] += now - self._since
        self._phase, self._since = phase, now

    def log(self, trainer: TrainingLoop) -> None:
        """Write a line, if it is time."""
        if trainer.budget.clock() - self._written >= self.interval:
            self.write(trainer)

    def end(self, trainer: TrainingLoop) -> None:
        """Write the last line."""
        self.write(trainer)

    def write(self, trainer: TrainingLoop) -> None:
        """Write a line; only the rank that writes does."""
        self.enter(trainer, self._phase)
        self._written = self._since
        if trainer.ranks.is_writer and self._meter is not None:
            self.file.append(
                {
                    "process": self._process,
                    "step": trainer.state.iteration,
                    "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
                    "joules": {k: round(v, 3) for k, v in self._meter.read().items()},
                }
            )
