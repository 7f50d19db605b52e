"""Neptune, through the client for servers of version 2 (`neptune`)."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from fundamentallm.config.base import NonNegative
from fundamentallm.training.handlers.base import HANDLERS
from fundamentallm.training.handlers.metrics_writer import Record
from fundamentallm.training.handlers.services.base import (
    Artifacts,
    FlushSeconds,
    RunDescription,
    ServiceLogger,
    now,
    row_of,
    same_excepthook,
)

COURSE = "course"  # a field of the run, and so is each value of the next
LAST: dict[str, str] = {"train": "last_step", "val": "last_evaluation"}


@HANDLERS.register("neptune")
class Neptune(ServiceLogger):
    """Observes: hands the run to Neptune, by default offline, for `neptune sync`.

    Neptune takes only growing steps in a series, and deletes a series only as a whole. When a run
    goes back before steps that it has, its series go on below `courses/N/`, N from 2; `course` is
    the N that counts from then on. Numbers that are not finite are left out, as Neptune takes none.
    Offline, each process writes a run of its own. The token comes from NEPTUNE_API_TOKEN, never
    from a configuration. The source of the program, what it prints and its machine are not stored.

    Args:
        run_dir: the run's directory; offline runs are below it.
        mode: "online" sends while the run trains, "offline" writes files to send later.
        project: "workspace/project"; None: that of NEPTUNE_PROJECT. Not used offline.
        artifacts: checkpoints to upload: "best" or "last" at the end of the run, "all" as they are
            saved.
        flush_seconds: how long the end of a run waits; None: 10, and 600 with artifacts.
        call_seconds: how long a call may take before a warning says so.
    """

    target = "Neptune"
    package = short_name = "neptune"
    install = "'fundamentallm[neptune]'"

    def __init__(
        self,
        run_dir: Path | str,
        mode: Literal["offline", "online"] = "offline",
        project: Annotated[str | None, Field(examples=["my-workspace/my-project"])] = None,
        artifacts: Artifacts = "none",
        flush_seconds: FlushSeconds = None,
        call_seconds: NonNegative = 60.0,
    ) -> None:
        super().__init__(run_dir, artifacts, flush_seconds, call_seconds)
        self.mode = mode
        self.project = project
        self._there: Any = None
        self._course, self._last = 1, dict.fromkeys(LAST, 0)

    def start(self, run: RunDescription, service_id: str | None) -> str:
        """Start the run, or continue the one of this id; log its configuration."""
        import neptune

        logging.getLogger("neptune").setLevel(logging.ERROR)  # it prints
        # The name is the one in which `neptune sync` looks.
        with self.files_here("NEPTUNE_DATA_DIRECTORY", below=".neptune"), same_excepthook():
            self._there = neptune.init_run(
                project=self.project,
                custom_run_id=run.run_id,
                mode="offline" if self.mode == "offline" else "async",
                name=run.name,
                source_files=[],
                git_ref=False,
                capture_stdout=False,
                capture_stderr=False,
                capture_hardware_metrics=False,
                capture_traceback=False,
            )
        self._course, self._last = 1, dict.fromkeys(LAST, 0)
        if service_id is not None and self.mode == "online":
            if self._there.exists(COURSE):
                self._course = int(self._there[COURSE].fetch())
            for kind, name in LAST.items():
                if self._there.exists(name):
                    self._last[kind] = int(self._there[name].fetch())
        for key, value in run.settings().items():
            self._there[f"config/{key}"] = value if isinstance(value, (int, float)) else str(value)
        return run.run_id

    def send(self, records: Sequence[Record]) -> None:
        """Append each number to its series; texts, several of which may be of a step, to theirs."""
        for record in records:
            if record.text:
                self._append(record.kind, f"step {record.step}: {record.text}")
            if record.kind not in LAST:
                continue  # the count is the length of the texts
            if record.step <= self._last[record.kind]:
                continue  # an evaluation that was made again, to the same numbers
            for name, number in row_of(record).items():
                if math.isfinite(number):
                    self._append(name, number, step=record.step)
            self._last[record.kind] = record.step
        for kind, step in self._last.items():
            self._there[LAST[kind]] = step

    def cut(self, step: int, evaluation_pending: bool) -> None:
        """Let the series go on under another name, if there are later records."""
        if max(self._last.values()) > step:
            self._course, self._last = self._course + 1, dict.fromkeys(LAST, 0)
            self._there[COURSE] = self._course
            self._append("went_back_to", f"step {step}, {now()}")

    def _append(self, name: str, value: float | str, **step: int) -> None:
        path = name if self._course == 1 else f"{COURSE}s/{self._course}/{name}"
        self._there[path].append(value, **step)

    def send_checkpoint(self, checkpoint: Path) -> None:
        """Upload the files of the checkpoint, each as a field."""
        from neptune.types import File

        for path in sorted(checkpoint.iterdir()):
            with path.open("rb") as file:  # copied at once: a path would be read when it is sent
                field = self._there[f"checkpoints/{checkpoint.name}/{path.name}"]
                field.upload(File.from_stream(file, extension=path.suffix.removeprefix(".")))

    def finish(self) -> None:
        """Send what waits, and end the run."""
        self._there.stop()
