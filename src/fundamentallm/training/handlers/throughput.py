"""Speed of training."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from ignite.engine import Events

from fundamentallm.compute.timing import HostTimer, Timer, device_timer
from fundamentallm.config.base import Count
from fundamentallm.training.handlers.base import HANDLERS
from fundamentallm.training.loop import TrainingLoop


@HANDLERS.register("throughput")
class Throughput:
    """Observes: writes `train/tokens_per_second` and `train/samples_per_second`.

    A token is one that the model computes: one whose target is masked (a prompt of an example) and
    padding count too, which `tokens` in the metrics and the loss leave out. So the figure is the
    speed of the machine, and equal for text and for examples of the same shape.
    Both count over all ranks, over the last `window` steps, from the asking for a batch to the
    end of its step: evaluation, checkpoints and sampling are pauses and left out. On a GPU its own
    events are read, and never waited for: a step that it has not finished counts at a later one.

    Args:
        window: number of steps that the figures are taken over.
        clock: monotonic seconds, in place of the device's own timer.
    """

    role = "throughput"

    def __init__(self, window: Count = 50, clock: Callable[[], float] | None = None) -> None:
        if window < 1:
            raise ValueError(f"window must be at least 1 step, got {window}")
        self._window = window
        self._steps: deque[tuple[float, int, int]] = deque()
        self._seconds, self._tokens, self._sequences = 0.0, 0, 0
        self._timer: Timer = HostTimer(clock) if clock else HostTimer()
        self._own_clock = clock is None
        self._started: Any = None
        self._running: deque[tuple[Any, Any, int, int]] = deque()

    def attach(self, trainer: TrainingLoop) -> None:
        """Time from GET_BATCH_STARTED to ITERATION_COMPLETED."""
        if self._own_clock:
            self._timer = device_timer(trainer.device)
        trainer.add_event_handler(Events.GET_BATCH_STARTED, self.start)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, self.stop)

    def start(self) -> None:
        """Note when the step's batch was asked for."""
        self._started = self._timer.mark()

    def stop(self, trainer: TrainingLoop) -> None:
        """Add the steps that the device has finished, and write both rates."""
        sequences = trainer.state.output.num_sequences
        ended = self._timer.mark()
        self._running.append((self._started, ended, trainer.tokens_computed, sequences))
        while self._running:
            began, ended, tokens, sequences = self._running[0]
            seconds = self._timer.seconds(began, ended)
            if seconds is None:
                break
            self._running.popleft()
            self._add(seconds, tokens, sequences)
        if not self._steps:
            return
        seconds = max(self._seconds, 1e-9)
        metrics = trainer.state.metrics
        metrics["train/tokens_per_second"] = self._tokens / seconds
        metrics["train/samples_per_second"] = self._sequences / seconds

    def _add(self, seconds: float, tokens: int, sequences: int) -> None:
        self._steps.append((seconds, tokens, sequences))
        self._seconds += seconds
        self._tokens += tokens
        self._sequences += sequences
        if len(self._steps) > self._window:
            seconds, tokens, sequences = self._steps.popleft()
            self._seconds -= seconds
            self._tokens -= tokens
            self._sequences -= sequences
