"""The `plan` command: what to train on this machine, with this text, in a time."""

from __future__ import annotations

import json
import math
import shlex
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fundamentallm.config import RunConfig, TransformerConfig, load_config
from fundamentallm.config.yaml.key_path import KeyPath
from fundamentallm.config.yaml.problems import shown
from fundamentallm.config.yaml.source import YamlDocument
from fundamentallm.engine.console import console_output, printable, program, say, tell
from fundamentallm.engine.planning.choice import (
    Cadence,
    Candidate,
    batch_factor,
    calmer,
    candidates,
)
from fundamentallm.engine.planning.measuring import Ground, Knowledge, Measuring, prepare
from fundamentallm.engine.plugins import load_plugins
from fundamentallm.engine.stopping import ended_by_signals, signal_in_words
from fundamentallm.engine.tuning.sizing import Size
from fundamentallm.engine.tuning.tune import check_start, free_path, write_copy
from fundamentallm.engine.wiring.assemble import check_names, open_machine
from fundamentallm.engine.wiring.conflicts import require_validation_text
from fundamentallm.engine.wiring.inputs import Inputs, read_inputs
from fundamentallm.engine.wiring.run_directory import nowhere
from fundamentallm.errors import ConfigError, DataError, InterruptedRunError, MachineError
from fundamentallm.reports.page import duration
from fundamentallm.training.clock import seconds_since_start

LEAST_SECONDS = 30.0  # of a planned run
MOST_SECONDS = 366 * 24 * 3600.0
MEASURED_SHARE = 0.25  # of the planned time
LEAST_MEASURING, MOST_MEASURING = 120.0, 300.0  # seconds; less where the planned time is less
LEAST_SEQUENCES = 20  # of the training text
COLUMNS = "{:>12}{:>13}{:>8}{:>10}{:>12}{:>20}"


@dataclass(frozen=True)
class PlannedRun:
    """The run that was chosen.

    Attributes:
        candidate: its size, tokens and expected loss.
        learning_rate: the peak.
        batch: times the rows of the configured step.
        cadence: of its evaluations; None for the configured one.
        max_seconds: its budget of time; None where `total_steps` ends it.
        total_steps: its budget of steps; None where the clock ends it.
    """

    candidate: Candidate
    learning_rate: float
    batch: int
    cadence: Cadence | None
    max_seconds: float | None
    total_steps: int | None


def plan(
    config_path: Path,
    seconds: float,
    overrides: Sequence[str] = (),
    plugins: Sequence[str] = (),
    out: Path | None = None,
    measure: float | None = None,
    as_json: bool = False,
) -> int:
    """Measure small runs, choose the run of a time, write its file; return the exit code.

    Args:
        config_path: the user's file, which stays as it is.
        seconds: of the run to plan, from the start of its process to its end.
        overrides: as for `run`; the new file has them.
        plugins: modules to import besides the file's.
        out: the new file, which must not exist; None for a free name beside the user's.
        measure: seconds for the small runs; None for those of `measuring_time`.
        as_json: print one JSON object; the rest goes to standard error.

    Raises:
        FundamentaLLMError: as `run`, or the time or the text is too small for a plan.
    """
    check_start(seconds, "plan", "--hours or --minutes")
    if seconds < LEAST_SECONDS:
        raise ConfigError(
            "the time is too short to plan",
            where="--hours or --minutes",
            got=f"{seconds:g} s",
            expected=f"at least {LEAST_SECONDS:g} s",
            fix="run the configuration as it is",
        )
    if seconds > MOST_SECONDS:
        raise ConfigError(
            "the time is too long to plan",
            where="--hours or --minutes",
            got=f"{seconds / 3600:g} hours",
            expected=f"at most {MOST_SECONDS / 3600:,.0f} hours, a year",
        )
    if measure is None:
        measure = measuring_time(seconds)
    elif not 0 < measure < math.inf:
        raise ConfigError(
            "the time for measuring is invalid",
            where=f"--measure {measure:g}",
            expected="a number of seconds above 0",
        )
    target = free_path(config_path, out, ".planned")
    say_line: Callable[[str], None] = tell if as_json else say
    written = load_config(config_path, overrides)
    began = seconds_since_start()
    with console_output(), ended_by_signals():
        load_plugins([*written.plugins, *plugins], written.locate("plugins"))
        check_names(written)
        ground = ground_of(written, seconds, began)
        measuring = Measuring(ground, written, measure, say_line)
        try:
            knowledge = measuring.run(seconds)
            found = candidates_of(ground, knowledge, seconds)
            chosen = choose(ground, knowledge, found, seconds)
        except (KeyboardInterrupt, InterruptedRunError) as error:
            number = getattr(error, "signal_number", signal.SIGINT)
            count = len(measuring.kept.runs)
            kept = "1 small run is kept" if count == 1 else f"{count} small runs are kept"
            raise InterruptedRunError(
                f"stopped by {signal_in_words(number)}, {kept}",
                signal_number=number,
                fix="the same command goes on",
            ) from None
    changes = partial(_changes, ground=ground, written=written, chosen=chosen)
    write_copy(target, config_path, overrides, changes, "plan")
    if as_json:
        say(json.dumps(_as_json(ground, knowledge, found, chosen, seconds, target)))
    else:
        _print(ground, found, chosen, seconds, target)
    return 0


def measuring_time(seconds: float) -> float:
    """Return the seconds for the small runs of a plan: a quarter of its time, two to five minutes.

    The further a run lies beyond the small ones, the less certain is its loss, so a plan of a few
    minutes does not make do with a quarter; it measures for as long as its run at most.
    """
    least = min(LEAST_MEASURING, seconds)
    return min(max(MEASURED_SHARE * seconds, least), MOST_MEASURING)


def ground_of(written: RunConfig, seconds: float, start: float) -> Ground:
    """Read the text and resolve the configuration.

    Raises:
        FundamentaLLMError: no plan can be made of it.
    """
    if written.model.init_from is not None:
        raise ConfigError(
            "a plan is for runs from random weights",
            where=written.locate("model.init_from"),
            got=shown(written.model.init_from),
            fix="remove model.init_from; for fine-tuning the size is given already",
        )
    require_validation_text(written, "a plan")
    budget = {"total_steps": None, "max_tokens": None, "max_seconds": seconds}
    training = written.training.model_copy(update=budget)
    planned = written.model_copy(update={"training": training})
    machine = open_machine(planned)
    inputs = read_inputs(planned, nowhere(planned), machine.ranks)
    _refuse_little_text(inputs)
    return prepare(planned, inputs, machine, start)


def _refuse_little_text(inputs: Inputs) -> None:
    length = inputs.start.config.data.sequence_length
    sequences = inputs.loaders.train.num_sequences
    validation = inputs.loaders.validation.num_tokens
    if sequences < LEAST_SEQUENCES or validation < length:
        raise DataError(
            "the text is too small for a plan",
            where=inputs.source.name,
            got=f"{sequences:,} sequences to train on, {validation:,} tokens to validate on",
            expected=f"at least {LEAST_SEQUENCES} and {length:,}",
            fix="add text, or lower data.sequence_length",
        )


def cadence_of(ground: Ground) -> Cadence:
    """Return when the configuration evaluates."""
    training = ground.config.training
    return Cadence(training.eval_steps, training.eval_epochs, len(ground.loader))


def candidates_of(ground: Ground, knowledge: Knowledge, seconds: float) -> list[Candidate]:
    """Return the best run of each size.

    Raises:
        MachineError: the time is too short for any.
    """
    found = candidates(
        ground.shapes,
        knowledge.law,
        knowledge.costs,
        cadence_of(ground),
        seconds,
        ground.step_tokens,
        knowledge.largest_measured,
    )
    if not found:
        smallest = knowledge.costs.speed.token_seconds(ground.shapes[0].flops)
        raise MachineError(
            "the time is too short to plan a run",
            got=f"{seconds:.0f} s, of which {knowledge.costs.start:.0f} s are before the first"
            f" step; a step of the smallest model takes {smallest * ground.step_tokens:.2g} s",
            fix="plan a longer run, or lower data.batch_size",
        )
    return found


def choose(
    ground: Ground, knowledge: Knowledge, found: Sequence[Candidate], seconds: float
) -> PlannedRun:
    """Return the run with the lowest expected loss, as a configuration can say it."""
    best = min(found, key=lambda one: one.prediction.loss)
    rate = float(f"{best.rate * ground.rate(best.shape):.2g}")
    batch = int(batch_factor(best.tokens, knowledge.configured_tokens))
    own = cadence_of(ground)
    cadence = calmer(best.shape, knowledge.costs, own, seconds, ground.step_tokens)
    changed = None
    if batch > 1 or cadence != own:
        steps = max(1, math.ceil(cadence.steps / batch))
        changed = Cadence(steps, cadence.epochs, cadence.epoch_steps)
    if not best.is_full:
        return PlannedRun(
            best, rate, batch, changed, None, best.tokens // (batch * ground.step_tokens)
        )
    return PlannedRun(best, rate, batch, changed, seconds, None)


def _changes(
    document: YamlDocument, ground: Ground, written: RunConfig, chosen: PlannedRun
) -> dict[KeyPath, Any]:
    """Return the values to write."""
    given = document.data.get("training") or {}
    training: dict[str, Any] = {"learning_rate": chosen.learning_rate}
    if written.training.min_learning_rate:
        scale = chosen.learning_rate / written.training.learning_rate
        training["min_learning_rate"] = float(f"{written.training.min_learning_rate * scale:.2g}")
    for name in ("max_seconds", "total_steps", "max_tokens"):
        value = getattr(chosen, name, None)
        if value is not None or name in given:
            training[name] = value
    if chosen.total_steps is not None and "warmup_steps" in written.training.model_fields_set:
        # As in the small runs. A run of a time warms up for a tenth of it at most by itself.
        warmup = min(written.training.warmup_steps, chosen.total_steps // 10)
        training["warmup_steps"] = warmup
    if chosen.cadence is not None:
        training["eval_steps"] = chosen.cadence.steps
        if not chosen.cadence.epochs:
            training["eval_epochs"] = False
    data: dict[str, Any] = {}
    if chosen.batch > 1:
        data, more = _larger_step(written, chosen.batch)
        training |= more
    model = dict(chosen.candidate.shape.values)
    if isinstance(written.model, TransformerConfig) and written.model.size is not None:
        # `auto` would follow the machine and the time again.
        sized = ground.config.model.to_dict()
        model = {"size": None, **{name: sized[name] for name in Size._fields}, **model}
    sections = {"model": model, "data": data, "training": training}
    return {
        (section, name): value
        for section, values in sections.items()
        for name, value in values.items()
    }


def _larger_step(written: RunConfig, factor: int) -> tuple[dict[str, int], dict[str, int]]:
    """Return the values of `data` and `training` that give a step so many times the rows."""
    if written.data.global_batch is not None:
        return {"global_batch": factor * written.data.global_batch}, {}
    return {}, {"accumulation_steps": factor * written.training.accumulation_steps}


def _print(
    ground: Ground,
    found: Sequence[Candidate],
    chosen: PlannedRun,
    seconds: float,
    target: Path,
) -> None:
    best = chosen.candidate
    say()
    say(f"Expected after {duration(seconds)}, start and validation included:")
    say()
    say(COLUMNS.format("parameters", "tokens", "passes", "rate", "loss", "80 % interval"))
    for one in found:
        interval = f"{one.prediction.low:.4f} to {one.prediction.high:.4f}"
        row = COLUMNS.format(
            f"{one.shape.parameters:,}",
            f"{one.tokens:,}",
            f"{one.tokens / ground.unique_tokens:.1f}",
            f"{one.rate * ground.rate(one.shape):.2g}",
            f"{one.prediction.loss:.4f}",
            interval,
        )
        say(row + ("  <- chosen" if one is best else ""))
    say()
    model = ground.config.model.model_copy(update=dict(best.shape.values))
    size = ", ".join(
        f"{name}: {getattr(model, name)}"
        for name in ("d_model", "num_layers", "num_heads")
        if hasattr(model, name)
    )
    say(f"model: {best.shape.parameters:,} parameters" + (f" ({size})" if size else ""))
    say(
        f"training: {best.tokens:,} tokens, {chosen.batch * ground.step_tokens:,} in a step,"
        f" learning rate {chosen.learning_rate:g}"
    )
    if not best.is_full:
        say(
            f"More than {duration(best.seconds)} would not help: the model learns the text by"
            f" heart ({best.tokens / ground.unique_tokens:.1f} passes). More text would."
        )
    low, high = best.prediction.low, best.prediction.high
    say(f"validation loss: {best.prediction.loss:.4f}, with 80 % between {low:.4f} and {high:.4f}")
    say()
    say(printable(f"Written to {target}. Next:"))
    say(f"  {program()} run {shlex.quote(str(target))}")


def _as_json(
    ground: Ground,
    knowledge: Knowledge,
    found: Sequence[Candidate],
    chosen: PlannedRun,
    seconds: float,
    target: Path,
) -> dict[str, Any]:
    """Return the plan as plain values; times in seconds, losses in nats per token."""

    def plain(one: Candidate) -> dict[str, Any]:
        return {
            "model": dict(one.shape.values),
            "parameters": one.shape.parameters,
            "tokens": one.tokens,
            "passes": one.tokens / ground.unique_tokens,
            "learning_rate": float(f"{one.rate * ground.rate(one.shape):.2g}"),
            "seconds": one.seconds,
            "loss": one.prediction.loss,
            "low": one.prediction.low,
            "high": one.prediction.high,
        }

    return {
        "file": str(target),
        "seconds": seconds,
        "chosen": {
            **plain(chosen.candidate),
            "tokens_per_step": chosen.batch * ground.step_tokens,
            "max_seconds": chosen.max_seconds,
            "total_steps": chosen.total_steps,
        },
        "candidates": [plain(one) for one in found],
        "runs": [
            {
                "parameters": run.parameters,
                "steps": run.steps,
                "learning_rate": run.rate * _rule_of(ground, run.parameters),
                "loss": run.result.loss,
                "tokens_per_second": 1 / run.result.token_seconds,
            }
            for run in knowledge.runs
        ],
    }


def _rule_of(ground: Ground, parameters: int) -> float:
    """Return the rate of the rule for a measured size."""
    return next(ground.rate(shape) for shape in ground.shapes if shape.parameters == parameters)
