"""Early stopping and the best checkpoint by a validation metric that a user names."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
from ignite.metrics import Accuracy, Metric

from fundamentallm.compute.distributed import Ranks
from fundamentallm.config.training import TrainingConfig
from fundamentallm.errors import ConfigError
from fundamentallm.events import TrainingEvents
from fundamentallm.testing import tiny_loaders, tiny_model
from fundamentallm.training.checkpoint.scores import Scores
from fundamentallm.training.handlers import Checkpointing, EarlyStopping, Evaluation
from fundamentallm.training.trainer import Trainer

VALUES = [0.1, 0.3, 0.5, 0.4, 0.5, 0.2, 0.6, 0.7]  # of the evaluation after each step
CHOICE: dict[str, Any] = {"metric": "val/own", "mode": "max"}


class Dictated(Metric):
    """A metric that has the value that a test dictates for the step."""

    trainer: Trainer

    def __init__(self, values: list[Any]) -> None:
        self.values = values
        super().__init__()

    def reset(self) -> None:
        """Nothing is kept."""

    def update(self, output: Any) -> None:
        """Nothing is measured."""

    def compute(self) -> Any:
        return self.values[self.trainer.state.iteration - 1]


def made(steps: int, *handlers: Any) -> Trainer:
    """Return a trainer that evaluates after each of its steps."""
    config = TrainingConfig(total_steps=steps, eval_steps=1, checkpoint_steps=1)
    return Trainer(tiny_model(), *tiny_loaders(), device="cpu", config=config, handlers=handlers)


def trained(directory: Any, *handlers: Any, values: list[Any] = VALUES) -> Trainer:
    """Return a trainer that evaluates after each step; `val/own` is then as dictated."""
    if not any(isinstance(handler, Checkpointing) for handler in handlers):
        handlers = (*handlers, Checkpointing(directory / "checkpoints", **CHOICE))
    trainer = made(8, Evaluation(), *handlers)
    metric = Dictated(values)
    metric.trainer = trainer
    metric.attach(trainer.evaluator, "own")
    return trainer


@pytest.mark.parametrize(
    ("options", "values", "expected"),
    [
        ({"patience": 2}, [0.1, 0.2, 0.3, 0.4], None),
        ({"patience": 2}, [0.3, 0.2, 0.1], 3),
        ({"patience": 1}, [0.3, 0.3], 2),
        ({"patience": 2, "min_delta": 0.1}, [0.3, 0.35, 0.39], 3),
        ({"patience": 2, "min_delta": 0.1}, [0.3, 0.35, 0.41], None),
        ({"patience": 2}, [math.nan, 0.1, math.nan, math.inf], 4),
        ({"patience": 1, "mode": "min"}, [0.3, 0.2, 0.1], None),
        ({"patience": 1, "mode": "min"}, [0.3, 0.4], 2),
    ],
)
def test_stops_after_patience_evaluations(options, values, expected):
    handler = EarlyStopping(**{**CHOICE, **options})
    reasons: list[str] = []
    trainer: Any = SimpleNamespace(ranks=Ranks(), finish=reasons.append)
    ended = None
    for number, value in enumerate(values, 1):
        trainer.state = SimpleNamespace(iteration=number, metrics={"val/own": value})
        handler.judge(trainer)
        if reasons and ended is None:
            ended = number
    assert ended == expected


def test_the_metric_ends_a_run_and_names_the_best(tmp_path):
    trainer = trained(tmp_path, EarlyStopping(patience=3, **CHOICE))
    trainer.run()
    assert trainer.state.iteration == 6
    assert trainer.finished == "no higher val/own in 3 evaluations (best 0.5000)"
    best = tmp_path / "checkpoints" / "step-00000003"
    assert (tmp_path / "checkpoints" / "best").read_text().strip() == best.name
    scores = {score.step: score for score in Scores(tmp_path / "checkpoints").all()}
    assert [scores[step].value for step in range(1, 7)] == VALUES[:6]
    assert {scores[step].metric for step in range(1, 7)} == {"val/own"}


def test_it_goes_on_from_a_checkpoint_as_if_nothing_had_happened(tmp_path):
    whole = trained(tmp_path / "whole", EarlyStopping(patience=3, **CHOICE))
    whole.run()
    first = trained(tmp_path / "cut", EarlyStopping(patience=3, **CHOICE))
    first.add_event_handler(
        TrainingEvents.FLLM_EVALUATION_STARTED(once=5), lambda trainer: trainer.interrupt()
    )
    first.run()
    second = trained(tmp_path / "cut", EarlyStopping(patience=3, **CHOICE))
    second.resume(first.state.last_checkpoint)
    second.run()
    assert (second.state.iteration, second.finished) == (6, whole.finished)
    for name in ("best", "scores.jsonl"):
        files = [tmp_path / place / "checkpoints" / name for place in ("whole", "cut")]
        lines = [file.read_text().splitlines() for file in files]
        steps = [
            [(one["step"], one["value"]) for one in map(json.loads, text) if one["measured"]]
            if name == "scores.jsonl"
            else text
            for text in lines
        ]
        assert steps[0] == steps[1]


def test_after_a_rollback_the_best_is_that_of_the_way_taken(tmp_path):
    values = [0.1, 0.2, 0.3, 0.9, 0.25, 0.26, 0.27, 0.28]
    trainer = trained(tmp_path, EarlyStopping(patience=4, **CHOICE), values=values)
    handlers = {type(one).__name__: one for one in trainer.attached.values()}

    @trainer.on(TrainingEvents.FLLM_EVALUATION_COMPLETED)
    def go_back_once() -> None:
        if trainer.state.metrics["val/own"] == 0.9:
            values[3] = 0.2
            trainer.roll_back("test", before=2)

    trainer.run()
    assert trainer.state.rollbacks == 1
    assert handlers["Checkpointing"].best_step == 3
    assert handlers["EarlyStopping"].best == 0.3
    assert trainer.finished.startswith("no higher val/own in 4 evaluations (best 0.3000)")
    assert trainer.state.iteration == 7


def test_what_measures_it_may_be_attached_until_the_run_starts(tmp_path):
    trainer = made(1, Evaluation())
    EarlyStopping(metric="val/accuracy", mode="max").attach(trainer)
    Accuracy().attach(trainer.evaluator, "accuracy")
    trainer.run()
    assert trainer.state.iteration == 1


def with_accuracy(handler: Any) -> Trainer:
    trainer = made(2, Evaluation(), handler)
    Accuracy().attach(trainer.evaluator, "accuracy")
    return trainer


@pytest.mark.parametrize("kind", ["early stopping", "best"])
def test_an_unknown_metric_is_refused_before_the_first_step(tmp_path, kind):
    options: dict[str, Any] = {"metric": "val/acuracy", "mode": "max"}
    handler = EarlyStopping(**options) if kind != "best" else Checkpointing(tmp_path, **options)
    trainer = with_accuracy(handler)
    with pytest.raises(ConfigError, match="does not measure 'val/acuracy'") as caught:
        trainer.run()
    assert caught.value.expected == "val/loss, val/perplexity, val/accuracy"
    assert caught.value.key == "metric"
    assert trainer.state.iteration == 0


def test_a_metric_with_several_results_is_judged_by_one_and_told_at_the_first_evaluation(tmp_path):
    several = [{"own_a": value, "own_b": 1.0} for value in VALUES]
    handler = EarlyStopping(patience=3, metric="val/own_a", mode="max")
    best = Checkpointing(tmp_path / "a", metric="val/own_a", mode="max")
    trainer = trained(tmp_path, handler, best, values=several)
    trainer.run()
    assert (trainer.state.iteration, best.best_step) == (6, 3)
    wrong = EarlyStopping(metric="val/own_c", mode="max")
    with pytest.raises(ConfigError, match="does not measure 'val/own_c'") as caught:
        trained(tmp_path / "b", wrong, values=several).run()
    assert caught.value.expected == "val/loss, val/perplexity, val/own_a, val/own_b"


class OwnEvaluation:
    """Measures without the evaluator."""

    role = "evaluation"

    def attach(self, trainer: Trainer) -> None:
        trainer.add_event_handler(TrainingEvents.FLLM_EVALUATION_DUE, self.measure)

    def measure(self, trainer: Trainer) -> None:
        trainer.notify(TrainingEvents.FLLM_EVALUATION_STARTED)
        trainer.state.metrics.update({"val/loss": 1.0, "val/perplexity": 2.0, "val/bleu": 0.5})
        trainer.state.evaluated_step = trainer.state.iteration
        trainer.notify(TrainingEvents.FLLM_EVALUATION_COMPLETED)


def test_an_evaluation_of_ones_own_measures_what_it_likes():
    trainer = made(9, OwnEvaluation(), EarlyStopping(2, metric="val/bleu", mode="max"))
    trainer.run()
    assert trainer.state.iteration == 3


def test_a_direction_is_needed_where_none_is_known(tmp_path):
    for make in (EarlyStopping, lambda **given: Checkpointing(tmp_path, **given)):
        with pytest.raises(ConfigError, match="lower or a higher val/accuracy is better") as caught:
            make(metric="val/accuracy")
        assert (caught.value.key, caught.value.expected) == ("mode", "min or max")
        for name in ("loss", "perplexity", "bits_per_byte"):
            assert make(metric=f"val/{name}").criterion.lower


def test_what_was_saved_by_another_metric_does_not_count(tmp_path):
    by_loss, by_own = EarlyStopping(), EarlyStopping(**CHOICE)
    assert by_loss.state_dict().keys() == {"best", "waited"}
    by_loss.best, by_loss.waited = 1.5, 2
    by_own.load_state_dict(by_loss.state_dict())
    assert (by_own.best, by_own.waited) == (-math.inf, 0)
    by_own.best, by_own.waited = 0.4, 1
    again = EarlyStopping(**CHOICE)
    again.load_state_dict(by_own.state_dict())
    assert (again.best, again.waited) == (0.4, 1)
    again.load_state_dict(EarlyStopping(metric="val/own", mode="min").state_dict())
    assert (again.best, again.waited) == (-math.inf, 0)

    default, chosen = Checkpointing(tmp_path), Checkpointing(tmp_path, **CHOICE)
    assert default.state_dict() == {"best_score": -math.inf, "best_step": None}
    default.best_score, default.best_step = -1.5, 4
    chosen.load_state_dict(default.state_dict())
    assert (chosen.best_score, chosen.best_step) == (-math.inf, None)
    chosen.best_score, chosen.best_step = 0.4, 4
    default.load_state_dict(chosen.state_dict())
    assert (default.best_score, default.best_step) == (-math.inf, None)
    other = Checkpointing(tmp_path, **CHOICE)
    other.load_state_dict(chosen.state_dict())
    assert (other.best_score, other.best_step) == (0.4, 4)
