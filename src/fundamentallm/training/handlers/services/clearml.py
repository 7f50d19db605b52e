"""ClearML, through Ignite's `ClearMLLogger`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

from fundamentallm.config.base import NonNegative
from fundamentallm.training.handlers.base import HANDLERS
from fundamentallm.training.handlers.metrics_writer import Record
from fundamentallm.training.handlers.services.base import (
    Artifacts,
    FlushSeconds,
    RunDescription,
    ServiceLogger,
    now,
)

# What it would collect by itself from these and store, with the repository's uncommitted changes.
AUTOMATIC = (
    *("detect_repository", "pytorch", "matplotlib", "tensorflow", "tensorboard", "tfdefines"),
    *("xgboost", "scikit", "fastai", "lightgbm", "hydra", "joblib", "megengine", "catboost"),
    *("gradio", "jsonargparse"),
)


@HANDLERS.register("clearml")
class ClearML(ServiceLogger):
    """Observes: hands the run to ClearML, by default offline, for `Task.import_offline_session`.

    Offline, each process writes a session of its own. ClearML cannot delete: when a run goes back,
    a text says from when on later steps count, and they come a second time. The source of the
    program and what it prints are not stored. Its random seed is not used: the run has its own.
    Keys come from CLEARML_API_ACCESS_KEY and CLEARML_API_SECRET_KEY or from `clearml-init`.

    Args:
        run_dir: the run's directory; sessions are below it.
        mode: "online" sends while the run trains, "offline" writes files to send later.
        project: the project's name.
        artifacts: checkpoints to upload: "best" or "last" at the end of the run, "all" as they are
            saved.
        flush_seconds: how long the end of a run waits; None: 10, and 600 with artifacts.
        call_seconds: how long a call may take before a warning says so.
    """

    target = "ClearML"
    package = short_name = "clearml"

    def __init__(
        self,
        run_dir: Path | str,
        mode: Literal["offline", "online"] = "offline",
        project: str = "fundamentallm",
        artifacts: Artifacts = "none",
        flush_seconds: FlushSeconds = None,
        call_seconds: NonNegative = 60.0,
    ) -> None:
        super().__init__(run_dir, artifacts, flush_seconds, call_seconds)
        self.mode = mode
        self.project = project
        self._logger: Any = None

    def start(self, run: RunDescription, service_id: str | None) -> str:
        """Start or continue the task, and hand over its configuration."""
        from clearml import Task
        from ignite.handlers import ClearMLLogger

        offline = self.mode == "offline"
        ClearMLLogger.set_bypass_mode(offline)
        Task.set_random_seed(None)  # else Task.init seeds Python, NumPy and torch
        # Sessions without a server lie in this directory, which is read when the task is made.
        with self.files_here("CLEARML_CACHE_DIR") if offline else nullcontext():
            self._logger = ClearMLLogger(
                project_name=self.project,
                task_name=run.name,
                reuse_last_task_id=False,
                continue_last_task=service_id if not offline and service_id else False,
                auto_connect_arg_parser=False,
                auto_connect_frameworks=dict.fromkeys(AUTOMATIC, False),
                auto_resource_monitoring=False,
                auto_connect_streams=False,
            )
        task = self._logger.get_task()
        task.set_parameters(run.settings())
        task.connect_configuration(run.config, name="config")
        return str(task.id)

    def send(self, records: Sequence[Record]) -> None:
        """Report each number as a scalar, `train/loss` as the series loss of train; then texts."""
        for record in records:
            numbers = dict(record.metrics)
            if record.kind == "train":
                numbers |= {"epoch": record.epoch, "tokens": record.tokens}
            for name, number in numbers.items():
                title, _, series = name.partition("/")
                self._logger.report_scalar(title, series or title, number, record.step)
            if record.text:
                self._report(f"{record.kind}, step {record.step}: {record.text}")

    def cut(self, step: int, evaluation_pending: bool) -> None:
        """Report that what was reported for later steps does not count."""
        self._report(f"went_back_to {step}, {now()}: earlier values of later steps do not count")

    def send_checkpoint(self, checkpoint: Path) -> None:
        """Upload the files of the checkpoint, each as an artifact."""
        task = self._logger.get_task()
        for path in sorted(checkpoint.iterdir()):
            task.upload_artifact(f"{checkpoint.name}/{path.name}", path, wait_on_upload=True)

    def finish(self) -> None:
        """End the task."""
        self._logger.close()

    def _report(self, text: str) -> None:
        self._logger.report_text(text, print_console=False)
