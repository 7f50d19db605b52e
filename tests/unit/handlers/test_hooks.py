"""What the three plain functions are called with, and when."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from fundamentallm.config.training import TrainingConfig
from fundamentallm.testing import tiny_loaders, tiny_model
from fundamentallm.training.handlers import Checkpointing, Evaluation, Hooks
from fundamentallm.training.trainer import Trainer


def make_trainer(directory: Path, hooks: Hooks) -> Trainer:
    train, val = tiny_loaders()
    config = TrainingConfig(total_steps=12, eval_steps=4, checkpoint_steps=6)
    return Trainer(
        tiny_model(),
        train,
        val,
        device="cpu",
        config=config,
        handlers=[hooks, Evaluation(), Checkpointing(directory)],
    )


def test_each_is_called_at_its_moment_with_its_arguments(tmp_path):
    calls: list[tuple[str, int, Any]] = []

    def on_epoch_end(trainer: Trainer, metrics: dict[str, Any]) -> None:
        calls.append(("epoch", trainer.state.iteration, metrics["train/epoch_loss"]))

    def on_validation(trainer: Trainer, metrics: dict[str, Any]) -> None:
        calls.append(("validation", trainer.state.iteration, metrics["val/loss"]))

    def on_checkpoint(trainer: Trainer, path: Path) -> None:
        assert path.is_dir()
        calls.append(("checkpoint", trainer.state.iteration, path.name))

    trainer = make_trainer(tmp_path, Hooks(on_epoch_end, on_validation, on_checkpoint))
    trainer.run()
    val = {entry["step"]: entry["val_loss"] for entry in trainer.history.validations}
    (epoch,) = trainer.history.epochs
    assert math.isfinite(epoch["train_loss"])
    assert calls == [
        ("checkpoint", 0, "step-00000000"),
        ("validation", 4, val[4]),
        ("checkpoint", 6, "step-00000006"),
        ("validation", 8, val[8]),
        ("validation", 10, val[10]),
        ("epoch", 10, epoch["train_loss"]),
        ("checkpoint", 12, "step-00000012"),
        ("validation", 12, val[12]),
    ]


@pytest.mark.parametrize("name", ["on_epoch_end", "on_validation", "on_checkpoint"])
def test_each_works_alone(tmp_path, name):
    calls = []
    hooks = Hooks(**{name: lambda trainer, _: calls.append(trainer)})
    trainer = make_trainer(tmp_path, hooks)
    trainer.run()
    expected = {"on_epoch_end": 1, "on_validation": 4, "on_checkpoint": 3}
    assert calls == [trainer] * expected[name]


def test_none_at_all_attaches_nothing(tmp_path):
    train, _ = tiny_loaders()
    trainer = Trainer(tiny_model(), train, device="cpu")
    before = trainer.timeline()
    Hooks().attach(trainer)
    assert trainer.timeline() == before
