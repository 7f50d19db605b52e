"""Compose a run by hand: every part of a YAML, in the order in which the engine builds them.

    python examples/compose_handlers.py [TEXT] [--epochs N] [--out DIR]

It trains the same model as `configs/train.yaml`, with the same numbers, and prints a sample. Copy
it and change a line.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from fundamentallm.config import TrainingConfig, TransformerConfig
from fundamentallm.data.loaders import Batching, TokenWindowLoader, ValidationLoader
from fundamentallm.data.sources import read_source, split_tokens
from fundamentallm.data.tokenizer import CharacterTokenizer
from fundamentallm.inference.generate import stream_text
from fundamentallm.models.transformer import Transformer
from fundamentallm.training.handlers import (
    Hooks,
    LossEMA,
    MetricsLog,
    NaNRollback,
    Perplexity,
    Throughput,
)
from fundamentallm.training.losses import LanguageModelingLoss
from fundamentallm.training.optimizers import OptimizerBuilder
from fundamentallm.training.schedulers import CosineAnnealingScheduler
from fundamentallm.training.trainer import Trainer

SEED = 42
TEXT = Path(__file__).parent / "data" / "tiny.txt"


def main() -> float:
    """Train, print what happened, and return the last validation loss in nats per token."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", nargs="?", default=str(TEXT))
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--out", type=Path, help="a new directory; a temporary one if left out")
    options = parser.parse_args()
    out = options.out or Path(tempfile.mkdtemp(prefix="fundamentallm-"))
    out.mkdir(parents=True, exist_ok=True)

    # data feeds
    text = read_source(options.text).text
    tokenizer = CharacterTokenizer.from_text(text)
    splits = split_tokens(tokenizer.encode(text), (0.9, 0.1, 0.0))
    batching = Batching(sequence_length=64, batch_size=8, seed=SEED)
    train_loader = TokenWindowLoader(splits["train"], batching)
    val_loader = ValidationLoader(splits["val"], batching)

    # models compute
    torch.manual_seed(SEED)
    model = Transformer(
        TransformerConfig(
            vocab_size=tokenizer.vocab_size,
            sequence_length=64,
            d_model=64,
            num_layers=2,
            num_heads=2,
        )
    )

    # training steps
    total_steps = options.epochs * len(train_loader)
    optimizer = OptimizerBuilder.build("adamw", model, lr=3e-3)
    scheduler = CosineAnnealingScheduler(optimizer, total_steps, warmup_steps=total_steps // 10)
    trainer = Trainer(
        model,
        train_loader,
        val_loader,
        optimizer,
        scheduler,
        LanguageModelingLoss(),
        device="cpu",
        config=TrainingConfig(eval_steps=50, seed=SEED),
    )

    # handlers listen; the trainer adds schedule, evaluation and checkpoints by itself
    for handler in (
        LossEMA(0.98),
        Perplexity(),
        Throughput(),
        NaNRollback(),
        MetricsLog(out),
        Hooks(on_validation=report),
    ):
        handler.attach(trainer)
    history = trainer.train(num_epochs=options.epochs, checkpoint_dir=out / "checkpoints")

    print(f"\nvalidation loss {history.val_loss[-1]:.4f}, best {history.best_val_loss:.4f}")
    print("".join(stream_text(model.eval(), tokenizer, "ROMEO:\n", 200, temperature=0.8)))
    return history.val_loss[-1]


def report(trainer: Trainer, metrics: dict[str, float]) -> None:
    """Print one line a validation."""
    print(
        f"step {trainer.state.iteration:4d}: loss {metrics['train/loss_ema']:.4f},"
        f" validation {metrics['val/loss']:.4f}, {metrics['train/tokens_per_second']:,.0f} tok/s"
    )


if __name__ == "__main__":
    main()
