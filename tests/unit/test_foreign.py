"""Ignite's own handlers and schedulers on a Trainer, against a plain engine and against torch."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from ignite.handlers import (
    BatchSizeScheduler,
    ConcatScheduler,
    CosineAnnealingScheduler,
    EarlyStopping,
    EMAHandler,
    EpochOutputStore,
    FastaiLRFinder,
    LinearCyclicalScheduler,
    LRScheduler,
    ParamGroupScheduler,
    PiecewiseLinear,
    ReduceLROnPlateauScheduler,
    TerminateOnNan,
    create_lr_scheduler_with_warmup,
)
from ignite.handlers.state_param_scheduler import LambdaStateScheduler
from ignite.metrics import Accuracy, Average, Frequency, MetricGroup, RunningAverage
from torch import nn
from torch.optim import Optimizer, lr_scheduler
from torch.utils.data import DataLoader

from fundamentallm.config import TrainingConfig
from fundamentallm.data.loaders import Batching, TokenWindowLoader
from fundamentallm.errors import ConfigError
from fundamentallm.events import TrainingEvents
from fundamentallm.testing import SpoiltGradient, tiny_loaders, tiny_model, tiny_tokens
from fundamentallm.training.handlers import Checkpointing, NaNRollback
from fundamentallm.training.schedulers import LinearWarmup
from fundamentallm.training.step import StepOutput
from fundamentallm.training.trainer import Trainer

STEPS = 10  # an epoch of the tiny loaders


def make_trainer(checkpoint_dir: Path | None = None, **fields: Any) -> Trainer:
    fields = {"eval_steps": 4, "learning_rate": 1e-2, "keep_last": 9, **fields}
    torch.manual_seed(3)
    config = TrainingConfig(checkpoint_dir=str(checkpoint_dir), **fields)
    trainer = Trainer(tiny_model(), *tiny_loaders(), device="cpu", config=config)
    if checkpoint_dir is None:
        trainer._checkpoint_dir = None
    return trainer


def applied_rates(trainer: Trainer) -> list[list[float]]:
    """The rates with which the optimizer takes its steps."""
    rates: list[list[float]] = []
    trainer.optimizer.register_step_pre_hook(
        lambda optimizer, *_: rates.append([group["lr"] for group in optimizer.param_groups])
    )
    return rates


def rates_of_plain_engine(make: Any, event: Any, steps: int) -> list[list[float]]:
    """The rates at each step of Ignite's engine, with a scheduler on an optimizer like ours."""
    optimizer = make_trainer().optimizer
    seen: list[list[float]] = []
    engine = Engine(lambda *_: seen.append([group["lr"] for group in optimizer.param_groups]))
    engine.add_event_handler(event, make(optimizer))
    engine.run(range(STEPS), max_epochs=-(-steps // STEPS))
    return seen[:steps]


SCHEDULES = {
    "piecewise": lambda o: PiecewiseLinear(o, "lr", [(0, 0.0), (3, 0.1), (12, 0.01)]),
    "cosine": lambda o: CosineAnnealingScheduler(o, "lr", 0.1, 0.001, cycle_size=7),
    "cyclical": lambda o: LinearCyclicalScheduler(o, "lr", 0.1, 0.001, cycle_size=6),
    "chained": lambda o: ConcatScheduler(
        [
            PiecewiseLinear(o, "lr", [(0, 0.0), (4, 0.1)]),
            CosineAnnealingScheduler(o, "lr", 0.1, 0.001, cycle_size=9),
        ],
        durations=[5],
    ),
    "groups": lambda o: ParamGroupScheduler(
        [
            PiecewiseLinear(o, "lr", [(0, 0.1 * (index + 1)), (9, 0.0)], param_group_index=index)
            for index in range(len(o.param_groups))
        ]
    ),
    "warmup": lambda o: create_lr_scheduler_with_warmup(
        CosineAnnealingScheduler(o, "lr", 0.1, 0.001, cycle_size=9), 0.0, 4, 0.05
    ),
    "step of torch": lambda o: LRScheduler(lr_scheduler.StepLR(o, 3, 0.5)),
    "lambda of torch": lambda o: LRScheduler(lr_scheduler.LambdaLR(o, lambda e: 1 / (1 + e))),
    "warmup of torch": lambda o: create_lr_scheduler_with_warmup(
        lr_scheduler.StepLR(o, 3, 0.5), 0.0, 4
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_scheduler_of_ignite_sets_the_rates_of_a_plain_engine_also_after_a_resume(
    name: str, tmp_path: Path
) -> None:
    make = SCHEDULES[name]
    if name == "warmup of torch" and len(make_trainer().optimizer.param_groups) > 1:
        pytest.skip("Ignite drops a step for two groups")
    expected = rates_of_plain_engine(make, Events.ITERATION_STARTED, 15)
    trainer = make_trainer(tmp_path, total_steps=15)
    trainer.add_event_handler(Events.ITERATION_STARTED, make(trainer.optimizer))
    seen = applied_rates(trainer)
    trainer.train()
    assert seen == expected
    assert trainer.history.lr == [rates[0] for rates in expected]  # what train/lr says
    assert len({rates[0] for rates in seen}) > 1

    resumed = make_trainer(tmp_path, total_steps=15)
    resumed.add_event_handler(Events.ITERATION_STARTED, make(resumed.optimizer))
    seen = applied_rates(resumed)
    resumed.resume(tmp_path / "step-00000008")
    resumed.train()
    assert seen == expected[8:]
    for ours, theirs in zip(resumed.model.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("event", [Events.EPOCH_STARTED, Events.EPOCH_COMPLETED], ids=str)
def test_a_scheduler_of_epochs_is_called_once_an_epoch_also_if_a_run_is_resumed_inside_one(
    event: Any, tmp_path: Path
) -> None:
    def make(optimizer: Any) -> Any:
        return PiecewiseLinear(optimizer, "lr", [(0, 0.1), (4, 0.01)])

    expected = rates_of_plain_engine(make, event, 25)
    trainer = make_trainer(tmp_path, total_steps=25)
    trainer.add_event_handler(event, make(trainer.optimizer))
    seen = applied_rates(trainer)
    trainer.train()
    assert seen == expected
    for step in (10, 16, 24):  # at an epoch's end, and inside an epoch
        resumed = make_trainer(tmp_path / str(step), total_steps=25)
        resumed.add_event_handler(event, make(resumed.optimizer))
        seen = applied_rates(resumed)
        resumed.resume(tmp_path / f"step-{step:08d}")
        resumed.train()
        assert seen == expected[step:], step


def test_a_rollback_takes_a_scheduler_of_ignite_back_and_lowers_its_rate_where_asked(
    tmp_path: Path,
) -> None:
    def rates(spoilt: tuple[int, ...]) -> list[float]:
        trainer = make_trainer(tmp_path / str(spoilt), total_steps=12)
        for handler in (SpoiltGradient(*spoilt), NaNRollback()):
            handler.attach(trainer)
        SCHEDULES["piecewise"](trainer.optimizer).attach(trainer)
        trainer.interventions.cut_rate(first=2, num_steps=2, factor=0.5)
        trainer.train()
        assert trainer.state.rollbacks == len(spoilt)
        return trainer.history.lr

    whole = rates(())
    plain = [
        r[0] for r in rates_of_plain_engine(SCHEDULES["piecewise"], Events.ITERATION_STARTED, 12)
    ]
    assert whole == [rate * (0.5 if step in (2, 3) else 1) for step, rate in enumerate(plain, 1)]


EIGHT_RATES = [(0.1 * (index + 1), 0.02 * (8 - index)) for index in range(8)]
OF_EIGHT_GROUPS: dict[str, Callable[[Optimizer], list[Any]]] = {
    "one scheduler each": lambda o: [
        PiecewiseLinear(o, "lr", [(0, first), (5, 0.0), (12, last)], param_group_index=index)
        for index, (first, last) in enumerate(EIGHT_RATES)
    ],
    "one for all": lambda o: [
        ParamGroupScheduler(
            [
                CosineAnnealingScheduler(o, "lr", first, last, 7, param_group_index=index)
                for index, (first, last) in enumerate(EIGHT_RATES)
            ]
        )
    ],
    "of other kinds, and one of another option": lambda o: [
        LinearCyclicalScheduler(o, "weight_decay", 0.1, 0.0, 6, param_group_index=3),
        *(
            (PiecewiseLinear(o, "lr", [(0, first), (12, last)], param_group_index=index))
            if index % 2
            else LinearCyclicalScheduler(o, "lr", first, last, 8, param_group_index=index)
            for index, (first, last) in enumerate(EIGHT_RATES)
        ),
    ],
}


def of_eight_groups(model: nn.Module) -> Optimizer:
    """An optimizer of eight groups of parameters, each with a rate and a decay of its own."""
    parameters = list(model.parameters())
    groups = [
        {"params": parameters[index::8], "lr": 0.01 * (index + 1), "weight_decay": 0.001 * index}
        for index in range(8)
    ]
    return torch.optim.AdamW(groups)


def options_of(optimizer: Optimizer) -> list[tuple[float, float]]:
    return [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]


@pytest.mark.parametrize("kind", OF_EIGHT_GROUPS)
@pytest.mark.parametrize("spoilt", [(6,), pytest.param((3, 10), marks=pytest.mark.long)])
def test_a_rollback_takes_the_schedulers_of_many_groups_back(
    kind: str, spoilt: tuple[int, ...], tmp_path: Path
) -> None:
    steps, make = 14, OF_EIGHT_GROUPS[kind]
    plain: list[list[tuple[float, float]]] = []
    optimizer = of_eight_groups(tiny_model())
    engine = Engine(lambda *_: plain.append(options_of(optimizer)))
    for scheduler in make(optimizer):
        engine.add_event_handler(Events.ITERATION_STARTED, scheduler)
    engine.run(range(steps), max_epochs=1)

    model = tiny_model()
    ours = of_eight_groups(model)
    config = TrainingConfig(total_steps=steps, checkpoint_steps=2)
    trainer = Trainer(model, *tiny_loaders(), ours, device="cpu", config=config)
    for handler in (Checkpointing(tmp_path), SpoiltGradient(*spoilt), NaNRollback()):
        handler.attach(trainer)
    for scheduler in make(ours):
        trainer.add_event_handler(Events.ITERATION_STARTED, scheduler)
    seen: list[tuple[int, list[tuple[float, float]]]] = []
    ours.register_step_pre_hook(
        lambda optimizer, *_: seen.append((trainer.state.iteration, options_of(optimizer)))
    )
    trainer.run()
    assert trainer.state.rollbacks == len(spoilt)
    taken = [step for step, _ in seen]
    assert len(taken) > len(set(taken))  # steps were taken a second time
    for step, options in seen:
        assert options == plain[step - 1], step
    assert set(taken) >= set(range(1, steps + 1)) - set(spoilt)


REFUSED_TORCH = {
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=10),
    "linear_warmup": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=5),
    "with restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "warmup_steps": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.StepLR(o, 3)], [3]
    ),
}


@pytest.mark.parametrize("fix", REFUSED_TORCH)
def test_a_scheduler_of_torch_that_ignite_would_falsify_is_refused_when_attached(fix: str) -> None:
    trainer = make_trainer()
    before = copy.deepcopy(trainer.optimizer.state_dict())
    scheduler = REFUSED_TORCH[fix](trainer.optimizer)
    now = copy.deepcopy(trainer.optimizer.state_dict())
    with pytest.raises(ConfigError, match="does not follow torch's") as error:
        LRScheduler(scheduler).attach(trainer)
    assert fix in error.value.fix
    assert trainer.optimizer.state_dict() == now
    assert before["param_groups"][0].keys() <= now["param_groups"][0].keys()
    assert not trainer.rate_is_foreign


def test_a_wrapped_scheduler_that_lags_at_iteration_completed_is_refused_a_legacy_one_works() -> (
    None
):
    trainer = make_trainer(total_steps=7)
    stair = lr_scheduler.StepLR(trainer.optimizer, 3, 0.5)
    with pytest.raises(ConfigError, match="at update"):
        LRScheduler(stair).attach(trainer, Events.ITERATION_COMPLETED)
    with pytest.warns(UserWarning, match="ITERATION_COMPLETED"):
        legacy = LRScheduler(stair, use_legacy=True)
    legacy.attach(trainer, Events.ITERATION_COMPLETED)
    trainer.train()
    assert trainer.history.lr == pytest.approx([1e-2] * 3 + [5e-3] * 3 + [2.5e-3])


@pytest.mark.parametrize(
    ("event", "steps", "fits"),
    [
        (Events.ITERATION_COMPLETED, 2, True),
        (Events.ITERATION_COMPLETED, 3, False),
        (Events.EPOCH_COMPLETED, 2 * STEPS, True),
        (Events.EPOCH_COMPLETED, 2 * STEPS + 1, False),  # a third epoch begins
    ],
    ids=str,
)
def test_a_scheduler_of_torch_is_refused_only_if_the_run_gets_to_where_ignite_falsifies_it(
    event: Any, steps: int, fits: bool
) -> None:
    trainer = make_trainer(total_steps=steps)
    scheduler = LRScheduler(lr_scheduler.StepLR(trainer.optimizer, 3, 0.5))
    with nullcontext() if fits else pytest.raises(ConfigError, match="at update 3"):
        scheduler.attach(trainer, event)
    assert trainer.rate_is_foreign is fits


def test_handlers_of_one_class_keep_a_state_each_until_their_last_method_is_removed() -> None:
    trainer = make_trainer()
    metrics = [Average() for _ in range(3)]
    for number, metric in enumerate(metrics):
        metric.attach(trainer, f"mean {number}")
    assert list(trainer.attached) == ["Average", "Average 2", "Average 3"]
    assert list(trainer.attached.values()) == metrics
    trainer.remove_event_handler(metrics[1].started, Events.EPOCH_STARTED)
    assert len(trainer.attached) == 3
    metrics[0].detach(trainer)
    assert list(trainer.attached.values()) == metrics[1:]


def test_a_scheduler_of_torch_may_be_attached_to_two_events_at_once() -> None:
    trainer = make_trainer(total_steps=4)
    scheduler = LRScheduler(lr_scheduler.StepLR(trainer.optimizer, 3, 0.5))
    trainer.add_event_handler(Events.STARTED | Events.ITERATION_STARTED, scheduler)
    trainer.train()
    # The first of the steps of the schedule is taken at STARTED.
    assert trainer.history.lr == pytest.approx([1e-2, 1e-2, 5e-3, 5e-3])


def test_without_a_scheduler_of_ignite_the_schedule_of_the_trainer_holds() -> None:
    trainer = make_trainer()
    trainer.scheduler = LinearWarmup(trainer.optimizer, 5)
    handle = trainer.add_event_handler(
        Events.ITERATION_STARTED, SCHEDULES["piecewise"](trainer.optimizer)
    )
    handle.remove()
    assert not trainer.rate_is_foreign
    assert not trainer.attached
    trainer.train(num_epochs=1)
    assert trainer.history.lr[:5] == pytest.approx([0.002, 0.004, 0.006, 0.008, 0.01])


def test_a_scheduler_with_functions_in_its_state_is_saved_without_and_restored(
    tmp_path: Path,
) -> None:
    def attach(trainer: Trainer) -> ReduceLROnPlateauScheduler:
        plateau = ReduceLROnPlateauScheduler(
            trainer.optimizer, "train/loss", patience=1, factor=0.5, threshold=10.0
        )
        plateau.attach(trainer, Events.ITERATION_COMPLETED)
        LambdaStateScheduler(lambda index: index * 2.0, "beta", create_new=True).attach(trainer)
        return plateau

    whole = make_trainer(tmp_path, total_steps=12)
    attach(whole)
    whole.train()
    assert min(whole.history.lr) < 1e-2
    assert whole.state.beta == 24.0

    again = make_trainer(tmp_path, total_steps=12)
    attach(again)
    again.resume(tmp_path / "step-00000008")
    betas: list[float] = []
    again.add_event_handler(Events.ITERATION_STARTED, lambda: betas.append(again.state.beta))
    again.train()
    assert again.history.lr == whole.history.lr[8:]
    assert betas == [16.0, 18.0, 20.0, 22.0]


def test_the_average_of_ignites_ema_goes_on_after_a_resume(tmp_path: Path) -> None:
    def attach(trainer: Trainer) -> EMAHandler:
        average = EMAHandler(trainer.model, momentum=0.1)
        average.attach(trainer)
        return average

    whole = make_trainer(tmp_path, total_steps=12)
    average = attach(whole)
    whole.train()
    again = make_trainer(tmp_path, total_steps=12)
    resumed = attach(again)
    again.resume(tmp_path / "step-00000008")
    again.train()
    pairs = zip(average.ema_model.parameters(), resumed.ema_model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


# ------------------------------------------------------------------ the output of a step


def test_the_output_of_a_step_is_its_loss_as_a_number() -> None:
    output = StepOutput(1.5, 2.0, 8, 2, "spike", "seen")
    assert isinstance(output, float)
    assert output == output.loss == 1.5
    assert type(output.loss) is float
    twin = copy.deepcopy(output)
    assert (twin, twin.grad_norm, twin.num_tokens, twin.rejection) == (1.5, 2.0, 8, "spike")
    assert torch.tensor(output).item() == 1.5
    assert math.isnan(StepOutput(math.nan, math.nan, 0, 1, "empty"))


@pytest.mark.parametrize("transform", [lambda x: x, lambda x: x.loss], ids=["identity", "loss"])
def test_metrics_of_numbers_see_the_losses_of_the_steps(transform: Any) -> None:
    trainer = make_trainer()
    RunningAverage(alpha=0.5, output_transform=transform).attach(trainer, "running")
    RunningAverage(alpha=0.9, output_transform=transform).attach(trainer, "slow")
    Average(output_transform=transform).attach(trainer, "mean")
    MetricGroup({"grouped": Average(output_transform=transform)}).attach(trainer, "group")
    Frequency(output_transform=transform).attach(trainer, "rate")
    store = EpochOutputStore(output_transform=transform)
    store.attach(trainer, "losses")
    trainer.train(num_epochs=1)
    losses = trainer.history.train_loss
    for name, alpha in (("running", 0.5), ("slow", 0.9)):
        expected = losses[0]
        for loss in losses[1:]:
            expected = expected * alpha + (1 - alpha) * loss
        assert trainer.state.metrics[name] == pytest.approx(expected)
    assert trainer.state.metrics["mean"] == pytest.approx(sum(losses) / len(losses))
    assert trainer.state.metrics["grouped"] == trainer.state.metrics["mean"]
    assert trainer.state.metrics["rate"] >= 0
    assert trainer.state.losses == losses


def test_terminate_on_nan_ends_the_run_at_a_refused_step_with_the_weights_before_it() -> None:
    trainer = make_trainer()
    trainer.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan(lambda x: x.grad_norm))
    SpoiltGradient(3).attach(trainer)
    trainer.train(num_epochs=1)
    assert trainer.state.iteration == 3
    assert trainer.finished == "stopped by TerminateOnNan"
    assert all(bool(p.isfinite().all()) for p in trainer.model.parameters())


def test_terminate_on_nan_ends_a_run_that_would_heal_after_it_has_gone_back(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    for handler in (SpoiltGradient(7), NaNRollback()):
        handler.attach(trainer)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan(lambda x: x.grad_norm))
    trainer.train(num_epochs=1)
    assert trainer.finished == "stopped by TerminateOnNan"
    assert (trainer.state.rollbacks, trainer.state.iteration) == (1, 4)


@pytest.mark.parametrize("resumed", [True, False])
def test_an_average_goes_on_after_a_resume_as_if_the_run_had_not_stopped(
    resumed: bool, tmp_path: Path
) -> None:
    def attach(trainer: Trainer) -> None:
        RunningAverage(output_transform=lambda x: x).attach(trainer, "running")  # reset at STARTED
        Average().attach(trainer, "mean")  # reset at EPOCH_STARTED

    whole = make_trainer(tmp_path, total_steps=10, checkpoint_steps=3)
    attach(whole)
    if not resumed:
        for handler in (SpoiltGradient(5), NaNRollback()):
            handler.attach(whole)
    whole.train()
    metrics = whole.state.metrics
    if resumed:
        again = make_trainer(tmp_path, total_steps=10)
        attach(again)
        again.resume(tmp_path / "step-00000006")
        again.train()
        assert again.state.metrics["running"] == metrics["running"]
        assert again.state.metrics["mean"] == metrics["mean"]
    losses = whole.history.train_loss
    assert metrics["mean"] == pytest.approx(sum(losses) / len(losses), nan_ok=True)


def test_interrupt_stops_after_the_step_and_the_next_run_goes_on() -> None:
    whole, trainer = make_trainer(num_epochs=2), make_trainer(num_epochs=2)
    interrupted: list[int] = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED(every=7), trainer.interrupt)
    trainer.add_event_handler(Events.INTERRUPT, lambda: interrupted.append(trainer.state.iteration))
    for step in (7, 14, 20):
        trainer.train()
        assert trainer.state.iteration == step
    whole.train()
    assert interrupted == [7, 14]
    assert trainer.history.train_loss == whole.history.train_loss


# ------------------------------------------------------------------ refusals and limits


def test_metrics_of_predictions_are_refused_unless_a_transform_gives_them() -> None:
    trainer = make_trainer()
    for metric in (Accuracy(), RunningAverage(Accuracy()), MetricGroup({"a": Accuracy()})):
        with pytest.raises(ConfigError, match="the logits are not kept"):
            metric.attach(trainer, "accuracy")
    targets = torch.tensor([0, 1])
    Accuracy(lambda _: (torch.eye(2), targets)).attach(trainer, "accuracy")
    trainer.train(num_epochs=1)
    assert trainer.state.metrics["accuracy"] == 1.0


def test_a_batch_size_that_changes_is_refused() -> None:
    loader = DataLoader(torch.zeros(8), batch_size=2)
    with pytest.raises(ConfigError, match="function of seed, epoch and step"):
        BatchSizeScheduler(loader, lambda index: 2 + index).attach(make_trainer())


@pytest.mark.parametrize("budget", [{"num_epochs": 2}, {"total_steps": 17}])
def test_the_state_says_how_many_epochs_the_run_has(budget: dict[str, int]) -> None:
    trainer = make_trainer(**budget)
    seen: list[tuple[Any, int, int]] = []
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED,
        lambda e: seen.append((e.state.max_epochs, e.state.epoch, e.state.iteration)),
    )
    trainer.train()
    assert {entry[0] for entry in seen} == {2}
    assert [entry[1] for entry in seen] == [1] * 10 + [2] * (len(seen) - 10)
    assert seen[-1][2] == budget.get("total_steps", 20)


def test_a_key_that_the_user_adds_to_the_state_is_saved_and_restored(tmp_path: Path) -> None:
    def make() -> Trainer:
        trainer = make_trainer(tmp_path, total_steps=8)
        trainer.state_dict_user_keys.append("alpha")
        trainer.state.alpha = 0.5  # type: ignore[attr-defined]
        return trainer

    trainer = make()
    trainer.state.alpha = 0.25  # type: ignore[attr-defined]
    trainer.train()
    again = make()
    again.resume(tmp_path / "step-00000004")
    assert again.state.alpha == 0.25  # type: ignore[attr-defined]


@pytest.mark.parametrize("steps", [8, 30])
def test_the_finder_of_rates_finds_and_restores_the_run(steps: int) -> None:
    trainer = make_trainer(num_epochs=1)
    before = copy.deepcopy((trainer.model.state_dict(), trainer.optimizer.state_dict()))
    finder = FastaiLRFinder()
    to_save = {"model": trainer.model, "optimizer": trainer.optimizer}
    with (
        pytest.warns(UserWarning, match="without loss diverging"),
        finder.attach(trainer, to_save, num_iter=steps, start_lr=1e-4, end_lr=1.0) as searching,
    ):
        searching.run()
    rates = finder.get_results()["lr"]
    assert len(rates) >= steps - 1
    assert rates == sorted(rates)
    assert trainer.state.iteration == 0
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, before[0][name])
    assert trainer.optimizer.param_groups[0]["lr"] == before[1]["param_groups"][0]["lr"]
    history = trainer.train(num_epochs=1)
    assert history.steps == list(range(1, STEPS + 1))
    assert history.lr == [1e-2] * STEPS


def test_the_finder_is_refused_where_its_steps_would_be_saved(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.attach_defaults()
    to_save = {"model": trainer.model, "optimizer": trainer.optimizer}
    with (
        pytest.raises(ConfigError, match="saves checkpoints"),
        FastaiLRFinder().attach(trainer, to_save),
    ):
        pass
    assert len(trainer.history.steps) == 0


def test_an_error_is_heard_once_and_never_swallowed_by_a_handler_of_ignite() -> None:
    trainer, heard = make_trainer(), []

    def fail(trainer: Trainer) -> None:
        raise ArithmeticError("half done")

    trainer.add_event_handler(Events.ITERATION_STARTED(once=3), fail)
    trainer.add_event_handler(Events.EXCEPTION_RAISED, lambda trainer, error: heard.append(error))
    with pytest.raises(ArithmeticError, match="half done"):
        trainer.train(num_epochs=1)
    assert len(heard) == 1
    assert not trainer.finished


def test_terminate_at_exception_raised_ends_the_run_without_a_save(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)

    def fail(trainer: Trainer) -> None:
        raise KeyboardInterrupt

    def leave(trainer: Trainer, error: BaseException) -> None:
        trainer.terminate()

    trainer.add_event_handler(Events.ITERATION_STARTED(once=6), fail)
    trainer.add_event_handler(Events.EXCEPTION_RAISED, leave)
    trainer.train(num_epochs=1)
    assert trainer.finished.startswith("stopped by leave")
    assert sorted(path.name for path in tmp_path.glob("step-*"))[-1] == "step-00000004"


def events_of(engine: Engine) -> list[str]:
    """The events at which a run ends or stops."""
    seen: list[str] = []
    for event in (Events.INTERRUPT, Events.TERMINATE, Events.COMPLETED):
        engine.add_event_handler(event, lambda engine, name: seen.append(name), event.name)
    return seen


@pytest.mark.parametrize("step", [4, STEPS], ids=["inside", "last step"])
def test_completed_is_not_fired_where_terminate_asks_for_that(step: int) -> None:
    for skip in (False, True):
        trainer = make_trainer()
        fired = events_of(trainer)
        trainer.add_event_handler(
            Events.ITERATION_COMPLETED(once=step), lambda t, skip=skip: t.terminate(skip)
        )
        trainer.train(num_epochs=1)
        assert trainer.state.iteration == step
        assert ("COMPLETED" in fired) is not skip


@pytest.mark.parametrize(
    "event", [Events.ITERATION_COMPLETED(once=4), Events.EPOCH_COMPLETED(once=1)]
)
def test_interrupt_fires_what_it_fires_on_a_plain_engine(event: Any) -> None:
    fired = {}
    for engine in (make_trainer(), Engine(lambda *_: None)):
        data = None if isinstance(engine, Trainer) else range(STEPS)
        seen = fired[type(engine)] = events_of(engine)
        engine.add_event_handler(event, lambda e: e.interrupt())
        engine.run(data, max_epochs=2)
        seen.append(f"the next run after {engine.state.iteration}")
        engine.run(data, max_epochs=2)
    assert fired[Trainer] == fired[Engine]
    assert [name.split()[0] for name in fired[Trainer]] == ["INTERRUPT", "the", "COMPLETED"]


def test_what_listens_at_an_epochs_end_sees_output_and_metrics_in_a_resume_there(
    tmp_path: Path,
) -> None:
    def scores(trainer: Trainer) -> list[tuple[float, float]]:
        seen: list[tuple[float, float]] = []

        def score(engine: Trainer) -> float:
            seen.append((engine.state.output.grad_norm, engine.state.metrics["train/epoch_loss"]))
            return -seen[-1][1]

        trainer.add_event_handler(Events.EPOCH_COMPLETED, EarlyStopping(99, score, trainer))
        return seen

    trainer = make_trainer(tmp_path, total_steps=2 * STEPS)
    whole = scores(trainer)
    trainer.train()
    resumed = make_trainer(tmp_path / "again", total_steps=2 * STEPS)
    seen = scores(resumed)
    resumed.resume(tmp_path / f"step-{STEPS:08d}")
    resumed.train()
    assert seen == whole
    assert len(whole) == 2


def epoch_ends(trainer: Trainer) -> list[int]:
    """Note where a handler of Ignite's with a state hears the end of an epoch."""
    heard: list[int] = []

    def score(engine: Trainer) -> float:
        heard.append(engine.state.iteration)
        return float(len(heard))

    trainer.add_event_handler(Events.EPOCH_COMPLETED, EarlyStopping(99, score, trainer))
    return heard


@pytest.mark.parametrize("step", [0, 1, 2])
def test_the_end_that_a_restored_state_owes_is_heard_also_in_epochs_of_one_step(
    step: int, tmp_path: Path
) -> None:
    def make(place: Path) -> Trainer:
        fields: dict[str, Any] = {"total_steps": 3, "eval_steps": 1, "keep_last": 9}
        config = TrainingConfig(checkpoint_dir=str(place), **fields)
        train = TokenWindowLoader(tiny_tokens(9), Batching(8, 4))
        return Trainer(tiny_model(), train, tiny_loaders()[1], device="cpu", config=config)

    whole = make(tmp_path)
    heard = epoch_ends(whole)
    whole.train()
    assert heard == [1, 2, 3]
    resumed = make(tmp_path / "again")
    heard = epoch_ends(resumed)
    resumed.resume(tmp_path / f"step-{step:08d}")
    resumed.train()
    assert heard == [1, 2, 3][max(0, step - 1) :]  # a state is saved before its epoch's end is told


def test_an_end_of_an_epoch_that_came_before_the_save_is_not_repeated(tmp_path: Path) -> None:
    def make() -> tuple[Trainer, list[int]]:
        trainer = make_trainer(
            tmp_path, total_steps=2 * STEPS, eval_steps=100, eval_epochs=False, checkpoint_steps=100
        )
        return trainer, epoch_ends(trainer)

    first, heard = make()
    first.add_event_handler(Events.EPOCH_COMPLETED(once=1), first.interrupt)
    first.train()
    assert heard == [STEPS]
    again, heard = make()
    again.resume(tmp_path / f"step-{STEPS:08d}")
    again.train()
    assert heard == [2 * STEPS]


def test_the_end_of_an_epoch_is_heard_once_in_a_run_epoch_by_epoch() -> None:
    trainer = make_trainer()
    heard = epoch_ends(trainer)
    trainer.train_epoch()
    trainer.train_epoch()
    assert heard == [STEPS, 2 * STEPS]


def test_rates_of_a_scheduler_are_put_back_where_a_step_fails() -> None:
    trainer = make_trainer(total_steps=4)
    SCHEDULES["cosine"](trainer.optimizer).attach(trainer)
    trainer.interventions.cut_rate(first=1, num_steps=4, factor=0.5)

    def fail(trainer: Trainer) -> None:
        raise ArithmeticError

    trainer.add_event_handler(TrainingEvents.FLLM_GRADIENTS_READY, fail)
    with pytest.raises(ArithmeticError):
        trainer.train()
    assert trainer.optimizer.param_groups[0]["lr"] == 0.1


def test_after_a_state_is_loaded_the_run_is_not_finished() -> None:
    trainer = make_trainer()
    start = copy.deepcopy(trainer.state_dict())
    trainer.run(max_iters=2)
    assert trainer.finished
    trainer.load_state_dict(start)
    assert not trainer.finished


def test_a_run_has_one_budget() -> None:
    with pytest.raises(ValueError, match="mutually exclusive"):
        make_trainer().run(max_epochs=1, max_iters=3)
