"""metrics.jsonl: what a reader finds in it after runs of every kind."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Events
from tests.losses import NaNAt

from fundamentallm.config.training import TrainingConfig
from fundamentallm.events import TrainingEvents
from fundamentallm.testing import SpoiltGradient, tiny_loaders, tiny_model
from fundamentallm.training.handlers import (
    Checkpointing,
    Evaluation,
    LossEMA,
    MetricsLog,
    NaNRollback,
    Schedule,
)
from fundamentallm.training.handlers.logs import json_number
from fundamentallm.training.trainer import Trainer


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
        handlers=[LossEMA(), MetricsLog(directory), Evaluation(), *handlers],
    )
    Schedule(trainer.scheduler).attach(trainer)
    return trainer


def refuse_constant(name: str) -> float:
    raise AssertionError(f"{name} is no JSON")


def read(directory: Path) -> list[dict[str, Any]]:
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").split("\n")
    assert lines.pop() == ""
    return [json.loads(line, parse_constant=refuse_constant) for line in lines]


def steps(records: list[dict[str, Any]], key: str) -> list[int]:
    return [record["step"] for record in records if key in record]


def untimed(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k != "elapsed_seconds"} for record in records]


def test_one_line_for_each_logging_step_and_each_validation(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.run()
    records = read(tmp_path)
    # Every three steps, at the epoch's end (ten steps) and at the last step.
    assert steps(records, "train/loss") == [3, 6, 9, 10, 12]
    assert steps(records, "val/loss") == [4, 8, 10, 12]
    assert [record["step"] for record in records] == [3, 4, 6, 8, 9, 10, 10, 12, 12]
    history = trainer.history
    for record in records:
        step = record["step"]
        assert record["epoch"] == (1 if step <= 10 else 2)
        # 4 sequences of 8 tokens a step, 3 in the tenth.
        assert record["tokens"] == 32 * step - (8 if step >= 10 else 0)
        if "train/loss" in record:
            assert record["train/loss"] == history.train_loss[step - 1]
            assert record["train/loss_ema"] == history.loss_ema[step - 1]
            assert record["train/lr"] == history.lr[step - 1]
            assert not any(key.startswith("val/") for key in record)
        else:
            assert not any(key.startswith("train/") for key in record)
    by_step = {entry["step"]: entry for entry in history.validations}
    for record in records:
        if "val/loss" in record:
            assert record["val/loss"] == by_step[record["step"]]["val_loss"]
            assert record["val/perplexity"] == by_step[record["step"]]["perplexity"]
    elapsed = [record["elapsed_seconds"] for record in records]
    assert elapsed == sorted(elapsed)
    assert elapsed[0] >= 0


def test_a_loss_that_is_not_a_number_is_written_by_name(tmp_path):
    make_trainer(tmp_path, loss_fn=NaNAt(6), log_steps=1).run()
    (record,) = [r for r in read(tmp_path) if r["step"] == 6 and "train/loss" in r]
    assert record["train/loss"] == "NaN"
    assert record["train/grad_norm"] == "NaN"
    assert isinstance(record["train/loss_ema"], float)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(math.nan, "NaN"), (math.inf, "Infinity"), (-math.inf, "-Infinity"), (0.25, 0.25), (3, 3)],
)
def test_json_has_no_other_way_to_say_it(value, expected):
    assert json_number(value) == expected


def test_a_rollback_leaves_one_history(tmp_path):
    broken, told = tmp_path / "broken", tmp_path / "told"
    for directory in (broken, told):
        directory.mkdir()
    trainer = make_trainer(
        broken,
        NaNRollback(),
        SpoiltGradient(7),
        Checkpointing(tmp_path / "one"),
        log_steps=1,
    )
    trainer.run()
    assert trainer.state.rollbacks == 1
    other = make_trainer(told, NaNRollback(), Checkpointing(tmp_path / "two"), log_steps=1)
    other.interventions.skip({7})
    other.run()
    assert untimed(read(broken)) == untimed(read(told))
    assert steps(read(broken), "train/loss") == list(range(1, 13))


def interrupt(trainer: Trainer, event: Any) -> None:
    trainer.add_event_handler(event, lambda engine: engine.interrupt_run(15))


def resumed_after(
    tmp_path: Path, whole: bool, event: Any = None, spoil: str = "", step: int = 0
) -> list[dict[str, Any]]:
    directory = tmp_path / ("whole" if whole else "cut")
    directory.mkdir()
    saver = directory / "checkpoints"
    options = {"log_steps": 1, "checkpoint_steps": 4, "eval_steps": 4}
    first = make_trainer(directory, Checkpointing(saver), **options)
    if whole:
        first.run()
        return untimed(read(directory))
    if event is not None:
        interrupt(first, event)
    first.run()
    with (directory / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(spoil)
    second = make_trainer(directory, Checkpointing(saver), **options)
    second.resume(saver / f"step-{step:08d}")
    second.run()
    return untimed(read(directory))


@pytest.mark.parametrize(
    ("event", "spoil", "step"),
    [
        # stopped in the middle, before a validation began, and during one
        (Events.ITERATION_COMPLETED(once=6), "", 6),
        (Events.ITERATION_COMPLETED(once=8), "", 8),
        (TrainingEvents.FLLM_EVALUATION_STARTED(once=2), "", 8),
        # back to an earlier checkpoint of a run that went on
        (None, "", 4),
        # killed while a line was being written
        (Events.ITERATION_COMPLETED(once=6), '{"step": 7, "epo', 6),
        (Events.ITERATION_COMPLETED(once=6), '{"step": 6, "epoch": 1}', 6),
        (Events.ITERATION_COMPLETED(once=6), "no json\n[1]\nnull\n", 6),
    ],
)
def test_a_resume_leaves_one_history(tmp_path, event, spoil, step):
    assert resumed_after(tmp_path, False, event, spoil, step) == resumed_after(tmp_path, True)


def test_a_disk_that_fails_is_told_once_and_training_goes_on(tmp_path, caplog):
    (tmp_path / "metrics.jsonl").mkdir()  # cannot be opened for writing, whoever asks
    trainer = make_trainer(tmp_path, log_steps=1)
    with caplog.at_level(logging.WARNING, "fundamentallm"):
        trainer.run()
    assert trainer.state.iteration == 12
    warnings = [r for r in caplog.records if "metrics.jsonl cannot be written" in r.getMessage()]
    assert len(warnings) == 1


def test_goes_on_writing_when_the_disk_has_recovered(tmp_path, caplog):
    (tmp_path / "metrics.jsonl").mkdir()
    trainer = make_trainer(tmp_path, log_steps=1)
    trainer.add_event_handler(
        TrainingEvents.FLLM_EVALUATION_STARTED(once=1), (tmp_path / "metrics.jsonl").rmdir
    )
    trainer.run()
    assert steps(read(tmp_path), "train/loss") == list(range(5, 13))
    assert "cannot be written" in caplog.text


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
