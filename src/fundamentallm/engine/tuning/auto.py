"""What `precision: auto` and `compile: auto` choose when a run begins.

The choice takes time from the run, so it is short: a few micro-batches for each setting,
half a second, in this process, where the run can then use the compiled code. All of them together
get an allowance, `SHARE` of the run's seconds. What cannot pay off is not tried: nothing in a run
of seconds, no compiler in a run of half a minute. Measurements are kept (`speed_cache.py`); the
choice follows from them and from the length of the run, and is stored in the run's configuration: a
resumed run does not choose again.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fundamentallm.compute.plan import ModelFacts, Plan
from fundamentallm.compute.processor import why_not_bf16
from fundamentallm.config import RunConfig
from fundamentallm.data.batch import Window, count_valid
from fundamentallm.data.loaders import EpochLoader
from fundamentallm.engine.tuning.measuring import Measurement, failed, measure
from fundamentallm.engine.tuning.search import LEAST_GAIN
from fundamentallm.engine.tuning.speed_cache import SpeedCache, circumstances_of
from fundamentallm.errors import FundamentaLLMError
from fundamentallm.training.clock import seconds_since_start

logger = logging.getLogger(__name__)

LEAST_MICRO_BATCHES = 100  # of a run in which anything is measured
LEAST_SECONDS = 10.0  # expected of a run in which types are compared
# ... and of one in which torch's compiler is called. It takes 5 to 30 s, at best halves the rest.
LEAST_SECONDS_TO_COMPILE = 30.0
COMPILING_SHARE = 0.05  # of a run's time, up to which it may compile twice to compare types
SHARE = 0.05  # of a budget in seconds, for measuring
UNBUDGETED = 15.0  # seconds for measuring in a run without such a budget
COMPILING = 15.0  # seconds of the allowance that torch's compiler is called with
SECONDS = 0.5  # for the micro-batches of a setting, if they are faster than that
# A type that takes so many times as long, and at least a second, gets one call: if a machine
# emulates it, more calls would cost the run. Below a second, setup dominates the first call.
HOPELESS = 4.0
FEWEST_CALLS = 3  # of a measurement: it warms up, and two calls count


class Allowance:
    """The time that measuring may take from a run.

    The build of native code is not counted: it happens once for a processor, and its result is
    kept. It is told to the user.

    Args:
        seconds: of all measurements together.
        clock: monotonic seconds.

    Attributes:
        seconds: as given.
        built: seconds of native code's build among those that passed.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = seconds
        self.built = 0.0
        self._clock, self._began = clock, clock()

    @classmethod
    def of(cls, budget: float | None) -> Allowance:
        """Return that of a run with a budget in seconds, or without one."""
        return cls(UNBUDGETED if budget is None else SHARE * budget)

    @property
    def used(self) -> float:
        """Seconds that measuring took so far."""
        return self._clock() - self._began - self.built

    @property
    def left(self) -> float:
        """Seconds that it may still take."""
        return self.seconds - self.used


@dataclass(frozen=True, slots=True)
class Length:
    """How long a run has, from here on.

    Attributes:
        steps: of the optimizer, None where only the clock ends it.
        seconds: None where the clock does not end it.
        micro_batches: in a step.
    """

    steps: int | None
    seconds: float | None
    micro_batches: int = 1

    def expected(self, measurement: Measurement) -> float:
        """Return the seconds that the run takes, without compilation."""
        steps = math.inf if self.steps is None else self.steps
        left = math.inf if self.seconds is None else self.seconds
        return min(steps * self.micro_batches * measurement.step_seconds, left)

    def seconds_per_step(self, measurement: Measurement) -> float:
        """Return the seconds of a step with its share of the compilation."""
        step = self.micro_batches * measurement.step_seconds
        compiling = measurement.compile_seconds
        if self.steps is not None:
            total = compiling + self.steps * step
            if self.seconds is None or total <= self.seconds:
                return total / self.steps
        if self.seconds is None:
            return step
        left = self.seconds - compiling
        return step * self.seconds / left if left > 0 else math.inf


def choose(
    start: Plan,
    other: Plan | None,
    may_compile: bool,
    length: Length,
    seconds_of: Callable[[Plan, float], Measurement],
    natives: Sequence[Plan] = (),
    allowance: Allowance | None = None,
    kept: Collection[Plan] = (),
) -> Plan:
    """Return the plan that finishes the run soonest, or takes most steps, with few measurements.

    Args:
        start: not compiled; kept unless another saves `LEAST_GAIN` of the time.
        other: the same in another type; None if the type is fixed.
        may_compile: whether the plan may compile.
        length: of the run.
        seconds_of: measures a plan, of a micro-batch; its second argument is the time of one
            after which the setting has lost.
        natives: with native code, none if impossible. It compiles in seconds, so it is
            tried first; if it wins, torch's compiler is not called.
        allowance: what does not fit into it is not tried; None: no such limit.
        kept: plans whose measurement is known already and takes no time.
    """
    allowance = allowance or Allowance(math.inf)
    if length.steps is not None and length.steps * length.micro_batches < LEAST_MICRO_BATCHES:
        return start
    # A first call of so many seconds is the measurement: there would be no time for the others.
    measured = {start: seconds_of(start, allowance.left / FEWEST_CALLS)}
    step = measured[start].step_seconds
    slowest = max(1.0, HOPELESS * step)
    expected = length.expected(measured[start])

    def affordable(plan: Plan) -> bool:
        least = max(SECONDS, FEWEST_CALLS * step if step < math.inf else 0.0)
        return plan in kept or allowance.left >= least

    if other is not None and expected >= LEAST_SECONDS and affordable(other):
        measured[other] = seconds_of(other, slowest)
    if expected >= LEAST_SECONDS:
        for native in natives:
            if affordable(native):
                measured[native] = seconds_of(native, slowest)
    best = _best(measured, start, length)
    if best in natives:
        return best
    pays = expected >= LEAST_SECONDS_TO_COMPILE and allowance.seconds >= COMPILING
    first = replace(best, compile=True)
    if may_compile and pays and affordable(first):
        measured[first] = seconds_of(first, slowest)
        compiling = measured[first].compile_seconds
        # Narrow types gain more from compilation: what lost without it may win with it.
        if other is not None and compiling <= COMPILING_SHARE * expected:
            second = replace(other if best == start else start, compile=True)
            measured[second] = seconds_of(second, slowest)
        best = _best(measured, start, length)
    return best


def _best(measured: dict[Plan, Measurement], start: Plan, length: Length) -> Plan:
    best = min(measured, key=lambda plan: length.seconds_per_step(measured[plan]))
    gained = length.seconds_per_step(measured[best]) < (1 - LEAST_GAIN) * length.seconds_per_step(
        measured[start]
    )
    return best if gained else start


def choose_auto(
    written: RunConfig, resolved: RunConfig, plan: Plan, loader: EpochLoader
) -> tuple[Plan, list[str]]:
    """Measure what `auto` leaves open in a run that begins; all ranks use the first rank's choice.

    Args:
        written: the configuration with its `auto`.
        resolved: with the values that hold if nothing is measured.
        plan: of the resolved configuration.
        loader: of the training data.

    Returns:
        The plan to take, and notes for the user.
    """
    ranks = plan.ranks
    opens_type = (
        written.training.precision == "auto"
        and not written.training.mixed_precision
        and plan.device.type == "cpu"
        and plan.compile != "native"
    )
    may_compile = written.training.compile == "auto"
    masked = resolved.data.packing == "document"  # document masks are not compiled
    if may_compile and (masked or ranks.any(plan.compile is False)):
        if plan.compile and not masked:
            logger.warning(
                "compile: auto: another rank found no C++ compiler, so nothing is compiled"
            )
        may_compile, plan = False, replace(plan, compile=False)
    if not (opens_type or may_compile):
        return plan, []
    start = replace(plan, compile=False) if may_compile else plan

    def decide() -> list[Any]:
        facts = ModelFacts.of(resolved.model)
        # What a product of a hundredth of a second shows to be slower is not tried in a model.
        narrow = opens_type and not why_not_bf16(start.device)
        other = _in_bf16(start, written, facts) if narrow else None
        natives: list[Plan] = []
        if may_compile and written.training.bf16_weights is not True:
            natives = _natives(start, other, facts)
        chosen, note = _choose(start, other, may_compile, natives, resolved, loader)
        return [chosen.precision, chosen.bf16_weights, chosen.attention, chosen.compile, note]

    precision, bf16_weights, attention, compiles, note = ranks.first_decides(decide)
    chosen = replace(
        start,
        precision=precision,
        bf16_weights=bf16_weights,
        attention=attention,
        compile=compiles,
    )
    return chosen, [note] if note else []


def _in_bf16(start: Plan, written: RunConfig, model: ModelFacts) -> Plan | None:
    """Return the configuration's plan in bf16; None if the plan is in bf16 already."""
    if start.precision == "bf16":
        return None
    narrow = {"precision": "bf16", "compile": start.compile}
    training = written.training.model_copy(update=narrow)
    return Plan.resolve(training, model, start.machine, start.batch_size)


def _natives(start: Plan, other: Plan | None, model: ModelFacts) -> list[Plan]:
    """Return the plans with native code, in each type that is open; none if impossible."""
    if model.why_not_native(start.device):
        return []
    plans = [plan for plan in (start, other) if plan is not None]
    return [replace(plan, bf16_weights=False, compile="native") for plan in plans]


def _choose(
    start: Plan,
    other: Plan | None,
    may_compile: bool,
    natives: Sequence[Plan],
    resolved: RunConfig,
    loader: EpochLoader,
) -> tuple[Plan, str]:
    """Choose from cached and new measurements; return a note too."""
    training = resolved.training
    left = None if training.max_seconds is None else training.max_seconds - seconds_since_start()
    length = Length(training.total_steps, left, training.accumulation_steps)
    allowance = Allowance.of(training.max_seconds)
    cache = SpeedCache()
    circumstances = circumstances_of(resolved, start.machine)
    known = cache.get(circumstances)
    asked: dict[Plan, Measurement] = {}
    tried: set[Plan] = set()
    new = False

    def name_in_cache(plan: Plan) -> str:
        return f"{name_of(plan)}, {plan.attention} attention"

    def seconds_of(plan: Plan, slowest: float) -> Measurement:
        nonlocal new
        name = name_in_cache(plan)
        tried.add(plan)
        if name not in known:
            batch = loader.window_at(0, 0).micro_batches[0]
            window = Window([batch], count_valid(batch["target_ids"]))
            try:
                found = measure(resolved, plan, [window], SECONDS, slowest, brief=True)
            except FundamentaLLMError as error:  # for example a compiler that refuses native code
                found = failed(error.what)
            if plan.compile == "native":
                allowance.built += found.compile_seconds
            if found.fault:
                return found
            known[name], new = found, True
        asked[plan] = known[name]
        return known[name]

    try:
        plans = [plan for plan in (start, other, *natives) if plan is not None]
        kept = {plan for plan in plans if name_in_cache(plan) in known}
        chosen = choose(start, other, may_compile, length, seconds_of, natives, allowance, kept)
    except Exception as error:  # a real fault will be reported by the run
        reason = " ".join(str(error).split())[:200]
        logger.warning("auto: the measurement failed and is ignored: %s", reason)
        return start, ""
    finally:
        if new:
            cache.put(circumstances, known)
    if chosen.compile is not True:
        torch._dynamo.reset()
    note = _note(chosen, asked, cache, allowance if new else None)
    long_enough = start in asked and length.expected(asked[start]) >= LEAST_SECONDS
    if natives and long_enough and tried.isdisjoint(natives):
        note = (note or f"auto: {name_of(chosen)}") + (
            f"; no time to measure native code is left of the {allowance.seconds:.2g} s for it:"
            " compile: native takes it without measuring"
        )
    return chosen, note


def name_of(plan: Plan) -> str:
    """Return a name that distinguishes a plan among those that `auto` compares."""
    narrow = "" if plan.precision != "bf16" or plan.bf16_weights else " autocast"
    if plan.compile == "native":
        return f"{plan.precision} native"
    return f"{plan.precision}{narrow}{' compiled' if plan.compile else ''}"


def _note(
    chosen: Plan, asked: dict[Plan, Measurement], cache: SpeedCache, allowance: Allowance | None
) -> str:
    """Return what was chosen and why; `allowance` is None where nothing was measured now."""
    if len(asked) < 2:
        return ""
    figures = ", ".join(
        f"{name_of(plan)} {1e3 * found.step_seconds:.3g} ms"
        + (f" after {found.compile_seconds:.0f} s" if plan.compile else "")
        for plan, found in asked.items()
    )
    start = f"auto: {name_of(chosen)}; a micro-batch takes, "
    if allowance is None:
        return f"{start}read from {cache.path}: {figures}"
    building = f", beside {allowance.built:.1f} s to build native code" if allowance.built else ""
    return (
        f"{start}measured now: {figures}; measuring took {allowance.used:.1f} s"
        f" of at most {allowance.seconds:.3g} s{building}"
    )
