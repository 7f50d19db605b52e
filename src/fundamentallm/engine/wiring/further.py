"""The commands that go on with a run: the same one, and those that train a finished run further."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from fundamentallm.config import load_config
from fundamentallm.config.training import TrainingConfig
from fundamentallm.engine.console import command
from fundamentallm.engine.wiring.comparison import FLAG, Comparison, Position
from fundamentallm.training.checkpoint.manifest import Manifest
from fundamentallm.training.decision import LAST_STEP, STOPPED_BY, USED_UP

LEAST_SECONDS = 60.0  # more of a limit in seconds, so that the start of a process is a part of it
_ENDERS = ("early_stopping", "pruning")  # the handlers that finish a run


@dataclass(frozen=True)
class TypedCommand:
    """A `run` command as a user typed it.

    Attributes:
        config: the argument CONFIG.yaml.
        overrides: `key=value` words.
        options: what every command for the run needs, as `--plugins`.
        resume: of `--resume`.
        run_dir: of `--run-dir`; None without it.
        change: whether `--change` was given.
    """

    config: Path
    overrides: Sequence[str] = ()
    options: Sequence[str] = ()
    resume: str = "auto"
    run_dir: Path | None = None
    change: bool = False

    def again(self, run: Path) -> str:
        """Return the command that continues a run, in its directory, after a stop."""
        place: list[Path | str] = [] if self.resume == "auto" else ["--resume", run]
        if self.run_dir is not None:
            place = ["--run-dir", self.run_dir]
        flag = [FLAG] if self.change else []
        return command("run", self.config, *self.overrides, *place, *self.options, *flag)

    def fresh(self) -> str:
        """Return the command that starts a new run."""
        return command("run", self.config, *self.overrides, "--resume", "never", *self.options)

    def further(self, run: Path, manifest: Manifest, position: Position, finished: str) -> str:
        """Return the command that trains a run further than to its end.

        Args:
            run: its directory.
            manifest: of its last checkpoint.
            position: how much of its budgets it has used.
            finished: why it ended.
        """
        config = load_config(self.config, self.overrides)
        training = config.training
        new = {
            f"training.{name}": _raised(training, position, name)
            for name in spent_limits(training, position, finished)
        }
        left = math.inf if training.max_seconds is None else training.max_seconds - position.seconds
        if new and left < LEAST_SECONDS:
            new["training.max_seconds"] = _raised(training, position, "max_seconds")
        if not is_budget(finished) and not finished.startswith(STOPPED_BY):
            new |= {f"handlers.{name}": "false" for name in _ENDERS if config.handlers.get(name)}
        words = [
            *(word for word in self.overrides if not _sets_any(word, new)),
            *(f"{key}={value}" for key, value in new.items()),
        ]
        comparison = Comparison.of(manifest, load_config(self.config, words))
        changes = bool(comparison.others) or comparison.moves_schedule(position)
        flag = [FLAG] if changes else []
        return command("run", self.config, *words, "--resume", run, *self.options, *flag)


def ended_by(training: TrainingConfig, position: Position, finished: str) -> str:
    """Return why a run is finished, with the limits that it has used up."""
    limits = ", ".join(
        f"training.{name}: {getattr(training, name):.16g}"
        for name in spent_limits(training, position, finished)
    )
    return f"{finished} ({limits})" if limits else finished


def is_budget(finished: str) -> bool:
    """Return whether a budget, not a handler, has finished a run."""
    return finished in (LAST_STEP, USED_UP)


def spent_limits(training: TrainingConfig, position: Position, finished: str) -> list[str]:
    """Return the fields of `training` whose limits keep a run from training further.

    A run under a clock ends before its limit, so that its last validation stays inside.
    """
    spent = position.spent(training)
    if spent or not is_budget(finished):
        return spent
    if finished == USED_UP and training.max_seconds is not None:
        return ["max_seconds"]
    named = (name for name in ("total_steps", "max_tokens") if getattr(training, name) is not None)
    return [next(named, "num_epochs")]


def _sets_any(word: str, keys: Collection[str]) -> bool:
    """Return whether an override sets one of these keys, or a key below one."""
    key = word.partition("=")[0]
    return any(key == one or key.startswith(f"{one}.") for one in keys)


def _raised(training: TrainingConfig, position: Position, name: str) -> str:
    """Return a limit that leaves as much as the run had."""
    limit = getattr(training, name)
    if name != "max_seconds":
        return str(2 * limit)
    return str(math.ceil(max(2 * limit, position.seconds + max(limit, LEAST_SECONDS))))
