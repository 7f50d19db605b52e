"""An exponential mean of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fundamentallm.config.base import Share
from fundamentallm.events import TrainingEvents
from fundamentallm.training.handlers.base import HANDLERS
from fundamentallm.training.loop import TrainingLoop
from fundamentallm.training.saved import saved_count


@HANDLERS.register("weight_ema")
class WeightEMA:
    """Observes: keeps float32 averages of the weights and evaluates with them.

    After each applied update, average <- d * average + (1 - d) * weight with
    d = min(decay, (1 + n) / (10 + n)) for update n: the warmup keeps the random initial weights
    from lingering (TensorFlow's ExponentialMovingAverage; Polyak averaging). A rejected step
    leaves the averages untouched.

    Args:
        decay: weight of the past in the long run, in [0, 1).
    """

    def __init__(self, decay: Share = 0.999) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay must lie in [0, 1), got {decay}")
        self.decay = decay
        self.num_updates = 0
        self.averages: dict[str, Tensor] = {}
        self._parameters: dict[str, Tensor] = {}

    def attach(self, trainer: TrainingLoop) -> None:
        """Average at FLLM_OPTIMIZER_STEPPED; lend the averages to every evaluation."""
        self._parameters = dict(trainer.model.named_parameters())
        trainer.evaluate_with(self.swapped_in)
        trainer.add_event_handler(TrainingEvents.FLLM_RUN_STARTED, self.start)
        trainer.add_event_handler(TrainingEvents.FLLM_OPTIMIZER_STEPPED, self.update)

    @torch.no_grad()
    def start(self) -> None:
        """Begin from the weights as they are, unless averages were restored."""
        if not self.averages:
            # Always a copy: for float32 weights, `.float()` would be the weight itself.
            self.averages = {
                name: weight.detach().to(torch.float32, copy=True)
                for name, weight in self._parameters.items()
            }

    @torch.no_grad()
    def update(self) -> None:
        """Move each average towards its weight, all in a few fused kernels."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        weights = [weight.detach().float() for weight in self._parameters.values()]
        torch._foreach_lerp_(list(self.averages.values()), weights, 1.0 - decay)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Run a block with the averages in the model; always restore the weights."""
        if not self.averages:
            yield
            return
        kept = {name: weight.detach().clone() for name, weight in self._parameters.items()}
        try:
            self._write(self.averages)
            yield
        finally:
            self._write(kept)

    @torch.no_grad()
    def _write(self, values: dict[str, Tensor]) -> None:
        for name, weight in self._parameters.items():
            weight.copy_(values[name])

    def state_dict(self) -> dict[str, Any]:
        """Return the averages and the number of updates behind them."""
        return {"num_updates": self.num_updates, "averages": self.averages}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore saved averages.

        Raises:
            ValueError: they belong to another model.
        """
        saved = state_dict["averages"]
        if saved and saved.keys() != self._parameters.keys():
            odd = sorted(saved.keys() ^ self._parameters.keys())
            raise ValueError(f"the averages belong to another model: {', '.join(odd[:5])}")
        for name, tensor in saved.items():
            if tensor.shape != (shape := self._parameters[name].shape):
                raise ValueError(f"the average of {name} is {[*tensor.shape]}, not {[*shape]}")
        self.num_updates = saved_count(state_dict, "num_updates")
        self.averages = {
            name: tensor.to(self._parameters[name].device, torch.float32, copy=True)
            for name, tensor in saved.items()
        }
