"""The `replay` command: a recorded numerical incident, once more."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from fundamentallm.config import RunConfig
from fundamentallm.data.loader import Window, count_valid
from fundamentallm.engine.console import printable, say, speaking
from fundamentallm.engine.plugins import load_plugins
from fundamentallm.errors import CheckpointError, NumericalError
from fundamentallm.models.attention import choose_kernel, use_kernel
from fundamentallm.models.transformer import Transformer
from fundamentallm.training.checkpoint import check_model_state
from fundamentallm.training.diagnosis import SPIKE, TRANSIENT, Diagnosis, Laboratory, Replay
from fundamentallm.training.distributed import Ranks
from fundamentallm.training.incident import EVIDENCE, REPORT, first_bad
from fundamentallm.training.losses import LOSSES
from fundamentallm.training.precision import Precision, resolve_device, resolve_precision
from fundamentallm.training.store import CheckpointStore
from fundamentallm.training.threads import use_threads

MAX_REPORT_BYTES = 64 << 20
ROWS_SHOWN = 12


def replay(options: argparse.Namespace) -> int:
    """Compute the recorded step again and compare the first bad module.

    Raises:
        CheckpointError: the directory is no incident, or its evidence is damaged.
        NumericalError: the incident is not reproduced.
    """
    with speaking():
        load_plugins(options.plugins, "--plugins")
        report = read_report(options.incident)
        if report["verdict"] in (TRANSIENT, SPIKE):
            say(f"incident   step {report['step']}: {printable(str(report['fault']))}")
            say(f"verdict    {report['verdict']}: the step was finite, there is nothing to replay")
            return 0
        device = resolve_device(options.device)
        result = replay_incident(options.incident, report, device)
    found = first_bad(Diagnosis("", result))
    say(f"incident   step {report['step']}: {printable(str(report['fault']))}")
    say(f"verdict    {report['verdict']}; {printable(str(report['decision']))}")
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
            fix="its parts may be a plugin's: name the module with --plugins",
        )
    say("Reproduced." if found["forward"] or found["backward"] else "Finite, as it was then.")
    return 0


def read_report(incident: Path) -> dict[str, Any]:
    """Return the report of an incident.

    Raises:
        CheckpointError: there is none, or it is not what `write_incident` wrote.
    """
    path = incident / REPORT
    try:
        if path.stat().st_size > MAX_REPORT_BYTES:
            raise CheckpointError("the report is too large", where=str(path))
        report = json.loads(path.read_text(encoding="utf-8"))
        wanted = {"step", "fault", "verdict", "decision", "first_bad", "description"}
        if not isinstance(report, dict) or not wanted <= report.keys():
            raise ValueError("it lacks what a report has")
        if not {"forward", "backward"} <= report["first_bad"].keys():
            raise ValueError("it lacks the first bad places")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(
            "this is no incident",
            where=str(path),
            got=str(error),
            fix="name a directory as runs/mine/incidents/00000137-data",
        ) from error
    return report


def replay_incident(incident: Path, report: dict[str, Any], device: torch.device) -> Replay:
    """Compute the step of an incident again, every module watched.

    Raises:
        CheckpointError: the evidence is damaged, or does not fit its configuration.
        ConfigError: a part is not registered (a plugin's).
    """
    store = CheckpointStore(incident / EVIDENCE)
    manifest = store.newest()
    if manifest is None:
        raise CheckpointError("the evidence is missing or damaged", where=str(store.directory))
    state = store.read(store.directory / manifest.name)
    if "config" not in report["description"]:
        raise CheckpointError(
            "the incident is of a script's run, which alone can build its model",
            where=str(incident),
            fix="build the model there and use fundamentallm.training.diagnosis.Laboratory",
        )
    config = RunConfig.model_validate(report["description"]["config"])
    use_threads(config.training.threads)
    model = Transformer(config.model)
    check_model_state(model, state["model"], str(store.directory))
    model.load_state_dict(state["model"])
    training = config.training
    precision, bf16_weights = training.precision, training.bf16_weights is True
    if precision == "fp16" and device.type != "cuda":
        precision = "bf16"
    use_kernel(
        model, choose_kernel(training.attention, device, bf16_weights, model.sequence_length)
    )
    laboratory = Laboratory(
        model.to(device),
        LOSSES.build(training.loss.name, training.loss.options),
        Precision(resolve_precision(precision, False, device), device, bf16_weights),
        Ranks(),
    )
    batches = state["window"]
    window = Window(batches, sum(count_valid(batch["target_ids"]) for batch in batches))
    generators = {
        name: value
        for name, value in state["generators"].items()
        if name == "torch" or device.type == "cuda"
    }
    return laboratory.replay(window, generators, watch=True)


def _print_modules(result: Replay) -> None:
    """Show what passed by around the first bad place."""
    first = next((i for i, reading in enumerate(result.readings) if reading.is_bad), None)
    if first is None:
        return
    begin = max(0, first - ROWS_SHOWN // 2)
    say()
    for number, reading in enumerate(result.readings[begin : begin + ROWS_SHOWN], begin):
        say(f"{'>' if number == first else ' '} {reading}")
    say()


def _place(place: dict[str, Any] | None) -> str:
    return f"{place['kind']} of {place['module']}" if place else "nothing bad"


def _modules(places: dict[str, Any]) -> list[str | None]:
    return [places[part] and places[part]["module"] for part in ("forward", "backward")]
