"""What the numerical guard costs: the vote, the robust statistics, and what a redo needs.

    python benchmarks/guard_cost.py [--rounds 250] [--steps 4]

Times a step of about 10 ms with the guard and its controllers, and the same step without: nothing
is read or judged, no random state is kept, nothing is remembered. Both in turn, a round each, so
that whatever else the machine does falls on both alike; and the unguarded step against itself,
which shows how far such a ratio can be trusted. Then each part of the guard by itself, many times
over: with warm caches, which a real step does not have. Prints one JSON object; exits with 1 if
the guarded step takes 1 % longer or more.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from ignite.engine import Events
from torch import Tensor

from fundamentallm.compute.rng import capture_generators
from fundamentallm.config import TrainingConfig
from fundamentallm.testing import tiny_loaders, tiny_model
from fundamentallm.training import loop
from fundamentallm.training.handlers import NaNRollback, Spikes
from fundamentallm.training.step import TrainStep
from fundamentallm.training.trainer import Trainer

SHARE = 0.01


class Unguarded(TrainStep):
    """A step that looks at nothing: loss and norm stay where they are."""

    def _agree(self, nll: Tensor, grad_norm: Tensor, num_tokens: int) -> tuple[float, float]:
        return 0.0, 0.0

    def _judge(self) -> str:
        return ""


def make_trainer(guarded: bool) -> Trainer:
    torch.manual_seed(0)
    train, _ = tiny_loaders(sequence_length=64, batch_size=4)
    trainer = Trainer(
        tiny_model(sequence_length=64, d_model=96, num_layers=2, num_heads=4),
        train,
        device="cpu",
        config=TrainingConfig(total_steps=10**6, warmup_steps=0),
        handlers=[NaNRollback(), Spikes()] if guarded else [],
    )
    if not guarded:
        trainer.step.__class__ = Unguarded
    return trainer


def seconds_a_step(trainer: Trainer, steps: int, guarded: bool) -> float:
    """Take steps on one window, without the loop around them."""
    window = trainer.train_loader.window_at(0, 0)
    capture = loop.capture_generators
    if not guarded:
        loop.capture_generators = lambda device: {}
    try:
        began = time.perf_counter()
        for _ in range(steps):
            trainer.state.iteration += 1
            trainer.state.output = trainer._train_step(window)
            trainer.fire_event(Events.ITERATION_COMPLETED)
        return (time.perf_counter() - began) / steps
    finally:
        loop.capture_generators = capture


def microseconds(work: Callable[[], Any], repeats: int = 2000) -> float:
    """Return the median time of a call, over blocks of 100."""
    blocks = []
    for _ in range(repeats // 100):
        began = time.perf_counter()
        for _ in range(100):
            work()
        blocks.append((time.perf_counter() - began) / 100)
    return statistics.median(blocks) * 1e6


def parts(trainer: Trainer) -> dict[str, float]:
    """Time each part of the guard on the trainer as it stands after some steps."""
    spikes, rollback = (trainer.attached[name] for name in ("spikes", "nan_rollback"))
    step = trainer.step
    nll, norm = torch.tensor(3.0, dtype=torch.float64), torch.tensor(1.0)

    def memory_of_a_step() -> None:
        rollback.note_good_window(trainer)
        rollback.note_metrics(trainer)

    works: dict[str, Callable[[], Any]] = {
        "vote: loss and norm packed and read": lambda: step._agree(nll, norm, 1),
        "judgement": step._judge,
        "random state before the step": lambda: capture_generators(trainer.device),
        "median and MAD of loss and norm": lambda: spikes.look_and_accept(trainer),
        "what a report would need": memory_of_a_step,
    }
    return {name: round(microseconds(work), 2) for name, work in works.items()}


def compare(guarded: bool, rounds: int, steps: int) -> dict[str, Any]:
    """Time a trainer against an unguarded one, in turn."""
    contestants = (guarded, False)
    trainers = [make_trainer(kind) for kind in contestants]
    for kind, trainer in zip(contestants, trainers, strict=True):
        seconds_a_step(trainer, 200, kind)  # fills the window of the statistics
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds):
        for index in (0, 1) if number % 2 else (1, 0):
            times[index].append(seconds_a_step(trainers[index], steps, contestants[index]))
    ratios = [one / other for one, other in zip(*times, strict=True)]
    return {
        "ms a step": round(statistics.median(times[0]) * 1e3, 3),
        "ms a step, unguarded": round(statistics.median(times[1]) * 1e3, 3),
        "ratio, median of the rounds": round(statistics.median(ratios), 4),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=250)
    parser.add_argument("--steps", type=int, default=4)
    options = parser.parse_args()
    guarded = compare(True, options.rounds, options.steps)
    itself = compare(False, options.rounds, options.steps)
    trainer = make_trainer(True)
    seconds_a_step(trainer, 200, True)
    sound = guarded["ratio, median of the rounds"] < 1.0 + SHARE
    report = {
        "rounds": options.rounds,
        "steps a round": options.steps,
        "guarded": guarded,
        "unguarded against itself": itself,
        "microseconds by part, warm": parts(trainer),
        "sound": sound,
    }
    print(json.dumps(report, indent=2))
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
