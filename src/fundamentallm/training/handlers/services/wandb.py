"""Weights & Biases, through Ignite's `WandBLogger`."""

from __future__ import annotations

import os
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
)


@HANDLERS.register("wandb")
class WandB(ServiceLogger):
    """Observes: hands the run to Weights & Biases, by default offline, for `wandb sync`.

    The column `step` is the step; W&B's own counter only grows. W&B cannot delete rows: when a run
    goes back, `went_back_to` is a column of the next row, and steps after it come a second time.
    The key comes from WANDB_API_KEY or `wandb login`, never from a configuration.

    Args:
        run_dir: the run's directory; the files of W&B are below it.
        mode: "online" sends while the run trains, "offline" writes files to send later.
        project: the project's name.
        entity: the user or team; None: the key's own.
        artifacts: checkpoints to upload: "best" or "last" at the end of the run, "all" as they are
            saved.
        flush_seconds: how long the end of a run waits; None: 10, and 600 with artifacts.
        call_seconds: how long a call may take before a warning says so.
    """

    target = "Weights & Biases"
    package = short_name = "wandb"

    def __init__(
        self,
        run_dir: Path | str,
        mode: Literal["offline", "online"] = "offline",
        project: str = "fundamentallm",
        entity: Annotated[str | None, Field(examples=["my-team"])] = None,
        artifacts: Artifacts = "none",
        flush_seconds: FlushSeconds = None,
        call_seconds: NonNegative = 60.0,
    ) -> None:
        super().__init__(run_dir, artifacts, flush_seconds, call_seconds)
        self.mode = mode
        self.project = project
        self.entity = entity
        self._logger: Any = None

    def start(self, run: RunDescription, service_id: str | None) -> str:
        """Start or continue the run; its files, copies of artifacts too, lie below the run's."""
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read by its second process
        import wandb
        from ignite.handlers import WandBLogger

        quiet = wandb.Settings(
            console="off",
            silent=True,
            disable_git=True,
            disable_code=True,
            x_disable_meta=True,  # it would hold the command line
            x_save_requirements=False,
            finish_timeout=self.flush_seconds,
        )
        self._logger = WandBLogger(
            project=self.project,
            entity=self.entity,
            name=run.name,
            id=service_id or run.run_id,
            resume="allow" if self.mode == "online" else None,
            mode=self.mode,
            dir=str(self.directory.resolve()),  # its process may have another working directory
            config=run.config,
            settings=quiet,
        )
        self._logger.define_metric("*", step_metric="step")
        return str(self._logger.run.id)

    def send(self, records: Sequence[Record]) -> None:
        """Log a row for each record."""
        for record in records:
            self._logger.log({"step": record.step, **row_of(record)})

    def cut(self, step: int, evaluation_pending: bool) -> None:
        """Mark that rows of later steps before this one do not count."""
        self._logger.log({"step": step, "went_back_to": step, "went_back_at": now()})

    def send_checkpoint(self, checkpoint: Path) -> None:
        """Log the checkpoint's directory as an artifact of type model."""
        run = self._logger.run
        artifact = self._logger.Artifact(f"{run.id}-{checkpoint.name}", type="model")
        with self.files_here("WANDB_DATA_DIR"):  # read at each artifact; else the home directory
            artifact.add_dir(str(checkpoint))
            self._logger.log_artifact(artifact)

    def finish(self) -> None:
        """End the run."""
        self._logger.close()
