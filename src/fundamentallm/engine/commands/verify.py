"""The `verify` command: prove checkpoints intact, in one table."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fundamentallm.engine.arguments import add_plugins, refuse_a_missing_model
from fundamentallm.engine.console import printable, say
from fundamentallm.engine.stopping import loading
from fundamentallm.errors import CheckpointError
from fundamentallm.files.run_layout import BEST, LAST

if TYPE_CHECKING:
    from fundamentallm.inference.verify import Verdict
    from fundamentallm.training.checkpoint.store import CheckpointStore

SUMMARY = "prove a run's checkpoints, or one checkpoint, intact"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "model",
        type=Path,
        metavar="RUN_OR_CHECKPOINT",
        help="a run, all of its checkpoints, or one checkpoint",
    )
    add_plugins(parser)


def execute(options: argparse.Namespace) -> int:
    """Check every byte, shape and number of a run's checkpoints or of one checkpoint.

    Raises:
        CheckpointError: a checkpoint is damaged, or there is none.
    """
    refuse_a_missing_model(options.model)
    with loading():
        from fundamentallm.engine.plugins import load_plugins
        from fundamentallm.inference.verify import checkpoints_of, examine

    load_plugins(options.plugins, "--plugins")
    store, names = checkpoints_of(options.model)
    verdicts = [examine(store, name) for name in names]
    _print_table(store, verdicts)
    faults = [verdict for verdict in verdicts if verdict.fault is not None]
    if not faults:
        return 0
    say()
    whole = len(verdicts) - len(faults)
    raise CheckpointError(
        f"{len(faults)} of {len(verdicts)} checkpoints failed",
        where=str(options.model),
        got="\n            ".join(_first_line(verdict) for verdict in faults),
        fix="`run` ignores them and continues from the newest intact one"
        if whole
        else "restore a copy, or start a new run with --resume never",
    )


def _print_table(store: CheckpointStore, verdicts: Sequence[Verdict]) -> None:
    from fundamentallm.engine.tuning.fit import gib

    marks: dict[str, list[str]] = {}
    for pointer in (BEST, LAST):
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
