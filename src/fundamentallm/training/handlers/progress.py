"""Progress on the terminal."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TextIO

from ignite.engine import Events
from tqdm import tqdm

from fundamentallm.config.base import NonNegative
from fundamentallm.events import TrainingEvents
from fundamentallm.files.terminal import room_in
from fundamentallm.training.handlers.base import HANDLERS
from fundamentallm.training.loop import TrainingLoop

logger = logging.getLogger(__name__)

DISPENSABLE = ("mfu", "speed", "lr", "ema", "eta")
"""Figures that a narrow terminal does without, the first of them first."""
SHORTEST_BAR = 3


@HANDLERS.register("progress")
class Progress:
    """Observes: a progress bar on a terminal, regular lines elsewhere.

    Both show loss, smooth loss, learning rate, tokens per second and the remaining time.

    Args:
        min_interval: seconds between two lines without a terminal.
        stream: the stream for the bar, used only if it is a terminal.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        min_interval: NonNegative = 5.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.min_interval = min_interval
        self._stream = stream if stream is not None else sys.stderr  # None where it is closed
        self._clock = clock
        self._bar: tqdm[Any] | None = None
        self._shown_at = -math.inf

    def attach(self, trainer: TrainingLoop) -> None:
        """Show at FLLM_METRICS_READY, on the rank that prints."""
        if not trainer.ranks.is_writer:
            return
        trainer.add_event_handler(Events.STARTED, self.open)
        trainer.add_event_handler(TrainingEvents.FLLM_RUN_ENDED, self.close)
        trainer.add_event_handler(TrainingEvents.FLLM_METRICS_READY, self.show)
        evaluated = partial(self.show_evaluation, trainer)
        trainer.evaluator.add_event_handler(Events.ITERATION_STARTED, evaluated)
        for event, activity in (
            (TrainingEvents.FLLM_CHECKPOINT_DUE, "saving"),
            (TrainingEvents.FLLM_EVALUATION_COMPLETED, "sampling"),
        ):
            trainer.add_event_handler(event, self.show_activity, activity)

    def open(self, trainer: TrainingLoop) -> None:
        """Show the bar at the run's current step; after a rollback, move it back."""
        if self._stream is None or not self._stream.isatty():
            return
        if self._bar is None:
            self._bar = tqdm(
                total=trainer.total_steps,
                file=self._stream,
                unit="step",
                ncols=room_in(self._stream),
                bar_format="{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"
                if trainer.total_steps is not None
                else "{desc}{n_fmt} steps{postfix}",
            )
        self._bar.n = trainer.state.iteration
        self._bar.refresh()

    def show(self, trainer: TrainingLoop) -> None:
        """Bring the bar up to date, or write a line if the last is old enough."""
        state = trainer.state
        last = state.iteration == trainer.total_steps
        now = self._clock()
        if self._bar is not None:
            # Formatting costs more than a small step: ten times a second is as fast as one reads.
            if last or now - self._shown_at >= 0.1:
                self._shown_at = now
                self._bar.n = state.iteration
                self._bar.ncols = room_in(self._stream)
                self._bar.set_postfix_str(self._fitting(trainer), refresh=True)
        elif last or now - self._shown_at >= self.min_interval:
            self._shown_at = now
            total = f"/{trainer.total_steps}" if trainer.total_steps is not None else ""
            figures = ", ".join(self._figures(trainer).values())
            logger.info("step %d%s: %s", state.iteration, total, figures)

    def show_evaluation(self, trainer: TrainingLoop) -> None:
        """Show which batch is measured, as often as a step is shown."""
        number, data = trainer.evaluator.state.iteration, trainer.val_loader
        activity = f"evaluating {number}/{len(data)}" if data is not None else "evaluating"
        now = self._clock()
        if number == 1 and self._bar is None:
            self._shown_at = now
        if now - self._shown_at < (self.min_interval if self._bar is None else 0.1):
            return
        self._shown_at = now
        if self._bar is None:
            logger.info("step %d: %s", trainer.state.iteration, activity)
        else:
            self.show_activity(trainer, activity)

    def show_activity(self, trainer: TrainingLoop, activity: str) -> None:
        """Show in the bar what is done between two steps."""
        is_idle = {
            "saving": trainer.restore_point is None,
            "sampling": not trainer.has_role("sampling"),
        }
        if self._bar is None or is_idle.get(activity, False):
            return
        self._bar.n = trainer.state.iteration
        self._bar.ncols = room_in(self._stream)
        self._bar.set_postfix_str(self._fitting(trainer, activity), refresh=True)

    def close(self) -> None:
        """Close the bar; its last state stays on the terminal."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _fitting(self, trainer: TrainingLoop, activity: str = "") -> str:
        """Return the figures that the terminal has room for; loss and remaining time go last."""
        assert self._bar is not None
        figures = {"activity": activity} if activity else {}
        figures |= self._figures(trainer)
        if self._bar.ncols is not None:
            total = self._bar.total
            counts = f"100%|{' ' * SHORTEST_BAR}| {total}/{total}" if total else "100000 steps"
            room = self._bar.ncols - len(counts)
            for name in DISPENSABLE:
                if sum(len(text) + 2 for text in figures.values()) <= room:
                    break
                figures.pop(name, None)
        return ", ".join(figures.values())

    def _figures(self, trainer: TrainingLoop) -> dict[str, str]:
        metrics = trainer.state.metrics
        figures = {}
        if "train/loss" in metrics:
            figures["loss"] = f"loss {metrics['train/loss']:.4f}"
        if "train/loss_ema" in metrics:
            figures["ema"] = f"ema {metrics['train/loss_ema']:.4f}"
        if "train/lr" in metrics:
            figures["lr"] = f"lr {metrics['train/lr']:.2e}"
        if "train/tokens_per_second" in metrics:
            figures["speed"] = f"{metrics['train/tokens_per_second']:,.0f} tok/s"
        if "train/mfu" in metrics:
            figures["mfu"] = f"MFU {metrics['train/mfu']:.1%}"
        remaining = trainer.seconds_remaining()
        if remaining is not None:
            figures["eta"] = f"ETA {format_seconds(remaining)}"
        return figures


def format_seconds(seconds: float) -> str:
    """Return `h:mm:ss` or `m:ss`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
