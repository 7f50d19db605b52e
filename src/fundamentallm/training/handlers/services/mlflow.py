"""MLflow, through Ignite's `MLflowLogger`."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
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
)

MAX_METRICS, MAX_PARAMETERS, MAX_LENGTH = 1000, 100, 5000  # of one call; of a value


@HANDLERS.register("mlflow")
class MLflow(ServiceLogger):
    """Observes: hands the run to MLflow, by default to a SQLite store in the run's directory.

    Parameters are the configuration at the start, `config.json` is the newest one. Samples are
    text artifacts; incidents and rollbacks are tags and counts. MLflow cannot delete metrics: when
    a run goes back, the steps are logged a second time, and a tag says from when on they count.

    Args:
        run_dir: the run's directory.
        tracking_uri: a server or store; None: that of MLFLOW_TRACKING_URI, else the local store.
        experiment: the experiment's name.
        artifacts: checkpoints to upload: "best" or "last" at the end of the run, "all" as they are
            saved.
        flush_seconds: how long the end of a run waits; None: 10, and 600 with artifacts.
        call_seconds: how long a call may take before a warning says so.

    Raises:
        ValueError: the address holds a login.
    """

    target = "MLflow"
    package = short_name = "mlflow"

    def __init__(
        self,
        run_dir: Path | str,
        tracking_uri: Annotated[str | None, Field(examples=["http://localhost:5000"])] = None,
        experiment: str = "fundamentallm",
        artifacts: Artifacts = "none",
        flush_seconds: FlushSeconds = None,
        call_seconds: NonNegative = 60.0,
    ) -> None:
        names = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        refuse_secrets("tracking_uri", tracking_uri, names)
        super().__init__(run_dir, artifacts, flush_seconds, call_seconds)
        self.tracking_uri = tracking_uri
        self.experiment = experiment
        self._logger: Any = None

    def start(self, run: RunDescription, service_id: str | None) -> str:
        """Start or continue the run, and log its configuration."""
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when it is imported
        import mlflow
        from ignite.handlers import MLflowLogger

        logging.getLogger("mlflow.store").setLevel(logging.WARNING)
        logging.getLogger("alembic").setLevel(logging.WARNING)
        from_user = os.environ.get("MLFLOW_TRACKING_URI")
        uri, artifacts = self.tracking_uri or from_user, None
        if uri is None:
            uri = f"sqlite:///{self.directory.resolve() / 'mlflow.db'}"
            artifacts = (self.directory.resolve() / "artifacts").as_uri()
        mlflow.set_tracking_uri(uri)
        if from_user is None:  # it has set the variable, which another run here would then follow
            os.environ.pop("MLFLOW_TRACKING_URI", None)
        if service_id is None:
            known = mlflow.get_experiment_by_name(self.experiment)
            experiment_id = (
                known.experiment_id
                if known is not None
                else mlflow.create_experiment(self.experiment, artifact_location=artifacts)
            )
            mlflow.start_run(experiment_id=experiment_id, run_name=run.name)
        else:
            mlflow.start_run(run_id=service_id)
        self._logger = MLflowLogger()  # of the run that is active in this thread
        self._client = self._logger.MlflowClient()
        self._id = str(self._logger.active_run.info.run_id)
        if service_id is None:
            parameters = [(key, str(value)[:MAX_LENGTH]) for key, value in run.settings().items()]
            for begin in range(0, len(parameters), MAX_PARAMETERS):
                self._logger.log_params(dict(parameters[begin : begin + MAX_PARAMETERS]))
        self._logger.log_dict(run.config, "config.json")
        return self._id

    def send(self, records: Sequence[Record]) -> None:
        """Log the numbers of all records in as few calls as MLflow allows, then texts and tags."""
        metrics = []
        for record in records:
            numbers = {**record.metrics, "epoch": record.epoch, "tokens": record.tokens}
            if record.kind != "train":
                numbers = record.metrics
            metrics += [self._metric(name, x, record.step) for name, x in numbers.items()]
        for begin in range(0, len(metrics), MAX_METRICS):
            self._client.log_batch(self._id, metrics=metrics[begin : begin + MAX_METRICS])
        for record in records:
            if record.kind == "samples":
                self._logger.log_text(record.text, f"samples/step-{record.step:08d}.txt")
            elif record.text:
                count = int(record.metrics[record.kind])
                self._logger.set_tag(
                    f"{record.kind}.{count}", f"step {record.step}: {record.text}"[:MAX_LENGTH]
                )

    def cut(self, step: int, evaluation_pending: bool) -> None:
        """Mark that what was logged for later steps does not count."""
        self._logger.set_tag(
            f"went_back_to.{step}", f"later steps count from {now()} on, earlier values of them not"
        )

    def send_checkpoint(self, checkpoint: Path) -> None:
        """Log the checkpoint's directory as an artifact."""
        self._logger.log_artifacts(str(checkpoint), f"checkpoints/{checkpoint.name}")

    def finish(self) -> None:
        """End the run."""
        self._logger.close()

    def _metric(self, name: str, number: float, step: int) -> Any:
        from mlflow.entities import Metric

        return Metric(name, number, int(time.time() * 1000), step)
