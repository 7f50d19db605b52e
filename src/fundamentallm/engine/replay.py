"""The `replay` command: compute the step of a recorded numerical incident again."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fundamentallm.compute.plan import Machine, ModelFacts, Plan
from fundamentallm.compute.rng import check_generators
from fundamentallm.config import RunConfig
from fundamentallm.data.batch import Window, check_batch, count_valid
from fundamentallm.engine.console import console_output, printable, say
from fundamentallm.engine.plugins import load_plugins
from fundamentallm.errors import CheckpointError, NumericalError
from fundamentallm.files.private import open_to_read
from fundamentallm.files.run_layout import EVIDENCE, REPORT, no_incident
from fundamentallm.inference.stored_model import stored_config, stored_model
from fundamentallm.training.checkpoint.store import CheckpointStore
from fundamentallm.training.losses import LOSSES
from fundamentallm.training.recovery.diagnosis import (
    SPIKE,
    TRANSIENT,
    VERDICTS,
    Diagnosis,
    Replay,
    StepReplayer,
)
from fundamentallm.training.recovery.incident import first_bad

MAX_REPORT_BYTES = 64 << 20
ROWS_SHOWN = 12
FORMS: dict[str, type] = {
    "step": int,
    "fault": str,
    "verdict": str,
    "decision": str,
    "first_bad": dict,
    "description": dict,
}
"""The entries of a report that are read here, with their types."""


def replay(options: argparse.Namespace) -> int:
    """Compute the recorded step again and compare the first bad module.

    Raises:
        CheckpointError: the directory does not hold an incident, or its evidence is damaged.
        NumericalError: the incident is not reproduced.
    """
    with console_output():
        load_plugins(options.plugins, "--plugins")
        report = read_report(options.incident)
        if report["verdict"] in (TRANSIENT, SPIKE):
            say(f"incident   step {report['step']}: {printable(report['fault'])}")
            say(f"verdict    {report['verdict']}: the step was finite, there is nothing to replay")
            return 0
        result = replay_incident(options.incident, report, options.device)
    found = first_bad(Diagnosis("", result))
    say(f"incident   step {report['step']}: {printable(report['fault'])}")
    say(f"verdict    {report['verdict']}; {printable(report['decision'])}")
    say(f"now        loss {result.loss}, gradient norm {result.grad_norm}")
    for part in ("forward", "backward"):
        say(f"{part:<11}{_place(found[part])}   (recorded: {_place(report['first_bad'][part])})")
    _print_modules(result)
    if _modules(found) != _modules(report["first_bad"]):
        raise NumericalError(
            "the incident is not reproduced",
            where=str(options.incident),
            got=_place(found["forward"] or found["backward"]),
            expected=_place(report["first_bad"]["forward"] or report["first_bad"]["backward"]),
            fix="parts of the model may be from a plugin: name its module with --plugins",
        )
    say("Reproduced." if found["forward"] or found["backward"] else "Finite, as recorded.")
    return 0


def read_report(incident: Path) -> dict[str, Any]:
    """Return the report of an incident.

    Raises:
        CheckpointError: there is none, or `write_incident` did not write it.
    """
    path = incident / REPORT
    try:
        with open_to_read(path) as file:
            if os.fstat(file.fileno()).st_size > MAX_REPORT_BYTES:
                raise CheckpointError("the report is too large", where=str(path))
            report = json.loads(file.readall().decode())
        _check_report(report)
    except (OSError, ValueError, RecursionError) as error:
        raise no_incident(path, error) from error
    return dict(report)


def _check_report(report: Any) -> None:
    """Raise ValueError if a report lacks an entry or has one of a wrong type."""
    if not isinstance(report, dict):
        raise ValueError("the report is not a JSON object")
    for key, form in FORMS.items():
        # True is an int to Python.
        if not isinstance(report.get(key), form) or isinstance(report[key], bool):
            raise ValueError(f"the report has no '{key}', or one of a wrong type")
    if report["verdict"] not in VERDICTS:
        raise ValueError(f"the verdict is unknown: {printable(report['verdict'][:40])}")
    for part in ("forward", "backward"):
        place = report["first_bad"].get(part, "")
        if place is not None and not (
            isinstance(place, dict)
            and isinstance(place.get("module"), str)
            and isinstance(place.get("kind"), str)
        ):
            raise ValueError(f"the report names no module in 'first_bad.{part}'")


def replay_incident(incident: Path, report: dict[str, Any], device: str) -> Replay:
    """Compute the step of an incident again and record each module.

    Raises:
        CheckpointError: the evidence is damaged, or does not fit its configuration.
        ConfigError: a part of the model is not registered (it is from a plugin).
    """
    store = CheckpointStore(incident / EVIDENCE)
    manifest = store.newest()
    if manifest is None:
        raise CheckpointError("the evidence is missing or damaged", where=str(store.directory))
    state = store.read(store.directory / manifest.name)
    if "config" not in report["description"]:
        raise CheckpointError(
            "the incident is from a script, and only the script can build its model",
            where=str(incident),
            fix="build the model there and use StepReplayer from"
            " fundamentallm.training.recovery.diagnosis",
        )
    where = str(store.directory)
    config = stored_config(report["description"]["config"], where)
    window = _window(state, config, where)
    model = stored_model(config.model, state["model"], where)
    training = config.training
    machine = Machine.open(device, training.threads, deterministic=training.deterministic)
    facts = ModelFacts.of(config.model)
    plan = Plan.again(training, facts, machine, fp16_elsewhere="bf16")
    replayer = StepReplayer(
        plan.prepare(plan.place(model)),
        LOSSES.build(training.loss.name, training.loss.options),
        plan.build_precision(),
        plan.ranks,
    )
    try:
        check_generators(state.get("generators"))
    except CheckpointError as error:
        error.where = error.where or where
        raise
    return replayer.replay(window, state["generators"], watch=True)


def _window(state: Mapping[str, Any], config: RunConfig, where: str) -> Window:
    """Return the step batch of the evidence after checking that it fits the run.

    Raises:
        CheckpointError: it has more micro-batches or rows than a step of the run, longer rows, or
            ids outside the vocabulary.
    """
    batches = state.get("window")
    most, rows = config.training.accumulation_steps, config.data.batch_size
    try:
        if not isinstance(batches, list) or not 1 <= len(batches) <= most:
            raise ValueError(f"a step of this run has 1 to {most} micro-batches")
        for batch in batches:
            check_batch(batch, config.model.vocab_size or 0, config.model.sequence_length or 0)
            if len(batch["input_ids"]) > rows:
                raise ValueError(f"{len(batch['input_ids'])} rows; this run has at most {rows}")
    except ValueError as error:
        raise CheckpointError(
            "the evidence is not a step batch of this run", where=f"{where}: window", got=str(error)
        ) from error
    return Window(batches, sum(count_valid(batch["target_ids"]) for batch in batches))


def _print_modules(result: Replay) -> None:
    """Print the statistics around the first bad one."""
    first = next((i for i, statistic in enumerate(result.statistics) if statistic.is_bad), None)
    if first is None:
        return
    begin = max(0, first - ROWS_SHOWN // 2)
    say()
    for number, statistic in enumerate(result.statistics[begin : begin + ROWS_SHOWN], begin):
        say(printable(f"{'>' if number == first else ' '} {statistic}"))
    say()


def _place(place: dict[str, Any] | None) -> str:
    return printable(f"{place['kind']} of {place['module']}") if place else "nothing bad"


def _modules(places: dict[str, Any]) -> list[str | None]:
    return [places[part] and places[part]["module"] for part in ("forward", "backward")]
