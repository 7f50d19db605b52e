"""Visdom."""

from __future__ import annotations

import html
import json
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from fundamentallm.config.base import NonNegative
from fundamentallm.training.handlers.base import HANDLERS
from fundamentallm.training.handlers.metrics_writer import Record
from fundamentallm.training.handlers.services.base import (
    FlushSeconds,
    RunDescription,
    ServiceLogger,
    now,
    refuse_secrets,
    row_of,
)


@HANDLERS.register("visdom")
class Visdom(ServiceLogger):
    """Observes: hands the run to Visdom, by default to a file, for `Visdom().replay_log(FILE)`.

    A run is an environment there, with a window for each metric and for the texts. When it goes
    back, a server loses the points of later steps; a file only grows, and a text says from when on
    they count. Visdom keeps no files, so checkpoints are not uploaded. A login comes from
    VISDOM_USERNAME and VISDOM_PASSWORD, never from a configuration.

    Args:
        run_dir: the run's directory; the file is below it.
        server: the address of a server, for example http://localhost; None: the file.
        port: the server's port.
        flush_seconds: how long the end of a run waits; None: 10.
        call_seconds: how long a call may take before a warning says so.

    Raises:
        ValueError: the address holds a login.
    """

    target = "Visdom"
    package = short_name = "visdom"
    install = "'setuptools<81' && pip install --no-build-isolation visdom"

    def __init__(
        self,
        run_dir: Path | str,
        server: Annotated[str | None, Field(examples=["http://localhost"])] = None,
        port: Annotated[int, Field(ge=1, le=65535)] = 8097,
        flush_seconds: FlushSeconds = None,
        call_seconds: NonNegative = 60.0,
    ) -> None:
        refuse_secrets("server", server, "VISDOM_USERNAME and VISDOM_PASSWORD")
        super().__init__(run_dir, "none", flush_seconds, call_seconds)
        self.server = server
        self.port = port
        self._there: Any = None
        self._env = ""

    def start(self, run: RunDescription, service_id: str | None) -> str:
        """Start or continue the environment, and show the configuration in it."""
        import visdom

        logging.getLogger("visdom").setLevel(logging.ERROR)  # it warns of each start
        self._env = service_id or f"{run.name}-{run.run_id[:8]}"
        place: dict[str, Any] = {
            "offline": True,
            "log_to_filename": str(self.directory.resolve() / "events.log"),
        }
        if self.server is not None:
            place = {
                "server": self.server,
                "port": self.port,
                "username": os.environ.get("VISDOM_USERNAME"),
                "password": os.environ.get("VISDOM_PASSWORD"),
                "use_incoming_socket": False,  # nothing comes back; it would wait for one
            }
        self._there = visdom.Visdom(env=self._env, raise_exceptions=True, **place)
        self._shown: set[str] = set()
        settings = "\n".join(f"{key}: {value}" for key, value in run.settings().items())
        self._there.text(_html(settings), win="config", env=self._env, opts={"title": "config"})
        return self._env

    def send(self, records: Sequence[Record]) -> None:
        """Append the points of each metric to its window in one call, and the texts to theirs."""
        points: dict[str, tuple[list[int], list[float]]] = {}
        for record in records:
            for name, value in row_of(record).items():
                if isinstance(value, str):
                    self._text(name, f"step {record.step}: {value}")
                    continue
                steps, values = points.setdefault(name, ([], []))
                steps.append(record.step)
                values.append(value)
        for name, (steps, values) in points.items():
            self._line(name, steps, values, "append")

    def cut(self, step: int, evaluation_pending: bool) -> None:
        """Remove the points of later steps from a server; mark in a file that they do not count."""
        if self.server is None:
            text = f"step {step}, {now()}: earlier points of later steps do not count"
            self._text("went_back_to", text)
            return
        for name, window in json.loads(self._there.get_window_data(env=self._env)).items():
            lines = window["content"]["data"] if window["type"] == "plot" else []
            for line in lines:
                limit = step - (evaluation_pending and name.startswith("val/"))
                points = zip(line["x"], line["y"], strict=True)
                kept = [(x, math.nan if y is None else y) for x, y in points if x <= limit]
                if kept:
                    self._line(name, [x for x, _ in kept], [y for _, y in kept], "replace")
                else:
                    self._there.close(win=name, env=self._env)

    def finish(self) -> None:
        """Tell a server to keep the environment on its disk."""
        if self.server is not None:
            self._there.save([self._env])

    def _text(self, window: str, text: str) -> None:
        # A text is added only to a window that is there; a server does not say that it is not.
        is_there = window in self._shown or (
            self.server is not None and self._there.win_exists(window, env=self._env)
        )
        self._shown.add(window)
        self._there.text(
            _html(text), win=window, env=self._env, opts={"title": window}, append=is_there
        )

    def _line(self, name: str, x: Sequence[float], y: Sequence[float], update: str) -> None:
        self._there.line(
            X=x,
            Y=y,
            win=name,
            env=self._env,
            name=name,
            update=update,
            opts={"title": name, "xlabel": "step"},
        )


def _html(text: str) -> str:
    """Return a text of the run as a page that shows it and does nothing else."""
    return html.escape(text).replace("\n", "<br>")
