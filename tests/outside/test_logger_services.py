"""The loggers of services, offline, against the real packages: what they stored is read back."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Events

from fundamentallm.config.training import TrainingConfig
from fundamentallm.engine.cli import main
from fundamentallm.testing import SpoiltGradient, tiny_loaders, tiny_model
from fundamentallm.training.handlers import Checkpointing, Evaluation, MetricsLog, NaNRollback
from fundamentallm.training.handlers.services import RunDescription
from fundamentallm.training.trainer import Trainer

pytestmark = [
    pytest.mark.outside,
    pytest.mark.filterwarnings("default"),  # of the packages
]

TEXT = Path(__file__).resolve().parents[1] / "data" / "shakespeare_excerpt.txt"
CONFIG = """\
name: tiny
data: {source: text.txt, sequence_length: 16, batch_size: 4}
model: {d_model: 16, num_layers: 1, num_heads: 2, dropout: 0.1}
training: {learning_rate: 1e-2, total_steps: 8, eval_steps: 4, log_steps: 2}
handlers: {tensorboard: false, progress: false}
"""


@dataclass
class Told:
    """What a service has of a run: values by metric as (step, value), in the order of logging."""

    config: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    samples: list[str] = field(default_factory=list)
    marks: list[str] = field(default_factory=list)
    runs: int = 0

    def add(self, name: str, step: int, value: Any) -> None:
        if isinstance(value, (int, float)):
            self.metrics.setdefault(name, []).append((step, float(value)))
        elif name == "sample":
            self.samples.append(value)
        else:
            self.marks.append(f"{name}: {value}")


def read_mlflow(run_dir: Path) -> Told:
    from mlflow import MlflowClient

    told = Told()
    client = MlflowClient(f"sqlite:///{run_dir / 'loggers/mlflow/mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "fundamentallm"]
    runs = client.search_runs([experiment.experiment_id])
    told.runs, run = len(runs), runs[0]
    told.config = dict(run.data.params)
    for name in run.data.metrics:
        for metric in client.get_metric_history(run.info.run_id, name):
            told.add(name, metric.step, metric.value)
    told.marks = [f"{key}: {value}" for key, value in run.data.tags.items()]
    folder = run_dir / "loggers/mlflow/artifacts" / run.info.run_id / "artifacts"
    told.samples = [path.read_text() for path in sorted(folder.glob("samples/*.txt"))]
    return told


def read_wandb(run_dir: Path) -> Told:
    import wandb
    from wandb.proto import wandb_internal_pb2

    # `finish` only tells W&B's own process to close the file. A command waits for that process when
    # it exits; here it is this process's, which goes on.
    wandb.teardown()
    told = Told()
    ids = set()
    for path in sorted(run_dir.glob("loggers/wandb/wandb/offline-run-*/run-*.wandb")):
        for data in wandb_records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.HasField("run"):
                ids.add(record.run.run_id)
                for item in record.run.config.update:
                    told.config |= flat(item.key, json.loads(item.value_json))
            if record.HasField("history"):
                row = {
                    item.key or item.nested_key[0]: json.loads(item.value_json)
                    for item in record.history.item
                }
                step = row.pop("step", 0)
                for name, value in row.items():
                    if not name.startswith("_"):
                        told.add(name, step, value)
    told.runs = len(ids)
    return told


def wandb_records(data: bytes) -> Iterator[bytes]:
    """Read W&B's file: after 7 bytes a LevelDB log, of parts in blocks of 32 KiB."""
    position, record = 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length, kind = (
            int.from_bytes(data[position + 4 : position + 6], "little"),
            data[position + 6],
        )
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def flat(key: str, value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        return {key: str(value)}
    return {k: v for name, below in value.items() for k, v in flat(f"{key}.{name}", below).items()}


def read_trackio(run_dir: Path) -> Told:
    told = Told()
    base = sqlite3.connect(Path(os.environ["TRACKIO_DIR"]) / "fundamentallm.db")
    with closing(base):
        rows = base.execute("SELECT step, metrics FROM metrics ORDER BY step, id").fetchall()
        configs = base.execute("SELECT config FROM configs").fetchall()
    told.runs = len(configs)
    for name, value in json.loads(configs[0][0]).items():
        told.config |= flat(name, value)
    for step, metrics in rows:
        for name, value in json.loads(metrics).items():
            told.add(name, step, value)
    return told


def read_clearml(run_dir: Path) -> Told:
    told = Told()
    sessions = sorted(
        run_dir.glob("loggers/clearml/offline/*/task.json"), key=lambda path: path.stat().st_mtime
    )
    told.runs = len(sessions)
    for session in sessions:
        task = json.loads(session.read_text())
        told.config |= {key: x["value"] for key, x in task["hyperparams"]["General"].items()}
        assert not task.get("script")  # no source, no changes of a repository
        for event in clearml_events(session.with_name("metrics.jsonl")):
            title, series = event["metric"], event["variant"]
            name = title if title == series else f"{title}/{series}"
            told.add(name, event["iter"], event["value"])
        # ClearML joins the texts of a moment.
        text = "\n".join(event["msg"] for event in clearml_events(session.with_name("log.jsonl")))
        for mark in re.split(r"\n(?=\w+, step \d+: |went_back_to )", text):
            if mark.startswith("samples, step "):
                told.samples.append(mark.split(": ", 1)[1])
            else:
                told.marks.append(mark)
    return told


def clearml_events(path: Path) -> list[dict[str, Any]]:
    return [
        event
        for line in path.read_text().splitlines()
        if line.strip()
        for event in json.loads(line)
    ]


READERS = {
    "mlflow": read_mlflow,
    "wandb": read_wandb,
    "trackio": read_trackio,
    "clearml": read_clearml,
}
DELETES = {"trackio"}
LIMITS = {"mlflow": 64_000, "wandb": 2_500, "trackio": 16_000, "clearml": 2_500}  # bytes
services = pytest.mark.parametrize("service", READERS)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: Any) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copy(TEXT, "text.txt")
    Path("tiny.yaml").write_text(CONFIG)
    # trackio reads it once a process.
    folder = Path(os.environ.setdefault("TRACKIO_DIR", str(tmp_path / "trackio")))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return tmp_path


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def expected(run_dir: Path, name: str) -> list[tuple[int, float]]:
    return [(line["step"], line[name]) for line in lines(run_dir) if name in line]


def handler(service: str, run_dir: Path, **options: Any) -> Any:
    from fundamentallm.training.handlers import HANDLERS

    return HANDLERS.build(
        service, {"flush_seconds": 120.0, "call_seconds": 120.0, **options}, run_dir=run_dir
    )


@services
def test_a_run_is_read_back_and_its_continuation_is_the_same_run(service, place, capfd):
    option = f"handlers.{service}={{flush_seconds: 120, call_seconds: 120}}"
    assert main(["run", "tiny.yaml", option]) == 0
    run_dir = place / "runs/tiny"
    told = READERS[service](run_dir)
    for name in ("train/loss", "train/grad_norm", "val/loss", "val/perplexity"):
        assert told.metrics[name] == expected(run_dir, name)
    assert float(told.config["training.learning_rate"]) == 1e-2
    assert told.config["model.d_model"] == "16"
    samples = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    assert told.samples == [sample["prompt"] + sample["text"] for sample in samples]

    assert (
        main(["run", "tiny.yaml", option, "training.total_steps=12", "--resume", str(run_dir)]) == 0
    )
    told = READERS[service](run_dir)
    assert told.runs == (2 if service == "clearml" else 1)  # offline a session for each process
    losses = told.metrics["val/loss"]
    if service not in DELETES:  # the evaluation of step 8 is measured again, to the same number
        assert [step for step, _ in losses] == [4, 8, 8, 12]
        losses = sorted(set(losses))
    assert losses == expected(run_dir, "val/loss")
    assert losses[-1][0] == 12
    assert "cannot be written" not in capfd.readouterr().err
    assert (run_dir / "loggers").stat().st_mode & 0o077 == 0


def make_trainer(run_dir: Path, *handlers: Any) -> Trainer:
    torch.manual_seed(0)
    train, val = tiny_loaders()
    return Trainer(
        tiny_model(dropout=0.1),
        train,
        val,
        device="cpu",
        config=TrainingConfig(total_steps=8, eval_steps=4, log_steps=1, learning_rate=1e-2),
        handlers=[*handlers, MetricsLog(run_dir), Evaluation()],
    )


@services
def test_a_rollback_is_cut_or_marked(service, place):
    logger = handler(service, place)
    saver = Checkpointing(place / "checkpoints")
    make_trainer(place, logger, NaNRollback(), saver, SpoiltGradient(6)).run()
    told = READERS[service](place)
    wanted = expected(place, "train/loss")
    losses = [(step, loss) for step, loss in told.metrics["train/loss"] if step != 6]
    wanted = [(step, loss) for step, loss in wanted if step != 6]
    if service in DELETES:
        assert losses == wanted
    else:  # step 5 comes a second time
        assert sorted(set(losses)) == sorted(set(wanted))
        assert [step for step, _ in sorted(losses)] == [1, 2, 3, 4, 5, 5, 7, 8]
        assert any("went_back" in mark for mark in told.marks)
    text = "\n".join(told.marks)
    assert "went back to step 4" in text
    assert "6" in text


@services
def test_checkpoints_are_uploaded_where_asked(service, place):
    for artifacts, names in (("last", {8}), ("all", {0, 4, 8})):
        run_dir = place / artifacts
        logger = handler(service, run_dir, artifacts=artifacts)
        saver = Checkpointing(run_dir / "checkpoints")
        run_dir.mkdir()
        make_trainer(run_dir, logger, saver).run()
        model = (run_dir / "checkpoints/step-00000008/model.safetensors").read_bytes()
        folder = run_dir / "loggers" if service != "trackio" else Path(os.environ["TRACKIO_DIR"])
        copies = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
        assert model in copies
        saved = [run_dir / f"checkpoints/step-{step:08d}/model.safetensors" for step in names]
        assert all(path.read_bytes() in copies for path in saved)
        assert not list((run_dir / "loggers").glob("staging/*/*"))


@services
def test_generators_are_left_as_they_are(service, place):
    logger = handler(service, place)
    logger.directory.mkdir(parents=True)
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(1)
    logger.start(RunDescription("tiny", "0123456789abcdef", 0, {"seed": 1}), None)
    logger.finish()
    found = random.random(), np.random.random(), torch.rand(1).item()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(1)
    plain = random.random(), np.random.random(), torch.rand(1).item()
    assert found[1:] == plain[1:]
    if service not in ("trackio", "clearml"):  # which draw from `random`, for one at an import
        assert found == plain


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A proxy that all programs are told to use, and what they asked it for."""
    asked: list[str] = []
    server = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                asked.append(connection.recv(200).decode(errors="replace"))

    threading.Thread(target=answer, daemon=True).start()
    address = f"http://127.0.0.1:{server.getsockname()[1]}"
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, address)
        monkeypatch.setenv(name.lower(), address)
    for name in list(os.environ):  # W&B's process, without the proxy; the test's task of ClearML
        if name == "WANDB_SERVICE" or name.startswith(("CLEARML_PROC_", "TRAINS_PROC_")):
            monkeypatch.delenv(name)
    yield asked
    server.close()


@services
def test_nothing_is_sent_over_the_network(service, place, proxy):
    command = [sys.executable, "-m", "fundamentallm.engine", "run", "tiny.yaml"]
    subprocess.run(
        [*command, f"handlers.{service}={{flush_seconds: 120, call_seconds: 120}}"], check=True
    )
    assert READERS[service](place / "runs/tiny").metrics
    assert proxy == []
    with suppress(OSError):  # the proxy hears of what is sent
        urllib.request.build_opener().open("http://service.invalid/")
    assert len(proxy) == 1


def test_ignites_own_logger_on_a_trainer(place):
    from ignite.handlers import MLflowLogger
    from mlflow import MlflowClient

    store = f"sqlite:///{place / 'own.db'}"
    own = MLflowLogger(tracking_uri=store)
    run_id = own.active_run.info.run_id
    trainer = make_trainer(place)
    own.attach_output_handler(
        trainer,
        Events.ITERATION_COMPLETED,
        tag="own",
        output_transform=lambda loss: {"loss": loss},
    )
    trainer.run()
    own.close()
    history = MlflowClient(store).get_metric_history(run_id, "own loss")
    assert [(metric.step, metric.value) for metric in history] == expected(place, "train/loss")


@services
def test_a_full_disk_costs_the_service_only(service, place, caplog, recwarn):
    """Files cannot grow beyond a size that the store of the service exceeds."""
    plain = make_trainer(place)
    plain.run()
    other = place / "other"
    other.mkdir()
    limited = make_trainer(other, handler(service, other))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMITS[service], hard))
    try:
        limited.run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    for a, b in zip(plain.model.parameters(), limited.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert expected(place, "train/loss") == expected(other, "train/loss")
    try:
        told = READERS[service](other)
    except (ValueError, sqlite3.OperationalError):  # not even an empty store
        told = Told()
    assert len(told.metrics.get("train/loss", [])) < 8
    if service in ("mlflow", "clearml"):
        assert "lacks 10 records of this run" in caplog.text
    if service == "trackio":  # which handles its errors itself
        assert any("trackio failed to flush" in str(warning.message) for warning in recwarn)
