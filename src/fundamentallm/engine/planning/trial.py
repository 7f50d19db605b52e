"""A small run, trained in this process by the trainer of `run`, with nothing written."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from fundamentallm.compute.plan import Machine
from fundamentallm.config import RunConfig
from fundamentallm.data.loaders import Batch, ValidationBatches
from fundamentallm.engine.wiring.assemble import DEFAULT_HANDLERS, assemble
from fundamentallm.engine.wiring.inputs import Inputs
from fundamentallm.engine.wiring.run_directory import nowhere
from fundamentallm.errors import NumericalError
from fundamentallm.events import TrainingEvents
from fundamentallm.training.loop import TrainingLoop

KEPT_HANDLERS = ("schedule", "weight_ema", "adaptive_clip")  # which change what is learnt
UNTIMED_STEPS = 3  # the first ones are slower


@dataclass(frozen=True, slots=True)
class TrialResult:
    """What a small run gave.

    Attributes:
        loss: on the validation text, in nats per token; infinite if it diverged.
        token_seconds: seconds for a training token, without the first steps.
        evaluation_seconds: for the whole validation text.
    """

    loss: float
    token_seconds: float
    evaluation_seconds: float


class OutOfTimeError(Exception):
    """A small run was ended at its deadline."""


class _Watch:
    """Observes: times the steps, tells how far the run is, and ends it at a deadline."""

    role = "recovery"  # of a small run that diverges nothing is to be saved

    def __init__(self, deadline: float, tell: Callable[[int], None]) -> None:
        self.deadline, self.tell = deadline, tell
        self.began = self.ended = 0.0
        self.diverged = self.is_late = False

    def attach(self, trainer: TrainingLoop) -> None:
        """Listen to the end of each step."""
        trainer.add_event_handler(TrainingEvents.FLLM_METRICS_READY, self.note)

    def note(self, trainer: TrainingLoop) -> None:
        """Take the time; end a run that diverged or is late."""
        self.ended = time.perf_counter()
        if trainer.state.iteration == UNTIMED_STEPS:
            self.began = self.ended
        self.tell(trainer.state.iteration)
        if not math.isfinite(trainer.state.output.loss):
            self.diverged = True
            trainer.finish("divergence")
        elif time.monotonic() > self.deadline:
            self.is_late = True
            trainer.finish("the time is used up")


class _EveryNth:
    """Each n-th batch of a validation loader."""

    def __init__(self, loader: ValidationBatches, stride: int) -> None:
        self.loader, self.stride = loader, stride

    def __len__(self) -> int:
        return -(-len(self.loader) // self.stride)

    def __iter__(self) -> Iterator[Batch]:
        return itertools.islice(iter(self.loader), 0, None, self.stride)


def small_run(config: RunConfig, steps: int, rate: float) -> RunConfig:
    """Return the configuration of a small run with a schedule of its own.

    Args:
        config: with everything resolved.
        steps: from the first warmup to the end of the decay.
        rate: times the configured learning rate.
    """
    training, handlers = config.training, config.handlers
    kept: dict[str, Any] = dict.fromkeys([*DEFAULT_HANDLERS, *handlers], False)
    kept |= {name: handlers[name] for name in KEPT_HANDLERS if name in handlers}
    kept["schedule"] = handlers.get("schedule", True)
    update = {
        "learning_rate": rate * training.learning_rate,
        "min_learning_rate": rate * training.min_learning_rate,
        "warmup_steps": min(training.warmup_steps, steps // 10),
        "total_steps": steps,
        "max_seconds": None,
        "stop_after_seconds": None,
        "max_tokens": None,
    }
    return config.model_copy(
        update={"training": training.model_copy(update=update), "handlers": kept}
    )


def train(
    config: RunConfig,
    inputs: Inputs,
    machine: Machine,
    stride: int = 1,
    deadline: float = math.inf,
    tell: Callable[[int], None] = lambda step: None,
) -> TrialResult:
    """Train a small run and evaluate it.

    Args:
        config: from `small_run`.
        inputs: text and loaders, which many runs share.
        machine: where it computes.
        stride: from one batch of the validation text that is evaluated to the next.
        deadline: of `time.monotonic`.
        tell: called with the step after each.

    Raises:
        OutOfTimeError: the deadline came before the end.
        FundamentaLLMError: it cannot be built or trained.
    """
    own = replace(inputs, start=replace(inputs.start, config=config, written=config))
    watch = _Watch(deadline, tell)
    trainer = assemble(config, nowhere(config), machine, False, [watch], own).trainer
    try:
        trainer.run()
    except NumericalError:
        watch.diverged = True
    if watch.is_late:
        raise OutOfTimeError
    steps = trainer.state.iteration - UNTIMED_STEPS
    timed = watch.ended - watch.began
    seconds = timed / (max(steps, 1) * trainer.train_loader.computed_per_step)
    began = time.perf_counter()
    validation = inputs.loaders.validation
    part = _EveryNth(validation, stride)
    loss = math.inf if watch.diverged else float(trainer.evaluator.run(part).metrics["loss"])
    evaluating = (time.perf_counter() - began) * len(validation) / len(part)
    return TrialResult(loss if math.isfinite(loss) else math.inf, seconds, evaluating)
