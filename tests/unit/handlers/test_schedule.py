"""The rate that each update really uses, against the schedule's own formula."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fundamentallm.compute.distributed import Ranks
from fundamentallm.config.training import TrainingConfig
from fundamentallm.testing import SpoiltGradient, tiny_loaders, tiny_model
from fundamentallm.training.handlers import Checkpointing, NaNRollback, Schedule
from fundamentallm.training.limits import Budget, Limits
from fundamentallm.training.losses import compute_loss
from fundamentallm.training.schedulers import (
    ConstantLRScheduler,
    CosineAnnealingScheduler,
    LearningRateScheduler,
    LinearWarmup,
)
from fundamentallm.training.state import TrainingState
from fundamentallm.training.trainer import Trainer


class SpyAdam(torch.optim.AdamW):
    """Notes the rates of its groups at each update."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.used: list[list[float]] = []

    def step(self, closure=None):
        self.used.append([group["lr"] for group in self.param_groups])
        return super().step(closure)


def two_groups(model: nn.Module) -> SpyAdam:
    first, *rest = model.parameters()
    return SpyAdam([{"params": [first], "lr": 0.02}, {"params": rest, "lr": 0.005}])


def cosine(step: int, warmup: int, total: int) -> float:
    if step < warmup:
        return step / warmup
    return (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


def test_every_update_uses_the_rate_of_its_own_step():
    model = tiny_model()
    optimizer = two_groups(model)
    train, _ = tiny_loaders()
    schedule = CosineAnnealingScheduler(optimizer, warmup_steps=4, total_steps=13)
    trainer = Trainer(
        model,
        train,
        optimizer=optimizer,
        scheduler=schedule,
        device="cpu",
        config=TrainingConfig(total_steps=13),
        handlers=[Schedule(schedule)],
    )
    trainer.run()
    multipliers = [cosine(step, 4, 13) for step in range(1, 14)]
    assert optimizer.used == [pytest.approx([0.02 * m, 0.005 * m], abs=1e-15) for m in multipliers]
    assert trainer.history.lr == [pytest.approx(0.02 * m, abs=1e-15) for m in multipliers]


class BrokenAt:
    is_nll = True

    def __init__(self, call: int) -> None:
        self.call = call
        self.count = 0

    def __call__(self, logits, targets, reduction="sum"):
        self.count += 1
        return compute_loss(logits, targets, reduction) * (
            math.nan if self.count == self.call else 1.0
        )


def test_follows_the_step_through_a_rollback_and_a_skipped_window(tmp_path):
    model = tiny_model()
    optimizer = two_groups(model)
    train, _ = tiny_loaders()
    schedule = CosineAnnealingScheduler(optimizer, warmup_steps=2, total_steps=9)
    trainer = Trainer(
        model,
        train,
        optimizer=optimizer,
        scheduler=schedule,
        device="cpu",
        config=TrainingConfig(total_steps=9, checkpoint_steps=3),
        handlers=[Schedule(schedule), Checkpointing(tmp_path), NaNRollback(), SpoiltGradient(6)],
    )
    trainer.run()
    # Steps 4 and 5 come twice, 6 broke and is passed over the second time.
    steps = [1, 2, 3, 4, 5, 4, 5, 7, 8, 9]
    expected = [0.02 * cosine(step, 2, 9) for step in steps]
    assert [rates[0] for rates in optimizer.used] == pytest.approx(expected, abs=1e-15)


class ByProgress(LearningRateScheduler):
    """A rate that tells what progress it was asked for."""

    def multiplier(self, step: int, progress: float | None = None) -> float:
        return -1.0 if progress is None else progress


@pytest.mark.parametrize("total_steps", [None, 4])
def test_goes_by_the_clock_only_where_the_clock_alone_ends_the_run(total_steps):
    model = tiny_model()
    optimizer = two_groups(model)
    train, _ = tiny_loaders()
    trainer = Trainer(
        model,
        train,
        optimizer=optimizer,
        scheduler=ByProgress(optimizer),
        device="cpu",
        config=TrainingConfig(total_steps=total_steps, max_seconds=5.0),
    )
    Schedule(trainer.scheduler).attach(trainer)
    trainer.budget.clock = lambda: trainer.state.iteration * 1.25
    trainer.run()
    shares = [0.25, 0.5, 0.75, 1.0] if total_steps is None else [-1.0] * 4
    assert trainer.history.lr == pytest.approx([0.02 * share for share in shares])


@pytest.mark.parametrize("rank", [0, 1])
def test_all_ranks_go_by_the_first_ones_clock(rank, monkeypatch):
    budget = Budget(Limits(None, max_seconds=5.0), TrainingState(), Ranks(rank, 2))
    budget.clock = lambda: [1.25, 4.0][rank]
    # What all_reduce gives each rank: its own share and the other's.
    monkeypatch.setattr(
        Ranks, "sum_counts", lambda self, counts: [counts[0] + [0, 250_000_000][self.rank]]
    )
    assert budget.clock_progress() == 0.25


def test_a_resumed_run_goes_on_from_the_progress_in_its_state():
    train, _ = tiny_loaders()
    config = TrainingConfig(total_steps=None, max_seconds=8.0)
    first, second = (Trainer(tiny_model(), train, device="cpu", config=config) for _ in range(2))
    first.budget.clock = lambda: 3.0
    second.budget.clock = lambda: 1.0  # of its own process
    second.load_state_dict(first.state_dict())
    assert second.budget.clock_progress() == 0.5


def test_an_intervention_lowers_the_rate_of_its_steps():
    model = tiny_model()
    optimizer = two_groups(model)
    train, _ = tiny_loaders()
    schedule = ConstantLRScheduler(optimizer)
    handler = Schedule(schedule)
    trainer = Trainer(
        model,
        train,
        optimizer=optimizer,
        scheduler=schedule,
        device="cpu",
        config=TrainingConfig(total_steps=4),
        handlers=[handler],
    )
    trainer.interventions.cut_rate(2, 2, 0.5)
    trainer.run()
    assert optimizer.used == [[0.02, 0.005], [0.01, 0.0025], [0.01, 0.0025], [0.02, 0.005]]
    optimizer.add_param_group({"params": [torch.zeros(1, requires_grad=True)]})
    with pytest.raises(ValueError, match="zip"):  # it has no base rate
        handler.apply(trainer)


def test_the_rates_of_the_next_update_are_told_to_ignite():
    handler = Schedule(LinearWarmup(two_groups(tiny_model()), warmup_steps=8))
    handler.event_index = 3
    assert handler.get_param() == [0.01, 0.0025]


def test_a_trainer_without_a_schedule_keeps_the_rate():
    train, _ = tiny_loaders()
    trainer = Trainer(
        tiny_model(), train, device="cpu", config=TrainingConfig(total_steps=3, learning_rate=0.03)
    )
    Schedule(trainer.scheduler).attach(trainer)
    trainer.run()
    assert trainer.history.lr == [0.03] * 3


def test_state_goes_through_a_round_trip():
    optimizer = two_groups(tiny_model())
    schedule, other = Schedule(ByProgress(optimizer)), Schedule(ByProgress(optimizer))
    schedule.progress = 0.375
    other.load_state_dict(schedule.state_dict())
    assert other.progress == 0.375
    other.load_state_dict({"progress": None})
    assert other.progress is None
