"""Numerical faults put into real training: what is taken back, and when it gives up."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Container
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fundamentallm.config.training import TrainingConfig
from fundamentallm.errors import NumericalError
from fundamentallm.events import TrainingEvents
from fundamentallm.testing import tiny_loaders, tiny_model
from fundamentallm.training.handlers import (
    Checkpointing,
    Evaluation,
    LossEMA,
    NaNRollback,
    Perplexity,
)
from fundamentallm.training.losses import compute_loss
from fundamentallm.training.trainer import Trainer


class FaultyLoss:
    """Cross-entropy that breaks at given calls, one call a step."""

    is_nll = True

    def __init__(self, calls: Container[int] = (), factor: float = math.nan) -> None:
        self.calls = calls
        self.factor = factor
        self.count = 0

    def __call__(self, logits: Tensor, targets: Tensor, reduction: str = "sum") -> Tensor:
        self.count += 1
        loss = compute_loss(logits, targets, reduction)
        return loss * self.factor if self.count in self.calls else loss


class Unbounded:
    """All calls from the first on."""

    def __init__(self, first: int) -> None:
        self.first = first

    def __contains__(self, call: int) -> bool:
        return call >= self.first


def make_trainer(
    directory: Path | None,
    loss_fn: Callable[..., Tensor] | None = None,
    rollback: NaNRollback | None = None,
    **options: Any,
) -> Trainer:
    torch.manual_seed(3)
    train, val = tiny_loaders()
    fields = {"total_steps": 14, "eval_steps": 4, "learning_rate": 1e-2, **options}
    handlers: list[Any] = [rollback or NaNRollback(), LossEMA(0.8), Perplexity(), Evaluation()]
    if directory is not None:
        handlers.append(Checkpointing(directory))
    return Trainer(
        tiny_model(dropout=0.1),
        train,
        val,
        loss_fn=loss_fn or FaultyLoss(),
        device="cpu",
        config=TrainingConfig(**fields),
        handlers=handlers,
    )


def assert_same_run(one: Trainer, other: Trainer) -> None:
    for (name, a), b in zip(one.model.named_parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert one.history.steps == other.history.steps
    # A window that was passed over has a loss of NaN, which equals nothing.
    assert json.dumps(one.history.train_loss) == json.dumps(other.history.train_loss)
    assert one.history.loss_ema == other.history.loss_ema
    assert one.history.validations == other.history.validations
    assert one.history.epochs == other.history.epochs
    for name in ("tokens_seen", "optimizer_steps", "skipped_steps", "evaluations"):
        assert getattr(one.state, name) == getattr(other.state, name), name


# Within an epoch, at its first and last step, right after a checkpoint, at the run's ends.
@pytest.mark.parametrize("step", [1, 5, 7, 10, 11, 14])
@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_one_fault_is_a_run_told_to_skip_that_window(tmp_path, step, factor):
    broken = make_trainer(tmp_path / "broken", FaultyLoss([step], factor))
    broken.run()
    assert broken.ledger == {step}
    assert broken.state.rollbacks == 1
    assert broken.state.incidents == 1
    assert broken.state.iteration == 14

    told = make_trainer(tmp_path / "told")
    told.ledger = {step}
    told.run()
    assert told.state.rollbacks == 0
    assert_same_run(broken, told)


def test_skipping_a_window_is_not_training_on_it():
    told = make_trainer(None)
    told.ledger = {5}
    told.run()
    whole = make_trainer(None)  # seeds dropout as well
    whole.run()
    assert told.state.optimizer_steps == 13
    assert whole.state.optimizer_steps == 14
    assert told.history.train_loss[:4] == whole.history.train_loss[:4]
    assert math.isnan(told.history.train_loss[4])
    assert told.history.train_loss[5:] != whole.history.train_loss[5:]


def test_two_faults_in_one_region(tmp_path):
    # Call 6 is step 6; after the way back to step 4, calls 7, 8 are steps 5 and 7.
    broken = make_trainer(tmp_path / "broken", FaultyLoss([6, 8]))
    broken.run()
    assert broken.ledger == {6, 7}
    assert broken.state.rollbacks == 2
    told = make_trainer(tmp_path / "told")
    told.ledger = {6, 7}
    told.run()
    assert_same_run(broken, told)


def test_a_gradient_that_is_not_finite_is_a_fault_too(tmp_path):
    trainer = make_trainer(tmp_path)
    outputs = []
    done = []

    def poison(gradient: Tensor) -> Tensor:
        if trainer.state.iteration == 6 and not done:
            done.append(True)
            return torch.full_like(gradient, math.inf)
        return gradient

    next(trainer.model.parameters()).register_hook(poison)
    trainer.add_event_handler(
        TrainingEvents.FLLM_INCIDENT_DETECTED, lambda: outputs.append(trainer.state.output)
    )
    trainer.run()
    (output,) = outputs
    assert math.isfinite(output.loss)
    assert not math.isfinite(output.grad_norm)
    assert trainer.ledger == {6}
    assert trainer.state.rollbacks == 1


def test_goes_back_to_the_newest_checkpoint(tmp_path):
    trainer = make_trainer(tmp_path, FaultyLoss([7]))
    steps = []
    trainer.add_event_handler(
        TrainingEvents.FLLM_ROLLED_BACK, lambda engine: steps.append(engine.state.iteration)
    )
    trainer.run()
    assert steps == [4]
    assert trainer.history.steps == list(range(1, 15))


def test_without_checkpoints_only_the_window_is_skipped():
    trainer = make_trainer(None, FaultyLoss([5]))
    trainer.run()
    assert trainer.state.rollbacks == 0
    assert trainer.state.skipped_steps == 1
    assert trainer.state.optimizer_steps == 13
    assert math.isnan(trainer.history.train_loss[4])
    assert all(bool(torch.isfinite(p).all()) for p in trainer.model.parameters())


def test_a_lasting_fault_ends_the_run_within_bounds(tmp_path):
    loss = FaultyLoss(Unbounded(6))
    trainer = make_trainer(tmp_path, loss, NaNRollback(max_rollbacks=10, max_per_region=3))
    with pytest.raises(NumericalError, match=r"after 3 rollbacks to step 4") as error:
        trainer.run()
    assert error.value.exit_code == NumericalError.exit_code
    assert trainer.state.rollbacks == 3
    # Five good calls, the first fault, then after each way back the next window faults.
    assert loss.count == 6 + 3
    restored = make_trainer(tmp_path)
    restored.resume(tmp_path / "step-00000004")
    assert restored.state.iteration == 4


def test_gives_up_after_the_rollbacks_of_the_whole_run(tmp_path):
    # One fault in each region between two checkpoints.
    trainer = make_trainer(
        tmp_path, FaultyLoss([2, 7, 13]), NaNRollback(max_rollbacks=2, max_per_region=3)
    )
    with pytest.raises(NumericalError, match="after 2 rollbacks"):
        trainer.run()
    assert trainer.state.rollbacks == 2


def test_faults_in_a_row_end_a_run_without_checkpoints_too():
    trainer = make_trainer(None, FaultyLoss(Unbounded(3)), NaNRollback(max_rollbacks=4))
    with pytest.raises(NumericalError):
        trainer.run()
    assert trainer.state.iteration <= 3 + 4


def test_the_weights_are_untouched_by_the_faulty_step(tmp_path):
    trainer = make_trainer(None, FaultyLoss([5]))
    seen: dict[int, list[Tensor]] = {}
    trainer.add_event_handler(
        TrainingEvents.FLLM_METRICS_READY,
        lambda engine: seen.__setitem__(
            engine.state.iteration, [p.detach().clone() for p in engine.model.parameters()]
        ),
    )
    trainer.run()
    assert all(torch.equal(a, b) for a, b in zip(seen[4], seen[5], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(seen[5], seen[6], strict=True))


def test_a_controllers_own_refusal_is_no_fault(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.add_event_handler(
        TrainingEvents.FLLM_GRADIENTS_READY,
        lambda engine: engine.reject_step("too large") if engine.state.iteration == 5 else None,
    )
    trainer.run()
    assert trainer.state.skipped_steps == 1
    assert trainer.state.rollbacks == 0
    assert trainer.ledger == set()


def refuse(handler: NaNRollback, rejection: str, times: int = 1) -> list[list[int]]:
    """Hand refused steps over; return the windows of each rollback that was asked for."""
    asked: list[list[int]] = []
    state = SimpleNamespace(iteration=0)
    trainer: Any = SimpleNamespace(
        state=state,
        restore_step=lambda: 0,
        roll_back=lambda skip, reason: asked.append(list(skip)),
    )
    for step in range(1, times + 1):
        state.iteration = step
        state.output = SimpleNamespace(rejection=rejection, loss=2.0, grad_norm=math.inf)
        handler.judge(trainer)
    return asked


def test_overflows_count_only_in_a_row():
    handler = NaNRollback(max_overflows=3)
    for _ in range(4):
        assert refuse(handler, "overflow", 2) == []
        handler.recover()
    with pytest.raises(NumericalError, match="3 fp16 overflows in a row"):
        refuse(handler, "overflow", 3)


@pytest.mark.parametrize("rejection", ["ledger", "empty", "a controller's reason"])
def test_other_refusals_ask_for_nothing(rejection):
    assert refuse(NaNRollback(max_rollbacks=0), rejection, 5) == []


def test_a_resumed_run_has_no_fresh_allowance(tmp_path):
    first = make_trainer(tmp_path, FaultyLoss([2, 7]), NaNRollback(max_rollbacks=2))
    first.run()
    assert first.state.rollbacks == 2
    resumed = make_trainer(tmp_path, FaultyLoss([1]), NaNRollback(max_rollbacks=2), total_steps=18)
    resumed.resume(tmp_path / "step-00000014")
    with pytest.raises(NumericalError, match="after 2 rollbacks"):
        resumed.run()
