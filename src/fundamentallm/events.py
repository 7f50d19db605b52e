"""The training loop, drawn once, and the events of this package.

```
FLLM_RUN_STARTED                once, before anything else; resume has put the state in place
STARTED
  EPOCH_STARTED
    GET_BATCH_STARTED           a step batch: the micro-batches of ONE optimizer step
    GET_BATCH_COMPLETED
    ITERATION_STARTED           controllers: the learning rate for this step is set
      the step batch's valid tokens, counted on the host, are summed over the ranks (N)
      per micro-batch: forward, summed loss x world / N, backward
        FLLM_MICRO_BATCH_COMPLETED
      all gradients there: unscale, measure the norm, sum loss and norm over the ranks (one read)
      FLLM_GRADIENTS_READY      observers of gradients; a controller may call reject_step(reason)
      guard: finite on every rank and not rejected? then clip and update
        FLLM_OPTIMIZER_STEPPED  the update was applied (weight EMA listens here)
        FLLM_STEP_REJECTED      the update was refused; weights were never touched. A controller
                                may ask to repeat the step, or for a rollback
          FLLM_INCIDENT_DETECTED  its verdict, in state.incident
    ITERATION_COMPLETED         producers write state.metrics: loss EMA, perplexity, throughput
    FLLM_METRICS_MEASURED       metrics that are derived from other metrics: MFU
    FLLM_METRICS_READY          consumers read: progress
    FLLM_LOG_DUE                every log_steps, at each epoch's end and at the last step: loggers
    FLLM_CHECKPOINT_DUE         before each evaluation (or checkpoint_steps), at step 0 and the end
      FLLM_CHECKPOINT_SAVED     its report; in the background, when it is on the disk
      FLLM_STATE_DAMAGED        it holds NaN or infinity, so that it is not saved
    FLLM_EVALUATION_DUE         every eval_steps, at each epoch's end and at the last step
      FLLM_EVALUATION_STARTED
      FLLM_EVALUATION_COMPLETED consumers of val metrics: best score, early stopping, samples
        FLLM_TEXT_SAMPLED       a sample of generated text, in state.sample
  EPOCH_COMPLETED
TERMINATE                       Ignite fires it when an inner run ends early
FLLM_ROLLED_BACK                from Trainer.run, between two inner runs; STARTED fires again
COMPLETED
FLLM_RUN_ENDED                  once, however the run ends, also after an exception
```

One iteration is one optimizer step. Order comes from the event, never from a number or the order
of attachment: producers listen early, consumers listen to a later event. The Trainer fires every
`FLLM_` event after ITERATION_COMPLETED itself, behind all other handlers of that event.

The `FLLM_` prefix is necessary: Ignite compares events by member name, so a member called
STARTED would fire together with `Events.STARTED`.
"""

from __future__ import annotations

from typing import Any

from ignite.engine import EventEnum, Events

IN_STEP, AFTER_STEP = Events.ITERATION_STARTED, Events.ITERATION_COMPLETED


class TrainingEvents(EventEnum):
    """Events of a `Trainer` in addition to Ignite's, each named for a fact.

    One line here and one place in the drawing define an event. `LOOP`, the filters and the counting
    follow from the line. Events that follow the same Ignite event stand in the order of the loop.

    Attributes:
        follows: the Ignite event that it follows; None: it comes before all of them.
        counter: the attribute of the state that its filters (`every=`, `once=`) count by.
        counts: whether firing it adds one to the counter. If not, the counter belongs to
            something else: Ignite's `iteration`, or an earlier event.
    """

    follows: Events | None
    counter: str
    counts: bool

    def __new__(cls, value: str, *_: Any) -> TrainingEvents:
        """Make the member of a value, as Ignite's events are made."""
        member = object.__new__(cls)
        member._value_ = value
        return member

    def __init__(
        self, value: str, follows: Events | None, counter: str, counts: bool = False
    ) -> None:
        super().__init__(value)
        self.follows = follows
        self.counter = counter
        self.counts = counts

    FLLM_RUN_STARTED = "fllm_run_started", None, "iteration"
    FLLM_MICRO_BATCH_COMPLETED = "fllm_micro_batch_completed", IN_STEP, "micro_batches", True
    FLLM_GRADIENTS_READY = "fllm_gradients_ready", IN_STEP, "iteration"
    FLLM_OPTIMIZER_STEPPED = "fllm_optimizer_stepped", IN_STEP, "optimizer_steps", True
    FLLM_STEP_REJECTED = "fllm_step_rejected", IN_STEP, "skipped_steps", True
    FLLM_INCIDENT_DETECTED = "fllm_incident_detected", IN_STEP, "incidents", True
    FLLM_METRICS_MEASURED = "fllm_metrics_measured", AFTER_STEP, "iteration"
    FLLM_METRICS_READY = "fllm_metrics_ready", AFTER_STEP, "iteration"
    FLLM_LOG_DUE = "fllm_log_due", AFTER_STEP, "iteration"
    FLLM_CHECKPOINT_DUE = "fllm_checkpoint_due", AFTER_STEP, "iteration"
    FLLM_CHECKPOINT_SAVED = "fllm_checkpoint_saved", AFTER_STEP, "checkpoints", True
    FLLM_STATE_DAMAGED = "fllm_state_damaged", AFTER_STEP, "iteration"
    FLLM_EVALUATION_DUE = "fllm_evaluation_due", AFTER_STEP, "iteration"
    FLLM_EVALUATION_STARTED = "fllm_evaluation_started", AFTER_STEP, "evaluations", True
    FLLM_EVALUATION_COMPLETED = "fllm_evaluation_completed", AFTER_STEP, "evaluations"
    FLLM_TEXT_SAMPLED = "fllm_text_sampled", AFTER_STEP, "evaluations"
    FLLM_ROLLED_BACK = "fllm_rolled_back", Events.TERMINATE, "rollbacks", True
    FLLM_RUN_ENDED = "fllm_run_ended", Events.COMPLETED, "iteration"


# Every event of a run that takes handlers, in the order of the drawing.
LOOP: tuple[Events | TrainingEvents, ...] = tuple(
    event
    for anchor in (
        None,
        Events.STARTED,
        Events.EPOCH_STARTED,
        Events.GET_BATCH_STARTED,
        Events.GET_BATCH_COMPLETED,
        Events.ITERATION_STARTED,
        Events.ITERATION_COMPLETED,
        Events.EPOCH_COMPLETED,
        Events.TERMINATE,
        Events.COMPLETED,
    )
    for event in (anchor, *(ours for ours in TrainingEvents if ours.follows is anchor))
    if event is not None
)
