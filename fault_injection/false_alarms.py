"""A clean run is left alone: no incident in many seeds of real training.

    python -m fault_injection.false_alarms [--data SOURCE] [--seeds 20] [--steps 500]

Trains a small model on a text with the guard, the spikes' default threshold and weight averages,
once a seed, and counts incidents. For each figure that is watched it tells how near the nearest
step came to the threshold. Then the same with a threshold that must be met, so that a series that
listens to nothing would show. Prints one JSON object; exits with 1 after any false alarm.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from fault_injection.faults import silent
from fundamentallm.config import TrainingConfig, TransformerConfig
from fundamentallm.data.loaders import Batching, TokenWindowLoader
from fundamentallm.data.sources import read_source, split_tokens
from fundamentallm.data.tokenizer import build_tokenizer
from fundamentallm.events import TrainingEvents
from fundamentallm.models.build import build_model
from fundamentallm.training.handlers import NaNRollback, Schedule, Spikes, WeightEMA
from fundamentallm.training.optimizers import OptimizerBuilder
from fundamentallm.training.schedulers import CosineAnnealingScheduler
from fundamentallm.training.trainer import Trainer

CONTEXT, BATCH_SIZE, PEAK_RATE = 32, 8, 3e-3


class Nearest(Spikes):
    """Keeps the highest score of each figure that any step has had."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.highest = {"loss": 0.0, "gradient norm": 0.0}

    def look(self, trainer: Trainer) -> None:
        """Note the scores, then do as always."""
        scores = {
            "loss": self.losses.score(trainer.step.loss),
            "gradient norm": self.norms.score(math.log(trainer.step.norm)),
        }
        self.highest = {name: max(self.highest[name], score) for name, score in scores.items()}
        super().look(trainer)


def train(tokens: Any, vocab_size: int, seed: int, steps: int, spikes: Spikes) -> list[str]:
    """Train one seed; return its incidents as text."""
    torch.manual_seed(seed)
    model = build_model(
        TransformerConfig(
            vocab_size=vocab_size, sequence_length=CONTEXT, d_model=32, num_layers=2, num_heads=2
        )
    )
    optimizer = OptimizerBuilder.build("adamw", model, PEAK_RATE)
    scheduler = CosineAnnealingScheduler(optimizer, steps, warmup_steps=steps // 10)
    trainer = Trainer(
        model,
        TokenWindowLoader(tokens, Batching(CONTEXT, BATCH_SIZE, seed=seed)),
        optimizer=optimizer,
        scheduler=scheduler,
        device="cpu",
        config=TrainingConfig(total_steps=steps, learning_rate=PEAK_RATE),
        handlers=[NaNRollback(), spikes, WeightEMA(), Schedule(scheduler)],
    )
    incidents: list[str] = []
    trainer.add_event_handler(
        TrainingEvents.FLLM_INCIDENT_DETECTED, lambda: incidents.append(str(trainer.state.incident))
    )
    trainer.run()
    assert trainer.state.optimizer_steps == steps - trainer.state.skipped_steps
    return incidents


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the trials and print its counts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", default="python-docs")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=500)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    text = read_source(options.data).text
    tokenizer = build_tokenizer("character", {}, text)
    tokens = split_tokens(tokenizer.encode(text), (0.9, 0.1, 0.0))["train"]
    started = time.monotonic()
    alarms, highest = [], {"loss": 0.0, "gradient norm": 0.0}
    for seed in range(options.seeds):
        spikes = Nearest()
        with silent():
            found = train(tokens, tokenizer.vocab_size, seed, options.steps, spikes)
        alarms += [f"seed {seed}: {text}" for text in found]
        highest = {name: max(highest[name], spikes.highest[name]) for name in highest}
    with silent():
        wary = train(tokens, tokenizer.vocab_size, 0, 100, Spikes(threshold=0.5))
    report = {
        "seeds": options.seeds,
        "steps": options.seeds * options.steps,
        "threshold": Spikes().threshold,
        "highest scores": {name: round(score, 2) for name, score in highest.items()},
        "alarms": alarms,
        "alarms with a threshold of 0.5 over 100 steps": len(wary),
        "seconds": round(time.monotonic() - started, 1),
        "sound": not alarms and bool(wary),
    }
    print(json.dumps(report, indent=2))
    return 0 if report["sound"] else 1


if __name__ == "__main__":
    sys.exit(main())
