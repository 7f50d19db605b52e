"""What became of checkpoints after they were committed: scores.jsonl beside them.

A checkpoint is written before the evaluation of its step and never changed afterwards. What the
evaluation measured, and whether the run ended there, stands in a line of scores.jsonl: `step`,
`manifest` (the hash of the checkpoint's manifest), `measured`, `val_loss` and `perplexity` (null
where not finite), `finished`, and where they say something `due`, `went_on`, `metric` and `value`
(`Score`). The last line of a step counts, and only for the checkpoint that has this hash: a line
that is left over from another course of the run says nothing.
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
    append_line,
    read_chunks,
    reading_from,
    replace_file,
    saving_to,
)
from fundamentallm.files.run_layout import SCORES
from fundamentallm.training.checkpoint.manifest import Manifest
from fundamentallm.training.checkpoint.store import step_name

AWAITS_EVALUATION = "awaits_evaluation"  # in the metadata of a checkpoint
FOR_A_STOP = "for_a_stop"  # in the metadata of a checkpoint that no schedule asked for
MAX_SCORES_BYTES = 64 << 20
PRUNE_BYTES = 256 << 10  # about 1,700 scores


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
        due: why the run is to end at this step, once what belongs to it is done.
        went_on: whether the run ended at this step and was then told to continue.
        metric: what decides which checkpoint is the best; empty: the validation loss.
        value: of that metric; None where it is not finite or was not measured.
    """

    step: int
    manifest: str
    measured: bool
    val_loss: float | None = None
    perplexity: float | None = None
    finished: str = ""
    due: str = ""
    went_on: bool = False
    metric: str = ""
    value: float | None = None

    @property
    def is_of_an_end(self) -> bool:
        """Whether the run ended at this step, is to end there, or ended there before."""
        return bool(self.finished or self.due) or self.went_on


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
        """Return the score of each step, in the order in which they were written.

        Raises:
            CheckpointError: the file is not regular, is too large, or cannot be read.
        """
        with reading_from(self.path):
            status = self.filesystem.status(self.path)
            if status is None:
                return []
            if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_SCORES_BYTES:
                raise CheckpointError(
                    "this is not a file of scores",
                    where=str(self.path),
                    got=f"{status.st_size:,} bytes",
                    expected=f"a regular file of at most {MAX_SCORES_BYTES:,} bytes",
                    fix="move it away; the evaluations in it are then repeated",
                )
            text = b"".join(read_chunks(self.filesystem, self.path))
        scores: dict[int, Score] = {}
        for line in text.splitlines(keepends=True):
            if (score := _parsed(line)) is not None:
                scores.pop(score.step, None)
                scores[score.step] = score
        return list(scores.values())

    def of(self, manifest: Manifest) -> Score | None:
        """Return the score of a checkpoint, None if there is none."""
        return self.of_hash(manifest.hash)

    def of_hash(self, manifest: str) -> Score | None:
        """Return the score of the checkpoint whose manifest has this hash, None without one."""
        return next((score for score in self.all() if score.manifest == manifest), None)

    def val_loss(self, manifest: Manifest) -> float | None:
        """Return the validation loss of a checkpoint in nats per token, None without one."""
        score = self.of(manifest)
        if score is not None and score.measured:
            return score.val_loss
        awaits = manifest.metadata.get(AWAITS_EVALUATION)
        return None if awaits else manifest.metadata.get("val_loss")

    def end_of(self, manifest: Manifest) -> str:
        """Return why the run is complete with a checkpoint; empty if it is not.

        It is not where the last evaluation is still to be made, or where the run was told to
        continue.
        """
        score = self.of(manifest)
        if score is not None and score.is_of_an_end:
            return score.finished
        if manifest.metadata.get(AWAITS_EVALUATION):
            return ""
        return str(manifest.metadata.get("finished", ""))

    def end_due_at(self, manifest: Manifest) -> str:
        """Return why the run is to end with a checkpoint, where that is not completed."""
        score = self.of(manifest)
        if score is not None:
            return score.due
        if not manifest.metadata.get(AWAITS_EVALUATION):
            return ""
        return str(manifest.metadata.get("finished", ""))

    def has_ended_at(self, manifest: Manifest) -> bool:
        """Return whether the run has ended with a checkpoint, also if it was told to continue."""
        score = self.of(manifest)
        return bool(self.end_of(manifest)) or (score is not None and score.went_on)

    def put(self, score: Score) -> None:
        """Append a score durably; it counts in place of an earlier one of its step.

        A file that has grown large loses the scores of checkpoints that no longer exist.

        Raises:
            CheckpointError: the disk refuses; the scores are as before.
        """
        with saving_to(self.path):
            status = self.filesystem.status(self.path)
            if status is not None and status.st_size < PRUNE_BYTES:
                append_line(self.filesystem, self.path, _line(score))
                return
        self._write([*(known for known in self.all() if self._has_checkpoint(known)), score])

    def cut_back(self, step: int) -> None:
        """Remove the scores of later steps.

        Raises:
            CheckpointError: as `put`.
        """
        known = self.all()
        if any(score.step > step for score in known):
            self._write(score for score in known if score.step <= step)

    def _has_checkpoint(self, score: Score) -> bool:
        return self.filesystem.status(self.path.with_name(step_name(score.step))) is not None

    def _write(self, scores: Iterable[Score]) -> None:
        with saving_to(self.path):
            replace_file(self.filesystem, self.path, [b"".join(map(_line, scores))])


def finite(value: float) -> float | None:
    """Return the number, None if it is not finite."""
    return value if math.isfinite(value) else None


def _line(score: Score) -> bytes:
    fields = asdict(score)
    for name, nothing in (("due", ""), ("went_on", False), ("metric", ""), ("value", None)):
        if fields[name] == nothing:
            del fields[name]
    return (json.dumps(fields, allow_nan=False) + "\n").encode()


def _parsed(line: bytes) -> Score | None:
    """Return the score in a line; None for a torn or foreign one."""
    try:
        fields: Any = json.loads(line)
        score = Score(**fields)
    except (ValueError, TypeError, RecursionError):
        return None
    kinds = (int, str, bool, float | None, float | None, str, str, bool, str, float | None)
    values = (getattr(score, name) for name in Score.__dataclass_fields__)
    fits = all(isinstance(value, kind) for value, kind in zip(values, kinds, strict=True))
    return score if fits and line.endswith(b"\n") else None
