"""Learning-rate schedules: pure functions from an optimizer step to a multiplier.

Steps count updates from 1: the first update of a run uses `multiplier(1)`. A multiplier scales
the base learning rate of each parameter group. Since it depends only on the step, resume and
rollback have nothing to restore.

| name | multiplier of update k (W warmup steps, N total steps, f floor) |
|---|---|
| constant | 1 |
| linear_warmup | min(1, k / W) |
| cosine | k / W up to W; then f + (1 - f) (1 + cos(pi (k - W) / (N - W))) / 2; f after N |
| linear | k / W up to W; then a straight line from 1 to f at N; f after N |
| warmup_stable_decay | k / W up to W; 1; a straight line to f at N; f after N |
| exponential | rate ** epoch |
| inverse_square_root | k / W up to W; then sqrt(W / k) |

A run limited by the clock cannot know its last step. It passes `progress`, p, the share of its
time that is over. Warmup is then min(1, max(k / W, p / 0.1)): W updates, but a tenth of the time at
most. A schedule with a horizon is that times its course from p = 0 on, so nothing jumps where the
warmup ends.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from torch.optim import Optimizer

from fundamentallm.config.base import Fraction
from fundamentallm.errors import CheckpointError
from fundamentallm.registry import Registry


class LearningRateScheduler(ABC):
    """A schedule on an optimizer.

    A training run uses only `multiplier`. In a loop written by hand, call `step()` before each
    `optimizer.step()`: like that, update k has the learning rate `learning_rate(k)`.

    Args:
        optimizer: its groups' learning rates now are the base rates: build the schedule before
            the optimizer's state is loaded from a checkpoint.

    Attributes:
        optimizer: as given.
        base_lrs: base learning rate of each parameter group.
        last_step: how often `step` was called.
        uses_warmup: whether the schedule has a warmup whose length somebody must choose.
        needs_total: whether it has a horizon: the run's last step, or its progress in time.
    """

    uses_warmup: ClassVar[bool] = False
    needs_total: ClassVar[bool] = False

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.base_lrs = [float(group["lr"]) for group in optimizer.param_groups]
        self.last_step = 0

    @abstractmethod
    def multiplier(self, step: int, progress: float | None = None) -> float:
        """Return what the base rates are multiplied by; depends only on the arguments.

        Args:
            step: the number of the update, >= 1.
            progress: share of the run that is over, in [0, 1], where the clock limits the run;
                schedules with a horizon use it in place of step / total_steps.
        """

    def learning_rate(self, step: int, progress: float | None = None) -> float:
        """Return the first group's learning rate for update number `step`.

        Raises:
            ValueError: step is below 1 or progress outside [0, 1].
        """
        if step < 1:
            raise ValueError(f"updates are numbered from 1, got step {step}")
        if progress is not None and not 0 <= progress <= 1:
            raise ValueError(f"progress must be in [0, 1], got {progress}")
        return self.base_lrs[0] * self.multiplier(step, progress)

    def step(self, progress: float | None = None) -> float:
        """Advance to the next update, write its learning rates, and return the first group's."""
        learning_rate = self.learning_rate(self.last_step + 1, progress)
        self.last_step += 1
        multiplier = self.multiplier(self.last_step, progress)
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            if isinstance(group["lr"], Tensor):  # a compiled optimizer reads the tensor in place
                group["lr"].fill_(base * multiplier)
            else:
                group["lr"] = base * multiplier
        return learning_rate

    def state_dict(self) -> dict[str, Any]:
        """Return the count of calls of `step`; the rest comes from the constructor."""
        return {"last_step": self.last_step}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take the count back. The rates in the optimizer change with the next `step`.

        Raises:
            CheckpointError: the state is not a count of steps.
        """
        last_step = state_dict.get("last_step")
        if not isinstance(last_step, int) or isinstance(last_step, bool) or last_step < 0:
            raise CheckpointError(
                "the schedule's state is not that of a schedule",
                got=repr(dict(state_dict)),
                expected='{"last_step": an integer >= 0}',
                fix="load a checkpoint that was saved with a schedule of this package",
            )
        self.last_step = last_step


LONGEST_WARMUP = 0.1
"""Share of the time of a run that only the clock ends."""

SCHEDULERS: Registry[LearningRateScheduler] = Registry(
    "schedule",
    supplied=("optimizer", "total_steps", "warmup_steps", "min_lr", "steps_per_epoch"),
)


@SCHEDULERS.register("constant")
class ConstantLRScheduler(LearningRateScheduler):
    """The base learning rate throughout."""

    def multiplier(self, step: int, progress: float | None = None) -> float:
        """Return 1."""
        return 1.0


@SCHEDULERS.register("linear_warmup")
class LinearWarmup(LearningRateScheduler):
    """From 0 to the base learning rate in equal steps, then constant.

    Args:
        optimizer: as in the base class.
        warmup_steps: W; update k <= W has k / W of the base rate. 0 means no warmup.

    Raises:
        ValueError: warmup_steps is negative.
    """

    uses_warmup = True

    def __init__(self, optimizer: Optimizer, warmup_steps: int) -> None:
        super().__init__(optimizer)
        self.warmup_steps = _checked_warmup(warmup_steps)

    def multiplier(self, step: int, progress: float | None = None) -> float:
        """Return min(1, step / W)."""
        return _warmup(step, self.warmup_steps, progress)


class _HorizonScheduler(LearningRateScheduler):
    """Warmup, then a course from the base rate down to `min_lr`, which ends with the run."""

    uses_warmup = True
    needs_total = True

    def __init__(
        self, optimizer: Optimizer, total_steps: int, warmup_steps: int = 0, min_lr: float = 0.0
    ) -> None:
        super().__init__(optimizer)
        if total_steps < 1:
            raise ValueError(f"total_steps must be at least 1, got {total_steps}")
        self.total_steps = total_steps
        self.warmup_steps = _checked_warmup(warmup_steps)
        if warmup_steps >= total_steps:
            raise ValueError(
                f"warmup_steps ({warmup_steps}) must be below total_steps ({total_steps})"
            )
        base = self.base_lrs[0]
        if not 0 <= min_lr <= base:
            raise ValueError(f"min_lr must be in [0, {base}] (the base rate), got {min_lr}")
        self.floor = min_lr / base if min_lr else 0.0

    def multiplier(self, step: int, progress: float | None = None) -> float:
        """Return step / W during the warmup, then the course from 1 down to the floor."""
        if progress is not None:
            rise = _warmup(step, self.warmup_steps, progress)
            return rise * self._above_floor(self._height(progress, 0.0, 1.0))
        if step < self.warmup_steps:
            return _warmup(step, self.warmup_steps)
        return self._above_floor(self._height(step, self.warmup_steps, self.total_steps))

    def _above_floor(self, height: float) -> float:
        if height == 1.0:  # the sum below may miss it by a rounding error
            return 1.0
        # In this form rounding never makes a falling height a rising rate.
        return min(1.0, self.floor + height * (1.0 - self.floor))

    @abstractmethod
    def _height(self, position: float, start: float, end: float) -> float:
        """Return the height above the floor: 1 at `start`, 0 at `end`; in steps or in progress."""


@SCHEDULERS.register("cosine")
class CosineAnnealingScheduler(_HorizonScheduler):
    """Linear warmup, then half a cosine from the base rate to `min_lr`, which then holds.

    Loshchilov and Hutter 2017, equation 5, without restarts.

    Args:
        optimizer: as in the base class.
        total_steps: N, the update that has exactly the minimum, >= 1.
        warmup_steps: W, updates of linear warmup, below N.
        min_lr: the first group's learning rate at the end. Every group ends at the same multiple
            of its base, min_lr / (the first group's base).

    Raises:
        ValueError: a count is out of range, or min_lr is not in [0, first group's base].
    """

    def _height(self, position: float, start: float, end: float) -> float:
        return 0.5 * (1.0 + math.cos(math.pi * _covered(position, start, end)))


@SCHEDULERS.register("linear")
class LinearDecayScheduler(_HorizonScheduler):
    """Linear warmup, then a straight line from the base rate to `min_lr`, which then holds.

    At a fixed budget it beats the cosine (Defazio et al. 2023, "When, why and how much?", section
    4; Bergsma et al. 2025).

    Args:
        optimizer: as in the base class.
        total_steps: N, the update that has exactly the minimum, >= 1.
        warmup_steps: W, updates of linear warmup, below N.
        min_lr: the first group's learning rate at the end. Every group ends at the same multiple
            of its base, min_lr / (the first group's base).

    Raises:
        ValueError: a count is out of range, or min_lr is not in [0, first group's base].
    """

    def _height(self, position: float, start: float, end: float) -> float:
        return 1.0 - _covered(position, start, end)


@SCHEDULERS.register("warmup_stable_decay")
class WarmupStableDecayScheduler(_HorizonScheduler):
    """Linear warmup, the base rate for most of the run, then straight down to `min_lr`.

    The form of Hu et al. 2024 (MiniCPM, section 4) with the linear decay of Haegele et al. 2024.

    Args:
        optimizer: as in the base class.
        total_steps: N, the update that has exactly the minimum, >= 1.
        warmup_steps: W, updates of linear warmup, below N.
        min_lr: the first group's learning rate at the end. Every group ends at the same multiple
            of its base, min_lr / (the first group's base).
        decay_fraction: share of the N updates that the decay takes, in (0, 1]; it begins no
            sooner than the warmup ends.

    Raises:
        ValueError: a count or the fraction is out of range, or min_lr is not in
            [0, first group's base].
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        warmup_steps: int = 0,
        min_lr: float = 0.0,
        decay_fraction: Fraction = 0.2,
    ) -> None:
        super().__init__(optimizer, total_steps, warmup_steps, min_lr)
        if not 0 < decay_fraction <= 1:
            raise ValueError(f"decay_fraction must be in (0, 1], got {decay_fraction}")
        self.decay_fraction = decay_fraction

    def _height(self, position: float, start: float, end: float) -> float:
        return 1.0 - _covered(position, max(start, end * (1.0 - self.decay_fraction)), end)


@SCHEDULERS.register("exponential")
class ExponentialDecayScheduler(LearningRateScheduler):
    """A staircase: the base rate times decay_rate ** epoch, epochs counted from 0.

    Args:
        optimizer: as in the base class.
        steps_per_epoch: updates in one epoch, >= 1.
        decay_rate: what one epoch multiplies the rate by, in (0, 1].

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self, optimizer: Optimizer, steps_per_epoch: int, decay_rate: Fraction = 0.95
    ) -> None:
        super().__init__(optimizer)
        if steps_per_epoch < 1:
            raise ValueError(f"steps_per_epoch must be at least 1, got {steps_per_epoch}")
        if not 0 < decay_rate <= 1:
            raise ValueError(f"decay_rate must be in (0, 1], got {decay_rate}")
        self.steps_per_epoch = steps_per_epoch
        self.decay_rate = decay_rate

    def multiplier(self, step: int, progress: float | None = None) -> float:
        """Return decay_rate ** epoch; steps 1 .. steps_per_epoch are epoch 0."""
        return math.pow(self.decay_rate, (step - 1) // self.steps_per_epoch)


@SCHEDULERS.register("inverse_square_root")
class InverseSquareRootScheduler(LearningRateScheduler):
    """Linear warmup to the base rate, then falling as 1 / sqrt(step).

    Vaswani et al. 2017, equation 3, scaled so that its peak is the base learning rate.

    Args:
        optimizer: as in the base class.
        warmup_steps: W; update W has the base rate, update 4 W half of it. 0 is taken as 1.

    Raises:
        ValueError: warmup_steps is negative.
    """

    uses_warmup = True

    def __init__(self, optimizer: Optimizer, warmup_steps: int) -> None:
        super().__init__(optimizer)
        self.warmup_steps = max(1, _checked_warmup(warmup_steps))

    def multiplier(self, step: int, progress: float | None = None) -> float:
        """Return min(step / W, sqrt(W / step))."""
        if step < self.warmup_steps:
            return _warmup(step, self.warmup_steps, progress)
        return math.sqrt(self.warmup_steps / step)


def _warmup(step: int, warmup_steps: int, progress: float | None = None) -> float:
    if step >= warmup_steps:
        return 1.0
    risen = step / warmup_steps
    return risen if progress is None else min(1.0, max(risen, progress / LONGEST_WARMUP))


def _covered(position: float, start: float, end: float) -> float:
    """Return how much of the way from `start` to `end` is covered, in [0, 1]."""
    return min(1.0, max(0.0, (position - start) / (end - start)))


def _checked_warmup(warmup_steps: int) -> int:
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps must not be negative, got {warmup_steps}")
    return warmup_steps
