"""When validation runs, and what it measures, against a loop over the model's own logits."""

from __future__ import annotations

import logging
import math
from contextlib import contextmanager

import pytest
import torch
from ignite.metrics import Average, MetricGroup

from fundamentallm.config.training import TrainingConfig
from fundamentallm.data.loaders import Batching, ValidationLoader
from fundamentallm.events import TrainingEvents
from fundamentallm.testing import UniformModel, tiny_loaders, tiny_model, tiny_tokens
from fundamentallm.training.handlers import Checkpointing, Evaluation
from fundamentallm.training.trainer import Trainer

# tiny_loaders has ten steps in an epoch.


def make_trainer(*handlers, **options) -> Trainer:
    torch.manual_seed(0)
    train, val = tiny_loaders()
    config = TrainingConfig(**{"learning_rate": 1e-2, **options})
    return Trainer(
        tiny_model(dropout=0.1), train, val, device="cpu", config=config, handlers=handlers
    )


@pytest.mark.parametrize(
    ("total_steps", "eval_steps", "expected"),
    [
        (12, 4, [4, 8, 10, 12]),
        (10, 5, [5, 10]),
        (13, 100, [10, 13]),
        (3, 1, [1, 2, 3]),
        (20, 10, [10, 20]),
    ],
)
def test_runs_when_it_is_due_and_once_a_step(total_steps, eval_steps, expected):
    trainer = make_trainer(Evaluation(), total_steps=total_steps, eval_steps=eval_steps)
    completed = []
    trainer.add_event_handler(
        TrainingEvents.FLLM_EVALUATION_COMPLETED,
        lambda engine: completed.append(engine.state.iteration),
    )
    trainer.run()
    assert completed == expected
    assert [entry["step"] for entry in trainer.history.validations] == expected
    assert trainer.state.evaluations == len(expected)


def test_runs_at_the_last_step_of_a_run_that_ends_early():
    trainer = make_trainer(Evaluation(), total_steps=9, max_tokens=5 * 32)
    trainer.run()
    assert [entry["step"] for entry in trainer.history.validations] == [5]


def naive_loss(model: torch.nn.Module, tokens: list[int], length: int) -> float:
    """Nats per target, each from the logits of its own window, summed in float64."""
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(tokens) - 1, length):
        window = tokens[start : start + length + 1]
        with torch.no_grad():
            logits = model(torch.tensor([window[:-1]]))[0].double()
        for row, target in zip(logits, window[1:], strict=True):
            total += float(torch.logsumexp(row, 0) - row[target])
            count += 1
    return total / count


def test_measures_every_target_once():
    trainer = make_trainer(Evaluation(), total_steps=4)
    trainer.run()
    expected = naive_loss(trainer.model, tiny_tokens()[320:].tolist(), 8)
    metrics = trainer.state.metrics
    assert metrics["val/loss"] == pytest.approx(expected, rel=1e-6)
    assert metrics["val/perplexity"] == pytest.approx(math.exp(expected), rel=1e-6)
    assert trainer.history.val_loss == [metrics["val/loss"]]
    assert trainer.history.perplexity == [metrics["val/perplexity"]]


def test_a_uniform_model_has_the_logarithm_of_the_vocabulary():
    train, val = tiny_loaders()
    trainer = Trainer(UniformModel(11), train, val, device="cpu")
    assert trainer.validate()["val/loss"] == pytest.approx(math.log(11), rel=1e-6)


def test_training_is_bitwise_the_same_without_it():
    with_it = make_trainer(Evaluation(), total_steps=6, eval_steps=1)
    with_it.run()
    without = make_trainer(total_steps=6, eval_steps=1)  # seeds dropout as well
    without.run()
    assert with_it.history.val_loss
    assert not without.history.val_loss
    assert with_it.history.train_loss == without.history.train_loss
    for a, b in zip(with_it.model.parameters(), without.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "val_loader",
    [None, [], ValidationLoader(tiny_tokens(1), Batching(sequence_length=8, batch_size=4))],
)
def test_does_nothing_without_validation_data(val_loader):
    train, _ = tiny_loaders()
    config = TrainingConfig(total_steps=3, eval_steps=1)
    trainer = Trainer(
        tiny_model(), train, val_loader, device="cpu", config=config, handlers=[Evaluation()]
    )
    fired = []
    trainer.add_event_handler(TrainingEvents.FLLM_EVALUATION_STARTED, lambda: fired.append("start"))
    trainer.add_event_handler(TrainingEvents.FLLM_EVALUATION_COMPLETED, lambda: fired.append("end"))
    trainer.run()
    assert fired == []
    assert trainer.state.evaluations == 0
    assert "val/loss" not in trainer.state.metrics
    assert not trainer.evaluation_pending()


def test_without_a_handler_that_evaluates_none_is_owed():
    trainer = make_trainer(total_steps=2, eval_steps=1)
    trainer.run()
    assert trainer.finished
    assert not trainer.evaluation_pending()


def test_one_validation_batch_is_enough():
    train, _ = tiny_loaders()
    val = ValidationLoader(tiny_tokens(10), Batching(sequence_length=8, batch_size=4))
    assert len(val) == 1
    trainer = Trainer(UniformModel(11), train, val, device="cpu")
    assert trainer.validate()["val/loss"] == pytest.approx(math.log(11), rel=1e-6)


def test_evaluates_with_the_weights_that_a_handler_puts_in():
    trainer = Trainer(UniformModel(11), *tiny_loaders(), device="cpu")
    bias = trainer.model.bias.data
    bias[0] = 5.0

    @contextmanager
    def uniform():
        kept = bias.clone()
        bias.zero_()
        yield
        bias.copy_(kept)

    assert trainer.validate()["val/loss"] > 3.0
    trainer.evaluate_with(uniform)
    assert trainer.validate()["val/loss"] == pytest.approx(math.log(11), rel=1e-6)
    assert bias[0] == 5.0


def test_a_mapping_of_results_is_shown_item_by_item():
    trainer = make_trainer()
    group = MetricGroup({"first": Average(lambda x: 1.0), "second": Average(lambda x: 2.0)})
    group.attach(trainer.evaluator, "group")
    metrics = trainer.validate()
    assert set(metrics) == {"val/loss", "val/perplexity", "val/first", "val/second"}
    assert (metrics["val/first"], metrics["val/second"]) == (1.0, 2.0)


def test_a_signal_cuts_it_short_and_the_resumed_run_makes_up_for_it(tmp_path):
    def trainer() -> Trainer:
        return make_trainer(
            Evaluation(), Checkpointing(tmp_path), total_steps=6, eval_steps=3, checkpoint_steps=100
        )

    cut = trainer()
    completed = []
    cut.add_event_handler(
        TrainingEvents.FLLM_EVALUATION_STARTED, lambda engine: engine.interrupt_run(15)
    )
    cut.add_event_handler(TrainingEvents.FLLM_EVALUATION_COMPLETED, completed.append)
    cut.run()
    assert completed == []
    assert cut.state.iteration == 3
    assert cut.state.evaluations == 0
    assert not cut.finished

    whole = make_trainer(Evaluation(), total_steps=6, eval_steps=3)
    whole.run()
    resumed = trainer()
    resumed.resume(tmp_path / "step-00000003")
    resumed.run()
    assert resumed.history.validations == whole.history.validations
    assert resumed.state.evaluations == whole.state.evaluations == 2


def test_tells_the_losses(caplog):
    trainer = make_trainer(Evaluation(), total_steps=2)
    with caplog.at_level(logging.INFO, "fundamentallm"):
        trainer.run()
    (line,) = [r.getMessage() for r in caplog.records if "validation loss" in r.getMessage()]
    metrics = trainer.state.metrics
    assert line.startswith(
        f"step 2: validation loss {metrics['val/loss']:.4f},"
        f" perplexity {metrics['val/perplexity']:.3f} ("
    )
