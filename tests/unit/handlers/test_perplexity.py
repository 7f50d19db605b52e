"""Training perplexity against exp of a float64 mean over all tokens of the epoch."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fundamentallm.config.training import TrainingConfig
from fundamentallm.events import TrainingEvents
from fundamentallm.testing import UniformModel, tiny_loaders, tiny_model
from fundamentallm.training.epochs import Epochs
from fundamentallm.training.handlers import Checkpointing, Perplexity
from fundamentallm.training.trainer import Trainer


def feed(
    handler: Perplexity, steps: list[tuple[float, int]], steps_per_epoch: int, first: int = 1
) -> list[float]:
    """Hand (loss, tokens) of consecutive steps over; return the metric after each."""
    state = SimpleNamespace(iteration=first - 1, output=None, metrics={})
    trainer: Any = SimpleNamespace(state=state, epochs=Epochs(steps_per_epoch))
    values = []
    for loss, num_tokens in steps:
        state.iteration += 1
        state.output = SimpleNamespace(loss=loss, num_tokens=num_tokens, rejection="")
        handler.update(trainer)
        values.append(state.metrics["train/perplexity"])
    return values


def test_weighs_each_loss_by_its_tokens():
    values = feed(Perplexity(), [(1.0, 10), (3.0, 30)], steps_per_epoch=2)
    assert values == pytest.approx([math.exp(1.0), math.exp((10 + 90) / 40)], rel=1e-15)


def test_leaves_losses_out_that_are_not_finite():
    steps = [(math.nan, 7), (2.0, 4), (math.inf, 9), (1.0, 4)]
    values = feed(Perplexity(), steps, steps_per_epoch=4)
    assert math.isnan(values[0])
    assert values[1:] == pytest.approx([math.exp(2.0), math.exp(2.0), math.exp(1.5)], rel=1e-15)


def test_leaves_the_loss_of_a_refused_step_out_though_it_is_finite():
    train, _ = tiny_loaders()
    config = TrainingConfig(total_steps=4, learning_rate=1e-2)
    trainer = Trainer(tiny_model(), train, device="cpu", config=config, handlers=[Perplexity()])
    accepted: list[tuple[float, int]] = []

    def refuse() -> None:
        if trainer.state.iteration in (2, 3):
            trainer.reject_step("too steep")

    def note() -> None:
        if trainer.state.iteration in (1, 4):
            accepted.append((trainer.state.output.loss, trainer.state.output.num_tokens))

    trainer.add_event_handler(TrainingEvents.FLLM_GRADIENTS_READY, refuse)
    trainer.add_event_handler(TrainingEvents.FLLM_METRICS_READY, note)
    trainer.run()
    mean = sum(loss * tokens for loss, tokens in accepted) / sum(tokens for _, tokens in accepted)
    assert trainer.state.skipped_steps == len(accepted) == 2
    assert trainer.state.metrics["train/perplexity"] == pytest.approx(math.exp(mean), rel=1e-12)


def test_is_infinite_beyond_float64():
    assert feed(Perplexity(), [(800.0, 1)], steps_per_epoch=1) == [math.inf]


def test_begins_anew_with_an_epoch():
    values = feed(Perplexity(), [(1.0, 5), (2.0, 5), (4.0, 5)], steps_per_epoch=2)
    assert values == pytest.approx([math.exp(1.0), math.exp(1.5), math.exp(4.0)], rel=1e-15)


def test_goes_on_within_an_epoch():
    first, second = Perplexity(), Perplexity()
    feed(first, [(1.0, 10)], steps_per_epoch=3)
    second.load_state_dict(first.state_dict())
    (value,) = feed(second, [(3.0, 30)], steps_per_epoch=3, first=2)
    assert value == pytest.approx(math.exp(100 / 40), rel=1e-15)


def test_of_a_uniform_model_is_the_vocabulary():
    train, _ = tiny_loaders()
    config = TrainingConfig(total_steps=1)
    trainer = Trainer(UniformModel(11), train, device="cpu", config=config, handlers=[Perplexity()])
    trainer.run()
    assert trainer.state.metrics["train/perplexity"] == pytest.approx(11.0, rel=1e-6)


def test_of_a_real_epoch_with_a_short_last_step():
    train, _ = tiny_loaders()
    tokens: list[int] = []
    values: list[float] = []

    class Note:
        def attach(self, trainer: Trainer) -> None:
            trainer.add_event_handler(TrainingEvents.FLLM_METRICS_READY, self.note)

        def note(self, trainer: Trainer) -> None:
            tokens.append(trainer.state.output.num_tokens)
            values.append(trainer.state.metrics["train/perplexity"])

    config = TrainingConfig(num_epochs=1, learning_rate=1e-2)
    trainer = Trainer(
        tiny_model(), train, device="cpu", config=config, handlers=[Perplexity(), Note()]
    )
    trainer.run()
    assert tokens[-1] < tokens[0]
    losses = np.array(trainer.history.train_loss)
    expected = np.exp(np.cumsum(losses * tokens) / np.cumsum(tokens))
    assert values == pytest.approx(expected.tolist(), rel=1e-12)


def test_is_the_same_after_a_resume_inside_an_epoch(tmp_path):
    def trainer() -> Trainer:
        torch.manual_seed(0)
        train, _ = tiny_loaders()
        config = TrainingConfig(total_steps=7, checkpoint_steps=4, learning_rate=1e-2)
        handlers = [Perplexity(), Checkpointing(tmp_path)]
        return Trainer(tiny_model(), train, device="cpu", config=config, handlers=handlers)

    whole = trainer()
    whole.run()
    resumed = trainer()
    resumed.resume(tmp_path / "step-00000004")
    resumed.run()
    assert resumed.history.steps == [5, 6, 7]
    assert resumed.state.metrics["train/perplexity"] == whole.state.metrics["train/perplexity"]
