"""The `sweep` command: train the trials in turn, keep what they gave, compare them at the end.

The record is written before a trial begins and after each run, so whatever kills the process, the
same command finds the same settings; a run that was cut short goes on from its checkpoint.
"""

from __future__ import annotations

import math
import os
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fundamentallm.config.run import RunConfig
from fundamentallm.config.sweep import Range, SweepConfig
from fundamentallm.config.yaml.problems import shown
from fundamentallm.config.yaml.source import YamlDocument
from fundamentallm.engine.console import printable, program, say
from fundamentallm.engine.plugins import load_plugins
from fundamentallm.engine.stopping import signal_in_words
from fundamentallm.engine.sweeping.processes import Ended, Processes
from fundamentallm.engine.sweeping.proposals import at_random, check_method, proposed
from fundamentallm.engine.sweeping.record import (
    RunRecord,
    State,
    SweepRecord,
    TrialRecord,
    begun,
    limits,
    read_record,
    write_record,
)
from fundamentallm.engine.wiring.assemble import check_names
from fundamentallm.engine.wiring.conflicts import require_validation_text
from fundamentallm.errors import CheckpointError, ConfigError, InterruptedRunError, MachineError
from fundamentallm.files.filesystem import Filesystem, replace_file
from fundamentallm.files.lock import run_lock
from fundamentallm.files.names import numbered
from fundamentallm.files.private import make_directory
from fundamentallm.reports.comparison import compare
from fundamentallm.reports.forms import section, text_table
from fundamentallm.reports.page import duration, page
from fundamentallm.reports.run_data import RunData, read_run
from fundamentallm.training.handlers.pruning import PRUNED

PAGE = "comparison.html"


def run_sweep(
    sweep: SweepConfig, path: Path, sweep_dir: Path | None = None, plugins: Sequence[str] = ()
) -> int:
    """Train all trials that are not done yet, then compare; return the exit code.

    Args:
        sweep: what the file says.
        path: the file.
        sweep_dir: the sweep's directory; None for `sweeps/<name>`, or the next free one if another
            sweep is there.
        plugins: modules to import besides the configuration's.

    Raises:
        FundamentaLLMError: of the class of the fault; `InterruptedRunError` after a signal.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise MachineError(
            "a sweep starts a process for each run",
            got=f"WORLD_SIZE={os.environ['WORLD_SIZE']}",
            fix="start it without torchrun",
        )
    again = f"{program()} sweep {shlex.quote(str(path))}"
    if sweep_dir is not None:
        again += f" --sweep-dir {shlex.quote(str(sweep_dir))}"
    if plugins:
        again += " --plugins " + " ".join(map(shlex.quote, plugins))
    base = sweep.base()
    config = sweep.run_config(base, {})
    load_plugins([*config.plugins, *plugins], config.locate("plugins"))
    check_method(sweep)
    check_trials(sweep, base)
    record = begun(sweep, config)
    directory = _directory(sweep, record, sweep_dir)
    processes = Processes(plugins)
    make_directory(directory)
    with run_lock(directory):
        work = Sweep(sweep, base, directory, read_record(directory) or record, processes, again)
        with processes.signals_handed_on():
            is_done = work.train_all()
        if is_done:
            work.conclude()
    return 0


def check_trials(sweep: SweepConfig, base: YamlDocument) -> None:
    """Check every setting that is known, before anything is trained.

    A grid and random settings are checked as they will be; of what optuna may choose, each value
    of a list and the ends of each range.

    Raises:
        ConfigError: a setting is invalid; the error names its line.
    """
    trials: list[dict[str, Any]] = []
    if sweep.method == "grid":
        trials = list(sweep.combinations())
    elif sweep.method == "random":
        trials = [at_random(sweep, number) for number in range(1, sweep.number_of_trials + 1)]
    else:
        for key, values in sweep.axes.items():
            ends = [values.low, values.high] if isinstance(values, Range) else values
            trials += [{key: value} for value in ends]
    for settings in trials:
        try:
            config = sweep.run_config(base, settings)
            check_names(config)
        except ConfigError as error:
            if len(settings) > 1:
                of_trial = f"the trial is {in_words(settings)}"
                error.fix = f"{error.fix}; {of_trial}" if error.fix else of_trial
            raise
        require_validation_text(config, "a sweep")


def in_words(settings: dict[str, Any]) -> str:
    """Return settings as one line."""
    return ", ".join(f"{key}={shown(value)}" for key, value in settings.items())


def _directory(sweep: SweepConfig, record: SweepRecord, chosen: Path | None) -> Path:
    """Return where the sweep is or begins.

    Raises:
        CheckpointError: the user's own choice holds another sweep, or something else.
    """
    differing = ""
    for directory in [chosen] if chosen is not None else numbered(Path("sweeps") / sweep.name):
        found = read_record(directory)
        if found is None:
            if directory.exists() and any(
                not entry.name.startswith(".") for entry in directory.iterdir()
            ):
                differing = differing or f"{directory} holds something else"
                continue
        elif difference := found.difference(record):
            differing = differing or f"{directory} is of another sweep ({difference})"
            continue
        if differing:
            say(printable(f"A new sweep begins in {directory}: {differing}."))
        return directory
    raise CheckpointError(
        "the directory is not of this sweep",
        where=str(chosen),
        got=differing,
        fix="choose another --sweep-dir, or undo the change",
    )


@dataclass
class Sweep:
    """The trials of a sweep, as far as they have come.

    Args:
        sweep: what the file says.
        base: the configuration of all runs.
        directory: of the sweep.
        record: what is on the disk.
        processes: train a run.
        again: the command that goes on.
    """

    sweep: SweepConfig
    base: YamlDocument
    directory: Path
    record: SweepRecord
    processes: Processes
    again: str
    _seconds: list[float] = field(default_factory=list)

    @property
    def seeds(self) -> list[int]:
        """The seeds of each trial."""
        first = self.sweep.run_config(self.base, {}).seed
        return list(range(first, first + self.sweep.seeds))

    def train_all(self) -> bool:
        """Train what is left; return whether nothing is left now.

        Raises:
            InterruptedRunError: a signal stopped it.
        """
        count, seeds = self.sweep.number_of_trials, self.seeds
        done = sum(len(trial.runs) for trial in self.record.trials)
        of_seeds = "1 seed" if len(seeds) == 1 else f"{len(seeds)} seeds"
        say(
            f"{count:,} settings ({self.sweep.method}) x {of_seeds}, {self.sweep.steps:,}"
            f" steps each, in {self.directory}" + (f"; {done:,} runs are done" if done else "")
        )
        for number in range(1, count + 1):
            if number > len(self.record.trials):
                settings = proposed(self.sweep, self.record.trials)
                self._keep(TrialRecord(number=number, settings=settings))
            for place, seed in enumerate(seeds):
                trial = self.record.trials[number - 1]
                if trial.is_pruned:
                    break
                if place >= len(trial.runs):
                    run = self._trained(trial, seed)
                    if run is None:
                        say(f"Saved. Continue with: {self.again}")
                        return False
                    self._keep(trial.model_copy(update={"runs": [*trial.runs, run]}))
        return True

    def _keep(self, trial: TrialRecord) -> None:
        self.record = self.record.with_trial(trial)
        write_record(self.directory, self.record)

    def _trained(self, trial: TrialRecord, seed: int) -> RunRecord | None:
        """Train a run to its end and return what came of it, None if its user stopped it.

        Raises:
            InterruptedRunError: a signal stopped it.
        """
        seeds = self.seeds
        name = trial.name(seed)
        left = (self.sweep.number_of_trials - trial.number) * len(seeds) + seeds[-1] - seed + 1
        say(
            f"trial {trial.number}/{self.sweep.number_of_trials}, seed {seed}:"
            f" {printable(in_words(trial.settings))}{self._time_left(left)}"
        )
        start = time.monotonic()
        config, path = self.directory / f"{name}.yaml", self.directory / name
        try:
            written = self._config(trial, seed)
        except ConfigError as error:  # a combination that only optuna chose
            return self._told(RunRecord(seed=seed, state="failed", reason=error.what), start)
        replace_file(Filesystem(), config, [written.to_yaml().encode()])
        ended = self.processes.train(config, path, self.sweep.steps)
        run = result(path, seed, ended)
        number = self.processes.signal or max(ended.code - 128, 0)
        if number and (run is None or run.state == "failed"):
            raise InterruptedRunError(
                f"stopped by {signal_in_words(number)} in trial {trial.number}, its state is saved",
                signal_number=number,
                fix=f"the same command goes on: {self.again}",
            )
        if run is None:
            return None
        self._seconds.append(time.monotonic() - start)
        return self._told(run, start)

    def _told(self, run: RunRecord, start: float) -> RunRecord:
        best = "" if run.best is None else f"best validation loss {run.best:.4f}, "
        say(printable(f"  {best}{run.reason} ({duration(time.monotonic() - start)})"))
        return run

    def _time_left(self, runs: int) -> str:
        if not self._seconds:
            return ""
        mean = math.fsum(self._seconds) / len(self._seconds)
        return f" (at most about {duration(mean * runs)} left)"

    def _config(self, trial: TrialRecord, seed: int) -> RunConfig:
        """Return the configuration of a run; it is the same whenever it is asked for."""
        settings = {
            **trial.settings,
            "seed": seed,
            "name": f"{self.sweep.name}-{trial.name(seed)}",
        }
        if self.sweep.prune is not None and seed == self.seeds[0]:
            past = self.record.trials[: trial.number - 1]
            bounds = limits(self.sweep.prune, past, self.sweep.steps)
            settings |= {"handlers.pruning.limits": bounds} if bounds else {}
        return self.sweep.run_config(self.base, settings)

    def conclude(self) -> None:
        """Compare the runs, and say what to do next.

        Raises:
            MachineError: none was completed.
        """
        trials = self.record.trials[: self.sweep.number_of_trials]
        runs = [
            (trial, run, self.directory / trial.name(run.seed))
            for trial in trials
            for run in trial.runs
        ]
        failed = [(path, run.reason) for _, run, path in runs if run.state == "failed"]
        complete = [(trial, run, path) for trial, run, path in runs if run.state == "complete"]
        if not complete:
            raise MachineError(
                "no run of the sweep was completed",
                where=str(failed[0][0]) if failed else str(self.directory),
                got=failed[0][1] if failed else "",
                fix="mend that in the configuration; a changed sweep begins in a new directory",
            )
        shown_runs: list[RunData] = [
            read_run(path) for _, run, path in runs if run.evaluations and path.exists()
        ]
        comparison = compare(shown_runs)
        out = self.directory / PAGE
        replace_file(Filesystem(), out, [page(shown_runs, section(comparison))])
        say()
        say(printable(text_table(comparison)))
        say()
        for state, words in (("pruned", "ended early"), ("failed", "failed")):
            for _, run, path in runs:
                if run.state == state:
                    say(printable(f"{path.name} {words}: {run.reason}"))
        trial, _, path = min(complete, key=lambda item: _order(item[0], item[1]))
        say(f"{out}: all curves; open it in a browser")
        say(printable(f"Best: trial {trial.number}, {in_words(trial.settings)}"))
        say()
        say("Next, a text, or these settings with more steps:")
        config = shlex.quote(f"{path}.yaml")
        longer = 10 * self.sweep.steps
        say(f"  {program()} generate {shlex.quote(str(path))}")
        unlimited = " handlers.pruning=false" if self.sweep.prune is not None else ""
        say(f"  {program()} run {config} training.total_steps={longer}{unlimited}")


def _order(trial: TrialRecord, run: RunRecord) -> tuple[float, float]:
    """Return what is lowest for the best run of the trial with the lowest mean."""
    value = math.inf if trial.value is None else trial.value
    return value, math.inf if run.best is None else run.best


def result(path: Path, seed: int, ended: Ended) -> RunRecord | None:
    """Return what a run gave, None if it was stopped before its end."""
    try:
        data = read_run(path)
    except CheckpointError:  # it ended before it wrote anything
        reason = ended.reason or "the run wrote nothing"
        return RunRecord(seed=seed, state="failed", reason=reason)
    curve = data.curves.get("val/loss")
    pairs = zip(curve.steps, curve.values, strict=True) if curve is not None else ()
    evaluations = [(step, None if isinstance(v, str) else float(v)) for step, v in pairs]

    def record(state: State, reason: str) -> RunRecord:
        return RunRecord(seed=seed, state=state, reason=reason, evaluations=evaluations)

    if ended.code != 0:
        return record("failed", ended.reason)
    state, _, reason = data.state.partition(": ")
    if state != "finished":
        return None
    if all(loss is None for _, loss in evaluations):
        return record("failed", "no finite validation loss")
    return record("pruned" if reason.startswith(PRUNED) else "complete", reason)
