"""What a trainer knows about its run at this moment: Ignite's state, with our fields typed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ignite.engine import State

from fundamentallm.errors import CheckpointError
from fundamentallm.training.recovery.diagnosis import Incident
from fundamentallm.training.saved import LARGEST
from fundamentallm.training.step import StepOutput

# The counters of a run and their values at its start. All are in every checkpoint.
COUNTERS: dict[str, int | float] = {
    "tokens_seen": 0,
    "sequences_seen": 0,
    "micro_batches": 0,
    "optimizer_steps": 0,
    "skipped_steps": 0,
    "evaluations": 0,
    "evaluated_step": -1,
    "checkpoints": 0,
    "incidents": 0,
    "rollbacks": 0,
    "epoch_nll": 0.0,
    "epoch_tokens": 0,
    "elapsed_before": 0.0,
}
# A rollback does not reset these: they happened, and stay.
IRREVERSIBLE = ("incidents", "rollbacks", "elapsed_before")


def check_counters(saved: Mapping[str, Any]) -> None:
    """Refuse saved counters that are none: each is a finite number, and where it counts an integer.

    Raises:
        CheckpointError: one is something else.
    """
    for name, start in {"iteration": 0, **COUNTERS}.items():
        value = saved.get(name, start)
        if isinstance(start, int):
            fits = isinstance(value, int) and -1 <= value <= LARGEST
        else:
            fits = isinstance(value, int | float) and math.isfinite(value)
        if not fits or isinstance(value, bool):
            raise CheckpointError(
                f"the checkpoint's counter '{name}' is none", got=repr(value)[:80]
            )


class Sample(NamedTuple):
    """A text that the model has written.

    Attributes:
        step: the step of its weights.
        prompt: the text that it continues.
        text: the continuation.
    """

    step: int
    prompt: str
    text: str


class TrainingState(State):
    """The state of a run, in addition to Ignite's `State`.

    Attributes:
        iteration: the current step, from 1; 0 before the first.
        output: what the current step did.
        max_epochs: the epochs of the run, the last one perhaps in part; infinity if only the
            clock or the tokens end it.
        metrics: the newest value of every metric, under its name in the logs.
        tokens_seen: valid target tokens of all windows so far, over all ranks.
        sequences_seen: their sequences.
        micro_batches: this rank's micro-batches so far.
        optimizer_steps: updates applied.
        skipped_steps: updates refused, and windows passed over.
        evaluations: validations begun.
        evaluated_step: the step of the last complete validation, -1 before the first.
        checkpoints: checkpoints saved.
        incidents: numerical incidents: faults, and spikes that were reported or refused.
        rollbacks: times that the run went back.
        epoch_nll: summed loss of the epoch so far, in nats.
        epoch_tokens: its valid tokens.
        elapsed_before: seconds of training in earlier processes.
        incident: the newest numerical incident, None before the first.
        last_checkpoint: the directory of the newest checkpoint, None before the first.
        sample: the newest sample of generated text, None before the first.
    """

    iteration: int
    output: StepOutput  # type: ignore[assignment]
    max_epochs: float | None  # type: ignore[assignment]
    metrics: dict[str, Any]
    tokens_seen: int
    sequences_seen: int
    micro_batches: int
    optimizer_steps: int
    skipped_steps: int
    evaluations: int
    evaluated_step: int
    checkpoints: int
    incidents: int
    rollbacks: int
    epoch_nll: float
    epoch_tokens: int
    elapsed_before: float
    last_checkpoint: Path | None
    incident: Incident | None
    sample: Sample | None

    def __init__(self) -> None:
        super().__init__(metrics={}, last_checkpoint=None, incident=None, sample=None, **COUNTERS)

    def seen_by_handlers(self) -> dict[str, Any]:
        """Return the output and the metrics that are numbers, as plain values."""
        numbers = {k: v for k, v in self.metrics.items() if isinstance(v, int | float)}
        output = self.output.__getnewargs__() if isinstance(self.output, StepOutput) else ()
        return {"output": list(output), "metrics": numbers}

    def show_handlers(self, seen: Mapping[str, Any] | None) -> None:
        """Put those back, where a checkpoint holds them."""
        if seen is not None and seen["output"]:
            self.output = StepOutput(*seen["output"])
            self.metrics.update(seen["metrics"])
