"""Survive numerical faults."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from fundamentallm.errors import NumericalError
from fundamentallm.events import TrainingEvents
from fundamentallm.training.handlers.base import HANDLERS

if TYPE_CHECKING:
    from fundamentallm.training.trainer import Trainer

logger = logging.getLogger(__name__)


@HANDLERS.register("nan_rollback")
class NaNRollback:
    """Controls: after a non-finite loss or gradient, goes back to the last good checkpoint.

    The step has refused the update already, so the weights are clean. The run is rewound to the
    newest checkpoint, the window that broke it enters the skip ledger, and training goes on from
    there: the same run as one that had been told to skip that window. Where no checkpoints are
    kept, the window alone is skipped. An fp16 overflow is expected now and then and only counts
    when `max_overflows` come in a row.

    Args:
        max_rollbacks: rollbacks in one run before it gives up.
        max_per_region: rollbacks to one and the same checkpoint before it gives up.
        max_overflows: fp16 overflows in a row that count as a fault.
    """

    def __init__(
        self, max_rollbacks: int = 10, max_per_region: int = 3, max_overflows: int = 30
    ) -> None:
        self.max_rollbacks = max_rollbacks
        self.max_per_region = max_per_region
        self.max_overflows = max_overflows
        self.total = 0
        self.region = -1
        self.in_region = 0
        self.overflows = 0

    def attach(self, trainer: Trainer) -> None:
        """Listen to refusals, updates and the rollback itself."""
        trainer.add_event_handler(TrainingEvents.FLLM_STEP_REJECTED, self.judge)
        trainer.add_event_handler(TrainingEvents.FLLM_OPTIMIZER_STEPPED, self.recover)
        trainer.add_event_handler(TrainingEvents.FLLM_ROLLED_BACK, self.note_region)

    def recover(self) -> None:
        """An applied update ends a series of overflows."""
        self.overflows = 0

    def judge(self, trainer: Trainer) -> None:
        """Decide what a refused step means.

        Raises:
            NumericalError: the limits are used up.
        """
        output = trainer.state.output
        step = trainer.state.iteration
        if output.rejection == "overflow":
            self.overflows += 1
            if self.overflows < self.max_overflows:
                return
            self._give_up(step, f"{self.overflows} fp16 overflows in a row")
        if output.rejection != "nonfinite":
            return
        fault = f"loss {output.loss}, gradient norm {output.grad_norm}"
        if self.total >= self.max_rollbacks:
            self._give_up(step, f"{fault} after {self.total} rollbacks")
        same_region = trainer.restore_step() == self.region
        if same_region and self.in_region >= self.max_per_region:
            self._give_up(step, f"{fault} after {self.in_region} rollbacks to step {self.region}")
        self.total += 1
        logger.warning("step %d: %s; the update was refused", step, fault)
        trainer.roll_back(skip=[step], reason=fault)

    def note_region(self, trainer: Trainer) -> None:
        """Count the rollbacks that ended at the same checkpoint."""
        step = trainer.state.iteration
        self.in_region = self.in_region + 1 if step == self.region else 1
        self.region = step

    def _give_up(self, step: int, fault: str) -> None:
        raise NumericalError(
            f"training cannot go on at step {step}: {fault}",
            fix="lower training.learning_rate, lengthen training.warmup_steps, or inspect the data"
            " of these steps; the last good checkpoint is kept",
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the counts, so that a resumed run has no fresh allowance."""
        return {
            "total": self.total,
            "region": self.region,
            "in_region": self.in_region,
            "overflows": self.overflows,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take counts over; never fewer than are known, for a rollback loads an older state."""
        self.overflows = state_dict["overflows"]
        if state_dict["total"] >= self.total:
            self.total = state_dict["total"]
            self.region = state_dict["region"]
            self.in_region = state_dict["in_region"]
