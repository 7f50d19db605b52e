"""When a run ends: the first limit that it meets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fundamentallm.config.training import TrainingConfig


@dataclass(frozen=True, slots=True)
class Limits:
    """The budgets of a run, resolved.

    Attributes:
        total_steps: optimizer steps; None where only the clock ends the run.
        max_seconds: seconds from process start after which the run is finished.
        max_tokens: training tokens after which the run is finished.
    """

    total_steps: int | None
    max_seconds: float | None = None
    max_tokens: int | None = None

    @classmethod
    def resolve(
        cls,
        config: TrainingConfig,
        steps_per_epoch: int,
        steps_for_tokens: Callable[[int], int] | None = None,
    ) -> Limits:
        """Turn the budgets of a configuration into limits.

        `num_epochs` counts only where no other budget is set.

        Args:
            config: the budgets.
            steps_per_epoch: optimizer steps in one pass over the training data.
            steps_for_tokens: the fewest steps of the loader that hold so many tokens, where it
                knows; turns `max_tokens` into a number of steps, which a schedule can aim at.
        """
        total = config.total_steps
        if config.max_tokens is not None and steps_for_tokens is not None:
            steps = steps_for_tokens(config.max_tokens)
            total = steps if total is None else min(total, steps)
        if total is None and config.max_tokens is None and config.max_seconds is None:
            total = config.num_epochs * steps_per_epoch
        return cls(total, config.max_seconds, config.max_tokens)

    @property
    def follows_clock(self) -> bool:
        """Whether only the clock ends the run, so that its schedule must follow the clock."""
        return self.total_steps is None and self.max_seconds is not None
