"""The base of all loggers: the records, when they are written, and what happens after a fault.

A logger is a subclass of `MetricsWriter` that has `write`, and `cut_back` and `close` if it
needs them; `examples/own_logger.py` is one for SQLite.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from fundamentallm.events import TrainingEvents
from fundamentallm.redaction import redacted
from fundamentallm.training.loop import TrainingLoop

logger = logging.getLogger(__name__)

MAX_FAILURES = 3  # one after the other


@dataclass(frozen=True)
class Record:
    """The record of one step.

    Attributes:
        kind: "train" of a step, "val" of an evaluation; "incidents" and "rollbacks" of one that
            happened: it stays true when the run goes back before its step; "samples" of a text
            that the model wrote, for the loggers of services alone.
        step: the step, from 1.
        epoch: the epoch, from 1.
        tokens: valid target tokens of the run so far, over all ranks.
        elapsed_seconds: of the run, those of earlier processes included.
        metrics: numbers by name, in the order of the names, NaN and infinity among them:
            `train/...` of a step, `val/...` of an evaluation, else the count so far, under the
            kind's name.
        text: the text of an incident, a rollback or a sample; else empty.
    """

    kind: Literal["train", "val", "incidents", "rollbacks", "samples"]
    step: int
    epoch: int
    tokens: int
    elapsed_seconds: float
    metrics: dict[str, float] = field(default_factory=dict)
    text: str = ""


class MetricsWriter(ABC):
    """Observes: hands the metrics of a run to a file or a service, on the rank that writes.

    Training metrics are written at every logging step, validation metrics after each evaluation.

    No fault of a logger ends a run. The first exception of a run is a warning, its traceback is in
    the log at debug level, and `close` is called; the next record is tried again. After
    three failures in a row the logger is left out for the rest of the run.

    Attributes:
        target: the name of the output, for the warning.
    """

    target = "metrics"
    _failures = 0
    _told = False

    @abstractmethod
    def write(self, record: Record) -> None:
        """Add a record; open what is not open, also after `close`."""

    def cut_back(self, step: int, evaluation_pending: bool) -> None:  # noqa: B027 (optional)
        """Remove later records when the run starts, is resumed or rolls back.

        Args:
            step: the run's present step; records of later steps are invalid. Those of incidents
                and rollbacks are written again.
            evaluation_pending: the evaluation after `step` will run again, so that its record is to
                go as well.
        """

    def close(self) -> None:  # noqa: B027 (optional)
        """Finish writing: the run ends, or a call has failed."""

    def attach(self, trainer: TrainingLoop) -> None:
        """Listen to a run's begin and end, metrics, incidents and rollbacks."""
        if not trainer.ranks.is_writer:
            return
        self._marks: list[Record] = []
        self._left_out: set[str] = set()  # metrics that are not numbers
        for event, listener in (
            (TrainingEvents.FLLM_RUN_STARTED, self._begin),
            (TrainingEvents.FLLM_ROLLED_BACK, self._go_back),
            (TrainingEvents.FLLM_LOG_DUE, self._log_training),
            (TrainingEvents.FLLM_EVALUATION_COMPLETED, self._log_validation),
            (TrainingEvents.FLLM_INCIDENT_DETECTED, self._mark_incident),
            (TrainingEvents.FLLM_RUN_ENDED, self._end),
        ):
            trainer.add_event_handler(event, listener)

    def _begin(self, trainer: TrainingLoop) -> None:
        self._failures, self._told = 0, False
        self._try(self.cut_back, trainer.state.iteration, trainer.evaluation_pending())

    def _go_back(self, trainer: TrainingLoop) -> None:
        step = trainer.state.iteration
        self._try(self.cut_back, step, trainer.evaluation_pending())
        for mark in self._marks:
            if mark.step > step:
                self._try(self.write, mark)
        text = f"went back to step {step}"
        self._mark(trainer, "rollbacks", step + 1, trainer.state.rollbacks, text)

    def _log_training(self, trainer: TrainingLoop) -> None:
        self._try(self.write, self._measured(trainer, "train"))

    def _log_validation(self, trainer: TrainingLoop) -> None:
        self._try(self.write, self._measured(trainer, "val"))

    def _mark_incident(self, trainer: TrainingLoop) -> None:
        incident = trainer.state.incident
        if incident is not None:
            count = trainer.state.incidents
            self._mark(trainer, "incidents", incident.step, count, str(incident))

    def _end(self) -> None:
        self._try(self.close)

    def _mark(
        self,
        trainer: TrainingLoop,
        kind: Literal["incidents", "rollbacks"],
        step: int,
        count: int,
        text: str,
    ) -> None:
        mark = self._record(trainer, kind, step, {kind: count}, text)
        self._marks.append(mark)
        self._try(self.write, mark)

    def _measured(self, trainer: TrainingLoop, kind: Literal["train", "val"]) -> Record:
        metrics = trainer.state.metrics
        # In an order of names: that of the dict depends on where the process began.
        numbers = {}
        prefix = f"{kind}/"
        for name in sorted(metrics):
            if not name.startswith(prefix):
                continue
            try:
                number = metrics[name]
                numbers[name] = number if isinstance(number, (int, float)) else float(number)
            except Exception:  # of a user's own handler
                if name not in self._left_out:
                    self._left_out.add(name)
                    logger.warning("%s lacks %s: it is not a number", self.target, name)
        return self._record(trainer, kind, trainer.state.iteration, numbers)

    @staticmethod
    def _record(
        trainer: TrainingLoop, kind: Any, step: int, metrics: dict[str, float], text: str = ""
    ) -> Record:
        seconds = trainer.budget.elapsed_seconds()
        tokens = trainer.state.tokens_seen
        return Record(kind, step, trainer.epoch, tokens, seconds, metrics, text)

    def _try(self, call: Callable[..., None], *args: Any) -> None:
        if self._failures >= MAX_FAILURES:
            return
        try:
            call(*args)
            self._failures = 0
        except Exception as error:  # anything that a logger, its library or its disk raises
            self._failures += 1
            logger.debug("%s: failure %d in a row", self.target, self._failures, exc_info=True)
            if not self._told:
                what = error if isinstance(error, OSError) else repr(error)
                logger.warning(
                    "%s cannot be written, training goes on: %s", self.target, redacted(str(what))
                )
            self._told = True
            with suppress(Exception):
                self.close()
