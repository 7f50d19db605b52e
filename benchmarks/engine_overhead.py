"""What the engine costs: its default handlers, guard included, over a bare hand-written loop.

    python benchmarks/engine_overhead.py [--steps 1500] [--empty]

Both train the same model from the same weights on the same windows, in turn within each step: the
bare loop takes its step on a window before the engine takes it, or after, by turns. So whatever
else the machine does falls on both alike, and both begin with the caches that a real step leaves
behind. Who goes first has a cost of its own, some 50 microseconds, so the difference is taken for
each order by itself, and their mean is told. Processor time is counted, not the wall's, which other
programs have a part in. Then the bare loop against itself, which shows how far such a difference
can be trusted. Prints one JSON object; exits with 1 if the engine costs more than 50 microseconds
a step, or if the final weights are not bitwise equal.

With `--empty` the engine runs without a model's computation: all its own work a step, what a bare
loop does too included, with warm caches. That is no figure of a real run, but it moves by less than
a microsecond from one run to the next, so it shows what a change of the engine costs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from fundamentallm.config import RunConfig
from fundamentallm.data.batch import Window
from fundamentallm.engine.console import logging_to
from fundamentallm.engine.wiring.assemble import assemble, open_machine
from fundamentallm.engine.wiring.run_directory import RunDirectory
from fundamentallm.events import TrainingEvents
from fundamentallm.models.build import build_model
from fundamentallm.models.transformer import Transformer
from fundamentallm.testing import TINY_TEXT
from fundamentallm.training.trainer import Trainer

LIMIT = 50.0  # microseconds a step
MORE = "microseconds more, a step"
WARMUP = 60  # steps before the first that is timed; the windows of the statistics are full then


class BareLoop:
    """A training step as a script would have it: no engine, no handler, no guard.

    Args:
        model: to be trained.
        learning_rate: peak rate, reached after `warmup` steps in equal steps.
        warmup: those steps.
    """

    def __init__(self, model: Transformer, learning_rate: float, warmup: int) -> None:
        self.model = model.train()
        self.learning_rate = learning_rate
        self.warmup = warmup
        decay = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]
        others = [p for p in model.parameters() if all(p is not weight for weight in decay)]
        groups = [{"params": decay, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=learning_rate, fused=True)
        self.steps = 0
        self.loss = 0.0

    def step(self, window: Window) -> None:
        """Take one step on a window of one micro-batch."""
        self.steps += 1
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * min(1.0, self.steps / self.warmup)
        self.optimizer.zero_grad(set_to_none=True)
        batch = window.micro_batches[0]
        logits = self.model(batch["input_ids"])
        loss = F.cross_entropy(logits.flatten(0, 1), batch["target_ids"].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.loss = loss.item()


class Timed:
    """A loader of one window again and again, which times the steps on it.

    Attributes:
        microseconds: from the window handed over to the next asked for.
    """

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self.microseconds: list[float] = []

    def __len__(self) -> int:
        return len(self.loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def __iter__(self) -> Iterator[Window]:
        window = next(iter(self.loader))
        while True:
            began = time.perf_counter()
            yield window
            self.microseconds.append((time.perf_counter() - began) * 1e6)


def empty_steps(directory: Path, steps: int) -> dict[str, float]:
    """Return the median microseconds of steps that compute nothing, plain and logging ones."""
    trainer = make_trainer(directory, steps)
    sums = itertools.cycle([torch.tensor(1000.0 + number) for number in range(7)])
    norm = torch.tensor(0.5)

    def accumulate(window: Window, num_tokens: int) -> torch.Tensor:
        trainer.notify(TrainingEvents.FLLM_MICRO_BATCH_COMPLETED)
        return next(sums)

    step: Any = trainer.step
    step._accumulate, step._norm, step._parameters = accumulate, lambda gradients: norm, []
    step.precision.step = lambda optimizer: None
    timed = trainer.train_loader = Timed(trainer.train_loader)
    with logging_to(directory / "log.txt"):
        trainer.run()
    found: dict[bool, list[float]] = {False: [], True: []}
    for number, value in enumerate(timed.microseconds, start=1):
        if number > WARMUP:
            found[number % trainer.config.log_steps == 0].append(value)
    plain, logging = (statistics.median(found[kind]) for kind in (False, True))
    return {"plain step": round(plain, 1), "logging step": round(logging, 1)}


class InTurn:
    """A loader that has someone else take each step too, and times both.

    Args:
        loader: the trainer's.
        rival: takes the step on a window.
        log_steps: the order changes with each step and once more with each so many, so that logging
            steps meet both orders too.

    Attributes:
        rival_first: whether the rival went first, for each step.
        own: seconds of the engine's iterations, from a window handed over to the next asked for.
        rivals: seconds of the rival's.
    """

    def __init__(self, loader: Any, rival: Callable[[Window], None], log_steps: int) -> None:
        self.loader = loader
        self.rival = rival
        self.log_steps = log_steps
        self.rival_first: list[bool] = []
        self.own: list[float] = []
        self.rivals: list[float] = []
        self.owed: Window | None = None

    def __len__(self) -> int:
        return len(self.loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def __iter__(self) -> Iterator[Window]:
        for window in self.loader:
            self.owed = window
            step = len(self.own)
            self.rival_first.append((step + step // self.log_steps) % 2 == 0)
            if self.rival_first[-1]:
                self.let_rival_step()
            began = time.process_time()
            yield window
            self.own.append(time.process_time() - began)
            self.let_rival_step()

    def let_rival_step(self) -> None:
        """Have the rival take the step that it owes, if it does: a run ends within an iteration."""
        if self.owed is not None:
            window, self.owed = self.owed, None
            began = time.process_time()
            self.rival(window)
            self.rivals.append(time.process_time() - began)


def make_trainer(directory: Path, steps: int) -> Trainer:
    """Assemble a run with the default handlers, as a YAML that says nothing of handlers would."""
    text = directory / "text.txt"
    text.write_text(TINY_TEXT * 400, encoding="utf-8")
    config = RunConfig.model_validate(
        {
            "name": "overhead",
            "data": {"source": str(text), "sequence_length": 64, "batch_size": 8},
            "model": {"d_model": 64, "num_layers": 2, "num_heads": 4, "dropout": 0.0},
            # Evaluation and checkpoints are work that was asked for, not overhead.
            "training": {
                "learning_rate": 1e-3,
                "total_steps": steps,
                "warmup_steps": 20,
                "eval_steps": 10**9,
                "eval_epochs": False,
            },
        }
    )
    run = RunDirectory(directory, directory / "checkpoints")
    return assemble(config, run, open_machine(config)).trainer


def bare_loop_of(trainer: Trainer) -> BareLoop:
    """Return a bare loop over a copy of the trainer's model as it stands."""
    model = build_model(trainer.model.config)
    model.load_state_dict(trainer.model.state_dict())
    return BareLoop(model, trainer.config.learning_rate, trainer.config.warmup_steps)


def train_both(directory: Path, steps: int) -> tuple[Trainer, BareLoop, InTurn]:
    """Train the engine and the bare loop in turn; return both and the times."""
    trainer = make_trainer(directory, steps)
    bare = bare_loop_of(trainer)
    turns = trainer.train_loader = InTurn(trainer.train_loader, bare.step, trainer.config.log_steps)
    with logging_to(directory / "log.txt"):
        trainer.run()
    turns.let_rival_step()
    return trainer, bare, turns


def train_bare_twice(directory: Path, steps: int) -> InTurn:
    """Train two bare loops in turn; return the times."""
    trainer = make_trainer(directory, steps)
    one, other = bare_loop_of(trainer), bare_loop_of(trainer)
    turns = InTurn(trainer.train_loader, other.step, trainer.config.log_steps)
    while one.steps < steps:
        for window in turns:
            one.step(window)
            if one.steps == steps:
                break
    return turns


def unequal_weights(trainer: Trainer, bare: BareLoop) -> list[str]:
    """Return the names of the weights that differ in any bit."""
    theirs = bare.model.state_dict()
    return [
        name
        for name, weight in trainer.model.state_dict().items()
        if weight.numpy().tobytes() != theirs[name].numpy().tobytes()
    ]


def summary(turns: InTurn, log_steps: int) -> dict[str, float]:
    """Return the median difference, of plain steps and of logging ones, weighted as they occur."""
    pairs = list(zip(turns.own, turns.rivals, strict=False))
    found: dict[tuple[bool, bool], list[float]] = {}  # by whether it logs, and the order
    for step, (own, rival) in enumerate(pairs, start=1):
        if step > WARMUP:
            kind = step % log_steps == 0, turns.rival_first[step - 1]
            found.setdefault(kind, []).append((own - rival) * 1e6)
    medians = {kind: statistics.median(values) for kind, values in found.items()}
    plain, logging = (
        statistics.mean(medians[logs, first] for first in (False, True)) for logs in (False, True)
    )
    # Of a median: 1.25 standard deviations of the values, taken from their quartiles.
    variances = []
    for first in (False, True):
        low, _, high = statistics.quantiles(found[False, first], n=4)
        variances.append((1.25 * (high - low) / 1.349) ** 2 / len(found[False, first]))
    error = sum(variances) ** 0.5 / 2
    return {
        "ms a step": round(statistics.median(own for own, _ in pairs[WARMUP:]) * 1e3, 3),
        "ms a step of the rival": round(statistics.median(r for _, r in pairs[WARMUP:]) * 1e3, 3),
        "microseconds more, plain step": round(plain, 1),
        "microseconds more, logging step": round(logging, 1),
        MORE: round((1 - 1 / log_steps) * plain + logging / log_steps, 1),
        "standard error": round(error, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--empty", action="store_true", help="time steps that compute nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)  # processor time is counted
    total = WARMUP + options.steps
    if options.empty:
        with tempfile.TemporaryDirectory() as name:
            print(json.dumps(empty_steps(Path(name), total)))
        return 0
    with tempfile.TemporaryDirectory() as name:
        trainer, bare, turns = train_both(Path(name), total)
    with tempfile.TemporaryDirectory() as name:
        itself = train_bare_twice(Path(name), total)
    unequal = unequal_weights(trainer, bare)
    log_steps = trainer.config.log_steps
    engine = summary(turns, log_steps)
    sound = not unequal and engine[MORE] <= LIMIT
    report = {
        "steps": options.steps,
        "engine over the bare loop": engine,
        "bare loop over itself": summary(itself, log_steps),
        "weights that differ": unequal,
        "limit, microseconds a step": LIMIT,
        "sound": sound,
    }
    print(json.dumps(report, indent=2))
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
