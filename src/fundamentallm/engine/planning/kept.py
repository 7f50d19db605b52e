"""Small runs that were measured before, kept in the user's cache directory.

`$XDG_CACHE_HOME/fundamentallm/plans.json`, or `~/.cache/...`. So a plan that was interrupted goes
on, and a plan for another time begins with what is known. An entry belongs to a configuration, a
text, a machine and the versions that computed it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fundamentallm.compute.plan import Machine
from fundamentallm.config import RunConfig
from fundamentallm.engine.planning.trial import TrialResult
from fundamentallm.engine.tuning.speed_cache import circumstances_of
from fundamentallm.files.kept_figures import KeptFigures, cache_file


@dataclass(frozen=True, slots=True)
class Measured:
    """A small run and what it gave.

    Attributes:
        parameters, flops: of its model.
        steps: of the run.
        rate: its learning rate over that of the rule for its size.
        result: what it gave.
    """

    parameters: int
    flops: int
    steps: int
    rate: float
    result: TrialResult


class KeptRuns:
    """The small runs of one configuration on one text and machine.

    Args:
        facts: all that their results depend on, as plain values.
        path: of the file; None for the user's cache.

    Attributes:
        runs: in the order of their measurement.
    """

    def __init__(self, facts: Mapping[str, Any], path: Path | None = None) -> None:
        self._facts = facts
        self._kept: KeptFigures[Sequence[Measured]] = KeptFigures(
            path or cache_file("plans.json"), lambda rows: [_run(row) for row in rows], _plain
        )
        self.runs = list(self._kept.get(facts) or ())

    def add(self, run: Measured) -> None:
        """Add a run, durably; a disk error is only a warning."""
        self.runs.append(run)
        self._kept.put(self._facts, self.runs)


def _plain(runs: Sequence[Measured]) -> list[dict[str, float | None]]:
    return [
        {
            "parameters": run.parameters,
            "flops": run.flops,
            "steps": run.steps,
            "rate": run.rate,
            # JSON has no infinity.
            "loss": run.result.loss if math.isfinite(run.result.loss) else None,
            "token_seconds": run.result.token_seconds,
            "evaluation_seconds": run.result.evaluation_seconds,
        }
        for run in runs
    ]


def _run(values: Mapping[str, Any]) -> Measured:
    loss = math.inf if values["loss"] is None else float(values["loss"])
    seconds, evaluating = float(values["token_seconds"]), float(values["evaluation_seconds"])
    rate = float(values["rate"])
    parameters, flops, steps = (int(values[name]) for name in ("parameters", "flops", "steps"))
    if not (loss > 0 and 0 < seconds < math.inf and 0 <= evaluating < math.inf and rate > 0):
        raise ValueError("a figure is out of range")
    if min(parameters, flops, steps) < 1:
        raise ValueError("a size is out of range")
    return Measured(parameters, flops, steps, rate, TrialResult(loss, seconds, evaluating))


def facts_of(config: RunConfig, machine: Machine, sha256: str) -> dict[str, Any]:
    """Return all that the results of small runs depend on.

    Args:
        config: with everything resolved; its budget does not count.
        machine: where they are computed.
        sha256: of the text.
    """
    plain = config.to_dict()
    for field in ("name", "plugins"):
        plain.pop(field, None)
    for field in (
        *("total_steps", "max_seconds", "max_tokens", "stop_after_seconds", "num_epochs"),
        *("eval_steps", "eval_epochs", "log_steps", "checkpoint_steps", "checkpoint_dir"),
        *("keep_last",),
    ):
        plain["training"].pop(field, None)
    return {**circumstances_of(config, machine), "config": plain, "text": sha256}
