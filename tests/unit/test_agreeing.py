"""What one rank of two does with the word of the other, in one process."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from ignite.engine import Events
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fundamentallm.compute.distributed import Ranks
from fundamentallm.compute.precision import Precision
from fundamentallm.config.training import TrainingConfig
from fundamentallm.data.batch import Window
from fundamentallm.errors import DataError
from fundamentallm.events import TrainingEvents
from fundamentallm.testing import tiny_loaders, tiny_model
from fundamentallm.training.losses import LanguageModelingLoss
from fundamentallm.training.step import StepOutput, TrainStep
from fundamentallm.training.trainer import Trainer

CPU = torch.device("cpu")
OWN, OTHERS = 16, 10  # valid targets of the two ranks
VOTES = (
    "exhausted",
    "leaving",
    "stopped",
    "fault",
    "end_epoch",
    "skip_epoch_completed",
    "hurries",
)


class Pair(Ranks):
    """The first of two ranks; the other does the same, but for what `others` says instead.

    Attributes:
        others: by the number of values of a sum, what the other rank puts into it.
        text: what the other rank sends.
    """

    others: ClassVar[Callable[[list[float]], Sequence[float]]]
    text: ClassVar[str] = ""

    def __init__(self) -> None:
        super().__init__(0, 2, 0)

    def sum_counts(self, counts: Sequence[int]) -> list[int]:
        own = [int(count) for count in counts]
        return [a + int(b) for a, b in zip(own, type(self).others(own), strict=True)]

    def sum_tensor(self, tensor: Tensor) -> Tensor:
        return tensor + torch.tensor(type(self).others(tensor.tolist()), dtype=tensor.dtype)

    def broadcast_text(self, text: str, source: int = 0) -> str:
        return text if source == self.rank else type(self).text

    def barrier(self) -> None:
        pass


@pytest.fixture
def pair(monkeypatch) -> type[Pair]:
    monkeypatch.setattr(Pair, "others", staticmethod(lambda own: own), raising=False)
    monkeypatch.setattr(Pair, "text", "")
    return Pair


# ------------------------------------------------------------------ the step


def step_of(optimizer_rate: float = 0.1) -> tuple[TrainStep, nn.Module, list[Tensor]]:
    """Return a step on a rank of two, its model, and where it puts the gradient it was ready with.

    Plain SGD, so that a refused update is seen in the weights.
    """
    torch.manual_seed(0)
    model = tiny_model()
    seen: list[Tensor] = []

    def notify(event: TrainingEvents) -> None:
        if event is TrainingEvents.FLLM_GRADIENTS_READY:
            seen[:] = [p.grad.clone() for p in model.parameters() if p.grad is not None]

    optimizer = torch.optim.SGD(model.parameters(), lr=optimizer_rate)
    loss_fn = LanguageModelingLoss()
    step = TrainStep(model, model, optimizer, loss_fn, Precision("fp32", CPU), Pair(), None, notify)
    return step, model, seen


def own_window() -> Window:
    train, _ = tiny_loaders(batch_size=2)
    return train.window_at(0, 0)


def take(step: TrainStep) -> StepOutput:
    return step(own_window(), OWN + OTHERS, 4)


def test_loss_and_norm_are_those_of_both_ranks_and_the_gradient_is_of_all_tokens(pair, monkeypatch):
    step, model, seen = step_of()
    batch = own_window().micro_batches[0]
    logits = model(batch["input_ids"]).flatten(0, 1)
    nll = nn.functional.cross_entropy(logits, batch["target_ids"].flatten(), reduction="sum")
    # What averaging over two ranks makes the sum over both, divided by all tokens.
    expected = [2 * g / (OWN + OTHERS) for g in torch.autograd.grad(nll, list(model.parameters()))]
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in expected))
    monkeypatch.setattr(Pair, "others", staticmethod(lambda own: [0.75, norm / 2, 0.0]))
    output = take(step)
    assert output.loss == pytest.approx(nll.item() / (OWN + OTHERS) + 0.75, rel=1e-6)
    assert output.grad_norm == pytest.approx(norm, rel=1e-5)
    assert output.rejection == ""
    torch.testing.assert_close(seen, expected)


@pytest.mark.parametrize(
    ("others", "own_rate", "rejection"),
    [
        ([math.nan, 1.0, 0.0], 0.1, "nonfinite"),
        ([1.0, math.inf, 0.0], 0.1, "nonfinite"),
        ([1.0, 1.0, 1.0], 0.1, "learning rate"),
        ([1.0, 1.0, 0.0], math.nan, "learning rate"),
        ([1.0, 1.0, 0.0], 0.1, ""),
    ],
)
def test_what_is_bad_on_one_rank_is_refused_on_both(pair, monkeypatch, others, own_rate, rejection):
    step, model, _ = step_of(own_rate)
    before = [parameter.clone() for parameter in model.parameters()]
    monkeypatch.setattr(Pair, "others", staticmethod(lambda own: others))
    assert take(step).rejection == rejection
    same = [torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert all(same) == bool(rejection)
    # A refusal is forgotten with the next step.
    step.optimizer.param_groups[0]["lr"] = 0.1
    monkeypatch.setattr(Pair, "others", staticmethod(lambda own: [1.0, 1.0, 0.0]))
    assert take(step).rejection == ""


@pytest.mark.parametrize(
    ("own", "others", "rejection"),
    [("mine", 0, "mine"), ("", 1, "rejected on another rank"), ("", 0, "")],
)
def test_a_veto_of_one_rank_holds_on_both(pair, monkeypatch, own, others, rejection):
    step, _, _ = step_of()
    notify = step.notify

    def veto(event: TrainingEvents) -> None:
        notify(event)
        if event is TrainingEvents.FLLM_GRADIENTS_READY:
            step.veto = own

    step.notify, step.vetoes_possible = veto, True
    sums = {3: [1.0, 1.0, 0.0], 1: [others]}
    monkeypatch.setattr(Pair, "others", staticmethod(lambda values: sums[len(values)]))
    assert take(step).rejection == rejection


def test_gradients_are_exchanged_once_a_step(pair, monkeypatch):
    step, model, _ = step_of()
    monkeypatch.setattr(Pair, "others", staticmethod(lambda own: [1.0, 1.0, 0.0]))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        step.forward = DistributedDataParallel(model)
        exchanged: list[bool] = []
        step.forward.register_forward_pre_hook(
            lambda module, inputs: exchanged.append(module.require_backward_grad_sync)
        )
        batches = own_window().micro_batches * 3
        step(Window(batches, 3 * OWN), 3 * OWN, 6)
    finally:
        dist.destroy_process_group()
    assert exchanged == [False, False, True]


# ------------------------------------------------------------------ the loop


def trainer(steps: int = 12) -> Trainer:
    """Return a trainer on a rank of two: five steps an epoch."""
    torch.manual_seed(0)
    train, val = tiny_loaders(batch_size=8)
    made = Trainer(tiny_model(), train, val, device="cpu", config=TrainingConfig(total_steps=steps))
    made.ranks = made.step.ranks = made.evaluator.ranks = made.budget._ranks = Pair()
    return made


def vote(monkeypatch: pytest.MonkeyPatch, made: Trainer, at: int, *names: str) -> None:
    """Let the other rank vote at a step, as it begins."""

    def others(own: list[float]) -> Sequence[float]:
        if len(own) != 3 + len(VOTES) or made.state.iteration != at:
            return own
        return [*own[:3], *(float(name in names) for name in VOTES)]

    monkeypatch.setattr(Pair, "others", staticmethod(others))


def epoch_ends(made: Trainer) -> list[int]:
    ends: list[int] = []
    made.add_event_handler(Events.EPOCH_COMPLETED, lambda: ends.append(made.state.iteration))
    return ends


def test_a_twin_changes_nothing(pair):
    made = trainer()
    ends = epoch_ends(made)
    tokens: list[Any] = []
    made.add_event_handler(
        Events.ITERATION_COMPLETED,
        lambda: tokens.append((made.state.output.num_tokens, made.state.output.num_sequences)),
    )
    computed: list[int] = []
    made.add_event_handler(
        Events.ITERATION_COMPLETED, lambda: computed.append(made.tokens_computed)
    )
    made.run()
    assert made.state.iteration == 12
    assert ends == [5, 10]
    assert tokens[:5] == [(128, 16)] * 4 + [(112, 14)]
    assert computed[:5] == [128] * 4 + [112]


@pytest.mark.parametrize("name", ["exhausted", "leaving"])
def test_the_run_ends_with_the_step_at_which_another_rank_must_end(pair, monkeypatch, name):
    made = trainer()
    vote(monkeypatch, made, 7, name)
    made.run()
    assert made.state.iteration == 7
    assert bool(made.finished) == (name == "exhausted")


@pytest.mark.parametrize("skip", [False, True])
def test_the_epoch_ends_with_the_step_at_which_another_rank_ends_it(pair, monkeypatch, skip):
    made = trainer()
    ends = epoch_ends(made)
    vote(monkeypatch, made, 7, "end_epoch", *(["skip_epoch_completed"] if skip else []))
    made.run()
    assert made.epochs.cuts == [(7, 2)]
    assert ends == ([5, 12] if skip else [5, 7, 12])
    assert made.state.iteration == 12


def test_a_data_error_of_another_rank_ends_the_run_before_the_step(pair, monkeypatch):
    made = trainer()
    fields = {"what": "a shard is cut off", "where": "b", "got": "", "expected": "", "fix": ""}
    monkeypatch.setattr(Pair, "text", json.dumps(fields))
    faulty = {3 + len(VOTES): "fault"}

    def others(own: list[float]) -> Sequence[float]:
        if len(own) in faulty and made.state.iteration == 4:
            return [*own[:3], *(float(name == "fault") for name in VOTES)]
        # `first` asks each rank for its flag, in its own place.
        return [0, 1] if own == [0, 0] else own

    monkeypatch.setattr(Pair, "others", staticmethod(others))
    with pytest.raises(DataError, match="a shard is cut off"):
        made.run()
    assert made.state.iteration == 3


def test_a_data_error_of_this_rank_is_forgotten_with_the_next_run(pair, monkeypatch):
    made = trainer()
    window_at = made.train_loader.window_at

    def torn(epoch: int, step: int) -> Window:
        if step == 3:
            raise DataError("a shard is cut off")
        return window_at(epoch, step)

    monkeypatch.setattr(made.train_loader, "window_at", torn)
    with pytest.raises(DataError, match="a shard is cut off"):
        made.run()
    assert made.state.iteration == 3
    monkeypatch.setattr(made.train_loader, "window_at", window_at)
    made.run()
    assert made.state.iteration == 12


def test_the_veto_of_another_rank_is_asked_for_where_one_may_veto(pair, monkeypatch):
    made = trainer()
    heard: list[tuple[int, str]] = []
    made.add_event_handler(TrainingEvents.FLLM_GRADIENTS_READY, lambda: None)
    made.add_event_handler(
        TrainingEvents.FLLM_STEP_REJECTED,
        lambda: heard.append((made.state.iteration, made.state.output.rejection)),
    )

    def others(own: list[float]) -> Sequence[float]:
        return [1] if len(own) == 1 and made.state.iteration == 4 else own

    monkeypatch.setattr(Pair, "others", staticmethod(others))
    made.run()
    assert heard == [(4, "rejected on another rank")]


def test_ranks_end_an_epoch_one_step_after_a_handler_wished_it(pair):
    made = trainer()
    ends = epoch_ends(made)
    made.add_event_handler(Events.ITERATION_COMPLETED(once=6), lambda: made.terminate_epoch())
    made.run()
    assert made.epochs.cuts == [(7, 2)]
    assert ends == [5, 7, 12]


@pytest.mark.parametrize(
    ("event", "last"),
    [(Events.ITERATION_COMPLETED(once=3), 4), (TrainingEvents.FLLM_EVALUATION_DUE, 5)],
    ids=["in a step", "in an evaluation"],
)
def test_ranks_end_the_run_where_all_have_heard_that_a_handler_terminates_it(pair, event, last):
    class Stopper:
        def __call__(self, engine: Trainer) -> None:
            engine.terminate()

    made = trainer()
    made.add_event_handler(event, Stopper())
    made.run()
    assert (made.state.iteration, made.finished) == (last, "stopped by Stopper")


def test_the_ranks_wait_for_each_other_before_they_read_a_checkpoint(pair, monkeypatch):
    """The first rank may still be writing it."""
    made = trainer(4)
    start = made.state_dict()
    order: list[str] = []

    class Point:
        def step_to_restore(self, before: int | None = None) -> int:
            return 0

        def restore_before(self, trainer: Trainer, before: int | None = None) -> None:
            order.append("read")
            trainer.load_state_dict(start)

        def end_due_at(self, step: int) -> str:
            return ""

        def note_end_of_step(self, trainer: Trainer) -> None:
            pass

    monkeypatch.setattr(Pair, "barrier", lambda self: order.append("wait"))
    made.restore_from(Point())  # type: ignore[arg-type]

    @made.on(Events.ITERATION_COMPLETED)
    def go_back() -> None:
        if made.state.iteration == 2 and not order:
            made.roll_back("a test")

    made.run()
    assert order == ["wait", "read"]
    assert made.history.steps == [1, 2, 3, 4]
