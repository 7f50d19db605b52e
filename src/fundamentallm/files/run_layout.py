"""All file names of a run directory, and the parser of RUN_OR_CHECKPOINT.

runs/mine/
  README.md               what the files are, and the commands for them
  config.yaml             resolved
  metrics.jsonl, samples.jsonl, usage.jsonl, log.txt, tensorboard/
  corpus.txt              the text of a built-in source; in a mixture: corpus-NAME.txt
  checkpoints/            or training.checkpoint_dir
    step-00000200/        MANIFEST.json, model.safetensors, state.safetensors, state.json
    best, last            pointer files, each with the name of a checkpoint
    scores.jsonl          results of evaluations, one checkpoint per line
    superseded/, corrupt/
  loggers/                the stores of services (MLflow, W&B, ...) and the ids of the run there
  incidents/00000137-data/    report.json, evidence/
  report.html             written by the command `report`
  stacks-rank-0.txt       stack traces of a rank that ended because a rank stalled
  .lock                   locked by the process that trains
  STOP                    created by the user to end the run
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fundamentallm.errors import CheckpointError, did_you_mean
from fundamentallm.files.private import check_directory, check_file

RUNS = Path("runs")
"""Where a run is that got no directory of its own."""

README = "README.md"
CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
USAGE = "usage.jsonl"
LOG = "log.txt"
PAGE = "report.html"
TENSORBOARD = "tensorboard"
LOGGERS = "loggers"
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

BEFORE_A_CHECKPOINT = frozenset(
    {README, CONFIG, LOG, METRICS, USAGE, PAGE, TENSORBOARD, LOGGERS, LOCK}
)
"""Files that a run may have before its first checkpoint, besides `corpus*.txt` and
`stacks-rank-*.txt`."""


def corpus_of(source: str) -> str:
    """Return the name of the file for the text of a built-in source in a mixture."""
    return f"corpus-{source}.txt"


def stacks_of(rank: int) -> str:
    """Return the name of the file for the stack traces of a rank."""
    return f"stacks-rank-{rank}.txt"


def check_entries(run: Path, checkpoints: Path) -> None:
    """Check the types of a run's files before anything is read or written there.

    Args:
        run: the run directory, which need not exist. It may be a link, because the user named it.
        checkpoints: the checkpoint directory. It may be a link if it lies outside the run.

    Raises:
        CheckpointError: a file is a link, a pipe, a device or a directory, or a directory is a
            link; the message tells what to do.
    """
    for name in (README, CONFIG, METRICS, SAMPLES, USAGE, LOG, LOCK, STOP):
        check_file(run / name)
    for pattern in ("corpus*.txt", "stacks-rank-*.txt"):
        for path in run.glob(pattern):
            check_file(path)
    for name in (TENSORBOARD, LOGGERS, INCIDENTS):
        check_directory(run / name)
    if checkpoints.is_relative_to(run):
        for path in reversed((checkpoints, *checkpoints.parents)):
            if path != run and path.is_relative_to(run):
                check_directory(path, f"rm {path}, then set training.checkpoint_dir={{target}}")
    for name in (SUPERSEDED, CORRUPT):
        check_directory(checkpoints / name)


@dataclass(frozen=True)
class RunOrCheckpoint:
    """A parsed RUN_OR_CHECKPOINT: a run, one of its checkpoints, or a pointer to one.

    Attributes:
        checkpoints: the directory of the checkpoints.
        checkpoint: name of the checkpoint; empty for a run or a pointer.
        pointer: "best" or "last"; empty for a run or a checkpoint.
    """

    checkpoints: Path
    checkpoint: str = ""
    pointer: str = ""

    @property
    def is_run(self) -> bool:
        """Whether it is a run, not one of its checkpoints."""
        return not (self.checkpoint or self.pointer)

    @classmethod
    def parse(cls, path: Path, checkpoints_in: Callable[[Path], Path]) -> RunOrCheckpoint:
        """Parse a path; no file is opened.

        Args:
            path: a run's directory, a checkpoint's directory, or a pointer file.
            checkpoints_in: returns the checkpoint directory of a run.

        Raises:
            CheckpointError: the path does not exist, or is none of these.
        """
        if path.suffix in (".pt", ".pth", ".ckpt", ".bin"):
            raise CheckpointError(
                "files written by torch.save are not opened here, since they can run code",
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
                fix=_nearest(path)
                or "name a directory like runs/quickstart or runs/quickstart/checkpoints/best",
            )
        if (path / MANIFEST).exists():
            return cls(path.parent, path.name)
        return cls(checkpoints_in(path))


def no_checkpoint(path: Path) -> CheckpointError:
    """Return the error for a RUN_OR_CHECKPOINT that holds no checkpoint."""
    return CheckpointError(
        "there is no checkpoint here",
        where=str(path),
        fix="name a run directory like runs/quickstart",
    )


def starting_path(text: str) -> Path:
    """Return the path that `model.init_from` means.

    A name without slashes that is no path here is that of a run below `runs/`.
    """
    path = Path(text)
    with contextlib.suppress(RuntimeError):  # "~models" looks like the home of a user
        path = path.expanduser()
    return RUNS / path if not path.exists() and len(path.parts) == 1 else path


def no_start(text: str | Path) -> CheckpointError:
    """Return the error for a `model.init_from` that leads nowhere."""
    return CheckpointError(
        "there is no such folder to start from",
        where=str(text),
        expected=f"a folder with config.json and {MODEL}, or a run",
        fix=_nearest(Path(text)) or "download the model first; model.init_from names its folder",
    )


def no_incident(report: Path, got: object) -> CheckpointError:
    """Return the error for a folder whose report is not that of an incident."""
    return CheckpointError(
        "this is not the directory of an incident",
        where=str(report),
        got=str(got),
        fix="name a directory like runs/mine/incidents/00000137-data",
    )


def _nearest(path: Path) -> str:
    """Return `did you mean 'runs/mine'?` for the run below `runs/` or the nearest name."""
    if not path.is_absolute() and (RUNS / path).is_dir():
        return f"did you mean '{RUNS / path}'?"
    near = []
    for folder in (path.parent, RUNS):
        with contextlib.suppress(OSError):
            near += [str(entry) for entry in folder.iterdir() if entry.is_dir()]
    return did_you_mean(str(path), near)
