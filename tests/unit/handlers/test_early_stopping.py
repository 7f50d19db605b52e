"""Early stopping by validation losses that a test dictates."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from fundamentallm.config.training import TrainingConfig
from fundamentallm.events import TrainingEvents
from fundamentallm.testing import tiny_loaders, tiny_model
from fundamentallm.training.handlers import Checkpointing, EarlyStopping, Evaluation
from fundamentallm.training.trainer import Trainer

NAN = math.nan


def stops_at(handler: EarlyStopping, losses: list[float]) -> int | None:
    """Return the number of the evaluation, from 1, after which the run is told to finish."""
    reasons: list[str] = []
    state = SimpleNamespace(iteration=0, metrics={})
    trainer: Any = SimpleNamespace(state=state, finish=reasons.append)
    for number, loss in enumerate(losses, 1):
        state.iteration, state.metrics = number, {"val/loss": loss}
        handler.judge(trainer)
        if reasons:
            return number
    return None


@pytest.mark.parametrize(
    ("patience", "min_delta", "losses", "expected"),
    [
        (2, 0.0, [3.0, 2.0, 1.0, 0.5], None),
        (2, 0.0, [3.0, 3.1, 3.2], 3),
        (1, 0.0, [3.0, 3.0], 2),  # as good as the best is not better
        (2, 0.0, [3.0, 3.1, 2.9, 3.0, 2.95], 5),  # an improvement begins the wait anew
        (2, 0.1, [3.0, 2.95, 2.92], 3),  # too little, twice
        (2, 0.1, [3.0, 2.95, 2.89], None),  # measured from the best, small steps add up
        (2, 0.0, [3.0, NAN, NAN], 3),
        (2, 0.0, [NAN, NAN], 2),
        (2, 0.0, [NAN, 5.0, 6.0, 4.0, NAN, 3.0], None),
        (2, 0.0, [3.0, math.inf, 3.5], 3),
        (3, 0.0, [1.0, 2.0, 2.0, 2.0], 4),
    ],
)
def test_stops_after_patience_evaluations(patience, min_delta, losses, expected):
    assert stops_at(EarlyStopping(patience, min_delta), losses) == expected


def test_goes_on_waiting_from_its_state():
    first, second = EarlyStopping(patience=3), EarlyStopping(patience=3)
    assert stops_at(first, [2.0, 2.5]) is None
    second.load_state_dict(first.state_dict())
    assert stops_at(second, [2.1, 2.2]) == 2


def test_refuses_no_patience():
    with pytest.raises(ValueError, match="patience must be at least 1"):
        EarlyStopping(patience=0)


def dictated_run(losses: list[float], *handlers) -> Trainer:
    """A run of eight steps with an evaluation after each, whose results are `losses`."""
    train, val = tiny_loaders()
    config = TrainingConfig(total_steps=8, eval_steps=1, checkpoint_steps=100)
    trainer = Trainer(
        tiny_model(),
        train,
        val,
        device="cpu",
        config=config,
        handlers=[Evaluation(), *handlers],
    )

    def validate() -> dict[str, float]:
        loss = losses[trainer.state.iteration - 1]
        metrics = {"val/loss": loss, "val/perplexity": math.exp(loss)}
        trainer.state.metrics.update(metrics)
        trainer.state.evaluated_step = trainer.state.iteration
        return metrics

    trainer.validate = validate  # type: ignore[method-assign]
    return trainer


def test_ends_a_real_run_finished_and_saved(tmp_path):
    losses = [3.0, 2.0, 2.5, NAN, 1.0, 1.0, 1.0, 1.0]
    handlers = EarlyStopping(patience=2), Checkpointing(tmp_path)
    trainer = dictated_run(losses, *handlers)
    ended = []
    trainer.add_event_handler(
        TrainingEvents.FLLM_METRICS_READY, lambda engine: ended.append(engine.state.iteration)
    )
    trainer.run()
    assert ended == [1, 2, 3, 4]
    assert "no lower validation loss in 2 evaluations (best 2.0000)" in trainer.finished
    assert (tmp_path / "step-00000004").is_dir()


def test_a_run_that_improves_is_left_alone():
    trainer = dictated_run([8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0], EarlyStopping(patience=1))
    trainer.run()
    assert trainer.state.iteration == 8
    assert trainer.finished == "the last step is done"
