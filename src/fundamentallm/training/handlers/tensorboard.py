"""Metrics for TensorBoard."""

from __future__ import annotations

import logging
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fundamentallm.events import TrainingEvents
from fundamentallm.training.handlers.base import HANDLERS

if TYPE_CHECKING:
    from fundamentallm.training.trainer import Trainer

logger = logging.getLogger(__name__)

FLUSH_SECONDS = 30.0  # a flush waits for the disk


@HANDLERS.register("tensorboard")
class TensorBoard:
    """Observes: writes every metric as a scalar to event files under `tensorboard/`.

    Args:
        run_dir: the run's directory.
    """

    def __init__(self, run_dir: Path) -> None:
        self.directory = run_dir / "tensorboard"
        self._writer: Any = None
        self._event: Any = None  # tensorboardX's classes, once they are imported
        self._summary: Any = None
        self._flushed_at = 0.0
        self._marks: list[tuple[int, str, int, str]] = []

    def attach(self, trainer: Trainer) -> None:
        """Write at FLLM_METRICS_READY and FLLM_EVALUATION_COMPLETED, on the rank that writes."""
        if not trainer.ranks.is_writer:
            return
        trainer.add_event_handler(TrainingEvents.FLLM_RUN_STARTED, self.open)
        trainer.add_event_handler(TrainingEvents.FLLM_ROLLED_BACK, self.mark_way_back)
        trainer.add_event_handler(TrainingEvents.FLLM_METRICS_READY, self.log_training)
        trainer.add_event_handler(TrainingEvents.FLLM_EVALUATION_COMPLETED, self.log_validation)
        trainer.add_event_handler(TrainingEvents.FLLM_INCIDENT_DETECTED, self.mark_incident)
        trainer.add_event_handler(TrainingEvents.FLLM_RUN_ENDED, self.close)

    def open(self, trainer: Trainer) -> None:
        """Begin a file at the current step; TensorBoard hides what older files say beyond it."""
        # Imported here: protobuf is not for those who switch this off. RecordWriter, since the
        # thread of SummaryWriter dies of a full disk, and the run would wait for it forever.
        from tensorboardX.proto.event_pb2 import SessionLog
        from tensorboardX.record_writer import RecordWriter

        self.close()
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            # Numbered, since files within one second would overwrite each other, and since
            # readers take them in the order of their names.
            number = len(list(self.directory.iterdir()))
            name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{number:04d}"
            self._writer = RecordWriter(str(self.directory / name))
        except OSError as error:
            self._give_up(error)
        step = trainer.state.iteration + 1
        self._add(step, file_version="brain.Event:2")
        self._add(step, session_log=SessionLog(status=SessionLog.START))

    def log_training(self, trainer: Trainer) -> None:
        """Write the step's training metrics if it is a logging step."""
        if trainer.is_log_step():
            self._write(trainer, "train/")

    def log_validation(self, trainer: Trainer) -> None:
        """Write the validation metrics."""
        self._write(trainer, "val/")

    def mark_incident(self, trainer: Trainer) -> None:
        """Write what was decided as a text, and a point in the count of incidents."""
        incident = trainer.state.incident
        if incident is not None:
            self._mark(incident.step, "incidents", trainer.state.incidents, str(incident))

    def mark_way_back(self, trainer: Trainer) -> None:
        """Begin a file where the run goes on from, and mark the place in it."""
        self.open(trainer)
        step = trainer.state.iteration
        hidden = [mark for mark in self._marks if mark[0] > step]
        self._marks = [mark for mark in self._marks if mark[0] <= step]
        for mark in hidden:
            self._mark(*mark)
        self._mark(step + 1, "rollbacks", trainer.state.rollbacks, f"went back to step {step}")

    def close(self) -> None:
        """Flush and close the file."""
        if self._writer is not None:
            try:
                self._writer.flush()
                self._writer.close()
            except OSError as error:
                self._give_up(error)
            self._writer = None

    def _mark(self, step: int, tag: str, count: int, text: str) -> None:
        from tensorboardX.proto.summary_pb2 import Summary
        from tensorboardX.summary import text as text_summary

        values = [Summary.Value(tag=tag, simple_value=count), *text_summary(tag, text).value]
        self._add(step, summary=Summary(value=values))
        self._marks.append((step, tag, count, text))

    def _write(self, trainer: Trainer, prefix: str) -> None:
        if self._summary is None:
            from tensorboardX.proto.summary_pb2 import Summary

            self._summary = Summary
        summary = self._summary()
        for key, value in trainer.state.metrics.items():
            if key.startswith(prefix):
                summary.value.add(tag=key, simple_value=value)
        self._add(trainer.state.iteration, summary=summary)

    def _add(self, step: int, **content: Any) -> None:
        if self._writer is None:
            return
        if self._event is None:
            from tensorboardX.proto.event_pb2 import Event

            self._event = Event
        now = time.time()
        try:
            self._writer.write(self._event(wall_time=now, step=step, **content).SerializeToString())
            if now - self._flushed_at >= FLUSH_SECONDS:
                self._flushed_at = now
                self._writer.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        logger.warning("TensorBoard files cannot be written, training goes on: %s", error)
        if self._writer is not None:
            with suppress(OSError):
                self._writer.close()
        self._writer = None
