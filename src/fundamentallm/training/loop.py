"""The training loop: an Ignite engine whose process function takes one optimizer step.

Handlers see `TrainingLoop`, which knows none of them; what they may wish and ask is in
`steering.py`. Its `run` adds what Ignite lacks
(pytorch/ignite threads in brackets): it sets the loader to the step of the state, does not train a
finished run again [#3622], fires the events of `events.py` behind every handler of
ITERATION_COMPLETED, and restores an earlier state between two inner runs, since Ignite cannot
rewind inside one [#2669, #1386]. `decision.py` decides how the run continues after a step.
"""

from __future__ import annotations

import logging
import math
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from ignite.engine import Engine, Events
from torch import Tensor, nn

from fundamentallm.compute.memory import is_out_of_memory, out_of_memory
from fundamentallm.compute.plan import Plan
from fundamentallm.compute.prefetch import ahead
from fundamentallm.compute.rng import capture_generators, restore_generators
from fundamentallm.config.training import TrainingConfig
from fundamentallm.data.batch import Window, as_window, count_computed
from fundamentallm.data.loaders import as_window_loader, batch_shape_of
from fundamentallm.errors import CheckpointError, DataError
from fundamentallm.events import TrainingEvents
from fundamentallm.training import foreign
from fundamentallm.training.buffers import StateBuffers
from fundamentallm.training.decision import (
    GO_ON,
    LAST_STEP,
    ROLL_BACK,
    STOPPED_BY,
    USED_UP,
    Cadence,
    Decision,
    End,
    Save,
    StepEnd,
    StepFacts,
    decide,
)
from fundamentallm.training.epochs import Epochs
from fundamentallm.training.evaluator import Evaluator
from fundamentallm.training.history import History
from fundamentallm.training.ignite_handlers import IgniteHandlers
from fundamentallm.training.interventions import Interventions
from fundamentallm.training.limits import Budget, Limits
from fundamentallm.training.recovery.data_faults import DataFaults
from fundamentallm.training.schedulers import LearningRateScheduler
from fundamentallm.training.state import COUNTERS, IRREVERSIBLE, TrainingState, check_counters
from fundamentallm.training.steering import SteeredEngine
from fundamentallm.training.step import StepOutput, TrainStep

logger = logging.getLogger(__name__)


class TrainingLoop(SteeredEngine):
    """The loop over optimizer steps, from resolved parts.

    Args:
        model: takes `input_ids` (B, T) int64, returns logits (B, T, V); the plan has placed it.
        train_loader: of step batches (`as_window_loader`).
        val_loader: batches of the same form; None or empty: no validation.
        optimizer: over the model's parameters.
        scheduler: on that optimizer.
        loss_fn: `loss_fn(logits, targets, reduction="sum")`.
        plan: how the steps are computed.
        config: cadence and clipping.
        limits: when the run ends.

    Attributes:
        model: the model, without a wrapper for ranks or compilation.
        history: the course of the run so far.
        plan: how the steps are computed.
        budget: the limits of the run, its clock, and how much is used.
        interventions: step batches to skip, and lowered learning rates.
        description: plain JSON about the run (its configuration, tokenizer, data) that every
            checkpoint carries in its manifest.
        evaluator: the engine of the validation pass; metrics of Ignite are attached to it.
        step: computes a step; has its loss and norm, and clips it (`TrainStep`).
        window: this rank's share of the current step's data.
        tokens_computed: tokens of the current step over all ranks, those with a masked target
            and padding too; what speed and FLOPs go by.
        generators_before: random generators of the device before the current step.
    """

    state: TrainingState

    def __init__(
        self,
        model: nn.Module,
        train_loader: Any,
        val_loader: Any,
        optimizer: torch.optim.Optimizer,
        scheduler: LearningRateScheduler,
        loss_fn: Callable[..., Tensor],
        plan: Plan,
        config: TrainingConfig,
        limits: Limits,
    ) -> None:
        super().__init__(lambda engine, window: self._train_step(window))
        self.state = TrainingState()
        self.state_dict_user_keys.extend(COUNTERS)
        self.config = config
        self.plan = plan
        self.ranks, self.device = plan.ranks, plan.device
        self.model = model
        self.precision = plan.build_precision()
        self._buffers = StateBuffers(self.model)
        self.train_loader = train_loader
        self.val_loader = val_loader
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.loss_fn = loss_fn
        self.epochs = Epochs(len(self.train_loader))
        self._cadence = Cadence.resolve(self.config, self.steps_per_epoch)
        self.budget = Budget(limits, self.state, self.ranks)
        self.run_id = uuid.uuid4().hex
        self.description: dict[str, Any] = {}
        self.history = History()
        self.interventions = Interventions()
        self.step = TrainStep(
            self.plan.prepare(self.model, batch_shape_of(self.train_loader)),
            self.model,
            self.optimizer,
            self.loss_fn,
            self.precision,
            self.ranks,
            self.config.max_grad_norm,
            self.notify,
            self.config.max_grad_value,
        )
        self.evaluator = Evaluator(self.model, self.precision, self.ranks, self.loss_fn)
        self.evaluator.weights = lambda: self.evaluation_weights()
        # Ranks agree on leaving at the next step: one that left here would strand the others.
        self.evaluator.leaves = lambda: self.ranks.alone and self._wants_to_leave()
        self.evaluator.admit = self.admit
        self._faults = self.evaluator.faults
        self.generators_before: dict[str, Any] = {}
        self.window = Window([], 0)
        self.tokens_computed = 0
        self._error: BaseException | None = None

        self._ignite = IgniteHandlers(self, self.optimizer)
        self.keep_last(Events.STARTED, self._after_started)
        self.keep_last(Events.EPOCH_STARTED, self._after_epoch_started)
        self.keep_last(Events.ITERATION_COMPLETED, self._after_step)
        self.keep_last(Events.EPOCH_COMPLETED, self._after_epoch)

    # ------------------------------------------------------------------ running

    def run(
        self,
        data: Any = None,
        max_epochs: int | None = None,
        max_iters: int | None = None,
        epoch_length: int | None = None,
    ) -> Any:
        """Run the loop to the first limit, through any number of rollbacks.

        Args:
            data: a loader in place of the trainer's.
            max_epochs: passes over the data, in place of the trainer's limits.
            max_iters: optimizer steps, in place of the trainer's limits.
            epoch_length: steps in an epoch; the loader's length if None.

        Returns:
            The engine's state.

        Raises:
            DataError: the data have no batch, or cannot be read.
            MachineError: memory ran out; the last checkpoint stays as it is.
            ValueError: both max_epochs and max_iters are given.
        """
        if max_iters is not None and max_epochs is not None:
            raise ValueError(  # as Ignite's
                "Arguments max_iters and max_epochs are mutually exclusive. Please provide only"
                " max_epochs or max_iters."
            )
        loader = self.train_loader
        if data is not None:
            loader = as_window_loader(data, self.config.accumulation_steps, self.config.seed)
        length = epoch_length or len(loader)
        if length < 1:
            raise DataError("the training data have no batch", fix="check the data, and drop_last")
        self.train_loader, self.epochs.length = loader, length
        if max_iters is not None or max_epochs is not None:
            steps = max_iters or (max_epochs or 1) * self.steps_per_epoch
            self.budget.limits = Limits(steps, num_epochs=max_epochs)
        self._heed_epochs()
        self._facts, self._stopped_by, self._is_interrupted = StepFacts(), "", False
        self._skips_completed, self._error, self._error_ended_by = False, None, ""
        self._faults = self.evaluator.faults = DataFaults(self.ranks)
        self.budget.begin()
        self.step.vetoes_possible = self.ranks.any(
            bool(self._event_handlers[TrainingEvents.FLLM_GRADIENTS_READY])
        )
        self._note_spent_budget()
        self._decision = self._decide()
        try:
            self.notify(TrainingEvents.FLLM_RUN_STARTED)
            self._settle()
            while not self.stopping:
                if self._decision is ROLL_BACK:
                    self._go_back()
                    self._settle()
                    continue
                try:
                    self._run_to_stop()
                except DataError:
                    self._save_what_is_done()
                    raise
                except BaseException:
                    if not self._error_ended_by:
                        raise
                    self._decision = Decision(End.FINISH, self._error_ended_by)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            # Nothing is saved here: an update may be half done.
            kept = "; the last checkpoint is kept" if self.restore_point else ""
            raise out_of_memory(error, f" at step {self.state.iteration:,}{kept}") from error
        finally:
            # After an exception Ignite keeps its spent generator, and the next run would return
            # at once without a step (held by tests/unit/test_ignite_contract.py).
            self._internal_run_generator = None
            self.notify(TrainingEvents.FLLM_RUN_ENDED)
        return self.state

    def _run_to_stop(self) -> None:
        """Run Ignite's loop from the state's step to a limit, a stop or an incident."""
        epoch, step = self.epochs.position(self.state.iteration)
        self.train_loader.set_position(epoch, step)
        self.state.epoch_length = self.steps_per_epoch
        self.state.epoch = epoch  # Ignite adds the one begun
        self._ignite.carry()
        super().run(
            self._faults.kept_from(ahead(self.train_loader, self.device)),
            epoch_length=self.steps_per_epoch,
        )

    def _heed_epochs(self) -> None:
        """Let cadence, limits and Ignite's state follow from where the epochs end."""
        first, _ = self.epochs.last_cut(self.state.iteration)
        cadence = Cadence.resolve(self.config, self.steps_per_epoch)
        self._cadence = replace(cadence, epochs_from=first)
        limits = self.budget.limits
        if limits.num_epochs is not None:
            steps = self.epochs.last_step(limits.num_epochs)
            self.budget.limits = replace(limits, total_steps=steps)
        # If only the clock ends the run there is no last step, but Ignite needs a number. Its own
        # handlers ask for the number of epochs as well.
        total = self.total_steps
        self.state.max_iters = total or 2**62
        self.state.max_epochs = self.epochs.number(total) if total else math.inf

    def _handle_exception(self, e: BaseException) -> None:
        """Let handlers hear of an error, once, and raise it: half a step is never gone on from."""
        if e is not self._error:
            self._error = e
            super()._handle_exception(e)
        raise e

    @staticmethod
    def _is_done(state: Any) -> bool:
        """Whether a limit is met; unlike Ignite's, without counting in epochs of one length."""
        steps, epochs = state.max_iters, state.max_epochs
        return (steps is not None and state.iteration >= steps) or (
            epochs is not None and state.epoch >= epochs
        )

    def _setup_engine(self) -> None:
        """Begin as Ignite does, which knows only epochs of one length."""
        super()._setup_engine()
        self._init_iter = self.epochs.position(self.state.iteration)[1]

    def _setup_dataloader_iter(self) -> None:
        """Iterate as Ignite does; after an epoch that was ended early, from the next one."""
        super()._setup_dataloader_iter()
        step = self.state.iteration
        if self.epochs.last_cut(step)[0] == step > 0:
            self.train_loader.set_position(*self.epochs.position(step))

    def _after_started(self) -> None:
        """Undo what handlers of STARTED reset where a run goes on; heed a limit that they set."""
        self._ignite.undo_resets()
        limit = self.state.max_iters
        if limit != (self.total_steps or 2**62):
            self.budget.limits = Limits(limit)

    def _after_epoch_started(self) -> None:
        """Undo what handlers of EPOCH_STARTED reset where a run goes on inside an epoch."""
        self._ignite.begin_epoch(is_inside=not self.epochs.end_with(self.state.iteration))

    def _save_what_is_done(self) -> None:
        """Save before a run ends because its data cannot be read.

        The error came between two steps, so the state is that after the last one. Several ranks
        save only if all of them know of the error.
        """
        if self._faults.everyone_knows and self.restore_step() != self.state.iteration:
            self._facts.data_fault = True
            self._conclude()

    def _note_spent_budget(self) -> None:
        """Finish a resumed run whose budget is used up; its last evaluation may still be due."""
        if self.state.iteration == 0:
            return
        if self.budget.tokens_are_used_up():
            self.finish(USED_UP)
        elif self.state.iteration >= (self.total_steps or math.inf):
            self.finish(LAST_STEP)
        elif self.ranks.any(self.budget.is_used_up()):
            self.finish(USED_UP)

    def _settle(self) -> None:
        """Do what is still due at the initial or restored state, before the first step from it.

        Step 0 is saved. A state that was saved before its evaluation is evaluated.
        """
        facts, step, point = self._facts, self.state.iteration, self.restore_point
        facts.evaluated = True
        if point is not None and (wish := point.end_due_at(step)) not in ("", LAST_STEP, USED_UP):
            self.finish(wish)  # of a handler, which does not repeat it; budgets may have grown
        owed = self.evaluation_pending()
        if self.restore_step() is not None and (not owed or (point and point.is_scheduled(step))):
            facts.saved = End.FINISH  # as it is on the disk
        if owed:
            decision = self._decision = self._decide()
            if decision.save is not None:
                facts.saved = decision.end
                self._save(decision.save)
            spent = facts.finish
            self._evaluate()
            if point is not None and point.has_ended_at(step):
                # the run had ended here and was told to continue
                facts.finish, self._stopped_by = spent, ""
            # If it is cut off again, it is still due before the next step.
            facts.leaving = self.evaluation_pending() and self.ranks.any(self._wants_to_leave())
        self._conclude()
        self._repeat_end_of_epoch()
        # A budget that ends while a run starts must not prevent its first step.
        if self.ranks.any(self.interrupted_by is not None) and self._decision.end is End.GO_ON:
            self._decision = Decision(End.STOP)
        if self._decision.end is End.GO_ON:
            self._facts = StepFacts()

    def _repeat_end_of_epoch(self) -> None:
        """Let Ignite's handlers hear the end of an epoch that came after the restored save."""
        owes, self._ignite.owes_epoch_end = self._ignite.owes_epoch_end, False
        goes_on = self._decision.end is End.GO_ON
        if owes and goes_on and self._owes_handlers_an_end_of_epoch():
            self._fire_event(Events.EPOCH_COMPLETED)

    def _owes_handlers_an_end_of_epoch(self) -> bool:
        step = self.state.iteration
        return step > 0 and self.epochs.end_with(step) and self._ignite.hear_epoch_end

    def _go_back(self) -> None:
        wish = self._facts.roll_back
        assert wish is not None
        assert self.restore_point is not None
        finish = self._facts.finish
        self._facts = StepFacts()
        if finish.startswith(STOPPED_BY):
            self._facts.finish = finish  # a handler's terminate() holds, with a healthy state
        broke_at = self.state.iteration
        kept = {name: getattr(self.state, name) for name in IRREVERSIBLE}
        interventions = self.interventions.state_dict()
        self.ranks.barrier()  # the writer may still be writing the checkpoint that the others read
        self.restore_point.restore_before(self, wish.before)
        self._decision = GO_ON  # also where the restored state had been an end
        for name, value in kept.items():
            setattr(self.state, name, value)
        self.interventions.load_state_dict(interventions)
        logger.warning(
            "went back from step %d to step %d (%s)", broke_at, self.state.iteration, wish.reason
        )
        self.notify(TrainingEvents.FLLM_ROLLED_BACK)

    # ------------------------------------------------------------------ one step

    def _train_step(self, batch: Any) -> StepOutput:
        """Take one optimizer step on a step batch, or on a single batch."""
        window = self.window = as_window(batch)
        if not self.model.training:
            self.model.train()
        sequences, computed = count_computed(window)
        if self.ranks.alone:  # it checks this after the step
            num_tokens, num_sequences = window.num_tokens, sequences
            self.tokens_computed = computed
        else:
            num_tokens, num_sequences = self._agree_on(window, sequences, computed)
        if self.state.iteration in self.interventions.skipped:
            output = StepOutput(math.nan, math.nan, num_tokens, num_sequences, "ledger")
            self.state.output = output
            self.notify(TrainingEvents.FLLM_STEP_REJECTED)
        elif self._ignite.rate_setters:
            with self._foreign_rates():
                output = self._attempt(window, num_tokens, num_sequences)
        else:
            output = self._attempt(window, num_tokens, num_sequences)
        self._account(output)
        return output

    def _agree_on(self, window: Window, sequences: int, computed: int) -> tuple[int, int]:
        """Return tokens and sequences over all ranks; on the way, vote on what may end the run."""
        num_tokens, num_sequences, self.tokens_computed, *votes = self.ranks.sum_counts(
            [
                window.num_tokens,
                sequences,
                computed,
                self.budget.is_used_up(),
                self._wants_to_leave(),
                bool(self._stopped_by),
                self._faults.own is not None,
                self._next_facts.end_epoch,
                self._next_facts.skip_epoch_completed,
                not self.budget.has_time_to_evaluate(),
            ]
        )
        if votes[3]:
            self.state.iteration -= 1  # the step is not begun on any rank
            self._faults.raise_everywhere()
        facts, self._next_facts = self._facts, StepFacts()
        facts.exhausted, facts.leaving = votes[0] > 0, votes[1] > 0
        facts.end_epoch, facts.skip_epoch_completed = votes[4] > 0, votes[5] > 0
        facts.hurries = votes[6] > 0
        if votes[2]:
            self._heed_terminations()
        return num_tokens, num_sequences

    @contextmanager
    def _foreign_rates(self) -> Iterator[None]:
        """Lower the rates that a handler of Ignite has set by the interventions, for one step."""
        cuts, step = self.interventions.cuts, self.state.iteration
        factor = self.interventions.rate_factor(step) if cuts else 1.0
        with self._ignite.rates_times(factor) as rate:
            self.state.metrics["train/lr"] = rate
            yield

    def _attempt(self, window: Window, num_tokens: int, num_sequences: int) -> StepOutput:
        """Take the step; repeat it if a controller asks for that after a refusal."""
        self.generators_before = capture_generators(self.device)
        buffers_before = self._buffers.copied()
        while True:
            self._facts.redo = False
            output = self.step(window, num_tokens, num_sequences)
            self.state.output = output
            if not output.rejection:
                return output
            self._buffers.put_back(buffers_before)
            self.notify(TrainingEvents.FLLM_STEP_REJECTED)
            if output.rejection not in ("overflow", "empty"):
                self._warn_if_nobody_acts(output)
            if output.rejection != "overflow":
                # As if the step had never been tried: a clean run that skips its step batch
                # draws no random numbers for it.
                restore_generators(self.generators_before, self.device)
            if not self._facts.redo:
                return output

    def _warn_if_nobody_acts(self, output: StepOutput) -> None:
        if not self.ranks.is_writer or self.has_role("recovery"):
            return
        refused = self.state.skipped_steps
        if math.log10(refused).is_integer():  # the 1st, 10th, 100th: a run may refuse every step
            logger.warning(
                "step %d: update refused (%s): loss %s, gradient norm %s; %d so far, and no handler"
                " that looks for the cause is attached",
                self.state.iteration,
                output.rejection,
                output.loss,
                output.grad_norm,
                refused,
            )

    def _account(self, output: StepOutput) -> None:
        """Count the step and write the metrics that need no handler."""
        state, metrics = self.state, self.state.metrics
        state.tokens_seen += output.num_tokens
        state.sequences_seen += output.num_sequences
        metrics["train/loss"] = output.loss
        metrics["train/grad_norm"] = output.grad_norm
        step_of_epoch = self.epochs.position(state.iteration - 1)[1] + 1
        if step_of_epoch == 1:
            state.epoch_nll, state.epoch_tokens = 0.0, 0
            metrics.pop("train/epoch_loss", None)
        if math.isfinite(output.loss) and not output.rejection:
            state.epoch_nll += output.loss * output.num_tokens
            state.epoch_tokens += output.num_tokens
        if step_of_epoch == self.epochs.length:
            self._measure_epoch()

    def _measure_epoch(self) -> None:
        state = self.state
        mean = state.epoch_nll / state.epoch_tokens if state.epoch_tokens else math.nan
        state.metrics["train/epoch_loss"] = mean
        self.history.record_epoch(self.epoch, state.iteration, mean)

    # ------------------------------------------------------------------ what follows a step

    def _after_step(self) -> None:
        """Fire what follows a step, behind every other handler of ITERATION_COMPLETED."""
        facts = self._facts
        if self.ranks.alone:
            facts.exhausted, facts.leaving = self.budget.is_used_up(), self._wants_to_leave()
            facts.hurries = not self.budget.has_time_to_evaluate()
        if facts.end_epoch:
            self._end_epoch_early()
        self._decision = self._decide()
        step = self.state.iteration
        if self._decision is not ROLL_BACK:
            self.notify(TrainingEvents.FLLM_METRICS_MEASURED)
            self.history.record_step(step, self.state.metrics)
            self.notify(TrainingEvents.FLLM_METRICS_READY)
            if self.is_log_step():
                self.notify(TrainingEvents.FLLM_LOG_DUE)
            wishes = facts.finish or facts.end_epoch or facts.roll_back is not None
            if self._decision is not GO_ON or wishes:
                self._conclude()
        if self._decision is ROLL_BACK or not self.epochs.end_with(step):
            self._end_step()
        elif self.epochs.last_cut(step)[0] == step:
            Engine.terminate_epoch(self, facts.skip_epoch_completed)
            if facts.skip_epoch_completed:
                self._end_step()

    def _after_epoch(self) -> None:
        """End the last step of an epoch, behind every other handler of EPOCH_COMPLETED."""
        if self.epochs.end_with(self.state.iteration):
            self._ignite.note_epoch_end(self.state.iteration)
            self._facts.leaving |= self.ranks.alone and self._is_interrupted
            self._conclude()  # what those handlers wish
            self._end_step()

    def _conclude(self) -> None:
        """Carry out the decision about this step; evaluations and saves may bring new wishes."""
        if self._decide().evaluate:
            with self.budget.measuring_end():
                self._carry_out()
        else:
            self._carry_out()

    def _carry_out(self) -> None:
        facts = self._facts
        while True:
            self._end_epoch_early()
            decision = self._decision = self._decide()
            if decision.save is not None:
                facts.saved = decision.end
                self._save(decision.save)
            elif decision.evaluate:
                facts.evaluated = True
                self._evaluate()
                facts.leaving = facts.leaving or (self.ranks.alone and self._wants_to_leave())
            elif decision is ROLL_BACK or self.restore_point is None:
                return
            else:
                self.restore_point.note_end_of_step(self)
                if self._decide().end is decision.end:
                    return

    def _end_epoch_early(self) -> None:
        """End the epoch with this step if a handler wishes that and the step is kept."""
        facts, step = self._facts, self.state.iteration
        if facts.end_epoch and facts.roll_back is None and step and self.epochs.end_early(step):
            self._measure_epoch()
            self._heed_epochs()

    def _evaluate(self) -> None:
        """Have the validation data measured."""
        self.notify(TrainingEvents.FLLM_EVALUATION_DUE)
        if not self.ranks.alone:
            self._heed_terminations()

    def _heed_terminations(self) -> None:
        """Let the first rank whose handler has terminated the run end it on all, for one reason."""
        source = self.ranks.first(bool(self._stopped_by))
        if source is not None:
            self.finish(self.ranks.broadcast_text(self._stopped_by, source))

    def _decide(self) -> Decision:
        step = self.state.iteration
        unmeasured = self.state.evaluated_step != step
        last = self.budget.limits.total_steps
        at = StepEnd(step, last, self._cadence, self._facts, unmeasured)
        decision = decide(at)
        if decision.pending and not self._is_evaluated():
            return decide(at._replace(unmeasured=False))
        return decision

    def _save(self, why: Save) -> None:
        """Save the state; it counts its own save unless it is saved for a stop.

        So a run that is resumed from any checkpoint counts like one that was never stopped.
        """
        self._saving = why
        try:
            self.notify(TrainingEvents.FLLM_CHECKPOINT_DUE)
        finally:
            self._saving = None

    def _end_step(self) -> None:
        """Stop the inner run if this step was its last, else begin the next with no wishes."""
        if self._decision is ROLL_BACK:
            Engine.terminate(self, skip_completed=True)
        elif not self._decision.ends_run:
            self._facts = StepFacts()
        else:
            if self._is_interrupted:
                Engine.interrupt(self)
            elif self._skips_completed or self.state.iteration != self.total_steps:
                # At the last step Ignite stops by itself.
                Engine.terminate(self, self._skips_completed)

    def validate(self) -> dict[str, Any]:
        """Measure the whole validation data, in one pass of the evaluator.

        Returns:
            `val/loss`, `val/perplexity` and the metrics that are attached to the evaluator, which
            also enter `state.metrics`; empty without validation data, or when the pass was cut
            short.
        """
        if not self._can_evaluate():
            return {}
        measured = self.evaluator.run(self.val_loader).metrics
        if not measured:
            return {}
        metrics = {
            f"val/{name}": value
            for name, value in measured.items()
            # A mapping of results stands there item by item too, if the metric does not forbid it.
            if not (isinstance(value, Mapping) and value.keys() <= measured.keys())
        }
        self.state.metrics.update(metrics)
        self.state.evaluated_step = self.state.iteration
        self.history.record_validation(self.state.iteration, metrics)
        return metrics

    # ------------------------------------------------------------------ what handlers may ask

    def evaluation_pending(self) -> bool:
        """Whether the evaluation that the current step asks for is still to be made."""
        return self._decide().pending

    def _can_evaluate(self) -> bool:
        return self.val_loader is not None and len(self.val_loader) > 0

    def _is_evaluated(self) -> bool:
        return self._can_evaluate() and bool(
            self._event_handlers[TrainingEvents.FLLM_EVALUATION_DUE]
        )

    # ------------------------------------------------------------------ Ignite's own handlers

    def receive(self, owner: Any, handler: Callable[..., Any], event_name: Any) -> None:
        """Check one of Ignite's handlers before it is attached.

        Raises:
            ConfigError: it could not do here what it does elsewhere.
        """
        updates = self.total_steps or foreign.MOST_UPDATES
        if event_name in (Events.EPOCH_STARTED, Events.EPOCH_COMPLETED):
            updates = -(-updates // self.steps_per_epoch)
        probe = StepOutput(1.0, 1.0, 1, 1)
        foreign.check(handler, event_name, updates, probe, self.restore_point is not None)

    def admit(self, handler: Callable[..., Any]) -> None:
        """Keep the state of a handler's owner; let a scheduler of Ignite set the learning rate."""
        super().admit(handler)
        self._ignite.admit(foreign.owner_of(handler))

    def release(self, owner: Any) -> None:
        """Forget one of Ignite's handlers."""
        super().release(owner)
        self._ignite.release(owner)

    @property
    def rate_is_foreign(self) -> bool:
        """Whether a handler of Ignite sets the learning rate, so that the schedule does not."""
        return bool(self._ignite.rate_setters)

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """Return the position, the counters, the interventions and the run's id."""
        state: dict[str, Any] = {name: getattr(self.state, name) for name in COUNTERS}
        state["elapsed_before"] = self.budget.elapsed_seconds()
        state["checkpoints"] += self._saving is Save.ON_SCHEDULE
        if own := [key for key in self.state_dict_user_keys if key not in COUNTERS]:
            state["user"] = {key: getattr(self.state, key) for key in own}
        if self.epochs.cuts:
            state["epochs_ended_early"] = self.epochs.state_dict()
        if self._ignite.have_heard_epoch_end(self.state.iteration):  # most saves come before
            state["epoch_completed"] = True
        elif self._owes_handlers_an_end_of_epoch():
            state["end_of_epoch"] = self.state.seen_by_handlers()
        return {
            "iteration": self.state.iteration,
            "epoch_length": self.steps_per_epoch,
            "ledger": self.interventions.state_dict(),
            "finished": self.finished,
            "run_id": self.run_id,
            **state,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore a saved position.

        Raises:
            CheckpointError: the saved epochs have another number of steps, or a counter is none.
        """
        check_counters(state_dict)
        is_own_start = state_dict["iteration"] == 0 and state_dict["run_id"] == self.run_id
        cuts, step = state_dict.get("epochs_ended_early", ()), state_dict["iteration"]
        length = None if is_own_start else state_dict["epoch_length"]
        if not self.epochs.load_state_dict(cuts, length, step):
            raise CheckpointError(
                "the checkpoint's epochs have another number of steps: the data, the batch or the"
                " number of ranks changed",
                got=f"{self.steps_per_epoch} steps",
                expected=f"{state_dict['epoch_length']} steps",
                fix="resume with the data and batch settings of the run, or start a new run",
            )
        position = {"iteration": step, "epoch_length": self.steps_per_epoch}
        counters = {name: state_dict.get(name, value) for name, value in COUNTERS.items()}
        own = state_dict.get("user", {})
        super().load_state_dict({**position, "max_iters": None, **counters, **own})
        self.state.epoch = self.epochs.position(self.state.iteration)[0]
        self._heed_epochs()
        ended = str(state_dict.get("finished", ""))
        self._decision = Decision(End.FINISH, ended) if ended else GO_ON
        self.interventions.load_state_dict(state_dict["ledger"])
        self.run_id = state_dict["run_id"]
        self._ignite.owes_epoch_end = not state_dict.get("epoch_completed", False)
        self.state.show_handlers(state_dict.get("end_of_epoch"))
        self.history.cut_back(self.state.iteration, self.evaluation_pending())
