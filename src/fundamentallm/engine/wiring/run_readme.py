"""The README.md of a run directory: what its files are, and the commands for them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from fundamentallm.files.run_layout import (
    BEST,
    CONFIG,
    INCIDENTS,
    LAST,
    LOG,
    METRICS,
    PAGE,
    SAMPLES,
    STOP,
    TENSORBOARD,
    USAGE,
)
from fundamentallm.markdown import code_cell, escaped
from fundamentallm.training.checkpoint.changes import Record, in_words

_PLAIN = re.compile(r"[A-Za-z0-9]([\w.-]*[A-Za-z0-9])?", re.ASCII)  # no sign of it is markup
_HEADING = "## Changes"


def run_readme(run: Path, checkpoints: Path, program: str, changes: Sequence[Record] = ()) -> str:
    """Return the text.

    Args:
        run: the run directory.
        checkpoints: where its checkpoints lie.
        program: how the program is called.
        changes: with which the run went on.
    """
    place = checkpoints.relative_to(run) if checkpoints.is_relative_to(run) else checkpoints
    pointers = ", ".join(code_cell(f"{place}/{name}") for name in (BEST, LAST))
    stop = code_cell(shlex.join(["touch", str(run / STOP)]))

    def typed(command: str, *words: str) -> str:
        return code_cell(f"{program} {shlex.join([command, str(run), *words])}")

    return f"""# {run.name if _PLAIN.fullmatch(run.name) else escaped(run.name)}

A training run of FundamentaLLM.

| file | what it is |
|---|---|
| `{CONFIG}` | the configuration, with every default and every `auto` resolved |
| `{METRICS}` | one JSON object a line: step, losses in nats per token, rate, speed |
| `{SAMPLES}` | texts that the model wrote while it was trained |
| `{USAGE}` | seconds of training, evaluation, sampling and saving; energy, where readable |
| `{LOG}` | what the terminal said, with times |
| `{TENSORBOARD}/` | the metrics for TensorBoard |
| {code_cell(f"{place}/")} | one directory a checkpoint: weights and state, with SHA-256 sums |
| {pointers} | the names of the best and the last checkpoint |
| `{INCIDENTS}/` | evidence of updates that were refused, if there were any |

A file is there once the run has written it.

| to | type |
|---|---|
| write text with the model | {typed("generate")} |
| measure its loss | {typed("evaluate")} |
| see the curves in `{PAGE}` | {typed("report")} |
| prove the checkpoints whole | {typed("verify")} |
| hand the model on | {typed("export", "--format", "hf", "--out", "DIR")} |
| stop the run with its state saved | Ctrl-C, or {stop} |
| go on after a stop | the command that started the run |
| train further after the end | the same command, which names the budget to raise |

The commands name this directory as it was called when the run started.
""" + _changes(changes)


def lists_changes(text: str) -> bool:
    """Return whether a README says with which changes its run went on."""
    return _HEADING in text


def _changes(changes: Sequence[Record]) -> str:
    if not changes:
        return ""
    rows = [
        f"| {change['step']:,} | {code_cell(words)} |\n"
        for change in changes
        for words in in_words(change)
    ]
    return (
        f"\n{_HEADING}\n\nThe run went on with a changed configuration:\n\n"
        "| after step | change |\n|---|---|\n" + "".join(rows)
    )
