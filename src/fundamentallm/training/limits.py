"""When a run ends: the first limit that it meets, and how far it is from there."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from fundamentallm.compute.distributed import Ranks
from fundamentallm.config.training import TrainingConfig
from fundamentallm.training.state import TrainingState


@dataclass(frozen=True, slots=True)
class Limits:
    """The budgets of a run, resolved.

    Attributes:
        total_steps: optimizer steps; None where only the clock ends the run.
        max_seconds: seconds from process start after which the run is finished.
        max_tokens: training tokens after which the run is finished.
        num_epochs: epochs after which the run is finished, where `total_steps` follows from
            them: an epoch that a handler ends early makes the run shorter.
    """

    total_steps: int | None
    max_seconds: float | None = None
    max_tokens: int | None = None
    num_epochs: int | None = None

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
        num_epochs = None
        if total is None and config.max_tokens is None and config.max_seconds is None:
            num_epochs = config.num_epochs
            total = num_epochs * steps_per_epoch
        return cls(total, config.max_seconds, config.max_tokens, num_epochs)

    @property
    def follows_clock(self) -> bool:
        """Whether only the clock ends the run, so that its schedule must follow the clock."""
        return self.total_steps is None and self.max_seconds is not None


class Budget:
    """How much of its limits a run has used.

    Args:
        limits: when the run ends.
        state: counts steps, tokens, and the seconds of earlier processes.
        ranks: the processes of the run.

    Attributes:
        limits: as given; may be replaced between two runs.
        clock: returns the seconds of the run in this process.
    """

    def __init__(self, limits: Limits, state: TrainingState, ranks: Ranks) -> None:
        self.limits = limits
        self._state, self._ranks = state, ranks
        constructed = time.monotonic()
        self.clock: Callable[[], float] = lambda: time.monotonic() - constructed
        self._began = (0.0, 0)

    def begin(self) -> None:
        """Measure the speed of the steps from now on."""
        self._began = self.clock(), self._state.iteration

    def elapsed_seconds(self) -> float:
        """Return the seconds of this run, those of earlier processes included."""
        return float(self._state.elapsed_before) + self.clock()

    def clock_progress(self) -> float | None:
        """Return the used part of a budget in seconds, in [0, 1]; None where steps count.

        By the first rank's clock; every rank must call it.
        """
        seconds = self.limits.max_seconds
        if seconds is None or not self.limits.follows_clock:
            return None
        progress = min(1.0, self.elapsed_seconds() / seconds)
        if self._ranks.alone:
            return progress
        # Clocks differ, and ranks with different learning rates would drift apart.
        return self._ranks.sum_counts([round(progress * 1e9) * self._ranks.is_writer])[0] / 1e9

    def seconds_remaining(self) -> float | None:
        """Estimate the seconds to the end of the run; None without a basis for an estimate."""
        began_at, first_step = self._began
        done = self._state.iteration - first_step
        estimates = []
        if self.limits.max_seconds is not None:
            estimates.append(max(0.0, self.limits.max_seconds - self.elapsed_seconds()))
        if self.limits.total_steps is not None and done > 0:
            per_step = (self.clock() - began_at) / done
            estimates.append(per_step * (self.limits.total_steps - self._state.iteration))
        return min(estimates) if estimates else None

    def is_used_up(self) -> bool:
        """Return whether a limit of seconds or tokens is met, on this rank."""
        seconds = self.limits.max_seconds
        is_late = seconds is not None and self.elapsed_seconds() >= seconds
        return is_late or self.tokens_are_used_up()

    def tokens_are_used_up(self) -> bool:
        """Return whether the limit of tokens is met."""
        tokens = self.limits.max_tokens
        return tokens is not None and self._state.tokens_seen >= tokens
