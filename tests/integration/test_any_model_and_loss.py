"""A module and a loss that know nothing of this package, resumed bit for bit; from the examples."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from fundamentallm.config.training import TrainingConfig
from fundamentallm.testing import tiny_loaders, tiny_model
from fundamentallm.training.handlers import HANDLERS, Checkpointing, MetricsLog
from fundamentallm.training.losses import LOSSES
from fundamentallm.training.trainer import Trainer

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def example(monkeypatch) -> Iterator[Any]:
    """Import an example; what it registers is gone after the test."""
    monkeypatch.syspath_prepend(EXAMPLES)
    for registry in (LOSSES, HANDLERS):
        monkeypatch.setattr(registry, "_factories", dict(registry._factories))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) == str(EXAMPLES / f"{name}.py"):
            del sys.modules[name]


def test_an_lstm_goes_on_bit_for_bit_and_learns(example, capsys):
    assert example("lstm").main()
    said = capsys.readouterr().out
    assert "weights equal, bit for bit: True" in said
    accuracy = float(said.split("accuracy ")[1].split(",")[0])
    assert accuracy > 0.3  # a guess is right once in eleven


def penalized(own_loss: ModuleType, directory: Path, steps: int) -> Trainer:
    torch.manual_seed(0)
    config = TrainingConfig(
        learning_rate=1e-2, total_steps=steps, log_steps=1, accumulation_steps=2
    )
    return Trainer(
        tiny_model(dropout=0.1),
        *tiny_loaders(accumulation_steps=2),
        loss_fn=own_loss.ConfidencePenalty(0.2),
        device="cpu",
        config=config,
        handlers=[
            own_loss.PredictionEntropy(),
            Checkpointing(directory / "checkpoints"),
            MetricsLog(directory),
        ],
    )


def lines(directory: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in line if key != "elapsed_seconds"} for line in found]


def test_a_loss_with_a_second_output_goes_on_bit_for_bit(example, tmp_path):
    own_loss = example("own_loss")
    whole = penalized(own_loss, tmp_path / "whole", 7)
    whole.train()
    penalized(own_loss, tmp_path / "parts", 3).train()
    second = penalized(own_loss, tmp_path / "parts", 7)
    second.resume(tmp_path / "parts" / "checkpoints" / "step-00000003")
    second.train()
    for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)
    course = {line["step"]: line for line in lines(tmp_path / "whole") if "train/loss" in line}
    again = {line["step"]: line for line in lines(tmp_path / "parts") if "train/loss" in line}
    assert again == course
    assert all(0 < line["train/entropy"] < 2.4 for line in course.values())


def test_its_second_output_is_the_mean_over_the_step_and_its_loss_the_definition(example):
    own_loss = example("own_loss")
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    targets = torch.tensor([[1, -100, 4], [0, 2, -100]])
    loss = LOSSES.build("confidence_penalty", {"beta": 0.3})
    halves = [loss(logits[row], targets[row]) for row in (0, 1)]
    nll = entropy = 0.0
    for row, target in zip(logits.reshape(-1, 5), targets.reshape(-1), strict=True):
        if target >= 0:
            p = row.exp() / row.exp().sum()
            nll -= float(p[target].log())
            entropy -= float((p * p.log()).sum())
    assert float(sum(halves)) == pytest.approx(nll - 0.3 * entropy, rel=1e-6)
    assert loss.parts.tolist() == pytest.approx([entropy, 4], rel=1e-6)
    with pytest.raises(ValueError, match="needs the loss confidence_penalty"):
        Trainer(
            tiny_model(), *tiny_loaders(), device="cpu", handlers=[own_loss.PredictionEntropy()]
        )
