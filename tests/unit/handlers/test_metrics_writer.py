"""What every logger can rely on, and what a run can rely on whatever its loggers do."""

from __future__ import annotations

import importlib.util
import json
import logging
import resource
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Events

from fundamentallm.config.training import TrainingConfig
from fundamentallm.events import TrainingEvents
from fundamentallm.testing import SpoiltGradient, tiny_loaders, tiny_model
from fundamentallm.training.handlers import (
    Checkpointing,
    Evaluation,
    MetricsLog,
    MetricsWriter,
    NaNRollback,
    Record,
    TensorBoard,
)
from fundamentallm.training.trainer import Trainer

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "own_logger.py"


def sqlite_log() -> Any:
    spec = importlib.util.spec_from_file_location("own_logger", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SQLiteLog


class Kept(MetricsWriter):
    """Keeps its calls; raises those errors that are planned for a method's next calls."""

    target = "the test's list"

    def __init__(self, **errors: list[Exception | None]) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.errors = errors

    def _note(self, method: str, *args: Any) -> None:
        self.calls.append((method, *args))
        planned = self.errors.get(method)
        error = planned.pop(0) if planned else None
        if error is not None:
            raise error

    def write(self, record: Record) -> None:
        self._note("write", record)

    def cut_back(self, step: int, evaluation_pending: bool) -> None:
        self._note("cut_back", step, evaluation_pending)

    def close(self) -> None:
        self._note("close")

    def steps(self) -> list[int]:
        return [call[1].step for call in self.calls if call[0] == "write"]


def make_trainer(*handlers: Any, **options: Any) -> Trainer:
    torch.manual_seed(0)
    train, val = tiny_loaders()
    fields = {"total_steps": 8, "eval_steps": 4, "log_steps": 1, "learning_rate": 1e-2}
    return Trainer(
        tiny_model(dropout=0.1),
        train,
        val,
        device="cpu",
        config=TrainingConfig(**{**fields, **options}),
        handlers=[*handlers, Evaluation()],
    )


def weights(trainer: Trainer) -> list[torch.Tensor]:
    return [p.detach().clone() for p in trainer.model.parameters()]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.fixture(scope="module")
def without() -> list[torch.Tensor]:
    trainer = make_trainer()
    trainer.run()
    return weights(trainer)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def test_a_run_is_told_from_its_begin_to_its_end():
    kept = Kept()
    trainer = make_trainer(kept, log_steps=3)
    trainer.run()
    assert kept.calls[0] == ("cut_back", 0, False)
    assert kept.calls[-1] == ("close",)
    records = [call[1] for call in kept.calls[1:-1]]
    assert [(record.kind, record.step) for record in records] == [
        ("train", 3),
        ("val", 4),
        ("train", 6),
        ("train", 8),
        ("val", 8),
    ]
    for record in records:
        assert record.metrics
        assert list(record.metrics) == sorted(record.metrics)
        assert all(name.startswith(record.kind + "/") for name in record.metrics)
        assert (record.epoch, record.tokens, record.text) == (1, 32 * record.step, "")
        assert 0 < record.elapsed_seconds < trainer.budget.elapsed_seconds()
    assert records[0].metrics["train/loss"] == trainer.history.train_loss[2]
    assert records[1].metrics["val/loss"] == trainer.history.val_loss[0]


def test_what_happened_is_written_again_when_the_run_goes_back(tmp_path):
    kept = Kept()
    trainer = make_trainer(kept, NaNRollback(), Checkpointing(tmp_path), SpoiltGradient(6))
    trainer.run()
    assert trainer.state.rollbacks == 1
    # The checkpoint of step 4 was saved before its evaluation, which runs again.
    back = kept.calls.index(("cut_back", 4, True))
    told = [call[1] for call in kept.calls[:back] if call[0] == "write" and call[1].text]
    assert [(mark.kind, mark.step, mark.metrics) for mark in told] == [
        ("incidents", 6, {"incidents": 1}),
        ("incidents", 6, {"incidents": 2}),
    ]
    again = [call[1] for call in kept.calls[back + 1 : back + 4]]
    assert again[:2] == told
    assert (again[2].kind, again[2].step, again[2].metrics) == ("rollbacks", 5, {"rollbacks": 1})
    assert again[2].text == "went back to step 4"


def test_an_evaluation_that_is_owed_is_said(tmp_path):
    saver = tmp_path / "checkpoints"
    first = make_trainer(Checkpointing(saver))
    first.add_event_handler(
        TrainingEvents.FLLM_EVALUATION_STARTED(once=1), lambda engine: engine.interrupt_run(15)
    )
    first.run()
    kept = Kept()
    second = make_trainer(kept, Checkpointing(saver))
    second.resume(saver / "step-00000004")
    second.run()
    assert kept.calls[0] == ("cut_back", 4, True)
    assert kept.calls[1][1].kind == "val"


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), KeyError("x"), MemoryError(), RuntimeError("by test")],
    ids=repr,
)
@pytest.mark.parametrize("method", ["write", "cut_back", "close"])
def test_an_error_of_any_kind_is_one_warning_and_changes_nothing(caplog, without, method, error):
    kept = Kept(**{method: [error] * 100})
    trainer = make_trainer(kept)
    with caplog.at_level(logging.WARNING, "fundamentallm"):
        trainer.run()
    assert same(weights(trainer), without)
    (warning,) = warnings(caplog)
    assert warning.startswith("the test's list cannot be written, training goes on: ")
    assert ("No space left" if isinstance(error, OSError) else repr(error)) in warning


def test_the_traceback_is_in_the_log(caplog):
    with caplog.at_level(logging.DEBUG, "fundamentallm"):
        make_trainer(Kept(write=[KeyError("x")])).run()
    (record,) = [r for r in caplog.records if r.exc_info]
    assert record.levelno == logging.DEBUG
    assert "failure 1 in a row" in record.getMessage()


def test_it_is_closed_and_tried_again_until_it_failed_three_times_in_a_row():
    error = OSError("by the test")
    kept = Kept(write=[error, error, None, error, error, error])
    make_trainer(kept).run()
    # A write, a close after each failure, and after the third failure nothing, not even an end.
    assert [call[0] for call in kept.calls] == [
        "cut_back",
        *("write", "close") * 2,
        "write",
        *("write", "close") * 3,
    ]


def test_the_next_run_tries_again():
    kept = Kept(write=[OSError("by the test")] * 3)
    trainer = make_trainer(kept, total_steps=4)
    trainer.run()
    assert kept.steps() == [1, 2, 3]
    trainer.run(max_iters=6)
    assert kept.steps()[3:] == [5, 6, 6]


def test_a_metric_that_is_no_number_is_left_out_and_said_once(caplog, tmp_path):
    values: dict[str, Any] = {
        "train/tensor": torch.tensor(0.5),
        "train/text": "much",
        "train/many": torch.zeros(2),
        "train/none": None,
    }
    kept = Kept()
    trainer = make_trainer(kept, MetricsLog(tmp_path), total_steps=2)
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda engine: engine.state.metrics.update(values)
    )
    trainer.run()
    for call in kept.calls:
        if call[0] == "write" and call[1].kind == "train":
            assert call[1].metrics["train/tensor"] == 0.5
            assert not {"train/text", "train/many", "train/none"} & call[1].metrics.keys()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["train/tensor"] for line in lines[:2]] == [0.5, 0.5]
    lacks = [w for w in warnings(caplog) if "the test's list lacks" in w]
    assert len(lacks) == 3


LOGGERS = [MetricsLog, TensorBoard, "sqlite"]


@pytest.mark.parametrize("kind", LOGGERS)
def test_a_full_disk_costs_records_only(tmp_path, caplog, without, kind):
    """The system itself refuses to let a file grow beyond 200 bytes."""
    logger = (sqlite_log() if kind == "sqlite" else kind)(tmp_path)
    trainer = make_trainer(logger)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with caplog.at_level(logging.WARNING, "fundamentallm"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
        try:
            trainer.run()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert same(weights(trainer), without)
    (warning,) = warnings(caplog)
    assert warning.startswith(f"{logger.target} cannot be written, training goes on")


def test_lines_after_a_full_disk_are_whole(tmp_path):
    log = MetricsLog(tmp_path)

    def write(step: int) -> None:
        log.write(Record("train", step, 1, step, 0.0, {"train/loss": 1.0}))

    write(1)
    size = (tmp_path / "metrics.jsonl").stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, hard))
    try:
        write(2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    write(3)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 3]


def test_the_example_tells_one_history_after_a_rollback(tmp_path):
    log = sqlite_log()(tmp_path)
    trainer = make_trainer(
        log, NaNRollback(), Checkpointing(tmp_path / "checkpoints"), SpoiltGradient(6)
    )
    trainer.run()
    assert trainer.state.rollbacks == 1
    with closing(sqlite3.connect(log.path)) as database:
        losses = database.execute("SELECT step, value FROM metrics WHERE name = 'train/loss'")
        rows = losses.fetchall()
        marks = database.execute("SELECT step, kind FROM metrics WHERE kind NOT IN ('train','val')")
        assert marks.fetchall() == [(6, "incidents"), (6, "incidents"), (5, "rollbacks")]
    assert [step for step, _ in rows] == list(range(1, 9))
    assert [value for step, value in rows if step != 6] == [
        loss for step, loss in enumerate(trainer.history.train_loss, 1) if step != 6
    ]


def test_the_example_stays_short():
    lines = [line for line in EXAMPLE.read_text().splitlines() if line.strip()]
    assert len(lines) < 60
