"""What a sweep keeps on the disk: its trials, their settings and results, in one JSON file.

sweeps/mine/
  sweep.json          replaced as a whole after each change
  0001-seed-42.yaml   the configuration of a run
  0001-seed-42/       its run directory
  comparison.html     written at the end
  .lock               locked by the process that trains
"""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from fundamentallm.config.base import BaseConfig, Count, Seed
from fundamentallm.config.run import RunConfig
from fundamentallm.config.sweep import Prune, SweepConfig
from fundamentallm.config.yaml.difference import config_differences, value_in_words
from fundamentallm.errors import CheckpointError
from fundamentallm.files.filesystem import Filesystem, replace_file
from fundamentallm.files.private import open_to_read

RECORD = "sweep.json"
MAX_BYTES = 64 << 20

State = Literal["complete", "pruned", "failed"]


class RunRecord(BaseConfig):
    """A run that has ended."""

    seed: Seed
    """Its seed."""

    state: State
    """How it ended."""

    reason: str
    """Why, in words."""

    evaluations: list[tuple[int, float | None]] = Field(default_factory=list)
    """(step, validation loss) of each evaluation; None for a loss that is not finite."""

    @property
    def best(self) -> float | None:
        """The lowest validation loss, None without a finite one."""
        return min((loss for _, loss in self.evaluations if loss is not None), default=None)

    def loss_at(self, step: int) -> float | None:
        """Return the loss at a step, infinity for one that is not finite, None without one."""
        return next(
            (math.inf if loss is None else loss for at, loss in self.evaluations if at == step),
            None,
        )


class TrialRecord(BaseConfig):
    """A trial: its settings, and its runs that have ended."""

    number: Count
    """From 1."""

    settings: dict[str, Any]
    """Values by key."""

    runs: list[RunRecord] = Field(default_factory=list)
    """In the order of their seeds."""

    @property
    def is_pruned(self) -> bool:
        """Whether a run was ended early; the trial then has no further runs."""
        return any(run.state == "pruned" for run in self.runs)

    @property
    def value(self) -> float | None:
        """The mean of the best losses, None unless all runs were completed."""
        losses = [run.best for run in self.runs if run.state == "complete"]
        known = [loss for loss in losses if loss is not None]
        return statistics.fmean(known) if known and len(known) == len(self.runs) else None

    def name(self, seed: int) -> str:
        """Return the name of the run with a seed."""
        return f"{self.number:04d}-seed-{seed}"


class SweepRecord(BaseConfig):
    """A sweep as far as it has come."""

    version: Literal[1] = 1
    """Of this form."""

    sweep: dict[str, Any]
    """The sweep as written."""

    base: dict[str, Any]
    """The configuration of all runs."""

    trials: list[TrialRecord] = Field(default_factory=list)
    """In order; the last one may have runs to go."""

    def difference(self, other: SweepRecord) -> str:
        """Return what makes another one a different sweep; empty if it goes on with this one.

        The number of trials may differ.
        """
        own = {"sweep": {**self.sweep, "trials": None}, "config": self.base}
        differences = config_differences(
            own, {"sweep": {**other.sweep, "trials": None}, "config": other.base}
        )
        if not differences:
            return ""
        key, was, now = differences[0]
        return f"{key}: {value_in_words(was)} there, {value_in_words(now)} now"

    def with_trial(self, trial: TrialRecord) -> SweepRecord:
        """Return a copy in which a trial is added, or replaced."""
        trials = [*self.trials[: trial.number - 1], trial, *self.trials[trial.number :]]
        return self.model_copy(update={"trials": trials})


def begun(sweep: SweepConfig, base: RunConfig) -> SweepRecord:
    """Return the record of a sweep without trials."""
    return SweepRecord(sweep=sweep.model_dump(mode="json"), base=base.model_dump(mode="json"))


def read_record(directory: Path) -> SweepRecord | None:
    """Return the record in a sweep's directory, None if there is none.

    Raises:
        CheckpointError: it is damaged.
    """
    path = directory / RECORD
    try:
        with open_to_read(path) as file:
            text = file.read(MAX_BYTES) or b""
    except FileNotFoundError:
        return None
    try:
        record = SweepRecord.model_validate_json(text)
    except ValidationError as error:
        finding = error.errors(include_url=False)[0]
        place = ".".join(map(str, finding["loc"]))
        raise CheckpointError(
            "the record of the sweep is damaged",
            where=str(path),
            got=f"{place}: {finding['msg']}" if place else finding["msg"],
            fix="restore a copy, or choose another directory with --sweep-dir",
        ) from None
    if [trial.number for trial in record.trials] != list(range(1, len(record.trials) + 1)):
        raise CheckpointError("the record of the sweep lacks trials", where=str(path))
    return record


def write_record(directory: Path, record: SweepRecord) -> None:
    """Replace the record, durably."""
    text = json.dumps(record.model_dump(mode="json"), indent=1, allow_nan=False) + "\n"
    replace_file(Filesystem(), directory / RECORD, [text.encode()])


def limits(prune: Prune, past: list[TrialRecord], last_step: int) -> list[list[int | float]]:
    """Return [step, highest loss] for the first seed of a new trial.

    A limit is the median over the first seeds of earlier trials that were evaluated at its step.

    Args:
        prune: when runs end early.
        past: the earlier trials.
        last_step: of the run; nothing is gained by ending it there.
    """
    first = [trial.runs[0] for trial in past if trial.runs]
    steps = sorted({step for run in first for step, _ in run.evaluations})
    found: list[list[int | float]] = []
    for step in steps:
        losses = [loss for run in first if (loss := run.loss_at(step)) is not None]
        if len(losses) < prune.trials or not prune.from_step <= step < last_step:
            continue
        limit = statistics.median(losses)
        if math.isfinite(limit):
            found.append([step, limit])
    return found
