"""The training loop, drawn once, and the events that have a name of ours.

```
FLLM_RUN_STARTED                once, before anything else; resume has put the state in place
STARTED
  EPOCH_STARTED
    GET_BATCH_*                 the loader yields a window: the micro-batches of ONE optimizer step
    ITERATION_STARTED           controllers: the learning rate for this step is set
      the window's valid tokens, counted on the host, are summed over the ranks (N)
      per micro-batch: forward, summed loss x world / N, backward
        FLLM_MICRO_BATCH_COMPLETED
      window complete: unscale, measure the norm, sum loss and norm over the ranks (one host read)
      FLLM_GRADIENTS_READY      observers of gradients; a controller may call reject_step(reason)
      guard: finite on every rank and not rejected? then clip and update
        FLLM_OPTIMIZER_STEPPED  the update was applied (weight EMA listens here)
        FLLM_STEP_REJECTED      the update was refused; weights were never touched. A controller
                                may ask for the step once more, or for a rollback
          FLLM_INCIDENT_DETECTED  its verdict, in state.incident
    ITERATION_COMPLETED         producers write state.metrics: loss EMA, perplexity, throughput
    FLLM_METRICS_READY          consumers read: logs, progress
    FLLM_EVALUATION_DUE         every eval_steps, at each epoch's end and at the last step
      FLLM_EVALUATION_STARTED
      FLLM_EVALUATION_COMPLETED consumers of val metrics: best score, early stopping, samples
    FLLM_CHECKPOINT_DUE         after every evaluation (or checkpoint_steps), at step 0 and the last
      FLLM_CHECKPOINT_SAVED     its report
      FLLM_STATE_DAMAGED        it holds NaN or infinity, so that it is not saved
  EPOCH_COMPLETED
FLLM_ROLLED_BACK                from Trainer.run, between two inner runs; STARTED fires again
COMPLETED
FLLM_RUN_ENDED                  once, however the run ended: an exception passes through here too
```

One iteration is one optimizer step. Order comes from the event, never from a number or the order
of attachment: producers listen early, consumers listen to a later event. The Trainer fires every
`FLLM_` event after ITERATION_COMPLETED itself, behind all other handlers of that event.

The `FLLM_` prefix is no decoration: Ignite compares events by member name, so a member called
STARTED would fire together with `Events.STARTED`.
"""

from __future__ import annotations

from ignite.engine import EventEnum


class TrainingEvents(EventEnum):
    """Events of a `Trainer` besides Ignite's own, each named for a fact."""

    FLLM_RUN_STARTED = "fllm_run_started"
    FLLM_MICRO_BATCH_COMPLETED = "fllm_micro_batch_completed"
    FLLM_GRADIENTS_READY = "fllm_gradients_ready"
    FLLM_OPTIMIZER_STEPPED = "fllm_optimizer_stepped"
    FLLM_STEP_REJECTED = "fllm_step_rejected"
    FLLM_METRICS_READY = "fllm_metrics_ready"
    FLLM_EVALUATION_DUE = "fllm_evaluation_due"
    FLLM_EVALUATION_STARTED = "fllm_evaluation_started"
    FLLM_EVALUATION_COMPLETED = "fllm_evaluation_completed"
    FLLM_CHECKPOINT_DUE = "fllm_checkpoint_due"
    FLLM_CHECKPOINT_SAVED = "fllm_checkpoint_saved"
    FLLM_STATE_DAMAGED = "fllm_state_damaged"
    FLLM_INCIDENT_DETECTED = "fllm_incident_detected"
    FLLM_ROLLED_BACK = "fllm_rolled_back"
    FLLM_RUN_ENDED = "fllm_run_ended"


# The state attribute that an event's filters (every=, once=) count by. Whoever fires the event
# advances the attribute: Ignite does so for its own events alone.
EVENT_TO_ATTRIBUTE: dict[TrainingEvents, str] = {
    TrainingEvents.FLLM_RUN_STARTED: "iteration",
    TrainingEvents.FLLM_MICRO_BATCH_COMPLETED: "micro_batches",
    TrainingEvents.FLLM_GRADIENTS_READY: "iteration",
    TrainingEvents.FLLM_OPTIMIZER_STEPPED: "optimizer_steps",
    TrainingEvents.FLLM_STEP_REJECTED: "skipped_steps",
    TrainingEvents.FLLM_METRICS_READY: "iteration",
    TrainingEvents.FLLM_EVALUATION_DUE: "iteration",
    TrainingEvents.FLLM_EVALUATION_STARTED: "evaluations",
    TrainingEvents.FLLM_EVALUATION_COMPLETED: "evaluations",
    TrainingEvents.FLLM_CHECKPOINT_DUE: "iteration",
    TrainingEvents.FLLM_CHECKPOINT_SAVED: "checkpoints",
    TrainingEvents.FLLM_STATE_DAMAGED: "iteration",
    TrainingEvents.FLLM_INCIDENT_DETECTED: "incidents",
    TrainingEvents.FLLM_ROLLED_BACK: "rollbacks",
    TrainingEvents.FLLM_RUN_ENDED: "iteration",
}
