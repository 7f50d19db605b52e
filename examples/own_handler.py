"""A handler of your own: the signal-to-noise ratio of the gradient, without touching the package.

    python examples/own_handler.py
    PYTHONPATH=examples fundamentallm run train \\
        --plugins own_handler handlers.gradient_noise.every=20

What to learn: a handler is a class with `attach(trainer)`. It observes at the event where its
numbers exist, writes `state.metrics`, and the logs and TensorBoard pick them up at a later event.
With `state_dict` and `load_state_dict` it is part of every checkpoint.
"""

from __future__ import annotations

from typing import Any

from ignite.engine import Events

from fundamentallm.events import TrainingEvents
from fundamentallm.training.handlers import HANDLERS
from fundamentallm.training.trainer import Trainer


@HANDLERS.register("gradient_noise")
class GradientNoise:
    """Observes: writes `train/gradient_noise`, the relative spread of the gradient's norm.

    Args:
        every: steps between two measurements.
        decay: weight of the past in the running mean and variance.
    """

    def __init__(self, every: int = 10, decay: float = 0.9) -> None:
        self.every = every
        self.decay = decay
        self.mean = 0.0
        self.variance = 0.0

    def attach(self, trainer: Trainer) -> None:
        """Measure every n-th update, write as a producer."""
        trainer.add_event_handler(
            TrainingEvents.FLLM_OPTIMIZER_STEPPED(every=self.every), self.measure
        )
        trainer.add_event_handler(Events.ITERATION_COMPLETED, self.write)

    def measure(self, trainer: Trainer) -> None:
        """Update mean and variance of the norm (Welford's update with forgetting)."""
        norm = float(trainer.grad_norm)
        difference = norm - self.mean
        self.mean += (1 - self.decay) * difference
        self.variance = self.decay * (self.variance + (1 - self.decay) * difference**2)

    def write(self, trainer: Trainer) -> None:
        """Put the figure where every consumer finds it."""
        noise = self.variance**0.5 / self.mean if self.mean else 0.0
        trainer.state.metrics["train/gradient_noise"] = noise

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {"mean": self.mean, "variance": self.variance}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self.mean, self.variance = state["mean"], state["variance"]


def main() -> None:
    """Train a tiny model with the handler and print what it measured."""
    from fundamentallm.testing import tiny_loaders, tiny_model

    train_loader, val_loader = tiny_loaders()
    trainer = Trainer(tiny_model(), train_loader, val_loader, device="cpu")
    GradientNoise(every=2).attach(trainer)
    trainer.train(num_epochs=3)
    print(f"gradient noise {trainer.state.metrics['train/gradient_noise']:.3f}")


if __name__ == "__main__":
    main()
