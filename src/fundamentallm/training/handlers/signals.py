"""Stop on a signal, with everything saved."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

from fundamentallm.events import TrainingEvents
from fundamentallm.training.handlers.base import HANDLERS
from fundamentallm.training.loop import TrainingLoop

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")


@HANDLERS.register("signals")
class Signals:
    """Controls: SIGINT, SIGTERM, SIGHUP and SIGUSR1 end the run after the step, saved.

    The signal's own handler only sets a flag, which the Trainer reads between steps and during an
    evaluation. A second signal ends the process at once, with the exit code 128 + n. A signal that
    the process was started to ignore, as under `nohup`, stays ignored. A handler that other
    code has installed is restored at the run's end.
    """

    def __init__(self) -> None:
        self._previous: dict[int, Any] = {}
        self._trainer: TrainingLoop | None = None

    def attach(self, trainer: TrainingLoop) -> None:
        """Listen to the operating system while the trainer runs."""
        self._trainer = trainer
        trainer.add_event_handler(TrainingEvents.FLLM_RUN_STARTED, self.install)
        trainer.add_event_handler(TrainingEvents.FLLM_RUN_ENDED, self.restore)

    def install(self) -> None:
        """Take over the signals; only a main thread can, elsewhere nothing is changed."""
        if self._previous or threading.current_thread() is not threading.main_thread():
            return
        for name in SIGNALS:
            number = getattr(signal, name, None)  # Windows lacks some
            # A signal ignored from the start stays ignored: nohup, or a background shell, set it.
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._receive)

    def restore(self) -> None:
        """Restore the previous signal handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        assert self._trainer is not None
        if self._trainer.interrupted_by is not None:
            os._exit(128 + number)
        self._trainer.interrupt_run(number)
