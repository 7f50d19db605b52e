"""The learning-rate range test (Smith 2015, "Cyclical learning rates", section 3.3).

The steps are those of the run itself, from the same weights and the same data, except that the rate
rises by the same factor in each. Too small a rate leaves the loss where it is, a good one lowers
it, and too large a one raises it again, where the test ends.
"""

from __future__ import annotations

import math
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ignite.engine import Events
from tqdm import tqdm

from fundamentallm.compute.plan import Machine
from fundamentallm.config import RunConfig, load_config
from fundamentallm.engine.console import console_output, program, say
from fundamentallm.engine.plugins import load_plugins
from fundamentallm.engine.stopping import ended_by_signals
from fundamentallm.engine.tuning.curve import Curve
from fundamentallm.engine.tuning.tune import check_start, free_path, write_copy
from fundamentallm.engine.wiring.assemble import (
    DEFAULT_HANDLERS,
    assemble,
    check_names,
    open_machine,
)
from fundamentallm.engine.wiring.run_directory import nowhere
from fundamentallm.errors import ConfigError, MachineError, NumericalError
from fundamentallm.events import TrainingEvents
from fundamentallm.files.terminal import room_in
from fundamentallm.training.handlers.base import Handler
from fundamentallm.training.loop import TrainingLoop
from fundamentallm.training.trainer import Trainer

LOWEST, HIGHEST = 1e-6, 10.0  # rates
STEPS, LEAST_STEPS = 200, 20
DIVERGED = 2.0  # times the lowest smoothed loss
MEMORY = 0.8  # of the running mean that notices divergence


def tune_learning_rate(
    config_path: Path,
    overrides: Sequence[str] = (),
    plugins: Sequence[str] = (),
    out: Path | None = None,
    seconds: float = 600.0,
    steps: int = STEPS,
) -> int:
    """Test learning rates, draw the curve, write the suggestion into a copy of the file.

    The picture goes beside the copy, where matplotlib is installed.

    Args:
        config_path, overrides, plugins, out: as for `tune`.
        seconds: after which the test ends where it is.
        steps: from the lowest to the highest rate.

    Raises:
        FundamentaLLMError: as `run`, or no rate lowers the loss.
    """
    check_start(seconds)
    if steps < LEAST_STEPS:
        raise ConfigError(
            "too few steps for a curve",
            where=f"--steps {steps}",
            expected=f"at least {LEAST_STEPS}",
        )
    target = free_path(config_path, out)
    deadline = time.monotonic() + seconds
    written = load_config(config_path, overrides)
    with console_output(), ended_by_signals():
        load_plugins([*written.plugins, *plugins], written.locate("plugins"))
        check_names(written)
        say(f"{steps:,} steps of the run, with rates from {LOWEST:g} to {HIGHEST:g}:")
        curve = range_test(written, open_machine(written), steps, deadline)
    suggestion = curve.suggestion()
    say()
    say(curve.text(suggestion))
    say()
    if suggestion is None:
        raise NumericalError(
            "no learning rate lowered the loss by more than it scatters",
            where=str(config_path),
            got=f"{len(curve.losses):,} steps",
            fix="give more --steps or --seconds, or a larger data.batch_size",
        )
    rate = float(f"{suggestion:.1e}")
    write_copy(target, config_path, overrides, lambda _: {("training", "learning_rate"): rate})
    say(f"training.learning_rate: {rate:g} (the file has {written.training.learning_rate:g})")
    picture = target.with_suffix(".png")
    try:
        picture.write_bytes(curve.png(suggestion))
        say(f"The curve is in {picture}.")
    except MachineError as error:
        say(f"{error.what}: {error.fix}")
    say(f"Written to {target}. Next:")
    say(f"  {program()} run {shlex.quote(str(target))}")
    return 0


class RisingRate:
    """Controls: raises the learning rate by the same factor in each step; ends on divergence.

    A parameter group with another rate than `training.learning_rate` keeps it, as it does when
    that field changes.

    Args:
        learning_rate: the configured one.
        rates: one for each step.
        deadline: of `time.monotonic`.
    """

    role = "recovery"  # a step that is not finite is expected, and ends the test

    def __init__(self, learning_rate: float, rates: Sequence[float], deadline: float) -> None:
        self.learning_rate = learning_rate
        self.rates = rates
        self.deadline = deadline
        self.losses: list[float] = []
        self._bar = tqdm(
            total=len(rates), unit="step", leave=False, disable=None, ncols=room_in(sys.stderr)
        )
        self._mean, self._lowest = math.nan, math.inf

    def attach(self, trainer: TrainingLoop) -> None:
        """Set the rate before a step, and read the loss after it."""
        self._groups = [g for g in trainer.optimizer.param_groups if g["lr"] == self.learning_rate]
        trainer.add_event_handler(Events.ITERATION_STARTED, self.apply)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, self.record)
        trainer.add_event_handler(TrainingEvents.FLLM_RUN_ENDED, lambda: self._bar.close())

    def apply(self, trainer: TrainingLoop) -> None:
        """Write the rate of this step."""
        for group in self._groups:
            group["lr"] = self.rates[trainer.state.iteration - 1]

    def record(self, trainer: TrainingLoop) -> None:
        """Keep the loss, which is that of the weights before the step; notice the end."""
        loss = trainer.state.output.loss
        self._bar.update()
        if math.isfinite(loss):
            self.losses.append(loss)
            known = loss if math.isnan(self._mean) else self._mean
            self._mean = MEMORY * known + (1 - MEMORY) * loss
            self._lowest = min(self._lowest, self._mean)
        if not math.isfinite(loss) or self._mean > DIVERGED * self._lowest:
            trainer.finish("divergence")
        elif time.monotonic() > self.deadline:
            trainer.finish("the time is used up")


def range_test(
    written: RunConfig, machine: Machine, steps: int, deadline: float = math.inf
) -> Curve:
    """Take steps of a run with rising rates; nothing is written.

    Args:
        written: the run's configuration, whose names were checked.
        machine: where it computes.
        steps: from the lowest to the highest rate.
        deadline: of `time.monotonic`.
    """
    rising = RisingRate(written.training.learning_rate, geometric(LOWEST, HIGHEST, steps), deadline)
    trainer = bare_trainer(written, machine, [rising])
    trainer.run(max_iters=steps)
    return Curve(rising.rates[: len(rising.losses)], rising.losses)


def bare_trainer(written: RunConfig, machine: Machine, handlers: Sequence[Handler]) -> Trainer:
    """Return the trainer of a run, with some handlers and none of its own."""
    none: dict[str, Any] = dict.fromkeys([*DEFAULT_HANDLERS, *written.handlers], False)
    update: dict[str, Any] = {"handlers": none}
    bare = written.model_copy(update=update)
    return assemble(bare, nowhere(bare), machine, measuring=False, first=handlers).trainer


def geometric(low: float, high: float, count: int) -> list[float]:
    """Return numbers from `low` to `high`, each the same multiple of the last."""
    factor = (high / low) ** (1 / max(count - 1, 1))
    return [low * factor**number for number in range(count)]
