"""The event files, read back record by record, against the metrics of the run."""

from __future__ import annotations

import logging
import math
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboardX.crc32c import crc32c
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import RecordWriter

from fundamentallm.config.training import TrainingConfig
from fundamentallm.events import TrainingEvents
from fundamentallm.testing import SpoiltGradient, tiny_loaders, tiny_model
from fundamentallm.training.handlers import (
    Checkpointing,
    Evaluation,
    NaNRollback,
    Schedule,
    TensorBoard,
)
from fundamentallm.training.trainer import Trainer


def masked_crc(data: bytes) -> int:
    crc = crc32c(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def records(path: Path) -> list[Any]:
    """Records of a TFRecord file: length, its checksum, data, its checksum."""
    data, position, events = path.read_bytes(), 0, []
    while position < len(data):
        header = data[position : position + 8]
        (length,) = struct.unpack("<Q", header)
        (header_crc,) = struct.unpack_from("<I", data, position + 8)
        body = data[position + 12 : position + 12 + length]
        (body_crc,) = struct.unpack_from("<I", data, position + 12 + length)
        assert header_crc == masked_crc(header)
        assert body_crc == masked_crc(body)
        events.append(event_pb2.Event.FromString(body))
        position += 16 + length
    return events


def read(directory: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard shows: files by name, each hiding what earlier ones say from its step on."""
    shown: dict[str, dict[int, float]] = {}
    for path in sorted((directory / "tensorboard").iterdir()):
        for event in records(path):
            if event.session_log.status == event_pb2.SessionLog.START:
                for points in shown.values():
                    for step in [s for s in points if s >= event.step]:
                        del points[step]
            for value in event.summary.value:
                shown.setdefault(value.tag, {})[event.step] = value.simple_value
    return shown


def make_trainer(directory: Path, *handlers: Any, loss_fn: Any = None, **options: Any) -> Trainer:
    torch.manual_seed(0)
    train, val = tiny_loaders()
    fields = {"total_steps": 12, "eval_steps": 4, "log_steps": 3, "learning_rate": 1e-2}
    trainer = Trainer(
        tiny_model(),
        train,
        val,
        loss_fn=loss_fn,
        device="cpu",
        config=TrainingConfig(**{**fields, **options}),
        handlers=[TensorBoard(directory), Evaluation(), *handlers],
    )
    Schedule(trainer.scheduler).attach(trainer)
    return trainer


def as_float32(value: float) -> float:
    return struct.unpack("<f", struct.pack("<f", value))[0]


def test_holds_every_metric_at_its_step(tmp_path):
    trainer = make_trainer(tmp_path)
    expected: dict[str, dict[int, float]] = {}

    def note(engine: Trainer, prefix: str) -> None:
        for key, value in engine.state.metrics.items():
            if key.startswith(prefix) and (prefix == "val/" or engine.is_log_step()):
                expected.setdefault(key, {})[engine.state.iteration] = as_float32(value)

    trainer.add_event_handler(TrainingEvents.FLLM_METRICS_READY, note, "train/")
    trainer.add_event_handler(TrainingEvents.FLLM_EVALUATION_COMPLETED, note, "val/")
    trainer.run()
    shown = read(tmp_path)
    assert shown == expected
    assert list(shown["train/loss"]) == [3, 6, 9, 10, 12]
    assert list(shown["val/loss"]) == [4, 8, 10, 12]
    assert {"train/grad_norm", "train/lr", "train/epoch_loss", "val/perplexity"} < shown.keys()


def test_a_rollback_hides_what_was_taken_back(tmp_path):
    trainer = make_trainer(
        tmp_path,
        NaNRollback(),
        SpoiltGradient(7),
        Checkpointing(tmp_path / "checkpoints"),
        log_steps=1,
    )
    trainer.run()
    assert trainer.state.rollbacks == 1
    shown = read(tmp_path)
    losses = shown["train/loss"]
    assert sorted(losses) == list(range(1, 13))
    assert math.isnan(losses.pop(7))
    assert losses == {
        step: as_float32(trainer.history.train_loss[step - 1]) for step in sorted(losses)
    }
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2


def test_a_resumed_run_goes_on_in_a_file_of_its_own(tmp_path):
    saver = tmp_path / "checkpoints"
    first = make_trainer(tmp_path, Checkpointing(saver), log_steps=1)
    first.run()
    before = read(tmp_path)
    again = make_trainer(tmp_path, Checkpointing(saver), log_steps=1)
    again.resume(saver / "step-00000008")
    assert again.state.iteration == 8
    again.run()
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    assert read(tmp_path) == before


def test_the_file_is_whole_after_a_run_that_fails(tmp_path):
    trainer = make_trainer(tmp_path, log_steps=1)

    def fail() -> None:
        raise RuntimeError("by the test")

    trainer.add_event_handler(TrainingEvents.FLLM_EVALUATION_STARTED(once=2), fail)
    with pytest.raises(RuntimeError, match="by the test"):
        trainer.run()
    assert sorted(read(tmp_path)["train/loss"]) == list(range(1, 9))


@pytest.mark.parametrize("operation", ["write", "flush", "close"])
def test_a_disk_that_fails_is_told_once_and_the_run_ends_well(
    tmp_path, caplog, monkeypatch, operation
):
    original = getattr(RecordWriter, operation)

    def full(self: Any, *args: Any) -> None:
        original(self, *args)
        if trainer.state.iteration > 0:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(RecordWriter, operation, full)
    trainer = make_trainer(tmp_path, log_steps=1)
    if operation == "flush":
        monkeypatch.setattr("fundamentallm.training.handlers.tensorboard.FLUSH_SECONDS", 0.0)
    with caplog.at_level(logging.WARNING, "fundamentallm"):
        trainer.run()
    assert trainer.state.iteration == 12
    told = [r for r in caplog.records if "TensorBoard files cannot be written" in r.getMessage()]
    assert len(told) == 1


def test_a_directory_that_cannot_be_made_does_not_end_the_run(tmp_path, caplog):
    (tmp_path / "tensorboard").write_text("in the way")
    trainer = make_trainer(tmp_path, log_steps=1)
    with caplog.at_level(logging.WARNING, "fundamentallm"):
        trainer.run()
    assert trainer.state.iteration == 12
    told = [r for r in caplog.records if "TensorBoard files cannot be written" in r.getMessage()]
    assert len(told) == 1


def test_training_is_bitwise_the_same_without_it(tmp_path):
    with_it = make_trainer(tmp_path)
    with_it.run()
    torch.manual_seed(0)
    train, val = tiny_loaders()
    config = TrainingConfig(total_steps=12, eval_steps=4, learning_rate=1e-2)
    without = Trainer(
        tiny_model(), train, val, device="cpu", config=config, handlers=[Evaluation()]
    )
    without.run()
    assert with_it.history.train_loss == without.history.train_loss


def texts(directory: Path, tag: str) -> list[tuple[int, str]]:
    """The texts under a tag in the newest file, with their steps."""
    newest = max((directory / "tensorboard").iterdir())
    return [
        (event.step, value.tensor.string_val[0].decode())
        for event in records(newest)
        for value in event.summary.value
        if value.tag == f"{tag}/text_summary"
    ]


def test_an_incident_and_the_way_back_leave_marks_that_the_way_back_does_not_hide(tmp_path):
    trainer = make_trainer(
        tmp_path,
        TensorBoard(tmp_path),
        NaNRollback(),
        Checkpointing(tmp_path / "checkpoints"),
        SpoiltGradient(6),
        total_steps=8,
    )
    trainer.run()
    shown = read(tmp_path)
    assert shown["incidents"] == {6: 2.0}
    assert list(shown["rollbacks"].values()) == [1.0]
    marks = texts(tmp_path, "incidents")
    assert [step for step, _ in marks] == [6, 6]
    assert "verdict: transient" in marks[0][1]
    assert "verdict: unexplained" in marks[1][1]
    (went,) = texts(tmp_path, "rollbacks")
    assert went[1].startswith("went back to step ")
