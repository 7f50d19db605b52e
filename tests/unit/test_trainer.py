from __future__ import annotations

import copy
import logging
import math
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Events
from ignite.handlers import EarlyStopping
from torch.utils.data import DataLoader

from fundamentallm.config import TrainingConfig
from fundamentallm.data.batch import Window
from fundamentallm.data.dataset import LanguageModelDataset
from fundamentallm.data.loaders import Batching, TokenWindowLoader, ValidationLoader
from fundamentallm.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    MachineError,
    NumericalError,
)
from fundamentallm.events import TrainingEvents
from fundamentallm.testing import (
    RecordingHandler,
    UniformModel,
    tiny_loaders,
    tiny_model,
    tiny_tokens,
)
from fundamentallm.training.checkpoint.scores import Scores
from fundamentallm.training.checkpoint.store import CheckpointStore
from fundamentallm.training.handlers import LossEMA, NaNRollback, Perplexity, WeightEMA
from fundamentallm.training.limits import Limits
from fundamentallm.training.losses import ChunkedCrossEntropy
from fundamentallm.training.optimizers import OptimizerBuilder
from fundamentallm.training.schedulers import CosineAnnealingScheduler, LinearWarmup
from fundamentallm.training.trainer import Trainer


def make_trainer(
    checkpoint_dir: Path | None = None, handlers: tuple[Any, ...] = (), **fields: Any
) -> Trainer:
    """A trainer over tiny loaders of 10 steps an epoch; seeds the global random numbers."""
    fields = {"eval_steps": 4, "learning_rate": 1e-2, "max_grad_norm": None, **fields}
    if checkpoint_dir is not None:
        fields["checkpoint_dir"] = str(checkpoint_dir)
    torch.manual_seed(3)
    model = tiny_model(dropout=0.1)
    train, val = tiny_loaders(accumulation_steps=fields.get("accumulation_steps", 1))
    config = TrainingConfig(**fields)
    trainer = Trainer(model, train, val, device="cpu", config=config, handlers=handlers)
    if checkpoint_dir is None:
        trainer._checkpoint_dir = None
    return trainer


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def assert_equal_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


class InjectNaN:
    """Writes a NaN into the gradients of chosen steps, before the guard looks."""

    def __init__(self, *steps: int) -> None:
        self.steps = set(steps)

    def attach(self, trainer: Trainer) -> None:
        trainer.add_event_handler(TrainingEvents.FLLM_MICRO_BATCH_COMPLETED, self.inject)

    def inject(self, trainer: Trainer) -> None:
        if trainer.state.iteration in self.steps:
            next(iter(trainer.model.parameters())).grad.view(-1)[0] = math.nan


# ------------------------------------------------------------------ the contract


def test_training_lowers_the_loss_and_tells_its_history() -> None:
    trainer = make_trainer(handlers=(LossEMA(), Perplexity()))
    history = trainer.train(num_epochs=3)
    steps = 3 * len(trainer.train_loader)
    assert history.steps == list(range(1, steps + 1))
    assert len(history.train_loss) == len(history.lr) == len(history.loss_ema) == steps
    assert [entry["epoch"] for entry in history.epochs] == [1, 2, 3]
    assert history.epoch_train_loss[-1] < history.epoch_train_loss[0]
    assert history.val_loss[-1] < history.val_loss[0]
    assert history.perplexity[-1] == pytest.approx(math.exp(history.val_loss[-1]))


def test_train_epoch_trains_to_the_end_of_the_epoch_and_returns_its_mean_loss() -> None:
    trainer = make_trainer()
    first = trainer.train_epoch()
    length = len(trainer.train_loader)
    assert trainer.state.iteration == length
    losses = trainer.history.train_loss
    tokens = [trainer.train_loader.window_at(0, step).num_tokens for step in range(length)]
    mean = sum(x * n for x, n in zip(losses, tokens, strict=True)) / sum(tokens)
    assert first == pytest.approx(mean, rel=1e-12)
    assert trainer.train_epoch() < first
    assert trainer.state.iteration == 2 * length


def test_epochs_one_by_one_equal_epochs_at_once() -> None:
    at_once = make_trainer()
    at_once.train(num_epochs=2)
    one_by_one = make_trainer()
    one_by_one.train_epoch()
    one_by_one.train_epoch()
    assert_equal_weights(weights(at_once), weights(one_by_one))


def test_train_epoch_goes_on_inside_an_epoch_and_leaves_the_budget_of_the_run() -> None:
    trainer = make_trainer(num_epochs=3)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=4), trainer.interrupt)
    assert math.isnan(trainer.train_epoch())  # the epoch has no end yet
    trainer.train_epoch()
    assert trainer.state.iteration == len(trainer.train_loader)
    trainer.train()
    assert trainer.state.iteration == 3 * len(trainer.train_loader)


def test_less_than_an_epoch_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        make_trainer().train(num_epochs=0)


def test_the_limits_that_are_given_hold_and_tokens_are_counted_in_steps() -> None:
    train, _ = tiny_loaders()
    given = Trainer(tiny_model(), train, device="cpu", limits=Limits(3))
    assert len(given.train().steps) == 3
    assert make_trainer(max_tokens=100).total_steps == 4  # steps of 32 tokens


def test_a_model_that_lacks_what_the_loss_takes_is_refused() -> None:
    with pytest.raises(ConfigError, match="logits_from_hidden"):
        Trainer(UniformModel(11), tiny_loaders()[0], loss_fn=ChunkedCrossEntropy(3), device="cpu")


def test_before_its_first_step_a_run_has_counted_nothing_and_is_not_about_to_end() -> None:
    trainer = make_trainer()
    assert (trainer.state.iteration, trainer.epoch, trainer.tokens_computed) == (0, 0, 0)
    assert trainer.window == Window([], 0)
    assert trainer.finished == ""
    assert [trainer.stopping, trainer.rolling_back, trainer.saving_for_a_stop] == [False] * 3


def test_an_epoch_may_be_one_step() -> None:
    train = TokenWindowLoader(tiny_tokens(9), Batching(8, 4))
    trainer = Trainer(tiny_model(), train, tiny_loaders()[1], device="cpu")
    history = trainer.train(num_epochs=3)
    assert [entry["step"] for entry in history.epochs] == history.steps == [1, 2, 3]
    assert [entry["step"] for entry in history.validations] == [1, 2, 3]
    assert history.epoch_train_loss == history.train_loss


def test_a_step_is_taken_in_training_mode_though_a_handler_left_another() -> None:
    trainer = make_trainer()
    modes: list[bool] = []
    trainer.model.register_forward_pre_hook(lambda model, _: modes.append(model.training))
    trainer.add_event_handler(Events.ITERATION_STARTED(every=2), lambda: trainer.model.eval())
    trainer.run(max_iters=4)
    assert modes == [True] * 4


def test_a_refused_step_does_not_enter_the_mean_loss_of_the_epoch() -> None:
    trainer = make_trainer()
    trainer.add_event_handler(
        TrainingEvents.FLLM_GRADIENTS_READY(once=3), lambda e: e.reject_step("a spike")
    )
    mean = trainer.train_epoch()
    kept = [step for step in range(len(trainer.train_loader)) if step != 2]
    tokens = [trainer.train_loader.window_at(0, step).num_tokens for step in kept]
    losses = [trainer.history.train_loss[step] for step in kept]
    assert math.isfinite(trainer.history.train_loss[2])
    expected = sum(x * n for x, n in zip(losses, tokens, strict=True)) / sum(tokens)
    assert mean == pytest.approx(expected, rel=1e-12)


def test_a_step_counts_masked_targets_as_computed_and_shows_its_gradient_norm() -> None:
    ids = torch.arange(8).remainder(11)[None]
    targets = (ids + 1).masked_fill(ids < 3, -100)
    trainer = Trainer(tiny_model(), [(ids, targets)], device="cpu")
    norms: list[float] = []
    trainer.add_event_handler(
        TrainingEvents.FLLM_GRADIENTS_READY, lambda: norms.append(float(trainer.grad_norm))
    )
    trainer.run(max_iters=1)
    assert (trainer.tokens_computed, trainer.state.tokens_seen) == (8, 5)
    assert norms == [pytest.approx(trainer.state.output.grad_norm)]


def test_a_window_of_the_ledger_is_passed_over_and_said() -> None:
    trainer = make_trainer()
    trainer.interventions.skip({2})
    heard: list[tuple[int, str, int]] = []

    @trainer.on(TrainingEvents.FLLM_STEP_REJECTED)
    def note(engine: Trainer) -> None:
        output = engine.state.output
        heard.append((engine.state.iteration, output.rejection, output.num_tokens))

    trainer.run(max_iters=3)
    assert heard == [(2, "ledger", 32)]
    assert trainer.state.optimizer_steps == 2


def test_validate_equals_the_loss_over_every_target_and_disturbs_nothing() -> None:
    trainer = make_trainer()
    trainer.model.train()
    trainer.model.blocks[0].eval()  # a module that its owner froze stays frozen
    modes = [module.training for module in trainer.model.modules()]
    rng = torch.get_rng_state()
    metrics = trainer.validate()
    assert torch.equal(rng, torch.get_rng_state())
    assert [module.training for module in trainer.model.modules()] == modes

    tokens = torch.as_tensor(tiny_tokens()[320:].astype("int64"))
    model = copy.deepcopy(trainer.model).eval().double()
    total, count = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(tokens) - 1, 8):
            piece = tokens[start : start + 9]
            log_probabilities = model(piece[:-1].unsqueeze(0))[0].log_softmax(-1)
            total -= float(log_probabilities.gather(1, piece[1:, None]).sum())
            count += len(piece) - 1
    assert count == len(tokens) - 1
    assert metrics["val/loss"] == pytest.approx(total / count, rel=1e-5)
    assert metrics["val/perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)


def test_train_step_takes_a_window_or_a_plain_batch() -> None:
    trainer = make_trainer()
    before = weights(trainer)
    output = trainer._train_step(next(iter(trainer.val_loader)))
    assert math.isfinite(output.loss)
    assert any(not torch.equal(before[n], w) for n, w in weights(trainer).items())


def test_a_plain_dataloader_trains_with_accumulation_and_a_short_last_window() -> None:
    dataset = LanguageModelDataset(tiny_tokens(), 8)
    loader = DataLoader(dataset, batch_size=4, shuffle=True)
    config = TrainingConfig(accumulation_steps=3, learning_rate=1e-2, eval_steps=100)
    trainer = Trainer(tiny_model(), loader, None, device="cpu", config=config)
    trainer._checkpoint_dir = None
    trainer.train(num_epochs=2)
    assert trainer.steps_per_epoch == -(-len(loader) // 3)
    assert trainer.state.micro_batches == 2 * len(loader)
    assert trainer.state.sequences_seen == 2 * len(dataset)
    assert trainer.state.tokens_seen == 2 * len(dataset) * 8


def test_pairs_of_inputs_and_targets_train_as_well() -> None:
    tokens = torch.as_tensor(tiny_tokens().astype("int64"))
    pairs = [(tokens[i : i + 8][None], tokens[i + 1 : i + 9][None]) for i in range(0, 64, 8)]
    trainer = Trainer(tiny_model(), pairs, pairs, device="cpu")
    history = trainer.train(num_epochs=2)
    assert len(history.train_loss) == 16
    assert len(history.val_loss) == 2


def test_the_loss_of_an_untrained_uniform_model_is_log_of_the_vocabulary() -> None:
    train, val = tiny_loaders()
    trainer = Trainer(UniformModel(11), train, val, device="cpu")
    assert trainer.validate()["val/loss"] == pytest.approx(math.log(11), rel=1e-6)


def test_an_empty_or_missing_validation_loader_is_no_fault() -> None:
    train, _ = tiny_loaders()
    for val in (None, ValidationLoader(tiny_tokens()[:1], Batching(8, 4)), []):
        trainer = Trainer(tiny_model(), train, val, device="cpu")
        assert trainer.validate() == {}
        history = trainer.train(num_epochs=1)
        assert history.val_loss == []


def test_one_sequence_a_batch_and_one_token_a_sequence() -> None:
    tokens = tiny_tokens(40)
    train = TokenWindowLoader(tokens, Batching(1, 1))
    trainer = Trainer(tiny_model(), train, ValidationLoader(tokens, Batching(1, 1)), device="cpu")
    trainer.run(max_iters=3)
    assert trainer.state.tokens_seen == 3


def test_a_very_long_sequence_trains_in_one_piece() -> None:
    tokens = tiny_tokens(5_000)
    train = TokenWindowLoader(tokens, Batching(2_048, 1))
    model = tiny_model(sequence_length=2_048)
    trainer = Trainer(model, train, ValidationLoader(tokens, Batching(2_048, 1)), device="cpu")
    trainer.run(max_iters=2)
    assert trainer.state.tokens_seen == 2 * 2_048
    assert math.isfinite(trainer.validate()["val/loss"])


def test_a_torch_scheduler_is_refused_with_the_reason() -> None:
    train, val = tiny_loaders()
    model = tiny_model()
    optimizer = OptimizerBuilder.build("adamw", model, 1e-3)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with pytest.raises(TypeError, match="rollback"):
        Trainer(model, train, val, optimizer, scheduler)


def test_the_config_builds_the_optimizer_where_none_is_given() -> None:
    train, val = tiny_loaders()
    config = TrainingConfig(optimizer="sgd", learning_rate=0.5, optimizer_weight_decay=0.0)
    trainer = Trainer(tiny_model(), train, val, device="cpu", config=config)
    assert isinstance(trainer.optimizer, torch.optim.SGD)
    assert trainer.optimizer.param_groups[0]["lr"] == 0.5


# ------------------------------------------------------------------ schedule, clipping, cadence


def test_the_applied_learning_rate_of_every_step_is_the_formula() -> None:
    train, val = tiny_loaders()
    model = tiny_model()
    optimizer = OptimizerBuilder.build("adamw", model, 1e-2)
    scheduler = CosineAnnealingScheduler(optimizer, total_steps=20, warmup_steps=5, min_lr=1e-3)
    trainer = Trainer(model, train, val, optimizer, scheduler, device="cpu")
    applied: list[float] = []
    trainer.add_event_handler(
        TrainingEvents.FLLM_OPTIMIZER_STEPPED,
        lambda: applied.append(optimizer.param_groups[0]["lr"]),
    )
    trainer.train(num_epochs=2)
    expected = [
        1e-2 * k / 5
        if k <= 5
        else 1e-3 + (1e-2 - 1e-3) * (1 + math.cos(math.pi * (k - 5) / 15)) / 2
        for k in range(1, 21)
    ]
    assert applied == pytest.approx(expected, rel=1e-12)
    assert trainer.history.lr == pytest.approx(expected, rel=1e-12)


def test_gradients_are_clipped_to_the_norm_and_the_norm_before_is_recorded() -> None:
    trainer = make_trainer(max_grad_norm=1e-3, optimizer="sgd")
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=1.0)
    trainer.step.optimizer = trainer.optimizer
    trainer.scheduler.optimizer = trainer.optimizer
    before = weights(trainer)
    trainer.run(max_iters=1)
    moved = math.sqrt(
        sum(float((w - before[n]).double().pow(2).sum()) for n, w in weights(trainer).items())
    )
    assert trainer.state.output.grad_norm > 1e-2
    assert moved == pytest.approx(1e-3, rel=1e-3)


def test_validation_runs_every_eval_steps_at_each_epochs_end_and_at_the_last_step() -> None:
    trainer = make_trainer(eval_steps=4)
    length = len(trainer.train_loader)
    trainer.attach_defaults()
    trainer.run(max_iters=2 * length + 3)
    last = 2 * length + 3
    expected = sorted(
        {step for step in range(1, last + 1) if step % 4 == 0 or step % length == 0} | {last}
    )
    assert [entry["step"] for entry in trainer.history.validations] == expected


def test_validation_leaves_out_the_epochs_ends_if_told_so() -> None:
    trainer = make_trainer(eval_steps=4, eval_epochs=False)
    length = len(trainer.train_loader)
    assert length % 4 != 0
    trainer.attach_defaults()
    trainer.run(max_iters=length + 1)
    expected = sorted({*range(4, length + 2, 4), length + 1})
    assert [entry["step"] for entry in trainer.history.validations] == expected


def test_bf16_runs_in_training_and_in_validation_alike() -> None:
    trainer = make_trainer(precision="bf16")
    seen: set[tuple[bool, torch.dtype]] = set()
    trainer.model.blocks[0].attention.register_forward_hook(
        lambda module, args, output: seen.add((module.training, output.dtype))
    )
    trainer.train(num_epochs=1)
    assert seen == {(True, torch.bfloat16), (False, torch.bfloat16)}
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())


def test_gradient_checkpointing_changes_nothing_but_memory() -> None:
    plain = make_trainer()
    plain.run(max_iters=3)
    checkpointed = make_trainer(gradient_checkpointing=True)
    checkpointed.run(max_iters=3)
    assert checkpointed.model.gradient_checkpointing
    assert_equal_weights(weights(plain), weights(checkpointed))


# ------------------------------------------------------------------ limits and stops


def test_max_tokens_ends_the_run_at_the_first_step_that_reaches_it() -> None:
    trainer = make_trainer(max_tokens=100)
    trainer.train()
    assert trainer.state.tokens_seen == 128  # steps of 32 tokens
    assert trainer.finished


def test_max_seconds_ends_the_run_by_the_clock() -> None:
    trainer = make_trainer(max_seconds=5.0)
    seconds = iter(range(1_000))
    trainer.budget.clock = lambda: float(next(seconds))
    trainer.train()
    assert trainer.finished == "the budget is used up"
    assert 0 < trainer.state.iteration < 10


def test_max_seconds_goes_on_counting_in_a_resumed_run(tmp_path: Path) -> None:
    def run(stop: float | None) -> Trainer:
        trainer = make_trainer(tmp_path, max_seconds=5.0, stop_after_seconds=stop)
        began = trainer.state.iteration
        newest = CheckpointStore(tmp_path).newest()
        if newest is not None:
            trainer.resume(tmp_path / newest.name)
            began = trainer.state.iteration
        trainer.budget.clock = lambda: float(trainer.state.iteration - began)  # a second a step
        trainer.train()
        return trainer

    first = run(stop=3.0)
    assert (first.state.iteration, first.finished) == (3, "")
    second = run(stop=None)
    assert second.finished == "the budget is used up"
    assert second.state.iteration == 5  # two seconds were left


def test_stop_after_seconds_saves_and_stops_unfinished(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, stop_after_seconds=1.0)
    trainer.budget.clock = lambda: float(trainer.state.iteration)
    trainer.train(num_epochs=1)
    assert not trainer.finished
    assert trainer.state.iteration == 1
    newest = CheckpointStore(tmp_path).newest()
    assert newest is not None
    assert newest.step == 1


def test_a_finished_run_takes_no_further_step() -> None:
    trainer = make_trainer()
    trainer.train(num_epochs=1)
    before, step = weights(trainer), trainer.state.iteration
    trainer.train(num_epochs=1)
    assert trainer.state.iteration == step
    assert_equal_weights(before, weights(trainer))
    trainer.train(num_epochs=2)
    assert trainer.state.iteration == 2 * step


@pytest.mark.parametrize(
    ("steps", "limits", "reason"),
    [
        (4, Limits(3), "the last step is done"),
        (4, Limits(9, max_tokens=128), "the budget is used up"),
        (1, Limits(9, max_tokens=32), "the budget is used up"),
        (4, Limits(None, max_seconds=8.0), "the budget is used up"),
    ],
)
def test_a_run_that_has_used_up_its_new_budget_takes_no_step(
    steps: int, limits: Limits, reason: str
) -> None:
    trainer = make_trainer()
    trainer.budget.clock = lambda: 2.0 * trainer.state.iteration
    trainer.run(max_iters=steps)
    trainer.budget.limits = limits
    trainer.run()
    assert (trainer.state.iteration, trainer.finished) == (steps, reason)


def test_a_budget_that_ends_while_the_run_starts_leaves_it_one_step() -> None:
    trainer = make_trainer(max_seconds=5.0)
    trainer.budget.clock = lambda: 6.0
    trainer.train()
    assert (trainer.state.iteration, trainer.finished) == (1, "the budget is used up")


def test_a_run_that_goes_on_is_not_finished_when_it_starts() -> None:
    trainer = make_trainer()
    trainer.run(max_iters=2)
    told: list[tuple[str, bool]] = []
    trainer.add_event_handler(
        TrainingEvents.FLLM_RUN_STARTED, lambda: told.append((trainer.finished, trainer.stopping))
    )
    assert trainer.run(max_iters=4) is trainer.state
    assert told == [("", False)]


def test_a_signal_while_a_run_starts_stops_it_before_its_first_step(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.add_event_handler(TrainingEvents.FLLM_RUN_STARTED, lambda e: e.interrupt_run(15))
    trainer.train(num_epochs=1)
    assert (trainer.state.iteration, trainer.finished, trainer.stopping) == (0, "", True)
    assert CheckpointStore(tmp_path).step_names() == ["step-00000000"]
    done = make_trainer()
    done.train(num_epochs=1)
    done.interrupt_run(15)
    done.train(num_epochs=1)
    assert done.finished == "the last step is done"


def test_a_run_that_is_asked_to_pause_saves_and_stops(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.pause_when(lambda: False)
    trainer.pause_when(lambda: trainer.state.iteration == 3)
    trainer.train(num_epochs=1)
    assert (trainer.state.iteration, trainer.finished) == (3, "")
    newest = CheckpointStore(tmp_path).newest()
    assert newest is not None
    assert newest.step == 3


def test_the_time_between_two_runs_is_not_time_of_a_step() -> None:
    trainer = make_trainer()
    idle = [0.0]
    trainer.budget.clock = lambda: idle[0] + 2.0 * trainer.state.iteration
    trainer.run(max_iters=4)
    idle[0] = 100.0
    remaining: list[float | None] = []
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED(once=6),
        lambda: remaining.append(trainer.budget.seconds_remaining()),
    )
    trainer.run(max_iters=9)
    assert remaining == [3 * 2.0]


def test_the_epochs_of_a_run_that_was_interrupted_inside_one_keep_their_numbers() -> None:
    trainer = make_trainer()
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=7), trainer.interrupt)
    epochs: list[int] = []
    trainer.add_event_handler(Events.ITERATION_STARTED, lambda: epochs.append(trainer.state.epoch))
    for _ in range(2):
        trainer.train(num_epochs=2)
    assert epochs == [1] * 10 + [2] * 10


class TornLoader(TokenWindowLoader):
    """Only the first two steps of an epoch can be read."""

    def window_at(self, epoch: int, step: int) -> Window:
        if step >= 2:
            raise DataError("the file is cut off")
        return super().window_at(epoch, step)


@pytest.mark.parametrize(("every", "for_a_stop"), [(100, True), (2, False)])
def test_what_was_trained_is_saved_once_where_the_data_cannot_be_read_any_further(
    tmp_path: Path, every: int, for_a_stop: bool
) -> None:
    config = TrainingConfig(checkpoint_dir=str(tmp_path), checkpoint_steps=every)
    train = TornLoader(tiny_tokens(), Batching(8, 4))
    trainer = Trainer(tiny_model(), train, tiny_loaders()[1], device="cpu", config=config)
    saved: list[tuple[int, bool]] = []
    trainer.add_event_handler(
        TrainingEvents.FLLM_CHECKPOINT_SAVED,
        lambda: saved.append((trainer.state.iteration, trainer.saving_for_a_stop)),
    )
    with pytest.raises(DataError, match="cut off"):
        trainer.train()
    assert saved == [(0, False), (2, for_a_stop)]
    assert (trainer.state.iteration, trainer.finished, trainer.stopping) == (2, "", for_a_stop)
    assert not trainer.saving_for_a_stop
    newest = CheckpointStore(tmp_path).newest()
    assert newest is not None
    assert newest.step == 2


@pytest.mark.parametrize("saves", [True, False])
def test_out_of_memory_names_the_step_and_a_checkpoint_only_where_there_is_one(
    tmp_path: Path, saves: bool
) -> None:
    trainer = make_trainer(tmp_path if saves else None)
    trainer.add_event_handler(
        Events.ITERATION_STARTED(once=3), lambda: (_ for _ in ()).throw(MemoryError)
    )
    with pytest.raises(MachineError, match="at step 3") as error:
        trainer.train(num_epochs=1)
    assert ("the last checkpoint is kept" in str(error.value)) is saves


@pytest.mark.parametrize("fails", [False, True])
def test_after_an_error_or_a_stop_a_run_on_other_data_reads_those(fails: bool) -> None:
    trainer = make_trainer()

    @trainer.on(Events.ITERATION_COMPLETED(once=3))
    def end() -> None:
        trainer.interrupt()
        if fails:
            raise ArithmeticError

    with pytest.raises(ArithmeticError) if fails else nullcontext():
        trainer.run(max_iters=6)
    other = TokenWindowLoader(tiny_tokens(97, seed=5), Batching(8, 4))
    assert len(other) == 3
    read: list[torch.Tensor] = []
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED,
        lambda: read.append(trainer.window.micro_batches[0]["input_ids"]),
    )
    trainer.run(other, max_iters=5)
    for step, ids in enumerate(read):
        assert torch.equal(ids, other.window_at(1, step).micro_batches[0]["input_ids"])
    assert len(read) == 2


def test_a_run_can_be_started_again_after_an_exception() -> None:
    trainer = make_trainer()
    handle = trainer.add_event_handler(
        Events.ITERATION_COMPLETED(once=3), lambda: (_ for _ in ()).throw(ArithmeticError("boom"))
    )
    with pytest.raises(ArithmeticError, match="boom"):
        trainer.train(num_epochs=1)
    assert trainer.state.iteration == 3
    handle.remove()
    trainer.train(num_epochs=1)
    assert trainer.state.iteration == len(trainer.train_loader)


def test_the_end_of_a_run_is_told_also_when_it_fails() -> None:
    trainer = make_trainer()
    ended: list[int] = []
    trainer.add_event_handler(
        TrainingEvents.FLLM_RUN_ENDED, lambda: ended.append(trainer.state.iteration)
    )
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED(once=2), lambda: (_ for _ in ()).throw(ArithmeticError)
    )
    with pytest.raises(ArithmeticError):
        trainer.train(num_epochs=1)
    assert ended == [2]


# ------------------------------------------------------------------ handlers that know Ignite alone


class StopAt:
    """Calls terminate() at one step, as Ignite's own handlers do."""

    def __init__(self, event: Any, step: int) -> None:
        self.event = event
        self.step = step

    def attach(self, trainer: Trainer) -> None:
        trainer.add_event_handler(self.event, self)

    def __call__(self, engine: Trainer) -> None:
        if engine.state.iteration == self.step:
            engine.terminate()


@pytest.mark.parametrize(
    ("event", "step"),
    [
        (Events.GET_BATCH_COMPLETED, 2),
        (Events.ITERATION_STARTED, 3),
        (TrainingEvents.FLLM_GRADIENTS_READY, 3),
        (Events.ITERATION_COMPLETED, 3),
        (TrainingEvents.FLLM_METRICS_READY, 3),
        (Events.ITERATION_COMPLETED, 4),  # evaluated there in any case
        (TrainingEvents.FLLM_EVALUATION_COMPLETED, 4),
        (TrainingEvents.FLLM_CHECKPOINT_SAVED, 4),
        (Events.ITERATION_COMPLETED, 10),
        (Events.EPOCH_COMPLETED, 10),
        (Events.EPOCH_STARTED, 10),
    ],
    ids=str,
)
def test_terminate_ends_the_run_evaluated_saved_and_named(
    tmp_path: Path, event: Any, step: int
) -> None:
    trainer = make_trainer(tmp_path, handlers=(StopAt(event, step),))
    completed: list[int] = []
    trainer.add_event_handler(Events.COMPLETED, lambda: completed.append(trainer.state.iteration))
    trainer.train(num_epochs=2)
    begun = event in (Events.GET_BATCH_COMPLETED, Events.EPOCH_STARTED)  # the next step counts
    last = step + begun
    assert trainer.state.iteration == last == trainer.history.steps[-1]
    assert trainer.finished == "stopped by StopAt"
    assert completed == [last]
    assert trainer.history.validations[-1]["step"] == last
    newest = CheckpointStore(tmp_path).newest()
    assert newest is not None
    scores = Scores(tmp_path)
    assert (newest.step, scores.end_of(newest)) == (last, "stopped by StopAt")
    assert scores.val_loss(newest) == trainer.history.val_loss[-1]

    # The run that is gone on with has the weights of one that was never stopped.
    again = make_trainer(tmp_path)
    again.resume(tmp_path / newest.name)
    again.train(num_epochs=2)
    never = make_trainer()
    never.train(num_epochs=2)
    assert again.finished == "the last step is done"
    assert_equal_weights(weights(again), weights(never))


def test_ignites_own_early_stopping_ends_the_run() -> None:
    trainer = make_trainer()
    stopping = EarlyStopping(patience=2, score_function=lambda _: 1.0, trainer=trainer)
    trainer.add_event_handler(TrainingEvents.FLLM_EVALUATION_COMPLETED, stopping)
    trainer.train(num_epochs=2)
    assert trainer.history.validations[-1]["step"] == trainer.state.iteration == 10
    assert trainer.finished == "stopped by EarlyStopping"


def test_a_function_that_terminates_is_named_with_its_place() -> None:
    trainer = make_trainer()

    @trainer.on(Events.ITERATION_COMPLETED(once=2))
    def enough(engine: Trainer) -> None:
        engine.terminate()

    trainer.train(num_epochs=1)
    assert trainer.finished.startswith("stopped by enough (test_trainer.py, line ")
    trainer.train(num_epochs=1)
    assert trainer.finished == "the last step is done"
    assert trainer.state.iteration == 10


@pytest.mark.parametrize("event", [Events.EPOCH_COMPLETED, TrainingEvents.FLLM_CHECKPOINT_SAVED])
def test_a_late_wish_to_finish_is_carried_out_in_that_step(tmp_path: Path, event: Any) -> None:
    trainer = make_trainer(tmp_path, checkpoint_steps=5, eval_epochs=False, eval_steps=100)
    trainer.add_event_handler(
        event, lambda: trainer.finish("enough") if trainer.state.iteration == 10 else None
    )
    trainer.train(num_epochs=2)
    assert trainer.state.iteration == 10
    assert [entry["step"] for entry in trainer.history.validations] == [10]
    newest = CheckpointStore(tmp_path).newest()
    assert newest is not None
    assert Scores(tmp_path).end_of(newest) == trainer.finished == "enough"


def test_nothing_of_a_step_that_the_run_goes_back_from_is_evaluated_or_saved(
    tmp_path: Path,
) -> None:
    trainer = make_trainer(tmp_path)
    saved: list[int] = []
    once = [True]

    def go_back() -> None:
        if trainer.state.iteration == 8 and once:
            once.clear()
            trainer.roll_back("a test")

    trainer.add_event_handler(TrainingEvents.FLLM_METRICS_READY, go_back)
    trainer.add_event_handler(
        TrainingEvents.FLLM_CHECKPOINT_SAVED, lambda: saved.append(trainer.state.iteration)
    )
    back: list[int] = []
    trainer.add_event_handler(
        TrainingEvents.FLLM_ROLLED_BACK, lambda: back.append(trainer.state.iteration)
    )
    trainer.train(num_epochs=1)
    assert back == [4]
    assert saved == [0, 4, 8, 10]
    assert trainer.history.steps == list(range(1, 11))


def test_a_rollback_to_a_state_that_had_ended_a_run_goes_on(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, eval_steps=100)
    trainer.attach_defaults()
    trainer.run(max_iters=4)
    wished: list[tuple[bool, bool]] = []
    back: list[tuple[int, str]] = []
    completed: list[int] = []
    trainer.add_event_handler(Events.COMPLETED, lambda: completed.append(trainer.state.iteration))

    @trainer.on(TrainingEvents.FLLM_METRICS_READY)
    def go_back() -> None:
        if trainer.state.iteration == 6 and not wished:
            before = trainer.rolling_back
            trainer.roll_back("a test")
            wished.append((before, trainer.rolling_back))

    @trainer.on(TrainingEvents.FLLM_ROLLED_BACK)
    def note() -> None:
        back.append((trainer.state.iteration, trainer.finished))

    trainer.run(max_iters=8)
    assert wished == [(False, True)]
    assert back == [(4, "")]
    assert completed == [8]
    assert (trainer.state.iteration, trainer.finished) == (8, "the last step is done")
    assert trainer.state_dict()["checkpoints"] == trainer.state.checkpoints == 3


def test_a_run_counts_its_saves_the_same_where_a_signal_cut_off_its_last_evaluation(
    tmp_path: Path,
) -> None:
    """Between two evaluations of the cadence, the last one is owed as well."""
    never = make_trainer(tmp_path / "never", total_steps=7)
    never.train()
    cut = make_trainer(tmp_path / "cut", total_steps=7)
    cut.add_event_handler(
        TrainingEvents.FLLM_EVALUATION_STARTED(once=2), lambda: cut.interrupt_run(15)
    )
    cut.train()
    assert (cut.finished, cut.state.iteration, cut.evaluation_pending()) == ("", 7, True)
    newest = CheckpointStore(tmp_path / "cut").newest()
    assert newest is not None
    assert newest.metadata["awaits_evaluation"] is True
    assert Scores(tmp_path / "cut").end_of(newest) == ""
    again = make_trainer(tmp_path / "cut", total_steps=7)
    again.resume(tmp_path / "cut" / newest.name)
    again.train()
    assert again.finished == never.finished == "the last step is done"
    assert again.state.checkpoints == never.state.checkpoints == 3
    assert again.history.val_loss == never.history.val_loss[-1:]


# ------------------------------------------------------------------ faults


def test_a_non_finite_gradient_never_reaches_weights_or_optimizer() -> None:
    trainer = make_trainer(handlers=(InjectNaN(3),))
    trainer.run(max_iters=2)
    before, moments = weights(trainer), copy.deepcopy(trainer.optimizer.state_dict())
    trainer.run(max_iters=3)
    assert trainer.state.output.rejection == "nonfinite"
    assert_equal_weights(before, weights(trainer))
    after = trainer.optimizer.state_dict()
    for key, state in moments["state"].items():
        for name, value in state.items():
            assert torch.equal(value, after["state"][key][name])
    assert trainer.state.skipped_steps == 1
    assert trainer.state.optimizer_steps == 2
    clean = make_trainer()
    clean.run(max_iters=2)
    assert_equal_weights(before, weights(clean))


def test_a_rejected_step_leaves_the_weight_ema_alone() -> None:
    ema = WeightEMA(0.9)
    trainer = make_trainer(handlers=(ema, InjectNaN(2)))
    trainer.run(max_iters=1)
    before = {name: average.clone() for name, average in ema.averages.items()}
    trainer.run(max_iters=2)
    assert ema.num_updates == 1
    assert_equal_weights(before, ema.averages)


def test_a_healed_run_equals_a_clean_run_that_was_given_the_ledger(tmp_path: Path) -> None:
    healed = make_trainer(tmp_path / "healed", handlers=(NaNRollback(), InjectNaN(7)))
    healed.train(num_epochs=2)
    assert healed.state.rollbacks == 1
    assert healed.interventions.skipped == {7}
    clean = make_trainer(tmp_path / "clean", handlers=(NaNRollback(),))
    clean.interventions.skip({7})
    clean.train(num_epochs=2)
    assert_equal_weights(weights(healed), weights(clean))
    # The loss of the window that was passed over is unknown in both.
    for a, b in zip(healed.history.train_loss, clean.history.train_loss, strict=True):
        assert a == b or (math.isnan(a) and math.isnan(b))
    assert healed.history.val_loss == clean.history.val_loss


def test_without_checkpoints_the_bad_window_alone_is_skipped() -> None:
    trainer = make_trainer(handlers=(NaNRollback(), InjectNaN(3)))
    trainer.train(num_epochs=1)
    assert trainer.interventions.skipped == {3}
    assert trainer.state.rollbacks == 0
    assert trainer.state.iteration == len(trainer.train_loader)


def test_a_permanent_fault_ends_the_run_within_its_bounds(tmp_path: Path) -> None:
    handlers = (NaNRollback(max_rollbacks=4, max_per_region=3), InjectNaN(*range(1, 1_000)))
    trainer = make_trainer(tmp_path, handlers=handlers)
    before = weights(trainer)
    with pytest.raises(NumericalError):
        trainer.train(num_epochs=2)
    assert trainer.state.rollbacks <= 4
    assert_equal_weights(before, weights(trainer))


def test_reject_step_refuses_the_update_with_its_reason() -> None:
    trainer = make_trainer()
    trainer.add_event_handler(
        TrainingEvents.FLLM_GRADIENTS_READY(once=2), lambda e: e.reject_step("a spike")
    )
    reasons: list[str] = []
    trainer.add_event_handler(
        TrainingEvents.FLLM_STEP_REJECTED, lambda e: reasons.append(e.state.output.rejection)
    )
    trainer.run(max_iters=3)
    assert reasons == ["a spike"]
    assert trainer.state.optimizer_steps == 2
    assert trainer.state.iteration == 3


# ------------------------------------------------------------------ resume


def averaging_trainer(place: Path) -> Trainer:
    handlers = (LossEMA(), Perplexity(), WeightEMA(0.9))
    return make_trainer(place, handlers=handlers, accumulation_steps=2)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """A run that nobody stopped."""
    trainer = averaging_trainer(tmp_path_factory.mktemp("whole"))
    trainer.train(num_epochs=3)
    return trainer


@pytest.mark.parametrize("stop", [1, 3, 4, 9, 10, 11, 14])
def test_a_resumed_run_equals_an_uninterrupted_one_bitwise(
    whole: Trainer, tmp_path: Path, stop: int
) -> None:
    total = whole.state.iteration
    first = averaging_trainer(tmp_path / "parts")
    first.add_event_handler(Events.ITERATION_COMPLETED(once=stop), lambda e: e.interrupt_run(15))
    first.train(num_epochs=3)
    assert first.state.iteration == stop
    assert not first.finished
    torch.manual_seed(99)
    second = averaging_trainer(tmp_path / "parts")
    second.resume(tmp_path / "parts" / f"step-{stop:08d}")
    history = second.train(num_epochs=3)
    assert second.state.iteration == total
    assert_equal_weights(weights(whole), weights(second))
    assert history.train_loss == whole.history.train_loss[stop:]
    assert history.loss_ema == whole.history.loss_ema[stop:]
    losses = {v["step"]: v["val_loss"] for v in whole.history.validations}
    assert all(losses[v["step"]] == v["val_loss"] for v in history.validations)


def test_resuming_an_older_checkpoint_sets_the_later_ones_aside(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.train(num_epochs=2)
    store = CheckpointStore(tmp_path)
    older = store.step_names()[-1]
    again = make_trainer(tmp_path)
    again.resume(tmp_path / older)
    step = again.state.iteration
    assert store.step_names()[0] == older
    assert (tmp_path / "superseded").is_dir()
    assert store.resolve("last") == tmp_path / older
    again.train(num_epochs=2)
    assert again.state.iteration > step
    assert_equal_weights(weights(trainer), weights(again))


def test_checkpoints_go_beside_the_one_that_was_resumed(tmp_path: Path) -> None:
    make_trainer(tmp_path / "first").train(num_epochs=1)
    newest = CheckpointStore(tmp_path / "first").resolve("last")
    assert newest is not None
    again = make_trainer(tmp_path / "elsewhere")
    again.resume(newest)
    again.train(num_epochs=2)
    assert CheckpointStore(tmp_path / "first").resolve("last") != newest
    assert not (tmp_path / "elsewhere").exists()
    with pytest.raises(ValueError, match="already"):
        again.train(num_epochs=3, checkpoint_dir=tmp_path / "elsewhere")


def test_a_checkpoint_of_another_model_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    make_trainer(tmp_path).train(num_epochs=1)
    newest = CheckpointStore(tmp_path).resolve("last")
    assert newest is not None
    train, val = tiny_loaders()
    other = Trainer(tiny_model(d_model=32), train, val, device="cpu")
    before, rng = weights(other), torch.get_rng_state()
    with pytest.raises(CheckpointError):
        other.resume(newest)
    assert_equal_weights(before, weights(other))
    assert torch.equal(rng, torch.get_rng_state())
    assert other.state.iteration == 0


def test_a_directory_with_another_runs_checkpoints_is_refused(tmp_path: Path) -> None:
    make_trainer(tmp_path).train(num_epochs=1)
    names = CheckpointStore(tmp_path).step_names()
    with pytest.raises(CheckpointError, match="another run"):
        make_trainer(tmp_path).train(num_epochs=1)
    assert CheckpointStore(tmp_path).step_names() == names


def test_data_of_another_length_is_refused_on_resume(tmp_path: Path) -> None:
    make_trainer(tmp_path).train(num_epochs=1)
    newest = CheckpointStore(tmp_path).resolve("last")
    assert newest is not None
    other = Trainer(
        tiny_model(), TokenWindowLoader(tiny_tokens(200), Batching(8, 4)), None, device="cpu"
    )
    with pytest.raises(CheckpointError, match="number of steps"):
        other.resume(newest)


def test_only_the_own_start_may_have_epochs_of_another_length() -> None:
    trainer = make_trainer()
    start = copy.deepcopy(trainer.state_dict())
    trainer.run(max_iters=1)
    later = copy.deepcopy(trainer.state_dict())
    trainer.run(TokenWindowLoader(tiny_tokens(97), Batching(8, 4)), max_iters=2)
    assert trainer.steps_per_epoch != start["epoch_length"]
    for state in (later, {**start, "run_id": "another"}):
        with pytest.raises(CheckpointError, match="number of steps"):
            trainer.load_state_dict(state)
        assert trainer.state.iteration == 2
    trainer.load_state_dict(start)
    assert trainer.state.iteration == 0


def test_a_saved_counter_that_is_no_number_is_refused_and_changes_nothing() -> None:
    trainer = make_trainer()
    with pytest.raises(CheckpointError, match="tokens_seen"):
        trainer.load_state_dict({**trainer.state_dict(), "iteration": 3, "tokens_seen": "many"})
    assert trainer.state.iteration == 0


def test_a_restored_position_tells_its_epoch_before_the_run_goes_on() -> None:
    trainer = make_trainer()
    trainer.load_state_dict({**trainer.state_dict(), "iteration": 25})
    assert (trainer.epoch, trainer.state.epoch) == (3, 2)  # Ignite adds the one that begins
    cut = {"iteration": 25, "epochs_ended_early": [[3, 1]]}
    trainer.load_state_dict({**trainer.state_dict(), **cut})
    assert (trainer.epoch, trainer.state.epoch) == (4, 3)


# ------------------------------------------------------------------ events


def test_two_handlers_of_one_name_with_state_are_refused() -> None:
    trainer = make_trainer(handlers=(LossEMA(),))
    with pytest.raises(ValueError, match="loss_ema"):
        LossEMA(0.5).attach(trainer)


@pytest.mark.parametrize("level", [logging.INFO, logging.DEBUG])
def test_handlers_of_any_signature_are_called_in_order(level: int) -> None:
    trainer = make_trainer(total_steps=2)
    heard: list[tuple[str, int]] = []

    def step() -> int:
        return trainer.state.iteration

    def with_engine_and_more(engine: Trainer, name: str, *, sign: int) -> None:
        assert engine is trainer
        heard.append((name, sign * step()))

    event = TrainingEvents.FLLM_OPTIMIZER_STEPPED
    trainer.add_event_handler(event, lambda: heard.append(("alone", step())))
    trainer.add_event_handler(event, lambda word: heard.append((word, step())), "word")
    trainer.add_event_handler(event, with_engine_and_more, "more", sign=-1)
    trainer.add_event_handler(event(once=2), lambda _: heard.append(("once", step())))
    before = trainer.logger.level
    trainer.logger.setLevel(level)
    try:
        trainer.train()
    finally:
        trainer.logger.setLevel(before)
    first = [("alone", 1), ("word", 1), ("more", -1)]
    assert heard == [*first, ("alone", 2), ("word", 2), ("more", -2), ("once", 2)]


def test_the_timeline_names_the_handlers_in_the_order_of_the_loop() -> None:
    recorder = RecordingHandler()
    trainer = make_trainer(handlers=(LossEMA(), NaNRollback()))
    trainer.attach_defaults()
    timeline = trainer.timeline()
    assert ("ITERATION_STARTED", ["schedule"]) in timeline
    assert ("ITERATION_COMPLETED", ["loss_ema", "nan_rollback"]) in timeline
    assert [event for event, _ in timeline].index("ITERATION_STARTED") < [
        event for event, _ in timeline
    ].index("FLLM_EVALUATION_DUE")
    recorder.attach(trainer)
    assert any("RecordingHandler" in names for _, names in trainer.timeline())

    def look(engine: Trainer) -> None:
        pass

    trainer.add_event_handler(Events.STARTED, look)
    trainer.add_event_handler(
        Events.STARTED, trainer.interrupt
    )  # a method of its own is no handler
    trainer.add_event_handler(Events.STARTED, partial(LossEMA().update, trainer))
    assert dict(trainer.timeline())["STARTED"] == ["RecordingHandler", "look", "loss_ema"]


def test_a_warmup_schedule_from_the_class_is_applied_by_the_trainer_alone() -> None:
    train, val = tiny_loaders()
    model = tiny_model()
    optimizer = OptimizerBuilder.build("adamw", model, 1.0)
    trainer = Trainer(model, train, val, optimizer, LinearWarmup(optimizer, 4), device="cpu")
    trainer.attach_defaults()
    trainer.run(max_iters=6)
    assert trainer.history.lr == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_checkpoints_go_where_train_is_told(tmp_path):
    train, val = tiny_loaders()
    config = TrainingConfig(total_steps=2, checkpoint_dir=str(tmp_path / "configured"))
    trainer = Trainer(tiny_model(), train, val, device="cpu", config=config)
    trainer.train(checkpoint_dir=tmp_path / "told")
    assert (tmp_path / "told" / "step-00000002").is_dir()
    trainer.train(num_epochs=1, checkpoint_dir=tmp_path / "told")  # the same again
    assert trainer.state.iteration == len(train)
    assert not (tmp_path / "configured").exists()
