"""Where the epochs of a run begin and end."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Epochs:
    """Epochs of a fixed number of steps, but for those that a handler has ended early.

    The rest of the data of such an epoch is not trained on: the next step begins the next epoch. So
    the place in the data is a function of the step and of these cuts, which a checkpoint holds.

    A run whose steps get another number of rows goes on in its epoch: the first step of the new
    length begins behind the rows that were trained on. That is a cut too, at the step at which the
    epoch would have begun if all its steps had been of the new length.

    Attributes:
        length: steps in a whole epoch, since the last change of the rows.
        cuts: for each epoch that was ended early its last step and its number, from 1; for each
            change of the rows, the step before the first of its epoch and the epochs before that.
        lengths: for each cut the steps of a whole epoch before it.
        rows: rows of a step over all ranks, in the order of their changes: for each the last step
            that had so many (`None`: they are the present ones).
    """

    length: int
    cuts: list[tuple[int, int]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    rows: Sequence[tuple[int | None, int]] = ()

    def position(self, steps: int) -> tuple[int, int]:
        """Return where the data stand after so many steps: the epoch, from 0, and its steps."""
        if not self.cuts:
            return divmod(steps, self.length)
        number = self._number_of_cut(steps)
        first, epochs = self.cuts[number] if number >= 0 else (0, 0)
        length = ([*self.lengths, self.length])[number + 1]
        more, within = divmod(steps - first, length)
        return epochs + more, within

    def last_cut(self, steps: int) -> tuple[int, int]:
        """Return the last cut that is not later than a step; (0, 0) without one."""
        number = self._number_of_cut(steps)
        return self.cuts[number] if number >= 0 else (0, 0)

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
        self.lengths.append(self.length)
        return True

    def state_dict(self) -> list[list[int]]:
        """Return the cuts; one before which epochs had another length has that length as well."""
        return [
            [*cut] if length == self.length else [*cut, length]
            for cut, length in zip(self.cuts, self.lengths, strict=True)
        ]

    def load_state_dict(
        self, state_dict: Iterable[Any], length: int | None = None, step: int = 0
    ) -> bool:
        """Replace the cuts by saved ones.

        Args:
            state_dict: what `state_dict` returned.
            length: steps of a whole epoch then; as now if None.
            step: the step of the state.

        Returns:
            Whether the epochs are as long as they were, or it is known by which change of the rows
            they are not; if neither, nothing is replaced.
        """
        was = length or self.length
        saved = [tuple(int(number) for number in cut) for cut in state_dict]
        cuts = [(cut[0], cut[1]) for cut in saved]
        lengths = [cut[2] if len(cut) > 2 else was for cut in saved]
        if was != self.length:
            then = next((rows for last, rows in self.rows if last is None or step <= last), None)
            if then is None:
                return False
            epoch, within = Epochs(was, cuts, lengths).position(step)
            if within:
                # No row is trained on twice; fewer than a step's are left out.
                within = min(-(-within * then // self.rows[-1][1]), max(1, self.length - 1))
            cuts, lengths = [*cuts, (step - within, epoch)], [*lengths, was]
        self.cuts, self.lengths = cuts, lengths
        return True

    def _number_of_cut(self, steps: int) -> int:
        """Return which cut is the last that is not later than a step; -1 without one."""
        return next((i for i in reversed(range(len(self.cuts))) if self.cuts[i][0] <= steps), -1)
