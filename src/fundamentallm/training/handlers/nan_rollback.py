"""Recover from numerical faults."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ignite.engine import Events

from fundamentallm.config.base import CountOrZero, Fraction
from fundamentallm.data.batch import Window
from fundamentallm.data.tokenizer import Tokenizer
from fundamentallm.errors import CheckpointError, NumericalError
from fundamentallm.events import TrainingEvents
from fundamentallm.files.run_layout import INCIDENTS
from fundamentallm.training.checkpoint.finite import nonfinite_tensors
from fundamentallm.training.foreign import state_of
from fundamentallm.training.handlers.base import HANDLERS
from fundamentallm.training.loop import TrainingLoop
from fundamentallm.training.recovery.diagnosis import (
    DATA_WITH_WEIGHTS,
    DIVERGENCE,
    OVERFLOW,
    SPIKE,
    STATE,
    TRANSIENT,
    UNEXPLAINED,
    Diagnosis,
    Incident,
    StepReplayer,
)
from fundamentallm.training.recovery.incident import write_incident
from fundamentallm.training.saved import saved_count, saved_counts

logger = logging.getLogger(__name__)

# Skipped step batches in a row for these weights, after which the weights are the cause.
BLAMED = 2
METRICS_KEPT = 200  # steps before an incident whose metrics go into its report


@HANDLERS.register("nan_rollback")
class NaNRollback:
    """Controls: finds out why a step is not finite, acts on it, and continues.

    The step has refused the update already, so the weights are clean. The step is then replayed
    under control (`diagnosis.py`), and the verdict decides:

    - transient: the step is repeated from the same state.
    - precision, data, data_with_weights: only this step batch is skipped; after two in a row of
      the last kind, a third is a divergence.
    - divergence: the run rolls back to a checkpoint that has proved healthy, with `healthy_after`
      good steps behind it; the step batch and its neighbours are skipped, and the learning rate is
      lowered for `rate_steps`. Distance and neighbourhood double with each retry in a region.
    - spike, requested by the handler `spikes`: only this step batch is skipped.
    - state (a moment or the learning rate is not finite): back to the newest checkpoint.
    - unexplained (transient, but twice at the same step): back, without this step batch.

    Actions are added to the interventions, so that the healed run is, bit for bit, a clean run that
    was given these interventions. An fp16 overflow is expected now and then and
    only counts when `max_overflows` come in a row.

    Args:
        max_rollbacks: incidents with a skipped step batch or a rollback, in one run, before it
            gives up.
        max_per_region: rollbacks in one region before it gives up; a region ends `rate_steps`
            after its last fault.
        max_overflows: fp16 overflows in a row that count as a fault.
        max_transients: repeated steps, in one run, before it gives up: a machine with more errors
            is not fit for training.
        max_spikes: spikes whose step batch is skipped, in one run, before it gives up.
        healthy_after: good steps after a checkpoint that make it healthy.
        neighbours: step batches before and after a diverging one that are skipped with it.
        rate_factor: the learning rate is multiplied by this after a divergence.
        rate_steps: how many steps the lower learning rate lasts.
        run_dir: where `incidents/` is written; None writes no evidence.
        tokenizer: decodes the sequences in the evidence.
    """

    role = "recovery"

    def __init__(
        self,
        max_rollbacks: CountOrZero = 10,
        max_per_region: CountOrZero = 3,
        max_overflows: CountOrZero = 30,
        max_transients: CountOrZero = 100,
        max_spikes: CountOrZero = 100,
        healthy_after: CountOrZero = 10,
        neighbours: CountOrZero = 1,
        rate_factor: Fraction = 0.5,
        rate_steps: CountOrZero = 100,
        run_dir: Path | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        if not 0.0 < rate_factor <= 1.0:
            raise ValueError(f"rate_factor must be above 0 and at most 1, got {rate_factor}")
        counts = {
            "max_rollbacks": max_rollbacks,
            "max_per_region": max_per_region,
            "max_overflows": max_overflows,
            "max_transients": max_transients,
            "max_spikes": max_spikes,
            "healthy_after": healthy_after,
            "neighbours": neighbours,
            "rate_steps": rate_steps,
        }
        for name, count in counts.items():
            if count < 0:
                raise ValueError(f"{name} must not be negative, got {count}")
        self.max_rollbacks = max_rollbacks
        self.max_per_region = max_per_region
        self.max_overflows = max_overflows
        self.max_transients = max_transients
        self.max_spikes = max_spikes
        self.healthy_after = healthy_after
        self.neighbours = neighbours
        self.rate_factor = rate_factor
        self.rate_steps = rate_steps
        self.run_dir = run_dir
        self.tokenizer = tokenizer
        self.total = 0
        self.transients = 0
        self.spikes = 0
        self.overflows = 0
        self.region_end = 0
        self.in_region = 0
        # Enough of them to tell how far back a run must go at its last retry.
        needed = healthy_after * 2 ** min(max_per_region, 10)
        self._good_steps: deque[int] = deque(maxlen=max(1, needed))
        self._redone: int | None = None
        self._blamed = 0  # windows in a row that were bad with the weights of the last update
        self._good_window: Window | None = None
        self._metrics: deque[dict[str, Any]] = deque(maxlen=METRICS_KEPT)

    def attach(self, trainer: TrainingLoop) -> None:
        """Listen to refusals, updates and damaged states."""
        trainer.add_event_handler(TrainingEvents.FLLM_STEP_REJECTED, self.judge)
        trainer.add_event_handler(TrainingEvents.FLLM_OPTIMIZER_STEPPED, self.note_good_window)
        trainer.add_event_handler(TrainingEvents.FLLM_STATE_DAMAGED, self.judge_state)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, self.note_metrics)

    def note_good_window(self, trainer: TrainingLoop) -> None:
        """An applied update ends a series of overflows; its step batch is known to be good."""
        self.overflows = self._blamed = 0
        self._good_steps.append(trainer.state.iteration)
        self._good_window = trainer.window

    def note_metrics(self, trainer: TrainingLoop) -> None:
        """Remember the step for a report."""
        output = trainer.state.output
        self._metrics.append(
            {
                "step": trainer.state.iteration,
                "loss": output.loss,
                "grad_norm": output.grad_norm,
                "lr": trainer.state.metrics.get("train/lr"),
                "rejection": output.rejection,
            }
        )

    # ------------------------------------------------------------------ judging

    def judge(self, trainer: TrainingLoop) -> None:
        """Decide what a refused step means.

        Raises:
            NumericalError: the limits are used up.
        """
        output, step = trainer.state.output, trainer.state.iteration
        fault = f"loss {output.loss}, gradient norm {output.grad_norm}"
        if output.details:
            fault += f" ({output.details})"
        if output.rejection == "overflow":
            self.overflows += 1
            if self.overflows >= self.max_overflows:
                fault = f"{self.overflows} fp16 overflows in a row"
                self._give_up(trainer, fault, OVERFLOW, self._look(trainer, OVERFLOW))
        elif output.rejection == "learning rate":
            fault = "the learning rate is not finite"
            self._go_back(trainer, fault, STATE, self._look(trainer, STATE))
        elif output.rejection == DIVERGENCE:  # a controller's word for it
            self._go_back(trainer, fault, DIVERGENCE, self._look(trainer, DIVERGENCE, 3))
        elif output.rejection == SPIKE:
            self.spikes += 1
            diagnosis = self._look(trainer, SPIKE, 3)
            if self.spikes > self.max_spikes:
                self._give_up(trainer, f"{fault} after {self.max_spikes} spikes", SPIKE, diagnosis)
            trainer.interventions.skip([step])
            self._report(trainer, fault, SPIKE, "its window is passed over", diagnosis)
        elif output.rejection == "nonfinite":
            if self._redone == step:
                trainer.interventions.skip([step])
                self._go_back(trainer, fault, UNEXPLAINED, self._look(trainer, UNEXPLAINED))
            else:
                self._act(trainer, fault, self._diagnose(trainer))

    def judge_state(self, trainer: TrainingLoop) -> None:
        """Go back when the state turned out to be damaged before it was saved.

        Raises:
            NumericalError: the limits are used up.
        """
        if trainer.restore_step() is not None:
            fault = f"the state to be saved is damaged{_damage(trainer)}"
            self._go_back(trainer, fault, STATE, self._look(trainer, STATE))

    def _look(self, trainer: TrainingLoop, verdict: str, num_worst: int = 0) -> Diagnosis:
        """Replay a step whose verdict is known: what every module gave, and the worst sequences."""
        replayer = _replayer(trainer)
        replay = replayer.replay(trainer.window, trainer.generators_before, watch=True)
        rows = replayer.worst_rows(trainer.window, num_worst) if num_worst else ()
        return Diagnosis(verdict, replay, rows)

    def _diagnose(self, trainer: TrainingLoop) -> Diagnosis:
        @contextmanager
        def earlier_weights() -> Iterator[bool]:
            # Not the ones that the step began with, which the last applied update made.
            last = self._good_steps[-1] if self._good_steps else trainer.state.iteration - 1
            earlier = trainer.weights_before(last - 1)
            if earlier is None:
                yield False
                return
            # Put in and taken out again: a copy of the model would copy whatever hangs on it.
            kept = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
            try:
                trainer.model.load_state_dict(earlier)
                yield True
            finally:
                trainer.model.load_state_dict(kept)

        return _replayer(trainer).diagnose(
            trainer.window, trainer.generators_before, self._known_good(trainer), earlier_weights
        )

    def _known_good(self, trainer: TrainingLoop) -> Window | None:
        """Return the last window that was applied, by whichever process of the run."""
        window_at = getattr(trainer.train_loader, "window_at", None)
        if self._good_window is None and self._good_steps and window_at is not None:
            window: Window = window_at(*trainer.epochs.position(self._good_steps[-1] - 1))
            return window
        return self._good_window

    def _act(self, trainer: TrainingLoop, fault: str, diagnosis: Diagnosis) -> None:
        step = trainer.state.iteration
        if diagnosis.verdict == TRANSIENT:
            self.transients += 1
            if self.transients > self.max_transients:
                self._give_up(
                    trainer,
                    f"{fault}, transient for the {self.transients}th time",
                    TRANSIENT,
                    diagnosis,
                )
            self._redone = step
            trainer.redo_step()
            self._report(trainer, fault, TRANSIENT, "the step is taken once more", diagnosis)
        elif diagnosis.verdict == DIVERGENCE or (
            diagnosis.verdict == DATA_WITH_WEIGHTS and self._blamed >= BLAMED
        ):
            self._go_back(trainer, fault, DIVERGENCE, diagnosis)
        else:
            self._blamed += diagnosis.verdict == DATA_WITH_WEIGHTS
            self._count(trainer, fault, diagnosis.verdict, diagnosis)
            trainer.interventions.skip([step])
            self._report(trainer, fault, diagnosis.verdict, "its window is passed over", diagnosis)

    # ------------------------------------------------------------------ acting

    def _go_back(
        self, trainer: TrainingLoop, fault: str, verdict: str, diagnosis: Diagnosis | None = None
    ) -> None:
        step = trainer.state.iteration
        self.in_region = self.in_region + 1 if step <= self.region_end else 1
        if self.in_region > self.max_per_region:
            retries = f"after {self.in_region - 1} rollbacks in this region"
            self._give_up(trainer, f"{fault} {retries}", verdict, diagnosis)
        self._count(trainer, fault, verdict, diagnosis)
        self.region_end = max(self.region_end, step + self.rate_steps)
        doubled = 2 ** (self.in_region - 1)
        before = self._healthy_until(doubled) if verdict == DIVERGENCE else None
        target = trainer.restore_step(before)
        decision = f"going back to step {target}" if target is not None else "continuing from here"
        if before is not None and target is not None and target > before:
            decision += " (the oldest kept: none has proved healthy)"
        # A step that the restored state has behind it was taken, and stays so.
        first = (target if target is not None else step - 1) + 1
        if verdict == DIVERGENCE:
            near = self.neighbours * doubled
            trainer.interventions.skip(s for s in range(step - near, step + near + 1) if s >= first)
            trainer.interventions.cut_rate(first, self.rate_steps + step - first, self.rate_factor)
            decision += (
                f", without the windows of steps {max(first, step - near)} to {step + near},"
                f" learning rate x {self.rate_factor:g} for {self.rate_steps} steps"
            )
        self._report(trainer, fault, verdict, decision, diagnosis)
        trainer.roll_back(f"{verdict}: {fault}", before)

    def _healthy_until(self, doubled: int) -> int:
        """Return the last step with enough good ones behind it, -1 if there is none."""
        wanted = self.healthy_after * doubled
        if wanted == 0:
            return self._good_steps[-1] if self._good_steps else -1
        return self._good_steps[-wanted] - 1 if len(self._good_steps) >= wanted else -1

    def _count(
        self, trainer: TrainingLoop, fault: str, verdict: str, diagnosis: Diagnosis | None
    ) -> None:
        if self.total >= self.max_rollbacks:
            self._give_up(trainer, f"{fault} after {self.total} incidents", verdict, diagnosis)
        self.total += 1

    def _give_up(
        self,
        trainer: TrainingLoop,
        fault: str,
        verdict: str = TRANSIENT,
        diagnosis: Diagnosis | None = None,
    ) -> None:
        self._report(trainer, fault, verdict, "giving up", diagnosis)
        raise NumericalError(
            f"training cannot continue at step {trainer.state.iteration}: {fault}",
            where=str(self.run_dir / INCIDENTS) if self.run_dir is not None else "",
            fix="lower training.learning_rate, lengthen training.warmup_steps, or inspect the data"
            " of these steps; the last good checkpoint is kept",
        )

    def _report(
        self,
        trainer: TrainingLoop,
        fault: str,
        verdict: str,
        decision: str,
        diagnosis: Diagnosis | None = None,
    ) -> None:
        incident = Incident(trainer.state.iteration, fault, verdict, decision, diagnosis)
        logger.log(logging.WARNING if trainer.ranks.is_writer else logging.DEBUG, "%s", incident)
        if self._is_witness(trainer, diagnosis):
            self._write_evidence(trainer, incident)
        trainer.report_incident(incident)

    def _is_witness(self, trainer: TrainingLoop, diagnosis: Diagnosis | None) -> bool:
        """Tell whether this rank is the first whose own share is bad; the first of all if none."""
        ranks = trainer.ranks
        bad = diagnosis is not None and not diagnosis.replay.is_finite
        votes = ranks.sum_counts([int(bad and r == ranks.rank) for r in range(ranks.world_size)])
        return ranks.rank == (votes.index(1) if 1 in votes else 0)

    def _write_evidence(self, trainer: TrainingLoop, incident: Incident) -> None:
        diagnosis = incident.diagnosis
        for statistic in (
            (diagnosis.first_bad_forward, diagnosis.first_bad_backward) if diagnosis else ()
        ):
            if statistic is not None:
                logger.warning("  first bad %s", statistic)
        if self.run_dir is None:
            return
        try:
            path = write_incident(self.run_dir, incident, trainer, self._metrics, self.tokenizer)
            logger.warning("  evidence: %s", path)
        except (OSError, CheckpointError) as error:
            logger.warning("  the evidence cannot be written, training goes on: %s", error)

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Return the counts, so that a resumed run has no fresh allowance."""
        return {
            "total": self.total,
            "transients": self.transients,
            "spikes": self.spikes,
            "region_end": self.region_end,
            "in_region": self.in_region,
            "overflows": self.overflows,
            "blamed": self._blamed,
            "good_steps": list(self._good_steps),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take counts over; never fewer than are known, for a rollback loads an older state."""
        self.overflows = saved_count(state_dict, "overflows")
        # Unknown to a checkpoint of an earlier release.
        self._blamed = saved_count({"blamed": 0, **state_dict}, "blamed")
        self._good_window = None
        self._redone = None  # of the course that is left
        self._good_steps.clear()
        self._good_steps.extend(saved_counts(state_dict, "good_steps"))
        counts = [saved_count(state_dict, name) for name in ("total", "transients", "spikes")]
        if sum(counts) >= self.total + self.transients + self.spikes:
            self.total, self.transients, self.spikes = counts
            self.region_end = saved_count(state_dict, "region_end")
            self.in_region = saved_count(state_dict, "in_region")


def _replayer(trainer: TrainingLoop) -> StepReplayer:
    return StepReplayer(trainer.model, trainer.loss_fn, trainer.precision, trainer.ranks)


def _damage(trainer: TrainingLoop) -> str:
    """Name what is not finite on this rank, for the end of a sentence; nothing if all is."""
    names = [
        name
        for name, _ in nonfinite_tensors(
            {
                "model": dict(trainer.model.named_parameters()),
                "optimizer": trainer.optimizer.state_dict(),
                "handlers": {name: state_of(it) for name, it in trainer.attached.items()},
            }
        )
    ]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f": {', '.join(names[:3])}{more}" if names else ""
