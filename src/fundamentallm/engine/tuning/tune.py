"""The `tune` command: find the fastest settings for a configuration on this machine."""

from __future__ import annotations

import itertools
import math
import os
import shlex
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fundamentallm.compute.plan import ModelFacts, Plan
from fundamentallm.compute.precision import has_bf16
from fundamentallm.config import RunConfig, load_config
from fundamentallm.config.base import write_yaml
from fundamentallm.config.load import overridden, replaced
from fundamentallm.config.yaml.edit import edited
from fundamentallm.config.yaml.file import read_yaml_text, with_schema
from fundamentallm.config.yaml.key_path import KeyPath
from fundamentallm.config.yaml.source import YamlDocument, read_yaml
from fundamentallm.data.batch import Batch
from fundamentallm.engine.arguments import refuse_no_directory
from fundamentallm.engine.console import console_output, program, say
from fundamentallm.engine.plugins import load_plugins
from fundamentallm.engine.stopping import ended_by_signals
from fundamentallm.engine.tuning.fit import gib
from fundamentallm.engine.tuning.measuring import Measurement, measure_in_process, rows_of
from fundamentallm.engine.tuning.search import Space, batch_sizes, search, thread_counts
from fundamentallm.engine.wiring.assemble import check_names, open_machine
from fundamentallm.engine.wiring.inputs import read_inputs
from fundamentallm.engine.wiring.resolving import resolve
from fundamentallm.engine.wiring.run_directory import nowhere
from fundamentallm.errors import ConfigError, MachineError
from fundamentallm.files.names import numbered
from fundamentallm.models.build import uses_attention
from fundamentallm.models.layers.attention import KERNELS
from fundamentallm.models.native.library import find_compiler

LEAST_PATIENCE = 60.0  # seconds the least time for a candidate, so that the first can finish
STEP_SECONDS = 2.0
COLUMNS = "{:<15}{:<9}{:<11}{:<13}{:>7}{:>12}{:>13}{:>10}"


def tune(
    config_path: Path,
    overrides: Sequence[str] = (),
    plugins: Sequence[str] = (),
    out: Path | None = None,
    seconds: float = 600.0,
    keep: Sequence[str] = (),
) -> int:
    """Measure, print the table, write the winner's configuration; return the exit code.

    Args:
        config_path: the user's file, which stays as it is.
        overrides: as for `run`; the new file has them.
        plugins: modules to import besides the file's.
        out: the new file, which must not exist; None for a free name beside the user's.
        seconds: after which no measurement starts.
        keep: of precision, compile, attention, micro-batch and threads, the settings to keep as
            configured.

    Raises:
        FundamentaLLMError: as `run`, or no setting works.
    """
    check_start(seconds)
    target = free_path(config_path, out)
    deadline = time.monotonic() + seconds
    threads = torch.get_num_threads()  # torch's choice, before a configuration changes it
    written = load_config(config_path, overrides)
    with console_output():
        load_plugins([*written.plugins, *plugins], written.locate("plugins"))
        check_names(written)
        config, start, rows = prepared(written)
    space = space_around(config, start, threads, keep)
    table = Table(config, rows, plugins, start.device, threads, deadline)
    table.head()
    with ended_by_signals():
        best = search(start, space, table.seconds_of)
    measured = table.measured
    if best not in measured or measured[best].fault:
        raise MachineError(
            "no setting could be measured",
            where=str(config_path),
            got=measured[start].fault if start in measured else "no time",
            fix="lower data.batch_size or the model's size, or give more --seconds",
        )
    say()
    table.ranking(best)
    write_copy(
        target, config_path, overrides, partial(_changes, config=config, best=best, keep=keep)
    )
    say()
    say(table.gain(start, best))
    say(f"Written to {target}. Next:")
    say(f"  {program()} run {shlex.quote(str(target))}")
    return 130 if table.interrupted else 0


def check_start(seconds: float, name: str = "tune", where: str = "--seconds") -> None:
    """Refuse several ranks, and a time that is none.

    Args:
        seconds: the time.
        name: of the command.
        where: the argument that gives the time.

    Raises:
        MachineError, ConfigError: one of the two.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise MachineError(
            f"{name} measures one process",
            got=f"WORLD_SIZE={os.environ['WORLD_SIZE']}",
            fix="start it without torchrun",
        )
    if not 0 < seconds < math.inf:
        raise ConfigError(
            "the time is invalid",
            where=f"{where} {seconds:g}",
            expected="a number of seconds above 0",
        )


def free_path(config_path: Path, out: Path | None, suffix: str = ".tuned") -> Path:
    """Return the path of the new file: `out`, or a free name with `suffix` beside the user's file.

    Raises:
        ConfigError: `out` exists already.
        MachineError: its directory does not exist.
    """
    if out is not None:
        if out.exists():
            raise ConfigError(
                "the output file exists already",
                where=f"--out {out}",
                fix="choose another name with --out, or remove the file",
            )
        refuse_no_directory(out)
        return out
    names = numbered(config_path.with_suffix(suffix), config_path.suffix or ".yaml")
    return next(path for path in names if not path.exists())


def prepared(written: RunConfig) -> tuple[RunConfig, Plan, Batch]:
    """Return the configuration with everything resolved, its plan, and the rows of its first step.

    No model is built here, and nothing is written.
    """
    machine, directory = open_machine(written), nowhere(written)
    inputs = read_inputs(written, directory, machine.ranks)
    config, plan, _ = resolve(inputs, directory, machine)
    # Random weights are as fast as trained ones, and the measuring processes need no folder.
    model = config.model.with_random_weights()
    rows = rows_of(inputs.loaders.train.window_at(0, 0))
    return config.model_copy(update={"model": model}), plan, rows


def space_around(
    config: RunConfig, start: Plan, default_threads: int, keep: Sequence[str]
) -> Space:
    """Return what to try around a plan, with the axes in `keep` left as they are."""
    facts, device = ModelFacts.of(config.model), start.device
    own = {"precision": start.precision, "bf16_weights": start.bf16_weights}
    types: list[dict[str, Any]] = [own]
    if "precision" not in keep:
        types = [
            {"precision": "fp32", "bf16_weights": False},
            {"precision": "bf16", "bf16_weights": False},
        ]
        if facts.follows_weight_type and facts.follows_weight_type():
            types.append({"precision": "bf16", "bf16_weights": True})
        if not has_bf16(device):  # then it is a GPU
            types[1:] = [{"precision": "fp16", "bf16_weights": False}]
    compiling = [start.compile] if start.compile != "native" else []
    # Packed documents have a separate kernel, which is not compiled.
    masked = config.data.packing == "document"
    if "compile" not in keep and not masked and find_compiler() is not None:
        compiling = [False, True]
    kernels = [start.attention]
    if "attention" not in keep and not masked and uses_attention(config.model):
        kernels = list(KERNELS)
    kinds = [
        {**narrow, "compile": compiled, "attention": kernel}
        for compiled in compiling
        # Compiling takes long, so the most promising combination comes first.
        for narrow, kernel in itertools.product(types[:: -1 if compiled else 1], kernels)
    ]
    axis_of = {"precision": "precision", "bf16_weights": "precision", "compile": "compile"}
    fixed = [name for name, axis in axis_of.items() if axis in keep]
    if not masked and find_compiler() is not None and not facts.why_not_native(device):
        for precision in ("fp32", "bf16"):
            native = {"precision": precision, "bf16_weights": False, "compile": "native"}
            if all(native[name] == getattr(start, name) for name in fixed):
                kinds.insert(0, {**native, "attention": start.attention})
    rows = config.data.batch_size * config.training.accumulation_steps
    sizes = [start.batch_size] if "micro-batch" in keep else batch_sizes(rows, start.batch_size)
    threads: list[int | None] = [start.threads]
    if "threads" not in keep and device.type == "cpu":
        threads = thread_counts(_cores(), start.threads, default_threads)
    return Space(kinds, sizes, threads)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Table:
    """Measures plans, and prints each result as a row.

    Args:
        config: with everything resolved.
        rows: the data of a step.
        plugins: modules that the measuring processes import.
        device: the device to measure.
        threads: torch's choice of CPU threads.
        deadline: of `time.monotonic`, after which no measurement starts.

    Attributes:
        measured: what was measured, in order.
        interrupted: whether Ctrl-C ended the search, with something measured.
    """

    def __init__(
        self,
        config: RunConfig,
        rows: Batch,
        plugins: Sequence[str],
        device: torch.device,
        threads: int,
        deadline: float,
    ) -> None:
        self.config = config
        self.deadline = deadline
        self.measured: dict[Plan, Measurement] = {}
        self.interrupted = False
        self._rows = config.data.batch_size * config.training.accumulation_steps
        self._tokens = self._rows * config.data.sequence_length
        self._threads = threads
        self._memory = "GPU memory" if device.type == "cuda" else "memory"
        self._measure = partial(
            measure_in_process, rows=rows, plugins=plugins, seconds=STEP_SECONDS
        )

    def seconds_of(self, plan: Plan) -> float | None:
        """Measure a setting and print its row; None where there is no time left."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            say("(the time is used up; --seconds gives more)")
            return None
        try:
            measurement = self._measure(self.config, plan, patience=max(left, LEAST_PATIENCE))
        except KeyboardInterrupt:
            if not any(not known.fault for known in self.measured.values()):
                raise  # there is nothing to write yet
            self.interrupted = True
            say("(interrupted; the result is the best of the settings above)")
            return None
        self.measured[plan] = measurement
        say(self._row(plan, measurement))
        return measurement.step_seconds

    def head(self) -> None:
        """Print the head of the table."""
        say(f"{self._tokens:,} tokens per step on {self.config.training.device}; each is measured")
        say("in a separate process:")
        say()
        self._columns()

    def ranking(self, best: Plan) -> None:
        """Print the successful measurements, the fastest first."""
        say("The fastest first:")
        say()
        self._columns()
        rows = sorted(self.measured.items(), key=lambda item: item[1].step_seconds)
        for plan, measurement in rows:
            if not measurement.fault:
                mark = "  <- chosen" if plan == best else ""
                say(self._row(plan, measurement) + mark)

    def gain(self, start: Plan, best: Plan) -> str:
        """Return the gain of the best setting, in one line."""
        if best == start:
            return "The settings of the file are the fastest found."
        before, after = (self.measured[plan].step_seconds for plan in (start, best))
        if self.measured[start].fault:
            return f"With the settings of the file: {self.measured[start].fault}."
        return f"{before / after:.2f} times as fast as the settings of the file."

    def _columns(self) -> None:
        names = ("precision", "compile", "attention", "micro-batch", "threads", "tokens/s")
        say(COLUMNS.format(*names, self._memory, "compiling"))

    def _row(self, plan: Plan, measurement: Measurement) -> str:
        precision = plan.precision
        if precision == "bf16" and not plan.bf16_weights and plan.compile != "native":
            precision = "bf16 autocast"
        start = COLUMNS.format(
            precision,
            "native" if plan.compile == "native" else "yes" if plan.compile else "no",
            plan.attention,
            f"{plan.batch_size} x {self._rows // plan.batch_size}",
            plan.threads or self._threads,
            *("" if measurement.fault else f"{self._tokens / measurement.step_seconds:,.0f}",),
            *("", "") if measurement.fault else _costs(plan, measurement),
        )
        return f"{start.rstrip()}  {measurement.fault}" if measurement.fault else start


def _costs(plan: Plan, measurement: Measurement) -> tuple[str, str]:
    peak = measurement.peak_bytes
    return (
        "-" if peak is None else gib(peak),
        f"{measurement.compile_seconds:.1f} s" if plan.compile else "-",
    )


def write_copy(
    target: Path,
    config_path: Path,
    overrides: Sequence[str],
    changes_to: Callable[[YamlDocument], dict[KeyPath, Any]],
    origin: str = "tune",
) -> None:
    """Write a copy of the user's file with other values, and check it as `run` would.

    Args:
        target: the new file.
        config_path: the user's file.
        overrides: as for `run`; the new file has them.
        changes_to: returns the values to write into a document.
        origin: of these values, for messages.

    Raises:
        MachineError: the file cannot be written.
    """
    document = overridden(read_yaml(config_path), overrides)
    changes = changes_to(document)
    for path, value in changes.items():
        document = replaced(document, path, value, origin)
    others = [tuple(word.partition("=")[0].strip().split(".")) for word in overrides]
    text = edited(read_yaml_text(config_path), document, [*others, *changes])
    write_yaml(target, with_schema(text, target), "x")
    check_names(load_config(target))


def _changes(
    document: YamlDocument, config: RunConfig, best: Plan, keep: Sequence[str]
) -> dict[KeyPath, Any]:
    """Return the values to write: the choice, and all other values that changed.

    A kept `auto` is written as the value that was measured: a run could choose another.
    """
    values = best.values(config.data.batch_size * config.training.accumulation_steps)
    given = document.data.get("training") or {}
    training = values["training"]
    fields = type(config.training).model_fields
    opened = {name for name in fields if given.get(name, fields[name].default) == "auto"}
    keep = [name for name in keep if name not in opened]
    if "precision" in keep:
        del training["precision"], training["bf16_weights"]
    elif "mixed_precision" in given:
        training["mixed_precision"] = best.precision != "fp32"
    if best.precision != "bf16" and "bf16_weights" not in given:
        training.pop("bf16_weights", None)
    for name in {"compile", "attention"}.intersection(keep):
        del training[name]
    if best.threads == config.training.threads:
        del training["threads"]
    if best.batch_size == config.data.batch_size:
        del values["data"]["batch_size"], training["accumulation_steps"]
    elif config.data.global_batch is not None and "accumulation_steps" not in given:
        del training["accumulation_steps"]  # it follows, on any number of ranks
    return {
        (section, field): value for section in values for field, value in values[section].items()
    }
