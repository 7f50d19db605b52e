"""A file of JSON records, one per line, that stays consistent over resumes and rollbacks."""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fundamentallm.errors import CheckpointError
from fundamentallm.files.filesystem import Filesystem, replace_file
from fundamentallm.files.private import open_to_append, open_to_read

logger = logging.getLogger(__name__)

# ASCII, because some readers take characters like U+2028 for the end of a line.
_ENCODER = json.JSONEncoder(allow_nan=False)


class JsonLines:
    """Records that each have a `step`.

    If the file cannot be written, a warning is logged once and training continues.

    Args:
        path: the file; the first record creates it.
        of_evaluation: returns whether a record is from an evaluation after its step.
    """

    def __init__(self, path: Path, of_evaluation: Callable[[Mapping[str, Any]], bool]) -> None:
        self.path = path
        self._of_evaluation = of_evaluation
        self._failed = False

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a record."""
        line = (_ENCODER.encode(record) + "\n").encode()
        try:
            # Opened for each line, so that a line reaches the system at once, and writing works
            # again after the file was moved or the disk was full. Unbuffered, a line takes half
            # the time.
            with open_to_append(self.path) as file:
                end = file.tell()
                if file.write(line) != len(line):
                    file.truncate(end)  # or the next line would be appended to a partial one
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except (OSError, CheckpointError) as error:
            self._give_up(error)

    def cut_back(self, step: int, evaluation_pending: bool) -> None:
        """Drop what the run no longer knows of, and a line that a killed process left torn.

        Args:
            step: the run's step; records of later ones go.
            evaluation_pending: whether the evaluation after `step` is still to run, so that its
                records go as well.
        """
        try:
            with open_to_read(self.path) as file:
                lines = file.readall().decode(errors="replace").splitlines(True)
            kept = [line for line in lines if self._is_kept(line, step, evaluation_pending)]
            if kept != lines:
                replace_file(Filesystem(), self.path, ["".join(kept).encode()])
        except FileNotFoundError:
            return
        except (OSError, CheckpointError) as error:
            self._give_up(error)

    def _is_kept(self, line: str, step: int, evaluation_pending: bool) -> bool:
        try:
            record = json.loads(line)
            later = record["step"] > step
            repeated = record["step"] == step and evaluation_pending
        except (ValueError, KeyError, TypeError):
            return False
        if later or not line.endswith("\n"):
            return False
        return not (repeated and self._of_evaluation(record))

    def _give_up(self, error: Exception) -> None:
        if not self._failed:
            logger.warning("%s cannot be written, training goes on: %s", self.path.name, error)
        self._failed = True
