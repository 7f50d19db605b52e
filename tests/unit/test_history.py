"""A run's history: what it records, what a rollback takes out."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fundamentallm.training.history import History


def metrics(step: int) -> dict[str, float]:
    return {
        "train/loss": 10.0 - step,
        "train/loss_ema": 20.0 - step,
        "train/lr": 0.1 * step,
        "train/tokens_per_second": 100.0 * step,
        "train/grad_norm": 1.0,
    }


def filled(steps: int, every: int = 2) -> History:
    history = History()
    for step in range(1, steps + 1):
        history.record_step(step, metrics(step))
        if step % every == 0:
            history.record_epoch(step // every, step, 5.0 / step)
            history.record_validation(
                step, {"val/loss": 6.0 / step, "val/perplexity": math.exp(6.0 / step)}
            )
    return history


def test_records_each_metric_in_its_list():
    history = filled(3)
    assert history.steps == [1, 2, 3]
    assert history.train_loss == [9.0, 8.0, 7.0]
    assert history.loss_ema == [19.0, 18.0, 17.0]
    assert history.lr == pytest.approx([0.1, 0.2, 0.3])
    assert history.throughput_tokens_per_sec == [100.0, 200.0, 300.0]
    assert history.epochs == [{"epoch": 1, "step": 2, "train_loss": 2.5}]
    assert history.epoch_train_loss == [2.5]
    assert history.validations == [{"step": 2, "val_loss": 3.0, "perplexity": math.exp(3.0)}]
    assert history.val_loss == [3.0]
    assert history.perplexity == [math.exp(3.0)]


def test_lists_of_metrics_that_nobody_writes_stay_empty():
    history = History()
    history.record_step(1, {"train/loss": 2.0})
    assert (history.steps, history.train_loss) == ([1], [2.0])
    assert history.loss_ema == history.lr == history.throughput_tokens_per_sec == []


@given(steps=st.integers(0, 12), back_to=st.integers(0, 14))
def test_cut_back_is_a_history_that_never_went_on(steps, back_to):
    history = filled(steps)
    history.cut_back(back_to)
    assert history == filled(min(steps, back_to))


def test_cut_back_of_a_history_that_begins_at_a_resume():
    history = History()
    for step in (5, 6, 7):
        history.record_step(step, metrics(step))
    history.cut_back(6)
    assert history.steps == [5, 6]
    assert history.train_loss == [5.0, 4.0]
    history.cut_back(4)
    assert history.steps == history.train_loss == []


@pytest.mark.parametrize(
    ("losses", "best"),
    [
        ([], None),
        ([3.0, 1.0, 2.0], 1.0),
        ([math.nan, 3.0, math.nan, 2.0], 2.0),
        ([math.nan], None),
        ([math.inf, 4.0], 4.0),
    ],
)
def test_the_best_validation_loss_is_never_a_nan(losses, best):
    history = History()
    for step, loss in enumerate(losses, 1):
        history.record_validation(step, {"val/loss": loss, "val/perplexity": 1.0})
    assert history.best_val_loss == best


def test_two_histories_share_nothing():
    filled(2)
    assert History().steps == []
