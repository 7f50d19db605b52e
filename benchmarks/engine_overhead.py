"""What the engine adds to a step: its loop, its default handlers and the guard.

    python benchmarks/engine_overhead.py [--data SOURCE] [--steps 2000] [--model d_model=32 ...]

Assembles a run from configs/nanogpt_cpu.yaml as `run` does, with every default handler writing
what it writes, and trains it; in turn with it, four steps each, the same model is trained from the
same weights on the same windows by a loop written by hand, which has nothing but the learning rate,
zero_grad, forward, backward, clipping and the optimizer. Prints one JSON object with the median of
the differences; exits with 1 if the engine costs more than 50 microseconds a step, or if the
weights are not bitwise equal at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from ignite.engine import Events
from torch import nn
from torch.nn import functional

from fundamentallm.config import load_config
from fundamentallm.data.loader import TokenWindowLoader
from fundamentallm.engine import run_directory
from fundamentallm.engine.assemble import assemble
from fundamentallm.engine.console import logging_to
from fundamentallm.training.distributed import Ranks
from fundamentallm.training.optimizers import OptimizerBuilder
from fundamentallm.training.trainer import Trainer

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "nanogpt_cpu.yaml"
TURN = 4  # steps
LIMIT = 50.0  # microseconds a step


def bare_loop(trainer: Trainer, model: nn.Module) -> Iterator[None]:
    """Train a model by hand as a trainer would, a step each time that it is asked."""
    config = trainer.config
    optimizer = OptimizerBuilder.build(
        config.optimizer.name,
        model,
        config.learning_rate,
        defaults={"eps": config.optimizer_eps, "weight_decay": config.optimizer_weight_decay},
        **config.optimizer.options,
    )
    base = [group["lr"] for group in optimizer.param_groups]
    parameters = list(model.parameters())
    loader = copy.copy(trainer.train_loader)
    assert isinstance(loader, TokenWindowLoader)
    loader.set_position(0, 0)
    assert config.max_grad_norm is not None
    for step, window in enumerate(itertools.chain.from_iterable(itertools.repeat(loader)), start=1):
        factor = trainer.scheduler.multiplier(step)
        for group, rate in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = rate * factor
        optimizer.zero_grad(set_to_none=True)
        for batch in window.micro_batches:
            logits = model(batch["input_ids"]).flatten(0, 1)
            loss = functional.cross_entropy(logits, batch["target_ids"].flatten(), reduction="sum")
            (loss * (1 / window.num_tokens)).backward()
        nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        yield


class InTurn:
    """Lets the hand-written loop take its steps between those of the engine, and times both."""

    def __init__(self, bare: Iterator[None]) -> None:
        self.bare = bare
        self.engine_seconds: list[float] = []
        self.bare_seconds: list[float] = []
        self._began: float | None = None

    def attach(self, trainer: Trainer) -> None:
        """Begin behind the first step."""
        trainer.add_event_handler(Events.ITERATION_COMPLETED(every=TURN), self.take_turn)

    def take_turn(self) -> None:
        """End the engine's turn, take as many steps by hand, and begin the next."""
        now = time.perf_counter()
        if self._began is not None:
            self.engine_seconds.append((now - self._began) / TURN)
        began = time.perf_counter()
        for _ in range(TURN):
            next(self.bare)
        now = time.perf_counter()
        if self._began is not None:
            self.bare_seconds.append((now - began) / TURN)
        self._began = time.perf_counter()


def compare(overrides: list[str]) -> dict[str, object]:
    """Train both and compare."""
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as held:
        config = load_config(CONFIG, overrides)
        directory = run_directory.choose(config, "never", Path(scratch) / "run")
        run = assemble(config, directory, Ranks())
        directory.path.mkdir()
        held.enter_context(logging_to(directory.path / "log.txt"))
        trainer = run.trainer
        by_hand = copy.deepcopy(trainer.model).train()
        turns = InTurn(bare_loop(trainer, by_hand))
        turns.attach(trainer)
        trainer.run()
        states = trainer.model.state_dict(), by_hand.state_dict()
        equal = all(torch.equal(states[0][name], states[1][name]) for name in states[1])
    differences = [
        engine - bare for engine, bare in zip(turns.engine_seconds, turns.bare_seconds, strict=True)
    ]
    quarters = statistics.quantiles(differences, n=4)
    return {
        "steps": trainer.state.iteration,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "handlers": sorted(trainer.attached),
        "ms a step, by hand": round(statistics.median(turns.bare_seconds) * 1e3, 3),
        "ms a step, engine": round(statistics.median(turns.engine_seconds) * 1e3, 3),
        "microseconds that the engine adds, median": round(statistics.median(differences) * 1e6, 1),
        "quartiles": [round(q * 1e6, 1) for q in (quarters[0], quarters[2])],
        "weights bitwise equal": equal,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", default="tinyshakespeare")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--model", nargs="*", default=["d_model=64", "num_layers=2"])
    options = parser.parse_args()
    report = compare(
        [
            f"data.source={options.data}",
            f"training.total_steps={options.steps}",
            f"training.eval_steps={options.steps}",
            *(f"model.{field}" for field in options.model),
        ]
    )
    added = report["microseconds that the engine adds, median"]
    assert isinstance(added, float)
    report["sound"] = added <= LIMIT and bool(report["weights bitwise equal"])
    print(json.dumps(report, indent=2))
    return 0 if report["sound"] else 1


if __name__ == "__main__":
    sys.exit(main())
