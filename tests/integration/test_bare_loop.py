"""The engine with its default handlers computes what a loop by hand does, bit for bit."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from fundamentallm.config import RunConfig
from fundamentallm.engine.wiring.assemble import assemble, open_machine
from fundamentallm.engine.wiring.run_directory import RunDirectory
from fundamentallm.testing import TINY_TEXT
from fundamentallm.training.trainer import Trainer

STEPS = 30


def make_trainer(directory: Path, accumulation_steps: int, clip: float) -> Trainer:
    text = directory / "text.txt"
    text.write_text(TINY_TEXT * 40, encoding="utf-8")
    config = RunConfig.model_validate(
        {
            "data": {"source": str(text), "sequence_length": 32, "batch_size": 4},
            "model": {"d_model": 32, "num_layers": 2, "num_heads": 2, "dropout": 0.0},
            "training": {
                "learning_rate": 1e-2,
                "total_steps": STEPS,
                "warmup_steps": 10,
                "accumulation_steps": accumulation_steps,
                "max_grad_norm": clip,
                "eval_steps": 10,
                "log_steps": 5,
            },
            "handlers": {"samples": {"num_tokens": 5}},
        }
    )
    return assemble(
        config, RunDirectory(directory, directory / "checkpoints"), open_machine(config)
    ).trainer


def train_by_hand(trainer: Trainer, model: nn.Module, clip: float) -> int:
    """Train a copy of the model on the trainer's windows; return how many steps were clipped."""
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": trainer.config.optimizer_weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=1e-2,
        eps=trainer.config.optimizer_eps,
        betas=trainer.optimizer.param_groups[0]["betas"],
        fused=True,
    )
    clipped = 0
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * min(1.0, (step + 1) / 10)
        optimizer.zero_grad()
        window = trainer.train_loader.window_at(*divmod(step, trainer.steps_per_epoch))
        for batch in window.micro_batches:
            logits = model(batch["input_ids"]).flatten(0, 1)
            loss = functional.cross_entropy(logits, batch["target_ids"].flatten(), reduction="sum")
            (loss * (1 / window.num_tokens)).backward()
        clipped += nn.utils.clip_grad_norm_(model.parameters(), clip).item() > clip
        optimizer.step()
    return clipped


@pytest.mark.parametrize("accumulation_steps", [1, 3])
def test_weights_equal_those_of_a_loop_by_hand(tmp_path, accumulation_steps):
    clip = 1.3
    trainer = make_trainer(tmp_path, accumulation_steps, clip)
    by_hand = copy.deepcopy(trainer.model).train()
    clipped = train_by_hand(trainer, by_hand, clip)
    trainer.run()
    assert 0 < clipped < STEPS  # some norms were cut, and some left alone
    assert trainer.state.iteration == STEPS
    for name, weight in by_hand.state_dict().items():
        assert torch.equal(trainer.model.state_dict()[name], weight), name
