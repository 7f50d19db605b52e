"""Speed by a clock that stands still but where a test moves it."""

from __future__ import annotations

import pytest
import torch
from ignite.engine import Events
from torch.utils.flop_counter import FlopCounterMode

from fundamentallm.config.training import TrainingConfig
from fundamentallm.events import TrainingEvents
from fundamentallm.testing import tiny_loaders, tiny_model
from fundamentallm.training.handlers import (
    Evaluation,
    ModelFlopsUtilization,
    Throughput,
    throughput,
)
from fundamentallm.training.trainer import Trainer


class FakeClock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


def timed_run(window: int, seconds: list[float], pause: float = 0.0) -> list[tuple[float, float]]:
    """Train one step per entry of `seconds`; return tokens and samples a second after each."""
    clock = FakeClock()
    train, val = tiny_loaders()
    config = TrainingConfig(total_steps=len(seconds), eval_steps=1)
    trainer = Trainer(
        tiny_model(),
        train,
        val,
        device="cpu",
        config=config,
        handlers=[Throughput(window, clock), Evaluation()],
    )
    rates: list[tuple[float, float]] = []

    def step(engine: Trainer) -> None:
        clock.advance(seconds[engine.state.iteration - 1])

    def read(engine: Trainer) -> None:
        metrics = engine.state.metrics
        rates.append((metrics["train/tokens_per_second"], metrics["train/samples_per_second"]))

    trainer.add_event_handler(TrainingEvents.FLLM_MICRO_BATCH_COMPLETED, step)
    trainer.add_event_handler(TrainingEvents.FLLM_METRICS_READY, read)
    for event in (
        Events.STARTED,
        Events.EPOCH_STARTED,
        TrainingEvents.FLLM_EVALUATION_STARTED,
        TrainingEvents.FLLM_EVALUATION_COMPLETED,
        TrainingEvents.FLLM_CHECKPOINT_DUE,
    ):
        trainer.add_event_handler(event, lambda: clock.advance(pause))
    trainer.run()
    return rates


def test_counts_tokens_and_samples_over_the_last_steps():
    # 4 sequences of 8 tokens a step.
    rates = timed_run(window=2, seconds=[1.0, 3.0, 4.0])
    expected = [(32 / 1, 4 / 1), (64 / 4, 8 / 4), (64 / 7, 8 / 7)]
    assert rates == [pytest.approx(pair) for pair in expected]


def test_counts_what_is_computed_though_its_target_is_masked():
    # 1 target in 8 counts, as in an example with a long prompt: the model computes all of them.
    ids = torch.ones(4, 8, dtype=torch.int64)
    targets = torch.full_like(ids, -100)
    targets[:, -1] = 1
    clock = FakeClock()
    throughput, mfu = Throughput(5, clock), ModelFlopsUtilization(peak_tflops=1e-6)
    trainer = Trainer(
        tiny_model(),
        [(ids, targets)],
        device="cpu",
        config=TrainingConfig(total_steps=1),
        handlers=[throughput, mfu],
    )
    trainer.add_event_handler(Events.GET_BATCH_COMPLETED, lambda: clock.advance(2.0))
    with FlopCounterMode(display=False) as counter:
        tiny_model()(ids).sum().backward()
    trainer.run()
    assert trainer.state.tokens_seen == 4
    assert trainer.state.metrics["train/tokens_per_second"] == pytest.approx(32 / 2)
    # Torch counts the attention of a CPU not at all, ours the whole square.
    share = counter.get_total_flops() / 2 / 1e6
    assert share <= trainer.state.metrics["train/mfu"] <= 1.3 * share


def test_leaves_pauses_out():
    seconds = [0.5] * 12
    assert timed_run(50, seconds, pause=100.0) == [
        pytest.approx(pair) for pair in timed_run(50, seconds)
    ]


def test_counts_the_wait_for_the_data():
    clock = FakeClock()
    train, _ = tiny_loaders()
    trainer = Trainer(
        tiny_model(),
        train,
        device="cpu",
        config=TrainingConfig(total_steps=1),
        handlers=[Throughput(5, clock)],
    )
    trainer.add_event_handler(Events.GET_BATCH_COMPLETED, lambda: clock.advance(8.0))
    trainer.run()
    assert trainer.state.metrics["train/tokens_per_second"] == pytest.approx(4.0)


def test_counts_the_fewer_tokens_of_an_epochs_last_step():
    # 39 sequences: the tenth step has three.
    rates = timed_run(window=1, seconds=[1.0] * 11)
    assert [tokens for tokens, _ in rates] == pytest.approx([32.0] * 9 + [24.0, 32.0])


def test_survives_a_clock_that_stands_still():
    (tokens, samples), *_ = timed_run(window=3, seconds=[0.0])
    assert tokens > samples > 0


def test_refuses_an_empty_window():
    with pytest.raises(ValueError, match="window must be at least 1 step"):
        Throughput(window=0)


class SlowDevice:
    """Ends each step of two seconds when the step after it does."""

    def __init__(self) -> None:
        self.marks = 0

    def mark(self) -> int:
        self.marks += 1
        return self.marks

    def seconds(self, began: int, ended: int) -> float | None:
        return 2.0 if ended < self.marks else None


def test_steps_that_the_device_has_not_finished_count_at_a_later_one(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(throughput, "device_timer", lambda device: SlowDevice())
    train, _ = tiny_loaders()
    trainer = Trainer(
        tiny_model(),
        train,
        device="cpu",
        config=TrainingConfig(total_steps=3),
        handlers=[Throughput(5)],
    )
    rates: list[float | None] = []
    trainer.add_event_handler(
        TrainingEvents.FLLM_METRICS_READY,
        lambda: rates.append(trainer.state.metrics.get("train/tokens_per_second")),
    )
    trainer.run()
    # 32 tokens a step, of two seconds; nothing is known after the first.
    assert rates == [None, 16.0, 16.0]
