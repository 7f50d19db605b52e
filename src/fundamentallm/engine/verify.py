"""The `verify` command: proof that checkpoints are whole, in one table."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fundamentallm.config import RunConfig
from fundamentallm.engine.console import printable, say
from fundamentallm.engine.fit import gib
from fundamentallm.engine.plugins import load_plugins
from fundamentallm.errors import CheckpointError, ConfigError
from fundamentallm.inference.load import checkpoints_in, refuse_foreign_files
from fundamentallm.models.transformer import Transformer
from fundamentallm.training.checkpoint import check_model_state
from fundamentallm.training.snapshot import check_usable
from fundamentallm.training.state_tree import flatten
from fundamentallm.training.store import CheckpointStore


@dataclass(frozen=True)
class Verdict:
    """What was found out about one checkpoint.

    Attributes:
        name: its directory's name.
        fault: what is wrong, None for nothing.
        step: the optimizer step; None where the manifest does not tell.
        num_bytes: of all its files.
        num_tensors: tensors that were read, tied ones once.
        val_loss: validation loss at its step, if one was measured there.
    """

    name: str
    fault: CheckpointError | None
    step: int | None = None
    num_bytes: int = 0
    num_tensors: int = 0
    val_loss: float | None = None


def verify(options: argparse.Namespace) -> int:
    """Check every byte, shape and number of a run's checkpoints, or of one.

    Raises:
        CheckpointError: one is not whole, or there is none.
    """
    load_plugins(options.plugins, "--plugins")
    path: Path = options.model
    refuse_foreign_files(path)
    if path.is_file() and path.name in ("best", "last"):
        path = CheckpointStore(path.parent).resolve(path.name) or path
    if (path / "MANIFEST.json").exists():
        store, names = CheckpointStore(path.parent), [path.name]
    else:
        store = CheckpointStore(checkpoints_in(path))
        names = list(store.step_names())
    if not names:
        raise CheckpointError("there is no checkpoint here", where=str(path))
    verdicts = [examine(store, name) for name in names]
    _print_table(store, verdicts)
    faults = [verdict for verdict in verdicts if verdict.fault is not None]
    if not faults:
        return 0
    say()
    whole = len(verdicts) - len(faults)
    raise CheckpointError(
        f"{len(faults)} of {len(verdicts)} checkpoints failed",
        where=str(path),
        got="\n            ".join(_first_line(verdict) for verdict in faults),
        fix="`run` passes over them and goes on from the newest whole one"
        if whole
        else "restore a copy, or start a fresh run with --resume never",
    )


def examine(store: CheckpointStore, name: str) -> Verdict:
    """Read a checkpoint whole: hashes, shapes against its own configuration, finite values."""
    path = store.directory / name
    try:
        manifest = store.manifest(path)
    except CheckpointError as error:
        return Verdict(name, error)
    facts: dict[str, Any] = {
        "step": manifest.step,
        "num_bytes": sum(record.size for record in manifest.files.values()),
        "val_loss": manifest.metadata.get("val_loss"),
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
    try:
        config = RunConfig.model_validate(metadata["config"])
        with torch.device("meta"):  # shapes alone
            model = Transformer(config.model)
    except (ConfigError, ValueError) as error:
        raise CheckpointError(
            "the checkpoint's configuration cannot be built",
            where=where,
            got=str(error).splitlines()[0],
            fix="name the module that registers its parts with --plugins",
        ) from error
    check_model_state(model, state["model"], where)


def _print_table(store: CheckpointStore, verdicts: Sequence[Verdict]) -> None:
    marks: dict[str, list[str]] = {}
    for pointer in ("best", "last"):
        name = store.pointed(pointer)
        if name is not None:
            marks.setdefault(name, []).append(pointer)
    say(f"{'checkpoint':<16}{'size':>10}{'tensors':>9}{'val loss':>10}  {'state':<9}")
    for verdict in verdicts:
        loss = f"{verdict.val_loss:.4f}" if verdict.val_loss is not None else "-"
        tensors = str(verdict.num_tensors) if verdict.fault is None else "-"
        state = "whole" if verdict.fault is None else "FAILED"
        row = f"{verdict.name:<16}{gib(verdict.num_bytes):>10}{tensors:>9}{loss:>10}  {state:<9}"
        say(printable(f"{row}{', '.join(marks.get(verdict.name, []))}".rstrip()))


def _first_line(verdict: Verdict) -> str:
    return str(verdict.fault).splitlines()[0]
