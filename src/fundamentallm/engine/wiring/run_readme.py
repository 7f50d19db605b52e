"""The README.md of a run directory: what its files are, and the commands for them."""

from __future__ import annotations

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
from fundamentallm.training.checkpoint.changes import Record, in_words

_HEADING = "## Changes"


def run_readme(run: Path, checkpoints: Path, program: str, changes: Sequence[Record] = ()) -> str:
    """Return the text.

    Args:
        run: the run directory.
        checkpoints: where its checkpoints lie.
        program: how the program is called.
        changes: with which the run went on.
    """
    name = shlex.quote(str(run))
    place = checkpoints.relative_to(run) if checkpoints.is_relative_to(run) else checkpoints
    return f"""# {run.name}

A training run of FundamentaLLM.

| file | what it is |
|---|---|
| `{CONFIG}` | the configuration, with every default and every `auto` resolved |
| `{METRICS}` | one JSON object a line: step, losses in nats per token, rate, speed |
| `{SAMPLES}` | texts that the model wrote while it was trained |
| `{USAGE}` | seconds of training, evaluation, sampling and saving; energy, where readable |
| `{LOG}` | what the terminal said, with times |
| `{TENSORBOARD}/` | the metrics for TensorBoard |
| `{place}/` | one directory a checkpoint: weights and state, with SHA-256 sums |
| `{place}/{BEST}`, `{place}/{LAST}` | the names of the best and the last checkpoint |
| `{INCIDENTS}/` | evidence of updates that were refused, if there were any |

A file is there once the run has written it.

| to | type |
|---|---|
| write text with the model | `{program} generate {name}` |
| measure its loss | `{program} evaluate {name}` |
| see the curves in `{PAGE}` | `{program} report {name}` |
| prove the checkpoints whole | `{program} verify {name}` |
| hand the model on | `{program} export {name} --format hf --out DIR` |
| stop the run with its state saved | Ctrl-C, or `touch {shlex.quote(str(run / STOP))}` |
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
        f"| {change['step']:,} | `{words.replace('|', '/').replace('`', '')}` |\n"
        for change in changes
        for words in in_words(change)
    ]
    return (
        f"\n{_HEADING}\n\nThe run went on with a changed configuration:\n\n"
        "| after step | change |\n|---|---|\n" + "".join(rows)
    )
