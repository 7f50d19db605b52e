"""What became of checkpoints after they were committed: scores.jsonl beside them.

A checkpoint is written before the evaluation of its step and never changed afterwards. What the
evaluation measured, and whether it ended the run, stands in a line of scores.jsonl (`Scores`)
beside the checkpoints: `step`, `manifest` (the hash of the checkpoint's manifest), `measured`,
`val_loss` and `perplexity` (null where not finite), and `finished`. A line counts for the very
checkpoint that has this hash, so one that is left over from another course of the run says nothing.
"""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fundamentallm.errors import CheckpointError
from fundamentallm.files.filesystem import (
    Filesystem,
    read_chunks,
    reading_from,
    replace_file,
    saving_to,
)
from fundamentallm.files.run_layout import SCORES
from fundamentallm.training.checkpoint.manifest import Manifest

AWAITS_EVALUATION = "awaits_evaluation"  # in the metadata of a checkpoint
MAX_SCORES_BYTES = 64 << 20
FOR_A_STOP = "for_a_stop"  # in the metadata of a checkpoint that no schedule asked for


@dataclass(frozen=True)
class Score:
    """What was found out about a checkpoint after it was committed.

    Attributes:
        step: of the checkpoint.
        manifest: the hash of its manifest.
        measured: whether its evaluation is complete.
        val_loss: in nats per token; None where it is not finite or was not measured.
        perplexity: the same of exp(val_loss).
        finished: why the run ended at this step; empty if it did not.
    """

    step: int
    manifest: str
    measured: bool
    val_loss: float | None = None
    perplexity: float | None = None
    finished: str = ""


class Scores:
    """The scores of the checkpoints in one directory.

    Args:
        directory: of the checkpoints.
        filesystem: the disk operations.
    """

    def __init__(self, directory: Path, filesystem: Filesystem | None = None) -> None:
        self.path = directory / SCORES
        self.filesystem = filesystem or Filesystem()

    def all(self) -> list[Score]:
        """Return every score, in the order of the file.

        Raises:
            CheckpointError: it is no regular file, is too large, or cannot be read.
        """
        with reading_from(self.path):
            status = self.filesystem.status(self.path)
            if status is None:
                return []
            if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_SCORES_BYTES:
                raise CheckpointError(
                    "this is no file of scores",
                    where=str(self.path),
                    got=f"{status.st_size:,} bytes",
                    expected=f"a regular file of at most {MAX_SCORES_BYTES:,} bytes",
                    fix="move it away; evaluations that it told of run again",
                )
            text = b"".join(read_chunks(self.filesystem, self.path))
        lines = (_parsed(line) for line in text.splitlines())
        return [score for score in lines if score is not None]

    def of(self, manifest: Manifest) -> Score | None:
        """Return the score of a checkpoint, None if there is none."""
        return next((score for score in self.all() if score.manifest == manifest.hash), None)

    def val_loss(self, manifest: Manifest) -> float | None:
        """Return the validation loss of a checkpoint in nats per token, None without one."""
        if not manifest.metadata.get(AWAITS_EVALUATION):
            return manifest.metadata.get("val_loss")
        score = self.of(manifest)
        return score.val_loss if score is not None else None

    def end_of(self, manifest: Manifest) -> str:
        """Return why the run is complete with a checkpoint; empty if it is not.

        It is not where the last evaluation is still to be made.
        """
        score = self.of(manifest)
        if score is not None and score.finished:
            return score.finished
        if manifest.metadata.get(AWAITS_EVALUATION):
            return ""
        return str(manifest.metadata.get("finished", ""))

    def end_due_at(self, manifest: Manifest) -> str:
        """Return why the run was to end with a checkpoint whose evaluation is still to be made."""
        if not manifest.metadata.get(AWAITS_EVALUATION) or self.of(manifest) is not None:
            return ""
        return str(manifest.metadata.get("finished", ""))

    def put(self, score: Score) -> None:
        """Write a score durably, in place of that of the same step.

        Raises:
            CheckpointError: the disk refuses; the file is as it was.
        """
        self._write([*(known for known in self.all() if known.step != score.step), score])

    def cut_back(self, step: int) -> None:
        """Forget the scores of later steps.

        Raises:
            CheckpointError: as `put`.
        """
        known = self.all()
        if any(score.step > step for score in known):
            self._write(score for score in known if score.step <= step)

    def _write(self, scores: Iterable[Score]) -> None:
        lines = [json.dumps(asdict(score), allow_nan=False) + "\n" for score in scores]
        with saving_to(self.path):
            replace_file(self.filesystem, self.path, ["".join(lines).encode()])


def finite(value: float) -> float | None:
    """Return the number, None if it is not finite."""
    return value if math.isfinite(value) else None


def _parsed(line: bytes) -> Score | None:
    """Return the score in a line; a line that holds none says nothing."""
    try:
        fields: Any = json.loads(line)
        score = Score(**fields)
    except (ValueError, TypeError, RecursionError):
        return None
    kinds = (int, str, bool, float | None, float | None, str)
    values = (getattr(score, name) for name in Score.__dataclass_fields__)
    fits = all(isinstance(value, kind) for value, kind in zip(values, kinds, strict=True))
    return score if fits else None
