"""How a run goes on whose steps get another number of rows: in its epoch, to its budgets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fundamentallm.config.training import TrainingConfig
from fundamentallm.data.loaders.epoch import EpochLoader
from fundamentallm.training.checkpoint.changes import Record
from fundamentallm.training.epochs import Epochs
from fundamentallm.training.limits import Limits


def rows_of(records: Sequence[Record]) -> list[tuple[int | None, int]]:
    """Return the rows of a step over the run, as `Epochs.rows`; empty if they never changed."""
    changed = [record for record in records if "rows" in record]
    if not changed:
        return []
    return [*((one["step"], one["rows"][0]) for one in changed), (None, changed[-1]["rows"][1])]


def limits_of(
    training: TrainingConfig, loader: EpochLoader, changes: Sequence[Record] = ()
) -> Limits:
    """Return when a run ends, with the steps that it took before its rows changed.

    Args:
        training: the budgets.
        loader: of the training data, with the present rows.
        changes: with which the run went on.
    """
    rows = rows_of(changes)
    if not rows:
        return Limits.resolve(training, len(loader), loader.steps_for_tokens)
    last = next(record for record in reversed(changes) if "rows" in record)
    length, cuts = last["epochs"]
    epochs = Epochs(len(loader), rows=rows)
    epochs.load_state_dict(cuts, length, last["step"])
    epoch, within = epochs.position(last["step"])
    passed = within * loader.tokens_per_step  # of its epoch, in steps of the present rows
    before = epoch * loader.targets_per_epoch + min(passed, loader.targets_per_epoch)

    def steps_for_tokens(num_tokens: int) -> int:
        to_come = loader.steps_for_tokens(before + max(0, num_tokens - last["tokens"]))
        return int(last["step"]) + max(0, to_come - epoch * len(loader) - within)

    limits = Limits.resolve(training, len(loader), steps_for_tokens)
    if limits.num_epochs is None:
        return limits
    return replace(limits, total_steps=epochs.last_step(limits.num_epochs))
