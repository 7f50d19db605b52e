"""The smooth loss against the weighted mean that its formula stands for."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.losses import NaNAt
from tests.properties import examples

from fundamentallm.config.training import TrainingConfig
from fundamentallm.testing import tiny_loaders, tiny_model
from fundamentallm.training.handlers import Checkpointing, LossEMA
from fundamentallm.training.trainer import Trainer

LOSSES = st.floats(0, 50) | st.sampled_from([math.nan, math.inf, -math.inf])


def weighted_mean(losses: list[float], decay: float) -> float:
    """The newest loss weighs 1, the one before decay, then decay^2; NaN and infinity nothing."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    weights = [decay**age for age in reversed(range(len(finite)))]
    if not finite:
        return math.nan
    return math.fsum(w * x for w, x in zip(weights, finite, strict=True)) / math.fsum(weights)


def feed(handler: LossEMA, losses: list[float]) -> list[float]:
    """Hand losses over as a trainer would; return the metric after each."""
    state = SimpleNamespace(output=SimpleNamespace(loss=math.nan, rejection=""), metrics={})
    trainer: Any = SimpleNamespace(state=state)
    values = []
    for loss in losses:
        state.output.loss = loss
        handler.update(trainer)
        values.append(state.metrics["train/loss_ema"])
    return values


@settings(max_examples=examples(100))
@given(st.lists(LOSSES, min_size=1, max_size=30), st.sampled_from([0.0, 0.5, 0.98]))
def test_is_the_weighted_mean_of_the_finite_losses(losses, decay):
    expected = [weighted_mean(losses[: n + 1], decay) for n in range(len(losses))]
    assert feed(LossEMA(decay), losses) == pytest.approx(expected, rel=1e-9, nan_ok=True)


def test_first_value_is_the_first_loss():
    assert feed(LossEMA(0.98), [3.25]) == pytest.approx([3.25], rel=1e-12)


def test_is_nan_before_the_first_loss():
    assert math.isnan(LossEMA().value)


@settings(max_examples=examples(50))
@given(st.lists(LOSSES, max_size=10), st.lists(LOSSES, min_size=1, max_size=10))
def test_goes_on_from_its_state(before, after):
    whole, first, second = LossEMA(0.9), LossEMA(0.9), LossEMA(0.9)
    expected = feed(whole, before + after)[len(before) :]
    feed(first, before)
    second.load_state_dict(first.state_dict())
    assert feed(second, after) == pytest.approx(expected, rel=0, abs=0, nan_ok=True)


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5, math.nan])
def test_refuses_a_decay_outside_its_range(decay):
    with pytest.raises(ValueError, match=r"decay must lie in \[0, 1\)"):
        LossEMA(decay)


def test_follows_a_real_run():
    train, _ = tiny_loaders()
    trainer = Trainer(
        tiny_model(),
        train,
        loss_fn=NaNAt(3),
        device="cpu",
        config=TrainingConfig(total_steps=6, learning_rate=1e-2),
        handlers=[LossEMA(0.8)],
    )
    trainer.run()
    losses = trainer.history.train_loss
    assert [math.isnan(loss) for loss in losses] == [False, False, True, False, False, False]
    expected = [weighted_mean(losses[: n + 1], 0.8) for n in range(6)]
    assert trainer.history.loss_ema == pytest.approx(expected, rel=1e-12)


def test_is_part_of_a_checkpoint(tmp_path):
    def trainer(ema: LossEMA) -> Trainer:
        torch.manual_seed(0)
        train, _ = tiny_loaders()
        config = TrainingConfig(total_steps=6, checkpoint_steps=3, learning_rate=1e-2)
        handlers = [ema, Checkpointing(tmp_path)]
        return Trainer(tiny_model(), train, device="cpu", config=config, handlers=handlers)

    whole = trainer(LossEMA(0.8))
    whole.run()
    resumed = trainer(LossEMA(0.8))
    resumed.resume(tmp_path / "step-00000003")
    resumed.run()
    assert resumed.history.steps == [4, 5, 6]
    assert resumed.history.loss_ema == whole.history.loss_ema[3:]
