"""What a run may go on with although its configuration has changed.

| a difference in | a run goes on with it |
|---|---|
| logging, metrics, retention (`RESUME_MAY_DIFFER`) | always; it is not recorded |
| a budget that the schedule does not depend on | always; said in a line and recorded |
| a budget that the schedule depends on, and whatever is `CHANGEABLE` | with `--change`; recorded |
| anything else | never; the error says what to do instead |
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer

from fundamentallm.config import RunConfig
from fundamentallm.config.global_batch import FREE_WITH_EQUAL_ROWS
from fundamentallm.config.training import DEFAULT_WARMUP_STEPS, TrainingConfig
from fundamentallm.config.yaml.difference import (
    BUDGETS,
    config_differences,
    may_be_changed,
    may_differ_on_resume,
    value_in_words,
    with_defaults,
)
from fundamentallm.engine.wiring.exactness import Split
from fundamentallm.errors import CheckpointError
from fundamentallm.inference.stored_model import stored_config
from fundamentallm.training.checkpoint.changes import Record
from fundamentallm.training.checkpoint.manifest import Manifest
from fundamentallm.training.epochs import Epochs
from fundamentallm.training.saved import saved_count, saved_number
from fundamentallm.training.schedulers import SCHEDULERS

FLAG = "--change"


@dataclass(frozen=True)
class Difference:
    """A key whose value is another one than the run's.

    Attributes:
        key: dotted.
        was: the run's value; ABSENT if the run has none.
        now: the value now; ABSENT without one.
    """

    key: str
    was: Any
    now: Any

    def __str__(self) -> str:
        """Return it in words."""
        was, now = value_in_words(self.was), value_in_words(self.now)
        return f"{self.key}: {was} in the run, {now} now"

    @property
    def grows(self) -> bool:
        """Whether it is a budget that is larger now, or is none any more."""
        return self.was is not None and (self.now is None or bool(self.now > self.was))

    @property
    def can_be_changed(self) -> bool:
        """Whether a run may go on with it, if the user says so."""
        if self.key == "training.optimizer":
            return bool(_name(self.was) == _name(self.now))
        if self.key == "handlers.checkpointing" and self.now is False:
            return False  # there would be nothing to go on with
        return may_be_changed(self.key)


@dataclass(frozen=True)
class Position:
    """How much of its budgets a run has used.

    Attributes:
        step: optimizer steps.
        tokens: training tokens.
        seconds: seconds of all processes so far.
        epochs: where its epochs ended.
    """

    step: int
    tokens: int
    seconds: float
    epochs: Epochs

    @classmethod
    def of(cls, state: Mapping[str, Any], where: str) -> Position:
        """Return the position of a saved state.

        Raises:
            CheckpointError: it has none.
        """
        try:
            trainer = state["trainer"]
            epochs = Epochs(saved_count(trainer, "epoch_length"))
            step = saved_count(trainer, "iteration")
            epochs.load_state_dict(trainer.get("epochs_ended_early", ()), step=step)
            return cls(
                step,
                saved_count({"tokens_seen": 0, **trainer}, "tokens_seen"),
                saved_number({"elapsed_before": 0.0, **trainer}, "elapsed_before"),
                epochs,
            )
        except (LookupError, TypeError, ValueError, CheckpointError) as error:
            raise CheckpointError(
                "the checkpoint does not say how far its run was", where=where, got=str(error)[:200]
            ) from error

    def spent(self, training: TrainingConfig) -> list[str]:
        """Return the fields of `training` whose limits leave nothing to do from here."""
        steps, tokens, seconds = training.total_steps, training.max_tokens, training.max_seconds
        spent = []
        if steps is not None and self.step >= steps:
            spent.append("total_steps")
        if tokens is not None and self.tokens >= tokens:
            spent.append("max_tokens")
        if seconds is not None and self.seconds >= seconds:
            spent.append("max_seconds")
        by_epochs = steps is None and tokens is None and seconds is None
        if by_epochs and self.step >= self.epochs.last_step(training.num_epochs):
            spent.append("num_epochs")
        return spent

    def horizon(self, training: TrainingConfig) -> tuple[Any, ...]:
        """Return what a schedule with a horizon aims at: steps, tokens, or seconds."""
        if training.total_steps is not None or training.max_tokens is not None:
            return (training.total_steps, training.max_tokens)
        if training.max_seconds is not None:
            return ("clock", training.max_seconds)
        return (self.epochs.last_step(training.num_epochs), None)


@dataclass(frozen=True)
class Comparison:
    """How a configuration differs from that of a checkpoint's run.

    Attributes:
        manifest: the checkpoint's.
        config: as written, now.
        budgets: differences in what ends the run.
        others: differences that make it another run.
    """

    manifest: Manifest
    config: RunConfig
    budgets: Sequence[Difference] = ()
    others: Sequence[Difference] = ()

    @classmethod
    def of(cls, manifest: Manifest, config: RunConfig) -> Comparison:
        """Compare a configuration with the one that a checkpoint's run was started with.

        With a `data.global_batch` of as many rows as the run's steps have, they may be split
        otherwise.
        """
        was, now = as_written(manifest), config.model_dump(mode="json")
        if "warmup_steps" in config.training.model_fields_set:
            was = {**was, "training": {**was["training"], "warmup_steps": _warmup_of(manifest)}}
        rows, split = config.data.global_batch, Split.saved_in(manifest)
        free = FREE_WITH_EQUAL_ROWS if split is not None and rows == split.rows else frozenset()
        found = [Difference(*one) for one in config_differences(was, now)]
        budgets = {f"training.{name}" for name in BUDGETS}
        return cls(
            manifest,
            config,
            [one for one in found if one.key in budgets],
            [one for one in found if one.key not in free and not may_differ_on_resume(one.key)],
        )

    @property
    def differs(self) -> bool:
        """Whether anything differs that is recorded."""
        return bool(self.budgets or self.others)

    @property
    def can_be_changed(self) -> bool:
        """Whether the run may go on with all of it, if the user says so."""
        return all(one.can_be_changed for one in self.others)

    @property
    def changes_rows(self) -> bool:
        """Whether a key differs that says how many rows a step has."""
        return any(one.key in FREE_WITH_EQUAL_ROWS for one in self.others)

    def moves_schedule(self, position: Position) -> bool:
        """Return whether the budgets that differ change the learning rate of steps to come.

        Raises:
            CheckpointError: the budgets of the run are not known.
        """
        training = self.config.training
        written = stored_config(as_written(self.manifest), self.manifest.name)
        was, now = position.horizon(written.training), position.horizon(training)
        if was == now or not self.budgets or self.config.handlers.get("schedule") is False:
            return False
        schedule = SCHEDULERS.get(training.scheduler.name)
        follows_clock = "clock" in (was[0], now[0])
        return (
            getattr(schedule, "needs_total", False)
            or "total_steps" in inspect.signature(schedule).parameters
            or (follows_clock and getattr(schedule, "uses_warmup", False))
        )

    def in_words(self, moves: bool) -> str:
        """Return what is said behind "continuing from step n", given whether the schedule moves."""
        if not self.budgets:
            return ""
        size = "a larger" if all(one.grows for one in self.budgets) else "another"
        name = self.config.training.scheduler.name
        return (
            f" with {size} budget ({'; '.join(map(str, self.budgets))}); the schedule {name}"
            f" {'follows it' if moves else 'does not depend on it'}"
        )

    def refuse_others(self, where: str, change: bool) -> None:
        """Refuse differences that make it another run, unless the user accepts them.

        Raises:
            CheckpointError: it names each difference, and the way on.
        """
        if self.can_be_changed and (change or not self.others):
            return
        fixed = [one for one in self.others if not one.can_be_changed]
        listed = fixed if change else self.others
        if not fixed:
            fix = (
                f"accept the change with {FLAG}, undo it, or start a new run with --resume never"
                " (budgets and logging may differ)"
            )
        else:
            advice = "; ".join(dict.fromkeys(_instead(one.key) for one in fixed))
            fix = f"undo the change, or {advice} (budgets and logging may differ)"
        raise CheckpointError(
            ("a run cannot change this" if change else "the run has a different configuration")
            + ":\n    "
            + "\n    ".join(map(str, listed)),
            where=where,
            fix=fix,
        )

    def refuse_moved_schedule(self, where: str) -> None:
        """Refuse other budgets, on which the schedule depends.

        Raises:
            CheckpointError: always.
        """
        name = self.config.training.scheduler.name
        raise CheckpointError(
            f"the budget differs, and the schedule {name} depends on it, so the learning rate"
            " would jump:\n    " + "\n    ".join(map(str, self.budgets)),
            where=where,
            fix=f"accept that with {FLAG}, undo the change, or start a new run with --resume never",
        )

    def record(self, position: Position) -> Record:
        """Return the record of the change, but for the rows of a step."""
        every = [*self.budgets, *self.others]
        differences = [[one.key, one.was, one.now] for one in every]
        record: Record = {"step": position.step, "differences": differences}
        if self.changes_rows:
            epochs = position.epochs
            record |= {"tokens": position.tokens, "epochs": [epochs.length, epochs.state_dict()]}
        return record


def as_written(manifest: Manifest) -> dict[str, Any]:
    """Return the configuration that a checkpoint's run was started with."""
    return with_defaults(manifest.metadata.get("config_as_written", {}), RunConfig)


def keep_own_options(optimizer: Optimizer, keys: Collection[str]) -> None:
    """Let an optimizer keep its own values of changed options when it loads a state.

    Args:
        optimizer: as the configuration builds it.
        keys: the keys that the run has changed.
    """
    options = any(key.startswith("training.optimizer") for key in keys)
    if not options and "training.learning_rate" not in keys:
        return
    own = [
        {
            name: value
            for name, value in group.items()
            if name == "lr" or (options and name != "params")
        }
        for group in optimizer.param_groups
    ]

    def keep(optimizer: Optimizer) -> None:
        for group, values in zip(optimizer.param_groups, own, strict=True):
            group.update(values)

    optimizer.register_load_state_dict_post_hook(keep)


def kept_warmup(config: RunConfig, manifest: Manifest, total_steps: int | None) -> int | None:
    """Return the warmup that a run chose when it began, if the configuration leaves it open.

    None if it sets one, if the run did, or if the schedule of the run had none.
    """
    written = as_written(manifest)["training"]
    if (
        "warmup_steps" in config.training.model_fields_set
        or written["warmup_steps"] != DEFAULT_WARMUP_STEPS
        or _name(written["scheduler"]) != config.training.scheduler.name
    ):
        return None
    warmup = _warmup_of(manifest)
    return warmup if total_steps is None or warmup < total_steps else None


def _warmup_of(manifest: Manifest) -> Any:
    """Return the warmup steps that a checkpoint's run was trained with."""
    resolved = manifest.metadata.get("config", {})
    training = resolved.get("training", {}) if isinstance(resolved, Mapping) else {}
    written = as_written(manifest)["training"]["warmup_steps"]
    return training.get("warmup_steps", written) if isinstance(training, Mapping) else written


def _instead(key: str) -> str:
    """Return what to do in place of changing a key."""
    if key in ("model.dropout", "seed") or not key.startswith(("model.", "data.tokenizer")):
        return "begin a new run from its weights (model.init_from: RUN, with --resume never)"
    return "start a new run with --resume never: its weights fit no other model and no other tokens"


def _name(component: Any) -> Any:
    return component.get("name") if isinstance(component, Mapping) else component
