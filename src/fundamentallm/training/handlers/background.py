"""The base of loggers that may be slow: their calls are made in a thread of their own."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from fundamentallm.training.handlers.metrics_writer import MetricsWriter, Record
from fundamentallm.training.loop import TrainingLoop

logger = logging.getLogger(__name__)

MAX_WAITING = 10_000  # calls; a record takes about a kilobyte
THREAD_NAME = "logger "
GATHERING_SECONDS = 1.0  # between two calls: one call then takes all records of that time


class BackgroundWriter(MetricsWriter):
    """Observes: a `MetricsWriter` whose calls never hold up the training.

    `write_all`, `cut_back` and `close` run in a thread, one after the other and in the order of the
    run. The training only puts records into a queue of 10,000; what does not fit is dropped, and
    the number of records that were not written is a warning at the end of the run.

    The end of a run waits until everything is written, but at most `flush_seconds`; of a run that
    is shorter than `call_seconds`, at least until those have passed since its start, for a service
    takes its time to open. It does not wait for a call that has already taken more than
    `call_seconds`. What is not written by then is left behind: a process can end before it.

    A subclass has `write_all` (or `write` alone, for one record at a time), and `cut_back` and
    `close` if it needs them.

    Args:
        flush_seconds: how long the end of a run waits.
        call_seconds: how long a call may take before a warning says so.

    Raises:
        ValueError: a number is negative.
    """

    def __init__(self, flush_seconds: float = 10.0, call_seconds: float = 30.0) -> None:
        for name, number in (("flush_seconds", flush_seconds), ("call_seconds", call_seconds)):
            if number < 0:
                raise ValueError(f"{name} must be at least 0, got {number}")
        self.flush_seconds = flush_seconds
        self.call_seconds = call_seconds
        self._waiting: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._changed = threading.Condition()  # guards the queue, `_ending` and `_working`
        self._ending = self._working = False
        self._thread: threading.Thread | None = None
        self._began = self._call_began = math.inf
        self._limit = call_seconds
        self._given = self._written = 0  # records of this run
        self._told_of_hanging = False

    def write(self, record: Record) -> None:
        """Add a record."""
        self.write_all([record])

    def write_all(self, records: Sequence[Record]) -> None:
        """Add records in the order of the run."""
        for record in records:
            self.write(record)

    # ------------------------------------------------------------------ in the run's thread

    def _begin(self, trainer: TrainingLoop) -> None:
        self._began, self._told_of_hanging = time.monotonic(), False
        self._given = self._written = 0
        super()._begin(trainer)
        with self._changed:
            left_behind = self._working  # by an earlier run of this trainer
            self._ending, self._working = False, True
        if not left_behind:
            # A daemon: the process does not wait for it.
            name = THREAD_NAME + self.target
            self._thread = threading.Thread(target=self._work, name=name, daemon=True)
            self._thread.start()

    def _try(self, call: Callable[..., None], *args: Any) -> None:
        is_record = call == self.write
        self._given += is_record
        with self._changed:
            if not is_record or len(self._waiting) < MAX_WAITING:
                self._waiting.append((call, args))
        if self._hangs() and not self._told_of_hanging:
            self._told_of_hanging = True
            logger.warning(
                "%s has not answered for %.0f s; training goes on, and its records wait",
                self.target,
                self._limit,
            )

    def _end(self) -> None:
        super()._end()
        with self._changed:
            self._ending = True
            self._changed.notify()
        until = max(time.monotonic() + self.flush_seconds, self._began + self.call_seconds)
        thread = self._thread
        assert thread is not None
        while thread.is_alive() and time.monotonic() < until and not self._hangs():
            thread.join(0.05)
        with self._changed:
            lost = self._given - self._written
            if self._waiting:
                self._waiting.clear()
                self._waiting.append((self.close, ()))
        if thread.is_alive():
            logger.warning("%s did not end in time and is left behind", self.target)
        if lost > 0:
            logger.warning("%s lacks %d records of this run", self.target, lost)

    def _hangs(self) -> bool:
        return time.monotonic() - self._call_began > self._limit

    def _limit_of(self, call: Callable[..., None]) -> float:
        """Return how long a call may take, in seconds."""
        return self.call_seconds

    # ------------------------------------------------------------------ in the thread

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._ending, GATHERING_SECONDS)
                calls = self._next_calls()
                if not calls:
                    if not self._ending:
                        continue
                    self._working = False
                    return
            call, args = calls[0]
            if call == self.write:
                call, args = self.write_all, ([args[0] for _, args in calls],)
            self._limit, self._call_began = self._limit_of(call), time.monotonic()
            super()._try(call, *args)
            self._call_began = math.inf
            if call == self.write_all and not self._failures:
                self._written += len(calls)

    def _next_calls(self) -> list[tuple[Callable[..., None], tuple[Any, ...]]]:
        """Take the records that come next, or one other call; nothing if nothing waits."""
        calls: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
        while self._waiting and (not calls or calls[0][0] == self._waiting[0][0] == self.write):
            calls.append(self._waiting.popleft())
        return calls
