"""Measure small runs of a configuration, and fit the law of its loss and its costs."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from tqdm import tqdm

from fundamentallm.compute.plan import Machine, ModelFacts, Plan
from fundamentallm.config import RunConfig
from fundamentallm.data.batch import Window, count_valid
from fundamentallm.data.loaders import EpochLoader
from fundamentallm.engine.console import say
from fundamentallm.engine.planning.choice import (
    LEAST_CONFIGURED,
    SHORT_STEPS,
    Costs,
    rule_rate,
    trial_rate,
)
from fundamentallm.engine.planning.design import (
    LEAST_RUNS,
    LEAST_STEPS,
    RUNS,
    PlannedTrial,
    Speed,
    design,
    sizes_to_measure,
)
from fundamentallm.engine.planning.kept import KeptRuns, Measured, facts_of
from fundamentallm.engine.planning.scaling_law import Point, ScalingLaw
from fundamentallm.engine.planning.shapes import Shape, shapes_of
from fundamentallm.engine.planning.trial import (
    OutOfTimeError,
    small_run,
    train,
)
from fundamentallm.engine.tuning.measuring import measure
from fundamentallm.engine.wiring.assemble import assemble
from fundamentallm.engine.wiring.inputs import Inputs
from fundamentallm.engine.wiring.run_directory import nowhere
from fundamentallm.errors import MachineError
from fundamentallm.reports.page import duration
from fundamentallm.training.limits import Limits

TIMING_SECONDS = 0.3
OVERTIME = 1.25  # of the stated time, after which a small run is ended
BUILDING_SECONDS = 0.3  # of a small run, at first
EVALUATED_TOKENS = 1 << 17  # at most about so many, spread over the validation text
EVALUATION_SHARE = 0.15  # of the time
EVALUATION_COST = 0.35  # of a token, over that of training, at first
NEAR_STEPS, NEAR_RATE = 1.25, 1.4  # factors within which a run that was measured before is as good
COLUMNS = "{:>12}{:>8}{:>10}{:>12}{:>17}"
BAR = "{l_bar}{bar}| {elapsed} < {remaining}"


@dataclass(frozen=True)
class Ground:
    """A configuration as a run of the planned time would resolve it.

    Attributes:
        config: with everything resolved.
        inputs: text and loaders.
        machine: where it computes.
        shapes: the models to choose from, the smallest first.
        configured: the one that the configuration describes.
        start: seconds until the first step.
    """

    config: RunConfig
    inputs: Inputs
    machine: Machine
    shapes: Sequence[Shape]
    configured: Shape
    start: float

    @property
    def loader(self) -> EpochLoader:
        """The loader of the training text."""
        return self.inputs.loaders.train

    @property
    def step_tokens(self) -> int:
        """Tokens that an optimizer step computes."""
        return self.loader.computed_per_step

    @property
    def unique_tokens(self) -> int:
        """Tokens of an epoch."""
        return self.step_tokens * len(self.loader)

    def rate(self, shape: Shape) -> float:
        """Return the learning rate that the rule gives to a size."""
        training = self.config.training
        return rule_rate(
            training.learning_rate,
            training.optimizer.name,
            shape.parameters,
            self.configured.parameters,
        )

    def configured_tokens(self, speed: Speed, written: RunConfig) -> float:
        """Return the tokens of the run that the configuration describes, or of 2,000 steps."""
        limits = Limits.resolve(
            written.training, len(self.loader), getattr(self.loader, "steps_for_tokens", None)
        )
        counts = []
        if limits.total_steps is not None:
            counts.append(float(limits.total_steps * self.step_tokens))
        if limits.max_seconds is not None:
            seconds = max(limits.max_seconds - self.start, 1.0)
            counts.append(seconds / speed.token_seconds(self.configured.flops))
        tokens = min(counts, default=float(self.unique_tokens))
        return max(tokens, float(LEAST_CONFIGURED * self.step_tokens))


@dataclass(frozen=True)
class Knowledge:
    """What the small runs tell.

    Attributes:
        law: of the loss.
        costs: of a run.
        runs: the small runs with a finite loss.
        configured_tokens: of the run that the configuration describes.
    """

    law: ScalingLaw
    costs: Costs
    runs: Sequence[Measured]
    configured_tokens: float

    @property
    def largest_measured(self) -> int:
        """Parameters of the largest small run."""
        return max(run.parameters for run in self.runs)


def prepare(planned: RunConfig, inputs: Inputs, machine: Machine, start: float) -> Ground:
    """Resolve a configuration as the planned run would.

    Args:
        planned: with the planned time as its budget.
        inputs: read for it.
        machine: where it computes.
        start: seconds before its text is read.
    """
    began = time.monotonic()
    config = assemble(planned, nowhere(planned), machine, inputs=inputs).config
    shapes = shapes_of(config)
    configured = next(shape for shape in shapes if not shape.values)
    seconds = start + time.monotonic() - began
    return Ground(config, inputs, machine, shapes, configured, seconds)


class Measuring:
    """Measures small runs within a time; each is kept when it is done.

    Args:
        ground: of the configuration.
        written: the configuration with its own budget.
        seconds: for all small runs.
        tell: prints a line.
    """

    def __init__(
        self, ground: Ground, written: RunConfig, seconds: float, tell: Callable[[str], None] = say
    ) -> None:
        self.ground, self.seconds, self.tell = ground, seconds, tell
        facts = facts_of(ground.config, ground.machine, ground.inputs.source.sha256)
        self.kept = KeptRuns(facts)
        self._began = time.monotonic()
        # Each size would be compiled for many seconds by torch. The losses are equal up to
        # rounding, and the speed is corrected.
        self._gain = self._gain_of_compilation() if ground.config.training.compile is True else 1.0
        self._plain = _uncompiled(ground.config)
        self.speed = self._first_speed()
        self._written = written

    def run(self, planned_seconds: float) -> Knowledge:
        """Measure what is missing for a plan.

        Args:
            planned_seconds: of the planned run.

        Raises:
            MachineError: the time is too short for enough small runs.
        """
        ground = self.ground
        sizes = sizes_to_measure(ground.shapes, self.speed, planned_seconds, ground.unique_tokens)
        left = self._began + self.seconds - time.monotonic()
        validation = ground.inputs.loaders.validation
        tokens, seconds = validation.num_tokens, self.speed.token_seconds(sizes[-1].flops)
        passes = EVALUATION_COST * len(RUNS) * tokens * seconds / (EVALUATION_SHARE * left)
        stride = min(len(validation), max(1, math.ceil(max(passes, tokens / EVALUATED_TOKENS))))
        extra = BUILDING_SECONDS + EVALUATION_COST * tokens * seconds / stride
        trials = design(sizes, self.speed, left, ground.step_tokens, extra)
        trials = [
            replace(trial, rate=float(f"{trial.rate * trial_rate(trial.steps):.2g}"))
            for trial in trials
        ]
        missing = [trial for trial in trials if not self._is_kept(trial)]
        self._tell_start(trials, missing)
        self._train_all(missing, stride)
        return self._knowledge()

    def _first_speed(self) -> Speed:
        """Time a few steps of two sizes."""
        shapes = self.ground.shapes
        pair = {shapes[0].flops: shapes[0], self.ground.configured.flops: self.ground.configured}
        times = [self._timed(shape.applied_to(self._plain)) / self._gain for shape in pair.values()]
        return Speed.fitted(list(pair), times)

    def _timed(self, config: RunConfig) -> float:
        """Return the seconds of a token in a few steps."""
        batch = self.ground.loader.window_at(0, 0).micro_batches[0]
        window = Window([batch], count_valid(batch["target_ids"]))
        plan = Plan.resolve(config.training, ModelFacts.of(config.model), self.ground.machine)
        found = measure(config, plan, [window], TIMING_SECONDS, brief=True)
        if found.fault:
            raise MachineError("the speed cannot be measured", got=found.fault)
        return found.step_seconds / batch["input_ids"].numel()

    def _gain_of_compilation(self) -> float:
        """Return how many times as fast the configured model is when torch compiles it."""
        config = self.ground.config
        gain = self._timed(_uncompiled(config)) / self._timed(config)
        torch._dynamo.reset()
        return gain

    def _is_kept(self, trial: PlannedTrial) -> bool:
        """Return whether a run that was measured before tells about the same."""
        return any(
            (run.parameters, run.flops) == (trial.shape.parameters, trial.shape.flops)
            and abs(math.log(run.steps / trial.steps)) < math.log(NEAR_STEPS)
            and abs(math.log(run.rate / trial.rate)) < math.log(NEAR_RATE)
            for run in self.kept.runs
        )

    def _tell_start(self, trials: Sequence[PlannedTrial], missing: Sequence[PlannedTrial]) -> None:
        if len(self.kept.runs) + len(missing) < LEAST_RUNS:
            step = self.ground.step_tokens * self.speed.token_seconds(self.ground.shapes[0].flops)
            raise MachineError(
                "the time for measuring is too short for enough small runs",
                got=f"{self.seconds:.0f} s, and a step of the smallest model takes {step:.2g} s",
                expected=f"time for {LEAST_RUNS} runs of {LEAST_STEPS} steps and more",
                fix="give a longer --measure, plan a longer run, or lower data.batch_size",
            )
        known = len(self.kept.runs)
        if not missing:
            self.tell(f"Nothing is left to measure: {known} small runs are known from before.")
            return
        sizes = sorted({trial.shape.parameters for trial in trials})
        self.tell(
            f"Measuring {len(missing)} small run{'s' * (len(missing) != 1)}"
            f" of {sizes[0]:,} to {sizes[-1]:,} parameters:"
            f" about {duration(sum(trial.seconds for trial in missing))}, at most"
            f" {duration(OVERTIME * self.seconds)}."
            + (f" Known from before: {known}." if known else "")
            + " Ctrl-C keeps what is done."
        )
        self.tell("")
        self.tell(COLUMNS.format("parameters", "steps", "rate", "tokens/s", "validation loss"))

    def _train_all(self, trials: Sequence[PlannedTrial], stride: int) -> None:
        latest = self._began + OVERTIME * self.seconds
        total = sum(trial.seconds for trial in trials)
        with tqdm(total=100.0, unit="%", leave=False, disable=None, bar_format=BAR) as bar:
            for trial in trials:
                done = bar.n

                def tell(step: int, trial: PlannedTrial = trial, done: float = done) -> None:
                    share = trial.seconds / total * step / trial.steps
                    bar.update(done + 100 * share - bar.n)

                config = self._config_of(trial)
                try:
                    result = train(
                        config, self.ground.inputs, self.ground.machine, stride, latest, tell
                    )
                except OutOfTimeError:
                    bar.clear()
                    self.tell("(the time is used up)")
                    return
                shape = trial.shape
                run = Measured(shape.parameters, shape.flops, trial.steps, trial.rate, result)
                self.kept.add(run)
                bar.clear()
                self.tell(_row(run, self.ground.rate(shape)))

    def _config_of(self, trial: PlannedTrial) -> RunConfig:
        factor = trial.rate * self.ground.rate(trial.shape) / self._plain.training.learning_rate
        return small_run(trial.shape.applied_to(self._plain), trial.steps, factor)

    def _knowledge(self) -> Knowledge:
        runs = [run for run in self.kept.runs if math.isfinite(run.result.loss)]
        if len(runs) < LEAST_RUNS:
            raise MachineError(
                "too few small runs ended with a finite loss",
                got=f"{len(runs)} of {len(self.kept.runs)}",
                expected=f"at least {LEAST_RUNS}",
                fix="give a longer --measure"
                if len(runs) == len(self.kept.runs)
                else "lower training.learning_rate",
            )
        ground = self.ground
        step_tokens = ground.step_tokens
        points = [Point(run.parameters, run.steps * step_tokens, run.rate) for run in runs]
        losses = [run.result.loss for run in runs]
        law = ScalingLaw(points, losses, ground.unique_tokens, SHORT_STEPS * step_tokens)
        times = [run.result.token_seconds / self._gain for run in runs]
        speed = Speed.fitted([run.flops for run in runs], times)
        validation = ground.inputs.loaders.validation.num_tokens
        evaluation = statistics.median(
            run.result.evaluation_seconds / (validation * run.result.token_seconds) for run in runs
        )
        costs = Costs(speed, ground.start, evaluation, validation)
        configured = ground.configured_tokens(speed, self._written)
        return Knowledge(law, costs, runs, configured)


def _uncompiled(config: RunConfig) -> RunConfig:
    """Return a configuration in which torch compiles nothing."""
    if config.training.compile is not True:
        return config
    training = config.training.model_copy(update={"compile": False})
    return config.model_copy(update={"training": training})


def _row(run: Measured, rule: float) -> str:
    loss = f"{run.result.loss:.4f}" if math.isfinite(run.result.loss) else "diverged"
    rate, speed = f"{run.rate * rule:.2g}", f"{1 / run.result.token_seconds:,.0f}"
    return COLUMNS.format(f"{run.parameters:,}", f"{run.steps:,}", rate, speed, loss)
