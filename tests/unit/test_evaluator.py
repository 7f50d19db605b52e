"""Metrics of Ignite on `trainer.evaluator`: equal to a second engine's, without a second pass."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ignite.engine import Engine, Events
from ignite.handlers import EarlyStopping, ProgressBar
from ignite.metrics import (
    Accuracy,
    Average,
    ConfusionMatrix,
    Entropy,
    EpochMetric,
    Loss,
    Metric,
    MetricGroup,
    Recall,
    RunningAverage,
    TopKCategoricalAccuracy,
)
from torch import Tensor

from fundamentallm.config.training import TrainingConfig
from fundamentallm.data.loaders import Batching, ValidationLoader
from fundamentallm.errors import DataError
from fundamentallm.events import TrainingEvents
from fundamentallm.testing import tiny_loaders, tiny_model, tiny_tokens
from fundamentallm.training.handlers import Checkpointing, Evaluation, MetricsLog, WeightEMA
from fundamentallm.training.losses import ChunkedCrossEntropy
from fundamentallm.training.trainer import Trainer


class MeanRank(Metric):
    """The mean place of the target among all tokens, from 0: a metric of one's own."""

    def reset(self) -> None:
        self.places: list[int] = []

    def update(self, output: Any) -> None:
        y_pred, y = output
        own = y_pred.gather(1, y[:, None])
        self.places += (y_pred > own).sum(1).tolist()

    def compute(self) -> float:
        return sum(self.places) / len(self.places)


METRICS: dict[str, Any] = {
    "accuracy": Accuracy,
    "top_k": lambda: TopKCategoricalAccuracy(3),
    "cross_entropy": lambda: Loss(F.cross_entropy),
    "entropy": Entropy,
    "recall": lambda: Recall(average="macro"),
    "confusion": lambda: ConfusionMatrix(11),
    "errors": lambda: 1 - Accuracy(),
    "mean_rank": MeanRank,
    "running": lambda: RunningAverage(Accuracy()),
    "largest": lambda: Average(output_transform=lambda output: output[0].max(1).values.sum()),
    "all_at_once": lambda: EpochMetric(
        lambda y_pred, y: float((y_pred.argmax(1) == y).double().mean()), check_compute_fn=False
    ),
}


def make_trainer(*handlers: Any, **options: Any) -> Trainer:
    torch.manual_seed(0)
    train, val = tiny_loaders()
    loss_fn = options.pop("loss_fn", None)
    config = TrainingConfig(**{"learning_rate": 1e-2, **options})
    model = tiny_model(dropout=0.1)
    return Trainer(
        model, train, val, loss_fn=loss_fn, device="cpu", config=config, handlers=handlers
    )


def second_engine(trainer: Trainer, metrics: dict[str, Metric]) -> dict[str, Any]:
    """What a plain Ignite evaluator measures in a pass of its own."""

    def step(_: Engine, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            logits = trainer.model(batch["input_ids"])
        valid = batch["target_ids"] >= 0
        return logits[valid], batch["target_ids"][valid]

    engine = Engine(step)
    for name, metric in metrics.items():
        metric.attach(engine, name)
    trainer.model.eval()
    engine.run(trainer.val_loader)
    trainer.model.train()
    return dict(engine.state.metrics)


def attach_all(trainer: Trainer) -> None:
    for name, build in METRICS.items():
        build().attach(trainer.evaluator, name)


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, Tensor):
            assert torch.equal(found[name], value)
        else:
            assert found[name] == value


# ---------------------------------------------------------------- the same numbers, in one pass


def test_metrics_equal_those_of_a_second_engine_to_the_last_bit():
    trainer = make_trainer(Evaluation(), total_steps=4)
    attach_all(trainer)
    trainer.run()
    found = {name.removeprefix("val/"): v for name, v in trainer.state.metrics.items()}
    expected = second_engine(trainer, {name: build() for name, build in METRICS.items()})
    assert 0 < expected["accuracy"] < 1
    assert_equal({name: found[name] for name in METRICS}, expected)


def test_metrics_cost_no_forward_pass_and_change_no_other_number():
    def course(*attachers: Any) -> tuple[list[int], list[float], list[float], Tensor]:
        trainer = make_trainer(Evaluation(), total_steps=6, eval_steps=2)
        calls = [0, 0]
        trainer.model.register_forward_hook(
            lambda model, *_: calls.__setitem__(model.training, calls[model.training] + 1)
        )
        for attach in attachers:
            attach(trainer)
        trainer.run()
        return calls, trainer.history.val_loss, trainer.history.train_loss, torch.get_rng_state()

    plain, measured = course(), course(attach_all)
    assert plain[0] == [9, 6]  # three batches of validation, three times
    assert plain[:3] == measured[:3]
    assert torch.equal(plain[3], measured[3])


def test_two_evaluations_do_not_add_up():
    trainer = make_trainer()
    Accuracy().attach(trainer.evaluator, "accuracy")
    assert trainer.validate() == trainer.validate()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_logits_of_a_loss_on_hidden_states_are_those_of_the_head(precision):
    plain = make_trainer(precision=precision)
    chunked = make_trainer(precision=precision, loss_fn=ChunkedCrossEntropy(3))
    for trainer in (plain, chunked):
        for name in ("accuracy", "cross_entropy"):
            METRICS[name]().attach(trainer.evaluator, name)
    ours, theirs = plain.validate(), chunked.validate()
    assert theirs["val/accuracy"] == ours["val/accuracy"]
    assert theirs["val/cross_entropy"] == pytest.approx(ours["val/cross_entropy"], rel=1e-6)
    assert theirs["val/cross_entropy"] == pytest.approx(theirs["val/loss"], rel=1e-6)


def test_logits_are_made_only_while_somebody_listens():
    trainer = make_trainer(loss_fn=ChunkedCrossEntropy(3))
    heads = []
    head = trainer.model.logits_from_hidden
    trainer.model.logits_from_hidden = lambda hidden: heads.append(len(hidden)) or head(hidden)
    trainer.validate()
    assert max(heads) == 3
    seen = []
    handle = trainer.evaluator.add_event_handler(
        Events.ITERATION_COMPLETED, lambda engine: seen.append(engine.state.output)
    )
    trainer.validate()
    assert [(output.y_pred.shape, output.y.shape) for output in seen] == [
        ((32, 11), (32,)),
        ((32, 11), (32,)),
        ((15, 11), (15,)),  # without the masked targets
    ]
    assert {output.y_pred.dtype for output in seen} == {torch.float32}
    assert trainer.evaluator.state.output is None  # the logits are not kept
    handle.remove()
    heads.clear()
    trainer.validate()
    assert max(heads) == 3


def test_the_averaged_weights_are_measured_where_there_are_some():
    trainer = make_trainer(WeightEMA(0.5), Evaluation(), total_steps=4)
    attach_all(trainer)
    trainer.run()
    found = trainer.evaluator.state.metrics
    metrics = {name: build() for name, build in METRICS.items()}
    raw = second_engine(trainer, metrics)
    with trainer.evaluation_weights():
        averaged = second_engine(trainer, {name: build() for name, build in METRICS.items()})
    assert found["cross_entropy"] == averaged["cross_entropy"] != raw["cross_entropy"]


def test_other_data_can_be_measured_in_the_same_way():
    trainer = make_trainer()
    Accuracy().attach(trainer.evaluator, "accuracy")
    other = ValidationLoader(tiny_tokens(100, seed=5), Batching(8, 4))
    metrics = dict(trainer.evaluator.run(other).metrics)
    assert trainer.evaluator.num_tokens == 99
    assert metrics.keys() == {"loss", "perplexity", "accuracy"}
    assert trainer.state.metrics == {}
    with pytest.raises(ValueError, match="one pass"):
        trainer.evaluator.run(other, max_epochs=2)
    trainer.evaluator.run(other, epoch_length=1)
    assert trainer.evaluator.num_tokens == 32


def test_a_batch_without_a_valid_target_is_passed_over():
    batches = list(tiny_loaders()[1])
    empty = {**batches[0], "target_ids": torch.full_like(batches[0]["target_ids"], -100)}
    trainer = make_trainer()
    Loss(F.cross_entropy).attach(trainer.evaluator, "cross_entropy")
    expected = dict(trainer.evaluator.run(batches).metrics)
    assert trainer.evaluator.run([empty, *batches, empty]).metrics == expected


# ---------------------------------------------------------------- where the numbers go


def test_they_go_wherever_the_loss_goes(tmp_path, caplog):
    trainer = make_trainer(Evaluation(), MetricsLog(tmp_path), total_steps=2)
    Accuracy().attach(trainer.evaluator, "accuracy")
    MetricGroup({"first": Accuracy(), "third": TopKCategoricalAccuracy(3)}).attach(
        trainer.evaluator, "group"
    )
    with caplog.at_level(logging.INFO, "fundamentallm"):
        trainer.run()
    metrics = trainer.state.metrics
    assert metrics["val/accuracy"] == metrics["val/first"] < metrics["val/third"]
    assert "val/group" not in metrics
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    (line,) = [line for line in lines if "val/loss" in line]
    assert line["val/accuracy"] == metrics["val/accuracy"]
    assert trainer.history.validations == [
        {
            "step": 2,
            "val_loss": metrics["val/loss"],
            **{name: metrics[f"val/{name}"] for name in ("perplexity", "accuracy")},
            **{name: metrics[f"val/{name}"] for name in ("first", "third")},
        }
    ]
    said = f"perplexity {metrics['val/perplexity']:.3f}, accuracy {metrics['val/accuracy']:.4g}, "
    assert said in caplog.text


@pytest.mark.parametrize("name", ["loss", "perplexity"])
def test_a_name_that_is_taken_is_refused_when_it_is_attached(name):
    trainer = make_trainer()
    with pytest.raises(ValueError, match=f"measures '{name}' itself"):
        Loss(F.cross_entropy).attach(trainer.evaluator, name)


# ---------------------------------------------------------------- handlers of the evaluator


def test_a_pass_that_is_cut_short_computes_nothing_and_counts_as_none():
    trainer = make_trainer(Evaluation(), total_steps=4, eval_steps=2)
    Accuracy().attach(trainer.evaluator, "accuracy")
    heard = []
    for event in (Events.EPOCH_COMPLETED, Events.TERMINATE, Events.COMPLETED):
        trainer.evaluator.add_event_handler(event, lambda name: heard.append(name), event.name)
    trainer.evaluator.add_event_handler(
        Events.ITERATION_COMPLETED(once=2),
        lambda engine: engine.terminate() if trainer.state.iteration == 2 else None,
    )
    trainer.run()
    assert heard == ["TERMINATE", "EPOCH_COMPLETED", "COMPLETED"]
    assert [entry["step"] for entry in trainer.history.validations] == [4]
    assert trainer.state.evaluations == 1


def test_data_that_cannot_be_read_is_the_error_and_not_a_metric_without_examples():
    trainer = make_trainer()
    Accuracy().attach(trainer.evaluator, "accuracy")

    def broken() -> Any:
        raise DataError("gone", where="val.tokens")
        yield

    with pytest.raises(DataError, match="gone"):
        trainer.evaluator.run(broken())
    assert trainer.validate()  # the next pass is whole again


def test_a_bar_of_ignite_shows_the_pass(capsys):
    trainer = make_trainer()
    ProgressBar(persist=True).attach(trainer.evaluator)
    trainer.validate()
    assert "[3/?]" in capsys.readouterr().err


def early_stopping(trainer: Trainer) -> EarlyStopping:
    handler = EarlyStopping(
        1, lambda engine: -engine.state.iteration * trainer.state.iteration, trainer
    )
    trainer.evaluator.add_event_handler(Events.COMPLETED, handler)
    return handler


def test_terminate_inside_an_evaluation_ends_the_run_there_with_the_handler_s_state(tmp_path):
    trainer = make_trainer(Evaluation(), Checkpointing(tmp_path), total_steps=9, eval_steps=3)
    early_stopping(trainer)
    completed = []
    trainer.add_event_handler(
        TrainingEvents.FLLM_EVALUATION_COMPLETED, lambda: completed.append(trainer.state.iteration)
    )
    trainer.run()
    assert trainer.finished == "stopped by EarlyStopping"
    assert completed == [3, 6]
    assert trainer.state.iteration == 6
    assert (tmp_path / "step-00000006").is_dir()

    again = make_trainer(Evaluation(), Checkpointing(tmp_path), total_steps=9, eval_steps=3)
    handler = early_stopping(again)
    again.resume(tmp_path / "step-00000006")
    assert handler.best_score == -9  # of step 3, in the state of step 6
    again.run()
    assert again.state.iteration == 9


def test_the_handlers_of_the_evaluator_are_not_metrics_of_a_checkpoint():
    trainer = make_trainer()
    attach_all(trainer)
    early_stopping(trainer)
    assert set(trainer.attached) == {"EarlyStopping"}
