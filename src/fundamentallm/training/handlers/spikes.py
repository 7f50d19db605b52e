"""Finite outliers of the loss and of the gradient norm."""

from __future__ import annotations

import logging
import math
from typing import Annotated, Any, Literal

from pydantic import Field

from fundamentallm.config.base import Count, Positive
from fundamentallm.errors import ConfigError
from fundamentallm.events import TrainingEvents
from fundamentallm.training.handlers.base import HANDLERS
from fundamentallm.training.loop import TrainingLoop
from fundamentallm.training.recovery.diagnosis import DIVERGENCE, SPIKE, Incident
from fundamentallm.training.recovery.outliers import RobustWindow
from fundamentallm.training.saved import saved_count, saved_numbers, saved_pairs

logger = logging.getLogger(__name__)

EVERY = 8  # accepted steps between two updates of the statistics: of 128 values, 8 change little


@HANDLERS.register("spikes")
class Spikes:
    """Observes, or controls: looks for a loss or a gradient norm that is unusually high.

    A spike: a step's figure is compared with the median of the last accepted steps, in units of
    their MAD; of the norm, which varies by factors, the logarithm. A step that stands out never
    enters the history. A rise: the median of the newest losses has left the lowest one that the run
    has had, too slowly for any step to stand out. Both figures are sums over the ranks that the
    guard has read already, so every rank sees the same and nothing is read twice.

    Policies:

    - report: says so, once for a series of spikes, and lets the update pass. After `patience` in
      a row this is the new level, and the history is cleared; also after a rise.
    - reject: the update is refused and the step batch skipped. After `patience` in a row,
      and after a rise, the weights are the cause, and the run rolls back as after a divergence.
    - rollback: the run rolls back at the first spike, and after a rise.

    For the last two, `nan_rollback` acts and sets the limits.

    Args:
        policy: what a spike leads to.
        threshold: robust standard deviations above the median that make a spike.
        window: accepted steps that are remembered.
        needed: accepted steps before the statistics hold; until then a loss is a spike if it is
            more than twice the median up to then.
        patience: spikes in a row after which `report` takes the new level for normal, and `reject`
            rolls the run back.
        rise: robust standard deviations by which the median of the newest `needed` losses may lie
            above its lowest; None: no check for a rise.
    """

    def __init__(
        self,
        policy: Literal["report", "reject", "rollback"] = "report",
        threshold: Positive = 10.0,
        window: Annotated[int, Field(ge=2)] = 128,
        needed: Annotated[int, Field(ge=2)] = 32,
        patience: Count = 8,
        rise: Positive | None = 4.0,
    ) -> None:
        if not threshold > 0.0:
            raise ValueError(f"threshold must be positive, got {threshold}")
        if patience < 1:
            raise ValueError(f"patience must be at least 1, got {patience}")
        if rise is not None and not rise > 0.0:
            raise ValueError(f"rise must be positive or null, got {rise}")
        self.policy = policy
        self.threshold = threshold
        self.patience = patience
        # The first losses are near that of guessing, and none of a sound run is twice as large.
        self.losses = RobustWindow(window, needed, floor=0.02, early=1.0 / threshold)
        # A scale of 0.1 is a tenth more or less: calmer than that no gradient norm is.
        self.norms = RobustWindow(window, needed, floor=0.0, smallest=0.1)
        self.rise = rise
        self.newest = RobustWindow(needed, needed, floor=0.02)
        self.lowest = math.inf
        self.lowest_scale = math.inf
        self.in_a_row = 0
        self._accepted: list[tuple[float, float]] = []
        self._found = ""
        self._take_limits()

    def attach(self, trainer: TrainingLoop) -> None:
        """Look before each update; count what was accepted after it."""
        trainer.add_event_handler(TrainingEvents.FLLM_RUN_STARTED, self.check)
        if self.policy == "report":
            trainer.add_event_handler(TrainingEvents.FLLM_OPTIMIZER_STEPPED, self.look_and_accept)
        else:
            trainer.add_event_handler(TrainingEvents.FLLM_GRADIENTS_READY, self.look_and_refuse)
            trainer.add_event_handler(TrainingEvents.FLLM_OPTIMIZER_STEPPED, self.accept)

    def check(self, trainer: TrainingLoop) -> None:
        """Refuse a policy that no handler would carry out.

        Raises:
            ConfigError: `nan_rollback` is switched off.
        """
        if self.policy != "report" and not trainer.has_role("recovery"):
            raise ConfigError(
                f"policy {self.policy} needs the handler nan_rollback, which acts on it",
                where="handlers.spikes.policy",
                got=self.policy,
                fix="switch nan_rollback on, or set policy: report",
            )

    def look(self, trainer: TrainingLoop) -> None:
        """Say whether this step stands out."""
        calm = (
            trainer.step.loss <= self._highest_loss
            and trainer.step.norm <= self._highest_norm
            and not self._risen
        )
        self._found = "" if calm else self._describe(trainer)

    def _describe(self, trainer: TrainingLoop) -> str:
        loss, norm = trainer.step.loss, trainer.step.norm
        found = [
            f"{name} {value:.4g} is {window.score(measured):.0f} deviations above those of the last"
            f" {len(window)} steps"
            for name, value, window, measured, highest in (
                ("loss", loss, self.losses, loss, self._highest_loss),
                ("gradient norm", norm, self.norms, _log(norm), self._highest_norm),
            )
            if not value <= highest
        ]
        if self._risen:
            found.append(
                f"the median loss of {len(self.newest)} steps has risen from"
                f" {self.lowest:.4g} to {self.newest.median:.4g}"
            )
        return " and ".join(found)

    def look_and_accept(self, trainer: TrainingLoop) -> None:
        """Look at a step that was taken in any case; one handler less costs a step less."""
        self.look(trainer)
        self.accept(trainer)

    def look_and_refuse(self, trainer: TrainingLoop) -> None:
        """Refuse the update of a step that stands out; what is not finite the guard refuses."""
        self.look(trainer)
        if not self._found or not math.isfinite(trainer.step.loss + trainer.step.norm):
            return
        self.in_a_row += 1
        lasting = self.policy == "rollback" or self._risen or self.in_a_row > self.patience
        trainer.reject_step(DIVERGENCE if lasting else SPIKE, self._found)
        if lasting and trainer.restore_step() is None:
            # The run goes on from here, and a window of before would call each step a divergence
            # until the lowered rate had time to act.
            self._begin_anew()

    def accept(self, trainer: TrainingLoop) -> None:
        """Remember an accepted step that does not stand out; report one that does."""
        if not self._found:
            self.in_a_row = 0
            self._accepted.append((trainer.step.loss, trainer.step.norm))
            if len(self._accepted) >= EVERY or not self.losses.full:
                self._learn()
            return
        self.in_a_row += 1
        lasting = self._risen or self.in_a_row == self.patience
        if lasting or self.in_a_row == 1:
            decision = "reported, and taken for the level from now on" if lasting else "reported"
            incident = Incident(trainer.state.iteration, self._found, SPIKE, decision)
            if trainer.ranks.is_writer:
                logger.warning("%s", incident)
            trainer.report_incident(incident)
        if lasting:
            self._begin_anew()

    def _learn(self) -> None:
        """Take the accepted steps into the windows, and the limits from these."""
        losses = [loss for loss, _ in self._accepted]
        self.losses.extend(losses)
        self.newest.extend(losses)
        self.norms.extend(_log(norm) for _, norm in self._accepted)
        self._accepted.clear()
        if self.newest.full and self.newest.median < self.lowest:
            self.lowest, self.lowest_scale = self.newest.median, self.newest.scale
        self._take_limits()

    def _begin_anew(self) -> None:
        for window in (self.losses, self.norms, self.newest):
            window.clear()
        self._accepted.clear()
        self.lowest = self.lowest_scale = math.inf
        self.in_a_row = 0
        self._take_limits()

    def _take_limits(self) -> None:
        self._highest_loss = self.losses.limit(self.threshold)
        self._highest_norm = _exp(self.norms.limit(self.threshold))
        self._risen = (
            self.rise is not None
            and self.newest.median > self.lowest + self.rise * self.lowest_scale
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the windows, the lowest level and the length of the series."""
        known = math.isfinite(self.lowest)
        return {
            "losses": self.losses.state_dict(),
            "norms": self.norms.state_dict(),
            "newest": self.newest.state_dict(),
            "accepted": [list(pair) for pair in self._accepted],
            "lowest": [self.lowest, self.lowest_scale] if known else None,
            "in_a_row": self.in_a_row,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a saved state."""
        self.losses.load_state_dict(state_dict["losses"])
        self.norms.load_state_dict(state_dict["norms"])
        self.newest.load_state_dict(state_dict["newest"])
        self._accepted = [(loss, norm) for loss, norm in saved_pairs(state_dict, "accepted")]
        known = state_dict["lowest"] is not None
        lowest = saved_numbers(state_dict, "lowest") if known else (math.inf, math.inf)
        self.lowest, self.lowest_scale = lowest
        self.in_a_row = saved_count(state_dict, "in_a_row")
        self._take_limits()


def _log(norm: float) -> float:
    """Return the logarithm; a norm of 0 is no outlier upwards, and has none."""
    return math.log(norm) if norm > 0.0 else -math.inf if norm == 0.0 else math.nan


def _exp(logarithm: float) -> float:
    try:
        return math.exp(logarithm)
    except OverflowError:
        return math.inf
