"""Every name in a run's directory, and what RUN_OR_CHECKPOINT means.

runs/mine/
  config.yaml             resolved
  metrics.jsonl, samples.jsonl, log.txt, tensorboard/
  corpus.txt              the text of a built-in source; of one in a mixture: corpus-NAME.txt
  checkpoints/            or another directory, by training.checkpoint_dir
    step-00000200/        MANIFEST.json, model.safetensors, state.safetensors, state.json
    best, last            pointer files: the name of a checkpoint
    scores.jsonl          what evaluations said of checkpoints, a line each
    superseded/, corrupt/
  incidents/00000137-data/    report.json, evidence/
  stacks-rank-0.txt       of each rank that ended because one stood still: where its threads were
  .lock                   held by the process that trains
  STOP                    made by the user to end the run
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fundamentallm.errors import CheckpointError
from fundamentallm.files.private import check_directory, check_file

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
LOG = "log.txt"
TENSORBOARD = "tensorboard"
CORPUS = "corpus.txt"
INCIDENTS = "incidents"
LOCK = ".lock"
STOP = "STOP"

MANIFEST = "MANIFEST.json"
MODEL = "model.safetensors"
STATE_TENSORS = "state.safetensors"
STATE = "state.json"
BEST = "best"
LAST = "last"
SCORES = "scores.jsonl"
SUPERSEDED = "superseded"
CORRUPT = "corrupt"

REPORT = "report.json"
EVIDENCE = "evidence"

BEFORE_A_CHECKPOINT = frozenset({CONFIG, LOG, METRICS, TENSORBOARD, LOCK})
"""What a run has written that ended before its first checkpoint, beside `corpus*.txt`
and `stacks-rank-*.txt`."""


def corpus_of(source: str) -> str:
    """Return the name of the file with the text of a built-in source in a mixture."""
    return f"corpus-{source}.txt"


def stacks_of(rank: int) -> str:
    """Return the name of the file with the stacks of a rank."""
    return f"stacks-rank-{rank}.txt"


def check_entries(run: Path, checkpoints: Path) -> None:
    """Refuse a run whose files are something else, before anything is read or written there.

    Args:
        run: its directory, which need not exist; it may be a link itself, for the user named it.
        checkpoints: where its checkpoints lie. At a place of its own that may be a link too.

    Raises:
        CheckpointError: a file is a link, a pipe, a device or a directory, or a directory is a
            link; the message says how to go on.
    """
    for name in (CONFIG, METRICS, SAMPLES, LOG, LOCK, STOP):
        check_file(run / name)
    for pattern in ("corpus*.txt", "stacks-rank-*.txt"):
        for path in run.glob(pattern):
            check_file(path)
    for name in (TENSORBOARD, INCIDENTS):
        check_directory(run / name)
    if checkpoints.is_relative_to(run):
        for path in reversed((checkpoints, *checkpoints.parents)):
            if path != run and path.is_relative_to(run):
                check_directory(path, f"rm {path}, then set training.checkpoint_dir={{target}}")
    for name in (SUPERSEDED, CORRUPT):
        check_directory(checkpoints / name)


@dataclass(frozen=True)
class RunOrCheckpoint:
    """What a RUN_OR_CHECKPOINT names: a run, a checkpoint in it, or a pointer to one.

    Attributes:
        checkpoints: the directory in which the checkpoints lie.
        checkpoint: the name of the one that is meant; empty for a run or a pointer.
        pointer: "best" or "last", where such a file is meant.
    """

    checkpoints: Path
    checkpoint: str = ""
    pointer: str = ""

    @property
    def is_run(self) -> bool:
        """Whether it is a run, of which any checkpoint may be meant."""
        return not (self.checkpoint or self.pointer)

    @classmethod
    def parse(cls, path: Path, checkpoints_in: Callable[[Path], Path]) -> RunOrCheckpoint:
        """Find out what a path names; no file is opened.

        Args:
            path: a run's directory, a checkpoint's directory, or a pointer file.
            checkpoints_in: returns where a run keeps its checkpoints.

        Raises:
            CheckpointError: there is nothing, or something that is none of the three.
        """
        if path.suffix in (".pt", ".pth", ".ckpt", ".bin"):
            raise CheckpointError(
                "files that torch.save wrote are not opened here, for they can run code",
                where=str(path),
                fix="name the run or its checkpoint directory; CheckpointManager.load in Python"
                " reads a .pt of this package",
            )
        if path.is_file() and path.name in (BEST, LAST):
            return cls(path.parent, pointer=path.name)
        if not path.is_dir():
            raise CheckpointError(
                "there is no run or checkpoint here",
                where=str(path),
                fix="name a directory like runs/quickstart or runs/quickstart/checkpoints/best",
            )
        if (path / MANIFEST).exists():
            return cls(path.parent, path.name)
        return cls(checkpoints_in(path))
