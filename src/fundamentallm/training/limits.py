"""When a run ends: the first limit that it meets, and how far it is from there."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from fundamentallm.compute.distributed import Ranks
from fundamentallm.config.training import TrainingConfig
from fundamentallm.training.state import TrainingState

logger = logging.getLogger(__name__)

_ENDS = 4  # measured ends that count, so that a handler which acts at every second one does
_LARGEST_SHARE = 0.5  # of the seconds that the end may take from the training


@dataclass(frozen=True, slots=True)
class Limits:
    """The budgets of a run, resolved.

    Attributes:
        total_steps: optimizer steps; None where only the clock ends the run.
        max_seconds: seconds of all processes of the run, each from its start, in which it ends.
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

    A limit in seconds holds for the whole run, its end included: the last save, validation and
    sample. Their time is kept free. It is the longest that the last few took, and before the first
    an estimate.

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
        self._not_in_steps = 0.0
        self._ends: deque[float] = deque(maxlen=_ENDS)
        self._estimates: list[Callable[[], float]] = []
        self._estimated: float | None = None

    def begin(self) -> None:
        """Measure the speed of the steps from now on."""
        self._began = self.clock(), self._state.iteration
        self._not_in_steps = 0.0

    def estimate_end(self, seconds: Callable[[], float]) -> None:
        """Have the seconds of a part of the end estimated, by a function that is called once."""
        self._estimates.append(seconds)

    @contextmanager
    def measuring_end(self) -> Iterator[None]:
        """Measure a block that does what the end of the run will do."""
        started = self.clock()
        yield
        self._ends.append(self.clock() - started)
        self._not_in_steps += self._ends[-1]

    def seconds_of_end(self) -> float:
        """Return the seconds that the end of the run will take; 0 as long as that is unknown."""
        return max(self._ends) if self._ends else self._estimated or 0.0

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
        progress = min(1.0, self.elapsed_seconds() / (seconds - self._kept_free(seconds)))
        if self._ranks.alone:
            return progress
        # Clocks differ, and ranks with different learning rates would drift apart.
        return self._ranks.sum_counts([round(progress * 1e9) * self._ranks.is_writer])[0] / 1e9

    def seconds_remaining(self, evaluations: int = 0) -> float | None:
        """Estimate the seconds to the end of the run; None without a basis for an estimate.

        Args:
            evaluations: those to come.
        """
        per_step = self._seconds_per_step()
        estimates = []
        if self.limits.max_seconds is not None:
            estimates.append(max(0.0, self.limits.max_seconds - self.elapsed_seconds()))
        if self.limits.total_steps is not None and per_step:
            training = per_step * (self.limits.total_steps - self._state.iteration)
            estimates.append(training + evaluations * self.seconds_of_end())
        return min(estimates) if estimates else None

    def is_used_up(self) -> bool:
        """Return whether a limit of seconds or tokens is met, on this rank.

        That of seconds is met with the step whose end is nearest to the time for the end.
        """
        if self.tokens_are_used_up():
            return True
        seconds = self.limits.max_seconds
        if seconds is None:
            return False
        if self._estimated is None and self._state.iteration >= self._began[1] + 2:
            self._take_estimates(seconds)
        now = self.elapsed_seconds() + 0.5 * self._seconds_per_step()
        return now >= seconds - self._kept_free(seconds)

    def has_time_to_evaluate(self) -> bool:
        """Return whether an evaluation would leave time for the one at the end, on this rank."""
        seconds = self.limits.max_seconds
        return seconds is None or self.elapsed_seconds() + 2 * self.seconds_of_end() < seconds

    def tokens_are_used_up(self) -> bool:
        """Return whether the limit of tokens is met."""
        tokens = self.limits.max_tokens
        return tokens is not None and self._state.tokens_seen >= tokens

    def _seconds_per_step(self) -> float:
        """Return the mean seconds of a step in this process, without evaluations; 0 before one."""
        began_at, first_step = self._began
        done = self._state.iteration - first_step
        return max(0.0, self.clock() - began_at - self._not_in_steps) / done if done > 0 else 0.0

    def _kept_free(self, seconds: float) -> float:
        return min(self.seconds_of_end(), _LARGEST_SHARE * seconds)

    def _take_estimates(self, seconds: float) -> None:
        started = self.clock()
        self._estimated = sum(estimate() for estimate in self._estimates)
        self._not_in_steps += self.clock() - started
        if self.seconds_of_end() > _LARGEST_SHARE * seconds and self._ranks.is_writer:
            logger.warning(
                "the validation and the sample at the end take about %.0f s, and max_seconds is %g:"
                " the run will end later; raise max_seconds, or lower the second fraction of"
                " data.split and handlers.samples.num_tokens",
                self.seconds_of_end(),
                seconds,
            )
