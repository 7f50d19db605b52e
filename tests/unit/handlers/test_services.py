"""The common base of the loggers of services, with a service that is a list."""

from __future__ import annotations

import importlib.util
import json
import os
import stat
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from fundamentallm.config.training import TrainingConfig
from fundamentallm.data.tokenizer import CharacterTokenizer
from fundamentallm.engine.cli import exit_process
from fundamentallm.errors import CheckpointError, MachineError
from fundamentallm.redaction import redacted_settings
from fundamentallm.testing import tiny_loaders, tiny_model
from fundamentallm.training.handlers import (
    HANDLERS,
    Checkpointing,
    Evaluation,
    MLflow,
    Samples,
    Trackio,
)
from fundamentallm.training.handlers.background import THREAD_NAME
from fundamentallm.training.handlers.services import ServiceLogger
from fundamentallm.training.trainer import Trainer


class ListService(ServiceLogger):
    target = "the test's service"
    package = "json"
    short_name = "list"

    def __init__(self, run_dir: Path, **options: Any) -> None:
        super().__init__(run_dir, **options)
        self.calls: list[tuple[Any, ...]] = []
        self.error: Exception | None = None

    def start(self, run: Any, service_id: str | None) -> str:
        self.calls.append(("start", run, service_id))
        return service_id or "its-id"

    def send(self, records: Any) -> None:
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        self.calls += [("record", record) for record in records]

    def cut(self, step: int, evaluation_pending: bool) -> None:
        self.calls.append(("cut", step, evaluation_pending))

    def send_checkpoint(self, checkpoint: Path) -> None:
        assert (checkpoint / "MANIFEST.json").exists()
        self.calls.append(("checkpoint", checkpoint.name))

    def finish(self) -> None:
        self.calls.append(("finish",))

    def named(self, name: str) -> list[Any]:
        return [call[1:] for call in self.calls if call[0] == name]


def make_trainer(*handlers: Any, steps: int = 8) -> Trainer:
    torch.manual_seed(0)
    train, val = tiny_loaders()
    config = TrainingConfig(total_steps=steps, eval_steps=4, log_steps=1, learning_rate=1e-2)
    return Trainer(
        tiny_model(), train, val, device="cpu", config=config, handlers=[*handlers, Evaluation()]
    )


def test_a_resumed_run_goes_on_under_the_same_id(tmp_path):
    first = ListService(tmp_path)
    make_trainer(first, Checkpointing(tmp_path / "checkpoints")).run()
    assert [call[0] for call in first.calls][:2] == ["start", "record"]
    ((run, service_id),) = first.named("start")
    assert service_id is None
    assert run.settings()["training.learning_rate"] == 1e-2
    path = tmp_path / "loggers/list.json"
    assert json.loads(path.read_text())["service_id"] == "its-id"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600

    second = ListService(tmp_path)
    trainer = make_trainer(second, Checkpointing(tmp_path / "checkpoints"), steps=10)
    trainer.resume(tmp_path / "checkpoints/step-00000004")
    trainer.run()
    assert second.calls[0][2] == "its-id"
    assert second.calls[1] == ("cut", 4, True)
    assert second.calls[-1] == ("finish",)

    another = ListService(tmp_path)
    make_trainer(another).run()
    assert another.calls[0][2] is None


def test_it_is_opened_again_after_an_error(tmp_path, caplog):
    service = ListService(tmp_path)
    service.error = OSError("by the test")
    make_trainer(service).run()
    assert [call[0] for call in service.calls] == ["start", "finish"]
    assert "lacks 10 records" in caplog.text


@pytest.mark.parametrize(
    ("artifacts", "names"),
    [
        ("none", []),
        ("last", ["step-00000008"]),
        ("best", ["step-00000008"]),
        ("all", ["step-00000000", "step-00000004", "step-00000008"]),
    ],
)
def test_checkpoints_are_uploaded_where_asked(tmp_path, artifacts, names):
    service = ListService(tmp_path, artifacts=artifacts)
    # Two are kept: that of step 0 is gone when the service gets it.
    make_trainer(service, Checkpointing(tmp_path / "checkpoints", n_saved=2)).run()
    assert [name for (name,) in service.named("checkpoint")] == names
    assert not list(tmp_path.glob("loggers/staging/*/*"))


def test_samples_are_handed_over(tmp_path):
    tokenizer = CharacterTokenizer.from_text("abcdefghij\n")
    service = ListService(tmp_path)
    make_trainer(Samples(tokenizer, tmp_path, num_tokens=20), service).run()
    texts = [
        (record.step, record.text)
        for (record,) in service.named("record")
        if record.kind == "samples"
    ]
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert texts == [(line["step"], line["prompt"] + line["text"]) for line in lines]
    assert len(texts) == 2


def test_a_link_in_place_of_its_directory_is_not_followed(tmp_path, caplog):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/loggers").symlink_to(tmp_path / "elsewhere")
    service = ListService(tmp_path / "run")
    make_trainer(service).run()
    assert not service.calls
    assert CheckpointError.__name__ in caplog.text
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("name", ["mlflow", "wandb", "trackio", "clearml"])
def test_a_missing_package_is_named_with_its_command(tmp_path, monkeypatch, name):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with pytest.raises(MachineError, match=r"pip install 'fundamentallm\[loggers\]'"):
        HANDLERS.build(name, {}, run_dir=tmp_path)


def test_an_option_with_a_secret_is_refused(tmp_path):
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_PASSWORD"):
        MLflow(tmp_path, tracking_uri="https://me:secret@host")
    with pytest.raises(ValueError, match="TRACKIO_WRITE_TOKEN"):
        Trackio(tmp_path, server_url="https://host/?write_token=secret")


def test_settings_lose_their_secrets():
    settings = {
        "training": {"max_tokens": 5, "tokenizer": "byte"},
        "handlers": {"mine": {"api_key": "s3cr3t", "hf_token": "s3cr3t", "list": ["ftp://a:b@c"]}},
    }
    assert redacted_settings(settings) == {
        "training": {"max_tokens": 5, "tokenizer": "byte"},
        "handlers": {"mine": {"api_key": "***", "hf_token": "***", "list": ["ftp://***@c"]}},
    }


def test_the_command_does_not_wait_for_a_logger_that_is_left_behind(monkeypatch):
    class EndedError(Exception):
        pass

    def end(code: int) -> None:
        raise EndedError(code)

    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    release = threading.Event()
    thread = threading.Thread(target=release.wait, name=THREAD_NAME + "of the test", daemon=True)
    thread.start()
    with pytest.raises(EndedError, match="3"):
        exit_process(3)
    release.set()
    thread.join()
    with pytest.raises(SystemExit):
        exit_process(3)
