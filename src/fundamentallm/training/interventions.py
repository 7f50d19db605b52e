"""What a run was told to do differently: data to skip, and lower learning rates.

A run that healed and a clean run that is given the same interventions are the same run. Stored
runs keep them under the key `ledger`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class RateCut:
    """A learning rate lowered for a while.

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
    """The exceptions of a run.

    Attributes:
        skipped: steps whose windows are passed over.
        cuts: lowered rates; where several hold, they multiply.
    """

    skipped: set[int] = field(default_factory=set)
    cuts: list[RateCut] = field(default_factory=list)

    def skip(self, steps: Iterable[int]) -> None:
        """Pass over the windows of these steps from now on."""
        self.skipped.update(steps)

    def cut_rate(self, first: int, num_steps: int, factor: float) -> None:
        """Lower the learning rate of `num_steps` steps."""
        self.cuts.append(RateCut(first, first + num_steps - 1, factor))

    def rate_factor(self, step: int) -> float:
        """Return what the schedule's rate is multiplied by at a step."""
        factor = 1.0
        for cut in self.cuts:
            if cut.first <= step <= cut.last:
                factor *= cut.factor
        return factor

    def state_dict(self) -> dict[str, Any]:
        """Return the exceptions as plain values."""
        return {
            "skipped": sorted(self.skipped),
            "cuts": [[cut.first, cut.last, cut.factor] for cut in self.cuts],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over saved exceptions in place of these."""
        self.skipped = set(state_dict["skipped"])
        self.cuts = [RateCut(*cut) for cut in state_dict["cuts"]]
