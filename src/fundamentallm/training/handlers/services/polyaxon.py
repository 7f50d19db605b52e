"""Polyaxon, through its tracking client."""

from __future__ import annotations

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
    same_excepthook,
)


@HANDLERS.register("polyaxon")
class Polyaxon(ServiceLogger):
    """Observes: hands the run to Polyaxon, by default offline, to files below the run's directory.

    Polyaxon writes names with `__` for `/` (`train__loss`). It cannot delete: when a run goes back,
    a text says from when on later steps count, and they come a second time. The address and the
    token come from `polyaxon config` or its environment. The source of the program, what it prints
    and its machine are not stored.

    Args:
        run_dir: the run's directory; offline runs are below it.
        mode: "online" sends while the run trains, "offline" writes files to send later.
        project: the project's name.
        owner: the organization or user; None: the one of Polyaxon's own configuration.
        artifacts: checkpoints to upload: "best" or "last" at the end of the run, "all" as they are
            saved.
        flush_seconds: how long the end of a run waits; None: 10, and 600 with artifacts.
        call_seconds: how long a call may take before a warning says so.
    """

    target = "Polyaxon"
    package = short_name = "polyaxon"
    install = "'fundamentallm[polyaxon]'"

    def __init__(
        self,
        run_dir: Path | str,
        mode: Literal["offline", "online"] = "offline",
        project: str = "fundamentallm",
        owner: Annotated[str | None, Field(examples=["my-team"])] = None,
        artifacts: Artifacts = "none",
        flush_seconds: FlushSeconds = None,
        call_seconds: NonNegative = 60.0,
    ) -> None:
        super().__init__(run_dir, artifacts, flush_seconds, call_seconds)
        self.mode = mode
        self.project = project
        self.owner = owner
        self._there: Any = None

    def start(self, run: RunDescription, service_id: str | None) -> str:
        """Start or continue the run, and log its configuration as its inputs."""
        from polyaxon.tracking import Run

        offline = self.mode == "offline"
        with same_excepthook():
            self._there = Run(
                owner=self.owner or ("offline" if offline else None),
                project=self.project,
                name=run.name,
                run_uuid=service_id,
                is_new=True,  # also of a known run: else its end would flush nothing
                auto_create=service_id is None,
                is_offline=offline,
                artifacts_path=str(self.directory.resolve()) if offline else None,
                collect_artifacts=True,
                collect_resources=False,
                track_code=False,
                track_env=False,
                track_logs=False,
            )
        self._there.log_inputs(async_req=False, **run.settings())
        return str(self._there.run_uuid)

    def send(self, records: Sequence[Record]) -> None:
        """Log the numbers of each record in one call, then its text."""
        for record in records:
            numbers = dict(record.metrics)
            if record.kind == "train":
                numbers |= {"epoch": record.epoch, "tokens": record.tokens}
            if numbers:
                self._there.log_metrics(step=record.step, **numbers)
            if record.text:
                self._there.log_text(f"{record.kind}/text", record.text, step=record.step)

    def cut(self, step: int, evaluation_pending: bool) -> None:
        """Log that what was logged for later steps does not count."""
        self._there.log_text(
            "went_back_to", f"{step}, {now()}: earlier values of later steps do not count", step
        )

    def send_checkpoint(self, checkpoint: Path) -> None:
        """Copy the checkpoint's directory to the outputs of the run."""
        self._there.log_model(
            str(checkpoint), name=checkpoint.name, framework="fundamentallm", rel_path="checkpoints"
        )

    def finish(self) -> None:
        """End the run."""
        self._there.end()
