"""Speed of training."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from ignite.engine import Events

from fundamentallm.training.handlers.base import HANDLERS

if TYPE_CHECKING:
    from fundamentallm.training.trainer import Trainer


@HANDLERS.register("throughput")
class Throughput:
    """Observes: writes `train/tokens_per_second` and `train/samples_per_second`.

    Both count over all ranks, over the last `window` steps, from the asking for a batch to the
    end of its step: evaluation, checkpoints and sampling are pauses and left out. The guard reads
    the loss from the device in each step, so the host's clock sees the device's work.

    Args:
        window: number of steps that the figures are taken over.
        clock: monotonic seconds.
    """

    def __init__(self, window: int = 50, clock: Callable[[], float] = time.perf_counter) -> None:
        if window < 1:
            raise ValueError(f"window must be at least 1 step, got {window}")
        self._window = window
        self._steps: deque[tuple[float, int, int]] = deque()
        self._seconds, self._tokens, self._sequences = 0.0, 0, 0
        self._clock = clock
        self._started = 0.0

    def attach(self, trainer: Trainer) -> None:
        """Time from GET_BATCH_STARTED to ITERATION_COMPLETED."""
        trainer.add_event_handler(Events.GET_BATCH_STARTED, self.start)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, self.stop)

    def start(self) -> None:
        """Note when the step's batch was asked for."""
        self._started = self._clock()

    def stop(self, trainer: Trainer) -> None:
        """Add the step and write both rates."""
        output = trainer.state.output
        step = (self._clock() - self._started, output.num_tokens, output.num_sequences)
        self._steps.append(step)
        self._add(*step)
        if len(self._steps) > self._window:
            seconds, tokens, sequences = self._steps.popleft()
            self._add(-seconds, -tokens, -sequences)
        seconds = max(self._seconds, 1e-9)
        metrics = trainer.state.metrics
        metrics["train/tokens_per_second"] = self._tokens / seconds
        metrics["train/samples_per_second"] = self._sequences / seconds

    def _add(self, seconds: float, tokens: int, sequences: int) -> None:
        self._seconds += seconds
        self._tokens += tokens
        self._sequences += sequences
