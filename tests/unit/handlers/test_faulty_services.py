"""All loggers of services over clients that raise, hang or find the disk full: a run is as without.

The clients are fakes in the place of the packages, whether those are installed or not; the code of
the handlers above them is the real one. tests/outside has the packages on a disk that is full.
"""

from __future__ import annotations

import errno
import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from fundamentallm.config.training import TrainingConfig
from fundamentallm.testing import SpoiltGradient, tiny_loaders, tiny_model
from fundamentallm.training.handlers import (
    HANDLERS,
    Checkpointing,
    Evaluation,
    MetricsLog,
    NaNRollback,
)
from fundamentallm.training.handlers.background import THREAD_NAME
from fundamentallm.training.handlers.services import ServiceLogger
from fundamentallm.training.trainer import Trainer

SERVICES = ("mlflow", "wandb", "clearml", "trackio", "neptune", "visdom", "polyaxon")
MODULES = ("mlflow.tracking", "mlflow.entities", "neptune.types", "polyaxon.tracking")


class Client(ModuleType):
    """A module, and what its functions return: every attribute exists and is another one."""

    def __init__(self, name: str, act: Callable[[], None]) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)
        self.__path__: list[str] = []
        self._act = act

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Client(name, self._act)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._act()
        return Client("result", self._act)


@pytest.fixture
def released() -> Iterator[threading.Event]:
    """What a client that hangs waits for; then its thread ends."""
    event = threading.Event()
    yield event
    event.set()
    for thread in threading.enumerate():
        if thread.name.startswith(THREAD_NAME):
            thread.join(10)
            assert not thread.is_alive()


def outcome(run_dir: Path, *handlers: Any) -> tuple[list[torch.Tensor], list[dict[str, Any]]]:
    """Return weights and metric lines of a run that rolls back, without what depends on time."""
    torch.manual_seed(0)
    config = TrainingConfig(total_steps=8, eval_steps=4, log_steps=1, learning_rate=1e-2)
    saver = Checkpointing(run_dir / "checkpoints")
    trainer = Trainer(
        tiny_model(dropout=0.1),
        *tiny_loaders(),
        device="cpu",
        config=config,
        handlers=[
            *(*handlers, MetricsLog(run_dir), Evaluation()),
            *(saver, NaNRollback(), SpoiltGradient(6)),
        ],
    )
    trainer.run()
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["elapsed_seconds"]
    return [p.detach().clone() for p in trainer.model.parameters()], lines


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return outcome(tmp_path_factory.mktemp("without"))


def test_these_are_all_services() -> None:
    found = {n for n in HANDLERS.names() if is_service(HANDLERS.get(n))}
    assert found == set(SERVICES)


def is_service(made: Any) -> bool:
    return isinstance(made, type) and issubclass(made, ServiceLogger)


@pytest.mark.parametrize("num_good", [0, pytest.param(2, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    "fault", ["raises", "hangs", pytest.param("finds the disk full", marks=pytest.mark.long)]
)
@pytest.mark.parametrize("service", SERVICES)
def test_a_run_is_as_without_it(
    service: str,
    fault: str,
    num_good: int,
    released: threading.Event,
    without: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    calls: list[float] = []

    def act() -> None:
        calls.append(time.monotonic())
        if len(calls) <= num_good:
            return
        if fault == "raises":
            raise RuntimeError("by the test")
        if fault == "hangs":
            released.wait(60)
            return
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in [name for name in sys.modules if name.split(".")[0] in SERVICES]:
        monkeypatch.delitem(sys.modules, name)
    for name in (*SERVICES, *MODULES):
        monkeypatch.setitem(sys.modules, name, Client(name, act))
    options = {"flush_seconds": 0.3, "call_seconds": 0.2, "artifacts": "all"}
    if service == "visdom":
        del options["artifacts"]
    logger = HANDLERS.build(service, options, run_dir=tmp_path)
    began = time.monotonic()
    with caplog.at_level(logging.WARNING, "fundamentallm"):
        weights, lines = outcome(tmp_path, logger)
    assert calls
    assert time.monotonic() - began < 30  # it hangs for 60
    assert lines == without[1]
    assert all(torch.equal(a, b) for a, b in zip(weights, without[0], strict=True))
    said = "is left behind" if fault == "hangs" else "cannot be written, training goes on"
    assert f"{logger.target} " in caplog.text
    assert said in caplog.text
