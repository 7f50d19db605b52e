"""What follows a step: decided in one place, from what is known at its end.

Handlers wish and ranks vote (`StepFacts`); `decide` weighs that against the cadence and says what
is still to be done. The loop carries out the first action, records it, and asks again, since
an evaluation and a save may bring new wishes. The rules:

- After an unhealthy step, which the run rolls back, nothing is evaluated or saved.
- The state is saved before its evaluation, so an evaluation that fails costs no step.
- A run that finishes has saved and evaluated; a run that stops for now has saved.
- An evaluation that a stop interrupts or skips is pending: the run is not finished, and the resumed
  run begins with that evaluation.
- An evaluation that would leave no time for the last one, in a run under a clock, is left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from fundamentallm.config.training import TrainingConfig

LAST_STEP = "the last step is done"
USED_UP = "the budget is used up"
STOPPED_BY = "stopped by "  # begins the reason of a run that a handler has terminated


class End(Enum):
    """How the run continues after a step."""

    GO_ON = "go on"
    STOP = "stop"
    FINISH = "finish"
    ROLL_BACK = "roll back"


class Save(Enum):
    """Why a state is saved: `ON_SCHEDULE` also if the run was never stopped."""

    ON_SCHEDULE = "on schedule"
    FOR_A_STOP = "for a stop"


@dataclass(frozen=True, slots=True)
class Cadence:
    """After which steps a run logs, evaluates and saves, regardless of other events.

    Attributes:
        steps_per_epoch: optimizer steps in one pass over the data.
        log_steps: metrics enter the logs every so many steps and at each epoch's end.
        eval_steps: evaluation every so many steps.
        eval_epochs: evaluation at each epoch's end, too.
        checkpoint_steps: a save every so many steps; None: with every evaluation.
        epochs_from: the last step of the last epoch that was ended early; 0 without one.
    """

    steps_per_epoch: int
    log_steps: int
    eval_steps: int
    eval_epochs: bool
    checkpoint_steps: int | None
    epochs_from: int = 0

    @classmethod
    def resolve(cls, config: TrainingConfig, steps_per_epoch: int) -> Cadence:
        """Return the cadence that a configuration describes."""
        return cls(
            steps_per_epoch,
            config.log_steps,
            config.eval_steps,
            config.eval_epochs,
            config.checkpoint_steps,
        )

    def evaluations_between(self, step: int, last: int) -> int:
        """Return how many evaluations follow the steps after `step` up to `last`, the run's last.

        After an epoch that was ended early, one at two occasions counts twice.
        """

        def multiples(of: int, offset: int = 0) -> int:
            return (last - offset) // of - (step - offset) // of

        count = multiples(self.eval_steps) + (not self.evaluates_at(last))
        if self.eval_epochs:
            count += multiples(self.steps_per_epoch, self.epochs_from)
            if self.epochs_from == 0:
                count -= multiples(math.lcm(self.eval_steps, self.steps_per_epoch))
        return count

    def logs_at(self, step: int) -> bool:
        """Whether a step's metrics enter the logs."""
        return step % self.log_steps == 0 or self.ends_epoch(step)

    def evaluates_at(self, step: int) -> bool:
        """Whether an evaluation follows a step."""
        return step % self.eval_steps == 0 or (self.eval_epochs and self.ends_epoch(step))

    def ends_epoch(self, step: int) -> bool:
        """Whether an epoch ends with a step."""
        return (step - self.epochs_from) % self.steps_per_epoch == 0

    def saves_at(self, step: int, evaluates: bool) -> bool:
        """Whether a save follows a step, given whether an evaluation does; step 0 is saved."""
        every = self.checkpoint_steps
        return step == 0 or (evaluates if every is None else step % every == 0)


@dataclass(frozen=True, slots=True)
class RollBack:
    """A request to roll back.

    Attributes:
        before: to the newest checkpoint that is not later than this step, or to the oldest if all
            are later; the newest of all if None.
        reason: for the log.
    """

    before: int | None
    reason: str


class StepFacts:
    """What handlers wish, what the ranks agreed on, and what was done, in one step.

    It is new for each step and costs nothing until something is written into it. Wishes that
    are made between two steps belong to the second.

    Attributes:
        finish: a wish to end the run for good, with its reason; empty without one.
        roll_back: a wish to roll back; None without one.
        redo: a wish to repeat the refused step.
        end_epoch: a wish to end the epoch with this step.
        skip_epoch_completed: that EPOCH_COMPLETED is then not to be fired.
        exhausted: whether some rank has used up a budget of tokens or seconds.
        hurries: whether on some rank an evaluation now would leave no time for the last one.
        leaving: whether some rank must save and stop for now.
        data_fault: whether some rank cannot read its data, so that the next step does not
            start.
        evaluated: whether the evaluation of this step was started, complete or not.
        saved: how the run was continuing when the state after this step was saved; None if it was
            not.
    """

    finish: str = ""
    roll_back: RollBack | None = None
    redo: bool = False
    end_epoch: bool = False
    skip_epoch_completed: bool = False
    exhausted: bool = False
    hurries: bool = False
    leaving: bool = False
    data_fault: bool = False
    evaluated: bool = False
    saved: End | None = None


class StepEnd(NamedTuple):
    """The inputs of a decision; equal on all ranks.

    Attributes:
        step: the step that ends now; 0 before the first.
        last_step: the last step of the budget; None if only the clock or the tokens end the run.
        cadence: when the run evaluates and saves.
        facts: wishes, votes and completed actions; `decide` does not change them.
        unmeasured: whether there is validation data and a handler to evaluate it, but no complete
            evaluation of this step. Ignored if no evaluation is due.
    """

    step: int
    last_step: int | None
    cadence: Cadence
    facts: StepFacts
    unmeasured: bool


@dataclass(frozen=True, slots=True)
class Decision:
    """The actions that remain after a step, and how the run then continues.

    Attributes:
        end: how the run continues.
        reason: why it is finished; empty if not.
        save: why to save now; None for no save.
        evaluate: whether to evaluate after that.
        pending: whether the validation that follows this step is not complete.
    """

    end: End
    reason: str = ""
    evaluate: bool = False
    save: Save | None = None
    pending: bool = False

    @property
    def ends_run(self) -> bool:
        """Whether this was the last step, for good or for now."""
        return self.end is End.STOP or self.end is End.FINISH


GO_ON = Decision(End.GO_ON)  # the decision for most steps
ROLL_BACK = Decision(End.ROLL_BACK)


def decide(at: StepEnd) -> Decision:
    """Decide what follows a step.

    A data fault ends the run at once; a rollback comes before everything else. A run
    that must both finish and stop is evaluated first: it is finished if the evaluation completed.
    """
    facts, step = at.facts, at.step
    if facts.data_fault:
        needs_save = facts.saved is None and facts.roll_back is None
        pending = needs_save and step > 0 and at.cadence.evaluates_at(step) and at.unmeasured
        return Decision(End.STOP, save=Save.FOR_A_STOP if needs_save else None, pending=pending)
    if facts.roll_back is not None:
        return ROLL_BACK
    reason = facts.finish
    if not reason and facts.exhausted:
        reason = USED_UP
    elif not reason and step == at.last_step:
        reason = LAST_STEP
    due = step > 0 and (bool(reason) or (at.cadence.evaluates_at(step) and not facts.hurries))
    pending = due and at.unmeasured
    evaluate = due and not facts.evaluated and (bool(reason) or not facts.leaving)
    if facts.leaving and pending and not evaluate:
        reason = ""
    scheduled = bool(reason) or at.cadence.saves_at(step, due)
    if not (due or scheduled or facts.leaving):
        return GO_ON
    end = End.FINISH if reason else End.STOP if facts.leaving else End.GO_ON
    save = None
    if facts.saved is None:
        save = Save.ON_SCHEDULE if scheduled else Save.FOR_A_STOP if facts.leaving else None
    elif end is End.FINISH and facts.saved is not End.FINISH and not facts.evaluated:
        save = Save.ON_SCHEDULE
    return Decision(end, reason, evaluate, save, pending)
