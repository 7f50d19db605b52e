"""Any module trains: an LSTM that knows nothing of this package, stopped and resumed bit for bit.

    python examples/lstm.py

What to learn: a model is a module from ids (B, T) to logits (B, T, V), and nothing else. A run that
goes on from a checkpoint ends with the weights of one that was never stopped, dropout included. A
metric of `ignite.metrics` on `trainer.evaluator` is measured in the pass that measures the loss.
(`own_model.py` registers a model for YAML files and all commands.)
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from ignite.metrics import Accuracy, TopKCategoricalAccuracy
from torch import Tensor, nn

from fundamentallm.config import TrainingConfig
from fundamentallm.testing import tiny_loaders
from fundamentallm.training.trainer import Trainer

VOCABULARY = 11


class LSTM(nn.Module):
    """Two layers of long short-term memory (Hochreiter and Schmidhuber 1997)."""

    def __init__(self, vocab_size: int, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.layers = nn.LSTM(width, width, num_layers=2, batch_first=True, dropout=0.1)
        self.head = nn.Linear(width, vocab_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return logits (B, T, V) of ids (B, T)."""
        states, _ = self.layers(self.embedding(input_ids))
        logits: Tensor = self.head(states)
        return logits


def make_trainer(directory: Path) -> Trainer:
    """Return a trainer of a new model, always the same one."""
    torch.manual_seed(0)
    config = TrainingConfig(learning_rate=1e-2, checkpoint_dir=str(directory))
    trainer = Trainer(LSTM(VOCABULARY), *tiny_loaders(), device="cpu", config=config)
    Accuracy().attach(trainer.evaluator, "accuracy")
    TopKCategoricalAccuracy(k=3).attach(trainer.evaluator, "top_3")
    return trainer


def main() -> bool:
    """Train two epochs at once, and one by one; return whether the weights are equal."""
    with tempfile.TemporaryDirectory() as place:
        whole = make_trainer(Path(place, "whole"))
        whole.train(num_epochs=2)
        first = make_trainer(Path(place, "parts"))
        first.train(num_epochs=1)
        second = make_trainer(Path(place, "parts"))
        second.resume(Path(place, "parts", f"step-{first.state.iteration:08d}"))
        second.train(num_epochs=2)
    metrics = second.state.metrics
    print(
        f"validation loss {metrics['val/loss']:.3f}, accuracy {metrics['val/accuracy']:.3f},"
        f" among the first three {metrics['val/top_3']:.3f}"
    )
    pairs = zip(whole.model.parameters(), second.model.parameters(), strict=True)
    equal = all(torch.equal(a, b) for a, b in pairs)
    print(f"weights equal, bit for bit: {equal}")
    return equal


if __name__ == "__main__":
    main()
