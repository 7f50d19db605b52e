"""What the loggers of services have in common: the run's id there, configuration, checkpoints.

A service is one file beside this one: a `ServiceLogger` with `start`, `send`, `cut`,
`send_checkpoint` and `finish`, which run in the logger's thread.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import shutil
import sys
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from fundamentallm.config.base import NonNegative
from fundamentallm.errors import MachineError
from fundamentallm.events import TrainingEvents
from fundamentallm.files.filesystem import Filesystem, replace_file
from fundamentallm.files.private import check_directory, make_directory, open_to_read
from fundamentallm.files.run_layout import BEST, LOGGERS
from fundamentallm.redaction import redacted, redacted_settings
from fundamentallm.training.handlers.background import BackgroundWriter
from fundamentallm.training.handlers.metrics_writer import Record
from fundamentallm.training.loop import TrainingLoop

logger = logging.getLogger(__name__)

Artifacts = Literal["none", "best", "last", "all"]
FlushSeconds = Annotated[NonNegative | None, Field(examples=[60.0])]
UPLOAD_SECONDS = 600.0  # the end of a run waits longer where it is asked to upload


@dataclass(frozen=True)
class RunDescription:
    """The run as a service shows it.

    Attributes:
        name: the run's name.
        run_id: the id that its checkpoints carry.
        step: the step that it starts or continues from.
        config: its configuration, nested plain values without secrets.
    """

    name: str
    run_id: str
    step: int
    config: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, trainer: TrainingLoop, run_dir: Path) -> RunDescription:
        """Describe a trainer's run: of a command the whole configuration, else the training's."""
        config = trainer.description.get("config") or {
            "training": trainer.config.model_dump(mode="json")
        }
        name = config.get("name") or run_dir.resolve().name
        step = trainer.state.iteration
        return cls(name, trainer.run_id, step, redacted_settings(config))

    def settings(self) -> dict[str, Any]:
        """Return the configuration under dotted keys."""
        return dict(_flat("", self.config))


def _flat(prefix: str, nested: Mapping[str, Any]) -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in nested.items():
        if isinstance(value, Mapping) and value:
            pairs += _flat(f"{prefix}{key}.", value)
        else:
            pairs.append((f"{prefix}{key}", value))
    return pairs


class ServiceLogger(BackgroundWriter):
    """Observes: hands a run to a service, in a thread (see `BackgroundWriter`).

    The configuration, the metrics, samples, incidents, rollbacks and, where asked, checkpoints. A
    run that continues goes on as the same run of the service: its id is kept under `loggers/`.

    Args:
        run_dir: the run's directory.
        artifacts: checkpoints to upload: "best" or "last" at the end of the run, "all" as they are
            saved.
        flush_seconds: how long the end of a run waits; None: 10, and 600 with artifacts.
        call_seconds: how long a call may take before a warning says so.

    Attributes:
        package: the package that is imported.
        install: what `pip install` takes.
        short_name: the name of the service in a configuration, and of its files.

    Raises:
        MachineError: the package is not installed.
        ValueError: a number is out of its range.
    """

    package = ""
    install = "'fundamentallm[loggers]'"
    short_name = ""

    def __init__(
        self,
        run_dir: Path | str,
        artifacts: Artifacts = "none",
        flush_seconds: float | None = None,
        call_seconds: float = 60.0,
    ) -> None:
        if importlib.util.find_spec(self.package) is None:
            raise MachineError(
                f"the logger {self.short_name} needs the package `{self.package}`",
                fix=f"pip install {self.install}, or remove handlers.{self.short_name}",
            )
        if flush_seconds is None:
            flush_seconds = 10.0 if artifacts == "none" else UPLOAD_SECONDS
        super().__init__(flush_seconds, call_seconds)
        self.run_dir = Path(run_dir)
        self.directory = self.run_dir / LOGGERS / self.short_name
        self.artifacts = artifacts
        self._run: RunDescription | None = None
        self._is_open = self._has_records = False

    # ------------------------------------------------------------------ in the run's thread

    def attach(self, trainer: TrainingLoop) -> None:
        """Listen as any logger, and to samples and checkpoints."""
        super().attach(trainer)
        if trainer.ranks.is_writer:
            trainer.add_event_handler(TrainingEvents.FLLM_TEXT_SAMPLED, self._log_sample)
            trainer.add_event_handler(TrainingEvents.FLLM_CHECKPOINT_SAVED, self._log_checkpoint)

    def _begin(self, trainer: TrainingLoop) -> None:
        self._run = RunDescription.of(trainer, self.run_dir)
        self._checkpoint: Path | None = None
        super()._begin(trainer)

    def _log_sample(self, trainer: TrainingLoop) -> None:
        if (sample := trainer.state.sample) is not None:
            text = sample.prompt + sample.text
            self._try(self.write, self._record(trainer, "samples", sample.step, {}, text))

    def _log_checkpoint(self, trainer: TrainingLoop) -> None:
        self._checkpoint = trainer.state.last_checkpoint
        if self.artifacts == "all" and self._checkpoint is not None:
            # Linked at once: the run may delete it before its turn comes.
            staged = self.run_dir / LOGGERS / "staging" / self.short_name / self._checkpoint.name
            try:
                _link(self._checkpoint, staged)
            except OSError as error:
                logger.warning("%s does not get %s: %s", self.target, self._checkpoint.name, error)
            else:
                self._try(self._upload_staged, staged)

    def _end(self) -> None:
        if self._checkpoint is not None and self.artifacts in ("best", "last"):
            pointer = self._checkpoint.with_name(BEST)
            if self.artifacts == "last":
                self._try(self.upload, self._checkpoint)
            elif pointer.is_file():
                with open_to_read(pointer) as file:
                    name = file.readall().decode().strip()
                self._try(self.upload, self._checkpoint.with_name(name))
        super()._end()

    # ------------------------------------------------------------------ in the logger's thread

    @abstractmethod
    def start(self, run: RunDescription, service_id: str | None) -> str:
        """Start the run in the service, or go on with the one of an id; return its id."""

    @abstractmethod
    def send(self, records: Sequence[Record]) -> None:
        """Hand over records."""

    @abstractmethod
    def finish(self) -> None:
        """End the run in the service."""

    @abstractmethod
    def cut(self, step: int, evaluation_pending: bool) -> None:
        """Remove the records of later steps as `cut_back` says, or mark that they do not count."""

    def send_checkpoint(self, checkpoint: Path) -> None:
        """Copy the directory of a checkpoint to the service; nothing where it keeps no files."""

    def write_all(self, records: Sequence[Record]) -> None:
        """Hand over records, to a run that is opened if it is not open."""
        self._open()
        self._has_records = True
        self.send(records)

    def cut_back(self, step: int, evaluation_pending: bool) -> None:
        """Open the run; remove or mark later records if it has any."""
        self._open()
        if self._has_records:
            self.cut(step, evaluation_pending)

    def upload(self, checkpoint: Path) -> None:
        """Copy the directory of a checkpoint to the service."""
        self._open()
        self.send_checkpoint(checkpoint)

    def close(self) -> None:
        """End the run in the service."""
        if self._is_open:
            self._is_open = False
            self.finish()

    def _upload_staged(self, checkpoint: Path) -> None:
        try:
            self.upload(checkpoint)
        finally:
            shutil.rmtree(checkpoint)

    def _limit_of(self, call: Callable[..., None]) -> float:
        if call in (self.upload, self._upload_staged):
            return max(self.flush_seconds, self.call_seconds)
        return self.call_seconds

    def _open(self) -> None:
        if self._is_open:
            return
        assert self._run is not None
        known = self._known_id(self._run.run_id)
        for directory in (self.run_dir, self.run_dir / LOGGERS, self.directory):
            check_directory(directory)
            make_directory(directory)
        service_id = self.start(self._run, known)
        self._is_open = True
        self._has_records = known is not None
        ids = {"run_id": self._run.run_id, "service_id": service_id}
        replace_file(Filesystem(), self._id_file, [json.dumps(ids).encode()])

    @contextmanager
    def files_here(self, variable: str, below: str = "") -> Iterator[None]:
        """Let a package that reads this variable keep its files here, unless the user has set it.

        It is set for the call alone: another run of the process has a directory of its own.
        """
        if variable in os.environ:
            yield
            return
        os.environ[variable] = str(self.directory.resolve() / below)
        try:
            yield
        finally:
            del os.environ[variable]

    @property
    def _id_file(self) -> Path:
        return self.directory.with_suffix(".json")

    def _known_id(self, run_id: str) -> str | None:
        """Return the id of the run in the service, None if it has not been there."""
        try:
            with open_to_read(self._id_file) as file:
                ids = json.loads(file.readall())
            known = str(ids["service_id"]) if ids["run_id"] == run_id else None
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return known if known is not None and re.fullmatch(r"[\w./-]{1,200}", known) else None


def _link(directory: Path, target: Path) -> None:
    """Give the files of a directory second names in another one; copy them where that fails."""

    def link(source: str, name: str) -> None:
        try:
            os.link(source, name)
        except OSError:
            shutil.copyfile(source, name)

    make_directory(target.parent)
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(directory, target, copy_function=link)


@contextmanager
def same_excepthook() -> Iterator[None]:
    """Keep the process's hook for errors, in whose place a client would put its own."""
    hook = sys.excepthook
    try:
        yield
    finally:
        sys.excepthook = hook


def row_of(record: Record) -> dict[str, Any]:
    """Return a record as one row of named values, for services that keep rows."""
    row: dict[str, Any] = dict(record.metrics)
    if record.kind == "train":
        row |= {"epoch": record.epoch, "tokens": record.tokens}
    if record.text:
        row["sample" if record.kind == "samples" else f"{record.kind}/text"] = record.text
    return row


def now() -> str:
    """Return the time in UTC, for marks."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def refuse_secrets(option: str, address: str | None, variables: str) -> None:
    """Refuse an address with a login or a token: configurations are stored with every run.

    Raises:
        ValueError: it has one.
    """
    if address is not None and redacted(address) != address:
        raise ValueError(f"{option} holds a secret; put it into the environment: {variables}")
