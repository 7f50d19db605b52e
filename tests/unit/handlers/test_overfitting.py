from __future__ import annotations

import pytest

from fundamentallm.testing import tiny_loaders, tiny_model
from fundamentallm.training.handlers import Overfitting
from fundamentallm.training.trainer import Trainer


def told(
    losses: list[tuple[float, float]], caplog: pytest.LogCaptureFixture, patience: int = 3
) -> list[int]:
    """The evaluations after which it warned."""
    handler = Overfitting(patience)
    trainer = Trainer(tiny_model(), *tiny_loaders(), device="cpu")
    found = []
    for number, (train, val) in enumerate(losses):
        trainer.state.metrics.update({"train/loss_ema": train, "val/loss": val})
        caplog.clear()
        handler.compare(trainer)
        if caplog.records:
            found.append(number)
    return found


RISING = [(4.0, 4.0), (3.0, 3.5), (2.5, 3.6), (2.0, 3.9), (1.7, 4.3), (1.6, 4.7), (1.5, 5.0)]


def test_validation_that_rises_while_training_falls_is_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert told(RISING, caplog) == [4]
    assert told(RISING, caplog, patience=1) == [2]


def test_one_evaluation_below_the_last_hides_nothing(caplog: pytest.LogCaptureFixture) -> None:
    losses = [(4.0, 3.5), (3.0, 3.6), (2.5, 3.58), (2.0, 3.9), (1.5, 3.8)]
    assert told(losses, caplog) == [3]


@pytest.mark.parametrize(
    "losses",
    [
        [(4.0 - n / 10, 4.0 - n / 20) for n in range(20)],  # both fall
        [(2.0 + n / 10, 4.0 + n / 10) for n in range(20)],  # both rise: no overfitting
        [(4.0 - n / 10, 3.0 + n % 2) for n in range(20)],  # up and down
        RISING[:4],
        [(4.0 - n / 10, 3.0 + n / 1000) for n in range(20)],  # by less than 1 %
        [(1.0, float("nan"))] * 9,
    ],
)
def test_anything_else_is_not(
    losses: list[tuple[float, float]], caplog: pytest.LogCaptureFixture
) -> None:
    assert told(losses, caplog) == []


def test_it_waits_for_one_evaluation_at_least() -> None:
    with pytest.raises(ValueError, match="patience"):
        Overfitting(0)
