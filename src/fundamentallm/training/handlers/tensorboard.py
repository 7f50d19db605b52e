"""Metrics for TensorBoard."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Any

from fundamentallm.files.filesystem import Filesystem
from fundamentallm.files.private import check_directory, make_directory
from fundamentallm.files.run_layout import TENSORBOARD
from fundamentallm.training.handlers.base import HANDLERS
from fundamentallm.training.handlers.metrics_writer import MetricsWriter, Record

FLUSH_SECONDS = 30.0  # a flush waits for the disk


@HANDLERS.register("tensorboard")
class TensorBoard(MetricsWriter):
    """Observes: writes every metric as a scalar to event files under `tensorboard/`.

    An incident and a rollback are a text and a point in the count of them.

    Args:
        run_dir: the run's directory.
    """

    target = "TensorBoard files"

    def __init__(self, run_dir: Path) -> None:
        self.directory = run_dir / TENSORBOARD
        self._writer: Any = None
        self._event: Any = None  # the class of a record
        self._flushed_at = 0.0

    def cut_back(self, step: int, evaluation_pending: bool) -> None:
        """Start a new file after the step; TensorBoard hides later steps of older files."""
        self.close()
        self._open(step + 1)

    def write(self, record: Record) -> None:
        """Write the metrics as scalars, and the text if there is one."""
        if self._writer is None:
            self._open(record.step)
        event = self._event(step=record.step)
        values = event.summary.value
        for name, number in record.metrics.items():
            values.add(tag=name, simple_value=number)
        if record.text:
            from tensorboardX.summary import text

            values.extend(text(record.kind, record.text).value)
        self._add(event)

    def close(self) -> None:
        """Flush and close the file."""
        writer, self._writer = self._writer, None
        if writer is not None:
            try:
                writer.flush()
            finally:
                writer.close()

    def _open(self, step: int) -> None:
        # Imported here: without this handler protobuf is not needed. RecordWriter, since the
        # thread of SummaryWriter dies of a full disk, and the run would wait for it forever.
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.record_writer import RecordWriter

        check_directory(self.directory)
        make_directory(self.directory)
        # Numbered, since files within one second would overwrite each other, and since readers
        # take them in the order of their names.
        number = len(list(self.directory.iterdir()))
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{number:04d}"
        Filesystem().create(self.directory / name).close()  # private, and not a link
        self._writer = RecordWriter(str(self.directory / name))
        self._event = Event
        self._add(Event(step=step, file_version="brain.Event:2"))
        self._add(Event(step=step, session_log=SessionLog(status=SessionLog.START)))

    def _add(self, event: Any) -> None:
        now = event.wall_time = time.time()
        self._writer.write(event.SerializeToString())
        if now - self._flushed_at >= FLUSH_SECONDS:
            self._flushed_at = now
            self._writer.flush()
