"""Proof that checkpoints are intact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fundamentallm.errors import CheckpointError, ConfigError
from fundamentallm.files.run_layout import RunOrCheckpoint, no_checkpoint
from fundamentallm.inference.load import checkpoints_in, named_checkpoint
from fundamentallm.inference.stored_model import stored_config, stored_shapes
from fundamentallm.training.checkpoint.scores import Scores
from fundamentallm.training.checkpoint.snapshot import check_usable
from fundamentallm.training.checkpoint.store import CheckpointStore
from fundamentallm.training.checkpoint.tree import flatten


@dataclass(frozen=True)
class Verdict:
    """The result for one checkpoint.

    Attributes:
        name: its directory's name.
        fault: what is wrong; None if it is intact.
        step: the optimizer step; None if unknown.
        num_bytes: the size of all its files.
        num_tensors: tensors that were read, tied ones once.
        val_loss: validation loss at its step, if one was measured there.
    """

    name: str
    fault: CheckpointError | None
    step: int | None = None
    num_bytes: int = 0
    num_tensors: int = 0
    val_loss: float | None = None


def checkpoints_of(path: Path) -> tuple[CheckpointStore, Sequence[str]]:
    """Return the store and the names of the checkpoints that RUN_OR_CHECKPOINT means here.

    A run means all of them, newest first.

    Raises:
        CheckpointError: there is none.
    """
    named = RunOrCheckpoint.parse(path, checkpoints_in)
    store = CheckpointStore(named.checkpoints)
    chosen = named_checkpoint(named)
    names = store.step_names() if chosen is None else [chosen.name]
    if not names:
        raise no_checkpoint(path)
    return store, names


def examine(store: CheckpointStore, name: str) -> Verdict:
    """Read a whole checkpoint: hashes, shapes against its own configuration, finite values."""
    path = store.directory / name
    try:
        manifest = store.manifest(path)
    except CheckpointError as error:
        return Verdict(name, error)
    facts: dict[str, Any] = {
        "step": manifest.step,
        "num_bytes": sum(record.size for record in manifest.files.values()),
        "val_loss": Scores(store.directory).val_loss(manifest),
    }
    try:
        state = store.read(path)
        num_tensors = len(flatten(state)[1])
        _check_shapes(state, manifest.metadata, str(path))
        check_usable(state, str(path))
    except CheckpointError as error:
        return Verdict(name, error, **facts)
    return Verdict(name, None, num_tensors=num_tensors, **facts)


def _check_shapes(state: dict[str, Any], metadata: Any, where: str) -> None:
    """Compare with the model of the configuration that the checkpoint carries, if it does."""
    if "config" not in metadata:
        return  # saved by a script: there is nothing to compare with
    config = stored_config(metadata["config"], where)
    try:
        stored_shapes(config.model, state["model"], where)
    except ConfigError as error:
        raise CheckpointError(
            "the checkpoint's configuration cannot be built",
            where=where,
            got=str(error).splitlines()[0],
            fix="name the module that registers its parts with --plugins",
        ) from error
