"""Stop on a file, with everything saved."""

from __future__ import annotations

import os
from pathlib import Path

from fundamentallm.events import TrainingEvents
from fundamentallm.files.run_layout import STOP
from fundamentallm.training.handlers.base import HANDLERS
from fundamentallm.training.loop import TrainingLoop


@HANDLERS.register("stop_file")
class StopFile:
    """Controls: saves and stops after the step in which the file STOP appears in the run directory.

    For jobs that are reachable only through a shared disk: `touch runs/mine/STOP`. The file is
    removed when the run has stopped, so that the next start continues.

    Args:
        run_dir: the directory to watch.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / STOP
        self._name = str(self.path)

    def attach(self, trainer: TrainingLoop) -> None:
        """Be asked with every step, on the rank that writes; remove the file at FLLM_RUN_ENDED."""
        if not trainer.ranks.is_writer:
            return
        trainer.pause_when(self.is_there)
        trainer.add_event_handler(TrainingEvents.FLLM_RUN_ENDED, self.remove)

    def is_there(self) -> bool:
        """Look for the file."""
        return os.access(self._name, os.F_OK)  # in each step: a tenth of Path.exists' time

    def remove(self) -> None:
        """Remove the file."""
        self.path.unlink(missing_ok=True)
