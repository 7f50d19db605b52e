"""A loss of your own with a second output, which is logged, without touching the package.

    python examples/own_loss.py
    PYTHONPATH=examples fundamentallm run train --plugins own_loss \\
        'training.loss={name: confidence_penalty, beta: 0.1}' handlers.prediction_entropy=true

What to learn: a loss is called with each micro-batch and returns a sum over its valid targets; the
step divides it by their number over all micro-batches and ranks. What else it knows, it keeps, and
a handler writes that into `state.metrics`. `train/loss` stays the plain cross-entropy, whatever is
minimized, so runs with different losses can be compared.
"""

from __future__ import annotations

import torch
from ignite.engine import Events
from torch import Tensor

from fundamentallm.events import TrainingEvents
from fundamentallm.training.handlers import HANDLERS
from fundamentallm.training.losses import LOSSES
from fundamentallm.training.trainer import Trainer


@LOSSES.register("confidence_penalty")
class ConfidencePenalty:
    """Cross-entropy minus beta times the entropy of the prediction (Pereyra et al. 2017).

    Args:
        beta: weight of the entropy, at least 0.

    Attributes:
        parts: the entropy in nats and the number of targets, float64 (2,), summed since they were
            last cleared; None before the first batch.
    """

    def __init__(self, beta: float = 0.1) -> None:
        if beta < 0:
            raise ValueError(f"beta must be at least 0, got {beta}")
        self.beta = beta
        self.parts: Tensor | None = None

    def __call__(self, logits: Tensor, targets: Tensor, reduction: str = "sum") -> Tensor:
        """Return the sum over the valid targets (...) of logits (..., V)."""
        if reduction != "sum":
            raise ValueError(f"confidence_penalty only sums, got reduction {reduction!r}")
        valid = targets >= 0
        log_p = logits[valid].float().log_softmax(-1)
        nll = -log_p.gather(-1, targets[valid].unsqueeze(-1)).sum()
        entropy = -(log_p.exp() * log_p).sum()
        parts = torch.stack([entropy.detach().double(), valid.sum().double()])
        self.parts = parts if self.parts is None else self.parts + parts
        return nll - self.beta * entropy


@HANDLERS.register("prediction_entropy")
class PredictionEntropy:
    """Observes: writes `train/entropy`, nats per token, at the steps that are logged."""

    def attach(self, trainer: Trainer) -> None:
        """Clear the sums before each step; read them before the logs do."""
        if not isinstance(trainer.loss_fn, ConfidencePenalty):
            raise ValueError("prediction_entropy needs the loss confidence_penalty")
        self.loss = trainer.loss_fn
        trainer.add_event_handler(Events.ITERATION_STARTED, self.clear)
        trainer.add_event_handler(TrainingEvents.FLLM_METRICS_MEASURED, self.measure)

    def clear(self) -> None:
        """Forget the last step."""
        self.loss.parts = None

    def measure(self, trainer: Trainer) -> None:
        """Sum over the ranks and read, which waits for a GPU and is not done in every step."""
        if self.loss.parts is not None and trainer.is_log_step():
            entropy, count = trainer.ranks.sum_tensor(self.loss.parts).tolist()
            trainer.state.metrics["train/entropy"] = entropy / count


def main() -> None:
    """Train a tiny model with and without the penalty."""
    from fundamentallm.testing import tiny_loaders, tiny_model
    from fundamentallm.training.optimizers import OptimizerBuilder

    for beta in (0.0, 0.5):
        torch.manual_seed(0)
        model = tiny_model()
        trainer = Trainer(
            model,
            *tiny_loaders(),
            OptimizerBuilder.build("adamw", model, lr=1e-2),
            loss_fn=ConfidencePenalty(beta),
            device="cpu",
            handlers=[PredictionEntropy()],
        )
        trainer.train(num_epochs=5)
        metrics = trainer.state.metrics
        print(
            f"beta {beta}: loss {metrics['train/loss']:.3f}, entropy {metrics['train/entropy']:.3f}"
        )


if __name__ == "__main__":
    main()
