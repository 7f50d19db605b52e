"""Where the epochs of a run begin and end."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Epochs:
    """Epochs of a fixed number of steps, but for those that a handler has ended early.

    The rest of the data of such an epoch is not trained on: the next step begins the next epoch. So
    the place in the data is a function of the step and of these cuts, which a checkpoint holds.

    Attributes:
        length: steps in a whole epoch.
        cuts: for each epoch that was ended early its last step and its number, from 1.
    """

    length: int
    cuts: list[tuple[int, int]] = field(default_factory=list)

    def position(self, steps: int) -> tuple[int, int]:
        """Return where the data stand after so many steps: the epoch, from 0, and its steps."""
        if not self.cuts:
            return divmod(steps, self.length)
        first, epochs = self.last_cut(steps)
        more, within = divmod(steps - first, self.length)
        return epochs + more, within

    def last_cut(self, steps: int) -> tuple[int, int]:
        """Return the last cut that is not later than a step; (0, 0) without one."""
        return next((cut for cut in reversed(self.cuts) if cut[0] <= steps), (0, 0))

    def number(self, step: int) -> int:
        """Return the epoch, from 1, that a step belongs to; 0 before the first step."""
        return self.position(step - 1)[0] + 1 if step else 0

    def end_with(self, step: int) -> bool:
        """Whether the last of so many steps ends an epoch; true of 0 as well."""
        return self.position(step)[1] == 0

    def last_step(self, epoch: int) -> int:
        """Return the last step of an epoch, from 1, if none is ended early from now on."""
        first, epochs = self.cuts[-1] if self.cuts else (0, 0)
        return first + (epoch - epochs) * self.length

    def end_early(self, step: int) -> bool:
        """End the epoch with a step; return whether it would not have ended there anyway."""
        if self.end_with(step):
            return False
        self.cuts.append((step, self.number(step)))
        return True

    def state_dict(self) -> list[list[int]]:
        """Return the cuts."""
        return [list(cut) for cut in self.cuts]

    def load_state_dict(self, state_dict: Iterable[Any]) -> None:
        """Replace the cuts by saved ones."""
        self.cuts = [(int(step), int(epoch)) for step, epoch in state_dict]
