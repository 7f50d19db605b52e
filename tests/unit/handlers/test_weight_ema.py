"""Averages of the weights against float64 sums over the weights of every update."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fundamentallm.config.training import TrainingConfig
from fundamentallm.events import TrainingEvents
from fundamentallm.testing import tiny_loaders, tiny_model
from fundamentallm.training.handlers import Checkpointing, Evaluation, WeightEMA
from fundamentallm.training.trainer import Trainer


def make_trainer(*handlers, **options) -> Trainer:
    torch.manual_seed(0)
    train, val = tiny_loaders()
    config = TrainingConfig(**{"learning_rate": 3e-2, "total_steps": 6, **options})
    return Trainer(tiny_model(), train, val, device="cpu", config=config, handlers=handlers)


def weights_of(trainer: Trainer) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}


def record_weights(trainer: Trainer) -> list[dict[str, Tensor]]:
    """The initial weights and those after each applied update."""
    recorded = [weights_of(trainer)]
    trainer.add_event_handler(
        TrainingEvents.FLLM_OPTIMIZER_STEPPED, lambda: recorded.append(weights_of(trainer))
    )
    return recorded


def reference(recorded: list[dict[str, Tensor]], decay: float) -> dict[str, Tensor]:
    averages = {name: weight.double() for name, weight in recorded[0].items()}
    for n, weights in enumerate(recorded[1:], 1):
        d = min(decay, (1 + n) / (10 + n))
        for name, average in averages.items():
            averages[name] = d * average + (1 - d) * weights[name].double()
    return averages


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        assert torch.equal(tensor, expected[name]), name


# 0.25 is above the warmup's decay at first and below it later: both sides of the minimum.
@pytest.mark.parametrize("decay", [0.0, 0.25, 0.999])
def test_follows_the_formula(decay):
    ema = WeightEMA(decay)
    trainer = make_trainer(ema)
    recorded = record_weights(trainer)
    trainer.run()
    assert ema.num_updates == 6
    expected = reference(recorded, decay)
    assert ema.averages.keys() == expected.keys()
    for name, average in ema.averages.items():
        assert average.dtype == torch.float32
        torch.testing.assert_close(average.double(), expected[name], rtol=1e-6, atol=1e-7)
        if decay == 0.999:
            assert not torch.equal(average, recorded[-1][name])


def test_a_rejected_step_leaves_it_untouched():
    ema = WeightEMA(0.9)
    trainer = make_trainer(ema)
    recorded = record_weights(trainer)
    averages: dict[int, dict[str, Tensor]] = {}

    def veto(engine: Trainer) -> None:
        if engine.state.iteration == 4:
            engine.reject_step("by the test")

    def note(engine: Trainer) -> None:
        averages[engine.state.iteration] = {k: v.clone() for k, v in ema.averages.items()}

    trainer.add_event_handler(TrainingEvents.FLLM_GRADIENTS_READY, veto)
    trainer.add_event_handler(TrainingEvents.FLLM_METRICS_READY, note)
    trainer.run()
    assert trainer.state.skipped_steps == 1
    assert_same(averages[4], averages[3])
    assert ema.num_updates == 5
    for name, tensor in reference(recorded, 0.9).items():
        torch.testing.assert_close(ema.averages[name].double(), tensor, rtol=1e-6, atol=1e-7)


def test_training_is_bitwise_the_same_without_it():
    with_it, without = make_trainer(WeightEMA(0.5)), make_trainer()
    with_it.run()
    without.run()
    assert_same(weights_of(with_it), weights_of(without))


def test_swaps_in_and_back_even_when_the_block_fails():
    ema = WeightEMA(0.9)
    trainer = make_trainer(ema)
    trainer.run()
    before = weights_of(trainer)

    class StopHereError(Exception):
        pass

    def inside() -> None:
        with trainer.evaluation_weights():
            assert_same(weights_of(trainer), ema.averages)
            next(trainer.model.parameters()).data.fill_(math.nan)
            raise StopHereError

    with pytest.raises(StopHereError):
        inside()
    assert_same(weights_of(trainer), before)


def test_swapping_before_the_first_run_changes_nothing():
    trainer = make_trainer(WeightEMA())
    before = weights_of(trainer)
    with trainer.evaluation_weights():
        assert_same(weights_of(trainer), before)
    assert_same(weights_of(trainer), before)


def test_validation_uses_the_averages():
    ema = WeightEMA(0.9)
    trainer = make_trainer(ema, Evaluation())
    trainer.run()
    raw = make_trainer(Evaluation())
    raw.run()
    assert trainer.history.train_loss == raw.history.train_loss
    raw.model.load_state_dict(ema.averages, strict=False)
    expected = raw.validate()["val/loss"]
    assert trainer.history.val_loss == [expected]
    assert raw.history.val_loss[0] != expected


def test_a_resumed_run_has_the_same_averages(tmp_path):
    whole = WeightEMA(0.9)
    make_trainer(whole, Checkpointing(tmp_path), checkpoint_steps=3).run()
    ema = WeightEMA(0.9)
    resumed = make_trainer(ema, Checkpointing(tmp_path), checkpoint_steps=3)
    resumed.resume(tmp_path / "step-00000003")
    assert ema.num_updates == 3
    resumed.run()
    assert resumed.history.steps == [4, 5, 6]
    assert_same(ema.averages, whole.averages)
    assert ema.num_updates == whole.num_updates


def test_refuses_averages_of_another_model():
    ema, other = WeightEMA(), WeightEMA()
    make_trainer(ema).run()
    train, _ = tiny_loaders()
    Trainer(tiny_model(num_layers=1), train, device="cpu", handlers=[other])
    with pytest.raises(ValueError, match="averages belong to another model"):
        other.load_state_dict(ema.state_dict())


@pytest.mark.parametrize("decay", [-0.5, 1.0, math.nan])
def test_refuses_a_decay_outside_its_range(decay):
    with pytest.raises(ValueError, match=r"decay must lie in \[0, 1\)"):
        WeightEMA(decay)
