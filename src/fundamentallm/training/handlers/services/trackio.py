"""trackio, Hugging Face's local tracker."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

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
    refuse_secrets,
    row_of,
)


@HANDLERS.register("trackio")
class Trackio(ServiceLogger):
    """Observes: hands the run to trackio, by default to its local database (`trackio show`).

    The database lies where trackio keeps all projects; TRACKIO_DIR is another place. There, rows
    of later steps are deleted when a run goes back. A Space or server keeps them, and the next row
    says `went_back_to`.

    Args:
        run_dir: the run's directory.
        project: the project's name.
        space_id: a Space of Hugging Face to log to.
        server_url: a server of your own to log to.
        artifacts: checkpoints to upload: "best" or "last" at the end of the run, "all" as they are
            saved.
        flush_seconds: how long the end of a run waits; None: 10, and 600 with artifacts.
        call_seconds: how long a call may take before a warning says so.

    Raises:
        ValueError: the address holds a token.
    """

    target = "trackio"
    package = short_name = "trackio"

    def __init__(
        self,
        run_dir: Path | str,
        project: str = "fundamentallm",
        space_id: Annotated[str | None, Field(examples=["me/my-space"])] = None,
        server_url: Annotated[str | None, Field(examples=["http://localhost:7860"])] = None,
        artifacts: Artifacts = "none",
        flush_seconds: FlushSeconds = None,
        call_seconds: NonNegative = 60.0,
    ) -> None:
        refuse_secrets("server_url", server_url, "TRACKIO_WRITE_TOKEN")
        super().__init__(run_dir, artifacts, flush_seconds, call_seconds)
        self.project = project
        self.space_id = space_id
        self.server_url = server_url
        self._run_there: Any = None

    def start(self, run: RunDescription, service_id: str | None) -> str:
        """Start or continue the run; its name there is unique, and says which run it is."""
        import trackio

        name = service_id or f"{run.name}-{run.run_id[:8]}"
        self._run_there = trackio.init(
            project=self.project,
            name=name,
            space_id=self.space_id,
            server_url=self.server_url,
            config=run.config,
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        return name

    def send(self, records: Sequence[Record]) -> None:
        """Log a row for each record."""
        for record in records:
            self._run_there.log(row_of(record), step=record.step)

    def cut(self, step: int, evaluation_pending: bool) -> None:
        """Delete the rows of later steps from the local database; mark them elsewhere."""
        if self._run_there._is_local:
            from trackio.sqlite_storage import SQLiteStorage

            run = self._run_there
            self.close()  # which writes the rows that it still holds
            with (
                closing(sqlite3.connect(SQLiteStorage.get_project_db_path(self.project))) as base,
                base,
            ):
                base.execute("DELETE FROM metrics WHERE run_id = ? AND step > ?", (run.id, step))
                if evaluation_pending:
                    base.execute(
                        "DELETE FROM metrics WHERE run_id = ? AND step = ? "
                        "AND CAST(metrics AS TEXT) LIKE '%\"val/loss\"%'",
                        (run.id, step),
                    )
        else:
            self._run_there.log({"went_back_to": step, "went_back_at": now()}, step=step)

    def send_checkpoint(self, checkpoint: Path) -> None:
        """Log the checkpoint's directory as an artifact of type model."""
        import trackio

        trackio.log_artifact(str(checkpoint), name=checkpoint.name, type="model")

    def finish(self) -> None:
        """End the run."""
        import trackio

        trackio.finish()
