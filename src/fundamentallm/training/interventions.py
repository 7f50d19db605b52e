"""Changes to a run's plan: data to skip, and lower learning rates.

A healed run equals a clean run with the same interventions. Stored
runs keep them under the key `ledger`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fundamentallm.errors import CheckpointError


@dataclass(frozen=True)
class RateCut:
    """A learning rate lowered for some steps.

    Attributes:
        first: the first step that it holds for.
        last: the last one.
        factor: multiplies the schedule's rate.
    """

    first: int
    last: int
    factor: float


@dataclass
class Interventions:
    """The interventions of a run.

    Attributes:
        skipped: steps whose step batches are skipped.
        cuts: lowered rates; overlapping ones multiply.
    """

    skipped: set[int] = field(default_factory=set)
    cuts: list[RateCut] = field(default_factory=list)

    def skip(self, steps: Iterable[int]) -> None:
        """Skip the step batches of these steps from now on."""
        self.skipped.update(steps)

    def cut_rate(self, first: int, num_steps: int, factor: float) -> None:
        """Lower the learning rate of `num_steps` steps."""
        self.cuts.append(RateCut(first, first + num_steps - 1, factor))

    def rate_factor(self, step: int) -> float:
        """Return the factor for the schedule's rate at a step."""
        factor = 1.0
        for cut in self.cuts:
            if cut.first <= step <= cut.last:
                factor *= cut.factor
        return factor

    def state_dict(self) -> dict[str, Any]:
        """Return the interventions as plain values."""
        return {
            "skipped": sorted(self.skipped),
            "cuts": [[cut.first, cut.last, cut.factor] for cut in self.cuts],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Replace these interventions by saved ones.

        Raises:
            CheckpointError: a step or a factor among them is no number.
        """
        skipped, cuts = set(state_dict["skipped"]), [RateCut(*cut) for cut in state_dict["cuts"]]
        steps = [*skipped, *(step for cut in cuts for step in (cut.first, cut.last))]
        factors = [cut.factor for cut in cuts]
        if not all(type(step) is int for step in steps) or not all(
            type(factor) in (int, float) and math.isfinite(factor) for factor in factors
        ):
            raise CheckpointError(
                "the checkpoint's skipped steps or lowered rates are no numbers",
                got=repr(dict(state_dict))[:80],
            )
        self.skipped, self.cuts = skipped, cuts
